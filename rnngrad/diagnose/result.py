"""The result of ``rg.diagnose``: numbers, and how they are shown as a table, a figure, a page, JSON.

Everything is plain: NumPy arrays, numbers, strings.  Curves are in nats, lags in steps, exponents in nats per step.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rnngrad.init_report import InitReport, LayerReport, Table, markdown
from rnngrad.retention import Certificate


class Finding(NamedTuple):
    """One statement, with what it rests on and what to do."""

    code: str
    """See the table of :mod:`rnngrad.diagnose.findings`."""
    severity: str
    """``"warning"`` or ``"note"``."""
    layer: str
    text: str
    evidence: dict[str, float]
    remedy: str
    """Empty when nothing is to be done."""


class Curves(NamedTuple):
    """Retention of one layer's memory by lag 0 … T in nats; each array (sequences, T + 1)."""

    full: np.ndarray
    direct: np.ndarray | None
    """None, like the remainder, for a cell whose gates are unknown."""
    remainder: np.ndarray | None
    only: dict[str, np.ndarray]
    """By gate: that gate's path open beside the direct one."""
    without: dict[str, np.ndarray]
    """By gate: that gate's path cut."""
    low: np.ndarray | None
    """Ends of the 95 % intervals of ``full`` when it is an estimate, else None."""
    high: np.ndarray | None


class Saturation(NamedTuple):
    """One gate over units, steps and sequences."""

    low: float
    """Share at the lower rail."""
    high: float
    """Share at the upper rail."""
    mean: float


class Exponents(NamedTuple):
    """Leading Lyapunov exponents of a pass along the first sequence."""

    exponents: tuple[float, ...]
    stderr: tuple[float, ...]
    resolved: tuple[bool, ...]
    missing: str
    """Why there are none; empty when there are."""


class LostDerivative(NamedTuple):
    """A block ∂s'_a/∂s_b whose derivative is not that of the function, along a random unit direction."""

    of: str
    wrt: str
    difference: float
    """Norm by central differences."""
    derivative: float
    """Norm by automatic differentiation."""


class Precision(NamedTuple):
    """What the state is kept in."""

    dtype: str
    rounded: tuple[str, ...]
    """Fields that a step rounds to bfloat16 or float16."""
    distance: float
    """Relative distance of the last states from those of the same weights in float32; inf when they overflow, NaN when
    not measured."""


class LayerDiagnosis(NamedTuple):
    """One layer of one pass."""

    name: str
    """``""`` for the only one, else ``layer_1``, ``backward``, ``layer_1.backward``."""
    pass_name: str
    """Of the pass it belongs to."""
    cell: str
    memory: str
    """The block that retention is measured of."""
    reverse: bool
    has_split: bool
    curves: Curves
    half_life: float
    """Lag at which the median curve passes 1/2; inf when it does not."""
    horizon: float
    """The same for 10⁻²."""
    direct_half_life: float
    direct_horizon: float
    gate_share: dict[str, float]
    direct_share: float
    """Mean share of the direct path in what goes back from step to step."""
    loss_gradient: np.ndarray
    """ln ‖∂L/∂s_k‖ by lag, mean over sequences, 0 at lag 0; −inf where float32 has died."""
    saturation: dict[str, Saturation]
    constant_units: float
    """Share of the memory's units that never change."""
    init: LayerReport | None


class Diagnosis(NamedTuple):
    """What ``rg.diagnose`` returns; shows itself in a notebook."""

    source: str
    num_steps: int
    num_sequences: int
    method: str
    """How the curves were computed, and why so."""
    layers: tuple[LayerDiagnosis, ...]
    exponents: dict[str, Exponents]
    """By pass."""
    lost: dict[str, tuple[LostDerivative, ...]]
    precision: dict[str, Precision]
    nonfinite_step: int
    """First step at which a state is not finite, in the order of its pass; −1 for none."""
    input_rms: float
    certificate: Certificate
    findings: tuple[Finding, ...]

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that ask for something to be done."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    def table(self) -> str:
        """Returns findings and numbers as Markdown."""
        return "\n\n".join(_sections(self)) + "\n"

    def to_json(self) -> str:
        """Returns everything as JSON; NaN and ±inf, which JSON has not, become null and "inf" or "-inf"."""
        return json.dumps(plain(self), allow_nan=False)

    def plot(self) -> Any:
        """Returns a Matplotlib figure: one row per layer, with retention by path, by gate, and the gates themselves.

        Raises:
          ImportError: Matplotlib is missing; names the extra.
        """
        return _figure(self)

    def to_html(self) -> str:
        """Returns one self-contained page: findings, figure, numbers.

        Raises:
          ImportError: Matplotlib is missing; names the extra.
        """
        return _page(self)

    def __repr__(self) -> str:
        codes = ", ".join(finding.code for finding in self.warnings) or "no warnings"
        return f"<Diagnosis of {_title(self)}: {codes}>"

    def _repr_html_(self) -> str:
        try:
            draws()
        except ImportError:
            return _fragment(self)  # findings and tables need no Matplotlib
        return _fragment(self, _picture(self, dpi=70))


