"""The experiment on flossing: its numbers by NumPy, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import xarray as xr

from experiments import command, flossing
from experiments.claims import word_of

TINY = dataclasses.replace(flossing.SMOKE, exponents=(2, 4))


@pytest.fixture(scope="module")
def tiny():
    return flossing.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny["exponents"].sizes == {"init": 1, "seed": 2, "start": 3, "index": 4}
    assert tiny["accuracy"].sizes == {"init": 1, "length": 1, "seed": 2, "start": 3, "evaluation": 3}
    assert tiny["start"].values.tolist() == ["plain", "k = 2", "k = 4"]
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("start", ["plain", "k = 4"])
def test_exponents_and_singular_values_by_numpy(tiny, start):
    """Seed 1: a NumPy cell, QR of explicit Jacobians after each step, and LAPACK's SVD of the product."""
    params = flossing._networks("torch", 1, TINY).params[start]
    w, u, b = (np.asarray(leaf, np.float64) for leaf in params.layers[0])
    ids = np.asarray(jax.random.randint(jax.random.key(1), (50,), 0, 6, "int32"))
    xs = np.asarray(params.embedding, np.float64)[ids]

    def jacobians(xs):
        h, found = np.zeros(4), []
        for x in xs:
            h = np.tanh(w @ x + u @ h + b)
            found.append((1 - h**2)[:, None] * u)
        return found

    frame, growth = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0], []
    for jacobian in jacobians(xs[:40]):
        frame, r = np.linalg.qr(jacobian @ frame)
        growth.append(np.log(np.abs(np.diag(r))))
    row = tiny.sel(init="torch", start=start, seed=1)
    # another random frame has settled after 8 steps to O(1) nats over the other 32
    np.testing.assert_allclose(np.sort(row["exponents"])[::-1], np.sort(np.mean(growth[8:], axis=0))[::-1], atol=0.15)
    # the sum depends on no frame
    np.testing.assert_allclose(row["exponents"].sum(), np.sum(growth[8:]) / 32, atol=1e-3)

    chain, retained = np.eye(4), [0.0]
    for jacobian in jacobians(xs[40:])[::-1]:
        chain = chain @ jacobian
        retained.append(np.log(np.linalg.norm(chain) / 2))
    singular = np.log(np.linalg.svd(chain, compute_uv=False))
    # LAPACK loses what lies 36 nats below the largest
    seen = singular > singular[0] - 25
    np.testing.assert_allclose(row["log_singular"].values[seen], singular[seen], atol=1e-3)
    np.testing.assert_allclose(row["log_retention"], retained, atol=1e-3)


def test_flossing_descends_and_leaves_the_rest_alone():
    config = dataclasses.replace(TINY, floss_updates=60, floss_rate=1e-2)
    networks = flossing._networks("torch", 0, config)
    for start, values in networks.distance.items():
        assert np.mean(values[-5:]) < 0.2 * np.mean(values[:5])
        plain, flossed = networks.params["plain"], networks.params[start]
        np.testing.assert_array_equal(plain.embedding, flossed.embedding)
        np.testing.assert_array_equal(plain.readout.w, flossed.readout.w)


def test_a_seed_is_the_same_alone_and_among_others(tiny, monkeypatch):
    # what is compiled does not depend on the seeds
    trainer, flosser, model = flossing._trainer, flossing._flosser, flossing._model
    monkeypatch.setattr(flossing, "_trainer", lambda length, config: trainer(length, TINY))
    monkeypatch.setattr(flossing, "_flosser", lambda k, config: flosser(k, TINY))
    monkeypatch.setattr(flossing, "_model", lambda config: model(TINY))
    alone = flossing.run(dataclasses.replace(TINY, first_seed=1, seeds=1))
    for name in ("exponents", "log_singular", "accuracy"):
        np.testing.assert_array_equal(alone[name].squeeze(), tiny[name].sel(seed=1).squeeze())


