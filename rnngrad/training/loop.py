"""One training loop: a jitted step, evaluation, early stop, checkpoints, logs, and the gradient-flow monitor.

::

    L(θ)        = loss(model.apply(θ, memory, inputs), batch) + penalty(θ, memory, batch)
    θ, optimizer = optax.apply_updates(θ, optimizer.update(∂L/∂θ))
    memory      = the final state, for the next window of the same text; no gradient goes back through it
                  (truncated BPTT: Williams & Peng 1990, as Zaremba et al. 2014, arXiv 1409.2329, train on text)

Data are a pure function of the step, ``batch_at(step)``, so that a resumed run sees what an undisturbed one would have
seen; with the state of a checkpoint it then repeats it to the last bit, records included.

The host never waits for a single step: metrics stay on the device and are fetched every ``log_every`` steps.  A step
whose loss, gradient or new weights are not finite changes nothing, and neither do those that were sent after it: what
is left is the state just before it, from which the report is made.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32, Key

from rnngrad.training.checkpoints import Checkpoints, Restored, pack, unpack
from rnngrad.training.data_parallel import Layout, bytes_of_first
from rnngrad.training.logs import Log
from rnngrad.training.model import Model, ModelParams
from rnngrad.training.monitor import (
    Flow,
    Monitor,
    flow_record,
    gradient_flow,
    log_norms,
    tap_cotangents,
    total_cotangents,
)

Loss = Callable[..., Any]
"""loss(output, batch) -> scalar."""
Penalty = Callable[..., Any]
"""penalty(params, state, batch) -> scalar."""


class TrainState(NamedTuple):
    """Everything that the next step needs."""

    step: Int32[Array, ""]
    """Updates done."""
    params: ModelParams
    opt_state: Any
    memory: tuple[Any, ...]
    """States at the end of the window before, layer by layer."""
    key: Key[Array, ""]
    """For dropout; the step is folded in."""
    failed: Bool[Array, ""]
    """The last step had a loss, gradient or new weights that are not finite; the state is the one before it."""


class Metrics(NamedTuple):
    """What one step reports, on the device."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    clipped: Bool[Array, ""]
    """The optimizer's clipping counted this step."""
    is_finite: Bool[Array, ""]
    """Loss with penalty, gradient and new weights are."""


class Progress(NamedTuple):
    """What a progress bar needs."""

    step: int
    num_steps: int
    record: Mapping[str, Any] | None
    """The last "train" record of this sitting."""
    evaluation: Mapping[str, Any] | None
    """The last evaluation."""


class Fitted(NamedTuple):
    """What a training run returns."""

    state: TrainState
    best_params: ModelParams
    """Those of the best evaluation; without evaluation, the last ones."""
    best_loss: float
    """inf without evaluation."""
    best_step: int
    evaluations: list[dict[str, Any]]
    """Records of all evaluations, those before a resume included."""
    reason: str
    """"done", "early stop" or "asked to stop"."""
    resumed_from: int | None
    seconds: float
    """Wall time of all sittings; of one that was interrupted, up to its last checkpoint."""


class NonFiniteLossError(ArithmeticError):
    """A loss, a gradient or the weights made from it were NaN or infinite; training stopped before it did harm."""

    def __init__(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float,
        first_nonfinite_time: int | None,
        log_gradient_norms: np.ndarray,
        checkpoint: str | None,
    ) -> None:
        self.step = step
        """The update that failed, counted from 1; its batch is ``batch_at(step - 1)``."""
        self.loss, self.grad_norm = loss, grad_norm
        self.first_nonfinite_time = first_nonfinite_time
        """First time step whose states or outputs are not finite; None when all are."""
        self.log_gradient_norms = log_gradient_norms
        """ln ‖∂L/∂s‖ at the states after time steps 0 … T − 1, over batch and layers; NaN or inf where not finite."""
        # NaN and inf exceed every number; of several, the one nearest to the loss, where the trouble came in
        order = np.where(np.isnan(log_gradient_norms), np.inf, log_gradient_norms)
        self.largest_gradient_time = int(len(order) - 1 - np.argmax(order[::-1]))
        self.checkpoint = checkpoint
        """Folder of the last checkpoint, None when there is none."""
        forward = (
            "all states and outputs are finite"
            if first_nonfinite_time is None
            else f"states or outputs are not finite from time step {first_nonfinite_time} on"
        )
        at = float(np.exp(log_gradient_norms[self.largest_gradient_time]))
        # an infinite learning rate or a penalty, say
        outside = "" if not math.isfinite(loss + grad_norm) else ", but the penalty or the new weights are not finite"
        super().__init__(
            f"update {step}: loss {loss:g}, gradient norm {grad_norm:g}{outside}; {forward}; the largest gradient by "
            f"time step, {at:g}, is at {self.largest_gradient_time} of 0 … {len(order) - 1}; last good checkpoint: "
            f"{checkpoint or 'none'}"
        )


