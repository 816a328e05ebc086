"""The monitor for a loop of somebody else: its numbers against BPTT and the training monitor, and three real loops."""

from __future__ import annotations

import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rnngrad as rg
from experiments import learning
from rnngrad import training
from rnngrad.interop.adapted import Pass, join
from rnngrad.tasks.batches import Batch
from rnngrad.training.monitor import log_norms
from rnngrad.watch import watch

T, B, D, N = 9, 3, 2, 4


def _adapted(*layers, seed=0):
    """Cells of ours as a model: each layer is a list of (cell, reverse, has_split)."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    weights = tuple(tuple(cell.init(next(keys)) for cell, _, _ in layer) for layer in layers)
    passes = [tuple(Pass("", cell, reverse, split) for cell, reverse, split in layer) for layer in layers]
    return join("ours", passes, lambda tree: tree, weights), weights


def _xs(dtype="float32"):
    return jax.random.normal(jax.random.key(7), (T, B, D), dtype)


def _loss(outputs):
    return jnp.mean(jnp.square(outputs[-1] - 0.3))


def _assert_same(found, expected, **tolerance):
    """Curves, rate, shares; half_life follows from the rate."""
    for field in ("log_retention", "decay_rate", "half_life", "direct_share"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), err_msg=field, **tolerance)
    assert list(found.gate_share) == list(expected.gate_share)
    for gate, share in expected.gate_share.items():
        np.testing.assert_allclose(found.gate_share[gate], share, err_msg=gate, **tolerance)


@jax.jit
def _plain(scaled):
    """Plain numbers for LogScaled leaves."""
    is_scaled = lambda node: isinstance(node, rg.LogScaled)
    return jax.tree.map(rg.logscaled.to_array, scaled, is_leaf=is_scaled)


def test_one_pass_equals_bptt(x64):
    cell = rg.cells.lstm(D, N, forget_bias=1.0, initial_memory=0.4, dtype="float64")
    model, ((params,),) = _adapted([(cell, False, True)])
    xs = _xs("float64")
    flow = watch(model, xs, loss=_loss)(1, ((params,),))
    exact = rg.bptt(cell, params, cell.init_state((B,)), xs, lambda states: _loss(states.h))
    cotangents, gates = jax.device_get(_plain((exact.state_cotangents, exact.gate_cotangents)))
    total, direct, gated = (
        np.log(np.linalg.norm(np.concatenate(jax.tree.leaves(part), axis=-1), axis=-1))
        for part in (cotangents.total, *(jax.tree.map(lambda leaf: leaf[:-1], p) for p in cotangents[1:]))
    )
    curve = (total - total[-1:]).mean(axis=1)[::-1]
    (layer,) = flow.layers
    # float64; one sum in two orders
    np.testing.assert_allclose(layer.log_retention, curve, rtol=0, atol=1e-11)
    shares = 1 / (1 + np.exp(gated - direct))
    np.testing.assert_allclose(layer.direct_share, shares.mean(), rtol=1e-11)
    squares = {gate: np.sum(np.square(getattr(gates, gate))) for gate in "ifgo"}
    for gate, share in layer.gate_share.items():
        np.testing.assert_allclose(share, squares[gate] / sum(squares.values()), rtol=1e-11)


def test_layers_equal_the_training_monitor(x64):
    """A stack is one pass of the adapter, and is measured layer by layer as fit measures it."""
    cells = rg.cells.lstm(D, N, dtype="float64"), rg.cells.gru(N, N + 1, dtype="float64")
    net = rg.training.model(cells, 2)
    params = net.init(jax.random.key(1))
    model, _ = _adapted(*([(cell, False, True)] for cell in cells))
    assert len(model.passes) == 1
    targets = jax.random.normal(jax.random.key(2), (T, B, 2), "float64")
    batch = Batch(_xs("float64"), targets, jnp.ones((T, B)))

    def loss(outputs):
        logits = outputs[-1] @ params.readout.w.T + params.readout.b.reshape(1, -1)
        return rg.losses.mse(logits[None], targets[-1:], jnp.ones((1, B)))

    expected = rg.training.gradient_flow(
        net, params, net.init_state((B,)), batch, lambda o, b: rg.losses.mse(o.outputs, b.targets, b.mask)
    )
    see = watch(model, batch.inputs, loss=loss)
    flow = see(1, tuple((layer,) for layer in params.layers))
    assert see.names == ("layer_0", "layer_1")
    for found, layer in zip(flow.layers, expected.layers, strict=True):
        _assert_same(found, layer, rtol=1e-9, atol=1e-11)  # float64


# --- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reversed_and_bidirectional_passes_equal_brute_force(x64):
    """Every state of a plain loop gets an offset; lags count in each pass's own order."""
    forward, backward = rg.cells.gru(D, N, dtype="float64"), rg.cells.lstm(D, N + 1, dtype="float64")
    upper = rg.cells.vanilla(2 * N + 1, 3, dtype="float64")
    model, weights = _adapted([(forward, False, True), (backward, True, True)], [(upper, True, True)])
    xs = _xs("float64")[:6]
    see = watch(model, xs)
    flow = see(0, weights)
    assert see.names == ("layer_0.forward", "layer_0.backward", "layer_1")

    direction = jax.random.normal(jax.random.key(0), (3,), "float64")
    cells, params = (forward, backward, upper), (*weights[0], *weights[1])

    def one_pass(index, xs, offsets):
        state, outputs = cells[index].init_state(), []
        for t, x in enumerate(xs):
            state, _ = cells[index].step(params[index], state, x)
            state = jax.tree.map(lambda leaf, offset, t=t: leaf + offset[t], state, offsets[index])
            outputs.append(cells[index].read(params[index], state))
        return jnp.stack(outputs)

    def loss(offsets, xs):
        y = one_pass(0, xs, offsets)
        back = one_pass(1, xs[::-1], offsets)[::-1]
        top = one_pass(2, jnp.concatenate([y, back], -1)[::-1], offsets)
        return top[-1] @ direction

    zeros = [jax.tree.map(lambda leaf: jnp.zeros((len(xs), *leaf.shape)), cell.init_state()) for cell in cells]
    gradient = jax.jit(jax.grad(loss))
    gradients = [gradient(zeros, xs[:, b]) for b in range(B)]
    for index, layer in enumerate(flow.layers):
        logs = np.stack([np.asarray(log_norms(gradient[index])) for gradient in gradients], axis=1)[::-1]
        # float64; lag T is s_0, which gets no offset here
        np.testing.assert_allclose(layer.log_retention[:-1], (logs - logs[:1]).mean(axis=1), rtol=0, atol=1e-10)


