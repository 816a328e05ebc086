"""Trains one cell on one task and watches, while it learns, how far back its gradient reaches.

``python -m experiments.train --task adding --cell lstm --steps 750``

The question: does the network solve the task, and does the last step's gradient reach back as far as the task asks?
Each seed draws weights and data.  Held-out loss and accuracy come from batches that are drawn once; the monitor stores
retention by lag, shares by gate and the clip fraction as training goes on.  A run that is interrupted, also by a kill,
resumes with the same command and ends with the numbers of an undisturbed one.  Where there are several devices, of this
process or of those that ``--coordinator`` brings together, every batch is split over them; the numbers are then those
of one device up to rounding.

Solved means, on held-out data: adding, mean squared error below 0.01; copy, loss below a tenth of the memoryless one;
temporal order and agreement, 99 % of the answers right; digits, 95 %.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, learning, results
from experiments.command import UserError
from experiments.learning import CellName, LogName, OptimizerName, Preset, Unit

TaskName = Literal["adding", "copy", "temporal_order", "agreement", "digits"]
InitName = Literal["torch", "flax", "equinox", "keras", "haiku", "gaussian", "orthogonal", "identity"]

SOLVED_ACCURACY = {"temporal_order": 0.99, "agreement": 0.99, "digits": 0.95}
"""99 %: Pascanu et al. 2013 for temporal order, and this project's number for agreement.  Digits are few (1,797)."""
SOLVED_MSE = 0.01
"""This project's number for adding; a prediction is then off by 0.1 where chance is off by 0.4."""
HELD_OUT_DIGITS = 180
"""Images in the validation part of rg.tasks.digits."""
SOLVED_SHARE = 0.1
"""Of the memoryless loss, for copy: what a network reaches only by recalling most symbols."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a training run."""

    task: TaskName = "adding"
    """adding; copy (recall 10 symbols after a delay); temporal_order (which symbols came, in which order); agreement
    (was or were); digits (rows or pixels of 8 × 8 images, needs scikit-learn)."""
    cell: CellName = "lstm"
    """The cell; an IndRNN is bounded for T steps."""
    steps: int = 100
    """Length T of a sequence; of copy, the delay; of agreement, the largest distance between subject and verb.  Digits
    have 8 rows or 64 pixels whatever this says."""
    symbols: Literal[2, 3] = 2
    """Of temporal_order: relevant symbols per sequence, for 4 or 8 classes."""
    attractors: int = 2
    """Of agreement: nouns between subject and verb, from none to so many."""
    order: Literal["rows", "pixels"] = "rows"
    """Of digits: one row of 8 pixels per step, or one pixel."""
    hidden_size: int = 128
    """Units N of each layer."""
    layers: int = 1
    """Layers, one above the other."""
    init: InitName = "torch"
    """Initialisation: a library's default, or a scheme at gain 1; an LRU draws in its own way."""
    forget_bias: str | None = None
    """Effective forget bias (of a GRU: of the share kept): a number, chrono (up to T steps), chrono:LAG, or ugi."""
    optimizer: OptimizerName = "adam"
    """Update rule."""
    learning_rate: float = 1e-3
    """Learning rate, constant."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; None for no clipping."""
    clip_unit: Unit = "mean_per_token"
    """Unit of --clip: the gradient of the loss per token that counts, or summed over the steps that count."""
    batch_size: int = 50
    """Sequences per update."""
    updates: int = 5_000
    """Updates at the most."""
    until: Literal["end", "solved"] = "end"
    """Stop after all updates, or at the first evaluation that finds the task solved."""
    patience: int | None = None
    """Stop after so many evaluations without a lower held-out loss."""
    eval_every: int = 100
    """Updates between evaluations."""
    eval_sequences: int = 1_000
    """Held-out sequences; rounded up to whole batches."""
    monitor_every: int = 100
    """Updates between two looks of the gradient-flow monitor."""
    checkpoint_every: int = 500
    """Updates between checkpoints."""
    logs: tuple[LogName, ...] = ("tensorboard",)
    """Where records go beside log.jsonl."""
    seeds: int = 1
    """Independent runs, one after the other."""
    first_seed: int = 0
    """Seeds run from here."""


MAY_CHANGE = ("updates", "until", "patience", "logs", "seeds", "first_seed")
"""Settings that may differ when a run is resumed: all others make another run."""

