"""LSTM with peephole connections: the gates also see the memory.

::

    z_i = (W x + U h + b)_i + p_i ⊙ c      z_f likewise with p_f      z_g as in the LSTM
    c'  = f ⊙ c + i ⊙ g
    o   = σ((W x + U h + b)_o + p_o ⊙ c')  the output gate sees the *new* memory
    h'  = o ⊙ tanh c'

At frozen z the direct path c→c is still diag(f), but ∂c'/∂c as a whole is diag(f + p_f c f' + p_i g i'): the peepholes
are gated paths.  p_o ⊙ c' is formed inside ``update``, since c' exists only there; the p_o path from c to h' is
therefore part of the direct path, and ``z.o`` is the pre-activation without its peephole.

Source: Gers, Schraudolph & Schmidhuber 2002, "Learning precise timing with LSTM recurrent networks".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from rnngrad import initializers
from rnngrad.cells.linear import affine, per_unit
from rnngrad.cells.lstm import LSTMGates, LSTMState
from rnngrad.cells.vanilla import activation_function
from rnngrad.types import Cell, DTypeLike, Real, remembered


class PeepholeLSTMParams(NamedTuple):
    """Fused weights in the order i f g o, and the three peephole vectors."""

    w_ih: Inexact[Array, "4N D"]
    w_hh: Inexact[Array, "4N N"]
    b: Inexact[Array, " 4N"]
    p_i: Inexact[Array, " N"]
    p_f: Inexact[Array, " N"]
    p_o: Inexact[Array, " N"]


@remembered
def peephole_lstm(
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: Real | initializers.GateBias | None = None,
    initial_memory: Real = 0.0,
    gate_activation: str = "sigmoid",
    init: str | initializers.Initialization = "torch",
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the LSTM cell with peepholes, drawn from U(±1/√N); options as in :func:`rnngrad.cells.lstm`.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.peephole_lstm(3, 5)
    >>> cell.init(jax.random.key(0)).p_f.shape
    (5,)
    """
    gate = activation_function(gate_activation)
    scheme = initializers.resolve(init, "lstm")

    def init_params(key):
        key_fused, *keys_p = jax.random.split(key, 4)
        drawn = initializers.draw_fused(key_fused, scheme, 4, hidden_size, input_size, dtype)
        b = initializers.gate_bias(
            drawn.b,
            drawn.key_bias,
            forget_bias,
            forget=1,
            input=0,
            hidden_size=hidden_size,
            preset_offset=scheme.forget_bias,
        )
        limit = hidden_size**-0.5
        peepholes = [jax.random.uniform(key_p, (hidden_size,), dtype, -limit, limit) for key_p in keys_p]
        return PeepholeLSTMParams(drawn.w_ih, drawn.w_hh, b, *peepholes)

    def init_state(batch_shape=()):
        shape = (*batch_shape, hidden_size)
        return LSTMState(h=jnp.zeros(shape, dtype), c=jnp.full(shape, initial_memory, dtype))

    def preactivate(params, state, x):
        i, f, g, o = jnp.split(affine(params.w_ih, x, params.w_hh, state.h, params.b), 4, axis=-1)
        c = state.c
        return LSTMGates(i=i + per_unit(params.p_i, c) * c, f=f + per_unit(params.p_f, c) * c, g=g, o=o)

    def update(params, z, state):
        i, f, g = gate(z.i), gate(z.f), jnp.tanh(z.g)
        c = f * state.c + i * g
        o = gate(z.o + per_unit(params.p_o, c) * c)
        return LSTMState(h=o * jnp.tanh(c), c=c), LSTMGates(i=i, f=f, g=g, o=o)

    return Cell(
        "peephole_lstm", input_size, init_params, init_state, preactivate, update, lambda params, state: state.h
    )
