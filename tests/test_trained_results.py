"""Stored training runs: they parse, say where they come from, and experiments/README.md tells what they hold."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import learning, results

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "experiments" / "results" / "training"
RUNS = sorted(path.name for path in FOLDER.iterdir())


def stored(run):
    (file,) = (FOLDER / run).glob("*.nc")
    return results.load(file, experiment=file.stem), importlib.import_module(f"experiments.{file.stem}")


def test_the_runs_that_the_readme_speaks_of():
    assert {"adding-lstm", "adding-gru", "adding-vanilla", "char-lstm"} <= set(RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_stored_run_says_where_it_comes_from_and_the_readme_what_it_found(run):
    dataset, module = stored(run)
    for key in ("command", "config", "versions", "device", "backend", "dtype", "matmul_precision", "source_digest"):
        assert dataset.attrs[key]
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    row = f"| `{dataset.attrs['command']}` | {module.summary(dataset)} | `experiments/results/training/{run}/` |"
    assert row in text
    assert (FOLDER / run / f"{dataset.attrs['experiment']}.png").stat().st_size > 10_000
    assert learning.figure(dataset).axes


@pytest.mark.parametrize("run", RUNS)
def test_what_is_derived_follows_from_the_curves(run):
    dataset, _ = stored(run)
    for seed in range(dataset.sizes["seed"]):
        losses = dataset["loss"].values[seed]
        best = float(dataset["best_loss"][seed])
        assert best <= np.nanmin(losses) + 1e-12
        if dataset.attrs.get("solved_measure") == "loss":
            at = np.flatnonzero(losses <= dataset.attrs["solved_bound"])
            first = int(dataset["update"][at[0]]) if len(at) else -1
            assert first == int(dataset["solved_update"][seed])


def test_adding_is_solved_with_gates_and_not_without():
    for run, solved in (("adding-lstm", True), ("adding-gru", True), ("adding-vanilla", False)):
        dataset, _ = stored(run)
        config = json.loads(dataset.attrs["config"])
        assert (config["steps"], config["forget_bias"], config["init"]) == (100, None, "torch")
        assert dataset.sizes["seed"] == 3
        assert (dataset["best_loss"] < 0.01).all() == solved
        assert (dataset["best_loss"] < 0.01).any() == solved


def test_character_model_reaches_its_mark():
    dataset, _ = stored("char-lstm")
    assert float(dataset["best_loss"][0]) <= 1.60
    assert dataset.attrs["seconds"] <= 30 * 60
