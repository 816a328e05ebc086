"""The subcommands of ``rnngrad``: what they take, and how they show what the library returns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import traceback as tracebacks
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import rich.console
import rich.table
import rich.text
import tyro
from tyro.conf import arg

from rnngrad import doctor, interop
from rnngrad.cli import loading
from rnngrad.cli.catalogue import catalogue
from rnngrad.cli.loading import Loaded, UserError
from rnngrad.diagnose import as_passes, diagnose
from rnngrad.diagnose.result import draws, plain
from rnngrad.init_report import InitReport as Report
from rnngrad.init_report import init_report
from rnngrad.interop.adapted import Adapted, run, time_major
from rnngrad.training.model import Model
from rnngrad.types import Cell

FIGURES = (".png", ".pdf", ".svg")
_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclasses.dataclass(frozen=True)
class Cells:
    """Cells of rnngrad: equation, gates, state, source, and the call that makes one.

    Example: rnngrad cells
    """

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """What this machine does to numbers, and what is missing: versions, devices, precision, extras, data.

    Exit code 0 unless something is broken.

    Example: rnngrad doctor
    """

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclasses.dataclass(frozen=True)
class _OnAModel:
    """What both subcommands on a model take."""

    model: Annotated[str, tyro.conf.Positional, arg(metavar="MODULE:ATTRIBUTE")]
    """Your model: the attribute of a module, e.g. my_module:cell, with the folder you stand in on the path. A cell or
    model of rnngrad, a Flax (nnx, linen) or Equinox module, a step function (params, state, x) -> state, or a function
    without arguments that makes one of these, or a pair (model, params). Or torch or keras, when the file of --weights
    alone says what it is."""
    weights: Annotated[Path | None, arg(metavar="FILE")] = None
    """Weights, by name: .safetensors, .npz, .h5, .keras, .msgpack or an orbax folder. Without it the model's own, or
    fresh ones for a cell or model of rnngrad."""
    part: Annotated[str | None, arg(metavar="NAME")] = None
    """Where the file holds more than the model: the beginning of the names that belong to it, e.g. encoder.lstm; of
    Keras, its layers, with commas."""
    input: Annotated[Path | None, arg(metavar="FILE")] = None
    """Inputs, .npy or .npz: (T, D) for one sequence, (T, B, D) for a batch."""
    random_input: Annotated[str | None, arg(metavar="T[,B]")] = None
    """Instead of --input: T steps (of B sequences) of standard normal numbers, e.g. 200,8."""
    state: Annotated[str | None, arg(metavar="MODULE:ATTRIBUTE")] = None
    """For a step function or a module of your own: the state of one sequence before the first step, or a function
    without arguments that makes it."""
    gates: Annotated[str | None, arg(metavar="MODULE:ATTRIBUTE")] = None
    """Likewise: the function (params, state, x) -> z that computes its gates, so that direct and gated paths can be
    told apart."""
    time_axis: int = 0
    """Which axis of the inputs is time: 1 for (B, T, D)."""
    seed: int = 0
    """Seed of fresh weights, random inputs and probes."""
    json: bool = False
    """Print one JSON object and nothing else."""
    traceback: bool = False
    """Show where an error came from, instead of one line."""


@dataclasses.dataclass(frozen=True)
class InitReport(_OnAModel):
    """What the weights amount to before training: biases, kept shares, singular values, horizons.

    Example: rnngrad init-report my_module:cell --random-input 200
    """


@dataclasses.dataclass(frozen=True)
class Diagnose(_OnAModel):
    """How far back your model's gradient reaches, through which gate, what limits it, what to change.

    Example: rnngrad diagnose my_module:cell --weights w.safetensors --input batch.npy
    """

    loss: Annotated[str | None, arg(metavar="MODULE:ATTRIBUTE")] = None
    """Your loss, a function of the model's outputs (T, …) that returns a number."""
    method: Literal["auto", "exact", "probes"] = "auto"
    """Exact chains, random probes (large networks), or whichever costs less."""
    num_probes: int = 16
    """Random vectors per curve, for probes."""
    max_sequences: int = 8
    """Sequences of the batch that are looked at."""
    html: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the report as a page."""
    figure: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the figure, .png, .pdf or .svg."""


_COMMANDS = {"diagnose": Diagnose, "init-report": InitReport, "doctor": Doctor, "cells": Cells}
_ABOUT = "How far back a recurrent network's gradient reaches, along which paths, and why it fades."


def main(words: Sequence[str]) -> int:
    """Returns the exit code of the command that the words spell."""
    if not words:
        _parse_or_code(["--help"])
        return 2
    if not words[0].startswith("-") and words[0] not in _COMMANDS:
        return _fail(f"no command {words[0]!r}{loading.suggestion(words[0], _COMMANDS) or _known()}")
    command = _parse_or_code(words)
    if isinstance(command, int):
        return command
    try:
        out = sys.stdout
        # what a user's module prints is no part of the one JSON object
        with contextlib.redirect_stdout(sys.stderr) if command.json else contextlib.nullcontext():
            return _RUN[type(command)](command, out)
    except (ValueError, ImportError, OSError) as error:
        if getattr(command, "traceback", False):
            tracebacks.print_exc()
        return _fail(error)
    except Exception as error:
        if getattr(command, "traceback", False):
            tracebacks.print_exc()
        return _fail(f"{type(error).__name__}: {error} (--traceback shows where)", code=1)


