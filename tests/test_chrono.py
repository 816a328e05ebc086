"""The experiment on chrono initialisation: a held-out loss and an update by hand, verdicts that follow the data."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import chrono, command, trials

TINY = dataclasses.replace(
    chrono.SMOKE, delays=(5,), adding=(8,), updates=2, adding_updates=2, eval_every=1, hidden_size=5, seeds=2
)


@pytest.fixture(scope="module")
def tiny():
    return chrono.run(TINY)


def _lstm(params, xs):
    """Outputs of every step, (T, B, K); gates in the order i, f, g, o."""
    layer, size = params.layers[0], params.layers[0].w_hh.shape[1]

    def step(state, x):
        h, c = state
        z = x @ layer.w_ih.T + h @ layer.w_hh.T + layer.b[None, :]
        i, f, g, o = (z[:, k * size : (k + 1) * size] for k in range(4))
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h @ params.readout.w.T + params.readout.b[None, :]

    zeros = jnp.zeros((xs.shape[1], size))
    return jax.lax.scan(step, (zeros, zeros), xs)[1]


def _copy_loss(params, batch):
    logits = _lstm(params, params.embedding[batch.inputs])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
    return -jnp.mean(picked)


def _adding_loss(params, batch):
    return jnp.mean((_lstm(params, batch.inputs)[-1] - batch.targets[-1]) ** 2)


_JUDGE = {kind: jax.jit(jax.value_and_grad(loss)) for kind, loss in (("copy", _copy_loss), ("adding", _adding_loss))}


@pytest.mark.parametrize(("kind", "steps"), [("copy", 5), ("adding", 8)])
@pytest.mark.parametrize("start", chrono.STARTS)
def test_losses_before_and_after_an_update_by_hand(tiny, kind, steps, start):
    """Seed 1, with RMSprop written out: the gradient over the root of its averaged square."""
    judge = _JUDGE[kind]
    task = rg.tasks.copy_memory(5, length=2) if kind == "copy" else rg.tasks.adding(8)
    key_weights, key_trial = jax.random.split(jax.random.key(1))
    _, key_batches, key_measure = jax.random.split(key_trial, 3)
    params = chrono._first_weights(kind, steps, start, TINY, key_weights)
    held_out = task.batch(key_measure, TINY.eval_sequences)
    memoryless = task.baseline if kind == "copy" else float(jnp.mean((held_out.targets[-1] - 1) ** 2))
    found = tiny["share"].sel(setting=f"{kind} {steps}", start=start).isel(seed=1)
    np.testing.assert_allclose(found[0], judge(params, held_out)[0] / memoryless, rtol=1e-5)
    _, grads = judge(params, task.batch(jax.random.fold_in(key_batches, 0), TINY.batch_size))
    rate = TINY.learning_rate if kind == "copy" else TINY.adding_learning_rate
    updated = jax.tree.map(lambda p, g: p - rate * g / jnp.sqrt(0.1 * g**2 + 1e-8), params, grads)
    # where a gradient is round-off, so is the direction of its step: a thousandth of a thousandth of the loss
    np.testing.assert_allclose(found[1], judge(updated, held_out)[0] / memoryless, rtol=1e-4)


def test_starts_differ_in_the_two_gate_biases_alone():
    key = jax.random.key(3)
    one, spread = (chrono._first_weights("copy", 40, start, TINY, key) for start in chrono.STARTS)
    size = TINY.hidden_size
    changed = np.asarray(one.layers[0].b != spread.layers[0].b)
    np.testing.assert_array_equal(changed.reshape(4, size).all(axis=1), [True, True, False, False])
    np.testing.assert_array_equal(one.layers[0].b[size : 2 * size], np.ones(size, np.float32))
    i, f = (np.asarray(spread.layers[0].b).reshape(4, size)[k] for k in (0, 1))
    np.testing.assert_array_equal(i, -f)
    assert (np.exp(f) >= 1).all()
    assert (np.exp(f) <= 59).all()
    replaced = spread.layers[0]._replace(b=one.layers[0].b)
    jax.tree.map(np.testing.assert_array_equal, one, spread._replace(layers=(replaced,)))


def test_dimensions_and_units(tiny):
    assert dict(tiny.sizes) == {"setting": 2, "start": 2, "seed": 2, trials.EVALUATED: 3}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert tiny["share"].dtype == np.float32


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = chrono.run(dataclasses.replace(TINY, first_seed=1, seeds=1))
    np.testing.assert_array_equal(alone["share"].isel(seed=0), tiny["share"].isel(seed=1))


def _with(tiny, **shares):
    """The dataset, derived anew, with the last share of each start set by setting."""
    changed = tiny[list(chrono.MEASURED)].copy(deep=True)
    changed.attrs = tiny.attrs
    changed["share"][:] = 1.2
    for name, (one, spread) in shares.items():
        setting = {"copy": "copy 5", "adding": "adding 8"}[name]
        for start, value in zip(chrono.STARTS, (one, spread), strict=True):
            changed["share"].loc[{"setting": setting, "start": start, trials.EVALUATED: 2}] = value
    return chrono.derive(changed)


def _answers(dataset):
    return [check.holds for check in chrono.verdict(dataset) if check.decides]


@pytest.mark.parametrize(
    ("copy", "adding", "answers", "word"),
    [
        ((1.0, 1.0), (1.0, 1.0), [None, None, None, None], "not decided"),
        ((1.0, 0.9), (1.0, 0.05), [True, None, True, True], "holds"),
        ((0.9, 0.9), (1.0, 0.05), [False, None, True, True], "holds only if"),
        ((0.9, 1.0), (0.05, 0.05), [False, None, False, False], "does not hold"),
        ((1.0, np.nan), (1.0, np.nan), [None, None, None, None], "not decided"),
    ],
)
def test_verdict_follows_the_data(tiny, copy, adding, answers, word):
    dataset = _with(tiny, copy=copy, adding=adding)
    assert _answers(dataset) == answers
    assert chrono.EXPERIMENT.verdicts(dataset)[0].word == word


def test_one_seed_against_it_is_enough(tiny):
    dataset = _with(tiny, copy=(1.0, 0.9))
    assert _answers(dataset)[0] is True
    changed = dataset[list(chrono.MEASURED)].assign_attrs(tiny.attrs)
    changed["share"].loc[{"setting": "copy 5", "start": "b_f = 1", "seed": 1, trials.EVALUATED: 2}] = 0.9
    assert _answers(chrono.derive(changed))[0] is False


def test_a_failed_trial_is_no_stalling(tiny):
    dataset = _with(tiny, copy=(1.0, 0.9), adding=(1.0, 0.05))
    changed = dataset[list(chrono.MEASURED)].assign_attrs(tiny.attrs)
    changed["failed_at"].loc[{"setting": "copy 5", "start": "b_f = 1"}] = 2
    changed["failed_at"].loc[{"setting": "adding 8", "start": "chrono"}] = 2  # left first: that is known
    failed = chrono.derive(changed)
    assert _answers(failed) == [None, None, True, True]
    assert "copy, delay 5: 2 of 2 (after 2 updates) against every seed failed" in chrono.summary(failed)["E2"]
    chrono.table(failed), chrono.figure(failed)


def test_summary_follows_the_data(tiny):
    said = chrono.summary(_with(tiny, copy=(1.0, 0.9), adding=(0.05, 0.05)))["E2"]
    assert "where b_f = 1 stalls at copy, delay 5, within 2 updates" in said
    assert "copy, delay 5: 2 of 2 (after 2 updates) against 0 of 2;" in said
    assert "below a tenth of that loss at adding, T = 8." in said
    said = chrono.summary(_with(tiny, copy=(0.9, 1.0), adding=(1.0, 1.0)))["E2"]
    assert "where b_f = 1 stalls at no length tried" in said
    assert "Too few updates to tell at adding, T = 8." in said
    assert "below a tenth of that loss at none of them." in said


def test_chance_fits_of_few_sequences_are_no_leaving(tiny):
    """0.95 is below the scatter of copy and within that of adding."""
    dataset = _with(tiny, copy=(0.95, 0.95), adding=(0.95, 0.95))
    assert np.isfinite(dataset["left_at"].sel(setting="copy 5")).all()
    assert np.isinf(dataset["left_at"].sel(setting="adding 8")).all()


@pytest.mark.parametrize(
    ("delay", "one", "spread", "holds", "value"),
    [
        (200, np.inf, 2.0, True, "after 2"),
        (200, np.inf, 6_000.0, False, "after 6,000"),
        (100, 500.0, 750.0, True, "b_f = 1: 500, chrono: 750"),
        (100, np.inf, 750.0, False, "b_f = 1: never, chrono: 750"),
        (100, np.inf, np.inf, None, "b_f = 1: never, chrono: never"),
    ],
)
def test_predictions_are_checked_at_their_delays(tiny, delay, one, spread, holds, value):
    dataset = _with(tiny, copy=(1.0, 0.9))
    dataset["steps"] = ("setting", [delay, 8])
    for start, at in zip(chrono.STARTS, (one, spread), strict=True):
        dataset["left_at"].loc[{"setting": "copy 5", "start": start}] = at
    (prediction,) = (check for check in chrono.verdict(dataset) if not check.decides)
    assert prediction.holds is holds
    assert prediction.value == value


def test_trial_ends_once_it_has_left():
    config = dataclasses.replace(TINY, until=1e6, adding=(), delays=(5,), seeds=1)
    ended = chrono.run(config)
    assert np.isfinite(ended["share"][..., 0]).all()
    assert np.isnan(ended["share"][..., 1:]).all()


def test_figure_has_a_panel_per_setting_and_a_curve_per_seed(tiny):
    drawn = chrono.figure(_with(tiny, copy=(1.0, 0.9), adding=(1.0, 0.05)))
    *curves, last = drawn.axes
    assert [axes.get_title() for axes in curves] == ["copy, delay 5", "adding, T = 8"]
    assert all(len(axes.get_lines()) == 4 + 2 for axes in curves)  # and the two levels
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(chrono.STARTS)
    never = [line for line in last.get_lines() if line.get_marker() == "^" and len(line.get_xdata())]
    assert len(never) == 2  # b_f = 1 of both settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--updates", "30"], "--updates: expected a multiple of --eval-every 20, found 30"),
        (["--adding-updates", "30"], "--adding-updates: expected a multiple of --eval-every 20, found 30"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--delays", "9", "5"], "--delays: expected whole numbers from 1 on, rising, found (9, 5)"),
        (["--adding", "1"], "--adding: expected whole numbers from 2 on, rising, found (1,)"),
        (["--delays", "--adding"], "--delays, --adding: expected a length of at least one task, found none"),
        (["--learning-rate", "0"], "--learning-rate: expected a number above 0, found 0.0"),
        (["--until", "nan"], "--until: expected a number above 0, found nan"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(chrono.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_one_hot_inputs_have_no_vectors():
    config = dataclasses.replace(TINY, inputs="one-hot")
    task = rg.tasks.copy_memory(5, length=2)
    batch = chrono._draw(task, "one-hot", jax.random.key(0), 3)
    assert batch.inputs.shape == (9, 3, task.vocabulary_size)
    assert chrono._first_weights("copy", 5, "chrono", config, jax.random.key(0)).embedding is None


def test_shown_again_from_the_file(tiny, tmp_path):
    file = tmp_path / "chrono.nc"
    chrono.results.save(tiny, file)
    stored = chrono.results.load(file, experiment="chrono")
    assert chrono.verdict(stored) == chrono.verdict(tiny)
    assert isinstance(stored, xr.Dataset)
