"""Parallel in time: chains, their norms and the states themselves by associative scan.

Depth log T in place of T, for S³ work per product in place of one product with the cell's weights (S is the number of
real entries of the state): on a device with idle units the trade can pay, on a CPU it does not.  Nothing here changes
a result; what is run is named by the caller, or chosen by ``method="auto"`` and reported with the reason.

**Chains.**  ∂s_T/∂s_k = J[T−1] ⋯ J[k] is a product of matrices, so its suffixes come from an associative scan.  The
time axis is cut into chunks that fit ``memory_budget``; from the last chunk to the first, the suffixes of a chunk are
multiplied from the left by the rows of the later chunks' product.  The remainder R' = R J + P G is the same product
with the factors [[J, 0], [G, D]].

The reverse scan of :mod:`rnngrad.jacobians` multiplies by one J at a time, whose entries are plain numbers.  Here both
factors are long products, and one exponent for a whole matrix is not enough: diag(2^-200, 1) · diag(1, 2^-200) is
2^-200 times the identity, and in float32, at one exponent per factor, it is exactly 0.  One exponent per pair of leaves
mends stacks and gates, where whole blocks drift apart, but not units of one leaf that do.  So every row of every block
of columns (one block per leaf) has an exponent of its own: the exponents of the right factor's rows go into the
columns of the left one before the product, and the largest term of every row of the result survives.  What is still
lost is what the reverse scan loses too: an entry more than 2^126 (float32) below the largest in its row and leaf.

**States.**  s_{t+1} = f(s_t, x_t) for all t at once is a root, and Newton's step for it is a linear recurrence::

    r_t = f(s_t, x_t) − s_{t+1}          δ_{t+1} = J_t δ_t + r_t,  δ_0 = 0          s ← s + δ

whose solution is an associative scan over the pairs (J_t, r_t).  For a step that is affine in the state one such step
is exact (``"linear"``); for the others it is iterated (``"newton"``).  This is DEER: Lim et al. 2023, arXiv 2309.12252.
What we do differently: the recurrence is solved for the correction δ, not for s, so that round-off shrinks with it; δ,
which is the residual carried through the linearised recurrence, is also the criterion to stop by, since a small
residual says nothing about the states where the recurrence expands; and where Newton does not come to rest, the states
are those of the sequential scan.  That is the rule in chaos: it is the sign of the largest Lyapunov exponent that
decides whether the iteration converges quickly (Gonzalez 2026, arXiv 2603.16850).

Whether a step is affine, and whether each entry of the state follows from that entry alone (J is then a vector), is
read off its program (the jaxpr) by rules that never say yes wrongly for the operations they know, and no for those they
do not know.  The solution is held against f all the same, so that a derivative which is not the function's (a
``stop_gradient`` in the cell) ends in the sequential scan, not in wrong states.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rnngrad import logscaled
from rnngrad.jacobians import (
    Layout,
    Path,
    append_last,
    identity_blocks,
    identity_rows,
    layout_of,
    prepare,
    real_dtype,
    step_pulls,
)
from rnngrad.logscaled import LogScaled
from rnngrad.types import Cell, Params, Real, State, Trajectory, check_inputs, check_like
from rnngrad.unroll import Point, Run, run_forward, state_is_finite, unroll

HIGHEST = jax.lax.Precision.HIGHEST


# --- products whose rows have exponents of their own -----------------------------------------------------------------

ScaledRows = tuple[LogScaled, ...]
"""A matrix as one LogScaled per block of columns: mantissa (…, R, n_j), exponent (…, R)."""


def scaled_rows(blocks: tuple[Array, ...]) -> ScaledRows:
    """Returns plain blocks of columns with an exponent for every row."""
    return tuple(logscaled.rescale(LogScaled(block, jnp.zeros(block.shape[:-1], jnp.int32))) for block in blocks)


def _top(exponents: Array, counts: Array) -> Array:
    """Returns the largest exponent over the last axis among those that count; 0 where none does."""
    top = jnp.max(jnp.where(counts, exponents, jnp.iinfo(jnp.int32).min), axis=-1)
    return jnp.where(jnp.any(counts, axis=-1), top, 0)


def multiply(a: ScaledRows, b: ScaledRows) -> ScaledRows:
    """Returns a · b; the rows of ``b`` are the columns of all blocks of ``a``, in their order."""
    mantissa = jnp.concatenate([block.mantissa for block in a], axis=-1)
    at = [jnp.broadcast_to(block.exponent[..., None], block.mantissa.shape) for block in a]
    exponent = jnp.concatenate(at, axis=-1)
    _, own = jnp.frexp(jax.lax.stop_gradient(mantissa).astype(logscaled.at_least_float32(mantissa.dtype)))

    def spread(per_row: Array) -> Array:
        return jnp.broadcast_to(per_row[..., None, :], exponent.shape)

    product = []
    for block in b:
        shift = exponent + spread(block.exponent)
        counts = (mantissa != 0) & spread(logscaled.largest(LogScaled(block.mantissa, block.exponent)) != 0)
        top = _top(shift + own, counts)
        # Terms below the range of the largest one in their row become 0; they are below its last digit.
        left = logscaled.align(LogScaled(mantissa, shift), jnp.broadcast_to(top[..., None], shift.shape))
        summed = jnp.matmul(left, block.mantissa, precision=HIGHEST)
        product.append(logscaled.rescale(LogScaled(summed, top)))
    return tuple(product)


def _at_one_exponent(blocks: ScaledRows) -> LogScaled:
    """Returns blocks of columns side by side as one matrix with one exponent, as chains are handed out."""
    exponents = jnp.concatenate([block.exponent for block in blocks], axis=-1)
    top = _top(exponents, jnp.concatenate([logscaled.largest(block) != 0 for block in blocks], axis=-1))
    aligned = [logscaled.align(block, jnp.broadcast_to(top[..., None], block.exponent.shape)) for block in blocks]
    return LogScaled(jnp.concatenate(aligned, axis=-1), top)


# --- chains ----------------------------------------------------------------------------------------------------------


def _factors(cell: Cell, params: Params, points: Point, layout: Layout, path: Path) -> ScaledRows:
    """Returns the factor of every step of a path, leading axis time."""
    eye = identity_blocks(layout, real_dtype(points.state))

    def one(point: Point) -> tuple[Array, ...]:
        pulls = step_pulls(cell, params, point, layout, path.gate_is_open)
        if path.kind != "remainder":
            return getattr(pulls, path.kind)(eye)
        upper = [jnp.concatenate([j, g]) for j, g in zip(pulls.full(eye), pulls.gated(eye), strict=True)]
        lower = [jnp.concatenate([jnp.zeros_like(d), d]) for d in pulls.direct(eye)]
        return (*upper, *lower)

    return scaled_rows(jax.vmap(one)(points))


class _Kept(NamedTuple):
    """What is kept of each chain; hashable, so that the jitted scan compiles once for it."""

    layout: Layout
    wrt: str | None
    reduce: Callable[[LogScaled], Any] | None

    def __call__(self, rows: ScaledRows) -> Any:
        # of a remainder the first blocks are R, the others P
        chosen = zip(rows[: len(self.layout.sizes)], self.layout.block(self.wrt), strict=True)
        chain = _at_one_exponent(tuple(block for block, is_in in chosen if is_in))
        return chain if self.reduce is None else self.reduce(chain)


def _first_rows(layout: Layout, dtype: np.dtype, path: Path, of: str | None) -> ScaledRows:
    blocks = identity_blocks(layout, dtype, of)
    return scaled_rows((*map(jnp.zeros_like, blocks), *blocks) if path.kind == "remainder" else blocks)


def _marked(stacked: Any, is_bad: Bool[Array, " T"]) -> Any:
    """Returns floating leaves with NaN where the chain passes a non-finite state, as the reverse scan has them."""

    def one(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        spread = is_bad.reshape(is_bad.shape + (1,) * (leaf.ndim - 1))
        return jnp.where(jnp.broadcast_to(spread, leaf.shape), jnp.nan, leaf)

    return jax.tree.map(one, stacked)


@functools.partial(jax.jit, static_argnames=("cell", "path", "of", "keep", "chunk"))
def _chain(cell, params, state, xs, trajectory, *, path, of, keep, chunk):
    if trajectory is None:
        run = run_forward(cell, params, state, xs)
    else:
        old = _old_states(state, trajectory.states)
        zs = jax.vmap(lambda s, x: cell.preactivate(params, s, x))(old, xs)
        run = Run(Point(old, zs, xs), trajectory.final)
    layout = keep.layout
    num_steps = len(jax.tree.leaves(run.points.state)[0])
    num_chunks = -(-num_steps // chunk)
    # The first chunk is filled up with copies of step 0 in front of it: a chain never passes what lies before it.
    padding = num_chunks * chunk - num_steps
    index = jnp.maximum(jnp.arange(num_chunks * chunk) - padding, 0).reshape(num_chunks, chunk)
    rows = _first_rows(layout, real_dtype(state), path, of)

    def body(later: ScaledRows, steps: Array) -> tuple[ScaledRows, Any]:
        points = jax.tree.map(lambda leaf: leaf[steps], run.points)
        # with reverse=True the scan hands over (what comes later, what comes earlier)
        suffixes = jax.lax.associative_scan(multiply, _factors(cell, params, points, layout, path), reverse=True)
        chains = jax.vmap(multiply, in_axes=(None, 0))(later, suffixes)
        return jax.tree.map(lambda leaf: leaf[0], chains), jax.vmap(keep)(chains)

    _, stacked = jax.lax.scan(body, rows, index, reverse=True)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[padding:], stacked)
    passes_bad = jnp.flip(jnp.cumsum(jnp.flip(~state_is_finite(run))) > 0)[:-1]
    return append_last(keep(rows), _marked(stacked, passes_bad))


def _old_states(state: State, states: State) -> State:
    """Returns s_0 … s_{T−1} from s_0 and s_1 … s_T."""
    return jax.tree.map(lambda first, later: jnp.concatenate([first[None], later[:-1]]), state, states)


def _bytes(tree: Any) -> int:
    """Returns the size of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class _Sizes(NamedTuple):
    """Static sizes of a run that memory estimates are made of."""

    num_steps: int
    real_state: int
    """S."""
    num_leaves: int
    itemsize: int
    """Bytes of one real number."""
    point: int
    """Bytes of the state and the pre-activations of one step."""
    preactivation: int
    """Real entries of z."""
    output: int
    """Bytes of the new state and the gate activations of one step."""


