"""Backpropagation through time by hand: vanilla, LSTM and GRU, and the step Jacobians they rest on.

Nothing here is differentiated by a program: every line is a line of the derivation in ``docs/derivations.md``, in the
same symbols, and is tested against automatic differentiation.  For a loss L = Σ_t L_t(s_t)::

    δ      ∂L/∂(what follows it): δh, δc, δi, … of values, δz_i, … of pre-activations
    L_t    what the loss takes from step t alone; its ∂L_t/∂s_t is handed in as ``cotangents``
    W U b  ``w_ih`` ``w_hh`` ``b``, fused over gates;  a product with Uᵀ is a sum over gates
    ⊙ ⊗    elementwise and outer product

    δW = Σ_t δz_t ⊗ x_t     δU = Σ_t δz_t ⊗ h_{t−1}     δb = Σ_t δz_t     δx_t = Wᵀ δz_t        (all cells, δz by gate)

Gradients are columns: a step back multiplies by Jᵀ = Uᵀ diag(φ'), a tangent goes forward by J = diag(φ') U.  The
Jacobians come split as J = D + G, D at frozen pre-activations and G through them.

States count as the chains count them: ∂L/∂c_t is taken with h_t held, since s_t = (h_t, c_t) are two fields.  The δc_t
of the LSTM's derivation is the *total*, through h_t = o_t ⊙ tanh c_t too; it is a result of its own, ``delta_c``.

The derivative of an activation is written in its value, as in the papers: σ' = σ(1 − σ), tanh' = 1 − tanh².  States and
gates come from :func:`rnngrad.unroll`, so that a gradient belongs to the very run that the loss saw.  Matrix products
of the way back run at highest precision.  Units are those of L over those of the variable.

Sources: Werbos 1990 (backpropagation through time); Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, eqs. 3-5
(vanilla); Hochreiter & Schmidhuber 1997 (LSTM, truncated); Graves & Schmidhuber 2005 (LSTM, in full); Cho et al. 2014,
arXiv 1406.1078 (GRU).  In place of sums over pairs of steps (t, k) one recursion carries δ back; the two are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rnngrad import cells
from rnngrad.cells import (
    GRUGates,
    GRUParams,
    GRUState,
    LSTMGates,
    LSTMParams,
    LSTMState,
    VanillaGates,
    VanillaParams,
    VanillaState,
)
from rnngrad.jacobians import MATMUL_PRECISION
from rnngrad.types import Cell, Gates, Params, State, Trajectory, check_inputs, check_like
from rnngrad.unroll import unroll


class Gradients(NamedTuple):
    """Every derivative of L that one pass back gives; each field has the structure of what it belongs to."""

    params: Params
    """δW, δU, δb."""
    state: State
    """δs_0."""
    xs: Any
    """δx_t, shape (T, D)."""
    states: State
    """δs_t in total, ``states[t]`` for s_{t+1}, leading axis T."""
    gates: Gates
    """δ of the gate activations, leading axis T."""
    z: Gates
    """δ of the pre-activations, leading axis T."""


class LSTMGradients(NamedTuple):
    """Every derivative of L with respect to an LSTM's run; fields of :class:`Gradients`, and δc in total."""

    params: LSTMParams
    """δW, δU, δb, gate order i f g o."""
    state: LSTMState
    """δh_0 and δc_0, c_0 with h_0 held."""
    xs: Any
    """δx_t, shape (T, D)."""
    states: LSTMState
    """δh_t, and ∂L/∂c_t with h_t held, leading axis T."""
    delta_c: Any
    """δc_t in total, through h_t = o_t ⊙ tanh c_t too, shape (T, N)."""
    gates: LSTMGates
    """δi, δf, δg, δo, leading axis T."""
    z: LSTMGates
    """δz_i, δz_f, δz_g, δz_o, leading axis T."""


class StepJacobian(NamedTuple):
    """J = ∂s'/∂s of one step, row = output, in its two parts."""

    D: Float[Array, "*steps S S"]
    """Direct path: at frozen pre-activations."""
    G: Float[Array, "*steps S S"]
    """Gated path: through the pre-activations."""

    @property
    def full(self) -> Float[Array, "*steps S S"]:
        """J = D + G."""
        return self.D + self.G


