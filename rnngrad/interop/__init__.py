"""Models of other libraries as cells of ours, with their weights.

==============================================  =========================  =======================================
given                                           split J = D + G            module
==============================================  =========================  =======================================
``rg.Cell``                                     yes                        here
Flax nnx cells, ``nnx.RNN``, …                  yes for LSTM, GRU, Simple  :mod:`rnngrad.interop.flax_nnx`
Flax linen cells, ``nn.RNN``, …                 yes for LSTM, GRU, Simple  :mod:`rnngrad.interop.flax_linen`
Equinox cells, lists of them                    yes for LSTM, GRU          :mod:`rnngrad.interop.equinox`
``step(params, state, x)``, Haiku transforms    with ``gates=``            :mod:`rnngrad.interop.step`
weights of Torch and Keras, files               yes                        ``from_torch``, ``from_keras``
==============================================  =========================  =======================================

No library is imported to find out what a model is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from rnngrad.interop.adapted import Adapted, Pass, join, run
from rnngrad.interop.equinox import adapt_equinox
from rnngrad.interop.files import read_weights
from rnngrad.interop.flax_linen import adapt_linen
from rnngrad.interop.flax_nnx import adapt_nnx
from rnngrad.interop.keras import from_keras
from rnngrad.interop.step import GatesFn, cell_of_step, check_weights, from_step, starting_at
from rnngrad.interop.torch import from_torch
from rnngrad.types import Cell, expected_of

__all__ = ["Adapted", "Pass", "adapt", "from_keras", "from_step", "from_torch", "read_weights", "run"]

_LIBRARIES = {"flax.nnx": adapt_nnx, "flax.linen": adapt_linen, "equinox": adapt_equinox}
_SUPPORTED = (
    "an rg.Cell, a Flax nnx or linen cell, RNN or Bidirectional, an Equinox cell, a sequence of those of one library, "
    "a Haiku transform of (x, state) -> (y, state), or a function step(params, state, x)"
)


def adapt(
    model: Any, params: Any = None, *, state: Any = None, example: Any = None, gates: GatesFn | None = None
) -> Adapted:
    """Returns a model of any supported library as passes of our cells.

    Args:
      model: a cell of ours; a Flax nnx or linen cell, RNN, Bidirectional or sequence of them; an Equinox cell or list
        of them; a Haiku transform of ``(x, state) -> (y, state)``; or a function ``step(params, state, x)`` that
        returns the new state, alone or in a pair with an output.
      params: its weights, in its own structure; None for models that hold them (nnx, Equinox).
      state: the state of one sequence before the first step, in its own structure; needed by functions, Haiku
        transforms and Equinox modules of your own.
      example: the input of one step, without time axis; needed as ``state`` is.
      gates: for a cell of your own, the function that computes its pre-activations; see :func:`from_step`.

    Raises:
      ValueError: an object that is not supported, weights of another model, a state that changes, something missing.

    >>> import jax, jax.numpy as jnp
    >>> from rnngrad.interop import adapt
    >>> step = lambda params, state, x: {"h": jnp.tanh(params * state["h"] + x)}
    >>> adapted = adapt(step, jnp.float32(0.5), state={"h": jnp.zeros(3)}, example=jnp.ones(3))
    >>> adapted.cell.input_size, adapted.passes[0].has_split
    (3, False)
    """
    if isinstance(model, Cell):
        return _adapt_own(model, params, state=state, gates=gates)
    home = _home(model)
    if home is None and isinstance(model, list | tuple):
        homes = {_home(layer) for layer in model} & set(_LIBRARIES)
        home = homes.pop() if len(homes) == 1 else None
        if any(isinstance(layer, Cell) for layer in model):
            raise ValueError("a sequence of cells of ours: expected one cell; join them by rg.cells.stack")
    if home in _LIBRARIES:
        return _LIBRARIES[home](model, params, state=state, example=example, gates=gates)
    if home in ("torch", "keras", "tensorflow"):
        how = "from_torch" if home == "torch" else "from_keras"
        raise ValueError(
            f"{type(model).__name__} is not a JAX model: its weights come in by rg.interop.{how}, or from a file by "
            "rg.interop.read_weights"
        )
    if isinstance(model, Mapping):
        raise ValueError(
            "expected a model, found a mapping of weights alone; rg.interop.from_torch and rg.interop.from_keras make "
            "a model of those of Torch and Keras, and the weights of other models are the second argument"
        )
    if isinstance(model, str | PurePath):
        raise ValueError(f"expected a model, found {model!r}; rg.interop.read_weights reads a file of weights")
    if home == "haiku" or (hasattr(model, "init") and callable(getattr(model, "apply", None))):
        return _adapt_transform(model, params, state=state, example=example, gates=gates)
    if not callable(model):
        raise ValueError(f"expected {_SUPPORTED}; found {type(model).__module__}.{type(model).__qualname__}")
    _check_signature(model)
    _check_given(model, state=state, example=example)
    return from_step(model, params, state, example, gates=gates)


def _home(model: Any) -> str | None:
    """Returns the library that a type of the model comes from."""
    for kind in type(model).__mro__:
        parts = kind.__module__.split(".")
        if parts[0] in ("equinox", "haiku", "torch", "keras", "tensorflow"):
            return parts[0]
        if parts[:2] in (["flax", "nnx"], ["flax", "linen"]):
            return ".".join(parts[:2])
    return None


def _adapt_own(cell: Cell, params: Any, *, state: Any, gates: GatesFn | None) -> Adapted:
    is_map = cell.input_size is None
    if gates is not None:
        raise ValueError(f"gates: cell {cell.name!r} has its own; give none")
    if is_map and state is None:
        raise ValueError(f"cell {cell.name!r} has no state of its own: pass state=")
    if params is None and not is_map:
        raise ValueError(f"cell {cell.name!r} holds no weights: pass params, e.g. cell.init(key)")
    if state is not None:
        cell = starting_at(cell, state)
    expected = params if is_map else expected_of(cell, ())[0]

    def convert(weights):
        check_weights(weights, expected, source=f"cell {cell.name!r}")
        return ((weights,),)

    return join(cell.name, [(Pass("", cell, reverse=False, has_split=not is_map),)], convert, params)


def _adapt_transform(model: Any, params: Any, *, state: Any, example: Any, gates: GatesFn | None) -> Adapted:
    name = type(model).__name__
    arguments = list(inspect.signature(model.apply).parameters)
    if arguments[1:2] == ["state"]:
        raise ValueError(
            f"{name}: expected hk.transform, without a state of the library's; carry it in the cell's state"
        )
    if params is None:
        raise ValueError(f"{name} holds no weights: pass params, e.g. model.init(key, x, state)")
    _check_given(model, state=state, example=example)
    # without a key the library itself refuses a step that draws
    key = (None,) if arguments[1:2] == ["rng"] else ()
    step = lambda params, state, x: model.apply(params, *key, x, state)
    cell = cell_of_step(name, step, params, state, example, gates=gates, returns="(y, state)")

    def convert(weights):
        check_weights(weights, params, source=name)
        return ((weights,),)

    return join(name, [(Pass("", cell, reverse=False, has_split=gates is not None),)], convert, params)


def _check_given(model: Any, **given: Any) -> None:
    missing = [f"{name}=" for name, value in given.items() if value is None]
    if missing:
        name = getattr(model, "__name__", type(model).__name__)
        raise ValueError(
            f"{name}: pass {' and '.join(missing)}; state is that of one sequence before the first step, example the "
            "input of one step (no batch, no time axis)"
        )


def _check_signature(step: Any) -> None:
    try:
        signature = inspect.signature(step)
    except ValueError:  # a builtin does not tell
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        name = getattr(step, "__name__", type(step).__name__)
        raise ValueError(
            f"{name}: expected a function step(params, state, x), found {name}{signature}; a model without a time axis "
            f"keeps no state from step to step. Supported: {_SUPPORTED}"
        ) from error
