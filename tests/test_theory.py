"""Theory against quadrature of other kinds, draws, and the package's own cells."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.special

import rnngrad as rg
from rnngrad import theory


def gaussian_mean(function):
    """E[function(ζ)] by adaptive quadrature."""
    density = lambda z: function(z) * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    # the kink of relu stands at an end of an interval
    return sum(scipy.integrate.quad(density, *ends, epsabs=1e-13, limit=400)[0] for ends in ((-12, 0), (0, 12)))


def one_cotangent_rate(cell, params, state, xs, *, margin=50):
    """Rate of a random cotangent pulled back along xs; the first and last ``margin`` lags are left out."""
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(17), len(leaves))
    cotangent = jax.tree.unflatten(
        treedef, [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    )
    log_norm = rg.jacobian_chain(cell, params, state, xs, cotangent=cotangent, reduce=rg.logscaled.log_norm)
    return float(log_norm[margin] - log_norm[-1 - margin]) / (len(xs) - 2 * margin)


def network_rate(cell, seed, *, input_variance, num_steps, warm_up):
    """The same of a network with fresh Gaussian inputs, after a warm-up from a random state."""
    params, size = cell.init(jax.random.key(seed)), cell.input_size
    key = jax.random.key(1_000 + seed)
    xs = np.sqrt(input_variance).astype(np.float32) * jax.random.normal(key, (warm_up + num_steps, size))
    start = jax.tree.map(
        lambda leaf: 0.5 * jax.random.normal(jax.random.key(7), leaf.shape, leaf.dtype), cell.init_state()
    )
    start = rg.unroll(cell, params, start, xs[:warm_up]).final
    return one_cotangent_rate(cell, params, start, xs[warm_up:])


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "identity"])
def test_steepest_slopes(activation, x64):
    cell = rg.cells.vanilla(1, 1, activation=activation, dtype=jnp.float64)
    params = cell.init(jax.random.key(0))
    params = params._replace(w_ih=jnp.ones((1, 1)), w_hh=jnp.zeros((1, 1)), b=jnp.zeros(1))
    phi = lambda z: cell.step(params, cell.init_state(), z[None])[0].h[0]
    slopes = jax.vmap(jax.grad(phi))(jnp.linspace(-3, 3, 602))  # steepest next to 0, which no node hits
    # at z = 0.005 a slope lies z² = 2.5e-5 below its top
    assert theory.STEEPEST[activation] - 3e-5 < float(slopes.max()) <= theory.STEEPEST[activation]


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "identity"])
def test_norm_bound_holds_and_is_reached(activation):
    cell = rg.cells.vanilla(3, 8, activation=activation, init=rg.initializers.gaussian(1.5))
    params = cell.init(jax.random.key(0))
    bound = theory.norm_bound(params.w_hh, activation)
    curve = rg.retention(
        cell, params, cell.init_state(), jax.random.normal(jax.random.key(1), (40, 3)), norm="spectral"
    )
    assert (np.asarray(curve.log_norm) <= bound * np.arange(41) + 1e-4).all()  # 1e-4: float32
    # reached at z = 0 (relu: any z > 0) by U = 2 I
    still = params._replace(w_ih=0 * params.w_ih, w_hh=2 * jnp.eye(8), b=0 * params.b)
    if activation == "sigmoid":
        still = still._replace(b=-jnp.ones(8))  # h = 1/2 gives z = 0
    if activation == "relu":
        still = still._replace(b=jnp.ones(8))
    state = cell.init_state()._replace(h=jnp.full(8, 0.5 if activation == "sigmoid" else 0.0))
    curve = rg.retention(cell, still, state, jnp.zeros((5, 3)), norm="spectral")
    np.testing.assert_allclose(curve.log_norm[-1], 5 * theory.norm_bound(still.w_hh, activation), atol=1e-5)


def test_spectral_radius_is_no_bound():
    u, slope = np.array([[2.0, -2.0], [2.0, -2.0]]), np.diag([1.0, 0.0])
    assert np.abs(np.linalg.eigvals(u)).max() < 1e-7  # a double eigenvalue 0 is found to √eps
    assert np.abs(np.linalg.eigvals(slope @ u)).max() == 2
    assert theory.norm_bound(u, "tanh") == pytest.approx(np.log(4))


def test_gate_term_bound_holds_and_is_reached(x64):
    n, cell = 7, rg.cells.lstm(3, 7, forget_bias=2.0, init=rg.initializers.gaussian(2.0), dtype=jnp.float64)
    params = cell.init(jax.random.key(0))
    xs = 2 * jax.random.normal(jax.random.key(1), (60, 3))
    states, gates = rg.unroll(cell, params, cell.init_state(), xs)[:2]
    jacobians = np.asarray(rg.step_jacobians(cell, params, cell.init_state(), xs))
    worst = theory.gate_term_bound(params.w_hh, float(np.abs(states.c).max()))
    for t in range(1, 60):
        o, c = np.asarray(gates.o[t - 1]), np.asarray(states.c[t - 1])
        term = jacobians[t, n:, :n] * (o * (1 - np.tanh(c) ** 2))[None]
        at_step = theory.gate_term_factors(params.w_hh, gates.i[t], gates.f[t], gates.g[t], o, c)
        log_norm = np.log(np.linalg.norm(term, 2))
        assert log_norm <= at_step.log_norm + 1e-12 <= worst.log_norm + 2e-12
        by_hand = sum(
            np.diag(weight) @ np.asarray(params.w_hh)[block * n : (block + 1) * n]
            for block, weight in (
                (0, gates.g[t] * gates.i[t] * (1 - gates.i[t])),
                (1, c * gates.f[t] * (1 - gates.f[t])),
                (2, gates.i[t] * (1 - gates.g[t] ** 2)),
            )
        )
        np.testing.assert_allclose(term, by_hand * (o * (1 - np.tanh(c) ** 2))[None], rtol=1e-10, atol=1e-14)
    # i = o = 1, g = c = 0 and U_i = U_f = 0: the term is U_g itself, and so is the bound
    only_g = np.concatenate([np.zeros((2 * n, n)), 3 * np.eye(n), np.zeros((n, n))])
    ones, zeros = np.ones(n), np.zeros(n)
    assert theory.gate_term_factors(only_g, ones, zeros, zeros, ones, zeros) == (3, 1, 1)
    assert theory.gate_term_bound(only_g, 0.0) == (3, 1, 1)


def test_bounds_refuse_misuse():
    with pytest.raises(ValueError, match="unknown activation 'softplus'"):
        theory.norm_bound(np.eye(2), "softplus")
    with pytest.raises(ValueError, match=r"expected shape \(N, N\), found \(2, 3\)"):
        theory.norm_bound(np.ones((2, 3)), "tanh")
    with pytest.raises(ValueError, match=r"expected shape \(4N, N\), found \(6, 2\)"):
        theory.gate_term_bound(np.ones((6, 2)), 1.0)
    assert theory.norm_bound(np.zeros((2, 2)), "tanh") == -np.inf


# --- vanilla mean field ----------------------------------------------------------------------------------------------


def test_reference_numbers_of_the_tanh_network():
    field = theory.vanilla_mean_field(2.0)
    np.testing.assert_allclose(field, [2.12147357, 1.36267334], rtol=0, atol=5e-9)  # as printed, eight decimals
    np.testing.assert_allclose(field.rate, 0.15472423, rtol=0, atol=5e-9)
    assert theory.vanilla_mean_field(0.9).q == 0
    np.testing.assert_allclose(theory.vanilla_mean_field(0.9).chi, 0.81, rtol=1e-12)


@pytest.mark.parametrize(
    ("activation", "gain", "input_variance", "bias_variance"),
    [("tanh", 2.0, 0.0, 0.0), ("tanh", 0.7, 0.4, 0.1), ("tanh", 20.0, 1.0, 0.0), ("sigmoid", 8.0, 1.0, 0.0)],
)
def test_vanilla_fixed_point_by_adaptive_quadrature(activation, gain, input_variance, bias_variance):
    options = {"activation": activation, "input_variance": input_variance, "bias_variance": bias_variance}
    q, chi = theory.vanilla_mean_field(gain, **options)
    phi = np.tanh if activation == "tanh" else scipy.special.expit
    slope = (lambda z: 1 - np.tanh(z) ** 2) if activation == "tanh" else (lambda z: phi(z) * phi(-z))
    again = gain**2 * gaussian_mean(lambda z: phi(np.sqrt(q) * z) ** 2) + input_variance + bias_variance
    # quad is asked for 1e-13; a fixed point found to 1e-15 magnifies that by 1/(1 − slope of the map) < 10
    np.testing.assert_allclose(again, q, rtol=1e-11)
    np.testing.assert_allclose(gain**2 * gaussian_mean(lambda z: slope(np.sqrt(q) * z) ** 2), chi, rtol=1e-10)
    doubled = theory.vanilla_mean_field(gain, num_nodes=8000, **options)
    np.testing.assert_allclose(doubled, (q, chi), rtol=1e-10)


def test_midpoint_sums_against_gauss_hermite():
    """Why not Gauss–Hermite: at √q = 20, order 200 is off by 1e-4 where the midpoint sum is exact to round-off."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    normal = theory._normal(4000)
    expected = {}
    for scale in (1.0, 20.0):
        with mpmath.workdps(30):
            slope = lambda z, s=scale: mpmath.sech(s * z) ** 4 * mpmath.npdf(z)
            expected[scale] = float(2 * mpmath.quad(slope, [0, 1 / scale, 5 / scale, 2, 12]))
        midpoint = float(normal.weights @ (1 - np.tanh(scale * normal.nodes) ** 2) ** 2)
        np.testing.assert_allclose(midpoint, expected[scale], rtol=1e-12)
    hermite = lambda scale: weights @ (1 - np.tanh(scale * nodes) ** 2) ** 2 / weights.sum()
    np.testing.assert_allclose(hermite(1.0), expected[1.0], rtol=1e-8)
    assert abs(hermite(20.0) / expected[20.0] - 1) > 1e-4


