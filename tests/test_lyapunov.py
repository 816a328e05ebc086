"""Spectra against closed forms, known systems, exact exponents of random products, and QR at every step in float64."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import rnngrad as rg
from tests.cases import example

NO_INPUT = lambda num_steps: jnp.zeros((num_steps, 0))
CAT = rg.map_cell(lambda s, x: jnp.array([[2.0, 1.0], [1.0, 1.0]]) @ s % 1.0)
HENON = rg.map_cell(lambda s, x: jnp.stack([1 - 1.4 * s[0] ** 2 + s[1], 0.3 * s[0]]))
PRODUCT = rg.map_cell(lambda s, x: x @ s)
"""s' = x s: the inputs are the step Jacobians."""


def numpy_spectrum(jacobians: np.ndarray) -> np.ndarray:
    """Mean growth by NumPy's QR at every step, from a random frame."""
    frame, total = np.linalg.qr(np.random.default_rng(0).normal(size=jacobians.shape[1:]))[0], 0.0
    for jacobian in np.asarray(jacobians, np.float64):
        frame, triangle = np.linalg.qr(jacobian @ frame)
        total = total + np.log(np.abs(np.diagonal(triangle)))
    return total / len(jacobians)


def lstm_run(hidden_size: int, num_steps: int, dtype: str = "float32"):
    """The same numbers in either precision: drawn in float32."""
    cell = rg.cells.lstm(hidden_size, hidden_size, forget_bias=1.0)
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (num_steps, hidden_size), jnp.float32)
    params, xs = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, xs))
    cell = rg.cells.lstm(hidden_size, hidden_size, dtype=dtype)
    return cell, params, cell.init_state(), xs


# --- exact systems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_cat_map(x64, direction):
    spectrum = rg.lyapunov_spectrum(
        CAT, None, jnp.array([0.1, 0.2]), NO_INPUT(300), num_transient=40, direction=direction
    )
    expected = np.log((3 + 5**0.5) / 2)  # 0.9624236501
    np.testing.assert_allclose(spectrum.exponents, [expected, -expected], atol=1e-10)
    assert spectrum.converged.all()
    assert spectrum.resolved.all()
    np.testing.assert_allclose(spectrum.sum_rule_defect, 0, atol=1e-10)
    np.testing.assert_allclose(spectrum.kaplan_yorke_dimension, 2.0, atol=1e-8)
    np.testing.assert_allclose(spectrum.entropy_rate, expected, atol=1e-10)


def test_constant_map_has_the_logarithms_of_its_eigenvalues(x64):
    matrix = jax.random.normal(jax.random.key(0), (5, 5))
    matrix = matrix @ jnp.diag(jnp.array([2.0, 1.0, 0.5, 0.2, 0.01])) @ jnp.linalg.inv(matrix)
    spectrum = rg.lyapunov_spectrum(
        rg.map_cell(lambda s, x: matrix @ s), None, jnp.zeros(5), NO_INPUT(200), num_transient=100
    )
    np.testing.assert_allclose(spectrum.exponents, np.log([2, 1, 0.5, 0.2, 0.01]), atol=1e-10)


@pytest.mark.parametrize(
    "num_steps", [1_000, pytest.param(10_000, marks=pytest.mark.slow, id="10000 steps, as asked for")]
)
def test_orthogonal_cell_has_only_zeros(num_steps):
    cell = rg.cells.vanilla(3, 24, activation="identity", init="orthogonal")
    xs = jnp.zeros((num_steps, 3))
    spectrum = rg.lyapunov_spectrum(cell, cell.init(jax.random.key(0)), cell.init_state(), xs)
    np.testing.assert_allclose(spectrum.exponents, 0, atol=1e-6)
    # nothing stretches, so that the frame may go long without a QR
    assert int(spectrum.num_qr) < num_steps / 8


