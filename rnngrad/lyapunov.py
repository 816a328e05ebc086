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
builds up is to stay below 1/√eps.  What the past does not foretell is found at the next QR, at most 32 steps later:
the steps since the last one known to be good are then done again with a QR at each.

*What can still be wrong is reported.*  Every QR says how its rounding moves each log L_jj (``log_stretch`` of
:mod:`rnngrad.orthonormal`); ``roundoff`` is the mean of that.  A growth that is lost in round-off altogether makes its
exponent not ``resolved``, and an exponent that is lost as a rule is −inf, since a singular step looks the same.
Standard errors come from block means, ``converged`` compares the halves of the run, and ``sum_rule_defect`` compares
Σ log L_jj over QR intervals with log|det J| by LU, which shares nothing with the QR.  Sums are compensated.

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
from rnngrad.orthonormal import orthonormalise, product, row_lengths
from rnngrad.retention import Certificate, certificate
from rnngrad.types import Cell, Params, State, check_finite, check_inputs
from rnngrad.unroll import run_forward, state_is_finite

RESOLVED = 1e-2
"""Largest round-off, in nats per step, of an exponent that counts as resolved."""
LOST = 0.5
"""Relative round-off of a growth factor from which on nothing is known of it."""
LOST_AS_A_RULE = 0.1
"""Share of QRs from which on an exponent that is lost in them is −inf."""
LONGEST_INTERVAL = 32
"""Steps without a QR at most, and steps that are done again together."""
MEMORY = 0.99
"""How slowly a large stretch is forgotten, per QR: rates of single steps are larger than those of many together."""
MARGIN = 0.75
"""Share of the limit that intervals aim at; the next steps may stretch more than all those before."""
SMALLEST_SAMPLE = 8
"""Blocks below which halves are not compared: two of either half would agree whatever they are."""

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
    blocks = layout.split(state)
    # the state moves at the user's precision, as `unroll` moves it; only tangents ask for the highest
    z = cell.preactivate(params, state, x)
    new, _ = cell.update(params, z, state)

    def preactivate(blocks):
        return cell.preactivate(params, layout.merge(blocks), x)

    def update(z, blocks):
        return layout.split(cell.update(params, z, layout.merge(blocks))[0])

    with jax.default_matmul_precision(MATMUL_PRECISION):
        _, push_preactivate = jax.linearize(preactivate, blocks)
        _, push_update = jax.linearize(update, z, blocks)
    push = jax.vmap(lambda tangent: push_update(push_preactivate(tangent), tangent))
    return new, lambda rows: block.move(rows, push, real_dtype(state))


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
    """(k,) nats per step, in the order of the frame's rows, which is descending once the run is long enough to sort
    them; −inf for a direction that is lost, NaN when the state or its derivative became non-finite."""
    stderr: Float[Array, "..."]
    """(k,) standard error of the mean over blocks; NaN beside −inf."""
    converged: Bool[Array, "..."]
    """(k,) whether the two halves of the run agree within 2 standard errors of their difference, each half by its own
    scatter.  By chance alone one exponent in twenty does not.  False for fewer than 8 blocks, which cannot tell."""
    roundoff: Float[Array, "..."]
    """(k,) what rounding may have added, in nats per step; inf where a QR had lost the growth altogether."""
    resolved: Bool[Array, "..."]
    """(k,) whether ``roundoff`` is at most 1e-2 and the sum rule, where it was asked, holds to 1e-2.  Exponents of
    strongly non-normal matrices answer to perturbations of size eps; of that only the sum rule knows."""
    block_exponents: Float[Array, "..."]
    """(num_blocks, k) finite-time exponents: mean growth over each block of ``block_length`` steps, in the order in
    which they were computed."""
    sum_rule_defect: Float[Array, "..."]
    """Σλ − mean log|det J| over the QR intervals in which log|det J| was taken; NaN unless all S exponents were asked
    for, and where a step is singular.  LU loses an ill-conditioned determinant as QR loses the last growth: a defect
    says that one of them is wrong."""
    max_log_condition: Float[Array, "..."]
    """Logarithm of the largest condition number that had built up at a QR after the transient."""
    num_qr: Int[Array, "..."]
    """QRs, transient included; those of steps that were done again count once."""
    num_householder: Int[Array, "..."]
    """How many of them fell back to Householder QR."""
    singular_step: Int[Array, "..."]
    """Time step of the first QR, in the order of computing, that found a direction of length exactly 0; −1 for none.
    The singular step lies in the interval that ends there."""
    nonfinite_step: Int[Array, "..."]
    """First time step at which the state is not finite; −1 for none."""
    size: int
    """S, real entries of the state, or of the block."""
    num_transient: int
    """Steps left out before the first block in the order of computing, those that did not fill a block included; the
    adjoint leaves out what was asked for at the other end as well."""
    block_length: int
    direction: str
    block: str | None
    certificate: Certificate

    @property
    def kaplan_yorke_dimension(self) -> Array:
        """J + (λ_1 + … + λ_j) / |λ_{j+1}| with the last j whose sum is not negative; S if all S are.

        NaN where the k exponents computed do not reach so far.  It jumps where a sum passes zero, as that of exponents
        that are all 0 may: sums within their round-off count as not negative.
        """
        k = self.exponents.shape[-1]
        exponents = -jnp.sort(-self.exponents, axis=-1)
        # a sum of zeros is not negative because of its rounding
        rounding = jnp.cumsum(jnp.where(jnp.isfinite(self.roundoff), self.roundoff, 0), axis=-1)
        sums = jnp.cumsum(exponents, axis=-1)
        j = jnp.sum(sums >= -rounding, axis=-1)
        at = lambda values, index: jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
        total = jnp.where(j > 0, at(sums, jnp.maximum(j - 1, 0)), 0)
        following = jnp.abs(at(exponents, jnp.minimum(j, k - 1)))
        inside = j.astype(total.dtype) + jnp.maximum(total, 0) / jnp.where(following == 0, 1, following)
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


