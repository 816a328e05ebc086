"""Minimal LSTM: the gates see the input only, and forget and input share are normalised to add up to 1.

::

    f, i = σ(W_f x + b_f), σ(W_i x + b_i)
    n    = W_n x + b_n
    h'   = f/(f+i) ⊙ h + i/(f+i) ⊙ n

The direct path diag(f/(f+i)) is all of J.

Source: Feng et al. 2024, arXiv 2410.01201, section 3.2 with length independence scaling.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from rnngrad import initializers
from rnngrad.cells.gru import GRUState
from rnngrad.cells.linear import matvec, per_unit
from rnngrad.types import Cell, DTypeLike, Real, remembered


class MinLSTMParams(NamedTuple):
    """Fused input weights, gate order i f n."""

    w_ih: Inexact[Array, "3N D"]
    b: Inexact[Array, " 3N"]


class MinLSTMGates(NamedTuple):
    """Input gate, forget gate (both before normalisation) and candidate."""

    i: Inexact[Array, "*batch N"]
    f: Inexact[Array, "*batch N"]
    n: Inexact[Array, "*batch N"]


@remembered
def min_lstm(
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: Real | initializers.GateBias | None = None,
    initial_memory: Real = 0.0,
    init: str | initializers.Initialization = "torch",
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the minLSTM cell; options as in :func:`rnngrad.cells.lstm`.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.min_lstm(3, 5)
    >>> cell.init(jax.random.key(0)).w_ih.shape
    (15, 3)
    """
    scheme = initializers.resolve(init, "lstm")

    def init_params(key):
        drawn = initializers.draw_fused(key, scheme, 3, hidden_size, input_size, dtype, recurrent=False)
        b = initializers.gate_bias(
            drawn.b,
            drawn.key_bias,
            forget_bias,
            forget=1,
            input=0,
            hidden_size=hidden_size,
            preset_offset=scheme.forget_bias,
        )
        return MinLSTMParams(drawn.w_ih, b)

    def init_state(batch_shape=()):
        return GRUState(h=jnp.full((*batch_shape, hidden_size), initial_memory, dtype))

    def preactivate(params, state, x):
        z = matvec(params.w_ih, x)
        return MinLSTMGates(*jnp.split(z + per_unit(params.b, z), 3, axis=-1))

    def update(params, z, state):
        # f/(f+i) from the difference of log-sigmoids: right also where both gates have underflowed
        share = jax.nn.sigmoid(jax.nn.log_sigmoid(z.f) - jax.nn.log_sigmoid(z.i))
        h = share * state.h + (1 - share) * z.n
        return GRUState(h=h), MinLSTMGates(i=jax.nn.sigmoid(z.i), f=jax.nn.sigmoid(z.f), n=z.n)

    return Cell("min_lstm", input_size, init_params, init_state, preactivate, update, lambda params, state: state.h)
