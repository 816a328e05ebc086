"""What every cell owes: the contract of CONTRIBUTING.md, over the whole table."""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad.jacobians import layout_of, step_pulls
from tests.cases import CASES, INPUT_SIZE, example
from tests.oracles import DIRECTS, JACOBIANS, ORACLES

every_cell = pytest.mark.parametrize("name", CASES)
with_oracle = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_oracle])

# float64: a step is a few dozen roundings of size 1.1e-16 on numbers of order 1.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def _as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def _flat(cell_state):
    return layout_of(cell_state).flatten(cell_state)


def _split(ex):
    """Returns D, G and J of the first step as matrices."""
    layout = layout_of(ex.state)
    pulls = step_pulls(ex.cell, ex.params, ex.state, ex.xs[0], layout)
    eye = jnp.eye(sum(layout.sizes), dtype=ex.xs.dtype)
    return pulls.direct(eye), pulls.gated(eye), pulls.full(eye)


@with_oracle
def test_step_equals_numpy_oracle(name, x64):
    ex = example(name, dtype=jnp.float64)
    found, _ = ex.cell.step(ex.params, ex.state, ex.xs[0])
    expected = ORACLES[name](_as_numpy(ex.params), _as_numpy(ex.state), np.asarray(ex.xs[0]))
    assert set(expected) == set(found._fields)
    for field, value in expected.items():
        np.testing.assert_allclose(getattr(found, field), value, **EXACT)


@every_cell
def test_scan_equals_python_loop(name, x64):
    ex = example(name, dtype=jnp.float64)
    traj = rg.unroll(ex.cell, ex.params, ex.state, ex.xs)
    state = ex.state
    for t, x in enumerate(ex.xs):
        state, gates = ex.cell.step(ex.params, state, x)
        at_t = jax.tree.map(lambda leaf, t=t: leaf[t], (traj.states, traj.gates))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), at_t, (state, gates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), traj.final, state)


@every_cell
def test_jit_changes_nothing(name, x64):
    ex = example(name, dtype=jnp.float64)
    plain = rg.unroll(ex.cell, ex.params, ex.state, ex.xs)
    jitted = jax.jit(rg.unroll, static_argnums=0)(ex.cell, ex.params, ex.state, ex.xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), plain, jitted)


@every_cell
def test_batch_equals_vmap(name, x64):
    ex = example(name, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(7), (5, 2, INPUT_SIZE), jnp.float64)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), ex.state)
    batched = rg.unroll(ex.cell, ex.params, states, xs)
    mapped = jax.vmap(lambda s, x: rg.unroll(ex.cell, ex.params, s, x), in_axes=(0, 1))(states, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.swapaxes(b, 0, 1), **EXACT), batched.states, mapped.states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), batched.final, mapped.final)
    assert jax.tree.leaves(ex.cell.init_state((2,)))[0].shape[0] == 2


@every_cell
def test_direct_and_gated_add_up_to_the_step_jacobian(name, x64):
    direct, gated, full = _split(example(name, dtype=jnp.float64))
    np.testing.assert_allclose(direct + gated, full, **EXACT)


@every_cell
def test_step_jacobian_equals_autodiff_of_step(name, x64):
    ex = example(name, dtype=jnp.float64)
    layout = layout_of(ex.state)

    def step(v):
        return layout.flatten(ex.cell.step(ex.params, layout.unflatten(v), ex.xs[0])[0])

    _, _, full = _split(ex)
    np.testing.assert_allclose(full, jax.jacfwd(step)(layout.flatten(ex.state)), **EXACT)
    np.testing.assert_allclose(full, rg.step_jacobians(ex.cell, ex.params, ex.state, ex.xs)[0], **EXACT)


@with_oracle
def test_step_jacobian_equals_closed_form(name, x64):
    ex = example(name, dtype=jnp.float64)
    direct, _, full = _split(ex)
    arguments = _as_numpy(ex.params), _as_numpy(ex.state), np.asarray(ex.xs[0])
    np.testing.assert_allclose(full, JACOBIANS[name](*arguments), **EXACT)
    np.testing.assert_allclose(direct, DIRECTS[name](*arguments), **EXACT)


@every_cell
def test_step_jacobian_equals_central_differences(name, x64):
    # central differences of step 1e-6: truncation 1e-12, round-off 1e-16/1e-6 = 1e-10, times a small factor
    ex = example(name, dtype=jnp.float64)
    layout = layout_of(ex.state)
    at = np.asarray(layout.flatten(ex.state))
    step = jax.jit(lambda v: layout.flatten(ex.cell.step(ex.params, layout.unflatten(v), ex.xs[0])[0]))
    columns = [(step(at + d) - step(at - d)) / 2e-6 for d in 1e-6 * np.eye(len(at))]
    np.testing.assert_allclose(_split(ex)[2], np.stack(columns, axis=1), rtol=0, atol=2e-9)


