"""Does clipping the gradient's norm at 0.25 save training from exploding gradients, and what is 0.25 a number of?

It trains vanilla cells whose recurrent weights are N(0, gain²/N) on the copy task by plain gradient descent, over
gains, learning rates, and thresholds in two units: the gradient of the loss per token, or of the loss summed over the T
steps, which is T times as large.  All settings of a seed share weights (up to the gain) and batches.  A network
survives when every update was finite and its loss in the last tenth of the updates (their median) is below that of its
first batch.  Beside it the identity of the two units is computed for T = 20.

The learning rates reach from one at which the easy case (gain 1, no clipping) learns when to be silent to one at which
it fails.  Running time: four minutes on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.colors
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
from experiments.statistics import describe, median_interval

Activation = Literal["tanh", "relu"]

CLAIMS = (
    Claim(
        "D1",
        "Clip the norm of the gradient, at 0.25: an exploding gradient then does no harm, and without it does.",
        source="Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1, with any threshold; 0.25 is the default "
        "of a widely copied example program for language models, whose loss is the mean per token",
        prediction="networks whose gradient explodes survive with it, and without it do not; 0.25 of the mean is 5 of "
        "the sum over 20 steps (Zaremba et al. 2014, arXiv 1409.2329, clip the sum at 5), to round-off, so that the "
        "number without its unit says nothing",
        refuted="networks with exploding gradients that fail at 0.25, or survive without clipping; shares of clipped "
        "updates at 0.25 that differ between the two units",
        functions=("rg.remedies.clip_by_global_norm", "rg.losses.cross_entropy", "rg.training.train_step"),
        tests=("tests/test_clipping.py", "tests/test_remedies.py", "tests/test_losses.py"),
    ),
)

THRESHOLD = 0.25
"""The number that circulates."""
UNIT_STEPS = 20
"""Steps of Zaremba et al. 2014, for which 0.25 of the mean is 5 of the sum."""
SYMBOLS, LENGTH = 8, 5
"""Symbols of the copy task, and how many of them are to be repeated; T is the delay and twice the length."""
NO_CLIPPING = "none"
UNITS = ("mean", "sum")
"""The loss per token, or summed over the steps."""
EXPLODES = 5.0
"""Gradient norm, per token, of the first batch above which we say that it explodes; see WHY_EXPLODES."""
ALIKE = 0.1
ROUND_OFF = 1e-5

WHY_EXPLODES = "a gradient explodes where its first norm (median) is above 5, 20 times the threshold"
WHY_SAVED = f"more than half of the seeds; {WHY_EXPLODES}"
WHY_NEEDED = f"at most half of the seeds, at every learning rate; {WHY_EXPLODES}"
WHY_ALIKE = "a threshold that means one thing clips alike in both units; a tenth of the updates is granted"
WHY_IDENTITY = "∇ Σ_t ℓ_t = T ∇ (1/T) Σ_t ℓ_t, so that 5 = 20 · 0.25 is the same threshold; float32 round-off"
WHY_GUESSING = "ln 9: eight symbols and the blank, all equally likely"
WHY_EASY = "the case without an explosion: do task and learning rates give training a chance"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the clipping map."""

    activations: tuple[Activation, ...] = ("tanh", "relu")
    """Units of the vanilla cell."""
    gains: tuple[float, ...] = (1.0, 1.5, 2.5)
    """Recurrent weights are N(0, gain²/N); rising."""
    learning_rates: tuple[float, ...] = (0.1, 0.5, 2.0, 10.0)
    """Of gradient descent on the mean loss per token; rising."""
    thresholds: tuple[float, ...] = (0.25, 1.0, 5.0)
    """Largest norms, each tried in both units; rising, 0.25 among them."""
    delay: int = 50
    """Silence of the copy task; T is 10 more."""
    hidden_size: int = 32
    """Units N."""
    batch_size: int = 20
    """Sequences per update."""
    updates: int = 300
    """Updates of each network."""
    seeds: int = 5
    """Trained networks of each setting."""
    fresh_seeds: int = 10
    """Untrained networks at which the two units are compared."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    activations=("tanh",), gains=(1.0, 2.5), learning_rates=(0.5, 10.0), thresholds=(0.25,), delay=10, hidden_size=8,
    updates=10, seeds=2, fresh_seeds=2,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {
        "delay": 1,
        "hidden_size": 1,
        "batch_size": 1,
        "updates": 10,
        "seeds": 1,
        "fresh_seeds": 1,
        "first_seed": 0,
    }
    command.check_at_least(config, least)
    if not config.activations or len(set(config.activations)) != len(config.activations):
        raise UserError(f"--activations: expected each name once, found {' '.join(config.activations) or 'none'}")
    for name in ("gains", "learning_rates", "thresholds"):
        values = getattr(config, name)
        fine = bool(values) and all(math.isfinite(value) and value > 0 for value in values)
        if not fine or list(values) != sorted(set(values)):
            raise UserError(f"--{name.replace('_', '-')}: expected positive numbers, rising, found {values}")
    if THRESHOLD not in config.thresholds:
        raise UserError(f"--thresholds: expected {THRESHOLD} among them, found {config.thresholds}")


class Row(NamedTuple):
    """A threshold and its unit."""

    threshold: float
    """inf for no clipping."""
    unit: str

    @property
    def name(self) -> str:
        """What a reader sees."""
        return NO_CLIPPING if math.isinf(self.threshold) else f"{self.threshold:g} {self.unit}"

    def per_token(self, num_steps: int) -> float:
        """Returns the threshold for the gradient of the mean over ``num_steps`` steps."""
        return self.threshold / num_steps if self.unit == "sum" else self.threshold


def rows_of(config: Config) -> list[Row]:
    """Returns the thresholds that are tried: none, then the smallest norm per token last."""
    tried = [Row(threshold, unit) for unit in UNITS for threshold in reversed(config.thresholds)]
    return [Row(math.inf, "mean"), *tried]


def num_steps(config: Config) -> int:
    """Returns T of the copy task."""
    return config.delay + 2 * LENGTH


# --- the two units ---------------------------------------------------------------------------------------------------


@functools.cache
def _model(activation: Activation, hidden_size: int, gain: float = 1.0) -> tuple[rg.training.Model, Any]:
    task = rg.tasks.copy_memory(UNIT_STEPS - 2 * LENGTH, num_symbols=SYMBOLS, length=LENGTH)
    cell = rg.cells.vanilla(task.input_size, hidden_size, activation=activation, init=rg.initializers.gaussian(gain))
    return rg.training.model([cell], task.output_size, vocabulary_size=task.vocabulary_size), task


@functools.partial(jax.jit, static_argnames=("model", "reduction"))
def _gradient(model, params, batch, *, reduction):
    def loss(params):
        outputs = model.apply(params, model.init_state(batch.mask.shape[1:]), batch.inputs).outputs
        return rg.losses.cross_entropy(outputs, batch.targets, batch.mask, reduction=reduction)

    return jax.grad(loss)(params)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _compare_units(config: Config) -> xr.Dataset:
    """Returns how far the updates for 0.25 of the mean and for 5 of the sum are apart, T = 20, fresh networks."""
    model, task = _model(config.activations[0], config.hidden_size)
    drawing, _ = _model(config.activations[0], config.hidden_size, max(config.gains))
    mean, total = "mean_per_token", "sum_over_steps"
    as_sum = THRESHOLD * UNIT_STEPS
    clips = {
        "mean": rg.remedies.clip_by_global_norm(THRESHOLD, unit=mean, loss_unit=mean),
        "stated": rg.remedies.clip_by_global_norm(as_sum, unit=total, loss_unit=mean, num_steps=UNIT_STEPS),
        "sum": rg.remedies.clip_by_global_norm(as_sum, unit=total, loss_unit=total),
    }
    found: dict[str, list[float]] = {"stated": [], "sum": []}
    clipped = []
    for seed in range(config.first_seed, config.first_seed + config.fresh_seeds):
        key_params, key_batch = jax.random.split(jax.random.key(seed))
        params, batch = drawing.init(key_params), task.batch(key_batch, config.batch_size)
        updates = {}
        for name, clip in clips.items():
            gradient = _gradient(model, params, batch, reduction=total if name == "sum" else mean)
            update, state = clip.update(gradient, clip.init(params))
            updates[name] = _flat(update)
            if name == "mean":
                clipped.append(int(state.num_clipped))
        # gradient descent on the sum with a learning rate T times smaller
        updates["sum"] = updates["sum"] / UNIT_STEPS
        for name, differences in found.items():
            apart = np.abs(updates[name] - updates["mean"]).max()
            differences.append(float(apart / np.abs(updates["mean"]).max()))
    return xr.Dataset(
        {
            "unit_difference": (("fresh_seed", "form"), np.stack([found["stated"], found["sum"]], axis=1)),
            "unit_clipped": ("fresh_seed", np.array(clipped, np.int8)),
        }
    )


# --- training --------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What gradient descent with clipping needs, as numbers and not as constants of a program."""

    learning_rate: jax.Array
    threshold: jax.Array
    num_clipped: jax.Array
    """By this name rg.training.train_step finds what was clipped."""


