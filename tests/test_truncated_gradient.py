"""The experiment on the truncated LSTM gradient: numbers by autodiff, verdicts that follow the data, user errors."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import command, results, truncated_gradient

TINY = dataclasses.replace(
    truncated_gradient.SMOKE,
    steps=(2, 6),
    forget_biases=(0.0, "chrono"),
    hidden_size=4,
    input_size=3,
    classes=3,
    seeds=2,
)


@pytest.fixture(scope="module")
def tiny():
    return truncated_gradient.run(TINY)


def test_dimensions_and_units(tiny):
    assert tiny.sizes == {"steps": 2, "forget_bias": 2, "seed": 2, "loss": 2, "block": 5}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)


@pytest.mark.parametrize("loss", truncated_gradient.LOSSES)
def test_error_and_cosine_by_autodiff(tiny, loss):
    """Seed 1, chrono, T = 6: cross-entropy as a number, differentiated with and without h stopped at the gates."""
    params, xs, read_out, classes = truncated_gradient.draw("chrono", 1, TINY)
    cell = rg.cells.lstm(3, 4)

    def cross_entropy(params, read):
        def step(state, x):
            z = cell.preactivate(params, state._replace(h=read(state.h)), x)
            new, _ = cell.update(params, z, state)
            return new, new.h

        h = jax.lax.scan(step, cell.init_state(), xs)[1]
        at_each = -jnp.take_along_axis(jax.nn.log_softmax(h @ read_out.T), classes[:, None], axis=-1)[:, 0]
        return at_each[-1] if loss == "last" else jnp.mean(at_each)

    differentiated = lambda read: jax.jit(jax.grad(functools.partial(cross_entropy, read=read)))(params)
    true, truncated = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), differentiated(read))
        for read in (lambda h: h, jax.lax.stop_gradient)
    )
    for gate, block in enumerate(truncated_gradient.BLOCKS):
        at = slice(None) if block == "total" else slice(4 * gate, 4 * gate + 4)
        a, b = (np.concatenate([leaf[at].ravel() for leaf in gradient]) for gradient in (truncated, true))
        found = tiny.sel(loss=loss, block=block, forget_bias="chrono", steps=6).isel(seed=1)
        # two float32 gradients, each good to 1e-6 of its norm, and their difference has about a tenth of it
        np.testing.assert_allclose(found["error"], np.linalg.norm(a - b) / np.linalg.norm(b), rtol=1e-4, atol=1e-6)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        np.testing.assert_allclose(found["cosine"], cosine, rtol=0, atol=1e-5)
    assert found["error"] > 1e-3  # two gradients, not one twice


def test_shorter_runs_are_the_beginnings_of_longer_ones(tiny):
    """And seeds draw alike however many there are; chrono follows the longest T, so it must stay."""
    alone = truncated_gradient.run(dataclasses.replace(TINY, steps=(6,), first_seed=1, seeds=1))
    np.testing.assert_array_equal(alone["error"].isel(seed=0, steps=0), tiny["error"].isel(seed=1, steps=1))
    draws = [truncated_gradient.draw(0.0, 3, dataclasses.replace(TINY, steps=steps)) for steps in ((6,), (2, 6))]
    jax.tree.map(np.testing.assert_array_equal, *draws)


def _with(dataset, **changes):
    """A copy with every error and cosine replaced, medians and intervals made anew."""
    changed = dataset[list(truncated_gradient.MEASURED)].copy(deep=True)
    for name, value in changes.items():
        changed[name][...] = value
    return truncated_gradient.derive(changed)


def test_verdict_follows_the_data(tiny):

    def verdict(dataset):
        (found,) = truncated_gradient.EXPERIMENT.verdicts(dataset)
        return found

    granted = _with(tiny, error=0.05, cosine=0.99)
    assert verdict(granted).word == "holds"
    assert "The direction is kept." in verdict(granted).sentence
    refuted = _with(tiny, error=0.5, cosine=0.5)
    assert verdict(refuted).word == "does not hold"
    assert "off by 50% to 50%" in verdict(refuted).sentence
    assert "Nor is the direction kept: cosine 0.50" in verdict(refuted).sentence
    # the direction decides nothing
    assert verdict(_with(tiny, error=0.05, cosine=0.5)).word == "holds"
    # one length is enough to refute, one gate is not: the claim is about the whole gradient
    granted["error"].loc[{"steps": 6, "forget_bias": "0", "block": "total"}] = 0.3
    granted["error"].loc[{"forget_bias": "chrono", "block": "f"}] = 0.3
    some = verdict(truncated_gradient.derive(granted))
    assert some.word == "holds only if"
    assert "within 10% at every length for last, b_f = chrono; all, b_f = chrono." in some.sentence
    granted["error"][0, 0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="a seed gave no number, nothing to judge"):
        truncated_gradient.verdict(granted)


def test_predictions_are_checked_where_they_apply(tiny):
    names = lambda dataset: [c.name for c in truncated_gradient.verdict(dataset) if c.name.startswith("prediction")]
    assert names(tiny) == []
    as_predicted = _with(tiny, error=0.3).assign_coords(steps=[10, 100], forget_bias=["0", "5"])
    assert len(names(as_predicted)) == 4
    sentence = truncated_gradient.summary(as_predicted)["T1"]
    assert "out otherwise: more error at b_f = 5 than at 0: last; more" in sentence
    assert not any(c.decides for c in truncated_gradient.verdict(as_predicted) if c.name in names(as_predicted))
    as_predicted["error"].loc[{"forget_bias": "5"}] = 0.6
    assert "otherwise" not in truncated_gradient.summary(truncated_gradient.derive(as_predicted))["T1"]


def test_figure_shows_both_losses_and_every_bias(tiny):
    drawn = truncated_gradient.figure(tiny)
    assert [axes.get_title() for axes in drawn.axes[:2]] == ["loss of the last step", "mean loss of all steps"]
    assert [text.get_text() for text in drawn.axes[1].get_legend().get_texts()] == ["b_f = 0", "chrono"]
    np.testing.assert_allclose(
        drawn.axes[0].lines[0].get_ydata(), tiny["error_median"].sel(loss="last", block="total", forget_bias="0")
    )


def test_interrupted_run_resumes(tmp_path, monkeypatch):
    original, measured = truncated_gradient._measure_row, []

    def counting(steps, config):
        if measured == [2] and not (tmp_path / "interrupted").exists():
            (tmp_path / "interrupted").touch()
            raise KeyboardInterrupt
        measured.append(steps)
        return original(steps, config)

    monkeypatch.setattr(truncated_gradient, "_measure_row", counting)
    with pytest.raises(SystemExit) as stopped:
        command.execute(truncated_gradient.EXPERIMENT, TINY, command.Options(out=tmp_path / "o"))
    assert stopped.value.code == 130
    command.execute(truncated_gradient.EXPERIMENT, TINY, command.Options(out=tmp_path / "o"))
    assert measured == [2, 6]
    resumed = results.load(tmp_path / "o" / "truncated_gradient.nc", experiment="truncated_gradient")
    xr.testing.assert_equal(resumed, truncated_gradient.run(TINY))


def test_float64_leaves_the_setting_alone():
    config = dataclasses.replace(TINY, dtype="float64", forget_biases=(1.0,), seeds=1)
    double = truncated_gradient.run(config)
    assert double["error"].dtype == np.float64
    assert double.attrs["dtype"] == "float64"
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1", "5"], "--steps: expected numbers of at least 2, rising, found (1, 5)"),
        (["--steps", "5", "5"], "--steps: expected numbers of at least 2, rising, found (5, 5)"),
        (["--classes", "1"], "--classes: expected at least 2, found 1"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--forget-biases", "chrono", "chrono"], "--forget-biases: expected finite numbers or chrono, each once"),
        (["--forget-biases", "nan"], "--forget-biases: expected finite numbers or chrono"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(truncated_gradient.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
