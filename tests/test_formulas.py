"""The hand-derived formulas against autodiff, against sums written out in NumPy, and against each other."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad import formulas, theory
from tests.cases import example, rows
from tests.oracles import DIRECTS, JACOBIANS, ORACLES

ROOT = Path(__file__).resolve().parent.parent


class Method(NamedTuple):
    """The formulas of one case of the cells' table."""

    gradients: Callable[..., Any]
    jacobian: Callable[..., formulas.StepJacobian]
    tapped_step: Callable[..., Any]
    """(params, state, x, z_tap, gate_tap) -> s': the cell's equations once more; see below."""


def close(found, expected):
    """Sums of a few dozen terms of either sign, each good to 1e-16: 1e-12 of the largest entry leaves room for 1e4."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * float(np.abs(b).max())), found, expected
    )


# --- the cells once more, with a zero added wherever a δ is to be read off ------------------------------------------


def _vanilla_step(phi, params, state, x, z_tap, gate_tap):
    z = params.w_ih @ x + params.w_hh @ state.h + params.b + z_tap.h
    return rg.cells.VanillaState(phi(z) + gate_tap.h)


def _lstm_step(params, state, x, z_tap, gate_tap, c_tap=0.0):
    z = jnp.split(params.w_ih @ x + params.w_hh @ state.h + params.b, 4)
    z_i, z_f, z_g, z_o = (part + tap for part, tap in zip(z, z_tap, strict=True))
    i, f, o = jax.nn.sigmoid(z_i) + gate_tap.i, jax.nn.sigmoid(z_f) + gate_tap.f, jax.nn.sigmoid(z_o) + gate_tap.o
    c = f * state.c + i * (jnp.tanh(z_g) + gate_tap.g) + c_tap
    return rg.cells.LSTMState(h=o * jnp.tanh(c), c=c)


def _gru_step(reset, params, state, x, z_tap, gate_tap):
    x_r, x_u, a = jnp.split(params.w_ih @ x + params.b, 3)
    U_r, U_u, U_n = jnp.split(params.w_hh, 3)
    r = jax.nn.sigmoid(x_r + U_r @ state.h + z_tap.r) + gate_tap.r
    u = jax.nn.sigmoid(x_u + U_u @ state.h + z_tap.u) + gate_tap.u
    if reset == "after":
        heard = r * (U_n @ state.h + params.b_m + z_tap.n)
    else:
        heard = U_n @ (r * state.h) + z_tap.n
    # a is both a pre-activation and the value that the cell reports
    n = jnp.tanh(a + z_tap.a + gate_tap.a + heard) + gate_tap.n
    return rg.cells.GRUState((1 - u) * n + u * state.h)


def _vanilla(activation, phi):
    return Method(
        functools.partial(formulas.vanilla_gradients, activation=activation),
        functools.partial(formulas.vanilla_jacobian, activation=activation),
        functools.partial(_vanilla_step, phi),
    )


METHODS = {
    "vanilla_tanh": _vanilla("tanh", jnp.tanh),
    "vanilla_sigmoid": _vanilla("sigmoid", jax.nn.sigmoid),
    "vanilla_relu": _vanilla("relu", jax.nn.relu),
    "vanilla_identity": _vanilla("identity", lambda z: z),
    "lstm": Method(formulas.lstm_gradients, formulas.lstm_jacobian, _lstm_step),
    "gru_after": Method(
        formulas.gru_after_gradients, formulas.gru_after_jacobian, functools.partial(_gru_step, "after")
    ),
    "gru_before": Method(
        formulas.gru_before_gradients, formulas.gru_before_jacobian, functools.partial(_gru_step, "before")
    ),
}
all_methods = rows(METHODS, fast=("vanilla_tanh", "lstm", "gru_after", "gru_before"))


class Problem(NamedTuple):
    """A run with a loss of all its states, and what the formulas are handed of it."""

    cell: rg.Cell
    params: Any
    state: Any
    xs: jax.Array
    loss: Callable[[Any], jax.Array]
    cotangents: Any


def _loss(states):
    """Every state of every step at a weight of its own, and not linear in any."""
    leaves = jax.tree.leaves(states)
    weights = [jnp.linspace(0.5, 2.0 + i, leaf.size, dtype=leaf.dtype) for i, leaf in enumerate(leaves)]
    return sum(jnp.sum(jnp.sin(w * leaf.ravel())) for w, leaf in zip(weights, leaves, strict=True))


@functools.cache
def problem(name, num_steps=6, dtype="float64"):
    cell, params, state, xs = example(name, num_steps=num_steps, dtype=dtype)
    # weights twice the default size, so that what passes through the gates weighs as much as what does not
    params = jax.tree.map(lambda w: 2 * w, params)
    cotangents = jax.grad(_loss)(rg.unroll(cell, params, state, xs).states)
    return Problem(cell, params, state, xs, _loss, cotangents)


_compiled = functools.cache(jax.jit)


def by_hand(gradients, p):
    return _compiled(gradients)(p.params, p.state, p.xs, p.cotangents)


# --- gradients = autodiff --------------------------------------------------------------------------------------------


@all_methods
@pytest.mark.parametrize("num_steps", [1, 6])
def test_parameters_inputs_and_first_state_equal_autodiff(name, num_steps, x64):
    p = problem(name, num_steps)
    through = lambda params, state, xs: p.loss(rg.unroll(p.cell, params, state, xs).states)
    d_params, d_state, d_xs = jax.jit(jax.grad(through, argnums=(0, 1, 2)))(p.params, p.state, p.xs)
    found = by_hand(METHODS[name].gradients, p)
    close(found.params, d_params)
    close(found.state, d_state)
    close(found.xs, d_xs)


@all_methods
def test_states_gates_and_preactivations_equal_autodiff(name, x64):
    """The cell written out once more, with zeros added; their gradients are the δ."""
    p = problem(name)
    run = rg.unroll(p.cell, p.params, p.state, p.xs)
    zeros = jax.tree.map(jnp.zeros_like, (run.states, run.gates, run.gates))

    def through(taps):
        state, states = p.state, []
        for t, x in enumerate(p.xs):
            state_tap, gate_tap, z_tap = jax.tree.map(lambda leaf: leaf[t], taps)  # noqa: B023
            state = METHODS[name].tapped_step(p.params, state, x, z_tap, gate_tap)
            state = jax.tree.map(jnp.add, state, state_tap)
            states.append(state)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return p.loss(stacked), stacked

    (d_states, d_gates, d_z), states = jax.jit(jax.grad(through, has_aux=True))(zeros)
    close(states, run.states)  # the same cell
    found = by_hand(METHODS[name].gradients, p)
    close(found.states, d_states)
    close(found.gates, d_gates)
    close(found.z, d_z)


def test_delta_c_is_the_total_through_h_too(x64):
    """A zero added to c_t before h_t = o_t tanh c_t is made of it."""
    p = problem("lstm")
    no_gates = rg.cells.LSTMGates(*jnp.zeros((4, 4)))

    def through(c_taps):
        state, states = p.state, []
        for x, c_tap in zip(p.xs, c_taps, strict=True):
            state = _lstm_step(p.params, state, x, no_gates, no_gates, c_tap)
            states.append(state)
        return p.loss(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    found = by_hand(formulas.lstm_gradients, p)
    close(found.delta_c, jax.jit(jax.grad(through))(jnp.zeros((6, 4))))
    run = rg.unroll(p.cell, p.params, p.state, p.xs)
    through_h = found.states.h * run.gates.o * (1 - jnp.tanh(run.states.c) ** 2)
    close(found.delta_c, found.states.c + through_h)


@all_methods
def test_states_obey_the_recursion_of_the_hand_derived_jacobians(name, x64):
    """δs_t = ∂L_t/∂s_t + (D + G)ᵀ δs_{t+1}: two derivations by hand that share no line."""
    p = problem(name)
    run = rg.unroll(p.cell, p.params, p.state, p.xs)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), p.state, run.states)
    jacobians = jax.jit(jax.vmap(lambda state, x: METHODS[name].jacobian(p.params, state, x).full))(before, p.xs)
    found = by_hand(METHODS[name].gradients, p)
    flat = lambda states: jnp.concatenate(jax.tree.leaves(states), axis=-1)
    own = jnp.concatenate([jnp.zeros_like(flat(p.state))[None], flat(p.cotangents)])[:-1]
    expected = own + jnp.einsum("tij,ti->tj", jacobians, flat(found.states))
    close(jnp.concatenate([flat(found.state)[None], flat(found.states)])[:-1], expected)


@all_methods
def test_taps_show_the_same_split(name, x64):
    """Dᵀ δs_{t+1} and Gᵀ δs_{t+1} by hand = what the taps of a run show; z too, but for a reset inside preactivate."""
    p = problem(name)
    through = lambda taps: p.loss(rg.unroll(p.cell, p.params, p.state, p.xs, taps=taps).states)
    shown = jax.jit(jax.grad(through))(rg.zero_taps(p.cell, len(p.xs)))
    run = rg.unroll(p.cell, p.params, p.state, p.xs)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), p.state, run.states)
    jacobians = jax.jit(jax.vmap(lambda state, x: METHODS[name].jacobian(p.params, state, x)))(before, p.xs)
    found = by_hand(METHODS[name].gradients, p)
    flat = lambda states: jnp.concatenate(jax.tree.leaves(states), axis=-1)
    close(jnp.einsum("tij,ti->tj", jacobians.D, flat(found.states)), flat(shown.direct))
    close(jnp.einsum("tij,ti->tj", jacobians.G, flat(found.states)), flat(shown.gated))
    if name == "gru_before":
        assert float(jnp.min(jnp.abs(found.z.r))) > 0
        found = found._replace(z=found.z._replace(r=jnp.zeros_like(found.z.r)))
    close(found.z, shown.z)


# --- gradients = sums and differences in NumPy -----------------------------------------------------------------------


def test_vanilla_equals_the_double_sum_of_the_paper(x64):
    """∂L/∂U = Σ_t Σ_{k≤t} ∂L_t/∂h_t · ∂h_t/∂h_k · ∂⁺h_k/∂U, with ∂h_t/∂h_k = ∏ diag(φ'(z_j)) U, newest on the left."""
    p = problem("vanilla_tanh")
    U, num_steps = np.asarray(p.params.w_hh), len(p.xs)
    h = [np.asarray(p.state.h)]
    for x in np.asarray(p.xs):
        h.append(np.tanh(np.asarray(p.params.w_ih) @ x + U @ h[-1] + np.asarray(p.params.b)))
    slopes = [None, *(1 - value**2 for value in h[1:])]
    dL = [None, *np.asarray(p.cotangents.h)]
    expected = np.zeros_like(U)
    for t in range(1, num_steps + 1):
        for k in range(1, t + 1):
            product = np.eye(len(U))
            for j in range(k + 1, t + 1):
                product = np.diag(slopes[j]) @ U @ product
            # ∂⁺h_k/∂U: h_{k−1} held; row n of U moves unit n alone
            expected += np.outer((dL[t] @ product) * slopes[k], h[k - 1])
    close(by_hand(METHODS["vanilla_tanh"].gradients, p).params.w_hh, expected)


@pytest.mark.parametrize("name", ["lstm", "gru_before"])
def test_every_weight_against_central_differences_of_a_numpy_cell(name, x64):
    p = problem(name)
    params, state, xs = jax.tree.map(np.asarray, (p.params, p.state, p.xs))

    def loss(params):
        now, states = state, []
        for x in xs:
            now = type(state)(**ORACLES[name](params, now, x))
            states.append(now)
        leaves = [np.stack(leaf) for leaf in zip(*states, strict=True)]
        weights = [np.linspace(0.5, 2.0 + i, leaf.size) for i, leaf in enumerate(leaves)]
        return sum(np.sin(w * leaf.ravel()).sum() for w, leaf in zip(weights, leaves, strict=True))

    found, step = by_hand(METHODS[name].gradients, p).params, 1e-5
    for field in params._fields:
        weights = getattr(params, field)
        for index in np.ndindex(weights.shape):
            shifted = [weights.copy() for _ in range(2)]
            shifted[0][index] += step
            shifted[1][index] -= step
            up, down = (loss(params._replace(**{field: w})) for w in shifted)
            # truncation step² L'''/6 ≈ 1e-10 · 1e2, round-off 1e-16 · 1e1 / step = 1e-10
            np.testing.assert_allclose(getattr(found, field)[index], (up - down) / (2 * step), rtol=1e-7, atol=2e-8)


# --- Jacobians -------------------------------------------------------------------------------------------------------


@all_methods
def test_step_jacobians_equal_autodiff_and_the_closed_form(name, x64):
    p = problem(name)
    run = rg.unroll(p.cell, p.params, p.state, p.xs)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), p.state, run.states)
    found = jax.jit(jax.vmap(lambda state, x: METHODS[name].jacobian(p.params, state, x)))(before, p.xs)
    close(found.full, rg.step_jacobians(p.cell, p.params, p.state, p.xs))
    as_numpy = jax.tree.map(np.asarray, (p.params, jax.tree.map(lambda leaf: leaf[2], before), p.xs[2]))
    close(found.full[2], JACOBIANS[name](*as_numpy))
    np.testing.assert_allclose(found.D[2], DIRECTS[name](*as_numpy), rtol=1e-12, atol=1e-15)  # has blocks of zeros


