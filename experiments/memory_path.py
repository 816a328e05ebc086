"""Does an LSTM's memory pass the gradient on because it is only added to and multiplied?

For each forget bias and seed it runs an LSTM with fresh weights on Gaussian inputs and measures, along the same run,
what is left of the gradient along the direct path (∏f), along the whole chain from memory to memory, and of the whole
state; how far ∂c_t/∂c_{t−1} of one step is from its forget gate, with h_{t−1} held and with h_{t−1} = o ⊙ tanh c_{t−1}
followed; and how many gated steps the paths take that carry the gradient.  Then it forces the forget gate to 1 and to 0
and measures what the paths through the other gates make of "unchanged" and of "cut" while the recurrent weights grow.
Inputs are Gaussian and not text because that is simpler.  Chrono biases are drawn for the longest lag.  Running time:
half a minute on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np
import rich.console
import rich.table
import xarray as xr

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, median_interval, stored_text, summarise

_INTRODUCTIONS = "introductions to the LSTM, after the constant error carousel of Hochreiter & Schmidhuber 1997"

CLAIMS = (
    Claim(
        "B1",
        "The LSTM's memory is only multiplied by its forget gate and added to, hence its gradient does not vanish.",
        source=_INTRODUCTIONS,
        prediction="the direct path ∏f is a product of numbers below 1 like any other: at lag 100 a constant gate "
        "keeps 7.9e-31, 2.5e-14, 3.1e-6, 7.8e-3 and 0.511 at b_f = 0, 1, 2, 3, 5; the full chain is more than it, "
        "at b_f = 1 10^-9.6 against 10^-12.8 (Frobenius norms, N = 32, within a decade)",
        refuted="less than 10^-2 of the gradient is left at lag 100, on the direct path or in the full chain",
        functions=("rg.retention", "rg.jacobian_chain", "rg.gradient_paths"),
        tests=(
            "tests/test_memory_path.py",
            "tests/test_chains.py::test_direct_path_is_the_product_of_forget_gates",
            "tests/test_chains.py::test_random_lstm_medians",
        ),
    ),
    Claim(
        "B2",
        "The derivative of the LSTM's memory is its forget gate: ∂C_t/∂C_{t−1} = f_t.",
        source="introductions to the LSTM; Hochreiter & Schmidhuber 1997 cut the other paths on purpose",
        prediction="an identity with h_{t−1} held; off by more than a tenth where h_{t−1} = o ⊙ tanh c_{t−1} is "
        "followed one step further back, since the gates hear it",
        refuted="‖∂c_t/∂c_{t−1} − diag f_t‖ exceeds a tenth of ‖diag f_t‖",
        functions=("rg.step_jacobians", "rg.formulas.lstm_memory_jacobian", "rg.formulas.lstm_jacobian"),
        tests=(
            "tests/test_memory_path.py::test_one_step_by_autodiff",
            "tests/test_formulas.py",
        ),
    ),
    Claim(
        "B5",
        "A forget gate of 1 passes the gradient of the memory unchanged, a forget gate of 0 cuts it.",
        source=_INTRODUCTIONS,
        prediction="exact with the paths through the other gates closed; with them open the more is added the larger "
        "the recurrent weights are",
        refuted="at f = 1 ∂c_T/∂c_k is further than a tenth from the identity, over one step or over 100, or at f = 0 "
        "more than a tenth passes one step, h = o ⊙ tanh c followed in both",
        functions=("rg.retention", "rg.jacobian_chain"),
        tests=("tests/test_memory_path.py::test_forced_gate_by_autodiff",),
    ),
)

PATHS = ("direct", "full", "state")
"""∏f; ∂c_T/∂c_k; ∂s_T/∂s_k of the whole state s = (h, c)."""
CHECK_LAG = 100
"""Lag at which the claims are judged."""
KEPT = 1e-2
"""Least share of the gradient at that lag that counts as not vanished."""
WHY_KEPT = "10^-2 after 100 steps is what the claim about LSTM and RNN over 100 steps (B8) calls kept"
SAME = 0.1
"""Largest relative distance at which two matrices count as the same, and largest share that counts as cut."""
WHY_SAME = "a number that is off by more than a tenth is not right to one digit"
WHY_CUT = "the same tenth, of what one step lets through"
ROUND_OFF = 1e-6
"""Relative; eight times the spacing of float32 for a handful of products."""
WHY_EXACT = "an identity: what is left is the round-off of float32, 1.2e-7 a product"
PREDICTED = {"direct": -12.8, "full": -9.6}
"""log10 of the Frobenius norms at b_f = 1, lag 100, N = 32."""
WHY_PREDICTED = "reference number of 20 other seeds, ± one decade (tests/test_chains.py::test_random_lstm_medians)"
FORCED = (1.0, 0.0)
"""Values that the forget gate is forced to."""
SATURATED = 200.0
"""Bias at which a sigmoid is 1 or 0 in float32, to the last bit, whatever else it hears."""
ONE_STEP_EVERY = 10
"""Time steps between those of which ∂c_t/∂c_{t−1} is taken."""

ForgetBias = float | Literal["chrono"]
InitName = Literal["torch", "flax", "equinox", "keras", "haiku", "gaussian", "orthogonal"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the memory path experiment."""

    forget_biases: tuple[ForgetBias, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, "chrono")
    """Effective biases of the forget gate, numbers or chrono (drawn for the longest lag)."""
    inits: tuple[InitName, ...] = ("torch", "keras", "orthogonal")
    """How the other weights are drawn for ∂c_t/∂c_{t−1} of one step; the first one serves for all else."""
    gains: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Factors on the recurrent weights where the forget gate is forced, rising."""
    crossed_biases: tuple[ForgetBias, ...] = (0.0, 2.0, "chrono")
    """Forget biases for which paths are told apart by the number of gated steps."""
    steps: int = 200
    """Time steps T; lags run from 0 to T."""
    crossed_steps: int = 100
    """The same where paths are told apart."""
    max_crossings: int = 15
    """Paths with more gated steps than these are one band; below it 0, 1, 2–3, 4–7, … are told apart: 2^n − 1."""
    hidden_size: int = 32
    """Units N."""
    input_size: int = 32
    """Width D of the input, entries N(0, 1)."""
    seeds: int = 10
    """Independent repetitions; each draws weights and inputs, the same in every row."""
    first_seed: int = 0
    """Seeds run from here."""


SMOKE = Config(
    forget_biases=(0.0, 5.0, "chrono"), inits=("torch",), gains=(1.0,), crossed_biases=(0.0,), steps=30,
    crossed_steps=15, max_crossings=1, hidden_size=6, input_size=4, seeds=2,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claims."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"crossed_steps": 1, "hidden_size": 1, "input_size": 1, "seeds": 1, "first_seed": 0}
    command.check_at_least(config, {"steps": 2 * ONE_STEP_EVERY, **least})
    if config.max_crossings < 1 or config.max_crossings & (config.max_crossings + 1):
        raise UserError(f"--max-crossings: expected 1, 3, 7, 15 or so on, found {config.max_crossings}")
    for name in ("forget_biases", "crossed_biases"):
        biases = getattr(config, name)
        numbers = [bias for bias in biases if bias != "chrono"]
        if not biases or len(set(biases)) != len(biases) or not np.isfinite(np.array(numbers, float)).all():
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: expected finite numbers or chrono, each once, found {biases}")
    if not config.inits or len(set(config.inits)) != len(config.inits):
        raise UserError(f"--inits: expected one name or more, each once, found {' '.join(config.inits) or 'none'}")
    gains = config.gains
    if not gains or list(gains) != sorted(set(gains)) or not (gains[0] >= 0 and np.isfinite(gains[-1])):
        raise UserError(f"--gains: expected finite numbers of at least 0, rising, found {gains}")


def bias_name(forget_bias: ForgetBias) -> str:
    """Returns a forget bias as the results name it."""
    return "chrono" if forget_bias == "chrono" else f"{forget_bias:g}"


def bands_of(max_crossings: int) -> list[tuple[int, int]]:
    """Returns the first and the last number of gated steps of each band; the last band stands for all above.

    >>> bands_of(7)
    [(0, 0), (1, 1), (2, 3), (4, 7), (8, 8)]
    """
    powers = [2**n for n in range((max_crossings + 1).bit_length() - 1)]
    return [(0, 0), *((power, 2 * power - 1) for power in powers), (max_crossings + 1, max_crossings + 1)]


def band_names(max_crossings: int) -> list[str]:
    """Returns what the bands are called."""
    *inner, (most, _) = bands_of(max_crossings)
    return [f"{low}–{high}" if high > low else f"{low}" for low, high in inner] + [f"{most} or more"]


def kept_lags(steps: int) -> np.ndarray:
    """Returns the lags that are stored: each up to 10, every fifth after, and the last."""
    lags = np.arange(steps + 1)
    return lags[(lags <= 10) | (lags % 5 == 0) | (lags == steps)]


@functools.cache
def _cell(input_size: int, hidden_size: int) -> rg.Cell:
    return rg.cells.lstm(input_size, hidden_size)


def draw(
    forget_bias: ForgetBias, init: InitName, seed: int, config: Config, steps: int
) -> tuple[rg.cells.LSTMParams, jax.Array]:
    """Returns parameters and inputs of one seed."""
    bias = rg.initializers.chrono(config.steps) if forget_bias == "chrono" else forget_bias
    drawing = rg.cells.lstm(config.input_size, config.hidden_size, forget_bias=bias, init=init)
    key_params, key_xs = jax.random.split(jax.random.key(seed))
    return drawing.init(key_params), jax.random.normal(key_xs, (steps, config.input_size))


def _full_and_state(chain: rg.LogScaled) -> tuple[jax.Array, jax.Array]:
    """Returns log ‖∂c_T/∂c_k‖ and log ‖∂s_T/∂s_k‖ of s = (h, c), in units of their values at lag 0."""
    n = chain.mantissa.shape[-1] // 2
    memory = rg.LogScaled(chain.mantissa[..., n:, n:], chain.exponent)
    return rg.logscaled.log_norm(memory) - 0.5 * np.log(n), rg.logscaled.log_norm(chain) - 0.5 * np.log(2 * n)


@functools.partial(jax.jit, static_argnames=("cell",))
def _measure_retention(cell, params, xs):
    """What is left of the gradient at the kept lags, path by path."""
    state, lags = cell.init_state(), kept_lags(xs.shape[0])
    direct = rg.retention(cell, params, state, xs, of="c", wrt="c", path="direct")
    full, whole = map(jnp.flip, rg.jacobian_chain(cell, params, state, xs, reduce=_full_and_state))
    return {
        "log_retention": jnp.stack([log_norm[lags] for log_norm in (direct.log_norm, full, whole)]),
        "nonfinite_step": direct.nonfinite_step,
    }


@functools.partial(jax.jit, static_argnames=("cell",))
def _measure_one_step(cell, params, xs):
    """How far ∂c_t/∂c_{t−1} is from diag f_t, with h_{t−1} held and followed, at every tenth step."""
    start = cell.init_state()
    states, gates, _ = rg.unroll(cell, params, start, xs)
    held = rg.step_jacobians(cell, params, start, xs, of="c", wrt="c")
    held_apart = jnp.max(jnp.abs(held - jax.vmap(jnp.diag)(gates.f)), axis=(1, 2)) / jnp.max(gates.f, axis=1)

    at = np.arange(ONE_STEP_EVERY, xs.shape[0], ONE_STEP_EVERY)
    before = jax.tree.map(lambda leaf: leaf[at - 1], states)
    followed = jax.vmap(rg.formulas.lstm_memory_jacobian, in_axes=(None, 0, 0, 0))(
        params, before, xs[at], gates.o[at - 1]
    )
    f = gates.f[at]
    apart = rg.logscaled.log_distance(rg.logscaled.from_array(followed), rg.logscaled.from_array(jax.vmap(jnp.diag)(f)))
    norm = rg.logscaled.log_norm(rg.logscaled.from_array(followed), "spectral")
    return {
        "held_apart": jnp.max(held_apart),
        "followed_apart": jnp.median(jnp.exp(apart)),
        "followed_norm": jnp.median(jnp.exp(norm)),
        "largest_f": jnp.median(jnp.max(f, axis=1)),
    }


@functools.partial(jax.jit, static_argnames=("cell",))
def _measure_forced(cell, params, xs, forced):
    """The distance of ∂c_T/∂c_k, with h_k = o_k ⊙ tanh c_k followed, from f^lag I, in units of ‖I‖.

    The state before the first step has no o_0: T + 1 inputs give lags 0 … T.
    """
    start = cell.init_state()
    states, gates, _ = rg.unroll(cell, params, start, xs)
    n = states.c.shape[-1]
    chain = jax.tree.map(lambda leaf: leaf[1:], rg.jacobian_chain(cell, params, start, xs, of="c"))
    to_h = gates.o * (1 - jnp.tanh(states.c) ** 2)
    followed = chain.mantissa[..., n:] + chain.mantissa[..., :n] * to_h[:, None, :]
    # at the newest state, where no gate has acted yet, both are I
    unit = jnp.full((xs.shape[0],), forced).at[-1].set(1)
    expected = rg.logscaled.from_array(unit[:, None, None] * jnp.eye(n)[None])
    apart = rg.logscaled.add(
        rg.logscaled.rescale(rg.LogScaled(followed, chain.exponent)), rg.logscaled.negative(expected)
    )
    return jnp.flip(rg.logscaled.log_norm(apart))[kept_lags(xs.shape[0] - 1)] - 0.5 * np.log(n)


@functools.partial(jax.jit, static_argnames=("cell", "max_crossings"))
def _measure_crossings(cell, params, xs, *, max_crossings):
    """Share of each band of crossings in the sum of the norms of all parts, at the kept lags."""
    start = cell.init_state()
    parts = rg.gradient_paths(cell, params, start, xs, max_crossings=max_crossings, of="c", wrt="c")
    share = jax.nn.softmax(parts.log_norm[kept_lags(xs.shape[0])], axis=-1)
    in_bands = [jnp.sum(share[:, low : high + 1], axis=-1) for low, high in bands_of(max_crossings)]
    return {"crossing_share": jnp.stack(in_bands, axis=-1)}


def _over_seeds(seeds: list[dict[str, Any]], dims: Mapping[str, tuple[str, ...]]) -> xr.Dataset:
    return xr.Dataset({name: (("seed", *dims[name]), np.stack([np.asarray(s[name]) for s in seeds])) for name in dims})


def _seeds(config: Config) -> range:
    return range(config.first_seed, config.first_seed + config.seeds)


def _measure_row(forget_bias: ForgetBias, config: Config) -> xr.Dataset:
    """Returns the dataset of one forget bias: every seed; one step for every initialisation."""
    cell = _cell(config.input_size, config.hidden_size)
    drawn = [[draw(forget_bias, init, seed, config, config.steps) for seed in _seeds(config)] for init in config.inits]
    dims = {"log_retention": ("path", "lag"), "nonfinite_step": ()}
    rows = [_over_seeds([_measure_retention(cell, *one) for one in drawn[0]], dims)]
    dims = dict.fromkeys(("held_apart", "followed_apart", "followed_norm", "largest_f"), ())
    steps = [_over_seeds([_measure_one_step(cell, *one) for one in of_init], dims) for of_init in drawn]
    return xr.merge([*rows, xr.concat(steps, dim="init")])


def _measure_forced_row(forced: float, gain: float, config: Config) -> xr.Dataset:
    """Returns the dataset of one forced gate at one gain: every seed."""
    cell = _cell(config.input_size, config.hidden_size)
    seeds = []
    for seed in _seeds(config):
        bias = SATURATED if forced else -SATURATED
        params, xs = draw(bias, config.inits[0], seed, config, config.steps + 1)
        params = params._replace(w_hh=jnp.float32(gain) * params.w_hh)
        measured = _measure_retention(cell, params, xs[:-1])
        seeds.append(
            {
                "forced_log_direct": measured["log_retention"][PATHS.index("direct")],
                "forced_log_apart": _measure_forced(cell, params, xs, jnp.float32(forced)),
                "forced_nonfinite_step": measured["nonfinite_step"],
            }
        )
    dims = {"forced_log_direct": ("lag",), "forced_log_apart": ("lag",), "forced_nonfinite_step": ()}
    return _over_seeds(seeds, dims)


def _measure_crossed_row(forget_bias: ForgetBias, config: Config) -> xr.Dataset:
    """Returns the dataset of the paths at one forget bias: every seed."""
    cell = _cell(config.input_size, config.hidden_size)
    drawn = [draw(forget_bias, config.inits[0], seed, config, config.crossed_steps) for seed in _seeds(config)]
    dims = {"crossing_share": ("crossed_lag", "band")}
    return _over_seeds([_measure_crossings(cell, *one, max_crossings=config.max_crossings) for one in drawn], dims)


MEASURED = (
    "log_retention",
    "nonfinite_step",
    "held_apart",
    "followed_apart",
    "followed_norm",
    "largest_f",
    "forced_log_direct",
    "forced_log_apart",
    "forced_nonfinite_step",
    "crossing_share",
)
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "log_retention": ("nats", "log of ‖∂_T/∂_{T−lag}‖_F, 0 at lag 0: direct path ∏f, ∂c_T/∂c_k, whole state"),
    "nonfinite_step": ("steps", "first time step with a non-finite state or chain; −1 for none"),
    "held_apart": ("1", "largest entry of ∂c_t/∂c_{t−1} − diag f_t over the largest f_t, h held, worst step"),
    "followed_apart": ("1", "‖∂c_t/∂c_{t−1} − diag f_t‖_F / ‖diag f_t‖_F, h followed, median over steps"),
    "followed_norm": ("1", "‖∂c_t/∂c_{t−1}‖₂, h followed, median over steps"),
    "largest_f": ("1", "‖diag f_t‖₂, the largest forget gate, median over steps"),
    "forced_log_direct": ("nats", "log retention of the direct path, forget gate forced"),
    "forced_log_apart": ("nats", "log of ‖∂c_T/∂c_k − f^lag I‖_F / ‖I‖_F, h followed, forget gate forced to f"),
    "forced_nonfinite_step": ("steps", "first time step with a non-finite state; −1 for none"),
    "crossing_share": ("1", "norm of the paths with so many gated steps over the sum of the norms, ∂c_T/∂c_k"),
    "kept": ("decades", "log_retention at check_lag"),
    "forced_apart": ("1", "‖∂c_T/∂c_k − f^lag I‖_F / ‖I‖_F, h followed, at lag 1 and at check_lag"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with the quantities that follow from the measured ones, and medians with intervals."""
    lag = dataset.attrs["check_lag"]
    dataset["kept"] = (dataset["log_retention"].sel(lag=lag) / np.log(10)).drop_vars("lag")
    judged = dataset["forced_log_apart"].sel(lag=[1, lag]).rename(lag="judged_lag")
    dataset["forced_apart"] = judged.copy(data=np.exp(judged.values))
    names = ("log_retention", "kept", "followed_apart", "followed_norm", "largest_f", "forced_log_apart")
    summarise(dataset, (*names, "forced_apart", "crossing_share"), _DESCRIPTIONS)
    for name, variable in list(dataset.data_vars.items()):
        # a third of the file would be digits that float32 measurements do not have
        if variable.dtype == np.float64:
            dataset[name] = variable.astype(np.float32)
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
    biases, crossed = config.forget_biases, config.crossed_biases
    forced = [(f, gain) for f in FORCED for gain in config.gains]
    pieces = [
        Piece(
            f"bias-{bias_name(bias)}", f"forget bias {bias_name(bias)}", functools.partial(_measure_row, bias, config)
        )
        for bias in biases
    ]
    pieces += [
        Piece(
            f"forced-{f:g}-{gain:g}",
            f"f = {f:g}, gain {gain:g}",
            functools.partial(_measure_forced_row, f, gain, config),
        )
        for f, gain in forced
    ]
    pieces += [
        Piece(
            f"paths-{bias_name(bias)}", f"paths, forget bias {bias_name(bias)}",
            functools.partial(_measure_crossed_row, bias, config),
        )
        for bias in crossed
    ]  # fmt: skip
    measured = command.measure(pieces, parts=parts, screen=screen)
    by_bias, rest = measured[: len(biases)], measured[len(biases) :]
    num_gains = len(config.gains)
    by_force = [xr.concat(rest[i * num_gains : (i + 1) * num_gains], dim="gain") for i in range(len(FORCED))]
    dataset = xr.merge(
        [
            xr.concat(by_bias, dim="forget_bias"),
            xr.concat(by_force, dim="forced"),
            xr.concat(rest[len(forced) :], dim="crossed_bias"),
        ]
    ).assign_coords(
        forget_bias=[bias_name(bias) for bias in biases],
        crossed_bias=[bias_name(bias) for bias in crossed],
        init=list(config.inits),
        path=list(PATHS),
        forced=list(FORCED),
        gain=np.array(config.gains, float),
        seed=np.array(_seeds(config)),
        lag=kept_lags(config.steps),
        crossed_lag=kept_lags(config.crossed_steps),
        band=band_names(config.max_crossings),
    )
    check_lag = min(CHECK_LAG, config.steps)
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance("memory_path", config, seconds=seconds, check_lag=check_lag)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_PATH_WORDS = {"direct": "direct path ∏f", "full": "full chain ∂c_T/∂c_k", "state": "whole state ∂s_T/∂s_k"}


