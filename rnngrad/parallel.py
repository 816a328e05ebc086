"""Parallel in time: chains, retention curves and the states themselves by associative scan.

Depth log T in place of T, for S³ work per product in place of one product with the cell's weights (S is the number of
real entries of the state): on a device with idle units the trade can pay, on a CPU it does not.  Nothing here changes
a result; what is run is named by the caller, or chosen by ``method="auto"`` and reported with the reason.

**Chains.**  ∂s_T/∂s_k = J[T−1] ⋯ J[k] is a product of matrices, so its suffixes come from an associative scan over
:class:`rnngrad.jacobians.ScaledRows`.  The time axis is cut into chunks that fit ``memory_budget``; from the last chunk
to the first, the suffixes of a chunk are multiplied from the left by the rows of the later chunks' product.  The
remainder R' = R J + P G is the same product with the factors [[J, 0], [G, D]].

**States.**  s_{t+1} = f(s_t, x_t) for all t at once is a root, and Newton's step for it is a linear recurrence::

    r_t = f(s_t, x_t) − s_{t+1}          δ_{t+1} = J_t δ_t + r_t,  δ_0 = 0          s ← s + δ

whose solution is an associative scan over the pairs (J_t, r_t).  For a step that is affine in the state one such step
is exact (``"linear"``); for the others it is iterated (``"newton"``).  This is DEER: Lim et al. 2023, arXiv 2309.12252.
What we do differently: the recurrence is solved for the correction δ, not for s, so that round-off shrinks with it; δ,
which is the residual carried through the linearised recurrence, is also the stability check, since where the recurrence
expands a small residual says nothing about the states; and where Newton does not come to rest, the states are those of
the sequential scan.  That is the rule in chaos: it is the sign of the largest Lyapunov exponent that decides whether
the iteration converges quickly (Gonzalez 2026, arXiv 2603.16850).
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

from rnngrad.jacobians import (
    MATMUL_PRECISION,
    Keep,
    Path,
    ScaledRows,
    append_last,
    at_one_exponent,
    identity_blocks,
    identity_rows,
    layout_of,
    multiply,
    nan_where,
    passes_nonfinite,
    prepare,
    real_dtype,
    scaled_rows,
    step_pulls,
)
from rnngrad.logscaled import LogScaled
from rnngrad.retention import RetentionCurve, curve_from, sizes_for
from rnngrad.types import Cell, Params, Real, State, Trajectory, check_inputs, check_like
from rnngrad.unroll import Point, Run, run_forward, state_is_finite, unroll


def _old_states(state: State, states: State) -> State:
    """Returns s_0 … s_{T−1} from s_0 and s_1 … s_T."""
    return jax.tree.map(lambda first, later: jnp.concatenate([first[None], later[:-1]]), state, states)


def _last(states: State) -> State:
    return jax.tree.map(lambda leaf: leaf[-1], states)


# --- memory ----------------------------------------------------------------------------------------------------------


def _bytes(make: Callable[..., Any], *arguments: Any) -> int:
    """Returns the size of what a function would return."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make, *arguments)))


