"""The command that trains on tasks: stored history, resume, solved or not, presets, figure, user errors."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
import xarray as xr

import rnngrad as rg
from experiments import command, learning, results, train

ROOT = Path(__file__).resolve().parent.parent
TINY = dataclasses.replace(train.smoke(train.Config()), steps=12, cell="gru", hidden_size=5, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def tiny(folder):
    return train.run(TINY, folder)


def same_values(one, other):
    """All numbers alike to the last bit; attributes hold times of day."""
    xr.testing.assert_equal(one, other)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_dimensions_and_units(tiny):
    assert tiny.sizes == {
        "seed": 2,
        "train_update": 4,
        "update": 3,
        "flow_update": 5,
        "layer": 1,
        "lag": 13,
        "gate": 4,  # r, u, and both parts of the candidate
    }
    assert tiny["update"].values.tolist() == [0, 20, 40]
    assert tiny["flow_update"].values.tolist() == [1, 10, 20, 30, 40]
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert all(tiny[name].attrs.get("description") for name in tiny.data_vars)


def test_history_is_that_of_a_loop_by_hand(tiny):
    """Seed 1 again with the library's step, without folder, log or monitor."""
    task = rg.tasks.adding(12)
    model = rg.training.model([rg.cells.gru(2, 5)], 1)
    key_params, key_train, key_held_out = jax.random.split(jax.random.key(1), 3)
    optimizer = train_optimizer()
    loss = lambda output, batch: rg.losses.mse(output.outputs, batch.targets, batch.mask)
    state = rg.training.initial_state(model, optimizer, key_params, 4)
    step = rg.training.train_step(model, loss, optimizer)
    held_out = [task.batch(key, 4) for key in jax.random.split(key_held_out, 5)]
    evaluate = rg.training.evaluator(model, loss, held_out)
    batch_at = jax.jit(lambda number: task.batch(jax.random.fold_in(key_train, number), 4))
    losses, held_out_losses = [], [evaluate(state.params)["loss"]]
    for number in range(40):
        state, metrics = step(state, batch_at(number), jax.numpy.array(True))
        losses.append(float(metrics.loss))
        if number % 20 == 19:
            held_out_losses.append(evaluate(state.params)["loss"])
    # the same programs on the same numbers; the means are taken in another order
    np.testing.assert_allclose(tiny["loss"].sel(seed=1), held_out_losses, rtol=1e-6)
    np.testing.assert_allclose(tiny["train_loss"].sel(seed=1), np.reshape(losses, (4, 10)).mean(axis=1), rtol=1e-6)


def train_optimizer():
    return learning.build_optimizer(
        "adam", 1e-3, clip=1.0, clip_unit="mean_per_token", loss_unit="mean_per_token", num_steps=1
    )


def test_flow_is_that_of_the_library(tiny):
    """The monitor's first look, at the untrained network, by its public function."""
    task, model = rg.tasks.adding(12), rg.training.model([rg.cells.gru(2, 5)], 1)
    key_params, key_train, _ = jax.random.split(jax.random.key(0), 3)
    state = rg.training.initial_state(model, train_optimizer(), key_params, 4)
    batch = task.batch(jax.random.fold_in(key_train, 0), 4)
    loss = lambda output, batch: rg.losses.mse(output.outputs, batch.targets, batch.mask)
    layer = rg.training.gradient_flow(model, state.params, model.init_state((4,)), batch, loss).layers[0]
    first = tiny.sel(seed=0, flow_update=1, layer=1)
    # one backward pass twice, by programs that may fuse otherwise
    np.testing.assert_allclose(first["log_retention"], layer.log_retention, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first["gate_share"].sel(gate="u"), layer.gate_share["u"], rtol=1e-4)
    np.testing.assert_allclose(first["gate_share"].sum("gate"), 1, rtol=1e-6)


def test_horizon_is_the_first_lag_below_a_hundredth():
    retention = np.log([[1, 0.5, 0.0099, 0.5], [1, 2, 3, 4], [1, 0.011, 0.011, 1e-9]])
    assert learning.horizon(retention).tolist() == [2, -1, 3]
    assert learning.horizon(np.array([0.0, -np.inf])).tolist() == 1