def _share(row: xr.Dataset, name: str) -> str:
    """Prints median and interval of a relative distance, whatever its size."""
    median, low, high = (float(row[f"{name}_{part}"]) for part in ("median", "low", "high"))
    return f"{median:.2g} [{low:.2g}, {high:.2g}]"


def _bias_words(forget_bias: Any) -> str:
    return str(forget_bias) if str(forget_bias) == "chrono" else f"b_f = {forget_bias}"


def _biases(dataset: xr.Dataset) -> list[str]:
    return [str(bias) for bias in dataset["forget_bias"].values]


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config, lag = json.loads(dataset.attrs["config"]), dataset.attrs["check_lag"]
    shown = rich.table.Table(
        title=f"The LSTM's memory path: N={config['hidden_size']}, D={config['input_size']}, T={config['steps']}, "
        f"init {config['inits'][0]}, {config['seeds']} seeds, {dataset.attrs['dtype']}, "
        f"matmul {dataset.attrs['matmul_precision']}, {dataset.attrs['backend']}",
        caption=f"left: log10 of what is left of the gradient at lag {lag}; right, of one step: how far ∂c_t/∂c_(t−1) "
        "with h followed is from diag f, relatively, and the largest singular values of the two; medians over seeds "
        f"[{100 * dataset.attrs['confidence']:.0f} % bootstrap interval]",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("b_f", "direct path ∏f", "full chain, c to c", "whole state", "off from f by", "σ_max", "largest f"):
        shown.add_column(name, justify="right")
    for bias in _biases(dataset):
        row = dataset.sel(forget_bias=bias).isel(init=0)
        shown.add_row(
            bias,
            *(stored_text(row.sel(path=path), "kept", ".2f") for path in PATHS),
            stored_text(row, "followed_apart", ".3f"),
            stored_text(row, "followed_norm", ".2f"),
            stored_text(row, "largest_f", ".2f"),
        )
    return shown


def _tells(dataset: xr.Dataset, *values: xr.DataArray) -> bool:
    """Whether a run reaches the lag that the claims are judged at, and gave numbers there."""
    return bool(dataset.attrs["check_lag"] == CHECK_LAG and not any(np.isnan(value) for value in values))


def _checks_of_b1(dataset: xr.Dataset) -> list[Check]:
    lag, log_kept = dataset.attrs["check_lag"], np.log10(KEPT)
    checks = []
    for path in PATHS:
        for bias in _biases(dataset):
            row = dataset.sel(path=path, forget_bias=bias)
            # judged by the side of the interval that speaks against the claim
            low = row["kept_low"]
            checks.append(
                Check(
                    f"{_PATH_WORDS[path]} at lag {lag}: {_bias_words(bias)}",
                    f"10^{stored_text(row, 'kept', '.1f')}",
                    f"≥ 10^{log_kept:g}",
                    bool(low >= log_kept) if _tells(dataset, low) else None,
                    "B1",
                    WHY_KEPT,
                    # the claim is about the memory; the state holds h too
                    decides=path != "state",
                )
            )
    for bias in _biases(dataset):
        more = (dataset["kept"].sel(path="full") - dataset["kept"].sel(path="direct")).sel(forget_bias=bias)
        interval = median_interval(more.values, axis=0)
        value = f"{float(interval.median):+.1f} [{float(interval.low):+.1f}, {float(interval.high):+.1f}] decades"
        holds = bool(interval.low > 0) if _tells(dataset, more.min()) else None
        name, why = f"prediction, full chain above ∏f: {_bias_words(bias)}", "first runs; ε of B3 is positive"
        checks.append(Check(name, value, "> 0", holds, "B1", why, decides=False))
    if "1" in _biases(dataset) and lag == CHECK_LAG and json.loads(dataset.attrs["config"])["hidden_size"] == 32:
        for path, expected in PREDICTED.items():
            # the retention is in units of the norm of the identity
            norm = float(dataset["kept_median"].sel(path=path, forget_bias="1")) + 0.5 * np.log10(32)
            name, bound = f"prediction, norm of the {_PATH_WORDS[path]}: b_f = 1", f"10^{expected:g} ± 1 decade"
            holds = bool(abs(norm - expected) <= 1)
            checks.append(Check(name, f"10^{norm:.1f}", bound, holds, "B1", WHY_PREDICTED, decides=False))
    return checks


def _checks_of_b2(dataset: xr.Dataset) -> list[Check]:
    held = float(dataset["held_apart"].max())
    name = "∂C_t/∂C_{t−1} = f with h held, worst step of every seed"
    checks = [
        Check(name, f"off by {held:.1g}", f"≤ {ROUND_OFF:g}", bool(held <= ROUND_OFF), "B2", WHY_EXACT)
        if np.isfinite(held)
        else Check(name, "no number", f"≤ {ROUND_OFF:g}", None, "B2", WHY_EXACT)
    ]
    for bias in _biases(dataset):
        row = dataset.sel(forget_bias=bias)
        high = row["followed_apart_high"]
        worst = row.isel(init=int(high.fillna(np.inf).argmax("init")))
        checks.append(
            Check(
                f"∂C_t/∂C_{{t−1}} = f with h followed: {_bias_words(bias)}",
                f"off by {stored_text(worst, 'followed_apart', '.3f')} ({worst['init'].item()})",
                f"≤ {SAME:g}",
                None if np.isnan(high).any() else bool(high.max() <= SAME),
                "B2",
                WHY_SAME,
            )
        )
    return checks


def _checks_of_b5(dataset: xr.Dataset) -> list[Check]:
    lag = dataset.attrs["check_lag"]
    direct, words = dataset["forced_log_direct"].isel(lag=slice(1, None)), "other gates' paths closed"
    passed = float(np.abs(direct.sel(forced=1.0)).max())
    left = float(np.exp(direct.sel(forced=0.0)).max())
    checks = [
        Check(
            f"f = 1, {words}: unchanged at every lag", f"off by {passed:.1g} nats",
            f"≤ {ROUND_OFF:g}", bool(passed <= ROUND_OFF), "B5", WHY_EXACT,
        ),
        Check(f"f = 0, {words}: cut at every lag", f"{left:.1g} left", "0", left == 0, "B5", WHY_EXACT),
    ]  # fmt: skip
    judged = (
        (1.0, 1, "f = 1, paths open: unchanged over one step", WHY_SAME),
        (1.0, lag, f"f = 1, paths open: unchanged over {lag} steps", WHY_SAME),
        (0.0, 1, "f = 0, paths open: cut in one step", WHY_CUT),
    )
    for forced, at, said, why in judged:
        for gain in dataset["gain"].values:
            row = dataset.sel(forced=forced, judged_lag=at, gain=gain)
            high = row["forced_apart_high"]
            tells = not np.isnan(high) if at == 1 else _tells(dataset, high)
            found = f"{'off by' if forced else 'passes'} {_share(row, 'forced_apart')}"
            holds = bool(high <= SAME) if tells else None
            checks.append(Check(f"{said}: gain {gain:g}", found, f"≤ {SAME:g}", holds, "B5", why))
    return checks


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks of every claim, each judged by the end of the interval that speaks against it."""
    return [*_checks_of_b1(dataset), *_checks_of_b2(dataset), *_checks_of_b5(dataset)]


def _after(checks: list[Check], words: str, *, holds: bool = True) -> str:
    """Returns the settings of those checks whose name begins so and that hold, or do not."""
    found = [c.name.rsplit(": ", 1)[1] for c in checks if c.name.startswith(words) and c.holds is holds]
    return ", ".join(found)


def _range_of(values: xr.DataArray, pattern: str) -> str:
    """Returns the smallest and the largest of the medians, or the one that there is."""
    least, most = pattern.format(float(values.min())), pattern.format(float(values.max()))
    return least if least == most else f"{least} to {most}"


def _summary_of_b1(dataset: xr.Dataset, checks: list[Check]) -> str:
    kept = dataset["kept_median"]
    sentence = (
        f"at lag {dataset.attrs['check_lag']} the direct path keeps {_range_of(kept.sel(path='direct'), '10^{:.1f}')} "
        f"of the gradient and the full chain {_range_of(kept.sel(path='full'), '10^{:.1f}')}, by forget bias.  "
    )
    if all(check.holds is None for check in checks if check.decides):
        return sentence + f"The claim is judged at lag {CHECK_LAG}, which this run does not reach."
    sentence += (
        f"At least 10^{np.log10(KEPT):g} is left on the direct path at "
        f"{_after(checks, _PATH_WORDS['direct']) or 'no forget bias'}, and in the full chain at "
        f"{_after(checks, _PATH_WORDS['full']) or 'no forget bias'}."
    )
    missed = [c.name.removeprefix("prediction, ") for c in checks if c.name.startswith("prediction") and not c.holds]
    return sentence + (f"  Predictions that came out otherwise: {'; '.join(missed)}." if missed else "")


def _summary_of_b2(dataset: xr.Dataset, checks: list[Check]) -> str:
    held, off = checks[0], dataset["followed_apart_median"]
    norm, largest = dataset["followed_norm_median"], dataset["largest_f_median"]
    near = _after(checks, "∂C_t/∂C_{t−1} = f with h followed")
    return (
        f"with h held it {'is an identity' if held.holds else 'fails'} ({held.value}); with h = o ⊙ tanh c followed "
        f"one step further back ∂C_t/∂C_{{t−1}} is off by {_range_of(off, '{:.2g}')} of the forget gate's norm, by "
        f"forget bias and initialisation, and within a tenth at {near or 'no forget bias'}.  Its largest singular "
        f"value is {_range_of(norm, '{:.2f}')}, that of the gate {_range_of(largest, '{:.2f}')}."
    )


def _summary_of_b5(dataset: xr.Dataset, checks: list[Check]) -> str:
    closed, lag, apart = checks[:2], dataset.attrs["check_lag"], dataset["forced_apart_median"]
    exact = "both are exact" if all(check.holds for check in closed) else "they are not both exact"

    def at(forced: float, judged: int) -> str:
        return _range_of(apart.sel(forced=forced, judged_lag=judged), "{:.2g}")

    return (
        f"with the paths through the other gates closed {exact}.  With them open, for recurrent weights of gain "
        f"{_range_of(dataset['gain'], '{:g}')}: at f = 1 the gradient is off by {at(1.0, 1)} of its size over one step "
        f"and by {at(1.0, lag)} over {lag} (within a tenth at "
        f"{_after(checks, f'f = 1, paths open: unchanged over {lag}') or 'no gain'}); at f = 0 {at(0.0, 1)} of it pass "
        f"one step through h (less than a tenth at {_after(checks, 'f = 0, paths open') or 'no gain'})."
    )


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the findings, claim by claim."""
    return {
        "B1": _summary_of_b1(dataset, _checks_of_b1(dataset)),
        "B2": _summary_of_b2(dataset, _checks_of_b2(dataset)),
        "B5": _summary_of_b5(dataset, _checks_of_b5(dataset)),
    }


_CHRONO = "#c81e4a"
_LINES: dict[str, Any] = {"direct": (0, (4, 2)), "full": "-", "state": (0, (1, 1.2))}
_PATH_COLOURS = {"direct": "#d97706", "full": "#16325c", "state": "#2a9d6f"}
_MARKERS = {"direct": "^", "full": "o", "state": "s"}
_INIT_COLOURS = ("#16325c", "#d97706", "#2a9d6f", "#c81e4a", "#7a4fb5", "#8a6d3b", "#4b5563")


def _shades(names: list[str]) -> dict[str, Any]:
    """Returns colours that rise with the number, the same in print and to the colour-blind; red for chrono."""
    numbers = [name for name in names if name != "chrono"]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(len(numbers), 2)))
    return {**dict(zip(numbers, shades, strict=False)), "chrono": _CHRONO}


