"""The bounds experiment: its numbers by NumPy, the counter-example by hand, and verdicts that follow the data."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import scipy.special
import xarray as xr

import rnngrad as rg
from experiments import bounds, command, results
from rnngrad import theory  # noqa: F401  (the experiment takes it from the package)

TINY = dataclasses.replace(bounds.SMOKE, steps=12, hidden_size=5, input_size=3, seeds=2)


@pytest.fixture(scope="module")
def tiny():
    return bounds.run(TINY)


def inputs_of(seed, cell):
    """Parameters and inputs that the experiment draws for a seed, in float64."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), 2)
        params = jax.tree.map(np.asarray, cell.init(keys[0]))
        return params, np.asarray(jax.random.normal(keys[1], (12, 3), "float64"))


def test_rows_dimensions_and_units(tiny):
    assert bounds.rows_of(TINY) == [
        ("tanh", "torch"),
        ("tanh", "orthogonal"),
        ("sigmoid", "torch"),
        ("sigmoid", "orthogonal"),
    ]
    assert tiny.sizes == {"row": 4, "seed": 2, "lag": 13, "lstm": 2, "step": 11}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert tiny["log_chain"].dtype == np.float64
    assert not jax.config.jax_enable_x64


def test_chain_and_bound_by_numpy(tiny):
    """Sigmoid, torch, seed 1: product of diag(h (1 − h)) U."""
    params, xs = inputs_of(1, rg.cells.vanilla(3, 5, dtype="float64"))
    h, jacobians = np.zeros(5), []
    for x in xs:
        h = scipy.special.expit(params.w_ih @ x + params.w_hh @ h + params.b)
        jacobians.append((h * (1 - h))[:, None] * params.w_hh)
    chain, log_norm = np.eye(5), [0.0]
    for jacobian in reversed(jacobians):
        chain = chain @ jacobian
        log_norm.append(np.log(np.linalg.norm(chain, 2)))
    row = tiny.isel(row=2, seed=1)
    np.testing.assert_allclose(row["log_chain"], log_norm, rtol=1e-10, atol=1e-12)
    rate = np.log(np.linalg.norm(params.w_hh, 2) / 4)
    np.testing.assert_allclose(row["bound_rate"], rate, rtol=1e-12)
    np.testing.assert_allclose(row["looseness"], (12 * rate - log_norm[-1]) / np.log(10), rtol=1e-9)
    np.testing.assert_allclose(row["looseness_slope_1"] - row["looseness"], 12 * np.log10(4), rtol=1e-12)
    np.testing.assert_allclose(row["rate_slope_1"], rate + np.log(4), rtol=1e-9)
    np.testing.assert_allclose(row["excess"], np.max(log_norm[1:] - rate * np.arange(1, 13)), rtol=1e-9)
    radius = np.log(np.abs(np.linalg.eigvals(params.w_hh)).max() / 4)
    np.testing.assert_allclose(row["radius_excess"], np.max(log_norm[1:] - radius * np.arange(1, 13)), rtol=1e-9)


