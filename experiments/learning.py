"""What the two training commands share: presets, one run with its files, the stored history, the figure.

A run writes into one folder: ``log.jsonl`` (every record), ``checkpoints/``, TensorBoard events in ``tensorboard/``
unless ``--logs`` leaves them out, and on demand ``wandb/``.  The stored result is read off the records alone, so an
interrupted run that was resumed gives the result of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import matplotlib
import matplotlib.figure
import matplotlib.layout_engine
import numpy as np
import optax
import rich.console
import rich.table
import tyro
import xarray as xr

import rnngrad as rg
from experiments import cluster, command, results
from experiments.command import UserError

CellName = Literal["vanilla", "lstm", "gru", "coupled_lstm", "peephole_lstm", "indrnn", "min_gru", "min_lstm", "lru"]
OptimizerName = Literal["adam", "rmsprop", "sgd"]
Unit = Literal["mean_per_token", "sum_over_steps"]
LogName = Literal["tensorboard", "wandb"]

WITH_FORGET_GATE = ("lstm", "gru", "coupled_lstm", "peephole_lstm", "min_gru", "min_lstm")
"""Cells that take a forget bias (of a GRU: of the share kept)."""
KEPT = 0.01
"""A lag is within the gradient's horizon while at least this share of the gradient at lag 0 arrives there."""


# --- settings --------------------------------------------------------------------------------------------------------


