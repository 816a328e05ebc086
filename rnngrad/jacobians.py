"""Step Jacobians and their long products, exact at any length.

::

    J[t] = ∂s[t+1]/∂s[t] = D[t] + G[t]            at the old state, row = output
    ∂s_T/∂s_k = J[T−1] · … · J[k+1] · J[k]        newest factor on the left,   lag = T − k

One reverse scan gives the chain for every k at once: its rows are cotangents, and pulling them back by one step
multiplies the product by J[k] from the right.  J itself is never formed: a vectorised VJP costs one matrix product with
the cell's own weights, for the LSTM (R × 4N)(4N × N) in place of forming J and multiplying by it.  The product is kept
as :class:`rnngrad.logscaled.LogScaled` and rescaled at every step by a power of two, which is exact.

Paths (``path=``) are products of parts of J:

``full``            ∏(D + G), the true ∂s_T/∂s_k
``direct``          ∏D; for the LSTM's memory exactly ∏f
``remainder``       full − direct, from its own recursion R' = R J + P G with P = ∏D, so nothing cancels
``only:<gate>``     ∏(D + G_j): only that gate's path open beside the direct one
``without:<gate>``  ∏(J − G_j): only that gate's path cut

Complex states count as real pairs (Re, Im).  Matrix products run at highest matmul precision on every backend.
Chains take one sequence; ``jax.vmap`` gives a batch of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rnngrad import logscaled
from rnngrad.logscaled import LogScaled
from rnngrad.types import Cell, Params, State, check_finite, check_inputs, check_like, leaf_names, select_names
from rnngrad.unroll import Point, Run, run_forward, state_is_finite

MATMUL_PRECISION = "highest"


# --- the state as real vectors ---------------------------------------------------------------------------------------

Blocks = tuple[Array, ...]
"""One real array per leaf of the state: vectors (n_i,), or rows of cotangents (R, n_i).

