"""Remedies, each against a computation that shares nothing with it."""

from __future__ import annotations

import functools
import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import rnngrad as rg
from rnngrad import losses, remedies
from rnngrad.unroll import run_forward
from tests.cases import CASES, HIDDEN_SIZE, INPUT_SIZE, example, flatten, rows


def raises(*words):
    return pytest.raises(ValueError, match=".*".join(map(re.escape, words)))


# --- clipping --------------------------------------------------------------------------------------------------------


GRADIENTS = {"w": jnp.array([[3.0, -1.0]]), "b": jnp.array([2.0])}
MEAN, SUM = losses.REDUCTIONS


@pytest.mark.parametrize(
    ("unit", "loss_unit", "threshold"),
    [(MEAN, MEAN, 0.5), (SUM, SUM, 0.5), (SUM, MEAN, 0.5 / 20), (MEAN, SUM, 0.5 * 20)],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_is_optax_in_the_unit_of_the_loss(unit, loss_unit, threshold, scale):
    gradients = jax.tree.map(lambda g: scale * g, GRADIENTS)
    ours = remedies.clip_by_global_norm(0.5, unit=unit, loss_unit=loss_unit, num_steps=20)
    theirs = optax.clip_by_global_norm(threshold)
    found, state = ours.update(gradients, ours.init(gradients))
    expected, _ = theirs.update(gradients, theirs.init(gradients))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    norm = scale * 14**0.5
    assert int(state.num_clipped) == int(norm > threshold)
    assert float(state.last_norm) == pytest.approx(norm * 0.5 / threshold, rel=1e-6)


@pytest.mark.slow
def test_quarter_on_the_mean_is_five_on_the_sum_of_20_steps():
    """D1: the same step from either loss; the thresholds themselves are 20 apart, and so are the clipped gradients."""
    cell, out = rg.cells.lstm(3, 4), losses.readout(4, 5)
    params = (cell.init(jax.random.key(0)), out.init(jax.random.key(1)))
    xs = jax.random.normal(jax.random.key(2), (20, 2, 3))
    targets = jax.random.randint(jax.random.key(3), (20, 2), 0, 5)

    def gradient(reduction):
        def loss(params):
            h = rg.unroll(cell, params[0], cell.init_state((2,)), xs).states.h
            return losses.cross_entropy(50 * out.apply(params[1], h), targets, reduction=reduction)

        return jax.jit(jax.grad(loss))(params)

    gradients = {reduction: gradient(reduction) for reduction in losses.REDUCTIONS}

    def clipped(max_norm, unit, loss_unit):
        clip = remedies.clip_by_global_norm(max_norm, unit=unit, loss_unit=loss_unit, num_steps=20)
        updates, state = clip.update(gradients[loss_unit], clip.init(params))
        assert int(state.num_clipped) == 1
        return updates

    quarter, five = clipped(0.25, MEAN, MEAN), clipped(5, SUM, SUM)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32, norms of 0.25 and 5
    jax.tree.map(lambda a, b: close(20 * a, b), quarter, five)
    # and a threshold stated in the other unit is the same threshold
    jax.tree.map(close, clipped(5, SUM, MEAN), quarter)
    jax.tree.map(close, clipped(0.25, MEAN, SUM), five)


def test_clipping_counts_within_a_chain_and_under_jit():
    optimizer = optax.chain(remedies.clip_by_global_norm(1.0), optax.sgd(0.1))
    params = jnp.zeros(2)
    state = optimizer.init(params)
    assert float(state[0].clip_fraction) == 0
    assert bool(jnp.isnan(state[0].last_norm))
    update = jax.jit(optimizer.update)
    structure = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for size in (0.5, 3.0, 2.0, 0.1):
        updates, state = update(jnp.array([size, 0.0]), state, params)
        assert float(updates[0]) == pytest.approx(-0.1 * min(size, 1), rel=1e-6)
        assert float(state[0].last_norm) == pytest.approx(size, rel=1e-6)
    assert (int(state[0].num_updates), int(state[0].num_clipped), float(state[0].clip_fraction)) == (4, 2, 0.5)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == structure  # a scan can carry it


def test_clipping_refuses_misuse():
    for bad in (0, -1.0, float("nan")):
        with raises(f"max_norm: expected a number above 0, found {bad}"):
            remedies.clip_by_global_norm(bad)
    with raises("unknown loss_unit 'mean'; expected one of: mean_per_token, sum_over_steps"):
        remedies.clip_by_global_norm(1.0, loss_unit="mean")
    with raises("num_steps: expected T to turn 'mean_per_token' into 'sum_over_steps', found None"):
        remedies.clip_by_global_norm(5.0, unit="sum_over_steps")
    with raises("num_steps: expected at least 1, found 0"):
        remedies.clip_by_global_norm(5.0, num_steps=0)


# --- Pascanu's regulariser -------------------------------------------------------------------------------------------


def real_norms(state):
    """Returns |s|² summed over fields and units, leaving time and batch."""
    return sum(jnp.sum(jnp.square(jnp.abs(leaf)), axis=-1) for leaf in jax.tree.leaves(state))


def loss_of_all(states):
    """A loss that takes something of its own from every state, more from later ones."""
    squares = real_norms(states)
    times = jnp.arange(1, squares.shape[0] + 1, dtype=squares.dtype).reshape(-1, *[1] * (squares.ndim - 1))
    return jnp.sum(squares * jnp.broadcast_to(times, squares.shape))


@functools.partial(jax.jit, static_argnames=("cell", "loss"))
def omega_of(cell, params, state, xs, loss=loss_of_all):
    return remedies.pascanu_omega(cell, params, state, xs, loss)


@functools.partial(jax.jit, static_argnames=("cell", "loss"))
def omega_and_gradient(cell, params, state, xs, loss=loss_of_all):
    return jax.value_and_grad(lambda params: remedies.pascanu_omega(cell, params, state, xs, loss))(params)


def omega_by_matrices(cell, params, state, xs, loss):
    """Ω from explicit Jacobians: ∂E/∂s_{k+1} = its own part + ∂E/∂s_{k+2} · J_{k+1}, in NumPy."""
    jacobians = np.asarray(rg.step_jacobians(cell, params, state, xs))
    states = rg.unroll(cell, params, state, xs).states
    # jax.grad by a complex number is the conjugate of (∂/∂Re, ∂/∂Im)
    own = jax.vmap(flatten)(jax.tree.map(jnp.conj, jax.grad(loss)(states)))
    row, total = np.zeros(jacobians.shape[-1]), 0.0
    for k in range(len(jacobians) - 1, -1, -1):
        row = np.asarray(own[k]) + (row @ jacobians[k + 1] if k + 1 < len(jacobians) else 0)
        total += (np.linalg.norm(row @ jacobians[k]) / np.linalg.norm(row) - 1) ** 2
    return total


@rows(CASES, fast=["lstm"])
def test_omega_equals_explicit_jacobians(name, x64):
    case = example(name, dtype="float64")
    found = omega_of(*case)
    expected = omega_by_matrices(*case, loss_of_all)
    assert expected > 1e-3
    assert float(found) == pytest.approx(expected, rel=1e-12)  # sums of at most 10 products


@pytest.mark.slow
def test_omega_counts_complex_numbers_as_real_pairs(x64):
    """With a map that is not holomorphic: multiplication by λ would not tell a cotangent from its conjugate."""
    lru, params, state, xs = example("lru", dtype="float64")

    def update(params, z, state):
        sheared = jax.lax.complex(1.2 * state.h.real + 0.6 * state.h.imag, 0.4 * state.h.imag)
        return state._replace(h=sheared + z.h), z

    case = (lru._replace(update=update), params, state, xs)
    assert float(omega_of(*case)) == pytest.approx(omega_by_matrices(*case, loss_of_all), rel=1e-12)


@pytest.mark.slow
def test_omega_of_a_batch_is_the_mean_of_its_sequences(x64):
    cell, params, _, _ = example("gru_after", dtype="float64")
    xs = jax.random.normal(jax.random.key(5), (6, 3, INPUT_SIZE), jnp.float64)
    state = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(6), leaf.shape, leaf.dtype), cell.init_state((3,))
    )
    alone = [omega_of(cell, params, jax.tree.map(lambda leaf, b=b: leaf[b], state), xs[:, b]) for b in range(3)]
    found = omega_of(cell, params, state, xs)
    assert float(found) == pytest.approx(np.mean(alone), rel=1e-13)


