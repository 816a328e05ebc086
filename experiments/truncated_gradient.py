"""Is the LSTM gradient with δh_t = ∂L_t/∂h_t the gradient?

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
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, stored_text, summarise

CLAIMS = (
    Claim(
        "T1",
        "The weights' gradient of an LSTM follows from δc_t = δh_t ⊙ o_t ⊙ (1 − tanh² c_t) + δc_{t+1} ⊙ f_{t+1} with "
        "δh_t = ∂L_t/∂h_t, what the loss takes from h_t itself.",
        source="introductions to the LSTM that print these lines as its backpropagation; Hochreiter & Schmidhuber "
        "1997, who cut the gradient in this way, call it truncated",
        prediction="made before the first run: the whole gradient is off by 20 % to 80 % at T = 100 for b_f = 0 and "
        "1, and by more for b_f = 5 than for b_f = 0, since slower forgetting leaves more steps to pass through the "
        "gates",
        refuted="the relative error of the whole gradient exceeds 0.1 at some length T",
        functions=("rg.formulas.lstm_gradients", "rg.formulas.truncated_lstm_gradients"),
        tests=(
            "tests/test_truncated_gradient.py",
            "tests/test_formulas.py::test_truncated_is_the_gradient_of_a_run_whose_gates_read_a_constant",
        ),
    ),
)

LOSSES = ("last", "all")
"""The loss of the last step, or the mean over all steps."""
BLOCKS = ("i", "f", "g", "o", "total")
"""A gate's rows of W, U and b, or everything."""
LARGEST_ERROR = 0.1
"""Largest relative error at which one formula is granted to be the other."""
WHY_ERROR = "a number that is off by more than a tenth is not right to one digit"
SMALLEST_COSINE = 0.9
"""Cosine at which a direction is granted."""
WHY_COSINE = "a cosine of 0.9 is an angle of 26 degrees"
PREDICTED_ERROR = (0.2, 0.8)
PREDICTED_AT = ("0", "1")
"""Forget biases for which that was predicted."""
PREDICTED_STEPS = 100
"""And the length."""
WHY_PREDICTED = "written down before the first run; slower forgetting leaves more steps to pass through the gates"

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
    command.check_at_least(config, least)
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
    started = time.perf_counter()
    pieces = [
        Piece(f"steps-{steps}", f"T = {steps}", functools.partial(_measure_row, steps, config))
        for steps in config.steps
    ]
    # entered here and not at import: float64 is a setting of the run
    with jax.enable_x64(True) if config.dtype == "float64" else contextlib.nullcontext():
        measured = command.measure(pieces, parts=parts, screen=screen)
    dataset = xr.concat(measured, dim="steps").assign_coords(
        steps=list(config.steps),
        forget_bias=[bias_name(bias) for bias in config.forget_biases],
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        loss=list(LOSSES),
        block=list(BLOCKS),
    )
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance("truncated_gradient", config, seconds=seconds, dtype=config.dtype)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_LOSS_WORDS = {"last": "loss of the last step", "all": "mean loss of all steps"}


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
                stored_text(at_longest.sel(block="total"), "error"),
                stored_text(at_longest.sel(block="total"), "cosine"),
                *(f"{float(at_longest['error_median'].sel(block=gate)):.2f}" for gate in BLOCKS[:-1]),
            )
        shown.add_section()
    return shown


_CLAIM = "δh_t = ∂L_t/∂h_t gives the gradient"


def _claim_check(dataset: xr.Dataset, loss: str, forget_bias: str) -> Check:
    """The length at which the interval reaches farthest speaks: the claim makes no exception for any."""
    total = dataset.sel(block="total", loss=loss, forget_bias=forget_bias)
    worst = total.isel(steps=int(total["error_high"].argmax("steps")))
    return Check(
        f"{_CLAIM}: {loss}, b_f = {forget_bias}",
        f"error {stored_text(worst, 'error')} at T = {int(worst['steps'])}",
        f"≤ {LARGEST_ERROR:g}",
        bool(worst["error_high"] <= LARGEST_ERROR),
        "T1",
        WHY_ERROR,
    )


