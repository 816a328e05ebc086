"""Retention on real text: how far back does the gradient of a vanilla RNN, an LSTM and a GRU reach?

For each cell and initialisation, over several seeds (weights, token embedding and window of the text), it measures the
true chain, the direct path and the remainder along the text, fits the decay of the true chain, and pulls the gradient
of a next-token loss back through time.  Running time: about a minute on two cores with the defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.lines
import numpy as np
import rich.console
import rich.progress
import rich.table
import scipy.special
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, stored_text, summarise

CLAIMS = (
    Claim(
        "B3",
        "The gradient along the LSTM's memory is the product of its forget gates, ∂C_T/∂C_k ≈ ∏f, up to a small ε.",
        source="the derivation repeated in most introductions to the LSTM, which holds h_{τ−1} fixed in "
        "∂c_τ/∂c_{τ−1} = f_τ",
        prediction="at lag 99 the rest of the chain exceeds the direct path 10^6 to 10^8 times with library "
        "initialisations, and is of its size only where forget gates are almost open (chrono)",
        refuted="the rest exceeds a tenth of the direct path at lag 99 (or at the last lag of a shorter run)",
        functions=("rg.retention", "rg.jacobian_chain"),
        tests=(
            "tests/test_experiments.py::test_verdict_follows_the_data",
            "tests/test_paths.py::test_remainder_is_full_minus_direct",
            "tests/test_chains.py::test_direct_path_is_the_product_of_forget_gates",
        ),
    ),
)

CellName = Literal["vanilla", "lstm", "peephole_lstm", "coupled_lstm", "gru", "min_gru", "min_lstm"]
InitName = Literal["torch", "flax", "equinox", "keras", "haiku", "gaussian", "orthogonal", "identity", "chrono", "ugi"]

PATHS = ("full", "direct", "remainder")
LAST_STEPS = 10
"""The loss gradient's share of this many newest states is reported."""
CHECK_LAG = 99
"""Lag at which the claim's reference numbers were stated."""
PREDICTED = dict.fromkeys(("torch", "keras", "flax", "equinox", "haiku"), (6.0, 8.0))
"""Decades by which the remainder was predicted to exceed the direct path there, from first runs on other inputs."""
APPROXIMATE = 0.1
"""Largest remainder, relative to the direct path, at which "≈ ∏f" is granted."""
WHY_APPROXIMATE = "a number that is off by more than a tenth is not right to one digit"
WHY_PREDICTED = "first runs on other inputs: 7e7 with a library's default, 3e6 at b_f = 1, each ± one decade"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the retention experiment."""

    cells: tuple[CellName, ...] = ("vanilla", "lstm", "gru")
    """Cells to measure (indrnn and lru draw their recurrence in ways of their own and have no such initialisations)."""
    inits: tuple[InitName, ...] = ("torch", "keras", "chrono")
    """Initialisations: a library's default, a scheme at gain 1, or torch weights with chrono or ugi gate biases."""
    forget_bias: float | None = None
    """Effective forget bias (of a GRU: of the share kept) in place of what each initialisation draws; leaves chrono and
    ugi rows alone."""
    steps: int = 300
    """Time steps T; lags run from 0 to T."""
    hidden_size: int = 64
    """Units N."""
    input_size: int = 64
    """Width D of the token embedding, drawn from N(0, 1)."""
    seeds: int = 10
    """Independent repetitions; each draws weights, embedding, read-out and a window of the text."""
    first_seed: int = 0
    """Seeds run from here."""
    fit_from: int = 20
    """First lag of the window over which the decay rate is fitted; it ends at lag T."""
    text: str = "pydoc"
    """pydoc (every CPython carries it), ptb, tinyshakespeare, or a path to a UTF-8 file."""
    data_dir: Path | None = None
    """Folder with ptb/ and tinyshakespeare/; else RNNGRAD_DATA, else downloaded to a cache."""
    level: Literal["word", "char"] = "word"
    """Tokens are words or characters."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of weights, states and chains."""


SMOKE = Config(inits=("torch", "chrono"), steps=60, hidden_size=12, input_size=8, seeds=3)
"""A few seconds: every code path, no statement about the claim."""


def _gated(cell: CellName) -> bool:
    return cell != "vanilla"


def rows_of(config: Config) -> list[tuple[CellName, InitName]]:
    """Returns the rows of the table; chrono and ugi set gate biases, which a vanilla cell has none of."""
    return [
        (cell, init) for cell in config.cells for init in config.inits if _gated(cell) or init not in ("chrono", "ugi")
    ]