@all_methods
def test_split_is_that_of_the_chains(name, x64):
    """D by hand = the direct path of a chain of one step."""
    p = problem(name, num_steps=1)
    chain = rg.jacobian_chain(p.cell, p.params, p.state, p.xs, path="direct")
    expected = rg.logscaled.to_array(chain)[0]
    found = METHODS[name].jacobian(p.params, p.state, p.xs[0])
    np.testing.assert_allclose(found.D, expected, rtol=1e-13, atol=0)  # a product of a few factors in each entry


def test_memory_jacobian_follows_h_one_step_back(x64):
    """∂c_t/∂c_{t−1} with h_{t−1} = o_{t−1} tanh c_{t−1}: by autodiff, and as J_cc + J_ch ∂h/∂c."""
    p = problem("lstm")
    state, gates = p.cell.step(p.params, p.state, p.xs[0])
    x, o, c = p.xs[1], gates.o, state.c
    followed = lambda c: p.cell.step(p.params, rg.cells.LSTMState(o * jnp.tanh(c), c), x)[0].c
    found = formulas.lstm_memory_jacobian(p.params, state, x, o)
    close(found, jax.jacfwd(followed)(c))
    jacobian = formulas.lstm_jacobian(p.params, state, x).full
    close(found, jacobian[4:, 4:] + jacobian[4:, :4] @ jnp.diag(o * (1 - jnp.tanh(c) ** 2)))
    # with h_{t−1} held only diag(f_t) is left, exactly
    f = p.cell.step(p.params, state, x)[1].f
    np.testing.assert_array_equal(jacobian[4:, 4:], jnp.diag(f))
    assert float(jnp.max(jnp.abs(found - jnp.diag(f)))) > 0.1


