"""Weights of Keras's recurrent layers as cells of ours; Keras itself is not imported.

================  =================================================  ===================================================
Keras             stored                                             ours
================  =================================================  ===================================================
``LSTM``          gates i f c o; bias (4N,)                          ``lstm``: i f g o with g = c
``GRU``           gates z r h; bias (2, 3N) (input's, state's)       ``gru``: r u n with u = z, n = h; the state's bias
                                                                     of h is ``b_m``
 … before         ``reset_after=False``; bias (3N,)                  ``gru(reset="before")``
``SimpleRNN``     bias (N,)                                          ``vanilla``
================  =================================================  ===================================================

Kernels are (in, out), ours (out, in).  Formulas as of Keras 3.15, h' = z ⊙ h + (1 − z) ⊙ n among them.

A ``.keras`` file, and an ``.h5`` one of a whole model, tell classes, options and order.  Weights alone do not: then the
class follows from the widths (4N, 3N, N) and the variant of the GRU from its bias, activations are taken to be Keras's
own, and the order of several layers is an argument.

Layers that do something between two recurrent ones (Dense, LayerNormalization) are not part of a chain of Jacobians;
those that do nothing when a model is used (Dropout) are passed over.  ``zero_output_for_mask``, ``stateful`` and the
precision policy play no part: sequences are whole and start at 0.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rnngrad.cells.gru import GRUParams, gru
from rnngrad.cells.lstm import LSTMParams, lstm
from rnngrad.cells.vanilla import VanillaParams, vanilla
from rnngrad.interop.adapted import Adapted, LayerParams, Pass, join
from rnngrad.interop.files import read_keras_config, read_weights
from rnngrad.types import Cell, DTypeLike, Params

_GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
_SNAKE = {
    **{"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "simple_rnn", "RNN": "rnn", "Bidirectional": "bidirectional"},
    **{"LSTMCell": "lstm_cell", "GRUCell": "gru_cell", "SimpleRNNCell": "simple_rnn_cell"},
    **{"Sequential": "sequential", "Functional": "functional"},
}
"""How Keras writes a class in the paths of a file."""
_MODELS = frozenset({"Sequential", "Functional", "Model"})
_PASSED_OVER = frozenset(
    "ActivityRegularization AlphaDropout Dropout GaussianDropout GaussianNoise InputLayer SpatialDropout1D".split()
)
"""Layers that hand their input on when a model is used."""
_ACTIVATIONS = {"tanh": "tanh", "sigmoid": "sigmoid", "relu": "relu", "linear": "identity"}
"""Keras's name -> ours."""


class _Unit(NamedTuple):
    """One cell of a pass: its class and options, and where its weights are."""

    kind: str
    kernel: str
    recurrent: str
    bias: str | None
    activation: str
    recurrent_activation: str
    reset: str


class _Layer(NamedTuple):
    """One layer of Keras: its cells, one above the other, for each direction."""

    name: str
    ways: tuple[tuple[_Unit, ...], ...]
    go_backwards: bool


