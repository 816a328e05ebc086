"""Paths of a gradient, counted by how often they leave the direct lane.

::

    ∏(D + εG) = Σ_m ε^m M_m           M_m: all paths that take exactly m gated steps
    M_0 = ∏D                          Σ_m M_m = ∏(D + G), the full chain

Pulled back by one step, M_m' = M_m D + M_{m−1} G; everything beyond ``max_crossings`` is kept in one matrix that moves
by R' = R J + M_max G, so that the parts add up to the full chain exactly, whatever ``max_crossings``.

Norms of parts with opposite signs may exceed the norm of the whole.  ``share`` is therefore signed:
⟨M_m, M⟩_F / ⟨M, M⟩_F, which sums to 1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rnngrad import logscaled
from rnngrad.jacobians import Keep, append_last, identity_rows, prepare, pulled, real_dtype, reverse_scan
from rnngrad.logscaled import LogScaled
from rnngrad.retention import Certificate, certificate
from rnngrad.types import Cell, Params, State
from rnngrad.unroll import run_forward


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lags", "log_norm", "share", "parts"],
    meta_fields=["of", "wrt", "certificate"],
)
@dataclasses.dataclass(frozen=True)
class GradientPaths:
    """Parts of the chain by number of crossings; index 0 … K, then one more for all paths with over K crossings.

    A pytree: vmap gives a batch of them.
    """

    lags: Int[Array, "..."]
    """0 … T."""
    log_norm: Float[Array, "..."]
    """(T+1, K+2): Frobenius norm of each part in nats, in units of the chain's value at lag 0."""
    share: Float[Array, "..."]
    """(T+1, K+2): signed share of each part in the full chain; each row sums to 1 (NaN where the chain is zero)."""
    parts: LogScaled
    """The parts at lag T: mantissa (K+2, M, N), exponent (K+2,); their sum is ∂s_T/∂s_0."""
    of: str | None
    wrt: str | None
    certificate: Certificate


def _sum(parts: LogScaled) -> LogScaled:
    total = jax.tree.map(lambda leaf: leaf[0], parts)
    for index in range(1, parts.exponent.shape[0]):
        total = logscaled.add(total, jax.tree.map(lambda leaf, index=index: leaf[index], parts))
    return total


@functools.partial(jax.jit, static_argnames=("cell", "layout", "of", "wrt", "max_crossings"))
def _paths(cell, params, state, xs, *, layout, of, wrt, max_crossings):
    keep = Keep(layout, wrt, None)
    rows = identity_rows(layout, real_dtype(state), of)
    # all parts in one array per block, part by part; only M_0 = I is not zero at lag 0
    carry = jax.tree.map(lambda leaf: jnp.zeros((max_crossings + 2, *leaf.shape), leaf.dtype).at[0].set(leaf), rows)

    # what one chain does at a step, done by all parts at once
    def moved(pull, rows):
        return pulled(jax.vmap(pull), rows)

    def advance(pulls, parts):
        inner = jax.tree.map(lambda leaf: leaf[:-1], parts)
        beyond = jax.tree.map(lambda leaf: leaf[-1:], parts)
        stay = jax.tree.map(lambda *both: jnp.concatenate(both), moved(pulls.direct, inner), moved(pulls.full, beyond))
        cross = moved(pulls.gated, inner)
        # part m receives the crossing of part m − 1; part 0 receives nothing
        arriving = jax.tree.map(lambda leaf: jnp.concatenate([jnp.zeros_like(leaf[:1]), leaf]), cross)
        return logscaled.rescale_together(tuple(map(logscaled.add, stay, arriving)))

    def emit(parts):
        block = keep(parts)
        total = logscaled.rescale(_sum(block))
        log_total = logscaled.log_norm(total)
        inner = jnp.sum(block.mantissa * jnp.broadcast_to(total.mantissa, block.mantissa.shape), axis=(-2, -1))
        # ⟨M_m, M⟩ / ⟨M, M⟩: the exponents leave 2^(e_m − e), taken before the division can overflow
        power = (block.exponent - jnp.broadcast_to(total.exponent, block.exponent.shape)).astype(log_total.dtype)
        share = inner.astype(log_total.dtype) * jnp.exp2(power)
        square = jnp.sum(jnp.square(total.mantissa)).astype(log_total.dtype)
        return logscaled.log_norm(block), share / jnp.broadcast_to(square, share.shape)

    run = run_forward(cell, params, state, xs)
    final, stacked = reverse_scan(cell, params, run, layout, carry, advance, emit)
    log_norm, share = (jnp.flip(values, axis=0) for values in append_last(emit(carry), stacked))
    log_norm = log_norm - logscaled.log_norm(logscaled.join(rows))
    lags = jnp.arange(log_norm.shape[0], dtype=jnp.int32)
    return GradientPaths(lags, log_norm, share, keep(final), of, wrt, certificate(real_dtype(state)))


def gradient_paths(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    max_crossings: int = 8,
    of: str | None = None,
    wrt: str | None = None,
) -> GradientPaths:
    """Returns ∂s_T/∂s_k split by the number of gated steps its paths take, for every lag.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence.
      xs: inputs, shape (T, D).
      max_crossings: K; paths with more are kept together as the last part.
      of: block of rows by field name, None for the whole state.
      wrt: block of columns.

    Costs K + 2 chains.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them, unknown block, or a negative ``max_crossings``.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5, forget_bias=1.0)
    >>> xs = jax.random.normal(jax.random.key(1), (7, 3))
    >>> parts = rg.gradient_paths(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="c")
    >>> print(parts.share[-1].sum().round(4))
    1.0
    """
    if max_crossings < 0:
        raise ValueError(f"max_crossings: expected at least 0, found {max_crossings}")
    layout, _ = prepare(cell, params, state, xs, of=of, wrt=wrt)
    return _paths(cell, params, state, xs, layout=layout, of=of, wrt=wrt, max_crossings=max_crossings)
