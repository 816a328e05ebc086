"""Our cells against those of other libraries with the same weights: outputs, final states and every gradient.

Torch comes from a stored fixture (``fixtures/make_torch.py``), Flax linen, Flax nnx and Equinox are run here.  The
reset-before GRU has no installed peer; NumPy stands in for it.

Tolerances are relative to the largest entry of the array compared, since a gradient entry that is small by cancellation
carries the absolute error of its summands.  Two correct implementations differ in the order of their summands: a step
sums D + N + 1 = 8 of them and makes about 8 elementwise roundings; T = 9 steps forward and 9 backward make about 300
roundings.  Their signs are as good as random, so they add up to √300 ≈ 17 ε, and we allow three times that: 50 ε, which
is 6e-6 in float32 and 1.1e-14 in float64 (measured here: at most 4 ε).
"""

from __future__ import annotations

import functools
import pathlib
import tomllib
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnngrad as rg
from rnngrad import cells
from tests.oracles import JACOBIANS, ORACLES

NUM_STEPS, BATCH_SIZE, INPUT_SIZE, HIDDEN_SIZE = 9, 2, 3, 4
ROUNDINGS = 50
FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "torch.npz"


def _assert_close(found, expected, *, dtype, tolerance=None):
    """Asserts that two pytrees agree leaf by leaf, relative to the largest entry of the expected leaf."""
    tolerance = ROUNDINGS * float(np.finfo(dtype).eps) if tolerance is None else tolerance
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype == np.dtype(dtype), jax.tree_util.keystr(path)
        assert np.abs(b).max() > 0, f"{jax.tree_util.keystr(path)}: nothing to compare"
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


# --- Torch, from the fixture -------------------------------------------------------------------------------------


