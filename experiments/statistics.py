"""Medians and their intervals over seeds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import scipy.stats
import xarray as xr

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """A median over seeds and its bootstrap interval."""

    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _of_order_statistics(samples: np.ndarray, seed: int) -> tuple[float, float, float]:
    """The same with the lower of two middle samples and no interpolation: a mean of −inf and a number is neither."""
    middle = (len(samples) - 1) // 2
    drawn = samples[np.random.default_rng(seed).integers(len(samples), size=(NUM_RESAMPLES, len(samples)))]
    medians = np.sort(np.sort(drawn, axis=-1)[:, middle])
    tail = (1 - CONFIDENCE) / 2
    low, high = medians[int(tail * NUM_RESAMPLES)], medians[int(np.ceil((1 - tail) * NUM_RESAMPLES)) - 1]
    return float(np.sort(samples)[middle]), float(low), float(high)


def median_interval(samples: np.ndarray, *, axis: int, seed: int = 0) -> Interval:
    """Returns the median over ``axis`` and its 95 % percentile-bootstrap interval.

    Seeds that are NaN (a run that became non-finite) are left out.  Where one remains, or where all are equal, the
    interval is the median itself; where some are infinite, median and ends are samples, and may be infinite.
    """
    samples = np.moveaxis(np.asarray(samples, dtype=float), axis, -1)
    median = np.full(samples.shape[:-1], np.nan)
    low, high = median.copy(), median.copy()
    flat = samples.reshape(-1, samples.shape[-1])
    valid = ~np.isnan(flat)
    all_finite = np.isfinite(flat).all(axis=-1)

    def bootstrap(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():
            # equal samples have a degenerate bootstrap distribution; their interval is the median
            warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
            interval = scipy.stats.bootstrap(
                (samples,),
                np.median,
                axis=-1,
                confidence_level=CONFIDENCE,
                n_resamples=NUM_RESAMPLES,
                method="percentile",
                rng=np.random.default_rng(seed),
                batch=100,
            ).confidence_interval
        return interval.low, interval.high

    # the usual case in one vectorised call
    if flat.shape[-1] > 1 and all_finite.any():
        low.reshape(-1)[all_finite], high.reshape(-1)[all_finite] = bootstrap(flat[all_finite])
        median.reshape(-1)[all_finite] = np.median(flat[all_finite], axis=-1)
    for index in np.flatnonzero(~all_finite | (flat.shape[-1] == 1)):
        kept = np.sort(flat[index][valid[index]])
        if len(kept) > 1 and np.isfinite(kept).all():
            ends = bootstrap(kept)
            values = float(np.median(kept)), float(ends[0]), float(ends[1])
        elif len(kept):
            values = _of_order_statistics(kept, seed)
        else:
            continue
        for target, value in zip((median, low, high), values, strict=True):
            target.reshape(-1)[index] = value
    return Interval(median, low, high)


def summarise(dataset: xr.Dataset, names: Iterable[str], descriptions: Mapping[str, tuple[str, str]]) -> None:
    """Adds median, low and high over seeds of the named variables, with units and description of each."""
    for name in names:
        variable = dataset[name]
        dims = tuple(dim for dim in variable.dims if dim != "seed")
        interval = median_interval(variable.values, axis=variable.dims.index("seed"))
        units, text = descriptions[name]
        for statistic, values in interval._asdict().items():
            dataset[f"{name}_{statistic}"] = (dims, values)
            dataset[f"{name}_{statistic}"].attrs.update(units=units, description=f"{statistic} over seeds: {text}")


def describe(dataset: xr.Dataset, descriptions: Mapping[str, tuple[str, str]]) -> xr.Dataset:
    """Returns the dataset with units and description at every variable named."""
    for name, (units, text) in descriptions.items():
        dataset[name].attrs.update(units=units, description=text)
    return dataset


# --- what a person sees ----------------------------------------------------------------------------------------------


def interval_text(interval: Interval, form: str = ".2f", *, nothing: str | None = None) -> str:
    """Returns a median and its interval as tables and verdicts print them.

    Args:
      interval: three scalars.
      form: how each is formatted.
      nothing: stands for a median that is NaN, when given.

    >>> interval_text(Interval(1.0, 0.5, 2.0), ".1f")
    '1.0 [0.5, 2.0]'
    """
    median, low, high = (float(value) for value in interval)
    if nothing is not None and np.isnan(median):
        return nothing
    return f"{median:{form}} [{low:{form}}, {high:{form}}]"


def stored_text(dataset: xr.Dataset, name: str, form: str = ".2f", *, nothing: str | None = None) -> str:
    """Returns the same of what :func:`summarise` added for a variable, at a place of the dataset without dimensions."""
    interval = Interval(*(dataset[f"{name}_{part}"].values for part in Interval._fields))
    return interval_text(interval, form, nothing=nothing)
