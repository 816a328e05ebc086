"""Linear recurrent unit: a complex diagonal linear recurrence with normalised input.

::

    λ  = exp(−exp(ν) + i exp(θ))          |λ| < 1 for every real ν
    z  = exp(γ) ⊙ (B x)                   γ starts at log √(1 − |λ|²)
    h' = λ ⊙ h + z
    y  = Re(C h)                          what a read-out sees

J = D = diag(λ), the same at every step.  A complex entry counts as the real pair (Re, Im): chains are real matrices of
twice the size, in which λ is |λ| times a rotation.

Source: Orvieto et al. 2023, arXiv 2303.06349, section 3; what we leave out is the skip D x of the output, which no
gradient through time uses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from rnngrad.cells.linear import matvec, per_unit
from rnngrad.types import Cell, DTypeLike, Real, remembered


class LRUParams(NamedTuple):
    """Real parameters; ``nu_log``, ``theta_log``, ``gamma_log`` are the paper's ν^log, θ^log and γ^log."""

    nu_log: Float[Array, " N"]
    theta_log: Float[Array, " N"]
    gamma_log: Float[Array, " N"]
    b_re: Float[Array, "N D"]
    b_im: Float[Array, "N D"]
    c_re: Float[Array, "N N"]
    c_im: Float[Array, "N N"]


class LRUState(NamedTuple):
    """Complex state."""

    h: Complex[Array, "*batch N"]


class LRUGates(NamedTuple):
    """The normalised complex input; named for the state it enters."""

    h: Complex[Array, "*batch N"]


def eigenvalues(params: LRUParams) -> Complex[Array, " N"]:
    """Returns λ, the diagonal of the step Jacobian."""
    return jnp.exp(jax.lax.complex(-jnp.exp(params.nu_log), jnp.exp(params.theta_log)))


@remembered
def lru(
    input_size: int,
    hidden_size: int,
    *,
    radius: tuple[Real, Real] = (0.0, 1.0),
    max_phase: Real = 6.283185307179586,
    dtype: DTypeLike = jnp.float32,
) -> Cell:
    """Returns the LRU cell with eigenvalues drawn uniformly from a ring.

    Args:
      input_size: D.
      hidden_size: N complex units.
      radius: inner and outer radius of the ring, 0 ≤ inner < outer ≤ 1.
      max_phase: largest phase of λ in radians.
      dtype: float32 or float64; the state is the complex dtype of the same precision.

    Raises:
      ValueError: radius out of order, or a dtype with no complex counterpart.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lru(3, 5, radius=(0.9, 0.99))
    >>> bool((abs(rg.cells.eigenvalues(cell.init(jax.random.key(0)))) < 0.9901).all())
    True
    """
    inner, outer = radius
    if not 0 <= inner < outer <= 1:
        raise ValueError(f"radius: expected 0 <= inner < outer <= 1, found {radius}")
    complex_dtype = {"float32": jnp.complex64, "float64": jnp.complex128}.get(jnp.dtype(dtype).name)
    if complex_dtype is None:
        raise ValueError(f"lru: expected dtype float32 or float64, found {jnp.dtype(dtype).name}")

    def init_params(key):
        key_nu, key_theta, *keys = jax.random.split(key, 6)
        tiny = jnp.finfo(dtype).eps  # keeps |λ|² off 0 and 1, where the logarithms below are infinite
        modulus_squared = jax.random.uniform(key_nu, (hidden_size,), dtype, max(inner**2, tiny), outer**2 - tiny)
        nu_log = jnp.log(-0.5 * jnp.log(modulus_squared))
        theta_log = jnp.log(jax.random.uniform(key_theta, (hidden_size,), dtype, tiny, max_phase))
        gamma_log = 0.5 * jnp.log1p(-modulus_squared)
        b_re, b_im = (
            (2 * input_size) ** -0.5 * jax.random.normal(k, (hidden_size, input_size), dtype) for k in keys[:2]
        )
        c_re, c_im = (hidden_size**-0.5 * jax.random.normal(k, (hidden_size, hidden_size), dtype) for k in keys[2:])
        return LRUParams(nu_log, theta_log, gamma_log, b_re, b_im, c_re, c_im)

    def init_state(batch_shape=()):
        return LRUState(h=jnp.zeros((*batch_shape, hidden_size), complex_dtype))

    def preactivate(params, state, x):
        scale = jnp.exp(params.gamma_log)
        z_re, z_im = matvec(params.b_re, x), matvec(params.b_im, x)
        return LRUGates(h=jax.lax.complex(per_unit(scale, z_re) * z_re, per_unit(scale, z_im) * z_im))

    def update(params, z, state):
        h = per_unit(eigenvalues(params), state.h) * state.h + z.h
        return LRUState(h=h), z

    def read(params, state):
        return matvec(params.c_re, state.h.real) - matvec(params.c_im, state.h.imag)

    return Cell("lru", input_size, init_params, init_state, preactivate, update, read)