_SLOPES: dict[str, Callable[[Array], Array]] = {
    "tanh": lambda value: 1 - value**2,
    "sigmoid": lambda value: value * (1 - value),
    "relu": lambda value: (value > 0).astype(value.dtype),
    "identity": jnp.ones_like,
}


def slope(activation: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns φ'(z) from the value φ(z).

    σ' = σ(1 − σ) = 1/4 − (σ − 1/2)² is at most **1/4**, reached at z = 0; sup|φ'| = 1 for the others.  relu'(0) is 0.

    Args:
      activation: φ: tanh, sigmoid, relu or identity.
      value: φ(z).

    Raises:
      ValueError: unknown activation.

    >>> import jax
    >>> import rnngrad as rg
    >>> print(float(rg.formulas.slope("sigmoid", jax.numpy.array(0.5))))
    0.25
    """
    if activation not in _SLOPES:
        raise ValueError(f"unknown activation {activation!r}; expected one of: {', '.join(_SLOPES)}")
    return _SLOPES[activation](value)


# --- the run that is differentiated ----------------------------------------------------------------------------------


def _sizes(params: Params) -> tuple[int, int]:
    """D and N, from W and U; the dtype of a cell plays no part here, it only draws weights."""
    return params.w_ih.shape[-1], params.w_hh.shape[-1]


def _run(cell: Cell, params: Params, state: State, xs: Any, cotangents: State) -> tuple[Trajectory, State]:
    """Returns the run, and the states before each of its steps: s_0 … s_{T−1}."""
    check_inputs(cell, params, state, xs, one_sequence=True)
    run = unroll(cell, params, state, xs)
    check_like(cotangents, run.states, what="cotangents", dtypes=True)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), state, run.states)
    return run, before


def _one_step(cell: Cell, params: Params, state: State, x: Any) -> tuple[State, Gates]:
    """Returns s' and the gates of one step, after the checks that the user is owed."""
    check_inputs(cell, params, state, jnp.asarray(x)[None], one_sequence=True)
    return cell.step(params, state, x)


# --- vanilla ---------------------------------------------------------------------------------------------------------


def vanilla_gradients(
    params: VanillaParams, state: VanillaState, xs: Any, cotangents: VanillaState, *, activation: str = "tanh"
) -> Gradients:
    """Returns every gradient of a loss of the states of h_t = φ(z_t), z_t = W x_t + U h_{t−1} + b.

    ::

        δh_t = ∂L_t/∂h_t + Uᵀ δz_{t+1}          δz_t = φ'(z_t) ⊙ δh_t

    Args:
      params: W, U, b.
      state: h_0, one sequence.
      xs: inputs, shape (T, D).
      cotangents: ∂L_t/∂h_t, fields of shape (T, N).
      activation: φ.

    Raises:
      ValueError: unknown activation, or shapes, dtypes or structures that do not fit.

    Reference: Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, eqs. 3-5.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell, xs = rg.cells.vanilla(3, 5), jax.random.normal(jax.random.key(1), (7, 3))
    >>> params, state = cell.init(jax.random.key(0)), cell.init_state()
    >>> only_last = jax.tree.map(jax.numpy.zeros_like, rg.unroll(cell, params, state, xs).states).h.at[-1].set(1.0)
    >>> rg.formulas.vanilla_gradients(params, state, xs, rg.cells.VanillaState(only_last)).params.w_hh.shape
    (5, 5)
    """
    run, before = _run(cells.vanilla(*_sizes(params), activation=activation), params, state, xs, cotangents)
    U = params.w_hh

    def step(from_later, now):
        dL_dh, h = now
        dh = dL_dh + from_later
        dz = dh * slope(activation, h)
        return U.T @ dz, (dh, dz)

    with jax.default_matmul_precision(MATMUL_PRECISION):
        dh_0, (dh, dz) = jax.lax.scan(step, jnp.zeros_like(state.h), (cotangents.h, run.states.h), reverse=True)
        return Gradients(
            params=VanillaParams(w_ih=dz.T @ xs, w_hh=dz.T @ before.h, b=jnp.sum(dz, axis=0)),
            state=VanillaState(dh_0),
            xs=dz @ params.w_ih,
            states=VanillaState(dh),
            gates=VanillaGates(dh),
            z=VanillaGates(dz),
        )


def vanilla_jacobian(params: VanillaParams, state: VanillaState, x: Any, *, activation: str = "tanh") -> StepJacobian:
    """Returns ∂h'/∂h = diag(φ'(z)) U of one vanilla step; D = 0.

    Args:
      params: W, U, b.
      state: h.
      x: input, shape (D,).
      activation: φ.

    Raises:
      ValueError: unknown activation, or shapes, dtypes or structures that do not fit.

    Reference: Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, eq. 5, transposed: row = output.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.vanilla(3, 5)
    >>> rg.formulas.vanilla_jacobian(cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones(3)).full.shape
    (5, 5)
    """
    new, _ = _one_step(cells.vanilla(*_sizes(params), activation=activation), params, state, x)
    return StepJacobian(D=jnp.zeros_like(params.w_hh), G=_scale_rows(slope(activation, new.h), params.w_hh))


def _scale_rows(v: Array, matrix: Array) -> Array:
    """diag(v) A."""
    return v[:, None] * matrix


def _scale_columns(matrix: Array, v: Array) -> Array:
    """A diag(v)."""
    return matrix * v[None, :]


# --- LSTM ------------------------------------------------------------------------------------------------------------


def _lstm_gradients(
    params: LSTMParams,
    state: LSTMState,
    xs: Any,
    cotangents: LSTMState,
    to_h_before: Callable[[Array], Array],
) -> LSTMGradients:
    """The pass back through an LSTM; ``to_h_before`` says what δz_{t+1}, all gates on one axis, adds to δh_t."""
    run, before = _run(cells.lstm(*_sizes(params)), params, state, xs, cotangents)

    def step(from_later, now):
        dL, c_before, c, (i, f, g, o) = now
        dh = dL.h + from_later.h
        dc_with_h_held = dL.c + from_later.c
        dc = dc_with_h_held + dh * o * (1 - jnp.tanh(c) ** 2)
        gates = LSTMGates(i=dc * g, f=dc * c_before, g=dc * i, o=dh * jnp.tanh(c))
        z = LSTMGates(
            i=gates.i * i * (1 - i),
            f=gates.f * f * (1 - f),
            g=gates.g * (1 - g**2),
            o=gates.o * o * (1 - o),
        )
        to_earlier = LSTMState(h=to_h_before(jnp.concatenate(z)), c=dc * f)
        return to_earlier, (LSTMState(dh, dc_with_h_held), dc, gates, z)

    with jax.default_matmul_precision(MATMUL_PRECISION):
        ds_0, (ds, dc, gates, z) = jax.lax.scan(
            step,
            jax.tree.map(jnp.zeros_like, state),
            (cotangents, before.c, run.states.c, run.gates),
            reverse=True,
        )
        dz = jnp.concatenate(z, axis=-1)
        return LSTMGradients(
            params=LSTMParams(w_ih=dz.T @ xs, w_hh=dz.T @ before.h, b=jnp.sum(dz, axis=0)),
            state=ds_0,
            xs=dz @ params.w_ih,
            states=ds,
            delta_c=dc,
            gates=gates,
            z=z,
        )


def lstm_gradients(params: LSTMParams, state: LSTMState, xs: Any, cotangents: LSTMState) -> LSTMGradients:
    """Returns every gradient of a loss of the states of an LSTM (gates σ, no peepholes).

    ::

        δh_t = ∂L_t/∂h_t + Uᵀ δz_{t+1}                                             all four gates in δz
        δc_t = ∂L_t/∂c_t + δh_t ⊙ o_t ⊙ (1 − tanh² c_t) + δc_{t+1} ⊙ f_{t+1}       in total

        δz_i = δc_t ⊙ g_t ⊙ i_t (1 − i_t)             δz_f = δc_t ⊙ c_{t−1} ⊙ f_t (1 − f_t)
        δz_g = δc_t ⊙ i_t ⊙ (1 − g_t²)                δz_o = δh_t ⊙ tanh c_t ⊙ o_t (1 − o_t)

    Args:
      params: W, U, b, gate order i f g o.
      state: (h_0, c_0), one sequence.
      xs: inputs, shape (T, D).
      cotangents: ∂L_t/∂h_t and ∂L_t/∂c_t, fields of shape (T, N).

    Raises:
      ValueError: shapes, dtypes or structures that do not fit.

    Reference: Graves & Schmidhuber 2005, Neural Networks 18(5-6), appendix, without peepholes.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell, xs = rg.cells.lstm(3, 5), jax.random.normal(jax.random.key(1), (7, 3))
    >>> params, state = cell.init(jax.random.key(0)), cell.init_state()
    >>> ones = jax.tree.map(jax.numpy.ones_like, rg.unroll(cell, params, state, xs).states)  # L sums all states
    >>> rg.formulas.lstm_gradients(params, state, xs, ones).delta_c.shape
    (7, 5)
    """
    return _lstm_gradients(params, state, xs, cotangents, lambda dz: params.w_hh.T @ dz)


def truncated_lstm_gradients(params: LSTMParams, state: LSTMState, xs: Any, cotangents: LSTMState) -> LSTMGradients:
    """Returns the *truncated* LSTM gradient, which is not the gradient: what the gates heard from h_{t−1} is cut.

    ::

        δh_t = ∂L_t/∂h_t                                                           and nothing from later steps
        δc_t = ∂L_t/∂c_t + δh_t ⊙ o_t ⊙ (1 − tanh² c_t) + δc_{t+1} ⊙ f_{t+1}

    and all else as in :func:`lstm_gradients`.  It is the exact gradient of a run whose gates read a constant in place
    of h_{t−1}.  How far it is from the true one, ``experiments.truncated_gradient`` measures.

    Args:
      params: W, U, b, gate order i f g o.
      state: (h_0, c_0), one sequence.
      xs: inputs, shape (T, D).
      cotangents: ∂L_t/∂h_t and ∂L_t/∂c_t, fields of shape (T, N).

    Raises:
      ValueError: shapes, dtypes or structures that do not fit.

    Reference: Hochreiter & Schmidhuber 1997, appendix; its forget gate: Gers, Schmidhuber & Cummins 2000.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell, xs = rg.cells.lstm(3, 5), jax.random.normal(jax.random.key(1), (7, 3))
    >>> params, state = cell.init(jax.random.key(0)), cell.init_state()
    >>> ones = jax.tree.map(jax.numpy.ones_like, rg.unroll(cell, params, state, xs).states)
    >>> bool(jax.numpy.all(rg.formulas.truncated_lstm_gradients(params, state, xs, ones).states.h == ones.h))
    True
    """
    return _lstm_gradients(params, state, xs, cotangents, lambda dz: jnp.zeros_like(state.h))


def _lstm_terms(params: LSTMParams, state: LSTMState, x: Any) -> tuple[LSTMState, LSTMGates, Array, Array]:
    """Returns s', the gates, ∂c'/∂h at held c, and U_o."""
    new, gates = _one_step(cells.lstm(*_sizes(params)), params, state, x)
    i, f, g, _ = gates
    U_i, U_f, U_g, U_o = jnp.split(params.w_hh, 4)
    dc_dh = (
        _scale_rows(state.c * f * (1 - f), U_f) + _scale_rows(g * i * (1 - i), U_i) + _scale_rows(i * (1 - g**2), U_g)
    )
    return new, gates, dc_dh, U_o


def lstm_jacobian(params: LSTMParams, state: LSTMState, x: Any) -> StepJacobian:
    """Returns ∂(h', c')/∂(h, c) of one LSTM step, shape (2N, 2N), fields in the order h, c.

    ::

        K = ∂c'/∂h = diag(c ⊙ f (1 − f)) U_f + diag(g ⊙ i (1 − i)) U_i + diag(i ⊙ (1 − g²)) U_g
        m = ∂h'/∂c' = o ⊙ (1 − tanh² c')

        D = [ 0   diag(m ⊙ f) ]      G = [ diag(tanh c' ⊙ o (1 − o)) U_o + diag(m) K   0 ]
            [ 0   diag(f)     ]          [ K                                           0 ]

    Args:
      params: W, U, b, gate order i f g o.
      state: (h, c).
      x: input, shape (D,).

    Raises:
      ValueError: shapes, dtypes or structures that do not fit.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> rg.formulas.lstm_jacobian(cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones(3)).full.shape
    (10, 10)
    """
    new, gates, K, U_o = _lstm_terms(params, state, x)
    f, o = gates.f, gates.o
    m = o * (1 - jnp.tanh(new.c) ** 2)
    zero = jnp.zeros_like(K)
    return StepJacobian(
        D=jnp.block([[zero, jnp.diag(m * f)], [zero, jnp.diag(f)]]),
        G=jnp.block([[_scale_rows(jnp.tanh(new.c) * o * (1 - o), U_o) + _scale_rows(m, K), zero], [K, zero]]),
    )


def lstm_memory_jacobian(
    params: LSTMParams, state: LSTMState, x: Any, output_gate: Float[Array, " N"]
) -> Float[Array, "N N"]:
    """Returns ∂c_t/∂c_{t−1} of an LSTM with h_{t−1} = o_{t−1} ⊙ tanh c_{t−1} followed one step further back.

    ::

        ∂c_t/∂c_{t−1} = diag(f_t) + K_t diag(o_{t−1} ⊙ (1 − tanh² c_{t−1}))        K as in :func:`lstm_jacobian`

    diag(f_t) alone is the derivative with h_{t−1} held.  Products of this matrix are not ∂c_T/∂c_k either: o_{t−1} is
    held, and through it c_t also hears h_{t−2}.  The chain of :func:`lstm_jacobian` leaves out nothing.

    Args:
      params: W, U, b, gate order i f g o.
      state: (h_{t−1}, c_{t−1}).
      x: x_t, shape (D,).
      output_gate: o_{t−1}, the gate that made ``state.h``.

    Raises:
      ValueError: shapes, dtypes or structures that do not fit.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> params = cell.init(jax.random.key(0))
    >>> state, gates = cell.step(params, cell.init_state(), jax.numpy.ones(3))
    >>> rg.formulas.lstm_memory_jacobian(params, state, jax.numpy.ones(3), gates.o).shape
    (5, 5)
    """
    check_like(output_gate, state.h, what="output_gate", dtypes=True)
    _, gates, K, _ = _lstm_terms(params, state, x)
    return jnp.diag(gates.f) + _scale_columns(K, output_gate * (1 - jnp.tanh(state.c) ** 2))


# --- GRU -------------------------------------------------------------------------------------------------------------


def gru_after_gradients(params: GRUParams, state: GRUState, xs: Any, cotangents: GRUState) -> Gradients:
    """Returns every gradient of a loss of the states of a GRU whose reset acts after the recurrent product.

    ::

        h_t = (1 − u_t) ⊙ n_t + u_t ⊙ h_{t−1}      n_t = tanh(a_t + r_t ⊙ m_t)     m_t = U_n h_{t−1} + b_m

        δu = δh_t ⊙ (h_{t−1} − n_t)       δn = δh_t ⊙ (1 − u_t)       δa = δn ⊙ (1 − n_t²)
        δr = δa ⊙ m_t                     δm = δa ⊙ r_t
        δh_{t−1} = ∂L_{t−1}/∂h_{t−1} + δh_t ⊙ u_t + U_rᵀ δz_r + U_uᵀ δz_u + U_nᵀ δm

    The gates' ``n`` among the pre-activations is m, as in :class:`rnngrad.cells.GRUGates`.

    Args:
      params: W, U, b, gate order r u n, and b_m.
      state: h_0, one sequence.
      xs: inputs, shape (T, D).
      cotangents: ∂L_t/∂h_t, fields of shape (T, N).

    Raises:
      ValueError: shapes, dtypes or structures that do not fit.

    Reference: Cho et al. 2014, arXiv 1406.1078, eqs. 5-8 with r outside of the product; our derivation.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell, xs = rg.cells.gru(3, 5), jax.random.normal(jax.random.key(1), (7, 3))
    >>> params, state = cell.init(jax.random.key(0)), cell.init_state()
    >>> ones = jax.tree.map(jax.numpy.ones_like, rg.unroll(cell, params, state, xs).states)
    >>> rg.formulas.gru_after_gradients(params, state, xs, ones).z.r.shape
    (7, 5)
    """
    run, before = _run(cells.gru(*_sizes(params), reset="after"), params, state, xs, cotangents)
    U = params.w_hh
    _, _, U_n = jnp.split(U, 3)

    def step(from_later, now):
        dL_dh, h, (r, u, n, _) = now
        m = U_n @ h + params.b_m
        dh = dL_dh + from_later
        du, dn = dh * (h - n), dh * (1 - u)
        da = dn * (1 - n**2)
        dr, dm = da * m, da * r
        dz_r, dz_u = dr * r * (1 - r), du * u * (1 - u)
        to_earlier = dh * u + U.T @ jnp.concatenate([dz_r, dz_u, dm])
        return to_earlier, (dh, GRUGates(r=dr, u=du, n=dn, a=da), GRUGates(r=dz_r, u=dz_u, n=dm, a=da))

    with jax.default_matmul_precision(MATMUL_PRECISION):
        dh_0, (dh, gates, z) = jax.lax.scan(
            step, jnp.zeros_like(state.h), (cotangents.h, before.h, run.gates), reverse=True
        )
        heard_from_x = jnp.concatenate([z.r, z.u, z.a], axis=-1)
        heard_from_h = jnp.concatenate([z.r, z.u, z.n], axis=-1)
        return Gradients(
            params=GRUParams(
                w_ih=heard_from_x.T @ xs,
                w_hh=heard_from_h.T @ before.h,
                b=jnp.sum(heard_from_x, axis=0),
                b_m=jnp.sum(z.n, axis=0),
            ),
            state=GRUState(dh_0),
            xs=heard_from_x @ params.w_ih,
            states=GRUState(dh),
            gates=gates,
            z=z,
        )


def gru_before_gradients(params: GRUParams, state: GRUState, xs: Any, cotangents: GRUState) -> Gradients:
    """Returns every gradient of a loss of the states of a GRU whose reset acts before the recurrent product.

    ::

        h_t = (1 − u_t) ⊙ n_t + u_t ⊙ h_{t−1}      n_t = tanh(a_t + m_t)           m_t = U_n (r_t ⊙ h_{t−1})

        δu = δh_t ⊙ (h_{t−1} − n_t)       δn = δh_t ⊙ (1 − u_t)       δa = δm = δn ⊙ (1 − n_t²)
        δ(r ⊙ h) = U_nᵀ δm                δr = δ(r ⊙ h) ⊙ h_{t−1}
        δh_{t−1} = ∂L_{t−1}/∂h_{t−1} + δh_t ⊙ u_t + δ(r ⊙ h) ⊙ r_t + U_rᵀ δz_r + U_uᵀ δz_u

    The gates' ``n`` among the pre-activations is m.  δz_r is in total, through m; a tap on z_r sees none of it, because
    this cell computes r inside of ``preactivate``.

    Args:
      params: W, U, b, gate order r u n; b_m is not used and its gradient is 0.
      state: h_0, one sequence.
      xs: inputs, shape (T, D).
      cotangents: ∂L_t/∂h_t, fields of shape (T, N).

    Raises:
      ValueError: shapes, dtypes or structures that do not fit.

    Reference: Cho et al. 2014, arXiv 1406.1078, eqs. 5-8; our derivation.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell, xs = rg.cells.gru(3, 5, reset="before"), jax.random.normal(jax.random.key(1), (7, 3))
    >>> params, state = cell.init(jax.random.key(0)), cell.init_state()
    >>> ones = jax.tree.map(jax.numpy.ones_like, rg.unroll(cell, params, state, xs).states)
    >>> rg.formulas.gru_before_gradients(params, state, xs, ones).z.r.shape
    (7, 5)
    """
    run, before = _run(cells.gru(*_sizes(params), reset="before"), params, state, xs, cotangents)
    U_r, U_u, U_n = jnp.split(params.w_hh, 3)

    def step(from_later, now):
        dL_dh, h, (r, u, n, _) = now
        dh = dL_dh + from_later
        du, dn = dh * (h - n), dh * (1 - u)
        da = dn * (1 - n**2)
        d_rh = U_n.T @ da
        dr = d_rh * h
        dz_r, dz_u = dr * r * (1 - r), du * u * (1 - u)
        to_earlier = dh * u + d_rh * r + U_r.T @ dz_r + U_u.T @ dz_u
        return to_earlier, (dh, GRUGates(r=dr, u=du, n=dn, a=da), GRUGates(r=dz_r, u=dz_u, n=da, a=da))

    with jax.default_matmul_precision(MATMUL_PRECISION):
        dh_0, (dh, gates, z) = jax.lax.scan(
            step, jnp.zeros_like(state.h), (cotangents.h, before.h, run.gates), reverse=True
        )
        dz = jnp.concatenate([z.r, z.u, z.a], axis=-1)
        from_r_and_u = jnp.concatenate([z.r, z.u], axis=-1).T @ before.h
        return Gradients(
            params=GRUParams(
                w_ih=dz.T @ xs,
                w_hh=jnp.concatenate([from_r_and_u, z.n.T @ (run.gates.r * before.h)]),
                b=jnp.sum(dz, axis=0),
                b_m=jnp.zeros_like(params.b_m),
            ),
            state=GRUState(dh_0),
            xs=dz @ params.w_ih,
            states=GRUState(dh),
            gates=gates,
            z=z,
        )


def gru_after_jacobian(params: GRUParams, state: GRUState, x: Any) -> StepJacobian:
    """Returns ∂h'/∂h of one step of a GRU whose reset acts after the recurrent product.

    ::

        D = diag(u)        m = U_n h + b_m        r' = r (1 − r), u' = u (1 − u)
        G = diag((h − n) ⊙ u') U_u + diag((1 − u) ⊙ (1 − n²)) [diag(r) U_n + diag(m ⊙ r') U_r]

    Args:
      params: W, U, b, gate order r u n, and b_m.
      state: h.
      x: input, shape (D,).

    Raises:
      ValueError: shapes, dtypes or structures that do not fit.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.gru(3, 5)
    >>> rg.formulas.gru_after_jacobian(cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones(3)).full.shape
    (5, 5)
    """
    _, (r, u, n, _) = _one_step(cells.gru(*_sizes(params), reset="after"), params, state, x)
    U_r, U_u, U_n = jnp.split(params.w_hh, 3)
    with jax.default_matmul_precision(MATMUL_PRECISION):
        m = U_n @ state.h + params.b_m
    through_n = _scale_rows(r, U_n) + _scale_rows(m * r * (1 - r), U_r)
    through_u = _scale_rows((state.h - n) * u * (1 - u), U_u)
    return StepJacobian(D=jnp.diag(u), G=through_u + _scale_rows((1 - u) * (1 - n**2), through_n))


def gru_before_jacobian(params: GRUParams, state: GRUState, x: Any) -> StepJacobian:
    """Returns ∂h'/∂h of one step of a GRU whose reset acts before the recurrent product.

    ::

        D = diag(u)        r' = r (1 − r), u' = u (1 − u)
        G = diag((h − n) ⊙ u') U_u + diag((1 − u) ⊙ (1 − n²)) U_n [diag(r) + diag(h ⊙ r') U_r]

    Args:
      params: W, U, b, gate order r u n; b_m is not used.
      state: h.
      x: input, shape (D,).

    Raises:
      ValueError: shapes, dtypes or structures that do not fit.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.gru(3, 5, reset="before")
    >>> rg.formulas.gru_before_jacobian(cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones(3)).full.shape
    (5, 5)
    """
    _, (r, u, n, _) = _one_step(cells.gru(*_sizes(params), reset="before"), params, state, x)
    U_r, U_u, U_n = jnp.split(params.w_hh, 3)
    with jax.default_matmul_precision(MATMUL_PRECISION):
        through_n = U_n @ (jnp.diag(r) + _scale_rows(state.h * r * (1 - r), U_r))
    through_u = _scale_rows((state.h - n) * u * (1 - u), U_u)
    return StepJacobian(D=jnp.diag(u), G=through_u + _scale_rows((1 - u) * (1 - n**2), through_n))
