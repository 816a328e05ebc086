"""What every cell owes: the contract of CONTRIBUTING.md, over the whole table.

Compiling dominates these tests, so that what several of them look at is computed once per cell, in one program.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad.jacobians import layout_of, step_pulls
from rnngrad.types import remembered
from tests.cases import CASES, INPUT_SIZE, as_matrix, example, flatten, point_at, rows, unflatten
from tests.oracles import DIRECTS, JACOBIANS, ORACLES

every_cell = rows(CASES)
# the fast suite compiles these three ways in full; the slow one every cell
some_cells_fast = rows(CASES, fast=("vanilla_tanh", "lstm", "gru_before", "lru", "stack"))
with_oracle = rows(name for name, case in CASES.items() if case.has_oracle)

# float64: a step is a few dozen roundings of size 1.1e-16 on numbers of order 1.
EXACT = {"rtol": 1e-12, "atol": 1e-13}
# six steps of it
CHAIN = {"rtol": 1e-11, "atol": 1e-13}


def _as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@functools.cache
def facts(name: str) -> dict[str, Any]:
    """Everything about one cell in float64 that the tests below compare, from one compiled program."""
    with jax.enable_x64(True):
        ex = example(name, dtype="float64")
        cell, layout = ex.cell, layout_of(ex.state)
        eye = jnp.eye(sum(layout.sizes), dtype=jnp.float64)
        weights = jnp.cos(jnp.arange(sum(layout.sizes), dtype=jnp.float64))

        def end(vector, params, xs):
            return flatten(rg.unroll(cell, params, unflatten(layout, vector), xs).final)

        def loss(vector, params, xs):
            return jnp.sum(weights * jnp.tanh(end(vector, params, xs)))

        def compute(params, state, xs):
            step = lambda v: flatten(cell.step(params, unflatten(layout, v), xs[0])[0])
            pulls = step_pulls(cell, params, point_at(cell, params, state, xs[0]), layout)
            trajectory = rg.unroll(cell, params, state, xs)
            vector = flatten(state)
            second = flatten(jax.tree.map(lambda leaf: leaf[1], trajectory.states))
            batch_states = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), state)
            batch_xs = jnp.stack([xs, xs[::-1]], axis=1)
            one = lambda s, x: rg.unroll(cell, params, s, x).states
            directions = 1e-6 * eye
            return {
                "trajectory": trajectory,
                "direct": as_matrix(pulls.direct, layout),
                "gated": as_matrix(pulls.gated, layout),
                "full": as_matrix(pulls.full, layout),
                "autodiff": jax.jacfwd(step)(vector),
                "differences": jax.vmap(lambda d: (step(vector + d) - step(vector - d)) / 2e-6, out_axes=1)(directions),
                "step_jacobians": rg.step_jacobians(cell, params, state, xs),
                "chain": rg.logscaled.to_array(rg.jacobian_chain(cell, params, state, xs)),
                "jacfwd_from_0": jax.jacfwd(end)(vector, params, xs),
                "jacfwd_from_2": jax.jacfwd(end)(second, params, xs[2:]),
                "grad": jax.grad(loss)(vector, params, xs),
                "loss_difference": jax.vmap(
                    lambda d: (loss(vector + d, params, xs) - loss(vector - d, params, xs)) / 2e-6
                )(directions),
                "cotangent": weights * (1 - jnp.tanh(end(vector, params, xs)) ** 2),
                "batched": rg.unroll(cell, params, batch_states, batch_xs).states,
                "mapped": jax.vmap(one, in_axes=(0, 1), out_axes=1)(batch_states, batch_xs),
            }

        return _as_numpy(jax.jit(compute)(ex.params, ex.state, ex.xs))


@with_oracle
def test_unroll_equals_numpy_oracle(name, x64):
    ex = example(name, dtype="float64")
    params, state = _as_numpy((ex.params, ex.state))
    found = facts(name)["trajectory"]
    for t, x in enumerate(np.asarray(ex.xs)):
        expected = ORACLES[name](params, state, x)
        assert set(expected) == set(state._fields)
        for field, value in expected.items():
            np.testing.assert_allclose(getattr(found.states, field)[t], value, **CHAIN)
        state = type(state)(**expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CHAIN), found.final, state)


@some_cells_fast
def test_scan_equals_python_loop_without_jit(name, x64):
    ex = example(name, dtype="float64")
    found = facts(name)["trajectory"]
    state = ex.state
    for t in range(2):
        state, gates = ex.cell.step(ex.params, state, ex.xs[t])
        at_t = jax.tree.map(lambda leaf, t=t: leaf[t], (found.states, found.gates))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), at_t, (state, gates))


@every_cell
def test_batch_equals_vmap(name):
    found = facts(name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), found["batched"], found["mapped"])
    assert all(leaf.shape[1] == 2 for leaf in jax.tree.leaves(found["batched"]))


@every_cell
def test_init_state_takes_a_batch_shape(name):
    one, batch = example(name).cell.init_state(), example(name).cell.init_state((5, 2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.broadcast_to(a, b.shape), b), one, batch)
    assert all(leaf.shape[:2] == (5, 2) for leaf in jax.tree.leaves(batch))


@every_cell
def test_direct_and_gated_add_up_to_the_step_jacobian(name):
    found = facts(name)
    np.testing.assert_allclose(found["direct"] + found["gated"], found["full"], **EXACT)


@every_cell
def test_step_jacobian_equals_autodiff_of_step(name):
    found = facts(name)
    np.testing.assert_allclose(found["full"], found["autodiff"], **EXACT)
    np.testing.assert_allclose(found["step_jacobians"][0], found["autodiff"], **EXACT)


@with_oracle
def test_step_jacobian_equals_closed_form(name, x64):
    ex, found = example(name, dtype="float64"), facts(name)
    arguments = _as_numpy(ex.params), _as_numpy(ex.state), np.asarray(ex.xs[0])
    np.testing.assert_allclose(found["full"], JACOBIANS[name](*arguments), **EXACT)
    np.testing.assert_allclose(found["direct"], DIRECTS[name](*arguments), **EXACT)


@every_cell
def test_step_jacobian_equals_central_differences(name):
    # central differences of step 1e-6: truncation 1e-12, round-off 1e-16/1e-6 = 1e-10, times a small factor
    found = facts(name)
    np.testing.assert_allclose(found["full"], found["differences"], rtol=0, atol=2e-9)


@every_cell
def test_chain_equals_jacfwd_through_the_unroll(name):
    found = facts(name)
    np.testing.assert_allclose(found["chain"][0], found["jacfwd_from_0"], **CHAIN)
    np.testing.assert_allclose(found["chain"][2], found["jacfwd_from_2"], **CHAIN)


@every_cell
def test_chain_equals_product_of_step_jacobians_newest_on_the_left(name):
    found = facts(name)
    product = np.eye(found["full"].shape[0])
    np.testing.assert_array_equal(found["chain"][-1], product)
    for k in reversed(range(len(found["step_jacobians"]))):
        product = product @ found["step_jacobians"][k]
        np.testing.assert_allclose(found["chain"][k], product, **CHAIN)


@every_cell
def test_chain_carries_the_loss_gradient(name):
    """∂L/∂s_0 equals the loss's cotangent at s_T times the chain, BPTT by autodiff, and finite differences."""
    found = facts(name)
    explicit = found["cotangent"] @ found["chain"][0]
    np.testing.assert_allclose(explicit, found["grad"], **CHAIN)
    np.testing.assert_allclose(explicit, found["loss_difference"], rtol=0, atol=5e-9)


