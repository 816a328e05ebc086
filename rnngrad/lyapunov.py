"""Lyapunov spectra: at what rates small perturbations of the state grow, one rate for each direction.

::

    Q_t J_tᵀ = L_{t+1} Q_{t+1}                    rows of Q: an orthonormal frame of tangents, pushed and made
                                                  orthonormal again (``rnngrad.orthonormal``)
    λ_j = mean over t of log (L_t)_jj             nats per step, from the largest to the smallest

J is never formed: pushing k tangents through one step costs one product with the cell's own weights.  The adjoint
spectrum does the same with cotangents, from the last step to the first; on a stationary run both have the same
exponents.

*QR interval.*  Between two QRs the rows of the frame turn towards the fastest direction, and once their condition
number reaches 1/eps the slow ones are round-off; a random LSTM with a QR every ten steps in float32 reports −2.5 for
its last exponent where −8.4 is right.  The interval is therefore taken from measured growth: the condition number that
has built up stays below 1/√eps, and a run whose steps exceed that one by one gets a QR at each.

*What can still be wrong is reported.*  ``roundoff`` estimates from every QR what rounding adds to each exponent, and
``resolved`` says where that is below 1e-2; an exponent that is lost in round-off as a rule is −inf, since a singular
step looks the same.  Standard errors come from block means, ``converged`` compares the halves of the run, and
``sum_rule_defect`` compares Σλ with log|det J| by LU, which shares nothing with the QR.

Complex states count as real pairs.

Sources: Benettin et al. 1980, Meccanica 15; Geist, Parlitz & Lauterborn 1990, Prog. Theor. Phys. 83 (QR); Kaplan &
Yorke 1979 (dimension); Pesin 1977 (entropy); Ginelli et al. 2007, PRL 99, 130601 (covariant vectors); for recurrent
networks Engelken, Wolf & Abbott 2020, arXiv 2006.02427 and Vogt et al. 2020, arXiv 2006.14123.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rnngrad.jacobians import MATMUL_PRECISION, Layout, layout_of, real_dtype, step_pulls
from rnngrad.logscaled import at_least_float32
from rnngrad.orthonormal import orthonormalise
from rnngrad.retention import Certificate, certificate
from rnngrad.types import Cell, Params, State, check_finite, check_inputs
from rnngrad.unroll import run_forward

RESOLVED = 1e-2
"""Largest round-off, in nats per step, of an exponent that counts as resolved."""
LOST = 0.1
"""Mean relative round-off of a growth factor from which on it cannot be told from zero."""
LONGEST_INTERVAL = 256
"""Steps without a QR at most; an isometry would never ask for one."""

MEMORY = 0.99
"""How slowly a large stretch is forgotten, per QR: rates of single steps are larger than those of many together."""
MARGIN = 0.75
"""Share of the limit that intervals aim at; the next steps may stretch more than all those before."""

Move = Callable[[Array], Array]
"""Moves rows of tangents forward, or rows of cotangents back, by one step; (k, S) to (k, S)."""


class Block(NamedTuple):
    """The part of the state that a frame lives in.  Hashable."""

    layout: Layout
    chosen: tuple[bool, ...]
    """Which leaves; the others are held fixed."""

    @property
    def size(self) -> int:
        """Real entries, S."""
        return sum(size for size, is_in in zip(self.layout.sizes, self.chosen, strict=True) if is_in)

    def move(self, rows: Array, blocks_move: Callable[[Any], Any], dtype: np.dtype) -> Array:
        """Returns rows (k, S) moved by a map on one vector per leaf."""
        sizes = [size for size, is_in in zip(self.layout.sizes, self.chosen, strict=True) if is_in]
        parts = iter(jnp.split(rows.astype(dtype), np.cumsum(sizes)[:-1], axis=1))
        blocks = tuple(
            next(parts) if is_in else jnp.zeros((rows.shape[0], size), dtype)
            for size, is_in in zip(self.layout.sizes, self.chosen, strict=True)
        )
        moved = [block for block, is_in in zip(blocks_move(blocks), self.chosen, strict=True) if is_in]
        return jnp.concatenate(moved, axis=1).astype(rows.dtype)


def push_forward(cell: Cell, params: Params, state: State, x: Any, block: Block) -> tuple[State, Move]:
    """Returns the next state and the map of tangents from this one to it."""
    layout = block.layout

    def step(blocks):
        return layout.split(cell.step(params, layout.merge(blocks), x)[0])

    with jax.default_matmul_precision(MATMUL_PRECISION):
        new, push = jax.linearize(step, layout.split(state))
    return layout.merge(new), lambda rows: block.move(rows, jax.vmap(push), real_dtype(state))


def random_frame(key: Key[Array, ""], k: int, size: int, dtype: np.dtype) -> Float[Array, "k S"]:
    """Returns k orthonormal rows; the first of them are the same for every k."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(k))
    rows = jax.vmap(lambda key: jax.random.normal(key, (size,), dtype))(keys)
    return orthonormalise(rows).rows


