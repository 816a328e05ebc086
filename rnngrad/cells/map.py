"""Any map s' = f(s, x) as a cell, so that known systems go through the same chains and spectra.

The whole map stands in ``update``: D = J and G = 0, and there are no gates to name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rnngrad.types import Cell, State


def map_cell(f: Callable[[State, Any], State]) -> Cell:
    """Returns a cell without parameters from ``f(state, x) -> state``.

    Args:
      f: a pure function; ``state`` is any pytree of floating or complex arrays, or a plain array; ``x`` any pytree.

    The state before the first step is the user's: ``init_state`` of the returned cell raises ValueError.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> henon = rg.map_cell(lambda s, x: jnp.stack([1 - 1.4 * s[0] ** 2 + s[1], 0.3 * s[0]]))
    >>> rg.unroll(henon, None, jnp.zeros(2), jnp.zeros((3, 0))).final.shape
    (2,)
    """

    def init_state(batch_shape=()):
        raise ValueError("a map has no state of its own to start from: pass the initial state yourself")

    def read(params, state):
        return state

    return Cell(
        name=f"map({getattr(f, '__name__', 'f')})",
        input_size=None,
        init=lambda key: None,
        init_state=init_state,
        preactivate=lambda params, state, x: x,
        update=lambda params, z, state: (f(state, z), None),
        read=read,
    )