def _sizes(cell: Cell, params: Params, state: State, xs: Any, layout: Layout) -> _Sizes:
    first = jax.tree.map(lambda leaf: leaf[0], xs)
    z, output = jax.eval_shape(lambda p, s, x: (cell.preactivate(p, s, x), cell.step(p, s, x)), params, state, first)
    itemsize = real_dtype(state).itemsize
    return _Sizes(
        num_steps=len(jax.tree.leaves(xs)[0]),
        real_state=sum(layout.sizes),
        num_leaves=len(layout.sizes),
        itemsize=itemsize,
        point=_bytes(state) + _bytes(z),
        preactivation=-(-_bytes(z) // itemsize),
        output=_bytes(output),
    )


def _pieces(num_steps: int, longest: int) -> int:
    """Returns the length of pieces of equal length, at most ``longest``, that cover ``num_steps``."""
    return -(-num_steps // -(-num_steps // min(longest, num_steps)))


def _chunk_length(sizes: _Sizes, kind: str, num_rows: int, num_columns: int | None, kept: int, budget: int) -> int:
    """Returns how many steps of a chain fit the budget at once; see :func:`parallel_chain` for the estimate.

    Args:
      sizes: of the run.
      kind: of the path; a remainder has factors of twice the width.
      num_rows: M.
      num_columns: N where whole chains are handed out, None where they are reduced.
      kept: bytes of what is kept of one chain.
      budget: in bytes.
    """
    s, steps = sizes.real_state, sizes.num_steps
    if num_columns is not None and (steps + 1) * kept > budget:
        raise ValueError(
            f"memory_budget: the {steps + 1} chains of {num_rows} × {num_columns} numbers alone take "
            f"{(steps + 1) * kept} bytes, found {budget}, which holds {max(budget // kept - 1, 0)} steps of them; "
            "reduce= keeps only what it returns of each (its norm, say)"
        )
    width = 2 * s if kind == "remainder" else s
    per_step = sizes.itemsize * (5 * width**2 + s * sizes.preactivation) + 16 * sizes.num_leaves * width
    # twice what is kept: it is stacked by chunks, then cut to T + 1
    held = steps * (sizes.point + 16) + 2 * (steps + 1) * kept
    # one step more for the rows that pass from chunk to chunk
    longest = (budget - held) // per_step - 1
    if longest < 1:
        raise ValueError(
            f"memory_budget: expected at least {held + 2 * per_step} bytes for S={s} and T={steps}, found {budget}; "
            f"{held} of them for the states, pre-activations and results of all steps, {per_step} for each step of a "
            "chunk"
        )
    return _pieces(steps, longest)


def parallel_chain(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    of: str | None = None,
    wrt: str | None = None,
    path: str = "full",
    reduce: Callable[[LogScaled], Any] | None = None,
    trajectory: Trajectory | None = None,
    memory_budget: int = 2**30,
) -> Any:
    """Returns ∂s_T/∂s_k for every k = 0 … T as :func:`rnngrad.jacobian_chain` does, by associative scan.

    Depth log(chunk) per chunk in place of one per step, S³ work per product in place of one product with the cell's
    weights.  It agrees with the reverse scan to round-off also where leaves of the state, or units of one leaf, drift
    apart by more than the range of their dtype; see the module docstring.

    The chunk is the longest for which the following estimate, taken from what XLA reports for its CPU programs, stays
    within the budget, in numbers of the state's dtype::

        T · (S + Z)                  states and pre-activations, Z entries of z per step
        2 · (T + 1) · kept           what is kept of each chain: M · N, or what ``reduce`` returns
        (chunk + 1) · (5 S² + S Z)   factors, products and cotangents of the gates; (2 S)² for S² with the remainder

    and 16 bytes for the exponents of every row and leaf.  Derivatives of the result keep more, which is not counted.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence.
      xs: inputs, shape (T, D).
      of: block of rows by field name, None for the whole state.
      wrt: block of columns.
      path: which paths of the gradient; see :mod:`rnngrad.jacobians`.
      reduce: what to keep of each (M, N) chain.
      trajectory: the run to take the Jacobians along, as :func:`parallel_unroll` or :func:`rnngrad.unroll` of the same
        arguments returned it; None runs the sequential scan.
      memory_budget: bytes that the call may hold beside its arguments.

    Returns:
      LogScaled with mantissa (T+1, M, N) and exponent (T+1,), or the stacked results of ``reduce``.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them, unknown block, gate or path, or a budget that holds less
        than one step; says what would fit.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.parallel import parallel_chain
    >>> cell = rg.cells.lstm(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (3, 3))
    >>> chain = parallel_chain(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="h")
    >>> chain.mantissa.shape
    (4, 5, 5)
    """
    layout, parsed = prepare(cell, params, state, xs, path=path, of=of, wrt=wrt)
    sizes = _sizes(cell, params, state, xs, layout)
    if trajectory is not None:
        expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((sizes.num_steps, *leaf.shape), leaf.dtype), state)
        check_like(trajectory.states, expected, what="trajectory.states", dtypes=True)
    keep = _Kept(layout, wrt, reduce)
    kept = jax.eval_shape(lambda: keep(_first_rows(layout, real_dtype(state), parsed, of)))
    num_rows, num_columns = (len(layout.positions(block)) for block in (of, wrt))
    chunk = _chunk_length(
        sizes, parsed.kind, num_rows, num_columns if reduce is None else None, _bytes(kept), memory_budget
    )
    return _chain(cell, params, state, xs, trajectory, path=parsed, of=of, keep=keep, chunk=chunk)


def parallel_retention(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    of: str | None = None,
    wrt: str | None = None,
    path: str = "full",
    norm: str = "frobenius",
    trajectory: Trajectory | None = None,
    memory_budget: int = 2**30,
) -> Float[Array, " L"]:
    """Returns what ``rg.retention(…).log_norm`` returns, by associative scan: nats at every lag 0 … T.

    Arguments and errors are those of :func:`rnngrad.retention` and :func:`parallel_chain`.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.parallel import parallel_retention
    >>> cell = rg.cells.lstm(3, 5, forget_bias=1.0)
    >>> xs = jax.random.normal(jax.random.key(1), (3, 3))
    >>> log_norm = parallel_retention(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="c")
    >>> log_norm.shape, float(log_norm[0])
    ((4,), 0.0)
    """
    log_norm = parallel_chain(
        cell,
        params,
        state,
        xs,
        of=of,
        wrt=wrt,
        path=path,
        reduce=_NORMS.get(norm) or functools.partial(logscaled.log_norm, norm=norm),
        trajectory=trajectory,
        memory_budget=memory_budget,
    )
    start = logscaled.log_norm(logscaled.join(identity_rows(layout_of(state), real_dtype(state), of)), norm)
    return jnp.flip(log_norm) - start


# One object each: a fresh partial at every call would compile anew.
_NORMS = {norm: functools.partial(logscaled.log_norm, norm=norm) for norm in ("frobenius", "spectral")}


# --- what a step's program says about it -----------------------------------------------------------------------------


class Structure(NamedTuple):
    """What is known of ∂s'/∂s before a number is computed."""

    is_affine: bool
    """s' = A s + b, with A and b from the parameters and the input alone."""
    is_elementwise: bool
    """Each entry of each leaf of s' depends on s only through the same entry of the same leaf: J is a vector."""


class _Seen(NamedTuple):
    """What a variable of the program has of the state."""

    degree: int
    """0 nothing, 1 affine, 2 more than that."""
    leaf: int | None
    """The leaf of whose entries it is made one by one; None where entries have met."""


_NOTHING = _Seen(0, None)
_SUMS = {"add", "sub", "neg", "add_any", "copy", "copy_p"}
_HOLOMORPHIC = {"exp", "log", "sin", "cos", "tan", "sinh", "cosh", "tanh", "sqrt", "integer_pow", "square"}
# fmt: off
_ELEMENTWISE = _SUMS | _HOLOMORPHIC | {
    "mul", "div", "logistic", "exp2", "log1p", "expm1", "rsqrt", "cbrt", "pow", "max", "min", "abs", "sign", "erf",
    "erfc", "asin", "acos", "atan", "asinh", "acosh", "atanh", "atan2", "clamp", "select_n", "floor", "ceil", "round",
    "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "stop_gradient",
}
_REARRANGEMENTS = {
    "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose", "slice", "concatenate", "split", "rev", "pad",
    "real", "imag", "complex", "conj", "reduce_sum", "cumsum",
}
# fmt: on
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def _degree(name: str, seen: list[_Seen], eqn: Any) -> int:
    """Returns the degree of an operation's result from those of its operands."""
    degrees = [operand.degree for operand in seen]
    if name in _SUMS or name in _REARRANGEMENTS:
        return max(degrees)
    if name == "convert_element_type":
        kinds = (jnp.floating, jnp.complexfloating)
        is_number = any(jnp.issubdtype(eqn.params["new_dtype"], kind) for kind in kinds)
        return degrees[0] if is_number else 2
    if name in ("mul", "dot_general"):
        return min(sum(degrees), 2)
    if name in ("div", "gather", "dynamic_slice"):
        return 2 if any(degrees[1:]) else degrees[0]
    if name == "select_n":
        return 2 if degrees[0] else max(degrees)
    return 2


def _leaf(name: str, seen: list[_Seen], eqn: Any) -> int | None:
    """Returns the leaf whose entries an operation still treats one by one, None if it does not."""
    leaves = {operand.leaf for operand in seen if operand.degree}
    shapes = {atom.aval.shape for atom, operand in zip(eqn.invars, seen, strict=True) if operand.degree}
    is_complex = any(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating) for atom in eqn.invars)
    # a complex leaf has one complex derivative only where the step is holomorphic in it
    allowed = _SUMS | _HOLOMORPHIC | {"mul", "div"} if is_complex else _ELEMENTWISE | {"convert_element_type"}
    if name not in allowed or len(leaves) != 1 or shapes != {eqn.outvars[0].aval.shape}:
        return None
    return leaves.pop()


