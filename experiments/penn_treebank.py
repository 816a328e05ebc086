"""On Penn Treebank, does the RNN's gradient fall as e^{−0.5t} and sit in the last 10 steps, and is the LSTM's even?

Trains word-level language models, a vanilla RNN, an LSTM by Torch's and by chrono initialisation and a GRU, by
truncated BPTT with the memory carried from window to window, and stops at several points of training, the first before
any update.  There it takes windows of held-out text and pulls the gradient of the last word's loss back through 150
steps, ‖∂L_T/∂s_k‖, beside the chain ‖∂h_T/∂h_k‖; at any size, by log-scaled cotangents.  It reports slopes by lag
window, the share of the last 10 of 100 steps, and the held-out perplexity.

Only the valid and test files of Penn Treebank are free to load by everybody: it trains on the first and measures on the
second, so perplexities do not compare with published ones.  The most frequent words are kept, the others are <unk>.
One learning rate serves all cells; with it each of them gets far below the perplexity of word frequencies alone.
Running time: ten minutes on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.lines
import numpy as np
import optax
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Interval,
    describe,
    interval_text,
    median_interval,
    summarise,
)
from experiments.trials import Trainer

_FUNCTIONS = (
    "rg.jacobian_chain",
    "rg.retention",
    "rg.decay_rate",
    "rg.logscaled.log_norm",
    "rg.training.train_step",
    "rg.tasks.streams",
    "rg.tasks.sequences",
    "rg.initializers.chrono",
)
_TESTS = ("tests/test_penn_treebank.py", "tests/test_chains.py", "tests/test_training.py", "tests/test_text.py")
CLAIMS = (
    Claim(
        "B9",
        "On Penn Treebank the RNN's gradient norm falls as e^{−0.5t}, the LSTM's as e^{−0.01t}.",
        source="stated in introductions to the LSTM beside a curve of gradient norms, without settings; the other "
        "figure of the same texts, 10^-2 over 100 steps, is −0.046 per step",
        prediction="the RNN of Torch's initialisation near −0.5 (within 0.1) before training, the LSTM −0.1 to −0.3",
        refuted="at no point of training and over no range of lags is the slope −0.5 ± 0.1 (RNN) or −0.01 ± 0.005 "
        "(LSTM)",
        functions=_FUNCTIONS,
        tests=_TESTS,
    ),
    Claim(
        "B10",
        "The RNN's gradient sits in the last 10 steps, the LSTM's is even over 100 steps and more.",
        source="stated in introductions to the LSTM beside the same curve",
        prediction="the RNN's share of the last 10 of 100 steps is above 0.9; near-even (0.1) only with chrono",
        refuted="a share below 0.9 for the RNN, or above 0.2 for the LSTM, where an even gradient has 0.1",
        functions=_FUNCTIONS,
        tests=_TESTS,
    ),
)

RowName = Literal["vanilla", "lstm", "lstm-chrono", "gru"]
NAMES = {"vanilla": "vanilla RNN", "lstm": "LSTM", "lstm-chrono": "LSTM, chrono", "gru": "GRU"}
QUANTITIES = ("loss", "chain")
"""∂L_T/∂s_k over the whole state, and ∂h_T/∂h_k."""
EDGES = (1, 10, 50)
"""First lags of the windows over which slopes are fitted; the last window ends at the longest lag.  The gradient enters
an LSTM's memory at lag 1."""
LAST_STEPS, ALL_STEPS = 10, 100
LAGS = 150
"""Lags that the claims are judged on."""
UNKNOWN = "<unk>"
RNN_SLOPE, LSTM_SLOPE = (-0.6, -0.4), (-0.015, -0.005)
RNN_SHARE, LSTM_SHARE = 0.9, 0.2
PREDICTED = {"vanilla": (-0.6, -0.4), "lstm": (-0.3, -0.1)}
"""Slopes over lags 10–50 before training, from first runs on other inputs."""
WHY_RNN_SLOPE = "the claim's one digit with a fifth of it to either side"
WHY_LSTM_SLOPE = "the claim's one digit with half of it to either side: factors of 0.22 to 0.6 over 100 steps"
WHY_RNN_SHARE = "“sits in”: nine tenths; e^{−0.5t} would put 0.993 there"
WHY_LSTM_SHARE = "an even gradient has 0.1 in 10 of 100 steps, e^{−0.01t} 0.15: twice the even share is the room"
WHY_PREDICTED = "first runs on other inputs: −0.5 ± 0.1, and −0.1 to −0.3"
WHY_LEARNED = "word frequencies alone: a model that stays above them has learned nothing that needs a memory"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the language models and of what is measured on them."""

    text: str = "ptb"
    """ptb (trains on its valid file, measures on its test file), pydoc, tinyshakespeare, or a path to a UTF-8 file, of
    which the last tenth is held out."""
    data_dir: Path | None = None
    """Folder with ptb/ and tinyshakespeare/; else RNNGRAD_DATA, else downloaded to a cache."""
    rows: tuple[RowName, ...] = ("vanilla", "lstm", "lstm-chrono", "gru")
    """Cells, by Torch's initialisation; lstm-chrono with gate biases for memories of up to the longest lag."""
    num_words: int = 2_000
    """Words that the vocabulary keeps, the most frequent ones, <unk> among them."""
    hidden_size: int = 64
    """Units N, and width of the embedding."""
    bptt_steps: int = 35
    """Steps of a training window; gradients are cut there, the memory is carried on."""
    batch_size: int = 20
    """Streams B side by side."""
    learning_rate: float = 2e-3
    """Of Adam."""
    clip: float = 1.0
    """Largest global norm of the gradient of the mean loss per token."""
    checkpoints: tuple[int, ...] = (0, 100, 400, 2_000)
    """Updates after which the gradient is measured, rising from 0; the last one ends the training."""
    eval_every: int = 100
    """Updates between evaluations on held-out text."""
    eval_windows: int = 20
    """Windows of B streams of held-out text that an evaluation reads."""
    lags: int = LAGS
    """Steps that the gradient is followed back."""
    transient: int = 50
    """Words read before these, so that the memory is that of running text."""
    sequences: int = 16
    """Windows of held-out text on which the gradient is measured."""
    seeds: int = 5
    """Independent repetitions: weights, and places of the windows."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    text="pydoc",
    rows=("lstm-chrono",),
    num_words=100,
    hidden_size=8,
    bptt_steps=10,
    batch_size=4,
    checkpoints=(0, 4, 8),
    eval_every=4,
    eval_windows=2,
    lags=40,
    transient=5,
    sequences=2,
    seeds=2,
)
"""A few seconds: every code path, no statement about the claims."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {
        "num_words": 2, "hidden_size": 1, "bptt_steps": 1, "batch_size": 1, "eval_every": 1, "eval_windows": 1,
        "lags": 12, "transient": 0, "sequences": 1, "seeds": 1, "first_seed": 0,
    }  # fmt: skip
    command.check_at_least(config, least)
    for name in ("learning_rate", "clip"):
        value = getattr(config, name)
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, found {value}")
    if not config.rows or len(set(config.rows)) != len(config.rows):
        raise UserError(f"--rows: expected one or more names, each once, found {' '.join(config.rows) or 'none'}")
    points = config.checkpoints
    if (
        len(points) < 2
        or points[0] != 0
        or list(points) != sorted(set(points))
        or any(point % config.eval_every for point in points)
    ):
        raise UserError(
            f"--checkpoints: expected 0 and then multiples of eval_every = {config.eval_every}, rising, found {points}"
        )


