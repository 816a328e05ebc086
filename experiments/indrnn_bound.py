"""IndRNN with |u| ≤ 2^{1/T}: does the bound keep gradients over T steps, and does it solve the adding problem?

A unit of an IndRNN hears only itself, so the Jacobian is diagonal and its product over T steps is, unit by unit, a
product of numbers, ∏ u φ'(z_t).  Three statements are tried:

* the identity, in float64 along runs with random inputs, for φ = relu, tanh and the identity function;
* the bound on the gradient, ‖∂h_T/∂h_0‖₂ ≤ 2 for |u| ≤ 2^{1/T}, and its other side, that it stays above 1/2: that
  gradients do not vanish.  φ' is 0 or 1 for relu, so a unit that was off once within the T steps passes nothing at all;
  the share of units that pass something is counted;
* the adding problem at T = 100 and 200 by two layers of relu units, with the start of the authors' published program
  (input weights N(0, 0.001²), biases 0, u from U(0, 2^{1/T}) below and U(2^{-1/T}, 2^{1/T}) above) and u clipped to the
  bound after every update; the same start without clipping, and with u from U(0, 1) in the upper layer, which remembers
  little; a vanilla tanh network and an LSTM (b_f = 1) of one layer.  All have the same updates and batches.  Rates of
  Adam are 1e-3, for the LSTM 1e-2, at which it learns T = 50 in a thousand updates.

Running time: about 5 minutes on two cores with the defaults.
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
from experiments.statistics import Interval, describe, interval_text, median_interval, summarise
from experiments.trials import Trainer, first_reached

CLAIMS = (
    Claim(
        "E3",
        "An IndRNN whose recurrent weights obey |u| ≤ 2^{1/T} neither loses nor explodes its gradient over T steps, "
        "and solves the adding problem at long T.",
        source="Li et al. 2018, arXiv 1803.04831, section 3 and its experiments with adding; settings from the program "
        "that the authors published",
        prediction="the product of numbers equals the chain to 1e-12, and the norm never exceeds 2; with relu and u "
        "near 2^{1/T} the largest unit keeps its gradient, most others are cut; adding is solved at T = 100 and 200, "
        "where vanilla tanh is not",
        refuted="the chain differs from the product; the norm exceeds 2 or falls below 1/2; most seeds fail at adding",
        functions=("rg.cells.indrnn", "rg.jacobian_chain", "rg.tasks.adding"),
        tests=(
            "tests/test_indrnn_bound.py",
            "tests/test_contract.py",
        ),
    ),
)

ACTIVATIONS = ("relu", "tanh", "identity")
STARTS = ("U(0, 1)", "within the bound", "at the bound", "u = 4^{1/T}")
"""How u is drawn: Li et al. without the bound; U(2^{-1/T}, 2^{1/T}); 2^{1/T}; and beyond the bound."""
BOUNDED = STARTS[1:3]
NETWORKS = ("IndRNN, bound", "IndRNN, no bound", "IndRNN, u from U(0, 1)", "vanilla tanh", "LSTM")
"""What learns the adding problem."""
INDRNNS = NETWORKS[:3]
IDENTITY_ERROR = 1e-12
SOLVED = 0.1
"""Share of the loss of predicting the mean below which the task counts as learned."""
WHY_IDENTITY = "exact in real numbers; float64 over 200 factors leaves 200 · 2.2e-16 = 4e-14, with room"
WHY_BOUND = "|∏ u φ'| ≤ 2 since |u|^T ≤ 2 and |φ'| ≤ 1; room for round-off of 1e-12"
WHY_KEPT = "the claim's other half: the counterpart of 2 from below, 1/2 = (2^{-1/T})^T, the authors' lower end for u"
WHY_SOLVED = "the claim itself; most seeds, since a single lucky one is no method"
WHY_BASELINE = "the claim's point of comparison, with the same updates"
WHY_USE = "if the bound is what helps, the same network without it needs more updates"
GRAD_CLIP = 1.0
"""Global norm at which gradients are clipped; the same for all."""
INPUT_STD = 1e-3
"""Of the IndRNN's input weights, as in the authors' program."""
RATES = {name: 1e-2 if name == "LSTM" else 1e-3 for name in NETWORKS}
"""Learning rates of Adam."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the IndRNN's bound."""

    steps: int = 200
    """T of the bound and longest lag, for fresh networks."""
    hidden_size: int = 64
    """Units N of a layer."""
    input_size: int = 32
    """Width D of the input of fresh networks, entries N(0, 1)."""
    seeds: int = 10
    """Fresh networks; each draws weights and inputs, the same for every start and activation."""
    lengths: tuple[int, ...] = (100, 200)
    """Lengths T of the adding problem, rising, each with its bound."""
    updates: int = 1_500
    """Updates at the most; a trial ends when it has learned."""
    eval_every: int = 100
    """Updates between evaluations on held-out sequences."""
    batch_size: int = 20
    """Sequences of an update."""
    test_size: int = 400
    """Held-out sequences."""
    train_seeds: int = 5
    """Trained networks of each kind and length."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    steps=12, hidden_size=4, input_size=3, seeds=2, lengths=(6,), updates=4, eval_every=2, batch_size=4, test_size=8,
    train_seeds=2,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim's training."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"steps": 1, "hidden_size": 1, "input_size": 1, "seeds": 1, "updates": 1, "eval_every": 1, "batch_size": 1}
    command.check_at_least(config, least | {"test_size": 1, "train_seeds": 1, "first_seed": 0})
    lengths = config.lengths
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 2:
        raise UserError(f"--lengths: expected numbers from 2, rising, found {lengths}")
    if config.updates % config.eval_every:
        raise UserError(f"--updates: expected a multiple of --eval-every {config.eval_every}, found {config.updates}")


# --- fresh networks ---


@functools.cache
def _fresh_cell(activation: str, input_size: int, hidden_size: int) -> rg.Cell:
    return rg.cells.indrnn(input_size, hidden_size, activation=activation, dtype="float64")


def _draw_u(start: str, key: jax.Array, config: Config) -> jax.Array:
    """The same uniform numbers for every start."""
    uniform, edge = jax.random.uniform(key, (config.hidden_size,), "float64"), 2.0 ** (1.0 / config.steps)
    if start == "U(0, 1)":
        return uniform
    if start == "within the bound":
        return 1 / edge + (edge - 1 / edge) * uniform
    return jnp.full_like(uniform, edge if start == "at the bound" else edge**2)


@functools.partial(jax.jit, static_argnames="cell")
def _chain(cell, params, xs):
    state = cell.init_state()
    return rg.jacobian_chain(cell, params, state, xs), rg.unroll(cell, params, state, xs).states.h


def slopes(activation: str, h: np.ndarray) -> np.ndarray:
    """Returns φ'(z) from h = φ(z)."""
    if activation == "relu":
        return (h > 0).astype(float)
    return 1 - h**2 if activation == "tanh" else np.ones_like(h)


