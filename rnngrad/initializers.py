"""How weights are drawn: general schemes, forget-gate biases, and the defaults of five libraries.

Cells store fused weights, one block of N rows per gate: ``w_ih: (G·N, D)``, ``w_hh: (G·N, N)``, ``b: (G·N,)``.  A
scheme is an :class:`Initialization`; every drawing function has the one signature ``(key, num_gates, hidden_size,
input_size, dtype)``.  "Per gate" matters: one N×4N orthogonal draw (Keras) is *not* orthogonal gate by gate, its N×N
blocks have singular values of at most about √3/2 = 0.87, the edge for N → ∞.

Library defaults, read in their sources (Flax 0.12, Equinox 0.13, Torch 2.13, Keras 3, Haiku 0.0.x):

=========  ======================================  =========================  =====================  ===========
preset     w_ih                                    w_hh                       bias                   forget bias
=========  ======================================  =========================  =====================  ===========
flax       truncated normal, variance 1/D          orthogonal per gate        0                      0
equinox    U(±1/√N)                                U(±1/√N)                   U(±1/√N)               drawn
torch      U(±1/√N)                                U(±1/√N)                   two U(±1/√N), summed   drawn
keras      Glorot uniform over all gates at once   orthogonal over all gates  0                      1 (LSTM)
haiku      truncated normal of std 1/√(D+N)        the same draw              0                      1 (LSTM)
=========  ======================================  =========================  =====================  ===========

The flax row is that of linen and of ``nnx.LSTMCell`` and ``nnx.SimpleCell``; ``nnx.OptimizedLSTMCell`` and
``nnx.GRUCell`` draw one orthogonal matrix over all gates, and ``nnx.GRUCell`` has no recurrent bias of the candidate.
Haiku's vanilla cell and GRU draw ``w_ih`` and ``w_hh`` apart, with fan-in D and N; its GRU corrects the variance for
the truncation, its linear layers do not.  Equinox ships no vanilla cell; its preset uses the same U(±1/√N) there.
The bias that counts is the *effective* one: libraries with two biases add them, and so does the preset.

Sources: Glorot & Bengio 2010 (Glorot uniform); Saxe et al. 2013, arXiv 1312.6120 (orthogonal); Le et al. 2015,
arXiv 1504.00941 (identity); Tallec & Ollivier 2018, arXiv 1804.11188, eq. 16 (chrono); Gu et al. 2020,
arXiv 1910.09890, section 3.1 (uniform gate initialisation, UGI).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rnngrad.types import DTypeLike, Real

KINDS = ("vanilla", "lstm", "gru")
PRESETS = ("flax", "equinox", "torch", "keras", "haiku", "gaussian", "orthogonal", "identity")

# Standard deviation of a standard normal truncated to [-2, 2]; what "truncated normal" initialisers divide by to keep
# the variance asked for (scipy.stats.truncnorm(-2, 2).std()).
_TRUNCATED_STD = 0.87962566103423978


@runtime_checkable
class Draw(Protocol):
    """Draws one fused weight."""

    def __call__(
        self, key: Key[Array, ""], num_gates: int, hidden_size: int, input_size: int, dtype: DTypeLike
    ) -> Float[Array, "..."]: ...


@runtime_checkable
class GateBias(Protocol):
    """Draws the biases (b_f, b_i) of the forget and the input gate; None leaves the input gate's as it is."""

    def __call__(
        self, key: Key[Array, ""], hidden_size: int, dtype: DTypeLike
    ) -> tuple[Float[Array, " N"], Float[Array, " N"] | None]: ...


class Initialization(NamedTuple):
    """A scheme for one cell: how the input weights, the recurrent weights and the biases are drawn."""

    w_ih: Draw
    w_hh: Draw
    b: Draw
    num_biases: int = 1
    """Biases that the library adds per gate; their sum is the effective bias."""
    forget_bias: float = 0.0
    """What the library adds to the drawn bias of an LSTM's forget gate."""


def _uniform(recurrent: bool) -> Draw:
    def draw(key, num_gates, hidden_size, input_size, dtype):
        limit = hidden_size**-0.5
        shape = (num_gates * hidden_size, hidden_size if recurrent else input_size)
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def _uniform_bias(key, num_gates, hidden_size, input_size, dtype):
    limit = hidden_size**-0.5
    return jax.random.uniform(key, (num_gates * hidden_size,), dtype, -limit, limit)


def _zero_bias(key, num_gates, hidden_size, input_size, dtype):
    return jnp.zeros((num_gates * hidden_size,), dtype)


