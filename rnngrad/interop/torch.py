"""Weights of Torch's recurrent modules as cells of ours; Torch itself is not imported.

==============================  ===================================  ==================================================
Torch                           rows of ``weight_hh``, in N          ours
==============================  ===================================  ==================================================
``LSTM``, ``LSTMCell``          4, gates i f g o                     ``lstm``: i f g o
``GRU``, ``GRUCell``            3, gates r z n                       ``gru``: r u n with u = z, reset after
``RNN``, ``RNNCell``            1                                    ``vanilla``
==============================  ===================================  ==================================================

Weights are (out, in) on both sides.  ``b`` is ``bias_ih + bias_hh``, except for n of the GRU, whose ``bias_hh`` stands
inside of r ⊙ (…) and becomes ``b_m``.  Names as of torch 2.13: ``weight_ih_l{layer}`` with ``_reverse`` for the pass
that runs backward, and without ``_l{layer}`` in a cell.

A state dict does not tell dropout (it is off), ``batch_first`` (ours is always (T, B, D)) and the non-linearity of an
``RNN``, which is therefore an argument.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rnngrad.cells.gru import GRUParams, gru
from rnngrad.cells.lstm import LSTMParams, lstm
from rnngrad.cells.vanilla import VanillaParams, vanilla
from rnngrad.interop.adapted import Adapted, LayerParams, Pass, join
from rnngrad.types import Cell, DTypeLike, Params

_KINDS = {4: "LSTM", 3: "GRU", 1: "RNN"}
"""By rows of ``weight_hh`` over hidden size."""
_SUFFIX = re.compile(r"(?:_l(\d{1,4})(?:_reverse)?)?")
"""Of a weight's name.  As many layers as the largest number are looked for, so that it is short."""
_NAME = re.compile(rf"(?P<prefix>(?:.*\.)?)weight_hh{_SUFFIX.pattern}")


class _Names(NamedTuple):
    """What one pass is made of."""

    w_ih: str
    w_hh: str
    b_ih: str | None
    b_hh: str | None


def from_torch(
    weights: Mapping[str, Any],
    *,
    prefix: str = "",
    activation: str = "tanh",
    dtype: DTypeLike | None = None,
) -> Adapted:
    """Returns a recurrent module of Torch, all its layers and directions, as cells of ours with its weights.

    Args:
      weights: a state dict, or what :func:`rnngrad.interop.read_weights` read: name -> Torch tensor or array.  Names
        that do not belong to the module are ignored.
      prefix: name of the module within a larger model, e.g. ``"encoder.lstm"``; needed where there are several.
      activation: φ of an ``RNN`` or ``RNNCell``, ``"tanh"`` or ``"relu"``; Torch does not store it.
      dtype: of our weights and states; None keeps Torch's (float64 becomes float32 unless JAX has it enabled).

    Returns:
      The model; ``convert`` takes a mapping with the names of ``weights`` and can be differentiated, so that gradients
      come back under Torch's names.

    Raises:
      ValueError: no recurrent module or several, missing names, shapes that do not fit, ``proj_size``.

    >>> import numpy as np
    >>> shapes = {"weight_ih_l0": (20, 3), "weight_hh_l0": (20, 5), "bias_ih_l0": (20,), "bias_hh_l0": (20,)}
    >>> model = from_torch({"rnn." + name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    >>> model.source, model.cell.name
    ("torch.nn.LSTM(3, 5) 'rnn'", 'lstm')
    """
    prefix = _only_module(weights, prefix)
    layers = _layers(weights, prefix)
    names = [name for layer in layers for one in layer for name in one if name is not None]
    found = {name: _dtype(name, weights[name]) for name in names}
    if dtype is None and len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {kind}" for name, kind in found.items())
        raise ValueError(f"from_torch: expected one dtype, found {listed}; pass dtype=")
    kept = next(iter(found.values())) if dtype is None else jnp.dtype(dtype)
    target = jax.dtypes.canonicalize_dtype(kept)

    sizes = _sizes(weights, layers)
    kind = sizes.kind
    if kind != "RNN" and activation != "tanh":
        raise ValueError(f"from_torch: activation={activation!r} is for an RNN, found a module of kind {kind}")
    makers: dict[str, Callable[..., Cell]] = {
        "LSTM": lstm,
        "GRU": gru,
        "RNN": functools.partial(vanilla, activation=activation),
    }
    make = makers[kind]
    passes: list[tuple[Pass, ...]] = []
    for index, layer in enumerate(layers):
        width = sizes.input_size if index == 0 else sizes.hidden_size * len(layers[0])
        cell = make(width, sizes.hidden_size, dtype=target)
        # the cell is shared by both directions, so that what one compiles serves the other
        passes.append(tuple(Pass("", cell, reverse, True) for reverse in (False, True)[: len(layer)]))

    def convert(weights: Any) -> LayerParams:
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"from_torch: expected the names it was built from, found no {', '.join(missing)}")
        return tuple(tuple(_params(kind, weights, one, target) for one in layer) for layer in layers)

    options = ([f"num_layers={len(layers)}"] if len(layers) > 1 else []) + ["bidirectional=True"] * (len(layers[0]) - 1)
    where = f" {prefix.removesuffix('.')!r}" if prefix else ""
    suffix = "" if re.search(r"_l\d+$", layers[0][0].w_hh) else "Cell"
    arguments = ", ".join([str(sizes.input_size), str(sizes.hidden_size), *options])
    return join(f"torch.nn.{kind}{suffix}({arguments}){where}", passes, convert, weights)


