"""Parallel in time against the sequential scans: chains and states at T = 10³ … 10⁶.

* all lags of the chain of a GRU: ``rg.parallel_retention`` against ``rg.retention``;
* the states of a minGRU, a linear recurrence of numbers: ``rg.parallel_unroll`` against ``rg.unroll``;
* the states of a GRU by Newton's method, likewise.

What is held is equality of the results; an associative scan does more arithmetic for less depth, so it is the device
that decides whether it is faster.  On a GPU it should be from T = 10⁴ on; with two cores there is nothing to run in
parallel, the scan wins wherever the work per step is more than its overhead, and the ratio of the times is a report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import REPORTED, Row, by_backend, judged, milliseconds, ratio, timed

CHAIN, LINEAR, NEWTON = "all lags of a GRU's chain", "states of a minGRU", "states of a GRU"
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


def sizes() -> dict[int, dict[str, int]]:
    """Returns N of every measurement by T, on this backend.

    At T = 10⁶ a CPU takes half a minute for every chain and every Newton solution, some ten times with the repeats, and
    measures the linear recurrence alone; the row says so.
    """
    at_n = dict.fromkeys((CHAIN, LINEAR, NEWTON), 32)
    longest = at_n if jax.default_backend() == "gpu" else {LINEAR: 32}
    return {1_000: at_n, 10_000: at_n, 100_000: at_n, 1_000_000: longest}


def run(*, smoke: bool = False) -> list[Row]:
    """Returns one row per measurement and length; T = 10³ … 10⁶, or a few steps with ``smoke``."""
    rows = []
    for num_steps, at_n in ({20: dict.fromkeys((CHAIN, LINEAR, NEWTON), 4)} if smoke else sizes()).items():
        for what, n in at_n.items():
            rows.append(_row(what, n, num_steps, repeats=2 if smoke or num_steps == 1_000_000 else 3))
    return rows


def _row(what: str, n: int, num_steps: int, *, repeats: int) -> Row:
    """Returns one measurement, after the check of equality."""
    is_chain = what == CHAIN
    cell = rg.cells.min_gru(n, n) if what == LINEAR else rg.cells.gru(n, n)
    # Newton's iterations settle at the round-off of the products, which is not that of float32 where they are shortened
    with jax.default_matmul_precision("highest"):
        parallel, scan = _pairs(cell, num_steps, chain=is_chain)
        found, expected = parallel(), np.asarray(jax.tree.leaves(scan())[0])
        details: dict[str, Any] = {"N": n, "T": num_steps, "dtype": "float32"}
        if isinstance(found, rg.ParallelRun):
            details |= {
                "method": found.method,
                "window": found.window,
                "iterations": int(found.num_iterations),
                "residual": float(found.residual),
            }
            if found.used_scan:
                raise AssertionError(f"{what}, T = {num_steps}: the iteration gave up and used the scan, {details}")
            found = found.trajectory.states.h
        scale = 1 + np.abs(expected) if is_chain else np.ones_like(expected)
        error = float(jnp.max(jnp.abs(found - expected) / scale))
        details["largest error"] = error
        np.testing.assert_array_less(error, TOLERANCE, err_msg=f"{what}, T = {num_steps}")
        timings = timed({"parallel": parallel, "scan": scan}, repeats)
    details["timings"] = milliseconds(timings)
    if num_steps == 1_000_000 and set(sizes()[num_steps]) == {LINEAR}:
        details["left out at this length"] = f"{CHAIN} and {NEWTON}: minutes on a CPU"
    title = f"time in parallel / time of the scan: {what}, N = {n}, T = {num_steps}"
    bound = by_backend(cpu=REPORTED, gpu="≤ 1" if num_steps >= 10_000 else REPORTED)
    return judged("parallel_in_time", title, ratio(timings, "parallel", "scan"), bound, details)
