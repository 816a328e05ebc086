"""Does the output of a vanilla RNN feel nearby inputs only?

The influence of input x_k on the output y_t = V h_t + c is the norm ‖∂y_t/∂x_k‖.  For each cell and initialisation,
over several seeds (weights, read-out, Gaussian inputs), the run measures the influence of every input on the last
output, and for some rows the whole map over (t, k), with that of ∂L_t/∂h_k beside it, L_t the cross-entropy of y_t
against a random class.  The rows of the vanilla cell are Torch's default, Gaussian and orthogonal weights at several
gains, and the identity with tanh and with ReLU (Le et al. 2015); LSTM and GRU stand beside them to compare.

::

    share  = Σ_{lag < 10} ‖∂y_T/∂x_{T−lag}‖ / Σ_lag ‖∂y_T/∂x_{T−lag}‖       lag 0: the newest input
    reach  = the first lag from which on the influence stays below 1 % of its largest value; T for none

Then the three cells are trained on agreement, each until its held-out accuracy is 99.5 % or the updates are used up,
and the influence of the words of one sentence on the answer is taken before and after.  Beside it stands what the
answer makes of the subject in the plural: a derivative tells of small changes, and a network that holds a number fast
need not show it.  Subjects are 10 to 14 words before the verb, as near as two attractors allow: with up to 20 the
vanilla cell of this size was still at chance after 4,000 updates, with up to 14 two seeds of three had learned it.
Running time: about a minute on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import numpy as np
import optax
import rich.console
import rich.table
import scipy.special
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import Interval, describe, interval_text, median_interval, stored_text, summarise
from experiments.trials import Trainer

CLAIMS = (
    Claim(
        "A4",
        "The outputs of a vanilla RNN feel nearby inputs only; what was said long before does not reach them.",
        source="lectures and introductions on sequence models, as the reason for gated cells",
        prediction="at T = 100 with unit-variance inputs the 10 newest inputs have at least 0.9 of the influence on "
        "the last output with Torch's default and at gains up to 1.25, less than 0.9 with the identity and ReLU and at "
        "Gaussian gain 2; with chrono gates an LSTM and a GRU give them less than 0.5; training on a task with a "
        "distant subject moves influence to the subject in all three cells",
        refuted="an initialisation at which the 10 newest of 100 inputs have less than 0.9 of the influence",
        functions=("rg.unroll", "rg.zero_taps", "rg.readout", "rg.tasks.agreement"),
        tests=(
            "tests/test_influence.py",
            "tests/test_unroll_derivative.py",
            "tests/test_tasks.py",
        ),
    ),
)

NEWEST = 10
NEAR_SHARE = 0.9
CHECK_STEPS = 100
"""Length at which the bound is stated; a shorter run decides nothing."""
FELT = 0.01
"""Of the largest influence; see ``reach``."""
WHY_SHARE = (
    "influence that decays by 0.23 nats per step, the rate of the claim “1e-10 over 100 steps” (B8), leaves "
    "1 − e^−2.3 = 0.9 to the 10 newest; an even one at T = 100 leaves them 0.1"
)
WHY_PREDICTED = (
    "first runs: default rates of −0.5 nats per step; transition to chaos at gain 1.9 for unit-variance inputs"
)
WHY_CHRONO = "chrono spreads the gates' time scales over 1 … T; an exponential of time scale 20 leaves 0.39"
WHY_TRAINED = "the answer depends on the subject alone, so a network that gives it must feel it"
WELL_TRAINED = 0.95
"""Held-out accuracy from which on a network is said to have learned agreement."""

SENTENCE = "the cat , which already saw the small dogs near the bird , was full ."
PLURAL = "cats"
"""What the subject is exchanged for, to see whether the answer follows."""
SUBJECT, ANSWER = 1, 12
"""Positions in the sentence: the subject, and the step before the verb, where the network answers."""
DISTANCES = (10, 14)
MOST_ATTRACTORS = 2
SENTENCES, HELD_OUT = 50_000, 500
"""Drawn once for all networks: to train on, and for the accuracy."""
ENOUGH = 0.995
STAGES = ("untrained", "trained")

CellName = Literal["vanilla", "lstm", "gru"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the influence experiment."""

    gains: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    """Gains of the vanilla cell's Gaussian and orthogonal weights, rising."""
    steps: int = 100
    """Time steps T, over which influence on the last output is measured."""
    map_steps: int = 60
    """Outputs and inputs of the maps, from the first on."""
    hidden_size: int = 64
    """Units N."""
    input_size: int = 32
    """Width D of the inputs, entries N(0, 1)."""
    outputs: int = 8
    """Width K of the read-out."""
    seeds: int = 10
    """Independent repetitions; each draws weights, read-out and inputs."""
    first_seed: int = 0
    """Seeds run from here, also those of training."""
    trained: tuple[CellName, ...] = ("vanilla", "lstm", "gru")
    """Cells that are trained on agreement."""
    trained_size: int = 64
    """Units, and width of the word vectors, of a trained network."""
    training_seeds: int = 5
    """Networks of each cell that are trained."""
    updates: int = 10_000
    """Updates at the most, a multiple of 200."""
    learning_rate: float = 1e-3
    """Of Adam, behind clipping of the gradient's norm at 1."""
    batch_size: int = 32
    """Sentences per update."""