def test_omega_is_zero_for_an_orthogonal_linear_cell_and_minimal_there(x64):
    cell = rg.cells.vanilla(3, 5, activation="identity", init="orthogonal", dtype=jnp.float64)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (7, 3), jnp.float64)
    value, gradient = omega_and_gradient(cell, params, cell.init_state(), xs)
    assert float(value) < 1e-28  # squares of round-off
    assert float(jnp.abs(gradient.w_hh).max()) < 1e-13
    # with 1.1 U every ratio is 1.1
    larger = omega_of(cell, params._replace(w_hh=1.1 * params.w_hh), cell.init_state(), xs)
    assert float(larger) == pytest.approx(7 * 0.1**2, rel=1e-12)


def test_omega_has_the_immediate_derivative(x64):
    """Against central differences of eq. 10 in NumPy: only U in diag(φ') U moves, all else is held."""
    cell, params, state, xs = example("vanilla_tanh", dtype="float64")
    points = run_forward(cell, params, state, xs).points
    slopes = 1 - np.tanh(np.asarray(points.z.h)) ** 2
    own = np.asarray(jax.grad(loss_of_all)(rg.unroll(cell, params, state, xs).states).h)
    u = np.asarray(params.w_hh)
    cotangents = np.zeros_like(own)
    for k in range(len(own) - 1, -1, -1):
        cotangents[k] = own[k] + ((cotangents[k + 1] * slopes[k + 1]) @ u if k + 1 < len(own) else 0)

    def omega(u):
        ratios = np.linalg.norm((cotangents * slopes) @ u, axis=1) / np.linalg.norm(cotangents, axis=1)
        return np.sum((ratios - 1) ** 2)

    value, gradient = omega_and_gradient(cell, params, state, xs)
    assert float(value) == pytest.approx(omega(u), rel=1e-12)
    step = 1e-6
    expected = np.zeros_like(u)
    for index in np.ndindex(u.shape):
        shift = np.zeros_like(u)
        shift[index] = step
        expected[index] = (omega(u + shift) - omega(u - shift)) / (2 * step)
    # central differences: round-off 1e-16/1e-6, truncation 1e-12 times a third derivative
    np.testing.assert_allclose(gradient.w_hh, expected, rtol=1e-7, atol=1e-8)
    assert not gradient.w_ih.any()
    assert not gradient.b.any()


