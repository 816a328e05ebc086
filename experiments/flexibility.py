"""Is the LSTM more flexible than the GRU, and the GRU simpler?

Simpler is tried as fewer parameters and less time for a forward and backward pass at the same number of units N.  More
flexible is tried as being ahead on tasks: solving with more seeds, or after fewer updates.  The tasks are adding (keep
two numbers), temporal order (which came first), copy (keep several symbols) and counting, on which a theory says that
the LSTM is ahead: its memory is unbounded, the GRU's lies between −1 and 1.  Counting is asked once more over sequences
four times as long as those trained on.  The LSTM is compared with a GRU of the same N and with one of as many
parameters.

All networks of a task see the same batches at the same learning rate, one at which both cells learn the adding problem.
A network that does not solve a task counts with all its updates, the least it can have needed, so that a ratio of
updates errs towards 1.  Times are those of this machine and of its load, taken in turns; no other number depends on it.
Running time: eight minutes on two cores with the defaults.
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
from experiments.statistics import Interval, describe, interval_text, median_interval
from experiments.trials import Trainer, first_reached

CLAIMS = (
    Claim(
        "C3",
        "The LSTM is the more flexible of the two, the GRU the simpler one.",
        source="lectures on sequence models (Ng); for counting Weiss, Goldberg & Yahav 2018, arXiv 1805.04908; without "
        "a winner Chung et al. 2014, arXiv 1412.3555",
        prediction="a GRU has 3/4 of the parameters, 3N(D + N + 1) against 4N(D + N + 1), one bias more in this "
        "library, and takes less time; the GRU is ahead on adding (first runs at N = 128: 1,200 updates against "
        "3,100), the LSTM on counting at four times the length",
        refuted="a GRU with as many parameters or as much time at the same N; an LSTM that is ahead on no task",
        functions=(
            "rg.cells.lstm", "rg.cells.gru", "rg.training.count_parameters", "rg.tasks.adding",
            "rg.tasks.temporal_order", "rg.tasks.copy_memory",
        ),
        tests=("tests/test_flexibility.py", "tests/test_tasks.py", "tests/test_contract.py"),
    ),
)  # fmt: skip

TaskName = Literal["adding", "temporal_order", "copy", "counting"]
NETWORKS = ("lstm", "gru", "gru_matched")
"""gru_matched has as many parameters as the LSTM, as nearly as whole units allow."""
FARTHER = 4
"""Counting is asked again over sequences so many times as long."""
SOLVED_MSE = 0.01
"""Adding: as in experiments.train; counting: of a variance of 1."""
SOLVED_ACCURACY = 0.99
SOLVED_SHARE = 0.1
"""Of the memoryless loss, for copy, as in experiments.train."""
ENOUGH_UPDATES, ENOUGH_REPEATS = 1_000, 5
"""A run with fewer cannot tell."""
WHY_SIMPLER = "three blocks of weights against four; equal would be a ratio of 1"
WHY_FASTER = "three blocks of products against four; equal would be a ratio of 1"
WHY_AHEAD = "ahead means fewer updates to a solution with the same batches; equal would be a ratio of 1"
WHY_FARTHER = "|h| < 1 bounds a GRU's count, nothing that of an LSTM (arXiv 1805.04908); equal would be a ratio of 1"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    tasks: tuple[TaskName, ...] = ("adding", "temporal_order", "copy", "counting")
    """Tasks that both cells are trained on."""
    adding_steps: int = 100
    """T of the adding problem."""
    order_steps: int = 60
    """T of temporal order."""
    copy_delay: int = 5
    """Delay of copy."""
    copy_length: int = 2
    """Symbols to be copied, out of 8 kinds."""
    counting_steps: int = 50
    """T of counting."""
    hidden_size: int = 32
    """Units N of the LSTM and of the first GRU in training."""
    learning_rate: float = 3e-3
    """Of Adam, behind clipping at a norm of 1."""
    batch_size: int = 32
    """Sequences per update."""
    updates: int = 5_000
    """Updates at the most; training ends once the task is solved, but for counting."""
    eval_every: int = 50
    """Updates between evaluations on 500 sequences."""
    timed_sizes: tuple[int, ...] = (64, 256)
    """Units N of the cells that are timed, T = 50, B = 32, D = N."""
    repeats: int = 60
    """Timings of each, taken in turns."""
    seeds: int = 5
    """Independent repetitions of training."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    tasks=("counting",), counting_steps=10, hidden_size=4, batch_size=4, updates=20, eval_every=10,
    timed_sizes=(4,), repeats=3, seeds=2,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim."""

_EVALUATED = 500
_TIMED_STEPS, _TIMED_BATCH = 50, 32


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    names = (
        "copy_delay", "copy_length", "counting_steps", "hidden_size", "batch_size", "updates", "eval_every",
        "repeats", "seeds",
    )  # fmt: skip
    command.check_at_least(config, {**dict.fromkeys(names, 1), "adding_steps": 2, "order_steps": 10, "first_seed": 0})
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"--tasks: expected different tasks, at least one, found {config.tasks}")
    sizes = config.timed_sizes
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise UserError(f"--timed-sizes: expected sizes of at least 1, rising, found {sizes}")
    if config.updates % config.eval_every:
        raise UserError(f"--updates: expected a multiple of {config.eval_every}, found {config.updates}")
    if not (np.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UserError(f"--learning-rate: expected a positive number, found {config.learning_rate:g}")


# --- sizes


def lstm_parameters(input_size: int, hidden_size: int) -> int:
    """Returns 4N(D + N + 1).

    >>> lstm_parameters(2, 32)
    4480
    """
    return 4 * hidden_size * (input_size + hidden_size + 1)


def gru_parameters(input_size: int, hidden_size: int) -> int:
    """Returns 3N(D + N + 1) + N: with a second bias inside of the reset, as in all libraries.

    >>> gru_parameters(2, 32)
    3392
    """
    return 3 * hidden_size * (input_size + hidden_size + 1) + hidden_size


def matched_size(input_size: int, hidden_size: int) -> int:
    """Returns the units of the GRU whose number of parameters is nearest to that of an LSTM.

    >>> matched_size(2, 32)
    37
    """
    wanted = lstm_parameters(input_size, hidden_size)
    return min(range(1, 2 * hidden_size + 2), key=lambda size: abs(gru_parameters(input_size, size) - wanted))


@functools.cache
def _cell(network: str, input_size: int, hidden_size: int) -> rg.Cell:
    """Returns a cell of the comparison; ``hidden_size`` is the LSTM's."""
    if network == "lstm":
        return rg.cells.lstm(input_size, hidden_size)
    size = matched_size(input_size, hidden_size) if network == "gru_matched" else hidden_size
    return rg.cells.gru(input_size, size)


