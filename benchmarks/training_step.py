"""One instrumented training step of an LSTM against what a user would run instead.

The instrumented step is ``jax.value_and_grad`` of a loss through ``rg.unroll`` with respect to the parameters *and* the
taps: the loss, all weight gradients, and for every step ∂L/∂s_t by the direct path and through the gates and ∂L/∂z_t.
The others return the loss and the weight gradients only: ``jax.value_and_grad`` of the plain scan of the same cell,
``flax.linen.RNN`` and ``flax.nnx.RNN`` with their ``OptimizedLSTMCell``, a scan of ``equinox.nn.LSTMCell``, and
``jax.experimental.rnn``: its ``lstm``, which is cuDNN's, on a GPU, and ``lstm_ref``, its scan, elsewhere.

Same weights, inputs, dtype and loss Σ w ⊙ h on all sides; equality of the loss and of every gradient is asserted first,
at highest matmul precision.  Timed is the default one, as users train: on a GPU that is TF32 for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import rnn

import rnngrad as rg
from benchmarks.harness import REPORTED, Row, by_backend, judged, matmul, milliseconds, ratio, timed

SIZES = {(20, 35, 200, 200): 101, (32, 256, 256, 256): 21, (64, 256, 512, 512): 11}
"""(B, T, D, N): Zaremba's small model, and two larger ones; and how often each is timed, the short ones more often."""
SMOKE_SIZES = {(2, 5, 3, 4): 2}


class Problem(NamedTuple):
    """Weights, inputs and the loss's weights; the loss is the sum of ``weights`` times h over all steps."""

    cell: rg.Cell
    params: Any
    xs: jax.Array
    weights: jax.Array


Size = tuple[int, int, int, int]
"""(B, T, D, N)"""
lstm = functools.partial(rg.cells.lstm, forget_bias=1.0)


def problem(size: Size, make_cell: Callable[[int, int], rg.Cell] = lstm) -> Problem:
    """Returns a random problem for a cell of that input and hidden size; the state starts at zero."""
    batch_size, num_steps, input_size, hidden_size = size
    cell = make_cell(input_size, hidden_size)
    key_params, key_xs, key_weights = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(key_xs, (num_steps, batch_size, input_size))
    weights = jax.random.normal(key_weights, (num_steps, batch_size, hidden_size))
    return Problem(cell, cell.init(key_params), xs, weights)


Step = Callable[[], tuple[jax.Array, Any]]
"""Returns the loss, and first among its gradients those of the weights, as the library holds them."""


def instrumented(p: Problem) -> Step:
    """Returns our step: loss, gradients of the weights, gradients of all taps."""
    num_steps, batch_size, _ = p.xs.shape
    state = p.cell.init_state((batch_size,))

    @jax.jit
    def step(params):
        def loss(params, taps):
            return jnp.sum(p.weights * rg.unroll(p.cell, params, state, p.xs, taps=taps).states.h)

        taps = rg.zero_taps(p.cell, num_steps, (batch_size,))
        return jax.value_and_grad(loss, argnums=(0, 1))(params, taps)

    return lambda: step(p.params)


def plain_scan(p: Problem) -> Step:
    """Returns the step of the same cell under ``jax.lax.scan``, differentiated as JAX finds it."""
    state = p.cell.init_state((p.xs.shape[1],))

    @jax.jit
    def step(params):
        def loss(params):
            def body(carry, x):
                new, _ = p.cell.step(params, carry, x)
                return new, new.h

            return jnp.sum(p.weights * jax.lax.scan(body, state, p.xs)[1])

        value, gradient = jax.value_and_grad(loss)(params)
        return value, (gradient,)

    return lambda: step(p.params)


def _gates(fused: jax.Array) -> dict[str, jax.Array]:
    return dict(zip("ifgo", jnp.split(fused, 4), strict=True))