def initial_state(
    model: Model, optimizer: optax.GradientTransformation, key: Key[Array, ""], batch_size: int
) -> TrainState:
    """Returns the state before the first step.

    Args:
      model: the model.
      optimizer: an optax optimizer, with schedule and clipping.
      key: for the weights and for dropout.
      batch_size: B.

    >>> import jax, optax
    >>> import rnngrad as rg
    >>> net = rg.training.model([rg.cells.gru(3, 5)], 2)
    >>> int(rg.training.initial_state(net, optax.adam(1e-3), jax.random.key(0), 4).step)
    0
    """
    key_params, key_dropout = jax.random.split(key)
    params = model.init(key_params)
    # some optimizers start from numbers of weak dtype, which the first step makes strong: the second would compile anew
    strong = lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.tree.map(strong, optimizer.init(params)),
        memory=model.init_state((batch_size,)),
        key=key_dropout,
        failed=jnp.zeros((), bool),
    )


def _num_clipped(opt_state: Any) -> Any:
    """The count of ``rg.remedies.clip_by_global_norm`` within an optimizer, 0 when it is not part of it."""
    found = [value for _, value in optax.tree.get_all_with_path(opt_state, "num_clipped")]
    return sum(found, start=jnp.zeros((), jnp.int32))


def _memory(model: Model, state: TrainState, restart: Array) -> tuple[Any, ...]:
    fresh = model.init_state(jax.tree.leaves(state.memory)[0].shape[:-1])
    return jax.tree.map(functools.partial(jnp.where, restart), fresh, state.memory)


@functools.lru_cache(maxsize=8)
def _jitted_step(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    penalty: Penalty | None,
    devices: tuple[jax.Device, ...] | None,
) -> Any:
    """The same function for the same parts, so that a second run of them compiles nothing."""

    def objective(params, memory, batch, key):
        output = model.apply(params, memory, batch.inputs, key=key if model.dropout else None)
        value = loss(output, batch)
        whole = value if penalty is None else value + penalty(params, memory, batch)
        return whole, (value, output.final)

    layout = Layout(devices)

    def step(state: TrainState, batch: Any, restart: Array) -> tuple[TrainState, Metrics]:
        memory = _memory(model, state, restart)
        if devices is not None:
            memory = jax.lax.with_sharding_constraint(memory, layout.sharding("data"))
        key = jax.random.fold_in(state.key, state.step)
        (whole, (value, final)), grads = jax.value_and_grad(objective, has_aux=True)(state.params, memory, batch, key)
        # the ascent direction of a complex weight is the conjugate of what jax.grad returns
        grads = jax.tree.map(jnp.conj, grads)
        norm = optax.tree.norm(grads)
        # optax leaves to JAX which dtype comes of a float and a count, which strict settings refuse
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        weights = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
        is_finite = functools.reduce(jnp.logical_and, weights, jnp.isfinite(whole) & jnp.isfinite(norm))
        goes_on = is_finite & ~state.failed
        new = state._replace(step=state.step + 1, params=params, opt_state=opt_state, memory=final)
        kept = jax.tree.map(functools.partial(jnp.where, goes_on), new, state)
        clipped = _num_clipped(opt_state) > _num_clipped(state.opt_state)
        return kept._replace(failed=~goes_on), Metrics(value, norm, clipped, is_finite)

    if devices is None:
        return jax.jit(step, donate_argnums=0)
    whole, split = layout.sharding(), layout.sharding(None, "data")
    return jax.jit(step, donate_argnums=0, in_shardings=(whole, split, whole), out_shardings=whole)