def test_relu_and_identity():
    normal = theory._normal(4000)
    relu = np.maximum(normal.nodes, 0)
    np.testing.assert_allclose([normal.weights @ relu**2, normal.weights @ (relu > 0)], 0.5, rtol=1e-13)
    assert theory.vanilla_mean_field(1.0, activation="relu", input_variance=1.0) == (2.0, 0.5)
    assert theory.vanilla_mean_field(0.5, activation="identity", bias_variance=3.0) == (4.0, 0.25)
    assert theory.vanilla_mean_field(2.0, activation="relu") == (np.inf, 2.0)
    assert np.isnan(theory.vanilla_mean_field(1.0, activation="identity").q)  # any variance stays as it is
    assert theory.vanilla_mean_field(0.0, activation="identity").rate == -np.inf


def test_critical_gain():
    np.testing.assert_allclose(theory.critical_gain("tanh"), 1, rtol=1e-6)  # χ = 1 + O((g − 1)) there, q to 1e-13
    np.testing.assert_allclose(theory.critical_gain("identity"), 1, rtol=1e-12)
    for activation in ("tanh", "sigmoid"):
        gain = theory.critical_gain(activation, input_variance=1.0)
        np.testing.assert_allclose(
            theory.vanilla_mean_field(gain, activation=activation, input_variance=1.0).chi, 1, rtol=1e-9
        )


