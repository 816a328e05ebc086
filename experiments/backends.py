"""Which numbers survive float32, TF32 and bfloat16?

For each cell and seed the same weights and inputs (drawn in float32) are measured in float64 on the CPU, the reference,
and in every *setting*: a platform, a dtype, and what matrix products do with their operands.  A setting runs where its
device is there; of the others the rows of a stored result are merged.  What an accelerator's default does to a product
is also emulated on the CPU: both operands are rounded to nearest, to 10 bits of mantissa (TF32) or 7 (bfloat16), and
multiplied and summed in float32.  Two reaches are told apart:

``model``      the products of the user's own forward and backward pass; those of the measurement (Jacobian chains, QR)
               ask for highest precision and get it, which is what this library does
``everything`` these too, which is what happens where nobody asks

QR and LU by LAPACK are no products and stay in float32.  Everything is measured along the setting's own trajectory, and
again along the reference's states, so that what goes wrong in the states is told from what goes wrong in measuring
them.  Along its own trajectory a chaotic run is compared by its exponents only: two trajectories that differ by one
rounding separate, and nothing else of them is comparable.  Rounding weights to the dtype is part of a setting.

Running time: about 4 minutes on two cores with the defaults.

Sources: default precision of products: documentation of ``jax.lax.Precision``; TF32: NVIDIA A100 architecture white
paper 2020 (hardware may truncate where this rounds to nearest).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import numpy as np
import rich.console
import rich.table
import scipy.stats
import xarray as xr
from jax.extend import core

import rnngrad as rg
from experiments import command, results
from experiments.claims import Check, Claim
from experiments.command import Piece, UserError
from experiments.statistics import describe, summarise

_FUNCTIONS = ("rg.jacobian_chain", "rg.retention", "rg.lyapunov_spectrum", "rg.chain_singular_values", "rg.zero_taps")
_TESTS = ("tests/test_backends.py", "tests/test_lowering.py")

CLAIMS = (
    Claim(
        "N1",
        "float32 is enough to measure a gradient through time: float64 adds nothing that matters.",
        source="the dtype that every framework computes in unless asked",
        prediction="written before the first run: every quantity survives for every cell; the chain at lag 100 is off "
        "by less than 1e-3 and the log condition number by less than 0.01 nats",
        refuted="a quantity is off by more than it may be (see the checks), for some cell",
        functions=_FUNCTIONS,
        tests=_TESTS,
    ),
    Claim(
        "N2",
        "With TF32 or bfloat16 in every matrix product Lyapunov exponents survive; products of Jacobians and condition "
        "numbers do not.",
        source="notes on default matmul precision of accelerators, which the documentation of jax.lax.Precision "
        "gives: TF32 on recent GPUs, bfloat16 on TPUs",
        prediction="written before the first run: wrong on two counts. The leading exponent survives, the most "
        "negative one does not, for rounding by 2^-11 hides directions that a step shrinks by more; the product at lag "
        "100 survives TF32 (√100 · 2^-11, half a percent) and bfloat16 nearly; condition numbers do not",
        refuted="an exponent is lost, or a product or a condition number is kept",
        functions=_FUNCTIONS,
        tests=_TESTS,
    ),
    Claim(
        "N3",
        "Only the products of the measurement need the highest precision; the model's own may stay at the "
        "accelerator's default.",
        source="the convention of this library, which asks for highest precision in chains and QR and leaves the "
        "model's forward and backward pass alone",
        prediction="written before the first run: holds for TF32; with bfloat16 products the states are off by more "
        "than 0.01 and with them retention at lag 1000 by more than 0.1 nats; the direction of the weights' gradient "
        "survives both",
        refuted="a measured quantity or the training step is off by more than it may be, for some cell",
        functions=_FUNCTIONS,
        tests=_TESTS,
    ),
)

STORED = Path(__file__).with_name("results") / "backends.nc"
"""Whose rows are merged for devices that are not here, unless others are named."""

Rounding = Literal["none", "tf32", "bfloat16"]
ROUNDINGS: tuple[Rounding, ...] = ("none", "tf32", "bfloat16")
MANTISSA_BITS = {"tf32": 10, "bfloat16": 7}
"""Stored bits of the mantissa; both have the exponent of float32, 8 bits."""


class Setting(NamedTuple):
    """One way to compute."""

    name: str
    platform: str
    """cpu, gpu or tpu, as ``jax.devices`` takes it."""
    dtype: str
    """Of weights, inputs, states and gradients."""
    products: str
    """What products do with their operands: ``exact``, ``tf32`` or ``bfloat16``, by the device or emulated."""
    reach: Literal["model", "everything"] = "model"
    emulated: bool = False

    @property
    def is_plain_float32(self) -> bool:
        """Whether N1 is about it."""
        return self.dtype == "float32" and self.products == "exact"

    @property
    def is_low(self) -> bool:
        """Whether its float32 products round their operands."""
        return self.dtype == "float32" and self.products != "exact"


REFERENCE = Setting("cpu float64", "cpu", "float64", "exact")
SETTINGS = (
    Setting("cpu float32", "cpu", "float32", "exact"),
    Setting("emulated tf32", "cpu", "float32", "tf32", emulated=True),
    Setting("emulated tf32 everywhere", "cpu", "float32", "tf32", "everything", emulated=True),
    Setting("emulated bf16", "cpu", "float32", "bfloat16", emulated=True),
    Setting("emulated bf16 everywhere", "cpu", "float32", "bfloat16", "everything", emulated=True),
    Setting("cpu bfloat16", "cpu", "bfloat16", "exact"),
    Setting("gpu float32", "gpu", "float32", "exact"),
    Setting("gpu tf32", "gpu", "float32", "tf32"),
    Setting("gpu tf32 everywhere", "gpu", "float32", "tf32", "everything"),
    Setting("gpu bfloat16", "gpu", "bfloat16", "exact"),
    Setting("tpu float32", "tpu", "float32", "exact"),
    Setting("tpu bf16", "tpu", "float32", "bfloat16"),
    Setting("tpu bf16 everywhere", "tpu", "float32", "bfloat16", "everything"),
    Setting("tpu bfloat16", "tpu", "bfloat16", "exact"),
)


class Row(NamedTuple):
    """A kind of network."""

    make: Callable[..., rg.Cell]
    """(input_size, hidden_size, dtype=…) -> Cell; two rows with the same one share their programs."""
    init: rg.initializers.Initialization | None
    """What its weights are drawn from; None: as the cell draws them."""
    input_scale: float
    is_chaotic: bool


_lstm = functools.partial(rg.cells.lstm, forget_bias=1.0)
ROWS = {
    "lstm, b_f = 1": Row(_lstm, None, 1.0, False),
    "gru": Row(rg.cells.gru, None, 1.0, False),
    "vanilla, gain 1": Row(rg.cells.vanilla, rg.initializers.gaussian(1.0), 1.0, False),
    "vanilla, gain 3, chaotic": Row(rg.cells.vanilla, rg.initializers.gaussian(3.0), 0.1, True),
}


class Quantity(NamedTuple):
    """What is compared with float64, and how far off it may be."""

    error: str
    """What the error is, with its unit."""
    allowed: float | None
    """Largest error that survives; None: what two independent runs of this length differ by, see :func:`allowance`."""
    why: str
    kind: Literal["states", "products", "exponents", "condition", "training"]


_TENTH = "a factor that is right to a tenth"
_SAMPLING = "two independent runs differ by as much, 95 % of the time, so that rounding adds nothing to sampling"
QUANTITIES = {
    "states": Quantity("largest error, units of the state", 0.01, "a hundredth of the range of h", "states"),
    "retention, lag 10": Quantity("nats", 0.1, _TENTH, "products"),
    "retention, lag 100": Quantity("nats", 0.1, _TENTH, "products"),
    "retention, lag 1000": Quantity("nats", 0.1, _TENTH, "products"),
    "direct path, lag 100": Quantity("nats", 0.1, _TENTH, "products"),
    "half-life": Quantity("relative", 0.1, _TENTH, "products"),
    "chain, lag 10": Quantity("relative, Frobenius norm", 0.1, _TENTH, "products"),
    "chain, lag 100": Quantity("relative, Frobenius norm", 0.1, _TENTH, "products"),
    "condition number, lag 10": Quantity("nats", 0.1, _TENTH, "condition"),
    "leading exponent": Quantity("nats per step", None, _SAMPLING, "exponents"),
    "most negative exponent": Quantity("nats per step", None, _SAMPLING, "exponents"),
    "whole spectrum": Quantity("largest error, standard errors", None, _SAMPLING, "exponents"),
    "Lyapunov dimension": Quantity("1", None, _SAMPLING, "exponents"),
    "loss": Quantity("relative", 0.01, "two digits", "training"),
    "weight gradient, size": Quantity("relative, of its norm", 0.1, _TENTH, "training"),
    "weight gradient, direction": Quantity("1 − cosine", 0.01, "an angle of 8 degrees", "training"),
    "earliest cotangent": Quantity("relative, ∂L/∂s_0", 0.1, _TENTH, "training"),
}
LAGS = (10, 100, 1000)
CONDITION_LAG = 10
TRAJECTORIES = ("own", "reference")
"""The states that a setting measures along: its own, or those of float64."""
BLOCKS = 32
"""Blocks of a run for the standard errors of its exponents."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    steps: int = 1_000
    """Length T of a run; retention at lag 1000 needs as many."""
    transient: int = 100
    """Steps left out of the exponents."""
    train_steps: int = 100
    """Length of the training step's sequence, the beginning of the run; its loss is that of the last step."""
    hidden_size: int = 16
    """Units N."""
    input_size: int = 16
    """Width D of the input, entries N(0, 1), a tenth of it for the chaotic network."""
    seeds: int = 10
    """Independent repetitions; each draws weights, inputs and targets, the same for every setting."""
    first_seed: int = 0
    """Seeds run from here."""
    networks: tuple[str, ...] = tuple(ROWS)
    """Kinds of network."""
    settings: tuple[str, ...] = tuple(setting.name for setting in SETTINGS)
    """Settings to measure where their device is there, and to merge where it is not."""
    merge: tuple[str, ...] = ()
    """Result files whose rows stand for devices that are not here; none: the stored result, if it is of these
    settings."""


