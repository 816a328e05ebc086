r"""The gradient-flow monitor for a loop that is not ours: two lines in a loop with Flax, Equinox or optax.

::

    watch = rg.watch(model, xs, log=rg.training.jsonl_log("flow.jsonl"), every=100)
    for step in range(1, num_steps + 1):
        state = train_step(state, batch)
        watch(step, state)

What is measured is defined in :mod:`rnngrad.training.monitor`, with these readings:

=====================  =================================================================================
layer                  one pass of one layer; a bidirectional layer is two, ``forward`` and ``backward``
lag                    in the order in which a pass runs: k steps after its own first one
last step e            of each sequence, the last one (in that order) whose state gets any gradient
L                      by default Σ_passes w · y[e] over the passes of the last layer, e the last step of each
=====================  =================================================================================

w is drawn once from N(0, 1), so the curve shows a typical read-out of the last step.  A loss of your own sees the
outputs of every step.  One that reads several steps feeds gradient in at each of them: its curve rises where they lie,
and shows no fading between them.

The weights are converted at every measurement, and the measurement itself is compiled once.  Between measurements a
call costs a comparison and a remainder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from rnngrad.interop import adapt
from rnngrad.interop.adapted import Adapted, LayerParams, Pass, apart, run, start, time_major
from rnngrad.training.logs import Log
from rnngrad.training.model import LayerTaps
from rnngrad.training.monitor import Flow, LayerFlow, Monitor, flow_record, layer_flow, log_norms, total_cotangents
from rnngrad.types import check_finite, describe, leaf_names
from rnngrad.unroll import Taps

OutputLoss = Callable[[Array], Array]
"""Maps the outputs of every step, (T, B, N), to a scalar."""


class _Finite(NamedTuple):
    """What a measurement found finite."""

    weights: LayerParams
    """Every leaf of every pass."""
    outputs: Array


def _by_pass(function: Callable[..., Any], *trees: Any) -> Any:
    """Maps over the passes within the layers."""
    return tuple(
        tuple(function(*of_pass) for of_pass in zip(*of_layer, strict=True)) for of_layer in zip(*trees, strict=True)
    )


def _zero_taps(adapted: Adapted, params: LayerParams, xs: Array) -> tuple[tuple[LayerTaps, ...], ...]:
    """Unlike ``training.zero_taps``, for cells that declare no shapes as well."""
    _, heard = jax.eval_shape(lambda params, xs: run(adapted, params, xs[:, 0]), params, xs)
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros((*xs.shape[:2], *leaf.shape), leaf.dtype), tree)

    def of_pass(one: Pass, weights: Any, inputs: Any) -> LayerTaps:
        preactivate = lambda weights, inputs: one.cell.preactivate(weights, start(one), inputs[0])
        state, z = jax.eval_shape(lambda: start(one)), jax.eval_shape(preactivate, weights, inputs)
        return LayerTaps(Taps(zeros(state), zeros(state), zeros(z)), zeros(state))

    return _by_pass(of_pass, adapted.layers, params, heard)


def _projection(adapted: Adapted, params: LayerParams, outputs: Array) -> Array:
    """The default loss: a fixed random projection of what each pass of the last layer gives at its last step."""
    last_layer = list(zip(adapted.layers[-1], params[-1], strict=True))
    widths = [
        jax.eval_shape(lambda w, one=one: one.cell.read(w, start(one)), weights).shape[-1]
        for one, weights in last_layer
    ]
    parts = jnp.split(outputs, np.cumsum(widths)[:-1].tolist(), axis=-1)
    ends = [part[0] if one.reverse else part[-1] for (one, _), part in zip(last_layer, parts, strict=True)]
    last = jnp.concatenate(ends, axis=-1)
    return jnp.sum(last @ jax.random.normal(jax.random.key(0), last.shape[-1:], last.dtype))


def _measure(adapted: Adapted, loss: OutputLoss | None, params: LayerParams, xs: Array) -> tuple[Flow, _Finite]:
    def of_taps(taps: Any) -> tuple[Array, Array]:
        one_sequence = lambda taps, xs: run(adapted, params, xs, taps=taps)[0]
        outputs = jax.vmap(one_sequence, in_axes=1, out_axes=1)(taps, xs)
        value = _projection(adapted, params, outputs) if loss is None else loss(outputs)
        if jnp.shape(value) != ():
            raise ValueError(
                f"loss: expected a scalar of the outputs, {describe(outputs)}, found shape {jnp.shape(value)}"
            )
        return value, outputs

    # what a cell without a split hears may be integers
    cotangents, outputs = jax.grad(of_taps, has_aux=True, allow_int=True)(_zero_taps(adapted, params, xs))

    def of_pass(one: Pass, through: LayerTaps) -> LayerFlow:
        if not one.has_split:
            through = through._replace(steps=through.steps._replace(z=()))
        # the direct path has no gradient for h: without a barrier the compiler spends seconds on norms of zeros
        through = jax.lax.optimization_barrier(through)
        has_gradient = log_norms(total_cotangents(through)) != -jnp.inf  # (T + 1, B)
        last = len(has_gradient) - 1 - jnp.argmax(jnp.flip(has_gradient, 0), axis=0)
        flow = layer_flow(through, jnp.where(jnp.any(has_gradient, axis=0), last, jnp.zeros_like(last)))
        return flow if one.has_split else flow._replace(direct_share=jnp.full_like(flow.direct_share, jnp.nan))

    flows = _by_pass(of_pass, adapted.layers, cotangents)
    is_finite = lambda leaf: jnp.all(jnp.isfinite(leaf))
    return Flow(sum(flows, start=())), _Finite(jax.tree.map(is_finite, params), is_finite(outputs))


def _note(one: Pass, weights_finite: Any, outputs_finite: Any, flow: LayerFlow) -> str:
    """What a reader of the numbers has to know; empty for nothing."""
    names = leaf_names(weights_finite)
    bad = [name or "params" for name, good in zip(names, jax.tree.leaves(weights_finite), strict=True) if not good]
    notes = [] if one.has_split else ["gates unknown: no direct share and no share by gate"]
    if bad:
        notes.append(f"NaN or inf in the weights: {', '.join(bad)}")
    elif not outputs_finite:
        notes.append("NaN or inf in the outputs")
    elif not math.isfinite(flow.log_retention[0]):
        notes.append("no finite gradient reaches this pass")
    return "; ".join(notes)


def _held(weights: Any) -> Any:
    """The tree of parameters within a TrainState; anything else as it is."""
    return weights.params if hasattr(weights, "params") and hasattr(weights, "opt_state") else weights


class Watch:
    """What :func:`watch` returns: call it in the loop, close it at the end or use it in a ``with`` statement."""

    def __init__(
        self,
        model: Any,
        xs: ArrayLike | None,
        *,
        logs: tuple[Log, ...],
        every: int,
        loss: OutputLoss | None,
        max_sequences: int,
        time_axis: int,
        state: Any,
        gates: Any,
    ) -> None:
        self._model, self._state, self._gates, self._loss, self._logs = model, state, gates, loss, logs
        self._every, self._max_sequences, self._time_axis = every, max_sequences, time_axis
        self._xs = None if xs is None else self._inputs(xs)
        if self._xs is not None:
            check_finite((), (), self._xs)
        self._adapted: Adapted | None = None
        self._measure: Any = None
        self._last_step: int | None = None
        self._is_closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """The passes that ``Flow.layers`` and the records list, ``("",)`` for a single one; known after the first call.

        Raises:
          ValueError: nothing has been measured yet.
        """
        if self._adapted is None:
            raise ValueError("watch.names: expected a measurement first, found none")
        return tuple(one.name for one in self._adapted.passes)

    def __call__(self, step: int, weights: Any, xs: ArrayLike | None = None) -> Flow | None:
        """Returns the measurement when it is time for one, and writes it to the logs; None otherwise.

        Args:
          step: updates done, a Python number (a number on the device would have to be waited for).
          weights: what holds the weights now: a module, a Flax TrainState, or a tree of parameters.
          xs: inputs to measure on, in place of those given to :func:`watch`; another shape compiles anew.

        Raises:
          ValueError: no inputs, weights of another model, a step that goes back, a watch that is closed.
        """
        if self._last_step is not None and step % self._every != 0:
            return None
        step = int(step)
        if self._is_closed:
            raise ValueError("watch: expected one that is open, found it closed")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step: expected one after {self._last_step}, the last one measured, found {step}")
        inputs = self._xs if xs is None else self._inputs(xs)
        if inputs is None:
            raise ValueError("xs: expected inputs to measure on, here or in rg.watch(model, xs), found none")
        weights = _held(weights)
        if self._adapted is None:
            # without the weights of now, which would be kept to the end
            self._adapted = apart(self._adapt(weights, inputs))._replace(params=())
            self._measure = jax.jit(functools.partial(_measure, self._adapted, self._loss))
        flow, finite = jax.device_get(self._measure(self._adapted.convert(weights), inputs))
        if self._last_step is None:
            for log in self._logs:
                # the first step of a loop is called 0 or 1; at any other it goes on from the one before
                log.start(None if step <= 1 else step - 1)
        self._last_step = step
        record = flow_record(step, flow, clip_fraction=math.nan)
        ones, good = self._adapted.passes, sum(finite.weights, start=())
        record["layers"] = [
            {"name": one.name, **layer, "note": _note(one, weights, finite.outputs, of_layer)}
            for one, layer, weights, of_layer in zip(ones, record["layers"], good, flow.layers, strict=True)
        ]
        for log in self._logs:
            log.write(record)
            log.flush()  # somebody else's loop may end without a close
        return flow

    def close(self) -> None:
        """Closes the logs; doing so again changes nothing."""
        self._is_closed = True
        for log in self._logs:
            log.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _adapt(self, weights: Any, xs: Array) -> Adapted:
        if isinstance(self._model, Adapted):
            return self._model
        return adapt(self._model, weights, state=self._state, example=xs[0, 0], gates=self._gates)

    def _inputs(self, xs: ArrayLike) -> Array:
        return time_major(xs, self._time_axis)[:, : self._max_sequences]


def watch(
    model: Any,
    xs: ArrayLike | None = None,
    *,
    log: Log | Sequence[Log] = (),
    every: int = Monitor().every,
    loss: OutputLoss | None = None,
    max_sequences: int = Monitor().max_sequences,
    time_axis: int = 0,
    state: Any = None,
    gates: Any = None,
) -> Watch:
    """Returns the monitor of a loop of your own; ``watch(step, weights)`` in it measures and logs.

    Records are those of ``rg.training.fit``, ``kind`` "flow", so that whatever reads those reads these; every layer
    also has its ``name`` and a ``note``, which says why numbers are missing.  ``clip_fraction`` is empty, since nobody
    counts.  A log starts anew when the first step is 0 or 1, and else goes on from the step before.

    Args:
      model: a recurrent module of Flax or Equinox, or anything else that ``rg.interop.adapt`` takes.  Of a module whose
        weights live elsewhere (Flax linen), the first call takes the shapes from its weights.
      xs: inputs to measure on, (T, B, D), or (T, D) for one sequence; None when every call brings its own.
      log: where records go, one or several; none when the returned measurements are enough.
      every: steps between measurements; the first call measures as well.
      loss: maps the outputs of every step, time-major (T, B, N), to a scalar; None for a random projection of the last
        step.  It is traced once: arrays it closes over keep the values that they have then.
      max_sequences: measure the first ones of the batch only.
      time_axis: 1 when xs are (B, T, D).
      state: of a step function, the state of one sequence before the first step; see ``rg.interop.adapt``.
      gates: of a step function, the function that computes its pre-activations; see there.

    Raises:
      ValueError: numbers out of range, inputs of another shape or with NaN.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.gru(3, 5)
    >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (20, 4, 3))
    >>> watch = rg.watch(cell, xs, every=10)
    >>> for step in range(1, 31):
    ...     params = jax.tree.map(lambda w: 0.999 * w, params)
    ...     flow = watch(step, params)
    ...     if flow is not None:
    ...         print(step, flow.layers[0].log_retention.shape)
    1 (21,)
    10 (21,)
    20 (21,)
    30 (21,)
    """
    for name, value in {"every": every, "max_sequences": max_sequences}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    logs = (log,) if isinstance(log, Log) else tuple(log)
    return Watch(
        model,
        xs,
        logs=logs,
        every=every,
        loss=loss,
        max_sequences=max_sequences,
        time_axis=time_axis,
        state=state,
        gates=gates,
    )
