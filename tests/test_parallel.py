"""Parallel in time against the sequential scans, closed forms and NumPy; its memory against XLA's own figures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import rnngrad as rg
from rnngrad import parallel
from tests.cases import CASES, example, rows
from tests.test_chains import _fast_layer_on_a_slow_one, _open_output_gate, inputs


def chunks_of(monkeypatch, length):
    """Cuts the time axis into chunks, or windows, of a length, whatever the budget."""
    monkeypatch.setattr(parallel, "_piece", lambda *_, **__: length)


def largest_difference(a, b):
    """Largest absolute difference over all leaves of two trees of one structure."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)))), a, b)))


# --- chains ----------------------------------------------------------------------------------------------------------


@rows(CASES, fast=("lstm",))
def test_chain_is_that_of_the_reverse_scan(name, monkeypatch, x64):
    ex = example(name, num_steps=7, dtype="float64")
    chunks_of(monkeypatch, 3)  # two whole chunks and one step
    distance = rg.logscaled.log_distance(parallel.parallel_chain(*ex), rg.jacobian_chain(*ex))
    assert (np.asarray(distance) < np.log(1e-12)).all()  # 7 products in float64


@pytest.mark.slow
@pytest.mark.parametrize("path", ["remainder", "direct", "only:f", "without:o"])
def test_every_path(path, monkeypatch, x64):
    ex = example("lstm", num_steps=5, dtype="float64")
    chunks_of(monkeypatch, 2)
    options = {"of": "c", "wrt": "h", "path": path}
    found, expected = parallel.parallel_chain(*ex, **options), rg.jacobian_chain(*ex, **options)
    np.testing.assert_allclose(rg.logscaled.to_array(found), rg.logscaled.to_array(expected), rtol=1e-12, atol=1e-16)


def test_chain_of_given_matrices_is_numpys_product(x64):
    """One step's Jacobian is its input, so the chain is a product that NumPy can form alone."""
    matrices = np.random.default_rng(0).normal(size=(6, 4, 4))
    cell = rg.map_cell(lambda s, x: x @ s)
    found = rg.logscaled.to_array(parallel.parallel_chain(cell, None, jnp.ones(4), jnp.asarray(matrices)))
    product = np.eye(4)
    for k in reversed(range(6)):
        product = product @ matrices[k]
        np.testing.assert_allclose(found[k], product, rtol=1e-12, atol=1e-12 * np.abs(product).max())
    np.testing.assert_array_equal(found[6], np.eye(4))


def test_units_of_one_leaf_that_drift_apart_keep_their_digits():
    """Unit 0 fades by 2^-200 in the second half, unit 1 in the first: the whole is 2^-200 I, exactly.

    With one exponent for a matrix float32 holds neither half's smaller entry, and their product is 0.
    """
    factors = np.ones((8, 2), np.float32)
    factors[4:, 0] = factors[:4, 1] = 2.0**-50
    cell = rg.map_cell(lambda s, x: x * s)
    chain = parallel.parallel_chain(cell, None, jnp.ones(2), jnp.asarray(factors))
    np.testing.assert_allclose(rg.logscaled.log_norm(chain)[0], -200 * np.log(2) + 0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(chain.mantissa[0], 0.5 * np.eye(2))
    assert chain.exponent[0] == -199
    products = rg.prefix_products(jax.vmap(jnp.diag)(factors))
    np.testing.assert_array_equal(products.mantissa[0], chain.mantissa[0])
    assert products.exponent[0] == -199


def test_a_large_first_state_costs_small_later_ones_no_digits():
    """s_t = 1e6 · 2^-t + 2 (1 − 2^-t); a correction to a guess of s_0 would leave errors of 1e6 · 2^-24."""
    cell = rg.map_cell(lambda s, x: 0.5 * s + x)
    run = parallel.parallel_unroll(cell, None, jnp.full(1, 1e6), jnp.ones((40, 1)))
    t = np.arange(1, 41)
    assert not bool(run.used_scan)
    # one rounding each of f and of the sum
    np.testing.assert_allclose(run.trajectory.states[:, 0], 1e6 * 0.5**t + 2 * (1 - 0.5**t), rtol=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_open_output_gate, _fast_layer_on_a_slow_one])
