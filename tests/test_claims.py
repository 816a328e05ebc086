"""Claims and verdicts: the word follows from the checks, every claim is tried, the stored results tell the truth."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import rnngrad as rg
from experiments import claim_map, registry, results
from experiments.claims import Check, Claim, judge, word_of
from experiments.reproduction import standing

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "experiments" / "results"
CLAIMS = [f"{letter}{n}" for letter, last in zip("ABCDE", (4, 10, 3, 5, 5), strict=True) for n in range(1, last + 1)]
"""The claims of the texts; T1 (the truncated gradient) and N1 to N3 (numerics) are more."""
EXPERIMENTS = registry.experiments()


def check(holds, *, decides=True, claim="A1"):
    return Check("x", "1", "2", holds, claim, "why", decides)


@pytest.mark.parametrize(
    ("answers", "word"),
    [
        ([True, True], "holds"),
        ([True, False], "holds only if"),
        ([False, False], "does not hold"),
        ([None, False], "does not hold"),
        ([None, True], "holds"),
        ([None], "not decided"),
        ([], "not decided"),
    ],
)
def test_the_word_follows_from_the_deciding_checks(answers, word):
    side = [check(True, decides=False), check(False, decides=False)]
    assert word_of([check(answer) for answer in answers] + side) == word


def test_every_claim_gets_checks_and_a_sentence():
    claims = [Claim(id, "", "", "", "", (), ()) for id in ("A1", "A2")]
    checks = [check(True), check(False, claim="A2")]
    verdicts = judge(claims, checks, {"A1": "one.", "A2": "two."})
    assert list(map(str, verdicts)) == ["A1 holds: one.", "A2 does not hold: two."]
    with pytest.raises(ValueError, match="checks: expected some for each of A1, A2, found A1"):
        judge(claims, checks[:1], {"A1": "", "A2": ""})
    with pytest.raises(ValueError, match="sentences: expected some for each of A1, A2, found A1"):
        judge(claims, checks, {"A1": ""})


def test_every_claim_of_the_texts_is_tried_once():
    tried = [claim.id for experiment in EXPERIMENTS for claim in experiment.claims]
    assert sorted(tried, key=registry.in_order) == [*CLAIMS, "N1", "N2", "N3", "T1"]


def test_every_module_is_an_experiment_or_known():
    shared = {"__init__", "__main__", "claim_map", "claims", "command", "errata", "learning", "registry", "report"}
    shared |= {"cluster", "reproduction", "results", "statistics", "trials"}
    tools = {"train", "language_model", "sweep"}  # they try no claim
    modules = {file.stem for file in (ROOT / "experiments").glob("*.py")}
    assert modules == shared | tools | set(registry.NAMES)
    assert [experiment.name for experiment in EXPERIMENTS] == list(registry.NAMES)
    with pytest.raises(ValueError, match="unknown experiment 'nothing'; expected some of: bounds"):
        registry.experiments(["nothing"])


def _public(name):
    found = rg
    for part in name.removeprefix("rg.").split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda at: at.name)
def test_claims_say_what_they_should_and_name_what_exists(experiment):
    for claim in experiment.claims:
        assert all(len(text) > 5 for text in (claim.statement, claim.source, claim.prediction, claim.refuted)), claim.id
        assert claim.functions
        for function in claim.functions:
            assert function.startswith("rg.")
            assert _public(function) is not None
        assert claim.tests
        for test in claim.tests:
            file, _, function = test.partition("::")
            assert (ROOT / file).is_file(), file
            if function:
                assert hasattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), function), test
    assert all(len(picture.caption) > 30 for picture in experiment.pictures)
    assert experiment.pictures[0].name == ""
    assert len({picture.name for picture in experiment.pictures}) == len(experiment.pictures)


# --- stored results --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EXPERIMENTS, ids=lambda at: at.name)
def stored(request):
    return request.param, results.load(STORED / f"{request.param.name}.nc", experiment=request.param.name)


def test_stored_result_is_the_full_run_and_says_where_it_comes_from(stored):
    experiment, dataset = stored
    for key in ("command", "config", "versions", "device", "backend", "dtype", "matmul_precision", "source_digest"):
        assert dataset.attrs[key]
    assert dataset.attrs["seconds"] > 0
    at = standing(experiment, STORED)
    assert at.state in ("done", "older sources"), at.reason
    assert (STORED / f"{experiment.name}.nc").stat().st_size < 600_000
    assert not re.search(r"(^|[ '\"])/(home|root|tmp|work|usr)/", json.dumps(dict(dataset.attrs), default=str))


def test_stored_verdict_recomputes_from_the_measurements(stored):
    """What is derived follows from what was measured; verdict, sentence and bound of every claim from both."""
    experiment, dataset = stored
    module = importlib.import_module(f"experiments.{experiment.name}")
    derived = [name for name in dataset.data_vars if name not in module.MEASURED]
    again = module.derive(dataset.drop_vars(derived).copy())
    for name in derived:
        np.testing.assert_allclose(again[name], dataset[name], rtol=1e-6, atol=1e-9, err_msg=str(name))
    verdicts = experiment.verdicts(again)
    assert verdicts == experiment.verdicts(dataset)
    for verdict in verdicts:
        assert verdict.word != "not decided"
        assert re.search(r"\d", verdict.sentence), "a finding without a number"
    assert all(check.why and check.bound and check.value for check in experiment.verdict(dataset))


def test_stored_runs_have_seeds_enough(stored):
    """Ten where nothing is trained, five where something is."""
    _, dataset = stored
    sizes = {str(name): size for name, size in dataset.sizes.items() if "seed" in str(name)}
    assert sizes
    is_trained = {"updates", "learning_rate"} & set(json.loads(dataset.attrs["config"]))
    assert min(sizes.values()) >= (5 if is_trained else 10), sizes


def test_stored_pictures_are_there(stored):
    experiment, _ = stored
    for file in experiment.picture_files(STORED):
        picture = matplotlib.image.imread(file)
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.03  # something is drawn


@pytest.mark.parametrize("file", claim_map.READMES, ids=["claim map", "README"])
def test_readme_says_what_the_stored_results_say(file):
    """``python -m experiments map`` writes it."""
    readme = file.read_text(encoding="utf-8")
    standings = [standing(experiment, STORED) for experiment in EXPERIMENTS]
    assert claim_map.replaced(readme, claim_map.READMES[file](standings)) == readme
    with pytest.raises(ValueError, match="expected the marks"):
        claim_map.replaced(readme.replace(claim_map.END, ""), "")


def test_no_result_lies_there_that_nobody_made():
    names = {experiment.name for experiment in EXPERIMENTS}
    assert {file.stem for file in STORED.glob("*.nc")} == names
    pictures = {file for experiment in EXPERIMENTS for file in experiment.picture_files(STORED)}
    assert set(STORED.glob("*.png")) == pictures
