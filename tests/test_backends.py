"""The comparison of backends: rounding bit by bit, emulated products by NumPy, errors, verdicts, merged results."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import backends, command, results

TINY = dataclasses.replace(
    backends.SMOKE, networks=("vanilla, gain 1",), settings=("cpu float32", "emulated tf32 everywhere", "emulated bf16")
)


@pytest.fixture(scope="module")
def tiny():
    return backends.run(TINY)


# --- rounding and products -------------------------------------------------------------------------------------------


def nearest_even(x, bits):
    """float32 rounded to ``bits`` bits of mantissa, by integers alone: half of the last place, less one if it is even,
    is added to the bit pattern, and what lies below the last place is cut."""
    pattern = x.view(np.uint32).astype(np.uint64)
    cut = 23 - bits
    pattern += (1 << (cut - 1)) - 1 + ((pattern >> cut) & 1)
    return ((pattern >> cut) << cut).astype(np.uint32).view(np.float32)


@pytest.fixture(scope="module")
def numbers():
    """Normal numbers of all sizes, and ties at the last place of either format."""
    rng = np.random.default_rng(0)
    of_all_sizes = (rng.normal(size=2000) * 2.0 ** rng.integers(-100, 100, size=2000)).astype(np.float32)
    ties = [1 + (k + 0.5) * 2.0**-bits for bits in (7, 10) for k in range(8)]
    return np.concatenate([of_all_sizes, np.array(ties, np.float32), -np.array(ties, np.float32), [0, 1]]).astype("f4")


def test_bfloat16_rounds_as_ml_dtypes_does(numbers):
    found = backends.rounded(jnp.asarray(numbers), jnp.int32(backends.ROUNDINGS.index("bfloat16")))
    np.testing.assert_array_equal(found, numbers.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("name", ["tf32", "bfloat16"])
def test_rounding_bit_by_bit(numbers, name):
    found = backends.rounded(jnp.asarray(numbers), jnp.int32(backends.ROUNDINGS.index(name)))
    np.testing.assert_array_equal(found, nearest_even(numbers, backends.MANTISSA_BITS[name]))


def test_no_rounding_and_other_dtypes_are_left_alone(numbers):
    np.testing.assert_array_equal(backends.rounded(jnp.asarray(numbers), jnp.int32(0)), numbers)
    half = jnp.asarray([1.001], jnp.bfloat16)
    assert backends.rounded(half, jnp.int32(1)).dtype == jnp.bfloat16


def test_a_product_of_known_values():
    """1 + 2^-9 is a number of TF32 and rounds to 1 in bfloat16; 1 + 2^-12 rounds to 1 in both."""
    a = jnp.array([[1 + 2.0**-9, 1 + 2.0**-12]], jnp.float32)
    b = jnp.array([[1.0], [1024.0]], jnp.float32)
    product = backends.emulated(jnp.matmul)
    at = lambda name: float(product(jnp.array([backends.ROUNDINGS.index(name), 0], jnp.int32), a, b)[0, 0])
    assert at("none") == 1 + 2.0**-9 + 1024.25
    assert at("tf32") == 1 + 2.0**-9 + 1024
    assert at("bfloat16") == 1025


def _looped(a, b):
    """Products in a scan, a while loop, a branch, a call, a derivative and one that asks for highest precision."""

    def body(carry, row):
        carry = jnp.tanh(b @ carry)
        return carry, jax.lax.cond(row[0] > 0, lambda: b @ carry, lambda: carry)

    last, rows = jax.lax.scan(body, a[0], a)
    _, again = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jax.nn.relu(b @ s[1])), (0, last))
    gradient = jax.grad(lambda b: jnp.sum(jax.checkpoint(lambda b: jnp.tanh(b @ last))(b)))(b)
    return rows, again, jax.jit(jnp.matmul)(a, b), gradient, jnp.matmul(a, b, precision="highest")


@pytest.mark.parametrize(("of_model", "of_highest"), [("none", "none"), ("bfloat16", "none"), ("tf32", "bfloat16")])
def test_products_inside_loops_branches_and_calls(of_model, of_highest):
    """Against NumPy, which multiplies what was rounded, in float64."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 4)).astype("f4"), (rng.normal(size=(4, 4)) / 2).astype("f4")
    roundings = jnp.array([backends.ROUNDINGS.index(name) for name in (of_model, of_highest)], jnp.int32)
    found = jax.jit(backends.emulated(_looped))(roundings, a, b)

    def dot(x, y, how=of_model):
        if how != "none":
            x, y = (nearest_even(np.asarray(z, np.float32), backends.MANTISSA_BITS[how]) for z in (x, y))
        return np.asarray(x, float) @ np.asarray(y, float)

    carry, rows = a[0], []
    for row in a:
        carry = np.tanh(dot(b, carry)).astype("f4")
        rows.append(dot(b, carry) if row[0] > 0 else carry)
    again = carry
    for _ in range(3):
        again = np.maximum(dot(b, again), 0).astype("f4")
    slope = 1 - np.tanh(dot(b, carry)) ** 2
    # an outer product may be lowered as a product or elementwise: its rounding is allowed here
    expected = (rows, again, dot(a, b), None, dot(a, b, of_highest))
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            # sums of four products in float32; a value at a tie may round the other way once in the chain of five
            np.testing.assert_allclose(one, np.array(other), rtol=2e-3 if of_model != "none" else 2e-6, atol=1e-5)
    assert np.max(np.abs(found[3] - np.outer(slope, carry))) < 2e-2