def test_leaves_that_drift_apart_keep_their_digits(make, monkeypatch):
    cell, options = make(jnp.float32)
    arguments = cell, cell.init(jax.random.key(0)), cell.init_state(), inputs(0, 300, 8)
    chunks_of(monkeypatch, 50)
    found = parallel.parallel_retention(*arguments, **options).log_norm
    expected = rg.retention(*arguments, **options).log_norm
    assert expected[-1] < -150
    # 300 float32 products rounded in another order: each worth 1e-7 of at most 32 terms; 6e-5 measured
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_retention_is_that_of_the_reverse_scan(norm, x64):
    ex = example("gru_after", num_steps=3, dtype="float64")
    run = parallel.parallel_unroll(*ex)
    found, expected = (
        parallel.parallel_retention(*ex, norm=norm, trajectory=run.trajectory),
        rg.retention(*ex, norm=norm),
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)  # of, wrt, path, norm and certificate too
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_nonfinite_states_are_flagged_as_the_reverse_scan_flags_them(monkeypatch):
    chunks_of(monkeypatch, 2)
    relu = rg.cells.vanilla(2, 6, activation="relu", init=rg.initializers.gaussian(1e6))
    arguments = relu, relu.init(jax.random.key(0)), relu.init_state(), inputs(0, 12, 2)
    found, expected = parallel.parallel_retention(*arguments), rg.retention(*arguments)
    assert np.isnan(expected.log_norm[1:]).all()
    np.testing.assert_array_equal(np.isnan(found.log_norm), np.isnan(expected.log_norm))
    assert found.nonfinite_step == expected.nonfinite_step


@pytest.mark.slow
def test_exact_zero_is_minus_infinity():
    found = parallel.parallel_retention(*example("vanilla_tanh", num_steps=2), path="direct")
    np.testing.assert_array_equal(found.log_norm, [0] + [-np.inf] * 2)


@pytest.mark.slow
def test_chain_is_differentiable_in_the_parameters(x64):
    ex = example("lstm", num_steps=5, dtype="float64")

    def gradient(measure):
        return jax.grad(lambda p: measure(ex.cell, p, ex.state, ex.xs).log_norm[-1])(ex.params)

    assert largest_difference(gradient(parallel.parallel_retention), gradient(rg.retention)) < 1e-12


@pytest.mark.slow
def test_batches_and_bfloat16():
    ex = example("gru_after", num_steps=5)
    batch = jnp.stack([ex.xs, -ex.xs])
    found = jax.vmap(lambda xs: parallel.parallel_retention(*ex[:3], xs))(batch)
    for log_norm, xs in zip(found.log_norm, batch, strict=True):
        np.testing.assert_allclose(log_norm, rg.retention(*ex[:3], xs).log_norm, rtol=1e-5, atol=1e-5)
    cell = CASES["vanilla_tanh"].make(3, 4, dtype=jnp.bfloat16)
    arguments = cell, cell.init(jax.random.key(0)), cell.init_state(), inputs(0, 5, 3, jnp.bfloat16)
    # 5 products of numbers with 8 bits
    found = parallel.parallel_retention(*arguments).log_norm
    np.testing.assert_allclose(found, rg.retention(*arguments).log_norm, rtol=0, atol=5 * 2**-8)
    run = parallel.parallel_unroll(*arguments)
    assert not bool(run.used_scan)
    assert largest_difference(run.trajectory, rg.unroll(*arguments)) <= 2**-7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_float32_chain_of_10000_steps(name):
    """1e-3 nats plus 1e-5 of the size at every lag, the bound that the reverse scan itself keeps against float64."""
    cell = {"lstm": rg.cells.lstm(8, 16, forget_bias=1.0), "gru": rg.cells.gru(8, 16)}[name]
    arguments = cell, cell.init(jax.random.key(0)), cell.init_state(), inputs(0, 10_000, 8)
    field = "c" if name == "lstm" else "h"
    expected = np.asarray(rg.retention(*arguments, of=field, wrt=field).log_norm, np.float64)
    found = np.asarray(parallel.parallel_retention(*arguments, of=field, wrt=field).log_norm, np.float64)
    assert expected[-1] < -1000
    excess = np.abs(found - expected) - 1e-3 - 1e-5 * np.abs(expected)
    assert excess.max() <= 0, f"worst at lag {excess.argmax()}: off by {excess.max():.2e} nats too much"