def build_cell(cell: CellName, init: InitName, config: Config) -> rg.Cell:
    """Returns the cell of one row."""
    options: dict[str, Any] = {"dtype": config.dtype, "init": "torch" if init in ("chrono", "ugi") else init}
    if _gated(cell):
        bias = {"chrono": lambda: rg.initializers.chrono(config.steps), "ugi": rg.initializers.ugi}
        options["forget_bias"] = bias[init]() if init in bias else config.forget_bias
    factory = getattr(rg.cells, cell)
    return factory(config.input_size, config.hidden_size, **options)


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"steps": 2, "hidden_size": 1, "input_size": 1, "seeds": 1, "first_seed": 0}
    command.check_at_least(config, least)
    if not 0 <= config.fit_from < config.steps:
        raise UserError(f"--fit-from: expected a lag from 0 to {config.steps - 1} (steps − 1), found {config.fit_from}")
    if config.forget_bias is not None and not abs(config.forget_bias) <= float(np.finfo(config.dtype).max):
        raise UserError(f"--forget-bias: expected a finite {config.dtype}, found {config.forget_bias}")
    if config.forget_bias is not None and not any(
        _gated(cell) and init not in ("chrono", "ugi") for cell, init in rows_of(config)
    ):
        raise UserError(
            "--forget-bias acts on no row: expected a gated cell with an initialisation other than chrono, ugi"
        )
    if not rows_of(config):
        raise UserError("nothing to run: chrono and ugi set gate biases, and a vanilla cell has no gates")
    for name in ("cells", "inits"):
        if len(set(getattr(config, name))) != len(getattr(config, name)):
            raise UserError(f"--{name}: expected each name once, found {' '.join(getattr(config, name))}")


def memory_field(cell: CellName) -> str:
    """Returns the field that carries the memory."""
    return "c" if cell in ("lstm", "peephole_lstm", "coupled_lstm") else "h"


@functools.partial(jax.jit, static_argnames=("cell", "field", "fit_from"))
def _measure(cell, params, xs, read_out, target, *, field, fit_from):
    """Everything that one seed of one row yields; compiled once per cell."""
    state = cell.init_state()
    curves = {path: rg.retention(cell, params, state, xs, of=field, wrt=field, path=path) for path in PATHS}
    naive = rg.naive_retention(cell, params, state, xs, of=field, wrt=field)

    # gradient of −log softmax(V h_T)[target] with respect to every state, by one more chain of a single row
    final = rg.unroll(cell, params, state, xs).final
    loss = lambda s: -jax.nn.log_softmax(read_out @ cell.read(params, s))[target]
    cotangents = rg.jacobian_chain(cell, params, state, xs, cotangent=jax.grad(loss)(final))
    gradient = jnp.flip(rg.logscaled.log_norm(cotangents))

    full = curves["full"]
    window = (fit_from, xs.shape[0])
    return {
        "log_retention": jnp.stack([curves[path].log_norm for path in PATHS]),
        "naive_log_retention": naive,
        "naive_death_lag": full.naive_death_lag,
        "nonfinite_step": full.nonfinite_step,
        "rate": jnp.stack([rg.decay_rate(curves[path].log_norm, window) for path in PATHS]),
        "log_loss_gradient": gradient,
    }


def _measure_row(cell_name: CellName, init: InitName, config: Config, tokens: Any, windows: np.ndarray) -> xr.Dataset:
    """Returns the dataset of one row: every seed."""
    # The cells of one kind differ in how they draw weights and in nothing else, so all rows share one compilation.
    measured_cell = _shared_cell(cell_name, dataclasses.replace(config, forget_bias=None))
    drawing_cell = build_cell(cell_name, init, config)
    seeds = []
    for index, window in enumerate(windows):
        keys = jax.random.split(jax.random.key(config.first_seed + index), 3)
        embedding = jax.random.normal(keys[1], (len(tokens.vocabulary), config.input_size), config.dtype)
        limit = config.hidden_size**-0.5
        shape = (len(tokens.vocabulary), config.hidden_size)
        read_out = jax.random.uniform(keys[2], shape, config.dtype, -limit, limit)
        measured = _measure(
            measured_cell,
            drawing_cell.init(keys[0]),
            embedding[window[:-1]],
            read_out,
            window[-1],
            field=memory_field(cell_name),
            fit_from=config.fit_from,
        )
        seeds.append(jax.tree.map(np.asarray, measured))
    dims = {
        "log_retention": ("path", "lag"),
        "naive_log_retention": ("lag",),
        "naive_death_lag": (),
        "nonfinite_step": (),
        "rate": ("path",),
        "log_loss_gradient": ("lag",),
    }
    return xr.Dataset({name: (("seed", *dims[name]), np.stack([s[name] for s in seeds])) for name in dims})


