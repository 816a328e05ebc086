"""What every task gives: a batch, and the task itself.

A batch is time-major, T steps of B sequences, with a target for every step and a mask that is 1 where the loss counts.
Where the mask is 0 the target is 0 and means nothing.

A task is static and hashable, like a cell: a name, the sizes a network needs, the loss a predictor pays that remembers
nothing, and one pure function from a key to a batch.  That loss is known in closed form for every task here; a network
that has learned anything is below it.

Floats are float32 and ids int32, whatever the default dtype; cast ``batch.inputs`` for a cell of another dtype.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key


class Batch(NamedTuple):
    """T steps of B sequences."""

    inputs: Array
    """Float (T, B, D), or int32 ids (T, B)."""
    targets: Array
    """Classes, int32 (T, B), or values, float (T, B, K)."""
    mask: Array
    """Float (T, B): 1 where the loss counts, else 0."""


@runtime_checkable
class BatchFn(Protocol):
    """Draws B sequences from a key; ``batch_size`` is a static number."""

    def __call__(self, key: Key[Array, ""], batch_size: int) -> Batch: ...


class Task(NamedTuple):
    """A task: where batches come from, and what a network for them looks like.

    Functions compare by identity, so build a task once and keep it.
    """

    name: str
    input_size: int
    """D of float inputs; for ids the number of channels that they fill as one-hot vectors."""
    output_size: int
    """K: classes, or values of the target."""
    vocabulary_size: int | None
    """Number of different ids, None for float inputs."""
    loss: str
    """``"mse"`` or ``"cross_entropy"``: mean over the steps where the mask is 1; cross-entropy in nats."""
    baseline: float
    """This loss of the best predictor that remembers nothing, in closed form."""
    batch: BatchFn
    """``batch(key, batch_size)``; pure, and the same under ``jax.jit`` with ``static_argnums=1``."""


def check_at_least(owner: str, what: str, found: int, least: int) -> None:
    """Raises ValueError unless the size ``found`` is at least ``least``."""
    if found < least:
        raise ValueError(f"{owner}: expected {what} of at least {least}, found {found}")


def last_step_only(
    inputs: Float[Array, "T B D"] | Int32[Array, "T B"], answers: Int32[Array, " B"] | Float[Array, "B K"]
) -> Batch:
    """Returns the batch whose loss counts at the last step alone, where the targets are ``answers``."""
    steps = inputs.shape[:1]
    targets = jnp.zeros(steps + answers.shape, answers.dtype).at[-1].set(answers)
    mask = jnp.zeros(inputs.shape[:2], jnp.float32).at[-1].set(1.0)
    return Batch(inputs, targets, mask)