EVAL_EVERY = 200
SMOKE = Config(
    gains=(1.0,), steps=16, map_steps=12, hidden_size=8, input_size=4, outputs=3, seeds=2, trained=("vanilla",),
    trained_size=8, training_seeds=2, updates=200, batch_size=4,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {
        "steps": NEWEST + 1, "map_steps": 2, "hidden_size": 1, "input_size": 1, "outputs": 2, "seeds": 1,
        "first_seed": 0, "trained_size": 1, "training_seeds": 1, "updates": EVAL_EVERY, "batch_size": 1,
    }  # fmt: skip
    command.check_at_least(config, least)
    gains = config.gains
    if not gains or list(gains) != sorted(set(gains)) or not np.isfinite(gains).all() or gains[0] <= 0:
        raise UserError(f"--gains: expected positive numbers, rising, found {gains}")
    if config.map_steps > config.steps:
        raise UserError(f"--map-steps: expected at most {config.steps}, the steps, found {config.map_steps}")
    if config.updates % EVAL_EVERY:
        raise UserError(f"--updates: expected a multiple of {EVAL_EVERY}, found {config.updates}")
    if not (np.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UserError(f"--learning-rate: expected a positive number, found {config.learning_rate}")
    if not config.trained or len(set(config.trained)) != len(config.trained):
        raise UserError(f"--trained: expected each cell once, found {' '.join(config.trained) or 'none'}")


# --- influence by initialisation -------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A cell and how its weights are drawn."""

    cell: CellName
    activation: str
    init: str
    gain: float
    """Of Gaussian and orthogonal weights, else NaN."""
    is_mapped: bool
    """Its map over (t, k) is measured and stored."""


def rows_of(config: Config) -> list[Row]:
    """Returns the rows of the table."""
    nan = float("nan")
    swept = [Row("vanilla", "tanh", kind, gain, False) for kind in ("gaussian", "orthogonal") for gain in config.gains]
    return [
        Row("vanilla", "tanh", "torch", nan, True),
        *swept,
        Row("vanilla", "tanh", "identity", nan, False),
        Row("vanilla", "relu", "identity", nan, True),
        Row("lstm", "", "torch", nan, True),
        Row("lstm", "", "b_f = 1", nan, False),
        Row("lstm", "", "chrono", nan, True),
        Row("gru", "", "torch", nan, True),
        Row("gru", "", "chrono", nan, True),
    ]


def build_cell(row: Row, config: Config) -> rg.Cell:
    """Returns the cell of a row, which draws its weights."""
    sizes = (config.input_size, config.hidden_size)
    schemes = {"gaussian": rg.initializers.gaussian, "orthogonal": rg.initializers.orthogonal}
    if row.cell == "vanilla":
        init = schemes[row.init](row.gain) if row.init in schemes else row.init
        return rg.cells.vanilla(*sizes, activation=row.activation, init=init, dtype="float64")
    bias = {"torch": None, "b_f = 1": 1.0, "chrono": rg.initializers.chrono(config.steps)}[row.init]
    return getattr(rg.cells, row.cell)(*sizes, forget_bias=bias, dtype="float64")


@functools.cache
def _shared_cell(cell: CellName, activation: str, input_size: int, hidden_size: int) -> rg.Cell:
    """Rows of one cell differ in how they draw weights and in nothing else, so they share one compilation."""
    sizes = (input_size, hidden_size)
    if cell == "vanilla":
        return rg.cells.vanilla(*sizes, activation=activation, dtype="float64")
    return rg.cells.lstm(*sizes, dtype="float64") if cell == "lstm" else rg.cells.gru(*sizes, dtype="float64")


def _log_norm(vectors: jax.Array) -> jax.Array:
    return jnp.log(jnp.linalg.norm(vectors, axis=-1))


@functools.partial(jax.jit, static_argnames=("cell",))
def _influences(cell, params, readout, xs, target, t):
    """Returns log ‖∂y_t/∂x_k‖ and log ‖∂L_t/∂h_k‖ for k = 1 … T, with L_t = −log softmax(y_t)[target].

    x_k is ``xs[k − 1]`` and h_k the output of the cell after it.  In plain float64 numbers, which go down to e^−708.
    """

    def run(xs, taps):
        states = rg.unroll(cell, params, cell.init_state(), xs, taps=taps).states
        return cell.read(params, states)[t - 1], states

    h, pull, states = jax.vjp(run, xs, rg.zero_taps(cell, xs.shape[0]), has_aux=True)

    def loss(h):
        return -jax.nn.log_softmax(readout.w @ h + readout.b)[target]

    # one cotangent of h_t per output, and that of the loss behind them: all go back together
    rows = jnp.concatenate([readout.w, jax.grad(loss)(h)[None]])
    of_xs, of_taps = jax.vmap(pull)(rows)
    # what comes back to h_k from the step after it, which reads it; to h_t itself comes the loss
    later = of_taps.direct.h[-1] + of_taps.gated.h[-1]
    of_states = jnp.append(later[1:], jnp.zeros_like(later[:1]), axis=0).at[t - 1].add(rows[-1])
    is_finite = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(states)])
    influence = _log_norm(jnp.moveaxis(of_xs[:-1], 0, 1).reshape(xs.shape[0], -1))
    return influence, _log_norm(of_states), is_finite


def _measure_row(row: Row, config: Config) -> xr.Dataset:
    """Returns the dataset of one row: every seed, and the median map over seeds where it is mapped."""
    with jax.enable_x64(True):  # entered here and not at import: it is no setting of the trained networks
        return _measure_row_in_float64(row, config)


