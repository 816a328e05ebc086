"""What this machine and its JAX do to numbers, and what is missing: measured, not looked up.

::

    ε = ‖AB − C‖_F / ‖C‖_F      A, B: N(0, 1) rounded to the dtype, 256 × 256
                                AB on the device;   C = AB by NumPy in float64

By the size of ε one sees what a device really multiplies in.  Rounding the inputs to a mantissa of p bits costs about
0.3 · 2^−p: 4e-8 in float32 (p = 23), 3e-4 in TF32 (10) and 2e-3 in bfloat16 (7).  A bfloat16 product that is added up
in float32 loses only in the rounding of its result, 1.7e-3; one that is added up in bfloat16 loses ten times as much.

A device flushes subnormals if 2^−126 · ½ is 0 there (2^−126 is the smallest normal float32).  Versions and extras are
read from the metadata of the installed distribution, so that ``pyproject.toml`` stays the only list of them.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnngrad.jacobians import MATMUL_PRECISION
from rnngrad.tasks import text

Status = Literal["ok", "note", "problem"]

_SIZE = 256
"""Of the matrices that products are tried on: large enough for tensor cores, nothing on a CPU."""
_FLOAT32_ERROR = 1e-5
"""Between what float32 loses (1e-7, times a few for the sum of 256) and what TF32 loses (3e-4)."""
_BFLOAT16_ERROR = 4e-3
"""Between what rounding the result alone loses (1.7e-3) and what adding up 256 products in bfloat16 loses (1e-2)."""
_CONTRIBUTORS = ("dev", "docs", "notebooks", "test")
"""Extras for work on rnngrad itself, which its users need not hear of."""


class Row(NamedTuple):
    """One thing that was looked at."""

    name: str
    value: str
    status: Status
    advice: str
    """What to do, or what it means; empty where there is nothing to say."""


class Examination(NamedTuple):
    """What :func:`examine` returns."""

    rows: tuple[Row, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is broken; notes do not count."""
        return all(row.status != "problem" for row in self.rows)


class Requirement(NamedTuple):
    """A line of a distribution's metadata: ``tyro<2,>=1.0; extra == "cli"``."""

    package: str
    lowest: str
    """Lowest version, ``""`` if any will do."""
    extra: str
    """The extra that asks for it, ``""`` for the core."""


def requirements(lines: Sequence[str]) -> tuple[Requirement, ...]:
    """Returns what the requirement lines of a distribution ask for.

    Requirements on extras of a package (``jax[cuda13]``, and an extra of ours that contains another) are left out: no
    metadata tells whether they are installed.

    >>> requirements(["jax>=0.10", 'tyro<2,>=1.0; extra == "cli"', 'jax[cuda13]>=0.10; extra == "cuda"'])
    (Requirement(package='jax', lowest='0.10', extra=''), Requirement(package='tyro', lowest='1.0', extra='cli'))
    """
    found = []
    for line in lines:
        asked, _, marker = line.partition(";")
        package = re.match(r"\s*([\w.-]+)\s*(\[)?", asked)
        if package is None or package[2]:
            continue
        lowest = re.search(r"[>=]=\s*([\w.]+)", asked)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        found.append(Requirement(package[1], lowest[1] if lowest else "", extra[1] if extra else ""))
    return tuple(found)


def flushes_subnormals(device: jax.Device) -> bool:
    """Returns whether a float32 below 2^−126 becomes 0 when the device computes with it.

    >>> flushes_subnormals(jax.devices()[0]) in (True, False)
    True
    """
    smallest, half = jax.device_put((np.float32(2.0**-126), np.float32(0.5)), device)
    # compared by NumPy: a device that flushes may take a subnormal for 0 when it compares
    return float(np.asarray(jax.jit(jnp.multiply)(smallest, half))) == 0.0


