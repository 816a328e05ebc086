"""The table of cells, read off :mod:`rnngrad.cells`: docstrings, signatures, and the cells themselves.

A cell's file begins with one line that says what it is, then its equations behind ``::``, and a paragraph "Source: …".
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import jax

from rnngrad import cells
from rnngrad.types import Cell, leaf_names


class Entry(NamedTuple):
    """A cell, as its own file describes it."""

    name: str
    summary: str
    equation: str
    """The lines of the file's equations; empty for ``stack`` of given cells and ``map_cell`` of a given function."""
    gates: tuple[str, ...]
    """Names of the pre-activations, in their order; empty where they are those of what the factory is given."""
    state: tuple[str, ...]
    """Fields of the state; likewise."""
    source: str
    call: str
    """The factory with its arguments and their defaults."""


def catalogue() -> tuple[Entry, ...]:
    """Returns an entry per public factory of cells, in alphabetical order.

    >>> next(entry.gates for entry in catalogue() if entry.name == "lstm")
    ('i', 'f', 'g', 'o')
    """
    public = ((name, getattr(cells, name)) for name in cells.__all__)
    return tuple(entry(name, value) for name, value in public if _makes_a_cell(value))


def entry(name: str, factory: Callable[..., Cell]) -> Entry:
    """Returns what the file of a factory says of its cell.

    >>> entry("vanilla", cells.vanilla).equation.splitlines()[0]
    'z  = W x + U h + b'
    """
    documentation = inspect.getdoc(inspect.getmodule(factory)) or ""
    summary = documentation.partition("\n\n")[0]
    equation = re.search(r"^::\n\n((?:(?: {4}.*)?\n)+)", documentation, re.MULTILINE)
    source = re.search(r"^Source: (.*?)(?:\n\n|\Z)", documentation, re.MULTILINE | re.DOTALL)
    signature = inspect.signature(factory)
    gates, state = _names(factory) if {"input_size", "hidden_size"} <= signature.parameters.keys() else ((), ())
    return Entry(
        name,
        " ".join(summary.split()).removesuffix("."),
        textwrap.dedent(equation[1]).strip("\n") if equation else "",
        gates,
        state,
        " ".join(source[1].split()).removesuffix(".") if source else "",
        f"rg.cells.{name}{_arguments(signature)}",
    )


def _makes_a_cell(value: object) -> bool:
    # the annotation is a string where annotations are postponed
    return inspect.isfunction(value) and inspect.signature(value).return_annotation in (Cell, Cell.__name__)


def _names(factory: Callable[..., Cell]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    cell = factory(3, 5)
    params, state = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(cell.init_state)
    z = jax.eval_shape(cell.preactivate, params, state, jax.ShapeDtypeStruct((3,), "float32"))
    return leaf_names(z), leaf_names(state)


def _arguments(signature: inspect.Signature) -> str:
    """Without annotations, and with dtypes by their names."""
    shown = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    plain = signature.replace(parameters=shown, return_annotation=inspect.Signature.empty)
    return re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", str(plain))


__all__ = ["Entry", "catalogue", "entry"]
