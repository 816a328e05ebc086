"""The training loop: its step against a plain one, memory between windows, bit-identical resume, stops, reports."""

from __future__ import annotations

import functools
import json
import math
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rnngrad as rg
from rnngrad import cells, losses, remedies, training
from rnngrad.training.model import _drop

T, B, D, N, K = 6, 3, 2, 4, 3


class Batch(NamedTuple):
    inputs: jax.Array
    targets: jax.Array
    mask: jax.Array


def _batch(seed, dtype="float32", num_steps=T, batch_size=B):
    key_inputs, key_targets, key_mask = jax.random.split(jax.random.key(seed), 3)
    return Batch(
        jax.random.normal(key_inputs, (num_steps, batch_size, D), dtype),
        jax.random.normal(key_targets, (num_steps, batch_size, K), dtype),
        jax.random.bernoulli(key_mask, 0.7, (num_steps, batch_size)).astype(dtype).at[-1].set(1),
    )


def _loss(output, batch):
    return losses.mse(output.outputs, batch.targets, batch.mask)


# One model and optimizer for the module: whatever is compiled for them serves every test.
MODEL = training.model([cells.lstm(D, N), cells.gru(N, N + 1)], K)
OPTIMIZER = optax.chain(remedies.clip_by_global_norm(0.8), optax.adam(0.02))
APPLY = jax.jit(MODEL.apply)


@functools.cache
def _held_out():
    return training.evaluator(MODEL, _loss, [_batch(1000)])


def _start(model=MODEL, optimizer=OPTIMIZER, batch_size=B):
    return training.initial_state(model, optimizer, jax.random.key(0), batch_size)


def _fit(folder=None, *, num_steps=14, batch_at=_batch, config=(), **options):
    """A run whose intervals share no factor, with records and, given a folder, checkpoints."""
    if folder is not None:
        options |= {
            "logs": [training.jsonl_log(folder / "records.jsonl")],
            "checkpoints": training.Checkpoints(folder / "checkpoints", dict(config)),
        }
    options = {"evaluate": _held_out(), "eval_every": 5, "log_every": 4, "checkpoint_every": 3} | options
    return training.fit(MODEL, _loss, OPTIMIZER, _start(), batch_at, num_steps=num_steps, **options)


def _equal(a, b):
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        # the norm before the first clipping is NaN
        return np.array_equal(x, y, equal_nan=True)

    return jax.tree.all(jax.tree.map(same, a, b))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    fitted = _fit(folder, monitor=training.Monitor(every=6))
    return fitted, training.read_jsonl(folder / "records.jsonl")


# --- the model -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def _plain_outputs(model, params, state, inputs):
    """Step by step, cell by cell, with nothing but `step` and `read`."""
    outputs, state = [], list(state)
    for x in inputs:
        for index, cell in enumerate(model.layers):
            state[index], _ = cell.step(params.layers[index], state[index], x)
            x = cell.read(params.layers[index], state[index])
        outputs.append(x @ params.readout.w.T + jnp.broadcast_to(params.readout.b, (*x.shape[:-1], K)))
    return jnp.stack(outputs), tuple(state)


@pytest.mark.slow  # the step's test compares the same outputs, through their loss
def test_model_equals_a_loop_over_steps_and_layers(x64):
    model = training.model([cells.lstm(D, N, dtype="float64"), cells.gru(N, N + 1, dtype="float64")], K)
    params, batch = model.init(jax.random.key(1)), _batch(2, "float64")
    output = jax.jit(model.apply)(params, model.init_state((B,)), batch.inputs)
    outputs, final = _plain_outputs(model, params, model.init_state((B,)), batch.inputs)
    # the same sums in another order
    np.testing.assert_allclose(output.outputs, outputs, rtol=0, atol=1e-14)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-14), output.final, final)