@every_cell
def test_chain_equals_jacfwd_through_the_unroll(name, x64):
    ex = example(name, dtype=jnp.float64)
    layout = layout_of(ex.state)
    chain = rg.jacobian_chain(ex.cell, ex.params, ex.state, ex.xs)
    for k in (0, 2, len(ex.xs) - 1):
        start = ex.state if k == 0 else rg.unroll(ex.cell, ex.params, ex.state, ex.xs[:k]).final
        end = lambda v, k=k: layout.flatten(rg.unroll(ex.cell, ex.params, layout.unflatten(v), ex.xs[k:]).final)
        expected = jax.jacfwd(end)(layout.flatten(start))
        found = rg.logscaled.to_array(jax.tree.map(lambda leaf, k=k: leaf[k], chain))
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-14)


@every_cell
def test_chain_equals_product_of_step_jacobians_newest_on_the_left(name, x64):
    ex = example(name, dtype=jnp.float64)
    jacobians = np.asarray(rg.step_jacobians(ex.cell, ex.params, ex.state, ex.xs))
    chain = rg.logscaled.to_array(rg.jacobian_chain(ex.cell, ex.params, ex.state, ex.xs))
    product = np.eye(jacobians.shape[-1])
    for k in reversed(range(len(jacobians))):
        product = product @ jacobians[k]
        np.testing.assert_allclose(chain[k], product, rtol=1e-11, atol=1e-14)
    np.testing.assert_array_equal(chain[-1], np.eye(jacobians.shape[-1]))


@every_cell
def test_chain_carries_the_loss_gradient(name, x64):
    """∂L/∂s_0 of a scalar loss equals its cotangent at s_T times the chain, and finite differences."""
    ex = example(name, dtype=jnp.float64)
    layout = layout_of(ex.state)
    weights = jnp.cos(jnp.arange(sum(layout.sizes), dtype=jnp.float64))

    def loss(v):
        end = layout.flatten(rg.unroll(ex.cell, ex.params, layout.unflatten(v), ex.xs).final)
        return jnp.sum(weights * jnp.tanh(end))

    at = layout.flatten(ex.state)
    end = layout.flatten(rg.unroll(ex.cell, ex.params, ex.state, ex.xs).final)
    cotangent = weights * (1 - jnp.tanh(end) ** 2)
    chain = rg.jacobian_chain(ex.cell, ex.params, ex.state, ex.xs)
    explicit = cotangent @ rg.logscaled.to_array(jax.tree.map(lambda leaf: leaf[0], chain))
    np.testing.assert_allclose(explicit, jax.grad(loss)(at), rtol=1e-11, atol=1e-14)
    direction = np.sin(1.0 + np.arange(len(at)))
    difference = (loss(at + 1e-6 * direction) - loss(at - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(np.dot(explicit, direction), difference, rtol=0, atol=2e-9)


@every_cell
def test_float32_follows_float64(name):
    # 12 steps of a cell with a dozen float32 roundings (6e-8) each; measured differences stay below 1e-5 nats
    single = example(name, num_steps=12)
    curve32 = rg.retention(single.cell, single.params, single.state, single.xs)
    assert curve32.certificate.dtype == "float32"
    with jax.enable_x64(True):
        double = example(name, num_steps=12, dtype=jnp.float64)
        wide = lambda leaf: leaf.astype(jnp.complex128 if jnp.iscomplexobj(leaf) else jnp.float64)
        params, state, xs = jax.tree.map(wide, (single.params, single.state, single.xs))
        curve64 = rg.retention(double.cell, params, state, xs)
        assert curve64.certificate.dtype == "float64"
    np.testing.assert_allclose(curve32.log_norm, curve64.log_norm, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "lru"])
def test_bfloat16_runs_and_follows(name):
    # bfloat16 keeps 8 bits: 0.4 % per rounding; 6 steps of a few roundings each stay within 0.15 nats here
    wide, narrow = example(name), example(name, dtype=jnp.bfloat16)
    params, state, xs = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (wide.params, wide.state, wide.xs))
    curve = rg.retention(narrow.cell, params, state, xs)
    assert curve.certificate.dtype == "bfloat16"
    expected = rg.retention(wide.cell, wide.params, wide.state, wide.xs).log_norm
    np.testing.assert_allclose(curve.log_norm, expected, rtol=0, atol=0.15)


@every_cell
def test_second_call_compiles_nothing(name):
    ex = example(name, num_steps=4)
    compiles = []
    listener = lambda event, duration, **_: compiles.append(event) if "backend_compile" in event else None
    run = lambda seed: rg.retention(ex.cell, ex.params, ex.state, ex.xs + seed).log_norm.block_until_ready()
    run(0.0)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run(1.0)
        assert compiles == []
        rg.retention(ex.cell, ex.params, ex.state, ex.xs[:2])
        assert compiles, "the listener sees compilations"
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@every_cell
def test_cells_are_static_and_hashable(name):
    ex = example(name)
    assert hash(ex.cell) == hash(ex.cell._replace())
    assert ex.cell == ex.cell._replace()
    assert ex.cell.init_state.__name__ == "init_state"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_affine])
def test_preactivation_is_affine_in_the_state(name, x64):
    ex = example(name, dtype=jnp.float64)
    z = lambda scale: ex.cell.preactivate(ex.params, jax.tree.map(lambda leaf: scale * leaf, ex.state), ex.xs[0])
    second_difference = jax.tree.map(lambda a, b, c: a - 2 * b + c, z(-1.0), z(0.5), z(2.0))
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, rtol=0, atol=1e-14), second_difference)
