"""The reverse scan against the machine's matrix-product rate, measured in the same run.

The chain ∂c_T/∂c_k of an LSTM costs 2 · N · 4N · N floating-point operations per step, the product of the (N × 4N)
cotangents of the gates with U; everything else it does (gates, rescaling, norms, its forward pass) counts as time and
not as work.  The rate is compared with that of one large product and with that of a lone product of the step's shape.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import (
    REPORTED,
    Problem,
    Row,
    judged,
    lstm_problem,
    matmul,
    median_and_range,
    milliseconds,
    timed,
)

SIZES = {(128, 1000): REPORTED, (256, 300): "≥ 0.75", (512, 100): "≥ 0.75"}
"""(N, T) and the bound; at N = 128 the gates and the rescaling are no longer small beside the product."""


def _check_ten_steps(p: Problem, log_norm: jax.Array) -> None:
    """Asserts that lag 10 of the curve is the norm of the product of the last ten step Jacobians."""
    n = len(p.state.c)
    start = rg.unroll(p.cell, p.params, p.state, p.xs[:-10]).final
    jacobians = np.asarray(rg.step_jacobians(p.cell, p.params, start, p.xs[-10:]), np.float64)
    explicit = np.linalg.multi_dot(jacobians[::-1])[n:, n:]
    np.testing.assert_allclose(log_norm[10], np.log(np.linalg.norm(explicit) / np.sqrt(n)), rtol=1e-4, atol=1e-4)


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the fraction of the matmul rate at every N; of one small one with ``smoke``."""
    sizes, size, repeats = ({(16, 20): "≥ 0.75"}, 128, 2) if smoke else (SIZES, 2048, 9)
    large, large_flops = matmul(size)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    rows = []
    for (n, num_steps), bound in sizes.items():
        p = lstm_problem(n, num_steps)

        def chain(p: Problem = p) -> Any:
            return rg.retention(p.cell, p.params, p.state, p.xs, of="c", wrt="c").log_norm

        _check_ten_steps(p, chain())
        lone = functools.partial(product, jnp.ones((n, 4 * n)), p.params.w_hh)
        timings = timed({"chain": chain, "large product": large, "lone product": lone}, repeats)
        flops = {"chain": num_steps * 8.0 * n**3, "large product": large_flops, "lone product": 8.0 * n**3}
        pairs = zip(timings["chain"].repeats, timings["large product"].repeats, strict=True)
        fractions = [(flops["chain"] / a) / (large_flops / b) for a, b in pairs]
        details = {
            "N": n,
            "T": num_steps,
            "dtype": "float32",
            "gflops": {name: round(flops[name] / timing.median / 1e9, 1) for name, timing in timings.items()},
            "timings": milliseconds(timings),
        }
        what = f"rate of the reverse scan at N = {n} / rate of a {size} × {size} product"
        rows.append(judged("chain_against_matmul", what, median_and_range(fractions), bound, details))
    return rows