@pytest.mark.slow
def test_layers_equal_a_stack():
    layers = [cells.lstm(D, N), cells.gru(N, N + 1)]
    stacked = cells.stack(*layers)
    params, batch = MODEL.init(jax.random.key(1)), _batch(2)
    of_stack = type(stacked.init_state())
    trajectory = jax.jit(rg.unroll, static_argnums=0)(
        stacked, of_stack(*params.layers), of_stack(*MODEL.init_state((B,))), batch.inputs
    )
    output = APPLY(params, MODEL.init_state((B,)), batch.inputs)
    # float32: T steps of a few roundings each
    np.testing.assert_allclose(output.final[1].h, trajectory.final.layer_1.h, rtol=0, atol=1e-6)


def test_ids_are_embedded():
    model = training.model([cells.vanilla(D, N)], K, vocabulary_size=5)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (T, B), 0, 5)
    plain = training.model(model.layers, K)
    by_vectors = plain.apply(params._replace(embedding=None), plain.init_state((B,)), params.embedding[ids])
    assert params.embedding.shape == (5, D)
    assert _equal(model.apply(params, model.init_state((B,)), ids).outputs, by_vectors.outputs)


@pytest.mark.parametrize("wrong", [5, -1])
def test_an_id_outside_the_vocabulary_is_not_another_word(wrong):
    model = training.model([cells.vanilla(D, N)], K, vocabulary_size=5)
    ids = jnp.zeros((T, 2), jnp.int32).at[3, 1].set(wrong)
    outputs = model.apply(model.init(jax.random.key(0)), model.init_state((2,)), ids).outputs
    assert np.isfinite(outputs[:, 0]).all()
    assert np.isfinite(outputs[:3, 1]).all()
    assert np.isnan(outputs[3:, 1]).all()


def test_dropout_is_off_without_a_key_and_never_on_the_recurrence():
    identity = cells.vanilla(D, D, activation="identity")
    model = training.model([identity], D, dropout=0.25)
    eye = jnp.eye(D)
    params = model.init(jax.random.key(0))
    params = params._replace(layers=(params.layers[0]._replace(w_ih=eye, w_hh=eye, b=jnp.zeros(D)),))
    ones = jnp.ones((200, B, D))
    state = model.init_state((B,))
    assert np.array_equal(model.apply(params, state, ones).trajectories[0].states.h[-1], np.full((B, D), 200.0))

    h = np.asarray(model.apply(params, state, ones, key=jax.random.key(1)).trajectories[0].states.h)
    steps = np.diff(h, axis=0, prepend=0)
    # every entry adds 0 or 1/(1 − p), whatever was dropped before; sums of 200 in float32 round to some 1e-5
    assert (np.isclose(steps, 0, atol=1e-3) | np.isclose(steps, 4 / 3, atol=1e-3)).all()
    # mean 1 with standard error √(p/(1 − p)/1200) = 0.017; four of them
    assert abs(steps.mean() - 1) < 0.067


def test_dropout_scales_what_it_keeps():
    dropped = np.asarray(_drop(jax.random.key(0), jnp.full((1000,), 3.0), 0.5))
    assert set(np.unique(dropped)) == {0.0, 6.0}


