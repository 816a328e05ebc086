"""Bad input gets one clear error that names what was expected and what was found."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

import rnngrad as rg
from tests.cases import example

LSTM = example("lstm")

EVERY_FUNCTION = [
    rg.unroll,
    rg.step_jacobians,
    rg.jacobian_chain,
    rg.retention,
    rg.naive_retention,
    rg.gradient_paths,
]
CHAINS = EVERY_FUNCTION[1:]


def raises(*words):
    return pytest.raises(ValueError, match=".*".join(map(re.escape, words)))


@pytest.mark.parametrize("function", EVERY_FUNCTION)
class TestEveryFunction:
    def test_no_time_steps(self, function):
        with raises("xs has T = 0 time steps; expected at least 1"):
            function(*LSTM[:3], LSTM.xs[:0])

    def test_wrong_input_size(self, function):
        with raises("expected shape (T, D=3) or (T, B, D=3) for cell 'lstm', found (6, 5)"):
            function(*LSTM[:3], jnp.ones((6, 5)))

    def test_inputs_without_a_time_axis(self, function):
        with raises("expected shape (T, D=3)", "found (3,)"):
            function(*LSTM[:3], jnp.ones(3))

    def test_state_of_another_size(self, function):
        bad = LSTM.state._replace(c=jnp.zeros(7))
        with raises("state.c: expected float32[4], found float32[7]"):
            function(LSTM.cell, LSTM.params, bad, LSTM.xs)

    def test_state_of_another_cell(self, function):
        other = example("gru_after").state
        with raises("state has the wrong structure: expected", "LSTMState", "found", "GRUState"):
            function(LSTM.cell, LSTM.params, other, LSTM.xs)

    def test_parameters_of_another_cell(self, function):
        with raises("params has the wrong structure: expected", "LSTMParams", "found", "GRUParams"):
            function(LSTM.cell, example("gru_after").params, LSTM.state, LSTM.xs)

    def test_parameters_of_another_shape(self, function):
        bad = LSTM.params._replace(w_hh=LSTM.params.w_hh.T)
        with raises("params.w_hh: expected float32[16, 4], found float32[4, 16]"):
            function(LSTM.cell, bad, LSTM.state, LSTM.xs)

    def test_mixed_dtypes(self, function):
        with raises("expected one floating dtype for params, state and xs, found", "xs bfloat16"):
            function(*LSTM[:3], LSTM.xs.astype(jnp.bfloat16))

    def test_integer_inputs(self, function):
        with raises("expected one floating dtype", "xs int32"):
            function(*LSTM[:3], LSTM.xs.astype(jnp.int32))

    def test_update_that_changes_the_state(self, function):
        cell = LSTM.cell._replace(update=lambda params, z, state: (state.h, None))
        with raises("the state that update of cell 'lstm' returns has the wrong structure"):
            function(cell, *LSTM[1:])

    def test_map_that_changes_its_shape(self, function):
        cell = rg.map_cell(lambda s, x: jnp.append(s, x))
        with raises("the state that update of cell 'map(<lambda>)' returns: expected float32[2], found float32[3]"):
            function(cell, None, jnp.ones(2), jnp.ones(5))


@pytest.mark.parametrize("function", CHAINS)
class TestChains:
    def test_nan_in_the_inputs_with_its_time_step(self, function):
        with raises("xs: expected finite values, found 1 NaN or inf, the first at time step 4"):
            function(*LSTM[:3], LSTM.xs.at[4, 1].set(jnp.nan))

    def test_inf_in_the_weights(self, function):
        bad = LSTM.params._replace(w_ih=LSTM.params.w_ih.at[2, 1].set(jnp.inf))
        with raises("params.w_ih", "found 1 NaN or inf, the first at index (2, 1); it acts from time step 0"):
            function(LSTM.cell, bad, LSTM.state, LSTM.xs)

    def test_nan_in_the_state(self, function):
        with raises("state.c: expected finite values"):
            function(*LSTM[:2], LSTM.state._replace(c=jnp.full(4, jnp.nan)), LSTM.xs)

    def test_a_batch_is_refused_with_the_way_out(self, function):
        with raises("expected one sequence of shape (T, D=3), found (6, 2, 3); use jax.vmap over the batch axis"):
            function(LSTM.cell, LSTM.params, LSTM.cell.init_state((2,)), jnp.ones((6, 2, 3)))

    @pytest.mark.parametrize("side", ["of", "wrt"])
    def test_unknown_block(self, function, side):
        with raises(f"unknown block {side}= 'm'; expected one of: 'h', 'c'"):
            function(*LSTM, **{side: "m"})


@pytest.mark.parametrize("function", [rg.jacobian_chain, rg.retention, rg.naive_retention])
class TestPaths:
    def test_unknown_gate(self, function):
        with raises("unknown gate 'r'; expected one of: 'i', 'f', 'g', 'o'"):
            function(*LSTM, path="only:r")

    @pytest.mark.parametrize("path", ["diagonal", "only", "only:", "with:f", ""])
    def test_unknown_path(self, function, path):
        with pytest.raises(ValueError, match=r"unknown (path|gate)"):
            function(*LSTM, path=path)

    def test_a_cell_without_gates(self, function):
        cell = rg.map_cell(lambda s, x: 0.5 * s + x)
        with raises("unknown gate 'f'; expected one of: none: it is a single array"):
            function(cell, None, jnp.ones(2), jnp.ones((3, 2)), path="only:f")


def test_sizes_and_dtypes_that_no_cell_has():
    with raises("hidden_size: expected at least 1, found -3"):
        rg.cells.lstm(2, -3).init(jax.random.key(0))
    with raises("input_size: expected at least 1, found 0"):
        rg.cells.gru(0, 3).init(jax.random.key(0))
    with raises("dtype: expected a floating dtype, found int32"):
        rg.cells.vanilla(2, 3, dtype=jnp.int32).init(jax.random.key(0))
    with raises("max_lag: expected at least 1, found 0"):
        rg.cells.indrnn(2, 3, max_lag=0)


@pytest.mark.parametrize("shape", [(0, 3, 3), (4, 3, 2), (3, 3)])
def test_prefix_products_of_something_else(shape):
    with raises(f"jacobians: expected shape (T, S, S) with T at least 1, found {shape}"):
        rg.prefix_products(jnp.ones(shape))


def test_a_scalar_array_is_a_state_and_a_plain_number_is_not():
    halving = rg.map_cell(lambda s, x: 0.5 * s)
    curve = rg.retention(halving, None, jnp.asarray(1.0), jnp.ones((3, 1)))
    assert jnp.allclose(curve.log_norm, jnp.arange(4.0) * jnp.log(0.5))
    with raises("state: expected an array, found float 1.0"):
        rg.retention(halving, None, 1.0, jnp.ones((3, 1)))


def test_unknown_norm():
    with raises("unknown norm 'nuclear'; expected 'frobenius' or 'spectral'"):
        rg.retention(*LSTM, norm="nuclear")


def test_negative_crossings():
    with raises("max_crossings: expected at least 0, found -1"):
        rg.gradient_paths(*LSTM, max_crossings=-1)


def test_cotangent_and_block_together():
    with raises("expected either a cotangent or a block of=, found both (of='c')"):
        rg.jacobian_chain(*LSTM, of="c", cotangent=LSTM.state)


def test_cotangent_of_another_shape():
    with raises("cotangent.h: expected float32[4], found float32[5]"):
        rg.jacobian_chain(*LSTM, cotangent=LSTM.state._replace(h=jnp.ones(5)))


def test_leading_axes_that_differ():
    cell = rg.map_cell(lambda s, x: s + x["a"])
    with raises("xs must have one leading time axis T, found leading axes", "('a', (3,)), ('b', (4,))"):
        rg.unroll(cell, None, jnp.ones(2), {"a": jnp.ones((3, 2)), "b": jnp.ones(4)})


def test_a_map_has_no_default_state():
    with raises("a map has no state of its own to start from"):
        rg.map_cell(lambda s, x: s).init_state()


def test_unknown_activation():
    with raises("unknown activation 'gelu'; expected one of: tanh, sigmoid, relu, identity"):
        rg.cells.vanilla(2, 3, activation="gelu")


def test_unknown_initialisation():
    with raises("unknown initialisation 'pytorch'; expected one of: flax, equinox, torch"):
        rg.cells.lstm(2, 3, init="pytorch")


def test_unknown_reset():
    with raises("unknown reset 'middle'; expected 'after' or 'before'"):
        rg.cells.gru(2, 3, reset="middle")


def test_lru_radius_and_dtype():
    with raises("radius: expected 0 <= inner < outer <= 1, found (0.9, 0.5)"):
        rg.cells.lru(2, 3, radius=(0.9, 0.5))
    with raises("lru: expected dtype float32 or float64, found bfloat16"):
        rg.cells.lru(2, 3, dtype=jnp.bfloat16)


def test_stack_of_layers_that_do_not_fit():
    with raises("layer 0 ('gru_reset_after') reads out 5 values, but layer 1 ('lstm') expects input_size 4"):
        rg.cells.stack(rg.cells.gru(3, 5), rg.cells.lstm(4, 4))
    with raises("stack: expected at least one cell, found none"):
        rg.cells.stack()


def test_tracers_pass_the_checks_that_need_values():
    """Under jit nothing can be raised for a NaN in a traced argument: it comes back as a field."""
    run = jax.jit(lambda xs: rg.retention(*LSTM[:3], xs, of="c", wrt="c"))
    curve = run(LSTM.xs.at[2, 0].set(jnp.nan))
    assert curve.nonfinite_step == 3  # s_3 is the first state that heard it
    assert jnp.isnan(curve.log_norm[-1])
    assert run(LSTM.xs).nonfinite_step == -1
    # also when only the last state has heard it
    last = run(LSTM.xs.at[-1, 0].set(jnp.nan))
    assert last.nonfinite_step == len(LSTM.xs)
    assert jnp.isnan(last.log_norm[1:]).all()
