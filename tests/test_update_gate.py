"""The experiment on the GRU's update gate: its numbers by NumPy, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import expit

import rnngrad as rg
from experiments import command
from experiments import update_gate as experiment

TINY = dataclasses.replace(
    experiment.SMOKE, forget_biases=(0, 4, 10, 45), steps=12, lag_every=3, hidden_size=4, input_size=3, seeds=2,
    adding_steps=10, batch_size=2, updates=2, eval_every=1, sequences=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return experiment.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny.sizes == {
        "forget_bias": 4, "seed": 2, "path": 2, "lag": 5, "level": 3, "network": 2, "stage": 2, "between": 8, "unit": 4,
    }  # fmt: skip
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert tiny["chain_change"].dtype == np.float64
    assert not jax.config.jax_enable_x64


def _numbers(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def _step(params, h, x):
    """A step of the GRU, its Jacobian by central differences, and u."""
    n = len(h)

    def new(h):
        own, fed = params.w_ih @ x + params.b, params.w_hh @ h
        r, u = expit(own[:n] + fed[:n]), expit(own[n : 2 * n] + fed[n : 2 * n])
        return (1 - u) * np.tanh(own[2 * n :] + r * (fed[2 * n :] + params.b_m)) + u * h, u

    jacobian = np.stack([(new(h + e)[0] - new(h - e)[0]) / 2e-5 for e in 1e-5 * np.eye(n)], axis=1)
    return *new(h), jacobian


def test_limit_by_numpy(tiny):
    """Bias 4, seed 1: products of finite differences, and of u."""
    with jax.enable_x64(True):
        key_params, key_xs, key_h = jax.random.split(jax.random.key(1), 3)
        params = _numbers(rg.cells.gru(3, 4, forget_bias=4.0, dtype="float64").init(key_params))
        xs = np.asarray(jax.random.normal(key_xs, (12, 3), "float64"))
        h = start = np.asarray(jax.random.uniform(key_h, (4,), "float64", -1, 1))
    jacobians, kept = [], []
    for x in xs:
        h, u, jacobian = _step(params, h, x)
        jacobians.append(jacobian)
        kept.append(u)
    full, direct, curves = np.eye(4), np.ones(4), [(0.0, 0.0)]
    for jacobian, u in zip(reversed(jacobians), reversed(kept), strict=True):
        full, direct = full @ jacobian, direct * u
        curves.append((np.log(np.linalg.norm(full) / 2), np.log(np.linalg.norm(direct) / 2)))
    row = tiny.sel(forget_bias=4, seed=1)
    np.testing.assert_allclose(row["log_retention"], np.array(curves)[::3].T, atol=1e-6)  # stored in float32
    np.testing.assert_allclose(row["memory_change"], np.max(np.abs(h - start)), rtol=1e-9)
    np.testing.assert_allclose(row["chain_change"], np.linalg.norm(full - np.eye(4)) / 2, rtol=1e-6)


def test_a_closed_gate_keeps_all(tiny):
    closed = tiny.sel(forget_bias=45)
    assert (closed["memory_change"] == 0).all()
    assert (closed["chain_change"] == 0).all()
    assert (closed["log_retention"] == 0).all()


def test_network_by_numpy(tiny):
    """Seed 0, untrained: largest singular values and geometric means of u between steps 1 and 9 of ten."""
    model = rg.training.model([rg.cells.gru(2, 4)], 1)
    key_init = jax.random.split(jax.random.key(0), 3)[0]
    params = _numbers(model.init(jax.random.split(key_init)[0]).layers[0])
    values = np.asarray(jax.random.uniform(jax.random.fold_in(jax.random.key(0), 1), (2, 10)))
    curves, logs = [], []
    for sequence in values:
        h, jacobians = np.zeros(4), []
        for step, value in enumerate(sequence[:9]):
            h, u, jacobian = _step(params, h, np.array([value, step in (1, 9)]))
            if step > 1:
                jacobians.append(jacobian)
                logs.append(np.log(u))
        chains = [np.eye(4)]
        for jacobian in reversed(jacobians):
            chains.append(chains[-1] @ jacobian)
        curves.append([np.log(np.linalg.norm(chain, 2)) for chain in chains])
    found = tiny.sel(network=0, stage="untrained")
    np.testing.assert_allclose(found["log_between"].sel(path="full"), np.mean(curves, axis=0), atol=1e-4)
    np.testing.assert_allclose(found["kept_share"], np.sort(np.exp(np.mean(logs, axis=0))), rtol=1e-5)


def test_bias_for_a_share():
    biases = np.array([0.0, 1, 2, 4])
    curve = np.log([0.1, 0.6, 0.2, 0.8])  # above one half twice
    expected = 2 + 2 * np.log(0.5 / 0.2) / np.log(0.8 / 0.2)
    assert experiment._bias_for(biases, curve, 0.5) == pytest.approx(expected)
    assert np.isnan(experiment._bias_for(biases, curve, 0.9))  # never
    assert np.isnan(experiment._bias_for(biases, curve, 0.05))  # always


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = experiment.run(dataclasses.replace(TINY, forget_biases=(4, 45), first_seed=1, seeds=1, networks=1))
    both = tiny.sel(forget_bias=[4, 45])
    for name in experiment.MEASURED:
        at = {dim: -1 for dim in ("seed", "network") if dim in tiny[name].dims}
        np.testing.assert_array_equal(alone[name].isel(at), both[name].isel(at))


def _long(dataset, kept, left):
    """The dataset as if of a long run of networks that solve the task, with this u of the best unit, this retention."""
    changed = dataset.copy(deep=True)
    changed.attrs["config"] = dataset.attrs["config"].replace('"updates": 2', '"updates": 6000')
    changed["solved_update"][:] = 1_000.0
    changed["kept_share"].loc[{"stage": "trained", "unit": 3}] = kept
    changed["kept_share"].loc[{"stage": "trained", "unit": [0, 1, 2]}] = 0.5
    changed["log_between"].loc[{"stage": "trained", "between": 7}] = np.log(left)
    return changed


def test_verdict_follows_the_data(tiny):
    (short,) = experiment.EXPERIMENT.verdicts(tiny)
    assert short.word == "holds"  # the limit alone
    assert "Nothing can be said of trained networks: 0 of 2 solve the task" in short.sentence
    (claim,) = experiment.EXPERIMENT.verdicts(_long(tiny, 0.995, 0.8))
    assert claim.word == "holds"
    assert "with 1 of 4 units at u ≥ 0.99 between the marks" in claim.sentence
    assert "over these 7 steps 0.80 of the gradient is left" in claim.sentence
    (claim,) = experiment.EXPERIMENT.verdicts(_long(tiny, 0.98, 0.8))
    assert claim.word == "holds only if"
    assert "with 0 of 4 units" in claim.sentence
    changed = _long(tiny, 0.98, 0.1)
    for name in ("memory_change", "chain_change"):
        changed[name].loc[{"forget_bias": 45, "seed": 1}] = 1e-9
    (claim,) = experiment.EXPERIMENT.verdicts(changed)
    assert claim.word == "does not hold"
    open_gate = tiny.isel(forget_bias=slice(0, 3))
    assert experiment.EXPERIMENT.verdicts(open_gate)[0].word == "not decided"


def test_predictions_follow_the_data(tiny):
    changed = tiny.copy(deep=True)
    expected = rg.theory.forget_bias_for(0.5, 12)
    changed["bias_for_median"].loc[{"path": "full", "level": 0.5}] = expected + 0.4
    find = lambda dataset, words: next(c for c in experiment.verdict(dataset) if words in c.name)
    assert find(changed, "bias for 0.5").holds
    changed["bias_for_median"].loc[{"path": "full", "level": 0.5}] = expected + 0.6
    assert find(changed, "bias for 0.5").holds is False
    assert not find(changed, "bias for 0.5").decides
    twice = _long(tiny, 0.995, 0.8)
    assert find(twice, "direct path carries").holds
    twice["log_between"].loc[{"stage": "trained", "path": "direct"}] -= 2
    assert find(twice, "direct path carries").holds is False


def test_figure_shows_what_it_should(tiny):
    axes = experiment.figure(tiny).axes
    assert [a.get_title() for a in axes] == [
        "weights open, bias raised",
        "the limit, float64",
        "adding problem: the gates",
        "adding problem: the gradient",
    ]
    assert all(a.get_xlabel() and a.get_ylabel() for a in axes)
    limit = axes[1].get_lines()[0]
    assert limit.get_xdata().tolist() == [0, 4, 10]  # an exact zero has no place on a logarithmic axis
    np.testing.assert_allclose(limit.get_ydata(), tiny["chain_change_median"][:3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--networks", "0"], "--networks: expected at least 1, found 0"),
        (["--adding-steps", "9"], "--adding-steps: expected at least 10, found 9"),
        (["--forget-biases", "2", "1"], "--forget-biases: expected two finite numbers or more, rising"),
        (["--forget-biases", "2"], "--forget-biases: expected two finite numbers or more, rising"),
        (["--steps", "25"], "--steps: expected a multiple of 10, found 25"),
        (["--updates", "15"], "--updates: expected a multiple of 10, found 15"),
        (["--learning-rate", "-1"], "--learning-rate: expected a positive number, found -1"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(experiment.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
