"""The experiment on the influence of inputs: its numbers by NumPy, verdicts that follow the data, figures, errors."""

from __future__ import annotations

import dataclasses

import jax
import matplotlib.patches
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import command, influence

TINY = dataclasses.replace(
    influence.SMOKE, steps=14, map_steps=5, hidden_size=4, input_size=3, seeds=2, trained_size=4, training_seeds=1
)


@pytest.fixture(scope="module")
def tiny():
    return influence.run(TINY)


def _of(dataset, label):
    return dataset.isel(row=dataset["label"].values.tolist().index(label))


def _drawn(label, seed):
    """Returns what seed ``seed`` of a row has drawn, as NumPy arrays in float64."""
    row = next(row for row in influence.rows_of(TINY) if influence.label_of(row) == label)
    with jax.enable_x64(True):
        key_params, key_readout, key_xs, key_targets = jax.random.split(jax.random.key(seed), 4)
        params = influence.build_cell(row, TINY).init(key_params)
        readout = rg.readout(4, 3, dtype="float64").init(key_readout)
        xs = jax.random.normal(key_xs, (14, 3), "float64")
        targets = jax.random.randint(key_targets, (14,), 0, 3, "int32")
        return jax.tree.map(np.asarray, (params, readout, xs, targets))


def test_dimensions_and_units(tiny):
    assert {name: tiny.sizes[name] for name in ("row", "seed", "lag", "mapped", "t", "k")} == {
        "row": 10, "seed": 2, "lag": 14, "mapped": 6, "t": 5, "k": 5,
    }  # fmt: skip
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert tiny.attrs["dtype"] == "float64"
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize(("label", "phi"), [("torch, tanh", "tanh"), ("identity, ReLU", "relu")])
def test_vanilla_influence_by_products_of_matrices(tiny, label, phi):
    """∂y_T/∂x_k = V ∏ diag(φ') U diag(φ'_k) W, multiplied out."""
    params, readout, xs, _ = _drawn(label, seed=1)
    h, factors = np.zeros(4), []
    for x in xs:
        z = params.w_ih @ x + params.w_hh @ h + params.b
        h = np.tanh(z) if phi == "tanh" else np.maximum(z, 0)
        factors.append(1 - h**2 if phi == "tanh" else (z > 0).astype(float))
    chain, expected = readout.w, []
    for slope in factors[::-1]:
        chain = chain * slope
        expected.append(np.linalg.norm(chain @ params.w_ih))
        chain = chain @ params.w_hh
    row = _of(tiny, label).isel(seed=1)
    np.testing.assert_allclose(np.exp(row["log_influence"]), expected, rtol=1e-5)  # stored as float32
    np.testing.assert_allclose(row["share"], np.sum(expected[:10]) / np.sum(expected), rtol=1e-5)


@pytest.mark.parametrize("label", ["LSTM, torch", "GRU, torch"])
def test_gated_influence_by_central_differences(tiny, label):
    params, readout, xs, _ = _drawn(label, seed=0)
    row = next(row for row in influence.rows_of(TINY) if influence.label_of(row) == label)
    with jax.enable_x64(True):
        cell = influence.build_cell(row, TINY)

        @jax.jit
        def answer(xs):
            return readout.w @ rg.unroll(cell, params, cell.init_state(), xs).final.h

        for lag in (0, 6, 13):
            columns = []
            for entry in range(3):
                shift = np.zeros_like(xs)
                shift[-1 - lag, entry] = 1e-5
                columns.append((answer(xs + shift) - answer(xs - shift)) / 2e-5)
            found = np.exp(_of(tiny, label)["log_influence"].isel(seed=0, lag=lag))
            # differences of numbers near 1 at step 1e-5 are off by 1e-11; the smallest influence here is above 1e-4
            np.testing.assert_allclose(found, np.linalg.norm(np.array(columns)), rtol=1e-5)


