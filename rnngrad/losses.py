"""Read-outs and losses, with the unit of the loss made explicit.

::

    y_t = V h_t + c                                              read-out
    ℓ_t = log Σ_v exp(y_tv) − y_t,target                         nats;  ∂ℓ_t/∂y_t = softmax(y_t) − onehot(target)

    mean_per_token   Σ_{t,b} m_tb ℓ_tb / Σ_{t,b} m_tb            what a perplexity is computed from
    sum_over_steps   (1/B) Σ_b Σ_t m_tb ℓ_tb                     sum over time, mean over the batch

V is ``w``, c is ``b``, m the mask.  With a full mask the second is T times the first, and so is its gradient.  That is
the unit in which a clipping threshold is stated: 5 on the sum over 20 steps (Zaremba et al. 2014) is 0.25 on the mean.

Masks hold finite weights of at least 0, shape (T,) or (T, B); what stands at steps of weight 0, NaN included, acts on
neither value nor gradient.  ``steps="last"`` keeps of each sequence the last step whose weight is not 0.  Sequences
without any such step do not count in the mean over the batch.  A mask of zeros alone leaves nothing to average: a
ValueError where its values are known, a loss of 0 with gradient 0 under ``jit``.

Losses are computed in float32 at least, whatever the dtype of the logits.

Source: Zaremba, Sutskever & Vinyals 2014, arXiv 1409.2329, section 4.1 (sum over the unrolled steps, mean over the
minibatch).  We name the unit, where elsewhere one of the two is built in.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Key, Shaped

from rnngrad.cells.linear import matvec, per_unit
from rnngrad.logscaled import at_least_float32
from rnngrad.types import DTypeLike, Real, describe

STEPS = ("all", "last")
REDUCTIONS = ("mean_per_token", "sum_over_steps")

_Numbers = Shaped[Array | np.ndarray, "..."]
"""Shapes and dtypes are checked by hand, so that a message names both."""


# --- read-out --------------------------------------------------------------------------------------------------------


class ReadoutParams(NamedTuple):
    """Weights of a read-out."""

    w: Float[Array, "K N"]
    b: Float[Array, " K"]


@runtime_checkable
class ReadoutInit(Protocol):
    """Draws the parameters of a read-out from a key."""

    def __call__(self, key: Key[Array, ""]) -> ReadoutParams: ...


@runtime_checkable
class ReadoutApply(Protocol):
    """Maps (params, h) to V h + c on the last axis."""

    def __call__(self, params: ReadoutParams, h: Inexact[Array, "*batch N"]) -> Inexact[Array, "*batch K"]: ...


class Readout(NamedTuple):
    """A linear read-out: pure functions, static and hashable like a cell."""

    hidden_size: int
    output_size: int
    init: ReadoutInit
    apply: ReadoutApply


def _uniform(key, shape, dtype, hidden_size):
    limit = hidden_size**-0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _zeros(key, shape, dtype, hidden_size):
    return jnp.zeros(shape, dtype)


def _ignoring_size(draw):
    return lambda key, shape, dtype, hidden_size: draw(key, shape, dtype)


# name -> how w and b are drawn; w is (K, N), so that the fan-in is its last axis
_SCHEMES = {
    "torch": (_uniform, _uniform),
    "keras": (_ignoring_size(jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=0)), _zeros),
    "flax": (_ignoring_size(jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)), _zeros),
    "zeros": (_zeros, _zeros),
}


def readout(hidden_size: int, output_size: int, *, init: str = "torch", dtype: DTypeLike = jnp.float32) -> Readout:
    """Returns the read-out y = V h + c.

    Args:
      hidden_size: N, what the cell reads out.
      output_size: K, classes or predicted numbers.
      init: ``"torch"`` (V and c from U(±1/√N)), ``"keras"`` (V Glorot uniform, c = 0), ``"flax"`` (V truncated normal
        of variance 1/N, c = 0) or ``"zeros"``.
      dtype: floating dtype of the weights.

    Raises:
      ValueError: a size below 1, unknown scheme, or a dtype that is not floating.

    >>> import jax
    >>> import rnngrad as rg
    >>> out = rg.losses.readout(5, 3)
    >>> out.apply(out.init(jax.random.key(0)), jax.numpy.ones((7, 2, 5))).shape
    (7, 2, 3)
    """
    for name, size in (("hidden_size", hidden_size), ("output_size", output_size)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, found {size}")
    if init not in _SCHEMES:
        raise ValueError(f"unknown initialisation {init!r}; expected one of: {', '.join(_SCHEMES)}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: expected a floating dtype, found {jnp.dtype(dtype).name}")
    draw_w, draw_b = _SCHEMES[init]

    def init_params(key):
        key_w, key_b = jax.random.split(key)
        return ReadoutParams(
            draw_w(key_w, (output_size, hidden_size), dtype, hidden_size),
            draw_b(key_b, (output_size,), dtype, hidden_size),
        )

    def apply(params, h):
        y = matvec(params.w, h)
        return y + per_unit(params.b, y)

    return Readout(hidden_size, output_size, init_params, apply)


# --- weights of steps ------------------------------------------------------------------------------------------------


def _is_known(array: _Numbers) -> bool:
    return not isinstance(array, jax.core.Tracer)


def _check_mask(mask: np.ndarray, dtype: DTypeLike) -> None:
    name = jnp.dtype(dtype).name
    with np.errstate(over="ignore"):  # what overflows becomes inf and is named below
        values = mask.astype(dtype)
    is_bad = ~(np.isfinite(values) & (values >= 0))
    if is_bad.any():
        raise ValueError(f"mask: expected weights of at least 0, finite in {name}, found {mask[is_bad][0]}")
    # compiled code takes numbers below the normal range for 0
    if not (values >= jnp.finfo(dtype).tiny).any():
        raise ValueError(f"mask: expected a step that counts, found zeros alone (in {name})")


def _step_weights(mask: _Numbers | None, shape: tuple[int, ...], steps: str, dtype: DTypeLike) -> Float[Array, "..."]:
    """Returns the weight of every step; ``shape`` is that of the targets' time and batch axes."""
    if steps not in STEPS:
        raise ValueError(f"unknown steps {steps!r}; expected one of: {', '.join(STEPS)}")
    if 0 in shape or not shape:
        raise ValueError(f"expected targets of shape (T,) or (T, B) with at least one step, found {shape}")
    if mask is None:
        weights = jnp.ones(shape, dtype)
    else:
        if mask.shape != shape:
            raise ValueError(f"mask: expected shape {shape}, found {mask.shape}")
        if _is_known(mask):
            _check_mask(np.asarray(mask), dtype)
        weights = jnp.asarray(mask).astype(dtype)
    if steps == "last":
        # steps that count, from this one on: 1 at the last of them alone
        from_here = jnp.cumsum((weights > 0)[::-1].astype(jnp.int32), axis=0)[::-1]
        weights = jnp.where((weights > 0) & (from_here == 1), weights, 0)
    return weights