def train_step(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    penalty: Penalty | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[TrainState, Any, Array], tuple[TrainState, Metrics]]:
    """Returns the jitted ``step(state, batch, restart) -> (state, metrics)``; it gives the buffers of ``state`` away.

    Args:
      model: the model.
      loss: maps (output, batch) to a scalar.
      optimizer: an optax optimizer.
      penalty: maps (params, state, batch) to a scalar that is added to the loss, and not reported as loss.
      devices: of one process or of all; the sequences of every batch are split over them, and state and metrics come
        back whole on each (:mod:`rnngrad.training.data_parallel`).  None: one device.

    Raises:
      UnevenBatchError: from the step: the batch does not split evenly over the devices.

    ``restart`` is a bool array: the memory starts anew instead of going on from the window before.

    >>> import jax, optax
    >>> import rnngrad as rg
    >>> net, task = rg.training.model([rg.cells.gru(2, 5)], 1), rg.tasks.adding(20)
    >>> step = rg.training.train_step(
    ...     net, lambda output, batch: rg.losses.mse(output.outputs, batch.targets, batch.mask), optax.sgd(0.1)
    ... )
    >>> state = rg.training.initial_state(net, optax.sgd(0.1), jax.random.key(0), 4)
    >>> state, metrics = step(state, task.batch(jax.random.key(1), 4), jax.numpy.array(True))
    >>> int(state.step), bool(metrics.is_finite)
    (1, True)
    """
    step = _jitted_step(model, loss, optimizer, penalty, None if devices is None else tuple(devices))
    if devices is None:
        return step
    layout = Layout(devices)
    return lambda state, batch, restart: step(layout.on_all(state), layout.split(batch), layout.on_all(restart))


def evaluator(
    model: Model,
    loss: Loss,
    batches: Sequence[Any],
    *,
    carry_memory: bool = False,
    metrics: Mapping[str, Loss] | None = None,
) -> Callable[[ModelParams], dict[str, float]]:
    """Returns the function ``evaluate(params) -> {"loss": …, …}``: plain means over the batches, dropout off.

    Args:
      model: the model.
      loss: maps (output, batch) to a scalar.
      batches: all of one shape, or each shape compiles anew.
      carry_memory: they are consecutive windows of the same streams; else each starts from the initial state.
      metrics: more functions of (output, batch), by name.

    Raises:
      ValueError: no batches.

    >>> import jax
    >>> import rnngrad as rg
    >>> net, task = rg.training.model([rg.cells.gru(2, 5)], 1), rg.tasks.adding(20)
    >>> evaluate = rg.training.evaluator(
    ...     net,
    ...     lambda output, batch: rg.losses.mse(output.outputs, batch.targets, batch.mask),
    ...     [task.batch(jax.random.key(1), 4)],
    ... )
    >>> list(evaluate(net.init(jax.random.key(0))))
    ['loss']
    """
    if not batches:
        raise ValueError("batches: expected at least one to evaluate on, found none")
    functions = {"loss": loss, **(metrics or {})}

    @jax.jit
    def measure(params, memory, batch):
        output = model.apply(params, memory, batch.inputs)
        return {name: function(output, batch) for name, function in functions.items()}, output.final

    def evaluate(params: ModelParams) -> dict[str, float]:
        values, memory = [], None
        for batch in batches:
            if memory is None or not carry_memory:
                memory = model.init_state(batch.mask.shape[1:])
            measured, memory = measure(params, memory, batch)
            values.append(measured)
        fetched = jax.device_get(values)
        return {name: float(np.mean([float(value[name]) for value in fetched])) for name in functions}

    return evaluate


@functools.partial(jax.jit, static_argnames=("model", "loss"))
def _inspect(model, loss, state, batch, restart):
    """What a failed step looked like inside: finite time steps, and the gradient at every state."""
    memory = _memory(model, state, restart)
    key = jax.random.fold_in(state.key, state.step) if model.dropout else None
    cotangents, output = tap_cotangents(model, state.params, memory, batch, loss, key=key)
    seen = (output.outputs, tuple(trajectory.states for trajectory in output.trajectories))
    finite = jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))), seen)
    is_finite = functools.reduce(jnp.logical_and, jax.tree.leaves(finite))
    # over batch, layers and units at once: (T, everything)
    flat = [
        leaf[1:].reshape(leaf.shape[0] - 1, -1)
        for leaf in jax.tree.leaves(jax.tree.map(jnp.abs, [total_cotangents(layer) for layer in cotangents]))
    ]
    return is_finite, log_norms(jnp.concatenate(flat, axis=1))


