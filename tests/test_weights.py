"""Weight files: what is read, what is refused, and that Torch's and Keras's layers compute the same with our cells.

Outputs and gradients come from stored fixtures (``fixtures/make_torch.py`` in float64, ``fixtures/make_keras.py`` in
float32).  Differences are relative to the largest entry of an array.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile

import flax.linen
import flax.traverse_util
import h5py
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

import rnngrad as rg
from rnngrad.interop.adapted import run
from rnngrad.interop.files import read_keras_config, read_weights
from rnngrad.interop.keras import from_keras
from rnngrad.interop.torch import as_numpy, from_torch

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# float64: looser than the 50 ε of test_peers, since transcendental functions came from other mathematics libraries;
# float32: those 50 ε, which are there derived for 18 steps: six layers of 7 steps each are as many, one after the other
TOLERANCE = {"float64": 1e-12, "float32": 50 * float(np.finfo(np.float32).eps)}


@functools.cache
def _stored(file):
    with np.load(FIXTURES / file) as stored:
        return {key: stored[key] for key in stored.files}


def _of(file, model):
    return {key.removeprefix(f"{model}/"): array for key, array in _stored(file).items() if key.startswith(f"{model}/")}


def _assert_close(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert np.abs(array).max() > 0, f"{name}: nothing to compare"
        assert found[name].dtype == array.dtype
        atol = TOLERANCE[array.dtype.name] * np.abs(array).max()
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


# --- Torch -----------------------------------------------------------------------------------------------------------

TORCH = {
    "lstm": ("torch.nn.LSTM(3, 4)", {}),
    "lstm_two_layers": ("torch.nn.LSTM(3, 4, num_layers=2)", {}),
    "gru": ("torch.nn.GRU(3, 4)", {}),
    "rnn_tanh": ("torch.nn.RNN(3, 4)", {}),
    "rnn_relu": ("torch.nn.RNN(3, 4)", {"activation": "relu"}),
    "lstm_both_ways": ("torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)", {}),
    "gru_both_ways": ("torch.nn.GRU(3, 4, bidirectional=True)", {}),
    "gru_no_bias": ("torch.nn.GRU(3, 4, num_layers=2)", {}),
    "lstm_cell": ("torch.nn.LSTMCell(3, 4)", {}),
    "gru_cell": ("torch.nn.GRUCell(3, 4)", {}),
    "rnn_cell": ("torch.nn.RNNCell(3, 4)", {"activation": "relu"}),
}
NOT_WEIGHTS = ("xs", "h_0", "c_0")


def _torch_weights(layer, prefix=""):
    stored = _of("torch.npz", layer)
    names = [key.removeprefix("grad_") for key in stored if key.startswith("grad_")]
    return {prefix + name: stored[name] for name in names if name not in NOT_WEIGHTS}


def _run_from(model, params, inputs):
    """Returns the outputs from Torch's initial states, which ``run`` does not take."""
    xs = inputs["xs"]
    h_0, c_0 = (jnp.reshape(inputs[key], (-1, *xs.shape[1:2], 4)) if key in inputs else None for key in NOT_WEIGHTS[1:])
    index = 0
    for layer, layer_params in zip(model.layers, params, strict=True):
        outputs = []
        for one, weights in zip(layer, layer_params, strict=True):
            empty = one.cell.init_state((xs.shape[1],))
            each = empty if hasattr(empty, "layer_0") else (empty,)
            filled = []
            for part in each:
                fields = {"h": h_0[index]} | ({"c": c_0[index]} if "c" in part._fields else {})
                filled.append(part._replace(**fields))
                index += 1
            state = type(empty)(*filled) if hasattr(empty, "layer_0") else filled[0]
            states = rg.unroll(one.cell, weights, state, jnp.flip(xs, 0) if one.reverse else xs).states
            y = getattr(states, f"layer_{len(each) - 1}", states).h
            outputs.append(jnp.flip(y, 0) if one.reverse else y)
        xs = jnp.concatenate(outputs, axis=-1)
    assert index == len(h_0)
    return xs


@pytest.mark.parametrize("layer", TORCH)
def test_outputs_and_gradients_equal_torch(layer, x64):
    source, options = TORCH[layer]
    stored = _of("torch.npz", layer)
    # what does not belong to the module is in its state dict as well
    others = {"decoder.weight": np.ones((2, 4)), "norm.num_batches_tracked": np.array(3)}
    prefix = "encoder.rnn."
    model = from_torch(_torch_weights(layer, prefix) | others, **options)
    assert model.source == f"{source} 'encoder.rnn'"
    assert all(one.has_split for one in model.passes)

    def loss(weights, inputs):
        outputs = _run_from(model, model.convert(weights), inputs)
        return jnp.sum(stored["readout"] * outputs), outputs

    weights = jax.tree.map(jnp.asarray, _torch_weights(layer, prefix))
    inputs = {key: jnp.asarray(stored[key]) for key in NOT_WEIGHTS if key in stored}
    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, outputs), (grads, grad_inputs) = differentiate(weights, inputs)
    _assert_close({"outputs": outputs}, {"outputs": stored["outputs"]})
    _assert_close(grads, {prefix + name: stored[f"grad_{name}"] for name in _torch_weights(layer)})
    _assert_close(grad_inputs, {name: stored[f"grad_{name}"] for name in inputs})
    jax.tree.map(np.testing.assert_array_equal, model.params, model.convert(weights))


