"""Gated recurrent unit, reset after or before the recurrent product.

::

    r, u = σ(z_r), σ(z_u)                   z_r, z_u = W x + U h + b
    n    = tanh(a + r ⊙ z_n)                reset after:   a = W_n x + b_n,  z_n = U_n h + b_m
    n    = tanh(a + z_n)                    reset before:  a = W_n x + b_n,  z_n = U_n (r ⊙ h)
    h'   = (1 − u) ⊙ n + u ⊙ h              u is the share kept

Direct path D = diag(u).  Reset before nests r inside z_n, which is therefore not affine in h; its reset path is counted
under gate ``n`` and ``only:r`` is the direct path alone.

The "relevance gate" form of lecture notes, c' = Γ_u ⊙ c̃ + (1 − Γ_u) ⊙ c with c̃ = tanh(W [Γ_r ⊙ c, x] + b), is the reset
before cell with Γ_u = 1 − u: the same functions with the sign of the update gate's weights turned.

Source: Cho et al. 2014, arXiv 1406.1078 (before); the after form is that of cuDNN, Torch, Flax, Equinox and Keras.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from rnngrad import initializers
from rnngrad.cells.linear import matvec, per_unit
from rnngrad.types import Cell, DTypeLike, Real, remembered


class GRUParams(NamedTuple):
    """Fused weights, gate order r u n; ``b_m`` is the recurrent bias of n and stays unused when reset comes before."""

    w_ih: Inexact[Array, "3N D"]
    w_hh: Inexact[Array, "3N N"]
    b: Inexact[Array, " 3N"]
    b_m: Inexact[Array, " N"]


class GRUState(NamedTuple):
    """State of the GRU."""

    h: Inexact[Array, "*batch N"]


class GRUGates(NamedTuple):
    """Reset, share kept, candidate.

    The pre-activation of the candidate is kept in two parts, since r multiplies only one: ``n`` is what it hears from
    the state and ``a`` what it hears from the input (a gate named ``a`` carries no gradient through time).
    """

    r: Inexact[Array, "*batch N"]
    u: Inexact[Array, "*batch N"]
    n: Inexact[Array, "*batch N"]
    a: Inexact[Array, "*batch N"]


@remembered
def gru(
    input_size: int,
    hidden_size: int,
    *,
    reset: str = "after",
    forget_bias: Real | initializers.GateBias | None = None,
    initial_memory: Real = 0.0,
    init: str | initializers.Initialization = "torch",
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the GRU cell.

    Args:
      input_size: D.
      hidden_size: N.
      reset: whether r acts after or before the recurrent product of the candidate.
      forget_bias: effective bias of u, the share kept: a number, ``initializers.chrono(max_lag)``,
        ``initializers.ugi()``, or None for what ``init`` draws.
      initial_memory: every entry of h before the first step.
      init: a preset name or a scheme of :mod:`rnngrad.initializers`.
      dtype: floating dtype of weights and state.

    Raises:
      ValueError: unknown ``reset``.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.gru(3, 5, reset="before")
    >>> cell.init(jax.random.key(0)).w_hh.shape
    (15, 5)
    """
    if reset not in ("after", "before"):
        raise ValueError(f"unknown reset {reset!r}; expected 'after' or 'before'")
    scheme = initializers.resolve(init, "gru")

    def init_params(key):
        # r and u add both biases of a library that has two; n keeps them apart, inside and outside of r ⊙ (…).
        drawn = initializers.draw_fused(key, scheme, 3, hidden_size, input_size, dtype, single_biases=(2,))
        key_gate, key_m = jax.random.split(drawn.key_bias)
        b_m = scheme.b(key_m, 1, hidden_size, input_size, dtype)
        b = initializers.gate_bias(
            drawn.b,
            key_gate,
            forget_bias,
            forget=1,
            input=None,
            hidden_size=hidden_size,
            preset_offset=scheme.forget_bias,
        )
        return GRUParams(drawn.w_ih, drawn.w_hh, b, b_m if reset == "after" else jnp.zeros_like(b_m))

    def init_state(batch_shape=()):
        return GRUState(h=jnp.full((*batch_shape, hidden_size), initial_memory, dtype))

    def from_input(params, x):
        z = matvec(params.w_ih, x)
        return jnp.split(z + per_unit(params.b, z), 3, axis=-1)

    def preactivate_after(params, state, x):
        x_r, x_u, a = from_input(params, x)
        h_r, h_u, h_n = jnp.split(matvec(params.w_hh, state.h), 3, axis=-1)
        return GRUGates(r=x_r + h_r, u=x_u + h_u, n=h_n + per_unit(params.b_m, h_n), a=a)

    def preactivate_before(params, state, x):
        x_r, x_u, a = from_input(params, x)
        w_ru, w_n = params.w_hh[: 2 * hidden_size], params.w_hh[2 * hidden_size :]
        h_r, h_u = jnp.split(matvec(w_ru, state.h), 2, axis=-1)
        z_r = x_r + h_r
        return GRUGates(r=z_r, u=x_u + h_u, n=matvec(w_n, jax.nn.sigmoid(z_r) * state.h), a=a)

    def update(params, z, state):
        r, u = jax.nn.sigmoid(z.r), jax.nn.sigmoid(z.u)
        n = jnp.tanh(z.a + (r * z.n if reset == "after" else z.n))
        return GRUState(h=(1 - u) * n + u * state.h), GRUGates(r=r, u=u, n=n, a=z.a)

    preactivate = preactivate_after if reset == "after" else preactivate_before
    name = f"gru_reset_{reset}"
    return Cell(name, input_size, init_params, init_state, preactivate, update, lambda params, state: state.h)
