"""What the initialisers draw, against the libraries that are installed and against formulas for those that are not.

All seeds are fixed, so a test that passes keeps passing until the random stream changes.  Of the tests on samples:

* Kolmogorov–Smirnov tests fail with probability ``KS_LEVEL`` = 1e-4 each, which is at a deviation of 2.2/√n of the
  distribution function: 1.6 % for the 18432 entries of one gate's input weights, 11 % for the 384 of its bias.  Leaving
  out the correction of a truncated normal (12 % in scale) deviates by 3.2 %.
* Variances lie within ``NUM_SIGMA`` = 5 standard errors: the variance of n independent entries has the relative
  standard error √((κ − 1)/n), κ the kurtosis, and leaves that band with probability 6e-7.
"""

from __future__ import annotations

import functools

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from rnngrad import cells, initializers

# N ≠ D.  64 is where SCIENCE quotes the singular values of a gate's share in one orthogonal draw.
HIDDEN_SIZE, INPUT_SIZE, NUM_SEEDS = 64, 48, 6
KS_LEVEL, NUM_SIGMA = 1e-4, 5.0
# Singular values of a float32 orthogonal matrix: N roundings at most, 64 · 1.2e-7.
ORTHOGONAL = {"rtol": 0, "atol": 1e-5}

FACTORIES = {"vanilla": cells.vanilla, "lstm": cells.lstm, "gru": cells.gru}
NUM_GATES = {"vanilla": 1, "lstm": 4, "gru": 3}
LIBRARIES = ("flax", "equinox", "torch", "keras", "haiku")
PRESETS = (*LIBRARIES, "gaussian", "orthogonal", "identity")

every_preset = pytest.mark.parametrize("preset", PRESETS)
every_kind = pytest.mark.parametrize("kind", FACTORIES)


