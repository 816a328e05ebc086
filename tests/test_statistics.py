"""Intervals over seeds: right where the truth is known, and honest about what is not finite."""

from __future__ import annotations

import numpy as np

from experiments.statistics import median_interval


def test_median_and_shape():
    samples = np.random.default_rng(0).normal(size=(3, 11, 4))
    found = median_interval(samples, axis=1)
    np.testing.assert_allclose(found.median, np.median(samples, axis=1))
    assert found.low.shape == found.high.shape == (3, 4)
    assert (found.low <= found.median).all()
    assert (found.median <= found.high).all()


def test_interval_covers_the_median_about_as_often_as_it_says():
    """400 experiments of 15 exponential samples, median ln 2: the percentile bootstrap covers 90 to 98 %.

    A binomial proportion near 95 % over 400 has a standard error of 1.1 %; the bootstrap of a median of 15 is itself
    off by one or two per cent.
    """
    samples = np.random.default_rng(1).exponential(size=(400, 15))
    found = median_interval(samples, axis=1)
    coverage = np.mean((found.low <= np.log(2)) & (np.log(2) <= found.high))
    assert 0.90 <= coverage <= 0.985


def test_same_input_same_interval():
    samples = np.random.default_rng(0).normal(size=(5, 10))
    first, second = median_interval(samples, axis=1), median_interval(samples, axis=1)
    np.testing.assert_array_equal(first.low, second.low)


def test_one_seed_equal_seeds_and_no_seed():
    for found in (median_interval(np.array([[2.5]]), axis=1), median_interval(np.full((1, 6), 2.5), axis=1)):
        assert (found.median[0], found.low[0], found.high[0]) == (2.5, 2.5, 2.5)
    assert np.isnan(median_interval(np.full((1, 4), np.nan), axis=1).median[0])


def test_infinite_and_broken_seeds():
    found = median_interval(np.array([[-np.inf] * 4, [1.0, 2.0, 3.0, np.nan], [-np.inf, 1.0, 2.0, 3.0]]), axis=1)
    assert found.median[0] == -np.inf
    assert found.median[1] == 2.0
    assert found.median[2] == 1.0  # the lower middle one: an average with −inf would be neither
    assert (found.low[2], found.high[2]) == (-np.inf, 3.0)  # one of four seeds decides a tenth of the resamples


def test_a_broken_seed_does_not_narrow_the_interval():
    samples = np.random.default_rng(0).normal(size=(1, 9))
    alone = median_interval(samples, axis=1)
    beside = median_interval(np.concatenate([samples, np.full((1, 2), np.nan)], axis=1), axis=1)
    assert alone.low < alone.median < alone.high
    for found, expected in zip(beside, alone, strict=True):
        np.testing.assert_array_equal(found, expected)
