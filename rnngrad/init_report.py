"""What an initialisation amounts to: effective biases, kept shares, singular values, and the rates they predict.

::

    J = D + G        kept share κ_t = |diag D| on the memory: f of an LSTM, u of a GRU, f/(f+i) of a minLSTM, |λ|, …
    E log κ          rate of the direct path of a typical unit, nats per step; log E κ ≥ E log κ is what is often quoted
    1/(−E log κ)     predicted lag at which ∏D has lost a factor e;   log 100/(−E log κ) for 10⁻²

Expectations run over units and steps of a run over given inputs.  The measured lags are those of ‖∏D‖_F and come out
longer: the norm follows the units that keep most, E log κ the average one.

Nothing here asks what kind of cell it is given.  The effective bias of a gate is its pre-activation with every matrix
and the state at zero, whatever number of biases the weights store; κ is read off D; the recurrent block of a gate is
its part of ``w_hh``.  Two conventions of :mod:`rnngrad.cells` are relied upon: the fused blocks stand in the order of
the pre-activations' fields, and the gate that says what share is kept is called ``f`` or ``u``.  Only mean-field
predictions know cells by name, in one table; a cell without a row there has NaN.

They take the gain ‖U‖_F/√N of the weights as they are (root mean square over gates), the measured mean square of W x,
and the mean forget bias.  For N → ∞, Gaussian weights and fresh inputs they are exact in the vanilla cell and good to
5e-3 nats per step in the gated ones as long as the input is not weak (``tied_rate`` of :mod:`rnngrad.theory`).

Sources: :mod:`rnngrad.theory`; Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063 (bound); Tallec & Ollivier 2018,
arXiv 1804.11188 (horizon of a gate).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rnngrad import theory
from rnngrad.cells.vanilla import ACTIVATIONS
from rnngrad.jacobians import Layout, prepare, real_dtype, step_pulls
from rnngrad.retention import decay_rate, retention
from rnngrad.types import Cell, Params, State
from rnngrad.unroll import Run, run_forward

_NAN = float("nan")
FORGET_GATES = ("f", "u")
"""What the gate that keeps the memory is called."""


class Bias(NamedTuple):
    """Effective bias of a gate over units; NaN for a cell without one."""

    mean: float
    smallest: float
    largest: float


class Share(NamedTuple):
    """Kept share κ of the memory over units and steps."""

    mean: float
    """E κ."""
    mean_log: float
    """E log κ, nats per step."""

    @property
    def log_mean(self) -> float:
        """The logarithm of E κ, nats per step; never below E log κ."""
        with np.errstate(divide="ignore"):
            return float(np.log(self.mean))


class Rate(NamedTuple):
    """A rate or a lag, as measured on the run and as predicted from the weights."""

    measured: float
    predicted: float


class GateBlock(NamedTuple):
    """Recurrent weights of one gate."""

    gate: str
    largest: float
    """Largest singular value."""
    median: float
    smallest: float
    spectral_radius: float


class LayerReport(NamedTuple):
    """One layer; rates in nats per step, lags in steps."""

    layer: str
    """``""`` for a single cell, else ``layer_0``, …"""
    cell: str
    memory: str
    """The block of the state that rates are taken of, ∂m_T/∂m_k."""
    forget_gate: str
    """Its name, ``""`` for a cell without one."""
    forget_bias: Bias
    kept: Share
    e_fold: Rate
    """Lag at which the direct path has lost a factor e; inf when that lies beyond the run."""
    percent: Rate
    """Lag at which 10⁻² of it is left."""
    direct_rate: Rate
    """Of ‖∏D‖_F over the later half of the lags; predicted: E log κ."""
    full_rate: Rate
    """Of the full chain; predicted by mean field."""
    bound: float
    """log(σ_max sup|φ'|) of a vanilla cell: its chain cannot grow faster; NaN for others."""
    blocks: tuple[GateBlock, ...]


class InitReport(NamedTuple):
    """What :func:`init_report` returns."""

    num_steps: int
    layers: tuple[LayerReport, ...]

    def tables(self) -> list[Table]:
        """Returns the report as tables, two per layer: quantities, then recurrent blocks."""
        return [table for layer in self.layers for table in _tables(layer, self.num_steps)]

    def table(self) -> str:
        """Returns the same as Markdown."""
        return "\n\n".join(map(markdown, self.tables())) + "\n"


Table = list[tuple[str, ...]]
"""Rows of texts, the first one its header."""


def markdown(table: Table) -> str:
    """Returns a table as Markdown."""
    header, *rows = table
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _number(value: float) -> str:
    return "–" if math.isnan(value) else "∞" if value == math.inf else f"{value:.4g}"


def _tables(layer: LayerReport, num_steps: int) -> list[Table]:
    def lag(value: float) -> str:
        return f"> {num_steps}" if value == math.inf else _number(value)

    bias = " / ".join(map(_number, layer.forget_bias))
    rows = [(f"bias of {layer.forget_gate}, mean / min / max", bias, "")] if layer.forget_gate else []
    rows += [
        ("kept share E κ", _number(layer.kept.mean), ""),
        ("E log κ", _number(layer.kept.mean_log), ""),
        ("log E κ", _number(layer.kept.log_mean), ""),
        ("direct path down to 1/e at lag", lag(layer.e_fold.measured), _number(layer.e_fold.predicted)),
        ("direct path down to 10⁻² at lag", lag(layer.percent.measured), _number(layer.percent.predicted)),
        ("rate of the direct path", _number(layer.direct_rate.measured), _number(layer.direct_rate.predicted)),
        ("rate of the full chain", _number(layer.full_rate.measured), _number(layer.full_rate.predicted)),
        ("bound on that rate", "", _number(layer.bound)),
    ]
    title = f"{layer.layer}: {layer.cell}" if layer.layer else layer.cell
    tables: list[Table] = [[(f"{title}, {layer.memory}", "measured", "predicted"), *rows]]
    if layer.blocks:
        header = ("gate", "σ largest", "σ median", "σ smallest", "spectral radius")
        tables.append([header, *((block.gate, *map(_number, block[1:])) for block in layer.blocks)])
    return tables


# --- layers of a cell ------------------------------------------------------------------------------------------------


def layers_of(tree: Any) -> list[tuple[str, ...]]:
    """Returns where the layers lie in a state: ``[()]`` for a single cell, ``[("layer_0",), …]`` for a stack."""
    fields = getattr(tree, "_fields", ())
    if not fields or not all(field.startswith("layer_") for field in fields):
        return [()]
    return [(field, *rest) for field in fields for rest in layers_of(getattr(tree, field))]


def memory_of(layout: Layout, layer: str) -> str:
    """Returns the block that carries a layer's memory: its last field, c of an LSTM; ``""`` names the only layer."""
    return [name for name, is_in in zip(layout.names, layout.block(layer or None), strict=True) if is_in][-1]


def _at(tree: Any, layer: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, layer, tree)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


# --- what is measured ------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("cell", "layout", "index"))
def _kept_shares(cell, params, run, signs, *, layout, index):
    """|diag D| of one block at every step, and of it again with signs, which tells whether D is diagonal there."""
    dtype = real_dtype(run.final)
    size, is_complex = layout.sizes[index], layout.is_complex[index]
    start = tuple(
        jnp.stack([jnp.ones(size, dtype), signs]) if i == index else jnp.zeros((2, other), dtype)
        for i, other in enumerate(layout.sizes)
    )

    def one(point):
        rows = step_pulls(cell, params, point, layout).direct(start)[index]
        if not is_complex:
            return jnp.abs(rows)
        # (1, 1) times |λ| and a rotation of every pair (Re, Im)
        re, im = jnp.split(rows, 2, axis=-1)
        return jnp.sqrt((re**2 + im**2) / 2)

    return jax.vmap(one)(run.points)


def _kept(cell: Cell, params: Params, run: Run, layout: Layout, memory: str) -> Share:
    index, dtype = layout.names.index(memory), real_dtype(run.final)
    # + + − − + + …, the two parts of a complex unit alike
    size = layout.sizes[index] // (2 if layout.is_complex[index] else 1)
    signs = jnp.asarray(np.resize((-1.0) ** (np.arange(size) // 2), layout.sizes[index]), dtype)
    shares = _kept_shares(cell, params, run, signs, layout=layout, index=index)
    ones, signed = np.moveaxis(np.asarray(shares, np.float64), 1, 0)
    if not np.allclose(ones, signed, rtol=1e-3):
        return Share(_NAN, _NAN)
    with np.errstate(divide="ignore"):
        return Share(float(ones.mean()), float(np.log(ones).mean()))


def _rate(log_norm: Any) -> float:
    longest = log_norm.shape[0] - 1
    if np.isneginf(log_norm[-1]):
        return -math.inf
    return float(decay_rate(log_norm, (longest // 2, longest)))


def _lag_below(log_norm: Any, level: float) -> float:
    is_below = np.asarray(log_norm) <= level
    return float(np.argmax(is_below)) if is_below.any() else math.inf


def _bias(values: np.ndarray) -> Bias:
    return Bias(float(values.mean()), float(values.min()), float(values.max()))


def _lag_for(nats: float, loss_per_step: float) -> float:
    """Returns the lag at which a loss per step adds up to ``nats``; inf when nothing is lost."""
    return math.inf if loss_per_step <= 0 else nats / loss_per_step


def _block(gate: str, matrix: np.ndarray) -> GateBlock:
    sizes = np.linalg.svd(matrix, compute_uv=False)
    radius = np.abs(np.linalg.eigvals(matrix)).max()
    return GateBlock(gate, *map(float, (sizes[0], np.median(sizes), sizes[-1], radius)))


def _activation(cell: Cell, params: Params, z: Any, state: State, layer: tuple[str, ...], gate: str) -> str:
    """Returns which of ``ACTIVATIONS`` a gate passes through, found by trying; ``""`` for none of them."""
    values = jnp.asarray([-3.0, -1.0, -0.2, 0.3, 2.0], real_dtype(state))

    def answer(value):
        filled = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), z)
        return getattr(_at(cell.update(params, filled, _zeros(state))[1], layer), gate)

    found = np.asarray([answer(value) for value in values])
    for name, phi in ACTIVATIONS.items():
        if np.allclose(found, np.asarray(phi(values))[:, None], atol=1e-2):
            return name
    return ""


# --- what is predicted -----------------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """What a mean field is told."""

    w_hh: np.ndarray
    gain: float
    activation: str
    input_variance: float
    bias_variance: float
    forget_bias: float


class _Prediction(NamedTuple):
    rate: float = _NAN
    bound: float = _NAN


def _vanilla(m: _Measured) -> _Prediction:
    if not m.activation:
        return _Prediction()
    field = theory.vanilla_mean_field(
        m.gain, activation=m.activation, input_variance=m.input_variance, bias_variance=m.bias_variance
    )
    return _Prediction(field.rate, theory.norm_bound(m.w_hh, m.activation))


def _gated(mean_field: Callable[..., theory.GatedMeanField]) -> Callable[[_Measured], _Prediction]:
    def predict(m: _Measured) -> _Prediction:
        if m.activation != "sigmoid":
            return _Prediction()
        return _Prediction(mean_field(m.gain, input_variance=m.input_variance, forget_bias=m.forget_bias).tied_rate)

    return predict


PREDICTIONS: dict[str, Callable[[_Measured], _Prediction]] = {
    "vanilla": _vanilla,
    "lstm": _gated(theory.lstm_mean_field),
    "gru_reset_after": _gated(functools.partial(theory.gru_mean_field, reset="after")),
    "gru_reset_before": _gated(functools.partial(theory.gru_mean_field, reset="before")),
}
"""Mean fields by the name of the cell."""


def _replaced(tree: Any, layer: tuple[str, ...], value: Any) -> Any:
    if not layer:
        return value
    first, *rest = layer
    return tree._replace(**{first: _replaced(getattr(tree, first), tuple(rest), value)})


@functools.partial(jax.jit, static_argnames=("cell",))
def _biases(cell, params, state, xs):
    """Returns what the gates hear with every matrix, the state and the input at zero."""
    without_matrices = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if leaf.ndim > 1 else leaf, params)
    return cell.preactivate(without_matrices, _zeros(state), jnp.zeros_like(xs[0]))


def _input_variance(cell: Cell, params: Params, run: Run, layer: tuple[str, ...]) -> float:
    """Returns the mean square of W x: pre-activations with all other weights of the layer at zero."""
    weights = _at(params, layer)
    bare = _replaced(params, layer, _zeros(weights)._replace(w_ih=weights.w_ih))
    heard = jax.vmap(lambda state, x: _at(cell.preactivate(bare, state, x), layer))(run.points.state, run.points.x)
    squares = [np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(heard)]
    return float(sum(squares)) / (run.points.x.shape[0] * weights.w_ih.shape[0])


# --- the report ------------------------------------------------------------------------------------------------------


def init_report(cell: Cell, params: Params, xs: Any, *, state: State | None = None) -> InitReport:
    """Returns what given weights amount to, layer by layer: biases, kept shares, singular values, rates and horizons.

    Returns plain numbers, so it does not trace under ``jax.jit``.  Costs two retention curves per layer (the direct
    path and the full chain of its memory) and one SVD and one eigenvalue problem per gate.

    Args:
      cell: any cell with named gates, or a stack of them.
      params: its parameters.
      xs: inputs of the run that gates and rates are measured on, shape (T, D).
      state: s_0; None for ``cell.init_state()``.

    Raises:
      ValueError: inputs that do not fit, NaN or inf in them, or a cell without named gates (a map).

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 5, forget_bias=1.0)
    >>> report = rg.init_report(cell, cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (40, 3)))
    >>> report.layers[0].forget_bias
    Bias(mean=1.0, smallest=1.0, largest=1.0)
    """
    state = cell.init_state() if state is None else state
    measure = lambda memory, path: retention(cell, params, state, xs, of=memory, wrt=memory, path=path).log_norm
    return report_with(cell, params, state, xs, measure)


def report_with(
    cell: Cell, params: Params, state: State, xs: Any, measure: Callable[[str, str], Float[Any, " L"]]
) -> InitReport:
    """Returns :func:`init_report` with curves from elsewhere.

    Args:
      cell: any cell with named gates, or a stack of them.
      params: its parameters.
      state: s_0.
      xs: inputs, (T, D).
      measure: maps (block of the state, ``"direct"`` or ``"full"``) to the retention of that block, lags 0 … T, nats.

    Raises:
      ValueError: as :func:`init_report`.
    """
    layout, _ = prepare(cell, params, state, xs)
    layers = layers_of(state)
    run = run_forward(cell, params, state, xs)
    z = jax.tree.map(lambda leaf: leaf[0], run.points.z)
    if not all(hasattr(_at(z, layer), "_fields") for layer in layers):
        raise ValueError(f"expected a cell with named gates, found {cell.name!r}")
    biases = _biases(cell, params, state, xs)

    # "stack(lstm, gru_reset_after)"
    names = [cell.name] if layers == [()] else [n for n in re.findall(r"\w+", cell.name) if n != "stack"]
    found = []
    for layer, name in zip(layers, names, strict=True):
        prefix = ".".join(layer)
        memory = memory_of(layout, prefix)
        gates = _at(z, layer)._fields
        forget_gate = next((gate for gate in FORGET_GATES if gate in gates), "")
        bias = np.asarray(getattr(_at(biases, layer), forget_gate or gates[0])).real.astype(np.float64)
        kept = _kept(cell, params, run, layout, memory)
        curves = {path: measure(memory, path) for path in ("direct", "full")}
        w_hh = np.asarray(getattr(_at(params, layer), "w_hh", np.zeros((0, 1))), np.float64)
        blocks = np.split(w_hh, w_hh.shape[0] // w_hh.shape[1]) if w_hh.size else []
        prediction = _Prediction()
        if name in PREDICTIONS:
            measured = _Measured(
                w_hh=w_hh,
                gain=float(np.linalg.norm(w_hh)) / math.sqrt(w_hh.shape[0]),
                activation=_activation(cell, params, z, state, layer, forget_gate or gates[0]),
                input_variance=_input_variance(cell, params, run, layer),
                bias_variance=float(np.mean(bias**2)),
                forget_bias=float(np.mean(bias)),
            )
            prediction = PREDICTIONS[name](measured)
        loss = -kept.mean_log
        found.append(
            LayerReport(
                layer=prefix,
                cell=name,
                memory=memory,
                forget_gate=forget_gate,
                forget_bias=_bias(bias) if forget_gate else Bias(_NAN, _NAN, _NAN),
                kept=kept,
                e_fold=Rate(_lag_below(curves["direct"], -1.0), _lag_for(1.0, loss)),
                percent=Rate(_lag_below(curves["direct"], -math.log(100)), _lag_for(math.log(100), loss)),
                direct_rate=Rate(_rate(curves["direct"]), kept.mean_log),
                full_rate=Rate(_rate(curves["full"]), prediction.rate),
                bound=prediction.bound,
                blocks=tuple(_block(gate, block) for gate, block in zip(gates, blocks, strict=False)),
            )
        )
    return InitReport(int(xs.shape[0]), tuple(found))
