"""Numbers that neither underflow nor overflow: an array times a power of two.

A long product of step Jacobians leaves the range of floating point long before it stops being interesting: for a
constant forget gate of 0.5, float32 returns 0 for ``norm(∏f)`` from lag 64 on and for ``∏f`` itself from lag 127 on.
Here every partial product is kept as

    value = mantissa · 2^exponent        max|mantissa| in [1/2, 1),   exponent an int32

so that rescaling is exact (only the binary exponent moves) and adding exponents is exact and associative.  A running
sum of logarithms in float32 would not do: at −40,000 nats its spacing is 0.004, so that the same increment, added
again and again, is rounded the same way each time and the drift grows with T (62 nats over 1e5 steps of f = 0.5; see
``tests/test_logscaled.py``).  ``log_scale`` gives the exponent in nats.

int32 reaches e^±1.4e9; a chain of 1e7 steps may lose e^70 per step before differences of exponents leave it.

Nothing here takes the logarithm of a product; the logarithm is taken of a mantissa near 1 and added to the scale.
An exact zero has mantissa 0 and log-norm −inf, never NaN.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LN2 = float(np.log(2.0))


class LogScaled(NamedTuple):
    """A real array times a power of two; ``exponent`` covers the leading axes, the trailing ones share it.

    For a matrix the shapes are ``mantissa: (…, M, N)`` and ``exponent: (…)``.  A pytree: it passes through jit, vmap,
    scan and grad (the exponent is constant to differentiation, which is right because rescaling leaves the value
    unchanged).
    """

    mantissa: Float[Array, "..."]
    exponent: Int[Array, "..."]

    @property
    def log_scale(self) -> Float[Array, "..."]:
        """The scale in nats: value = mantissa · e^log_scale."""
        return LN2 * self.exponent.astype(at_least_float32(self.mantissa.dtype))


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """Returns ``dtype`` or float32, whichever has more digits: bfloat16 has two, and frexp refuses it."""
    return dtype if dtype.itemsize >= 4 else np.dtype(np.float32)


def largest(x: LogScaled) -> Array:
    """Returns the largest absolute entry of each mantissa, constant to differentiation."""
    axes = tuple(range(x.exponent.ndim - x.mantissa.ndim, 0))
    return jnp.max(jnp.abs(jax.lax.stop_gradient(x.mantissa)), axis=axes)


def _times_power_of_two(mantissa: Array, exponent: Int[Array, "..."]) -> Array:
    """Returns mantissa · 2^exponent, exactly; a power below the normal range counts as 0."""
    dtype = mantissa.dtype
    smallest, highest = jnp.finfo(dtype).minexp, jnp.finfo(dtype).maxexp - 1
    wide = at_least_float32(dtype)
    power = jnp.ldexp(jnp.ones((), wide), jnp.clip(exponent, smallest, highest))
    power = jnp.where(exponent < smallest, jnp.zeros((), wide), power).astype(dtype)
    return mantissa * jnp.broadcast_to(power.reshape(power.shape + (1,) * (mantissa.ndim - power.ndim)), mantissa.shape)


def _own_exponent(x: LogScaled) -> tuple[Int[Array, "..."], Array]:
    """Returns the exponent at which the largest entry stands in [1/2, 1), and whether that says anything.

    Of an exact zero, or of NaN and inf, it does not: they keep the exponent they have.
    """
    top = largest(x)
    _, shift = jnp.frexp(top.astype(at_least_float32(x.mantissa.dtype)))
    # Past ±limit the factor itself would leave the range; the next rescale does the rest.
    limit = -int(jnp.finfo(x.mantissa.dtype).minexp) - 1
    counts = jnp.isfinite(top) & (top > 0)
    return x.exponent + jnp.clip(jnp.where(counts, shift, 0), -limit, limit).astype(jnp.int32), counts


def rescale(x: LogScaled) -> LogScaled:
    """Returns the same value with the largest entry of the mantissa brought into [1/2, 1).

    A zero keeps its exponent, and NaN or inf in the mantissa stays where it is.
    """
    exponent, _ = _own_exponent(x)
    return LogScaled(align(x, exponent), exponent)


def rescale_together(parts: tuple[LogScaled, ...]) -> tuple[LogScaled, ...]:
    """Returns the parts at one common exponent where they lie close enough for it, else each at its own.

    Close enough is a quarter of the exponent range of their dtype: the smaller part keeps all its digits, and so do the
    squares of its entries when its norm is taken.
    """
    owns = [_own_exponent(part) for part in parts]
    top, bottom = _range([exponent for exponent, _ in owns], [counts for _, counts in owns])
    close = top - bottom <= -int(jnp.finfo(parts[0].mantissa.dtype).minexp) // 4
    scaled = []
    for part, (own, counts) in zip(parts, owns, strict=True):
        exponent = jnp.where(close | ~counts, top, own)
        scaled.append(LogScaled(align(part, exponent), exponent))
    return tuple(scaled)


def _range(exponents: list[Array], counts: list[Array]) -> tuple[Array, Array]:
    """Returns the largest and the smallest exponent among those that count; those of the first where none does."""
    ends = []
    for combine, neutral in ((jnp.maximum, jnp.iinfo(jnp.int32).min), (jnp.minimum, jnp.iinfo(jnp.int32).max)):
        considered = [jnp.where(c, e, neutral) for e, c in zip(exponents, counts, strict=True)]
        ends.append(functools.reduce(combine, considered))
    any_counts = functools.reduce(jnp.logical_or, counts)
    top, bottom = (jnp.where(any_counts, end, exponents[0]) for end in ends)
    return top, bottom


def common_exponent(parts: tuple[LogScaled, ...]) -> Int[Array, "..."]:
    """Returns the largest exponent of several numbers; that of an exact zero does not count."""
    return _range([part.exponent for part in parts], [largest(part) != 0 for part in parts])[0]


def align(x: LogScaled, exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns the mantissa that ``x`` has at another exponent; entries below the range become 0."""
    return _times_power_of_two(x.mantissa, x.exponent - exponent)


