"""All lags of one chain, against what a user of PyTorch would write.

* ``torch.func.jacrev`` once per lag, through the loop from k to T; some lags are timed and summed up as in
  `benchmarks.chain_against_alternatives`;
* hooks: one forward pass whose states keep their gradient (``retain_grad``), then a backward pass per row of the
  identity, N of them, each of which gives that row of ∂c_T/∂c_k for every k;
* the same N rows in one backward pass (``torch.autograd.grad`` with ``is_grads_batched``).

All measure ∂c_T/∂c_k of the same LSTM in float32.  ``retain_grad`` on c_k itself would add the path through
h_k = o ⊙ tanh(c_k), which is another entry of the step Jacobian; the loop therefore hands a copy of c_k to the next
step, and it is the copy that keeps the gradient.  Equality is asserted first, at lags that plain floats still hold.

It needs PyTorch, which is no dependency of this project: ``pip install torch==2.13.0``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

import rnngrad as rg
from benchmarks.chain_against_alternatives import HELD, against_every_lag, sampled_lags
from benchmarks.harness import Row, judged, lstm_problem, milliseconds, ratio, timed, torch_beside_jax

REQUIRES = "torch"
"""Package beside the project's own; without it the benchmark is left out, and that is said."""


def _step(w_hh: Any, x: Any, h: Any, c: Any) -> tuple[Any, Any]:
    """Returns h and c after one step; ``x`` is W x + b."""
    import torch

    i, f, g, o = (x + w_hh @ h).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def by_jacrev(w_hh: Any, inputs: Any, h: Any, c: Any) -> Any:
    """Returns ∂c_T/∂c_0 of the steps in ``inputs``."""
    import torch

    def end(c):
        state = (h, c)
        for x in inputs:
            state = _step(w_hh, x, *state)
        return state[1]

    found = torch.func.jacrev(end)(c)
    torch_beside_jax().wait()
    return found


def _kept_copies(w_hh: Any, inputs: Any, h: Any, c: Any) -> tuple[list[Any], Any]:
    """Returns the copies of c_0 … c_{T−1} that the steps read, and c_T."""
    copies: list[Any] = []
    for x in inputs:
        copies.append(c.clone() if copies else c.clone().requires_grad_())
        h, c = _step(w_hh, x, h, copies[-1])
    return copies, c


def by_hooks(w_hh: Any, inputs: Any, h: Any, c: Any) -> np.ndarray:
    """Returns ‖∂c_T/∂c_k‖² for k = 0 … T−1, by one backward pass per row."""
    import torch

    copies, end = _kept_copies(w_hh, inputs, h, c)
    for copy in copies:
        copy.retain_grad()
    squared = torch.zeros(len(copies), device=c.device)
    for row in range(len(end)):
        end[row].backward(retain_graph=True)
        squared += torch.stack([copy.grad for copy in copies]).square().sum(dim=1)
        for copy in copies:
            copy.grad = None
    found: np.ndarray = squared.cpu().numpy()
    return found


def by_batched_backward(w_hh: Any, inputs: Any, h: Any, c: Any) -> np.ndarray:
    """Returns the same by one backward pass for all rows."""
    import torch

    copies, end = _kept_copies(w_hh, inputs, h, c)
    rows = torch.eye(len(end), device=c.device)
    chains = torch.autograd.grad(end, copies, rows, is_grads_batched=True)
    found: np.ndarray = torch.stack([chain.square().sum() for chain in chains]).cpu().numpy()
    return found


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios; N = 128, T = 1000, or a few steps with ``smoke``."""
    n, num_steps, repeats = (16, 50, 2) if smoke else (128, 1000, 3)
    cell, params, state, xs = lstm_problem(n, num_steps)
    states = jax.tree.map(
        lambda first, later: np.concatenate([first[None], later]), state, rg.unroll(cell, params, state, xs).states
    )
    peer = torch_beside_jax()
    w_ih, w_hh, b, inputs, h, c = peer.tensors(*params, xs, *states)
    inputs = inputs @ w_ih.T + b

    all_lags = lambda: rg.retention(cell, params, state, xs, of="c", wrt="c").log_norm
    lags = sampled_lags(num_steps, 4 if smoke else 10)
    one_lag = {lag: functools.partial(by_jacrev, w_hh, inputs[-lag:], h[-lag - 1], c[-lag - 1]) for lag in lags}
    backward = {
        "hooks": functools.partial(by_hooks, w_hh, inputs, h[0], c[0]),
        "batched backward": functools.partial(by_batched_backward, w_hh, inputs, h[0], c[0]),
    }

    found = np.asarray(all_lags())
    held = np.flatnonzero(found[1:] > HELD)
    for name, function in backward.items():
        log_norm = 0.5 * np.log(np.flip(function())[held] / n)
        np.testing.assert_allclose(log_norm, found[1:][held], rtol=1e-4, atol=1e-3, err_msg=name)
    for lag in lags:
        if found[lag] > HELD:
            norm = np.linalg.norm(one_lag[lag]().cpu().numpy()) / np.sqrt(n)
            np.testing.assert_allclose(np.log(norm), found[lag], rtol=1e-4, atol=1e-4, err_msg=f"lag {lag}")

    timings = timed(
        {"all lags": all_lags, **backward, **{f"lag {lag}": function for lag, function in one_lag.items()}}, repeats
    )
    details = {
        "N": n,
        "T": num_steps,
        "dtype": "float32",
        "sum over all lags": f"trapezoid over lags {', '.join(map(str, lags))}",
        **peer.facts(),
        "timings": milliseconds(timings),
    }
    name = "chain_against_torch"
    every, hooks, batched = (
        f"time of torch.func.jacrev once per lag / time of all {num_steps} lags",
        f"time of {n} backward passes in PyTorch with retain_grad on every state / time of all {num_steps} lags",
        f"time of one backward pass of {n} rows in PyTorch, batched / time of all {num_steps} lags",
    )
    return [
        judged(name, every, against_every_lag(timings, lags), "≥ 400", details),
        judged(name, hooks, ratio(timings, "hooks", "all lags"), "≥ 2", details),
        judged(name, batched, ratio(timings, "batched backward", "all lags"), "≥ 2", details),
    ]
