"""All lags of one chain, against what a user would write instead.

* one ``jax.jacrev`` through the scan, which gives a single lag (and 0, so −inf, at this length);
* the afternoon's alternative: ``vmap(jacrev(step))`` for every step Jacobian, then a running product in plain floats.

All three measure ∂c_T/∂c_k of the same LSTM.  Equality is asserted first, at lags that plain floats still hold.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, milliseconds, ratio, timed


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios; N = 128, T = 1000, or a few steps with ``smoke``."""
    n, num_steps, repeats = (16, 50, 2) if smoke else (128, 1000, 9)
    cell = rg.cells.lstm(n, n, forget_bias=1.0)
    params, state = cell.init(jax.random.key(0)), cell.init_state()
    xs = jax.random.normal(jax.random.key(1), (num_steps, n))

    def ours(params, xs):
        return rg.retention(cell, params, state, xs, of="c", wrt="c").log_norm

    @jax.jit
    def jacrev_through_the_scan(params, xs):
        return jax.jacrev(lambda c: rg.unroll(cell, params, state._replace(c=c), xs).final.c)(state.c)

    @jax.jit
    def step_products(params, xs):
        def states(carry, x):
            return cell.step(params, carry, x)[0], carry

        def flat_step(vector, x):
            new, _ = cell.step(params, type(state)(*jnp.split(vector, 2)), x)
            return jnp.concatenate(new)

        _, old = jax.lax.scan(states, state, xs)
        jacobians = jax.vmap(jax.jacrev(flat_step))(jnp.concatenate(old, axis=-1), xs)

        def body(rows, jacobian):
            rows = rows @ jacobian
            return rows, jnp.log(jnp.linalg.norm(rows[:, n:]))

        rows = jnp.eye(2 * n)[n:]
        _, log_norm = jax.lax.scan(body, rows, jacobians, reverse=True)
        return jnp.flip(log_norm) - jnp.log(jnp.sqrt(1.0 * n))

    found, alternative = np.asarray(ours(params, xs)), np.asarray(step_products(params, xs))
    held = np.flatnonzero(np.isfinite(alternative) & (found[1:] > -40))
    np.testing.assert_allclose(alternative[held], found[1:][held], rtol=1e-4, atol=1e-3)
    short = xs[-20:]
    start = rg.unroll(cell, params, state, xs[:-20]).final
    explicit = jax.jacrev(lambda c: rg.unroll(cell, params, start._replace(c=c), short).final.c)(start.c)
    np.testing.assert_allclose(np.log(np.linalg.norm(explicit) / np.sqrt(n)), found[20], rtol=1e-4, atol=1e-4)

    # Two pairs, not one round of three: what runs right after the step products finds its caches full of their T·S²
    # numbers.
    all_lags = {"all lags": lambda: ours(params, xs)}
    beside_jacrev = timed(all_lags | {"jacrev": lambda: jacrev_through_the_scan(params, xs)}, repeats)
    beside_products = timed(all_lags | {"step products": lambda: step_products(params, xs)}, repeats)
    against_jacrev, spread_jacrev = ratio(beside_jacrev, "all lags", "jacrev")
    against_products, spread_products = ratio(beside_products, "all lags", "step products")
    single_lag = np.asarray(jacrev_through_the_scan(params, xs))
    details = {
        "N": n,
        "T": num_steps,
        "dtype": "float32",
        "timings beside jacrev": milliseconds(beside_jacrev),
        "timings beside the step products": milliseconds(beside_products),
        "largest entry of the single lag from jacrev": float(np.abs(single_lag).max()),
        "lags that the plain product lost": int(num_steps - np.isfinite(alternative).sum()),
    }
    name = "chain_against_alternatives"
    return [
        Row(
            name,
            f"time of all {num_steps} lags / time of one jax.jacrev through the scan",
            against_jacrev,
            spread_jacrev,
            "≤ 1.3",
            against_jacrev <= 1.3,
            details,
        ),
        Row(
            name,
            "time of all lags / time of vmap(jacrev(step)) and a running product",
            against_products,
            spread_products,
            "≤ 1",
            against_products <= 1,
            details,
        ),
    ]
