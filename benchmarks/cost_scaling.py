"""How cost grows: seconds and memory of chains, spectra and training steps against T, N and B, as fitted exponents.

Cost ~ T^a · N^b · B^c.  Each size of an axis is compiled ahead, all are timed in turn, and an exponent is the slope of
log seconds against log size, by least squares over the upper half of the sizes, where constant costs no longer hide it;
its interval is the bootstrap's over rounds.  Memory is what the compiled program says it needs (arguments, outputs and
temporary buffers), which has no spread.

What to expect: time 1 in T, 1 in B, and for the matrix products of chains and spectra 3 in N; of training steps, which
multiply a batch by matrices, 2.  Less than that is fixed cost spread over more work.  Memory: 1 in T and B, since
states are stored, and at most 2 in N.

Equality first: the batch of sequences that the axis B measures gives every sequence's own curve and exponents.  That of
training steps is what `benchmarks.training_step` asserts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnngrad as rg
from benchmarks.harness import Row, judged, lstm_problem, timed
from benchmarks.training_step import problem

NUM_RESAMPLES = 2000
SLACK = 0.1
"""Above the expected exponent; the caches' share of it."""


class Size(NamedTuple):
    """Steps, units and inputs, sequences."""

    T: int
    N: int
    B: int


def of_sequences(size: Size, measure: Callable[..., Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns a program that measures B sequences of the LSTM, several of them under vmap, and its arguments."""
    cell, params, state, _ = lstm_problem(size.N, size.T)
    xs = jax.random.normal(jax.random.key(1), (size.B, size.T, size.N))

    def program(params, xs):
        if size.B == 1:
            return measure(cell, params, state, xs[0])[None]
        return jax.vmap(lambda one: measure(cell, params, state, one))(xs)

    return jax.jit(program), (params, xs)


def chain(size: Size) -> tuple[Any, tuple[Any, ...]]:
    """Returns the program of all lags of ∂c_T/∂c_k."""
    return of_sequences(size, lambda *given: rg.retention(*given, of="c", wrt="c").log_norm)


def spectrum(size: Size) -> tuple[Any, tuple[Any, ...]]:
    """Returns the program of all Lyapunov exponents."""
    return of_sequences(size, lambda *given: rg.lyapunov_spectrum(*given, num_blocks=2).exponents)


def training_step(size: Size) -> tuple[Any, tuple[Any, ...]]:
    """Returns the program of the instrumented training step."""
    cell, params, xs, weights = problem((size.B, size.T, size.N, size.N))
    state = cell.init_state((size.B,))

    def loss(params, taps, xs, weights):
        return jnp.sum(weights * rg.unroll(cell, params, state, xs, taps=taps).states.h)

    taps = rg.zero_taps(cell, size.T, (size.B,))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (params, taps, xs, weights)


class Quantity(NamedTuple):
    """What is measured, at which sizes of which axis, and the exponents that are expected."""

    name: str
    program: Callable[[Size], tuple[Any, tuple[Any, ...]]]
    sizes: dict[str, tuple[Size, ...]]
    """By axis; along it the other two stay as they are."""
    exponent_of_n: int
    """Of the seconds; in T and B it is 1."""


def _along(axis: str, values: Sequence[int], **others: int) -> dict[str, tuple[Size, ...]]:
    return {axis: tuple(Size(**{axis: value}, **others) for value in values)}


FULL = (
    Quantity(
        "all lags of a chain",
        chain,
        _along("T", (500, 1000, 2000, 4000, 8000), N=64, B=1)
        | _along("N", (32, 64, 96, 128, 256, 512), T=100, B=1)
        | _along("B", (2, 4, 8, 16, 32), T=200, N=64),
        3,
    ),
    Quantity(
        "a Lyapunov spectrum",
        spectrum,
        _along("T", (500, 1000, 2000, 4000), N=32, B=1) | _along("N", (32, 64, 128, 192, 256), T=40, B=1),
        3,
    ),
    Quantity(
        "a training step",
        training_step,
        _along("T", (64, 128, 256, 512, 1024), N=128, B=16)
        | _along("N", (32, 64, 128, 256, 512, 1024), T=32, B=16)
        | _along("B", (16, 32, 64, 128, 256), T=32, N=128),
        2,
    ),
)
SMOKE = (
    Quantity(
        "all lags of a chain",
        chain,
        _along("T", (10, 20), N=4, B=1) | _along("N", (4, 8), T=10, B=1) | _along("B", (1, 2), T=10, N=4),
        3,
    ),
    Quantity("a training step", training_step, _along("T", (10, 20), N=4, B=2), 2),
)


def check_batches(program: Callable[[Size], tuple[Any, tuple[Any, ...]]]) -> None:
    """Asserts that a batch of sequences gives what each of them gives alone."""
    (together, (params, xs)), (alone, _) = program(Size(T=20, N=5, B=3)), program(Size(T=20, N=5, B=1))
    expected = jnp.concatenate([alone(params, one[None]) for one in xs])
    np.testing.assert_allclose(together(params, xs), expected, rtol=1e-4, atol=1e-4)


def upper_half(values: Sequence[int]) -> slice:
    """Returns the part of ascending sizes that an exponent is fitted over: the larger half, and two at least."""
    return slice(min(len(values) // 2, len(values) - 2), None)


def slope(values: Sequence[int], costs: np.ndarray) -> float:
    """Returns the exponent a of cost ~ value^a, by least squares in log-log."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def fitted(values: Sequence[int], rounds: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Returns the exponent of the median costs and its 95 % bootstrap interval over rounds, (rounds, sizes)."""
    drawn = np.random.default_rng(0).integers(len(rounds), size=(NUM_RESAMPLES, len(rounds)))
    value = slope(values, np.median(rounds, axis=0))
    slopes = [slope(values, costs) for costs in np.median(rounds[drawn], axis=1)]
    low, high = np.quantile(slopes, [0.025, 0.975])
    # of few rounds the median of an even draw lies between two of them, and so may both ends beside the value
    return value, (min(float(low), value), max(float(high), value))


def _rows(quantity: Quantity, axis: str, repeats: int) -> list[Row]:
    """Returns the exponents of time and memory along one axis."""
    sizes = quantity.sizes[axis]
    values = [getattr(size, axis) for size in sizes]
    functions: dict[str, Callable[[], Any]] = {}
    memory, compilation = [], []
    for value, size in zip(values, sizes, strict=True):
        program, arguments = quantity.program(size)
        started = time.perf_counter()
        compiled = program.lower(*arguments).compile()
        compilation.append(time.perf_counter() - started)
        needs = compiled.memory_analysis()
        memory.append(needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes)
        functions[str(value)] = functools.partial(compiled, *arguments)
    timings = timed(functions, repeats)
    seconds = np.array([timing.repeats for timing in timings.values()]).T
    part = upper_half(values)
    fixed = {name: size for name, size in sizes[0]._asdict().items() if name != axis}
    details = {
        **fixed,
        axis: values,
        "dtype": "float32",
        "fitted over": values[part],
        "median_ms": [round(1e3 * timing.median, 3) for timing in timings.values()],
        "compile_s": [round(one, 3) for one in compilation],
        "memory_bytes": memory,
    }
    of = f"{quantity.name} against {axis} = {values[part][0]} … {values[-1]}, " + ", ".join(
        f"{name} = {size}" for name, size in fixed.items()
    )
    time_bound, memory_bound = (quantity.exponent_of_n, 2) if axis == "N" else (1, 1)
    exponent = slope(values[part], np.array(memory, float)[part])
    name = "cost_scaling"
    return [
        judged(
            name, f"exponent of time: {of}", fitted(values[part], seconds[:, part]), f"≤ {time_bound + SLACK}", details
        ),
        judged(
            name, f"exponent of memory: {of}", (exponent, (exponent, exponent)), f"≤ {memory_bound + SLACK}", details
        ),
    ]


def run(*, smoke: bool = False) -> list[Row]:
    """Returns the exponents of every quantity along every axis; two small sizes each with ``smoke``."""
    for program in (chain,) if smoke else (chain, spectrum):
        check_batches(program)
    rows = []
    for quantity in SMOKE if smoke else FULL:
        for axis in quantity.sizes:
            rows += _rows(quantity, axis, repeats=2 if smoke else 5)
    return rows