@pytest.mark.slow
def test_omega_does_not_pull_on_the_state_or_the_inputs():
    cell, params, state, xs = example("lstm")
    gradients = jax.grad(lambda s, x: remedies.pascanu_omega(cell, params, s, x, loss_of_all), argnums=(0, 1))(
        state, xs
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_omega_depends_on_the_direction_of_the_error_alone():
    """Cotangents of size 1e-30, whose squares are 0 in float32, give the same Ω."""
    case = example("lstm")
    plain = omega_of(*case)
    tiny = omega_of(*case, loss=lambda states: 1e-30 * loss_of_all(states))
    assert float(tiny) == pytest.approx(float(plain), rel=1e-4)  # float32, norms near 1


def test_omega_leaves_out_steps_without_an_error_signal():
    cell, params, state, xs = example("gru_after")
    early = lambda states: loss_of_all(jax.tree.map(lambda leaf: leaf[:3], states))
    value, gradient = omega_and_gradient(cell, params, state, xs, early)
    expected, expected_gradient = omega_and_gradient(cell, params, state, xs[:3])
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # float32
    jax.tree.map(close, gradient, expected_gradient)
    value, gradient = omega_and_gradient(cell, params, state, xs, lambda states: 0 * loss_of_all(states))
    assert float(value) == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_omega_of_a_step_that_cuts_everything_is_one_with_a_finite_gradient():
    cell, params, state, xs = example("vanilla_tanh", num_steps=1)
    cut = params._replace(w_hh=jnp.zeros_like(params.w_hh))
    value, gradient = omega_and_gradient(cell, cut, state, xs)
    assert float(value) == 1
    assert bool(jnp.isfinite(gradient.w_hh).all())


def test_omega_descends():
    cell, params, state, xs = example("vanilla_tanh")
    before, gradient = omega_and_gradient(cell, params, state, xs)
    after = omega_of(cell, jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient), state, xs)
    assert float(after) < float(before)


def test_omega_refuses_a_map_and_wrong_shapes():
    with raises("has no shape of its own"):
        remedies.pascanu_omega(rg.map_cell(lambda s, x: 2 * s), None, jnp.ones(2), jnp.zeros((3, 0)), jnp.sum)
    cell, params, state, xs = example("lstm")
    with raises("xs: expected shape (T, D=3)"):
        remedies.pascanu_omega(cell, params, state, xs[:, :2], loss_of_all)
    with raises("loss: expected a function of the states that returns a floating scalar, found", "shape=(5,)"):
        remedies.pascanu_omega(cell, params, state, xs[:5], lambda states: states.h.sum(axis=1))


# --- flossing --------------------------------------------------------------------------------------------------------


def test_flossing_is_the_mean_square_of_the_exponents(x64):
    case = example("lstm", num_steps=40, dtype="float64")
    exponents = rg.lyapunov_spectrum(*case, k=3, num_blocks=2, qr_interval=1).exponents
    for target in (0.0, -0.3):
        found = remedies.lyapunov_flossing(*case, k=3, target=target)
        assert float(found) == pytest.approx(np.mean((np.asarray(exponents) - target) ** 2), rel=1e-10)