# --- the spectrum ----------------------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "exponents",
        "stderr",
        "converged",
        "roundoff",
        "resolved",
        "block_exponents",
        "sum_rule_defect",
        "max_log_condition",
        "num_qr",
        "num_householder",
        "singular_step",
        "nonfinite_step",
    ],
    meta_fields=["size", "num_transient", "block_length", "direction", "block", "certificate"],
)
@dataclasses.dataclass(frozen=True)
class LyapunovSpectrum:
    """Lyapunov exponents with what is needed to believe them.  A pytree: vmap gives a batch of spectra."""

    exponents: Float[Array, "..."]
    """(k,) nats per step; −inf for a direction that is lost, NaN when the state became non-finite."""
    stderr: Float[Array, "..."]
    """(k,) standard error of the mean over blocks; NaN beside −inf."""
    converged: Bool[Array, "..."]
    """(k,) whether the two halves of the run agree within 2 standard errors of their difference.  By chance alone one
    exponent in twenty does not."""
    roundoff: Float[Array, "..."]
    """(k,) what rounding may have added, in nats per step: the mean of eps · ‖Y_j‖ / L_jj over QRs, per step."""
    resolved: Bool[Array, "..."]
    """(k,) whether ``roundoff`` is below 1e-2."""
    block_exponents: Float[Array, "..."]
    """(num_blocks, k) finite-time exponents: mean growth over each block of ``block_length`` steps, in the order in
    which they were computed."""
    sum_rule_defect: Float[Array, "..."]
    """Σλ − mean log|det J| over the steps at which log|det J| was taken; NaN unless all S exponents were asked for."""
    max_log_condition: Float[Array, "..."]
    """Largest log(L_11 / L_kk), over QRs after the transient: how much the frame had stretched."""
    num_qr: Int[Array, "..."]
    """QRs, transient included."""
    num_householder: Int[Array, "..."]
    """How many of them fell back to Householder QR."""
    singular_step: Int[Array, "..."]
    """First time step after which a direction had length exactly 0; −1 for none."""
    nonfinite_step: Int[Array, "..."]
    """First time step at which the state is not finite; −1 for none."""
    size: int
    """S, real entries of the state, or of the block."""
    num_transient: int
    """Steps left out at the start (for the adjoint also at the end), those that did not fill a block included."""
    block_length: int
    direction: str
    block: str | None
    certificate: Certificate

    @property
    def kaplan_yorke_dimension(self) -> Array:
        """J + (λ_1 + … + λ_j) / |λ_{j+1}| with the last j whose sum is not negative; S if all S are.

        NaN where the k exponents computed do not reach so far.
        """
        k = self.exponents.shape[-1]
        sums = jnp.cumsum(self.exponents, axis=-1)
        j = jnp.sum(sums >= 0, axis=-1)
        at = lambda values, index: jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
        total = jnp.where(j > 0, at(sums, jnp.maximum(j - 1, 0)), 0)
        following = jnp.abs(at(self.exponents, jnp.minimum(j, k - 1)))
        inside = j.astype(total.dtype) + total / jnp.where(following == 0, 1, following)
        beyond = float(k) if k == self.size else jnp.nan
        is_nan = jnp.any(jnp.isnan(self.exponents), axis=-1)
        return jnp.where(is_nan, jnp.nan, jnp.where(j == k, beyond, inside))

    @property
    def entropy_rate(self) -> Array:
        """Sum of the positive exponents in nats per step: Pesin's value, an upper bound in general.

        NaN where all k < S exponents computed are positive.
        """
        total = jnp.sum(jnp.maximum(self.exponents, 0), axis=-1)
        open_end = self.exponents[..., -1] > 0 if self.exponents.shape[-1] < self.size else False
        is_nan = jnp.any(jnp.isnan(self.exponents), axis=-1)
        return jnp.where(open_end | is_nan, jnp.nan, total)


