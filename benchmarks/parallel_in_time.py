"""Parallel in time against the sequential scans: chains and states at T = 10³, 10⁴, 10⁵ for N = 32.

* all lags of the chain of a GRU: ``rg.parallel_retention`` against ``rg.retention``;
* the states of a minGRU, a linear recurrence of numbers: ``rg.parallel_unroll`` against ``rg.unroll``;
* the states of a GRU by Newton's method, likewise.

What is held is equality of the results; the ratio of the times is a report.  An associative scan does more arithmetic
for less depth, so it is the device that decides: with two cores there is nothing to run in parallel, and the scan wins
wherever the work per step is more than its overhead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, milliseconds, ratio, timed

TOLERANCE = 1e-4
"""Of log-norms relative to 1 + |log-norm|, and of states, which lie between −1 and 1."""


def _pairs(cell: rg.Cell, num_steps: int, *, chain: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns the two functions to compare, the parallel one first; both return arrays of one structure."""
    params, state = cell.init(jax.random.key(0)), cell.init_state()
    xs = jax.random.normal(jax.random.key(1), (num_steps, cell.input_size or 0))
    functions: tuple[Callable[..., Any], Callable[..., Any]]
    if chain:
        functions = (
            lambda params, xs: rg.parallel_retention(cell, params, state, xs).log_norm,
            lambda params, xs: rg.retention(cell, params, state, xs).log_norm,
        )
    else:
        functions = (
            lambda params, xs: rg.parallel_unroll(cell, params, state, xs),
            lambda params, xs: rg.unroll(cell, params, state, xs).states,
        )
    # one program each, so that neither pays at every call for checks and for reading the step's program
    parallel, scan = map(jax.jit, functions)
    return lambda: parallel(params, xs), lambda: scan(params, xs)


def run(*, smoke: bool = False) -> list[Row]:
    """Returns one row per measurement and length; N = 32 and T = 10³ … 10⁵, or a few steps with ``smoke``."""
    n, lengths, repeats = (4, (20,), 2) if smoke else (32, (1_000, 10_000, 100_000), 3)
    gru, min_gru = rg.cells.gru(n, n), rg.cells.min_gru(n, n)
    measurements = {
        "all lags of a GRU's chain": (gru, True),
        "states of a minGRU": (min_gru, False),
        "states of a GRU": (gru, False),
    }
    rows = []
    for num_steps in lengths:
        for what, (cell, chain) in measurements.items():
            parallel, scan = _pairs(cell, num_steps, chain=chain)
            found, expected = parallel(), np.asarray(jax.tree.leaves(scan())[0])
            details: dict[str, Any] = {"N": n, "T": num_steps, "dtype": "float32"}
            if isinstance(found, rg.ParallelRun):
                details |= {
                    "method": found.method,
                    "window": found.window,
                    "iterations": int(found.num_iterations),
                    "residual": float(found.residual),
                    "used_scan": bool(found.used_scan),
                }
                found = found.trajectory.states.h
            scale = 1 + np.abs(expected) if chain else np.ones_like(expected)
            error = float(jnp.max(jnp.abs(found - expected) / scale))
            details["largest error"] = error
            np.testing.assert_array_less(error, TOLERANCE, err_msg=f"{what}, T = {num_steps}")
            timings = timed({"parallel": parallel, "scan": scan}, repeats)
            value, spread = ratio(timings, "parallel", "scan")
            details["timings"] = milliseconds(timings)
            rows.append(
                Row(
                    "parallel_in_time",
                    f"time in parallel / time of the scan: {what}, N = {n}, T = {num_steps}",
                    value,
                    spread,
                    f"reported; equal to {TOLERANCE:g}",
                    error <= TOLERANCE and not details.get("used_scan", False),
                    details,
                )
            )
    return rows