@pytest.mark.slow
def test_flossing_leaves_out_the_transient(x64):
    cell, params, state, xs = example("vanilla_tanh", num_steps=40, dtype="float64")
    found = remedies.lyapunov_flossing(cell, params, state, xs, k=2, num_transient=10)
    spectrum = rg.lyapunov_spectrum(cell, params, state, xs, k=2, num_transient=10, num_blocks=2)
    assert float(found) == pytest.approx(float(jnp.mean(spectrum.exponents**2)), rel=1e-8)
    assert float(found) != pytest.approx(float(remedies.lyapunov_flossing(cell, params, state, xs, k=2)), rel=1e-3)


@pytest.mark.parametrize("target", [0.0, 0.5])
def test_flossing_of_one_unit_in_closed_form(target, x64):
    """h' = u h + b, h > 0: λ = log u, loss (log u − target)², gradient 2 (log u − target)/u."""
    cell = rg.cells.indrnn(3, 1, activation="relu", dtype=jnp.float64)
    params = cell.init(jax.random.key(0))._replace(b=jnp.ones(1))
    state, xs = cell.init_state(), jnp.zeros((11, 3), jnp.float64)
    floss = lambda u: remedies.lyapunov_flossing(cell, params._replace(u=u), state, xs, k=1, target=target)
    value, gradient = jax.jit(jax.value_and_grad(floss))(jnp.array([0.7]))
    assert float(value) == pytest.approx((np.log(0.7) - target) ** 2, rel=1e-13)
    assert float(gradient[0]) == pytest.approx(2 * (np.log(0.7) - target) / 0.7, rel=1e-13)


@pytest.mark.slow
def test_gradient_of_flossing_against_central_differences(x64):
    cell, params, state, xs = example("gru_after", num_steps=12, dtype="float64")
    floss = jax.jit(lambda w: remedies.lyapunov_flossing(cell, params._replace(w_hh=w), state, xs, k=2))
    gradient = jax.jit(jax.grad(floss))(params.w_hh)
    step = 1e-5
    for index in ((0, 0), (5, 2), (11, 3)):
        shift = jnp.zeros_like(params.w_hh).at[index].set(step)
        expected = (floss(params.w_hh + shift) - floss(params.w_hh - shift)) / (2 * step)
        # round-off 1e-16/1e-5, truncation 1e-10 times a third derivative
        np.testing.assert_allclose(gradient[index], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_flossing_moves_the_exponents_to_zero():
    cell = rg.cells.vanilla(3, 6, init=rg.initializers.gaussian(0.5))
    params, state = cell.init(jax.random.key(0)), cell.init_state()
    xs = 0.1 * jax.random.normal(jax.random.key(1), (40, 3))
    optimizer = optax.sgd(0.3)
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state):
        value, gradient = jax.value_and_grad(lambda p: remedies.lyapunov_flossing(cell, p, state, xs, k=2))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    exponents = lambda p: np.asarray(rg.lyapunov_spectrum(cell, p, state, xs, k=2, num_blocks=2).exponents)
    before = exponents(params)
    for _ in range(40):
        _, params, opt_state = update(params, opt_state)
    after = exponents(params)
    assert (before < -0.5).all()
    assert (np.abs(after) < 0.1 * np.abs(before)).all()


def test_flossing_more_exponents_than_the_rank_is_inf():
    cell = rg.cells.vanilla(3, 4, activation="identity")
    params = cell.init(jax.random.key(0))
    flat = params._replace(w_hh=jnp.outer(jnp.ones(4), jnp.ones(4)))
    assert float(remedies.lyapunov_flossing(cell, flat, cell.init_state(), jnp.ones((10, 3)), k=2)) == np.inf


# --- h-detach --------------------------------------------------------------------------------------------------------

WITH_H = [name for name in CASES if name not in ("stack",)]


def gradients_by_loop(case, bits):
    """∂L/∂params through a Python loop that stops the gradient where a bit is set."""
    cell, params, state, xs = case

    def loss(params):
        current, total = state, 0.0
        for x, bit in zip(xs, bits, strict=True):
            heard = current._replace(h=jax.lax.stop_gradient(current.h)) if bit else current
            current, _ = cell.update(params, cell.preactivate(params, heard, x), current)
            total = total + jnp.sum(real_norms(current))
        return total

    return jax.jit(jax.value_and_grad(loss))(params)


