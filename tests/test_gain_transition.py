"""The gain sweep: crossings by hand, its numbers by NumPy, and a verdict that follows the data."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import command, gain_transition, results
from rnngrad import theory

TINY = dataclasses.replace(
    gain_transition.SMOKE, gains=(0.5, 1.0, 2.6), steps=30, warm_up=20, fit_from=4, hidden_size=10, seeds=3
)


@pytest.fixture(scope="module")
def tiny():
    return gain_transition.run(TINY)


def test_rows_dimensions_and_units(tiny):
    assert gain_transition.rows_of(TINY) == [
        ("gaussian", 0.0),
        ("gaussian", 1.0),
        ("orthogonal", 0.0),
        ("orthogonal", 1.0),
    ]
    assert tiny.sizes == {"row": 4, "gain": 3, "seed": 3}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert json.loads(tiny.attrs["config"])["gains"] == [0.5, 1.0, 2.6]


def test_one_number_by_numpy(tiny):
    """Seed 1, gain 2.6, Gaussian weights, driven: product of diag(1 − h²) U in NumPy, slope by polyfit."""
    keys = jax.random.split(jax.random.key(1), 3)
    cell = rg.cells.vanilla(8, 10, init=rg.initializers.gaussian())
    params = cell.init(keys[0])
    u = 2.6 * np.asarray(params.w_hh, np.float64)
    xs = np.asarray(jax.random.normal(keys[1], (50, 8)), np.float64)
    h = np.asarray(jax.random.uniform(keys[2], (10,), minval=-1, maxval=1), np.float64)
    jacobians = []
    for x in xs:
        h = np.tanh(np.asarray(params.w_ih, np.float64) @ x + u @ h)
        jacobians.append((1 - h**2)[:, None] * u)
    chain, log_norm = np.eye(10), [0.5 * np.log(10)]
    for jacobian in jacobians[: 20 - 1 : -1]:
        chain = chain @ jacobian
        log_norm.append(np.log(np.linalg.norm(chain)))
    slope = np.polyfit(np.arange(4, 31), log_norm[4:], 1)[0]
    found = tiny["rate"].isel(row=1, seed=1).sel(gain=2.6)
    # float32 states of a network that may be chaotic: errors of 1e-7 grow by e^{0.2} per step over 50 steps
    np.testing.assert_allclose(found, slope, atol=2e-3)
    np.testing.assert_allclose(
        tiny["bound_at_gain_1"].isel(row=1, seed=1), np.log(np.linalg.norm(u, 2) / 2.6), rtol=1e-5, atol=1e-6
    )


def test_derived_quantities_follow_from_theory_and_measurement(tiny):
    row = tiny.isel(row=3)
    np.testing.assert_allclose(row["chi_crossing"], theory.critical_gain("tanh", input_variance=1.0))
    np.testing.assert_allclose(
        row["mean_field_rate"], [theory.vanilla_mean_field(g, input_variance=1.0).rate for g in (0.5, 1.0, 2.6)]
    )
    np.testing.assert_allclose(row["bound_crossing"], 1, rtol=1e-5)  # orthogonal
    np.testing.assert_allclose(row["bound_rate"], np.log([0.5, 1.0, 2.6]), atol=1e-5)
    names = [name for name in tiny.data_vars if name not in gain_transition.MEASURED]
    again = gain_transition.derive(tiny.drop_vars(names).copy())
    for name in names:
        np.testing.assert_array_equal(again[name], tiny[name])


def test_the_bound_holds_where_it_is_compared(tiny):
    """No rate fitted from lag 0 could exceed it; over a window it may by the window's ends, a factor √N."""
    room = np.log(10) / (30 - 4)
    own = tiny["bound_at_gain_1"] + np.log(tiny["gain"])
    assert bool((tiny["rate"] <= own + room).all())


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((-1.0, -0.5, 0.5, 1.0), 2.5),
        ((-1.0, 0.25, -0.5, 1.0), 1.8),  # the first of two
        ((-1.0, -0.5, -0.25, 0.0), 4.0),  # reaches 0 at the last gain
        ((-1.0, -0.5, -0.25, -0.1), np.nan),
        ((0.1, 0.5, 0.6, 0.7), np.nan),  # begins above
        ((-1.0, np.nan, 0.5, 1.0), np.nan),
    ],
)
def test_first_crossing(rates, expected):
    np.testing.assert_allclose(gain_transition.first_crossing(np.arange(1.0, 5.0), np.array(rates)), expected)


