"""The reverse scan against the machine's matrix-product rate, measured in the same run.

The chain ∂c_T/∂c_k of an LSTM costs 2 · N · 4N · N floating-point operations per step, the product of the (N × 4N)
cotangents of the gates with U; everything else it does (gates, rescaling, norms, its forward pass) counts as time and
not as work.  The rate is compared with that of one large product and with that of a lone product of the step's shape.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, matmul, milliseconds, timed


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the fraction of the matmul rate; N = 256, T = 300, or a few steps with ``smoke``."""
    n, num_steps, size, repeats = (16, 20, 128, 2) if smoke else (256, 300, 2048, 9)
    cell = rg.cells.lstm(n, n, forget_bias=1.0)
    params, state = cell.init(jax.random.key(0)), cell.init_state()
    xs = jax.random.normal(jax.random.key(1), (num_steps, n))

    def ours():
        return rg.retention(cell, params, state, xs, of="c", wrt="c").log_norm

    # equality: the sum of log-norm changes is the product's, so a chain over the last 10 steps is the same at lag 10
    start = rg.unroll(cell, params, state, xs[:-10]).final
    jacobians = np.asarray(rg.step_jacobians(cell, params, start, xs[-10:]), np.float64)
    explicit = np.linalg.multi_dot(jacobians[::-1])[n:, n:]
    np.testing.assert_allclose(ours()[10], np.log(np.linalg.norm(explicit) / np.sqrt(n)), rtol=1e-4, atol=1e-4)

    large, large_flops = matmul(size)
    cotangents, weights = jnp.ones((n, 4 * n)), params.w_hh
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    lone = lambda: product(cotangents, weights)
    timings = timed({"chain": ours, "large product": large, "lone product": lone}, repeats)
    flops = 8.0 * n**3
    rates = {
        "chain": num_steps * flops / timings["chain"].median,
        "large product": large_flops / timings["large product"].median,
        "lone product": flops / timings["lone product"].median,
    }
    fractions = [
        num_steps * flops / a / (large_flops / b)
        for a, b in zip(timings["chain"].repeats, timings["large product"].repeats, strict=True)
    ]
    value = float(np.median(fractions))
    details = {
        "N": n,
        "T": num_steps,
        "dtype": "float32",
        "gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "timings": milliseconds(timings),
    }
    return [
        Row(
            "chain_against_matmul",
            f"rate of the reverse scan at N = {n} / rate of a {size} × {size} product",
            value,
            (min(fractions), max(fractions)),
            "≥ 0.6",
            value >= 0.6,
            details,
        )
    ]
