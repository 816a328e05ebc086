"""``rg.diagnose``: numbers against the functions they are made of, planted faults, healthy models, how it is shown."""

from __future__ import annotations

import functools
import html.parser
import json
import math
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

import rnngrad as rg
from rnngrad.diagnose import call
from rnngrad.diagnose import curves as curves_module
from rnngrad.diagnose.checks import rail_distance
from rnngrad.diagnose.curves import Work, choose
from rnngrad.diagnose.findings import findings_of
from rnngrad.diagnose.result import LostDerivative, Precision, crossing
from rnngrad.theory import forget_bias_for

NUM_STEPS, BATCH_SIZE, INPUT_SIZE, HIDDEN_SIZE = 40, 3, 3, 8
CHRONO = rg.initializers.chrono(NUM_STEPS)


def _xs(scale=1.0, num_steps=NUM_STEPS, dtype="float32"):
    return (scale * jax.random.normal(jax.random.key(7), (num_steps, BATCH_SIZE, INPUT_SIZE))).astype(dtype)


def _lstm(**options):
    cell = rg.cells.lstm(INPUT_SIZE, HIDDEN_SIZE, **options)
    return cell, cell.init(jax.random.key(0))


def _codes(report):
    return {finding.code for finding in report.warnings}


@functools.cache
def _default():
    """A two-layer stack with the forget biases of Torch's default, around 0."""
    cell = rg.cells.stack(rg.cells.gru(INPUT_SIZE, 5), rg.cells.lstm(5, HIDDEN_SIZE))
    params = cell.init(jax.random.key(0))
    return cell, params, rg.diagnose(cell, params, _xs())


# --- numbers -----------------------------------------------------------------------------------------------------


def _every_path(layer):
    found = _default()[2].layers[layer]
    paths = {"full": found.curves.full, "direct": found.curves.direct, "remainder": found.curves.remainder}
    paths |= {f"only:layer_{layer}.{gate}": curve for gate, curve in found.curves.only.items()}
    return paths | {f"without:layer_{layer}.{gate}": curve for gate, curve in found.curves.without.items()}


@pytest.mark.parametrize(
    ("layer", "block", "chosen"),
    [
        (1, "layer_1.c", ("full", "remainder", "only:layer_1.f", "without:layer_1.o")),
        pytest.param(0, "layer_0.h", None, marks=pytest.mark.slow),
        pytest.param(1, "layer_1.c", None, marks=pytest.mark.slow),
    ],
)
def test_curves_are_those_of_retention(layer, block, chosen):
    # the same scan with the open gates as data; only the order of additions may differ: 1e-5 nats and 1e-6 relative
    cell, params, report = _default()
    found = report.layers[layer]
    assert (found.name, found.memory) == (f"layer_{layer}", block)
    paths = _every_path(layer)
    assert len(paths) == 3 + 2 * (3 if layer == 0 else 4)  # r u n without a, which hears no state; i f g o
    for path in chosen or paths:
        curve = paths[path]
        for b in (0, BATCH_SIZE - 1):
            expected = rg.retention(cell, params, cell.init_state(), _xs()[:, b], of=block, wrt=block, path=path)
            np.testing.assert_allclose(curve[b], expected.log_norm, rtol=1e-6, atol=1e-5, err_msg=path)


def test_probes_cover_the_exact_curve_and_say_so():
    cell, params = _lstm(forget_bias=1.0)
    exact = rg.diagnose(cell, params, _xs(), method="exact").layers[0].curves
    probed = rg.diagnose(cell, params, _xs(), method="probes", num_probes=16)
    curves = probed.layers[0].curves
    assert "16 random rows" in probed.method
    inside = (curves.low[:, 1:] <= exact.full[:, 1:]) & (exact.full[:, 1:] <= curves.high[:, 1:])
    # lags share their probes, so that one miss is many: three curves of 95 % intervals
    assert inside.mean() > 0.7
    expected = rg.probe_retention(
        cell, params, cell.init_state(), _xs()[:, 0], jax.random.key(5), num_probes=16, of="c", wrt="c"
    )
    width = np.median(curves.high[:, 1:] - curves.low[:, 1:])
    assert 0.5 < width / np.median(expected.high[1:] - expected.low[1:]) < 2