def test_products_of_memory_jacobians_are_not_the_chain(x64):
    """c_{t+2} hears c_t through o_{t+1} as well, which the product of two memory Jacobians holds."""
    p = problem("lstm", num_steps=3)
    states, gates = [p.state], []
    for x in p.xs:
        new, gate = p.cell.step(p.params, states[-1], x)
        states.append(new)
        gates.append(gate)

    def run(c, held_o):
        """c_3 from c_1; o_2 either as it moves or held."""
        state = rg.cells.LSTMState(gates[0].o * jnp.tanh(c), c)
        state, gate = p.cell.step(p.params, state, p.xs[1])
        o = gates[1].o if held_o else gate.o
        return p.cell.step(p.params, state._replace(h=o * jnp.tanh(state.c)), p.xs[2])[0].c

    product = formulas.lstm_memory_jacobian(p.params, states[2], p.xs[2], gates[1].o) @ formulas.lstm_memory_jacobian(
        p.params, states[1], p.xs[1], gates[0].o
    )
    close(product, jax.jacfwd(lambda c: run(c, True))(states[1].c))
    true = jax.jacfwd(lambda c: run(c, False))(states[1].c)
    assert float(jnp.linalg.norm(product - true) / jnp.linalg.norm(true)) > 1e-3


# --- the truncated gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 6])
def test_truncated_is_the_gradient_of_a_run_whose_gates_read_a_constant(num_steps, x64):
    """A plain scan: no rule of the library's own stands between the run and its derivative."""
    p = problem("lstm", num_steps)

    def through(params, state, xs):
        def step(state, x):
            z = p.cell.preactivate(params, state._replace(h=jax.lax.stop_gradient(state.h)), x)
            new, _ = p.cell.update(params, z, state)
            return new, new

        return p.loss(jax.lax.scan(step, state, xs)[1])

    d_params, d_state, d_xs = jax.jit(jax.grad(through, argnums=(0, 1, 2)))(p.params, p.state, p.xs)
    found = by_hand(formulas.truncated_lstm_gradients, p)
    close(found.params, d_params)
    close(found.state, d_state)
    close(found.xs, d_xs)