def _follow(jaxpr: Any, operands: Sequence[_Seen]) -> list[_Seen]:
    """Returns what the results of a program have of the state, given what its operands have."""
    known = dict(zip(jaxpr.invars, operands, strict=True))

    def look(atom: Any) -> _Seen:
        return _NOTHING if hasattr(atom, "val") else known.get(atom, _NOTHING)  # a literal has a value

    for eqn in jaxpr.eqns:
        name, seen = eqn.primitive.name, [look(atom) for atom in eqn.invars]
        if not any(operand.degree for operand in seen):
            continue
        inner = eqn.params.get(_CALLS.get(name, ""))
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(seen):
            results = _follow(inner, seen)
        else:
            results = [_Seen(_degree(name, seen, eqn), _leaf(name, seen, eqn))] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [look(atom) for atom in jaxpr.outvars]


def structure_of(cell: Cell, params: Params, state: State, xs: Any) -> Structure:
    """Returns whether the step of a cell is affine in the state, and whether it treats each entry alone.

    Read off the step's program; operations it has no rule for count as neither.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.parallel import structure_of
    >>> cell = rg.cells.indrnn(3, 5)
    >>> structure_of(cell, cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones((1, 3)))
    Structure(is_affine=False, is_elementwise=True)
    """
    first = jax.tree.map(lambda leaf: leaf[0], xs)
    closed = jax.make_jaxpr(lambda s, p, x: cell.step(p, s, x)[0])(state, params, first)
    num_leaves = len(jax.tree.leaves(state))
    operands = [_Seen(1, index) for index in range(num_leaves)]
    operands += [_NOTHING] * (len(closed.jaxpr.invars) - num_leaves)
    results = _follow(closed.jaxpr, operands)
    return Structure(
        is_affine=all(result.degree < 2 for result in results),
        is_elementwise=all(result.degree == 0 or result.leaf == index for index, result in enumerate(results)),
    )


