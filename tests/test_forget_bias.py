"""Forget bias and start of the memory: gradients by NumPy, training by a plain loop, verdicts that follow the data."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import rnngrad as rg
from experiments import command, forget_bias
from experiments.claims import word_of

TINY = dataclasses.replace(
    forget_bias.SMOKE,
    forget_biases=("0", "1", "3"),
    tasks=("adding", "order"),
    adding_steps=6,
    hidden_size=4,
    updates=10,
    eval_every=5,
    eval_sequences=7,
    batch_size=3,
    fresh_seeds=2,
)
ROWS = ["b_f = 0", "b_f = 1", "b_f = 3", "b_f = 1, c_0 = 0.1"]


@pytest.fixture(scope="module")
def tiny():
    return forget_bias.run(TINY)


def test_rows_dimensions_and_units(tiny):
    assert tiny["row"].values.tolist() == ROWS
    assert tiny["loss"].dims == ("task", "row", "seed", "evaluation")
    assert tiny["log_retention"].shape == (3, 2, 2, 7)
    assert tiny["log_retention_end"].shape == (3, 2, 2, 2)
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)


def by_hand(params, xs, c, h):
    """An LSTM written out; returns the last memory and the forget gates."""
    gates = []
    for x in xs:
        i, f, g, o = jnp.split(params.w_ih @ x + params.w_hh @ h + params.b, 4)
        f = jax.nn.sigmoid(f)
        c = f * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        gates.append(f)
    return c, jnp.stack(gates)


@pytest.mark.parametrize(("memory", "index"), [(0.0, 0), (0.1, 1)])
def test_gradient_over_all_steps_by_hand(tiny, memory, index):
    """Seed 1, b_f = 3: ∂c_T/∂c_0 by forward derivatives of the loop, with h_0 = o tanh c held; ∏f by NumPy."""
    key_params, key_xs = jax.random.split(jax.random.key(1))
    params = rg.cells.lstm(2, 4, forget_bias=3.0).init(key_params)
    xs = rg.tasks.adding(6).batch(key_xs, 1).inputs[:, 0]
    start, zero = jnp.full((4,), memory), jnp.zeros(4)
    jacobian, gates = jax.jacfwd(lambda c: by_hand(params, xs, c, zero), has_aux=True)(start)
    found = tiny["log_retention_end"].sel(forget_bias="3", memory=memory).isel(fresh_seed=1)
    np.testing.assert_allclose(found.sel(path="full"), np.log(np.linalg.norm(jacobian) / 2), rtol=1e-4)
    np.testing.assert_allclose(found.sel(path="direct"), np.log(np.linalg.norm(np.prod(gates, axis=0)) / 2), rtol=1e-4)
    if index == 0:
        curve = tiny["log_retention"].sel(forget_bias="3").isel(fresh_seed=1)
        np.testing.assert_array_equal(curve.isel(lag=-1), found)
        np.testing.assert_array_equal(curve.isel(lag=0), 0)


def test_forget_gates_open_as_the_bias_says(tiny):
    """Without weights f = σ(b_f); with small ones the direct path stays near σ(b_f)^T."""
    rising = tiny["log_retention_end_median"].sel(path="direct", memory=0.0).values
    assert np.all(np.diff(rising) > 0)
    np.testing.assert_allclose(rising, 6 * np.log(scipy.special.expit([0.0, 1.0, 3.0])), atol=1.5)


def test_training_by_a_plain_loop(tiny):
    """Seed 1, c_0 = 0.1 and b_f = 1, adding: Adam by hand on the cell that has c_0 as an option."""
    key_params, key_trial = jax.random.split(jax.random.key(1))
    _, key_batches, key_measure = jax.random.split(key_trial, 3)
    task = rg.tasks.adding(6)
    cell = rg.cells.lstm(2, 4, forget_bias=1.0, initial_memory=0.1)
    net = rg.training.model([cell], 1)
    params = net.init(key_params)

    @jax.jit
    def loss(params, batch):
        states = rg.unroll(cell, params.layers[0], cell.init_state(batch.mask.shape[1:]), batch.inputs).states
        answers = states.h[-1] @ params.readout.w[0] + params.readout.b[0]
        return jnp.mean((answers - batch.targets[-1, :, 0]) ** 2)

    gradient = jax.jit(jax.grad(loss))
    optimizer = optax.adam(TINY.learning_rate)
    state = optimizer.init(params)
    held_out = task.batch(key_measure, 7)
    losses = [loss(params, held_out)]
    for step in range(10):
        grads = gradient(params, task.batch(jax.random.fold_in(key_batches, step), 3))
        norm = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads))))
        scale = min(1.0, 1.0 / norm)
        grads = jax.tree.map(functools.partial(jnp.multiply, scale), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by counts
            updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        if step in (4, 9):
            losses.append(loss(params, held_out))
    found = tiny["loss"].sel(task="adding", row=ROWS[3], seed=1)
    # float32; ten updates of Adam divide round-off by small second moments
    np.testing.assert_allclose(found, losses, rtol=1e-3)
    assert not np.array_equal(found, tiny["loss"].sel(task="adding", row=ROWS[1], seed=1))


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = forget_bias.run(dataclasses.replace(TINY, tasks=("adding",), first_seed=1, seeds=1, fresh_seeds=1))
    np.testing.assert_array_equal(alone["loss"].isel(seed=0), tiny["loss"].sel(task=["adding"]).isel(seed=1))
    np.testing.assert_array_equal(
        alone["log_retention_end"].isel(fresh_seed=0), tiny["log_retention_end"].isel(fresh_seed=1)
    )


def words(dataset):
    checks = forget_bias.verdict(dataset)
    return {id: word_of([check for check in checks if check.claim == id]) for id in ("D2", "D3")}


def test_verdict_follows_the_data(tiny):
    # nothing is solved by ten updates: about learning this run cannot tell
    learning = [check for check in forget_bias.verdict(tiny) if "learns faster" in check.name]
    assert len(learning) == 4
    assert all(check.holds is None for check in learning)
    assert words(tiny) == {"D2": "not decided", "D3": "does not hold"}
    assert "no setting solves adding, T = 6 within 10 updates" in forget_bias.summary(tiny)["D2"]

    changed = tiny.copy(deep=True)
    solved_at = changed["solved_at"]
    solved_at.loc[{"row": "b_f = 1"}] = 5.0
    solved_at.loc[{"row": "b_f = 3"}] = 10.0
    assert words(changed)["D2"] == "holds"
    assert "b_f = 1 solves 2 of 2 and b_f = 0 0 of 2" in forget_bias.summary(changed)["D2"]
    solved_at.loc[{"row": "b_f = 3", "task": "order"}] = 1.0
    assert words(changed)["D2"] == "holds only if"
    assert "faster than 1: b_f = 3 (× 0.20 [0.20, 0.20])" in forget_bias.summary(changed)["D2"]
    solved_at.loc[{"row": "b_f = 0"}] = 5.0
    solved_at.loc[{"row": "b_f = 3"}] = 1.0
    assert words(changed)["D2"] == "does not hold"
    # solved by others alone: 1 is no faster than 0
    solved_at.loc[{"row": ["b_f = 0", "b_f = 1"]}] = np.nan
    assert words(changed)["D2"] == "does not hold"

    solved_at.loc[{"row": "b_f = 1"}] = 10.0
    solved_at.loc[{"row": "b_f = 1, c_0 = 0.1"}] = 5.0
    assert words(changed)["D3"] == "holds only if"
    changed["log_retention_end"].loc[{"memory": 0.1}] = changed["log_retention_end"].sel(memory=0.0) + 0.2
    assert words(changed)["D3"] == "holds"
    assert "at least 1.1 with b_f = 0, b_f = 1, b_f = 3" in forget_bias.summary(changed)["D3"]
    assert "b_f = 1, c_0 = 0.1: × 0.50 [0.50, 0.50] (adding)" in forget_bias.summary(changed)["D3"]
    changed["log_retention_end"][0, 0] = np.nan
    with pytest.raises(ValueError, match="b_f = 0: a fresh network gave no number, nothing to judge"):
        forget_bias.verdict(changed)


def test_seeds_that_never_solve_count(tiny):
    """Unsolved against solved is a ratio, unsolved against unsolved a tie; a divergence is named in the table."""
    changed = tiny.copy(deep=True)
    changed["solved_at"].loc[{"task": "adding", "row": "b_f = 0"}] = [5.0, np.nan]
    changed["failed_at"].loc[{"task": "adding", "row": "b_f = 0", "seed": 1}] = 3
    speed = forget_bias._speed(changed, "adding", "b_f = 0", "b_f = 1")
    assert speed.told
    np.testing.assert_allclose([speed.low, speed.high], [0.5, 1.0])
    assert forget_bias._updates(changed, "adding", "b_f = 0") == "> 10 (1 diverged)"
    assert forget_bias._solved(changed, "adding", "b_f = 0") == "1 of 2"


def test_figure_shows_every_setting(tiny):
    drawn = forget_bias.figure(tiny)
    by_lag, at_end, by_bias, by_memory = drawn.axes
    assert [text.get_text() for text in by_lag.get_legend().get_texts()] == ROWS[:3]
    assert [label.get_text() for label in at_end.get_xticklabels()] == ["0", "1", "3"]
    assert [label.get_text() for label in by_bias.get_xticklabels()] == ["0", "1", "3"]
    assert [label.get_text() for label in by_memory.get_xticklabels()] == ["0\nb_f = 1", "0.1\nb_f = 1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forget-biases", "0", "2"], "--forget-biases: expected each once, 0 and 1 among them, found 0 2"),
        (["--forget-biases", "0", "1", "one"], "--forget-biases: expected numbers, chrono or ugi, found one"),
        (["--memories", "0.1", "0"], "--memories: expected finite numbers, rising, with 0 and 0.1"),
        (["--memory-biases", "2"], "--memory-biases: expected some of 0 1 chrono, each once, found 2"),
        (["--learning-rate", "-1"], "--learning-rate: expected a positive number, found -1"),
        (["--updates", "15"], "--updates: expected a multiple of --eval-every 10, found 15"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(forget_bias.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
