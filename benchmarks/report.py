"""What a person sees of stored benchmarks: a table, a figure, the rows of a README.  Nothing here measures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import rich.table

from benchmarks.harness import Row, limit

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent / "README.md"
BEGIN = "<!-- benchmarks: written by python -m benchmarks --write-readme -->"
END = "<!-- benchmarks: end -->"


class Stored(NamedTuple):
    """One benchmark as its file holds it."""

    name: str
    smoke: bool
    machine: dict[str, Any]
    rows: tuple[Row, ...]


def to_json(smoke: bool, machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Returns the text of a benchmark's file."""
    stored = {"smoke": smoke, "machine": machine, "rows": [row._asdict() for row in rows]}
    return json.dumps(stored, indent=1, ensure_ascii=False) + "\n"


def read(folder: Path) -> list[Stored]:
    """Returns the benchmarks stored in a folder, by name.

    Raises:
      ValueError: there are none, or a file is not one.
    """
    stored = []
    for file in sorted(folder.glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            rows = tuple(Row(**{**row, "spread": tuple(row["spread"])}) for row in found["rows"])
            stored.append(Stored(file.stem, found["smoke"], found["machine"], rows))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}: expected a file written by python -m benchmarks, found {error!r}") from error
    if not stored:
        raise ValueError(f"{folder}: expected benchmark results (*.json), found none")
    return stored


def machine_line(machine: dict[str, Any]) -> str:
    """Returns a machine in a few words."""
    return f"{machine['device']}, {machine['cores']} cores, {machine['platform']}, jax {machine['versions']['jax']}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


_ANSWERS = {True: "yes", False: "[bold]no[/bold]", None: "—"}


def table(stored: Sequence[Stored]) -> rich.table.Table:
    """Returns all rows; where they come from more than one machine, each says from which."""
    machines = {machine_line(one.machine): None for one in stored}
    several = len(machines) > 1
    columns = ["benchmark", "what", "median", "range", "should be", "holds", *(["machine"] if several else [])]
    title = "; ".join(machines) + (" (smoke sizes: no statement about speed)" if any(s.smoke for s in stored) else "")
    shown = rich.table.Table(*columns, title=title, title_justify="left")
    for one in stored:
        for row in one.rows:
            low, high = map(_number, row.spread)
            cells = [row.benchmark, row.what, _number(row.value), f"{low} – {high}", row.bound, _ANSWERS[row.holds]]
            shown.add_row(*cells, *([machine_line(one.machine)] if several else []))
    return shown


def against_bound(row: Row) -> tuple[float, float, float]:
    """Returns low, median and high in units of the bound, turned so that below 1 is kept; without one as they are."""
    found = limit(row.bound)
    # an exponent may be zero or less where fixed costs dominate; a log axis has no place for it
    low, value, high = (max(number, 1e-3) for number in (row.spread[0], row.value, row.spread[1]))
    if found is None:
        return low, value, high
    side, number = found
    return (
        (low / number, value / number, high / number) if side == "≤" else (number / high, number / value, number / low)
    )


_COLOURS = {True: "#2a7f62", False: "#c0392b", None: "#8a8a8a"}
_MARKERS = {True: "o", False: "X", None: "D"}
_LABELS = {True: "bound kept", False: "bound missed", None: "no bound: the ratio itself"}


def figure(stored: Sequence[Stored]) -> matplotlib.figure.Figure:
    """Returns every row's median and range in units of its bound, by benchmark; misses are marked."""
    num_lines = sum(len(one.rows) + 1 for one in stored)
    drawn = matplotlib.figure.Figure(figsize=(15, 1.2 + 0.23 * num_lines), layout="constrained")
    axes = drawn.add_subplot()
    ticks, labels, seen = [], [], set()
    height = 0
    widest = max(abs(math.log10(end)) for one in stored for row in one.rows for end in against_bound(row))
    reach = 10 ** (min(widest, 3) + 0.1)
    for one in stored:
        machine = (
            "" if len({machine_line(each.machine) for each in stored}) == 1 else f"  ({machine_line(one.machine)})"
        )
        axes.text(
            0, -height, one.name + machine, transform=axes.get_yaxis_transform(), weight="bold", va="center", fontsize=9
        )
        height += 1
        for row in one.rows:
            low, value, high = against_bound(row)
            colour = _COLOURS[row.holds]
            axes.plot([low, high], [-height, -height], color=colour, linewidth=2, alpha=0.5, solid_capstyle="round")
            label = None if row.holds in seen else _LABELS[row.holds]
            seen.add(row.holds)
            shown = min(max(value, 1 / reach), reach)
            axes.scatter([shown], [-height], marker=_MARKERS[row.holds], color=colour, s=36, label=label, zorder=2)
            told = f"{_number(row.value)}  ({row.bound})"
            axes.text(1.005, -height, told, transform=axes.get_yaxis_transform(), color=colour, va="center", fontsize=8)
            ticks.append(-height)
            labels.append(row.what)
            height += 1
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(1 / reach, reach)
    axes.set_ylim(-height + 0.4, 1.5)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_xlabel("in units of the bound: left of the line is kept, right of it missed (for ≥ turned round)")
    smoke = "  (smoke sizes: no statement about speed)" if any(one.smoke for one in stored) else ""
    axes.text(1.005, 1, "median  (bound)", transform=axes.get_yaxis_transform(), weight="bold", va="center", fontsize=8)
    axes.xaxis.set_major_formatter("{x:g}")
    title = "Medians and ranges of paired repeats: "
    axes.set_title(
        title + "; ".join({machine_line(one.machine): None for one in stored}) + smoke, loc="left", fontsize=10
    )
    drawn.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return drawn


def readme_lines(stored: Sequence[Stored]) -> list[str]:
    """Returns the README's table: the rows that are held to a bound."""
    lines = [f"On {'; '.join({machine_line(one.machine): None for one in stored})}, float32:", ""]
    lines += ["| what | median | range | should be | holds |", "|---|---:|---:|---:|---|"]
    for one in stored:
        for row in one.rows:
            if limit(row.bound) is not None:
                low, high = map(_number, row.spread)
                holds = "yes" if row.holds else "**no**"
                lines.append(f"| {row.what} | {_number(row.value)} | {low} – {high} | {row.bound} | {holds} |")
    return lines


def with_table(readme: str, lines: Sequence[str]) -> str:
    """Returns the README with the table between its markers replaced.

    Raises:
      ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README: expected the lines {BEGIN.strip()!r} and {END.strip()!r} once each")
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def readme_tables() -> list[str]:
    """Returns the tables of the stored results: this folder's, then one for each folder in it, by device."""
    folders = [RESULTS, *sorted(folder for folder in RESULTS.iterdir() if folder.is_dir())]
    lines: list[str] = []
    for folder in folders:
        lines += ([""] if lines else []) + readme_lines(read(folder))
    return lines
