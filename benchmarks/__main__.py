"""Runs the benchmarks or shows stored ones: a table in the terminal, a figure, JSON with device and versions."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import traceback
import types
from pathlib import Path
from typing import Literal, get_args

import rich.console
import tyro

from benchmarks import harness, report
from experiments import command, results

Name = Literal[
    "chain_against_alternatives",
    "chain_against_matmul",
    "chain_against_torch",
    "cost_scaling",
    "first_diagnosis",
    "logscaled_against_plain",
    "million_steps",
    "monitor_overhead",
    "parallel_in_time",
    "probes_against_bptt",
    "spectrum_against_chain",
    "spectrum_against_torch",
    "sweep_processes",
    "training_step",
    "training_step_against_torch",
]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclasses.dataclass(frozen=True)
class Config:
    """Times rnngrad against what a user would use instead, and against the machine's matrix-product rate.

    Ratios are medians of paired repeats in one run; equality of the results is asserted before anything is timed.  A
    benchmark that fails is named, and the others go on; the exit code is then 1.
    """

    names: tuple[Name, ...] = NAMES
    """Benchmarks to run."""
    smoke: bool = False
    """Tiny sizes: shows that everything runs, says nothing about speed."""
    out: Path = Path("out/benchmarks")
    """Folder for the JSON files, one per benchmark, and benchmarks.png, which shows all that are there."""
    show: Path | None = None
    """Show the stored results of this folder instead of running: the table, and the figure drawn again in it."""
    write_readme: bool = False
    """Write the table of benchmarks/README.md from benchmarks/results instead of running."""


def missing_package(benchmark: types.ModuleType) -> str | None:
    """Returns the package beside the project's own that a benchmark needs and does not find; None when it can run."""
    needed = getattr(benchmark, "REQUIRES", None)
    return needed if needed and importlib.util.find_spec(needed) is None else None


def draw(folder: Path, screen: rich.console.Console) -> None:
    """Writes the figure of everything stored in a folder into it."""
    with results.whole_file(folder / "benchmarks.png") as temporary:
        report.figure(report.read(folder)).savefig(temporary, dpi=150)
    screen.print(f"wrote {folder / 'benchmarks.png'}", soft_wrap=True, highlight=False)


def measure(config: Config, screen: rich.console.Console) -> tuple[list[report.Stored], dict[str, str]]:
    """Runs what was asked for, writes one file per benchmark, and returns the finished ones and why others failed."""
    machine = harness.machine()
    finished: list[report.Stored] = []
    failed: dict[str, str] = {}
    with command.progress(screen) as bar:
        task = bar.add_task("", total=len(config.names))
        for name in config.names:
            bar.update(task, description=name)
            benchmark = importlib.import_module(f"benchmarks.{name}")
            if missing := missing_package(benchmark):
                screen.print(f"left out: {name} needs {missing}, see its docstring")
                bar.advance(task)
                continue
            try:
                rows = benchmark.run(smoke=config.smoke)
            except Exception as error:  # a wrong result or a crash of one benchmark is no reason to lose the others
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                with results.whole_file(config.out / f"{name}.json") as temporary:
                    temporary.write_text(report.to_json(config.smoke, machine, rows), encoding="utf-8")
                finished.append(report.Stored(name, config.smoke, machine, tuple(rows)))
            bar.advance(task)
    return finished, failed


def main(config: Config) -> None:
    """Runs, or shows what is stored; user errors end the program with code 2, failed benchmarks with 1."""
    screen = command.console()
    try:
        if config.write_readme:
            readme = report.with_table(report.README.read_text(encoding="utf-8"), report.readme_tables())
            with results.whole_file(report.README) as temporary:
                temporary.write_text(readme, encoding="utf-8")
            screen.print(f"wrote the table of {report.README.parent.name}/{report.README.name}", highlight=False)
            return
        if config.show is not None:
            screen.print(report.table(report.read(config.show)))
            draw(config.show, screen)
            return
        results.writable_folder(config.out)
        finished, failed = measure(config, screen)
        if finished:
            screen.print(report.table(finished))
            screen.print(f"wrote {config.out}/*.json", soft_wrap=True, highlight=False)
            draw(config.out, screen)
    except KeyboardInterrupt:
        print("\ninterrupted: the files of finished benchmarks are kept", file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        command.fail(error)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config, args=sys.argv[1:], prog="python -m benchmarks"))
