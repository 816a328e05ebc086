"""The command ``rnngrad``: what it shows is what the library returns; what is mistyped is named."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnngrad as rg
from rnngrad import doctor
from rnngrad.__main__ import main
from rnngrad.cli import commands, loading
from rnngrad.cli.catalogue import catalogue

D, N = 3, 5
MY_MODULE = f"""
import jax
import rnngrad as rg

cell = rg.cells.lstm({D}, {N}, forget_bias=1.5)
two = rg.cells.stack(rg.cells.gru({D}, {N}), rg.cells.lstm({N}, 4))


def make():
    return rg.cells.gru({D}, {N}, reset="before")


def pair():
    return cell, cell.init(jax.random.key(7))


def step(params, state, x):
    return jax.numpy.tanh(params["u"] @ state + params["w"] @ x)


def broken():
    raise KeyError("no such layer")


def leaves():
    raise SystemExit(0)


class Net:
    def __init__(self, width):
        self.width = width


class nets:
    small = make()
"""


MODULES = ("my_module", "fails", "raises", "leaves", "loud")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with ``my_module.py``, in which one stands; what is imported there is forgotten afterwards."""
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    (tmp_path / "fails.py").write_text("import my_modul\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('not today')\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "loud.py").write_text("print('loading')\nfrom my_module import *\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def _json(capsys, *words, code=0):
    assert main([*words, "--json"]) == code
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def _error(capsys, *words):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, "one line"
    return said.err


# --- cells -----------------------------------------------------------------------------------------------------------


def test_cells_are_read_off_the_package(capsys):
    """Names, gates and fields against a step that is run; the equations against the files."""
    found = {entry["name"]: entry for entry in _json(capsys, "cells")["cells"]}
    factories = {name for name in rg.cells.__all__ if inspect.isfunction(getattr(rg.cells, name))} - {"eigenvalues"}
    assert found.keys() == factories
    for name in factories - {"stack", "map_cell"}:
        factory, entry = getattr(rg.cells, name), found[name]
        cell = factory(D, N)
        params = jax.eval_shape(cell.init, jax.random.key(0))
        state, gates = jax.eval_shape(cell.step, params, cell.init_state(), jnp.ones(D))
        assert tuple(entry["state"]) == state._fields
        assert tuple(entry["gates"]) == gates._fields
        documentation = inspect.getdoc(inspect.getmodule(factory))
        lines = entry["equation"].splitlines()
        assert lines
        assert all(line.strip() in documentation for line in lines)
        assert entry["source"]
        assert entry["source"].split()[0] in documentation
        assert set(inspect.signature(factory).parameters) == set(
            inspect.signature(eval(f"lambda {_arguments(entry['call'])}: 0")).parameters
        )
    assert found["map_cell"]["equation"] == ""


def _arguments(call):
    return call.partition("(")[2].removesuffix(")").replace("dtype=float32", "dtype=0")


def test_cells_as_a_table(capsys):
    assert main(["cells"]) == 0
    said = capsys.readouterr().out
    for entry in catalogue():
        assert f"│ {entry.name} " in said
    assert "c' = f ⊙ c + i ⊙ g" in said


# --- doctor ----------------------------------------------------------------------------------------------------------


def _rows(examination):
    return {row.name: row for row in examination.rows}


def test_doctor_as_json_and_as_a_table(capsys, here, monkeypatch):
    monkeypatch.delenv("RNNGRAD_DATA", raising=False)
    found = _json(capsys, "doctor")
    rows = {row["name"]: row for row in found["rows"]}
    assert found["is_healthy"]
    assert rows["rnngrad"]["value"] == rg.__version__
    for package in ("jax", "flax", "numpy"):
        assert rows[package]["value"] == metadata.version(package)
    assert rows["default backend"]["value"] == jax.default_backend()
    for device in jax.devices():
        assert {f"{device}: subnormals", f"{device}: float32 matmul", f"{device}: bfloat16 matmul"} <= rows.keys()
    assert {row["status"] for row in rows.values()} <= {"ok", "note", "problem"}
    assert all(row["advice"] for row in rows.values() if row["status"] != "ok")
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Examination((doctor.Row("x", "y", "problem", "do [z]"),)))
    assert main(["doctor"]) == 1
    assert "do [z]" in capsys.readouterr().out


