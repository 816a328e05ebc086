"""How far back does the gradient reach: a sweep over cells, forget biases, widths, lengths and seeds.

``python -m experiments.sweep --cells lstm gru --forget-biases 1 chrono --lengths 100 1000 10000 --seeds 64``

Random weights of every kind along inputs from N(0, 1); per setting and seed the retention of the memory by lag, by the
full chain and by the direct path, and the horizon: the first lag at which less than a hundredth is left.

The seeds of a setting are spread over all devices of a process, ``--per-device`` at a time; settings and groups of
seeds are shared by as many processes as are started with the same ``--out``, on one machine or on many
(docs/cluster.md).  A run that was killed, or whose disk was full, goes on where it stopped with the same command, on
whatever processes are left, and ends with the numbers of an undisturbed one to the last bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import cluster, command, learning, results
from experiments.command import Piece, UserError
from experiments.learning import CellName
from experiments.statistics import describe, stored_text, summarise

PATHS = ("full", "direct")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a sweep."""

    cells: tuple[CellName, ...] = ("vanilla", "lstm", "gru")
    """Cells."""
    forget_biases: tuple[str, ...] = ("1", "chrono")
    """Forget biases of the cells that have a forget gate: numbers, chrono (up to T steps), chrono:LAG, or ugi."""
    hidden_sizes: tuple[int, ...] = (32,)
    """Units N."""
    lengths: tuple[int, ...] = (100, 1000)
    """Time steps T."""
    seeds: int = 16
    """Independent repetitions; each draws weights and inputs."""
    first_seed: int = 0
    """Seeds run from here."""
    lags: int = 64
    """Lags stored per setting, evenly spread on a logarithmic scale up to T."""
    per_part: int = 8
    """Seeds that are kept together: what a killed process loses, and the least that a process takes."""
    per_device: int = 4
    """Seeds that a device computes at once: decides about memory, and in the last bit about results."""


SMOKE = Config(cells=("vanilla", "lstm"), forget_biases=("1",), hidden_sizes=(4,), lengths=(20,), seeds=3, per_part=2,
               per_device=1, lags=8)  # fmt: skip
