"""Data-parallel training: one network, every batch split over the devices of one process or of several.

::

    L(θ)    = loss of the whole batch of B sequences, of which each of n devices holds B / n
    ∂L/∂θ   = a sum over sequences, so over devices, which the compiler adds up

Weights, optimizer state and the memory between windows lie on every device, alike.  The program is that of one device,
for arrays whose batch axis is laid over n of them: a mean over tokens is over those of the whole batch, dropout draws
the same numbers, and the results are those of one device up to the order in which the batch is summed.

Every process draws the whole batch, which is a pure function of the step, and keeps its own devices' sequences: no data
are sent.  Whatever one process alone should do or decide (evaluation, early stop, checkpoints, logs) is done in process
0, and the others are told (:func:`ask_first`), of its errors too: processes that disagreed would wait for ever.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class UnevenBatchError(ValueError):
    """The sequences of a batch cannot be shared out evenly over the devices."""


class FirstProcessError(RuntimeError):
    """Process 0 ended with an error, which is its message; raised in the others."""


class Layout:
    """Where training lies: on ``devices``, or where JAX puts it (None)."""

    def __init__(self, devices: Sequence[jax.Device] | None) -> None:
        self.devices = None if devices is None else tuple(devices)
        processes = {device.process_index for device in self.devices or ()}
        self.is_shared = bool(processes) and _is_shared(processes, jax.process_count())
        """Several processes train together."""
        self.is_first = not self.is_shared or jax.process_index() == 0
        """This process writes and decides."""

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns the sharding of an array of which the axis named "data" is split over the devices."""
        return NamedSharding(Mesh(np.array(self.devices), ("data",)), PartitionSpec(*axes))

    def check(self, batch_size: int) -> None:
        """Raises UnevenBatchError when so many sequences cannot be split evenly."""
        number = 1 if self.devices is None else len(self.devices)
        if batch_size % number:
            below = batch_size - batch_size % number
            nearest = f"{below} or {below + number}" if below else str(number)
            raise UnevenBatchError(
                f"batch size: expected a multiple of the {number} devices ({nearest}), found {batch_size}"
            )

    def on_all(self, tree: Any) -> Any:
        """Returns the tree with every array whole on every device."""
        return _lay(tree, self.sharding())

    def split(self, batch: Any) -> Any:
        """Returns a batch, time-major, with its sequences split over the devices."""
        for leaf in jax.tree.leaves(batch):
            self.check(leaf.shape[1])
        return _lay(batch, self.sharding(None, "data"))

    def own(self, tree: Any) -> Any:
        """Returns this process's copy of a tree that is whole on every device, as arrays of one device."""
        return tree if self.devices is None else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def ask(self, answer: Callable[[], Any]) -> Any:
        """Returns what ``answer`` returns; of processes that train together, in the first one."""
        return ask_first(answer) if self.is_shared else answer()


def _is_shared(processes: set[int], in_all: int) -> bool:
    if 1 < len(processes) < in_all:
        raise ValueError(
            f"devices: expected those of one process or of all {in_all}, found those of processes {sorted(processes)}"
        )
    return len(processes) > 1


def _lay(tree: Any, sharding: NamedSharding) -> Any:
    """Returns the tree laid over devices; each process sends its own devices' parts of what it has whole."""

    def laid(leaf: Any) -> Any:
        array = jnp.asarray(leaf)
        if array.sharding == sharding:
            return array
        parts = sharding.addressable_devices_indices_map(array.shape)
        return jax.make_array_from_single_device_arrays(
            array.shape, sharding, [jax.device_put(array[part], device) for device, part in parts.items()]
        )

    return jax.tree.map(laid, tree)


def ask_first(answer: Callable[[], Any]) -> Any:
    """Returns what ``answer`` returns in process 0, in every process; it is called there only.

    All processes of the program have to ask, in the same order.  A process that is alone just calls it.

    Args:
      answer: returns JSON values; where a process is alone, anything.

    Raises:
      FirstProcessError: it raised an error in process 0, where that error itself is raised.

    >>> import rnngrad as rg
    >>> rg.training.ask_first(lambda: {"loss": 0.5})
    {'loss': 0.5}
    """
    if jax.process_count() == 1:
        return answer()
    return json.loads(bytes(bytes_of_first(lambda: json.dumps(answer()).encode())))


_BLOCK = 4096
"""Bytes of a message that go without a second one; most messages are shorter, and all of one size compile once."""
_ANSWER_WITHIN = 24 * 3600
"""Seconds: an evaluation or a checkpoint may last long; that process 0 has died is noticed by JAX's heartbeat."""
_barriers = itertools.count()


def bytes_of_first(answer: Callable[[], bytes]) -> np.ndarray:
    """Returns the bytes that ``answer`` returns in process 0, in every process."""
    from orbax.checkpoint import multihost  # here, because `import rnngrad` does without

    error: Exception | None = None
    message, is_error = b"", 0
    if jax.process_index() == 0:
        try:
            message = answer()
        except Exception as caught:
            error, message, is_error = caught, (str(caught) or type(caught).__name__).encode(), 1
    # collectives give up waiting after some seconds on a CPU, this does not
    everybody = set(range(jax.process_count()))
    multihost.sync_global_processes(f"rnngrad.training.{next(_barriers)}", timeout=_ANSWER_WITHIN, processes=everybody)
    head = np.array([len(message), is_error], np.int64).view(np.uint8)
    whole = np.concatenate([head, np.frombuffer(message, np.uint8)])
    first = np.zeros(_BLOCK, np.uint8)
    first[: min(len(whole), _BLOCK)] = whole[:_BLOCK]
    first = np.asarray(multihost_utils.broadcast_one_to_all(first))
    length, is_error = first[: head.nbytes].view(np.int64).tolist()
    told = first[head.nbytes :][:length]
    if length > len(told):
        rest = whole[_BLOCK:] if jax.process_index() == 0 else np.zeros(length - len(told), np.uint8)
        told = np.concatenate([told, np.asarray(multihost_utils.broadcast_one_to_all(rest))])
    if error is not None:
        raise error
    if is_error:
        raise FirstProcessError(f"process 0: {bytes(told).decode()}")
    return told
