"""Does pulling Lyapunov exponents to 0 before training lengthen the time that a vanilla RNN learns to bridge?

Before training, the k leading Lyapunov exponents of a tanh network that reads the task's inputs are pulled to 0 by
some hundred updates of Adam on their mean square (no target of the task is used).  The network and its unflossed twin
are then trained on the temporal order of two symbols, at growing length T, with the same batches.  Torch's
initialisation is tried and an orthogonal one, which starts nearer to 0, and k = N/2 beside k = N.

Before and after flossing are measured: all exponents, the singular values of ∂h_T/∂h_0, and retention.  A condition
number has two readings: σ_1/σ_N of the whole Jacobian, and σ_1/σ_k of the k directions that were flossed.
The learning rate of training, 1e-3, is one at which every start learns the shortest length.
Running time: about 6 minutes on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, Literal, NamedTuple

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
from experiments.statistics import Interval, describe, interval_text, median_interval, summarise
from experiments.trials import Trainer

CLAIMS = (
    Claim(
        "E4",
        "Pulling the Lyapunov exponents of a recurrent network to 0 before training (gradient flossing) lowers the "
        "condition number of its long-term Jacobian and lengthens the time horizon that training can bridge.",
        source="Engelken 2023, arXiv 2312.17306, abstract",
        prediction="no number was known; ours: λ_1 from −0.6 to within 0.05 of 0, a horizon at least twice as long; "
        "the condition number of the flossed directions falls, that of the whole Jacobian only where all N "
        "exponents are flossed",
        refuted="the longest length that most seeds learn is no longer, or the condition number does not fall",
        functions=(
            "rg.remedies.lyapunov_flossing",
            "rg.lyapunov_spectrum",
            "rg.chain_singular_values",
            "rg.retention",
            "rg.tasks.temporal_order",
        ),
        tests=(
            "tests/test_flossing.py",
            "tests/test_remedies.py::test_flossing_moves_the_exponents_to_zero",
            "tests/test_remedies.py::test_gradient_of_flossing_against_central_differences",
            "tests/test_singular_values.py",
        ),
    ),
)

InitName = Literal["torch", "orthogonal", "gaussian", "keras", "flax"]
PLAIN = "plain"
SOLVED = 0.9
"""Accuracy on held-out sequences from which on a length counts as learned; chance is 1/4."""
NEAR_ZERO = 0.05
"""Nats per step: over 20 steps, the shortest length, a factor of e."""
WHY_HORIZON = "the claim's comparison, paired by seed: the longest length learned, all shorter ones included, is longer"
WHY_CONDITION = "the claim's comparison, paired by seed: log(σ_1/σ_last) of the same stretch of inputs is smaller"
WHY_ZERO = "what flossing minimises; 0.05 nats per step are a factor of e over the shortest length"
GRAD_CLIP = 1.0
"""Global norm at which gradients are clipped, of flossing and of training."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of flossing and of the training after it."""

    inits: tuple[InitName, ...] = ("torch", "orthogonal")
    """How the weights are drawn before flossing."""
    exponents: tuple[int, ...] = (16, 32)
    """Numbers k of leading exponents that are pulled to 0, rising; each is a start beside the plain one."""
    hidden_size: int = 32
    """Units N."""
    input_size: int = 6
    """Width D of the vectors of the six symbols, entries N(0, 1)."""
    floss_updates: int = 300
    """Updates of Adam on the exponents."""
    floss_rate: float = 1e-3
    """Its learning rate."""
    floss_steps: int = 50
    """Length of the sequences along which exponents are taken."""
    floss_batch: int = 4
    """Sequences of such an update."""
    lag: int = 100
    """Length of the Jacobian ∂h_T/∂h_0 whose singular values are taken, and longest lag of retention."""
    spectrum_steps: int = 500
    """Steps over which exponents are measured before and after."""
    lengths: tuple[int, ...] = (20, 40, 80, 120)
    """Lengths T of the temporal order task, rising."""
    updates: int = 2_000
    """Updates of training at the most; a trial ends when it has learned."""
    eval_every: int = 200
    """Updates between evaluations on held-out sequences."""
    batch_size: int = 20
    """Sequences of an update."""
    learning_rate: float = 1e-3
    """Of training by Adam."""
    test_size: int = 400
    """Held-out sequences."""
    seeds: int = 5
    """Networks of each initialisation; every start and length has the same draws."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    inits=("torch",), exponents=(4,), hidden_size=4, floss_updates=3, floss_steps=10, floss_batch=2, lag=10,
    spectrum_steps=40, lengths=(10,), updates=4, eval_every=2, batch_size=4, test_size=8, seeds=2,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"hidden_size": 1, "input_size": 1, "floss_updates": 1, "floss_steps": 10, "floss_batch": 1, "lag": 1}
    command.check_at_least(
        config,
        least | {"spectrum_steps": 40, "updates": 1, "eval_every": 1, "batch_size": 1, "test_size": 1, "seeds": 1}
        | {"first_seed": 0},
    )  # fmt: skip
    for name, low, high in (("exponents", 1, config.hidden_size), ("lengths", 10, np.inf)):
        values = getattr(config, name)
        if not values or list(values) != sorted(set(values)) or values[0] < low or values[-1] > high:
            up_to = f" to {high} (hidden size)" if np.isfinite(high) else ""
            raise UserError(f"--{name}: expected numbers from {low}{up_to}, rising, found {values}")
    if not config.inits or len(set(config.inits)) < len(config.inits):
        raise UserError(f"--inits: expected each name once, found {' '.join(config.inits)}")
    for name in ("floss_rate", "learning_rate"):
        if not (np.isfinite(getattr(config, name)) and getattr(config, name) > 0):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected a positive number, found {getattr(config, name):g}")
    if config.updates % config.eval_every:
        raise UserError(f"--updates: expected a multiple of --eval-every {config.eval_every}, found {config.updates}")


def starts_of(config: Config) -> list[str]:
    """Returns the names of what training starts from."""
    return [PLAIN, *(f"k = {k}" for k in config.exponents)]


@functools.cache
def _cell(input_size: int, hidden_size: int, dtype: str = "float32") -> rg.Cell:
    return rg.cells.vanilla(input_size, hidden_size, dtype=dtype)


@functools.cache
def _model(config: Config) -> rg.training.Model:
    task = rg.tasks.temporal_order(config.floss_steps)
    cell = _cell(config.input_size, config.hidden_size)
    return rg.training.model([cell], task.output_size, vocabulary_size=task.vocabulary_size)


@functools.cache
def _flosser(k: int, config: Config) -> Any:
    """The compiled flossing of k exponents: (params, embedding, key) to (params, the loss before every update)."""
    task, cell = rg.tasks.temporal_order(config.floss_steps), _cell(config.input_size, config.hidden_size)
    optimizer = optax.chain(rg.remedies.clip_by_global_norm(GRAD_CLIP), optax.adam(config.floss_rate))

    def distance(params, inputs, keys):
        one = lambda xs, key: rg.remedies.lyapunov_flossing(cell, params, cell.init_state(), xs, k=k, key=key)
        return jnp.mean(jax.vmap(one, in_axes=(1, 0))(inputs, keys))

    @jax.jit
    def floss(params, embedding, key):
        def update(carry, step):
            params, opt_state = carry
            key_batch, key_frame = jax.random.split(jax.random.fold_in(key, step))
            inputs = embedding[task.batch(key_batch, config.floss_batch).inputs]
            keys = jax.random.split(key_frame, config.floss_batch)
            value, grads = jax.value_and_grad(distance)(params, inputs, keys)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        (params, _), values = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(config.floss_updates))
        return params, values

    return floss


class _Networks(NamedTuple):
    params: dict[str, Any]
    """Of the model, by start."""
    distance: dict[str, np.ndarray]
    """Mean square of the exponents before each update, by start; none for the plain one."""


@functools.cache
def _networks(init: InitName, seed: int, config: Config) -> _Networks:
    """The plain network and its flossed copies."""
    key_model, key_cell, key_floss = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 3)
    drawn = rg.cells.vanilla(config.input_size, config.hidden_size, init=init).init(key_cell)
    plain = _model(config).init(key_model)._replace(layers=(drawn,))
    params, distance = {PLAIN: plain}, {}
    for k, start in zip(config.exponents, starts_of(config)[1:], strict=True):
        flossed, values = _flosser(k, config)(drawn, plain.embedding, key_floss)
        params[start], distance[start] = plain._replace(layers=(flossed,)), np.asarray(values, np.float32)
    return _Networks(params, distance)


@functools.partial(jax.jit, static_argnames="cell")
def _spectrum_and_retention(cell, params, xs, later):
    state = cell.init_state()
    spectrum = rg.lyapunov_spectrum(cell, params, state, xs, num_transient=xs.shape[0] // 5)
    return spectrum.exponents, rg.retention(cell, params, state, later).log_norm


def _measure_seeds(init: InitName, config: Config) -> xr.Dataset:
    """Returns exponents, singular values and retention of every start and seed of an initialisation."""
    cell = _cell(config.input_size, config.hidden_size)
    vocabulary = _model(config).vocabulary_size or 0
    rows = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        networks = _networks(init, seed, config)
        ids = jax.random.randint(jax.random.key(seed), (config.spectrum_steps + config.lag,), 0, vocabulary, jnp.int32)
        found: dict[str, list[Any]] = {name: [] for name in ("exponents", "log_retention", "log_singular", "distance")}
        for start, params in networks.params.items():
            xs = params.embedding[ids]
            first, later = xs[: config.spectrum_steps], xs[config.spectrum_steps :]
            exponents, log_retention = _spectrum_and_retention(cell, params.layers[0], first, later)
            # float64, and only here: the smallest of the singular values lie beyond the reach of float32 steps
            with jax.enable_x64(True):
                double = _cell(config.input_size, config.hidden_size, "float64")
                wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params.layers[0], later))
                singular = np.asarray(
                    rg.chain_singular_values(double, wide[0], double.init_state(), wide[1]).log_singular_values
                )
            nothing = np.full(config.floss_updates, np.nan, np.float32)
            found["exponents"].append(np.asarray(exponents))
            found["log_retention"].append(np.asarray(log_retention))
            found["log_singular"].append(singular.astype(np.float32))
            found["distance"].append(networks.distance.get(start, nothing))
        rows.append({name: np.stack(values) for name, values in found.items()})
    last = {"exponents": "index", "log_retention": "lag", "log_singular": "index", "distance": "floss_update"}
    return xr.Dataset({name: (("seed", "start", last[name]), np.stack([row[name] for row in rows])) for name in last})


@functools.cache
def _trainer(length: int, config: Config) -> Trainer:
    task, model = rg.tasks.temporal_order(length), _model(config)

    def loss(output, batch):
        return rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)

    def measure(params, key):
        batch = task.batch(key, config.test_size)
        output = model.apply(params, model.init_state((config.test_size,)), batch.inputs)
        return {"accuracy": rg.losses.accuracy(output.outputs, batch.targets, batch.mask)}

    def batch_at(key, step):
        return task.batch(jax.random.fold_in(key, step), config.batch_size)

    optimizer = optax.chain(rg.remedies.clip_by_global_norm(GRAD_CLIP), optax.adam(config.learning_rate))
    return Trainer(model, loss, optimizer, batch_at, measure, batch_size=config.batch_size)


def _train_row(init: InitName, length: int, config: Config) -> xr.Dataset:
    """Returns the trained networks of an initialisation at one length: every start and seed."""
    trainer = _trainer(length, config)
    rows = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        trials = [
            trainer.run(
                jax.random.key(seed),
                updates=config.updates,
                eval_every=config.eval_every,
                params=params,
                until=lambda measured: bool(measured["accuracy"] >= SOLVED),
            )
            for params in _networks(init, seed, config).params.values()
        ]
        rows.append(
            {
                "accuracy": np.stack([trial.measured["accuracy"].astype(np.float32) for trial in trials]),
                "failed_at": np.array([trial.failed_at for trial in trials]),
            }
        )
    dims: dict[str, tuple[str, ...]] = {"accuracy": ("evaluation",), "failed_at": ()}
    return xr.Dataset({name: (("seed", "start", *dims[name]), np.stack([row[name] for row in rows])) for name in dims})


MEASURED = ("exponents", "log_retention", "log_singular", "distance", "accuracy", "failed_at")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "exponents": ("nats per step", "Lyapunov exponents before training, from the largest on"),
    "log_retention": ("nats", "log of ‖∂h_T/∂h_{T−lag}‖_F before training, 0 at lag 0"),
    "log_singular": ("nats", "log singular values of ∂h_T/∂h_{T−lag} at the longest lag, before training"),
    "distance": ("nats² per step²", "mean square of the k leading exponents before each update of flossing"),
    "accuracy": ("1", "share of right answers on held-out sequences; NaN after the end of a trial"),
    "failed_at": ("updates", "update whose loss, gradient or weights were not finite; −1 for none"),
    "best_accuracy": ("1", "largest accuracy of a trial"),
    "horizon": ("steps", "the longest length learned with all shorter ones; 0 where the shortest was not"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with horizons, and medians and intervals over seeds."""
    best = dataset["accuracy"].max("evaluation")
    dataset["best_accuracy"] = best
    learned = (best >= SOLVED).transpose("length", ...).astype(int).cumprod("length")
    dataset["horizon"] = (learned * dataset["length"]).max("length")
    summarise(dataset, ("exponents", "log_retention", "log_singular", "best_accuracy", "horizon"), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished parts are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    pieces = []
    for init in config.inits:
        flossed = functools.partial(_measure_seeds, init, config)
        pieces.append(Piece(f"flossing-{init}", f"flossing: {init}", flossed))
        for length in config.lengths:
            trained = functools.partial(_train_row, init, length, config)
            pieces.append(Piece(f"training-{init}-{length}", f"training: {init}, T = {length}", trained))
    measured = command.measure(pieces, parts=parts, screen=screen)
    each = 1 + len(config.lengths)
    of_inits = [
        measured[i].merge(xr.concat(measured[i + 1 : i + each], dim="length")) for i in range(0, len(measured), each)
    ]
    dataset = xr.concat(of_inits, dim="init").assign_coords(
        init=list(config.inits),
        start=starts_of(config),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        length=list(config.lengths),
        lag=np.arange(config.lag + 1),
        index=np.arange(1, config.hidden_size + 1),
        evaluation=np.arange(0, config.updates + 1, config.eval_every),
    )
    dataset.attrs = command.provenance("flossing", config, seconds=time.perf_counter() - started)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _flossed(dataset: xr.Dataset) -> list[tuple[str, str, int]]:
    """Initialisation, start and its k."""
    ks = json.loads(dataset.attrs["config"])["exponents"]
    starts = dataset["start"].values.tolist()[1:]
    return [(init, start, k) for init in dataset["init"].values.tolist() for start, k in zip(starts, ks, strict=True)]


def _condition(of_start: xr.Dataset, k: int) -> np.ndarray:
    """Log condition number of the k leading directions, by seed; inf where a direction is lost altogether."""
    singular = of_start["log_singular"]
    return (singular.sel(index=1) - singular.sel(index=k)).values


def _lower(dataset: xr.Dataset, init: str, start: str, k: int) -> Interval:
    """Log condition number with flossing less that without, of the k leading directions."""
    after, before = (_condition(dataset.sel(init=init, start=at), k) for at in (start, PLAIN))
    return median_interval(after - before, axis=0)


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"Flossing before training: vanilla tanh, N={config['hidden_size']}, {config['floss_updates']} updates "
        f"of flossing, {config['seeds']} seeds",
        caption=f"medians over seeds; log κ: σ_1/σ_N of ∂h_T/∂h_0 over {config['lag']} steps, and of the k leading "
        f"directions; learned: seeds of accuracy ≥ {SOLVED:g} on temporal order within {config['updates']} updates",
        title_justify="left",
        caption_justify="left",
    )
    for name in (
        "init",
        "start",
        "λ_1",
        "λ_k",
        "log κ, k",
        "log κ, all",
        "log ret.",
        *(f"T={t}" for t in config["lengths"]),
    ):
        shown.add_column(name, justify="left" if name in ("init", "start") else "right")
    for init in dataset["init"].values.tolist():
        for start, k in zip(
            dataset["start"].values.tolist(), [config["exponents"][0], *config["exponents"]], strict=True
        ):
            row = dataset.sel(init=init, start=start)
            learned = (row["best_accuracy"] >= SOLVED).sum("seed").values
            shown.add_row(
                init,
                start,
                f"{float(row['exponents_median'].sel(index=1)):.3f}",
                f"{float(row['exponents_median'].sel(index=k)):.3f}",
                f"{np.median(_condition(row, k)):.0f}",
                f"{np.median(_condition(row, config['hidden_size'])):.0f}",
                f"{float(row['log_retention_median'][-1]):.1f}",
                *(f"{int(count)} of {row.sizes['seed']}" for count in learned),
            )
    return shown


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns three deciding checks for every flossed start, and whether flossing did what it is for."""
    checks = []
    longest, size = int(dataset["length"][-1]), int(dataset["index"][-1])
    for init, start, k in _flossed(dataset):
        label = f"{init}, {start}"
        after, before = (dataset["horizon"].sel(init=init, start=at) for at in (start, PLAIN))
        longer = median_interval((after - before).values, axis=0)
        # where both bridge the longest length tried, or neither the shortest, nothing is compared
        tie = bool((after == before).all()) and float(before.median()) in (0.0, float(longest))
        checks.append(
            Check(
                f"the horizon is longer: {label}",
                f"T = {float(before.median()):.0f} → {float(after.median()):.0f}, {interval_text(longer, '+.0f')}",
                "> 0",
                # judged by the side of the interval that speaks against the claim
                None if tie else bool(longer.low > 0),
                "E4",
                WHY_HORIZON,
            )
        )
        directions = (
            {"the k flossed directions": k, "the whole Jacobian": size} if k < size else {"the whole Jacobian": k}
        )
        for what, number in directions.items():
            lower = _lower(dataset, init, start, number)
            checks.append(
                Check(
                    f"the condition number falls, {what}: {label}", f"{interval_text(lower, '+.1f')} nats", "< 0",
                    None if np.isnan(lower.high) else bool(lower.high < 0), "E4", WHY_CONDITION,
                )
            )  # fmt: skip
        largest = median_interval(dataset["exponents"].sel(init=init, start=start, index=1).values, axis=0)
        near = bool(max(abs(largest.low), abs(largest.high)) <= NEAR_ZERO)
        name = f"prediction: λ_1 ends near 0: {label}"
        checks.append(
            Check(name, interval_text(largest, ".3f"), f"±{NEAR_ZERO:g}", near, "E4", WHY_ZERO, decides=False)
        )
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    size = int(dataset["index"][-1])
    sentences = []
    for init in dataset["init"].values.tolist():
        horizons = dataset["horizon"].sel(init=init).median("seed")
        phrases = []
        for of, start, k in _flossed(dataset):
            if of != init:
                continue
            whole, part = _lower(dataset, init, start, size), _lower(dataset, init, start, k)
            flossed = f", of the flossed directions by {float(part.median):+.0f}" if k < size else ""
            phrases.append(
                f"to {float(horizons.sel(start=start)):.0f} with {start} (the log condition number changes by "
                f"{float(whole.median):+.0f} nats{flossed})"
            )
        sentences.append(
            f"{init}: the horizon goes from T = {float(horizons.sel(start=PLAIN)):.0f} {' and '.join(phrases)}"
        )
    sentence = "; ".join(sentences) + "."
    every = [check for check in verdict(dataset) if check.decides]
    contrary = [check.name for check in every if check.holds is False]
    if contrary and len(contrary) < len(every):
        sentence += f"  Not so: {'; '.join(contrary)}."
    return {"E4": sentence}


_COLOURS = ("#16325c", "#d97706", "#0f9b76", "#8e44ad")
_MARKERS = ("o", "s", "^", "D")


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: exponents, singular values, retention and success, a row for each initialisation."""
    config = json.loads(dataset.attrs["config"])
    inits, starts = dataset["init"].values.tolist(), dataset["start"].values.tolist()
    drawn = matplotlib.figure.Figure(figsize=(13.2, 3.1 * len(inits) + 1.5), layout="constrained")
    grid = drawn.subplots(len(inits), 4, squeeze=False, sharey="col")
    panels = {"exponents": "index", "log_singular": "index", "log_retention": "lag"}
    titles = ("Lyapunov exponents", f"singular values, {config['lag']} steps", "retention", "temporal order learned")
    labels = ("nats per step", "log σ (nats)", "log retention (nats)", f"seeds of {config['seeds']}")
    for line, init in zip(grid, inits, strict=True):
        for place, start in enumerate(starts):
            row, colour, marker = dataset.sel(init=init, start=start), _COLOURS[place % 4], _MARKERS[place % 4]
            for axes, (name, dim) in zip(line, panels.items(), strict=False):
                median, low, high = (row[f"{name}_{part}"].values for part in Interval._fields)
                shown = np.isfinite(median)
                axes.plot(row[dim].values[shown], median[shown], color=colour, linewidth=1.8, label=start)
                axes.fill_between(row[dim].values[shown], low[shown], high[shown], color=colour, alpha=0.2, linewidth=0)
            learned = (row["best_accuracy"] >= SOLVED).sum("seed").values
            # side by side, so that equal counts do not hide each other
            at = np.arange(len(learned)) + 0.25 * (place - 0.5 * (len(starts) - 1))
            line[3].bar(at, learned, width=0.22, color=colour)
            line[3].plot(at, learned, linestyle="", marker=marker, color=colour, markersize=5, clip_on=False)
        line[0].axhline(0, color="0.5", linewidth=0.8)
        line[3].set_xticks(range(dataset.sizes["length"]), [str(t) for t in dataset["length"].values])
        line[3].set_ylim(0, config["seeds"] + 0.2)
        line[3].set_yticks(range(config["seeds"] + 1))
        for axes, title, label, below in zip(
            line, titles, labels, ("index", "index", "lag (steps)", "length T"), strict=True
        ):
            axes.set_title(f"{init}: {title}", fontsize=10)
            axes.set_ylabel(label)
            axes.set_xlabel(below)
            axes.tick_params(labelleft=True)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    handles, names = grid[0][0].get_legend_handles_labels()
    names = [name if name == PLAIN else f"flossed, {name} exponents pulled to 0" for name in names]
    drawn.legend(handles, names, loc="outside lower center", ncols=len(starts), frameon=False)
    drawn.suptitle(
        "Does pulling Lyapunov exponents to 0 before training lengthen the horizon?\n"
        f"vanilla tanh network, N={config['hidden_size']}, {config['seeds']} seeds: median and 95 % interval; right: "
        f"seeds that learn the task within {config['updates']} updates",
        fontsize=11,
    )
    return drawn


ABOUT = """Does pulling Lyapunov exponents to 0 before training lengthen the time that a vanilla RNN learns to bridge?

Flosses networks of two initialisations, measures exponents, singular values and retention before and after, and trains
them on temporal order at growing length; writes a table, a figure and a netCDF file."""

CAPTION = """Vanilla networks with and without gradient flossing before training, a row for each initialisation:
Lyapunov exponents, singular values of the long-term Jacobian, retention, and how many seeds learn temporal order at
each length."""

EXPERIMENT = command.Experiment(
    name="flossing",
    about=ABOUT,
    claims=CLAIMS,
    default=Config(),
    smoke=SMOKE,
    run=run,
    table=table,
    verdict=verdict,
    summary=summary,
    pictures=(command.Picture("", CAPTION, figure),),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