def gradients_by_unroll(case, bits):
    cell, params, state, xs = case
    detached = remedies.detach_h(cell)
    marked = jnp.concatenate([xs, jnp.asarray(bits, xs.dtype)[:, None]], axis=1)
    loss = lambda params: jnp.sum(real_norms(rg.unroll(detached, params, state, marked).states))
    return jax.jit(jax.value_and_grad(loss))(params)


@rows(WITH_H, fast=["lstm"])
@pytest.mark.parametrize("bits", [[1] * 4, [0] * 4, [0, 1, 1, 0]], ids=["all", "none", "some"])
def test_detach_h_is_a_loop_with_stop_gradient(name, bits, x64):
    case = example(name, num_steps=4, dtype="float64")
    value, gradient = gradients_by_unroll(case, bits)
    expected, expected_gradient = gradients_by_loop(case, bits)
    assert float(value) == pytest.approx(float(expected), rel=1e-14)
    # sums over 4 steps in another order
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
    jax.tree.map(close, gradient, expected_gradient)


@rows(["lstm", "gru_after"], fast=[])
def test_detached_everywhere_the_chain_is_the_direct_path(name, x64):
    cell, params, state, xs = example(name, dtype="float64")
    marked = remedies.detach_inputs(jax.random.key(0), xs, 1.0)
    detached = remedies.detach_h(cell)
    found = rg.step_jacobians(detached, params, state, marked)
    curve = rg.retention(detached, params, state, marked)
    direct = rg.retention(cell, params, state, xs, path="direct")
    np.testing.assert_allclose(curve.log_norm, direct.log_norm, rtol=1e-13, atol=1e-13)
    assert not np.allclose(found, rg.step_jacobians(cell, params, state, xs))


@pytest.mark.slow
def test_never_detached_is_the_plain_cell_and_values_never_change():
    cell, params, state, xs = example("lstm")
    detached = remedies.detach_h(cell)
    plain = rg.unroll(cell, params, state, xs)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient_of(cell, xs):
        return jax.grad(lambda params: jnp.sum(real_norms(rg.unroll(cell, params, state, xs).states)))(params)

    expected = gradient_of(cell, xs)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32, products in another order
    for p in (0, 0.5, 1):
        marked = remedies.detach_inputs(jax.random.key(3), xs, p)
        jax.tree.map(close, rg.unroll(detached, params, state, marked), plain)
        gradient = gradient_of(detached, marked)
        if p == 0:
            jax.tree.map(close, gradient, expected)
        else:
            assert not np.allclose(gradient.w_hh, expected.w_hh, rtol=1e-3)


def test_taps_show_which_steps_are_cut():
    cell, params, state, xs = example("lstm")
    detached = remedies.detach_h(cell)
    marked = remedies.detach_inputs(jax.random.key(3), xs, 0.5)
    is_cut = np.asarray(marked[:, -1]) == 1
    assert 0 < is_cut.sum() < len(is_cut)
    loss = lambda taps: jnp.sum(real_norms(rg.unroll(detached, params, state, marked, taps=taps).states))
    gated = jax.jit(jax.grad(loss))(rg.zero_taps(detached, len(xs))).gated
    np.testing.assert_array_equal(np.asarray(gated.h).any(axis=1), ~is_cut)