def test_truncated_is_true_where_nothing_passes_the_gates_and_only_there(x64):
    """One step, or U = 0: the same weights' gradient.  Else another."""
    one = problem("lstm", num_steps=1)
    close(by_hand(formulas.truncated_lstm_gradients, one).params, by_hand(formulas.lstm_gradients, one).params)
    p = problem("lstm")
    deaf = p._replace(params=p.params._replace(w_hh=jnp.zeros_like(p.params.w_hh)))
    close(by_hand(formulas.truncated_lstm_gradients, deaf), by_hand(formulas.lstm_gradients, deaf))
    truncated, true = by_hand(formulas.truncated_lstm_gradients, p), by_hand(formulas.lstm_gradients, p)
    for found, expected in zip(truncated.params, true.params, strict=True):
        assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) > 0.01


# --- two facts about σ and Uᵀ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "steepest"), theory.STEEPEST.items())
def test_slopes_are_those_of_autodiff_and_their_supremum_is_known(activation, steepest, x64):
    phi = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "identity": lambda z: z}[activation]
    z = jnp.linspace(-6.0, 6.0, 1001)  # holds 0
    found = formulas.slope(activation, phi(z))
    # φ(z) is within 1e-5 of ±1 at the ends, where 1 − φ has lost five digits
    np.testing.assert_allclose(found, jax.vmap(jax.grad(phi))(z), rtol=1e-10, atol=0)
    assert float(jnp.max(found)) == steepest


