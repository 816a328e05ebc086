"""Over 100 steps, does an LSTM keep 10^-2 of the gradient where a vanilla RNN keeps 10^-10?

Maps the claim: for recurrent weights drawn at a range of gains it measures log10 ‖∂s_T/∂s_{T−100}‖ / ‖∂s_T/∂s_T‖ of an
LSTM over the plane of forget bias and gain, and of a vanilla RNN over gain and input variance, beside the same at the
defaults of libraries.  Of the LSTM it follows the memory's direct path ∏f, the memory's true chain c→c, by which the
claim is judged, and that of the whole state.  From the maps it reads a gain at which the RNN keeps 10^-10 and the
forget bias at which the LSTM of that gain keeps 10^-2, and measures both there on seeds that the maps have not seen.

A single gate that stands at its bias keeps 10^-2 over 100 steps at b_f = 3.05; 10^-10 is a rate of −0.23 nats per step.
Running time: two minutes on two cores with the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.colors
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
from experiments.statistics import Interval, describe, median_interval, summarise

CLAIMS = (
    Claim(
        "B8",
        "Over 100 steps the LSTM keeps 10^-2 of the gradient, the vanilla RNN 10^-10.",
        source="repeated in introductions to the LSTM, without settings; the product of forget gates behind it: Gers, "
        "Schmidhuber & Cummins 2000",
        prediction="not at library defaults; ∏f reaches 10^-2 at b_f = 3.05 (within 0.5), the RNN 10^-10 where its "
        "rate is −0.23 nats per step (within 0.03)",
        refuted="at library defaults one of the two is off by more than a decade; altogether, if no gain and forget "
        "bias on the map give both",
        functions=(
            "rg.retention",
            "rg.decay_rate",
            "rg.theory.forget_bias_for",
            "rg.theory.vanilla_mean_field",
            "rg.initializers.gaussian",
            "rg.initializers.orthogonal",
        ),
        tests=(
            "tests/test_hundred_steps.py",
            "tests/test_chains.py",
            "tests/test_theory.py",
        ),
    ),
)

LSTM_DECADES, RNN_DECADES = -2.0, -10.0
"""log10 of what the claim says is kept."""
LAG = 100
"""Steps over which it is said to be kept."""
DECADE = 1.0
PATHS = ("direct", "memory", "state")
"""Of the LSTM: ∏f, the true chain c→c, the true chain of the whole state."""
Scheme = Literal["gaussian", "orthogonal"]
Library = Literal["torch", "keras", "flax", "haiku", "equinox"]
INPUT_VARIANCE = 1.0
"""Of the LSTM's inputs, and of the RNN's where the two are compared."""
GAIN = 1.0
"""Gain at which a forget bias is read from the map: every gate's weights preserve length on average."""
FIT = (20, 100)
"""Lags over which a decay rate is fitted: the first 20 still show the first steps' shape."""
PREDICTED_BIAS = (2.55, 3.55)
PREDICTED_RATE = (-0.26, -0.20)
PREDICTED_GAIN_SHARE = 0.1
WHY_DECADE = "the claim gives powers of ten: a decade to either side is the room that such a figure leaves"
WHY_SOMEWHERE = "a claim without settings is true somewhere if the whole interval lies on either side of its figure"
WHY_FOUND = f"{WHY_DECADE}; seeds that had no part in finding the setting"
WHY_BIAS = "σ(3.05)^100 = 10^-2 for a gate at its bias; gates that move around it let the luckiest units decide"
WHY_RATE = "10^-10 over 100 steps is −0.2303 nats per step if the decay is even"
WHY_GAIN = "mean field for many units: ½ log χ = −0.2303; a chain of 32 units is short of it by some per cent"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the map."""

    forget_biases: tuple[float, ...] = tuple(b / 2 for b in range(-2, 13))
    """Effective biases of the LSTM's forget gate, rising."""
    gains: tuple[float, ...] = tuple(g / 4 for g in range(1, 11))
    """Gains of the recurrent weights of every gate, rising."""
    input_variances: tuple[float, ...] = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Variances of the RNN's inputs, rising; the LSTM's is 1."""
    schemes: tuple[Scheme, ...] = ("gaussian", "orthogonal")
    """How the recurrent weights of the map are drawn."""
    libraries: tuple[Library, ...] = ("torch", "keras", "flax")
    """Whose initialisations the claim is tried at; their forget biases lie around 0, 1 and 0."""
    steps: int = LAG
    """The lag, T; the claim is about 100."""
    transient: int = 100
    """Steps run first, so that the state no longer knows that it began at zero."""
    hidden_size: int = 32
    """Units N."""
    input_size: int = 32
    """Width D of the Gaussian inputs; W x has their variance."""
    seeds: int = 20
    """Independent repetitions; each draws weights and inputs, the same all over the map up to their scale."""
    first_seed: int = 0
    """Seeds run from here; as many after them try the settings found."""


SMOKE = Config(
    forget_biases=(0.0, 3.0, 6.0), gains=(0.5, 1.0, 2.0), input_variances=(0.1, 1.0), schemes=("gaussian",),
    libraries=("torch",), steps=30, transient=10,
    hidden_size=8, input_size=8, seeds=3,
)  # fmt: skip
"""A few seconds: every code path, no statement about the claim."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"steps": 2, "transient": 0, "hidden_size": 1, "input_size": 1, "seeds": 1, "first_seed": 0}
    command.check_at_least(config, least)
    for name, fewest, lowest in (("forget_biases", 2, -np.inf), ("gains", 2, 0.0), ("input_variances", 1, 0.0)):
        values = getattr(config, name)
        wanted = f"{fewest} or more " + ("finite numbers" if lowest < 0 else "numbers of at least 0")
        if (
            len(values) < fewest
            or list(values) != sorted(set(values))
            or not np.isfinite(values).all()
            or values[0] < lowest
        ):
            raise UserError(f"--{name.replace('_', '-')}: expected {wanted}, rising, found {values}")
    for name in ("schemes", "libraries"):
        given = getattr(config, name)
        if not given or len(set(given)) != len(given):
            raise UserError(f"--{name}: expected one or more names, each once, found {' '.join(given) or 'none'}")
    if INPUT_VARIANCE not in config.input_variances:
        raise UserError(
            f"--input-variances: expected {INPUT_VARIANCE:g} among them, where the LSTM is measured, found "
            f"{config.input_variances}"
        )


