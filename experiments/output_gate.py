"""Does an L1 penalty on the output gate of an LSTM decouple its features?

The same LSTM is trained on two tasks with the penalty at several strengths, 0 among them, with the same seeds.  The
loss is task + strength · mean over time and batch of Σ_n |o_n|; at o = 1/2 the sum is N/2 = 16, so that at 1e-2 the
penalty starts as large as the loss of the adding problem without memory, 1/6.  What the claim says is taken apart:

* sparse: the share of o below 0.05 on held-out sequences rises;
* decoupled: the mean absolute correlation between units of h, over steps and sequences, falls;
* harmless: the held-out loss of the task rises by no more than a tenth of the loss of a predictor without memory.

Only the three together are the claim.  Compared are networks after equally many updates, with weights and batches that
are the same but for the penalty; 2,000 updates are enough for both tasks without penalty.

The rate of Adam falls linearly to 0.  At a constant 1e-2, with five seeds, networks that had learned agreement lost it
again, and not the same ones in two runs of the same settings: at strength 1e-4 the first found the claim to hold, the
second one seed of five without memory at the end.  The decay and the number of seeds were then set once, before any
result with them was seen.
Running time: about 5 minutes on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, Literal

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
from experiments.statistics import Interval, describe, interval_text, median_interval, summarise
from experiments.trials import Trainer

CLAIMS = (
    Claim(
        "D4",
        "An L1 penalty on the output gate makes it sparse and so decouples the features of an LSTM.",
        source="circulates as advice, without a source that we found",
        prediction="no number was known; the gate closes where h is not read, so sparsity rises, while nothing in the "
        "penalty asks units to differ: the correlation does not fall before the task suffers",
        refuted="at no strength are there more closed gates and less correlated units at a harmless cost",
        functions=("rg.remedies.output_gate_l1", "rg.retention", "rg.tasks.adding", "rg.tasks.agreement"),
        tests=(
            "tests/test_output_gate.py",
            "tests/test_remedies.py::test_output_gate_l1_is_the_mean_of_the_sums",
            "tests/test_remedies.py::test_output_gate_l1_closes_the_gate",
        ),
    ),
)

TaskName = Literal["adding", "agreement"]
CLOSED = 0.05
"""Output gates below this count as closed."""
HARMLESS = 0.1
"""Largest rise of the task's loss, as a share of the loss without memory, that counts as none."""
WHY = (
    "the claim's three parts, paired by seed with the same network trained without penalty: more closed gates, lower "
    f"correlation, and a loss that loses less than {HARMLESS:g} of what memory is worth (1/6 and ln 2)"
)
WHY_RETENTION = "∂c_T/∂c_0 has o in its gated path alone: a side condition, no part of the claim"
GRAD_CLIP = 1.0
"""Global norm at which gradients are clipped; the same for all rows."""
ATTRACTORS = (0, 3)
"""Nouns between subject and verb in the agreement task."""
SEQUENCES = 4
"""Held-out sequences over which retention is averaged."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the penalty on the output gate."""

    tasks: tuple[TaskName, ...] = ("adding", "agreement")
    """What is learned."""
    strengths: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
    """Factors of the penalty, rising from 0."""
    adding_steps: int = 30
    """Length T of the adding problem."""
    distance: int = 15
    """Steps from subject to verb in the agreement task."""
    hidden_size: int = 32
    """Units N."""
    embedding_size: int = 16
    """Width of the words' vectors in the agreement task."""
    forget_bias: float = 1.0
    """Bias of the forget gate at the start."""
    updates: int = 2_000
    """Updates, the same for all."""
    eval_every: int = 500
    """Updates between evaluations on held-out sequences."""
    batch_size: int = 20
    """Sequences of an update."""
    learning_rate: float = 1e-2
    """Of Adam at the start; it falls linearly to 0."""
    test_size: int = 500
    """Held-out sequences."""
    seeds: int = 8
    """Networks of each task and strength."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    tasks=("adding",), strengths=(0.0, 0.1), adding_steps=6, hidden_size=4, updates=4, eval_every=2, batch_size=4,
    test_size=8, seeds=2,
)  # fmt: skip
"""A few seconds: every code path but the second task, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"adding_steps": 2, "hidden_size": 2, "embedding_size": 1, "updates": 1, "eval_every": 1, "batch_size": 1}
    command.check_at_least(config, least | {"test_size": SEQUENCES, "seeds": 1, "first_seed": 0})
    strengths, rate = config.strengths, config.learning_rate
    rising = list(strengths) == sorted(set(strengths)) and np.isfinite(strengths).all()
    if len(strengths) < 2 or not rising or strengths[0] != 0:
        raise UserError(f"--strengths: expected finite numbers, rising from 0, found {strengths}")
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"--tasks: expected each name once, found {' '.join(config.tasks)}")
    if not (np.isfinite(rate) and rate > 0):
        raise UserError(f"--learning-rate: expected a positive number, found {rate:g}")
    if config.updates % config.eval_every:
        raise UserError(f"--updates: expected a multiple of --eval-every {config.eval_every}, found {config.updates}")
    with command.user_input():
        for name in config.tasks:
            _task(name, config)


