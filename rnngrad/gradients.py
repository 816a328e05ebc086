"""The gradient of a loss through time: in log space, truncated, and forward in time.

::

    δ_t = ∂L/∂s_t = ∂L/∂s_t|local + δ_{t+1} (D_t + G_t)       total = local + direct + gated
    ∂L/∂θ = Σ_t δ_{t+1} ∂⁺s_{t+1}/∂θ                          ∂⁺: the states before held fixed

``local`` is what the loss takes from s_t itself.  ``jax.grad`` through :func:`rnngrad.unroll` with taps gives the same
parts in plain numbers and at no cost; :func:`bptt` is the explicit reverse scan with cotangents as
:class:`rnngrad.logscaled.LogScaled`, for what lies beyond the range of the dtype.  :func:`truncated_bptt` drops what
lies beyond a window, and says how much that was.  :func:`rtrl` carries ∂s_t/∂θ forward in time.

Sources: Werbos 1990 (back-propagation through time); Williams & Peng 1990 (truncated, BPTT(h; h')); Williams & Zipser
1989 (real-time recurrent learning).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rnngrad import logscaled
from rnngrad.jacobians import (
    MATMUL_PRECISION,
    Blocks,
    Layout,
    Rows,
    largest_exponent,
    layout_of,
    nan_where,
    passes_nonfinite,
    pulled,
    step_pulls,
)
from rnngrad.logscaled import LogScaled
from rnngrad.types import Cell, Params, State, check_finite, check_inputs
from rnngrad.unroll import Point, Run, run_forward, state_is_finite, unroll

StateLoss = Callable[[State], Array]
"""Maps the states s_1 … s_T (leading axis T) to a scalar."""


class StateCotangents(NamedTuple):
    """∂L/∂s_k for k = 0 … T, each a state whose leaves are LogScaled.

    A leaf has a mantissa of shape (T+1, N) and exponents (T+1,), or (T+1, B, N) and (T+1, B): every step, sequence and
    field at a scale of its own.  Complex fields count as real pairs, all ∂L/∂Re then all ∂L/∂Im.
    """

    total: Any
    """∂L/∂s_k."""
    direct: Any
    """The part that comes back from s_{k+1} by the direct path; zero at k = T."""
    gated: Any
    """The part that comes back through the gates."""


class GradientFlow(NamedTuple):
    """What :func:`bptt` returns."""

    loss: Array
    """L."""
    grads: Params
    """∂L/∂params as plain numbers; what is out of the dtype's range is 0 or inf, as from ``jax.grad``."""
    scaled_grads: Params
    """The same with LogScaled leaves."""
    state_cotangents: StateCotangents
    """∂L/∂s_k, split."""
    gate_cotangents: Any
    """∂L/∂z_t for t = 0 … T−1, as ``update`` reads z_t (see :class:`rnngrad.unroll.Taps`), pre-activations whose leaves
    are LogScaled; None for a map, which has none."""


def local_cotangents(loss: StateLoss, states: State) -> tuple[Array, State]:
    """Returns L and ∂L/∂s_t as the loss takes it from the states themselves.

    Raises:
      ValueError: the loss is not a floating scalar.
    """
    result = jax.eval_shape(loss, states)
    if not hasattr(result, "shape") or result.shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(f"loss: expected a function of the states that returns a floating scalar, found {result}")
    return jax.value_and_grad(loss)(states)


def _real(layout: Layout, cotangent: State) -> tuple[Float[Array, "..."], ...]:
    """Returns a cotangent of the state, as JAX writes it, as one real block per field."""
    leaves = jax.tree.leaves(cotangent)
    zeros = tuple(jnp.zeros(n, jnp.finfo(leaf.dtype).dtype) for n, leaf in zip(layout.sizes, leaves, strict=True))
    return jax.vjp(layout.merge, zeros)[1](cotangent)[0]


def _rows_of(layout: Layout, cotangent: State) -> Rows:
    return tuple(logscaled.from_array(block[None, :]) for block in _real(layout, cotangent))