class _Cells(NamedTuple):
    """The two cells that are measured, whatever the draw: one compilation each."""

    lstm: rg.Cell
    vanilla: rg.Cell


@functools.cache
def _cells(input_size: int, hidden_size: int) -> _Cells:
    return _Cells(rg.cells.lstm(input_size, hidden_size), rg.cells.vanilla(input_size, hidden_size))


@functools.partial(jax.jit, static_argnames=("cell", "transient"))
def _curves(cell, params, xs, *, transient):
    """log10 retention by path and lag, and the first non-finite step, for each seed."""
    is_lstm = cell.name == "lstm"
    chains = (("c", "direct"), ("c", "full"), (None, "full")) if is_lstm else ((None, "full"),)

    def one(drawn):
        params, xs = drawn
        state = rg.unroll(cell, params, cell.init_state(), xs[:transient]).final
        curves = [
            rg.retention(cell, params, state, xs[transient:], of=block, wrt=block, path=path) for block, path in chains
        ]
        return jnp.stack([curve.log_norm for curve in curves]) / np.log(10), curves[-1].nonfinite_step

    # one seed after the other: batched, a chain takes three pulls for every one it needs
    return jax.lax.map(one, (params, xs))


def _seeds(first: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of the weights and the inputs of variance 1, for every seed."""
    shape = (config.transient + config.steps, config.input_size)
    keys = [jax.random.split(jax.random.key(first + index)) for index in range(config.seeds)]
    xs = jnp.stack([jax.random.normal(key_xs, shape) for _, key_xs in keys])
    return jnp.stack([key_params for key_params, _ in keys]), xs


def _lstm(init: Any, forget_bias: float | None, first: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns log10 retention (seed, path, lag) and non-finite steps (seed,)."""
    sizes = (config.input_size, config.hidden_size)
    keys, xs = _seeds(first, config)
    params = jax.vmap(rg.cells.lstm(*sizes, forget_bias=forget_bias, init=init).init)(keys)
    curves, nonfinite = _curves(_cells(*sizes).lstm, params, xs, transient=config.transient)
    return np.asarray(curves), np.asarray(nonfinite)


def _vanilla(init: Any, input_variance: float, first: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns log10 retention (seed, lag) and non-finite steps (seed,)."""
    sizes = (config.input_size, config.hidden_size)
    keys, xs = _seeds(first, config)
    params = jax.vmap(rg.cells.vanilla(*sizes, init=init).init)(keys)
    xs = xs * np.float32(np.sqrt(input_variance))
    curves, nonfinite = _curves(_cells(*sizes).vanilla, params, xs, transient=config.transient)
    return np.asarray(curves)[:, 0], np.asarray(nonfinite)


def _measure_gain(scheme: str, gain: float, config: Config) -> xr.Dataset:
    """Returns the dataset of one gain: the LSTM at every forget bias, the RNN at every input variance."""
    init = getattr(rg.initializers, scheme)(gain)
    lstm, lstm_bad = zip(*(_lstm(init, bias, config.first_seed, config) for bias in config.forget_biases), strict=True)
    rnn, rnn_bad = zip(*(_vanilla(init, v, config.first_seed, config) for v in config.input_variances), strict=True)
    return xr.Dataset(
        {
            "lstm": (("forget_bias", "seed", "path"), np.stack(lstm)[..., -1]),
            "rnn": (("input_variance", "seed"), np.stack(rnn)[..., -1]),
            "lstm_nonfinite_step": (("forget_bias", "seed"), np.stack(lstm_bad).astype(np.int16)),
            "rnn_nonfinite_step": (("input_variance", "seed"), np.stack(rnn_bad).astype(np.int16)),
        }
    )


def _row(lstm: tuple[np.ndarray, np.ndarray], rnn: tuple[np.ndarray, np.ndarray]) -> xr.Dataset:
    """Returns one setting of both cells, with the curves that the claim is judged by."""
    memory, state = lstm[0][:, PATHS.index("memory")], rnn[0]
    missing = np.full_like(state[:, -1], np.nan)
    both = np.stack([memory, state])
    slope = jax.vmap(jax.vmap(functools.partial(rg.decay_rate, window=_fit_window(both.shape[-1] - 1))))
    return xr.Dataset(
        {
            "kept": (
                ("cell", "seed", "path"),
                np.stack([lstm[0][..., -1], np.stack([missing, missing, state[:, -1]], axis=-1)]),
            ),
            "curve": (("cell", "seed", "lag"), both),
            "rate": (("cell", "seed"), np.asarray(slope(jnp.asarray(both))) * np.log(10)),
            "nonfinite_step": (("cell", "seed"), np.stack([lstm[1], rnn[1]]).astype(np.int16)),
        }
    )


def _fit_window(steps: int) -> tuple[int, int]:
    """The lags over which the rate is fitted; those of a run of 100 steps, in proportion."""
    return FIT[0] * steps // LAG, steps


def _measure_library(name: str, config: Config) -> xr.Dataset:
    return _row(_lstm(name, None, config.first_seed, config), _vanilla(name, INPUT_VARIANCE, config.first_seed, config))


def _measure_found(scheme: str, gain: float, forget_bias: float, config: Config) -> xr.Dataset:
    """Returns both cells at a setting read from the map, on seeds that the map has not seen."""
    init, first = getattr(rg.initializers, scheme)(gain), config.first_seed + config.seeds
    return _row(_lstm(init, forget_bias, first, config), _vanilla(init, INPUT_VARIANCE, first, config))


def first_crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Returns where y first rises through ``level``, by linear interpolation; NaN if it never does.

    >>> import numpy as np
    >>> first_crossing(np.array([0.0, 1.0, 2.0]), np.array([-4.0, -3.0, -1.0]), -2.0)
    1.5
    """
    for index in np.flatnonzero((y[:-1] < level) & (y[1:] >= level))[:1]:
        share = (level - y[index]) / (y[index + 1] - y[index])
        return float(x[index] + share * (x[index + 1] - x[index]))
    return float("nan")


def settings_found(dataset: xr.Dataset, scheme: str) -> tuple[float, float]:
    """Returns a gain at which the RNN keeps 10^-10, and the b_f at which the LSTM of that gain keeps 10^-2.

    Read from the medians over seeds, both with inputs of variance 1, and rounded to what one would type; NaN where the
    map has none.
    """
    on_map = dataset.sel(scheme=scheme)
    rnn = np.median(on_map["rnn"].sel(input_variance=INPUT_VARIANCE).transpose("gain", "seed").values, axis=-1)
    gains = dataset["gain"].values
    gain = round(first_crossing(gains, rnn, RNN_DECADES), 2)
    if np.isnan(gain):
        return gain, gain
    lstm = np.median(on_map["lstm"].sel(path="memory").transpose("forget_bias", "gain", "seed").values, axis=-1)
    at_gain = np.array([np.interp(gain, gains, row) for row in lstm])
    return gain, round(first_crossing(dataset["forget_bias"].values, at_gain, LSTM_DECADES), 2)


MEASURED = (
    "lstm", "rnn", "lstm_nonfinite_step", "rnn_nonfinite_step", "kept", "curve", "rate", "nonfinite_step",
    "found_gain", "found_forget_bias",
)  # fmt: skip
"""Variables that a run measures; all others follow from them."""

_LOG10 = "log10 of ‖∂s_T/∂s_{T−lag}‖_F over its value at lag 0"
_DESCRIPTIONS = {
    "lstm": ("decades", f"LSTM on the map: {_LOG10}; ∏f, memory c→c, whole state"),
    "rnn": ("decades", f"vanilla RNN on the map: {_LOG10}"),
    "lstm_nonfinite_step": ("steps", "first time step with a non-finite state or chain; −1 for none"),
    "rnn_nonfinite_step": ("steps", "first time step with a non-finite state or chain; −1 for none"),
    "kept": ("decades", f"at library defaults and at the settings found: {_LOG10}; an RNN has only a whole state"),
    "curve": ("decades", f"the same by lag: {_LOG10}; memory of the LSTM, state of the RNN"),
    "rate": ("nats per step", "least-squares slope of curve over the fit window"),
    "nonfinite_step": ("steps", "first time step with a non-finite state or chain; −1 for none"),
    "found_gain": ("1", "gain at which the map has 10^-10 for the RNN; NaN for none"),
    "found_forget_bias": ("1", "forget bias at which the map has 10^-2 for the LSTM of that gain; NaN for none"),
    "theory": ("decades", "vanilla RNN on the map by mean field: steps · ½ log χ, Gaussian weights, many units"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with theory, and medians with intervals over seeds."""
    rates = [
        [rg.theory.vanilla_mean_field(float(gain), input_variance=float(v)).rate for v in dataset["input_variance"]]
        for gain in dataset["gain"]
    ]
    steps = dataset.sizes["lag"] - 1
    dataset["theory"] = (("gain", "input_variance"), steps * np.array(rates) / np.log(10))
    summarise(dataset, ("lstm", "rnn", "curve"), _DESCRIPTIONS)
    for name in [name for name in dataset if dataset[name].dtype == np.float64]:
        # what is drawn needs no more digits, and the file stays small
        dataset[name] = dataset[name].astype(np.float32)
    return describe(dataset, _DESCRIPTIONS)


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset; finished rows of the map are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used.
      OSError: a part cannot be written.
    """
    check(config)
    started = time.perf_counter()
    cells = [(scheme, gain) for scheme in config.schemes for gain in config.gains]
    pieces = [
        Piece(
            f"{scheme}-gain-{gain}",
            f"{scheme} weights, gain {gain:g}",
            functools.partial(_measure_gain, scheme, gain, config),
        )
        for scheme, gain in cells
    ] + [
        Piece(f"library-{name}", f"defaults of {name}", functools.partial(_measure_library, name, config))
        for name in config.libraries
    ]
    measured = command.measure(pieces, parts=parts, screen=screen)
    by_gain = dict(zip(cells, measured[: len(cells)], strict=True))
    by_scheme = [xr.concat([by_gain[scheme, gain] for gain in config.gains], dim="gain") for scheme in config.schemes]
    on_map = xr.concat(by_scheme, dim="scheme").assign_coords(
        scheme=list(config.schemes),
        gain=list(config.gains),
        forget_bias=list(config.forget_biases),
        input_variance=list(config.input_variances),
        path=list(PATHS),
    )

    found = {scheme: settings_found(on_map, scheme) for scheme in config.schemes}
    tried = [scheme for scheme in config.schemes if np.isfinite(found[scheme]).all()]
    pieces = [
        Piece(
            f"found-{scheme}",
            "{} weights, gain {:g}, b_f {:g}: fresh seeds".format(scheme, *found[scheme]),
            functools.partial(_measure_found, scheme, *found[scheme], config),
        )
        for scheme in tried
    ]
    fresh = dict(zip(tried, command.measure(pieces, parts=parts, screen=screen), strict=True))
    at_defaults = measured[len(cells) :]
    none = xr.full_like(at_defaults[0].drop_vars("nonfinite_step"), np.nan)
    none["nonfinite_step"] = xr.full_like(at_defaults[0]["nonfinite_step"], -1)
    rows = at_defaults + [fresh.get(scheme, none) for scheme in config.schemes]
    at_rows = xr.concat(rows, dim="setting").assign_coords(
        setting=[*config.libraries, *(f"found-{scheme}" for scheme in config.schemes)],
        cell=["lstm", "vanilla"],
        path=list(PATHS),
        lag=np.arange(config.steps + 1),
    )
    dataset = xr.merge([on_map, at_rows]).assign_coords(
        seed=np.arange(config.first_seed, config.first_seed + config.seeds)
    )
    dataset["found_gain"] = ("scheme", [found[scheme][0] for scheme in config.schemes])
    dataset["found_forget_bias"] = ("scheme", [found[scheme][1] for scheme in config.schemes])
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance("hundred_steps", config, seconds=seconds)
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------

_NAMES = {"lstm": "LSTM", "vanilla": "RNN"}


def _can_tell(dataset: xr.Dataset) -> bool:
    """The claim is about 100 steps, and ten seeds are the least for an interval."""
    return dataset.sizes["lag"] - 1 == LAG and dataset.sizes["seed"] >= 10


def _interval(values: xr.DataArray) -> Interval:
    return median_interval(values.values, axis=values.dims.index("seed"))


def _decades(interval: Interval) -> str:
    return f"10^{float(interval.median):.1f} [{float(interval.low):.1f}, {float(interval.high):.1f}]"


def _kept(dataset: xr.Dataset, setting: str, cell: str, path: str | None = None) -> Interval:
    """What is kept at a setting; by the path that the claim is judged by if none is named."""
    path = path or {"lstm": "memory", "vanilla": "state"}[cell]
    return _interval(dataset["kept"].sel(setting=setting, cell=cell, path=path))


def _within(interval: Interval, decades: float) -> bool | None:
    """Whether the whole interval lies within a decade; None where there is no number."""
    if np.isnan(interval.median):
        return None
    return bool(interval.low >= decades - DECADE and interval.high <= decades + DECADE)


def _crossings(curves: xr.DataArray, along: str, level: float) -> tuple[str, Interval, bool]:
    """Where the curves of the seeds rise through a level: in words, as an interval, and whether they do at all.

    They do if the whole interval over seeds lies below the level at one point and above it at a later one.
    """
    x, by_seed = curves[along].values, curves.transpose("seed", along).values
    at = np.array([first_crossing(x, y, level) for y in by_seed])
    overall, where = median_interval(by_seed, axis=0), median_interval(at, axis=0)
    below, above = np.flatnonzero(overall.high < level), np.flatnonzero(overall.low >= level)
    does = bool(len(below) and len(above) and below[0] < above[-1])
    missing = int(np.isnan(at).sum())
    words = (
        f"{float(where.median):.2f} [{float(where.low):.2f}, {float(where.high):.2f}]" if missing < len(at) else "none"
    )
    return words + (f" ({missing} of {len(at)} seeds never)" if missing else ""), where, does


def _libraries(dataset: xr.Dataset) -> list[str]:
    return [name for name in dataset["setting"].values.tolist() if not name.startswith("found-")]


def _nearest_gain(dataset: xr.Dataset) -> float:
    return float(dataset["gain"].values[np.argmin(abs(dataset["gain"].values - GAIN))])


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first; medians over seeds with 95 % intervals."""
    config = json.loads(dataset.attrs["config"])
    shown = rich.table.Table(
        title=f"What is kept of the gradient over {config['steps']} steps: N={config['hidden_size']}, "
        f"D={config['input_size']}, Gaussian inputs of variance 1, {config['seeds']} seeds, {dataset.attrs['dtype']}, "
        f"matmul {dataset.attrs['matmul_precision']}, {dataset.attrs['backend']}",
        caption=f"medians over seeds [{100 * dataset.attrs['confidence']:.0f} % bootstrap interval of the exponent]; "
        "found: settings read from the map at which the RNN keeps 10^-10 and the LSTM 10^-2, tried on fresh seeds",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("setting", "gain", "b_f", "LSTM, ∏f", "LSTM, memory c→c", "LSTM, whole state", "RNN"):
        shown.add_column(name, justify="left" if name == "setting" else "right")
    for setting in dataset["setting"].values.tolist():
        gain = bias = ""
        if setting.startswith("found-"):
            at = dataset.sel(scheme=setting.removeprefix("found-"))
            gain, bias = f"{float(at['found_gain']):.2f}", f"{float(at['found_forget_bias']):.2f}"
        shown.add_row(
            setting.replace("found-", "found, "),
            gain,
            bias,
            *(_decades(_kept(dataset, setting, "lstm", path)) for path in PATHS),
            _decades(_kept(dataset, setting, "vanilla")),
        )
    return shown


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks: the claim at library defaults, whether it is true somewhere, then our predictions."""
    told = _can_tell(dataset)
    checks = []

    def add(name: str, value: str, bound: str, holds: bool | None, why: str, decides: bool = True) -> None:
        checks.append(Check(name, value, bound, holds if told else None, "B8", why, decides))

    levels = {"lstm": LSTM_DECADES, "vanilla": RNN_DECADES}
    for cell, level in levels.items():
        for setting in _libraries(dataset):
            found = _kept(dataset, setting, cell)
            name = f"{_NAMES[cell]} at the defaults of {setting}"
            add(name, _decades(found), f"10^{level:g}, within a decade", _within(found, level), WHY_DECADE)
    gain = _nearest_gain(dataset)
    for scheme in dataset["scheme"].values.tolist():
        on_map = dataset.sel(scheme=scheme)
        words, _, does = _crossings(on_map["lstm"].sel(path="memory", gain=gain), "forget_bias", LSTM_DECADES)
        name = f"LSTM, {scheme} weights of gain {gain:g}: 10^-2 at some forget bias"
        add(name, f"b_f = {words}", "some", does, WHY_SOMEWHERE)
        words, _, does = _crossings(on_map["rnn"].sel(input_variance=INPUT_VARIANCE), "gain", RNN_DECADES)
        add(f"RNN, {scheme} weights: 10^-10 at some gain", f"gain {words}", "some", does, WHY_SOMEWHERE)
        kept = [_kept(dataset, f"found-{scheme}", cell) for cell in levels]
        within = [_within(found, level) for found, level in zip(kept, levels.values(), strict=True)]
        at = f"gain {float(on_map['found_gain']):.2f}, b_f {float(on_map['found_forget_bias']):.2f}"
        add(
            f"both at once, {scheme} weights",
            f"{at}: LSTM {_decades(kept[0])}, RNN {_decades(kept[1])}" if None not in within else "no such setting",
            "each within a decade",
            all(within),
            WHY_FOUND,
        )
    for scheme in dataset["scheme"].values.tolist():
        on_map = dataset.sel(scheme=scheme)
        words, where, _ = _crossings(on_map["lstm"].sel(path="direct", gain=gain), "forget_bias", LSTM_DECADES)
        low, high = PREDICTED_BIAS
        holds: bool | None = bool(low <= where.median <= high)
        name = f"prediction: b_f at which ∏f is 10^-2, {scheme} weights of gain {gain:g}"
        add(name, words, f"{low:g} to {high:g}", holds, WHY_BIAS, decides=False)
        rate = _interval(dataset["rate"].sel(setting=f"found-{scheme}", cell="vanilla"))
        low, high = PREDICTED_RATE
        value = f"{float(rate.median):.3f} [{float(rate.low):.3f}, {float(rate.high):.3f}]"
        name = f"prediction: RNN's rate where it keeps 10^-10, {scheme} weights, lags {FIT[0]}–{FIT[1]}"
        holds = bool(low <= rate.median <= high) if np.isfinite(rate.median) else None
        add(name, value, f"{low:g} to {high:g}", holds, WHY_RATE, decides=False)
        expected = first_crossing(
            dataset["gain"].values, dataset["theory"].sel(input_variance=INPUT_VARIANCE).values, RNN_DECADES
        )
        words, where, _ = _crossings(on_map["rnn"].sel(input_variance=INPUT_VARIANCE), "gain", RNN_DECADES)
        add(
            f"prediction: gain at which the RNN keeps 10^-10, {scheme} weights",
            words,
            f"{expected:.2f} within {PREDICTED_GAIN_SHARE:.0%}",
            bool(abs(where.median / expected - 1) <= PREDICTED_GAIN_SHARE),
            WHY_GAIN,
            decides=False,
        )
    return checks


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding in a sentence."""
    every = verdict(dataset)
    kept = {
        cell: ", ".join(f"{_decades(_kept(dataset, name, cell))} ({name})" for name in _libraries(dataset))
        for cell in _NAMES
    }
    steps = dataset.sizes["lag"] - 1
    sentence = (
        f"over {steps} steps and at library defaults the LSTM's memory keeps {kept['lstm']}, the RNN {kept['vanilla']}."
    )
    both = [check for check in every if check.name.startswith("both at once") and check.holds]
    if both:
        settings = "; ".join(f"{check.name.removeprefix('both at once, ')}, {check.value}" for check in both)
        sentence += f"  Both figures hold at once, with inputs of variance 1, for {settings} (on fresh seeds)."
    elif any(check.holds is not None for check in every):
        sentence += "  No setting on the map gives both figures at once."
    short = [check for check in every if check.name.startswith("both at once") and check.holds is False]
    if short and both:
        settings = "; ".join(f"{check.name.removeprefix('both at once, ')}, {check.value}" for check in short)
        sentence += f"  Read from the map in the same way, but not within a decade on fresh seeds: {settings}."
    predictions = [check for check in every if not check.decides and check.holds is False]
    if predictions:
        missed = "; ".join(f"{c.name.removeprefix('prediction: ')} ({c.value})" for c in predictions)
        sentence += f"  Our predictions came out otherwise for {missed}."
    return {"B8": sentence}


_LEVELS = np.arange(-30, 5.1, 2.5)
_COLOURS = "cividis"
_CONTOURS: dict[float, dict[str, Any]] = {
    LSTM_DECADES: {"colors": "white", "linestyles": "solid", "linewidths": 2.2},
    RNN_DECADES: {"colors": "white", "linestyles": "dashed", "linewidths": 2.2},
}


def _map(axes: Any, x: np.ndarray, y: np.ndarray, decades: np.ndarray, *, labelled: bool = False) -> Any:
    """Draws one map, (y, x), with the contours of the claim's figures."""
    norm = matplotlib.colors.BoundaryNorm(_LEVELS, 256, extend="both")
    filled = axes.contourf(x, y, decades, levels=_LEVELS, cmap=_COLOURS, norm=norm, extend="both")
    for level, style in _CONTOURS.items():
        if decades.min() < level < decades.max():
            drawn = axes.contour(x, y, decades, levels=[level], **style)
            if labelled:
                axes.clabel(drawn, fmt=f"10$^{{{level:g}}}$", fontsize=10)
    return filled


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the maps: for each kind of weights the LSTM's true chain, its ∏f, and the RNN."""
    config = json.loads(dataset.attrs["config"])
    drawn = matplotlib.figure.Figure(figsize=(12.4, 2.2 + 2.7 * dataset.sizes["scheme"]), layout="constrained")
    schemes = dataset["scheme"].values.tolist()
    grid = drawn.subplots(len(schemes), 3, squeeze=False)
    biases, gains, variances = (dataset[name].values for name in ("forget_bias", "gain", "input_variance"))
    places = np.arange(len(variances))
    filled: Any = None
    for row, scheme in zip(grid, schemes, strict=True):
        on_map = dataset.sel(scheme=scheme)
        memory, direct = (
            on_map["lstm_median"].sel(path=path).transpose("gain", "forget_bias").values
            for path in ("memory", "direct")
        )
        filled = _map(row[0], biases, gains, memory)
        # labels only where no star can cover them
        _map(row[1], biases, gains, direct, labelled=True)
        row[1].axvline(
            rg.theory.forget_bias_for(10.0**LSTM_DECADES, config["steps"]),
            color="#f5a623",
            linewidth=1.8,
            linestyle=":",
        )
        rnn = on_map["rnn_median"].transpose("gain", "input_variance").values
        if len(places) > 1:
            _map(row[2], places, gains, rnn)
            theory = dataset["theory"].transpose("gain", "input_variance").values
            if scheme == "gaussian" and theory.min() < RNN_DECADES < theory.max():
                row[2].contour(places, gains, theory, levels=[RNN_DECADES], colors="#f5a623", linestyles=":")
        gain, bias = float(on_map["found_gain"]), float(on_map["found_forget_bias"])
        if np.isfinite(bias):
            star: dict[str, Any] = {
                "marker": "*", "markersize": 17, "color": "#c81e4a", "markeredgecolor": "white", "linestyle": ""
            }  # fmt: skip
            row[0].plot(bias, gain, **star)
            row[2].plot(places[list(variances).index(INPUT_VARIANCE)], gain, **star)
        row[2].set_xticks(places, [f"{v:g}" for v in variances])
        row[0].set_ylabel(f"{scheme} weights\nrecurrent gain")
        for axes in row:
            axes.set_ylim(gains[0], gains[-1])
    for axes, title in zip(
        grid[0], ("LSTM: true chain of c", "LSTM: direct path ∏f", "vanilla RNN: chain of h"), strict=True
    ):
        axes.set_title(title, fontsize=12, fontweight="bold")
    for axes, label in zip(grid[-1], ("forget bias b_f", "forget bias b_f", "variance of the input"), strict=True):
        axes.set_xlabel(label)
    bar = drawn.colorbar(filled, ax=grid, shrink=0.9, pad=0.01)
    bar.set_label(f"log10 of the gradient kept over {config['steps']} steps (median over seeds)")
    line = matplotlib.lines.Line2D
    handles = [
        line([], [], color="0.35", linewidth=2.2, label="kept: 10$^{-2}$ (white on the maps)"),
        line([], [], color="0.35", linewidth=2.2, linestyle="--", label="kept: 10$^{-10}$"),
        line([], [], color="#f5a623", linewidth=1.8, linestyle=":",
             label="theory: a gate at its bias, 10$^{-2}$; RNN by mean field, 10$^{-10}$"),
        line([], [], color="#c81e4a", marker="*", markersize=13, linestyle="", label="setting tried on fresh seeds"),
    ]  # fmt: skip
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    drawn.suptitle(
        f"Over {config['steps']} steps, where does an LSTM keep 10$^{{-2}}$ of the gradient and a vanilla RNN "
        "10$^{-10}$?\n"
        f"N={config['hidden_size']}, Gaussian inputs (of variance 1 for the LSTM), {config['seeds']} seeds",
        fontsize=12,
    )
    return drawn


_COLOUR_OF = {
    "torch": "#16325c",
    "keras": "#0f8b8d",
    "flax": "#8a6fb0",
    "found-gaussian": "#c81e4a",
    "found-orthogonal": "#d97706",
}
_STYLE_OF = {"torch": "-", "keras": "--", "flax": "-.", "found-gaussian": "-", "found-orthogonal": "--"}


def curves(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns what is kept by lag, at library defaults and at the settings found."""
    config = json.loads(dataset.attrs["config"])
    drawn = matplotlib.figure.Figure(figsize=(10.4, 4.9), layout="constrained")
    panels = drawn.subplots(1, 2, squeeze=False)[0]
    lags = dataset["lag"].values
    titles = ("LSTM, memory c→c", "vanilla RNN")
    for axes, cell, level, title in zip(panels, _NAMES, (LSTM_DECADES, RNN_DECADES), titles, strict=True):
        for setting in dataset["setting"].values.tolist():
            at = dataset.sel(setting=setting, cell=cell)
            median, low, high = (at[f"curve_{part}"].values for part in ("median", "low", "high"))
            if np.isnan(median).all():
                continue
            scheme = setting.removeprefix("found-")
            label = setting
            if scheme != setting:
                label = f"found: {scheme}, gain {float(dataset['found_gain'].sel(scheme=scheme)):.2f}"
                label += f", b_f {float(dataset['found_forget_bias'].sel(scheme=scheme)):.2f} (LSTM)"
            colour = _COLOUR_OF[setting]
            axes.plot(lags, median, color=colour, linestyle=_STYLE_OF[setting], linewidth=1.8, label=label)
            axes.fill_between(lags, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.errorbar(
            lags[-1], level, yerr=DECADE, fmt="D", color="black", markersize=6, capsize=4, clip_on=False, zorder=5,
            label=f"the claim: 10$^{{-2}}$ (LSTM), 10$^{{-10}}$ (RNN) after {LAG} steps, within a decade",
        )  # fmt: skip
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("lag (steps)")
        axes.set_xlim(0, 1.03 * lags[-1])
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("log10 of the gradient kept")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    drawn.suptitle(
        "How the gradient fades with the lag: library defaults, and settings chosen so that the claim comes true\n"
        f"N={config['hidden_size']}, Gaussian inputs of variance 1, {config['seeds']} seeds: median and 95 % interval",
        fontsize=11,
    )
    return drawn


ABOUT = """Over 100 steps, does an LSTM keep 10^-2 of the gradient where a vanilla RNN keeps 10^-10?

Maps what is kept over forget bias and recurrent gain (LSTM) and over gain and input variance (RNN), measures the
defaults of libraries beside it, and tries on fresh seeds a setting at which both figures should hold; prints a table
with medians and intervals, and writes figures and a netCDF file."""

CAPTION = """Gradient kept over 100 steps: an LSTM's over forget bias and recurrent gain, by its true memory chain and
by the product of its forget gates, and a vanilla RNN's over gain and input variance; the contours are the claim's 10^-2
and 10^-10, the star is the setting tried on fresh seeds, the dotted line is theory."""

CURVES = """Gradient kept by lag, of the LSTM's memory and of the vanilla RNN, at library defaults and at the settings
found; the diamonds are what the claim says is left after 100 steps."""

EXPERIMENT = command.Experiment(
    name="hundred_steps",
    about=ABOUT,
    claims=CLAIMS,
    default=Config(),
    smoke=SMOKE,
    run=run,
    table=table,
    verdict=verdict,
    summary=summary,
    pictures=(command.Picture("", CAPTION, figure), command.Picture("curves", CURVES, curves)),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