def test_subnormals_are_as_the_certificate_says():
    """The certificate states where float32 ends on this backend; the doctor measures it."""
    ends_at_normal = rg.certificate("float32").float32_floor == float(np.log(np.finfo(np.float32).tiny))
    assert doctor.flushes_subnormals(jax.devices()[0]) == ends_at_normal


def test_matmul_error_against_rounding_by_hand(monkeypatch):
    """On a CPU float32 is multiplied as such, and bfloat16 added up in more digits than it has."""
    (device, *_) = jax.devices("cpu")
    assert 1e-8 < doctor.matmul_error(device, "float32") < 2e-6  # 6e-8, times at most √256
    # rounding to 8 bits: relative error uniform in ±2^−9 · (1 … 2), rms between 2^−9/√3 and 2^−8/√3
    assert 2**-9 / 3**0.5 < doctor.matmul_error(device, "bfloat16") < 2**-8 / 3**0.5
    monkeypatch.setattr(jnp, "matmul", _rounding_its_inputs)
    assert doctor._FLOAT32_ERROR < doctor.matmul_error(device, "float32") < 1e-2
    rows = _rows(doctor.examine())
    assert rows[f"{device}: float32 matmul"].status == "note"
    assert rows[f"{device}: bfloat16 matmul"].status == "ok"


def _rounding_its_inputs(a, b):
    rounded = (leaf.astype(jnp.bfloat16).astype(jnp.float32) for leaf in (a, b))
    return jax.lax.dot(*rounded, precision="highest").astype(a.dtype)


def test_requirements_of_core_and_extras(monkeypatch):
    lines = ['tyro<2,>=1.0; extra == "cli"', "jax>=99", "numpy>=2.1,<3", "nowhere>=1", 'absent; extra == "far"']
    monkeypatch.setattr(metadata, "requires", lambda name: [*lines, 'jax[cuda13]>=0.10; extra == "cuda"'])
    found = doctor.examine()
    rows = _rows(found)
    assert not found.is_healthy
    assert (rows["jax"].status, rows["nowhere"].status, rows["numpy"].status) == ("problem", "problem", "ok")
    assert "99" in rows["jax"].advice
    assert rows["extra cli"].status == "ok"
    assert rows["extra far"] == doctor.Row("extra far", "missing: absent", "note", 'pip install "rnngrad[far]"')
    assert "extra cuda" not in rows


@pytest.mark.parametrize(
    ("found", "lowest", "is_older"),
    [("0.10.2", "0.10", False), ("0.9.9", "0.10", True), ("2.0", "2.0.0", False), ("1.2rc1", "1.2", False)],
)
def test_versions_compare_by_their_numbers(found, lowest, is_older):
    assert doctor._is_older(found, lowest) == is_older


def test_data_and_results_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("RNNGRAD_DATA", str(tmp_path))
    assert doctor._data().status == "note"
    (tmp_path / "input.txt").write_text("not the text that it should be")
    spoilt = doctor._data()
    assert spoilt.status == "problem"
    assert "input.txt" in spoilt.advice
    assert doctor._results(tmp_path / "a" / "b").status == "ok"
    assert not (tmp_path / "a").exists()
    # a folder cannot be made below a file
    assert doctor._results(tmp_path / "input.txt" / "out").status == "note"


def test_a_backend_that_is_not_there_in_a_process_of_its_own():
    """Also: ``python -m rnngrad`` is the command, JSON stands alone on stdout, and what is broken has exit code 1."""
    done = subprocess.run(
        [sys.executable, "-m", "rnngrad", "doctor", "--json"],
        capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "nonsense"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["devices"]["status"] == "problem"
    assert "nonsense" in rows["devices"]["value"]


# --- models and weights by name --------------------------------------------------------------------------------------


def _weights(cell, seed):
    """Weights whose biases are not 0 either."""
    params = cell.init(jax.random.key(seed))
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32)), params)


def _named(params):
    return dict(zip(rg.types.leaf_names(params), map(np.asarray, jax.tree.leaves(params)), strict=True))