class _Plan(NamedTuple):
    """Static settings of a run; steps are numbered in the order of computing."""

    k: int
    block: Block
    num_steps: int
    num_blocks: int
    block_length: int
    before: int
    """Steps left out before the first block."""
    check_stride: int
    """log|det J| is taken in every so-many-th block, over its first QR interval; 0 for none."""
    check_all: bool
    """log|det J| is taken everywhere."""
    qr_interval: int | None

    @property
    def head(self) -> int:
        """Steps with a QR at each before the interval is chosen freely; those after it fill chunks."""
        return min(self.num_steps, LONGEST_INTERVAL + self.num_steps % LONGEST_INTERVAL)


class _Marks(NamedTuple):
    """What a step of the scan has to do."""

    slot: Int[Array, ""]
    """Block that its growth counts for; ``num_blocks`` for none."""
    is_end: Bool[Array, ""]
    """A QR is due after it, whatever the interval."""
    may_check: Bool[Array, ""]
    """Its block is one of those in which log|det J| is taken."""
    ends_block: Bool[Array, ""]


def _marks(plan: _Plan, order: Array) -> _Marks:
    step = order - plan.before
    slot = step // plan.block_length
    inside = (slot >= 0) & (slot < plan.num_blocks)
    ends_block = step % plan.block_length == plan.block_length - 1
    ends_chunk = (order - plan.head) % LONGEST_INTERVAL == LONGEST_INTERVAL - 1
    may_check = inside & (slot % max(plan.check_stride, 1) == 0) & (plan.check_stride > 0)
    return _Marks(
        slot=jnp.where(inside, slot, plan.num_blocks),
        is_end=ends_block | (ends_chunk if plan.qr_interval is None else False),
        may_check=may_check | (inside & plan.check_all),
        ends_block=ends_block,
    )


class _Carry(NamedTuple):
    rows: Array
    """The frame, moved ``since`` steps beyond its last QR."""
    since: Array
    interval: Array
    stretch_rate: Array
    """Largest log condition number per step of the last QRs."""
    size_rate: Array
    """Largest |log L_jj| per step of the last QRs."""
    growth: Array
    """(num_blocks + 1, k) sum of log L_jj, and what its rounding lost."""
    growth_rest: Array
    roundoff: Array
    lost: Array
    """(k,) number of QRs that had lost the growth."""
    max_log_condition: Array
    num_qr: Array
    num_measured: Array
    num_householder: Array
    singular_step: Array
    overstretched: Array
    """Whether an interval of several steps has gone beyond the limit: they have to be done again."""
    num_in_block: Array
    """QRs so far in this block."""
    log_det: Array
    """Sum of log|det J| since the last QR, where it is taken."""
    defect: Array
    num_checked: Array