@dataclasses.dataclass
class _Standing:
    """Where the loop stands beside the arrays; plain values, kept in every checkpoint."""

    best_loss: float = float("inf")
    best_step: int = 0
    without_better: int = 0
    """Evaluations since the best one."""
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    window: list[list[float]] = dataclasses.field(default_factory=list)
    """(loss, gradient norm, clipped) of the steps since the last "train" record."""
    num_clipped: int = 0
    seconds: float = 0.0
    """Wall time up to the last checkpoint, summed over sittings."""


class _Run:
    """The moving parts of one :func:`fit`."""

    def __init__(
        self, state: TrainState, best_params: ModelParams, standing: _Standing, logs: Sequence[Log], layout: Layout
    ) -> None:
        self.state, self.best_params, self.standing, self.logs = state, best_params, standing, logs
        self.layout = layout
        self.clock = time.perf_counter()
        self.sent: list[tuple[int, Metrics]] = []
        """Metrics still on the device, by step."""
        self.flows: list[tuple[int, Flow]] = []
        """Measurements still on the device, by step."""

    def own_state(self) -> TrainState:
        """Returns the state on one device of this process."""
        return self.layout.own(self.state)

    def write(self, record: dict[str, Any]) -> None:
        for log in self.logs:
            log.write(record)

    def fetch(self) -> tuple[int, Metrics] | None:
        """Waits for the steps sent so far, takes their metrics, writes measurements; returns a step that failed."""
        sent, flows = jax.device_get((self.sent, dict(self.flows)))
        self.sent, self.flows = [], []
        for step, metrics in sent:
            if not metrics.is_finite:
                return step, metrics
            self.standing.window.append([float(metrics.loss), float(metrics.grad_norm), float(metrics.clipped)])
            self.standing.num_clipped += int(metrics.clipped)
            if step in flows:
                self.write(flow_record(step, flows[step], clip_fraction=self.standing.num_clipped / step))
        return None

    def train_record(self, step: int) -> dict[str, Any]:
        """Writes and returns the means over the steps since the last such record."""
        losses, norms, clipped = zip(*self.standing.window, strict=True)
        self.standing.window = []
        record = {
            "kind": "train",
            "step": step,
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "max_grad_norm": max(norms),
            "clip_fraction": sum(clipped) / len(clipped),
        }
        self.write(record)
        return record

    def evaluate(self, evaluate: Callable[[ModelParams], Mapping[str, float]], step: int) -> None:
        """Evaluates, keeps the parameters when they are the best, and writes the record."""
        params = self.own_state().params

        def measure() -> dict[str, float]:
            values = dict(evaluate(params))
            if "loss" not in values:
                raise ValueError(f"evaluate: expected a mapping with 'loss', found {sorted(values)}")
            return values

        values = self.layout.ask(measure)
        record = {"kind": "evaluation", "step": step, **values}
        standing = self.standing
        standing.evaluations.append(record)
        if values["loss"] < standing.best_loss:
            standing.best_loss, standing.best_step, standing.without_better = values["loss"], step, 0
            self.best_params = jax.tree.map(jnp.copy, params)  # the step gives its buffers away
        else:
            standing.without_better += 1
        self.write(record)

    def stop_watch(self) -> None:
        """Adds the time since the last call, or since the start, to what counts."""
        now = time.perf_counter()
        self.standing.seconds, self.clock = self.standing.seconds + now - self.clock, now

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Writes a checkpoint, after the records that it presupposes."""
        self.stop_watch()
        tree = {"train": self.own_state(), "best": self.best_params}

        def write() -> None:
            for log in self.logs:
                log.flush()
            checkpoints.save(step, tree, dataclasses.asdict(self.standing))

        self.layout.ask(write)


def _reason(step: int, num_steps: int, standing: _Standing, patience: int | None, asked: bool) -> str | None:
    """Returns why training ends here, None when it goes on."""
    if patience is not None and standing.without_better >= patience:
        return "early stop"
    if step >= num_steps:
        return "done"
    return "asked to stop" if asked else None


def _restored(checkpoints: Checkpoints, like: Any, layout: Layout) -> Restored | None:
    """Returns the newest checkpoint; of processes that train together the first one reads it, and tells the others."""
    if not layout.is_shared:
        return checkpoints.restore(like)

    def read() -> bytes:
        restored = checkpoints.restore(like)
        if restored is None:
            return b""
        head = json.dumps({"step": restored.step, "standing": restored.standing})
        return head.encode() + b"\n" + pack(restored.tree).tobytes()

    told = bytes_of_first(read)
    if not len(told):
        return None
    end = int(np.argmax(told == ord("\n")))
    return Restored(tree=unpack(told[end + 1 :], like), **json.loads(bytes(told[:end])))


def _is_asked(should_stop: Callable[[Progress], bool], progress: Progress) -> bool:
    return bool(should_stop(progress))


def _failure(
    model: Model,
    loss: Loss,
    state: TrainState,
    batch_at: Callable[[int], Any],
    starts_anew: Callable[[int], Array],
    failed: tuple[int, Metrics],
    checkpoints: Checkpoints | None,
) -> NonFiniteLossError:
    """Returns the report on a failed step; ``state`` is the one before it."""
    step, metrics = failed
    is_finite, norms = jax.device_get(_inspect(model, loss, state, batch_at(step - 1), starts_anew(step - 1)))
    latest = None if checkpoints is None else checkpoints.latest_step()
    return NonFiniteLossError(
        step=step,
        loss=float(metrics.loss),
        grad_norm=float(metrics.grad_norm),
        first_nonfinite_time=None if is_finite.all() else int(np.argmin(is_finite)),
        log_gradient_norms=np.asarray(norms, np.float64),
        checkpoint=None if checkpoints is None or latest is None else str(checkpoints.path(latest)),
    )


def fit(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch_at: Callable[[int], Any],
    *,
    num_steps: int,
    restart_at: Callable[[int], bool | Array] | None = None,
    evaluate: Callable[[ModelParams], Mapping[str, float]] | None = None,
    eval_every: int = 100,
    patience: int | None = None,
    penalty: Penalty | None = None,
    log_every: int = 10,
    logs: Sequence[Log] = (),
    monitor: Monitor | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 1000,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[Progress], bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Fitted:
    """Returns the trained state, after resuming from the newest checkpoint when there is one.

    Args:
      model: the model.
      loss: maps (output, batch) to a scalar.
      optimizer: an optax optimizer, with schedule and clipping.
      state: where to start; with a checkpoint at hand, what it is checked against.
      batch_at: the batch of a step, counted from 0: a pure function of it.
      num_steps: updates in all, those before a resume included.
      restart_at: whether the memory starts anew at a step; None: at every step.
      evaluate: maps parameters to numbers, "loss" among them; called at step 0, every ``eval_every`` steps and at the
        end.
      eval_every: steps between evaluations.
      patience: stop after so many evaluations without a lower loss.
      penalty: see :func:`train_step`.
      log_every: steps between two fetches of metrics, and between two "train" records.
      logs: where records go.
      monitor: settings of the gradient-flow monitor, None for none.
      checkpoints: where checkpoints go, None for nowhere.
      checkpoint_every: steps between checkpoints; one more is written at the end.
      on_progress: called at the start, after every ``log_every`` steps and after every evaluation.
      should_stop: asked at the same moments; a checkpoint is written before the return.
      devices: over which the sequences of every batch are split (:mod:`rnngrad.training.data_parallel`); with those of
        several processes, all of them call this alike, and only process 0 evaluates, shows progress, is asked to stop,
        and needs the folders of logs and checkpoints.  None: one device.

    Raises:
      NonFiniteLossError: NaN or inf in a loss, a gradient or the weights.
      ValueError: options that make no sense; a checkpoint that is foreign, corrupt or of another configuration.
      NotWritableError: no checkpoint can be written.
      UnevenBatchError: the batch does not split evenly over the devices.
      FirstProcessError: evaluation, checkpoint or log failed in process 0, and this is another one.

    >>> import jax, optax
    >>> import rnngrad as rg
    >>> net, task = rg.training.model([rg.cells.gru(2, 5)], 1), rg.tasks.adding(20)
    >>> fitted = rg.training.fit(
    ...     net,
    ...     lambda output, batch: rg.losses.mse(output.outputs, batch.targets, batch.mask),
    ...     optax.sgd(0.1),
    ...     rg.training.initial_state(net, optax.sgd(0.1), jax.random.key(0), 4),
    ...     lambda step: task.batch(jax.random.key(step), 4),
    ...     num_steps=5,
    ... )
    >>> int(fitted.state.step), fitted.reason
    (5, 'done')
    """
    intervals = {"eval_every": eval_every, "log_every": log_every, "checkpoint_every": checkpoint_every}
    if monitor is not None:
        intervals |= {"monitor.every": monitor.every, "monitor.max_sequences": monitor.max_sequences}
    if patience is not None:
        intervals["patience"] = patience
    for name, value in intervals.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    if num_steps < 0:
        raise ValueError(f"num_steps: expected at least 0, found {num_steps}")
    if patience is not None and evaluate is None:
        raise ValueError("patience: expected an evaluate function beside it, found None")

    layout = Layout(devices)
    layout.check(jax.tree.leaves(state.memory)[0].shape[0])
    update = train_step(model, loss, optimizer, penalty=penalty, devices=devices)
    logs = logs if layout.is_first else ()
    # a copy, since the step gives its argument away and this one is the caller's
    state = jax.tree.map(jnp.copy, state)
    contents: dict[str, Any] = {"train": state, "best": state.params}
    standing, resumed_from = _Standing(), None
    if checkpoints is not None:
        restored = _restored(checkpoints, contents, layout)
        if restored is not None:
            contents, standing, resumed_from = restored.tree, _Standing(**restored.standing), restored.step

    def starts_anew(at: int) -> Array:
        return jnp.asarray(True if restart_at is None else restart_at(at))

    run = _Run(contents["train"], jax.tree.map(jnp.copy, contents["best"]), standing, logs, layout)
    step, record, asked = int(run.state.step), None, False
    saved_step = resumed_from
    try:

        def start() -> None:
            for log in logs:
                log.start(resumed_from)

        layout.ask(start)
        if evaluate is not None and not standing.evaluations:
            run.evaluate(evaluate, step)
        while True:
            if on_progress is not None or should_stop is not None:
                last = standing.evaluations[-1] if standing.evaluations else None
                progress = Progress(step, num_steps, record, last)
                if on_progress is not None and layout.is_first:
                    on_progress(progress)
                if should_stop is not None:
                    asked = layout.ask(functools.partial(_is_asked, should_stop, progress))
            reason = _reason(step, num_steps, standing, patience, asked)
            if reason is not None:
                break
            for _ in range(min(log_every - step % log_every, num_steps - step)):
                batch, restart = batch_at(step), starts_anew(step)
                step += 1
                if monitor is not None and (step == 1 or step % monitor.every == 0):
                    # in every process: else the others would wait while the first one compiles
                    now, sequences = run.own_state(), monitor.max_sequences
                    memory = _memory(model, now, restart)
                    flow = gradient_flow(model, now.params, memory, batch, loss, max_sequences=sequences)
                    run.flows.append((step, flow))
                run.state, metrics = update(run.state, batch, restart)
                run.sent.append((step, metrics))

                is_recorded = step % log_every == 0
                is_evaluated = evaluate is not None and (step % eval_every == 0 or step == num_steps)
                is_saved = checkpoints is not None and step % checkpoint_every == 0
                if not (is_recorded or is_evaluated or is_saved or step == num_steps):
                    continue
                failed = run.fetch()
                if failed is not None:
                    raise _failure(model, loss, run.own_state(), batch_at, starts_anew, failed, checkpoints)
                if is_recorded:
                    record = run.train_record(step)
                if evaluate is not None and is_evaluated:
                    run.evaluate(evaluate, step)
                if checkpoints is not None and is_saved:
                    run.save(checkpoints, step)
                    saved_step = step
                if is_evaluated:  # which may end training
                    break
        if checkpoints is None:
            run.stop_watch()
        elif saved_step != step:
            run.save(checkpoints, step)
    finally:
        for log in logs:
            log.close()
    is_evaluated = bool(standing.evaluations)
    return Fitted(
        state=run.own_state(),
        best_params=run.best_params if is_evaluated else run.own_state().params,
        best_loss=standing.best_loss,
        best_step=standing.best_step if is_evaluated else step,
        evaluations=standing.evaluations,
        reason=reason,
        resumed_from=resumed_from,
        seconds=standing.seconds,
    )
