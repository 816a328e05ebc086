"""Is the LSTM gradient with δh_t = ∂L_t/∂h_t the gradient?

Claim tried: the weights' gradient of an LSTM follows from δc_t = δh_t ⊙ o_t ⊙ (1 − tanh² c_t) + δc_{t+1} ⊙ f_{t+1},
with δh_t only what the loss takes from h_t itself.
Source: introductions to the LSTM that print these lines as its backpropagation.  Hochreiter & Schmidhuber 1997, who cut
the gradient in this way, call it truncated.
Prediction, made before the first run: the whole gradient is off by 20 % to 80 % at T = 100 for b_f = 0 and 1, and by
more for b_f = 5 than for b_f = 0, since slower forgetting leaves more steps to pass through the gates.
Refuted if: the relative error of the whole gradient exceeds 0.1 at some length T.  Whether it still points where the
true one does (cosine ≥ 0.9), and whether the predictions come true, is checked apart.

For each length, forget bias and seed it runs an untrained LSTM (weights as in Torch) on Gaussian inputs, takes the
softmax cross-entropy of a random linear read-out of h against random classes, at the last step or as the mean over all
steps, and compares both gradients with respect to W, U, b: all of it, and gate by gate.  Inputs are Gaussian and not
text because that is simpler.  Chrono biases are drawn for the longest T, so that a row is one network.  Running time:
ten seconds on two cores with the defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.command import Check, UserError
from experiments.statistics import CONFIDENCE, describe, summarise

LOSSES = ("last", "all")
"""The loss of the last step, or the mean over all steps."""
BLOCKS = ("i", "f", "g", "o", "total")
"""A gate's rows of W, U and b, or everything."""
LARGEST_ERROR = 0.1
"""Largest relative error at which one formula is granted to be the other: one digit."""
SMALLEST_COSINE = 0.9
"""Cosine at which a direction is granted: 26 degrees."""
PREDICTED_ERROR = (0.2, 0.8)
PREDICTED_AT = ("0", "1")
"""Forget biases for which that was predicted."""
PREDICTED_STEPS = 100
"""And the length."""

ForgetBias = float | Literal["chrono"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Lengths T, rising; the shorter runs are the beginnings of the longest."""
    forget_biases: tuple[ForgetBias, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, "chrono")
    """Effective biases of the forget gate, numbers or chrono (for the longest T)."""
    hidden_size: int = 32
    """Units N; weights and other biases are drawn as in Torch."""
    input_size: int = 32
    """Width D of the input, entries N(0, 1)."""
    classes: int = 10
    """Classes of the read-out, weights N(0, 1/N)."""
    seeds: int = 10
    """Independent repetitions; each draws weights, inputs and classes, the same at every T and forget bias."""
    first_seed: int = 0
    """Seeds run from here."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of weights, states and gradients."""


SMOKE = Config(steps=(5, 20), forget_biases=(0.0, 5.0, "chrono"), hidden_size=8, input_size=6, classes=4, seeds=3)
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"hidden_size": 1, "input_size": 1, "classes": 2, "seeds": 1, "first_seed": 0}
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {lowest}, found {getattr(config, name)}")
    steps, biases = config.steps, config.forget_biases
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 2:
        raise UserError(f"--steps: expected numbers of at least 2, rising, found {steps}")
    numbers = [bias for bias in biases if bias != "chrono"]
    if not biases or len(set(biases)) != len(biases) or not np.isfinite(np.array(numbers, float)).all():
        raise UserError(f"--forget-biases: expected finite numbers or chrono, each once, found {biases}")


def bias_name(forget_bias: ForgetBias) -> str:
    """Returns a forget bias as the results name it."""
    return "chrono" if forget_bias == "chrono" else f"{forget_bias:g}"


@functools.cache
def _cell(input_size: int, hidden_size: int, dtype: str) -> rg.Cell:
    return rg.cells.lstm(input_size, hidden_size, dtype=dtype)


def draw(
    forget_bias: ForgetBias, seed: int, config: Config
) -> tuple[rg.cells.LSTMParams, jax.Array, jax.Array, jax.Array]:
    """Returns parameters, inputs, read-out and classes of one seed, for the longest T."""
    longest = config.steps[-1]
    bias = rg.initializers.chrono(longest) if forget_bias == "chrono" else forget_bias
    drawing = rg.cells.lstm(config.input_size, config.hidden_size, forget_bias=bias, dtype=config.dtype)
    key_params, key_xs, key_read_out, key_classes = jax.random.split(jax.random.key(seed), 4)
    xs = jax.random.normal(key_xs, (longest, config.input_size), config.dtype)
    shape = (config.classes, config.hidden_size)
    read_out = config.hidden_size**-0.5 * jax.random.normal(key_read_out, shape, config.dtype)
    classes = jax.random.randint(key_classes, (longest,), 0, config.classes)
    return drawing.init(key_params), xs, read_out, classes