@functools.cache
def _torch_arrays(layer: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as stored:
        return {key.removeprefix(f"{layer}/"): stored[key] for key in stored.files if key.startswith(f"{layer}/")}


def _params_of_torch(layer: str, weights: dict[str, Any], depth: int) -> Any:
    """Returns our parameters of one layer; the gate orders agree (i f g o; r z n is our r u n)."""
    w_ih, w_hh, b_ih, b_hh = (weights[f"{part}_l{depth}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    if layer.startswith("lstm"):
        return cells.LSTMParams(w_ih, w_hh, b_ih + b_hh)
    if layer == "gru":
        # the recurrent bias of n stands inside of r ⊙ (…) and cannot be added to the other one
        b_m = b_hh[2 * HIDDEN_SIZE :]
        return cells.GRUParams(w_ih, w_hh, b_ih + b_hh.at[2 * HIDDEN_SIZE :].set(0.0), b_m)
    return cells.VanillaParams(w_ih, w_hh, b_ih + b_hh)


_OURS_FOR_TORCH = {
    "lstm": lambda: cells.lstm(INPUT_SIZE, HIDDEN_SIZE, dtype=jnp.float64),
    "lstm_two_layers": lambda: cells.stack(
        cells.lstm(INPUT_SIZE, HIDDEN_SIZE, dtype=jnp.float64), cells.lstm(HIDDEN_SIZE, HIDDEN_SIZE, dtype=jnp.float64)
    ),
    "gru": lambda: cells.gru(INPUT_SIZE, HIDDEN_SIZE, dtype=jnp.float64),
    "rnn_tanh": lambda: cells.vanilla(INPUT_SIZE, HIDDEN_SIZE, activation="tanh", dtype=jnp.float64),
    "rnn_relu": lambda: cells.vanilla(INPUT_SIZE, HIDDEN_SIZE, activation="relu", dtype=jnp.float64),
}


def test_fixture_was_made_with_the_pinned_torch():
    root = pathlib.Path(__file__).parent.parent
    peers = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["peers"]
    with np.load(FIXTURE) as stored:
        assert f"torch=={stored['torch_version']}" in peers


@pytest.mark.parametrize("layer", _OURS_FOR_TORCH)
def test_outputs_and_gradients_equal_torch(layer, x64):
    # 1e-12, looser than 50 ε: the fixture's transcendental functions came from another mathematics library (here 5 ε)
    stored = _torch_arrays(layer)
    cell = _OURS_FOR_TORCH[layer]()
    depths = range(len(stored["h_0"]))

    def run(inputs):
        """Returns the weighted sum and what Torch reports; ``inputs`` are Torch's arrays in Torch's layout."""
        layers = [_params_of_torch(layer, inputs, depth) for depth in depths]
        if layer.startswith("lstm"):
            states = [cells.LSTMState(h=inputs["h_0"][depth], c=inputs["c_0"][depth]) for depth in depths]
        else:
            states = [type(cell.init_state())(h=inputs["h_0"][0])]
        if layer == "lstm_two_layers":
            params = cell.init(jax.random.key(0))._replace(layer_0=layers[0], layer_1=layers[1])
            state = cell.init_state((BATCH_SIZE,))._replace(layer_0=states[0], layer_1=states[1])
        else:
            (params,), (state,) = layers, states
        traj = rg.unroll(cell, params, state, inputs["xs"])
        finals = list(traj.final) if layer == "lstm_two_layers" else [traj.final]
        outputs = traj.states.layer_1.h if layer == "lstm_two_layers" else traj.states.h
        results = {"outputs": outputs}
        for field in traj.final.layer_1._fields if layer == "lstm_two_layers" else traj.final._fields:
            results[f"{field}_n"] = jnp.stack([getattr(final, field) for final in finals])
        return jnp.sum(stored["readout"] * outputs), results

    # differentiated through the change of layout: every gradient that Torch stored is compared, both biases included
    inputs = {key: jnp.asarray(stored[key]) for key in stored if f"grad_{key}" in stored}
    (_, results), grads = jax.value_and_grad(run, has_aux=True)(inputs)
    assert set(results) | set(inputs) | {"readout"} == {key for key in stored if not key.startswith("grad_")}
    _assert_close(results, {key: stored[key] for key in results}, dtype="float64", tolerance=1e-12)
    _assert_close(grads, {key: stored[f"grad_{key}"] for key in inputs}, dtype="float64", tolerance=1e-12)


# --- Flax and Equinox, run here ----------------------------------------------------------------------------------
# Every peer is a function make(dtype) -> step(params, state, x) -> state' in our parameters and states, so that one
# test differentiates both sides with respect to the same arrays.


def _rows(weight, num_gates):
    return jnp.split(weight, num_gates, axis=0)


def _dense(kernel, bias=None):
    """Returns a Flax layer's parameters: kernels are (in, out), ours (out, in)."""
    return {"kernel": kernel.T} if bias is None else {"kernel": kernel.T, "bias": bias}


def _linen_simple(dtype):
    peer = flax.linen.SimpleCell(HIDDEN_SIZE, param_dtype=dtype)

    def step(params, state, x):
        variables = {"i": _dense(params.w_ih, params.b), "h": _dense(params.w_hh)}
        return cells.VanillaState(h=peer.apply({"params": variables}, state.h, x)[0])

    return step


def _linen_lstm(dtype, *, factory):
    peer = factory(HIDDEN_SIZE, param_dtype=dtype)

    def step(params, state, x):
        blocks = zip("ifgo", *(_rows(weight, 4) for weight in params), strict=True)
        variables = {}
        for gate, w, u, b in blocks:
            variables |= {f"i{gate}": _dense(w), f"h{gate}": _dense(u, b)}
        (c, h), _ = peer.apply({"params": variables}, (state.c, state.h), x)
        return cells.LSTMState(h=h, c=c)

    return step


def _linen_gru(dtype):
    peer = flax.linen.GRUCell(HIDDEN_SIZE, param_dtype=dtype)

    def step(params, state, x):
        blocks = zip("rzn", *(_rows(weight, 3) for weight in params[:3]), strict=True)
        variables = {}
        for gate, w, u, b in blocks:
            variables |= {f"i{gate}": _dense(w, b), f"h{gate}": _dense(u, params.b_m if gate == "n" else None)}
        return cells.GRUState(h=peer.apply({"params": variables}, state.h, x)[0])

    return step


def _nnx(factory, layers_of, dtype):
    """Returns (params, carry, x) -> carry' of an nnx cell whose layers get the parameters ``layers_of(params)``."""
    graph, variables = nnx.split(factory(INPUT_SIZE, HIDDEN_SIZE, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(variables), is_leaf=lambda leaf: hasattr(leaf, "shape"))

    def step(params, carry, x):
        layers = layers_of(params)
        assert jax.tree.map(jnp.shape, layers) == shapes
        filled = jax.tree.unflatten(jax.tree.structure(variables), jax.tree.leaves(layers))
        return nnx.merge(graph, filled)(carry, x)[0]

    return step


def _nnx_simple(dtype):
    peer = _nnx(
        nnx.SimpleCell, lambda params: {"dense_h": _dense(params.w_hh), "dense_i": _dense(params.w_ih, params.b)}, dtype
    )
    return lambda params, state, x: cells.VanillaState(h=peer(params, state.h, x))


def _nnx_lstm(dtype, *, factory):
    def separate(params):
        layers = {}
        for gate, w, u, b in zip("ifgo", *(_rows(weight, 4) for weight in params), strict=True):
            layers |= {"if_" if gate == "f" else f"i{gate}": _dense(w), f"h{gate}": _dense(u, b)}
        return layers

    def fused(params):
        return {"dense_h": _dense(params.w_hh, params.b), "dense_i": _dense(params.w_ih)}

    peer = _nnx(factory, separate if factory is nnx.LSTMCell else fused, dtype)

    def step(params, state, x):
        c, h = peer(params, (state.c, state.h), x)
        return cells.LSTMState(h=h, c=c)

    return step


def _nnx_gru(dtype):
    """Its candidate has no recurrent bias: the test sets b_m to zero."""
    peer = _nnx(
        nnx.GRUCell, lambda params: {"dense_h": _dense(params.w_hh), "dense_i": _dense(params.w_ih, params.b)}, dtype
    )
    return lambda params, state, x: cells.GRUState(h=peer(params, state.h, x))


def _equinox_lstm(dtype):
    peer = eqx.nn.LSTMCell(INPUT_SIZE, HIDDEN_SIZE, dtype=dtype, key=jax.random.key(0))

    def step(params, state, x):
        filled = eqx.tree_at(lambda cell: (cell.weight_ih, cell.weight_hh, cell.bias), peer, tuple(params))
        h, c = jax.vmap(filled)(x, (state.h, state.c))
        return cells.LSTMState(h=h, c=c)

    return step


def _equinox_gru(dtype):
    peer = eqx.nn.GRUCell(INPUT_SIZE, HIDDEN_SIZE, dtype=dtype, key=jax.random.key(0))

    def step(params, state, x):
        filled = eqx.tree_at(lambda cell: (cell.weight_ih, cell.weight_hh, cell.bias, cell.bias_n), peer, tuple(params))
        return cells.GRUState(h=jax.vmap(filled)(x, state.h))

    return step


class Peer(NamedTuple):
    """A cell of ours and the step of the library that should be the same."""

    ours: Any
    """factory (input_size, hidden_size, dtype=…) -> Cell"""
    make_step: Any
    """dtype -> step(params, state, x) -> state'"""
    absent: tuple[str, ...] = ()
    """parameters that the peer has not: zero on our side, and without a gradient on the peer's"""


PEERS = {
    "linen_SimpleCell": Peer(cells.vanilla, _linen_simple),
    "linen_LSTMCell": Peer(cells.lstm, functools.partial(_linen_lstm, factory=flax.linen.LSTMCell)),
    "linen_OptimizedLSTMCell": Peer(cells.lstm, functools.partial(_linen_lstm, factory=flax.linen.OptimizedLSTMCell)),
    "linen_GRUCell": Peer(cells.gru, _linen_gru),
    "nnx_SimpleCell": Peer(cells.vanilla, _nnx_simple),
    "nnx_LSTMCell": Peer(cells.lstm, functools.partial(_nnx_lstm, factory=nnx.LSTMCell)),
    "nnx_OptimizedLSTMCell": Peer(cells.lstm, functools.partial(_nnx_lstm, factory=nnx.OptimizedLSTMCell)),
    "nnx_GRUCell": Peer(cells.gru, _nnx_gru, absent=("b_m",)),
    "equinox_LSTMCell": Peer(cells.lstm, _equinox_lstm),
    "equinox_GRUCell": Peer(cells.gru, _equinox_gru),
}


class _Problem(NamedTuple):
    """Weights, a state and inputs of order 1, and the weights of the loss."""

    params: Any
    state: Any
    xs: jax.Array
    readout: jax.Array
    final_readout: Any


def _problem(cell: rg.Cell, dtype, *, absent=()) -> _Problem:
    rng = np.random.default_rng(5)

    def normal(shapes, scale=1.0):
        return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), dtype), shapes)

    # 0.6: gates neither saturated nor all in the neighbourhood of 1/2
    params = normal(jax.eval_shape(cell.init, jax.random.key(0)), 0.6)
    state = jax.eval_shape(lambda: cell.init_state((BATCH_SIZE,)))
    sequence = lambda size: jax.ShapeDtypeStruct((NUM_STEPS, BATCH_SIZE, size), dtype)
    return _Problem(
        params._replace(**{name: jnp.zeros_like(getattr(params, name)) for name in absent}),
        normal(state),
        normal(sequence(INPUT_SIZE)),
        normal(sequence(HIDDEN_SIZE)),
        normal(state),
    )


def _loss(states, final, problem):
    """A weighted sum of every output and of every field of the final state."""
    ends = jax.tree.map(lambda a, b: jnp.sum(a * b), final, problem.final_readout)
    return jnp.sum(problem.readout * states.h) + sum(jax.tree.leaves(ends))


def _differentiate(run, problem, absent):
    """Returns states and gradients of ``run(params, state, xs) -> (states, final)`` under the weighted sum."""

    def loss(params, state, xs):
        states, final = run(params, state, xs)
        return _loss(states, final, problem), (states, final)

    loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, results), (grad_params, grad_state, grad_xs) = loss(problem.params, problem.state, problem.xs)
    grad_params = {name: leaf for name, leaf in grad_params._asdict().items() if name not in absent}
    return jax.tree.map(np.asarray, {"results": results, "params": grad_params, "state": grad_state, "xs": grad_xs})


