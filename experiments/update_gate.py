"""Does a GRU whose update gate is closed keep its memory and its gradient, and is that what training finds?

The claim is told of a gate Γ_u that lets the new in: c' = Γ_u c̃ + (1 − Γ_u) c.  Here, as in all libraries, u = 1 − Γ_u
is the share kept, so the claim is about u → 1.

First the limit: a random GRU reads Gaussian inputs from a random memory, with its weights open and the bias of u
raised.  How far are memory and gradient, h_T against h_0 and ∂h_T/∂h_0 against the identity, from being kept?  Which
bias keeps which share of the gradient over so many steps?  In float64: 1 − u is lost in the rounding of u beyond
z = 37.  Then training: GRUs that learn the adding problem, whose gates and gradient are followed over the steps between
the two marked numbers.  The learning rate is one at which a GRU learns it.  Running time: one minute on two
cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any

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
        "C1",
        "A GRU whose update gate is 0 keeps its memory, and the gradient with it, over any number of steps: this is "
        "how it avoids vanishing gradients.",
        source="lectures on sequence models, which write c' = Γ_u c̃ + (1 − Γ_u) c; Cho et al. 2014, arXiv 1406.1078",
        prediction="exact in the limit; with the weights open the bias must be about the one of a constant gate, "
        "logit r^(1/100) for the share r at lag 100: 3.05 for 1e-2, 4.97 for 0.5, 9.2 for 0.99; "
        "‖∂h_T/∂h_0 − I‖ falls as e^(−bias).  A trained GRU has units with u above 0.99, few rather than most",
        refuted="a memory or a chain of step Jacobians that differs from the start by more than round-off where the "
        "gate is closed; or GRUs that solve the adding problem without units that hold, or without the gradient",
        functions=("rg.jacobian_chain", "rg.retention", "rg.unroll", "rg.theory.forget_bias_for", "rg.tasks.adding"),
        tests=("tests/test_update_gate.py", "tests/test_chains.py"),
    ),
)

PATHS = ("full", "direct")
STAGES = ("untrained", "trained")
LEVELS = (1e-2, 0.5, 0.99)
"""Shares of the gradient whose bias is looked for."""
ROUND_OFF = 1e-12
CLOSED = 40.0
"""Biases from here on close the gate: z stays above 37, where σ(z) rounds to 1."""
HOLDS = 0.99
GRADIENT_KEPT = 0.5
SOLVED = 0.01
"""Mean squared error, as in experiments.train."""
ENOUGH_UPDATES = 1_000
"""A training run with fewer cannot tell."""
WHY_ROUND_OFF = "1 − σ(z) < 2^-53 for z > 36.8: then h' = h to the last bit; 1e-12 leaves room for rounding"
WHY_HOLDS = "0.99 a step leaves 0.45 of a number over the 79 steps between the marks, 0.98 only 0.20"
WHY_KEPT = "a kept gradient has retention 1; at one half it is nearer to kept than to lost"
WHY_CONSTANT = "rg.theory.forget_bias_for; open weights move E(1 − u) by e^(variance of z / 2), about 0.2 in the bias"
WHY_RATE = "1 − σ(z) = e^(−z) for large z, and the chain differs from I by sums of 1 − u"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the limit and of the trained networks."""

    forget_biases: tuple[float, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 28, 32, 45)
    """Biases of u, rising."""
    steps: int = 100
    """Steps of the limit; the longest lag."""
    lag_every: int = 10
    """Lags that are stored."""
    hidden_size: int = 32
    """Units N, of the random and of the trained cells; weights and other biases are drawn as in Torch."""
    input_size: int = 32
    """Width D of the random cells' input, entries N(0, 1)."""
    seeds: int = 10
    """Random cells; each draws weights, inputs and a first memory from U(−1, 1)."""
    adding_steps: int = 100
    """T of the adding problem."""
    learning_rate: float = 3e-3
    """Of Adam, behind clipping at a norm of 1."""
    batch_size: int = 32
    """Sequences per update."""
    updates: int = 6_000
    """Updates at the most; training ends early at a fifth of the error that counts as solved."""
    eval_every: int = 250
    """Updates between evaluations on 500 sequences."""
    sequences: int = 20
    """Sequences along which a trained network is followed, with marks at a tenth and nine tenths of T."""
    networks: int = 5
    """Trained networks."""
    first_seed: int = 0
    """Seeds run from here, of both kinds."""


