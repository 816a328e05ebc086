"""Flax nnx: cells, ``nnx.RNN``, ``nnx.Bidirectional`` and sequences of them.

Weights are the ``nnx.Param`` variables, as an ``nnx.State`` or the pure dict of one; a list of layers has a list of
these.  All other variables (random streams, statistics) stay as they were when the model was adapted.  A carry that is
drawn at random is drawn once.  How the cells map: :mod:`rnngrad.interop.flax_cells`.

Source: flax 0.12.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rnngrad.interop.adapted import Adapted
from rnngrad.interop.flax_cells import check_one_step, our_cell, outline, sites_of, start_of
from rnngrad.interop.layers import Recurrent, Site, Weights, adapt_layers, only_for_one_cell, with_shared_weights
from rnngrad.interop.step import GatesFn, cell_of_step, check_weights, starting_at


def adapt_nnx(model: Any, params: Weights, *, state: Any, example: Any, gates: GatesFn | None) -> Adapted:
    """Returns an nnx model as passes of our cells.

    Args:
      model: an ``nnx.RNN``, an ``nnx.Bidirectional``, a cell, or a list, ``nnx.List`` or ``nnx.Sequential`` of them.
      params: weights in the structure of ``nnx.state(model, nnx.Param)``; None for the model's own.
      state: the carry to start from, for a model of one cell; None for what ``initialize_carry`` gives.
      example: input of one step; needed by a first layer that does not tell its ``in_features``.
      gates: ``(cell, carry, x) -> z`` for a cell that ours has not; see :func:`rnngrad.interop.from_step`.

    Raises:
      ValueError: layers that are not recurrent, params of another model, a carry that changes.

    >>> import jax
    >>> from flax import nnx
    >>> import rnngrad as rg
    >>> from rnngrad.interop import adapt
    >>> model = adapt(nnx.RNN(nnx.GRUCell(3, 5, rngs=nnx.Rngs(0))))
    >>> model.source, model.cell.name, model.cell_params.w_hh.shape
    ('nnx.RNN(GRUCell)', 'gru_reset_after', (15, 5))
    """
    from flax import nnx

    own = _pure(model)
    source = outline(model, nnx)
    layers = with_shared_weights(sites_of(model, nnx, _name_of), own)
    only_for_one_cell(source, layers, state=state, gates=gates)

    def normalise(weights: Weights) -> Weights:
        nested = _pure(weights)
        check_weights(nested, own, source=source)
        return nested

    def adapt_one(site: Site, weights: Weights, x: Any) -> Recurrent:
        cell = site.module
        ours = None if gates is not None else our_cell(cell, weights, nnx)
        if x is None:
            x = _one_input(cell)
        check_one_step(cell, x)
        carry = cell.initialize_carry(jnp.shape(x), nnx.Rngs(0)) if ours or state is None else state
        if ours is not None:
            start = start_of(ours.cell, carry, state)
            return ours if start is None else ours._replace(cell=starting_at(ours.cell, start))
        graph, variables, *rest = nnx.split(cell, nnx.Param, ...)

        def module_of(weights):
            filled = jax.tree.map(lambda leaf: leaf, variables)
            nnx.replace_by_pure_dict(filled, weights)
            return nnx.merge(graph, filled, *rest, copy=True)

        found = cell_of_step(
            type(cell).__name__,
            lambda weights, carry, x: module_of(weights)(carry, x),
            weights,
            carry,
            x,
            gates=None if gates is None else lambda weights, carry, x: gates(module_of(weights), carry, x),
            returns="(state, y)",
        )
        return Recurrent(found, gates is not None, lambda weights: weights)

    return adapt_layers(source, layers, own if params is None else params, normalise, adapt_one, example=example)


def _name_of(child: Any, attribute: str, index: int | None) -> tuple[str | int, ...]:
    return (attribute,) if index is None else (attribute, index)


def _pure(weights: Weights) -> Weights:
    """Returns the parameters as nested dicts (a list of them for a list of layers)."""
    from flax import nnx

    if isinstance(weights, list | tuple):
        return [_pure(one) for one in weights]
    if isinstance(weights, nnx.Module):
        return nnx.to_pure_dict(nnx.state(weights, nnx.Param))
    if isinstance(weights, nnx.State):
        return nnx.to_pure_dict(nnx.filter_state(weights, nnx.Param))
    return weights


def _one_input(cell: Any) -> Array | jax.ShapeDtypeStruct:
    """Returns the shape of one step's input of a cell that says it."""
    size = getattr(cell, "in_features", None)
    if not isinstance(size, int) or cell.num_feature_axes != 1:
        raise ValueError(
            f"{type(cell).__name__} does not tell the size of its input: pass example=, the input of one step (without "
            "time axis)"
        )
    return jax.ShapeDtypeStruct((size,), getattr(cell, "param_dtype", jnp.float32))