def cotangents(h: jax.Array, read_out: jax.Array, classes: jax.Array, loss: str) -> jax.Array:
    """Returns ∂L_t/∂h_t = V^T (softmax(V h_t) − onehot) for every step, shape (T, N).

    The mean over steps divides by T, which no relative error or cosine sees: left out.
    """
    at_every_step = (jax.nn.softmax(h @ read_out.T) - jax.nn.one_hot(classes, len(read_out), dtype=h.dtype)) @ read_out
    if loss == "all":
        return at_every_step
    return jnp.zeros_like(h).at[-1].set(at_every_step[-1])


def _by_gate(params: rg.cells.LSTMParams) -> jax.Array:
    """Returns each gate's W, U and b as one vector, shape (4, …)."""
    return jnp.concatenate([leaf.reshape(4, -1) for leaf in params], axis=-1)


@functools.partial(jax.jit, static_argnames=("cell",))
def _measure(cell, params, xs, read_out, classes):
    """Error and cosine of the truncated gradient of one run, each of shape (loss, block)."""
    state = cell.init_state()
    states = rg.unroll(cell, params, state, xs).states
    errors, cosines = [], []
    for loss in LOSSES:
        own = rg.cells.LSTMState(h=cotangents(states.h, read_out, classes, loss), c=jnp.zeros_like(states.c))
        true = _by_gate(rg.formulas.lstm_gradients(params, state, xs, own).params)
        truncated = _by_gate(rg.formulas.truncated_lstm_gradients(params, state, xs, own).params)

        def dot(a, b):
            by_gate = jnp.sum(a * b, axis=-1)
            return jnp.append(by_gate, jnp.sum(by_gate))

        errors.append(jnp.sqrt(dot(truncated - true, truncated - true) / dot(true, true)))
        cosines.append(dot(truncated, true) / jnp.sqrt(dot(truncated, truncated) * dot(true, true)))
    return {"error": jnp.stack(errors), "cosine": jnp.stack(cosines)}


def _measure_row(steps: int, config: Config) -> xr.Dataset:
    """Returns the dataset of one length T: every forget bias and seed."""
    cell = _cell(config.input_size, config.hidden_size, config.dtype)
    biases = []
    for forget_bias in config.forget_biases:
        seeds = []
        for seed in range(config.first_seed, config.first_seed + config.seeds):
            params, xs, read_out, classes = draw(forget_bias, seed, config)
            measured = _measure(cell, params, xs[:steps], read_out, classes[:steps])
            seeds.append(jax.tree.map(np.asarray, measured))
        biases.append({name: np.stack([measured[name] for measured in seeds]) for name in MEASURED})
    dims = ("forget_bias", "seed", "loss", "block")
    return xr.Dataset({name: (dims, np.stack([measured[name] for measured in biases])) for name in MEASURED})