def test_a_bidirectional_layer_is_measured_from_the_end_of_each_pass():
    """The default loss reads the last step that a pass runs, which of a backward one is the first in time."""
    cell = rg.cells.vanilla(D, N)
    both, weights = _adapted([(cell, False, True), (cell, True, True)])
    same = (weights[0][0], weights[0][0])
    mirrored = jnp.concatenate([_xs(), _xs()[::-1]])  # sounds the same from both ends
    w = jax.random.normal(jax.random.key(0), (2 * N,))
    flow = watch(both, mirrored)(1, (same,))
    alone, _ = _adapted([(cell, False, True)])
    for layer, own in zip(flow.layers, (w[:N], w[N:]), strict=True):
        expected = watch(alone, mirrored, loss=lambda y, own=own: jnp.sum(y[-1] @ own))(1, ((same[0],),))
        _assert_same(layer, expected.layers[0], rtol=1e-4, atol=1e-5)  # float32


def test_a_loss_of_an_earlier_step_starts_there():
    cell = rg.cells.vanilla(D, N)
    model, weights = _adapted([(cell, False, True)])
    xs = _xs()
    early = watch(model, xs, loss=lambda y: jnp.sum(y[T - 4]))(1, weights).layers[0]
    short = watch(model, xs[: T - 3], loss=lambda y: jnp.sum(y[-1]))(1, weights).layers[0]
    np.testing.assert_allclose(early.log_retention[: T - 2], short.log_retention, rtol=1e-5, atol=1e-6)  # float32
    assert np.isnan(early.log_retention[T - 2 :]).all()


