"""Models of other libraries through ``interop.adapt``: outputs, gradients, the split, and what is refused.

The oracle is the library itself, run here.  Outputs agree within 1e-6 of the largest entry and gradients, taken with
respect to the library's own weights, within 1e-5: the issue's bounds, and of the size of the roundings of a float32 run
of T = 6 steps in another order of summation (measured: 3.3e-7 and 4.1e-6, both in three layers; 1e-6 for the rest).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnngrad as rg
from rnngrad import cells, interop
from rnngrad.interop import adapt, from_step

NUM_STEPS, INPUT_SIZE, HIDDEN_SIZE = 6, 3, 4


def _normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _moved(weights, seed=3):
    """Returns weights away from their symmetric start: every bias non-zero, every gate different."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), weights)


class Model(NamedTuple):
    run: Callable[[Any, jax.Array], jax.Array]
    """(weights, xs) -> outputs in the order of time, by the library"""
    weights: Any
    adapted: interop.Adapted
    cells: tuple[str, ...]
    """names of the cells that it should become"""
    splits: tuple[bool, ...]
    dtype: Any = jnp.float32
    tolerance: tuple[float, float] = (1e-6, 1e-5)
    """of outputs and of gradients"""


# --- Flax nnx --------------------------------------------------------------------------------------------------------


