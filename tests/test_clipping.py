"""The clipping map: training by a plain loop, the two units by hand, and verdicts that follow the data."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from experiments import clipping, command
from experiments.claims import word_of

# relu at gain 1e6 leaves the range of float32 within 12 steps
TINY = dataclasses.replace(
    clipping.SMOKE, activations=("tanh", "relu"), gains=(1.0, 1e6), delay=2, hidden_size=4, batch_size=3
)


@pytest.fixture(scope="module")
def tiny():
    return clipping.run(TINY)


def test_rows_dimensions_and_units(tiny):
    assert tiny["row"].values.tolist() == ["none", "0.25 mean", "0.25 sum"]
    assert tiny["survives"].dims == ("activation", "gain", "row", "learning_rate", "seed")
    assert clipping.Row(0.25, "sum").per_token(10) == 0.025
    assert clipping.Row(0.25, "mean").per_token(10) == 0.25
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    np.testing.assert_array_equal(tiny["first_norm"].sel(row="none"), tiny["first_norm"].sel(row="0.25 sum"))


def loss_by_hand(params, batch):
    """Mean cross-entropy per token of a tanh cell, written out."""
    (layer,) = params.layers
    h, losses = jnp.zeros((3, 4)), []
    for ids, targets in zip(batch.inputs, batch.targets, strict=True):
        h = jnp.tanh(params.embedding[ids] @ layer.w_ih.T + h @ layer.w_hh.T + layer.b[None, :])
        logits = h @ params.readout.w.T + params.readout.b[None, :]
        shares = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=1, keepdims=True)
        losses.append(-jnp.log(jnp.take_along_axis(shares, targets[:, None], axis=1)))
    return jnp.mean(jnp.stack(losses))


GRADIENT_BY_HAND = jax.jit(jax.value_and_grad(loss_by_hand))


@pytest.mark.parametrize(("row", "threshold"), [("none", np.inf), ("0.25 mean", 0.25), ("0.25 sum", 0.25 / 12)])
def test_training_by_a_plain_loop(tiny, row, threshold):
    """tanh, gain 1, rate 0.5, seed 1: gradient descent with clipping by hand."""
    params, key_batches = clipping.draw("tanh", 1.0, 1, TINY)
    task = rg.tasks.copy_memory(2, num_symbols=8, length=5)
    losses, norms = [], []
    for step in range(10):
        loss, grads = GRADIENT_BY_HAND(params, task.batch(jax.random.fold_in(key_batches, step), 3))
        norm = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads))))
        scale = np.float32(0.5 * min(1.0, threshold / norm))
        params = jax.tree.map(lambda p, g, scale=scale: p - scale * g, params, grads)
        losses.append(float(loss))
        norms.append(norm)
    found = tiny.sel(activation="tanh", gain=1.0, row=row, learning_rate=0.5, seed=1)
    np.testing.assert_allclose(found["first_loss"], losses[0], rtol=1e-5)
    np.testing.assert_allclose(found["last_loss"], losses[-1], rtol=1e-4)
    np.testing.assert_allclose(found["first_norm"], norms[0], rtol=1e-4)
    np.testing.assert_allclose(found["clip_fraction"], np.mean(np.array(norms) > threshold), rtol=1e-6)
    assert bool(found["survives"]) == (losses[-1] < losses[0])


def test_own_clipping_is_the_librarys():
    """The optimizer whose threshold may be traced against rg.remedies.clip_by_global_norm, in both units."""
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.1])}
    for unit, threshold in (("mean_per_token", 0.25), ("sum_over_steps", 0.25 / 12)):
        clip = rg.remedies.clip_by_global_norm(0.25, unit=unit, num_steps=12)
        expected, _ = clip.update(gradient, clip.init(gradient))
        found, state = clipping.OPTIMIZER.update(gradient, clipping._descent(2.0, threshold))
        jax.tree.map(lambda e, f: np.testing.assert_allclose(f, -2.0 * np.asarray(e), rtol=1e-6), expected, found)
        assert int(state.num_clipped) == 1
    found, state = clipping.OPTIMIZER.update(gradient, clipping._descent(2.0, np.inf))
    np.testing.assert_allclose(found["a"], [-6.0, -8.0])
    assert int(state.num_clipped) == 0


def test_units_agree_to_round_off(tiny):
    assert tiny["unit_difference"].sel(form="threshold").max() == 0
    assert tiny["unit_difference"].sel(form="loss").max() <= 1e-5


def test_failed_seeds_are_recorded(tiny):
    """Seed 1 of relu leaves float32 with its first batch; of seed 0 hardly a unit is awake."""
    relu = tiny.sel(activation="relu", gain=1e6, seed=1)
    assert (relu["failed_at"] == 1).all()
    assert np.isnan(relu["last_loss"]).all()
    assert np.isnan(relu["clip_fraction"]).all()
    assert not relu["survives"].any()
    assert (tiny["failed_at"].sel(activation="tanh", gain=1.0, learning_rate=0.5) == -1).all()
    assert "is not repaired by any threshold (1 of 2 of relu, gain 1e+06)" in clipping.summary(tiny)["D1"]


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = clipping.run(dataclasses.replace(TINY, activations=("tanh",), first_seed=1, seeds=1, fresh_seeds=1))
    together = tiny.sel(activation=["tanh"]).isel(seed=[1])
    # another number of networks at once is another program, whose sums round otherwise
    np.testing.assert_allclose(alone["last_loss"], together["last_loss"], rtol=1e-3)
    np.testing.assert_array_equal(alone["failed_at"], together["failed_at"])


def word(dataset):
    return word_of(clipping.verdict(dataset))


def by_name(dataset, start):
    return [check for check in clipping.verdict(dataset) if check.name.startswith(start)]


def test_verdict_follows_the_data(tiny):
    changed = tiny.copy(deep=True)
    changed["first_norm"][:] = 1.0
    changed["clip_fraction"][:] = 0.5
    assert word(changed) == "holds"  # the unit alone is judged
    assert [check.holds for check in by_name(changed, "clipping saves")] == [None]
    assert "no gradient explodes" in clipping.summary(changed)["D1"]

    changed["first_norm"].loc[{"activation": "tanh", "gain": 1e6}] = 1e4
    changed["survives"].loc[{"activation": "tanh", "gain": 1e6}] = 1
    changed["survives"].loc[{"activation": "tanh", "gain": 1e6, "row": "none"}] = 0
    assert [check.holds for check in by_name(changed, "survives with 0.25 per token")] == [True]
    assert [check.holds for check in by_name(changed, "does not survive without: tanh, gain 1e+06")] == [True]
    assert word(changed) == "holds"
    assert "with 0.25 per token at every learning rate" in clipping.summary(changed)["D1"]
    assert "without clipping at no learning rate" in clipping.summary(changed)["D1"]

    changed["survives"].loc[{"activation": "tanh", "gain": 1e6, "row": "none", "learning_rate": 0.5}] = 1
    assert [check.holds for check in by_name(changed, "does not survive without")] == [False]
    assert "without clipping at learning rate 0.5" in clipping.summary(changed)["D1"]
    changed["survives"].loc[{"activation": "tanh", "gain": 1e6, "row": "0.25 mean", "learning_rate": 10.0}] = 0
    assert [check.holds for check in by_name(changed, "survives with")] == [False]
    changed["clip_fraction"].loc[{"row": "0.25 sum", "gain": 1.0}] = 1.0
    (alike,) = by_name(changed, "0.25 is one threshold")
    assert alike.value == "50% of the updates clipped (mean), 100% (sum), apart by 50% to 50%"
    assert not alike.holds
    assert word(changed) == "does not hold"
    assert "0.25 without its unit says nothing" in clipping.summary(changed)["D1"]

    changed["unit_difference"][0, 1] = 0.1
    assert [check.holds for check in by_name(changed, "0.25 of the mean = 5")] == [True, False]
    changed["last_loss"][:] = 3.0
    assert [check.holds for check in by_name(changed, "what survives")] == [False]


def test_table_and_figure_show_every_case(tiny):
    assert clipping.table(tiny).row_count == 4 * 3
    *panels, bar = clipping.figure(tiny).axes
    assert [panel.get_title().partition(":")[0] for panel in panels] == [
        "tanh, gain 1",
        "tanh, gain 1e+06",
        "relu, gain 1",
        "relu, gain 1e+06",
    ]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["no clipping", "0.25 mean", "0.25 sum"]
    survivors = tiny["survives"].sel(activation="relu", gain=1e6).sum("seed").values.ravel()
    assert [text.get_text() for text in panels[3].texts] == [f"{count}/2" for count in survivors]
    assert "nats per token" in bar.get_ylabel()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gains", "2", "1"], "--gains: expected positive numbers, rising, found (2.0, 1.0)"),
        (["--learning-rates", "0"], "--learning-rates: expected positive numbers, rising, found (0.0,)"),
        (["--thresholds", "1"], "--thresholds: expected 0.25 among them, found (1.0,)"),
        (["--activations", "tanh", "tanh"], "--activations: expected each name once, found tanh tanh"),
        (["--updates", "9"], "--updates: expected at least 10, found 9"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(clipping.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