class _Marks(NamedTuple):
    """What a step of the scan has to do."""

    slot: Int[Array, ""]
    """Block that its growth counts for; ``num_blocks`` for none."""
    ends: Bool[Array, ""]
    """A QR is due after it, whatever the interval."""
    is_checked: Bool[Array, ""]
    """log|det J| is taken."""


class _Plan(NamedTuple):
    """Static settings of a run."""

    k: int
    block: Block
    num_blocks: int
    block_length: int
    before: int
    """Steps left out before the first block, in the order of computing."""
    checked: int
    """Steps per block at which log|det J| is taken."""
    qr_interval: int | None

    def marks(self, order: Array) -> _Marks:
        """Returns what to do at step number ``order`` in the order of computing."""
        step = order - self.before
        slot = step // self.block_length
        inside = (slot >= 0) & (slot < self.num_blocks)
        position = step % self.block_length
        first_checked = self.block_length - self.checked
        # the growth of the checked steps is booked apart, so a QR stands before and after them
        ends = (position == self.block_length - 1) | ((position == first_checked - 1) & (self.checked > 0))
        return _Marks(jnp.where(inside, slot, self.num_blocks), ends, inside & (position >= first_checked))


class _Carry(NamedTuple):
    rows: Array
    """The frame, pushed ``since`` steps beyond its last QR."""
    since: Array
    interval: Array
    spread_rate: Array
    """Largest log(L_11 / L_kk) per step of the last QRs."""
    size_rate: Array
    """Largest |log L_jj| per step of the last QRs."""
    growth: Array
    """(num_blocks + 1, k) sum of log L_jj."""
    roundoff: Array
    lost: Array
    """Sum over QRs of the relative round-off of L_jj, at most 1 each."""
    max_log_condition: Array
    num_qr: Array
    num_measured: Array
    num_householder: Array
    singular_step: Array
    checked_growth: Array
    checked_log_det: Array


def _start(plan: _Plan, rows: Array) -> _Carry:
    zero = jnp.zeros((), rows.dtype)
    none = jnp.zeros((), jnp.int32)
    return _Carry(
        rows=rows,
        since=none,
        interval=none + (1 if plan.qr_interval is None else plan.qr_interval),
        spread_rate=zero,
        size_rate=zero,
        growth=jnp.zeros((plan.num_blocks + 1, plan.k), rows.dtype),
        roundoff=jnp.zeros(plan.k, rows.dtype),
        lost=jnp.zeros(plan.k, rows.dtype),
        max_log_condition=zero,
        num_qr=none,
        num_measured=none,
        num_householder=none,
        singular_step=none - 1,
        checked_growth=zero,
        checked_log_det=zero,
    )