def test_without_a_split_there_are_no_shares(tmp_path):
    """The same network as a cell and as a bare step: one curve, and a note in place of the shares."""
    cell = rg.cells.lstm(D, N, forget_bias=1.0)
    model, weights = _adapted([(cell, False, True)])
    bare = rg.Cell(
        "bare",
        None,
        cell.init,
        cell.init_state,
        lambda params, state, x: x,
        lambda params, z, state: (cell.step(params, state, z)[0], None),
        cell.read,
    )
    unsplit, _ = _adapted([(bare, False, False)])
    xs = _xs()
    with watch(unsplit, xs, log=training.jsonl_log(tmp_path / "flow.jsonl")) as see:
        flow = see(1, weights)
    (layer,), (expected,) = flow.layers, watch(model, xs)(1, weights).layers
    np.testing.assert_allclose(layer.log_retention, expected.log_retention, rtol=1e-4, atol=1e-5)  # float32
    assert math.isnan(layer.direct_share)
    assert layer.gate_share == {}
    (record,) = training.read_jsonl(tmp_path / "flow.jsonl")
    assert record["layers"][0]["direct_share"] is None
    assert record["layers"][0]["note"] == "gates unknown: no direct share and no share by gate"


# --- when it measures, and what it writes ----------------------------------------------------------------------------


def test_it_measures_at_the_first_call_and_every_so_many_steps(tmp_path):
    cell = rg.cells.vanilla(D, N)
    model, weights = _adapted([(cell, False, True)])
    with watch(model, _xs(), log=training.jsonl_log(tmp_path / "flow.jsonl"), every=4) as see:
        measured = [step for step in range(1, 11) if see(step, weights) is not None]
        assert see._measure._cache_size() == 1
    assert measured == [1, 4, 8]
    assert [record["step"] for record in training.read_jsonl(tmp_path / "flow.jsonl")] == measured
    with pytest.raises(ValueError, match="expected one that is open, found it closed"):
        see(12, weights)
    see.close()


def test_a_call_in_between_touches_nothing():
    cell = rg.cells.vanilla(D, N)
    model, weights = _adapted([(cell, False, True)])
    see = watch(model, _xs(), every=100)
    see(1, weights)
    assert see(2, object()) is None  # not even looked at


def test_a_resumed_loop_goes_on_with_its_log(tmp_path):
    cell = rg.cells.vanilla(D, N)
    model, weights = _adapted([(cell, False, True)])
    file = tmp_path / "flow.jsonl"

    def loop(steps):
        with watch(model, _xs(), log=training.jsonl_log(file), every=2) as see:
            for step in steps:
                see(step, weights)

    loop(range(1, 9))
    loop(range(5, 11))  # from a checkpoint of step 4
    assert [record["step"] for record in training.read_jsonl(file)] == [1, 2, 4, 5, 6, 8, 10]
    loop(range(1, 3))  # anew: the old file is set aside
    assert [record["step"] for record in training.read_jsonl(file)] == [1, 2]
    assert len(training.read_jsonl(tmp_path / "flow.jsonl.old")) == 7


