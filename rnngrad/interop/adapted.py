"""A model of another library, as cells of ours that run over time.

::

    layer l:   one pass (forward), or two (forward and backward), over the outputs of layer l − 1
    output:    y_l[t] = (read(s_t) of each pass, joined along the last axis)

A chain of Jacobians belongs to one pass.  Layers that run in one direction are joined by :func:`rnngrad.cells.stack`
into a single pass, so that paths from layer to layer stay in its chain; layers that run in both stay apart, since the
upper one hears the whole sequence at every step.

``convert`` maps the source library's weights to ours, by transposing, reordering and joining alone: it is linear and
differentiable, so gradients come back in the source's own structure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rnngrad.cells.stack import stack
from rnngrad.training.model import LayerTaps
from rnngrad.types import Cell, Params, State
from rnngrad.unroll import unroll


class Pass(NamedTuple):
    """One recurrent pass over the sequence; static and hashable, like the cell it runs."""

    name: str
    """``""`` for the only one, ``"forward"``, ``"backward"``, ``"layer_1.backward"``."""
    cell: Cell
    reverse: bool
    """Whether it runs from the last step to the first."""
    has_split: bool
    """Whether J = D + G is known; if not, all of a step stands in ``update`` and there are no gates to name."""
    parts: tuple[Pass, ...] = ()
    """The passes that were joined into this one, the one nearest to the input first; empty for one that was not."""


LayerParams = tuple[tuple[Params, ...], ...]
"""Our parameters, pass by pass within layer by layer."""


class Adapted(NamedTuple):
    """A model of another library as passes of our cells."""

    source: str
    """What it came from, e.g. ``"nnx.RNN(LSTMCell)"``."""
    layers: tuple[tuple[Pass, ...], ...]
    """The layer nearest to the input first; one pass each, or (forward, backward)."""
    params: LayerParams
    convert: Callable[[Any], LayerParams]
    """Maps weights of the source library, in the structure given to the adapter, to ``params``."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes, the layer nearest to the input first."""
        return tuple(itertools.chain.from_iterable(self.layers))

    @property
    def cell(self) -> Cell:
        """The cell of a model with one pass, for ``rg.retention`` and its like.

        Raises:
          ValueError: the model has several passes; names them.
        """
        return self._only().cell

    def _only(self) -> Pass:
        if len(self.passes) != 1:
            names = ", ".join(repr(one.name) for one in self.passes)
            raise ValueError(f"{self.source}: expected a model with one pass, found {names}; take one of `layers`")
        return self.passes[0]

    @property
    def cell_params(self) -> Params:
        """The parameters of that cell."""
        self._only()
        return self.params[0][0]


def join(source: str, layers: list[tuple[Pass, ...]], convert: Callable[[Any], LayerParams], weights: Any) -> Adapted:
    """Returns the adapted model, with layers that run in one direction joined into one pass.

    Args:
      source: what to call it.
      layers: one (forward or reversed) pass each, or (forward, backward); their names are set here.
      convert: maps the source's weights to our parameters, pass by pass within these layers.
      weights: the source's weights.

    Raises:
      ValueError: no layer, or sizes that do not fit.
    """
    if not layers:
        raise ValueError(f"{source}: expected at least one recurrent layer, found none")
    is_one_way = all(len(layer) == 1 for layer in layers) and len({layer[0].reverse for layer in layers}) == 1
    if is_one_way and len(layers) > 1:
        cell = stack(*(layer[0].cell for layer in layers))
        layers_type = type(jax.eval_shape(cell.init_state))

        def convert_joined(weights):
            return ((layers_type(*(params for (params,) in convert(weights))),),)

        # without its gates a layer's D would stand for its whole Jacobian
        has_split = all(layer[0].has_split for layer in layers)
        parts = tuple(one._replace(name=f"layer_{index}") for index, (one,) in enumerate(layers))
        only = Pass("", cell, layers[0][0].reverse, has_split, parts)
        return Adapted(source, ((only,),), convert_joined(weights), convert_joined)

    def named(index: int, layer: tuple[Pass, ...]) -> tuple[Pass, ...]:
        prefix = [f"layer_{index}"] if len(layers) > 1 else []
        ways = [["backward" if one.reverse else "forward"] if len(layer) > 1 else [] for one in layer]
        return tuple(one._replace(name=".".join(prefix + way)) for one, way in zip(layer, ways, strict=True))

    return Adapted(source, tuple(named(i, layer) for i, layer in enumerate(layers)), convert(weights), convert)


