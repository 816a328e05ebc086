"""Do clipping and the regulariser Ω solve the temporal-order task, and up to which length?

A tanh network of the paper's size sees two relevant symbols among distractors and names, at the last step, which came
and in which order.  It is trained by plain SGD, with the gradient clipped at norm 1, with clipping and Ω, and, which
the paper does not have, with clipping and Adam; every method starts from the same weights and sees the same batches.
For every length it counts the seeds that reach 99 % of held-out sequences right.

As in the paper and its published program: N = 50, batch 20, SGD at 0.01, clipping at norm 1, symbols as one-hot
vectors, every weight from N(0, 0.1²) and no bias.  The program weighs the mean over steps of (r² − 1)² by 2, r the
ratio of norms whose (r − 1)² make up Ω; near r = 1 the first is four times the second, so α = 8 here, times Ω/T.
What differs is patience: the program allows 5,000,000 updates, this experiment some thousand, and a length that no
method learns in them says nothing about the paper.
Running time: twelve minutes on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import optax
import rich.console
import rich.table
import scipy.stats
import xarray as xr

import rnngrad as rg
from experiments import command, results, trials
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import CONFIDENCE, describe, median_interval, summarise

CLAIMS = (
    Claim(
        "E1",
        "With the regulariser Ω and clipping, a tanh network trained by SGD solves temporal order for sequences of up "
        "to 200 steps.",
        source="Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, section 4.1, and their published program",
        prediction="within some thousand updates: all seeds at 20 and 50 steps, fewer at 100; without Ω and clipping "
        "fewer seeds than with them from 50 steps on",
        refuted="at some length a seed does not solve it with Ω and clipping (here: within the updates given)",
        functions=(
            "rg.remedies.pascanu_omega",
            "rg.remedies.clip_by_global_norm",
            "rg.tasks.temporal_order",
            "rg.training.train_step",
        ),
        tests=(
            "tests/test_temporal_order.py",
            "tests/test_remedies.py::test_omega_equals_explicit_jacobians",
            "tests/test_remedies.py::test_omega_has_the_immediate_derivative",
            "tests/test_tasks.py::test_temporal_order_is_the_published_one_at_100_steps",
        ),
    ),
)

RECIPES = ("SGD", "SGD, clipped", "SGD, clipped, Ω", "Adam, clipped")
CLAIMED = RECIPES[2]
CLAIMED_LENGTHS = (50, 100, 150, 200)
"""Of the lengths that the paper reports, 50 to 200."""
SOLVED = 0.99
"""Share of held-out answers that are right."""
FEWEST_UPDATES = 2_000
"""In a first run the shortest length, 20, took so many."""
WHY_SOLVED = "the paper: every run with both solves all lengths, that is, errs in less than 1 % of new sequences"
WHY_UNTRIED = "an update takes in proportion to T, and longer sequences take more updates: hours on two cores"
WHY_NEEDED = "the paper adds Ω because SGD, clipped or not, fails on the longer sequences; none of its rates is used"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison of methods."""

    lengths: tuple[int, ...] = (20, 30, 50, 100)
    """Lengths T of a sequence, rising."""
    hidden_size: int = 50
    """Units N."""
    scale: float = 0.1
    """Standard deviation of every weight before the first update; biases start at 0."""
    learning_rate: float = 0.01
    """Of SGD, constant."""
    adam_learning_rate: float = 1e-3
    """Of Adam, its usual one."""
    max_norm: float = 1.0
    """Largest norm of the gradient where it is clipped."""
    alpha: float = 8.0
    """Weight of Ω per step, Ω/T."""
    batch_size: int = 20
    """Sequences per update."""
    updates: int = 18_000
    """Updates at the most, a multiple of --eval-every."""
    eval_every: int = 500
    """Updates between evaluations; a trial ends at the first one that finds the task solved."""
    eval_sequences: int = 1_000
    """Held-out sequences of an evaluation."""
    seeds: int = 5
    """Independent repetitions; each draws weights and batches, the same for every method."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(lengths=(10,), hidden_size=8, batch_size=4, updates=20, eval_every=10, eval_sequences=20, seeds=2)
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    sizes = ("hidden_size", "batch_size", "updates", "eval_every", "eval_sequences", "seeds")
    command.check_at_least(config, {**dict.fromkeys(sizes, 1), "first_seed": 0})
    lengths = config.lengths
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 10:
        raise UserError(f"--lengths: expected whole numbers from 10 on, rising, found {lengths}")
    if config.updates % config.eval_every:
        raise UserError(f"--updates: expected a multiple of --eval-every {config.eval_every}, found {config.updates}")
    for name in ("scale", "learning_rate", "adam_learning_rate", "max_norm", "alpha"):
        if not 0 < getattr(config, name) < np.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, found {getattr(config, name)}")


def _draw(task: Any, key: Any, batch_size: int) -> Any:
    """Returns a batch with one-hot inputs."""
    batch = task.batch(key, batch_size)
    return batch._replace(inputs=jax.nn.one_hot(batch.inputs, task.vocabulary_size, dtype="float32"))


def _loss(output: Any, batch: Any) -> Any:
    return rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)


@functools.cache
def _trainer(steps: int, recipe: str, config: Config) -> trials.Trainer:
    """Returns what trains every seed of one length and method."""
    task = rg.tasks.temporal_order(steps)
    cell = rg.cells.vanilla(task.input_size, config.hidden_size)
    model = rg.training.model([cell], task.output_size)
    readout = rg.readout(config.hidden_size, task.output_size)

    def penalty(params, state, batch):
        loss = lambda states: rg.losses.cross_entropy(
            readout.apply(params.readout, states.h), batch.targets, batch.mask
        )
        omega = rg.remedies.pascanu_omega(cell, params.layers[0], state[0], batch.inputs, loss)
        return omega * (config.alpha / steps)

    def measure(params, key):
        batch = _draw(task, key, config.eval_sequences)
        output = model.apply(params, model.init_state((config.eval_sequences,)), batch.inputs)
        return {"loss": _loss(output, batch), "accuracy": rg.losses.accuracy(output.outputs, batch.targets, batch.mask)}

    step = optax.adam(config.adam_learning_rate) if recipe.startswith("Adam") else optax.sgd(config.learning_rate)
    return trials.Trainer(
        model,
        _loss,
        optax.chain(rg.remedies.clip_by_global_norm(config.max_norm), step) if "clipped" in recipe else step,
        lambda key, index: _draw(task, jax.random.fold_in(key, index), config.batch_size),
        measure,
        batch_size=config.batch_size,
        penalty=penalty if "Ω" in recipe else None,
    )


def _first_weights(steps: int, config: Config, key: Any) -> Any:
    """Returns the weights before the first update: N(0, scale²), biases 0."""
    task = rg.tasks.temporal_order(steps)
    model = rg.training.model([rg.cells.vanilla(task.input_size, config.hidden_size)], task.output_size)
    params = model.init(key)  # for its shapes
    leaves, structure = jax.tree.flatten(params)
    drawn = [
        config.scale * jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
        if leaf.ndim > 1
        else jnp.zeros_like(leaf)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


MEASURED = ("accuracy", "loss", "train_loss", "grad_norm", "clip_fraction", "failed_at")
"""Variables that a run measures; all others follow from them."""


def _measure_trial(steps: int, recipe: str, seed: int, config: Config) -> xr.Dataset:
    """Returns the dataset of one trained network."""
    shared = dataclasses.replace(config, lengths=(steps,), seeds=1, first_seed=0)  # one compiled program for all seeds
    key_weights, key_trial = jax.random.split(jax.random.key(seed))
    trial = _trainer(steps, recipe, shared).run(
        key_trial,
        updates=config.updates,
        eval_every=config.eval_every,
        params=_first_weights(steps, config, key_weights),
        until=lambda measured: float(measured["accuracy"]) >= SOLVED,
    )
    return trials.history(trial)[list(MEASURED)].astype(np.float32)


_DESCRIPTIONS = {
    "accuracy": ("1", "share of held-out sequences named right; NaN after a trial that ended early"),
    "loss": ("nats", "held-out cross-entropy"),
    "train_loss": ("nats", "mean loss of the updates since the evaluation before, without Ω"),
    "grad_norm": ("1", "mean global norm of their gradients, Ω included, before clipping"),
    "clip_fraction": ("1", "share of them that were clipped"),
    "failed_at": ("updates", "the update that was not finite; −1 for none"),
    "best": ("1", "highest share of held-out sequences named right"),
    "solved_at": ("updates", "first evaluation with 99 % of held-out sequences right; inf for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with what the verdict reads: best accuracy and moment of success, medians and intervals."""
    accuracy = dataset["accuracy"]
    dataset["best"] = accuracy.max(trials.EVALUATED)
    at = np.where(accuracy.values >= np.float32(SOLVED), dataset[trials.EVALUATED].values, np.inf)
    dataset["solved_at"] = (dataset["best"].dims, at.min(axis=accuracy.get_axis_num(trials.EVALUATED)))
    summarise(dataset, ("best",), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished trials are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    grid = [(steps, recipe, seed) for steps in config.lengths for recipe in RECIPES for seed in seeds]
    pieces = [
        Piece(
            f"length-{steps}-recipe-{RECIPES.index(recipe)}-seed-{seed}",
            f"T = {steps}, {recipe}, seed {seed}",
            functools.partial(_measure_trial, steps, recipe, seed, config),
        )
        for steps, recipe, seed in grid
    ]
    measured = dict(zip(grid, command.measure(pieces, parts=parts, screen=screen), strict=True))
    dataset = xr.concat(
        [
            xr.concat(
                [xr.concat([measured[steps, recipe, seed] for seed in seeds], dim="seed") for recipe in RECIPES],
                dim="recipe",
            )
            for steps in config.lengths
        ],
        dim="length",
    ).assign_coords(length=list(config.lengths), recipe=list(RECIPES), seed=np.array(seeds))
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance("temporal_order", config, seconds=seconds)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _successes(row: xr.Dataset) -> tuple[int, int]:
    """Seeds that solved the task, and seeds; one that failed has not solved it."""
    at = row["solved_at"].values
    return int(np.isfinite(at).sum()), at.size


def _when(row: xr.Dataset) -> str:
    at = row["solved_at"].values
    at = at[np.isfinite(at)]
    return f"{np.median(at):,.0f}" if len(at) else "—"


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first: a row per length and method."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"Temporal order, tanh network, N={config['hidden_size']}, batch {config['batch_size']}, weights "
        f"N(0, {config['scale']:g}²), {config['updates']:,} updates at most, {config['seeds']} seeds, "
        f"{dataset.attrs['dtype']}, {dataset.attrs['backend']}",
        caption=f"solved: {SOLVED:.0%} of held-out sequences right; best accuracy: median over seeds "
        f"[{100 * dataset.attrs['confidence']:.0f} % bootstrap interval], chance 25 %; updates: median of the seeds "
        "that solved it; clipped: share of updates, median",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("T", "method", "solved", "updates", "best accuracy", "clipped", "failed"):
        shown.add_column(name, justify="left" if name == "method" else "right")
    for length in dataset["length"].values:
        for recipe in RECIPES:
            row = dataset.sel(length=length, recipe=recipe)
            solved, seeds = _successes(row)
            median, low, high = (float(row[f"best_{part}"]) for part in ("median", "low", "high"))
            clipped = float(row["clip_fraction"].mean(trials.EVALUATED).median()) if "clipped" in recipe else None
            shown.add_row(
                str(length),
                recipe,
                f"{solved} of {seeds}",
                _when(row),
                f"{median:.1%} [{low:.1%}, {high:.1%}]",
                "—" if clipped is None else f"{clipped:.0%}",
                str(int((row["failed_at"] >= 0).sum())),
            )
    return shown


def _counts(dataset: xr.Dataset, length: int) -> dict[str, tuple[int, int]]:
    return {recipe: _successes(dataset.sel(length=length, recipe=recipe)) for recipe in RECIPES}


def _solves(counts: dict[str, tuple[int, int]], updates: int) -> bool | None:
    """Whether Ω and clipping solve a length within the updates; None where these are too few for any length."""
    solved, seeds = counts[CLAIMED]
    if solved < seeds and updates < FEWEST_UPDATES:
        return None
    return solved == seeds


_SAID = dict(zip(RECIPES, ("SGD", "clipped SGD", "clipped SGD with Ω", "clipped Adam"), strict=True))

PREDICTED_FROM = 50
"""The length from which Ω was expected to be needed."""


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns a check of the claim per length, tried or not, and whether Ω and clipping were needed there."""
    updates = json.loads(dataset.attrs["config"])["updates"]
    tried = [int(length) for length in dataset["length"].values]
    checks = []
    for length in sorted({*tried, *CLAIMED_LENGTHS}):
        name = f"Ω and clipping solve it: T = {length}"
        if length not in tried:
            checks.append(Check(name, "not tried", "every seed", None, "E1", WHY_UNTRIED))
            continue
        counts = _counts(dataset, length)
        best = median_interval(dataset["best"].sel(length=length, recipe=CLAIMED).values, axis=0)
        solved, seeds = counts[CLAIMED]
        found = f"{solved} of {seeds} seeds; best {best.median:.1%} [{best.low:.1%}, {best.high:.1%}]"
        bound = f"every seed, within {updates:,} updates"
        checks.append(Check(name, found, bound, _solves(counts, updates), "E1", WHY_SOLVED))
        if length < PREDICTED_FROM:
            continue
        less = {recipe: counts[recipe][0] for recipe in RECIPES[:2]}
        needed = None if not solved else max(less.values()) < solved
        found = "; ".join(f"{recipe}: {count}" for recipe, count in less.items())
        checks.append(
            Check(
                f"prediction: without Ω fewer seeds solve it: T = {length}",
                f"{found} of {seeds}",
                f"each < {solved}",
                needed,
                "E1",
                WHY_NEEDED,
                decides=False,
            )
        )
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding: where it is solved, and what every method did at every length."""
    updates = json.loads(dataset.attrs["config"])["updates"]
    lengths = [int(length) for length in dataset["length"].values]
    answers = {length: _solves(_counts(dataset, length), updates) for length in lengths}
    where = ", ".join(str(length) for length, holds in answers.items() if holds) or "none of the lengths tried"
    phrases = []
    for length in lengths:
        counts = _counts(dataset, length)
        said = ", ".join(
            f"{counts[recipe][0]} by {_SAID[recipe]}"
            for recipe in (CLAIMED, *(recipe for recipe in RECIPES if recipe != CLAIMED))
        )
        best = dataset["best_median"].sel(length=length)
        others = float(best.drop_sel(recipe=CLAIMED).max())
        when = _when(dataset.sel(length=length, recipe=CLAIMED))
        solved = f"solved after {when} updates" if counts[CLAIMED][0] else "not solved"
        phrases.append(
            f"T = {length}: {said}; right at best (median): {float(best.sel(recipe=CLAIMED)):.1%} with Ω ({solved}), "
            f"{others:.1%} by the best of the others"
        )
    sentence = (
        f"with Ω and clipping, every seed solves T = {where} within {updates:,} updates; the paper allows 5,000,000, "
        f"so that other lengths are not refuted.  Of {dataset.sizes['seed']} seeds: {'.  '.join(phrases)}."
    )
    untried = [str(length) for length in CLAIMED_LENGTHS if length not in lengths]
    if untried:
        sentence += f"  Not tried: {', '.join(untried)} steps."
    return {"E1": sentence}


_STYLES = {
    "SGD": {"color": "#7a7a7a", "linestyle": ":", "marker": "v"},
    "SGD, clipped": {"color": "#d97706", "linestyle": "--", "marker": "s"},
    "SGD, clipped, Ω": {"color": "#16325c", "linestyle": "-", "marker": "o"},
    "Adam, clipped": {"color": "#2f9e77", "linestyle": "-.", "marker": "^"},
}


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: accuracy of every seed as training goes on, a panel per length, and the success rates."""
    config = json.loads(dataset.attrs["config"])
    lengths = dataset["length"].values
    columns = min(len(lengths) + 1, 3)
    rows = -(-(len(lengths) + 1) // columns)
    drawn = matplotlib.figure.Figure(figsize=(3.6 * columns, 3.1 * rows + 1.4), layout="constrained")
    places = drawn.subplots(rows, columns, squeeze=False).ravel()
    for empty in places[len(lengths) + 1 :]:
        empty.remove()
    *panels, last = places[: len(lengths) + 1]
    for axes, length in zip(panels, lengths, strict=True):
        for recipe, style in _STYLES.items():
            for seed in range(dataset.sizes["seed"]):
                row = dataset.sel(length=length, recipe=recipe).isel(seed=seed)
                curve = row["accuracy"].dropna(trials.EVALUATED)
                axes.plot(curve[trials.EVALUATED], curve, color=style["color"], linestyle=style["linestyle"],
                          linewidth=1.3, alpha=0.85)  # fmt: skip
                if float(row["solved_at"]) < np.inf:
                    axes.plot(curve[trials.EVALUATED][-1:], curve[-1:], style["marker"], color=style["color"])
                if float(row["failed_at"]) >= 0:
                    axes.plot(curve[trials.EVALUATED][-1:], curve[-1:], "x", color=style["color"], markersize=9)
        axes.axhline(0.25, color="0.4", linewidth=0.8, linestyle=":")
        axes.set_ylim(0.15, 1.03)
        axes.set_xlim(0, 1.02 * config["updates"])
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        axes.set_title(f"T = {length}", fontsize=11)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("updates")
        if axes in panels[::columns]:
            axes.set_ylabel("held-out sequences named right")
    for shift, (recipe, style) in zip(np.linspace(-0.24, 0.24, len(RECIPES)), _STYLES.items(), strict=True):
        counts = [_successes(dataset.sel(length=length, recipe=recipe)) for length in lengths]
        rate = np.array([solved / seeds for solved, seeds in counts])
        interval = [scipy.stats.binomtest(*count).proportion_ci(CONFIDENCE, method="wilson") for count in counts]
        below = rate - [each.low for each in interval]
        above = np.array([each.high for each in interval]) - rate
        last.errorbar(np.arange(len(lengths)) + shift, rate, yerr=np.maximum([below, above], 0), capsize=3,
                      label=recipe, **style)  # fmt: skip
    last.set_xticks(np.arange(len(lengths)), [str(length) for length in lengths])
    last.set_xlabel("length T (steps)")
    last.set_ylim(-0.05, 1.05)
    last.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    last.set_title("seeds that solve it, 95 % interval", fontsize=11)
    for axes in (*panels, last):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    handles, labels = last.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(RECIPES), frameon=False)
    drawn.suptitle(
        "Do clipping and Ω let a tanh network learn temporal order, and at which lengths?\n"
        f"N={config['hidden_size']}, batch {config['batch_size']}, {config['seeds']} seeds, each its own curve, which "
        f"ends with a marker when {SOLVED:.0%} are right; dotted: chance; ×: not finite",
        fontsize=11,
    )
    return drawn


ABOUT = """Do clipping and the regulariser Ω solve the temporal-order task, and up to which length?

Trains tanh networks by SGD, with clipping, with clipping and Ω, and by Adam; prints how many seeds solve each length
within the updates given, and writes learning curves, success rates and a netCDF file."""

CAPTION = """Share of held-out sequences named right against updates, a panel per length, a curve per seed: SGD, with
clipping, with clipping and Ω, Adam with clipping; right, the share of seeds that solve each length."""

EXPERIMENT = command.Experiment(
    name="temporal_order",
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