def test_every_product_is_seen():
    """Of a whole measurement: with a product that gives NaN nothing is left, with the plain one all is as it was."""
    cell = rg.cells.lstm(3, 4)
    params, state = cell.init(jax.random.key(0)), cell.init_state()
    xs = jax.random.normal(jax.random.key(1), (6, 3))
    curve = lambda params, xs: rg.retention(cell, params, state, xs).log_norm
    plain = backends.with_products(
        curve, lambda equation, operands: equation.primitive.bind(*operands, **equation.params)
    )
    np.testing.assert_allclose(jax.jit(plain)(params, xs), curve(params, xs), rtol=1e-6, atol=1e-6)
    seen = []

    def product(equation, operands):
        seen.append(backends.asks_for_highest(equation))
        return equation.primitive.bind(*operands, **equation.params) * jnp.float32(jnp.nan)

    assert np.isnan(backends.with_products(curve, product)(params, xs)).all()
    # W x and U h of the forward pass are the model's, the chain's own ask for highest precision
    assert seen.count(False) == 2
    assert seen.count(True) >= 1


def test_at_default_asks_for_nothing():
    changed = backends.with_products(lambda a: jnp.matmul(a, a, precision="highest"), backends.at_default)
    program = jax.make_jaxpr(changed)(jnp.eye(2))
    assert [equation.params["precision"] for equation in program.eqns if equation.primitive.name == "dot_general"] == [
        None
    ]


# --- on rails, and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [rg.cells.lstm, rg.cells.gru, rg.cells.vanilla])
def test_on_rails_measures_at_the_states_given(make):
    """Step Jacobians at foreign states, by autodiff of the bare cell there; at its own states nothing changes."""
    cell = make(3, 4)
    params, start = cell.init(jax.random.key(0)), cell.init_state()
    xs = jax.random.normal(jax.random.key(1), (5, 3))
    there = jax.tree.map(lambda s: jax.random.normal(jax.random.key(2), (5, *s.shape)), start)
    on = lambda value: (xs, there, jnp.full(5, value))
    railed = backends.on_rails(cell)
    found = rg.step_jacobians(railed, params, start, on(1.0))

    def jacobian(state, x):
        flat, back = jax.flatten_util.ravel_pytree(state)
        return jax.jacfwd(lambda s: jax.flatten_util.ravel_pytree(cell.step(params, back(s), x)[0])[0])(flat)

    np.testing.assert_allclose(found, jax.vmap(jacobian)(there, xs), rtol=1e-5, atol=1e-6)
    own = rg.retention(railed, params, start, on(0.0)).log_norm
    np.testing.assert_allclose(own, rg.retention(cell, params, start, xs).log_norm, rtol=1e-6, atol=1e-6)


def test_distance_of_scaled_matrices():
    b = np.array([[[1.0, 2.0], [3.0, 5.0]]])
    at = lambda matrix, exponent: rg.LogScaled(matrix, np.array([exponent], np.int32))
    # the same numbers at another scale, then a tenth off, then 0 beside a number, far below any float
    assert backends.relative_distance(at(b / 4, -4998), at(b, -5000)) == 0
    np.testing.assert_allclose(backends.relative_distance(at(b * 1.1, -5000), at(b, -5000)), 0.1, rtol=1e-12)
    np.testing.assert_allclose(backends.relative_distance(at(b * 0, 0), at(b, -5000)), 1)