def forget_bias(words: str | None, steps: int) -> Any:
    """Returns the gate bias that ``--forget-bias`` asks for: a number, ``chrono``, ``chrono:T`` or ``ugi``.

    Raises:
      UserError: none of these.
    """
    if words is None:
        return None
    if words == "ugi":
        return rg.initializers.ugi()
    is_chrono = words.partition(":")[0] == "chrono"
    try:
        number = float(max(steps, 2)) if words == "chrono" else float(words.removeprefix("chrono:"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--forget-bias: expected a number, chrono, chrono:T or ugi, found {words}")
    if not is_chrono:
        return number
    with command.user_input():
        return rg.initializers.chrono(number)


def build_cell(name: str, input_size: int, hidden_size: int, *, init: str, bias: str | None, steps: int) -> rg.Cell:
    """Returns a cell by its name.

    Args:
      name: one of :data:`CellName`.
      input_size: D.
      hidden_size: N.
      init: name of an initialisation; an LRU draws in a way of its own.
      bias: what ``--forget-bias`` says.
      steps: T, the length for which an IndRNN is bounded (|u| ≤ 2^{1/T}) and plain ``chrono`` drawn.

    Raises:
      UserError: a forget bias for a cell that has no forget gate.
    """
    options: dict[str, Any] = {} if name == "lru" else {"init": init}
    if name in WITH_FORGET_GATE:
        options["forget_bias"] = forget_bias(bias, steps)
    elif bias is not None:
        raise UserError(f"--forget-bias: {name} has no forget gate; expected one of {', '.join(WITH_FORGET_GATE)}")
    if name == "indrnn":
        options["max_lag"] = steps
    return getattr(rg.cells, name)(input_size, hidden_size, **options)


def build_optimizer(
    name: OptimizerName,
    learning_rate: optax.ScalarOrSchedule,
    *,
    clip: float | None,
    clip_unit: Unit,
    loss_unit: Unit,
    num_steps: int,
) -> optax.GradientTransformation:
    """Returns the optimizer behind clipping by the global norm, the threshold stated in ``clip_unit``."""
    rules = {
        "adam": optax.adam,
        # moving average 0.9, as in Tieleman & Hinton 2012
        "rmsprop": lambda rate: optax.rmsprop(rate, decay=0.9, eps=1e-8),
        "sgd": optax.sgd,
    }
    rule = rules[name](learning_rate)
    if clip is None:
        return rule
    return optax.chain(
        rg.remedies.clip_by_global_norm(clip, unit=clip_unit, loss_unit=loss_unit, num_steps=num_steps), rule
    )


NUM_SEEDS = 2**32
"""JAX makes a key of the lowest 32 bits of a seed: others would repeat."""


def check_seeds(flag: str, first: int, number: int = 1) -> None:
    """Raises UserError for seeds from ``first`` on that are not different ones to JAX."""
    if not 0 <= first <= NUM_SEEDS - number:
        raise UserError(f"{flag}: expected seeds of at least 0 and below 2**32, found {first} … {first + number - 1}")


def check_positive(config: Any, names: Sequence[str]) -> None:
    """Raises UserError for a setting that is not a positive number; one that is None is left out."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, found {value:g}")


def check_result(file: Path, experiment: str, config: Any, may_change: Sequence[str]) -> None:
    """Raises UserError where a result lies in ``file`` that was made with other settings, and would be lost.

    Args:
      file: the result file of the run's folder; it need not exist.
      experiment: the command's name.
      config: the settings now.
      may_change: those that may differ.
    """
    rg.training.ask_first(lambda: _check_result(file, experiment, config, may_change))


def _check_result(file: Path, experiment: str, config: Any, may_change: Sequence[str]) -> None:
    if not file.exists():
        return
    with command.user_input():
        stored = json.loads(results.load(file, experiment=experiment).attrs["config"])
    now = json.loads(json.dumps(command.config_dict(config)))
    changed = [
        f"{name}: expected {stored.get(name, 'missing')!r}, found {now.get(name, 'missing')!r}"
        for name in sorted({*stored, *now} - {*may_change})
        if stored.get(name, "missing") != now.get(name, "missing")
    ]
    if changed:
        raise UserError(
            f"{file} was made with another configuration: {'; '.join(changed)}; choose another folder, or the former "
            "settings to resume"
        )


# --- one run ---------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A run that ended, and its records from the first step on."""

    records: list[dict[str, Any]]
    params: Any
    step: int
    """Updates that made them."""
    best_params: Any
    """Those of the best evaluation."""
    num_parameters: int
    seconds: float
    """Wall time of these updates, in however many sittings; what was lost after a last checkpoint does not count."""
    num_devices: int
    """That every batch was split over, in this sitting."""


def _logs(names: Sequence[LogName], folder: Path, config: Mapping[str, Any]) -> list[Any]:
    logs: list[Any] = [rg.training.jsonl_log(folder / "log.jsonl")]
    if "tensorboard" in names:
        logs.append(rg.training.tensorboard_log(folder / "tensorboard"))
    if "wandb" in names:
        logs.append(rg.training.wandb_log(folder / "wandb", project="rnngrad", name=folder.name, config=config))
    return logs


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Marks what is wrong with folder or batch size as the user's to put right; other errors keep their traceback."""
    try:
        yield
    except (
        rg.training.ConfigChangedError,
        rg.training.CorruptCheckpointError,
        rg.training.ForeignCheckpointError,
        rg.training.ForeignLogError,
        rg.training.UnevenBatchError,
    ) as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Shows warnings the way errors are shown, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


def training_devices(batch_size: int) -> list[jax.Device] | None:
    """Returns the devices that a batch is split over; None for one.

    Processes that were brought together use all they have.  One that is alone uses as many as split the batch evenly.
    """
    devices = jax.devices()
    if jax.process_count() > 1:
        return devices
    number = max(number for number in range(1, len(devices) + 1) if batch_size % number == 0)
    return devices[:number] if number > 1 else None


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raises UserError in a process whose settings are others than those of process 0."""
    own = {name: json.dumps(value) for name, value in settings.items()}  # as text NaN equals itself
    first = rg.training.ask_first(lambda: own)
    differing = [name for name in own if own[name] != first.get(name)]
    if differing:
        listed = "; ".join(f"{name}: expected {first.get(name)}, found {own[name]}" for name in differing)
        raise UserError(f"process {jax.process_index()} has other settings than process 0: {listed}")


def train(
    folder: Path,
    model: Any,
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    batch_at: Callable[[int], Any],
    *,
    key: jax.Array,
    batch_size: int,
    updates: int,
    identity: Mapping[str, Any],
    evaluate: Callable[..., Mapping[str, float]],
    eval_every: int,
    monitor_every: int,
    checkpoint_every: int,
    logs: Sequence[LogName],
    title: str,
    screen: rich.console.Console,
    patience: int | None = None,
    restart_at: Callable[[int], Any] | None = None,
    should_stop: Callable[[Any], bool] | None = None,
) -> Trained:
    """Returns the run, after resuming what the folder holds of it; shows a progress bar.

    Processes that were brought together (:func:`experiments.cluster.connect`) train together, and all return the same;
    files are written by process 0.

    Raises:
      UserError: the folder holds another run, a longer one, or nothing readable; a batch that cannot be split evenly.
      FirstProcessError: an error in process 0, and this is another one.
      OSError: the folder cannot be written to.
      NonFiniteLossError: training diverged.
    """
    check_alike(identity)
    file = folder / "log.jsonl"
    checkpoints = rg.training.Checkpoints(folder / "checkpoints", identity)

    def look() -> None:
        if checkpoints.latest_step() is not None and not (file.is_file() and _has_evaluation(file)):
            raise UserError(
                f"{file}: expected the records of the checkpoints beside it, found none; choose another folder"
            )

    rg.training.ask_first(look)
    devices = training_devices(batch_size)
    if devices is not None:
        screen.print(f"{title}: every batch of {batch_size} is split over {len(devices)} devices", highlight=False)
    state = rg.training.initial_state(model, optimizer, key, batch_size)
    num_parameters = rg.training.count_parameters(state.params)
    with command.user_input():  # a package that is not installed
        written = _logs(logs, folder, identity)
    with command.progress(screen) as bar, _user_errors(), _one_line_warnings():
        task = bar.add_task(title, total=updates)

        def show(progress: Any) -> None:
            shown = title if progress.record is None else f"{title}, loss {progress.record['loss']:.4g}"
            bar.update(task, completed=progress.step, description=shown)

        fitted = rg.training.fit(
            model,
            loss,
            optimizer,
            state,
            batch_at,
            num_steps=updates,
            restart_at=restart_at,
            evaluate=evaluate,
            eval_every=eval_every,
            patience=patience,
            log_every=10,
            logs=written,
            monitor=rg.training.Monitor(every=monitor_every),
            checkpoints=checkpoints,
            checkpoint_every=checkpoint_every,
            on_progress=show,
            should_stop=should_stop,
            devices=devices,
        )
    made = int(fitted.state.step) - (fitted.resumed_from or 0)
    held = int(fitted.state.step)
    if held > updates:
        raise UserError(f"the folder holds {held:,} updates, expected --updates of at least {held}")
    if fitted.resumed_from is not None:
        screen.print(f"{title}: resumed after update {fitted.resumed_from:,}, {made:,} more", highlight=False)
    return Trained(
        rg.training.ask_first(lambda: rg.training.read_jsonl(file)),
        fitted.state.params,
        int(fitted.state.step),
        fitted.best_params,
        num_parameters,
        fitted.seconds,
        1 if devices is None else len(devices),
    )


def _has_evaluation(file: Path) -> bool:
    return any(record["kind"] == "evaluation" for record in rg.training.read_jsonl(file))


# --- what is stored --------------------------------------------------------------------------------------------------

_DESCRIPTIONS = {
    "train_loss": ("{unit}", "loss of the training batches, mean since the record before"),
    "grad_norm": ("1", "global norm of the gradient before clipping, in the unit of the training loss, mean likewise"),
    "clipped": ("1", "share of these updates that were clipped"),
    "loss": ("{unit}", "loss on held-out data"),
    "accuracy": ("1", "share of right answers on held-out data"),
    "log_retention": (
        "nats",
        "log of ‖∂L/∂s_{{T−lag}}‖ over that at lag 0, L the last step's loss, mean over sequences",
    ),
    "decay_rate": ("nats per step", "least-squares slope of log_retention"),
    "half_life": ("steps", "lag over which retention halves, by decay_rate; inf when it does not decay"),
    "direct_share": ("1", "share of the gradient that goes back along the direct path"),
    "gate_share": ("1", "share of ‖∂L/∂z‖² by pre-activation"),
    "horizon": (
        "steps",
        f"first lag at which retention is below {KEPT:g}; −1 when there is none, NaN when no gradient was there",
    ),
    "clip_fraction": ("1", "share of all updates so far that were clipped"),
}


def _number(value: Any, *, nothing: float) -> float:
    """JSON has no inf and no NaN; None stands for either."""
    return nothing if value is None else float(value)


def horizon(log_retention: np.ndarray) -> np.ndarray:
    """Returns the first lag (last axis) at which retention is below :data:`KEPT`, −1 where there is none.

    NaN where nothing was measured.
    """
    below = log_retention < np.log(KEPT)
    found = np.where(below.any(axis=-1), below.argmax(axis=-1), -1)
    return np.where(np.isnan(log_retention[..., 0]), np.nan, found)


def history(
    records: Sequence[Mapping[str, Any]], *, loss_unit: str, reach: Callable[[int], int], tokens_per_loss: int = 1
) -> xr.Dataset:
    """Returns the dataset of one run: learning curve, and what the monitor saw.

    Args:
      records: all records, as the run wrote them.
      loss_unit: unit of the losses.
      reach: longest lag that the sequences measured at an update have (:func:`longest_lag`).
      tokens_per_loss: what a training loss is divided by (T where it is a sum over steps, so that curves compare).
    """
    kinds = {kind: [record for record in records if record["kind"] == kind] for kind in ("train", "evaluation", "flow")}
    train, evaluation, flow = kinds["train"], kinds["evaluation"], kinds["flow"]
    names = [name for name in evaluation[0] if name not in ("kind", "step")] if evaluation else []
    dataset = xr.Dataset(
        {
            "train_loss": ("train_update", [_number(r["loss"], nothing=np.nan) / tokens_per_loss for r in train]),
            "grad_norm": ("train_update", [_number(r["grad_norm"], nothing=np.nan) for r in train]),
            "clipped": ("train_update", [float(r["clip_fraction"]) for r in train]),
            **{name: ("update", [_number(r[name], nothing=np.nan) for r in evaluation]) for name in names},
        },
        {"train_update": [r["step"] for r in train], "update": [r["step"] for r in evaluation]},
    )
    if flow:
        dataset = dataset.merge(_flow_history(flow, reach))
    for name in dataset.data_vars:
        units, text = _DESCRIPTIONS[str(name)]
        dataset[name].attrs.update(units=units.format(unit=loss_unit), description=text.format())
    return dataset


def longest_lag(batch: Any) -> int:
    """Returns the longest lag that the monitor can measure on a batch: steps up to the last one that counts."""
    mask = np.asarray(batch.mask)[:, : rg.training.Monitor().max_sequences]
    return 1 + int(np.flatnonzero(mask.any(axis=1))[-1])


def _flow_history(flow: Sequence[Mapping[str, Any]], reach: Callable[[int], int]) -> xr.Dataset:
    layers = [record["layers"] for record in flow]
    gates = list(layers[0][0]["gate_share"])

    def by_layer(value: Callable[[Mapping[str, Any]], Any]) -> np.ndarray:
        return np.array([[value(layer) for layer in of_record] for of_record in layers], dtype=float)

    # JSON's None is −inf, a gradient of 0, at every lag that a sequence has, and NaN beyond; at lag 0, which is 0 nats
    # wherever there is a gradient, it says that there was none
    retention = by_layer(lambda layer: [_number(v, nothing=-np.inf) for v in layer["log_retention"]])
    for record, measured in zip(flow, retention, strict=True):
        measured[:, reach(record["step"]) + 1 :] = np.nan
        measured[np.isneginf(measured[:, 0])] = np.nan

    def half_life(layer: Mapping[str, Any]) -> float:
        return np.nan if layer["decay_rate"] is None else _number(layer["half_life"], nothing=np.inf)

    return xr.Dataset(
        {
            "log_retention": (("flow_update", "layer", "lag"), retention),
            "decay_rate": (("flow_update", "layer"), by_layer(lambda a: _number(a["decay_rate"], nothing=np.nan))),
            "half_life": (("flow_update", "layer"), by_layer(half_life)),
            "direct_share": (("flow_update", "layer"), by_layer(lambda a: _number(a["direct_share"], nothing=np.nan))),
            "gate_share": (
                ("flow_update", "layer", "gate"),
                by_layer(lambda a: [_number(a["gate_share"][gate], nothing=np.nan) for gate in gates]),
            ),
            "horizon": (("flow_update", "layer"), horizon(retention)),
            "clip_fraction": ("flow_update", [_number(record["clip_fraction"], nothing=np.nan) for record in flow]),
        },
        {
            "flow_update": [record["step"] for record in flow],
            "layer": np.arange(1, len(layers[0]) + 1),
            "lag": np.arange(retention.shape[-1]),
            "gate": gates,
        },
    )


def matmul_precision() -> str:
    """Returns the precision of the matrix products of training: JAX's setting, unlike the chains' own."""
    return jax.config.values["jax_default_matmul_precision"] or "default"


def last(values: xr.DataArray) -> float:
    """Returns the last number of one run's curve; shorter runs are filled up with NaN."""
    there = values.values[~np.isnan(values.values)]
    return float(there[-1]) if len(there) else float("nan")


def last_flow(dataset: xr.Dataset) -> xr.Dataset:
    """Returns what the monitor saw last: at each run's own last measurement."""
    measured = np.isfinite(dataset["clip_fraction"].values)
    return dataset.isel(flow_update=len(measured) - 1 - int(np.argmax(measured[::-1])))


def horizons(dataset: xr.Dataset) -> str:
    """Prints the gradient's horizon of one run when the monitor last looked, layer by layer from the input up."""
    if "horizon" not in dataset:
        return "—"
    longest = dataset.sizes["lag"] - 1
    found = last_flow(dataset)["horizon"].values
    return " / ".join("—" if np.isnan(value) else f"> {longest}" if value < 0 else f"{value:.0f}" for value in found)


# --- the figure ------------------------------------------------------------------------------------------------------

_LINES = {"train": "#8fa3bf", "held_out": "#16325c", "baseline": "#c81e4a", "solved": "#2a9d6f"}
_GATES = ("#16325c", "#d97706", "#2a9d6f", "#c81e4a", "#7c5cbf", "#5b8fb9")
_DIRECT = "0.45"
FLOOR = -30.0
"""Nats at which the colours of the heat map end at the latest: 1e-13."""


def _edges(centres: np.ndarray) -> np.ndarray:
    """Returns the borders of cells around ``centres``."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _curve(axes: Any, dataset: xr.Dataset) -> None:
    """Draws the learning curve: one line per run, and what it is to be compared with."""
    attrs = dataset.attrs
    for index, run in enumerate(dataset.transpose("seed", ...)[name] for name in ("train_loss", "loss")):
        style = {"color": _LINES["train"], "linewidth": 0.9} if index == 0 else {"color": _LINES["held_out"]}
        label = "training" if index == 0 else attrs["held_out"]
        for number, values in enumerate(run):
            x = values[values.dims[0]].values
            axes.plot(x, values, label=label if number == 0 else None, zorder=2 + index, alpha=0.85, **style)
    marks = [(attrs["baseline"], f"{attrs['baseline_name']} ({attrs['baseline']:.3g})", "baseline", "--")]
    if "solved_loss" in attrs:
        marks.append((attrs["solved_loss"], f"solved ({attrs['solved_loss']:.3g})", "solved", ":"))
    for value, name, kind, linestyle in marks:
        axes.axhline(value, color=_LINES[kind], linestyle=linestyle, linewidth=1.2)
        axes.annotate(
            name,
            (0.98, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=_LINES[kind],
            ha="right",
            fontsize=8,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
        )
    if attrs["loss_scale"] == "log":
        axes.set_yscale("log")
    axes.set_xlabel("update")
    axes.set_ylabel(attrs["loss_label"])
    # above the panel, where no curve is
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _mean(values: xr.DataArray) -> np.ndarray:
    """Returns the mean over the runs that were measured there (of nats: the geometric mean); −inf stays −inf."""
    samples = values.transpose(..., "seed").values
    there = ~np.isnan(samples)
    total = np.where(there, samples, 0.0).sum(axis=-1)
    return np.where(there.any(axis=-1), total / np.maximum(there.sum(axis=-1), 1), np.nan)


def _heat(axes: Any, dataset: xr.Dataset, layer: int, floor: float) -> Any:
    """Draws retention over lag and update of one layer, with the line at which 1 % is left."""
    one = dataset.sel(layer=layer)
    values = _mean(one["log_retention"].transpose("lag", "flow_update", "seed"))
    updates, lags = one["flow_update"].values.astype(float), one["lag"].values.astype(float)
    drawn = axes.pcolormesh(
        _edges(updates),
        _edges(lags),
        np.ma.masked_invalid(np.where(np.isneginf(values), floor - 1, values)),
        cmap=matplotlib.colormaps["viridis"].with_extremes(under="black"),
        vmin=floor,
        vmax=max(0.0, float(np.nanmax(values))),
        rasterized=True,
    )
    axes.set_xlim(left=0)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_facecolor("0.9")
    below = horizon(values.T)
    there = below >= 0
    axes.plot(updates[there], below[there], color="white", linewidth=1.4)
    axes.set_xlabel("update")
    axes.set_ylabel("lag (steps back from the last)")
    return drawn


def _shares(axes: Any, dataset: xr.Dataset, layer: int) -> None:
    """Draws the share of the gradient by gate, and that of the direct path."""
    one = dataset.sel(layer=layer)
    updates = one["flow_update"].values
    marker = "o" if len(updates) == 1 else None
    for gate, color in zip(one["gate"].values, _GATES, strict=False):
        name = str(gate) or "z"
        axes.plot(updates, _mean(one["gate_share"].sel(gate=gate)), color=color, marker=marker, label=name)
    direct = _mean(one["direct_share"])
    axes.plot(updates, direct, color=_DIRECT, linestyle="--", linewidth=1.4, marker=marker, label="direct path")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("update")
    axes.set_ylabel("share of the gradient")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: learning curve, and per layer retention over lag and update, and the share by gate."""
    layers = dataset["layer"].values.tolist() if "layer" in dataset.coords else []
    height = 4.6 if len(layers) <= 1 else 1.0 + 3.1 * len(layers)
    layout = matplotlib.layout_engine.ConstrainedLayoutEngine(wspace=0.04, hspace=0.06)
    drawn = matplotlib.figure.Figure(figsize=(14.0 if layers else 6.0, height), layout=layout)
    # the layer nearest to the read-out on top
    rows: Any = [["curve", f"heat {layer}", f"share {layer}"] for layer in reversed(layers)] or [["curve"]]
    panels = drawn.subplot_mosaic(rows, width_ratios=[1.0, 1.15, 0.9] if layers else None)
    _curve(panels["curve"], dataset)
    if layers:
        finite = dataset["log_retention"].values
        finite = finite[np.isfinite(finite)]
        floor = max(FLOOR, min(float(finite.min()), float(np.log(KEPT)))) if len(finite) else FLOOR
        for layer in reversed(layers):
            of_layer = f", layer {layer} of {len(layers)}" if len(layers) > 1 else ""
            heat = panels[f"heat {layer}"]
            image = _heat(heat, dataset, layer, floor)
            heat.set_title(f"gradient that reaches back{of_layer}", fontsize=11)
            bar = drawn.colorbar(image, ax=heat, extend="min", pad=0.02)
            bar.set_label("log retention (nats)")
            bar.ax.axhline(np.log(KEPT), color="white", linewidth=1.4)
            share = panels[f"share {layer}"]
            _shares(share, dataset, layer)
    for name, axes in panels.items():
        if not name.startswith("heat"):
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    note = f"\nwhite line: where {KEPT:.0%} of the gradient at lag 0 is left" if layers else ""
    drawn.suptitle(f"{dataset.attrs['title']}{note}", fontsize=11)
    return drawn


# --- the command line ------------------------------------------------------------------------------------------------


class Preset(NamedTuple):
    """A configuration with a name, and whose it is."""

    config: Any
    source: str


def preset_lines(presets: Mapping[str, Preset]) -> str:
    """Returns the presets as ``--help`` lists them: name, the flags it stands for, source."""
    lines = [
        f"  {name}: {command.flags(preset.config) or 'the defaults'}\n    {preset.source}"
        for name, preset in presets.items()
    ]
    return "Presets (further flags change single settings):\n\n" + "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Options:
    """What both training commands take beside their settings."""

    preset: str | None = None
    """Start from the settings of this name, listed above."""
    out: Path | None = None
    """Folder for result, figure, log and checkpoints; by default named after the run, in out/."""
    smoke: bool = False
    """Small sizes that finish in seconds; other flags still apply."""
    show: Path | None = None
    """Show a stored result file instead of running: the table, and the figure drawn again beside it."""
    processes: Annotated[cluster.Processes, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=cluster.Processes
    )
    """How several processes find one another to split every batch over all their devices."""


class Driver(NamedTuple):
    """The functions that a training command hands to :func:`main`."""

    name: str
    about: str
    run: Callable[..., xr.Dataset]
    """run(config, folder, screen) -> dataset"""
    run_name: Callable[[Any], str]
    """Names a run's folder."""
    table: Callable[[xr.Dataset], rich.table.Table]
    summary: Callable[[xr.Dataset], str]
    presets: Mapping[str, Preset]
    smoke: Callable[[Any], Any]
    """Shrinks a configuration to seconds."""


def _named_preset(words: Sequence[str]) -> str | None:
    """Returns what follows ``--preset``; None when it is not there."""
    for index, word in enumerate(words):
        if word.startswith("--preset="):
            return word.removeprefix("--preset=")
        if word == "--preset" and index + 1 < len(words):
            return words[index + 1]
    return None


def start_config(driver: Driver, default: Any, words: Sequence[str]) -> Any:
    """Returns the configuration that the other flags change: the default, a preset, either of them shrunk.

    Raises:
      UserError: no such preset; names those that exist.
    """
    name = _named_preset(words)
    if name is not None and name not in driver.presets:
        raise UserError(f"--preset: expected one of {', '.join(driver.presets)}, found {name}")
    config = default if name is None else driver.presets[name].config
    return driver.smoke(config) if "--smoke" in words else config


def execute(driver: Driver, config: Any, *, out: Path | None, show: Path | None) -> None:
    """Trains, or shows a stored run: table in the terminal, figure and netCDF in the folder.

    Of processes that train together the first one shows and writes.

    User errors end the program with one line and exit code 2, a failed write, a diverged run or another process's end
    with 1, an interruption with 130.
    """
    started = time.perf_counter()
    is_first = show is not None or jax.process_index() == 0
    screen = command.console() if is_first else rich.console.Console(quiet=True)
    try:
        if show is not None:
            with command.user_input():
                dataset = results.load(show, experiment=driver.name)
            folder = results.writable_folder(out or show.parent)
        else:
            check_alike({name: value for name, value in command.config_dict(config).items() if name != "data_dir"})
            folder = out or Path("out") / driver.name / driver.run_name(config)
            rg.training.ask_first(lambda: str(results.writable_folder(folder)))
            dataset = driver.run(config, folder, screen)

        def write() -> None:
            if show is None:
                results.save(dataset, folder / f"{driver.name}.nc")
            screen.print(driver.table(dataset))
            screen.print(driver.summary(dataset))
            with results.whole_file(folder / f"{driver.name}.png") as temporary:
                figure(dataset).savefig(temporary, dpi=150)

        if show is None:
            rg.training.ask_first(write)
        else:
            write()
    except KeyboardInterrupt:
        note = "the same command resumes from the last checkpoint, or starts anew if there is none yet"
        print(f"\ninterrupted: {note}", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        command.fail(error, code=2)
    except (rg.training.NonFiniteLossError, rg.training.FirstProcessError) as error:
        command.fail(error, code=1)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        command.fail(
            RuntimeError(f"another process ended? the same command resumes from the last checkpoint ({reason})"), code=1
        )
    except OSError as error:
        known = FileNotFoundError | results.NotWritableError | rg.training.NotWritableError
        command.fail(error, code=2 if isinstance(error, known) else 1)
    if not is_first:
        print(f"process {jax.process_index()} of {jax.process_count()}: done; process 0 has the result")
        return
    written = (
        [folder / f"{driver.name}.png"] if show is not None else [folder / f"{driver.name}.{e}" for e in ("nc", "png")]
    )
    seconds = time.perf_counter() - started
    screen.print(f"wrote {' and '.join(map(str, written))} after {seconds:.0f} s", soft_wrap=True, highlight=False)


def main(driver: Driver, default: Any, arguments: Sequence[str] | None) -> None:
    """Runs the command line of a training command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    command.keep_compiled()
    try:
        start = start_config(driver, default, words)
    except UserError as error:
        command.fail(error, code=2)
    flat = tyro.conf.arg(name="")
    whole = dataclasses.make_dataclass(
        "Command",
        [("config", Annotated[type(default), flat]), ("options", Annotated[Options, flat])],
        namespace={"__doc__": driver.about},
    )
    given = tyro.cli(
        whole,
        args=words,
        default=whole(start, Options()),
        prog=f"python -m experiments.{driver.name}",
        description=f"{driver.about}\n\n{preset_lines(driver.presets)}",
    )
    if given.options.show is None:
        try:
            with command.user_input():
                cluster.connect(given.options.processes)
        except UserError as error:
            command.fail(error, code=2)
        except ConnectionError as error:
            command.fail(error, code=1)
    execute(driver, given.config, out=given.options.out, show=given.options.show)