@pytest.mark.parametrize(("activation", "gain"), [("tanh", 1.5), ("sigmoid", 6.0), ("relu", 0.8)])
def test_driven_network_has_the_variance_and_chi(activation, gain):
    """Both sampled over the units and steps of networks of 1,000 units with unit input variance."""
    field = theory.vanilla_mean_field(gain, activation=activation, input_variance=1.0)
    samples = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        u, h = gain / np.sqrt(1000) * rng.standard_normal((1000, 1000)), np.zeros(1000)
        for step in range(60):
            z = u @ h + rng.standard_normal(1000)
            h = {"tanh": np.tanh, "sigmoid": scipy.special.expit, "relu": lambda z: np.maximum(z, 0)}[activation](z)
            slope = {"tanh": 1 - h**2, "sigmoid": h * (1 - h), "relu": (h > 0).astype(float)}[activation]
            if step >= 20:
                samples.append([np.mean(z**2), gain**2 * np.mean(slope**2)])
    # σ and relu have a mean and with it a part of z that stands still: 3,000 units then give q to √(2/3000) = 2.6 %
    # of that part, and the fixed point magnifies it (relu: by 1/(1 − χ) = 1.5)
    np.testing.assert_allclose(np.mean(samples, axis=0), field, rtol=0.02 if activation == "tanh" else 0.1)