SMOKE = Config(
    forget_biases=(0, 5, 10, 45), steps=20, lag_every=10, hidden_size=6, input_size=4, seeds=3, adding_steps=20,
    batch_size=8, updates=20, eval_every=10, sequences=3, networks=2,
)  # fmt: skip
"""A few seconds: every code path, no statement about training."""

_EVALUATED = 500


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    names = (
        "steps", "lag_every", "hidden_size", "input_size", "seeds", "batch_size", "updates", "eval_every",
        "sequences", "networks",
    )  # fmt: skip
    command.check_at_least(config, {**dict.fromkeys(names, 1), "first_seed": 0, "adding_steps": 10})
    biases = config.forget_biases
    if len(biases) < 2 or list(biases) != sorted(set(biases)) or not np.isfinite(biases).all():
        raise UserError(f"--forget-biases: expected two finite numbers or more, rising, found {biases}")
    for whole, part in (("steps", "lag_every"), ("updates", "eval_every")):
        if getattr(config, whole) % getattr(config, part):
            flag, least = whole.replace("_", "-"), getattr(config, part)
            raise UserError(f"--{flag}: expected a multiple of {least}, found {getattr(config, whole)}")
    if not (np.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UserError(f"--learning-rate: expected a positive number, found {config.learning_rate:g}")


# --- the limit


@functools.cache
def _cell(input_size: int, hidden_size: int) -> rg.Cell:
    return rg.cells.gru(input_size, hidden_size, dtype="float64")


@functools.partial(jax.jit, static_argnames=("cell", "every"))
def _limit(cell, params, state, xs, *, every):
    """Retention by lag along both paths, and how far memory and chain are from what they were."""
    chain = rg.jacobian_chain(cell, params, state, xs)
    identity = jnp.eye(state.h.shape[0], dtype=state.h.dtype)
    whole = rg.logscaled.to_array(rg.LogScaled(chain.mantissa[0], chain.exponent[0]))
    root = jnp.sqrt(jnp.asarray(float(state.h.shape[0]), state.h.dtype))
    full = jnp.flip(rg.logscaled.log_norm(chain) - jnp.log(root))
    direct = rg.retention(cell, params, state, xs, path="direct").log_norm
    final = rg.unroll(cell, params, state, xs).final
    return {
        "log_retention": jnp.stack([full, direct])[:, ::every],
        "memory_change": jnp.max(jnp.abs(final.h - state.h)),
        "chain_change": jnp.linalg.norm(whole - identity) / root,
    }


def _measure_bias(forget_bias: float, config: Config) -> xr.Dataset:
    """Returns the dataset of one bias: every random cell."""
    sizes = (config.input_size, config.hidden_size)
    # entered here, since training runs in float32
    with jax.enable_x64(True):
        drawing = rg.cells.gru(*sizes, forget_bias=float(forget_bias), dtype="float64")
        found = []
        for seed in range(config.first_seed, config.first_seed + config.seeds):
            key_params, key_xs, key_h = jax.random.split(jax.random.key(seed), 3)
            xs = jax.random.normal(key_xs, (config.steps, config.input_size), "float64")
            h = jax.random.uniform(key_h, (config.hidden_size,), "float64", -1, 1)
            state = drawing.init_state()._replace(h=h)
            measured = _limit(_cell(*sizes), drawing.init(key_params), state, xs, every=config.lag_every)
            found.append(jax.tree.map(np.asarray, measured))
    dims = {"log_retention": ("path", "lag"), "memory_change": (), "chain_change": ()}
    return xr.Dataset({name: (("seed", *dims[name]), np.stack([f[name] for f in found])) for name in dims})


# --- trained networks


def _mse(output, batch):
    return rg.losses.mse(output.outputs, batch.targets, batch.mask)


@functools.cache
def _trainer(config: Config) -> Trainer:
    task = rg.tasks.adding(config.adding_steps)
    model = rg.training.model([rg.cells.gru(2, config.hidden_size)], 1)

    def measure(params, key):
        batch = task.batch(key, _EVALUATED)
        return {"loss": _mse(model.apply(params, model.init_state((_EVALUATED,)), batch.inputs), batch)}

    return Trainer(
        model,
        _mse,
        optax.chain(rg.remedies.clip_by_global_norm(1.0), optax.adam(config.learning_rate)),
        lambda key, step: task.batch(jax.random.fold_in(key, step), config.batch_size),
        measure,
        batch_size=config.batch_size,
    )


def _marks(config: Config) -> tuple[int, int]:
    """Returns the steps of the two marked numbers in the sequences that are followed."""
    return config.adding_steps // 10, 9 * config.adding_steps // 10


@functools.partial(jax.jit, static_argnames=("cell", "marks"))
def _between(cell, params, xs, *, marks):
    """Retention over the steps between the marks (largest singular value), and every unit's geometric mean of u."""
    first, second = marks

    def one(sequence):
        run = rg.unroll(cell, params, cell.init_state(), sequence)
        state = jax.tree.map(lambda leaf: leaf[first], run.states)  # it has just read the first number
        between = sequence[first + 1 : second]
        curves = [rg.retention(cell, params, state, between, path=path, norm="spectral").log_norm for path in PATHS]
        return jnp.stack(curves), jnp.mean(jnp.log(run.gates.u[first + 1 : second]), axis=0)

    curves, log_kept = jax.vmap(one)(xs)
    return {"log_between": jnp.mean(curves, axis=0), "kept_share": jnp.sort(jnp.exp(jnp.mean(log_kept, axis=0)))}


def _measure_network(seed: int, config: Config) -> xr.Dataset:
    """Returns the dataset of one trained network."""
    trial = _trainer(config).run(
        jax.random.key(seed),
        updates=config.updates,
        eval_every=config.eval_every,
        until=lambda measured: bool(measured["loss"] <= SOLVED / 5),
        keep_snapshots=True,
    )
    cell, marks = rg.cells.gru(2, config.hidden_size), _marks(config)
    values = jax.random.uniform(
        jax.random.fold_in(jax.random.key(seed), 1), (config.sequences, config.adding_steps), jnp.float32
    )
    is_marked = np.isin(np.arange(config.adding_steps), marks).astype(np.float32)
    xs = jnp.stack([values, jnp.broadcast_to(is_marked, values.shape)], axis=-1)
    stages = [_between(cell, params.layers[0], xs, marks=marks) for params in (trial.snapshots[0], trial.params)]
    loss = trial.measured["loss"]
    return xr.Dataset(
        {
            "log_between": (("stage", "path", "between"), np.stack([stage["log_between"] for stage in stages])),
            "kept_share": (("stage", "unit"), np.stack([stage["kept_share"] for stage in stages])),
            "loss": ((), loss[~np.isnan(loss)][-1] if trial.failed_at < 0 else np.nan),
            "solved_update": ((), first_reached(trial.updates, loss <= SOLVED)),
            "failed_at": ((), trial.failed_at),
        }
    )


MEASURED = (
    "log_retention",
    "memory_change",
    "chain_change",
    "log_between",
    "kept_share",
    "loss",
    "solved_update",
    "failed_at",
)
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "log_retention": ("nats", "log of ‖∂h_T/∂h_(T−lag)‖_F/√N in a random cell, full chain and direct path ∏u"),
    "memory_change": ("1", "max over units of |h_T − h_0| in a random cell, h_0 from U(−1, 1)"),
    "chain_change": ("1", "‖∂h_T/∂h_0 − I‖_F/√N in a random cell"),
    "log_between": (
        "nats",
        "log of ‖∂h_t/∂h_(t−lag)‖₂, t the step before the second mark, back to the first one, mean over sequences",
    ),
    "kept_share": ("1", "geometric mean of u between the marks, over steps and sequences; units in rising order"),
    "loss": ("1", "mean squared error at the end of training; NaN where it failed"),
    "solved_update": ("updates", f"first evaluation with a mean squared error of {SOLVED:g}; NaN for none"),
    "failed_at": ("updates", "first update that was not finite; −1 for none"),
    "bias_for": ("1", "bias of u from which on so much of the gradient is left at the longest lag; NaN for none"),
}