def _runs_of(biases: list[str]) -> list[np.ndarray]:
    """Returns which places a line may join: those of the numbers, and chrono, which is none, alone."""
    is_chrono = np.array(biases) == "chrono"
    return [places for places in (np.flatnonzero(~is_chrono), np.flatnonzero(is_chrono)) if len(places)]


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _sizes(dataset: xr.Dataset) -> str:
    config = json.loads(dataset.attrs["config"])
    return f"untrained, N={config['hidden_size']}, Gaussian inputs, {config['seeds']} seeds: median and 95 % interval"


def _bars_by_bias(
    axes: Any, places: np.ndarray, biases: list[str], at: xr.Dataset, name: str, *, label: str, **style: Any
) -> None:
    """Draws medians with their intervals against the forget bias."""
    median, low, high = (at[f"{name}_{part}"].values for part in ("median", "low", "high"))
    for part in _runs_of(biases):
        bars = np.stack([median - low, high - median])[:, part]
        axes.errorbar(places[part], median[part], yerr=bars, label=label, capsize=2, **style)
        label = "_nolegend_"


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure: what is left of the gradient against lag, and at the lag that is judged against bias."""
    drawn = matplotlib.figure.Figure(figsize=(11, 5.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    lags, lag, biases = dataset["lag"].values, dataset.attrs["check_lag"], _biases(dataset)
    for bias, colour in _shades(biases).items():
        if bias not in biases:
            continue
        for path in ("direct", "full"):
            at = dataset.sel(forget_bias=bias, path=path)
            median, low, high = (at[f"log_retention_{part}"].values / np.log(10) for part in ("median", "low", "high"))
            left.plot(lags, median, color=colour, linestyle=_LINES[path], linewidth=1.7)
            left.fill_between(lags, low, high, color=colour, alpha=0.15, linewidth=0)
    # what has fallen below leaves the picture: the rest would be one line
    highest = float(dataset["log_retention_high"].sel(path=["direct", "full"]).max()) / np.log(10)
    left.set_ylim(bottom=max(left.get_ylim()[0], -20), top=highest + 0.5)
    left.set_xlim(0, lags[-1])
    left.set_xlabel("lag T − k (steps)")
    left.set_ylabel("log10 of what is left of the gradient")
    left.set_title("by lag", fontsize=11)
    places = np.arange(len(biases))
    for path in PATHS:
        at = dataset.sel(path=path)
        style = {"color": _PATH_COLOURS[path], "marker": _MARKERS[path], "linestyle": _LINES[path]}
        _bars_by_bias(right, places, biases, at, "kept", label=_PATH_WORDS[path], **style)
    right.set_xticks(places, biases)
    right.set_xlabel("forget bias b_f")
    right.set_ylabel(f"log10 of what is left at lag {lag}")
    right.set_title(f"at lag {lag}", fontsize=11)
    right.legend(frameon=False, fontsize=10, loc="lower right")
    for axes in (left, right):
        axes.axhline(np.log10(KEPT), color="0.35", linestyle=":", linewidth=1.2)
        _tidy(axes)
    line = matplotlib.lines.Line2D
    handles = [
        line([], [], color=colour, linewidth=3, label=_bias_words(bias))
        for bias, colour in _shades(biases).items()
        if bias in biases
    ]
    handles += [
        line([], [], color="0.2", linestyle=_LINES[path], linewidth=1.7, label=_PATH_WORDS[path])
        for path in ("direct", "full")
    ]
    handles.append(
        line([], [], color="0.35", linestyle=":", linewidth=1.2, label="10^-2, the least that counts as left")
    )
    drawn.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    drawn.suptitle(
        f"Does the gradient along the LSTM's memory vanish?\n{_sizes(dataset)}",
        fontsize=12,
    )
    return drawn


def figure_one_step(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure of one step: the distance from the forget gate, and the largest singular values."""
    drawn = matplotlib.figure.Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    biases = _biases(dataset)
    places = np.arange(len(biases))
    for index, init in enumerate(dataset["init"].values):
        at = dataset.sel(init=init)
        colour = _INIT_COLOURS[index % len(_INIT_COLOURS)]
        moved = places + 0.08 * (index - (dataset.sizes["init"] - 1) / 2)
        for axes, name, marker, linestyle, words in (
            (left, "followed_apart", "o", "-", f"init: {init}"),
            (right, "followed_norm", "o", "-", f"∂c_t/∂c_(t−1), init: {init}"),
            (right, "largest_f", "^", (0, (4, 2)), f"diag f_t, init: {init}"),
        ):
            _bars_by_bias(axes, moved, biases, at, name, marker=marker, linestyle=linestyle, label=words, color=colour)
    left.axhline(SAME, color="0.35", linestyle=":", linewidth=1.2)
    left.text(
        0.98, 0.97, "dotted: a tenth\nwith h held it is 0 everywhere", transform=left.transAxes, ha="right", va="top",
        fontsize=10,
    )  # fmt: skip
    left.set_ylim(bottom=0)
    left.set_ylabel("‖∂c_t/∂c_(t−1) − diag f_t‖ / ‖diag f_t‖")
    left.set_title("how far one step is from its forget gate", fontsize=11)
    right.axhline(1, color="0.35", linewidth=0.8)
    right.set_ylabel("largest singular value")
    right.set_title("above 1 a step can enlarge the gradient; f never is", fontsize=11)
    for axes in (left, right):
        axes.set_xticks(places, biases)
        axes.set_xlabel("forget bias b_f")
        _tidy(axes)
    handles, labels = right.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=max(dataset.sizes["init"], 2), frameon=False)
    drawn.suptitle(
        f"Is ∂c_t/∂c_(t−1) the forget gate, when h_(t−1) = o ⊙ tanh c_(t−1) is followed?\n{_sizes(dataset)}",
        fontsize=12,
    )
    return drawn