def lag_windows(lags: int) -> list[tuple[int, int]]:
    """Returns the lag windows over which slopes are fitted.

    >>> lag_windows(150)
    [(1, 10), (10, 50), (50, 150)]
    """
    edges = [edge for edge in EDGES if edge < lags] + [lags]
    return list(itertools.pairwise(edges))


class _Texts(NamedTuple):
    """Training and held-out text as ids of one limited vocabulary."""

    train: np.ndarray
    held_out: rg.tasks.Tokens
    digests: tuple[str, ...]
    """SHA-256 of each file."""
    name: str
    num_words: int
    """Words kept: fewer than asked for where the text has fewer."""
    unknown_share: float
    """Of the held-out words, <unk> of the text itself included."""


def _read_texts(config: Config) -> _Texts:
    """Returns the texts.  Of Penn Treebank always the files that are free to load, whatever else is at hand."""
    load = functools.partial(rg.tasks.load_text, data_dir=config.data_dir)
    if config.text == "ptb":
        texts = [load("ptb:valid"), load("ptb:test")]
        first = rg.tasks.tokenize(texts[0])
        parts = [first.ids, rg.tasks.encode(texts[1], first.vocabulary).ids]
        name, words = "Penn Treebank, valid file", first.vocabulary
    else:
        texts = [load(config.text)]
        whole = rg.tasks.tokenize(texts[0])
        parts = [part.ids for part in rg.tasks.split(whole)]
        name, words = texts[0].source, whole.vocabulary
    # ids run from the most frequent word on: what is cut off is the tail
    size = min(config.num_words, len(words))
    kept = words[:size]
    unknown = kept.index(UNKNOWN) if UNKNOWN in kept else size - 1
    if size < len(words) and UNKNOWN not in kept:
        kept = (*kept[:-1], UNKNOWN)
    train, held_out = (np.where(part < size, part, unknown).astype(np.int32) for part in parts)
    share = float(np.mean(held_out == unknown)) if UNKNOWN in kept else 0.0
    digests = tuple(text.digest for text in texts)
    return _Texts(train, rg.tasks.Tokens(held_out, kept, "word"), digests, name, size, share)


def _build(row: str, config: Config, num_words: int) -> rg.training.Model:
    """Returns the language model of a row."""
    kind = row.partition("-")[0]
    options: dict[str, Any] = {"forget_bias": rg.initializers.chrono(config.lags)} if row.endswith("chrono") else {}
    cell = getattr(rg.cells, kind)(config.hidden_size, config.hidden_size, **options)
    return rg.training.model([cell], num_words, vocabulary_size=num_words)