def matmul_error(device: jax.Device, dtype: str) -> float:
    """Returns the relative error of a product of two (256, 256) matrices, with JAX's settings as they are.

    >>> matmul_error(jax.devices("cpu")[0], "float32") < 1e-5
    True
    """
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((_SIZE, _SIZE)).astype(jnp.dtype(dtype)) for _ in range(2))
    found = np.asarray(jax.jit(jnp.matmul)(*jax.device_put((a, b), device))).astype(np.float64)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def examine(results: Path = Path("out")) -> Examination:
    """Returns what was found on this machine: versions, devices, precision, extras, data, disk.

    Takes a second or two, most of it two small compilations per device.

    Args:
      results: the folder that results go to; a file is made there (or in the nearest folder above that exists) and
        removed again.

    >>> from rnngrad import doctor
    >>> doctor.examine().is_healthy
    True
    """
    asked = _asked()
    return Examination(
        (
            Row("python", platform.python_version(), "ok", ""),
            Row("system", f"{platform.platform()}, {_cpus()} CPUs, {_memory()}", "ok", ""),
            *_versions(asked),
            *_devices(),
            *_settings(),
            *_extras(asked),
            _data(),
            _results(results),
        )
    )


def _asked() -> tuple[Requirement, ...] | None:
    try:
        return requirements(metadata.requires("rnngrad") or [])
    except metadata.PackageNotFoundError:
        return None