def test_dimension_by_hand():
    assert backends.dimension_of(np.array([-0.1, -0.2])) == 0
    assert backends.dimension_of(np.array([-0.4, 0.2, -0.1])) == 2 + 0.1 / 0.4
    assert backends.dimension_of(np.array([0.2, -0.1])) == 2
    # of equal blocks nothing scatters
    assert backends.dimension_stderr(np.tile([0.2, -0.1, -0.4], (8, 1))) == 0


def test_allowance_is_what_two_samples_differ_by():
    """Monte-Carlo: 95 % of pairs of normal estimates lie within it, one by one and for five together."""
    rng = np.random.default_rng(0)
    for num in (1, 5):
        apart = np.abs(rng.normal(size=(40_000, num)) - rng.normal(size=(40_000, num))).max(axis=1)
        # binomial scatter of 40,000 draws is 0.1 %; Bonferroni is a little wide
        np.testing.assert_allclose(np.mean(apart < backends.allowance(1.0, num)), 0.95, atol=0.005)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_dimensions_units_and_where_rows_come_from(tiny):
    assert dict(tiny.sizes) == {"setting": 3, "row": 1, "trajectory": 2, "quantity": 17, "seed": 2}
    assert all(tiny[name].attrs.get("units") for name in tiny.data_vars)
    for name in ("platform", "device", "dtype", "products", "reach", "jax", "sources"):
        assert tiny[name].dims == ("setting",)
    assert not jax.config.jax_enable_x64
    # what cannot be compared is not: a training step along foreign states, lags beyond the run
    assert tiny["error"].sel(trajectory="reference", quantity="loss").isnull().all()
    assert tiny["error"].sel(quantity="chain, lag 100").isnull().all()


def test_float32_errors_by_two_runs_outside(tiny):
    """Seed 1: retention at lag 10 in float32 and in float64, from the drawn weights by NumPy."""
    drawn = backends.draw("vanilla, gain 1", 1, TINY)

    def log_norm(dtype):
        w, u, b = (np.asarray(leaf, dtype) for leaf in (drawn.params.w_ih, drawn.params.w_hh, drawn.params.b))
        h, chain = np.zeros(3, dtype), []
        for x in np.asarray(drawn.xs, dtype):
            h = np.tanh(w @ x + u @ h + b)
            chain.append((1 - h**2)[:, None] * u)
        product = np.linalg.multi_dot(chain[:-11:-1])
        return np.log(np.linalg.norm(product) / np.sqrt(3))

    name = "retention, lag 10"
    np.testing.assert_allclose(tiny["reference"].sel(quantity=name).values[0, 1], log_norm("f8"), rtol=1e-9)
    error = tiny["error"].sel(setting="cpu float32", quantity=name, trajectory="own").values[0, 1]
    # the roundings of two float32 programs differ; both stay within some units of the last place of ten steps
    assert abs(error) < 1e-5
    assert abs(log_norm("f4") - log_norm("f8")) < 1e-5


def test_lower_precision_errs_more(tiny):
    error = tiny["error_median"].sel(trajectory="own", quantity="states").isel(row=0)
    assert error.sel(setting="cpu float32") < error.sel(setting="emulated tf32 everywhere")
    assert error.sel(setting="emulated tf32 everywhere") < error.sel(setting="emulated bf16")


def _with(dataset, ratios):
    changed = dataset[list(backends.MEASURED)].copy(deep=True)
    changed["error"] = changed["allowed"] * xr.where(changed["error"].isnull(), np.nan, 0.1)
    changed["error"] = changed["error"].transpose(*dataset["error"].dims)
    for (setting, quantity), ratio in ratios.items():
        at = {"setting": setting, "quantity": quantity, "trajectory": "own"}
        changed["error"].loc[at] = (ratio * changed["allowed"].sel(quantity=quantity)).transpose("row", "seed")
    changed.attrs = dataset.attrs
    return backends.derive(changed)


def test_verdict_follows_the_data(tiny):
    word = lambda ratios: {v.claim: v.word for v in backends.EXPERIMENT.verdicts(_with(tiny, ratios))}
    assert word({}) == {"N1": "holds", "N2": "holds only if", "N3": "holds"}
    as_claimed = {
        ("emulated tf32 everywhere", "chain, lag 10"): 3.0,
        ("emulated tf32 everywhere", "condition number, lag 10"): np.inf,
    }
    assert word(as_claimed)["N2"] == "holds"
    assert word({("cpu float32", "leading exponent"): 1.1})["N1"] == "does not hold"
    assert word({("emulated bf16", "loss"): 1.1})["N3"] == "holds only if"
    sentence = backends.summary(_with(tiny, {("emulated bf16", "loss"): 1.1}))["N3"]
    assert "emulated bf16: loss (every network)" in sentence
    # one setting's number is another's business
    assert word({("emulated bf16", "loss"): 1.1})["N1"] == "holds"