# --- states ----------------------------------------------------------------------------------------------------------

AFFINE = {"vanilla_identity", "min_gru", "min_lstm", "lru"}
ELEMENTWISE = {"indrnn_relu", "indrnn_tanh", "min_gru", "min_lstm", "lru"}


@rows(CASES, fast=("indrnn_relu", "lru", "lstm"))
def test_structure_of_every_cell(name):
    found = parallel.structure_of(*example(name))
    assert found == parallel.Structure(name in AFFINE, name in ELEMENTWISE)


@pytest.mark.parametrize(
    ("f", "is_affine", "is_elementwise"),
    [
        (lambda s, x: 2 * s + x, True, True),
        (jax.jit(lambda s, x: x * s - s / (1 + x * x)), True, True),
        (lambda s, x: jnp.where(x > 0, s, 2 * s), True, True),
        (lambda s, x: jax.checkpoint(lambda s: 3 * s)(s), True, True),
        (lambda s, x: x, True, True),
        (lambda s, x: s[::-1], True, False),
        (lambda s, x: jnp.cumsum(s), True, False),
        (lambda s, x: s - jnp.broadcast_to(s.mean(), s.shape), True, False),
        (lambda s, x: jnp.concatenate([s[:1], 2 * s[1:]]), True, False),
        (lambda s, x: jnp.where(s > 0, s, 2 * s), False, True),
        (lambda s, x: s * s, False, True),
        (lambda s, x: x / s, False, True),
        (lambda s, x: jnp.abs(s), False, True),
        (lambda s, x: s[jnp.argsort(s)], False, False),
        (lambda s, x: s[0] * s, False, False),
        (lambda s, x: jax.lax.cond(x[0] > 0, lambda s: 2 * s, lambda s: -s, s), True, False),
        (lambda s, x: jax.lax.cond(s[0] > 0, lambda s: 2 * s, lambda s: -s, s), False, False),
        (lambda s, x: jax.lax.scan(lambda c, _: (c * c, None), s, length=2)[0], False, False),
    ],
)
def test_structure_of_maps(f, is_affine, is_elementwise):
    found = parallel.structure_of(rg.map_cell(f), None, jnp.ones(3), jnp.ones((1, 3)))
    assert found == parallel.Structure(is_affine, is_elementwise)
    # what it says yes to must be so; numbers off a grid, of both signs
    s, t, x = (3 * jax.random.normal(jax.random.key(seed), (3,)) for seed in (0, 1, 2))
    if is_affine:
        np.testing.assert_allclose(f(s + t, x) + f(0 * s, x), f(s, x) + f(t, x), rtol=1e-5, atol=1e-5)
    if is_elementwise:
        mixed = jnp.stack([s[0], t[1], s[2]])
        np.testing.assert_allclose(f(mixed, x), jnp.stack([f(s, x)[0], f(t, x)[1], f(s, x)[2]]), rtol=1e-6)


def test_a_conjugate_is_not_holomorphic():
    """Affine over the reals, but no complex number is its derivative: it is solved with real matrices."""
    cell = rg.map_cell(lambda s, x: jnp.complex64(0.5j) * jnp.conj(s) + x)
    state, xs = jnp.array([1 + 2j, -1j], jnp.complex64), jax.lax.complex(inputs(0, 5, 2), inputs(1, 5, 2))
    run = parallel.parallel_unroll(cell, None, state, xs)
    assert parallel.structure_of(cell, None, state, xs) == parallel.Structure(True, False)
    assert (run.method, bool(run.used_scan)) == ("linear", False)
    np.testing.assert_allclose(run.trajectory.states, rg.unroll(cell, None, state, xs).states, rtol=1e-5, atol=1e-6)


