"""The gradient-flow monitor against step Jacobians, brute-force derivatives and closed forms."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad import cells, losses, training
from rnngrad.jacobians import layout_of
from rnngrad.training.monitor import log_norms
from tests.cases import flatten, rows, unflatten

T, D, N, K = 7, 3, 4, 2


class Batch(NamedTuple):
    inputs: jax.Array
    targets: jax.Array
    mask: jax.Array


def _loss(output, batch):
    return losses.mse(output.outputs, batch.targets, batch.mask)


def _batch(mask, dtype="float64"):
    num_steps, batch_size = mask.shape
    key_inputs, key_targets = jax.random.split(jax.random.key(5))
    return Batch(
        jax.random.normal(key_inputs, (num_steps, batch_size, D), dtype),
        jax.random.normal(key_targets, (num_steps, batch_size, K), dtype),
        jnp.asarray(mask, dtype),
    )


CELLS = {
    "lstm": functools.partial(cells.lstm, forget_bias=1.0),
    "vanilla": cells.vanilla,
    "gru_before": functools.partial(cells.gru, reset="before"),
    "peephole_lstm": cells.peephole_lstm,
    "min_gru": cells.min_gru,
    "lru": cells.lru,
}


@rows(CELLS, fast=["lstm"])
def test_retention_and_shares_equal_products_of_step_jacobians(name, x64):
    """One sequence, one layer: the cotangent of the last state, pulled back step by step by explicit Jacobians."""
    cell = CELLS[name](D, N, dtype="float64")
    model = training.model([cell], K)
    params, batch = model.init(jax.random.key(1)), _batch(np.ones((T, 1)))
    flow = training.gradient_flow(model, params, model.init_state((1,)), batch, _loss).layers[0]

    state, xs = cell.init_state(), batch.inputs[:, 0]
    run = rg.unroll(cell, params.layers[0], state, xs)

    def last_loss(s):
        return jnp.mean(
            (params.readout.w @ cell.read(params.layers[0], s) + params.readout.b - batch.targets[-1, 0]) ** 2
        )

    # complex states as real pairs, for which jax.grad gives the conjugate
    start = np.concatenate(
        [np.concatenate([leaf.real, -leaf.imag]) if np.iscomplexobj(leaf) else leaf
         for leaf in map(np.asarray, jax.tree.leaves(jax.grad(last_loss)(run.final)))]
    )  # fmt: skip
    full = np.asarray(rg.step_jacobians(cell, params.layers[0], state, xs))
    layout = layout_of(state)
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), state, run.states)

    def update_alone(s, x):
        z = cell.preactivate(params.layers[0], s, x)
        return jax.jacrev(lambda v: flatten(cell.update(params.layers[0], z, unflatten(layout, v))[0]))(flatten(s))

    direct = np.asarray(jax.jit(jax.vmap(update_alone))(before, xs))
    cotangents, shares = [start], []
    for k in reversed(range(T)):
        through_direct, through_gates = cotangents[-1] @ direct[k], cotangents[-1] @ (full[k] - direct[k])
        sizes = np.linalg.norm(through_direct), np.linalg.norm(through_gates)
        shares.append(sizes[0] / sum(sizes))
        cotangents.append(cotangents[-1] @ full[k])
    expected = np.log(np.linalg.norm(cotangents, axis=1))
    # float64, products of T matrices of a few rows
    np.testing.assert_allclose(flow.log_retention, expected - expected[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(flow.direct_share, np.mean(shares), rtol=1e-10)
    slope = np.polynomial.Polynomial.fit(np.arange(1, T + 1), (expected - expected[0])[1:], 1).convert().coef[1]
    np.testing.assert_allclose(flow.decay_rate, slope, rtol=1e-9)
    np.testing.assert_allclose(flow.half_life, rg.half_life(jnp.asarray(slope)), rtol=1e-9)


def test_layers_gates_and_unequal_lengths_equal_brute_force(x64):
    """Two layers, three sequences of other lengths: every state and pre-activation of a plain loop gets an offset."""
    lower, upper = cells.lstm(D, N, dtype="float64"), cells.gru(N, N + 1, dtype="float64")
    model = training.model([lower, upper], K)
    params = model.init(jax.random.key(1))
    ends = [7, 4, 6]
    mask = np.zeros((T, 3))
    for sequence, end in enumerate(ends):
        mask[end - 3 : end, sequence] = 1  # several steps count; the last of them is measured
    batch = _batch(mask)

    @jax.jit
    def offsets_gradient(xs, target, is_end):
        def loss(offsets):
            s = list(model.init_state())
            outputs = []
            for t, x in enumerate(xs):
                for index, cell in enumerate(model.layers):
                    z = cell.preactivate(params.layers[index], s[index], x)
                    z = jax.tree.map(lambda leaf, o, t=t: leaf + o[t], z, offsets[index][1])
                    s[index], _ = cell.update(params.layers[index], z, s[index])
                    s[index] = jax.tree.map(lambda leaf, o, t=t: leaf + o[t], s[index], offsets[index][0])
                    x = cell.read(params.layers[index], s[index])
                outputs.append(params.readout.w @ x + params.readout.b)
            return jnp.mean((is_end @ jnp.stack(outputs) - target) ** 2)

        zeros = []
        for index, cell in enumerate(model.layers):
            state = cell.init_state()
            z = jax.eval_shape(cell.preactivate, params.layers[index], state, jnp.zeros(cell.input_size))
            zeros.append(jax.tree.map(lambda leaf: jnp.zeros((T, *leaf.shape)), (state, z)))
        return jax.grad(loss)(zeros)

    flow = training.gradient_flow(model, params, model.init_state((3,)), batch, _loss)
    each = [
        offsets_gradient(batch.inputs[:, b], batch.targets[ends[b] - 1, b], jnp.eye(T)[ends[b] - 1]) for b in range(3)
    ]
    for index, layer in enumerate(flow.layers):
        by_lag: list[list[float]] = [[] for _ in range(T + 1)]
        for end, gradient in zip(ends, each, strict=True):
            states = np.concatenate(jax.tree.leaves(gradient[index][0]), axis=-1)
            logs = np.log(np.linalg.norm(states[:end], axis=-1))[::-1]
            for lag, value in enumerate(logs):
                by_lag[lag].append(value - logs[0])
        expected = np.array([np.mean(values) for values in by_lag[: max(ends)]])
        # lag T is s_0, which the loop above gives no offset; a lag that only s_0 of a shorter sequence has mixes it in
        only_offsets = [lag for lag in range(T) if lag not in ends]
        np.testing.assert_allclose(layer.log_retention[np.array(only_offsets)], expected[only_offsets], atol=1e-10)
        squares = {
            name: sum(float(np.sum(np.square(getattr(gradient[index][1], name)))) for gradient in each)
            for name in layer.gate_share
        }
        for name, share in layer.gate_share.items():
            np.testing.assert_allclose(share, squares[name] / sum(squares.values()), rtol=1e-10)
        np.testing.assert_allclose(sum(layer.gate_share.values()), 1, rtol=1e-12)


def test_constant_orthogonal_decay_in_closed_form():
    """h' = a Q h + …, Q orthogonal: lag · ln a at every lag, in a float32 network."""
    a = 0.8
    model = training.model([cells.vanilla(D, N, activation="identity")], K)
    params = model.init(jax.random.key(0))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
    layer = params.layers[0]._replace(w_hh=jnp.asarray(a * rotation, "float32"))
    flow = training.gradient_flow(
        model, params._replace(layers=(layer,)), model.init_state((5,)), _batch(np.ones((40, 5)), "float32"), _loss
    ).layers[0]
    # float32: 40 products of relative error some 1e-7 each
    np.testing.assert_allclose(flow.log_retention, np.arange(41) * math.log(a), rtol=0, atol=2e-5)
    np.testing.assert_allclose(flow.decay_rate, math.log(a), rtol=1e-5)
    np.testing.assert_allclose(flow.half_life, math.log(2) / -math.log(a), rtol=1e-5)
    # a vanilla cell has no direct path, and one gate
    assert float(flow.direct_share) == 0
    assert [float(share) for share in flow.gate_share.values()] == [1.0]