# --- states ----------------------------------------------------------------------------------------------------------


def _steps(cell: Cell, params: Params, old: State, xs: Any) -> tuple[State, Any]:
    """Returns the new states and gates of all steps, from the old state of each."""
    return jax.vmap(lambda s, x: cell.step(params, s, x))(old, xs)


def _derivatives(cell: Cell, is_elementwise: bool, params: Params, old: State, xs: Any) -> Any:
    """Returns J of all steps: (W, S, S), or where J is a vector one such in the structure of the state.

    That of the first step is 0: it would multiply the correction of s_0, of which there is none, and is in no product.
    """
    if is_elementwise:

        def vector(s: State, x: Any) -> State:
            with jax.default_matmul_precision("highest"):
                return jax.jvp(lambda s: cell.step(params, s, x)[0], (s,), (jax.tree.map(jnp.ones_like, s),))[1]

        derivatives = jax.vmap(vector)(old, xs)
    else:
        layout = layout_of(jax.tree.map(lambda leaf: leaf[0], old))
        eye = identity_blocks(layout, real_dtype(old))
        zs = jax.vmap(lambda s, x: cell.preactivate(params, s, x))(old, xs)
        blocks = jax.vmap(lambda point: step_pulls(cell, params, point, layout).full(eye))(Point(old, zs, xs))
        derivatives = jnp.concatenate(blocks, axis=-1)
    return jax.tree.map(lambda leaf: leaf.at[0].set(0), derivatives)


