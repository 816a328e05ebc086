"""BPTT in log space, truncated and forward in time, against autodiff, each other, and where plain numbers end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad import logscaled
from rnngrad.logscaled import LogScaled
from tests.cases import CASES, example, rows

# float64, a few steps: sums of a few hundred products in another order
EXACT = {"rtol": 1e-11, "atol": 1e-13}
some_cells_fast = rows(CASES, fast=("lstm",))


def score(states):
    """A loss that takes something from every entry of every state."""
    total = 0.0
    for index, leaf in enumerate(jax.tree.leaves(states)):
        wave = jnp.cos(jnp.arange(0.0, leaf.size) + index).reshape(leaf.shape).astype(leaf.real.dtype)
        total = total + jnp.sum(wave * jnp.tanh(leaf.real)) + jnp.sum(wave**2 * leaf.imag)
    return total


def last_c(states):
    return jnp.sum(states.c[-1])


def plain(tree):
    """LogScaled leaves as plain arrays."""
    is_scaled = lambda node: isinstance(node, LogScaled)
    return jax.tree.map(lambda x: np.asarray(logscaled.to_array(x)), tree, is_leaf=is_scaled)


def real_pairs(tree):
    """A cotangent as JAX writes it, complex leaves as ∂/∂Re then ∂/∂Im."""
    one = lambda leaf: jnp.concatenate([leaf.real, -leaf.imag], axis=-1) if jnp.iscomplexobj(leaf) else leaf
    return jax.tree.map(one, tree)


def close(found, expected, **tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **(tolerance or EXACT))


def batch_of(ex):
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), ex.state)
    return states, jnp.stack([ex.xs, 1 - ex.xs, ex.xs[::-1]], axis=1)


@some_cells_fast
@pytest.mark.parametrize("batched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bptt_equals_autodiff_with_taps(name, batched, x64):
    ex = example(name, dtype="float64", num_steps=4)
    state, xs = batch_of(ex) if batched else (ex.state, ex.xs)
    flow = rg.bptt(ex.cell, ex.params, state, xs, score)

    def loss(params, taps, local):
        states = rg.unroll(ex.cell, params, state, xs, taps=taps).states
        return score(jax.tree.map(jnp.add, states, local))

    taps = rg.zero_taps(ex.cell, len(xs), xs.shape[1:-1])
    zeros = taps.direct
    value, (grads, of_taps, local) = jax.value_and_grad(loss, argnums=(0, 1, 2))(ex.params, taps, zeros)
    close(flow.loss, value)
    close(flow.grads, grads)
    close(plain(flow.scaled_grads), grads)
    close(plain(flow.gate_cotangents), real_pairs(of_taps.z))
    found = plain(flow.state_cotangents)
    for part in ("direct", "gated"):
        expected = real_pairs(getattr(of_taps, part))
        close(jax.tree.map(lambda leaf: leaf[:-1], getattr(found, part)), expected)
        close(jax.tree.map(lambda leaf: leaf[-1], getattr(found, part)), jax.tree.map(lambda e: 0 * e[0], expected))
    arriving = jax.tree.map(jnp.add, of_taps.direct, of_taps.gated)
    total = jax.tree.map(
        lambda own, later: jnp.concatenate([later[:1], own[:-1] + later[1:], own[-1:]]), local, arriving
    )
    close(found.total, real_pairs(total))


def test_bptt_goes_on_where_float32_has_died():
    """Forget gates nearly shut, one loss at the end: float64 still holds numbers that float32 does not."""
    cell = rg.cells.lstm(3, 5, forget_bias=-2.0)
    params = cell.init(jax.random.key(0))
    xs = 0.1 * jax.random.normal(jax.random.key(1), (150, 3))
    flow = rg.bptt(cell, params, cell.init_state(), xs, last_c)
    found = logscaled.log_norm(
        LogScaled(flow.state_cotangents.total.c.mantissa[:, None], flow.state_cotangents.total.c.exponent)
    )
    with jax.enable_x64(True):
        wide = rg.cells.lstm(3, 5, forget_bias=-2.0, dtype=jnp.float64)
        cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)
        loss = lambda taps: last_c(rg.unroll(wide, cast(params), wide.init_state(), cast(xs), taps=taps).states)
        of_taps = jax.grad(loss)(rg.zero_taps(wide, 150))
        expected = np.log(np.linalg.norm(of_taps.direct.c + of_taps.gated.c, axis=-1))
    assert expected[0] < np.log(np.finfo(np.float32).tiny) - 50  # far beyond float32's range
    # 150 roundings of 6e-8 each, and as much again in the states
    np.testing.assert_allclose(found[:-1], expected, atol=1e-4)
    assert np.isfinite(found).all()


def test_bptt_of_an_exploding_network():
    """∂L/∂θ beyond float32: inf as plain numbers, and its logarithm right."""
    cell = rg.cells.vanilla(2, 3, activation="identity")
    params = cell.init(jax.random.key(0))._replace(w_hh=4.0 * jnp.eye(3), b=jnp.zeros(3))
    xs = 1e-30 * jnp.ones((100, 2))
    flow = rg.bptt(cell, params, cell.init_state(), xs, lambda states: jnp.sum(states.h[-1]))
    # ∂h_T/∂b = Σ_j 4^j over j = 0 … 99
    b = flow.scaled_grads.b
    expected = np.log(float(sum(4**j for j in range(100))))
    np.testing.assert_allclose(jnp.log(b.mantissa) + b.log_scale, expected, rtol=1e-6)
    total = flow.state_cotangents.total.h
    np.testing.assert_allclose(jnp.log(total.mantissa[0]) + total.log_scale[0], 100 * np.log(4.0), rtol=1e-6)
    longer = rg.bptt(cell, params, cell.init_state(), xs[:70], lambda states: jnp.sum(states.h[-1]))
    assert np.isinf(longer.grads.b).all()
    assert np.isfinite(longer.scaled_grads.b.mantissa).all()


@pytest.mark.slow
def test_weights_gradient_where_float32_has_died():
    """Only the first input is not zero: W's gradient is the cotangent that came all the way, b's is another's."""
    xs = np.zeros((150, 3))
    xs[0] = [1.0, -0.5, 2.0]
    cell = rg.cells.lstm(3, 5, forget_bias=-2.0)
    params = cell.init(jax.random.key(0))
    flow = rg.bptt(cell, params, cell.init_state(), jnp.asarray(xs, jnp.float32), last_c)
    with jax.enable_x64(True):
        wide = rg.cells.lstm(3, 5, forget_bias=-2.0, dtype=jnp.float64)
        cast = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        expected = jax.grad(lambda p: last_c(rg.unroll(wide, p, wide.init_state(), jnp.asarray(xs)).states))(cast)
    for name in ("w_ih", "w_hh", "b"):
        found, size = getattr(flow.scaled_grads, name), np.abs(getattr(expected, name)).max()
        assert np.isclose(
            logscaled.log_max(LogScaled(jnp.atleast_2d(found.mantissa), found.exponent)), np.log(size), atol=1e-3
        )
    assert np.log(np.abs(expected.w_ih).max()) < np.log(np.finfo(np.float32).tiny) - 50
    assert not flow.grads.w_ih.any()  # as plain numbers: out of range