def _nnx(make, *names, splits=None, dtype=jnp.float32, flipped=False, tolerance=(1e-6, 1e-5)):
    """A model of RNNs; ``flipped`` where its outputs come in reversed order."""

    def build():
        model = make(nnx.Rngs(0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        params = _moved(params)
        nnx.update(model, params)
        order = -1 if flipped else 1

        def run(params, xs):
            return nnx.merge(graph, params, rest, copy=True)(xs)[::order]

        known = splits or (True,) * len(names)
        with jax.numpy_dtype_promotion("strict"):
            adapted = adapt(model)
        return Model(run, params, adapted, names, known, dtype, tolerance)

    return build


def _nnx_cell_from_a_carry():
    """A bare cell that starts elsewhere than at zero."""
    cell = nnx.LSTMCell(INPUT_SIZE, HIDDEN_SIZE, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(cell, nnx.Param, ...)
    params = _moved(params)
    carry = (_normal(HIDDEN_SIZE, seed=1), _normal(HIDDEN_SIZE, seed=2))

    def run(params, xs):
        cell = nnx.merge(graph, params, rest, copy=True)
        return jax.lax.scan(cell, carry, xs)[1]

    return Model(run, params, adapt(cell, params, state=carry), ("lstm",), (True,))


# Flax rounds the activations to bfloat16 as well, we the pre-activations alone: eps is 2^-8, and three roundings per
# step over 6 steps reach the outputs; gradients pass twice as many.
_BFLOAT16 = (3 * 2**-8, 10 * 2**-8)

_D, _N = INPUT_SIZE, HIDDEN_SIZE
_X = jnp.ones(_D)


def _narrow_gru(rngs):
    narrow = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    # the default draws an orthogonal matrix, which LAPACK has not in bfloat16
    return nnx.GRUCell(_D, _N, recurrent_kernel_init=nnx.initializers.lecun_normal(), rngs=rngs, **narrow)


MODELS: dict[str, Callable[[], Model]] = {
    "nnx_LSTMCell_from_a_carry": _nnx_cell_from_a_carry,
    "nnx_OptimizedLSTMCell": _nnx(lambda k: nnx.RNN(nnx.OptimizedLSTMCell(_D, _N, rngs=k)), "lstm"),
    "nnx_GRUCell": _nnx(lambda k: nnx.RNN(nnx.GRUCell(_D, _N, rngs=k)), "gru_reset_after"),
    "nnx_SimpleCell_relu": _nnx(
        lambda k: nnx.RNN(nnx.SimpleCell(_D, _N, activation_fn=jax.nn.relu, rngs=k)), "vanilla"
    ),
    "nnx_SimpleCell_residual": _nnx(
        lambda k: nnx.RNN(nnx.SimpleCell(_D, _N, residual=True, rngs=k)), "SimpleCell", splits=(False,)
    ),
    "nnx_GRUCell_other_gate": _nnx(
        lambda k: nnx.RNN(nnx.GRUCell(_D, _N, gate_fn=jax.nn.hard_sigmoid, rngs=k)), "GRUCell", splits=(False,)
    ),
    "nnx_reversed": _nnx(lambda k: nnx.RNN(nnx.GRUCell(_D, _N, rngs=k), reverse=True), "gru_reset_after", flipped=True),
    "nnx_Sequential": _nnx(
        lambda k: nnx.Sequential(nnx.RNN(nnx.LSTMCell(_D, _N, rngs=k)), nnx.RNN(nnx.GRUCell(_N, 5, rngs=k))),
        "stack(lstm, gru_reset_after)",
    ),
    # the second layer hears the first one's outputs in reversed order, and so does the third
    "nnx_reversed_within": _nnx(
        lambda k: nnx.Sequential(
            nnx.RNN(nnx.SimpleCell(_D, _N, rngs=k)),
            nnx.RNN(nnx.SimpleCell(_N, 5, rngs=k), reverse=True),
            nnx.RNN(nnx.SimpleCell(5, 2, rngs=k), reverse=True, keep_order=True),
        ),
        "vanilla",
        "vanilla",
        "vanilla",
        flipped=True,
    ),
    "nnx_Bidirectional_below": _nnx(
        lambda k: nnx.Sequential(
            nnx.RNN(nnx.SimpleCell(_D, 2, rngs=k), reverse=True),
            nnx.Bidirectional(nnx.RNN(nnx.GRUCell(2, _N, rngs=k), reverse=True), nnx.RNN(nnx.LSTMCell(2, 5, rngs=k))),
            nnx.RNN(nnx.SimpleCell(9, 2, rngs=k)),
        ),
        "vanilla",
        "gru_reset_after",
        "lstm",
        "vanilla",
        flipped=True,
    ),
    "nnx_bfloat16_products": _nnx(
        lambda k: nnx.RNN(nnx.LSTMCell(_D, _N, dtype=jnp.bfloat16, rngs=k)), "lstm_bfloat16", tolerance=_BFLOAT16
    ),
    "nnx_bfloat16": _nnx(
        lambda k: nnx.RNN(_narrow_gru(k)),
        "gru_reset_after",
        dtype=jnp.bfloat16,
        tolerance=_BFLOAT16,
    ),
}


def _nnx_list():
    rngs = nnx.Rngs(0)
    rnns = [nnx.RNN(nnx.SimpleCell(_D, _N, rngs=rngs)), nnx.RNN(nnx.SimpleCell(_N, 2, rngs=rngs))]
    split = [nnx.split(rnn, nnx.Param, ...) for rnn in rnns]
    weights = [_moved(params, seed) for seed, (_, params, _) in enumerate(split)]

    def run(weights, xs):
        for (graph, _, rest), params in zip(split, weights, strict=True):
            xs = nnx.merge(graph, params, rest, copy=True)(xs)
        return xs

    return Model(run, weights, adapt(rnns, weights), ("stack(vanilla, vanilla)",), (True,))


def _nnx_shared():
    """One cell in both directions, whose weights nnx stores once."""
    cell = nnx.SimpleCell(_D, _N, rngs=nnx.Rngs(0))
    return nnx.Bidirectional(nnx.RNN(cell), nnx.RNN(cell))


MODELS["nnx_list"] = _nnx_list
MODELS["nnx_shared_cell"] = _nnx(lambda k: _nnx_shared(), "vanilla", "vanilla")


# --- Flax linen ------------------------------------------------------------------------------------------------------


def _linen(model, *names, splits=None, flipped=False, dtype=jnp.float32, tolerance=(1e-6, 1e-5)):
    def build():
        variables = _moved(model.init(jax.random.key(0), jnp.ones((2, INPUT_SIZE), dtype)))
        order = -1 if flipped else 1
        known = splits or (True,) * len(names)
        run = lambda variables, xs: model.apply(variables, xs)[::order]
        return Model(run, variables, adapt(model, variables), names, known, dtype, tolerance)

    return build


def _linen_cell_from_a_carry():
    """The inner dict of weights, and a state of its own."""
    cell = nn.GRUCell(_N)
    carry = _normal(_N, seed=1)
    params = _moved(cell.init(jax.random.key(0), carry, jnp.ones(_D))["params"])
    run = lambda params, xs: jax.lax.scan(lambda s, x: cell.apply({"params": params}, s, x), carry, xs)[1]
    return Model(run, params, adapt(cell, params, state=carry), ("gru_reset_after",), (True,))


MODELS |= {
    "linen_GRUCell_from_a_carry": _linen_cell_from_a_carry,
    "linen_LSTMCell": _linen(nn.RNN(nn.LSTMCell(_N)), "lstm"),
    "linen_OptimizedLSTMCell": _linen(nn.RNN(nn.OptimizedLSTMCell(_N, gate_fn=jnp.tanh)), "lstm"),
    "linen_SimpleCell": _linen(nn.RNN(nn.SimpleCell(_N), reverse=True, keep_order=True), "vanilla"),
    "linen_MGUCell": _linen(nn.RNN(nn.MGUCell(_N)), "MGUCell", splits=(False,)),
    "linen_stack_with_MGUCell": _linen(
        nn.Sequential([nn.RNN(nn.SimpleCell(_N)), nn.RNN(nn.MGUCell(5))]), "stack(vanilla, MGUCell)", splits=(False,)
    ),
    "linen_Bidirectional": _linen(
        nn.Sequential([nn.Bidirectional(nn.RNN(nn.GRUCell(_N)), nn.RNN(nn.SimpleCell(2))), nn.RNN(nn.LSTMCell(5))]),
        "gru_reset_after",
        "vanilla",
        "lstm",
    ),
    "linen_reversed": _linen(
        nn.Sequential([nn.RNN(nn.SimpleCell(_N), reverse=True), nn.RNN(nn.SimpleCell(2))]),
        "stack(vanilla, vanilla)",
        flipped=True,
    ),
    "linen_bfloat16_products": _linen(
        nn.RNN(nn.GRUCell(_N, dtype=jnp.bfloat16)), "gru_reset_after_bfloat16", tolerance=_BFLOAT16
    ),
}


# --- Equinox, Haiku, functions ---------------------------------------------------------------------------------------


class Gated(eqx.Module):
    """A module of one's own: a leaky cell whose update hears the input beside the gate, too."""

    w: jax.Array
    u: jax.Array
    name: str = eqx.field(static=True, default="leak")

    def gates(self, state, x):
        return {self.name: self.w @ x + self.u @ state["h"]}

    def __call__(self, x, state):
        share = jax.nn.sigmoid(self.gates(state, x)["leak"])
        h = share * state["h"] + (1.0 - share) * jnp.tanh(self.w @ x)
        return h, {"h": h, "sum": state["sum"] + h}


def _scanned(step, state):
    """Returns (weights, xs) -> outputs of ``step(weights, state, x) -> (state, y)``."""
    return lambda weights, xs: jax.lax.scan(functools.partial(step, weights), state, xs)[1]


def _equinox(make, name, state, *, splits=(True,)):
    def build():
        module = _moved(make(jax.random.key(0)))

        def step(module, state, x):
            new = module(x, state)
            return new, new[0] if isinstance(new, tuple) else new

        return Model(_scanned(step, state), module, adapt(module, state=state), (name,), splits)

    return build


def _equinox_stack():
    key = jax.random.key(0)
    model = _moved([eqx.nn.LSTMCell(_D, _N, key=key), eqx.nn.GRUCell(_N, 2, use_bias=False, key=key)])

    def run(model, xs):
        zeros = (jnp.zeros(_N), jnp.zeros(_N)), jnp.zeros(2)

        def step(states, x):
            h, c = model[0](x, states[0])
            return ((h, c), model[1](h, states[1])), model[1](h, states[1])

        return jax.lax.scan(step, zeros, xs)[1]

    return Model(run, model, adapt(model), ("stack(lstm, gru_reset_after)",), (True,))


def _equinox_own():
    module = Gated(_normal(_N, _D, seed=1), _normal(_N, _N, seed=2))
    state = {"h": _normal(_N, seed=4), "sum": jnp.zeros(_N)}
    step = lambda module, state, x: module(x, state)[::-1]
    adapted = adapt(module, state=state, example=jnp.ones(_D))
    return Model(_scanned(step, state), module, adapted, ("Gated",), (False,))


def _haiku(draws):
    def build():
        import haiku as hk

        f = hk.transform(lambda x, state: hk.LSTM(_N)(x, state))
        state = hk.LSTMState(hidden=_normal(_N, seed=1), cell=_normal(_N, seed=2))
        params = _moved(f.init(jax.random.key(0), jnp.ones(_D), state))
        model = f if draws else hk.without_apply_rng(f)
        step = lambda params, state, x: f.apply(params, None, x, state)[::-1]
        adapted = adapt(model, params, state=state, example=jnp.ones(_D))
        return Model(_scanned(step, state), params, adapted, ("Transformed",), (False,))

    return build


def _function():
    """Complex memory in a dict, read out by weights of its own."""

    def step(params, state, x):
        memory = params["decay"] * state["memory"] + jax.lax.complex(*(params["b"] @ x))
        return params["c"] @ memory.real, {"memory": memory}

    params = {
        "decay": _normal(_N, seed=1).astype(jnp.complex64) * jnp.complex64(0.5 + 0.3j),
        "b": _normal(2, _N, _D, seed=2),
        "c": _normal(2, _N, seed=3),
    }
    state = {"memory": _normal(_N, seed=4).astype(jnp.complex64)}
    adapted = adapt(step, params, state=state, example=jnp.ones(_D))
    return Model(_scanned(lambda p, s, x: step(p, s, x)[::-1], state), params, adapted, ("step",), (False,))


_PAIR = (_normal(HIDDEN_SIZE, seed=6), _normal(HIDDEN_SIZE, seed=7))
MODELS |= {
    "equinox_LSTMCell": _equinox(lambda k: eqx.nn.LSTMCell(_D, _N, key=k), "lstm", _PAIR),
    "equinox_LSTMCell_no_bias": _equinox(lambda k: eqx.nn.LSTMCell(_D, _N, use_bias=False, key=k), "lstm", _PAIR),
    "equinox_GRUCell": _equinox(lambda k: eqx.nn.GRUCell(_D, _N, key=k), "gru_reset_after", _PAIR[0]),
    "equinox_list": _equinox_stack,
    "equinox_module": _equinox_own,
    "haiku_transform": _haiku(True),
    "haiku_without_apply_rng": _haiku(False),
    "function": _function,
}


# what another row shows in part; the rest has one row for every layout of weights and every direction
_SLOW = {
    *("nnx_bfloat16", "nnx_GRUCell_other_gate", "nnx_list", "nnx_reversed", "nnx_Sequential", "nnx_reversed_within"),
    *("linen_LSTMCell", "linen_bfloat16_products", "linen_reversed", "linen_stack_with_MGUCell", "linen_Bidirectional"),
    *("nnx_SimpleCell_residual", "equinox_LSTMCell", "equinox_list", "haiku_without_apply_rng"),
}


@functools.cache
def _model(name):
    return MODELS[name]()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in MODELS]
)
def test_outputs_and_gradients_equal_the_library(name):
    # Flax itself adds arrays of two dtypes where `dtype` is not `param_dtype`
    promotion = jax.numpy_dtype_promotion("standard" if "products" in name else "strict")
    with promotion, jax.default_matmul_precision("highest"):
        model = _model(name)
        assert tuple(one.cell.name for one in model.adapted.passes) == model.cells
        assert tuple(one.has_split for one in model.adapted.passes) == model.splits
        xs = _normal(NUM_STEPS, INPUT_SIZE, seed=5, dtype=model.dtype)
        shape = jax.eval_shape(model.run, model.weights, xs).shape
        readout = _normal(*shape, seed=8, dtype=model.dtype)

        def differentiated(run):
            def loss(weights):
                ys = run(weights, xs)
                return jnp.sum(readout * ys.astype(model.dtype)), ys

            (_, ys), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.weights)
            return ys, gradients

        expected, expected_gradients = differentiated(model.run)

        with jax.numpy_dtype_promotion("strict"):
            ys, gradients = differentiated(
                lambda weights, xs: interop.run(model.adapted, model.adapted.convert(weights), xs)[0]
            )
    for_outputs, for_gradients = model.tolerance
    _assert_close(ys, expected, for_outputs)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    jax.tree.map(lambda a, b: _assert_close(a, b, for_gradients), gradients, expected_gradients)