@functools.cache
def _task(name: TaskName, config: Config) -> rg.tasks.Task:
    if name == "adding":
        return rg.tasks.adding(config.adding_steps)
    return rg.tasks.agreement(distance=config.distance, num_attractors=ATTRACTORS)


@functools.cache
def _model(name: TaskName, config: Config) -> rg.training.Model:
    task = _task(name, config)
    width = task.input_size if task.vocabulary_size is None else config.embedding_size
    cell = rg.cells.lstm(width, config.hidden_size, forget_bias=config.forget_bias)
    return rg.training.model([cell], task.output_size, vocabulary_size=task.vocabulary_size)


def mean_absolute_correlation(values: jax.Array) -> jax.Array:
    """Returns the mean of |correlation| over pairs of different units that are not constant; NaN without such a pair.

    Args:
      values: units on the last axis, samples on all others.
    """
    samples = values.reshape(-1, values.shape[-1])
    centred = samples - jnp.mean(samples, axis=0, keepdims=True)
    # each unit in its own scale: gates that are almost closed leave numbers whose squares would underflow
    largest = jnp.max(jnp.abs(centred), axis=0, keepdims=True)
    moves = largest > 1e-30
    unit = centred / jnp.where(moves, largest, 1)
    length = jnp.sqrt(jnp.sum(jnp.square(unit), axis=0, keepdims=True))
    unit = unit / jnp.where(moves, length, 1)
    pairs = moves & moves.T & ~jnp.eye(moves.size, dtype=bool)
    absolute = jnp.abs(jnp.matmul(unit.T, unit, precision=jax.lax.Precision.HIGHEST))
    return jnp.sum(jnp.where(pairs, absolute, 0)) / jnp.sum(pairs).astype(unit.dtype)


@functools.cache
def _trainer(name: TaskName, strength: float, config: Config) -> Trainer:
    task, model = _task(name, config), _model(name, config)

    def task_loss(output, batch):
        compare = rg.losses.mse if task.loss == "mse" else rg.losses.cross_entropy
        return compare(output.outputs, batch.targets, batch.mask)

    def loss(output, batch):
        return task_loss(output, batch) + strength * rg.remedies.output_gate_l1(output.trajectories[0].gates)

    def measure(params, key):
        batch = task.batch(key, config.test_size)
        output = model.apply(params, model.init_state((config.test_size,)), batch.inputs)
        trajectory = output.trajectories[0]
        o = trajectory.gates.o
        return {
            "task_loss": task_loss(output, batch),
            "sparsity": jnp.mean((o < CLOSED).astype(o.dtype)),
            "mean_o": jnp.mean(o),
            "correlation_h": mean_absolute_correlation(trajectory.states.h),
            "correlation_c": mean_absolute_correlation(trajectory.states.c),
        }

    def batch_at(key, step):
        return task.batch(jax.random.fold_in(key, step), config.batch_size)

    rate = optax.linear_schedule(config.learning_rate, 0.0, config.updates)
    optimizer = optax.chain(rg.remedies.clip_by_global_norm(GRAD_CLIP), optax.adam(rate))
    return Trainer(model, loss, optimizer, batch_at, measure, batch_size=config.batch_size)


