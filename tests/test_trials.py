"""Trials: the same weights as the library's loop, one compilation, and what is recorded when one ends early."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rnngrad as rg
from experiments.trials import Trainer, first_reached, history

BATCH = 4
TASK = rg.tasks.adding(6)
NET = rg.training.model([rg.cells.lstm(2, 5)], 1)
KEY = jax.random.key(3)


def mse(output, batch):
    return rg.losses.mse(output.outputs, batch.targets, batch.mask)


def batch_at(key, step):
    return TASK.batch(jax.random.fold_in(key, step), BATCH)


def measure(params, key):
    batch = TASK.batch(key, 8)
    return {"loss": mse(NET.apply(params, NET.init_state((8,)), batch.inputs), batch), "pair": jnp.arange(2.0)}


def trainer(optimizer, loss=mse):
    return Trainer(NET, loss, optimizer, batch_at, measure, batch_size=BATCH)


@pytest.fixture(scope="module")
def adam():
    """A trainer, and how often its loss was traced."""
    traced = []

    def counted(output, batch):
        traced.append(1)
        return mse(output, batch)

    return trainer(optax.adam(1e-2), counted), traced


def test_weights_are_those_of_the_librarys_loop(adam):
    trial = adam[0].run(KEY, updates=6, eval_every=2, keep_snapshots=True)
    key_init, key_batches, key_measure = jax.random.split(KEY, 3)
    optimizer = optax.adam(1e-2)
    fitted = rg.training.fit(
        NET,
        mse,
        optimizer,
        rg.training.initial_state(NET, optimizer, key_init, BATCH),
        lambda step: batch_at(key_batches, step),
        num_steps=6,
    )
    # one program against six: the same operations, rounded apart where they are fused otherwise
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), trial.params, fitted.state.params)
    np.testing.assert_array_equal(trial.updates, [0, 2, 4, 6])
    np.testing.assert_allclose(trial.measured["loss"][-1], measure(fitted.state.params, key_measure)["loss"], rtol=1e-4)
    assert trial.measured["pair"].shape == (4, 2)
    assert len(trial.snapshots) == 4
    assert np.isnan(trial.train_loss[0])
    assert np.isfinite(trial.train_loss[1:]).all()
    assert trial.failed_at == -1


def test_seeds_and_given_weights_share_one_compilation(adam):
    run, traced = adam
    run.run(KEY, updates=2, eval_every=2)
    before = len(traced)
    first = run.run(jax.random.key(4), updates=2, eval_every=2)
    given = NET.init(jax.random.key(9))
    second = run.run(jax.random.key(4), updates=2, eval_every=2, params=given)
    assert len(traced) == before
    assert first.measured["loss"][0] != second.measured["loss"][0]


def test_a_trial_that_diverges_says_where_and_the_rest_is_nan():
    def bad(output, batch):
        value = mse(output, batch)
        return jnp.where(value < 1e9, value, jnp.nan)

    trial = trainer(optax.sgd(1e6), bad).run(KEY, updates=8, eval_every=2)
    assert 1 <= trial.failed_at <= 8
    done = (trial.failed_at - 1) // 2
    assert np.isfinite(trial.measured["loss"][: done + 1]).all()
    assert np.isnan(trial.measured["loss"][done + 1 :]).all()
    assert np.isnan(trial.measured["pair"][done + 1 :]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trial.params))  # those before the failure


def test_a_trial_ends_where_it_may(adam):
    trial = adam[0].run(KEY, updates=6, eval_every=2, until=lambda measured: True)
    assert np.isfinite(trial.measured["loss"][0])
    assert np.isnan(trial.measured["loss"][1:]).all()
    assert trial.failed_at == -1


@pytest.mark.parametrize(("updates", "eval_every"), [(5, 2), (0, 1), (2, 0)])
def test_updates_that_do_not_fit(adam, updates, eval_every):
    with pytest.raises(ValueError, match=f"updates: expected a multiple of eval_every = {eval_every}, found {updates}"):
        adam[0].run(KEY, updates=updates, eval_every=eval_every)


def test_history_names_its_axes(adam):
    found = history(adam[0].run(KEY, updates=4, eval_every=2), {"pair": ("which",)})
    assert found["pair"].dims == ("evaluation", "which")
    np.testing.assert_array_equal(found["evaluation"], [0, 2, 4])
    assert first_reached(np.array([0, 2]), np.array([False, True])) == 2
    assert np.isnan(first_reached(np.array([0, 2]), np.array([False, False])))