def _loss(output: Any, batch: Any) -> Any:
    return rg.losses.cross_entropy(output.outputs, batch.targets)


def _trainer(kind: str, config: Config, texts: _Texts) -> tuple[rg.training.Model, Trainer]:
    """Returns the model and the trainer that all rows and seeds of one kind of cell share."""
    net = _build(kind, config, texts.num_words)
    windows = rg.tasks.streams(texts.train, config.batch_size, config.bptt_steps)
    held_out = rg.tasks.streams(texts.held_out.ids, config.batch_size, config.bptt_steps)

    def measure(params, key):
        def one(memory, index):
            batch = held_out.batch(index)
            output = net.apply(params, memory, batch.inputs)
            return output.final, _loss(output, batch)

        steps = jnp.arange(min(config.eval_windows, held_out.num_windows))
        _, losses = jax.lax.scan(one, net.init_state((config.batch_size,)), steps)
        return {"held_out_loss": jnp.mean(losses)}

    optimizer = optax.chain(rg.remedies.clip_by_global_norm(config.clip), optax.adam(config.learning_rate))
    trainer = Trainer(
        net, _loss, optimizer, lambda key, step: windows.batch(step), measure,
        batch_size=config.batch_size, restart_at=windows.restarts,
    )  # fmt: skip
    return net, trainer


@functools.partial(jax.jit, static_argnames=("net", "transient"))
def _gradients(net, params, ids, *, transient):
    """The gradient of the last word's loss by lag, relative to lag 0, and the chain of h, for each window of ids."""
    (cell,), (cell_params,) = net.layers, params.layers
    linear = rg.readout(params.readout.w.shape[1], params.readout.w.shape[0])

    def one(window):
        xs = params.embedding[window[:-1]]
        state = rg.unroll(cell, cell_params, cell.init_state(), xs[:transient]).final
        xs = xs[transient:]
        final = rg.unroll(cell, cell_params, state, xs).final

        def loss(state):
            logits = linear.apply(params.readout, cell.read(cell_params, state))
            return -jax.nn.log_softmax(logits)[window[-1]]

        cotangents = rg.jacobian_chain(
            cell, cell_params, state, xs, cotangent=jax.grad(loss)(final), reduce=rg.logscaled.log_norm
        )
        by_lag = jnp.flip(cotangents)
        chain = rg.retention(cell, cell_params, state, xs, of="h", wrt="h")
        curves = jnp.stack([by_lag - by_lag[0], chain.log_norm])
        slope = jax.vmap(rg.decay_rate, in_axes=(0, None))
        lags = xs.shape[0]
        slopes = jnp.stack([slope(curves, window) for window in lag_windows(lags)], axis=-1)
        newest, all_of_them = (jax.nn.logsumexp(curves[0, : min(steps, lags)]) for steps in (LAST_STEPS, ALL_STEPS))
        return {
            "log_norm": curves,
            "slope": slopes,
            "share": jnp.exp(newest - all_of_them),
            "nonfinite_step": chain.nonfinite_step,
        }

    # one window after the other: batched, a chain takes three pulls for every one it needs
    return jax.lax.map(one, ids)


_DIMS = {
    "log_norm": ("quantity", "lag"),
    "slope": ("quantity", "window"),
    "share": (),
    "nonfinite_step": (),
}


def _measure_trial(row: str, seed: int, config: Config, texts: _Texts, trainers: dict[str, Any]) -> xr.Dataset:
    """Returns the dataset of one trained network: its history, and the gradient at every checkpoint it reached."""
    kind = row.partition("-")[0]
    if kind not in trainers:
        trainers[kind] = _trainer(kind, config, texts)
    net, trainer = trainers[kind]
    key_params, key_trial = jax.random.split(jax.random.key(seed))
    trial = trainer.run(
        key_trial,
        updates=config.checkpoints[-1],
        eval_every=config.eval_every,
        params=_build(row, config, texts.num_words).init(key_params),
        keep_snapshots=True,
    )
    length = config.transient + config.lags
    ids = jnp.asarray(rg.tasks.sequences(texts.held_out, length, config.sequences, seed))
    measured = []
    for point in config.checkpoints:
        index = point // config.eval_every
        if index < len(trial.snapshots):
            found = _gradients(net, trial.snapshots[index], ids, transient=config.transient)
            measured.append(jax.tree.map(np.asarray, found))
        else:
            # a network that failed before has no gradient there
            measured.append({name: np.full_like(value, -1 if value.dtype.kind == "i" else np.nan) for name, value in
                             measured[0].items()})  # fmt: skip
    stacked = {name: np.stack([m[name] for m in measured]) for name in _DIMS}
    # the curve of a typical window: the mean of the logarithm, which one steep window does not decide
    stacked["log_norm"] = stacked["log_norm"].mean(axis=1)
    dims = {**_DIMS, **{name: ("sequence", *_DIMS[name]) for name in _DIMS if name != "log_norm"}}
    dataset = xr.Dataset({name: (("checkpoint", *dims[name]), stacked[name]) for name in _DIMS})
    dataset["nonfinite_step"] = dataset["nonfinite_step"].astype(np.int16)
    dataset["held_out_loss"] = ("evaluation", trial.measured["held_out_loss"].astype(np.float32))
    dataset["train_loss"] = ("evaluation", trial.train_loss.astype(np.float32))
    dataset["clip_fraction"] = ("evaluation", trial.clip_fraction.astype(np.float32))
    dataset["failed_at"] = ((), np.int32(trial.failed_at))
    return dataset