def _solve(is_elementwise: bool, derivatives: Any, rhs: State) -> State:
    """Returns δ with δ_{t+1} = J_t δ_t + rhs_t and δ_0 = 0, by associative scan over the pairs (J, rhs)."""
    if is_elementwise:

        def leaf_by_leaf(earlier, later):
            return later[0] * earlier[0], later[0] * earlier[1] + later[1]

        def one(derivative, leaf):
            return jax.lax.associative_scan(leaf_by_leaf, (derivative, leaf))[1]

        return jax.tree.map(one, derivatives, rhs)

    def combine(earlier, later):
        moved = jnp.matmul(later[0], earlier[1][..., None], precision=HIGHEST)[..., 0]
        return jnp.matmul(later[0], earlier[0], precision=HIGHEST), moved + later[1]

    layout = layout_of(jax.tree.map(lambda leaf: leaf[0], rhs))
    vectors = jax.vmap(lambda s: jnp.concatenate(layout.split(s)))(rhs)
    _, solution = jax.lax.associative_scan(combine, (derivatives, vectors))
    ends = np.cumsum(layout.sizes)[:-1]
    return jax.vmap(lambda vector: layout.merge(tuple(jnp.split(vector, ends))))(solution)


def _relative(part: State, *wholes: State) -> Float[Array, ""]:
    """Returns the largest absolute entry of ``part`` in units of that of ``wholes``, for the worst leaf; 0/0 is 0."""

    def largest(tree: State) -> Array:
        return jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)])

    top, scale = largest(part), functools.reduce(jnp.maximum, map(largest, wholes))
    return jnp.max(jnp.where(top == 0, top, top / scale))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _settled(cell, is_elementwise, is_solved, params, state, xs, states):
    """Returns ``states``, known to solve s_{t+1} = f(s_t), with the derivatives that a solution has.

    ds_{t+1} = J_t ds_t + ∂f/∂(params, x) · d(params, x), and since J is taken at the result of this function, its own
    derivative is right as well, to any order.
    """
    return states


