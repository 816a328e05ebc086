"""How long a user waits for the first ``rg.diagnose`` of a Flax LSTM, everything compiled on the way.

In a process of its own, three times: seconds of the call, T = 200 steps of 8 sequences.  At N = 128 the exact curve of
a sequence must lie in the intervals first, where those of random rows are taken.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.harness import Row, in_own_process, judged, median_and_range

LIMITS = {128: 10.0, 1024: 60.0}
"""Seconds by N."""


def measure(hidden_size: int, num_steps: int) -> dict[str, Any]:
    """Diagnoses in this process and returns seconds and how the curves were computed."""
    import jax
    import numpy as np
    from flax import nnx

    import rnngrad as rg

    model = nnx.RNN(nnx.LSTMCell(hidden_size, hidden_size, rngs=nnx.Rngs(0)), time_major=True)
    xs = jax.block_until_ready(jax.random.normal(jax.random.key(1), (num_steps, 8, hidden_size)))
    started = time.perf_counter()
    report = rg.diagnose(model, None, xs, progress=False)
    seconds = time.perf_counter() - started

    if hidden_size <= 128:
        adapted = rg.interop.adapt(model)
        exact = rg.retention(
            adapted.cell, adapted.cell_params, adapted.cell.init_state(), xs[:, 0], of="c", wrt="c"
        ).log_norm
        curves = report.layers[0].curves
        if curves.low is None or curves.high is None:
            np.testing.assert_allclose(curves.full[0], exact, rtol=1e-5, atol=1e-3)
        else:
            inside = (curves.low[0] <= exact) & (exact <= curves.high[0])
            # lags share their rows and miss together
            assert inside.mean() > 0.7, f"{inside.mean():.2f} of the exact curve within the intervals"
    return {"seconds": seconds, "method": report.method, "warnings": [found.code for found in report.warnings]}


def run(*, smoke: bool = False) -> list[Row]:
    """Returns seconds for both sizes; one small one with ``smoke``."""
    sizes = {6: 60.0} if smoke else LIMITS
    num_steps, repeats = (20, 1) if smoke else (200, 3)
    rows = []
    for hidden_size, limit in sizes.items():
        found = [in_own_process(measure, hidden_size, num_steps) for _ in range(repeats)]
        details = {"N": hidden_size, "T": num_steps, "B": 8, "dtype": "float32", "method": found[0]["method"]}
        size = f"N = {hidden_size}, (T, B) = ({num_steps}, 8)"
        what = f"seconds of the first rg.diagnose of an nnx LSTM, compiled anew, {size}"
        measured = median_and_range([float(one["seconds"]) for one in found])
        rows.append(judged("first_diagnosis", what, measured, f"≤ {limit:g}", details))
    return rows