def _assert_close(found, expected, tolerance):
    found, expected = (
        np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf) for leaf in (found, expected)
    )
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0, "nothing to compare"
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", ["nnx_OptimizedLSTMCell", "linen_GRUCell_from_a_carry", "equinox_LSTMCell"])
def test_conversion_is_linear(name):
    model = _model(name)
    convert = model.adapted.convert
    other = _moved(model.weights, seed=9)
    both = convert(jax.tree.map(lambda a, b: 2.0 * a - 3.0 * b, model.weights, other))
    apart = jax.tree.map(lambda a, b: 2.0 * a - 3.0 * b, convert(model.weights), convert(other))
    # nothing is summed in `convert`: the same products in the same order
    jax.tree.map(np.testing.assert_array_equal, both, apart)


def test_weights_come_as_state_dict_or_module():
    rnn = nnx.RNN(nnx.GRUCell(_D, _N, rngs=nnx.Rngs(0)))
    other = nnx.RNN(nnx.GRUCell(_D, _N, rngs=nnx.Rngs(1)))
    state = nnx.state(other)
    expected = adapt(other).params
    for weights in (other, state, nnx.filter_state(state, nnx.Param), nnx.to_pure_dict(nnx.state(other, nnx.Param))):
        jax.tree.map(np.testing.assert_array_equal, adapt(rnn, weights).params, expected)
    assert not np.array_equal(adapt(rnn).cell_params.w_ih, expected[0][0].w_ih)


