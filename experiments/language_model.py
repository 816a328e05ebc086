"""Trains a recurrent language model on a text and watches, while it learns, how far back its gradient reaches.

``python -m experiments.language_model --text ptb --preset small``

The loss is the cross-entropy of the next token, per token.  Sequences are cut from the text as Zaremba et al. 2014
(arXiv 1409.2329) do: B streams side by side, T steps at a time, the state carried from one window to the next and the
gradient cut there (truncated BPTT), so no lag beyond T is ever trained or measured.  The baseline is a model without
memory: the frequencies of the training part, each count one more so that no token is impossible.

Parts of the text: ``ptb`` trains on the train file, evaluates on the valid file and tests on the test file; where the
train file is not at hand it trains on the valid file and evaluates on the test file, and says so: such numbers do not
compare with published ones.  Any other text is cut in two, the last tenth to be held out.

A run that is interrupted, also by a kill, resumes with the same command and ends with an undisturbed one's numbers.
Over several devices and processes it runs as :mod:`experiments.train` does.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, learning, results
from experiments.command import UserError
from experiments.learning import CellName, LogName, OptimizerName, Preset, Unit
from experiments.statistics import describe

InitName = Literal["torch", "flax", "equinox", "keras", "haiku", "gaussian", "orthogonal", "identity", "uniform"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a language model."""

    text: str = "pydoc"
    """pydoc (every CPython carries it), ptb, tinyshakespeare, or a path to a UTF-8 file."""
    level: Literal["word", "char"] = "char"
    """Tokens are words or characters."""
    data_dir: Path | None = None
    """Folder with ptb/ and tinyshakespeare/; else RNNGRAD_DATA, else downloaded to a cache."""
    held_out_share: float = 0.1
    """Share of the text that is held out, from its end; ptb has files of its own."""
    cell: CellName = "lstm"
    """The cell."""
    layers: int = 1
    """Layers, one above the other."""
    hidden_size: int = 256
    """Units N of each layer, and width of the embedding."""
    dropout: float = 0.0
    """Probability that an entry between layers is dropped while training; never on the recurrence."""
    init: InitName = "torch"
    """Initialisation: a library's default, a scheme at gain 1, or uniform: every weight from U(±init_scale)."""
    init_scale: float = 0.1
    """Of init uniform."""
    forget_bias: str | None = None
    """Effective forget bias (of a GRU: of the share kept): a number, chrono (up to T steps), chrono:LAG, or ugi."""
    steps: int = 64
    """Unrolled time steps T of a window."""
    batch_size: int = 32
    """Streams B side by side."""
    epochs: int = 10
    """Passes over the training part."""
    max_updates: int | None = None
    """Updates at the most; the cosine ends there."""
    optimizer: OptimizerName = "adam"
    """Update rule."""
    learning_rate: float = 2e-3
    """Learning rate of the first epoch."""
    schedule: Literal["constant", "epochs", "cosine"] = "cosine"
    """Learning rate: constant; divided by lr_decay after each epoch from flat_epochs on; or a half cosine down to 0."""
    flat_epochs: int = 4
    """Of schedule epochs: epochs with the full learning rate."""
    lr_decay: float = 2.0
    """Of schedule epochs: divisor per epoch."""
    loss_unit: Unit = "mean_per_token"
    """Unit of the training loss, thus of the learning rate: mean per token, or sum over the steps of a window."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; None for no clipping."""
    clip_unit: Unit = "mean_per_token"
    """Unit in which --clip is stated."""
    eval_every: int | None = None
    """Updates between evaluations; None: once per epoch."""
    monitor_every: int = 100
    """Updates between two looks of the gradient-flow monitor."""
    checkpoint_every: int = 200
    """Updates between checkpoints."""
    patience: int | None = None
    """Stop after so many evaluations without a lower held-out loss."""
    max_minutes: float | None = None
    """Stop after so many minutes and write the result; the same command goes on from there."""
    logs: tuple[LogName, ...] = ("tensorboard",)
    """Where records go beside log.jsonl."""
    seed: int = 0
    """Of weights and dropout."""


MAY_CHANGE = ("data_dir", "patience", "max_minutes", "logs")
"""Settings that may differ when a run is resumed: all others make another run."""


