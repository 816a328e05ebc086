r"""What theory says about a gradient's decay: bounds, mean field, closed forms.  Never fed a simulated value.

Everything here is NumPy in float64, takes plain numbers and returns plain numbers; rates are in nats per step.

**Bounds.**  J_t = diag(φ'(z_t)) U gives ‖∂h_T/∂h_k‖₂ ≤ (σ_max(U) · sup|φ'|)^{T−k} (:func:`norm_bound`).  It needs the
largest singular value: with the spectral radius it is false (U = [[2, −2], [2, −2]] with φ' = diag(1, 0) has radius 0
and a product of 2).

**Mean field**, N → ∞ with U ~ N(0, gain²/N) in every gate and fresh Gaussian inputs at every step.  Pre-activations
are then Gaussian.  For the vanilla cell::

    q = gain² E[φ(√q ζ)²] + input_variance + bias_variance        ζ ~ N(0, 1)
    χ = gain² E[φ'(√q ζ)²]

A tangent's mean square grows by χ per step, so that ½ log χ is the rate of ‖J…J‖_F and the largest Lyapunov exponent.
Tied weights change nothing here: δh_t and δh_{t+1} are uncorrelated over units, so U δh is fresh at every step.

GRU and LSTM come in two ways.  *Untied*, for a U that is redrawn at every step, everything is exact (``chi``,
``rate``).  With the *tied* U of a real network the rate is another even where the input outweighs all that a gate hears
of h, because h keeps part of itself: U δh then points the same way at successive steps, and what enters through the
candidate adds up in amplitude where untied weights add in square (for constant gates: u + gain·a, the edge of the
spectrum of u + a U, against √(u² + gain² a²)).  ``tied_rate`` takes that into account.  Let a(t) be what the candidate
weighs its field with, ā its mean, u the share kept, and C_m, Y_m the covariances of δh(t) with δh(t + m) and with
(U δh)(t + m), in units of e^{λ(2t+m)}.  Gates at different steps taken as independent::

    e^λ C_{m+1} = E[u] C_m + ā Y_m            m ≥ 0         e^λ Y_{m−1} = E[u] Y_m + gain² ā C_m        m ≥ 1
    C_m = C_0 κ^m,  Y_0 = gain² ā C_0 / (e^λ/κ − E[u])      (e^λ κ − E[u]) (e^λ/κ − E[u]) = gain² ā²
    e^{2λ} C_0 = χ C_0 + 2 E[u a] Y_0

The last line is solved for λ.  Neglected is what the gates hear of the slow h itself, and for the LSTM the slowness of
1 − tanh² c.  At N = 1000 and gain 1, with input variance 0.1 to 1, networks follow ``tied_rate`` to 5e-3 nats per step
where ``rate`` is 0.06 to 0.2 too low (LSTM with b_f up to 1, GRU up to 2); an LSTM with b_f = 3 lies 0.02 below it
(``tests/test_theory.py``).  Without input neither is to be trusted: at gain 6 and b_f = 1 an LSTM has 0.21 against 0.27
and 0.32.

The memory of an LSTM, c' = f c + u with u = i g, is no Gaussian.  Its characteristic function ϕ solves a linear
equation on [0, K] that is closed because f < 1, and what the cell needs of it are integrals against kernels that fall
like e^{−πk/2}::

    ϕ(k) = E_f[ϕ(f k)] E[cos(k u)]
    E[1 − tanh² c]    = ∫₀^∞ ϕ(k) k / sinh(πk/2) dk
    E[(1 − tanh² c)²] = ∫₀^∞ ϕ(k) k (k² + 4) / (6 sinh(πk/2)) dk

The tangent's second moment lives on (δh², δc² e^{ikc}), since what δc becomes depends on the c it sits on; χ is the
largest eigenvalue of that linear map.

**Expectations** over a Gaussian are midpoint sums over equally spaced nodes in place of Gauss–Hermite: φ = tanh has
its first pole at ζ = iπ/(2√q), and midpoint sums with spacing s err by e^{−π²/(s√q)} there, while Gauss–Hermite of
order n errs by about e^{−c√n}.

Sources: Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063 (bound); Sompolinsky, Crisanti & Sommers 1988 and Poole et al.
2016, arXiv 1606.05340 (q and χ); Chen, Pennington & Schoenholz 2018, arXiv 1806.05394, and Gilboa et al. 2019,
arXiv 1901.08987 (gated cells); Newman 1986 (Gaussian products); Ginibre 1965 and Geman 1980 (edges of one matrix).  We
derive the gated maps anew and keep the correlation of δc² with c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import chebyshev

from rnngrad.types import Real

_Matrix = Float[Array | np.ndarray, "..."]

# --- bounds ----------------------------------------------------------------------------------------------------------

STEEPEST = {"tanh": 1.0, "sigmoid": 0.25, "relu": 1.0, "identity": 1.0}
"""sup|φ'| of each activation."""


