"""What Flax nnx and Flax linen have in common: cells, directions, and how kernels become rows.

A Dense layer computes x @ kernel + bias with a kernel (in, out); our rows are its transpose.

=========================  =====================================  ===========================  ==================
Flax cell                  input layers                           recurrent layers             biases
=========================  =====================================  ===========================  ==================
LSTMCell (both)            ii if ig io (nnx writes ``if_``)       hi hf hg ho                  recurrent
OptimizedLSTMCell, linen   ii if ig io                            hi hf hg ho                  recurrent
OptimizedLSTMCell, nnx     dense_i (i f g o)                      dense_h                      recurrent
GRUCell, linen             ir iz in                               hr hz hn                     input, and hn: b_m
GRUCell, nnx               dense_i (r z n)                        dense_h                      input; b_m = 0
SimpleCell                 i (nnx: dense_i)                       h (nnx: dense_h)             input
=========================  =====================================  ===========================  ==================

Flax's z is our u, the share kept.  Its carry is (c, h) for an LSTM.  Cells with options that ours have not (another
``activation_fn``, ``residual``, a subclass) become cells without the split.

``dtype`` narrower than ``param_dtype``: Flax computes the products and the activations in ``dtype`` and keeps the
memory in ``param_dtype``.  So do we, but for the activations, which we compute in ``param_dtype`` from the rounded
pre-activations.

Directions: ``reverse=True`` without ``keep_order`` hands its outputs on in reversed order, and the layer above hears
them so.  A pass of ours always tells the order of time: that layer above is then a reversed one, and the outputs of the
whole model come in the order of time whatever ``keep_order`` says.

Source: flax 0.12, ``nnx/nn/recurrent.py`` and ``linen/recurrent.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rnngrad import cells
from rnngrad.interop.layers import Recurrent, Site, Weights
from rnngrad.types import Cell, DTypeLike, State, leaf_names

# --- one cell --------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Names of the Dense layers in the order of our rows."""

    inputs: tuple[str, ...]
    recurrent: tuple[str, ...]
    biases: tuple[str, ...]
    candidate_bias: str | None = None
    """the layer whose bias is our ``b_m``"""

    def leaf_names(self) -> set[str]:
        """The weights of a cell of this layout."""
        with_bias = [*self.biases, *([self.candidate_bias] if self.candidate_bias else [])]
        return {f"{name}.kernel" for name in (*self.inputs, *self.recurrent)} | {f"{name}.bias" for name in with_bias}


def _gates(letters: str, side: str) -> tuple[str, ...]:
    return tuple(side + letter for letter in letters)


_LSTM_NNX = ("ii", "if_", "ig", "io")
_LAYOUTS = {
    "lstm": (
        _Layout(_gates("ifgo", "i"), _gates("ifgo", "h"), _gates("ifgo", "h")),
        _Layout(_LSTM_NNX, _gates("ifgo", "h"), _gates("ifgo", "h")),
        _Layout(("dense_i",), ("dense_h",), ("dense_h",)),
    ),
    "gru": (
        _Layout(_gates("rzn", "i"), _gates("rzn", "h"), _gates("rzn", "i"), "hn"),
        _Layout(("dense_i",), ("dense_h",), ("dense_i",)),
    ),
    "vanilla": (
        _Layout(("i",), ("h",), ("i",)),
        _Layout(("dense_i",), ("dense_h",), ("dense_i",)),
    ),
}
_KINDS = {"LSTMCell": "lstm", "OptimizedLSTMCell": "lstm", "GRUCell": "gru", "SimpleCell": "vanilla"}
_ACTIVATIONS = ((jnp.tanh, "tanh"), (jax.nn.sigmoid, "sigmoid"), (jax.nn.relu, "relu"))