@functools.cache
def _ours(factory, dtype, absent):
    """Returns our cell's side, computed once for all of its peers, and the problem; under the caller's precision."""
    cell = factory(INPUT_SIZE, HIDDEN_SIZE, dtype=dtype)
    problem = _problem(cell, dtype, absent=absent)

    def run(params, state, xs):
        traj = rg.unroll(cell, params, state, xs)
        return traj.states, traj.final

    return problem, _differentiate(run, problem, absent)


def _compare_with_step(factory, step, dtype, *, absent=()):
    """Asserts that ``unroll`` of our cell and a scan of ``step`` agree in states and in all gradients."""
    problem, found = _ours(factory, dtype, absent)

    def run(params, state, xs):
        final, states = jax.lax.scan(lambda carry, x: (step(params, carry, x),) * 2, state, xs)
        return states, final

    _assert_close(found, _differentiate(run, problem, absent), dtype=dtype)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.parametrize("name", PEERS)
def test_outputs_and_gradients_equal_other_libraries(name, dtype):
    peer = PEERS[name]
    # highest: accelerators shorten the factors of a float32 product, and not alike for fused and separate ones
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        dtype = jnp.dtype(dtype)
        _compare_with_step(peer.ours, peer.make_step(dtype), dtype, absent=peer.absent)