@functools.partial(jax.jit, static_argnames=("model",))
def _retention(model, params, inputs):
    """Mean over sequences of log ‖∂c_T/∂c_0‖, 0 for an identity."""
    cell, x = model.layers[0], inputs if params.embedding is None else params.embedding[inputs]
    one = lambda xs: rg.retention(cell, params.layers[0], cell.init_state(), xs, of="c", wrt="c").log_norm[-1]
    return jnp.mean(jax.vmap(one, in_axes=1)(x))


def _train_row(name: TaskName, strength: float, config: Config) -> xr.Dataset:
    """Returns the trained networks of one row: every seed."""
    task, model, trainer = _task(name, config), _model(name, config), _trainer(name, strength, config)
    seeds: list[dict[str, Any]] = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        key_run, key_sequences = jax.random.split(jax.random.key(seed))
        trial = trainer.run(key_run, updates=config.updates, eval_every=config.eval_every)
        inputs = task.batch(key_sequences, SEQUENCES).inputs
        retained = float(_retention(model, trial.params, inputs))
        # after a trial that diverged there is nothing to compare
        retained = retained if trial.failed_at < 0 else np.nan
        measured = {key: values.astype(np.float32) for key, values in trial.measured.items()}
        seeds.append({**measured, "log_retention": np.float32(retained), "failed_at": trial.failed_at})
    dims = dict.fromkeys(seeds[0], ("evaluation",)) | {"log_retention": (), "failed_at": ()}
    return xr.Dataset({name: (("seed", *dims[name]), np.stack([s[name] for s in seeds])) for name in dims})


MEASURED = ("task_loss", "sparsity", "mean_o", "correlation_h", "correlation_c", "log_retention", "failed_at")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "task_loss": ("1 (adding), nats (agreement)", "held-out loss of the task, without penalty"),
    "sparsity": ("1", f"share of output gates below {CLOSED:g} on held-out sequences"),
    "mean_o": ("1", "mean of the output gates"),
    "correlation_h": ("1", "mean absolute correlation between units of h, over steps and sequences"),
    "correlation_c": ("1", "the same of the memory c"),
    "log_retention": ("nats", "log of ‖∂c_T/∂c_0‖_F over that of an identity, mean over sequences, after training"),
    "failed_at": ("updates", "update whose loss, gradient or weights were not finite; −1 for none"),
}
_COMPARED = ("task_loss", "sparsity", "correlation_h", "correlation_c")


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with medians and intervals over seeds."""
    summarise(dataset, (*_COMPARED, "log_retention"), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished rows are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    pieces = [
        Piece(
            f"{name}-{strength:g}",
            f"{name}, strength {strength:g}",
            functools.partial(_train_row, name, strength, config),
        )
        for name in config.tasks
        for strength in config.strengths
    ]
    measured = command.measure(pieces, parts=parts, screen=screen)
    each = len(config.strengths)
    of_tasks = [xr.concat(measured[i : i + each], dim="strength") for i in range(0, len(measured), each)]
    dataset = xr.concat(of_tasks, dim="task").assign_coords(
        task=list(config.tasks),
        strength=list(config.strengths),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        evaluation=np.arange(0, config.updates + 1, config.eval_every),
        baseline=("task", [_task(name, config).baseline for name in config.tasks]),
    )
    dataset.attrs = command.provenance("output_gate", config, seconds=time.perf_counter() - started)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _apart(of_task: xr.Dataset, strength: float, name: str) -> Interval:
    """Median difference from the same seed trained without penalty."""
    values = of_task[name] if name == "log_retention" else of_task[name].isel(evaluation=-1)
    return median_interval((values.sel(strength=strength) - values.sel(strength=0)).values, axis=0)


def _parts(of_task: xr.Dataset, strength: float) -> tuple[bool, bool, bool] | None:
    """Whether the penalty made it sparse, decoupled it, and did no harm; None where no seed can tell."""
    sparser, less, worse = (_apart(of_task, strength, name) for name in ("sparsity", "correlation_h", "task_loss"))
    if np.isnan([sparser.low, less.high, worse.high]).any():
        return None
    # each judged by the side of the interval that speaks against the claim
    harmless = worse.high <= HARMLESS * float(of_task["baseline"])
    return bool(sparser.low > 0), bool(less.high < 0), bool(harmless)


def _rows(dataset: xr.Dataset) -> list[tuple[str, float, xr.Dataset]]:
    """Task, strength and the task's data for every strength but 0."""
    return [
        (name, strength, dataset.sel(task=name))
        for name in dataset["task"].values.tolist()
        for strength in dataset["strength"].values.tolist()[1:]
    ]