def figure_forced(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure of the forced gate: what the other gates' paths add, against lag."""
    drawn = matplotlib.figure.Figure(figsize=(10.5, 4.8), layout="constrained")
    panels = drawn.subplots(1, 2)
    lags = dataset["lag"].values
    names = [f"{gain:g}" for gain in dataset["gain"].values]
    shades = _shades(names)
    titles = {1.0: "f = 1: distance from “unchanged”", 0.0: "f = 0: what is not cut"}
    for axes, forced in zip(panels, FORCED, strict=True):
        for index, name in enumerate(names):
            at = dataset.sel(forced=forced).isel(gain=index)
            median, low, high = (np.exp(at[f"forced_log_apart_{part}"].values) for part in ("median", "low", "high"))
            shown = median > 0
            axes.plot(lags[shown], median[shown], color=shades[name], linewidth=1.7, label=f"gain {name}")
            axes.fill_between(lags[shown], low[shown], high[shown], color=shades[name], alpha=0.15, linewidth=0)
        axes.axhline(SAME, color="0.35", linestyle=":", linewidth=1.2, label="a tenth")
        axes.set_yscale("log")
        axes.set_title(titles[forced], fontsize=11)
        axes.set_xlabel("lag T − k (steps)")
        _tidy(axes)
    panels[0].set_ylabel("‖∂c_T/∂c_k − I‖ / ‖I‖")
    panels[1].set_ylabel("‖∂c_T/∂c_k‖ / ‖I‖")
    panels[0].set_xlim(0, lags[-1])
    panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], 1e-3))
    panels[1].set_xlim(0, min(20, lags[-1]))
    panels[1].set_ylim(1e-8, 1)
    panels[1].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    drawn.suptitle(
        "Does a forget gate of 1 pass the gradient unchanged, and one of 0 cut it, with the other gates listening?\n"
        f"gain: factor on the recurrent weights; {_sizes(dataset)}",
        fontsize=12,
    )
    return drawn


