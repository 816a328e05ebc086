"""How long a user waits for the first ``rg.diagnose`` of a Flax LSTM, everything compiled on the way, and for the next.

In a process of its own, three times: seconds of the call, T = 200 steps of 8 sequences, and of a second one for another
model of the same sizes, for which nearly nothing is compiled again.  At N = 128 the exact curve of
a sequence must lie in the intervals first, where those of random rows are taken.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.harness import REPORTED, Row, in_own_process, judged, median_and_range

LIMITS = {128: ("≤ 10", "≤ 0.5"), 1024: ("≤ 60", REPORTED)}
"""By N: seconds of the first one, and the second one in units of it; at N = 1024 computing takes most of the time."""


def measure(hidden_size: int, num_steps: int) -> dict[str, Any]:
    """Diagnoses two models in this process and returns seconds and how the curves were computed."""
    import jax
    import numpy as np
    from flax import nnx

    import rnngrad as rg

    make = lambda seed: nnx.RNN(nnx.LSTMCell(hidden_size, hidden_size, rngs=nnx.Rngs(seed)), time_major=True)
    model, another = make(0), make(1)
    xs = jax.block_until_ready(jax.random.normal(jax.random.key(1), (num_steps, 8, hidden_size)))
    started = time.perf_counter()
    report = rg.diagnose(model, None, xs, progress=False)
    first = time.perf_counter() - started
    rg.diagnose(another, None, xs, progress=False)
    seconds = (first, time.perf_counter() - started - first)

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
    sizes = {6: ("≤ 60", REPORTED)} if smoke else LIMITS
    num_steps, repeats = (20, 1) if smoke else (200, 3)
    rows = []
    for hidden_size, (limit, limit_of_ratio) in sizes.items():
        found = [in_own_process(measure, hidden_size, num_steps) for _ in range(repeats)]
        details = {"N": hidden_size, "T": num_steps, "B": 8, "dtype": "float32", "method": found[0]["method"]}
        size = f"N = {hidden_size}, (T, B) = ({num_steps}, 8)"
        seconds = [tuple(map(float, one["seconds"])) for one in found]
        what = f"seconds of the first rg.diagnose of an nnx LSTM, compiled anew, {size}"
        rows.append(judged("first_diagnosis", what, median_and_range([first for first, _ in seconds]), limit, details))
        what = f"time of a second rg.diagnose, of another nnx LSTM of the same size / of the first, {size}"
        ratios = median_and_range([second / first for first, second in seconds])
        rows.append(judged("first_diagnosis", what, ratios, limit_of_ratio, details))
    return rows