def _start(plan: _Plan, rows: Array) -> _Carry:
    zero, none = jnp.zeros((), rows.dtype), jnp.zeros((), jnp.int32)
    blocks, each = jnp.zeros((plan.num_blocks + 1, plan.k), rows.dtype), jnp.zeros(plan.k, rows.dtype)
    return _Carry(
        rows=rows,
        since=none,
        interval=none + (1 if plan.qr_interval is None else plan.qr_interval),
        stretch_rate=zero,
        size_rate=zero,
        growth=blocks,
        growth_rest=blocks,
        roundoff=each,
        lost=each,
        max_log_condition=zero,
        num_qr=none,
        num_measured=none,
        num_householder=none,
        singular_step=none - 1,
        overstretched=jnp.zeros((), bool),
        num_in_block=none,
        log_det=zero,
        defect=zero,
        num_checked=none,
    )


def _after_qr(plan: _Plan, carry: _Carry, marks: _Marks, is_checked: Array, eps: float, step: Array) -> _Carry:
    """Makes the frame orthonormal and books the growth."""
    frame = orthonormalise(carry.rows)
    log_growth = frame.log_growth
    booked = marks.slot < plan.num_blocks

    # Neumaier's compensated sum: a plain one in float32 drifts by 1e-3 per step over a million steps
    before = carry.growth[marks.slot]
    after = before + log_growth
    larger_first = jnp.abs(before) >= jnp.abs(log_growth)
    rest = jnp.where(larger_first, (before - after) + log_growth, (log_growth - after) + before)
    rest = jnp.where(jnp.isfinite(after), rest, 0)

    # nothing below is differentiated
    logs, log_stretch = jax.lax.stop_gradient((log_growth, frame.log_stretch))
    is_zero = jnp.isneginf(logs)
    error = eps * jnp.exp(jnp.minimum(log_stretch, -float(np.log(eps))))
    is_lost = ~(error < LOST)
    counts = booked.astype(logs.dtype)

    log_condition = jnp.max(jnp.where(is_zero, 0, log_stretch))
    limit = -0.5 * float(np.log(eps))
    interval, stretch_rate, size_rate = carry.interval, carry.stretch_rate, carry.size_rate
    overstretched = carry.overstretched
    if plan.qr_interval is None:
        # a NaN, of rows that left the range of the dtype on the way, is beyond any limit
        overstretched = overstretched | ((carry.since > 1) & ~(log_condition <= limit))
        per_step = carry.since.astype(logs.dtype)
        stretch_rate = jnp.fmax(MEMORY * stretch_rate, log_condition / per_step)
        size_rate = jnp.fmax(MEMORY * size_rate, jnp.max(jnp.where(is_zero, 0, jnp.abs(logs))) / per_step)
        # rows stay within the range of the dtype until the next QR
        log_range = float(np.log(jnp.finfo(logs.dtype).max)) / 4
        steps = jnp.minimum(MARGIN * limit / jnp.maximum(stretch_rate, 1e-6), log_range / jnp.maximum(size_rate, 1e-6))
        at_most = jnp.minimum(2 * interval, LONGEST_INTERVAL)
        interval = jnp.maximum(jnp.minimum(jnp.floor(steps).astype(jnp.int32), at_most), 1)

    is_first_singular = jnp.any(is_zero) & (carry.singular_step < 0)
    checked = is_checked.astype(logs.dtype)
    return carry._replace(
        rows=frame.rows,
        since=jnp.zeros_like(carry.since),
        interval=interval,
        stretch_rate=stretch_rate,
        size_rate=size_rate,
        growth=carry.growth.at[marks.slot].set(after),
        growth_rest=carry.growth_rest.at[marks.slot].add(rest),
        # a relative error e of L_jj moves its logarithm by −log(1 − e) at most
        roundoff=carry.roundoff - counts * jnp.where(is_lost, 0, jnp.log1p(-jnp.where(is_lost, 0, error))),
        lost=carry.lost + counts * is_lost.astype(logs.dtype),
        max_log_condition=jnp.where(booked, jnp.fmax(carry.max_log_condition, log_condition), carry.max_log_condition),
        num_qr=carry.num_qr + 1,
        num_measured=carry.num_measured + booked.astype(jnp.int32),
        num_householder=carry.num_householder + jax.lax.stop_gradient(frame.fell_back).astype(jnp.int32),
        singular_step=jnp.where(is_first_singular, step, carry.singular_step),
        overstretched=overstretched,
        num_in_block=jnp.where(marks.ends_block, 0, carry.num_in_block + 1),
        log_det=jnp.zeros_like(carry.log_det),
        defect=carry.defect + jnp.where(is_checked, jnp.sum(logs) - carry.log_det, 0) * checked,
        num_checked=carry.num_checked + jnp.where(is_checked, carry.since, 0),
    )