def crossing(log_norm: np.ndarray, nats: float) -> float:
    """Returns the lag at which a curve falls by ``nats`` for the first time, between lags by a straight line.

    inf when it never does; NaN when it is not a number before.

    >>> import numpy as np
    >>> from rnngrad.diagnose.result import crossing
    >>> print(round(crossing(np.log(0.52) * np.arange(4), np.log(2)), 2))
    1.06
    """
    for lag, value in enumerate(log_norm):
        if math.isnan(value):
            return math.nan
        if value <= -nats:
            above = float(log_norm[lag - 1]) if lag else 0.0
            return float(lag) if lag == 0 or math.isinf(value) else lag - 1 + (above + nats) / (above - float(value))
    return math.inf


def number(value: float, digits: int = 3) -> str:
    """Returns a number as tables print it: – for NaN, ∞."""
    if math.isnan(value):
        return "–"
    return "∞" if value == math.inf else "−∞" if value == -math.inf else f"{value:.{digits}g}"


# --- table -----------------------------------------------------------------------------------------------------------


def _beyond(lag: float, num_steps: int) -> str:
    return f"> {num_steps}" if lag == math.inf else number(lag)


def _label(layer: LayerDiagnosis) -> str:
    name = f"{layer.name}: {layer.cell}" if layer.name else layer.cell
    return f"{name}, {layer.memory}"


def _finding_lines(diagnosis: Diagnosis) -> list[str]:
    if not diagnosis.findings:
        return ["No findings."]
    mark = {"warning": "WARNING", "note": "note"}
    return [
        f"* {mark[f.severity]} ({f.code}): {f.text}." + (f" Remedy: {f.remedy}." if f.remedy else "")
        for f in diagnosis.findings
    ]


def _gates(layer: LayerDiagnosis) -> list[str]:
    """Returns the gates in the order of the cell, those without rails last."""
    return list(dict.fromkeys([*layer.curves.only, *layer.saturation, *layer.gate_share]))


def _tables(diagnosis: Diagnosis) -> list[Table]:
    """Returns every table as rows of texts, the first one its header."""
    found: list[Table] = [
        [
            ("layer, memory", "half-life", "10⁻² at lag", "direct path: half-life", "10⁻² at lag", "constant units"),
            *(
                (
                    _label(layer),
                    _beyond(layer.half_life, diagnosis.num_steps),
                    _beyond(layer.horizon, diagnosis.num_steps),
                    _beyond(layer.direct_half_life, diagnosis.num_steps),
                    _beyond(layer.direct_horizon, diagnosis.num_steps),
                    f"{100 * layer.constant_units:.0f} %",
                )
                for layer in diagnosis.layers
            ),
        ]
    ]
    for layer in diagnosis.layers:
        gates = _gates(layer)
        if not gates:
            continue
        at = lambda curves, gate, layer=layer: number(float(np.median(curves[gate][:, -1]))) if gate in curves else ""
        rows = []
        for gate in gates:
            rails = layer.saturation.get(gate)
            rows.append(
                (
                    gate,
                    f"{100 * layer.gate_share[gate]:.1f} %" if gate in layer.gate_share else "",
                    "" if rails is None else f"{rails.mean:.3f}",
                    "" if rails is None else f"{100 * rails.low:.0f} % / {100 * rails.high:.0f} %",
                    at(layer.curves.only, gate),
                    at(layer.curves.without, gate),
                )
            )
        whole = number(float(np.median(layer.curves.full[:, -1])))
        header = (
            f"gate of {layer.name or layer.cell}",
            "share of gradient",
            "mean",
            "at rails, low / high",
            f"nats at lag {diagnosis.num_steps}, only it",
            f"without it (full: {whole})",
        )
        found.append([header, *rows])
    exponents: Table = [("pass", "leading exponents, nats per step")]
    for name, spectrum in diagnosis.exponents.items():
        pairs = zip(spectrum.exponents, spectrum.stderr, spectrum.resolved, strict=True)
        listed = ", ".join(f"{e:.3g} ± {s:.2g}{'' if ok else ' (not resolved)'}" for e, s, ok in pairs)
        exponents.append((name or diagnosis.source, listed or f"none: {spectrum.missing}"))
    reports = tuple(layer.init for layer in diagnosis.layers if layer.init is not None)
    return [*found, exponents, *InitReport(diagnosis.num_steps, reports).tables()]


