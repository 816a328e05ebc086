"""Is 1 the forget bias to start an LSTM with, and does a memory that starts at 0.1 help?

For each forget bias it measures how much of a gradient fresh weights let through over T steps (the whole chain
∂c_T/∂c_k and its direct path ∏f), and then trains the same weights on two tasks that ask for a memory, until they are
solved: adding, and the order of two symbols.  All settings of a seed share weights, batches and held-out sequences, so
that they are compared seed by seed; a seed that never solves counts as solving after all updates, and where both
settings of a comparison never do the seed is a tie.  The memory's start c_0 is tried where b_f = 1 soon forgets it, and
where chrono gates do not.

The learning rate is one at which the easy case (chrono gates) is learned within a quarter of the updates; clipping at 1
is there so that no setting is lost to one bad batch.  Running time: eight minutes on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, median_interval, summarise
from experiments.trials import Trainer, first_reached

_TESTS = ("tests/test_forget_bias.py",)
CLAIMS = (
    Claim(
        "D2",
        "Set the bias of the LSTM's forget gate to 1: with it long dependencies are learned that 0 does not learn.",
        source="Gers, Schmidhuber & Cummins 2000; Jozefowicz, Zaremba & Sutskever 2015, who recommend 1",
        prediction="faster than 0; untrained, 10^-9.6 of the whole chain ∂c_T/∂c_k and 10^-12.8 of its direct path are "
        "left after 100 steps (each within a decade), too little to learn from, so that larger biases do better still",
        refuted="b_f = 1 solves a task no faster than b_f = 0, or another setting solves it faster than b_f = 1",
        functions=("rg.cells.lstm", "rg.initializers.chrono", "rg.initializers.ugi", "rg.retention"),
        tests=(*_TESTS, "tests/test_initializers.py", "tests/test_chains.py::test_random_lstm_medians"),
    ),
    Claim(
        "D3",
        "Start the LSTM's memory c at about 0.1 rather than at 0, and its gradient flows from the first steps on.",
        source="advice that circulates without a paper",
        prediction="no effect: the gradient over all steps changes by less than 10 %, updates by less than seeds do",
        refuted="no more gradient than with 0 (at least a tenth more is asked for) at any forget bias, no task faster",
        functions=("rg.cells.lstm", "rg.retention"),
        tests=_TESTS,
    ),
)

PATHS = ("full", "direct")
SCHEMES: dict[str, Callable[[int], Any]] = {
    "chrono": lambda steps: rg.initializers.chrono(steps),
    "ugi": lambda steps: rg.initializers.ugi(),
}
"""Settings that draw a bias for each unit, beside plain numbers."""
TaskName = Literal["adding", "order"]
SOLVED_MSE = 0.01
"""Off by 0.1 where who knows nothing is off by 0.4."""
SOLVED_ACCURACY = 0.99
"""Pascanu et al. 2013, section 4.1, call temporal order solved at 99 %."""
REFERENCE = "1"
"""The forget bias that is tried."""
TRIED_MEMORY = 0.1
MORE = 1.1
"""Factor of gradient that counts as more; see WHY_MORE."""
NUMBERS = {"full": -9.6, "direct": -12.8}
"""Decades at lag 100 of a random LSTM with N = 32, b_f = 1, Gaussian inputs."""
KEPT = 0.01

WHY_FASTER = "bootstrap interval of the median ratio of updates, seed by seed; below 1 is faster"
WHY_BEST = "a setting is faster where the whole interval of its ratio of updates to b_f = 1 is below 1"
WHY_MORE = "a tenth: less than what two seeds differ by, and c_0 costs nothing, so that little is asked of it"
WHY_NUMBERS = "medians of 20 random LSTMs with N = 32 on Gaussian inputs; a decade for the other inputs"
WHY_RISING = "f = σ(b_f) rises with b_f, and with it every factor of the direct path"
WHY_KEPT = "the claim that over 100 steps an LSTM keeps 10^-2 (B8)"
WHY_NOTHING = "c_0 is forgotten at the rate at which the gradient fades"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison of forget biases and initial memories."""

    forget_biases: tuple[str, ...] = ("0", "1", "2", "3", "5", "chrono", "ugi")
    """Numbers, chrono (for memories up to the task's length) or ugi; 0 and 1 must be among them."""
    tasks: tuple[TaskName, ...] = ("adding", "order")
    """adding, and the order of two symbols."""
    memories: tuple[float, ...] = (0.0, 0.1, 1.0)
    """Starts c_0 of every unit, rising; 0 and 0.1 must be among them."""
    memory_biases: tuple[str, ...] = ("1", "chrono")
    """Forget biases at which networks with every start are trained; fresh ones are measured at all."""
    adding_steps: int = 100
    """Length T of the adding task, and lag up to which fresh weights are measured on its inputs."""
    order_steps: int = 60
    """Length T of temporal order."""
    hidden_size: int = 32
    """Units N; weights and other biases are drawn as in Torch."""
    learning_rate: float = 5e-3
    """Of Adam, constant."""
    clip: float = 1.0
    """Largest global norm of the gradient of the loss per token."""
    batch_size: int = 20
    """Sequences per update."""
    updates: int = 4_000
    """Updates at the most; a trial ends when its task is solved."""
    eval_every: int = 50
    """Updates between evaluations; divides the updates."""
    eval_sequences: int = 200
    """Held-out sequences."""
    fresh_seeds: int = 10
    """Fresh networks whose gradient is measured."""
    seeds: int = 5
    """Trained networks of each setting and task."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    forget_biases=("0", "1", "chrono"),
    tasks=("adding",),
    memories=(0.0, 0.1),
    memory_biases=("1",),
    adding_steps=10,
    order_steps=10,
    hidden_size=8,
    updates=20,
    eval_every=10,
    eval_sequences=20,
    fresh_seeds=3,
    seeds=2,
)
"""A few seconds: every code path, no statement about the claims."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {
        "adding_steps": 3, "order_steps": 10, "hidden_size": 1, "batch_size": 1, "updates": 1, "eval_every": 1,
        "eval_sequences": 1, "fresh_seeds": 1, "seeds": 1, "first_seed": 0,
    }  # fmt: skip
    command.check_at_least(config, least)
    biases = config.forget_biases
    if len(set(biases)) != len(biases) or not {"0", REFERENCE} <= set(biases):
        raise UserError(f"--forget-biases: expected each once, 0 and {REFERENCE} among them, found {' '.join(biases)}")
    for bias in biases:
        _bias_of(bias, config.adding_steps)
    if not config.tasks or len(set(config.tasks)) != len(config.tasks):
        raise UserError(f"--tasks: expected adding, order or both, found {' '.join(config.tasks) or 'none'}")
    chosen = config.memory_biases
    if len(set(chosen)) != len(chosen) or not {*chosen} <= {*biases}:
        raise UserError(f"--memory-biases: expected some of {' '.join(biases)}, each once, found {' '.join(chosen)}")
    memories = config.memories
    are_rising = list(memories) == sorted(set(memories)) and bool(np.isfinite(memories).all())
    if not are_rising or not {0.0, TRIED_MEMORY} <= set(memories):
        raise UserError(f"--memories: expected finite numbers, rising, with 0 and {TRIED_MEMORY}, found {memories}")
    for name in ("learning_rate", "clip"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, found {value:g}")
    if config.updates % config.eval_every:
        raise UserError(f"--updates: expected a multiple of --eval-every {config.eval_every}, found {config.updates}")


def _bias_of(name: str, steps: int) -> Any:
    """Returns the gate bias that a name stands for."""
    if name in SCHEMES:
        return SCHEMES[name](steps)
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--forget-biases: expected numbers, chrono or ugi, found {name}")
    return number


class Row(NamedTuple):
    """One setting that is trained."""

    bias: str
    memory: float

    @property
    def name(self) -> str:
        """What a reader sees."""
        label = self.bias if self.bias in SCHEMES else f"b_f = {self.bias}"
        return label if self.memory == 0 else f"{label}, c_0 = {self.memory:g}"


def rows_of(config: Config) -> list[Row]:
    """Returns the settings that are trained: every forget bias with c_0 = 0, and some with the other starts."""
    return [Row(bias, 0.0) for bias in config.forget_biases] + [
        Row(bias, memory) for bias in config.memory_biases for memory in config.memories if memory != 0
    ]


# --- fresh weights ---------------------------------------------------------------------------------------------------


@functools.cache
def _cell(input_size: int, hidden_size: int) -> rg.Cell:
    """The cell that all fresh networks share: they differ in weights and states alone."""
    return rg.cells.lstm(input_size, hidden_size)


@functools.partial(jax.jit, static_argnames="cell")
def _measure_fresh(cell, params, state, xs):
    curves = [rg.retention(cell, params, state, xs, of="c", wrt="c", path=path) for path in PATHS]
    return jnp.stack([curve.log_norm for curve in curves]), curves[0].nonfinite_step


def _measure_bias(bias: str, config: Config) -> xr.Dataset:
    """Returns the dataset of one forget bias, untrained: every seed and every start of the memory."""
    task = rg.tasks.adding(config.adding_steps)
    drawing = rg.cells.lstm(task.input_size, config.hidden_size, forget_bias=_bias_of(bias, config.adding_steps))
    cell = _cell(task.input_size, config.hidden_size)
    curves, ends, bad = [], [], []
    for seed in range(config.first_seed, config.first_seed + config.fresh_seeds):
        key_params, key_xs = jax.random.split(jax.random.key(seed))
        params, xs = drawing.init(key_params), task.batch(key_xs, 1).inputs[:, 0]
        of_seed = {}
        for memory in config.memories:
            state = cell.init_state()
            state = state._replace(c=jnp.full_like(state.c, memory))
            of_seed[memory] = jax.tree.map(np.asarray, _measure_fresh(cell, params, state, xs))
        curves.append(of_seed[0.0][0])
        ends.append([of_seed[memory][0][:, -1] for memory in config.memories])
        bad.append(of_seed[0.0][1])
    return xr.Dataset(
        {
            "log_retention": (("fresh_seed", "path", "lag"), np.stack(curves)),
            "log_retention_end": (("fresh_seed", "memory", "path"), np.stack(ends)),
            "nonfinite_step": ("fresh_seed", np.stack(bad)),
        }
    )


# --- training --------------------------------------------------------------------------------------------------------


def build_task(name: TaskName, config: Config) -> Any:
    """Returns one of the two tasks."""
    if name == "adding":
        return rg.tasks.adding(config.adding_steps)
    return rg.tasks.temporal_order(config.order_steps)


def build_model(task: Any, config: Config, *, bias: Any = None) -> rg.training.Model:
    """Returns the model of a task; with another bias it draws the same weights otherwise."""
    cell = rg.cells.lstm(task.input_size, config.hidden_size, forget_bias=bias)
    return rg.training.model([cell], task.output_size, vocabulary_size=task.vocabulary_size)


class Started(NamedTuple):
    """Weights, and the start of the memory that belongs to them."""

    weights: Any
    memory: jax.Array


def started_model(model: rg.training.Model) -> rg.training.Model:
    """Returns the model with c_0 among its parameters, where it is no constant of the program but is never trained."""

    def init(key):
        return Started(model.init(key), jnp.zeros(()))

    def apply(params, state, inputs, *, key=None, taps=None):
        (start,) = state
        # its gradient is 0, so that neither the clipping norm nor Adam sees it
        start = start._replace(c=start.c + jax.lax.stop_gradient(params.memory))
        return model.apply(params.weights, (start,), inputs, key=key, taps=taps)

    return model._replace(init=init, apply=apply)


@functools.lru_cache(maxsize=2)
def _trainer(task_name: TaskName, config: Config) -> Trainer:
    """Compiled once for a task: settings differ in the weights and in c_0 alone."""
    task = build_task(task_name, config)
    model = started_model(build_model(task, config))
    function = rg.losses.mse if task.loss == "mse" else rg.losses.cross_entropy
    loss = lambda output, batch: function(output.outputs, batch.targets, batch.mask)

    def measure(params, key):
        batch = task.batch(key, config.eval_sequences)
        output = model.apply(params, model.init_state((config.eval_sequences,)), batch.inputs)
        if task.loss == "mse":
            value = loss(output, batch)
            return {"loss": value, "solved": value <= SOLVED_MSE}
        accuracy = rg.losses.accuracy(output.outputs, batch.targets, batch.mask)
        return {"loss": loss(output, batch), "solved": accuracy >= SOLVED_ACCURACY}

    return Trainer(
        model,
        loss,
        optax.chain(rg.remedies.clip_by_global_norm(config.clip), optax.adam(config.learning_rate)),
        lambda key, step: task.batch(jax.random.fold_in(key, step), config.batch_size),
        measure,
        batch_size=config.batch_size,
    )


def _train(task_name: TaskName, row: Row, seed: int, config: Config) -> xr.Dataset:
    """Returns one trained network: its learning curve, and when it solved the task."""
    task = build_task(task_name, config)
    steps = config.adding_steps if task_name == "adding" else config.order_steps
    key_params, key_trial = jax.random.split(jax.random.key(seed))
    weights = build_model(task, config, bias=_bias_of(row.bias, steps)).init(key_params)
    trial = _trainer(task_name, config).run(
        key_trial,
        updates=config.updates,
        eval_every=config.eval_every,
        params=Started(weights, jnp.full((), row.memory)),
        until=lambda measured: bool(measured["solved"]),
    )
    solved = np.nan_to_num(trial.measured["solved"]) > 0
    return xr.Dataset(
        {
            "loss": ("evaluation", trial.measured["loss"].astype(np.float32)),
            "solved_at": ((), first_reached(trial.updates, solved)),
            "failed_at": ((), trial.failed_at),
        }
    )


MEASURED = ("log_retention", "log_retention_end", "nonfinite_step", "loss", "solved_at", "failed_at")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "log_retention": ("nats", "log of ‖∂c_T/∂c_{T−lag}‖ over that at lag 0, fresh weights, c_0 = 0"),
    "log_retention_end": ("nats", "the same at the longest lag, for every start c_0 of the memory"),
    "nonfinite_step": ("steps", "first time step with a non-finite state; −1 for none"),
    "loss": ("1", "held-out loss: squared error (adding), nats (order); NaN behind the solution or a failed update"),
    "solved_at": ("updates", "updates at the first evaluation that finds the task solved; NaN for never"),
    "failed_at": ("updates", "the update that was not finite; −1 for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with medians and intervals over fresh networks."""
    fresh = dataset[["log_retention", "log_retention_end"]].rename(fresh_seed="seed")
    summarise(fresh, ("log_retention", "log_retention_end"), _DESCRIPTIONS)
    for name in fresh.data_vars:
        if name not in ("log_retention", "log_retention_end"):
            dataset[name] = fresh[name].astype(np.float32)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished pieces are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    rows, seeds = rows_of(config), range(config.first_seed, config.first_seed + config.seeds)
    fresh = [
        Piece(f"fresh-{bias}", f"fresh weights, forget bias {bias}", functools.partial(_measure_bias, bias, config))
        for bias in config.forget_biases
    ]
    trials = [
        Piece(
            f"{task}-{row.bias}-{row.memory:g}-{seed}",
            f"{task}, {row.name}, seed {seed}",
            functools.partial(_train, task, row, seed, config),
        )
        for task in config.tasks
        for row in rows
        for seed in seeds
    ]
    measured = command.measure([*fresh, *trials], parts=parts, screen=screen)
    untrained = xr.concat(measured[: len(fresh)], dim="forget_bias").assign_coords(
        forget_bias=list(config.forget_biases),
        memory=list(config.memories),
        path=list(PATHS),
        fresh_seed=config.first_seed + np.arange(config.fresh_seeds),
        lag=np.arange(config.adding_steps + 1),
    )
    stacked = xr.concat(measured[len(fresh) :], dim="trial")
    shape = (len(config.tasks), len(rows), config.seeds)
    trained = xr.Dataset(
        {
            name: (("task", "row", "seed", *values.dims[1:]), values.values.reshape(*shape, *values.shape[1:]))
            for name, values in stacked.data_vars.items()
        }
    ).assign_coords(
        task=list(config.tasks),
        row=[row.name for row in rows],
        seed=list(seeds),
        evaluation=np.arange(0, config.updates + 1, config.eval_every),
    )
    dataset = xr.merge([untrained, trained])
    dataset.attrs = command.provenance("forget_bias", config, seconds=time.perf_counter() - started)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_TASK_NAMES = {"adding": "adding", "order": "temporal order"}


def _config(dataset: xr.Dataset) -> Config:
    stored: dict[str, Any] = json.loads(dataset.attrs["config"])
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return Config(**plain)


def _titled(task: str, config: Config) -> str:
    return f"{_TASK_NAMES[task]}, T = {config.adding_steps if task == 'adding' else config.order_steps}"


def _decades(dataset: xr.Dataset, bias: str, path: str, memory: float = 0.0) -> str:
    at = dataset.sel(forget_bias=bias, path=path, memory=memory)
    median, low, high = (float(at[f"log_retention_end_{part}"]) / np.log(10) for part in ("median", "low", "high"))
    return f"{median:.1f} [{low:.1f}, {high:.1f}]"


class _Speed(NamedTuple):
    """Updates of one setting over those of another, seed by seed."""

    median: float
    low: float
    high: float
    told: bool
    """Some network of the two solved the task."""

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]" if self.told else "neither ever"


def _speed(dataset: xr.Dataset, task: str, row: str, other: str) -> _Speed:
    """How many updates ``row`` takes for one of ``other``; who never solves counts as solving at the last update."""
    solved_at = dataset["solved_at"].sel(task=task)
    limit = float(dataset["evaluation"][-1])
    pair = [solved_at.sel(row=name).values for name in (row, other)]
    # a network may solve before its first update in a tiny run
    logs = [np.log(np.maximum(np.where(np.isnan(updates), limit, updates), 1)) for updates in pair]
    interval = median_interval(logs[0] - logs[1], axis=0)
    told = not all(np.isnan(updates).all() for updates in pair)
    median, low, high = (float(np.exp(value)) for value in interval)
    return _Speed(median, low, high, told)


def _solved(dataset: xr.Dataset, task: str, row: str) -> str:
    solved_at = dataset["solved_at"].sel(task=task, row=row).values
    return f"{int(np.isfinite(solved_at).sum())} of {len(solved_at)}"


def _updates(dataset: xr.Dataset, task: str, row: str) -> str:
    """The median over all seeds, those that never solve beyond every number."""
    solved_at = np.sort(dataset["solved_at"].sel(task=task, row=row).values)
    middle = solved_at[len(solved_at) // 2]  # NaN sorts last
    failed = int((dataset["failed_at"].sel(task=task, row=row) >= 0).sum())
    median = f"> {int(dataset['evaluation'][-1]):,}" if np.isnan(middle) else f"{middle:,.0f}"
    return median + (f" ({failed} diverged)" if failed else "")


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first."""
    config = _config(dataset)
    shown = rich.table.Table(
        title=f"Forget bias and start of the memory: LSTM, N={config.hidden_size}, Adam {config.learning_rate:g}, "
        f"batches of {config.batch_size}, {config.seeds} seeds ({config.fresh_seeds} untrained), "
        f"{dataset.attrs['dtype']}, matmul {dataset.attrs['matmul_precision']}, {dataset.attrs['backend']}",
        caption=f"left: log10 of ‖∂c_T/∂c_0‖ over that at lag 0, T = {config.adding_steps}, median of fresh networks "
        f"[{100 * dataset.attrs['confidence']:.0f} % interval]; right: networks that solve the task within "
        f"{config.updates:,} updates, and the median of their updates (all seeds; unsolved ones beyond every number)",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("setting", "full chain", "direct path"):
        shown.add_column(name, justify="left" if name == "setting" else "right")
    for task in config.tasks:
        shown.add_column(_titled(task, config), justify="right")
        shown.add_column("updates", justify="right")
    for row in rows_of(config):
        cells = [_decades(dataset, row.bias, path, row.memory) for path in PATHS]
        for task in config.tasks:
            cells += [_solved(dataset, task, row.name), _updates(dataset, task, row.name)]
        shown.add_row(row.name, *cells)
    return shown


def _bias_rows(config: Config) -> list[str]:
    return [row.name for row in rows_of(config) if row.memory == 0]


_REFERENCE_ROW = Row(REFERENCE, 0.0).name
_ZERO_ROW = Row("0", 0.0).name


def _faster(dataset: xr.Dataset, task: str) -> dict[str, _Speed]:
    """The settings of the forget gate that solve a task faster than b_f = 1, beyond the interval."""
    rows = [row for row in _bias_rows(_config(dataset)) if row != _REFERENCE_ROW]
    speeds = {row: _speed(dataset, task, row, _REFERENCE_ROW) for row in rows}
    return {row: speed for row, speed in speeds.items() if speed.told and speed.high < 1}


def _any_solved(dataset: xr.Dataset, task: str) -> bool:
    return bool(np.isfinite(dataset["solved_at"].sel(task=task, row=_bias_rows(_config(dataset)))).any())


def _gain(dataset: xr.Dataset, bias: str, memory: float) -> tuple[float, float, float]:
    """Gradient over all steps with a start of the memory, over that with c_0 = 0: median and interval of the factor."""
    ends = dataset["log_retention_end"].sel(forget_bias=bias, path="full")
    change = (ends.sel(memory=memory) - ends.sel(memory=0.0)).values
    if not np.isfinite(change).all():
        raise ValueError(f"b_f = {bias}: a fresh network gave no number, nothing to judge")
    median, low, high = (float(np.exp(value)) for value in median_interval(change, axis=0))
    return median, low, high


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks of both claims, then those of the predicted numbers."""
    config = _config(dataset)
    checks = []
    for task in config.tasks:
        told, speed = _any_solved(dataset, task), _speed(dataset, task, _REFERENCE_ROW, _ZERO_ROW)
        solved = f"{_solved(dataset, task, _REFERENCE_ROW)} against {_solved(dataset, task, _ZERO_ROW)} solved"
        checks.append(
            Check(
                f"b_f = 1 learns faster than 0: {_titled(task, config)}",
                f"updates × {speed}; {solved}",
                "< 1",
                # where others solve the task and neither 0 nor 1 does, 1 is certainly not faster
                (speed.told and speed.high < 1) if told else None,
                "D2",
                WHY_FASTER,
            )
        )
    for task in config.tasks:
        faster = _faster(dataset, task)
        found = "; ".join(f"{row}: updates × {speed}" for row, speed in faster.items()) or "none is faster"
        holds = not faster if _any_solved(dataset, task) else None
        name = f"b_f = 1 is the best setting: {_titled(task, config)}"
        checks.append(Check(name, found, "no other is faster", holds, "D2", WHY_BEST))
    lag = config.adding_steps
    middle = dataset["log_retention_end_median"].sel(memory=0.0) / np.log(10)
    if (config.hidden_size, lag) == (32, 100):
        for path, number in NUMBERS.items():
            decades = float(middle.sel(forget_bias=REFERENCE, path=path))
            checks.append(
                Check(
                    f"prediction: {path}, b_f = 1, lag {lag}", f"10^{decades:.1f}", f"10^{number:g} ± 1",
                    abs(decades - number) <= 1, "D2", WHY_NUMBERS, decides=False,
                )
            )  # fmt: skip
    kept = float(middle.sel(forget_bias=REFERENCE, path="full"))
    checks.append(
        Check(
            f"b_f = 1 keeps {KEPT:g} of a gradient, untrained, lag {lag}", f"10^{kept:.1f}", f"≥ {KEPT:g}",
            kept >= np.log10(KEPT), "D2", WHY_KEPT, decides=False,
        )
    )  # fmt: skip
    numbers = sorted((bias for bias in config.forget_biases if bias not in SCHEMES), key=float)
    rising = middle.sel(forget_bias=numbers, path="direct").values
    checks.append(
        Check(
            f"the direct path keeps more, the larger b_f: lag {lag}", " < ".join(f"10^{value:.1f}" for value in rising),
            "rising", bool((np.diff(rising) > 0).all()), "D2", WHY_RISING, decides=False,
        )
    )  # fmt: skip

    same = True
    for bias in config.forget_biases:
        median, low, high = _gain(dataset, bias, TRIED_MEMORY)
        checks.append(
            Check(
                f"c_0 = {TRIED_MEMORY:g} lets more gradient through: {Row(bias, 0.0).name}, lag {lag}",
                f"× {median:.3f} [{low:.3f}, {high:.3f}]", f"≥ {MORE:g}", low >= MORE, "D3", WHY_MORE,
            )
        )  # fmt: skip
        same = same and 1 / MORE <= low and high <= MORE
    for bias in config.memory_biases:
        tried, zero = Row(bias, TRIED_MEMORY).name, Row(bias, 0.0).name
        for task in config.tasks:
            speed = _speed(dataset, task, tried, zero)
            checks.append(
                Check(
                    f"c_0 = {TRIED_MEMORY:g} learns faster than 0: {zero}, {_titled(task, config)}",
                    f"updates × {speed}; {_solved(dataset, task, tried)} against {_solved(dataset, task, zero)} solved",
                    "< 1", speed.high < 1 if speed.told else None, "D3", WHY_FASTER,
                )
            )  # fmt: skip
            same = same and speed.low <= 1 <= speed.high
    checks.append(
        Check(
            "prediction: c_0 has no effect", "none" if same else "some",
            f"gradient within a factor {MORE:g}, intervals of updates contain 1",
            same if any(_any_solved(dataset, task) for task in config.tasks) else None,
            "D3", WHY_NOTHING, decides=False,
        )
    )  # fmt: skip
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding on each claim, with its numbers."""
    config = _config(dataset)
    parts = []
    for task in config.tasks:
        name = _titled(task, config)
        if not _any_solved(dataset, task):
            parts.append(f"no setting solves {name} within {config.updates:,} updates")
            continue
        counts = (_solved(dataset, task, row) for row in (_REFERENCE_ROW, _ZERO_ROW))
        found = "on {}, b_f = 1 solves {} and b_f = 0 {}".format(name, *counts)
        speed = _speed(dataset, task, _REFERENCE_ROW, _ZERO_ROW)
        if speed.told:
            found += f" (updates of b_f = 1 × {speed})"
        faster = _faster(dataset, task)
        quickest = min(faster, key=lambda row: faster[row].median, default="")
        found += f"; faster than 1: {', '.join(faster)}" if faster else "; nothing is faster than 1"
        if len(faster) > 1:
            found += f", most of all {quickest}"
        found += f" (× {faster[quickest]})" if faster else ""
        solved_at = dataset["solved_at"].sel(task=task)
        unsolved = [
            f"{row} ({_solved(dataset, task, row)})"
            for row in _bias_rows(config)
            if row not in (_ZERO_ROW, _REFERENCE_ROW) and np.isnan(solved_at.sel(row=row)).any()
        ]
        parts.append(found + (f"; not solved by every seed: {', '.join(unsolved)}" if unsolved else ""))
    lag = config.adding_steps
    left = dataset["log_retention_end_median"].sel(path="full", memory=0.0) / np.log(10)
    retained = ", ".join(f"{float(left.sel(forget_bias=bias)):.1f} ({bias})" for bias in config.forget_biases)
    first = (
        f"{'.  '.join(part[0].upper() + part[1:] if index else part for index, part in enumerate(parts))}.  "
        f"Decades of a gradient left after {lag} steps, untrained: {retained}.  One learning rate, "
        f"{config.learning_rate:g}, for all."
    )
    gains = {bias: _gain(dataset, bias, TRIED_MEMORY) for bias in config.forget_biases}
    more = [Row(bias, 0.0).name for bias, (_, low, _) in gains.items() if low >= MORE]
    least, most = (choose(gains, key=lambda bias: gains[bias][0]) for choose in (min, max))
    second = (
        f"untrained, a start of {TRIED_MEMORY:g} changes the gradient over {lag} steps by factors from "
        f"{gains[least][0]:.2f} ({Row(least, 0.0).name}) to {gains[most][0]:.2f} ({Row(most, 0.0).name})"
        f"{f', at least {MORE:g} with ' + ', '.join(more) if more else ''}"
    )
    learned = []
    for bias in config.memory_biases:
        for memory in config.memories:
            speeds = {
                task: _speed(dataset, task, Row(bias, memory).name, Row(bias, 0.0).name)
                for task in (config.tasks if memory != 0 else ())
            }
            told = [f"× {speed} ({_TASK_NAMES[task]})" for task, speed in speeds.items() if speed.told]
            if told:
                learned.append(f"{Row(bias, memory).name}: {', '.join(told)}")
    if learned:
        second += f".  Updates to solve a task, over those with c_0 = 0: {'; '.join(learned)}"
    return {"D2": first, "D3": second + "."}


_COLOURS = ("#16325c", "#2f7fb8", "#2a9d8f", "#b8a200", "#d97706", "#c81e4a", "#7b4ea3", "0.35")
_TASK_STYLES = {"adding": ("#16325c", "o", -0.17), "order": ("#d97706", "s", 0.17)}


def _draw_updates(axes: Any, dataset: xr.Dataset, rows: list[str], labels: list[str], config: Config) -> None:
    """Updates to solve by setting: a point for each seed, a bar at the median; unsolved ones in a band on top."""
    limit = config.updates
    top, bottom = 1.35 * limit, 0.7 * min(limit, float(np.nanmin(dataset["solved_at"].fillna(limit))) or limit)
    spread = np.linspace(-0.1, 0.1, config.seeds) if config.seeds > 1 else np.zeros(1)
    for task in config.tasks:
        colour, marker, shift = _TASK_STYLES[task]
        for place, row in enumerate(rows):
            solved_at = dataset["solved_at"].sel(task=task, row=row).values
            shown = np.where(np.isnan(solved_at), top, np.maximum(solved_at, bottom))
            label = _titled(task, config) if place == 0 else None
            axes.scatter(place + shift + spread, shown, s=22, color=colour, marker=marker, alpha=0.7, label=label)
            middle = np.sort(shown)[len(shown) // 2]
            axes.plot([place + shift - 0.15, place + shift + 0.15], [middle] * 2, color=colour, linewidth=2.5)
    axes.axhspan(1.15 * limit, 1.6 * limit, color="0.5", alpha=0.15, linewidth=0)
    axes.text(-0.95, top, "never", va="center", fontsize=9, color="0.25")
    axes.set_yscale("log")
    axes.set_ylim(bottom, 1.6 * limit)
    ticks = [tick for tick in (10, 30, 100, 300, 1000, 3000, 10000) if bottom <= tick <= limit]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlim(-1, len(rows) - 0.5)
    axes.set_ylabel("updates until solved")


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: gradient by lag, what is left at the end, updates by forget bias and by initial memory."""
    config = _config(dataset)
    drawn = matplotlib.figure.Figure(figsize=(11.5, 8.4), layout="constrained")
    (by_lag, at_end), (by_bias, by_memory) = drawn.subplots(2, 2, width_ratios=(1.25, 1))
    biases = config.forget_biases
    for bias, colour in zip(biases, _COLOURS * (1 + len(biases) // len(_COLOURS)), strict=False):
        at = dataset.sel(forget_bias=bias, path="full")
        median, low, high = (at[f"log_retention_{part}"].values / np.log(10) for part in ("median", "low", "high"))
        label = bias if bias in SCHEMES else f"b_f = {bias}"
        style = "--" if bias in SCHEMES else "-"
        by_lag.plot(dataset["lag"], median, style,
                    color=colour, label=label)  # fmt: skip
        by_lag.fill_between(dataset["lag"], low, high, color=colour, alpha=0.15, linewidth=0)
    by_lag.set_xlabel("lag (steps)")
    by_lag.set_ylabel("log10 of ‖∂c_T/∂c_{T−lag}‖, lag 0 = 0")
    by_lag.set_title("untrained: gradient that comes back, whole chain", fontsize=11)
    by_lag.legend(fontsize=9, frameon=False, loc="lower left", ncols=2)

    places = np.arange(len(biases))
    for path, colour, marker, shift in (("full", "#16325c", "o", -0.12), ("direct", "#d97706", "^", 0.12)):
        at = dataset.sel(path=path, memory=0.0)
        median, low, high = (at[f"log_retention_end_{part}"].values / np.log(10) for part in ("median", "low", "high"))
        label = "whole chain" if path == "full" else "direct path ∏f"
        at_end.errorbar(places + shift, median, (median - low, high - median), fmt=marker, color=colour, capsize=3,
                        label=label)  # fmt: skip
    at_end.set_xticks(places, biases)
    at_end.set_xlabel("forget bias b_f")
    at_end.set_ylabel(f"log10 at lag {config.adding_steps}")
    at_end.set_title("untrained: what is left at the longest lag", fontsize=11)
    at_end.legend(fontsize=9, frameon=False, loc="lower right")

    _draw_updates(by_bias, dataset, _bias_rows(config), list(biases), config)
    by_bias.set_xlabel("forget bias b_f (c_0 = 0)")
    by_bias.set_title("trained: one point per seed, bar at the median", fontsize=11)
    starts = [Row(bias, memory) for bias in config.memory_biases for memory in config.memories]
    labels = [f"{row.memory:g}\n{Row(row.bias, 0.0).name}" for row in starts]
    _draw_updates(by_memory, dataset, [row.name for row in starts], labels, config)
    by_memory.set_xlabel("start of the memory c_0, and forget bias")
    by_memory.set_title("trained: start of the memory", fontsize=11)
    for axes in (by_lag, at_end, by_bias, by_memory):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = by_bias.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    drawn.suptitle(
        "Is 1 the forget bias to start an LSTM with, and does a memory that starts at 0.1 help?\n"
        f"N={config.hidden_size}, Adam {config.learning_rate:g}; {config.fresh_seeds} untrained networks (median, 95 % "
        f"interval), {config.seeds} trained ones per setting and task",
        fontsize=11,
    )
    return drawn


ABOUT = """Is 1 the forget bias to start an LSTM with, and does a memory that starts at 0.1 help?

Measures the gradient that fresh weights let through at every forget bias, then trains the same weights on adding and on
temporal order until they are solved; prints a table with medians and intervals, and writes a figure and a netCDF
file."""

CAPTION = """Top: gradient of an untrained LSTM's memory by lag, whole chain, for every forget bias, and at the longest
lag beside its direct path.  Bottom: updates until adding and temporal order are solved, a point for each seed, by
forget bias and by the start c_0 of the memory; unsolved seeds in the grey band."""

EXPERIMENT = command.Experiment(
    name="forget_bias",
    about=ABOUT,
    claims=CLAIMS,
    default=Config(),
    smoke=SMOKE,
    run=run,
    table=table,
    verdict=verdict,
    summary=summary,
    pictures=(command.Picture("", CAPTION, figure),),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