def _num_parameters(cell: rg.Cell) -> int:
    return rg.training.count_parameters(jax.eval_shape(cell.init, jax.random.key(0)))


# --- time


@functools.cache
def _pass(cell: rg.Cell) -> Callable[..., Any]:
    """Returns a forward and backward pass, jitted: the gradient of a loss that reads every step."""

    def loss(params, state, xs):
        return jnp.mean(jnp.square(rg.unroll(cell, params, state, xs).states.h))

    return jax.jit(jax.grad(loss))


def _measure_time(size: int, config: Config) -> xr.Dataset:
    """Returns seconds per time step of every network at one N, taken in turns so that all see the same load."""
    cells = [_cell(network, size, size) for network in NETWORKS]
    xs = jax.random.normal(jax.random.key(0), (_TIMED_STEPS, _TIMED_BATCH, size), jnp.float32)
    calls = [
        functools.partial(_pass(cell), cell.init(jax.random.key(1)), cell.init_state((_TIMED_BATCH,)), xs)
        for cell in cells
    ]
    for call in calls:
        jax.block_until_ready(call())
    seconds = np.empty((len(calls), config.repeats), np.float32)
    for repeat in range(config.repeats):
        for index, call in enumerate(calls):
            started = time.perf_counter()
            jax.block_until_ready(call())
            seconds[index, repeat] = (time.perf_counter() - started) / _TIMED_STEPS
    return xr.Dataset(
        {
            "seconds": (("network", "repeat"), seconds),
            "timed_parameters": ("network", [_num_parameters(cell) for cell in cells]),
        }
    )


