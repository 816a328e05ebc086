"""LogScaled numbers against plain arithmetic where it works, and closed forms where it does not."""

from __future__ import annotations

import fractions

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rnngrad import logscaled
from rnngrad.logscaled import LogScaled

property_test = hypothesis.settings(deadline=None, max_examples=60, derandomize=True)

# Shapes are few so that property tests compile little; scales are many.
scales = st.integers(-(10**6), 10**6)


def matrices(rows: int, columns: int) -> st.SearchStrategy[np.ndarray]:
    entries = st.floats(-2, 2, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)
    return hnp.arrays(np.float32, (rows, columns), elements=entries)


def exact(x: LogScaled) -> list[fractions.Fraction]:
    """The value of every entry as an exact rational number."""
    power = fractions.Fraction(2) ** int(x.exponent)
    return [fractions.Fraction(float(entry)) * power for entry in np.asarray(x.mantissa).ravel()]


@property_test
@hypothesis.given(matrices(3, 4), scales)
def test_rescale_keeps_the_value_exactly(mantissa, exponent):
    x = LogScaled(jnp.asarray(mantissa), jnp.asarray(exponent, jnp.int32))
    scaled = logscaled.rescale(x)
    assert exact(scaled) == exact(x)
    largest = np.abs(scaled.mantissa).max()
    assert largest == 0 or 0.5 <= largest < 1


@property_test
@hypothesis.given(matrices(3, 3), matrices(3, 3), matrices(3, 3), scales, scales)
def test_multiplication_is_associative_to_rounding(a, b, c, exponent_a, exponent_b):
    x, y, z = (
        LogScaled(jnp.asarray(m), jnp.asarray(e, jnp.int32)) for m, e in ((a, exponent_a), (b, exponent_b), (c, 7))
    )
    left = logscaled.matmul(logscaled.matmul(x, y), z)
    right = logscaled.matmul(x, logscaled.matmul(y, z))
    # Rounding of a product of three 3×3 matrices is at most 2·3·2^-24 of |a||b||c| entry by entry; against that, not
    # against the result, which may cancel.
    bound = np.abs(a).astype(float) @ np.abs(b) @ np.abs(c) * 2.0**-21
    difference = logscaled.add(left, logscaled.negative(right))
    scale = fractions.Fraction(2) ** (exponent_a + exponent_b + 7)
    assert max(map(abs, exact(difference))) <= fractions.Fraction(float(bound.max())) * scale


