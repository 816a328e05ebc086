r"""What a diagnosis amounts to in plain language: findings, each with its evidence and a remedy.

Warnings, when they are given, and why there:

``non_finite``
    A state is NaN or inf.  Nothing behind it means anything.
``non_finite_gradient``
    The states are finite and their derivative is not: a square root or a norm at 0, say.  Training ends there.
``no_loss_gradient``
    Nothing of the loss's gradient reaches the layer, or it is not finite.
``detached_state``
    The derivative of the step misses more than a tenth of what the state does to its successor, along one of eight
    directions at three steps.  ``stop_gradient`` loses all of it, rounding in float32 some 10⁻⁴.
``explodes``
    The median retention is above 10² at some lag: the horizon's level, upwards.
``fades``
    10⁻² is lost before the run ends.  A gradient a hundred times weaker than that of the last step is not followed
    among its noise.
``forget_gates_closed``
    The same, where the share kept averages below 0.1: 10⁻² is then left for two steps.
``gates_saturated``
    More than half of the units and steps of a gate lie at its rails, where it lets less than a tenth of a gradient
    through over the whole run (``diagnose.checks.rail_distance``).  Open forget gates and closed input gates do not
    count where the gradient does cross the run: that is what a long memory looks like.
``dead_units``
    More than a tenth of the units never change, over at least 16 steps and sequences; a random relu unit would be off
    in 16 independent steps once in 2¹⁶.
``low_precision``
    The state is rounded to bfloat16 or float16 and ends more than 10⁻² away from the same weights in float32, or
    nobody can tell how far.  One rounding costs up to 2⁻⁹ = 0.002 in bfloat16.

Notes, which call for nothing by themselves: ``product_of_gates`` (the direct path is not the gradient),
``float32_underflow`` (from that lag on a float32 gradient is exactly 0), ``no_split`` (gates unknown),
``surrogate`` (the derivative differs from the function's without being smaller, as a straight-through estimator's).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from rnngrad.diagnose.checks import LOST
from rnngrad.diagnose.result import Diagnosis, Finding, LayerDiagnosis, LostDerivative, number
from rnngrad.init_report import FORGET_GATES
from rnngrad.theory import forget_bias_for

LEVEL = math.log(100)
"""Nats between the last step and the horizon."""
CLOSED = 0.1
SATURATED = 0.5
DEAD = 0.1
LEAST_SEEN = 16
ROUNDING = 1e-2
LARGE_INPUT = 5.0
"""Standardised inputs have 1."""
DIRECT_DIFFERS = math.log(10)
"""Nats between the direct path and the full chain from which a note says so."""


def _in(layer: str) -> str:
    return f"{layer}: " if layer else ""


def _steps(lag: float) -> str:
    return f"{lag:.3g} steps" if lag >= 10 else f"{lag:.2f} steps"


def _stuck(diagnosis: Diagnosis, layer: LayerDiagnosis) -> dict[str, float]:
    """The gates that are saturated in more than half of all units and steps, with their shares."""
    is_long = layer.horizon >= diagnosis.num_steps
    found = {}
    for gate, rails in layer.saturation.items():
        low = 0.0 if is_long and gate == "i" else rails.low
        high = 0.0 if is_long and gate in FORGET_GATES else rails.high
        if low + high > SATURATED:
            found[gate] = low + high
    return found


def _gate_that_keeps(layer: LayerDiagnosis) -> str:
    """The name of the gate that is itself the share kept; empty where the share is made of several, as f/(f + i)."""
    if layer.init is None or layer.init.forget_gate not in layer.saturation:
        return ""
    gate = layer.init.forget_gate
    # means over one sequence and over all
    return gate if abs(layer.saturation[gate].mean - layer.init.kept.mean) < 0.05 else ""


def _longer(diagnosis: Diagnosis, layer: LayerDiagnosis) -> str:
    """What would keep 10⁻² over the whole run."""
    report, num_steps = layer.init, diagnosis.num_steps
    if _stuck(diagnosis, layer):
        return "first see gates_saturated"
    if layer.constant_units > DEAD:
        return "first see dead_units"
    if not layer.has_split:
        return (
            "name the function that computes the gates (gates=) to learn which path fades; orthogonal recurrent "
            "weights, or a gate that stays open, carry further"
        )
    if report is not None and _gate_that_keeps(layer):
        bias, now = forget_bias_for(1e-2, num_steps), report.forget_bias.mean
        if layer.direct_horizon >= num_steps:
            return "paths through the gates cancel the direct one, which reaches further: smaller recurrent weights"
        if now >= bias:
            return (
                f"the bias is high enough ({now:.2f} on average, {bias:.2f} would do): inputs or recurrent weights "
                "drive the gate shut; make them smaller"
            )
        what = "forget bias" if report.forget_gate == "f" else "bias of the update gate (the share kept)"
        return (
            f"a {what} of {bias:.2f} (now {now:.2f} on average), or chrono({num_steps}), would keep 10⁻² over "
            f"{num_steps} steps on the direct path"
        )
    if report is not None and math.isfinite(report.kept.mean_log):
        share = math.exp(-LEVEL / num_steps)
        return (
            f"a kept share of {share:.4f} (now {report.kept.mean:.3g} on average) would keep 10⁻² over {num_steps} "
            "steps"
        )
    rate = LEVEL / max(layer.horizon, 1.0)
    return (
        f"{rate:.2g} nats are lost per step: recurrent weights {math.exp(rate):.3g} times as large, orthogonal ones "
        "(rg.initializers.orthogonal()), or a cell with gates"
    )


def _fades(diagnosis: Diagnosis, layer: LayerDiagnosis) -> Iterator[Finding]:
    if not layer.horizon < diagnosis.num_steps:
        return
    report = layer.init
    evidence = {
        "half_life": layer.half_life,
        "horizon": layer.horizon,
        "direct_half_life": layer.direct_half_life,
        "direct_horizon": layer.direct_horizon,
    }
    text = f"10⁻² of the gradient is left after {_steps(layer.horizon)} of {diagnosis.num_steps}"
    code = "fades"
    if report is not None and report.forget_gate and not math.isnan(report.kept.mean):
        kept = report.kept.mean
        evidence |= {"mean_kept_share": kept, "mean_forget_bias": report.forget_bias.mean}
        code = "forget_gates_closed" if kept < CLOSED else "fades"
        gates = "forget gates average" if _gate_that_keeps(layer) == "f" else "the share kept averages"
        halves = f"memory halves every {_steps(layer.direct_half_life)} on the direct path"
        text = f"{gates} {kept:.2g}: {halves}; {text} by all paths"
    is_cut = any(map(_is_less, diagnosis.lost[layer.pass_name]))
    remedy = "first see detached_state: a derivative is lost" if is_cut else _longer(diagnosis, layer)
    yield Finding(code, "warning", layer.name, _in(layer.name) + text, evidence, remedy)


def _explodes(diagnosis: Diagnosis, layer: LayerDiagnosis) -> Iterator[Finding]:
    median = np.median(layer.curves.full, axis=0)
    top = int(np.argmax(median))
    if not median[top] > LEVEL:
        return
    rate = float(median[top]) / top
    evidence = {"growth_nats": float(median[top]), "lag": top, "nats_per_step": rate}
    text = f"the gradient grows by a factor of 10^{median[top] / math.log(10):.3g} over {top} steps"
    spectrum = diagnosis.exponents[layer.pass_name]
    if spectrum.exponents:
        leading, error = spectrum.exponents[0], spectrum.stderr[0]
        evidence |= {"leading_exponent": leading, "leading_exponent_stderr": error}
        text += f"; leading exponent {leading:.3g} ± {error:.2g} nats per step"
    remedy = (
        f"recurrent weights smaller by a factor of {math.exp(-rate):.2f}, or orthogonal ones; until then clip the norm "
        "of the gradient (rg.remedies.clip_by_global_norm)"
    )
    yield Finding("explodes", "warning", layer.name, _in(layer.name) + text, evidence, remedy)


def _saturated(diagnosis: Diagnosis, layer: LayerDiagnosis) -> Iterator[Finding]:
    stuck = _stuck(diagnosis, layer)
    if not stuck:
        return
    listed = ", ".join(f"{gate} {100 * share:.0f} %" for gate, share in stuck.items())
    text = f"saturated in more than half of all units and steps: {listed}; hardly any gradient passes there"
    remedy = "smaller weights or biases, or normalised pre-activations"
    if diagnosis.input_rms > LARGE_INPUT:
        remedy = f"the inputs have a root mean square of {diagnosis.input_rms:.3g}: standardise them; {remedy}"
    evidence = {f"share_{gate}": share for gate, share in stuck.items()}
    yield Finding("gates_saturated", "warning", layer.name, _in(layer.name) + text, evidence, remedy)


def _dead(diagnosis: Diagnosis, layer: LayerDiagnosis) -> Iterator[Finding]:
    num_seen = diagnosis.num_steps * diagnosis.num_sequences
    if layer.constant_units <= DEAD or num_seen < LEAST_SEEN:
        return
    text = f"{100 * layer.constant_units:.0f} % of the units never change, over {num_seen} steps of all sequences"
    remedy = "of relu units: biases at 0 or above, a smaller learning rate, or a unit without a flat half (tanh)"
    evidence = {"share": layer.constant_units}
    yield Finding("dead_units", "warning", layer.name, _in(layer.name) + text, evidence, remedy)


def _underflow(diagnosis: Diagnosis, layer: LayerDiagnosis) -> Iterator[Finding]:
    # a gradient of norm 1 at the last step is below the smallest number that is kept here
    median = np.median(layer.curves.full, axis=0)
    lag = int(np.argmax(median < diagnosis.certificate.float32_floor))
    # what is exactly 0 here as well is no matter of range
    if lag and np.isfinite(median[lag]):
        text = f"a float32 gradient is exactly 0 beyond {lag} steps (not so the curves here, kept in log space)"
        yield Finding("float32_underflow", "note", layer.name, _in(layer.name) + text, {"lag": lag}, "")


def _direct(diagnosis: Diagnosis, layer: LayerDiagnosis) -> Iterator[Finding]:
    if not layer.has_split:
        text = "direct and gated path cannot be told apart: the gates of this cell are unknown"
        remedy = "name the function that computes them: gates="
        yield Finding("no_split", "note", layer.name, _in(layer.name) + text, {}, remedy)
        return
    curves = layer.curves
    if curves.direct is None or math.isnan(layer.horizon) or np.all(np.isneginf(curves.direct[:, 1:])):
        return
    lag = int(min(max(layer.horizon, 1.0), diagnosis.num_steps))
    full, direct = float(np.median(curves.full[:, lag])), float(np.median(curves.direct[:, lag]))
    if math.isfinite(full) and math.isfinite(direct) and abs(full - direct) > DIRECT_DIFFERS:
        gap = full - direct
        times = f"10^{abs(gap) / math.log(10):.3g} times {'larger' if gap > 0 else 'smaller'}"
        text = f"at lag {lag} the gradient is {times} than its direct path, the product of the shares kept"
        yield Finding(
            "product_of_gates", "note", layer.name, _in(layer.name) + text, {"lag": lag, "log_ratio": gap}, ""
        )


def _is_less(block: LostDerivative) -> bool:
    return block.derivative < (1 - LOST) * block.difference


def _nan(diagnosis: Diagnosis, layer: LayerDiagnosis) -> Iterator[Finding]:
    broken = np.isnan(layer.curves.full).any(axis=0)
    if broken.any():
        lag = int(np.argmax(broken))
        text = f"the derivative of the state is not a number from lag {lag} on, although the state is finite"
        remedy = (
            f"look at step {diagnosis.num_steps - lag} of the pass: a root, norm or division at 0, also behind where()"
        )
        yield Finding("non_finite_gradient", "warning", layer.name, _in(layer.name) + text, {"lag": lag}, remedy)
    elif not math.isfinite(layer.loss_gradient[0]):
        text = "no finite gradient of the loss reaches this layer"
        remedy = "look at what the loss reads: outputs of another layer or direction, or none"
        evidence = {"log_norm": float(layer.loss_gradient[0])}
        yield Finding("no_loss_gradient", "warning", layer.name, _in(layer.name) + text, evidence, remedy)


def _lost(diagnosis: Diagnosis) -> Iterator[Finding]:
    for name, blocks in diagnosis.lost.items():
        less = [block for block in blocks if _is_less(block)]
        other = [block for block in blocks if not _is_less(block)]
        for code, severity, chosen in (("detached_state", "warning", less), ("surrogate", "note", other)):
            if not chosen:
                continue
            listed = "; ".join(
                f"∂{b.of or 's'}'/∂{b.wrt or 's'} {number(b.derivative)} in place of {number(b.difference)}"
                for b in chosen
            )
            text = f"the derivative that training sees is not that of the function: {listed}"
            evidence = {f"{b.of}<-{b.wrt}": b.derivative / b.difference if b.difference else math.inf for b in chosen}
            remedy = "take out the stop_gradient (detach), or the custom derivative, on the way of the state"
            yield Finding(code, severity, name, _in(name) + text, evidence, remedy if severity == "warning" else "")


def _rounded(diagnosis: Diagnosis) -> Iterator[Finding]:
    for name, precision in diagnosis.precision.items():
        if not precision.rounded or precision.distance <= ROUNDING:
            continue
        far = f"after {diagnosis.num_steps} steps it is {100 * precision.distance:.2g} % away from the same in float32"
        if math.isinf(precision.distance):
            far = "it overflows, and not so in float32"
        if math.isnan(precision.distance):
            far = "how far it drifts could not be measured"
        fields = ", ".join(filter(None, precision.rounded)) or "s"
        text = f"the state ({fields}) is rounded to less than float32 at every step; {far}"
        remedy = "keep the state and its sums in float32 (dtype=float32 of the cell); products may stay narrow"
        evidence = {"distance": precision.distance}
        yield Finding("low_precision", "warning", name, _in(name) + text, evidence, remedy)


def findings_of(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    """Returns what a diagnosis amounts to, warnings first, layer by layer.

    >>> import jax
    >>> import rnngrad as rg
    >>> from rnngrad.diagnose.findings import findings_of
    >>> cell = rg.cells.gru(3, 8, forget_bias=-4.0)
    >>> report = rg.diagnose(cell, cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (40, 3)))
    >>> findings_of(report)[0].code
    'forget_gates_closed'
    """
    if diagnosis.nonfinite_step >= 0:
        text = f"the state is not finite from step {diagnosis.nonfinite_step} on"
        remedy = "look at the step before it: recurrent weights too large, a division by zero, a logarithm of zero"
        return (Finding("non_finite", "warning", "", text, {"step": diagnosis.nonfinite_step}, remedy),)
    found = [*_lost(diagnosis), *_rounded(diagnosis)]
    for rule in (_nan, _explodes, _fades, _saturated, _dead, _direct, _underflow):
        for layer in diagnosis.layers:
            found += rule(diagnosis, layer)
    return tuple(sorted(found, key=lambda finding: finding.severity != "warning"))