def test_records_have_the_shape_of_those_of_fit(tmp_path):
    """And the reader of experiments takes them."""
    net = rg.training.model([rg.cells.lstm(D, N)], 1)
    params = net.init(jax.random.key(0))
    batch = Batch(_xs(), jnp.zeros((T, B, 1)), jnp.ones((T, B)))
    rg.training.fit(
        net,
        lambda output, batch: rg.losses.mse(output.outputs, batch.targets, batch.mask),
        optax.sgd(0.1),
        rg.training.initial_state(net, optax.sgd(0.1), jax.random.key(0), B),
        lambda step: batch,
        num_steps=1,
        log_every=1,
        logs=[training.jsonl_log(tmp_path / "fit.jsonl")],
        monitor=rg.training.Monitor(),
    )
    model, _ = _adapted([(net.layers[0], False, True)])
    with watch(model, _xs(), log=training.jsonl_log(tmp_path / "watch.jsonl")) as see:
        see(1, ((params.layers[0],),))
    (of_fit,) = [r for r in training.read_jsonl(tmp_path / "fit.jsonl") if r["kind"] == "flow"]
    (of_watch,) = training.read_jsonl(tmp_path / "watch.jsonl")
    assert of_watch.keys() == of_fit.keys()
    assert of_watch["layers"][0].keys() == of_fit["layers"][0].keys() | {"name", "note"}
    assert of_watch["layers"][0]["note"] == of_watch["layers"][0]["name"] == ""
    history = learning.history([of_watch], loss_unit="nats", reach=lambda update: T)
    assert history["log_retention"].shape == (1, 1, T + 1)
    assert np.isnan(history["clip_fraction"]).all()


def test_dashboards(tmp_path, monkeypatch):
    """TensorBoard and Weights & Biases (a stand-in: it needs an account), side by side."""
    pytest.importorskip("tensorboardX")
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None, init=lambda **options: run))
    forward, backward = rg.cells.lstm(D, N), rg.cells.lstm(D, N)
    model, weights = _adapted([(forward, False, True), (backward, True, True)])
    logs = [
        training.tensorboard_log(tmp_path / "events"),
        training.wandb_log(tmp_path / "wandb", project="p", name="n", config={}),
    ]
    with watch(model, _xs(), log=logs) as see:
        flow = see(1, weights)
    (step, values), ending = calls
    assert step == 1
    assert ending == "finished"
    assert values["flow/forward/gate_share/f"] == float(flow.layers[0].gate_share["f"])
    assert values["flow/backward/log_retention/lag_5"] == float(flow.layers[1].log_retention[5])
    (file,) = (tmp_path / "events").glob("events*")
    assert b"flow/backward/decay_rate" in file.read_bytes()


def test_a_run_of_weights_and_biases_that_is_open_stays_open(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append(step), finish=lambda: calls.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run))  # no init: none is opened
    model, weights = _adapted([(rg.cells.vanilla(D, N), False, True)])
    with watch(model, _xs(), log=training.wandb_log(tmp_path, project="p", name="n", config={})) as see:
        see(1, weights)
    assert calls == [1]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_weights_with_nan_become_a_record_that_says_so(tmp_path):
    lower, upper = rg.cells.lstm(D, N), rg.cells.gru(N, N)
    model, weights = _adapted([(lower, False, True)], [(upper, False, True)])
    bad = weights[0][0]._replace(w_hh=weights[0][0].w_hh.at[1, 2].set(jnp.nan))
    with watch(model, _xs(), log=training.jsonl_log(tmp_path / "flow.jsonl"), every=1) as see:
        see(1, weights)
        flow = see(2, ((bad,), weights[1]))
        see(3, weights)
    assert np.isnan(flow.layers[0].log_retention).all()
    notes = [[layer["note"] for layer in r["layers"]] for r in training.read_jsonl(tmp_path / "flow.jsonl")]
    assert notes == [["", ""], ["NaN or inf in the weights: w_hh", "NaN or inf in the outputs"], ["", ""]]


def test_a_loss_that_hears_nothing_is_noted(tmp_path):
    model, weights = _adapted([(rg.cells.vanilla(D, N), False, True)])
    with watch(model, _xs(), log=training.jsonl_log(tmp_path / "f.jsonl"), loss=lambda y: jnp.zeros(())) as see:
        see(1, weights)
    (record,) = training.read_jsonl(tmp_path / "f.jsonl")
    assert record["layers"][0]["note"] == "no finite gradient reaches this pass"
    assert record["layers"][0]["log_retention"] == [None] * (T + 1)