SMOKE = Config(
    steps=40, transient=4, train_steps=8, hidden_size=3, input_size=3, seeds=2,
    networks=("vanilla, gain 1", "vanilla, gain 3, chaotic"),
    settings=("cpu float32", "emulated tf32 everywhere", "emulated bf16"),
)  # fmt: skip
"""A few seconds: every code path, no statement about the claims."""


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be run."""
    least = {"steps": CONDITION_LAG, "transient": 0, "train_steps": 1, "hidden_size": 1, "input_size": 1, "seeds": 1}
    command.check_at_least(config, least | {"first_seed": 0})
    if config.steps - config.transient < BLOCKS:
        raise UserError(
            f"--steps: expected at least {BLOCKS} after the --transient {config.transient}, one for each block of the "
            f"standard errors, found {config.steps}"
        )
    for name, known in (("networks", tuple(ROWS)), ("settings", tuple(setting.name for setting in SETTINGS))):
        chosen = getattr(config, name)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
            raise UserError(f"--{name}: expected some of {known}, each once, found {chosen}")
    if config.train_steps > config.steps:
        raise UserError(f"--train-steps: expected at most --steps {config.steps}, found {config.train_steps}")


# --- products with rounded operands ----------------------------------------------------------------------------------

Product = Callable[[core.JaxprEqn, Sequence[jax.Array]], jax.Array]
"""Computes one ``dot_general`` of a program from its operands."""


def with_products(function: Callable[..., Any], product: Product) -> Callable[..., Any]:
    """Returns ``function`` with every matrix product of its program computed by ``product``, those in loops included.

    Derivatives that the function takes are part of its program; the result is not to be differentiated again.

    Raises:
      ValueError: when called, for a program with a product inside an operation that is not known here.
    """

    def changed(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = _evaluate(program, product, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return changed


def _evaluate(program: core.ClosedJaxpr, product: Product, arguments: Sequence[Any]) -> list[Any]:
    values: dict[core.Var, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(program.jaxpr.invars, arguments, strict=True))

    def read(at: Any) -> Any:
        return at.val if isinstance(at, core.Literal) else values[at]

    for equation in program.jaxpr.eqns:
        outputs = _operation(equation, product, [read(at) for at in equation.invars])
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(at) for at in program.jaxpr.outvars]


def _programs_in(equation: core.JaxprEqn) -> list[core.ClosedJaxpr]:
    values = [one for value in equation.params.values() for one in (value if isinstance(value, tuple) else (value,))]
    closed = [core.ClosedJaxpr(one, ()) if isinstance(one, core.Jaxpr) else one for one in values]
    return [one for one in closed if isinstance(one, core.ClosedJaxpr)]


def _multiplies(program: core.ClosedJaxpr) -> bool:
    return any(
        equation.primitive.name == "dot_general" or any(map(_multiplies, _programs_in(equation)))
        for equation in program.jaxpr.eqns
    )


_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
"""Operations that compute the program they hold, by the names that JAX has given them."""


def _operation(equation: core.JaxprEqn, product: Product, operands: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    inside = lambda program: lambda *arguments: _evaluate(program, product, arguments)
    if name == "dot_general":
        return [product(equation, operands)]
    if name == "scan":
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]

        def body(carry, xs):
            outputs = _evaluate(params["jaxpr"], product, [*consts, *carry, *xs])
            return outputs[:num_carry], outputs[num_carry:]

        carry, stacked = jax.lax.scan(
            body, carry, operands[num_consts + num_carry :], length=params["length"], reverse=params["reverse"],
            unroll=params["unroll"],
        )  # fmt: skip
        return [*carry, *stacked]
    if name == "while":
        of_test, of_body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        test, body_of = inside(params["cond_jaxpr"]), inside(params["body_jaxpr"])
        return jax.lax.while_loop(
            lambda carry: test(*operands[:of_test], *carry)[0],
            lambda carry: body_of(*operands[of_test:of_body], *carry),
            operands[of_body:],
        )
    if name == "cond":
        index, *rest = operands
        return jax.lax.switch(index, [inside(branch) for branch in params["branches"]], *rest)
    if name in _CALLS:
        (program,) = _programs_in(equation)
        return inside(program)(*operands)
    if any(map(_multiplies, _programs_in(equation))):
        raise ValueError(f"expected products in loops, branches and calls only, found one in {name!r}")
    outputs = equation.primitive.bind(*operands, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


def asks_for_highest(equation: core.JaxprEqn) -> bool:
    """Returns whether a product of a program asks for the highest precision."""
    precision = equation.params["precision"]
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(one == jax.lax.Precision.HIGHEST for one in both)


def rounded(x: jax.Array, rounding: jax.Array) -> jax.Array:
    """Returns float32 rounded to nearest even by :data:`ROUNDINGS`\\ ``[rounding]``; other dtypes as they are."""
    if x.dtype != jnp.float32:
        return x
    to = [x, *(jax.lax.reduce_precision(x, 8, MANTISSA_BITS[name]) for name in ROUNDINGS[1:])]
    return jax.lax.select_n(rounding, *to)


def emulated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``changed(roundings, *arguments)``: ``function`` whose products round their operands.

    ``roundings`` is an integer array of two, so that one compiled program serves all: how products round that do not
    ask for the highest precision, and how those do that ask for it.
    """

    def changed(roundings: jax.Array, *arguments: Any) -> Any:
        def product(equation: core.JaxprEqn, operands: Sequence[jax.Array]) -> jax.Array:
            rounding = roundings[1] if asks_for_highest(equation) else roundings[0]
            return equation.primitive.bind(*(rounded(x, rounding) for x in operands), **equation.params)

        return with_products(function, product)(*arguments)

    return changed


