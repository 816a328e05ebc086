"""Chains and retention against closed forms, mpmath, and each other, at every length."""

from __future__ import annotations

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies as st

import rnngrad as rg
from rnngrad.jacobians import layout_of
from rnngrad.unroll import run_forward
from tests.cases import CASES, example, flatten, unflatten


def constant_gate(f, hidden_size=3, dtype=jnp.float32):
    """An LSTM whose forget gate is f at every step and whose other paths are closed: zero weights, b_f = logit f."""
    cell = rg.cells.lstm(2, hidden_size, forget_bias=float(scipy.special.logit(f)), dtype=dtype)
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
    return cell, params._replace(b=cell.init(jax.random.key(0)).b * (params.b + 1) * _only_forget(hidden_size, dtype))


def _only_forget(n, dtype):
    return jnp.zeros(4 * n, dtype).at[n : 2 * n].set(1)


def random_lstm(seed, *, hidden_size=32, input_size=64, dtype=jnp.float32):
    """Weights and biases U(±1/√N), 1 added to the forget bias; inputs N(0, 1)."""
    cell = rg.cells.lstm(input_size, hidden_size, init="equinox", dtype=dtype)
    params = cell.init(jax.random.key(seed))
    return cell, params._replace(b=params.b.at[hidden_size : 2 * hidden_size].add(1))


def inputs(seed, num_steps, input_size, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1_000 + seed), (num_steps, input_size), dtype)


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forget_bias", "f_to_the_100"), [(0, 7.9e-31), (1, 2.5e-14), (2, 3.1e-6), (3, 7.8e-3), (5, 0.511)]
)
def test_constant_gate_after_100_steps(forget_bias, f_to_the_100):
    cell, params = constant_gate(scipy.special.expit(forget_bias))
    curve = rg.retention(cell, params, cell.init_state(), jnp.zeros((100, 2)), of="c", wrt="c")
    exact = 100 * np.log(scipy.special.expit(float(forget_bias)))
    np.testing.assert_allclose(curve.log_norm[-1], exact, rtol=1e-5)
    np.testing.assert_allclose(np.exp(exact), f_to_the_100, rtol=0.02)  # the figures have two digits


