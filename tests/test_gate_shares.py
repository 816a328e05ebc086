"""The experiment on gates and gradients: its numbers by other means, verdicts that follow the data, figures, errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from experiments import command, gate_shares

TINY = dataclasses.replace(gate_shares.SMOKE, hidden_size=3, input_size=2, task_steps=20, training_seeds=1)
"""Sizes of fresh and trained networks agree, so that both are measured by one compilation."""


@pytest.fixture(scope="module")
def tiny():
    return gate_shares.run(TINY)


@pytest.fixture(scope="module")
def drawn():
    """Returns what seed 1 of the fresh networks with forget bias 1 has drawn, in float64."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 4)
        params = rg.cells.lstm(2, 3, forget_bias=1.0, dtype="float64").init(keys[0])
        readout = rg.readout(3, 1, dtype="float64").init(keys[1])
        xs = jax.random.normal(keys[2], (20, 2), "float64")
        target = jax.random.normal(keys[3], (1,), "float64")
        return jax.tree.map(np.asarray, (params, readout, xs, target))


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _forward(params, xs):
    """Returns (i, f, g, o, c, h) of every step, and h and c before it, by NumPy."""
    h, c, steps = np.zeros(3), np.zeros(3), []
    for x in xs:
        i, f, g, o = np.split(params.w_ih @ x + params.w_hh @ h + params.b, 4)
        i, f, o, g = _sigmoid(i), _sigmoid(f), _sigmoid(o), np.tanh(g)
        before, c = c, f * c + i * g
        h = o * np.tanh(c)
        steps.append((i, f, g, o, c, h, before))
    return steps


def _fresh(dataset):
    return dataset.sel(stage="fresh", bias="b_f = 1", seed=1)


def test_dimensions_and_units(tiny):
    assert {name: tiny.sizes[name] for name in ("stage", "bias", "seed", "path", "lag", "gate", "loss", "route")} == {
        "stage": 3, "bias": 2, "seed": 2, "path": 12, "lag": 5, "gate": 4, "loss": 2, "route": 3,
    }  # fmt: skip
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert set(gate_shares.MEASURED) <= set(tiny.data_vars)
    assert not jax.config.jax_enable_x64


def test_gates_and_routes_by_a_hand_written_backward_pass(tiny, drawn):
    """The recursions of an LSTM's backward pass, loss of the last step and of all steps."""
    params, readout, xs, target = drawn
    steps = _forward(params, xs)
    blocks = np.split(params.w_hh, 4)
    for loss, weights in (("last step", np.eye(20)[-1]), ("all steps", np.full(20, 1 / 20))):
        later_h, later_c = np.zeros(3), np.zeros(3)
        squares, shares = [], []
        for (i, f, g, o, c, h, before), weight in list(zip(steps, weights, strict=True))[::-1]:
            here = weight * 2 * (readout.w @ h + readout.b - target) @ readout.w
            slope = o * (1 - np.tanh(c) ** 2)
            parts = [slope * here, slope * later_h, later_c]
            delta = sum(parts)
            norms = [np.linalg.norm(part) for part in parts]
            shares.append(np.array(norms) / sum(norms))
            z_bar = [
                delta * g * i * (1 - i), delta * before * f * (1 - f), delta * i * (1 - g**2),
                (here + later_h) * np.tanh(c) * o * (1 - o),
            ]  # fmt: skip
            squares.append([np.sum(z**2) for z in z_bar])
            later_h, later_c = sum(block.T @ z for block, z in zip(blocks, z_bar, strict=True)), delta * f
        found = _fresh(tiny).sel(loss=loss)
        np.testing.assert_allclose(found["output_share"], np.median(np.array(shares)[:, 0]), rtol=1e-5, atol=1e-12)
        assert float(found["sum_error"]) < 1e-14
        if loss == "last step":
            total = np.sum(squares, axis=0)
            np.testing.assert_allclose(found["gate_share"], total / total.sum(), rtol=1e-5)  # stored as float32