def _piece(num_steps: int, budget: Real, *, fixed: int, kept: int, per_step: int, hint: str) -> int:
    """Returns the length of equal pieces of the time axis, the longest that fit.

    Bytes: ``fixed`` once, ``kept`` of every step, ``per_step`` for each step of a piece.
    """
    fits = (budget - fixed - num_steps * kept) / per_step
    if not fits >= 1:
        raise ValueError(
            f"memory_budget: expected at least {fixed + num_steps * kept + per_step} bytes for T={num_steps}, found "
            f"{budget}, which holds T={max(0, int((budget - fixed - per_step) / kept))}; {hint}"
        )
    return -(-num_steps // -(-num_steps // int(min(fits, num_steps))))


# --- chains ----------------------------------------------------------------------------------------------------------


def _factor(cell: Cell, params: Params, path: Path, keep: Keep, point: Point) -> tuple[Array, ...]:
    """Returns the factor of one step of a path as blocks of columns."""
    pulls = step_pulls(cell, params, point, keep.layout, path.gate_is_open)
    eye = identity_blocks(keep.layout, real_dtype(point.state))
    if path.kind != "remainder":
        return getattr(pulls, path.kind)(eye)
    upper = [jnp.concatenate([j, g]) for j, g in zip(pulls.full(eye), pulls.gated(eye), strict=True)]
    return (*upper, *(jnp.concatenate([jnp.zeros_like(d), d]) for d in pulls.direct(eye)))


@functools.partial(jax.jit, static_argnames=("cell", "path", "of", "keep", "chunk"))
def _chain(cell, params, state, xs, states, *, path, of, keep, chunk):
    """Returns what is kept of ∂s_T/∂s_k for every k = 0 … T, and whether s_0 … s_T are finite."""
    if states is None:
        run = run_forward(cell, params, state, xs)
    else:
        old = _old_states(state, states)
        zs = jax.vmap(lambda s, x: cell.preactivate(params, s, x))(old, xs)
        run = Run(Point(old, zs, xs), _last(states))
    blocks = identity_blocks(keep.layout, real_dtype(state), of)
    rows = scaled_rows((*map(jnp.zeros_like, blocks), *blocks) if path.kind == "remainder" else blocks)
    num_steps = len(jax.tree.leaves(xs)[0])
    num_chunks = -(-num_steps // chunk)
    # The first chunk is filled up with copies of step 0 in front of it: a chain never passes what lies before it.
    padding = num_chunks * chunk - num_steps
    index = jnp.maximum(jnp.arange(num_chunks * chunk) - padding, 0).reshape(num_chunks, chunk)

    def kept(rows: ScaledRows) -> Any:
        # of a remainder the first blocks are R, the others P
        return keep(tuple(map(at_one_exponent, rows[: len(keep.layout.sizes)])))

    def body(later: ScaledRows, steps: Array) -> tuple[ScaledRows, Any]:
        points = jax.tree.map(lambda leaf: leaf[steps], run.points)
        factors = scaled_rows(jax.vmap(functools.partial(_factor, cell, params, path, keep))(points))
        # with reverse=True the scan hands over (what comes later, what comes earlier)
        suffixes = jax.lax.associative_scan(multiply, factors, reverse=True)
        chains = jax.vmap(multiply, in_axes=(None, 0))(later, suffixes)
        return jax.tree.map(lambda leaf: leaf[0], chains), jax.vmap(kept)(chains)

    _, stacked = jax.lax.scan(body, rows, index, reverse=True)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[padding:], stacked)
    return append_last(kept(rows), nan_where(passes_nonfinite(run), stacked)), state_is_finite(run)


def _chain_within(cell, params, state, xs, *, of, wrt, path, reduce, trajectory, memory_budget):
    """Returns the same after every check, in chunks that fit the budget."""
    layout, parsed = prepare(cell, params, state, xs, path=path, of=of, wrt=wrt)
    num_steps, width, dtype = len(jax.tree.leaves(xs)[0]), sum(layout.sizes), real_dtype(state)
    states = None if trajectory is None else trajectory.states
    if states is not None:
        expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((num_steps, *leaf.shape), leaf.dtype), state)
        check_like(states, expected, what="trajectory.states", dtypes=True)
    keep = Keep(layout, wrt, reduce)
    z = _bytes(cell.preactivate, params, state, jax.tree.map(lambda leaf: leaf[0], xs))
    chain = _bytes(lambda: keep(identity_rows(layout, dtype, of)))
    rows = 2 * width if parsed.kind == "remainder" else width
    per_step = 5 * dtype.itemsize * rows**2 + width * z + 16 * len(layout.sizes) * rows
    chunk = _piece(
        num_steps,
        memory_budget,
        fixed=per_step + 2 * chain,  # the rows that pass from chunk to chunk
        kept=width * dtype.itemsize + z + 16 + 2 * chain,  # stacked by chunks, then cut to T + 1
        per_step=per_step,
        hint="reduce= keeps only what it returns of each chain, its norm, say",
    )
    return _chain(cell, params, state, xs, states, path=parsed, of=of, keep=keep, chunk=chunk)


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
    memory_budget: Real = 2**30,
) -> Any:
    """Returns ∂s_T/∂s_k for every k = 0 … T as :func:`rnngrad.jacobian_chain` does, by associative scan.

    It agrees with the reverse scan to round-off also where leaves of the state, or units of one leaf, drift apart by
    more than the range of their dtype.  Arguments, result and errors are those of :func:`rnngrad.jacobian_chain`, and:

    ``trajectory``, the run to take the Jacobians along, as :func:`parallel_unroll` or :func:`rnngrad.unroll` of the
    same arguments returned it; None runs the sequential scan.

    ``memory_budget``, bytes that the call may hold beside its arguments; a ValueError says what would fit where it
    holds less than one step.  The chunk is the longest that fits by this estimate, taken from what XLA reports for its
    CPU programs, in numbers of the state's dtype, with 16 bytes for the exponents of a row and leaf, and Z entries of
    z::

        T · (S + Z) + 2 · (T + 1) · kept       the run, and M · N or what ``reduce`` returns of each chain
        (chunk + 1) · (5 S² + S Z)             products and cotangents of z; (2 S)² for S² with the remainder

    What derivatives of the result keep is not counted.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (3, 3))
    >>> chain = rg.parallel_chain(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="h")
    >>> chain.mantissa.shape
    (4, 5, 5)
    """
    options = {"of": of, "wrt": wrt, "path": path, "trajectory": trajectory, "memory_budget": memory_budget}
    return _chain_within(cell, params, state, xs, reduce=reduce, **options)[0]


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
    memory_budget: Real = 2**30,
) -> RetentionCurve:
    """Returns the curve that :func:`rnngrad.retention` returns, by associative scan.

    Arguments and errors are those of :func:`rnngrad.retention` and :func:`parallel_chain`.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5, forget_bias=1.0)
    >>> xs = jax.random.normal(jax.random.key(1), (3, 3))
    >>> curve = rg.parallel_retention(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="c")
    >>> curve.log_norm.shape, float(curve.log_norm[0])
    ((4,), 0.0)
    """
    options = {"of": of, "wrt": wrt, "path": path, "trajectory": trajectory, "memory_budget": memory_budget}
    sizes, is_finite = _chain_within(cell, params, state, xs, reduce=sizes_for(norm), **options)
    layout, dtype = layout_of(state), real_dtype(state)
    return curve_from(sizes, is_finite, layout=layout, dtype=dtype, of=of, wrt=wrt, path=path, norm=norm)