class _Tensor:
    """What a Torch tensor that requires a gradient lets one do."""

    def __init__(self, array, dtype="torch.float32", *, at="cuda"):
        self._array, self.dtype, self.shape, self._at = array, dtype, array.shape, at

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def detach(self):
        return _Tensor(self._array, self.dtype, at=self._at)

    def cpu(self):
        return _Tensor(self._array, self.dtype, at="cpu")

    def float(self):
        return _Tensor(self._array.astype(np.float32), at=self._at)

    def numpy(self):
        if self._at != "cpu" or self.dtype == "torch.bfloat16":
            raise TypeError(f"can't convert {self._at} {self.dtype}")
        return self._array


@pytest.mark.parametrize(("dtype", "ours"), [("torch.float32", np.float32), ("torch.bfloat16", ml_dtypes.bfloat16)])
def test_tensors_are_taken_without_torch(dtype, ours):
    arrays = {name: array.astype(ours) for name, array in _torch_weights("gru").items()}
    model = from_torch({name: _Tensor(array, dtype) for name, array in arrays.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(ours)}
    jax.tree.map(np.testing.assert_array_equal, model.params, from_torch(arrays).params)
    np.testing.assert_array_equal(as_numpy(_Tensor(arrays["weight_hh_l0"], dtype)), arrays["weight_hh_l0"])


def test_dtype_is_kept_or_chosen():
    weights = _torch_weights("lstm")
    dtypes = lambda model: {leaf.dtype.name for leaf in jax.tree.leaves((model.params, model.cell.init_state()))}
    assert dtypes(from_torch(weights)) == {"float32"}  # float64 is not enabled here
    assert dtypes(from_torch(weights, dtype=jnp.bfloat16)) == {"bfloat16"}
    mixed = weights | {"weight_hh_l0": weights["weight_hh_l0"].astype(np.float16)}
    with pytest.raises(ValueError, match="expected one dtype, found weight_ih_l0 float64, weight_hh_l0 float16"):
        from_torch(mixed)
    assert dtypes(from_torch(mixed, dtype="float32")) == {"float32"}


def _without(weights, *names):
    return {name: array for name, array in weights.items() if name not in names}


BOTH = _torch_weights("lstm", "encoder.lstm.") | _torch_weights("gru", "decoder.gru.")
BAD_TORCH = {
    "several": (BOTH, {}, "found 'encoder.lstm', 'decoder.gru'; choose by prefix="),
    "mistyped": (BOTH, {"prefix": "encodr.lstm"}, "found 'encodr.lstm'; did you mean 'encoder.lstm'"),
    "none": ({"fc.weight": np.ones((2, 2))}, {}, r"expected the weights of an LSTM, GRU or RNN .*found fc.weight"),
    "nothing": ({}, {}, "found nothing"),
    "projection": (
        _torch_weights("lstm") | {"weight_hr_l0": np.ones((2, 4))},
        {},
        "without proj_size, found weight_hr_l0",
    ),
    "missing": (_without(_torch_weights("lstm"), "bias_hh_l0"), {}, "expected also bias_hh_l0"),
    "missing layer": (
        _without(_torch_weights("lstm_two_layers"), "weight_hh_l0"),
        {},
        "expected also weight_hh_l0",
    ),
    "missing direction": (
        _without(_torch_weights("gru_both_ways"), "weight_ih_l0_reverse"),
        {},
        "expected also weight_ih_l0_reverse",
    ),
    "rows": ({"weight_ih_l0": np.ones((8, 3)), "weight_hh_l0": np.ones((8, 4))}, {}, r"\(4N, N\).*found \(8, 4\)"),
    # a depth is taken from a name: nothing of its size may be made before it is checked
    "deep": (_torch_weights("gru") | {"weight_hh_l9999": np.ones((12, 4))}, {}, r"expected also .* more beside"),
    "deeper": (
        _torch_weights("gru") | {"weight_hh_l999999999999": np.ones((12, 4))},
        {},
        "expected weight_hh_l0, .*found weight_hh_l0, weight_hh_l999999999999",
    ),
    "digits": (
        _torch_weights("gru") | {"weight_hh_l" + "9" * 5000: np.ones((12, 4))},
        {},
        "found weight_hh_l0, weight_hh_l9999",
    ),
    "raw": (_torch_weights("gru_cell") | {"weight_hh_raw": np.ones((12, 4))}, {}, "found weight_hh, weight_hh_raw"),
    "cell and layer": (
        _torch_weights("gru_cell") | {"weight_hh_l0": np.ones((12, 4))},
        {},
        "or weight_hh alone, .*found weight_hh, weight_hh_l0",
    ),
    "shape": (
        _torch_weights("gru") | {"bias_hh_l0": np.ones(11)},
        {},
        r"bias_hh_l0: expected shape \(12,\), found \(11,\)",
    ),
    "integers": (
        {name: array.astype(int) for name, array in _torch_weights("gru").items()},
        {},
        "weight_ih_l0: expected real numbers, found dtype int64",
    ),
    "activation": (
        _torch_weights("gru"),
        {"activation": "relu"},
        "activation='relu' is for an RNN, found a module of kind GRU",
    ),
    "unknown activation": (_torch_weights("rnn_tanh"), {"activation": "selu"}, "unknown activation 'selu'"),
}


@pytest.mark.parametrize("case", BAD_TORCH)
def test_torch_weights_that_do_not_fit(case):
    weights, options, message = BAD_TORCH[case]
    with pytest.raises(ValueError, match=message):
        from_torch(weights, **options)


def test_prefix_chooses_a_module():
    for prefix in ("decoder.gru", "decoder.gru."):
        assert from_torch(BOTH, prefix=prefix).source == "torch.nn.GRU(3, 4) 'decoder.gru'"
    model = from_torch(BOTH, prefix="encoder.lstm")
    with pytest.raises(ValueError, match=r"found no encoder.lstm.weight_ih_l0"):
        model.convert(_torch_weights("lstm"))


# --- Keras -----------------------------------------------------------------------------------------------------------

KERAS = {
    "keras_stack.keras": "keras.Bidirectional(LSTM(4)) > GRU(5) > GRU(4) > SimpleRNN(3) > LSTM(2), GRU(3)",
    "keras_line.keras": "keras.LSTM(4) > LSTM(3)",
    "keras_alone.weights.h5": "keras.Bidirectional(GRU(4))",
    "keras_legacy.h5": "keras.SimpleRNN(5) > GRU(4)",
}


@pytest.mark.parametrize("file", KERAS)
def test_outputs_and_gradients_equal_keras(file):
    stored = _of("keras.npz", file)
    model = from_keras(FIXTURES / file)
    assert model.source == KERAS[file]
    weights = {
        name: jnp.asarray(array)
        for name, array in read_weights(FIXTURES / file).items()
        if jnp.issubdtype(array.dtype, jnp.floating)
    }

    def loss(weights, xs):
        params = model.convert(weights)
        outputs = jax.vmap(lambda xs: run(model, params, xs)[0], in_axes=1, out_axes=1)(xs)
        # a layer that goes backward hands its outputs on in that order
        outputs = jnp.flip(outputs, 0) if "stack" in file else outputs
        return jnp.sum(stored["readout"] * outputs), outputs

    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, outputs), (grads, grad_xs) = differentiate(weights, jnp.asarray(stored["xs"]))
    _assert_close({"outputs": outputs, "xs": grad_xs}, {"outputs": stored["outputs"], "xs": stored["grad_xs"]})
    expected = {name.removeprefix("grad/"): array for name, array in stored.items() if name.startswith("grad/")}
    # the read-out is no part of it
    assert not any(np.any(grads[name]) for name in set(grads) - set(expected))
    _assert_close({name: grads[name] for name in expected}, expected)


