"""Probed retention of a large LSTM, against one training step's gradient through the same steps.

Sixteen probes pull sixteen rows back through every step, as backpropagation through time at batch 16 does with its
cotangents.  The measured side adds norms and Gram matrices of the rows and the forward pass of one sequence; BPTT adds
fifteen more sequences and the weight gradient.  BPTT is ``jax.grad`` of a plain loss through ``rg.unroll``, jitted.

Equality first: against the exact curve at a smaller N, and at the size itself one lag against ``jax.vjp`` of the same
probes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, judged, lstm_problem, milliseconds, ratio, timed

NUM_PROBES = BATCH = 16


def _check_against_the_exact_curve(n: int, num_steps: int) -> float:
    """Returns the share of lags whose 95 % interval holds the exact value, after asserting that none is far off."""
    cell, params, state, xs = lstm_problem(n, num_steps)
    curve = rg.probe_retention(cell, params, state, xs, jax.random.key(2), of="c", wrt="c")
    exact = np.asarray(rg.retention(cell, params, state, xs, of="c", wrt="c").log_norm)
    width = np.asarray(curve.high - curve.low)[1:]
    # of one draw all lags miss together: two widths are eight standard errors
    assert (np.abs(np.asarray(curve.log_norm) - exact)[1:] < 2 * width).all()
    return float(np.mean((curve.low <= exact) & (exact <= curve.high)))


def _check_one_lag(
    cell: rg.Cell, params: Any, state: Any, xs: jax.Array, curve: rg.ProbedCurve, key: jax.Array, lag: int
) -> None:
    """Asserts that the estimate at ``lag`` is the norm of the same probes pulled back by ``jax.vjp``."""
    n = state.c.shape[0]
    start = rg.unroll(cell, params, state, xs[:-lag]).final
    probes = jax.random.normal(key, (NUM_PROBES, n))

    @jax.jit
    def log_norm(c, xs):
        with jax.default_matmul_precision("highest"):
            _, pull = jax.vjp(lambda c: rg.unroll(cell, params, start._replace(c=c), xs).final.c, c)
            (rows,) = jax.vmap(pull)(probes)
        return jnp.log(jnp.linalg.norm(rows) / jnp.sqrt(1.0 * NUM_PROBES * n))

    np.testing.assert_allclose(curve.log_norm[lag], log_norm(start.c, xs[-lag:]), rtol=1e-4, atol=1e-4)


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratio; N = 2,048, T = 256, or a few steps with ``smoke``."""
    n, num_steps, repeats = (32, 20, 2) if smoke else (2048, 256, 5)
    covered = _check_against_the_exact_curve(16 if smoke else 128, num_steps)
    cell, params, state, xs = lstm_problem(n, num_steps)
    key = jax.random.key(2)
    ours = lambda: rg.probe_retention(cell, params, state, xs, key, num_probes=NUM_PROBES, of="c", wrt="c")
    _check_one_lag(cell, params, state, xs, ours(), key, lag=10)

    batch = jax.random.normal(jax.random.key(3), (num_steps, BATCH, n))
    batch_state = cell.init_state((BATCH,))

    @jax.jit
    def bptt(params, xs):
        return jax.grad(lambda p: jnp.mean(jnp.square(rg.unroll(cell, p, batch_state, xs).states.h)))(params)

    timings = timed({"probes": ours, "BPTT": lambda: bptt(params, batch)}, repeats)
    details = {
        "N": n,
        "T": num_steps,
        "probes": NUM_PROBES,
        "batch": BATCH,
        "dtype": "float32",
        "lags of the smaller curve inside their 95 % interval": round(covered, 3),
        "timings": milliseconds(timings),
    }
    what = f"time of all {num_steps} lags by {NUM_PROBES} probes at N = {n} / time of one BPTT at batch {BATCH}"
    return [judged("probes_against_bptt", what, ratio(timings, "probes", "BPTT"), "≤ 1.5", details)]