# --- what a step's program says about it -----------------------------------------------------------------------------


class Structure(NamedTuple):
    """What is known of J = ∂s'/∂s before a number is computed."""

    is_affine: bool
    """J comes from the parameters and the input alone: s' = J s + b."""
    is_elementwise: bool
    """Each entry of each leaf of s' has a derivative by the same entry of the same leaf only: J is a vector."""


_STATE, _MIXED = "state", "mixed entries"
# What a linear program is made of while it treats every entry alone.
_ENTRY_BY_ENTRY = {"add", "add_any", "copy", "div", "mul", "neg", "select_n", "sub"}
_CALLS = {"jit", "pjit", "checkpoint", "remat2"}


def _follow(jaxpr: Any, operands: Sequence[frozenset[Any]]) -> list[frozenset[Any]]:
    """Returns what the results of a pull-back are made of, given that of its operands.

    That is a set of ``_STATE``, the leaves of the cotangent by number, and ``_MIXED`` where entries of these have met.
    """
    made_of = dict(zip(jaxpr.invars, operands, strict=True))

    def look(atom: Any) -> frozenset[Any]:
        return frozenset() if hasattr(atom, "val") else made_of.get(atom, frozenset())  # a literal has a value

    for eqn in jaxpr.eqns:
        name, seen = eqn.primitive.name, [look(atom) for atom in eqn.invars]
        if name in _CALLS:
            results = _follow(getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"]), seen)
        else:
            shapes = {atom.aval.shape for atom, one in zip(eqn.invars, seen, strict=True) if one - {_STATE}}
            is_mixed = shapes and (name not in _ENTRY_BY_ENTRY or shapes != {eqn.outvars[0].aval.shape})
            results = [frozenset().union(*seen, {_MIXED} if is_mixed else ())] * len(eqn.outvars)
        made_of.update(zip(eqn.outvars, results, strict=True))
    return [look(atom) for atom in jaxpr.outvars]


def structure_of(cell: Cell, params: Params, state: State, xs: Any) -> Structure:
    """Returns whether the step of a cell is affine in the state, and whether it treats each entry alone.

    Read off the program of the pull-back Jᵀc: J is constant where no operation that leads to the result has seen the
    state, and a vector where each operation on the way from c to the result works entry by entry.  Where the derivative
    is not the function's (``floor``, ``stop_gradient``) this says nothing about the function, which is why
    :func:`parallel_unroll` holds its solutions against the function.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.parallel import structure_of
    >>> cell = rg.cells.indrnn(3, 5)
    >>> structure_of(cell, cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones((1, 3)))
    Structure(is_affine=False, is_elementwise=True)
    """

    def pull(cotangent: State, state: State, params: Params, x: Any) -> State:
        return jax.vjp(lambda s: cell.step(params, s, x)[0], state)[1](cotangent)[0]

    jaxpr = jax.make_jaxpr(pull)(state, state, params, jax.tree.map(lambda leaf: leaf[0], xs)).jaxpr
    num_leaves = len(jax.tree.leaves(state))
    operands = [frozenset({leaf}) for leaf in range(num_leaves)] + [frozenset({_STATE})] * num_leaves
    results = _follow(jaxpr, operands + [frozenset()] * (len(jaxpr.invars) - len(operands)))
    return Structure(
        is_affine=not any(_STATE in result for result in results),
        is_elementwise=all(result <= {leaf, _STATE} for leaf, result in enumerate(results)),
    )


# --- states ----------------------------------------------------------------------------------------------------------


def _steps(cell: Cell, params: Params, old: State, xs: Any) -> tuple[State, Any]:
    """Returns the new states and gates of all steps, from the old state of each."""
    return jax.vmap(lambda s, x: cell.step(params, s, x))(old, xs)


def _derivatives(cell: Cell, is_elementwise: bool, params: Params, old: State, xs: Any) -> Any:
    """Returns J of all steps: (W, S, S), or where J is a vector one such in the structure of the state.

    That of the first step is 0: it would multiply the correction of s_0, of which there is none, and is in no product.
    """

    def one(s: State, x: Any) -> Any:
        if is_elementwise:
            with jax.default_matmul_precision(MATMUL_PRECISION):
                return jax.vjp(lambda s: cell.step(params, s, x)[0], s)[1](jax.tree.map(jnp.ones_like, s))[0]
        layout = layout_of(s)
        pulls = step_pulls(cell, params, Point(s, cell.preactivate(params, s, x), x), layout)
        return jnp.concatenate(pulls.full(identity_blocks(layout, real_dtype(s))), axis=-1)

    return jax.tree.map(lambda leaf: leaf.at[0].set(0), jax.vmap(one)(old, xs))


def _solve(is_elementwise: bool, derivatives: Any, rhs: State) -> State:
    """Returns δ with δ_{t+1} = J_t δ_t + rhs_t and δ_0 = 0, by associative scan over the pairs (J, rhs)."""
    product = jnp.multiply if is_elementwise else functools.partial(jnp.matmul, precision=MATMUL_PRECISION)

    def combine(earlier, later):
        return product(later[0], earlier[0]), product(later[0], earlier[1]) + later[1]

    def solved(derivative, column):
        return jax.lax.associative_scan(combine, (derivative, column))[1]

    if is_elementwise:
        return jax.tree.map(solved, derivatives, rhs)
    layout = layout_of(_last(rhs))
    columns = solved(derivatives, jax.vmap(lambda s: jnp.concatenate(layout.split(s))[:, None])(rhs))
    ends = np.cumsum(layout.sizes)[:-1]
    return jax.vmap(lambda column: layout.merge(tuple(jnp.split(column[:, 0], ends))))(columns)


def _relative(part: State, *wholes: State) -> Float[Array, ""]:
    """Returns the largest absolute entry of ``part`` in units of that of ``wholes``, for the worst leaf; 0/0 is 0."""

    def one(part: Array, *wholes: Array) -> Array:
        top, *scales = (jnp.max(jnp.abs(leaf)) for leaf in (part, *wholes))
        return jnp.where(top == 0, top, top / functools.reduce(jnp.maximum, scales))

    return functools.reduce(jnp.maximum, jax.tree.leaves(jax.tree.map(one, part, *wholes)))


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

    def explicit(params, state, xs):
        # the states are held for this derivative only; those of it see them move
        return _steps(cell, params, _old_states(state, states), xs)[0]

    rhs = jax.jvp(explicit, (params, state, xs), tangents[1:4])[1]
    derivatives = _derivatives(cell, is_elementwise, params, _old_states(state, states), xs)
    # under vmap this runs, and is thrown away, also where the scan took over: it must not overflow there
    derivatives = jax.tree.map(lambda leaf: jnp.where(is_solved, leaf, jnp.zeros_like(leaf)), derivatives)
    return states, _solve(is_elementwise, derivatives, rhs)


def _newton(cell, params, state, xs, *, method, is_elementwise, max_iterations, tolerance):
    """Returns states by Newton's method, the number of steps and what they are judged by; no derivatives pass here."""
    params, state, xs = jax.lax.stop_gradient((params, state, xs))

    def residual(guess: State) -> tuple[State, State, State]:
        old = _old_states(state, guess)
        new, _ = _steps(cell, params, old, xs)
        return jax.tree.map(jnp.subtract, new, guess), new, old

    def corrected(guess: State) -> tuple[State, Array]:
        rhs, new, old = residual(guess)
        correction = _solve(is_elementwise, _derivatives(cell, is_elementwise, params, old, xs), rhs)
        # s_0 counts in the scale: a window may come to be all zero
        return jax.tree.map(jnp.add, guess, correction), _relative(correction, new, old)

    num_steps = len(jax.tree.leaves(xs)[0])
    guess = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_steps, *leaf.shape)), state)
    if method == "linear":
        # From zero the correction is the solution, and no digits of a large s_0 cancel in small later states.  What is
        # left after the one step is round-off, or a derivative that is not the function's.
        states, _ = corrected(jax.tree.map(jnp.zeros_like, guess))
        return states, jnp.ones((), jnp.int32), _relative(*residual(states))

    def goes_on(carry):
        _, size, count = carry
        return (size > tolerance) & jnp.isfinite(size) & (count < max_iterations)

    def body(carry):
        guess, _, count = carry
        return *corrected(guess), count + 1

    worst = jnp.asarray(jnp.finfo(real_dtype(state)).max, real_dtype(state))
    states, size, count = jax.lax.while_loop(goes_on, body, (guess, worst, jnp.zeros((), jnp.int32)))
    return states, count, size