def _steepest(activation: str) -> float:
    if activation not in STEEPEST:
        raise ValueError(f"unknown activation {activation!r}; expected one of: {', '.join(STEEPEST)}")
    return STEEPEST[activation]


def norm_bound(w_hh: _Matrix, activation: str) -> float:
    """Returns log(σ_max(U) sup|φ'|), in nats per step: no chain of a vanilla cell grows faster.

    Args:
      w_hh: U, shape (N, N).
      activation: φ.

    Raises:
      ValueError: unknown activation, or not a square matrix.

    Reference: Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, section 2.1, with sup|σ'| = 1/4.

    >>> import numpy as np
    >>> from rnngrad import theory
    >>> print(round(theory.norm_bound(2 * np.eye(3), "sigmoid"), 4))
    -0.6931
    """
    steepest = _steepest(activation)
    matrix = np.asarray(w_hh, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"w_hh: expected shape (N, N), found {matrix.shape}")
    with np.errstate(divide="ignore"):  # U = 0: −inf
        return float(np.log(np.linalg.norm(matrix, 2) * steepest))


class GateTermBound(NamedTuple):
    """Three factors that bound the gated term of an LSTM's ∂c'/∂c."""

    weight: float
    """γ_w = σ_max of U_i, U_f, U_g on top of each other."""
    gates: float | np.ndarray
    """γ_x, the largest length over units of what the three gates weigh their pre-activations with."""
    output: float | np.ndarray
    """γ_h, the largest |∂h/∂c|."""

    @property
    def log_norm(self) -> float | np.ndarray:
        """log(γ_w γ_x γ_h), in nats."""
        with np.errstate(divide="ignore"):
            return np.log(self.weight) + np.log(self.gates) + np.log(self.output)


def gate_term_bound(w_hh: _Matrix, memory: Real) -> GateTermBound:
    """Returns the bound of the gated term of ∂c'/∂c that holds for every gate value while max|c| ≤ ``memory``.

    ::

        ‖[diag(c f') U_f + diag(g i') U_i + diag(i g') U_g] diag(o (1 − tanh² c))‖₂ ≤ γ_w γ_x γ_h

    The bracket is [diag(c f') diag(g i') diag(i g')] times the three U on top of each other.  The norm of three
    diagonals side by side is γ_x = max_n √((c f')² + (g i')² + (i g')²)_n, that of the stack γ_w, and γ_h = max_n
    |o (1 − tanh² c)|_n ≤ 1.  With f' ≤ 1/4 and (g i')² + (i g')² ≤ 1 (reached at g = 0, i = 1),
    γ_x ≤ √(1 + memory²/16).

    Args:
      w_hh: fused recurrent weights of :func:`rnngrad.cells.lstm`, shape (4N, N), order i f g o.
      memory: largest |c|.

    Raises:
      ValueError: not the shape of fused LSTM weights.

    >>> import numpy as np
    >>> from rnngrad import theory
    >>> print(round(theory.gate_term_bound(np.tile(np.eye(3), (4, 1)), 4.0).gates, 4))
    1.4142
    """
    return GateTermBound(_stacked_norm(w_hh), float(np.sqrt(1 + (float(memory) / 4) ** 2)), 1.0)


def gate_term_factors(
    w_hh: _Matrix, i: _Matrix, f: _Matrix, g: _Matrix, o_before: _Matrix, c_before: _Matrix
) -> GateTermBound:
    """Returns the same three factors at a step's gate activations (σ gates) in place of their worst values.

    Args:
      w_hh: fused recurrent weights, shape (4N, N), order i f g o.
      i: input gate of the step, (…, N); leading axes give one factor each.
      f: forget gate of the step.
      g: candidate of the step.
      o_before: output gate of the step before, which made h.
      c_before: memory c before the step.

    Raises:
      ValueError: not the shape of fused LSTM weights.

    >>> import numpy as np
    >>> from rnngrad import theory
    >>> half = np.full(3, 0.5)
    >>> print(theory.gate_term_factors(np.tile(np.eye(3), (4, 1)), half, half, 0 * half, half, 0 * half).output)
    0.5
    """
    i, f, g, o, c = (np.asarray(values, np.float64) for values in (i, f, g, o_before, c_before))
    lengths = np.sqrt((c * f * (1 - f)) ** 2 + (g * i * (1 - i)) ** 2 + (i * (1 - g**2)) ** 2)
    return GateTermBound(_stacked_norm(w_hh), lengths.max(axis=-1), (o * (1 - np.tanh(c) ** 2)).max(axis=-1))