def test_a_claim_without_its_settings_is_not_decided(tiny):
    alone = backends.derive(tiny[list(backends.MEASURED)].sel(setting=["cpu float32"]).assign_attrs(tiny.attrs))
    words = {v.claim: v.word for v in backends.EXPERIMENT.verdicts(alone)}
    assert words == {"N1": "holds", "N2": "not decided", "N3": "not decided"}


def test_figures_mark_what_is_lost(tiny):
    drawn = backends.figure(_with(tiny, {("emulated bf16", "loss"): 20.0}))
    (mark,) = drawn.axes[0].texts
    assert mark.get_position() == (2, list(backends.QUANTITIES).index("loss"))
    assert backends.figure_reference(tiny).axes[0].get_title() == "vanilla, gain 1"


# --- merged results --------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tiny, tmp_path):
    """The result of another machine: float32 as here, and a GPU in place of the others, off by 7."""
    other = tiny[list(backends.MEASURED)].isel(setting=[0, 1]).copy(deep=True)
    name = np.array(["cpu float32", "gpu tf32"])
    other = other.assign_coords(setting=name, platform=("setting", ["cpu", "gpu"]), device=("setting", ["cpu", "G1"]))
    other["error"][...] = 7.0
    other.attrs = {**tiny.attrs, "config": tiny.attrs["config"].replace("[]", '["elsewhere"]')}
    file = tmp_path / "gpu.nc"
    results.save(other, file)
    return file


def _config(file=None):
    return dataclasses.replace(
        TINY, settings=("cpu float32", "emulated tf32 everywhere", "emulated bf16", "gpu tf32"),
        merge=() if file is None else (str(file),),
    )  # fmt: skip


def _as_of(dataset, config):
    attrs = {**dataset.attrs, "config": json.dumps(command.config_dict(dataclasses.replace(config, merge=())))}
    return dataset[list(backends.MEASURED)].assign_attrs(attrs)


def test_rows_of_what_is_not_here_are_merged(tiny, stored):
    config = _config(stored)
    results.save(_as_of(results.load(stored, experiment="backends"), config), stored)
    whole = backends.merged(_as_of(tiny, config), [stored], config)
    assert whole["setting"].values.tolist() == list(config.settings)
    assert (whole["error"].sel(setting="gpu tf32") == 7).all()
    assert whole["device"].sel(setting="gpu tf32") == "G1"
    # what was measured here stays
    xr.testing.assert_equal(whole["error"].sel(setting="cpu float32"), tiny["error"].sel(setting="cpu float32"))
    whole.attrs = tiny.attrs
    assert "G1" in str(backends.table(backends.derive(whole)).title)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.assign_attrs(config=d.attrs["config"].replace('"seeds": 2', '"seeds": 3')), "seeds: expected 2"),
        (lambda d: d.assign_coords(seed=[5, 6]), "measured other values of 'seed', found \\[5, 6\\]"),
        (lambda d: d.assign(reference=d["reference"] * 1.01), "measured other networks"),
        (lambda d: d.assign_attrs(experiment="bounds"), "expected a result of experiment 'backends', found 'bounds'"),
    ],
    ids=["settings", "seeds", "networks", "experiment"],
)
def test_foreign_results_are_refused(tiny, tmp_path, change, message):
    file = tmp_path / "other.nc"
    results.save(change(_as_of(tiny, _config())), file)
    with pytest.raises(command.UserError, match=message):
        backends.merged(_as_of(tiny, _config()), [file], _config(file))


def test_a_stored_result_of_other_settings_is_left_alone(tiny, tmp_path, monkeypatch):
    file = tmp_path / "backends.nc"
    monkeypatch.setattr(backends, "STORED", file)
    assert backends._files(_config(), None) == []
    results.save(_as_of(tiny, _config()), file)
    assert backends._files(_config(), None) == [file]
    assert backends._files(dataclasses.replace(_config(), seeds=3), None) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "9"], "--steps: expected at least 10, found 9"),
        (["--steps", "20"], "--steps: expected at least 32 after the --transient 4"),
        (["--train-steps", "41"], "--train-steps: expected at most --steps 40, found 41"),
        (["--networks", "none"], "--networks: expected some of"),
        (["--settings", "tpu bf16"], "--settings: expected one at least whose device is here"),
        (["--merge", "nowhere.nc"], "no result file nowhere.nc"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(backends.EXPERIMENT, ["--smoke", "--out", str(tmp_path / "o"), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
