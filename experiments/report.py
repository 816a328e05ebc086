"""The report: one page that stands alone, with the verdicts first and the way from each back to its data.

Everything on it is recomputed from stored results: verdicts, tables, pictures.  The page loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
import datetime
import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import PIL.Image
import rich.table
import rich.text
import xarray as xr

from experiments import registry, results
from experiments.claims import Claim, Verdict
from experiments.command import Experiment, Picture
from experiments.errata import ERRATA
from experiments.reproduction import SOUND, Standing

TEMPLATE = Path(__file__).with_name("report.html.jinja")
DOTS_PER_INCH = 110


class Table(NamedTuple):
    """A table as text, for the page."""

    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str


class Agreement(NamedTuple):
    """How a run compares with the stored one."""

    same_words: dict[str, bool]
    """Whether the verdict is the same, by claim."""
    num_compared: int
    """Medians that were compared."""
    num_outside: int
    """Those outside the tolerance, see :func:`against`."""
    largest: float
    """Largest difference of two medians."""


ABSOLUTE, RELATIVE = 0.02, 0.01
"""What a re-run may differ by beyond the stored interval: chaotic runs (a gain above the transition, training) amplify
the last bit, which another processor or version rounds otherwise."""


def against(now: Standing, stored: Standing) -> Agreement | None:
    """Returns how a result compares with the stored one; None where either is missing or their settings differ.

    A median agrees when it lies in the stored 95 % interval, widened on either side by 1 % of the stored median and by
    0.02, or 0.02 of the largest median of a variable that is below 1 throughout.  Infinite and missing medians must be
    the same.
    """
    a, b = now.dataset, stored.dataset
    if a is None or b is None or a.attrs["config"] != b.attrs["config"]:
        return None
    names = sorted(str(name) for name in b.data_vars if str(name).endswith("_median"))
    compared, outside, largest = 0, 0, 0.0
    for name in names:
        stem = name.removesuffix("_median")
        if name not in a or a[name].shape != b[name].shape:
            compared, outside, largest = compared + b[name].size, outside + b[name].size, float("inf")
            continue
        found, median, low, high = (
            np.asarray(values, float)
            for values in (a[name].values, b[name].values, b[f"{stem}_low"].values, b[f"{stem}_high"].values)
        )
        same = (found == median) | (np.isnan(found) & np.isnan(median))
        finite = np.isfinite(found) & np.isfinite(median)
        # of a variable smaller than 1 throughout, 0.02 of its largest value
        scale = min(1.0, float(np.abs(median[np.isfinite(median)]).max(initial=0.0)))
        margin = np.where(finite, ABSOLUTE * scale + RELATIVE * np.abs(median), 0.0)
        inside = finite & (found >= low - margin) & (found <= high + margin)
        compared += found.size
        outside += int((~(same | inside)).sum())
        if finite.any():
            largest = max(largest, float(np.abs(found[finite] - median[finite]).max()))
    before = {verdict.claim: verdict.word for verdict in stored.verdicts}
    words = {verdict.claim: before.get(verdict.claim) == verdict.word for verdict in now.verdicts}
    return Agreement(words, compared, outside, largest)


def _plain(cell: Any) -> str:
    return rich.text.Text.from_markup(str(cell)).plain


def _table(drawn: rich.table.Table) -> Table:
    """A table for the terminal, for the page."""
    columns = [[_plain(cell) for cell in column.cells] for column in drawn.columns]
    return Table(
        _plain(drawn.title or ""),
        [_plain(column.header) for column in drawn.columns],
        [list(row) for row in zip(*columns, strict=True)],
        _plain(drawn.caption or ""),
    )


def _png(figure: Any) -> str:
    """A picture as text, in 256 colours: a third of the size, and the page goes to phones."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    PIL.Image.open(drawn).convert("RGB").quantize(256).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _numbers(experiment: Experiment, dataset: xr.Dataset) -> Table:
    return _table(experiment.table(dataset))


def _drawn(picture: Picture, dataset: xr.Dataset) -> str:
    return _png(picture.draw(dataset))