def test_passes_of_a_keras_stack():
    model = from_keras(FIXTURES / "keras_stack.keras")
    assert [(one.name, one.cell.name, one.reverse) for one in model.passes] == [
        ("layer_0.forward", "lstm", False),
        ("layer_0.backward", "lstm", True),
        ("layer_1", "gru_reset_after", False),
        ("layer_2", "gru_reset_before", False),
        ("layer_3", "vanilla", True),
        ("layer_4", "lstm", True),
        ("layer_5", "gru_reset_after", True),
    ]
    assert from_keras(FIXTURES / "keras_stack.keras", layers=["before"]).cell.name == "gru_reset_before"


def test_weights_alone_need_the_order_of_layers():
    weights = read_weights(FIXTURES / "keras_line.keras")
    with pytest.raises(ValueError, match=r"layers= in their order.*found 'layers.lstm.cell', 'layers.lstm_1.cell'"):
        from_keras(weights)
    with pytest.raises(ValueError, match=r"'layers.lstm.cell': expected an input of size 4, .* found 3; choose"):
        from_keras(weights, layers=["layers.lstm", "layers.lstm"])
    model = from_keras(weights, layers=["layers.lstm", "layers.lstm_1"])
    described = from_keras(FIXTURES / "keras_line.keras")
    jax.tree.map(
        np.testing.assert_array_equal, tuple(jax.tree.leaves(model.params)), tuple(jax.tree.leaves(described.params))
    )
    relu = {"a.kernel:0": np.ones((3, 4)), "a.recurrent_kernel:0": np.ones((4, 4))}
    x = jnp.full((1, 3), -1.0, jnp.float32)
    outputs = [run(model, model.params, x)[0] for model in (from_keras(relu, activation="relu"), from_keras(relu))]
    assert outputs[0].max() == 0 > outputs[1].max()