def _stacked_norm(w_hh: _Matrix) -> float:
    matrix = np.asarray(w_hh, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != 4 * matrix.shape[1]:
        raise ValueError(f"w_hh: expected shape (4N, N), found {matrix.shape}")
    return float(np.linalg.norm(matrix[: 3 * matrix.shape[1]], 2))


# --- Gaussian expectations -------------------------------------------------------------------------------------------

# e^(−12²/2) = 5e-32: nothing that is asked for grows fast enough to be seen beyond
_HALF_WIDTH = 12.0
_NUM_NODES = 4000


class _Normal(NamedTuple):
    """Nodes and weights of a midpoint sum over N(0, 1); an even number of them leaves the kink of relu between two."""

    nodes: np.ndarray
    weights: np.ndarray


def _normal(num_nodes: int) -> _Normal:
    nodes = _HALF_WIDTH * ((2 * np.arange(num_nodes) + 1) / num_nodes - 1)
    weights = np.exp(-(nodes**2) / 2)
    return _Normal(nodes, weights / weights.sum())


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(z / 2))


def _check_at_least_zero(**values: Real) -> None:
    for name, value in values.items():
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number of at least 0, found {value}")


def _largest_fixed_point(f: Callable[[float], float], upper: float) -> float:
    """Returns where f(q) crosses q in [0, upper]; f(upper) ≤ upper, and above its last fixed point f(q) < q.

    False position (Illinois): each step costs one f.  Returns 0 when f(q) < q all the way down.
    """
    lower = 1e-13 * upper
    at_lower, at_upper = f(lower) - lower, f(upper) - upper
    if at_lower <= 0:
        return 0.0
    if at_upper >= 0:
        return upper
    side, q = 0, upper
    for _ in range(200):
        q = (lower * at_upper - upper * at_lower) / (at_upper - at_lower)
        at_q = f(q) - q
        if at_q == 0 or upper - lower < 1e-15 * upper:
            return q
        if at_q > 0:
            lower, at_lower = q, at_q
            at_upper *= 0.5 if side == 1 else 1
            side = 1
        else:
            upper, at_upper = q, at_q
            at_lower *= 0.5 if side == -1 else 1
            side = -1
        if abs(at_q) < 1e-15 * q:
            return q
    return q


# --- vanilla ---------------------------------------------------------------------------------------------------------


class VanillaMeanField(NamedTuple):
    """Mean field of the vanilla cell."""

    q: float
    """Variance of a pre-activation at the fixed point; inf when it grows for ever, NaN when any value would do."""
    chi: float
    """Growth of a tangent's mean square per step."""

    @property
    def rate(self) -> float:
        """½ log χ, nats per step: the rate of ‖J…J‖_F, and the largest Lyapunov exponent."""
        with np.errstate(divide="ignore"):
            return float(0.5 * np.log(self.chi))


def vanilla_mean_field(
    gain: Real,
    *,
    activation: str = "tanh",
    input_variance: Real = 0.0,
    bias_variance: Real = 0.0,
    num_nodes: int = _NUM_NODES,
) -> VanillaMeanField:
    """Returns the variance of pre-activations and the growth χ of a tangent's mean square, N → ∞.

    Args:
      gain: recurrent weights are N(0, gain²/N).  (``gain`` times a Haar orthogonal matrix gives the same q and χ.)
      activation: φ.
      input_variance: variance of W x, fresh at every step.
      bias_variance: variance of b over units.
      num_nodes: of the Gaussian expectations; the default serves √q up to about 50.

    Raises:
      ValueError: unknown activation, or a number that is negative or not finite.

    Reference: Sompolinsky, Crisanti & Sommers 1988; Poole et al. 2016, arXiv 1606.05340, eqs. 3 and 7.

    >>> from rnngrad import theory
    >>> field = theory.vanilla_mean_field(2.0)
    >>> print(round(field.q, 8), round(field.chi, 8), round(field.rate, 8))
    2.12147357 1.36267334 0.15472423
    """
    _steepest(activation)
    _check_at_least_zero(gain=gain, input_variance=input_variance, bias_variance=bias_variance)
    square, constant = float(gain) ** 2, float(input_variance) + float(bias_variance)
    if activation in ("relu", "identity"):
        chi = square * (0.5 if activation == "relu" else 1.0)
        if chi < 1:
            return VanillaMeanField(constant / (1 - chi), chi)
        return VanillaMeanField(float("nan") if chi == 1 and constant == 0 else float("inf"), chi)

    normal = _normal(num_nodes)
    phi: Callable[[np.ndarray], np.ndarray] = np.tanh if activation == "tanh" else _sigmoid

    def values(q: float) -> np.ndarray:
        return phi(np.sqrt(q) * normal.nodes)

    q = _largest_fixed_point(lambda q: square * float(normal.weights @ values(q) ** 2) + constant, square + constant)
    y = values(q)
    slope = 1 - y**2 if activation == "tanh" else y * (1 - y)
    return VanillaMeanField(q, square * float(normal.weights @ slope**2))


