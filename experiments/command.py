"""What every experiment's command line shares: one-line errors, tables, progress, saving, showing stored results."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import matplotlib.figure
import rich.console
import rich.progress
import rich.table
import tyro
import xarray as xr

from experiments import results
from experiments.results import NotWritableError


class UserError(ValueError):
    """A setting, text or file that the user can put right; shown in one line."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Marks ValueErrors raised inside as the user's to put right; others keep their traceback."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


class Check(NamedTuple):
    """One line of a verdict."""

    name: str
    value: str
    bound: str
    holds: bool


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


def check_table(checks: Sequence[Check]) -> rich.table.Table:
    """Returns the verdict as a table."""
    table = rich.table.Table("check", "found", "expected", "holds", title="Verdict", title_justify="left")
    for check in checks:
        table.add_row(check.name, check.value, check.bound, "yes" if check.holds else "[bold]no[/bold]")
    return table


def markdown(checks: Sequence[Check]) -> list[str]:
    """Returns the verdict's lines as the claim map prints them."""
    return [f"| {check.name} | {check.value} | {check.bound} | {'yes' if check.holds else 'no'} |" for check in checks]


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


class Experiment(NamedTuple):
    """The functions an experiment module hands to :func:`execute`."""

    name: str
    about: str
    """What ``--help`` says: the question in one line, then what is measured and shown."""
    run: Callable[..., xr.Dataset]
    """run(config, parts=…, screen=…) -> dataset"""
    table: Callable[[xr.Dataset], rich.table.Table]
    verdict: Callable[[xr.Dataset], list[Check]]
    summary: Callable[[xr.Dataset], str]
    figure: Callable[[xr.Dataset], matplotlib.figure.Figure]


def execute(experiment: Experiment, config: Any, *, out: Path, show: Path | None) -> None:
    """Runs an experiment, or shows a stored one: table and verdict in the terminal, figure and netCDF in ``out``.

    User errors end the program with one line and exit code 2, a failed write with 1, an interruption with 130.
    """
    started = time.perf_counter()
    screen = console()
    figure_file, result_file = out / f"{experiment.name}.png", out / f"{experiment.name}.nc"
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
        screen.print(experiment.summary(dataset))
        with results.whole_file(figure_file) as temporary:
            experiment.figure(dataset).savefig(temporary, dpi=150)
        parts.discard()
    except KeyboardInterrupt:
        print("\ninterrupted: finished parts are kept, the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        fail(error, code=2)
    except OSError as error:
        fail(error, code=2 if isinstance(error, FileNotFoundError | NotWritableError) else 1)
    written = [figure_file] if show is not None else [result_file, figure_file]
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


def main(experiment: Experiment, default: Any, smoke: Any, arguments: Sequence[str] | None) -> None:
    """Runs the command line of an experiment; ``default`` and ``smoke`` are two values of its configuration."""
    words = sys.argv[1:] if arguments is None else arguments
    chosen = smoke if "--smoke" in words else default
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
