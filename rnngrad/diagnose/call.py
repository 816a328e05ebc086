r"""One call for a model that will not learn a long dependency: how far back, through which gate, what limits it.

::

    retention(lag)    ‖∂m_T/∂m_{T−lag}‖_F / ‖I‖_F of the memory m of each layer, full chain, direct path, remainder, and
                      with one gate's path open (only) or cut (without)                              nats
    half-life         lag at which the median over sequences passes 1/2, between lags by straight lines in nats
    horizon           the same for 10⁻²; ∞ when the run ends before
    exponents         the leading Lyapunov exponents of each pass                                    nats per step
    gate share        ‖∂L/∂z_j‖² / Σ_j ‖∂L/∂z_j‖², L the user's loss or a random read-out of the last step
    saturation        share of the units and steps of a gate that lie at one of its rails
    lost derivative   ‖∂s'_a/∂s_b · v‖ by automatic differentiation against central differences
    precision         distance of the states from those of the same weights in float32

Where the retention of all rows would cost too much, it is estimated by random ones (:mod:`rnngrad.diagnose.curves`);
the result says which.

What is measured leads to findings in :mod:`rnngrad.diagnose.findings`, where every threshold stands with its reason.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rnngrad.diagnose.checks import Heard, hear, lost_derivative, precision_of, saturation_of, trajectories, widened
from rnngrad.diagnose.curves import Plan, Work, choose, curves_of, within
from rnngrad.diagnose.findings import LEVEL, findings_of
from rnngrad.diagnose.result import (
    Diagnosis,
    Exponents,
    LayerDiagnosis,
    LostDerivative,
    Precision,
    crossing,
)
from rnngrad.init_report import LayerReport, layers_of, memory_of, report_with
from rnngrad.interop import adapt
from rnngrad.interop.adapted import Adapted, Pass, join, time_major
from rnngrad.jacobians import layout_of, real_dtype
from rnngrad.lyapunov import lyapunov_spectrum
from rnngrad.probes import FEWEST_PROBES
from rnngrad.retention import certificate
from rnngrad.training.model import Model
from rnngrad.training.monitor import LayerFlow
from rnngrad.types import Params, State, check_finite, check_like, leaf_names
from rnngrad.watch import watch

NUM_EXPONENTS = 3
BAR_AFTER_SECONDS = 2.0


def _exponents(one: Pass, params: Params, state: State, xs: Array, key: Key[Array, ""]) -> Exponents:
    """Returns the leading exponents along the first sequence, the first quarter of which is left out."""
    num_steps = xs.shape[0]
    transient = num_steps // 4
    num_blocks = min(16, (num_steps - transient) // 4)
    size = sum(layout_of(state).sizes)
    if num_blocks < 2:
        return Exponents((), (), (), f"{num_steps} steps are too few")
    spectrum = lyapunov_spectrum(
        one.cell,
        params,
        state,
        xs[:, 0],
        k=min(NUM_EXPONENTS, size),
        num_transient=transient,
        num_blocks=num_blocks,
        key=key,
    )
    plain = lambda values: tuple(np.asarray(values).tolist())
    return Exponents(plain(spectrum.exponents), plain(spectrum.stderr), plain(spectrum.resolved), "")


class _Layer(NamedTuple):
    """One layer of a pass."""

    name: str
    """Within the pass; ``""`` for the only one."""
    cell: str
    memory: str | None
    """The block that is measured; None for the whole state."""


class _Measured(NamedTuple):
    """What one pass gives."""

    layers: tuple[LayerDiagnosis, ...]
    exponents: Exponents
    lost: tuple[LostDerivative, ...]
    precision: Precision
    nonfinite_step: int


def _layers(one: Pass) -> list[_Layer]:
    """Returns the layers of a pass; one without a split is measured whole."""
    state = one.cell.init_state()
    layout = layout_of(state)
    if one.parts:
        named = [(part.name, part.cell.name) for part in one.parts]
    else:
        inner = [".".join(path) for path in layers_of(state)]
        named = [(name, one.cell.name) for name in inner]
    memory = lambda name: memory_of(layout, name) if one.has_split else name
    return [_Layer(name, cell, memory(name) or None) for name, cell in named]


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _gate_shares(one: Pass, layer: str, flows: dict[str, LayerFlow]) -> tuple[LayerFlow, dict[str, float]]:
    """Returns the flow of a layer and its shares by gate, which add up to 1 in a stack measured as one cell as well."""
    alone = flows.get(_joined(one.name, layer))
    flow = flows[one.name] if alone is None else alone
    shares = {gate: float(share) for gate, share in flow.gate_share.items()}
    if alone is None:
        shares = within(layer, shares)
        total = sum(shares.values())
        shares = {gate: share / total if total else math.nan for gate, share in shares.items()}
    return flow, shares


def _first_nonfinite(states: State) -> int:
    """Returns the first step at which a state of any sequence is not finite; −1 for none."""
    finite = [np.isfinite(np.asarray(leaf)).reshape(len(leaf), -1).all(axis=1) for leaf in jax.tree.leaves(states)]
    every = functools.reduce(np.logical_and, finite)
    return -1 if every.all() else int(np.argmin(every))


def _constant_units(memory: str | None, states: State) -> float:
    """Returns the share of a block's units that are the same at all steps and in all sequences."""
    of_one = jax.tree.map(lambda leaf: leaf[0, 0], states)
    chosen = zip(jax.tree.leaves(states), layout_of(of_one).block(memory), strict=True)
    values = [np.asarray(leaf) for leaf, is_in in chosen if is_in]
    return float(np.mean(np.concatenate([np.all(leaf == leaf[:1, :1], axis=(0, 1)).ravel() for leaf in values])))


