r"""Models: layers of cells between an optional embedding and a read-out, as pure functions.

::

    x_0[t] = drop(E[id[t]])  or  drop(x[t])           embedding, when the inputs are ids
    s_l    = unroll(cell_l, s_l[0], x_l)              one scan per layer, over all steps
    x_{l+1}[t] = drop(read_l(s_l[t+1]))               what the next layer, or the read-out, sees
    y[t]   = V x_L[t] + b                             outputs (logits), for every step

drop sets entries to 0 with probability p and divides the others by 1 − p.  It stands on these arrows only, never on the
recurrence: Zaremba, Sutskever & Vinyals 2014, arXiv 1409.2329, eq. 2 and figure 2.

Unlike ``cells.stack``, which makes one cell of all layers and scans once, layers here are unrolled one after the other:
every layer's input product is then one matmul over all steps, and each layer's gradient splits into its own direct and
gated part.  The states are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Key

from rnngrad.cells.stack import stack
from rnngrad.losses import ReadoutParams, readout
from rnngrad.types import Cell, Params, Real, State, Trajectory
from rnngrad.unroll import Taps, unroll
from rnngrad.unroll import zero_taps as zero_cell_taps


class ModelParams(NamedTuple):
    """Weights of a model."""

    embedding: Float[Array, "V D"] | None
    """None when the inputs are no ids."""
    layers: tuple[Params, ...]
    readout: ReadoutParams


class LayerTaps(NamedTuple):
    """Zeros added inside a layer; the gradient with respect to them is the gradient that passes there."""

    steps: Taps
    """Where ``update`` and ``preactivate`` read the state, and at the pre-activations."""
    states: State
    """At the states after each step, leading axis T, as seen by everything but the layer's own next step: the layer
    above, the read-out, the loss."""


class Output(NamedTuple):
    """What a model returns, leading axis T."""

    outputs: Inexact[Array, "T *batch K"]
    trajectories: tuple[Trajectory, ...]
    """States and gates, layer by layer."""
    final: tuple[State, ...]
    """The states after the last step: the memory that the next window starts from."""


@runtime_checkable
class ApplyFn(Protocol):
    """Maps (params, state, inputs) to an Output; a key switches dropout on."""

    def __call__(
        self,
        params: ModelParams,
        state: tuple[State, ...],
        inputs: Array,
        *,
        key: Key[Array, ""] | None = None,
        taps: tuple[LayerTaps, ...] | None = None,
    ) -> Output: ...


@runtime_checkable
class InitFn(Protocol):
    """Draws the parameters of a model from a key."""

    def __call__(self, key: Key[Array, ""]) -> ModelParams: ...


@runtime_checkable
class InitStateFn(Protocol):
    """Returns the states before the first step, layer by layer."""

    def __call__(self, batch_shape: tuple[int, ...] = ()) -> tuple[State, ...]: ...


class Model(NamedTuple):
    """Layers, embedding and read-out as pure functions; static and hashable; two calls give two models, so keep it."""

    layers: tuple[Cell, ...]
    output_size: int
    vocabulary_size: int | None
    dropout: float
    init: InitFn
    init_state: InitStateFn
    apply: ApplyFn


def _drop(key: Key[Array, ""] | None, x: Array, rate: float) -> Array:
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _all_uniform(key: Key[Array, ""], tree: Any, limit: float) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.uniform(k, x.shape, x.dtype, -limit, limit) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def model(
    layers: Sequence[Cell],
    output_size: int,
    *,
    vocabulary_size: int | None = None,
    dropout: Real = 0.0,
    uniform: Real | None = None,
) -> Model:
    """Returns a model of ``layers``, the first one nearest to the input, and a linear read-out.

    Args:
      layers: at least one cell; the input size of each must be what the one below reads out.
      output_size: K, the number of outputs per step.
      vocabulary_size: V, when the inputs are ids in 0 … V − 1, shape (T, B); each has a vector of the first layer's
        input size, drawn from N(0, 1).  None: the inputs are vectors, shape (T, B, D).
      dropout: probability that an entry between layers is set to 0 while training, in [0, 1).
      uniform: every weight and bias of the model, the embedding included, is drawn from U(−uniform, uniform) instead
        of by its own scheme, as Zaremba et al. 2014 do.

    Raises:
      ValueError: no layer, sizes that do not fit, numbers out of range, ``uniform`` for complex weights.

    >>> import jax
    >>> import rnngrad as rg
    >>> net = rg.training.model([rg.cells.gru(3, 5), rg.cells.lstm(5, 4)], 7, vocabulary_size=11)
    >>> params, ids = net.init(jax.random.key(0)), jax.numpy.ones((6, 2), "int32")
    >>> net.apply(params, net.init_state((2,)), ids).outputs.shape
    (6, 2, 7)
    """
    cells = tuple(layers)
    if not cells:
        raise ValueError("layers: expected at least one cell, found none")
    stack(*cells)  # raises when sizes do not fit
    if output_size < 1:
        raise ValueError(f"output_size: expected at least 1, found {output_size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), found {dropout}")
    input_size = cells[0].input_size
    if input_size is None:
        raise ValueError(f"layers: expected cells that declare their input size, found {cells[0].name!r}")
    if vocabulary_size is not None and vocabulary_size < 1:
        raise ValueError(f"vocabulary_size: expected at least 1, found {vocabulary_size}")
    rate = float(dropout)
    last = cells[-1]
    read = jax.eval_shape(lambda key: last.read(last.init(key), last.init_state()), jax.random.key(0))
    linear = readout(read.shape[-1], output_size, dtype=read.dtype)

    def init(key):
        key_embedding, key_readout, key_layers, key_uniform = jax.random.split(key, 4)
        embedding = None
        if vocabulary_size is not None:
            embedding = jax.random.normal(key_embedding, (vocabulary_size, input_size), read.dtype)
        keys = jax.random.split(key_layers, len(cells))
        drawn = ModelParams(
            embedding,
            tuple(cell.init(key_layer) for cell, key_layer in zip(cells, keys, strict=True)),
            linear.init(key_readout),
        )
        return drawn if uniform is None else _all_uniform(key_uniform, drawn, float(uniform))

    if uniform is not None:
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))}
        if uniform <= 0 or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            raise ValueError(f"uniform: expected a positive number and real weights, found {uniform} and {dtypes}")

    def init_state(batch_shape=()):
        return tuple(cell.init_state(batch_shape) for cell in cells)

    def apply(params, state, inputs, *, key=None, taps=None):
        keys = [None] * (len(cells) + 1) if key is None else list(jax.random.split(key, len(cells) + 1))
        if vocabulary_size is not None:
            if not jnp.issubdtype(inputs.dtype, jnp.integer):
                raise ValueError(f"inputs: expected integer ids, found {inputs.dtype.name}{list(inputs.shape)}")
            # an id outside the vocabulary becomes NaN, which stops training, instead of another word's vector
            inputs = params.embedding.at[inputs].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        x = _drop(keys[0], inputs, rate)
        trajectories = []
        for index, cell in enumerate(cells):
            layer_taps = None if taps is None else taps[index]
            trajectory = unroll(
                cell, params.layers[index], state[index], x, taps=None if layer_taps is None else layer_taps.steps
            )
            if layer_taps is not None:
                trajectory = trajectory._replace(states=jax.tree.map(jnp.add, trajectory.states, layer_taps.states))
            trajectories.append(trajectory)
            x = _drop(keys[index + 1], cell.read(params.layers[index], trajectory.states), rate)
        final = tuple(trajectory.final for trajectory in trajectories)
        return Output(linear.apply(params.readout, x), tuple(trajectories), final)

    return Model(cells, output_size, vocabulary_size, rate, init, init_state, apply)


def zero_taps(model: Model, num_steps: int, batch_shape: tuple[int, ...] = ()) -> tuple[LayerTaps, ...]:
    """Returns the taps of every layer: zeros for ``model.apply(…, taps=…)``, to be differentiated.

    With ∂L/∂taps at hand, and s_k the state before step k, the gradient of a layer's states is
    ∂L/∂s_k = states[k − 1] + steps.direct[k] + steps.gated[k]; the first summand is missing for k = 0, the other two
    for k = T.

    >>> import rnngrad as rg
    >>> net = rg.training.model([rg.cells.gru(3, 5)], 2)
    >>> rg.training.zero_taps(net, 7, (4,))[0].states.h.shape
    (7, 4, 5)
    """

    def of_layer(cell):
        states = jax.tree.map(lambda s: jnp.zeros((num_steps, *s.shape), s.dtype), cell.init_state(batch_shape))
        return LayerTaps(zero_cell_taps(cell, num_steps, batch_shape), states)

    return tuple(of_layer(cell) for cell in model.layers)


def count_parameters(params: Any) -> int:
    """Returns the number of weights in a tree of parameters.

    >>> import jax
    >>> import rnngrad as rg
    >>> rg.training.count_parameters(rg.training.model([rg.cells.vanilla(3, 5)], 2).init(jax.random.key(0)))
    57
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params))