def test_lags_that_no_sequence_has_are_missing_and_not_zero():
    layer = {
        "log_retention": [0.0, -1.0, None, None],
        "decay_rate": -1.0,
        "half_life": None,
        "direct_share": None,
        "gate_share": {"z": 1.0},
    }
    records = [
        {"kind": "evaluation", "step": 0, "loss": None},
        {"kind": "flow", "step": 1, "layers": [layer], "clip_fraction": 0.0},
    ]
    retention = learning.history(records, loss_unit="nats", reach=lambda update: 2)["log_retention"].values[0, 0]
    np.testing.assert_array_equal(retention, [0.0, -1.0, -np.inf, np.nan])


def _history(layer):
    layer = {"direct_share": None, "gate_share": {"z": 1.0}, **layer}
    records = [
        {"kind": "evaluation", "step": 0, "loss": None},
        {"kind": "flow", "step": 1, "layers": [layer], "clip_fraction": 0.0},
    ]
    return learning.history(records, loss_unit="nats", reach=lambda update: 3)


def test_a_rate_that_is_unknown_has_no_half_life():
    unknown = _history({"log_retention": [0.0, -1.0], "decay_rate": None, "half_life": None})
    assert np.isnan(unknown["half_life"]).all()
    without_decay = _history({"log_retention": [0.0, 1.0], "decay_rate": 1.0, "half_life": None})
    assert np.isposinf(without_decay["half_life"]).all()


def test_a_layer_without_any_gradient_has_no_curve():
    """Not one that is 0: JSON says None of both."""
    found = _history({"log_retention": [None, None, None], "decay_rate": None, "half_life": None})
    assert np.isnan(found["log_retention"]).all()
    assert np.isnan(found["horizon"]).all()
    assert learning.horizons(found) == "—"


def test_a_seed_is_the_same_alone_and_among_others(tiny, tmp_path):
    alone = train.run(dataclasses.replace(TINY, first_seed=1, seeds=1), tmp_path)
    np.testing.assert_array_equal(alone["loss"].sel(seed=1), tiny["loss"].sel(seed=1))
    np.testing.assert_array_equal(alone["log_retention"].sel(seed=1), tiny["log_retention"].sel(seed=1))


def test_provenance(tiny):
    assert json.loads(tiny.attrs["config"])["cell"] == "gru"
    assert tiny.attrs["command"].startswith("python -m experiments.train --cell gru --steps 12")
    assert tiny.attrs["baseline"] == pytest.approx(1 / 6)
    # W, U, three biases and the candidate's second one, read-out
    assert tiny.attrs["num_parameters"] == 15 * 2 + 15 * 5 + 4 * 5 + 5 + 1


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # the language models' test of this name shares all but the seeds
def test_an_interrupted_run_resumes_with_the_same_command(tiny, tmp_path, monkeypatch, capsys):
    original = rg.training.fit

    def interrupted(*args, on_progress, **options):
        def watch(progress):
            if progress.step == 30:
                raise KeyboardInterrupt
            on_progress(progress)

        return original(*args, on_progress=watch, **options)

    with monkeypatch.context() as patched:
        patched.setattr(rg.training, "fit", interrupted)
        with pytest.raises(SystemExit) as stopped:
            learning.execute(train.DRIVER, TINY, out=tmp_path, show=None)
        assert stopped.value.code == 130
        assert not (tmp_path / "train.nc").exists()
    learning.execute(train.DRIVER, TINY, out=tmp_path, show=None)
    assert "resumed after update 20, 20 more" in capsys.readouterr().out
    same_values(results.load(tmp_path / "train.nc", experiment="train"), tiny)


def test_a_finished_run_returns_at_once_and_goes_on_with_more_updates(tiny, folder):
    same_values(train.run(TINY, folder), tiny)
    longer = train.run(dataclasses.replace(TINY, updates=60), folder)
    assert longer["update"].values.tolist() == [0, 20, 40, 60]
    np.testing.assert_array_equal(longer["loss"].values[:, :3], tiny["loss"].values)
    # fewer would store a configuration that did not make the result
    with pytest.raises(command.UserError, match="the folder holds 60 updates, expected --updates of at least 60"):
        train.run(TINY, folder)


def test_the_host_waits_for_the_device_every_ten_updates_and_at_evaluations(tmp_path, monkeypatch):
    fetched, original = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(1) or original(tree))
    train.run(dataclasses.replace(TINY, seeds=1, eval_every=23, updates=46), tmp_path)
    # updates 10, 20, 23, 30, 40, 46, and the values of the evaluations at 0, 23, 46
    assert len(fetched) == 9