_CHRONO_PAPER = "Tallec & Ollivier 2018, arXiv 1804.11188: N = 128, RMSprop 1e-3 with average 0.9, no clipping"
PRESETS = {
    "adding-100": Preset(
        Config(until="solved", updates=10_000, clip=1.0),
        "this project: solved by LSTM and GRU in minutes on two cores, not by --cell vanilla",
    ),
    "adding-750": Preset(
        Config(steps=750, optimizer="rmsprop", clip=None, forget_bias="1", updates=60_000),
        f"{_CHRONO_PAPER}; T = 750, forget bias 1; batch size and number of updates ours",
    ),
    "adding-750-chrono": Preset(
        Config(steps=750, optimizer="rmsprop", clip=None, forget_bias="chrono", updates=60_000),
        "the same with chrono:750",
    ),
    "adding-indrnn": Preset(
        Config(cell="indrnn", steps=500, layers=2, learning_rate=2e-4, clip=None, updates=60_000),
        "Li et al. 2018, arXiv 1803.04831: 2 layers of N = 128, Adam 2e-4, batch 50, |u| ≤ 2^(1/T); T = 500",
    ),
    "copy-100": Preset(
        Config(task="copy", optimizer="rmsprop", clip=None, forget_bias="1", updates=10_000, eval_sequences=500),
        f"{_CHRONO_PAPER}; a shorter delay than theirs, batch size and number of updates ours",
    ),
    "copy-100-chrono": Preset(
        Config(
            task="copy", optimizer="rmsprop", clip=None, forget_bias="chrono:150", updates=10_000, eval_sequences=500
        ),
        "the same with chrono up to 3T/2 as in the paper's copy task",
    ),
    "copy-500-chrono": Preset(
        Config(
            task="copy",
            steps=500,
            optimizer="rmsprop",
            clip=None,
            forget_bias="chrono:750",
            updates=60_000,
            eval_sequences=500,
        ),
        f"{_CHRONO_PAPER}; delay 500, chrono:750",
    ),
    "temporal-order-100": Preset(
        Config(
            task="temporal_order",
            cell="vanilla",
            hidden_size=50,
            init="gaussian",
            optimizer="sgd",
            learning_rate=0.01,
            clip=1.0,
            batch_size=20,
            updates=100_000,
            until="solved",
        ),
        "Pascanu et al. 2013, arXiv 1211.5063, and its published code: tanh, N = 50, SGD 0.01, clipping at 1, batch "
        "20; weights here from N(0, 1/N), there from N(0, 0.1²); without Ω",
    ),
    "agreement": Preset(
        Config(task="agreement", steps=20, updates=3_000),
        "this project: “The cats, which …, were”; compare --cell vanilla, lstm, gru",
    ),
    "digits": Preset(
        Config(task="digits", updates=3_000, hidden_size=64),
        "this project; 64 pixels one by one with --order pixels",
    ),
}


def smoke(config: Config) -> Config:
    """Returns the configuration shrunk to a few seconds: every code path, no statement about the task."""
    return dataclasses.replace(
        config,
        steps=min(config.steps, 20),
        hidden_size=8,
        batch_size=10,
        updates=40,
        eval_every=20,
        eval_sequences=20,
        monitor_every=10,
        checkpoint_every=20,
        until="end",
        seeds=2,
    )


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = dict.fromkeys(
        ("steps", "hidden_size", "layers", "batch_size", "updates", "eval_every", "eval_sequences", "monitor_every"), 1
    )
    command.check_at_least(config, {**least, "checkpoint_every": 1, "patience": 1, "seeds": 1})
    learning.check_seeds("--first-seed", config.first_seed, config.seeds)
    learning.check_positive(config, ("learning_rate", "clip"))
    learning.forget_bias(config.forget_bias, config.steps)


def build_task(config: Config) -> tuple[Any, Any]:
    """Returns the task of the training batches, and that of the held-out ones; the same but for digits."""
    with command.user_input():
        if config.task == "digits":
            try:
                train, valid = (rg.tasks.digits(split=split, order=config.order) for split in ("train", "valid"))
            except ModuleNotFoundError as error:
                raise UserError(str(error)) from error
            return train, valid
        makers = {
            "adding": lambda: rg.tasks.adding(config.steps),
            "copy": lambda: rg.tasks.copy_memory(config.steps),
            "temporal_order": lambda: rg.tasks.temporal_order(config.steps, num_symbols=config.symbols),
            "agreement": lambda: rg.tasks.agreement(
                distance=(rg.tasks.shortest_distance(config.attractors), config.steps),
                num_attractors=(0, config.attractors),
            ),
        }
        task = makers[config.task]()
        return task, task