@property_test
@hypothesis.given(matrices(2, 5), matrices(2, 5), scales, st.integers(-40, 40))
def test_add_equals_exact_sum(a, b, exponent, gap):
    x = LogScaled(jnp.asarray(a), jnp.asarray(exponent, jnp.int32))
    y = LogScaled(jnp.asarray(b), jnp.asarray(exponent + gap, jnp.int32))
    found = exact(logscaled.add(x, y))
    expected = [p + q for p, q in zip(exact(x), exact(y), strict=True)]
    largest = max([*map(abs, exact(x)), *map(abs, exact(y))])
    # one float32 rounding of each term's alignment and of the sum, relative to the larger term
    assert all(abs(f - e) <= largest * fractions.Fraction(2) ** -22 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("gap", [200, 5_000, 2**28, 2**30])
def test_add_across_a_gap_keeps_the_larger(gap):
    big = logscaled.from_array(jnp.eye(2))
    small = big._replace(exponent=big.exponent - gap)
    for found in (logscaled.add(big, small), logscaled.add(small, big)):
        np.testing.assert_array_equal(found.mantissa, big.mantissa)
        assert found.exponent == big.exponent


def test_add_of_zero_keeps_the_other_however_small():
    zero = logscaled.from_array(jnp.zeros((2, 2)))
    tiny = LogScaled(0.5 * jnp.eye(2), jnp.asarray(-100_000, jnp.int32))
    for found in (logscaled.add(zero, tiny), logscaled.add(tiny, zero)):
        assert exact(found) == exact(tiny)
    assert logscaled.log_norm(logscaled.add(zero, zero)) == -np.inf


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("nats", [-10_000, -87, 0, 87, 1_000])
def test_log_norm_far_outside_the_range_of_floats(dtype, nats, x64):
    # e^±nats by repeated multiplication with e^±1, whose rounding in the dtype is what limits the result
    steps = abs(nats)
    factor = logscaled.from_array(jnp.asarray(np.exp(np.sign(nats)) * np.eye(3), dtype))
    exponent_of_factor = float(np.log(np.asarray(factor.mantissa, np.float64)[0, 0])) + int(factor.exponent) * np.log(2)

    def body(carry, _):
        return logscaled.matmul(carry, factor), None

    product, _ = jax.lax.scan(body, logscaled.from_array(jnp.eye(3, dtype=dtype)), None, length=steps)
    found = float(logscaled.log_norm(product))
    # each product is rounded once: up to eps/2 relative, and all roundings of a constant factor may go one way
    tolerance = 0.5 * steps * float(jnp.finfo(dtype).eps) + 1e-6 * abs(nats) + 1e-6
    assert np.isfinite(found)
    assert abs(found - (steps * exponent_of_factor + 0.5 * np.log(3))) <= tolerance


def test_why_exponents_are_integers():
    """A running float32 sum of logarithms drifts by whole nats where the integer exponent is exact."""
    steps = 100_000
    increment = np.float32(np.log(0.5))
    total = np.float32(0)
    for _ in range(steps):
        total = np.float32(total + increment)
    truth = steps * np.log(0.5)
    assert abs(total - truth) > 50  # 62 nats, 0.09 % of it

    half = logscaled.from_array(jnp.asarray([[0.5]]))
    product, _ = jax.lax.scan(
        lambda c, _: (logscaled.matmul(c, half), None), logscaled.from_array(jnp.ones((1, 1))), None, length=steps
    )
    assert exact(product) == [fractions.Fraction(1, 2**steps)]
    np.testing.assert_allclose(logscaled.log_norm(product), truth, rtol=1e-7)


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_norms_equal_numpy(shape, x64):
    matrix = np.random.default_rng(0).normal(size=shape) * 1e-3
    x = logscaled.from_array(jnp.asarray(matrix))
    for norm, order in (("frobenius", "fro"), ("spectral", 2)):
        np.testing.assert_allclose(logscaled.log_norm(x, norm), np.log(np.linalg.norm(matrix, order)), rtol=1e-13)
    np.testing.assert_allclose(logscaled.log_max(x), np.log(np.abs(matrix).max()), rtol=1e-14)


def test_spectral_norm_far_outside_the_range():
    x = LogScaled(jnp.diag(jnp.array([1.0, 0.25])), jnp.asarray(-10_000, jnp.int32))
    np.testing.assert_allclose(logscaled.log_norm(x, "spectral"), -10_000 * np.log(2), rtol=1e-6)


def test_unknown_norm():
    with pytest.raises(ValueError, match="unknown norm 'nuclear'; expected 'frobenius' or 'spectral'"):
        logscaled.log_norm(logscaled.from_array(jnp.eye(2)), "nuclear")


def test_exact_zero_is_minus_infinity_and_nan_stays_nan():
    zero = logscaled.from_array(jnp.zeros((2, 2)))
    assert logscaled.log_norm(zero) == -np.inf
    assert logscaled.log_norm(zero, "spectral") == -np.inf
    assert logscaled.log_max(zero) == -np.inf
    product = logscaled.matmul(zero, logscaled.from_array(jnp.eye(2)))
    assert logscaled.log_norm(product) == -np.inf
    assert np.isnan(logscaled.log_norm(logscaled.from_array(jnp.full((2, 2), jnp.nan))))


def test_from_array_of_the_largest_and_smallest_floats():
    info = np.finfo(np.float32)
    for value in (info.max, info.tiny):
        x = logscaled.from_array(jnp.full((1, 1), value))
        assert exact(logscaled.rescale(x)) == [fractions.Fraction(float(value))]
        np.testing.assert_array_equal(logscaled.to_array(x), np.full((1, 1), value))


def test_to_array_round_trip_and_saturation():
    matrix = jnp.asarray([[3.0, -1e-20], [0.0, 2e10]])
    np.testing.assert_array_equal(logscaled.to_array(logscaled.from_array(matrix)), matrix)
    far = logscaled.from_array(matrix)
    np.testing.assert_array_equal(logscaled.to_array(far._replace(exponent=far.exponent - 10_000)), 0 * matrix)
    assert np.isposinf(logscaled.to_array(far._replace(exponent=far.exponent + 10_000))[0, 0])


def test_log_distance():
    a = LogScaled(jnp.eye(2) * 0.75, jnp.asarray(-5_000, jnp.int32))
    b = LogScaled(jnp.eye(2) * 0.5, jnp.asarray(-5_000, jnp.int32))
    np.testing.assert_allclose(logscaled.log_distance(a, b), np.log(0.5), rtol=1e-6)
    assert logscaled.log_distance(a, a) == -np.inf
    zero = logscaled.from_array(jnp.zeros((2, 2)))
    assert logscaled.log_distance(zero, zero) == -np.inf


def test_gradient_passes_through_a_product_that_floats_cannot_hold():
    """d/da log‖(aI)^n‖ = n/a, at a value of e^-6931."""

    def log_norm(a):
        factor = logscaled.from_array(a * jnp.eye(2))
        product, _ = jax.lax.scan(
            lambda c, _: (logscaled.matmul(c, factor), None), logscaled.from_array(jnp.eye(2)), None, length=10_000
        )
        return logscaled.log_norm(product)

    assert log_norm(0.5) < -6_900
    # 10,000 float32 additions of equal terms: their rounding, 6e-8 each, may all go one way
    np.testing.assert_allclose(jax.grad(log_norm)(0.5), 20_000, rtol=1e-3)


def test_batches_share_nothing():
    x = logscaled.from_array(jnp.stack([jnp.eye(2), 1e-30 * jnp.eye(2), jnp.zeros((2, 2))]))
    assert x.exponent.shape == (3,)
    one_by_one = jax.vmap(logscaled.from_array)(logscaled.to_array(x))
    np.testing.assert_array_equal(one_by_one.exponent, x.exponent)
    np.testing.assert_allclose(logscaled.log_norm(x)[:2], np.log(np.sqrt(2) * np.array([1, 1e-30])), rtol=1e-6)