def linen_rnn(p: Problem) -> Step:
    """Returns the step of ``flax.linen.RNN``."""
    layer = flax.linen.RNN(flax.linen.OptimizedLSTMCell(p.weights.shape[-1]), time_major=True)
    w, u, b = map(_gates, p.params)
    variables = {f"i{gate}": {"kernel": w[gate].T} for gate in "ifgo"}
    variables |= {f"h{gate}": {"kernel": u[gate].T, "bias": b[gate]} for gate in "ifgo"}

    @jax.jit
    def step(variables):
        def loss(variables):
            h: Any = layer.apply({"params": {"cell": variables}}, p.xs)
            return jnp.sum(p.weights * h)

        return jax.value_and_grad(loss)(variables)

    def run():
        value, gradient = step(variables)
        return value, (gradient,)

    return run


def from_linen(gradient: Any) -> rg.cells.LSTMParams:
    """Returns linen's gradients as ours."""
    kernel = lambda side: jnp.concatenate([gradient[f"{side}{gate}"]["kernel"].T for gate in "ifgo"])
    return rg.cells.LSTMParams(kernel("i"), kernel("h"), jnp.concatenate([gradient[f"h{g}"]["bias"] for g in "ifgo"]))


def nnx_rnn(p: Problem) -> Step:
    """Returns the step of ``flax.nnx.RNN``."""
    cell = nnx.OptimizedLSTMCell(p.xs.shape[-1], p.weights.shape[-1], rngs=nnx.Rngs(0))
    cell.dense_i.kernel[...] = p.params.w_ih.T
    cell.dense_h.kernel[...] = p.params.w_hh.T
    assert cell.dense_h.bias is not None
    cell.dense_h.bias[...] = p.params.b
    # the weights apart from keys and counts, which have no gradient
    graph, *weights_and_rest = nnx.split(nnx.RNN(cell, time_major=True), nnx.Param, ...)
    weights, rest = weights_and_rest
    zeros = jnp.zeros(p.weights.shape[1:])

    @jax.jit
    def step(weights):
        loss = lambda weights: jnp.sum(p.weights * nnx.merge(graph, weights, rest)(p.xs, initial_carry=(zeros, zeros)))
        return jax.value_and_grad(loss)(weights)

    def run():
        value, gradient = step(weights)
        return value, (gradient,)

    return run


def from_nnx(gradient: Any) -> rg.cells.LSTMParams:
    """Returns nnx's gradients as ours."""
    layers = nnx.to_pure_dict(gradient)["cell"]
    return rg.cells.LSTMParams(layers["dense_i"]["kernel"].T, layers["dense_h"]["kernel"].T, layers["dense_h"]["bias"])


def equinox_scan(p: Problem) -> Step:
    """Returns the step of ``equinox.nn.LSTMCell`` under vmap and scan, as its documentation writes it."""
    cell = eqx.nn.LSTMCell(p.xs.shape[-1], p.weights.shape[-1], key=jax.random.key(0))
    cell = eqx.tree_at(lambda cell: (cell.weight_ih, cell.weight_hh, cell.bias), cell, tuple(p.params))
    zeros = jnp.zeros(p.weights.shape[1:])

    @eqx.filter_jit
    def step(cell):
        def loss(cell):
            def body(carry, x):
                carry = jax.vmap(cell)(x, carry)
                return carry, carry[0]

            return jnp.sum(p.weights * jax.lax.scan(body, (zeros, zeros), p.xs)[1])

        return eqx.filter_value_and_grad(loss)(cell)

    def run():
        value, gradient = step(cell)
        return value, (rg.cells.LSTMParams(gradient.weight_ih, gradient.weight_hh, gradient.bias),)

    return run


