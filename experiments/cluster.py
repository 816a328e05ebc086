"""Many processes and many devices: how processes find one another, and how work is laid over devices.

Two kinds of work, two ways to be together:

* **Sweeps** (:func:`meet`).  Seeds, cells, lengths have nothing to say to one another.  The processes wait for each
  other at the start, through ``jax.distributed``, take their own devices, and part; from then on they share the folder
  of results and nothing else.  Whoever is killed takes nobody along, and a later process may join in.
* **Data-parallel training** (:func:`connect`).  One network, the batch split over all devices of all processes; here
  they stay connected, since every update adds up everybody's gradients.

Which process is which comes from ``--coordinator``: the address of process 0, or ``auto`` under Slurm, Open MPI,
Kubernetes and whatever else JAX detects by itself.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AUTO = "auto"
TIMEOUT = 300
"""Seconds for which the processes that came wait for the others."""
LOST = 30
"""Seconds of silence after which a process counts as lost, and those that are connected to it end as well."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of one run find one another; without any of it, this process is alone."""

    coordinator: str | None = None
    """Several processes: HOST:PORT of process 0, the same for all; or auto, under Slurm, Open MPI or Kubernetes."""
    num_processes: int | None = None
    """Processes in all; auto knows it."""
    process_id: int | None = None
    """This one, counted from 0; auto knows it."""


def check(processes: Processes) -> None:
    """Raises ValueError for what names no group of processes."""
    at, number, own = processes.coordinator, processes.num_processes, processes.process_id
    if at is None:
        for flag, value in (("--num-processes", number), ("--process-id", own)):
            if value is not None:
                raise ValueError(f"{flag}: expected --coordinator HOST:PORT beside it, found none")
        return
    if at == AUTO:
        return
    host, _, port = at.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator: expected HOST:PORT or {AUTO}, found {at}")
    if number is None or number < 1:
        raise ValueError(f"--num-processes: expected at least 1 beside --coordinator, found {number}")
    if own is None or not 0 <= own < number:
        raise ValueError(f"--process-id: expected 0 to {number - 1}, found {own}")


def connect(processes: Processes) -> None:
    """Joins this process to the others, for good: ``jax.devices()`` are then those of all of them.

    To be called before anything touches a device.  Does nothing for a process that is alone.

    Raises:
      ValueError: settings that name no group, nothing detected, or not all processes came.
    """
    check(processes)
    if processes.coordinator is None:
        return
    is_auto = processes.coordinator == AUTO
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    try:
        jax.distributed.initialize(
            coordinator_address=None if is_auto else processes.coordinator,
            num_processes=processes.num_processes,
            process_id=processes.process_id,
            initialization_timeout=TIMEOUT,
            heartbeat_timeout_seconds=LOST,
            shutdown_timeout_seconds=LOST,
        )
    except ValueError as error:
        raise ValueError(
            f"--coordinator {processes.coordinator}: expected a cluster that JAX detects, or HOST:PORT with "
            f"--num-processes and --process-id; found none ({error})"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--coordinator {processes.coordinator}: expected all processes within {TIMEOUT} s: {reason}"
        ) from error


def meet(processes: Processes) -> None:
    """Waits until all processes are there, and parts again: each then has its own devices and is on its own.

    A process of its own goes to the meeting: JAX keeps the number that it was given there, and a meeting that fails may
    end who takes part.

    Raises:
      ValueError: as for :func:`connect`.
    """
    check(processes)
    if processes.coordinator is None:
        return
    words = [sys.executable, "-m", "experiments.cluster", json.dumps(dataclasses.asdict(processes))]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        expected = "all" if processes.num_processes is None else f"all {processes.num_processes}"
        raise ValueError(
            f"--coordinator {processes.coordinator}: expected {expected} processes to meet within {TIMEOUT} s: "
            f"{said[-1]}"
        )
    # under a scheduler JAX chooses this process's share of the machine's GPUs
    visible = json.loads(done.stdout.splitlines()[-1])
    for name in _VISIBLE:
        jax.config.update(name, visible[name])


_VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")


def visible_devices() -> dict[str, str]:
    """Returns environment variables by which processes started by this one see the GPUs that it sees."""
    return {name.upper(): jax.config.values[name] for name in _VISIBLE}


def _go_to_meeting(words: str) -> None:
    try:
        connect(Processes(**json.loads(words)))
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps({name: jax.config.values[name] for name in _VISIBLE}), flush=True)
    jax.distributed.shutdown()


class OutOfMemoryError(MemoryError):
    """A device has not memory enough for so many rows at once."""

    def __init__(self, device: str, rows: int, fitting: int, needed: int | None) -> None:
        self.fitting = fitting
        """Rows at once that were found to fit; 0 if not even one does."""
        wants = "" if needed is None else f" ({needed / 1e9:.2g} GB each device)"
        fits = f"{fitting} fit" if fitting else "not even one fits"
        super().__init__(f"{device} is out of memory with {rows} at once{wants}: {fits}")


def free_memory(device: jax.Device) -> int | None:
    """Returns the bytes that a device can still give; None where nothing says so."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
    # a CPU's memory is the machine's, and a kernel that has none left kills without a word
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return 1024 * kilobytes["MemAvailable"] // jax.local_device_count()


def over_devices(function: Callable[..., Any], per_device: int) -> Callable[..., Any]:
    """Returns ``mapped(*arrays)``: the function of every row, spread over all devices of this process.

    Every device gets ``per_device`` rows at a time, never more or fewer (the last row is repeated to fill up), so that
    each runs one and the same program however many devices there are: results are the same to the last bit.

    Args:
      function: of one row of each array, traceable.
      per_device: rows that a device computes at once.

    Raises:
      OutOfMemoryError: from ``mapped``: a device has not memory enough; says how many rows at once fit.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("row",), devices=devices)
    by_row = PartitionSpec("row")
    # no check of what varies over devices: the function is of one row and starts its scans from constants
    spread = jax.jit(jax.shard_map(jax.vmap(function), mesh=mesh, in_specs=by_row, out_specs=by_row, check_vma=False))

    programs: dict[int, Any] = {}

    def blocks(arrays: tuple[Any, ...], size: int) -> Iterator[tuple[Any, int]]:
        """Yields rows for one run of all devices, and how many of them are asked for."""
        number, at_once = len(arrays[0]), size * len(devices)
        for start in range(0, number, at_once):
            chosen = np.minimum(np.arange(start, start + at_once), number - 1)
            yield jax.device_put([array[chosen] for array in arrays], NamedSharding(mesh, by_row)), number - start

    def compute(arrays: tuple[Any, ...], size: int, *, only_first: bool = False) -> Any:
        """The rows' results; MemoryError, with the bytes needed as far as they are known, if they do not fit."""
        done, needed = [], None
        try:
            for block, number in blocks(arrays, size):
                if size not in programs:
                    programs[size] = spread.lower(*block).compile()
                program = programs[size]
                sizes = program.memory_analysis()
                needed = sizes and sizes.temp_size_in_bytes + sizes.output_size_in_bytes
                free = free_memory(devices[0])
                if needed and free is not None and needed > free:
                    raise MemoryError(needed)
                done.append(jax.tree.map(lambda leaf, number=number: np.asarray(leaf)[:number], program(*block)))
                if only_first:
                    break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(needed) from error
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *done)

    def mapped(*arrays: Any) -> Any:
        try:
            return compute(arrays, per_device)
        except MemoryError as error:
            short = error
        fitting = per_device // 2
        while fitting:
            try:
                compute(arrays, fitting, only_first=True)
            except MemoryError:
                fitting //= 2
            else:
                break
        raise OutOfMemoryError(devices[0].device_kind, per_device, fitting, *short.args) from short

    return mapped


if __name__ == "__main__":
    _go_to_meeting(sys.argv[1])
