"""How every benchmark times: compile apart, paired repeats, block on the value just computed, quote the ratio.

What several benchmarks share besides: the LSTM that they measure, a process of its own for what must be measured in a
fresh one, and the device of the libraries that are not JAX.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import rnngrad as rg

_ROOT = Path(__file__).resolve().parent.parent
_RECORDED = ("jax", "jaxlib", "numpy", "rnngrad", "flax", "equinox", "torch")
"""Distributions whose versions are stored, of those that are installed."""


class Timing(NamedTuple):
    """Seconds of one function: its first call, compiled anew, and the repeats."""

    compile_and_first: float
    repeats: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.repeats)


class Row(NamedTuple):
    """One line of a benchmark: a number, the bound it should keep, and what it was measured with."""

    benchmark: str
    what: str
    value: float
    spread: tuple[float, float]
    bound: str
    """``≤ x``, ``≥ x``, or why there is none."""
    holds: bool | None
    """None without a bound."""
    details: dict[str, Any]


REPORTED = "reported"
"""Bound of a row that is held to none."""


def limit(bound: str) -> tuple[str, float] | None:
    """Returns the side and the number of a bound, ``("≤", 1.3)``; None for one that is only reported.

    Raises:
      ValueError: neither ``≤ x``, ``≥ x`` nor a text that begins with ``reported``.
    """
    side, _, number = bound.partition(" ")
    if side in ("≤", "≥"):
        return side, float(number)
    if not bound.startswith(REPORTED):
        raise ValueError(f"bound: expected '≤ x', '≥ x' or {REPORTED!r}, found {bound!r}")
    return None


def judged(
    benchmark: str, what: str, measured: tuple[float, tuple[float, float]], bound: str, details: dict[str, Any]
) -> Row:
    """Returns the row of a measured value and its range, held against its bound."""
    value, spread = measured
    found = limit(bound)
    holds = None if found is None else value <= found[1] if found[0] == "≤" else value >= found[1]
    return Row(benchmark, what, value, spread, bound, holds, details)


def by_backend(*, cpu: str, gpu: str) -> str:
    """Returns the bound that belongs to the device JAX runs on; on others than these two it is only reported."""
    return {"cpu": cpu, "gpu": gpu}.get(jax.default_backend(), REPORTED)


# --- timing ----------------------------------------------------------------------------------------------------------


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times functions in turn, A B A B …, so that a drift of the machine's speed meets all of them alike.

    What the check of equality compiled is forgotten before the first call, which therefore compiles.
    """
    jax.clear_caches()
    first = {name: _seconds(function) for name, function in functions.items()}
    runs: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            runs[name].append(_seconds(function))
    return {name: Timing(first[name], tuple(runs[name])) for name in functions}


def median_and_range(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Returns what a row quotes of the repeats."""
    return statistics.median(values), (min(values), max(values))


def ratio(timings: dict[str, Timing], numerator: str, denominator: str) -> tuple[float, tuple[float, float]]:
    """Returns median and range of the pairwise ratios of two timed functions."""
    return median_and_range(
        [a / b for a, b in zip(timings[numerator].repeats, timings[denominator].repeats, strict=True)]
    )


def milliseconds(timings: dict[str, Timing]) -> dict[str, Any]:
    """Returns the timings as stored: medians, and the first calls with their compilation."""
    return {
        name: {"median_ms": round(1e3 * t.median, 3), "first_call_with_compilation_s": round(t.compile_and_first, 3)}
        for name, t in timings.items()
    }


def in_own_process(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Returns what a module-level function of a benchmark returns in a fresh process.

    Raises:
      RuntimeError: the process failed; with what it said.
    """
    code = (
        f"import json; from {measure.__module__} import {measure.__name__} as measure; "
        f"print(json.dumps(measure(*{arguments!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- what is measured ------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A cell, its parameters and first state, and the inputs of one sequence."""

    cell: rg.Cell
    params: Any
    state: Any
    xs: jax.Array


def lstm_problem(hidden_size: int, num_steps: int) -> Problem:
    """Returns the LSTM that chains and spectra are timed on: forget bias 1, as many inputs as units."""
    cell = rg.cells.lstm(hidden_size, hidden_size, forget_bias=1.0)
    xs = jax.random.normal(jax.random.key(1), (num_steps, hidden_size))
    return Problem(cell, cell.init(jax.random.key(0)), cell.init_state(), xs)


def matmul(size: int) -> tuple[Callable[[], Any], float]:
    """Returns a float32 matrix product of ``size`` at highest precision to time, and its floating-point operations."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size)) for seed in (0, 1))
    # the operands are arguments: a product of constants is computed once, by the compiler
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    return lambda: product(a, b), 2.0 * size**3


# --- the machine -----------------------------------------------------------------------------------------------------


class Torch(NamedTuple):
    """PyTorch on the kind of device that JAX uses, where it can."""

    device: str

    def tensors(self, *arrays: Any) -> Any:
        """Returns arrays as a tuple of tensors on the device."""
        import numpy as np
        import torch

        return tuple(torch.from_numpy(np.array(array)).to(self.device) for array in arrays)

    def wait(self) -> None:
        """Blocks until the device is done, as ``jax.block_until_ready`` does for JAX."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def facts(self) -> dict[str, Any]:
        """Returns what a row that timed it says of it."""
        import torch

        return {
            "torch device": self.device,
            "torch threads": torch.get_num_threads(),
            "torch allows TF32 in cuDNN": torch.backends.cudnn.allow_tf32,
        }


def torch_beside_jax() -> Torch:
    """Returns PyTorch on the GPU when JAX runs on one and PyTorch sees it, else on the CPU."""
    import torch

    return Torch("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")


def _versions() -> dict[str, str]:
    installed = {}
    for name in _RECORDED:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # some are beside the project's own
            continue
    return installed


def machine() -> dict[str, Any]:
    """Returns what every stored benchmark says about where and how it ran.

    Chains, spectra and the products they are compared with run at highest matmul precision whatever the default is;
    training steps run at the default, which is None where nobody set one: XLA's own choice, float32 on a CPU.
    """
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "default_matmul_precision": jax.config.values["jax_default_matmul_precision"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