def _descent(learning_rate: Any, threshold: Any) -> Setting:
    return Setting(jnp.asarray(learning_rate), jnp.asarray(threshold), jnp.zeros((), jnp.int32))


def _update(updates, state, params=None):
    """g ← −η g · min(1, θ/‖g‖): rg.remedies.clip_by_global_norm and optax.sgd in one, for which θ may be traced."""
    norm = optax.tree.norm(updates)
    is_clipped = norm > state.threshold
    factor = -state.learning_rate * jnp.where(is_clipped, state.threshold / norm, 1.0)
    return jax.tree.map(lambda g: factor * g, updates), state._replace(
        num_clipped=state.num_clipped + is_clipped.astype(jnp.int32)
    )


OPTIMIZER = optax.GradientTransformation(lambda params: _descent(0.0, math.inf), _update)
"""Learning rate and threshold stand in its state, so that one program serves all of them."""


def _loss(output, batch):
    return rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)


@functools.partial(jax.jit, static_argnames=("activation", "config"))
def _train(activation, config, weights, keys, learning_rates, threshold):
    """Losses, norms and flags of all updates, (L, S, updates): every learning rate, every seed, at once."""
    model, _ = _model(activation, config.hidden_size)
    task = rg.tasks.copy_memory(config.delay, num_symbols=SYMBOLS, length=LENGTH)
    step = rg.training.train_step(model, _loss, OPTIMIZER)
    start = rg.training.initial_state(model, OPTIMIZER, jax.random.key(0), config.batch_size)
    over_seeds = jax.vmap(step, in_axes=(0, 0, None))
    over_rates = jax.vmap(over_seeds, in_axes=(0, None, None))

    def of(params, learning_rate):
        return start._replace(params=params, opt_state=_descent(learning_rate, threshold))

    states = jax.vmap(lambda rate: jax.vmap(lambda params: of(params, rate))(weights))(learning_rates)

    def one(states, index):
        # drawn once for all learning rates
        batches = jax.vmap(lambda key: task.batch(jax.random.fold_in(key, index), config.batch_size))(keys)
        return over_rates(states, batches, jnp.asarray(True))

    _, metrics = jax.lax.scan(one, states, jnp.arange(config.updates))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), metrics)