def _zaremba(**settings: Any) -> Config:
    shared: dict[str, Any] = {
        "text": "ptb",
        "level": "word",
        "layers": 2,
        "init": "uniform",
        "batch_size": 20,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "schedule": "epochs",
        "loss_unit": "sum_over_steps",
        "clip_unit": "sum_over_steps",
    }
    return Config(**shared, **settings)


_PAPER = "Zaremba et al. 2014, arXiv 1409.2329, section 4.1"
_TENSORFLOW = "TensorFlow's ptb_word_lm.py"
"""Its settings small, medium and large, after the paper's; the header of that file lists what they reached."""
PRESETS = {
    "small": Preset(
        _zaremba(hidden_size=200, steps=20, init_scale=0.1, clip=5.0, epochs=13, flat_epochs=4, lr_decay=2.0),
        f"{_PAPER}, non-regularized: test perplexity 115.9 by {_TENSORFLOW}; one bias per gate here, two in the "
        "paper's code",
    ),
    "medium": Preset(
        _zaremba(
            hidden_size=650, dropout=0.5, steps=35, init_scale=0.05, clip=5.0, epochs=39, flat_epochs=6, lr_decay=1.2
        ),
        f"{_PAPER}, medium regularized: test perplexity 82.1 by {_TENSORFLOW}, 82.7 in the paper",
    ),
    "large": Preset(
        _zaremba(
            hidden_size=1500,
            dropout=0.65,
            steps=35,
            init_scale=0.04,
            clip=10.0,
            epochs=55,
            flat_epochs=14,
            lr_decay=1.15,
        ),
        f"{_PAPER}, large regularized: test perplexity 78.3 by {_TENSORFLOW}, 78.4 in the paper",
    ),
    "char": Preset(
        Config(text="tinyshakespeare", level="char", hidden_size=512, steps=100, batch_size=50, epochs=4, clip=5.0),
        "this project, after Karpathy's char-rnn (2015): at most 1.60 nats per character in 30 minutes on two cores",
    ),
}


def smoke(config: Config) -> Config:
    """Returns the configuration shrunk to a few seconds: every code path, no statement about the text."""
    return dataclasses.replace(
        config,
        hidden_size=12,
        steps=16,
        batch_size=16,
        max_updates=40,
        eval_every=20,
        monitor_every=10,
        checkpoint_every=20,
    )


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    names = (
        "layers",
        "hidden_size",
        "steps",
        "batch_size",
        "epochs",
        "eval_every",
        "monitor_every",
        "checkpoint_every",
    )
    command.check_at_least(config, {**dict.fromkeys(names, 1), "patience": 1, "max_updates": 1, "flat_epochs": 0})
    learning.check_seeds("--seed", config.seed)
    learning.check_positive(config, ("learning_rate", "clip", "lr_decay", "init_scale", "max_minutes"))
    if not 0 <= config.dropout < 1:
        raise UserError(f"--dropout: expected a probability in [0, 1), found {config.dropout}")
    if not 0 < config.held_out_share < 1:
        raise UserError(f"--held-out-share: expected a share between 0 and 1, found {config.held_out_share}")
    learning.forget_bias(config.forget_bias, config.steps)


class Parts(NamedTuple):
    """A text as ids, cut in parts that share a vocabulary."""

    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray | None
    vocabulary: tuple[str, ...]
    name: str
    """What the text is called."""
    train_name: str
    held_out_name: str
    digests: str
    """SHA-256 of the texts, one after the other."""
    unknown_share: float
    """Share of the held-out tokens that the vocabulary lacks and that count as <unk>."""


def run_name(config: Config) -> str:
    """Returns the name of a run's folder."""
    return f"{Path(config.text).stem}-{config.level}-{config.cell}-{config.layers}x{config.hidden_size}"


def title(config: Config, text: str) -> str:
    """Returns the run in words; ``text`` is what the text is called."""
    dropout = f", dropout {config.dropout:g}" if config.dropout else ""
    return (
        f"{text}, {config.level} level: {config.cell}, {config.layers} × N={config.hidden_size}{dropout}, "
        f"T={config.steps}, {config.optimizer}"
    )


def num_updates(config: Config, per_epoch: int) -> int:
    """Returns the updates of the whole run."""
    return min(config.epochs * per_epoch, config.max_updates or config.epochs * per_epoch)


