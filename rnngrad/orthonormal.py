"""Orthonormal frames: Y = L Q with L lower triangular, the step that every spectrum repeats.

Rows of ``Y: (k, S)`` are tangent vectors, rows of Q the orthonormal frame that spans the same nested subspaces (the
first j rows of both span the same space, for every j), and log L_jj is how much volume direction j adds.  It is the QR
decomposition of Yᵀ, written for rows.

A QR by LAPACK costs several times as much as the matrix product before it.  Here instead:

1. *Block Gram–Schmidt.*  The rows are cut in panels of k/2, k/4, …, since the small exponents lie farther apart than
   the large ones.  Each panel is made orthonormal and then projected out of all rows below it, by matrix products.
2. *Cholesky QR in the panel:* P Pᵀ = L Lᵀ, Q = L⁻¹ P.  With P_j the rows of P, Q is orthonormal up to
   δ = eps · ‖L⁻¹ diag ‖P_j‖‖².  The last panel, which holds the smallest exponents, is decomposed twice, the first time
   with the diagonal raised by a few eps, which cannot break down; the second pass corrects what the first got wrong.
3. *Check and fall-back.*  A projection leaves δ ‖Y_j‖ behind, and the L⁻¹ of the next panel magnifies it.  Where that
   could be more than ``LEFT_BEHIND`` of a row, steps 1 and 2 are done again on what they gave; where that does not
   help, all of Y goes through Householder QR.

One projection is enough, where a QR decomposition as such would need two.  Y = L Q holds to round-off whether or not Q
is orthonormal, so that the triangles of a run multiply to a triangle, and a growth that one step measures too large
the next one measures too small: what is left in the sum is the volume of the *last* frame's rows, which step 3 keeps
near 1.  Squared condition numbers appear only within a panel, and only where they are checked.  Plain Cholesky QR of
a whole frame breaks down in float32 on one step of a random LSTM, and a shift large enough to prevent that spoils the
small exponents.

Sources: Stathopoulos & Wu 2002 (Cholesky QR); Yamamoto et al. 2015, ETNA 44 (twice is enough); Fukaya et al. 2020,
SIAM J. Sci. Comput. 42 (shift).  The derivative is that of QR, which does not depend on how it is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rnngrad import logscaled
from rnngrad.logscaled import LogScaled

SMALLEST_PANEL = 32
"""Rows of the last panels: below it a LAPACK call costs more than its arithmetic."""
LEFT_BEHIND = 1.0
"""Bound on the share of a row that may be left of a projection.  The bound takes the largest δ and the largest stretch
together: on frames of a random LSTM the share itself was ten times smaller."""


class Frame(NamedTuple):
    """An orthonormal frame and what it took to make it."""

    rows: Float[Array, "k S"]
    """Q, orthonormal rows."""
    log_growth: Float[Array, " k"]
    """log L_jj; −inf for a row that depends on those above it exactly."""
    log_stretch: Float[Array, " k"]
    """Logarithm of about ‖row j of L⁻¹ diag ‖Y_i‖‖, the condition number of row j: rounding Y moves log L_jj by eps
    times this.  At least 0; inf where log_growth is −inf."""
    fell_back: Float[Array, ""]
    """1 where Householder QR was needed, else 0."""


# Signs for estimating the length of rows of L⁻¹: E (row · signs)² is its square.
_SIGNS = np.random.default_rng(0).choice([-1.0, 1.0], size=(4096, 4))


def _signs(k: int, dtype: np.dtype) -> Array:
    return jnp.asarray(np.resize(_SIGNS, (k, _SIGNS.shape[1])), dtype)


def product(a: Array, b: Array) -> Array:
    """Returns ``a @ b`` at highest matmul precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _panel_sizes(k: int) -> list[int]:
    sizes = []
    while k > 2 * SMALLEST_PANEL:
        sizes.append(k // 2)
        k -= k // 2
    return sizes + ([k - k // 2, k // 2] if k > SMALLEST_PANEL else [k])


class _Pass(NamedTuple):
    """One Cholesky QR of a panel."""

    inverse: Array
    """L⁻¹"""
    log_growth: Array
    """log L_jj"""
    error: Array
    """δ, how far L⁻¹ P may be from orthonormal: eps · ‖L⁻¹ diag ‖P_j‖‖²; NaN where Cholesky broke down."""


def row_lengths(rows: Array) -> Array:
    """Returns ‖row‖ of each row."""
    return jnp.sqrt(jnp.einsum("ks,ks->k", rows, rows, precision=jax.lax.Precision.HIGHEST))


def _cholesky_qr(panel: Array, shift: float) -> _Pass:
    gram = product(panel, panel.T)
    squares = jnp.diagonal(gram)
    factor = jnp.linalg.cholesky(gram + jnp.diag(shift * squares), symmetrize_input=False)
    # the inverse, since on a CPU it takes half the time of a triangular solve with S right-hand sides
    eye = jnp.eye(panel.shape[0], dtype=panel.dtype)
    inverse = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    stretch = row_lengths(inverse * jnp.sqrt(squares)[None, :])
    error = jnp.finfo(panel.dtype).eps * jnp.square(jnp.max(stretch))
    return _Pass(inverse, jnp.log(jnp.diagonal(factor)), error)


def _twice(panel: Array) -> tuple[Array, _Pass]:
    """Returns Q of a panel that may be ill conditioned, and both passes in one."""
    first = _cholesky_qr(panel, 4 * panel.shape[0] * float(jnp.finfo(panel.dtype).eps))
    rows = product(first.inverse, panel)
    second = _cholesky_qr(rows, 0.0)
    both = _Pass(product(second.inverse, first.inverse), first.log_growth + second.log_growth, second.error)
    return product(second.inverse, rows), both


def _by_panels(frame: Array) -> tuple[Array, Array, Array, Bool[Array, ""]]:
    """Returns Q, log L_jj, L⁻¹ diag ‖Y_i‖ times the signs, and whether all that can be trusted."""
    done, logs, solved = [], [], []
    rest, length = frame, row_lengths(frame)
    right = _signs(frame.shape[0], frame.dtype) * length[:, None]
    # δ of the panels above, and the largest share of a row that it leaves behind
    error_above, left = (jnp.zeros((), frame.dtype) for _ in range(2))
    sizes = _panel_sizes(frame.shape[0])
    for index, size in enumerate(sizes):
        panel = rest[:size]
        if index < len(sizes) - 1:
            made = _cholesky_qr(panel, 0.0)
            rows = product(made.inverse, panel)
        else:
            rows, made = _twice(panel)
        done.append(rows)
        logs.append(made.log_growth)
        solved.append(product(made.inverse, right[:size]))
        stretch = jnp.max(row_lengths(made.inverse * length[None, :size]))
        left = jnp.maximum(left, jnp.maximum(made.error, error_above * stretch))
        error_above = jnp.maximum(error_above, made.error)
        rest, length, right = rest[size:], length[size:], right[size:]
        if rest.shape[0]:
            along = product(rest, rows.T)
            rest = rest - product(along, rows)
            right = right - product(along, solved[-1])
    # a Cholesky that broke down leaves NaN, which compares false (and jnp.maximum passes it on)
    return jnp.concatenate(done), jnp.concatenate(logs), jnp.concatenate(solved), left <= LEFT_BEHIND


def _log_stretch(solved: Array) -> Array:
    squares = jnp.mean(jnp.square(solved), axis=1)
    # the length of a row is never below 1, its estimate from a few signs may be
    return 0.5 * jnp.log(jnp.maximum(squares, 1))


def _householder(frame: Array) -> tuple[Array, Array, Array]:
    columns, factor = jnp.linalg.qr(frame.T)
    diagonal = jnp.diagonal(factor)
    sign = jnp.where(diagonal < 0, -1.0, 1.0).astype(frame.dtype)
    size = jnp.abs(diagonal)
    # A coordinate that no row reaches takes one dimension from the span: as many factors are 0, the smallest, which QR
    # returns as round-off.  (A dead relu unit is such a coordinate.)
    num_lost = frame.shape[0] - jnp.minimum(frame.shape[0], jnp.sum(jnp.any(frame != 0, axis=0)))
    rank = jnp.argsort(jnp.argsort(size))
    size = jnp.where(rank < num_lost, 0, size)
    is_zero = size == 0
    log_growth = jnp.where(is_zero, -jnp.inf, jnp.log(jnp.where(is_zero, 1, size)))
    right = _signs(frame.shape[0], frame.dtype) * row_lengths(frame)[:, None]
    solved = jax.lax.linalg.triangular_solve(
        factor + jnp.diag(jnp.where(is_zero, 1.0, 0.0).astype(frame.dtype) - jnp.where(is_zero, diagonal, 0)),
        right,
        left_side=True,
        lower=False,
        transpose_a=True,
    )
    return columns.T * sign[:, None], log_growth, jnp.where(is_zero, jnp.inf, _log_stretch(solved))


@jax.custom_jvp
def orthonormalise(frame: Float[Array, "k S"]) -> Frame:
    """Returns the orthonormal rows that span the same nested subspaces, with the logarithms of the triangle's diagonal.

    Args:
      frame: k rows in S dimensions, k ≤ S.

    >>> import jax.numpy as jnp
    >>> from rnngrad.orthonormal import orthonormalise
    >>> print(orthonormalise(jnp.array([[0.0, 1.0, 0.0], [0.0, 5.0, 1.0]])).log_growth)
    [0. 0.]
    """
    # rows divided by powers of two, so that no square leaves the range of the dtype
    scaled = logscaled.rescale(LogScaled(frame, jnp.zeros(frame.shape[0], jnp.int32)))
    log_scale, frame = scaled.log_scale, scaled.mantissa
    rows, log_growth, solved, good = _by_panels(frame)
    zero, one = jnp.zeros((), frame.dtype), jnp.ones((), frame.dtype)

    def again():
        second, more, solved_again, good = _by_panels(rows)
        # the two triangles one after the other; the second is near I
        stretch = jnp.maximum(_log_stretch(solved), _log_stretch(solved_again))
        return jax.lax.cond(
            good & jnp.all(jnp.isfinite(stretch)),
            lambda: Frame(second, log_growth + more, stretch, zero),
            lambda: Frame(*_householder(frame), one),
        )

    out = jax.lax.cond(good, lambda: Frame(rows, log_growth, _log_stretch(solved), zero), again)
    return out._replace(log_growth=out.log_growth + log_scale)


@orthonormalise.defjvp
def _derivative(primals, tangents):
    """From dY = dL Q + L dQ: A = L⁻¹ dY Qᵀ is the sum of the lower L⁻¹dL and the skew dQ Qᵀ."""
    (frame,), (tangent,) = primals, tangents
    out = orthonormalise(frame)
    # a row of length 0 has no derivative: it is left out, and those of the others stay what they are
    is_zero = jnp.isneginf(out.log_growth)
    keep = jnp.where(is_zero, 0.0, 1.0).astype(frame.dtype)
    factor = jnp.tril(product(frame, out.rows.T)) * keep[:, None] + jnp.diag(1 - keep)
    solved = jax.lax.linalg.triangular_solve(factor, tangent * keep[:, None], left_side=True, lower=True)
    both = product(solved, out.rows.T)
    lower = jnp.tril(both) + jnp.triu(both, 1).T
    rows = (solved - product(lower, out.rows)) * keep[:, None]
    tangent_out = Frame(rows, jnp.diagonal(both), jnp.zeros_like(out.log_stretch), jnp.zeros_like(out.fell_back))
    return out, tangent_out
