r"""What else limits a gradient: gates at their rails, derivatives that are not the function's, rounding of the state.

::

    saturation        share of the units and steps of a gate that lie at one of its rails
    lost derivative   ‖∂s'_a/∂s_b · v‖ by automatic differentiation against central differences, v a random unit vector
    precision         distance of the states from those of the same weights in float32
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rnngrad.diagnose.result import LostDerivative, Precision, Saturation
from rnngrad.interop.adapted import Adapted, Pass, run
from rnngrad.types import Params, State, Trajectory, leaf_names
from rnngrad.unroll import unroll

LOW_PRECISION = ("bfloat16", "float16")
LOST = 0.1
"""Share of a difference from which its derivative counts as another: rounding in float32 makes some 10⁻⁴."""
NUM_DIRECTIONS = 8
"""Along which the derivative is compared: one may miss the units where it is lost."""


class Heard(NamedTuple):
    """One pass with its weights and what it hears, (T, B, D), in its own order of steps."""

    one: Pass
    params: Params
    xs: Array


def hear(adapted: Adapted, xs: Array) -> list[Heard]:
    """Returns every pass with what it hears when the model is run over ``xs``, (T, B, D)."""
    by_sequence = jax.vmap(lambda params, xs: run(adapted, params, xs)[1], in_axes=(None, 1), out_axes=1)
    heard = jax.jit(by_sequence)(adapted.params, xs)
    triples = zip(adapted.passes, sum(adapted.params, ()), sum(heard, ()), strict=True)
    return [Heard(*triple) for triple in triples]


@functools.partial(jax.jit, static_argnames=("one",))
def trajectories(one: Pass, params: Params, state: State, xs: Array) -> Trajectory:
    """Returns states and gates with leading axes (T, B)."""
    return jax.vmap(lambda xs: unroll(one.cell, params, state, xs), in_axes=1, out_axes=1)(xs)._replace(final=None)


@functools.partial(jax.jit, static_argnames=("one",))
def _rails(one: Pass, params: Params, state: State, x: Array) -> tuple[Any, Any]:
    """Returns what the gates are at pre-activations of −30 and 30, where σ and tanh are at their ends in any dtype."""
    z = jax.eval_shape(one.cell.preactivate, params, state, x)
    at = lambda value: one.cell.update(
        params, jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), z), state
    )[1]
    return at(-30.0), at(30.0)


def rail_distance(num_steps: int) -> float:
    """Returns how near a rail a gate counts as saturated, as a share of its range: min(10⁻², 1/(10 T)).

    A gate at distance δ lets at most δ through in each step, hence a tenth over the whole run.  A gate of a unit that
    is made to remember T steps (chrono: 1/T) lies ten times further away.
    """
    return min(1e-2, 0.1 / num_steps)


def saturation_of(one: Pass, params: Params, state: State, xs: Array, gates: Any) -> dict[str, Saturation]:
    """Returns the shares of units and steps at the lower and at the upper rail, of gates that have rails."""
    if gates is None or not one.has_split:
        return {}
    low, high = _rails(one, params, state, xs[0, 0])
    nearest = rail_distance(xs.shape[0])
    found = {}
    for name, values, bottom, top in zip(
        leaf_names(gates), *(jax.tree.leaves(tree) for tree in (gates, low, high)), strict=True
    ):
        if jnp.iscomplexobj(values):
            continue
        values, bottom, top = (np.asarray(leaf, np.float64) for leaf in (values, bottom, top))
        width = top - bottom
        # relu and the identity have no upper rail; a share f/(f + i) has none either, at equal pre-activations
        if not np.all((width > 1e-3) & (width < 2.5)):
            continue
        share = (values - bottom) / width
        found[name] = Saturation(
            float(np.mean(share < nearest)), float(np.mean(share > 1 - nearest)), float(values.mean())
        )
    return found


@functools.partial(jax.jit, static_argnames=("one",))
def _differences(one: Pass, params: Params, state: State, x: Array, key: Key[Array, ""]) -> tuple[Array, ...]:
    """Returns ‖∂s'_a/∂s_b v‖ by central differences and by the derivative, their distance, and the noise of the first.

    Each (directions, fields b, fields a): b is moved along a random unit vector, a answers.
    """
    leaves, treedef = jax.tree.flatten(state)
    step = lambda leaves: jax.tree.leaves(one.cell.step(params, jax.tree.unflatten(treedef, leaves), x)[0])
    norm = lambda leaf: jnp.sqrt(jnp.sum(jnp.square(jnp.abs(leaf))))

    def along(key, index):
        leaf = leaves[index]
        real = jnp.finfo(leaf.dtype)
        direction = jax.random.normal(key, leaf.shape, real.dtype).astype(leaf.dtype)
        direction = direction / norm(direction).astype(leaf.dtype)
        # the cube root balances the rounding of the difference against its curvature
        size = (real.eps ** (1 / 3) * (1 + norm(leaf))).astype(real.dtype)
        moved = size.astype(leaf.dtype) * direction
        only = lambda changed, others: [changed if i == index else other for i, other in enumerate(others)]
        _, by_rule = jax.jvp(step, (leaves,), (only(direction, [jnp.zeros_like(other) for other in leaves]),))
        up, down = step(only(leaf + moved, leaves)), step(only(leaf - moved, leaves))
        by_difference = [(a - b) / (2 * size).astype(a.dtype) for a, b in zip(up, down, strict=True)]
        return (
            jnp.stack([norm(d) for d in by_difference]),
            jnp.stack([norm(d) for d in by_rule]),
            jnp.stack([norm(d - e) for d, e in zip(by_difference, by_rule, strict=True)]),
            jnp.stack([real.eps * (1 + norm(a)) / size for a in up]),
        )

    def along_each(key):
        found = [along(jax.random.fold_in(key, index), index) for index in range(len(leaves))]
        return tuple(jnp.stack(part) for part in zip(*found, strict=True))

    return jax.vmap(along_each)(jax.random.split(key, NUM_DIRECTIONS))


def lost_derivative(
    one: Pass, params: Params, states: State, xs: Array, key: Key[Array, ""]
) -> tuple[LostDerivative, ...]:
    """Returns where the derivative that training sees is not that of the function, at three steps of one sequence.

    A block counts when along one of the directions, and at every one of the steps, the distance is above a tenth of the
    difference and above its noise.  What is returned is the direction with the largest share lost.
    """
    num_steps = xs.shape[0]
    at = sorted({num_steps // 3, num_steps // 2, num_steps - 2}) if num_steps > 3 else [num_steps - 1]
    found = []
    for t in at:
        state = jax.tree.map(lambda leaf, t=t: np.asarray(leaf)[max(t - 1, 0), 0], states)
        parts = _differences(one, params, state, np.asarray(xs)[t, 0], key)
        found.append([np.asarray(part, np.float64) for part in parts])
    differences, derivatives, distances, noises = (np.stack(parts) for parts in zip(*found, strict=True))
    is_lost = np.all(distances > np.maximum(LOST * differences, 30 * noises), axis=0)
    share = np.where(is_lost, np.median(distances / np.maximum(differences, noises), axis=0), -1.0)
    names = leaf_names(jax.tree.map(lambda leaf: leaf[0, 0], states))
    blocks = []
    for b, a in np.argwhere(is_lost.any(axis=0)):
        worst = int(np.argmax(share[:, b, a]))
        norms = (float(np.median(norm[:, worst, b, a])) for norm in (differences, derivatives))
        blocks.append(LostDerivative(names[a], names[b], *norms))
    return tuple(blocks)


def _float32(tree: Any) -> Any:
    widen = lambda leaf: leaf.astype(jnp.float32) if leaf.dtype.name in LOW_PRECISION else leaf
    return jax.tree.map(lambda leaf: widen(jnp.asarray(leaf)), tree)


def _rounded_leaves(one: Pass, params: Params, state: State, x: Array) -> tuple[str, ...]:
    """Returns the fields of the state that a step rounds to bfloat16 or float16, whatever dtype they are kept in."""
    step = lambda state: one.cell.step(params, state, x)[0]
    program = jax.make_jaxpr(step)(state)
    return tuple(name for name, out in zip(leaf_names(state), _low_outputs(program.jaxpr), strict=True) if out)


def _low_outputs(program: Any) -> list[bool]:
    """Returns for every output whether its own last operations, up to a product or a sum, are of low precision."""
    made_by = {out: equation for equation in program.eqns for out in equation.outvars}

    def is_low(var: Any) -> bool:
        if getattr(var.aval, "dtype", None) is not None and jnp.dtype(var.aval.dtype).name in LOW_PRECISION:
            return True
        equation = made_by.get(var) if not hasattr(var, "val") else None
        if equation is None:
            return False
        if equation.primitive.name in (
            "convert_element_type",
            "reshape",
            "broadcast_in_dim",
            "squeeze",
            "copy",
            "transpose",
        ):
            return is_low(equation.invars[0])
        if equation.primitive.name == "reduce_precision":
            return bool(equation.params["mantissa_bits"] < 16)
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            return _low_outputs(inner)[equation.outvars.index(var)]
        return False

    return [is_low(var) for var in program.outvars]


def precision_of(given: Heard, states: State | None) -> Precision:
    """Returns what the rounding of the state costs over the run; ``states`` are those of the same weights in float32.

    None where the step rounds by itself, so that nothing is known.
    """
    one, params, xs = given
    state = one.cell.init_state()
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in jax.tree.leaves(state)}))
    rounded = _rounded_leaves(one, params, state, xs[0, 0])
    if not rounded or states is None:
        return Precision(dtypes, rounded, math.nan)
    own = trajectories(one, params, state, xs).states
    ends = [
        tuple(np.asarray(leaf[-1], np.float64) for leaf in pair)
        for pair in zip(jax.tree.leaves(own), jax.tree.leaves(states), strict=True)
    ]
    if not all(np.isfinite(own).all() for own, _ in ends):
        return Precision(dtypes, rounded, math.inf)
    tiny = np.finfo(np.float64).tiny
    far = [float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), tiny) for a, b in ends]
    return Precision(dtypes, rounded, max(far))


def _wide_pass(one: Pass) -> Pass:
    """Returns the pass with a state in float32; what dtype a cell computes in follows its arguments."""
    cell = one.cell._replace(
        init=lambda key: _float32(one.cell.init(key)),
        init_state=lambda batch_shape=(): _float32(one.cell.init_state(batch_shape)),
    )
    return one._replace(cell=cell, parts=tuple(map(_wide_pass, one.parts)))


def widened(adapted: Adapted, xs: Array) -> tuple[Adapted, Array, list[Heard]] | None:
    """Returns model, inputs and what every pass hears in float32.

    None if nothing is narrower, or if a step rounds by itself.
    """
    if not any(leaf.dtype.name in LOW_PRECISION for leaf in jax.tree.leaves((adapted.params, xs))):
        return None
    wide = adapted._replace(
        layers=tuple(tuple(map(_wide_pass, layer)) for layer in adapted.layers), params=_float32(adapted.params)
    )
    xs = _float32(xs)
    every = hear(wide, xs)
    for heard in every:
        state = heard.one.cell.init_state()
        moved = jax.eval_shape(
            lambda p, s, x, one=heard.one: one.cell.step(p, s, x)[0], heard.params, state, heard.xs[0, 0]
        )
        if any(leaf.dtype.name in LOW_PRECISION for leaf in jax.tree.leaves(moved)):
            return None
        if _rounded_leaves(heard.one, heard.params, state, heard.xs[0, 0]):
            return None
    return wide, xs, every