def test_cost_chooses_the_method():
    small = [Work(num_rows=8, num_weights=400, num_chains=12)]
    assert choose(small, 100, 8, "auto", 16).num_probes == 0
    large = [Work(num_rows=1024, num_weights=8_000_000, num_chains=12)]
    plan = choose(large, 200, 8, "auto", 16)
    assert plan.num_probes == 16
    assert 1 <= plan.num_sequences < 8
    assert f"{plan.num_sequences} of the sequences" in plan.reason
    assert 200 * 2.0 * 16 * 8e6 * 12 * plan.num_sequences <= max(curves_module.PROBE_LIMIT, 200 * 2.0 * 16 * 8e6 * 12)
    assert choose(large, 200, 8, "exact", 16)[:2] == (0, 8)


def test_gate_shares_are_those_of_the_taps():
    cell, params = _lstm()
    loss = lambda outputs: jnp.sum(jnp.square(outputs[-1]))
    report = rg.diagnose(cell, params, _xs(), loss)

    def of_taps(taps):
        states = rg.unroll(cell, params, cell.init_state((BATCH_SIZE,)), _xs(), taps=taps).states
        return loss(states.h)

    z = jax.grad(of_taps)(rg.zero_taps(cell, NUM_STEPS, (BATCH_SIZE,))).z
    squares = {gate: float(jnp.sum(jnp.square(getattr(z, gate)))) for gate in z._fields}
    for gate, square in squares.items():
        assert report.layers[0].gate_share[gate] == pytest.approx(square / sum(squares.values()), rel=1e-4)


def test_exponents_are_those_of_the_spectrum():
    cell, params = _lstm(forget_bias=1.0)
    found = rg.diagnose(cell, params, _xs()).exponents[""]
    # another random frame: the leading exponent settles within the transient, to some 10⁻² here
    expected = rg.lyapunov_spectrum(
        cell, params, cell.init_state(), _xs()[:, 0], k=1, num_transient=NUM_STEPS // 4, num_blocks=7
    )
    assert found.exponents[0] == pytest.approx(float(expected.exponents[0]), abs=0.05)
    assert len(found.exponents) == len(found.stderr) == 3


def test_initialisation_is_that_of_the_report():
    cell, params, report = _default()
    expected = rg.init_report(cell, params, _xs()[:, 0])
    for layer, reference in zip(report.layers, expected.layers, strict=True):
        assert layer.init.layer == reference.layer
        assert layer.init.forget_bias == reference.forget_bias
        assert layer.init.kept == reference.kept
        assert layer.init.blocks == reference.blocks


def test_half_life_and_horizon_of_a_constant_gate(x64):
    # a linear cell h' = 0.52 h: the curve is lag · log 0.52 exactly
    cell = rg.cells.vanilla(1, 4, activation="identity", dtype=jnp.float64)
    params = cell.init(jax.random.key(0))._replace(w_hh=0.52 * jnp.eye(4))
    layer = rg.diagnose(cell, params, jnp.ones((30, 1))).layers[0]
    assert layer.half_life == pytest.approx(math.log(0.5) / math.log(0.52), rel=1e-12)
    assert layer.horizon == pytest.approx(math.log(1e-2) / math.log(0.52), rel=1e-12)
    assert layer.direct_half_life == 1.0  # nothing goes directly from h to h: gone after one step


@pytest.mark.parametrize(
    ("curve", "expected"),
    [([0.0, -1.0, -2.0], 1.5), ([0.0, -1.0, -1.2], math.inf), ([0.0, -math.inf], 1.0), ([0.0, math.nan], math.nan)],
)
def test_crossing(curve, expected):
    assert crossing(np.array(curve), 1.5) == pytest.approx(expected, nan_ok=True)