def solved_by(task: TaskName, baseline: float) -> tuple[str, float]:
    """Returns which held-out number decides, and its bound: ``("loss", 0.01)`` or ``("accuracy", 0.99)``."""
    if task == "adding":
        return "loss", SOLVED_MSE
    if task == "copy":
        return "loss", SOLVED_SHARE * baseline
    return "accuracy", SOLVED_ACCURACY[task]


def is_solved(evaluation: Any, measure: str, bound: float) -> bool:
    """Returns whether an evaluation finds the task solved."""
    value = evaluation[measure]
    return value is not None and (value <= bound if measure == "loss" else value >= bound)


def _loss(kind: str) -> Any:
    """Returns the loss of a task, per token that counts."""
    if kind == "mse":
        return lambda output, batch: rg.losses.mse(output.outputs, batch.targets, batch.mask)
    return lambda output, batch: rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)


def _accuracy(output: Any, batch: Any) -> Any:
    return rg.losses.accuracy(output.outputs, batch.targets, batch.mask)


def build_model(config: Config, task: Any) -> Any:
    """Returns the network: layers of one cell between the task's input and its outputs."""
    length = config.steps if config.task != "digits" else {"rows": 8, "pixels": 64}[config.order]
    with command.user_input():
        cells = [
            learning.build_cell(
                config.cell,
                task.input_size if index == 0 else config.hidden_size,
                config.hidden_size,
                init=config.init,
                bias=config.forget_bias,
                steps=length,
            )
            for index in range(config.layers)
        ]
        return rg.training.model(cells, task.output_size)


def draw(task: Any, key: Any, batch_size: int) -> Any:
    """Returns a batch of a task; ids become one-hot vectors, as in the papers, and W their embedding."""
    batch = task.batch(key, batch_size)
    if task.vocabulary_size is None:
        return batch
    return batch._replace(inputs=jax.nn.one_hot(batch.inputs, task.vocabulary_size, dtype="float32"))


class Problem(NamedTuple):
    """What all seeds of a run share."""

    train: Any
    """Task of the training batches."""
    held_out: Any
    """Task of the held-out ones."""
    model: Any
    loss: Callable[..., Any]
    optimizer: Any


def _shared(config: Config) -> Config:
    """Returns the configuration with the settings that make no difference to a network at their defaults."""
    return dataclasses.replace(config, **{name: getattr(Config, name) for name in MAY_CHANGE})


@functools.cache
def build_problem(config: Config) -> Problem:
    """Returns tasks, network, loss and optimizer; the same for the same configuration, so that it is compiled once.

    Raises:
      UserError: settings that do not fit together.
    """
    train_task, held_out_task = build_task(config)
    with command.user_input():
        batch = draw(train_task, jax.random.key(0), config.batch_size)
    optimizer = learning.build_optimizer(
        config.optimizer,
        config.learning_rate,
        clip=config.clip,
        clip_unit=config.clip_unit,
        loss_unit="mean_per_token",
        num_steps=round(float(batch.mask.sum()) / config.batch_size),
    )
    return Problem(train_task, held_out_task, build_model(config, train_task), _loss(train_task.loss), optimizer)