@rows(CASES, fast=("lstm", "lru"))
def test_states_are_those_of_the_scan(name, monkeypatch, x64):
    ex = example(name, num_steps=9, dtype="float64")
    chunks_of(monkeypatch, 4)  # two whole windows and one step
    run, expected = parallel.parallel_unroll(*ex), rg.unroll(*ex)
    assert run.method == ("linear" if name in AFFINE else "newton")
    assert not bool(run.used_scan)
    assert 0 <= float(run.residual) < 2e-12  # the tolerance, which a last correction is below
    assert jax.tree.structure(run.trajectory) == jax.tree.structure(expected)
    assert largest_difference(run.trajectory, expected) < 1e-13


@pytest.mark.parametrize(
    "cell",
    [
        rg.cells.vanilla(3, 16),
        pytest.param(rg.cells.gru(3, 16), marks=pytest.mark.slow),
        pytest.param(rg.cells.lstm(3, 16, forget_bias=1.0), marks=pytest.mark.slow),
    ],
    ids=lambda cell: cell.name,
)
def test_contracting_cells_converge_in_float32(cell):
    arguments = cell, cell.init(jax.random.key(0)), cell.init_state(), inputs(0, 200, 3)
    run = parallel.parallel_unroll(*arguments)
    assert (run.method, bool(run.used_scan)) == ("newton", False)
    assert int(run.num_iterations) < 10
    assert largest_difference(run.trajectory, rg.unroll(*arguments)) < 1e-5


def test_chaos_falls_back_to_the_scan_and_says_so():
    """λ₁ > 0: round-off grows to the size of the states within 100 steps, so no iteration can come to rest."""
    cell = rg.cells.vanilla(3, 16, init=rg.initializers.gaussian(4.0))
    arguments = cell, cell.init(jax.random.key(0)), cell.init_state(), inputs(0, 100, 3)
    run = parallel.parallel_unroll(*arguments, max_iterations=20)
    assert (run.method, bool(run.used_scan)) == ("newton", True)
    assert float(run.residual) > 1e-5
    assert largest_difference(run.trajectory, rg.unroll(*arguments)) == 0


@pytest.mark.slow
def test_under_vmap_each_sequence_has_its_own_fate(x64):
    """One sequence saturates every unit and contracts, the other is chaotic; the gradients of neither are NaN."""
    cell = rg.cells.vanilla(1, 8, init=rg.initializers.gaussian(4.0), dtype=jnp.float64)
    params, state = cell.init(jax.random.key(0)), cell.init_state()
    batch = jnp.stack([jnp.full((60, 1), 1e3), jnp.zeros((60, 1)) + 0.1])

    def runs(params):
        return jax.vmap(lambda xs: parallel.parallel_unroll(cell, params, state, xs, max_iterations=10))(batch)

    found = runs(params)
    np.testing.assert_array_equal(found.used_scan, [False, True])
    expected = jax.vmap(lambda xs: rg.unroll(cell, params, state, xs))(batch)
    assert largest_difference(found.trajectory, expected) < 1e-7  # 60 chaotic steps on rounding of 1e-16
    gradient = jax.grad(lambda p: runs(p).trajectory.states.h[:, :20].sum())(params)
    scan = jax.grad(lambda p: jax.vmap(lambda xs: rg.unroll(cell, p, state, xs))(batch).states.h[:, :20].sum())(params)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(scan))
    assert largest_difference(gradient, scan) < 1e-8 * scale


@pytest.mark.parametrize("num_steps", [1, 2])
def test_shortest_runs(num_steps):
    ex = example("vanilla_relu", num_steps=num_steps)
    dead = ex.params._replace(b=ex.params.b.at[:2].add(-100))  # two units never switch on
    run, expected = (f(ex.cell, dead, ex.state, ex.xs) for f in (parallel.parallel_unroll, rg.unroll))
    assert (expected.states.h[:, :2] == 0).all()
    assert not bool(run.used_scan)
    assert largest_difference(run.trajectory, expected) < 1e-6


