"""Numbers that neither underflow nor overflow: an array times a power of two.

A long product of step Jacobians leaves the range of floating point long before it stops being interesting: for a
constant forget gate of 0.5, float32 returns 0 for ``norm(∏f)`` from lag 64 on and for ``∏f`` itself from lag 127 on.
Here every partial product is kept as

    value = mantissa · 2^exponent        max|mantissa| in [1/2, 1),   exponent an int32

so that rescaling is exact (only the binary exponent moves) and adding exponents is exact and associative.  A running
sum of logarithms in float32 would not do: at −40,000 nats its spacing is 0.004, so that the same increment, added
again and again, is rounded the same way each time and the drift grows with T (62 nats over 1e5 steps of f = 0.5; see
``tests/test_logscaled.py``).  ``log_scale`` gives the exponent in nats.

int32 reaches e^±1.4e9; a chain of 1e7 steps may lose e^140 per step before that.

Nothing here takes the logarithm of a product; the logarithm is taken of a mantissa near 1 and added to the scale.
An exact zero has mantissa 0 and log-norm −inf, never NaN.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int

LN2 = float(np.log(2.0))

# Exponent given to an exact zero where two numbers are aligned, so that it never shifts the other one away.  Far below
# any exponent in use, and the difference of two of them still fits an int32.
_ZERO_EXPONENT = -(2**29)


class LogScaled(NamedTuple):
    """An array times a power of two; ``exponent`` covers the leading axes, the trailing ones share it.

    For a matrix the shapes are ``mantissa: (…, M, N)`` and ``exponent: (…)``.  The mantissa may also be a pytree of
    such arrays that share one scale, like the blocks of a chain.  A pytree itself: it passes through jit, vmap, scan
    and grad (the exponent is constant to differentiation, which is right because rescaling leaves the value unchanged).
    """

    mantissa: Any
    exponent: Int[Array, "..."]

    @property
    def log_scale(self) -> Float[Array, "..."]:
        """The scale in nats: value = mantissa · e^log_scale."""
        return LN2 * self.exponent.astype(_at_least_float32(_dtype(self)))


def _dtype(x: LogScaled) -> np.dtype:
    return jnp.finfo(jax.tree.leaves(x.mantissa)[0].dtype).dtype


def _at_least_float32(dtype: np.dtype) -> np.dtype:
    """Logarithms and powers are taken in float32 at least: bfloat16 has two digits, and frexp refuses it."""
    real = jnp.finfo(dtype).dtype
    return real if real.itemsize >= 4 else np.dtype(np.float32)


def _event_axes(leaf: Array, exponent: Array) -> tuple[int, ...]:
    return tuple(range(exponent.ndim - leaf.ndim, 0))


def _times(mantissa: Any, scale: Array) -> Any:
    """Multiplies every array by the scale of its leading axes."""

    def one(leaf: Array) -> Array:
        return leaf * jnp.broadcast_to(scale.reshape(scale.shape + (1,) * (leaf.ndim - scale.ndim)), leaf.shape)

    return jax.tree.map(one, mantissa)


def _largest(x: LogScaled) -> Array:
    """The largest absolute entry of the mantissa, over all of its arrays."""
    return functools.reduce(
        jnp.maximum,
        [jnp.max(jnp.abs(leaf), axis=_event_axes(leaf, x.exponent)) for leaf in jax.tree.leaves(x.mantissa)],
    )


def _power_of_two(exponent: Int[Array, "..."], dtype: np.dtype) -> Float[Array, "..."]:
    """Returns 2^exponent exactly, 0 below the normal range."""
    smallest, largest = jnp.finfo(dtype).minexp, jnp.finfo(dtype).maxexp - 1
    wide = _at_least_float32(dtype)
    power = jnp.ldexp(jnp.ones((), wide), jnp.clip(exponent, smallest, largest))
    return jnp.where(exponent < smallest, jnp.zeros((), wide), power).astype(dtype)


def rescale(x: LogScaled) -> LogScaled:
    """Returns the same value with the largest entry of the mantissa brought into [1/2, 1).

    A zero keeps its exponent, and NaN or inf in the mantissa stays where it is.
    """
    dtype = _dtype(x)
    largest = _largest(jax.lax.stop_gradient(x))
    _, shift = jnp.frexp(largest.astype(_at_least_float32(dtype)))
    # Past ±limit the factor itself would leave the range; the next rescale does the rest.
    limit = -int(jnp.finfo(dtype).minexp) - 1
    shift = jnp.clip(jnp.where(jnp.isfinite(largest) & (largest > 0), shift, 0), -limit, limit).astype(jnp.int32)
    return LogScaled(_times(x.mantissa, _power_of_two(-shift, dtype)), x.exponent + shift)


def from_array(array: Inexact[Array, "..."], *, event_ndim: int = 2) -> LogScaled:
    """Returns ``array`` as a LogScaled number whose last ``event_ndim`` axes share one scale.

    >>> import jax.numpy as jnp
    >>> from rnngrad import logscaled
    >>> print(logscaled.log_norm(logscaled.from_array(1e-30 * jnp.eye(4))))
    -68.384...
    """
    exponent = jnp.zeros(array.shape[: array.ndim - event_ndim], jnp.int32)
    return rescale(LogScaled(array, exponent))


def to_array(x: LogScaled) -> Any:
    """Returns the plain array (or pytree of them); entries out of range become 0 or inf, as in plain arithmetic."""
    half = x.exponent // 2
    # in two factors: 2^exponent alone may overflow where mantissa · 2^exponent does not
    scaled = _times(x.mantissa, _power_of_two(half, _dtype(x)))
    return _times(scaled, _power_of_two(x.exponent - half, _dtype(x)))


def matmul(a: LogScaled, b: LogScaled) -> LogScaled:
    """Returns the matrix product ``a @ b`` at highest matmul precision, rescaled; associative up to rounding.

    Both mantissas stand below 1, so a product of up to 2^126 terms cannot overflow before the rescaling.
    """
    product = jnp.matmul(a.mantissa, b.mantissa, precision=jax.lax.Precision.HIGHEST)
    return rescale(LogScaled(product, a.exponent + b.exponent))


def add(a: LogScaled, b: LogScaled) -> LogScaled:
    """Returns ``a + b``, aligned to the larger exponent and rescaled; shapes must match."""
    exponents = [jnp.where(_largest(jax.lax.stop_gradient(x)) != 0, x.exponent, _ZERO_EXPONENT) for x in (a, b)]
    top = jnp.maximum(*exponents)
    terms = [
        _times(x.mantissa, _power_of_two(exponent - top, _dtype(x)))
        for x, exponent in zip((a, b), exponents, strict=True)
    ]
    return rescale(LogScaled(jax.tree.map(jnp.add, *terms), jnp.where(top == _ZERO_EXPONENT, 0, top)))


def negative(x: LogScaled) -> LogScaled:
    """Returns ``-x``."""
    return LogScaled(jax.tree.map(jnp.negative, x.mantissa), x.exponent)


def log_norm(x: LogScaled, norm: str = "frobenius") -> Float[Array, "..."]:
    """Returns the logarithm of the norm over the last two axes, in nats; −inf for an exact zero.

    Args:
      x: matrices of shape (…, M, N), or blocks of columns of one matrix.
      norm: ``"frobenius"`` or ``"spectral"`` (largest singular value).
    """
    blocks = [leaf.astype(_at_least_float32(_dtype(x))) for leaf in jax.tree.leaves(x.mantissa)]
    if norm == "frobenius":
        # a dot product: several times as fast as a sum of squares on a CPU
        squares = [
            jnp.einsum("...mn,...mn->...", block, block, precision=jax.lax.Precision.HIGHEST) for block in blocks
        ]
        squared = functools.reduce(jnp.add, squares)
    elif norm == "spectral":
        mantissa = jnp.concatenate(blocks, axis=-1)
        # The largest eigenvalue of the smaller Gram matrix: cheaper than an SVD and as accurate for the largest one.
        transposed = jnp.swapaxes(mantissa, -1, -2)
        wide = mantissa.shape[-2] <= mantissa.shape[-1]
        left, right = (mantissa, transposed) if wide else (transposed, mantissa)
        squared = jnp.linalg.eigvalsh(jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST))[..., -1]
    else:
        raise ValueError(f"unknown norm {norm!r}; expected 'frobenius' or 'spectral'")
    is_zero = squared == 0
    log = 0.5 * jnp.log(jnp.where(is_zero, 1, squared)) + x.log_scale
    return jnp.where(is_zero, -jnp.inf, log)


def log_max(x: LogScaled) -> Float[Array, "..."]:
    """Returns the logarithm of the largest absolute entry, in nats; −inf for an exact zero."""
    largest = _largest(x).astype(_at_least_float32(_dtype(x)))
    is_zero = largest == 0
    return jnp.where(is_zero, -jnp.inf, jnp.log(jnp.where(is_zero, 1, largest)) + x.log_scale)


def log_distance(a: LogScaled, b: LogScaled) -> Float[Array, "..."]:
    """Returns log(‖a − b‖_F / ‖b‖_F), the relative difference in nats; −inf when equal, also when both are zero."""
    difference = add(a, negative(b))
    # the exponents are subtracted as integers; two large logarithms would lose digits
    apart = LogScaled(difference.mantissa, difference.exponent - b.exponent)
    log = log_norm(apart) - log_norm(LogScaled(b.mantissa, jnp.zeros_like(b.exponent)))
    return jnp.where(jnp.isneginf(log_norm(apart)), -jnp.inf, log)
