"""Retention of one layer's memory along every path, from as few compiled programs as can be.

Curves are exact where that is cheap: all rows of the memory, every sequence.  Where the products would take more than
``EXACT_LIMIT`` operations, the same scans carry random rows (:mod:`rnngrad.probes`), and of as many sequences as fit
into ``PROBE_LIMIT``.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rnngrad import logscaled
from rnngrad.diagnose.result import Curves
from rnngrad.interop.adapted import Pass
from rnngrad.jacobians import (
    Keep,
    Layout,
    Rows,
    advance_for,
    append_last,
    chain_along,
    identity_rows,
    layout_of,
    parse_path,
    real_dtype,
    reverse_scan,
)
from rnngrad.logscaled import LogScaled
from rnngrad.probes import interval_ends, probe_rows, spread_of
from rnngrad.types import Params, State, leaf_names, select_names
from rnngrad.unroll import run_forward

EXACT_LIMIT = 1e11
"""Multiplications and additions of all curves up to which they are exact: a second or two on two cores."""
PROBE_LIMIT = 4e11
"""The same for random rows; sequences are left out beyond it."""
CONFIDENCE = 0.95


class _Kept(NamedTuple):
    """What is kept of a chain: log of the norm, and the ends of its interval (the same where it is exact)."""

    log_norm: Array
    low: Array
    high: Array


def _exactly(chain: LogScaled) -> _Kept:
    log_norm = logscaled.log_norm(chain)
    return _Kept(log_norm, log_norm, log_norm)


@functools.cache
def _estimated(num_probes: int, size: int) -> Callable[[LogScaled], _Kept]:
    """Returns what to keep of random rows; one object for each size, for a fresh one would compile anew."""

    def kept(chain: LogScaled) -> _Kept:
        spread = spread_of(chain, most=size)
        low, high = interval_ends(spread, num_probes, CONFIDENCE)
        return _Kept(spread.log_root, spread.log_root + low, spread.log_root + high)

    return kept


class _Memory(NamedTuple):
    """The block whose chain is measured, and by how many random rows (0: exactly); static."""

    layout: Layout
    block: str | None
    num_probes: int

    @property
    def keep(self) -> Keep:
        then = _estimated(self.num_probes, self.layout.num_entries(self.block)) if self.num_probes else _exactly
        return Keep(self.layout, self.block, then)

    def rows(self, key: Key[Array, ""], dtype: np.dtype) -> Rows:
        if self.num_probes:
            return probe_rows(key, self.num_probes, self.layout, self.block, dtype)
        return identity_rows(self.layout, dtype, self.block)


@functools.partial(jax.jit, static_argnames=("cell", "memory"))
def _kept_by_gate(cell, params, state, xs, key, is_open, *, memory):
    """Returns what is kept of chains with the given gates open, (B, paths, T + 1), one after the other.

    Under ``vmap`` both branches of every rescaling would run; and with the open gates as data, all paths of a layer are
    one program.
    """
    rows, keep = memory.rows(key, real_dtype(state)), memory.keep

    def of_sequence(xs):
        run = run_forward(cell, params, state, xs)

        def of_path(is_open):
            advance = advance_for("selected")
            _, stacked = reverse_scan(cell, params, run, memory.layout, rows, advance, keep, tuple(is_open))
            return append_last(keep(rows), stacked)

        return jax.lax.map(of_path, is_open)

    return jax.lax.map(of_sequence, jnp.moveaxis(xs, 1, 0))


@functools.partial(jax.jit, static_argnames=("cell", "path", "memory"))
def _kept_along(cell, params, state, xs, key, *, path, memory):
    """Returns what is kept of a chain that is no choice of gates, (B, T + 1)."""
    rows = memory.rows(key, real_dtype(state))

    def of_sequence(xs):
        return chain_along(cell, params, run_forward(cell, params, state, xs), rows, path=path, keep=memory.keep)

    return jax.lax.map(of_sequence, jnp.moveaxis(xs, 1, 0))


class Work(NamedTuple):
    """What the curves of one layer cost."""

    num_rows: int
    num_weights: int
    num_chains: int


class Plan(NamedTuple):
    """How the curves of all layers are computed."""

    num_probes: int
    """0 for exact ones."""
    num_sequences: int
    reason: str


def choose(work: list[Work], num_steps: int, num_sequences: int, method: str, num_probes: int) -> Plan:
    """Returns the plan for ``method`` "exact", "probes" or "auto", which takes what the limits allow."""

    def cost(most_rows: int) -> float:
        per_step = [2.0 * min(layer.num_rows, most_rows) * layer.num_weights * layer.num_chains for layer in work]
        return num_steps * sum(per_step)

    exact = num_sequences * cost(sys.maxsize)
    if method == "exact" or (method == "auto" and exact <= EXACT_LIMIT):
        return Plan(0, num_sequences, f"exact, {exact:.1g} operations")
    fitting = max(1, min(num_sequences, int(PROBE_LIMIT // cost(num_probes))))
    of_which = "" if fitting == num_sequences else f" of {fitting} of the sequences"
    return Plan(num_probes, fitting, f"estimated by {num_probes} random rows{of_which}; exact: {exact:.1g} operations")


def within(layer: str, by_gate: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of one layer's gates, under their names within it."""
    prefix = layer + "." if layer else ""
    return {name.removeprefix(prefix): value for name, value in by_gate.items() if name.startswith(prefix)}