def from_keras(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    layers: Sequence[str] = (),
    activation: str | None = None,
    dtype: DTypeLike | None = None,
) -> Adapted:
    """Returns the recurrent layers of a Keras model, as cells of ours with its weights.

    Args:
      source: a ``.keras``, ``.weights.h5`` or ``.h5`` file, or what :func:`rnngrad.interop.read_weights` read from it.
      layers: names of the layers to take, in their order: Keras's own where the file describes the model, else the
        beginnings of the weights' names, e.g. ``"layers.gru_1"``.  Needed where the order is not known, where branches
        meet, and where something stands between recurrent layers.
      activation: φ of every ``SimpleRNN``, where the file does not describe the model; None is Keras's own, tanh.
      dtype: of our weights and states; None keeps Keras's.

    Returns:
      The model; its input is that of its first recurrent layer, and its outputs stand in the order of time, also where
      Keras's ``go_backwards`` turns them.  ``convert`` takes a mapping with the names of the file and can be
      differentiated, so that gradients come back under Keras's names.

    Raises:
      ValueError: no recurrent layer, an unknown one, an option that has no counterpart, weights that do not fit, or
        what :func:`rnngrad.interop.read_weights` finds.

    >>> import numpy as np
    >>> shapes = {"0": (3, 20), "1": (5, 20), "2": (20,)}
    >>> weights = {f"layers.lstm.cell.vars.{i}": np.ones(shape, np.float32) for i, shape in shapes.items()}
    >>> model = from_keras(weights)
    >>> model.source, model.cell.input_size
    ('keras.LSTM(5)', 3)
    """
    if isinstance(source, Mapping):
        weights, config = source, None
    else:
        weights, config = read_weights(source), read_keras_config(source)
    parents = _recurrent_parents(weights)
    if not parents:
        shown = ", ".join(list(weights)[:12]) or "nothing"
        raise ValueError(f"from_keras: expected the weights of an LSTM, GRU or SimpleRNN, found {shown}")
    chosen: list[_Layer] | None = None
    if config is not None:
        with _reading_description():
            if config.get("class_name") in _MODELS:
                if activation is not None:
                    raise ValueError("from_keras: expected no activation, since the file itself names it")
                chosen = _described(weights, parents, config, tuple(layers))
    if chosen is None:
        chosen = _undescribed(weights, parents, tuple(layers), activation or "tanh")

    units = [unit for layer in chosen for way in layer.ways for unit in way]
    names = [name for unit in units for name in (unit.kernel, unit.recurrent, unit.bias) if name is not None]
    found = {name: weights[name].dtype for name in names}
    if not all(jnp.issubdtype(one, jnp.floating) for one in found.values()) or (
        dtype is None and len(set(found.values())) > 1
    ):
        listed = ", ".join(f"{name} {one}" for name, one in found.items())
        raise ValueError(f"from_keras: expected one floating dtype, found {listed}")
    target = jax.dtypes.canonicalize_dtype(found[names[0]] if dtype is None else jnp.dtype(dtype))

    # Keras hands a turned sequence on as it is: the next layer's first step is the last one in time
    passes: list[tuple[Pass, ...]] = []
    members: list[tuple[_Unit, ...]] = []
    is_turned = False
    width: int | None = None
    for layer in chosen:
        is_turned ^= layer.go_backwards
        if len(layer.ways) == 2:
            level = [tuple(way[0] for way in layer.ways)]
        else:
            level = [(unit,) for unit in layer.ways[0]]
        for row in level:
            cells = [_cell(weights, unit, target) for unit in row]
            if width is not None and any(cell.input_size != width for cell in cells):
                raise ValueError(
                    f"from_keras: layer {layer.name!r}: expected an input of size {width}, that of the layer below's "
                    f"output, found {cells[0].input_size}; choose by layers="
                )
            width = sum(_hidden_size(weights, unit) for unit in row)
            passes.append(tuple(Pass("", cell, is_turned ^ bool(way), True) for way, cell in enumerate(cells)))
            members.append(row)

    def convert(weights: Any) -> LayerParams:
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"from_keras: expected the names it was built from, found no {', '.join(missing)}")
        return tuple(tuple(_params(weights, unit, target) for unit in row) for row in members)

    return join("keras." + " > ".join(_label(weights, layer) for layer in chosen), passes, convert, weights)


def _label(weights: Mapping[str, Any], layer: _Layer) -> str:
    inner = ", ".join(f"{unit.kind}({_hidden_size(weights, unit)})" for unit in layer.ways[0])
    return f"Bidirectional({inner})" if len(layer.ways) == 2 else inner


# --- weights by name -------------------------------------------------------------------------------------------------


class _Trio(NamedTuple):
    """Names of a cell's weights."""

    kernel: str
    recurrent: str
    bias: str | None


def _recurrent_parents(weights: Mapping[str, Any]) -> dict[str, _Trio]:
    """Returns the weights of every recurrent cell by the name that they share."""
    parents: dict[str, _Trio] = {}
    for name in weights:
        for recurrent, kernel, bias in (
            (".vars.1", ".vars.0", ".vars.2"),  # Keras 3
            (".recurrent_kernel", ".kernel", ".bias"),  # before, and the files called legacy
            (".recurrent_kernel:0", ".kernel:0", ".bias:0"),  # Keras 2
        ):
            parent = name.removesuffix(recurrent)
            if parent == name or parent + kernel not in weights:
                continue
            trio = _Trio(parent + kernel, name, parent + bias if parent + bias in weights else None)
            if _kind(weights, trio) is not None:
                parents[parent] = trio
    return parents


def _kind(weights: Mapping[str, Any], trio: _Trio) -> str | None:
    """Returns the class whose widths these are, None for none."""
    kernel, recurrent = tuple(weights[trio.kernel].shape), tuple(weights[trio.recurrent].shape)
    if len(kernel) != 2 or len(recurrent) != 2 or kernel[1] != recurrent[1] or not recurrent[0]:
        return None
    width = recurrent[1]
    kind = next((kind for kind, num_gates in _GATES.items() if width == num_gates * recurrent[0]), None)
    shapes = {(width,), (2, width)} if kind == "GRU" else {(width,)}
    return kind if trio.bias is None or tuple(weights[trio.bias].shape) in shapes else None