@pytest.mark.parametrize(
    ("f", "method"),
    [
        (lambda s, x: 0.5 * s + jnp.floor(s) + x, "linear"),
        (lambda s, x: jnp.sin(s) + jax.lax.stop_gradient(1.2 * s + jnp.sin(3 * s)) + x, "newton"),
        (lambda s, x: 1.2 * s + jax.lax.stop_gradient(3 * s) + x, "linear"),
        (lambda s, x: 1e3 * s + x, "linear"),
    ],
    ids=["floor", "stop_gradient", "linear_stop_gradient", "overflow"],
)
def test_wrong_derivatives_and_overflow_never_give_wrong_states(f, method):
    cell = rg.map_cell(f)
    xs = inputs(0, 40, 3)
    # n iterations make the first n states right whatever the derivative is, so fewer than there are steps
    run = parallel.parallel_unroll(cell, None, jnp.ones(3), xs, max_iterations=20)
    expected = rg.unroll(cell, None, jnp.ones(3), xs)
    assert run.method == method
    assert bool(run.used_scan)
    assert float(run.residual) > 1e-5
    np.testing.assert_array_equal(run.trajectory.states, expected.states)


def test_inputs_that_are_keys():
    noise = rg.map_cell(lambda s, key: 0.5 * s + jax.random.normal(key, s.shape))
    keys = jax.random.split(jax.random.key(0), 7)
    run, expected = (f(noise, None, jnp.ones(2), keys) for f in (parallel.parallel_unroll, rg.unroll))
    assert (run.method, bool(run.used_scan)) == ("linear", False)
    np.testing.assert_allclose(run.trajectory.states, expected.states, rtol=1e-5, atol=1e-6)