def draw(activation: Activation, gain: float, seed: int, config: Config) -> tuple[Any, jax.Array]:
    """Returns the first weights of a seed and the key of its batches."""
    key_params, key_batches = jax.random.split(jax.random.key(seed))
    return _model(activation, config.hidden_size, gain)[0].init(key_params), key_batches


def _measure_row(activation: Activation, gain: float, row: Row, config: Config) -> xr.Dataset:
    """Returns the dataset of one threshold: every learning rate and seed."""
    drawn = [
        draw(activation, gain, seed, config) for seed in range(config.first_seed, config.first_seed + config.seeds)
    ]
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for params, _ in drawn))
    keys = jnp.stack([key for _, key in drawn])
    threshold = jnp.float32(row.per_token(num_steps(config)))
    rates = jnp.array(config.learning_rates, jnp.float32)
    measured = jax.tree.map(np.asarray, _train(activation, config, weights, keys, rates, threshold))
    failed = ~measured.is_finite
    fails = failed.any(axis=-1)
    last = np.where(fails[..., None], np.nan, measured.loss)[..., -(config.updates // 10) :]
    dims = ("learning_rate", "seed")
    return xr.Dataset(
        {
            "first_loss": (dims, measured.loss[..., 0]),
            "last_loss": (dims, np.median(last, axis=-1).astype(np.float32)),
            "first_norm": (dims, measured.grad_norm[..., 0]),
            "clip_fraction": (dims, np.where(fails, np.nan, measured.clipped.mean(axis=-1)).astype(np.float32)),
            "failed_at": (dims, np.where(fails, failed.argmax(axis=-1) + 1, -1).astype(np.int32)),
        }
    )


MEASURED = ("unit_difference", "unit_clipped", "first_loss", "last_loss", "first_norm", "clip_fraction", "failed_at")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "unit_difference": ("1", "largest difference of an update for 5 of the sum to that for 0.25 of the mean, T = 20, "
                        "over the largest entry: threshold stated in the other unit, and loss in the other unit"),
    "unit_clipped": ("1", "1 where 0.25 clipped that update"),
    "first_loss": ("nats per token", "loss of the first batch"),
    "last_loss": ("nats per token", "median loss of the last tenth of the updates; NaN after a failed one"),
    "first_norm": ("1", "global norm of the first gradient of the mean loss per token"),
    "clip_fraction": ("1", "share of the updates that were clipped; NaN with a failed one"),
    "failed_at": ("updates", "the update that was not finite; −1 for none"),
    "survives": ("1", "1 where every update was finite and last_loss is below first_loss"),
}  # fmt: skip


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with what survives."""
    survives = (dataset["failed_at"] < 0) & (dataset["last_loss"] < dataset["first_loss"])
    dataset["survives"] = survives.astype(np.int8)  # netCDF knows no bool
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
    rows = rows_of(config)
    pieces = [
        Piece(
            f"{activation}-{gain:g}-{row.name.replace(' ', '-')}",
            f"{activation}, gain {gain:g}, threshold {row.name}",
            functools.partial(_measure_row, activation, gain, row, config),
        )
        for activation in config.activations
        for gain in config.gains
        for row in rows
    ]
    units = Piece("units", "the two units", functools.partial(_compare_units, config))
    measured = command.measure([units, *pieces], parts=parts, screen=screen)
    stacked = xr.concat(measured[1:], dim="piece")
    shape = (len(config.activations), len(config.gains), len(rows))
    dataset = xr.Dataset(
        {
            name: (("activation", "gain", "row", *values.dims[1:]), values.values.reshape(*shape, *values.shape[1:]))
            for name, values in stacked.data_vars.items()
        }
    )
    dataset = xr.merge([measured[0], dataset]).assign_coords(
        activation=list(config.activations),
        gain=list(config.gains),
        row=[row.name for row in rows],
        learning_rate=list(config.learning_rates),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        fresh_seed=np.arange(config.first_seed, config.first_seed + config.fresh_seeds),
        form=["threshold", "loss"],
    )
    dataset.attrs = command.provenance("clipping", config, seconds=time.perf_counter() - started)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _config(dataset: xr.Dataset) -> Config:
    stored: dict[str, Any] = json.loads(dataset.attrs["config"])
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return Config(**plain)


_TRIED = Row(THRESHOLD, "mean").name
_TRIED_SUM = Row(THRESHOLD, "sum").name


def _cases(config: Config) -> list[tuple[Activation, float]]:
    return [(activation, gain) for activation in config.activations for gain in config.gains]


def _first_norm(dataset: xr.Dataset, activation: str, gain: float) -> float:
    """The median norm of the first gradient; one that overflowed is infinite."""
    first = dataset["first_norm"].sel(activation=activation, gain=gain, row=NO_CLIPPING).isel(learning_rate=0).values
    return float(np.median(np.where(np.isnan(first), np.inf, first)))


def _size(norm: float) -> str:
    """A norm with two digits, a large one as a power: 3.5, 120, 10^5."""
    if not math.isfinite(norm):
        return "beyond float32"
    return f"{float(f'{norm:.2g}'):g}" if norm < 1e4 else f"10^{math.log10(norm):.0f}"


def _explodes(dataset: xr.Dataset, activation: str, gain: float) -> bool:
    return _first_norm(dataset, activation, gain) > EXPLODES


def _survivors(dataset: xr.Dataset, activation: str, gain: float, row: str) -> np.ndarray:
    """Seeds that survive at each learning rate."""
    found = dataset["survives"].sel(activation=activation, gain=gain, row=row)
    return np.asarray(found.sum("seed").values)


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first."""
    config = _config(dataset)
    shown = rich.table.Table(
        title=f"Seeds that survive, of {config.seeds}, by learning rate: vanilla cell, N={config.hidden_size}, copy "
        f"task, T={num_steps(config)}, {config.updates} updates, {dataset.attrs['dtype']}, {dataset.attrs['backend']}",
        caption="thresholds on the gradient of the mean loss per token, or of its sum over the T steps; clipped: share "
        "of updates, median over learning rates and seeds without a failed update; first norm: per token, median",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("units", "gain", "first norm", "threshold"):
        shown.add_column(name, justify="left" if name in ("units", "threshold") else "right")
    for rate in config.learning_rates:
        shown.add_column(f"rate {rate:g}", justify="right")
    shown.add_column("clipped", justify="right")
    for activation, gain in _cases(config):
        for index, row in enumerate(rows_of(config)):
            clipped = dataset["clip_fraction"].sel(activation=activation, gain=gain, row=row.name).values
            share = f"{np.nanmedian(clipped):.2f}" if np.isfinite(clipped).any() else "all failed"
            head = [activation, f"{gain:g}", _size(_first_norm(dataset, activation, gain))] if index == 0 else [""] * 3
            shown.add_row(*head, row.name, *map(str, _survivors(dataset, activation, gain, row.name)), share)
    return shown


def _better(dataset: xr.Dataset, activation: str, gain: float) -> tuple[int, int]:
    """Networks that survive at 0.25 per token, at all learning rates: those better than guessing, and all of them."""
    at = dataset.sel(activation=activation, gain=gain, row=_TRIED)
    losses = at["last_loss"].values[at["survives"].values == 1]
    return int((losses < math.log(SYMBOLS + 1)).sum()), len(losses)


class _Alike(NamedTuple):
    """How much more often 0.25 clips in one unit than in the other, at the setting where that is most."""

    where: str
    value: str
    holds: bool | None


def _alike(dataset: xr.Dataset) -> _Alike:
    clipped = dataset["clip_fraction"].sel(row=[_TRIED, _TRIED_SUM])
    apart = abs(clipped.sel(row=_TRIED_SUM) - clipped.sel(row=_TRIED))
    worst = None
    for activation, gain in _cases(_config(dataset)):
        for rate in dataset["learning_rate"].values:
            at = {"activation": activation, "gain": gain, "learning_rate": rate}
            values = apart.sel(at).values
            kept = values[np.isfinite(values)]
            if len(kept) == 0:
                continue
            interval = median_interval(kept, axis=0)
            if worst is None or interval.high > worst[0].high:
                shares = [float(np.nanmedian(clipped.sel(at).sel(row=row).values)) for row in (_TRIED, _TRIED_SUM)]
                worst = (interval, at, shares)
    if worst is None:
        return _Alike("", "every network failed", None)
    interval, at, (mean, total) = worst
    where = f"{at['activation']}, gain {at['gain']:g}, rate {at['learning_rate']:g}"
    apart_by = f"apart by {float(interval.low):.0%} to {float(interval.high):.0%}"
    value = f"{mean:.0%} of the updates clipped (mean), {total:.0%} (sum), {apart_by}"
    return _Alike(where, value, bool(interval.high <= ALIKE))


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns two checks for every case that explodes, one of the two units, then side conditions."""
    config = _config(dataset)
    checks = []
    half = config.seeds / 2
    for activation, gain in _cases(config):
        name = f"{activation}, gain {gain:g}"
        explodes = _explodes(dataset, activation, gain)
        without = _survivors(dataset, activation, gain, NO_CLIPPING)
        with_it = _survivors(dataset, activation, gain, _TRIED)
        norm = f"first norm {_size(_first_norm(dataset, activation, gain))}"
        if not explodes:
            if gain == config.gains[0]:
                alive = [
                    f"{rate:g}" for rate, count in zip(config.learning_rates, without, strict=True) if count > half
                ]
                checks.append(
                    Check(
                        f"survives unclipped where nothing explodes: {name}",
                        f"{norm}; at rates {', '.join(alive) or 'none'}", "at one learning rate at least",
                        bool(alive), "D1", WHY_EASY, decides=False,
                    )
                )  # fmt: skip
            continue
        counts = ", ".join(
            f"{count} of {config.seeds} at rate {rate:g}"
            for rate, count in zip(config.learning_rates, with_it, strict=True)
        )
        saved = bool((with_it > half).all())
        checks.append(
            Check(
                f"survives with {THRESHOLD:g} per token: {name}", f"{norm}; {counts}",
                f"> {half:g} at every learning rate", saved, "D1", WHY_SAVED,
            )
        )  # fmt: skip
        better, survivors = _better(dataset, activation, gain)
        checks.append(
            Check(
                f"what survives with {THRESHOLD:g} per token is better than guessing: {name}",
                f"{better} of {survivors}", "all", better == survivors if survivors else None,
                "D1", WHY_GUESSING, decides=False,
            )
        )  # fmt: skip
        counts = ", ".join(
            f"{count} of {config.seeds} at rate {rate:g}"
            for rate, count in zip(config.learning_rates, without, strict=True)
        )
        checks.append(
            Check(
                f"does not survive without: {name}", counts, f"≤ {half:g} at every learning rate",
                bool((without <= half).all()), "D1", WHY_NEEDED,
            )
        )  # fmt: skip
    if not any(_explodes(dataset, *case) for case in _cases(config)):
        checks.append(
            Check("clipping saves what explodes", "nothing explodes", f"> {half:g} seeds", None, "D1", WHY_SAVED)
        )
    alike = _alike(dataset)
    checks.append(
        Check(
            f"{THRESHOLD:g} is one threshold, whatever the unit{f': {alike.where}' if alike.where else ''}",
            alike.value, f"≤ {ALIKE:.0%} apart", alike.holds, "D1", WHY_ALIKE,
        )
    )  # fmt: skip
    for form, text in (("threshold", "threshold stated in the other unit"), ("loss", "loss in the other unit")):
        worst = float(dataset["unit_difference"].sel(form=form).max())
        checks.append(
            Check(
                f"{THRESHOLD:g} of the mean = {THRESHOLD * UNIT_STEPS:g} of the sum over {UNIT_STEPS} steps: {text}",
                f"updates apart by {worst:.1e} at the most, {int(dataset['unit_clipped'].sum())} of "
                f"{dataset.sizes['fresh_seed']} clipped",
                f"≤ {ROUND_OFF:g}", worst <= ROUND_OFF, "D1", WHY_IDENTITY, decides=False,
            )
        )  # fmt: skip
    return checks


def _listed(config: Config, counts: np.ndarray) -> str:
    """The learning rates at which most seeds survive."""
    alive = [f"{rate:g}" for rate, count in zip(config.learning_rates, counts, strict=True) if count > config.seeds / 2]
    if len(alive) == len(config.learning_rates):
        return "every learning rate"
    return f"learning rate {', '.join(alive)}" if alive else "no learning rate"


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a sentence or two, with the conditions."""
    config = _config(dataset)
    exploding = [case for case in _cases(config) if _explodes(dataset, *case)]
    # cases of one outcome are told together
    outcomes: dict[tuple[str, str, str], list[tuple[Activation, float]]] = {}
    for case in exploding:
        tried, summed, without = (
            _listed(config, _survivors(dataset, *case, row)) for row in (_TRIED, _TRIED_SUM, NO_CLIPPING)
        )
        outcomes.setdefault((tried, summed, without), []).append(case)
    parts = []
    for (tried, summed, without), cases in outcomes.items():
        who = ", ".join(
            f"{case[0]} at gain {case[1]:g} (first norm {_size(_first_norm(dataset, *case))})" for case in cases
        )
        parts.append(
            f"{who}: most seeds survive with {THRESHOLD:g} per token at {tried}, with {THRESHOLD:g} of the sum at "
            f"{summed}, without clipping at {without}"
        )
    first = "; ".join(parts) if parts else f"no gradient explodes (no first norm above {EXPLODES:g})"
    for activation, gain in exploding:
        better, survivors = _better(dataset, activation, gain)
        if better < survivors:
            first += (
                f"; with {THRESHOLD:g} per token {better} of {survivors} survivors of {activation} at gain {gain:g} "
                "are better than guessing"
            )
    overflows = dataset["failed_at"].sel(row=_TRIED).isel(learning_rate=0) == 1
    places = [
        f"{int(overflows.sel(activation=activation, gain=gain).sum())} of {config.seeds} of {activation}, gain {gain:g}"
        for activation, gain in _cases(config)
        if overflows.sel(activation=activation, gain=gain).any()
    ]
    if places:
        first += (
            f"; a first norm beyond {dataset.attrs['dtype']} is not repaired by any threshold ({', '.join(places)})"
        )
    alike = _alike(dataset)
    worst = float(dataset["unit_difference"].max())
    if alike.holds is False:
        first += (
            f".  {THRESHOLD:g} without its unit says nothing: at {alike.where} it means {alike.value}, T = "
            f"{num_steps(config)}"
        )
    elif alike.holds:
        first += f".  {THRESHOLD:g} clips alike in both units ({alike.where}: {alike.value})"
    return {
        "D1": f"{first}; {THRESHOLD:g} of the mean and {THRESHOLD * UNIT_STEPS:g} of the sum over {UNIT_STEPS} steps "
        f"give updates that differ by {worst:.0e} at the most.  Learning rates {config.learning_rates[0]:g} to "
        f"{config.learning_rates[-1]:g}."
    }


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: seeds that survive and their loss, over learning rate and threshold, for every case."""
    config = _config(dataset)
    rows = rows_of(config)
    across, down = len(config.gains), len(config.activations)
    drawn = matplotlib.figure.Figure(figsize=(1.5 + 3.5 * across, 1.8 + 3.2 * down), layout="constrained")
    panels = drawn.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    memoryless = rg.tasks.copy_memory(config.delay, num_symbols=SYMBOLS, length=LENGTH).baseline
    colours = matplotlib.colormaps["viridis_r"].with_extremes(bad="#d9d9d9")
    best, guessing = 0.8 * memoryless, math.log(SYMBOLS + 1)
    scale = matplotlib.colors.LogNorm(best, guessing, clip=True)
    image = None
    for (activation, gain), panel in zip(_cases(config), panels.ravel(), strict=True):
        at = dataset.sel(activation=activation, gain=gain)
        survivors = at["survives"].sum("seed").transpose("row", "learning_rate").values
        loss = at["last_loss"].where(at["survives"] == 1).transpose("row", "learning_rate", "seed").values
        middle = np.array([[np.nanmedian(v) if np.isfinite(v).any() else np.nan for v in line] for line in loss])
        image = panel.imshow(middle, cmap=colours, norm=scale, aspect="auto", origin="lower")
        for (line, column), count in np.ndenumerate(survivors):
            dark = np.isfinite(middle[line, column]) and scale(middle[line, column]) > 0.5
            panel.text(column, line, f"{count}/{config.seeds}", ha="center", va="center", fontsize=9,
                       color="white" if dark else "black")  # fmt: skip
        panel.axhline(0.5, color="white", linewidth=2.5)
        panel.axhline(0.5 + len(config.thresholds), color="white", linewidth=2.5)
        norm = _first_norm(dataset, activation, gain)
        explodes = "explodes" if norm > EXPLODES else "does not explode"
        panel.set_title(f"{activation}, gain {gain:g}: {explodes}\nfirst gradient norm {_size(norm)}", fontsize=10)
        panel.set_xticks(range(len(config.learning_rates)), [f"{rate:g}" for rate in config.learning_rates])
        panel.set_yticks(range(len(rows)), ["no clipping" if row.name == NO_CLIPPING else row.name for row in rows])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("learning rate")
    for panel in panels[:, 0]:
        panel.set_ylabel("threshold and its unit")
    if image is not None:
        bar = drawn.colorbar(image, ax=panels, shrink=0.7, extend="max")
        bar.set_label(
            "median loss of the survivors at the end (nats per token)\n"
            f"{memoryless:.2f}: silent in time, then guessing; {guessing:.2f}: always guessing"
        )
        ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 1.0, 2.0) if best <= tick <= guessing]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    drawn.suptitle(
        "Does clipping the gradient's norm save training from explosions, and what is 0.25 a number of?\n"
        f"Vanilla cell, N={config.hidden_size}, copy task, T={num_steps(config)}, {config.updates} updates; in each "
        f"field the seeds that survive, of {config.seeds}",
        fontsize=11,
    )
    return drawn


ABOUT = """Does clipping the gradient's norm at 0.25 save training from explosions, and what is 0.25 a number of?

Trains vanilla cells on the copy task over gains, learning rates and thresholds in two units, and counts the seeds that
survive; prints a table and a verdict, and writes a figure and a netCDF file."""

CAPTION = """Seeds of a vanilla cell that survive training, over learning rate and clipping threshold, for each
activation and gain; colour: the survivors' loss at the end, grey where there are none.  A threshold of the sum is T
times stricter than the same number per token."""

EXPERIMENT = command.Experiment(
    name="clipping",
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