def test_sup_of_the_sigmoid_slope_is_a_quarter(x64):
    """v (1 − v) = 1/4 − (v − 1/2)², whatever v: 1 is an upper bound too, but nothing comes near it."""
    v = jnp.linspace(0.0, 1.0, 65)  # multiples of 1/64: every square is exact
    np.testing.assert_array_equal(formulas.slope("sigmoid", v), 0.25 - (v - 0.5) ** 2)
    assert float(formulas.slope("sigmoid", jnp.array(0.5))) == 0.25


def test_columns_go_back_by_the_transpose_and_tangents_forward_by_the_jacobian(x64):
    """Uᵀ diag(φ') takes a gradient back, diag(φ') U a tangent forward; U diag(φ') does neither."""
    p = problem("vanilla_tanh")
    step = lambda h: p.cell.step(p.params, rg.cells.VanillaState(h), p.xs[0])[0].h
    h, U = p.state.h, p.params.w_hh
    slopes = jnp.diag(formulas.slope("tanh", step(h)))
    v = jnp.array([1.0, -2.0, 0.5, 3.0])
    forward = jax.jvp(step, (h,), (v,))[1]
    back = jax.vjp(step, h)[1](v)[0]
    close(slopes @ U @ v, forward)
    close(U.T @ slopes @ v, back)
    close(formulas.vanilla_jacobian(p.params, p.state, p.xs[0]).full, slopes @ U)
    for wrong in (U @ slopes @ v, U.T @ slopes @ v):
        assert float(jnp.max(jnp.abs(wrong - forward))) > 0.1
    for wrong in (slopes @ U @ v, slopes @ U.T @ v):
        assert float(jnp.max(jnp.abs(wrong - back))) > 0.1


# --- transformations, dtypes, bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru_before"])
def test_jit_and_vmap_change_nothing(name, x64):
    p = problem(name)
    gradients = METHODS[name].gradients
    alone = by_hand(gradients, p)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), p.cotangents)
    batched = jax.jit(jax.vmap(gradients, in_axes=(None, None, None, 0)))(p.params, p.state, p.xs, twice)
    close(jax.tree.map(lambda leaf: leaf[0], batched), alone)
    # linear in the cotangents, and a power of two is exact
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[1], 2 * leaf[0]), batched)


@all_methods
def test_dtype_stays(name):
    dtype = "bfloat16"  # nothing promotes to it, so one constant of another dtype would show
    p = problem(name, num_steps=2, dtype=dtype)
    found = jax.eval_shape(METHODS[name].gradients, p.params, p.state, p.xs, p.cotangents)
    jacobian = jax.eval_shape(METHODS[name].jacobian, p.params, p.state, p.xs[0])
    assert {leaf.dtype.name for leaf in jax.tree.leaves((found, jacobian))} == {dtype}


