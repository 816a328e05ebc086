"""The experiment on the LSTM's memory path: its numbers by NumPy and autodiff, verdicts that follow the data."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import command, memory_path, results

TINY = dataclasses.replace(
    memory_path.SMOKE,
    forget_biases=(1.0, "chrono"),
    gains=(0.0, 1.0),
    crossed_biases=(1.0,),
    steps=100,
    crossed_steps=9,
    max_crossings=7,
    hidden_size=4,
    input_size=3,
)
CELL = rg.cells.lstm(3, 4)


@pytest.fixture(scope="module")
def tiny():
    return memory_path.run(TINY)


def run_of(forget_bias, steps, gain=1.0):
    """Parameters, inputs, states s_0 … s_T and gates of seed 1."""
    params, xs = memory_path.draw(forget_bias, "torch", 1, TINY, steps)
    params = params._replace(w_hh=jnp.float32(gain) * params.w_hh)
    trajectory = rg.unroll(CELL, params, CELL.init_state(), xs)
    states = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), CELL.init_state(), trajectory.states
    )
    return params, xs, states, trajectory.gates


def chain_by_autodiff(params, states, xs):
    """∂(h, c)_T/∂(h, c)_k for every k, newest first: Jacobians by autodiff, products in NumPy and float64."""

    def step(flat, x):
        new, _ = CELL.step(params, rg.cells.LSTMState(h=flat[:4], c=flat[4:]), x)
        return jnp.concatenate([new.h, new.c])

    flat = jnp.concatenate([states.h, states.c], axis=-1)[:-1]
    jacobians = np.asarray(jax.jit(jax.vmap(jax.jacfwd(step)))(flat, xs), np.float64)
    chain = [np.eye(8)]
    for jacobian in jacobians[::-1]:
        chain.append(chain[-1] @ jacobian)
    return np.stack(chain)


def test_dimensions_and_units(tiny):
    assert tiny.sizes["lag"] == len(memory_path.kept_lags(100)) == 11 + 18
    assert [tiny.sizes[dim] for dim in ("forget_bias", "seed", "path", "init", "forced", "gain")] == [2, 2, 3, 1, 2, 2]
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    assert (tiny["nonfinite_step"] == -1).all()
    assert (tiny["forced_nonfinite_step"] == -1).all()


@pytest.mark.parametrize("forget_bias", TINY.forget_biases)
def test_retention_by_numpy(tiny, forget_bias):
    params, xs, states, gates = run_of(forget_bias, 100)
    lags = memory_path.kept_lags(100)
    chain = chain_by_autodiff(params, states, xs)[lags]
    log_f = np.log(np.asarray(gates.f, np.float64))[::-1]
    direct = np.exp(np.concatenate([np.zeros((1, 4)), np.cumsum(log_f, axis=0)]))[lags]
    found = tiny["log_retention"].sel(forget_bias=memory_path.bias_name(forget_bias)).isel(seed=1)
    for path, values, size in (("direct", direct, 4), ("full", chain[:, 4:, 4:], 4), ("state", chain, 8)):
        norm = np.sqrt(np.sum(np.square(values).reshape(len(lags), -1), axis=1) / size)
        # float32 products of 100 steps against float64 ones along the same states: 1e-3 nats plus 1e-5 of the size
        np.testing.assert_allclose(found.sel(path=path), np.log(norm), atol=1e-3, rtol=1e-5)


def test_one_step_by_autodiff(tiny):
    """c_t as a function of c_{t−1}, through h_{t−1} = o ⊙ tanh c_{t−1} with o held, and with h_{t−1} held."""
    params, xs, states, gates = run_of(1.0, 100)
    at = np.arange(10, 100, 10)

    def followed(c, o, x):
        return CELL.step(params, rg.cells.LSTMState(h=o * jnp.tanh(c), c=c), x)[0].c

    def held(c, h, x):
        return CELL.step(params, rg.cells.LSTMState(h=h, c=c), x)[0].c

    jacobians = jax.jit(jax.vmap(jax.jacfwd(followed)))(states.c[at], gates.o[at - 1], xs[at])
    alone = jax.jit(jax.vmap(jax.jacfwd(held)))(states.c[at], states.h[at], xs[at])
    apart, norms, largest = [], [], []
    for jacobian, with_h_held, gate in zip(jacobians, alone, gates.f[at], strict=True):
        f, jacobian = np.asarray(gate, np.float64), np.asarray(jacobian, np.float64)
        np.testing.assert_allclose(with_h_held, np.diag(f), atol=1e-6)
        apart.append(np.linalg.norm(jacobian - np.diag(f)) / np.linalg.norm(f))
        norms.append(np.linalg.norm(jacobian, 2))
        largest.append(f.max())
    row = tiny.sel(forget_bias="1").isel(init=0, seed=1)
    for name, values in (("followed_apart", apart), ("followed_norm", norms), ("largest_f", largest)):
        np.testing.assert_allclose(row[name], np.median(values), rtol=1e-5)
    assert float(row["held_apart"]) < 1e-6


@pytest.mark.parametrize("forced", memory_path.FORCED)
def test_forced_gate_by_autodiff(tiny, forced):
    """∂c_T/∂c_k with h_k = o_k ⊙ tanh c_k as one derivative, at gain 1."""
    params, xs, states, gates = run_of(200.0 if forced else -200.0, 101)
    assert (gates.f == forced).all()

    def last(c, k, o):
        start = rg.cells.LSTMState(h=o * jnp.tanh(c), c=c)
        return rg.unroll(CELL, params, start, xs[k:]).final.c

    row = tiny.sel(forced=forced, gain=1.0).isel(seed=1)
    for lag in (1, 100) if forced else (1, 3):
        k = 101 - lag
        derivative = np.asarray(jax.jacfwd(last)(states.c[k], k, gates.o[k - 1]), np.float64)
        apart = np.linalg.norm(derivative - forced * np.eye(4)) / 2
        # the distance is between numbers near 1 at f = 1: float32 leaves 1e-6 of it
        np.testing.assert_allclose(np.exp(row["forced_log_apart"].sel(lag=lag)), apart, rtol=1e-3, atol=2e-6)


def test_forced_gate_is_exact_where_the_other_paths_are_closed(tiny):
    without_weights = tiny["forced_log_apart"].sel(gain=0.0)
    assert (without_weights == -np.inf).all()  # nothing is added at f = 1, nothing is left at f = 0
    direct = tiny["forced_log_direct"]
    assert (direct.sel(forced=1.0) == 0).all()
    assert (direct.sel(forced=0.0).isel(lag=slice(1, None)) == -np.inf).all()


def test_crossings_by_numpy(tiny):
    """Coefficients of ∏(D + εG), multiplied out."""
    params, xs, states, _ = run_of(1.0, 9)
    at = lambda t: rg.formulas.lstm_jacobian(params, jax.tree.map(lambda leaf: leaf[t], states), xs[t])
    parts = [np.eye(8)]
    for t in reversed(range(9)):
        d, g = (np.asarray(part, np.float64) for part in at(t))
        nothing = np.zeros((8, 8))
        stay, cross = [*parts, nothing], [nothing, *parts]
        parts = [a @ d + b @ g for a, b in zip(stay, cross, strict=True)]
    norms = np.array([np.linalg.norm(part[4:, 4:]) for part in parts])
    bands = [norms[0], norms[1], norms[2:4].sum(), norms[4:8].sum(), norms[8:].sum()]
    found = tiny["crossing_share"].isel(crossed_bias=0, seed=1).sel(crossed_lag=9)
    np.testing.assert_allclose(found, np.array(bands) / norms.sum(), rtol=1e-4, atol=1e-6)


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = memory_path.run(dataclasses.replace(TINY, first_seed=1, seeds=1))
    for name in memory_path.MEASURED:
        np.testing.assert_array_equal(alone[name].isel(seed=0), tiny[name].isel(seed=1))


def _with(dataset, changes):
    """A copy with measured values replaced, everything else made anew."""
    changed = dataset[list(memory_path.MEASURED)].copy(deep=True)
    for (name, where), value in changes.items():
        changed[name].loc[dict(where)] = value
    return memory_path.derive(changed)


EVERYWHERE = ()


def _verdict(dataset, claim):
    (found,) = [verdict for verdict in memory_path.EXPERIMENT.verdicts(dataset) if verdict.claim == claim]
    return found


def test_verdict_on_vanishing_follows_the_data(tiny):
    kept = ("log_retention", EVERYWHERE)
    assert _verdict(_with(tiny, {kept: np.log(0.011)}), "B1").word == "holds"
    gone = _verdict(_with(tiny, {kept: np.log(0.009)}), "B1")
    assert gone.word == "does not hold"
    assert "on the direct path at no forget bias, and in the full chain at no forget bias" in gone.sentence
    some = {kept: np.log(0.009), ("log_retention", (("path", "full"), ("forget_bias", "chrono"))): np.log(0.5)}
    some = _verdict(_with(tiny, some), "B1")
    assert some.word == "holds only if"
    assert "in the full chain at chrono." in some.sentence
    # the whole state decides nothing, nor do predictions
    state = {kept: np.log(0.009), ("log_retention", (("path", "state"),)): 0.0}
    assert _verdict(_with(tiny, state), "B1").word == "does not hold"
    assert "came out otherwise: full chain above ∏f: b_f = 1; full chain above ∏f: chrono" in gone.sentence
    short = tiny.assign_attrs(check_lag=50)
    assert _verdict(memory_path.derive(short[list(memory_path.MEASURED)]), "B1").word == "not decided"


def test_reference_numbers_are_checked_at_their_size(tiny):
    config = dataclasses.replace(TINY, hidden_size=32)
    at_size = tiny.copy().assign_attrs(config=results.json.dumps(command.config_dict(config)))
    names = [c.name for c in memory_path.verdict(at_size) if "norm of the" in c.name]
    assert len(names) == 2
    log_root = 0.5 * np.log(32)
    changes = {("log_retention", (("path", "direct"),)): np.log(10) * -12.1 - log_root}
    changes[("log_retention", (("path", "full"),))] = np.log(10) * -8.5 - log_root
    checks = [c for c in memory_path.verdict(_with(at_size, changes)) if "norm of the" in c.name]
    assert [(c.value, c.holds, c.decides) for c in checks] == [("10^-12.1", True, False), ("10^-8.5", False, False)]


def test_verdict_on_one_step_follows_the_data(tiny):
    off, held = ("followed_apart", EVERYWHERE), ("held_apart", EVERYWHERE)
    assert _verdict(_with(tiny, {off: 0.09}), "B2").word == "holds"
    only = _verdict(_with(tiny, {off: 0.3}), "B2")
    assert only.word == "holds only if"
    assert "it is an identity" in only.sentence
    assert "off by 0.3 of the forget gate's norm" in only.sentence
    assert "within a tenth at no forget bias" in only.sentence
    neither = _verdict(_with(tiny, {off: 0.3, held: 1e-3}), "B2")
    assert neither.word == "does not hold"
    assert "with h held it fails (off by 0.001)" in neither.sentence
    nan = _with(tiny, {off: np.nan, held: np.nan})
    assert [c.holds for c in memory_path.verdict(nan) if c.claim == "B2"] == [None] * 3


def test_verdict_on_forced_gates_follows_the_data(tiny):
    apart, one_step = ("forced_log_apart", EVERYWHERE), ("forced_log_apart", (("lag", 1),))
    assert _verdict(_with(tiny, {apart: np.log(0.09)}), "B5").word == "holds"
    far = _verdict(_with(tiny, {apart: np.log(3.0), one_step: np.log(0.05)}), "B5")
    assert far.word == "holds only if"
    assert "off by 0.05 of its size over one step and by 3 over 100 (within a tenth at no gain)" in far.sentence
    assert "at f = 0 0.05 of it pass one step through h (less than a tenth at gain 0, gain 1)" in far.sentence
    leaking = {apart: np.log(3.0), ("forced_log_direct", EVERYWHERE): np.log(0.5)}
    leaking = _verdict(_with(tiny, leaking), "B5")
    assert leaking.word == "does not hold"
    assert "closed they are not both exact" in leaking.sentence


def test_figures_show_every_row(tiny):
    main, one_step, forced, crossings = (picture.draw(tiny) for picture in memory_path.EXPERIMENT.pictures)
    left, right = main.axes
    assert len(left.lines) == 2 * 2 + 1  # two paths of two biases, and the level
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(memory_path._PATH_WORDS.values())
    labels = [text.get_text() for text in main.legends[0].get_texts()]
    assert labels[:2] == ["b_f = 1", "chrono"]
    assert "diag f_t, init: torch" in [text.get_text() for text in one_step.legends[0].get_texts()]
    assert [axes.get_title() for axes in forced.axes] == [
        "f = 1: distance from “unchanged”",
        "f = 0: what is not cut",
    ]
    assert [axes.get_title() for axes in crossings.axes] == ["b_f = 1"]
    assert [text.get_text() for text in crossings.legends[0].get_texts()] == ["0", "1", "2–3", "4–7", "8 or more"]


def test_interrupted_run_resumes(tiny, tmp_path, monkeypatch):
    original, measured = memory_path._measure_forced_row, []

    def counting(forced, gain, config):
        if len(measured) == 1 and not (tmp_path / "interrupted").exists():
            (tmp_path / "interrupted").touch()
            raise KeyboardInterrupt
        measured.append((forced, gain))
        return original(forced, gain, config)

    monkeypatch.setattr(memory_path, "_measure_forced_row", counting)
    parts = results.Parts(tmp_path, experiment="memory_path", config=command.config_dict(TINY))
    with pytest.raises(KeyboardInterrupt):
        memory_path.run(TINY, parts=parts)
    resumed = memory_path.run(TINY, parts=parts)
    assert measured == [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
    xr.testing.assert_equal(resumed, tiny)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "19"], "--steps: expected at least 20, found 19"),
        (["--crossed-steps", "0"], "--crossed-steps: expected at least 1, found 0"),
        (["--max-crossings", "5"], "--max-crossings: expected 1, 3, 7, 15 or so on, found 5"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--forget-biases", "nan"], "--forget-biases: expected finite numbers or chrono, each once"),
        (["--crossed-biases", "1", "1"], "--crossed-biases: expected finite numbers or chrono, each once"),
        (["--inits", "keras", "keras"], "--inits: expected one name or more, each once, found keras keras"),
        (["--gains", "1", "0.5"], "--gains: expected finite numbers of at least 0, rising, found (1.0, 0.5)"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(memory_path.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