def _work(heard: Heard) -> list[Work]:
    """Returns what the curves of every layer of a pass cost."""
    one, params, xs = heard
    state = one.cell.init_state()
    layout = layout_of(state)
    gates = leaf_names(jax.eval_shape(one.cell.preactivate, params, state, xs[0, 0]))
    # weights that a step closes over are constants of its program
    program = jax.make_jaxpr(lambda params, state, x: one.cell.step(params, state, x)[0])(params, state, xs[0, 0])
    weights = [*jax.tree.leaves(params), *program.consts]
    num_weights = max(sum(layout.sizes), sum(jnp.size(leaf) for leaf in weights))
    found = []
    for layer in _layers(one):
        num_gates = len(within(layer.name, dict.fromkeys(gates)))
        # full, direct, twice for the remainder, and two for each gate
        num_chains = 4 + 2 * num_gates if one.has_split else 1
        found.append(Work(layout.num_entries(layer.memory), num_weights, num_chains))
    return found


def _measure_pass(
    heard: Heard,
    given: Heard,
    flows: dict[str, LayerFlow],
    plan: Plan,
    key: Key[Array, ""],
    advance: Callable[[str], None],
) -> _Measured:
    """Returns all that is measured of one pass; ``given`` is as the user has it, maybe in less than float32."""
    one, params, xs = heard
    state = one.cell.init_state()
    label = lambda layer="": _joined(one.name, layer) or "the model"
    key_rows, key_exponents, key_directions = jax.random.split(key, 3)

    advance(f"{label()}: states")
    states, gates, _ = trajectories(one, params, state, xs)
    nonfinite_step = _first_nonfinite(states)
    saturation = saturation_of(one, params, state, xs, gates)
    precision = precision_of(given, None if heard is given else states)

    advance(f"{label()}: derivative against differences")
    # a step that rounds by itself is flat between its roundings: differences say nothing
    can_differ = nonfinite_step < 0 and not (heard is given and precision.rounded)
    lost = lost_derivative(one, params, states, xs, key_directions) if can_differ else ()

    curves = {}
    for layer in _layers(one):
        advance(f"{label(layer.name)}: retention")
        curves[layer] = curves_of(one, params, state, xs, layer.name, layer.memory, plan, key_rows)

    advance(f"{label()}: exponents")
    exponents = (
        Exponents((), (), (), "the state is not finite")
        if nonfinite_step >= 0
        else _exponents(one, params, state, xs, key_exponents)
    )

    advance(f"{label()}: initialisation")
    reports: dict[str, LayerReport] = {}
    z = jax.eval_shape(one.cell.preactivate, params, state, xs[0, 0])
    if one.has_split and nonfinite_step < 0 and hasattr(z, "_fields"):
        by_memory = {layer.memory or "": found for layer, found in curves.items()}
        dtype = real_dtype(state)
        median = lambda memory, path: jnp.asarray(np.median(getattr(by_memory[memory], path), axis=0), dtype)
        report = report_with(one.cell, params, state, xs[:, 0], median)
        reports = {layer.layer: layer for layer in report.layers}

    layers = []
    for layer, found in curves.items():
        flow, shares = _gate_shares(one, layer.name, flows)
        name, of_init = _joined(one.name, layer.name), reports.get(layer.name)
        full = np.median(found.full, axis=0)
        direct = np.full_like(full, np.nan) if found.direct is None else np.median(found.direct, axis=0)
        layers.append(
            LayerDiagnosis(
                name=name,
                pass_name=one.name,
                cell=layer.cell,
                memory=layer.memory or "the whole state",
                reverse=one.reverse,
                has_split=one.has_split,
                curves=found,
                half_life=crossing(full, math.log(2)),
                horizon=crossing(full, LEVEL),
                direct_half_life=crossing(direct, math.log(2)),
                direct_horizon=crossing(direct, LEVEL),
                gate_share=shares,
                direct_share=float(flow.direct_share),
                loss_gradient=np.asarray(flow.log_retention, np.float64),
                saturation=within(layer.name, saturation),
                constant_units=_constant_units(layer.memory, states),
                init=None if of_init is None else of_init._replace(layer=name),
            )
        )
    return _Measured(tuple(layers), exponents, lost, precision, nonfinite_step)