def test_weights_are_filled_in_by_name():
    cell = rg.cells.stack(rg.cells.gru(D, N), rg.cells.lstm(N, 4))
    expected, params = jax.eval_shape(cell.init, jax.random.key(0)), _weights(cell, 1)
    named = _named(params)
    shuffled = {name.replace(".", "/"): named[name] for name in sorted(named, reverse=True)}
    for weights in (named, shuffled, {f"params.{name}": leaf for name, leaf in named.items()}):
        found = loading.fill(expected, weights)
        jax.tree.map(np.testing.assert_array_equal, found, params)
        assert jax.tree.structure(found) == jax.tree.structure(params)


def test_names_and_shapes_that_do_not_fit_are_all_listed():
    cell = rg.cells.lstm(D, N)
    named = _named(cell.init(jax.random.key(0)))
    named["w_hx"] = named.pop("w_hh")
    named["b"] = named["b"][1:]
    with pytest.raises(loading.UserError) as raised:
        loading.fill(jax.eval_shape(cell.init, jax.random.key(0)), named)
    said = str(raised.value)
    assert "missing: w_hh (nearest: w_hx)" in said
    assert "not expected: w_hx (nearest: w_hh)" in said
    assert "b: expected float32[20], found float32[19]" in said
    assert "w_ih" not in said.replace("nearest: w_ih", "")
    with pytest.raises(loading.UserError, match="found float16"):
        loading.fill({"b": jnp.zeros(2)}, {"b": np.zeros(2, np.float16)})
    with pytest.raises(loading.UserError, match="mean the same"):
        loading.fill({"a": {"b": jnp.zeros(2)}}, {"a.b": np.zeros(2), "a/b": np.zeros(2)})


def test_what_is_no_array_stays():
    tree = {"w": jnp.zeros(2), "name": "x"}
    assert loading.fill(tree, {"w": np.ones(2, np.float32)})["name"] == "x"


def test_parts_and_nesting_of_names():
    weights = {"encoder.lstm.b": np.ones(2), "head.w": np.ones(3)}
    assert loading.select(weights, "encoder.lstm").keys() == {"b"}
    assert loading.select(weights, None).keys() == weights.keys()
    with pytest.raises(loading.UserError, match="did you mean 'encoder'"):
        loading.select(weights, "encodr")
    assert loading.nest(weights)["encoder"]["lstm"]["b"].shape == (2,)
    for names in (("a", "a.b"), ("a.b", "a")):
        with pytest.raises(loading.UserError, match="beginning"):
            loading.nest({name: np.ones(1) for name in names})