def _has_learned(of_task: xr.Dataset) -> bool:
    """Whether the task is learned without penalty: there is memory that the penalty could harm."""
    loss = float(of_task["task_loss"].isel(evaluation=-1).sel(strength=0).median())
    return loss < 0.5 * float(of_task["baseline"])


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"L1 penalty on an LSTM's output gate: N={config['hidden_size']}, {config['updates']} updates, "
        f"{config['seeds']} seeds",
        caption=f"medians over seeds [95 % bootstrap interval] on held-out sequences after training; o < {CLOSED:g} "
        "counts as closed; |corr|: mean absolute correlation between units",
        title_justify="left",
        caption_justify="left",
    )
    for name in (
        "task",
        "strength",
        "task loss",
        "closed o",
        "|corr| of h",
        "|corr| of c",
        "log ∂c_T/∂c_0",
        "diverged",
    ):
        shown.add_column(name, justify="left" if name == "task" else "right")
    for task in dataset["task"].values.tolist():
        for strength in dataset["strength"].values.tolist():
            row = dataset.sel(task=task, strength=strength)
            last = row.isel(evaluation=-1)
            cells = [
                interval_text(Interval(*(last[f"{name}_{part}"].values for part in Interval._fields)), form)
                for name, form in zip((*_COMPARED, "log_retention"), (".4f", ".3f", ".3f", ".3f", ".1f"), strict=True)
            ]
            diverged = f"{int((row['failed_at'] >= 0).sum())} of {row.sizes['seed']}"
            shown.add_row(task, f"{strength:g}", *(text.replace(" [", "\n[") for text in cells), diverged)
    return shown


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns a deciding check for every task and strength, and what happens to retention at the largest one."""
    checks = []
    for name, strength, of_task in _rows(dataset):
        found = _parts(of_task, strength)
        value = (
            f"closed {interval_text(_apart(of_task, strength, 'sparsity'), '+.2f')}, "
            f"|corr| {interval_text(_apart(of_task, strength, 'correlation_h'), '+.3f')}, "
            f"loss {interval_text(_apart(of_task, strength, 'task_loss'), '+.4f')}"
        )
        bound = f"> 0, < 0, ≤ {HARMLESS * float(of_task['baseline']):.3f}"
        # of a task that was not learned there is nothing to harm
        holds = all(found) if found is not None and _has_learned(of_task) else None
        label = f"sparse, decoupled, harmless: {name}, strength {strength:g}"
        checks.append(Check(label, value, bound, holds, "D4", WHY))
    for name in dataset["task"].values.tolist():
        strength = float(dataset["strength"][-1])
        change = _apart(dataset.sel(task=name), strength, "log_retention")
        kept = None if np.isnan(change.low) else bool(change.low >= 0)
        label = f"the memory's retention does not fall: {name}, strength {strength:g}"
        checks.append(
            Check(label, f"{interval_text(change, '+.1f')} nats", "≥ 0", kept, "D4", WHY_RETENTION, decides=False)
        )
    return checks


_PARTS = ("more gates close", "units of h are less correlated", "the task's loss is unharmed")


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    sentences = []
    for name in dataset["task"].values.tolist():
        of_task = dataset.sel(task=name)
        strengths = dataset["strength"].values.tolist()[1:]
        if not _has_learned(of_task):
            sentences.append(f"on {name}, which was not learned without penalty, nothing can be said.")
            continue
        found = {strength: _parts(of_task, strength) for strength in strengths}
        phrases = []
        for index, part in enumerate(_PARTS):
            at = [f"{strength:g}" for strength, of in found.items() if of is not None and of[index]]
            where = "at every strength" if len(at) == len(strengths) else f"at {', '.join(at)}" if at else "at none"
            phrases.append(f"{part} {where}")
        least = min(strengths, key=lambda strength: float(_apart(of_task, strength, "correlation_h").median))
        change = _apart(of_task, least, "correlation_h")
        alone = float(of_task["correlation_h_median"].isel(evaluation=-1).sel(strength=0))
        sentences.append(
            f"on {name} {'; '.join(phrases)}; the correlation, {alone:.2f} without penalty, changes by "
            f"{interval_text(change, '+.2f')} where it changes most in the claim's favour, at {least:g}."
        )
    return {"D4": "  ".join(sentences)}


_STYLES: dict[str, dict[str, Any]] = {
    "adding": {"color": "#16325c", "marker": "o"},
    "agreement": {"color": "#d97706", "marker": "s", "linestyle": "--"},
}


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: four quantities against the strength of the penalty, a line for each task."""
    config = json.loads(dataset.attrs["config"])
    drawn = matplotlib.figure.Figure(figsize=(10.2, 7.2), layout="constrained")
    grid = drawn.subplots(2, 2).ravel()
    places = np.arange(dataset.sizes["strength"])
    titles = {
        "sparsity": ("sparse?", f"share of output gates below {CLOSED:g}"),
        "correlation_h": ("decoupled?", "mean |correlation|, units of h"),
        "task_loss": ("harmless?", "held-out loss / without memory"),
        "log_retention": ("and the memory's gradient?", "log ‖∂c_T/∂c_0‖ after training (nats)"),
    }
    for axes, (name, (title, label)) in zip(grid, titles.items(), strict=True):
        for index, task in enumerate(dataset["task"].values.tolist()):
            of_task, style = dataset.sel(task=task), _STYLES[task]
            scale = 1 / float(of_task["baseline"]) if name == "task_loss" else 1.0
            at = of_task if name == "log_retention" else of_task.isel(evaluation=-1)
            median, low, high = (scale * at[f"{name}_{part}"].values for part in Interval._fields)
            axes.plot(places, median, label=task, **style)
            axes.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
            dots = scale * at[name].transpose("strength", "seed").values
            beside = np.broadcast_to(places[:, None] + 0.06 * (2 * index - 1), dots.shape).ravel()
            axes.plot(beside, dots.ravel(), linestyle="", marker=".", markersize=5, color=style["color"], alpha=0.5)
        if name == "task_loss":
            axes.axhline(1, color="0.5", linewidth=0.8)
            axes.set_yscale("log")
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(label)
        axes.set_xticks(places, [f"{strength:g}" for strength in dataset["strength"].values])
        axes.set_xlabel("strength of the L1 penalty on o")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, title="task")
    drawn.suptitle(
        "Does an L1 penalty on the output gate decouple an LSTM's features?\n"
        f"N={config['hidden_size']}, {config['updates']} updates, {config['seeds']} seeds (dots): median and its 95 % "
        "interval",
        fontsize=11,
    )
    return drawn


ABOUT = """Does an L1 penalty on the output gate of an LSTM decouple its features?

Trains the same networks with several strengths of the penalty, and measures on held-out sequences how many gates are
closed, how correlated the units are, the loss of the task and the retention of the memory; writes a table, a figure and
a netCDF file."""

CAPTION = """Share of closed output gates, mean absolute correlation between units, held-out loss and retention of the
memory after training, against the strength of an L1 penalty on the output gate, for two tasks."""

EXPERIMENT = command.Experiment(
    name="output_gate",
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
