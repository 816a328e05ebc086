"""The comparison of LSTM and GRU: its numbers by NumPy and by formula, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import expit

import rnngrad as rg
from experiments import command
from experiments import flexibility as experiment

TINY = dataclasses.replace(experiment.SMOKE, counting_steps=5, hidden_size=3, updates=2, eval_every=1, repeats=2)


@pytest.fixture(scope="module")
def tiny():
    return experiment.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny.sizes == {"size": 1, "network": 3, "repeat": 2, "task": 1, "seed": 2, "evaluation": 3}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert (tiny["seconds"] > 0).all()
    assert (tiny["failed_at"] == -1).all()
    assert (tiny["needed"] == 2).all()  # none is solved


@pytest.mark.parametrize(("input_size", "hidden_size"), [(2, 32), (7, 5), (64, 64)])
def test_parameters_by_formula(input_size, hidden_size):
    """Weights of the blocks one by one, and the GRU of as many as the LSTM has."""
    block = hidden_size * input_size + hidden_size**2 + hidden_size
    lstm, gru = (experiment._cell(name, input_size, hidden_size) for name in ("lstm", "gru"))
    assert experiment._num_parameters(lstm) == experiment.lstm_parameters(input_size, hidden_size) == 4 * block
    assert experiment._num_parameters(gru) == experiment.gru_parameters(input_size, hidden_size)
    assert experiment.gru_parameters(input_size, hidden_size) == 3 * block + hidden_size
    size = experiment.matched_size(input_size, hidden_size)
    off = [abs(experiment.gru_parameters(input_size, near) - 4 * block) for near in (size - 1, size, size + 1)]
    assert off[1] == min(off)


def test_first_score_by_numpy(tiny):
    """Counting, LSTM, seed 1: mean squared error of the untrained network over 500 sequences, over 0.01."""
    key_init, _, key_measure = jax.random.split(jax.random.key(1), 3)
    model = rg.training.model([rg.cells.lstm(3, 3)], 1)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.init(jax.random.split(key_init)[0]))
    scale = np.sqrt(10 / 3)
    batch = experiment.counting(5, scale).batch(key_measure, 500)
    letters, (layer,) = np.asarray(batch.inputs), params.layers
    h = c = np.zeros((500, 3))
    for words in letters:
        i, f, g, o = np.split(layer.w_ih.T[words] + h @ layer.w_hh.T + layer.b, 4, axis=1)
        c = expit(f) * c + expit(i) * np.tanh(g)
        h = expit(o) * np.tanh(c)
    count = (letters == 0).sum(axis=0) - (letters == 1).sum(axis=0)
    error = np.mean((h @ params.readout.w[0] + params.readout.b[0] - count / scale) ** 2)
    found = tiny["score"].sel(network="lstm", seed=1).isel(task=0, evaluation=0)
    np.testing.assert_allclose(found, error / 0.01, rtol=1e-4)


def test_counts_and_their_variance():
    task = experiment.counting(30, np.sqrt(20))
    batch = task.batch(jax.random.key(0), 4000)
    assert task.baseline == pytest.approx(1)
    # the variance of 4,000 nearly normal numbers has a standard error of 0.022
    assert np.var(batch.targets[-1]) == pytest.approx(1, abs=0.1)
    assert batch.mask.sum(axis=0).tolist() == [1] * 4000
    farther = experiment._problem("counting", TINY).farther
    assert farther.baseline == pytest.approx(experiment.FARTHER)


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = experiment.run(dataclasses.replace(TINY, first_seed=1, seeds=1))
    for name in ("score", "farther_error", "solved_update", "failed_at"):
        np.testing.assert_array_equal(alone[name].isel(seed=0), tiny[name].isel(seed=1))


def _long(dataset, *, updates, seconds=(4.0, 3.0, 4.0), farther=(0.1, 0.2, 0.2)):
    """The dataset as if of a long run: updates to a solution, time and error of LSTM, GRU and larger GRU."""
    changed = dataset.copy(deep=True)
    changed.attrs["config"] = (
        dataset.attrs["config"].replace('"updates": 2', '"updates": 5000').replace('"repeats": 2', '"repeats": 60')
    )
    changed = changed.assign_coords(evaluation=[0, 2500, 5000])
    for index, network in enumerate(experiment.NETWORKS):
        changed["solved_update"].loc[{"network": network}] = updates[index]
        changed["seconds"].loc[{"network": network}] = seconds[index]
        changed["farther_error"].loc[{"network": network}] = farther[index]
    return experiment.derive(changed)


def test_verdict_follows_the_data(tiny):
    (short,) = experiment.EXPERIMENT.verdicts(tiny)
    assert short.word == "not decided"
    assert "too short to tell" in short.sentence
    (claim,) = experiment.EXPERIMENT.verdicts(_long(tiny, updates=(500, 1000, 1000)))
    assert claim.word == "holds"
    assert "the LSTM is ahead in 4 of 4 comparisons" in claim.sentence
    assert "takes 0.75 [0.75, 0.75] of its time at N = 4" in claim.sentence
    (claim,) = experiment.EXPERIMENT.verdicts(_long(tiny, updates=(1000, 500, 1000), farther=(0.2, 0.2, 0.1)))
    assert claim.word == "holds only if"
    assert "the LSTM is ahead in 0 of 4 comparisons." in claim.sentence
    assert "It is behind in counting, GRU, same N (2.00 [2.00, 2.00] times the GRU's updates)" in claim.sentence
    slow = _long(tiny, updates=(1000, 500, 500), farther=(0.2, 0.1, 0.1), seconds=(3.0, 4.0, 4.0))
    held = {check.name: check.holds for check in experiment.verdict(slow) if check.decides}
    assert [name for name, holds in held.items() if holds] == ["the GRU is simpler, parameters: N = D = 4"]


def test_unsolved_counts_with_all_updates(tiny):
    never = float("nan")
    changed = _long(tiny, updates=(1000, never, never))
    assert changed["needed"].sel(network="gru").values.ravel().tolist() == [5000, 5000]
    found = next(c for c in experiment.verdict(changed) if c.name == "the LSTM is ahead: counting, GRU, same N")
    assert (found.value, found.holds) == ("updates 0.20 [0.20, 0.20]", True)
    neither = _long(tiny, updates=(never, never, never))
    found = next(c for c in experiment.verdict(neither) if c.name == "the LSTM is ahead: counting, GRU, same N")
    assert found.holds is None  # a task that nobody solves decides nothing


def test_failed_networks_are_counted(tiny):
    changed = tiny.copy(deep=True)
    find = lambda dataset: next(c for c in experiment.verdict(dataset) if "stays finite" in c.name)
    assert find(changed).holds
    changed["failed_at"][0, 0, 0] = 3
    assert (find(changed).value, find(changed).holds, find(changed).decides) == ("1 of 6 failed", False, False)


def test_figure_shows_what_it_should(tiny):
    drawn = experiment.figure(_long(tiny, updates=(500, 1000, 1000)))
    axes = [a for a in drawn.axes if a.get_visible()]
    assert [a.get_title() for a in axes] == ["simpler?", "more flexible?", "counting: solved by 2, 2, 2 of 2"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["parameters, N = 4", "time, N = 4"]
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["LSTM", "GRU, same N", "GRU, same parameters"]
    curves = [line for line in axes[2].get_lines() if len(line.get_xdata()) == 3]
    assert len(curves) == 6
    np.testing.assert_array_equal(curves[0].get_ydata(), tiny["score"].sel(network="lstm").isel(task=0, seed=0))


@pytest.mark.slow
def test_every_task_is_trained_on():
    """One update of each; only counting is asked farther."""
    config = dataclasses.replace(
        TINY, tasks=experiment.Config().tasks, adding_steps=8, order_steps=10, copy_delay=2, updates=1, seeds=1
    )
    dataset = experiment.run(config)
    assert np.isfinite(dataset["score"]).all()
    assert np.isfinite(dataset["farther_error"]).sum("network").values.ravel().tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--order-steps", "9"], "--order-steps: expected at least 10, found 9"),
        (["--tasks", "copy", "copy"], "--tasks: expected different tasks"),
        (["--timed-sizes", "8", "4"], "--timed-sizes: expected sizes of at least 1, rising, found (8, 4)"),
        (["--updates", "15"], "--updates: expected a multiple of 10, found 15"),
        (["--learning-rate", "0"], "--learning-rate: expected a positive number, found 0"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(experiment.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