def test_objects_factories_and_pairs(here):
    key = jax.random.key(0)
    assert loading.build("my_module:cell", loading.resolve("my_module:cell")) is sys.modules["my_module"].cell
    my_module = sys.modules["my_module"]
    assert loading.load("my_module:make", None, None, key).model.name == "gru_reset_before"
    assert loading.load("my_module:nets.small", None, None, key).model is my_module.nets.small
    assert loading.build("my_module:step", my_module.step) is my_module.step
    params = loading.load("my_module:pair", None, None, key).params
    np.testing.assert_array_equal(params.w_ih, my_module.cell.init(jax.random.key(7)).w_ih)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("my_modul:cell", "did you mean 'my_module'"),
        ("my_module:cel", "did you mean 'cell'"),
        ("my_module:nets.smal", "my_module:nets has no attribute 'smal'; did you mean 'small'"),
        ("my_module", "expected MODULE:ATTRIBUTE"),
        ("my_module.py", "e.g. my_module:cell"),
        ("my_module.py:cell", "did you mean 'my_module:cell'"),
        ("Torch", "did you mean 'torch'"),
        ("torch", "--weights"),
        ("rnngrad.cels:lstm", "did you mean 'rnngrad.cells'"),
        ("fails:cell", "imports 'my_modul', which is not installed"),
        ("raises:cell", "RuntimeError: not today"),
        ("leaves:cell", "module 'leaves' fails on import: SystemExit: 0"),
        ("my_module:leaves", "calling my_module:leaves fails: SystemExit: 0"),
        ("my_module:broken", "calling my_module:broken fails: KeyError: 'no such layer'"),
        ("my_module:Net", "asks for width"),
    ],
)
def test_a_mistyped_or_broken_module_in_one_line(capsys, here, target, said):
    assert said in _error(capsys, "init-report", target, "--random-input", "9")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("diagonse",), "did you mean 'diagnose'"),
        (("xyzzy",), "expected one of: diagnose"),
        (("diagnose", "my_module:cell"), "--random-input 200,8"),
        (("diagnose", "my_module:cell", "--random-input", "0"), "expected T or T,B"),
        (("diagnose", "my_module:cell", "--input", "batch.npz"), "did you mean batch.npy"),
        (("diagnose", "my_module:cell", "--input", "objects.npy"), "objects.npy"),
        (("diagnose", "my_module:cell", "--input", "several.npz"), "one called xs"),
        (("diagnose", "my_module:cell", "--input", "batch.npy", "--html", "far/away.html"), "no folder far"),
        (("diagnose", "my_module:cell", "--input", "batch.npy", "--figure", "o.png2"), "expected .png, .pdf, .svg"),
        (("diagnose", "my_module:cell", "--input", "batch.npy", "--loss", "my_module:los"), "no attribute 'los'"),
        (("diagnose", "my_module:cell", "--input", "batch.npy", "--part", "a"), "--weights"),
        (("diagnose", "my_module:cell", "--input", "batch.npy", "--weights", "spoilt.npz"), "missing: b"),
        (("diagnose", "my_module:cell", "--input", "wide.npy"), "expected 3 features"),
        (("init-report", "my_module:step", "--random-input", "9"), "give --input FILE"),
    ],
)
def test_mistakes_in_one_line(capsys, here, words, said):
    np.save("batch.npy", np.ones((4, D), np.float32))
    np.save("wide.npy", np.ones((4, D + 1), np.float32))
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez("several.npz", a=np.ones(2), b=np.ones(2))
    np.savez("spoilt.npz", w_ih=np.ones((4 * N, D), np.float32), w_hh=np.ones((4 * N, N), np.float32))
    assert said in _error(capsys, *words)


def test_traceback_on_demand(capsys, here):
    assert main(["init-report", "my_module:broken", "--random-input", "9", "--traceback"]) == 2
    assert "in broken" in capsys.readouterr().err


def test_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "rnngrad.cli.commands")
    monkeypatch.delattr("rnngrad.cli.commands")
    assert 'needs tyro: pip install "rnngrad[cli]"' in _error(capsys, "cells")


@pytest.mark.parametrize("command", commands._COMMANDS)
def test_help_has_an_example_and_a_line_per_option(capsys, command):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"Example: rnngrad {command}" in said
    fields = commands._COMMANDS[command].__dataclass_fields__
    for name in fields:
        assert "MODULE:ATTRIBUTE" in said if name == "model" else f"--{name.replace('_', '-')}" in said
    assert main([]) == 2
    assert "diagnose" in capsys.readouterr().out


# --- init-report -----------------------------------------------------------------------------------------------------


def _plain(report):
    return json.loads(json.dumps(commands.plain(report)))


def test_init_report_is_the_library_s(capsys, here):
    """On weights from a file, of a batch its first sequence; JSON, table, and another axis of time."""
    cell = loading.resolve("my_module:cell")
    params, xs = _weights(cell, 3), jax.random.normal(jax.random.key(2), (12, 2, D))
    np.savez("w.npz", **_named(params))
    np.save("xs.npy", xs)
    np.save("xs_batch_first.npy", xs.swapaxes(0, 1))
    expected = rg.init_report(cell, params, xs[:, 0])
    words = ("init-report", "my_module:cell", "--weights", "w.npz", "--input")
    (found,) = _json(capsys, *words, "xs.npy")["passes"]
    assert found == {"name": "", **_plain(expected)}
    (again,) = _json(capsys, *words, "xs_batch_first.npy", "--time-axis", "1")["passes"]
    assert again == found
    assert main([*words, "xs.npy"]) == 0
    assert expected.table() in capsys.readouterr().out

    # fresh weights follow the seed
    fresh = ("init-report", "my_module:cell", "--random-input", "12", "--seed")
    first, again, other = (_json(capsys, *fresh, seed) for seed in "112")
    assert first == again != other


# --- diagnose --------------------------------------------------------------------------------------------------------