def _parse_or_code(words: Sequence[str]) -> Any:
    """Returns the command, or the exit code after --help and after tyro has said what is wrong."""
    union: Any = None
    for name, kind in _COMMANDS.items():
        one = Annotated[kind, tyro.conf.subcommand(name)]  # type: ignore[valid-type]
        union = one if union is None else union | one
    try:
        return tyro.cli(union, args=words, prog="rnngrad", description=_ABOUT, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as error:
        return int(error.code or 0)


def _known() -> str:
    return f"; expected one of: {', '.join(_COMMANDS)}"


def _fail(error: Exception | str, code: int = 2) -> int:
    sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
    return code


def _show(*parts: Any) -> None:
    """Writes tables, and text as it stands, wide enough also where the output is no terminal."""
    console = rich.console.Console(file=sys.stdout)
    if not console.is_terminal:
        console = rich.console.Console(file=sys.stdout, width=130)
    for part in parts:
        console.print(rich.text.Text(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))


def _show_json(out: Any, value: Any) -> None:
    out.write(json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def _cells(command: Cells, out: Any) -> int:
    entries = catalogue()
    if command.json:
        _show_json(out, {"cells": entries})
        return 0
    table = rich.table.Table("cell", "equation, source, call", "gates", "state", show_lines=True)
    for entry in entries:
        lines = [entry.summary, *map("  ".__add__, entry.equation.splitlines())]
        lines += [entry.source] * bool(entry.source) + [entry.call]
        table.add_row(entry.name, rich.text.Text("\n".join(lines)), " ".join(entry.gates), " ".join(entry.state))
    _show(table)
    return 0


def _doctor(command: Doctor, out: Any) -> int:
    found = doctor.examine()
    if command.json:
        _show_json(out, {"is_healthy": found.is_healthy, **found._asdict()})
    else:
        table = rich.table.Table("", "what", "found", "what to do, or what it means")
        for row in found.rows:
            shown = map(rich.text.Text, (row.name, row.value, row.advice))
            table.add_row(rich.text.Text(row.status, _COLOURS[row.status]), *shown)
        _show(table)
    return 0 if found.is_healthy else 1


def _init_report(command: InitReport, out: Any) -> int:
    state, gates = _state_and_gates(command)
    loaded, xs = _model_and_inputs(command)
    xs = time_major(xs, command.time_axis)
    adapted = as_passes(*loaded, state, xs, gates)
    # rates are those of one sequence: the first
    heard = run(adapted, adapted.params, xs[:, 0])[1]
    passes = zip(adapted.passes, sum(adapted.params, ()), sum(heard, ()), strict=True)
    reports = {one.name: init_report(one.cell, params, own) for one, params, own in passes}
    if command.json:
        _show_json(
            out, {"source": adapted.source, "passes": [{"name": name, **plain(r)} for name, r in reports.items()]}
        )
    else:
        _show(adapted.source, *(_titled(name, report) for name, report in reports.items()))
    return 0


def _titled(name: str, report: Report) -> str:
    return "\n" + (f"{name}\n\n" if name else "") + report.table()


def _diagnose(command: Diagnose, out: Any) -> int:
    for file in filter(None, (command.html, command.figure)):
        if not file.parent.is_dir():  # said before minutes of work, not after
            raise UserError(f"no folder {file.parent} to write {file.name} to")
    if command.figure is not None and command.figure.suffix.lower() not in FIGURES:
        raise UserError(f"--figure: expected {', '.join(FIGURES)}, found {command.figure.name!r}")
    if command.html is not None or command.figure is not None:
        draws()
    state, gates = _state_and_gates(command)
    loss = None if command.loss is None else loading.resolve(command.loss)
    loaded, xs = _model_and_inputs(command)
    report = diagnose(
        *loaded,
        xs,
        loss,
        state=state,
        gates=gates,
        time_axis=command.time_axis,
        method=command.method,
        num_probes=command.num_probes,
        max_sequences=command.max_sequences,
        key=jax.random.key(command.seed),
        progress=not command.json,
    )
    out.write(report.to_json() + "\n" if command.json else report.table())
    # after the report, which a full disk shall not cost
    if command.html is not None:
        command.html.write_text(report.to_html(), encoding="utf-8")
    if command.figure is not None:
        report.plot().savefig(command.figure, dpi=150)
    if not command.json:
        for file in filter(None, (command.html, command.figure)):
            out.write(f"wrote {file}\n")
    return 0


def _model_and_inputs(command: _OnAModel) -> tuple[Loaded, jax.Array]:
    if (command.input is None) == (command.random_input is None):
        raise UserError("expected one of --input FILE and --random-input T[,B], e.g. --random-input 200,8")
    key_weights, key_inputs = jax.random.split(jax.random.key(command.seed))
    loaded = loading.load(command.model, command.weights, command.part, key_weights)
    if command.input is not None:
        return loaded, loading.read_input(command.input)
    size = _input_size(loaded)
    if size is None:
        raise UserError("--random-input: the model does not say how many features it takes; give --input FILE")
    xs = loading.random_input(str(command.random_input), size, key_inputs)
    return loaded, xs.swapaxes(0, 1) if command.time_axis == 1 and xs.ndim == 3 else xs


def _state_and_gates(command: _OnAModel) -> tuple[Any, Any]:
    state = None if command.state is None else loading.build(command.state, loading.resolve(command.state))
    return state, None if command.gates is None else loading.resolve(command.gates)


def _input_size(loaded: Loaded) -> int | None:
    model = loaded.model
    if isinstance(model, Cell):
        return model.input_size
    if isinstance(model, Model):
        return model.layers[0].input_size
    try:
        adapted = model if isinstance(model, Adapted) else interop.adapt(*loaded)
    except ValueError as error:
        raise UserError(f"--random-input: the number of features is not known, give --input FILE ({error})") from error
    return adapted.passes[0].cell.input_size


_RUN: dict[type, Any] = {Cells: _cells, Doctor: _doctor, InitReport: _init_report, Diagnose: _diagnose}
