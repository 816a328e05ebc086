"""Equinox: ``eqx.nn.LSTMCell``, ``eqx.nn.GRUCell``, lists of them, and your own modules called as ``cell(x, state)``.

==========  ======================  ==================  ==================================
Equinox     weights                 state               as ours
==========  ======================  ==================  ==================================
LSTMCell    rows in the order ifgo  (h, c)              b = bias
GRUCell     rows in the order rzn   h                   z is our u; b = bias, b_m = bias_n
==========  ======================  ==================  ==================================

Without biases (``use_bias=False``) ours are zero.  Weights are the module itself, or its floating arrays
(``eqx.filter(module, eqx.is_inexact_array)``); everything else of it stays as it is.

Source: equinox 0.13, ``nn/_rnn.py``.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from rnngrad import cells
from rnngrad.interop.adapted import Adapted
from rnngrad.interop.layers import Recurrent, Site, Weights, adapt_layers, only_for_one_cell
from rnngrad.interop.step import GatesFn, cell_of_step, check_weights, starting_at


def adapt_equinox(model: Any, params: Weights, *, state: Any, example: Any, gates: GatesFn | None) -> Adapted:
    """Returns an Equinox model as passes of our cells.

    Args:
      model: a cell, or a list or tuple of cells.
      params: weights in the structure of the model; None for the model's own.
      state: the state to start from, for a model of one cell; a module of your own needs it.
      example: input of one step; a module of your own needs it.
      gates: ``(module, state, x) -> z`` for a module of your own; see :func:`rnngrad.interop.from_step`.

    Raises:
      ValueError: a layer that is not recurrent, params of another model, a missing state or example.

    >>> import equinox as eqx, jax
    >>> from rnngrad.interop import adapt
    >>> adapt(eqx.nn.GRUCell(3, 5, key=jax.random.key(0))).cell_params.b_m.shape
    (5,)
    """
    import equinox as eqx

    is_list = isinstance(model, list | tuple)
    names = [type(module).__name__ for module in (model if is_list else [model])]
    source = f"equinox({', '.join(names)})" if is_list else f"equinox.{names[0]}"
    sites = [Site(module, (index,)) for index, module in enumerate(model)] if is_list else [Site(model, ())]
    layers: list[tuple[Site, ...]] = [(site,) for site in sites]
    only_for_one_cell(source, layers, state=state, gates=gates)

    def normalise(weights: Weights) -> Weights:
        arrays = eqx.filter(weights, eqx.is_inexact_array)
        check_weights(arrays, eqx.filter(model, eqx.is_inexact_array), source=source)
        return arrays

    def adapt_one(site: Site, weights: Weights, x: Any) -> Recurrent:
        module = site.module
        if type(module) in (eqx.nn.LSTMCell, eqx.nn.GRUCell) and gates is None:
            is_lstm = type(module) is eqx.nn.LSTMCell
            factory = cells.lstm if is_lstm else cells.gru
            cell = factory(module.input_size, module.hidden_size, dtype=weights.weight_ih.dtype)
            if state is not None:
                start = cells.LSTMState(*state) if is_lstm else cells.GRUState(state)
                cell = starting_at(cell, start)
            return Recurrent(cell, True, _lstm_params if is_lstm else _gru_params)
        layer = f" (layer {site.path[0]} of {source})" if site.path else ""
        _check_is_recurrent(module, layer)
        if state is None or x is None:
            missing = " and ".join(name for name, given in (("state=", state), ("example=", x)) if given is None)
            raise ValueError(
                f"{type(module).__name__}{layer} is no cell of Equinox: pass {missing} (of one sequence, of one step)"
            )
        static = eqx.partition(module, eqx.is_inexact_array)[1]
        cell = cell_of_step(
            type(module).__name__,
            lambda weights, state, x: eqx.combine(weights, static)(x, state),
            weights,
            state,
            x,
            gates=None if gates is None else lambda weights, state, x: gates(eqx.combine(weights, static), state, x),
        )
        return Recurrent(cell, gates is not None, lambda weights: weights)

    return adapt_layers(source, layers, model if params is None else params, normalise, adapt_one, example=example)


def _lstm_params(cell: Any) -> cells.LSTMParams:
    return cells.LSTMParams(cell.weight_ih, cell.weight_hh, _bias(cell.bias, cell.weight_ih))


def _gru_params(cell: Any) -> cells.GRUParams:
    b, b_m = _bias(cell.bias, cell.weight_ih), _bias(cell.bias_n, cell.weight_hh.T)
    return cells.GRUParams(cell.weight_ih, cell.weight_hh, b, b_m)


def _bias(bias: jax.Array | None, weight: jax.Array) -> jax.Array:
    return jnp.zeros(weight.shape[0], weight.dtype) if bias is None else bias


def _check_is_recurrent(module: Any, layer: str) -> None:
    if not callable(module):
        raise ValueError(
            f"{type(module).__name__}{layer}: expected a module called as cell(x, state), found no __call__"
        )
    signature = inspect.signature(module)
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"{type(module).__name__}{layer}: expected a recurrent module, called as cell(x, state) at every step; "
            f"found __call__{signature}, which keeps no state from step to step"
        ) from error
