"""How much do the norm bounds say about a gradient through time, and are they true?

It holds the norm of the true chain of step Jacobians against (σ_max(U) sup|φ'|)^lag, against the same with sup|φ'| = 1
for the sigmoid and with the largest eigenvalue for σ_max, and the gated term of one LSTM step against the product of
three norms.  Each is measured over several seeds (weights and inputs from N(0, 1)), in float64.  Running time: about
half a minute on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.lines
import numpy as np
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, stored_text, summarise

_SOURCE = "lecture notes after Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, section 2.1"

CLAIMS = (
    Claim(
        "A1",
        "The chain of step Jacobians is the gradient's factor, ‖∂h_t/∂h_k‖ ≤ (β_W β_φ)^{t−k}, and it decays or "
        "explodes as this power; β_W is the largest eigenvalue of U.",
        source=_SOURCE + "; some put the largest eigenvalue where the largest singular value belongs",
        prediction="the identity is exact (relative difference at most 1e-10 over 100 steps in float64); with "
        "β_W = σ_max(U) and β_φ = 1 for tanh, 1/4 for sigmoid, the bound is true at every lag and loose by 10 decades "
        "or more at lag 100; with the largest eigenvalue it is false, U = [[2, −2], [2, −2]] has only the eigenvalue "
        "0 and a relu chain that doubles at every step",
        refuted="the identity or the bound fails in any seed; as a statement of how fast the chain decays, the bound "
        "is off by more than one decade at lag 100",
        functions=("rg.jacobian_chain", "rg.retention", "rg.theory.norm_bound"),
        tests=("tests/test_bounds.py", "tests/test_theory.py"),
    ),
    Claim(
        "A2",
        "Since sigmoid' ≤ 1, a vanilla cell with sigmoid obeys the bound with β_φ = 1.",
        source=_SOURCE + "; the slope of the sigmoid is at most 1/4",
        prediction="true at every lag, and it excludes nothing: its rate log σ_max(U) is not below 0 for weights of "
        "any usual initialisation, where 1/4 in place of 1 takes 60 decades off at lag 100",
        refuted="the bound fails in any seed, or does not exclude that the chain grows",
        functions=("rg.jacobian_chain", "rg.theory.norm_bound"),
        tests=("tests/test_bounds.py", "tests/test_theory.py"),
    ),
    Claim(
        "B4",
        "The gated term of the LSTM's ∂c'/∂c, that which is not the forget gate, is bounded by a product γ_w γ_x γ_h.",
        source="introductions to the LSTM that add the term to ∂C_t/∂C_{t−1} = f, without saying what the factors are",
        prediction="read as γ_w = σ_max of U_i, U_f, U_g stacked, γ_x = the largest length of (c f', g i', i g') over "
        "units, γ_h = the largest o (1 − tanh² c), it is true at every step",
        refuted="the term exceeds the product at some step of some seed",
        functions=("rg.step_jacobians", "rg.theory.gate_term_factors", "rg.theory.gate_term_bound"),
        tests=("tests/test_bounds.py", "tests/test_theory.py"),
    ),
)

Activation = Literal["tanh", "sigmoid", "relu"]
InitName = Literal["torch", "flax", "equinox", "keras", "haiku", "gaussian", "orthogonal"]

IDENTITY = 1e-10
"""Largest relative difference between product and derivative that counts as round-off."""
WHY_IDENTITY = "round-off: 100 products of 32 × 32 matrices round to 100 · 32 · 2e-16 = 1e-12 where little cancels"
ROUND_OFF = 1e-9
"""Nats by which a measured norm may exceed a bound that is reached."""
CLOSE = 1.0
"""Decades at lag 100 within which a bound counts as a statement of how fast the chain decays."""
WHY_CLOSE = "one decade over 100 steps is a rate off by 0.023 nats per step"
WHY_TRUE = "‖AB‖ ≤ ‖A‖ ‖B‖ and ‖diag(φ') U‖ ≤ sup|φ'| σ_max(U); 1e-9 nats are left to round-off where it is reached"
PREDICTED = 10.0
"""Decades by which the bound was predicted to be loose there, at least."""
WHY_PREDICTED = "first runs: loose by tens of decades"
WHY_EXCLUDES = "a bound of rate 0 or above holds of every chain that does not grow, and says nothing of vanishing"
WHY_EIGENVALUE = "what a bound with β_W = largest |eigenvalue| of U says"
WHY_GATES = "‖Σ diag(v_j) U_j diag(w)‖ ≤ γ_w γ_x γ_h by Cauchy and Schwarz (rg.theory.gate_term_factors)"
CHECK_LAG = 100

COUNTER_EXAMPLE = np.array([[2.0, -2.0], [2.0, -2.0]])
"""Nilpotent, and diag(1, 0) U has the eigenvalue 2.  With relu, b = (−1, −3) and h = (1, 0) the state stands still."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the bounds experiment."""

    activations: tuple[Activation, ...] = ("tanh", "sigmoid")
    """φ of the vanilla cells."""
    inits: tuple[InitName, ...] = ("torch", "gaussian", "orthogonal")
    """Initialisations: a library's default, or a scheme at gain 1; of the vanilla cells and of the LSTMs."""
    forget_bias: float = 1.0
    """Effective forget bias of the LSTMs."""
    steps: int = 100
    """Time steps T; lags run from 0 to T."""
    hidden_size: int = 32
    """Units N."""
    input_size: int = 16
    """Width D of the input, drawn from N(0, 1)."""
    seeds: int = 10
    """Independent repetitions; each draws weights and inputs."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(inits=("torch", "orthogonal"), steps=30, hidden_size=8, input_size=4, seeds=3)
"""A few seconds: every code path, no statement about the claims."""


def rows_of(config: Config) -> list[tuple[Activation, InitName]]:
    """Returns the rows of the table of chains."""
    return [(activation, init) for activation in config.activations for init in config.inits]


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"steps": 2, "hidden_size": 1, "input_size": 1, "seeds": 1, "first_seed": 0}
    command.check_at_least(config, least)
    for name in ("activations", "inits"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise UserError(f"--{name}: expected one name or more, each once, found {' '.join(values) or 'none'}")
    if not np.isfinite(config.forget_bias):
        raise UserError(f"--forget-bias: expected a finite number, found {config.forget_bias}")


@functools.cache
def _vanilla(activation: Activation, init: InitName, config: Config) -> rg.Cell:
    return rg.cells.vanilla(config.input_size, config.hidden_size, activation=activation, init=init, dtype="float64")


@functools.cache
def _lstm(init: InitName, config: Config) -> rg.Cell:
    return rg.cells.lstm(
        config.input_size, config.hidden_size, init=init, forget_bias=config.forget_bias, dtype="float64"
    )


def _draw(cell: rg.Cell, config: Config) -> tuple[Any, jax.Array]:
    """Returns parameters and inputs of every seed, leading axis seed."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 2))(
        jnp.arange(config.first_seed, config.first_seed + config.seeds)
    )
    shape = (config.steps, config.input_size)
    return jax.vmap(cell.init)(keys[:, 0]), jax.vmap(lambda key: jax.random.normal(key, shape, "float64"))(keys[:, 1])