def test_detach_inputs_draws_every_step_once_for_the_batch():
    xs = jax.random.normal(jax.random.key(0), (4000, 2, 3))
    marked = remedies.detach_inputs(jax.random.key(1), xs, 0.25)
    np.testing.assert_array_equal(marked[..., :3], xs)
    bits = np.asarray(marked[..., 3])
    assert set(np.unique(bits)) == {0, 1}
    np.testing.assert_array_equal(bits[:, 0], bits[:, 1])
    # five standard errors of 4000 draws
    assert abs(bits[:, 0].mean() - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    again = remedies.detach_inputs(jax.random.key(1), xs, 0.25)
    np.testing.assert_array_equal(again, marked)
    assert not np.array_equal(remedies.detach_inputs(jax.random.key(2), xs, 0.25), marked)


@pytest.mark.slow
def test_expected_gradient_of_detaching_scales_the_gated_path(x64):
    """T = 2 has one factor that can be cut: E over bits of ∂s_2/∂s_0 is mean over the four patterns, by p."""
    cell, params, state, xs = example("lstm", num_steps=2, dtype="float64")
    detached, p = remedies.detach_h(cell), 0.25
    chain = lambda cell, xs: np.linalg.multi_dot(np.asarray(rg.step_jacobians(cell, params, state, xs))[::-1])
    mean = 0.0
    for bits in np.ndindex(2, 2):
        weight = np.prod([p if bit else 1 - p for bit in bits])
        mean = mean + weight * chain(detached, jnp.concatenate([xs, jnp.array(bits, xs.dtype)[:, None]], axis=1))
    full = np.asarray(rg.step_jacobians(cell, params, state, xs))
    run = run_forward(cell, params, state, xs)
    frozen = jax.jacobian(lambda state, z: flatten(cell.update(params, z, state)[0]))
    blocks = [jax.tree.leaves(frozen(*jax.tree.map(lambda leaf, t=t: leaf[t], run.points)[:2])) for t in range(2)]
    direct = [np.concatenate(of_step, axis=-1) for of_step in blocks]
    factors = [(1 - p) * full[t] + p * direct[t] for t in range(2)]
    np.testing.assert_allclose(mean, factors[1] @ factors[0], rtol=1e-12, atol=1e-15)


def test_detach_h_in_the_first_layer_of_a_stack():
    lower = remedies.detach_h(rg.cells.lstm(INPUT_SIZE, HIDDEN_SIZE))
    cell = rg.cells.stack(lower, rg.cells.gru(HIDDEN_SIZE, 2))
    xs = remedies.detach_inputs(jax.random.key(0), jnp.ones((5, 2, INPUT_SIZE)), 0.5)
    run = jax.eval_shape(lambda key: rg.unroll(cell, cell.init(key), cell.init_state((2,)), xs), jax.random.key(1))
    assert run.final.layer_1.h.shape == (2, 2)


def test_detach_h_refuses_misuse():
    with raises("expected a state with a field 'h', found layer_0, layer_1"):
        remedies.detach_h(example("stack").cell)
    with raises("expected a cell with an input size, found 'map("):
        remedies.detach_h(rg.map_cell(lambda s, x: s))
    for bad in (-0.1, 1.1, float("nan")):
        with raises(f"probability: expected a number from 0 to 1, found {bad}"):
            remedies.detach_inputs(jax.random.key(0), jnp.ones((3, 2)), bad)


# --- output gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "peephole_lstm", "coupled_lstm", "lstm_tanh_gates"])
def test_output_gate_l1_is_the_mean_of_the_sums(name):
    run = rg.unroll(*example(name))
    expected = np.abs(np.asarray(run.gates.o)).sum(axis=-1).mean()
    assert float(remedies.output_gate_l1(run.gates)) == pytest.approx(expected, rel=1e-6)


def test_output_gate_l1_closes_the_gate():
    cell, params, state, xs = example("lstm")
    penalty = lambda params: remedies.output_gate_l1(rg.unroll(cell, params, state, xs).gates)
    gradient = jax.jit(jax.grad(penalty))(params).b
    # o = σ(z_o) > 0 and σ' > 0: its bias has a positive gradient at the last step whatever the others do
    assert (np.asarray(gradient)[3 * HIDDEN_SIZE :] > 0).all()
    with raises("gates: expected a field 'o', found r, u, n"):
        remedies.output_gate_l1(rg.unroll(*example("gru_after")).gates)


# --- orthogonal parametrisation --------------------------------------------------------------------------------------


def defect(w_hh):
    blocks = np.asarray(w_hh, np.float64).reshape(-1, w_hh.shape[1], w_hh.shape[1])
    return np.abs(blocks @ blocks.transpose(0, 2, 1) - np.eye(w_hh.shape[1])).max()


@pytest.mark.parametrize("by", remedies.MAPS)
# 20 units: errors of sums of 20 products; bfloat16 rounds each entry by up to 2^-8 of it, thus U Uᵀ by up to 2^-7
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (jnp.float32, 1e-5),
        pytest.param(jnp.float64, 1e-12, marks=pytest.mark.slow),
        (jnp.bfloat16, 0.008),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_any_numbers_give_rotations_gate_by_gate(by, dtype, tolerance, scale, x64):
    cell = rg.cells.lstm(3, 20, dtype=dtype)
    raw = cell.init(jax.random.key(0))
    raw = raw._replace(w_hh=scale * jax.random.normal(jax.random.key(1), raw.w_hh.shape, dtype))
    params = remedies.orthogonal(raw, by=by)
    assert params.w_hh.dtype == dtype
    assert defect(params.w_hh) < tolerance
    assert (np.linalg.det(np.asarray(params.w_hh, np.float64).reshape(4, 20, 20)) > 0).all()
    np.testing.assert_array_equal(params.w_ih, raw.w_ih)
    np.testing.assert_array_equal(params.b, raw.b)


def test_maps_equal_scipy(x64):
    raw = rg.cells.vanilla(3, 5, dtype=jnp.float64).init(jax.random.key(0))
    r = np.asarray(raw.w_hh)
    a = r - r.T
    eye = np.eye(5)
    np.testing.assert_allclose(remedies.orthogonal(raw).w_hh, scipy.linalg.expm(a), atol=1e-14)
    expected = np.linalg.inv(eye + a) @ (eye - a)
    np.testing.assert_allclose(remedies.orthogonal(raw, by="cayley").w_hh, expected, atol=1e-14)


@pytest.mark.parametrize("by", remedies.MAPS)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(rg.cells.vanilla, marks=pytest.mark.slow),
        pytest.param(rg.cells.lstm, marks=pytest.mark.slow),
        rg.cells.gru,
    ],
)
def test_raw_is_the_inverse_up_to_the_sign_of_one_row(by, make, x64):
    for seed in range(4):
        params = make(3, 6, init="orthogonal", dtype=jnp.float64).init(jax.random.key(seed))
        again = remedies.orthogonal(remedies.orthogonal_raw(params, by=by), by=by)
        blocks, found = (np.asarray(p.w_hh).reshape(-1, 6, 6) for p in (params, again))
        expected = blocks.copy()
        expected[np.linalg.det(blocks) < 0, 0] *= -1
        # Cayley's A is tan(θ/2): angles near π, here up to 1e3 of it, cost three digits
        np.testing.assert_allclose(found, expected, atol=1e-11)
    assert (np.linalg.det(blocks) > 0).any() or make is rg.cells.vanilla


