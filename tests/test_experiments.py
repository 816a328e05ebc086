"""The command line of every experiment, and the retention experiment.  Claims and stored results: test_claims."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import scipy.special
import xarray as xr

import rnngrad as rg
from experiments import command, registry, report, reproduction, results, retention

ROOT = Path(__file__).resolve().parent.parent
NAMES = registry.NAMES
STORED = ROOT / "experiments" / "results"

TINY = dataclasses.replace(
    retention.SMOKE,
    cells=("lstm", "vanilla"),
    inits=("torch", "chrono"),
    steps=30,
    hidden_size=5,
    input_size=4,
    seeds=2,
)


def run_command(*words, cwd, name="retention", **environment):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT), **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def tiny():
    return retention.run(TINY)


# --- the shape of every experiment -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retention", "memory_path", "penn_treebank"])
def test_smoke_writes_a_table_its_figures_and_a_result(name, tmp_path):
    """One with a picture, one with several, one that trains on text; all others run in ``all --smoke`` (CI)."""
    code, out, err = run_command("--smoke", "--out", str(tmp_path / "o"), cwd=tmp_path, name=name)
    assert code == 0, err
    assert "Checks" in out
    (experiment,) = registry.experiments([name])
    for claim in experiment.claims:
        assert f"\n{claim.id} " in out
    pictures = [file.name for file in experiment.picture_files(tmp_path)]
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == sorted([f"{name}.nc", *pictures])
    stored = results.load(tmp_path / "o" / f"{name}.nc", experiment=name)
    assert stored.attrs["command"].startswith(f"python -m experiments.{name}")
    for file in pictures:
        picture = matplotlib.image.imread(tmp_path / "o" / file)
        assert picture.shape[0] > 300
        assert picture.std() > 0.03  # something is drawn
    # shown again from the file alone: the same table
    code, again, err = run_command(
        "--show", str(tmp_path / "o" / f"{name}.nc"), "--out", str(tmp_path / "p"), cwd=tmp_path, name=name
    )
    assert code == 0, err
    assert again.splitlines()[:-1] == out.splitlines()[-len(again.splitlines()) : -1]


@pytest.mark.parametrize("name", NAMES)
def test_help_describes_every_setting(name, capsys):
    (experiment,) = registry.experiments([name])
    with pytest.raises(SystemExit) as stopped:
        command.main(experiment, ["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(experiment.default):
        assert f"--{field.name.replace('_', '-')}" in out
    assert "--smoke" in out
    assert "--show" in out
    assert "Not documented" not in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lyapunov_gates", "truncated_gradient", "gain_transition"])
def test_a_rerun_with_the_same_seeds_agrees_with_the_stored_result(name, tmp_path):
    (experiment,) = registry.experiments([name])
    command.execute(experiment, experiment.default, command.Options(out=tmp_path))
    now, stored = reproduction.standing(experiment, tmp_path), reproduction.standing(experiment, STORED)
    agreement = report.against(now, stored)
    assert agreement is not None
    assert agreement.num_compared > 10
    assert all(agreement.same_words.values())
    assert agreement.num_outside == 0, agreement


def _table_text(dataset):
    import rich.console

    console = rich.console.Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(retention.table(dataset))
    return console.export_text()


def test_readme_shows_the_numbers_of_the_stored_result():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    stored = results.load(STORED / "retention.nc", experiment="retention")
    for row in retention.markdown_rows(stored):
        assert row in readme
    assert stored.attrs["command"] in readme


def test_readme_example_runs(capsys, tmp_path, monkeypatch):
    """The blocks of code in the README, as a reader would paste them one after the other."""
    monkeypatch.chdir(tmp_path)  # a log is written
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    names["watch"].close()
    assert names["flow"].direct.c.shape == (1000, 128)
    diagnosis, numbers = capsys.readouterr().out.rsplit("state kept in float32.\n\n", 1)
    (quoted,) = re.findall(r"```text\n(.*?)```", readme, flags=re.DOTALL)
    assert " ".join(quoted.split()) in diagnosis
    assert [record["step"] for record in rg.training.read_jsonl(tmp_path / "flow.jsonl")] == [1, 100, 200]
    nats, death, certificate, rate = numbers.splitlines()
    assert float(nats.split()[0]) > float(nats.split()[1])  # the true chain is larger than the direct path
    assert int(death) > 0
    assert certificate.startswith("Certificate(dtype='float32'")
    assert float(rate) < 0


# --- retention -------------------------------------------------------------------------------------------------------


def test_rows_and_dimensions(tiny):
    assert list(zip(tiny["cell"].values, tiny["init"].values, strict=True)) == [
        ("lstm", "torch"),
        ("lstm", "chrono"),
        ("vanilla", "torch"),  # chrono sets gate biases, so a vanilla cell has no such row
    ]
    assert tiny.sizes == {"row": 3, "seed": 2, "path": 3, "lag": 31}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)


def test_numbers_equal_those_computed_by_hand(tiny):
    """One seed of one row again, through the public functions, in NumPy where they end."""
    text = rg.tasks.load_text("pydoc")
    tokens = rg.tasks.tokenize(text.text, level="word")
    window = rg.tasks.sequences(tokens, 30, 1, seed=1)[0]
    keys = jax.random.split(jax.random.key(1), 3)
    cell = rg.cells.lstm(4, 5)
    params, state = cell.init(keys[0]), cell.init_state()
    xs = jax.random.normal(keys[1], (len(tokens.vocabulary), 4))[window[:-1]]
    row = tiny.isel(row=0, seed=1)
    for path in retention.PATHS:
        curve = rg.retention(cell, params, state, xs, of="c", wrt="c", path=path)
        np.testing.assert_allclose(row["log_retention"].sel(path=path), curve.log_norm, rtol=1e-5, atol=1e-5)

    read_out = jax.random.uniform(keys[2], (len(tokens.vocabulary), 5), minval=-(5**-0.5), maxval=5**-0.5)

    def loss(nudges):
        """The loss when every state s_0 … s_T is nudged: its gradient at 0 is ∂L/∂s_k for every k."""
        add = lambda s, nudge: jax.tree.map(jnp.add, s, nudge)
        at = lambda k: jax.tree.map(lambda leaf: leaf[k], nudges)

        def body(carry, inputs):
            nudge, x = inputs
            return cell.step(params, add(carry, nudge), x)[0], None

        final, _ = jax.lax.scan(body, state, (jax.tree.map(lambda leaf: leaf[:-1], nudges), xs))
        return -jax.nn.log_softmax(read_out @ add(final, at(-1)).h)[window[-1]]

    nothing = jax.tree.map(lambda leaf: jnp.zeros((31, *leaf.shape)), state)
    gradient = jax.jit(jax.grad(loss))(nothing)
    sizes = np.sqrt(np.sum(np.square(gradient.h) + np.square(gradient.c), axis=1))[::-1]  # by lag
    np.testing.assert_allclose(np.exp(row["log_loss_gradient"]), sizes, rtol=1e-3)
    np.testing.assert_allclose(row["last_steps_share"], sizes[:10].sum() / sizes.sum(), rtol=1e-3)


def test_a_seed_is_the_same_alone_and_among_others(tiny):
    alone = retention.run(dataclasses.replace(TINY, first_seed=1, seeds=1))
    np.testing.assert_array_equal(alone["log_retention"].isel(seed=0), tiny["log_retention"].isel(seed=1))


def test_rate_is_the_slope_of_the_stored_curve(tiny):
    curve = tiny["log_retention"].isel(row=0, seed=0).sel(path="full")
    slope = np.polyfit(curve["lag"][20:], curve[20:], 1)[0]
    np.testing.assert_allclose(tiny["rate"].isel(row=0, seed=0).sel(path="full"), slope, rtol=1e-3)


def test_float64_runs_in_float64_and_leaves_the_setting_alone():
    config = dataclasses.replace(TINY, cells=("lstm",), inits=("flax",), seeds=1)
    single, double = (retention.run(dataclasses.replace(config, dtype=dtype)) for dtype in ("float32", "float64"))
    assert double.attrs["dtype"] == "float64"
    assert double["log_retention"].dtype == np.float64
    # the same keys draw different numbers in float64, so only the statement is compared, not the values
    assert single["log_retention"].dtype == np.float32
    assert np.isfinite(double["rate"].sel(path="full")).all()
    assert not jax.config.jax_enable_x64


def test_verdict_follows_the_data(tiny):
    checks = retention.verdict(tiny)
    assert [check.name.rsplit(": ", 1)[1] for check in checks] == [
        "lstm, torch",
        "lstm, chrono",
    ]  # at T = 30: no prediction
    small = tiny.copy(deep=True)
    small["log10_remainder_over_direct_high"] = small["log10_remainder_over_direct_high"] * 0 - 1.5

    def verdict(dataset):
        (found,) = retention.EXPERIMENT.verdicts(dataset)
        return found

    assert verdict(small).word == "holds"
    assert verdict(small).sentence.endswith("It stays below a tenth for lstm, torch; lstm, chrono.")
    small["log10_remainder_over_direct_high"][0] = 3.0
    assert [check.holds for check in retention.verdict(small)] == [False, True]
    assert verdict(small).word == "holds only if"
    assert verdict(small).sentence.endswith("It stays below a tenth for lstm, chrono.")
    small["log10_remainder_over_direct_high"][1] = 3.0
    assert verdict(small).word == "does not hold"
    small["log10_remainder_over_direct_high"][0] = np.nan
    assert [check.holds for check in retention.verdict(small)] == [None, False]
    small["log10_remainder_over_direct_high"][:] = np.nan
    assert verdict(small) == ("B3", "not decided", "no LSTM row gave a number: the claim is not tried.")
    assert verdict(small.isel(row=[2])).word == "not decided"


def test_predicted_size_decides_nothing(tiny):
    """It was made for lag 99 and libraries' defaults."""
    at_lag = tiny.isel(row=[0, 1]).assign_attrs(check_lag=retention.CHECK_LAG).copy(deep=True)
    for size, holds in ((7.0, True), (5.9, False)):
        at_lag["log10_remainder_over_direct_median"][:] = size
        (check,) = [check for check in retention.verdict(at_lag) if not check.decides]
        assert check.name == "prediction of its size: lstm, torch"
        assert check.holds == holds
        said = "predicted size came out otherwise for lstm, torch" in retention.summary(at_lag)["B3"]
        assert said != holds