def at_default(equation: core.JaxprEqn, operands: Sequence[jax.Array]) -> jax.Array:
    """Returns a product at the device's default precision, whatever it asks for."""
    return equation.primitive.bind(*operands, **{**equation.params, "precision": None})


# --- one measurement -------------------------------------------------------------------------------------------------


@jax.custom_jvp
def _placed(is_on: jax.Array, there: Any, state: Any) -> Any:
    """The state, or another one in its place; perturbations pass as if it were the state."""
    return jax.tree.map(lambda other, own: jnp.where(is_on > 0, other, own), there, state)


@_placed.defjvp
def _(primals, tangents):
    return _placed(*primals), tangents[2]


def on_rails(cell: rg.Cell) -> rg.Cell:
    """Returns the cell with inputs (x, s, is_on): where ``is_on`` > 0 its step starts from s and not from its state.

    Jacobians are those of the cell, taken there.
    """

    def preactivate(params, state, inputs):
        x, there, is_on = inputs
        return cell.preactivate(params, _placed(is_on, there, state), x), there, is_on

    def update(params, z, state):
        z, there, is_on = z
        return cell.update(params, z, _placed(is_on, there, state))

    return cell._replace(input_size=None, preactivate=preactivate, update=update)


class Drawn(NamedTuple):
    """A network with its inputs and what it is to learn."""

    params: Any
    xs: jax.Array
    read_out: jax.Array
    targets: jax.Array


def draw(row: str, seed: int, config: Config) -> Drawn:
    """Returns what a seed draws, in float32 on the CPU, whatever the setting."""
    with jax.enable_x64(False), jax.default_device(jax.devices("cpu")[0]):
        key_params, key_xs, key_read_out, key_targets = jax.random.split(jax.random.key(seed), 4)
        options = {} if ROWS[row].init is None else {"init": ROWS[row].init}
        cell = ROWS[row].make(config.input_size, config.hidden_size, **options)
        xs = jnp.float32(ROWS[row].input_scale) * jax.random.normal(key_xs, (config.steps, config.input_size))
        outputs = 4
        read_out = config.hidden_size**-0.5 * jax.random.normal(key_read_out, (outputs, config.hidden_size))
        return jax.device_get(Drawn(cell.init(key_params), xs, read_out, jax.random.normal(key_targets, (outputs,))))


def _lags(config: Config) -> tuple[int, ...]:
    return tuple(lag for lag in LAGS if lag <= config.steps)