def test_gated_term_by_numpy(tiny):
    """Orthogonal, seed 0: the term and its bound written out, c and h by a loop."""
    cell = rg.cells.lstm(3, 5, init="orthogonal", forget_bias=1.0, dtype="float64")
    params, xs = inputs_of(0, cell)
    h, c, o = np.zeros(5), np.zeros(5), None
    terms, limits = [], []
    u_i, u_f, u_g, _ = np.split(params.w_hh, 4)
    for x in xs:
        z = params.w_ih @ x + params.w_hh @ h + params.b
        i, f, _, new_o = (scipy.special.expit(part) for part in np.split(z, 4))
        g = np.tanh(np.split(z, 4)[2])
        if o is not None:
            weights = (g * i * (1 - i), c * f * (1 - f), i * (1 - g**2))
            by_h = sum(np.diag(weight) @ u for weight, u in zip(weights, (u_i, u_f, u_g), strict=True))
            to_c = o * (1 - np.tanh(c) ** 2)
            terms.append(np.linalg.norm(by_h * to_c[None], 2))
            longest = np.sqrt(sum(weight**2 for weight in weights)).max()
            limits.append(np.linalg.norm(np.concatenate([u_i, u_f, u_g]), 2) * longest * to_c.max())
        c = f * c + i * g
        o, h = new_o, new_o * np.tanh(c)
    row = tiny.isel(lstm=1, seed=0)
    np.testing.assert_allclose(row["log_gate_term"], np.log(terms), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(row["log_gate_bound"], np.log(limits), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(row["gate_excess"], np.max(np.log(terms) - np.log(limits)), rtol=1e-8)
    assert (row["log_gate_worst"] >= row["log_gate_bound"]).all()


def test_counter_example_by_hand(tiny):
    """(diag(1, 0) U)^k = 2^(k−1) [[2, −2], [0, 0]], of norm 2^k √2, while U² = 0."""
    np.testing.assert_array_equal(bounds.COUNTER_EXAMPLE @ bounds.COUNTER_EXAMPLE, 0)
    lags = np.arange(1, 13)
    np.testing.assert_allclose(tiny["counter_log_chain"][1:], lags * np.log(2) + 0.5 * np.log(2), rtol=1e-12)
    assert tiny["counter_radius"] < 1e-7  # a double eigenvalue is found to √eps at worst
    np.testing.assert_allclose(tiny["counter_bound_rate"], np.log(4), rtol=1e-12)


def test_derived_quantities_recompute(tiny):
    names = [name for name in tiny.data_vars if name not in bounds.MEASURED]
    again = bounds.derive(tiny.drop_vars(names).copy())
    for name in names:
        np.testing.assert_array_equal(again[name], tiny[name])


def test_verdict_follows_the_data(tiny):
    identity, true, decays, eigenvalue = "product = derivative", "bound true", "decays as", "largest eigenvalue"
    true_with_1, says_something, gates = "with σ' ≤ 1 the bound is true", "with σ' ≤ 1 the bound says", "gated term"

    def found(prefix, dataset):
        return [check.holds for check in bounds.verdict(dataset) if check.name.startswith(prefix)]

    def words(dataset):
        return [verdict.word for verdict in bounds.EXPERIMENT.verdicts(dataset)]

    assert found(identity, tiny) == found(true, tiny) == found(true_with_1, tiny) == [True]
    assert found(eigenvalue, tiny) == [False, False]
    assert found(gates, tiny) == [True, True]
    assert found("prediction", tiny) == []  # made for lag 100 only
    assert words(tiny)[2] == "holds"
    changed = tiny.copy(deep=True)
    changed["log_identity_error"][0, 0] = np.log(2e-10)
    changed["excess"][1, 1] = 1e-3
    changed["gate_excess"][1, 0] = 1e-3
    changed["looseness_high"][:] = [0.9, 1.1, 0.9, 1.1]
    changed["rate_slope_1_high"][2:] = [-0.01, 0.0]
    changed["log_chain"][3, 1, 5] = 1.0  # above σ_max^5 = 1 of orthogonal weights
    assert found(identity, changed) == found(true, changed) == found(true_with_1, changed) == [False]
    assert found(gates, changed) == [True, False]
    assert found(decays, changed) == [True, False, True, False]
    assert found(says_something, changed) == [True, False]
    assert words(changed) == ["holds only if"] * 3
    text = bounds.summary(changed)
    assert "it is broken; read as an upper bound" in text["A1"]
    assert "it is broken at every lag" in text["A1"]
    assert "close only for tanh, torch; sigmoid, torch" in text["A1"]
    assert "largest eigenvalue for β_W the bound is broken" in text["A1"]
    assert "with σ' ≤ 1 the bound is broken" in text["A2"]
    assert "excludes that the chain grows, for torch." in text["A2"]
    assert "exceeds γ_w γ_x γ_h for orthogonal" in text["B4"]
    text = bounds.summary(tiny)
    assert "read as an identity it is exact" in text["A1"]
    assert "it is true at every lag" in text["A1"]
    assert "stays below γ_w γ_x γ_h at every step" in text["B4"]


def test_without_sigmoid_a2_is_not_decided(tiny):
    tanh = tiny.isel(row=tiny["activation"].values == "tanh")
    verdict = bounds.EXPERIMENT.verdicts(tanh)[1]
    assert (verdict.claim, verdict.word) == ("A2", "not decided")
    assert "no sigmoid row" in verdict.sentence


def test_prediction_is_checked_at_its_lag(tiny):
    at_lag = tiny.copy(deep=True).assign_attrs(check_lag=bounds.CHECK_LAG)
    at_lag = at_lag.reindex(lag=np.arange(101), fill_value=0.0)
    at_lag["looseness_low"][:] = [12, 30, 10.5, 11]
    (check,) = [check for check in bounds.verdict(at_lag) if not check.decides]
    assert check.holds
    at_lag["looseness_low"][2] = 9.5
    (check,) = [check for check in bounds.verdict(at_lag) if not check.decides]
    assert not check.holds
    assert "predicted looseness came out smaller" in bounds.summary(at_lag)["A1"]


def test_table_and_figure_are_drawn(tiny):
    assert bounds.table(tiny).row_count == 6
    drawn = bounds.figure(tiny)
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles[:2] == ["vanilla RNN, tanh", "vanilla RNN, sigmoid"]
    assert len(titles) == 4
    low, high = tiny["looseness_median"].values[:2].min(), tiny["looseness_median"].values[:2].max()
    assert f"10^{low:.0f} to 10^{high:.0f} times the truth" in drawn.axes[0].texts[0].get_text()


def test_interrupted_run_resumes(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, activations=("tanh",), inits=("torch",))
    original, calls = bounds._measure_gate_row, []

    def interrupted(init, config):
        calls.append(init)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(init, config)

    monkeypatch.setattr(bounds, "_measure_gate_row", interrupted)
    with pytest.raises(SystemExit):
        command.execute(bounds.EXPERIMENT, config, command.Options(out=tmp_path))

    def again(*_):
        raise AssertionError("this part was already measured")

    monkeypatch.setattr(bounds, "_measure_row", again)
    command.execute(bounds.EXPERIMENT, config, command.Options(out=tmp_path))
    monkeypatch.undo()
    stored = results.load(tmp_path / "bounds.nc", experiment="bounds")
    xr.testing.assert_equal(stored, bounds.run(config))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps: expected at least 2, found 1"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--inits", "torch", "torch"], "--inits: expected one name or more, each once, found torch torch"),
        (["--forget-bias", "nan"], "--forget-bias: expected a finite number, found nan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(bounds.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.nc"))
