"""How every benchmark times: compile apart, paired repeats, block on the value just computed, quote the ratio."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
    """Seconds of one function."""

    compile_and_first: float
    repeats: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.repeats)


class Row(NamedTuple):
    """One line of a benchmark: a number, the bound it should keep, and what it was measured with."""

    benchmark: str
    what: str
    value: float
    spread: tuple[float, float]
    bound: str
    holds: bool
    details: dict[str, Any]


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times functions in turn, A B A B …, so that a drift of the machine's speed meets all of them alike."""
    first = {name: _seconds(function) for name, function in functions.items()}
    runs: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            runs[name].append(_seconds(function))
    return {name: Timing(first[name], tuple(runs[name])) for name in functions}


def ratio(timings: dict[str, Timing], numerator: str, denominator: str) -> tuple[float, tuple[float, float]]:
    """Returns median and range of the pairwise ratios of two timed functions."""
    pairs = [a / b for a, b in zip(timings[numerator].repeats, timings[denominator].repeats, strict=True)]
    return statistics.median(pairs), (min(pairs), max(pairs))


def matmul(size: int) -> tuple[Callable[[], Any], float]:
    """Returns a float32 matrix product of ``size`` at highest precision to time, and its floating-point operations."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size)) for seed in (0, 1))
    # the operands are arguments: a product of constants is computed once, by the compiler
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    return lambda: product(a, b), 2.0 * size**3


def milliseconds(timings: dict[str, Timing]) -> dict[str, Any]:
    """Returns the timings as stored: medians and compile times."""
    return {
        name: {"median_ms": round(1e3 * t.median, 3), "first_call_s": round(t.compile_and_first, 3)}
        for name, t in timings.items()
    }


def machine() -> dict[str, Any]:
    """Returns what every stored benchmark says about where it ran."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "rnngrad")},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