def _measure(cell: rg.Cell, config: Config, drawn: Drawn, there: Any, is_on: jax.Array) -> dict[str, Any]:
    """Chain, spectrum, singular values and training step of one run."""
    params, xs, read_out, targets = drawn
    start = cell.init_state()
    railed, inputs = on_rails(cell), (xs, there, jnp.full(len(xs), is_on, xs.dtype))

    def loss(params, taps):
        last = rg.unroll(cell, params, start, xs[: config.train_steps], taps=taps).final
        return jnp.mean((read_out @ cell.read(params, last) - targets) ** 2)

    value, (grads, taps) = jax.value_and_grad(loss, argnums=(0, 1))(params, rg.zero_taps(cell, config.train_steps))
    spectrum = rg.lyapunov_spectrum(
        railed, params, start, inputs, num_transient=config.transient, num_blocks=BLOCKS, num_determinants=0
    )
    chain = rg.jacobian_chain(railed, params, start, inputs)
    at = jnp.array([config.steps - lag for lag in _lags(config)[:2]])
    # the singular values are those of ∂s_lag/∂s_0: the first steps of the run
    first = jax.tree.map(lambda leaf: leaf[:CONDITION_LAG], inputs)
    return {
        "states": rg.unroll(railed, params, start, inputs).states,
        "retention": rg.retention(railed, params, start, inputs).log_norm,
        "direct": rg.retention(railed, params, start, inputs, path="direct").log_norm,
        "chain": jax.tree.map(lambda leaf: leaf[at], chain),
        "block_exponents": spectrum.block_exponents,
        "exponents": spectrum.exponents,
        "stderr": spectrum.stderr,
        "dimension": spectrum.kaplan_yorke_dimension,
        "log_condition": rg.chain_singular_values(railed, params, start, first).log_condition_number,
        "loss": value,
        "grads": grads,
        "cotangent": jax.tree.map(lambda a, b: a[0] + b[0], taps.direct, taps.gated),
    }


@functools.cache
def _program(make: Callable[..., rg.Cell], setting: Setting, config: Config) -> Callable[..., Any]:
    """The compiled measurement; ``setting`` without what does not change the program."""
    cell = make(config.input_size, config.hidden_size, dtype=setting.dtype)
    measure = functools.partial(_measure, cell, config)
    if setting.dtype == "float32" and setting.platform == "cpu":
        return jax.jit(emulated(measure))
    if setting.reach == "everything":
        return jax.jit(with_products(measure, at_default))
    return jax.jit(measure)


def device_of(platform: str) -> jax.Device | None:
    """Returns the first device of a platform, None where there is none."""
    try:
        return jax.devices(platform)[0]
    except RuntimeError:
        return None


@contextlib.contextmanager
def _computing(setting: Setting) -> Iterator[None]:
    """The surroundings of a setting: its device, 64 bits or not, and what its products are at unless they say."""
    # on a CPU float32 is float32 at any precision, and one for all makes one program of them
    precision = "highest" if setting.products == "exact" and setting.platform != "cpu" else "default"
    with (
        jax.enable_x64(setting.dtype == "float64"),
        jax.default_device(device_of(setting.platform)),
        jax.default_matmul_precision(precision),
    ):
        yield


def measure(setting: Setting, row: str, drawn: Drawn, there: Any, config: Config) -> dict[str, Any]:
    """Returns everything measured of one network in one setting, as float64 arrays.

    Args:
      setting: how to compute; its device is there.
      row: of :data:`ROWS`.
      drawn: the network.
      there: states s_0 … s_{T−1} to measure along, or None for its own.
      config: sizes.
    """
    cell = ROWS[row].make(config.input_size, config.hidden_size)
    with _computing(setting):
        cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(setting.dtype), tree)
        is_on = cast(0.0 if there is None else 1.0)
        if there is None:
            there = jax.tree.map(lambda leaf: np.zeros((config.steps, *leaf.shape)), cell.init_state())
        # rounding, emulated or not, comes with the arguments of the one program for float32 on a CPU
        bare = setting._replace(name="", products="", emulated=False)
        roundings: tuple[jax.Array, ...] = ()
        if setting.dtype == "float32" and setting.platform == "cpu":
            of_model = ROUNDINGS.index(setting.products) if setting.emulated else 0
            of_measurement = of_model if setting.reach == "everything" else 0
            bare = bare._replace(reach="model")
            roundings = (jnp.array([of_model, of_measurement], jnp.int32),)
        else:
            bare = setting
        found = _program(ROWS[row].make, bare, config)(*roundings, cast(drawn), cast(there), is_on)
        found = jax.device_get(found)
    return jax.tree.map(lambda leaf: leaf if leaf.dtype.kind in "ib" else np.asarray(leaf, np.float64), found)


