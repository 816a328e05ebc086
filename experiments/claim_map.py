"""The claim map: what of the README files follows from the experiments and their stored results.

In ``experiments/README.md`` all of it, in ``README.md`` a line per claim.  It stands between two marks;
``python -m experiments map`` writes it anew, and a test compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import registry, results
from experiments.claims import Claim
from experiments.reproduction import Standing

STORED = Path(__file__).with_name("results")
BEGIN = "<!-- begin of what `python -m experiments map` writes -->"
END = "<!-- end of what `python -m experiments map` writes -->"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _row(claim: Claim, at: Standing) -> str:
    name = at.experiment.name
    verdicts = {verdict.claim: verdict for verdict in at.verdicts}
    word = f"**{verdicts[claim.id].word}**" if claim.id in verdicts else at.reason
    cells = (
        claim.id,
        claim.statement,
        claim.source,
        ", ".join(f"`{function}`" for function in claim.functions),
        f"[`experiments.{name}`](#{name})",
        ", ".join(f"`{test}`" for test in claim.tests),
        f"`experiments/results/{name}.nc`",
        word,
    )
    return f"| {' | '.join(map(_cell, cells))} |"


_ANSWERS = {True: "yes", False: "no", None: "cannot tell"}


def _section(at: Standing) -> list[str]:
    lines = [f"### {at.experiment.name}", "", at.experiment.about.splitlines()[0], ""]
    if at.dataset is None:
        return [*lines, f"{at.state}: {at.reason}", ""]
    minutes = float(at.dataset.attrs["seconds"]) / 60
    lines += [f"`{at.dataset.attrs['command']}` ({minutes:.1f} minutes on two cores)", ""]
    for verdict in at.verdicts:
        lines += [f"* **{verdict.claim} {verdict.word}{' …' if verdict.word == 'holds only if' else ''}**: "
                  f"{verdict.sentence}"]  # fmt: skip
    lines += ["", "| claim | check | found | expected | holds |", "|---|---|---|---|---|"]
    for check in at.checks:
        claim = check.claim if check.decides else ""
        cells = (claim, check.name, check.value, check.bound, _ANSWERS[check.holds])
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return [*lines, ""]


def text(standings: Sequence[Standing]) -> str:
    """Returns the generated part: a row per claim, then every line of every verdict."""
    claims = [(claim, at) for at in standings for claim in at.experiment.claims]
    claims.sort(key=lambda pair: registry.in_order(pair[0].id))
    lines = [
        "| claim | as it circulates | source | computed by | experiment | test | stored result | verdict |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(claim, at) for claim, at in claims),
        "",
        "## Verdicts",
        "",
        "Line by line, as the stored results give them; `--show` prints the same. Lines without a claim are",
        "predictions of ours or side conditions, and decide nothing.",
        "",
    ]
    for at in standings:
        lines += _section(at)
    return "\n".join(lines)


def short_text(standings: Sequence[Standing]) -> str:
    """Returns a line per claim: as it circulates, and the word of its verdict."""
    lines = ["| claim | as it circulates | verdict |", "|---|---|---|"]
    found = {verdict.claim: verdict.word for at in standings for verdict in at.verdicts}
    claims = [(claim, at.experiment.name) for at in standings for claim in at.experiment.claims]
    for claim, name in sorted(claims, key=lambda pair: registry.in_order(pair[0].id)):
        word = found.get(claim.id, "no verdict")
        cells = (f"[{claim.id}](experiments/README.md#{name})", claim.statement, word)
        lines.append(f"| {' | '.join(map(_cell, cells))}{' …' if word == 'holds only if' else ''} |")
    return "\n".join(lines)


READMES = {
    Path(__file__).with_name("README.md"): text,
    Path(__file__).parent.with_name("README.md"): short_text,
}
"""The files, and what each holds."""


def replaced(readme: str, generated: str) -> str:
    """Returns a README with the part between the marks replaced.

    Raises:
      ValueError: a mark is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the marks {BEGIN!r} and {END!r} in the README, found no such pair")
    return f"{before}{begin}\n{generated}\n{end}{after}"


def write(standings: Sequence[Standing]) -> None:
    """Writes the generated parts into the README files, each whole or not at all."""
    for file, generate in READMES.items():
        page = replaced(file.read_text(encoding="utf-8"), generate(standings))
        with results.whole_file(file) as temporary:
            temporary.write_text(page, encoding="utf-8")
