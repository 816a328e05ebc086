"""Singular values of long chains against products at 400 digits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import rnngrad as rg
from rnngrad.logscaled import LogScaled
from rnngrad.singular_values import log_singular_values


def exact(jacobians: np.ndarray) -> np.ndarray:
    """Multiplied out at 400 digits, decomposed there."""
    with mpmath.workdps(400):
        product = mpmath.eye(jacobians.shape[-1])
        for jacobian in np.asarray(jacobians, np.float64):
            product = mpmath.matrix(jacobian.tolist()) * product
        values = mpmath.svd_r(product, compute_uv=False)
        return np.sort([float(mpmath.log(value)) for value in values])[::-1]


@pytest.mark.parametrize(
    ("make", "num_steps"),
    [
        (lambda: rg.cells.lstm(3, 4, forget_bias=1.0, dtype=jnp.float64), 60),
        (lambda: rg.cells.gru(3, 5, dtype=jnp.float64), 120),
        (lambda: rg.cells.vanilla(3, 5, init="orthogonal", dtype=jnp.float64), 1),
    ],
    ids=["lstm", "gru, odd size", "one step"],
)
def test_every_singular_value_of_a_long_chain(x64, make, num_steps):
    cell = make()
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (num_steps, 3))
    found = rg.chain_singular_values(cell, params, cell.init_state(), xs)
    expected = exact(rg.step_jacobians(cell, params, cell.init_state(), xs))
    # nats: eps times the condition number of single steps, e^10 at most here
    np.testing.assert_allclose(found.log_singular_values, expected, atol=1e-10)
    np.testing.assert_allclose(found.log_condition_number, expected[0] - expected[-1], atol=1e-10)
    assert found.converged
    assert (found.roundoff < 1e-8).all()
    if num_steps > 1:
        # the plain product has lost them: it reports 1/eps at best
        plain = np.linalg.svd(rg.logscaled.to_array(rg.jacobian_chain(cell, params, cell.init_state(), xs)))[1][0]
        assert abs(np.log(plain[-1]) - expected[-1]) > 0.1


def test_float32_to_what_its_steps_allow():
    cell = rg.cells.lstm(3, 4, forget_bias=1.0)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (60, 3))
    found = rg.chain_singular_values(cell, params, cell.init_state(), xs)
    expected = exact(rg.step_jacobians(cell, params, cell.init_state(), xs))
    # 60 steps, each eps times a condition number of up to e^8
    np.testing.assert_allclose(found.log_singular_values, expected, atol=0.02)


def test_product_is_the_one_whose_order_of_factors_matters(x64):
    """Non-normal factors, so that a transposed or reversed product has other singular values."""
    xs = jax.random.normal(jax.random.key(0), (7, 4, 4))
    cell = rg.map_cell(lambda s, x: x @ s)
    found = rg.chain_singular_values(cell, None, jnp.zeros(4), xs)
    product = np.linalg.multi_dot(np.asarray(xs)[::-1])
    np.testing.assert_allclose(found.log_singular_values, np.log(np.linalg.svd(product)[1]), atol=1e-10)
    reverse = np.linalg.multi_dot(np.asarray(xs))
    assert np.abs(found.log_singular_values - np.log(np.linalg.svd(reverse)[1])).max() > 0.1


def test_orthogonal_chain_has_condition_number_one():
    cell = rg.cells.vanilla(3, 6, activation="identity", init="orthogonal")
    found = rg.chain_singular_values(cell, cell.init(jax.random.key(0)), cell.init_state(), jnp.zeros((500, 3)))
    np.testing.assert_allclose(found.log_singular_values, 0, atol=1e-4)  # 500 steps of eps


def test_singular_chain():
    xs = jax.random.normal(jax.random.key(0), (30, 3, 3)).at[10, 1].set(0.0)
    found = rg.chain_singular_values(rg.map_cell(lambda s, x: x @ s), None, jnp.zeros(3), xs)
    assert np.isneginf(found.log_singular_values[-1])
    assert np.isfinite(found.log_singular_values[:2]).all()
    assert np.isposinf(found.log_condition_number)


def test_triangular_chain_whose_directions_change_places():
    """Found unsorted from the identity: first e^±100 one way, then a shear, then e^±25 the other."""
    first = np.diag(np.exp([-1.0, 1.0])).astype(np.float32)
    shear = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    xs = jnp.asarray(np.stack([first] * 100 + [shear] + [first] * 25))
    found = rg.chain_singular_values(rg.map_cell(lambda s, x: x @ s), None, jnp.zeros(2), xs)
    expected = exact(np.asarray(xs))
    assert found.converged
    np.testing.assert_allclose(found.log_singular_values, expected, atol=1e-2)


def test_what_cannot_be_right_is_flagged():
    growing = rg.map_cell(lambda s, x: s * s)
    broken = rg.chain_singular_values(growing, None, jnp.full(3, 1e10), jnp.zeros((10, 0)))
    assert not broken.converged
    assert int(broken.nonfinite_step) == 2  # 1e10, 1e20, 1e40
    assert np.isnan(broken.log_singular_values).all()
    xs = jax.random.normal(jax.random.key(0), (30, 3, 3)).at[:, :, 2].set(0.0)
    xs = xs.at[:, :, 2].set(xs[:, :, 0] + xs[:, :, 1])  # rank 2, but for rounding
    lost = rg.chain_singular_values(rg.map_cell(lambda s, x: x @ s), None, jnp.zeros(3), xs)
    assert np.isposinf(lost.roundoff[-1])
    assert np.isfinite(lost.roundoff[:2]).all()


def test_more_rows_than_columns():
    with pytest.raises(ValueError, match=r"expected at most as many rows as columns, found shape \(3, 1\)"):
        log_singular_values(LogScaled(jnp.ones((3, 1)), jnp.zeros(3, jnp.int32)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 2), (3, 5), (8, 8), (9, 9)])
def test_jacobi_against_lapack(x64, shape):
    matrix = jax.random.normal(jax.random.key(1), shape)
    found = log_singular_values(LogScaled(matrix, jnp.zeros(shape[0], jnp.int32)))
    np.testing.assert_allclose(found.log_singular_values, np.log(np.linalg.svd(matrix)[1]), atol=1e-12)


def test_vmap_is_a_stack():
    cell = rg.cells.lstm(3, 3, forget_bias=1.0)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 20, 3))
    batch = jax.vmap(lambda xs: rg.chain_singular_values(cell, params, cell.init_state(), xs))(xs)
    for index in range(2):
        one = rg.chain_singular_values(cell, params, cell.init_state(), xs[index])
        np.testing.assert_allclose(batch.log_singular_values[index], one.log_singular_values, atol=0.02)