@pytest.mark.slow
def test_resume_after_kill_gives_the_undisturbed_result(tmp_path):
    words = [sys.executable, "-m", "experiments.train", "--smoke", "--updates", "400", "--seeds", "1", "--out"]
    environment = os.environ | {"MPLBACKEND": "agg"}
    run = lambda out: subprocess.run([*words, out], cwd=ROOT, env=environment, check=True, capture_output=True)
    run(tmp_path / "undisturbed")
    process = subprocess.Popen([*words, tmp_path / "killed"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "seed-0" / "checkpoints" / "40").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "train.nc").exists()
    run(tmp_path / "killed")
    same_values(*(results.load(tmp_path / name / "train.nc", experiment="train") for name in ("undisturbed", "killed")))


def test_until_solved_stops_there_and_stays_there(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SOLVED_MSE", 1e9)
    config = dataclasses.replace(TINY, until="solved", seeds=1)
    first = train.run(config, tmp_path)
    assert int(first["updates"][0]) == 0  # the first evaluation is the one before training
    same_values(train.run(config, tmp_path), first)
    assert "Solved by 1 of 1" in train.summary(first)


def test_another_configuration_is_refused_and_named(tiny, folder, capsys):
    before = (folder / "seed-0" / "log.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        learning.execute(train.DRIVER, dataclasses.replace(TINY, hidden_size=6), out=folder, show=None)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "hidden_size: expected 5, found 6" in error
    assert len(error.strip().splitlines()) == 1
    assert (folder / "seed-0" / "log.jsonl").read_bytes() == before


def test_a_new_seed_beside_a_result_of_other_settings_is_refused(tiny, tmp_path, capsys):
    """Its own folder is new, so no checkpoint says so; the result that it would write over does."""
    results.save(tiny, tmp_path / "train.nc")
    before = (tmp_path / "train.nc").read_bytes()
    other = dataclasses.replace(TINY, hidden_size=6, first_seed=7)
    with pytest.raises(SystemExit) as stopped:
        learning.execute(train.DRIVER, other, out=tmp_path, show=None)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "train.nc was made with another configuration: hidden_size: expected 5, found 6; choose" in error
    assert len(error.strip().splitlines()) == 1
    assert (tmp_path / "train.nc").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.nc"]
    allowed = dataclasses.replace(TINY, first_seed=7, seeds=1, updates=50, logs=())
    learning.check_result(tmp_path / "train.nc", "train", allowed, train.MAY_CHANGE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", "my notes\n", "expected records of a run, found something else"),
        ("log.jsonl", None, "log.jsonl is not writable"),
        ("tensorboard", "a file", "tensorboard is not writable"),
    ],
)
def test_a_folder_with_something_else_in_it(name, content, message, tmp_path, capsys):
    place = tmp_path / "seed-0" / name
    if content is None:
        place.mkdir(parents=True)
    else:
        place.parent.mkdir()
        place.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        learning.execute(train.DRIVER, dataclasses.replace(TINY, seeds=1), out=tmp_path, show=None)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert content is None or place.read_text() == content


def test_checkpoints_without_their_log_are_refused(tmp_path):
    config = dataclasses.replace(TINY, seeds=1, updates=20)
    train.run(config, tmp_path)
    (tmp_path / "seed-0" / "log.jsonl").unlink()
    with pytest.raises(command.UserError, match=r"log.jsonl: expected the records of the checkpoints beside it"):
        train.run(dataclasses.replace(config, updates=40), tmp_path)


# --- tasks and cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "outputs", "baseline"),
    [
        pytest.param("agreement", 2, np.log(2), marks=pytest.mark.slow),
        pytest.param("copy", 9, 10 * np.log(8) / 40, marks=pytest.mark.slow),
        pytest.param("temporal_order", 4, np.log(4), marks=pytest.mark.slow),
        pytest.param("digits", 10, np.log(10), marks=pytest.mark.slow),
    ],
)
def test_every_task_runs(task, outputs, baseline, tmp_path):
    config = dataclasses.replace(TINY, task=task, steps=20, seeds=1, updates=10)
    train_task, _ = train.build_task(config)
    assert train_task.output_size == outputs
    dataset = train.run(config, tmp_path)
    assert dataset.attrs["baseline"] == pytest.approx(baseline)
    assert 0 <= float(dataset["accuracy"].values[0, -1]) <= 1
    # before training a network knows nothing: within a factor 2 of the guess over all classes
    assert float(dataset["loss"].values[0, 0]) < 2 * np.log(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("cell", typing.get_args(learning.CellName))
def test_every_cell_runs(cell, tmp_path):
    dataset = train.run(dataclasses.replace(TINY, cell=cell, seeds=1, layers=2, updates=10), tmp_path)
    assert np.isfinite(dataset["loss"]).all()
    assert dataset.sizes["layer"] == 2


def test_one_hot_inputs_are_the_ids():
    config = dataclasses.replace(TINY, task="temporal_order", steps=20)
    task, _ = train.build_task(config)
    batch, ids = train.draw(task, jax.random.key(0), 3), task.batch(jax.random.key(0), 3).inputs
    np.testing.assert_array_equal(np.argmax(batch.inputs, axis=-1), ids)
    np.testing.assert_array_equal(batch.inputs.sum(axis=-1), 1)


def test_forget_bias_reaches_the_cell():
    for words, low, high in (("3", 3, 3), ("chrono:9", 0, np.log(8)), ("chrono", 0, np.log(11)), ("ugi", -9, 9)):
        cell = learning.build_cell("lstm", 2, 50, init="torch", bias=words, steps=12)
        b_f = np.asarray(cell.init(jax.random.key(0)).b[50:100])
        assert (b_f >= low - 1e-6).all()
        assert (b_f <= high + 1e-6).all()


def test_clipping_units():
    """25 in the sum over 100 steps is a quarter in the mean."""
    optimizer = learning.build_optimizer(
        "sgd", 1.0, clip=25.0, clip_unit="sum_over_steps", loss_unit="mean_per_token", num_steps=100
    )
    gradient = {"w": jax.numpy.array([3.0, 4.0])}
    update, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(update["w"], [-0.15, -0.2], rtol=1e-6)  # 0.25 · (3, 4) / 5


# --- presets, table, figure -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", train.PRESETS)
def test_presets_are_listed_with_the_flags_that_make_them(name):
    config, source = train.PRESETS[name]
    train.check(config)
    assert source
    listed = learning.preset_lines(train.PRESETS)
    words = command.flags(config)
    assert f"  {name}: {words}" in listed
    assert tyro.cli(train.Config, args=words.split(), default=train.Config()) == config


def test_preset_flags_and_smoke_combine():
    start = learning.start_config(train.DRIVER, train.Config(), ["--preset", "copy-100-chrono", "--smoke"])
    assert (start.task, start.forget_bias, start.hidden_size) == ("copy", "chrono:150", 8)
    assert learning.start_config(train.DRIVER, train.Config(), ["--preset=digits"]) == train.PRESETS["digits"].config


def test_table_and_summary_follow_the_data(tiny):
    assert "Not solved by any of 2" in train.summary(tiny)
    changed = tiny.copy(deep=True)
    changed["solved_update"][:] = [-1, 20]
    assert "Solved by 1 of 2 after 20 updates" in train.summary(changed)
    assert train.table(changed).row_count == 2


def test_figure_is_drawn_from_the_stored_result_alone(tiny, tmp_path, monkeypatch):
    results.save(tiny, tmp_path / "train.nc")
    stored = results.load(tmp_path / "train.nc", experiment="train")
    monkeypatch.setattr(learning, "rg", None)
    monkeypatch.setattr(learning, "jax", None)
    drawn = learning.figure(stored)
    heat = next(axes for axes in drawn.axes if axes.get_title() == "gradient that reaches back")
    shown = heat.collections[0].get_array()
    expected = stored["log_retention"].isel(layer=0).mean("seed").transpose("lag", "flow_update")
    # means in float64 of what is stored
    np.testing.assert_allclose(shown.reshape(expected.shape), expected, rtol=1e-6)


def test_figure_of_runs_of_unequal_length_and_dead_gradients(tiny):
    changed = tiny.copy(deep=True)
    changed["log_retention"][1, 3:] = np.nan
    changed["log_retention"][:, :, :, 9:] = -np.inf
    changed["clip_fraction"][1, 3:] = np.nan
    changed["horizon"][1, 2] = 9
    changed["horizon"][0, 4] = -1
    learning.figure(changed).canvas.draw()
    assert learning.horizons(changed.isel(seed=1)) == "9"
    assert learning.horizons(changed.isel(seed=0)) == "> 12"


def test_figure_without_a_look_of_the_monitor():
    records = [{"kind": "evaluation", "step": 0, "loss": 1.0}]
    dataset = learning.history(records, loss_unit="1", reach=lambda update: 1).expand_dims(seed=[0])
    dataset.attrs = {
        "baseline": 1.0,
        "baseline_name": "chance",
        "loss_scale": "log",
        "loss_label": "loss",
        "held_out": "held out",
        "title": "nothing",
    }
    learning.figure(dataset).canvas.draw()


def test_smoke_then_show(tmp_path, capsys):
    train.main(["--smoke", "--seeds", "1", "--out", str(tmp_path / "o")])
    out = capsys.readouterr().out
    assert "baseline" in out
    assert sorted(entry.name for entry in (tmp_path / "o").iterdir()) == ["seed-0", "train.nc", "train.png"]
    (tmp_path / "o" / "train.png").unlink()
    train.main(["--show", str(tmp_path / "o" / "train.nc")])
    assert (tmp_path / "o" / "train.png").exists()
    shown = capsys.readouterr().out
    assert out.split("wrote")[0].strip().splitlines()[-3:] == shown.split("wrote")[0].strip().splitlines()[-3:]


# --- user errors: one line, a code that is not 0 ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, found 0"),
        (["--task", "temporal_order", "--steps", "9"], "expected num_steps of at least 10, found 9"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--learning-rate", "nan"], "--learning-rate: expected a positive number, found nan"),
        (["--clip", "-1"], "--clip: expected a positive number, found -1"),
        (["--forget-bias", "open"], "--forget-bias: expected a number, chrono, chrono:T or ugi, found open"),
        (["--forget-bias", "chrono:inf"], "expected a number, chrono, chrono:T or ugi, found chrono:inf"),
        (["--first-seed", "-1"], "--first-seed: expected seeds of at least 0 and below 2**32, found -1 … 0"),
        (["--first-seed", "4294967295"], "below 2**32, found 4294967295 … 4294967296"),
        (["--first-seed", "9" * 30], "below 2**32, found 999"),
        (["--forget-bias", "chrono:1"], "chrono: expected max_lag of at least 2, found 1"),
        (["--cell", "vanilla", "--forget-bias", "1"], "vanilla has no forget gate; expected one of lstm, gru"),
        (["--preset", "addnig"], "--preset: expected one of adding-100, adding-750"),
        (["--show", "missing.nc"], "no result file missing.nc"),
        (["--out", "short.txt"], "output folder short.txt is not writable"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--smoke", *([] if "--out" in words else ["--out", "o"]), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.nc"))


def test_mistyped_cell_is_refused_with_the_choices(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--cell", "lsmt", "--out", str(tmp_path)])
    assert stopped.value.code not in (0, None)
    assert "peephole_lstm" in capsys.readouterr().err


def test_a_diverged_run_is_one_line_with_code_1(tmp_path, capsys):
    config = dataclasses.replace(
        TINY, cell="vanilla", init="gaussian", optimizer="sgd", learning_rate=1e30, clip=None, seeds=1
    )
    with pytest.raises(SystemExit) as stopped:
        learning.execute(train.DRIVER, config, out=tmp_path, show=None)
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert len(error.strip().splitlines()) == 1
    assert "update" in error
    assert "checkpoint" in error


def test_agreement_is_measured_distance_by_distance(tmp_path, monkeypatch):
    """A network that always says "was" is right for half of the verbs at every distance; one that knows, for all."""
    config = dataclasses.replace(train.smoke(train.Config(task="agreement")), steps=20)
    assert {0.25, 2.0} < {*train.DISTANCES}
    monkeypatch.setattr(train, "DISTANCES", (0.25, 0.5, 2.0))  # each compiles anew; no sentence is shorter than 10
    problem = train.build_problem(train._shared(config))
    params = problem.model.init(jax.random.key(0))
    says_was = params._replace(
        readout=params.readout._replace(w=jnp.zeros_like(params.readout.w), b=jnp.array([1.0, 0.0]))
    )
    many = dataclasses.replace(config, eval_sequences=2000)
    accuracy = train.accuracy_by_distance(many, problem, says_was, jax.random.key(1))
    assert accuracy["distance"].values.tolist() == [10, 40]
    # four standard errors of 2,000 draws
    np.testing.assert_allclose(accuracy, 0.5, atol=4 * 0.5 / np.sqrt(2000))
    assert accuracy.values.std() > 0  # drawn anew for every distance
    dataset = train.run(dataclasses.replace(config, updates=20, seeds=1), tmp_path)
    assert dataset["accuracy_by_distance"].shape == (1, 2)
    assert 0 <= float(dataset["accuracy"].values[0, -1]) <= 1
    assert "(trained up to 20)" in train.summary(dataset)