def test_nnx_gru_leaves_out_the_recurrent_bias():
    """What ``absent`` above stands for: the peer has no such parameter (its linen namesake has)."""
    variables = nnx.to_pure_dict(nnx.state(nnx.GRUCell(INPUT_SIZE, HIDDEN_SIZE, rngs=nnx.Rngs(0))))
    assert {layer: set(arrays) for layer, arrays in variables.items()} == {
        "dense_h": {"kernel"},
        "dense_i": {"kernel", "bias"},
    }


# --- one fused product against one product per gate --------------------------------------------------------------


def _separate_lstm(params, state, x):
    products = zip(*(_rows(weight, 4) for weight in params), strict=True)
    i, f, g, o = (x @ w.T + state.h @ u.T + b[None] for w, u, b in products)
    c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return cells.LSTMState(h=jax.nn.sigmoid(o) * jnp.tanh(c), c=c)


def _separate_coupled_lstm(params, state, x):
    products = zip(*(_rows(weight, 3) for weight in params), strict=True)
    f, g, o = (x @ w.T + state.h @ u.T + b[None] for w, u, b in products)
    c = jax.nn.sigmoid(f) * state.c + (1.0 - jax.nn.sigmoid(f)) * jnp.tanh(g)
    return cells.LSTMState(h=jax.nn.sigmoid(o) * jnp.tanh(c), c=c)


