"""Does the forget gate set the LSTM's largest Lyapunov exponent, and does one see it when c is held fixed?

Claim tried (E5 of the claim map): the exponents of an LSTM may be computed from ∂h'/∂h alone, with the memory c held
fixed, as if h were the whole state.
Source: a published program for the spectra of gated networks, which differentiates h' by h only.
Prediction: that exponent stays near −2 nats per step (within 0.5) whatever the forget bias, where the exponent of the
full state (h, c) moves from −0.5 at b_f = 0 (within 0.1) to −0.006 at b_f = 5 (within 0.006).
Refuted if: the two differ by more than 0.1 nats per step at some forget bias.  Whether the predicted numbers come true
is checked apart.

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
from experiments.command import Check, UserError
from experiments.statistics import CONFIDENCE, describe, median_interval, summarise

KINDS = ("full", "held", "direct")
"""Exponents that are computed along each run."""
APART = 0.1
"""Nats per step; two rates that differ by this part company by one factor e in ten steps."""
PREDICTED_FULL = {0.0: (-0.6, -0.4), 5.0: (-0.012, 0.0)}
"""From first runs on other inputs; the second is read as −0.006 ± 0.006."""
PREDICTED_HELD = (-2.5, -1.5)


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
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {lowest}, found {getattr(config, name)}")
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
    screen = screen or rich.console.Console(quiet=True)
    started = time.perf_counter()
    precision = jax.enable_x64(True) if config.dtype == "float64" else contextlib.nullcontext()
    measured, resumed = [], 0
    with command.progress(screen) as bar, precision:
        task = bar.add_task("measuring", total=len(config.forget_biases))
        for forget_bias in config.forget_biases:
            bar.update(task, description=f"forget bias {forget_bias:g}")
            make = functools.partial(_measure_row, forget_bias, config)
            part, was_there = (make(), False) if parts is None else parts.get(f"bias-{forget_bias:g}", make)
            resumed += was_there
            measured.append(part)
            bar.advance(task)
    if resumed:
        screen.print(f"resumed: {resumed} of {len(config.forget_biases)} forget biases were already measured")
    dataset = xr.concat([part.drop_attrs() for part in measured], dim="forget_bias").assign_coords(
        forget_bias=list(config.forget_biases),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        kind=list(KINDS),
        followed=list(KINDS[:2]),
    )
    dataset["converged"] = dataset["converged"].astype(np.int8)  # netCDF knows no bool
    certificate = rg.certificate(config.dtype)
    dataset.attrs = results.provenance(
        experiment="lyapunov_gates",
        command=f"python -m experiments.lyapunov_gates {command.flags(config)}".strip(),
        config=command.config_dict(config),
        dtype=certificate.dtype,
        matmul_precision=certificate.matmul_precision,
        confidence=CONFIDENCE,
        seconds=round(time.perf_counter() - started, 1),
    )
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _interval(row: xr.Dataset, kind: str, digits: int = 4) -> str:
    median, low, high = (float(row[f"exponent_{part}"].sel(kind=kind)) for part in ("median", "low", "high"))
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


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
            *(_interval(row, kind) for kind in KINDS),
            f"{float(row['stderr'].sel(kind='full').median()):.4f}",
            f"{int(row['converged'].sel(followed='full').sum())} of {row.sizes['seed']}",
        )
    return shown


CLAIM, PREDICTION = "∂h'/∂h with c held gives the exponent", "prediction"


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns a check of the claim per forget bias, then those of the predicted numbers where one was made."""
    checks = []
    for index in range(dataset.sizes["forget_bias"]):
        row = dataset.isel(forget_bias=index)
        exponent = row["exponent"]
        if not np.isfinite(exponent.sel(kind=list(KINDS[:2]))).all():
            raise ValueError(f"b_f = {float(row['forget_bias']):g}: a seed gave no number, nothing to judge")
        apart = np.abs(exponent.sel(kind="held").values - exponent.sel(kind="full").values)
        interval = median_interval(apart, axis=0)
        checks.append(
            Check(
                name=f"{CLAIM}: b_f = {float(row['forget_bias']):g}",
                value=f"apart by {float(interval.median):.3f} [{float(interval.low):.3f}, {float(interval.high):.3f}]",
                bound=f"≤ {APART:g}",
                # judged by the side of the interval that speaks against the claim
                holds=bool(interval.high <= APART),
            )
        )
    held = dataset["exponent_median"].sel(kind="held").values
    low, high = PREDICTED_HELD
    checks.append(
        Check(
            f"{PREDICTION}: c held, every b_f",
            f"{held.min():.2f} to {held.max():.2f}",
            f"{low:g} to {high:g}",
            bool(low <= held.min() and held.max() <= high),
        )
    )
    for forget_bias, (low, high) in PREDICTED_FULL.items():
        if forget_bias not in dataset["forget_bias"].values:
            continue
        median = float(dataset["exponent_median"].sel(kind="full", forget_bias=forget_bias))
        name = f"{PREDICTION}: full state, b_f = {forget_bias:g}"
        checks.append(Check(name, f"{median:.4f}", f"{low:g} to {high:g}", bool(low <= median <= high)))
    return checks


def summary(dataset: xr.Dataset) -> str:
    """Returns the verdict in one sentence."""
    every = verdict(dataset)
    claims = [check for check in every if check.name.startswith(CLAIM)]
    missed = [check.name.removeprefix(f"{PREDICTION}: ") for check in every if check not in claims and not check.holds]
    tail = f"  The predicted numbers came out otherwise for {'; '.join(missed)}." if missed else ""
    holding = [check.name.rsplit(": ", 1)[1] for check in claims if check.holds]
    if len(holding) == len(claims):
        return f"Claim “{CLAIM}”: holds at every forget bias." + tail
    if holding:
        return f"Claim “{CLAIM}”: holds only at {', '.join(holding)}." + tail
    return f"Claim “{CLAIM}”: does not hold at any forget bias." + tail


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

EXPERIMENT = command.Experiment("lyapunov_gates", ABOUT, run, table, verdict, summary, figure)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    command.main(EXPERIMENT, Config(), SMOKE, arguments)


if __name__ == "__main__":
    main()