def _hidden_size(weights: Mapping[str, Any], unit: _Unit) -> int:
    return int(weights[unit.recurrent].shape[0])


def _way(parent: str) -> int:
    """Returns 1 for the cell that a Bidirectional runs backward, else 0."""
    return int(any(part.startswith("backward_") for part in parent.split(".")))


def _is_both_ways(parent: str) -> bool:
    return any(part.startswith(("forward_", "backward_")) for part in parent.split("."))


def _unit(
    weights: Mapping[str, Any],
    trio: _Trio,
    *,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    reset: str | None = None,
) -> _Unit:
    """Returns a cell; ``reset`` None reads the variant of a GRU off its bias."""
    kind = _kind(weights, trio)
    if kind is None:
        raise ValueError(f"from_keras: {trio.recurrent}: expected the weights of an LSTM, GRU or SimpleRNN")
    if kind == "GRU" and reset is None:
        if trio.bias is None:
            raise ValueError(
                f"from_keras: {trio.recurrent}: a GRU without bias does not tell whether reset_after is set; expected "
                "the .keras file, which does"
            )
        reset = "after" if weights[trio.bias].ndim == 2 else "before"
    return _Unit(kind, *trio, activation, recurrent_activation, reset or "after")


# --- layers without a description ------------------------------------------------------------------------------------


