"""Which gate of an LSTM carries the gradient, and do its input and output gates make paths of their own?

Two claims about the LSTM c' = f ⊙ c + i ⊙ g, h' = o ⊙ tanh c' are tried on fresh networks with Gaussian inputs, and on
networks before and after they learned the adding problem, each with forget bias 1 and with chrono gates.

B6: what comes in through i ⊙ g is said to add a gradient path at every step beside the forget gate's.  Closing it
means to hold z_i and z_g constant in the derivative, while the run stays what it was.  Decided is, for each kind of
network, (a) whether the chain ‖∂c_T/∂c_{T−lag}‖ then falls by more than a factor of 2 at lags 20, 50 and 100, and
(b) whether the input gate i is the one whose pre-activation has the largest share ‖∂L/∂z_i‖² of Σ_j ‖∂L/∂z_j‖², over
all steps.

B7: the output gate is said to split the gradient in two paths at every step.  With c_t followed by h_t, and δ the total
derivative by c_t::

    δ_t = o_t ⊙ (1 − tanh² c_t) ⊙ (∂L/∂h_t|here + ∂L/∂h_t|gates) + f_{t+1} ⊙ δ_{t+1}
          through the output of this step:  here        through time:  gates of the next step, and the memory

Decided is, for the loss of the last step and for that of all steps, (a) whether the parts add up to δ, which is taken
from ∂L/∂z_g = δ ⊙ i ⊙ (1 − g²), and (b) whether both the output of this step and time have at least a hundredth of the
gradient (by Euclidean norms, of their sum) at the median step.

The losses are squared errors, the target of a fresh network drawn from N(0, 1).  Training: Adam at 3e-3 behind clipping
at 1, until the held-out error is 0.01 or the updates are used up.  Running time: about a minute on two cores with
the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import Interval, describe, interval_text, median_interval
from experiments.trials import Trainer

CLAIMS = (
    Claim(
        "B6",
        "The input gate injects gradient shortcuts: its term i ⊙ g opens a further path for the gradient at every "
        "step, beside that of the forget gate.",
        source="introductions to the LSTM",
        prediction="closing i ⊙ g costs the chain more than a factor of 2 at lag 100 with forget bias 1, and less with "
        "chrono gates, which keep i shut; the gate with the largest share is not i but g or o",
        refuted="the chain of the memory stays within a factor of 2 when i ⊙ g is closed; another gate has a larger "
        "share of the loss gradient",
        functions=("rg.retention", "rg.unroll", "rg.zero_taps"),
        tests=("tests/test_gate_shares.py", "tests/test_paths.py", "tests/test_unroll_derivative.py"),
    ),
    Claim(
        "B7",
        "The output gate splits the gradient of the memory in two paths at every step: one through the output of that "
        "step, one through time.",
        source="introductions to the LSTM",
        prediction="the parts add up exactly; with a loss at the last step alone nothing comes through the outputs "
        "before it, with a loss at all steps both paths carry",
        refuted="parts that do not add up to the total derivative by c_t, or a path with less than a hundredth of it",
        functions=("rg.unroll", "rg.zero_taps"),
        tests=("tests/test_gate_shares.py", "tests/test_unroll_derivative.py"),
    ),
)

GATES = ("i", "f", "g", "o")
PATHS = {
    "full": "ifgo",
    "direct": "",
    **{f"without:{gate}": "ifgo".replace(gate, "") for gate in GATES},
    **{f"only:{gate}": gate for gate in GATES},
    "without:i,g": "fo",
    "only:i,g": "ig",
}
"""Gates that let the gradient through beside the direct path, by name."""
CLOSED = "without:i,g"
LOSSES = ("last step", "all steps")
ROUTES = ("output", "gates", "memory")
"""Ways on which a gradient comes back to c_t; see the module docstring."""
CHECK_LAGS = (20, 50, 100)
LAG_STRIDE = 5
"""Chains are stored at every fifth lag."""
FACTOR = 2.0
NOT_IDLE = 0.01
ADDS_UP = 1e-10
WHY_FACTOR = "a path that is one of two equal ones halves the sum when it is closed; one that costs less is the smaller"
WHY_MOST = "the gate that carries most has a larger share than every other"
WHY_ADDS_UP = "an identity of the chain rule; float64 rounds at 1e-16, and i(1 − g²) > 1e-6 loses six digits at most"
WHY_NOT_IDLE = "below a hundredth of the gradient at the median step a path splits nothing off"
WHY_GUESSED = "z_g and z_o act with the slope of a tanh or of the output itself, i and f with that of σ, at most 1/4"
WHY_PREDICTED = "chrono sets b_i = −b_f, so i is about 1/τ where the forget gate has the time scale τ"
ADDING_SOLVED = 0.01
"""Mean squared error; predicting the mean costs 1/6."""
EVAL_EVERY = 200
HELD_OUT = 200

TEXT = (
    "It was the best of times , it was the worst of times , it was the age of wisdom , it was the age of foolishness , "
    "it was the epoch of belief , it was the epoch of incredulity , it was the season of Light , it was the season of "
    "Darkness"
)
"""Dickens, A Tale of Two Cities (1859), first sentence, in part."""
BIASES = ("b_f = 1", "chrono")
STAGES = ("fresh", "adding, untrained", "adding, trained")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the gate experiment."""

    steps: int = 100
    """Time steps T of fresh networks."""
    task_steps: int = 50
    """Time steps of the adding problem."""
    hidden_size: int = 32
    """Units N."""
    input_size: int = 16
    """Width D of the inputs of fresh networks, entries N(0, 1), and of word vectors."""
    seeds: int = 10
    """Fresh networks; each draws weights, read-out, inputs and target."""
    training_seeds: int = 5
    """Networks that are trained."""
    first_seed: int = 0
    """Seeds run from here."""
    updates: int = 4_000
    """Updates at the most, a multiple of 200."""
    learning_rate: float = 3e-3
    """Of Adam."""
    batch_size: int = 32
    """Sequences per update."""


