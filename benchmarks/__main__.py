"""Runs the benchmarks: a table in the terminal, JSON with device and versions in ``--out``."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Literal, get_args

import rich.table
import tyro

from benchmarks import harness
from experiments import command, results

Name = Literal[
    "chain_against_alternatives",
    "chain_against_matmul",
    "first_diagnosis",
    "million_steps",
    "monitor_overhead",
    "parallel_in_time",
    "probes_against_bptt",
    "spectrum_against_chain",
    "spectrum_against_torch",
    "training_step",
    "training_step_against_torch",
]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclasses.dataclass(frozen=True)
class Config:
    """Times rnngrad against what a user would use instead, and against the machine's matrix-product rate.

    Ratios are medians of paired repeats in one run; equality of the results is asserted before anything is timed.
    """

    names: tuple[Name, ...] = NAMES
    """Benchmarks to run."""
    smoke: bool = False
    """Tiny sizes: shows that everything runs, says nothing about speed."""
    out: Path = Path("out/benchmarks")
    """Folder for the JSON files."""


def missing_package(benchmark: types.ModuleType) -> str | None:
    """Returns the package beside the project's own that a benchmark needs and does not find; None when it can run."""
    needed = getattr(benchmark, "REQUIRES", None)
    return needed if needed and importlib.util.find_spec(needed) is None else None


def main(config: Config) -> None:
    """Runs what was asked for, one JSON file per benchmark."""
    screen = command.console()
    try:
        results.writable_folder(config.out)
    except OSError as error:
        command.fail(error)
    machine = harness.machine()
    table = rich.table.Table(
        "benchmark",
        "what",
        "median",
        "range",
        "should be",
        "holds",
        title=f"{machine['device']}, {machine['cores']} cores, jax {machine['versions']['jax']}",
        title_justify="left",
    )
    with command.progress(screen) as bar:
        task = bar.add_task("", total=len(config.names))
        for name in config.names:
            bar.update(task, description=name)
            benchmark = importlib.import_module(f"benchmarks.{name}")
            if missing := missing_package(benchmark):
                screen.print(f"left out: {name} needs {missing}, see its docstring")
                bar.advance(task)
                continue
            rows = benchmark.run(smoke=config.smoke)
            bar.advance(task)
            for row in rows:
                low, high = row.spread
                holds = "yes" if row.holds else "[bold]no[/bold]"
                table.add_row(row.benchmark, row.what, f"{row.value:.2f}", f"{low:.2f} – {high:.2f}", row.bound, holds)
            stored = {"smoke": config.smoke, "machine": machine, "rows": [row._asdict() for row in rows]}
            with results.whole_file(config.out / f"{name}.json") as temporary:
                temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    screen.print(table)
    screen.print(f"wrote {config.out}/*.json", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Config, args=sys.argv[1:], prog="python -m benchmarks"))