Blocks stay apart all the way: to cut one out of a joint matrix at every step costs a strided copy, a quarter of the
scan's time at N = 128 on a CPU.
"""


class Layout(NamedTuple):
    """How a state pytree is seen as real vectors, a complex leaf as all Re then all Im.  Hashable."""

    treedef: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_complex: tuple[bool, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Real entries of each leaf."""
        return tuple(
            int(np.prod(shape)) * (2 if is_complex else 1)
            for shape, is_complex in zip(self.shapes, self.is_complex, strict=True)
        )

    def split(self, state: State) -> Blocks:
        """Returns the state as one real vector per leaf."""
        return tuple(
            jnp.concatenate([leaf.real.ravel(), leaf.imag.ravel()]) if is_complex else leaf.ravel()
            for leaf, is_complex in zip(jax.tree.leaves(state), self.is_complex, strict=True)
        )

    def merge(self, blocks: Blocks) -> State:
        """Returns the state that :meth:`split` saw as ``blocks``."""
        leaves = [
            (jax.lax.complex(*jnp.split(block, 2)) if is_complex else block).reshape(shape)
            for block, shape, is_complex in zip(blocks, self.shapes, self.is_complex, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def block(self, name: str | None, *, what: str = "block") -> tuple[bool, ...]:
        """Returns which leaves a name addresses: a field, a leading part of one, or None for all."""
        return select_names(self.names, name, what=what)

    def num_entries(self, *names: str | None) -> int:
        """Returns how many real entries of the state lie in all the blocks."""
        chosen = zip(*(self.block(name) for name in names), strict=True)
        return sum(size for size, flags in zip(self.sizes, chosen, strict=True) if all(flags))

    def positions(self, name: str | None) -> np.ndarray:
        """Returns where a block's entries stand when all leaves are joined into one vector."""
        return np.flatnonzero(np.repeat(self.block(name), self.sizes))


def layout_of(state: State) -> Layout:
    """Returns the layout of a state (or of its shapes)."""
    leaves, treedef = jax.tree.flatten(state)
    return Layout(
        treedef,
        leaf_names(state),
        tuple(jnp.shape(leaf) for leaf in leaves),
        tuple(bool(jnp.issubdtype(leaf.dtype, jnp.complexfloating)) for leaf in leaves),
    )


# --- one step, as maps on cotangents ---------------------------------------------------------------------------------

Pull = Callable[[Blocks], Blocks]
OpenGates = tuple[bool | Bool[Array, ""], ...]
"""Which leaves of z let cotangents through; traced flags serve several paths by one program."""


class StepPulls(NamedTuple):
    """Pull-backs of one step; each maps rows of cotangents to rows of cotangents, blocks of shape (R, n_i)."""

    full: Pull
    """rows · J"""
    direct: Pull
    """rows · D"""
    gated: Pull
    """rows · G"""
    selected: Pull
    """rows · (D + the chosen terms of G)"""


def step_pulls(
    cell: Cell, params: Params, point: Point, layout: Layout, gate_is_open: OpenGates | None = None
) -> StepPulls:
    """Returns the pull-backs of one step.

    Args:
      cell: the cell.
      params: its parameters.
      point: old state, pre-activations and input of the step.
      layout: of the state.
      gate_is_open: for ``selected``, which leaves of z let cotangents through; None for all.
    """
    blocks = layout.split(point.state)

    def preactivate(blocks):
        return cell.preactivate(params, layout.merge(blocks), point.x)

    def update(z, blocks):
        return layout.split(cell.update(params, z, layout.merge(blocks))[0])

    with jax.default_matmul_precision(MATMUL_PRECISION):
        # where z is affine its value is not needed here again, and the compiler drops the products that make it
        _, pull_preactivate = jax.vjp(preactivate, blocks)
        _, pull_update = jax.vjp(update, point.z, blocks)

    def part(row: Blocks, *, direct: bool, is_open: OpenGates | None, gated: bool = True) -> Blocks:
        z_bar, from_direct = pull_update(row)
        if not gated:
            return from_direct
        if is_open is not None:
            leaves, treedef = jax.tree.flatten(z_bar)
            leaves = [jnp.where(keep, leaf, jnp.zeros_like(leaf)) for leaf, keep in zip(leaves, is_open, strict=True)]
            z_bar = jax.tree.unflatten(treedef, leaves)
        (from_gates,) = pull_preactivate(z_bar)
        return jax.tree.map(jnp.add, from_direct, from_gates) if direct else from_gates

    return StepPulls(
        full=jax.vmap(functools.partial(part, direct=True, is_open=None)),
        direct=jax.vmap(functools.partial(part, direct=True, is_open=None, gated=False)),
        gated=jax.vmap(functools.partial(part, direct=False, is_open=None)),
        selected=jax.vmap(functools.partial(part, direct=True, is_open=gate_is_open)),
    )


def gate_names(cell: Cell, params: Params, state: State, xs: Any) -> tuple[str, ...]:
    """Returns the names that ``only:`` and ``without:`` take: the leaves of z, e.g. ``("i", "f", "g", "o")``.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.gru(3, 5)
    >>> rg.gate_names(cell, cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones((1, 3)))
    ('r', 'u', 'n', 'a')
    """
    check_inputs(cell, params, state, xs, one_sequence=False)
    first = jax.tree.map(lambda leaf: leaf[0], xs)
    return leaf_names(jax.eval_shape(cell.preactivate, params, state, first))


class Path(NamedTuple):
    """A parsed ``path=``: which chain, and for ``only``/``without`` which gates stay open."""

    kind: str
    gate_is_open: tuple[bool, ...] | None


def parse_path(path: str, names: tuple[str, ...]) -> Path:
    """Returns the parsed path.

    Raises:
      ValueError: unknown path or gate; names what exists.
    """
    if path in ("full", "direct", "remainder"):
        return Path(path, None)
    kind, colon, gate = path.partition(":")
    if not colon or kind not in ("only", "without"):
        raise ValueError(
            f"unknown path {path!r}; expected 'full', 'direct', 'remainder', 'only:<gate>' or 'without:<gate>'"
        )
    chosen = select_names(names, gate, what="gate")
    return Path("selected", chosen if kind == "only" else tuple(not keep for keep in chosen))


# --- the reverse scan ------------------------------------------------------------------------------------------------


def reverse_scan(
    cell: Cell,
    params: Params,
    run: Run,
    layout: Layout,
    carry: Any,
    advance: Callable[[StepPulls, Any], Any],
    emit: Callable[[Any], Any],
    gate_is_open: OpenGates | None = None,
) -> tuple[Any, Any]:
    """Returns the carry pulled back to s_0 and what ``emit`` saw of it at every k = 0 … T−1, stacked in that order.

    The one scan that every chain, path and cotangent goes through.  A derivative taken at a non-finite state may itself
    look finite (relu' at NaN is 0), so whatever passes such a state comes back as NaN.
    """

    def body(carry, point):
        carry = advance(step_pulls(cell, params, point, layout, gate_is_open), carry)
        return carry, emit(carry)

    carry, stacked = jax.lax.scan(body, carry, run.points, reverse=True)
    bad = passes_nonfinite(run)
    return nan_where(bad[0], carry), nan_where(bad, stacked)


def passes_nonfinite(run: Run) -> Bool[Array, " T"]:
    """Returns for k = 0 … T−1 whether one of s_k … s_T, which the chain from s_k to s_T passes, is not finite."""
    return jnp.flip(jnp.cumsum(jnp.flip(~state_is_finite(run))) > 0)[:-1]


def nan_where(flags: Bool[Array, "..."], tree: Any) -> Any:
    """Returns floating leaves with NaN where the flag of their leading axes is set, and the others as they are."""

    def one(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        spread = jnp.broadcast_to(flags.reshape(flags.shape + (1,) * (leaf.ndim - flags.ndim)), leaf.shape)
        return jnp.where(spread, jnp.nan, leaf)

    return jax.tree.map(one, tree)


Rows = tuple[LogScaled, ...]
"""Rows of a chain, one LogScaled matrix (R, n_i) per leaf of the state.

Every block has a scale of its own: in a stack, or with one gate's path open, blocks of one row drift apart by hundreds
of nats, and at a common scale the smaller would be lost.  Within one leaf there is one scale: a unit that drifts 2^150
below another of the same leaf is lost in float32 even if it comes back later (:class:`ScaledRows` keeps it).
"""


def pulled(pull: Pull, rows: Rows) -> Rows:
    """Returns the rows pulled back by one step and rescaled.

    Blocks at a common scale are pulled back together.  Once one lies so far below another that it would lose digits
    there, each is pulled back alone and the results are added, block by block.  (Under ``vmap`` both are computed: a
    batch of chains of a cell with L blocks costs L + 1 pulls per step.)
    """
    mantissas = tuple(block.mantissa for block in rows)

    def together():
        return tuple(LogScaled(block, rows[0].exponent) for block in pull(mantissas))

    def apart():
        total: Rows | None = None
        for index, block in enumerate(rows):
            alone = tuple(m if i == index else jnp.zeros_like(m) for i, m in enumerate(mantissas))
            moved = tuple(logscaled.rescale(LogScaled(part, block.exponent)) for part in pull(alone))
            total = moved if total is None else tuple(map(logscaled.add, total, moved))
        assert total is not None
        return total

    if len(rows) == 1:
        moved = together()
    else:
        at_one_scale = [jnp.all(block.exponent == rows[0].exponent) for block in rows[1:]]
        moved = jax.lax.cond(functools.reduce(jnp.logical_and, at_one_scale), together, apart)
    return logscaled.rescale_together(moved)


def advance_for(kind: str) -> Callable[[StepPulls, Any], Any]:
    """Returns how the carry of a path moves by one step: rows, or (remainder, direct) for the remainder."""
    if kind == "remainder":

        def advance(pulls, carry):
            rest, direct = carry
            rest = tuple(map(logscaled.add, pulled(pulls.full, rest), pulled(pulls.gated, direct)))
            return logscaled.rescale_together(rest), pulled(pulls.direct, direct)

        return advance
    return lambda pulls, carry: pulled(getattr(pulls, kind), carry)


def real_dtype(state: State) -> np.dtype:
    """Returns the floating dtype that a state is computed in; that of the parts for a complex one.

    NumPy's float64 becomes float32 on its way into JAX unless 64 bits are enabled.
    """
    return jax.dtypes.canonicalize_dtype(jnp.finfo(jax.tree.leaves(state)[0].dtype).dtype)


def identity_rows(layout: Layout, dtype: np.dtype, of: str | None) -> Rows:
    """Returns ∂s_T/∂s_T: the rows of the identity that belong to block ``of``."""
    return tuple(map(logscaled.from_array, identity_blocks(layout, dtype, of)))


def identity_blocks(layout: Layout, dtype: np.dtype, of: str | None = None) -> Blocks:
    """Returns the same rows as plain arrays."""
    rows = np.eye(sum(layout.sizes))[layout.positions(of)]
    return tuple(jnp.asarray(block, dtype) for block in np.split(rows, np.cumsum(layout.sizes)[:-1], axis=1))


def _start(kind: str, rows: Rows) -> Any:
    if kind == "remainder":
        return jax.tree.map(jnp.zeros_like, rows), rows
    return rows


def _of_carry(kind: str, carry: Any) -> Rows:
    return carry[0] if kind == "remainder" else carry


def append_last(last: Any, stacked: Any) -> Any:
    """Returns what was kept at k = 0 … T−1 with the value at k = T behind it."""
    return jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), stacked, last)


class Keep(NamedTuple):
    """What is kept of each chain: a block of columns, then a function of it.

    Hashable, so that a jitted scan compiles once per block and function.
    """

    layout: Layout
    wrt: str | None
    then: Callable[[LogScaled], Any] | None

    def __call__(self, rows: Rows) -> Any:
        chosen = self.layout.block(self.wrt)
        chain = logscaled.join(tuple(block for block, is_in in zip(rows, chosen, strict=True) if is_in))
        return chain if self.then is None else self.then(chain)


@functools.partial(jax.jit, static_argnames=("cell", "path", "keep"))
def chain_along(cell: Cell, params: Params, run: Run, rows: Rows, *, path: Path, keep: Keep) -> Any:
    """Returns what ``keep`` keeps of ``rows`` pulled back along a run, for every k = 0 … T.

    The arguments are already checked.
    """
    carry = _start(path.kind, rows)

    def emit(carry):
        return keep(_of_carry(path.kind, carry))

    _, stacked = reverse_scan(cell, params, run, keep.layout, carry, advance_for(path.kind), emit, path.gate_is_open)
    return append_last(emit(carry), stacked)


def pull_along(cell: Cell, params: Params, run: Run, rows: Rows, *, path: Path, layout: Layout) -> Rows:
    """Returns ``rows`` at s_T pulled back to s_0, the last entry of :func:`chain_along` alone."""
    carry = _start(path.kind, rows)
    carry, _ = reverse_scan(
        cell, params, run, layout, carry, advance_for(path.kind), lambda carry: None, path.gate_is_open
    )
    return _of_carry(path.kind, carry)


def push_along(cell: Cell, params: Params, run: Run, rows: Rows, *, path: Path, layout: Layout) -> Rows:
    """Returns ``rows`` at s_0 pushed forward along a run, rows · (∂s_T/∂s_0)ᵀ: the transpose of the whole chain.

    Every step is the transpose of the pull-back that :func:`chain_along` takes there.  The arguments are already
    checked.
    """

    def transposed(pull: Pull) -> Pull:
        def push(blocks: Blocks) -> Blocks:
            (moved,) = jax.linear_transpose(pull, blocks)(blocks)
            return moved

        return push

    def body(carry, point):
        pulls = step_pulls(cell, params, point, layout, path.gate_is_open)
        return advance_for(path.kind)(StepPulls(*map(transposed, pulls)), carry), None

    carry, _ = jax.lax.scan(body, _start(path.kind, rows), run.points)
    return nan_where(~jnp.all(state_is_finite(run)), _of_carry(path.kind, carry))


_run_forward = jax.jit(run_forward, static_argnames=("cell",))


def prepare(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    path: str = "full",
    of: str | None = None,
    wrt: str | None = None,
) -> tuple[Layout, Path]:
    """Returns the state's layout and the parsed path, after every check that a chain's arguments owe the user."""
    check_inputs(cell, params, state, xs, one_sequence=True)
    check_finite(params, state, xs)
    layout = layout_of(state)
    layout.block(of, what="block of=")
    layout.block(wrt, what="block wrt=")
    return layout, parse_path(path, gate_names(cell, params, state, xs))


@functools.partial(jax.jit, static_argnames=("cell",))
def _step_jacobians(cell, params, state, xs):
    layout = layout_of(state)
    eye = identity_blocks(layout, real_dtype(state))
    run = run_forward(cell, params, state, xs)
    blocks = jax.vmap(lambda point: step_pulls(cell, params, point, layout).full(eye))(run.points)
    jacobians = jnp.concatenate(blocks, axis=-1)
    is_bad = ~(state_is_finite(run)[:-1] & state_is_finite(run)[1:])
    return jnp.where(jnp.broadcast_to(is_bad[:, None, None], jacobians.shape), jnp.nan, jacobians)


def step_jacobians(
    cell: Cell, params: Params, state: State, xs: Any, *, of: str | None = None, wrt: str | None = None
) -> Float[Array, "T M N"]:
    """Returns J[t] = ∂s[t+1]/∂s[t] for every step, row = output, as one array.

    Memory is T·S² numbers; for long sequences use :func:`retention` or :func:`jacobian_chain`.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence.
      xs: inputs, shape (T, D).
      of: block of rows by field name (``"c"``), None for the whole state.
      wrt: block of columns.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them, or an unknown block.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (7, 3))
    >>> rg.step_jacobians(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c").shape
    (7, 5, 10)
    """
    layout, _ = prepare(cell, params, state, xs, of=of, wrt=wrt)
    rows, columns = layout.positions(of), layout.positions(wrt)
    return _step_jacobians(cell, params, state, xs)[:, rows][:, :, columns]


def jacobian_chain(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    of: str | None = None,
    wrt: str | None = None,
    path: str = "full",
    cotangent: State | None = None,
    reduce: Callable[[LogScaled], Any] | None = None,
) -> Any:
    """Returns ∂s_T/∂s_k for every k = 0 … T as LogScaled matrices, from one reverse scan.

    Entry k of the leading axis belongs to lag T − k; the last one is the identity block.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence.
      xs: inputs, shape (T, D).
      of: block of rows by field name (``"c"``, ``"layer_1.h"``), None for the whole state.
      wrt: block of columns.
      path: which paths of the gradient; see the module docstring.
      cotangent: ∂L/∂s_T of a loss of the last state, in the structure of the state; the chain is then ∂L/∂s_k, one row
        (M = 1), in place of the block ``of``.
      reduce: what to keep of each (M, N) chain, as soon as it is computed; with it memory beyond states and
        pre-activations is one chain, without it T + 1 of them.  A module-level function compiles once, a fresh
        lambda at every call.

    Returns:
      LogScaled with mantissa (T+1, M, N) and exponent (T+1,), or the stacked results of ``reduce``.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them, unknown block, gate or path.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (7, 3))
    >>> chain = rg.jacobian_chain(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="h")
    >>> chain.mantissa.shape
    (8, 5, 5)
    """
    layout, parsed = prepare(cell, params, state, xs, path=path, of=of, wrt=wrt)
    run = _run_forward(cell, params, state, xs)
    if cotangent is None:
        rows = identity_rows(layout, real_dtype(state), of)
    else:
        if of is not None:
            raise ValueError(f"expected either a cotangent or a block of=, found both (of={of!r})")
        check_like(cotangent, state, what="cotangent", dtypes=True)
        rows = tuple(logscaled.from_array(block[None, :]) for block in layout.split(cotangent))
    return chain_along(cell, params, run, rows, path=parsed, keep=Keep(layout, wrt, reduce))


# --- products of long factors ----------------------------------------------------------------------------------------

ScaledRows = tuple[LogScaled, ...]
"""A matrix as one LogScaled per block of columns (one per leaf), with an exponent for every row of every block:
mantissa (…, R, n_j), exponent (…, R).

The reverse scan multiplies by one J at a time, whose entries are plain numbers; an associative scan multiplies long
products by one another, and there one exponent for a block is not enough: diag(2^-200, 1) · diag(1, 2^-200) is 2^-200
times the identity, and in float32, at one exponent per factor, it is exactly 0.
"""


def scaled_rows(blocks: Blocks) -> ScaledRows:
    """Returns plain blocks of columns with an exponent for every row."""
    return tuple(logscaled.rescale(LogScaled(block, jnp.zeros(block.shape[:-1], jnp.int32))) for block in blocks)


def at_one_exponent(block: LogScaled) -> LogScaled:
    """Returns a block of :class:`ScaledRows` as a matrix with one exponent, as chains are handed out."""
    top = largest_exponent(block.exponent, logscaled.largest(block) != 0)
    return LogScaled(logscaled.align(block, jnp.broadcast_to(top[..., None], block.exponent.shape)), top)


def largest_exponent(exponents: Array, counts: Array) -> Array:
    """Returns the largest exponent over the last axis among those that count; 0 where none does."""
    top = jnp.max(jnp.where(counts, exponents, jnp.iinfo(jnp.int32).min), axis=-1)
    return jnp.where(jnp.any(counts, axis=-1), top, 0)


def multiply(a: ScaledRows, b: ScaledRows) -> ScaledRows:
    """Returns a · b; the rows of ``b`` are the columns of all blocks of ``a``, in their order.

    The exponents of the rows of ``b`` go into the columns of ``a``, and every row of these is brought to the exponent
    of its largest term.  Lost is an entry more than 2^126 (float32) below the largest in its row and leaf.
    """
    mantissa = jnp.concatenate([block.mantissa for block in a], axis=-1)
    spread = [jnp.broadcast_to(block.exponent[..., None], block.mantissa.shape) for block in a]
    exponent = jnp.concatenate(spread, axis=-1)
    _, own = jnp.frexp(jax.lax.stop_gradient(mantissa).astype(logscaled.at_least_float32(mantissa.dtype)))

    def in_columns(of_rows: Array) -> Array:
        return jnp.broadcast_to(of_rows[..., None, :], exponent.shape)

    product = []
    for block in b:
        shift = exponent + in_columns(block.exponent)
        top = largest_exponent(shift + own, (mantissa != 0) & in_columns(logscaled.largest(block) != 0))
        left = logscaled.align(LogScaled(mantissa, shift), jnp.broadcast_to(top[..., None], shift.shape))
        summed = jnp.matmul(left, block.mantissa, precision=MATMUL_PRECISION)
        product.append(logscaled.rescale(LogScaled(summed, top)))
    return tuple(product)


@jax.jit
def _prefix_products(jacobians):
    # with reverse=True the scan hands over (what comes later, what comes earlier); newest on the left is that order
    (products,) = jax.lax.associative_scan(multiply, scaled_rows((jacobians,)), reverse=True)
    eye = logscaled.from_array(jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype))
    return append_last(eye, at_one_exponent(products))


def prefix_products(jacobians: Float[Array, "..."]) -> LogScaled:
    """Returns ∂s_T/∂s_k for k = 0 … T from the step Jacobians, by associative scan.

    The second implementation of the chain: depth log T instead of T, S³ per product instead of the cell's own matrix
    product, and all step Jacobians in memory.  It agrees with :func:`jacobian_chain` to round-off.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> rg.prefix_products(jnp.stack([2 * jnp.eye(3)] * 4)).exponent
    Array([5, 4, 3, 2, 1], dtype=int32)

    Raises:
      ValueError: not a stack of square matrices, or T = 0.
    """
    shape = jacobians.shape
    if len(shape) != 3 or shape[0] == 0 or shape[1] != shape[2]:
        raise ValueError(f"jacobians: expected shape (T, S, S) with T at least 1, found {shape}")
    return _prefix_products(jacobians)
