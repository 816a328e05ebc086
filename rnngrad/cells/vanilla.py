"""Vanilla (Elman) cell.

::

    z  = W x + U h + b
    h' = φ(z)             φ ∈ tanh, sigmoid, relu, identity

Nothing of h reaches h' beside the pre-activation: D = 0, J = G = diag(φ'(z)) U.  W is ``w_ih``, U is ``w_hh``.

Source: Elman 1990; Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, eq. 2, with φ applied to the whole sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from rnngrad import initializers
from rnngrad.cells.linear import affine
from rnngrad.types import Cell, DTypeLike, Real, remembered

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "identity": lambda z: z,
}


class VanillaParams(NamedTuple):
    """Weights of the vanilla cell."""

    w_ih: Inexact[Array, "N D"]
    w_hh: Inexact[Array, "N N"]
    b: Inexact[Array, " N"]


class VanillaState(NamedTuple):
    """State of the vanilla cell."""

    h: Inexact[Array, "*batch N"]


class VanillaGates(NamedTuple):
    """The one pre-activation, named after the state it becomes."""

    h: Inexact[Array, "*batch N"]


def activation_function(name: str) -> Callable[[Array], Array]:
    """Returns φ by name.

    Raises:
      ValueError: unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected one of: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@remembered
def vanilla(
    input_size: int,
    hidden_size: int,
    *,
    activation: str = "tanh",
    init: str | initializers.Initialization = "torch",
    initial_memory: Real = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the vanilla cell h' = φ(W x + U h + b).

    Args:
      input_size: D.
      hidden_size: N.
      activation: φ.
      init: a preset name or a scheme of :mod:`rnngrad.initializers`.
      initial_memory: every entry of h before the first step.
      dtype: floating dtype of weights and state.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.vanilla(3, 5)
    >>> state, gates = cell.step(cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones(3))
    >>> state.h.shape
    (5,)
    """
    phi = activation_function(activation)
    scheme = initializers.resolve(init, "vanilla")

    def init_params(key):
        drawn = initializers.draw_fused(key, scheme, 1, hidden_size, input_size, dtype)
        return VanillaParams(drawn.w_ih, drawn.w_hh, drawn.b)

    def init_state(batch_shape=()):
        return VanillaState(h=jnp.full((*batch_shape, hidden_size), initial_memory, dtype))

    def preactivate(params, state, x):
        return VanillaGates(h=affine(params.w_ih, x, params.w_hh, state.h, params.b))

    def update(params, z, state):
        h = phi(z.h)
        return VanillaState(h=h), VanillaGates(h=h)

    return Cell("vanilla", input_size, init_params, init_state, preactivate, update, lambda params, state: state.h)