@pytest.mark.parametrize("path", ["full", "direct"])
def test_constant_gate_to_1e5_steps(path):
    cell, params = constant_gate(0.5)
    curve = rg.retention(cell, params, cell.init_state(), jnp.zeros((100_000, 2)), of="c", wrt="c", path=path)
    np.testing.assert_allclose(curve.log_norm[-1], -69314.718, rtol=0, atol=8e-3)  # the spacing of float32 there
    np.testing.assert_allclose(curve.log_norm, np.arange(100_001) * np.log(0.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("f", "norm_dies", "product_dies"),
    # The reference list has 63 and 126 for f = 0.5: there 0.5^126 = 2^-126 is float32's smallest normal number, which
    # is kept, so the first lag that is lost is one later.
    [(0.5, 64, 127), (scipy.special.expit(1.0), 140, 279), (0.99, 4345, 8690)],
)
def test_lags_at_which_naive_float32_dies(f, norm_dies, product_dies):
    cell, params = constant_gate(f)
    xs = jnp.zeros((product_dies + 1, 2))
    curve = rg.retention(cell, params, cell.init_state(), xs, of="c", wrt="c")
    naive = np.asarray(rg.naive_retention(cell, params, cell.init_state(), xs, of="c", wrt="c"))
    if jax.default_backend() == "gpu":
        pytest.skip("keeps subnormals; its lags are tested where its floor is")
    assert curve.naive_death_lag == norm_dies
    assert np.flatnonzero(np.isneginf(naive))[0] == norm_dies
    assert np.isfinite(curve.log_norm).all()
    before = slice(0, norm_dies - 2)
    np.testing.assert_allclose(naive[before], curve.log_norm[before], rtol=0, atol=1e-3)
    # the bare product, by plain multiplication
    product = jax.lax.scan(lambda p, _: (p * jnp.float32(f), p * jnp.float32(f)), jnp.float32(1), length=len(xs))[1]
    assert 1 + np.flatnonzero(np.asarray(product) == 0)[0] == product_dies


def test_certificate_and_floor():
    found = rg.certificate(jnp.float32)
    assert (found.dtype, found.matmul_precision, found.backend) == ("float32", "highest", jax.default_backend())
    assert round(found.float32_floor, 1) == (-103.3 if found.backend == "gpu" else -87.3)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_orthogonal_linear_cell_keeps_everything(norm):
    cell = rg.cells.vanilla(3, 16, activation="identity", init="orthogonal")
    curve = rg.retention(cell, cell.init(jax.random.key(0)), cell.init_state(), inputs(0, 2000, 3), norm=norm)
    # 2,000 products of a float32 orthogonal matrix, orthogonal to about 1e-7: the defect adds up to 2e-4 at most
    np.testing.assert_allclose(curve.log_norm, 0, rtol=0, atol=2e-4)
    assert curve.naive_death_lag == -1


def test_constant_map_has_its_eigenvalues(x64):
    """s' = A s: the chain is A^lag, whose norm grows at log of the spectral radius, non-normal A or not."""
    a = jnp.asarray([[0.9, 5.0, 0.0], [0.0, 0.8, 1.0], [0.0, 0.0, 0.7]])
    cell = rg.map_cell(lambda s, x: a @ s)
    curve = rg.retention(cell, None, jnp.ones(3), jnp.zeros((3000, 0)), norm="spectral")
    for lag in (1, 7, 40):
        expected = np.log(np.linalg.norm(np.linalg.matrix_power(np.asarray(a), lag), 2))
        np.testing.assert_allclose(curve.log_norm[lag], expected, rtol=1e-12)
    rate = rg.decay_rate(curve.log_norm, (1000, 3000))
    np.testing.assert_allclose(rate, np.log(0.9), rtol=1e-10)


@pytest.mark.parametrize(("gain", "nats_per_step"), [(np.exp(1.0), 1.0), (np.exp(-10.0), -10.0)])
def test_explosion_and_decay_beyond_floats(gain, nats_per_step):
    """e^+1000 and e^-10000 in 1,000 steps, both finite and right."""
    cell = rg.cells.vanilla(1, 8, activation="identity", init=rg.initializers.orthogonal(gain))
    params = cell.init(jax.random.key(0))
    curve = rg.retention(cell, params, cell.init_state(), jnp.zeros((1000, 1)))
    # float32 rounding of the gain itself is 6e-8 per step; of the products 1e-7, as above
    np.testing.assert_allclose(curve.log_norm, nats_per_step * np.arange(1001), rtol=1e-6, atol=2e-3)
    assert curve.nonfinite_step == -1
    assert curve.naive_death_lag == (44 if nats_per_step > 0 else 5)  # ±88.7 nats for the sum of squares / 2, or ±10


def test_exact_zero_is_minus_infinity_at_every_lag():
    cell = rg.cells.vanilla(2, 3, activation="relu")
    params = cell.init(jax.random.key(0))
    dead = params._replace(b=params.b - 100)  # every unit off
    curve = rg.retention(cell, dead, cell.init_state(), jnp.ones((5, 2)))
    np.testing.assert_array_equal(curve.log_norm, [0] + [-np.inf] * 5)
    direct = rg.retention(cell, params, cell.init_state(), jnp.ones((5, 2)), path="direct")
    np.testing.assert_array_equal(direct.log_norm, [0] + [-np.inf] * 5)
    assert curve.naive_death_lag == 1


def test_lru_chain_is_the_power_of_its_eigenvalues(x64):
    cell = rg.cells.lru(2, 5, radius=(0.3, 0.99), dtype=jnp.float64)
    params = cell.init(jax.random.key(1))
    curve = rg.retention(cell, params, cell.init_state(), inputs(0, 400, 2, jnp.float64))
    lags = np.arange(401)[:, None]
    modulus = np.abs(np.asarray(rg.cells.eigenvalues(params)))
    expected = 0.5 * scipy.special.logsumexp(2 * lags * np.log(modulus), axis=1) - 0.5 * np.log(5)
    np.testing.assert_allclose(curve.log_norm, expected, rtol=1e-11, atol=1e-12)


def test_indrnn_chain_is_a_product_of_numbers(x64):
    cell = rg.cells.indrnn(2, 4, activation="tanh", dtype=jnp.float64)
    params = cell.init(jax.random.key(1))
    traj = rg.unroll(cell, params, cell.init_state(), inputs(0, 50, 2, jnp.float64))
    factors = (1 - np.asarray(traj.states.h) ** 2) * np.asarray(params.u)
    chain = rg.logscaled.to_array(rg.jacobian_chain(cell, params, cell.init_state(), inputs(0, 50, 2, jnp.float64)))
    np.testing.assert_allclose(chain[0], np.diag(np.prod(factors, axis=0)), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("factory", [rg.cells.lstm, rg.cells.peephole_lstm, rg.cells.coupled_lstm])
def test_direct_path_is_the_product_of_forget_gates(factory, x64):
    cell = factory(3, 6, forget_bias=1.0, dtype=jnp.float64)
    params, xs = cell.init(jax.random.key(0)), inputs(0, 300, 3, jnp.float64)
    traj = rg.unroll(cell, params, cell.init_state(), xs)
    curve = rg.retention(cell, params, cell.init_state(), xs, of="c", wrt="c", path="direct")
    logs = np.cumsum(np.log(np.asarray(traj.gates.f))[::-1], axis=0)
    expected = 0.5 * scipy.special.logsumexp(2 * logs, axis=1) - 0.5 * np.log(6)
    np.testing.assert_allclose(curve.log_norm[1:], expected, rtol=1e-12)


@pytest.mark.parametrize("reset", ["after", "before"])
def test_gru_direct_path_is_the_product_of_kept_shares(reset, x64):
    cell = rg.cells.gru(3, 6, reset=reset, dtype=jnp.float64)
    params, xs = cell.init(jax.random.key(0)), inputs(0, 300, 3, jnp.float64)
    kept = np.asarray(rg.unroll(cell, params, cell.init_state(), xs).gates.u)
    curve = rg.retention(cell, params, cell.init_state(), xs, path="direct")
    logs = np.cumsum(np.log(kept)[::-1], axis=0)
    expected = 0.5 * scipy.special.logsumexp(2 * logs, axis=1) - 0.5 * np.log(6)
    np.testing.assert_allclose(curve.log_norm[1:], expected, rtol=1e-12)


# --- high precision --------------------------------------------------------------------------------------------------


def test_float64_chain_equals_mpmath(x64):
    """A whole LSTM, states and chain, in 60 digits; 1e-9 of the size of the logarithm at every lag."""
    num_steps, n, d = 250, 3, 2
    cell = rg.cells.lstm(d, n, forget_bias=1.0, dtype=jnp.float64)
    params, xs = cell.init(jax.random.key(3)), inputs(3, num_steps, d, jnp.float64)
    curve = rg.retention(cell, params, cell.init_state(), xs, of="c", wrt="c")
    with mpmath.workdps(60):
        w, u = mpmath.matrix(np.asarray(params.w_ih).tolist()), mpmath.matrix(np.asarray(params.w_hh).tolist())
        b = mpmath.matrix(np.asarray(params.b).tolist())
        sigma = lambda v: 1 / (1 + mpmath.exp(-v))
        h, c = mpmath.zeros(n, 1), mpmath.zeros(n, 1)
        jacobians = []
        for x in np.asarray(xs):
            z = w * mpmath.matrix(x.tolist()) + u * h + b
            i, f, o = ([sigma(z[k * n + j]) for j in range(n)] for k in (0, 1, 3))
            g = [mpmath.tanh(z[2 * n + j]) for j in range(n)]
            jacobian = mpmath.zeros(2 * n, 2 * n)
            new_c = [f[j] * c[j] + i[j] * g[j] for j in range(n)]
            for j in range(n):
                tanh_c = mpmath.tanh(new_c[j])
                slope = o[j] * (1 - tanh_c**2)
                for k in range(n):
                    from_gates = (
                        c[j] * f[j] * (1 - f[j]) * u[n + j, k]
                        + g[j] * i[j] * (1 - i[j]) * u[j, k]
                        + i[j] * (1 - g[j] ** 2) * u[2 * n + j, k]
                    )
                    jacobian[n + j, k] = from_gates
                    jacobian[j, k] = slope * from_gates + tanh_c * o[j] * (1 - o[j]) * u[3 * n + j, k]
                jacobian[n + j, n + j] = f[j]
                jacobian[j, n + j] = slope * f[j]
            jacobians.append(jacobian)
            c = mpmath.matrix(new_c)
            h = mpmath.matrix([o[j] * mpmath.tanh(new_c[j]) for j in range(n)])
        rows = mpmath.zeros(n, 2 * n)
        for j in range(n):
            rows[j, n + j] = 1
        expected = [0.0]
        for jacobian in reversed(jacobians):
            rows = rows * jacobian
            square = mpmath.fsum(rows[j, n + k] ** 2 for j in range(n) for k in range(n))
            expected.append(float(mpmath.log(square / n) / 2))
    np.testing.assert_allclose(curve.log_norm, expected, rtol=1e-9, atol=1e-12)


def _float64_log_norms(cell64, params, old_states, xs, columns):
    """Log-norm of every chain by forming each Jacobian in float64 and multiplying in NumPy, scaled by its norm."""
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)
    params, old_states, xs = wide(params), wide(old_states), wide(xs)
    layout = layout_of(jax.tree.map(lambda leaf: leaf[0], old_states))

    def step(vector, x):
        return flatten(cell64.step(params, unflatten(layout, vector), x)[0])

    jacobian = jax.jit(lambda s, x: jax.jacfwd(step)(flatten(s), x))
    rows, log_scale, found = np.eye(sum(layout.sizes))[columns], 0.0, [0.0]
    for t in reversed(range(len(xs))):
        rows = rows @ np.asarray(jacobian(jax.tree.map(lambda leaf, t=t: leaf[t], old_states), xs[t]))
        size = np.linalg.norm(rows)
        rows, log_scale = rows / size, log_scale + np.log(size)
        found.append(log_scale + np.log(np.linalg.norm(rows[:, columns])) - 0.5 * np.log(len(columns)))
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "gru", "vanilla", "orthogonal"])
def test_float32_chain_follows_float64_to_10000_steps(name):
    """1e-3 nats plus 1e-5 of the size at every lag, along the same (float32) states."""
    n, d, num_steps = 16, 8, 10_000
    make = {
        "lstm": lambda dtype: rg.cells.lstm(d, n, forget_bias=1.0, dtype=dtype),
        "gru": lambda dtype: rg.cells.gru(d, n, dtype=dtype),
        "vanilla": lambda dtype: rg.cells.vanilla(d, n, dtype=dtype),
        "orthogonal": lambda dtype: rg.cells.vanilla(d, n, activation="identity", init="orthogonal", dtype=dtype),
    }[name]
    cell = make(jnp.float32)
    params, xs = cell.init(jax.random.key(0)), inputs(0, num_steps, d)
    field = "c" if name == "lstm" else "h"
    curve = rg.retention(cell, params, cell.init_state(), xs, of=field, wrt=field)
    old_states = run_forward(cell, params, cell.init_state(), xs).points.state
    columns = layout_of(cell.init_state()).positions(field)
    with jax.enable_x64(True):
        expected = _float64_log_norms(make(jnp.float64), params, old_states, xs, columns)
    excess = np.abs(np.asarray(curve.log_norm, np.float64) - expected) - 1e-3 - 1e-5 * np.abs(expected)
    assert excess.max() <= 0, f"worst at lag {excess.argmax()}: off by {excess.max():.2e} nats too much"


