"""Every benchmark runs at its smoke size and asserts equality before it times; nothing here asserts a speed."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import chain_against_alternatives, cost_scaling, harness, report

STORED = report.RESULTS
SLOW = {
    "chain_against_alternatives",
    "chain_against_torch",
    "cost_scaling",
    "first_diagnosis",
    "million_steps",
    "monitor_overhead",
    "parallel_in_time",
    "probes_against_bptt",
    "spectrum_against_chain",
    "spectrum_against_torch",
    "sweep_processes",
    "training_step",
    "training_step_against_torch",
}
"""Those that take more than five seconds to compile at their smoke size."""


def named(*names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.mark.parametrize("name", named(*command_line.NAMES))
def test_benchmark_runs(name):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    if missing := command_line.missing_package(benchmark):
        pytest.skip(f"needs {missing}")
    rows = benchmark.run(smoke=True)
    assert rows
    for row in rows:
        assert row.benchmark == name
        assert row.spread[0] <= row.value <= row.spread[1]
        # the exponents of tiny sizes are noise and may have either sign
        assert math.isfinite(row.value) if name == "cost_scaling" else row.value > 0
        assert row.details["dtype"] == "float32"


def test_every_file_is_a_benchmark_in_the_list():
    files = {file.stem for file in Path(command_line.__file__).parent.glob("*.py")}
    assert files - {"__init__", "__main__", "harness", "report"} == set(command_line.NAMES)


def test_a_wrong_result_stops_the_benchmark_before_any_timing(monkeypatch):
    module = importlib.import_module("benchmarks.chain_against_matmul")
    monkeypatch.setattr(module.rg, "step_jacobians", lambda *_: 2 * __import__("numpy").ones((10, 32, 32)))
    monkeypatch.setattr(module, "timed", lambda *_: pytest.fail("timed although the results differ"))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        module.run(smoke=True)


@pytest.mark.parametrize("name", command_line.NAMES)
def test_stored_results_say_where_they_come_from(name):
    stored = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    assert stored["smoke"] is False
    for key in ("device", "cores", "versions", "python", "created"):
        assert stored["machine"][key]
    assert all(row["benchmark"] == name for row in stored["rows"])


def test_readme_shows_the_stored_numbers():
    readme = report.README.read_text(encoding="utf-8")
    assert report.with_table(readme, report.readme_tables()) == readme


def test_the_project_s_readme_quotes_the_stored_medians():
    rows = [row for file in STORED.glob("*.json") for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]

    def medians(*parts):
        chosen = [row["value"] for row in rows if all(part in row["what"] for part in parts)]
        assert chosen, parts
        return chosen

    def one(*parts):
        (median,) = medians(*parts)
        return median

    def between(*values):
        return f"{min(values):.1f} to {max(values):.1f}"

    step = "time of the instrumented step / "
    flax = [*medians(step, "linen.RNN"), *medians(step, "nnx.RNN")]
    small, middle, large = medians(step, "torch.nn.LSTM")
    readme = " ".join((report.README.parents[1] / "README.md").read_text(encoding="utf-8").split())
    for quoted in (
        f"take {one('one jax.jacrev through the scan'):.1f} times as long as one `jax.jacrev` through the scan",
        f"`jax.jacrev` per lag takes {one('time of jax.jacrev once per lag'):.0f} times as long",
        f"`vmap(jacrev(step))` with a running product {one('vmap(jacrev(step)) and a running'):.1f} times",
        f"PyTorch's hooks {one('PyTorch with retain_grad'):.0f} times",
        f"costs {between(*medians(step, 'plain scan'))} of the plain scan's",
        f"of `torch.nn.LSTM`'s {small:.1f}, {middle:.1f} and {large:.1f} at three sizes",
        f"of `torch.nn.GRU`'s {between(*medians(step, 'torch.nn.GRU'))}",
        f"of Flax's and Equinox's {between(*flax, *medians(step, 'Equinox'))}",
        f"Two processes finish a sweep in {one('by 1 process, both cores, 2 devices'):.2f} of the time of one",
    ):
        assert quoted in readme, quoted


def test_readme_table_is_replaced_between_its_markers_alone():
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_table(readme, ["new"]) == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        report.with_table("no markers", ["new"])
    with pytest.raises(ValueError, match="once each"):
        report.with_table(readme + readme, ["new"])


def test_command_line_writes_one_file_per_benchmark(tmp_path, capsys):
    config = command_line.Config(names=("chain_against_matmul",), smoke=True, out=tmp_path / "b")
    command_line.main(config)
    assert {file.name for file in (tmp_path / "b").iterdir()} == {"chain_against_matmul.json", "benchmarks.png"}
    assert "reverse scan" in " ".join(capsys.readouterr().out.split())

    (stored,) = report.read(tmp_path / "b")
    assert stored.smoke
    for key in ("device", "cores", "versions", "python", "created", "default_matmul_precision", "xla_flags"):
        assert key in stored.machine
    assert {"jax", "flax", "equinox"} <= set(stored.machine["versions"])

    (tmp_path / "b" / "benchmarks.png").unlink()
    command_line.main(command_line.Config(show=tmp_path / "b"))
    assert "reverse scan" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "b" / "benchmarks.png").stat().st_size > 10_000


def test_a_benchmark_whose_package_is_missing_is_left_out_and_named(tmp_path, capsys, monkeypatch):
    module = importlib.import_module("benchmarks.chain_against_matmul")
    monkeypatch.setattr(module, "REQUIRES", "no_such_package", raising=False)
    command_line.main(command_line.Config(names=("chain_against_matmul",), smoke=True, out=tmp_path))
    assert "chain_against_matmul needs no_such_package" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_output_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "b").write_text("")
    with pytest.raises(SystemExit) as stopped:
        command_line.main(command_line.Config(smoke=True, out=tmp_path / "b"))
    assert stopped.value.code == 2
    assert "is not writable" in capsys.readouterr().err


def a_row(name, value=1.0, bound="≤ 2"):
    return harness.judged(name, f"what {name} measures", (value, (value, value)), bound, {"dtype": "float32"})


def replace_runs(monkeypatch, **runs):
    for name, run in runs.items():
        monkeypatch.setattr(importlib.import_module(f"benchmarks.{name}"), "run", run)
    return tuple(runs)


def test_a_benchmark_that_fails_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    def wrong(*, smoke):
        raise AssertionError("Not equal to tolerance")

    names = replace_runs(
        monkeypatch, chain_against_matmul=wrong, million_steps=lambda *, smoke: [a_row("million_steps")]
    )
    with pytest.raises(SystemExit) as stopped:
        command_line.main(command_line.Config(names=names, smoke=True, out=tmp_path))
    assert stopped.value.code == 1
    assert "failed: chain_against_matmul: AssertionError: Not equal to tolerance" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"million_steps.json", "benchmarks.png"}


def test_interruption_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    def interrupted(*, smoke):
        raise KeyboardInterrupt

    names = replace_runs(
        monkeypatch, million_steps=lambda *, smoke: [a_row("million_steps")], chain_against_matmul=interrupted
    )
    with pytest.raises(SystemExit) as stopped:
        command_line.main(command_line.Config(names=names, smoke=True, out=tmp_path))
    assert stopped.value.code == 130
    assert [file.name for file in tmp_path.iterdir()] == ["million_steps.json"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "{", "[]", '{"smoke": true}', '{"smoke": true, "machine": {}, "rows": [{}]}'])
def test_a_folder_without_readable_results_is_said_in_one_line(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(command_line.Config(show=tmp_path))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected" in error
    assert "found" in error


def test_bounds():
    assert a_row("x", 2.0, "≤ 2").holds is True
    assert a_row("x", 2.1, "≤ 2").holds is False
    assert a_row("x", 2.0, "≥ 2").holds is True
    assert a_row("x", 1.9, "≥ 2").holds is False
    assert a_row("x", 1.9, harness.REPORTED).holds is None
    with pytest.raises(ValueError, match="expected '≤ x'"):
        a_row("x", 1.0, "< 2")


def test_bounds_of_the_figure_lie_at_one_and_are_kept_below():
    row = a_row("x", 4.0, "≥ 8")._replace(spread=(2.0, 16.0))
    assert report.against_bound(row) == (0.5, 2.0, 4.0)
    assert report.against_bound(row._replace(bound="≤ 8")) == (0.25, 0.5, 2.0)
    assert report.against_bound(row._replace(bound=harness.REPORTED)) == (2.0, 4.0, 16.0)


def test_figure_has_a_line_for_every_row_and_marks_misses():
    rows = (a_row("x"), a_row("x", 3.0), a_row("x", 3.0, harness.REPORTED), a_row("x", -0.5))
    drawn = report.figure([report.Stored("x", False, harness.machine(), rows)])
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.what for row in rows]
    labels = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert labels == {"bound kept", "bound missed", "no bound: the ratio itself"}


def test_the_first_timed_call_compiles_also_after_the_check_of_equality():
    traced = []

    @jax.jit
    def function(x):
        traced.append(x)
        return 2 * x

    function(jnp.ones(3))
    timings = harness.timed({"function": lambda: function(jnp.ones(3))}, 4)
    assert len(traced) == 2
    assert len(timings["function"].repeats) == 4


def test_measurements_in_a_process_of_their_own():
    assert harness.in_own_process(harness.machine)["python"] == harness.machine()["python"]
    with pytest.raises(RuntimeError, match="invalid literal for int"):
        harness.in_own_process(int, "x")


def test_seconds_of_all_lags_from_some():
    # exact for seconds that are linear in the lag: Σ (3 + ℓ/2), ℓ = 1 … 100
    lags = chain_against_alternatives.sampled_lags(100, 7)
    assert (lags[0], lags[-1], len(lags)) == (1, 100, 7)
    found = chain_against_alternatives.sum_over_lags(lags, [3 + lag / 2 for lag in lags])
    np.testing.assert_allclose(found, 3 * 100 + 100 * 101 / 4, rtol=1e-12)


def test_fitted_exponents():
    # a fixed cost hides the exponent at small sizes; the upper half is a pure power here
    sizes, costs = [1, 2, 4, 8, 16, 32], np.array([9.0, 9.0, 9.0, 8.0**1.5, 16**1.5, 32**1.5])
    part = cost_scaling.upper_half(sizes)
    assert sizes[part] == [8, 16, 32]
    assert cost_scaling.upper_half([1, 2]) == slice(0, None)
    np.testing.assert_allclose(cost_scaling.slope(sizes[part], costs[part]), 1.5, rtol=1e-12)
    # rounds at different speeds of the machine: the same exponent in each
    value, (low, high) = cost_scaling.fitted(sizes[part], np.outer([1.0, 1.3, 0.8], costs[part]))
    np.testing.assert_allclose([value, low, high], 1.5, rtol=1e-12)
    noisy = np.outer(np.ones(9), costs[part]) * np.exp(0.1 * np.random.default_rng(0).normal(size=(9, 3)))
    value, (low, high) = cost_scaling.fitted(sizes[part], noisy)
    assert low < value < high
    assert low < 1.5 < high