def test_forget_bias_acts_on_library_rows_only():
    config = dataclasses.replace(TINY, forget_bias=3.0)
    torch_bias = retention.build_cell("lstm", "torch", config).init(jax.random.key(0)).b[5:10]
    np.testing.assert_array_equal(torch_bias, 3.0)
    chrono_bias = retention.build_cell("lstm", "chrono", config).init(jax.random.key(0)).b[5:10]
    assert len(set(np.asarray(chrono_bias).tolist())) == 5


def test_interrupted_run_resumes(tmp_path, monkeypatch):
    measured = []
    original = retention._measure_row

    def counting(cell, init, *rest):
        if len(measured) == 2 and not (tmp_path / "interrupted").exists():
            (tmp_path / "interrupted").touch()
            raise KeyboardInterrupt
        measured.append((cell, init))
        return original(cell, init, *rest)

    monkeypatch.setattr(retention, "_measure_row", counting)
    with pytest.raises(SystemExit) as stopped:
        command.execute(retention.EXPERIMENT, TINY, command.Options(out=tmp_path / "o"))
    assert stopped.value.code == 130
    assert not (tmp_path / "o" / "retention.nc").exists()
    command.execute(retention.EXPERIMENT, TINY, command.Options(out=tmp_path / "o"))
    assert measured == [("lstm", "torch"), ("lstm", "chrono"), ("vanilla", "torch")]
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == ["retention.nc", "retention.png"]
    resumed = results.load(tmp_path / "o" / "retention.nc", experiment="retention")
    xr.testing.assert_equal(resumed, retention.run(TINY))


