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
from jaxtyping import Array, Bool, Float

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
    fell_back: Float[Array, ""]
    """1 where Householder QR was needed, else 0."""


def _product(a: Array, b: Array) -> Array:
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


def _row_lengths(rows: Array) -> Array:
    return jnp.sqrt(jnp.einsum("ks,ks->k", rows, rows, precision=jax.lax.Precision.HIGHEST))


def _cholesky_qr(panel: Array, shift: float) -> _Pass:
    gram = _product(panel, panel.T)
    squares = jnp.diagonal(gram)
    factor = jnp.linalg.cholesky(gram + jnp.diag(shift * squares), symmetrize_input=False)
    # the inverse, since on a CPU it takes half the time of a triangular solve with S right-hand sides
    eye = jnp.eye(panel.shape[0], dtype=panel.dtype)
    inverse = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    stretch = _row_lengths(inverse * jnp.sqrt(squares)[None, :])
    error = jnp.finfo(panel.dtype).eps * jnp.square(jnp.max(stretch))
    return _Pass(inverse, jnp.log(jnp.diagonal(factor)), error)


def _twice(panel: Array) -> tuple[Array, _Pass]:
    """Returns Q of a panel that may be ill conditioned, and both passes in one."""
    first = _cholesky_qr(panel, 4 * panel.shape[0] * float(jnp.finfo(panel.dtype).eps))
    rows = _product(first.inverse, panel)
    second = _cholesky_qr(rows, 0.0)
    both = _Pass(_product(second.inverse, first.inverse), first.log_growth + second.log_growth, second.error)
    return _product(second.inverse, rows), both


def _by_panels(frame: Array) -> tuple[Array, Array, Bool[Array, ""]]:
    """Returns Q, log L_jj, and whether they can be trusted."""
    done, logs = [], []
    rest, length = frame, _row_lengths(frame)
    # δ of the panels above, and the largest share of a row that it leaves behind
    error_above, left = (jnp.zeros((), frame.dtype) for _ in range(2))
    sizes = _panel_sizes(frame.shape[0])
    for index, size in enumerate(sizes):
        panel = rest[:size]
        if index < len(sizes) - 1:
            made = _cholesky_qr(panel, 0.0)
            rows = _product(made.inverse, panel)
        else:
            rows, made = _twice(panel)
        done.append(rows)
        logs.append(made.log_growth)
        stretch = jnp.max(_row_lengths(made.inverse * length[None, :size]))
        left = jnp.maximum(left, jnp.maximum(made.error, error_above * stretch))
        error_above = jnp.maximum(error_above, made.error)
        rest, length = rest[size:], length[size:]
        if rest.shape[0]:
            rest = rest - _product(_product(rest, rows.T), rows)
    # a Cholesky that broke down leaves NaN, which compares false (and jnp.maximum passes it on)
    return jnp.concatenate(done), jnp.concatenate(logs), left <= LEFT_BEHIND


def _householder(frame: Array) -> tuple[Array, Array]:
    columns, factor = jnp.linalg.qr(frame.T)
    diagonal = jnp.diagonal(factor)
    sign = jnp.where(diagonal < 0, -1.0, 1.0).astype(frame.dtype)
    size = jnp.abs(diagonal)
    # A coordinate that no row reaches takes one dimension from the span: the last factors are 0, which QR returns as
    # round-off.  (A dead relu unit is such a coordinate.)
    num_reached = jnp.sum(jnp.any(frame != 0, axis=0))
    size = jnp.where(jnp.arange(frame.shape[0]) < num_reached, size, 0)
    is_zero = size == 0
    log_growth = jnp.where(is_zero, -jnp.inf, jnp.log(jnp.where(is_zero, 1, size)))
    return columns.T * sign[:, None], log_growth


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
    rows, log_growth, good = _by_panels(frame)
    one = jnp.ones((), frame.dtype)

    def again():
        second, more, good = _by_panels(rows)
        first_and_second = Frame(second, log_growth + more, 0 * one)
        return jax.lax.cond(good, lambda: first_and_second, lambda: Frame(*_householder(frame), one))

    return jax.lax.cond(good, lambda: Frame(rows, log_growth, 0 * one), again)


@orthonormalise.defjvp
def _derivative(primals, tangents):
    """From dY = dL Q + L dQ: A = L⁻¹ dY Qᵀ is the sum of the lower L⁻¹dL and the skew dQ Qᵀ."""
    (frame,), (tangent,) = primals, tangents
    out = orthonormalise(frame)
    factor = jnp.tril(_product(frame, out.rows.T))
    solved = jax.lax.linalg.triangular_solve(factor, tangent, left_side=True, lower=True)
    both = _product(solved, out.rows.T)
    lower = jnp.tril(both) + jnp.triu(both, 1).T
    rows = solved - _product(lower, out.rows)
    return out, Frame(rows, jnp.diagonal(both), jnp.zeros_like(out.fell_back))