def _reverse(cell: Cell, params: Params, run: Run, local: State) -> tuple[StateCotangents, tuple[Rows, Any]]:
    """Returns the cotangents of one sequence as tuples of rows, and (δ_{t+1}, ∂L/∂z_t) for every t."""
    layout = layout_of(run.final)
    local_rows = jax.vmap(functools.partial(_rows_of, layout))(local)
    zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), local_rows)

    def body(arriving: Rows, inputs: tuple[Point, Rows]) -> tuple[Rows, Any]:
        point, own = inputs
        total = logscaled.rescale_together(tuple(map(logscaled.add, arriving, own)))
        pulls = step_pulls(cell, params, point, layout)
        direct, gated = pulled(pulls.direct, total), pulled(pulls.gated, total)
        arriving = logscaled.rescale_together(tuple(map(logscaled.add, direct, gated)))
        return arriving, (total, direct, gated)

    arriving, (total, direct, gated) = jax.lax.scan(body, zero, (run.points, local_rows), reverse=True)
    bad = passes_nonfinite(run)
    after = jnp.append(bad[1:], ~state_is_finite(run)[-1])
    total, direct, gated = nan_where(after, total), nan_where(bad, direct), nan_where(bad, gated)
    arriving = nan_where(bad[0], arriving)

    def z_bar(point: Point, rows: Rows) -> Any:
        _, pull = jax.vjp(lambda z: layout.split(cell.update(params, z, point.state)[0]), point.z)
        return _pulled_apart(pull, rows, _as_row)

    gates = None if cell.input_size is None else jax.vmap(z_bar)(run.points, total)
    totals = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), arriving, total)
    ends = lambda rows: jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.zeros_like(leaf[:1])]), rows)
    return StateCotangents(totals, ends(direct), ends(gated)), (total, gates)


def _as_row(leaf: Array, exponent: Array) -> LogScaled:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.concatenate([leaf.real, -leaf.imag], axis=-1)  # JAX's cotangent is ∂/∂Re − i ∂/∂Im
    return logscaled.rescale(LogScaled(leaf.reshape(1, -1), exponent))


def _is_scaled(node: Any) -> bool:
    return isinstance(node, LogScaled)


def _add_scaled(a: Any, b: Any) -> Any:
    return jax.tree.map(logscaled.add, a, b, is_leaf=_is_scaled)


def _pulled_apart(pull: Callable[[Blocks], tuple[Any]], rows: Rows, scaled: Callable[[Array, Array], LogScaled]) -> Any:
    """Returns what ``pull`` makes of one row: block by block, since each has a scale of its own, and added up."""
    parts = []
    for index, block in enumerate(rows):
        alone = tuple(b.mantissa[0] if i == index else jnp.zeros_like(b.mantissa[0]) for i, b in enumerate(rows))
        parts.append(jax.tree.map(lambda leaf, e=block.exponent: scaled(leaf, e), pull(alone)[0]))
    return functools.reduce(_add_scaled, parts)


def _weights(cell: Cell, params: Params, run: Run, rows: Rows) -> Params:
    """Returns Σ_t δ_{t+1} ∂⁺s_{t+1}/∂params of one sequence with LogScaled leaves.

    Step by step and field by field, each share at its own scale: a large cotangent may meet an input of zero where a
    small one does not.  Only what a single step, or the way through a stack's layers within it, shrinks beyond the
    range of the dtype is lost.
    """
    layout = layout_of(run.final)

    def share(point: Point, rows: Rows) -> Params:
        def step(params):
            return layout.split(cell.update(params, cell.preactivate(params, point.state, point.x), point.state)[0])

        _, pull = jax.vjp(step, params)
        return _pulled_apart(pull, rows, _scaled)

    def body(total: Params, inputs: tuple[Point, Rows]) -> tuple[Params, None]:
        return _add_scaled(total, share(*inputs)), None

    zero = jax.tree.map(lambda leaf: _scaled(jnp.zeros_like(leaf), jnp.zeros((), jnp.int32)), params)
    return jax.lax.scan(body, zero, (run.points, rows))[0]


def _sum_scaled(x: LogScaled) -> LogScaled:
    """Returns the sum over the leading axis."""
    top = largest_exponent(x.exponent, logscaled.largest(x) != 0)
    return _scaled(jnp.sum(logscaled.align(x, jnp.broadcast_to(top, x.exponent.shape)), axis=0), top)


def _scaled(leaf: Array, exponent: Array) -> LogScaled:
    return logscaled.rescale(LogScaled(leaf, exponent))


