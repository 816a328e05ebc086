"""The one scan over time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rnngrad.types import Cell, Gates, Params, State, Trajectory, check_inputs


def unroll(cell: Cell, params: Params, state: State, xs: Any) -> Trajectory:
    """Returns the states, gate activations and final state of ``cell`` run over ``xs``.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0; fields of shape (N,) for one sequence, (B, N) for a batch.
      xs: inputs of shape (T, D) or (T, B, D).

    Returns:
      A :class:`Trajectory` with leading axis T: ``states[t]`` is s_{t+1}, ``gates[t]`` the gates that made it.

    Raises:
      ValueError: shapes, dtypes or structures that do not fit, or T = 0; says what was expected and found.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (7, 2, 3))
    >>> rg.unroll(cell, cell.init(jax.random.key(0)), cell.init_state((2,)), xs).states.h.shape
    (7, 2, 5)
    """
    check_inputs(cell, params, state, xs, one_sequence=False)

    def body(carry, x):
        new, gates = cell.step(params, carry, x)
        return new, (new, gates)

    final, (states, gates) = jax.lax.scan(body, state, xs)
    return Trajectory(states, gates, final)


class Point(NamedTuple):
    """Where a step Jacobian is taken; with a leading axis T, every step of a run."""

    state: State
    """The old state, s_t."""
    z: Gates
    """The pre-activations that the forward pass computed there."""
    x: Any
    """The input."""


class Run(NamedTuple):
    """A forward pass as the reverse scan needs it."""

    points: Point
    """Every step, leading axis T."""
    final: State
    """s_T."""


def run_forward(cell: Cell, params: Params, state: State, xs: Any) -> Run:
    """Returns the points of every step, with the pre-activations computed there, and the last state.

    Keeping z costs T times the gates in memory and spares the reverse scan two matrix-vector products per step.
    """

    def body(carry, x):
        z = cell.preactivate(params, carry, x)
        new, _ = cell.update(params, z, carry)
        return new, (carry, z)

    final, (states, zs) = jax.lax.scan(body, state, xs)
    return Run(Point(states, zs, xs), final)


def state_is_finite(run: Run) -> Bool[Array, " L"]:
    """Returns whether every entry of s_0 … s_T is finite, T + 1 flags."""
    flags = [
        jnp.append(jnp.all(jnp.isfinite(before), axis=tuple(range(1, before.ndim))), jnp.all(jnp.isfinite(last)))
        for before, last in zip(jax.tree.leaves(run.points.state), jax.tree.leaves(run.final), strict=True)
    ]
    return functools.reduce(jnp.logical_and, flags)