class Reason(NamedTuple):
    """Why something is not shown."""

    reason: str


def _or_reason(make: Callable[[], Any]) -> Any:
    """What ``make`` returns, or why it could not: one picture must not take the whole page along."""
    try:
        return make()
    except Exception as error:
        return Reason(f"could not be shown: {type(error).__name__}: {error}")


_PROVENANCE = (
    "created", "seconds", "backend", "device", "platform", "dtype", "matmul_precision", "confidence", "python",
    "rnngrad_version", "source_digest", "text", "text_sha256",
)  # fmt: skip


def _provenance(dataset: xr.Dataset) -> dict[str, str]:
    found = {name.replace("_", " "): str(dataset.attrs[name]) for name in _PROVENANCE if name in dataset.attrs}
    return found | json.loads(dataset.attrs["versions"])


def _section(at: Standing) -> dict[str, Any]:
    """What the template needs of one experiment."""
    section: dict[str, Any] = {
        "name": at.experiment.name,
        "about": at.experiment.about.splitlines()[0],
        "claims": at.experiment.claims,
        "state": at.state,
        "reason": at.reason,
    }
    if at.dataset is None:
        return section
    return section | {
        "verdicts": {verdict.claim: verdict for verdict in at.verdicts},
        "checks": {c.id: [check for check in at.checks if check.claim == c.id] for c in at.experiment.claims},
        "table": _or_reason(functools.partial(_numbers, at.experiment, at.dataset)),
        "pictures": [
            {
                "caption": " ".join(picture.caption.split()),
                "png": _or_reason(functools.partial(_drawn, picture, at.dataset)),
            }
            for picture in at.experiment.pictures
        ],
        "command": at.dataset.attrs["command"],
        "settings": json.loads(at.dataset.attrs["config"]),
        "provenance": _provenance(at.dataset),
    }  # fmt: skip


class Row(NamedTuple):
    """A line of the verdict table."""

    claim: Claim
    experiment: str
    verdict: Verdict | None
    note: str
    """Why there is no verdict, or what is to be said of it; empty when all is well."""
    agreement: Agreement | None


def rows(standings: Sequence[Standing], stored: Mapping[str, Standing] | None = None) -> list[Row]:
    """Returns a line per claim, in order."""
    found = []
    for at in standings:
        agreement = against(at, stored[at.experiment.name]) if stored and at.experiment.name in stored else None
        verdicts = {verdict.claim: verdict for verdict in at.verdicts}
        note = f"{at.state}: {at.reason}" if at.state not in SOUND else ""
        found += [
            Row(claim, at.experiment.name, verdicts.get(claim.id), note, agreement) for claim in at.experiment.claims
        ]
    return sorted(found, key=lambda row: registry.in_order(row.claim.id))


def render(
    standings: Sequence[Standing], *, command: str, smoke: bool = False, stored: Mapping[str, Standing] | None = None
) -> str:
    """Returns the page.

    Args:
      standings: what there is of every experiment.
      command: what makes the page again.
      smoke: say that sizes are too small for any statement.
      stored: standings to compare with, by name.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    # the order of the first claim of each
    ordered = sorted(standings, key=lambda at: min(registry.in_order(claim.id) for claim in at.experiment.claims))
    counted = rows(standings, stored)
    words = [row.verdict.word for row in counted if row.verdict is not None and not row.note]
    return template.render(
        rows=counted,
        counts={word: words.count(word) for word in ("holds", "holds only if", "does not hold", "not decided")},
        missing=[at for at in ordered if at.state not in SOUND],
        older=[at.experiment.name for at in ordered if at.state == "older sources"],
        sections=[_section(at) for at in ordered],
        errata=ERRATA,
        command=command,
        smoke=smoke,
        compared=stored is not None,
        seconds=sum(float(at.dataset.attrs["seconds"]) for at in standings if at.dataset is not None),
        tolerance=f"the stored 95 % interval, widened by {RELATIVE:.0%} of the stored median and by {ABSOLUTE:g} "
        "(of the largest median, where that is below 1)",
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def write(page: str, file: Path) -> None:
    """Writes the page, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    with results.whole_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8")