SMOKE = Config(
    steps=20, task_steps=10, hidden_size=6, input_size=4, seeds=2, training_seeds=2, updates=200, batch_size=4
)
"""A few seconds: every code path, no statement about the claims."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {
        "steps": CHECK_LAGS[0], "task_steps": 2, "hidden_size": 1, "input_size": 1, "seeds": 1, "training_seeds": 1,
        "first_seed": 0, "updates": EVAL_EVERY, "batch_size": 1,
    }  # fmt: skip
    command.check_at_least(config, least)
    if config.training_seeds > config.seeds:
        raise UserError(f"--training-seeds: expected at most {config.seeds}, the seeds, found {config.training_seeds}")
    if config.updates % EVAL_EVERY:
        raise UserError(f"--updates: expected a multiple of {EVAL_EVERY}, found {config.updates}")
    if not (np.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UserError(f"--learning-rate: expected a positive number, found {config.learning_rate}")


# --- one network -----------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """Weights, and how far each gate lets the gradient through: 1 or 0, in the order i f g o."""

    weights: Any
    is_open: Any


@functools.cache
def _cells(input_size: int, hidden_size: int) -> tuple[rg.Cell, rg.Cell]:
    """Returns the LSTM, and the same one with gates that can be closed to the gradient without changing the run.

    A gate is closed by its weight in the parameters and not by ``path=``, so that all paths share one compilation and
    two gates can be closed at once.
    """
    cell = rg.cells.lstm(input_size, hidden_size, dtype="float64")

    def preactivate(params, state, x):
        z = cell.preactivate(params.weights, state, x)
        held = jax.lax.stop_gradient(z)
        return type(z)(*(h + share * (v - h) for h, v, share in zip(held, z, params.is_open, strict=True)))

    def update(params, z, state):
        return cell.update(params.weights, z, state)

    opened = cell._replace(
        name="lstm_opened",
        init=lambda key: Opened(cell.init(key), jnp.ones(len(GATES), "float64")),
        preactivate=preactivate,
        update=update,
    )
    return cell, opened


@functools.partial(jax.jit, static_argnames=("opened",))
def _chain(opened, params, xs, is_open):
    curve = rg.retention(opened, Opened(params, is_open), opened.init_state(), xs, of="c", wrt="c")
    return curve.log_norm[::LAG_STRIDE]


def _norms(vectors: jax.Array) -> jax.Array:
    return jnp.linalg.norm(vectors, axis=-1)


@functools.partial(jax.jit, static_argnames=("cell",))
def _gradients(cell, params, readout, xs, target, weights):
    """Returns what the gradient of Σ_t weights_t (y_t − target)² does, step by step, for t = 1 … T."""
    state = cell.init_state()

    def loss(states):
        errors = jax.vmap(lambda h: readout.w @ h + readout.b - target)(states.h)
        return jnp.vdot(weights, jnp.sum(jnp.square(errors), axis=-1))

    trajectory = rg.unroll(cell, params, state, xs)
    states, gates = trajectory.states, trajectory.gates
    here = jax.grad(loss)(states).h
    taps = jax.grad(lambda taps: loss(rg.unroll(cell, params, state, xs, taps=taps).states))(
        rg.zero_taps(cell, xs.shape[0])
    )
    # taps stand before a step: those of s_t, after step t, are at index t; nothing follows the last step
    after = lambda leaf: jnp.concatenate([leaf[1:], jnp.zeros_like(leaf[:1])])
    to_output = gates.o * (1 - jnp.square(jnp.tanh(states.c)))
    parts = jnp.stack([to_output * here, to_output * after(taps.gated.h), after(taps.direct.c)])
    into_g = gates.i * (1 - jnp.square(gates.g))
    apart = _norms(taps.z.g - into_g * jnp.sum(parts, axis=0))
    whole = _norms(taps.z.g)
    squares = jnp.stack([jnp.sum(jnp.square(leaf), axis=-1) for leaf in taps.z])
    by_route = _norms(parts)
    return {
        "gate_share": jnp.sum(squares, axis=1) / jnp.sum(squares),
        "gate_share_by_step": squares / jnp.sum(squares, axis=0, keepdims=True),
        "route_share_by_step": by_route / jnp.sum(by_route, axis=0, keepdims=True),
        "sum_error": jnp.max(jnp.where(whole > 0, apart / jnp.where(whole > 0, whole, 1), 0)),
    }


def _measure_network(params: Any, readout: Any, xs: Any, target: Any) -> dict[str, np.ndarray]:
    """Returns what is measured on one network and one sequence, in float64; the last axis of curves is the lag."""
    params, readout, xs, target = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), (params, readout, xs, target))
    num_steps = xs.shape[0]
    cell, opened = _cells(xs.shape[1], params.w_hh.shape[1])
    masks = [jnp.array([float(gate in names) for gate in GATES], "float64") for names in PATHS.values()]
    chains = np.stack([np.asarray(_chain(opened, params, xs, mask)) for mask in masks])
    last = jnp.zeros(num_steps, "float64").at[-1].set(1)
    by_loss = [
        jax.device_get(_gradients(cell, params, readout, xs, target, weights))
        for weights in (last, jnp.full(num_steps, 1 / num_steps, "float64"))
    ]
    routes = np.stack([of_loss["route_share_by_step"] for of_loss in by_loss])
    here = routes[:, 0]
    return {
        "log_chain": chains,
        "gate_share": by_loss[0]["gate_share"],
        "output_share": np.median(here, axis=-1),
        "sum_error": np.stack([of_loss["sum_error"] for of_loss in by_loss]),
        "gate_share_by_lag": by_loss[0]["gate_share_by_step"][..., ::-1],
        "route_share_by_lag": routes[..., ::-1],
    }


_DIMS = {
    "log_chain": ("path", "lag"),
    "gate_share": ("gate",),
    "output_share": ("loss",),
    "sum_error": ("loss",),
    "gate_share_by_lag": ("gate", "step_lag"),
    "route_share_by_lag": ("loss", "route", "step_lag"),
}


def _dataset(networks: Sequence[dict[str, np.ndarray]], first_seed: int) -> xr.Dataset:
    """Returns the dataset of networks with seeds from the first one on."""
    arrays = {name: np.stack([network[name] for network in networks]) for name in _DIMS}
    # an error of 1e-15 is kept as such in float32
    dataset = xr.Dataset({name: (("seed", *_DIMS[name]), values.astype(np.float32)) for name, values in arrays.items()})
    return dataset.assign_coords(
        seed=first_seed + np.arange(len(networks)),
        lag=LAG_STRIDE * np.arange(dataset.sizes["lag"]),
        step_lag=np.arange(dataset.sizes["step_lag"]),
    )


def _bias_of(name: str, steps: int) -> Any:
    return rg.initializers.chrono(max(steps, 2)) if name == "chrono" else 1.0


def _measure_fresh(bias: str, config: Config) -> xr.Dataset:
    """Returns the dataset of all fresh networks of one forget bias."""
    sizes = (config.input_size, config.hidden_size)
    with jax.enable_x64(True):  # entered here and not at import: training is in float32
        drawing = rg.cells.lstm(*sizes, forget_bias=_bias_of(bias, config.steps), dtype="float64")
        networks = []
        for seed in range(config.first_seed, config.first_seed + config.seeds):
            key_params, key_readout, key_xs, key_target = jax.random.split(jax.random.key(seed), 4)
            readout = rg.readout(config.hidden_size, 1, dtype="float64").init(key_readout)
            xs = jax.random.normal(key_xs, (config.steps, config.input_size), "float64")
            target = jax.random.normal(key_target, (1,), "float64")
            networks.append(_measure_network(drawing.init(key_params), readout, xs, target))
    return _dataset(networks, config.first_seed)


# --- trained networks ------------------------------------------------------------------------------------------------


@functools.cache
def _task(num_steps: int) -> rg.tasks.Task:
    return rg.tasks.adding(num_steps)


@functools.cache
def _trainer(num_steps: int, hidden_size: int, learning_rate: float, batch_size: int) -> Trainer:
    """Returns what trains the networks of both biases; compiles once."""
    task = _task(num_steps)
    model = rg.training.model([rg.cells.lstm(task.input_size, hidden_size)], 1)

    def loss(output, batch):
        return rg.losses.mse(output.outputs, batch.targets, batch.mask)

    def measure(params, key):
        batch = task.batch(key, HELD_OUT)
        return {"loss": loss(model.apply(params, model.init_state((HELD_OUT,)), batch.inputs), batch)}

    optimizer = optax.chain(rg.remedies.clip_by_global_norm(1.0), optax.adam(learning_rate))
    draw = lambda key, step: task.batch(jax.random.fold_in(key, step), batch_size)
    return Trainer(model, loss, optimizer, draw, measure, batch_size=batch_size)


def _measure_trained(bias: str, seed: int, config: Config) -> xr.Dataset:
    """Returns the dataset of one network before and after training; NaN after a training that failed."""
    trainer = _trainer(config.task_steps, config.hidden_size, config.learning_rate, config.batch_size)
    task = _task(config.task_steps)
    cell = rg.cells.lstm(task.input_size, config.hidden_size, forget_bias=_bias_of(bias, config.task_steps))
    key_params, key_training, key_sequence = jax.random.split(jax.random.key(seed), 3)
    before = rg.training.model([cell], 1).init(key_params)
    trial = trainer.run(
        key_training,
        updates=config.updates,
        eval_every=EVAL_EVERY,
        params=before,
        until=lambda measured: bool(measured["loss"] <= ADDING_SOLVED),
    )
    losses = trial.measured["loss"]
    last = int(np.flatnonzero(~np.isnan(losses))[-1])
    batch = task.batch(key_sequence, 1)
    stages = []
    with jax.enable_x64(True):
        for params in (before, trial.params):
            plain = jax.tree.map(np.asarray, (params, batch))
            network, sequence = plain
            measured = _measure_network(
                network.layers[0], network.readout, sequence.inputs[:, 0], sequence.targets[-1, 0]
            )
            stages.append(_dataset([measured], seed))
    dataset = xr.concat(stages, dim="stage")
    held_out = losses[[0, last]].astype(np.float32)
    if trial.failed_at >= 0:
        dataset = dataset.where(xr.DataArray([True, False], dims="stage"))
        held_out[1] = np.nan
    return dataset.assign(
        task_loss=(("stage", "seed"), held_out[:, None]),
        updates=(("seed",), [int(trial.updates[last])]),
        failed_at=(("seed",), [trial.failed_at]),
    )


# --- gates on a sentence ---------------------------------------------------------------------------------------------


def _measure_sentence(bias: str, config: Config) -> xr.Dataset:
    """Returns the forget gates of fresh networks that read the sentence, each with word vectors of its own."""
    words = TEXT.split()
    vocabulary = sorted(set(words))
    ids = jnp.array([vocabulary.index(word) for word in words])
    cell = rg.cells.lstm(config.input_size, config.hidden_size, forget_bias=_bias_of(bias, len(words)))
    gates = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        key_params, key_words = jax.random.split(jax.random.key(seed))
        embedding = jax.random.normal(key_words, (len(vocabulary), config.input_size))
        gates.append(np.asarray(rg.unroll(cell, cell.init(key_params), cell.init_state(), embedding[ids]).gates.f))
    forget = np.stack(gates)
    survival = np.cumsum(np.log(forget, dtype=np.float64), axis=1)
    quantiles = np.quantile(survival, UNIT_QUANTILES, axis=-1).astype(np.float32)
    return xr.Dataset(
        {
            "forget_gate": (("word_step", "unit"), forget[0]),
            "log_surviving": (("unit_quantile", "sentence_seed", "word_step"), quantiles),
        }
    )


UNIT_QUANTILES = (0.0, 0.5, 1.0)
"""Of the surviving memory over units: the unit that forgets fastest, the middle one, the one that keeps most."""

_BY_LAG = ("gate_share_by_lag", "route_share_by_lag")
MEASURED = (
    "log_chain", "gate_share", "output_share", "sum_error", "task_loss", "updates", "failed_at", "forget_gate",
    "log_surviving", *(f"{name}_{statistic}" for name in _BY_LAG for statistic in Interval._fields),
)  # fmt: skip
"""Variables that a run measures; of those by lag it keeps medians and intervals over seeds alone."""

_DESCRIPTIONS = {
    "log_chain": (
        "nats",
        "log of ‖∂c_T/∂c_{T−lag}‖_F over that at lag 0, with only the path's gates open; NaN: no seed",
    ),
    "gate_share": ("1", "share of Σ ‖∂L/∂z_j‖² over all steps that gate j has, L the loss of the last step"),
    "output_share": ("1", "share of the gradient by c_t that comes through the output of step t, median over steps"),
    "sum_error": ("1", "largest relative difference over steps between ∂L/∂z_g and what the parts make of it"),
    "gate_share_by_lag": ("1", "share of ‖∂L/∂z_j‖² among the gates at the step T − lag, L the loss of the last step"),
    "route_share_by_lag": ("1", "share of the gradient by c_t that comes on each route, at t = T − lag"),
    "log_cost": ("nats", f"log of the full chain over that with the path {CLOSED}: what closing i ⊙ g costs"),
    "task_loss": ("1", "held-out mean squared error of the adding problem, before and after training"),
    "updates": ("1", "updates at the last evaluation"),
    "failed_at": ("1", "update with a loss, gradient or weight that was not finite; −1 for none"),
    "forget_gate": ("1", "forget gate of the first seed by unit and word"),
    "log_surviving": ("nats", "log of ∏ f from the first word on: quantiles over units"),
}


def _counts(dataset: xr.Dataset) -> np.ndarray:
    """Returns (bias, stage, seed) whether a network is there and, if it was trained, learned its task."""
    is_there = dataset["gate_share"].notnull().all("gate")
    learned = (dataset["stage"] != STAGES[2]) | (dataset["task_loss"] <= ADDING_SOLVED)
    return np.asarray((is_there & learned).transpose("bias", "stage", "seed").values)


def _summarise(dataset: xr.Dataset, names: Sequence[str]) -> None:
    """Adds median and interval over the seeds that count, kind by kind: an interval takes no missing seeds."""
    counts = _counts(dataset)
    for name in names:
        values = dataset[name].transpose("bias", "stage", "seed", ...)
        dims = tuple(dim for dim in values.dims if dim != "seed")
        shape = (len(Interval._fields), *(values.sizes[dim] for dim in dims))
        found = np.full(shape, np.nan, np.float32)
        for bias, stage in np.ndindex(counts.shape[:2]):
            of_kind = values.values[bias, stage][counts[bias, stage]]
            if len(of_kind):
                found[:, bias, stage] = median_interval(of_kind, axis=0)
        units, text = _DESCRIPTIONS[name]
        for statistic, of_statistic in zip(Interval._fields, found, strict=True):
            attrs = {"units": units, "description": f"{statistic} over seeds: {text}"}
            dataset[f"{name}_{statistic}"] = (dims, of_statistic, attrs)


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with the cost of closing i ⊙ g, and medians and intervals over seeds."""
    chain = dataset["log_chain"]
    dataset["log_cost"] = chain.sel(path="full", drop=True) - chain.sel(path=CLOSED, drop=True)
    _summarise(dataset, ("log_cost", "gate_share", "output_share"))
    return describe(dataset, {name: _DESCRIPTIONS[name] for name in _DESCRIPTIONS if name in dataset})


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished kinds of networks are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    training_seeds = range(config.first_seed, config.first_seed + config.training_seeds)
    part = functools.partial
    pieces = [
        Piece(f"fresh-{b}", f"fresh, {name}", part(_measure_fresh, name, config)) for b, name in enumerate(BIASES)
    ]
    pieces += [
        Piece(f"sentence-{b}", f"sentence, {name}", part(_measure_sentence, name, config))
        for b, name in enumerate(BIASES)
    ]
    pieces += [
        Piece(f"trained-{b}-{seed}", f"adding, {name}, seed {seed}", part(_measure_trained, name, seed, config))
        for b, name in enumerate(BIASES)
        for seed in training_seeds
    ]
    measured = command.measure(pieces, parts=parts, screen=screen)
    fresh, sentences, trained = measured[:2], measured[2:4], measured[4:]
    by_bias = []
    for index in range(len(BIASES)):
        first = index * config.training_seeds
        networks = xr.concat(trained[first : first + config.training_seeds], dim="seed")
        # fewer seeds and shorter lags than those of the fresh networks become NaN
        of_fresh = fresh[index].expand_dims(stage=[STAGES[0]])
        networks = networks.assign_coords(stage=list(STAGES[1:]))
        by_bias.append(xr.merge([of_fresh, networks], join="outer", compat="no_conflicts"))
    dataset = xr.concat(by_bias, dim="bias").sel(stage=list(STAGES))
    # whole numbers became floats where fresh networks have none
    for name in ("log_chain", "gate_share", "output_share", "sum_error", *_BY_LAG, "task_loss"):
        dataset[name] = dataset[name].astype(np.float32)
    dataset = dataset.merge(xr.concat(sentences, dim="bias")).assign_coords(
        bias=list(BIASES),
        path=list(PATHS),
        gate=list(GATES),
        loss=list(LOSSES),
        route=list(ROUTES),
        unit_quantile=list(UNIT_QUANTILES),
        word=("word_step", TEXT.split()),
    )
    seconds = time.perf_counter() - started
    _summarise(dataset, _BY_LAG)
    dataset = dataset.drop_vars(_BY_LAG)
    dataset.attrs = command.provenance("gate_shares", config, seconds=seconds, dtype="float64", text=TEXT)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_text = functools.partial(interval_text, nothing="—")