def test_what_the_issue_quotes():
    """ "halves every 1.06 steps; forget bias 3.05 would keep 10⁻² over 100 steps" """
    cell, params = _lstm(forget_bias=math.log(0.52 / 0.48))
    params = params._replace(w_ih=0 * params.w_ih, w_hh=0 * params.w_hh)
    report = rg.diagnose(cell, params, _xs(num_steps=100))
    (fades,) = [finding for finding in report.warnings if finding.code == "fades"]
    assert "forget gates average 0.52: memory halves every 1.06 steps" in fades.text
    assert "a forget bias of 3.05 (now 0.08 on average), or chrono(100), would keep 10⁻² over 100 steps" in fades.remedy


@pytest.mark.slow
def test_the_remedy_it_names_works():
    cell, params = _lstm(forget_bias=0.0)
    assert "fades" in _codes(rg.diagnose(cell, params, _xs()))
    for bias in (forget_bias_for(1e-2, NUM_STEPS), CHRONO):
        cell, params = _lstm(forget_bias=bias)
        report = rg.diagnose(cell, params._replace(w_ih=0.3 * params.w_ih), _xs())
        assert not _codes(report)
        assert report.layers[0].horizon == math.inf


# --- planted faults ----------------------------------------------------------------------------------------------


def _closed():
    return *_lstm(forget_bias=-5.0), _xs()


def _saturated():
    return *_lstm(forget_bias=CHRONO), _xs(scale=300.0)


def _exploding():
    cell = rg.cells.vanilla(INPUT_SIZE, HIDDEN_SIZE, activation="relu", init=rg.initializers.orthogonal(1.6))
    params = cell.init(jax.random.key(0))
    return cell, params._replace(b=params.b + 3.0), _xs(0.1)


def _dead():
    cell = rg.cells.vanilla(INPUT_SIZE, HIDDEN_SIZE, activation="relu", init=rg.initializers.identity(1.0))
    params = cell.init(jax.random.key(0))
    return cell, params._replace(b=jnp.where(jnp.arange(HIDDEN_SIZE) < 3, -9.0, 0.5)), _xs(0.1)


def _detached():
    cell, params = _lstm(forget_bias=CHRONO)
    cut = lambda params, z, state: cell.update(params, z, state._replace(c=jax.lax.stop_gradient(state.c)))
    return cell._replace(update=cut), params, _xs()


def _bfloat16():
    cell, params = _lstm(forget_bias=CHRONO, dtype=jnp.bfloat16)
    return cell, params, _xs(num_steps=120, dtype="bfloat16")


PLANTED = {
    "forget_gates_closed": _closed,
    "gates_saturated": _saturated,
    "explodes": _exploding,
    "dead_units": _dead,
    "detached_state": _detached,
    "low_precision": _bfloat16,
}


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_fault_is_found(code):
    report = rg.diagnose(*PLANTED[code]())
    assert code in _codes(report)
    (finding,) = [finding for finding in report.warnings if finding.code == code]
    assert finding.remedy
    assert finding.evidence
    assert all(isinstance(value, float | int) for value in finding.evidence.values())


def _healthy(seed):
    """Draws a model whose gradient crosses the run by construction, of random kind, sizes and inputs."""
    rng = np.random.default_rng(seed)
    num_steps, hidden_size = int(rng.integers(30, 80)), int(rng.integers(6, 20))
    input_size, batch_size = int(rng.integers(2, 6)), int(rng.integers(1, 5))
    chrono = rg.initializers.chrono(num_steps)
    kinds = [
        lambda: rg.cells.lstm(input_size, hidden_size, forget_bias=chrono),
        lambda: rg.cells.gru(input_size, hidden_size, forget_bias=chrono),
        lambda: rg.cells.gru(input_size, hidden_size, forget_bias=chrono, reset="before"),
        lambda: rg.cells.lru(input_size, hidden_size, radius=(0.98, 1.0)),
        lambda: rg.cells.vanilla(input_size, hidden_size, activation="identity", init=rg.initializers.orthogonal(1.0)),
        lambda: rg.cells.stack(
            rg.cells.lstm(input_size, 7, forget_bias=chrono), rg.cells.gru(7, hidden_size, forget_bias=chrono)
        ),
    ]
    cell = kinds[seed % len(kinds)]()
    key_params, key_xs = jax.random.split(jax.random.key(seed))
    return cell, cell.init(key_params), jax.random.normal(key_xs, (num_steps, batch_size, input_size))


