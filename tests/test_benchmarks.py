"""Every benchmark runs at its smoke size and asserts equality before it times; nothing here asserts a speed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line

STORED = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@pytest.mark.parametrize("name", command_line.NAMES)
def test_benchmark_runs(name):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    if missing := command_line.missing_package(benchmark):
        pytest.skip(f"needs {missing}")
    rows = benchmark.run(smoke=True)
    assert rows
    for row in rows:
        assert row.benchmark == name
        assert row.spread[0] <= row.value <= row.spread[1]
        assert row.value > 0


def test_every_file_is_a_benchmark_in_the_list():
    files = {file.stem for file in Path(command_line.__file__).parent.glob("*.py")}
    assert files - {"__init__", "__main__", "harness"} == set(command_line.NAMES)


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


@pytest.mark.parametrize("name", [name for name in command_line.NAMES if name != "parallel_in_time"])
def test_readme_shows_the_stored_numbers(name):
    readme = (STORED.parent.parent / "README.md").read_text(encoding="utf-8")
    for row in json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
        low, high = row["spread"]
        assert f"| {row['what']} | {row['value']:.2f} | {low:.2f} – {high:.2f} | {row['bound']} |" in readme


def test_command_line_writes_one_file_per_benchmark(tmp_path, capsys):
    config = command_line.Config(names=("chain_against_matmul",), smoke=True, out=tmp_path / "b")
    command_line.main(config)
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["chain_against_matmul.json"]
    assert "reverse scan" in " ".join(capsys.readouterr().out.split())


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
