"""Does chrono initialisation learn copy and adding at lengths where a forget bias of 1 stalls?

Two LSTMs start from the same weights and differ in two biases alone: b_f = 1, or chrono, b_f = log U(1, M − 1) and
b_i = −b_f with M a little more than the lag that the task asks for.  Both see the same batches.  For every length it
follows the held-out loss, as a share of what a network without memory pays, until it has clearly left that level or
the updates are used up: which of the two leaves, and when.

Settings as in the paper where we know them: RMSprop with average 0.9, no clipping, 8 symbols, M = 3T/2 for copy and T
for adding.  Ours is what makes it affordable: N = 32 (128 there), 5 symbols to copy (10 there), twice the learning rate
for copy, fewer updates; and the symbols of copy are read as learned vectors, drawn from N(0, 1), not as one-hot
vectors.  In a first run with one-hot vectors (N = 64, 10 symbols, batch 32, rate 1e-3, delay 200) chrono had not left
the memoryless loss in 3 seeds and b_f = 1 not in one after 7,800 updates, which says nothing about the difference
between the two; ``--inputs one-hot`` tries that.  A trial of copy ends once it has clearly left, so that most are not
followed to a solution.
Running time: a quarter of an hour on two cores with the defaults.
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
import matplotlib.ticker
import numpy as np
import optax
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, results, trials
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, median_interval, summarise

CLAIMS = (
    Claim(
        "E2",
        "Chrono initialisation solves copy and adding at lengths where a forget bias of 1 stalls.",
        source="Tallec & Ollivier 2018, arXiv 1804.11188, section 3",
        prediction="copy after a delay of 200: chrono leaves the memoryless loss within 5,000 updates, a forget bias "
        "of 1 not at all; at a delay of 100 or less both leave it, the forget bias of 1 first",
        refuted="at no length does chrono leave the memoryless loss while a forget bias of 1 stays on it",
        functions=(
            "rg.initializers.chrono",
            "rg.tasks.copy_memory",
            "rg.tasks.adding",
            "rg.training.train_step",
        ),
        tests=(
            "tests/test_chrono.py",
            "tests/test_initializers.py::test_chrono_is_uniform_in_the_memory_it_gives",
            "tests/test_tasks.py::test_copy_baseline",
        ),
    ),
)

STARTS = ("b_f = 1", "chrono")
LEFT = {"copy": 0.98, "adding": 0.9}
"""Of the memoryless loss; see WHY_LEFT."""
SOLVED = 0.1
"""Of the memoryless loss."""
WHY_LEFT = {
    "copy": "a network without memory cannot be below 1, and losses of 320 held-out sequences at that level scatter by "
    "less than 0.002; stalls: stays above as long as chrono was given",
    "adding": "on n = 320 held-out sequences a network without memory falls below 1 by chance alone by z²/n, 0.03 at "
    "three standard deviations; stalls: stays above as long as chrono was given",
}
WHY_SOLVED = "a tenth of the memoryless loss takes recalling most symbols; the paper's curves end near 0"
WHY_PREDICTED = (
    "a first run of one seed, 10 symbols, N = 64: chrono left after 3,750 updates, b_f = 1 was at 1.0003 after 10,000"
)
PREDICTED_DELAY, PREDICTED_LEAVING = 200, 5_000
PREDICTED_REVERSED = 100
"""Delays up to this one: b_f = 1 was expected to leave first."""
WHY_REVERSED = "in the same first run at a delay of 100, b_f = 1 left before chrono"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison of two starts."""

    delays: tuple[int, ...] = (50, 100, 200)
    """Delays T of the copy task, rising."""
    adding: tuple[int, ...] = (100, 200)
    """Lengths T of the adding task, rising; none of them, the adding task is left out."""
    length: int = 5
    """Symbols to copy."""
    span: float = 1.5
    """The largest memory M that chrono draws, in units of the copy task's delay; of adding, M is the length."""
    inputs: Literal["vectors", "one-hot"] = "vectors"
    """How the symbols of copy are read: as learned vectors that start as N(0, 1), or as one-hot vectors."""
    hidden_size: int = 32
    """Units N; other weights and biases are drawn as in Torch."""
    batch_size: int = 20
    """Sequences per update."""
    learning_rate: float = 2e-3
    """Of RMSprop, constant; at this rate the shorter delays are learned."""
    adding_learning_rate: float = 1e-3
    """The same for adding."""
    updates: int = 8_000
    """Updates at the most, a multiple of --eval-every."""
    adding_updates: int = 8_000
    """The same for adding."""
    eval_every: int = 250
    """Updates between evaluations."""
    eval_sequences: int = 320
    """Held-out sequences of an evaluation."""
    until: float = 0.95
    """A trial of copy ends once its held-out loss is below this share of the memoryless one: it has clearly left.  One
    of adding ends once it is solved."""
    seeds: int = 5
    """Independent repetitions; each draws weights and batches, the same for both starts."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    delays=(5,), adding=(8,), length=2, hidden_size=8, batch_size=4, updates=40, adding_updates=20, eval_every=20,
    eval_sequences=16, seeds=2,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    sizes = ("length", "hidden_size", "batch_size", "updates", "adding_updates", "eval_every", "eval_sequences")
    command.check_at_least(config, {**dict.fromkeys((*sizes, "seeds"), 1), "first_seed": 0})
    for name, least in (("delays", 1), ("adding", 2)):
        lengths = getattr(config, name)
        if list(lengths) != sorted(set(lengths)) or min(lengths, default=least) < least:
            raise UserError(f"--{name}: expected whole numbers from {least} on, rising, found {lengths}")
    if not config.delays and not config.adding:
        raise UserError("--delays, --adding: expected a length of at least one task, found none")
    for name in ("updates", "adding_updates"):
        if getattr(config, name) % config.eval_every:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag}: expected a multiple of --eval-every {config.eval_every}, found {getattr(config, name)}"
            )
    for name in ("learning_rate", "adding_learning_rate", "span", "until"):
        if not 0 < getattr(config, name) < np.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, found {getattr(config, name)}")


def _settings(config: Config) -> list[tuple[str, int]]:
    """The tasks with their lengths."""
    return [("copy", delay) for delay in config.delays] + [("adding", length) for length in config.adding]


def _task(kind: str, steps: int, config: Config) -> Any:
    return rg.tasks.copy_memory(steps, length=config.length) if kind == "copy" else rg.tasks.adding(steps)


def _draw(task: Any, inputs: str, key: Any, batch_size: int) -> Any:
    """Returns a batch; ids stay ids only where the model has a vector of each."""
    batch = task.batch(key, batch_size)
    if task.vocabulary_size is None or inputs == "vectors":
        return batch
    return batch._replace(inputs=jax.nn.one_hot(batch.inputs, task.vocabulary_size, dtype="float32"))


def _model(task: Any, config: Config, forget_bias: Any) -> Any:
    cell = rg.cells.lstm(task.input_size, config.hidden_size, forget_bias=forget_bias)
    vocabulary_size = task.vocabulary_size if config.inputs == "vectors" else None
    return rg.training.model([cell], task.output_size, vocabulary_size=vocabulary_size)


def _loss(output: Any, batch: Any) -> Any:
    if jnp.issubdtype(batch.targets.dtype, jnp.integer):
        return rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)
    return rg.losses.mse(output.outputs, batch.targets, batch.mask)


@functools.cache
def _trainer(kind: str, steps: int, config: Config) -> trials.Trainer:
    """Returns what trains both starts of one setting: they are the same network with other numbers in it."""
    task = _task(kind, steps, config)
    model = _model(task, config, 1.0)
    draw = functools.partial(_draw, task, config.inputs)

    def measure(params, key):
        batch = draw(key, config.eval_sequences)
        output = model.apply(params, model.init_state((config.eval_sequences,)), batch.inputs)
        # of adding, the sum of two numbers varies from draw to draw: what predicting 1 costs on these sequences
        memoryless = jnp.asarray(task.baseline, jnp.float32)
        if kind == "adding":
            ones = output._replace(outputs=jnp.ones_like(output.outputs))
            memoryless = _loss(ones, batch)
        return {"share": _loss(output, batch) / memoryless}

    return trials.Trainer(
        model,
        _loss,
        optax.rmsprop(config.learning_rate if kind == "copy" else config.adding_learning_rate, decay=0.9),
        lambda key, step: draw(jax.random.fold_in(key, step), config.batch_size),
        measure,
        batch_size=config.batch_size,
    )


def _first_weights(kind: str, steps: int, start: str, config: Config, key: Any) -> Any:
    """Returns the weights before the first update; of one key, those of the two starts differ in b_f and b_i alone."""
    largest = steps * (config.span if kind == "copy" else 1.0)
    forget_bias = 1.0 if start == STARTS[0] else rg.initializers.chrono(max(largest, 2.0))
    return _model(_task(kind, steps, config), config, forget_bias).init(key)


def _updates(kind: str, config: Config) -> int:
    return config.updates if kind == "copy" else config.adding_updates


def _end(kind: str, until: float) -> float:
    """The share of the memoryless loss at which a trial ends."""
    return until if kind == "copy" else SOLVED


def _measure_trial(kind: str, steps: int, start: str, seed: int, config: Config) -> xr.Dataset:
    """Returns the dataset of one trained network."""
    shared = dataclasses.replace(config, seeds=1, first_seed=0)  # one compiled program for every seed
    key = jax.random.key(seed)
    key_weights, key_trial = jax.random.split(key)
    trial = _trainer(kind, steps, shared).run(
        key_trial,
        updates=_updates(kind, config),
        eval_every=config.eval_every,
        params=_first_weights(kind, steps, start, config, key_weights),
        until=lambda measured: float(measured["share"]) < _end(kind, config.until),
    )
    return trials.history(trial)[["share", "train_loss", "grad_norm", "failed_at"]].astype(np.float32)


MEASURED = ("share", "train_loss", "grad_norm", "failed_at")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "share": ("1", "held-out loss over that of a network without memory; NaN after a trial that ended early"),
    "train_loss": ("nats per step or 1", "mean loss of the updates since the evaluation before"),
    "grad_norm": ("1", "mean global norm of their gradients"),
    "failed_at": ("updates", "the update that was not finite; −1 for none"),
    "lowest": ("1", "lowest held-out loss of the trial, over that of a network without memory"),
    "left_at": ("updates", "first evaluation with at most 0.98 (copy) or 0.9 (adding) of that loss; inf for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with what the verdict reads: lowest loss and moment of leaving, medians and intervals."""
    share = dataset["share"]
    # a trial that failed before its first evaluation still has the one before the first update
    dataset["lowest"] = share.min(trials.EVALUATED)
    level = xr.DataArray([LEFT[kind] for kind in dataset["task"].values.tolist()], dims="setting")
    at = xr.where(share <= level, dataset[trials.EVALUATED], np.inf).transpose(*share.dims).values
    left_at = at.min(axis=share.get_axis_num(trials.EVALUATED))
    dataset["left_at"] = (dataset["lowest"].dims, left_at)
    # a failed trial that never left is no evidence of stalling
    lost = (dataset["failed_at"] >= 0) & ~(dataset["lowest"] <= level)
    dataset["lowest"], dataset["left_at"] = dataset["lowest"].where(~lost), dataset["left_at"].where(~lost)
    summarise(dataset, ("lowest",), _DESCRIPTIONS)
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
    settings, seeds = _settings(config), range(config.first_seed, config.first_seed + config.seeds)
    grid = [(kind, steps, seed, start) for kind, steps in settings for seed in seeds for start in STARTS]
    pieces = [
        Piece(
            f"{kind}-{steps}-{('one', 'chrono')[STARTS.index(start)]}-seed-{seed}",
            f"{kind}, T = {steps}, {start}, seed {seed}",
            functools.partial(_measure_trial, kind, steps, start, seed, config),
        )
        for kind, steps, seed, start in grid
    ]
    measured = dict(zip(grid, command.measure(pieces, parts=parts, screen=screen), strict=True))
    rows = []
    for kind, steps in settings:
        by_start = [
            xr.concat([measured[kind, steps, seed, start] for seed in seeds], dim="seed", join="outer")
            for start in STARTS
        ]
        rows.append(xr.concat(by_start, dim="start", join="outer"))
    dataset = xr.concat(rows, dim="setting", join="outer").assign_coords(
        setting=[f"{kind} {steps}" for kind, steps in settings],
        task=("setting", [kind for kind, _ in settings]),
        steps=("setting", [steps for _, steps in settings]),
        start=list(STARTS),
        seed=np.array(seeds),
    )
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance("chrono", config, seconds=seconds)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _given(row: xr.Dataset, config: dict[str, Any]) -> int:
    """The updates that both starts of a setting were given at the most."""
    return int(config["updates"] if str(row["task"].values) == "copy" else config["adding_updates"])


