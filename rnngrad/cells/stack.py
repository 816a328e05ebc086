"""Layers: each cell's input is what the layer below reads out at the same step.

::

    x_0 = x,   z_l = preactivate_l(s_l, x_l),   s_l' = update_l(z_l, s_l),   x_{l+1} = read_l(s_l')

States and pre-activations are NamedTuples with the fields ``layer_0``, ``layer_1``, …, so blocks and gates are
addressed as ``"layer_1.c"`` and ``"only:layer_0.f"``.  z of an upper layer contains the lower layer's new state and
with it a non-linearity; the split J = D + G stays exact, with D the layers' direct paths side by side and everything
that crosses from layer to layer in G.
"""

from __future__ import annotations

import collections
import functools
import itertools

import jax

from rnngrad.types import Cell, remembered


@functools.cache
def _layers_type(num_layers: int) -> type:
    """One NamedTuple type per depth, so that two stacks of equal depth have states of the same structure."""
    return collections.namedtuple("Layers", [f"layer_{index}" for index in range(num_layers)])


@remembered
def stack(*cells: Cell) -> Cell:
    """Returns one cell made of layers, the first one nearest to the input.

    Args:
      cells: at least one cell; the input size of each must be what the one below reads out.

    Raises:
      ValueError: no cell, or sizes that do not fit.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.stack(rg.cells.gru(3, 5), rg.cells.lstm(5, 4))
    >>> state, _ = cell.step(cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones(3))
    >>> state.layer_1.c.shape
    (4,)
    """
    if not cells:
        raise ValueError("stack: expected at least one cell, found none")
    for index, (below, above) in enumerate(itertools.pairwise(cells)):
        params, state = jax.eval_shape(below.init, jax.random.key(0)), jax.eval_shape(below.init_state)
        (width,) = jax.eval_shape(below.read, params, state).shape
        if above.input_size != width:
            raise ValueError(
                f"stack: layer {index} ({below.name!r}) reads out {width} values, but layer {index + 1} "
                f"({above.name!r}) expects input_size {above.input_size}"
            )
    layers = _layers_type(len(cells))

    def init_params(key):
        return layers(
            *(cell.init(key_layer) for cell, key_layer in zip(cells, jax.random.split(key, len(cells)), strict=True))
        )

    def init_state(batch_shape=()):
        return layers(*(cell.init_state(batch_shape) for cell in cells))

    def preactivate(params, state, x):
        z = []
        for cell, params_layer, state_layer in zip(cells, params, state, strict=True):
            z.append(cell.preactivate(params_layer, state_layer, x))
            new_state, _ = cell.update(params_layer, z[-1], state_layer)
            x = cell.read(params_layer, new_state)
        return layers(*z)

    def update(params, z, state):
        moved = [cell.update(p, z_layer, s) for cell, p, z_layer, s in zip(cells, params, z, state, strict=True)]
        return layers(*(s for s, _ in moved)), layers(*(gates for _, gates in moved))

    def read(params, state):
        return cells[-1].read(params[-1], state[-1])

    name = "stack(" + ", ".join(cell.name for cell in cells) + ")"
    return Cell(name, cells[0].input_size, init_params, init_state, preactivate, update, read)