def test_uniform_draws_every_weight():
    model = training.model([cells.lstm(D, 50), cells.lstm(50, 50)], K, vocabulary_size=400, uniform=0.1)
    for leaf in jax.tree.leaves(model.init(jax.random.key(0))):
        assert np.abs(leaf).max() <= 0.1
        if leaf.size > 500:
            # U(±a) has deviation a/√3, its estimate from n ≥ 500 draws a relative error below 4·√(0.2/n) = 0.08
            np.testing.assert_allclose(np.std(leaf), 0.1 / math.sqrt(3), rtol=0.08)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], K), {}, "at least one cell"),
        (([cells.lstm(D, N), cells.lstm(N + 1, N)], K), {}, "expects input_size 5"),
        (([cells.lstm(D, N)], 0), {}, "output_size: expected at least 1, found 0"),
        (([cells.lstm(D, N)], K), {"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), found 1.0"),
        (([cells.lstm(D, N)], K), {"vocabulary_size": 0}, "vocabulary_size: expected at least 1, found 0"),
        (([rg.map_cell(jnp.tanh)], K), {}, "cells that declare their input size"),
        (([cells.lstm(D, N)], K), {"uniform": -1}, "uniform: expected a positive number"),
    ],
)
def test_models_that_make_no_sense(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        training.model(*arguments, **options)


def test_inputs_of_the_wrong_kind():
    model = training.model([cells.vanilla(D, N)], K, vocabulary_size=5)
    with pytest.raises(ValueError, match=r"expected integer ids, found float32\[6, 3\]"):
        model.apply(model.init(jax.random.key(0)), model.init_state((B,)), jnp.ones((T, B)))


# --- the step --------------------------------------------------------------------------------------------------------


def test_step_equals_a_plain_loop(x64):
    """Five steps of SGD with momentum against the loop above, its gradient by autodiff, and the update by hand."""
    model = training.model([cells.lstm(D, N, dtype="float64"), cells.gru(N, N + 1, dtype="float64")], K)
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = training.train_step(model, _loss, optimizer)
    state = training.initial_state(model, optimizer, jax.random.key(0), B)
    params = jax.tree.map(jnp.copy, state.params)
    trace = jax.tree.map(jnp.zeros_like, params)

    def plain_loss(params, batch):
        outputs, _ = _plain_outputs(model, params, model.init_state((B,)), batch.inputs)
        squares = jnp.mean((outputs - batch.targets) ** 2, axis=-1)
        return jnp.sum(squares * batch.mask) / jnp.sum(batch.mask)

    gradient = jax.jit(jax.value_and_grad(plain_loss))
    for seed in range(5):
        batch = _batch(seed, "float64")
        value, grads = gradient(params, batch)
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, grads)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, params, trace)
        state, metrics = step(state, batch, jnp.array(True))
        norm = math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(grads)))
        # float64: five updates, each of sums of some hundred terms
        np.testing.assert_allclose([metrics.loss, metrics.grad_norm], [value, norm], rtol=1e-12)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-13), state.params, params)
    assert int(state.step) == 5


def test_complex_weights_go_downhill():
    model = training.model([cells.lru(D, N)], K)
    optimizer = optax.sgd(0.05)
    step = training.train_step(model, _loss, optimizer)
    state, batch = training.initial_state(model, optimizer, jax.random.key(0), B), _batch(0)
    values = []
    for _ in range(20):
        state, metrics = step(state, batch, jnp.array(True))
        values.append(float(metrics.loss))
    assert (np.diff(values) < 0).all()


def test_memory_goes_from_window_to_window():
    """With a learning rate of 0, windows with carried memory are one long forward pass."""
    optimizer = optax.sgd(0.0)
    step = training.train_step(MODEL, _loss, optimizer)
    long = _batch(3, num_steps=4 * T)._replace(mask=jnp.ones((4 * T, B)))
    state = training.initial_state(MODEL, optimizer, jax.random.key(0), B)
    whole = APPLY(state.params, MODEL.init_state((B,)), long.inputs)
    expected = _loss(whole, long)
    found = []
    for window in range(4):
        part = jax.tree.map(lambda leaf, at=window * T: leaf[at : at + T], long)
        state, metrics = step(state, part, jnp.array(window == 0))
        found.append(float(metrics.loss))
    # float32, the same operations step by step; the mean over windows is summed in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), state.memory, whole.final)
    np.testing.assert_allclose(np.mean(found), expected, rtol=1e-6)

    fresh, _ = step(jax.tree.map(jnp.copy, state), part, jnp.array(True))
    alone = APPLY(state.params, MODEL.init_state((B,)), part.inputs).final
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), fresh.memory, alone)


def test_penalty_is_added_and_not_reported():
    def penalty(params, state, batch):
        return 0.5 * sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))

    optimizer = optax.sgd(0.1)
    batch, on = _batch(0), jnp.array(True)
    plain, metrics = training.train_step(MODEL, _loss, optimizer)(_start(optimizer=optimizer), batch, on)
    decayed, reported = training.train_step(MODEL, _loss, optimizer, penalty=penalty)(
        _start(optimizer=optimizer), batch, on
    )
    assert float(metrics.loss) == float(reported.loss)
    # the gradient of half the squared weights is the weights: one step takes a tenth of them more
    expected = jax.tree.map(lambda p, start: p - 0.1 * start, plain.params, _start().params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), decayed.params, expected)