@functools.cache
def build_optimizer(config: Config, per_epoch: int) -> optax.GradientTransformation:
    """Returns the optimizer with its schedule and clipping."""
    return learning.build_optimizer(
        config.optimizer,
        learning_rates(config, per_epoch),
        clip=config.clip,
        clip_unit=config.clip_unit,
        loss_unit=config.loss_unit,
        num_steps=config.steps,
    )


def learning_rates(config: Config, per_epoch: int) -> optax.ScalarOrSchedule:
    """Returns the learning rate by update; ``per_epoch`` updates are an epoch."""
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, num_updates(config, per_epoch))

    def by_epoch(step: Any) -> Any:
        epoch = 1 + step // per_epoch
        return config.learning_rate / config.lr_decay ** jax.numpy.maximum(epoch - config.flat_epochs, 0)

    return by_epoch


def unigram_loss(train: np.ndarray, held_out: np.ndarray, num_tokens: int) -> float:
    """Returns the loss of a model without memory, nats per token: frequencies of ``train``, each count one more."""
    counts = np.bincount(train, minlength=num_tokens) + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[held_out]))


@functools.cache
def build_model(config: Config, num_tokens: int) -> Any:
    """Returns the network: embedding, layers of one cell, read-out; one for one configuration, compiled once."""
    is_uniform = config.init == "uniform"
    if is_uniform and config.forget_bias is not None:
        raise UserError("--forget-bias: init uniform draws every bias; expected another --init beside it")
    with command.user_input():
        cell = learning.build_cell(
            config.cell,
            config.hidden_size,
            config.hidden_size,
            init="torch" if is_uniform else config.init,
            bias=config.forget_bias,
            steps=config.steps,
        )
        return rg.training.model(
            [cell] * config.layers,
            num_tokens,
            vocabulary_size=num_tokens,
            dropout=config.dropout,
            uniform=config.init_scale if is_uniform else None,
        )


def _load(config: Config, name: str, screen: rich.console.Console) -> Any:
    with command.progress(screen) as bar:
        task = bar.add_task("reading text", total=None)
        return rg.tasks.load_text(
            name,
            data_dir=config.data_dir,
            on_progress=lambda done, total: bar.update(task, description="downloading", completed=done, total=total),
        )


def read_parts(config: Config, screen: rich.console.Console) -> Parts:
    """Returns the text's parts as ids, and says where they come from.

    Raises:
      UserError: a text that cannot be used, or too short.
      FileNotFoundError: no such text.
    """
    with command.user_input():
        if config.text != "ptb":
            text = _load(config, config.text, screen)
            tokens = rg.tasks.tokenize(text, level=config.level)
            share = config.held_out_share
            head, tail = rg.tasks.split(tokens, (1 - share, share))
            names = (f"first {1 - share:.0%} of {text.source}", f"last {share:.0%}")
            return Parts(head.ids, tail.ids, None, tokens.vocabulary, text.source, *names, text.digest, 0.0)
        texts = [_load(config, "ptb:valid", screen), _load(config, "ptb:test", screen)]
        try:
            texts.insert(0, _load(config, "ptb:train", screen))
        except FileNotFoundError:
            screen.print(
                "ptb: the train file is not at hand, so this trains on the valid file and evaluates on the test file; "
                "the numbers do not compare with published ones",
                soft_wrap=True,
            )
        first = rg.tasks.tokenize(texts[0], level=config.level)
        train, held_out, *test = [rg.tasks.encode(text, first.vocabulary, level=config.level) for text in texts]
        own, known = rg.tasks.tokenize(texts[1], level=config.level), set(first.vocabulary)
        unknown = np.array([token not in known for token in own.vocabulary])[own.ids].mean()
        return Parts(
            train.ids,
            held_out.ids,
            test[0].ids if test else None,
            first.vocabulary,
            "Penn Treebank" if test else "Penn Treebank, valid and test files only",
            texts[0].source,
            texts[1].source,
            " ".join(text.digest for text in texts),
            float(unknown),
        )


_DESCRIPTIONS = {
    "best_loss": ("nats per token", "lowest held-out loss"),
    "best_update": ("updates", "where it was found"),
    "final_loss": ("nats per token", "held-out loss after the last update"),
    "final_train_loss": ("nats per token", "training loss, mean over the last records"),
    "test_loss": ("nats per token", "test loss of the best parameters; NaN where there is no third file"),
    "updates": ("updates", "updates made"),
}
LAST_RECORDS = 10
"""Records, of 10 updates at the most, over which the training loss in the table is taken."""