@pytest.mark.slow
def test_healthy_models_raise_no_alarm():
    alarms = {seed: _codes(rg.diagnose(*_healthy(seed))) for seed in range(20)}
    assert sum(map(bool, alarms.values())) <= 1, {seed: codes for seed, codes in alarms.items() if codes}


def test_a_healthy_model_raises_no_alarm():
    report = rg.diagnose(*_healthy(0))
    assert not report.warnings
    assert "WARNING" not in report.table()


def test_a_gate_of_chrono_is_not_saturated():
    # 1/T from the rail, against 1/(10 T)
    assert rail_distance(200) == pytest.approx(0.1 / 200)
    assert rail_distance(3) == 1e-2


def test_rounding_within_the_step_is_found_and_its_size_is_not_claimed():
    cell, params = _lstm(forget_bias=CHRONO)

    def rounded(params, z, state):
        new, gates = cell.update(params, z, state)
        return new._replace(c=new.c.astype(jnp.bfloat16).astype(jnp.float32)), gates

    report = rg.diagnose(cell._replace(update=rounded), params, _xs())
    (finding,) = [finding for finding in report.warnings if finding.code == "low_precision"]
    assert "(c)" in finding.text
    assert math.isnan(finding.evidence["distance"])


def test_a_state_that_blows_up_is_told_with_its_step():
    cell = rg.cells.vanilla(INPUT_SIZE, 4, activation="identity", init=rg.initializers.orthogonal(1e4))
    report = rg.diagnose(cell, cell.init(jax.random.key(0)), _xs())
    assert _codes(report) == {"non_finite"}
    states = rg.unroll(cell, cell.init(jax.random.key(0)), cell.init_state((BATCH_SIZE,)), _xs()).states.h
    first = int(np.argmax(~np.isfinite(np.asarray(states)).all(axis=(1, 2))))
    assert report.nonfinite_step == first
    assert f"from step {first} on" in report.table()


def test_findings_follow_the_numbers():
    _, _, report = _default()
    assert "fades" in _codes(report)
    far = tuple(layer._replace(horizon=math.inf) for layer in report.layers)
    assert "fades" not in _codes(report._replace(findings=findings_of(report._replace(layers=far))))
    stuck = {"f": report.layers[1].saturation["f"]._replace(low=0.3, high=0.3)}
    layers = (report.layers[0], report.layers[1]._replace(saturation=stuck))
    found = findings_of(report._replace(layers=layers))
    assert [finding.layer for finding in found if finding.code == "gates_saturated"] == ["layer_1"]


def _changed(**fields):
    """The report of the stack with its upper layer changed, found anew."""
    _, _, report = _default()
    lower = report.layers[0]._replace(horizon=math.inf)
    upper = report.layers[1]._replace(**({"horizon": math.inf} | fields))
    report = report._replace(layers=(lower, upper))
    return report, lambda report: {finding.code: finding for finding in findings_of(report)}


RAILS = {"low": 0.0, "high": 0.0, "mean": 0.5}


@pytest.mark.parametrize(
    ("code", "below", "above"),
    [
        ("dead_units", {"constant_units": 0.1}, {"constant_units": 0.11}),
        ("gates_saturated", {"saturation": RAILS | {"low": 0.2, "high": 0.3}}, {"saturation": RAILS | {"low": 0.51}}),
        ("fades", {"horizon": float(NUM_STEPS)}, {"horizon": NUM_STEPS - 0.5}),
        ("no_loss_gradient", {"loss_gradient": np.zeros(3)}, {"loss_gradient": np.full(3, np.nan)}),
    ],
)
def test_thresholds_of_a_layer(code, below, above):
    for fields, expected in ((below, False), (above, True)):
        if "saturation" in fields:
            rails = _default()[2].layers[1].saturation["o"]._replace(**fields["saturation"])
            fields = {"saturation": {"o": rails}}
        report, codes = _changed(**fields)
        assert (code in codes(report)) == expected