def critical_gain(activation: str = "tanh", *, input_variance: Real = 0.0, bias_variance: Real = 0.0) -> float:
    """Returns the gain at which χ = 1: below it the chain vanishes, above it explodes (N → ∞).

    For tanh and sigmoid; tanh without input or bias has 1.  By bisection between 0 and 1000.

    Raises:
      ValueError: unknown activation, or a number that is negative or not finite.

    >>> from rnngrad import theory
    >>> print(round(theory.critical_gain("relu"), 6), round(theory.critical_gain("tanh"), 6))
    1.414214 1.0
    """
    low, high = 0.0, 1000.0
    while high - low > 1e-13 * high:
        middle = 0.5 * (low + high)
        field = vanilla_mean_field(
            middle, activation=activation, input_variance=input_variance, bias_variance=bias_variance
        )
        low, high = (middle, high) if field.chi < 1 else (low, middle)
    return 0.5 * (low + high)


# --- gates -----------------------------------------------------------------------------------------------------------


class GateDistribution(NamedTuple):
    """Where a forget gate f stands, over units or over time, as nodes with weights."""

    log_values: np.ndarray
    """log f at the nodes."""
    weights: np.ndarray
    """Their probabilities, sum 1."""

    @property
    def mean(self) -> float:
        """E[f]."""
        return float(self.weights @ np.exp(self.log_values))

    @property
    def mean_log(self) -> float:
        """E[log f], nats per step: the rate of ∏f of a single unit, when f varies over time."""
        return float(self.weights @ self.log_values)

    @property
    def log_mean(self) -> float:
        """Logarithm of E[f], nats per step; never below ``mean_log``."""
        return float(np.log(self.mean))

    def survival(self, lags: np.ndarray) -> np.ndarray:
        """Returns E[f^lag] for each lag: the mean of ∏f when every unit keeps its own f."""
        return np.exp(np.multiply.outer(np.asarray(lags, np.float64), self.log_values)) @ self.weights


def gaussian_gate(mean: Real, variance: Real, *, num_nodes: int = _NUM_NODES) -> GateDistribution:
    """Returns f = σ(z) with z ~ N(mean, variance).

    This is exact for cells whose gates see the input only (minGRU, minLSTM) under Gaussian inputs.

    Raises:
      ValueError: a variance that is negative or not finite.

    >>> from rnngrad import theory
    >>> gate = theory.gaussian_gate(1.0, 4.0)
    >>> print(round(gate.mean_log, 3), round(gate.log_mean, 3))
    -0.642 -0.434
    """
    _check_at_least_zero(variance=variance)
    normal = _normal(num_nodes)
    return GateDistribution(-np.logaddexp(0, -(float(mean) + np.sqrt(float(variance)) * normal.nodes)), normal.weights)


def mean_log_gate(mean: Real, variance: Real) -> float:
    """Returns E[log σ(z)] for z ~ N(mean, variance), nats per step: the rate at which one unit's ∏f decays.

    Not log E[σ(z)], which is :attr:`GateDistribution.log_mean` and larger.

    >>> from rnngrad import theory
    >>> print(round(theory.mean_log_gate(1.0, 4.0), 3))
    -0.642
    """
    return gaussian_gate(mean, variance).mean_log


def chrono_gate(max_lag: Real, *, num_nodes: int = 200) -> GateDistribution:
    """Returns the forget gates that chrono biases set: f = u/(1 + u) with u ~ U(1, max_lag − 1).

    By Gauss–Legendre in log u.

    Raises:
      ValueError: ``max_lag`` not above 2.

    Reference: Tallec & Ollivier 2018, arXiv 1804.11188, eq. 16.

    >>> import numpy as np
    >>> from rnngrad import theory
    >>> print(theory.chrono_gate(100).survival(np.array([100])).round(4))
    [0.1496]
    """
    if not max_lag > 2:
        raise ValueError(f"max_lag: expected above 2, found {max_lag}")
    x, weights = np.polynomial.legendre.leggauss(num_nodes)
    longest = np.log(float(max_lag) - 1)
    log_u = 0.5 * longest * (x + 1)
    density = np.exp(log_u) * weights
    return GateDistribution(-np.log1p(np.exp(-log_u)), density / density.sum())


