"""One million steps of an LSTM with N = 64: does retention at every lag finish within 8 GB of memory?

It runs in a process of its own, whose largest memory the operating system reports.  Equality first: the newest lags
equal those of a chain over the last steps alone.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

from benchmarks.harness import Row, in_own_process, judged, lstm_problem


def peak_bytes() -> int:
    """Returns the largest memory of this process so far.

    Where Linux tells it: what getrusage tells there includes the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(num_steps: int, hidden_size: int) -> dict[str, float]:
    """Runs the chain in this process and returns seconds, the peak memory in GB, and the retention at the last lag."""
    import numpy as np

    import rnngrad as rg

    cell, params, state, xs = lstm_problem(hidden_size, num_steps)
    started = time.perf_counter()
    curve = rg.retention(cell, params, state, xs, of="c", wrt="c")
    log_norm = np.asarray(curve.log_norm)
    seconds = time.perf_counter() - started
    peak = peak_bytes() / 1e9  # before the check, which needs more

    tail = min(1000, num_steps // 2)
    start = rg.unroll(cell, params, state, xs[:-tail]).final
    expected = np.asarray(rg.retention(cell, params, start, xs[-tail:], of="c", wrt="c").log_norm)
    np.testing.assert_allclose(log_norm[: tail + 1], expected, rtol=1e-5, atol=1e-3)
    assert np.isfinite(log_norm).all()
    return {"seconds": seconds, "peak_gb": peak, "nats_at_last_lag": float(log_norm[-1])}


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the peak memory; a thousand steps with ``smoke``."""
    num_steps, hidden_size = (1_000, 8) if smoke else (1_000_000, 64)
    found = in_own_process(measure, num_steps, hidden_size)
    peak = found["peak_gb"]
    details = {"N": hidden_size, "T": num_steps, "dtype": "float32", **{k: round(v, 3) for k, v in found.items()}}
    what = f"peak memory of retention over {num_steps:,} steps, N = {hidden_size} (GB)"
    return [judged("million_steps", what, (peak, (peak, peak)), "≤ 8", details)]