@pytest.mark.parametrize(("nats", "expected"), [(math.log(99), False), (math.log(101), True)])
def test_threshold_of_growth(nats, expected):
    curves = _default()[2].layers[1].curves
    report, codes = _changed(curves=curves._replace(full=np.linspace(0, nats, NUM_STEPS + 1)[None]))
    assert ("explodes" in codes(report)) == expected


@pytest.mark.parametrize(("kept", "code"), [(0.11, "fades"), (0.09, "forget_gates_closed")])
def test_threshold_of_closed_gates(kept, code):
    init = _default()[2].layers[1].init
    report, codes = _changed(horizon=3.0, init=init._replace(kept=init.kept._replace(mean=kept)))
    assert code in codes(report)


def test_dead_units_need_enough_steps():
    report, codes = _changed(constant_units=1.0)
    assert "dead_units" not in codes(report._replace(num_steps=3, num_sequences=5))
    assert "dead_units" in codes(report._replace(num_steps=4, num_sequences=4))


@pytest.mark.parametrize(("distance", "expected"), [(0.009, False), (0.011, True), (math.inf, True), (math.nan, True)])
def test_threshold_of_rounding(distance, expected):
    report, codes = _changed()
    report = report._replace(precision={"": Precision("bfloat16", ("c",), distance)})
    assert ("low_precision" in codes(report)) == expected
    if expected:
        words = {math.inf: "overflows", 0.011: "1.1 % away"}.get(distance, "could not be measured")
        assert words in codes(report)["low_precision"].text
    assert "low_precision" not in codes(report._replace(precision={"": Precision("float32", (), math.nan)}))


@pytest.mark.parametrize(
    ("derivative", "code", "other"), [(0.91, "surrogate", "detached_state"), (0.89, "detached_state", "surrogate")]
)
def test_threshold_of_a_lost_derivative(derivative, code, other):
    report, codes = _changed(horizon=5.0)
    found = codes(report._replace(lost={"": (LostDerivative("c", "h", 1.0, derivative),)}))
    assert code in found
    assert other not in found
    assert ("detached_state" in found["fades"].remedy) == (code == "detached_state")


def test_a_long_memory_on_a_short_run_is_not_saturated():
    rails = _default()[2].layers[1].saturation["f"]
    stuck = {"f": rails._replace(low=0.0, high=0.9), "i": rails._replace(low=0.9, high=0.0)}
    report, codes = _changed(saturation=stuck)
    assert "gates_saturated" not in codes(report)
    report, codes = _changed(saturation=stuck, horizon=5.0)
    assert set(codes(report)["gates_saturated"].evidence) == {"share_f", "share_i"}
    report, codes = _changed(saturation={"f": rails._replace(low=0.9, high=0.0)})
    assert "gates_saturated" in codes(report)


def test_notes():
    curves = _default()[2].layers[1].curves
    line = lambda slope: slope * np.arange(NUM_STEPS + 1.0)[None]
    report, codes = _changed(curves=curves._replace(full=line(-3.0), direct=line(-4.0)))
    found = codes(report)
    assert found["product_of_gates"].evidence == {"lag": NUM_STEPS, "log_ratio": NUM_STEPS}
    # float32 keeps down to exp(−87.3) on a CPU: three nats per step reach it at step 30
    assert found["float32_underflow"].evidence == {"lag": 30}
    cut = np.where(np.arange(NUM_STEPS + 1) > 4, -np.inf, 0.0)[None]
    report, codes = _changed(curves=curves._replace(full=cut))
    assert "float32_underflow" not in codes(report)
    report, codes = _changed(has_split=False)
    assert "no_split" in codes(report)


def test_remedies_fit_the_cell():
    report, codes = _changed(horizon=5.0)
    assert "forget bias" in codes(report)["fades"].remedy
    layer = report.layers[1]
    high = layer.init._replace(forget_bias=layer.init.forget_bias._replace(mean=9.0))
    report, codes = _changed(horizon=5.0, direct_horizon=6.0, init=high)
    assert "high enough" in codes(report)["fades"].remedy
    report, codes = _changed(horizon=5.0, direct_horizon=math.inf)
    assert "cancel" in codes(report)["fades"].remedy
    # a share that is not the gate itself, as f/(f + i)
    report, codes = _changed(horizon=5.0, saturation={})
    assert "a kept share of 0.89" in codes(report)["fades"].remedy
    report, codes = _changed(horizon=5.0, constant_units=0.5)
    assert codes(report)["fades"].remedy == "first see dead_units"