@pytest.fixture
def unchecked():
    """Turns the annotations' run-time check off, which outside of tests is off: it would answer before our errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _keys(num_seeds=NUM_SEEDS):
    return jax.random.split(jax.random.key(2024), num_seeds)


def _over_seeds(init, num_seeds=NUM_SEEDS):
    """Returns what ``init(key)`` draws, seeds on the leading axis, as NumPy arrays.

    A plain loop: presets share their shapes and so their compiled draws, where a jit for each would compile anew.
    """
    drawn = [jax.tree.map(np.asarray, init(key)) for key in _keys(num_seeds)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)


@functools.cache
def _drawn(preset, kind):
    """Returns the parameters of ``NUM_SEEDS`` cells."""
    return _over_seeds(FACTORIES[kind](INPUT_SIZE, HIDDEN_SIZE, init=preset).init)


def _gates(weight, num_gates):
    """Splits the fused rows: (seeds, G·N, …) to (G, seeds, N, …)."""
    return np.stack(np.split(weight, num_gates, axis=1))


def _check_distribution(sample, expected):
    """Asserts that entries follow a SciPy distribution: as a whole, in their variance, and in their support."""
    sample = np.asarray(sample, np.float64).ravel()
    assert scipy.stats.kstest(sample, expected.cdf, method="asymp").pvalue > KS_LEVEL
    excess = float(expected.stats("k"))
    np.testing.assert_allclose(sample.var(), expected.var(), rtol=NUM_SIGMA * ((excess + 2) / sample.size) ** 0.5)
    low, high = expected.support()
    slack = 1e-6 * expected.std()  # the limits are float32 numbers
    assert sample.min() >= low - slack
    assert sample.max() <= high + slack


def _check_same_distribution(ours, theirs):
    """Asserts that two samples come from one distribution: as a whole, and in their standard deviations."""
    ours, theirs = (np.asarray(sample, np.float64).ravel() for sample in (ours, theirs))
    assert scipy.stats.ks_2samp(ours, theirs, method="asymp").pvalue > KS_LEVEL
    # log variance of n entries of kurtosis κ ≤ 3 (bounded or normal) has a standard error of at most √(2/n)
    error = (2 / ours.size + 2 / theirs.size) ** 0.5
    assert abs(np.log(ours.var() / theirs.var())) < NUM_SIGMA * error


def _singular_values(matrices):
    return np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)


def _uniform(limit):
    return scipy.stats.uniform(-limit, 2 * limit)


def _truncated(scale):
    return scipy.stats.truncnorm(-2, 2, scale=scale)


_TORCH_LIMIT = HIDDEN_SIZE**-0.5
_STD_OF_TRUNCATED = scipy.stats.truncnorm(-2, 2).std()

# --- weights, by formula -----------------------------------------------------------------------------------------

# Torch: U(±1/√N) everywhere.  Keras: Glorot uniform, its fan-out being all gates together.  Haiku: truncated normals of
# scale 1/√fan_in; its LSTM is one layer on [x, h]; only the GRU's VarianceScaling makes up for the truncation.
W_IH = {
    **{("torch", kind): _uniform(_TORCH_LIMIT) for kind in FACTORIES},
    **{("equinox", kind): _uniform(_TORCH_LIMIT) for kind in FACTORIES},
    **{("flax", kind): _truncated(INPUT_SIZE**-0.5 / _STD_OF_TRUNCATED) for kind in FACTORIES},
    **{("keras", kind): _uniform((6 / (INPUT_SIZE + NUM_GATES[kind] * HIDDEN_SIZE)) ** 0.5) for kind in FACTORIES},
    ("haiku", "vanilla"): _truncated(INPUT_SIZE**-0.5),
    ("haiku", "lstm"): _truncated((INPUT_SIZE + HIDDEN_SIZE) ** -0.5),
    ("haiku", "gru"): _truncated(INPUT_SIZE**-0.5 / _STD_OF_TRUNCATED),
    **{
        (preset, kind): scipy.stats.norm(0, INPUT_SIZE**-0.5)
        for preset in ("gaussian", "orthogonal", "identity")
        for kind in FACTORIES
    },
}

W_HH = {
    **{("torch", kind): _uniform(_TORCH_LIMIT) for kind in FACTORIES},
    **{("equinox", kind): _uniform(_TORCH_LIMIT) for kind in FACTORIES},
    ("haiku", "vanilla"): _truncated(HIDDEN_SIZE**-0.5),
    ("haiku", "lstm"): _truncated((INPUT_SIZE + HIDDEN_SIZE) ** -0.5),
    ("haiku", "gru"): _truncated(HIDDEN_SIZE**-0.5 / _STD_OF_TRUNCATED),
    **{("gaussian", kind): scipy.stats.norm(0, HIDDEN_SIZE**-0.5) for kind in FACTORIES},
}


@pytest.mark.parametrize(("preset", "kind"), W_IH)
def test_input_weights_follow_the_stated_distribution(preset, kind):
    for gate in _gates(_drawn(preset, kind).w_ih, NUM_GATES[kind]):
        _check_distribution(gate, W_IH[preset, kind])


@pytest.mark.parametrize(("preset", "kind"), W_HH)
def test_recurrent_weights_follow_the_stated_distribution(preset, kind):
    for gate in _gates(_drawn(preset, kind).w_hh, NUM_GATES[kind]):
        _check_distribution(gate, W_HH[preset, kind])


@every_kind
@pytest.mark.parametrize("preset", ["flax", "orthogonal"])
def test_every_gate_is_orthogonal_and_drawn_apart(preset, kind):
    gates = _gates(_drawn(preset, kind).w_hh, NUM_GATES[kind])
    np.testing.assert_allclose(_singular_values(gates), 1.0, **ORTHOGONAL)
    # tr(PᵀQ) of two independent orthogonal draws is N(0, 1) to good accuracy; of one and the same draw it is N = 64
    matrices = gates.reshape(-1, HIDDEN_SIZE, HIDDEN_SIZE).astype(np.float64)
    traces = np.einsum("aij,bij->ab", matrices, matrices)
    np.testing.assert_array_less(np.abs(traces[~np.eye(len(matrices), dtype=bool)]), 6.0)


@every_kind
def test_keras_draws_one_orthogonal_matrix_over_all_gates(kind):
    """Kernel (N, G·N) with orthonormal rows, so that our stacked gates have orthonormal columns."""
    stacked = _drawn("keras", kind).w_hh
    assert stacked.shape == (NUM_SEEDS, NUM_GATES[kind] * HIDDEN_SIZE, HIDDEN_SIZE)
    np.testing.assert_allclose(_singular_values(stacked), 1.0, **ORTHOGONAL)


def _check_share_of_one_orthogonal_draw(blocks, num_gates):
    """Asserts that N×N shares of a G·N×N orthogonal draw are not orthogonal.

    As N → ∞ their squared singular values fill [0, 4(1/G)(1 − 1/G)] (Jacobi ensemble, Collins 2005): the largest
    singular value tends to √(3/4) = 0.866 for four gates and √(8/9) = 0.943 for three.  At N = 64 the largest of a
    block lies below the edge on average (0.854 and 0.934, standard deviation 0.01: the edge fluctuates by a multiple of
    N^(−2/3) = 0.06), the smallest is of order 1/N.  Hence edge + 0.03, four standard deviations, for every block.
    """
    singular = _singular_values(blocks)
    edge = (4 / num_gates * (1 - 1 / num_gates)) ** 0.5
    assert singular.shape[-1] == HIDDEN_SIZE
    assert singular.max() < edge + 0.03
    assert np.median(singular.max(axis=-1)) < edge
    assert singular.max(axis=-1).min() > edge - 0.06
    assert singular.min(axis=-1).max() < 5 / HIDDEN_SIZE


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_one_orthogonal_draw_is_not_orthogonal_per_gate(kind):
    """SCIENCE, section 4: singular values of at most about 0.87 for four gates."""
    gates = _gates(_drawn("keras", kind).w_hh, NUM_GATES[kind])
    _check_share_of_one_orthogonal_draw(gates.reshape(-1, HIDDEN_SIZE, HIDDEN_SIZE), NUM_GATES[kind])
    if kind == "lstm":
        assert np.median(_singular_values(gates)[..., 0]) < 0.87


@every_kind
def test_identity_preset_is_the_identity_in_every_gate(kind):
    gates = _gates(_drawn("identity", kind).w_hh, NUM_GATES[kind])
    np.testing.assert_array_equal(gates, np.broadcast_to(np.eye(HIDDEN_SIZE), gates.shape))


@pytest.mark.parametrize("gain", [0.5, 1.5])
def test_gains_scale_the_recurrent_weights_only(gain):
    def draw(init):
        return _over_seeds(cells.lstm(INPUT_SIZE, HIDDEN_SIZE, init=init).init, 2)

    gaussian = draw(initializers.gaussian(gain))
    _check_distribution(gaussian.w_hh, scipy.stats.norm(0, gain * HIDDEN_SIZE**-0.5))
    orthogonal = draw(initializers.orthogonal(gain))
    np.testing.assert_allclose(_singular_values(_gates(orthogonal.w_hh, 4)), gain, rtol=1e-5)
    identity = draw(initializers.identity(gain))
    gates = _gates(identity.w_hh, 4)
    np.testing.assert_array_equal(gates, np.broadcast_to(gain * np.eye(HIDDEN_SIZE), gates.shape))
    for params in (gaussian, orthogonal, identity):
        _check_distribution(params.w_ih, scipy.stats.norm(0, INPUT_SIZE**-0.5))
        np.testing.assert_array_equal(params.b, 0.0)


@pytest.mark.parametrize("name", ["gaussian", "orthogonal", "identity"])
def test_preset_of_a_scheme_is_the_scheme_at_gain_one(name):
    by_name = cells.lstm(3, 5, init=name).init(jax.random.key(0))
    by_value = cells.lstm(3, 5, init=getattr(initializers, name)()).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, by_name, by_value)


# --- biases, by formula ------------------------------------------------------------------------------------------


def _sum_of_two_uniforms(limit):
    return scipy.stats.triang(0.5, -2 * limit, 4 * limit)


@every_kind
def test_torch_bias_is_the_sum_of_two_draws(kind):
    """Where the two biases add up; the candidate of the GRU keeps them apart."""
    params = _drawn("torch", kind)
    gates = _gates(params.b, NUM_GATES[kind])
    if kind == "gru":
        _check_distribution(gates[:2], _sum_of_two_uniforms(_TORCH_LIMIT))
        _check_distribution(gates[2], _uniform(_TORCH_LIMIT))
        _check_distribution(params.b_m, _uniform(_TORCH_LIMIT))
        # n pairs of independent draws correlate by 1/√n
        assert abs(np.corrcoef(gates[2].ravel(), params.b_m.ravel())[0, 1]) < NUM_SIGMA * params.b_m.size**-0.5
    else:
        _check_distribution(gates, _sum_of_two_uniforms(_TORCH_LIMIT))


@every_kind
def test_equinox_bias_is_one_draw(kind):
    _check_distribution(_drawn("equinox", kind).b, _uniform(_TORCH_LIMIT))


@every_kind
@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in ("torch", "equinox")])
def test_biases_are_zero_but_for_the_forget_gate(preset, kind):
    params = _drawn(preset, kind)
    gates = _gates(params.b, NUM_GATES[kind])
    expected = np.zeros_like(gates)
    if kind == "lstm" and preset in ("keras", "haiku"):
        expected[1] = 1.0  # order i f g o
    np.testing.assert_array_equal(gates, expected)
    if kind == "gru":
        np.testing.assert_array_equal(params.b_m, 0.0)


# --- weights and biases, against the libraries -------------------------------------------------------------------


@functools.cache
def _linen(factory):
    """Returns the variables of ``NUM_SEEDS`` cells as (name of the layer, name of the array) -> (seeds, …)."""
    peer = factory(HIDDEN_SIZE)
    carry = jnp.zeros(HIDDEN_SIZE)
    carry = (carry, carry) if "LSTM" in factory.__name__ else carry
    drawn = _over_seeds(lambda key: peer.init(key, carry, jnp.zeros(INPUT_SIZE))["params"])
    return {(layer, name): np.asarray(array) for layer, arrays in drawn.items() for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("kind", "factory"),
    [
        ("vanilla", flax.linen.SimpleCell),
        ("lstm", flax.linen.LSTMCell),
        ("lstm", flax.linen.OptimizedLSTMCell),
        ("gru", flax.linen.GRUCell),
    ],
)
def test_flax_preset_equals_linen(kind, factory):
    variables, ours = _linen(factory), _drawn("flax", kind)
    from_input = [array for (layer, name), array in variables.items() if layer[0] == "i" and name == "kernel"]
    recurrent = [array for (layer, name), array in variables.items() if layer[0] == "h" and name == "kernel"]
    biases = [array for (_, name), array in variables.items() if name == "bias"]
    assert len(from_input) == len(recurrent) == NUM_GATES[kind]
    for gate, kernel in zip(_gates(ours.w_ih, NUM_GATES[kind]), from_input, strict=True):
        _check_same_distribution(gate, kernel)
    # both cut the normal at 2 scales, where its density is 0.057 per scale: a share 2 · 0.057 · 0.02 = 0.23 % of at
    # least 18432 entries lies within 1 % of the cut, so that none does with probability e^-42
    for sample in (ours.w_ih, np.stack(from_input)):
        limit = 2 * INPUT_SIZE**-0.5 / _STD_OF_TRUNCATED
        assert 0.99 * limit < np.abs(sample).max() <= limit * (1 + 1e-6)
    np.testing.assert_allclose(_singular_values(np.stack(recurrent)), 1.0, **ORTHOGONAL)
    np.testing.assert_allclose(_singular_values(_gates(ours.w_hh, NUM_GATES[kind])), 1.0, **ORTHOGONAL)
    np.testing.assert_array_equal(np.stack(biases), 0.0)
    np.testing.assert_array_equal(ours.b, 0.0)


def _nnx(factory, num_seeds=3):
    """Returns the kernels and biases of a few nnx cells, as lists of dicts."""
    drawn = [nnx.state(factory(INPUT_SIZE, HIDDEN_SIZE, rngs=nnx.Rngs(seed))) for seed in range(num_seeds)]
    return [jax.tree.map(np.asarray, nnx.to_pure_dict(variables)) for variables in drawn]


def test_flax_preset_equals_nnx_lstm():
    """nnx.LSTMCell, one layer per gate, draws like linen."""
    drawn, ours = _nnx(nnx.LSTMCell), _drawn("flax", "lstm")
    for layer, gate in zip(("ii", "if_", "ig", "io"), _gates(ours.w_ih, 4), strict=True):
        _check_same_distribution(gate, np.stack([variables[layer]["kernel"] for variables in drawn]))
    recurrent = np.stack([variables[layer]["kernel"] for variables in drawn for layer in ("hi", "hf", "hg", "ho")])
    np.testing.assert_allclose(_singular_values(recurrent), 1.0, **ORTHOGONAL)
    biases = np.stack([variables[layer]["bias"] for variables in drawn for layer in ("hi", "hf", "hg", "ho")])
    np.testing.assert_array_equal(biases, 0.0)


@pytest.mark.parametrize(("kind", "factory"), [("lstm", nnx.OptimizedLSTMCell), ("gru", nnx.GRUCell)])
def test_fused_nnx_cells_are_not_the_flax_preset(kind, factory):
    """They draw w_ih alike, but one N×G·N orthogonal matrix: their w_hh is the one of the Keras preset."""
    drawn = _nnx(factory)
    _check_same_distribution(_drawn("flax", kind).w_ih, np.stack([v["dense_i"]["kernel"] for v in drawn]))
    kernels = np.stack([variables["dense_h"]["kernel"] for variables in drawn])
    np.testing.assert_allclose(_singular_values(kernels), 1.0, **ORTHOGONAL)
    blocks = np.concatenate(np.split(kernels, NUM_GATES[kind], axis=-1))
    _check_share_of_one_orthogonal_draw(blocks, NUM_GATES[kind])


@functools.cache
def _equinox(factory):
    return _over_seeds(lambda key: factory(INPUT_SIZE, HIDDEN_SIZE, key=key))


@pytest.mark.parametrize(("kind", "factory"), [("lstm", eqx.nn.LSTMCell), ("gru", eqx.nn.GRUCell)])
def test_equinox_preset_equals_equinox(kind, factory):
    peer, ours = _equinox(factory), _drawn("equinox", kind)
    pairs = [(ours.w_ih, peer.weight_ih), (ours.w_hh, peer.weight_hh), (ours.b, peer.bias)]
    if kind == "gru":
        pairs.append((ours.b_m, peer.bias_n))
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        num_gates = mine.shape[1] // HIDDEN_SIZE
        for gate, gate_theirs in zip(_gates(mine, num_gates), _gates(theirs, num_gates), strict=True):
            _check_same_distribution(gate, gate_theirs)
            # the largest of n ≥ 384 uniform magnitudes misses the limit by 5 % with probability 0.95^384 = 3e-9
            for sample in (gate, gate_theirs):
                assert 0.95 * _TORCH_LIMIT < np.abs(sample).max() <= _TORCH_LIMIT * (1 + 1e-6)


# --- what presets share ------------------------------------------------------------------------------------------


@every_preset
def test_draws_depend_on_the_key_and_on_nothing_else(preset):
    """Seeds differ from each other, and input and recurrent weights are drawn apart (here D = N, alike in shape)."""
    cell = cells.lstm(6, 6, init=preset)
    first, again, other = (cell.init(jax.random.key(seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.w_ih, other.w_ih)
    assert not np.array_equal(first.w_ih, first.w_hh)
    if preset != "identity":
        assert not np.array_equal(first.w_hh, other.w_hh)


@every_preset
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_have_the_dtype_asked_for(preset, dtype):
    with jax.enable_x64(dtype == "float64"):
        dtype = jnp.dtype(dtype)
        params = cells.lstm(3, 5, init=preset, forget_bias=1.0, dtype=dtype).init(jax.random.key(0))
        assert {name: leaf.dtype for name, leaf in params._asdict().items()} == dict.fromkeys(params._fields, dtype)
        assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in params)


# --- the forget gate's bias --------------------------------------------------------------------------------------

# cell, the gate that keeps memory, the input gate that chrono and UGI turn the other way
GATED = {
    "lstm": (cells.lstm, "f", "i"),
    "peephole_lstm": (cells.peephole_lstm, "f", "i"),
    "coupled_lstm": (cells.coupled_lstm, "f", None),
    "gru_after": (functools.partial(cells.gru, reset="after"), "u", None),
    "gru_before": (functools.partial(cells.gru, reset="before"), "u", None),
    "min_gru": (cells.min_gru, "u", None),
    "min_lstm": (cells.min_lstm, "f", "i"),
}

every_gated_cell = pytest.mark.parametrize("name", GATED)


def _effective_biases(name, **options):
    """Returns what every gate hears when state and input are zero, by gate: the bias that counts."""
    cell = GATED[name][0](3, 5, **options)
    z = cell.preactivate(cell.init(jax.random.key(4)), cell.init_state(), jnp.zeros(3))
    return {gate: np.asarray(value) for gate, value in z._asdict().items()}


@every_gated_cell
@every_preset
def test_forget_bias_is_the_effective_bias(name, preset):
    """Also where a library adds two biases (Torch) or a constant (Keras, Haiku); every other gate is left alone."""
    keeps = GATED[name][1]
    found, without = (_effective_biases(name, init=preset, forget_bias=bias) for bias in (2.5, None))
    np.testing.assert_array_equal(found.pop(keeps), 2.5)
    del without[keeps]
    jax.tree.map(np.testing.assert_array_equal, found, without)


@every_gated_cell
@every_preset
def test_forget_bias_of_a_library(name, preset):
    keeps = GATED[name][1]
    found = _effective_biases(name, init=preset)[keeps]
    if preset in ("torch", "equinox"):
        limit = (2 if preset == "torch" else 1) * 5**-0.5
        assert len(set(found.tolist())) == 5
        assert np.abs(found).max() <= limit
    else:
        adds_one = preset in ("keras", "haiku") and "lstm" in name
        np.testing.assert_array_equal(found, 1.0 if adds_one else 0.0)


@every_gated_cell
@pytest.mark.parametrize("scheme", ["chrono", "ugi"])
def test_drawn_forget_bias_reaches_the_gates(name, scheme):
    _, keeps, takes = GATED[name]
    bias = initializers.chrono(50.0) if scheme == "chrono" else initializers.ugi()
    found, without = (_effective_biases(name, init="torch", forget_bias=b) for b in (bias, None))
    low, high = (0.0, np.log(49.0)) if scheme == "chrono" else (-np.log(4.0), np.log(4.0))  # logit(1/5), logit(4/5)
    b_f = found.pop(keeps)
    assert len(set(b_f.tolist())) == 5
    assert low - 1e-6 <= b_f.min() < b_f.max() <= high + 1e-6
    if takes is not None:
        np.testing.assert_array_equal(found.pop(takes), -b_f)
    jax.tree.map(np.testing.assert_array_equal, found, {gate: without[gate] for gate in found})


# 20000 units: the Kolmogorov–Smirnov test then sees a deviation of 1.6 %
_NUM_UNITS = 20_000


@pytest.mark.parametrize("max_lag", [3.0, 100.0, 2000.0])
def test_chrono_is_uniform_in_the_memory_it_gives(max_lag):
    """Tallec & Ollivier 2018, eq. 16: exp(b_f) ~ U(1, T − 1), the time constant of the gate but for 1; b_i = −b_f."""
    b_f, b_i = (
        np.asarray(b, np.float64) for b in initializers.chrono(max_lag)(jax.random.key(3), _NUM_UNITS, jnp.float32)
    )
    _check_distribution(np.exp(b_f), scipy.stats.uniform(1, max_lag - 2))
    assert b_f.min() >= 0
    assert b_f.max() <= np.log(max_lag - 1) * (1 + 1e-6)
    np.testing.assert_array_equal(b_i, -b_f)


def test_chrono_of_two_steps_is_zero():
    b_f, b_i = initializers.chrono(2.0)(jax.random.key(3), 100, jnp.float32)
    # log 1, up to the 1e-6 by which the interval is kept open
    np.testing.assert_allclose(b_f, 0.0, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(b_i, -np.asarray(b_f))


def test_ugi_spreads_the_forget_gates_evenly():
    """Gu et al. 2020: σ(b_f) ~ U(1/N, 1 − 1/N)."""
    b_f, b_i = (np.asarray(b, np.float64) for b in initializers.ugi()(jax.random.key(3), _NUM_UNITS, jnp.float32))
    edge = 1 / _NUM_UNITS
    gates = 1 / (1 + np.exp(-b_f))
    _check_distribution(gates, scipy.stats.uniform(edge, 1 - 2 * edge))
    np.testing.assert_array_equal(b_i, -b_f)


@pytest.mark.parametrize("hidden_size", [1, 2])
def test_ugi_of_a_tiny_cell_is_finite(hidden_size):
    """(1/N, 1 − 1/N) is empty for N < 3: gates then lie in (1/3, 2/3), so that |b_f| ≤ log 2."""
    b_f, _ = jax.vmap(lambda key: initializers.ugi()(key, hidden_size, jnp.float32))(_keys(200))
    assert 0.5 * np.log(2.0) < np.abs(np.asarray(b_f)).max() <= np.log(2.0) + 1e-6


# --- cells with weights of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize(("max_lag", "low", "high"), [(None, 0.0, 1.0), (20, 0.5 ** (1 / 20), 2 ** (1 / 20))])
def test_indrnn_draws_its_recurrent_vector_uniformly(max_lag, low, high):
    params = jax.jit(jax.vmap(cells.indrnn(3, HIDDEN_SIZE, max_lag=max_lag).init))(_keys(200))
    # entries around 1 are float32 numbers 1.2e-7 apart: nothing against an interval of 0.07
    _check_distribution(params.u, scipy.stats.uniform(low, high - low))


def test_peepholes_are_drawn_apart_like_recurrent_weights():
    params = jax.jit(jax.vmap(cells.peephole_lstm(3, HIDDEN_SIZE).init))(_keys(64))
    peepholes = [np.asarray(p) for p in (params.p_i, params.p_f, params.p_o)]
    for peephole in peepholes:
        _check_distribution(peephole, _uniform(_TORCH_LIMIT))
    correlations = np.corrcoef(np.stack(peepholes).reshape(3, -1)) - np.eye(3)
    assert np.abs(correlations).max() < NUM_SIGMA * peepholes[0].size ** -0.5


def test_lru_fills_its_ring_evenly():
    """Orvieto et al. 2023, lemma 3.2: |λ|² uniform on [r², R²], the phase uniform; γ = √(1 − |λ|²)."""
    cell = cells.lru(INPUT_SIZE, HIDDEN_SIZE, radius=(0.5, 0.95), max_phase=1.5)
    params = jax.tree.map(np.asarray, jax.jit(jax.vmap(cell.init))(_keys(64)))
    eigenvalues = np.asarray(jax.vmap(cells.eigenvalues)(params), np.complex128)
    _check_distribution(np.abs(eigenvalues) ** 2, scipy.stats.uniform(0.25, 0.95**2 - 0.25))
    _check_distribution(np.angle(eigenvalues), scipy.stats.uniform(0.0, 1.5))
    # float32: |λ|² passes through two logarithms and back (a few ε), and 1 − |λ|² ≥ 0.0975 loses one digit to it
    np.testing.assert_allclose(np.exp(params.gamma_log) ** 2, 1 - np.abs(eigenvalues) ** 2, rtol=1e-5)
    for b in (params.b_re, params.b_im):
        _check_distribution(b, scipy.stats.norm(0, (2 * INPUT_SIZE) ** -0.5))
    for c in (params.c_re, params.c_im):
        _check_distribution(c, scipy.stats.norm(0, HIDDEN_SIZE**-0.5))


# --- misuse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [cells.vanilla, cells.lstm, cells.gru, cells.min_lstm, cells.indrnn])
def test_unknown_preset_names_those_that_exist(unchecked, factory):
    with pytest.raises(ValueError, match=r"unknown initialisation 'pytorch'; expected one of: flax, .*torch.*identity"):
        factory(3, 5, init="pytorch")


@pytest.mark.parametrize("max_lag", [1.0, 1.99, -5.0])
def test_chrono_of_less_than_two_steps_is_refused(max_lag):
    with pytest.raises(ValueError, match=f"chrono: expected max_lag of at least 2, found {max_lag}"):
        initializers.chrono(max_lag)


def test_chrono_of_an_integer_one_is_refused(unchecked):
    with pytest.raises(ValueError, match="expected max_lag of at least 2, found 1"):
        initializers.chrono(1)
