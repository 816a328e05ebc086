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
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AUTO = "auto"
TIMEOUT = 120
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
      ValueError: settings that name no group, or nothing detected.
      ConnectionError: not all processes came.
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
        raise ConnectionError(
            f"--coordinator {processes.coordinator}: expected all processes within {TIMEOUT} s: {reason}"
        ) from error


def meet(processes: Processes) -> str | None:
    """Waits until all processes are there, and parts again: each then has its own devices and is on its own.

    Returns a sentence if not all of them came, or one was killed while they met: a sweep goes on without.

    A process of its own goes to the meeting: JAX keeps the number that it was given there, and a meeting that fails may
    end who takes part.

    Raises:
      ValueError: settings that name no group, or nothing detected.
    """
    check(processes)
    if processes.coordinator is None:
        return None
    words = [sys.executable, "-m", "experiments.cluster", json.dumps(dataclasses.asdict(processes))]
    # its input stays open as long as this process lives
    with subprocess.Popen(
        words, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as gone:
        assert gone.stdout is not None
        assert gone.stderr is not None
        answer, said = gone.stdout.read(), gone.stderr.read()
    if gone.returncode == _NOT_DETECTED:
        raise ValueError(said.splitlines()[-1])
    if gone.returncode:
        return (
            f"--coordinator {processes.coordinator}: not all processes came to meet within {TIMEOUT} s; this one goes "
            "on without"
        )
    # under a scheduler JAX chooses this process's share of the machine's GPUs
    visible = json.loads(answer.splitlines()[-1])
    for name in _VISIBLE:
        jax.config.update(name, visible[name])
    return None


_ROOT = Path(__file__).resolve().parent.parent
_NOT_DETECTED = 3
_VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")


def visible_devices() -> dict[str, str]:
    """Returns environment variables by which processes started by this one see the GPUs that it sees."""
    return {name.upper(): jax.config.values[name] for name in _VISIBLE}


def _go_to_meeting(words: str) -> None:
    def leave_with_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        connect(Processes(**json.loads(words)))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(_NOT_DETECTED)
    print(json.dumps({name: jax.config.values[name] for name in _VISIBLE}), flush=True)
    jax.distributed.shutdown()


class OutOfMemoryError(RuntimeError):
    """A device has not memory enough for so many rows at once."""

    def __init__(self, device: str, rows: int, fitting: int, needed: int | None) -> None:
        self.fitting = fitting
        """Rows at once that were found to fit; 0 if not even one does."""
        wants = "" if needed is None else f" ({needed / 2**20:,.1f} MiB each device)"
        fits = f"{fitting} fit" if fitting else "not even one fits"
        super().__init__(f"{device} is out of memory with {rows} at once{wants}: {fits}")


class _TooLargeError(Exception):
    """With the bytes needed, None where nothing says so."""

    def __init__(self, needed: int | None) -> None:
        self.needed = needed
        super().__init__()


_EXHAUSTED = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED")
"""How the runtimes of CPU and GPU say that memory is out."""


def _number(file: str) -> int | None:
    """Returns the number in a file of the kernel's; None where there is none."""
    try:
        return int(Path(file).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such limit, or "max"
        return None


def free_memory(device: jax.Device) -> int | None:
    """Returns the bytes that a device can still give; None where nothing says so.

    Of a CPU this is the machine's memory, or what a container or a scheduler leaves of it, shared among the devices:
    where it ends the kernel kills without a word.
    """
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return int(stats["bytes_limit"]) - int(stats["bytes_in_use"]) if "bytes_limit" in stats else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    free = [1024 * kilobytes["MemAvailable"]]
    folder = "/sys/fs/cgroup"
    for limit, used in (
        (f"{folder}/memory.max", f"{folder}/memory.current"),
        (f"{folder}/memory/memory.limit_in_bytes", f"{folder}/memory/memory.usage_in_bytes"),
    ):
        most, now = _number(limit), _number(used)
        if most is not None and now is not None:
            free.append(most - now)
    return min(free) // jax.local_device_count()


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
        """Returns the rows' results; raises _TooLargeError if they do not fit."""
        done, needed = [], None
        try:
            for block, number in blocks(arrays, size):
                if size not in programs:
                    programs[size] = spread.lower(*block).compile()
                program = programs[size]
                sizes = program.memory_analysis()
                needed = sizes and sizes.temp_size_in_bytes + sizes.output_size_in_bytes
                free = [free_memory(device) for device in devices]
                if needed and any(each is not None and needed > each for each in free):
                    raise _TooLargeError(needed)
                done.append(jax.tree.map(lambda leaf, number=number: np.asarray(leaf)[:number], program(*block)))
                if only_first:
                    break
        except jax.errors.JaxRuntimeError as error:
            if not any(word in str(error) for word in _EXHAUSTED):
                raise
            raise _TooLargeError(needed) from error
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *done)

    def mapped(*arrays: Any) -> Any:
        try:
            return compute(arrays, per_device)
        except _TooLargeError as error:
            short = error
        fitting = per_device // 2
        while fitting:
            try:
                compute(arrays, fitting, only_first=True)
            except _TooLargeError:
                fitting //= 2
            else:
                break
        raise OutOfMemoryError(devices[0].device_kind, per_device, fitting, short.needed) from short

    return mapped


if __name__ == "__main__":
    _go_to_meeting(sys.argv[1])
