"""Remedies against gradients that vanish or explode; each composes with any loss and any optax optimizer.

::

    clipping       g ← g · θ/‖g‖  where ‖g‖ ≥ θ                        Pascanu et al. 2013, algorithm 1
    Ω              Σ_k ( ‖∂E/∂s_{k+1} · J_k‖ / ‖∂E/∂s_{k+1}‖ − 1 )²    Pascanu et al. 2013, eq. 9 and 10
    flossing       (1/k) Σ_i (λ_i − target)²                           Engelken 2023
    h-detach       z = preactivate(params, ξ stop(h) + (1 − ξ) h, x)   Arpit et al. 2018, ξ ~ Bernoulli(p) at each step
    output gate    mean over time and batch of Σ_n |o_n|
    orthogonal     U_j = exp(A_j) or (I + A_j)⁻¹(I − A_j), A_j = R_j − R_jᵀ   Lezcano-Casado & Martínez-Rubio 2019,
                                                                         Helfrich, Willmott & Ye 2018

θ is ``max_norm``, J the step Jacobian ∂s_{k+1}/∂s_k, E the loss, λ_i a Lyapunov exponent in nats per step, U_j gate j's
block of ``w_hh`` and R_j free numbers.  Remedies that are a start or an option of a cell (forget bias, chrono, UGI,
initial memory, orthogonal and identity weights) stand where weights are drawn; :data:`REMEDIES` lists all of them.

What we do differently:

* A threshold without a unit means two things: the gradient of a sum over T steps is T times that of the mean.
  :func:`clip_by_global_norm` takes both units by name, and counts how often it clips.
* Ω is taken of any cell, and in the state s where Pascanu et al. have the vector of pre-activations: its factors are
  diag(φ'(z_{k+1})) U in place of U diag(φ'(z_k)).  As in their eq. 10 the derivative is the *immediate* one, with
  ∂E/∂s, the states, and here the pre-activations held fixed: it does not pass through time, nor through φ'.
* h-detach cuts the gated path of h at one step, G_h of J = D + G, and leaves D: for the LSTM ∏f stays as it is.

Sources: Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063; Engelken 2023, arXiv 2312.17306; Arpit et al. 2018,
arXiv 1810.03023; Lezcano-Casado & Martínez-Rubio 2019, arXiv 1901.08428; Helfrich, Willmott & Ye 2018,
arXiv 1707.09520.  The penalty on the output gate circulates without one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Inexact, Int, Key

from rnngrad.gradients import local_cotangents
from rnngrad.jacobians import MATMUL_PRECISION, Layout, layout_of, step_pulls
from rnngrad.logscaled import at_least_float32
from rnngrad.losses import REDUCTIONS
from rnngrad.lyapunov import lyapunov_spectrum
from rnngrad.types import Cell, Gates, Params, Real, State, check_inputs
from rnngrad.unroll import Point, run_forward, unroll, zero_taps

# --- clipping --------------------------------------------------------------------------------------------------------


class ClipState(NamedTuple):
    """What clipping has done so far."""

    num_updates: Int[Array, ""]
    num_clipped: Int[Array, ""]
    last_norm: Float[Array, ""]
    """Global norm of the last gradient before clipping, in the unit of the threshold; NaN before the first."""

    @property
    def clip_fraction(self) -> Array:
        """Share of the updates that were clipped; 0 before the first."""
        return self.num_clipped / jnp.maximum(self.num_updates, 1)


def clip_by_global_norm(
    max_norm: Real,
    *,
    unit: str = "mean_per_token",
    loss_unit: str = "mean_per_token",
    num_steps: int | None = None,
) -> optax.GradientTransformation:
    """Returns optax's clipping by the global norm, for a threshold and a loss that may have different units.

    ::

        g ← g · θ/‖g‖   where ‖g‖ ≥ θ                 θ in the unit of the loss: max_norm, max_norm/T or max_norm · T

    Args:
      max_norm: the threshold, in ``unit``.
      unit: what the threshold refers to, ``"mean_per_token"`` or ``"sum_over_steps"``; see :mod:`rnngrad.losses`.
      loss_unit: the reduction of the loss whose gradients arrive.
      num_steps: T, steps of a sequence that count in the loss; needed where the two units differ.

    Raises:
      ValueError: a threshold that is not positive, an unknown unit, or units that differ without ``num_steps``.

    Reference: Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1.

    >>> import jax.numpy as jnp
    >>> import rnngrad as rg
    >>> clip = rg.remedies.clip_by_global_norm(5.0, unit="sum_over_steps", num_steps=20)  # 0.25 of a mean
    >>> gradient, state = clip.update(jnp.array([3.0, 4.0]), clip.init(jnp.zeros(2)))
    >>> [round(float(g), 4) for g in gradient], round(float(state.last_norm), 4), float(state.clip_fraction)
    ([0.15, 0.2], 100.0, 1.0)
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0, found {max_norm}")
    for name, value in (("unit", unit), ("loss_unit", loss_unit)):
        if value not in REDUCTIONS:
            raise ValueError(f"unknown {name} {value!r}; expected one of: {', '.join(REDUCTIONS)}")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, found {num_steps}")
    if unit == loss_unit:
        in_unit = 1.0
    elif num_steps is None:
        raise ValueError(f"num_steps: expected T to turn {loss_unit!r} into {unit!r}, found None")
    else:
        # what a norm in the unit of the loss is multiplied by to be in that of the threshold
        in_unit = float(num_steps) if unit == "sum_over_steps" else 1.0 / num_steps
    threshold = max_norm / in_unit
    clipping = optax.clip_by_global_norm(threshold)

    def init(params):
        return ClipState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.full((), jnp.nan))

    def update(updates, state, params=None):
        norm = optax.tree.norm(updates)
        clipped, _ = clipping.update(updates, clipping.init(updates))
        return clipped, ClipState(
            state.num_updates + 1,
            state.num_clipped + (norm > threshold).astype(jnp.int32),
            (norm * in_unit).astype(state.last_norm.dtype),
        )

    return optax.GradientTransformation(init, update)