class _Path(NamedTuple):
    """One choice of open gates."""

    name: str
    is_open: tuple[bool, ...]


def curves_of(
    one: Pass, params: Params, state: State, xs: Array, layer: str, block: str | None, how: Plan, key: Key[Array, ""]
) -> Curves:
    """Returns every path of one layer's memory."""
    cell, own = one.cell, xs[:, : how.num_sequences]
    layout = layout_of(state)
    memory = _Memory(layout, block, how.num_probes)
    start = 0.5 * math.log(layout.num_entries(block))

    def by_lag(logs: Array, at_zero: float) -> np.ndarray:
        curve = np.flip(np.asarray(logs, np.float64), -1) - start
        curve[..., 0] = at_zero  # the identity, or nothing: there is nothing to estimate
        return curve

    def ends(full: _Kept) -> tuple[np.ndarray | None, np.ndarray | None]:
        return (by_lag(full.low, 0.0), by_lag(full.high, 0.0)) if how.num_probes else (None, None)

    if not one.has_split:
        kept = _kept_along(cell, params, state, own, key, path=parse_path("full", ()), memory=memory)
        return Curves(by_lag(kept.log_norm, 0.0), None, None, {}, {}, *ends(kept))

    z = jax.eval_shape(cell.preactivate, params, state, own[0, 0])
    names = leaf_names(z)
    gates = within(layer, dict(zip(names, names, strict=True)))
    every, none = (True,) * len(names), (False,) * len(names)
    asked = [_Path("full", every), _Path("direct", none)]
    for gate in gates.values():
        chosen = select_names(names, gate, what="gate")
        asked += [_Path(f"only:{gate}", chosen), _Path(f"without:{gate}", tuple(not flag for flag in chosen))]
    is_open = np.array([curve.is_open for curve in asked])
    kept = _kept_by_gate(cell, params, state, own, key, is_open, memory=memory)
    by_path = np.moveaxis(by_lag(kept.log_norm, 0.0), 1, 0)
    found = dict(zip([curve.name for curve in asked], by_path, strict=True))
    rest = _kept_along(cell, params, state, own, key, path=parse_path("remainder", names), memory=memory)
    # a gate that does not hear the state, as the input's share of a GRU's candidate, has no path of its own
    heard = {
        short: gate
        for short, gate in gates.items()
        if not (
            np.array_equal(found[f"only:{gate}"], found["direct"])
            and np.array_equal(found[f"without:{gate}"], found["full"])
        )
    }
    low, high = ends(jax.tree.map(lambda leaf: leaf[:, 0], kept))
    return Curves(
        full=found["full"],
        direct=found["direct"],
        remainder=by_lag(rest.log_norm, -math.inf),
        only={short: found[f"only:{gate}"] for short, gate in heard.items()},
        without={short: found[f"without:{gate}"] for short, gate in heard.items()},
        low=low,
        high=high,
    )