@_settled.defjvp
def _settled_jvp(cell, is_elementwise, primals, tangents):
    is_solved, params, state, xs, _ = primals
    states = _settled(cell, is_elementwise, *primals)
    old = _old_states(state, states)

    def explicit(params, state, xs):
        # the states are held for this derivative only; those of it see them move
        return _steps(cell, params, _old_states(state, states), xs)[0]

    rhs = jax.jvp(explicit, (params, state, xs), tangents[1:4])[1]
    derivatives = _derivatives(cell, is_elementwise, params, old, xs)
    # under vmap this runs, and is thrown away, also where the scan took over: it must not overflow there
    derivatives = jax.tree.map(lambda leaf: jnp.where(is_solved, leaf, jnp.zeros_like(leaf)), derivatives)
    return states, _solve(is_elementwise, derivatives, rhs)


PATIENCE = 12
"""Newton steps without a smaller correction than before after which the scan takes over.

Twice the longest such stretch, 6, among 72 runs that all came to rest in the end: vanilla, GRU, IndRNN and LSTM with
forget biases up to 5, 8 seeds each, T = 200, float32; they took 4 to 35 steps.
"""


class _Solved(NamedTuple):
    """Newton's method over one window."""

    states: State
    num_iterations: Int[Array, ""]
    size: Float[Array, ""]
    """Of the last correction; for an affine step of the residual."""
    is_solved: Bool[Array, ""]


def _newton(
    cell: Cell,
    structure: Structure,
    params: Params,
    state: State,
    xs: Any,
    max_iterations: int,
    tolerance: float,
) -> _Solved:
    """Returns the states of a window by Newton's method from s_t = s_0; no derivatives pass through here."""
    params, state, xs = jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf,
        (params, state, xs),
    )
    window = len(jax.tree.leaves(xs)[0])
    guess = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (window, *leaf.shape)), state)

    def corrected(guess: State) -> tuple[State, Array]:
        old = _old_states(state, guess)
        new, _ = _steps(cell, params, old, xs)
        residual = jax.tree.map(jnp.subtract, new, guess)
        derivatives = _derivatives(cell, structure.is_elementwise, params, old, xs)
        correction = _solve(structure.is_elementwise, derivatives, residual)
        return jax.tree.map(jnp.add, guess, correction), _relative(correction, new, old)

    if structure.is_affine:
        states, _ = corrected(guess)
        # one step is exact, so what is left is round-off, or a derivative that is not the function's
        old = _old_states(state, states)
        new, _ = _steps(cell, params, old, xs)
        size = _relative(jax.tree.map(jnp.subtract, new, states), new, old)
        return _Solved(states, jnp.ones((), jnp.int32), size, size <= tolerance)

    def goes_on(carry):
        _, size, _, count, since = carry
        return (size > tolerance) & jnp.isfinite(size) & (count < max_iterations) & (since < PATIENCE)

    def body(carry):
        guess, _, best, count, since = carry
        guess, size = corrected(guess)
        return guess, size, jnp.minimum(best, size), count + 1, jnp.where(size < best, 0, since + 1)

    worst = jnp.asarray(jnp.finfo(real_dtype(state)).max, real_dtype(state))
    nothing = jnp.zeros((), jnp.int32)
    states, size, _, count, _ = jax.lax.while_loop(goes_on, body, (guess, worst, worst, nothing, nothing))
    return _Solved(states, count, size, size <= tolerance)