def _their_modules(here):
    """A module of each library, its weights, and the same weights by name in files."""
    (here / "theirs.py").write_text(
        textwrap.dedent(f"""
        import equinox as eqx, flax.linen as nn, jax, jax.numpy as jnp
        from flax import nnx

        flax_nnx = nnx.RNN(nnx.LSTMCell({D}, {N}, rngs=nnx.Rngs(0)))
        flax_linen = nn.GRUCell({N})
        pair = lambda: (flax_linen, flax_linen.init(jax.random.key(0), jnp.zeros({N}), jnp.zeros({D})))
        equinox = [eqx.nn.GRUCell({D}, {N}, key=jax.random.key(0)), eqx.nn.LSTMCell({N}, 4, key=jax.random.key(1))]
        zeros = lambda: {{"h": jnp.zeros({N})}}


        def step(params, state, x):
            z = preactivations(params, state, x)
            return {{"h": state["h"] + params["cell"]["rate"] * jnp.tanh(z)}}


        def preactivations(params, state, x):
            return params["cell"]["u"] @ state["h"] + params["cell"]["w"] @ x


        def loss(outputs):
            return jnp.sum(outputs[-1] ** 2)
        """)
    )


@pytest.fixture
def theirs(here):
    _their_modules(here)
    yield
    sys.modules.pop("theirs", None)


def _loaded(word, weights, key=0):
    np.savez("w.npz", **weights)
    return loading.load(f"theirs:{word}", Path("w.npz"), None, jax.random.key(key))


def _drawn(shapes):
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {name: np.asarray(jax.random.normal(key, shapes[name])) for key, name in zip(keys, shapes, strict=True)}


def test_weights_of_flax_nnx_by_name(theirs):
    from flax import nnx

    names = {"cell." + part: shape for gate in "ifgo" for part, shape in (
        (f"i{gate}{'_' if gate == 'f' else ''}.kernel", (D, N)), (f"h{gate}.kernel", (N, N)), (f"h{gate}.bias", (N,)),
    )}  # fmt: skip
    weights = _drawn(names)
    model, params = _loaded("flax_nnx", weights)
    assert params is None
    np.testing.assert_array_equal(model.cell.hf.kernel[...], weights["cell.hf.kernel"])
    assert isinstance(model, nnx.RNN)
    # the user's own object stays as it was
    assert np.any(sys.modules["theirs"].flax_nnx.cell.hf.kernel[...] != weights["cell.hf.kernel"])
    with pytest.raises(loading.UserError, match=r"missing: cell\.hf\.kernel \(nearest: cell\.hf\.kernl\)"):
        _loaded("flax_nnx", {name.replace("hf.kernel", "hf.kernl"): leaf for name, leaf in weights.items()})


def test_weights_of_a_whole_nnx_module_as_orbax_writes_them(theirs):
    import orbax.checkpoint as ocp
    from flax import nnx

    model = loading.resolve("theirs:flax_nnx")
    doubled = jax.tree.map(lambda leaf: 2 * leaf, nnx.state(model, nnx.Param))
    state = nnx.merge_state(nnx.state(model), doubled)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path.cwd() / "saved", nnx.to_pure_dict(state))
    found = loading.load("theirs:flax_nnx", Path("saved"), None, jax.random.key(0)).model
    np.testing.assert_array_equal(found.cell.hf.kernel[...], 2 * model.cell.hf.kernel[...])
    values = {f"{name}.value": leaf for name, leaf in loading.interop.read_weights(Path("saved")).items()}
    again, _ = _loaded("flax_nnx", values)
    np.testing.assert_array_equal(again.cell.hf.kernel[...], found.cell.hf.kernel[...])


def test_weights_of_equinox_by_name(theirs):
    shapes = {f"{i}.{name}": shape for i, d, n, k in ((0, D, N, 3), (1, N, 4, 4)) for name, shape in (
        ("weight_ih", (k * n, d)), ("weight_hh", (k * n, n)), ("bias", (k * n,)),
    )} | {"0.bias_n": (N,)}  # fmt: skip
    weights = _drawn(shapes)
    model, params = _loaded("equinox", weights)
    assert params is None
    np.testing.assert_array_equal(model[1].weight_hh, weights["1.weight_hh"])
    np.testing.assert_array_equal(model[0].bias_n, weights["0.bias_n"])