@pytest.mark.slow
def test_raw_in_float32():
    params = rg.cells.lstm(3, 16, init="orthogonal").init(jax.random.key(0))
    again = remedies.orthogonal(remedies.orthogonal_raw(params))
    same = np.abs(np.asarray(again.w_hh)) - np.abs(np.asarray(params.w_hh))
    assert np.abs(same).max() < 1e-5  # float32, 16 squarings and products at the most


@pytest.mark.parametrize("by", remedies.MAPS)
def test_raw_in_bfloat16(by):
    """The drawn blocks come back, to the rounding of A; what is not orthogonal is still refused."""
    params = rg.cells.lstm(3, 5, init="orthogonal", dtype=jnp.bfloat16).init(jax.random.key(0))
    raw = remedies.orthogonal_raw(params, by=by)
    again = remedies.orthogonal(raw, by=by)
    assert (raw.w_hh.dtype, again.w_hh.dtype) == (jnp.bfloat16, jnp.bfloat16)
    wide = lambda p: np.asarray(p.w_hh, np.float64)
    same = np.abs(wide(again)) - np.abs(wide(params))
    # both maps change by at most 2 ‖δA‖ ≤ 2 N · 2^-8 max |A|; and U is rounded to 2^-8 once more
    largest = 2 * np.abs(wide(raw)).max()
    assert np.abs(same).max() < 2 * 5 * 2**-8 * largest + 2**-8
    with raises("params.w_hh: expected orthogonal blocks, found U Uᵀ − I up to"):
        remedies.orthogonal_raw(rg.cells.lstm(3, 5, dtype=jnp.bfloat16).init(jax.random.key(0)))


def test_rotations_close_to_a_half_turn_have_their_raw_in_float32():
    """An angle 1e-5 short of π, which float32 holds: cond(I + U) is 2e5."""
    angle = np.pi - 1e-5
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    params = rg.cells.vanilla(3, 3).init(jax.random.key(0))._replace(w_hh=jnp.asarray(turn, jnp.float32))
    raw = remedies.orthogonal_raw(params)
    # A = R − Rᵀ has ∓angle beside its diagonal; float32 holds sin(angle) = 1e-5 to 1e-12 and the angle itself to 1e-7
    assert abs(float(raw.w_hh[1, 0] - raw.w_hh[0, 1])) == pytest.approx(angle, rel=3e-7)
    np.testing.assert_allclose(remedies.orthogonal(raw).w_hh, turn, atol=1e-5)  # float32, squarings and products


@pytest.mark.slow
def test_identity_starts_at_zero_with_a_gradient():
    cell = rg.cells.vanilla(3, 5, init="identity")
    raw = remedies.orthogonal_raw(cell.init(jax.random.key(0)))
    assert not raw.w_hh.any()
    xs = jax.random.normal(jax.random.key(1), (6, 3))

    def loss(raw):
        return jnp.sum(rg.unroll(cell, remedies.orthogonal(raw), cell.init_state(), xs).final.h)

    gradient = jax.jit(jax.grad(loss))(raw).w_hh
    assert gradient.any()
    np.testing.assert_allclose(gradient, -gradient.T, atol=1e-6)  # only R − Rᵀ acts


