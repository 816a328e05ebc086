"""Training over many devices and processes: the numbers of one device, by whatever they are made, killed or resumed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import rnngrad as rg
from experiments import cluster, results
from rnngrad import cells, losses, training
from rnngrad.training.data_parallel import _is_shared
from rnngrad.training.logs import scalars

ROOT = Path(__file__).resolve().parent.parent


def _environment(num_devices):
    flag = f"--xla_force_host_platform_device_count={num_devices}"
    return os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}


def _start(words, num_devices):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=_environment(num_devices), stdout=pipe, stderr=pipe, text=True
    )


def _alone(*words, num_devices=1):
    """Runs one process to its end and returns what it printed."""
    process = _start(words, num_devices)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def _address():
    """An address that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


def _pair(words, *, own=((), ())):
    """Starts two processes of two devices each; ``own``: words of each."""
    at = _address()
    flags = lambda index: ["--coordinator", at, "--num-processes", "2", "--process-id", str(index)]
    return [_start([*words, *own[index], *flags(index)], 2) for index in range(2)]


def _finish(processes):
    """Returns exit code, output and errors of every process."""
    ended = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def _together(*words, own=((), ())):
    """Runs two processes to their end and returns what they printed."""
    ended = _finish(_pair(words, own=own))
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [out for _, out, _ in ended]


# --- the step, on four devices of one process -------------------------------------------------------------------------

# Two layers, dropout, sequences of unequal length, a memory that is carried: whatever might hold to the batch's rows.
_STEP = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from typing import Any, NamedTuple
from rnngrad import cells, losses, training
from rnngrad.training.loop import _jitted_step

class Batch(NamedTuple):
    inputs: Any
    targets: Any
    mask: Any

T, B, D, N, K = 6, 8, 3, 5, 2
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
devices, found = jax.devices(), {}
loss = lambda output, batch: losses.mse(output.outputs, batch.targets, batch.mask)

def batch_at(step, dtype):
    key_inputs, key_targets, key_mask = jax.random.split(jax.random.key(step), 3)
    return Batch(
        jax.random.normal(key_inputs, (T, B, D), dtype), jax.random.normal(key_targets, (T, B, K), dtype),
        jax.random.bernoulli(key_mask, 0.6, (T, B)).astype(dtype).at[-1].set(1),
    )

for dtype in ("float32", "float64"):
    with jax.enable_x64(dtype == "float64"):
        model = training.model([cells.lstm(D, N, dtype=dtype), cells.gru(N, N, dtype=dtype)], K, dropout=0.3)
        optimizer = optax.sgd(1.0)  # of which the update is the gradient
        for name, where in (("one", None), ("four", devices)):
            step = training.train_step(model, loss, optimizer, devices=where)
            state = training.initial_state(model, optimizer, jax.random.key(0), B)
            for number in range(3):
                state, metrics = step(state, batch_at(number, dtype), jnp.array(number == 0))
                for index, leaf in enumerate(jax.tree.leaves((state.params, state.memory, metrics))):
                    found[f"{dtype} {name} {number} {index}"] = np.asarray(leaf)
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves((state, metrics)))
        assert all(len(leaf.devices()) == 4 for leaf in jax.tree.leaves((state, metrics)))

with jax.enable_x64(True):
    arguments = state, batch_at(0, "float64"), jnp.array(True)
    jitted = _jitted_step(model, loss, optimizer, None, tuple(devices))
    print(jitted.lower(*arguments).compile().as_text())
    for platform in ("cuda", "tpu"):
        exported = jax.export.export(jitted, platforms=[platform])(*arguments)
        assert exported.nr_devices == 4 and exported.platforms == (platform,)
