"""Strictness for every test and doctest: no silent dtype or rank promotion; float64 only where a test asks for it."""

from __future__ import annotations

import os

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# what is tested is compiled, here and in the processes that tests start
jax.config.update("jax_enable_compilation_cache", False)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture
def x64():
    """Runs the test with float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Frees what a module compiled.

    Every program on a CPU takes a few memory maps, of which Linux grants a process 65,530; a worker that keeps those of
    the whole suite dies in the compiler.
    """
    yield
    jax.clear_caches()