def test_misuse():
    model, weights = _adapted([(rg.cells.vanilla(D, N), False, True)])
    with pytest.raises(ValueError, match="every: expected at least 1, found 0"):
        watch(model, _xs(), every=0)
    with pytest.raises(ValueError, match="max_sequences: expected at least 1, found 0"):
        watch(model, _xs(), max_sequences=0)
    with pytest.raises(ValueError, match="time_axis: expected 0 or 1, found 2"):
        watch(model, _xs(), time_axis=2)
    with pytest.raises(ValueError, match=r"xs: expected shape \(T, D\) or \(T, B, D\).* found \(4,\)"):
        watch(model, jnp.ones(4))
    with pytest.raises(ValueError, match="xs: expected an array, found float"):
        watch(model, 1.0)
    with pytest.raises(ValueError, match="found 1 NaN or inf, the first at time step 5"):
        watch(model, _xs().at[5, 0, 1].set(jnp.nan))
    with pytest.raises(ValueError, match="expected inputs to measure on"):
        watch(model)(1, weights)
    with pytest.raises(ValueError, match="expected a measurement first"):
        _ = watch(model, _xs()).names
    see = watch(model, _xs(), every=10)
    see(20, weights)
    with pytest.raises(ValueError, match="step: expected one after 20, the last one measured, found 10"):
        see(10, weights)
    see = watch(model, _xs())
    with pytest.raises(ValueError, match=f"expected shape .*D={D}"):
        see(1, weights, jnp.ones((T, B, D + 1)))
    other, _ = _adapted([(rg.cells.vanilla(D, N + 1), False, True)])
    with pytest.raises(ValueError, match=r"params.*expected float32\[5, 2\], found float32\[4, 2\]"):
        watch(other, _xs())(1, weights)


def test_inputs_by_call_and_by_axis():
    model, weights = _adapted([(rg.cells.vanilla(D, N), False, True)])
    xs = _xs()
    expected = watch(model, xs)(1, weights)
    jax.tree.map(np.testing.assert_array_equal, watch(model)(1, weights, xs), expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        watch(model, np.moveaxis(np.asarray(xs), 0, 1), time_axis=1)(1, weights),
        expected,
    )
    one = watch(model, xs[:, 0])(1, weights)
    jax.tree.map(np.testing.assert_array_equal, watch(model, xs, max_sequences=1)(1, weights), one)


# --- loops of others -------------------------------------------------------------------------------------------------


def _curve_by_hand(step, carry, read):
    """Returns xs ↦ ln ‖∂L/∂s_k‖ by lag, relative to the last state: an offset at every state of the library's cell."""

    @jax.jit
    @jax.grad
    def gradient(offsets, xs):
        moved = carry
        for k, offset in enumerate(offsets):
            moved = jax.tree.map(jnp.add, moved, offset)
            if k < len(xs):
                moved = step(moved, xs[k])
        return read(moved)

    def curve(xs):
        gradients = gradient([jax.tree.map(jnp.zeros_like, carry) for _ in range(len(xs) + 1)], xs)
        norms = [math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(g))) for g in gradients]
        return np.log(norms[::-1]) - math.log(norms[-1])

    return curve


def _targets(outputs):
    return jnp.mean(jnp.square(outputs[-1] - 0.3))


class Traced:
    """A loss that counts how often it is traced: once per compilation."""

    def __init__(self):
        self.times = 0

    def __call__(self, outputs):
        self.times += 1
        return jnp.sum(outputs[-1] @ jnp.arange(1.0, 1 + outputs.shape[-1], dtype=outputs.dtype))


def _check(file, loss, flows, by_hand):
    """One compilation, records at 1, 2, 4, and the last of them equal to the library's own cell, step by step."""
    assert loss.times == 1
    records = training.read_jsonl(file)
    assert [record["step"] for record in records] == [1, 2, 4]
    curves = [record["layers"][0]["log_retention"] for record in records]
    assert curves[0] != curves[1] != curves[2]  # the weights moved, and it saw them move
    expected = np.mean([by_hand(_xs()[:, b]) for b in range(B)], axis=0)
    np.testing.assert_allclose(curves[2], expected, rtol=1e-4, atol=1e-4)  # float32, T steps
    assert records[0]["layers"][0]["note"] == ""
    shares = records[0]["layers"][0]["gate_share"]
    np.testing.assert_allclose(sum(shares.values()), 1, rtol=1e-5)
    assert 0 < records[0]["layers"][0]["direct_share"] < 1
    np.testing.assert_array_equal(flows[-1].layers[0].log_retention, np.asarray(curves[2], "float32"))