def test_curves_by_lag_are_those_of_the_seed():
    """With a single seed the median is its curve: the last step's gradient comes through the output alone."""
    alone = gate_shares.run(dataclasses.replace(TINY, seeds=1, first_seed=1))
    both = alone["route_share_by_lag_median"].sel(stage="fresh", loss="last step")
    np.testing.assert_allclose(both.isel(step_lag=0).sel(route="output"), 1)
    np.testing.assert_array_equal(both.isel(step_lag=slice(1, None)).sel(route="output"), 0)
    np.testing.assert_allclose(alone["route_share_by_lag_median"].sel(stage="fresh").sum("route"), 1, rtol=1e-5)
    np.testing.assert_allclose(alone["gate_share_by_lag_median"].sel(stage="fresh").sum("gate"), 1, rtol=1e-5)


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = gate_shares._measure_fresh("b_f = 1", dataclasses.replace(TINY, seeds=1, first_seed=1))
    for name in ("log_chain", "gate_share", "output_share"):
        np.testing.assert_array_equal(alone[name].isel(seed=0), _fresh(tiny)[name])


@pytest.mark.parametrize("path", ["direct", "without:i", "only:g", "without:o"])
def test_closed_gates_are_the_paths_of_the_library(tiny, drawn, path):
    params, _, xs, _ = drawn
    with jax.enable_x64(True):
        cell = rg.cells.lstm(2, 3, dtype="float64")
        curve = rg.retention(cell, jax.tree.map(jnp.asarray, params), cell.init_state(), jnp.asarray(xs), of="c",
                             wrt="c", path=path).log_norm  # fmt: skip
    np.testing.assert_allclose(_fresh(tiny)["log_chain"].sel(path=path), curve[::5], rtol=1e-5)


def test_input_term_closed_by_products_of_matrices(tiny, drawn):
    """∂(h', c')/∂(h, c) with z_i and z_g constant, multiplied out."""
    params, _, xs, _ = drawn
    _, w_f, _, w_o = np.split(params.w_hh, 4)
    chain, norms = np.eye(6)[3:], [0.0]
    for _, f, _, o, c, _, before in _forward(params, xs)[::-1]:
        c_by_h, c_by_c = (before * f * (1 - f))[:, None] * w_f, np.diag(f)
        slope = (o * (1 - np.tanh(c) ** 2))[:, None]
        h_by_h = slope * c_by_h + (np.tanh(c) * o * (1 - o))[:, None] * w_o
        chain = chain @ np.block([[h_by_h, slope * c_by_c], [c_by_h, c_by_c]])
        norms.append(np.log(np.linalg.norm(chain[:, 3:]) / np.sqrt(3)))
    found = _fresh(tiny)
    np.testing.assert_allclose(found["log_chain"].sel(path="without:i,g"), norms[::5], rtol=1e-5, atol=1e-7)
    cost = found["log_chain"].sel(path="full") - found["log_chain"].sel(path="without:i,g")
    np.testing.assert_allclose(found["log_cost"], cost, rtol=1e-6)


def test_forget_gates_on_the_sentence(tiny):
    """The first word by NumPy, and ∏f as the product of what is stored, for the first seed."""
    gates = tiny["forget_gate"].sel(bias="chrono").transpose("word_step", "unit").values.astype(float)
    assert tiny["word"].values.tolist() == gate_shares.TEXT.split()
    key_params, key_words = jax.random.split(jax.random.key(0))
    num_words = len(gate_shares.TEXT.split())
    params = rg.cells.lstm(2, 3, forget_bias=rg.initializers.chrono(num_words)).init(key_params)
    vocabulary = sorted(set(gate_shares.TEXT.split()))
    embedding = np.asarray(jax.random.normal(key_words, (len(vocabulary), 2)))
    z = params.w_ih @ embedding[vocabulary.index("It")] + params.b
    np.testing.assert_allclose(gates[0], _sigmoid(np.asarray(z))[3:6], rtol=1e-5)
    surviving = tiny["log_surviving"].sel(bias="chrono").isel(sentence_seed=0).transpose("word_step", "unit_quantile")
    product = np.cumprod(gates, axis=0)
    np.testing.assert_allclose(np.exp(surviving), np.sort(product, axis=1), rtol=1e-4)


def _decided(tiny):
    """Returns the run as one over 100 steps whose trained networks learned."""
    changed = tiny.copy(deep=True)
    changed.attrs["config"] = changed.attrs["config"].replace('"steps": 20', '"steps": 100')
    changed["task_loss"].loc[{"stage": "adding, trained", "seed": 0}] = 0.001
    return changed