# --- reference medians -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_random_lstm_medians():
    """N=32, weights U(±1/√N), b_f=1, lag 100, 20 seeds: median log10 ‖∂c_T/∂c_k‖_F −9.6, ∏f −12.8.

    The reference does not name its inputs; with D=64 inputs N(0, 1) and biases drawn like the weights we find both
    within the scatter of a median of 20 (its 95 % bootstrap interval, about ±0.4 decades), for other seeds.
    """
    found = {"full": [], "direct": []}
    cell, _ = random_lstm(0)
    for seed in range(20):
        _, params = random_lstm(seed)
        for path, values in found.items():
            curve = rg.retention(cell, params, cell.init_state(), inputs(seed, 100, 64), of="c", wrt="c", path=path)
            values.append((curve.log_norm[-1] + 0.5 * np.log(32)) / np.log(10))  # back to the unnormalised norm
    assert abs(np.median(found["full"]) - -9.6) < 0.5
    assert abs(np.median(found["direct"]) - -12.8) < 0.5


# --- blocks that drift apart -----------------------------------------------------------------------------------------


def _open_output_gate(dtype):
    cell = rg.cells.lstm(8, 16, forget_bias=6.0, dtype=dtype)
    return cell, {"of": "h", "wrt": "h", "path": "only:o"}