def _bias_for(biases: np.ndarray, log_retention: np.ndarray, level: float) -> float:
    """Returns the bias from which on retention is at least ``level``, between biases by a straight line; else NaN."""
    below = np.flatnonzero(log_retention < np.log(level))
    if not len(below) or below[-1] == len(biases) - 1:
        return float("nan")
    at = below[-1] + np.array([0, 1])
    return float(np.interp(np.log(level), log_retention[at], biases[at]))


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with the biases for given shares, and medians and intervals over seeds."""
    longest = dataset["log_retention"].isel(lag=-1).transpose("path", "seed", "forget_bias").values
    biases = dataset["forget_bias"].values
    found = [[[_bias_for(biases, curve, level) for curve in seeds] for level in LEVELS] for seeds in longest]
    dataset = dataset.assign(bias_for=(("path", "level", "seed"), np.array(found, np.float32)))
    summarise(dataset, ("log_retention", "memory_change", "chain_change", "bias_for"), _DESCRIPTIONS)
    for name in ("log_between", "kept_share"):
        trained = dataset[[name]].rename(network="seed")
        summarise(trained, (name,), _DESCRIPTIONS)
        dataset = dataset.assign({key: value for key, value in trained.data_vars.items() if key != name})
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished biases and networks are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    networks = range(config.first_seed, config.first_seed + config.networks)
    pieces = [
        Piece(f"bias-{bias:g}", f"bias {bias:g}", functools.partial(_measure_bias, bias, config))
        for bias in config.forget_biases
    ] + [
        Piece(f"network-{seed}", f"trained network, seed {seed}", functools.partial(_measure_network, seed, config))
        for seed in networks
    ]
    measured = command.measure(pieces, parts=parts, screen=screen)
    split = len(config.forget_biases)
    limit, trained = xr.concat(measured[:split], dim="forget_bias"), xr.concat(measured[split:], dim="network")
    first, second = _marks(config)
    dataset = limit.merge(trained).assign_coords(
        forget_bias=np.array(config.forget_biases, float),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        network=list(networks),
        path=list(PATHS),
        stage=list(STAGES),
        level=list(LEVELS),
        lag=np.arange(0, config.steps + 1, config.lag_every),
        between=np.arange(second - first),
        unit=np.arange(config.hidden_size),
    )
    for name in ("log_retention", "log_between", "kept_share"):
        dataset[name] = dataset[name].astype(np.float32)
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance(
        "update_gate", config, seconds=seconds, dtype="float64", trained_in="float32", closed_from=CLOSED
    )
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _config(dataset: xr.Dataset) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(dataset.attrs["config"])
    return config


def _words(row: xr.Dataset, name: str, form: str, scale: float = 1.0) -> str:
    median, low, high = (float(row[f"{name}_{part}"]) / scale for part in ("median", "low", "high"))
    return f"{median:{form}} [{low:{form}}, {high:{form}}]"


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = _config(dataset)
    shown = rich.table.Table(
        title=f"A GRU with its update gate closed step by step: N={config['hidden_size']}, D={config['input_size']}, "
        f"T={config['steps']}, {config['seeds']} seeds, float64, {dataset.attrs['backend']}",
        caption=f"medians over seeds [{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]; retention: log10 "
        f"of what is left of the gradient at lag {config['steps']}; changes: max |h_T − h_0| and ‖∂h_T/∂h_0 − I‖/√N",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("bias of u", "retention, full", "retention, ∏u", "memory change", "chain change"):
        shown.add_column(name, justify="right")
    for index in range(dataset.sizes["forget_bias"]):
        row = dataset.isel(forget_bias=index, lag=-1)
        shown.add_row(
            f"{float(row['forget_bias']):g}",
            *(_words(row.sel(path=path), "log_retention", ".3f", np.log(10)) for path in PATHS),
            _words(row, "memory_change", ".1e"),
            _words(row, "chain_change", ".1e"),
        )
    return shown


def _solved(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the networks that solve the adding problem."""
    return dataset.isel(network=np.flatnonzero(~np.isnan(dataset["solved_update"].values)))