def products(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the products of the newest 0 … T factors, unit by unit: (T+1, N) mantissas, (T+1,) exponents of 2."""
    mantissa, exponent = np.ones(factors.shape[1]), 0
    mantissas, exponents = [mantissa], [exponent]
    for factor in factors[::-1]:
        mantissa = mantissa * factor
        shift = int(np.frexp(np.max(np.abs(mantissa)))[1])
        mantissa, exponent = np.ldexp(mantissa, -shift), exponent + shift
        mantissas.append(mantissa)
        exponents.append(exponent)
    return np.stack(mantissas), np.array(exponents)


def _measure_row(start: str, activation: str, config: Config) -> xr.Dataset:
    """Returns the fresh networks of one start and activation: every seed."""
    cell = _fresh_cell(activation, config.input_size, config.hidden_size)
    rows = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        key_params, key_u, key_xs = jax.random.split(jax.random.key(seed), 3)
        params = cell.init(key_params)._replace(u=_draw_u(start, key_u, config))
        xs = jax.random.normal(key_xs, (config.steps, config.input_size), "float64")
        chain, h = jax.device_get(_chain(cell, params, xs))
        # lag 0 first, as the products have it
        found, scale = chain.mantissa[::-1], chain.exponent[::-1]
        mantissas, exponents = products(slopes(activation, h) * np.asarray(params.u))
        with np.errstate(divide="ignore"):
            expected = np.ldexp(mantissas, (exponents - scale)[:, None])
            largest = np.max(np.abs(expected), axis=1)
            apart = np.max(np.abs(found - expected[:, :, None] * np.eye(config.hidden_size)), axis=(1, 2))
            # relative to the largest entry; where all are exactly 0, absolute
            error = np.max(apart / np.where(largest > 0, largest, 1))
            norm = np.log(np.max(np.abs(found), axis=(1, 2))) + scale * np.log(2)
        is_finite = np.isfinite(h).all(axis=1)
        is_passed = np.abs(np.diagonal(found, axis1=1, axis2=2)) > 0
        rows.append(
            {
                "identity_error": error,
                "log_norm": norm.astype(np.float32),
                "passing": is_passed.mean(axis=1).astype(np.float32),
                "nonfinite_step": -1 if is_finite.all() else int(np.argmin(is_finite)),
            }
        )
    dims = {"identity_error": (), "log_norm": ("lag",), "passing": ("lag",), "nonfinite_step": ()}
    return xr.Dataset({name: (("seed", *dims[name]), np.stack([row[name] for row in rows])) for name in dims})


def _measure_start(start: str, config: Config) -> xr.Dataset:
    # float64, and only here: the identity is a statement about 200 factors
    with jax.enable_x64(True):
        return xr.concat([_measure_row(start, activation, config) for activation in ACTIVATIONS], dim="activation")


# --- training ---


def _small(key: Any, num_gates: int, hidden_size: int, input_size: int, dtype: Any) -> jax.Array:
    return INPUT_STD * jax.random.normal(key, (num_gates * hidden_size, input_size), dtype)


def _zeros(key: Any, num_gates: int, hidden_size: int, input_size: int, dtype: Any) -> jax.Array:
    return jnp.zeros((num_gates * hidden_size,), dtype)


@functools.cache
def _task(length: int) -> rg.tasks.Task:
    return rg.tasks.adding(length)


@functools.cache
def _model(network: str, length: int, config: Config) -> rg.training.Model:
    size, width = config.hidden_size, _task(length).input_size
    if network in INDRNNS:
        scheme = rg.initializers.Initialization(_small, _small, _zeros)
        above = None if network == "IndRNN, u from U(0, 1)" else length
        layers = [
            rg.cells.indrnn(width, size, init=scheme),
            rg.cells.indrnn(size, size, init=scheme, max_lag=above),
        ]
    else:
        layers = [rg.cells.lstm(width, size, forget_bias=1.0) if network == "LSTM" else rg.cells.vanilla(width, size)]
    return rg.training.model(layers, _task(length).output_size)


def clip_u(bound: float) -> optax.GradientTransformation:
    """Returns the last link of an optimizer: every layer's u stays within ±bound."""

    def update(updates, state, params=None):
        def within(change, layer):
            return change._replace(u=jnp.clip(layer.u + change.u, -bound, bound) - layer.u)

        layers = tuple(within(change, layer) for change, layer in zip(updates.layers, params.layers, strict=True))
        return updates._replace(layers=layers), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@functools.cache
def _trainer(network: str, length: int, config: Config) -> Trainer:
    task, model = _task(length), _model(network, length, config)

    def loss(output, batch):
        return rg.losses.mse(output.outputs, batch.targets, batch.mask)

    def measure(params, key):
        batch = task.batch(key, config.test_size)
        output = model.apply(params, model.init_state((config.test_size,)), batch.inputs)
        measured = {"loss": loss(output, batch), "log2_gain": jnp.asarray(jnp.nan)}
        if network in INDRNNS:
            largest = jnp.max(jnp.stack([jnp.max(jnp.abs(layer.u)) for layer in params.layers]))
            measured["log2_gain"] = length * jnp.log2(largest)
        return measured

    def batch_at(key, step):
        return task.batch(jax.random.fold_in(key, step), config.batch_size)

    links = [rg.remedies.clip_by_global_norm(GRAD_CLIP), optax.adam(RATES[network])]
    if network == "IndRNN, bound":
        links.append(clip_u(2.0 ** (1.0 / length)))
    return Trainer(model, loss, optax.chain(*links), batch_at, measure, batch_size=config.batch_size)


def _train_row(network: str, length: int, config: Config) -> xr.Dataset:
    """Returns the trained networks of one kind at one length: every seed."""
    trainer, threshold = _trainer(network, length, config), SOLVED * _task(length).baseline
    rows = []
    for seed in range(config.first_seed, config.first_seed + config.train_seeds):
        trial = trainer.run(
            jax.random.key(seed),
            updates=config.updates,
            eval_every=config.eval_every,
            until=lambda measured: bool(measured["loss"] < threshold),
        )
        test_loss, gain = (trial.measured[name].astype(np.float32) for name in ("loss", "log2_gain"))
        rows.append(
            {
                "test_loss": test_loss,
                "updates_to_solve": first_reached(trial.updates, test_loss < threshold),
                "log2_gain": gain[int(np.flatnonzero(~np.isnan(test_loss))[-1])],
                "failed_at": trial.failed_at,
            }
        )
    dims = {"test_loss": ("evaluation",), "updates_to_solve": (), "log2_gain": (), "failed_at": ()}
    return xr.Dataset({name: (("trial", *dims[name]), np.stack([row[name] for row in rows])) for name in dims})


MEASURED = (
    "identity_error", "log_norm", "passing", "nonfinite_step", "test_loss", "updates_to_solve", "log2_gain",
    "failed_at",
)  # fmt: skip
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "identity_error": ("1", "largest difference of chain and product over all lags, relative to the largest entry"),
    "log_norm": ("nats", "log ‖∂h_T/∂h_{T−lag}‖₂ of fresh networks, the largest over units"),
    "passing": ("1", "share of units whose ∂h_T/∂h_{T−lag} is not exactly 0"),
    "nonfinite_step": ("steps", "first time step with a non-finite state; −1 for none"),
    "test_loss": ("1", "squared error of the adding problem on held-out sequences; NaN after the end of a trial"),
    "updates_to_solve": ("updates", "the first evaluation at which the loss is below a tenth of 1/6; NaN if never"),
    "log2_gain": ("1", "T log2 max|u| at the last evaluation; 1 is the bound"),
    "failed_at": ("updates", "update whose loss, gradient or weights were not finite; −1 for none"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with medians and intervals over seeds."""
    summarise(dataset, ("log_norm", "passing"), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished rows are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    pieces = [
        Piece(f"fresh-{place}", f"fresh: {start}", functools.partial(_measure_start, start, config))
        for place, start in enumerate(STARTS)
    ]
    for length in config.lengths:
        for place, network in enumerate(NETWORKS):
            trained = functools.partial(_train_row, network, length, config)
            pieces.append(Piece(f"train-{length}-{place}", f"adding T = {length}: {network}", trained))
    measured = command.measure(pieces, parts=parts, screen=screen)
    fresh, trials = measured[: len(STARTS)], measured[len(STARTS) :]
    of_lengths = [xr.concat(trials[i : i + len(NETWORKS)], dim="network") for i in range(0, len(trials), len(NETWORKS))]
    dataset = xr.concat(fresh, dim="start").merge(xr.concat(of_lengths, dim="length"))
    dataset = dataset.assign_coords(
        start=list(STARTS),
        activation=list(ACTIVATIONS),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        lag=np.arange(config.steps + 1),
        network=list(NETWORKS),
        length=list(config.lengths),
        trial=np.arange(config.first_seed, config.first_seed + config.train_seeds),
        evaluation=np.arange(0, config.updates + 1, config.eval_every),
    )
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance(
        "indrnn_bound", config, seconds=seconds, baseline=_task(config.lengths[0]).baseline
    )
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _num_solved(row: xr.Dataset) -> int:
    return int(row["updates_to_solve"].notnull().sum())


def _updates(row: xr.Dataset) -> np.ndarray:
    """Updates until solved, the whole budget where it was not."""
    return row["updates_to_solve"].fillna(float(row["evaluation"][-1])).values


def _solved(row: xr.Dataset) -> str:
    diverged = int((row["failed_at"] >= 0).sum())
    return f"{_num_solved(row)} of {row.sizes['trial']}" + (f", {diverged} diverged" if diverged else "")


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first: fresh networks, then trained ones."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"IndRNN: norm of ∂h_T/∂h_0 at T={config['steps']} (N={config['hidden_size']}, {config['seeds']} seeds), "
        f"and the adding problem ({config['train_seeds']} seeds, {config['updates']} updates at the most)",
        caption="medians over seeds [95 % bootstrap interval]; passing: units whose gradient over T steps is not "
        "exactly 0; updates: median, unsolved trials counted as the whole budget; gain: 2 to the T log2 max|u| after "
        "training",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("network", "φ or T", "log norm, or solved", "passing, or updates", "gain |u|^T"):
        shown.add_column(name, justify="left" if name == "network" else "right")
    for start in STARTS:
        for activation in ACTIVATIONS:
            last = dataset.sel(start=start, activation=activation).isel(lag=-1)
            norm, passing = (
                interval_text(Interval(*(last[f"{name}_{part}"].values for part in Interval._fields)), form)
                for name, form in (("log_norm", ".2f"), ("passing", ".2f"))
            )
            # the others cut nothing; what they lose is too small for float64 beside the largest unit
            shown.add_row(f"fresh: {start}", activation, norm, passing if activation == "relu" else "", "")
    for length in dataset["length"].values.tolist():
        for network in NETWORKS:
            row = dataset.sel(network=network, length=length)
            gain = float(row["log2_gain"].median())
            gains = "" if np.isnan(gain) else f"{2**gain:.3g}"
            shown.add_row(network, f"T = {length}", _solved(row), f"{np.median(_updates(row)):.0f}", gains)
    return shown


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns deciding checks of the identity, both sides of the bound, and the adding problem."""
    checks = []
    broken = bool((dataset["nonfinite_step"].sel(start=list(BOUNDED)) >= 0).any())
    for activation in ACTIVATIONS:
        of = dataset.sel(activation=activation)
        worst = float(of["identity_error"].max())
        name = f"chain = ∏ u φ', worst of all: {activation}"
        checks.append(Check(name, f"{worst:.1e}", f"≤ {IDENTITY_ERROR:g}", worst <= IDENTITY_ERROR, "E3", WHY_IDENTITY))
    for activation in ACTIVATIONS[:2]:
        of = dataset.sel(activation=activation)
        highest = float(np.exp(of["log_norm"].sel(start=list(BOUNDED)).max()))
        # stored in float32: 2 may be rounded up
        below = None if broken else bool(highest <= 2 * (1 + 1e-6))
        name = f"‖∂h_T/∂h_0‖ ≤ 2 with |u| ≤ 2^(1/T), every lag and seed: {activation}"
        checks.append(Check(name, f"{highest:.4f}", "≤ 2", below, "E3", WHY_BOUND))
    for activation in ACTIVATIONS[:2]:
        for start in BOUNDED:
            last = dataset.sel(activation=activation, start=start).isel(lag=-1)
            kept = median_interval(np.exp(last["log_norm"].values), axis=0)
            # judged by the side of the interval that speaks against the claim; an exact 0 counts
            holds = None if broken else bool(kept.low >= 0.5)
            name = f"‖∂h_T/∂h_0‖ ≥ 1/2 at T: {activation}, u {start}"
            checks.append(Check(name, interval_text(kept, ".3g"), "≥ 0.5", holds, "E3", WHY_KEPT))
    enough = json.loads(dataset.attrs["config"])["updates"] >= 100
    for length in dataset["length"].values.tolist():
        of = dataset.sel(length=length)
        bound, none = of.sel(network=NETWORKS[0]), of.sel(network=NETWORKS[1])
        most = _num_solved(bound) > bound.sizes["trial"] / 2 if enough else None
        name = f"adding T = {length} is solved by most seeds with the bound"
        checks.append(Check(name, _solved(bound), f"> {bound.sizes['trial'] / 2:g}", most, "E3", WHY_SOLVED))
        for other, why in ((NETWORKS[1], WHY_USE), ("vanilla tanh", WHY_BASELINE), ("LSTM", WHY_BASELINE)):
            row = none if other == NETWORKS[1] else of.sel(network=other)
            more = median_interval(_updates(row) - _updates(bound), axis=0)
            tried = _num_solved(row) + _num_solved(bound) > 0
            name = f"prediction: fewer updates with the bound: {other}, T = {length}"
            value = f"{_solved(row)}, {interval_text(more, '+.0f')} updates"
            holds = bool(more.low > 0) if tried else None
            checks.append(Check(name, value, "> 0", holds, "E3", why, decides=False))
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a few sentences."""
    checks = verdict(dataset)
    exact = all(check.holds for check in checks if check.name.startswith("chain"))
    true = all(check.holds for check in checks if "≤ 2 with" in check.name)
    sentence = f"the chain {'is' if exact else 'is not'} the product of numbers, and its norm "
    sentence += "never exceeds 2 with |u| ≤ 2^(1/T)" if true else "exceeds 2 in spite of |u| ≤ 2^(1/T)"
    at = {}
    for activation in ACTIVATIONS[:2]:
        last = dataset.sel(activation=activation, start=BOUNDED[0]).isel(lag=-1)
        at[activation] = float(np.exp(last["log_norm_median"])), float(last["passing_median"])
    sentence += (
        f"; over {int(dataset['lag'][-1])} steps the largest unit keeps {at['relu'][0]:.2g} with relu, where "
        f"{100 * at['relu'][1]:.0f} % of the units pass anything, and {at['tanh'][0]:.2g} with tanh.  "
    )
    phrases = []
    for length in dataset["length"].values.tolist():
        solved = {name: _solved(dataset.sel(length=length, network=name)) for name in NETWORKS}
        phrases.append(
            f"at T = {length} by {solved[NETWORKS[0]]} seeds with the bound, {solved[NETWORKS[1]]} without, "
            f"{solved[NETWORKS[2]]} with u from U(0, 1), {solved['vanilla tanh']} of vanilla tanh, {solved['LSTM']} "
            "of LSTM"
        )
    return {"E3": f"{sentence}Adding is solved {'; '.join(phrases)}."}


_STARTS: dict[str, dict[str, Any]] = {
    "U(0, 1)": {"color": "#c81e4a", "linestyle": ":", "label": "u from U(0, 1)"},
    "within the bound": {"color": "#16325c", "linestyle": "-", "label": "u from U(2^(−1/T), 2^(1/T))"},
    "at the bound": {"color": "#0f9b76", "linestyle": "--", "label": "u = 2^(1/T), the bound"},
    "u = 4^{1/T}": {"color": "#d97706", "linestyle": "-.", "label": "u = 4^(1/T), beyond it"},
}
_NETWORKS: dict[str, dict[str, Any]] = {
    "IndRNN, bound": {"color": "#16325c", "linestyle": "-"},
    "IndRNN, no bound": {"color": "#0f9b76", "linestyle": "--"},
    "IndRNN, u from U(0, 1)": {"color": "#c81e4a", "linestyle": ":"},
    "vanilla tanh": {"color": "#d97706", "linestyle": "-."},
    "LSTM": {"color": "#7f7f7f", "linestyle": "-"},
}


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: above fresh networks, below learning curves."""
    config = json.loads(dataset.attrs["config"])
    lengths = dataset["length"].values.tolist()
    drawn = matplotlib.figure.Figure(figsize=(11.6, 7.8), layout="constrained")
    halves: Any = drawn.subfigures(2, 1)
    above, below = halves
    panels = above.subplots(1, 3)
    lags = dataset["lag"].values
    for axes, activation, name in zip(
        panels, ("relu", "tanh", "relu"), ("log_norm", "log_norm", "passing"), strict=True
    ):
        for start, style in _STARTS.items():
            row = dataset.sel(start=start, activation=activation)
            median, low, high = (row[f"{name}_{part}"].values for part in Interval._fields)
            shown = np.isfinite(median)
            axes.plot(lags[shown], median[shown], linewidth=1.8, **style)
            axes.fill_between(lags[shown], low[shown], high[shown], color=style["color"], alpha=0.2, linewidth=0)
        axes.set_xlabel("lag (steps)")
        if name == "log_norm":
            axes.axhspan(-np.log(2), np.log(2), color="0.85", zorder=0)
            axes.set_ylabel("log norm of ∂h_T/∂h at that lag (nats)")
            # what falls far below is cut off: the question is whether the grey band is left
            axes.set_ylim(-12, 2.5)
            axes.set_title(f"{activation}: the largest unit (grey: 1/2 to 2)", fontsize=10.5)
        else:
            axes.set_ylim(0, 1.02)
            axes.set_ylabel("share of units")
            axes.set_title("relu: units that pass any gradient", fontsize=10.5)
    curves = below.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axes, length in zip(curves, lengths, strict=True):
        for network, style in _NETWORKS.items():
            row = dataset.sel(network=network, length=length)
            for trial in row["test_loss"].transpose("trial", "evaluation").values:
                axes.plot(row["evaluation"].values, trial, linewidth=1.3, alpha=0.85, **style)
        axes.axhline(SOLVED * dataset.attrs["baseline"], color="0.3", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_title(f"adding problem, T = {length}", fontsize=10.5)
        axes.set_xlabel("updates")
    across = curves[0].get_yaxis_transform()
    curves[0].text(0.01, 0.95 * SOLVED * dataset.attrs["baseline"], "solved", transform=across, va="top", fontsize=9)
    curves[0].set_ylabel("held-out squared error")
    for axes in (*panels, *curves):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    lines = [matplotlib.lines.Line2D([], [], linewidth=1.8, label=name, **style) for name, style in _NETWORKS.items()]
    below.legend(handles=lines, loc="outside lower center", ncols=5, frameon=False)
    drawn.suptitle(
        f"IndRNN with |u| ≤ 2^(1/T).  Above: fresh networks, T={config['steps']}, N={config['hidden_size']}, "
        f"{config['seeds']} seeds: median, 95 % interval\nBelow: learning to add, {config['train_seeds']} seeds, one "
        "line each; a line ends when solved",
        fontsize=11,
    )
    return drawn


ABOUT = """IndRNN with |u| ≤ 2^{1/T}: does the bound keep gradients over T steps, and does it solve the adding problem?

Compares the chain with the product of numbers, measures its norm for weights within, at and beyond the bound, and
trains on the adding problem with and without it beside a vanilla network and an LSTM; writes a table, a figure and a
netCDF file."""

CAPTION = """Above: norm of the long-term Jacobian of fresh IndRNNs against lag, for relu and tanh, and the share of
relu units that pass any gradient, with recurrent weights within, at and beyond the bound.  Below: held-out error of
IndRNNs with and without the bound, of a vanilla network and of an LSTM on the adding problem."""

EXPERIMENT = command.Experiment(
    name="indrnn_bound",
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
