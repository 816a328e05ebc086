"""Independently recurrent network: every unit hears only itself.

::

    z  = W x + b
    h' = φ(z + u ⊙ h)

z does not depend on the state, so the direct path diag(φ'(z + u h) u) is all of J and the chain is a product of
numbers, unit by unit.  u is drawn from U(0, 1), or from U(2^{-1/T}, 2^{1/T}) when ``max_lag`` T is given: over T steps
with φ' = 1 every unit's gradient then changes by at most a factor of 2 either way.

Source: Li et al. 2018, arXiv 1803.04831, eqs. 4 and 7.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from rnngrad import initializers
from rnngrad.cells.linear import matvec, per_unit
from rnngrad.cells.vanilla import VanillaGates, VanillaState, activation_function
from rnngrad.types import Cell, DTypeLike, Real, remembered


class IndRNNParams(NamedTuple):
    """Weights; ``u`` is the recurrent vector."""

    w_ih: Inexact[Array, "N D"]
    u: Inexact[Array, " N"]
    b: Inexact[Array, " N"]


@remembered
def indrnn(
    input_size: int,
    hidden_size: int,
    *,
    activation: str = "relu",
    max_lag: int | None = None,
    initial_memory: Real = 0.0,
    init: str | initializers.Initialization = "torch",
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the IndRNN cell.

    Args:
      input_size: D.
      hidden_size: N.
      activation: φ.
      max_lag: T, the lag over which every unit keeps its gradient within a factor of 2; None draws u from U(0, 1).
      initial_memory: every entry of h before the first step.
      init: how ``w_ih`` and ``b`` are drawn.
      dtype: floating dtype of weights and state.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.indrnn(3, 5, max_lag=100)
    >>> bool((cell.init(jax.random.key(0)).u > 0.99).all())
    True
    """
    phi = activation_function(activation)
    scheme = initializers.resolve(init, "vanilla")
    if max_lag is not None and max_lag < 1:
        raise ValueError(f"max_lag: expected at least 1, found {max_lag}")
    low, high = (0.0, 1.0) if max_lag is None else (0.5 ** (1.0 / max_lag), 2.0 ** (1.0 / max_lag))

    def init_params(key):
        key_fused, key_u = jax.random.split(key)
        drawn = initializers.draw_fused(key_fused, scheme, 1, hidden_size, input_size, dtype, recurrent=False)
        u = jax.random.uniform(key_u, (hidden_size,), dtype, low, high)
        return IndRNNParams(drawn.w_ih, u, drawn.b)

    def init_state(batch_shape=()):
        return VanillaState(h=jnp.full((*batch_shape, hidden_size), initial_memory, dtype))

    def preactivate(params, state, x):
        z = matvec(params.w_ih, x)
        return VanillaGates(h=z + per_unit(params.b, z))

    def update(params, z, state):
        h = phi(z.h + per_unit(params.u, state.h) * state.h)
        return VanillaState(h=h), VanillaGates(h=h)

    return Cell("indrnn", input_size, init_params, init_state, preactivate, update, lambda params, state: state.h)
