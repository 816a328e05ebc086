"""The experiment on what is kept over 100 steps: its numbers by NumPy, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import command, hundred_steps
from experiments.claims import word_of

# 100 steps and ten seeds, so that the verdict is one
TINY = dataclasses.replace(
    hundred_steps.SMOKE,
    forget_biases=(0.0, 2.0, 4.0, 8.0),
    gains=(0.5, 1.0, 2.0, 3.0),
    steps=100,
    transient=5,
    hidden_size=4,
    input_size=3,
    seeds=10,
)


@pytest.fixture(scope="module")
def tiny():
    return hundred_steps.run(TINY)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def test_dimensions_and_units(tiny):
    assert dict(tiny.sizes) == {
        "scheme": 1, "gain": 4, "forget_bias": 4, "input_variance": 2, "seed": 10, "path": 3, "setting": 2, "cell": 2,
        "lag": 101,
    }  # fmt: skip
    assert all(tiny[name].attrs.get("units") for name in (*hundred_steps.MEASURED, "theory"))
    for name in ("lstm_nonfinite_step", "rnn_nonfinite_step", "nonfinite_step"):
        assert (tiny[name] == -1).all()


def drawn(seed):
    key_params, key_xs = jax.random.split(jax.random.key(seed))
    return key_params, np.asarray(jax.random.normal(key_xs, (105, 3)), np.float64)


def test_lstm_by_numpy(tiny):
    """Seed 3, gain 2, b_f = 4: 100 Jacobians of the state (c, h) written out block by block."""
    key_params, xs = drawn(3)
    params = rg.cells.lstm(3, 4, forget_bias=4.0, init=rg.initializers.gaussian(2.0)).init(key_params)
    w, u, b = (np.asarray(leaf, np.float64) for leaf in params)
    h, c, product, log_f = np.zeros(4), np.zeros(4), np.eye(8), np.zeros(4)
    for step, x in enumerate(xs):
        z = np.split(w @ x + u @ h + b, 4)
        i, f, g, o = sigmoid(z[0]), sigmoid(z[1]), np.tanh(z[2]), sigmoid(z[3])
        new = f * c + i * g
        u_i, u_f, u_g, u_o = np.split(u, 4)
        by_h = (g * i * (1 - i))[:, None] * u_i + (c * f * (1 - f))[:, None] * u_f + (i * (1 - g**2))[:, None] * u_g
        slope = o * (1 - np.tanh(new) ** 2)
        out = np.tanh(new) * o * (1 - o)
        jacobian = np.block([[np.diag(f), by_h], [np.diag(slope * f), slope[:, None] * by_h + out[:, None] * u_o]])
        if step >= 5:
            product, log_f = jacobian @ product, log_f + np.log(f)
        c, h = new, o * np.tanh(new)
    expected = {
        "direct": np.linalg.norm(np.exp(log_f)) / 2,
        "memory": np.linalg.norm(product[:4, :4]) / 2,
        "state": np.linalg.norm(product) / np.sqrt(8),
    }
    found = tiny["lstm"].sel(scheme="gaussian", gain=2.0, forget_bias=4.0, seed=3)
    for path, value in expected.items():
        # a float32 run of 105 steps parts from a float64 one by some 1e-5 of the state, and the chain by as much a step
        np.testing.assert_allclose(found.sel(path=path), np.log10(value), atol=2e-3)


def test_vanilla_by_numpy(tiny):
    """Seed 7, gain 1, input variance 0.1; and the torch row with its rate."""
    key_params, xs = drawn(7)
    init = rg.initializers.gaussian(1.0)
    for cell, scale, found in (
        (rg.cells.vanilla(3, 4, init=init), np.sqrt(0.1), tiny["rnn"].sel(gain=1.0, input_variance=0.1).isel(scheme=0)),
        (rg.cells.vanilla(3, 4), 1.0, tiny["kept"].sel(setting="torch", cell="vanilla", path="state")),
    ):
        w, u, b = (np.asarray(leaf, np.float64) for leaf in cell.init(key_params))
        h, hs = np.zeros(4), []
        for x in xs:
            h = np.tanh(scale * (w @ x) + u @ h + b)
            hs.append(h)
        product, log_scale, curve = np.eye(4), 0.0, [0.0]
        for h in reversed(hs[5:]):
            product = product @ np.diag(1 - h**2) @ u
            log_scale += np.log(np.linalg.norm(product))
            product /= np.linalg.norm(product)
            curve.append(log_scale - np.log(2))
        np.testing.assert_allclose(found.sel(seed=7), curve[-1] / np.log(10), atol=2e-3)
    slope = np.polyfit(np.arange(20, 101), curve[20:], 1)[0]
    np.testing.assert_allclose(tiny["rate"].sel(setting="torch", cell="vanilla", seed=7), slope, atol=1e-4)
    np.testing.assert_allclose(
        tiny["curve"].sel(setting="torch", cell="vanilla", seed=7), np.array(curve) / np.log(10), atol=2e-3
    )


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = hundred_steps.run(dataclasses.replace(TINY, first_seed=4, seeds=1))
    for name in ("lstm", "rnn"):
        # one sequence at a time, but a batch of weights is drawn at once: the last bit may differ
        np.testing.assert_allclose(alone[name].isel(seed=0), tiny[name].sel(seed=4), rtol=1e-4)


def test_crossings_and_settings_found():
    crossing = hundred_steps.first_crossing
    x = np.array([0.0, 1.0, 2.0, 3.0])
    assert crossing(x, np.array([-5.0, -1.0, -3.0, 1.0]), -2.0) == 0.75
    assert crossing(x, np.array([-1.0, -3.0, -2.5, -1.5]), -2.0) == 2.5
    assert np.isnan(crossing(x, np.array([-1.0, 0.0, 1.0, 2.0]), -2.0))
    # rnn = −30 + 20 gain reaches −10 at 1; there lstm = −6 + b_f + gain reaches −2 at 3
    gains, biases = xr.DataArray([0.5, 1.5], dims="gain"), xr.DataArray([0.0, 2.0, 4.0], dims="forget_bias")
    seeds = xr.DataArray([-0.1, 0.0, 0.1], dims="seed")
    dataset = xr.Dataset(
        {
            "rnn": (-30 + 20 * gains + seeds).expand_dims(scheme=["gaussian"], input_variance=[1.0]),
            "lstm": (-6 + biases + gains + seeds).expand_dims(scheme=["gaussian"], path=["memory"]),
        },
        coords={"gain": gains, "forget_bias": biases},
    )
    assert hundred_steps.settings_found(dataset, "gaussian") == (1.0, 3.0)
    dataset["rnn"] = dataset["rnn"] - 100
    assert np.isnan(hundred_steps.settings_found(dataset, "gaussian")).all()


def decide(dataset):
    return {check.name: check.holds for check in hundred_steps.verdict(dataset) if check.decides}


def test_verdict_follows_the_data(tiny):
    as_claimed = tiny.copy(deep=True)
    kept = as_claimed["kept"]
    kept.loc[{"cell": "lstm"}] = -2.3
    kept.loc[{"cell": "vanilla"}] = -10.6
    # both maps run through the claim's figures: −2 at b_f = 3, −10 at gain 1.5
    as_claimed["lstm"] = xr.zeros_like(tiny["lstm"]) + as_claimed["forget_bias"] - 5
    as_claimed["rnn"] = xr.zeros_like(tiny["rnn"]) + 4 * as_claimed["gain"] - 16
    as_claimed["found_gain"][:], as_claimed["found_forget_bias"][:] = 1.5, 3.0
    as_claimed["rate"][:] = -0.23
    checks = hundred_steps.verdict(as_claimed)
    assert word_of(checks) == "holds"
    assert {c.value for c in checks if "at some" in c.name} == {"b_f = 3.00 [3.00, 3.00]", "gain 1.50 [1.50, 1.50]"}
    assert "Both figures hold at once" in hundred_steps.summary(as_claimed)["B8"]

    # at a library's defaults one is off by more than a decade
    changed = as_claimed.copy(deep=True)
    changed["kept"].loc[{"setting": "torch", "cell": "vanilla"}] = -11.5
    assert [name for name, holds in decide(changed).items() if not holds] == ["RNN at the defaults of torch"]
    assert word_of(hundred_steps.verdict(changed)) == "holds only if"
    assert "10^-11.5 [-11.5, -11.5] (torch)" in hundred_steps.summary(changed)["B8"]
    # the interval decides: its median lies inside
    changed["kept"].loc[{"setting": "torch", "cell": "vanilla"}] = np.tile(np.r_[[-10.9] * 6, [-11.5] * 4][:, None], 3)
    assert decide(changed)["RNN at the defaults of torch"] is False

    # nowhere on the map, no setting to try
    changed = as_claimed.copy(deep=True)
    changed["lstm"] -= 20
    changed["found_gain"][:], changed["found_forget_bias"][:] = np.nan, np.nan
    changed["kept"][:] = -50.0
    changed["kept"].loc[{"setting": "found-gaussian"}] = np.nan
    changed["rate"].loc[{"setting": "found-gaussian"}] = np.nan
    holds = decide(changed)
    assert holds.pop("RNN, gaussian weights: 10^-10 at some gain") is True
    assert set(holds.values()) == {False}
    assert "No setting on the map" in hundred_steps.summary(changed)["B8"]
    changed["rnn"] -= 20
    assert word_of(hundred_steps.verdict(changed)) == "does not hold"
    assert "came out otherwise for b_f at which ∏f" in hundred_steps.summary(changed)["B8"]

    # another length says nothing about the claim
    assert word_of(hundred_steps.verdict(as_claimed.isel(lag=slice(0, 50)))) == "not decided"


def test_pictures(tiny):
    drawn = hundred_steps.figure(tiny)
    panels = drawn.axes[:3]
    assert [axes.get_title() for axes in panels] == [
        "LSTM: true chain of c",
        "LSTM: direct path ∏f",
        "vanilla RNN: chain of h",
    ]
    dotted = panels[1].lines[0].get_xdata()[0]
    assert abs(dotted - 3.05) < 0.01
    assert drawn.axes[-1].get_ylabel().startswith("log10 of the gradient kept over 100 steps")
    left, right = hundred_steps.curves(tiny).axes
    curve = next(line for line in right.lines if line.get_label() == "torch")
    np.testing.assert_allclose(curve.get_ydata(), tiny["curve_median"].sel(setting="torch", cell="vanilla"))
    assert any(-2 in np.asarray(line.get_ydata()) for line in left.lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps: expected at least 2, found 1"),
        (["--gains", "1.0"], "--gains: expected 2 or more numbers of at least 0, rising, found (1.0,)"),
        (["--forget-biases", "2", "1"], "--forget-biases: expected 2 or more finite numbers, rising, found (2.0, 1.0)"),
        (["--input-variances", "0.5"], "--input-variances: expected 1 among them, where the LSTM is measured"),
        (["--libraries", "torch", "torch"], "--libraries: expected one or more names, each once, found torch torch"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(hundred_steps.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
