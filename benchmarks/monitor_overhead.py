"""What the gradient-flow monitor adds to training, at its default interval.

``rg.training.fit`` with and without a monitor, same model, data and optimizer, at the size of a task (adding, T = 100)
and of Zaremba's small language model.  Both write JSON lines and TensorBoard events, into a temporary folder.  That
both end with the same weights, bit for bit, is asserted first.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnngrad as rg
from benchmarks.harness import Row, judged, milliseconds, ratio, timed

NUM_INTERVALS = 2
"""Three measurements, with the one at step 1: half as many again as a long run has."""


class Problem(NamedTuple):
    """What ``fit`` needs."""

    name: str
    model: Any
    loss: Callable[..., Any]
    batches: tuple[Any, ...]


def adding(num_steps: int, hidden_size: int, batch_size: int) -> Problem:
    """Returns the adding problem of an LSTM."""
    task = rg.tasks.adding(num_steps)
    model = rg.training.model([rg.cells.lstm(2, hidden_size)], 1)
    batches = tuple(task.batch(jax.random.key(seed), batch_size) for seed in range(4))
    loss = lambda output, batch: rg.losses.mse(output.outputs, batch.targets, batch.mask)
    return Problem(f"adding, (B, T, N) = {(batch_size, num_steps, hidden_size)}", model, loss, batches)


def language(num_steps: int, hidden_size: int, batch_size: int, vocabulary_size: int) -> Problem:
    """Returns a two-layer word model on random ids."""
    model = rg.training.model(
        [rg.cells.lstm(hidden_size, hidden_size) for _ in range(2)], vocabulary_size, vocabulary_size=vocabulary_size
    )
    shape = (num_steps + 1, batch_size)
    ids = [jax.random.randint(jax.random.key(seed), shape, 0, vocabulary_size, jnp.int32) for seed in range(4)]
    batches = tuple(rg.tasks.Batch(one[:-1], one[1:], jnp.ones(one[1:].shape)) for one in ids)
    loss = lambda output, batch: rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)
    size = (batch_size, num_steps, hidden_size, vocabulary_size)
    return Problem(f"language model, 2 layers, (B, T, N, V) = {size}", model, loss, batches)


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratio for both, over a few intervals of the monitor."""
    every = 10 if smoke else rg.training.Monitor().every
    problems = (
        (adding(10, 4, 2), language(5, 4, 2, 7)) if smoke else (adding(100, 128, 50), language(35, 200, 20, 10_000))
    )
    rows = []
    for problem in problems:
        optimizer = optax.adam(1e-3)
        start = rg.training.initial_state(problem.model, optimizer, jax.random.key(0), problem.batches[0].mask.shape[1])

        def train(monitor: Any, problem: Problem = problem, optimizer: Any = optimizer, start: Any = start) -> Any:
            with tempfile.TemporaryDirectory() as folder:
                logs = [rg.training.jsonl_log(Path(folder) / "log.jsonl"), rg.training.tensorboard_log(Path(folder))]
                fitted = rg.training.fit(
                    problem.model,
                    problem.loss,
                    optimizer,
                    start,
                    lambda step: problem.batches[step % len(problem.batches)],
                    num_steps=NUM_INTERVALS * every,
                    monitor=monitor,
                    logs=logs,
                )
            return fitted.state.params

        functions: dict[str, Callable[[], Any]] = {
            "with monitor": functools.partial(train, rg.training.Monitor(every=every)),
            "without": functools.partial(train, None),
        }
        both = [jax.tree.leaves(function()) for function in functions.values()]
        for one, other in zip(*both, strict=True):
            np.testing.assert_array_equal(one, other)
        timings = timed(functions, 2 if smoke else 3)
        details = {
            "steps": NUM_INTERVALS * every,
            "measurements": NUM_INTERVALS + 1,
            "dtype": "float32",
            "timings": milliseconds(timings),
        }
        what = f"time of training with the monitor / without, {problem.name}"
        rows.append(judged("monitor_overhead", what, ratio(timings, "with monitor", "without"), "≤ 1.05", details))
    return rows