def _loss(trajectory):
    return sum(jnp.sum(jnp.sin(jnp.abs(leaf))) for leaf in jax.tree.leaves(trajectory))


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("gru_before", "lru")), "lstm"])
def test_gradients_are_those_of_the_scan(name, monkeypatch, x64):
    """With respect to parameters, first state and inputs, of states, gates and last state, across windows."""
    ex = example(name, num_steps=6, dtype="float64")
    chunks_of(monkeypatch, 3)

    def gradient(run):
        return jax.jit(jax.grad(lambda *a: _loss(run(ex.cell, *a)), (0, 1, 2)))(*ex[1:])

    found = gradient(lambda *a: parallel.parallel_unroll(*a).trajectory)
    # float64 round-off of 6 steps; 1e-8 is what is promised
    assert largest_difference(found, gradient(rg.unroll)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("name", ["indrnn_tanh", "lstm"])
def test_second_derivatives_are_those_of_the_scan(name, x64):
    ex = example(name, num_steps=3, dtype="float64")

    def hessian(run):
        return jax.jit(jax.hessian(lambda xs: _loss(run(ex.cell, ex.params, ex.state, xs).states)))(ex.xs)

    found = hessian(lambda *a: parallel.parallel_unroll(*a).trajectory)
    assert largest_difference(found, hessian(rg.unroll)) < 1e-11


# --- the choice and the budget ---------------------------------------------------------------------------------------


def test_the_choice_is_reported():
    ex = example("lstm", num_steps=100)
    small = parallel.parallel_unroll(*ex, memory_budget=20_000)
    assert (small.method, bool(small.used_scan), small.window) == ("scan", True, 100)
    assert "bytes for T=100, found 20000, which holds T=" in small.reason
    assert largest_difference(small.trajectory, rg.unroll(*ex)) == 0
    asked = parallel.parallel_unroll(*ex, method="scan")
    assert (asked.method, int(asked.num_iterations), asked.reason) == ("scan", 0, "asked for")
    newton = parallel.parallel_unroll(*ex, memory_budget=100_000)
    assert (newton.method, newton.reason) == ("newton", "the step is not affine in the state and mixes its entries")
    assert 1 < newton.window < 100


def test_a_step_without_a_reverse_derivative_goes_to_the_scan():
    def shrunk(s, x):
        return jax.lax.while_loop(lambda s: jnp.sum(s * s) > 1, lambda s: 0.7 * s, s + x)

    arguments = rg.map_cell(shrunk), None, jnp.ones(3), inputs(0, 5, 3)
    run = parallel.parallel_unroll(*arguments)
    assert (run.method, bool(run.used_scan)) == ("scan", True)
    assert "Reverse-mode differentiation does not work" in run.reason
    np.testing.assert_array_equal(run.trajectory.states, rg.unroll(*arguments).states)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        parallel.parallel_unroll(*arguments, method="newton")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "deer"}, "unknown method 'deer'; expected 'auto', 'linear', 'newton' or 'scan'"),
        ({"method": "linear"}, "expected a step that is affine in the state, found cell 'lstm'"),
        ({"max_iterations": 0}, "max_iterations of at least 1 and tolerance of at least 0, found 0 and 6"),
        ({"tolerance": float("nan")}, "max_iterations of at least 1 and tolerance of at least 0, found 50 and nan"),
        (
            {"method": "newton", "memory_budget": 2000},
            r"memory_budget: expected at least \d+ bytes for T=6, found 2000, which holds T=2; method 'scan' holds no",
        ),
    ],
)
def test_static_misuse_of_unroll(options, message):
    with pytest.raises(ValueError, match=message):
        parallel.parallel_unroll(*example("lstm"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory_budget": -1},
            r"memory_budget: expected at least \d+ bytes for T=6, found -1, which holds T=0; reduce=",
        ),
        ({"memory_budget": 6000}, r"memory_budget: expected at least \d+ bytes for T=6, found 6000, which holds T=2;"),
        ({"path": "only:q"}, "unknown gate 'q'"),
        ({"of": "q"}, "unknown block of= 'q'"),
    ],
)
def test_static_misuse_of_chain(options, message):
    with pytest.raises(ValueError, match=message):
        parallel.parallel_chain(*example("lstm"), **options)


def test_trajectory_of_another_length_is_refused():
    trajectory = rg.unroll(*example("lstm"))
    ex = example("lstm", num_steps=5)
    with pytest.raises(ValueError, match=r"trajectory.states.h: expected float32\[5, 4\], found float32\[6, 4\]"):
        parallel.parallel_chain(*ex, trajectory=trajectory)
    with pytest.raises(ValueError, match="unknown norm 'max'"):
        parallel.parallel_retention(*ex, norm="max")


@pytest.mark.parametrize(
    ("function", "budget"),
    [
        (parallel.parallel_chain, 6000),
        (lambda *a, **o: parallel.parallel_unroll(*a, method="newton", **o).trajectory, 1000),
    ],
    ids=["chain", "unroll"],
)
def test_what_the_error_names_fits_and_no_more(function, budget):
    ex = example("vanilla_tanh", num_steps=50)

    def refusal(num_steps, budget):
        try:
            jax.eval_shape(lambda xs: function(*ex[:3], xs, memory_budget=budget), ex.xs[:num_steps])
        except ValueError as error:
            return str(error)

    message = refusal(50, budget)
    enough = int(message.split("at least ")[1].split(" bytes")[0])
    assert refusal(50, enough) is None
    assert refusal(50, enough - 1)
    fits = int(message.split("which holds T=")[1].split(";")[0])
    assert 1 < fits < 50
    assert refusal(fits, budget) is None
    assert refusal(fits + 1, budget)


def _held(function, *arguments):
    """Bytes that XLA's program holds beside its arguments."""
    found = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


