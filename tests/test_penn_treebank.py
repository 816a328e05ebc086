"""The experiment on language models: gradients by a loop written apart, texts, verdicts that follow the data."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import command, penn_treebank
from experiments.claims import word_of
from experiments.trials import Trial

TINY = dataclasses.replace(
    penn_treebank.SMOKE, rows=("vanilla", "lstm-chrono"), num_words=20, hidden_size=4, bptt_steps=5, checkpoints=(0, 2),
    eval_every=2, lags=12, transient=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return penn_treebank.run(TINY)


@pytest.fixture(scope="module")
def texts():
    return penn_treebank._read_texts(TINY)


def test_dimensions_and_units(tiny):
    assert dict(tiny.sizes) == {
        "row": 2, "seed": 2, "checkpoint": 2, "quantity": 2, "lag": 13, "window": 2, "sequence": 2, "evaluation": 2,
    }  # fmt: skip
    assert tiny["window"].values.tolist() == ["1–10", "10–12"]
    assert all(tiny[name].attrs.get("units") for name in penn_treebank.MEASURED)
    assert tiny.attrs["num_words"] == 20
    assert (tiny["failed_at"] == -1).all()
    assert (tiny["nonfinite_step"] == -1).all()


def lstm_step(params, h, c, x):
    i, f, g, o = jnp.split(params.w_ih @ x + params.w_hh @ h + params.b, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def vanilla_step(params, h, c, x):
    return jnp.tanh(params.w_ih @ x + params.w_hh @ h + params.b), c


@pytest.mark.parametrize(("row", "step"), [("vanilla", vanilla_step), ("lstm-chrono", lstm_step)])
def test_gradients_by_nudged_states(tiny, texts, row, step):
    """Seed 1 before training: every state is nudged, and the loss differentiated by the nudges, in float64."""
    model = penn_treebank._build(row, TINY, texts.num_words)
    params = model.init(jax.random.split(jax.random.key(1))[0])
    sequences = rg.tasks.sequences(texts.held_out, 15, 2, 1)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)

        def run(nudges, ids):
            h = c = jnp.zeros(4, jnp.float64)
            for t in range(3):
                h, c = step(params.layers[0], h, c, params.embedding[ids[t]])
            for t in range(12):
                h, c = step(params.layers[0], h + nudges[t, 0], c + nudges[t, 1], params.embedding[ids[3 + t]])
            return h + nudges[12, 0], c + nudges[12, 1]

        def loss(nudges, ids):
            logits = params.readout.w @ run(nudges, ids)[0] + params.readout.b
            return jax.nn.logsumexp(logits) - logits[ids[-1]]

        gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.zeros((13, 2, 4)), sequences)
        chains = jax.jit(jax.vmap(jax.jacobian(lambda *a: run(*a)[0]), (None, 0)))(jnp.zeros((13, 2, 4)), sequences)
        norms = np.linalg.norm(np.asarray(gradients).reshape(2, 13, 8), axis=-1)[:, ::-1]
        chains = np.linalg.norm(np.asarray(chains)[:, :, :, 0], axis=(1, 3))[:, ::-1]
    found = tiny.sel(row=row, seed=1, checkpoint=0)
    logs = {"loss": np.log(norms / norms[:, :1]), "chain": np.log(chains / chains[:, :1])}
    for quantity, expected in logs.items():
        # float32 states against float64 ones
        at = found.sel(quantity=quantity)
        np.testing.assert_allclose(at["log_norm"], expected.mean(axis=0), atol=1e-4)
        for window, (first, last) in zip(at["window"].values, ((1, 10), (10, 12)), strict=True):
            fit = [np.polyfit(np.arange(first, last + 1), curve[first : last + 1], 1)[0] for curve in expected]
            np.testing.assert_allclose(at["slope"].sel(window=window), fit, atol=1e-4)
    np.testing.assert_allclose(found["share"], norms[:, :10].sum(axis=1) / norms[:, :12].sum(axis=1), atol=1e-4)


def test_held_out_loss_by_numpy(tiny, texts):
    """The vanilla cell of seed 0 before training, over two windows of four streams with the memory carried on."""
    model = penn_treebank._build("vanilla", TINY, texts.num_words)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.init(jax.random.split(jax.random.key(0))[0]))
    ids = texts.held_out.ids
    streams = ids[: len(ids) // 4 * 4].reshape(4, -1)
    cell, losses = params.layers[0], []
    for stream in streams:
        h = np.zeros(4)
        for word, target in itertools.pairwise(stream[:11]):
            h = np.tanh(cell.w_ih @ params.embedding[word] + cell.w_hh @ h + cell.b)
            logits = params.readout.w @ h + params.readout.b
            losses.append(np.log(np.exp(logits).sum()) - logits[target])
    np.testing.assert_allclose(tiny["held_out_loss"].sel(row="vanilla", seed=0)[0], np.mean(losses), rtol=1e-5)
    # training did something, and rows of one kind of cell share no weights
    assert (tiny["held_out_loss"][..., 1] != tiny["held_out_loss"][..., 0]).all()


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = penn_treebank.run(dataclasses.replace(TINY, first_seed=1, seeds=1, rows=("vanilla",)))
    for name in ("log_norm", "slope", "share", "held_out_loss"):
        np.testing.assert_array_equal(alone[name].isel(row=0, seed=0), tiny[name].sel(row="vanilla", seed=1))


def test_vocabulary_is_cut_to_the_most_frequent_words(tmp_path):
    words = ["a"] * 9 + ["b"] * 6 + ["c"] * 4 + ["d"]
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words))
    cut = penn_treebank._read_texts(dataclasses.replace(TINY, text=str(file), num_words=3))
    # 21 words with <eos>: 18 to train on; all but a and b are unknown
    assert cut.held_out.vocabulary == ("a", "b", "<unk>")
    assert cut.train.tolist() == [0] * 9 + [1] * 6 + [2] * 3
    assert cut.held_out.ids.tolist() == [2, 2, 2]
    assert cut.unknown_share == 1.0
    file.write_text(" ".join(words).replace("b", "<unk>"))
    own = penn_treebank._read_texts(dataclasses.replace(TINY, text=str(file), num_words=3))
    assert own.held_out.vocabulary == ("a", "<unk>", "c")
    assert own.held_out.ids.tolist() == [2, 1, 1]
    whole = penn_treebank._read_texts(dataclasses.replace(TINY, text=str(file), num_words=50))
    assert whole.num_words == 5
    assert whole.unknown_share == 0.0


def test_a_network_that_failed_is_counted_and_has_no_number(texts):
    class Failing:
        def run(self, key, *, updates, eval_every, params, keep_snapshots):
            nothing = np.array([np.nan, np.nan])
            held_out = {"held_out_loss": np.array([3.0, np.nan])}
            return Trial(np.array([0, 2]), held_out, nothing, nothing, nothing, 1, params, [params])

    net = penn_treebank._build("vanilla", TINY, texts.num_words)
    found = penn_treebank._measure_trial("vanilla", 0, TINY, texts, {"vanilla": (net, Failing())})
    assert found["failed_at"] == 1
    assert np.isfinite(found["slope"][0]).all()
    assert np.isnan(found["slope"][1]).all()
    assert np.isnan(found["share"][1]).all()
    assert found["nonfinite_step"].values.tolist() == [[-1, -1], [-1, -1]]


def synthetic(rnn=-0.5, lstm=-0.01, seeds=5):
    """What a run on Penn Treebank would store if gradients fell evenly."""
    lags, rows = np.arange(151), ["vanilla", "lstm", "lstm-chrono", "gru"]
    rates = xr.DataArray([rnn, lstm, lstm, -0.1], dims="row")
    spread = xr.DataArray(np.linspace(0.99, 1.01, seeds), dims="seed")
    here = xr.DataArray(np.ones((2, 2)), dims=("checkpoint", "quantity"))
    curve = np.exp(rates * spread * xr.DataArray(lags, dims="lag"))
    dataset = xr.Dataset(
        {
            "log_norm": (rates * spread * here * xr.DataArray(lags, dims="lag")),
            "slope": rates * spread * here * xr.DataArray(np.ones((3, 4)), dims=("window", "sequence")),
            "share": (curve[..., :10].sum("lag") / curve[..., :100].sum("lag"))
            * xr.DataArray(np.ones((2, 4)), dims=("checkpoint", "sequence")),
            "held_out_loss": np.log(90.0) * spread * xr.DataArray(np.ones((4, 3)), dims=("row", "evaluation")),
        },
        coords={
            "row": rows, "seed": np.arange(seeds), "checkpoint": [0, 1000], "quantity": ["loss", "chain"], "lag": lags,
            "window": ["1–10", "10–50", "50–150"], "evaluation": [0, 500, 1000],
        },
    )  # fmt: skip
    for name in ("nonfinite_step", "train_loss", "clip_fraction", "failed_at"):
        dataset[name] = ("seed", np.full(seeds, -1.0))
    dataset["failed_at"] = (("row", "seed"), np.full((4, seeds), -1))
    config = dataclasses.asdict(dataclasses.replace(penn_treebank.Config(), seeds=seeds))
    dataset.attrs = {
        "config": json.dumps(config | {"data_dir": None}), "unigram_loss": float(np.log(185)), "text": "a text",
        "num_words": 2000, "dtype": "float32", "matmul_precision": "highest", "backend": "cpu", "confidence": 0.95,
    }  # fmt: skip
    return penn_treebank.derive(dataset)


def words_of(dataset):
    checks = penn_treebank.verdict(dataset)
    return [word_of([check for check in checks if check.claim == claim]) for claim in ("B9", "B10")]


def test_verdict_follows_the_data():
    as_claimed = synthetic()
    assert words_of(as_claimed) == ["holds", "holds"]
    said = penn_treebank.summary(as_claimed)
    assert "vanilla RNN -0.500 [-0.50" in said["B9"]
    assert "LSTM, -0.015 to -0.005: everywhere.  LSTM, chrono" in said["B9"]
    assert "Both are found at the same point of training: before training; after 1,000 updates." in said["B9"]
    # e^{−0.5t} has 1 − e^{−5} in the last ten steps, e^{−0.01t} about 0.15
    assert "vanilla RNN 0.99 [0.99, 0.99]" in said["B10"]
    assert "LSTM 0.15 [0.15, 0.15]" in said["B10"]
    predictions = {c.name: c.holds for c in penn_treebank.verdict(as_claimed) if not c.decides}
    assert predictions["prediction: slope, vanilla RNN, before training, lags 10–50"] is True
    assert predictions["prediction: slope, LSTM, before training, lags 10–50"] is False
    assert predictions["learned: held-out perplexity, GRU"] is True

    other = synthetic(rnn=-0.02, lstm=-0.2)
    assert words_of(other) == ["does not hold", "does not hold"]
    assert "vanilla RNN, at least 0.9: nowhere" in penn_treebank.summary(other)["B10"]

    changed = synthetic(lstm=-0.2)
    assert words_of(changed) == ["holds only if", "holds only if"]
    changed["slope"].loc[{"row": "lstm", "checkpoint": 1000, "window": "50–150"}] = -0.008
    said = penn_treebank.summary(changed)["B9"]
    assert (
        "LSTM, -0.015 to -0.005: after 1,000 updates (-0.008 [-0.008, -0.008] over lags 50–150).  LSTM, chrono" in said
    )
    assert said.endswith("point of training: after 1,000 updates.")
    assert "LSTM, chrono, -0.015 to -0.005: nowhere" in said

    changed["slope"].loc[{"row": "lstm"}] = -0.2
    changed["slope"].loc[{"row": "lstm-chrono", "checkpoint": 0}] = -0.012
    changed["slope"].loc[{"row": "vanilla", "checkpoint": 0}] = -0.9
    said = penn_treebank.summary(changed)["B9"]
    assert "LSTM, -0.015 to -0.005: nowhere" in said
    assert "chrono, -0.015 to -0.005: before training, all lags (-0.012" in said
    assert said.endswith("At no point of training are both found.")

    # the interval decides, not the median: two seeds of five lie outside
    changed = synthetic()
    changed["slope"].loc[{"row": "vanilla", "seed": [3, 4]}] = -0.7
    decided = {c.name: c for c in penn_treebank.verdict(changed)}
    check = decided["slope, vanilla RNN, before training, lags 10–50"]
    assert check.value.startswith("-0.500 [-0.7")
    assert check.holds is False

    # failed seeds are left out; a cell of which all failed has no verdict
    changed["slope"].loc[{"row": "vanilla", "seed": [3, 4], "checkpoint": 1000}] = np.nan
    changed["slope"].loc[{"row": "lstm", "checkpoint": 1000}] = np.nan
    decided = {c.name: c.holds for c in penn_treebank.verdict(changed)}
    assert decided["slope, vanilla RNN, after 1,000 updates, lags 10–50"] is True
    assert decided["slope, LSTM, after 1,000 updates, lags 10–50"] is None

    assert words_of(synthetic(seeds=3)) == ["not decided", "not decided"]


def test_interval_over_seeds_and_windows():
    rng = np.random.default_rng(1)
    values = xr.DataArray(rng.normal(size=(5, 16)), dims=("seed", "sequence"))
    found = penn_treebank.interval_over(values)
    assert found.median == np.median(values.mean("sequence"))
    assert found.low < found.median < found.high
    # seeds that agree leave the spread of the windows
    alike = values.isel(seed=[0, 0, 0, 0, 0])
    error = float(alike.isel(seed=0).std()) / 4
    found = penn_treebank.interval_over(alike)
    # the median of five means of 16 windows: 1.25/√5 of one mean's error, ± 2 of it
    np.testing.assert_allclose(found.high - found.low, 4 * 1.25 / np.sqrt(5) * error, rtol=0.2)
    one_window = alike.mean("sequence").expand_dims(sequence=2)
    np.testing.assert_allclose(penn_treebank.interval_over(one_window), found.median)
    constant = penn_treebank.interval_over(xr.full_like(values, 2.0))
    assert constant == (2.0, 2.0, 2.0)


def test_pictures():
    dataset = synthetic()
    panels = penn_treebank.figure(dataset).axes
    assert [axes.get_title() for axes in panels] == ["vanilla RNN", "LSTM", "LSTM, chrono", "GRU"]
    np.testing.assert_allclose(panels[1].lines[0].get_ydata(), -0.01 * dataset["lag"], rtol=1e-6)
    upper = penn_treebank.slopes(dataset).axes[0]
    np.testing.assert_allclose(upper.lines[0].get_ydata(), [-0.5] * 3, rtol=1e-6)
    left, right = penn_treebank.shares(dataset).axes
    assert left.get_ylabel() == "share of Σ ‖∂L_T/∂s_k‖ in the last 10"
    np.testing.assert_allclose(left.lines[0].get_ydata()[1], 0.15, atol=0.01)
    np.testing.assert_allclose(right.lines[0].get_ydata(), 90, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lags", "11"], "--lags: expected at least 12, found 11"),
        (["--learning-rate", "0"], "--learning-rate: expected a positive number, found 0.0"),
        (["--rows", "gru", "gru"], "--rows: expected one or more names, each once, found gru gru"),
        (["--checkpoints", "0", "3"], "--checkpoints: expected 0 and then multiples of eval_every = 4, rising, found"),
        (["--text", "no-such-file.txt"], "no-such-file.txt"),
        (["--lags", "1000000"], "sequences: 2 of 1000005 steps need at least"),
        (["--batch-size", "100000"], "streams: 100000 of 10 steps need at least"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(penn_treebank.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