def _window(cell, structure, params, state, xs, max_iterations, tolerance):
    """Returns trajectory, number of Newton steps, residual and whether they were enough, for one window."""
    solved = _newton(cell, structure, params, state, xs, max_iterations, tolerance)

    def in_parallel():
        # a finite stand-in where the scan takes over: under vmap both are computed
        guess = jax.tree.map(
            lambda leaf, first: jnp.where(solved.is_solved, leaf, jnp.broadcast_to(first[None], leaf.shape)),
            solved.states,
            state,
        )
        root = _settled(cell, structure.is_elementwise, solved.is_solved, params, state, xs, guess)
        old = _old_states(state, root)
        new, gates = _steps(cell, params, old, xs)
        return (new, gates), jax.lax.stop_gradient(_relative(jax.tree.map(jnp.subtract, new, root), new, old))

    def by_scan():
        trajectory = unroll(cell, params, state, xs)
        size = jax.lax.stop_gradient(solved.size)
        return (trajectory.states, trajectory.gates), jnp.where(jnp.isnan(size), jnp.inf, size)

    (states, gates), residual = jax.lax.cond(solved.is_solved, in_parallel, by_scan)
    final = jax.tree.map(lambda leaf: leaf[-1], states)
    return Trajectory(states, gates, final), solved.num_iterations, residual, solved.is_solved


@functools.partial(jax.jit, static_argnames=("cell", "structure", "window", "max_iterations", "tolerance"))
def _windows(cell, params, state, xs, *, structure, window, max_iterations, tolerance):
    num_steps = len(jax.tree.leaves(xs)[0])
    solve = functools.partial(_window, cell, structure, max_iterations=max_iterations, tolerance=tolerance)
    if window == num_steps:
        return solve(params, state, xs)
    num_windows = -(-num_steps // window)
    # the last window is filled up with copies of the last input; what they lead to is cut off
    index = jnp.minimum(jnp.arange(num_windows * window), num_steps - 1).reshape(num_windows, window)

    def body(state, steps):
        trajectory, *found = solve(params, state, jax.tree.map(lambda leaf: leaf[steps], xs))
        return trajectory.final, (trajectory.states, trajectory.gates, *found)

    _, (states, gates, counts, residuals, is_solved) = jax.lax.scan(body, state, index)
    states, gates = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_steps], (states, gates))
    final = jax.tree.map(lambda leaf: leaf[-1], states)
    return Trajectory(states, gates, final), jnp.max(counts), jnp.max(residuals), jnp.all(is_solved)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["trajectory", "num_iterations", "residual", "converged", "used_scan"],
    meta_fields=["method", "window", "reason"],
)
@dataclasses.dataclass(frozen=True)
class ParallelRun:
    """States by parallel evaluation, with what was run and how it went.  A pytree: vmap gives a batch of them."""

    trajectory: Trajectory
    """As :func:`rnngrad.unroll` returns it."""
    num_iterations: Int[Array, "..."]
    """Newton steps, of the window that took most; 1 for ``"linear"``, 0 for ``"scan"``."""
    residual: Float[Array, "..."]
    """Largest |f(s_t) − s_{t+1}| of the parallel solution in units of the largest |s|, worst leaf and window; where it
    did not meet the tolerance, the last correction in those units, inf where it is not a number.  0 for ``"scan"``."""
    converged: Bool[Array, "..."]
    """Whether the parallel solution met the tolerance, in every window."""
    used_scan: Bool[Array, "..."]
    """Whether states come from the sequential scan: by request, or because a window did not converge."""
    method: str
    """``"linear"``, ``"newton"`` or ``"scan"``."""
    window: int
    """Steps that are solved at once."""
    reason: str
    """Why this method."""


def _bytes_per_step(sizes: _Sizes, is_elementwise: bool) -> int:
    """Returns what one step of a window takes; see :func:`parallel_unroll`."""
    s, z = sizes.real_state, sizes.preactivation
    if is_elementwise:
        return sizes.itemsize * (5 * s + 2 * z)
    return sizes.itemsize * (3 * s**2 + s * z + 5 * s + 2 * z)


SHORTEST_WINDOW = 64
"""Steps below which ``"auto"`` sees no use in solving window after window."""