def _edited(tmp_path, file, edit):
    """Returns the fixture with another description."""
    path = tmp_path / file
    with zipfile.ZipFile(FIXTURES / file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                config = json.loads(data)
                edit(config["config"]["layers"])
                data = json.dumps(config).encode()
            new.writestr(name, data)
    return path


def _set(index, **options):
    return lambda layers: layers[index]["config"].update(options)


BAD_KERAS = {
    "activation": (_set(2, activation="relu"), "'after': expected activation of its GRU to be tanh, found 'relu'"),
    "own activation": (
        _set(2, activation={"class_name": "function", "registered_name": "mine>swish"}),
        "found 'mine>swish'",
    ),
    "gate": (
        _set(2, recurrent_activation="hard_sigmoid"),
        "recurrent_activation of its GRU to be sigmoid, found 'hard",
    ),
    "merge": (_set(1, merge_mode="sum"), "expected merge_mode 'concat', found 'sum'"),
    "variant": (_set(2, reset_after=False), "expected a bias of one row for reset_after=False, found shape"),
    "between": (
        lambda layers: layers[3].update(class_name="LayerNormalization"),
        r"one above the other, found 'dropout' \(LayerNormalization\) between",
    ),
    "class": (
        lambda layers: layers[2].update(class_name="LSTM"),
        r"'after': expected the weights of 1 cells under layers.lstm or model_weights.after or after, found layers.bid",
    ),
}


@pytest.mark.parametrize("case", BAD_KERAS)
def test_keras_options_that_have_no_counterpart(case, tmp_path):
    edit, message = BAD_KERAS[case]
    with pytest.raises(ValueError, match=message):
        from_keras(_edited(tmp_path, "keras_stack.keras", edit))


def _nested(config):
    for _ in range(5_000):
        config = {"class_name": "Sequential", "config": {"layers": [config]}}
    return config


def _sequential(*layers):
    return lambda config: {"class_name": "Sequential", "config": {"layers": layers}}


DAMAGED_KERAS = {
    "no layers": (lambda config: {"class_name": "Sequential", "config": {}}, "KeyError 'layers'"),
    "null": (lambda config: {"class_name": "Sequential", "config": None}, "TypeError"),
    "text": (_sequential("a"), "TypeError"),
    "layer without options": (_sequential({"class_name": "LSTM"}), "KeyError 'config'"),
    "layer of two classes": (_sequential({"class_name": ["LSTM"], "config": {}}), "TypeError"),
    "layer of options in a row": (_sequential({"class_name": "LSTM", "config": []}), "AttributeError"),
    "model of two classes": (lambda config: config | {"class_name": ["Sequential"]}, "TypeError"),
    "no cell": (_sequential({"class_name": "RNN", "config": {"name": "rnn"}}), "KeyError 'cell'"),
    "no history": (
        lambda config: {
            "class_name": "Functional",
            "config": {
                "layers": [
                    {"class_name": "LSTM", "name": name, "config": {}, "inbound_nodes": [{"keras_history": []}]}
                    for name in "ab"
                ]
            },
        },
        "IndexError",
    ),
    "deep": (_nested, "RecursionError"),
}


@pytest.mark.parametrize("case", DAMAGED_KERAS)
def test_damaged_keras_descriptions(case, monkeypatch):
    describe, found = DAMAGED_KERAS[case]
    message = "from_keras: expected Keras's description of a model, found a damaged one: " + found
    path = FIXTURES / "keras_stack.keras"
    config = describe(read_keras_config(path))
    monkeypatch.setattr("rnngrad.interop.keras.read_keras_config", lambda source: config)
    with pytest.raises(ValueError, match=message):
        from_keras(path)


def test_keras_graphs_with_branches(tmp_path):
    def branch(layers):
        """Both hear the input."""
        layers[2]["inbound_nodes"] = layers[1]["inbound_nodes"]

    path = _edited(tmp_path, "keras_line.keras", branch)
    with pytest.raises(ValueError, match="expected one line of layers, found branches around 'lower', 'upper'"):
        from_keras(path)
    assert from_keras(path, layers=["upper"]).source == "keras.LSTM(3)"
    with pytest.raises(ValueError, match="expected layers to be among 'lower', 'upper', found 'uper'"):
        from_keras(path, layers=["uper"])


def test_keras_weights_that_are_none():
    with pytest.raises(ValueError, match=r"expected the weights of an LSTM, GRU or SimpleRNN, found dense.vars.0"):
        from_keras({"dense.vars.0": np.ones((3, 4)), "dense.vars.1": np.ones(4)})
    with pytest.raises(ValueError, match="does not tell whether reset_after is set"):
        from_keras({"gru.kernel": np.ones((3, 12)), "gru.recurrent_kernel": np.ones((4, 12))})
    with pytest.raises(ValueError, match="expected no activation"):
        from_keras(FIXTURES / "keras_legacy.h5", activation="relu")


# --- files that are read ---------------------------------------------------------------------------------------------

TREE = {
    "params": {"cell": {"hf": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}},
    "half": np.array([0.1, np.nan, 3], ml_dtypes.bfloat16),
    "step": np.array(3),
}
NAMES = {"params.cell.hf.kernel": TREE["params"]["cell"]["hf"]["kernel"], "half": TREE["half"], "step": TREE["step"]}


def _assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name  # NaN as well


def _write_hdf5(path, arrays):
    with h5py.File(path, "w") as root:
        for name, array in arrays.items():
            root.create_dataset(name.replace(".", "/"), data=array, compression="gzip" if array.ndim else None)


def _write_safetensors(path, arrays):
    """By hand: the package's own writer knows no bfloat16 of NumPy's."""
    header, data = {}, b""
    for name, array in arrays.items():
        kind = {"bfloat16": "BF16", "float32": "F32", "int64": "I64"}[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


WITHOUT_HALF = {name: array for name, array in NAMES.items() if name != "half"}
WRITERS = {
    "w.safetensors": (_write_safetensors, NAMES),
    "w.npz": (lambda path, arrays: np.savez(path, **arrays), WITHOUT_HALF),
    "w_deflated.npz": (lambda path, arrays: np.savez_compressed(path, **arrays), WITHOUT_HALF),
    "w.npy": (lambda path, arrays: np.save(path, np.asfortranarray(arrays[""])), {"": np.arange(6.0).reshape(2, 3)}),
    "w.weights.h5": (_write_hdf5, WITHOUT_HALF),
    "w.msgpack": (lambda path, _: path.write_bytes(serialization.to_bytes(TREE)), NAMES),
    "checkpoint_3": (lambda path, _: path.write_bytes(serialization.to_bytes(TREE)), NAMES),
}


@pytest.mark.parametrize("file", WRITERS)
def test_arrays_come_back(file, tmp_path):
    write, arrays = WRITERS[file]
    write(tmp_path / file, arrays)
    _assert_same(read_weights(tmp_path / file), arrays)
    _assert_same(read_weights(str(tmp_path / file)), arrays)
    most = sum(array.nbytes for array in arrays.values()) - 1
    with pytest.raises(ValueError, match=r"expected at most max_bytes = \d+ bytes of arrays, found"):
        read_weights(tmp_path / file, max_bytes=most)


@pytest.fixture(scope="module")
def orbax_folder(tmp_path_factory):
    """A checkpoint as orbax writes it, and one as its manager does, in one folder."""
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("orbax")
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(folder / "10" / "default", TREE | {"list": [np.ones(2), {"a": np.zeros(3)}]})
    return folder


def test_orbax_checkpoints(orbax_folder):
    expected = NAMES | {"list.0": np.ones(2), "list.1.a": np.zeros(3)}
    for path in (orbax_folder / "10", orbax_folder / "10" / "default"):
        _assert_same(read_weights(path), expected)
    with pytest.raises(ValueError, match="expected one checkpoint, found the steps 10; name one"):
        read_weights(orbax_folder)
    with pytest.raises(ValueError, match="expected at most max_bytes = 30 bytes"):
        read_weights(orbax_folder / "10", max_bytes=30)


def test_a_flax_checkpoint_is_nested_again(tmp_path):
    cell = flax.linen.LSTMCell(4)
    params = cell.init(jax.random.key(1), (jnp.zeros(4), jnp.zeros(4)), jnp.ones(3))
    (tmp_path / "w.msgpack").write_bytes(serialization.to_bytes(params))
    found = flax.traverse_util.unflatten_dict(read_weights(tmp_path / "w.msgpack"), sep=".")
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_keras_descriptions():
    assert read_keras_config(FIXTURES / "keras_line.keras")["class_name"] == "Functional"
    assert read_keras_config(FIXTURES / "keras_legacy.h5")["class_name"] == "Sequential"
    assert read_keras_config(FIXTURES / "keras_alone.weights.h5") is None
    with pytest.raises(ValueError, match="max_bytes = 20"):
        read_keras_config(FIXTURES / "keras_line.keras", max_bytes=20)
    with pytest.raises(ValueError, match="max_bytes = 10"):
        read_keras_config(FIXTURES / "keras_legacy.h5", max_bytes=10)


# --- files that are refused ------------------------------------------------------------------------------------------


@pytest.fixture
def frugal():
    """Fails when the test takes more than 16 MB in one go: the announced sizes are far above, the files far below."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def _torch_archive(path, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", payload)
        archive.writestr("model/data/0", b"\0" * 16)


PICKLES = {
    "w.pt": lambda path, payload: path.write_bytes(payload),
    "w.pth": _torch_archive,
    "pytorch_model.bin": _torch_archive,
    "w.ckpt": _torch_archive,
    "w.pkl": lambda path, payload: path.write_bytes(payload),
    "text.pkl": lambda path, payload: path.write_bytes(pickle.dumps(pickle.loads, protocol=0)),
    "w.safetensors": lambda path, payload: path.write_bytes(payload),
    "w.npz": _torch_archive,
    "w.keras": _torch_archive,
    "w.msgpack": lambda path, payload: path.write_bytes(payload),
    "w": lambda path, payload: path.write_bytes(payload),
}


@pytest.mark.parametrize("file", PICKLES)
def test_pickles_are_refused_and_not_run(file, tmp_path):
    ran = tmp_path / "ran"
    PICKLES[file](tmp_path / file, pickle.dumps(_Payload(ran)))
    with pytest.raises(ValueError, match="found a pickle, which is a program; it was not opened") as caught:
        read_weights(tmp_path / file)
    assert not ran.exists()
    *_, load, save = str(caught.value).splitlines()
    assert (".load(" in load, "save_file(" in save) == (True, True)
    compile(f"{load.strip()}\n{save.strip()}", "message", "exec")
    # the payload would have run
    pickle.loads(pickle.dumps(_Payload(ran)))
    assert ran.exists()


def test_lines_of_the_refusal_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {"a": np.arange(3.0)}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(weights))
    with pytest.raises(ValueError, match="pickle") as caught:
        read_weights("w.pkl")
    *_, load, save = str(caught.value).splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a line to paste leaves its file to the collector
        exec(f"{load.strip()}\n{save.strip()}", {"pickle": pickle, "safetensors": safetensors})
    _assert_same(read_weights("w.safetensors"), weights)


@pytest.mark.parametrize("file", ["w.npy", "w.npz"])
def test_pickled_objects_in_arrays_are_refused(file, tmp_path):
    ran = tmp_path / "ran"
    objects = np.array([_Payload(ran)], dtype=object)
    np.savez(tmp_path / file, a=objects) if file == "w.npz" else np.save(tmp_path / file, objects)
    with pytest.raises(ValueError, match="expected numbers, found dtype object"):
        read_weights(tmp_path / file)
    assert not ran.exists()


def _npy(shape, data=b"", descr="<f4"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


def _zip(path, members, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names given twice
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, data in members:
                archive.writestr(name, data)


def _hdf5(build):
    def write(path):
        with h5py.File(path, "w") as root:
            build(root)

    return write


def _header(text, data=b"\0" * 8, size=None):
    return lambda path: path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def _bytes(data):
    return lambda path: path.write_bytes(data)


def _tensor(shape, end=8):
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


def _long_header(path):
    """Announces a header of 200 MB and has the room for it, as a hole in the file."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)


def _lie_about_size(path):
    """A deflated member that announces 4 GB."""
    _zip(path, [("a.npy", _npy((2**30,), b"\0" * 64))], compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at : at + 4] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(data)


def _external(root):
    root.create_dataset("a", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def _virtual(root):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "a", (4,))
    root.create_virtual_dataset("a", layout)


def _loop(root):
    root["a"] = root.create_group("b")
    root["b/c"] = root["b"]


def _deep(root):
    for level in range(80):
        root = root.create_group(str(level))


def _array(shape, dtype, data):
    return msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, dtype, data))))