def _sections(diagnosis: Diagnosis) -> list[str]:
    findings = "\n".join(_finding_lines(diagnosis))
    return [_title(diagnosis), findings, *map(markdown, _tables(diagnosis)), _made_with(diagnosis)]


def _title(diagnosis: Diagnosis) -> str:
    sequences = "1 sequence" if diagnosis.num_sequences == 1 else f"{diagnosis.num_sequences} sequences"
    return f"{diagnosis.source}: {diagnosis.num_steps} steps, {sequences}"


def _made_with(diagnosis: Diagnosis) -> str:
    made = diagnosis.certificate
    kept = "; ".join(f"{name or 'state'} kept in {p.dtype}" for name, p in diagnosis.precision.items())
    return (
        f"Curves: {diagnosis.method}; medians over sequences. Computed in {made.dtype}, matmul precision "
        f"{made.matmul_precision}, on {made.backend}; {kept}."
    )


# --- JSON ------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Returns NamedTuples as objects and arrays as lists; JSON has no NaN (null) and no infinity (the word)."""
    if hasattr(value, "_asdict"):
        return {name: plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


# --- figure ----------------------------------------------------------------------------------------------------------

_COLOURS = {"full": "#1b1b1b", "direct": "#d55e00", "remainder": "#009e73"}  # Okabe & Ito 2008
_GATE_COLOURS = ("#0072b2", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#d55e00")


def draws() -> Any:
    """Returns Matplotlib's Figure, to know before long work that there is one.

    Raises:
      ImportError: Matplotlib is missing; names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a figure needs Matplotlib: pip install "rnngrad[plot]"') from error
    return Figure


def _figure(diagnosis: Diagnosis) -> Any:
    make = draws()
    rows = len(diagnosis.layers)
    figure = make(figsize=(13, 0.7 + 3.6 * rows), layout="constrained")
    figure.suptitle(f"How far back the gradient reaches. {_title(diagnosis)}", fontsize=11)
    axes = figure.subplots(rows, 3, squeeze=False, width_ratios=(1.2, 1.2, 1))
    for row, layer in zip(axes, diagnosis.layers, strict=True):
        _draw_paths(row[0], layer, diagnosis.num_steps)
        _draw_gates(row[1], layer)
        _draw_shares(row[2], layer)
    return figure


def _draw_curve(axis: Any, curves: np.ndarray, **style: Any) -> None:
    shown = np.where(np.isfinite(curves), curves / math.log(10), np.nan)
    lags = np.arange(curves.shape[1])
    middle = np.median(shown, axis=0)
    axis.plot(lags, middle, **style)
    if len(shown) > 1:
        axis.fill_between(lags, shown.min(axis=0), shown.max(axis=0), color=style["color"], alpha=0.15, lw=0)


def _finish(axis: Any, *shown: np.ndarray) -> None:
    """Cuts off what lies beyond 20 decades below the horizon, to all sides."""
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in shown] + [np.array([-math.log(1e3)])])
    lowest = max(float(finite.min()) / math.log(10) * 1.05, -22.0)
    inside = [np.flatnonzero(np.any(curve > lowest * math.log(10), axis=0)) for curve in shown]
    axis.set_xlim(0, max([1, *(int(lags[-1]) for lags in inside if len(lags))]) * 1.05)
    axis.set_ylim(bottom=lowest)
    axis.axhline(-2, color="#888888", lw=0.8, ls=":")
    axis.set_xlabel("lag, steps")
    axis.set_ylabel("retention, powers of ten")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)


def _draw_paths(axis: Any, layer: LayerDiagnosis, num_steps: int) -> None:
    found = {name: getattr(layer.curves, name) for name in ("full", "direct", "remainder")}
    shown = {name: curve for name, curve in found.items() if curve is not None and np.isfinite(curve[:, 1:]).any()}
    label = {"full": "full chain", "direct": "direct path", "remainder": "remainder"}
    for name, curve in shown.items():
        _draw_curve(axis, curve, color=_COLOURS[name], label=label[name], lw=1.8 if name == "full" else 1.2)
    if layer.curves.low is not None and layer.curves.high is not None:
        ends = [np.median(end, axis=0) / math.log(10) for end in (layer.curves.low, layer.curves.high)]
        axis.plot(np.arange(num_steps + 1), np.stack(ends, axis=1), color=_COLOURS["full"], lw=0.6, ls="--")
    if math.isfinite(layer.horizon):
        axis.axvline(layer.horizon, color="#888888", lw=0.8, ls=":")
        axis.annotate(
            f"10⁻² at lag {layer.horizon:.3g}",
            (layer.horizon, -2),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_title(_label(layer), fontsize=10, loc="left")
    _finish(axis, *shown.values())


def _draw_gates(axis: Any, layer: LayerDiagnosis) -> None:
    if not layer.curves.only:
        axis.set_axis_off()
        why = "this cell has no gates" if layer.has_split else "the gates of this cell are unknown"
        axis.text(0.5, 0.5, why, ha="center", va="center", transform=axis.transAxes, fontsize=9)
        return
    _draw_curve(axis, layer.curves.full, color=_COLOURS["full"], label="all gates", lw=1.8)
    for (gate, curve), colour in zip(layer.curves.only.items(), _GATE_COLOURS * 3, strict=False):
        _draw_curve(axis, curve, color=colour, label=f"only {gate}", lw=1.2)
    axis.set_title("with one gate's path open beside the direct one", fontsize=10, loc="left")
    _finish(axis, layer.curves.full, *layer.curves.only.values())


def _draw_shares(axis: Any, layer: LayerDiagnosis) -> None:
    gates = _gates(layer)
    if not gates:
        axis.set_axis_off()
        return
    places = np.arange(len(gates))
    share = [100 * layer.gate_share.get(gate, math.nan) for gate in gates]
    rails = [layer.saturation.get(gate) for gate in gates]
    stuck = [math.nan if found is None else 100 * (found.low + found.high) for found in rails]
    axis.bar(places - 0.2, share, 0.38, color="#0072b2", label="share of the gradient")
    axis.bar(places + 0.2, stuck, 0.38, color="#e69f00", label="at a rail")
    axis.set_xticks(places, gates)
    axis.set_ylim(0, 130)
    axis.set_yticks([0, 25, 50, 75, 100])
    axis.set_ylabel("per cent")
    axis.set_title("gates", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="upper right")


# --- HTML ------------------------------------------------------------------------------------------------------------


def _html_table(table: Table) -> str:
    header, *rows = table
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', header)}</tr></thead>"
    return f"<div style='overflow-x:auto'><table>{head}<tbody>{body}</tbody></table></div>"


def _fragment(diagnosis: Diagnosis, picture: str = "") -> str:
    items = "".join(
        f"<li><b>{'⚠ ' if f.severity == 'warning' else ''}{html.escape(f.code)}</b> {html.escape(f.text)}."
        + (f" <i>{html.escape(f.remedy)}.</i>" if f.remedy else "")
        + "</li>"
        for f in diagnosis.findings
    )
    findings = f"<ul>{items}</ul>" if items else "<p>No findings.</p>"
    tables = "".join(map(_html_table, _tables(diagnosis)))
    title, made_with = map(html.escape, (_title(diagnosis), _made_with(diagnosis)))
    return f"<h3>{title}</h3>{findings}{picture}{tables}<p>{made_with}</p>"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.75rem; border-bottom: 1px solid #8886; }
img { max-width: 100%; height: auto; background: #fff; }
"""


def _picture(diagnosis: Diagnosis, dpi: int) -> str:
    file = io.BytesIO()
    _figure(diagnosis).savefig(file, format="png", dpi=dpi)
    source = base64.b64encode(file.getvalue()).decode()
    text = "retention by lag, by gate, and the gates of every layer"
    return f"<img alt='{text}' src='data:image/png;base64,{source}'>"


def _page(diagnosis: Diagnosis) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{html.escape(_title(diagnosis))}</title><style>{_STYLE}</style></head><body>'
        f"{_fragment(diagnosis, _picture(diagnosis, dpi=110))}</body></html>\n"
    )
