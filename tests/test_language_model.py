"""The command that trains language models: parts of a text, stored history, resume, presets, user errors."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console
import tyro
import xarray as xr

import rnngrad as rg
from experiments import command, language_model, learning, results

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("RNNGRAD_DATA")
with_data = pytest.mark.skipif(DATA is None, reason="RNNGRAD_DATA names no folder with the public texts")

WORDS = ("a dog saw the cat", "the cat saw a dog", "a cat , which slept , saw the <unk>")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Lines in an order that is not regular, so that nothing is learned by heart in a few updates."""
    file = tmp_path_factory.mktemp("text") / "mine.txt"
    chosen = np.random.default_rng(0).integers(0, len(WORDS), 200)
    file.write_text("\n".join(WORDS[index] for index in chosen))
    return file


@pytest.fixture(scope="module")
def config(text):
    return language_model.Config(
        text=str(text),
        level="word",
        hidden_size=6,
        layers=2,
        steps=7,
        batch_size=5,
        held_out_share=0.2,
        epochs=2,
        monitor_every=10,
        checkpoint_every=15,
        learning_rate=0.01,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def tiny(config, folder):
    return language_model.run(config, folder)


def same_values(one, other):
    """All numbers alike to the last bit; attributes hold times of day."""
    xr.testing.assert_equal(one, other)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_dimensions_and_units(tiny):
    per_epoch = tiny.attrs["updates_per_epoch"]
    assert tiny["update"].values.tolist() == [0, per_epoch, 2 * per_epoch]
    assert tiny.sizes["layer"] == 2
    assert tiny.sizes["lag"] == 8
    assert tiny["gate"].values.tolist() == ["f", "g", "i", "o"]
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert int(tiny["updates"][0]) == 2 * per_epoch


def test_history_is_that_of_a_loop_by_hand(tiny, config, text):
    """The same windows through the library's step, the state carried over, without folder, log or monitor."""
    tokens = rg.tasks.tokenize(rg.tasks.load_text(text), level="word")
    train, held_out = (rg.tasks.streams(part.ids, 5, 7) for part in rg.tasks.split(tokens, (0.8, 0.2)))
    cell = rg.cells.lstm(6, 6)
    model = rg.training.model([cell, cell], len(tokens.vocabulary), vocabulary_size=len(tokens.vocabulary))
    loss = lambda output, batch: rg.losses.cross_entropy(output.outputs, batch.targets)
    optimizer = learning.build_optimizer(
        "adam",
        language_model.learning_rates(config, train.num_windows),
        clip=1.0,
        clip_unit="mean_per_token",
        loss_unit="mean_per_token",
        num_steps=7,
    )
    state = rg.training.initial_state(model, optimizer, jax.random.key(0), 5)
    step = rg.training.train_step(model, loss, optimizer)
    for index in range(2 * train.num_windows):
        state, _ = step(state, train.batch(index), jax.numpy.asarray(index % train.num_windows == 0))
    memory, losses = model.init_state((5,)), []
    for index in range(held_out.num_windows):
        batch = held_out.batch(index)
        output = model.apply(state.params, memory, batch.inputs)
        memory = output.final
        losses.append(float(loss(output, batch)))
    # one float32 program in pieces: round-off through a few dozen updates
    np.testing.assert_allclose(tiny["final_loss"][0], np.mean(losses), rtol=1e-4)
    assert float(tiny["final_loss"][0]) < float(tiny["loss"][0, 0])


def test_unigram_baseline_by_hand():
    train, held_out = np.array([0, 0, 1]), np.array([0, 2])
    # counts 2, 1, 0 and one more each, of 6
    np.testing.assert_allclose(
        language_model.unigram_loss(train, held_out, 3), -(np.log(3 / 6) + np.log(1 / 6)) / 2, rtol=1e-12
    )


def test_learning_rates_of_the_paper():
    """Four epochs at 1, then half of it after every epoch; 1.2 after the sixth in the medium model."""
    small = language_model.learning_rates(language_model.PRESETS["small"].config, 10)
    assert [float(small(step)) for step in (0, 39, 40, 49, 50, 129)] == [1, 1, 0.5, 0.5, 0.25, 2.0**-9]
    medium = language_model.learning_rates(language_model.PRESETS["medium"].config, 10)
    np.testing.assert_allclose([float(medium(59)), float(medium(60))], [1, 1 / 1.2], rtol=1e-6)


def test_presets_are_the_papers_settings():
    """Table of Zaremba et al. 2014, section 4.1: N, dropout, T, weights, clipping, epochs."""
    found = [
        (c.layers, c.hidden_size, c.dropout, c.steps, c.init_scale, c.clip, c.epochs, c.flat_epochs, c.lr_decay)
        for c in (language_model.PRESETS[name].config for name in ("small", "medium", "large"))
    ]
    assert found == [
        (2, 200, 0.0, 20, 0.1, 5.0, 13, 4, 2.0),
        (2, 650, 0.5, 35, 0.05, 5.0, 39, 6, 1.2),
        (2, 1500, 0.65, 35, 0.04, 10.0, 55, 14, 1.15),
    ]
    for name in ("small", "medium", "large"):
        config = language_model.PRESETS[name].config
        assert (config.batch_size, config.optimizer, config.learning_rate) == (20, "sgd", 1.0)
        assert config.loss_unit == config.clip_unit == "sum_over_steps"
        assert config.init == "uniform"


def test_perplexities_are_ascribed_to_who_found_them():
    """The header of TensorFlow's ptb_word_lm.py: 115.91, 82.07, 78.29; the paper's table 1: 82.7 and 78.4."""
    listed = learning.preset_lines(language_model.PRESETS)
    for words in (
        "test perplexity 115.9 by TensorFlow's ptb_word_lm.py",
        "test perplexity 82.1 by TensorFlow's ptb_word_lm.py, 82.7 in the paper",
        "test perplexity 78.3 by TensorFlow's ptb_word_lm.py, 78.4 in the paper",
    ):
        assert words in listed


@pytest.mark.parametrize("name", language_model.PRESETS)
def test_presets_are_listed_with_the_flags_that_make_them(name):
    config, source = language_model.PRESETS[name]
    language_model.check(config)
    assert source
    words = command.flags(config)
    assert f"  {name}: {words}" in learning.preset_lines(language_model.PRESETS)
    assert tyro.cli(language_model.Config, args=words.split(), default=language_model.Config()) == config


@pytest.mark.slow
def test_both_loss_units_give_one_curve_per_token(config, tmp_path):
    """Plain SGD on the sum over T steps with rate η is SGD on the mean with rate T η."""
    config = dataclasses.replace(config, optimizer="sgd", schedule="constant", max_updates=20, clip=None, layers=1)
    mean = language_model.run(dataclasses.replace(config, learning_rate=0.7), tmp_path / "mean")
    total = language_model.run(
        dataclasses.replace(config, learning_rate=0.1, loss_unit="sum_over_steps"), tmp_path / "sum"
    )
    # the same sums in another order, through twenty updates
    np.testing.assert_allclose(total["train_loss"], mean["train_loss"], rtol=1e-4)
    np.testing.assert_allclose(total["loss"], mean["loss"], rtol=1e-4)
    assert float(total["loss"][0, -1]) < float(total["loss"][0, 0])


def test_uniform_init_draws_every_weight(config):
    model = language_model.build_model(dataclasses.replace(config, init="uniform", init_scale=0.05), 11)
    leaves = jax.tree.leaves(model.init(jax.random.key(0)))
    assert all(0 < float(abs(leaf).max()) <= 0.05 for leaf in leaves)


def test_provenance_names_no_folder(tiny, text):
    assert str(text.parent) not in json.dumps({name: str(value) for name, value in tiny.attrs.items()})
    assert "--text mine.txt" in tiny.attrs["command"]
    assert len(tiny.attrs["text_sha256"]) == 64


# --- parts of a text --------------------------------------------------------------------------------------------------


def parts_of(words, data_dir, screen=None, level="word"):
    config = language_model.Config(text=words, level=level, data_dir=data_dir)
    return language_model.read_parts(config, screen or rich.console.Console(quiet=True))


@with_data
def test_ptb_without_its_train_file_says_so(tmp_path):
    for part in ("valid", "test"):  # alone in a folder, so that a machine that has the third one tests the same
        (tmp_path / f"ptb.{part}.txt").write_bytes((Path(DATA) / "ptb" / f"ptb.{part}.txt").read_bytes())
    said = io.StringIO()
    parts = parts_of("ptb", tmp_path, rich.console.Console(file=said, width=200))
    said = said.getvalue()
    assert "the train file is not at hand" in said
    assert "do not compare with published ones" in said
    assert (len(parts.train), len(parts.held_out), parts.test) == (73_760, 82_430, None)
    assert (parts.train_name, parts.held_out_name) == ("ptb.valid.txt", "ptb.test.txt")
    unk = parts.vocabulary.index("<unk>")
    own = rg.tasks.tokenize(rg.tasks.load_text("ptb:test", data_dir=tmp_path))
    counted = np.sum(parts.held_out == unk) - np.sum(own.ids == own.vocabulary.index("<unk>"))
    assert parts.unknown_share == pytest.approx(counted / 82_430)


def test_a_file_is_cut_at_its_last_tenth(text):
    parts = parts_of(str(text), None)
    tokens = rg.tasks.tokenize(rg.tasks.load_text(text))
    np.testing.assert_array_equal(np.concatenate([parts.train, parts.held_out]), tokens.ids)
    assert len(parts.train) == int(0.9 * len(tokens.ids))
    assert parts.unknown_share == 0


# --- resume -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_with_the_same_command(tiny, config, tmp_path, monkeypatch, capsys):
    original = rg.training.fit

    def interrupted(*args, on_progress, **options):
        def watch(progress):
            if progress.step == 20:
                raise KeyboardInterrupt
            on_progress(progress)

        return original(*args, on_progress=watch, **options)

    with monkeypatch.context() as patched:
        patched.setattr(rg.training, "fit", interrupted)
        with pytest.raises(SystemExit) as stopped:
            learning.execute(language_model.DRIVER, config, out=tmp_path, show=None)
        assert stopped.value.code == 130
        assert "resumes from the last checkpoint, or starts anew if there is none yet" in capsys.readouterr().err
    learning.execute(language_model.DRIVER, config, out=tmp_path, show=None)
    assert "resumed after update 15" in capsys.readouterr().out
    same_values(results.load(tmp_path / "language_model.nc", experiment="language_model"), tiny)


def test_a_run_that_ran_out_of_minutes_writes_its_result_and_goes_on(tiny, config, tmp_path):
    stopped = language_model.run(dataclasses.replace(config, max_minutes=1e-9), tmp_path)
    assert int(stopped["updates"][0]) < int(tiny["updates"][0])
    assert np.isfinite(stopped["final_loss"])
    learning.figure(stopped).canvas.draw()
    assert language_model.table(stopped).row_count >= 3
    same_values(language_model.run(config, tmp_path), tiny)


@pytest.mark.slow
def test_resume_after_kill_gives_the_undisturbed_result(text, tmp_path):
    words = [sys.executable, "-m", "experiments.language_model", "--smoke", "--max-updates", "400", "--text", str(text)]
    words += ["--steps", "4", "--batch-size", "8", "--epochs", "100", "--out"]
    environment = os.environ | {"MPLBACKEND": "agg"}
    run = lambda out: subprocess.run([*words, out], cwd=ROOT, env=environment, check=True, capture_output=True)
    run(tmp_path / "undisturbed")
    process = subprocess.Popen([*words, tmp_path / "killed"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "40").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "language_model.nc").exists()
    run(tmp_path / "killed")
    same_values(
        *(
            results.load(tmp_path / name / "language_model.nc", experiment="language_model")
            for name in ("undisturbed", "killed")
        )
    )


def test_another_text_is_refused_and_named(tiny, config, folder, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(Path(config.text).read_text() + "\na dog slept")
    with pytest.raises(SystemExit) as stopped:
        learning.execute(language_model.DRIVER, dataclasses.replace(config, text=str(other)), out=folder, show=None)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "text: expected 'mine.txt, sha256" in error
    assert len(error.strip().splitlines()) == 1


# --- what a person sees -----------------------------------------------------------------------------------------------


def test_table_has_the_unit_of_the_level(tiny):
    columns = [column.header for column in language_model.table(tiny).columns]
    assert columns[2:] == ["nats per word", "perplexity"]
    changed = tiny.copy()
    changed.attrs["level"] = "char"
    columns = [column.header for column in language_model.table(changed).columns]
    assert columns[2:] == ["nats per character", "bits per character"]


def test_summary_follows_the_data(tiny):
    changed = tiny.copy(deep=True)
    changed["best_loss"][:] = 0.5
    assert "0.5000 nats per word" in language_model.summary(changed)
    assert f"{tiny.attrs['baseline'] - 0.5:.3f} nats below" in language_model.summary(changed)
    changed["best_loss"][:] = 50.0
    assert "not below the model without memory" in language_model.summary(changed)


def test_figure_shows_every_layer(tiny):
    titles = {axes.get_title() for axes in learning.figure(tiny).axes}
    assert {"gradient that reaches back, layer 1 of 2", "gradient that reaches back, layer 2 of 2"} <= titles


def test_smoke_then_show(text, tmp_path, capsys):
    language_model.main(["--smoke", "--text", str(text), "--batch-size", "2", "--out", str(tmp_path / "o")])
    assert "model without memory" in capsys.readouterr().out
    written = {entry.name for entry in (tmp_path / "o").iterdir()}
    assert written == {"checkpoints", "log.jsonl", "tensorboard", "language_model.nc", "language_model.png"}
    language_model.main(["--show", str(tmp_path / "o" / "language_model.nc"), "--out", str(tmp_path / "again")])
    assert [entry.name for entry in (tmp_path / "again").iterdir()] == ["language_model.png"]


# --- user errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "empty.txt"], "empty"),
        (["--text", "short.txt"], "need at least"),
        (["--text", "ptb", "--data-dir", "."], "ptb.valid.txt"),
        (["--text", "tinyshakespeare", "--data-dir", "."], "input.txt"),
        (["--seed", "-1"], "--seed: expected seeds of at least 0 and below 2**32, found -1"),
        (["--steps", "0"], "--steps: expected at least 1, found 0"),
        (["--dropout", "1"], "--dropout: expected a probability in [0, 1), found 1"),
        (["--held-out-share", "1"], "--held-out-share: expected a share between 0 and 1, found 1"),
        (["--max-minutes", "0"], "--max-minutes: expected a positive number, found 0"),
        (["--init", "uniform", "--forget-bias", "1"], "--forget-bias: init uniform draws every bias"),
        (["--preset", "tiny"], "--preset: expected one of small, medium, large, char, found tiny"),
        (["--show", "short.txt"], "not a readable netCDF file"),
        (["--out", "short.txt"], "output folder short.txt is not writable"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("three little words")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        language_model.main(["--smoke", *([] if "--out" in words else ["--out", "o"]), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.nc"))


@pytest.mark.slow
@with_data
def test_tinyshakespeare_is_learned_below_the_model_without_memory(tmp_path):
    """A few hundred updates of a small network; the preset itself takes half an hour."""
    config = dataclasses.replace(
        language_model.PRESETS["char"].config, hidden_size=64, max_updates=300, data_dir=Path(DATA)
    )
    dataset = language_model.run(config, tmp_path)
    assert dataset.attrs["train_tokens"] + dataset.attrs["held_out_tokens"] == 1_115_394
    # 3.35 nats for the frequencies of characters; any use of the character before gives 2.5
    assert dataset.attrs["baseline"] == pytest.approx(3.347, abs=1e-3)
    assert float(dataset["best_loss"][0]) < 2.5