def our_cell(module: Any, weights: Weights, library: Any) -> Recurrent | None:
    """Returns a library cell as ours, or None if ours has not its options.

    Args:
      module: the cell.
      weights: its weights, a dict of Dense layers.
      library: ``flax.nnx`` or ``flax.linen``.
    """
    kind = next((kind for name, kind in _KINDS.items() if type(module) is getattr(library, name)), None)
    if kind is None:
        return None
    layout = next((layout for layout in _LAYOUTS[kind] if layout.leaf_names() == set(leaf_names(weights))), None)
    gate, activation = (_activation_name(module, option) for option in ("gate_fn", "activation_fn"))
    memory = jnp.dtype(module.param_dtype)
    compute = memory if module.dtype is None else jnp.dtype(module.dtype)
    # a plain cell keeps nothing from the old state but through its products: with another dtype its state changes
    keeps_dtype = compute == memory if kind == "vanilla" else np.can_cast(compute, memory)
    if layout is None or not keeps_dtype or not _promotes_by_default(module):
        return None

    input_size = weights[layout.inputs[0]]["kernel"].shape[0]
    hidden_size = weights[layout.recurrent[0]]["kernel"].shape[0]
    if kind == "lstm" and gate is not None and activation == "tanh":
        cell = cells.lstm(input_size, hidden_size, gate_activation=gate, dtype=memory)
    elif kind == "gru" and gate == "sigmoid" and activation == "tanh":
        cell = cells.gru(input_size, hidden_size, dtype=memory)
    elif kind == "vanilla" and activation is not None and not module.residual:
        cell = cells.vanilla(input_size, hidden_size, activation=activation, dtype=memory)
    else:
        return None

    def convert(weights):
        rows = lambda names: jnp.concatenate([weights[name]["kernel"].T for name in names])
        w_ih, w_hh = rows(layout.inputs), rows(layout.recurrent)
        b = jnp.concatenate([weights[name]["bias"] for name in layout.biases])
        if kind == "lstm":
            return cells.LSTMParams(w_ih, w_hh, b)
        if kind == "vanilla":
            return cells.VanillaParams(w_ih, w_hh, b)
        b_m = weights[layout.candidate_bias]["bias"] if layout.candidate_bias else jnp.zeros(hidden_size, b.dtype)
        return cells.GRUParams(w_ih, w_hh, b, b_m)

    return Recurrent(cell if compute == memory else _computing_in(cell, compute), True, convert)


def our_state(cell: Cell, carry: Any) -> State:
    """Returns a Flax carry as the state of our cell."""
    fields = jax.eval_shape(cell.init_state)
    if isinstance(fields, cells.LSTMState):
        if not isinstance(carry, tuple) or len(carry) != 2:
            raise ValueError(f"state: expected a pair (c, h) as Flax has it, found {type(carry).__name__}")
        return cells.LSTMState(h=carry[1], c=carry[0])
    return type(fields)(h=carry)


def _activation_name(module: Any, option: str) -> str | None:
    function = getattr(module, option, None)
    return next((name for known, name in _ACTIVATIONS if function is known), None)


def _promotes_by_default(module: Any) -> bool:
    """Whether dtypes are promoted as Flax does (an option of nnx alone)."""
    option = inspect.signature(type(module).__init__).parameters.get("promote_dtype")
    return option is None or module.promote_dtype is option.default


def _computing_in(cell: Cell, dtype: DTypeLike) -> Cell:
    """Returns the cell with products in ``dtype``."""

    def preactivate(params, state, x):
        narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
        z = cell.preactivate(narrow(params), narrow(state), narrow(x))
        return jax.tree.map(lambda leaf: leaf.astype(state.h.dtype), z)

    return cell._replace(name=f"{cell.name}_{jnp.dtype(dtype).name}", preactivate=preactivate)


# --- layers and directions -------------------------------------------------------------------------------------------

NameFn = Callable[[Any, str, int | None], tuple[str | int, ...]]
"""``(child, attribute, index) -> keys`` under which a child's weights lie."""


