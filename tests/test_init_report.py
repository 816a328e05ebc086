"""The report on an initialisation against NumPy by hand: a plain loop over the oracles' equations and weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad import theory
from rnngrad.init_report import Bias, GateBlock, init_report
from tests.cases import example
from tests.oracles import DIRECTS, JACOBIANS, ORACLES

NUM_STEPS = 30


def _numpy(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _curve(jacobians, block):
    """log(‖J_{T−1} … J_{T−lag}‖_F / √M) of a diagonal block, by plain products: 30 steps stay in range."""
    rows, found = np.eye(jacobians[0].shape[0])[block], [0.0]
    for jacobian in reversed(jacobians):
        rows = rows @ jacobian
        with np.errstate(divide="ignore"):
            found.append(np.log(np.linalg.norm(rows[:, block]) / math.sqrt(len(block))))
    return np.array(found)


def _slope(curve):
    """Least squares over the later half of the lags."""
    longest = len(curve) - 1
    lags = np.arange(longest // 2, longest + 1)
    return np.polyfit(lags, curve[lags], 1)[0]


class _ByHand:
    """States, direct and full curves of one layer over given inputs."""

    def __init__(self, name, params, state, xs, block):
        states, directs, fulls = [state], [], []
        for x in xs:
            directs.append(DIRECTS[name](params, states[-1], x))
            fulls.append(JACOBIANS[name](params, states[-1], x))
            states.append(type(state)(**ORACLES[name](params, states[-1], x)))
        self.states = states
        self.kept = np.abs([np.diag(matrix)[block] for matrix in directs])
        self.direct, self.full = _curve(directs, block), _curve(fulls, block)


def _assert_rates(layer, hand):
    logs = np.log(hand.kept)
    np.testing.assert_allclose(layer.kept, (hand.kept.mean(), logs.mean()), rtol=1e-12)
    np.testing.assert_allclose(layer.kept.log_mean, np.log(hand.kept.mean()), rtol=1e-12)
    assert layer.kept.log_mean >= layer.kept.mean_log  # Jensen
    for rate, nats in ((layer.e_fold, 1.0), (layer.percent, math.log(100))):
        np.testing.assert_allclose(rate.predicted, -nats / logs.mean(), rtol=1e-12)
        below = np.flatnonzero(hand.direct <= -nats)
        assert rate.measured == (below[0] if below.size else math.inf)
    np.testing.assert_allclose(layer.direct_rate, (_slope(hand.direct), logs.mean()), rtol=1e-9)
    np.testing.assert_allclose(layer.full_rate.measured, _slope(hand.full), rtol=1e-9)


def _with_known_blocks(params, num_gates):
    """Recurrent block k is 0.2 · diag(2^k, …, 2^(k−3)); the rows of block 0 are moved on by one."""
    n = params.w_hh.shape[1]
    blocks = [0.2 * 2.0 ** (k - np.arange(n)) * np.eye(n) for k in range(num_gates)]
    blocks[0] = np.roll(blocks[0], 1, axis=0)
    return params._replace(w_hh=jnp.asarray(np.concatenate(blocks)))


def _known_block(gate, k, n=4):
    """Singular values 0.2 · 2^k … 0.2 · 2^(k−n+1); the cyclic one has their geometric mean for every eigenvalue."""
    values = 0.2 * 2.0 ** (k - np.arange(n))
    radius = np.exp(np.log(values).mean()) if k == 0 else values[0]
    return GateBlock(gate, values[0], np.median(values), values[-1], radius)


def _assert_blocks(layer, expected):
    assert [block.gate for block in layer.blocks] == [block.gate for block in expected]
    np.testing.assert_allclose([b[1:] for b in layer.blocks], [b[1:] for b in expected], rtol=1e-12)


def test_lstm(x64):
    ex = example("lstm", num_steps=NUM_STEPS, dtype="float64")
    params = _with_known_blocks(ex.params, 4)
    params = params._replace(b=params.b.at[4:8].set(jnp.asarray([0.5, 1.0, 2.0, -0.5])))
    report = init_report(ex.cell, params, ex.xs, state=ex.state)
    # two tables, of three columns and of five
    assert {line.count("|") for line in report.table().splitlines() if line} == {4, 6}
    (layer,) = report.layers
    assert (report.num_steps, layer.layer, layer.cell, layer.memory) == (NUM_STEPS, "", "lstm", "c")
    assert (layer.forget_gate, layer.forget_bias) == ("f", Bias(0.75, -0.5, 2.0))
    hand = _ByHand("lstm", _numpy(params), _numpy(ex.state), np.asarray(ex.xs), np.arange(4, 8))
    _assert_rates(layer, hand)
    np.testing.assert_allclose(hand.kept, rg.unroll(ex.cell, params, ex.state, ex.xs).gates.f, rtol=1e-12)
    _assert_blocks(layer, [_known_block(gate, k) for k, gate in enumerate("ifgo")])
    gain = math.sqrt(np.mean([np.linalg.norm(block) ** 2 / 4 for block in np.split(np.asarray(params.w_hh), 4)]))
    heard = np.asarray(ex.xs) @ np.asarray(params.w_ih).T
    field = theory.lstm_mean_field(gain, input_variance=np.mean(heard**2), forget_bias=0.75)
    np.testing.assert_allclose(layer.full_rate.predicted, field.tied_rate, rtol=1e-10)
    assert math.isnan(layer.bound)


@pytest.mark.parametrize("reset", ["after", pytest.param("before", marks=pytest.mark.slow)])
def test_gru(reset, x64):
    ex = example(f"gru_{reset}", num_steps=NUM_STEPS, dtype="float64")
    params = _with_known_blocks(ex.params, 3)
    params = params._replace(b=params.b.at[4:8].set(jnp.asarray([0.5, 1.0, 2.0, -0.5])))
    (layer,) = init_report(ex.cell, params, ex.xs, state=ex.state).layers
    assert (layer.memory, layer.forget_gate, layer.forget_bias) == ("h", "u", Bias(0.75, -0.5, 2.0))
    _assert_rates(layer, _ByHand(f"gru_{reset}", _numpy(params), _numpy(ex.state), np.asarray(ex.xs), np.arange(4)))
    _assert_blocks(layer, [_known_block(gate, k) for k, gate in enumerate("run")])
    gain = math.sqrt(np.mean([np.linalg.norm(block) ** 2 / 4 for block in np.split(np.asarray(params.w_hh), 3)]))
    heard = np.asarray(ex.xs) @ np.asarray(params.w_ih).T
    field = theory.gru_mean_field(gain, input_variance=np.mean(heard**2), forget_bias=0.75, reset=reset)
    np.testing.assert_allclose(layer.full_rate.predicted, field.tied_rate, rtol=1e-10)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "identity"])
def test_vanilla(activation, x64):
    ex = example(f"vanilla_{activation}", num_steps=NUM_STEPS, dtype="float64")
    (layer,) = init_report(ex.cell, ex.params, ex.xs, state=ex.state).layers
    params = _numpy(ex.params)
    # D = 0: nothing is kept, and the direct path is gone at lag 1
    assert (layer.forget_gate, layer.kept.mean, layer.kept.mean_log) == ("", 0, -math.inf)
    assert np.isnan(layer.forget_bias).all()
    assert layer.e_fold == layer.percent == (1, 0)
    assert layer.direct_rate == (-math.inf, -math.inf)
    hand = _ByHand(f"vanilla_{activation}", params, _numpy(ex.state), np.asarray(ex.xs), np.arange(4))
    np.testing.assert_allclose(layer.full_rate.measured, _slope(hand.full), rtol=1e-9)
    sizes = np.linalg.svd(params.w_hh, compute_uv=False)
    np.testing.assert_allclose(layer.bound, np.log(sizes[0] * (0.25 if activation == "sigmoid" else 1)), rtol=1e-12)
    assert layer.full_rate.measured <= layer.bound
    field = theory.vanilla_mean_field(
        np.linalg.norm(params.w_hh) / 2,
        activation=activation,
        input_variance=np.mean((np.asarray(ex.xs) @ params.w_ih.T) ** 2),
        bias_variance=np.mean(params.b**2),
    )
    np.testing.assert_allclose(layer.full_rate.predicted, field.rate, rtol=1e-10)
    (block,) = layer.blocks
    expected = (sizes[0], np.median(sizes), sizes[-1], np.abs(np.linalg.eigvals(params.w_hh)).max())
    np.testing.assert_allclose(block[1:], expected, rtol=1e-12)


@pytest.mark.slow
def test_stack(x64):
    """A GRU of 5 units below an LSTM of 4: each layer by hand, the upper one on what the lower one reads out."""
    ex = example("stack", num_steps=NUM_STEPS, dtype="float64")
    report = init_report(ex.cell, ex.params, ex.xs, state=ex.state)
    lower, upper = report.layers
    assert [(layer.layer, layer.cell, layer.memory, layer.forget_gate) for layer in report.layers] == [
        ("layer_0", "gru_reset_after", "layer_0.h", "u"),
        ("layer_1", "lstm", "layer_1.c", "f"),
    ]
    params, state = _numpy(ex.params), _numpy(ex.state)
    below = _ByHand("gru_after", params.layer_0, state.layer_0, np.asarray(ex.xs), np.arange(5))
    _assert_rates(lower, below)
    heard = np.array([s.h for s in below.states[1:]])
    _assert_rates(upper, _ByHand("lstm", params.layer_1, state.layer_1, heard, np.arange(4, 8)))
    for layer, bias in ((lower, params.layer_0.b[5:10]), (upper, params.layer_1.b[4:8])):
        np.testing.assert_allclose(layer.forget_bias, (bias.mean(), bias.min(), bias.max()), rtol=1e-12)
    assert [len(layer.blocks) for layer in report.layers] == [3, 4]
    gain = np.linalg.norm(params.layer_1.w_hh) / 4
    field = theory.lstm_mean_field(
        gain, input_variance=np.mean((heard @ params.layer_1.w_ih.T) ** 2), forget_bias=params.layer_1.b[4:8].mean()
    )
    np.testing.assert_allclose(upper.full_rate.predicted, field.tied_rate, rtol=1e-10)
    assert "layer_1: lstm, layer_1.c" in report.table()


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("lru", ""),
        pytest.param("indrnn_tanh", "", marks=pytest.mark.slow),
        pytest.param("min_gru", "u", marks=pytest.mark.slow),
        pytest.param("min_lstm", "f", marks=pytest.mark.slow),
        pytest.param("coupled_lstm", "f", marks=pytest.mark.slow),
        pytest.param("peephole_lstm", "f", marks=pytest.mark.slow),
    ],
)
def test_other_cells_by_their_direct_path(name, gate, x64):
    ex = example(name, num_steps=NUM_STEPS, dtype="float64")
    (layer,) = init_report(*ex[:2], ex.xs, state=ex.state).layers
    assert layer.forget_gate == gate
    if name == "lru":
        modulus = np.abs(np.asarray(rg.cells.eigenvalues(ex.params)))
        np.testing.assert_allclose(layer.kept, (modulus.mean(), np.log(modulus).mean()), rtol=1e-12)
        np.testing.assert_allclose(layer.full_rate.measured, layer.direct_rate.measured, rtol=1e-12)
    else:
        params, state = _numpy(ex.params), jax.tree.map(lambda leaf: np.asarray(leaf), ex.state)
        block = np.arange(4, 8) if layer.memory == "c" else np.arange(4)
        hand = _ByHand(name, params, state, np.asarray(ex.xs), block)
        np.testing.assert_allclose(layer.kept, (hand.kept.mean(), np.log(hand.kept).mean()), rtol=1e-12)
        np.testing.assert_allclose(layer.full_rate.measured, _slope(hand.full), rtol=1e-9)
    assert math.isnan(layer.full_rate.predicted)
    assert (len(layer.blocks) == 0) == (not hasattr(ex.params, "w_hh"))


def test_two_biases_count_as_their_sum():
    """Torch adds two draws of U(±1/√N): the effective one reaches beyond 1/√N."""
    cell = rg.cells.lstm(2, 64, init="torch")
    params = cell.init(jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else jnp.zeros_like(leaf), params)
    layer = init_report(cell, zeros, jnp.zeros((2, 2))).layers[0]
    assert layer.forget_bias.largest > 64**-0.5
    np.testing.assert_allclose(layer.forget_bias.mean, params.b[64:128].mean(), rtol=1e-4, atol=1e-7)
    assert layer.blocks[1] == GateBlock("f", 0, 0, 0, 0)


def test_lags_beyond_the_run_and_a_table():
    ex = example("min_gru", num_steps=20)
    params = ex.params._replace(w_ih=0 * ex.params.w_ih, b=ex.params.b.at[:4].set(8))
    report = init_report(ex.cell, params, ex.xs)
    assert report.layers[0].e_fold.measured == math.inf
    np.testing.assert_allclose(report.layers[0].e_fold.predicted, 1 / np.log1p(np.exp(-8)), rtol=1e-3)
    text = report.table()
    assert "| bias of u, mean / min / max | 8 / 8 / 8 |  |" in text
    assert "| direct path down to 1/e at lag | > 20 | 298" in text


@pytest.mark.slow
def test_gates_that_are_not_sigmoid_have_no_prediction():
    ex = example("lstm_tanh_gates", num_steps=8)
    assert math.isnan(init_report(*ex[:2], ex.xs).layers[0].full_rate.predicted)


def test_bad_input():
    ex = example("lstm")
    with pytest.raises(ValueError, match=r"xs: expected shape \(T, D=3\)"):
        init_report(*ex[:2], ex.xs[:, :2])
    henon = rg.map_cell(lambda s, x: s)
    with pytest.raises(ValueError, match="expected a cell with named gates, found 'map"):
        init_report(henon, None, jnp.zeros((4, 0)), state=jnp.ones(2))
