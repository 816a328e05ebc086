"""The one scan over time, and its derivative.

::

    z_t     = preactivate(params, s_t + gated_t, x_t) + z̃_t
    s_{t+1} = update(params, z_t, s_t + direct_t)

``direct``, ``gated`` and ``z̃`` are :class:`Taps`: zeros, at which ``jax.grad`` of any loss shows what reaches
s_t by the direct path, what reaches it through the gates, and ∂L/∂z_t.  The derivative of the scan is written as
::

    ż^w_t   = ∂preactivate/∂(params, x) · (ṗarams, ẋ_t)                all steps at once, before the scan
    ż_t     = ż^w_t + ∂preactivate/∂s · ṡ_t                            in the scan
    ṡ_{t+1} = ∂update/∂z · ż_t + ∂update/∂s · ṡ_t

which is the forward mode as it stands.  Transposed by JAX it is back-propagation through time whose reverse scan
moves nothing but cotangents; the weights' gradient is one product after it, of every ∂L/∂z_t with every [h_t, x_t],
over time and batch together.  States and pre-activations are kept from the forward pass; what ``update`` makes of them
is computed again.  Both modes, ``vmap`` and higher derivatives come from this one rule.

Where z is affine in the state (found out from the program of ``preactivate``, not declared), the inputs' share of every
z_t is one product before the forward scan.  A map without declared inputs is differentiated as JAX finds it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Var
from jaxtyping import Array, Bool

from rnngrad.types import Cell, Gates, Params, State, Trajectory, check_inputs, check_like, expected_of


class Taps(NamedTuple):
    """Zeros added inside a run; a gradient with respect to them is what the loss sends there.  Leading axis T.

    ∂L/∂s_t is the sum of ``direct[t]``, ``gated[t]`` and what the loss takes from s_t itself.
    """

    direct: State
    """Added to s_t where ``update`` reads it: gradients ∂L/∂s_{t+1} · D_t, the direct path."""
    gated: State
    """Added to s_t where ``preactivate`` reads it: gradients ∂L/∂s_{t+1} · G_t, through the gates."""
    z: Gates
    """Added to z_t as ``update`` reads it: gradients ∂L/∂z_t, gate by gate.

    What ``preactivate`` itself makes of a pre-activation (r of the GRU with reset before, the lower layers of a
    ``stack``) is part of ``gated``; :mod:`rnngrad.training` unrolls layer by layer, which shows every layer's gates.
    """


def zero_taps(cell: Cell, num_steps: int, batch_shape: tuple[int, ...] = ()) -> Taps:
    """Returns taps of zeros for a run of ``num_steps`` steps.

    Args:
      cell: the cell; one that declares its input size.
      num_steps: T.
      batch_shape: ``()`` for one sequence, ``(B,)`` for a batch.

    Raises:
      ValueError: ``num_steps`` below 1, or a map, whose state has no shape before one is given.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> params, state, xs = cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones((7, 3))
    >>> loss = lambda taps: rg.unroll(cell, params, state, xs, taps=taps).final.h.sum()
    >>> gradients = jax.grad(loss)(rg.zero_taps(cell, 7))
    >>> gradients.direct.c.shape, gradients.z.f.shape
    ((7, 5), (7, 5))
    """
    if num_steps < 1:
        raise ValueError(f"zero_taps: expected num_steps of at least 1, found {num_steps}")
    if cell.input_size is None:
        raise ValueError(
            f"zero_taps: cell {cell.name!r} has no shape of its own; make Taps of zeros shaped like your states"
        )
    params, state = expected_of(cell, batch_shape)
    x = jax.ShapeDtypeStruct((*batch_shape, cell.input_size), jnp.finfo(jax.tree.leaves(state)[0].dtype).dtype)
    z = jax.eval_shape(cell.preactivate, params, state, x)
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), tree)
    return Taps(zeros(state), zeros(state), zeros(z))


def unroll(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    taps: Taps | None = None,
    checkpoint_every: int | None = None,
) -> Trajectory:
    """Returns the states, gate activations and final state of ``cell`` run over ``xs``.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0; fields of shape (N,) for one sequence, (B, N) for a batch.
      xs: inputs of shape (T, D) or (T, B, D).
      taps: zeros (:func:`zero_taps`) to differentiate with respect to; see the module docstring.
      checkpoint_every: number of steps after which the state is kept for the reverse pass, which computes the steps
        between anew: memory for T / ``checkpoint_every`` states and the pre-activations of ``checkpoint_every`` steps
        in place of those of T, for one more forward pass.  None keeps all.

    Returns:
      A :class:`Trajectory` with leading axis T: ``states[t]`` is s_{t+1}, ``gates[t]`` the gates that made it.

    Raises:
      ValueError: shapes, dtypes or structures that do not fit, or T = 0; says what was expected and found.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (7, 2, 3))
    >>> rg.unroll(cell, cell.init(jax.random.key(0)), cell.init_state((2,)), xs).states.h.shape
    (7, 2, 5)
    """
    num_steps = check_inputs(cell, params, state, xs, one_sequence=False)
    if taps is not None:
        _check_taps(cell, params, state, xs, taps, num_steps)
    if checkpoint_every is None:
        return _run(cell, params, state, xs, taps)
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: expected at least 1, found {checkpoint_every}")

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(params, carry, inputs):
        states, gates, final = _run(cell, params, carry, *inputs)
        return final, (states, gates)

    whole = num_steps - num_steps % checkpoint_every
    in_chunks = lambda leaf: leaf[:whole].reshape((whole // checkpoint_every, checkpoint_every, *leaf.shape[1:]))
    joined = lambda leaf: leaf.reshape((whole, *leaf.shape[2:]))
    carry, outputs = jax.lax.scan(functools.partial(chunk, params), state, jax.tree.map(in_chunks, (xs, taps)))
    states, gates = jax.tree.map(joined, outputs)
    if whole < num_steps:
        carry, rest = chunk(params, carry, jax.tree.map(lambda leaf: leaf[whole:], (xs, taps)))
        states, gates = jax.tree.map(lambda *parts: jnp.concatenate(parts), (states, gates), rest)
    return Trajectory(states, gates, carry)


def _check_taps(cell: Cell, params: Params, state: State, xs: Any, taps: Taps, num_steps: int) -> None:
    first = jax.tree.map(lambda leaf: leaf[0], xs)
    z = jax.eval_shape(cell.preactivate, params, state, first)
    along = lambda leaf: jax.ShapeDtypeStruct((num_steps, *jnp.shape(leaf)), leaf.dtype)
    expected = Taps(*(jax.tree.map(along, tree) for tree in (state, state, z)))
    check_like(taps, expected, what="taps", hint=f" (cell {cell.name!r}, {num_steps} steps)", dtypes=True)


def _run(cell: Cell, params: Params, state: State, xs: Any, taps: Taps | None) -> Trajectory:
    if _has_a_rule(cell, params, state, xs):
        return _differentiable(cell, params, state, xs, taps)
    return _forward(cell, params, state, xs, taps)[0]


def _has_a_rule(cell: Cell, params: Params, state: State, xs: Any) -> bool:
    """Returns whether the derivative below applies; if not, that which JAX finds for the scan is right as well.

    It does not see traced values that the cell's functions close over, as those of a map may, and counts no integers
    among the pre-activations.
    """
    if cell.input_size is None:
        return False

    def step(params, state, x):
        z = cell.preactivate(params, state, x)
        return z, cell.update(params, z, state)[0]

    program = jax.make_jaxpr(step)(params, state, xs[0])
    z = program.out_avals[: -len(jax.tree.leaves(state))]
    is_closed = not any(isinstance(const, jax.core.Tracer) for const in program.consts)
    return is_closed and all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in z)


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward(cell: Cell, params: Params, state: State, xs: Any, taps: Taps | None) -> tuple[Trajectory, Gates]:
    """Returns the trajectory and the pre-activations of every step."""
    is_affine = reads_state_affinely(cell)
    if is_affine:
        # one zero state for all steps and sequences: its own product is a single matrix-vector one
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[xs.ndim - 2 :], leaf.dtype), state)
        at_zero = lambda x: cell.preactivate(params, zeros, x)
        for _ in range(xs.ndim - 1):
            at_zero = jax.vmap(at_zero)
        zs = at_zero(xs)
        share = zs if taps is None else _add(zs, taps.z)
    else:
        share = None if taps is None else taps.z

    def body(carry, inputs):
        x, share, taps = inputs
        direct, gated = (carry, carry) if taps is None else (_add(carry, tap) for tap in taps)
        z = _push_preactivate(cell, params, gated, x, gated)[1] if is_affine else cell.preactivate(params, gated, x)
        if share is not None:
            z = _add(share, z)
        new, gates = cell.update(params, z, direct)
        return new, (new, gates, z)

    pair = None if taps is None else (taps.direct, taps.gated)
    final, (states, gates, zs) = jax.lax.scan(body, state, (xs, share, pair))
    return Trajectory(states, gates, final), zs


def _push_preactivate(cell: Cell, params: Params, state: State, x: Any, tangent: State) -> tuple[Gates, Gates]:
    """Returns z and ∂preactivate/∂s · tangent."""
    return jax.jvp(lambda s: cell.preactivate(params, s, x), (state,), (tangent,))


_TRUE_TO_THEIR_DERIVATIVE = frozenset(
    "add broadcast_in_dim concatenate convert_element_type copy div dot_general mul neg pad reduce_sum reshape rev "
    "select_n slice split squeeze sub transpose".split()
)
"""What ``preactivate`` may do to the state for its derivative to tell all: ``stop_gradient`` or a rule of the user's
would hide a dependence."""


@functools.lru_cache(maxsize=256)
def reads_state_affinely(cell: Cell) -> bool:
    """Returns whether z(s, x) = z(0, x) + ∂z/∂s · s with the same ∂z/∂s at every state and input.

    Read off the programs of ``preactivate`` and of its derivative; where they do not tell, the answer is False.
    """
    if cell.input_size is None:
        return False
    params, state, x, _ = _shapes(cell)
    push = lambda state, x, params, tangent: _push_preactivate(cell, params, state, x, tangent)[1]
    if _uses(push, (state, x), (params, state)):
        return False
    program = jax.make_jaxpr(cell.preactivate)(params, state, x).jaxpr
    first = len(jax.tree.leaves(params))
    depends = set(program.invars[first : first + len(jax.tree.leaves(state))])
    for equation in program.eqns:
        if depends.intersection(var for var in equation.invars if isinstance(var, Var)):
            # of what becomes an integer or a truth value the derivative is 0
            is_inexact = all(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in equation.outvars)
            if equation.primitive.name not in _TRUE_TO_THEIR_DERIVATIVE or not is_inexact:
                return False
            depends.update(equation.outvars)
    return True


@functools.lru_cache(maxsize=256)
def _update_uses_params(cell: Cell) -> bool:
    params, state, _, z = _shapes(cell)
    return _uses(lambda params, z, state: cell.update(params, z, state), (params,), (z, state))


def _shapes(cell: Cell) -> tuple[Any, Any, Any, Any]:
    """Returns params, state, x and z of one step as shapes."""
    params, state = expected_of(cell, ())
    x = jax.ShapeDtypeStruct((cell.input_size,), jnp.finfo(jax.tree.leaves(state)[0].dtype).dtype)
    return params, state, x, jax.eval_shape(cell.preactivate, params, state, x)


def _uses(function: Any, watched: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Returns whether the program of ``function(*watched, *others)`` uses the watched arguments.

    A program called inside it counts as using all it is given: the answer may be a wrong True, never a wrong False.
    """
    program = jax.make_jaxpr(function)(*watched, *others).jaxpr
    used = {var for var in program.outvars if isinstance(var, Var)}
    for equation in reversed(program.eqns):
        if used.intersection(equation.outvars):
            used.update(var for var in equation.invars if isinstance(var, Var))
    return not used.isdisjoint(program.invars[: len(jax.tree.leaves(watched))])