@pytest.mark.slow
def test_one_step_under_jit_and_vmap(x64):
    ex = example("lstm", dtype="float64", num_steps=1)
    expected = jax.grad(lambda p: score(rg.unroll(ex.cell, p, ex.state, ex.xs).states))(ex.params)
    for function in (rg.bptt, rg.rtrl, lambda *args: rg.truncated_bptt(*args, window=1)):
        run = jax.jit(lambda p, s, x, function=function: function(ex.cell, p, s, x, score).grads)
        close(run(ex.params, ex.state, ex.xs), expected)
        several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), ex.params)
        mapped = jax.vmap(run, in_axes=(0, None, None))(several, ex.state, ex.xs)
        close(jax.tree.map(lambda leaf: leaf[0], mapped), expected)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_truncation_error_does_not_depend_on_the_loss_unit(size):
    ex = example("lstm")
    error = lambda unit: rg.truncated_bptt(
        ex.cell, ex.params, ex.state, ex.xs, lambda states: unit * jnp.sum(states.h), window=2
    )
    np.testing.assert_allclose(error(size).relative_error, error(1.0).relative_error, rtol=1e-4)
    np.testing.assert_allclose(error(size).cosine, error(1.0).cosine, rtol=1e-4)


def test_a_state_that_is_not_finite_gives_nan_and_no_number():
    cell = rg.cells.vanilla(1, 2, activation="relu")
    params = cell.init(jax.random.key(0))._replace(w_hh=1e30 * jnp.eye(2), b=jnp.ones(2))
    flow = rg.bptt(cell, params, cell.init_state(), jnp.ones((4, 1)), lambda states: jnp.sum(states.h[0]))
    assert np.isnan(flow.state_cotangents.total.h.mantissa[0]).all()


