"""What is published says the same in every place: version, licence, keywords, Python versions, the command.

That wheel and sdist build, install and run is tested by ``.ci/run``, in environments of their own.
"""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import rnngrad as rg

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

# Citation File Format 1.2.0, schema: what it requires, and of what it allows the keys that a piece of software uses.
CFF_REQUIRED = {"authors", "cff-version", "message", "title"}
CFF_ALLOWED = CFF_REQUIRED | {
    *("abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license", "license-url"),
    *("preferred-citation", "references", "repository", "repository-artifact", "repository-code", "type", "url"),
    "version",
}


def test_citation_is_valid_and_agrees_with_the_package():
    assert CFF_REQUIRED <= CITATION.keys() <= CFF_ALLOWED
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert str(CITATION["version"]) == PROJECT["version"] == rg.__version__
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == [{"name": "The rnngrad authors"}]
    assert CITATION["keywords"] == PROJECT["keywords"]
    assert all(isinstance(CITATION[key], str) and CITATION[key] for key in ("abstract", "message", "title"))


def test_changelog_is_kept_in_its_shape():
    """Unreleased first, then versions downwards with the day of their release; every section of a known kind."""
    versions = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    assert versions[0] == "Unreleased"
    numbers = []
    for version in versions[1:]:
        match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - (\d{4}-\d\d-\d\d|unreleased)", version)
        assert match, version
        numbers.append(tuple(map(int, match.groups()[:3])))
    assert numbers == sorted(set(numbers), reverse=True)
    assert numbers[0] == tuple(map(int, PROJECT["version"].split(".")))
    kinds = set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_licence_readme_and_marker_are_there():
    for file in (*PROJECT["license-files"], PROJECT["readme"], "rnngrad/py.typed"):
        assert (ROOT / file).is_file(), file


def test_classifiers_agree_with_the_rest():
    classifiers = PROJECT["classifiers"]
    lowest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    minors = [int(found[1]) for one in classifiers if (found := re.search(r":: Python :: 3\.(\d+)$", one))]
    assert min(minors) == int(lowest[1])
    assert "Typing :: Typed" in classifiers
    # a licence is an SPDX expression; a classifier beside it is refused by indexes
    assert not any(one.startswith("License ::") for one in classifiers)


@pytest.mark.parametrize(("name", "target"), PROJECT["scripts"].items())
def test_commands_lead_to_functions(name, target):
    module, _, function = target.partition(":")
    assert name == "rnngrad"
    assert callable(getattr(import_module(module), function))


def test_extras_that_messages_name_exist():
    """Every ``rnngrad[extra]`` in the package is one of the extras."""
    named = set()
    for file in (ROOT / "rnngrad").rglob("*.py"):
        named |= set(re.findall(r"rnngrad\[(\w+)\]", file.read_text(encoding="utf-8")))
    assert named, "none found: the pattern is wrong"
    assert named <= PROJECT["optional-dependencies"].keys()