def _after_qr(plan: _Plan, carry: _Carry, marks: _Marks, eps: float, step: Array) -> _Carry:
    """Makes the frame orthonormal and books the growth."""
    frame = orthonormalise(carry.rows)
    log_growth = frame.log_growth
    booked = marks.slot < plan.num_blocks
    counts = booked.astype(carry.rows.dtype)

    # measured with constants: nothing below is differentiated but the growth itself
    logs = jax.lax.stop_gradient(log_growth)
    is_zero = jnp.isneginf(logs)
    finite = jnp.where(is_zero, 0.0, logs)
    spread = jnp.max(finite) - jnp.min(finite)
    before = jax.lax.stop_gradient(carry.rows)
    length = jnp.sqrt(jnp.einsum("ks,ks->k", before, before, precision=jax.lax.Precision.HIGHEST))
    error = jnp.where(is_zero, 1.0, jnp.minimum(eps * length * jnp.exp(-finite), 1.0))

    interval, spread_rate, size_rate = carry.interval, carry.spread_rate, carry.size_rate
    if plan.qr_interval is None:
        per_step = carry.since.astype(spread.dtype)
        spread_rate = jnp.maximum(MEMORY * spread_rate, spread / per_step)
        size_rate = jnp.maximum(MEMORY * size_rate, jnp.max(jnp.abs(finite)) / per_step)
        # the condition number stays below 1/√eps, and squared lengths within the range of the dtype
        log_range = float(np.log(jnp.finfo(before.dtype).max)) / 4
        limit = -0.5 * MARGIN * float(np.log(eps))
        steps = jnp.minimum(limit / jnp.maximum(spread_rate, 1e-6), log_range / jnp.maximum(size_rate, 1e-6))
        at_most = jnp.minimum(2 * interval, LONGEST_INTERVAL)
        interval = jnp.minimum(jnp.floor(steps).astype(jnp.int32), at_most)
        interval = jnp.maximum(interval, 1)

    is_singular = jnp.any(is_zero) & (carry.singular_step < 0)
    total = jnp.sum(log_growth)
    return carry._replace(
        rows=frame.rows,
        since=jnp.zeros_like(carry.since),
        interval=interval,
        spread_rate=spread_rate,
        size_rate=size_rate,
        growth=carry.growth.at[marks.slot].add(log_growth),
        roundoff=carry.roundoff + counts * jnp.where(is_zero, 0.0, error),
        lost=carry.lost + counts * error,
        max_log_condition=jnp.where(booked, jnp.maximum(carry.max_log_condition, spread), carry.max_log_condition),
        num_qr=carry.num_qr + 1,
        num_measured=carry.num_measured + booked.astype(jnp.int32),
        num_householder=carry.num_householder + jax.lax.stop_gradient(frame.fell_back).astype(jnp.int32),
        singular_step=jnp.where(is_singular, step, carry.singular_step),
        checked_growth=carry.checked_growth + jnp.where(marks.is_checked, jax.lax.stop_gradient(total), 0.0),
    )


def _advance(plan: _Plan, carry: _Carry, move: Move, marks: _Marks, eps: float, step: Array) -> _Carry:
    """Moves the frame by one step, and makes it orthonormal where that is due."""
    if plan.checked:

        def log_det():
            jacobian = move(jnp.eye(plan.block.size, dtype=carry.rows.dtype))
            return jax.lax.stop_gradient(jnp.linalg.slogdet(jacobian).logabsdet)

        checked = jax.lax.cond(marks.is_checked, log_det, lambda: jnp.zeros((), carry.rows.dtype))
        carry = carry._replace(checked_log_det=carry.checked_log_det + checked)
    carry = carry._replace(rows=move(carry.rows), since=carry.since + 1)
    if plan.qr_interval == 1:
        return _after_qr(plan, carry, marks, eps, step)
    is_due = marks.ends | (carry.since >= carry.interval)
    return jax.lax.cond(is_due, lambda: _after_qr(plan, carry, marks, eps, step), lambda: carry)


@functools.partial(jax.jit, static_argnames=("cell", "plan", "direction"))
def _spectrum(cell, params, state, xs, key, *, plan, direction):
    dtype = at_least_float32(real_dtype(state))
    eps = float(jnp.finfo(real_dtype(state)).eps)
    carry = _start(plan, random_frame(key, plan.k, plan.block.size, dtype))
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    steps = jnp.arange(num_steps, dtype=jnp.int32)

    def is_bad(state):
        leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]
        return ~functools.reduce(jnp.logical_and, leaves)

    # the state is followed through the first non-finite one only, so that one flag per step is all that is kept
    if direction == "forward":

        def forward(both, inputs):
            state, carry = both
            x, step = inputs
            new, push = push_forward(cell, params, state, x, plan.block)
            return (new, _advance(plan, carry, push, plan.marks(step), eps, step)), is_bad(state)

        (final, carry), bad = jax.lax.scan(forward, (state, carry), (xs, steps))
    else:
        run = run_forward(cell, params, state, xs)

        def back(carry, inputs):
            point, step = inputs
            marks = plan.marks(num_steps - 1 - step)
            pull = step_pulls(cell, params, point, plan.block.layout).full
            pull_rows = lambda rows: plan.block.move(rows, pull, real_dtype(state))
            return _advance(plan, carry, pull_rows, marks, eps, step), is_bad(point.state)

        carry, bad = jax.lax.scan(back, carry, (run.points, steps), reverse=True)
        final = run.final
    bad = jnp.append(bad, is_bad(final))
    nonfinite_step = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
    return _result(plan, carry, nonfinite_step)