def test_bptt_of_a_map(x64):
    henon = rg.map_cell(lambda s, x: jnp.stack([1 - 1.4 * s[0] ** 2 + s[1], 0.3 * s[0]]))
    start, xs = jnp.array([0.1, 0.2]), jnp.zeros((5, 0))
    flow = rg.bptt(henon, None, start, xs, lambda states: jnp.sum(states[-1]))
    expected = jax.grad(lambda s: jnp.sum(rg.unroll(henon, None, s, xs).final))(start)
    np.testing.assert_allclose(logscaled.to_array(flow.state_cotangents.total)[0], expected, **EXACT)
    assert flow.gate_cotangents is None


@rows(CASES, fast=("vanilla_tanh",))
def test_rtrl_equals_bptt(name, x64):
    ex = example(name, dtype="float64", num_steps=5)
    online = rg.rtrl(ex.cell, ex.params, ex.state, ex.xs, score)
    flow = rg.bptt(ex.cell, ex.params, ex.state, ex.xs, score)
    close((online.loss, online.grads), (flow.loss, flow.grads))


@pytest.mark.slow
def test_rtrl_influence_is_the_derivative_of_the_last_state(x64):
    ex = example("gru_after", dtype="float64")
    online = rg.rtrl(ex.cell, ex.params, ex.state, ex.xs, lambda states: states.h[-1].sum())
    close(online.influence, jax.jacfwd(lambda params: rg.unroll(ex.cell, params, ex.state, ex.xs).final.h)(ex.params))


def _truncated_loop(ex, window, stride):
    """Block by block: run to the window's start without a gradient, from there on with one."""
    num_steps = len(ex.xs)
    states = rg.unroll(ex.cell, ex.params, ex.state, ex.xs).states
    local = jax.grad(score)(states)
    total = jax.tree.map(jnp.zeros_like, ex.params)
    for first in range(0, num_steps, stride):
        end = min(first + stride, num_steps)
        start = max(end - window, 0)

        def share(params, first=first, end=end, start=start):
            state = ex.state if start == 0 else jax.tree.map(lambda leaf: leaf[start - 1], states)
            result = jnp.zeros(())
            for t in range(start, end):
                state, _ = ex.cell.step(params, state, ex.xs[t])
                if t >= first:
                    pairs = zip(jax.tree.leaves(local), jax.tree.leaves(state), strict=True)
                    result = result + sum(jnp.vdot(cotangent[t], leaf) for cotangent, leaf in pairs)
            return result

        total = jax.tree.map(jnp.add, total, jax.grad(share)(ex.params))
    return total


