"""Where records of a run go: JSON lines, TensorBoard events, Weights & Biases.

A record is a dict of plain Python values; ``kind`` and ``step``, the number of updates done, are in every one.  A log
is four functions; the loop calls ``start`` once with the step it resumes from (None: it begins), ``write`` for every
record, ``flush`` before every checkpoint and ``close`` at the end, also after an error.  A log drops on ``start`` what
it holds beyond that step: those records will come again, equal to the last bit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from rnngrad.training.checkpoints import NotWritableError

Record = Mapping[str, Any]
"""One record: plain Python values by name."""


class ForeignLogError(ValueError):
    """The file holds something else than the records of a run."""


@runtime_checkable
class Log(Protocol):
    """Where records go."""

    def start(self, step: int | None) -> None:
        """Opens the log and drops records after ``step``; None: all."""

    def write(self, record: Record) -> None:
        """Takes one record."""

    def flush(self) -> None:
        """Hands everything taken so far to the operating system."""

    def close(self) -> None:
        """Flushes and closes; a log that was never started ignores it."""


def _plain(value: Any) -> Any:
    """JSON has no inf and no NaN: both become None."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Says of what cannot be made or opened that it is a log."""
    try:
        yield
    except OSError as error:
        raise NotWritableError(f"log {path} is not writable: {error.strerror or error}") from error