# --- Pascanu's regulariser -------------------------------------------------------------------------------------------


def _state_cotangents(cell: Cell, params: Params, state: State, xs: Any, loss: Callable[[State], Any]) -> State:
    """Returns ∂E/∂s_{t+1} in total for t = 0 … T−1, from one backward pass."""
    num_steps = check_inputs(cell, params, state, xs, one_sequence=False)
    taps = zero_taps(cell, num_steps, jnp.shape(xs)[1:-1])
    states, pull = jax.vjp(lambda taps: unroll(cell, params, state, xs, taps=taps).states, taps)
    _, own = local_cotangents(loss, states)
    (sent,) = pull(own)
    # taps sit at s_0 … s_{T−1}, states are s_1 … s_T: the last state gets nothing from a later one
    later = lambda leaf: jnp.concatenate([leaf[1:], jnp.zeros_like(leaf[:1])])
    return jax.tree.map(lambda own, direct, gated: own + later(direct + gated), own, sent.direct, sent.gated)


def _norm(blocks: tuple[Array, ...]) -> Array:
    """Returns the joint norm; its derivative at 0 is 0, not NaN."""
    squares = functools.reduce(jnp.add, [jnp.sum(jnp.square(block)) for block in blocks])
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def pascanu_omega(
    cell: Cell, params: Params, state: State, xs: Inexact[Array, "..."], loss: Callable[[State], Any]
) -> Float[Array, ""]:
    """Returns Ω, how far the error signal is from keeping its norm step by step; mean over the batch.

    ::

        Ω = Σ_{k=0}^{T−1} ( ‖∂E/∂s_{k+1} · ∂s_{k+1}/∂s_k‖ / ‖∂E/∂s_{k+1}‖ − 1 )²

    with norms over all fields of the state, a complex one as (Re, Im).  Differentiable in ``params``, by the paper's
    immediate derivative: ∂E/∂s_{k+1}, states, pre-activations and inputs are held fixed, so that it acts on U (and on
    what else of a step reads ``params``) in the Jacobian itself.  The gradient by ``state`` and ``xs`` is 0.

    Steps at which ∂E/∂s_{k+1} is exactly 0, behind the last step that counts or where it has underflowed, are left out.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0; fields of shape (N,) for one sequence, (B, N) for a batch.
      xs: inputs of shape (T, D) or (T, B, D).
      loss: E as a function of the states of ``rg.unroll``, s_1 … s_T with leading axis T.

    Raises:
      ValueError: inputs that do not fit, a loss that is not a floating scalar, or a map, which declares no input size.

    Reference: Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, eq. 9 and 10; see the module docstring.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.vanilla(3, 5, activation="identity", init="orthogonal")
    >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (7, 2, 3))
    >>> loss = lambda states: (states.h[-1] ** 2).sum()
    >>> doubled = params._replace(w_hh=2 * params.w_hh)  # every ratio is 2
    >>> omega = lambda params: rg.remedies.pascanu_omega(cell, params, cell.init_state((2,)), xs, loss)
    >>> round(float(omega(params)), 4), round(float(omega(doubled)), 4)
    (0.0, 7.0)
    """
    cotangents = _state_cotangents(cell, params, state, xs, loss)
    points, cotangents = jax.lax.stop_gradient((run_forward(cell, params, state, xs).points, cotangents))
    layout = layout_of(jax.eval_shape(cell.init_state))
    term = functools.partial(_omega_term, cell, params, layout)
    batch_axes = jnp.ndim(xs) - 2
    for _ in range(batch_axes + 1):
        term = jax.vmap(term)
    return jnp.sum(term(points, cotangents)) / max(int(np.prod(jnp.shape(xs)[1:-1])), 1)