def run(config: Config, folder: Path, screen: rich.console.Console | None = None) -> xr.Dataset:
    """Returns the history of the run; checkpoints and log go to ``folder``, and are resumed from there.

    Raises:
      UserError: settings or a text that cannot be used, or a folder that holds another run.
      OSError: no such text, or the folder cannot be written to.
      NonFiniteLossError: training diverged.
    """
    started = time.monotonic()
    check(config)
    screen = screen or rich.console.Console(quiet=True)
    parts = read_parts(config, screen)
    with command.user_input():
        windows = [
            rg.tasks.streams(ids, config.batch_size, config.steps)
            for ids in (parts.train, parts.held_out, parts.test)
            if ids is not None
        ]
    train, held_out = windows[:2]
    screen.print(
        f"text: {parts.name}: {len(parts.train):,} {config.level} tokens for training, {len(parts.held_out):,} held "
        f"out, {len(parts.vocabulary):,} different; {train.num_windows:,} updates are an epoch",
        soft_wrap=True,
        highlight=False,
    )
    if parts.unknown_share:
        screen.print(f"{parts.unknown_share:.1%} of the held-out tokens are not in the vocabulary and count as <unk>")

    shared = dataclasses.replace(config, **{name: getattr(Config, name) for name in MAY_CHANGE})
    model = build_model(shared, len(parts.vocabulary))
    optimizer = build_optimizer(shared, train.num_windows)
    mean, unit = (_loss(reduction) for reduction in ("mean_per_token", config.loss_unit))

    def evaluator(part: Any) -> Any:
        return rg.training.evaluator(
            model, mean, [part.batch(index) for index in range(part.num_windows)], carry_memory=True
        )

    evaluate = evaluator(held_out)
    identity = {name: value for name, value in command.config_dict(config).items() if name not in MAY_CHANGE}
    limit = np.inf if config.max_minutes is None else 60 * config.max_minutes
    trained = learning.train(
        folder,
        model,
        unit,
        optimizer,
        jax.jit(train.batch),
        key=jax.random.key(config.seed),
        batch_size=config.batch_size,
        updates=num_updates(config, train.num_windows),
        identity={**identity, "text": f"{Path(config.text).name}, sha256 {parts.digests}"},
        evaluate=evaluate,
        eval_every=config.eval_every or train.num_windows,
        monitor_every=config.monitor_every,
        checkpoint_every=config.checkpoint_every,
        logs=config.logs,
        title=f"{Path(config.text).stem}, {config.cell}",
        screen=screen,
        patience=config.patience,
        restart_at=train.restarts,
        should_stop=lambda _: time.monotonic() - started > limit,
    )
    dataset = learning.history(
        trained.records,
        loss_unit="nats per token",
        reach=lambda _: config.steps,
        tokens_per_loss=config.steps if config.loss_unit == "sum_over_steps" else 1,
    )
    # a run that was stopped ends between two evaluations
    final_loss, best = evaluate(trained.params)["loss"], int(np.nanargmin(dataset["loss"].values))
    best_loss, best_update, best_params = (
        float(dataset["loss"][best]),
        int(dataset["update"][best]),
        trained.best_params,
    )
    if final_loss < best_loss:
        best_loss, best_update, best_params = final_loss, trained.step, trained.params
    facts = {
        "best_loss": best_loss,
        "best_update": best_update,
        "final_loss": final_loss,
        "final_train_loss": float(dataset["train_loss"][-LAST_RECORDS:].mean())
        if dataset.sizes["train_update"]
        else np.nan,
        "test_loss": evaluator(windows[2])(best_params)["loss"] if len(windows) > 2 else np.nan,
        "updates": trained.step,
    }
    dataset = dataset.assign({name: ((), value) for name, value in facts.items()}).expand_dims(seed=[config.seed])
    describe(dataset, _DESCRIPTIONS)
    is_file = config.text not in ("pydoc", "ptb", "tinyshakespeare")
    shown = dataclasses.replace(config, data_dir=None, text=Path(config.text).name if is_file else config.text)
    dataset.attrs = results.provenance(
        experiment="language_model",
        command=f"python -m experiments.language_model {command.flags(shown)}".strip(),
        config=command.config_dict(shown),
        dtype="float32",
        matmul_precision=learning.matmul_precision(),
        title=title(config, parts.name),
        text=parts.name,
        text_sha256=parts.digests,
        train_name=parts.train_name,
        held_out=f"held out: {parts.held_out_name}",
        train_tokens=len(parts.train),
        held_out_tokens=len(parts.held_out),
        vocabulary_size=len(parts.vocabulary),
        unknown_share=parts.unknown_share,
        updates_per_epoch=train.num_windows,
        level=config.level,
        loss_label=f"cross-entropy (nats per {_UNITS[config.level]})",
        loss_scale="linear",
        baseline=unigram_loss(parts.train, parts.held_out, len(parts.vocabulary)),
        baseline_name="without memory",
        num_parameters=trained.num_parameters,
        num_devices=trained.num_devices,
        seconds=round(trained.seconds, 1),
        tokens_per_second=trained.step * config.steps * config.batch_size / max(trained.seconds, 1e-9),
    )
    return dataset


