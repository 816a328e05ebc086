"""The split of one gradient: direct, remainder, by gate, by crossings."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad.jacobians import layout_of, step_pulls
from tests.cases import CASES, as_matrix, example, point_at, rows

FAST = ("lstm", "gru_before", "stack")
SPLIT_CASES = ["vanilla_tanh", "lstm", "peephole_lstm", "gru_after", "gru_before", "indrnn_tanh", "lru", "stack"]


def _matrix(chain):
    return np.asarray(rg.logscaled.to_array(chain))


@rows(SPLIT_CASES, fast=FAST)
def test_remainder_is_full_minus_direct(name, x64):
    ex = example(name, dtype="float64")
    full, direct, remainder = (_matrix(rg.jacobian_chain(*ex, path=path)) for path in ("full", "direct", "remainder"))
    np.testing.assert_allclose(remainder, full - direct, rtol=1e-11, atol=1e-14)


def test_remainder_keeps_its_digits_where_the_difference_loses_them():
    """Forget gates almost open: in float32 full − direct has one digit left, the recursion has six."""
    cell = rg.cells.lstm(2, 4, forget_bias=16.0)
    params = cell.init(jax.random.key(0))
    params = params._replace(w_hh=1e-6 * params.w_hh)
    xs = jax.random.normal(jax.random.key(1), (30, 2))
    run = lambda path: rg.retention(cell, params, cell.init_state(), xs, of="c", wrt="c", path=path).log_norm[-1]
    found, direct_alone = float(run("remainder")), float(run("direct"))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, cell.init_state(), xs))
        cell64 = rg.cells.lstm(2, 4, forget_bias=16.0, dtype=jnp.float64)
        expected = rg.retention(cell64, *wide, of="c", wrt="c", path="remainder").log_norm[-1]
        full, direct = (rg.jacobian_chain(cell64, *wide, of="c", wrt="c", path=path) for path in ("full", "direct"))
        by_subtraction = rg.logscaled.log_norm(rg.logscaled.add(full, rg.logscaled.negative(direct)))[0] - np.log(2)
    np.testing.assert_allclose(expected, by_subtraction, rtol=0, atol=1e-6)  # float64 still has digits to subtract
    assert float(expected) - direct_alone < np.log(3e-6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@rows(SPLIT_CASES, fast=FAST)
def test_gates_add_up_to_the_gated_path(name, x64):
    """Σ_j G_j = G: (D + G_j) − D summed over gates, and J − (J − G_j) likewise."""
    ex = example(name, num_steps=1, dtype="float64")
    direct, full = (_matrix(rg.jacobian_chain(*ex, path=path))[0] for path in ("direct", "full"))
    gates = rg.gate_names(*ex)
    opened = sum(_matrix(rg.jacobian_chain(*ex, path=f"only:{gate}"))[0] - direct for gate in gates)
    closed = sum(full - _matrix(rg.jacobian_chain(*ex, path=f"without:{gate}"))[0] for gate in gates)
    np.testing.assert_allclose(opened, full - direct, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(closed, full - direct, rtol=1e-11, atol=1e-13)


def test_lstm_gate_terms_in_closed_form(x64):
    """G_f = diag(c f') U_f for the memory, and the other gates likewise; the input gate's is diag(g i') U_i."""
    ex = example("lstm", num_steps=1, dtype="float64")
    gates = jax.tree.map(np.asarray, ex.cell.step(ex.params, ex.state, ex.xs[0])[1])
    u_i, u_f, u_g, _ = np.split(np.asarray(ex.params.w_hh), 4)
    c = np.asarray(ex.state.c)
    terms = {
        "f": (c * gates.f * (1 - gates.f))[:, None] * u_f,
        "i": (gates.g * gates.i * (1 - gates.i))[:, None] * u_i,
        "g": (gates.i * (1 - gates.g**2))[:, None] * u_g,
        "o": np.zeros((4, 4)),
    }
    for gate, term in terms.items():
        chain = rg.jacobian_chain(*ex, of="c", wrt="h", path=f"only:{gate}")
        np.testing.assert_allclose(_matrix(chain)[0], term, rtol=1e-12, atol=1e-16)


def test_only_and_without_over_many_steps_equal_explicit_products(x64):
    ex = example("gru_after", num_steps=5, dtype="float64")
    layout = layout_of(ex.state)
    names = rg.gate_names(*ex)
    assert names == ("r", "u", "n", "a")
    state, products = ex.state, {"only:u": np.eye(4), "without:u": np.eye(4)}
    for x in ex.xs:
        for path, is_open in (
            ("only:u", tuple(name == "u" for name in names)),
            ("without:u", tuple(name != "u" for name in names)),
        ):
            pulls = step_pulls(ex.cell, ex.params, point_at(ex.cell, ex.params, state, x), layout, is_open)
            products[path] = np.asarray(as_matrix(pulls.selected, layout)) @ products[path]
        state, _ = ex.cell.step(ex.params, state, x)
    for path, product in products.items():
        np.testing.assert_allclose(_matrix(rg.jacobian_chain(*ex, path=path))[0], product, rtol=1e-11, atol=1e-14)


@rows(SPLIT_CASES, fast=FAST)
@pytest.mark.parametrize("max_crossings", [0, 2, 6])
def test_crossings_add_up_to_the_chain(name, max_crossings, x64):
    ex = example(name, dtype="float64")
    parts = rg.gradient_paths(*ex, max_crossings=max_crossings)
    assert parts.parts.mantissa.shape[0] == max_crossings + 2
    full, direct = (_matrix(rg.jacobian_chain(*ex, path=path))[0] for path in ("full", "direct"))
    found = _matrix(parts.parts)
    np.testing.assert_allclose(found.sum(axis=0), full, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found[0], direct, rtol=1e-12, atol=1e-14)
    if max_crossings == 6:  # T = 6 steps cannot leave the lane more often
        np.testing.assert_array_equal(found[-1], 0)
    np.testing.assert_allclose(parts.share.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru_after"])
def test_crossings_equal_the_sum_over_all_orders(name, x64):
    """M_m by brute force: every way of choosing m of T steps to be gated and the others direct."""
    ex = example(name, num_steps=5, dtype="float64")
    layout = layout_of(ex.state)
    size = sum(layout.sizes)
    state, factors = ex.state, []
    for x in ex.xs:
        pulls = step_pulls(ex.cell, ex.params, point_at(ex.cell, ex.params, state, x), layout)
        factors.append((np.asarray(as_matrix(pulls.direct, layout)), np.asarray(as_matrix(pulls.gated, layout))))
        state, _ = ex.cell.step(ex.params, state, x)
    expected = np.zeros((6, size, size))
    for choice in itertools.product((0, 1), repeat=5):
        product = np.eye(size)
        for (direct, gated), is_gated in zip(factors, choice, strict=True):
            product = (gated if is_gated else direct) @ product
        expected[sum(choice)] += product
    found = _matrix(rg.gradient_paths(*ex, max_crossings=5).parts)
    np.testing.assert_allclose(found[:6], expected, rtol=1e-11, atol=1e-14)


def test_crossings_at_every_lag_are_those_of_the_shorter_chain(x64):
    ex = example("lstm", dtype="float64")
    whole = rg.gradient_paths(*ex, of="c", wrt="c", max_crossings=3)
    start = rg.unroll(*ex[:3], ex.xs[:2]).final
    later = rg.gradient_paths(ex.cell, ex.params, start, ex.xs[2:], of="c", wrt="c", max_crossings=3)
    np.testing.assert_allclose(whole.log_norm[len(ex.xs) - 2], later.log_norm[-1], rtol=1e-11)
    np.testing.assert_allclose(whole.share[len(ex.xs) - 2], later.share[-1], rtol=0, atol=1e-11)
    np.testing.assert_array_equal(whole.share[0], [1, 0, 0, 0, 0])
    assert (whole.of, whole.wrt, whole.certificate.dtype) == ("c", "c", "float64")


def test_crossings_survive_where_floats_do_not():
    """400 steps of a default LSTM: every part is far below float32, shares still add up to 1."""
    cell = rg.cells.lstm(4, 8)
    xs = jax.random.normal(jax.random.key(1), (400, 4))
    parts = rg.gradient_paths(
        cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="c", max_crossings=3
    )
    assert parts.log_norm[-1].max() < -90
    assert np.isfinite(parts.log_norm[-1]).all()
    np.testing.assert_allclose(parts.share.sum(axis=1), 1, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_an_lstm_is_carried_by_paths_with_many_crossings(x64):
    """b_f = 1, 60 steps, N = 64: the mean number of crossings, weighted by share, is about 11."""
    cell = rg.cells.lstm(16, 64, forget_bias=1.0, dtype=jnp.float64)
    means = []
    for seed in range(3):
        xs = jax.random.normal(jax.random.key(100 + seed), (60, 16), jnp.float64)
        parts = rg.gradient_paths(
            cell, cell.init(jax.random.key(seed)), cell.init_state(), xs, of="c", wrt="c", max_crossings=40
        )
        assert abs(parts.share[-1, -1]) < 1e-9  # 40 crossings leave nothing out
        means.append(float(parts.share[-1, :-1] @ np.arange(41.0)))
    assert 7 < np.median(means) < 15, means


@rows(CASES)
def test_gate_names(name):
    names = rg.gate_names(*example(name))
    assert names == {
        "lstm": ("i", "f", "g", "o"),
        "lstm_tanh_gates": ("i", "f", "g", "o"),
        "peephole_lstm": ("i", "f", "g", "o"),
        "coupled_lstm": ("f", "g", "o"),
        "gru_after": ("r", "u", "n", "a"),
        "gru_before": ("r", "u", "n", "a"),
        "min_gru": ("u", "n"),
        "min_lstm": ("i", "f", "n"),
        "stack": tuple(f"layer_0.{g}" for g in "runa") + tuple(f"layer_1.{g}" for g in "ifgo"),
    }.get(name, ("h",))