@functools.partial(jax.jit, static_argnames=("cell",))
def _flow(cell, params, state, xs, value, local):
    run = run_forward(cell, params, state, xs)

    def one_sequence(points, final, local):
        run = Run(points, final)
        cotangents, (total, gates) = _reverse(cell, params, run, local)
        return (cotangents, gates), _weights(cell, params, run, total)

    batch_axes = xs.ndim - 2 if cell.input_size is not None else 0
    for _ in range(batch_axes):
        one_sequence = jax.vmap(one_sequence, in_axes=(1, 0, 1), out_axes=(1, 0))
    with jax.default_matmul_precision(MATMUL_PRECISION):
        (cotangents, gates), weights = one_sequence(*run, local)
        for _ in range(batch_axes):
            weights = jax.tree.map(_sum_scaled, weights, is_leaf=_is_scaled)
    treedef = jax.tree.structure(state)
    flat = lambda x: LogScaled(x.mantissa[..., 0, :], x.exponent)
    tree = lambda rows: jax.tree.unflatten(treedef, [flat(block) for block in rows])
    return GradientFlow(
        loss=value,
        grads=jax.tree.map(logscaled.to_array, weights, is_leaf=_is_scaled),
        scaled_grads=weights,
        state_cotangents=StateCotangents(*map(tree, cotangents)),
        gate_cotangents=jax.tree.map(flat, gates, is_leaf=_is_scaled),
    )


def bptt(cell: Cell, params: Params, state: State, xs: Any, loss: StateLoss) -> GradientFlow:
    """Returns loss, gradients and ∂L/∂s_t of every step, split, by an explicit reverse scan in log space.

    Right also where a cotangent has left the range of the dtype on its way back.  Within training, ``jax.grad`` through
    :func:`rnngrad.unroll` with :func:`rnngrad.zero_taps` gives the same in plain numbers for nothing.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0; fields (N,) or (B, N).
      xs: inputs, (T, D) or (T, B, D).
      loss: maps the states s_1 … s_T, leading axis T, to a scalar.

    Returns:
      A :class:`GradientFlow`.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them, or a loss that is no scalar.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5, forget_bias=-9.0)  # forgets at once
    >>> xs = jax.random.normal(jax.random.key(1), (300, 3))
    >>> flow = rg.bptt(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, lambda states: states.c[-1].sum())
    >>> bool(rg.logscaled.log_max(flow.state_cotangents.total.c)[0] < -200)
    True
    """
    check_inputs(cell, params, state, xs, one_sequence=False)
    check_finite(params, state, xs)
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"bptt: expected real parameters, found complex ones (cell {cell.name!r})")
    value, local = local_cotangents(loss, unroll(cell, params, state, xs).states)
    return _flow(cell, params, state, xs, value, local)


# --- truncated -------------------------------------------------------------------------------------------------------


class TruncatedGradient(NamedTuple):
    """What :func:`truncated_bptt` returns."""

    loss: Array
    """L, of all steps."""
    grads: Params
    """The truncated gradient."""
    relative_error: Array
    """‖truncated − full‖ / ‖full‖ over all parameters; NaN when the full one is zero."""
    cosine: Array
    """Of the angle between the truncated gradient and the full one; NaN when one of them is zero."""