@functools.partial(
    jax.jit, static_argnames=("cell", "method", "is_elementwise", "window", "max_iterations", "tolerance")
)
def _windows(cell, params, state, xs, *, method, is_elementwise, window, max_iterations, tolerance):
    """Returns the trajectory, and of the worst window: Newton steps, what they are judged by, whether it was solved."""
    newton = functools.partial(
        _newton, method=method, is_elementwise=is_elementwise, max_iterations=max_iterations, tolerance=tolerance
    )

    def body(state, steps):
        inputs = jax.tree.map(lambda leaf: leaf[steps], xs)
        guess, count, size = newton(cell, params, state, inputs)
        is_solved = size <= tolerance

        def in_parallel():
            # a finite stand-in where the scan takes over: under vmap both are computed
            root = jax.tree.map(
                lambda leaf, first: jnp.where(is_solved, leaf, jnp.broadcast_to(first[None], leaf.shape)), guess, state
            )
            root = _settled(cell, is_elementwise, is_solved, params, state, inputs, root)
            return _steps(cell, params, _old_states(state, root), inputs)

        def by_scan():
            trajectory = unroll(cell, params, state, inputs)
            return trajectory.states, trajectory.gates

        states, gates = jax.lax.cond(is_solved, in_parallel, by_scan)
        return _last(states), (states, gates, count, jnp.where(jnp.isnan(size), jnp.inf, size), is_solved)

    num_steps = len(jax.tree.leaves(xs)[0])
    num_windows = -(-num_steps // window)
    # the last window is filled up with copies of the last input; what they lead to is cut off
    index = jnp.minimum(jnp.arange(num_windows * window), num_steps - 1).reshape(num_windows, window)
    _, (states, gates, count, size, is_solved) = jax.lax.scan(body, state, index)
    states, gates = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_steps], (states, gates))
    return Trajectory(states, gates, _last(states)), jnp.max(count), jnp.max(size), jnp.all(is_solved)