def parallel_unroll(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    method: str = "auto",
    max_iterations: int = 50,
    tolerance: Real | None = None,
    window: int | None = None,
    memory_budget: int = 2**30,
) -> ParallelRun:
    """Returns the run of :func:`rnngrad.unroll`, its states evaluated for all steps of a window at once.

    Whatever the method, the states are those of the cell: a solution that does not meet the tolerance is thrown away
    and the sequential scan runs in its place, inside the same compiled program (``used_scan`` says so).  Under
    ``jax.vmap`` both are computed for every sequence.

    Windows follow one another in time, each from the last state of the one before.  The window is the longest for which
    the following estimate, taken from what XLA reports for its CPU programs, stays within the budget, in numbers of the
    state's dtype::

        2 · T · (S + A)                              states and gate activations, A entries per step
        window · (3 S² + S Z + 5 S + 2 Z)            Jacobians and their products; Z entries of z per step
        window · (5 S + 2 Z)                         where each entry of the state stands alone

    Derivatives pass through the solution by the implicit function theorem, to any order, and not through its
    iterations; they cost a linear recurrence of the same kind, whose memory is not counted.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence; ``jax.vmap`` for a batch.
      xs: inputs, shape (T, D).
      method: ``"linear"`` (one Newton step, exact for a step that is affine in the state), ``"newton"``, ``"scan"``, or
        ``"auto"``: linear where the step is affine, else newton where windows of at least 64 steps fit the budget, else
        scan.
      max_iterations: of Newton's method, per window.
      tolerance: size of the last correction of the states, relative to the largest state of its leaf and window (s_0
        included), at which Newton's method has converged; for ``"linear"`` of the residual.  None is ε^(3/4): 6e-6 in
        float32, 2e-12 in float64.
      window: the most steps to solve at once; the run is cut into windows of equal length.  None: as many as fit.
      memory_budget: bytes that the call may hold beside its arguments.

    Raises:
      ValueError: inputs that do not fit, an unknown method, ``"linear"`` for a step that is not affine in the state, or
        a budget that holds less than one step, or less than the window asked for; says what would fit.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.parallel import parallel_unroll
    >>> cell = rg.cells.min_gru(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (7, 3))
    >>> run = parallel_unroll(cell, cell.init(jax.random.key(0)), cell.init_state(), xs)
    >>> run.method, run.reason, bool(run.used_scan)
    ('linear', 'the step is affine in the state and treats each entry alone', False)
    """
    num_steps = check_inputs(cell, params, state, xs, one_sequence=True)
    if method not in ("auto", "linear", "newton", "scan"):
        raise ValueError(f"unknown method {method!r}; expected 'auto', 'linear', 'newton' or 'scan'")
    if max_iterations < 1 or (window is not None and window < 1):
        raise ValueError(
            f"expected max_iterations and window of at least 1, found max_iterations={max_iterations}, window={window}"
        )
    structure = structure_of(cell, params, state, xs)
    kind = "is affine in the state" if structure.is_affine else "is not affine in the state"
    entries = "treats each entry alone" if structure.is_elementwise else "mixes its entries"
    if method == "linear" and not structure.is_affine:
        raise ValueError(
            f"method 'linear': expected a step that is affine in the state, found cell {cell.name!r}, whose program is "
            "not known to be; 'newton' iterates"
        )

    sizes = _sizes(cell, params, state, xs, layout_of(state))
    held, per_step = 2 * num_steps * sizes.output, _bytes_per_step(sizes, structure.is_elementwise)
    fits = (memory_budget - held) // per_step
    shortest = min(num_steps, SHORTEST_WINDOW) if method == "auto" else 1
    wanted = shortest if window is None else min(window, num_steps)
    reason = f"asked for; the step {kind} and {entries}"
    if method == "auto":
        reason = f"the step {kind} and {entries}"
        method = "linear" if structure.is_affine else "newton"
        if fits < wanted:
            reason += (
                f", but a window of {wanted} steps takes {held + wanted * per_step} bytes and memory_budget is "
                f"{memory_budget}"
            )
            method = "scan"
    if method == "scan":
        zero = jnp.zeros((), real_dtype(state))
        yes, none = jnp.ones((), bool), jnp.zeros((), jnp.int32)
        return ParallelRun(unroll(cell, params, state, xs), none, zero, yes, yes, method, num_steps, reason)
    if fits < wanted:
        raise ValueError(
            f"memory_budget: expected at least {held + wanted * per_step} bytes for S={sizes.real_state}, "
            f"T={num_steps} and a window of {wanted} steps, found {memory_budget}, which holds {max(fits, 0)} steps "
            "at once"
        )
    length = _pieces(num_steps, fits if window is None else wanted)
    if tolerance is None:
        tolerance = float(jnp.finfo(real_dtype(state)).eps) ** 0.75
    trajectory, count, residual, converged = _windows(
        cell,
        params,
        state,
        xs,
        structure=structure,
        window=length,
        max_iterations=max_iterations,
        tolerance=float(tolerance),
    )
    return ParallelRun(trajectory, count, residual, converged, ~converged, method, length, reason)
