"""The full Lyapunov spectrum of an LSTM, against its plain Jacobian chain.

The chain ∂s_T/∂s_k of the whole state pulls 2N rows back through every step; the spectrum pushes 2N rows forward and
makes them orthonormal at every step, since one step of this network stretches them by more than float32 allows between
two QRs.  For comparison the same scan with LAPACK's QR at every step.

Equality first: all exponents against a run in float64 with a QR at every step, from the same weights and inputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, judged, lstm_problem, milliseconds, ratio, timed

ACCURACY = 1e-2
"""Nats per step, for every exponent."""


def check_against_float64(n: int, num_steps: int, num_transient: int) -> float:
    """Returns the largest error of an exponent, after asserting that it is below ``ACCURACY``."""
    cell, params, state, xs = lstm_problem(n, num_steps)
    found = rg.lyapunov_spectrum(cell, params, state, xs, num_transient=num_transient)
    with jax.enable_x64(True):
        params, xs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, xs))
        cell = rg.cells.lstm(n, n, dtype=jnp.float64)
        exact = rg.lyapunov_spectrum(cell, params, cell.init_state(), xs, num_transient=num_transient, qr_interval=1)
    error = np.abs(np.asarray(found.exponents) - np.asarray(exact.exponents))
    assert (error <= ACCURACY).all(), f"exponents off by up to {error.max():.3g}"
    return float(error.max())


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios; N = 128, T = 1000, or a few steps with ``smoke``."""
    n, num_steps, num_transient, repeats = (12, 300, 30, 2) if smoke else (128, 1000, 50, 7)
    error = check_against_float64(n, num_steps, num_transient)
    cell, params, state, xs = lstm_problem(n, num_steps)

    @jax.jit
    def lapack_every_step(params, xs):
        def body(carry, x):
            state, frame = carry
            flat = lambda vector: jnp.concatenate(cell.step(params, type(state)(*jnp.split(vector, 2)), x)[0])
            with jax.default_matmul_precision("highest"):
                new, push = jax.linearize(flat, jnp.concatenate(state))
                frame, triangle = jnp.linalg.qr(jax.vmap(push, in_axes=1, out_axes=1)(frame))
            return (type(state)(*jnp.split(new, 2)), frame), jnp.log(jnp.abs(jnp.diagonal(triangle)))

        return jnp.mean(jax.lax.scan(body, (state, jnp.eye(2 * n)), xs)[1], axis=0)

    timings = timed(
        {
            "spectrum": lambda: rg.lyapunov_spectrum(cell, params, state, xs, num_transient=num_transient),
            "chain": lambda: rg.retention(cell, params, state, xs).log_norm,
            "LAPACK": lambda: lapack_every_step(params, xs),
        },
        repeats,
    )
    spectrum = rg.lyapunov_spectrum(cell, params, state, xs, num_transient=num_transient)
    details = {
        "N": n,
        "T": num_steps,
        "exponents": 2 * n,
        "dtype": "float32",
        "largest error of an exponent against float64": error,
        "QRs": int(spectrum.num_qr),
        "of them Householder": int(spectrum.num_householder),
        "timings": milliseconds(timings),
    }
    name = "spectrum_against_chain"
    against_chain = f"time of all {2 * n} exponents / time of the plain chain"
    against_lapack = "time of all exponents / time of the same with LAPACK's QR at every step"
    return [
        judged(name, against_chain, ratio(timings, "spectrum", "chain"), "≤ 5", details),
        judged(name, against_lapack, ratio(timings, "spectrum", "LAPACK"), "≤ 1", details),
    ]