def _window_length(cell, params, state, xs, is_elementwise, memory_budget):
    first = jax.tree.map(lambda leaf: leaf[0], xs)
    num_steps, width, itemsize = len(jax.tree.leaves(xs)[0]), sum(layout_of(state).sizes), real_dtype(state).itemsize
    z = _bytes(cell.preactivate, params, state, first)
    matrices = 0 if is_elementwise else 3 * itemsize * width**2 + width * z
    per_step = matrices + 5 * itemsize * width + 2 * z
    kept = 2 * _bytes(cell.step, params, state, first)
    hint = "method 'scan' holds no Jacobians"
    return _piece(num_steps, memory_budget, fixed=0, kept=kept, per_step=per_step, hint=hint)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["trajectory", "num_iterations", "residual", "used_scan"],
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
    """What the solution was judged by, in units of the largest |s|, for the worst leaf and window: for ``"linear"`` the
    largest |f(s_t) − s_{t+1}|, for ``"newton"`` that residual carried through the linearised recurrence, which is the
    last correction; inf where it is not a number, 0 for ``"scan"``."""
    used_scan: Bool[Array, "..."]
    """Whether states come from the sequential scan: by choice, or because a window did not meet the tolerance."""
    method: str
    """``"linear"``, ``"newton"`` or ``"scan"``."""
    window: int
    """Steps that are solved at once."""
    reason: str
    """Why this method."""


