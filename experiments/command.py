"""What the command lines of all experiments share: one-line errors, measuring in parts, tables, pictures, results."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import jax
import matplotlib.figure
import rich.console
import rich.progress
import rich.table
import tyro
import xarray as xr

import rnngrad as rg
from experiments import cluster, results
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


def keep_compiled() -> None:
    """Keeps compiled programs for later runs: where JAX is told to, else in the user's cache if it can be written to.

    Compiling is half of a short run's time, and a program read back is the same to the last bit.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.config.values["jax_enable_compilation_cache"]:
        folder = rg.tasks.cache_folder() / "compiled"
        with contextlib.suppress(NotWritableError):  # then every run compiles
            jax.config.update("jax_compilation_cache_dir", str(results.writable_folder(folder)))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def meet(processes: cluster.Processes, screen: rich.console.Console) -> None:
    """Waits for the other processes, and says so if not all of them came (:func:`experiments.cluster.meet`)."""
    with user_input():
        alone = cluster.meet(processes)
    if alone:
        screen.print(alone, soft_wrap=True, highlight=False)


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

    What another process is measuring is left to it, and measured here if that process should end before it is done.
    Shows a progress bar; where the output is no terminal, a line per piece, ``[done/all] label``.

    Raises:
      OSError: a piece cannot be written.
    """
    screen = screen or rich.console.Console(quiet=True)
    measured: dict[str, xr.Dataset] = {}
    found = 0
    with progress(screen) as bar:
        task = bar.add_task("measuring", total=len(pieces))

        def say(label: str) -> None:
            bar.update(task, description=label)
            if not screen.is_terminal:
                said = f"[{len(measured)}/{len(pieces)}] {label}"
                screen.print(said, markup=False, highlight=False, soft_wrap=True)

        def make(piece: Piece) -> xr.Dataset:
            say(piece.label)
            return piece.measure()

        is_waiting = False
        while len(measured) < len(pieces):
            before = len(measured)
            for piece in [piece for piece in pieces if piece.name not in measured]:
                own = functools.partial(make, piece)
                got = (own(), False) if parts is None else parts.get(piece.name, own)
                if got is None:
                    continue
                part, was_there = got
                measured[piece.name] = part.drop_attrs(deep=False)
                found += was_there
                bar.advance(task)
            if len(measured) == before:
                if not is_waiting:
                    missing = [piece.label for piece in pieces if piece.name not in measured]
                    say(f"waiting for other processes, which measure {'; '.join(missing[:3])}")
                is_waiting = True
                time.sleep(_LOOK_AGAIN)
    if found:
        screen.print(f"{found} of {len(pieces)} parts were there already, or came from other processes")
    return [measured[piece.name] for piece in pieces]


_LOOK_AGAIN = 0.2
"""Seconds between two looks at what other processes have finished."""

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


def is_of(dataset: xr.Dataset, config: Any) -> bool:
    """Returns whether a stored result was made with these settings; a place on a machine is none."""
    wanted = {name: value for name, value in config_dict(config).items() if name != "data_dir"}
    found = json.loads(dataset.attrs["config"])
    return {name: value for name, value in found.items() if name != "data_dir"} == json.loads(json.dumps(wanted))


def _finished(experiment: Experiment, config: Any, file: Path) -> xr.Dataset | None:
    """Returns the result in a file if these sources made it with these settings."""
    try:
        dataset = results.load(file, experiment=experiment.name)
    except (FileNotFoundError, ValueError):
        return None
    is_new = dataset.attrs["source_digest"] == results.source_digest(experiment.name)
    return dataset if is_new and is_of(dataset, config) else None


def execute(experiment: Experiment, config: Any, options: Options) -> None:
    """Runs an experiment, or shows a stored one: table and verdict in the terminal, figure and netCDF in ``out``.

    User errors end the program with one line and exit code 2, a failed write with 1, an interruption with 130.
    """
    started = time.perf_counter()
    screen = console()
    try:
        results.writable_folder(options.out)
        if options.show is not None:
            with user_input():
                dataset = results.load(options.show, experiment=experiment.name)
            written = _show(experiment, dataset, options.out, screen)
        else:
            written = _run(experiment, config, options, screen)
    except KeyboardInterrupt:
        print("\ninterrupted: finished parts are kept, the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        fail(error, code=2)
    except OSError as error:
        fail(error, code=2 if isinstance(error, FileNotFoundError | NotWritableError) else 1)
    files = " and ".join(map(str, written))
    what = f"wrote {files}" if written else f"the result in {options.out} was written by another process"
    screen.print(f"{what} after {time.perf_counter() - started:.0f} s", soft_wrap=True, highlight=False)


def _run(experiment: Experiment, config: Any, options: Options, screen: rich.console.Console) -> list[Path]:
    """Measures, alone or with other processes; returns the files that this one wrote."""
    file = options.out / f"{experiment.name}.nc"
    meet(options.processes, screen)
    parts = results.Parts(options.out, experiment=experiment.name, config=config_dict(config))
    # one of several may have been started anew after the others had finished
    unless_done = options.unless_done or options.processes.coordinator is not None
    with parts.membership():
        there = _finished(experiment, config, file) if unless_done else None
        if there is not None:
            screen.print(f"{file}: done before with these settings and sources", soft_wrap=True, highlight=False)
            return _show(experiment, there, options.out, screen)
        dataset = experiment.run(config, parts=parts, screen=screen)
        with parts.writing() as is_first:
            if is_first:
                results.save(dataset, file)
                return [file, *_show(experiment, dataset, options.out, screen)]
        _show(experiment, dataset, None, screen)
        return []


def _show(experiment: Experiment, dataset: xr.Dataset, folder: Path | None, screen: rich.console.Console) -> list[Path]:
    """Prints table and verdict, and draws the figures into a folder; returns their files."""
    screen.print(experiment.table(dataset))
    checks = experiment.verdict(dataset)
    if checks:
        screen.print(check_table(checks))
    for verdict in experiment.verdicts(dataset):
        screen.print(str(verdict), markup=False, highlight=False, soft_wrap=True)
    if folder is None:
        return []
    files = experiment.picture_files(folder)
    for picture, file in zip(experiment.pictures, files, strict=True):
        with results.whole_file(file) as temporary:
            picture.draw(dataset).savefig(temporary, dpi=150)
    return files


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment takes beside its settings."""

    out: Path
    """Folder for the figure and the result file."""
    smoke: bool = False
    """Small defaults that finish in seconds; other flags still apply."""
    show: Path | None = None
    """Show a stored result file instead of running: the table, the verdict, and the figure drawn again."""
    unless_done: bool = False
    """Run only if the folder holds no result of these settings and sources yet; so with --coordinator."""
    processes: Annotated[cluster.Processes, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=cluster.Processes
    )


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line of an experiment."""
    words = sys.argv[1:] if arguments is None else arguments
    keep_compiled()
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
    execute(experiment, given.config, given.options)
