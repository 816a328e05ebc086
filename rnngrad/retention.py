"""Retention curves: how much of a gradient is left after a lag, and what naive float32 would have made of it.

::

    retention(lag) = ‖∂s_T/∂s_{T−lag}‖ / ‖∂s_T/∂s_T‖        in nats: its logarithm, 0 at lag 0

The divisor is the norm of the identity rows of block ``of`` (√M for Frobenius, 1 for spectral), which is the curve's
value at lag 0 when ``of`` and ``wrt`` are the same block.  A block that is zero at lag 0, such as ∂c_T/∂h_T or any
remainder, starts at −inf.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rnngrad import logscaled
from rnngrad.jacobians import (
    MATMUL_PRECISION,
    Keep,
    Layout,
    append_last,
    chain_along,
    identity_blocks,
    identity_rows,
    layout_of,
    prepare,
    real_dtype,
    reverse_scan,
)
from rnngrad.logscaled import LogScaled
from rnngrad.types import Cell, Params, State
from rnngrad.unroll import run_forward, state_is_finite


class Certificate(NamedTuple):
    """What a curve was computed with; static and hashable, so it passes through jit and vmap."""

    dtype: str
    """dtype of the states and of the chain's mantissa."""
    matmul_precision: str
    """Matmul precision of the chain."""
    backend: str
    """Default backend of the process: cpu, gpu or tpu."""
    float32_floor: float
    """Logarithm of the smallest number that float32 keeps on this backend: −87.3 nats where subnormals are flushed to
    zero (CPU, TPU), −103.3 where they are kept (GPU)."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lags", "log_norm", "naive_death_lag", "nonfinite_step"],
    meta_fields=["of", "wrt", "path", "norm", "certificate"],
)
@dataclasses.dataclass(frozen=True)
class RetentionCurve:
    """Retention by lag, with the certificate that says how far to trust it.  A pytree: vmap gives a batch of curves."""

    lags: Int[Array, "..."]
    """0 … T."""
    log_norm: Float[Array, "..."]
    """Retention in nats; −inf for an exactly zero chain, NaN from a non-finite step on."""
    naive_death_lag: Int[Array, "..."]
    """First lag at which an unscaled float32 product, then its Frobenius norm, then the logarithm gives ∓inf;
    −1 when it survives to lag T."""
    nonfinite_step: Int[Array, "..."]
    """First time step at which the state is not finite, else the last one at which the chain is not; −1 for none."""
    of: str | None
    wrt: str | None
    path: str
    norm: str
    certificate: Certificate


def certificate(dtype: Any) -> Certificate:
    """Returns the certificate of a computation in ``dtype`` on the current default backend."""
    backend = jax.default_backend()
    info = np.finfo(np.float32)
    smallest = info.smallest_subnormal if backend == "gpu" else info.tiny
    return Certificate(jnp.dtype(dtype).name, MATMUL_PRECISION, backend, float(np.log(smallest)))


def _sizes(chain: LogScaled, *, norm: str) -> tuple[Array, Array, Array]:
    """What a retention curve keeps of each chain: two log-norms, and a log-maximum that is right where it matters.

    Only whether the largest square lies below the floor is asked later.  Since max² ≤ Σ² ≤ MN max², the Frobenius norm
    answers that except within log(MN) of the floor, and the pass over the matrix is made there alone.
    """
    floor = certificate(chain.mantissa.dtype).float32_floor
    log_frobenius = logscaled.log_norm(chain)
    entries = chain.mantissa.size
    is_open = (2 * log_frobenius > floor - 1) & (2 * log_frobenius < floor + float(np.log(entries)) + 1)
    log_max = jax.lax.cond(is_open, logscaled.log_max, lambda _: log_frobenius, chain)
    chosen = log_frobenius if norm == "frobenius" else logscaled.log_norm(chain, norm)
    return chosen, log_frobenius, log_max


@functools.cache
def sizes_for(norm: str) -> Callable[[LogScaled], tuple[Array, Array, Array]]:
    """Returns what a curve in this norm keeps of each chain; one object each, for a fresh one would compile anew."""
    if norm not in ("frobenius", "spectral"):
        raise ValueError(f"unknown norm {norm!r}; expected 'frobenius' or 'spectral'")
    return functools.partial(_sizes, norm=norm)


def _first_true(flags: Array, *, otherwise: Array) -> Array:
    return jnp.where(jnp.any(flags), jnp.argmax(flags).astype(jnp.int32), otherwise)


@functools.partial(jax.jit, static_argnames=("layout", "dtype", "of", "wrt", "path", "norm"))
def curve_from(
    sizes: tuple[Array, Array, Array],
    is_finite: Array,
    *,
    layout: Layout,
    dtype: np.dtype,
    of: str | None,
    wrt: str | None,
    path: str,
    norm: str,
) -> RetentionCurve:
    """Returns the curve of what :func:`sizes_for` kept of the chains, and of whether s_0 … s_T are finite."""
    log_norm, log_frobenius, log_max = sizes
    start = logscaled.log_norm(logscaled.join(identity_rows(layout, dtype, of)), norm)
    made_with = certificate(dtype)

    # The naive norm squares every entry first: it is 0 once the largest square is below the floor and inf once the sum
    # of squares is above the ceiling.  A power of two can lie exactly on the floor and survives there, so the
    # comparison leaves it 1e-4 nats of room; 63 steps of f = 0.5 are such a case.
    ceiling = float(np.log(np.finfo(np.float32).max))
    dies = (2 * log_max < made_with.float32_floor - 1e-4) | (2 * log_frobenius > ceiling)
    # flipped to run over lag; a chain that starts at zero (a remainder, ∂c/∂h) does not die there
    dies = jnp.flip(dies & ~jnp.isneginf(log_max)) & (jnp.arange(dies.shape[0]) > 0)
    exactly_zero = jnp.flip(jnp.isneginf(log_max))
    dies = dies | (exactly_zero & (jnp.cumsum(~exactly_zero) > 0))

    num_lags = log_norm.shape[0]
    none = jnp.array(-1, jnp.int32)
    broken = jnp.isnan(log_max) | jnp.isposinf(log_max)
    last_bad = _first_true(jnp.flip(broken), otherwise=none)
    from_chain = jnp.where(last_bad < 0, none, num_lags - 1 - last_bad)
    return RetentionCurve(
        lags=jnp.arange(num_lags, dtype=jnp.int32),
        log_norm=jnp.flip(log_norm) - start,
        naive_death_lag=_first_true(dies, otherwise=none),
        nonfinite_step=_first_true(~is_finite, otherwise=from_chain),
        of=of,
        wrt=wrt,
        path=path,
        norm=norm,
        certificate=made_with,
    )


@functools.partial(jax.jit, static_argnames=("cell", "path", "of", "keep"))
def _sizes_along(cell, params, state, xs, *, path, of, keep):
    run = run_forward(cell, params, state, xs)
    rows = identity_rows(keep.layout, real_dtype(state), of)
    return chain_along(cell, params, run, rows, path=path, keep=keep), state_is_finite(run)


def retention(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    of: str | None = None,
    wrt: str | None = None,
    path: str = "full",
    norm: str = "frobenius",
) -> RetentionCurve:
    """Returns log(‖∂s_T/∂s_{T−lag}‖ / ‖∂s_T/∂s_T‖) for every lag 0 … T, from one reverse scan.

    Memory beyond the states and pre-activations of the T steps is one (M, S) matrix.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence; ``jax.vmap`` for a batch.
      xs: inputs, shape (T, D).
      of: block of rows by field name (``"c"``, ``"layer_1.h"``), None for the whole state.
      wrt: block of columns.
      path: ``"full"``, ``"direct"``, ``"remainder"``, ``"only:<gate>"`` or ``"without:<gate>"``; see
        :mod:`rnngrad.jacobians`.
      norm: ``"frobenius"`` or ``"spectral"``.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them (with the first time step), unknown block, gate, path or
        norm.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5, forget_bias=1.0)
    >>> xs = jax.random.normal(jax.random.key(1), (7, 3))
    >>> curve = rg.retention(cell, cell.init(jax.random.key(0)), cell.init_state(), xs, of="c", wrt="c")
    >>> curve.log_norm.shape, float(curve.log_norm[0])
    ((8,), 0.0)
    """
    kept = sizes_for(norm)
    layout, parsed = prepare(cell, params, state, xs, path=path, of=of, wrt=wrt)
    sizes, is_finite = _sizes_along(cell, params, state, xs, path=parsed, of=of, keep=Keep(layout, wrt, kept))
    return curve_from(sizes, is_finite, layout=layout, dtype=real_dtype(state), of=of, wrt=wrt, path=path, norm=norm)


@functools.partial(jax.jit, static_argnames=("cell", "layout", "path", "of", "wrt"))
def _naive(cell, params, state, xs, *, layout, path, of, wrt):
    rows = identity_blocks(layout, np.dtype(np.float32), of)
    columns = layout.block(wrt)
    kinds = ("full", "direct") if path.kind == "remainder" else (path.kind,)

    def log_norm(blocks):
        return jnp.log(jnp.sqrt(sum(jnp.sum(jnp.square(block)) for block in blocks)))

    def advance(pulls, carry):
        return tuple(getattr(pulls, kind)(part) for kind, part in zip(kinds, carry, strict=True))

    def emit(carry):
        chain = jax.tree.map(jnp.subtract, *carry) if path.kind == "remainder" else carry[0]
        return log_norm(block for block, is_in in zip(chain, columns, strict=True) if is_in)

    run = run_forward(cell, params, state, xs)
    carry = (rows,) * len(kinds)
    _, stacked = reverse_scan(cell, params, run, layout, carry, advance, emit, path.gate_is_open)
    return jnp.flip(append_last(emit(carry), stacked)) - log_norm(rows)


def naive_retention(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    of: str | None = None,
    wrt: str | None = None,
    path: str = "full",
) -> Float[Array, " L"]:
    """Returns what plain float32 makes of the same curve: unscaled product, then Frobenius norm, then logarithm.

    For drawing beside :func:`retention`.  It gives −inf (or inf) from about ``curve.naive_death_lag`` on: exactly there
    unless entries of the chain have lost digits to the floor before.

    Arguments and errors are those of :func:`retention`; everything is cast to float32.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.vanilla(3, 5)
    >>> xs = jax.random.normal(jax.random.key(1), (300, 3))
    >>> bool(rg.naive_retention(cell, cell.init(jax.random.key(0)), cell.init_state(), xs)[-1] == -jax.numpy.inf)
    True
    """

    def to_float32(leaf):
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        return leaf.astype(jnp.complex64 if is_complex else jnp.float32)

    _, parsed = prepare(cell, params, state, xs, path=path, of=of, wrt=wrt)
    params, state, xs = jax.tree.map(to_float32, (params, state, xs))
    layout = layout_of(state)
    return _naive(cell, params, state, xs, layout=layout, path=parsed, of=of, wrt=wrt)


def decay_rate(log_norm: Float[Array, " L"], window: tuple[int, int]) -> Float[Array, ""]:
    """Returns the least-squares slope of a curve over the lags ``window[0] <= lag <= window[1]``, in nats per step.

    Negative for decay.  NaN when the window holds a non-finite value: −inf has no slope.

    Args:
      log_norm: one value for each lag 0 … T, as in a :class:`RetentionCurve`.
      window: first and last lag of the fit.

    Raises:
      ValueError: fewer than two lags in the window.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> print(rg.decay_rate(-0.5 * jnp.arange(10.0), (2, 9)))
    -0.5
    """
    first, last = window
    longest = log_norm.shape[0] - 1
    if not 0 <= first < last <= longest:
        raise ValueError(f"window: expected 0 <= first < last <= {longest}, the longest lag, found {window}")
    lags = np.arange(first, last + 1)
    x = (lags - lags.mean()).astype(log_norm.dtype)
    y = log_norm[first : last + 1]
    # taken relative to its start, where float32 has more digits left for the differences
    y = y - y[0]
    return jnp.where(jnp.all(jnp.isfinite(y)), jnp.sum(x * y) / np.sum(x * x), jnp.nan)


def half_life(rate: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the number of steps over which a gradient of decay rate ``rate`` (nats per step) halves.

    inf when it does not decay.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> print(rg.half_life(jnp.log(jnp.array(0.5))))
    1.0
    """
    rate = jnp.asarray(rate) * 1.0
    return jnp.where(rate < 0, -jnp.log(2.0).astype(rate.dtype) / jnp.where(rate < 0, rate, 1), jnp.inf)
