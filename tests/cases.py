"""The one table of cells under test: a new cell is one row here and one oracle in ``oracles.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad import cells
from rnngrad.jacobians import Layout, identity_blocks, layout_of
from rnngrad.unroll import Point

INPUT_SIZE, HIDDEN_SIZE = 3, 4  # N ≠ D, so that a transposed weight cannot pass


def rows(names: Iterable[str], *, fast: Iterable[str] | None = None) -> pytest.MarkDecorator:
    """Returns the parametrisation over cells; those not in ``fast`` are marked slow.

    One worker gets all tests of a cell, and with them what was compiled for it: compiling dominates these tests.
    """
    chosen = None if fast is None else set(fast)
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name,
                marks=[
                    pytest.mark.xdist_group(name),
                    *([] if chosen is None or name in chosen else [pytest.mark.slow]),
                ],
            )
            for name in names
        ],
    )


class Case(NamedTuple):
    """A cell under test."""

    make: Callable[..., rg.Cell]
    """(input_size, hidden_size, dtype=…) -> Cell"""
    memory: str
    """The field that carries the memory."""
    is_affine: bool = True
    """z is affine in the state."""
    has_oracle: bool = True
    """``oracles.py`` knows it by the same name."""


def _with(factory: Callable[..., rg.Cell], **options: Any) -> Callable[..., rg.Cell]:
    return lambda input_size, hidden_size, dtype: factory(input_size, hidden_size, dtype=dtype, **options)


def _stack(input_size: int, hidden_size: int, dtype: Any) -> rg.Cell:
    return cells.stack(
        cells.gru(input_size, hidden_size + 1, dtype=dtype), cells.lstm(hidden_size + 1, hidden_size, dtype=dtype)
    )


CASES: dict[str, Case] = {
    "vanilla_tanh": Case(_with(cells.vanilla, activation="tanh"), "h"),
    "vanilla_sigmoid": Case(_with(cells.vanilla, activation="sigmoid"), "h"),
    "vanilla_relu": Case(_with(cells.vanilla, activation="relu"), "h"),
    "vanilla_identity": Case(_with(cells.vanilla, activation="identity"), "h"),
    "lstm": Case(_with(cells.lstm, forget_bias=1.0), "c"),
    "lstm_tanh_gates": Case(_with(cells.lstm, gate_activation="tanh", initial_memory=0.1), "c"),
    "peephole_lstm": Case(_with(cells.peephole_lstm), "c"),
    "coupled_lstm": Case(_with(cells.coupled_lstm), "c"),
    "gru_after": Case(_with(cells.gru, reset="after"), "h"),
    "gru_before": Case(_with(cells.gru, reset="before"), "h", is_affine=False),
    "indrnn_relu": Case(_with(cells.indrnn, activation="relu"), "h"),
    "indrnn_tanh": Case(_with(cells.indrnn, activation="tanh"), "h"),
    "min_gru": Case(_with(cells.min_gru), "h"),
    "min_lstm": Case(_with(cells.min_lstm), "h"),
    "lru": Case(_with(cells.lru, radius=(0.5, 0.95)), "h"),
    "stack": Case(_stack, "layer_1.c", is_affine=False, has_oracle=False),
}


def point_at(cell: rg.Cell, params: Any, state: Any, x: Any) -> Point:
    """Returns the point of one step, for tests of a single step Jacobian."""
    return Point(state, cell.preactivate(params, state, x), x)


def flatten(state: Any) -> jax.Array:
    """Returns a state as one real vector, leaf after leaf."""
    return jnp.concatenate(layout_of(state).split(state))


def unflatten(layout: Layout, vector: jax.Array) -> Any:
    """Returns the state that lies in ``vector``."""
    return layout.merge(tuple(jnp.split(vector, np.cumsum(layout.sizes)[:-1])))


def as_matrix(pull: Any, layout: Layout, dtype: str = "float64") -> jax.Array:
    """Returns the Jacobian whose pull-back is ``pull``, row = output."""
    return jnp.concatenate(pull(identity_blocks(layout, np.dtype(dtype))), axis=-1)


class Example(NamedTuple):
    """A cell with parameters, a state that is not zero, and inputs."""

    cell: rg.Cell
    params: Any
    state: Any
    xs: jax.Array


@functools.cache
def _cell(name: str, dtype: str) -> rg.Cell:
    """One cell per case and dtype for the whole session: functions of it then compile once."""
    return CASES[name].make(INPUT_SIZE, HIDDEN_SIZE, dtype=dtype)


@functools.cache
def example(name: str, *, num_steps: int = 6, dtype: str = "float32", seed: int = 0) -> Example:
    """Returns an example of a case; the state is random, so that no symmetry of zero hides an error."""
    cell = _cell(name, dtype)
    key_params, key_state, key_xs = jax.random.split(jax.random.key(seed), 3)
    state = cell.init_state()
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(key_state, len(leaves))
    leaves = [0.5 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    xs = jax.random.normal(key_xs, (num_steps, INPUT_SIZE), dtype)
    return Example(cell, cell.init(key_params), jax.tree.unflatten(treedef, leaves), xs)