CELLS = {
    "vanilla": rg.cells.vanilla(3, 24),
    "lstm": rg.cells.lstm(3, 16),
    "gru": rg.cells.gru(3, 8),
    "stack": rg.cells.stack(rg.cells.gru(3, 9), rg.cells.lstm(9, 12)),
    "min_gru": rg.cells.min_gru(3, 32),
    "lru": rg.cells.lru(3, 16),
}


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_steps", "budget", "options"),
    [
        ("vanilla", 20, 150_000, {"reduce": rg.logscaled.log_norm}),
        ("vanilla", 100, 1_000_000, {}),
        ("lstm", 200, 600_000, {"reduce": rg.logscaled.log_norm}),
        ("lstm", 64, 2_000_000, {"path": "remainder", "of": "c", "wrt": "c"}),
        ("lstm", 1000, 5_000_000, {"of": "c", "wrt": "c"}),
        ("gru", 50, 10_000_000, {}),
        ("stack", 100, 1_000_000, {"reduce": rg.logscaled.log_norm}),
        ("lru", 300, 1_500_000, {"reduce": rg.logscaled.log_norm}),
    ],
)
def test_chains_keep_the_budget(name, num_steps, budget, options):
    cell = CELLS[name]
    params, state, xs = cell.init(jax.random.key(0)), cell.init_state(), inputs(0, num_steps, 3)
    held = _held(lambda *a: parallel.parallel_chain(cell, *a, memory_budget=budget, **options), params, state, xs)
    assert 0.2 * budget < held <= budget or (held <= budget and name == "gru")  # the gru's fits as a whole


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("name", "num_steps", "budget"),
    [
        ("min_gru", 1000, 1_200_000),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("vanilla", 400, 800_000),
                ("lstm", 200, 2_000_000),
                ("lstm", 1000, 3_000_000),
                ("stack", 200, 2_000_000),
                ("lru", 1000, 1_200_000),
            ]
        ),
    ],
)
def test_states_keep_the_budget(name, num_steps, budget):
    cell = CELLS[name]
    params, state, xs = cell.init(jax.random.key(0)), cell.init_state(), inputs(0, num_steps, 3)
    methods = []

    def run(*a):
        found = parallel.parallel_unroll(cell, *a, memory_budget=budget)
        methods.append(found.method)
        return found.trajectory

    assert 0.2 * budget < _held(run, params, state, xs) <= budget
    assert "scan" not in methods


# --- other platforms -------------------------------------------------------------------------------------------------

PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("lstm", lambda c, *a: parallel.parallel_retention(c, *a, path="remainder", norm="spectral")),
        ("lstm", lambda c, *a: parallel.parallel_unroll(c, *a).trajectory),
        ("lru", lambda c, *a: parallel.parallel_unroll(c, *a).trajectory),
        ("lstm", lambda c, *a: jax.grad(lambda p: _loss(parallel.parallel_unroll(c, p, *a[1:]).trajectory))(a[0])),
    ],
    ids=["retention", "newton", "linear", "gradient"],
)
def test_lowers_for_every_platform(name, function):
    ex = example(name)
    exported = export.export(jax.jit(lambda *a: function(ex.cell, *a)), platforms=PLATFORMS)(*ex[1:])
    assert set(exported.platforms) == set(PLATFORMS)


def test_products_run_at_highest_precision_and_the_step_at_the_users():
    """TF32 would ruin products; the states are those of the user's own forward pass and stay at the default."""
    ex = example("vanilla_tanh")

    def precisions(function):
        text = export.export(jax.jit(lambda *a: function(ex.cell, *a)), platforms=("cuda",))(*ex[1:]).mlir_module()
        lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        return ["HIGHEST" if "HIGHEST" in line else "DEFAULT" for line in lines]

    chain = precisions(parallel.parallel_chain)
    assert chain.count("DEFAULT") == 2  # W x and U h of the forward pass
    assert chain.count("HIGHEST") > 2
    newton = precisions(lambda *a: parallel.parallel_unroll(*a).trajectory)
    # W x and U h, in the residual, for the point of the Jacobian, of the solution, and in the scan that may take over,
    # which multiplies U with a zero state beside
    assert newton.count("DEFAULT") == 9
    assert newton.count("HIGHEST") > 2