np.savez(sys.argv[1], **found)
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Three steps on one and on four devices, and the compiled program of the latter; lowered for GPU and TPU."""
    file = tmp_path_factory.mktemp("steps") / "steps.npz"
    program = _alone("-c", _STEP, str(file), num_devices=4)
    with np.load(file) as found:
        return dict(found), program


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6)])
def test_four_devices_make_the_step_of_one(steps, dtype, tolerance):
    """Weights after steps of rate 1, so gradients too; memory; loss and gradient norm.

    Sums of up to 48 numbers below 1 in another order, three times: some roundings of 1e-16, in float32 of 6e-8.
    """
    ones = {name: value for name, value in steps[0].items() if name.startswith(f"{dtype} one")}
    assert len(ones) == 3 * 16
    for name, value in ones.items():
        np.testing.assert_allclose(steps[0][name.replace("one", "four")], value, rtol=tolerance, atol=tolerance)


def test_devices_talk_once_about_the_gradient(steps):
    """All gradients in one sum, none inside a scan; and the number of tokens, which the loss divides by."""
    sums = re.findall(r"^ *(?:ROOT )?%\S+ = (.*?) all-reduce(?:-start)?\(", steps[1], re.M)
    assert len(sums) == 2
    assert sorted(text.count("f64[") for text in sums) == [1, 10]  # the weights' and the loss
    # the memory, whole again
    assert len(re.findall(r" all-gather(?:-start)?\(", steps[1])) == 3
    assert not re.findall(r" (?:all-to-all|collective-permute)\S*\(", steps[1])


# --- fit, in this process ---------------------------------------------------------------------------------------------

TASK = rg.tasks.adding(12)
MODEL = training.model([cells.gru(2, 4)], 1)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def _loss(output, batch):
    return losses.mse(output.outputs, batch.targets, batch.mask)


def _batch(step, batch_size=6):
    return TASK.batch(jax.random.key(step), batch_size)


def _fit(batch_size=6, **options):
    start = training.initial_state(MODEL, OPTIMIZER, jax.random.key(0), batch_size)
    return training.fit(MODEL, _loss, OPTIMIZER, start, _batch, num_steps=5, **options)


def test_one_device_by_name_is_one_device(tmp_path):
    options = {"restart_at": lambda step: step == 0, "monitor": training.Monitor(every=2), "eval_every": 2}
    options["evaluate"] = training.evaluator(MODEL, _loss, [_batch(100)])
    plain = _fit(**options)
    checkpoints = training.Checkpoints(tmp_path, {})
    named = _fit(**options, devices=jax.devices()[:1], checkpoints=checkpoints, checkpoint_every=2)
    # the same operations, perhaps fused otherwise
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), named.best_params, plain.best_params
    )
    assert named.best_step == plain.best_step
    # and either goes on from the other's checkpoint
    resumed = _fit(**options, checkpoints=checkpoints)
    assert resumed.resumed_from == 5
    assert jax.tree.all(jax.tree.map(np.array_equal, resumed.state.params, named.state.params))


@pytest.mark.parametrize(
    ("batch_size", "number", "message"),
    [
        (6, 4, r"batch size: expected a multiple of the 4 devices \(4 or 8\), found 6"),
        (3, 4, r"batch size: expected a multiple of the 4 devices \(4\), found 3"),
    ],
)
def test_a_batch_that_does_not_divide(batch_size, number, message):
    with pytest.raises(training.UnevenBatchError, match=message):
        _fit(batch_size, devices=jax.devices() * number)


def test_devices_of_some_processes_are_neither_one_process_nor_all():
    with pytest.raises(ValueError, match=r"those of one process or of all 3, found those of processes \[0, 2\]"):
        _is_shared({0, 2}, 3)


# --- two processes of two devices each --------------------------------------------------------------------------------

_FIT = """
import sys
from pathlib import Path
import jax, numpy as np, optax, tyro
import rnngrad as rg
from experiments import cluster
from rnngrad import cells, losses, training
folder, num_steps, *words = sys.argv[1:]
cluster.connect(tyro.cli(cluster.Processes, args=words))
folder, B = Path(folder), 8
jax.config.update("jax_enable_x64", True)
task = rg.tasks.adding(12)
model = training.model([cells.lstm(2, 5, dtype="float64"), cells.gru(5, 4, dtype="float64")], 1, dropout=0.2)
optimizer = optax.chain(rg.remedies.clip_by_global_norm(0.5), optax.adam(0.02))
loss = lambda output, batch: losses.mse(output.outputs, batch.targets, batch.mask)