# --- tasks


def counting(num_steps: int, scale: float) -> rg.tasks.Task:
    """Returns the task to tell, at the last step, how many more a than b there were, divided by ``scale``.

    Letters a, b, c are equally likely, so that the count has variance 2T/3: with scale √(2T/3), the baseline is 1.

    >>> import jax
    >>> batch = counting(4, 1.0).batch(jax.random.key(0), 2)
    >>> more = (batch.inputs == 0).sum(0) - (batch.inputs == 1).sum(0)
    >>> batch.targets[-1, :, 0].astype(int).tolist() == more.tolist()
    True
    """

    def batch(key, batch_size):
        letters = jax.random.randint(key, (num_steps, batch_size), 0, 3, jnp.int32)
        count = jnp.sum((letters == 0).astype(jnp.float32) - (letters == 1).astype(jnp.float32), axis=0)
        mask = jnp.zeros((num_steps, batch_size), jnp.float32).at[-1].set(1.0)
        return rg.tasks.Batch(letters, jnp.zeros((num_steps, batch_size, 1)).at[-1, :, 0].set(count / scale), mask)

    return rg.tasks.Task("counting", 3, 1, 3, "mse", 2 * num_steps / 3 / scale**2, batch)


class _Problem(NamedTuple):
    task: rg.tasks.Task
    farther: rg.tasks.Task | None
    """The same over longer sequences."""


@functools.cache
def _problem(name: TaskName, config: Config) -> _Problem:
    if name == "counting":
        scale = math.sqrt(2 * config.counting_steps / 3)
        return _Problem(counting(config.counting_steps, scale), counting(FARTHER * config.counting_steps, scale))
    tasks = {
        "adding": lambda: rg.tasks.adding(config.adding_steps),
        "temporal_order": lambda: rg.tasks.temporal_order(config.order_steps),
        "copy": lambda: rg.tasks.copy_memory(config.copy_delay, length=config.copy_length),
    }
    return _Problem(tasks[name](), None)


def _draw(task, key, batch_size):
    batch = task.batch(key, batch_size)
    if task.vocabulary_size is None:
        return batch
    return batch._replace(inputs=jax.nn.one_hot(batch.inputs, task.vocabulary_size, dtype="float32"))


def _mse(output, batch):
    return rg.losses.mse(output.outputs, batch.targets, batch.mask)


def _cross_entropy(output, batch):
    return rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)


@functools.cache
def _trainer(name: TaskName, network: str, config: Config) -> Trainer:
    """Returns what trains one network on one task; it measures a score that is at most 1 where the task is solved."""
    task, farther = _problem(name, config)
    model = rg.training.model([_cell(network, task.input_size, config.hidden_size)], task.output_size)
    loss = _mse if task.loss == "mse" else _cross_entropy

    def score(output, batch):
        if name == "temporal_order":
            return (1 - rg.losses.accuracy(output.outputs, batch.targets, batch.mask)) / (1 - SOLVED_ACCURACY)
        return loss(output, batch) / (SOLVED_SHARE * task.baseline if name == "copy" else SOLVED_MSE)

    def measure(params, key):
        def of(what):
            batch = _draw(what, key, _EVALUATED)
            return score(model.apply(params, model.init_state((_EVALUATED,)), batch.inputs), batch)

        return {"score": of(task), "farther": jnp.float32(jnp.nan) if farther is None else of(farther)}

    return Trainer(
        model,
        loss,
        optax.chain(rg.remedies.clip_by_global_norm(1.0), optax.adam(config.learning_rate)),
        lambda key, step: _draw(task, jax.random.fold_in(key, step), config.batch_size),
        measure,
        batch_size=config.batch_size,
    )


