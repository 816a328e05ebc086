"""All singular values of a long chain, the smallest as exact as the largest.

::

    P = J_{T−1} ⋯ J_0 = ∂s_T/∂s_0                 σ_1 ≥ … ≥ σ_S, in nats; log σ_1 − log σ_S is the log condition number

A product multiplied out loses every singular value below eps · σ_1.  The triangles of its QR steps lose none:

1. Cotangents of a first, backward sweep end in a frame V at s_0 that is close to the right singular vectors.
2. Tangents from V forward, made orthonormal at each step: V Pᵀ = L_1 L_2 ⋯ L_T Q.  The product of the triangles is kept
   as U D, D diagonal in log scale, U lower triangular with ones on its diagonal:
   U_t = U_{t−1} (D_{t−1} L_t D_t⁻¹).  Because V sorts the directions, the ratios d_i / d_j below the diagonal fall
   and U stays near the identity.
3. One-sided Jacobi rotations make the columns of U D orthogonal.  Each column has a scale of its own, and a rotation of
   columns that differ by any number of nats is computed from their ratio alone, so that every singular value has
   about the relative accuracy of U.

What the steps themselves round, eps · cond(J_t), no method gives back; ``roundoff`` adds it up.  Not differentiable.

Sources: Stewart 1997, SIAM J. Matrix Anal. Appl. 18 (graded QR of products); Demmel & Veselić 1992, SIAM J. Matrix
Anal. Appl. 13 (one-sided Jacobi is as accurate as the scaled matrix allows).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rnngrad import logscaled
from rnngrad.jacobians import layout_of, real_dtype, step_pulls
from rnngrad.logscaled import LogScaled, at_least_float32
from rnngrad.lyapunov import LOST, Block, push_forward, random_frame
from rnngrad.orthonormal import orthonormalise, product
from rnngrad.types import Cell, Params, State, check_finite, check_inputs
from rnngrad.unroll import run_forward, state_is_finite

MAX_SWEEPS = 30
"""Jacobi converges quadratically, in four to eight sweeps; more than this means NaN."""


class SingularValues(NamedTuple):
    """Singular values of one matrix."""

    log_singular_values: Float[Array, "..."]
    """(n,) in nats, descending; −inf for an exact zero."""
    num_sweeps: Int[Array, ""]
    """Jacobi sweeps that were needed."""
    converged: Bool[Array, ""]
    """Whether the rows came out finite and orthogonal to round-off."""


class ChainSingularValues(NamedTuple):
    """Singular values of ∂s_T/∂s_0."""

    log_singular_values: Float[Array, "..."]
    """(S,) in nats, descending; −inf for an exact zero, NaN when the state became non-finite."""
    roundoff: Float[Array, "..."]
    """(S,) nats by which rounding may have moved each: the sum over steps of what it does to log L_jj; inf where a step
    had lost the direction altogether."""
    converged: Bool[Array, "..."]
    """Whether the Jacobi sweeps converged on finite numbers, and the frame had sorted the directions well enough."""
    nonfinite_step: Int[Array, "..."]
    """First time step at which the state is not finite; −1 for none."""

    @property
    def log_condition_number(self) -> Float[Array, "..."]:
        """log(σ_1 / σ_S) in nats; inf for a singular chain."""
        return self.log_singular_values[..., 0] - self.log_singular_values[..., -1]


def _ratio(d: LogScaled) -> Array:
    """Returns d_i / d_j for all pairs, 0 where it is below the range; for positive scalars near mantissa 1."""
    exponent = d.exponent[:, None] - d.exponent[None, :]
    size = d.exponent.shape[0]
    power = logscaled.align(LogScaled(jnp.ones((size, size), d.mantissa.dtype), exponent), jnp.zeros_like(exponent))
    # a direction that has died takes no part: what its column of U would be does not matter, as long as it is finite
    divisor = jnp.where(d.mantissa == 0, jnp.inf, d.mantissa)
    return power * (d.mantissa[:, None] / divisor[None, :])


@functools.partial(jax.jit, static_argnames=("cell", "block"))
def _graded(cell, params, state, xs, *, block):
    """Returns U and D of the product of triangles."""
    dtype = at_least_float32(real_dtype(state))
    run = run_forward(cell, params, state, xs)

    def pull(rows, point):
        pull = step_pulls(cell, params, point, block.layout).full
        return orthonormalise(block.move(rows, pull, real_dtype(state))).rows, None

    eps = float(jnp.finfo(real_dtype(state)).eps)
    eye = jnp.eye(block.size, dtype=dtype)
    # from a random frame: the identity would stay unsorted along a triangular chain
    frame, _ = jax.lax.scan(
        pull, random_frame(jax.random.key(0), block.size, block.size, dtype), run.points, reverse=True
    )

    def push(carry, x):
        state, frame, unit, d, roundoff, is_sorted = carry
        state, move = push_forward(cell, params, state, x, block)
        moved = move(frame)
        out = orthonormalise(moved)
        factor = jnp.tril(product(moved, out.rows.T))
        pivots = jnp.exp(out.log_growth)
        new_d = logscaled.rescale(LogScaled(d.mantissa * pivots, d.exponent))
        # a direction of length 0 stays at 0: its column of U only has to be finite
        safe = jnp.where(pivots == 0, 1, pivots)
        ratio = _ratio(d)
        step = ratio * jnp.tril(factor / safe[None, :], -1) + eye
        error = eps * jnp.exp(jnp.minimum(out.log_stretch, -float(np.log(eps))))
        nats = jnp.where(error < LOST, -jnp.log1p(-jnp.minimum(error, LOST)), jnp.inf)
        is_sorted = is_sorted & (jnp.max(jnp.tril(ratio, -1)) < 1 / eps)
        return (state, out.rows, product(unit, step), new_d, roundoff + nats, is_sorted), None

    ones = logscaled.rescale(LogScaled(jnp.ones(block.size, dtype), jnp.zeros(block.size, jnp.int32)))
    start = (state, frame, eye, ones, jnp.zeros(block.size, dtype), jnp.array(True))
    (_, _, unit, d, roundoff, is_sorted), _ = jax.lax.scan(push, start, xs)
    finite = state_is_finite(run)
    nonfinite_step = jnp.where(jnp.all(finite), -1, jnp.argmin(finite)).astype(jnp.int32)
    return unit, d, roundoff, is_sorted, nonfinite_step


def _rotate(left: LogScaled, right: LogScaled) -> tuple[LogScaled, LogScaled, Array]:
    """Makes each pair of rows orthogonal; returns also the largest cosine there was before."""
    # the larger of each pair as u, the smaller as v = ρ · (scale of u)
    swap = (left.exponent < right.exponent)[:, None]
    u, v = jnp.where(swap, right.mantissa, left.mantissa), jnp.where(swap, left.mantissa, right.mantissa)
    apart = LogScaled(jnp.ones(u.shape[0], u.dtype), -jnp.abs(left.exponent - right.exponent))
    rho = logscaled.align(apart, jnp.zeros_like(apart.exponent))
    dot = lambda a, b: jnp.einsum("ps,ps->p", a, b, precision=jax.lax.Precision.HIGHEST)
    alpha, beta, gamma = dot(u, u), dot(v, v), dot(u, v)
    size = jnp.sqrt(alpha * beta)
    cosine = jnp.where(size > 0, jnp.abs(gamma) / jnp.where(size > 0, size, 1), 0)
    # tan of the rotation angle is ρτ
    active = (gamma != 0) & (alpha > 0)
    zeta = (rho * rho * beta - alpha) / jnp.where(active, 2 * gamma, 1)
    sign = jnp.where(zeta < 0, -1, 1).astype(u.dtype)
    tau = jnp.where(active, sign / jnp.where(active, jnp.abs(zeta) + jnp.sqrt(rho * rho + zeta * zeta), 1), 0)
    c = jax.lax.rsqrt(1 + jnp.square(rho * tau))[:, None]
    tau, rho = tau[:, None], rho[:, None]
    u, v = c * (u - rho * rho * tau * v), c * (v + tau * u)
    first = LogScaled(jnp.where(swap, v, u), left.exponent)
    second = LogScaled(jnp.where(swap, u, v), right.exponent)
    return first, second, jnp.max(cosine)


@jax.jit
def log_singular_values(rows: LogScaled) -> SingularValues:
    """Returns the singular values of a matrix whose rows have scales of their own, by one-sided Jacobi.

    Args:
      rows: mantissa (n, m), n ≤ m, and exponent (n,), one for each row.

    Raises:
      ValueError: more rows than columns.

    >>> import jax.numpy as jnp
    >>> from rnngrad.logscaled import LogScaled
    >>> from rnngrad.singular_values import log_singular_values
    >>> rows = LogScaled(jnp.array([[1.0, 1.0], [0.0, 1.0]]), jnp.array([0, -1000]))
    >>> [round(float(x), 3) for x in log_singular_values(rows).log_singular_values]  # log √2 and log(2^-1000 / √2)
    [0.347, -693.494]
    """
    n, m = rows.mantissa.shape
    if n > m:
        raise ValueError(f"rows: expected at most as many rows as columns, found shape {(n, m)}")
    if n % 2:
        # a row of zeros makes the number of rows even and stays apart from all rotations
        rows = LogScaled(jnp.pad(rows.mantissa, ((0, 1), (0, 0))), jnp.pad(rows.exponent, (0, 1)))
    half = rows.exponent.shape[0] // 2

    def pair_up(_, carry):
        """All pairs once in n − 1 rounds: one row stays, the others move round the table."""
        rows, worst = carry
        left = jax.tree.map(lambda leaf: leaf[:half], rows)
        right = jax.tree.map(lambda leaf: leaf[half:], rows)
        left, right, cosine = _rotate(left, right)
        moved = jax.tree.map(
            lambda a, b: (
                jnp.concatenate([a[:1], b[:1], a[1:-1], b[1:], a[-1:]]) if half > 1 else jnp.concatenate([a, b])
            ),
            left,
            right,
        )
        return moved, jnp.maximum(worst, cosine)

    zero = jnp.zeros((), rows.mantissa.dtype)
    tolerance = 4 * rows.mantissa.shape[1] ** 0.5 * float(jnp.finfo(rows.mantissa.dtype).eps)

    def sweep(carry):
        rows, _, count = carry
        rows, worst = jax.lax.fori_loop(0, max(2 * half - 1, 1), pair_up, (logscaled.rescale(rows), zero))
        return rows, worst, count + 1

    def goes_on(carry):
        _, worst, count = carry
        return (worst > tolerance) & (count < MAX_SWEEPS)

    start = (logscaled.rescale(rows), zero + 1, jnp.zeros((), jnp.int32))
    rows, worst, count = jax.lax.while_loop(goes_on, sweep, start)
    log_length = logscaled.log_norm(LogScaled(rows.mantissa[:, None, :], rows.exponent))
    values = jnp.flip(jnp.sort(log_length))[:n]
    return SingularValues(values, count, (worst <= tolerance) & ~jnp.any(jnp.isnan(values)))


def chain_singular_values(cell: Cell, params: Params, state: State, xs: Any) -> ChainSingularValues:
    """Returns every singular value of ∂s_T/∂s_0, in nats, at any length.

    Costs two runs with a QR of an S × S frame at each step, and one Jacobi SVD at the end.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence; ``jax.vmap`` for a batch.
      xs: inputs, shape (T, D).

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them.

    References: Stewart 1997; Demmel & Veselić 1992; see the module docstring.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5, forget_bias=1.0)
    >>> xs = jax.random.normal(jax.random.key(1), (200, 3))
    >>> values = rg.chain_singular_values(cell, cell.init(jax.random.key(0)), cell.init_state(), xs)
    >>> values.log_singular_values.shape, bool(values.log_condition_number > 200)
    ((10,), True)
    """
    check_inputs(cell, params, state, xs, one_sequence=True)
    check_finite(params, state, xs)
    layout = layout_of(state)
    block = Block(layout, layout.block(None))
    unit, d, roundoff, is_sorted, nonfinite_step = _graded(cell, params, state, xs, block=block)
    # the columns of U D, as rows
    found = log_singular_values(LogScaled(unit.T * d.mantissa[:, None], d.exponent))
    is_broken = nonfinite_step >= 0
    return ChainSingularValues(
        jnp.where(is_broken, jnp.nan, found.log_singular_values),
        jnp.where(is_broken, jnp.nan, roundoff),
        found.converged & is_sorted & ~is_broken,
        nonfinite_step,
    )