@contextmanager
def _progress(total: int, is_shown: bool) -> Iterator[Callable[[str], None]]:
    """Yields what to call before every piece of work; a bar appears after two seconds, where somebody looks."""
    if not is_shown or importlib.util.find_spec("rich") is None:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    # in a notebook rich draws by ipywidgets, and warns without
    can_draw = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    if not can_draw:
        yield lambda text: None
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("diagnose", total=total)
    timer = threading.Timer(BAR_AFTER_SECONDS, bar.start)
    timer.daemon = True
    timer.start()
    done = iter(range(total))
    try:
        yield lambda text: bar.update(task, completed=next(done, total), description=text)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def as_passes(model: Any, params: Any, state: Any, xs: Array, gates: Any) -> Adapted:
    """Returns the model as passes: what :func:`diagnose` takes, ``xs`` (T, B, D)."""
    if isinstance(model, Adapted):
        return model if params is None else model._replace(params=model.convert(params))
    if isinstance(model, Model):
        check_like(params, jax.eval_shape(model.init, jax.random.key(0)), what="params")
        if model.vocabulary_size is not None:
            raise ValueError(
                "expected a model that reads vectors, found one that reads ids; diagnose its layers on what they hear: "
                "rg.diagnose(rg.cells.stack(*model.layers), …, params.embedding[ids])"
            )
        layers: list[tuple[Pass, ...]] = [(Pass("", cell, False, True),) for cell in model.layers]
        return join("rg.training.model", layers, lambda params: tuple((own,) for own in params.layers), params)
    return adapt(model, params, state=state, example=xs[0, 0], gates=gates)


