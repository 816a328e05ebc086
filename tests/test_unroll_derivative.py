"""The derivative that ``unroll`` carries, and its taps, against plain scans differentiated as JAX finds them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import rnngrad as rg
from rnngrad.unroll import reads_state_affinely
from tests.cases import CASES, example, rows

# float64, six steps: sums of a few hundred products in another order
EXACT = {"rtol": 1e-11, "atol": 1e-13}
some_cells_fast = rows(CASES, fast=("lstm", "gru_before", "lru"))


def plain(cell, params, state, xs, taps=None):
    """The same run as a plain scan, which JAX differentiates by itself."""

    def body(carry, inputs):
        x, tap = inputs
        if tap is None:
            new, gates = cell.step(params, carry, x)
        else:
            z = cell.preactivate(params, jax.tree.map(jnp.add, carry, tap.gated), x)
            z = jax.tree.map(jnp.add, z, tap.z)
            new, gates = cell.update(params, z, jax.tree.map(jnp.add, carry, tap.direct))
        return new, (new, gates)

    final, (states, gates) = jax.lax.scan(body, state, (xs, taps))
    return rg.Trajectory(states, gates, final)


def score(trajectory):
    """A loss that every state, gate and the final state enter, each with a weight of its own."""
    total = jnp.zeros((), jnp.float64)
    for index, leaf in enumerate(jax.tree.leaves(trajectory)):
        wave = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float64) + index).reshape(leaf.shape)
        total = total + jnp.sum(wave * jnp.tanh(leaf.real)) + jnp.sum(wave**2 * leaf.imag)
    return total


def batch_of(ex, size=2):
    states = jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + b) for b in range(size)]), ex.state)
    xs = jnp.stack([ex.xs * (1 - b) + 0.3 * b for b in range(size)], axis=1)
    return states, xs


def random_taps(cell, num_steps, batch_shape=()):
    leaves, treedef = jax.tree.flatten(rg.zero_taps(cell, num_steps, batch_shape))
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return treedef.unflatten(
        [0.3 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )


def close(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **(tolerance or EXACT))


@some_cells_fast
def test_value_and_gradients_equal_the_plain_scan_in_batch_with_taps(name, x64):
    ex = example(name, dtype="float64")
    states, xs = batch_of(ex)
    taps = random_taps(ex.cell, len(xs), (2,))

    @functools.partial(jax.jit, static_argnums=0)
    def both(run, params, states, xs, taps):
        return jax.value_and_grad(lambda *a: score(run(ex.cell, *a)), argnums=(0, 1, 2, 3))(params, states, xs, taps)

    ours = both(lambda c, p, s, x, t: rg.unroll(c, p, s, x, taps=t), ex.params, states, xs, taps)
    close(ours, both(plain, ex.params, states, xs, taps))


@some_cells_fast
def test_forward_mode_equals_the_plain_scan(name, x64):
    ex = example(name, dtype="float64")
    point = (ex.params, ex.state, ex.xs)
    tangent = jax.tree.map(
        lambda leaf: jnp.sin(jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape).astype(leaf.dtype), point
    )
    ours = jax.jit(lambda p, t: jax.jvp(lambda *a: rg.unroll(ex.cell, *a), p, t))(point, tangent)
    close(ours, jax.jit(lambda p, t: jax.jvp(lambda *a: plain(ex.cell, *a), p, t))(point, tangent))


@pytest.mark.slow
def test_jacfwd_jacrev_and_hessian(x64):
    ex = example("lstm", dtype="float64", num_steps=4)
    end = lambda run, h: run(ex.cell, ex.params, ex.state._replace(h=h), ex.xs).final.c
    ours = functools.partial(end, rg.unroll)
    close(jax.jacfwd(ours)(ex.state.h), jax.jacrev(ours)(ex.state.h))
    square = lambda run, h: jnp.sum(jnp.square(end(run, h)))
    expected = jax.hessian(functools.partial(square, plain))(ex.state.h)
    assert np.abs(expected).max() > 1e-3  # second derivatives that are there at all
    close(jax.hessian(functools.partial(square, rg.unroll))(ex.state.h), expected)
    close(jax.jacrev(jax.grad(functools.partial(square, rg.unroll)))(ex.state.h), expected)


@pytest.mark.parametrize("name", [pytest.param("lstm", marks=pytest.mark.slow), "gru_after"])
def test_under_vmap_over_sequences_and_over_networks(name, x64):
    ex = example(name, dtype="float64")
    states, xs = batch_of(ex)
    gradient = lambda run: jax.grad(lambda p, s, x: score(run(ex.cell, p, s, x)))
    over_sequences = lambda run: jax.vmap(gradient(run), in_axes=(None, 0, 1))(ex.params, states, xs)
    close(over_sequences(rg.unroll), over_sequences(plain))
    networks = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), ex.params)
    over_networks = lambda run: jax.vmap(gradient(run), in_axes=(0, None, None))(networks, ex.state, ex.xs)
    close(over_networks(rg.unroll), over_networks(plain))


@pytest.mark.parametrize("every", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 6, 100))])
def test_checkpointed_run_is_the_same(every, x64):
    """6 steps in chunks of 1, 2, 4 (which leaves 2), 6 and one chunk longer than the run."""
    ex = example("lstm", dtype="float64")
    taps = rg.zero_taps(ex.cell, 6)

    def both(options):
        run = lambda params, taps: score(rg.unroll(ex.cell, params, ex.state, ex.xs, taps=taps, **options))
        return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(ex.params, taps)

    close(both({"checkpoint_every": every}), both({}))


@pytest.mark.compiled
def test_checkpointed_run_needs_less_memory():
    cell = rg.cells.lstm(8, 64)
    params, state, xs = cell.init(jax.random.key(0)), cell.init_state(), jnp.ones((1024, 8))

    def megabytes(every):
        loss = lambda params: jnp.sum(rg.unroll(cell, params, state, xs, checkpoint_every=every).final.h)
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes / 1e6

    # z alone takes 1024 · 256 · 4 bytes = 1 MB and its cotangent another; of 32 steps they take a 32nd
    assert megabytes(None) > 2
    assert megabytes(32) < 0.2 * megabytes(None)


def _scans(program):
    for equation in program.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _scans(inner)


@pytest.mark.parametrize("name", ["lstm", "peephole_lstm", "gru_after", "gru_before", "indrnn_relu", "stack"])
def test_reverse_scan_moves_only_cotangents(name):
    """No array in the shape of a weight is carried through time, by whatever scan; in the plain scan's there is one."""
    ex = example(name)
    states, xs = batch_of(ex, size=7)  # 7 is no size of a weight
    weights = {leaf.shape for leaf in jax.tree.leaves(ex.params)}

    def carried(run):
        loss = lambda params: jnp.sum(jax.tree.leaves(run(ex.cell, params, states, xs).states)[0])
        program = jax.make_jaxpr(jax.grad(loss))(ex.params).jaxpr
        for scan in _scans(program):
            first, number = scan.params["num_consts"], scan.params["num_carry"]
            yield from (var.aval.shape for var in scan.invars[first : first + number])

    assert weights.isdisjoint(carried(rg.unroll))
    assert not weights.isdisjoint(carried(plain))