def _is_record(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("kind"), str) and isinstance(found.get("step"), int)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields every complete record with the position where its line ends, up to the first damaged one."""
    position = 0
    with file.open("rb") as stream:
        for line in stream:
            position += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not _is_record(record):
                return
            yield position, record


def _is_foreign(file: Path) -> bool:
    """Whether it holds more than records and, behind them, half of one that a kill left."""
    end = 0
    for position, _ in _lines(file):
        end = position
    with file.open("rb") as stream:
        stream.seek(end)
        rest = stream.read()
    return b"\n" in rest or (end == 0 and rest[:1] not in (b"", b"{"))


class _JsonLines:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.stream: IO[bytes] | None = None

    def start(self, step: int | None) -> None:
        with _opening(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            end = 0
            if self.file.exists():
                if _is_foreign(self.file):
                    raise ForeignLogError(
                        f"{self.file}: expected records of a run, found something else; nothing was changed; choose "
                        "another folder"
                    )
                if step is None:
                    # of a run that did not come to its first checkpoint, or whose checkpoints are gone
                    self._set_aside()
                else:
                    for position, record in _lines(self.file):
                        if record["step"] > step:
                            break
                        end = position
            # steps never fall within a run, so everything after `end` is later than `step` or half a line
            self.stream = self.file.open("ab")
            self.stream.truncate(end)

    def _set_aside(self) -> None:
        aside, number = self.file.with_name(f"{self.file.name}.old"), 1
        while aside.exists():
            number += 1
            aside = self.file.with_name(f"{self.file.name}.old-{number}")
        self.file.rename(aside)

    def write(self, record: Record) -> None:
        if self.stream is None:
            raise ValueError(f"{self.file}: write before start")
        self.stream.write(json.dumps(_plain(record), allow_nan=False).encode() + b"\n")
        self.stream.flush()

    def flush(self) -> None:
        if self.stream is not None:
            self.stream.flush()
            os.fsync(self.stream.fileno())

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def jsonl_log(file: Path | str) -> Log:
    """Returns a log that appends one JSON object per line, and cuts what a resumed run will write again.

    A run that begins anew moves an older file to ``<name>.old``, or ``<name>.old-2`` and so on.

    Args:
      file: made if need be.

    Raises:
      ForeignLogError: on start, when the file holds something else; it is left as it is.
      NotWritableError: on start, when it cannot be written.

    >>> import pathlib, tempfile
    >>> import rnngrad as rg
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = rg.training.jsonl_log(pathlib.Path(folder) / "records.jsonl")
    ...     log.start(None)
    ...     log.write({"kind": "train", "step": 10, "loss": 0.5})
    ...     log.close()
    ...     rg.training.read_jsonl(pathlib.Path(folder) / "records.jsonl")
    [{'kind': 'train', 'step': 10, 'loss': 0.5}]
    """
    return _JsonLines(Path(file))


def read_jsonl(file: Path | str) -> list[dict[str, Any]]:
    r"""Returns all records of a JSON-lines log in order; half a line at the end, left by a kill, is not one.

    >>> import pathlib, tempfile
    >>> import rnngrad as rg
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "records.jsonl"
    ...     _ = file.write_text('{"kind": "train", "step": 10}\n{"kind": "tr')
    ...     rg.training.read_jsonl(file)
    [{'kind': 'train', 'step': 10}]
    """
    return [record for _, record in _lines(Path(file))]


# Lags of a curve that a dashboard shows as numbers; the whole curve stands in the JSON lines.
_SHOWN_LAGS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def scalars(record: Record) -> dict[str, float]:
    """Returns the finite numbers of a record under the names a dashboard shows; of curves, chosen lags.

    Layers count from 1, the one nearest to the input, unless the record names them.

    >>> from rnngrad.training.logs import scalars
    >>> scalars({"kind": "flow", "step": 1, "layers": [{"log_retention": [0.0, -0.5], "gate_share": {"f": 0.25}}]})
    {'flow/layer_1/log_retention/lag_1': -0.5, 'flow/layer_1/gate_share/f': 0.25}
    """
    found: dict[str, float] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                collect(f"{name}/{key}", inner)
        elif isinstance(value, list | tuple):
            for lag in _SHOWN_LAGS:
                if lag < len(value):
                    collect(f"{name}/lag_{lag}", value[lag])
        elif isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)

    for key, value in record.items():
        if key == "layers":
            for number, layer in enumerate(value, start=1):
                collect(f"{record['kind']}/{layer.get('name') or f'layer_{number}'}", layer)
        elif key not in ("kind", "step"):
            collect(f"{record['kind']}/{key}", value)
    return found


def _optional_module(name: str, *, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"this log needs the package {name}, which is not installed: pip install {install}") from error


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = _optional_module("tensorboardX", install="'rnngrad[experiments]'")
        self.writer: Any = None

    def start(self, step: int | None) -> None:
        first = 0 if step is None else step + 1
        with _opening(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # events from purge_step on that lie in the folder are hidden; files are named by the second, so that
            # without a suffix a second start within it would write over the first one's, and are read in name order
            self.writer = self.module.SummaryWriter(
                str(self.folder), purge_step=first, filename_suffix=f".{first:012d}"
            )

    def write(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def tensorboard_log(folder: Path | str) -> Log:
    """Returns a log that writes TensorBoard events.

    A resumed run hides the events beyond the step it resumes from.

    Args:
      folder: made if need be; one run each.

    Raises:
      ValueError: tensorboardX is not installed; names the extra.
      NotWritableError: on start, when the folder cannot be made or written to.

    >>> import pathlib
    >>> import rnngrad as rg
    >>> isinstance(rg.training.tensorboard_log(pathlib.Path("runs")), rg.training.Log)
    True
    """
    return _TensorBoard(Path(folder))


class _WandB:
    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        self.module = _optional_module("wandb", install="wandb")
        self.folder, self.project, self.name, self.config = folder, project, name, dict(config)
        self.run: Any = None
        self.is_guest = False

    def start(self, step: int | None) -> None:
        self.is_guest = getattr(self.module, "run", None) is not None
        if self.is_guest:
            self.run = self.module.run
            return
        with _opening(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.run = self.module.init(
            project=self.project,
            name=self.name,
            config=self.config,
            dir=str(self.folder),
            # without an account or a network, unless the environment asks for more; `wandb sync` sends it later
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def write(self, record: Record) -> None:
        self.run.log(scalars(record), step=record["step"])

    def flush(self) -> None:
        """Nothing to do: its own process writes."""

    def close(self) -> None:
        if self.run is not None and not self.is_guest:
            self.run.finish()
        self.run = None


def wandb_log(folder: Path | str, *, project: str, name: str, config: Mapping[str, Any]) -> Log:
    """Returns a log for Weights & Biases, offline unless the environment variable WANDB_MODE says otherwise.

    A resumed run is a new run there, from the step it resumes from.  A run that is open already takes the records, and
    stays open; give its own calls of ``log`` the same ``step``.

    Args:
      folder: where its files go.
      project: project that the run is listed under.
      name: name of the run.
      config: settings to show beside it.

    Raises:
      ValueError: wandb is not installed.
      NotWritableError: on start, when the folder cannot be made.
    """
    return _WandB(Path(folder), project, name, config)
