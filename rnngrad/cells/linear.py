"""The one matrix-vector product that cells use: weights are (out, in), vectors sit on the last axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact


def matvec(w: Inexact[Array, "M N"], v: Inexact[Array, "*batch N"]) -> Inexact[Array, "*batch M"]:
    """Returns ``w v`` on the last axis: (M, N) times (…, N) gives (…, M)."""
    return jax.lax.dot_general(v, w, (((v.ndim - 1,), (1,)), ((), ())))


def per_unit(vector: Inexact[Array, "M"], like: Inexact[Array, "*batch M"]) -> Inexact[Array, "*batch M"]:
    """Returns a per-unit vector (a bias, a peephole) spread over the batch of ``like``."""
    return jnp.broadcast_to(vector, like.shape)


def affine(
    w_ih: Inexact[Array, "M D"],
    x: Inexact[Array, "*batch D"],
    w_hh: Inexact[Array, "M N"],
    h: Inexact[Array, "*batch N"],
    b: Inexact[Array, "M"],
) -> Inexact[Array, "*batch M"]:
    """Returns W x + U h + b with W = ``w_ih`` and U = ``w_hh``."""
    z = matvec(w_ih, x) + matvec(w_hh, h)
    return z + per_unit(b, z)