@rows(CASES)
def test_affine_cells_are_recognised(name):
    assert reads_state_affinely(example(name).cell) == CASES[name].is_affine


def test_a_hidden_dependence_on_the_state_is_seen(x64):
    """The derivative of a stopped gradient is 0, its value is not: z(0, x) + ∂z/∂s · s would be wrong."""
    ex = example("lstm", dtype="float64")
    stop = lambda state: state._replace(h=jax.lax.stop_gradient(state.h))
    cell = ex.cell._replace(preactivate=lambda params, s, x: ex.cell.preactivate(params, stop(s), x))
    assert not reads_state_affinely(cell)
    close(rg.unroll(cell, ex.params, ex.state, ex.xs), plain(ex.cell, ex.params, ex.state, ex.xs))
    gradient = lambda run: jax.grad(lambda p: score(run(cell, p, ex.state, ex.xs)))(ex.params)
    close(gradient(rg.unroll), gradient(plain))


@some_cells_fast
def test_taps_split_the_gradient_of_every_state(name, x64):
    """Against ∂L/∂s_t by running the rest of the sequence anew from s_t, and D, G of the step by ``jax.vjp``."""
    ex = example(name, dtype="float64")
    cell, params = ex.cell, ex.params
    states = rg.unroll(cell, params, ex.state, ex.xs).states
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), ex.state, states)
    at = lambda tree, t: jax.tree.map(lambda leaf: leaf[t], tree)
    waves = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(0.0, leaf.size)).reshape(leaf.shape), states)

    def local(wave, state):
        pairs = zip(jax.tree.leaves(wave), jax.tree.leaves(state), strict=True)
        return sum(jnp.sum(w * jnp.tanh(s.real)) + jnp.sum(w * s.imag) for w, s in pairs)

    def rest(t, state):
        """The loss of s_{t+1} … s_T as a function of s_t."""
        total = jnp.zeros(())
        for k in range(t, len(ex.xs)):
            state, _ = cell.step(params, state, ex.xs[k])
            total = total + local(at(waves, k), state)
        return total

    def loss(taps):
        run = rg.unroll(cell, params, ex.state, ex.xs, taps=taps).states
        return sum(local(at(waves, k), at(run, k)) for k in range(len(ex.xs)))

    found = jax.jit(jax.grad(loss))(rg.zero_taps(cell, len(ex.xs)))
    last = len(ex.xs) - 1
    for t in (0, 2, last):
        total = jax.jit(functools.partial(jax.grad(rest, argnums=1), t))(at(before, t))
        close(jax.tree.map(jnp.add, at(found.direct, t), at(found.gated, t)), total)
        # δ_{t+1}: what comes later and what the loss takes from s_{t+1} itself
        delta = jax.grad(functools.partial(local, at(waves, t)))(at(before, t + 1))
        if t < last:
            later = jax.tree.map(jnp.add, at(found.direct, t + 1), at(found.gated, t + 1))
            delta = jax.tree.map(jnp.add, delta, later)
        z = cell.preactivate(params, at(before, t), ex.xs[t])
        _, pull = jax.vjp(lambda z, s: cell.update(params, z, s)[0], z, at(before, t))
        z_bar, direct = pull(delta)
        close((at(found.z, t), at(found.direct, t)), (z_bar, direct))