def _holding(dataset: xr.Dataset) -> np.ndarray:
    """Units of each solving network whose u is above HOLDS between the marks."""
    return np.asarray((_solved(dataset)["kept_share"].sel(stage="trained") >= HOLDS).sum("unit").values)


def _trained_checks(dataset: xr.Dataset) -> list[Check]:
    config, solved = _config(dataset), _solved(dataset)
    number, enough = solved.sizes["network"], config["updates"] >= ENOUGH_UPDATES
    tells = bool(number and enough)
    holding, gap = _holding(dataset), dataset.sizes["between"] - 1
    left = np.e ** solved["log_between"].sel(stage="trained").isel(between=-1)
    units, kept, ratio = (
        median_interval(values if number else np.array([np.nan]), axis=0)
        for values in (holding, left.sel(path="full").values, (left.sel(path="direct") / left.sel(path="full")).values)
    )
    words = lambda interval, form: (
        f"{float(interval.median):{form}} [{float(interval.low):{form}}, {float(interval.high):{form}}]"
    )
    most = config["hidden_size"] / 2
    rows = [
        ("trained, it has units that hold", f"{words(units, '.0f')} of {config['hidden_size']} units", "≥ 1 unit with "
         f"u ≥ {HOLDS:g}", units.low >= 1, WHY_HOLDS, True),
        (f"trained, it keeps its gradient over {gap} steps", f"{words(kept, '.2f')} left", f"≥ {GRADIENT_KEPT:g}",
         kept.low >= GRADIENT_KEPT, WHY_KEPT, True),
        ("prediction: some units hold, not most", f"{words(units, '.0f')}", f"1 or more, < {most:g}",
         units.low >= 1 and units.high < most, "two numbers have to be kept, not thirty", False),
        ("prediction: the direct path carries it", f"∏u / full {words(ratio, '.2f')}", "≥ 0.5", ratio.low >= 0.5,
         "the claim's own mechanism, as a share of the whole", False),
    ]  # fmt: skip
    return [
        *(Check(name, value, bound, bool(holds) if tells else None, "C1", why, decides)
          for name, value, bound, holds, why, decides in rows),
        Check("side condition: the adding problem is solved", f"{number} of {dataset.sizes['network']}, "
              f"{int((dataset['failed_at'] >= 0).sum())} failed", "all, none", number == dataset.sizes["network"]
              if enough else None, "C1", "a network that does not solve it need not keep anything", decides=False),
    ]  # fmt: skip


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks of the limit, of the trained networks, and of the predicted biases."""
    checks, config = [], _config(dataset)
    last = dataset.isel(forget_bias=-1)
    closed = float(last["forget_bias"]) >= dataset.attrs["closed_from"]
    for name, words in (("memory_change", "the memory is kept"), ("chain_change", "∂h_T/∂h_0 is the identity")):
        worst = float(last[name].max())
        checks.append(
            Check(
                f"closed (bias {float(last['forget_bias']):g}), {words}",
                f"off by {worst:.1e} in the worst seed",
                f"≤ {ROUND_OFF:g}",
                worst <= ROUND_OFF if closed else None,
                "C1",
                WHY_ROUND_OFF,
            )
        )
    checks += _trained_checks(dataset)
    for level in LEVELS:
        row = dataset.sel(path="full", level=level)
        expected = rg.theory.forget_bias_for(level, config["steps"])
        within = abs(float(row["bias_for_median"]) - expected) <= 0.5
        checks.append(
            Check(
                f"prediction: bias for {level:g} of the gradient at lag {config['steps']}",
                f"{_words(row, 'bias_for', '.2f')}",
                f"{expected:.2f} ± 0.5",
                within if not np.isnan(row["bias_for_median"]) else None,
                "C1",
                WHY_CONSTANT,
                decides=False,
            )
        )
    biases = dataset["forget_bias"].values
    window = (biases >= 9) & (biases <= 32)
    if window.sum() > 1:
        change = np.log(dataset["chain_change"].isel(forget_bias=window).transpose("forget_bias", "seed").values)
        slope = median_interval(np.polyfit(biases[window], change, 1)[0], axis=0)
        checks.append(
            Check(
                "prediction: ‖∂h_T/∂h_0 − I‖ ∝ e^(−bias)",
                f"slope {float(slope.median):.3f} [{float(slope.low):.3f}, {float(slope.high):.3f}] over biases "
                f"{biases[window][0]:g} to {biases[window][-1]:g}",
                "−1 ± 0.05",
                bool(abs(slope.median + 1) <= 0.05),
                "C1",
                WHY_RATE,
                decides=False,
            )
        )
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    config, last = _config(dataset), dataset.isel(forget_bias=-1)
    sentence = (
        f"with the update gate closed (share kept u → 1, bias {float(last['forget_bias']):g}) memory and chain "
        f"differ from the start by at most {float(last['memory_change'].max()):.1g} and "
        f"{float(last['chain_change'].max()):.1g} after {config['steps']} steps."
    )
    for path, words in (("full", "With the weights open"), ("direct", "the direct path ∏u alone")):
        found = [
            f"{level:g} of the gradient {float(bias):.1f}"
            for level in LEVELS
            if not np.isnan(bias := dataset["bias_for_median"].sel(path=path, level=level))
        ]
        if found and path == "full":
            sentence += f"  {words} the bias must be, for {', for '.join(found)}"
        elif found:
            sentence += f"; for {words}: {', '.join(found)}"
    sentence += "." if not sentence.endswith(".") else ""
    solved = _solved(dataset)
    number, networks = solved.sizes["network"], dataset.sizes["network"]
    if not number or config["updates"] < ENOUGH_UPDATES:
        return {"C1": sentence + f"  Nothing can be said of trained networks: {number} of {networks} solve the task."}
    holding = _holding(dataset)
    left = np.e ** solved["log_between"].isel(between=-1).median("network")
    before, after = (float(left.sel(path="full", stage=stage)) for stage in STAGES)
    alone = float(left.sel(path="direct", stage="trained"))
    unit = solved["kept_share"].sel(stage="trained")
    counts = f"{holding.min()}" if holding.min() == holding.max() else f"{holding.min()} to {holding.max()}"
    sentence += (
        f"  Of {networks} GRUs trained on the adding problem {number} solve it, with {counts} of "
        f"{config['hidden_size']} units at u ≥ {HOLDS:g} between the marks (of the units that hold most: "
        f"{float(unit.isel(unit=-1).min()):.3f} to {float(unit.isel(unit=-1).max()):.3f}, median unit "
        f"{float(unit.median()):.2f}); over these {dataset.sizes['between'] - 1} steps {after:.2f} of the gradient is "
        f"left, along the direct path ∏u alone {alone:.2f}, and before training {before:.1g}."
    )
    return {"C1": sentence}


_COLOURS = {"full": "#16325c", "direct": "#d97706"}
_LABELS = {"full": "full chain", "direct": "direct path ∏u"}


def _draw_map(axes: Any, dataset: xr.Dataset) -> None:
    steps = int(dataset["lag"][-1])
    shown = dataset.sel(forget_bias=dataset["forget_bias"] <= 12).isel(lag=-1)
    biases = shown["forget_bias"].values
    for path in PATHS:
        row = shown.sel(path=path)
        median, low, high = (row[f"log_retention_{part}"].values / np.log(10) for part in ("median", "low", "high"))
        line = "-" if path == "full" else "--"
        axes.plot(biases, median, line, color=_COLOURS[path], marker="o", markersize=4, label=_LABELS[path])
        axes.fill_between(biases, low, high, color=_COLOURS[path], alpha=0.2, linewidth=0)
    fine = np.linspace(biases[0], biases[-1], 100)
    constant = [rg.theory.constant_gate_retention(bias, steps) / np.log(10) for bias in fine]
    axes.plot(fine, constant, color="0.4", linestyle=":", label="constant gate σ(bias)^lag")
    axes.set_xlabel("bias of the share kept, u")
    axes.set_ylabel(f"log10 of the gradient left at lag {steps}")
    axes.set_title("weights open, bias raised", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _draw_limit(axes: Any, dataset: xr.Dataset) -> None:
    biases = dataset["forget_bias"].values
    for name, colour, words in (
        ("chain_change", "#16325c", "gradient: ‖∂h_T/∂h_0 − I‖/√N"),
        ("memory_change", "#c81e4a", "memory: max |h_T − h_0|"),
    ):
        median, low, high = (dataset[f"{name}_{part}"].values for part in ("median", "low", "high"))
        there = median > 0
        axes.plot(biases[there], median[there], color=colour, marker="o", markersize=4, label=words)
        axes.fill_between(biases[there], low[there], high[there], color=colour, alpha=0.2, linewidth=0)
    nothing = biases[(dataset["chain_change_median"].values == 0) & (dataset["memory_change_median"].values == 0)]
    if len(nothing):
        axes.axvline(nothing[0], color="0.4", linewidth=0.8, linestyle=":")
        place = (nothing[0], 0.08)
        axes.annotate("exactly 0  ", place, xycoords=("data", "axes fraction"), fontsize=9, ha="right")
    axes.set_yscale("log")
    axes.set_xlabel("bias of the share kept, u")
    axes.set_ylabel(f"change over {int(dataset['lag'][-1])} steps")
    axes.set_title("the limit, float64", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _draw_units(axes: Any, dataset: xr.Dataset) -> None:
    units = np.arange(1, dataset.sizes["unit"] + 1)
    for stage, colour in (("untrained", "0.5"), ("trained", "#0e9f8e")):
        for index in range(dataset.sizes["network"]):
            lost = 1 - dataset["kept_share"].sel(stage=stage).isel(network=index).values[::-1]
            # float32 cannot tell u from 1 below 6e-8
            axes.plot(units, np.maximum(lost, 6e-8), color=colour, linewidth=1.2, label=stage if index == 0 else None)
    axes.axhline(1 - HOLDS, color="0.3", linestyle=":", linewidth=1, label=f"u = {HOLDS:g}")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("units, the one that holds most first")
    axes.set_ylabel("1 − u between the marks (up: holds)")
    axes.set_title("adding problem: the gates", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _draw_between(axes: Any, dataset: xr.Dataset) -> None:
    lags = dataset["between"].values
    for path in PATHS:
        for stage, line in (("untrained", ":"), ("trained", "-")):
            row = dataset.sel(path=path, stage=stage)
            median, low, high = (row[f"log_between_{part}"].values / np.log(10) for part in ("median", "low", "high"))
            words = f"{_LABELS[path]}, {stage}: {10 ** median[-1]:.1g} at lag {lags[-1]}"
            axes.plot(lags, median, line, color=_COLOURS[path], label=words)
            axes.fill_between(lags, low, high, color=_COLOURS[path], alpha=0.15, linewidth=0)
    axes.set_xlabel("steps back from the second mark to the first")
    axes.set_ylabel("log10 of ‖∂h_t/∂h_(t−lag)‖₂")
    axes.set_title("adding problem: the gradient", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: what a bias keeps, the limit, and gates and gradient of trained networks."""
    config, solved = _config(dataset), _solved(dataset).sizes["network"]
    drawn = matplotlib.figure.Figure(figsize=(11, 8), layout="constrained")
    axes = drawn.subplots(2, 2)
    for draw, place in zip((_draw_map, _draw_limit, _draw_units, _draw_between), axes.flat, strict=True):
        draw(place, dataset)
        place.grid(alpha=0.25, linewidth=0.6)
        place.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(
        "Does a GRU keep memory and gradient by closing its update gate (share kept u → 1)?\n"
        f"above: random cells, N={config['hidden_size']}, {config['seeds']} seeds; below: adding problem, "
        f"T={config['adding_steps']}, {config['networks']} networks, {solved} solve it; lines medians, bands 95 % "
        "intervals",
        fontsize=11,
    )
    return drawn


ABOUT = """Does a GRU whose update gate is closed keep its memory and its gradient, and is that what training finds?

Raises the gate's bias in random cells and measures how far memory and gradient are from being kept; trains GRUs on the
adding problem and follows gates and gradient between the marked numbers; prints a table, writes a figure and a netCDF
file."""

CAPTION = """Above left, the gradient left after 100 steps against the bias of the share kept, full chain, direct path
and constant gate; right, how memory and chain come to be exactly what they were.  Below, networks trained on the adding
problem: what each unit loses per step between the marks, and the gradient that is left there."""

EXPERIMENT = command.Experiment(
    name="update_gate",
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