def ugi_gate(hidden_size: int, *, num_nodes: int = 200) -> GateDistribution:
    """Returns the forget gates that uniform gate initialisation sets: f ~ U(1/N, 1 − 1/N).

    By Gauss–Legendre in logit f.

    Raises:
      ValueError: N below 3, for which the interval is empty.

    Reference: Gu et al. 2020, arXiv 1910.09890, section 3.1.

    >>> from rnngrad import theory
    >>> print(round(theory.ugi_gate(64).mean, 6))
    0.5
    """
    if hidden_size < 3:
        raise ValueError(f"hidden_size: expected at least 3, found {hidden_size}")
    x, weights = np.polynomial.legendre.leggauss(num_nodes)
    z = np.log(hidden_size - 1) * x
    f = _sigmoid(z)
    density = f * (1 - f) * weights
    return GateDistribution(-np.logaddexp(0, -z), density / density.sum())


def constant_gate_retention(forget_bias: Real, lag: Real) -> float:
    """Returns lag · log σ(b_f): log retention, in nats, of a gate that stands at its bias.

    >>> import math
    >>> from rnngrad import theory
    >>> print(f"{math.exp(theory.constant_gate_retention(3.0, 100)):.1e}")
    7.8e-03
    """
    return float(-float(lag) * np.logaddexp(0, -float(forget_bias)))


def forget_bias_for(retention: Real, lag: Real) -> float:
    """Returns the forget bias b_f with σ(b_f)^lag = ``retention``, a number between 0 and 1.

    Raises:
      ValueError: ``retention`` not between 0 and 1, or ``lag`` not above 0.

    >>> from rnngrad import theory
    >>> print(round(theory.forget_bias_for(1e-2, 100), 2))
    3.05
    """
    if not 0 < retention < 1:
        raise ValueError(f"retention: expected a number between 0 and 1, found {retention}")
    if not lag > 0:
        raise ValueError(f"lag: expected above 0, found {lag}")
    # logit p = −log(1/p − 1) at p = retention^(1/lag)
    return float(-np.log(np.expm1(-np.log(float(retention)) / float(lag))))


# --- gated cells -----------------------------------------------------------------------------------------------------


class GatedMeanField(NamedTuple):
    """Mean field of a GRU or LSTM; see the module for what *untied* and *tied* mean."""

    state_variance: float
    """E[h²]."""
    memory_variance: float
    """E[c²] of an LSTM; E[h²] again of a GRU."""
    gate_variance: float
    """Variance of the pre-activations of the gates, gain² E[h²] + input_variance."""
    forget_gate: GateDistribution
    """f of an LSTM, u (the share kept) of a GRU."""
    chi: float
    """Growth of a tangent's mean square per step, untied: the largest eigenvalue of the second-moment map."""
    tied_rate: float
    """Nats per step with the same weights at every step, an approximation."""

    @property
    def rate(self) -> float:
        """½ log χ, nats per step, untied."""
        return float(0.5 * np.log(self.chi))


def _tied_rate(square_growth: Callable[[float], float], kept: float, coherent: float) -> float:
    """Returns λ with e^{2λ} = square_growth(1 / (e^λ/κ − kept)), or log(kept + coherent), whichever is larger.

    Args:
      square_growth: rises with its argument, so that the two sides cross once.
      kept: E[u].
      coherent: gain · ā.
    """

    def excess(growth: float) -> float:
        b = growth**2 + kept**2 - coherent**2
        root = np.sqrt(max(b**2 - (2 * kept * growth) ** 2, 0.0))
        return square_growth(2 * kept / (b + root - 2 * kept**2)) - growth**2

    low = (kept + coherent) * (1 + 1e-12)
    if excess(low) <= 0:
        return float(np.log(low))
    high = 2 * low
    while excess(high) > 0:
        high *= 2
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return float(np.log(low))


class _Gate(NamedTuple):
    """A σ gate at Gaussian nodes."""

    values: np.ndarray
    weights: np.ndarray

    def mean(self, values: np.ndarray) -> float:
        return float(self.weights @ values)

    @property
    def slopes(self) -> np.ndarray:
        return self.values * (1 - self.values)


def _gate(mean: float, variance: float, normal: _Normal) -> _Gate:
    return _Gate(_sigmoid(mean + np.sqrt(variance) * normal.nodes), normal.weights)