def batch_at(step):
    batch = task.batch(jax.random.key(step), B)
    return batch._replace(**{name: getattr(batch, name).astype("float64") for name in ("inputs", "targets", "mask")})

devices = jax.devices()
fitted = training.fit(
    model, loss, optimizer, training.initial_state(model, optimizer, jax.random.key(0), B), batch_at,
    num_steps=int(num_steps), restart_at=lambda step: step % 5 == 0,
    evaluate=training.evaluator(model, loss, [batch_at(99)]), eval_every=5,
    log_every=4, logs=[training.jsonl_log(folder / "records.jsonl")], monitor=training.Monitor(every=6),
    checkpoints=training.Checkpoints(folder / "checkpoints", {}), checkpoint_every=3,
    should_stop=lambda progress: jax.process_index() != 0,  # process 0 is asked, and nobody else
    devices=devices if len(devices) > 1 else None,
)
folder.mkdir(exist_ok=True)
leaves = jax.tree.leaves((fitted.state.params, fitted.best_params, fitted.state.opt_state, fitted.state.memory))
print(f"resumed from {fitted.resumed_from}, {len(devices)} devices, {fitted.reason}, {fitted.best_step}")
np.savez(folder / "fitted.npz", *map(np.asarray, leaves))
"""


def _fitted(folder):
    with np.load(folder / "fitted.npz") as found:
        return [found[name] for name in found.files]


def _fit_alone(folder, num_steps):
    return _alone("-c", _FIT, str(folder), str(num_steps)).splitlines()[-1]


def _fit_together(folder, other, num_steps):
    """``other``: the folder of process 1."""
    own = [[str(place), str(num_steps)] for place in (folder, other)]
    return [out.splitlines()[-1] for out in _together("-c", _FIT, own=own)]


def _assert_alike(one, other):
    # float64: the batch summed in another order, 14 times, through Adam, which divides by gradients as small as 1e-3
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """14 steps on one device."""
    folder = tmp_path_factory.mktemp("alone")
    assert _fit_alone(folder, 14).startswith("resumed from None, 1 devices, done")
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(alone, tmp_path):
    said = _fit_together(tmp_path / "0", tmp_path / "1", 14)
    assert said[0] == said[1]
    assert said[0].startswith("resumed from None, 4 devices, done")
    _assert_alike(_fitted(tmp_path / "0"), _fitted(alone))
    # the processes themselves differ in nothing, and only the first one keeps a log and checkpoints
    assert all(map(np.array_equal, _fitted(tmp_path / "0"), _fitted(tmp_path / "1")))
    assert [entry.name for entry in (tmp_path / "1").iterdir()] == ["fitted.npz"]
    assert training.Checkpoints(tmp_path / "0" / "checkpoints", {}).steps() == [9, 12, 14]

    found, expected = (training.read_jsonl(folder / "records.jsonl") for folder in (tmp_path / "0", alone))
    for one, other in zip(found, expected, strict=True):
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        numbers = [scalars(record) for record in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("is_first_together", [True, False])
def test_a_run_goes_on_with_another_number_of_processes(is_first_together, alone, tmp_path):
    folder, other = tmp_path / "0", tmp_path / "1"  # a sitting ends with an evaluation: at 10 there is one anyway
    if is_first_together:
        _fit_together(folder, other, 10)
        assert _fit_alone(folder, 14).startswith("resumed from 10, 1 devices, done")
    else:
        _fit_alone(folder, 10)
        said = _fit_together(folder, other, 14)
        assert said[0] == said[1]
        assert said[0].startswith("resumed from 10, 4 devices, done")
        assert all(map(np.array_equal, _fitted(folder), _fitted(other)))
    _assert_alike(_fitted(folder), _fitted(alone))


# --- the commands -----------------------------------------------------------------------------------------------------

# SGD, whose update is smooth in the gradient: Adam's first steps are the signs of gradients that may round to 0
_TRAIN = "-m experiments.train --smoke --batch-size 12 --seeds 1 --logs --optimizer sgd --learning-rate 0.1".split()
_TRAIN += ["--steps", "8", "--cell", "gru"]
_TEXT = "-m experiments.language_model --smoke --logs --optimizer sgd --learning-rate 1 --schedule constant".split()


def _assert_same_run(one, other, experiment):
    one, other = (results.load(folder / f"{experiment}.nc", experiment=experiment) for folder in (one, other))
    for name in one.data_vars:
        # float32, 40 updates, each with sums of hundreds of terms in another order
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "words"), [("train", _TRAIN), ("language_model", _TEXT)])
def test_commands_split_the_batch(experiment, words, tmp_path):
    """Over two processes, and over two devices of one; a language model carries its memory from window to window."""
    _alone(*words, "--out", str(tmp_path / "one"))
    said = _alone(*words, "--out", str(tmp_path / "two"), num_devices=2)
    assert "is split over 2 devices" in said
    said = _together(*words, own=[["--out", str(tmp_path / place)] for place in ("four", "nothing")])
    assert "is split over 4 devices" in said[0]
    assert said[1].splitlines()[-1] == "process 1 of 2: done; process 0 has the result"
    assert not (tmp_path / "nothing").exists()
    for folder in ("two", "four"):
        _assert_same_run(tmp_path / folder, tmp_path / "one", experiment)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_kill_9_of_one_process_ends_the_other_and_the_run_goes_on(killed, tmp_path):
    words = [*_TRAIN, "--updates", "100000", "--checkpoint-every", "10", "--monitor-every", "1000"]
    words += ["--eval-every", "50000"]
    own = [["--out", str(tmp_path / place)] for place in ("0", "1")]
    processes = _pair(words, own=own)
    deadline = time.monotonic() + 120
    while not (tmp_path / "0" / "seed-0" / "checkpoints" / "20").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[killed].send_signal(signal.SIGKILL)
    since = time.monotonic()
    ended = _finish(processes)
    # heartbeats come every few seconds, and a process takes some to end
    assert time.monotonic() - since < cluster.LOST + 15
    assert ended[killed][0] == -signal.SIGKILL
    assert ended[1 - killed][0] not in (0, None)
    step = max(training.Checkpoints(tmp_path / "0" / "seed-0" / "checkpoints", {}).steps())
    words[words.index("100000")] = str(step + 20)
    said = _alone(*words, "--out", str(tmp_path / "0"))
    assert f"resumed after update {step}, 20 more" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "own", "messages"),
    [
        (
            ["--batch-size", "10"],
            ((), ()),
            ["batch size: expected a multiple of the 4 devices (8 or 12), found 10"] * 2,
        ),
        (
            [],
            ((), ("--hidden-size", "9")),
            [None, "process 1 has other settings than process 0: hidden_size: expected 8, found 9"],
        ),
        (
            [],
            (("--out", "{file}/folder"), ()),
            ["output folder {file}/folder is not writable", "process 0: output folder {file}/folder is not writable"],
        ),
    ],
)
def test_errors_end_all_processes_with_a_line(words, own, messages, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    own = [[word.format(file=file) for word in each] for each in own]
    started = time.monotonic()
    ended = _finish(_pair([*_TRAIN, "--out", str(tmp_path / "out"), *words], own=own))
    for (code, _, errors), message in zip(ended, messages, strict=True):
        assert code not in (0, None)
        if message is not None:
            assert f"error: {message.format(file=file)}" in errors
    assert time.monotonic() - started < 60 + cluster.LOST
    assert not list(tmp_path.rglob("*.nc"))