def jax_rnn(p: Problem) -> Step:
    """Returns the step of ``jax.experimental.rnn``, batch first and with its two biases."""
    _, batch_size, input_size = p.xs.shape
    hidden_size = p.weights.shape[-1]
    xs, weights = jnp.swapaxes(p.xs, 0, 1), jnp.swapaxes(p.weights, 0, 1)
    lengths = jnp.full(batch_size, len(p.xs), jnp.int32)
    zeros = jnp.zeros((1, batch_size, hidden_size))
    sizes = (input_size, hidden_size, 1, 0.0, False)  # one layer, no dropout, one direction

    def outputs(layer):
        if jax.default_backend() == "gpu":
            packed = jnp.concatenate([leaf.ravel() for leaf in layer])
            return rnn.lstm(xs, zeros, zeros, packed, lengths, *sizes)[0]
        return rnn.lstm_ref(xs, zeros, zeros, *({0: leaf} for leaf in layer), lengths, *sizes)[0]

    @jax.jit
    def step(layer):
        return jax.value_and_grad(lambda layer: jnp.sum(weights * outputs(layer)))(layer)

    layer = (*p.params, jnp.zeros_like(p.params.b))

    def run():
        value, gradient = step(layer)
        return value, (gradient,)

    return run


def assert_equal(name: str, found: Any, expected: Any) -> None:
    """Asserts that loss and weight gradients are the expected ones, to the round-off of float32 sums.

    A gradient sums T · B products in an order of each library's own; its error is measured against its largest entry.
    """
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=name)


class Other(NamedTuple):
    """A way to take the same training step."""

    make: Callable[[Problem], Step]
    bound: str
    """Of the time of our step over its."""
    gradient: Callable[[Any], rg.cells.LSTMParams] = lambda gradient: gradient
    """Its gradient as ours."""


def others(size: Size) -> dict[str, Other]:
    """Returns what our step is compared with, on this backend."""
    on_gpu = jax.default_backend() == "gpu"
    of_jax = "jax.experimental.rnn.lstm (cuDNN)" if on_gpu else "jax.experimental.rnn.lstm_ref"
    return {
        "plain scan": Other(plain_scan, by_backend(cpu="≤ 0.95", gpu="≤ 0.5")),
        "linen.RNN": Other(linen_rnn, "≤ 0.8", from_linen),
        "nnx.RNN": Other(nnx_rnn, "≤ 0.8", from_nnx),
        "Equinox": Other(equinox_scan, "≤ 0.8"),
        of_jax: Other(jax_rnn, bound_beside_cudnn(size, cpu="≤ 0.8"), lambda layer: rg.cells.LSTMParams(*layer[:3])),
    }


def bound_beside_cudnn(size: Size, *, cpu: str) -> str:
    """Returns the bound against what runs on cuDNN where there is a GPU; it holds for the largest size, N = 512."""
    return by_backend(cpu=cpu, gpu="≤ 1.2" if size[-1] >= 512 else REPORTED)


def flops(size: Size) -> int:
    """Returns the operations of one LSTM step: forward and weights' gradient multiply by [x, h], the reverse by h."""
    batch_size, num_steps, input_size, hidden_size = size
    return 2 * batch_size * num_steps * 4 * hidden_size * (2 * (input_size + hidden_size) + hidden_size)


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios at every size."""
    rows = []
    for size, repeats in SMOKE_SIZES.items() if smoke else SIZES.items():
        p = problem(size)
        peers = others(size)
        functions = {"instrumented": instrumented(p)} | {name: peer.make(p) for name, peer in peers.items()}
        with jax.default_matmul_precision("highest"):
            found, (expected, _) = functions["instrumented"]()
            for name, peer in peers.items():
                value, (gradient,) = functions[name]()
                assert_equal(name, (value, peer.gradient(gradient)), (found, expected))

        product, flops_of_product = matmul(64 if smoke else 2048)
        timings = timed({**functions, "large product": product}, repeats)
        rate = flops_of_product / timings["large product"].median
        details = {
            **dict(zip("BTDN", size, strict=True)),
            "dtype": "float32",
            "fraction of the matmul rate": {
                name: round(flops(size) / timings[name].median / rate, 3) for name in functions
            },
            "timings": milliseconds(timings),
        }
        for name, peer in peers.items():
            what = f"time of the instrumented step / {name}, (B, T, D, N) = {size}"
            rows.append(judged("training_step", what, ratio(timings, "instrumented", name), peer.bound, details))
    return rows