def _cast(tree, real, complex_):
    return jax.tree.map(lambda leaf: leaf.astype(complex_ if jnp.iscomplexobj(leaf) else real), tree)


@some_cells_fast
def test_float32_and_bfloat16_follow_float64(name):
    single = example(name)
    curve = rg.retention(single.cell, *single[1:])
    assert curve.certificate.dtype == "float32"
    with jax.enable_x64(True):
        double = example(name, dtype="float64")
        arguments = _cast(tuple(single[1:]), jnp.float64, jnp.complex128)
        expected = rg.retention(double.cell, *arguments)
        assert expected.certificate.dtype == "float64"
    # 6 steps of a dozen float32 roundings of 6e-8 each; the largest difference measured is 2e-6 nats
    np.testing.assert_allclose(curve.log_norm, expected.log_norm, rtol=0, atol=1e-5)
    if name == "lru":  # there is no complex bfloat16
        return
    half = example(name, dtype="bfloat16")
    found = rg.retention(half.cell, *_cast(tuple(single[1:]), jnp.bfloat16, None))
    assert found.certificate.dtype == "bfloat16"
    # 8 bits, 0.4 % per rounding, a dozen of them per step over 6 steps: 0.3 nats at worst, if all went one way
    np.testing.assert_allclose(found.log_norm, expected.log_norm, rtol=0, atol=0.3)