def test_taps_are_added_where_they_say(x64):
    """Taps that are not zero, against central differences of the loss in each of them."""
    ex = example("lstm", dtype="float64", num_steps=3)
    loss = jax.jit(lambda taps: score(rg.unroll(ex.cell, ex.params, ex.state, ex.xs, taps=taps)))
    taps = random_taps(ex.cell, 3)
    flat, unflatten = ravel_pytree(taps)
    steps = 1e-6 * jnp.eye(len(flat))
    differences = jax.vmap(lambda d: (loss(unflatten(flat + d)) - loss(unflatten(flat - d))) / 2e-6)(steps)
    # second-order error 1e-12, round-off 1e-16 / 1e-6 times a loss of order 10
    np.testing.assert_allclose(ravel_pytree(jax.grad(loss)(taps))[0], differences, atol=3e-8)


def test_map_cells_may_close_over_what_is_differentiated(x64):
    def last(rate):
        logistic = rg.map_cell(lambda s, x: rate * s * (1 - s))
        return rg.unroll(logistic, None, jnp.full((1,), 0.3), jnp.zeros((5, 0))).final[0]

    difference = (last(3.2 + 1e-6) - last(3.2 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(last)(3.2), difference, rtol=1e-7)


def test_compiles_once():
    ex = example("gru_after")
    traced = []

    @jax.jit
    def step(params, taps):
        traced.append(1)
        return jax.grad(lambda p, t: jnp.sum(rg.unroll(ex.cell, p, ex.state, ex.xs, taps=t).final.h), (0, 1))(
            params, taps
        )

    for scale in (1.0, 2.0):
        step(jax.tree.map(lambda leaf, scale=scale: scale * leaf, ex.params), rg.zero_taps(ex.cell, 6))
    assert len(traced) == 1


def test_bad_taps_are_refused():
    ex = example("lstm")
    with pytest.raises(ValueError, match=r"taps.direct.h: expected float32\[6, 4\], found float32\[5, 4\]"):
        rg.unroll(ex.cell, ex.params, ex.state, ex.xs, taps=rg.zero_taps(ex.cell, 5))
    gates = rg.zero_taps(example("gru_after").cell, 6).z
    with pytest.raises(ValueError, match="taps has the wrong structure"):
        rg.unroll(ex.cell, ex.params, ex.state, ex.xs, taps=rg.zero_taps(ex.cell, 6)._replace(z=gates))
    with pytest.raises(ValueError, match="num_steps of at least 1, found 0"):
        rg.zero_taps(ex.cell, 0)
    with pytest.raises(ValueError, match="make Taps of zeros shaped like your states"):
        rg.zero_taps(rg.map_cell(lambda s, x: s), 3)
    with pytest.raises(ValueError, match="checkpoint_every: expected at least 1, found 0"):
        rg.unroll(ex.cell, ex.params, ex.state, ex.xs, checkpoint_every=0)


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np, rnngrad as rg
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
assert len(jax.devices()) == 4
cell = rg.cells.lstm(3, 5)
params = cell.init(jax.random.key(0))
xs = jax.random.normal(jax.random.key(1), (6, 8, 3))
state = cell.init_state((8,))
def loss(params, taps, xs, state):
    return jnp.sum(jnp.sin(rg.unroll(cell, params, state, xs, taps=taps).states.h))
step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
taps = rg.zero_taps(cell, 6, (8,))
alone = step(params, taps, xs, state)
mesh = Mesh(np.array(jax.devices()), ("data",))
put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
args = put(params, P()), put(taps, P(None, "data")), put(xs, P(None, "data")), put(state, P("data"))
for one, other in zip(jax.tree.leaves(step(*args)), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)  # sums over the batch in another order
text = step.lower(*args).compile().as_text()
# every weight's gradient is summed over devices once, after the scan: nothing is exchanged inside a loop
names = re.findall(r"body=(%[^,\\s]+)", text)
bodies = [part for part in text.split("\\n\\n") if part.split(" ")[0] in names]
assert len(bodies) == 2 and not any("all-reduce" in body or "all-gather" in body for body in bodies), names
assert "all-reduce" in text
print("ok")
"""


@pytest.mark.compiled
@pytest.mark.slow
def test_sharded_over_the_batch():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("gru_before", "stack")])
def test_checkpointed_batch_of_a_cell_that_is_not_affine(name, x64):
    ex = example(name, dtype="float64", num_steps=5)
    states, xs = batch_of(ex)
    taps = random_taps(ex.cell, 5, (2,))

    def both(options):
        run = lambda *a: score(rg.unroll(ex.cell, *a[:3], taps=a[3], **options))
        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3)))(ex.params, states, xs, taps)

    close(both({"checkpoint_every": 2}), both({}))


def test_checkpointed_map(x64):
    decay = rg.map_cell(lambda s, x: 0.9 * s)
    run = lambda s: rg.unroll(decay, None, s, jnp.zeros((5, 0)), checkpoint_every=2).final
    np.testing.assert_allclose(jax.jacrev(run)(jnp.ones(2)), 0.9**5 * np.eye(2), rtol=1e-14)


@pytest.mark.slow
def test_taps_under_vmap_and_linearize(x64):
    ex = example("gru_after", dtype="float64", num_steps=4)
    gradient = lambda taps: jax.grad(lambda t: score(rg.unroll(ex.cell, ex.params, ex.state, ex.xs, taps=t)))(taps)
    taps = [rg.zero_taps(ex.cell, 4), random_taps(ex.cell, 4)]
    mapped = jax.vmap(gradient)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *taps))
    for index, one in enumerate(taps):
        close(jax.tree.map(lambda leaf, i=index: leaf[i], mapped), gradient(one))
    run = lambda params: rg.unroll(ex.cell, params, ex.state, ex.xs).states
    direction = jax.tree.map(jnp.ones_like, ex.params)
    close(jax.linearize(run, ex.params)[1](direction), jax.jvp(run, (ex.params,), (direction,))[1])


@pytest.mark.slow
def test_second_derivatives_in_parameters_and_taps(x64):
    ex = example("vanilla_tanh", dtype="float64", num_steps=3)

    def both(run):
        def loss(params, taps):
            return score(run(ex.cell, params, ex.state, ex.xs, taps))

        pushed = lambda p, t: jax.jvp(
            lambda *a: jax.grad(loss, (0, 1))(*a), (p, t), (p, jax.tree.map(jnp.ones_like, t))
        )
        return pushed(ex.params, rg.zero_taps(ex.cell, 3))[1]

    close(both(lambda c, p, s, x, t: rg.unroll(c, p, s, x, taps=t)), both(plain))


def test_a_state_made_an_integer_is_seen():
    """The derivative of a rounding is 0, its value is not."""
    ex = example("lstm")
    rounded = lambda state: state._replace(h=state.h.astype(jnp.int32).astype(state.h.dtype))
    cell = ex.cell._replace(preactivate=lambda params, s, x: ex.cell.preactivate(params, rounded(s), x))
    assert not reads_state_affinely(cell)
    state = ex.state._replace(h=jnp.array([2.5, -1.2, 3.0, 0.7]))
    close(rg.unroll(cell, ex.params, state, ex.xs), plain(cell, ex.params, state, ex.xs), rtol=2e-6, atol=1e-6)


def test_cells_may_close_over_what_is_differentiated(x64):
    ex = example("lstm", dtype="float64")

    def loss(run, scale):
        louder = lambda params, z, state: ex.cell.update(params, jax.tree.map(lambda leaf: scale * leaf, z), state)
        return score(run(ex.cell._replace(update=louder), ex.params, ex.state, ex.xs))

    for scale in (1.0, 0.3):
        found = jax.grad(functools.partial(loss, rg.unroll))(scale)
        np.testing.assert_allclose(found, jax.grad(functools.partial(loss, plain))(scale), rtol=1e-12)
        assert found != 0


def test_preactivations_may_hold_truth_values(x64):
    ex = example("vanilla_tanh", dtype="float64")
    cell = ex.cell._replace(
        preactivate=lambda params, s, x: (ex.cell.preactivate(params, s, x), s.h > 0),
        update=lambda params, z, s: ex.cell.update(
            params, jax.tree.map(lambda leaf: jnp.where(z[1], leaf, 0.5 * leaf), z[0]), s
        ),
    )
    gradient = lambda run: jax.grad(lambda p: score(run(cell, p, ex.state, ex.xs).states))(ex.params)
    close(gradient(rg.unroll), gradient(plain))


def test_bfloat16_gradients_follow_float32():
    ex = example("lstm", dtype="bfloat16")
    wide = example("lstm")
    loss = lambda cell, params, state, xs, taps: jnp.sum(rg.unroll(cell, params, state, xs, taps=taps).final.h)
    found = jax.grad(functools.partial(loss, ex.cell), (0, 3))(ex.params, ex.state, ex.xs, rg.zero_taps(ex.cell, 6))
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    arguments = (cast(ex.params), cast(ex.state), cast(ex.xs), rg.zero_taps(wide.cell, 6))
    expected = jax.grad(functools.partial(loss, wide.cell), (0, 3))(*arguments)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.bfloat16
        # 8 bits, a dozen roundings, against the largest entry
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0, atol=0.05 * np.abs(other).max())


def test_zero_taps_follow_the_users_precision():
    """A float64 cell first used without 64 bits, as in a notebook that switches them on later."""
    cell = rg.cells.vanilla(2, 3, dtype="float64")
    with pytest.warns(UserWarning, match="float64"):
        assert rg.zero_taps(cell, 2).direct.h.dtype == jnp.float32
    with jax.enable_x64(True):
        assert rg.zero_taps(cell, 2).direct.h.dtype == jnp.float64