@functools.partial(jax.jit, static_argnames=("cell",))
def _measure_chain(cell, params, xs):
    """Spectral norm by lag, and how far ∂h_T/∂h_0 by the product is from its derivative through the unroll."""

    def one(params, xs):
        state = cell.init_state()
        chain = rg.jacobian_chain(cell, params, state, xs)
        last = lambda h: rg.unroll(cell, params, state._replace(h=h), xs).final.h
        derivative = rg.logscaled.from_array(jax.jacfwd(last)(state.h))
        product = jax.tree.map(lambda leaf: leaf[0], chain)
        return jnp.flip(rg.logscaled.log_norm(chain, "spectral")), rg.logscaled.log_distance(product, derivative)

    return jax.vmap(one)(params, xs)


def _measure_row(activation: Activation, init: InitName, config: Config) -> xr.Dataset:
    """Returns the dataset of one vanilla cell: every seed."""
    params, xs = _draw(_vanilla(activation, init, config), config)
    # cells of one activation differ in how they draw weights and in nothing else: one compilation for all
    measured_cell = _vanilla(activation, config.inits[0], config)
    log_chain, log_error = (np.asarray(values) for values in _measure_chain(measured_cell, params, xs))
    weights = np.asarray(params.w_hh)
    return xr.Dataset(
        {
            "log_chain": (("seed", "lag"), log_chain),
            "log_identity_error": (("seed",), log_error),
            "bound_rate": (("seed",), np.array([rg.theory.norm_bound(w, activation) for w in weights])),
            "log_radius": (("seed",), np.log(np.abs(np.linalg.eigvals(weights)).max(axis=-1))),
        }
    )