def _rates(config: dict[str, Any]) -> str:
    return f"RMSprop {config['learning_rate']:g} (adding {config['adding_learning_rate']:g})"


def _named(row: xr.Dataset) -> str:
    kind, steps = str(row["task"].values), int(row["steps"])
    return f"copy, delay {steps}" if kind == "copy" else f"adding, T = {steps}"


def _left(row: xr.Dataset, start: str) -> np.ndarray:
    """When each seed left, inf for never; seeds that failed are left out."""
    at = row["left_at"].sel(start=start).values
    return at[~np.isnan(at)]


def _lowest(row: xr.Dataset, start: str) -> tuple[float, float, float]:
    interval = median_interval(row["lowest"].sel(start=start).values, axis=0)
    return float(interval.median), float(interval.low), float(interval.high)


def _when(at: np.ndarray) -> str:
    """When the middle seed left."""
    if not len(at):
        return "every seed failed"
    return f"{_middle(at):,.0f}" if np.isfinite(_middle(at)) else "never"


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first: a row per setting and start."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"LSTM, N={config['hidden_size']}, batch {config['batch_size']}, {_rates(config)}, "
        f"no clipping, {config['length']} symbols to copy, {config['seeds']} seeds, {dataset.attrs['dtype']}, "
        f"{dataset.attrs['backend']}",
        caption="lowest: held-out loss over the memoryless one, median over seeds "
        f"[{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]; left: at most {LEFT['copy']:g}, of adding "
        f"{LEFT['adding']:g}; a trial of copy ends below {config['until']:g}, one of adding below {SOLVED:g}",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("task", "start", "lowest", "left", "left after (median)", "updates at most", "failed"):
        shown.add_column(name, justify="left" if name in ("task", "start") else "right")
    for index in range(dataset.sizes["setting"]):
        row = dataset.isel(setting=index)
        for start in STARTS:
            at = _left(row, start)
            median, low, high = _lowest(row, start)
            shown.add_row(
                _named(row),
                start,
                f"{median:.3f} [{low:.3f}, {high:.3f}]",
                f"{np.isfinite(at).sum()} of {len(at)}",
                _when(at),
                f"{_given(row, config):,}",
                str(int((row["failed_at"].sel(start=start) >= 0).sum())),
            )
    return shown