def _advance(
    plan: _Plan, carry: _Carry, move: Move, eps: float, step: Array, order: Array, at_every_step: Array
) -> _Carry:
    """Moves the frame by one step, and makes it orthonormal where that is due."""
    marks = _marks(plan, order)
    is_checked = marks.may_check & (plan.check_all | (carry.num_in_block == 0))
    if plan.check_stride or plan.check_all:

        def log_det():
            jacobian = move(jnp.eye(plan.block.size, dtype=carry.rows.dtype))
            return jax.lax.stop_gradient(jnp.linalg.slogdet(jacobian).logabsdet)

        found = jax.lax.cond(is_checked, log_det, lambda: jnp.zeros((), carry.rows.dtype))
        carry = carry._replace(log_det=carry.log_det + found)
    carry = carry._replace(rows=move(carry.rows), since=carry.since + 1)
    if plan.qr_interval == 1:
        return _after_qr(plan, carry, marks, is_checked, eps, step)
    is_due = marks.is_end | (carry.since >= carry.interval) | at_every_step
    return jax.lax.cond(is_due, lambda: _after_qr(plan, carry, marks, is_checked, eps, step), lambda: carry)


def _scan(plan: _Plan, advance: Callable[..., Any], both: Any, inputs: Any, *, reverse: bool) -> tuple[Any, Array]:
    """Scans ``advance(both, input, at_every_step)``; both = (state or None, carry), and a flag per step comes back.

    With an interval to choose: first ``head`` steps with a QR at each, then chunks, each ended by a QR.  A chunk in
    which an interval turns out to have been too long is done again with a QR at every step.
    """

    def steps(both, inputs, at_every_step):
        return jax.lax.scan(lambda b, i: advance(b, i, at_every_step), both, inputs, reverse=reverse)

    if plan.qr_interval is not None:
        return steps(both, inputs, jnp.array(False))
    num_steps, head = plan.num_steps, plan.head
    first = slice(num_steps - head, None) if reverse else slice(None, head)
    others = slice(None, num_steps - head) if reverse else slice(head, None)
    both, flags = steps(both, jax.tree.map(lambda leaf: leaf[first], inputs), jnp.array(True))
    if head == num_steps:
        return both, flags
    num_chunks = (num_steps - head) // LONGEST_INTERVAL
    chunks = jax.tree.map(lambda leaf: leaf[others].reshape(num_chunks, LONGEST_INTERVAL, *leaf.shape[1:]), inputs)

    def chunk(both, inputs):
        def attempt(last, index):
            def go():
                return steps((both[0], both[1]._replace(overstretched=jnp.array(False))), inputs, index > 0)

            return jax.lax.cond((index == 0) | last[0][1].overstretched, go, lambda: last), None

        nothing = (both, jnp.zeros(LONGEST_INTERVAL, bool))
        return jax.lax.scan(attempt, nothing, jnp.arange(2))[0]

    both, more = jax.lax.scan(chunk, both, chunks, reverse=reverse)
    pieces = [more.reshape(-1), flags] if reverse else [flags, more.reshape(-1)]
    return both, jnp.concatenate(pieces)


