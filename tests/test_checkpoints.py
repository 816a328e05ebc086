"""Checkpoints and logs: what is read back, and what happens to damaged, foreign and unwritable ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnngrad import training
from rnngrad.training.logs import scalars

TREE = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "half": jnp.array([0.1, 3.0], jnp.bfloat16),
    "z": jnp.array([1 + 2j], jnp.complex64),
    "count": jnp.array(7, jnp.int32),
    "flag": jnp.array(True),
    "empty": jnp.zeros((0, 4)),
    "nested": ((), None, [jnp.array([np.nan, np.inf, -0.0])]),
    "key": jax.random.key(3),
}
STANDING = {"best_loss": 0.1 + 0.2, "window": [[1.0, 2.5, 0.0]], "evaluations": [{"step": 3, "loss": 1.5}]}


def _bytes(tree):
    plain = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [(leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()) for leaf in plain]


def _saved(folder, *steps, config=(), keep=3):
    checkpoints = training.Checkpoints(folder, dict(config), keep=keep)
    for step in steps:
        checkpoints.save(step, TREE, STANDING | {"num": step})
    return checkpoints


def _data_files(folder):
    """Those that hold the arrays, largest first."""
    return sorted((f for f in (folder / "arrays").rglob("d/*") if f.is_file()), key=lambda f: -f.stat().st_size)


def test_everything_comes_back(tmp_path):
    checkpoints = _saved(tmp_path, 4)
    restored = checkpoints.restore(TREE)
    assert restored.step == 4
    assert restored.standing == STANDING | {"num": 4}
    assert jax.tree.structure(restored.tree) == jax.tree.structure(TREE)
    assert _bytes(restored.tree) == _bytes(TREE)


def test_an_empty_folder_holds_none(tmp_path):
    checkpoints = training.Checkpoints(tmp_path / "new" / "folder", {})
    assert checkpoints.latest_step() is None
    assert checkpoints.restore(TREE) is None


def test_the_newest_are_kept(tmp_path):
    checkpoints = _saved(tmp_path, 1, 5, 20, 100, keep=2)
    assert checkpoints.steps() == [20, 100]
    assert checkpoints.latest_step() == 100


def test_unfinished_checkpoints_are_none(tmp_path):
    checkpoints = _saved(tmp_path, 3)
    left_behind = tmp_path / "6.orbax-checkpoint-tmp-1"
    left_behind.mkdir()
    assert checkpoints.latest_step() == 3
    assert checkpoints.restore(TREE).step == 3
    checkpoints.save(6, TREE, {})
    assert checkpoints.steps() == [3, 6]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "flipped", "meta"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(damage, tmp_path):
    checkpoints = _saved(tmp_path, 3, 6)
    for file in _data_files(tmp_path / "6"):
        content = file.read_bytes()
        if damage == "truncated":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "emptied":
            file.write_bytes(b"")
        elif damage == "missing":
            file.unlink()
        elif damage == "flipped":
            middle = len(content) // 2
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    if damage == "meta":
        (tmp_path / "6" / "meta" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match=r"/6 does not read back .*corrupt-6.*resumes from step 3"):
        restored = checkpoints.restore(TREE)
    assert restored.step == 3
    assert _bytes(restored.tree) == _bytes(TREE)
    assert (tmp_path / "corrupt-6").is_dir()
    assert checkpoints.steps() == [3]
    checkpoints.save(6, TREE, {})
    assert checkpoints.restore(TREE).step == 6


def test_a_checkpoint_that_lost_its_name_is_damaged_when_an_older_one_is_ours(tmp_path):
    checkpoints = _saved(tmp_path, 3, 6)
    shutil.rmtree(tmp_path / "6" / "meta")
    with pytest.warns(UserWarning, match=r"/6 does not read back \(its meta is missing\).*resumes from step 3"):
        restored = checkpoints.restore(TREE)
    assert restored.step == 3
    assert checkpoints.steps() == [3]


def test_values_that_changed_on_disk_are_noticed(tmp_path):
    """A checkpoint that reads well and holds other numbers than were written."""
    checkpoints = _saved(tmp_path, 3)
    meta = tmp_path / "3" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps(content | {"sha256": "0" * 64}))
    with pytest.raises(training.CorruptCheckpointError, match="another SHA-256"):
        checkpoints.restore(TREE)
    assert checkpoints.steps() == [3]  # left as it is


def test_none_reads_back(tmp_path):
    checkpoints = _saved(tmp_path, 3, 6)
    for step in ("3", "6"):
        for file in _data_files(tmp_path / step):
            file.unlink()
    with pytest.raises(training.CorruptCheckpointError, match=r"reads back: 6 \(.*\), 3 \("):
        checkpoints.restore(TREE)
    assert checkpoints.steps() == [3, 6]


def test_foreign_folders(tmp_path):
    (tmp_path / "one" / "7").mkdir(parents=True)
    with pytest.raises(training.ForeignCheckpointError, match=r"7 is no checkpoint of rnngrad.training"):
        training.Checkpoints(tmp_path / "one", {}).restore(TREE)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["7"]

    checkpoints = _saved(tmp_path / "two", 3)
    meta = tmp_path / "two" / "3" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({"format": "another"}))
    with pytest.raises(training.ForeignCheckpointError, match=r"3 is no checkpoint of rnngrad.training"):
        checkpoints.restore(TREE)
    meta.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(training.ForeignCheckpointError, match="expected version 1 of the format, found 99"):
        checkpoints.restore(TREE)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["3"]


def test_another_model(tmp_path):
    checkpoints = _saved(tmp_path, 3)
    other = TREE | {"w": jnp.zeros((2, 4)), "more": jnp.zeros(1)}
    with pytest.raises(
        training.ForeignCheckpointError,
        match=r"\['more'\]: expected 'missing', found 'float32\[1\]'; \['w'\]: expected 'float32\[2, 3\]', found",
    ):
        checkpoints.restore(other)


def test_a_changed_configuration_is_named(tmp_path):
    _saved(tmp_path, 3, config={"lr": 0.1, "sizes": (1, 2), "gone": 1})
    assert training.Checkpoints(tmp_path, {"lr": 0.1, "sizes": (1, 2), "gone": 1}).restore(TREE).step == 3
    with pytest.raises(training.ConfigChangedError, match=r"lr: expected 0.1, found 0.2") as caught:
        training.Checkpoints(tmp_path, {"lr": 0.2, "sizes": (1, 2), "new": None}).restore(TREE)
    assert caught.value.changed == {"lr": (0.1, 0.2), "gone": (1, "missing"), "new": ("missing", None)}
    assert training.Checkpoints(tmp_path, {"lr": 0.1, "sizes": (1, 2), "gone": 1}).latest_step() == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = training.Checkpoints(tmp_path / "file" / "folder", {})
    for act in (lambda: checkpoints.restore(TREE), lambda: checkpoints.save(1, TREE, {})):
        with pytest.raises(training.NotWritableError, match=r"checkpoint folder .* is not writable"):
            act()


def test_keep_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep: expected at least 1, found 0"):
        training.Checkpoints(tmp_path, {}, keep=0)


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    """Files may not grow beyond some kilobytes: the second checkpoint cannot be written."""
    code = """