def _measure_row_in_float64(row: Row, config: Config) -> xr.Dataset:
    cell = _shared_cell(row.cell, row.activation, config.input_size, config.hidden_size)
    drawing = build_cell(row, config)
    linear = rg.readout(config.hidden_size, config.outputs, dtype="float64")
    curves, finite, maps = [], [], []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        key_params, key_readout, key_xs, key_targets = jax.random.split(jax.random.key(seed), 4)
        xs = jax.random.normal(key_xs, (config.steps, config.input_size), "float64")
        targets = jax.random.randint(key_targets, (config.steps,), 0, config.outputs, jnp.int32)
        params, readout = drawing.init(key_params), linear.init(key_readout)
        at = lambda t, given=(params, readout, xs), targets=targets: jax.device_get(
            _influences(cell, *given, targets[t - 1], jnp.int32(t))
        )
        influence, _, is_finite = at(config.steps)
        curves.append(influence[::-1])
        finite.append(is_finite)
        if row.is_mapped:
            maps.append([at(t)[:2] for t in range(1, config.map_steps + 1)])
    dataset = xr.Dataset(
        {
            "log_influence": (("seed", "lag"), np.stack(curves).astype(np.float32)),
            "is_finite": (("seed",), np.array(finite, np.int8)),
        }
    )
    shape = (config.map_steps, config.map_steps)
    stacked = np.array(maps)[..., : config.map_steps] if maps else np.full((1, config.map_steps, 2, shape[1]), np.nan)
    # the mean of −inf and a number would be neither: the lower of the two middle seeds, as in statistics
    middle = np.sort(stacked, axis=0)[(len(stacked) - 1) // 2]
    later = np.triu(np.ones(shape, bool), 1)
    for index, name in enumerate(("influence_map", "gradient_map")):
        dataset[f"log_{name}"] = (("t", "k"), np.where(later, np.nan, middle[:, index]).astype(np.float32))
    return dataset


# --- influence of the words of a sentence ----------------------------------------------------------------------------


@functools.cache
def _sentences() -> tuple[Any, Any, Any]:
    """Returns the task, the sentences to train on, and those held out.

    Drawn once, since a program that draws them at every update takes longer to compile than to run.
    """
    task = rg.tasks.agreement(distance=DISTANCES, num_attractors=(0, MOST_ATTRACTORS))
    drawn = task.batch(jax.random.key(0), SENTENCES + HELD_OUT)
    return task, *(jax.tree.map(lambda leaf, p=part: leaf[:, p], drawn) for part in _PARTS)


_PARTS = (slice(None, SENTENCES), slice(SENTENCES, None))


@functools.cache
def _trainer(cell_name: CellName, size: int, learning_rate: float, batch_size: int) -> Trainer:
    """Returns what trains all seeds of a cell; compiles once."""
    task, sentences, held_out = _sentences()
    cell = getattr(rg.cells, cell_name)(size, size)
    model = rg.training.model([cell], 2, vocabulary_size=task.vocabulary_size)
    words = [rg.tasks.AGREEMENT_VOCABULARY.index(word) for word in SENTENCE.split()][: ANSWER + 1]
    in_plural = words.copy()
    in_plural[SUBJECT] = rg.tasks.AGREEMENT_VOCABULARY.index(PLURAL)

    def loss(output, batch):
        return rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)

    def measure(params, key):
        output = model.apply(params, model.init_state((HELD_OUT,)), held_out.inputs)
        readout = params.readout

        def answer(xs):
            final = rg.unroll(cell, params.layers[0], cell.init_state(), xs).final
            return (
                jnp.dot(readout.w[1] - readout.w[0], cell.read(params.layers[0], final)) + readout.b[1] - readout.b[0]
            )

        value, gradient = jax.value_and_grad(answer)(params.embedding[jnp.array(words)])
        return {
            "accuracy": rg.losses.accuracy(output.outputs, held_out.targets, held_out.mask),
            "answer": value,
            "answer_in_plural": answer(params.embedding[jnp.array(in_plural)]),
            "word_influence": jnp.linalg.norm(gradient, axis=-1),
        }

    optimizer = optax.chain(rg.remedies.clip_by_global_norm(1.0), optax.adam(learning_rate))

    def draw(key, step):
        chosen = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, SENTENCES, jnp.int32)
        return jax.tree.map(lambda leaf: leaf[:, chosen], sentences)

    return Trainer(model, loss, optimizer, draw, measure, batch_size=batch_size)


def _measure_trained(cell: CellName, seed: int, config: Config) -> xr.Dataset:
    """Returns the dataset of one network before and after training; NaN after a training that failed."""
    trainer = _trainer(cell, config.trained_size, config.learning_rate, config.batch_size)
    trial = trainer.run(
        jax.random.key(seed),
        updates=config.updates,
        eval_every=EVAL_EVERY,
        until=lambda measured: bool(measured["accuracy"] >= ENOUGH),
    )
    last = int(np.flatnonzero(~np.isnan(trial.measured["accuracy"]))[-1])
    stages = {name: values[[0, last]] for name, values in trial.measured.items()}
    if trial.failed_at >= 0:
        for values in stages.values():
            values[1] = np.nan
    dims = {
        "accuracy": ("stage",),
        "answer": ("stage",),
        "answer_in_plural": ("stage",),
        "word_influence": ("stage", "position"),
    }
    dataset = xr.Dataset({name: (dims[name], values.astype(np.float32)) for name, values in stages.items()})
    return dataset.assign(updates=((), int(trial.updates[last])), failed_at=((), trial.failed_at))


