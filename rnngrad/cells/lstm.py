"""Long short-term memory with a forget gate.

::

    z_i, z_f, z_g, z_o = W x + U h + b        one fused 4N product, sliced in the order i f g o
    i, f, o = σ(z_i), σ(z_f), σ(z_o)          g = tanh(z_g)
    c' = f ⊙ c + i ⊙ g
    h' = o ⊙ tanh c'

Direct path D (z frozen): c→c diag(f), c→h diag(o (1 − tanh² c') f), nothing from h.  Everything else of the step
Jacobian passes through U and is the gated path.  W, U, b are ``w_ih``, ``w_hh``, ``b``.

Source: Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from rnngrad import initializers
from rnngrad.cells.linear import affine
from rnngrad.cells.vanilla import activation_function
from rnngrad.types import Cell, DTypeLike, Real, remembered


class LSTMParams(NamedTuple):
    """Fused weights, gate order i f g o."""

    w_ih: Inexact[Array, "4N D"]
    w_hh: Inexact[Array, "4N N"]
    b: Inexact[Array, " 4N"]


class LSTMState(NamedTuple):
    """State of every LSTM variant: output h and memory c."""

    h: Inexact[Array, "*batch N"]
    c: Inexact[Array, "*batch N"]


class LSTMGates(NamedTuple):
    """Pre-activations or activations of the four gates."""

    i: Inexact[Array, "*batch N"]
    f: Inexact[Array, "*batch N"]
    g: Inexact[Array, "*batch N"]
    o: Inexact[Array, "*batch N"]


@remembered
def lstm(
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: Real | initializers.GateBias | None = None,
    initial_memory: Real = 0.0,
    gate_activation: str = "sigmoid",
    init: str | initializers.Initialization = "torch",
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the LSTM cell.

    Args:
      input_size: D.
      hidden_size: N.
      forget_bias: effective bias of the forget gate: a number, ``initializers.chrono(max_lag)``,
        ``initializers.ugi()``, or None for what ``init`` draws.
      initial_memory: every entry of c before the first step (h starts at 0).
      gate_activation: what i, f and o pass through.
      init: a preset name or a scheme of :mod:`rnngrad.initializers`.
      dtype: floating dtype of weights and state.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5, forget_bias=1.0)
    >>> state, gates = cell.step(cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones(3))
    >>> state.c.shape, gates._fields
    ((5,), ('i', 'f', 'g', 'o'))
    """
    gate = activation_function(gate_activation)
    scheme = initializers.resolve(init, "lstm")

    def init_params(key):
        drawn = initializers.draw_fused(key, scheme, 4, hidden_size, input_size, dtype)
        b = initializers.gate_bias(
            drawn.b,
            drawn.key_bias,
            forget_bias,
            forget=1,
            input=0,
            hidden_size=hidden_size,
            preset_offset=scheme.forget_bias,
        )
        return LSTMParams(drawn.w_ih, drawn.w_hh, b)

    def init_state(batch_shape=()):
        shape = (*batch_shape, hidden_size)
        return LSTMState(h=jnp.zeros(shape, dtype), c=jnp.full(shape, initial_memory, dtype))

    def preactivate(params, state, x):
        z = affine(params.w_ih, x, params.w_hh, state.h, params.b)
        return LSTMGates(*jnp.split(z, 4, axis=-1))

    def update(params, z, state):
        gates = LSTMGates(i=gate(z.i), f=gate(z.f), g=jnp.tanh(z.g), o=gate(z.o))
        c = gates.f * state.c + gates.i * gates.g
        return LSTMState(h=gates.o * jnp.tanh(c), c=c), gates

    return Cell("lstm", input_size, init_params, init_state, preactivate, update, lambda params, state: state.h)