@functools.cache
def _shared_cell(cell_name: CellName, config: Config) -> rg.Cell:
    return build_cell(cell_name, "torch", config)


MEASURED = ("log_retention", "naive_log_retention", "naive_death_lag", "nonfinite_step", "rate", "log_loss_gradient")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "log_retention": ("nats", "log of ‖∂s_T/∂s_{T−lag}‖_F of the memory block, 0 at lag 0"),
    "naive_log_retention": ("nats", "the full chain by unscaled float32 product, then norm, then log"),
    "naive_death_lag": ("steps", "first lag at which the naive norm is 0 or inf; −1 when it survives"),
    "nonfinite_step": ("steps", "first time step with a non-finite state or chain; −1 for none"),
    "rate": ("nats per step", "least-squares slope of log_retention over the fit window"),
    "log_loss_gradient": ("nats", "log of ‖∂L_T/∂s_{T−lag}‖ over the whole state, L_T the loss of the last step"),
    "last_steps_share": ("1", f"share of Σ_lag ‖∂L_T/∂s_{{T−lag}}‖ in the {LAST_STEPS} newest states, s_T among them"),
    "log10_remainder_over_direct": ("1", "log10 of ‖remainder‖ over ‖direct‖ at check_lag; NaN without a direct path"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with the quantities that follow from the measured ones, and medians with intervals."""
    gradient = dataset["log_loss_gradient"]
    share = np.exp(
        scipy.special.logsumexp(gradient.isel(lag=slice(0, LAST_STEPS)).values, axis=-1)
        - scipy.special.logsumexp(gradient.values, axis=-1)
    )
    dataset["last_steps_share"] = (("row", "seed"), share)
    at = dataset["log_retention"].sel(lag=dataset.attrs["check_lag"])
    remainder, direct = at.sel(path="remainder").values, at.sel(path="direct").values
    has_direct = np.isfinite(direct)
    ratio = np.where(has_direct, (remainder - np.where(has_direct, direct, 0)) / np.log(10), np.nan)
    dataset["log10_remainder_over_direct"] = (("row", "seed"), ratio)
    summarise(dataset, ("log_retention", "rate", "last_steps_share", "log10_remainder_over_direct"), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished rows are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings or text that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    screen = screen or rich.console.Console(quiet=True)
    started = time.perf_counter()
    with command.progress(screen) as bar, command.user_input():
        task = bar.add_task("reading text", total=None)
        text = rg.tasks.load_text(
            config.text,
            data_dir=config.data_dir,
            on_progress=lambda done, total: bar.update(task, description="downloading", completed=done, total=total),
        )
        tokens = rg.tasks.tokenize(text.text, level=config.level)
        # one draw per seed, so that a seed is the same alone and among others
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        windows = np.concatenate([rg.tasks.sequences(tokens, config.steps, 1, seed=seed) for seed in seeds])
    screen.print(f"text: {text.source}, {len(tokens.ids):,} {config.level} tokens, sha256 {text.digest[:12]}…")

    rows = rows_of(config)
    pieces = [
        Piece(
            f"{cell_name}-{init}-{text.digest[:12]}",
            f"{cell_name}, {init}",
            functools.partial(_measure_row, cell_name, init, config, tokens, windows),
        )
        for cell_name, init in rows
    ]
    # The context manager is entered here and not at import: float64 is a setting of the run.
    with jax.enable_x64(True) if config.dtype == "float64" else contextlib.nullcontext():
        measured = command.measure(pieces, parts=parts, screen=screen)
    dataset = xr.concat(measured, dim="row").assign_coords(
        cell=("row", [cell for cell, _ in rows]),
        init=("row", [init for _, init in rows]),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        path=list(PATHS),
        lag=np.arange(config.steps + 1),
    )
    shown = dataclasses.replace(config, data_dir=None, text=config.text if config.text == text.name else text.source)
    dataset.attrs = command.provenance(
        "retention",
        shown,
        seconds=time.perf_counter() - started,
        dtype=config.dtype,
        text=text.source,
        text_sha256=text.digest,
        num_tokens=len(tokens.ids),
        vocabulary_size=len(tokens.vocabulary),
        float32_floor=rg.certificate(config.dtype).float32_floor,
        check_lag=min(CHECK_LAG, config.steps),
    )
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_text = functools.partial(stored_text, nothing="—")


def _half_life(rate: float) -> str:
    steps = float(rg.half_life(jnp.asarray(rate)))
    return "—" if np.isnan(rate) else "none" if np.isinf(steps) else f"{steps:.3g}"


def _median_death(row: xr.Dataset) -> int | None:
    """Returns the (lower) median lag at which naive float32 dies, over the seeds in which it does; None for none."""
    lags = np.sort(row["naive_death_lag"].values)
    dead = lags[lags >= 0]
    return int(dead[(len(dead) - 1) // 2]) if len(dead) else None


def _death(row: xr.Dataset) -> str:
    median, lags = _median_death(row), row["naive_death_lag"].values
    if median is None:
        return "survives"
    dead = int((lags >= 0).sum())
    return f"{median}" if dead == len(lags) else f"{median} ({dead} of {len(lags)} seeds)"


def _rows(dataset: xr.Dataset) -> list[xr.Dataset]:
    return [dataset.isel(row=index) for index in range(dataset.sizes["row"])]


def _cells_of(row: xr.Dataset) -> dict[str, str]:
    """Returns one row of the table, by column title."""
    full = row.sel(path="full")
    broken = int((row["nonfinite_step"] >= 0).sum())
    return {
        "cell": str(row["cell"].values),
        "init": str(row["init"].values) + (f" ({broken} seeds non-finite)" if broken else ""),
        "full chain, rate": _text(full, "rate", ".4f"),
        "half-life": _half_life(float(full["rate_median"])),
        "direct path, rate": _text(row.sel(path="direct"), "rate", ".4f"),
        f"log10 rest/direct, lag {row.attrs['check_lag']}": _text(
            row, "log10_remainder_over_direct", ".1f", nothing="—"
        ),
        f"∂L_T in last {LAST_STEPS}": _text(row, "last_steps_share", ".2f"),
        "float32 dies at": _death(row),
    }


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    attrs, config = dataset.attrs, json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"Retention on {attrs['text']}, {config['level']} level: N={config['hidden_size']}, "
        f"D={config['input_size']}, T={config['steps']}, {config['seeds']} seeds, {attrs['dtype']}, "
        f"matmul {attrs['matmul_precision']}, {attrs['backend']}",
        caption=f"medians over seeds [{100 * attrs['confidence']:.0f} % bootstrap interval]; rates in nats per step, "
        f"fitted over lags {config['fit_from']} to {config['steps']}; rest = full − direct",
        title_justify="left",
        caption_justify="left",
    )
    rows = [_cells_of(row) for row in _rows(dataset)]
    for name in rows[0]:
        shown.add_column(name.replace(", ", ",\n"), justify="left" if name in ("cell", "init") else "right")
    for row in rows:
        # the interval under its median: the table then fits a terminal of ordinary width
        shown.add_row(*(text.replace(" [", "\n[") for text in row.values()))
    return shown


def markdown_rows(dataset: xr.Dataset) -> list[str]:
    """Returns the table's rows as the README prints them."""
    return ["| {} | {} | {} | {} | {} | {} | {} | {} |".format(*_cells_of(row).values()) for row in _rows(dataset)]


def _lstm_rows(dataset: xr.Dataset) -> list[xr.Dataset]:
    return [row for row in _rows(dataset) if str(row["cell"].values) in ("lstm", "peephole_lstm", "coupled_lstm")]


def _label(row: xr.Dataset) -> str:
    return f"{row['cell'].values}, {row['init'].values}"


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns a check per LSTM row: is the remainder below a tenth of the direct path at the stated lag?

    Behind it, where one was made at this lag, whether the prediction of its size came true.  A row without a number
    (every seed non-finite) cannot tell: it neither holds nor is refuted.
    """
    lag, config = dataset.attrs["check_lag"], json.loads(dataset.attrs["config"])
    checks = []
    for row in _lstm_rows(dataset):
        # judged by the side of the interval that speaks against the claim
        median, worst = (float(row[f"log10_remainder_over_direct_{part}"]) for part in ("median", "high"))
        measured = not np.isnan(worst)
        checks.append(
            Check(
                f"∂c_T/∂c_k ≈ ∏f at lag {lag}: {_label(row)}",
                f"rest/direct 10^{_text(row, 'log10_remainder_over_direct', '.1f')}" if measured else "no number",
                f"≤ {APPROXIMATE:g}",
                bool(worst <= np.log10(APPROXIMATE)) if measured else None,
                "B3",
                WHY_APPROXIMATE,
            )
        )
        init = str(row["init"].values)
        if measured and init in PREDICTED and lag == CHECK_LAG and config["forget_bias"] is None:
            low, high = PREDICTED[init]
            checks.append(
                Check(
                    f"prediction of its size: {_label(row)}",
                    f"rest/direct 10^{median:.1f}",
                    f"10^{low:g} to 10^{high:g}",
                    bool(low <= median <= high),
                    "B3",
                    WHY_PREDICTED,
                    decides=False,
                )
            )
    return checks or [Check("∂c_T/∂c_k ≈ ∏f", "no LSTM row was run", f"≤ {APPROXIMATE:g}", None, "B3", WHY_APPROXIMATE)]


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a sentence."""
    every, lag = verdict(dataset), dataset.attrs["check_lag"]
    measured = [row for row in _lstm_rows(dataset) if not np.isnan(row["log10_remainder_over_direct_high"])]
    if not measured:
        return {"B3": "no LSTM row gave a number: the claim is not tried."}
    sizes = [f"10^{float(row['log10_remainder_over_direct_median']):.1f} ({_label(row)})" for row in measured]
    sentence = f"at lag {lag} the rest of the chain over the product of the forget gates is {', '.join(sizes)}."
    holding = [check.name.rsplit(": ", 1)[1] for check in every if check.decides and check.holds]
    if holding:
        sentence += f"  It stays below a tenth for {'; '.join(holding)}."
    missed = [check.name.rsplit(": ", 1)[1] for check in every if not check.decides and not check.holds]
    if missed:
        sentence += f"  The predicted size came out otherwise for {'; '.join(missed)}."
    return {"B3": sentence}


# Drawn from the bottom up: the remainder as a broad band that the full chain lies on wherever it *is* the full chain.
_STYLES: dict[str, dict[str, Any]] = {
    "remainder": {"color": "#8fd3b0", "linestyle": "-", "linewidth": 6.0, "zorder": 2},
    "full": {"color": "#16325c", "linestyle": "-", "linewidth": 1.8, "zorder": 3},
    "direct": {"color": "#d97706", "linestyle": (0, (5, 2)), "linewidth": 1.8, "zorder": 4},
}
_LABELS = {
    "full": "full chain, the true gradient",
    "direct": "direct path (LSTM: ∏f)",
    "remainder": "remainder = full − direct",
}
_NAIVE: dict[str, Any] = {"color": "#c81e4a", "linewidth": 1.0, "linestyle": "-"}
_CELL_TITLES = {"vanilla": "vanilla RNN", "lstm": "LSTM", "gru": "GRU"}


def _draw_naive(axes: Any, row: xr.Dataset) -> None:
    """Draws the naive curve of the seed whose death is the median one: it leaves the picture where it dies."""
    death = _median_death(row)
    if death is None:
        axes.text(
            0.98,
            0.04,
            "naive float32 survives",
            transform=axes.transAxes,
            ha="right",
            color=_NAIVE["color"],
            fontsize=9,
        )
        return
    seed = int(np.flatnonzero(row["naive_death_lag"].values == death)[0])
    naive = row["naive_log_retention"].values[seed]
    alive = np.flatnonzero(np.isfinite(naive[:death]))
    to = "0" if naive[alive[-1]] < 0 else "1"
    axes.plot(alive, naive[alive], zorder=6, **_NAIVE)
    axes.annotate(
        "",
        (death, float(to)),
        xytext=(alive[-1], naive[alive[-1]]),
        xycoords=("data", "axes fraction"),
        textcoords="data",
        arrowprops={"arrowstyle": "-|>", "color": _NAIVE["color"], "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0},
        zorder=6,
    )
    axes.text(
        death + 0.015 * len(naive),
        0.03 if to == "0" else 0.97,
        f"float32 dies\nat lag {death}",
        transform=axes.get_xaxis_transform(),
        color=_NAIVE["color"],
        fontsize=9,
        va="bottom" if to == "0" else "top",
    )


def _panel(axes: Any, row: xr.Dataset) -> None:
    lags = row["lag"].values
    for path, style in _STYLES.items():
        at = row.sel(path=path)
        median, low, high = (at[f"log_retention_{part}"].values for part in ("median", "low", "high"))
        drawn = np.isfinite(median)
        if drawn[1:].any():
            axes.plot(lags[drawn], median[drawn], **style)
            if path != "remainder":
                axes.fill_between(lags[drawn], low[drawn], high[drawn], color=style["color"], alpha=0.2, linewidth=0)
    # a remainder climbs from 0 (−∞ nats) at lag 0; its first twentieth does not set the scale
    medians = row["log_retention_median"]
    starts = {"full": 0, "direct": 0, "remainder": len(lags) // 20}
    shown = np.concatenate([medians.sel(path=path).values[start:] for path, start in starts.items()])
    lowest, highest = shown[np.isfinite(shown)].min(), shown[np.isfinite(shown)].max()
    room = max(0.08 * (highest - lowest), 0.1)
    axes.set_ylim(lowest - room, highest + room)
    _draw_naive(axes, row)
    notes = [f"full {float(row.sel(path='full')['rate_median']):+.3f} nats/step"]
    direct_rate = float(row.sel(path="direct")["rate_median"])
    notes.append(f"direct {direct_rate:+.3f}" if np.isfinite(direct_rate) else "direct path: exactly 0")
    axes.text(0.98, 0.96, "\n".join(notes), transform=axes.transAxes, ha="right", va="top", fontsize=9)


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: one panel per cell and initialisation, log retention against lag."""
    cells = list(dict.fromkeys(dataset["cell"].values.tolist()))
    inits = list(dict.fromkeys(dataset["init"].values.tolist()))
    drawn = matplotlib.figure.Figure(figsize=(3.6 * len(cells) + 0.8, 2.7 * len(inits) + 1.4), layout="constrained")
    grid = drawn.subplots(len(inits), len(cells), squeeze=False, sharex=True)
    by_name = {(str(row["cell"].values), str(row["init"].values)): row for row in _rows(dataset)}
    for i, init in enumerate(inits):
        in_row = [grid[i][j] for j, cell in enumerate(cells) if (cell, init) in by_name]
        for j, cell in enumerate(cells):
            axes = grid[i][j]
            if i == 0:
                axes.set_title(_CELL_TITLES.get(cell, cell), fontsize=12, fontweight="bold")
            if (cell, init) not in by_name:
                axes.set_axis_off()
                axes.text(
                    0.5,
                    0.5,
                    f"{init} sets gate biases;\na {_CELL_TITLES.get(cell, cell)} has no gates",
                    ha="center",
                    color="0.4",
                    transform=axes.transAxes,
                )
                continue
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.set_xlim(0, dataset.sizes["lag"] - 1)
            _panel(axes, by_name[cell, init])
            if axes is in_row[0]:
                axes.set_ylabel(f"init: {init}\nlog retention (nats)")
            if not any((cell, below) in by_name for below in inits[i + 1 :]):
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("lag T − k (steps)")
        # one scale along a row of panels, so that cells compare at a glance
        lowest, highest = min(a.get_ylim()[0] for a in in_row), max(a.get_ylim()[1] for a in in_row)
        for axes in in_row:
            axes.set_ylim(lowest, highest)
    handles = [
        matplotlib.lines.Line2D([], [], label=_LABELS[path], **_STYLES[path])
        for path in ("full", "direct", "remainder")
    ]
    handles.append(matplotlib.lines.Line2D([], [], label="full chain in naive float32", **_NAIVE))
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    config = json.loads(dataset.attrs["config"])
    drawn.suptitle(
        f"How far back the memory's gradient reaches: {dataset.attrs['text']}, {config['level']} level\n"
        f"N={config['hidden_size']}, {config['seeds']} seeds: median and its 95 % interval; scales differ between rows",
        fontsize=11,
    )
    return drawn


ABOUT = """How far back does the gradient of a recurrent network reach on real text?

Measures the true Jacobian chain, its direct path (LSTM: the product of forget gates) and the remainder for each
cell and initialisation; prints a table with medians and intervals, and writes a figure and a netCDF file."""

CAPTION = """Log retention of the memory's gradient against lag, a panel per cell and initialisation: the true
chain, its direct path (for the LSTM the product of its forget gates), the remainder, and where a plain float32
computation drops to zero."""

EXPERIMENT = command.Experiment(
    name="retention",
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