@functools.partial(jax.jit, static_argnames=("cell", "plan", "direction"))
def _spectrum(cell, params, state, xs, key, *, plan, direction):
    dtype = at_least_float32(real_dtype(state))
    eps = float(jnp.finfo(real_dtype(state)).eps)
    carry = _start(plan, random_frame(key, plan.k, plan.block.size, dtype))
    steps = jnp.arange(plan.num_steps, dtype=jnp.int32)

    def is_bad(state):
        leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]
        return ~functools.reduce(jnp.logical_and, leaves)

    if direction == "forward":

        def forward(both, inputs, at_every_step):
            state, carry = both
            x, step = inputs
            new, push = push_forward(cell, params, state, x, plan.block)
            return (new, _advance(plan, carry, push, eps, step, step, at_every_step)), is_bad(state)

        (final, carry), bad = _scan(plan, forward, (state, carry), (xs, steps), reverse=False)
    else:
        run = run_forward(cell, params, state, xs)

        def back(both, inputs, at_every_step):
            point, step = inputs
            pull = step_pulls(cell, params, point, plan.block.layout).full
            pull_rows = lambda rows: plan.block.move(rows, pull, real_dtype(state))
            order = plan.num_steps - 1 - step
            return (None, _advance(plan, both[1], pull_rows, eps, step, order, at_every_step)), is_bad(point.state)

        (_, carry), bad = _scan(plan, back, (None, carry), (run.points, steps), reverse=True)
        final = run.final
    bad = jnp.append(bad, is_bad(final))
    nonfinite_step = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
    return _result(plan, carry, nonfinite_step)