@every_cell
def test_second_call_compiles_nothing(name):
    ex = example(name)
    compiles = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiles.append(event)

    rg.retention(ex.cell, *ex[1:])
    other = (jax.tree.map(lambda leaf: leaf + 1, ex.params), ex.state, ex.xs[::-1])
    jax.block_until_ready(other)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(rg.retention(ex.cell, *other))
        assert compiles == []
        jax.block_until_ready(jax.jit(lambda x: x * 3.25 + 1)(ex.xs))
        assert compiles, "the listener must see a compilation"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@every_cell
def test_cells_are_static_and_hashable(name):
    cell = example(name).cell
    assert hash(cell) == hash(cell._replace())
    assert cell == cell._replace()
    assert cell.input_size == INPUT_SIZE


@rows(name for name, case in CASES.items() if case.is_affine)
def test_preactivation_is_affine_in_the_state(name, x64):
    ex = example(name, dtype="float64")

    @jax.jit
    def z(scale):
        return ex.cell.preactivate(
            ex.params, jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, ex.state), ex.xs[0]
        )

    at = [z(jnp.asarray(scale)) for scale in (-1.0, 0.5, 2.0)]
    second_difference = jax.tree.map(lambda a, b, c: a - 2 * b + c, *at)
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, rtol=0, atol=1e-14), second_difference)


@every_cell
def test_the_same_plain_arguments_give_the_same_cell(name):
    make = CASES[name].make
    one, again, other = make(3, 5, dtype="float32"), make(3, 5, dtype="float32"), make(3, 6, dtype="float32")
    assert one == again
    assert hash(one) == hash(again)
    assert one != other


class Constant(NamedTuple):
    value: float

    def __call__(self, key, num_gates, hidden_size, input_size, dtype):
        return jnp.full((num_gates * hidden_size, hidden_size), self.value, dtype)


class Diagonal(Constant):
    def __call__(self, key, num_gates, hidden_size, input_size, dtype):
        return jnp.asarray(self.value, dtype) * jnp.eye(num_gates * hidden_size, hidden_size, dtype=dtype)


def test_what_draws_weights_is_never_taken_for_another():
    preset = rg.initializers.resolve("torch", "vanilla")
    for draw, expected in ((Constant(0.5), np.full((2, 2), 0.5)), (Diagonal(0.5), 0.5 * np.eye(2))):
        cell = rg.cells.vanilla(2, 2, init=preset._replace(w_hh=draw))
        np.testing.assert_array_equal(cell.init(jax.random.key(0)).w_hh, expected)
        assert rg.cells.stack(cell) != rg.cells.stack(cell)
    lstm = rg.cells.lstm(2, 2)
    changed = lstm._replace(init_state=lambda batch_shape=(): lstm.init_state(batch_shape))
    assert rg.cells.stack(lstm) == rg.cells.stack(lstm)
    assert rg.cells.stack(changed) != rg.cells.stack(changed)


def test_a_factory_runs_once_for_plain_arguments_and_its_errors_stay():
    calls = []

    @remembered
    def make(size, bias=0.0):
        """About it."""
        calls.append(size)
        if size < 1:
            raise TypeError(f"expected a size of at least 1, found {size}")
        return rg.map_cell(lambda state, x: state + bias)

    assert make(3, 0.5) == make(3, 0.5)
    assert calls == [3]
    assert make(3, 1) != make(3, 1.0)
    assert make(3, np.ones(3)) != make(3, np.ones(3))
    calls.clear()
    with pytest.raises(TypeError, match="found 0"):
        make(0, 0.5)
    assert calls == [0]
    assert make.__doc__ == "About it."
    assert list(inspect.signature(make).parameters) == ["size", "bias"]