@functools.partial(jax.jit, static_argnames=("cell",))
def _measure_gates(cell, params, xs):
    """The gated term of ∂c'/∂c at the steps 1 … T−1, and what its bounds are made of."""

    def one(params, xs):
        states, gates, _ = rg.unroll(cell, params, cell.init_state(), xs)
        n = states.c.shape[-1]
        jacobians = rg.step_jacobians(cell, params, cell.init_state(), xs)[1:, n:, :n]  # ∂c'/∂h
        o, c = gates.o[:-1], states.c[:-1]
        terms = jacobians * (o * (1 - jnp.tanh(c) ** 2))[:, None, :]
        return rg.logscaled.log_norm(rg.logscaled.from_array(terms), "spectral"), gates, c

    return jax.vmap(one)(params, xs)


def _measure_gate_row(init: InitName, config: Config) -> xr.Dataset:
    """Returns the dataset of one LSTM: every seed, every step but the first, which has no gates before it."""
    params, xs = _draw(_lstm(init, config), config)
    measured = _measure_gates(_lstm(config.inits[0], config), params, xs)
    log_term, gates, memory = jax.tree.map(np.asarray, measured)
    at_step, at_worst = np.empty_like(log_term), np.empty_like(log_term)
    for seed, w_hh in enumerate(np.asarray(params.w_hh)):
        at_worst[seed] = rg.theory.gate_term_bound(w_hh, float(np.abs(memory[seed]).max())).log_norm
        i, f, g = (values[seed, 1:] for values in (gates.i, gates.f, gates.g))
        at_step[seed] = rg.theory.gate_term_factors(w_hh, i, f, g, gates.o[seed, :-1], memory[seed]).log_norm
    return xr.Dataset(
        {
            "log_gate_term": (("seed", "step"), log_term),
            "log_gate_bound": (("seed", "step"), at_step),
            "log_gate_worst": (("seed", "step"), at_worst),
            "log_direct_term": (("seed", "step"), np.log(gates.f[:, 1:].max(axis=-1))),
        }
    )


def _measure_counter_example(config: Config) -> xr.Dataset:
    """Returns the chain of a relu network with nilpotent weights that stands still at h = (1, 0)."""
    cell = rg.cells.vanilla(1, 2, activation="relu", dtype="float64")
    params = cell.init(jax.random.key(0))._replace(
        w_ih=jnp.zeros((2, 1)), w_hh=jnp.asarray(COUNTER_EXAMPLE), b=jnp.array([-1.0, -3.0])
    )
    state = cell.init_state()._replace(h=jnp.array([1.0, 0.0]))
    curve = rg.retention(cell, params, state, jnp.zeros((config.steps, 1)), norm="spectral")
    return xr.Dataset(
        {
            "counter_log_chain": (("lag",), np.asarray(curve.log_norm)),
            "counter_radius": ((), np.abs(np.linalg.eigvals(COUNTER_EXAMPLE)).max()),
            "counter_bound_rate": ((), rg.theory.norm_bound(COUNTER_EXAMPLE, "relu")),
        }
    )


