"""Training for claims about training: one network after the other, whole stretches of updates in one compiled scan.

``rg.training.fit`` is for a long run that must survive anything: it goes back to the host after every update, writes
records and checkpoints.  A claim about training needs dozens of short runs of small networks, seed by seed, where the
host would take longer than the update.  Here ``eval_every`` updates are one program, and the unit that is kept when a
run is interrupted is the finished trial (:func:`experiments.command.measure`).

The update is the library's, ``rg.training.train_step``: a step that is not finite changes nothing and ends the trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

import rnngrad as rg

EVALUATED = "evaluation"
"""Dimension of what is measured every ``eval_every`` updates, the first time before the first update."""


class Trial(NamedTuple):
    """One trained network; E evaluations."""

    updates: np.ndarray
    """Updates done at each evaluation, (E,); 0 first."""
    measured: dict[str, np.ndarray]
    """What ``measure`` returned at each evaluation, with leading axis E; NaN after a trial that ended early."""
    train_loss: np.ndarray
    """Mean loss of the updates since the evaluation before, (E,); NaN at the first one."""
    grad_norm: np.ndarray
    """Mean global norm of their gradients before clipping, (E,)."""
    clip_fraction: np.ndarray
    """Share of these updates that were clipped, (E,)."""
    failed_at: int
    """The update, counted from 1, whose loss, gradient or weights were not finite; −1 for none."""
    params: Any
    """After the last update; after a failed one, those before it."""
    snapshots: list[Any]
    """Parameters at each evaluation, when asked for."""


Measure = Callable[[Any, jax.Array], Mapping[str, Any]]
"""measure(params, key) -> numbers or arrays by name, traceable; the key is the same at every evaluation of a trial."""


class Trainer:
    """Trains networks of one kind; compiles once for all seeds, and for all ways to draw the first weights.

    Args:
      model: the model, see ``rg.training.model``.
      loss: maps (output, batch) to a scalar.
      optimizer: an optax optimizer.
      batch_at: maps (key, step) to the batch of an update, traceable and pure; the key is the trial's.
      measure: what an evaluation measures.
      batch_size: B, of the initial state.
      penalty: see ``rg.training.train_step``.
      restart_at: maps the step to whether the memory starts anew, traceable; None: always.
    """

    def __init__(
        self,
        model: rg.training.Model,
        loss: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        batch_at: Callable[[jax.Array, jax.Array], Any],
        measure: Measure,
        *,
        batch_size: int,
        penalty: Callable[..., Any] | None = None,
        restart_at: Callable[[jax.Array], Any] | None = None,
    ) -> None:
        self._model, self._optimizer, self._batch_size = model, optimizer, batch_size
        self._measure = jax.jit(measure)
        step = rg.training.train_step(model, loss, optimizer, penalty=penalty)

        def stretch(key, state, steps):
            def one(state, index):
                restart = jnp.asarray(True if restart_at is None else restart_at(index))
                return step(state, batch_at(key, index), restart)

            return jax.lax.scan(one, state, steps)

        self._stretch = jax.jit(stretch)

    def run(
        self,
        key: jax.Array,
        *,
        updates: int,
        eval_every: int,
        params: Any = None,
        until: Callable[[Mapping[str, np.ndarray]], bool] | None = None,
        keep_snapshots: bool = False,
    ) -> Trial:
        """Returns a trained network.

        Args:
          key: draws weights, batches and what is measured, each from a stream of its own.
          updates: updates at the most, a multiple of ``eval_every``.
          eval_every: updates between evaluations.
          params: weights to start from, instead of those that the model draws.
          until: given what an evaluation measured, whether the trial may end; what is not reached is NaN.
          keep_snapshots: keep the parameters of every evaluation.

        Raises:
          ValueError: ``updates`` that are no multiple of ``eval_every``.
        """
        if updates < 1 or eval_every < 1 or updates % eval_every:
            raise ValueError(f"updates: expected a multiple of eval_every = {eval_every}, found {updates}")
        key_init, key_batches, key_measure = jax.random.split(key, 3)
        state = rg.training.initial_state(self._model, self._optimizer, key_init, self._batch_size)
        if params is not None:
            # dtypes as initial_state leaves them: a weak one would compile the stretch a second time
            opt_state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), self._optimizer.init(params))
            state = state._replace(params=params, opt_state=opt_state)
        at = np.arange(0, updates + 1, eval_every)
        nothing = np.full(len(at), np.nan)
        train_loss, grad_norm, clip_fraction = nothing.copy(), nothing.copy(), nothing.copy()
        measured = [jax.device_get(self._measure(state.params, key_measure))]
        snapshots = [state.params]
        failed_at = -1
        for index, start in enumerate(at[:-1].tolist(), start=1):
            if until is not None and until(measured[-1]):
                break
            state, metrics = self._stretch(key_batches, state, start + jnp.arange(eval_every))
            metrics = jax.device_get(metrics)
            if not metrics.is_finite.all():
                failed_at = start + int(np.argmin(metrics.is_finite)) + 1
                break
            train_loss[index], grad_norm[index] = metrics.loss.mean(), metrics.grad_norm.mean()
            clip_fraction[index] = metrics.clipped.mean()
            measured.append(jax.device_get(self._measure(state.params, key_measure)))
            snapshots.append(state.params)
        missing = len(at) - len(measured)
        filled = {
            name: np.concatenate(
                [np.stack([np.asarray(m[name], float) for m in measured]), np.full((missing, *np.shape(value)), np.nan)]
            )
            for name, value in measured[0].items()
        }
        return Trial(
            at, filled, train_loss, grad_norm, clip_fraction, failed_at, state.params,
            snapshots if keep_snapshots else [],
        )  # fmt: skip


def first_reached(updates: np.ndarray, reached: np.ndarray) -> float:
    """Returns the number of updates at the first evaluation at which something is true; NaN if never.

    >>> import numpy as np
    >>> first_reached(np.array([0, 100, 200]), np.array([False, True, True]))
    100.0
    """
    return float(updates[int(np.argmax(reached))]) if np.any(reached) else float("nan")


def history(trial: Trial, dims: Mapping[str, Sequence[str]] | None = None) -> xr.Dataset:
    """Returns the trial's curves as a dataset over the coordinate ``evaluation`` (in updates).

    Args:
      trial: the trial.
      dims: names of the axes behind the first one, for what was measured as an array.
    """
    names = dims or {}
    dataset = xr.Dataset(
        {
            **{name: ((EVALUATED, *names.get(name, ())), values) for name, values in trial.measured.items()},
            "train_loss": (EVALUATED, trial.train_loss),
            "grad_norm": (EVALUATED, trial.grad_norm),
            "clip_fraction": (EVALUATED, trial.clip_fraction),
            "failed_at": ((), trial.failed_at),
        }
    )
    return dataset.assign_coords({EVALUATED: trial.updates})