"""A few seconds: every code path."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    command.check_at_least(config, {"seeds": 1, "first_seed": 0, "lags": 3, "per_part": 1, "per_device": 1})
    for flag, values in (
        ("--cells", config.cells),
        ("--forget-biases", config.forget_biases),
        ("--hidden-sizes", config.hidden_sizes),
        ("--lengths", config.lengths),
    ):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{flag}: expected different values, at least one, found {values}")
        if any(isinstance(value, int) and value < 1 for value in values):
            raise UserError(f"{flag}: expected at least 1, found {min(values)}")
    for bias in config.forget_biases:
        learning.forget_bias(bias, max(config.lengths))


def settings(config: Config) -> list[tuple[CellName, str | None, int, int]]:
    """Returns cell, forget bias (None for a cell without forget gate), N and T of every setting, in order."""
    return [
        (cell, bias, hidden_size, num_steps)
        for cell in config.cells
        for bias in (config.forget_biases if cell in learning.WITH_FORGET_GATE else (None,))
        for hidden_size in config.hidden_sizes
        for num_steps in config.lengths
    ]


def kept_lags(num_steps: int, number: int) -> np.ndarray:
    """Returns lags from 0 to T, evenly spread on a logarithmic scale as far as whole numbers allow.

    >>> kept_lags(100, 5)
    array([  0,   1,   5,  22, 100])
    """
    return np.concatenate([[0], np.unique(np.round(np.geomspace(1, num_steps, number - 1)).astype(int))])


@functools.lru_cache(maxsize=4)
def _measured(
    cell_name: CellName, bias: str | None, hidden_size: int, num_steps: int, num_lags: int, per_device: int
) -> Callable[..., Any]:
    """Returns what measures the seeds given; compiled once for all parts of a setting."""
    cell = learning.build_cell(cell_name, hidden_size, hidden_size, init="torch", bias=bias, steps=num_steps)
    state, lags = cell.init_state(), kept_lags(num_steps, num_lags)
    memory = "c" if "c" in state._fields else None

    def of_seed(seed):
        key_params, key_xs = jax.random.split(jax.random.key(seed))
        params, xs = cell.init(key_params), jax.random.normal(key_xs, (num_steps, hidden_size), "float32")
        full, direct = (
            rg.retention(cell, params, state, xs, of=memory, wrt=memory, path=path).log_norm for path in PATHS
        )
        below = full < np.log(learning.KEPT)
        return jnp.stack([full[lags], direct[lags]]), jnp.where(below.any(), below.argmax().astype(full.dtype), jnp.inf)

    return cluster.over_devices(of_seed, per_device)


def _measure(
    cell_name: CellName, bias: str | None, hidden_size: int, num_steps: int, seeds: range, config: Config
) -> xr.Dataset:
    """Returns the dataset of some seeds of one setting."""
    measured = _measured(cell_name, bias, hidden_size, num_steps, config.lags, config.per_device)
    try:
        log_retention, horizon = measured(np.asarray(seeds, np.uint32))
    except cluster.OutOfMemoryError as error:
        what = f"{cell_name}, N = {hidden_size}, T = {num_steps}: {error}"
        again = (
            f"this setting fits with --per-device {error.fitting}, with which all is measured anew"
            if error.fitting
            else "expected a smaller --lengths or --hidden-sizes"
        )
        raise UserError(f"{what}; {again}") from error
    # settings of all lengths lie beside each other in the result
    missing = config.lags - log_retention.shape[-1]
    curves = np.pad(log_retention, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan)
    return xr.Dataset({"log_retention": (("seed", "path", "point"), curves), "horizon": ("seed", horizon)})


_DESCRIPTIONS = {
    "log_retention": ("nats", "log of ‖∂s_T/∂s_{T−lag}‖_F of the memory, 0 at lag 0; NaN beyond the last lag kept"),
    "horizon": ("steps", f"first lag at which less than {learning.KEPT:g} of the gradient is left; inf: none up to T"),
}


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished parts are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used, or that do not fit into a device's memory.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    last = config.first_seed + config.seeds
    groups = [range(at, min(at + config.per_part, last)) for at in range(config.first_seed, last, config.per_part)]
    every = settings(config)
    pieces = [
        Piece(
            f"{cell}-{bias or 'none'}-{hidden_size}-{num_steps}-{seeds[0]}".replace(":", "_"),
            f"{_row_name(cell, bias)}, N = {hidden_size}, T = {num_steps}, seeds {seeds[0]} … {seeds[-1]}",
            functools.partial(_measure, cell, bias, hidden_size, num_steps, seeds, config),
        )
        for cell, bias, hidden_size, num_steps in every
        for seeds in groups
    ]
    # what takes most memory first: if it does not fit, nothing has been measured in vain
    order = sorted(range(len(pieces)), key=lambda index: -_size(every[index // len(groups)]))
    found = command.measure([pieces[index] for index in order], parts=parts, screen=screen)
    measured = iter([part for _, part in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])])
    dataset = xr.concat(
        [xr.concat([next(measured) for _ in groups], dim="seed") for _ in every], dim="setting"
    ).assign_coords(
        cell=("setting", [cell for cell, *_ in every]),
        forget_bias=("setting", [bias or "" for _, bias, *_ in every]),
        hidden_size=("setting", [n for *_, n, _ in every]),
        length=("setting", [t for *_, t in every]),
        seed=np.arange(config.first_seed, last),
        path=list(PATHS),
        lag=(("setting", "point"), np.stack([_padded(kept_lags(t, config.lags), config.lags) for *_, t in every])),
    )
    dataset["lag"].attrs.update(units="steps", description="lags kept of each setting; −1 beyond the last")
    dataset.attrs = command.provenance("sweep", config, seconds=time.perf_counter() - started)
    summarise(dataset, _DESCRIPTIONS, _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def _size(setting: tuple[CellName, str | None, int, int]) -> int:
    *_, hidden_size, num_steps = setting
    return hidden_size * num_steps


def _padded(lags: np.ndarray, number: int) -> np.ndarray:
    return np.concatenate([lags, np.full(number - len(lags), -1)])


# --- what a person sees ----------------------------------------------------------------------------------------------

_NAMES = {"vanilla": "vanilla", "lstm": "LSTM", "gru": "GRU", "indrnn": "IndRNN", "lru": "LRU", "min_gru": "minGRU",
          "min_lstm": "minLSTM", "coupled_lstm": "coupled LSTM", "peephole_lstm": "peephole LSTM"}  # fmt: skip


def _row_name(cell: str, bias: str | None) -> str:
    return f"{_NAMES[cell]}, b_f {bias}" if bias else _NAMES[cell]


def _rows(dataset: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    rows = [dataset.isel(setting=index) for index in range(dataset.sizes["setting"])]
    return [(_row_name(str(row["cell"].values), str(row["forget_bias"].values)), row) for row in rows]


def _horizon(row: xr.Dataset) -> str:
    return stored_text(row, "horizon", ",.0f").replace("inf", "∞")


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"How far back the gradient reaches: {config['seeds']} seeds, {dataset.attrs['dtype']}, "
        f"{dataset.attrs['backend']}",
        caption=f"medians over seeds [{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]; horizon: first "
        f"lag at which less than {learning.KEPT:.0%} of the gradient is left, ∞ where there is none up to T; nats left "
        "at lag T by the full chain and by its direct path",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("cell", "N", "T", "horizon", "full at T", "direct at T"):
        shown.add_column(name, justify="left" if name == "cell" else "right")
    for name, row in _rows(dataset):
        at_end = row.isel(point=int((row["lag"] >= 0).sum()) - 1)
        left = [stored_text(at_end.sel(path=path), "log_retention", ",.1f").replace("inf", "∞") for path in PATHS]
        shown.add_row(name, f"{int(row['hidden_size'])}", f"{int(row['length']):,}", _horizon(row), *left)
    return shown


_COLOURS = ("#c81e4a", "#16325c", "#0e9f8e", "#d97706", "#6d4bb5", "#5b7083", "#8c564b", "#1f77b4")


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: retention by lag, one panel per length (and width), a colour per cell and forget bias."""
    sizes = sorted({(int(row["hidden_size"]), int(row["length"])) for _, row in _rows(dataset)})
    names = list(dict.fromkeys(name for name, _ in _rows(dataset)))
    columns = min(3, len(sizes))
    lines = -(-len(sizes) // columns)
    drawn = matplotlib.figure.Figure(figsize=(1.6 + 4.2 * columns, 1.6 + 3.2 * lines), layout="constrained")
    panels = drawn.subplots(lines, columns, squeeze=False).ravel()
    for axes, (hidden_size, num_steps) in zip(panels, sizes, strict=False):
        for name, row in _rows(dataset):
            if (int(row["hidden_size"]), int(row["length"])) != (hidden_size, num_steps):
                continue
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            is_kept = row["lag"].values >= 0
            for path, line in (("full", "-"), ("direct", ":")):
                at = row.sel(path=path)
                curve = {
                    part: at[f"log_retention_{part}"].values[is_kept] / np.log(10) for part in ("low", "median", "high")
                }
                lags = row["lag"].values[is_kept]
                axes.plot(
                    lags, np.where(np.isfinite(curve["median"]), curve["median"], np.nan), line, color=colour, lw=1.6
                )
                if path == "full":
                    axes.fill_between(lags, curve["low"], curve["high"], color=colour, alpha=0.15, lw=0)
        axes.axhline(np.log10(learning.KEPT), color="0.5", lw=0.8)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale("asinh", linear_width=0.3)
        axes.set_ylim(top=max(0.05, 1.1 * axes.dataLim.y1))
        axes.set_xlim(0, num_steps)
        axes.set_title(f"N = {hidden_size}, T = {num_steps:,}", fontsize=10)
        axes.set_xlabel("lag (steps)")
        axes.set_ylabel("retention (decades)")
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(sizes) :]:
        axes.set_axis_off()
    for index, name in enumerate(names):
        panels[0].plot([], [], color=_COLOURS[index % len(_COLOURS)], label=name)
    panels[0].plot([], [], ":", color="0.4", label="direct path alone")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    config = json.loads(dataset.attrs["config"])
    drawn.suptitle(
        f"How far back the gradient of the memory reaches, random weights, {config['seeds']} seeds: median and its "
        "95 % interval; grey: a hundredth is left",
        fontsize=10,
    )
    return drawn


ABOUT = """How far back does the gradient reach, by cell, forget bias, width and length?

Random weights along inputs from N(0, 1); prints the horizon with its interval for every setting, and writes a figure
and a netCDF file.  Seeds are spread over this process's devices.  More processes, started with the same settings and
the same --out, share the work, on this machine or on others; what is killed goes on with the same command."""

CAPTION = """Retention of the memory by lag for every setting of the sweep, full chain and direct path."""

EXPERIMENT = command.Experiment(
    name="sweep",
    about=ABOUT,
    claims=(),
    default=Config(),
    smoke=SMOKE,
    run=run,
    table=table,
    verdict=lambda dataset: [],
    summary=lambda dataset: {},
    pictures=(command.Picture("", CAPTION, figure),),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