def figure_crossings(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the figure of the paths: share of each number of gated steps against lag, a panel per forget bias."""
    biases = [str(bias) for bias in dataset["crossed_bias"].values]
    drawn = matplotlib.figure.Figure(figsize=(3.6 * len(biases) + 0.8, 4.4), layout="constrained")
    panels = drawn.subplots(1, len(biases), squeeze=False, sharey=True)[0]
    colours = matplotlib.colormaps["cividis"](np.linspace(0.0, 1.0, dataset.sizes["band"]))
    lags = dataset["crossed_lag"].values
    for axes, bias in zip(panels, biases, strict=True):
        share = dataset["crossing_share_median"].sel(crossed_bias=bias).transpose("band", "crossed_lag").values
        # medians of shares need not add up to 1
        share = share / share.sum(axis=0)
        axes.stackplot(lags, share, colors=colours, labels=[str(band) for band in dataset["band"].values])
        axes.set_xlim(lags[0], lags[-1])
        axes.set_ylim(0, 1)
        axes.set_title(_bias_words(bias), fontsize=11)
        axes.set_xlabel("lag T − k (steps)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the paths' norms")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
        title="steps that a path takes through the gates (0: the direct path ∏f)",
    )  # fmt: skip
    config = json.loads(dataset.attrs["config"])
    drawn.suptitle(
        "Which paths carry ∂c_T/∂c_k: how many of their steps go through the gates?\n"
        f"untrained LSTM, N={config['hidden_size']}, Gaussian inputs, median of {config['seeds']} seeds",
        fontsize=12,
    )
    return drawn


ABOUT = """Does an LSTM's memory pass the gradient on because it is only added to and multiplied?

Measures the gradient along the direct path, in the full chain and of the whole state, the memory's derivative over one
step, forget gates forced to 1 and 0, and the paths by number of gated steps; prints a table with medians and intervals,
and writes figures and a netCDF file."""

CAPTION = """What is left of the gradient along an LSTM's memory: left against lag for several forget biases, on the
direct path (dashed) and in the full chain (solid); right at lag 100 against the forget bias, with the 10^-2 that counts
as not vanished."""

CAPTION_ONE_STEP = """One step of the memory's derivative with h = o ⊙ tanh c followed: left how far it is from its
forget gate, by forget bias and initialisation; right its largest singular value beside the largest forget gate."""

CAPTION_FORCED = """The forget gate forced to 1 (left) and to 0 (right): how far the memory's gradient is from being
passed unchanged, and what of it is not cut, against lag, for recurrent weights of several gains."""

CAPTION_CROSSINGS = """Share of the paths that carry the gradient from memory to memory by the number of steps that they
take through the gates, against lag, for three forget biases; with closed gates nearly all leave the direct path within
some twenty steps, with chrono biases few do."""

EXPERIMENT = command.Experiment(
    name="memory_path",
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
        command.Picture("one-step", CAPTION_ONE_STEP, figure_one_step),
        command.Picture("forced", CAPTION_FORCED, figure_forced),
        command.Picture("crossings", CAPTION_CROSSINGS, figure_crossings),
    ),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