@pytest.mark.slow
def test_largest_exponent_of_a_chaotic_network():
    """g = 2, no input, N = 1000: within 5e-3 of λ₁ = 0.15472423, four draws."""
    cell = rg.cells.vanilla(1, 1000, init=rg.initializers.gaussian(2.0))
    rates = [network_rate(cell, seed, input_variance=0.0, num_steps=2000, warm_up=200) for seed in range(4)]
    assert abs(np.mean(rates) - theory.vanilla_mean_field(2.0).rate) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.7, 1.5, 2.5])
def test_rate_of_a_driven_network(gain):
    cell = rg.cells.vanilla(500, 1000, init=rg.initializers.gaussian(gain))
    rates = [network_rate(cell, seed, input_variance=1.0, num_steps=600, warm_up=50) for seed in range(3)]
    # a step's log growth scatters by about √(2/N) = 0.045, its mean over 3 × 500 by 1e-3; quenched draws add 2e-3
    assert abs(np.mean(rates) - theory.vanilla_mean_field(gain, input_variance=1.0).rate) < 8e-3


# --- gates -----------------------------------------------------------------------------------------------------------


def test_gaussian_gate():
    """The list we started from has −0.640 and −0.433, as from a sample; to five digits they are these."""
    gate = theory.gaussian_gate(1.0, 4.0)
    np.testing.assert_allclose([gate.mean_log, gate.log_mean], [-0.64250, -0.43429], rtol=0, atol=5e-6)
    for mean, variance in ((1.0, 4.0), (-2.0, 0.3), (5.0, 9.0), (0.5, 0.0)):
        gate, scale = theory.gaussian_gate(mean, variance), np.sqrt(variance)
        log_f = lambda z, mean=mean, scale=scale: scipy.special.log_expit(mean + scale * z)
        np.testing.assert_allclose(gate.mean_log, gaussian_mean(log_f), rtol=1e-11)
        assert theory.mean_log_gate(mean, variance) == gate.mean_log
        power = lambda z, lag, log_f=log_f: np.exp(lag * log_f(z))
        expected = [gaussian_mean(lambda z, lag=lag, power=power: power(z, lag)) for lag in (1, 2, 100)]
        # quad is asked for 1e-13 and does better; the smallest value here is 4e-18
        np.testing.assert_allclose(gate.survival(np.array([1, 2, 100])), expected, rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(gate.mean, expected[0], rtol=1e-11)
        doubled = theory.gaussian_gate(mean, variance, num_nodes=8000)
        np.testing.assert_allclose(doubled.mean_log, gate.mean_log, rtol=1e-12)


def test_min_gru_decays_at_the_mean_log_gate():
    """Per unit, ∏u over 400 steps: the mean over units of its logarithm."""
    cell = rg.cells.min_gru(600, 300, forget_bias=1.0, init=rg.initializers.gaussian())
    xs = 2 * jax.random.normal(jax.random.key(1), (400, 600))
    gates = rg.unroll(cell, cell.init(jax.random.key(0)), cell.init_state(), xs).gates
    # log u scatters by 0.8 and 300 units share one input: 300 × 400 samples give 3e-3, the lengths of the 300 weight
    # vectors (variance 4 to 0.2 / √300 …) 5e-3
    np.testing.assert_allclose(np.mean(np.log(gates.u)), theory.mean_log_gate(1.0, 4.0), rtol=0, atol=0.012)


@pytest.mark.parametrize("scheme", ["chrono", "ugi"])
def test_gates_that_initialisers_draw(scheme):
    size = 200_000
    if scheme == "chrono":
        gate = theory.chrono_gate(100)
        b_f, _ = rg.initializers.chrono(100)(jax.random.key(0), size, jnp.float32)
        exact = {"mean": 1 - np.log(100 / 2) / 98}
        ends = np.array([1.0, 99.0])
        antiderivative = ends * np.log(ends) - (1 + ends) * np.log1p(ends)
        exact["mean_log"] = (antiderivative[1] - antiderivative[0]) / 98  # the ± u cancel
    else:
        gate = theory.ugi_gate(64)
        b_f, _ = rg.initializers.ugi()(jax.random.key(0), 64, jnp.float32)
        keys = jax.random.split(jax.random.key(0), size // 64)
        b_f = jax.vmap(lambda key: rg.initializers.ugi()(key, 64, jnp.float32)[0])(keys).ravel()
        low, high = 1 / 64, 63 / 64
        exact = {"mean": 0.5}
        exact["mean_log"] = (high * np.log(high) - low * np.log(low)) / (high - low) - 1
        lags = np.array([1, 10, 100])
        np.testing.assert_allclose(
            gate.survival(lags), (high ** (lags + 1) - low ** (lags + 1)) / (lags + 1) / (high - low), rtol=1e-12
        )
    for name, value in exact.items():
        np.testing.assert_allclose(getattr(gate, name), value, rtol=1e-12)
    f = scipy.special.expit(np.asarray(b_f, np.float64))
    lags = np.array([0, 1, 10, 100])
    powers = f[None] ** lags[:, None]
    # five standard errors of a mean over 200,000 draws, none for lag 0, which is 1 in both
    error = 5 * powers.std(axis=1) / np.sqrt(len(f)) + 1e-12
    assert (np.abs(gate.survival(lags) - powers.mean(axis=1)) < error).all()
    assert abs(gate.mean_log - np.log(f).mean()) < 5 * np.log(f).std() / np.sqrt(len(f))
    assert gate.log_mean > gate.mean_log


def test_constant_gates():
    for bias, expected in ((0, 7.9e-31), (1, 2.5e-14), (2, 3.1e-6), (3, 7.8e-3), (5, 0.511)):
        np.testing.assert_allclose(np.exp(theory.constant_gate_retention(bias, 100)), expected, rtol=0.02)  # two digits
    assert round(theory.forget_bias_for(1e-2, 100), 2) == 3.05
    for retention, lag in ((1e-2, 100), (0.9, 3), (1e-10, 7)):
        back = theory.constant_gate_retention(theory.forget_bias_for(retention, lag), lag)
        np.testing.assert_allclose(back, np.log(retention), rtol=1e-12)
    with pytest.raises(ValueError, match="retention: expected a number between 0 and 1, found 1"):
        theory.forget_bias_for(1, 100)
    with pytest.raises(ValueError, match="lag: expected above 0, found 0"):
        theory.forget_bias_for(0.5, 0)


# --- gated cells -----------------------------------------------------------------------------------------------------


def untied_growth(kind, gain, input_variance, forget_bias, *, size=1000, num_steps=120, warm_up=40, seed=0):
    """E[h²] and the growth rate of one tangent in a network whose weights are redrawn at every step.

    Given h and δh, fresh Gaussian weights make (U h, U δh) jointly Gaussian over units, so two columns of normals
    stand for the matrix: the oracle is exact at every size.
    """
    rng = np.random.default_rng(seed)
    sigmoid = scipy.special.expit
    h, c, dh, dc = (np.full(size, 0.1), np.zeros(size), rng.standard_normal(size), rng.standard_normal(size))
    rates, squares, memories = [], [], []
    for step in range(num_steps):

        def hear(v, dv):
            """gain · (U v, U dv), U redrawn."""
            along = v @ dv / max(v @ v, 1e-300)
            first, second = rng.standard_normal((2, size))
            z = gain * np.sqrt(v @ v / size) * first
            return z, along * z + gain * np.linalg.norm(dv - along * v) / np.sqrt(size) * second

        heard = lambda v=h, dv=dh: hear(v, dv)
        fresh = lambda: np.sqrt(input_variance) * rng.standard_normal(size)
        if kind == "lstm":
            (zi, di), (zf, df), (zg, dg), (zo, do) = (heard() for _ in range(4))
            i, f, g, o = (
                sigmoid(zi + fresh()),
                sigmoid(zf + fresh() + forget_bias),
                np.tanh(zg + fresh()),
                sigmoid(zo + fresh()),
            )
            dc = f * dc + c * f * (1 - f) * df + g * i * (1 - i) * di + i * (1 - g**2) * dg
            c = f * c + i * g
            dh = o * (1 - np.tanh(c) ** 2) * dc + np.tanh(c) * o * (1 - o) * do
            h = o * np.tanh(c)
        else:
            (zr, dr), (zu, du) = heard(), heard()
            r, u = sigmoid(zr + fresh()), sigmoid(zu + fresh() + forget_bias)
            slope_r = r * (1 - r) * dr
            if kind == "gru_after":
                zn, dn = heard()
                n = np.tanh(fresh() + r * zn)
                dn = (1 - n**2) * (r * dn + zn * slope_r)
            else:
                zn, dn = hear(r * h, r * dh + h * slope_r)
                n = np.tanh(fresh() + zn)
                dn = (1 - n**2) * dn
            dh = u * dh + (h - n) * u * (1 - u) * du + (1 - u) * dn
            h = (1 - u) * n + u * h
            c, dc = h, 0 * dh
        length = np.sqrt(dh @ dh + dc @ dc)
        dh, dc = dh / length, dc / length
        if step >= warm_up:
            rates.append(np.log(length))
            squares.append(np.mean(h**2))
            memories.append(np.mean(c**2))
    return np.mean(rates), np.mean(squares), np.mean(memories)


GATED = [(1.0, 1.0, 0.0), (3.0, 0.5, 1.0), (1.0, 0.1, 3.0)]


def gated_mean_field(kind, gain, input_variance, forget_bias, **options):
    options |= {"input_variance": input_variance, "forget_bias": forget_bias}
    if kind == "lstm":
        return theory.lstm_mean_field(gain, **options)
    return theory.gru_mean_field(gain, reset=kind.removeprefix("gru_"), **options)


@pytest.mark.parametrize("kind", ["gru_after", "gru_before", "lstm"])
@pytest.mark.parametrize(
    "setting", [GATED[0], *(pytest.param(row, marks=pytest.mark.slow) for row in GATED[1:])], ids=str
)
def test_gated_mean_field_against_redrawn_weights(kind, setting):
    field = gated_mean_field(kind, *setting)
    rate, square, memory = untied_growth(kind, *setting, size=8_000)
    # 8,000 units: each step's growth scatters by about 2/√N = 0.022, the mean of 80 steps by 2.5e-3; squares scatter by
    # √(2/N) = 1.6 % and stay correlated over the memory of h and c, at most 20 of the 80 steps
    assert abs(field.rate - rate) < 8e-3
    np.testing.assert_allclose(field.state_variance, square, rtol=0.03)
    np.testing.assert_allclose(field.memory_variance, memory, rtol=0.03)


@pytest.mark.slow
def test_gated_mean_field_converges():
    lstm = theory.lstm_mean_field(2.0, input_variance=0.5, forget_bias=1.0)
    finer = theory.lstm_mean_field(2.0, input_variance=0.5, forget_bias=1.0, degree=144, num_nodes=160)
    np.testing.assert_allclose(finer[:3], lstm[:3], rtol=1e-10)
    np.testing.assert_allclose(finer.chi, lstm.chi, rtol=1e-9)  # a second derivative of degree 144 costs digits
    for reset in ("after", "before"):
        gru = theory.gru_mean_field(2.0, input_variance=0.5, forget_bias=1.0, reset=reset)
        finer = theory.gru_mean_field(2.0, input_variance=0.5, forget_bias=1.0, reset=reset, num_nodes=800)
        np.testing.assert_allclose(finer[:3], gru[:3], rtol=1e-10)
        np.testing.assert_allclose(finer.chi, gru.chi, rtol=1e-10)


def test_law_of_the_memory():
    """E[tanh² c] from the characteristic function against draws of the series c = Σ ∏f u, f and u fresh."""
    field = theory.lstm_mean_field(0.0, input_variance=2.0, forget_bias=1.5)
    rng = np.random.default_rng(0)
    c = np.zeros(100_000)
    draw = lambda: np.sqrt(2.0) * rng.standard_normal(c.shape)
    for _ in range(40):
        c = scipy.special.expit(1.5 + draw()) * c + scipy.special.expit(draw()) * np.tanh(draw())
    open_share = np.mean(scipy.special.expit(draw()) ** 2)
    # 100,000 draws: squares scatter by about 1.5 of their size, 1.5 % is 3 standard errors
    np.testing.assert_allclose(field.state_variance, open_share * np.mean(np.tanh(c) ** 2), rtol=0.015)
    np.testing.assert_allclose(field.memory_variance, np.mean(c**2), rtol=0.015)


def test_gated_cells_without_recurrence_or_input():
    for kind in ("gru_after", "gru_before", "lstm"):
        field = gated_mean_field(kind, 0.0, 0.0, 2.0)
        np.testing.assert_allclose(field.rate, theory.constant_gate_retention(2.0, 1), rtol=1e-12)
        assert field.state_variance == 0


def test_tied_rate_of_constant_gates_is_the_edge_of_the_spectrum():
    """u + a U with Gaussian U has its eigenvalues in a disc around u: growth u + gain·a, and no other term."""
    kept, coherent = 0.6, 0.3
    # C_0 grows by u² + (gain·a)² + 2 u a Y_0 / C_0 with a Y_0 / C_0 = (gain·a)² · memory
    growth = lambda memory: kept**2 + coherent**2 + 2 * kept * coherent**2 * memory
    np.testing.assert_allclose(theory._tied_rate(growth, kept, coherent), np.log(kept + coherent), rtol=1e-6)
    matrix = np.random.default_rng(0).standard_normal((600, 600)) * coherent / np.sqrt(600)
    radius = np.abs(np.linalg.eigvals(kept * np.eye(600) + matrix)).max()
    assert abs(np.log(radius) - np.log(kept + coherent)) < 0.03  # sharp to N^(-1/2)
    # fresh gates: nothing coherent, and tied is untied
    np.testing.assert_allclose(theory._tied_rate(lambda memory: 0.5, 0.6, 0.0), 0.5 * np.log(0.5), rtol=1e-10)


@pytest.mark.parametrize("kind", ["gru_after", "gru_before", "lstm"])
def test_tied_is_untied_without_recurrence(kind):
    field = gated_mean_field(kind, 0.0, 1.0, 1.0)
    np.testing.assert_allclose(field.tied_rate, field.rate, rtol=1e-9)


# Settings, and how far a tied network of 1,000 units may lie from tied_rate: draws scatter by 2e-3, the rest is what
# tied_rate neglects.  Then the least by which the untied rate is too low.
TIED = [
    ("lstm", 1.0, 1.0, 1.0, 0.008, 0.09),
    ("lstm", 1.0, 0.1, 1.0, 0.008, 0.18),
    ("lstm", 1.0, 1.0, 3.0, 0.03, 0.04),  # 1 − tanh² c moves as slowly as c
    ("gru_after", 1.0, 1.0, 0.0, 0.008, 0.08),
    ("gru_before", 1.0, 1.0, 0.0, 0.008, 0.05),
    ("gru_after", 1.0, 0.1, 2.0, 0.008, 0.05),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "gain", "input_variance", "forget_bias", "room", "untied_too_low"), TIED)
def test_tied_networks(kind, gain, input_variance, forget_bias, room, untied_too_low):
    options = {"forget_bias": forget_bias, "init": rg.initializers.gaussian(gain)}
    if kind == "lstm":
        cell = rg.cells.lstm(500, 1000, **options)
    else:
        cell = rg.cells.gru(500, 1000, reset=kind.removeprefix("gru_"), **options)
    rates = [network_rate(cell, seed, input_variance=input_variance, num_steps=400, warm_up=100) for seed in range(2)]
    field = gated_mean_field(kind, gain, input_variance, forget_bias)
    assert abs(np.mean(rates) - field.tied_rate) < room
    assert np.mean(rates) - field.rate > untied_too_low


def test_mean_fields_refuse_misuse():
    with pytest.raises(ValueError, match="gain: expected a finite number of at least 0, found -1"):
        theory.vanilla_mean_field(-1)
    with pytest.raises(ValueError, match="input_variance: expected a finite number of at least 0, found nan"):
        theory.lstm_mean_field(1.0, input_variance=float("nan"))
    with pytest.raises(ValueError, match="unknown reset 'never'"):
        theory.gru_mean_field(1.0, input_variance=1.0, reset="never")
    with pytest.raises(ValueError, match="max_lag: expected above 2, found 2"):
        theory.chrono_gate(2)
    with pytest.raises(ValueError, match="hidden_size: expected at least 3, found 2"):
        theory.ugi_gate(2)


# --- Gaussian matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 64, 501])
def test_newman_against_scipy(size):
    degrees = size - np.arange(size)
    expected = np.log(1.3) + 0.5 * (np.log(2 / size) + scipy.special.digamma(degrees / 2))
    # the recurrence adds up to 250 terms
    np.testing.assert_allclose(theory.newman_exponents(size, 1.3), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(
        theory.newman_step_variance(size), scipy.special.polygamma(1, degrees / 2) / 4, rtol=0, atol=1e-13
    )


def test_newman_reference_numbers():
    np.testing.assert_allclose(theory.newman_exponents(64)[[0, -1]], [-0.00785319, -2.71462296], rtol=0, atol=5e-9)
    with pytest.raises(ValueError, match="size: expected at least 1, found 0"):
        theory.newman_exponents(0)


def test_newman_against_qr_of_drawn_matrices():
    rng, size, num_steps = np.random.default_rng(0), 6, 4000
    q, logs = np.eye(size), []
    for _ in range(num_steps):
        q, r = np.linalg.qr(0.8 / np.sqrt(size) * rng.standard_normal((size, size)) @ q)
        logs.append(np.log(np.abs(np.diag(r))))
    variance = theory.newman_step_variance(size)
    error = np.sqrt(variance / num_steps)
    assert (np.abs(np.mean(logs, axis=0) - theory.newman_exponents(size, 0.8)) < 4 * error).all()
    # a sample variance of 4,000 draws of a skewed variable scatters by about 5 %
    np.testing.assert_allclose(np.var(logs, axis=0), variance, rtol=0.2)
    correlation = np.corrcoef(np.array(logs)[1:, 0], np.array(logs)[:-1, 0])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(num_steps)


def test_ginibre():
    rng = np.random.default_rng(1)
    edges = theory.ginibre(400, 1.5)
    matrix = 1.5 / np.sqrt(400) * rng.standard_normal((400, 400))
    # edges are sharp to N^(-1/2) (eigenvalues) and N^(-2/3) (singular values)
    assert abs(np.abs(np.linalg.eigvals(matrix)).max() - edges.spectral_radius) < 0.1
    assert abs(np.linalg.norm(matrix, 2) - edges.largest_singular_value) < 0.1
    drawn = 1.5 / np.sqrt(20) * rng.standard_normal((3000, 20, 20))
    log_det = np.linalg.slogdet(drawn)[1]
    error = 4 * np.sqrt(theory.newman_step_variance(20).sum() / 3000)
    assert abs(log_det.mean() - theory.ginibre(20, 1.5).mean_log_det) < error