def _cpus() -> int:
    """Those that this process may use, where the system says so."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # a system that does not say
        return "memory unknown"
    return f"{size / 2**30:.0f} GiB memory"


def _is_older(found: str, lowest: str) -> bool:
    """Compares the leading numbers of two versions: 0.10.0rc1 counts as 0.10.0."""

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]  # type: ignore[index]

    ours, theirs = numbers(found), numbers(lowest)
    width = max(len(ours), len(theirs))
    return ours + [0] * (width - len(ours)) < theirs + [0] * (width - len(theirs))


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions(asked: tuple[Requirement, ...] | None) -> Iterator[Row]:
    if asked is None:
        advice = 'versions and extras are unknown; install it: pip install "rnngrad" (or -e . in a checkout)'
        yield Row("rnngrad", "not installed as a package", "note", advice)
        return
    yield Row("rnngrad", metadata.version("rnngrad"), "ok", "")
    for package, lowest, extra in asked:
        if extra:
            continue
        found = _installed(package)
        if found is None:
            yield Row(package, "missing", "problem", f'pip install "{package}>={lowest}"')
        elif lowest and _is_older(found, lowest):
            yield Row(package, found, "problem", f'rnngrad needs {lowest} or newer: pip install "{package}>={lowest}"')
        else:
            yield Row(package, found, "ok", "")


def _devices() -> Iterator[Row]:
    try:
        backend, devices = jax.default_backend(), jax.devices()
    except (RuntimeError, AssertionError) as error:
        # what JAX_PLATFORMS names cannot be had; jax 0.10 says so by an AssertionError where only its plugin is missing
        asked = jax.config.values["jax_platforms"] or "any"
        advice = "unset JAX_PLATFORMS for what there is, or install the driver and jax's build for it"
        reason = " ".join(str(error).split()) or "JAX finds no such platform"
        yield Row("devices", f"none ({asked} was asked for): {reason}", "problem", advice)
        return
    is_idle_gpu = backend == "cpu" and Path("/proc/driver/nvidia/version").exists()
    advice = 'an NVIDIA driver is here, but JAX runs on the CPU: pip install "rnngrad[cuda]"' if is_idle_gpu else ""
    yield Row("default backend", backend, "note" if is_idle_gpu else "ok", advice)
    for device in devices:
        yield from _device(device)


def _device(device: jax.Device) -> Iterator[Row]:
    statistics = device.memory_stats() or {}
    size = f", {statistics['bytes_limit'] / 2**30:.0f} GiB for JAX" if "bytes_limit" in statistics else ""
    yield Row(f"{device}", f"{device.device_kind}{size}", "ok", "")
    if flushes_subnormals(device):
        advice = "an unscaled product of Jacobians ends at 1e-38; those of rnngrad are scaled and do not"
        yield Row(f"{device}: subnormals", "flushed to 0", "note", advice)
    else:
        yield Row(f"{device}: subnormals", "kept", "ok", "")
    for dtype, bound, advice in (
        (
            "float32",
            _FLOAT32_ERROR,
            "products round their inputs; rnngrad's chains ask for the highest precision, your own model can by "
            'jax.config.update("jax_default_matmul_precision", "highest")',
        ),
        ("bfloat16", _BFLOAT16_ERROR, "products are added up in bfloat16; long sums lose most of their digits"),
    ):
        error = matmul_error(device, dtype)
        is_exact = error < bound
        name = f"{device}: {dtype} matmul"
        if np.isfinite(error):
            value = f"relative error {error:.1e} against float64"
            yield Row(name, value, "ok" if is_exact else "note", "" if is_exact else advice)
        else:
            yield Row(name, "NaN or inf from finite matrices", "problem", "the device or its driver is broken")


def _settings() -> Iterator[Row]:
    is_wide = jax.dtypes.canonicalize_dtype("float64") == np.float64
    advice = "" if is_wide else 'float64 arrays become float32; jax.config.update("jax_enable_x64", True) changes that'
    yield Row("x64", "on" if is_wide else "off", "ok", advice)
    precision = jax.config.values["jax_default_matmul_precision"]
    meaning = f"of your own products; rnngrad's chains ask for {MATMUL_PRECISION!r} whatever it says"
    if precision is None:
        meaning = "the device's fastest: float32 on CPUs, TF32 on recent NVIDIA GPUs, bfloat16 on TPUs; " + meaning
    yield Row("matmul precision", precision or "default", "ok", meaning)
    cache = jax.config.values["jax_compilation_cache_dir"]
    advice = "" if cache else "JAX_COMPILATION_CACHE_DIR=FOLDER keeps compiled programs from one run to the next"
    yield Row("compilation cache", cache or "off", "ok" if cache else "note", advice)


def _extras(asked: tuple[Requirement, ...] | None) -> Iterator[Row]:
    extras: dict[str, list[Requirement]] = {}
    for one in asked or ():
        if one.extra and one.extra not in _CONTRIBUTORS:
            extras.setdefault(one.extra, []).append(one)
    for extra, needed in extras.items():
        found = {one.package: _installed(one.package) for one in needed}
        missing = [one.package for one in needed if found[one.package] is None]
        old = [
            f"{one.package} {version} (needs {one.lowest})"
            for one in needed
            if (version := found[one.package]) is not None and _is_older(version, one.lowest)
        ]
        there = ", ".join(f"{package} {version}" for package, version in found.items() if version is not None)
        wanting = "; ".join(
            f"{what}: {', '.join(which)}" for what, which in (("missing", missing), ("too old", old)) if which
        )
        advice = f'pip install "rnngrad[{extra}]"' if wanting else ""
        yield Row(f"extra {extra}", "; ".join(filter(None, (there, wanting))), "note" if wanting else "ok", advice)


def _data() -> Row:
    folder = os.environ.get("RNNGRAD_DATA")
    if not folder:
        advice = "texts are downloaded to a cache when asked for; RNNGRAD_DATA=FOLDER names a folder that has them"
        return Row("data", "RNNGRAD_DATA is not set", "ok", advice)
    found, absent = [], []
    for name in text.PUBLIC_FILES:
        try:
            text.load_text(name, data_dir=folder)
        except FileNotFoundError:
            absent.append(name)
        except ValueError as error:  # there, but not what it should be
            return Row("data", folder, "problem", str(error))
        else:
            found.append(name)
    if absent:
        advice = f"not in RNNGRAD_DATA: {', '.join(absent)}; downloaded to a cache when asked for"
        return Row("data", f"{folder}: {', '.join(found) or 'no text'}", "note", advice)
    return Row("data", f"{folder}: {', '.join(found)}", "ok", "")


def _results(folder: Path) -> Row:
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    shown = f"{folder}/" if nearest == folder.absolute() else f"{folder}/ (not there yet)"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Row("results", f"{shown}: {error.strerror}", "note", "experiments and figures need --out FOLDER here")
    return Row("results", f"{shown} can be written", "ok", "")


__all__ = [
    "Examination",
    "Requirement",
    "Row",
    "Status",
    "examine",
    "flushes_subnormals",
    "matmul_error",
    "requirements",
]