def _undescribed(
    weights: Mapping[str, Any], parents: Mapping[str, _Trio], wanted: tuple[str, ...], activation: str
) -> list[_Layer]:
    """Returns the layers that the names tell."""
    grouped: dict[str, list[str]] = {}
    for parent in parents:
        # both directions of a Bidirectional have one name up to here
        parts = re.split(r"\.(?:forward|backward)_", parent, maxsplit=1)
        grouped.setdefault(parts[0], []).append(parent)
    if not wanted and len(grouped) > 1:
        by_number = sorted(grouped, key=lambda key: [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", key)])
        raise ValueError(
            "from_keras: expected layers= in their order, which weights alone do not tell, or the .keras file; found "
            + ", ".join(map(repr, by_number))
        )
    keys = [_one_of(name, grouped) for name in wanted] or list(grouped)
    found = []
    for key in keys:
        group = sorted(grouped[key], key=_way)
        units = []
        for parent in group:
            kind = _kind(weights, parents[parent])
            units.append(_unit(weights, parents[parent], activation=activation if kind == "SimpleRNN" else "tanh"))
        is_both_ways = _is_both_ways(group[0])
        if [_way(parent) for parent in group] != ([0, 1] if is_both_ways else [0]):
            raise ValueError(f"from_keras: {key}: expected a cell for each direction, found {', '.join(group)}")
        found.append(_Layer(key, tuple((unit,) for unit in units), go_backwards=False))
    return found


def _one_of(name: str, grouped: Mapping[str, Any]) -> str:
    fitting = [key for key in grouped if key == name or key.startswith(name + ".")]
    if len(fitting) != 1:
        shown = ", ".join(repr(key) for key in grouped)
        raise ValueError(f"from_keras: expected each of layers to begin one of {shown}, found {name!r}")
    return fitting[0]


# --- layers with a description ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading_description() -> Iterator[None]:
    """Says that the description is damaged where something in it is missing or of another kind."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"from_keras: expected Keras's description of a model, found a damaged one: {type(error).__name__} {error}"
        ) from error


class _Described(NamedTuple):
    """A layer of the description."""

    class_name: str
    name: str
    config: Mapping[str, Any]
    places: tuple[str, ...]
    """Where its weights may be: in Keras 3's paths and in legacy ones."""


def _described(
    weights: Mapping[str, Any], parents: Mapping[str, _Trio], model: Mapping[str, Any], wanted: tuple[str, ...]
) -> list[_Layer]:
    every = list(_walk(model, ""))
    is_recurrent = lambda one: one.class_name in ("LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional")
    recurrent = [one for one in every if is_recurrent(one)]
    shown = ", ".join(repr(one.name) for one in recurrent)
    if wanted:
        by_name = {one.name: one for one in recurrent}
        unknown = [name for name in wanted if name not in by_name]
        if unknown:
            raise ValueError(f"from_keras: expected layers to be among {shown or 'none'}, found {unknown[0]!r}")
        taken = [by_name[name] for name in wanted]
    else:
        if not recurrent:
            classes = ", ".join(dict.fromkeys(one.class_name for one in every))
            raise ValueError(f"from_keras: expected an LSTM, GRU, SimpleRNN, RNN or Bidirectional, found {classes}")
        if len(recurrent) > 1 and not _is_a_line(model):
            raise ValueError(f"from_keras: expected one line of layers, found branches around {shown}; pass layers=")
        places = [index for index, one in enumerate(every) if is_recurrent(one)]
        between = [one for one in every[places[0] : places[-1]] if not is_recurrent(one)]
        acting = [f"{one.name!r} ({one.class_name})" for one in between if one.class_name not in _PASSED_OVER]
        if acting:
            raise ValueError(
                "from_keras: expected recurrent layers one above the other, found "
                f"{', '.join(acting)} between {shown}; choose by layers="
            )
        taken = recurrent
    return [_layer(weights, parents, one) for one in taken]


def _walk(model: Mapping[str, Any], root: str) -> Iterator[_Described]:
    """Yields the layers of a model and of models within it."""
    counts: dict[str, int] = {}
    for layer in model["config"]["layers"]:
        class_name, config = layer["class_name"], layer["config"]
        snake = "functional" if class_name == "Model" else _SNAKE.get(class_name, class_name)
        count = counts[snake] = counts.get(snake, -1) + 1
        place = f"{root}layers.{snake}" + (f"_{count}" if count else "")
        name = config.get("name", layer.get("name", snake))
        if class_name in _MODELS:
            yield from _walk(layer, place + ".")
        else:
            yield _Described(class_name, name, config, (place, f"model_weights.{name}", name))


def _is_a_line(model: Mapping[str, Any]) -> bool:
    """Returns whether every layer hears the one before it in the list alone, once."""
    layers = model["config"]["layers"]
    inner = [layer for layer in layers if layer["class_name"] in _MODELS]
    if not all(map(_is_a_line, inner)):
        return False
    if model["class_name"] == "Sequential":
        return True
    before: str | None = None
    for layer in layers:
        heard = set(_heard(layer.get("inbound_nodes", [])))
        if len(layer.get("inbound_nodes", [])) > 1 or heard != (set() if before is None else {before}):
            return False
        before = layer.get("name", layer["config"].get("name"))
    return True


def _heard(node: Any) -> Iterator[str]:
    """Yields the names of the layers whose outputs stand in a call: Keras 3's ``keras_history``, Keras 2's triples."""
    if isinstance(node, Mapping):
        if "keras_history" in node:
            yield node["keras_history"][0]
        else:
            for value in node.values():
                yield from _heard(value)
    elif isinstance(node, list):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int) and isinstance(node[2], int):
            yield node[0]
        else:
            for value in node:
                yield from _heard(value)


def _layer(weights: Mapping[str, Any], parents: Mapping[str, _Trio], layer: _Described) -> _Layer:
    ways: list[tuple[str, Mapping[str, Any]]]
    if layer.class_name == "Bidirectional":
        if layer.config.get("merge_mode", "concat") != "concat":
            raise ValueError(
                f"from_keras: layer {layer.name!r}: expected merge_mode 'concat', found {layer.config['merge_mode']!r}"
            )
        forward = layer.config["layer"]
        backward = layer.config.get("backward_layer") or forward
        ways = [(one["class_name"], one["config"]) for one in (forward, backward)]
    else:
        ways = [(layer.class_name, layer.config)]
    own: list[str] = []
    for place in layer.places:
        own = own or [parent for parent in parents if parent == place or parent.startswith(place + ".")]
    built = []
    for way, (class_name, config) in enumerate(ways):
        mine = [parent for parent in own if _way(parent) == way]
        cells = _cells_of(class_name, config, layer.name)
        if len(cells) > 1 and len(ways) > 1:
            raise ValueError(f"from_keras: layer {layer.name!r}: Bidirectional around several cells is not supported")
        if len(cells) > 1:
            mine = _matched(mine, cells)
        if len(mine) != len(cells):
            raise ValueError(
                f"from_keras: layer {layer.name!r}: expected the weights of {len(cells)} cells under "
                f"{' or '.join(layer.places)}, found {', '.join(own) or ', '.join(parents)}"
            )
        built.append(
            tuple(
                _unit_of(weights, parents[parent], *cell, layer.name) for parent, cell in zip(mine, cells, strict=True)
            )
        )
    return _Layer(layer.name, tuple(built), bool(ways[0][1].get("go_backwards", False)))


def _cells_of(class_name: str, config: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns (class, options) of the cells that a layer runs, the lowest first."""
    if class_name in _GATES:
        return [(class_name, config)]
    if class_name == "RNN":
        cell = config["cell"]
        within = cell["config"]["cells"] if cell["class_name"] == "StackedRNNCells" else [cell]
        return [(one["class_name"].removesuffix("Cell"), one["config"]) for one in within]
    raise ValueError(f"from_keras: layer {name!r}: expected LSTM, GRU, SimpleRNN or RNN, found {class_name}")


def _matched(parents: list[str], cells: list[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Returns the cells of a stack in its order: by Keras 3's numbered classes or by their own names."""
    counts: dict[str, int] = {}
    ordered: list[str] = []
    for kind, config in cells:
        snake = _SNAKE.get(kind + "Cell", kind)
        count = counts[snake] = counts.get(snake, -1) + 1
        last = {parent.rpartition(".")[2]: parent for parent in parents}
        numbered = snake + (f"_{count}" if count else "")
        is_of_keras_3 = any(".cells." in parent for parent in parents)
        ordered.extend(last[name] for name in [numbered if is_of_keras_3 else config["name"]] if name in last)
    return ordered


def _unit_of(weights: Mapping[str, Any], trio: _Trio, kind: str, config: Mapping[str, Any], name: str) -> _Unit:
    """Returns a cell with the options of its description."""
    if kind not in _GATES:
        raise ValueError(f"from_keras: layer {name!r}: expected LSTM, GRU or SimpleRNN cells, found {kind}")
    if _kind(weights, trio) != kind:
        shapes = f"{tuple(weights[trio.kernel].shape)} and {tuple(weights[trio.recurrent].shape)}"
        raise ValueError(f"from_keras: layer {name!r}: expected the kernels of {kind}, found shapes {shapes}")

    def option(key: str, default: str, allowed: Sequence[str]) -> str:
        found = config.get(key, default)
        if not isinstance(found, str) or found not in allowed:
            shown = found.get("registered_name") or found.get("class_name") if isinstance(found, Mapping) else found
            listed = " or ".join(allowed)
            raise ValueError(
                f"from_keras: layer {name!r}: expected {key} of its {kind} to be {listed}, found {shown!r}"
            )
        return _ACTIVATIONS[found]

    activation = option("activation", "tanh", list(_ACTIVATIONS) if kind == "SimpleRNN" else ["tanh"])
    inner = "sigmoid"
    if kind != "SimpleRNN":
        inner = option("recurrent_activation", "sigmoid", list(_ACTIVATIONS) if kind == "LSTM" else ["sigmoid"])
    reset = "after" if config.get("reset_after", True) else "before"
    if kind == "GRU" and trio.bias is not None and (weights[trio.bias].ndim == 2) != (reset == "after"):
        raise ValueError(
            f"from_keras: layer {name!r}: expected a bias of {'two rows' if reset == 'after' else 'one row'} for "
            f"reset_after={reset == 'after'}, found shape {tuple(weights[trio.bias].shape)}"
        )
    return _unit(weights, trio, activation=activation, recurrent_activation=inner, reset=reset)


# --- values ----------------------------------------------------------------------------------------------------------


def _cell(weights: Mapping[str, Any], unit: _Unit, dtype: DTypeLike) -> Cell:
    sizes = int(weights[unit.kernel].shape[0]), _hidden_size(weights, unit)
    if unit.kind == "LSTM":
        return lstm(*sizes, gate_activation=unit.recurrent_activation, dtype=dtype)
    if unit.kind == "GRU":
        return gru(*sizes, reset=unit.reset, dtype=dtype)
    return vanilla(*sizes, activation=unit.activation, dtype=dtype)


def _params(weights: Mapping[str, Any], unit: _Unit, dtype: DTypeLike) -> Params:
    array = lambda name: jnp.asarray(weights[name]).astype(dtype)
    w_ih, w_hh = array(unit.kernel).T, array(unit.recurrent).T
    num_rows, hidden_size = w_hh.shape
    b = jnp.zeros((num_rows,), dtype) if unit.bias is None else array(unit.bias)
    if unit.kind != "GRU":
        return (LSTMParams if unit.kind == "LSTM" else VanillaParams)(w_ih, w_hh, b)
    rows = np.arange(num_rows).reshape(3, hidden_size)
    order = rows[[1, 0, 2]].ravel()  # z r h -> r u n
    b_m = jnp.zeros((hidden_size,), dtype)
    if b.ndim == 2:
        b_m = b[1, 2 * hidden_size :]
        b = b[0] + _without_candidate(b[1], hidden_size)
    return GRUParams(w_ih[order], w_hh[order], b[order], b_m)


def _without_candidate(b: Array, hidden_size: int) -> Array:
    return jnp.concatenate([b[: 2 * hidden_size], jnp.zeros_like(b[2 * hidden_size :])])
