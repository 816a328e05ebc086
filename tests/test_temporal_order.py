"""The experiment on Ω and clipping: an update of each method by NumPy, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import rnngrad as rg
from experiments import command, temporal_order, trials

# rates and weights so large that one update is seen, and that every part of it counts
TINY = dataclasses.replace(
    temporal_order.SMOKE,
    hidden_size=5,
    batch_size=3,
    updates=2,
    eval_every=1,
    scale=0.7,
    learning_rate=0.5,
    adam_learning_rate=0.1,
    max_norm=0.3,
)


@pytest.fixture(scope="module")
def tiny():
    return temporal_order.run(TINY)


def _forward(weights, inputs):
    """States h_0 … h_T, (T + 1, B, N), and the probabilities of the classes."""
    w, u, b, v, c = weights
    states = [np.zeros((inputs.shape[1], len(b)))]
    for x in inputs:
        states.append(np.tanh(x @ w.T + states[-1] @ u.T + b))
    logits = states[-1] @ v.T + c
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.stack(states), exponentials / exponentials.sum(axis=1, keepdims=True)


def _gradient(weights, inputs, classes, alpha):
    """Of the cross-entropy by backpropagation through time, plus alpha times that of Ω, step by step."""
    _, u, _, v, _ = weights
    states, probabilities = _forward(weights, inputs)
    batch, steps = len(classes), len(inputs)
    error = (probabilities - np.eye(4)[classes]) / batch
    gradients = [np.zeros_like(each) for each in weights]
    gradients[3], gradients[4] = error.T @ states[-1], error.sum(axis=0)
    delta = error @ v  # ∂E/∂h_T
    for step in reversed(range(steps)):
        before, x, slope = states[step], inputs[step], 1 - states[step + 1] ** 2
        through = delta * slope
        gradients[0] += through.T @ x
        gradients[1] += through.T @ before
        gradients[2] += through.sum(axis=0)
        pulled = through @ u
        for sequence in range(batch):
            norm, size = np.linalg.norm(delta[sequence]), np.linalg.norm(pulled[sequence])
            # ∂(size/norm − 1)²/∂U with delta and slope held: only U itself is differentiated
            factor = 2 * (size / norm - 1) / (size * norm)
            gradients[1] += alpha / batch * factor * np.outer(through[sequence], pulled[sequence])
        delta = pulled
    return gradients


@pytest.mark.parametrize("recipe", temporal_order.RECIPES)
def test_losses_before_and_after_an_update_by_numpy(tiny, recipe):
    """Seed 1."""
    task = rg.tasks.temporal_order(10)
    key_weights, key_trial = jax.random.split(jax.random.key(1))
    _, key_batches, key_measure = jax.random.split(key_trial, 3)
    params = temporal_order._first_weights(10, TINY, key_weights)
    weights = [np.asarray(leaf, np.float64) for leaf in (*params.layers[0], *params.readout)]
    held_out = task.batch(key_measure, TINY.eval_sequences)

    def judged(weights):
        classes = np.asarray(held_out.targets[-1])
        _, probabilities = _forward(weights, np.eye(6)[np.asarray(held_out.inputs)])
        loss = -np.mean(np.log(probabilities[np.arange(len(classes)), classes]))
        return loss, np.mean(probabilities.argmax(axis=1) == classes)

    found = tiny.sel(length=10, recipe=recipe).isel(seed=1)
    np.testing.assert_allclose([found["loss"][0], found["accuracy"][0]], judged(weights), rtol=1e-5)
    batch = task.batch(jax.random.fold_in(key_batches, 0), TINY.batch_size)
    alpha = TINY.alpha / 10 if recipe == "SGD, clipped, Ω" else 0.0
    gradients = _gradient(weights, np.eye(6)[np.asarray(batch.inputs)], np.asarray(batch.targets[-1]), alpha)
    norm = np.sqrt(sum(np.sum(each**2) for each in gradients))
    np.testing.assert_allclose(found["grad_norm"][1], norm, rtol=1e-4)
    if "clipped" in recipe:
        assert norm > TINY.max_norm  # else the clipping would not be tried
        gradients = [each * TINY.max_norm / norm for each in gradients]
    if recipe.startswith("Adam"):  # its first step has size 1 in every entry
        moves = [TINY.adam_learning_rate * each / (np.abs(each) + 1e-8) for each in gradients]
    else:
        moves = [TINY.learning_rate * each for each in gradients]
    after = judged([each - move for each, move in zip(weights, moves, strict=True)])
    np.testing.assert_allclose([found["loss"][1], found["accuracy"][1]], after, rtol=1e-4)


def test_first_weights():
    params = temporal_order._first_weights(10, dataclasses.replace(TINY, hidden_size=200, scale=0.1), jax.random.key(0))
    np.testing.assert_allclose(np.std(params.layers[0].w_hh), 0.1, rtol=0.02)  # 5 standard errors of 40,000 draws
    assert not np.any(params.layers[0].b)
    assert not np.any(params.readout.b)
    assert not np.array_equal(params.layers[0].w_ih[:4, :4], params.readout.w[:, :4])


def test_dimensions_and_units(tiny):
    assert dict(tiny.sizes) == {"length": 1, "recipe": 4, "seed": 2, trials.EVALUATED: 3}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = temporal_order.run(dataclasses.replace(TINY, first_seed=1, seeds=1))
    np.testing.assert_array_equal(alone["loss"].isel(seed=0), tiny["loss"].isel(seed=1))


def _with(tiny, *solved):
    """The dataset, derived anew, in which so many seeds of each method solve the task at the last evaluation."""
    changed = tiny[list(temporal_order.MEASURED)].copy(deep=True).assign_attrs(tiny.attrs)
    changed["accuracy"][:] = 0.5
    for recipe, count in zip(temporal_order.RECIPES, solved, strict=True):
        changed["accuracy"].loc[{"recipe": recipe, "seed": slice(0, count - 1), trials.EVALUATED: 2}] = 1.0
    return temporal_order.derive(changed)


@pytest.mark.parametrize(
    ("solved", "updates", "holds", "word", "needed"),
    [
        ((0, 1, 2, 0), 2, True, "holds", True),
        ((2, 2, 2, 2), 2, True, "holds", False),
        ((0, 0, 1, 2), 2, None, "not decided", True),
        ((0, 0, 1, 2), 2_000, False, "does not hold", True),
        ((0, 2, 1, 0), 2_000, False, "does not hold", False),
        ((0, 0, 0, 0), 2_000, False, "does not hold", None),
    ],
)
def test_verdict_follows_the_data(tiny, solved, updates, holds, word, needed):
    dataset = _with(tiny, *solved)
    dataset.attrs["config"] = json.dumps({**json.loads(tiny.attrs["config"]), "updates": updates})
    dataset = dataset.assign_coords(length=[50])
    first, prediction, *untried = temporal_order.verdict(dataset)
    assert first.holds is holds
    assert first.value.startswith(f"{solved[2]} of 2 seeds")
    assert prediction.holds is needed
    assert [check.value for check in untried] == ["not tried"] * 3
    assert all(check.holds is None for check in untried)
    assert temporal_order.EXPERIMENT.verdicts(dataset)[0].word == word


def test_summary_follows_the_data(tiny):
    said = temporal_order.summary(_with(tiny, 0, 1, 2, 0))["E1"]
    assert said.startswith("with Ω and clipping, every seed solves T = 10 within 2 updates")
    assert "T = 10: 2 by clipped SGD with Ω, 0 by SGD, 1 by clipped SGD, 0 by clipped Adam; right at best" in said
    assert "100.0% with Ω (solved after 2 updates), 75.0% by the best of the others." in said
    assert "Not tried: 50, 100, 150, 200 steps." in said
    said = temporal_order.summary(_with(tiny, 0, 0, 1, 0))["E1"]
    assert "solves T = none of the lengths tried within" in said
    assert "75.0% with Ω (solved" in said  # between one seed's 50 and the other's 100


def test_a_trial_that_solves_it_ends(monkeypatch):
    monkeypatch.setattr(temporal_order, "SOLVED", 0.0)
    ended = temporal_order._measure_trial(10, "SGD", 0, TINY)
    assert np.isfinite(ended["accuracy"][0])
    assert np.isnan(ended["accuracy"][1:]).all()


def test_a_failed_trial_has_not_solved_it_and_is_shown(tiny):
    dataset = _with(tiny, 0, 1, 2, 0)
    changed = dataset[list(temporal_order.MEASURED)].assign_attrs(tiny.attrs)
    changed["failed_at"].loc[{"recipe": "SGD"}] = 2
    changed["accuracy"].loc[{"recipe": "SGD", trials.EVALUATED: [1, 2]}] = np.nan
    failed = temporal_order.derive(changed)
    table = temporal_order.table(failed)
    assert list(table.columns[-1].cells) == ["2", "0", "0", "0"]
    assert list(table.columns[2].cells) == ["0 of 2", "1 of 2", "2 of 2", "0 of 2"]
    curves = temporal_order.figure(failed).axes[0].get_lines()
    assert sum(line.get_marker() == "x" for line in curves) == 2


def test_figure_shows_every_seed_and_the_success_rates(tiny):
    drawn = temporal_order.figure(_with(tiny, 0, 1, 2, 0))
    curves, last = drawn.axes
    assert curves.get_title() == "T = 10"
    assert len(curves.get_lines()) == 8 + 3 + 1  # seeds, markers of those that solved it, chance
    rates = [container.lines[0].get_ydata()[0] for container in last.containers]
    assert rates == [0.0, 0.5, 1.0, 0.0]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(temporal_order.RECIPES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--updates", "30", "--eval-every", "20"], "--updates: expected a multiple of --eval-every 20, found 30"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--lengths", "50", "20"], "--lengths: expected whole numbers from 10 on, rising, found (50, 20)"),
        (["--lengths", "9"], "--lengths: expected whole numbers from 10 on, rising, found (9,)"),
        (["--alpha", "-1"], "--alpha: expected a number above 0, found -1.0"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(temporal_order.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