def _fast_layer_on_a_slow_one(dtype):
    slow, fast = rg.cells.lstm(8, 16, forget_bias=6.0, dtype=dtype), rg.cells.vanilla(16, 6, dtype=dtype)
    return rg.cells.stack(slow, fast), {"of": "layer_1.h", "wrt": "layer_1.h"}


@pytest.mark.parametrize("make", [_open_output_gate, _fast_layer_on_a_slow_one])
def test_a_block_far_below_the_others_keeps_its_digits(make):
    """One block of a row dies hundreds of nats below another: at a common scale float32 would return −inf."""
    cell, options = make(jnp.float32)
    params, xs = cell.init(jax.random.key(0)), inputs(0, 300, 8)
    curve = rg.retention(cell, params, cell.init_state(), xs, **options)
    assert curve.log_norm[-1] < -150
    with jax.enable_x64(True):
        cell64, _ = make(jnp.float64)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, cell.init_state(), xs))
        expected = rg.retention(cell64, *wide, **options).log_norm
        assert np.isfinite(expected).all()
    # states of two precisions here, 300 steps: rounding of either sort adds up; 1.4e-4 measured
    np.testing.assert_allclose(curve.log_norm, expected, rtol=1e-6, atol=1e-3)


# --- agreement of implementations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "lru"])
def test_associative_scan_equals_reverse_scan(name, x64):
    ex = example(name, num_steps=13, dtype="float64")
    chain = rg.jacobian_chain(*ex)
    products = rg.prefix_products(rg.step_jacobians(*ex))
    distance = rg.logscaled.log_distance(products, chain)
    assert (np.asarray(distance) < np.log(1e-11)).all()