def test_nan_at_one_step_spoils_what_comes_before_it_and_nothing_after(x64):
    p = problem("lstm")
    spoilt = p._replace(cotangents=p.cotangents._replace(h=p.cotangents.h.at[3].set(jnp.nan)))
    found = by_hand(formulas.lstm_gradients, spoilt)
    assert np.isnan(found.states.h[:4]).all()
    np.testing.assert_array_equal(found.states.h[4:], by_hand(formulas.lstm_gradients, p).states.h[4:])
    assert np.isnan(found.params.w_hh).any()


def raises(*words):
    return pytest.raises(ValueError, match=".*".join(map(re.escape, words)))


class TestBadInput:
    @all_methods
    def test_no_time_steps(self, name):
        p = problem(name, dtype="float32")
        empty = jax.tree.map(lambda leaf: leaf[:0], p.cotangents)
        with raises("xs has T = 0 time steps; expected at least 1"):
            METHODS[name].gradients(p.params, p.state, p.xs[:0], empty)

    @all_methods
    def test_cotangents_of_another_length(self, name):
        p = problem(name, dtype="float32")
        short = jax.tree.map(lambda leaf: leaf[:5], p.cotangents)
        with raises("cotangents.h: expected float32[6, 4], found float32[5, 4]"):
            METHODS[name].gradients(p.params, p.state, p.xs, short)

    @pytest.mark.parametrize("function", [formulas.lstm_gradients, formulas.truncated_lstm_gradients])
    def test_shapes_that_do_not_fit(self, function):
        p = problem("lstm", dtype="float32")
        with raises("expected shape (T, D=3)", "found (6, 5)"):
            function(p.params, p.state, jnp.ones((6, 5)), p.cotangents)
        with raises("xs: expected one sequence of shape (T, D=3), found (6, 2, 3)"):
            function(p.params, p.state, jnp.ones((6, 2, 3)), p.cotangents)
        with raises("state.c: expected float32[4], found float32[7]"):
            function(p.params, p.state._replace(c=jnp.zeros(7)), p.xs, p.cotangents)
        with raises("params.b: expected float32[16], found float32[12]"):
            function(p.params._replace(b=jnp.zeros(12)), p.state, p.xs, p.cotangents)

    def test_mixed_dtypes(self):
        p = problem("lstm", dtype="float32")
        half = p.cotangents._replace(c=p.cotangents.c.astype(jnp.bfloat16))
        with raises("cotangents.c: expected float32[6, 4], found bfloat16[6, 4]"):
            formulas.lstm_gradients(p.params, p.state, p.xs, half)
        with raises("expected one floating dtype for params, state and xs"):
            formulas.lstm_gradients(p.params, p.state, p.xs.astype(jnp.bfloat16), p.cotangents)

    @all_methods
    def test_jacobian_of_a_whole_sequence(self, name):
        p = problem(name, dtype="float32")
        with raises("expected one sequence of shape (T, D=3), found (1, 6, 3)"):
            METHODS[name].jacobian(p.params, p.state, p.xs)

    def test_output_gate_of_another_size(self):
        p = problem("lstm", dtype="float32")
        with raises("output_gate: expected float32[4], found float32[3]"):
            formulas.lstm_memory_jacobian(p.params, p.state, p.xs[0], jnp.ones(3))

    def test_unknown_activation(self):
        p = problem("vanilla_tanh", dtype="float32")
        with raises("unknown activation 'gelu'; expected one of: tanh, sigmoid, relu, identity"):
            formulas.vanilla_gradients(p.params, p.state, p.xs, p.cotangents, activation="gelu")
        with raises("unknown activation 'gelu'; expected one of: tanh, sigmoid, relu, identity"):
            formulas.slope("gelu", p.state.h)


# --- the derivation --------------------------------------------------------------------------------------------------


def test_derivation_names_every_function_and_no_other():
    text = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`rg\.formulas\.(\w+)", text))
    public = {
        name
        for name, value in vars(formulas).items()
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == formulas.__name__
    }
    assert public - named == set()
    assert {name for name in named if not hasattr(formulas, name)} == set()
    for path in re.findall(r"`rg\.((?!formulas\.)[\w.]+)", text):
        assert functools.reduce(getattr, path.split("."), rg) is not None
    for test in re.findall(r"`tests/test_formulas\.py::(\w+)`", text):
        assert test in globals(), test


def test_formulas_differentiate_nothing_by_program():
    source = inspect.getsource(formulas).split('"""', 2)[2]
    assert not re.search(r"jax\.(grad|vjp|jvp|jac\w+|linearize|value_and_grad|linear_transpose)", source)