# --- errors ----------------------------------------------------------------------------------------------------------


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def relative_distance(found: rg.LogScaled, reference: rg.LogScaled) -> np.ndarray:
    """Returns ‖A − B‖_F / ‖B‖_F of matrices with exponents of their own."""
    apart = np.clip(np.asarray(found.exponent, int) - np.asarray(reference.exponent, int), -2000, 2000)
    moved = np.ldexp(found.mantissa, apart[:, None, None])
    norm = lambda matrices: np.linalg.norm(matrices, axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return norm(moved - reference.mantissa) / norm(reference.mantissa)


def dimension_of(exponents: np.ndarray) -> float:
    """Returns the Kaplan-Yorke dimension of exponents, in any order; their number if no sum of them is negative."""
    falling = -np.sort(-np.asarray(exponents, float))
    sums = np.cumsum(falling)
    below = np.flatnonzero(sums < 0)
    if len(below) == 0:
        return float(len(falling))
    j = int(below[0])
    return j + (float(sums[j - 1] / -falling[j]) if j else 0.0)


def dimension_stderr(block_exponents: np.ndarray) -> float:
    """Returns the standard error of the dimension, by leaving out one block at a time (jackknife)."""
    num_blocks = len(block_exponents)
    left = (block_exponents.sum(axis=0) - block_exponents) / (num_blocks - 1)
    each = np.array([dimension_of(exponents) for exponents in left])
    return float(np.sqrt((num_blocks - 1) * np.mean((each - each.mean()) ** 2)))


def allowance(stderr: float, num: int = 1) -> float:
    """Returns what ``num`` estimates of this standard error differ by from as many independent ones, 95 % jointly."""
    return float(scipy.stats.norm.isf(0.025 / num) * np.sqrt(2) * stderr)


def values_of(measured: dict[str, Any], config: Config) -> dict[str, float]:
    """Returns the quantities that are single numbers; those that are more, or undefined, are NaN or left out."""
    lags = _lags(config)
    values = {f"retention, lag {lag}": measured["retention"][lag] for lag in lags}
    if 100 in lags:
        direct = measured["direct"][100]
        values["direct path, lag 100"] = direct if np.isfinite(direct) else np.nan
        rate = np.polyfit(np.arange(10, 101), measured["retention"][10:101], 1)[0]
        values["half-life"] = -np.log(2) / rate if rate < 0 else np.inf
    exponents = measured["exponents"]
    return values | {
        "condition number, lag 10": measured["log_condition"],
        "leading exponent": exponents[0],
        "most negative exponent": exponents[-1],
        "Lyapunov dimension": measured["dimension"],
        "loss": measured["loss"],
        "weight gradient, size": np.linalg.norm(_flat(measured["grads"])),
    }


def allowed_of(reference: dict[str, Any]) -> dict[str, float]:
    """Returns the largest error that survives, of every quantity; NaN where there is nothing to compare."""
    size, stderr = len(reference["exponents"]), reference["stderr"]
    is_decaying = reference["exponents"][0] < 0
    allowed = {name: quantity.allowed for name, quantity in QUANTITIES.items() if quantity.allowed is not None}
    return allowed | {
        "leading exponent": float(allowance(stderr[0])),
        "most negative exponent": float(allowance(stderr[-1])),
        "whole spectrum": float(allowance(1.0, size)),
        # a contracting run has dimension 0 and no scatter
        "Lyapunov dimension": np.nan
        if is_decaying
        else float(allowance(dimension_stderr(reference["block_exponents"]))),
    }


def errors_of(found: dict[str, Any], reference: dict[str, Any], config: Config) -> dict[str, float]:
    """Returns the error of every quantity; inf where it is no number though the reference's is, NaN where that is none.

    Units are those of :data:`QUANTITIES`.
    """
    new, old = values_of(found, config), values_of(reference, config)
    apart = {name: abs(new[name] - old[name]) if np.isfinite(old[name]) else np.nan for name in old}
    for name in ("half-life", "loss", "weight gradient, size"):
        if name in apart:
            apart[name] /= abs(old[name])
    for lag, distance in zip(_lags(config), relative_distance(found["chain"], reference["chain"]), strict=False):
        apart[f"chain, lag {lag}"] = distance
    each = np.abs(found["exponents"] - reference["exponents"]) / reference["stderr"]
    a, b = _flat(found["grads"]), _flat(reference["grads"])
    far, near = _flat(found["cotangent"]), _flat(reference["cotangent"])
    apart |= {
        "states": np.max(np.abs(_flat(found["states"]) - _flat(reference["states"]))),
        "whole spectrum": np.max(each),
        "weight gradient, direction": 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        "earliest cotangent": float(np.linalg.norm(far - near) / np.linalg.norm(near)),
    }
    is_defined = {name: np.isfinite(old.get(name, 0.0)) for name in apart}
    return {name: np.inf if is_defined[name] and np.isnan(error) else float(error) for name, error in apart.items()}


def is_compared(row: str, trajectory: str, quantity: str) -> bool:
    """Returns whether a quantity of two settings is to be the same along these trajectories."""
    kind = QUANTITIES[quantity].kind
    if trajectory == "reference":
        return kind != "training"  # a training step has its own trajectory alone
    return kind == "exponents" or not ROWS[row].is_chaotic


@functools.lru_cache(maxsize=1)
def _references(row: str, config: Config) -> list[tuple[Drawn, Any, dict[str, Any]]]:
    """For every seed what is drawn, the states s_0 … s_{T−1} and what was measured, in float64."""
    found = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        drawn = draw(row, seed, config)
        measured = measure(REFERENCE, row, drawn, None, config)
        start = ROWS[row].make(config.input_size, config.hidden_size).init_state()
        there = jax.tree.map(lambda s, after: np.concatenate([np.asarray(s)[None], after[:-1]]), start,
                             measured["states"])  # fmt: skip
        found.append((drawn, there, measured))
    return found


def _along_quantities(found: dict[str, float]) -> np.ndarray:
    return np.array([found.get(name, np.nan) for name in QUANTITIES], float)


def _measure_reference(row: str, config: Config) -> xr.Dataset:
    """Returns value and allowance of every quantity of one kind of network, of every seed."""
    measured = [reference for _, _, reference in _references(row, config)]
    return xr.Dataset(
        {
            "reference": (("seed", "quantity"), np.stack([_along_quantities(values_of(m, config)) for m in measured])),
            "allowed": (("seed", "quantity"), np.stack([_along_quantities(allowed_of(m)) for m in measured])),
        }
    )


def _measure_setting(row: str, setting: Setting, config: Config) -> xr.Dataset:
    """Returns the errors of one kind of network in one setting: every seed, along both trajectories."""
    seeds = []
    for drawn, there, reference in _references(row, config):
        of_seed = []
        for trajectory in TRAJECTORIES:
            found = measure(setting, row, drawn, None if trajectory == "own" else there, config)
            errors = errors_of(found, reference, config)
            kept = {name: error for name, error in errors.items() if is_compared(row, trajectory, name)}
            of_seed.append(_along_quantities(kept))
        seeds.append(np.stack(of_seed))
    return xr.Dataset({"error": (("seed", "trajectory", "quantity"), np.stack(seeds))})


MEASURED = ("error", "reference", "allowed")
"""Variables that a run measures; all others follow from them."""

_DESCRIPTIONS = {
    "error": ("of the quantity", "distance from float64; units and meaning of each are in the coordinate `unit`"),
    "reference": ("of the quantity", "value in float64; NaN where it is not one number"),
    "allowed": ("of the quantity", "largest error that survives"),
    "ratio": ("1", "error over the largest one that survives: above 1 the quantity is lost"),
}


def derive(dataset: xr.Dataset) -> xr.Dataset:
    """Returns the dataset with errors in units of what survives, and medians with intervals over seeds."""
    dataset["ratio"] = (dataset["error"] / dataset["allowed"]).transpose(*dataset["error"].dims)
    summarise(dataset, ("error", "ratio"), _DESCRIPTIONS)
    return describe(dataset, _DESCRIPTIONS)


# --- what is not here ------------------------------------------------------------------------------------------------


def settings_of(config: Config) -> dict[str, Any]:
    """Returns what two results must share to stand side by side: all settings but where rows were merged from."""
    found: dict[str, Any] = json.loads(json.dumps(command.config_dict(config)))
    del found["merge"]
    return found


def merged(measured: xr.Dataset, files: Sequence[Path], config: Config) -> xr.Dataset:
    """Returns measured rows with those of result files for settings that are not among them, in the usual order.

    Raises:
      FileNotFoundError: no such file.
      UserError: a file that is no result of this experiment, or of other settings, networks or quantities.
    """
    parts = [measured]
    for file in files:
        with command.user_input():
            other = results.load(file, experiment="backends")
        theirs, ours = json.loads(other.attrs["config"]), settings_of(config)
        different = sorted(name for name in ours if theirs.get(name) != ours[name])
        if different:
            said = "; ".join(f"{name}: expected {ours[name]}, found {theirs.get(name)}" for name in different)
            raise UserError(f"--merge {file}: measured with other settings, {said}")
        for name in ("row", "quantity", "trajectory", "seed"):
            if other[name].values.tolist() != measured[name].values.tolist():
                raise UserError(
                    f"--merge {file}: measured other values of {name!r}, found {other[name].values.tolist()}"
                )
        loss = [dataset["reference"].sel(quantity="loss").transpose("row", "seed") for dataset in (other, measured)]
        is_same = [not ROWS[str(row)].is_chaotic for row in measured["row"].values]
        # two float64 reference runs of one network, on two machines
        if not np.allclose(loss[0][is_same], loss[1][is_same], rtol=1e-6, atol=0):
            raise UserError(
                f"--merge {file}: measured other networks, the losses of its float64 runs differ from these"
            )
        have = {name for part in parts for name in part["setting"].values.tolist()}
        new = [name for name in other["setting"].values.tolist() if name in config.settings and name not in have]
        if new:
            parts.append(other[["error"]].sel(setting=new))
    if len(parts) == 1:
        return measured
    error = xr.concat([part["error"] for part in parts], dim="setting")
    order = [setting.name for setting in SETTINGS if setting.name in error["setting"].values]
    whole = measured.drop_vars("error").drop_dims("setting")
    return whole.assign(error=error.sel(setting=order).transpose("setting", *measured["error"].dims[1:]))


def _files(config: Config, screen: rich.console.Console | None) -> list[Path]:
    """The files to merge: those named, else the stored result where it was made with these settings."""
    if config.merge:
        return [Path(file) for file in config.merge]
    if not STORED.is_file():
        return []
    theirs = json.loads(results.load(STORED, experiment="backends").attrs["config"])
    theirs.pop("merge", None)
    if theirs != settings_of(config):
        if screen is not None:
            screen.print("the stored result was made with other settings: nothing merged", highlight=False)
        return []
    return [STORED]


def run(
    config: Config, *, parts: results.Parts | None = None, screen: rich.console.Console | None = None
) -> xr.Dataset:
    """Returns the measured dataset, with merged rows; finished pieces are kept in ``parts`` and resumed from there.

    Raises:
      UserError: settings that cannot be used, or a file that cannot be merged.
      FileNotFoundError: a file to merge that is not there.
      OSError: a part cannot be written.
    """
    check(config)
    files = _files(config, screen)
    for file in files:
        with command.user_input():
            results.load(file, experiment="backends")  # a wrong name is told before minutes of measuring
    started = time.perf_counter()
    config_of_rows = dataclasses.replace(config, merge=())
    chosen = [setting for setting in SETTINGS if setting.name in config.settings]
    here = [setting for setting in chosen if device_of(setting.platform) is not None]
    if not here:
        raise UserError(f"--settings: expected one at least whose device is here, found {config.settings}")
    pieces = []
    for index, row in enumerate(config.networks):
        pieces.append(Piece(f"{index}-reference", f"{row}: cpu float64",
                            functools.partial(_measure_reference, row, config_of_rows)))  # fmt: skip
        pieces += [
            Piece(
                f"{index}-{setting.name.replace(' ', '-')}",
                f"{row}: {setting.name}",
                functools.partial(_measure_setting, row, setting, config_of_rows),
            )
            for setting in here
        ]
    measured = iter(command.measure(pieces, parts=parts, screen=screen))
    references, errors = [], []
    for _ in config.networks:
        references.append(next(measured))
        errors.append(xr.concat([next(measured) for _ in here], dim="setting"))
    dataset = xr.merge([xr.concat(references, dim="row"), xr.concat(errors, dim="row")])
    devices = [device_of(setting.platform) for setting in here]
    dataset = dataset.transpose("setting", "row", "trajectory", "quantity", "seed", missing_dims="ignore")
    dataset = dataset.assign_coords(
        setting=[setting.name for setting in here],
        platform=("setting", [setting.platform for setting in here]),
        device=("setting", [device.device_kind for device in devices if device is not None]),
        dtype=("setting", [setting.dtype for setting in here]),
        products=("setting", [setting.products for setting in here]),
        reach=("setting", [setting.reach for setting in here]),
        jax=("setting", [metadata.version("jax")] * len(here)),
        sources=("setting", [results.source_digest("backends")] * len(here)),
        row=list(config.networks),
        trajectory=list(TRAJECTORIES),
        quantity=list(QUANTITIES),
        unit=("quantity", [quantity.error for quantity in QUANTITIES.values()]),
        seed=np.arange(config.first_seed, config.first_seed + config.seeds),
    )
    dataset = merged(dataset, files, config)
    seconds = time.perf_counter() - started
    dataset.attrs = command.provenance("backends", config_of_rows, seconds=seconds, dtype="float64")
    dataset.attrs["matmul_precision"] = "as each setting says"
    return derive(dataset)


# --- what a person sees ----------------------------------------------------------------------------------------------


def _settings(dataset: xr.Dataset, chosen: Callable[[Setting], bool]) -> list[Setting]:
    """Returns the settings of a dataset for which ``chosen`` is true, in the usual order."""
    there = set(dataset["setting"].values.tolist())
    return [setting for setting in SETTINGS if setting.name in there and chosen(setting)]


def _quantities(*kinds: str) -> list[str]:
    return [name for name, quantity in QUANTITIES.items() if quantity.kind in kinds]


MEASUREMENT = ("states", "products", "condition", "exponents")


def _farthest(dataset: xr.Dataset, setting: str, row: str, names: Sequence[str], end: str) -> tuple[str, float] | None:
    """Returns the quantity whose ``end`` (high, low) of the ratio's interval is the largest, of both trajectories.

    None where nothing was compared.
    """
    ratio = dataset[f"ratio_{end}"].sel(setting=setting, row=row, quantity=list(names)).max("trajectory")
    if ratio.isnull().all():
        return None
    worst = ratio.isel(quantity=int(ratio.fillna(-1).argmax("quantity")))
    return str(worst["quantity"].values), float(worst)


def _check(
    dataset: xr.Dataset, setting: Setting, row: str, what: str, kinds: Sequence[str], claim: str, *,
    survives: bool = True, decides: bool = True, prefix: str = "",
) -> list[Check]:  # fmt: skip
    """Whether all quantities survive, or one at least is lost; judged by the end of the interval that speaks against.

    Nothing where nothing was compared.
    """
    found = _farthest(dataset, setting.name, row, _quantities(*kinds), "high" if survives else "low")
    if found is None:
        return []
    quantity, ratio = found
    return [
        Check(
            f"{prefix}{what}: {setting.name}, {row}",
            f"{quantity} off by {ratio:.2g} of what it may",
            "≤ 1" if survives else "> 1",
            bool(ratio <= 1) if survives else bool(ratio > 1),
            claim,
            QUANTITIES[quantity].why,
            decides,
        )
    ]


def _predicted(dataset: xr.Dataset, setting: str, quantity: str, low: float, high: float, claim: str) -> list[Check]:
    """A prediction about the median error of the row where it is largest, along the settings' own trajectories."""
    if setting not in dataset["setting"].values:
        return []
    error = float(dataset["error_median"].sel(setting=setting, trajectory="own", quantity=quantity).max())
    if np.isnan(error):
        return []
    bound = f"< {high:g}" if low < 0 else f"> {low:g}"
    holds = bool(low < error < high)
    name, unit = f"prediction, {quantity}: {setting}, worst row", QUANTITIES[quantity].error
    return [Check(name, f"{error:.2g} ({unit})", bound, holds, claim, WHY_PREDICTED, decides=False)]


_NOT_TRIED = "a claim is tried by its settings alone"
WHY_PREDICTED = "written down before the first run"


def verdict(dataset: xr.Dataset) -> list[Check]:
    """Returns the checks of every claim, per setting and kind of network; those of predictions where they apply."""
    checks = []
    rows = [str(row) for row in dataset["row"].values]
    everything = (*MEASUREMENT, "training")
    for setting in _settings(dataset, lambda setting: setting.is_plain_float32):
        for row in rows:
            checks += _check(dataset, setting, row, "all survive", everything, "N1")
    checks += _predicted(dataset, "cpu float32", "chain, lag 100", -1, 1e-3, "N1")
    checks += _predicted(dataset, "cpu float32", "condition number, lag 10", -1, 0.01, "N1")
    for setting in _settings(dataset, lambda setting: setting.dtype == "bfloat16"):
        for row in rows:
            checks += _check(
                dataset, setting, row, "all survive", everything, "N1", decides=False, prefix="beside it, "
            )

    for setting in _settings(dataset, lambda setting: setting.is_low and setting.reach == "everything"):
        for row in rows:
            checks += _check(dataset, setting, row, "exponents survive", ("exponents",), "N2")
            checks += _check(dataset, setting, row, "products are lost", ("products",), "N2", survives=False)
            checks += _check(dataset, setting, row, "condition numbers are lost", ("condition",), "N2", survives=False)
        for name, survives in (("leading exponent", True), ("most negative exponent", False)):
            found = [_farthest(dataset, setting.name, row, [name], "high" if survives else "low") for row in rows]
            ratios = [ratio for _, ratio in filter(None, found)]
            checks.append(
                Check(
                    f"prediction, {name} {'survives' if survives else 'is lost'} for every network: {setting.name}",
                    f"off by {min(ratios):.2g} to {max(ratios):.2g} of what it may",
                    "≤ 1" if survives else "> 1",
                    max(ratios) <= 1 if survives else min(ratios) > 1,
                    "N2",
                    WHY_PREDICTED,
                    decides=False,
                )
            )
        if setting.products == "tf32":
            checks += _predicted(dataset, setting.name, "chain, lag 100", -1, 0.1, "N2")

    for setting in _settings(dataset, lambda setting: setting.is_low and setting.reach == "model"):
        for row in rows:
            checks += _check(dataset, setting, row, "measurement survives", MEASUREMENT, "N3")
            checks += _check(dataset, setting, row, "training step survives", ("training",), "N3")
        if setting.products == "bfloat16":
            checks += _predicted(dataset, setting.name, "states", 0.01, np.inf, "N3")
            checks += _predicted(dataset, setting.name, "retention, lag 1000", 0.1, np.inf, "N3")
        checks += _predicted(dataset, setting.name, "weight gradient, direction", -1, 0.01, "N3")
    tried = {check.claim for check in checks if check.decides}
    for claim in CLAIMS:
        if claim.id not in tried:
            checks.append(Check("settings of this claim", "none measured", "one at least", None, claim.id, _NOT_TRIED))
    return checks


def _lost(dataset: xr.Dataset, chosen: Callable[[Setting], bool], kinds: Sequence[str]) -> str:
    """Returns in words what does not survive in these settings, with the rows; empty for nothing."""
    found = []
    for setting in _settings(dataset, chosen):
        of_setting = []
        for name in _quantities(*kinds):
            high = dataset["ratio_high"].sel(setting=setting.name, quantity=name).max("trajectory")
            rows = [str(row) for row in dataset["row"].values if float(high.sel(row=row)) > 1]
            if rows:
                compared = int(high.notnull().sum())
                of_setting.append(f"{name} ({'every network' if len(rows) == compared else '; '.join(rows)})")
        found.append(f"{setting.name}: {', '.join(of_setting) if of_setting else 'nothing'}")
    return "; ".join(found)


def _share(dataset: xr.Dataset, chosen: Callable[[Setting], bool], kinds: Sequence[str]) -> str:
    names = [setting.name for setting in _settings(dataset, chosen)]
    high = dataset["ratio_high"].sel(setting=names, quantity=_quantities(*kinds)).max("trajectory")
    return f"{int((high <= 1).sum())} of {int(high.notnull().sum())}"


def summary(dataset: xr.Dataset) -> dict[str, str]:
    """Returns the finding on each claim."""
    everything = (*MEASUREMENT, "training")
    plain = lambda setting: setting.is_plain_float32
    low = lambda setting: setting.is_low and setting.reach == "everything"
    model = lambda setting: setting.is_low and setting.reach == "model"
    said = f"(comparisons: quantities × networks, N = {json.loads(dataset.attrs['config'])['hidden_size']})"
    missed = {
        claim.id: [check.name.removeprefix("prediction, ") for check in verdict(dataset)
                   if check.claim == claim.id and check.name.startswith("prediction, ") and not check.holds]
        for claim in CLAIMS
    }  # fmt: skip
    sentences = {
        "N1": f"{_share(dataset, plain, everything)} comparisons with float64 survive {said}; lost are with "
        f"{_lost(dataset, plain, everything)}.",
        "N2": f"{_share(dataset, low, ('exponents',))} comparisons of exponents survive {said}, "
        f"{_share(dataset, low, ('products',))} of products and {_share(dataset, low, ('condition',))} of condition "
        f"numbers; lost are with {_lost(dataset, low, ('exponents', 'products', 'condition'))}.",
        "N3": f"{_share(dataset, model, MEASUREMENT)} comparisons of the measurement survive {said} and "
        f"{_share(dataset, model, ('training',))} of the training step; lost are with "
        f"{_lost(dataset, model, everything)}.",
    }
    for claim, chosen in (("N1", plain), ("N2", low), ("N3", model)):
        if not _settings(dataset, chosen):
            sentences[claim] = "no setting of this claim was measured."
    for claim, names in missed.items():
        if names:
            sentences[claim] += f"  Predictions that came out otherwise: {'; '.join(names)}."
    return sentences


def _own_or_reference(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Along the setting's own trajectory where that is compared, else along the reference's states."""
    variable = dataset[name]
    return variable.sel(trajectory="own").fillna(variable.sel(trajectory="reference"))


def table(dataset: xr.Dataset) -> rich.table.Table:
    """Returns the table a person reads first: per setting and quantity the median error of the worst network."""
    config = json.loads(dataset.attrs["config"])
    versions = sorted({f"jax {version} on {device}" for version, device in
                       zip(dataset["jax"].values, dataset["device"].values, strict=True)})  # fmt: skip
    older = [str(name) for name, digest in zip(dataset["setting"].values, dataset["sources"].values, strict=True)
             if digest != dataset.attrs["source_digest"]]  # fmt: skip
    shown = rich.table.Table(
        title=f"Errors against float64, worst of {dataset.sizes['row']} networks: N={config['hidden_size']}, "
        f"T={config['steps']}, {config['seeds']} seeds; {'; '.join(versions)}",
        caption="medians over seeds, largest over networks; own trajectory where that can be compared; ✗: lost for "
        "one network at least (upper end of its 95 % interval beyond what survives)"
        + (f"; made by other sources: {', '.join(older)}" if older else ""),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("quantity (error)")
    for setting in dataset["setting"].values:
        shown.add_column(str(setting), justify="right")
    error, high = _own_or_reference(dataset, "error_median"), _own_or_reference(dataset, "ratio_high")
    for name, quantity in QUANTITIES.items():
        cells = []
        for setting in dataset["setting"].values:
            at = {"setting": setting, "quantity": name}
            value, is_lost = float(error.sel(at).max()), bool((high.sel(at) > 1).any())
            cells.append("—" if np.isnan(value) else f"{value:.1e}{' ✗' if is_lost else '  '}")
        shown.add_row(f"{name} ({quantity.error})", *cells)
    return shown


_LIMIT = 3
"""Decades shown on either side of what survives."""


def _draw(dataset: xr.Dataset, title: str, select: Callable[[str], xr.DataArray]) -> matplotlib.figure.Figure:
    """Draws a map of errors for every network: quantities by settings, in decades of what survives."""
    config = json.loads(dataset.attrs["config"])
    rows, names = dataset["row"].values, list(QUANTITIES)
    settings = [str(name) for name in dataset["setting"].values]
    drawn = matplotlib.figure.Figure(figsize=(4.6 + 0.85 * 2 * len(settings), 12), layout="constrained")
    panels = drawn.subplots(2, -(-len(rows) // 2), squeeze=False, sharex=True, sharey=True)
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="0.86")
    median, high = select("ratio_median"), select("ratio_high")
    for axes, row in zip(panels.flat, rows, strict=False):
        at = median.sel(row=row).transpose("quantity", "setting").values
        lost = high.sel(row=row).transpose("quantity", "setting").values > 1
        with np.errstate(divide="ignore"):
            decades = np.clip(np.log10(at), -_LIMIT, _LIMIT)
        axes.imshow(np.ma.masked_invalid(decades), cmap=colours, vmin=-_LIMIT, vmax=_LIMIT, aspect="auto")
        for y, x in np.argwhere(lost):
            axes.text(x, y, "✗", ha="center", va="center", fontsize=12, color="white" if decades[y, x] > 2 else "black")
        axes.set_title(str(row), fontsize=12)
        axes.set_xticks(range(len(settings)), settings, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(np.arange(len(settings) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    for axes in list(panels.flat)[len(rows) :]:
        axes.set_axis_off()
    of_colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-_LIMIT, _LIMIT), colours)
    bar = drawn.colorbar(of_colours, ax=panels, shrink=0.5, aspect=30, extend="both", location="right")
    ticks = list(range(-_LIMIT, _LIMIT + 1))
    bar.set_ticks(ticks, labels=[f"{10.0**tick:g}" for tick in ticks])
    bar.set_label("error / largest error that survives (median over seeds)")
    drawn.suptitle(
        f"{title}\nblue: survives; red, ✗: lost (upper end of the 95 % interval above 1); grey: not to be compared "
        f"or not defined.  N={config['hidden_size']}, T={config['steps']}, {config['seeds']} seeds",
        fontsize=12,
    )
    return drawn


def figure(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the map along the settings' own trajectories."""
    return _draw(
        dataset,
        "Which numbers of a recurrent network survive low precision?  Errors against float64, own trajectories\n"
        "(of the chaotic network all but the exponents along the states of float64, since trajectories separate)",
        lambda name: _own_or_reference(dataset, name),
    )


def figure_reference(dataset: xr.Dataset) -> matplotlib.figure.Figure:
    """Returns the map along the states of float64."""
    return _draw(
        dataset,
        "The same along the states of float64: what single steps and their measurement lose, without what piles up",
        lambda name: dataset[name].sel(trajectory="reference"),
    )


ABOUT = """Which numbers survive float32, TF32 and bfloat16: chain, spectrum, condition number, training step?

Measures the same networks in float64 and in every setting whose device is there, merges stored rows of the others,
emulates the products of GPUs and TPUs on the CPU; prints a table, and writes two maps and a netCDF file."""

CAPTION = """Map of errors against float64 for four networks: quantities (retention, chain, exponents, condition number,
training step) by settings (float32, TF32, bfloat16): blue where a number survives, red with a cross where it does
not."""

CAPTION_REFERENCE = """The same map with every setting measured along the states of float64, which leaves what single
steps and their measurement lose, without what the states pile up."""

EXPERIMENT = command.Experiment(
    name="backends",
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
        command.Picture("reference", CAPTION_REFERENCE, figure_reference),
    ),
)


if __name__ == "__main__":
    command.main(EXPERIMENT)