def _normal(recurrent: bool, gain: float = 1.0, *, truncated: bool = False, corrected: bool = False) -> Draw:
    """Entries of standard deviation gain/√fan_in; a truncated draw falls short of it unless corrected."""

    def draw(key, num_gates, hidden_size, input_size, dtype):
        fan_in = hidden_size if recurrent else input_size
        shape = (num_gates * hidden_size, fan_in)
        std = gain * fan_in**-0.5
        if truncated:
            return std / (_TRUNCATED_STD if corrected else 1.0) * jax.random.truncated_normal(key, -2, 2, shape, dtype)
        return std * jax.random.normal(key, shape, dtype)

    return draw


def _joint_truncated_normal(recurrent: bool) -> Draw:
    """Haiku's LSTM: one linear layer on [x, h], so the fan-in is D + N for both weights."""

    def draw(key, num_gates, hidden_size, input_size, dtype):
        shape = (num_gates * hidden_size, hidden_size if recurrent else input_size)
        return (hidden_size + input_size) ** -0.5 * jax.random.truncated_normal(key, -2, 2, shape, dtype)

    return draw


def _glorot_over_all_gates(key, num_gates, hidden_size, input_size, dtype):
    limit = (6.0 / (input_size + num_gates * hidden_size)) ** 0.5
    return jax.random.uniform(key, (num_gates * hidden_size, input_size), dtype, -limit, limit)


def _orthogonal(key, num_rows, num_columns, num_matrices, dtype):
    """Orthonormal columns; drawn in float32 at least, since QR knows no bfloat16."""
    wide = jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype
    return jax.random.orthogonal(key, num_rows, (num_matrices,), wide, m=num_columns).astype(dtype)


def _orthogonal_over_all_gates(key, num_gates, hidden_size, input_size, dtype):
    return _orthogonal(key, num_gates * hidden_size, hidden_size, 1, dtype)[0]


def _orthogonal_per_gate(gain: Real = 1.0) -> Draw:
    def draw(key, num_gates, hidden_size, input_size, dtype):
        blocks = _orthogonal(key, hidden_size, hidden_size, num_gates, dtype)
        return gain * blocks.reshape(num_gates * hidden_size, hidden_size)

    return draw


def _identity_per_gate(gain: float) -> Draw:
    def draw(key, num_gates, hidden_size, input_size, dtype):
        return gain * jnp.tile(jnp.eye(hidden_size, dtype=dtype), (num_gates, 1))

    return draw


def gaussian(gain: Real = 1.0) -> Initialization:
    """Returns recurrent weights N(0, gain²/N), input weights N(0, 1/D), zero biases."""
    return Initialization(_normal(False), _normal(True, gain), _zero_bias)


def orthogonal(gain: Real = 1.0) -> Initialization:
    """Returns recurrent weights that are ``gain`` times an orthogonal matrix in every gate, w_ih N(0, 1/D), b = 0."""
    return Initialization(_normal(False), _orthogonal_per_gate(gain), _zero_bias)


def identity(gain: Real = 1.0) -> Initialization:
    """Returns recurrent weights ``gain · I`` in every gate (IRNN, Le et al. 2015), w_ih N(0, 1/D), b = 0."""
    return Initialization(_normal(False), _identity_per_gate(gain), _zero_bias)


