"""One instrumented training step of an LSTM, a GRU and a vanilla cell against ``torch.nn.LSTM``, ``GRU`` and ``RNN``.

Ours returns the loss, all weight gradients and the gradients of all taps (see ``benchmarks.training_step``); theirs the
loss and the weight gradients.  Same weights, inputs and loss; equality is asserted first, at full float32 products on
both sides.  Timed are the defaults of both: on a GPU, where Torch's layers are cuDNN's, that is TF32.  Torch has two
biases, whose gradients are each that of our one, except for the candidate of the GRU, where we have two as well.

It needs PyTorch, which is no dependency of this project: ``pip install torch==2.13.0``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import REPORTED, Row, judged, milliseconds, ratio, timed, torch_beside_jax
from benchmarks.training_step import (
    SIZES,
    SMOKE_SIZES,
    Problem,
    Size,
    assert_equal,
    bound_beside_cudnn,
    instrumented,
    lstm,
    problem,
)

REQUIRES = "torch"
"""Package beside the project's own; without it the benchmark is left out, and that is said."""


class Layer(NamedTuple):
    """A layer of Torch and the cell of ours that is the same."""

    name: str
    make_cell: Callable[[int, int], rg.Cell]
    biases: Callable[[Any], tuple[Any, Any]]
    """Our parameters -> Torch's two biases."""
    params: Callable[[Any, Any, Any, Any], Any]
    """Torch's w_ih, w_hh, b_ih, b_hh, or their gradients -> ours."""
    bound: Callable[[Size], str]


LAYERS = (
    Layer(
        "LSTM",
        lstm,
        lambda params: (params.b, jnp.zeros_like(params.b)),
        lambda w_ih, w_hh, b_ih, b_hh: rg.cells.LSTMParams(w_ih, w_hh, b_ih),
        lambda size: bound_beside_cudnn(size, cpu="≤ 1"),
    ),
    Layer(
        "GRU",
        rg.cells.gru,
        # the recurrent bias of n stands inside of r ⊙ (…); those of r and u are added to the other ones
        lambda params: (params.b, jnp.zeros_like(params.b).at[-len(params.b_m) :].set(params.b_m)),
        lambda w_ih, w_hh, b_ih, b_hh: rg.cells.GRUParams(w_ih, w_hh, b_ih, b_hh[-w_hh.shape[1] :]),
        lambda size: REPORTED,
    ),
    Layer(
        "RNN",
        rg.cells.vanilla,
        lambda params: (params.b, jnp.zeros_like(params.b)),
        lambda w_ih, w_hh, b_ih, b_hh: rg.cells.VanillaParams(w_ih, w_hh, b_ih),
        lambda size: REPORTED,
    ),
)


def torch_step(layer: Layer, p: Problem) -> Callable[[], tuple[Any, list[Any]]]:
    """Returns the step of ``torch.nn``: zero the gradients, forward, backward; its loss and gradients."""
    import torch

    peer = torch_beside_jax()
    module = getattr(torch.nn, layer.name)(p.xs.shape[-1], p.weights.shape[-1]).to(peer.device)
    weights, xs, *values = peer.tensors(p.weights, p.xs, p.params.w_ih, p.params.w_hh, *layer.biases(p.params))
    parameters = [module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0]
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)

    def step() -> tuple[Any, list[Any]]:
        module.zero_grad()
        loss = (weights * module(xs)[0]).sum()
        loss.backward()
        peer.wait()
        return loss.detach(), [parameter.grad for parameter in parameters]

    return step


def _check(layer: Layer, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Asserts that loss and gradients are the same."""
    import torch

    to_numpy: Callable[[Any], np.ndarray] = lambda tensor: tensor.cpu().numpy()
    with jax.default_matmul_precision("highest"), torch.backends.cudnn.flags(allow_tf32=False):
        value, (gradient, _) = ours()
        found, gradients = theirs()
        assert_equal(layer.name, (to_numpy(found), layer.params(*map(to_numpy, gradients))), (value, gradient))


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratio of every layer at every size."""
    rows = []
    for layer in LAYERS:
        for size, repeats in SMOKE_SIZES.items() if smoke else SIZES.items():
            p = problem(size, layer.make_cell)
            name = f"torch.nn.{layer.name}"
            functions: dict[str, Callable[[], Any]] = {"instrumented": instrumented(p), name: torch_step(layer, p)}
            _check(layer, functions["instrumented"], functions[name])
            timings = timed(functions, repeats)
            details = {
                **dict(zip("BTDN", size, strict=True)),
                "dtype": "float32",
                **torch_beside_jax().facts(),
                "timings": milliseconds(timings),
            }
            what = f"time of the instrumented step / {name}, (B, T, D, N) = {size}"
            measured = ratio(timings, "instrumented", name)
            rows.append(judged("training_step_against_torch", what, measured, layer.bound(size), details))
    return rows
