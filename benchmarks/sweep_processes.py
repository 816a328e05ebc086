"""Two processes on a sweep against one: how much sooner is it done?

The same parts of ``experiments.sweep``, shared through a folder as its command shares them.  Every process has imported
and compiled everything when all begin, at one signal; what is timed is from there until the last one has all parts.

* the same two cores, which is what a user has to choose between: two processes, held to one of them each, against one
  process with both, which has one CPU device or, so that it can use them, two;
* scaling, reported: two processes on a core each against one on one core.

Equality first: all results are the same to the last bit.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from benchmarks.harness import REPORTED, Row, judged, median_and_range
from experiments import command, results, sweep

_ROOT = Path(__file__).resolve().parent.parent


def config(*, smoke: bool) -> sweep.Config:
    """Returns the sweep: 32 parts of two cells, N = 64, T = 1000; a tiny one with ``smoke``."""
    if smoke:
        return dataclasses.replace(sweep.SMOKE, cells=("vanilla",), seeds=4)
    return sweep.Config(
        cells=("lstm", "gru"), forget_biases=("1",), hidden_sizes=(64,), lengths=(1000,), seeds=64, per_part=4
    )


def work(folder: str, cores: Sequence[int], smoke: bool) -> None:
    """Does what one process of a sweep does, between a signal and the last part; prints the seconds."""
    os.sched_setaffinity(0, cores)
    whole, at = config(smoke=smoke), Path(folder)
    # the same programs for other seeds
    sweep.run(dataclasses.replace(whole, seeds=1, first_seed=whole.seeds))
    parts = results.Parts(at, experiment="sweep", config=command.config_dict(whole))
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    dataset = sweep.run(whole, parts=parts)
    print(time.perf_counter() - started, flush=True)
    results.save(dataset, at / f"{os.getpid()}.nc")


def seconds(cores: Sequence[Sequence[int]], *, devices: int = 1, smoke: bool) -> tuple[float, xr.Dataset]:
    """Returns the time until the last of several processes is done, and the result; ``cores`` of each process."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for own in cores:
            code = f"from benchmarks.sweep_processes import work; work({folder!r}, {tuple(own)!r}, {smoke!r})"
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", code],
                    cwd=_ROOT,
                    env=dict(os.environ, XLA_FLAGS=flags),
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
        for worker in workers:
            first = worker.stdout.readline() if worker.stdout else ""
            if first != "ready\n":
                raise RuntimeError(f"expected a process to say that it is ready, found {first!r}")
        for worker in workers:
            print("go", file=worker.stdin, flush=True)
        said = [worker.communicate()[0] for worker in workers]
        found = [results.load(file, experiment="sweep") for file in Path(folder).glob("*.nc")]
    for other in found[1:]:
        xr.testing.assert_identical(other.drop_attrs(), found[0].drop_attrs())
    return max(float(text) for text in said), found[0]


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios."""
    here = sorted(os.sched_getaffinity(0))[:2]
    one, two = here[:1], here[-1:]
    shapes: dict[str, tuple[list[list[int]], int]] = {
        "1 process, both cores": ([here], 1),
        "1 process, both cores, 2 devices": ([here], 2),
        "2 processes, a core each": ([one, two], 1),
        "1 process, one core": ([one], 1),
    }
    times: dict[str, list[float]] = {name: [] for name in shapes}
    expected = None
    for _ in range(1 if smoke else 3):
        for name, (cores, devices) in shapes.items():
            took, dataset = seconds(cores, devices=devices, smoke=smoke)
            times[name].append(took)
            expected = dataset if expected is None else expected
            xr.testing.assert_identical(dataset.drop_attrs(), expected.drop_attrs())
    details: dict[str, Any] = {
        "dtype": "float32",
        **command.config_dict(config(smoke=smoke)),
        "cores": here,
        "seconds": {name: [round(each, 3) for each in every] for name, every in times.items()},
    }
    rows = []
    for against, bound in {
        "1 process, both cores": "≤ 0.6",
        "1 process, both cores, 2 devices": "≤ 0.6",
        "1 process, one core": REPORTED,
    }.items():
        pairs = zip(times["2 processes, a core each"], times[against], strict=True)
        what = f"time of a sweep by 2 processes, a core each / by {against}"
        rows.append(judged("sweep_processes", what, median_and_range([a / b for a, b in pairs]), bound, details))
    return rows