def _kinds(dataset: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    """Returns every kind of network with its name; of trained ones those that learned."""
    counts = _counts(dataset)
    return [
        (f"{stage}, {bias}", dataset.sel(stage=stage, bias=bias).isel(seed=np.flatnonzero(counts[at_bias, at_stage])))
        for at_stage, stage in enumerate(dataset["stage"].values.tolist())
        for at_bias, bias in enumerate(dataset["bias"].values.tolist())
    ]


def _over_seeds(values: xr.DataArray) -> Interval:
    nothing = np.full((), np.nan)
    return median_interval(values.values, axis=0) if values.size else Interval(nothing, nothing, nothing)


def _costs(kind: xr.Dataset) -> dict[int, Interval]:
    """Returns log10 of the factor that closing i ⊙ g costs, at the lags of the claim that this kind has."""
    costs = {lag: kind["log_cost"].sel(lag=lag) / np.log(10) for lag in CHECK_LAGS if lag in kind["lag"].values}
    return {lag: _over_seeds(cost) for lag, cost in costs.items() if np.isfinite(cost).any()}


def _lead(kind: xr.Dataset) -> Interval:
    """Returns by how much the input gate's share exceeds the largest of the others."""
    shares = kind["gate_share"]
    return _over_seeds(shares.sel(gate="i") - shares.drop_sel(gate="i").max("gate"))


def _largest(kind: xr.Dataset) -> str:
    """Returns the gate with the largest median share."""
    return GATES[int(np.argmax(np.median(kind["gate_share"], axis=0)))] if kind.sizes["seed"] else "—"


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"Gates and the gradient of an LSTM: N={config['hidden_size']}, T={config['steps']} (adding: "
        f"{config['task_steps']}), {config['seeds']} seeds (adding: {config['training_seeds']}), "
        f"{dataset.attrs['dtype']}, matmul {dataset.attrs['matmul_precision']}, {dataset.attrs['backend']}",
        caption=f"medians over seeds [{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]; trained: those "
        f"that learned; costs at lag {', '.join(map(str, CHECK_LAGS))} as powers of ten",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("network")
    for name in ("seeds", "closing i ⊙ g\ncosts 10^", "share of ∂L/∂z\ni, f, g, o", "through the output\nlast | all"):
        shown.add_column(name, justify="right")
    for name, kind in _kinds(dataset):
        shown.add_row(
            name,
            str(kind.sizes["seed"]),
            "\n".join(_text(cost, ".1f") for cost in _costs(kind).values()) or "—",
            "\n".join(f"{gate} {_text(_over_seeds(kind['gate_share'].sel(gate=gate)))}" for gate in GATES),
            "\n".join(_text(_over_seeds(kind["output_share"].sel(loss=loss)), ".3f") for loss in LOSSES),
        )
    return shown


COST, MOST = "closing i ⊙ g lowers the chain", "the input gate has the largest share"
SUM, IDLE = "the parts add up", "output and time both carry"


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks of B6, then those of B7, for every kind of network; judged by the worse end of intervals."""
    can_tell = json.loads(dataset.attrs["config"])["steps"] >= CHECK_LAGS[-1]

    def answer(interval: Interval, holds: Any) -> bool | None:
        return bool(holds) if can_tell and np.isfinite(interval.median) else None

    shares, routes, guesses = [], [], []
    for name, kind in _kinds(dataset):
        for lag, cost in _costs(kind).items():
            said = f"factor 10^{_text(cost)}"
            holds = answer(cost, cost.low > np.log10(FACTOR))
            shares.append(Check(f"{COST}, lag {lag}: {name}", said, f"> {FACTOR:g}", holds, "B6", WHY_FACTOR))
        lead = _lead(kind)
        largest = _largest(kind)
        said = f"ahead by {_text(lead)}, largest {largest}"
        shares.append(Check(f"{MOST}: {name}", said, "> 0", answer(lead, lead.low > 0), "B6", WHY_MOST))
        if name.startswith(STAGES[0]) and CHECK_LAGS[-1] in _costs(kind):
            cost = _costs(kind)[CHECK_LAGS[-1]]
            little = name.endswith(BIASES[1])
            holds = answer(cost, cost.high < np.log10(FACTOR) if little else cost.low > np.log10(FACTOR))
            bound = f"{'<' if little else '>'} {FACTOR:g}"
            said = f"factor 10^{_text(cost)}"
            guess = f"prediction: cost of closing i ⊙ g at lag {CHECK_LAGS[-1]}, {name}"
            guesses.append(Check(guess, said, bound, holds, "B6", WHY_PREDICTED, decides=False))
        if largest != "—":
            guess, holds = f"prediction: largest share, {name}", answer(lead, largest in ("g", "o"))
            guesses.append(Check(guess, largest, "g or o", holds, "B6", WHY_GUESSED, decides=False))
        for loss in LOSSES:
            errors = kind["sum_error"].sel(loss=loss)
            worst = float(errors.max()) if errors.size else np.nan
            holds = answer(Interval(*[np.array(worst)] * 3), worst <= ADDS_UP)
            routes.append(
                Check(
                    f"{SUM}: loss of {loss}, {name}",
                    "—" if np.isnan(worst) else f"{worst:.1e}",
                    f"≤ {ADDS_UP:g}",
                    holds,
                    "B7",
                    WHY_ADDS_UP,
                )
            )
            share = _over_seeds(kind["output_share"].sel(loss=loss))
            holds = answer(share, share.low >= NOT_IDLE and share.high <= 1 - NOT_IDLE)
            bound = f"{NOT_IDLE:g} to {1 - NOT_IDLE:g}"
            said = f"output {_text(share, '.3f')}"
            routes.append(Check(f"{IDLE}: loss of {loss}, {name}", said, bound, holds, "B7", WHY_NOT_IDLE))
    return [*shares, *guesses, *routes]


def _kinds_named(checks: Sequence[Check]) -> str:
    return "; ".join(dict.fromkeys(check.name.split(": ", 1)[1] for check in checks))


def _span(values: Sequence[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding on each claim in a few sentences."""
    checks, kinds = verdict(dataset), [(name, kind) for name, kind in _kinds(dataset) if kind.sizes["seed"]]
    if all(check.holds is None for check in checks):
        return dict.fromkeys(("B6", "B7"), "this run is too small to tell, or no seed gave a number.")
    start = {
        key: [check for check in checks if check.decides and check.name.startswith(key)]
        for key in (COST, MOST, SUM, IDLE)
    }
    said = []
    for name, kind in kinds:
        costs = _costs(kind)
        if costs:
            lag = max(costs)
            said.append(f"10^{float(costs[lag].median):.1f} ({name}, lag {lag})")
    b6 = f"closing i ⊙ g lowers the chain of the memory by {'; '.join(said)}."
    small = [check for check in start[COST] if check.holds is False]
    if small:
        which = [f"{check.name.rsplit(': ', 1)[1]} at {check.name.split(', ')[1].split(':')[0]}" for check in small]
        b6 += f"  That is not surely more than a factor of {FACTOR:g} for {'; '.join(which)}."
    leading = [check for check in start[MOST] if check.holds]
    largest = sorted({_largest(kind) for _, kind in kinds})
    of_i = [float(np.median(kind["gate_share"].sel(gate="i"))) for _, kind in kinds]
    b6 += f"  Of the loss gradient the input gate has a share of {_span(of_i, 2)}"
    b6 += f", and the largest in {_kinds_named(leading)}" if leading else ", nowhere surely the largest"
    b6 += f"; by the median the largest share is that of {' or '.join(largest)}."

    exact = [check for check in start[SUM] if check.holds is not None]
    broken = [check for check in exact if not check.holds]
    worst = max(float(check.value) for check in exact)
    b7 = f"the parts add up to the total derivative by c_t to {worst:.0e}"
    b7 += f", but for {_kinds_named(broken)}." if broken else " in every network."
    for loss in LOSSES:
        shares = [float(np.median(kind["output_share"].sel(loss=loss))) for _, kind in kinds]
        carried = [check for check in start[IDLE] if f"loss of {loss}" in check.name]
        b7 += f"  With a loss at {'the ' if loss == LOSSES[0] else ''}{loss} the output of a step brings"
        b7 += f" {_span(shares, 3)} of the gradient at the median step"
        idle = [check.name.split(f"loss of {loss}, ")[1] for check in carried if check.holds is False]
        if idle:
            b7 += ", so that there is one path, not two" if len(idle) == len(carried) else ", too little or too much"
            b7 += "" if len(idle) == len(carried) else f" to speak of two paths for {'; '.join(idle)}"
        b7 += "."
    return {"B6": b6, "B7": b7}


_GATE_STYLES = {
    "i": ("#c81e4a", "-", "i, input gate"),
    "f": ("#16325c", "--", "f, forget gate"),
    "g": ("#d97706", "-.", "g, candidate"),
    "o": ("#1b7f5c", ":", "o, output gate"),
}
_PATH_STYLES = {
    "full": ("#16325c", "-", "whole chain"),
    CLOSED: ("#c81e4a", "--", "i ⊙ g closed"),
    "only:i,g": ("#d97706", "-.", "only i ⊙ g beside the direct path"),
    "direct": ("0.45", ":", "direct path ∏f alone"),
}
_ROUTE_STYLES = {
    "output": ("#c81e4a", "-", "through the output of this step"),
    "gates": ("#d97706", "-.", "through time: h_t into the gates of the next step"),
    "memory": ("#16325c", "--", "through time: memory, f ⊙ δ of the next step"),
}
_SHOWN_STAGES = (STAGES[0], STAGES[2])


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _band(axes: Any, x: np.ndarray, interval: Sequence[Any], style: tuple[str, str, str]) -> None:
    colour, line, label = style
    median, low, high = (np.asarray(part, float) for part in interval)
    axes.plot(x, median, color=colour, linestyle=line, linewidth=1.8, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _stored(row: xr.Dataset, name: str) -> list[np.ndarray]:
    return [row[f"{name}_{statistic}"].values for statistic in Interval._fields]


def _length(stored: xr.Dataset) -> int:
    """Returns T of one kind."""
    return int(stored["gate_share_by_lag_median"].notnull().any("gate").sum()) or 1


def _shown(dataset: xr.Dataset) -> list[tuple[str, xr.Dataset, xr.Dataset]]:
    """Returns the kinds of a figure: title, the kind with the seeds that count, and the medians stored for it."""
    kinds = dict(_kinds(dataset))
    return [
        (f"{stage}, {bias}", kinds[f"{stage}, {bias}"], dataset.sel(stage=stage, bias=bias))
        for stage in _SHOWN_STAGES
        for bias in dataset["bias"].values.tolist()
    ]


def _sizes(dataset: xr.Dataset) -> str:
    config = json.loads(dataset.attrs["config"])
    return (
        f"N={config['hidden_size']}; fresh: T={config['steps']}, Gaussian inputs, {config['seeds']} seeds; adding: "
        f"T={config['task_steps']}, {config['training_seeds']} seeds; medians with 95 % intervals"
    )


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure of B6: shares by gate and step above, the chain with i ⊙ g closed below."""
    shown = _shown(dataset)
    drawn = matplotlib.figure.Figure(figsize=(15, 8.6), layout="constrained")
    tops, bottoms = drawn.subplots(2, len(shown))
    for (title, kind, stored), top, bottom in zip(shown, tops, bottoms, strict=True):
        for gate, style in _GATE_STYLES.items():
            row = stored.sel(gate=gate)
            _band(top, row["step_lag"].values, _stored(row, "gate_share_by_lag"), style)
        top.set_title(f"{title} ({kind.sizes['seed']} networks)", fontsize=11)
        top.set_ylim(0, 1)
        top.set_xlabel("steps before the last one")
        for path, style in _PATH_STYLES.items():
            logs = kind["log_chain"].sel(path=path).transpose("seed", "lag").values / np.log(10)
            if len(logs):
                _band(bottom, kind["lag"].values, median_interval(logs, axis=0), style)
        bottom.set_xlabel("lag (steps)")
        for axes in (top, bottom):
            axes.set_xlim(0, _length(stored))
            _plain(axes)
    tops[0].set_ylabel("share of ‖∂L/∂z_j‖² at a step")
    bottoms[0].set_ylabel("log10 of ‖∂c_T/∂c_{T−lag}‖, 0 at lag 0")
    # a legend fills column by column: gates come to stand in its first line, paths in its second
    entries = [axes.get_legend_handles_labels() for axes in (tops[0], bottoms[0])]
    handles = [handle for pair in zip(entries[0][0], entries[1][0], strict=True) for handle in pair]
    labels = [
        name
        for gate, path in zip(entries[0][1], entries[1][1], strict=True)
        for name in (f"above: {gate}", f"below: {path}")
    ]
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    drawn.suptitle(
        "Does the input gate carry the gradient of an LSTM?  Shares by gate for the loss of the last step, and what\n"
        f"is left of the chain when i ⊙ g is closed.  {_sizes(dataset)}",
        fontsize=12,
    )
    return drawn


def output_figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure of B7: on which route the gradient comes back to c_t, by step and loss."""
    shown = _shown(dataset)
    drawn = matplotlib.figure.Figure(figsize=(15, 7.6), layout="constrained")
    grid = drawn.subplots(len(LOSSES), len(shown), sharey=True, sharex="col", squeeze=False)
    for column, (title, kind, stored) in enumerate(shown):
        for row, loss in enumerate(LOSSES):
            axes = grid[row][column]
            for route, style in _ROUTE_STYLES.items():
                at = stored.sel(loss=loss, route=route)
                _band(axes, at["step_lag"].values, _stored(at, "route_share_by_lag"), style)
            axes.set_ylim(-0.02, 1.02)
            axes.set_xlim(0, _length(stored))
            axes.set_title(f"{title}\n({kind.sizes['seed']} networks)" if row == 0 else "", fontsize=11)
            _plain(axes)
        grid[-1][column].set_xlabel("steps before the last one")
    for row, loss in enumerate(LOSSES):
        grid[row][0].set_ylabel(f"loss of {loss}\nshare of the gradient by c_t")
    drawn.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    drawn.suptitle(
        "Does the output gate split the gradient of the memory in two paths?  Where the gradient by c_t comes from\n"
        + _sizes(dataset),
        fontsize=12,
    )
    return drawn


def gates_figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the forget gates on a sentence, unit by unit, with the memory that survives below them."""
    config = json.loads(dataset.attrs["config"])
    words = dataset["word"].values.tolist()
    drawn = matplotlib.figure.Figure(figsize=(16, 8.8), layout="constrained")
    grid = drawn.subplots(2, dataset.sizes["bias"], sharex=True, height_ratios=(1.2, 1), squeeze=False)
    steps = np.arange(len(words))
    styles = {
        1.0: ("#1b7f5c", "--", "unit that keeps most"),
        0.5: ("#16325c", "-", "median unit"),
        0.0: ("#c81e4a", ":", "unit that forgets fastest"),
    }
    image: Any = None
    for column, bias in enumerate(dataset["bias"].values.tolist()):
        of_bias = dataset.sel(bias=bias)
        gates = of_bias["forget_gate"].transpose("unit", "word_step").values
        order = np.argsort(gates.mean(axis=1))
        upper, lower = grid[0][column], grid[1][column]
        image = upper.imshow(gates[order], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        upper.set_title(f"{bias}: forget gate by unit, one network", fontsize=11)
        upper.set_yticks([0, len(gates) - 1], ["forgets", "keeps"])
        for quantile, style in styles.items():
            logs = of_bias["log_surviving"].sel(unit_quantile=quantile).transpose("sentence_seed", "word_step").values
            _band(lower, steps, median_interval(logs / np.log(10), axis=0), style)
        lower.set_xticks(steps, words, rotation=90, fontsize=9)
        lower.set_xlim(-0.5, len(words) - 0.5)
        lower.set_xlabel("word")
        _plain(lower)
    lowest = min(axes.get_ylim()[0] for axes in grid[1])
    for axes in grid[1]:
        axes.set_ylim(lowest, 0.5)
    grid[0][0].set_ylabel(f"{config['hidden_size']} units, sorted")
    grid[1][0].set_ylabel("surviving memory of the first word\nlog10 of ∏f")
    drawn.colorbar(image, ax=list(grid[0]), label="forget gate f", pad=0.01)
    drawn.legend(*grid[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    drawn.suptitle(
        "What an LSTM forgets while it reads: forget gates before training, and what is left of the first word\n"
        f"N={config['hidden_size']}; below, {config['seeds']} networks: medians with 95 % intervals",
        fontsize=12,
    )
    return drawn


ABOUT = """Which gate of an LSTM carries the gradient, and do its input and output gates make paths of their own?

Closes the input gate's term to the gradient and measures what the memory's chain loses, takes the share of the loss
gradient by gate, and splits the gradient of the memory by the routes on which it comes, for fresh networks and for
networks that learned the adding problem.  Prints a table with medians and intervals, and writes three figures and a
netCDF file."""

CAPTION = """Above, the share of the loss gradient that each gate's pre-activation has, by step; below, the chain of
the memory as it is, with the input gate's term closed to the gradient, with only that term open, and the direct path;
for fresh LSTMs and for such that learned the adding problem, with forget bias 1 and chrono gates."""

OUTPUT_CAPTION = """On which route the gradient comes back to the memory at each step: through the output of that step,
through the gates of the next step, or along the memory; with a loss at the last step above and at all steps below."""

GATES_CAPTION = """Forget gates of an untrained LSTM while it reads the first sentence of Dickens' A Tale of Two
Cities, unit by unit, and below the surviving memory of its first word, ∏f, on a logarithmic scale, for forget bias 1
and for chrono gates."""

EXPERIMENT = command.Experiment(
    name="gate_shares",
    about=ABOUT,
    claims=CLAIMS,
    default=Config(),
    smoke=SMOKE,
    run=run,
    table=table,
    verdict=verdict,
    summary=summary,
    pictures=(
        command.Picture("", CAPTION, figure),
        command.Picture("output", OUTPUT_CAPTION, output_figure),
        command.Picture("gates", GATES_CAPTION, gates_figure),
    ),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
