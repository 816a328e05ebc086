"""One instrumented training step of an LSTM against what a user would run instead.

The instrumented step is ``jax.value_and_grad`` of a loss through ``rg.unroll`` with respect to the parameters *and* the
taps: the loss, all weight gradients, and for every step ∂L/∂s_t by the direct path and through the gates and ∂L/∂z_t.
The others return the loss and the weight gradients only: ``jax.value_and_grad`` of the plain scan of the same cell,
``flax.linen.RNN`` and ``flax.nnx.RNN`` with their ``OptimizedLSTMCell``, and a scan of ``equinox.nn.LSTMCell``.

Same weights, inputs, dtype and loss Σ w ⊙ h on all sides; equality of the loss and of every gradient is asserted first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rnngrad as rg
from benchmarks.harness import Row, matmul, milliseconds, ratio, timed

SIZES = {(20, 35, 200, 200): 101, (32, 256, 256, 256): 21, (64, 256, 512, 512): 11}
"""(B, T, D, N): Zaremba's small model, and two larger ones; and how often each is timed, the short ones more often."""
SMOKE_SIZES = {(2, 5, 3, 4): 2}


class Problem(NamedTuple):
    """Weights, inputs and the loss's weights; the loss is the sum of ``weights`` times h over all steps."""

    cell: rg.Cell
    params: rg.cells.LSTMParams
    xs: jax.Array
    weights: jax.Array


def problem(batch_size: int, num_steps: int, input_size: int, hidden_size: int) -> Problem:
    """Returns a random problem; the state starts at zero."""
    cell = rg.cells.lstm(input_size, hidden_size, forget_bias=1.0)
    key_params, key_xs, key_weights = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(key_xs, (num_steps, batch_size, input_size))
    weights = jax.random.normal(key_weights, (num_steps, batch_size, hidden_size))
    return Problem(cell, cell.init(key_params), xs, weights)


Step = Callable[[], tuple[jax.Array, Any]]
"""Returns the loss, and first among its gradients those of the weights as `rg.cells.LSTMParams` (or convertible)."""


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


def assert_equal(name: str, found: Any, expected: Any) -> None:
    """Asserts that loss and weight gradients are those of the plain scan, to the round-off of float32 sums.

    A gradient sums T · B products in an order of each library's own; its error is measured against its largest entry.
    """
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=name)


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the ratios at every size."""
    rows = []
    for size, repeats in SMOKE_SIZES.items() if smoke else SIZES.items():
        p = problem(*size)
        functions = {
            "instrumented": instrumented(p),
            "plain scan": plain_scan(p),
            "linen.RNN": linen_rnn(p),
            "nnx.RNN": nnx_rnn(p),
            "Equinox": equinox_scan(p),
        }
        value, (expected,) = functions["plain scan"]()
        convert = {"linen.RNN": from_linen, "nnx.RNN": from_nnx}
        for name, function in functions.items():
            found, gradients = function()
            assert_equal(name, (found, convert.get(name, lambda g: g)(gradients[0])), (value, expected))

        product, flops_of_product = matmul(64 if smoke else 2048)
        timings = timed({**functions, "large product": product}, repeats)
        batch_size, num_steps, input_size, hidden_size = size
        # forward and weights' gradient multiply by [x, h], the reverse scan by h alone
        flops = 2 * batch_size * num_steps * 4 * hidden_size * (2 * (input_size + hidden_size) + hidden_size)
        fractions = {
            name: (flops / timing.median) / (flops_of_product / timings["large product"].median)
            for name, timing in timings.items()
            if name != "large product"
        }
        details = {
            **dict(zip("BTDN", size, strict=True)),
            "dtype": "float32",
            "fraction of the matmul rate": {name: round(fraction, 3) for name, fraction in fractions.items()},
            "timings": milliseconds(timings),
        }
        for other, bound in (("plain scan", 0.95), ("linen.RNN", 1.0), ("nnx.RNN", 1.0), ("Equinox", 1.0)):
            quotient, spread = ratio(timings, "instrumented", other)
            what = f"time of the instrumented step / {other}, (B, T, D, N) = {size}"
            rows.append(Row("training_step", what, quotient, spread, f"≤ {bound}", quotient <= bound, details))
    return rows