def from_array(matrix: Float[Array, "*batch M N"]) -> LogScaled:
    """Returns a matrix, or a batch of them, as LogScaled numbers.

    >>> import jax.numpy as jnp
    >>> from rnngrad import logscaled
    >>> print(logscaled.log_norm(logscaled.from_array(1e-30 * jnp.eye(4))))
    -68.384...
    """
    return rescale(LogScaled(matrix, jnp.zeros(matrix.shape[:-2], jnp.int32)))


def to_array(x: LogScaled) -> Float[Array, "..."]:
    """Returns the plain array; entries out of range become 0 or inf, as they would in plain arithmetic."""
    half = x.exponent // 2
    # in two factors: 2^exponent alone may overflow where mantissa · 2^exponent does not
    return _times_power_of_two(_times_power_of_two(x.mantissa, half), x.exponent - half)


def matmul(a: LogScaled, b: LogScaled) -> LogScaled:
    """Returns the matrix product ``a @ b`` at highest matmul precision, rescaled; associative up to rounding.

    Both mantissas stand below 1, so a product of up to 2^126 terms cannot overflow before the rescaling.
    """
    product = jnp.matmul(a.mantissa, b.mantissa, precision=jax.lax.Precision.HIGHEST)
    return rescale(LogScaled(product, a.exponent + b.exponent))


def add(a: LogScaled, b: LogScaled) -> LogScaled:
    """Returns ``a + b``, aligned to the larger exponent and rescaled; shapes must match."""
    top = common_exponent((a, b))
    # of an exact zero the exponent means nothing and may lie above: 0 · 2^clipped is still 0
    return rescale(LogScaled(align(a, top) + align(b, top), top))


def negative(x: LogScaled) -> LogScaled:
    """Returns ``-x``."""
    return LogScaled(-x.mantissa, x.exponent)


def join(parts: tuple[LogScaled, ...]) -> LogScaled:
    """Returns blocks of columns side by side in one matrix, at the largest of their exponents."""
    if len(parts) == 1:
        return parts[0]
    top = common_exponent(parts)
    return LogScaled(jnp.concatenate([align(part, top) for part in parts], axis=-1), top)


def log_norm(x: LogScaled, norm: str = "frobenius") -> Float[Array, "..."]:
    """Returns the logarithm of the norm over the last two axes, in nats; −inf for an exact zero.

    Args:
      x: matrices of shape (…, M, N).
      norm: ``"frobenius"`` or ``"spectral"`` (largest singular value).
    """
    mantissa = x.mantissa.astype(at_least_float32(x.mantissa.dtype))
    if norm == "frobenius":
        # a dot product: several times as fast as a sum of squares on a CPU
        squared = jnp.einsum("...mn,...mn->...", mantissa, mantissa, precision=jax.lax.Precision.HIGHEST)
    elif norm == "spectral":
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
    top = largest(x).astype(at_least_float32(x.mantissa.dtype))
    is_zero = top == 0
    return jnp.where(is_zero, -jnp.inf, jnp.log(jnp.where(is_zero, 1, top)) + x.log_scale)


def log_distance(a: LogScaled, b: LogScaled) -> Float[Array, "..."]:
    """Returns log(‖a − b‖_F / ‖b‖_F), the relative difference in nats; −inf when equal, also when both are zero."""
    difference = add(a, negative(b))
    # the exponents are subtracted as integers; two large logarithms would lose digits
    apart = LogScaled(difference.mantissa, difference.exponent - b.exponent)
    log = log_norm(apart) - log_norm(LogScaled(b.mantissa, jnp.zeros_like(b.exponent)))
    return jnp.where(jnp.isneginf(log_norm(apart)), -jnp.inf, log)
