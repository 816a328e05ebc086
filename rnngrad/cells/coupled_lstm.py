"""LSTM with coupled input and forget gates: what is forgotten makes room for what comes in.

::

    z_f, z_g, z_o = W x + U h + b
    c' = f ⊙ c + (1 − f) ⊙ g
    h' = o ⊙ tanh c'

Direct path c→c: diag(f), as in the LSTM.

Source: Greff et al. 2017, arXiv 1503.04069, variant CIFG.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from rnngrad import initializers
from rnngrad.cells.linear import affine
from rnngrad.cells.lstm import LSTMState
from rnngrad.cells.vanilla import activation_function
from rnngrad.types import Cell, DTypeLike, Real, remembered


class CoupledLSTMParams(NamedTuple):
    """Fused weights, gate order f g o."""

    w_ih: Inexact[Array, "3N D"]
    w_hh: Inexact[Array, "3N N"]
    b: Inexact[Array, " 3N"]


class CoupledLSTMGates(NamedTuple):
    """Pre-activations or activations of the three gates; the input gate is 1 − f."""

    f: Inexact[Array, "*batch N"]
    g: Inexact[Array, "*batch N"]
    o: Inexact[Array, "*batch N"]


@remembered
def coupled_lstm(
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: Real | initializers.GateBias | None = None,
    initial_memory: Real = 0.0,
    gate_activation: str = "sigmoid",
    init: str | initializers.Initialization = "torch",
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the LSTM cell with i = 1 − f; options as in :func:`rnngrad.cells.lstm`.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.coupled_lstm(3, 5, forget_bias=2.0)
    >>> cell.init(jax.random.key(0)).w_hh.shape
    (15, 5)
    """
    gate = activation_function(gate_activation)
    scheme = initializers.resolve(init, "lstm")

    def init_params(key):
        drawn = initializers.draw_fused(key, scheme, 3, hidden_size, input_size, dtype)
        b = initializers.gate_bias(
            drawn.b,
            drawn.key_bias,
            forget_bias,
            forget=0,
            input=None,
            hidden_size=hidden_size,
            preset_offset=scheme.forget_bias,
        )
        return CoupledLSTMParams(drawn.w_ih, drawn.w_hh, b)

    def init_state(batch_shape=()):
        shape = (*batch_shape, hidden_size)
        return LSTMState(h=jnp.zeros(shape, dtype), c=jnp.full(shape, initial_memory, dtype))

    def preactivate(params, state, x):
        z = affine(params.w_ih, x, params.w_hh, state.h, params.b)
        return CoupledLSTMGates(*jnp.split(z, 3, axis=-1))

    def update(params, z, state):
        gates = CoupledLSTMGates(f=gate(z.f), g=jnp.tanh(z.g), o=gate(z.o))
        c = gates.f * state.c + (1 - gates.f) * gates.g
        return LSTMState(h=gates.o * jnp.tanh(c), c=c), gates

    return Cell("coupled_lstm", input_size, init_params, init_state, preactivate, update, lambda params, state: state.h)