def _measure_trial(name: TaskName, network: str, seed: int, config: Config) -> xr.Dataset:
    """Returns the dataset of one trained network."""
    problem = _problem(name, config)
    trial = _trainer(name, network, config).run(
        jax.random.key(seed),
        updates=config.updates,
        eval_every=config.eval_every,
        # what is asked farther is trained to the end, for the first solution is a coarse one
        until=lambda measured: problem.farther is None and bool(measured["score"] <= 1),
    )
    scores, farther = trial.measured["score"], trial.measured["farther"]
    last = np.flatnonzero(~np.isnan(scores))[-1]
    cell = _cell(network, problem.task.input_size, config.hidden_size)
    return xr.Dataset(
        {
            "score": ("evaluation", scores.astype(np.float32)),
            "farther_error": ((), np.float32(farther[last] * SOLVED_MSE)),
            "solved_update": ((), first_reached(trial.updates, scores <= 1)),
            "failed_at": ((), trial.failed_at),
            "parameters": ((), _num_parameters(cell)),
        }
    )


MEASURED = (
    "score",
    "farther_error",
    "solved_update",
    "failed_at",
    "parameters",
    "seconds",
    "timed_parameters",
)
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "score": ("1", "held-out loss (temporal order: share of wrong answers) over the largest that counts as solved"),
    "farther_error": (
        "1",
        f"counting: mean squared error over sequences {FARTHER} times as long, where the variance is {FARTHER}",
    ),
    "solved_update": ("updates", "first evaluation that found the task solved; NaN for none"),
    "failed_at": ("updates", "first update that was not finite; −1 for none"),
    "parameters": ("1", "weights and biases of the cell, without the read-out"),
    "seconds": ("s", "time of a forward and backward pass per time step, T = 50, B = 32, D = N"),
    "timed_parameters": ("1", "weights and biases of the timed cell"),
    "needed": ("updates", "solved_update, and where a task is not solved all the updates that there were"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with the updates that each network needed at least."""
    most = float(dataset["evaluation"][-1])
    return describe(dataset.assign(needed=dataset["solved_update"].fillna(most)), _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished sizes and networks are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    seeds = list(range(config.first_seed, config.first_seed + config.seeds))
    rows = [(task, network, seed) for task in config.tasks for network in NETWORKS for seed in seeds]
    pieces = [
        Piece(f"time-{size}", f"time at N = {size}", functools.partial(_measure_time, size, config))
        for size in config.timed_sizes
    ] + [
        Piece(
            f"{task}-{network}-seed-{seed}",
            f"{task}, {network}, seed {seed}",
            functools.partial(_measure_trial, task, network, seed, config),
        )
        for task, network, seed in rows
    ]
    found = command.measure(pieces, parts=parts, screen=screen)
    timed, trials = xr.concat(found[: len(config.timed_sizes)], dim="size"), iter(found[len(config.timed_sizes) :])
    trained = xr.concat(
        [
            xr.concat([xr.concat([next(trials) for _ in seeds], dim="seed") for _ in NETWORKS], dim="network")
            for _ in config.tasks
        ],
        dim="task",
    )
    trained["parameters"] = trained["parameters"].isel(seed=0)
    dataset = timed.merge(trained).assign_coords(
        size=list(config.timed_sizes),
        network=list(NETWORKS),
        task=list(config.tasks),
        seed=seeds,
        evaluation=np.arange(0, config.updates + 1, config.eval_every),
    )
    dataset.attrs = command.provenance("flexibility", config, seconds=time.perf_counter() - started)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_TASKS = {
    "adding": "adding",
    "temporal_order": "temporal order",
    "copy": "copy",
    "counting": "counting",
}
_NETWORKS = {"lstm": "LSTM", "gru": "GRU, same N", "gru_matched": "GRU, same parameters"}
_RIVALS = ("gru", "gru_matched")


def _config(dataset: xr.Dataset) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(dataset.attrs["config"])
    return config


def _time_ratio(dataset: xr.Dataset, size: int, network: str) -> Interval:
    """Time over that of the LSTM just before."""
    seconds = dataset["seconds"].sel(size=size)
    return median_interval((seconds.sel(network=network) / seconds.sel(network="lstm")).values, axis=0)


def _ahead(dataset: xr.Dataset, task: str, rival: str, name: str = "needed") -> Interval:
    """The LSTM's number over that of a GRU, seed by seed."""
    values = dataset[name].sel(task=task)
    return median_interval((values.sel(network="lstm") / values.sel(network=rival)).values, axis=0)


def _solved(dataset: xr.Dataset, task: str, network: str) -> int:
    return int((~np.isnan(dataset["solved_update"].sel(task=task, network=network))).sum())


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = _config(dataset)
    shown = rich.table.Table(
        title=f"LSTM and GRU on the same tasks: N={config['hidden_size']}, at most {config['updates']:,} updates of "
        f"{config['batch_size']} sequences, {config['seeds']} seeds, {dataset.attrs['dtype']}, "
        f"{dataset.attrs['backend']}",
        caption="updates: median over seeds, those that do not solve a task with all they had "
        f"[{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]; LSTM / GRU: ratio of updates, seed by seed; "
        f"farther: mean squared error at {FARTHER} times the length, where the variance is {FARTHER}",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("task", "network", "parameters", "solved", "updates", "LSTM / GRU", "farther", "failed"):
        shown.add_column(name, justify="left" if name in ("task", "network") else "right")
    for task in dataset["task"].values:
        for network in NETWORKS:
            row = dataset.sel(task=task, network=network)
            farther = row["farther_error"].values
            shown.add_row(
                _TASKS[str(task)] if network == "lstm" else "",
                _NETWORKS[network],
                f"{int(row['parameters']):,}",
                f"{_solved(dataset, task, network)} of {row.sizes['seed']}",
                interval_text(median_interval(row["needed"].values, axis=0), ",.0f"),
                "—" if network == "lstm" else interval_text(_ahead(dataset, task, network)),
                "—" if np.isnan(farther).any() else interval_text(median_interval(farther, axis=0), ".2g"),
                f"{int((row['failed_at'] >= 0).sum())}",
            )
    return shown


def _simpler_checks(dataset: xr.Dataset) -> list[Check]:
    config, checks = _config(dataset), []
    # a verdict on both halves of the claim or on none
    trained = config["updates"] >= ENOUGH_UPDATES
    enough = trained and config["repeats"] >= ENOUGH_REPEATS
    for size in dataset["size"].values:
        counts = dataset["timed_parameters"].sel(size=size)
        ratio = float(counts.sel(network="gru") / counts.sel(network="lstm"))
        checks.append(
            Check(
                f"the GRU is simpler, parameters: N = D = {size}",
                f"{int(counts.sel(network='gru')):,} / {int(counts.sel(network='lstm')):,} = {ratio:.3f}",
                "< 1",
                ratio < 1 if trained else None,
                "C3",
                WHY_SIMPLER,
            )
        )
    for size in dataset["size"].values:
        interval = _time_ratio(dataset, size, "gru")
        holds = bool(interval.high < 1) if enough else None
        name = f"the GRU is simpler, time of a pass: N = D = {size}"
        checks.append(Check(name, interval_text(interval), "< 1", holds, "C3", WHY_FASTER))
    return checks


def _flexible_checks(dataset: xr.Dataset) -> list[Check]:
    enough = _config(dataset)["updates"] >= ENOUGH_UPDATES
    checks = []
    for task in map(str, dataset["task"].values):
        for rival in _RIVALS:
            interval = _ahead(dataset, task, rival)
            solved = max(_solved(dataset, task, network) for network in ("lstm", rival))
            holds = bool(interval.high < 1) if enough and solved else None
            name = f"the LSTM is ahead: {_TASKS[task]}, {_NETWORKS[rival]}"
            checks.append(Check(name, f"updates {interval_text(interval)}", "< 1", holds, "C3", WHY_AHEAD))
    if "counting" in dataset["task"].values:
        for rival in _RIVALS:
            interval = _ahead(dataset, "counting", rival, "farther_error")
            holds = bool(interval.high < 1) if enough else None
            name = f"the LSTM is ahead: counting {FARTHER} times as far, {_NETWORKS[rival]}"
            checks.append(Check(name, f"error {interval_text(interval)}", "< 1", holds, "C3", WHY_FARTHER))
    return checks


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks of both halves of the claim, then predictions."""
    checks = [*_simpler_checks(dataset), *_flexible_checks(dataset)]
    predict = functools.partial(Check, claim="C3", decides=False)
    for size in map(int, dataset["size"].values):
        counts = dataset["timed_parameters"].sel(size=size)
        found = {name: int(counts.sel(network=name)) for name in ("lstm", "gru")}
        expected = {"lstm": lstm_parameters(size, size), "gru": gru_parameters(size, size)}
        checks.append(
            predict(
                f"prediction: parameters by formula, N = D = {size}",
                f"{found['lstm']:,} and {found['gru']:,}",
                f"{expected['lstm']:,} and {expected['gru']:,}",
                found == expected,
                why="4N(D + N + 1), and 3N(D + N + 1) + N with the second bias",
            )
        )
    enough = _config(dataset)["updates"] >= ENOUGH_UPDATES
    if "adding" in dataset["task"].values:
        interval = _ahead(dataset, "adding", "gru")
        checks.append(
            predict(
                "prediction: the GRU is ahead on adding",
                f"updates {interval_text(interval)}",
                "> 1",
                bool(interval.low > 1) if enough else None,
                why="first runs at N = 128: 3,100 updates against 1,200",
            )
        )
    failed = int((dataset["failed_at"] >= 0).sum())
    checks.append(
        predict(
            "side condition: training stays finite",
            f"{failed} of {dataset['failed_at'].size} failed",
            "0",
            failed == 0,
            why="a network that failed counts as one that does not solve its task",
        )
    )
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    every = verdict(dataset)
    sizes = [int(size) for size in dataset["size"].values]
    counts = dataset["timed_parameters"]
    ratios = [float(counts.sel(size=size, network="gru") / counts.sel(size=size, network="lstm")) for size in sizes]
    times = [interval_text(_time_ratio(dataset, size, "gru")) for size in sizes]
    sentence = (
        f"simpler: the GRU has {', '.join(f'{ratio:.3f}' for ratio in ratios)} of the LSTM's parameters and takes "
        f"{', '.join(times)} of its time at N = {', '.join(map(str, sizes))}."
    )
    if _config(dataset)["updates"] < ENOUGH_UPDATES:
        return {"C3": sentence + "  More flexible: this run was too short to tell."}
    ahead = [check for check in every if check.name.startswith("the LSTM is ahead: ") and check.holds is not None]
    won = [check.name.partition(": ")[2] for check in ahead if check.holds]
    sentence += f"  More flexible: the LSTM is ahead in {len(won)} of {len(ahead)} comparisons"
    sentence += f" ({'; '.join(won)})." if won else "."
    behind = [
        f"{_TASKS[task]}, {_NETWORKS[rival]} ({interval_text(_ahead(dataset, task, rival))} times the GRU's updates)"
        for task in map(str, dataset["task"].values)
        for rival in _RIVALS
        if _ahead(dataset, task, rival).low > 1
    ]
    sentence += f"  It is behind in {'; '.join(behind)}." if behind else ""
    solved = [
        f"{_TASKS[task]} {', '.join(str(_solved(dataset, task, network)) for network in NETWORKS)}"
        for task in map(str, dataset["task"].values)
    ]
    sentence += (
        f"  Seeds of {dataset.sizes['seed']} that solve a task (LSTM; GRU of the same N; of as many parameters): "
        f"{'; '.join(solved)}."
    )
    return {"C3": sentence}


_STYLES = {
    "lstm": {"color": "#16325c", "linestyle": "-"},
    "gru": {"color": "#0e9f8e", "linestyle": "--"},
    "gru_matched": {"color": "#d97706", "linestyle": "-."},
}


def _draw_task(axes: Any, dataset: xr.Dataset, task: str) -> None:
    for network in NETWORKS:
        at = dataset.sel(task=task, network=network)
        for seed in at["score"].transpose("seed", "evaluation").values:
            axes.plot(at["evaluation"], seed, linewidth=1, alpha=0.8, **_STYLES[network])
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    solved = [_solved(dataset, task, network) for network in NETWORKS]
    axes.set_title(f"{_TASKS[task]}: solved by {', '.join(map(str, solved))} of {dataset.sizes['seed']}", fontsize=11)
    axes.set_xlabel("updates")
    axes.set_ylabel("held-out error\nover the one that counts as solved")


def _draw_ratios(axes: Any, labels: list[str], rows: list[tuple[str, list[tuple[float, float, float]]]]) -> None:
    """Draws ratios with their intervals, a row each, against 1."""
    for index, (network, intervals) in enumerate(rows):
        for place, (median, low, high) in enumerate(intervals):
            axes.errorbar(
                median, place + 0.2 * (index - (len(rows) - 1) / 2), xerr=[[median - low], [high - median]], fmt="o",
                color=_STYLES[network]["color"], capsize=3, markersize=5, label=None if place else _NETWORKS[network],
            )  # fmt: skip
    axes.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _draw_simpler(axes: Any, dataset: xr.Dataset) -> None:
    labels, rows = [], {network: [] for network in _RIVALS}  # type: ignore[var-annotated]
    for size in map(int, dataset["size"].values):
        labels += [f"parameters, N = {size}", f"time, N = {size}"]
        for network in _RIVALS:
            counts = dataset["timed_parameters"].sel(size=size)
            ratio = float(counts.sel(network=network) / counts.sel(network="lstm"))
            rows[network] += [(ratio, ratio, ratio), tuple(map(float, _time_ratio(dataset, size, network)))]
    _draw_ratios(axes, labels, list(rows.items()))
    axes.set_xlabel("GRU over LSTM (left: the GRU is simpler)")
    axes.set_title("simpler?", fontsize=11)


def _draw_ahead(axes: Any, dataset: xr.Dataset) -> None:
    tasks = [str(task) for task in dataset["task"].values]
    labels = [f"{_TASKS[task]}: updates" for task in tasks]
    rows = [(rival, [tuple(map(float, _ahead(dataset, task, rival))) for task in tasks]) for rival in _RIVALS]
    if "counting" in tasks:
        labels.append(f"counting,\n{FARTHER} times as far: error")
        for rival, intervals in rows:
            intervals.append(tuple(map(float, _ahead(dataset, "counting", rival, "farther_error"))))
    _draw_ratios(axes, labels, rows)  # type: ignore[arg-type]
    axes.set_xscale("log")
    least, most = axes.get_xlim()
    least, most = min(least, 0.4), max(most, 2.5)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if least <= tick <= most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(least, most)
    axes.set_xlabel("LSTM over GRU (left: the LSTM is ahead)")
    axes.set_title("more flexible?", fontsize=11)


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: ratios that decide both halves of the claim, and the learning curves behind them."""
    config, tasks = _config(dataset), [str(task) for task in dataset["task"].values]
    columns = 3
    lines = -(-(len(tasks) + 2) // columns)
    drawn = matplotlib.figure.Figure(figsize=(13, 4.1 * lines), layout="constrained")
    places = list(drawn.subplots(lines, columns, squeeze=False).flat)
    _draw_simpler(places[0], dataset)
    _draw_ahead(places[1], dataset)
    for axes, task in zip(places[2:], tasks, strict=False):
        _draw_task(axes, dataset, task)
    for axes in places[len(tasks) + 2 :]:
        axes.set_visible(False)
    for axes in places:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    lines_of = [places[-1].plot([], [], label=_NETWORKS[network], **_STYLES[network])[0] for network in NETWORKS]
    drawn.legend(lines_of, list(_NETWORKS.values()), loc="outside lower center", ncols=3, frameon=False)
    drawn.suptitle(
        "Is the GRU simpler than the LSTM, and the LSTM more flexible than the GRU?\n"
        f"trained at N={config['hidden_size']}, {config['seeds']} seeds, a line each (solved: LSTM, GRU, larger GRU); "
        "ratios: medians and their 95 % intervals",
        fontsize=11,
    )
    return drawn


ABOUT = """Is the LSTM more flexible than the GRU, and the GRU simpler?

Counts parameters, times a forward and backward pass, and trains the LSTM, a GRU of the same N and one of as many
parameters on the same tasks; prints a table with the updates that each needed, and writes a figure and a netCDF
file."""

CAPTION = """First, parameters and time of a GRU over those of an LSTM; then updates that the LSTM needed over those
of a GRU, task by task, and its error at counting four times as far; the other panels show the learning curves of
every seed."""

EXPERIMENT = command.Experiment(
    name="flexibility",
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