def _separates(row: xr.Dataset) -> bool | None:
    """Whether chrono leaves the memoryless loss and b_f = 1 does not; None where the run cannot tell."""
    (one, one_low, _), (chrono, _, chrono_high) = (_lowest(row, start) for start in STARTS)
    if np.isnan(one) or np.isnan(chrono):
        return None
    # each judged by the side of its interval that speaks against the claim
    level = LEFT[str(row["task"].values)]
    chrono_leaves, one_stays = chrono_high <= level, one_low > level
    if not chrono_leaves and one_stays:
        return None  # neither learned: a longer run might say more
    return bool(chrono_leaves and one_stays)


def _solves(row: xr.Dataset) -> bool | None:
    """Whether chrono solves the task and b_f = 1 does not; None where the run cannot tell."""
    (one, one_low, _), (chrono, _, chrono_high) = (_lowest(row, start) for start in STARTS)
    if np.isnan(one) or np.isnan(chrono) or chrono_high > SOLVED:
        return None  # a longer run might say more
    return bool(one_low > SOLVED)


def _middle(at: np.ndarray) -> float:
    """When the middle seed left, inf for never."""
    return float(np.sort(at)[len(at) // 2])


def _predictions(row: xr.Dataset) -> list[Check]:
    """The checks of what was predicted of a delay."""
    name, delay = _named(row), int(row["steps"])
    one, chrono = (_left(row, start) for start in STARTS)
    if not len(one) or not len(chrono):
        return []
    if delay == PREDICTED_DELAY:
        holds: bool | None = _middle(chrono) <= PREDICTED_LEAVING
        bound = f"≤ {PREDICTED_LEAVING:,} updates"
        what, value, why = f"prediction: chrono has left, {name}", f"after {_when(chrono)}", WHY_PREDICTED
    elif delay <= PREDICTED_REVERSED:
        # two that never left say nothing about who is first
        holds = None if np.isinf([_middle(one), _middle(chrono)]).all() else _middle(one) < _middle(chrono)
        what, bound, why = f"prediction: b_f = 1 leaves first, {name}", "b_f = 1 before chrono", WHY_REVERSED
        value = f"b_f = 1: {_when(one)}, chrono: {_when(chrono)}"
    else:
        return []
    return [Check(what, value, bound, holds, "E2", why, decides=False)]


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks of the claim per task and length, then those of the predicted numbers."""
    config = json.loads(dataset.attrs["config"])
    checks = []
    for index in range(dataset.sizes["setting"]):
        row = dataset.isel(setting=index)
        found = "; ".join(
            f"{start}: lowest {median:.3f} [{low:.3f}, {high:.3f}]"
            for start in STARTS
            for median, low, high in [_lowest(row, start)]
        )
        kind = str(row["task"].values)
        name, given = _named(row), f"within {_given(row, config):,} updates"
        checks.append(
            Check(
                f"chrono leaves the memoryless loss, b_f = 1 stalls: {name}",
                found,
                f"chrono ≤ {LEFT[kind]:g} < b_f = 1, {given}",
                _separates(row),
                "E2",
                WHY_LEFT[kind],
            )
        )
        ends = _end(kind, config["until"])
        checks.append(
            Check(
                f"chrono solves it, b_f = 1 stalls: {name}",
                found if ends <= SOLVED else f"trials end at {ends:g}",
                f"chrono ≤ {SOLVED:g} < b_f = 1, {given}",
                _solves(row),
                "E2",
                WHY_SOLVED,
            )
        )
        if kind == "copy":
            checks += _predictions(row)
    return checks


def _counted(row: xr.Dataset, start: str) -> str:
    """How many seeds left, and when the middle one did."""
    at = _left(row, start)
    if not len(at):
        return "every seed failed"
    when = f" (after {_when(at)} updates)" if np.isfinite(_middle(at)) else ""
    return f"{np.isfinite(at).sum()} of {len(at)}{when}"


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding: where chrono leaves and b_f = 1 stalls, and how many seeds of each left, when."""
    config = json.loads(dataset.attrs["config"])
    rows = [dataset.isel(setting=index) for index in range(dataset.sizes["setting"])]
    where, unclear = ("; ".join(_named(row) for row in rows if _separates(row) is answer) for answer in (True, None))
    solved = "; ".join(_named(row) for row in rows if _lowest(row, "chrono")[2] <= SOLVED)
    counts = "; ".join(f"{_named(row)}: {_counted(row, 'chrono')} against {_counted(row, 'b_f = 1')}" for row in rows)
    given = max(_given(row, config) for row in rows)
    sentence = (
        f"chrono leaves the loss of a network without memory where b_f = 1 stalls at {where or 'no length tried'}, "
        f"within {given:,} updates.  Seeds that leave, chrono against b_f = 1: {counts}."
    )
    if unclear:
        sentence += f"  Too few updates to tell at {unclear}."
    # copy is followed until it has left, no further
    return {"E2": f"{sentence}  Chrono was seen to go below a tenth of that loss at {solved or 'none of them'}."}


_STYLES = {
    "b_f = 1": {"color": "#d97706", "linestyle": "--"},
    "chrono": {"color": "#16325c", "linestyle": "-"},
}
_MARKERS = {"b_f = 1": "s", "chrono": "o"}


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: learning curves of every seed, a panel per setting, and when each seed left."""
    config = json.loads(dataset.attrs["config"])
    count = dataset.sizes["setting"]
    columns = min(count + 1, 3)
    rows = -(-(count + 1) // columns)
    drawn = matplotlib.figure.Figure(figsize=(3.6 * columns, 3.1 * rows + 1.4), layout="constrained")
    panels = drawn.subplots(rows, columns, squeeze=False).ravel()
    for empty in panels[count + 1 :]:
        empty.remove()
    panels = panels[: count + 1]
    for index, axes in enumerate(panels[:-1]):
        row = dataset.isel(setting=index)
        for start, style in _STYLES.items():
            for seed in range(row.sizes["seed"]):
                curve = row["share"].sel(start=start).isel(seed=seed).dropna(trials.EVALUATED)
                axes.plot(curve[trials.EVALUATED], curve, **style, linewidth=1.2, alpha=0.85,
                          label=start if seed == 0 else None)  # fmt: skip
                if int(row["failed_at"].sel(start=start).isel(seed=seed)) >= 0:
                    axes.plot(curve[trials.EVALUATED][-1:], curve[-1:], "x", color=style["color"], markersize=9)
        axes.axhline(1, color="0.4", linewidth=0.8)
        kind = str(row["task"].values)
        axes.axhline(LEFT[kind], color="0.4", linewidth=0.8, linestyle=":")
        ends = _end(kind, config["until"])
        axes.set_ylim(max(0.0, 2 * ends - 1 - 0.05), 1.15)
        axes.set_xlim(0, _given(row, config))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(_named(row), fontsize=11)
        axes.set_xlabel("updates")
        if index % columns == 0:
            axes.set_ylabel("held-out loss / loss without memory")
    last, ticks = panels[-1], np.arange(count)
    ceiling = max(config["updates"], config["adding_updates"] if config["adding"] else 0)
    for shift, (start, style) in zip((-0.16, 0.16), _STYLES.items(), strict=True):
        for index in range(count):
            row = dataset.isel(setting=index)
            at = _left(row, start)
            spread = index + shift + np.linspace(-0.09, 0.09, max(len(at), 2))[: len(at)]
            never = ~np.isfinite(at)
            last.plot(spread[~never], at[~never], _MARKERS[start], color=style["color"], markersize=6)
            last.plot(spread[never], np.full(never.sum(), _given(row, config)), "^", markerfacecolor="none",
                      color=style["color"], markersize=7)  # fmt: skip
    last.set_ylim(0, 1.12 * ceiling)
    last.set_xlim(-0.5, count - 0.5)
    last.set_xticks(ticks, list(dataset["setting"].values), rotation=30, ha="right")
    last.yaxis.set_major_formatter("{x:,.0f}")
    last.set_title("updates until each seed left\n△: not within those given", fontsize=10)
    last.set_ylabel("updates")
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    drawn.suptitle(
        "Does an LSTM leave the loss of a network without memory? Chrono initialisation against b_f = 1\n"
        f"N={config['hidden_size']}, batch {config['batch_size']}, {config['length']} symbols to copy, "
        f"{_rates(config)}\n"
        f"{config['seeds']} seeds, each its own curve; below the dotted line it has left; ×: not finite",
        fontsize=11,
    )
    return drawn


ABOUT = """Does chrono initialisation learn copy and adding at lengths where a forget bias of 1 stalls?

Trains LSTMs from both starts, which differ in the gate biases alone, at several lengths; prints when each seed leaves
the loss of a network without memory, and writes learning curves and a netCDF file."""

CAPTION = """Held-out loss over that of a network without memory against updates, one panel per task and length, one
curve per seed, chrono initialisation beside a forget bias of 1; right, the updates after which each seed left."""

EXPERIMENT = command.Experiment(
    name="chrono",
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