def diagnose(
    model: Any,
    params: Any,
    xs: Any,
    loss: Callable[[Array], Array] | None = None,
    *,
    state: Any = None,
    gates: Any = None,
    time_axis: int = 0,
    method: str = "auto",
    num_probes: int = 16,
    max_sequences: int = 8,
    key: Key[Array, ""] | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Returns how far back a recurrent model's gradient reaches, through which gate, what limits it, what to change.

    Args:
      model: a cell of ours, a recurrent module of Flax (nnx, linen), Equinox or Haiku, a list of them, or a function
        ``step(params, state, x)``; see ``rnngrad.interop.adapt``.
      params: its weights; None for a module that holds them.
      xs: inputs, time-major: (T, B, D), or (T, D) for one sequence.
      loss: maps the outputs of every step, (T, B, N), as the last recurrent layer gives them, to a scalar; None for a
        random read-out of the last step.  Only the shares by gate depend on it.  It sees the whole batch.
      state: the state of one sequence before the first step, for a step function; others have theirs.
      gates: for a step function, the function ``gates(params, state, x)`` in it that computes the pre-activations, so
        that direct and gated paths can be told apart.
      time_axis: 1 when xs are (B, T, D), as Flax modules take them by default.
      method: ``"exact"``, ``"probes"``, or ``"auto"``, which chooses by cost.
      num_probes: random rows of an estimate.
      max_sequences: of the batch, the first ones are measured.
      key: of random rows and directions; the same one every time by default.
      progress: show a bar when it takes longer than two seconds and somebody looks (needs rich).

    Raises:
      ValueError: a model without recurrence, weights of another one, NaN in weights or inputs (with the first time
        step), wrong shapes; says what was expected and what was found.

    >>> import jax
    >>> import rnngrad as rg
    >>> cell = rg.cells.lstm(3, 8)  # Torch's default: a forget bias around 0
    >>> xs = jax.random.normal(jax.random.key(1), (60, 2, 3))
    >>> report = rg.diagnose(cell, cell.init(jax.random.key(0)), xs)
    >>> [warning.code for warning in report.warnings]
    ['fades']
    """
    if method not in ("auto", "exact", "probes"):
        raise ValueError(f"unknown method {method!r}; expected 'auto', 'exact' or 'probes'")
    for name, value, least in (("num_probes", num_probes, FEWEST_PROBES), ("max_sequences", max_sequences, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
    key = jax.random.key(0) if key is None else key
    whole = time_major(xs, time_axis)
    inputs = whole[:, :max_sequences]
    adapted = as_passes(model, params, state, inputs, gates)
    check_finite(adapted.params, (), whole)
    num_steps, num_sequences, num_features = inputs.shape
    for one in adapted.layers[0]:
        if one.cell.input_size not in (None, num_features):
            raise ValueError(
                f"xs: expected {one.cell.input_size} features for {adapted.source}, found shape {jnp.shape(xs)}"
            )

    given = heard = hear(adapted, inputs)
    wide = widened(adapted, inputs)
    if wide is not None:
        adapted, inputs, heard = wide
        whole = whole.astype(inputs.dtype)
    work = [of_layer for one in heard for of_layer in _work(one)]
    plan = choose(work, num_steps, num_sequences, method, num_probes)

    with _progress(1 + 4 * len(heard) + len(work), progress) as advance:
        advance("gradient of the loss")
        # a loss of the user's has targets for the whole batch; the weights are converted already
        measured_on = inputs if loss is None else whole
        own = adapted._replace(convert=lambda weights: weights)
        watched = watch(own, measured_on, loss=loss, max_sequences=measured_on.shape[1])
        flow = watched(1, adapted.params)
        assert flow is not None
        flows = dict(zip(watched.names, flow.layers, strict=True))
        keys = jax.random.split(key, len(heard))
        passes = [
            _measure_pass(measured, as_given, flows, plan, key_pass, advance)
            for measured, as_given, key_pass in zip(heard, given, keys, strict=True)
        ]

    names = [one.name for one in adapted.passes]
    broken = [found.nonfinite_step for found in passes]
    diagnosis = Diagnosis(
        source=adapted.source,
        num_steps=num_steps,
        num_sequences=num_sequences,
        method=plan.reason,
        layers=tuple(layer for found in passes for layer in found.layers),
        exponents=dict(zip(names, [found.exponents for found in passes], strict=True)),
        lost=dict(zip(names, [found.lost for found in passes], strict=True)),
        precision=dict(zip(names, [found.precision for found in passes], strict=True)),
        nonfinite_step=min((step for step in broken if step >= 0), default=-1),
        input_rms=float(np.sqrt(np.mean(np.square(np.asarray(inputs, np.float64))))),
        certificate=certificate(real_dtype(heard[0].one.cell.init_state())),
        findings=(),
    )
    return diagnosis._replace(findings=findings_of(diagnosis))
