"""The agreement experiment: its numbers by NumPy and by parsing sentences, verdicts that follow the data."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import rnngrad as rg
from experiments import agreement_distance as experiment
from experiments import command

TINY = dataclasses.replace(
    experiment.SMOKE, cells=("vanilla", "gru"), hidden_size=5, batch_size=4, updates=2, eval_every=1, probes=3
)


@pytest.fixture(scope="module")
def tiny():
    return experiment.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny.sizes == {
        "cell": 2, "trained": 1, "seed": 2, "distance": 4, "attractor": 2, "attractors": 5, "stage": 2, "lag": 12,
    }  # fmt: skip
    assert tiny["distance"].values.tolist() == [10, 15, 20, 25]
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert (tiny["failed_at"] == -1).all()


def test_retention_by_numpy(tiny):
    """Vanilla, seed 1, untrained: the row v = V₁ − V₀ pushed back through diag(1 − h²) U, sentence by sentence."""
    probes = np.asarray(experiment._tests(TINY, 1).probes)
    size = len(rg.tasks.AGREEMENT_VOCABULARY)
    model = rg.training.model([rg.cells.vanilla(size, 5)], 2)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), model.init(jax.random.fold_in(jax.random.key(1), 0))
    )
    (layer,), curves = params.layers, []
    for words in probes.T:
        assert 7 <= words[1] < 23  # a noun: the subject
        assert rg.tasks.AGREEMENT_VOCABULARY[words[-1]] == ","
        h, slopes = np.zeros(5), []
        for word in words:
            h = np.tanh(layer.w_ih[:, word] + layer.w_hh @ h + layer.b)
            slopes.append(1 - h**2)
        row, norms = params.readout.w[1] - params.readout.w[0], []
        # the last one multiplied with is that of the step after the subject, which is step 1
        for slope in reversed(slopes[2:]):
            norms.append(np.linalg.norm(row))
            row = (row * slope) @ layer.w_hh
        curves.append(np.log([*norms, np.linalg.norm(row)]) - np.log(norms[0]))
    found = tiny["log_retention"].sel(cell="vanilla", stage="untrained", seed=1).isel(trained=0)
    np.testing.assert_allclose(found, np.mean(curves, axis=0), atol=2e-4)  # float32 over twelve steps


def test_answers_by_numpy():
    tests = experiment._tests(TINY, 0)
    model = experiment._model("vanilla", 5)
    params = model.init(jax.random.key(3))
    said = np.asarray(experiment._answers(model, params, tests.ids, tests.before_verb))
    (layer,), readout = params.layers, params.readout
    for sentence in range(4):
        h = np.zeros(5)
        words, at = np.asarray(tests.ids[1, :, sentence]), int(tests.before_verb[1, sentence])
        for word in words[: at + 1]:
            h = np.tanh(layer.w_ih[:, word] + layer.w_hh @ h + layer.b)
        verb = rg.tasks.AGREEMENT_VOCABULARY[words[at + 1]]
        assert verb == ("was", "were")[tests.number[200 + sentence]]
        assert said[1, sentence] == np.argmax(readout.w @ h + readout.b)


def _is_plural(word):
    return word.endswith("s") or word == "children"


def _follow(which):
    """Answers of a reader who agrees with the first or the last noun before the verb."""

    def answers(model, params, ids, before_verb):
        said = []
        for chunk, ends in zip(np.asarray(ids), np.asarray(before_verb), strict=True):
            for words, end in zip(chunk.T, ends, strict=True):
                nouns = [word for word in words[: end + 1] if 7 <= word < 23]
                said.append(_is_plural(rg.tasks.AGREEMENT_VOCABULARY[nouns[which]]))
        return np.array(said, int).reshape(before_verb.shape)

    return answers


def test_a_reader_of_the_subject_and_one_of_the_nearest_noun(tiny, monkeypatch):
    monkeypatch.setattr(experiment, "_answers", _follow(0))
    subject = experiment._measure("vanilla", 12, 0, TINY)
    assert subject["accuracy"] == 1
    assert (subject["accuracy_by_distance"] == 1).all()
    assert (subject["accuracy_by_attractors"] == 1).all()
    monkeypatch.setattr(experiment, "_answers", _follow(-1))
    nearest = experiment._measure("vanilla", 12, 0, TINY)
    assert nearest["accuracy_by_attractors"].values.tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    # 400 sentences: a standard error of 0.02
    expected = rg.tasks.nearest_noun_accuracy(num_attractors=(0, 2), mismatch=0.5)
    np.testing.assert_allclose(nearest["accuracy_by_distance"].mean(), expected, atol=0.08)


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = experiment.run(dataclasses.replace(TINY, cells=("vanilla",), first_seed=1, seeds=1))
    for name in experiment.MEASURED:
        np.testing.assert_array_equal(alone[name].isel(cell=0, seed=0), tiny[name].isel(cell=0, seed=1))


def _long(dataset, accuracy):
    """The dataset as if of a long run, with these accuracies (cell, seed) and a gradient that goes with them."""
    changed = dataset.copy(deep=True)
    changed.attrs["config"] = (
        dataset.attrs["config"].replace('"updates": 2', '"updates": 4000').replace('"seeds": 2', '"seeds": 5')
    )
    values = np.array(accuracy, np.float32)[:, None, :]
    changed["accuracy"][:] = values
    changed["log_retention"].loc[{"stage": "trained"}] = np.where(values >= 0.99, -1.0, -20.0)[..., None]
    return experiment.derive(changed)


def test_verdict_follows_the_data(tiny):
    (short,) = experiment.EXPERIMENT.verdicts(tiny)
    assert short.word == "not decided"
    assert "too short to tell" in short.sentence
    (claim,) = experiment.EXPERIMENT.verdicts(_long(tiny, [[0.5, 0.52], [1, 1]]))
    assert claim.word == "holds"
    assert "It forgets, with every seed, as vanilla, up to 12 words" in claim.sentence
    assert "vanilla 0 up to 12; GRU 2 up to 12" in claim.sentence
    assert "10^-0.4 in the 2 networks that agree" in claim.sentence
    (claim,) = experiment.EXPERIMENT.verdicts(_long(tiny, [[0.5, 1], [1, 1]]))
    assert claim.word == "holds only if"
    assert "It never forgets" in claim.sentence
    (claim,) = experiment.EXPERIMENT.verdicts(_long(tiny, [[1, 1], [1, 0.6]]))
    assert claim.word == "does not hold"
    assert "Not kept by GRU, up to 12 words" in claim.sentence


def test_predictions_follow_the_data(tiny):
    good = _long(tiny, [[0.5, 0.52], [1, 1]])
    gradient = lambda dataset: next(c for c in experiment.verdict(dataset) if "gradient reaches" in c.name)
    assert gradient(good).holds
    assert not gradient(good).decides
    good["log_retention"].loc[{"stage": "trained", "cell": "vanilla"}] = 0.0
    assert gradient(good).holds is False
    assert gradient(good).value == "2 of 4 networks"
    finite = lambda dataset: next(c for c in experiment.verdict(dataset) if "stays finite" in c.name)
    assert finite(good).holds
    good["failed_at"][0, 0, 0] = 7
    assert finite(good).holds is False


def test_figure_shows_what_it_should(tiny):
    drawn = experiment.figure(tiny)
    axes = [axes for part in drawn.subfigs for axes in part.axes]
    assert [a.get_title().partition("\n")[0] for a in axes] == [
        "trained up to 12 words",
        "nouns between, at 20 words",
        "gradient of the answer, back to the subject",
        "every trained network",
    ]
    assert all(a.get_xlabel() for a in axes)
    (shown,) = (line for line in axes[0].get_lines() if line.get_label() == "GRU")
    np.testing.assert_allclose(
        shown.get_ydata(), 100 * tiny["accuracy_by_distance_median"].sel(cell="gru").isel(trained=0), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--trained", "9"], "--trained: expected distances of at least 10, rising, found (9,)"),
        (["--trained", "20", "12"], "--trained: expected distances of at least 10, rising"),
        (["--trained", "40"], "--farthest: expected at least 40, found 29"),
        (["--probe-distance", "30"], "--probe-distance: expected at most 29, found 30"),
        (["--cells", "lstm", "lstm"], "--cells: expected different cells"),
        (["--updates", "15"], "--updates: expected a multiple of 10, found 15"),
        (["--test-sentences", "500"], "--test-sentences: expected a multiple of 400, found 500"),
        (["--learning-rate", "nan"], "--learning-rate: expected a positive number, found nan"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(experiment.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