def preset(name: str, kind: str) -> Initialization:
    """Returns the scheme called ``name`` for a kind of cell; see the table in the module docstring.

    Args:
      name: a library (``flax``, ``equinox``, ``torch``, ``keras``, ``haiku``) or a scheme at gain 1.
      kind: ``"vanilla"``, ``"lstm"`` or ``"gru"``; libraries differ from cell to cell.

    Raises:
      ValueError: unknown name or kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of cell {kind!r}; expected one of: {', '.join(KINDS)}")
    unit = 1.0 if kind == "lstm" else 0.0
    if name == "flax":
        w_ih = _normal(False, truncated=True, corrected=True)
        return Initialization(w_ih, _orthogonal_per_gate(), _zero_bias)
    if name == "equinox":
        return Initialization(_uniform(False), _uniform(True), _uniform_bias)
    if name == "torch":
        return Initialization(_uniform(False), _uniform(True), _uniform_bias, num_biases=2)
    if name == "keras":
        return Initialization(_glorot_over_all_gates, _orthogonal_over_all_gates, _zero_bias, forget_bias=unit)
    if name == "haiku":
        if kind == "lstm":
            return Initialization(
                _joint_truncated_normal(False), _joint_truncated_normal(True), _zero_bias, forget_bias=unit
            )
        corrected = kind == "gru"
        w_ih, w_hh = (_normal(recurrent, truncated=True, corrected=corrected) for recurrent in (False, True))
        return Initialization(w_ih, w_hh, _zero_bias)
    schemes = {"gaussian": gaussian, "orthogonal": orthogonal, "identity": identity}
    if name in schemes:
        return schemes[name]()
    raise ValueError(f"unknown initialisation {name!r}; expected one of: {', '.join(PRESETS)}")


def chrono(max_lag: Real) -> GateBias:
    """Returns biases b_f = log U(1, max_lag − 1), b_i = −b_f: memories that last up to ``max_lag`` steps.

    Raises:
      ValueError: ``max_lag`` below 2.

    Reference: Tallec & Ollivier 2018, arXiv 1804.11188, eq. 16.
    """
    if max_lag < 2:
        raise ValueError(f"chrono: expected max_lag of at least 2, found {max_lag}")

    def draw(key, hidden_size, dtype):
        # upper end kept above the lower one so that max_lag = 2 gives the constant log 1 = 0
        b_f = jnp.log(jax.random.uniform(key, (hidden_size,), dtype, 1.0, max(max_lag - 1.0, 1.0 + 1e-6)))
        return b_f, -b_f

    return draw


def ugi() -> GateBias:
    """Returns biases b_f = logit U(1/N, 1 − 1/N), b_i = −b_f: forget gates spread evenly over (0, 1).

    Reference: Gu et al. 2020, arXiv 1910.09890, uniform gate initialisation.
    """

    def draw(key, hidden_size, dtype):
        edge = 1.0 / max(hidden_size, 3)  # for N < 3 the interval (1/N, 1 − 1/N) is empty
        u = jax.random.uniform(key, (hidden_size,), dtype, edge, 1.0 - edge)
        b_f = jnp.log(u) - jnp.log1p(-u)
        return b_f, -b_f

    return draw


def gate_bias(
    b: Float[Array, " GN"],
    key: Key[Array, ""],
    forget_bias: Real | GateBias | None,
    *,
    forget: int,
    input: int | None,
    hidden_size: int,
    preset_offset: float = 0.0,
) -> Float[Array, " GN"]:
    """Returns the fused bias with the forget gate's block set: the one place where ``forget_bias`` acts.

    Args:
      b: fused bias, shape (G·N,).
      key: for schemes that draw.
      forget_bias: the effective bias: a number, a scheme (:func:`chrono`, :func:`ugi`), or None for what the
        initialisation drew plus ``preset_offset``.
      forget: position of the forget gate's block.
      input: position of the input gate's block; None when the cell has none of its own.
      hidden_size: N.
      preset_offset: what the library adds to its drawn forget bias.
    """

    def block(index: int) -> slice:
        return slice(index * hidden_size, (index + 1) * hidden_size)

    if forget_bias is None:
        return b.at[block(forget)].add(jnp.asarray(preset_offset, b.dtype))
    if not callable(forget_bias):
        return b.at[block(forget)].set(jnp.asarray(forget_bias, b.dtype))
    b_f, b_i = forget_bias(key, hidden_size, b.dtype)
    b = b.at[block(forget)].set(b_f)
    return b if b_i is None or input is None else b.at[block(input)].set(b_i)


class Fused(NamedTuple):
    """The fused weights of a cell before any forget bias."""

    w_ih: Float[Array, "GN D"]
    w_hh: Float[Array, "GN N"]
    """Empty for a cell whose gates do not hear the state."""
    b: Float[Array, " GN"]
    """Effective bias, the sum of both of a library that has two."""
    key_bias: Key[Array, ""]
    """For what else the cell draws of its biases."""


def draw_fused(
    key: Key[Array, ""],
    init: Initialization,
    num_gates: int,
    hidden_size: int,
    input_size: int,
    dtype: DTypeLike,
    *,
    recurrent: bool = True,
    single_biases: tuple[int, ...] = (),
) -> Fused:
    """Returns every fused weight of a cell with ``num_gates`` gates.

    Args:
      key: for all draws.
      init: the scheme.
      num_gates: G, blocks of N rows.
      hidden_size: N.
      input_size: D.
      dtype: floating dtype.
      recurrent: draw ``w_hh``; a cell whose gates do not hear the state has none.
      single_biases: gates that keep their second bias elsewhere, so that ``b`` holds only the first.
    """
    for name, size in (("hidden_size", hidden_size), ("input_size", input_size)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, found {size}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: expected a floating dtype, found {jnp.dtype(dtype).name}")
    key_ih, key_hh, key_b, key_second, key_bias = jax.random.split(key, 5)
    sizes = (num_gates, hidden_size, input_size, dtype)
    b = init.b(key_b, *sizes)
    if init.num_biases == 2:
        second = init.b(key_second, *sizes).reshape(num_gates, hidden_size)
        b = b + second.at[jnp.array(single_biases, jnp.int32)].set(0).ravel()
    w_hh = init.w_hh(key_hh, *sizes) if recurrent else jnp.zeros((0, hidden_size), dtype)
    return Fused(init.w_ih(key_ih, *sizes), w_hh, b, key_bias)


def resolve(init: str | Initialization, kind: str) -> Initialization:
    """Returns the scheme itself or the preset of that name."""
    return init if isinstance(init, Initialization) else preset(init, kind)