# --- derivative ------------------------------------------------------------------------------------------------------

_differentiable = jax.custom_jvp(
    lambda cell, params, state, xs, taps: _forward(cell, params, state, xs, taps)[0], nondiff_argnums=(0,)
)


def _is_symbolic_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _is_zero(tangent: Any) -> bool:
    return all(map(_is_symbolic_zero, jax.tree.leaves(tangent, is_leaf=_is_symbolic_zero)))


def _filled(tangent: Any) -> Any:
    """Returns a tangent with its symbolic zeros made into arrays."""
    fill = lambda leaf: jnp.zeros(leaf.aval.shape, leaf.aval.dtype) if _is_symbolic_zero(leaf) else leaf
    return jax.tree.map(fill, tangent, is_leaf=_is_symbolic_zero)


def _derivative(cell: Cell, primals: Any, tangents: Any) -> tuple[Trajectory, Trajectory]:
    params, state, xs, taps = primals
    params_dot, state_dot, xs_dot, taps_dot = tangents
    trajectory, zs = _forward(cell, params, state, xs, taps)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), state, trajectory.states)
    heard = before if taps is None else _add(before, taps.gated)
    read = before if taps is None else _add(before, taps.direct)

    # What does not come from an earlier state's tangent: all steps in one product.
    parts = [] if taps_dot is None or _is_zero(taps_dot.z) else [_filled(taps_dot.z)]
    if not _is_zero(params_dot):
        every_z = lambda p: jax.vmap(lambda s, x: cell.preactivate(p, s, x))(heard, xs)
        parts.append(jax.jvp(every_z, (params,), (_filled(params_dot),))[1])
    if not _is_zero(xs_dot):
        every_z = lambda xs: jax.vmap(lambda s, x: cell.preactivate(params, s, x))(heard, xs)
        parts.append(jax.jvp(every_z, (xs,), (_filled(xs_dot),))[1])
    flat, unflat = _flattening(zs)
    sources = flat(functools.reduce(_add, parts)) if parts else None
    moved_by_params = None
    if not _is_zero(params_dot) and _update_uses_params(cell):
        every_update = lambda p: jax.vmap(lambda z, s: cell.update(p, z, s))(zs, read)
        moved_by_params = jax.jvp(every_update, (params,), (_filled(params_dot),))[1]
    pair = None if taps_dot is None else (_filled(taps_dot.direct), _filled(taps_dot.gated))

    # without this JAX would compute every factor of the derivative beforehand and keep them all
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(carry, inputs):
        x, heard, read, z, source, extra, taps_dot = inputs
        direct, gated = (carry, carry) if taps_dot is None else (_add(carry, tap) for tap in taps_dot)
        z_dot = _push_preactivate(cell, params, heard, x, gated)[1]
        if source is not None:
            z_dot = _add(unflat(source), z_dot)
        moved = jax.jvp(lambda z, s: cell.update(params, z, s), (z, read), (z_dot, direct))[1]
        if extra is not None:
            moved = _add(moved, extra)
        return moved[0], moved

    inputs = (xs, heard, read, zs, sources, moved_by_params, pair)
    final_dot, (states_dot, gates_dot) = jax.lax.scan(body, _filled(state_dot), inputs)
    return trajectory, Trajectory(states_dot, gates_dot, final_dot)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _flattening(zs: Gates) -> tuple[Any, Any]:
    """Returns how to put all gates into one array and how to take them out again.

    In one array their cotangent leaves the reverse scan as the operand of the weights' product; in several, a copy of
    all of them comes between (an eighth of the whole step's time at N = 512 on a CPU).  Gates of several dtypes, as in
    a stack of real and complex layers, stay apart.
    """
    leaves, treedef = jax.tree.flatten(zs)
    if len({(leaf.dtype, leaf.shape[:-1]) for leaf in leaves}) != 1:
        return lambda tree: tree, lambda tree: tree
    places = np.cumsum([leaf.shape[-1] for leaf in leaves])[:-1].tolist()
    flat = lambda tree: jnp.concatenate(jax.tree.leaves(tree), axis=-1)
    unflat = lambda array: jax.tree.unflatten(treedef, jnp.split(array, places, axis=-1))
    return flat, unflat