def test_only_the_first_sequences_are_measured():
    model = training.model([cells.vanilla(D, N)], K)
    params, batch = model.init(jax.random.key(0)), _batch(np.ones((T, 6)), "float32")
    part = jax.tree.map(lambda leaf: leaf[:, :2], batch)
    some = training.gradient_flow(model, params, model.init_state((6,)), batch, _loss, max_sequences=2)
    alone = training.gradient_flow(model, params, model.init_state((2,)), part, _loss)
    jax.tree.map(np.testing.assert_array_equal, some, alone)


def test_one_step():
    model = training.model([cells.lstm(D, N)], K)
    flow = training.gradient_flow(
        model, model.init(jax.random.key(0)), model.init_state((2,)), _batch(np.ones((1, 2)), "float32"), _loss
    ).layers[0]
    assert flow.log_retention.shape == (2,)
    assert flow.log_retention[0] == 0
    assert math.isnan(flow.decay_rate)  # one lag has no slope


def test_sequences_without_loss_are_left_out():
    model = training.model([cells.vanilla(D, N)], K)
    params = model.init(jax.random.key(0))
    mask = np.ones((T, 3))
    mask[:, 1] = 0
    batch = _batch(mask, "float32")
    rest = jax.tree.map(lambda leaf: leaf[:, np.array([0, 2])], batch)
    some = training.gradient_flow(model, params, model.init_state((3,)), batch, _loss).layers[0]
    expected = training.gradient_flow(model, params, model.init_state((2,)), rest, _loss).layers[0]
    # float32, means taken in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), some, expected)

    nothing = training.gradient_flow(
        model,
        params,
        model.init_state((3,)),
        batch._replace(mask=jnp.zeros((T, 3))),
        lambda o, b: 0.0 * o.outputs.sum(),
    ).layers[0]
    assert np.isnan(nothing.log_retention).all()
    assert math.isnan(nothing.decay_rate)
    assert math.isnan(nothing.direct_share)