@pytest.mark.parametrize("num_steps", [500, pytest.param(4_000, marks=pytest.mark.slow)])
def test_fresh_gaussian_matrices_have_newmans_exponents(num_steps):
    """λ_i = ½ [ln(2/N) + ψ((N − i + 1)/2)], Newman 1986: exact at every N."""
    n = 64
    xs = jax.random.normal(jax.random.key(0), (num_steps, n, n)) / n**0.5
    # steps are independent here, so short blocks are right and give the standard error more digits
    spectrum = rg.lyapunov_spectrum(PRODUCT, None, jnp.zeros(n), xs, num_blocks=num_steps // 20)
    i = np.arange(1, n + 1)
    exact = 0.5 * (np.log(2 / n) + scipy.special.digamma((n - i + 1) / 2))
    np.testing.assert_allclose(exact[[0, -1]], [-0.00785319, -2.71462296], atol=1e-8)
    # log L_jj is half the logarithm of a χ² of N − j + 1 degrees, so that the standard error is known as well
    known = np.sqrt(scipy.special.polygamma(1, (n - i + 1) / 2) / 4 / num_steps)
    np.testing.assert_allclose(spectrum.stderr, known, rtol=4 / np.sqrt(2 * (num_steps // 20)))
    z = (np.asarray(spectrum.exponents) - exact) / np.asarray(spectrum.stderr)
    # 64 independent numbers: all below 3 with probability 0.84, the mean of their squares within 1 ± 4 √(2/64)
    assert np.abs(z).max() < 3
    assert abs(np.mean(z**2) - 1) < 4 * np.sqrt(2 / n)


HENON_PUBLISHED = [0.41922, -1.62319]  # Sprott 2003, Chaos and Time-Series Analysis, table A.5


def test_henon_within_its_standard_errors(x64):
    spectrum = rg.lyapunov_spectrum(HENON, None, jnp.array([0.1, 0.1]), NO_INPUT(20_000), num_transient=100)
    assert (np.abs(spectrum.exponents - np.array(HENON_PUBLISHED)) < 3 * spectrum.stderr).all()
    np.testing.assert_allclose(spectrum.exponents.sum(), np.log(0.3), atol=1e-8)
    np.testing.assert_allclose(spectrum.sum_rule_defect, 0, atol=1e-10)


@pytest.mark.slow
def test_henon_to_four_digits(x64):
    spectrum = rg.lyapunov_spectrum(HENON, None, jnp.array([0.1, 0.1]), NO_INPUT(10_000_000), num_transient=1_000)
    np.testing.assert_allclose(spectrum.exponents, HENON_PUBLISHED, atol=1e-4)
    np.testing.assert_allclose(spectrum.kaplan_yorke_dimension, 1.25827, atol=2e-4)  # 1 + 0.41922 / 1.62319


def _runge_kutta(field, step):
    def flow(s, x):
        a = field(s)
        b = field(s + step / 2 * a)
        c = field(s + step / 2 * b)
        d = field(s + step * c)
        return s + step / 6 * (a + 2 * b + 2 * c + d)

    return rg.map_cell(flow)


def _lorenz(s):
    return jnp.stack([10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]])


def _roessler(s):
    return jnp.stack([-s[1] - s[2], s[0] + 0.2 * s[1], 0.2 + s[2] * (s[0] - 5.7)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "step", "num_steps", "published", "dimension"),
    # Sprott 2003, table A.5
    [
        (_lorenz, 0.01, 400_000, [0.9056, 0.0, -14.5723], 2.06215),
        (_roessler, 0.02, 400_000, [0.0714, 0.0, -5.3943], 2.0132),
    ],
    ids=["lorenz", "roessler"],
)
def test_flows_through_their_time_step_map(x64, field, step, num_steps, published, dimension):
    start = jnp.array([1.0, 1.0, 20.0]) if field is _lorenz else jnp.array([1.0, 1.0, 0.0])
    spectrum = rg.lyapunov_spectrum(_runge_kutta(field, step), None, start, NO_INPUT(num_steps), num_transient=10_000)
    found, stderr = spectrum.exponents / step, spectrum.stderr / step
    # the 5e-4 is the last published digit and the error of the time step, (0.02)⁴ times a derivative of order 1000
    assert (np.abs(found - np.array(published)) < 3 * stderr + 5e-4).all(), (found, stderr)
    np.testing.assert_allclose(spectrum.kaplan_yorke_dimension, dimension, atol=2e-3)


def test_logistic_map(x64):
    logistic = rg.map_cell(lambda s, x: 4 * s * (1 - s))
    spectrum = rg.lyapunov_spectrum(logistic, None, jnp.array(0.1234), NO_INPUT(20_000), num_transient=100)
    assert abs(spectrum.exponents[0] - np.log(2)) < 3 * spectrum.stderr[0] + 1e-6


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru_after", "vanilla_tanh", "lru", "stack"])
def test_against_qr_of_explicit_step_jacobians(x64, name):
    """Every kind of state (blocks, complex, layers), over a run from s_0: the sum differs by the first frame only."""
    cell, params, state, _ = example(name, dtype="float64")
    xs = jax.random.normal(jax.random.key(5), (400, 3))
    spectrum = rg.lyapunov_spectrum(cell, params, state, xs, num_blocks=10)
    jacobians = rg.step_jacobians(cell, params, state, xs)
    # frames that start apart differ by O(1) nats over 400 steps, in the lru by a few until close rates are sorted
    np.testing.assert_allclose(spectrum.exponents, numpy_spectrum(jacobians), atol=0.03)
    log_det = np.mean([np.linalg.slogdet(jacobian).logabsdet for jacobian in np.asarray(jacobians)])
    np.testing.assert_allclose(spectrum.exponents.sum(), log_det, atol=1e-10)


@pytest.mark.parametrize("size", [12, pytest.param(64, marks=pytest.mark.slow)])
def test_random_lstm_in_float32_has_the_exponents_of_float64(size):
    """All 2N exponents within 1e-2 of a QR at every step in float64; λ_min of N = 64 is the case SCIENCE warns of."""
    cell, params, state, xs = lstm_run(size, 1_000)
    found = rg.lyapunov_spectrum(cell, params, state, xs, num_transient=40)
    with jax.enable_x64(True):
        cell, params, state, xs = lstm_run(size, 1_000, "float64")
        exact = rg.lyapunov_spectrum(cell, params, state, xs, num_transient=40, qr_interval=1)
        assert exact.certificate.dtype == "float64"
        np.testing.assert_allclose(exact.sum_rule_defect, 0, atol=1e-10)
        jacobians = np.asarray(rg.step_jacobians(cell, params, state, xs))
    np.testing.assert_allclose(found.exponents, exact.exponents, atol=1e-2)
    # and NumPy, from a frame of its own: O(1) nats apart over the 960 steps, on the average over exponents far less
    reference = numpy_spectrum(jacobians[40:])
    np.testing.assert_allclose(found.exponents, reference, atol=0.02)
    assert np.abs(np.asarray(found.exponents) - reference).mean() < 3e-3
    # one step in a thousand may lose its last growth altogether
    assert found.resolved[:-1].all()
    assert found.exponents.dtype == jnp.float32


def test_an_interval_by_hand_that_is_too_long_is_not_silent():
    cell, params, state, xs = lstm_run(24, 400)
    right = rg.lyapunov_spectrum(cell, params, state, xs, num_transient=40)
    wrong = rg.lyapunov_spectrum(cell, params, state, xs, num_transient=40, qr_interval=20)
    assert right.resolved.all()
    assert float(wrong.max_log_condition) > -np.log(np.finfo(np.float32).eps)
    off = np.abs(np.asarray(wrong.exponents - right.exponents)) > 1e-2
    assert off.any()
    assert not np.asarray(wrong.resolved)[off].any()
    # what is lost is −inf, not a number that looks like an exponent
    assert np.isneginf(wrong.exponents[-1])
    # and the sum rule sees it: log|det J| by LU knows nothing of the frames
    assert abs(float(right.sum_rule_defect)) < 1e-3
    assert abs(float(wrong.sum_rule_defect)) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_interval_keeps_the_condition_number_below_the_limit(dtype):
    """Leading directions stretch by less than the limit in one step, so that the interval is free to choose."""
    with jax.enable_x64(dtype == "float64"):
        run = lstm_run(16, 600, dtype)
        spectrum = rg.lyapunov_spectrum(*run, k=12, num_transient=40, num_blocks=2)
        limit = -0.5 * np.log(np.finfo(dtype).eps)
        assert float(spectrum.max_log_condition) < limit
        assert int(spectrum.num_qr) < 200
        every = rg.lyapunov_spectrum(*run, k=12, num_transient=40, num_blocks=2, qr_interval=1)
    assert int(every.num_qr) == 600
    # the same frames up to round-off times what they stretched
    np.testing.assert_allclose(spectrum.exponents, every.exponents, atol=2e-4 if dtype == "float32" else 1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_interval_on_a_strange_attractor(dtype):
    """Hénon's stretch comes in bursts; the interval has to leave room for them."""
    with jax.enable_x64(dtype == "float64"):
        spectrum = rg.lyapunov_spectrum(HENON, None, jnp.array([0.1, 0.1]), NO_INPUT(5_000), num_transient=40)
    assert float(spectrum.max_log_condition) < -0.5 * np.log(np.finfo(dtype).eps)
    assert int(spectrum.num_qr) < 5_040


@pytest.mark.parametrize("k", [1, 5, 23])
def test_leading_exponents_equal_those_of_the_full_spectrum(x64, k):
    run = lstm_run(12, 300, "float64")
    full = rg.lyapunov_spectrum(*run, num_transient=20)
    leading = rg.lyapunov_spectrum(*run, num_transient=20, k=k)
    np.testing.assert_allclose(leading.exponents, full.exponents[:k], atol=1e-9)
    np.testing.assert_allclose(leading.stderr, full.stderr[:k], atol=1e-9)
    assert np.isnan(leading.sum_rule_defect)


def test_largest_exponent_forms_no_jacobian():
    """k = 1 pushes one tangent: no array of the program has S × S entries but the weights have N × 4N."""
    n = 20
    cell, params, state, xs = lstm_run(n, 64)
    program = jax.make_jaxpr(lambda *a: rg.lyapunov_spectrum(cell, *a, k=1).exponents)(params, state, xs)
    shapes = {tuple(int(size) for size in found.split(",")) for found in re.findall(r"f32\[([\d,]+)\]", str(program))}
    assert (4 * n, n) in shapes
    assert (2 * n, 2 * n) not in shapes
    assert max(np.prod(shape) for shape in shapes) <= max(4 * n * n, xs.size)


def test_block_holds_the_other_fields_fixed(x64):
    """The spectrum of ∂h'/∂h alone is that of products of the upper left blocks, and not the cell's."""
    cell, params, state, xs = lstm_run(6, 300, "float64")
    found = rg.lyapunov_spectrum(cell, params, state, xs, block="h", num_blocks=10)
    blocks = np.asarray(rg.step_jacobians(cell, params, state, xs))[:, :6, :6]
    np.testing.assert_allclose(found.exponents, numpy_spectrum(blocks), atol=0.03)
    whole = rg.lyapunov_spectrum(cell, params, state, xs, num_blocks=10)
    assert abs(found.exponents[0] - whole.exponents[0]) > 0.5


def test_adjoint_spectrum_equals_the_forward_one_within_errors(x64):
    run = lstm_run(8, 4_000, "float64")
    forward, adjoint = (
        rg.lyapunov_spectrum(*run, num_transient=100, direction=direction) for direction in ("forward", "adjoint")
    )
    # the same run but for its ends, where the frames settle: 100 steps of 4000, of O(1) nats
    apart = np.abs(forward.exponents - adjoint.exponents)
    assert (apart < 3 * (forward.stderr + adjoint.stderr) + 1e-3).all()
    assert not np.array_equal(forward.exponents, adjoint.exponents)


def test_adjoint_of_a_short_run_is_the_transposed_product(x64):
    """By brute force: rows pulled back through every step Jacobian by hand."""
    cell, params, state, _ = example("gru_before", dtype="float64")
    xs = jax.random.normal(jax.random.key(5), (60, 3))
    found = rg.lyapunov_spectrum(cell, params, state, xs, direction="adjoint", num_blocks=2)
    jacobians = np.asarray(rg.step_jacobians(cell, params, state, xs))
    backwards = numpy_spectrum(np.swapaxes(jacobians, 1, 2)[::-1])
    np.testing.assert_allclose(found.exponents.sum(), backwards.sum(), atol=1e-10)
    np.testing.assert_allclose(found.exponents, backwards, atol=0.1)  # first frames O(1) nats apart, over 60 steps


def test_gradient_against_central_differences(x64):
    cell, params, state, xs = lstm_run(4, 24, "float64")

    def objective(params, interval=None):
        exponents = rg.lyapunov_spectrum(cell, params, state, xs, k=5, num_blocks=4, qr_interval=interval).exponents
        return jnp.sum(jnp.square(exponents))

    gradient = jax.grad(objective)(params)
    direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    step = 1e-5
    above, below = (
        objective(jax.tree.map(lambda leaf, d, sign=sign: leaf + sign * step * d, params, direction))
        for sign in (1, -1)
    )
    along = sum(map(jnp.vdot, jax.tree.leaves(gradient), jax.tree.leaves(direction)))
    # step² times the third derivative, and eps/step
    np.testing.assert_allclose(along, (above - below) / (2 * step), rtol=1e-6)
    forward = jax.jvp(objective, (params,), (direction,))[1]
    np.testing.assert_allclose(forward, along, rtol=1e-9)


def test_batch_of_initial_states_is_a_stack(x64):
    states = jax.random.uniform(jax.random.key(0), (3, 2)) * 0.1
    one = lambda state: rg.lyapunov_spectrum(HENON, None, state, NO_INPUT(400), num_blocks=8)
    batch = jax.vmap(one)(states)
    assert batch.exponents.shape == (3, 2)
    assert batch.kaplan_yorke_dimension.shape == (3,)
    for index, state in enumerate(states):
        # a chaotic run in another order of summation: rounding grows to O(1) within a hundred steps
        single = one(state)
        apart = np.abs(batch.exponents[index] - single.exponents)
        assert (apart < 4 * single.stderr).all()
        np.testing.assert_allclose(
            batch.kaplan_yorke_dimension[index], 1 - batch.exponents[index, 0] / batch.exponents[index, 1]
        )
    compiled = jax.jit(one)(states[0])
    np.testing.assert_allclose(compiled.exponents, one(states[0]).exponents, atol=1e-12)


def test_low_precision_states_are_followed_in_float32():
    cell = rg.cells.lstm(3, 4, dtype=jnp.bfloat16)
    xs = jnp.ones((64, 3), jnp.bfloat16)
    spectrum = rg.lyapunov_spectrum(cell, cell.init(jax.random.key(0)), cell.init_state(), xs)
    assert spectrum.exponents.dtype == jnp.float32
    assert spectrum.certificate.dtype == "bfloat16"
    assert np.isfinite(spectrum.exponents[0])


# --- what the past does not foretell ---------------------------------------------------------------------------------


def rotations(num_steps: int, size: int = 3, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(num_steps, size, size)))[0].astype(np.float32)


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize(
    ("sizes", "first", "last"),
    [((1e3, 1.0, 1e-3), 1500, 1510), ((1.0, 1.0, 1e-4), 1500, 1560), ((1e12, 1e12, 1e12), 900, 930)],
    ids=["burst", "sixty bad steps", "growth beyond the range"],
)
def test_a_burst_after_a_long_calm(sizes, first, last, direction):
    """Isometries let the interval grow; then come steps that one QR in thirty-two would not survive."""
    left, right = rotations(2048), rotations(2048, seed=1)
    middle = np.ones((2048, 3), np.float32)
    middle[first:last] = sizes
    xs = left * middle[:, None, :] @ right
    spectrum = rg.lyapunov_spectrum(PRODUCT, None, jnp.zeros(3), jnp.asarray(xs), num_blocks=8, direction=direction)
    product = xs if direction == "forward" else np.swapaxes(xs, 1, 2)[::-1]
    # the frames settle within a burst or two: a few nats over 2048 steps
    np.testing.assert_allclose(spectrum.exponents, numpy_spectrum(product), atol=3e-3)
    assert int(spectrum.num_qr) < 600
    assert spectrum.resolved.all()


def test_rare_singular_steps_are_not_averaged_away():
    """Every 128th step multiplies one direction by 1e-20: round-off to float32, and no small part of the exponent."""
    xs = rotations(2048, 2)
    xs[::128] = xs[::128] * np.array([1.0, 1e-20], np.float32) @ rotations(16, 2, seed=1)
    for interval in (None, 1):
        spectrum = rg.lyapunov_spectrum(PRODUCT, None, jnp.zeros(2), jnp.asarray(xs), qr_interval=interval)
        assert not spectrum.resolved[1]
        assert np.isposinf(spectrum.roundoff[1])


def test_strongly_non_normal_map_is_flagged():
    """A feed-forward chain: eigenvalues near 1, and a triangle whose inverse is 3^15 long."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    matrix = basis @ (np.diag(np.linspace(1, 0.5, 16)) - 2 * np.triu(np.ones((16, 16)), 1)) @ basis.T
    exact = np.log(np.linspace(1, 0.5, 16))
    matrix = jnp.asarray(matrix, jnp.float32)
    spectrum = rg.lyapunov_spectrum(
        rg.map_cell(lambda s, x: matrix @ s), None, jnp.zeros(16), NO_INPUT(1000), num_transient=100
    )
    off = np.abs(np.asarray(spectrum.exponents) - exact) > 2e-2
    assert off.any()
    assert not np.asarray(spectrum.resolved)[off].any()


def test_sums_of_a_million_steps_do_not_drift():
    """λ = log(0.5, 1e-4): a plain float32 sum is off by 2e-3 per step with blocks of 31,250."""
    halving = rg.map_cell(lambda s, x: jnp.array([0.5, 1e-4]) * s)
    spectrum = rg.lyapunov_spectrum(halving, None, jnp.ones(2), NO_INPUT(1_000_000), num_blocks=8)
    # a few eps in every logarithm, and the rounding of 1e-4 itself
    np.testing.assert_allclose(spectrum.exponents, np.log([0.5, 1e-4]), rtol=2e-6)


@pytest.mark.parametrize("growth", [50.0, -50.0])
def test_growth_beyond_the_range_of_squares(growth):
    scaled = rg.map_cell(lambda s, x: jnp.exp(growth) * s)
    for k in (1, 3):
        spectrum = rg.lyapunov_spectrum(scaled, None, jnp.zeros(3), NO_INPUT(64), k=k)
        np.testing.assert_allclose(spectrum.exponents, growth, rtol=1e-6)
        assert spectrum.resolved.all()


def test_gradient_beside_dead_units():
    """What dies has no derivative; what lives keeps its own."""
    cell = rg.cells.vanilla(3, 6, activation="relu")
    params = cell.init(jax.random.key(0))
    params = params._replace(b=params.b.at[:2].set(-100.0).at[2:].set(1.0))
    xs = jax.random.normal(jax.random.key(1), (40, 3)) * 0.3

    def largest(params, k):
        return rg.lyapunov_spectrum(cell, params, cell.init_state(), xs, k=k, num_blocks=4).exponents[0]

    alone, among = (jax.grad(largest)(params, k) for k in (1, 6))
    for leaf, other in zip(alone, among, strict=True):
        assert np.isfinite(leaf).all()
        np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=1e-5)


def test_certificate_names_the_dtype_that_was_computed_in():
    """NumPy arrays of float64 become float32 on their way in."""
    cell, params, state, xs = lstm_run(3, 40)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, state, xs))
    spectrum = rg.lyapunov_spectrum(cell, *wide, k=1)
    assert spectrum.certificate.dtype == spectrum.exponents.dtype.name == "float32"
    assert rg.retention(cell, *wide).certificate.dtype == "float32"


# --- standard errors, convergence, dimensions ------------------------------------------------------------------------


def test_standard_errors_and_finite_time_exponents_come_from_the_blocks():
    cell, params, state, xs = lstm_run(5, 330)
    spectrum = rg.lyapunov_spectrum(cell, params, state, xs, num_blocks=10, num_transient=25)
    assert (spectrum.block_length, spectrum.num_transient) == (30, 30)  # what fills no block joins the transient
    blocks = np.asarray(spectrum.block_exponents)
    assert blocks.shape == (10, 10)
    np.testing.assert_allclose(spectrum.exponents, blocks.mean(0), rtol=1e-5)
    np.testing.assert_allclose(spectrum.stderr, blocks.std(0, ddof=1) / np.sqrt(10), rtol=1e-4)


def test_coverage_of_the_standard_error():
    """Fresh scalars with a known mean: |mean| < 2 stderr in 95 % of 400 runs, within 4 binomial errors."""
    scalar = rg.map_cell(lambda s, x: s * jnp.exp(x))
    xs = jax.random.normal(jax.random.key(0), (400, 320))
    one = lambda xs: rg.lyapunov_spectrum(scalar, None, jnp.zeros(()), xs, qr_interval=1, num_determinants=0)
    spectra = jax.vmap(one)(xs)
    inside = np.mean(np.abs(spectra.exponents[:, 0]) < 2 * spectra.stderr[:, 0])
    assert abs(inside - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 400)
    converged = np.mean(spectra.converged)
    assert abs(converged - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 400)


def test_a_run_that_drifts_is_not_converged():
    scalar = rg.map_cell(lambda s, x: s * jnp.exp(x))
    xs = 0.1 * jax.random.normal(jax.random.key(0), (320,)) + jnp.linspace(0, 1, 320)
    for num_blocks in (2, 4, 8, 32):
        drifting = rg.lyapunov_spectrum(scalar, None, jnp.zeros(()), xs, num_blocks=num_blocks)
        assert not drifting.converged.any()


def spectrum_of(exponents, size=None):
    """A spectrum with these exponents, for what is computed from them alone."""
    values = jnp.asarray(exponents)
    made = rg.lyapunov_spectrum(PRODUCT, None, jnp.zeros(1), jnp.ones((64, 1, 1)))
    roundoff = jnp.full(values.shape, 1e-7)
    return dataclasses.replace(made, exponents=values, roundoff=roundoff, size=size or len(exponents))


@pytest.mark.parametrize(
    ("exponents", "size", "dimension", "entropy"),
    [
        ([1.0, -2.0], 2, 1.5, 1.0),
        ([-0.5, -1.0], 2, 0.0, 0.0),
        ([0.5, 0.25, -1.0, -3.0], 4, 2.75, 0.75),
        ([0.5, 0.0], 2, 2.0, 0.5),
        ([0.5, 0.25], 9, np.nan, np.nan),  # not far enough down to know
        ([0.5, -0.25], 9, np.nan, 0.5),
        ([0.5, -np.inf], 2, 1.0, 0.5),
        ([-2.0, 1.0], 2, 1.5, 1.0),  # a short run need not have sorted them
        ([1e-8, -1e-8, -2e-8], 3, 3.0, 1e-8),  # zeros, up to their round-off
    ],
)
def test_dimension_and_entropy(exponents, size, dimension, entropy):
    spectrum = spectrum_of(exponents, size)
    np.testing.assert_allclose(spectrum.kaplan_yorke_dimension, dimension, atol=1e-6)
    np.testing.assert_allclose(spectrum.entropy_rate, entropy, atol=1e-6)


# --- singular steps, non-finite states, bad input --------------------------------------------------------------------


def test_singular_step_is_flagged():
    """A matrix of rank 2 at one step, by a coordinate that dies: two exponents stay, one is −inf."""
    xs = jax.random.normal(jax.random.key(0), (64, 3, 3))
    xs = xs.at[40, 1].set(0.0)
    spectrum = rg.lyapunov_spectrum(PRODUCT, None, jnp.zeros(3), xs, qr_interval=1)
    assert int(spectrum.singular_step) == 40
    assert np.isneginf(spectrum.exponents[-1])
    assert np.isfinite(spectrum.exponents[:2]).all()
    assert np.asarray(spectrum.resolved).tolist() == [True, True, False]
    assert np.isnan(spectrum.stderr[-1])
    assert not spectrum.converged[-1]
    assert np.isfinite(rg.lyapunov_spectrum(PRODUCT, None, jnp.zeros(3), xs[:32], qr_interval=1).sum_rule_defect)


def test_rank_that_is_lost_to_round_off_at_every_step():
    """Equal columns: the last factor is round-off, never an exact zero, and the exponent all the same −inf."""
    xs = jax.random.normal(jax.random.key(0), (64, 3, 3)).at[:, :, 2].set(0.0)
    xs = xs.at[:, :, 2].set(xs[:, :, 0] + xs[:, :, 1])
    spectrum = rg.lyapunov_spectrum(PRODUCT, None, jnp.zeros(3), xs, qr_interval=1)
    assert np.isneginf(spectrum.exponents[-1])
    assert np.asarray(spectrum.resolved).tolist() == [True, True, False]


def test_dead_relu_network():
    cell = rg.cells.vanilla(3, 6, activation="relu")
    params = cell.init(jax.random.key(0))
    dead = params._replace(b=params.b.at[:2].set(-100.0))
    xs = jax.random.normal(jax.random.key(1), (64, 3)) + 3.0
    spectrum = rg.lyapunov_spectrum(cell, dead, cell.init_state(), xs)
    assert np.isneginf(spectrum.exponents[-2:]).all()
    assert int(spectrum.singular_step) == 0


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_non_finite_state_is_flagged_with_its_step(direction):
    growing = rg.map_cell(lambda s, x: s * 1e6)
    spectrum = rg.lyapunov_spectrum(growing, None, jnp.ones(2), NO_INPUT(64), direction=direction)
    assert int(spectrum.nonfinite_step) == 7  # 1e6^7 is above 3.4e38
    assert np.isnan(spectrum.exponents).all()
    assert np.isnan(spectrum.kaplan_yorke_dimension)
    assert not spectrum.converged.any()
    assert not spectrum.resolved.any()


LSTM = example("lstm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected an integer of at least 1, found 0"),
        ({"k": 9}, "k: expected 1 to 8, the real entries of the state, found 9"),
        ({"block": "h", "k": 5}, "k: expected 1 to 4"),
        ({"block": "x"}, "unknown block 'x'; expected one of: 'h', 'c'"),
        ({"num_blocks": 1}, "num_blocks: expected an integer of at least 2, found 1"),
        ({"num_transient": -1}, "num_transient: expected an integer of at least 0, found -1"),
        ({"qr_interval": 0}, "qr_interval: expected an integer of at least 1, found 0"),
        ({"num_determinants": -2}, "num_determinants: expected an integer of at least 0, found -2"),
        ({"direction": "sideways"}, "unknown direction 'sideways'; expected 'forward' or 'adjoint'"),
        ({}, "expected at least 32 steps after the transient, one for each block of the standard error, found 6"),
        ({"num_blocks": 2, "num_transient": 5}, "expected at least 2 steps after the transient"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rg.lyapunov_spectrum(*LSTM[:4], **options)


def test_map_that_changes_its_state():
    wider = rg.map_cell(lambda s, x: jnp.concatenate([s, s]))
    with pytest.raises(ValueError, match=r"expected float32\[2\], found float32\[4\]"):
        rg.lyapunov_spectrum(wider, None, jnp.ones(2), NO_INPUT(64))


# --- covariant vectors -----------------------------------------------------------------------------------------------


def test_covariant_vectors_are_covariant(x64):
    cell, params, state, xs = lstm_run(6, 260, "float64")
    found = rg.covariant_vectors(cell, params, state, xs, num_transient=80)
    assert found.vectors.shape == (100, 12, 12)
    start = rg.unroll(cell, params, state, xs[:80]).final
    jacobians = rg.step_jacobians(cell, params, start, xs[80:180])
    moved = np.einsum("tij,tkj->tki", jacobians, found.vectors)
    growth = np.linalg.norm(moved, axis=-1)
    np.testing.assert_allclose(np.log(growth), found.growth, atol=1e-9)
    cosine = np.abs(np.einsum("tki,tki->tk", moved[:-1] / growth[:-1, :, None], found.vectors[1:]))
    np.testing.assert_allclose(cosine, 1, atol=1e-10)
    np.testing.assert_allclose(found.exponents, np.mean(found.growth, axis=0), atol=1e-12)
    # from the other initial frame: what has settled is the same, and what has not says so
    assert np.asarray(found.converged).tolist() == (np.asarray(found.mismatch) < 1e-3).tolist()
    other = rg.covariant_vectors(cell, params, state, xs, num_transient=80, key=jax.random.key(7))
    cosine = np.abs(np.einsum("tks,tks->tk", found.vectors, other.vectors)).min(axis=0)
    settled = np.asarray(found.converged & other.converged)
    assert settled.sum() >= 4
    np.testing.assert_allclose(cosine[settled], 1, atol=1e-5)


def test_covariant_vectors_that_have_not_settled_say_so(x64):
    xs = jax.random.normal(jax.random.key(0), (60, 16, 16)) / 4
    found = rg.covariant_vectors(PRODUCT, None, jnp.zeros(16), xs, num_transient=5)
    assert not found.converged.all()


def test_covariant_vectors_beside_dead_units():
    cell = rg.cells.vanilla(3, 6, activation="relu")
    params = cell.init(jax.random.key(0))
    params = params._replace(b=params.b.at[:2].set(-100.0).at[2:].set(1.0))
    xs = jax.random.normal(jax.random.key(1), (300, 3)) * 0.3
    found = rg.covariant_vectors(cell, params, cell.init_state(), xs)
    assert np.isneginf(found.exponents[-2:]).all()
    assert np.isfinite(found.vectors[:, :4]).all()
    assert np.isnan(found.vectors[:, 4:]).all()
    assert not found.resolved[-2:].any()
    growing = rg.map_cell(lambda s, x: s * 1e6)
    broken = rg.covariant_vectors(growing, None, jnp.ones(2), NO_INPUT(64), num_transient=5)
    assert int(broken.nonfinite_step) == 7
    assert np.isnan(broken.exponents).all()
    assert not (broken.converged | broken.resolved).any()


def test_covariant_vectors_of_a_constant_map_are_its_eigenvectors(x64):
    matrix = np.array([[2.0, 1.0, 0.5], [0.0, 0.7, 1.0], [0.0, 0.0, 0.2]])
    cell = rg.map_cell(lambda s, x: jnp.asarray(matrix) @ s)
    found = rg.covariant_vectors(cell, None, jnp.zeros(3), NO_INPUT(200), num_transient=90)
    _, eigenvectors = np.linalg.eig(matrix)
    np.testing.assert_allclose(np.abs(found.vectors[0] @ eigenvectors).diagonal(), 1, atol=1e-10)
    np.testing.assert_allclose(found.exponents, np.log([2, 0.7, 0.2]), atol=1e-10)
    # the angle between the first eigenvector and the plane of the others, by its normal
    normal = np.cross(eigenvectors[:, 1], eigenvectors[:, 2])
    sine = abs(normal @ eigenvectors[:, 0]) / np.linalg.norm(normal)
    np.testing.assert_allclose(found.angle(1), np.arcsin(sine), atol=1e-10)


def test_henon_is_not_hyperbolic(x64):
    found = rg.covariant_vectors(HENON, None, jnp.array([0.1, 0.1]), NO_INPUT(4_000))
    angle = np.asarray(found.angle(1))
    assert angle.min() < 0.02  # tangencies come arbitrarily close
    assert angle.max() > 1.0
    np.testing.assert_allclose(found.exponents, HENON_PUBLISHED, atol=0.03)  # stderr of 3800 steps is 6e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9}, "k: expected 1 to 8"),
        ({"num_transient": 3}, "num_transient: expected fewer than half of the 6 steps"),
    ],
)
def test_bad_options_of_covariant_vectors(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rg.covariant_vectors(*LSTM[:4], **options)


def test_angle_needs_two_groups():
    found = rg.covariant_vectors(*LSTM[:4], num_transient=1)
    with pytest.raises(ValueError, match="split: expected 1 to 7, found 8"):
        found.angle(8)
