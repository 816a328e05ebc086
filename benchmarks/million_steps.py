"""One million steps of an LSTM with N = 64: does retention at every lag finish within 8 GB of memory?

It runs in a process of its own, whose largest memory the operating system reports.  Equality first: the newest lags
equal those of a chain over the last steps alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import Row

_ROOT = Path(__file__).resolve().parent.parent


def measure(num_steps: int, hidden_size: int) -> dict[str, float]:
    """Runs the chain in this process and returns seconds, the peak memory in GB, and the retention at the last lag."""
    import jax
    import numpy as np

    import rnngrad as rg

    cell = rg.cells.lstm(hidden_size, hidden_size, forget_bias=1.0)
    params, state = cell.init(jax.random.key(0)), cell.init_state()
    xs = jax.random.normal(jax.random.key(1), (num_steps, hidden_size))
    started = time.perf_counter()
    curve = rg.retention(cell, params, state, xs, of="c", wrt="c")
    log_norm = np.asarray(curve.log_norm)
    seconds = time.perf_counter() - started

    tail = min(1000, num_steps // 2)
    start = rg.unroll(cell, params, state, xs[:-tail]).final
    expected = np.asarray(rg.retention(cell, params, start, xs[-tail:], of="c", wrt="c").log_norm)
    np.testing.assert_allclose(log_norm[: tail + 1], expected, rtol=1e-5, atol=1e-3)
    assert np.isfinite(log_norm).all()
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return {"seconds": seconds, "peak_gb": peak, "nats_at_last_lag": float(log_norm[-1])}


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the peak memory; a thousand steps with ``smoke``."""
    num_steps, hidden_size = (1_000, 8) if smoke else (1_000_000, 64)
    code = (
        "import json; from benchmarks.million_steps import measure; "
        f"print(json.dumps(measure({num_steps}, {hidden_size})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {done.stderr.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    peak = found["peak_gb"]
    details = {"N": hidden_size, "T": num_steps, "dtype": "float32", **{k: round(v, 3) for k, v in found.items()}}
    return [
        Row(
            "million_steps",
            f"peak memory of retention over {num_steps:,} steps, N = {hidden_size} (GB)",
            peak,
            (peak, peak),
            "≤ 8",
            peak <= 8,
            details,
        )
    ]
