"""The experiment on gate activations: its numbers by NumPy, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import rnngrad as rg
from experiments import command, gate_activation
from experiments.claims import word_of

TINY = dataclasses.replace(gate_activation.SMOKE, steps=9, hidden_size=3, input_size=2, learning_rates=(1e-2, 1e-3))


@pytest.fixture(scope="module")
def tiny():
    return gate_activation.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny["log_retention"].sizes == {"kind": 3, "forget_bias": 1, "seed": 2, "path": 2, "lag": 10}
    assert tiny["test_loss"].sizes == {
        "learning_rate": 2, "kind": 3, "forget_bias": 1, "trial": 2, "evaluation": 3,
    }  # fmt: skip
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)


def test_values_of_the_gates_at_zero_input():
    """tanh of its bias is the sigmoid's value: of the forget gate, and 1/2 of the others."""
    activation, forget, others = gate_activation.gates_of("tanh, same value", 1.0)
    assert activation == "tanh"
    np.testing.assert_allclose(np.tanh([forget, others]), [1 / (1 + np.exp(-1.0)), 0.5])
    assert gate_activation.gates_of("tanh, same bias", 1.0) == ("tanh", 1.0, 0.0)
    assert gate_activation.gates_of("sigmoid", 1.0) == ("sigmoid", 1.0, 0.0)


@pytest.mark.parametrize("kind", gate_activation.KINDS)
def test_retention_by_numpy(tiny, kind):
    """Seed 1: a chain of Jacobians by differences of a cell written in NumPy, float64."""
    activation, forget, others = gate_activation.gates_of(kind, 1.0)
    key_params, key_xs = jax.random.split(jax.random.key(1))
    drawn = rg.cells.lstm(2, 3).init(key_params)
    w, u, b = (np.asarray(leaf, np.float64) for leaf in drawn)
    b = np.concatenate([np.full(3, others), np.full(3, forget), b[6:9], np.full(3, others)])
    xs = np.asarray(jax.random.normal(key_xs, (9, 2)), np.float64)
    gate = np.tanh if activation == "tanh" else lambda z: 1 / (1 + np.exp(-z))

    def step(state, x):
        i, f, g, o = np.split(w @ x + u @ state[:3] + b, 4)
        c = gate(f) * state[3:] + gate(i) * np.tanh(g)
        return np.concatenate([gate(o) * np.tanh(c), c]), gate(f)

    state, jacobians, fs = np.zeros(6), [], []
    for x in xs:
        columns = [(step(state + 1e-6 * e, x)[0] - step(state - 1e-6 * e, x)[0]) / 2e-6 for e in np.eye(6)]
        jacobians.append(np.stack(columns, axis=1))
        state, f = step(state, x)
        fs.append(f)
    chain, full, direct = np.eye(6), [0.0], [0.0]
    product = np.ones(3)
    for jacobian, f in zip(jacobians[::-1], fs[::-1], strict=True):
        chain, product = chain @ jacobian, product * f
        full.append(np.log(np.linalg.norm(chain[3:, 3:]) / np.sqrt(3)))
        direct.append(np.log(np.linalg.norm(product) / np.sqrt(3)))
    row = tiny.sel(kind=kind, forget_bias=1.0, seed=1)
    # central differences of size 1e-6 and float32 states agree to some 1e-4 relative, accumulated over 9 steps
    np.testing.assert_allclose(row["log_retention"].sel(path="full"), full, atol=3e-3)
    np.testing.assert_allclose(row["log_retention"].sel(path="direct"), direct, atol=1e-4)
    np.testing.assert_allclose(row["mean_f"], np.mean(fs), rtol=1e-4)
    np.testing.assert_allclose(row["negative_f"], np.mean(np.array(fs) < 0))


def test_a_seed_is_the_same_alone_and_among_others(tiny, monkeypatch):
    # what is compiled does not depend on the seeds
    trainer = gate_activation._trainer
    monkeypatch.setattr(gate_activation, "_trainer", lambda activation, rate, config: trainer(activation, rate, TINY))
    alone = gate_activation.run(dataclasses.replace(TINY, first_seed=1, seeds=1, train_seeds=1))
    np.testing.assert_array_equal(alone["log_retention"].isel(seed=0), tiny["log_retention"].isel(seed=1))
    np.testing.assert_array_equal(alone["test_loss"].isel(trial=0), tiny["test_loss"].isel(trial=1))


def _changed(dataset, *, apart, updates):
    """The sigmoid keeps e^apart times as much; updates to solve by kind."""
    changed = dataset.copy(deep=True)
    changed["log_retention"][:] = -1.0
    changed["log_retention"].loc[{"kind": "sigmoid"}] = -1.0 + apart
    for kind, value in zip(gate_activation.KINDS, updates, strict=True):
        changed["updates_to_solve"].loc[{"kind": kind}] = value
    return changed


def test_verdict_follows_the_data(tiny):
    better = _changed(tiny, apart=2.0, updates=(2.0, 4.0, np.nan))
    assert word_of(gate_activation.verdict(better)) == "holds"
    assert "learns adding in fewer updates at every b_f" in gate_activation.summary(better)["D5"]
    assert "over 9 steps at every b_f (over all b_f 10^0.9 times as much)" in gate_activation.summary(better)["D5"]
    assert "2, 2, 0 at rate 0.01" in gate_activation.summary(better)["D5"]
    worse = _changed(tiny, apart=-2.0, updates=(4.0, 2.0, 2.0))
    assert word_of(gate_activation.verdict(worse)) == "does not hold"
    mixed = _changed(tiny, apart=2.0, updates=(2.0, 4.0, 2.0))
    assert word_of(gate_activation.verdict(mixed)) == "holds only if"
    assert "in fewer updates at every b_f; against “tanh, same value”" in gate_activation.summary(mixed)["D5"]
    assert gate_activation.summary(mixed)["D5"].count("in fewer updates at none") == 1
    nobody = _changed(tiny, apart=np.nan, updates=(np.nan,) * 3)
    assert word_of(gate_activation.verdict(nobody)) == "not decided"


def test_a_row_is_judged_by_its_better_learning_rate(tiny):
    changed = _changed(tiny, apart=0.0, updates=(2.0, 2.0, 2.0))
    changed["updates_to_solve"][0] = np.nan
    row = changed.sel(kind="sigmoid", forget_bias=1.0)
    assert float(gate_activation.best_rate(row)["learning_rate"]) == 1e-3


def test_diverged_trials_are_counted(tiny):
    changed = tiny.copy(deep=True)
    changed["failed_at"][:] = 3
    shown = gate_activation.table(changed)
    assert list(shown.columns[6].cells) == ["0 of 2, 2 diverged"] * 3


def test_figure_shows_every_row(tiny):
    above, below = gate_activation.figure(tiny).axes
    assert len(above.lines) == 3
    assert len(below.lines) == 3 * 2 + 1
    np.testing.assert_allclose(
        above.lines[0].get_ydata(), tiny["log_retention_median"].sel(kind="sigmoid", path="full").squeeze()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "2"], "--steps: expected at least 3, found 2"),
        (["--forget-biases", "2", "1"], "--forget-biases: expected finite numbers, rising, found (2.0, 1.0)"),
        (["--learning-rates", "0"], "--learning-rates: expected different positive numbers, found (0.0,)"),
        (["--updates", "3"], "--updates: expected a multiple of --eval-every 2, found 3"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(gate_activation.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