def test_a_gradient_that_dies_is_minus_infinity_and_the_rate_that_of_the_rest():
    a = 1e-3  # float32 dies between lags 13 and 15
    model = training.model([cells.vanilla(D, N, activation="identity")], K)
    params = model.init(jax.random.key(0))
    params = params._replace(layers=(params.layers[0]._replace(w_hh=a * jnp.eye(N)),))
    flow = training.gradient_flow(
        model, params, model.init_state((2,)), _batch(np.ones((30, 2)), "float32"), _loss
    ).layers[0]
    found = np.asarray(flow.log_retention)
    np.testing.assert_allclose(found[:12], np.arange(12) * math.log(a), rtol=1e-4)
    assert np.isneginf(found[16:]).all()
    # denormal numbers round coarsely just before the end
    np.testing.assert_allclose(flow.decay_rate, math.log(a), rtol=0.02)


def test_a_mask_of_the_wrong_shape():
    model = training.model([cells.lstm(D, N)], K)
    with pytest.raises(ValueError, match=r"mask: expected shape \(T, B\), found \(7,\)"):
        training.gradient_flow(
            model,
            model.init(jax.random.key(0)),
            model.init_state(),
            Batch(jnp.ones((T, D)), jnp.ones((T, K)), jnp.ones(T)),
            _loss,
        )


def test_norms_of_tiny_and_large_numbers():
    found = log_norms((jnp.array([[3e-30, 0.0], [0.0, 0.0], [3e30, 0.0]]), jnp.array([[4e-30], [0.0], [4e30]])))
    # float32
    np.testing.assert_allclose(found, [math.log(5e-30), -math.inf, math.log(5e30)], rtol=1e-6)


@pytest.mark.compiled
@pytest.mark.slow
def test_overhead_of_the_default_interval():
    """Work, not seconds: one measurement, of 8 sequences out of 32, costs less than a fifth of a step's operations.

    One every 100 steps then adds 0.2 %; all 32 sequences would cost a third of a step, the weights' gradient left out.
    """
    model = training.model([cells.lstm(D, 32)], K)
    params, batch = model.init(jax.random.key(0)), _batch(np.ones((50, 32)), "float32")
    state = model.init_state((32,))

    def plain(params, state, batch):
        return jax.grad(lambda p: _loss(model.apply(p, state, batch.inputs), batch))(params)

    def measured(params, state, batch):
        return training.gradient_flow(
            model, params, state, batch, _loss, max_sequences=training.Monitor().max_sequences
        )

    flops = [jax.jit(f).lower(params, state, batch).compile().cost_analysis()["flops"] for f in (plain, measured)]
    assert flops[1] < 0.2 * flops[0]
    assert training.Monitor().every >= 100