@pytest.mark.parametrize("by", [pytest.param("exponential", marks=pytest.mark.slow), "cayley"])
def test_training_stays_orthogonal_and_the_linear_cell_keeps_its_gradient(by, x64):
    cell = rg.cells.vanilla(3, 5, activation="identity", init="orthogonal", dtype=jnp.float64)
    raw = remedies.orthogonal_raw(cell.init(jax.random.key(0)), by=by)
    xs = jax.random.normal(jax.random.key(1), (30, 3), jnp.float64)

    def loss(raw):
        run = rg.unroll(cell, remedies.orthogonal(raw, by=by), cell.init_state(), xs)
        return jnp.sum(jnp.square(run.states.h - 1.0))

    optimizer = optax.chain(remedies.clip_by_global_norm(1.0), optax.sgd(0.05))  # 20 steps of length 0.05 at most
    opt_state = optimizer.init(raw)
    evaluate = jax.jit(jax.value_and_grad(loss))
    first, _ = evaluate(raw)
    for _ in range(20):
        value, gradient = evaluate(raw)
        updates, opt_state = optimizer.update(gradient, opt_state)
        raw = optax.apply_updates(raw, updates)
    assert float(value) < 0.9 * float(first)
    params = remedies.orthogonal(raw, by=by)
    assert defect(params.w_hh) < 1e-12
    curve = rg.retention(cell, params, cell.init_state(), xs)
    np.testing.assert_allclose(curve.log_norm, 0, atol=1e-12)


def test_orthogonal_refuses_misuse():
    params = rg.cells.lstm(3, 5).init(jax.random.key(0))
    for function in (remedies.orthogonal, remedies.orthogonal_raw):
        with raises("unknown map 'exp'; expected one of: exponential, cayley"):
            function(params, by="exp")
        with raises("params: expected a field 'w_hh' of shape (G·N, N), found IndRNNParams"):
            function(example("indrnn_tanh").params)
        with raises("params.w_hh: expected shape (G·N, N), found (7, 5)"):
            function(params._replace(w_hh=jnp.ones((7, 5))))
    with raises("params.w_hh: expected orthogonal blocks, found U Uᵀ − I up to"):
        remedies.orthogonal_raw(params)
    with raises("params.w_hh: expected orthogonal blocks, found U Uᵀ − I up to nan"):
        remedies.orthogonal_raw(params._replace(w_hh=jnp.full((20, 5), jnp.nan)))
    # also where the two are off −1 by a rounding: that moves them apart in length, not in angle
    for length in (1.0, 1 - 2**-20):
        half_turn = jnp.diag(jnp.array([-length, -length, 1.0]))
        with raises("params.w_hh: expected rotations by less than π, found the eigenvalue −1"):
            remedies.orthogonal_raw(rg.cells.vanilla(3, 3).init(jax.random.key(0))._replace(w_hh=half_turn))


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", remedies.REMEDIES)
def test_every_remedy_of_the_table_exists(name):
    remedy = remedies.REMEDIES[name]
    assert remedy.what
    assert remedy.source
    for place in remedy.where:
        module, function, option = re.fullmatch(r"(\w+)\.(\w+)(?:\((\w+)\))?", place).groups()
        found = getattr(importlib.import_module(f"rnngrad.{module}"), function)
        assert option is None or option in inspect.signature(found).parameters


def test_every_cell_with_the_option_is_in_the_table():
    cells = {name: value for name, value in vars(rg.cells).items() if inspect.isfunction(value)}
    having = lambda option: {name for name, make in cells.items() if option in inspect.signature(make).parameters}
    listed = lambda remedy, option: {
        place.removeprefix("cells.").removesuffix(f"({option})")
        for place in remedies.REMEDIES[remedy].where
        if place.startswith("cells.") and place.endswith(f"({option})")
    }
    for remedy in ("forget bias", "chrono", "UGI"):
        assert listed(remedy, "forget_bias") == having("forget_bias")
    assert listed("initial memory", "initial_memory") == having("initial_memory")
    # an orthogonal start is for cells with a recurrent matrix
    drawn = lambda name: jax.eval_shape(cells[name](3, 5).init, jax.random.key(0))
    recurrent = {name for name in having("init") if "w_hh" in drawn(name)._fields}
    assert listed("orthogonal start", "init") == recurrent


def test_every_function_here_is_in_the_table():
    listed = {place.removeprefix("remedies.") for remedy in remedies.REMEDIES.values() for place in remedy.where}
    public = {
        name
        for name, value in vars(remedies).items()
        if inspect.isfunction(value) and value.__module__ == remedies.__name__ and not name.startswith("_")
    }
    assert public <= listed
