"""Makes the notebooks: every example of this folder, run from its first line to its last, with what it shows.

    python examples/make_notebooks.py                  # into notebooks/
    python examples/make_notebooks.py --out FOLDER     # elsewhere, to see whether they run

The scripts are the source, in jupytext's percent format.  A notebook holds nothing of the machine it was made on: no
path, no time, no version.  An error in a cell ends everything with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
SCRIPTS = sorted(set(HERE.glob("*.py")) - {Path(__file__).resolve()})
SECONDS = 600


def unexecuted(script: Path) -> Any:
    """Returns the notebook of a script, without outputs."""
    notebook = jupytext.read(script)
    # the same at every run, unlike what jupytext draws
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
    notebook["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    return notebook


def executed(script: Path) -> Any:
    """Returns the notebook of a script after a run.

    Raises:
      CellExecutionError: a cell failed.
    """
    notebook = unexecuted(script)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            # sockets in a folder of ours in place of open ports
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}}),
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    notebook["metadata"].pop("language_info", None)
    return notebook


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 when an example failed."""
    parser = argparse.ArgumentParser(description="runs the examples and writes them as notebooks")
    parser.add_argument("--out", type=Path, default=HERE.parent / "notebooks", help="folder (default: notebooks)")
    folder = parser.parse_args(arguments).out
    # figures inside the notebook, and the same numbers with and without an accelerator
    os.environ.pop("MPLBACKEND", None)
    os.environ["JAX_PLATFORMS"] = "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    for script in SCRIPTS:
        try:
            notebook = executed(script)
        except CellExecutionError as error:
            print(f"{script.name}: {error}", file=sys.stderr)
            return 1
        file = folder / f"{script.stem}.ipynb"
        nbformat.write(notebook, file)
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