def test_a_cell_of_ours_is_taken_as_it_is():
    cell = cells.stack(cells.gru(_D, _N), cells.lstm(_N, 2))
    params = cell.init(jax.random.key(0))
    adapted = adapt(cell, params)
    assert adapted.cell is cell
    assert adapted.cell_params is params
    assert adapted.passes[0].has_split
    assert adapted.convert(params) == ((params,),)
    start = jax.tree.map(lambda leaf: leaf + 1.0, cell.init_state())
    jax.tree.map(np.testing.assert_array_equal, adapt(cell, params, state=start).cell.init_state(), start)

    plane = rg.map_cell(lambda s, x: jnp.stack([1.0 - 1.4 * s[0] ** 2 + s[1], 0.3 * s[0]]))
    mapped = adapt(plane, state=jnp.asarray([0.1, 0.2]))
    assert not mapped.passes[0].has_split
    found = interop.run(mapped, mapped.params, jnp.zeros((3, 0)))[0]
    np.testing.assert_array_equal(found, rg.unroll(plane, None, jnp.asarray([0.1, 0.2]), jnp.zeros((3, 0))).states)


def test_batches_come_from_vmap():
    model = _model("linen_MGUCell")
    batch = _normal(2, NUM_STEPS, INPUT_SIZE, seed=5)
    found = jax.vmap(lambda xs: interop.run(model.adapted, model.adapted.params, xs)[0])(batch)
    # the library takes a batch by itself; two roundings in another order
    np.testing.assert_allclose(found, model.run(model.weights, batch), rtol=0, atol=1e-6)


