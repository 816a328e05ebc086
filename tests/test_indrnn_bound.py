"""The experiment on the IndRNN's bound: its numbers by NumPy, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from experiments import command, indrnn_bound
from experiments.claims import word_of

TINY = indrnn_bound.SMOKE


@pytest.fixture(scope="module")
def tiny():
    return indrnn_bound.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny["log_norm"].sizes == {"start": 4, "activation": 3, "seed": 2, "lag": 13}
    assert tiny["test_loss"].sizes == {"length": 1, "network": 5, "trial": 2, "evaluation": 3}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("activation", indrnn_bound.ACTIVATIONS)
def test_norm_and_share_by_numpy(tiny, activation):
    """Seed 1, u within the bound: units pushed one by one, the derivative by central differences."""
    key_params, key_u, key_xs = jax.random.split(jax.random.key(1), 3)
    with jax.enable_x64(True):
        drawn = rg.cells.indrnn(3, 4, dtype="float64").init(key_params)
        w, b = np.asarray(drawn.w_ih), np.asarray(drawn.b)
        uniform = np.asarray(jax.random.uniform(key_u, (4,), "float64"))
        xs = np.asarray(jax.random.normal(key_xs, (12, 3), "float64"))
    u = 2 ** (-1 / 12) + (2 ** (1 / 12) - 2 ** (-1 / 12)) * uniform
    assert (u <= 2 ** (1 / 12)).all()
    phi = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh, "identity": lambda z: z}[activation]

    def last(h, start):
        for x in xs[start:]:
            h = phi(w @ x + b + u * h)
        return h

    hs = [np.zeros(4)]
    for t in range(12):
        hs.append(phi(w @ xs[t] + b + u * hs[-1]))
    row = tiny.sel(start="within the bound", activation=activation, seed=1)
    for lag in (0, 1, 5, 12):
        # no unit of this run is so close to its kink that 1e-7 would cross it
        slope = (last(hs[12 - lag] + 1e-7, 12 - lag) - last(hs[12 - lag] - 1e-7, 12 - lag)) / 2e-7
        np.testing.assert_allclose(np.exp(row["log_norm"].sel(lag=lag)), np.max(np.abs(slope)), atol=1e-6)
        # tanh never cuts, but differences lose what is below 1e-9
        passing = np.mean(np.abs(slope) > 1e-9) if activation == "relu" else 1.0
        np.testing.assert_allclose(row["passing"].sel(lag=lag), passing, atol=1e-6)


def test_beyond_the_bound_the_linear_chain_is_four(tiny):
    norm = tiny["log_norm"].sel(activation="identity").isel(lag=-1)
    np.testing.assert_allclose(np.exp(norm.sel(start="u = 4^{1/T}")), 4, rtol=1e-6)
    np.testing.assert_allclose(np.exp(norm.sel(start="at the bound")), 2, rtol=1e-6)


def test_products_do_not_underflow():
    mantissas, exponents = indrnn_bound.products(np.full((4000, 2), 0.5))
    assert mantissas.shape == (4001, 2)
    np.testing.assert_array_equal(mantissas[-1] * 2.0 ** (exponents[-1] + 4000.0), [1.0, 1.0])
    mantissas, _ = indrnn_bound.products(np.array([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]]))
    np.testing.assert_array_equal(mantissas[2:], 0)


def test_u_is_clipped_after_an_update():
    model = indrnn_bound._model("IndRNN, bound", 6, TINY)
    params = model.init(jax.random.key(0))
    changes = jax.tree.map(jnp.ones_like, params)
    clip = indrnn_bound.clip_u(1.1)
    updates, _ = clip.update(changes, clip.init(params), params)
    for layer, change in zip(params.layers, updates.layers, strict=True):
        np.testing.assert_allclose(layer.u + change.u, 1.1, rtol=1e-6)
        np.testing.assert_array_equal(change.w_ih, 1)


def test_the_bound_is_kept_in_training(tiny):
    gain = tiny["log2_gain"].sel(length=6)
    assert (gain.sel(network="IndRNN, bound") <= 1 + 1e-5).all()
    assert np.isnan(gain.sel(network=["vanilla tanh", "LSTM"])).all()


def test_a_seed_is_the_same_alone_and_among_others(tiny, monkeypatch):
    # what is compiled does not depend on the seeds
    trainer = indrnn_bound._trainer
    monkeypatch.setattr(indrnn_bound, "_trainer", lambda network, length, config: trainer(network, length, TINY))
    monkeypatch.setattr(indrnn_bound, "STARTS", indrnn_bound.STARTS[:1])
    monkeypatch.setattr(indrnn_bound, "NETWORKS", indrnn_bound.NETWORKS[:1])
    alone = indrnn_bound.run(dataclasses.replace(TINY, first_seed=1, seeds=1, train_seeds=1))
    np.testing.assert_array_equal(alone["log_norm"][0, :, 0], tiny["log_norm"][0, :, 1])
    np.testing.assert_array_equal(alone["test_loss"][0, 0, 0], tiny["test_loss"][0, 0, 1])


def _changed(dataset, *, norm=0.0, error=1e-15, solved=(2.0, np.nan, np.nan, np.nan, np.nan)):
    changed = dataset.copy(deep=True)
    changed.attrs["config"] = changed.attrs["config"].replace('"updates": 4', '"updates": 400')
    changed["log_norm"][:] = norm
    changed["identity_error"][:] = error
    for network, updates in zip(indrnn_bound.NETWORKS, solved, strict=True):
        changed["updates_to_solve"].loc[{"network": network}] = updates
    return changed


def _failing(dataset):
    checks = [check for check in indrnn_bound.verdict(dataset) if check.decides]
    return [check.name for check in checks if check.holds is False], word_of(checks)


def test_verdict_follows_the_data(tiny):
    assert _failing(_changed(tiny)) == ([], "holds")
    assert (
        "the chain is the product of numbers, and its norm never exceeds 2"
        in indrnn_bound.summary(_changed(tiny))["E3"]
    )
    failing, word = _failing(_changed(tiny, error=1e-9))
    assert word == "holds only if"
    assert all(name.startswith("chain = ") for name in failing)
    assert "is not the product" in indrnn_bound.summary(_changed(tiny, error=1e-9))["E3"]
    failing, _ = _failing(_changed(tiny, norm=1.0))
    assert all("≤ 2 with" in name for name in failing)
    assert len(failing) == 2
    assert "exceeds 2 in spite of" in indrnn_bound.summary(_changed(tiny, norm=1.0))["E3"]
    failing, _ = _failing(_changed(tiny, norm=-np.inf))
    assert all("≥ 1/2" in name for name in failing)
    assert len(failing) == 4
    failing, _ = _failing(_changed(tiny, solved=(np.nan,) * 5))
    assert failing == ["adding T = 6 is solved by most seeds with the bound"]
    assert "at T = 6 by 0 of 2 seeds with the bound" in indrnn_bound.summary(_changed(tiny, solved=(np.nan,) * 5))["E3"]


def test_predictions_do_not_decide(tiny):
    slower = _changed(tiny, solved=(4.0, 2.0, 2.0, 2.0, 2.0))
    assert _failing(slower) == ([], "holds")
    predictions = [check.holds for check in indrnn_bound.verdict(slower) if not check.decides]
    assert predictions == [False, False, False]


def test_a_short_run_says_nothing_about_training(tiny):
    adding = [check for check in indrnn_bound.verdict(tiny) if check.decides and check.name.startswith("adding")]
    assert [check.holds for check in adding] == [None]


def test_figure_shows_starts_and_networks(tiny):
    drawn = indrnn_bound.figure(tiny)
    relu, tanh, passing, curves = drawn.axes
    assert (len(relu.lines), len(tanh.lines), len(passing.lines), len(curves.lines)) == (4, 4, 4, 5 * 2 + 1)
    expected = tiny["passing_median"].sel(start="U(0, 1)", activation="relu")
    np.testing.assert_allclose(passing.lines[0].get_ydata(), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, found 0"),
        (["--lengths", "20", "10"], "--lengths: expected numbers from 2, rising, found (20, 10)"),
        (["--updates", "3"], "--updates: expected a multiple of --eval-every 2, found 3"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(indrnn_bound.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