def _holds(dataset, start):
    return {check.holds for check in gate_shares.verdict(dataset) if check.name.startswith(start)}


def test_verdict_follows_the_data(tiny):
    assert {check.holds for check in gate_shares.verdict(tiny)} == {None}
    assert set(gate_shares.summary(tiny).values()) == {"this run is too small to tell, or no seed gave a number."}

    good = _decided(tiny)
    good["log_cost"][:] = np.log(3.0)
    good["gate_share"][:] = np.where(np.isnan(good["gate_share"]), np.nan, [0.7, 0.1, 0.1, 0.1])
    good["output_share"][:] = np.where(np.isnan(good["output_share"]), np.nan, 0.4)
    assert {verdict.word for verdict in gate_shares.EXPERIMENT.verdicts(good)} == {"holds"}
    said = gate_shares.summary(good)
    assert "and the largest in fresh, b_f = 1; fresh, chrono; adding, untrained, b_f = 1" in said["B6"]
    assert "10^0.5 (adding, trained, chrono, lag 20)" in said["B6"]
    assert "one path, not two" not in said["B7"]

    few = good.copy(deep=True)
    few["log_cost"].loc[{"bias": "chrono"}] = np.log(1.9)
    assert _holds(few, gate_shares.COST) == {True, False}
    assert "not surely more than a factor of 2 for fresh, chrono at lag 20" in gate_shares.summary(few)["B6"]
    few["log_cost"][:] = 0
    few["gate_share"][:] = np.where(np.isnan(few["gate_share"]), np.nan, [0.1, 0.1, 0.7, 0.1])
    few["output_share"].loc[{"loss": "last step"}] = 0
    b6, b7 = gate_shares.EXPERIMENT.verdicts(few)
    assert b6.word == "does not hold"
    assert "nowhere surely the largest; by the median the largest share is that of g." in b6.sentence
    assert b7.word == "holds only if"
    assert "at the median step, so that there is one path, not two." in b7.sentence
    few["sum_error"].loc[{"bias": "chrono"}] = 0.1
    few["output_share"].loc[{"loss": "all steps"}] = 0.995
    b6, b7 = gate_shares.EXPERIMENT.verdicts(few)
    assert b7.word == "holds only if"
    assert "but for loss of last step, fresh, chrono" in b7.sentence
    few["sum_error"][:] = 0.1
    assert gate_shares.EXPERIMENT.verdicts(few)[1].word == "does not hold"


def test_networks_that_did_not_learn_do_not_count(tiny):
    unlearned = _decided(tiny)
    unlearned["task_loss"].loc[{"stage": "adding, trained"}] = 0.2
    of_trained = [check for check in gate_shares.verdict(unlearned) if ": adding, trained" in check.name]
    assert of_trained
    assert {check.holds for check in of_trained} == {None}
    assert "adding, trained" not in gate_shares.summary(unlearned)["B6"]


def test_figures_show_the_data(tiny):
    main, output, gates = (picture.draw(tiny) for picture in gate_shares.EXPERIMENT.pictures)
    lines = {line.get_label(): line.get_ydata() for line in main.axes[0].lines}
    stored = tiny["gate_share_by_lag_median"].sel(stage="fresh", bias="b_f = 1", gate="g")
    np.testing.assert_array_equal(lines["g, candidate"], stored)
    assert main.axes[4].get_ylabel().startswith("log10 of ‖∂c_T/∂c_{T−lag}‖")
    assert output.axes[4].get_ylabel() == "loss of all steps\nshare of the gradient by c_t"
    image = gates.axes[0].images[0].get_array()
    assert (np.diff(image.mean(axis=1)) >= 0).all()
    assert [label.get_text() for label in gates.axes[2].get_xticklabels()] == gate_shares.TEXT.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "19"], "--steps: expected at least 20, found 19"),
        (["--training-seeds", "3"], "--training-seeds: expected at most 2, the seeds, found 3"),
        (["--updates", "100"], "--updates: expected at least 200, found 100"),
        (["--updates", "300"], "--updates: expected a multiple of 200, found 300"),
        (["--learning-rate", "0"], "--learning-rate: expected a positive number, found 0.0"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(gate_shares.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