def _train_seed(config: Config, problem: Problem, seed: int, folder: Path, screen: rich.console.Console) -> xr.Dataset:
    """Returns the history of one seed, trained or resumed."""
    task, model, loss = problem.train, problem.model, problem.loss
    key_params, key_train, key_held_out = jax.random.split(jax.random.key(seed), 3)
    batch_at = jax.jit(lambda step: draw(task, jax.random.fold_in(key_train, step), config.batch_size))
    if config.task == "digits":  # every held-out image once
        held_out = [draw(problem.held_out, key_held_out, HELD_OUT_DIGITS)]
    else:
        keys = jax.random.split(key_held_out, -(-config.eval_sequences // config.batch_size))
        held_out = [draw(problem.held_out, key, config.batch_size) for key in keys]
    metrics = {} if task.loss == "mse" else {"accuracy": _accuracy}
    measure, bound = solved_by(config.task, task.baseline)
    identity = {name: value for name, value in command.config_dict(config).items() if name not in MAY_CHANGE}
    identity["seed"] = seed
    solved = lambda evaluation: is_solved(evaluation, measure, bound)
    trained = learning.train(
        folder,
        model,
        loss,
        problem.optimizer,
        batch_at,
        key=key_params,
        batch_size=config.batch_size,
        updates=config.updates,
        identity=identity,
        evaluate=rg.training.evaluator(model, loss, held_out, metrics=metrics),
        eval_every=config.eval_every,
        monitor_every=config.monitor_every,
        checkpoint_every=config.checkpoint_every,
        logs=config.logs,
        title=f"{config.task}, {config.cell}, seed {seed}",
        screen=screen,
        patience=config.patience,
        should_stop=lambda progress: config.until == "solved" and solved(progress.evaluation),
    )
    dataset = learning.history(
        trained.records,
        loss_unit="1" if task.loss == "mse" else "nats",
        reach=lambda update: learning.longest_lag(batch_at(update - 1)),
    )
    losses = dataset["loss"].values
    at = np.flatnonzero([solved({measure: value}) for value in dataset[measure].values])
    if config.task == "agreement":
        dataset["accuracy_by_distance"] = accuracy_by_distance(config, problem, trained.best_params, key_held_out)
    return dataset.assign(
        best_loss=((), np.nanmin(losses)),
        best_update=((), int(dataset["update"][int(np.nanargmin(losses))])),
        final_loss=((), losses[-1]),
        solved_update=((), int(dataset["update"][at[0]]) if len(at) else -1),
        updates=((), int(dataset["update"][-1])),
    ).assign_attrs(
        num_parameters=trained.num_parameters,
        num_devices=trained.num_devices,
        seconds=trained.seconds,
        seconds_per_update=trained.seconds / max(trained.step, 1),
    )


DISTANCES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Where the agreement task's accuracy is taken, in units of the longest distance trained on."""


def accuracy_by_distance(config: Config, problem: Problem, params: Any, key: Any) -> xr.DataArray:
    """Returns the share of verbs that agree, for sentences with one distance between subject and verb each."""
    shortest = rg.tasks.shortest_distance(config.attractors)
    distances = sorted({max(shortest, round(share * config.steps)) for share in DISTANCES})
    found = []
    for distance in distances:
        task = rg.tasks.agreement(distance=distance, num_attractors=(0, config.attractors))
        batch = draw(task, jax.random.fold_in(key, distance), config.eval_sequences)
        evaluate = rg.training.evaluator(problem.model, problem.loss, [batch], metrics={"accuracy": _accuracy})
        found.append(evaluate(params)["accuracy"])
    attrs = {"units": "1", "description": "held-out accuracy by distance of subject and verb, best parameters"}
    return xr.DataArray(found, {"distance": distances}, "distance", attrs=attrs)


_DESCRIPTIONS = {
    "best_loss": "lowest held-out loss",
    "best_update": "where it was found",
    "final_loss": "held-out loss of the last evaluation",
    "solved_update": "first evaluation that found the task solved; −1 for none",
    "updates": "updates made",
}


def run(config: Config, folder: Path, screen: rich.console.Console | None = None) -> xr.Dataset:
    """Returns the histories of all seeds; checkpoints and logs go to ``folder``, and are resumed from there.

    Raises:
      UserError: settings that cannot be used, or a folder that holds another run.
      OSError: the folder cannot be written to.
      NonFiniteLossError: training diverged.
    """
    check(config)
    # seeds have folders of their own, the result is one: a new seed would not meet the others' checkpoints
    learning.check_result(folder / "train.nc", "train", config, MAY_CHANGE)
    screen = screen or rich.console.Console(quiet=True)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    problem = build_problem(_shared(config))
    runs = [_train_seed(config, problem, seed, folder / f"seed-{seed}", screen) for seed in seeds]
    dataset = xr.concat([one.drop_attrs(deep=False) for one in runs], dim="seed", join="outer")
    dataset = dataset.assign_coords(seed=list(seeds))
    loss_unit = runs[0]["loss"].attrs["units"]
    for name, text in _DESCRIPTIONS.items():
        dataset[name].attrs.update(units=loss_unit if "loss" in name else "updates", description=text)
    baseline = float(problem.train.baseline)
    measure, bound = solved_by(config.task, baseline)
    label = {"adding": "mean squared error", "copy": "cross-entropy (nats per step)"}
    baselines = {"adding": "predicting the mean", "copy": "memoryless"}
    dataset.attrs = results.provenance(
        experiment="train",
        command=f"python -m experiments.train {command.flags(config)}".strip(),
        config=command.config_dict(config),
        dtype="float32",
        matmul_precision=learning.matmul_precision(),
        title=f"{title(config)}, {config.seeds} seed{'s' if config.seeds > 1 else ''}",
        loss_label=label.get(config.task, "cross-entropy (nats)"),
        loss_scale="log",
        held_out="held out",
        baseline=baseline,
        baseline_name=baselines.get(config.task, "chance"),
        solved_measure=measure,
        solved_bound=bound,
        solved_loss=bound if measure == "loss" else None,
        num_parameters=runs[0].attrs["num_parameters"],
        num_devices=runs[0].attrs["num_devices"],
        seconds=round(sum(one.attrs["seconds"] for one in runs), 1),
        seconds_per_update=float(np.median([one.attrs["seconds_per_update"] for one in runs])),
    )
    return dataset


# --- what a person sees ----------------------------------------------------------------------------------------------


def title(config: Config) -> str:
    """Returns the run in words."""
    length = {"digits": config.order}.get(config.task, f"T={config.steps}")
    bias = "" if config.forget_bias is None else f", forget bias {config.forget_bias}"
    layers = "" if config.layers == 1 else f"{config.layers} layers, "
    return f"{config.task}, {length}: {config.cell}, {layers}N={config.hidden_size}{bias}, {config.optimizer}"


def run_name(config: Config) -> str:
    """Returns the name of a run's folder."""
    length = config.order if config.task == "digits" else str(config.steps)
    bias = "" if config.forget_bias is None else f"-{config.forget_bias.replace(':', '-')}"
    return f"{config.task}-{length}-{config.cell}{bias}"


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first: one row per seed."""
    attrs = dataset.attrs
    shown = rich.table.Table(
        title=f"{attrs['title']}, {attrs['num_parameters']:,} parameters, {attrs['dtype']}, {attrs['backend']}",
        caption=f"held-out {attrs['loss_label']}; baseline: {attrs['baseline_name']}; horizon: first lag at which less "
        f"than {learning.KEPT:.0%} of the last step's gradient is left, at the monitor's last look, by layer from the "
        f"input up; clipped: share of all updates; {1e3 * attrs['seconds_per_update']:.1f} ms per update, all told",
        title_justify="left",
        caption_justify="left",
    )
    for name in (
        "seed",
        "updates",
        "best loss",
        "final loss",
        "baseline",
        "accuracy",
        "solved at",
        "horizon",
        "clipped",
    ):
        shown.add_column(name, justify="right")
    for index in range(dataset.sizes["seed"]):
        row = dataset.isel(seed=index)
        accuracy = f"{learning.last(row['accuracy']):.2%}" if "accuracy" in row else "—"
        solved = int(row["solved_update"])
        shown.add_row(
            str(int(row["seed"])),
            f"{int(row['updates']):,}",
            f"{float(row['best_loss']):.4g}",
            f"{float(row['final_loss']):.4g}",
            f"{attrs['baseline']:.4g}",
            accuracy,
            "—" if solved < 0 else f"{solved:,}",
            learning.horizons(row),
            f"{learning.last(row['clip_fraction']):.1%}" if "clip_fraction" in row else "—",
        )
    return shown


def summary(dataset: xr.Dataset) -> str:
    """Returns the result in one sentence."""
    attrs, at = dataset.attrs, dataset["solved_update"].values
    at = at[at >= 0]
    kind, bound = (
        ("loss ≤", f"{attrs['solved_bound']:.3g}")
        if attrs["solved_measure"] == "loss"
        else (
            "accuracy ≥",
            f"{attrs['solved_bound']:.0%}",
        )
    )
    by_distance = ""
    if "accuracy_by_distance" in dataset:
        accuracy = dataset["accuracy_by_distance"].median("seed")
        listed = ", ".join(f"{float(value):.1%} at {int(value['distance'])}" for value in accuracy)
        by_distance = f"  Verbs that agree, by distance from the subject (trained up to {_steps(attrs)}): {listed}."
    if not len(at):
        return f"Not solved by any of {dataset.sizes['seed']} (held-out {kind} {bound}).{by_distance}"
    when = f"after {int(np.median(at)):,} updates" + (" (median)" if len(at) > 1 else "")
    return f"Solved by {len(at)} of {dataset.sizes['seed']} {when} (held-out {kind} {bound}).{by_distance}"


def _steps(attrs: Mapping[str, Any]) -> int:
    return int(json.loads(attrs["config"])["steps"])


ABOUT = """Trains a recurrent network on a task and watches how far back its gradient reaches while it learns.

Shows a progress bar and a table, and writes into one folder: the result (netCDF), a figure with the learning curve, the
heat map of retention over lag and update and the shares by gate, a log (JSON lines), TensorBoard events and
checkpoints.  The same command resumes what was interrupted."""

DRIVER = learning.Driver("train", ABOUT, run, run_name, table, summary, PRESETS, smoke)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    learning.main(DRIVER, Config(), arguments)


if __name__ == "__main__":
    main()
