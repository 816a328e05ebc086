"""The same code lowers for CUDA and TPU without the hardware, at the matmul precision it promises."""

from __future__ import annotations

import functools
import re

import jax
import pytest
from jax import export

import rnngrad as rg
from experiments import backends
from tests.cases import CASES, example, rows

PLATFORMS = ("cpu", "cuda", "tpu")


def _lowered(function, *arguments):
    return export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)


def _last_h(states):
    return states.h[-1].sum()


def _training_gradient(cell, params, state, xs):
    """Loss, weights' gradients and taps, through a checkpointed run."""
    run = lambda p, taps: _last_h(rg.unroll(cell, p, state, xs, taps=taps, checkpoint_every=2).states)
    return jax.value_and_grad(run, argnums=(0, 1))(params, rg.zero_taps(cell, len(xs)))


@rows(CASES, fast=("vanilla_tanh", "lru", "stack"))
def test_retention_lowers(name):
    ex = example(name)
    exported = _lowered(lambda *a: rg.retention(ex.cell, *a).log_norm, *ex[1:])
    assert set(exported.platforms) == set(PLATFORMS)


@pytest.mark.parametrize(
    "function",
    [
        lambda c, *a: rg.unroll(c, *a).states,
        _training_gradient,
        lambda c, p, s, xs: rg.bptt(c, p, s, xs, _last_h),
        lambda c, p, s, xs: rg.truncated_bptt(c, p, s, xs, _last_h, window=2),
        lambda c, p, s, xs: rg.rtrl(c, p, s, xs, _last_h).grads,
        rg.jacobian_chain,
        rg.step_jacobians,
        lambda c, *a: rg.retention(c, *a, path="remainder", norm="spectral").log_norm,
        lambda c, *a: rg.retention(c, *a, path="only:f").log_norm,
        rg.naive_retention,
        lambda c, *a: rg.gradient_paths(c, *a, max_crossings=2),
        lambda c, *a: rg.prefix_products(rg.step_jacobians(c, *a)),
        lambda c, *a: jax.grad(lambda p: rg.retention(c, p, *a[1:]).log_norm[-1])(a[0]),
        lambda c, *a: rg.lyapunov_spectrum(c, *a, num_blocks=2),
        lambda c, *a: rg.lyapunov_spectrum(c, *a, num_blocks=2, direction="adjoint", k=1).exponents,
        lambda c, *a: rg.covariant_vectors(c, *a, num_transient=1).vectors,
        lambda c, *a: rg.chain_singular_values(c, *a).log_singular_values,
        lambda c, *a: rg.probe_retention(c, *a, jax.random.key(0), num_probes=4).high,
        lambda c, *a: rg.probe_spectral_norm(c, *a, jax.random.key(0)).high,
    ],
    ids=[
        "unroll",
        "training",
        "bptt",
        "truncated",
        "rtrl",
        "chain",
        "step_jacobians",
        "remainder",
        "only",
        "naive",
        "paths",
        "prefix",
        "gradient",
        "spectrum",
        "adjoint",
        "covariant",
        "singular",
        "probes",
        "probed_spectral_norm",
    ],
)
def test_every_measurement_lowers(function):
    ex = example("lstm")
    exported = _lowered(lambda *a: function(ex.cell, *a), *ex[1:])
    assert set(exported.platforms) == set(PLATFORMS)


def _precisions(function, *arguments, platform="cuda"):
    """Precision of every matrix product in the program for a platform."""
    text = export.export(jax.jit(function), platforms=(platform,))(*arguments).mlir_module()
    return ["HIGHEST" if "HIGHEST" in line else "DEFAULT" for line in re.findall("stablehlo.dot_general.*", text)]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_chains_multiply_at_highest_precision_and_states_at_the_users(platform):
    """TF32 and bfloat16 passes ruin products; the forward pass is the user's and stays at the default."""
    ex = example("lstm")
    precisions = functools.partial(_precisions, platform=platform)
    # W x for all steps at once, U h in the scan, and U times the zero state
    assert precisions(lambda *a: rg.unroll(ex.cell, *a).states, *ex[1:]) == ["DEFAULT"] * 3
    chain = precisions(lambda *a: rg.retention(ex.cell, *a, of="c", wrt="c").log_norm, *ex[1:])
    # W x and U h of the forward pass; all others are the product of the cotangents with U and the squares of norms
    assert chain.count("DEFAULT") == 2
    assert chain.count("HIGHEST") >= 2
    assert precisions(rg.prefix_products, rg.step_jacobians(*ex)).count("DEFAULT") == 0
    spectrum = precisions(lambda *a: rg.lyapunov_spectrum(ex.cell, *a, num_blocks=2).exponents, *ex[1:])
    assert spectrum.count("DEFAULT") == 2
    assert spectrum.count("HIGHEST") >= 10
    # the training step is the user's altogether, taps or not
    step = precisions(lambda *a: _training_gradient(ex.cell, *a), *ex[1:])
    assert step.count("HIGHEST") == 0
    assert len(step) >= 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "function",
    [
        _training_gradient,
        lambda c, *a: rg.retention(c, *a).log_norm,
        lambda c, *a: rg.lyapunov_spectrum(c, *a, num_blocks=2).exponents,
        lambda c, *a: rg.chain_singular_values(c, *a).log_condition_number,
    ],
    ids=["training", "chain", "spectrum", "condition"],
)
def test_measurements_lower_in_the_dtypes_of_accelerators(function, dtype):
    """What experiments.backends runs on them; no float64 in the program, which a TPU does not have."""
    cell = rg.cells.lstm(3, 4, dtype=dtype)
    params, state, xs = cell.init(jax.random.key(0)), cell.init_state(), jax.numpy.ones((6, 3), dtype)
    exported = _lowered(lambda *a: function(cell, *a), params, state, xs)
    assert set(exported.platforms) == set(PLATFORMS)
    assert "f64" not in exported.mlir_module()


def test_a_measurement_lowers_with_every_product_at_the_default():
    """As experiments.backends asks of an accelerator."""
    ex = example("lstm")
    curve = lambda *a: rg.retention(ex.cell, *a).log_norm
    assert "HIGHEST" not in _precisions(backends.with_products(curve, backends.at_default), *ex[1:], platform="tpu")
