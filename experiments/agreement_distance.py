"""Does a vanilla cell forget whether the cat was or the cats were, where LSTM and GRU keep it?

Trains each cell on sentences whose subject stands up to so many words before the verb, and asks which verbs agree: by
distance, also beyond the longest one trained on, and by the nouns in between, all of the subject's number or all of the
other.  Before and after training it follows the gradient of the answer, the difference of the two logits, from the verb
back to the subject.

The vanilla cell is tried with the default weights of Torch and with orthogonal ones.  Every cell has the same learning
rate, one at which the vanilla cell learns the shortest sentences, and the same number of updates; training ends early
once every verb or all but one agrees.  Running time: five to ten minutes on two cores with the defaults.
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
from experiments.statistics import describe, median_interval, summarise
from experiments.trials import Trainer, first_reached

CLAIMS = (
    Claim(
        "C2",
        "“The cat, which already ate …, was full”: a vanilla recurrent network has forgotten the subject's number when "
        "it comes to the verb; GRU and LSTM keep it.",
        source="lectures on sequence models (Ng); the measure is that of Linzen, Dupoux & Goldberg 2016, "
        "arXiv 1611.01368: verbs that agree, against distance and attractors",
        prediction="from first runs with N = 128 and 3 seeds: with subjects up to 20 words before the verb the vanilla "
        "cell learns it with every seed, up to 30 with 1 of 3; LSTM and GRU always, and at twice the distance too.  "
        "Networks that agree keep at least a hundredth of the gradient at the subject, the others less",
        refuted="a vanilla cell that agrees in more than 60 % of the sentences, or an LSTM or GRU in less than 99 %, "
        "at distances that it was trained on",
        functions=("rg.tasks.agreement", "rg.tasks.agreement_sentences", "rg.training.train_step", "rg.bptt"),
        tests=("tests/test_agreement_distance.py", "tests/test_tasks.py"),
    ),
)

CellName = Literal["vanilla", "vanilla_orthogonal", "lstm", "gru"]
FORGETS = ("vanilla", "vanilla_orthogonal")
"""Cells that the claim says forget; it says of the others that they keep."""
STAGES = ("untrained", "trained")
SHORTEST = 10
"""The shortest distance with room for two attractors (rg.tasks.shortest_distance)."""
ATTRACTORS = 2
"""Nouns between subject and verb while training, from none to so many."""
MOST_ATTRACTORS = 4
"""The same when asked for their effect, at ATTRACTOR_DISTANCE."""
ATTRACTOR_DISTANCE = 20
BIN = 5
"""Distances that are counted together, so that each bin has some hundred sentences."""
SOLVED = 0.99
CHANCE = 0.6
KEPT = 0.01
"""Predicted to divide networks that agree from those that do not: retention at the subject."""
ENOUGH_UPDATES, ENOUGH_SEEDS = 1_000, 3
"""A run with fewer cannot tell: the gated cells need 600 to 2,000 updates."""
WHY_CHANCE = "1/2 is chance; 60 % is a fifth of the way up from there, 2.5 standard errors for 200 sentences"
WHY_SOLVED = "this project's number for the agreement task: one verb in a hundred wrong"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the agreement trials."""

    cells: tuple[CellName, ...] = ("vanilla", "vanilla_orthogonal", "lstm", "gru")
    """Cells; vanilla_orthogonal has orthogonal weights, the others those of Torch."""
    trained: tuple[int, ...] = (12, 20, 30)
    """Longest distances trained on, rising; the shortest is 10."""
    farthest: int = 59
    """Longest distance tested on."""
    probe_distance: int = 30
    """Distance over which the gradient is followed back."""
    hidden_size: int = 64
    """Units N."""
    learning_rate: float = 1e-3
    """Of Adam, behind clipping at a norm of 1."""
    batch_size: int = 32
    """Sentences per update."""
    updates: int = 4_000
    """Updates at the most."""
    eval_every: int = 100
    """Updates between evaluations on 500 sentences."""
    test_sentences: int = 4_000
    """Sentences tested on by distance; half as many by attractors."""
    probes: int = 50
    """Sentences along which the gradient is followed."""
    seeds: int = 5
    """Independent repetitions: weights and sentences."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    cells=("vanilla",), trained=(12,), farthest=29, probe_distance=12, hidden_size=8, batch_size=8, updates=20,
    eval_every=10, test_sentences=400, probes=10, seeds=2,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim."""