def truncated_bptt(
    cell: Cell, params: Params, state: State, xs: Any, loss: StateLoss, *, window: int, stride: int | None = None
) -> TruncatedGradient:
    """Returns the gradient of truncated back-propagation through time, and how far it is from the full one.

    The run is cut into blocks of ``stride`` steps.  What the loss takes from the states of a block goes back to the
    step that lies ``window`` steps before the block's end, and no further: BPTT(h; h') of Williams & Peng 1990 with
    h = ``window`` and h' = ``stride``.  With ``window`` = ``stride`` it is the usual training on windows with carried
    state; with ``window`` ≥ T it is the full gradient.

    Args:
      cell: the cell.
      params: its parameters, the same for all blocks.
      state: s_0.
      xs: inputs, (T, D) or (T, B, D).
      loss: maps the states s_1 … s_T to a scalar.
      window: steps that a gradient goes back.
      stride: steps of a block, at most ``window``; None for ``window``.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them, a loss that is no scalar, a cell without parameters, or
        not 1 ≤ ``stride`` ≤ ``window``.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (20, 3))
    >>> cut = rg.truncated_bptt(cell, params, cell.init_state(), xs, lambda states: states.h.sum(), window=5)
    >>> bool(0 < cut.relative_error < 1)
    True
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"truncated_bptt: expected 1 <= stride <= window, found stride {stride}, window {window}")
    num_steps = check_inputs(cell, params, state, xs, one_sequence=False)
    check_finite(params, state, xs)
    if not jax.tree.leaves(params):
        raise ValueError(f"truncated_bptt: cell {cell.name!r} has no parameters, so there is no gradient to compare")
    states, pull = jax.vjp(lambda params: unroll(cell, params, state, xs).states, params)
    value, local = local_cotangents(loss, states)
    (full,) = pull(local)

    window = min(window, num_steps)
    block_starts = jnp.arange(0, num_steps, stride)
    block_ends = jnp.minimum(block_starts + stride, num_steps)
    # every block is run over `window` steps: the first ones from s_0 on, past their end, where their loss takes nothing
    starts = jnp.maximum(block_ends - window, 0)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, states)

    def cut(tree, start):
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, window), tree)

    def own_share(start, first, end):
        steps = start + jnp.arange(window)
        inside = (steps >= first) & (steps < end)
        keep = lambda leaf: jnp.where(inside.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))
        return jax.tree.map(keep, cut(local, start))

    def blocks(params):
        one = lambda start: unroll(cell, params, jax.tree.map(lambda leaf: leaf[start], before), cut(xs, start)).states
        return jax.vmap(one)(starts)

    _, pull_blocks = jax.vjp(blocks, params)
    (truncated,) = pull_blocks(jax.vmap(own_share)(starts, block_starts, block_ends))
    # squares leave the range long before the gradients do
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves((full, truncated))])
    a, b = (jnp.concatenate([(leaf / largest).ravel() for leaf in jax.tree.leaves(tree)]) for tree in (truncated, full))
    size = jnp.linalg.norm(b)
    cosine = jnp.real(jnp.vdot(a, b)) / (jnp.linalg.norm(a) * size)
    return TruncatedGradient(value, truncated, jnp.linalg.norm(a - b) / size, cosine)


# --- forward in time -------------------------------------------------------------------------------------------------


class ForwardGradient(NamedTuple):
    """What :func:`rtrl` returns."""

    loss: Array
    """L."""
    grads: Params
    """∂L/∂params."""
    influence: Params
    """∂s_T/∂params: each parameter's shape behind the axis of the state's real entries, all fields in their order."""


def rtrl(cell: Cell, params: Params, state: State, xs: Any, loss: StateLoss) -> ForwardGradient:
    """Returns the gradient by real-time recurrent learning: ∂s_t/∂θ is carried forward in time.

    ::

        P_{t+1} = J_t P_t + ∂⁺s_{t+1}/∂θ,        ∂L/∂θ = Σ_t ∂L/∂s_t|local · P_t

    The reference for :func:`bptt`: the same sum in another order.  Memory and time per step grow with the number of
    states times the number of parameters, so it is for small networks.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence.
      xs: inputs, (T, D).
      loss: maps the states s_1 … s_T to a scalar.

    Raises:
      ValueError: inputs that do not fit, a batch, NaN or inf, or a loss that is no scalar.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.gru(2, 3)
    >>> xs = jax.random.normal(jax.random.key(1), (6, 2))
    >>> online = rg.rtrl(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, lambda states: states.h[-1].sum())
    >>> online.influence.w_hh.shape
    (3, 9, 3)
    """
    check_inputs(cell, params, state, xs, one_sequence=True)
    check_finite(params, state, xs)
    value, local = local_cotangents(loss, unroll(cell, params, state, xs).states)
    layout = layout_of(state)
    local_rows = jax.vmap(lambda cotangent: jnp.concatenate(_real(layout, cotangent)))(local)

    def move(params, blocks, x):
        return jnp.concatenate(layout.split(cell.step(params, layout.merge(blocks), x)[0]))

    def body(carry, inputs):
        blocks, influence, grads = carry
        x, local = inputs
        immediate, jacobian = jax.jacrev(move, argnums=(0, 1))(params, blocks, x)
        jacobian = jnp.concatenate(jacobian, axis=-1)
        influence = jax.tree.map(lambda p, i: jnp.tensordot(jacobian, p, 1) + i, influence, immediate)
        grads = jax.tree.map(lambda total, p: total + jnp.tensordot(local, p, 1), grads, influence)
        new = move(params, blocks, x)
        return (tuple(jnp.split(new, split_at)), influence, grads), None

    sizes = layout.sizes
    split_at = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    zeros = jax.tree.map(lambda leaf: jnp.zeros((sum(sizes), *leaf.shape), leaf.dtype), params)
    start = (layout.split(state), zeros, jax.tree.map(jnp.zeros_like, params))
    with jax.default_matmul_precision(MATMUL_PRECISION):
        (_, influence, grads), _ = jax.lax.scan(body, start, (xs, local_rows))
    return ForwardGradient(value, grads, influence)
