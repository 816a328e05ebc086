"""Claims, checks and verdicts: what an experiment says it will try, and what its data then say.

A claim is tried by checks.  Those that *decide* are the claim's own content, those that do not are predictions of ours
or side conditions.  The word of the verdict follows from the deciding checks alone::

    all hold            holds
    some hold           holds only if …
    none holds          does not hold
    none could be tried not decided         (a smoke run; a claim about training of which every seed diverged)

so that it can be recomputed from stored data and nobody chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Word = Literal["holds", "holds only if", "does not hold", "not decided"]


class Claim(NamedTuple):
    """A claim as it circulates, and how it is tried."""

    id: str
    """A1 to E5 in the list of claims this project began with; T and N are those that it came across."""
    statement: str
    source: str
    """Who says so: authors, year, arXiv number and equation where there is one."""
    prediction: str
    """What we expected before the run, with its number."""
    refuted: str
    """What would refute the claim."""
    functions: tuple[str, ...]
    """Public names that compute the numbers: ``rg.retention``."""
    tests: tuple[str, ...]
    """Test files, or tests in them as ``file::function``, that hold the functions and the experiment to account."""


class Check(NamedTuple):
    """One line of a verdict."""

    name: str
    value: str
    """What was found, with its interval."""
    bound: str
    """What was expected."""
    holds: bool | None
    """None: this run cannot tell."""
    claim: str
    """Id of the claim that it belongs to."""
    why: str
    """Where the bound comes from: a derivation or a source, in a line."""
    decides: bool = True
    """False: a prediction of ours, or a side condition; the verdict does not depend on it."""


class Verdict(NamedTuple):
    """What the data say about one claim."""

    claim: str
    word: Word
    sentence: str
    """The finding with its numbers; where it holds only under a condition, the condition."""

    def __str__(self) -> str:
        return f"{self.claim} {self.word}{' …' if self.word == 'holds only if' else ''}: {self.sentence}"


def word_of(checks: Sequence[Check]) -> Word:
    """Returns the word of the verdict on one claim, given its checks.

    >>> word_of([Check("at T = 10", "1", "2", True, "A1", "-"), Check("at T = 100", "1", "2", False, "A1", "-")])
    'holds only if'
    """
    tried = [check.holds for check in checks if check.decides and check.holds is not None]
    if not tried:
        return "not decided"
    if all(tried):
        return "holds"
    return "holds only if" if any(tried) else "does not hold"


def judge(claims: Sequence[Claim], checks: Sequence[Check], sentences: Mapping[str, str]) -> list[Verdict]:
    """Returns the verdict on every claim of an experiment.

    Raises:
      ValueError: a check or a sentence of a claim that is not among them, or a claim without checks or sentence.
    """
    ids = [claim.id for claim in claims]
    for what, found in (("checks", {check.claim for check in checks}), ("sentences", set(sentences))):
        if found != set(ids):
            raise ValueError(f"{what}: expected some for each of {', '.join(ids)}, found {', '.join(sorted(found))}")
    return [Verdict(id, word_of([check for check in checks if check.claim == id]), sentences[id]) for id in ids]