def _step(gates_of=lambda params, h, x: params @ h + x):
    return gates_of, lambda params, h, x: jnp.tanh(gates_of(params, h, x))


def test_a_derivative_that_is_not_a_number_is_told():
    gates, tanh = _step()
    at_zero = lambda params, h, x: 0.95 * h + 0.05 * tanh(params, h, x) / (1 + jnp.linalg.norm(h))
    options = {"state": jnp.zeros(3), "gates": gates, "progress": False}
    report = rg.diagnose(at_zero, 0.5 * jnp.eye(3), _xs(num_steps=12), **options)
    assert _codes(report) == {"non_finite_gradient"}
    assert report.layers[0].curves.full.shape == (BATCH_SIZE, 13)
    assert np.isnan(report.layers[0].curves.full[:, 12]).all()
    report.table()


def test_a_straight_through_estimator_is_a_note():
    rounded = lambda x: x - jax.lax.stop_gradient(x) + jax.lax.stop_gradient(jnp.round(x))
    step = lambda params, h, x: rounded(params @ h + x)
    report = rg.diagnose(step, 0.9 * jnp.eye(3), _xs(num_steps=12), state=jnp.zeros(3))
    assert "surrogate" in {finding.code for finding in report.findings}
    assert "detached_state" not in _codes(report)
    json.loads(report.to_json(), parse_constant=pytest.fail)


def test_one_detached_unit_of_eight_is_found():
    cell, params = _lstm(forget_bias=CHRONO)

    def cut(params, z, state):
        c = state.c.at[2].set(jax.lax.stop_gradient(state.c[2]))
        return cell.update(params, z, state._replace(c=c))

    assert "detached_state" in _codes(rg.diagnose(cell._replace(update=cut), params, _xs()))


def test_weights_that_a_step_closes_over_cost_as_well():
    weights = jnp.eye(3)
    step = lambda params, h, x: jnp.tanh(weights @ h + x)
    report = rg.diagnose(step, {}, _xs(num_steps=6), state=jnp.zeros(3), method="probes", num_probes=4)
    assert "4 random rows" in report.method


def test_a_loss_sees_the_whole_batch_and_must_be_a_scalar():
    cell, params = _lstm()
    targets = jnp.arange(NUM_STEPS * BATCH_SIZE, dtype="float32").reshape(NUM_STEPS, BATCH_SIZE)
    loss = lambda outputs: jnp.mean(jnp.square(outputs.sum(-1) - targets))
    report = rg.diagnose(cell, params, _xs(), loss, max_sequences=1)
    assert report.num_sequences == 1
    whole = rg.watch(cell, _xs(), loss=loss)(1, params)
    assert report.layers[0].gate_share["f"] == pytest.approx(float(whole.layers[0].gate_share["f"]), rel=1e-5)
    with pytest.raises(ValueError, match=r"loss: expected a scalar .* float32\[40, 3, 8\], found shape \(3"):
        rg.diagnose(cell, params, _xs(), lambda outputs: outputs[-1])


# --- what a person sees ------------------------------------------------------------------------------------------


def test_table_names_layers_gates_and_method():
    _, _, report = _default()
    text = report.table()
    for part in ("layer_0", "layer_1", "| f |", "WARNING (fades)", "exact", "float32", "E log κ", "exponents"):
        assert part in text, part
    assert len(repr(report)) < 200
    assert "fades" in repr(report)


def test_json_holds_everything_and_has_no_nan():
    _, _, report = _default()
    found = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert [layer["name"] for layer in found["layers"]] == ["layer_0", "layer_1"]
    np.testing.assert_allclose(found["layers"][1]["curves"]["full"], report.layers[1].curves.full)
    assert found["layers"][0]["curves"]["remainder"][0][0] == "-inf"
    assert [finding["code"] for finding in found["findings"]] == [finding.code for finding in report.findings]


