"""One instrumented training step of an LSTM against ``torch.nn.LSTM`` on the same cores.

Ours returns the loss, all weight gradients and the gradients of all taps (see ``benchmarks.training_step``); theirs the
loss and the weight gradients.  Same weights, inputs and loss; equality is asserted first.  Torch has two biases, whose
gradients are each that of our one.

It needs PyTorch, which is no dependency of this project: ``pip install torch==2.13.0``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, milliseconds, ratio, timed
from benchmarks.training_step import SIZES, SMOKE_SIZES, Problem, assert_equal, instrumented, problem

REQUIRES = "torch"
"""Package beside the project's own; without it the benchmark is left out, and that is said."""


def torch_lstm(p: Problem) -> Any:
    """Returns the step of ``torch.nn.LSTM``: zero the gradients, forward, backward."""
    import torch

    layer = torch.nn.LSTM(p.xs.shape[-1], p.weights.shape[-1])
    to_torch = lambda array: torch.from_numpy(np.array(array))
    with torch.no_grad():
        layer.weight_ih_l0.copy_(to_torch(p.params.w_ih))
        layer.weight_hh_l0.copy_(to_torch(p.params.w_hh))
        layer.bias_ih_l0.copy_(to_torch(p.params.b))
        layer.bias_hh_l0.zero_()
    xs, weights = to_torch(p.xs), to_torch(p.weights)

    def step() -> Any:
        layer.zero_grad()
        loss = (weights * layer(xs)[0]).sum()
        loss.backward()
        gradients = (layer.weight_ih_l0.grad, layer.weight_hh_l0.grad, layer.bias_ih_l0.grad)
        return loss.detach().numpy(), (rg.cells.LSTMParams(*(gradient.numpy() for gradient in gradients)),)

    return step


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratio at every size."""
    import torch

    rows = []
    for size, repeats in SMOKE_SIZES.items() if smoke else SIZES.items():
        p = problem(*size)
        functions = {"instrumented": instrumented(p), "torch.nn.LSTM": torch_lstm(p)}
        value, (gradient, _) = functions["instrumented"]()
        found, (theirs,) = functions["torch.nn.LSTM"]()
        assert_equal("torch.nn.LSTM", (found, theirs), (value, gradient))
        timings = timed(functions, repeats)
        details = {
            **dict(zip("BTDN", size, strict=True)),
            "dtype": "float32",
            "torch": torch.__version__,
            "torch threads": torch.get_num_threads(),
            "timings": milliseconds(timings),
        }
        quotient, spread = ratio(timings, "instrumented", "torch.nn.LSTM")
        what = f"time of the instrumented step / torch.nn.LSTM, (B, T, D, N) = {size}"
        rows.append(Row("training_step_against_torch", what, quotient, spread, "≤ 1.0", quotient <= 1.0, details))
    return rows