def _separate_gru(params, state, x):
    (w_r, u_r, b_r), (w_u, u_u, b_u), (w_n, u_n, b_n) = zip(*(_rows(w, 3) for w in params[:3]), strict=True)
    r = jax.nn.sigmoid(x @ w_r.T + state.h @ u_r.T + b_r[None])
    u = jax.nn.sigmoid(x @ w_u.T + state.h @ u_u.T + b_u[None])
    n = jnp.tanh(x @ w_n.T + b_n[None] + r * (state.h @ u_n.T + params.b_m[None]))
    return cells.GRUState(h=(1.0 - u) * n + u * state.h)


SEPARATE = {
    "lstm": (cells.lstm, _separate_lstm),
    "coupled_lstm": (cells.coupled_lstm, _separate_coupled_lstm),
    "gru": (cells.gru, _separate_gru),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_fused_product_equals_one_product_per_gate(name, x64):
    factory, step = SEPARATE[name]
    _compare_with_step(factory, step, jnp.dtype("float64"))


# --- reset before: NumPy only ------------------------------------------------------------------------------------


def test_reset_before_gru_equals_numpy_over_a_sequence(x64):
    cell = cells.gru(INPUT_SIZE, HIDDEN_SIZE, reset="before", dtype=jnp.float64)
    problem = _problem(cell, jnp.float64)
    traj = rg.unroll(cell, problem.params, problem.state, problem.xs)
    params, state, xs = jax.tree.map(np.asarray, (problem.params, problem.state, problem.xs))
    states = []
    for x in xs:
        state = cells.GRUState(**ORACLES["gru_before"](params, state, x))
        states.append(state.h)
    _assert_close(traj.states.h, np.stack(states), dtype="float64")


def test_reset_before_gru_gradient_equals_product_of_closed_form_jacobians(x64):
    """∂(v · h_T)/∂h_0 is v times the NumPy Jacobians, newest on the left."""
    cell = cells.gru(INPUT_SIZE, HIDDEN_SIZE, reset="before", dtype=jnp.float64)
    problem = _problem(cell, jnp.float64)
    v = problem.final_readout.h

    def loss(state):
        return jnp.sum(v * rg.unroll(cell, problem.params, state, problem.xs).final.h)

    params, state, xs = jax.tree.map(np.asarray, (problem.params, problem.state, problem.xs))
    expected = []
    for b in range(BATCH_SIZE):
        chain, one = np.eye(HIDDEN_SIZE), cells.GRUState(h=state.h[b])
        for x in xs[:, b]:
            chain = JACOBIANS["gru_before"](params, one, x) @ chain
            one = cells.GRUState(**ORACLES["gru_before"](params, one, x))
        expected.append(np.asarray(v[b]) @ chain)
    _assert_close(jax.grad(loss)(problem.state).h, np.stack(expected), dtype="float64")


def test_reset_before_gru_gradients_equal_differences_of_the_oracle(x64):
    """Weights and inputs, along one random direction of all of them together."""
    cell = cells.gru(INPUT_SIZE, HIDDEN_SIZE, reset="before", dtype=jnp.float64)
    problem = _problem(cell, jnp.float64)

    def loss(params, xs):
        traj = rg.unroll(cell, params, problem.state, xs)
        return _loss(traj.states, traj.final, problem)

    def numpy_loss(params, xs):
        state, total = jax.tree.map(np.asarray, problem.state), 0.0
        for x, readout in zip(xs, problem.readout, strict=True):
            state = cells.GRUState(**ORACLES["gru_before"](params, state, x))
            total += np.sum(np.asarray(readout) * state.h)
        return total + np.sum(np.asarray(problem.final_readout.h) * state.h)

    rng = np.random.default_rng(11)
    at = jax.tree.map(np.asarray, (problem.params, problem.xs))
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), at)
    moved = lambda eps: jax.tree.map(lambda a, d: a + eps * d, at, direction)
    # central differences: the error of step ε is ε² times a third derivative, plus 1e-16/ε of round-off;
    # a fourth-order rule at ε = 1e-3 has ε⁴ = 1e-12 and 1e-13, times the size of a fifth derivative
    eps = 1e-3
    near = numpy_loss(*moved(eps)) - numpy_loss(*moved(-eps))
    far = numpy_loss(*moved(2 * eps)) - numpy_loss(*moved(-2 * eps))
    expected = (8.0 * near - far) / (12.0 * eps)
    grads = jax.grad(loss, argnums=(0, 1))(problem.params, problem.xs)
    found = sum(np.sum(np.asarray(g) * d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_relevance_gate_form_is_the_reset_before_gru(x64):
    """c' = Γ_u c̃ + (1 − Γ_u) c with c̃ = tanh(W [Γ_r c, x] + b): our cell with the update gate's weights negated."""
    cell = cells.gru(INPUT_SIZE, HIDDEN_SIZE, reset="before", dtype=jnp.float64)
    problem = _problem(cell, jnp.float64)
    sign = np.repeat([1.0, -1.0, 1.0], HIDDEN_SIZE)
    turned = problem.params._replace(
        w_ih=sign[:, None] * problem.params.w_ih, w_hh=sign[:, None] * problem.params.w_hh, b=sign * problem.params.b
    )
    traj = rg.unroll(cell, turned, problem.state, problem.xs)

    (w_r, u_r, b_r), (w_u, u_u, b_u), (w_c, u_c, b_c) = zip(
        *(np.split(np.asarray(weight), 3) for weight in problem.params[:3]), strict=True
    )
    sigmoid = lambda z: 1.0 / (1.0 + np.exp(-z))
    c, memories = np.asarray(problem.state.h), []
    for x in np.asarray(problem.xs):
        relevance = sigmoid(x @ w_r.T + c @ u_r.T + b_r)
        gate = sigmoid(x @ w_u.T + c @ u_u.T + b_u)
        candidate = np.tanh(np.concatenate([relevance * c, x], axis=-1) @ np.concatenate([u_c, w_c], axis=1).T + b_c)
        c = gate * candidate + (1.0 - gate) * c
        memories.append(c)
    _assert_close(traj.states.h, np.stack(memories), dtype="float64")