class _Balanced(html.parser.HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed():
    _, _, report = _default()
    page = report.to_html()
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "data:image/png;base64," in report._repr_html_()


def test_figure_has_a_row_for_each_layer():
    _, _, report = _default()
    axes = report.plot().axes
    assert len(axes) == 6
    assert {line.get_label() for line in axes[3].lines} >= {"full chain", "direct path", "remainder"}
    full = next(line for line in axes[3].lines if line.get_label() == "full chain")
    expected = np.median(report.layers[1].curves.full, axis=0) / math.log(10)
    np.testing.assert_allclose(full.get_ydata(), expected)


def test_without_plotting_the_extra_is_named(monkeypatch):
    _, _, report = _default()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"rnngrad\[plot\]"):
        report.plot()
    assert "<img" not in report._repr_html_()
    assert "fades" in report._repr_html_()


# --- bad input ---------------------------------------------------------------------------------------------------


def test_bad_input_says_what_was_expected():
    cell, params = _lstm()
    for xs, options, match in (
        (jnp.ones((4,)), {}, r"expected shape \(T, D\) or \(T, B, D\)"),
        (jnp.ones((4, 3)), {"time_axis": 1}, r"expected shape \(B, T, D\)"),
        (jnp.ones((0, 2, 3)), {}, "at least one step"),
        (jnp.ones((4, 2, 5)), {}, "expected 3 features"),
        (jnp.ones((4, 2, 3)).at[2, 1, 0].set(jnp.nan), {}, "time step 2"),
        (_xs(), {"method": "fast"}, "expected 'auto', 'exact' or 'probes'"),
        (_xs(), {"num_probes": 3}, "at least 4"),
        (_xs(), {"max_sequences": 0}, "at least 1"),
        (_xs(), {"time_axis": 2}, "expected 0 or 1"),
        ("text", {}, "expected an array, found str"),
    ):
        with pytest.raises(ValueError, match=match):
            rg.diagnose(cell, params, xs, **options)
    with pytest.raises(ValueError, match="w_hh"):
        rg.diagnose(cell, params._replace(w_hh=params.w_hh.at[0, 0].set(jnp.nan)), _xs())


@pytest.mark.slow
def test_one_step_and_one_sequence():
    cell, params = _lstm()
    report = rg.diagnose(cell, params, _xs()[:1, 0])
    assert report.exponents[""].missing
    assert report.layers[0].curves.full.shape == (1, 2)


@pytest.mark.slow
def test_batch_major_inputs_are_the_same_model():
    cell, params = _lstm()
    a = rg.diagnose(cell, params, _xs())
    b = rg.diagnose(cell, params, jnp.moveaxis(_xs(), 0, 1), time_axis=1)
    np.testing.assert_array_equal(a.layers[0].curves.full, b.layers[0].curves.full)


# --- speed -------------------------------------------------------------------------------------------------------


def test_a_bar_appears_where_somebody_looks_and_only_after_a_while(monkeypatch):
    shown = []
    monkeypatch.setattr(Progress, "start", lambda self: shown.append(self))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal

    def work(seconds, is_shown=True):
        monkeypatch.setattr(call, "BAR_AFTER_SECONDS", seconds)
        with call._progress(2, is_shown) as advance:
            advance("one")
            time.sleep(0.2)
            advance("two")
        return len(shown)

    assert work(60.0) == 0
    assert work(0.0, is_shown=False) == 0
    assert work(0.0) == 1
    monkeypatch.delenv("FORCE_COLOR")
    assert work(0.0) == 1  # stderr of a test is no terminal


@pytest.mark.slow
def test_a_diagnosis_imports_no_other_library():
    code = (
        "import sys, jax, rnngrad as rg\n"
        "cell = rg.cells.gru(3, 4)\n"
        "rg.diagnose(cell, cell.init(jax.random.key(0)), jax.numpy.ones((6, 3)))\n"
        "print(sorted({'equinox', 'haiku', 'matplotlib', 'torch', 'keras'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
