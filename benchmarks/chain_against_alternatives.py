"""All lags of one chain, against what a user would write instead.

* ``jax.jacrev`` once per lag, through the scan from k to T: some lags spread evenly over 1 … T are timed, and the sum
  over all T is estimated by the trapezoid through them;
* one ``jax.jacrev`` through the scan, which gives a single lag (and 0, so −inf, at this length);
* the afternoon's alternative: ``vmap(jacrev(step))`` for every step Jacobian, then a running product in plain floats.

All measure ∂c_T/∂c_k of the same LSTM at highest matmul precision.  Equality is asserted first, at lags that plain
floats still hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, Timing, judged, lstm_problem, median_and_range, milliseconds, ratio, timed

HELD = -40.0
"""Nats down to which a plain float32 Jacobian keeps its digits: the squares in its norm stay above 1e-38."""


def sampled_lags(num_steps: int, count: int) -> list[int]:
    """Returns ``count`` lags spread evenly over 1 … T."""
    return sorted({round(lag) for lag in np.linspace(1, num_steps, count)})


def sum_over_lags(lags: Sequence[int], seconds: Sequence[float]) -> float:
    """Returns the seconds of all lags 1 … T, estimated from those of some, the first and the last among them.

    The trapezoid from 1 to T, and half of each end besides: exact where seconds grow linearly with the lag.
    """
    return float(np.trapezoid(seconds, lags)) + (seconds[0] + seconds[-1]) / 2


def against_every_lag(timings: dict[str, Timing], lags: Sequence[int]) -> tuple[float, tuple[float, float]]:
    """Returns median and range of (seconds of one Jacobian per lag, over all lags) / (seconds of ``all lags``)."""
    rounds = zip(*(timings[f"lag {lag}"].repeats for lag in lags), strict=True)
    sums = [sum_over_lags(lags, seconds) for seconds in rounds]
    return median_and_range([a / b for a, b in zip(sums, timings["all lags"].repeats, strict=True)])


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios; N = 128, T = 1000, or a few steps with ``smoke``."""
    n, num_steps, repeats = (16, 50, 2) if smoke else (128, 1000, 9)
    cell, params, state, xs = lstm_problem(n, num_steps)

    def all_lags():
        return rg.retention(cell, params, state, xs, of="c", wrt="c").log_norm

    @jax.jit
    def jacrev_through_the_scan(params, start, xs):
        with jax.default_matmul_precision("highest"):
            return jax.jacrev(lambda c: rg.unroll(cell, params, start._replace(c=c), xs).final.c)(start.c)

    states = rg.unroll(cell, params, state, xs).states

    def one_lag(lag):
        start = state if lag == num_steps else jax.tree.map(lambda leaf: leaf[-lag - 1], states)
        return functools.partial(jacrev_through_the_scan, params, start, xs[-lag:])

    @jax.jit
    def step_products(params, xs):
        def forward(carry, x):
            return cell.step(params, carry, x)[0], carry

        def flat_step(vector, x):
            new, _ = cell.step(params, type(state)(*jnp.split(vector, 2)), x)
            return jnp.concatenate(new)

        def body(rows, jacobian):
            rows = rows @ jacobian
            return rows, jnp.log(jnp.linalg.norm(rows[:, n:]))

        with jax.default_matmul_precision("highest"):
            _, old = jax.lax.scan(forward, state, xs)
            jacobians = jax.vmap(jax.jacrev(flat_step))(jnp.concatenate(old, axis=-1), xs)
            _, log_norm = jax.lax.scan(body, jnp.eye(2 * n)[n:], jacobians, reverse=True)
        return jnp.flip(log_norm) - jnp.log(jnp.sqrt(1.0 * n))

    found, alternative = np.asarray(all_lags()), np.asarray(step_products(params, xs))
    held = np.flatnonzero(np.isfinite(alternative) & (found[1:] > HELD))
    np.testing.assert_allclose(alternative[held], found[1:][held], rtol=1e-4, atol=1e-3)
    lags = sampled_lags(num_steps, 4 if smoke else 10)
    for lag in {20, *lags}:
        if found[lag] > HELD:
            norm = np.linalg.norm(one_lag(lag)()) / np.sqrt(n)
            np.testing.assert_allclose(np.log(norm), found[lag], rtol=1e-4, atol=1e-4)

    # Apart, not one round of all: what runs right after the step products finds its caches full of their T·S² numbers.
    beside_every_lag = timed({"all lags": all_lags, **{f"lag {lag}": one_lag(lag) for lag in lags}}, repeats)
    beside_products = timed({"all lags": all_lags, "step products": lambda: step_products(params, xs)}, repeats)
    details = {
        "N": n,
        "T": num_steps,
        "dtype": "float32",
        "sum over all lags": f"trapezoid over lags {', '.join(map(str, lags))}",
        "timings beside jacrev": milliseconds(beside_every_lag),
        "timings beside the step products": milliseconds(beside_products),
        "largest entry of the longest lag from jacrev": float(jnp.abs(one_lag(num_steps)()).max()),
        "lags that the plain product lost": int(num_steps - np.isfinite(alternative).sum()),
    }
    name = "chain_against_alternatives"
    every, single, products = (
        f"time of jax.jacrev once per lag / time of all {num_steps} lags",
        f"time of all {num_steps} lags / time of one jax.jacrev through the scan",
        "time of vmap(jacrev(step)) and a running product / time of all lags",
    )
    return [
        judged(name, every, against_every_lag(beside_every_lag, lags), "≥ 400", details),
        judged(name, single, ratio(beside_every_lag, "all lags", f"lag {num_steps}"), "≤ 1.3", details),
        judged(name, products, ratio(beside_products, "step products", "all lags"), "≥ 2", details),
    ]