def _unigram_loss(config: Config, texts: _Texts) -> float:
    """Returns the loss of word frequencies, each count one more, on the held-out words that an evaluation reads."""
    held_out = rg.tasks.streams(texts.held_out.ids, config.batch_size, config.bptt_steps)
    read = range(min(config.eval_windows, held_out.num_windows))
    targets = np.concatenate([np.asarray(held_out.batch(index).targets).ravel() for index in read])
    counts = np.bincount(texts.train, minlength=texts.num_words) + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[targets]))


MEASURED = (
    "log_norm", "slope", "share", "nonfinite_step", "held_out_loss", "train_loss", "clip_fraction", "failed_at",
)  # fmt: skip
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "log_norm": ("nats", "log of ‖∂L_T/∂s_{T−lag}‖, and of ‖∂h_T/∂h_{T−lag}‖_F, over lag 0; mean over windows of text"),
    "slope": ("nats per step", "least-squares slope of the same over a lag window, by window of text"),
    "share": ("1", f"share of the last {LAST_STEPS} states in Σ ‖∂L_T/∂s_k‖ over the last {ALL_STEPS}"),
    "nonfinite_step": ("steps", "first step with a non-finite state or chain; −1 for none"),
    "held_out_loss": ("nats per word", "loss on held-out text"),
    "train_loss": ("nats per word", "mean training loss since the evaluation before"),
    "clip_fraction": ("1", "share of the updates that were clipped since then"),
    "failed_at": ("updates", "update whose loss, gradient or weights were not finite; −1 for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with medians and intervals over seeds."""
    summarise(dataset, ("log_norm", "held_out_loss"), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished trials are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings or a text that cannot be used.
      OSError: no such text, or a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    with command.user_input():
        texts = _read_texts(config)
        # too short a text is said here, in one line, before anything is trained
        for ids in (texts.train, texts.held_out.ids):
            rg.tasks.streams(ids, config.batch_size, config.bptt_steps)
        rg.tasks.sequences(texts.held_out, config.transient + config.lags, config.sequences, 0)
    trainers: dict[str, Any] = {}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    short = "-".join(digest[:12] for digest in texts.digests)
    pieces = [
        Piece(
            f"{row}-seed-{seed}-{short}",
            f"{NAMES[row]}, seed {seed}",
            functools.partial(_measure_trial, row, seed, config, texts, trainers),
        )
        for row in config.rows
        for seed in seeds
    ]
    measured = command.measure(pieces, parts=parts, screen=screen)
    by_row = [
        xr.concat(measured[start : start + config.seeds], dim="seed") for start in range(0, len(measured), config.seeds)
    ]
    dataset = xr.concat(by_row, dim="row").assign_coords(
        row=list(config.rows),
        seed=list(seeds),
        checkpoint=list(config.checkpoints),
        evaluation=np.arange(0, config.checkpoints[-1] + 1, config.eval_every),
        quantity=list(QUANTITIES),
        window=[f"{first}–{last}" for first, last in lag_windows(config.lags)],
        lag=np.arange(config.lags + 1),
    )
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance(
        "penn_treebank",
        dataclasses.replace(config, text=config.text if "/" not in config.text else Path(config.text).name),
        seconds=seconds,
        text=texts.name,
        text_sha256=" ".join(texts.digests),
        num_words=texts.num_words,
        unknown_share=round(texts.unknown_share, 4),
        unigram_loss=_unigram_loss(config, texts),
    )
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _can_tell(dataset: xr.Dataset) -> bool:
    """The claims are about Penn Treebank, 100 steps and more, and five seeds are the least for an interval."""
    config = json.loads(dataset.attrs["config"])
    return config["text"] == "ptb" and config["lags"] >= LAGS and config["seeds"] >= 5


@functools.cache
def _draws(seeds: int, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.integers(seeds, size=(NUM_RESAMPLES, seeds, 1)),
        rng.integers(sequences, size=(NUM_RESAMPLES, seeds, sequences)),
    )


def interval_over(values: xr.DataArray) -> Interval:
    """Returns the median over seeds of the mean over windows of text, with a bootstrap interval over both.

    Seeds are drawn with replacement, then windows within each.  Seeds without a number are left out.
    """
    by_seed = values.transpose("seed", "sequence").values
    by_seed = by_seed[np.isfinite(by_seed).all(axis=1)]
    if not len(by_seed):
        return Interval(*(np.asarray(np.nan),) * 3)
    drawn = np.median(by_seed[_draws(*by_seed.shape)].mean(axis=-1), axis=-1)
    tail = 50 * (1 - CONFIDENCE)
    return Interval(np.median(by_seed.mean(axis=-1)), *np.percentile(drawn, [tail, 100 - tail]))


def _words(interval: Interval, digits: int) -> str:
    return interval_text(interval, f".{digits}f", nothing="no number")


def _at(checkpoint: int) -> str:
    return "before training" if checkpoint == 0 else f"after {checkpoint:,} updates"


def _perplexity(dataset: xr.Dataset, row: str, checkpoint: int) -> str:
    losses = dataset["held_out_loss"].sel(row=row, evaluation=checkpoint)
    found = median_interval(np.exp(losses.values), axis=0)
    return _words(found, 0)


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    attrs, config = dataset.attrs, json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"∂L_T/∂s_k on held-out text, trained on {attrs['text']}: {attrs['num_words']} words, "
        f"N={config['hidden_size']}, "
        f"{config['lags']} lags, {config['seeds']} seeds × {config['sequences']} windows, {attrs['dtype']}, "
        f"matmul {attrs['matmul_precision']}, {attrs['backend']}",
        caption=f"medians over seeds [{100 * attrs['confidence']:.0f} % bootstrap interval over seeds and windows]; "
        f"slopes in nats per step by range of lags; share: of the last {LAST_STEPS} of "
        f"{min(ALL_STEPS, config['lags'])} steps; "
        f"word frequencies alone have perplexity {np.exp(attrs['unigram_loss']):.0f}",
        title_justify="left",
        caption_justify="left",
    )
    windows = dataset["window"].values.tolist()
    for name in ("cell", "updates", *(f"slope, lags {w}" for w in windows), "share", "perplexity", "failed"):
        shown.add_column(name, justify="left" if name == "cell" else "right")
    for row in dataset["row"].values.tolist():
        for checkpoint in dataset["checkpoint"].values.tolist():
            at = dataset.sel(row=row, checkpoint=checkpoint)
            failed = int(((at["failed_at"] >= 0) & (at["failed_at"] <= checkpoint)).sum())
            cells = (
                NAMES[row] if checkpoint == 0 else "",
                f"{checkpoint:,}",
                *(_words(interval_over(at["slope"].sel(quantity="loss", window=w)), 3) for w in windows),
                _words(interval_over(at["share"]), 2),
                _perplexity(dataset, row, checkpoint),
                f"{failed} of {at.sizes['seed']}",
            )
            # the interval under its median: the table then fits a terminal of ordinary width
            shown.add_row(*(text.replace(" [", "\n[") for text in cells))
    return shown


def _inside(interval: Interval, low: float, high: float) -> bool | None:
    """Whether the whole interval lies within the bounds; None where there is no number."""
    return None if np.isnan(interval.median) else bool(low <= interval.low and interval.high <= high)


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks: slopes by cell, checkpoint and lag window, shares by cell and checkpoint, predictions."""
    told = _can_tell(dataset)
    checks = []

    def add(
        claim: str,
        name: str,
        interval: Interval,
        digits: int,
        bounds: tuple[float, float],
        why: str,
        decides: bool = True,
    ) -> None:
        low, high = bounds
        bound = f"≥ {low:g}" if high >= 1 else f"≤ {high:g}" if low == 0 else f"{low:g} to {high:g}"
        holds = _inside(interval, low, high) if told else None
        checks.append(Check(name, _words(interval, digits), bound, holds, claim, why, decides))

    rows, points = dataset["row"].values.tolist(), dataset["checkpoint"].values.tolist()
    slopes = {"vanilla": (RNN_SLOPE, WHY_RNN_SLOPE)}
    slopes |= dict.fromkeys(("lstm", "lstm-chrono"), (LSTM_SLOPE, WHY_LSTM_SLOPE))
    shares: dict[str, tuple[tuple[float, float], str]] = {"vanilla": ((RNN_SHARE, 1.0), WHY_RNN_SHARE)}
    shares |= dict.fromkeys(("lstm", "lstm-chrono"), ((0.0, LSTM_SHARE), WHY_LSTM_SHARE))
    for row in [row for row in rows if row in slopes]:
        bounds, why = slopes[row]
        for checkpoint in points:
            for window in dataset["window"].values.tolist():
                found = interval_over(
                    dataset["slope"].sel(row=row, checkpoint=checkpoint, window=window, quantity="loss")
                )
                add("B9", f"slope, {NAMES[row]}, {_at(checkpoint)}, lags {window}", found, 3, bounds, why)
    for row in [row for row in rows if row in shares]:
        bounds, why = shares[row]
        for checkpoint in points:
            found = interval_over(dataset["share"].sel(row=row, checkpoint=checkpoint))
            add("B10", f"share, {NAMES[row]}, {_at(checkpoint)}", found, 2, bounds, why)
    for row, bounds in PREDICTED.items():
        if row in rows and "10–50" in dataset["window"].values:
            found = interval_over(dataset["slope"].sel(row=row, checkpoint=0, window="10–50", quantity="loss"))
            name = f"prediction: slope, {NAMES[row]}, before training, lags 10–50"
            add("B9", name, found, 3, bounds, WHY_PREDICTED, decides=False)
    for row in rows:
        losses = dataset["held_out_loss"].sel(row=row).isel(evaluation=-1).values
        perplexity = median_interval(np.exp(losses), axis=0)
        limit = float(np.exp(dataset.attrs["unigram_loss"]))
        below = None if not told or np.isnan(perplexity.median) else bool(perplexity.high < limit)
        name = f"learned: held-out perplexity, {NAMES[row]}"
        checks.append(Check(name, _words(perplexity, 0), f"< {limit:.0f}", below, "B9", WHY_LEARNED, decides=False))
    return checks


def _judged(checks: list[Check], kind: str, row: str) -> list[tuple[str, Check]]:
    """The checks that decide about one cell, each with its place: "before training, lags 1–10"."""
    start = f"{kind}, {NAMES[row]}, "
    mine = [
        (check.name.removeprefix(start), check) for check in checks if check.decides and check.name.startswith(start)
    ]
    # the name of one LSTM begins that of another
    return [(place, check) for place, check in mine if place.startswith(("before", "after"))]


def _where(checks: list[Check], kind: str, row: str) -> str:
    """Where the checks of one cell hold, in words."""
    mine = _judged(checks, kind, row)
    if all(check.holds is None for _, check in mine):
        return "not judged"
    holding = [(place, check) for place, check in mine if check.holds]
    if not holding:
        return "nowhere"
    if len(holding) == len(mine):
        return "everywhere"
    words = []
    for point in dict.fromkeys(place.partition(", lags")[0] for place, _ in holding):
        here = [(place, check) for place, check in mine if place.partition(", lags")[0] == point]
        found = [(place.partition(", ")[2], check.value) for place, check in here if check.holds]
        values = ", ".join(f"{value} over {lags}" if lags else value for lags, value in found)
        words.append(f"{point}{', all lags' if len(here) == len(found) > 1 else ''} ({values})")
    return "; ".join(words)


def _together(checks: list[Check], kind: str, rows: list[str]) -> str:
    """Whether the claim on the RNN and that on an LSTM hold at the same point of training, in words."""
    points = {
        row: {place.partition(", lags")[0] for place, check in _judged(checks, kind, row) if check.holds}
        for row in rows
    }
    if "vanilla" not in rows or not any(check.holds is not None for check in checks):
        return ""
    lstm = set[str]().union(*(found for row, found in points.items() if row != "vanilla"))
    # in the order of training
    both = [place for place in dict.fromkeys(p.partition(", lags")[0] for p, _ in _judged(checks, kind, "vanilla"))
            if place in points["vanilla"] & lstm]  # fmt: skip
    if not both:
        return "  At no point of training are both found."
    return f"  Both are found at the same point of training: {'; '.join(both)}."


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the findings in a few sentences each."""
    every = verdict(dataset)
    rows, points = dataset["row"].values.tolist(), dataset["checkpoint"].values.tolist()
    window = dataset["window"].values.tolist()[min(1, dataset.sizes["window"] - 1)]
    slopes, shares, where_slope, where_share = [], [], [], []
    rows = [row for row in rows if row in ("vanilla", "lstm", "lstm-chrono")]
    for row in rows:
        name = NAMES[row]
        first, last = (
            interval_over(dataset["slope"].sel(row=row, checkpoint=point, window=window, quantity="loss"))
            for point in (points[0], points[-1])
        )
        slopes.append(f"{name} {_words(first, 3)} and {_words(last, 3)}")
        first, last = (interval_over(dataset["share"].sel(row=row, checkpoint=p)) for p in (points[0], points[-1]))
        shares.append(f"{name} {_words(first, 2)} and {_words(last, 2)}")
        low, high = RNN_SLOPE if row == "vanilla" else LSTM_SLOPE
        where_slope.append(f"{name}, {low:g} to {high:g}: {_where(every, 'slope', row)}")
        bound = f"at least {RNN_SHARE:g}" if row == "vanilla" else f"at most {LSTM_SHARE:g}"
        where_share.append(f"{name}, {bound}: {_where(every, 'share', row)}")
    return {
        "B9": f"slopes in nats per step over lags {window}, before and after training: {'; '.join(slopes)}.  "
        f"The claim's slopes are found as follows.  {'.  '.join(where_slope)}." + _together(every, "slope", rows),
        "B10": f"share of the last {LAST_STEPS} of {min(ALL_STEPS, dataset.sizes['lag'] - 1)} steps, before and after "
        f"training: {'; '.join(shares)}.  The claim's shares are found as follows.  {'.  '.join(where_share)}."
        + _together(every, "share", rows),
    }


_COLOURS = ("#9aa5b1", "#d97706", "#0f8b8d", "#16325c")
"""By checkpoint, from the first to the last; more than four repeat."""
_MARKERS = ("o", "s", "^", "D")


def _style(dataset: xr.Dataset, checkpoint: int) -> tuple[str, str]:
    points = dataset["checkpoint"].values.tolist()
    # the last checkpoint has the last colour, however many there are
    index = len(_COLOURS) - 1 if checkpoint == points[-1] else points.index(checkpoint) % (len(_COLOURS) - 1)
    return _COLOURS[index], _MARKERS[index]


def _title(dataset: xr.Dataset) -> str:
    config = json.loads(dataset.attrs["config"])
    return (
        f"trained on {dataset.attrs['text']}, N={config['hidden_size']}; held-out text, {config['seeds']} seeds × "
        f"{config['sequences']} windows: median and its 95 % interval"
    )


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the curves: log gradient against lag, a panel per cell, with fits and the claimed slopes."""
    rows = dataset["row"].values.tolist()
    drawn = matplotlib.figure.Figure(figsize=(1.2 + 3.3 * len(rows), 5.2), layout="constrained")
    panels = drawn.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    lags = dataset["lag"].values
    curves = dataset.sel(quantity="loss")
    lowest = min(0.0, float(np.nanmin(curves["log_norm_low"].values)))
    # a steep curve leaves the picture rather than flatten all others
    bottom = max(1.08 * lowest, -80.0)
    for axes, row in zip(panels, rows, strict=True):
        for checkpoint in dataset["checkpoint"].values.tolist():
            at = curves.sel(row=row, checkpoint=checkpoint)
            colour, _ = _style(dataset, checkpoint)
            median, low, high = (at[f"log_norm_{part}"].values for part in ("median", "low", "high"))
            axes.plot(lags, median, color=colour, linewidth=2, zorder=3)
            axes.fill_between(lags, low, high, color=colour, alpha=0.15, linewidth=0)
            for window in dataset["window"].values.tolist():
                first, last = map(int, window.split("–"))
                slope = float(interval_over(at["slope"].sel(window=window)).median)
                centre, middle = 0.5 * (first + last), float(np.mean(median[first : last + 1]))
                ends = np.array([first, last])
                axes.plot(
                    ends, middle + slope * (ends - centre), color="black", linewidth=0.9, linestyle="--", zorder=4
                )
        for slope, text in ((-0.5, "$e^{-0.5t}$"), (-0.01, "$e^{-0.01t}$")):
            axes.plot(lags, slope * lags, color="#c81e4a", linewidth=1.2, linestyle=":", zorder=2)
            if axes is panels[0]:
                at_lag = min(0.75 * lags[-1], 0.7 * bottom / slope)
                place: dict[str, Any] = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 11}
                axes.annotate(text, (at_lag, slope * at_lag), color="#c81e4a", **place)
        axes.set_title(NAMES[row], fontsize=12, fontweight="bold")
        axes.set_xlabel("lag T − k (words)")
        axes.set_xlim(0, lags[-1])
        axes.set_ylim(bottom, max(2.0, 0.06 * -bottom))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("log ‖∂L_T/∂s_k‖, relative to k = T (nats)")
    line = matplotlib.lines.Line2D
    handles = [
        line([], [], color=_style(dataset, c)[0], linewidth=2, label=_at(c))
        for c in dataset["checkpoint"].values.tolist()
    ]
    handles += [
        line([], [], color="black", linewidth=0.9, linestyle="--", label="fits by range of lags"),
        line([], [], color="#c81e4a", linewidth=1.2, linestyle=":", label="slopes of the claim, −0.01 and −0.5"),
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    drawn.suptitle(f"How the gradient of a word's loss fades with the lag\n{_title(dataset)}", fontsize=11)
    return drawn


def slopes(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the slopes by lag window and checkpoint, of the loss gradient and of the chain of h."""
    rows, windows = dataset["row"].values.tolist(), dataset["window"].values.tolist()
    points = dataset["checkpoint"].values.tolist()
    drawn = matplotlib.figure.Figure(figsize=(1.2 + 3.1 * len(rows), 6.4), layout="constrained")
    grid = drawn.subplots(len(QUANTITIES), len(rows), squeeze=False, sharey="col", sharex=True)
    for line_of, quantity, label in zip(grid, QUANTITIES, ("∂L_T/∂s_k", "∂h_T/∂h_k"), strict=True):
        for axes, row in zip(line_of, rows, strict=True):
            if row == "vanilla":
                axes.axhspan(*RNN_SLOPE, color="#c81e4a", alpha=0.15, linewidth=0)
            elif row.startswith("lstm"):
                axes.axhspan(*LSTM_SLOPE, color="#c81e4a", alpha=0.3, linewidth=0)
            for offset, point in zip(np.linspace(-0.24, 0.24, len(points)), points, strict=True):
                at = dataset["slope"].sel(row=row, checkpoint=point, quantity=quantity)
                colour, marker = _style(dataset, point)
                found = [interval_over(at.sel(window=window)) for window in windows]
                median, low, high = (np.array([float(i[part]) for i in found]) for part in range(3))
                where = np.arange(len(windows)) + offset
                axes.errorbar(where, median, [median - low, high - median], color=colour, marker=marker, linestyle="",
                              markersize=6, capsize=3)  # fmt: skip
            axes.axhline(0, color="0.5", linewidth=0.8)
            axes.set_xticks(range(len(windows)), windows)
            axes.grid(alpha=0.25, linewidth=0.6, axis="y")
            axes.spines[["top", "right"]].set_visible(False)
        line_of[0].set_ylabel(f"slope of log ‖{label}‖\n(nats per step)")
    for axes, row in zip(grid[0], rows, strict=True):
        axes.set_title(NAMES[row], fontsize=12, fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("range of lags (words)")
    line = matplotlib.lines.Line2D
    handles: list[Any] = []
    for point in points:
        colour, marker = _style(dataset, point)
        handles.append(line([], [], color=colour, marker=marker, linestyle="", markersize=7, label=_at(point)))
    handles.append(line([], [], color="#c81e4a", alpha=0.3, linewidth=9, label="what the claim allows"))
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    drawn.suptitle(f"Slope of the gradient by range of lags and by training\n{_title(dataset)}", fontsize=11)
    return drawn


def shares(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the share of the last steps by cell and checkpoint, beside what training did to the perplexity."""
    rows, points = dataset["row"].values.tolist(), dataset["checkpoint"].values.tolist()
    all_steps = min(ALL_STEPS, dataset.sizes["lag"] - 1)
    drawn = matplotlib.figure.Figure(figsize=(11.0, 4.8), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1.25, 1))
    for offset, point in zip(np.linspace(-0.24, 0.24, len(points)), points, strict=True):
        colour, marker = _style(dataset, point)
        found = [interval_over(dataset["share"].sel(row=row, checkpoint=point)) for row in rows]
        median, low, high = (np.array([float(i[part]) for i in found]) for part in range(3))
        left.errorbar(np.arange(len(rows)) + offset, median, yerr=[median - low, high - median], color=colour,
                      marker=marker, linestyle="", markersize=7, capsize=3, label=_at(point))  # fmt: skip
    even = LAST_STEPS / all_steps
    left.axhline(even, color="0.35", linewidth=1.2, linestyle="--", label=f"even over {all_steps} steps")
    for index, row in enumerate(rows):
        if row == "vanilla" or row.startswith("lstm"):
            allowed = (RNN_SHARE, 1.0) if row == "vanilla" else (0.0, LSTM_SHARE)
            left.fill_between([index - 0.4, index + 0.4], *allowed, color="#c81e4a", alpha=0.13, linewidth=0,
                              label="what the claim allows" if index == 0 else None)  # fmt: skip
    left.set_xticks(range(len(rows)), [NAMES[row] for row in rows])
    left.set_ylim(0, 1.03)
    left.set_ylabel(f"share of Σ ‖∂L_T/∂s_k‖ in the last {LAST_STEPS}")
    left.set_title(f"where the gradient of {all_steps} steps sits", fontsize=11)
    styles = {
        "vanilla": ("#c81e4a", "-"),
        "lstm": ("#16325c", "-"),
        "lstm-chrono": ("#16325c", "--"),
        "gru": ("#0f8b8d", "-."),
    }
    for row in rows:
        at = dataset.sel(row=row)
        median, low, high = (np.exp(at[f"held_out_loss_{part}"].values) for part in ("median", "low", "high"))
        colour, stroke = styles[row]
        right.plot(
            dataset["evaluation"].values, median, color=colour, linestyle=stroke, linewidth=1.8, label=NAMES[row]
        )
        right.fill_between(dataset["evaluation"].values, low, high, color=colour, alpha=0.18, linewidth=0)
    right.axhline(
        np.exp(dataset.attrs["unigram_loss"]), color="0.35", linewidth=1.2, linestyle="--", label="word frequencies"
    )
    right.set_yscale("log")
    ticks = [
        t for t in (50, 75, 100, 150, 200, 300, 500, 1000, 2000) if right.get_ylim()[0] <= t <= right.get_ylim()[1]
    ]
    right.set_yticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.set_xlabel("updates")
    right.set_ylabel("held-out perplexity")
    right.set_title("what training did", fontsize=11)
    right.legend(frameon=False, loc="upper right")
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    drawn.suptitle(f"Does the gradient sit in the last {LAST_STEPS} steps?\n{_title(dataset)}", fontsize=11)
    return drawn


ABOUT = """On Penn Treebank, does the RNN's gradient sit in the last 10 steps, and is the LSTM's even?

Trains word-level language models and measures, before and during training, how the gradient of a word's loss fades
with the lag on held-out text; prints a table with medians and intervals, and writes figures and a netCDF file."""

CAPTION = """Log gradient of a word's loss against the lag, one panel per cell, before and during training, with
straight fits over three ranges of lags (dashed) and the slopes that the claim states (dotted)."""

SLOPES = """Slopes of the loss gradient and of the chain of h by range of lags and by training, one column per cell;
shaded is what the claim allows."""

SHARES = """Left, the share of the last 10 of 100 steps in the gradient's sum, by cell and training, with what the claim
allows shaded; right, held-out perplexity while training."""

EXPERIMENT = command.Experiment(
    name="penn_treebank",
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
        command.Picture("slopes", SLOPES, slopes),
        command.Picture("shares", SHARES, shares),
    ),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
