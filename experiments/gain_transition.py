"""Where does the gradient of a vanilla RNN turn from vanishing to exploding as the recurrent gain grows?

For each kind of weights and each input variance it sweeps the gain; the weights of a seed are the same at every gain
but for the factor.  Beside the crossing it reports where the rate rises through −0.01, since networks of finite size
without input may settle on a fixed point or a cycle, whose rate stays near zero over a range of gains.  Running time:
about half a minute on two cores with the defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.lines
import numpy as np
import rich.console
import rich.table
import xarray as xr
from matplotlib.markers import CARETDOWN, CARETUP

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, stored_text, summarise

CLAIMS = (
    Claim(
        "A3",
        "With β = σ_max(U) · sup|φ'| the gradient of a vanilla RNN vanishes for β ≪ 1 and explodes for β ≫ 1: β = 1 "
        "parts the two.",
        source="the discussion that usually follows the bound (β_W β_φ)^{t−k} of Pascanu, Mikolov & Bengio 2013 "
        "(arXiv 1211.5063, section 2.1, where σ_max < 1 is sufficient for vanishing and σ_max > 1 only necessary for "
        "explosion)",
        prediction="the true chain's rate crosses zero where χ = gain² E[φ'²] = 1 (mean field): for tanh at gain 1 "
        "without input and at gain 1.856 with inputs of unit variance, for Gaussian and orthogonal weights alike, "
        "within 10 % at N = 128; σ_max = 1 stands at gain 0.5 for Gaussian weights and at gain 1 for orthogonal ones",
        refuted="the crossing's interval over seeds leaves out the 10 % around σ_max = 1",
        functions=("rg.retention", "rg.decay_rate", "rg.theory.critical_gain", "rg.theory.vanilla_mean_field"),
        tests=("tests/test_gain_transition.py", "tests/test_theory.py"),
    ),
)

Weights = Literal["gaussian", "orthogonal"]

TOLERANCE = 0.1
"""Relative distance at which two gains count as the same; see WHY_SAME."""
WHY_SAME = "the spectral radius of 128 Gaussian units alone scatters by 5 %; twice that counts as the same gain"

SLOW = 0.01
"""Nats per step; a gradient that vanishes at this rate loses one factor e in 100 steps."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the gain sweep."""

    weights: tuple[Weights, ...] = ("gaussian", "orthogonal")
    """Recurrent weights at gain 1: entries N(0, 1/N), or an orthogonal matrix."""
    input_variances: tuple[float, ...] = (0.0, 1.0)
    """Variance of W x, Gaussian and fresh at every step; 0 for no input."""
    gains: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4)
    """Factors on the recurrent weights, rising."""
    steps: int = 150
    """Lags run from 0 to this many steps."""
    warm_up: int = 200
    """Steps run first, from a random state."""
    fit_from: int = 20
    """First lag of the window over which the rate is fitted; it ends at lag ``steps``."""
    hidden_size: int = 128
    """Units N."""
    input_size: int = 64
    """Width D of the input."""
    seeds: int = 10
    """Independent repetitions; each draws weights, inputs and the first state."""
    first_seed: int = 0
    """Seeds run from here."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of weights, states and chains."""


SMOKE = Config(
    gains=(0.4, 0.8, 1.2, 1.6, 2.0, 2.6), steps=50, warm_up=50, fit_from=5, hidden_size=24, input_size=8, seeds=3
)
"""A few seconds: every code path, no statement about the claim."""