def _result(plan: _Plan, carry: _Carry, nonfinite_step: Array) -> dict[str, Array]:
    """Returns the data fields of the spectrum from the sums of a run."""
    num_steps = plan.num_blocks * plan.block_length
    block_exponents = carry.growth[:-1] / plan.block_length
    exponents = jnp.mean(block_exponents, axis=0)
    is_lost = carry.lost > LOST * carry.num_measured.astype(carry.lost.dtype)
    exponents = jnp.where(is_lost, -jnp.inf, exponents)
    has_value = jnp.isfinite(exponents)
    shown = jnp.where(has_value[None], block_exponents, 0.0)
    stderr = jnp.std(shown, axis=0, ddof=1) / plan.num_blocks**0.5
    half = plan.num_blocks // 2
    apart = jnp.abs(jnp.mean(shown[:half], axis=0) - jnp.mean(shown[-half:], axis=0))
    # the mean of half the blocks has √2 times the standard error, the difference of two 2 times; equal blocks agree to
    # rounding
    rounding = 8 * jnp.finfo(exponents.dtype).eps * (1 + jnp.max(jnp.abs(shown), axis=0))
    converged = has_value & (apart <= 2 * (2 * stderr) + rounding)
    roundoff = carry.roundoff / num_steps
    if plan.checked:
        both_lost = jnp.isneginf(carry.checked_growth) & jnp.isneginf(carry.checked_log_det)
        defect = jnp.where(both_lost, 0.0, carry.checked_growth - carry.checked_log_det)
        defect = defect / (plan.checked * plan.num_blocks)
    else:
        defect = jnp.full((), jnp.nan, exponents.dtype)
    is_broken = nonfinite_step >= 0
    poison = lambda values: jnp.where(is_broken, jnp.nan, values)
    return {
        "exponents": poison(exponents),
        "stderr": poison(jnp.where(has_value, stderr, jnp.nan)),
        "converged": converged & ~is_broken,
        "roundoff": poison(jnp.where(has_value, roundoff, jnp.inf)),
        "resolved": has_value & (roundoff <= RESOLVED) & ~is_broken,
        "block_exponents": poison(block_exponents),
        "sum_rule_defect": poison(defect),
        "max_log_condition": carry.max_log_condition,
        "num_qr": carry.num_qr,
        "num_householder": carry.num_householder,
        "singular_step": carry.singular_step,
        "nonfinite_step": nonfinite_step,
    }