def gru_mean_field(
    gain: Real,
    *,
    input_variance: Real,
    forget_bias: Real = 0.0,
    reset: str = "after",
    num_nodes: int = 400,
) -> GatedMeanField:
    """Returns the mean field of :func:`rnngrad.cells.gru`, N → ∞.

    With s = gain² q + v, r and u = σ(N(b, s)), and all fields independent::

        q = E[h²] = E[(1−u)²] E[n²] / (1 − E[u²])
        χ = E[u²] + gain² (q + E[n²]) E[u'²] + E[(1−u)²] X
        after:   n = tanh(a + r z),  a ~ N(0, v),  z ~ N(0, gain² q),   X = gain² E[n'² (r² + r'² z²)]
        before:  n = tanh(a + z),    z ~ N(0, gain² q E[r²]),           X = gain² E[n'²] (E[r²] + gain² q E[r'²])

    and ā = E[1−u] E[n' r] (after) or E[1−u] E[n'] E[r] (before) for ``tied_rate``.

    Args:
      gain: recurrent weights of every gate are N(0, gain²/N).
      input_variance: v, the variance of W x in every gate, fresh at every step.
      forget_bias: bias of u; the other biases are 0.
      reset: ``"after"`` or ``"before"``.
      num_nodes: of the Gaussian expectations, in each of two dimensions.

    Raises:
      ValueError: unknown ``reset``, or a number that is negative or not finite.

    Reference: the setting of Gilboa et al. 2019, arXiv 1901.08987, derived anew.

    >>> import numpy as np
    >>> from rnngrad import theory
    >>> field = theory.gru_mean_field(0.0, input_variance=1.0)  # no recurrence: only u carries
    >>> print(round(field.chi, 4), round(float(field.forget_gate.survival(np.array([2]))[0]), 4))
    0.2934 0.2934
    """
    if reset not in ("after", "before"):
        raise ValueError(f"unknown reset {reset!r}; expected 'after' or 'before'")
    _check_at_least_zero(gain=gain, input_variance=input_variance)
    square, v, b = float(gain) ** 2, float(input_variance), float(forget_bias)
    normal = _normal(num_nodes)

    def parts(q: float) -> tuple[_Gate, _Gate, np.ndarray, np.ndarray, np.ndarray]:
        """Gates, the variance of n's pre-activation for each value of r, and n with joint weights (r, node)."""
        r, u = _gate(0.0, square * q + v, normal), _gate(b, square * q + v, normal)
        if reset == "after":
            variance = v + square * q * r.values**2
            weights = np.outer(r.weights, normal.weights)
        else:
            variance = np.array([v + square * q * r.mean(r.values**2)])
            weights = normal.weights[None]
        return r, u, variance, np.tanh(np.sqrt(variance)[:, None] * normal.nodes), weights

    def next_q(q: float) -> float:
        _, u, _, n, weights = parts(q)
        return u.mean((1 - u.values) ** 2) * float(np.sum(weights * n**2)) / (1 - u.mean(u.values**2))

    q = _largest_fixed_point(next_q, 1.0)
    r, u, variance, n, weights = parts(q)
    steep = weights * (1 - n**2) ** 2
    if reset == "after":
        # of z, given the sum a + r z = √variance ζ: mean (r gain² q / √variance) ζ, variance gain² q v / variance
        total = np.maximum(variance, np.finfo(float).tiny)
        given = np.outer((r.values * square * q) ** 2 / total, normal.nodes**2) + (square * q * v / total)[:, None]
        candidate = square * float(np.sum(steep * ((r.values**2)[:, None] + (r.slopes**2)[:, None] * given)))
    else:
        heard = r.mean(r.values**2) + square * q * r.mean(r.slopes**2)
        candidate = square * float(np.sum(steep)) * heard
    chi = (
        u.mean(u.values**2)
        + square * (q + float(np.sum(weights * n**2))) * u.mean(u.slopes**2)
        + u.mean((1 - u.values) ** 2) * candidate
    )
    slope = float(np.sum(weights * (1 - n**2) * (r.values[:, None] if reset == "after" else r.mean(r.values))))
    kept = u.mean(u.values)
    candidate_kept = slope * u.mean(u.values * (1 - u.values))

    def square_growth(memory: float) -> float:
        return chi + 2 * candidate_kept * square * (1 - kept) * slope * memory

    tied_rate = _tied_rate(square_growth, kept, float(gain) * (1 - kept) * slope)
    return GatedMeanField(q, q, square * q + v, gaussian_gate(b, square * q + v), chi, tied_rate)


# Kernels have fallen to 1e-15 at k = 24.
_LARGEST_K = 24.0


class _Grid(NamedTuple):
    """Chebyshev interpolation on [0, K]: everything linear in the values at ``k`` is a matrix or a row."""

    k: np.ndarray
    to_coefficients: np.ndarray
    second_derivative: np.ndarray
    integral: np.ndarray


def _grid(degree: int) -> _Grid:
    x = -np.cos(np.pi * np.arange(degree + 1) / degree)
    to_coefficients = np.linalg.inv(chebyshev.chebvander(x, degree))
    scale = 2 / _LARGEST_K
    second = chebyshev.chebvander(x, degree - 2) @ chebyshev.chebder(to_coefficients, 2, scl=scale)
    ends = chebyshev.chebint(np.eye(degree + 1), lbnd=-1, scl=1 / scale)
    return _Grid(0.5 * _LARGEST_K * (x + 1), to_coefficients, second, ends.sum(axis=0) @ to_coefficients)