def _standard_error(blocks: Array) -> Array:
    """Returns the standard error of the mean over the first axis; its derivative at equal blocks is 0, not NaN."""
    variance = jnp.var(blocks, axis=0, ddof=1) / blocks.shape[0]
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def _result(plan: _Plan, carry: _Carry, nonfinite_step: Array) -> dict[str, Array]:
    """Returns the data fields of the spectrum from the sums of a run."""
    block_exponents = (carry.growth[:-1] + carry.growth_rest[:-1]) / plan.block_length
    exponents = jnp.mean(block_exponents, axis=0)
    is_lost = carry.lost > LOST_AS_A_RULE * carry.num_measured.astype(carry.lost.dtype)
    exponents = jnp.where(is_lost & ~jnp.isnan(exponents), -jnp.inf, exponents)
    has_value = jnp.isfinite(exponents)
    shown = jnp.where(has_value[None], block_exponents, 0)
    if plan.num_blocks < SMALLEST_SAMPLE:
        converged = jnp.zeros(plan.k, bool)
    else:
        halves = [shown[: plan.num_blocks // 2], shown[plan.num_blocks // 2 :]]
        apart = jnp.abs(jnp.mean(halves[0], axis=0) - jnp.mean(halves[1], axis=0))
        error = jnp.hypot(*map(_standard_error, halves))
        # halves that are equal but for rounding agree
        rounding = 8 * jnp.finfo(exponents.dtype).eps * (1 + jnp.max(jnp.abs(shown), axis=0))
        converged = has_value & (apart <= 2 * error + rounding)
    roundoff = carry.roundoff / (plan.num_blocks * plan.block_length)
    roundoff = jnp.where(has_value & (carry.lost == 0), roundoff, jnp.inf)
    defect = carry.defect / carry.num_checked.astype(carry.defect.dtype)
    sum_rule_fails = jnp.isfinite(defect) & (jnp.abs(defect) > RESOLVED)
    is_broken = nonfinite_step >= 0
    poison = lambda values: jnp.where(is_broken, jnp.nan, values)
    return {
        "exponents": poison(exponents),
        "stderr": poison(jnp.where(has_value, _standard_error(shown), jnp.nan)),
        "converged": converged & ~is_broken,
        "roundoff": poison(roundoff),
        "resolved": has_value & (roundoff <= RESOLVED) & ~sum_rule_fails & ~is_broken,
        "block_exponents": poison(block_exponents),
        "sum_rule_defect": poison(jnp.where(jnp.isfinite(defect), defect, jnp.nan)),
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
    num_determinants: int | None = 4,
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
      qr_interval: steps between QRs, each block being ended by one; None to choose by measured growth.
      num_determinants: QR intervals, spread over the run, in which log|det J| is computed for the sum rule; None for
        all of them, 0 for none.  Only a full spectrum has a sum rule.
      key: of the random initial frame; the same one every time by default.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them; k, num_blocks, num_transient, qr_interval or
        num_determinants out of range; fewer steps after the transient than blocks; unknown block or direction.

    References: Benettin et al. 1980; Geist et al. 1990, section 3; see the module docstring.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> cat = rg.map_cell(lambda s, x: jnp.array([[2.0, 1.0], [1.0, 1.0]]) @ s % 1.0)
    >>> spectrum = rg.lyapunov_spectrum(cat, None, jnp.array([0.1, 0.2]), jnp.zeros((400, 0)), num_transient=40)
    >>> [round(float(exponent), 4) for exponent in spectrum.exponents]
    [0.9624, -0.9624]
    """
    num_steps = check_inputs(cell, params, state, xs, one_sequence=True)
    check_finite(params, state, xs)
    layout = layout_of(state)
    within = Block(layout, layout.block(block))
    k = within.size if k is None else k
    if direction not in ("forward", "adjoint"):
        raise ValueError(f"unknown direction {direction!r}; expected 'forward' or 'adjoint'")
    options: tuple[tuple[str, Any, int], ...] = (
        ("k", k, 1),
        ("num_transient", num_transient, 0),
        ("num_blocks", num_blocks, 2),
        ("qr_interval", 1 if qr_interval is None else qr_interval, 1),
        ("num_determinants", 0 if num_determinants is None else num_determinants, 0),
    )
    for name, value, least in options:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, found {value}")
    if k > within.size:
        raise ValueError(f"k: expected 1 to {within.size}, the real entries of the state, found {k}")
    dropped = num_transient * (2 if direction == "adjoint" else 1)
    block_length = (num_steps - dropped) // num_blocks
    if block_length < 1:
        raise ValueError(
            f"expected at least {num_blocks} steps after the transient, one for each block of the standard error, "
            f"found {max(num_steps - dropped, 0)}: run longer, or ask for fewer with num_blocks= (at least 2)"
        )
    # what does not fill a block is left out with the transient
    before = num_steps - num_blocks * block_length - (num_transient if direction == "adjoint" else 0)
    is_full = k == within.size
    plan = _Plan(
        k=k,
        block=within,
        num_steps=num_steps,
        num_blocks=num_blocks,
        block_length=block_length,
        before=before,
        check_stride=-(-num_blocks // num_determinants) if is_full and num_determinants else 0,
        check_all=is_full and num_determinants is None,
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
    data_fields=["exponents", "growth", "vectors", "mismatch", "converged", "resolved", "nonfinite_step"],
    meta_fields=["first_step", "certificate"],
)
@dataclasses.dataclass(frozen=True)
class CovariantVectors:
    """Covariant Lyapunov vectors along a stretch of a run: each is moved by J onto its own next one."""

    exponents: Float[Array, "..."]
    """(k,) mean of ``growth``, nats per step; −inf for a direction that is lost, as in :class:`LyapunovSpectrum`."""
    growth: Float[Array, "..."]
    """(W, k) log ‖J_t v_j(t)‖: how much each vector is stretched by the step that starts there."""
    vectors: Float[Array, "..."]
    """(W, k, S) unit vectors, one per row, at s_t for t = ``first_step`` …; coordinates in the order of the state's
    leaves, a complex leaf as Re then Im.  Their sign means nothing.  NaN for a direction that is lost."""
    mismatch: Float[Array, "..."]
    """(k,) sine of the largest angle in the window between these vectors and those from another initial frame and
    mixture: how far from settled they are."""
    converged: Bool[Array, "..."]
    """(k,) whether that is below 1e-3; else ``num_transient`` is too short, or two exponents are too close."""
    resolved: Bool[Array, "..."]
    """(k,) whether no step of the window or after it lost the direction in round-off."""
    nonfinite_step: Int[Array, "..."]
    """First time step at which the state is not finite; −1 for none."""
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


SETTLED = 1e-3
"""Largest mismatch of covariant vectors that count as converged."""


@functools.partial(jax.jit, static_argnames=("cell", "k", "block", "window"))
def _covariant(cell, params, state, xs, key, *, k, block, window):
    """Returns growth, vectors and lost directions of the window, from one initial frame and mixture."""
    dtype = at_least_float32(real_dtype(state))
    eps = float(jnp.finfo(real_dtype(state)).eps)
    key_frame, key_mix = jax.random.split(key)

    def forward(carry, x):
        state, rows = carry
        new, push = push_forward(cell, params, state, x, block)
        moved = push(rows)
        frame = orthonormalise(moved)
        triangle = jnp.tril(product(moved, frame.rows.T))
        # a direction of length 0 is lost, and whatever stands in its row says nothing
        is_zero = jnp.isneginf(frame.log_growth)
        triangle = triangle + jnp.diag(jnp.where(is_zero, 1 - jnp.diagonal(triangle), 0))
        is_lost = ~(eps * jnp.exp(jnp.minimum(frame.log_stretch, -float(np.log(eps)))) < LOST)
        return (new, frame.rows), (rows, triangle, is_lost)

    start = (state, random_frame(key_frame, k, block.size, dtype))
    first, last = window
    cut = lambda a, b: jax.tree.map(lambda leaf: leaf[a:b], xs)

    def without_frames(carry, x):
        carry, (_, triangle, is_lost) = forward(carry, x)
        return carry, (triangle, is_lost)

    # before the window the triangles are not needed, after it the frames are not
    carry, _ = jax.lax.scan(lambda c, x: (forward(c, x)[0], None), start, cut(None, first))
    carry, (frames, triangles, lost) = jax.lax.scan(forward, carry, cut(first, last))
    _, (later, lost_later) = jax.lax.scan(without_frames, carry, cut(last, None))

    def back(mix, triangle):
        # rows of C: C_t L = (growth) C_{t+1}, so C_t = C_{t+1} L⁻¹, normalised
        solved = jax.lax.linalg.triangular_solve(triangle, mix, left_side=False, lower=True)
        length = row_lengths(solved)
        return solved / length[:, None], -jnp.log(length)

    mix = jnp.tril(jax.random.normal(key_mix, (k, k), dtype))
    mix, _ = jax.lax.scan(lambda c, t: (back(c, t)[0], None), mix / row_lengths(mix)[:, None], later, reverse=True)

    def keep(mix, triangle):
        mix, growth = back(mix, triangle)
        return mix, (mix, growth)

    _, (mixes, growth) = jax.lax.scan(keep, mix, triangles, reverse=True)
    vectors = product(mixes, frames)
    return growth, vectors, jnp.concatenate([lost, lost_later])


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
    Both take a while to settle, so ``num_transient`` steps are left out at either end; all is done twice, from two
    initial frames, to see whether they have.  Memory: 2 (T − num_transient) triangles (k, k) and twice as many frames
    (k, S) as the window has steps.

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
    # one after the other: under vmap the QRs would take both of their ways at every step
    both = [
        _covariant(cell, params, state, xs, each, k=k, block=block, window=window) for each in jax.random.split(key)
    ]
    (growth, vectors, lost), (_, others, lost_too) = both
    lost = lost | lost_too
    cosine = jnp.einsum("tks,tks->tk", vectors, others, precision=jax.lax.Precision.HIGHEST)
    # the sine from what is left of one beside the other; a cosine near 1 has no digits for a small angle
    apart = vectors - cosine[..., None] * others
    mismatch = jnp.max(jnp.sqrt(jnp.einsum("tks,tks->tk", apart, apart)), axis=0)
    is_lost = jnp.mean(lost.astype(growth.dtype), axis=0) > LOST_AS_A_RULE
    finite = state_is_finite(run_forward(cell, params, state, xs))
    nonfinite_step = jnp.where(jnp.all(finite), -1, jnp.argmin(finite)).astype(jnp.int32)
    is_broken = nonfinite_step >= 0
    exponents = jnp.where(is_lost, -jnp.inf, jnp.mean(growth, axis=0))
    return CovariantVectors(
        exponents=jnp.where(is_broken, jnp.nan, exponents),
        growth=growth,
        vectors=jnp.where(is_lost[None, :, None], jnp.nan, vectors),
        mismatch=mismatch,
        converged=(mismatch < SETTLED) & ~is_lost & ~is_broken,
        resolved=~jnp.any(lost, axis=0) & ~is_broken,
        nonfinite_step=nonfinite_step,
        first_step=num_transient,
        certificate=certificate(real_dtype(state)),
    )