_CHUNK = 200
"""Sentences that are read at once."""
_EVALUATED = 500


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    names = ("hidden_size", "batch_size", "updates", "eval_every", "probes", "seeds")
    least = {**dict.fromkeys(names, 1), "first_seed": 0, "probe_distance": SHORTEST, "farthest": ATTRACTOR_DISTANCE}
    command.check_at_least(config, {**least, "test_sentences": 2 * _CHUNK})
    if config.probe_distance > config.farthest:
        raise UserError(f"--probe-distance: expected at most {config.farthest}, found {config.probe_distance}")
    if not config.cells or len(set(config.cells)) < len(config.cells):
        raise UserError(f"--cells: expected different cells, at least one, found {config.cells}")
    if not config.trained or list(config.trained) != sorted(set(config.trained)) or config.trained[0] < SHORTEST:
        raise UserError(f"--trained: expected distances of at least {SHORTEST}, rising, found {config.trained}")
    if config.trained[-1] > config.farthest:
        raise UserError(f"--farthest: expected at least {config.trained[-1]}, found {config.farthest}")
    if config.updates % config.eval_every:
        raise UserError(f"--updates: expected a multiple of {config.eval_every}, found {config.updates}")
    if config.test_sentences % (2 * _CHUNK):
        raise UserError(f"--test-sentences: expected a multiple of {2 * _CHUNK}, found {config.test_sentences}")
    if not (np.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UserError(f"--learning-rate: expected a positive number, found {config.learning_rate:g}")


_SIZE = len(rg.tasks.AGREEMENT_VOCABULARY)


def _one_hot(ids):
    return jax.nn.one_hot(ids, _SIZE, dtype="float32")


def _draw(task, key, batch_size):
    batch = task.batch(key, batch_size)
    return batch._replace(inputs=_one_hot(batch.inputs))


def _loss(output, batch):
    return rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask)


@functools.cache
def _model(name: CellName, hidden_size: int) -> Any:
    """Returns the network; that of another initialisation is the same but for its ``init``."""
    kind, _, init = name.partition("_")
    return rg.training.model([getattr(rg.cells, kind)(_SIZE, hidden_size, init=init or "torch")], 2)


def _sentences(key: jax.Array, config: Config, distances: tuple[int, int], number: int) -> rg.tasks.AgreementSentences:
    """Returns so many sentences of these distances, chosen from one large draw, which is compiled once for all uses.

    Where there are fewer in it they are taken more than once.
    """
    drawn = rg.tasks.agreement_sentences(
        key, config.test_sentences, distance=(SHORTEST, config.farthest), num_attractors=(0, ATTRACTORS)
    )
    distance = np.asarray(drawn.distance)
    there = np.flatnonzero((distance >= distances[0]) & (distance <= distances[1]))
    if not len(there):
        raise UserError(f"--test-sentences: expected some of distance {distances[1]}, found none; more are needed")
    chosen = np.resize(there, number)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[..., chosen], drawn)


@functools.cache
def _trainer(kind: CellName, longest: int, config: Config) -> Trainer:
    """Returns what trains the networks of one cell up to one distance; compiled once for every initialisation."""
    model = _model(kind, config.hidden_size)
    task = rg.tasks.agreement(distance=(SHORTEST, longest), num_attractors=(0, ATTRACTORS))

    # drawn once for all seeds: they only say when training may end
    held_out = _sentences(jax.random.key(longest), config, (SHORTEST, longest), _EVALUATED)
    words, targets, mask = (leaf[: longest + 4] for leaf in held_out.batch)

    def measure(params, key):
        output = model.apply(params, model.init_state((_EVALUATED,)), _one_hot(words))
        return {"accuracy": rg.losses.accuracy(output.outputs, targets, mask)}

    return Trainer(
        model,
        _loss,
        optax.chain(rg.remedies.clip_by_global_norm(1.0), optax.adam(config.learning_rate)),
        lambda key, step: _draw(task, jax.random.fold_in(key, step), config.batch_size),
        measure,
        batch_size=config.batch_size,
    )


