"""All experiments that try claims, in the order of the claims."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

from experiments.command import Experiment

NAMES = (
    "bounds",
    "gain_transition",
    "influence",
    "memory_path",
    "retention",
    "gate_shares",
    "hundred_steps",
    "penn_treebank",
    "update_gate",
    "agreement_distance",
    "flexibility",
    "clipping",
    "forget_bias",
    "output_gate",
    "gate_activation",
    "temporal_order",
    "chrono",
    "indrnn_bound",
    "flossing",
    "lyapunov_gates",
    "truncated_gradient",
    "backends",
)
"""Modules of this package; each has an ``EXPERIMENT``."""


def experiments(names: Sequence[str] = NAMES) -> list[Experiment]:
    """Returns the experiments of these modules.

    Raises:
      ValueError: a name that is not among :data:`NAMES`.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"unknown experiment {name!r}; expected some of: {', '.join(NAMES)}")
    return [importlib.import_module(f"experiments.{name}").EXPERIMENT for name in names]


def in_order(claim: str) -> tuple[str, int]:
    """Returns what sorts claim ids: A1, A2, …, A10, B1.

    >>> sorted(["B1", "A10", "A2"], key=in_order)
    ['A2', 'A10', 'B1']
    """
    letters, digits = re.fullmatch(r"([A-Z]+)(\d+)", claim).groups()  # type: ignore[union-attr]
    return letters, int(digits)