def test_maps_by_products_of_matrices(tiny):
    """With ∂L_t/∂y_t = softmax(y_t) − onehot; the map is the lower of two seeds, that is their minimum."""
    influences, gradients = np.full((2, 5, 5), np.nan), np.full((2, 5, 5), np.nan)
    for seed in (0, 1):
        params, readout, xs, targets = _drawn("torch, tanh", seed)
        h, slopes = np.zeros(4), []
        for t, x in enumerate(xs[:5]):
            h = np.tanh(params.w_ih @ x + params.w_hh @ h + params.b)
            slopes.append(1 - h**2)
            y = readout.w @ h + readout.b
            error = np.exp(y) / np.exp(y).sum() - np.eye(3)[targets[t]]
            chain, row = readout.w, error @ readout.w
            for k in range(t, -1, -1):
                influences[seed, t, k] = np.linalg.norm(chain * slopes[k] @ params.w_ih)
                gradients[seed, t, k] = np.linalg.norm(row)
                chain, row = chain * slopes[k] @ params.w_hh, row * slopes[k] @ params.w_hh
    at = tiny.sel(mapped="torch, tanh")
    np.testing.assert_allclose(np.exp(at["log_influence_map"]), influences.min(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.exp(at["log_gradient_map"]), gradients.min(axis=0), rtol=1e-5)


def test_reach_is_where_influence_stays_small(tiny):
    changed = tiny.drop_vars(
        [name for name in tiny.data_vars if str(name).startswith(("share", "reach", "word_share"))]
    )
    logs = np.full(changed["log_influence"].shape, np.log(1e-3), np.float32)
    logs[..., :3] = 0
    logs[..., 7] = np.log(0.02)  # comes back once more
    logs[0] = 0
    logs[1, 1] = -np.inf
    changed["log_influence"] = (changed["log_influence"].dims, logs)
    derived = influence.derive(changed)
    np.testing.assert_array_equal(derived["reach"].isel(seed=0).values[:3], [14, 8, 8])
    assert float(derived["share"][0, 0]) == pytest.approx(10 / 14)
    assert np.isnan(derived["share"][1, 1])
    assert "1 seeds without a number" in influence.verdict(derived)[1].value


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    row = influence.rows_of(TINY)[0]
    alone = influence._measure_row(row, dataclasses.replace(TINY, first_seed=1, seeds=1))
    np.testing.assert_array_equal(alone["log_influence"].isel(seed=0), tiny["log_influence"].isel(row=0, seed=1))


def _long(tiny, share, *, learned=True):
    """Returns the run as one over 100 steps, with these shares of the vanilla rows, one per row."""
    changed = tiny.copy(deep=True)
    changed.attrs["config"] = changed.attrs["config"].replace('"steps": 14', '"steps": 100')
    for name in ("share", "share_median", "share_low", "share_high"):
        changed[name][: len(share)] = np.reshape(share, (-1, *[1] * (changed[name].ndim - 1)))
    changed["accuracy"].loc[{"stage": "trained"}] = 1.0 if learned else 0.5
    return changed


def test_verdict_follows_the_data(tiny):
    assert {check.holds for check in influence.verdict(tiny)} == {None}
    assert "T = 14 is too short to tell" in influence.summary(tiny)["A4"]

    some = _long(tiny, [0.99, 0.98, 0.97, 0.5, 0.2])
    assert [check.holds for check in influence.verdict(some) if check.decides] == [True, True, True, False, False]
    said = influence.summary(some)["A4"]
    assert said.startswith("at T = 100 the 10 newest inputs have at least 0.97 of the influence")
    assert "torch, tanh; gaussian weights of gain 1; orthogonal weights of gain 1." in said
    assert "Not with identity, tanh; identity, ReLU, where the share is 0.20 to 0.50." in said

    every, none = _long(tiny, [0.95] * 5), _long(tiny, [0.1] * 5)
    assert influence.EXPERIMENT.verdicts(every)[0].word == "holds"
    assert "not with" not in influence.summary(every)["A4"].lower()
    assert influence.EXPERIMENT.verdicts(none)[0].word == "does not hold"
    assert influence.summary(none)["A4"].startswith("not with torch, tanh")
    assert "not found: vanilla, torch and gains up to 1.25" in influence.summary(none)["A4"]

    # judged by the lower end of the interval
    wide = _long(tiny, [0.99] * 5)
    wide["share_low"][0] = 0.85
    assert [check.holds for check in influence.verdict(wide) if check.decides][:2] == [False, True]


def test_trained_networks_count_only_if_they_learned(tiny):
    assert "Trained on agreement" not in influence.summary(_long(tiny, [0.9] * 5, learned=False))["A4"]
    assert "(1 of 1 seeds learned it), vanilla gives the subject" in influence.summary(_long(tiny, [0.9] * 5))["A4"]
    many = xr.concat([_long(tiny, [0.9] * 5).assign_coords(training_seed=[seed]) for seed in range(3)], "training_seed",
                     data_vars="minimal")  # fmt: skip
    many.attrs = _long(tiny, [0.9] * 5).attrs
    many["word_share"].loc[{"stage": "untrained", "position": influence.SUBJECT}] = 0.1
    for after, holds in ((0.4, True), (0.05, False)):
        many["word_share"].loc[{"stage": "trained", "position": influence.SUBJECT}] = after
        assert influence.verdict(many)[-1].holds is holds
    many["accuracy"][:] = np.nan
    assert influence.verdict(many)[-1].holds is None


def test_words_of_the_sentence(tiny):
    words = influence.SENTENCE.split()
    assert words[influence.SUBJECT] == "cat"
    assert words[influence.ANSWER + 1] == "was"
    assert influence.DISTANCES[0] <= influence.ANSWER + 1 - influence.SUBJECT <= influence.DISTANCES[1]
    np.testing.assert_allclose(tiny["word_share"].sum("position"), 1, rtol=1e-5)
    assert tiny["word"].values.tolist() == words[:-3]


def test_figures_show_the_data(tiny):
    maps, gradient, sentence = (picture.draw(tiny) for picture in influence.EXPERIMENT.pictures)
    (shares,) = [axes for axes in maps.axes if axes.get_title() == "by cell and initialisation"]
    assert [label.get_text() for label in shares.get_yticklabels()][-1] == "vanilla, torch, tanh"
    images = [axes.images[0].get_array() for axes in gradient.axes if axes.images]
    expected = np.exp(tiny["log_gradient_map"].sel(mapped="LSTM, torch").values)
    lower = np.tril_indices(5)
    np.testing.assert_allclose(images[1][lower], expected[lower], rtol=1e-5)
    assert images[1].mask[np.triu_indices(5, 1)].all()
    texts = " ".join(text.get_text() for text in sentence.axes[0].texts)
    assert "no network learned the task" in texts
    boxes = influence.sentence_figure(_long(tiny, [0.9] * 5)).axes[0].patches
    assert len(boxes) == 2 * (influence.ANSWER + 1)
    assert all(isinstance(box, matplotlib.patches.Rectangle) for box in boxes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "10"], "--steps: expected at least 11, found 10"),
        (["--map-steps", "17"], "--map-steps: expected at most 16, the steps, found 17"),
        (["--gains", "1", "0.5"], "--gains: expected positive numbers, rising, found (1.0, 0.5)"),
        (["--updates", "300"], "--updates: expected a multiple of 200, found 300"),
        (["--learning-rate", "nan"], "--learning-rate: expected a positive number, found nan"),
        (["--trained", "gru", "gru"], "--trained: expected each cell once, found gru gru"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(influence.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
