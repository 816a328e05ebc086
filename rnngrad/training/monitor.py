r"""The gradient-flow monitor: how far back the gradient of the last step reaches, while a network trains.

Let L be the loss of the last step that counts, of each sequence: step t = e of a sequence, whose state is s_{e+1}.
For each layer and lag, with s_k the layer's states and k = e + 1 − lag,

::

    log_retention(lag) = mean over sequences of  ln ‖∂L/∂s_k‖ − ln ‖∂L/∂s_{e+1}‖           nats, 0 at lag 0
    decay_rate         = least-squares slope of it over all lags ≥ 1 where it is finite    nats per step
    direct_share       = mean over k and sequences of ‖direct_k‖ / (‖direct_k‖ + ‖gated_k‖)
    gate_share(j)      = ‖∂L/∂z_j‖² / Σ_j ‖∂L/∂z_j‖²                                       over all steps, adds up to 1

where ∂L/∂s_k is total: through the layer's direct path, through its gates, and through the layers above.  Everything
comes from one backward pass with taps.  The norms are those of the whole state, h and c together.

Unlike ``rg.retention`` this follows one cotangent per sequence, that of the loss, and in the precision of training: in
float32 a gradient that has faded by some 90 nats is 0, and the curve −inf.  ``rg.bptt`` has no such floor.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rnngrad.retention import half_life
from rnngrad.training.model import LayerTaps, Model, ModelParams, zero_taps
from rnngrad.types import State, leaf_names


class LayerFlow(NamedTuple):
    """Gradient flow in one layer."""

    log_retention: Float[Array, " L"]
    """Lag 0 … T, nats; −inf where the gradient is 0, NaN at lags that no sequence has."""
    decay_rate: Float[Array, ""]
    """Nats per step, negative for decay; NaN when fewer than two lags are finite."""
    half_life: Float[Array, ""]
    """Steps; inf when the gradient does not decay."""
    direct_share: Float[Array, ""]
    """In [0, 1]; NaN when no gradient goes back at all."""
    gate_share: dict[str, Float[Array, ""]]
    """By pre-activation, in [0, 1]; NaN when no gradient reaches any; empty for a layer without pre-activations."""


class Flow(NamedTuple):
    """Gradient flow in every layer, the one nearest to the input first."""

    layers: tuple[LayerFlow, ...]


class Monitor(NamedTuple):
    """When the monitor runs, and on how much."""

    every: int = 100
    """Steps from one measurement to the next; the first is at step 1."""
    max_sequences: int = 8
    """Sequences of the batch that are measured."""


def log_norms(tree: Any) -> Float[Array, "..."]:
    """Returns the logarithm of the norm over the last axis, over all leaves together; −inf for zero.

    Divided by the largest entry first, since squares die at half the range.

    >>> import jax.numpy as jnp
    >>> from rnngrad.training.monitor import log_norms
    >>> print(round(float(log_norms((jnp.array([3e-30]), jnp.array([4e-30])))), 4))
    -67.4681
    """
    sizes = [jnp.abs(leaf) for leaf in jax.tree.leaves(tree)]
    largest = functools.reduce(jnp.maximum, [jnp.max(size, axis=-1) for size in sizes])
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    squares = functools.reduce(
        operator.add, [jnp.sum(jnp.square(size / jnp.expand_dims(scale, -1)), axis=-1) for size in sizes]
    )
    return jnp.log(scale) + 0.5 * jnp.log(squares)


def total_cotangents(cotangents: LayerTaps) -> State:
    """Returns ∂L/∂s_k of one layer for k = 0 … T, put together from what passed its taps.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.training.monitor import total_cotangents
    >>> total_cotangents(rg.training.zero_taps(rg.training.model([rg.cells.gru(3, 5)], 2), 7)[0]).h.shape
    (8, 5)
    """

    def put_together(states, direct, gated):
        nothing = jnp.zeros_like(states[:1])
        return jnp.concatenate([nothing, states]) + jnp.concatenate([direct + gated, nothing])

    return jax.tree.map(put_together, cotangents.states, cotangents.steps.direct, cotangents.steps.gated)


def tap_cotangents(
    model: Model, params: ModelParams, state: Any, batch: Any, loss: Any, key: Any = None
) -> tuple[tuple[LayerTaps, ...], Any]:
    """Returns the gradient of ``loss(output, batch)`` with respect to the taps of every layer, and the output."""
    num_steps, *batch_shape = batch.mask.shape

    def of_taps(taps):
        output = model.apply(params, state, batch.inputs, key=key, taps=taps)
        return loss(output, batch), output

    return jax.grad(of_taps, has_aux=True)(zero_taps(model, num_steps, tuple(batch_shape)))


def _slope(lags: Array, values: Array) -> Array:
    """Least squares over the finite values at lag ≥ 1; NaN when there are fewer than two."""
    is_in = jnp.isfinite(values) & (lags >= 1)
    number = jnp.sum(is_in)
    weight = is_in.astype(values.dtype)
    x, y = lags.astype(values.dtype), jnp.where(is_in, values, jnp.zeros_like(values))
    count = jnp.maximum(number, 1).astype(values.dtype)
    x = (x - jnp.sum(weight * x) / count) * weight
    spread = jnp.sum(x * x)
    return jnp.where(number >= 2, jnp.sum(x * y) / jnp.where(number >= 2, spread, jnp.ones_like(spread)), jnp.nan)


def _mean(values: Array, is_in: Array) -> Array:
    """Mean over all entries that are in; NaN for none."""
    total = jnp.sum(jnp.where(is_in, values, jnp.zeros_like(values)))
    return total / jnp.sum(is_in).astype(values.dtype)


def layer_flow(cotangents: LayerTaps, ends: Int[Array, " B"]) -> LayerFlow:
    """Returns the gradient flow of one layer from what passed its taps.

    Args:
      cotangents: ∂L/∂taps of the layer, with a batch axis.
      ends: index k of the last state that the loss reads, of every sequence; 0 where there is none.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.training.monitor import layer_flow
    >>> taps = jax.tree.map(
    ...     jax.numpy.ones_like, rg.training.zero_taps(rg.training.model([rg.cells.gru(3, 5)], 2), 7, (4,))
    ... )
    >>> layer_flow(taps[0], jax.numpy.full(4, 7)).log_retention.shape
    (8,)
    """
    logs = log_norms(total_cotangents(cotangents))  # (T + 1, B)
    num_states, _ = logs.shape
    lags = jnp.arange(num_states)
    at = jnp.expand_dims(ends, 0) - jnp.expand_dims(lags, 1)
    by_lag = jnp.take_along_axis(logs, jnp.maximum(at, 0), axis=0)
    start = by_lag[:1]
    # a sequence without any gradient at its end has no curve
    is_in = (at >= 0) & (jnp.expand_dims(ends, 0) > 0) & jnp.isfinite(start)
    relative = jnp.where(is_in, by_lag - jnp.where(jnp.isfinite(start), start, jnp.zeros_like(start)), 0)
    log_retention = jnp.sum(relative, axis=1) / jnp.sum(is_in, axis=1).astype(logs.dtype)
    rate = _slope(lags, log_retention)

    direct, gated = log_norms(cotangents.steps.direct), log_norms(cotangents.steps.gated)
    some = jnp.isfinite(direct) | jnp.isfinite(gated)
    # ‖direct‖ / (‖direct‖ + ‖gated‖); −inf − −inf is left out by `some`
    share = jax.nn.sigmoid(jnp.where(some, direct, 0) - jnp.where(some, gated, 0))

    names = leaf_names(cotangents.steps.z)
    squares = [2 * log_norms(leaf.reshape(-1)) for leaf in jax.tree.leaves(cotangents.steps.z)]
    whole = jax.nn.logsumexp(jnp.stack(squares)) if squares else jnp.array(jnp.nan)
    return LayerFlow(
        log_retention=log_retention,
        decay_rate=rate,
        half_life=half_life(rate),
        direct_share=_mean(share, some),
        gate_share={name: jnp.exp(square - whole) for name, square in zip(names, squares, strict=True)},
    )


@functools.partial(jax.jit, static_argnames=("model", "loss", "max_sequences"))
def _gradient_flow(model, params, state, batch, loss, max_sequences):
    batch = jax.tree.map(lambda leaf: leaf[:, :max_sequences], batch)
    state = jax.tree.map(lambda leaf: leaf[:max_sequences], state)
    counts = batch.mask > 0
    num_steps = counts.shape[0]
    last = num_steps - 1 - jnp.argmax(jnp.flip(counts, 0), axis=0)
    ends = jnp.where(jnp.any(counts, axis=0), last + 1, jnp.zeros_like(last))
    is_end = jnp.expand_dims(jnp.arange(1, num_steps + 1), 1) == jnp.expand_dims(ends, 0)
    batch = batch._replace(mask=is_end.astype(batch.mask.dtype))
    cotangents, _ = tap_cotangents(model, params, state, batch, loss)
    return Flow(tuple(layer_flow(layer, ends) for layer in cotangents))


def gradient_flow(
    model: Model, params: ModelParams, state: Any, batch: Any, loss: Any, *, max_sequences: int | None = None
) -> Flow:
    """Returns how the gradient of the last step's loss fades on its way back, layer by layer.

    Args:
      model: the model; dropout is off.
      params: its parameters.
      state: the states before the first step, layer by layer, with batch axis.
      batch: inputs, targets and mask, time-major with a batch axis.  Of the steps that the mask counts, the last one of
        every sequence enters.
      loss: maps (output, batch) to a scalar, and heeds ``batch.mask``.
      max_sequences: measure the first ones of the batch only; None for all.

    Raises:
      ValueError: a mask that is not (T, B).

    >>> import jax
    >>> import rnngrad as rg
    >>> net, task = rg.training.model([rg.cells.lstm(2, 5)], 1), rg.tasks.adding(20)
    >>> def loss(output, batch):
    ...     return rg.losses.mse(output.outputs, batch.targets, batch.mask)
    >>> batch = task.batch(jax.random.key(1), 4)
    >>> flow = rg.training.gradient_flow(net, net.init(jax.random.key(0)), net.init_state((4,)), batch, loss)
    >>> flow.layers[0].log_retention.shape, round(float(sum(flow.layers[0].gate_share.values())), 5)
    ((21,), 1.0)
    """
    if jnp.ndim(batch.mask) != 2:
        raise ValueError(f"mask: expected shape (T, B), found {jnp.shape(batch.mask)}")
    return _gradient_flow(model, params, state, batch, loss, max_sequences)


def flow_record(step: int, flow: Flow, *, clip_fraction: float) -> dict[str, Any]:
    """Returns the record of a measurement, plain Python values, as logs take it.

    Args:
      step: updates done.
      flow: the measurement.
      clip_fraction: share of all updates so far that the optimizer clipped; NaN where nobody counts.

    >>> import jax.numpy as jnp
    >>> from rnngrad.training.monitor import Flow, LayerFlow, flow_record
    >>> layer = LayerFlow(jnp.zeros(3), jnp.zeros(()), jnp.ones(()), jnp.ones(()), {"f": jnp.ones(())})
    >>> record = flow_record(100, Flow((layer,)), clip_fraction=0.0)
    >>> list(record), record["layers"][0]["gate_share"]
    (['kind', 'step', 'layers', 'clip_fraction'], {'f': 1.0})
    """
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).tolist(), flow.layers)
    return {
        "kind": "flow",
        "step": step,
        "layers": [layer._asdict() for layer in layers],
        "clip_fraction": clip_fraction,
    }
