"""The full Lyapunov spectrum of an LSTM, against loops in PyTorch with ``torch.linalg.qr`` at every step.

Two loops: one takes the step's derivative as this project does, by automatic differentiation (``torch.func.jvp`` of the
step under ``vmap``, for all rows of the frame at once); the other has the derivative of an LSTM written out by hand.
Same weights and inputs, float32, on both sides; equality of all exponents is asserted first.

It needs PyTorch, which is no dependency of this project: ``pip install torch==2.13.0``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, judged, lstm_problem, milliseconds, ratio, timed, torch_beside_jax

REQUIRES = "torch"
"""Package beside the project's own; without it the benchmark is left out, and that is said."""


def _gates(z: Any) -> tuple[Any, Any, Any, Any]:
    import torch

    i, f, g, o = z.split(z.shape[-1] // 4, dim=-1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def by_torch_func(w_hh: Any, x: Any, h: Any, c: Any, frame: Any) -> tuple[Any, Any, Any]:
    """Returns h, c and the rows of the frame after one step, by ``torch.func``; ``x`` is W x + b."""
    import torch

    def step(h, c):
        i, f, g, o = _gates(x + h @ w_hh.T)
        c = f * c + i * g
        return o * torch.tanh(c), c

    def push(row):
        return torch.cat(torch.func.jvp(step, (h, c), tuple(row.split(len(h))))[1])

    return *step(h, c), torch.func.vmap(push)(frame)


def by_hand(w_hh: Any, x: Any, h: Any, c: Any, frame: Any) -> tuple[Any, Any, Any]:
    """Returns the same with the derivative of every gate written out."""
    import torch

    i, f, g, o = _gates(x + h @ w_hh.T)
    new_c = f * c + i * g
    squashed = torch.tanh(new_c)
    of_h, of_c = frame.split(len(h), dim=1)
    d_i, d_f, d_g, d_o = (of_h @ w_hh.T).split(len(h), dim=1)
    d_c = f * of_c + (c * f * (1 - f)) * d_f + (g * i * (1 - i)) * d_i + (i * (1 - g * g)) * d_g
    d_h = (o * (1 - squashed**2)) * d_c + (squashed * o * (1 - o)) * d_o
    return o * squashed, new_c, torch.cat([d_h, d_c], dim=1)


def torch_spectrum(step: Callable[..., Any], params: rg.cells.LSTMParams, xs: Any) -> np.ndarray:
    """Returns all exponents over the whole run, by a PyTorch loop."""
    import torch

    peer = torch_beside_jax()
    w_ih, w_hh, b, xs = peer.tensors(*params, xs)
    inputs = xs @ w_ih.T + b
    n = w_hh.shape[1]
    zeros = functools.partial(torch.zeros, device=peer.device)
    h, c = zeros(n), zeros(n)
    frame, total = torch.eye(2 * n, device=peer.device), zeros(2 * n)
    with torch.no_grad():
        for x in inputs:
            h, c, moved = step(w_hh, x, h, c, frame)
            columns, triangle = torch.linalg.qr(moved.T)
            frame = columns.T
            total += torch.log(torch.abs(torch.diagonal(triangle)))
    # the copy waits for the device
    return (total / len(inputs)).cpu().numpy()


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios; N = 128, T = 1000, or a few steps with ``smoke``."""
    n, num_steps, repeats = (12, 200, 2) if smoke else (128, 1000, 5)
    cell, params, state, xs = lstm_problem(n, num_steps)
    weights, inputs = jax.tree.map(np.asarray, (params, xs))

    ours = lambda: rg.lyapunov_spectrum(cell, params, state, xs, num_blocks=10)
    functions: dict[str, Callable[[], Any]] = {"rnngrad": ours}
    for label, step in (("torch.func", by_torch_func), ("by hand", by_hand)):
        functions[label] = functools.partial(torch_spectrum, step, weights, inputs)
        # two frames that start apart: O(1) nats over the run for each exponent, and nothing for their sum
        np.testing.assert_allclose(ours().exponents, functions[label](), atol=20 / num_steps)
        np.testing.assert_allclose(ours().exponents.sum(), functions[label]().sum(), rtol=1e-3)

    timings = timed(functions, repeats)
    details = {
        "N": n,
        "T": num_steps,
        "exponents": 2 * n,
        "dtype": "float32",
        **torch_beside_jax().facts(),
        "timings": milliseconds(timings),
    }
    rows = []
    for label, what, bound in (
        ("torch.func", "a PyTorch loop (torch.func.jvp, torch.linalg.qr at every step)", 3),
        ("by hand", "the same loop with the LSTM's derivative written by hand", 1),
    ):
        title = f"time of {what} / time of all {2 * n} exponents"
        rows.append(judged("spectrum_against_torch", title, ratio(timings, label, "rnngrad"), f"≥ {bound}", details))
    return rows