def test_what_a_layer_heard_and_in_which_direction():
    model = _model("nnx_Bidirectional_below")
    passes = model.adapted.passes
    assert [one.name for one in passes] == ["layer_0", "layer_1.backward", "layer_1.forward", "layer_2"]
    assert [one.reverse for one in passes] == [True, True, False, True]
    assert model.adapted.source == (
        "nnx.Sequential(RNN(SimpleCell), Bidirectional(GRUCell, LSTMCell), RNN(SimpleCell))"
    )


# --- the split of a step function -----------------------------------------------------------------------------------


class Four(NamedTuple):
    i: jax.Array
    f: jax.Array
    g: jax.Array
    o: jax.Array


def _lstm_gates(params, state, x):
    return Four(*jnp.split(params.w_ih @ x + params.w_hh @ state["h"] + params.b, 4))


def _lstm_step(params, state, x, gates=_lstm_gates):
    z = gates(params, state, x)
    c = jax.nn.sigmoid(z.f) * state["c"] + jax.nn.sigmoid(z.i) * jnp.tanh(z.g)
    h = jax.nn.sigmoid(z.o) * jnp.tanh(c)
    return {"h": h, "c": c}, h


class StepModule(eqx.Module):
    """The same LSTM as a module with a method for its gates."""

    params: cells.LSTMParams

    def gates(self, state, x):
        return _lstm_gates(self.params, state, x)

    def __call__(self, x, state):
        return _lstm_step(self, state, x, gates=StepModule.gates)[0]


def _plain(params, state):
    return from_step(_lstm_step, params, state, jnp.ones(_D), gates=_lstm_gates)


def _jitted(params, state):
    """Step and gates each in calls of their own, not the same ones."""
    gates = jax.jit(_lstm_gates)
    step = jax.checkpoint(jax.jit(functools.partial(_lstm_step, gates=jax.jit(lambda *args: gates(*args)))))
    return from_step(step, params, state, jnp.ones(_D), gates=_lstm_gates)


def _method(params, state):
    return adapt(StepModule(params), state=state, example=jnp.ones(_D), gates=StepModule.gates)


_PATHS = ("direct", "only:f", "without:o")


@pytest.mark.parametrize(("make", "paths"), [(_plain, _PATHS), (_jitted, ("only:f",)), (_method, ("only:f",))])
def test_named_gates_give_the_split_of_our_own_cell(make, paths):
    ours = cells.lstm(_D, _N)
    params = _moved(ours.init(jax.random.key(0)))
    state = cells.LSTMState(h=_normal(_N, seed=1), c=_normal(_N, seed=2))
    xs = _normal(NUM_STEPS, _D, seed=5)
    found = make(params, state._asdict())
    assert found.passes[0].has_split
    arguments = (found.cell, found.cell_params, found.cell.init_state(), xs)
    assert rg.gate_names(*arguments) == rg.gate_names(ours, params, state, xs)
    for path in paths:
        # the same operations in the same order; a fused product may be summed in another
        curve = rg.retention(*arguments, of="c", wrt="c", path=path)
        expected = rg.retention(ours, params, state, xs, of="c", wrt="c", path=path)
        np.testing.assert_allclose(curve.log_norm, expected.log_norm, rtol=1e-6, atol=1e-6)


def test_what_the_input_does_beside_the_gates_is_kept():
    """The step equals the module, D is its derivative at frozen gates, and x is a field of z without a share."""
    module = Gated(_normal(_N, _D, seed=1), _normal(_N, _N, seed=2))
    state = {"h": _normal(_N, seed=4), "sum": _normal(_N, seed=5)}
    x = _normal(_D, seed=6)
    own = lambda module, state, x: module.gates(state, x)
    adapted = adapt(module, state=state, example=x, gates=own)
    cell, params = adapted.cell, adapted.cell_params
    assert rg.gate_names(cell, params, state, x[None]) == ("leak", "x")
    new, _ = cell.step(params, state, x)
    y, expected = module(x, state)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    # the output is the new h itself, found in the program
    np.testing.assert_array_equal(cell.read(params, new), y)

    z = cell.preactivate(params, state, x)
    direct = jax.jacfwd(lambda s: cell.update(params, z, s)[0]["h"])(state)["h"]
    share = jax.nn.sigmoid(module.gates(state, x)["leak"])
    np.testing.assert_allclose(direct, jnp.diag(share), rtol=0, atol=1e-7)
    only_x = rg.retention(cell, params, state, x[None], of="h", wrt="h", path="only:x").log_norm
    np.testing.assert_array_equal(
        only_x, rg.retention(cell, params, state, x[None], of="h", wrt="h", path="direct").log_norm
    )


class Leaky(nnx.RNNCellBase):
    """An nnx cell of one's own with a method for its gates."""

    num_feature_axes = 1

    def __init__(self, rngs):
        self.in_features = _D
        self.dense = nnx.Linear(_D + _N, _N, rngs=rngs)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros((*input_shape[:-1], _N))

    def gates(self, carry, x):
        return {"n": self.dense(jnp.concatenate([x, carry]))}

    def __call__(self, carry, x):
        carry = 0.75 * carry + 0.25 * jnp.tanh(self.gates(carry, x)["n"])
        return carry, 2.0 * carry