def test_figure_shows_every_row_and_marks_where_float32_dies():
    config = dataclasses.replace(TINY, steps=200, cells=("vanilla", "gru"), inits=("torch", "chrono"))
    dataset = retention.run(config)
    drawn = retention.figure(dataset)
    words = " ".join(text.get_text() for axes in drawn.axes for text in axes.texts)
    death = retention._median_death(dataset.isel(row=0))
    assert f"float32 dies\nat lag {death}" in words
    assert "direct path: exactly 0" in words
    assert "chrono sets gate biases" in words
    assert "naive float32 survives" in words


# --- user errors: one line, a code that is not 0, nothing half-written ------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "empty.txt"], "empty"),
        (["--text", "short.txt"], "tokens"),
        (["--text", "ptb", "--data-dir", "."], "ptb.valid.txt"),
        (["--steps", "0"], "--steps: expected at least 2, found 0"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--fit-from", "500"], "--fit-from: expected a lag from 0 to 59 (steps − 1), found 500"),
        (["--forget-bias", "nan"], "--forget-bias: expected a finite float32, found nan"),
        (["--forget-bias", "1e39"], "--forget-bias: expected a finite float32"),
        (["--cells", "vanilla", "--forget-bias", "2"], "--forget-bias acts on no row"),
        (["--cells", "vanilla", "--inits", "chrono"], "a vanilla cell has no gates"),
        (["--cells", "lstm", "lstm"], "--cells: expected each name once"),
        (["--show", "missing.nc"], "no result file missing.nc"),
        (["--show", "short.txt"], "not a readable netCDF file"),
        (["--out", "short.txt"], "output folder short.txt is not writable"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("three little words")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(retention.EXPERIMENT, ["--smoke", *([] if "--out" in words else ["--out", "o"]), *words])
    error = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.nc"))
    assert not list(tmp_path.rglob("*.png"))


def test_mistyped_cell_is_refused_with_the_choices(tmp_path):
    code, _, err = run_command("--cells", "lsmt", cwd=tmp_path)
    assert code != 0
    assert "Traceback" not in err
    assert "lstm" in err


def test_a_programming_error_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(retention, "_measure_row", broken)
    with pytest.raises(ValueError, match="a bug"):
        command.execute(retention.EXPERIMENT, TINY, command.Options(out=tmp_path))


def test_full_disk_at_the_end_is_one_line_and_keeps_the_parts(tmp_path, monkeypatch, capsys):
    original = results.save

    def full(dataset, path):
        if path.name == "retention.nc":
            raise OSError(28, "No space left on device", str(path))
        original(dataset, path)

    monkeypatch.setattr(results, "save", full)
    with pytest.raises(SystemExit) as stopped:
        command.execute(retention.EXPERIMENT, TINY, command.Options(out=tmp_path))
    assert stopped.value.code == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(list(tmp_path.glob(".parts-*/*.nc"))) == 3


def test_command_in_the_provenance_names_no_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("a b c d e f\n" * 100)
    dataset = retention.run(
        dataclasses.replace(TINY, cells=("gru",), inits=("torch",), text=str(tmp_path / "mine.txt"))
    )
    assert str(tmp_path) not in json.dumps(dataset.attrs, default=str)
    assert "--text mine.txt" in dataset.attrs["command"]


def test_share_of_an_even_gradient_is_even():
    """Ten of T + 1 equal gradients are 10/(T + 1) of the whole: the definition, by hand."""
    log_gradient = np.zeros(101)
    share = np.exp(
        scipy.special.logsumexp(log_gradient[: retention.LAST_STEPS]) - scipy.special.logsumexp(log_gradient)
    )
    np.testing.assert_allclose(share, 10 / 101)