def _direction_check(dataset: xr.Dataset, loss: str) -> Check:
    total = dataset.sel(block="total", loss=loss)
    worst = total.isel(total["cosine_low"].argmin(...))
    at = f"b_f = {worst['forget_bias'].item()}, T = {int(worst['steps'])}"
    return Check(
        f"its direction at least: {loss}",
        f"cosine {stored_text(worst, 'cosine')} at {at}",
        f"≥ {SMALLEST_COSINE:g}",
        bool(worst["cosine_low"] >= SMALLEST_COSINE),
        "T1",
        WHY_COSINE,
        decides=False,
    )


def _predictions(dataset: xr.Dataset) -> list[Check]:
    biases = dataset["forget_bias"].values.tolist()
    error = dataset["error_median"].sel(block="total", steps=PREDICTED_STEPS)
    low, high = PREDICTED_ERROR
    found: list[tuple[str, str, str, bool]] = []
    for loss in LOSSES:
        at = {forget_bias: float(error.sel(loss=loss, forget_bias=forget_bias)) for forget_bias in biases}
        for forget_bias in filter(biases.__contains__, PREDICTED_AT):
            name = f"error at T = {PREDICTED_STEPS}: {loss}, b_f = {forget_bias}"
            found.append((name, f"{at[forget_bias]:.3f}", f"{low:g} to {high:g}", low <= at[forget_bias] <= high))
        if {"0", "5"} <= set(biases):
            name, value = f"more error at b_f = 5 than at 0: {loss}", f"{at['5']:.2f} against {at['0']:.2f}"
            found.append((name, value, "more", at["5"] > at["0"]))
    return [
        Check(f"prediction, {name}", value, bound, holds, "T1", WHY_PREDICTED, decides=False)
        for name, value, bound, holds in found
    ]


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns checks of the claim per loss and forget bias, of the direction, and of the predictions that apply."""
    if not all(np.isfinite(dataset[name]).all() for name in MEASURED):
        raise ValueError("a seed gave no number, nothing to judge")
    biases = dataset["forget_bias"].values.tolist()
    checks = [_claim_check(dataset, loss, forget_bias) for loss in LOSSES for forget_bias in biases]
    checks += [_direction_check(dataset, loss) for loss in LOSSES]
    return checks + (_predictions(dataset) if PREDICTED_STEPS in dataset["steps"] else [])


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    every = verdict(dataset)
    errors = dataset["error_median"].sel(block="total").isel(steps=-1)
    sentence = (
        f"at T = {int(dataset['steps'][-1])} the whole gradient is off by {float(errors.min()):.0%} to "
        f"{float(errors.max()):.0%}, by forget bias and loss."
    )
    holding = [check.name.removeprefix(f"{_CLAIM}: ") for check in every if check.decides and check.holds]
    if holding:
        sentence += f"  It is within {LARGEST_ERROR:.0%} at every length for {'; '.join(holding)}."
    direction = [check for check in every if check.name.startswith("its direction")]
    lost = [f"{check.value} ({check.name.rsplit(': ', 1)[1]})" for check in direction if not check.holds]
    sentence += f"  Nor is the direction kept: {' and '.join(lost)}." if lost else "  The direction is kept."
    predicted = [check for check in every if check.name.startswith("prediction, ")]
    missed = [check.name.removeprefix("prediction, ") for check in predicted if not check.holds]
    if missed:
        sentence += f"  Predictions that came out otherwise: {'; '.join(missed)}."
    return {"T1": sentence}


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

CAPTION = """Relative error of the LSTM gradient computed with δh_t = ∂L_t/∂h_t, against the length of the
sequence for several forget biases, and gate by gate at the longest; left for the loss of the last step, right for the
mean over all steps."""

EXPERIMENT = command.Experiment(
    name="truncated_gradient",
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