def test_gates_of_an_nnx_cell_are_a_method_of_it():
    cell = Leaky(nnx.Rngs(0))
    adapted = adapt(nnx.RNN(cell), gates=Leaky.gates)
    assert adapted.passes[0].has_split
    xs = _normal(3, _D, seed=5)
    arguments = (adapted.cell, adapted.cell_params, adapted.cell.init_state(), xs)
    assert rg.gate_names(*arguments) == ("n",)
    direct = rg.retention(*arguments, path="direct").log_norm
    # powers of two and three: nothing is rounded but the logarithm
    np.testing.assert_allclose(direct, np.arange(4) * np.log(0.75), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(interop.run(adapted, adapted.params, xs)[0], nnx.RNN(cell)(xs), rtol=0, atol=1e-6)


class Memory(NamedTuple):
    fast: jax.Array
    slow: jax.Array


def test_what_is_read_out_without_an_output():
    """All leaves joined, or the one named h; an output that holds more than the new state is not taken for it."""
    state = Memory(_normal(2, seed=1), _normal(3, seed=2))
    step = lambda params, state, x: Memory(state.slow[:2] + x[:2], 0.5 * state.slow)
    np.testing.assert_array_equal(
        from_step(step, None, state, _X).cell.read(None, state), jnp.concatenate([state.fast, state.slow])
    )
    named = {"c": _normal(2, seed=1), "h": _normal(3, seed=2)}
    skipping = lambda params, state, x: (state["h"] + x, {"c": state["c"], "h": state["h"] * x})
    np.testing.assert_array_equal(from_step(skipping, None, named, _X).cell.read(None, named), named["h"])


def test_a_derivative_rule_of_the_users_survives_the_cut():
    """A straight-through step below the gates: by its program its derivative would be zero."""

    @jax.custom_jvp
    def stepped(z):
        return jnp.sign(z)

    # the same values by another rule: never taken for one another
    tripled = jax.custom_jvp(lambda z: jnp.sign(z))
    stepped.defjvp(lambda primals, tangents: (stepped(*primals), tangents[0]))
    tripled.defjvp(lambda primals, tangents: (tripled(*primals), 3.0 * tangents[0]))
    gates = lambda w, h, x: w @ h + x

    def step(w, h, x):
        z = gates(w, h, x)
        return 0.5 * h + stepped(z) + tripled(z)

    w, h, xs = _normal(_N, _N, seed=1), _normal(_N, seed=2), _normal(3, _N, seed=3)
    found = from_step(step, w, h, xs[0], gates=gates)
    expected = 0.5 * jnp.eye(_N) + 4.0 * w
    for jacobian in rg.step_jacobians(found.cell, w, h, xs):
        np.testing.assert_allclose(jacobian, expected, rtol=0, atol=1e-6)


def test_gates_that_call_a_function_with_a_derivative_of_its_own():
    """The rates that the recurrent weights hear: at frozen ones only the leak remains, whatever else is rectified."""
    gates = lambda w, h, x: {"rate": jax.nn.relu(h)}
    step = lambda w, h, x: 0.75 * h + jax.nn.relu(w @ gates(w, h, x)["rate"] + x)
    w, h, x = _normal(_N, _N, seed=1), _normal(_N, seed=2), _normal(_N, seed=3)
    cell = from_step(step, w, h, x, gates=gates).cell
    direct = jax.jacfwd(lambda s: cell.update(w, cell.preactivate(w, h, x), s)[0])(h)
    np.testing.assert_array_equal(direct, 0.75 * jnp.eye(_N))


def test_tokens_are_inputs_too():
    """Integers: no declared input size, and the embedding is part of the step."""
    gates = lambda params, h, token: params["w"] @ h + params["embedding"][token]
    step = lambda params, h, token: jnp.tanh(gates(params, h, token))
    params = {"w": _normal(_N, _N, seed=1), "embedding": _normal(7, _N, seed=2)}
    h, tokens = _normal(_N, seed=3), jnp.asarray([3, 0, 6])
    for one in (gates, None):
        adapted = from_step(step, params, h, tokens[0], gates=one)
        assert adapted.cell.input_size is None
        expected = jax.jacfwd(lambda h: functools.reduce(functools.partial(step, params), tokens, h))(h)
        chain = rg.jacobian_chain(adapted.cell, params, h, tokens)
        found = (chain.mantissa * jnp.exp2(chain.log_scale / jnp.log(2.0)).reshape(-1, 1, 1))[0]
        # products of three matrices of order 1
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------

_STATE = {"h": jnp.zeros(_N)}


class Head(nnx.Module):
    """A whole model, of which only a part is recurrent."""

    def __init__(self):
        self.rnn = nnx.RNN(nnx.GRUCell(_D, _N, rngs=nnx.Rngs(0)))
        self.out = nnx.Linear(_N, 2, rngs=nnx.Rngs(0))


class Torchlike:
    """Stands in for a Torch module, which is told by where its class lives."""

    __module__ = "torch.nn.modules.rnn"


class Skipping(nnx.RNNCellBase):
    """Its output holds the input, which is not in its carry."""

    in_features = _D
    num_feature_axes = 1

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros(input_shape)

    def __call__(self, carry, x):
        new = jnp.tanh(carry + x)
        return new, new + x


def _lstm_rnn(size=_D):
    return nnx.RNN(nnx.LSTMCell(size, _N, rngs=nnx.Rngs(0)))


def _map(f, **given):
    return lambda: adapt(f, **({"state": _STATE, "example": _X} | given))


def _rates(p, s, x):
    return {"rate": jax.nn.relu(s["h"])}


def _rates_leaking(p, s, x):
    """Rectifies the state for its leak, and again as its gates do."""
    leak = s["h"] - 0.25 * jax.nn.relu(s["h"])
    return {"h": leak + _rates(p, s, x)["rate"][::-1]}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    # params of another model
    "nnx_weights_of_another_cell": (
        lambda: adapt(_lstm_rnn(), nnx.state(nnx.RNN(nnx.GRUCell(_D, _N, rngs=nnx.Rngs(0))))),
        r"params are those of another model: nnx.RNN\(LSTMCell\) expects 12 arrays; missing: .*not expected:",
    ),
    "nnx_weights_of_another_size": (
        lambda: adapt(_lstm_rnn(), nnx.state(_lstm_rnn(5))),
        r"params.cell.if_.kernel: expected float32\[3, 4\], found float32\[5, 4\]",
    ),
    "linen_no_weights": (lambda: adapt(nn.RNN(nn.GRUCell(_N))), "pass params, the variables that its `init` returned"),
    "linen_weights_of_another_cell": (
        lambda: adapt(nn.RNN(nn.GRUCell(_N)), nn.RNN(nn.LSTMCell(_N)).init(jax.random.key(0), jnp.ones((2, _D)))),
        r"params are those of another model: GRUCell expects 'cell.ir.kernel', found \('cell.hf.bias', ",
    ),
    "linen_weights_of_another_size": (
        lambda: adapt(nn.RNN(nn.GRUCell(5)), nn.RNN(nn.GRUCell(_N)).init(jax.random.key(0), jnp.ones((2, _D)))),
        r"expected float32\[.*5.*\], found float32",
    ),
    "linen_weights_at_another_place": (
        lambda: adapt(nn.RNN(nn.GRUCell(_N)), {"params": {"rnn": jnp.ones(2)}}),
        r"GRUCell expects 'cell.ir.kernel', found \('rnn',\)",
    ),
    "equinox_weights_of_another_size": (
        lambda: adapt(eqx.nn.GRUCell(_D, _N, key=jax.random.key(0)), eqx.nn.GRUCell(2, _N, key=jax.random.key(0))),
        r"params.weight_ih: expected float32\[12, 3\], found float32\[12, 2\]",
    ),
    "our_weights_of_another_size": (
        lambda: adapt(cells.gru(_D, _N), cells.gru(2, _N).init(jax.random.key(0))),
        r"params.w_ih: expected float32\[12, 3\], found float32\[12, 2\]",
    ),
    "our_cell_without_weights": (lambda: adapt(cells.gru(_D, _N)), r"pass params, e.g. cell.init\(key\)"),
    "convert_weights_of_another_model": (
        lambda: adapt(_lstm_rnn()).convert({"cell": {}}),
        "params are those of another model",
    ),
    # states that change
    "state_of_another_shape": (
        _map(lambda p, s, x: {"h": jnp.append(s["h"], 0.0)}),
        r"state.h changes in a step: expected float32\[4\], found float32\[5\]",
    ),
    "state_of_another_dtype": (
        _map(lambda p, s, x: ({"h": s["h"].astype(jnp.bfloat16)}, s["h"])),
        r"state.h changes in a step: expected float32\[4\], found bfloat16\[4\]",
    ),
    "state_of_another_structure": (
        _map(lambda p, s, x: {"h": s["h"], "c": s["h"]}),
        r"changes its structure in a step: expected \{h: float32\[4\]\}, found \{c: float32\[4\], h: float32\[4\]\}",
    ),
    "state_that_flax_itself_refuses": (
        lambda: adapt(nnx.SimpleCell(_D, _N, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))),
        r"SimpleCell: state changes in a step: expected float32\[4\], found bfloat16\[4\]",
    ),
    "state_that_counts": (
        _map(lambda p, s, x: s, state={"h": jnp.zeros(2), "step": jnp.zeros((), jnp.int32)}),
        r"state.step: expected a floating or complex dtype, found int32\[\]",
    ),
    "either_could_be_the_state": (
        _map(lambda p, s, x: ({"h": s["h"] + 1.0}, {"h": s["h"] * 2.0})),
        r"a pair of which both could be the state .*lambda params, state, x: step",
    ),
    # models without a time axis
    "nnx_layer_without_time": (
        lambda: adapt(nnx.Linear(_D, _N, rngs=nnx.Rngs(0))),
        "the model: expected nnx.RNN.* found Linear, which keeps no state from step to step",
    ),
    "nnx_layer_between": (
        lambda: adapt(nnx.Sequential(_lstm_rnn(), jax.nn.relu, _lstm_rnn(_N))),
        "layer 1 of the model: .*relu.* keeps no state",
    ),
    "nnx_whole_model": (lambda: adapt(Head()), "found Head, .*it holds rnn: adapt that"),
    "linen_layer_without_time": (lambda: adapt(nn.Dense(3), {}), "found Dense, which keeps no state"),
    "equinox_layer_without_time": (
        lambda: adapt(eqx.nn.Linear(_D, _N, key=jax.random.key(0)), state=_STATE, example=_X),
        r"Linear: expected a recurrent module, called as cell\(x, state\)",
    ),
    "equinox_layer_between": (
        lambda: adapt([eqx.nn.GRUCell(_D, _N, key=jax.random.key(0)), eqx.nn.Linear(_N, 2, key=jax.random.key(0))]),
        r"Linear \(layer 1 of equinox\(GRUCell, Linear\)\): expected a recurrent module",
    ),
    "function_without_time": (_map(lambda p, x: x), r"expected a function step\(params, state, x\), found"),
    # options that ours have not, and sizes that do not fit
    "another_merge": (
        lambda: adapt(nnx.Bidirectional(_lstm_rnn(), _lstm_rnn(), merge_fn=jnp.add)),
        "default merge_fn .*found 'add'",
    ),
    "layers_that_do_not_fit": (
        lambda: adapt([_lstm_rnn(), _lstm_rnn()]),
        r"layer 1 \(LSTMCell\) expects inputs of size 3, but hears 4 values",
    ),
    "example_with_a_time_axis": (
        lambda: adapt(_lstm_rnn(), example=jnp.ones((5, _D))),
        r"example: expected a 1-dimensional input of one step of LSTMCell \(no batch, no time\), found shape \(5, 3\)",
    ),
    "output_that_is_not_in_the_state": (
        lambda: adapt(nnx.RNN(Skipping())),
        "Skipping: its output cannot be computed from its new state",
    ),
    "gates_for_two_layers": (
        lambda: adapt([_lstm_rnn(), _lstm_rnn(_N)], gates=_lstm_gates),
        r"gates: expected for a model of one cell, but nnx\(RNN\(LSTMCell\), RNN\(LSTMCell\)\) has 2",
    ),
    "state_of_the_wrong_kind": (
        lambda: adapt(_lstm_rnn(), state=jnp.zeros(_N)),
        r"expected a pair \(c, h\)",
    ),
    # gates
    "gate_not_in_the_step": (
        _map(lambda p, s, x: {"h": jnp.tanh(s["h"])}, gates=lambda p, s, x: {"r": s["h"] + 1.0}),
        r"the value 'r' \(float32\[4\]\) does not occur in the program of",
    ),
    "gate_named_twice": (
        _map(
            lambda p, s, x: {"h": jnp.tanh(s["h"] * 2.0)}, gates=lambda p, s, x: {"a": s["h"] * 2.0, "b": s["h"] * 2.0}
        ),
        "'a' and 'b' are the same value",
    ),
    # which of two equal calls is meant is not known: neither where one of them is a gate nor where a gate needs one
    "gate_called_twice": (
        _map(_rates_leaking, gates=_rates),
        "calls relu 2 times on the same values, its gates 1, so that which of these calls is the gates' is not known; "
        "compute it once",
    ),
    "gate_made_of_what_is_called_twice": (
        _map(_rates_leaking, gates=lambda p, s, x: {"reversed": _rates(p, s, x)["rate"][::-1]}),
        "calls relu 2 times on the same values",
    ),
    "gates_of_our_cell": (
        lambda: adapt(cells.gru(_D, _N), cells.gru(_D, _N).init(jax.random.key(0)), gates=_lstm_gates),
        "has its own; give none",
    ),
    # something missing, or no model
    "function_without_state": (
        lambda: adapt(lambda p, s, x: s, example=_X),
        "pass state=; state is that of one sequence",
    ),
    "function_without_example": (lambda: adapt(lambda p, s, x: s, state=_STATE), "pass example=; "),
    "equinox_module_without_state": (
        lambda: adapt(Gated(jnp.ones((_N, _D)), jnp.ones((_N, _N)))),
        "Gated is no cell of Equinox: pass state= and example=",
    ),
    "params_that_are_no_arrays": (
        _map(lambda p, s, x: s, params={"rate": 0.5}),
        "params.rate: expected an array, found float",
    ),
    "torch_module": (lambda: adapt(Torchlike()), "not a JAX model: .*rg.interop.from_torch"),
    "mapping": (lambda: adapt({"weight_ih_l0": np.zeros((4, 3))}), "a mapping of weights alone"),
    "path": (lambda: adapt("weights.safetensors"), "rg.interop.read_weights reads a file"),
    "array": (lambda: adapt(jnp.zeros(3)), "expected an rg.Cell, a Flax nnx or linen cell.*; found "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_was_expected_and_found(name):
    attempt, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        attempt()
