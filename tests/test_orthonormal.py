"""Orthonormal frames against NumPy's QR and exact arithmetic, on frames that ordinary Cholesky QR does not survive."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from rnngrad.orthonormal import orthonormalise

SIZES = [(1, 1), (1, 7), (5, 5), (40, 64), (128, 128), (150, 150)]


def graded(k: int, size: int, nats: float, seed: int = 0) -> np.ndarray:
    """A frame of k rows with singular values from 1 down to e^−nats."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(k, k)))[0]
    right = np.linalg.qr(rng.normal(size=(size, size)))[0][:k]
    return left @ (np.exp(-np.linspace(0, nats, k))[:, None] * right)


def numpy_log_growth(frame: np.ndarray) -> np.ndarray:
    return np.log(np.abs(np.diagonal(np.linalg.qr(frame.T, mode="r"))))


@pytest.mark.parametrize(("k", "size"), SIZES)
@pytest.mark.parametrize("nats", [0.0, 3.0, 8.0])
def test_against_numpy_in_double(k, size, nats):
    frame = graded(k, size, nats)
    out = orthonormalise(jnp.asarray(frame, jnp.float32))
    expected = numpy_log_growth(np.asarray(frame, np.float32).astype(np.float64))
    # round-off eps times the condition number: 1.2e-7 · e^8 = 4e-4
    np.testing.assert_allclose(out.log_growth, expected, atol=2e-3 if nats > 5 else 1e-5)
    gram = np.asarray(out.rows, np.float64) @ np.asarray(out.rows, np.float64).T
    # far below what LEFT_BEHIND allows; Lyapunov sums would not be touched by more either
    np.testing.assert_allclose(gram, np.eye(k), atol=0.02 if nats > 5 else 2e-4)
    assert out.rows.dtype == jnp.float32


def test_factorisation_holds_to_round_off_whether_or_not_the_rows_are_orthonormal():
    """Y = L Q with the true triangle: what makes one projection enough."""
    frame = jnp.asarray(graded(128, 128, 8.0), jnp.float32)
    rows = np.asarray(orthonormalise(frame).rows, np.float64)
    triangle = np.asarray(frame, np.float64) @ np.linalg.inv(rows)
    assert np.abs(np.triu(triangle, 1)).max() < 1e-5  # a hundred terms at eps


def test_against_sixty_digits():
    """One badly graded float32 frame against Cholesky of its Gram matrix at 60 digits."""
    frame = np.asarray(graded(12, 12, 9.0), np.float32)
    with mpmath.workdps(60):
        rows = mpmath.matrix(frame.astype(float).tolist())
        factor = mpmath.cholesky(rows * rows.T)
        expected = [float(mpmath.log(factor[j, j])) for j in range(12)]
    np.testing.assert_allclose(orthonormalise(jnp.asarray(frame)).log_growth, expected, atol=4e-3)  # eps · e^9 = 1e-3


def test_falls_back_where_nothing_else_helps():
    """Rows that are parallel to the last digit: no number of Cholesky passes sees what Householder reflections make."""
    easy = orthonormalise(jnp.asarray(graded(96, 96, 3.0), jnp.float32))
    assert float(easy.fell_back) == 0.0
    hard = orthonormalise(jnp.asarray(np.outer(np.ones(96), graded(1, 96, 0.0)), jnp.float32))
    assert float(hard.fell_back) == 1.0
    np.testing.assert_allclose(np.asarray(hard.rows) @ np.asarray(hard.rows).T, np.eye(96), atol=1e-5)


@pytest.mark.parametrize("how", ["zero frame", "zero row", "dead coordinate", "NaN"])
def test_awkward_frames(how):
    frame = np.array(graded(6, 6, 1.0), np.float32)
    if how == "zero frame":
        frame[:] = 0
    elif how == "zero row":
        frame[-1] = 0
    elif how == "dead coordinate":
        frame[:, 2] = 0
    else:
        frame[0, 0] = np.nan
    log_growth = np.asarray(orthonormalise(jnp.asarray(frame)).log_growth)
    if how == "NaN":
        assert np.isnan(log_growth).any()
    elif how == "zero frame":
        assert np.isneginf(log_growth).all()
    else:
        assert np.isneginf(log_growth[-1])
        assert np.isfinite(log_growth[:-1]).all()


def test_derivative_against_central_differences(x64):
    frame = jnp.asarray(graded(5, 7, 1.0))
    tangent = jax.random.normal(jax.random.key(3), frame.shape)
    _, derivative = jax.jvp(orthonormalise, (frame,), (tangent,))
    step = 1e-5
    above, below = (orthonormalise(frame + sign * step * tangent) for sign in (1, -1))
    for name in ("rows", "log_growth"):
        differences = (getattr(above, name) - getattr(below, name)) / (2 * step)
        # central differences: step² times the third derivative, here of order 100, and eps/step
        np.testing.assert_allclose(getattr(derivative, name), differences, rtol=1e-6, atol=1e-7)
    reverse = jax.grad(lambda frame: jnp.vdot(orthonormalise(frame).log_growth, jnp.arange(5.0)))(frame)
    np.testing.assert_allclose(jnp.vdot(reverse, tangent), derivative.log_growth @ jnp.arange(5.0), rtol=1e-10)


def test_vmap_is_a_stack():
    frames = jnp.stack([jnp.asarray(graded(9, 9, nats), jnp.float32) for nats in (0.0, 3.0, 5.0)])
    batched = jax.vmap(orthonormalise)(frames)
    for index, frame in enumerate(frames):
        # another order of summation, times the condition number of e^5
        np.testing.assert_allclose(batched.log_growth[index], orthonormalise(frame).log_growth, rtol=1e-5, atol=1e-3)