class _Tests(NamedTuple):
    """Sentences that all networks of a seed are tested on."""

    ids: jax.Array
    """(chunk, T, sentence): by distance, then with attractors of the subject's number, then of the other one."""
    before_verb: jax.Array
    """Step at which the answer is asked, (chunk, sentence)."""
    number: np.ndarray
    distance: np.ndarray
    attractors: np.ndarray
    kind: np.ndarray
    """0 by distance, 1 attractors of the subject's number, 2 of the other number."""
    probes: jax.Array
    """Sentences to follow the gradient along, up to the step before the verb, (T, sentence)."""


@functools.lru_cache(maxsize=8)
def _tests(config: Config, seed: int) -> _Tests:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 4)
    half = config.test_sentences // 2
    sets = [
        _sentences(keys[0], config, (SHORTEST, config.farthest), config.test_sentences),
        *(
            rg.tasks.agreement_sentences(
                key, half, distance=ATTRACTOR_DISTANCE, num_attractors=(0, MOST_ATTRACTORS), mismatch=mismatch
            )
            for key, mismatch in zip(keys[1:3], (0.0, 1.0), strict=True)
        ),
    ]
    num_steps = config.farthest + 4
    padded = [np.pad(s.batch.inputs, ((0, num_steps - s.batch.inputs.shape[0]), (0, 0))) for s in sets]
    joined = {
        name: np.concatenate([np.asarray(getattr(s, name)) for s in sets])
        for name in ("number", "distance", "num_attractors")
    }
    ids = np.concatenate(padded, axis=1).reshape(num_steps, -1, _CHUNK).transpose(1, 0, 2)
    probed = _sentences(keys[3], config, (config.probe_distance, config.probe_distance), config.probes)
    return _Tests(
        jnp.asarray(ids),
        jnp.asarray(joined["distance"].reshape(-1, _CHUNK)),  # the subject is word 1, so the verb word 1 + distance
        joined["number"],
        joined["distance"],
        joined["num_attractors"],
        np.repeat([0, 1, 2], [config.test_sentences, half, half]),
        jnp.asarray(probed.batch.inputs[: config.probe_distance + 1]),
    )


@functools.partial(jax.jit, static_argnames=("model",))
def _answers(model, params, ids, before_verb):
    """The number that the network says, (chunk, sentence)."""

    def of_chunk(chunk):
        words, at = chunk
        outputs = model.apply(params, model.init_state((_CHUNK,)), _one_hot(words)).outputs
        return jnp.argmax(outputs[at, jnp.arange(_CHUNK)], axis=-1)

    return jax.lax.map(of_chunk, (ids, before_verb))


@functools.partial(jax.jit, static_argnames=("model",))
def _log_retention(model, params, ids):
    """log ‖∂(y₁ − y₀)/∂s_{T−lag}‖ less that at lag 0, mean over sentences; the last lag is the state that has just
    read the subject."""
    (cell,), (weights,) = model.layers, params.layers
    difference = params.readout.w[1] - params.readout.w[0]
    xs = _one_hot(ids)

    def loss(states):
        return jnp.sum(cell.read(weights, states)[-1] @ difference)

    total = rg.bptt(cell, weights, cell.init_state(ids.shape[1:]), xs, loss).state_cotangents.total
    rows = tuple(rg.LogScaled(field.mantissa[..., None, :], field.exponent) for field in total)
    log_norm = rg.logscaled.log_norm(rg.logscaled.join(rows))
    return jnp.mean(jnp.flip(log_norm - log_norm[-1:], axis=0)[:-2], axis=1)


def _share(right: np.ndarray, chosen: np.ndarray) -> float:
    return float(right[chosen].mean()) if chosen.any() else float("nan")


def _bins(config: Config) -> np.ndarray:
    """Returns the first distance of every bin."""
    return np.arange(SHORTEST, config.farthest + 1, BIN)


