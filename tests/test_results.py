"""Stored results: whole or not at all, and an error in one line for every damaged file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from experiments import results


def dataset(value=1.0):
    return xr.Dataset({"a": (("seed", "lag"), np.full((2, 3), value))}).assign_attrs(experiment="retention")


def test_round_trip_with_infinities(tmp_path):
    stored = dataset(-np.inf)
    results.save(stored, tmp_path / "r.nc")
    xr.testing.assert_identical(results.load(tmp_path / "r.nc", experiment="retention"), stored)
    assert [file.name for file in tmp_path.iterdir()] == ["r.nc"]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no result file .*r.nc: expected a netCDF file written by"):
        results.load(tmp_path / "r.nc", experiment="retention")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_file(tmp_path, damage):
    file = tmp_path / "r.nc"
    results.save(dataset(), file)
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a netCDF file"}[damage])
    with pytest.raises(ValueError, match="is not a readable netCDF file"):
        results.load(file, experiment="retention")


def test_file_of_another_experiment(tmp_path):
    results.save(dataset().assign_attrs(experiment="bounds"), tmp_path / "r.nc")
    with pytest.raises(ValueError, match="expected a result of experiment 'retention', found 'bounds'"):
        results.load(tmp_path / "r.nc", experiment="retention")


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "r.nc"
    results.save(dataset(1.0), file)

    whole = Path.write_bytes

    def full(path, content):
        whole(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*r\.nc'"):
            results.save(dataset(2.0), file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.nc"]
    assert float(results.load(file, experiment="retention")["a"][0, 0]) == 1.0


def test_folder_that_is_a_file_is_not_writable(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match=r"output folder .*out is not writable: File exists"):
        results.writable_folder(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="is not writable: Permission denied"):
        results.writable_folder(tmp_path / "out")


def test_parts_are_resumed_only_by_the_same_configuration(tmp_path):
    made = []

    def make():
        made.append(1)
        return dataset()

    parts = results.Parts(tmp_path, experiment="retention", config={"steps": 3})
    assert parts.get("lstm", make)[1] is False
    assert parts.get("lstm", make)[1] is True
    assert results.Parts(tmp_path, experiment="retention", config={"steps": 4}).get("lstm", make)[1] is False
    assert len(made) == 2
    # a damaged part is made again
    next(parts.folder.glob("lstm.nc")).write_bytes(b"half")
    assert parts.get("lstm", make)[1] is False
    with pytest.raises(ValueError, match="expected a result of experiment 'retention', found 'part of retention'"):
        results.load(parts.folder / "lstm.nc", experiment="retention")
    parts.discard()
    assert not parts.folder.exists()
    parts.discard()


def test_provenance_is_complete_and_names_no_path():
    found = results.provenance(
        experiment="retention", command="python -m experiments.retention", config={"a": 1}, text=None, dtype="float32"
    )
    for name in ("config", "rnngrad_version", "source_digest", "python", "versions", "backend", "device", "created"):
        assert found[name]
    assert "text" not in found
    assert found["dtype"] == "float32"
    assert not any(str(results._ROOT) in str(value) for value in found.values())


def test_source_digest_is_that_of_what_makes_the_result(tmp_path, monkeypatch):
    """The library, the module and what it imports; not other experiments, nor what only shows."""

    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    seen = "\n# --- what a person sees ---\n"
    write("rnngrad/a.py", "x = 1\n")
    write("experiments/one.py", f"from experiments import shared\ny = 1{seen}z = 1\n")
    write("experiments/shared.py", "from experiments.deeper import name\n")
    write("experiments/deeper.py", "name = 1\n")
    write("experiments/two.py", "y = 2\n")
    monkeypatch.setattr(results, "_ROOT", tmp_path)
    before, everything = results.source_digest("one"), results.source_digest()
    for name, text, changes in (
        ("experiments/two.py", "y = 3\n", False),
        ("experiments/one.py", f"from experiments import shared\ny = 1{seen}z = 2\n", False),
        ("experiments/one.py", f"from experiments import shared\ny = 2{seen}z = 2\n", True),
        ("experiments/deeper.py", "name = 2\n", True),
        ("rnngrad/a.py", "x = 2\n", True),
    ):
        write(name, text)
        now = results.source_digest("one")
        assert (now != before) == changes, name
        before = now
    assert results.source_digest() != everything
    with pytest.raises(ValueError, match=r"found no experiments\.three"):
        results.source_digest("three")