MEASURED = (
    "log_influence", "is_finite", "log_influence_map", "log_gradient_map", "accuracy", "answer", "answer_in_plural",
    "word_influence", "updates", "failed_at",
)  # fmt: skip
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "log_influence": ("nats", "log of ‖∂y_T/∂x_{T−lag}‖_F, lag 0 the newest input; −inf for none at all"),
    "is_finite": ("1", "1 where every state of the run is finite"),
    "log_influence_map": ("nats", "log of ‖∂y_t/∂x_k‖_F, median over seeds; NaN for k > t and where not measured"),
    "log_gradient_map": ("nats", "log of ‖∂L_t/∂h_k‖, L_t the cross-entropy of step t, likewise"),
    "share": ("1", f"share of the influence on y_T that the {NEWEST} newest inputs have; NaN without any influence"),
    "reach": ("steps", f"first lag from which on influence stays below {FELT:g} of its largest value; T for none"),
    "accuracy": ("1", "share of verbs that agree, on held-out sentences of the task"),
    "answer": ("nats", "logit of were minus that of was, at the step before the verb of the sentence"),
    "answer_in_plural": ("nats", f"the same of the sentence with {PLURAL} in place of the subject"),
    "word_influence": ("nats per unit", "‖∂answer/∂x_k‖, x_k the vector of a word of the sentence"),
    "word_share": ("1", "the same, divided by its sum over the words"),
    "updates": ("1", "updates at the last evaluation"),
    "failed_at": ("1", "update with a loss, gradient or weight that was not finite; −1 for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with shares and reach, and with medians and intervals over seeds."""
    logs = np.where(dataset["is_finite"].values[..., None] == 1, dataset["log_influence"].values, np.nan)
    whole = scipy.special.logsumexp(logs, axis=-1)
    newest = scipy.special.logsumexp(logs[..., :NEWEST], axis=-1)
    some = np.isfinite(whole)
    share = np.exp(newest - np.where(some, whole, 0))
    dataset["share"] = (("row", "seed"), np.where(some, share, np.nan).astype(np.float32))
    felt = logs >= np.log(FELT) + np.max(logs, axis=-1, keepdims=True)
    reach = logs.shape[-1] - np.argmax(felt[..., ::-1], axis=-1)
    dataset["reach"] = (("row", "seed"), np.where(some, reach, np.nan).astype(np.float32))
    words = dataset["word_influence"]
    dataset["word_share"] = words / words.sum("position", skipna=False)
    summarise(dataset, ("share", "reach"), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished rows and trained networks are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    rows = rows_of(config)
    training_seeds = range(config.first_seed, config.first_seed + config.training_seeds)
    trained = [(cell, seed) for cell in config.trained for seed in training_seeds]
    by_row = [
        Piece(f"row-{index}", f"influence: {label_of(row)}", functools.partial(_measure_row, row, config))
        for index, row in enumerate(rows)
    ]
    by_network = [
        Piece(
            f"trained-{cell}-{seed}", f"training {cell}, seed {seed}",
            functools.partial(_measure_trained, cell, seed, config),
        )
        for cell, seed in trained
    ]  # fmt: skip
    measured = command.measure([*by_row, *by_network], parts=parts, screen=screen)
    dataset = xr.concat(measured[: len(rows)], dim="row").assign_coords(
        cell=("row", [row.cell for row in rows]),
        label=("row", [label_of(row) for row in rows]),
        init=("row", [row.init for row in rows]),
        activation=("row", [row.activation for row in rows]),
        gain=("row", [row.gain for row in rows]),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        lag=np.arange(config.steps),
        t=np.arange(1, config.map_steps + 1),
        k=np.arange(1, config.map_steps + 1),
    )
    for name in ("log_influence_map", "log_gradient_map"):
        mapped = dataset[name].isel(row=[index for index, row in enumerate(rows) if row.is_mapped])
        dataset = dataset.drop_vars(name)
        dataset[name] = (("mapped", "t", "k"), mapped.values)
    networks = [
        xr.concat(measured[len(rows) + first : len(rows) + first + config.training_seeds], dim="training_seed")
        for first in range(0, len(trained), config.training_seeds)
    ]
    dataset = dataset.merge(xr.concat(networks, dim="network")).assign_coords(
        mapped=[label_of(row) for row in rows if row.is_mapped],
        network=list(config.trained),
        training_seed=np.array(training_seeds),
        stage=list(STAGES),
        word=("position", SENTENCE.split()[: ANSWER + 1]),
    )
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance("influence", config, seconds=seconds, dtype="float64", sentence=SENTENCE)
    return derive(dataset)


_NAMES = {"vanilla": "vanilla", "lstm": "LSTM", "gru": "GRU"}


def label_of(row: Row) -> str:
    """Returns how a row is called."""
    if row.cell != "vanilla":
        return f"{_NAMES[row.cell]}, {row.init}"
    if not np.isnan(row.gain):
        return f"{row.init}, gain {row.gain:g}"
    return "identity, ReLU" if row.activation == "relu" else f"{row.init}, tanh"


# --- what a person sees ----------------------------------------------------------------------------------------------

_text = functools.partial(interval_text, nothing="—")


def _of(row: xr.Dataset, name: str, digits: int = 2) -> str:
    return stored_text(row, name, f".{digits}f", nothing="—")


def _rows(dataset: xr.Dataset, *, vanilla: bool | None = None) -> list[xr.Dataset]:
    rows = [dataset.isel(row=index) for index in range(dataset.sizes["row"])]
    return [row for row in rows if vanilla is None or (str(row["cell"].values) == "vanilla") == vanilla]


def _row(dataset: xr.Dataset, label: str) -> xr.Dataset | None:
    return next((row for row in _rows(dataset) if str(row["label"].values) == label), None)


def _name(row: xr.Dataset) -> str:
    return str(row["label"].values)


def _without_number(row: xr.Dataset) -> int:
    return int(np.isnan(row["share"].values).sum())


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"Influence of inputs on the last output: N={config['hidden_size']}, D={config['input_size']}, "
        f"T={config['steps']}, {config['seeds']} seeds, {dataset.attrs['dtype']}, "
        f"matmul {dataset.attrs['matmul_precision']}, {dataset.attrs['backend']}",
        caption=f"medians over seeds [{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]; "
        f"an even influence would give the {NEWEST} newest {NEWEST / config['steps']:.2f}; "
        f"a reach of {config['steps']} is one beyond the first input",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("cell, initialisation")
    for name in (f"share of the\n{NEWEST} newest", f"below {100 * FELT:g} %\nfrom lag", "seeds without\na number"):
        shown.add_column(name, justify="right")
    for row in _rows(dataset):
        prefix = "vanilla, " if str(row["cell"].values) == "vanilla" else ""
        missing = _without_number(row)
        shown.add_row(prefix + _name(row), _of(row, "share", 3), _of(row, "reach", 0), str(missing or ""))
    return shown


def _trained(dataset: xr.Dataset) -> xr.DataArray:
    """Returns which networks learned agreement; those whose training failed did not."""
    return dataset["accuracy"].sel(stage="trained") >= WELL_TRAINED


def _learned(dataset: xr.Dataset, network: str) -> xr.Dataset:
    """Returns the networks of one cell that learned agreement."""
    return dataset.sel(network=network).isel(
        training_seed=np.flatnonzero(_trained(dataset).sel(network=network).values),
    )


def _of_subject(learned: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the subject's share of the influence, and how far its plural moves the answer: before and after."""
    moved = abs(learned["answer_in_plural"] - learned["answer"])
    both = (learned["word_share"].isel(position=SUBJECT), moved)
    share, change = (np.median(values.transpose("stage", "training_seed").values, axis=1) for values in both)
    return share, change


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns one deciding check for each initialisation of the vanilla cell, then our predictions."""
    can_tell = json.loads(dataset.attrs["config"])["steps"] >= CHECK_STEPS
    checks = []
    for row in _rows(dataset, vanilla=True):
        low, missing = float(row["share_low"]), _without_number(row)
        value = f"share {_of(row, 'share', 3)}" + (f", {missing} seeds without a number" if missing else "")
        # judged by the side of the interval that speaks against the claim
        holds = None if np.isnan(low) or not can_tell else bool(low >= NEAR_SHARE)
        name = f"the {NEWEST} newest inputs have the influence: {_name(row)}"
        checks.append(Check(name, value, f"≥ {NEAR_SHARE:g}", holds, "A4", WHY_SHARE))

    def predicted(name: str, labels: Sequence[str], why: str, least: float = 0.0, below: float = np.inf) -> None:
        found = [row for row in map(functools.partial(_row, dataset), labels) if row is not None]
        shares = [float(row["share_median"]) for row in found]
        if not shares:
            return
        span = f"{min(shares):.3f}" if len(shares) == 1 else f"{min(shares):.3f} to {max(shares):.3f}"
        holds = None if np.isnan(shares).any() or not can_tell else min(shares) >= least and max(shares) < below
        bound = f"≥ {least:g}" if least else f"< {below:g}"
        checks.append(Check(f"prediction: {name}", f"share {span}", bound, holds, "A4", why, decides=False))

    swept = [row for row in _rows(dataset, vanilla=True) if float(row["gain"]) <= 1.25]
    near = ["torch, tanh", *map(_name, swept)]
    predicted("vanilla, torch and gains up to 1.25", near, WHY_PREDICTED, least=NEAR_SHARE)
    for label in ("identity, ReLU", "gaussian, gain 2"):
        predicted(f"vanilla, {label}", [label], WHY_PREDICTED, below=NEAR_SHARE)
    predicted("chrono gates", ["LSTM, chrono", "GRU, chrono"], WHY_CHRONO, below=0.5)
    for network in dataset["network"].values.tolist():
        of_subject = _learned(dataset, network)["word_share"].isel(position=SUBJECT)
        rise = (of_subject.sel(stage="trained") - of_subject.sel(stage="untrained")).values
        interval = median_interval(rise, axis=0) if len(rise) else Interval(*[np.full((), np.nan)] * 3)
        value = f"{_text(interval, '.3f')}, {len(rise)} of {dataset.sizes['training_seed']} seeds learned"
        holds = bool(interval.low > 0) if len(rise) > 1 else None
        name = f"prediction: training raises the subject's share, {_NAMES[network]}"
        checks.append(Check(name, value, "> 0", holds, "A4", WHY_TRAINED, decides=False))
    return checks


def _listed(rows: Sequence[xr.Dataset]) -> str:
    """Returns the names of rows, gains of one kind together."""
    said = [_name(row) for row in rows if np.isnan(float(row["gain"]))]
    for kind in ("gaussian", "orthogonal"):
        gains = [f"{float(row['gain']):g}" for row in rows if str(row["init"].values) == kind]
        if gains:
            said.append(f"{kind} weights of gain {', '.join(gains)}")
    return "; ".join(said)


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a sentence."""
    checks = verdict(dataset)
    rows = _rows(dataset, vanilla=True)
    answers = [check.holds for check in checks if check.decides]
    near = [row for row, holds in zip(rows, answers, strict=True) if holds]
    far = [row for row, holds in zip(rows, answers, strict=True) if holds is False]
    config = json.loads(dataset.attrs["config"])
    if not near and not far:
        said = f"T = {config['steps']} is too short to tell, or no seed gave a number."
    else:
        said = ""
        if near:
            least = min(float(row["share_low"]) for row in near)
            reach = max(float(row["reach_median"]) for row in near)
            said += (
                f"at T = {config['steps']} the {NEWEST} newest inputs have at least {least:.2f} of the influence, and "
                f"it stays below 1 % from lag {reach:.0f} at the latest on, with {_listed(near)}."
            )
        if far:
            spans = [float(row["share_median"]) for row in far]
            span = f"{min(spans):.2f}" if len(far) == 1 else f"{min(spans):.2f} to {max(spans):.2f}"
            start = f"  Not with {_listed(far)}" if near else f"{'not with ' + _listed(far)}"
            said += f"{start}, where the share is {span}."
    gated = [f"{_name(row)} {float(row['share_median']):.2f}" for row in _rows(dataset, vanilla=False)]
    said += f"  The same share in gated cells: {'; '.join(gated)}."
    for network in dataset["network"].values.tolist():
        learned = _learned(dataset, network)
        if learned.sizes["training_seed"]:
            (before, after), (moved_before, moved) = _of_subject(learned)
            said += (
                f"  Trained on agreement ({learned.sizes['training_seed']} of {dataset.sizes['training_seed']} seeds "
                f"learned it), {_NAMES[network]} gives the subject, {ANSWER - SUBJECT} steps back, {after:.2g} of "
                f"the influence ({before:.2g} before); its plural moves the answer by {moved:.2g} nats "
                f"({moved_before:.2g} before)."
            )
    missed = [check.name.removeprefix("prediction: ") for check in checks if not check.decides and check.holds is False]
    if missed:
        said += f"  Predicted, but not found: {'; '.join(missed)}."
    return {"A4": said}


_TITLES = {
    "torch, tanh": "vanilla (tanh), default of Torch",
    "identity, ReLU": "vanilla, ReLU and identity weights",
    "LSTM, torch": "LSTM, default of Torch",
    "LSTM, chrono": "LSTM, chrono",
    "GRU, torch": "GRU, default of Torch",
    "GRU, chrono": "GRU, chrono",
}
_DEFAULTS = ("torch, tanh", "LSTM, torch", "GRU, torch")
_LONG = ("identity, ReLU", "LSTM, chrono", "GRU, chrono")
_DECADES = 12
"""Of the maps' colour scale."""
_ZERO_COLOUR = "#d1495b"


def _map_scale(maps: xr.DataArray) -> matplotlib.colors.LogNorm:
    finite = maps.values[np.isfinite(maps.values)]
    top = np.ceil(np.max(finite) / np.log(10)) if finite.size else 0.0
    return matplotlib.colors.LogNorm(10.0 ** (top - _DECADES), 10.0**top, clip=True)


def _draw_map(axes: Any, logs: np.ndarray, norm: matplotlib.colors.LogNorm) -> Any:
    """Draws one map; what lies below the scale has its last colour, an exact zero one of its own."""
    size = len(logs)
    extent = (0.5, size + 0.5, size + 0.5, 0.5)
    values = np.exp(np.maximum(logs.astype(float), np.log(float(norm.vmin or 0))))
    image = axes.imshow(np.ma.masked_invalid(values), norm=norm, cmap="viridis", extent=extent, interpolation="nearest")
    axes.set_facecolor("0.93")
    zeros = np.ma.masked_where(~np.isneginf(logs), np.ones_like(logs))
    axes.imshow(zeros, cmap=matplotlib.colors.ListedColormap([_ZERO_COLOUR]), extent=extent, interpolation="nearest")
    return image


def _maps(drawn: Any, grid: Any, maps: xr.DataArray, labels: Sequence[str], of: str, colour_label: str) -> None:
    norm = _map_scale(maps)
    image = None
    for axes, label in zip(grid, labels, strict=True):
        image = _draw_map(axes, maps.sel(mapped=label).values, norm)
        axes.set_title(_TITLES[label], fontsize=11)
        axes.set_xlabel(f"{of} k (time step)")
    for row in np.reshape(grid, (-1, len(_DEFAULTS))):
        row[0].set_ylabel("output step t")
    grid[0].text(
        0.97, 0.95, "later than t:\nno influence", transform=grid[0].transAxes, ha="right", va="top", color="0.35"
    )
    drawn.colorbar(image, ax=list(grid), label=colour_label, extend="min", shrink=0.9, pad=0.01)


_CURVES = {
    "torch, tanh": ("#16325c", "-", "vanilla, torch"),
    "orthogonal, gain 1": ("#2a78c2", "--", "vanilla, orthogonal"),
    "identity, ReLU": ("#7a5195", "-.", "vanilla, identity + ReLU"),
    "LSTM, torch": ("#d97706", "-", "LSTM, torch"),
    "LSTM, chrono": ("#d97706", "--", "LSTM, chrono"),
    "GRU, torch": ("#1b7f5c", "-", "GRU, torch"),
    "GRU, chrono": ("#1b7f5c", ":", "GRU, chrono"),
}


def _draw_curves(axes: Any, dataset: xr.Dataset) -> None:
    lags = dataset["lag"].values
    lowest = 0.0
    for label, (colour, style, name) in _CURVES.items():
        row = _row(dataset, label)
        if row is None:
            continue
        logs = row["log_influence"].values
        relative = (logs - logs[:, :1]) / np.log(10)
        median, low, high = median_interval(relative, axis=0)
        axes.plot(lags, np.where(np.isfinite(median), median, np.nan), color=colour, linestyle=style, label=name)
        axes.fill_between(lags, np.maximum(low, -60), high, color=colour, alpha=0.18, linewidth=0)
        lowest = min(lowest, float(np.min(median[np.isfinite(median)], initial=0)))
    axes.axvline(NEWEST, color="0.4", linewidth=0.8, linestyle=":")
    bottom = max(lowest, -30)
    axes.set_ylim(1.35 * bottom - 0.5, None)  # with room for the legend
    axes.set_xlabel("lag (steps from input to output)")
    axes.set_ylabel("influence on y_T, relative to lag 0 (log10)")
    axes.set_title(f"fading with the lag (dotted: lag {NEWEST})", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower left", ncols=2, columnspacing=1.0)


def _draw_gains(axes: Any, dataset: xr.Dataset) -> None:
    # set apart a little: the two kinds lie on one another
    for kind, colour, marker, shift in (("gaussian", "#16325c", "o", -0.012), ("orthogonal", "#d97706", "s", 0.012)):
        rows = [row for row in _rows(dataset, vanilla=True) if str(row["init"].values) == kind]
        gains = [float(row["gain"]) + shift for row in rows]
        median, low, high = (
            np.array([float(row[f"share_{part}"]) for row in rows]) for part in ("median", "low", "high")
        )
        axes.errorbar(gains, median, [median - low, high - median], color=colour, marker=marker, capsize=3, label=kind)
    axes.set_xlabel("gain of the recurrent weights")
    axes.set_title("vanilla (tanh), by gain", fontsize=11)
    axes.legend(frameon=False, loc="center left")
    _share_lines(axes.axhline, dataset)
    left = axes.get_xlim()[0]
    even = NEWEST / json.loads(dataset.attrs["config"])["steps"]
    axes.text(left, NEAR_SHARE - 0.015, f"  bound of the claim, {NEAR_SHARE:g}", va="top", color="#c81e4a", fontsize=9)
    axes.text(left, even + 0.01, f"  an even influence, {even:.2g}", va="bottom", color="0.35", fontsize=9)
    axes.set_ylim(0, 1.04)
    axes.set_ylabel(f"share of the {NEWEST} newest inputs")


def _share_lines(line: Any, dataset: xr.Dataset) -> None:
    line(NEAR_SHARE, color="#c81e4a", linewidth=1, linestyle="--")
    line(NEWEST / json.loads(dataset.attrs["config"])["steps"], color="0.5", linewidth=1, linestyle=":")


def _draw_rows(axes: Any, dataset: xr.Dataset) -> None:
    rows = [row for row in _rows(dataset) if np.isnan(float(row["gain"]))][::-1]
    for at, row in enumerate(rows):
        is_vanilla = str(row["cell"].values) == "vanilla"
        median, low, high = (float(row[f"share_{part}"]) for part in ("median", "low", "high"))
        colour = "#16325c" if is_vanilla else "#d97706" if str(row["cell"].values) == "lstm" else "#1b7f5c"
        axes.errorbar([median], [at], xerr=[[median - low], [high - median]], color=colour, marker="o", capsize=3)
    axes.set_yticks(
        range(len(rows)),
        [("vanilla, " if str(row["cell"].values) == "vanilla" else "") + _name(row) for row in rows],
    )
    _share_lines(axes.axvline, dataset)
    axes.set_xlim(0, 1.04)
    axes.set_xlabel(f"share of the {NEWEST} newest inputs")
    axes.set_title("by cell and initialisation", fontsize=11)


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the main figure: maps of ‖∂y_t/∂x_k‖, shares of the newest inputs, influence against lag."""
    config = json.loads(dataset.attrs["config"])
    drawn = matplotlib.figure.Figure(figsize=(13.5, 9), layout="constrained")
    upper, lower = drawn.subplots(2, 3, height_ratios=(1.1, 1))
    maps = dataset["log_influence_map"].sel(mapped=list(_DEFAULTS))
    _maps(drawn, upper, maps, _DEFAULTS, "input", "influence ‖∂y_t/∂x_k‖")
    gains, rows, curves = lower
    _draw_gains(gains, dataset)
    _draw_rows(rows, dataset)
    _draw_curves(curves, dataset)
    for axes in (gains, rows, curves):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(
        "Does a network's output feel nearby inputs only?  Influence of input k on output t before training\n"
        f"N={config['hidden_size']}, Gaussian inputs, {config['seeds']} seeds: medians with 95 % intervals; below, "
        f"influence on the last output, T={config['steps']}",
        fontsize=12,
    )
    return drawn


def gradient_figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the heat maps of ∂L_t/∂h_k: default initialisations above, long memories below."""
    config = json.loads(dataset.attrs["config"])
    drawn = matplotlib.figure.Figure(figsize=(13, 8.6), layout="constrained")
    grid = drawn.subplots(2, 3, sharex=True, sharey=True)
    labels = (*_DEFAULTS, *_LONG)
    maps = dataset["log_gradient_map"].sel(mapped=list(labels))
    _maps(drawn, grid.ravel(), maps, labels, "state", "‖∂L_t/∂h_k‖")
    for axes in grid[0]:
        axes.set_xlabel("")
    for axes in grid[:, 0]:
        axes.set_ylabel("loss of step t")
    grid[0, 0].texts[0].set_text("later than t:\nno gradient")
    note = "What is fainter than the scale has its darkest colour"
    if np.isneginf(maps.values).any():
        patch = matplotlib.patches.Patch(color=_ZERO_COLOUR, label="exactly zero (−inf)")
        drawn.legend(handles=[patch], loc="outside lower center", frameon=False)
        note += "; red: exactly zero"
    drawn.suptitle(
        "How far back does the gradient of one step's loss reach?  ‖∂L_t/∂h_k‖, one logarithmic scale for all\n"
        f"N={config['hidden_size']}, Gaussian inputs, random classes, median of {config['seeds']} seeds; of the LSTM h "
        f"alone.  {note}",
        fontsize=12,
    )
    return drawn


def sentence_figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the sentence once per cell and stage, each word coloured by its share of the influence."""
    config = json.loads(dataset.attrs["config"])
    words = dataset["word"].values.tolist()
    networks = dataset["network"].values.tolist()
    norm, colours = matplotlib.colors.LogNorm(_LEAST_SHARE, 1, clip=True), matplotlib.colormaps["YlGnBu"]
    drawn = matplotlib.figure.Figure(figsize=(14, 1.9 + 1.75 * len(networks)), layout="constrained")
    axes = drawn.subplots()
    widths = np.array([0.62 + 0.13 * max(len(word), 4) for word in words])
    edges = np.concatenate([[0], np.cumsum(widths)])
    for index, network in enumerate(networks):
        learned = _learned(dataset, network)
        number = learned.sizes["training_seed"]
        top = -2.5 * index
        of_seeds = f"{number} of {dataset.sizes['training_seed']} learned"
        axes.text(-0.2, top + 0.62, f"{_NAMES[network]} ({of_seeds})", ha="right", fontsize=12, weight="bold")
        for line, stage in enumerate(STAGES):
            y = top - line
            if not number:
                axes.text(edges[-1] / 2, y, f"{stage}: no network learned the task", ha="center", fontsize=11)
                continue
            shares = np.median(learned["word_share"].sel(stage=stage).transpose("training_seed", "position"), axis=0)
            for word, share, left, width in zip(words, shares, edges, widths, strict=False):
                _draw_word(axes, word, float(share), (left, y), width - 0.06, colours(norm(share)))
            accuracy = 100 * float(np.median(learned["accuracy"].sel(stage=stage)))
            axes.text(-0.2, y, f"{stage}\n{accuracy:.0f} % right", ha="right", va="center", fontsize=10)
            moved = _of_subject(learned)[1][line]
            change = f"{moved:.2g} nats" if moved >= 0.001 else "< 0.001 nats"
            axes.text(edges[-1] + 0.1, y, f"was / were ?\n{change}", va="center", fontsize=11, color="0.25")
    axes.text(edges[-1] + 0.1, 0.62, "cat → cats moves y by", fontsize=10, color="0.25")
    axes.set_xlim(-3.2, edges[-1] + 2.6)
    axes.set_ylim(-2.5 * len(networks) + 0.9, 1.0)
    axes.axis("off")
    scalar = matplotlib.cm.ScalarMappable(norm, colours)
    drawn.colorbar(scalar, ax=axes, label="share of the influence ‖∂y/∂x_k‖", pad=0.01, shrink=0.9, extend="min")
    drawn.suptitle(
        "Which words does the answer “was or were” feel?  The subject is cat, the other nouns are distractors.\n"
        "Colours are derivatives and tell of small changes; at the right, what a changed subject does to the answer\n"
        f"y: logit of were minus was, just before the verb.  N={config['trained_size']}, medians of the networks that "
        f"learned agreement with subjects {DISTANCES[0]} to {DISTANCES[1]} words before the verb",
        fontsize=12,
    )
    return drawn


_LEAST_SHARE = 1e-5


def _draw_word(axes: Any, word: str, share: float, at: tuple[float, float], width: float, colour: Any) -> None:
    left, y = at
    axes.add_patch(matplotlib.patches.Rectangle((left, y - 0.42), width, 0.84, color=colour, linewidth=0))
    ink = "white" if np.dot(colour[:3], (0.3, 0.59, 0.11)) < 0.5 else "black"
    percent = f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1g} %"
    if share < _LEAST_SHARE:
        percent = f"< {100 * _LEAST_SHARE:g} %"
    axes.text(left + width / 2, y + 0.13, word, ha="center", va="center", color=ink, fontsize=12)
    axes.text(left + width / 2, y - 0.23, percent, ha="center", va="center", color=ink, fontsize=9)


ABOUT = """Does the output of a vanilla RNN feel nearby inputs only?

Measures the influence ‖∂y_t/∂x_k‖ of every input by initialisation, for vanilla, LSTM and GRU, and the share of it
that the 10 newest inputs have; then trains the three on agreement and takes the influence of the words of a sentence.
Prints a table with medians and intervals, and writes three figures and a netCDF file."""

CAPTION = """Above, the influence of input k on output t for vanilla, LSTM and GRU as Torch draws them, on one
logarithmic scale; below, the share of the influence that the 10 newest of the inputs have, by gain and by
initialisation, and how influence on the last output fades with the lag."""

GRADIENT_CAPTION = """Heat maps of ‖∂L_t/∂h_k‖, the gradient of one step's loss with respect to an earlier output of
the cell, vanilla beside LSTM beside GRU on one logarithmic scale: as Torch draws them above, and below with weights
for long memory.  For the LSTM it is the gradient with respect to h; its memory c carries more."""

SENTENCE_CAPTION = """The sentence “The cat, which already saw the small dogs near the bird, was full”, each word
coloured by its share of the influence on the answer was or were just before the verb, before and after training; at
the right, by how much the answer moves when cat becomes cats.  The sentence
follows the sentence “The cat, which already ate …, was full” of the lectures; “ate …” became “saw the small dogs near
the bird”, since the task's vocabulary has no “ate” and the lectures leave the rest open."""

EXPERIMENT = command.Experiment(
    name="influence",
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
        command.Picture("gradient", GRADIENT_CAPTION, gradient_figure),
        command.Picture("sentence", SENTENCE_CAPTION, sentence_figure),
    ),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