def lstm_mean_field(
    gain: Real,
    *,
    input_variance: Real,
    forget_bias: Real = 0.0,
    degree: int = 96,
    num_nodes: int = 120,
) -> GatedMeanField:
    """Returns the mean field of :func:`rnngrad.cells.lstm`, N → ∞.

    With s = gain² q + v, f = σ(N(b_f, s)), i and o = σ(N(0, s)), g = tanh N(0, s), u = i g, and ϕ the characteristic
    function of c (see the module)::

        q = E[h²] = E[o²] E[tanh² c]
        m'(k) = E[cos(k u)] E_f[f² m(f k)] + gain² M ( E[cos(k u)] E_f[−f'² ϕ''(f k)] + E_f[ϕ(f k)] S(k) )
        S(k)  = E[(g² i'² + i² g'²) cos(k u)]
        M'    = E[o²] E[(1 − tanh² c')² δc'²] + gain² E[o'²] E[tanh² c] M

    where M = E[δh²] and m(k) = E[δc² e^{ikc}], so that the expectation in the last line is the integral of m' against
    the second kernel.  χ is the largest eigenvalue of (M, m) → (M', m').  For ``tied_rate``, with ā = E[i] E[g'],
    β = E[o] E[1 − tanh² c] and C_m = E[δc(t) δc(t+m)], the candidate hears gain² β² C_m from m steps before, and m' has
    the further term 2 E_f[f ϕ(f k)] E[i g' cos(k u)] Y_0.

    Args:
      gain: recurrent weights of every gate are N(0, gain²/N).
      input_variance: v, the variance of W x in every gate, fresh at every step.
      forget_bias: b_f; the other biases are 0.
      degree: of the Chebyshev interpolation in k.
      num_nodes: of the Gaussian expectations, in each dimension.

    Raises:
      ValueError: a number that is negative or not finite.

    Reference: the setting of Gilboa et al. 2019, arXiv 1901.08987, derived anew and with the law of c kept.

    >>> import numpy as np
    >>> from rnngrad import theory
    >>> field = theory.lstm_mean_field(0.0, input_variance=1.0)  # no recurrence: only f carries
    >>> print(round(field.chi, 4), round(float(field.forget_gate.survival(np.array([2]))[0]), 4))
    0.2934 0.2934
    """
    _check_at_least_zero(gain=gain, input_variance=input_variance)
    square, v, b = float(gain) ** 2, float(input_variance), float(forget_bias)
    normal, grid = _normal(num_nodes), _grid(degree)
    k = grid.k
    decay = np.full_like(k, 2 / np.pi)  # k / sinh(πk/2)
    decay[1:] = k[1:] / np.sinh(0.5 * np.pi * k[1:])
    to_sech2 = grid.integral * decay
    to_sech4 = grid.integral * decay * (k**2 + 4) / 6

    def parts(q: float) -> tuple[_Gate, _Gate, np.ndarray, np.ndarray, np.ndarray]:
        """Gates f and o, cos(k u) on (k, node), joint weights, and ϕ."""
        s = square * q + v
        f, o = _gate(b, s, normal), _gate(0.0, s, normal)
        g = np.tanh(np.sqrt(s) * normal.nodes)
        weights = np.outer(o.weights, normal.weights).ravel()
        cosine = np.cos(np.outer(k, np.outer(o.values, g).ravel()))  # i has the law of o
        # ϕ = diag(E cos) A ϕ with ϕ(0) = 1: a linear system for the values beyond k = 0
        step = (cosine @ weights)[:, None] * _averaged(grid, f, np.ones_like(f.values))
        phi = np.ones_like(k)
        phi[1:] = np.linalg.solve(np.eye(degree) - step[1:, 1:], step[1:, 0])
        return f, o, cosine, weights, phi

    def next_q(q: float) -> float:
        _, o, _, _, phi = parts(q)
        return o.mean(o.values**2) * (1 - float(to_sech2 @ phi))

    q = _largest_fixed_point(next_q, 1.0)
    f, o, cosine, weights, phi = parts(q)
    i, g = o.values[:, None], np.tanh(np.sqrt(square * q + v) * normal.nodes)
    heard = ((g * i * (1 - i)) ** 2 + (i * (1 - g**2)) ** 2).ravel()
    mean_cosine = cosine @ weights
    source = mean_cosine * (_averaged(grid, f, f.slopes**2) @ (-grid.second_derivative @ phi))
    source += (_averaged(grid, f, np.ones_like(f.values)) @ phi) * (cosine @ (weights * heard))
    # (M, m) → m', then (M, m') → M'
    memory = np.column_stack([square * source, mean_cosine[:, None] * _averaged(grid, f, f.values**2)])
    by_output = square * o.mean(o.slopes**2) * (1 - float(to_sech2 @ phi))

    def largest_eigenvalue(memory: np.ndarray) -> float:
        output = o.mean(o.values**2) * to_sech4 @ memory
        output[0] += by_output
        return float(np.linalg.eigvals(np.vstack([output, memory])).real.max())

    chi = largest_eigenvalue(memory)

    kept, mean_candidate = f.mean(f.values), float(weights @ (i * (1 - g**2)).ravel())
    output_slope = o.mean(o.values) * float(to_sech2 @ phi)
    coherent = (_averaged(grid, f, f.values) @ phi) * (cosine @ (weights * (i * (1 - g**2)).ravel()))
    heard_from_memory = square * mean_candidate * output_slope**2

    def square_growth(memory_of_field: float) -> float:
        # Y_0 in units of m(0) = C_0, the second column
        return largest_eigenvalue(
            memory + np.outer(2 * heard_from_memory * memory_of_field * coherent, np.arange(degree + 2) == 1)
        )

    tied_rate = _tied_rate(square_growth, kept, float(gain) * mean_candidate * output_slope)
    spread = float(weights @ np.outer(o.values, g).ravel() ** 2) / (1 - f.mean(f.values**2))
    return GatedMeanField(q, spread, square * q + v, gaussian_gate(b, square * q + v), chi, tied_rate)