def test_weights_of_flax_linen_and_of_a_step_function_make_their_own_structure(theirs):
    weights = {"params.hn.kernel": np.ones((N, N), np.float32)}
    assert _loaded("flax_linen", weights).params["params"]["hn"]["kernel"].shape == (N, N)
    assert _loaded("step", {"cell/u": np.ones((N, N))}).params["cell"]["u"].shape == (N, N)


def test_json_is_pure_also_when_a_module_prints(capsys, here):
    assert main(["init-report", "--json", "loud:cell", "--random-input", "4"]) == 0
    said = capsys.readouterr()
    assert said.err == "loading\n"
    assert json.loads(said.out)["source"] == "lstm"


def test_torch_names_fill_a_cell_of_ours(here):
    shapes = {"weight_ih_l0": (4 * N, D), "weight_hh_l0": (4 * N, N), "bias_ih_l0": (4 * N,), "bias_hh_l0": (4 * N,)}
    weights = _drawn(shapes)
    np.savez("w.npz", **{f"encoder.rnn.{name}": leaf for name, leaf in weights.items()}, other=np.ones(2))
    key = jax.random.key(0)
    found = loading.load("my_module:cell", Path("w.npz"), "encoder.rnn", key).params
    np.testing.assert_array_equal(found.w_hh, weights["weight_hh_l0"])  # Torch has our order, i f g o
    np.testing.assert_array_equal(found.b, weights["bias_ih_l0"] + weights["bias_hh_l0"])
    # whatever else the part holds, it is Torch's names that say so; and the weights of another cell are not taken
    np.savez("other.npz", embedding=np.ones(2), **weights)
    with pytest.raises(loading.UserError, match="expected those of 'gru_reset_before', found torch"):
        loading.load("my_module:make", Path("other.npz"), None, key)
    adapted = loading.load("torch", Path("w.npz"), "encoder.rnn", key).model
    np.testing.assert_array_equal(adapted.cell_params.b, found.b)


def test_diagnose_is_the_library_s(capsys, here):
    """JSON, table, page and figure, from files, with another axis of time."""
    cell = loading.resolve("my_module:cell")
    params, xs = _weights(cell, 3), jax.random.normal(jax.random.key(2), (9, 2, D))
    np.savez("w.npz", **_named(params))
    np.save("xs.npy", xs.swapaxes(0, 1))
    expected = rg.diagnose(cell, params, xs, key=jax.random.key(4))
    words = ("diagnose", "my_module:cell", "--weights", "w.npz", "--input", "xs.npy", "--time-axis", "1", "--seed", "4")
    assert _json(capsys, *words, "--html", "out.html", "--figure", "out.png") == json.loads(expected.to_json())
    assert "<table" in Path("out.html").read_text(encoding="utf-8")
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--html", "out.html"]) == 0
    assert capsys.readouterr().out == expected.table() + "wrote out.html\n"


@pytest.mark.slow
def test_diagnose_takes_a_step_function_with_state_gates_and_loss(capsys, theirs):
    weights = _drawn({"cell.u": (N, N), "cell.w": (N, D), "cell.rate": ()})
    xs = jax.random.normal(jax.random.key(2), (9, 2, D))
    np.savez("w.npz", **weights)
    np.save("xs.npy", xs)
    words = ("diagnose", "theirs:step", "--weights", "w.npz", "--input", "xs.npy", "--state", "theirs:zeros",
             "--gates", "theirs:preactivations", "--loss", "theirs:loss", "--method", "exact")  # fmt: skip
    found = _json(capsys, *words)
    mine = sys.modules["theirs"]
    expected = rg.diagnose(
        mine.step, loading.nest(weights), xs, mine.loss, state=mine.zeros(), gates=mine.preactivations, method="exact"
    )
    assert found == json.loads(expected.to_json())


@pytest.mark.slow
@pytest.mark.parametrize("word", ["flax_nnx", "equinox", "pair"])
def test_diagnose_takes_models_of_other_libraries(capsys, theirs, word):
    (layer, *_) = _json(capsys, "diagnose", f"theirs:{word}", "--random-input", "9,2")["layers"]
    assert layer["cell"] == {"flax_nnx": "lstm", "equinox": "gru_reset_after", "pair": "gru_reset_after"}[word]