def test_associative_scan_beyond_floats():
    ex = example("lstm", num_steps=600)
    chain, products = rg.jacobian_chain(*ex), rg.prefix_products(rg.step_jacobians(*ex))
    log_norm = rg.logscaled.log_norm(chain)
    assert log_norm[0] < -120
    np.testing.assert_allclose(rg.logscaled.log_norm(products), log_norm, rtol=1e-5, atol=1e-3)


def test_blocks_are_addressed_by_name(x64):
    ex = example("lstm", dtype="float64")
    whole = rg.logscaled.to_array(rg.jacobian_chain(*ex))
    for i, of in enumerate(("h", "c")):
        for j, wrt in enumerate(("h", "c")):
            block = rg.logscaled.to_array(rg.jacobian_chain(*ex, of=of, wrt=wrt))
            np.testing.assert_allclose(block, whole[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4], rtol=1e-12, atol=1e-15)


def test_blocks_of_a_stack(x64):
    ex = example("stack", dtype="float64")
    whole = rg.logscaled.to_array(rg.jacobian_chain(*ex))  # layer_0.h 5, layer_1.h 4, layer_1.c 4
    upper = rg.logscaled.to_array(rg.jacobian_chain(*ex, of="layer_1", wrt="layer_0.h"))
    np.testing.assert_allclose(upper, whole[:, 5:, :5], rtol=1e-12, atol=1e-15)
    below = rg.retention(*ex, of="layer_0", wrt="layer_1")  # nothing flows down the layers
    np.testing.assert_array_equal(below.log_norm, -np.inf)


def test_cotangent_is_one_row_of_the_chain(x64):
    ex = example("lstm", dtype="float64")
    cotangent = jax.tree.map(lambda leaf: jnp.sin(leaf + 1), ex.state)
    row = rg.logscaled.to_array(rg.jacobian_chain(*ex, cotangent=cotangent))
    whole = rg.logscaled.to_array(rg.jacobian_chain(*ex))
    expected = jnp.concatenate([cotangent.h, cotangent.c]) @ whole
    np.testing.assert_allclose(row[:, 0], expected, rtol=1e-11, atol=1e-14)


def test_reduce_keeps_only_what_it_returns(x64):
    ex = example("gru_after", dtype="float64")
    norms = rg.jacobian_chain(*ex, reduce=rg.logscaled.log_norm)
    np.testing.assert_allclose(norms, rg.logscaled.log_norm(rg.jacobian_chain(*ex)), rtol=1e-13)


def test_vmap_gives_a_batch_of_curves(x64):
    ex = example("lstm", dtype="float64")
    batch = jnp.stack([ex.xs, -ex.xs, 2 * ex.xs])
    one = lambda xs: rg.retention(ex.cell, ex.params, ex.state, xs, of="c", wrt="c")
    curves = jax.vmap(one)(batch)
    assert curves.log_norm.shape == (3, len(ex.xs) + 1)
    assert curves.certificate == one(ex.xs).certificate
    for index, xs in enumerate(batch):
        np.testing.assert_allclose(curves.log_norm[index], one(xs).log_norm, rtol=1e-12, atol=1e-13)