def _averaged(grid: _Grid, f: _Gate, factor: np.ndarray) -> np.ndarray:
    """Returns the matrix of ϕ ↦ E_f[factor(f) ϕ(f k)] on the grid."""
    polynomials = chebyshev.chebvander(2 * np.outer(f.values, grid.k) / _LARGEST_K - 1, len(grid.k) - 1)
    return np.tensordot(f.weights * factor, polynomials, axes=1) @ grid.to_coefficients


# --- Gaussian matrices -----------------------------------------------------------------------------------------------


def _polygammas_at_halves(largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ψ(m/2) and ψ'(m/2) for m = 1 … largest, by ψ(x + 1) = ψ(x) + 1/x from x = 1/2 and x = 1."""
    first, second = np.empty(largest + 2), np.empty(largest + 2)
    first[1:3] = -np.euler_gamma - 2 * np.log(2), -np.euler_gamma
    second[1:3] = np.pi**2 / 2, np.pi**2 / 6
    for m in range(3, largest + 1):
        first[m] = first[m - 2] + 2 / (m - 2)
        second[m] = second[m - 2] - 4 / (m - 2) ** 2
    return first[1 : largest + 1], second[1 : largest + 1]


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size: expected at least 1, found {size}")


def newman_exponents(size: int, gain: Real = 1.0) -> np.ndarray:
    """Returns the N Lyapunov exponents of fresh Gaussian step matrices N(0, gain²/N), largest first, exact at every N.

    ::

        λ_i = ln gain + ½ [ln(2/N) + ψ((N − i + 1)/2)]

    Raises:
      ValueError: N below 1.

    Reference: Newman 1986, Commun. Math. Phys. 103, 121.

    >>> from rnngrad import theory
    >>> print(theory.newman_exponents(64)[[0, -1]].round(8))
    [-0.00785319 -2.71462296]
    """
    _check_size(size)
    digamma, _ = _polygammas_at_halves(size)
    return float(np.log(float(gain))) + 0.5 * (np.log(2 / size) + digamma[::-1])


def newman_step_variance(size: int) -> np.ndarray:
    """Returns the variance of one step's contribution to each of these exponents, ψ'((N − i + 1)/2) / 4.

    Under QR at every step the i-th diagonal entry is a χ variable with N − i + 1 degrees of freedom, independent over
    steps and over i.  The mean over T steps therefore has this variance divided by T, from the first step on.

    Raises:
      ValueError: N below 1.

    >>> from rnngrad import theory
    >>> print(theory.newman_step_variance(64)[[0, -1]].round(4))
    [0.0079 1.2337]
    """
    _check_size(size)
    return _polygammas_at_halves(size)[1][::-1] / 4


class Ginibre(NamedTuple):
    """One N×N matrix of entries N(0, gain²/N)."""

    spectral_radius: float
    """Edge of the eigenvalues as N → ∞: gain."""
    largest_singular_value: float
    """Edge of the singular values as N → ∞: 2 gain."""
    mean_log_det: float
    """E log|det|, exact at every N, in nats."""


def ginibre(size: int, gain: Real = 1.0) -> Ginibre:
    """Returns the edges of the spectrum of one Gaussian matrix, and its expected log|det|.

    Raises:
      ValueError: N below 1.

    Reference: Ginibre 1965, Geman 1980; the determinant is a product of independent χ variables (Goodman 1963).

    >>> from rnngrad import theory
    >>> print(round(theory.ginibre(2).mean_log_det, 4))
    -1.2704
    """
    exponents = newman_exponents(size, gain)
    return Ginibre(float(gain), 2 * float(gain), float(exponents.sum()))