def _longer(dataset, lengths):
    """What was measured, as if at several lengths, where no start has learned any."""
    measured = dataset[["exponents", "log_retention", "log_singular", "distance"]]
    one = dataset[["accuracy", "failed_at"]].isel(length=0, drop=True)
    several = xr.concat([one * 0 + 0.25 for _ in lengths], dim="length").assign_coords(length=lengths)
    return measured.merge(several)


def test_horizon_needs_all_shorter_lengths(tiny):
    measured = _longer(tiny, [10, 20, 40])
    for length in (10, 40):
        measured["accuracy"].loc[{"length": length, "start": "plain"}] = 1.0
    for length in (10, 20):
        measured["accuracy"].loc[{"length": length, "start": "k = 2"}] = [0.25, 0.95, np.nan]
    horizon = flossing.derive(measured)["horizon"].sel(init="torch").transpose("seed", "start")
    np.testing.assert_array_equal(horizon, [[10, 20, 0]] * 2)


def _changed(dataset, *, horizons, smallest):
    """Horizons of every start, and the last two log singular values."""
    changed = dataset.copy(deep=True)
    changed["log_singular"][:] = 0.0
    for start, horizon, small in zip(dataset["start"].values, horizons, smallest, strict=True):
        changed["horizon"].loc[{"start": start}] = horizon
        changed["log_singular"].loc[{"start": start, "index": [2, 3, 4]}] = small
    return changed


def _failing(dataset):
    checks = [check for check in flossing.verdict(dataset) if check.decides]
    return [check.name for check in checks if check.holds is False], word_of(checks)


def test_verdict_follows_the_data(tiny):
    better = _changed(tiny, horizons=(0, 10, 10), smallest=([-9, -9, -9], [-1, -1, -1], [-1, -1, -1]))
    assert _failing(better) == ([], "holds")
    assert "goes from T = 0 to 10 with k = 2" in flossing.summary(better)["E4"]
    whole = _changed(tiny, horizons=(0, 10, 10), smallest=([-9, -9, -9], [-1, -1, -20], [-1, -1, -1]))
    assert _failing(whole) == (["the condition number falls, the whole Jacobian: torch, k = 2"], "holds only if")
    assert "Not so: the condition number falls, the whole Jacobian: torch, k = 2" in flossing.summary(whole)["E4"]
    shorter = _changed(tiny, horizons=(10, 0, 0), smallest=([-1, -1, -1], [-9, -9, -9], [-9, -9, -9]))
    assert _failing(shorter)[1] == "does not hold"
    assert len(_failing(shorter)[0]) == 5


def test_ties_at_either_end_say_nothing_about_the_horizon(tiny):
    for horizon in (0, 10):
        tie = _changed(tiny, horizons=(horizon,) * 3, smallest=([-9] * 3, [-1] * 3, [-1] * 3))
        found = {check.name: check.holds for check in flossing.verdict(tie) if "horizon" in check.name}
        assert list(found.values()) == [None, None]


def test_a_lost_direction_is_an_infinite_condition_number(tiny):
    lost = _changed(tiny, horizons=(0, 10, 10), smallest=([-9] * 3, [-1, -1, -np.inf], [-1] * 3))
    assert _failing(lost)[0] == ["the condition number falls, the whole Jacobian: torch, k = 2"]


def test_figure_shows_every_start(tiny):
    exponents, singular, retention, learned = flossing.figure(tiny).axes
    assert (len(exponents.lines), len(singular.lines), len(retention.lines)) == (4, 3, 3)
    assert len(learned.patches) == 3
    expected = tiny["log_retention_median"].sel(init="torch", start="k = 2")
    np.testing.assert_allclose(retention.lines[1].get_ydata(), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--floss-steps", "9"], "--floss-steps: expected at least 10, found 9"),
        (["--exponents", "5"], "--exponents: expected numbers from 1 to 4 (hidden size), rising, found (5,)"),
        (["--lengths", "9", "20"], "--lengths: expected numbers from 10, rising, found (9, 20)"),
        (["--inits", "torch", "torch"], "--inits: expected each name once, found torch torch"),
        (["--floss-rate", "0"], "--floss-rate: expected a positive number, found 0"),
        (["--updates", "3"], "--updates: expected a multiple of --eval-every 2, found 3"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(flossing.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
