"""What the command lines of all experiments share: one-line errors, measuring in parts, tables, pictures, results."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import matplotlib.figure
import rich.console
import rich.progress
import rich.table
import tyro
import xarray as xr

import rnngrad as rg
from experiments import results
from experiments.claims import Check, Claim, Verdict, judge
from experiments.results import NotWritableError
from experiments.statistics import CONFIDENCE


class UserError(ValueError):
    """A setting, text or file that the user can put right; shown in one line."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Marks ValueErrors raised inside as the user's to put right; others keep their traceback."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def console() -> rich.console.Console:
    """Returns a console wide enough for the tables also where the output is not a terminal."""
    plain = rich.console.Console()
    return plain if plain.is_terminal else rich.console.Console(width=130)


def progress(target: rich.console.Console) -> rich.progress.Progress:
    """Returns the progress bar that long work shows."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=target,
        transient=True,
    )


def fail(error: BaseException, code: int = 2) -> NoReturn:
    """Ends the program with one line that says what is wrong."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(code)


def check_at_least(config: Any, least: Mapping[str, int]) -> None:
    """Raises UserError for a whole number below its least value; one that is None is left out."""
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {lowest}, found {value}")


class Piece(NamedTuple):
    """A piece of a run: measured on its own, kept, and not measured again when an interrupted run resumes."""

    name: str
    """Of its file, unique in the run."""
    label: str
    """What the progress bar says."""
    measure: Callable[[], xr.Dataset]


