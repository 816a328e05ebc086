"""The experiment on the LSTM's largest exponent: its numbers by NumPy, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import command, lyapunov_gates, results

TINY = dataclasses.replace(
    lyapunov_gates.SMOKE, forget_biases=(0.0, 5.0), steps=64, transient=20, hidden_size=4, input_size=3, seeds=2
)


@pytest.fixture(scope="module")
def tiny():
    return lyapunov_gates.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny.sizes == {"forget_bias": 2, "seed": 2, "kind": 3, "followed": 2}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)


def test_exponents_by_numpy(tiny):
    """Seed 1, b_f = 5: one tangent pushed through explicit Jacobians, whole and with c held."""
    cell = rg.cells.lstm(3, 4, forget_bias=5.0)
    key_params, key_xs = jax.random.split(jax.random.key(1))
    params, xs = cell.init(key_params), jax.random.normal(key_xs, (84, 3))
    jacobians = np.asarray(rg.step_jacobians(cell, params, cell.init_state(), xs), np.float64)
    for kind, size in (("full", 8), ("held", 4)):
        tangent, growth = np.random.default_rng(0).normal(size=size), []
        for jacobian in jacobians:
            tangent = jacobian[:size, :size] @ tangent
            growth.append(np.log(np.linalg.norm(tangent)))
            tangent /= np.linalg.norm(tangent)
        found = float(tiny["exponent"].sel(kind=kind, forget_bias=5.0).isel(seed=1))
        # two tangents that start apart have settled after 20 steps to O(1) nats over the other 64
        np.testing.assert_allclose(found, np.mean(growth[20:]), atol=0.03)
    gates = rg.unroll(cell, params, cell.init_state(), xs).gates
    direct = np.max(np.mean(np.log(np.asarray(gates.f[20:], np.float64)), axis=0))
    np.testing.assert_allclose(tiny["exponent"].sel(kind="direct", forget_bias=5.0).isel(seed=1), direct, rtol=1e-4)


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = lyapunov_gates.run(dataclasses.replace(TINY, first_seed=1, seeds=1))
    np.testing.assert_array_equal(alone["exponent"].isel(seed=0), tiny["exponent"].isel(seed=1))


def _word(dataset):
    (verdict,) = lyapunov_gates.EXPERIMENT.verdicts(dataset)
    return verdict.word


def test_verdict_follows_the_data(tiny):
    deciding = [check for check in lyapunov_gates.verdict(tiny) if check.decides]
    assert [check.holds for check in deciding] == [False, False]
    assert _word(tiny) == "does not hold"
    full = tiny["exponent_median"].sel(kind="full")
    assert (
        f"from {float(full[0]):.4f} at b_f = 0 to {float(full[1]):.4f} at b_f = 5."
        in lyapunov_gates.summary(tiny)["E5"]
    )
    changed = tiny.copy(deep=True)
    changed["exponent"].loc[{"kind": "held"}] = changed["exponent"].sel(kind="full") + 0.05
    changed["exponent_median"].loc[{"kind": "held"}] = changed["exponent_median"].sel(kind="full")
    assert _word(changed) == "holds"
    assert "came out otherwise for c held, every b_f" in lyapunov_gates.summary(changed)["E5"]
    changed["exponent"].loc[{"kind": "held", "forget_bias": 5.0}] = -2.0
    assert _word(changed) == "holds only if"
    assert "The two agree at b_f = 0." in lyapunov_gates.summary(changed)["E5"]
    changed["exponent"][0, 0] = np.nan
    with pytest.raises(ValueError, match="b_f = 0: a seed gave no number, nothing to judge"):
        lyapunov_gates.verdict(changed)


def test_interrupted_run_resumes(tmp_path, monkeypatch):
    original, measured = lyapunov_gates._measure_row, []

    def counting(forget_bias, config):
        if measured == [0.0] and not (tmp_path / "interrupted").exists():
            (tmp_path / "interrupted").touch()
            raise KeyboardInterrupt
        measured.append(forget_bias)
        return original(forget_bias, config)

    monkeypatch.setattr(lyapunov_gates, "_measure_row", counting)
    with pytest.raises(SystemExit) as stopped:
        command.execute(lyapunov_gates.EXPERIMENT, TINY, command.Options(out=tmp_path / "o"))
    assert stopped.value.code == 130
    command.execute(lyapunov_gates.EXPERIMENT, TINY, command.Options(out=tmp_path / "o"))
    assert measured == [0.0, 5.0]
    resumed = results.load(tmp_path / "o" / "lyapunov_gates.nc", experiment="lyapunov_gates")
    xr.testing.assert_equal(resumed, lyapunov_gates.run(TINY))


def test_float64_leaves_the_setting_alone():
    double = lyapunov_gates.run(dataclasses.replace(TINY, dtype="float64", forget_biases=(1.0,), seeds=1))
    assert double["exponent"].dtype == np.float64
    assert double.attrs["dtype"] == "float64"
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "31"], "--steps: expected at least 32, found 31"),
        (["--transient", "-1"], "--transient: expected at least 0, found -1"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--forget-biases", "2", "1"], "--forget-biases: expected finite numbers, rising, found (2.0, 1.0)"),
        (["--forget-biases", "nan"], "--forget-biases: expected finite numbers"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(lyapunov_gates.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