def as_numpy(leaf: Any) -> np.ndarray:
    """Returns a Torch tensor, or anything else that NumPy takes, as a NumPy array; bfloat16 stays bfloat16."""
    if not hasattr(leaf, "detach"):
        return np.asarray(leaf)
    tensor = leaf.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has none, and every bfloat16 is a float32
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def _dtype(name: str, leaf: Any) -> np.dtype:
    dtype = leaf.dtype if isinstance(leaf, jax.Array) else as_numpy(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"from_torch: {name}: expected real numbers, found dtype {dtype}")
    return dtype


# --- which names -----------------------------------------------------------------------------------------------------


def _shortened(names: list[str], *, most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _only_module(weights: Mapping[str, Any], prefix: str) -> str:
    """Returns the prefix of the module asked for, with its dot."""
    matches = map(_NAME.fullmatch, weights)
    prefixes = list(dict.fromkeys(match["prefix"] for match in matches if match))
    shown = _shortened([repr(one.removesuffix(".")) for one in prefixes])
    if not prefixes:
        raise ValueError(
            "from_torch: expected the weights of an LSTM, GRU or RNN (weight_ih_l0, weight_hh_l0, …), found "
            + (_shortened(list(weights)) or "nothing")
        )
    if not prefix:
        if "" in prefixes or len(prefixes) == 1:
            return "" if "" in prefixes else prefixes[0]
        raise ValueError(f"from_torch: expected one recurrent module, found {shown}; choose by prefix=")
    wanted = prefix.removesuffix(".") + "."
    if wanted not in prefixes:
        near = difflib.get_close_matches(wanted, prefixes, n=1)
        hint = f"; did you mean {near[0].removesuffix('.')!r}?" if near else ""
        raise ValueError(f"from_torch: expected prefix to be one of {shown}, found {prefix!r}{hint}")
    return wanted


def _layers(weights: Mapping[str, Any], prefix: str) -> list[tuple[_Names, ...]]:
    """Returns the names of every pass within every layer."""
    projected = next((name for name in weights if name.startswith(prefix + "weight_hr")), None)
    if projected is not None:
        raise ValueError(f"from_torch: expected an LSTM without proj_size, found {projected}; it is not supported")
    own = [name for name in weights if name.startswith(prefix + "weight_hh")]
    suffixes = [name.removeprefix(prefix + "weight_hh") for name in own]
    matches = [match for suffix in suffixes if (match := _SUFFIX.fullmatch(suffix))]
    if len(matches) < len(own) or ("" in suffixes and len(own) > 1):
        raise ValueError(
            f"from_torch: expected {prefix}weight_hh_l0, {prefix}weight_hh_l0_reverse, {prefix}weight_hh_l1, … or "
            f"{prefix}weight_hh alone, which is a cell's, found {_shortened(own)}"
        )
    if suffixes == [""]:
        wanted: list[tuple[str, ...]] = [("",)]
    else:
        depth = 1 + max(int(match[1]) for match in matches)
        ways = ("", "_reverse") if any(suffix.endswith("_reverse") for suffix in suffixes) else ("",)
        wanted = [tuple(f"_l{layer}{way}" for way in ways) for layer in range(depth)]
    flat = [suffix for layer in wanted for suffix in layer]
    has_bias = any(f"{prefix}bias_{part}{suffix}" in weights for part in ("ih", "hh") for suffix in flat)
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if has_bias else ("weight_ih", "weight_hh")
    missing = [prefix + part + suffix for suffix in flat for part in parts if prefix + part + suffix not in weights]
    if missing:
        raise ValueError(f"from_torch: expected also {_shortened(missing)} beside {prefix}weight_hh{flat[0]}")

    def names(suffix: str) -> _Names:
        w_ih, w_hh, *biases = (prefix + part + suffix for part in parts)
        return _Names(w_ih, w_hh, *(biases or (None, None)))

    return [tuple(map(names, layer)) for layer in wanted]


class _Sizes(NamedTuple):
    """Of a module."""

    kind: str
    input_size: int
    hidden_size: int


def _sizes(weights: Mapping[str, Any], layers: list[tuple[_Names, ...]]) -> _Sizes:
    """Returns kind and sizes after holding every shape against them."""
    first = layers[0][0]
    shape, shape_ih = tuple(weights[first.w_hh].shape), tuple(weights[first.w_ih].shape)
    hidden_size = shape[1] if len(shape) == 2 else 0
    rows = shape[0] // hidden_size if hidden_size and shape[0] % hidden_size == 0 else 0
    if rows not in _KINDS:
        raise ValueError(
            f"from_torch: {first.w_hh}: expected shape (4N, N) of an LSTM, (3N, N) of a GRU or (N, N) of an RNN, found "
            f"{shape}"
        )
    if len(shape_ih) != 2:
        raise ValueError(f"from_torch: {first.w_ih}: expected shape ({rows * hidden_size}, D), found {shape_ih}")
    for index, layer in enumerate(layers):
        width = shape_ih[1] if index == 0 else hidden_size * len(layers[0])
        height = rows * hidden_size
        for one in layer:
            for name, expected in zip(one, ((height, width), (height, hidden_size), (height,), (height,)), strict=True):
                if name is not None and tuple(weights[name].shape) != expected:
                    raise ValueError(
                        f"from_torch: {name}: expected shape {expected}, found {tuple(weights[name].shape)}"
                    )
    return _Sizes(_KINDS[rows], shape_ih[1], hidden_size)


# --- values ----------------------------------------------------------------------------------------------------------


def _params(kind: str, weights: Mapping[str, Any], names: _Names, dtype: DTypeLike) -> Params:
    def array(name: str) -> Array:
        leaf = weights[name]
        return jnp.asarray(leaf if isinstance(leaf, jax.Array) else as_numpy(leaf)).astype(dtype)

    w_ih, w_hh = array(names.w_ih), array(names.w_hh)
    if names.b_ih is None or names.b_hh is None:
        b_ih = b_hh = jnp.zeros(w_hh.shape[:1], dtype)
    else:
        b_ih, b_hh = array(names.b_ih), array(names.b_hh)
    if kind == "GRU":
        hidden_size = w_hh.shape[1]
        gates = b_ih[: 2 * hidden_size] + b_hh[: 2 * hidden_size]
        return GRUParams(w_ih, w_hh, jnp.concatenate([gates, b_ih[2 * hidden_size :]]), b_hh[2 * hidden_size :])
    return (LSTMParams if kind == "LSTM" else VanillaParams)(w_ih, w_hh, b_ih + b_hh)
