"""Flax linen: cells, ``nn.RNN``, ``nn.Bidirectional`` and ``nn.Sequential`` of them.

Weights are the variables ``{"params": …}`` or the dict inside; sizes of inputs are read off them.  Other collections
are not used.  How the cells map: :mod:`rnngrad.interop.flax_cells`.

Source: flax 0.12.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rnngrad.interop.adapted import Adapted
from rnngrad.interop.flax_cells import check_one_step, our_cell, outline, sites_of, start_of
from rnngrad.interop.layers import (
    Recurrent,
    Site,
    Weights,
    adapt_layers,
    at_path,
    only_for_one_cell,
    with_shared_weights,
)
from rnngrad.interop.step import GatesFn, cell_of_step, check_weights, starting_at
from rnngrad.types import leaf_names

_INPUT_LAYER = {"LSTMCell": "ii", "OptimizedLSTMCell": "ii", "GRUCell": "ir", "SimpleCell": "i", "MGUCell": "in"}
"""A layer that hears the input, by cell."""


def adapt_linen(model: Any, params: Weights, *, state: Any, example: Any, gates: GatesFn | None) -> Adapted:
    """Returns a linen model as passes of our cells.

    Args:
      model: an ``nn.RNN``, an ``nn.Bidirectional``, a cell, or an ``nn.Sequential`` or list of them.
      params: its variables, or their collection ``"params"``; a list of these for a list of layers.
      state: the carry to start from, for a model of one cell; None for what ``initialize_carry`` gives.
      example: input of one step; needed by a first layer of a class that is not linen's own.
      gates: ``(params, carry, x) -> z`` for a cell that ours has not; see :func:`rnngrad.interop.from_step`.

    Raises:
      ValueError: no params, params of another model, layers that are not recurrent, a carry that changes.

    >>> import flax.linen as nn, jax
    >>> from rnngrad.interop import adapt
    >>> rnn = nn.RNN(nn.LSTMCell(4))
    >>> model = adapt(rnn, rnn.init(jax.random.key(0), jax.numpy.ones((7, 3))))
    >>> model.source, model.cell_params.w_ih.shape
    ('linen.RNN(LSTMCell)', (16, 3))
    """
    import flax.linen

    source = outline(model, flax.linen)
    layers = sites_of(model, flax.linen, _name_of)
    only_for_one_cell(source, layers, state=state, gates=gates)
    if params is None:
        raise ValueError(f"{source} holds no weights: pass params, the variables that its `init` returned")
    layers = with_shared_weights(layers, _plain(params))
    expected: dict[Any, Any] = {}

    def normalise(weights: Weights) -> Weights:
        nested = _plain(weights)
        if expected:
            check_weights(nested, _same_kind(expected, nested), source=source)
        return nested

    def adapt_one(site: Site, weights: Weights, x: Any) -> Recurrent:
        cell = site.module
        if x is None:
            x = _one_input(site, _plain(params))
        check_one_step(cell, x)
        carry = cell.initialize_carry(jax.random.key(0), jnp.shape(x)) if state is None else state
        shapes = jax.eval_shape(cell.init, jax.random.key(0), carry, x)
        _put(expected, site.path, _plain(shapes))
        check_weights(weights, _plain(shapes), source=source)
        ours = None if gates is not None else our_cell(cell, weights, flax.linen)
        if ours is not None:
            start = start_of(ours.cell, carry, state)
            return ours if start is None else ours._replace(cell=starting_at(ours.cell, start))
        step = lambda weights, carry, x: cell.apply({"params": weights}, carry, x)
        name = type(cell).__name__
        found = cell_of_step(name, step, weights, carry, x, gates=gates, returns="(state, y)")
        return Recurrent(found, gates is not None, lambda weights: weights)

    return adapt_layers(source, layers, params, normalise, adapt_one, example=example)


def _name_of(child: Any, attribute: str, index: int | None) -> tuple[str | int, ...]:
    return (getattr(child, "name", None) or (attribute if index is None else f"{attribute}_{index}"),)


def _plain(variables: Weights) -> Weights:
    """Returns the parameters as nested dicts, without boxes of metadata."""
    import flax.core

    if isinstance(variables, list | tuple):
        return [_plain(one) for one in variables]
    if not isinstance(variables, Mapping):
        raise ValueError(f"params: expected the variables that `init` returned, found {type(variables).__name__}")
    inner: Any = variables["params"] if "params" in variables else variables
    return flax.core.meta.unbox(flax.core.unfreeze(inner))


def _put(tree: dict[Any, Any], path: tuple[str | int, ...], part: Any) -> None:
    if not path:
        tree.update(part)
        return
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = part


def _same_kind(expected: dict[Any, Any], found: Any) -> Any:
    """Returns ``expected`` as a list if ``found`` is one: a list of layers has a list of weights."""
    return [expected[index] for index in range(len(expected))] if isinstance(found, list) else expected


def _one_input(site: Site, params: Weights) -> jax.ShapeDtypeStruct:
    weights = at_path(params, site.path)
    kind = type(site.module).__name__
    if kind not in _INPUT_LAYER:
        raise ValueError(
            f"the size of the input of {kind} cannot be read off its params: pass example=, the input of one step "
            "(without time axis)"
        )
    kernel = weights.get(_INPUT_LAYER[kind], {}).get("kernel")
    if kernel is None:
        wanted = ".".join(map(str, (*site.path, _INPUT_LAYER[kind], "kernel")))
        raise ValueError(f"params are those of another model: {kind} expects {wanted!r}, found {leaf_names(params)}")
    return jax.ShapeDtypeStruct(kernel.shape[:1], kernel.dtype)