@pytest.mark.parametrize(
    ("window", "stride"),
    [(3, 3), (5, 3), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 1), (4, 2), (7, 7), (40, 2)))],
)
def test_truncated_bptt_equals_a_loop_over_blocks(window, stride, x64):
    ex = example("lstm", dtype="float64", num_steps=7)
    cut = rg.truncated_bptt(ex.cell, ex.params, ex.state, ex.xs, score, window=window, stride=stride)
    close(cut.grads, _truncated_loop(ex, window, stride))
    full = rg.bptt(ex.cell, ex.params, ex.state, ex.xs, score)
    join = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    a, b = join(cut.grads), join(full.grads)
    np.testing.assert_allclose(cut.relative_error, np.linalg.norm(a - b) / np.linalg.norm(b), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(cut.cosine, a @ b / np.linalg.norm(a) / np.linalg.norm(b), rtol=1e-10)
    if window >= 7:
        assert cut.relative_error < 1e-12
    else:
        assert cut.relative_error > 1e-3


@pytest.mark.slow
def test_truncated_bptt_in_a_batch_is_the_sum_over_sequences(x64):
    ex = example("gru_after", dtype="float64")
    states, xs = batch_of(ex)
    square = lambda states: 0.5 * jnp.sum(jnp.square(states.h))
    together = rg.truncated_bptt(ex.cell, ex.params, states, xs, square, window=3, stride=2).grads
    alone = [
        rg.truncated_bptt(
            ex.cell, ex.params, jax.tree.map(lambda leaf, b=b: leaf[b], states), xs[:, b], square, window=3, stride=2
        ).grads
        for b in range(3)
    ]
    close(together, jax.tree.map(lambda *parts: sum(parts), *alone))


@pytest.mark.parametrize("function", [rg.bptt, rg.rtrl, lambda *args: rg.truncated_bptt(*args, window=2)])
def test_bad_input(function):
    ex = example("lstm")
    with pytest.raises(ValueError, match="loss: expected a function of the states that returns a floating scalar"):
        function(ex.cell, ex.params, ex.state, ex.xs, lambda states: states.h)
    with pytest.raises(ValueError, match="1 NaN or inf, the first at time step 2"):
        function(ex.cell, ex.params, ex.state, ex.xs.at[2, 0].set(jnp.nan), last_c)
    with pytest.raises(ValueError, match="T = 0"):
        function(ex.cell, ex.params, ex.state, ex.xs[:0], last_c)
    with pytest.raises(ValueError, match="expected float32"):
        function(ex.cell, ex.params._replace(b=ex.params.b[:-1]), ex.state, ex.xs, last_c)


def test_bad_windows():
    ex = example("lstm")
    for window, stride in ((0, None), (3, 4), (3, 0)):
        with pytest.raises(ValueError, match="1 <= stride <= window"):
            rg.truncated_bptt(ex.cell, ex.params, ex.state, ex.xs, last_c, window=window, stride=stride)


def test_cells_without_a_gradient_to_speak_of():
    with pytest.raises(ValueError, match="has no parameters"):
        rg.truncated_bptt(rg.map_cell(lambda s, x: s), None, jnp.ones(2), jnp.zeros((4, 0)), jnp.sum, window=2)
    ex = example("vanilla_tanh")
    cell = ex.cell._replace(
        init=lambda key: (ex.cell.init(key), jnp.ones(4, jnp.complex64)),
        preactivate=lambda params, s, x: ex.cell.preactivate(params[0], s, x),
    )
    with pytest.raises(ValueError, match="expected real parameters"):
        rg.bptt(cell, (ex.params, jnp.ones(4, jnp.complex64)), ex.state, ex.xs, score)


def test_rtrl_takes_one_sequence():
    ex = example("lstm")
    state, xs = batch_of(ex)
    with pytest.raises(ValueError, match="one sequence"):
        rg.rtrl(ex.cell, ex.params, state, xs, last_c)