MEASURED = (
    "log_chain",
    "log_identity_error",
    "bound_rate",
    "log_radius",
    "log_gate_term",
    "log_gate_bound",
    "log_gate_worst",
    "log_direct_term",
    "counter_log_chain",
    "counter_radius",
    "counter_bound_rate",
)
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "log_chain": ("nats", "log ‖∂h_T/∂h_{T−lag}‖₂"),
    "log_identity_error": ("nats", "log relative difference of ∂h_T/∂h_0 by product and by forward derivative"),
    "bound_rate": ("nats per step", "log(σ_max(U) sup|φ'|), sup|φ'| = 1/4 for sigmoid"),
    "log_radius": ("nats per step", "log of the largest |eigenvalue| of U"),
    "log_gate_term": ("nats", "log of the spectral norm of the gated term of ∂c'/∂c"),
    "log_gate_bound": ("nats", "log γ_w γ_x γ_h at the step's gates"),
    "log_gate_worst": ("nats", "log γ_w γ_x γ_h for any gates and the largest |c| of the run"),
    "log_direct_term": ("nats", "log of the largest forget gate, the norm of the direct term"),
    "counter_log_chain": ("nats", "log ‖∂h_T/∂h_{T−lag}‖₂ of the counter-example"),
    "counter_radius": ("1", "largest |eigenvalue| of the counter-example's U, as computed"),
    "counter_bound_rate": ("nats per step", "log(σ_max(U) sup|φ'|) of the counter-example"),
    "looseness": ("decades", "log10 of bound over chain at check_lag"),
    "looseness_slope_1": ("decades", "the same with sup|φ'| = 1"),
    "rate_slope_1": ("nats per step", "log σ_max(U)"),
    "excess": ("nats", "largest log of chain over bound at any lag above 0; positive where the bound is false"),
    "radius_excess": ("nats", "the same with the largest eigenvalue in place of σ_max"),
    "gate_looseness": ("decades", "log10 of γ_w γ_x γ_h over the gated term, median over steps"),
    "gate_worst_looseness": ("decades", "the same for the bound that holds for any gates"),
    "gate_excess": ("nats", "largest log of the gated term over either bound at any step"),
    "gate_over_direct": ("decades", "log10 of the gated over the direct term's norm, median over steps"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with the quantities that follow from the measured ones, and medians with intervals."""
    lags, at = dataset["lag"], dataset.attrs["check_lag"]
    chain, bound, ln10 = dataset["log_chain"], dataset["bound_rate"], float(np.log(10))
    # what σ' ≤ 1 in place of 1/4 costs per step; the other activations have 1
    slope = xr.where(dataset["activation"] == "sigmoid", np.log(4.0), 0.0)
    dataset["looseness"] = (at * bound - chain.sel(lag=at)) / ln10
    dataset["looseness_slope_1"] = dataset["looseness"] + at * slope / ln10
    dataset["rate_slope_1"] = bound + slope
    dataset["excess"] = (chain - lags * bound).isel(lag=slice(1, None)).max("lag")
    radius = dataset["log_radius"] - slope
    dataset["radius_excess"] = (chain - lags * radius).isel(lag=slice(1, None)).max("lag")
    term = dataset["log_gate_term"]
    dataset["gate_looseness"] = ((dataset["log_gate_bound"] - term) / ln10).median("step")
    dataset["gate_worst_looseness"] = ((dataset["log_gate_worst"] - term) / ln10).median("step")
    tightest = np.minimum(dataset["log_gate_bound"], dataset["log_gate_worst"])
    dataset["gate_excess"] = (term - tightest).max("step")
    dataset["gate_over_direct"] = ((term - dataset["log_direct_term"]) / ln10).median("step")
    summarise(
        dataset,
        (
            "log_chain",
            "looseness",
            "looseness_slope_1",
            "rate_slope_1",
            "bound_rate",
            "excess",
            "log_gate_term",
            "log_gate_bound",
            "log_gate_worst",
            "gate_looseness",
            "gate_worst_looseness",
            "gate_over_direct",
        ),
        _DESCRIPTIONS,
    )
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
    rows = rows_of(config)
    pieces = [
        Piece(
            f"{activation}-{init}", f"{activation}, {init}", functools.partial(_measure_row, activation, init, config)
        )
        for activation, init in rows
    ]
    pieces += [
        Piece(f"lstm-{init}", f"lstm, {init}", functools.partial(_measure_gate_row, init, config))
        for init in config.inits
    ]
    pieces.append(Piece("counter-example", "counter-example", functools.partial(_measure_counter_example, config)))
    with jax.enable_x64(True):
        measured = command.measure(pieces, parts=parts, screen=screen)
    chains = xr.concat(measured[: len(rows)], dim="row")
    gated = xr.concat(measured[len(rows) : -1], dim="lstm")
    dataset = xr.merge([chains, gated, measured[-1]]).assign_coords(
        activation=("row", [activation for activation, _ in rows]),
        init=("row", [init for _, init in rows]),
        lstm=list(config.inits),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
        lag=np.arange(config.steps + 1),
        step=np.arange(1, config.steps),
    )
    seconds, check_lag = time.perf_counter() - started, min(CHECK_LAG, config.steps)
    dataset.attrs = command.provenance("bounds", config, seconds=seconds, dtype="float64", check_lag=check_lag)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _rows(dataset: xr.Dataset) -> list[xr.Dataset]:
    return [dataset.isel(row=index) for index in range(dataset.sizes["row"])]


def _lstms(dataset: xr.Dataset) -> list[xr.Dataset]:
    return [dataset.isel(lstm=index) for index in range(dataset.sizes["lstm"])]


def _label(row: xr.Dataset) -> str:
    return f"{row['activation'].values}, {row['init'].values}"


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    attrs, config = dataset.attrs, json.loads(dataset.attrs["config"])
    at = attrs["check_lag"]
    shown = rich.table.Table(
        title=f"Bound over truth: N={config['hidden_size']}, D={config['input_size']}, T={config['steps']}, "
        f"{config['seeds']} seeds, {attrs['dtype']}, {attrs['backend']}",
        caption=f"medians over seeds [{100 * attrs['confidence']:.0f} % bootstrap interval]; looseness in decades: of "
        f"a chain at lag {at}, of a gated term per step",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("what is bounded", "bound, nats per step", "looseness", "looseness with\nφ' ≤ 1 / any gates"):
        shown.add_column(name, justify="left" if name == "what is bounded" else "right")
    for row in _rows(dataset):
        shown.add_row(
            f"chain, {_label(row)}",
            stored_text(row, "bound_rate", ".3f"),
            stored_text(row, "looseness", ".1f"),
            stored_text(row, "looseness_slope_1", ".1f"),
        )
    for row in _lstms(dataset):
        shown.add_row(
            f"gated term, lstm, {row['lstm'].values}",
            "—",
            stored_text(row, "gate_looseness", ".2f"),
            stored_text(row, "gate_worst_looseness", ".2f"),
        )
    return shown


def _not_above_zero(name: str, excess: float, claim: str, why: str) -> Check:
    return Check(name, f"excess {excess:.2g} nats", "≤ 0", bool(excess <= ROUND_OFF), claim, why)


def _excess_with_slope_1(row: xr.Dataset) -> float:
    """Returns by how much the chain of a row exceeds σ_max^lag, at the worst lag of the worst seed."""
    return float((row["log_chain"] - row["lag"] * row["rate_slope_1"]).isel(lag=slice(1, None)).max())


def _checks_of_a1(dataset: xr.Dataset) -> list[Check]:
    at, ln10 = dataset.attrs["check_lag"], np.log(10)
    error = float(dataset["log_identity_error"].max()) / ln10
    checks = [
        Check(
            "product = derivative, worst seed",
            f"10^{error:.1f}",
            f"≤ {IDENTITY:g}",
            bool(error <= np.log10(IDENTITY)),
            "A1",
            WHY_IDENTITY,
        ),
        _not_above_zero("bound true at every lag, worst seed", float(dataset["excess"].max()), "A1", WHY_TRUE),
    ]
    for row in _rows(dataset):
        checks.append(
            Check(
                f"decays as (β_W β_φ)^{at}: {_label(row)}",
                f"off by 10^{stored_text(row, 'looseness', '.1f')}",
                f"≤ 10^{CLOSE:g}",
                bool(float(row["looseness_high"]) <= CLOSE),
                "A1",
                WHY_CLOSE,
            )
        )
    radius = float(dataset["counter_radius"])
    chain = float(dataset["counter_log_chain"].sel(lag=at)) / ln10
    checks.append(
        Check(
            "largest eigenvalue bounds the chain: [[2, −2], [2, −2]]",
            f"chain 10^{chain:.1f}",
            f"≤ ({radius:.0e})^{at}",
            bool(chain <= at * np.log10(max(radius, np.finfo(float).tiny))),
            "A1",
            WHY_EIGENVALUE,
        )
    )
    broken = float((dataset["radius_excess"] > ROUND_OFF).mean())
    name = "largest eigenvalue bounds the chain: all rows"
    checks.append(Check(name, f"broken in {broken:.0%} of runs", "0%", broken == 0, "A1", WHY_EIGENVALUE))
    if at == CHECK_LAG:
        low = float(dataset["looseness_low"].min())
        name, bound = f"prediction, loose at lag {at}, lowest row", f"≥ 10^{PREDICTED:g}"
        checks.append(Check(name, f"10^{low:.1f}", bound, bool(low >= PREDICTED), "A1", WHY_PREDICTED, decides=False))
    return checks


def _sigmoid_rows(dataset: xr.Dataset) -> list[xr.Dataset]:
    return [row for row in _rows(dataset) if str(row["activation"].values) == "sigmoid"]


def _checks_of_a2(dataset: xr.Dataset) -> list[Check]:
    rows = _sigmoid_rows(dataset)
    if not rows:
        return [Check("with σ' ≤ 1 the bound is true", "no sigmoid row was run", "≤ 0", None, "A2", WHY_TRUE)]
    name, excess = "with σ' ≤ 1 the bound is true at every lag, worst seed", max(map(_excess_with_slope_1, rows))
    checks = [_not_above_zero(name, excess, "A2", WHY_TRUE)]
    for row in rows:
        name, rate = (
            f"with σ' ≤ 1 the bound says something: {row['init'].values}",
            stored_text(row, "rate_slope_1", ".3f"),
        )
        says = bool(float(row["rate_slope_1_high"]) < 0)
        checks.append(Check(name, f"rate {rate}", "< 0", says, "A2", WHY_EXCLUDES))
    return checks


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks of every claim, each judged by the seed or the end of the interval that speaks against it."""
    gates = [
        _not_above_zero(
            f"gated term ≤ γ_w γ_x γ_h at every step: {row['lstm'].values}", float(row["gate_excess"].max()), "B4",
            WHY_GATES,
        )
        for row in _lstms(dataset)
    ]  # fmt: skip
    return [*_checks_of_a1(dataset), *_checks_of_a2(dataset), *gates]


def _summary_of_a1(dataset: xr.Dataset, checks: list[Check]) -> str:
    def all_hold(words: str) -> bool:
        return all(check.holds for check in checks if words in check.name)

    close = [check.name.split(": ", 1)[1] for check in checks if "decays as" in check.name and check.holds]
    low, high = float(dataset["looseness_median"].min()), float(dataset["looseness_median"].max())
    sentence = (
        f"read as an identity it is {'exact' if all_hold('product = derivative') else 'broken'}; read as an upper "
        f"bound, with the largest singular value for β_W, it is {'true' if all_hold('bound true') else 'broken'} at "
        f"every lag; read as how fast the chain decays it is off by {low:.0f} to {high:.0f} decades at lag "
        f"{dataset.attrs['check_lag']}"
        + (f" and close only for {'; '.join(close)}" if close else "")
        + ".  With the largest eigenvalue for β_W the bound is "
        + ("kept." if all_hold("largest eigenvalue") else "broken.")
    )
    if not all_hold("prediction"):
        sentence += "  The predicted looseness came out smaller somewhere."
    return sentence


def _summary_of_a2(dataset: xr.Dataset, checks: list[Check]) -> str:
    rows = _sigmoid_rows(dataset)
    if not rows:
        return "no sigmoid row was run: the claim is not tried."
    true, *says = checks
    rates = [float(row["rate_slope_1_median"]) for row in rows]
    loose = [float(row["looseness_slope_1_median"]) for row in rows]
    something = [check.name.split(": ", 1)[1] for check in says if check.holds]
    return (
        f"with σ' ≤ 1 the bound is {'true' if true.holds else 'broken'}, at {min(rates):.2f} to {max(rates):.2f} nats "
        f"per step and {min(loose):.0f} to {max(loose):.0f} decades above the chain at lag "
        f"{dataset.attrs['check_lag']}; it excludes "
        + ("that the chain grows" if something else "nothing")
        + (f", for {'; '.join(something)}." if 0 < len(something) < len(says) else ".")
        + "  It says something only if σ_max(U) < 1; the slope of the sigmoid is at most 1/4."
    )


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the findings, claim by claim."""
    checks = verdict(dataset)
    of = {claim.id: [check for check in checks if check.claim == claim.id] for claim in CLAIMS}
    loose = float(dataset["gate_looseness_median"].max())
    sizes = [10 ** float(row["gate_over_direct_median"]) for row in _lstms(dataset)]
    above = [check.name.split(": ", 1)[1] for check in of["B4"] if not check.holds]
    return {
        "A1": _summary_of_a1(dataset, of["A1"]),
        "A2": _summary_of_a2(dataset, of["A2"]),
        "B4": (
            "the gated term "
            + (f"exceeds γ_w γ_x γ_h for {'; '.join(above)}" if above else "stays below γ_w γ_x γ_h at every step")
            + f"; the product is loose by {loose:.1f} decades a step at the most, and the gated term of one step has "
            f"{min(sizes):.2f} to {max(sizes):.2f} times the norm of the forget gate's."
        ),
    }


_COLORS = ("#16325c", "#d97706", "#2a9d6f", "#c81e4a", "#7a4fb5", "#8a6d3b", "#4b5563")
_TRUTH: dict[str, Any] = {"linestyle": "-", "linewidth": 1.8}
_BOUND: dict[str, Any] = {"linestyle": (0, (5, 2)), "linewidth": 1.5}
_WEAK: dict[str, Any] = {"linestyle": ":", "linewidth": 1.5}


def _decades(values: Any) -> np.ndarray:
    return np.asarray(values) / np.log(10)


def _draw_chains(axes: Any, dataset: xr.Dataset, activation: str) -> None:
    lags = dataset["lag"].values
    for row in _rows(dataset):
        if str(row["activation"].values) != activation:
            continue
        color = _COLORS[list(dataset["lstm"].values).index(str(row["init"].values)) % len(_COLORS)]
        axes.plot(lags, _decades(row["log_chain_median"]), color=color, **_TRUTH)
        low, high = _decades(row["log_chain_low"]), _decades(row["log_chain_high"])
        axes.fill_between(lags, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(lags, _decades(lags * float(row["bound_rate_median"])), color=color, **_BOUND)
        if activation == "sigmoid":
            axes.plot(lags, _decades(lags * float(row["rate_slope_1_median"])), color=color, **_WEAK)
    axes.axhline(0, color="0.3", linewidth=0.8)
    loose = dataset["looseness_median"].values[dataset["activation"].values == activation]
    axes.text(
        0.03, 0.05, f"at lag {dataset.attrs['check_lag']} the bound is\n10^{loose.min():.0f} to 10^{loose.max():.0f} "
        "times the truth",
        transform=axes.transAxes, va="bottom", fontsize=9,
    )  # fmt: skip
    axes.set_title(f"vanilla RNN, {activation}", fontsize=11)
    axes.set_xlabel("lag T − k (steps)")
    axes.set_ylabel("log10 ‖∂h_T/∂h_k‖₂")


def _draw_gates(axes: Any, dataset: xr.Dataset) -> None:
    steps = dataset["step"].values
    for index, row in enumerate(_lstms(dataset)):
        color = _COLORS[index % len(_COLORS)]
        axes.plot(steps, _decades(row["log_gate_term_median"]), color=color, **_TRUTH)
        low, high = _decades(row["log_gate_term_low"]), _decades(row["log_gate_term_high"])
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, _decades(row["log_gate_bound_median"]), color=color, **_BOUND)
        axes.plot(steps, _decades(row["log_gate_worst_median"]), color=color, **_WEAK)
    axes.set_title("LSTM, gated term of one step's ∂c'/∂c", fontsize=11)
    axes.set_xlabel("time step")
    axes.set_ylabel("log10 of its spectral norm")


def _draw_counter_example(axes: Any, dataset: xr.Dataset) -> None:
    lags = dataset["lag"].values
    axes.plot(lags, _decades(dataset["counter_log_chain"]), color="0.15", **_TRUTH)
    axes.plot(lags, _decades(lags * float(dataset["counter_bound_rate"])), color="0.15", **_BOUND)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_title("U = [[2, −2], [2, −2]], relu: every eigenvalue is 0", fontsize=11)
    axes.set_xlabel("lag T − k (steps)")
    axes.set_ylabel("log10 ‖∂h_T/∂h_k‖₂")
    axes.text(
        0.98, 0.07, "a bound by eigenvalues would be −∞", transform=axes.transAxes, ha="right", va="bottom", fontsize=9
    )


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: chains and their bounds by activation, the counter-example, the LSTM's gated term."""
    activations = list(dict.fromkeys(dataset["activation"].values.tolist()))
    num_panels = len(activations) + 2
    num_rows = (num_panels + 1) // 2
    drawn = matplotlib.figure.Figure(figsize=(10, 3.5 * num_rows + 1.6), layout="constrained")
    panels = list(drawn.subplots(num_rows, 2, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    for axes, activation in zip(panels, activations, strict=False):
        _draw_chains(axes, dataset, activation)
    _draw_counter_example(panels[len(activations)], dataset)
    _draw_gates(panels[len(activations) + 1], dataset)
    for axes in panels[num_panels:]:
        axes.set_axis_off()
    line = matplotlib.lines.Line2D
    handles = [
        line([], [], color=_COLORS[index % len(_COLORS)], linewidth=4, label=f"init: {init}")
        for index, init in enumerate(dataset["lstm"].values)
    ]
    handles += [
        line([], [], color="0.15", label="measured: the truth", **_TRUTH),
        line([], [], color="0.15", label="bound: (σ_max sup|φ'|)^lag, γ_w γ_x γ_h", **_BOUND),
        line([], [], color="0.15", label="weaker: with σ' ≤ 1, for any gates", **_WEAK),
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    config = json.loads(dataset.attrs["config"])
    drawn.suptitle(
        "Do the norm bounds (dashed) say how fast the gradient decays (solid)?\n"
        f"N={config['hidden_size']}, {config['seeds']} seeds: median and its 95 % interval",
        fontsize=11,
    )
    return drawn


ABOUT = """How much do the norm bounds say about a gradient through time, and are they true?

Holds the chain of step Jacobians against (σ_max(U) sup|φ'|)^lag and against the bound by eigenvalues, and the
gated term of the LSTM's memory Jacobian against a product of three norms."""

CAPTION = """Norms of the true gradient chain (solid) under the bounds that are put on them (dashed and dotted)
against lag, for tanh and sigmoid; a network whose eigenvalues are all 0 and whose gradient explodes; and the gated term
of one LSTM step under its bound."""

EXPERIMENT = command.Experiment(
    name="bounds",
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
