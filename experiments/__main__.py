"""All claims: their verdicts, and the commands that try them again.

python -m experiments                 every claim with its last verdict
python -m experiments all             try them all, go on where an interrupted run stopped, write report.html
python -m experiments report          write report.html from the results that are there
python -m experiments map             bring experiments/README.md up to date with the stored results
python -m experiments.NAME --help     one experiment

"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import rich.console
import rich.markup
import rich.table
import tyro

from experiments import claim_map, cluster, command, registry, report, results
from experiments.claim_map import STORED
from experiments.command import UserError
from experiments.reproduction import SOUND, Standing, reproduce, standing

_ABOUT = """Every claim with its verdict (list, also without any word), and what tries them again (all).

One experiment alone: python -m experiments.NAME --help"""


def _chosen(only: tuple[str, ...]) -> tuple[str, ...]:
    """The experiments asked for, by module or by claim."""
    if not only:
        return registry.NAMES
    of_claim = {claim.id: at.name for at in registry.experiments() for claim in at.claims}
    names = [of_claim.get(word, word) for word in only]
    with command.user_input():
        registry.experiments(names)  # raises for unknown ones
    return tuple(dict.fromkeys(names))


def _folder(path: Path) -> Path:
    """A folder that should hold results."""
    if not path.is_dir():
        raise UserError(f"--results: expected a folder with results, found no folder {path}")
    return path


def _standings(names: Sequence[str], folder: Path, *, smoke: bool = False) -> list[Standing]:
    return [standing(experiment, folder, smoke=smoke) for experiment in registry.experiments(names)]


_STYLES = {"holds": "green", "holds only if": "yellow", "does not hold": "red", "not decided": "dim"}


def _verdict_table(standings: Sequence[Standing]) -> rich.table.Table:
    """Every claim with its verdict."""
    table = rich.table.Table(
        "claim", "as it circulates", "verdict", "experiment", "s", title="Claims", title_justify="left", show_lines=True
    )
    for row in report.rows(standings):
        at = next(at for at in standings if at.experiment.name == row.experiment)
        seconds = "" if at.dataset is None else f"{float(at.dataset.attrs['seconds']):.0f}"
        word = "no verdict" if row.verdict is None else row.verdict.word
        shown = f"[{_STYLES.get(word, 'dim')}]{word}[/]"
        if row.note:
            shown += rich.markup.escape(f" ({row.note})")
        table.add_row(row.claim.id, row.claim.statement, shown, row.experiment, seconds)
    return table


@dataclasses.dataclass(frozen=True)
class List:
    """Show every claim with the verdict of its last result."""

    results: Path = STORED
    """Folder with results; by default those stored in the repository."""

    def execute(self, screen: rich.console.Console) -> int:
        screen.print(_verdict_table(_standings(registry.NAMES, _folder(self.results))))
        screen.print("one of them: python -m experiments.NAME --help; all: python -m experiments all", highlight=False)
        return 0


@dataclasses.dataclass(frozen=True)
class All:
    """Try every claim; what is done is not done again, what crashes is reported and the rest goes on."""

    out: Path | None = None
    """Folder for results, figures, logs and report.html; by default out/reproduce, with --smoke out/smoke."""
    smoke: bool = False
    """Small sizes, three minutes in all: everything runs, no statement about any claim."""
    only: tuple[str, ...] = ()
    """Experiments, or claims, instead of all."""
    jobs: int | None = None
    """Experiments at a time.  Default: 2 where there are two cores, since small networks keep one busy and no more."""
    processes: Annotated[cluster.Processes, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=cluster.Processes
    )

    def execute(self, screen: rich.console.Console) -> int:
        names = _chosen(self.only)
        with command.user_input():
            cluster.check(self.processes)
        jobs = min(2, os.cpu_count() or 1) if self.jobs is None else self.jobs
        if jobs < 1:
            raise UserError(f"--jobs: expected at least 1, found {jobs}")
        folder = self.out or Path("out") / ("smoke" if self.smoke else "reproduce")
        command.meet(self.processes, screen)
        done = reproduce(names, folder, smoke=self.smoke, jobs=jobs, screen=screen)
        # the report is about all claims: those not asked for now may have been done before
        others = [name for name in registry.NAMES if name not in names]
        everything = [*done.standings, *_standings(others, folder, smoke=self.smoke)]
        words = ["all", *(["--smoke"] if self.smoke else []), *(["--only", *self.only] if self.only else [])]
        _write_report(everything, folder / "report.html", words=" ".join(words), smoke=self.smoke)
        screen.print(_verdict_table(done.standings))
        screen.print(f"wrote {folder / 'report.html'}", soft_wrap=True, highlight=False)
        if done.interrupted:
            print("interrupted: finished experiments and parts are kept, the same command resumes", file=sys.stderr)
            return 130
        crashed = [at.experiment.name for at in done.standings if at.state not in SOUND]
        if crashed:
            print(f"error: no result of {', '.join(crashed)}; see the logs in {folder / 'logs'}", file=sys.stderr)
        return 1 if crashed else 0


def _write_report(standings: Sequence[Standing], file: Path, *, words: str, smoke: bool = False) -> None:
    # smoke sizes are not to be compared with anything
    stored = None if smoke else {at.experiment.name: at for at in _standings(registry.NAMES, STORED)}
    page = report.render(standings, command=f"python -m experiments {words}", smoke=smoke, stored=stored)
    report.write(page, file)


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the report from the results of a folder, however many there are."""

    results: Path = STORED
    """Folder with results; by default those stored in the repository."""
    out: Path = Path("out") / "report.html"
    """The page."""
    smoke: bool = False
    """The results are those of a smoke run."""

    def execute(self, screen: rich.console.Console) -> int:
        _folder(self.results)
        if self.out.is_dir():
            raise UserError(f"--out: expected the name of a page, found the folder {self.out}")
        results.writable_folder(self.out.parent)
        standings = _standings(registry.NAMES, self.results, smoke=self.smoke)
        if self.results.resolve() == STORED.resolve():
            page = report.render(standings, command="python -m experiments report")
            report.write(page, self.out)
        else:
            _write_report(standings, self.out, words=f"report --results {self.results}", smoke=self.smoke)
        screen.print(f"wrote {self.out}", soft_wrap=True, highlight=False)
        return 0


@dataclasses.dataclass(frozen=True)
class Map:
    """Bring what the README files say of the claims up to date with the stored results."""

    def execute(self, screen: rich.console.Console) -> int:
        claim_map.write(_standings(registry.NAMES, STORED))
        screen.print("wrote experiments/README.md and README.md", highlight=False)
        return 0


Commands = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[All, tyro.conf.subcommand("all")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Map, tyro.conf.subcommand("map")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 1 where a claim crashed, 130 after an interruption."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["list"]
    chosen = tyro.cli(
        Commands,
        args=words,
        prog="python -m experiments",
        description=_ABOUT,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    execute: Callable[[rich.console.Console], int] = chosen.execute
    try:
        return execute(command.console())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except UserError as error:
        command.fail(error, code=2)
    except OSError as error:
        command.fail(error, code=2 if isinstance(error, FileNotFoundError | results.NotWritableError) else 1)


if __name__ == "__main__":
    sys.exit(main())
