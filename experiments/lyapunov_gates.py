"""Does the forget gate set the LSTM's largest Lyapunov exponent, and does one see it when c is held fixed?

For each forget bias and seed it runs an LSTM on Gaussian inputs and computes three exponents along the same run: of
the full state, of h with c held, and of the direct path, whose largest exponent is that of the unit with the most open
forget gate, max over units of E log f.  Running time: half a minute on two cores with the defaults.
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
import numpy as np
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, interval_text, median_interval, stored_text, summarise

CLAIMS = (
    Claim(
        "E5",
        "The exponents of an LSTM may be computed from ∂h'/∂h alone, with the memory c held fixed, as if h were the "
        "whole state.",
        source="a published program for the spectra of gated networks, which differentiates h' by h only",
        prediction="held fixed, near −2 nats per step (within 0.5) whatever the forget bias, where the exponent of the "
        "full state (h, c) moves from −0.5 at b_f = 0 (within 0.1) to −0.006 at b_f = 5 (within 0.006)",
        refuted="the two differ by more than 0.1 nats per step",
        functions=("rg.lyapunov_spectrum",),
        tests=(
            "tests/test_lyapunov_gates.py",
            "tests/test_lyapunov.py::test_block_holds_the_other_fields_fixed",
        ),
    ),
)

KINDS = ("full", "held", "direct")
"""Exponents that are computed along each run."""
APART = 0.1
"""Nats per step; see WHY_APART."""
PREDICTED_FULL = {0.0: (-0.6, -0.4), 5.0: (-0.012, 0.0)}
"""From first runs on other inputs; the second is read as −0.006 ± 0.006."""
PREDICTED_HELD = (-2.5, -1.5)
WHY_APART = "two rates that differ by 0.1 nats per step part company by one factor e in ten steps"
WHY_PREDICTED = "first runs on other inputs; −2 ± 0.5, −0.5 ± 0.1, −0.006 ± 0.006"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the forget-bias sweep."""

    forget_biases: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    """Effective biases of the forget gate, rising."""
    steps: int = 2_000
    """Steps over which growth is averaged."""
    transient: int = 500
    """Steps run first; the slowest gates at b_f = 5 remember about 150."""
    hidden_size: int = 32
    """Units N; weights and other biases are drawn as in Torch."""
    input_size: int = 32
    """Width D of the input, entries N(0, 1)."""
    seeds: int = 10
    """Independent repetitions; each draws weights and inputs, the same at every forget bias."""
    first_seed: int = 0
    """Seeds run from here."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of weights, states and frames."""


SMOKE = Config(forget_biases=(0.0, 2.0, 5.0), steps=200, transient=100, hidden_size=8, input_size=8, seeds=3)
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"steps": 32, "transient": 0, "hidden_size": 1, "input_size": 1, "seeds": 1, "first_seed": 0}
    command.check_at_least(config, least)
    biases = config.forget_biases
    if not biases or list(biases) != sorted(set(biases)) or not np.isfinite(biases).all():
        raise UserError(f"--forget-biases: expected finite numbers, rising, found {biases}")


@functools.cache
def _cell(input_size: int, hidden_size: int, dtype: str) -> rg.Cell:
    return rg.cells.lstm(input_size, hidden_size, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("cell", "transient"))
def _measure(cell, params, xs, *, transient):
    """The three exponents of one run, with standard errors."""
    state = cell.init_state()
    full = rg.lyapunov_spectrum(cell, params, state, xs, k=1, num_transient=transient)
    held = rg.lyapunov_spectrum(cell, params, state, xs, k=1, num_transient=transient, block="h")
    log_f = jnp.log(rg.unroll(cell, params, state, xs).gates.f[transient:])
    direct = jnp.max(jnp.mean(log_f, axis=0))
    return {
        "exponent": jnp.stack([full.exponents[0], held.exponents[0], direct]),
        "stderr": jnp.stack([full.stderr[0], held.stderr[0], jnp.full((), jnp.nan, direct.dtype)]),
        "converged": jnp.stack([full.converged[0], held.converged[0]]),
        "nonfinite_step": full.nonfinite_step,
    }