@pytest.mark.slow  # the records' clip fractions are compared with the norms below
def test_clipping_is_reported():
    optimizer = optax.chain(remedies.clip_by_global_norm(1e-3), optax.sgd(0.1))
    _, metrics = training.train_step(MODEL, _loss, optimizer)(_start(optimizer=optimizer), _batch(0), jnp.array(True))
    assert bool(metrics.clipped)
    assert float(metrics.grad_norm) > 1e-3
    loose = optax.chain(remedies.clip_by_global_norm(1e3), optax.sgd(0.1))
    _, metrics = training.train_step(MODEL, _loss, loose)(_start(optimizer=loose), _batch(0), jnp.array(True))
    assert not bool(metrics.clipped)


def test_one_compile_for_all_steps():
    step = training.train_step(MODEL, _loss, OPTIMIZER)
    assert step is training.train_step(MODEL, _loss, OPTIMIZER)
    state = _start()
    for seed in range(3):
        state, _ = step(state, _batch(seed), jnp.array(seed == 0))
    assert step._cache_size() == 1


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_a_mean_over_batches_and_carries_memory_on_request():
    params = MODEL.init(jax.random.key(0))
    long = _batch(3, num_steps=3 * T)._replace(mask=jnp.ones((3 * T, B)))
    windows = [jax.tree.map(lambda leaf, at=at: leaf[at : at + T], long) for at in (0, T, 2 * T)]
    apart = training.evaluator(MODEL, _loss, windows, metrics={"last": lambda output, batch: output.outputs[-1, 0, 0]})
    found = apart(params)
    each = [APPLY(params, MODEL.init_state((B,)), window.inputs) for window in windows]
    # float32 sums in another order
    np.testing.assert_allclose(
        found["loss"], np.mean([_loss(o, w) for o, w in zip(each, windows, strict=True)]), rtol=1e-6
    )
    np.testing.assert_allclose(found["last"], np.mean([float(o.outputs[-1, 0, 0]) for o in each]), rtol=1e-5)
    carried = training.evaluator(MODEL, _loss, windows, carry_memory=True)(params)
    whole = _loss(APPLY(params, MODEL.init_state((B,)), long.inputs), long)
    np.testing.assert_allclose(carried["loss"], whole, rtol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        training.evaluator(MODEL, _loss, [])


# --- fit -------------------------------------------------------------------------------------------------------------


def test_fit_makes_the_steps_and_leaves_its_argument_alone(undisturbed):
    start = _start()
    fitted = training.fit(MODEL, _loss, OPTIMIZER, start, _batch, num_steps=14)
    step, state, norms, values = training.train_step(MODEL, _loss, OPTIMIZER), _start(), [], []
    for seed in range(14):
        state, metrics = step(state, _batch(seed), jnp.array(True))
        norms.append(float(metrics.grad_norm))
        values.append(float(metrics.loss))
    assert _equal(fitted.state, state)
    assert _equal(start, _start())
    assert _equal(fitted.best_params, state.params)
    assert (fitted.reason, fitted.resumed_from, fitted.best_step) == ("done", None, 14)
    # monitor, logs, evaluation and checkpoints change nothing
    assert _equal(undisturbed[0].state, state)

    _, records = undisturbed
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == [4, 8, 12]
    assert [record["loss"] for record in train] == [sum(values[at : at + 4]) / 4 for at in (0, 4, 8)]
    assert [record["max_grad_norm"] for record in train] == [max(norms[at : at + 4]) for at in (0, 4, 8)]
    assert [record["clip_fraction"] for record in train] == [
        np.mean(np.array(norms[at : at + 4]) > 0.8) for at in (0, 4, 8)
    ]
    assert any(0 < record["clip_fraction"] for record in train)  # else this would test nothing


def test_records_and_evaluations(undisturbed):
    fitted, records = undisturbed
    assert [(record["kind"], record["step"]) for record in records] == [
        ("evaluation", 0),
        ("flow", 1),
        ("train", 4),
        ("evaluation", 5),
        ("flow", 6),
        ("train", 8),
        ("evaluation", 10),
        ("flow", 12),
        ("train", 12),
        ("evaluation", 14),
    ]
    assert fitted.evaluations == [record for record in records if record["kind"] == "evaluation"]
    best = min(fitted.evaluations, key=lambda record: record["loss"])
    assert (fitted.best_loss, fitted.best_step) == (best["loss"], best["step"])
    assert _held_out()(fitted.best_params)["loss"] == best["loss"]
    flow = records[1]
    assert len(flow["layers"]) == 2
    assert len(flow["layers"][0]["log_retention"]) == T + 1
    assert set(flow["layers"][0]["gate_share"]) == {"i", "f", "g", "o"}


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("killed_at", [0, 1, 3, 4, 7, 13])
def test_resume_is_bit_identical(killed_at, tmp_path, undisturbed):
    def dies(step):
        if step == killed_at:
            raise KilledError
        return _batch(step)

    monitor = training.Monitor(every=6)
    with pytest.raises(KilledError):
        _fit(tmp_path, batch_at=dies, monitor=monitor)
    fitted = _fit(tmp_path, monitor=monitor)
    assert fitted.resumed_from == (killed_at // 3 * 3 or None)
    expected, records = undisturbed
    assert _equal(fitted.state, expected.state)
    assert _equal(fitted.best_params, expected.best_params)
    without = {"state": 0, "best_params": 0, "resumed_from": None, "seconds": 0}
    assert fitted._replace(**without) == expected._replace(**without)
    assert training.read_jsonl(tmp_path / "records.jsonl") == records


def test_stop_on_request_and_resume(tmp_path, undisturbed):
    seen = []

    def stop(progress):
        seen.append(progress.step)
        return progress.step == 8

    monitor = training.Monitor(every=6)
    first = _fit(tmp_path, should_stop=stop, monitor=monitor)
    assert (first.reason, int(first.state.step), seen) == ("asked to stop", 8, [0, 4, 5, 8])
    second = _fit(tmp_path, monitor=monitor)
    assert second.resumed_from == 8
    assert _equal(second.state, undisturbed[0].state)
    assert training.read_jsonl(tmp_path / "records.jsonl") == undisturbed[1]
    # a finished run returns at once
    third = _fit(tmp_path, monitor=monitor, batch_at=lambda step: pytest.fail("nothing is left to do"))
    assert third.reason == "done"
    assert _equal(third.state, second.state)
    assert training.read_jsonl(tmp_path / "records.jsonl") == undisturbed[1]


def test_a_stop_on_an_evaluation_comes_right_behind_it():
    fitted = _fit(should_stop=lambda progress: progress.evaluation["step"] == 5)
    assert (fitted.reason, int(fitted.state.step), fitted.evaluations[-1]["step"]) == ("asked to stop", 5, 5)


def test_seconds_are_those_of_what_is_kept(tmp_path, monkeypatch):
    """By a clock on which a batch takes one second: a killed sitting counts up to its last checkpoint."""
    now = [100.0]
    monkeypatch.setattr(training.loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def lasts(step):
        now[0] += 1
        return _batch(step)

    def dies(step):
        if step == 8:
            raise KilledError
        return lasts(step)

    assert _fit(batch_at=lasts, num_steps=5).seconds == 5
    with pytest.raises(KilledError):
        _fit(tmp_path, batch_at=dies)
    now[0] += 1000  # between the sittings
    fitted = _fit(tmp_path, batch_at=lasts)
    assert (fitted.resumed_from, fitted.seconds) == (6, 14)
    now[0] += 1000
    assert _fit(tmp_path, batch_at=lasts).seconds == 14


def test_progress_is_shown():
    seen = []
    _fit(on_progress=seen.append, checkpoints=None)
    assert [progress.step for progress in seen] == [0, 4, 5, 8, 10, 12, 14]
    assert seen[0].record is None
    assert seen[0].evaluation["step"] == 0
    assert seen[1].record["step"] == 4
    assert seen[-1].evaluation["step"] == 14
    assert all(progress.num_steps == 14 for progress in seen)


def test_early_stop_keeps_the_best(tmp_path):
    scripted = iter([5.0, 3.0, 2.0, 2.5, math.nan, 1.0])
    kept = {}

    def evaluate(params):
        value = next(scripted)
        kept[value] = jax.tree.map(np.asarray, params)
        return {"loss": value}

    options = {"evaluate": evaluate, "eval_every": 2, "patience": 2, "num_steps": 100}
    fitted = _fit(tmp_path, **options)
    assert (fitted.reason, fitted.best_loss, fitted.best_step) == ("early stop", 2.0, 4)
    assert int(fitted.state.step) == 8
    assert _equal(fitted.best_params, kept[2.0])
    again = _fit(tmp_path, **options)
    assert (again.reason, again.best_loss, again.resumed_from) == ("early stop", 2.0, 8)
    assert _equal(again.best_params, kept[2.0])


def test_memory_of_text_survives_a_resume(tmp_path):
    options = {"restart_at": lambda step: step % 8 == 0, "num_steps": 14}
    expected = _fit(**options)

    def dies(step):
        if step == 11:
            raise KilledError
        return _batch(step)

    with pytest.raises(KilledError):
        _fit(tmp_path, batch_at=dies, **options)
    assert _equal(_fit(tmp_path, **options).state, expected.state)
    assert not _equal(_fit().state.params, expected.state.params)  # the memory matters here


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, "log_every: expected at least 1, found 0"),
        ({"eval_every": 0}, "eval_every: expected at least 1, found 0"),
        ({"checkpoint_every": -1}, "checkpoint_every: expected at least 1, found -1"),
        ({"monitor": training.Monitor(every=0)}, "monitor.every: expected at least 1, found 0"),
        ({"num_steps": -1}, "num_steps: expected at least 0, found -1"),
        ({"patience": 0}, "patience: expected at least 1, found 0"),
        ({"patience": 1, "evaluate": None}, "patience: expected an evaluate function"),
        ({"evaluate": lambda params: {"accuracy": 1.0}}, r"expected a mapping with 'loss', found \['accuracy'\]"),
        ({"batch_at": functools.partial(_batch, batch_size=B + 1)}, r"expected float32\[4, 4\], found float32\[3, 4\]"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(**options)


def test_no_steps():
    fitted = _fit(num_steps=0)
    assert (fitted.reason, fitted.best_step, len(fitted.evaluations)) == ("done", 0, 1)


# --- numbers that are not finite -------------------------------------------------------------------------------------


def test_nan_in_an_input_is_reported_with_step_and_time_step(tmp_path, undisturbed):
    def planted(step):
        batch = _batch(step)
        return batch._replace(inputs=batch.inputs.at[2, 1, 0].set(jnp.nan)) if step == 9 else batch

    with pytest.raises(training.NonFiniteLossError) as caught:
        _fit(tmp_path, batch_at=planted, log_every=6, checkpoint_every=4)  # it is fetched some steps later
    error = caught.value
    assert (error.step, error.first_nonfinite_time) == (10, 2)
    assert math.isnan(error.loss)
    assert Path(error.checkpoint) == (tmp_path / "checkpoints" / "8").resolve()
    assert "update 10: loss nan" in str(error)
    assert "from time step 2 on" in str(error)
    assert error.checkpoint in str(error)
    # nothing was harmed: with the data repaired the run goes on to where it would have come
    fitted = _fit(tmp_path)
    assert fitted.resumed_from == 8
    assert _equal(fitted.state, undisturbed[0].state)


def test_nan_in_a_target_names_the_time_step_where_the_gradient_breaks():
    def planted(step):
        batch = _batch(step)._replace(mask=jnp.ones((T, B)))
        return batch._replace(targets=batch.targets.at[3, 0, 0].set(jnp.nan)) if step == 5 else batch

    with pytest.raises(training.NonFiniteLossError, match="all states and outputs are finite") as caught:
        _fit(batch_at=planted)
    error = caught.value
    assert (error.step, error.first_nonfinite_time, error.largest_gradient_time, error.checkpoint) == (6, None, 3, None)
    assert np.isfinite(error.log_gradient_norms[4:]).all()
    assert np.isnan(error.log_gradient_norms[:4]).all()


def test_an_overflowing_loss_names_the_largest_finite_gradient():
    """Targets of 1e20 at one step: the squares overflow, the gradient of every state is finite."""

    def planted(step):
        batch = _batch(step)._replace(mask=jnp.ones((T, B)))
        return batch._replace(targets=batch.targets.at[4].set(1e20)) if step == 2 else batch

    with pytest.raises(training.NonFiniteLossError, match="loss inf") as caught:
        _fit(batch_at=planted)
    error = caught.value
    assert (error.step, error.first_nonfinite_time) == (3, None)
    assert error.largest_gradient_time == 4
    assert np.isfinite(error.log_gradient_norms).all()


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    """Loss and gradient are finite, the learning rate is not."""
    model, optimizer = training.model([cells.vanilla(D, N)], K), optax.sgd(math.inf)
    start = _start(model, optimizer)
    checkpoints = training.Checkpoints(tmp_path, {})
    with pytest.raises(
        training.NonFiniteLossError, match="but the penalty or the new weights are not finite"
    ) as caught:
        training.fit(model, _loss, optimizer, start, _batch, num_steps=1, checkpoints=checkpoints, checkpoint_every=1)
    assert caught.value.step == 1
    assert math.isfinite(caught.value.loss)
    assert math.isfinite(caught.value.grad_norm)
    assert checkpoints.steps() == []


def test_a_failed_step_changes_nothing():
    step = training.train_step(MODEL, _loss, OPTIMIZER)
    state, _ = step(_start(), _batch(0), jnp.array(True))
    kept = jax.tree.map(jnp.copy, state)
    bad = _batch(1)._replace(inputs=jnp.full((T, B, D), jnp.inf))
    state, metrics = step(state, bad, jnp.array(True))
    assert not bool(metrics.is_finite)
    state, _ = step(state, _batch(2), jnp.array(True))  # sent before anybody looked
    assert _equal(state, kept._replace(failed=jnp.array(True)))


# --- kill -9 ---------------------------------------------------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
import jax, optax
import rnngrad as rg
from rnngrad import losses, training
jax.config.update("jax_platforms", "cpu")
folder = Path(sys.argv[1])
task = rg.tasks.adding(12)
net = training.model([rg.cells.lstm(2, 6)], 1)
optimizer = optax.adam(1e-2)
loss = lambda output, batch: losses.mse(output.outputs, batch.targets, batch.mask)
batch_at = jax.jit(lambda step: task.batch(jax.random.fold_in(jax.random.key(3), step), 4))
fitted = training.fit(
    net, loss, optimizer, training.initial_state(net, optimizer, jax.random.key(0), 4), batch_at,
    num_steps=120, eval_every=7, log_every=4, evaluate=training.evaluator(net, loss, [batch_at(10**6)]),
    logs=[training.jsonl_log(folder / "records.jsonl")], monitor=training.Monitor(every=9),
    checkpoints=training.Checkpoints(folder / "checkpoints", {}), checkpoint_every=2,
)
digest = [float(abs(leaf).sum()) for leaf in jax.tree.leaves((fitted.state.params, fitted.state.opt_state))]
(folder / "result").write_text(repr((fitted.best_loss, fitted.best_step, digest)))
"""


@pytest.mark.slow
def test_resume_after_kill_9(tmp_path):
    """Processes killed at random moments, some of them while a checkpoint is being written, end in the same bits."""

    def start(folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(folder)], stderr=subprocess.PIPE, text=True)

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    done = start(undisturbed)
    _, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors

    random, kills = np.random.default_rng(0), 0
    records = disturbed / "records.jsonl"
    for _ in range(40):
        process = start(disturbed)
        seen = records.stat().st_size if records.exists() else 0
        # wait until it writes something new, then a moment more
        while process.poll() is None and (not records.exists() or records.stat().st_size <= seen):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.6))
        if process.poll() is not None:
            break
        if kills == 5:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert kills >= 2
    assert (disturbed / "result").read_text() == (undisturbed / "result").read_text()
    lines = (disturbed / "records.jsonl").read_text().splitlines()
    assert lines == (undisturbed / "records.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] <= 120 for line in lines)
