"""Examples: the notebooks are those of the scripts and hold nothing of the machine; the scripts run in their time."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["diagnose_a_flax_model", "first_look", "why_your_lstm_forgets"]

pytest.importorskip("jupytext")


def _notebook(name):
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def _outputs(name):
    return [output for cell in _notebook(name)["cells"] for output in cell.get("outputs", [])]


def _text(lines):
    return "".join(lines)


def test_every_script_has_a_notebook():
    from examples import make_notebooks

    assert [script.stem for script in make_notebooks.SCRIPTS] == NAMES
    assert sorted(file.stem for file in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script(name):
    """After a change of a script: make notebooks."""
    from examples import make_notebooks

    script = make_notebooks.unexecuted(ROOT / "examples" / f"{name}.py")
    notebook = _notebook(name)
    assert [(cell["cell_type"], cell["source"]) for cell in script.cells] == [
        (cell["cell_type"], _text(cell["source"])) for cell in notebook["cells"]
    ]
    assert notebook["metadata"] == script["metadata"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_was_run_without_errors_from_top_to_bottom(name):
    code = [cell for cell in _notebook(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    # neither errors nor warnings
    assert {output.get("name", output["output_type"]) for output in _outputs(name)} <= {
        *("stdout", "display_data", "execute_result"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_numbers_and_a_figure_and_is_small(name):
    outputs = _outputs(name)
    printed = "".join(_text(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert len(re.findall(r"\d\.\d", printed)) > 10
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_nothing_of_the_machine(name):
    content = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    without_pictures = re.sub(r'"image/png": "[^"]*"|base64,[A-Za-z0-9+/=\\n]*', "", content)
    for place in ("/tmp", "/home", "/root", "/Users", "/work", "site-packages", "ipykernel_"):
        assert place not in without_pictures, place


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_within_a_minute_on_two_cores(name, tmp_path):
    """Work, not wall time: less than two minutes of processor time."""
    environment = os.environ | {"MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # compiled as users compile it
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 10
    assert after.ru_utime - before.ru_utime < 120
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


@pytest.fixture
def environment_of_the_command(monkeypatch):
    """What the command sets is set back afterwards; programs are compiled as users compile them."""
    for name in ("MPLBACKEND", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("environment_of_the_command")
def test_the_command_runs_a_script_as_a_notebook(tmp_path, monkeypatch):
    from examples import make_notebooks

    monkeypatch.setattr(make_notebooks, "SCRIPTS", [ROOT / "examples" / "first_look.py"])
    assert make_notebooks.main(["--out", str(tmp_path)]) == 0
    made = json.loads((tmp_path / "first_look.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in made["cells"] for output in cell.get("outputs", [])]
    assert [output["output_type"] for output in outputs] == [output["output_type"] for output in _outputs("first_look")]
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.usefixtures("environment_of_the_command")
def test_a_cell_that_fails_fails_the_command(tmp_path, monkeypatch, capsys):
    from examples import make_notebooks

    script = tmp_path / "broken.py"
    script.write_text("# %%\nraise ValueError('as it should')\n")
    monkeypatch.setattr(make_notebooks, "SCRIPTS", [script])
    assert make_notebooks.main(["--out", str(tmp_path / "out")]) == 1
    assert "as it should" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