def parallel_unroll(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    method: str = "auto",
    max_iterations: int = 50,
    tolerance: Real | None = None,
    memory_budget: Real = 2**30,
) -> ParallelRun:
    """Returns the run of :func:`rnngrad.unroll`, its states evaluated for all steps of a window at once.

    Whatever the method, the states are those of the cell: a solution that does not meet the tolerance is thrown away
    and the sequential scan runs in its place, inside the same compiled program (``used_scan`` says so).  Under
    ``jax.vmap`` both are computed for every sequence.  Derivatives pass through the solution by the implicit function
    theorem, to any order, and not through its iterations.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence; ``jax.vmap`` for a batch.
      xs: inputs, shape (T, D).
      method: ``"linear"`` (one Newton step, exact for a step that is affine in the state), ``"newton"``, ``"scan"``, or
        ``"auto"``: linear where the step is affine, else newton, and the scan where these are refused (the step has no
        reverse-mode derivative, or the budget holds not one step).
      max_iterations: of Newton's method, per window.
      tolerance: of ``residual``.  None is ε^(3/4): 6e-6 in float32, 2e-12 in float64.
      memory_budget: bytes that a parallel method may hold beside its arguments.  Windows follow one another in time,
        each from the last state of the one before, and are the longest that fit by this estimate, in numbers of the
        state's dtype; A is the number of gate activations, Z the size of z::

            2 · T · (S + A)                              states and gate activations
            window · (3 S² + S Z + 5 S + 2 Z)            Jacobians and their products
            window · (5 S + 2 Z)                         where each entry of the state stands alone

        It is taken from what XLA reports for its CPU programs.  What derivatives of the result keep is not counted.

    Raises:
      ValueError: inputs that do not fit, an unknown method, ``"linear"`` for a step that is not affine in the state, or
        a budget that holds less than one step; says what would fit.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.min_gru(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (7, 3))
    >>> run = rg.parallel_unroll(cell, cell.init(jax.random.key(0)), cell.init_state(), xs)
    >>> run.method, run.reason, bool(run.used_scan)
    ('linear', 'the step is affine in the state and treats each entry alone', False)
    """
    num_steps = check_inputs(cell, params, state, xs, one_sequence=True)
    if method not in ("auto", "linear", "newton", "scan"):
        raise ValueError(f"unknown method {method!r}; expected 'auto', 'linear', 'newton' or 'scan'")
    if tolerance is None:
        tolerance = float(jnp.finfo(real_dtype(state)).eps) ** 0.75
    if max_iterations < 1 or not tolerance >= 0:
        raise ValueError(
            f"expected max_iterations of at least 1 and tolerance of at least 0, found {max_iterations} and {tolerance}"
        )

    def by_scan(reason: str) -> ParallelRun:
        zero, yes = jnp.zeros((), real_dtype(state)), jnp.ones((), bool)
        trajectory = unroll(cell, params, state, xs)
        return ParallelRun(trajectory, jnp.zeros((), jnp.int32), zero, yes, "scan", num_steps, reason)

    if method == "scan":
        return by_scan("asked for")
    try:
        structure = structure_of(cell, params, state, xs)
        window = _window_length(cell, params, state, xs, structure.is_elementwise, memory_budget)
    except ValueError as refusal:
        if method != "auto":
            raise
        return by_scan(str(refusal))
    if method == "linear" and not structure.is_affine:
        raise ValueError(
            f"method 'linear': expected a step that is affine in the state, found cell {cell.name!r}, whose program is "
            "not known to be; 'newton' iterates"
        )
    if method == "auto":
        method = "linear" if structure.is_affine else "newton"
    trajectory, count, residual, is_solved = _windows(
        cell,
        params,
        state,
        xs,
        method=method,
        is_elementwise=structure.is_elementwise,
        window=window,
        max_iterations=max_iterations,
        tolerance=float(tolerance),
    )
    kind = "is" if structure.is_affine else "is not"
    entries = "treats each entry alone" if structure.is_elementwise else "mixes its entries"
    reason = f"the step {kind} affine in the state and {entries}"
    return ParallelRun(trajectory, count, residual, ~is_solved, method, window, reason)