def _measure_row(forget_bias: float, config: Config) -> xr.Dataset:
    """Returns the dataset of one forget bias: every seed."""
    sizes = (config.input_size, config.hidden_size)
    drawing = rg.cells.lstm(*sizes, forget_bias=forget_bias, dtype=config.dtype)
    seeds = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        key_params, key_xs = jax.random.split(jax.random.key(seed))
        xs = jax.random.normal(key_xs, (config.transient + config.steps, config.input_size), config.dtype)
        cell = _cell(*sizes, config.dtype)
        measured = _measure(cell, drawing.init(key_params), xs, transient=config.transient)
        seeds.append(jax.tree.map(np.asarray, measured))
    dims = {"exponent": ("kind",), "stderr": ("kind",), "converged": ("followed",), "nonfinite_step": ()}
    return xr.Dataset({name: (("seed", *dims[name]), np.stack([s[name] for s in seeds])) for name in dims})


MEASURED = ("exponent", "stderr", "converged", "nonfinite_step")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "exponent": (
        "nats per step",
        "largest exponent: full state, h with c held, direct path (largest E log f of a unit)",
    ),
    "stderr": ("nats per step", "its standard error from blocks of the run; NaN for the direct path"),
    "converged": ("1", "1 where both halves of the run agree within 2 standard errors of their difference"),
    "nonfinite_step": ("steps", "first time step with a non-finite state; −1 for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with medians and intervals over seeds."""
    summarise(dataset, ("exponent",), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished forget biases are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    pieces = [
        Piece(f"bias-{bias:g}", f"forget bias {bias:g}", functools.partial(_measure_row, bias, config))
        for bias in config.forget_biases
    ]
    # entered here and not at import: float64 is a setting of the run
    with jax.enable_x64(True) if config.dtype == "float64" else contextlib.nullcontext():
        measured = command.measure(pieces, parts=parts, screen=screen)
    dataset = xr.concat(measured, dim="forget_bias").assign_coords(
        forget_bias=list(config.forget_biases),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        kind=list(KINDS),
        followed=list(KINDS[:2]),
    )
    dataset["converged"] = dataset["converged"].astype(np.int8)  # netCDF knows no bool
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance("lyapunov_gates", config, seconds=seconds, dtype=config.dtype)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"Largest Lyapunov exponent of an LSTM: N={config['hidden_size']}, D={config['input_size']}, "
        f"T={config['steps']} after {config['transient']}, {config['seeds']} seeds, {dataset.attrs['dtype']}, "
        f"matmul {dataset.attrs['matmul_precision']}, {dataset.attrs['backend']}",
        caption=f"nats per step: medians over seeds [{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]; "
        "stderr: median over seeds of the full exponent's own",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("b_f", "full state (h, c)", "h with c held", "direct path, max E log f", "stderr", "converged"):
        shown.add_column(name, justify="right")
    for index in range(dataset.sizes["forget_bias"]):
        row = dataset.isel(forget_bias=index)
        shown.add_row(
            f"{float(row['forget_bias']):g}",
            *(stored_text(row.sel(kind=kind), "exponent", ".4f") for kind in KINDS),
            f"{float(row['stderr'].sel(kind='full').median()):.4f}",
            f"{int(row['converged'].sel(followed='full').sum())} of {row.sizes['seed']}",
        )
    return shown


def _apart(dataset: xr.Dataset) -> xr.DataArray:
    return abs(dataset["exponent"].sel(kind="held") - dataset["exponent"].sel(kind="full"))


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns a check of the claim per forget bias, then those of the predicted numbers where one was made."""
    checks = []
    for bias, apart in _apart(dataset).groupby("forget_bias"):
        if not np.isfinite(apart).all():
            raise ValueError(f"b_f = {bias:g}: a seed gave no number, nothing to judge")
        interval = median_interval(apart.squeeze().values, axis=0)
        checks.append(
            Check(
                f"∂h'/∂h with c held gives the exponent: b_f = {bias:g}",
                f"apart by {interval_text(interval, '.3f')}",
                f"≤ {APART:g}",
                # judged by the side of the interval that speaks against the claim
                bool(interval.high <= APART),
                "E5",
                WHY_APART,
            )
        )
    held = dataset["exponent_median"].sel(kind="held").values
    expected = {"c held, every b_f": (held.min(), held.max(), *PREDICTED_HELD)}
    for forget_bias, bounds in PREDICTED_FULL.items():
        if forget_bias in dataset["forget_bias"].values:
            middle = float(dataset["exponent_median"].sel(kind="full", forget_bias=forget_bias))
            expected[f"full state, b_f = {forget_bias:g}"] = (middle, middle, *bounds)
    for name, (least, most, low, high) in expected.items():
        value = f"{least:.4f}" if least == most else f"{least:.2f} to {most:.2f}"
        holds = bool(low <= least and most <= high)
        bound = f"{low:g} to {high:g}"
        checks.append(Check(f"prediction: {name}", value, bound, holds, "E5", WHY_PREDICTED, decides=False))
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a sentence."""
    every = verdict(dataset)
    full, held = (dataset["exponent_median"].sel(kind=kind).values for kind in ("full", "held"))
    sentence = (
        f"with c held the exponent is {held.min():.2f} to {held.max():.2f} nats per step, where that of the full state "
        f"moves from {full[0]:.4f} at b_f = {float(dataset['forget_bias'][0]):g} to {full[-1]:.4f} at "
        f"b_f = {float(dataset['forget_bias'][-1]):g}."
    )
    holding = [check.name.rsplit(": ", 1)[1] for check in every if check.decides and check.holds]
    if holding:
        sentence += f"  The two agree at {', '.join(holding)}."
    missed = [check.name.removeprefix("prediction: ") for check in every if not check.decides and not check.holds]
    if missed:
        sentence += f"  The predicted numbers came out otherwise for {'; '.join(missed)}."
    return {"E5": sentence}


_STYLES = {
    "full": {"color": "#16325c", "marker": "o", "label": "full state (h, c): the true exponent"},
    "direct": {"color": "#d97706", "marker": "^", "linestyle": "--", "label": "direct path: max over units of E log f"},
    "held": {"color": "#c81e4a", "marker": "s", "label": "h with c held fixed"},
}


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: exponents against forget bias, and the true one again on a logarithmic scale."""
    config = json.loads(dataset.attrs["config"])
    drawn = matplotlib.figure.Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    biases = dataset["forget_bias"].values
    rates = -dataset["exponent_median"].sel(kind=["full", "direct"]).values
    bottom = 0.5 * rates[rates > 0].min()
    for kind, style in _STYLES.items():
        at = dataset.sel(kind=kind)
        median, low, high = (at[f"exponent_{part}"].values for part in ("median", "low", "high"))
        left.plot(biases, median, **style)
        left.fill_between(biases, low, high, color=style["color"], alpha=0.2, linewidth=0)
        if kind == "held":
            continue
        decays = median < 0
        right.plot(biases[decays], -median[decays], **style)
        # an interval that reaches zero reaches the bottom of a logarithmic scale
        right.fill_between(biases, np.maximum(-high, bottom), -low, color=style["color"], alpha=0.2, linewidth=0)
    left.axhline(0, color="0.5", linewidth=0.8)
    left.set_ylabel("largest Lyapunov exponent (nats per step)")
    left.set_title("true and wrong exponent", fontsize=11)
    right.set_yscale("log")
    right.set_ylim(bottom=bottom)
    right.set_ylabel("decay rate, −exponent (nats per step)")
    right.set_title("near zero, where memory is", fontsize=11)
    for axes in (left, right):
        axes.set_xlabel("forget bias b_f")
        axes.set_xticks(biases)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    drawn.suptitle(
        "An LSTM's largest Lyapunov exponent follows its forget gate; with c held fixed one does not see it\n"
        f"N={config['hidden_size']}, Gaussian inputs, {config['seeds']} seeds: median and its 95 % interval",
        fontsize=11,
    )
    return drawn


ABOUT = """Does the forget gate set the LSTM's largest Lyapunov exponent, and does one see it when c is held fixed?

Sweeps the forget bias and computes, along the same runs, the exponent of the full state, of h with the memory held
fixed, and of the direct path; prints a table with medians and intervals, and writes a figure and a netCDF file."""

CAPTION = """Largest Lyapunov exponent of an LSTM against its forget bias: of the full state, of the direct path, and
of h with c held fixed, which stays near −2; right, the first two again near zero on a logarithmic scale."""

EXPERIMENT = command.Experiment(
    name="lyapunov_gates",
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