def test_retention_is_differentiable_in_the_parameters(x64):
    """d log-retention / d b against central differences: a chain at e^-30 has a gradient of order 1."""
    ex = example("lstm", num_steps=40, dtype="float64")

    @jax.jit
    def value(b):
        return rg.retention(ex.cell, ex.params._replace(b=b), ex.state, ex.xs, of="c", wrt="c").log_norm[-1]

    gradient = jax.grad(value)(ex.params.b)
    direction = jnp.cos(jnp.arange(16, dtype=jnp.float64))
    difference = (value(ex.params.b + 1e-5 * direction) - value(ex.params.b - 1e-5 * direction)) / 2e-5
    # truncation (1e-5)² times a third derivative of order 100; round-off 1e-15 · 30 / 1e-5
    np.testing.assert_allclose(gradient @ direction, difference, rtol=1e-6)


# --- properties over shapes, dtypes, gains ---------------------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=6, derandomize=True)
@hypothesis.given(
    name=st.sampled_from(sorted(CASES)),
    num_steps=st.sampled_from([1, 2, 9]),
    gain=st.sampled_from([1e-3, 0.3, 1.0, 3.0]),
)
def test_chain_equals_product_for_any_length_and_gain(name, num_steps, gain):
    with jax.enable_x64(True):
        ex = example(name, num_steps=num_steps, dtype="float64")
        params = jax.tree.map(lambda leaf: gain * leaf, ex.params)
        curve = rg.retention(ex.cell, params, ex.state, ex.xs)
        jacobians = np.asarray(rg.step_jacobians(ex.cell, params, ex.state, ex.xs))
        product = np.eye(jacobians.shape[-1])
        expected = [0.0]
        for jacobian in jacobians[::-1]:
            product = product @ jacobian
            norm = np.linalg.norm(product) / np.sqrt(len(product))
            expected.append(np.log(norm) if norm > 0 else -np.inf)
        np.testing.assert_allclose(curve.log_norm, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(
    name=st.sampled_from(sorted(CASES)),
    input_size=st.integers(1, 4),
    hidden_size=st.integers(1, 5),
    num_steps=st.integers(1, 12),
    gain=st.floats(1e-3, 30),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**16),
)
def test_chain_equals_product_for_any_shape_dtype_and_gain(name, input_size, hidden_size, num_steps, gain, dtype, seed):
    with jax.enable_x64(True):
        cell = CASES[name].make(input_size, hidden_size, dtype=dtype)
        params = jax.tree.map(lambda leaf: leaf * jnp.asarray(gain, leaf.dtype), cell.init(jax.random.key(seed)))
        xs = inputs(seed, num_steps, input_size, dtype)
        curve = rg.retention(cell, params, cell.init_state(), xs)
        jacobians = np.asarray(rg.step_jacobians(cell, params, cell.init_state(), xs), np.float64)
    eps = np.finfo(dtype).eps
    product, sizes = np.eye(jacobians.shape[-1]), 1.0
    for lag, jacobian in enumerate(jacobians[::-1], start=1):
        product, sizes = product @ jacobian, sizes * np.linalg.norm(jacobian)
        norm = np.linalg.norm(product)
        if norm == 0:
            assert curve.log_norm[lag] == -np.inf
            continue
        # each product is rounded to S·eps of |a||b|: relative to the result that grows by how much the factors cancel
        error = 8 * lag * len(product) * eps * max(1.0, sizes / norm)
        if error < 0.1:
            expected = np.log(norm / np.sqrt(len(product)))
            np.testing.assert_allclose(curve.log_norm[lag], expected, rtol=4 * eps, atol=error + 4 * eps)


