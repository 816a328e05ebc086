"""What numbers that cannot under- or overflow cost: long products as ``LogScaled`` against plain floats.

The same ``jax.lax.scan`` over the same matrices, N = 64: one carries the product in plain float32, one as
``rg.LogScaled``, which after every step divides it by a power of two.  The matrices are random, with entries of
variance 1/N, from a bank of 256 that the scan goes through again and again, so that a million of them need no memory.
Such a product loses about 1/(2N) nats per step: the plain one survives 10,000 steps and not 1,000,000.

Equality first: against the plain product while it lives, and over a short prefix against float64 in log space.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, judged, milliseconds, ratio, timed

BANK = 256
PREFIX = 200


def bank(n: int) -> jax.Array:
    """Returns the matrices, shape (BANK, n, n)."""
    return jax.random.normal(jax.random.key(0), (BANK, n, n)) / jnp.sqrt(1.0 * n)


@functools.partial(jax.jit, static_argnames="num_steps")
def log_scaled(matrices: jax.Array, num_steps: int) -> rg.LogScaled:
    """Returns the product of the first ``num_steps`` matrices, the newest on the left."""

    def body(product, step):
        matrix = rg.LogScaled(matrices[step % BANK], jnp.zeros((), jnp.int32))
        return rg.logscaled.matmul(matrix, product), None

    start = rg.logscaled.from_array(jnp.eye(matrices.shape[-1]))
    return jax.lax.scan(body, start, jnp.arange(num_steps))[0]


@functools.partial(jax.jit, static_argnames="num_steps")
def plain(matrices: jax.Array, num_steps: int) -> jax.Array:
    """Returns the same in plain floats."""

    def body(product, step):
        return jnp.matmul(matrices[step % BANK], product, precision="highest"), None

    return jax.lax.scan(body, jnp.eye(matrices.shape[-1]), jnp.arange(num_steps))[0]


def _log_norm_in_float64(matrices: np.ndarray, num_steps: int) -> float:
    """Returns the log-norm of the product in NumPy, scaled to norm 1 after every step."""
    product, log_norm = np.eye(matrices.shape[-1]), 0.0
    for step in range(num_steps):
        product = matrices[step % BANK].astype(np.float64) @ product
        norm = np.linalg.norm(product)
        product, log_norm = product / norm, log_norm + np.log(norm)
    return float(log_norm)


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios at T = 10,000 and 1,000,000, N = 64; short ones with ``smoke``."""
    n = 8 if smoke else 64
    lengths = {100: (2, "≤ 1.15"), 5_000: (2, "≤ 1.2")} if smoke else {10_000: (9, "≤ 1.15"), 1_000_000: (5, "≤ 1.2")}
    matrices = bank(n)
    exact = _log_norm_in_float64(np.asarray(matrices), PREFIX)
    # each of PREFIX products rounds by some ε √n relative to its norm
    np.testing.assert_allclose(rg.logscaled.log_norm(log_scaled(matrices, PREFIX)), exact, rtol=0, atol=1e-3)

    rows = []
    for num_steps, (repeats, bound) in lengths.items():
        functions: dict[str, Callable[[], Any]] = {
            "LogScaled": functools.partial(log_scaled, matrices, num_steps),
            "plain": functools.partial(plain, matrices, num_steps),
        }
        product, in_floats = functions["LogScaled"](), np.asarray(functions["plain"]())
        log_norm = float(rg.logscaled.log_norm(product))
        assert np.isfinite(log_norm), f"the product of {num_steps} matrices has log-norm {log_norm}"
        lives = bool(np.isfinite(in_floats).all() and np.abs(in_floats).max() > 1e-36)
        if lives:
            scale = np.abs(in_floats).max()
            np.testing.assert_allclose(rg.logscaled.to_array(product) / scale, in_floats / scale, rtol=0, atol=1e-3)
        timings = timed(functions, repeats)
        details = {
            "N": n,
            "T": num_steps,
            "dtype": "float32",
            "matrices": BANK,
            "log-norm of the product": log_norm,
            "the plain product survives": lives,
            "timings": milliseconds(timings),
        }
        what = f"time of a LogScaled product of {num_steps:,} matrices, N = {n} / time of the plain float product"
        rows.append(judged("logscaled_against_plain", what, ratio(timings, "LogScaled", "plain"), bound, details))
    return rows