@functools.cache
def _loss(reduction: str) -> Any:
    return lambda output, batch: rg.losses.cross_entropy(output.outputs, batch.targets, batch.mask, reduction=reduction)


# --- what a person sees ----------------------------------------------------------------------------------------------

_UNITS = {"word": "word", "char": "character"}


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first: one row per part of the text."""
    attrs, row = dataset.attrs, dataset.isel(seed=0)
    is_word = attrs["level"] == "word"
    updates, epoch = int(row["updates"]), int(attrs["updates_per_epoch"])
    minutes = attrs["seconds"] / 60
    shown = rich.table.Table(
        title=f"{attrs['title']}, {attrs['num_parameters']:,} parameters, {attrs['dtype']}, {attrs['backend']}",
        caption=f"{updates:,} updates, {updates / epoch:.2f} epochs; {attrs['tokens_per_second']:,.0f} tokens per "
        f"second, {minutes:.1f} minutes, all told; horizon (first lag at which less than {learning.KEPT:.0%} of the "
        f"last step's gradient is left, by layer from the input up): {learning.horizons(row)}; clipped: "
        f"{learning.last(row['clip_fraction']) if 'clip_fraction' in row else float('nan'):.1%} of all updates",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("part")
    for name in (
        "after update",
        f"nats per {_UNITS[attrs['level']]}",
        "perplexity" if is_word else "bits per character",
    ):
        shown.add_column(name, justify="right")
    held_out, best = attrs["held_out"].removeprefix("held out: "), int(row["best_update"])
    lines = [
        (f"training: {attrs['train_name']}", updates, "final_train_loss"),
        (f"held out: {held_out}, best", best, "best_loss"),
        (f"held out: {held_out}, last", updates, "final_loss"),
        ("test: ptb.test.txt, best parameters", best, "test_loss"),
    ]
    found = [(name, f"{at:,}", float(row[variable])) for name, at, variable in lines]
    for name, at, nats in [*found, (f"baseline: {attrs['baseline_name']}, held out", "", attrs["baseline"])]:
        if np.isfinite(nats):
            unit = rg.losses.perplexity(nats) if is_word else rg.losses.bits_per_character(nats)
            shown.add_row(name, at, f"{nats:.4f}", f"{float(unit):.1f}" if is_word else f"{float(unit):.3f}")
    return shown


def summary(dataset: xr.Dataset) -> str:
    """Returns the result in one sentence."""
    attrs, best = dataset.attrs, float(dataset["best_loss"][0])
    below = f"{attrs['baseline'] - best:.3f} nats below" if best < attrs["baseline"] else "not below"
    return f"Held out: {best:.4f} nats per {_UNITS[attrs['level']]}, {below} the model without memory."


ABOUT = """Trains a recurrent language model and watches how far back its gradient reaches while it learns.

Shows a progress bar and a table, and writes into one folder: the result (netCDF), a figure with the learning curve, the
heat map of retention over lag and update and the shares by gate, a log (JSON lines), TensorBoard events and
checkpoints.  The same command resumes what was interrupted."""

DRIVER = learning.Driver("language_model", ABOUT, run, run_name, table, summary, PRESETS, smoke)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    learning.main(DRIVER, Config(), arguments)


if __name__ == "__main__":
    main()