def test_ten_thousand_steps_with_exploding_gain_stay_finite_or_are_flagged():
    linear = rg.cells.vanilla(2, 6, activation="identity", init=rg.initializers.gaussian(20.0))
    params = linear.init(jax.random.key(0))
    curve = rg.retention(linear, params, linear.init_state(), jnp.zeros((10_000, 2)))
    radius = np.abs(np.linalg.eigvals(np.asarray(params.w_hh, np.float64))).max()
    assert curve.log_norm[-1] > 20_000
    np.testing.assert_allclose(rg.decay_rate(curve.log_norm, (5_000, 10_000)), np.log(radius), rtol=1e-4)
    relu = rg.cells.vanilla(2, 6, activation="relu", init=rg.initializers.gaussian(20.0))
    curve = rg.retention(relu, relu.init(jax.random.key(0)), relu.init_state(), inputs(0, 300, 2))
    # the state itself overflows: the step is named, and nothing pretends to be a number from there on
    states = rg.unroll(relu, relu.init(jax.random.key(0)), relu.init_state(), inputs(0, 300, 2)).states.h
    first = int(np.flatnonzero(~np.isfinite(states).all(axis=1))[0]) + 1
    assert curve.nonfinite_step == first
    assert np.isnan(curve.log_norm[1:]).all()
    # and so says every other measurement
    arguments = relu, relu.init(jax.random.key(0)), relu.init_state(), inputs(0, 300, 2)
    assert np.isnan(rg.logscaled.log_norm(rg.jacobian_chain(*arguments))[:-1]).all()
    assert np.isnan(rg.gradient_paths(*arguments, max_crossings=1).log_norm[1:]).all()
    assert np.isnan(rg.step_jacobians(*arguments)[first:]).all()


def test_saturated_units_do_not_break_the_chain():
    cell = rg.cells.lstm(2, 3, forget_bias=1.0)
    params = jax.tree.map(lambda leaf: 1e4 * leaf, cell.init(jax.random.key(0)))
    curve = rg.retention(cell, params, cell.init_state(), inputs(0, 50, 2), of="c", wrt="c")
    assert curve.nonfinite_step == -1
    # gates are 0 or 1 to the last digit, so no gated path is left and what remains is the product of forget gates
    forget = np.asarray(rg.unroll(cell, params, cell.init_state(), inputs(0, 50, 2)).gates.f, np.float64)
    kept = np.sqrt(np.mean(np.cumprod(forget[::-1], axis=0) ** 2, axis=1))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(curve.log_norm[1:], np.log(kept), rtol=1e-5, atol=1e-5)


def test_death_lag_does_not_depend_on_the_norm_asked_for():
    doubling = rg.map_cell(lambda s, x: 2 * s)
    curves = [
        rg.retention(doubling, None, jnp.zeros(100), jnp.zeros((70, 0)), norm=norm)
        for norm in ("frobenius", "spectral")
    ]
    naive = np.asarray(rg.naive_retention(doubling, None, jnp.zeros(100), jnp.zeros((70, 0))))
    # 100 squares of 2^61 exceed 2^128
    assert [int(curve.naive_death_lag) for curve in curves] == [61, 61]
    assert np.flatnonzero(np.isposinf(naive))[0] == 61


# --- summaries -------------------------------------------------------------------------------------------------------


def test_decay_rate_equals_numpy_polyfit(x64):
    lags = np.arange(101)
    log_norm = -0.3 * lags + np.random.default_rng(0).normal(size=101)
    expected = np.polyfit(lags[20:81], log_norm[20:81], 1)[0]
    np.testing.assert_allclose(rg.decay_rate(jnp.asarray(log_norm), (20, 80)), expected, rtol=1e-12)
    assert np.isnan(rg.decay_rate(jnp.full(101, -jnp.inf), (20, 80)))
    with pytest.raises(ValueError, match=r"0 <= first < last <= 100, the longest lag, found \(30, 400\)"):
        rg.decay_rate(jnp.asarray(log_norm), (30, 400))


def test_half_life():
    np.testing.assert_allclose(rg.half_life(jnp.log(jnp.array([0.5, 0.25]))), [1, 0.5], rtol=1e-6)
    assert np.isposinf(rg.half_life(jnp.array(0.0)))
    assert np.isposinf(rg.half_life(jnp.array(0.1)))


def test_curve_says_what_it_is():
    ex = example("lstm")
    curve = rg.retention(*ex, of="c", wrt="h", path="only:f", norm="spectral")
    assert (curve.of, curve.wrt, curve.path, curve.norm) == ("c", "h", "only:f", "spectral")
    assert dataclasses.is_dataclass(curve)
    np.testing.assert_array_equal(curve.lags, np.arange(len(ex.xs) + 1))
    assert curve.log_norm[0] == -np.inf  # ∂c_T/∂h_T is zero