def rows_of(config: Config) -> list[tuple[Weights, float]]:
    """Returns the rows of the table."""
    return [(weights, variance) for weights in config.weights for variance in config.input_variances]


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"steps": 2, "warm_up": 1, "hidden_size": 1, "input_size": 1, "seeds": 1, "first_seed": 0}
    command.check_at_least(config, least)
    if not 0 <= config.fit_from < config.steps:
        raise UserError(f"--fit-from: expected a lag from 0 to {config.steps - 1} (steps − 1), found {config.fit_from}")
    for name in ("weights", "input_variances", "gains"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise UserError(f"--{name.replace('_', '-')}: expected one value or more, each once, found {values}")
    if not all(0 <= variance < np.inf for variance in config.input_variances):
        raise UserError(f"--input-variances: expected finite numbers of at least 0, found {config.input_variances}")
    gains = config.gains
    if len(gains) < 2 or list(gains) != sorted(gains) or not (gains[0] > 0 and np.isfinite(gains[-1])):
        raise UserError(f"--gains: expected two or more positive numbers, rising, found {gains}")


@functools.cache
def _cell(weights: Weights, config: Config) -> rg.Cell:
    init = {"gaussian": rg.initializers.gaussian, "orthogonal": rg.initializers.orthogonal}[weights]()
    return rg.cells.vanilla(config.input_size, config.hidden_size, init=init, dtype=config.dtype)


@functools.partial(jax.jit, static_argnames=("cell", "warm_up", "fit_from"))
def _measure(cell, params, states, xs, *, warm_up, fit_from):
    """Rate of the true chain for a batch of seeds, and the first non-finite step."""

    def one(params, state, xs):
        start = rg.unroll(cell, params, state, xs[:warm_up]).final
        curve = rg.retention(cell, params, start, xs[warm_up:])
        return rg.decay_rate(curve.log_norm, (fit_from, xs.shape[0] - warm_up)), curve.nonfinite_step

    return jax.vmap(one)(params, states, xs)


def _measure_row(weights: Weights, variance: float, config: Config) -> xr.Dataset:
    """Returns the dataset of one row: every gain and seed."""
    # The kinds differ in how they draw weights and in nothing else, so all rows share one compilation.
    drawing_cell, cell = _cell(weights, config), _cell(config.weights[0], config)
    n, d, dtype = config.hidden_size, config.input_size, config.dtype
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(
        jnp.arange(config.first_seed, config.first_seed + config.seeds)
    )
    params = jax.vmap(drawing_cell.init)(keys[:, 0])
    num_steps = config.warm_up + config.steps
    scale = jnp.asarray(np.sqrt(variance), dtype)
    xs = scale * jax.vmap(lambda key: jax.random.normal(key, (num_steps, d), dtype))(keys[:, 1])
    states = cell.init_state((config.seeds,))
    states = states._replace(h=jax.vmap(lambda key: jax.random.uniform(key, (n,), dtype, -1, 1))(keys[:, 2]))
    rates, broken = [], []
    for gain in config.gains:
        at_gain = params._replace(w_hh=jnp.asarray(gain, dtype) * params.w_hh)
        rate, nonfinite_step = _measure(cell, at_gain, states, xs, warm_up=config.warm_up, fit_from=config.fit_from)
        rates.append(np.asarray(rate))
        broken.append(np.asarray(nonfinite_step))
    return xr.Dataset(
        {
            "rate": (("gain", "seed"), np.stack(rates)),
            "nonfinite_step": (("gain", "seed"), np.stack(broken)),
            "bound_at_gain_1": (("seed",), np.array([rg.theory.norm_bound(w, "tanh") for w in params.w_hh])),
        }
    )


MEASURED = ("rate", "nonfinite_step", "bound_at_gain_1")
"""Variables that a run measures; all others follow from them and from the configuration."""

_DESCRIPTIONS = {
    "rate": ("nats per step", "least-squares slope of log ‖∂h_T/∂h_{T−lag}‖_F over the fit window"),
    "nonfinite_step": ("steps", "first time step with a non-finite state or chain; −1 for none"),
    "bound_at_gain_1": ("nats per step", "log σ_max(U) of the drawn weights at gain 1"),
    "mean_field_rate": ("nats per step", "½ log χ, N → ∞"),
    "bound_rate": ("nats per step", "log(σ_max(U) sup|φ'|), median over seeds"),
    "crossing": ("1", "gain at which the rate first rises through 0, linear between gains; NaN for nowhere"),
    "slow_crossing": ("1", f"gain at which the rate first rises through −{SLOW:g} nats per step"),
    "bound_crossing": ("1", "gain at which σ_max(U) sup|φ'| = 1"),
    "chi_crossing": ("1", "gain at which χ = 1, N → ∞"),
    "largest_vanishing_beta": ("1", "largest σ_max(U) sup|φ'| whose chain vanishes (upper end of its rate below 0)"),
}


def first_crossing(gains: np.ndarray, rates: np.ndarray) -> float:
    """Returns the gain at which the rates first rise through 0, by linear interpolation; NaN for nowhere."""
    rising = np.flatnonzero((rates[:-1] < 0) & (rates[1:] >= 0))
    if len(rising) == 0 or not np.isfinite(rates).all():
        return float("nan")
    at = rising[0]
    return float(gains[at] + (gains[at + 1] - gains[at]) * rates[at] / (rates[at] - rates[at + 1]))


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with the quantities that follow from the measured ones, and medians with intervals."""
    gains, variances = dataset["gain"].values, dataset["input_variance"].values
    rates = dataset["rate"].transpose("row", "gain", "seed").values
    bound = dataset["bound_at_gain_1"].transpose("row", "seed").values
    fields = [
        [rg.theory.vanilla_mean_field(float(gain), input_variance=float(variance)).rate for gain in gains]
        for variance in variances
    ]
    dataset["mean_field_rate"] = (("row", "gain"), np.array(fields))
    dataset["bound_rate"] = (("row", "gain"), np.log(gains)[None] + np.median(bound, axis=1)[:, None])
    crossings = [[first_crossing(gains, row[:, seed]) for seed in range(row.shape[1])] for row in rates]
    dataset["crossing"] = (("row", "seed"), np.array(crossings))
    crossings = [[first_crossing(gains, row[:, seed] + SLOW) for seed in range(row.shape[1])] for row in rates]
    dataset["slow_crossing"] = (("row", "seed"), np.array(crossings))
    dataset["bound_crossing"] = (("row", "seed"), np.exp(-bound))
    critical = [rg.theory.critical_gain("tanh", input_variance=float(variance)) for variance in variances]
    dataset["chi_crossing"] = ("row", np.array(critical))
    summarise(dataset, ("rate", "crossing", "slow_crossing", "bound_crossing"), _DESCRIPTIONS)
    vanishes = dataset["rate_high"].transpose("row", "gain").values < 0
    beta = np.exp(dataset["bound_rate"].values)
    dataset["largest_vanishing_beta"] = ("row", np.where(vanishes, beta, 0).max(axis=1))
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
    rows = rows_of(config)
    pieces = [
        Piece(
            f"{weights}-{variance}",
            f"{weights} weights, input variance {variance:g}",
            functools.partial(_measure_row, weights, variance, config),
        )
        for weights, variance in rows
    ]
    # The context manager is entered here and not at import: float64 is a setting of the run.
    with jax.enable_x64(True) if config.dtype == "float64" else contextlib.nullcontext():
        measured = command.measure(pieces, parts=parts, screen=screen)
    dataset = xr.concat(measured, dim="row").assign_coords(
        weights=("row", [weights for weights, _ in rows]),
        input_variance=("row", [float(variance) for _, variance in rows]),
        gain=np.array(config.gains, float),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
    )
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance(
        "gain_transition", config, seconds=seconds, dtype=config.dtype, tolerance=TOLERANCE
    )
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_text = functools.partial(stored_text, nothing="—")


def _rows(dataset: xr.Dataset) -> list[xr.Dataset]:
    return [dataset.isel(row=index) for index in range(dataset.sizes["row"])]


def _label(row: xr.Dataset) -> str:
    variance = float(row["input_variance"])
    return f"{row['weights'].values}, " + (f"input variance {variance:g}" if variance else "no input")


def _missing(row: xr.Dataset) -> int:
    """Returns the number of seeds without a crossing."""
    return int(np.isnan(row["crossing"].values).sum())


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    attrs, config = dataset.attrs, json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"Gain at which the chain turns from vanishing to exploding: tanh, N={config['hidden_size']}, "
        f"lags {config['fit_from']} to {config['steps']}, {config['seeds']} seeds, {attrs['dtype']}, "
        f"matmul {attrs['matmul_precision']}, {attrs['backend']}",
        caption=f"medians over seeds [{100 * attrs['confidence']:.0f} % bootstrap interval]; "
        "the last column is the largest σ_max(U) whose gradient still vanishes",
        title_justify="left",
        caption_justify="left",
    )
    for name in (
        "weights, input",
        f"rate crosses\n−{SLOW:g} at",
        "rate crosses\n0 at",
        "χ = 1\nat",
        "σ_max = 1\nat",
        "largest σ_max\nthat vanishes",
    ):
        shown.add_column(name, justify="left" if name == "weights, input" else "right")
    for row in _rows(dataset):
        missing = _missing(row)
        shown.add_row(
            _label(row) + (f" ({missing} seeds never cross)" if missing else ""),
            _text(row, "slow_crossing", ".3f"),
            _text(row, "crossing", ".3f"),
            f"{float(row['chi_crossing']):.3f}",
            _text(row, "bound_crossing", ".3f"),
            f"{float(row['largest_vanishing_beta']):.2f}",
        )
    return shown


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns two checks per row: does the rate cross zero at σ_max = 1, and, as predicted, at χ = 1?

    The claim is granted while the crossing's interval reaches the 10 % around σ_max = 1, the prediction only when all
    of the interval lies within 10 % of χ = 1.  A row in which some seed's rate does not rise through 0 within the gains
    swept cannot tell: its crossing lies outside.
    """
    checks = []
    tolerance = dataset.attrs["tolerance"]
    for row in _rows(dataset):
        low, high = (float(row[f"crossing_{part}"]) for part in ("low", "high"))
        at_bound, at_chi = float(row["bound_crossing_median"]), float(row["chi_crossing"])
        missing = _missing(row)
        found = f"gain {_text(row, 'crossing', '.3f')}"
        reaches = bool(low <= at_bound * (1 + tolerance) and high >= at_bound * (1 - tolerance))
        checks.append(
            Check(
                f"transition at σ_max = 1: {_label(row)}",
                f"{missing} of {row.sizes['seed']} seeds never cross" if missing else found,
                f"{at_bound:.3f} ± {tolerance:.0%}",
                None if missing else reaches,
                "A3",
                WHY_SAME,
            )
        )
        if not missing:
            checks.append(
                Check(
                    f"prediction, transition at χ = 1: {_label(row)}",
                    found,
                    f"{at_chi:.3f} ± {tolerance:.0%}",
                    bool(at_chi * (1 - tolerance) <= low and high <= at_chi * (1 + tolerance)),
                    "A3",
                    "mean field of random tanh networks, exact for N → ∞ (rg.theory.critical_gain)",
                    decides=False,
                )
            )
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    every = verdict(dataset)

    def rows(*, decides: bool, holds: bool | None) -> str:
        return "; ".join(
            check.name.split(": ", 1)[1] for check in every if check.decides == decides and check.holds is holds
        )

    unjudged = rows(decides=True, holds=None)
    outside = f"  Not judged, since a crossing lies outside the gains swept: {unjudged}." if unjudged else ""
    if not any(check.holds is not None for check in every):
        return {"A3": "the claim is not tried." + outside}
    holding, refuted = rows(decides=True, holds=True), rows(decides=True, holds=False)
    beta = float(dataset["largest_vanishing_beta"].max())
    sentence = (
        f"vanishing turns into exploding at σ_max = 1 for {holding or 'no kind of weights and input'}"
        + (f", and elsewhere for {refuted}" if refuted else "")
        + f"; a chain with σ_max = {beta:.2f} still vanishes.  "
    )
    failed = rows(decides=False, holds=False)
    sentence += (
        f"The prediction, χ = 1, failed for {failed}." if failed else "The prediction, χ = 1, came true in every row."
    )
    return {"A3": sentence + outside}


_MEASURED: dict[str, Any] = {"color": "#16325c", "linewidth": 1.8, "marker": "o", "markersize": 3.5}
_THEORY: dict[str, Any] = {"color": "#d97706", "linestyle": (0, (5, 2)), "linewidth": 1.8}
_BOUND: dict[str, Any] = {"color": "#c81e4a", "linestyle": ":", "linewidth": 1.8}


def _panel(axes: Any, row: xr.Dataset) -> None:
    gains = row["gain"].values
    axes.fill_between(gains, row["rate_low"], row["rate_high"], color=_MEASURED["color"], alpha=0.2, linewidth=0)
    axes.plot(gains, row["rate_median"], zorder=3, **_MEASURED)
    axes.plot(gains, row["mean_field_rate"], zorder=4, **_THEORY)
    axes.plot(gains, row["bound_rate"], zorder=2, **_BOUND)
    axes.axhline(0, color="0.3", linewidth=0.8)
    # one from below, one from above: both are seen where they coincide
    marks = (("chi_crossing", _THEORY, CARETUP), ("bound_crossing_median", _BOUND, CARETDOWN))
    for name, style, marker in marks:
        at = float(row[name])
        if gains[0] <= at <= gains[-1]:
            axes.plot([at], [0], marker=marker, markersize=9, color=style["color"], zorder=5, linestyle="none")
    axes.text(
        0.98,
        0.05,
        f"crosses 0 at gain\n{_text(row, 'crossing', '.2f')}",
        transform=axes.transAxes,
        ha="right",
    )


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: one panel per kind of weights and input, rate against gain."""
    kinds = list(dict.fromkeys(dataset["weights"].values.tolist()))
    variances = list(dict.fromkeys(dataset["input_variance"].values.tolist()))
    drawn = matplotlib.figure.Figure(figsize=(4.4 * len(variances) + 0.6, 3.1 * len(kinds) + 1.5), layout="constrained")
    grid = drawn.subplots(len(kinds), len(variances), squeeze=False, sharex=True, sharey=True)
    for row in _rows(dataset):
        i, j = kinds.index(str(row["weights"].values)), variances.index(float(row["input_variance"]))
        axes = grid[i][j]
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        _panel(axes, row)
        axes.set_title(_label(row).replace("gaussian", "Gaussian weights").replace("orthogonal", "orthogonal weights"))
        axes.title.set_fontsize(11)
        if i == len(kinds) - 1:
            axes.set_xlabel("gain (factor on the recurrent weights)")
        if j == 0:
            axes.set_ylabel("rate of ‖∂h_T/∂h_k‖ (nats per step)\n← vanishes        explodes →")
    line = matplotlib.lines.Line2D
    handles = [
        line([], [], label="measured, true chain", **_MEASURED),
        line([], [], label="mean field, ½ log χ  (▲ χ = 1)", **_THEORY),
        line([], [], label="bound, log σ_max(U)  (▼ σ_max = 1)", **_BOUND),
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    config = json.loads(dataset.attrs["config"])
    drawn.suptitle(
        "Where the gradient of a tanh RNN turns from vanishing to exploding\n"
        f"N={config['hidden_size']}, {config['seeds']} seeds: median and its 95 % interval",
        fontsize=11,
    )
    return drawn


ABOUT = """Where does the gradient of a vanilla RNN turn from vanishing to exploding as the recurrent gain grows?

Sweeps the gain of Gaussian and orthogonal weights with and without input, measures the rate of the true Jacobian
chain, and compares where it crosses zero with the mean field (χ = 1) and with the norm bound (σ_max = 1)."""

CAPTION = """Rate of the true gradient chain against the gain of the recurrent weights, a panel per kind of
weights and input, with the mean field (χ = 1) and the norm bound (σ_max = 1): where the rate crosses zero, vanishing
turns into exploding."""

EXPERIMENT = command.Experiment(
    name="gain_transition",
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