def measure(
    pieces: Sequence[Piece], *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> list[xr.Dataset]:
    """Returns the datasets of all pieces, in order; those already in ``parts`` are read from there.

    Shows a progress bar; where the output is no terminal, a line per piece, ``[done/all] label``.

    Raises:
      OSError: a piece cannot be written.
    """
    screen = screen or rich.console.Console(quiet=True)
    measured, resumed = [], 0
    with progress(screen) as bar:
        task = bar.add_task("measuring", total=len(pieces))
        for done, piece in enumerate(pieces):
            bar.update(task, description=piece.label)
            if not screen.is_terminal:
                screen.print(f"[{done}/{len(pieces)}] {piece.label}", markup=False, highlight=False, soft_wrap=True)
            if parts is None:
                part = piece.measure()
            else:
                part, was_there = parts.get(piece.name, piece.measure)
                resumed += was_there
            measured.append(part.drop_attrs(deep=False))
            bar.advance(task)
    if resumed:
        screen.print(f"resumed: {resumed} of {len(pieces)} parts were already measured")
    return measured


_ANSWERS = {True: "yes", False: "[bold]no[/bold]", None: "cannot tell"}


def check_table(checks: Sequence[Check]) -> rich.table.Table:
    """Returns the checks as a table; those that decide the verdict are marked."""
    table = rich.table.Table(
        "claim", "check", "found", "expected", "holds", title="Checks", title_justify="left", caption_justify="left",
        caption="without a claim: a prediction or side condition, which decides nothing",
    )  # fmt: skip
    for check in checks:
        claim = check.claim if check.decides else ""
        table.add_row(claim, check.name, check.value, check.bound, _ANSWERS[check.holds])
    return table


def config_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain values, paths as text."""
    return {
        field.name: str(value) if isinstance(value := getattr(config, field.name), Path) else value
        for field in dataclasses.fields(config)
    }


def flags(config: Any, *, leave_out: Sequence[str] = ()) -> str:
    """Returns the command-line flags that turn the default configuration into ``config``."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in leave_out or value == field.default:
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


class Picture(NamedTuple):
    """A figure drawn from a stored dataset."""

    name: str
    """Ending of its file name; empty for the main figure, ``<experiment>.png``."""
    caption: str
    """What a reader sees on it, in a sentence or two; stands for it where it cannot be seen."""
    draw: Callable[[xr.Dataset], matplotlib.figure.Figure]


class Experiment(NamedTuple):
    """What an experiment module hands to :func:`main` and to the reproduction."""

    name: str
    about: str
    """What ``--help`` says: the question in one line, then what is measured and shown."""
    claims: tuple[Claim, ...]
    default: Any
    """The configuration of the full run."""
    smoke: Any
    """One of a few seconds: every code path, no statement about the claims."""
    run: Callable[..., xr.Dataset]
    """run(config, parts=…, screen=…) -> dataset"""
    table: Callable[[xr.Dataset], rich.table.Table]
    verdict: Callable[[xr.Dataset], list[Check]]
    summary: Callable[[xr.Dataset], dict[str, str]]
    """The finding on each claim, by its id, in a sentence."""
    pictures: tuple[Picture, ...]
    """The main figure first."""

    def picture_files(self, folder: Path) -> list[Path]:
        """Returns where the pictures go."""
        return [folder / f"{'-'.join(filter(None, (self.name, picture.name)))}.png" for picture in self.pictures]

    def verdicts(self, dataset: xr.Dataset) -> list[Verdict]:
        """Returns the verdict on every claim, recomputed from the dataset."""
        return judge(self.claims, self.verdict(dataset), self.summary(dataset))


def provenance(name: str, config: Any, *, seconds: float, dtype: Any = "float32", **facts: Any) -> dict[str, Any]:
    """Returns the attributes of an experiment's dataset: :func:`results.provenance` of its configuration and dtype.

    A field ``data_dir`` is left out of command and configuration, since it is a place on one machine.
    """
    places = [field.name for field in dataclasses.fields(config) if field.name == "data_dir"]
    certificate = rg.certificate(dtype)
    return results.provenance(
        experiment=name,
        command=f"python -m experiments.{name} {flags(config, leave_out=places)}".strip(),
        config={key: value for key, value in config_dict(config).items() if key not in places},
        dtype=certificate.dtype,
        matmul_precision=certificate.matmul_precision,
        confidence=CONFIDENCE,
        seconds=round(seconds, 1),
        **facts,
    )


def execute(experiment: Experiment, config: Any, *, out: Path, show: Path | None) -> None:
    """Runs an experiment, or shows a stored one: table and verdict in the terminal, figure and netCDF in ``out``.

    User errors end the program with one line and exit code 2, a failed write with 1, an interruption with 130.
    """
    started = time.perf_counter()
    screen = console()
    picture_files, result_file = experiment.picture_files(out), out / f"{experiment.name}.nc"
    parts = results.Parts(out, experiment=experiment.name, config=config_dict(config))
    try:
        results.writable_folder(out)
        if show is not None:
            with user_input():
                dataset = results.load(show, experiment=experiment.name)
        else:
            dataset = experiment.run(config, parts=parts, screen=screen)
            results.save(dataset, result_file)
        screen.print(experiment.table(dataset))
        screen.print(check_table(experiment.verdict(dataset)))
        for verdict in experiment.verdicts(dataset):
            screen.print(str(verdict), markup=False, highlight=False, soft_wrap=True)
        for picture, file in zip(experiment.pictures, picture_files, strict=True):
            with results.whole_file(file) as temporary:
                picture.draw(dataset).savefig(temporary, dpi=150)
        parts.discard()
    except KeyboardInterrupt:
        print("\ninterrupted: finished parts are kept, the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        fail(error, code=2)
    except OSError as error:
        fail(error, code=2 if isinstance(error, FileNotFoundError | NotWritableError) else 1)
    written = picture_files if show is not None else [result_file, *picture_files]
    seconds = time.perf_counter() - started
    screen.print(f"wrote {' and '.join(map(str, written))} after {seconds:.0f} s", soft_wrap=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment takes beside its settings."""

    out: Path
    """Folder for the figure and the result file."""
    smoke: bool = False
    """Small defaults that finish in seconds; other flags still apply."""
    show: Path | None = None
    """Show a stored result file instead of running: the table, the verdict, and the figure drawn again."""


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line of an experiment."""
    words = sys.argv[1:] if arguments is None else arguments
    chosen = experiment.smoke if "--smoke" in words else experiment.default
    flat = tyro.conf.arg(name="")
    whole = dataclasses.make_dataclass(
        "Command",
        [("config", Annotated[type(chosen), flat]), ("options", Annotated[Options, flat])],
        namespace={"__doc__": experiment.about},
    )
    given = tyro.cli(
        whole,
        args=words,
        default=whole(chosen, Options(out=Path("out") / experiment.name)),
        prog=f"python -m experiments.{experiment.name}",
        description=experiment.about,
    )
    execute(experiment, given.config, out=given.options.out, show=given.options.show)