def _omega_term(cell: Cell, params: Params, layout: Layout, point: Point, cotangent: State) -> Float[Array, ""]:
    # JAX's gradient of a real loss by a complex number is ∂E/∂Re − i ∂E/∂Im
    row = layout.split(jax.tree.map(jnp.conj, cotangent))
    # only the direction counts: at size 1, no square leaves the range of the dtype
    size = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(block)) for block in row])
    row = tuple(block / jnp.where(size == 0, 1, size) for block in row)
    pulled = step_pulls(cell, params, point, layout).full(tuple(block[None] for block in row))
    return jnp.where(size == 0, 0, jnp.square(_norm(pulled) / jnp.where(size == 0, 1, _norm(row)) - 1))


# --- flossing --------------------------------------------------------------------------------------------------------


def lyapunov_flossing(
    cell: Cell,
    params: Params,
    state: State,
    xs: Any,
    *,
    k: int,
    target: Real = 0.0,
    num_transient: int = 0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Returns the mean square distance of the k largest Lyapunov exponents from ``target``, for gradient descent.

    ::

        (1/k) Σ_{i=1}^k (λ_i − target)²          λ_i in nats per step, differentiated through the QR decompositions

    One sequence; ``jax.vmap`` for a batch.  It is inf where one of the k exponents is −inf (more directions than the
    step Jacobians have rank), and NaN where the state leaves the finite numbers.

    Args:
      cell: the cell.
      params: its parameters.
      state: s_0, one sequence.
      xs: inputs, shape (T, D).
      k: how many exponents.
      target: where they are pulled.
      num_transient: steps that are run and not counted; at least 2 must follow, and of an odd number the first is not
        counted either.
      key: of the random initial frame; draw another one for every update.

    Raises:
      ValueError: what :func:`rnngrad.lyapunov.lyapunov_spectrum` refuses.

    Reference: Engelken 2023, arXiv 2312.17306, with target 0.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.vanilla(3, 5, activation="identity", init="orthogonal")
    >>> params, xs = cell.init(jax.random.key(0)), jax.numpy.ones((20, 3))
    >>> doubled = params._replace(w_hh=2 * params.w_hh)  # every exponent is log 2, its square 0.4805
    >>> round(float(rg.remedies.lyapunov_flossing(cell, doubled, cell.init_state(), xs, k=2)), 4)
    0.4805
    """
    # no errors are asked for: two blocks are the fewest, and a QR at every step has nothing to measure and to repeat
    spectrum = lyapunov_spectrum(
        cell,
        params,
        state,
        xs,
        k=k,
        num_transient=num_transient,
        num_blocks=2,
        qr_interval=1,
        num_determinants=0,
        key=key,
    )
    return jnp.mean(jnp.square(spectrum.exponents - target))


# --- h-detach --------------------------------------------------------------------------------------------------------


def detach_h(cell: Cell) -> Cell:
    """Returns the cell with one more input: where it is not 0, no gradient passes through h into the gates.

    ::

        z = preactivate(params, ξ stop_gradient(h) + (1 − ξ) h, x)

    Values stay what they are.  What ``update`` itself reads of the state, the direct path, is left alone, and so are
    fields other than h.  The input of the new cell is [x, ξ], made by :func:`detach_inputs`; its parameters and states
    are those of ``cell``.

    Args:
      cell: a cell whose state has a field ``h``.  Of a stack, wrap a layer: the first, for the others have no input
        of their own.

    Raises:
      ValueError: a state without a field ``h``, or a map, which declares no input size.

    Reference: Arpit et al. 2018, arXiv 1810.03023, algorithm 1, where the cell is an LSTM.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.remedies.detach_h(rg.cells.lstm(3, 5))
    >>> xs = rg.remedies.detach_inputs(jax.random.key(1), jax.numpy.ones((7, 2, 3)), 0.25)
    >>> rg.unroll(cell, cell.init(jax.random.key(0)), cell.init_state((2,)), xs).final.h.shape
    (2, 5)
    """
    if cell.input_size is None:
        raise ValueError(f"detach_h: expected a cell with an input size, found {cell.name!r}")
    found = getattr(jax.eval_shape(cell.init_state), "_fields", ())
    if "h" not in found:
        raise ValueError(f"detach_h: expected a state with a field 'h', found {', '.join(found)} (cell {cell.name!r})")

    def preactivate(params, state, x):
        is_cut = jnp.broadcast_to(x[..., -1:] != 0, state.h.shape)
        h = jnp.where(is_cut, jax.lax.stop_gradient(state.h), state.h)
        return cell.preactivate(params, state._replace(h=h), x[..., :-1])

    return cell._replace(name=f"detach_h({cell.name})", input_size=cell.input_size + 1, preactivate=preactivate)


def detach_inputs(key: Key[Array, ""], xs: Float[Array, "T *batch D"], probability: Real) -> Float[Array, "T *batch E"]:
    """Returns ``xs`` with the bit ξ of :func:`detach_h` behind every x: 1 with ``probability``, one draw for each step.

    As in the paper a step is cut for the whole batch or not at all.

    Args:
      key: of the draws; a new one for every update.
      xs: inputs of shape (T, D) or (T, B, D).
      probability: p; the authors' code runs with 0.25 and 0.5.  0 for evaluation.

    Raises:
      ValueError: a probability outside of 0 to 1.

    >>> import jax
    >>> import rnngrad as rg
    >>> rg.remedies.detach_inputs(jax.random.key(0), jax.numpy.ones((7, 2, 3)), 1.0).shape
    (7, 2, 4)
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected a number from 0 to 1, found {probability}")
    bits = jax.random.bernoulli(key, float(probability), xs.shape[:1]).astype(xs.dtype)
    column = jnp.broadcast_to(bits.reshape(-1, *[1] * (xs.ndim - 1)), (*xs.shape[:-1], 1))
    return jnp.concatenate([xs, column], axis=-1)


# --- output gate -----------------------------------------------------------------------------------------------------


def output_gate_l1(gates: Gates) -> Float[Array, ""]:
    """Returns the L1 norm of the output gate's activations, Σ_n |o_n|, mean over time and batch.

    Args:
      gates: ``trajectory.gates`` of an LSTM of any kind, leading axis T.

    Raises:
      ValueError: gates without a field ``o``.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> still = jax.tree.map(jax.numpy.zeros_like, cell.init(jax.random.key(0)))  # o = σ(0)
    >>> run = rg.unroll(cell, still, cell.init_state((2,)), jax.numpy.ones((7, 2, 3)))
    >>> float(rg.remedies.output_gate_l1(run.gates))
    2.5
    """
    found = getattr(gates, "_fields", ())
    if "o" not in found:
        raise ValueError(f"gates: expected a field 'o', found {', '.join(found) or type(gates).__name__}")
    return jnp.mean(jnp.sum(jnp.abs(gates.o), axis=-1))


# --- orthogonal parametrisation --------------------------------------------------------------------------------------

MAPS = ("exponential", "cayley")


def _gate_blocks(params: Params, by: str) -> Float[Array, "G N N"]:
    """Returns the blocks of ``w_hh``, after the checks that both directions share."""
    if by not in MAPS:
        raise ValueError(f"unknown map {by!r}; expected one of: {', '.join(MAPS)}")
    if "w_hh" not in getattr(params, "_fields", ()):
        raise ValueError(f"params: expected a field 'w_hh' of shape (G·N, N), found {type(params).__name__}")
    rows, size = params.w_hh.shape
    if rows == 0 or rows % size:
        raise ValueError(f"params.w_hh: expected shape (G·N, N), found {params.w_hh.shape}")
    return params.w_hh.reshape(-1, size, size)


def orthogonal(raw: Params, *, by: str = "exponential") -> Params:
    """Returns parameters whose recurrent matrices are orthogonal, gate by gate, whatever numbers ``raw.w_hh`` holds.

    ::

        A = R − Rᵀ,     U = exp(A)  or  U = (I + A)⁻¹ (I − A)           R: an N×N block of raw.w_hh

    To train with it, keep ``raw`` as the parameters and take the loss of ``orthogonal(raw)``.  Computed in float32 at
    least and rounded to the dtype of the weights, in which U is as orthogonal as the rounding of its entries leaves it.

    Args:
      raw: parameters with ``w_hh`` of shape (G·N, N), from :func:`orthogonal_raw`.
      by: ``"exponential"`` or ``"cayley"``.  Both reach rotations alone (determinant 1), Cayley's those without the
        eigenvalue −1.

    Raises:
      ValueError: unknown map, or parameters without such a ``w_hh``.

    References: Lezcano-Casado & Martínez-Rubio 2019, arXiv 1901.08428, section 3 (exponential); Helfrich, Willmott &
    Ye 2018, arXiv 1707.09520, section 3, without its diagonal of signs (Cayley).

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5)
    >>> params = rg.remedies.orthogonal(cell.init(jax.random.key(0)))
    >>> u_i = params.w_hh[:5]
    >>> bool(abs(u_i @ u_i.T - jax.numpy.eye(5)).max() < 1e-5)
    True
    """
    blocks = _gate_blocks(raw, by)
    # there are no linear solvers of bfloat16
    blocks = blocks.astype(at_least_float32(blocks.dtype))
    skew = blocks - jnp.swapaxes(blocks, 1, 2)
    with jax.default_matmul_precision(MATMUL_PRECISION):
        if by == "exponential":
            rotations = jax.vmap(jax.scipy.linalg.expm)(skew)
        else:
            eye = jnp.broadcast_to(jnp.eye(skew.shape[-1], dtype=skew.dtype), skew.shape)
            rotations = jnp.linalg.solve(eye + skew, eye - skew)
    return raw._replace(w_hh=rotations.reshape(raw.w_hh.shape).astype(raw.w_hh.dtype))


def orthogonal_raw(params: Params, *, by: str = "exponential") -> Params:
    """Returns the ``raw`` at which :func:`orthogonal` gives ``params`` back.

    A block of determinant −1 is out of reach of both maps: its first row is negated, which leaves a uniform draw of
    orthogonal matrices a uniform draw of rotations.  What rounding took from orthogonality is given back first: each
    block is replaced by the orthogonal matrix nearest to it.  Computed in NumPy and float64, once, at the start of
    training; then rounded to the dtype of the weights, which Cayley's A = tan(θ/2) feels at angles θ near π.

    Args:
      params: parameters whose ``w_hh``, shape (G·N, N), is orthogonal in every block, as ``init="orthogonal"`` or
        ``"identity"`` draws it; known values, not traced ones.
      by: the map.

    Raises:
      ValueError: unknown map; no such ``w_hh``; a block that is not orthogonal, or that has the eigenvalue −1.

    >>> import jax
    >>> import rnngrad as rg
    >>> params = rg.cells.gru(3, 5, init="identity").init(jax.random.key(0))
    >>> float(abs(rg.remedies.orthogonal_raw(params).w_hh).max())  # exp(0) = I
    0.0
    """
    blocks = np.array(_gate_blocks(params, by), np.float64)
    eye = np.eye(blocks.shape[-1])
    dtype = params.w_hh.dtype
    # entries rounded to the dtype of the weights move U Uᵀ by one eps; the draw itself was made in float32 at least
    far = np.abs(blocks @ blocks.transpose(0, 2, 1) - eye).max()
    allowed = 2 * float(jnp.finfo(dtype).eps) + 100 * float(jnp.finfo(at_least_float32(dtype)).eps)
    if not far <= allowed:
        raise ValueError(f"params.w_hh: expected orthogonal blocks, found U Uᵀ − I up to {far:.1e}")
    # the nearest orthogonal matrix, its polar factor: near −1 what follows would take an error of length for an angle
    left, _, right = np.linalg.svd(blocks)
    blocks = left @ right
    blocks[np.linalg.det(blocks) < 0, 0] *= -1
    # solved with (I + U): singular where an eigenvalue is −1, at which a rotation by π has no one direction
    if np.linalg.cond(eye + blocks).max() > 1 / (100 * np.finfo(np.float64).eps):
        raise ValueError("params.w_hh: expected rotations by less than π, found the eigenvalue −1")
    skew = np.linalg.solve(eye + blocks, eye - blocks)
    skew = (skew - skew.transpose(0, 2, 1)) / 2
    if by == "exponential":
        # i A is Hermitian for Cayley's A; its eigenvalue tan(θ/2) belongs to the eigenvalue exp(i θ) of U
        tangents, vectors = np.linalg.eigh(1j * skew)
        angles = 2 * np.arctan(tangents)
        skew = (1j * (vectors * angles[:, None, :]) @ vectors.conj().transpose(0, 2, 1)).real
    return params._replace(w_hh=jnp.asarray(skew.reshape(params.w_hh.shape) / 2, dtype))


# --- all remedies ----------------------------------------------------------------------------------------------------


class Remedy(NamedTuple):
    """A remedy and where it is."""

    what: str
    source: str
    where: tuple[str, ...]
    """Names within ``rnngrad``; ``cells.lstm(forget_bias)`` is an option of a function."""


_GATED = ("lstm", "peephole_lstm", "coupled_lstm", "min_lstm", "gru", "min_gru")
_FORGET_BIAS = tuple(f"cells.{name}(forget_bias)" for name in _GATED)

REMEDIES: dict[str, Remedy] = {
    "clipping": Remedy(
        "rescales a gradient whose global norm exceeds a threshold, stated with its unit",
        "Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1",
        ("remedies.clip_by_global_norm",),
    ),
    "omega": Remedy(
        "penalises steps that change the norm of the error signal",
        "Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, eq. 9 and 10",
        ("remedies.pascanu_omega",),
    ),
    "flossing": Remedy(
        "pulls the largest Lyapunov exponents to 0",
        "Engelken 2023, arXiv 2312.17306",
        ("remedies.lyapunov_flossing",),
    ),
    "h-detach": Remedy(
        "cuts the gradient through h into the gates at random steps",
        "Arpit et al. 2018, arXiv 1810.03023",
        ("remedies.detach_h", "remedies.detach_inputs"),
    ),
    "output-gate sparsity": Remedy(
        "penalises open output gates",
        "circulates without a paper",
        ("remedies.output_gate_l1",),
    ),
    "orthogonal parametrisation": Remedy(
        "keeps every recurrent matrix a rotation while it is trained",
        "Lezcano-Casado & Martínez-Rubio 2019, arXiv 1901.08428; Helfrich, Willmott & Ye 2018, arXiv 1707.09520",
        ("remedies.orthogonal", "remedies.orthogonal_raw"),
    ),
    "orthogonal start": Remedy(
        "draws orthogonal recurrent matrices",
        "Saxe et al. 2013, arXiv 1312.6120",
        (
            "initializers.orthogonal",
            "cells.vanilla(init)",
            "cells.lstm(init)",
            "cells.peephole_lstm(init)",
            "cells.coupled_lstm(init)",
            "cells.gru(init)",
        ),
    ),
    "identity start": Remedy(
        "starts from recurrent matrices I, with relu units",
        "Le et al. 2015, arXiv 1504.00941",
        ("initializers.identity", "cells.vanilla(init)", "cells.vanilla(activation)"),
    ),
    "forget bias": Remedy(
        "opens the forget gates (for the GRU: the share kept) at the start",
        "Gers, Schmidhuber & Cummins 2000; Jozefowicz et al. 2015",
        _FORGET_BIAS,
    ),
    "chrono": Remedy(
        "spreads the forget biases over memories of up to a given lag",
        "Tallec & Ollivier 2018, arXiv 1804.11188, eq. 16",
        ("initializers.chrono", *_FORGET_BIAS),
    ),
    "UGI": Remedy(
        "spreads the forget gates evenly over 0 to 1",
        "Gu et al. 2020, arXiv 1910.09890, section 3.1",
        ("initializers.ugi", *_FORGET_BIAS),
    ),
    "initial memory": Remedy(
        "starts the memory at a number other than 0",
        "circulates without a paper",
        (
            *(f"cells.{name}(initial_memory)" for name in _GATED),
            "cells.vanilla(initial_memory)",
            "cells.indrnn(initial_memory)",
        ),
    ),
    "bounded diagonal": Remedy(
        "draws recurrent factors |u| within 2^(±1/T)",
        "Li et al. 2018, arXiv 1803.04831",
        ("cells.indrnn(max_lag)",),
    ),
}
"""Every remedy by name; the third column says where."""