def lyapunov_spectrum(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    k: int | None = None,
    direction: str = "forward",
    block: str | None = None,
    num_transient: int = 0,
    num_blocks: int = 32,
    qr_interval: int | None = None,
    num_determinants: int | None = 1,
    key: Key[Array, ""] | None = None,
) -> LyapunovSpectrum:
    """Returns the k largest Lyapunov exponents along a run, in nats per step, with their errors.

    With ``k=1`` one tangent is pushed along, which costs about as much as the forward pass.  For a batch of initial
    states or sequences use ``jax.vmap``; both branches of every check then run, so that a batch costs more than its
    members one by one.  Differentiable in params, state and xs, for short runs: the derivative of a chaotic run grows
    with its length.

    Args:
      cell: the cell, or ``rg.map_cell`` of any map; an autonomous one takes ``xs = jnp.zeros((T, 0))``.
      params: its parameters.
      state: s_0, one sequence.
      xs: inputs, shape (T, D).
      k: how many exponents; None for all S of the state.
      direction: ``"forward"`` (tangents) or ``"adjoint"`` (cotangents, from the last step to the first).
      block: a field of the state, to follow perturbations of it alone with every other field held fixed.  That is the
        spectrum of the diagonal block ∂s'_b/∂s_b, not of the cell.
      num_transient: steps to leave out while the state and the frame settle; the adjoint leaves them out at both ends.
      num_blocks: blocks for the standard errors, at least 2.  Longer than the memory of the run is long enough.
      qr_interval: steps between QRs; None to choose by measured growth.
      num_determinants: steps per block at which log|det J| is computed for the sum rule, None for all of them, 0 for
        none.  Only a full spectrum has a sum rule.
      key: of the random initial frame; the same one every time by default.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them; k, num_blocks, num_transient, qr_interval or
        num_determinants out of range; fewer steps after the transient than blocks; unknown block or direction.

    References: Benettin et al. 1980; Geist et al. 1990, section 3; see the module docstring.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> cat = rg.map_cell(lambda s, x: jnp.array([[2.0, 1.0], [1.0, 1.0]]) @ s % 1.0)
    >>> spectrum = rg.lyapunov_spectrum(cat, None, jnp.array([0.1, 0.2]), jnp.zeros((400, 0)), num_transient=40)
    >>> print(spectrum.exponents.round(4))
    [ 0.9624 -0.9624]
    """
    num_steps = check_inputs(cell, params, state, xs, one_sequence=True)
    check_finite(params, state, xs)
    layout = layout_of(state)
    within = Block(layout, layout.block(block))
    k = within.size if k is None else k
    if not 1 <= k <= within.size:
        raise ValueError(f"k: expected 1 to {within.size}, the real entries of the state, found {k}")
    if direction not in ("forward", "adjoint"):
        raise ValueError(f"unknown direction {direction!r}; expected 'forward' or 'adjoint'")
    for name, value, least in (
        ("num_transient", num_transient, 0),
        ("num_blocks", num_blocks, 2),
        ("qr_interval", 1 if qr_interval is None else qr_interval, 1),
        ("num_determinants", 0 if num_determinants is None else num_determinants, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
    dropped = num_transient * (2 if direction == "adjoint" else 1)
    block_length = (num_steps - dropped) // num_blocks
    if block_length < 1:
        raise ValueError(
            f"expected at least {num_blocks} steps after the transient, one for each block of the standard error, "
            f"found {num_steps - dropped}: run longer, or ask for fewer with num_blocks= (at least 2)"
        )
    # what does not fill a block is left out with the transient
    before = num_steps - num_blocks * block_length - (num_transient if direction == "adjoint" else 0)
    checked = block_length if num_determinants is None else min(num_determinants, block_length)
    plan = _Plan(
        k=k,
        block=within,
        num_blocks=num_blocks,
        block_length=block_length,
        before=before,
        checked=checked if k == within.size else 0,
        qr_interval=qr_interval,
    )
    key = jax.random.key(0) if key is None else key
    data = _spectrum(cell, params, state, xs, key, plan=plan, direction=direction)
    return LyapunovSpectrum(
        **data,
        size=within.size,
        num_transient=before,
        block_length=block_length,
        direction=direction,
        block=block,
        certificate=certificate(real_dtype(state)),
    )


# --- covariant vectors -----------------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["exponents", "growth", "vectors"],
    meta_fields=["first_step", "certificate"],
)
@dataclasses.dataclass(frozen=True)
class CovariantVectors:
    """Covariant Lyapunov vectors along a stretch of a run: each is moved by J onto its own next one."""

    exponents: Float[Array, "..."]
    """(k,) mean of ``growth``, nats per step."""
    growth: Float[Array, "..."]
    """(W, k) log ‖J_t v_j(t)‖: how much each vector is stretched by the step that starts there."""
    vectors: Float[Array, "..."]
    """(W, k, S) unit vectors, one per row, at s_t for t = ``first_step`` …; coordinates in the order of the state's
    leaves, a complex leaf as Re then Im.  Their sign means nothing."""
    first_step: int
    certificate: Certificate

    def angle(self, split: int) -> Float[Array, "..."]:
        """Returns (W,) the smallest angle, in radians, between the span of the first ``split`` vectors and the rest.

        Near 0 the fast and the slow directions almost touch; a run that keeps away from 0 is hyperbolic.

        Raises:
          ValueError: ``split`` not from 1 to k − 1.
        """
        k = self.vectors.shape[-2]
        if not 1 <= split < k:
            raise ValueError(f"split: expected 1 to {k - 1}, found {split}")
        first, second = (
            jnp.linalg.qr(jnp.swapaxes(part, -1, -2))[0]
            for part in (self.vectors[..., :split, :], self.vectors[..., split:, :])
        )
        # the sine from what the projection leaves: a cosine near 1 has no digits left for a small angle
        few, many = (first, second) if split <= k - split else (second, first)
        inside = jnp.matmul(jnp.swapaxes(many, -1, -2), few, precision=jax.lax.Precision.HIGHEST)
        outside = few - jnp.matmul(many, inside, precision=jax.lax.Precision.HIGHEST)
        sine = jnp.linalg.svd(outside, compute_uv=False)[..., -1]
        cosine = jnp.linalg.svd(inside, compute_uv=False)[..., 0]
        return jnp.arctan2(sine, cosine)


@functools.partial(jax.jit, static_argnames=("cell", "k", "block", "window"))
def _covariant(cell, params, state, xs, key, *, k, block, window):
    dtype = at_least_float32(real_dtype(state))
    key_frame, key_mix = jax.random.split(key)

    def forward(carry, x):
        state, rows = carry
        new, push = push_forward(cell, params, state, x, block)
        moved = push(rows)
        frame = orthonormalise(moved).rows
        triangle = jnp.tril(jnp.matmul(moved, frame.T, precision=jax.lax.Precision.HIGHEST))
        return (new, frame), (rows, triangle)

    start = (state, random_frame(key_frame, k, block.size, dtype))
    first, last = window
    cut = lambda a, b: jax.tree.map(lambda leaf: leaf[a:b], xs)
    # before the window the triangles are not needed, after it the frames are not
    carry, _ = jax.lax.scan(lambda c, x: (forward(c, x)[0], None), start, cut(None, first))
    carry, (frames, triangles) = jax.lax.scan(forward, carry, cut(first, last))
    _, later = jax.lax.scan(lambda c, x: (lambda c, kept: (c, kept[1]))(*forward(c, x)), carry, cut(last, None))

    def back(mix, triangle):
        # rows of C: C_t L = (growth) C_{t+1}, so C_t = C_{t+1} L⁻¹, normalised
        solved = jax.lax.linalg.triangular_solve(triangle, mix, left_side=False, lower=True)
        length = jnp.sqrt(jnp.einsum("ij,ij->i", solved, solved, precision=jax.lax.Precision.HIGHEST))
        return solved / length[:, None], -jnp.log(length)

    mix = jnp.tril(jax.random.normal(key_mix, (k, k), dtype))
    mix = mix / jnp.linalg.norm(mix, axis=1, keepdims=True)
    mix, _ = jax.lax.scan(lambda c, t: (back(c, t)[0], None), mix, later, reverse=True)

    def keep(mix, triangle):
        mix, growth = back(mix, triangle)
        return mix, (mix, growth)

    _, (mixes, growth) = jax.lax.scan(keep, mix, triangles, reverse=True)
    vectors = jnp.matmul(mixes, frames, precision=jax.lax.Precision.HIGHEST)
    return jnp.mean(growth, axis=0), growth, vectors


def covariant_vectors(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    k: int | None = None,
    num_transient: int = 100,
    key: Key[Array, ""] | None = None,
) -> CovariantVectors:
    """Returns the first k covariant Lyapunov vectors, by Ginelli's method.

    The frames of a forward run give the nested fast subspaces, the triangles run backward give the vectors in them.
    Both take a while to settle, so ``num_transient`` steps are left out at either end.  Memory: (T − num_transient)
    triangles (k, k) and as many frames (k, S) as the window has steps.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence.
      xs: inputs, shape (T, D).
      k: how many vectors; None for all S.
      num_transient: steps left out at the start and at the end.
      key: of the initial frame and of the initial mixture; the same one every time by default.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them, k out of range, or no step left between the transients.

    Reference: Ginelli et al. 2007, PRL 99, 130601, eqs. 2 and 3.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> cat = rg.map_cell(lambda s, x: jnp.array([[2.0, 1.0], [1.0, 1.0]]) @ s % 1.0)
    >>> vectors = rg.covariant_vectors(cat, None, jnp.array([0.1, 0.2]), jnp.zeros((99, 0)), num_transient=40)
    >>> print(vectors.angle(1)[0].round(4))  # symmetric matrix: orthogonal eigenvectors
    1.5708
    """
    num_steps = check_inputs(cell, params, state, xs, one_sequence=True)
    check_finite(params, state, xs)
    layout = layout_of(state)
    block = Block(layout, layout.block(None))
    k = block.size if k is None else k
    if not 1 <= k <= block.size:
        raise ValueError(f"k: expected 1 to {block.size}, the real entries of the state, found {k}")
    if not 0 <= num_transient < num_steps / 2:
        raise ValueError(
            f"num_transient: expected fewer than half of the {num_steps} steps, since it is left out at both ends, "
            f"found {num_transient}"
        )
    key = jax.random.key(0) if key is None else key
    window = (num_transient, num_steps - num_transient)
    exponents, growth, vectors = _covariant(cell, params, state, xs, key, k=k, block=block, window=window)
    return CovariantVectors(exponents, growth, vectors, num_transient, certificate(real_dtype(state)))