def apart(adapted: Adapted) -> Adapted:
    """Returns the same model with joined layers as passes of their own, as :func:`join` was given them.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.interop.adapted import Pass, apart, join
    >>> cells = rg.cells.lstm(3, 5), rg.cells.gru(5, 4)
    >>> layers = [(Pass("", cell, False, True),) for cell in cells]
    >>> drawn = tuple((cell.init(jax.random.key(0)),) for cell in cells)
    >>> joined = join("two layers", layers, lambda weights: weights, drawn)
    >>> [one.name for one in joined.passes], [one.name for one in apart(joined).passes]
    ([''], ['layer_0', 'layer_1'])
    """
    if not any(one.parts for one in adapted.passes):
        return adapted
    ((only,),) = adapted.layers

    def convert(weights: Any) -> LayerParams:
        ((params,),) = adapted.convert(weights)
        return tuple((part,) for part in params)

    ((params,),) = adapted.params
    return Adapted(adapted.source, tuple((part,) for part in only.parts), tuple((part,) for part in params), convert)


def run(
    adapted: Adapted, params: LayerParams, xs: Array, *, taps: tuple[tuple[LayerTaps, ...], ...] | None = None
) -> tuple[Array, tuple[tuple[Array, ...], ...]]:
    """Returns the outputs of the last layer, in the order of time, and what every pass heard, in its own order.

    Args:
      adapted: the model.
      params: its parameters, in our structure.
      xs: inputs of one sequence, (T, D); ``jax.vmap`` for a batch.
      taps: zeros to differentiate with respect to, pass by pass within layer by layer, in each one's own order.
    """
    heard = []
    for index, (layer, layer_params) in enumerate(zip(adapted.layers, params, strict=True)):
        outputs, inputs = [], []
        for way, (one, weights) in enumerate(zip(layer, layer_params, strict=True)):
            own = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), xs) if one.reverse else xs
            tap = None if taps is None else taps[index][way]
            states = unroll(one.cell, weights, start(one), own, taps=None if tap is None else tap.steps).states
            if tap is not None:
                states = jax.tree.map(jnp.add, states, tap.states)
            y = jax.vmap(lambda state, one=one, weights=weights: one.cell.read(weights, state))(states)
            outputs.append(jnp.flip(y, 0) if one.reverse else y)
            inputs.append(own)
        heard.append(tuple(inputs))
        xs = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
    return xs, tuple(heard)


def start(one: Pass) -> State:
    """Returns the state of one sequence before the first step of a pass."""
    return one.cell.init_state()


def time_major(xs: Any, time_axis: int) -> Array:
    """Returns inputs as (T, B, D).

    Args:
      xs: (T, D) for one sequence, (T, B, D), or (B, T, D) with ``time_axis`` 1.
      time_axis: 0 or 1.

    Raises:
      ValueError: another shape, nothing in it, or no array.

    >>> import jax.numpy as jnp
    >>> from rnngrad.interop.adapted import time_major
    >>> time_major(jnp.ones((4, 7, 3)), 1).shape
    (7, 4, 3)
    """
    if not hasattr(xs, "dtype"):
        raise ValueError(f"xs: expected an array, found {type(xs).__name__}")
    if time_axis not in (0, 1):
        raise ValueError(f"time_axis: expected 0 or 1, found {time_axis}")
    found = jnp.asarray(xs)
    if found.ndim == 2 and time_axis == 0:
        found = jnp.expand_dims(found, 1)
    if found.ndim != 3:
        axes = "(T, D) or (T, B, D)" if time_axis == 0 else "(B, T, D)"
        raise ValueError(
            f"xs: expected shape {axes}, a time axis at {time_axis} and features last, found {found.shape}"
        )
    found = jnp.moveaxis(found, time_axis, 0)
    if 0 in found.shape:
        raise ValueError(f"xs: expected at least one step, sequence and feature, found shape {found.shape}")
    return found
