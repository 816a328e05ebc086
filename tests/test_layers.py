"""Rooms: imports only point down, and the library knows no plotting, file formats or experiments."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rnngrad"

# From the ground up; a module may import those of earlier lines, and cells one another's pieces.
ROOMS = [
    {"types", "logscaled"},
    {"initializers", "theory", "orthonormal"},
    {"cells"},
    {"unroll"},
    {"jacobians"},
    {"retention"},
    {"paths", "probes", "lyapunov", "parallel", "gradients", "formulas"},
    {"singular_values", "init_report", "losses"},
    {"remedies", "tasks"},
    {"training"},
    {"interop"},
    {"watch"},
    {"diagnose"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
LIBRARY_MAY_IMPORT = {"jax", "jaxtyping", "numpy", "rnngrad"}
# beside that, by room; what an extra installs is imported where it is used
ROOM_MAY_IMPORT = {
    "remedies": {"optax"},
    "tasks": {"sklearn"},
    "training": {"optax", "orbax", "tensorboardX", "wandb"},
    # models and weight files of others
    "interop": {"equinox", "flax", "h5py", "orbax", "safetensors"},
    # what a person sees: imported by the methods that draw, and by the command
    "diagnose": {"matplotlib", "rich"},
    "doctor": {"ml_dtypes"},
    "cli": {"flax", "rich", "tyro"},
}


def _imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from rnngrad import logscaled` imports a module
            names |= {
                f"{node.module}.{alias.name}" if node.module == "rnngrad" else str(node.module) for alias in node.names
            }
    return names


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _floor(room: str) -> int:
    return next(index for index, rooms in enumerate(ROOMS) if room in rooms)


MODULES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    own = _room(file)
    for name in _imported(file):
        if name.startswith("rnngrad."):
            room = name.split(".")[1]
            assert room == own or _floor(room) < _floor(own), f"{own} imports {room}, which is not below it"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_library_imports_no_plotting_no_file_formats_no_experiments(file):
    standard = set(__import__("sys").stdlib_module_names)
    foreign = {name.split(".")[0] for name in _imported(file)} - standard - LIBRARY_MAY_IMPORT
    assert foreign <= ROOM_MAY_IMPORT.get(_room(file), set())


@pytest.mark.parametrize("folder", ["experiments", "benchmarks"])
def test_experiments_and_benchmarks_use_public_names(folder):
    public = {"rnngrad"}
    for file in (ROOT / folder).glob("*.py"):
        private = {name for name in _imported(file) if name.startswith("rnngrad")} - public
        assert not private, f"{file.name} imports {private}: use names of `rnngrad`"


def test_time_scans_live_in_their_rooms():
    """Loops stand in the run, its chains, frames that go along, and the iterations of a few others."""
    users = {
        _room(file)
        for file in MODULES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("scan", "while_loop", "fori_loop")
    }
    assert users <= {
        *("unroll", "jacobians", "gradients", "lyapunov", "singular_values", "probes", "parallel"),
        "formulas",  # the recursions of the papers, without autodiff
    }


def test_every_room_is_in_the_list():
    assert {_room(file) for file in MODULES} == set().union(*ROOMS)