def test_verdict_follows_the_data(tiny):
    def with_crossing(low, high):
        dataset = tiny.isel(row=[1]).copy(deep=True)
        for name, value in (("median", 0.5 * (low + high)), ("low", low), ("high", high)):
            dataset[f"crossing_{name}"][:] = value
        dataset["bound_crossing_median"][:] = 0.5
        dataset["crossing"][:] = 0.5 * (low + high)
        return dataset

    chi = theory.critical_gain("tanh", input_variance=1.0)
    for low, high, expected in (
        (chi * 0.95, chi * 1.05, [False, True]),
        (chi * 0.95, chi * 1.2, [False, False]),  # the end that lies further off decides
        (0.5, 0.52, [True, False]),
        (0.3, 0.46, [True, False]),  # reaches the 10 % around 0.5
        (0.3, 0.44, [False, False]),
        (0.56, 2.5, [False, False]),
    ):
        assert [check.holds for check in gain_transition.verdict(with_crossing(low, high))] == expected

    def verdict(dataset):
        (found,) = gain_transition.EXPERIMENT.verdicts(dataset)
        return found

    elsewhere = verdict(with_crossing(chi * 0.95, chi * 1.05))
    assert elsewhere.word == "does not hold"
    assert "at σ_max = 1 for no kind of weights and input, and elsewhere for gaussian" in elsewhere.sentence
    assert elsewhere.sentence.endswith("The prediction, χ = 1, came true in every row.")
    there = verdict(with_crossing(0.5, 0.52))
    assert there.word == "holds"
    assert "at σ_max = 1 for gaussian, input variance 1; a chain" in there.sentence
    assert there.sentence.endswith("The prediction, χ = 1, failed for gaussian, input variance 1.")
    both = [with_crossing(0.5, 0.52), with_crossing(chi, chi).assign_coords(weights=("row", ["orthogonal"]))]
    assert verdict(xr.concat(both, dim="row").assign_attrs(tiny.attrs)).word == "holds only if"
    one_missing = with_crossing(0.5, 0.52)
    one_missing["crossing"][0, 1] = np.nan
    (check,) = gain_transition.verdict(one_missing)
    assert (check.holds, check.value) == (None, "1 of 3 seeds never cross")
    assert verdict(one_missing).word == "not decided"
    assert verdict(one_missing).sentence == (
        "the claim is not tried.  Not judged, since a crossing lies outside the gains swept: "
        "gaussian, input variance 1."
    )


def test_table_and_figure_are_drawn(tiny):
    assert gain_transition.table(tiny).row_count == 4
    drawn = gain_transition.figure(tiny)
    assert [axes.get_title() for axes in drawn.axes] == [
        "Gaussian weights, no input",
        "Gaussian weights, input variance 1",
        "orthogonal weights, no input",
        "orthogonal weights, input variance 1",
    ]


def test_interrupted_run_resumes(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, gains=(0.5, 2.6), weights=("gaussian",))
    original, calls = gain_transition._measure_row, []

    def interrupted(weights, variance, *rest):
        calls.append(variance)
        if calls == [0.0, 1.0]:
            raise KeyboardInterrupt
        return original(weights, variance, *rest)

    monkeypatch.setattr(gain_transition, "_measure_row", interrupted)
    with pytest.raises(SystemExit):
        command.execute(gain_transition.EXPERIMENT, config, command.Options(out=tmp_path))
    command.execute(gain_transition.EXPERIMENT, config, command.Options(out=tmp_path))
    assert calls == [0.0, 1.0, 1.0]
    stored = results.load(tmp_path / "gain_transition.nc", experiment="gain_transition")
    xr.testing.assert_equal(stored, gain_transition.run(config))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps: expected at least 2, found 1"),
        (["--fit-from", "50"], "--fit-from: expected a lag from 0 to 49 (steps − 1), found 50"),
        (["--gains", "1.0", "0.5"], "--gains: expected two or more positive numbers, rising"),
        (["--gains", "0", "0.5"], "--gains: expected two or more positive numbers, rising"),
        (["--input-variances", "-1"], "--input-variances: expected finite numbers of at least 0"),
        (["--weights", "gaussian", "gaussian"], "--weights: expected one value or more, each once"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(gain_transition.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.nc"))