def _measure(name: CellName, longest: int, seed: int, config: Config) -> xr.Dataset:
    """Returns the dataset of one trained network."""
    kind: Any = name.partition("_")[0]
    model, tests = _model(kind, config.hidden_size), _tests(config, seed)
    trainer = _trainer(kind, longest, config)
    key = jax.random.key(seed)
    params = _model(name, config.hidden_size).init(jax.random.fold_in(key, 0))
    trial = trainer.run(
        key,
        params=params,
        updates=config.updates,
        eval_every=config.eval_every,
        until=lambda measured: bool(measured["accuracy"] >= 1 - 1.5 / _EVALUATED),  # at most one wrong
    )
    said = np.asarray(_answers(model, trial.params, tests.ids, tests.before_verb)).ravel()
    right = said == tests.number
    by_distance = tests.kind == 0
    first = _bins(config)
    retention = [np.asarray(_log_retention(model, weights, tests.probes)) for weights in (params, trial.params)]
    learning = trial.measured["accuracy"]
    return xr.Dataset(
        {
            "accuracy": ((), _share(right, by_distance & (tests.distance <= longest))),
            "accuracy_by_distance": (
                "distance",
                [_share(right, by_distance & (tests.distance // BIN == start // BIN)) for start in first],
            ),
            "accuracy_by_attractors": (
                ("attractor", "attractors"),
                [
                    [_share(right, (tests.kind == which) & (tests.attractors == n)) for n in range(MOST_ATTRACTORS + 1)]
                    for which in (1, 2)
                ],
            ),
            "log_retention": (("stage", "lag"), np.stack(retention).astype(np.float32)),
            "solved_update": ((), first_reached(trial.updates, learning >= SOLVED)),
            "failed_at": ((), trial.failed_at),
        }
    )


MEASURED = (
    "accuracy",
    "accuracy_by_distance",
    "accuracy_by_attractors",
    "log_retention",
    "solved_update",
    "failed_at",
)
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "accuracy": ("1", "verbs that agree, in fresh sentences of the distances trained on"),
    "accuracy_by_distance": ("1", f"verbs that agree, by distance from the subject: from this one, {BIN} together"),
    "accuracy_by_attractors": (
        "1",
        f"verbs that agree {ATTRACTOR_DISTANCE} words after the subject, by nouns between: all of the subject's "
        "number, or all of the other",
    ),
    "log_retention": (
        "nats",
        "log of ‖∂(y_were − y_was)/∂s‖ so many steps before the answer, over that at lag 0, mean over sentences; the "
        "last lag is the state that has just read the subject",
    ),
    "solved_update": ("updates", "first evaluation with 99 % right on 500 sentences; NaN for none"),
    "failed_at": ("updates", "first update that was not finite; −1 for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with medians and intervals over seeds."""
    summarise(dataset, MEASURED[:4], _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; trained networks are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    seeds = list(range(config.first_seed, config.first_seed + config.seeds))
    # one cell after the other, so that what one has compiled can go
    rows = [(cell, longest, seed) for cell in config.cells for longest in config.trained for seed in seeds]
    pieces = [
        Piece(
            f"{cell}-{longest}-seed-{seed}",
            f"{cell}, up to {longest} words, seed {seed}",
            functools.partial(_measure, cell, longest, seed, config),
        )
        for cell, longest, seed in rows
    ]
    measured = iter(command.measure(pieces, parts=parts, screen=screen))
    dataset = xr.concat(
        [
            xr.concat([xr.concat([next(measured) for _ in seeds], dim="seed") for _ in config.trained], dim="trained")
            for _ in config.cells
        ],
        dim="cell",
    ).assign_coords(
        cell=list(config.cells),
        trained=list(config.trained),
        seed=seeds,
        stage=list(STAGES),
        attractor=["same", "opposite"],
        attractors=np.arange(MOST_ATTRACTORS + 1),
        distance=_bins(config),
        lag=np.arange(config.probe_distance),
    )
    for name in ("accuracy", "accuracy_by_distance", "accuracy_by_attractors", "solved_update"):
        dataset[name] = dataset[name].astype(np.float32)
    dataset.attrs = command.provenance("agreement_distance", config, seconds=time.perf_counter() - started)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_NAMES = {
    "vanilla": "vanilla",
    "vanilla_orthogonal": "vanilla, orthogonal",
    "lstm": "LSTM",
    "gru": "GRU",
}


def _config(dataset: xr.Dataset) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(dataset.attrs["config"])
    return config


def _percent(row: xr.Dataset, name: str = "accuracy") -> str:
    median, low, high = (100 * float(row[f"{name}_{part}"]) for part in ("median", "low", "high"))
    return f"{median:.1f} [{low:.1f}, {high:.1f}]"


def _subject(dataset: xr.Dataset) -> xr.DataArray:
    """log of the retention at the subject."""
    return dataset["log_retention"].isel(lag=-1)


def _power(nats: Any) -> str:
    return f"10^{float(nats) / np.log(10):.1f}"


def _subject_interval(row: xr.Dataset, stage: str) -> str:
    parts = [row[f"log_retention_{part}"].sel(stage=stage).isel(lag=-1) for part in ("median", "low", "high")]
    median, low, high = (float(part) / np.log(10) for part in parts)
    return f"10^{median:.1f} [{low:.1f}, {high:.1f}]"


def _rows(dataset: xr.Dataset) -> list[tuple[str, int, xr.Dataset]]:
    return [
        (str(cell), int(longest), dataset.sel(cell=cell, trained=longest))
        for cell in dataset["cell"].values
        for longest in dataset["trained"].values
    ]


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = _config(dataset)
    shown = rich.table.Table(
        title=f"Was or were: N={config['hidden_size']}, {config['batch_size']} sentences an update, at most "
        f"{config['updates']:,} updates, {config['seeds']} seeds, {dataset.attrs['dtype']}, {dataset.attrs['backend']}",
        caption="verbs that agree in %: medians over seeds "
        f"[{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]; far: the longest distances tested; gradient "
        f"at the subject: of the answer {config['probe_distance']} words later, over that at lag 0",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("cell", "trained up to", "agree", "far", "solved", "updates", "gradient before", "after", "failed"):
        shown.add_column(name, justify="left" if name == "cell" else "right")
    for cell, longest, row in _rows(dataset):
        solved = row["solved_update"].values
        solved = solved[~np.isnan(solved)]
        shown.add_row(
            _NAMES[cell],
            f"{longest}",
            _percent(row),
            _percent(row.isel(distance=-1), "accuracy_by_distance"),
            f"{len(solved)} of {row.sizes['seed']}",
            f"{np.median(solved):,.0f}" if len(solved) else "—",
            *(_subject_interval(row, stage) for stage in STAGES),
            f"{int((row['failed_at'] >= 0).sum())}",
        )
    return shown


def _enough(dataset: xr.Dataset) -> bool:
    config = _config(dataset)
    return bool(config["updates"] >= ENOUGH_UPDATES and config["seeds"] >= ENOUGH_SEEDS)


def _learned(dataset: xr.Dataset) -> xr.DataArray:
    return dataset["accuracy"] >= SOLVED


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns a check of the claim per cell and distance trained on, then those of the predictions."""
    checks, enough = [], _enough(dataset)
    for cell, longest, row in _rows(dataset):
        interval = median_interval(row["accuracy"].values, axis=0)
        # judged by the side of the interval that speaks against the claim
        holds = bool(interval.high <= CHANCE if cell in FORGETS else interval.low >= SOLVED)
        checks.append(
            Check(
                f"{'forgets' if cell in FORGETS else 'keeps'}: {_NAMES[cell]}, up to {longest} words",
                f"{_percent(row)} % agree",
                f"≤ {CHANCE:.0%}" if cell in FORGETS else f"≥ {SOLVED:.0%}",
                holds if enough else None,
                "C2",
                WHY_CHANCE if cell in FORGETS else WHY_SOLVED,
            )
        )
    learned, num_seeds = _learned(dataset), dataset.sizes["seed"]
    expected = {20: ("every seed", num_seeds, num_seeds), 30: ("some seeds, not all", 1, num_seeds - 1)}
    for longest, (words, least, most) in expected.items():
        if "vanilla" in dataset["cell"].values and longest in dataset["trained"].values:
            found = int(learned.sel(cell="vanilla", trained=longest).sum())
            checks.append(
                Check(
                    f"prediction: vanilla learns up to {longest} words",
                    f"{found} of {num_seeds} seeds",
                    words,
                    least <= found <= most if enough else None,
                    "C2",
                    "first runs: N = 128, 3 seeds; 3 of 3 up to 20 words, 1 of 3 up to 30",
                    decides=False,
                )
            )
    keeps = _subject(dataset).sel(stage="trained") >= np.log(KEPT)
    agree = int((keeps == learned).sum())
    checks.append(
        Check(
            "prediction: a network agrees where, and only where, the gradient reaches the subject",
            f"{agree} of {learned.size} networks",
            f"all: at least {KEPT:g} of it is left there, or it does not agree",
            agree == learned.size if enough else None,
            "C2",
            "what was left at lag 0 has to say which weights let the number through; a hundredth is a guess",
            decides=False,
        )
    )
    failed = int((dataset["failed_at"] >= 0).sum())
    total = dataset["failed_at"].size
    checks.append(
        Check(
            "side condition: training stays finite",
            f"{failed} of {total} failed",
            "0",
            failed == 0,
            "C2",
            "what a failed network is tested with is its weights before the failure",
            decides=False,
        )
    )
    return checks


def _counts(dataset: xr.Dataset, cell: str) -> str:
    learned = _learned(dataset).sel(cell=cell).sum("seed")
    counts = [f"{int(n)} up to {int(longest)}" for n, longest in zip(learned, dataset["trained"].values, strict=True)]
    return f"{_NAMES[cell]} {', '.join(counts)}"


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    every = verdict(dataset)
    cells = [str(cell) for cell in dataset["cell"].values]
    sentence = (
        f"seeds of {dataset.sizes['seed']} with which the verb agrees in {SOLVED:.0%} of the sentences, by the "
        f"longest distance trained on: {'; '.join(_counts(dataset, cell) for cell in cells)}."
    )
    if not _enough(dataset):
        return {"C2": sentence + "  This run was too short to tell."}
    holding = [check.name.partition(": ")[2] for check in every if check.name.startswith("forgets") and check.holds]
    if any(cell in FORGETS for cell in cells):
        sentence += f"  It forgets, with every seed, as {'; '.join(holding)}." if holding else "  It never forgets."
    missed = [check.name.partition(": ")[2] for check in every if check.name.startswith("keeps") and not check.holds]
    if missed:
        sentence += f"  Not kept by {'; '.join(missed)}."
    learned, subject = _learned(dataset).values, _subject(dataset).sel(stage="trained").values
    lag = _config(dataset)["probe_distance"]
    medians = [
        f"{_power(np.median(subject[chosen]))} in the {chosen.sum()} networks that {word}"
        for chosen, word in ((learned, "agree"), (~learned, "do not"))
        if chosen.any()
    ]
    sentence += f"  Of the gradient at the verb, the subject {lag} words before gets {', and '.join(medians)} (median)."
    if learned.any():
        latched = int((learned & (subject < np.log(KEPT))).sum())
        sentence += (
            f"  The number is kept without the gradient: in {latched} of the {learned.sum()} that agree less than "
            f"{KEPT:g} of it is left there once they are trained."
        )
    return {"C2": sentence}


_STYLES = {
    "vanilla": {"color": "#c81e4a", "marker": "s"},
    "vanilla_orthogonal": {"color": "#d97706", "marker": "D"},
    "lstm": {"color": "#16325c", "marker": "o"},
    "gru": {"color": "#0e9f8e", "marker": "^"},
}
_SIZES = {"vanilla": 11, "vanilla_orthogonal": 8.5, "lstm": 6.5, "gru": 3.5}
"""Of the markers, so that those below others are seen."""


def _draw_distances(axes: Any, dataset: xr.Dataset, longest: int) -> None:
    at = dataset.sel(trained=longest)
    middle = at["distance"].values + (BIN - 1) / 2
    axes.axvspan(SHORTEST, longest, color="0.92", linewidth=0)
    for cell in at["cell"].values:
        style = _STYLES[str(cell)]
        row = 100 * at["accuracy_by_distance"].sel(cell=cell)
        for seed in row.transpose("seed", "distance").values:
            axes.plot(middle, seed, color=style["color"], alpha=0.3, linewidth=0.8)
        median = 100 * at["accuracy_by_distance_median"].sel(cell=cell).values
        axes.plot(middle, median, label=_NAMES[str(cell)], markersize=_SIZES[str(cell)], linewidth=2, **style)
    axes.axhline(50, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_ylim(-2, 105)
    axes.set_title(f"trained up to {longest} words", fontsize=11)
    axes.set_xlabel("words from subject to verb")


def _draw_attractors(axes: Any, dataset: xr.Dataset) -> None:
    for cell in dataset["cell"].values:
        style = _STYLES[str(cell)]
        for which, line in (("same", "--"), ("opposite", "-")):
            at = dataset.sel(cell=cell, attractor=which)
            median, low, high = (
                100 * at[f"accuracy_by_attractors_{part}"].values for part in ("median", "low", "high")
            )
            axes.plot(at["attractors"], median, linestyle=line, linewidth=1.8, markersize=_SIZES[str(cell)], **style)
            axes.fill_between(at["attractors"], low, high, color=style["color"], alpha=0.1, linewidth=0)
    for line, words in (("-", "all of the other number"), ("--", "all of the subject's number")):
        axes.plot([], [], color="0.3", linestyle=line, label=words)
    axes.set_xticks(dataset["attractors"])
    axes.set_ylim(0, 104)
    axes.legend(
        frameon=False, fontsize=9, loc="lower left", title="the nouns between are", title_fontsize=9, alignment="left"
    )
    axes.set_title(f"nouns between, at {ATTRACTOR_DISTANCE} words", fontsize=11)
    axes.set_xlabel("number of nouns between subject and verb")
    axes.set_ylabel("verbs that agree (%)")


def _draw_gradient(axes: Any, dataset: xr.Dataset) -> None:
    for cell in dataset["cell"].values:
        style = _STYLES[str(cell)]
        for stage, line in (("untrained", ":"), ("trained", "-")):
            at = dataset.sel(cell=cell, stage=stage)
            median, low, high = (at[f"log_retention_{part}"].values / np.log(10) for part in ("median", "low", "high"))
            axes.plot(at["lag"], median, color=style["color"], linestyle=line, linewidth=1.8)
            axes.fill_between(at["lag"], low, high, color=style["color"], alpha=0.12, linewidth=0)
    for line, words in (("-", "trained"), (":", "untrained")):
        axes.plot([], [], color="0.3", linestyle=line, label=words)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.set_title("gradient of the answer, back to the subject", fontsize=11)
    axes.set_xlabel("steps before the answer (the last: the subject)")
    axes.set_ylabel("log10 of ‖∂answer/∂s‖ over that at lag 0")


def _draw_networks(axes: Any, dataset: xr.Dataset) -> None:
    subject = _subject(dataset).sel(stage="trained") / np.log(10)
    for cell in dataset["cell"].values:
        style = _STYLES[str(cell)]
        axes.scatter(
            subject.sel(cell=cell).values.ravel(), 100 * dataset["accuracy"].sel(cell=cell).values.ravel(),
            color=style["color"], marker=style["marker"], alpha=0.7, s=28,
        )  # fmt: skip
    axes.axvline(np.log10(KEPT), color="0.4", linewidth=0.8, linestyle=":")
    axes.set_ylim(40, 105)
    axes.text(np.log10(KEPT), 72, " predicted:\n agree right of here", fontsize=9, color="0.3", va="center")
    axes.set_title("every trained network", fontsize=11)
    axes.set_xlabel("log10 of the gradient left at the subject")
    axes.set_ylabel("verbs that agree (%)")


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: agreement by distance, by nouns between, and the gradient that reaches the subject."""
    config, trained = _config(dataset), [int(longest) for longest in dataset["trained"].values]
    drawn = matplotlib.figure.Figure(figsize=(12.6, 8.2), layout="constrained")
    halves: Any = drawn.subfigures(2, 1)
    upper, lower = halves
    above = np.atleast_1d(upper.subplots(1, len(trained), sharey=True))
    for axes, longest in zip(above, trained, strict=True):
        _draw_distances(axes, dataset, longest)
    above[0].set_ylabel("verbs that agree (%)")
    below = lower.subplots(1, 3)
    last = dataset.sel(trained=trained[-1])
    _draw_attractors(below[0], last)
    _draw_gradient(below[1], last)
    _draw_networks(below[2], dataset)
    for axes in below[:2]:
        axes.set_title(f"{axes.get_title()}\n(trained up to {trained[-1]})", fontsize=11)
    for axes in (*above, *below):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = above[0].get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    drawn.suptitle(
        "Was or were: which cells still know the subject's number at the verb?\n"
        f"N={config['hidden_size']}, {config['seeds']} seeds: thin lines seeds, thick ones medians, bands 95 % "
        "intervals of them; grey: distances trained on; dotted: chance",
        fontsize=11,
    )
    return drawn


ABOUT = """Does a vanilla cell forget whether the cat was or the cats were, where LSTM and GRU keep it?

Trains the cells on sentences with the subject up to so many words before the verb; prints how many verbs agree, by
distance and by the nouns in between, and how much of the answer's gradient reaches the subject before and after
training; writes a figure and a netCDF file."""

CAPTION = """Above, verbs that agree against the distance of the subject, for networks trained up to three distances:
a line per seed and their median.  Below: agreement against the number of nouns in between; the gradient of the answer
from the verb back to the subject, untrained and trained; and, for every trained network, agreement against the
gradient left at the subject."""

EXPERIMENT = command.Experiment(
    name="agreement_distance",
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
