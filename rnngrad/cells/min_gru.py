"""Minimal GRU: the gates see the input only.

::

    u  = σ(W_u x + b_u)          u is the share kept, 1 − z of the paper
    n  = W_n x + b_n
    h' = (1 − u) ⊙ n + u ⊙ h

Nothing of h enters a gate, so the direct path diag(u) is all of J.

Source: Feng et al. 2024, arXiv 2410.01201, section 3.1.
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


class MinGRUParams(NamedTuple):
    """Fused input weights, gate order u n."""

    w_ih: Inexact[Array, "2N D"]
    b: Inexact[Array, " 2N"]


class MinGRUGates(NamedTuple):
    """Share kept and candidate."""

    u: Inexact[Array, "*batch N"]
    n: Inexact[Array, "*batch N"]


@remembered
def min_gru(
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: Real | initializers.GateBias | None = None,
    initial_memory: Real = 0.0,
    init: str | initializers.Initialization = "torch",
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the minGRU cell; options as in :func:`rnngrad.cells.gru`.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.min_gru(3, 5)
    >>> cell.init(jax.random.key(0)).w_ih.shape
    (10, 3)
    """
    scheme = initializers.resolve(init, "gru")

    def init_params(key):
        drawn = initializers.draw_fused(key, scheme, 2, hidden_size, input_size, dtype, recurrent=False)
        b = initializers.gate_bias(
            drawn.b,
            drawn.key_bias,
            forget_bias,
            forget=0,
            input=None,
            hidden_size=hidden_size,
            preset_offset=scheme.forget_bias,
        )
        return MinGRUParams(drawn.w_ih, b)

    def init_state(batch_shape=()):
        return GRUState(h=jnp.full((*batch_shape, hidden_size), initial_memory, dtype))

    def preactivate(params, state, x):
        z = matvec(params.w_ih, x)
        return MinGRUGates(*jnp.split(z + per_unit(params.b, z), 2, axis=-1))

    def update(params, z, state):
        u = jax.nn.sigmoid(z.u)
        return GRUState(h=(1 - u) * z.n + u * state.h), MinGRUGates(u=u, n=z.n)

    return Cell("min_gru", input_size, init_params, init_state, preactivate, update, lambda params, state: state.h)
