"""Public names: listed, documented, typed, and in CONTRIBUTING's and the cells' tables."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest

import rnngrad as rg
from tests.cases import CASES

MODULES = [
    rg,
    rg.cells,
    rg.formulas,
    rg.initializers,
    rg.interop,
    rg.logscaled,
    rg.losses,
    rg.remedies,
    rg.tasks,
    rg.theory,
    rg.training,
]


def _public(module):
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return [(module.__name__, name, getattr(module, name)) for name in names]


PUBLIC = [entry for module in MODULES for entry in _public(module)]


@pytest.mark.parametrize(("module", "name", "value"), PUBLIC, ids=[f"{m}.{n}" for m, n, _ in PUBLIC])
def test_public_names_are_documented_and_typed(module, name, value):
    if isinstance(value, types.ModuleType | int | float | str | tuple | dict):
        return
    documentation = inspect.getdoc(value)
    assert documentation, f"{module}.{name} has no docstring"
    if inspect.isfunction(value):
        assert documentation.split("\n")[0].startswith(("Returns ", "Writes ", "Draws ")), documentation.split("\n")[0]
        for parameter in inspect.signature(value).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name}) is untyped"
            assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, f"{name} takes **{parameter.name}"


TOP_FUNCTIONS = [(name, getattr(rg, name)) for name in rg.__all__ if inspect.isfunction(getattr(rg, name))]


@pytest.mark.parametrize(("name", "value"), TOP_FUNCTIONS, ids=[name for name, _ in TOP_FUNCTIONS])
def test_top_level_functions_have_an_example(name, value):
    if name == "certificate":
        pytest.skip("its value depends on the machine")
    assert ">>> " in inspect.getdoc(value)


def test_names_fixed_by_the_plan_are_there():
    for name in (
        "unroll",
        "jacobian_chain",
        "retention",
        "gradient_paths",
        "lyapunov_spectrum",
        "map_cell",
        "LogScaled",
        "step_jacobians",
        "bptt",
        "zero_taps",
    ):
        assert name in rg.__all__
    for name in (
        "vanilla",
        "gru",
        "lstm",
        "peephole_lstm",
        "coupled_lstm",
        "indrnn",
        "min_gru",
        "min_lstm",
        "lru",
        "stack",
    ):
        assert callable(getattr(rg.cells, name))
    for name in ("mantissa", "log_scale"):
        assert hasattr(rg.LogScaled, name)
    assert rg.Trajectory._fields == ("states", "gates", "final")


def test_every_cell_factory_is_in_the_case_table():
    factories = {
        name
        for name in rg.cells.__all__
        if inspect.isfunction(getattr(rg.cells, name)) and name not in ("map_cell", "eigenvalues")
    }
    assert all(any(case.startswith(name) for case in CASES) for name in factories)


def test_every_module_has_a_docstring():
    for info in pkgutil.walk_packages(rg.__path__, "rnngrad."):
        assert importlib.import_module(info.name).__doc__, info.name


def test_import_changes_no_configuration_and_needs_no_extra():
    """The package imports without its extras, and leaves JAX's configuration as it found it."""
    code = """
import sys, jax
extras = (
    "xarray h5netcdf h5py safetensors matplotlib tyro rich scipy.stats equinox pytest sklearn tensorboardX wandb"
).split()
for name in extras:
    sys.modules[name] = None
before = dict(jax.config.values)
import rnngrad
after = dict(jax.config.values)
changed = {name for name in before if before[name] != after[name]}
assert not changed, changed
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