MEASURED = ("error", "cosine")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "error": ("1", "‖truncated − true‖ / ‖true‖ of the gradient with respect to W, U, b"),
    "cosine": ("1", "cosine of the angle between the truncated and the true gradient"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with medians and intervals over seeds."""
    summarise(dataset, _DESCRIPTIONS, _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished lengths are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    screen = screen or rich.console.Console(quiet=True)
    started = time.perf_counter()
    precision = jax.enable_x64(True) if config.dtype == "float64" else contextlib.nullcontext()
    measured, resumed = [], 0
    with command.progress(screen) as bar, precision:
        task = bar.add_task("measuring", total=len(config.steps))
        for steps in config.steps:
            bar.update(task, description=f"T = {steps}")
            make = functools.partial(_measure_row, steps, config)
            part, was_there = (make(), False) if parts is None else parts.get(f"steps-{steps}", make)
            resumed += was_there
            measured.append(part)
            bar.advance(task)
    if resumed:
        screen.print(f"resumed: {resumed} of {len(config.steps)} lengths were already measured")
    dataset = xr.concat([part.drop_attrs() for part in measured], dim="steps").assign_coords(
        steps=list(config.steps),
        forget_bias=[bias_name(bias) for bias in config.forget_biases],
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        loss=list(LOSSES),
        block=list(BLOCKS),
    )
    certificate = rg.certificate(config.dtype)
    dataset.attrs = results.provenance(
        experiment="truncated_gradient",
        command=f"python -m experiments.truncated_gradient {command.flags(config)}".strip(),
        config=command.config_dict(config),
        dtype=certificate.dtype,
        matmul_precision=certificate.matmul_precision,
        confidence=CONFIDENCE,
        seconds=round(time.perf_counter() - started, 1),
    )
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_LOSS_WORDS = {"last": "loss of the last step", "all": "mean loss of all steps"}


def _interval(row: xr.Dataset, name: str) -> str:
    median, low, high = (float(row[f"{name}_{part}"]) for part in ("median", "low", "high"))
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = json.loads(dataset.attrs["config"])
    *shorter, longest = dataset["steps"].values.tolist()
    shown = rich.table.Table(
        title=f"Truncated against true LSTM gradient: N={config['hidden_size']}, D={config['input_size']}, "
        f"{config['classes']} classes, {config['seeds']} seeds, {dataset.attrs['dtype']}, "
        f"matmul {dataset.attrs['matmul_precision']}, {dataset.attrs['backend']}",
        caption="error: ‖truncated − true‖ / ‖true‖ over W, U, b; i f g o: the same of one gate's rows, at "
        f"T = {longest}; medians over seeds [{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("loss")
    columns = [*(f"T={steps}" for steps in shorter), f"error, T={longest}", f"cosine, T={longest}", *BLOCKS[:-1]]
    for name in ("b_f", *columns):
        shown.add_column(name, justify="right")
    for loss in LOSSES:
        for forget_bias in dataset["forget_bias"].values:
            row = dataset.sel(loss=loss, forget_bias=forget_bias)
            total = row.sel(block="total")
            at_longest = row.sel(steps=longest)
            shown.add_row(
                loss,
                str(forget_bias),
                *(f"{float(total['error_median'].sel(steps=steps)):.2f}" for steps in shorter),
                _interval(at_longest.sel(block="total"), "error"),
                _interval(at_longest.sel(block="total"), "cosine"),
                *(f"{float(at_longest['error_median'].sel(block=gate)):.2f}" for gate in BLOCKS[:-1]),
            )
        shown.add_section()
    return shown


CLAIM, DIRECTION, PREDICTION = "δh_t = ∂L_t/∂h_t gives the gradient", "its direction at least", "prediction"


def _claim_check(dataset: xr.Dataset, loss: str, forget_bias: str) -> Check:
    """The length at which the interval reaches farthest speaks: the claim makes no exception for any."""
    total = dataset.sel(block="total", loss=loss, forget_bias=forget_bias)
    worst = total.isel(steps=int(total["error_high"].argmax("steps")))
    return Check(
        name=f"{CLAIM}: {loss}, b_f = {forget_bias}",
        value=f"error {_interval(worst, 'error')} at T = {int(worst['steps'])}",
        bound=f"≤ {LARGEST_ERROR:g}",
        holds=bool(worst["error_high"] <= LARGEST_ERROR),
    )


def _direction_check(dataset: xr.Dataset, loss: str) -> Check:
    total = dataset.sel(block="total", loss=loss)
    worst = total.isel(total["cosine_low"].argmin(...))
    at = f"b_f = {worst['forget_bias'].item()}, T = {int(worst['steps'])}"
    return Check(
        name=f"{DIRECTION}: {loss}",
        value=f"cosine {_interval(worst, 'cosine')} at {at}",
        bound=f"≥ {SMALLEST_COSINE:g}",
        holds=bool(worst["cosine_low"] >= SMALLEST_COSINE),
    )


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns checks of the claim per loss and forget bias, of the direction, and of the predictions that apply."""
    if not all(np.isfinite(dataset[name]).all() for name in MEASURED):
        raise ValueError("a seed gave no number, nothing to judge")
    biases = dataset["forget_bias"].values.tolist()
    checks = [_claim_check(dataset, loss, forget_bias) for loss in LOSSES for forget_bias in biases]
    checks += [_direction_check(dataset, loss) for loss in LOSSES]
    if PREDICTED_STEPS not in dataset["steps"]:
        return checks
    error = dataset["error_median"].sel(block="total", steps=PREDICTED_STEPS)
    low, high = PREDICTED_ERROR
    for loss in LOSSES:
        at = {forget_bias: float(error.sel(loss=loss, forget_bias=forget_bias)) for forget_bias in biases}
        for forget_bias in filter(biases.__contains__, PREDICTED_AT):
            checks.append(
                Check(
                    f"{PREDICTION}, error at T = {PREDICTED_STEPS}: {loss}, b_f = {forget_bias}",
                    f"{at[forget_bias]:.3f}",
                    f"{low:g} to {high:g}",
                    low <= at[forget_bias] <= high,
                )
            )
        if {"0", "5"} <= set(biases):
            checks.append(
                Check(
                    f"{PREDICTION}, more error at b_f = 5 than at 0: {loss}",
                    f"{at['5']:.2f} against {at['0']:.2f}",
                    "more",
                    at["5"] > at["0"],
                )
            )
    return checks


def summary(dataset: xr.Dataset) -> str:
    """Returns the verdict in one sentence."""
    every = verdict(dataset)
    claims = [check for check in every if check.name.startswith(CLAIM)]
    holding = [check.name.removeprefix(f"{CLAIM}: ") for check in claims if check.holds]
    if not holding:
        sentence = f"Claim “{CLAIM}”: does not hold at any forget bias."
    elif len(holding) == len(claims):
        sentence = f"Claim “{CLAIM}”: holds at every forget bias."
    else:
        sentence = f"Claim “{CLAIM}”: holds only for {'; '.join(holding)}."
    lost = [check for check in every if check.name.startswith(DIRECTION) and not check.holds]
    found = " and ".join(f"{check.value} ({check.name.removeprefix(f'{DIRECTION}: ')})" for check in lost)
    sentence += f"  Nor is the direction kept: {found}." if lost else "  The direction is kept."
    missed = [
        check.name.removeprefix(f"{PREDICTION}, ")
        for check in every
        if check.name.startswith(PREDICTION) and not check.holds
    ]
    return sentence + (f"  Predictions that came out otherwise: {'; '.join(missed)}." if missed else "")


_COLOURS = ("#16325c", "#2f6f9f", "#4aa3a2", "#8a9a3b", "#d97706", "#c81e4a", "#7a3b8f", "#555555")
_GATE_COLOURS = {"i": "#7fa7c9", "f": "#e8b04a", "g": "#9bbf85", "o": "#b9a0cf"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: error against length for each forget bias, and error by gate at the longest."""
    config = json.loads(dataset.attrs["config"])
    lengths, biases = dataset["steps"].values, dataset["forget_bias"].values.tolist()
    drawn = matplotlib.figure.Figure(figsize=(10.5, 7.6), layout="constrained")
    panels = drawn.subplots(2, 2, sharey="row")
    for column, loss in enumerate(LOSSES):
        top, bottom = panels[:, column]
        total = dataset.sel(loss=loss, block="total")
        for index, forget_bias in enumerate(biases):
            at = total.sel(forget_bias=forget_bias)
            colour = _COLOURS[index % len(_COLOURS)]
            label = "chrono" if forget_bias == "chrono" else f"b_f = {forget_bias}"
            top.plot(lengths, at["error_median"], color=colour, marker=_MARKERS[index % len(_MARKERS)], label=label)
            top.fill_between(lengths, at["error_low"], at["error_high"], color=colour, alpha=0.15, linewidth=0)
        top.axhline(LARGEST_ERROR, color="0.4", linestyle=":", linewidth=1.2)
        top.set_xscale("log")
        top.set_xticks(lengths, [str(length) for length in lengths])
        top.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        top.set_xlabel("length T (steps)")
        top.set_title(_LOSS_WORDS[loss], fontsize=11)

        longest = dataset.sel(loss=loss).isel(steps=-1)
        places = np.arange(len(biases))
        for index, gate in enumerate(BLOCKS[:-1]):
            at = longest.sel(block=gate)
            median = at["error_median"].values
            around = [median - at["error_low"].values, at["error_high"].values - median]
            bottom.bar(
                places + 0.2 * (index - 1.5),
                median,
                0.18,
                yerr=around,
                color=_GATE_COLOURS[gate],
                label=f"gate {gate}",
                error_kw={"elinewidth": 0.8, "ecolor": "0.25"},
            )
        bottom.axhline(LARGEST_ERROR, color="0.4", linestyle=":", linewidth=1.2)
        bottom.set_xticks(places, biases)
        bottom.set_xlabel("forget bias b_f")
        for axes in (top, bottom):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("relative error, all weights")
    panels[1, 0].set_ylabel(f"relative error by gate, T = {lengths[-1]}")
    panels[0, 1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels[1, 1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    drawn.suptitle(
        "How far the truncated LSTM gradient (δh_t = ∂L_t/∂h_t) is from the true one: ‖truncated − true‖ / ‖true‖\n"
        f"untrained, N={config['hidden_size']}, Gaussian inputs, {config['seeds']} seeds: median and its 95 % "
        f"interval; dotted: {LARGEST_ERROR:g}, the most that the claim allows",
        fontsize=11,
    )
    return drawn


ABOUT = """Is the LSTM gradient with δh_t = ∂L_t/∂h_t the gradient?

Computes the true and the truncated gradient of a softmax cross-entropy along the same runs, for several lengths and
forget biases; prints relative errors and cosines with intervals, and writes a figure and a netCDF file."""

EXPERIMENT = command.Experiment("truncated_gradient", ABOUT, run, table, verdict, summary, figure)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    command.main(EXPERIMENT, Config(), SMOKE, arguments)


if __name__ == "__main__":
    main()