_differentiable.defjvp(_derivative, symbolic_zeros=True)


# --- the forward pass of a chain --------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Where a step Jacobian is taken; with a leading axis T, every step of a run."""

    state: State
    """The old state, s_t."""
    z: Gates
    """The pre-activations that the forward pass computed there."""
    x: Any
    """The input."""


class Run(NamedTuple):
    """A forward pass as the reverse scan needs it."""

    points: Point
    """Every step, leading axis T."""
    final: State
    """s_T."""


def run_forward(cell: Cell, params: Params, state: State, xs: Any) -> Run:
    """Returns the points of every step, with the pre-activations computed there, and the last state.

    Keeping z costs T times the gates in memory and spares the reverse scan two matrix-vector products per step.
    """

    def body(carry, x):
        z = cell.preactivate(params, carry, x)
        new, _ = cell.update(params, z, carry)
        return new, (carry, z)

    final, (states, zs) = jax.lax.scan(body, state, xs)
    return Run(Point(states, zs, xs), final)


def state_is_finite(run: Run) -> Bool[Array, " L"]:
    """Returns whether every entry of s_0 … s_T is finite, T + 1 flags."""
    flags = [
        jnp.append(jnp.all(jnp.isfinite(before), axis=tuple(range(1, before.ndim))), jnp.all(jnp.isfinite(last)))
        for before, last in zip(jax.tree.leaves(run.points.state), jax.tree.leaves(run.final), strict=True)
    ]
    return functools.reduce(jnp.logical_and, flags)