def _maps(number):
    """Packs a list of empty maps."""
    return b"\xdd" + struct.pack(">I", number) + b"\x80" * number


HOSTILE = {
    "safetensors header": ("a.safetensors", _header(b"{}", size=2**62), "header of at most 10 bytes"),
    "safetensors shape": ("a.safetensors", _header(_tensor([2**50])), "found a damaged one"),
    "safetensors end": ("a.safetensors", _header(_tensor([2**50], 2**52)), "found a damaged one"),
    "safetensors cut": ("a.safetensors", _header(_tensor([2]), b"\0" * 7), "found a damaged one"),
    "safetensors twice": (
        "a.safetensors",
        _header(_tensor([2])[:-1] + b"," + _tensor([2])[1:]),
        "names to be unique, found 'a' twice",
    ),
    "safetensors deep": ("a.safetensors", _header(b'{"a":' + b"[" * 100_000), "found a damaged one"),
    "safetensors long header": ("a.safetensors", _long_header, "header of at most 100,000,000 bytes"),
    "safetensors values": ("a.safetensors", _header(b'{"a":[' + b"{}," * 500_000 + b"{}]}"), "found a damaged one"),
    "safetensors dtype": (
        "a.safetensors",
        _header(json.dumps({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()),
        "'a': expected numbers that NumPy has, found dtype F8_E4M3",
    ),
    "safetensors short": ("a.safetensors", _bytes(b"abc"), "header of at most 0 bytes"),
    "npy shape": ("a.npy", _bytes(_npy((2**50,))), r"4,503,599,627,370,496 bytes for shape .* found 0"),
    "npy overflow": ("a.npy", _bytes(_npy((2**32, 2**32), b"\0" * 8)), "18446744073709551616|bytes for shape"),
    "npy negative": ("a.npy", _bytes(_npy((-4,), b"\0" * 8)), "sizes of 0 or more, found shape"),
    "npy cut": ("a.npy", _bytes(_npy((3,), b"\0" * 11)), "expected 12 bytes .* found 11"),
    "npy text": ("a.npy", _bytes(_npy((2,), b"\0" * 8, "<U1")), "expected numbers, found dtype <U1"),
    "npy long double": ("a.npy", _bytes(_npy((1,), b"\0" * 16, "<f16")), "at most 8 bytes, .* found dtype float128"),
    "npz long double": (
        "a.npz",
        lambda path: _zip(path, [("a.npy", _npy((1,), b"\0" * 32, "<c32"))]),
        "'a': expected numbers of at most 16 bytes, .* found dtype complex256",
    ),
    "hdf5 long double": (
        "a.h5",
        _hdf5(lambda root: root.create_dataset("a", data=np.ones(1, np.longdouble))),
        "'a': expected numbers of at most 8 bytes, .* found dtype float128",
    ),
    "npy header": ("a.npy", _bytes(b"\x93NUMPY\x01\x00\xff\xff{'descr'"), "damaged"),
    "npz size": ("a.npz", _lie_about_size, "times the .* bytes stored, found 4,294,967,294 announced"),
    "npz shape": ("a.npz", lambda path: _zip(path, [("a.npy", _npy((2**50,)))]), "'a': expected 4,503"),
    "npz twice": ("a.npz", lambda path: _zip(path, [("a.npy", _npy((0,)))] * 2), "found 'a' twice"),
    "npz cut": ("a.npz", _bytes(b"PK\x03\x04" + b"\0" * 40), "expected a sound zip archive"),
    "npz method": (
        "a.npz",
        lambda path: _zip(path, [("a.npy", _npy((0,)))], compression=zipfile.ZIP_BZIP2),
        "stored or deflated data, found method 12",
    ),
    "zip": ("a.npz", lambda path: _zip(path, [("a.txt", b"")]), "expected npz, .* found another zip archive"),
    "hdf5 sparse": (
        "a.h5",
        _hdf5(lambda root: root.create_dataset("a", (2**50,), "f4", chunks=(2**10,), compression="gzip")),
        r"'a': expected an array that fits the 0 bytes stored of it, found shape \(1125899906842624,\)",
    ),
    "hdf5 unwritten": ("a.h5", _hdf5(lambda root: root.create_dataset("a", (2**40,), "f4")), "fits the 0 bytes"),
    "hdf5 chunk": (
        "a.h5",
        _hdf5(lambda root: root.create_dataset("a", (1,), "f4", chunks=(2**29,), maxshape=(None,))),
        "fits the 0 bytes",
    ),
    "hdf5 text": (
        "a.h5",
        _hdf5(lambda root: root.create_dataset("a", data=["x"], dtype=h5py.string_dtype())),
        "expected numbers, found dtype object",
    ),
    "hdf5 records": (
        "a.h5",
        _hdf5(lambda root: root.create_dataset("a", (2,), np.dtype([("x", "f4")]))),
        "expected numbers, found dtype",
    ),
    "hdf5 null": ("a.h5", _hdf5(lambda root: root.create_dataset("a", data=h5py.Empty("f4"))), "found an empty data"),
    "hdf5 soft link": (
        "a.h5",
        _hdf5(lambda root: root.__setitem__("a", h5py.SoftLink("/b"))),
        "'a': expected data, found a SoftLink",
    ),
    "hdf5 external link": (
        "a.h5",
        _hdf5(lambda root: root.__setitem__("a", h5py.ExternalLink("other.h5", "/"))),
        "'a': expected data, found a ExternalLink",
    ),
    "hdf5 external data": ("a.h5", _hdf5(_external), "found a reference to another one"),
    "hdf5 virtual": ("a.h5", _hdf5(_virtual), "found a reference to another one"),
    "hdf5 loop": ("a.h5", _hdf5(_loop), "expected every group once"),
    "hdf5 deep": ("a.h5", _hdf5(_deep), "at most 64 levels"),
    "hdf5 same name": (
        "a.h5",
        _hdf5(lambda root: [root.create_dataset(name, data=[1.0]) for name in ("a.b", "a/b")]),
        "found 'a.b' twice",
    ),
    "hdf5 cut": ("a.h5", _bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 100), "expected a sound HDF5 file"),
    "hdf5 nothing": ("a.h5", _hdf5(lambda root: root.create_group("a")), "expected arrays, found none"),
    "keras member": ("a.keras", lambda path: _zip(path, [("config.json", b"{}")]), "expected keras, .* found"),
    "msgpack lists": (
        "a.msgpack",
        _bytes(b"\x81\xa1a" + b"\xdd\x00\x03\xff\xff" * 30 + b"\0" * 2**18),
        "more values announced",
    ),
    "msgpack maps": (
        "a.msgpack",
        _bytes(b"\x81\xa1a" + _maps(2_000_000)),
        "more than 1,000,000 values beside",
    ),
    # neither has too many by itself
    "msgpack extensions": (
        "a.msgpack",
        _bytes(b"\x81\xa1a\x92" + msgpack.packb(msgpack.ExtType(1, _maps(20_000))) + _maps(990_000)),
        "more than 1,000,000 values beside",
    ),
    "msgpack deep": ("a.msgpack", _bytes(b"\x81\xa1a" * 80 + b"\x01"), "more than 64 levels"),
    "msgpack list": ("a.msgpack", _bytes(b"\xdf\xff\xff\xff\xff\x01"), "8,589,934,590 more values announced"),
    "msgpack bytes": ("a.msgpack", _bytes(b"\x81\xa1a\xc6\xff\xff\xff\xff"), "ends too early"),
    "msgpack extension": ("a.msgpack", _bytes(b"\x81\xa1a\xc9\xff\xff\xff\xff\x01"), "4,294,967,295 bytes announced"),
    "msgpack shape": ("a.msgpack", _bytes(b"\x81\xa1a" + _array((2**50,), "float32", b"\0" * 8)), "reshape"),
    "msgpack objects": ("a.msgpack", _bytes(b"\x81\xa1a" + _array((1,), "object", b"\0" * 8)), "OBJECT|object"),
    "msgpack text": ("a.msgpack", _bytes(b"\x81\xa1a\xa1b"), "'a': expected numbers, found dtype <U1"),
    "msgpack rest": ("a.msgpack", _bytes(b"\x81\xa1a\x01\x01"), "1 bytes behind its end"),
    "msgpack cut": ("a.msgpack", _bytes(serialization.to_bytes(TREE)[:-3]), "damaged"),
    "empty": ("a.npz", _bytes(b""), "found an empty file"),
    "another format": ("a.npz", _bytes(_npy((0,))), "expected npz, as its name says, found npy"),
    "hdf5 by another name": ("a.safetensors", _hdf5(lambda root: None), "expected safetensors, .* found HDF5"),
    "unknown": ("a.dat", _bytes(b"hello"), "expected .safetensors, .npz, .* found something else"),
    "not what it says": ("a.npy", _bytes(b"hello"), "expected npy, .* found something unknown"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_damaged_files(case, tmp_path, frugal):
    file, write, message = HOSTILE[case]
    write(tmp_path / file)
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(tmp_path / file)
    assert str(caught.value).startswith(f"{tmp_path / file}: ")
    assert "\n" not in str(caught.value)


def test_a_small_archive_of_much(tmp_path, frugal):
    """100 MB of zeros are 100 kB deflated: the ratio is possible, so the limit has to stop it."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        member.write(_npy((25 * 2**20,)))
        for _ in range(100):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**18
    with pytest.raises(ValueError, match="max_bytes = 50,000,000 bytes of arrays, found 104"):
        read_weights(path, max_bytes=50_000_000)


# what orbax still had under way when it gave up reports to a loop that is closed
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_orbax_checkpoint_that_announces_much(orbax_folder, tmp_path, frugal):
    path = tmp_path / "hostile"
    shutil.copytree(orbax_folder / "10" / "default", path)
    (array,) = path.glob("params.cell.hf.kernel/.zarray")
    description = json.loads(array.read_text())
    array.write_text(json.dumps(description | {"shape": [2**50, 3], "chunks": [2**50, 3]}))
    with pytest.raises(ValueError, match=r"max_bytes = 8,589,934,592 bytes of arrays, found 13,510,798,882,111"):
        read_weights(path)
    array.write_text("{")
    with pytest.raises(ValueError, match="expected a sound orbax checkpoint"):
        read_weights(path)
    time.sleep(0.5)  # until those reports have come, for they would be another test's


def test_paths_that_are_no_files(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"modle.safetensors: no such file; did you mean model.safetensors\?"):
        read_weights(tmp_path / "modle.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no such file$"):
        read_weights(tmp_path / "no" / "folder.npz")
    with pytest.raises(ValueError, match="expected an orbax checkpoint, found a folder without one"):
        read_weights(tmp_path)
    with pytest.raises(ValueError, match="found a device, pipe or socket"):
        read_weights("/dev/null")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", forbidden)  # root may read everything
    with pytest.raises(PermissionError, match=r"model.safetensors: no permission to read it"):
        read_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("file", "package"), [("w.safetensors", "safetensors"), ("w.weights.h5", "h5py")])
def test_missing_packages_are_named(file, package, tmp_path, monkeypatch):
    write, arrays = WRITERS[file]
    write(tmp_path / file, arrays)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "rnngrad\[weights\]"'):
        read_weights(tmp_path / file)