import resource, sys
import jax.numpy as jnp, numpy as np
from rnngrad import training
checkpoints = training.Checkpoints(sys.argv[1], {})
tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100_000))}
checkpoints.save(1, tree, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoints.save(2, tree, {})
except training.NotWritableError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
print(checkpoints.steps(), checkpoints.restore(tree).step)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "/2 could not be written: " in done.stdout
    assert done.stdout.splitlines()[-1] == "[1] 1"


# --- logs ------------------------------------------------------------------------------------------------------------

RECORDS = [
    {"kind": "evaluation", "step": 0, "loss": 1.5},
    {"kind": "flow", "step": 1, "layers": [{"log_retention": [0.0, -0.5, float("-inf")], "gate_share": {"f": 0.25}}]},
    {"kind": "train", "step": 4, "loss": 0.1 + 0.2, "clip_fraction": 0.5},
    {"kind": "train", "step": 8, "loss": float("nan"), "clip_fraction": 0.0},
]


def _write(log, start, records):
    log.start(start)
    for record in records:
        log.write(record)
    log.flush()
    log.close()


def test_json_lines(tmp_path):
    file = tmp_path / "new" / "records.jsonl"
    _write(training.jsonl_log(file), None, RECORDS)
    found = training.read_jsonl(file)
    assert found[2] == RECORDS[2]  # floats come back to the last bit
    assert found[1]["layers"][0] == {"log_retention": [0.0, -0.5, None], "gate_share": {"f": 0.25}}
    assert found[3]["loss"] is None
    assert all(isinstance(json.loads(line), dict) for line in file.read_text().splitlines())


@pytest.mark.parametrize(("start", "left"), [(0, 1), (3, 2), (4, 3), (100, 4)])
@pytest.mark.parametrize("torn", [False, True])
def test_json_lines_are_cut_at_the_step_of_a_resume(start, left, torn, tmp_path):
    file = tmp_path / "records.jsonl"
    _write(training.jsonl_log(file), None, RECORDS)
    whole = training.read_jsonl(file)
    if torn:
        with file.open("ab") as stream:
            stream.write(b'{"kind": "train", "step": 9, "lo')
        assert training.read_jsonl(file) == whole
    _write(training.jsonl_log(file), start, [{"kind": "train", "step": 200}])
    assert training.read_jsonl(file) == [*whole[:left], {"kind": "train", "step": 200}]


def test_a_new_run_moves_older_json_lines_aside(tmp_path):
    file = tmp_path / "records.jsonl"
    _write(training.jsonl_log(file), None, RECORDS)
    before = file.read_bytes()
    _write(training.jsonl_log(file), None, RECORDS[:1])
    assert training.read_jsonl(file) == RECORDS[:1]
    assert (tmp_path / "records.jsonl.old").read_bytes() == before
    _write(training.jsonl_log(file), None, RECORDS[:2])  # and again: nothing is lost
    assert (tmp_path / "records.jsonl.old").read_bytes() == before
    assert training.read_jsonl(tmp_path / "records.jsonl.old-2") == RECORDS[:1]


@pytest.mark.parametrize("start", [None, 3])
def test_half_of_a_first_record_is_no_other_file(start, tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"kind": "evaluation", "st')
    _write(training.jsonl_log(file), start, RECORDS[:1])
    assert training.read_jsonl(file) == RECORDS[:1]


RECORD = '{"kind": "train", "step": 1}\n'


@pytest.mark.parametrize(
    "content",
    [
        "my notes\n",
        "my notes",
        "[1]\n",
        '{"no": "step"}\n',
        '{"step": 1}\n',
        '{"kind": "train", "step": "1"}\n',
        f"{RECORD}#\n{RECORD}",  # damaged in the middle: not by a kill, and the rest would be cut off
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(content, tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text(content)
    for start in (None, 3):
        with pytest.raises(training.ForeignLogError, match="expected records of a run, found something else"):
            training.jsonl_log(file).start(start)
    assert file.read_text() == content


def test_json_lines_want_a_start(tmp_path):
    log = training.jsonl_log(tmp_path / "records.jsonl")
    log.close()
    with pytest.raises(ValueError, match="write before start"):
        log.write(RECORDS[0])


def _events(folder):
    """Returns (step, name, value) of every scalar in TensorBoard's files, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        content, position = file.read_bytes(), 0
        while position < len(content):
            (length,) = np.frombuffer(content[position : position + 8], "<u8")
            event = Event.FromString(content[position + 12 : position + 12 + int(length)])
            position += 16 + int(length)  # length, its checksum, the event, its checksum
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


@pytest.mark.filterwarnings("default")  # the writer's own business
def test_tensorboard_events_read_back(tmp_path):
    pytest.importorskip("tensorboardX")
    _write(training.tensorboard_log(tmp_path), None, RECORDS)
    assert _events(tmp_path) == [
        (0, "evaluation/loss", 1.5),
        (1, "flow/layer_1/log_retention/lag_1", -0.5),
        (1, "flow/layer_1/gate_share/f", 0.25),
        (4, "train/loss", pytest.approx(0.3)),
        (4, "train/clip_fraction", 0.5),
        (8, "train/clip_fraction", 0.0),
    ]


@pytest.mark.filterwarnings("default")  # the writer's own business
def test_two_tensorboard_files_of_one_second_are_two(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    _write(training.tensorboard_log(tmp_path), None, RECORDS[:1])
    _write(training.tensorboard_log(tmp_path), 0, RECORDS[2:3])
    # the file of the first start is read first
    assert [step for step, _, _ in _events(tmp_path)] == [0, 4, 4]


@pytest.mark.parametrize("name", ["jsonl", "tensorboard", "wandb"])
def test_logs_that_cannot_be_written(name, tmp_path, monkeypatch):
    if name == "tensorboard":
        pytest.importorskip("tensorboardX")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    place = tmp_path / name
    if name == "jsonl":
        place.mkdir()
    else:
        place.write_text("a file")
    logs = {
        "jsonl": training.jsonl_log,
        "tensorboard": training.tensorboard_log,
        "wandb": lambda folder: training.wandb_log(folder, project="p", name="n", config={}),
    }
    log = logs[name](place)
    with pytest.raises(training.NotWritableError, match=f"log .*{name} is not writable: "):
        log.start(None)
    log.close()


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("tensorboardX", training.tensorboard_log),
        ("wandb", lambda folder: training.wandb_log(folder, project="p", name="n", config={})),
    ],
)
def test_a_missing_package_is_named(module, make, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs the package {module}, which is not installed: pip install"):
        make(tmp_path)


def test_weights_and_biases_is_offline_unless_asked(monkeypatch, tmp_path):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "wandb"
    _write(training.wandb_log(folder, project="p", name="n", config={"lr": 1}), None, RECORDS[2:])
    assert calls == [
        {"project": "p", "name": "n", "config": {"lr": 1}, "dir": str(folder), "mode": "offline"},
        (4, scalars(RECORDS[2])),
        (8, {"train/clip_fraction": 0.0}),
        "finished",
    ]
    monkeypatch.setenv("WANDB_MODE", "online")
    training.wandb_log(folder, project="p", name="n", config={}).start(None)
    assert calls[-1]["mode"] == "online"


def test_paths_may_be_text(tmp_path):
    assert training.Checkpoints(Path(str(tmp_path)), {}).path(3) == tmp_path.resolve() / "3"