def _reduced(by_step: Float[Array, "..."], weights: Float[Array, "..."], reduction: str) -> Float[Array, ""]:
    total = jnp.sum(weights * jnp.where(weights > 0, by_step, 0))
    if reduction == "mean_per_token":
        counted = jnp.sum(weights)
    else:
        counted = jnp.sum(jnp.any(weights > 0, axis=0).astype(weights.dtype))
    return total / jnp.where(counted > 0, counted, 1)


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of: {', '.join(REDUCTIONS)}")


def _only_counted(values: Float[Array, "..."], counts: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Returns the outputs with 0 at steps that do not count: a NaN there would reach the gradient as 0 · NaN."""
    return jnp.where(jnp.broadcast_to(counts[..., None], values.shape), values, 0)


# --- losses ----------------------------------------------------------------------------------------------------------


def _check_logits(logits: _Numbers, targets: _Numbers) -> None:
    if not jnp.issubdtype(logits.dtype, jnp.floating) or not logits.ndim:
        raise ValueError(f"logits: expected floating (T, V) or (T, B, V), found {describe(logits)}")
    if targets.shape != logits.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets: expected integers of shape {logits.shape[:-1]}, found {describe(targets)}")


def _check_classes(targets: _Numbers, weights: Float[Array, "..."], num_classes: int) -> None:
    if not (_is_known(targets) and _is_known(weights)):
        return
    counted = np.asarray(targets)[np.asarray(weights) > 0]
    bad = counted[(counted < 0) | (counted >= num_classes)]
    if bad.size:
        raise ValueError(f"targets: expected classes 0 to {num_classes - 1}, found {bad[0]}")


def cross_entropy(
    logits: _Numbers,
    targets: _Numbers,
    mask: _Numbers | None = None,
    *,
    steps: str = "all",
    reduction: str = "mean_per_token",
) -> Float[Array, ""]:
    """Returns the softmax cross-entropy in nats.

    Args:
      logits: y, shape (T, V) or (T, B, V), floating; any size of number, −inf for a class that is ruled out.
      targets: classes, shape (T,) or (T, B), integers.
      mask: weights of the steps, shape of ``targets``; None counts every step once.
      steps: ``"all"``, or ``"last"`` for the last step of each sequence that the mask counts.
      reduction: ``"mean_per_token"`` or ``"sum_over_steps"``; see the module docstring.

    Raises:
      ValueError: shapes, dtypes or options that do not fit; where the values are known, a target that is no class, a
        weight that is negative or not finite, or a mask of zeros alone.  Under ``jit`` a target that is no class makes
        the loss NaN.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> logits, targets = jnp.zeros((20, 2, 8)), jnp.ones((20, 2), int)
    >>> [round(float(rg.losses.cross_entropy(logits, targets, reduction=r)), 4) for r in rg.losses.REDUCTIONS]
    [2.0794, 41.5888]
    """
    _check_reduction(reduction)
    _check_logits(logits, targets)
    dtype = at_least_float32(logits.dtype)
    weights = _step_weights(mask, targets.shape, steps, dtype)
    num_classes = logits.shape[-1]
    _check_classes(targets, weights, num_classes)
    y = _only_counted(jnp.asarray(logits).astype(dtype), weights > 0)
    is_class = (jnp.asarray(targets) >= 0) & (jnp.asarray(targets) < num_classes)
    index = jnp.where(is_class, jnp.asarray(targets), 0)
    of_target = jnp.take_along_axis(y, index[..., None], axis=-1)[..., 0]
    by_step = jnp.where(is_class, jax.nn.logsumexp(y, axis=-1) - of_target, jnp.nan)
    return _reduced(by_step, weights, reduction)


def mse(
    predictions: _Numbers,
    targets: _Numbers,
    mask: _Numbers | None = None,
    *,
    steps: str = "all",
    reduction: str = "mean_per_token",
) -> Float[Array, ""]:
    """Returns the squared error, mean over the K outputs of a step.

    Args:
      predictions: shape (T, K) or (T, B, K), floating.
      targets: of the same shape and dtype.
      mask: weights of the steps, shape (T,) or (T, B); None counts every step once.
      steps: ``"all"``, or ``"last"`` for the last step of each sequence that the mask counts.
      reduction: ``"mean_per_token"`` or ``"sum_over_steps"``; see the module docstring.

    Raises:
      ValueError: shapes, dtypes or options that do not fit; where its values are known, a mask with a weight that
        is negative or not finite, or of zeros alone.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> round(float(rg.losses.mse(jnp.full((7, 2, 1), 3.0), jnp.ones((7, 2, 1)), steps="last")), 4)
    4.0
    """
    _check_reduction(reduction)
    if not jnp.issubdtype(predictions.dtype, jnp.floating) or not predictions.ndim:
        raise ValueError(f"predictions: expected floating (T, K) or (T, B, K), found {describe(predictions)}")
    if targets.shape != predictions.shape or targets.dtype != predictions.dtype:
        raise ValueError(f"targets: expected {describe(predictions)}, found {describe(targets)}")
    dtype = at_least_float32(predictions.dtype)
    weights = _step_weights(mask, predictions.shape[:-1], steps, dtype)
    apart = jnp.asarray(predictions).astype(dtype) - jnp.asarray(targets).astype(dtype)
    by_step = jnp.mean(jnp.square(_only_counted(apart, weights > 0)), axis=-1)
    return _reduced(by_step, weights, reduction)


def accuracy(
    logits: _Numbers, targets: _Numbers, mask: _Numbers | None = None, *, steps: str = "all"
) -> Float[Array, ""]:
    """Returns the share of counted steps at which the largest logit is that of the target; NaN if one holds a NaN.

    Args:
      logits: shape (T, V) or (T, B, V), floating; of equal logits the first counts as the largest.
      targets: classes, shape (T,) or (T, B), integers; one that is no class is simply missed.
      mask: weights of the steps, shape of ``targets``; None counts every step once.
      steps: ``"all"``, or ``"last"`` for the last step of each sequence that the mask counts.

    Raises:
      ValueError: shapes, dtypes or options that do not fit; where its values are known, a mask with a weight that
        is negative or not finite, or of zeros alone.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> float(rg.losses.accuracy(jnp.eye(4), jnp.array([0, 1, 2, 0])))
    0.75
    """
    _check_logits(logits, targets)
    dtype = at_least_float32(logits.dtype)
    weights = _step_weights(mask, targets.shape, steps, dtype)
    y = jnp.asarray(logits)
    is_right = jnp.argmax(y, axis=-1) == jnp.asarray(targets)
    # among NaN none is the largest, although argmax names one
    by_step = jnp.where(jnp.isnan(y).any(axis=-1), jnp.nan, is_right.astype(dtype))
    return _reduced(by_step, weights, "mean_per_token")


# --- units of a mean per token ---------------------------------------------------------------------------------------


def perplexity(nats: Real | _Numbers) -> Float[Array, "..."]:
    """Returns exp(nats): the number of equally likely tokens with this mean cross-entropy.

    Args:
      nats: cross-entropy per token (``mean_per_token``).  The mean comes first: a mean of perplexities is larger.

    >>> import rnngrad as rg
    >>> round(float(rg.losses.perplexity(4.4067)), 1)
    82.0
    """
    return jnp.exp(nats)


def bits_per_character(nats: Real | _Numbers) -> Float[Array, "..."]:
    """Returns nats / ln 2.

    Args:
      nats: cross-entropy per character (``mean_per_token``).

    >>> import rnngrad as rg
    >>> round(float(rg.losses.bits_per_character(1.6)), 4)
    2.3083
    """
    return jnp.asarray(nats) / math.log(2)