@pytest.fixture
def as_libraries_expect():
    """Flax and optax leave promotion to JAX."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _read(y):
    return y @ jnp.arange(1.0, 1 + N)


def test_a_loop_with_a_flax_train_state(tmp_path, as_libraries_expect):
    from flax import linen
    from flax.training.train_state import TrainState

    model, xs, loss = linen.RNN(linen.OptimizedLSTMCell(N), time_major=True), _xs(), Traced()
    params = model.init(jax.random.key(0), xs)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.1))

    @jax.jit
    def train_step(state):
        grads = jax.grad(lambda params: _targets(state.apply_fn({"params": params}, xs)))(state.params)
        return state.apply_gradients(grads=grads)

    log, flows = training.jsonl_log(tmp_path / "flow.jsonl"), []
    watch_ = watch(model, xs, log=log, every=2, loss=loss)
    for step in range(1, 5):
        flows += [watch_(step, state)]
        if step < 4:
            state = train_step(state)
    watch_.close()

    cell = linen.OptimizedLSTMCell(N)
    at = {"params": state.params["cell"]}

    carry = cell.initialize_carry(jax.random.key(0), (D,))
    by_hand = _curve_by_hand(lambda c, x: cell.apply(at, c, x)[0], carry, lambda c: _read(c[1]))
    _check(tmp_path / "flow.jsonl", loss, [flow for flow in flows if flow is not None], by_hand)


def test_a_loop_with_an_nnx_optimizer(tmp_path, as_libraries_expect):
    from flax import nnx

    model, xs, loss = nnx.RNN(nnx.LSTMCell(D, N, rngs=nnx.Rngs(0)), time_major=True), _xs(), Traced()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: _targets(model(xs)))(model))

    flows = []
    with watch(model, xs, log=training.jsonl_log(tmp_path / "flow.jsonl"), every=2, loss=loss) as watch_:
        for step in range(1, 5):
            flows += [watch_(step, model)]
            if step < 4:
                train_step(model, optimizer)

    carry = (jnp.zeros(N), jnp.zeros(N))
    by_hand = _curve_by_hand(lambda c, x: model.cell(c, x)[0], carry, lambda c: _read(c[1]))
    _check(tmp_path / "flow.jsonl", loss, [flow for flow in flows if flow is not None], by_hand)


def test_a_loop_with_equinox_and_optax(tmp_path, as_libraries_expect):
    eqx = pytest.importorskip("equinox")
    cell, xs, loss = eqx.nn.GRUCell(D, N, key=jax.random.key(0)), _xs(), Traced()
    optimizer = optax.adam(0.1)
    opt_state = optimizer.init(eqx.filter(cell, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(cell, opt_state):
        def objective(cell):
            def last(xs):
                return jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(N), xs)[0]

            return _targets(jax.vmap(last, in_axes=1)(xs)[None])

        updates, opt_state = optimizer.update(eqx.filter_grad(objective)(cell), opt_state)
        return eqx.apply_updates(cell, updates), opt_state

    flows = []
    watch_ = watch(cell, xs, log=training.jsonl_log(tmp_path / "flow.jsonl"), every=2, loss=loss)
    for step in range(1, 5):
        flows += [watch_(step, cell)]
        if step < 4:
            cell, opt_state = train_step(cell, opt_state)
    watch_.close()

    by_hand = _curve_by_hand(lambda h, x: cell(x, h), jnp.zeros(N), _read)
    _check(tmp_path / "flow.jsonl", loss, [flow for flow in flows if flow is not None], by_hand)
