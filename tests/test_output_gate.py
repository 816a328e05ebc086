"""The penalty on the output gate: its numbers by NumPy, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rnngrad as rg
from experiments import command, output_gate
from experiments.claims import word_of

TINY = output_gate.SMOKE
LABEL = "adding, strength 0.1"


@pytest.fixture(scope="module")
def tiny():
    return output_gate.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny["sparsity"].sizes == {"task": 1, "strength": 2, "seed": 2, "evaluation": 3}
    assert tiny["log_retention"].sizes == {"task": 1, "strength": 2, "seed": 2}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)


def test_correlation_by_numpy():
    """Of six units one is constant and one a million times smaller than the others: the first has no pair."""
    values = np.random.default_rng(0).normal(size=(7, 5, 6)).astype(np.float32)
    values[..., 1] += 0.7 * values[..., 0]
    values[..., 2] = 3.0
    values[..., 4] *= 1e-12
    found = output_gate.mean_absolute_correlation(jnp.asarray(values))
    kept = values.reshape(35, 6)[:, [0, 1, 3, 4, 5]].astype(np.float64)
    expected = np.abs(np.corrcoef(kept.T))[np.triu_indices(5, 1)].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isnan(output_gate.mean_absolute_correlation(jnp.ones((4, 2))))


def test_first_evaluation_by_numpy(tiny):
    """Seed 1 before any update: gates, correlation and loss by a NumPy LSTM."""
    key_run, _ = jax.random.split(jax.random.key(1))
    key_init, _, key_measure = jax.random.split(key_run, 3)
    model = output_gate._model("adding", TINY)
    params = rg.training.initial_state(model, optax.identity(), key_init, 4).params
    batch = rg.tasks.adding(6).batch(key_measure, 8)
    w, u, b = (np.asarray(leaf, np.float64) for leaf in params.layers[0])
    logistic = lambda z: 1 / (1 + np.exp(-z))
    h, c = np.zeros((8, 4)), np.zeros((8, 4))
    hs, os = [], []
    for x in np.asarray(batch.inputs, np.float64):
        i, f, g, o = np.split(x @ w.T + h @ u.T + b, 4, axis=-1)
        c = logistic(f) * c + logistic(i) * np.tanh(g)
        h = logistic(o) * np.tanh(c)
        hs.append(h)
        os.append(logistic(o))
    flat = np.stack(hs).reshape(-1, 4)
    row = tiny.sel(task="adding", strength=0.0, seed=1).isel(evaluation=0)
    np.testing.assert_allclose(row["mean_o"], np.mean(os), rtol=1e-5)
    np.testing.assert_allclose(row["sparsity"], np.mean(np.array(os) < 0.05))
    np.testing.assert_allclose(
        row["correlation_h"], np.abs(np.corrcoef(flat.T))[np.triu_indices(4, 1)].mean(), rtol=1e-4
    )
    readout = np.asarray(params.readout.w, np.float64), np.asarray(params.readout.b, np.float64)
    error = hs[-1] @ readout[0].T + readout[1] - np.asarray(batch.targets[-1], np.float64)
    np.testing.assert_allclose(row["task_loss"], np.mean(error**2), rtol=1e-4)


def test_the_penalty_closes_gates(tiny):
    """What is trained differs by the penalty alone: equal at the start, and closer gates after four updates."""
    o = tiny["mean_o"].sel(task="adding")
    np.testing.assert_array_equal(o.sel(strength=0.0).isel(evaluation=0), o.sel(strength=0.1).isel(evaluation=0))
    assert (o.sel(strength=0.1) < o.sel(strength=0.0)).isel(evaluation=-1).all()


def test_a_seed_is_the_same_alone_and_among_others(tiny, monkeypatch):
    # what is compiled does not depend on the seeds
    trainer, model = output_gate._trainer, output_gate._model
    monkeypatch.setattr(output_gate, "_trainer", lambda name, strength, config: trainer(name, strength, TINY))
    monkeypatch.setattr(output_gate, "_model", lambda name, config: model(name, TINY))
    alone = output_gate.run(dataclasses.replace(TINY, first_seed=1, seeds=1))
    for name in ("task_loss", "log_retention"):
        np.testing.assert_array_equal(alone[name].isel(seed=0), tiny[name].isel(seed=1))


def _changed(dataset, *, sparsity, correlation, loss):
    """Changes at strength 0.1 against strength 0, of a task that is learned without penalty."""
    changed = dataset.copy(deep=True)
    start = {"sparsity": 0.1, "correlation_h": 0.5, "task_loss": 0.01}
    for name, by in (("sparsity", sparsity), ("correlation_h", correlation), ("task_loss", loss)):
        changed[name][:] = start[name]
        changed[name].loc[{"strength": 0.1}] = start[name] + by
        changed[f"{name}_median"][:] = start[name]
        changed[f"{name}_median"].loc[{"strength": 0.1}] = start[name] + by
    return changed


def test_verdict_follows_the_data(tiny):
    all_three = _changed(tiny, sparsity=0.3, correlation=-0.1, loss=0.001)
    assert word_of(output_gate.verdict(all_three)) == "holds"
    assert "units of h are less correlated at every strength" in output_gate.summary(all_three)["D4"]
    for part, values in (
        ("more gates close at none", {"sparsity": 0.0, "correlation": -0.1, "loss": 0.001}),
        ("units of h are less correlated at none", {"sparsity": 0.3, "correlation": 0.1, "loss": 0.001}),
        ("the task's loss is unharmed at none", {"sparsity": 0.3, "correlation": -0.1, "loss": 0.02}),
    ):
        changed = _changed(tiny, **values)
        assert word_of(output_gate.verdict(changed)) == "does not hold"
        assert part in output_gate.summary(changed)["D4"]


def test_nothing_is_said_of_a_task_that_was_not_learned_or_of_trials_that_diverged(tiny):
    unlearned = _changed(tiny, sparsity=0.3, correlation=-0.1, loss=0.0)
    unlearned["task_loss"][:] = 0.16
    assert word_of(output_gate.verdict(unlearned)) == "not decided"
    assert "nothing can be said" in output_gate.summary(unlearned)["D4"]
    diverged = _changed(tiny, sparsity=np.nan, correlation=np.nan, loss=np.nan)
    assert word_of(output_gate.verdict(diverged)) == "not decided"


def test_retention_does_not_decide(tiny):
    changed = _changed(tiny, sparsity=0.3, correlation=-0.1, loss=0.001)
    changed["log_retention"].loc[{"strength": 0.1}] = -100.0
    (kept,) = [check for check in output_gate.verdict(changed) if not check.decides]
    assert kept.holds is False
    assert word_of(output_gate.verdict(changed)) == "holds"


def test_figure_shows_every_quantity(tiny):
    drawn = output_gate.figure(tiny)
    assert [axes.get_title() for axes in drawn.axes] == [
        "sparse?", "decoupled?", "harmless?", "and the memory's gradient?",
    ]  # fmt: skip
    shown = drawn.axes[2].lines[0].get_ydata()
    np.testing.assert_allclose(shown, 6 * tiny["task_loss_median"].isel(evaluation=-1).squeeze(), rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strengths", "0.1", "1"], "--strengths: expected finite numbers, rising from 0, found (0.1, 1.0)"),
        (["--strengths", "0"], "--strengths: expected finite numbers, rising from 0, found (0.0,)"),
        (["--tasks", "adding", "adding"], "--tasks: expected each name once, found adding adding"),
        (["--tasks", "agreement", "--distance", "5"], "distance for 3 attractors"),
        (["--updates", "3"], "--updates: expected a multiple of --eval-every 2, found 3"),
        (["--learning-rate", "-1"], "--learning-rate: expected a positive number, found -1"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(output_gate.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