def sites_of(model: Any, library: Any, name_of: NameFn) -> list[tuple[Site, ...]]:
    """Returns the cells of a model, layer by layer.

    Args:
      model: an RNN, a Bidirectional, a cell, or a sequence of them.
      library: ``flax.nnx`` or ``flax.linen``.
      name_of: where the weights of a module's child lie.

    Raises:
      ValueError: a layer that is not recurrent, weights of their own for every step, or a ``merge_fn`` other than
        joining along the last axis.
    """
    layers: list[tuple[Site, ...]] = []
    short = library.__name__.rpartition(".")[2]

    def rnn(module: Any, path: tuple[str | int, ...], label: str) -> tuple[Any, tuple[str | int, ...]]:
        if not isinstance(module, library.RNN):
            raise ValueError(f"{label}: expected {short}.RNN, found {type(module).__name__}")
        axes = module.state_axes.values() if hasattr(module, "state_axes") else module.variable_axes.values()
        if any(isinstance(axis, int) for axis in axes):
            raise ValueError(f"{label}: expected the same weights at every step, found weights with a time axis")
        return module.cell, path + name_of(module.cell, "cell", None)

    def visit(module: Any, path: tuple[str | int, ...], label: str, is_flipped: bool) -> bool:
        """Appends a module's layers; returns whether its outputs run backward in time."""
        children: list[tuple[Any, tuple[str | int, ...]]] | None = None
        if isinstance(module, library.Sequential):
            children = [(child, name_of(child, "layers", index)) for index, child in enumerate(module.layers)]
        elif isinstance(module, list | tuple) or type(module).__name__ == "List":
            children = [(child, (index,)) for index, child in enumerate(module)]
        if children is not None:
            for index, (child, keys) in enumerate(children):
                is_flipped = visit(child, path + keys, f"layer {index} of {label}", is_flipped)
            return is_flipped
        if isinstance(module, library.RNN):
            layers.append((Site(*rnn(module, path, label), is_flipped != module.reverse),))
            return is_flipped != (module.reverse and not module.keep_order)
        if isinstance(module, library.Bidirectional):
            if module.merge_fn is not library.Bidirectional.merge_fn:
                raise ValueError(
                    f"{label}: expected Bidirectional with the default merge_fn (joining along the last axis), found "
                    f"{getattr(module.merge_fn, '__name__', module.merge_fn)!r}; adapt forward_rnn and backward_rnn by "
                    "themselves"
                )
            pair = []
            for attribute, backward in (("forward_rnn", False), ("backward_rnn", True)):
                child = getattr(module, attribute)
                keys = path + name_of(child, attribute, None)
                pair.append(Site(*rnn(child, keys, f"{attribute} of {label}"), is_flipped != backward))
            layers.append(tuple(pair))
            return is_flipped
        if isinstance(module, library.RNNCellBase):
            layers.append((Site(module, path, is_flipped),))
            return is_flipped
        recurrent = (library.RNN, library.Bidirectional, library.RNNCellBase)
        inside = [name for name, value in getattr(module, "__dict__", {}).items() if isinstance(value, recurrent)]
        hint = f"; it holds {', '.join(inside)}: adapt that, with its params" if inside else ""
        name = getattr(module, "__name__", type(module).__name__)
        raise ValueError(
            f"{label}: expected {short}.RNN, {short}.Bidirectional, a {short} cell, or a sequence of them, found "
            f"{name}, which keeps no state from step to step{hint}"
        )

    visit(model, (), "the model", False)
    return layers


def outline(model: Any, library: Any) -> str:
    """Returns what to call a model, e.g. ``"nnx.RNN(LSTMCell)"``."""

    def name(module: Any) -> str:
        inside: list[Any] = []
        if isinstance(module, library.RNN):
            inside = [module.cell]
        elif isinstance(module, library.Bidirectional):
            inside = [module.forward_rnn.cell, module.backward_rnn.cell]
        elif isinstance(module, library.Sequential):
            inside = list(module.layers)
        elif isinstance(module, list | tuple) or type(module).__name__ == "List":
            inside = list(module)
        kind = "" if isinstance(module, list | tuple) else type(module).__name__
        return f"{kind}({', '.join(map(name, inside))})" if inside else kind

    dot = "" if isinstance(model, list | tuple) else "."
    return f"{library.__name__.rpartition('.')[2]}{dot}{name(model)}"


def check_one_step(module: Any, x: Any) -> None:
    """Raises ValueError unless x has the axes of one step's input."""
    if len(jnp.shape(x)) != module.num_feature_axes:
        raise ValueError(
            f"example: expected a {module.num_feature_axes}-dimensional input of one step of {type(module).__name__} "
            f"(no batch, no time), found shape {jnp.shape(x)}"
        )


def start_of(cell: Cell, carry: Array | tuple[Array, ...], given: Any) -> State | None:
    """Returns where to start: what the user gave, or the library's own carry, or None if that is our cell's state."""
    if given is not None:
        return our_state(cell, given)
    state = our_state(cell, carry)
    is_zero = all(not isinstance(leaf, jax.core.Tracer) and not jnp.any(leaf) for leaf in jax.tree.leaves(state))
    return None if is_zero else state
