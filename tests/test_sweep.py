"""Sweeps over processes and devices: shared work, kills, full disks, unreadable parts, and memory that is too small."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr

import rnngrad as rg
from experiments import cluster, command, results, sweep

ROOT = Path(__file__).resolve().parent.parent
TINY = sweep.Config(
    cells=("vanilla", "lstm"), forget_biases=("1",), hidden_sizes=(3,), lengths=(9,), seeds=8, per_part=1,
    per_device=1, lags=6,
)  # fmt: skip
"""16 parts."""
FLAGS = command.flags(TINY).split()


def same(one: Path, other: Path) -> None:
    """Asserts that two results are equal to the last bit; when and how fast they were made apart."""
    found, expected = (xr.load_dataset(file / "sweep.nc", engine="h5netcdf") for file in (one, other))
    for dataset in (found, expected):
        for name in ("created", "seconds"):
            del dataset.attrs[name]
    xr.testing.assert_identical(found, expected)
    for name, variable in expected.variables.items():
        assert variable.values.tobytes() == found[name].values.tobytes() or variable.dtype == object, name


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("sweep.nc", "sweep.png"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A folder with the result of one process on one device that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command.execute(sweep.EXPERIMENT, TINY, command.Options(out=folder))
    assert not leftovers(folder)
    return folder


def start(*words: str, devices: int = 1) -> subprocess.Popen[str]:
    flag = f"--xla_force_host_platform_device_count={devices}"
    environment = dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flag}", COLUMNS="150")
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *words],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


# --- what is measured ------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_library():
    config = sweep.Config(
        cells=("gru",), forget_biases=("chrono",), hidden_sizes=(4,), lengths=(30,), seeds=3, per_part=2, per_device=2,
        lags=5,
    )  # fmt: skip
    dataset = sweep.run(config)
    assert dataset["lag"].values.tolist() == [[0, 1, 3, 10, 30]]
    cell = rg.cells.gru(4, 4, forget_bias=rg.initializers.chrono(30.0))
    for seed in range(3):
        key_params, key_xs = jax.random.split(jax.random.key(seed))
        params, xs = cell.init(key_params), jax.random.normal(key_xs, (30, 4))
        for path in ("full", "direct"):
            expected = rg.retention(cell, params, cell.init_state(), xs, path=path).log_norm
            found = dataset["log_retention"].sel(seed=seed, path=path).values[0]
            np.testing.assert_allclose(found, np.asarray(expected)[[0, 1, 3, 10, 30]], rtol=1e-5, atol=1e-5)
        full = np.asarray(rg.retention(cell, params, cell.init_state(), xs).log_norm)
        below = np.flatnonzero(full < np.log(0.01))
        assert dataset["horizon"].sel(seed=seed).values[0] == (below[0] if len(below) else np.inf)


def test_short_and_long_settings_lie_side_by_side():
    config = sweep.Config(cells=("vanilla",), hidden_sizes=(2,), lengths=(5, 12), seeds=2, per_device=2, lags=6)
    dataset = sweep.run(config)
    assert dataset.sizes == {"setting": 2, "seed": 2, "path": 2, "point": 6}
    assert dataset["lag"].values.tolist() == [[0, 1, 2, 3, 5, -1], [0, 1, 2, 3, 6, 12]]
    kept = dataset["lag"].values >= 0
    assert np.isfinite(dataset["log_retention"].sel(path="full").values.swapaxes(1, 2)[kept]).all()
    assert np.isnan(dataset["log_retention"].values.transpose(0, 3, 1, 2)[~kept]).all()
    direct = dataset["log_retention"].sel(path="direct").values
    assert (direct[:, :, 1:4] == -np.inf).all(), "a vanilla cell has no direct path"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "--seeds: expected at least 1, found 0"),
        ({"lengths": ()}, "--lengths: expected different values, at least one"),
        ({"lengths": (10, 0)}, "--lengths: expected at least 1, found 0"),
        ({"cells": ("gru", "gru")}, "--cells: expected different values"),
        ({"forget_biases": ("chronos",)}, "--forget-bias: expected a number, chrono"),
    ],
)
def test_settings_that_cannot_be_run(change, message, tmp_path, capsys):
    config = sweep.Config(**{"hidden_sizes": (2,), "lengths": (5,), **change})
    with pytest.raises(SystemExit) as stopped:
        command.execute(sweep.EXPERIMENT, config, command.Options(out=tmp_path))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- devices ---------------------------------------------------------------------------------------------------------


def test_rows_fill_up_blocks_and_come_back_in_order():
    mapped = cluster.over_devices(lambda a, b: {"sum": a + b, "row": a * jax.numpy.ones(2)}, 4)
    found = mapped(np.arange(10.0, dtype=np.float32), np.ones(10, np.float32))
    np.testing.assert_array_equal(found["sum"], np.arange(10) + 1)
    assert found["row"].shape == (10, 2)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_more_devices_give_the_same_bits(devices, tmp_path):
    """Parts of five seeds: two or three rounds of the devices, the last one not full."""
    config = dataclasses.replace(TINY, per_part=5)
    for number in (1, devices):
        process = start("--out", str(tmp_path / f"{number}"), *command.flags(config).split(), devices=number)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    same(tmp_path / f"{devices}", tmp_path / "1")


@pytest.mark.parametrize("fitting", [0, 1, 3])
def test_memory_that_is_too_small_names_what_fits(fitting, monkeypatch):
    needed = []

    def free(device):
        return None if not needed else (fitting + 0.5) * needed[0] / 6

    def measured(row):
        return jax.numpy.sum(jax.numpy.outer(row * jax.numpy.arange(300.0), jax.numpy.arange(300.0)) ** 2, axis=0)

    rows = jax.ShapeDtypeStruct((6,), np.float32)
    sizes = jax.jit(jax.vmap(measured)).lower(rows).compile().memory_analysis()
    needed.append(sizes.temp_size_in_bytes + sizes.output_size_in_bytes)
    monkeypatch.setattr(cluster, "free_memory", free)
    with pytest.raises(cluster.OutOfMemoryError, match="is out of memory with 6 at once") as raised:
        cluster.over_devices(measured, 6)(np.arange(6, dtype=np.float32))
    assert raised.value.fitting == fitting
    assert ("not even one fits" if fitting == 0 else f"{fitting} fit") in str(raised.value)


_TOO_LARGE = """
import resource
import jax, numpy as np
from experiments import cluster

cluster.free_memory = lambda device: None  # nothing is known beforehand: the allocator refuses
row = lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 1.5, x * jax.numpy.ones(1 << 26))[:2]
jax.numpy.ones(3).block_until_ready()
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (1024 * int(size.split()[1]) + (1 << 31), resource.RLIM_INFINITY))
try:
    cluster.over_devices(row, 16)(np.arange(16, dtype=np.float32))
except cluster.OutOfMemoryError as error:
    print(error.fitting, error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is set above what Linux says is in use")
def test_an_allocation_that_fails_names_what_fits():
    """256 MiB a row and address space for 2 GiB more: 16 rows do not fit, some do."""
    done = subprocess.run([sys.executable, "-c", _TOO_LARGE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fitting, _, message = done.stdout.partition(" ")
    assert 1 <= int(fitting) <= 8
    expected = rf"is out of memory with 16 at once \(\d,\d+\.\d MiB each device\): {fitting} fit"
    assert re.search(expected, message), message


def test_the_sweep_names_seeds_at_once_that_fit(monkeypatch, tmp_path, capsys):
    """The command named is then run, in the same memory."""
    config = sweep.Config(
        cells=("vanilla",), hidden_sizes=(8,), lengths=(50, 10), lags=5, seeds=4, per_part=4, per_device=4
    )
    sizes = {}
    for rows in (1, 2, 4):
        sweep._measured.cache_clear()
        asked = []
        monkeypatch.setattr(cluster, "free_memory", lambda device, asked=asked: asked.append(1))  # None: no limit
        mapped = sweep._measured("vanilla", None, 8, 50, 5, rows)
        mapped(np.arange(rows, dtype=np.uint32))
        program = next(cell.cell_contents for cell in _cells(mapped) if isinstance(cell.cell_contents, dict))[rows]
        analysis = program.memory_analysis()
        sizes[rows] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    monkeypatch.setattr(cluster, "free_memory", lambda device: sizes[2])
    sweep._measured.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        command.execute(sweep.EXPERIMENT, config, command.Options(out=tmp_path))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "vanilla, N = 8, T = 50:" in said
    assert "fits with --per-device 2," in said
    again = dataclasses.replace(config, per_device=2)
    command.execute(sweep.EXPERIMENT, again, command.Options(out=tmp_path))
    assert not leftovers(tmp_path)


def _cells(function):
    """Everything that a function and the functions in it close over."""
    for cell in function.__closure__ or ():
        yield cell
        if callable(cell.cell_contents) and getattr(cell.cell_contents, "__closure__", None):
            yield from _cells(cell.cell_contents)


def test_an_error_that_is_none_of_memory_stays_itself():
    def broken(row):
        raise MemoryError("of something else")

    with pytest.raises(MemoryError, match="of something else"):
        cluster.over_devices(broken, 2)(np.arange(2, dtype=np.float32))


def test_free_memory_of_this_machine():
    free = cluster.free_memory(jax.local_devices()[0])
    assert free is None or 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, "--num-processes: expected --coordinator HOST:PORT beside it"),
        ({"process_id": 0}, "--process-id: expected --coordinator HOST:PORT beside it"),
        ({"coordinator": "here"}, "--coordinator: expected HOST:PORT or auto, found here"),
        ({"coordinator": "here:0"}, "--coordinator: expected HOST:PORT or auto, found here:0"),
        ({"coordinator": "here:99"}, "--num-processes: expected at least 1 beside --coordinator, found None"),
        ({"coordinator": "here:99", "num_processes": 2}, "--process-id: expected 0 to 1, found None"),
        ({"coordinator": "here:99", "num_processes": 2, "process_id": 2}, "--process-id: expected 0 to 1, found 2"),
    ],
)
def test_processes_that_cannot_meet(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        cluster.check(cluster.Processes(**given))


def test_without_a_cluster_auto_says_so():
    with pytest.raises(ValueError, match=r"--coordinator auto: expected a cluster that JAX detects.* found none"):
        cluster.meet(cluster.Processes("auto"))


@pytest.mark.slow  # waits in vain
def test_who_waits_in_vain_goes_on_alone(monkeypatch):
    shorter = "import experiments.cluster as c; c.TIMEOUT = 3; c._go_to_meeting({!r})"
    original = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda words, **more: original([words[0], "-c", shorter.format(words[-1])], **more)
    )
    said = cluster.meet(cluster.Processes(f"127.0.0.1:{free_port()}", 2, 0))
    assert "not all processes came" in said
    assert "goes on without" in said


@pytest.mark.slow
def test_a_meeting_ends_with_who_sent_it(tmp_path):
    """kill -9 of a process that waits for the others: nothing of it is left, and the port is free again."""
    port = free_port()
    words = ["--smoke", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", "0"]
    process = start(*words, "--out", str(tmp_path))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as trying:
            if trying.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as trying:
            if trying.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.1)
    pytest.fail("somebody still listens")


@pytest.mark.slow
def test_two_processes_of_two_devices_share_a_sweep(undisturbed, tmp_path):
    at = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    both = [start("--out", str(tmp_path), *FLAGS, *at, "--process-id", str(i), devices=2) for i in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    same(tmp_path, undisturbed)
    assert not leftovers(tmp_path)
    # each has measured something, nothing was measured twice, one of them wrote
    made = [
        {line.split("] ", 1)[1] for line in text.splitlines() if line.startswith("[") and "] waiting" not in line}
        for text in said
    ]
    assert made[0], said
    assert made[1], said
    assert not made[0] & made[1]
    assert len(made[0] | made[1]) == 16
    assert sorted("was written by another process" in text for text in said) == [False, True]


def test_a_process_leaves_to_another_what_that_one_is_making(tmp_path):
    parts = [results.Parts(tmp_path, experiment="sweep", config={"a": 1}) for _ in range(2)]
    made = []

    def make(value):
        made.append(value)
        return xr.Dataset({"value": ((), value)})

    def meanwhile():
        assert parts[1].get("one", lambda: make(2)) is None
        return make(1)

    part, was_there = parts[0].get("one", meanwhile)
    assert (int(part["value"]), was_there, made) == (1, False, [1])
    part, was_there = parts[1].get("one", lambda: make(2))
    assert (int(part["value"]), was_there, made) == (1, True, [1])


def test_pieces_of_a_process_that_ended_are_taken_over(tmp_path):
    """One process dies in the middle of its piece: the other waits for it, then makes the piece itself."""
    parts = [results.Parts(tmp_path, experiment="sweep", config={"a": 1}) for _ in range(2)]
    begun, die = threading.Event(), threading.Event()

    def dying():
        begun.set()
        die.wait(10)
        raise KeyboardInterrupt

    def other():
        with pytest.raises(KeyboardInterrupt):
            parts[1].get("one", dying)

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(10)
    threading.Timer(0.5, die.set).start()
    pieces = [
        command.Piece("one", "first", lambda: xr.Dataset({"value": ((), 1)})),
        command.Piece("two", "second", lambda: xr.Dataset({"value": ((), 2)})),
    ]
    found = command.measure(pieces, parts=parts[0])
    thread.join()
    assert [int(part["value"]) for part in found] == [1, 2]


def test_the_last_one_removes_the_parts_and_the_first_one_writes(tmp_path):
    one, other = (results.Parts(tmp_path, experiment="sweep", config={"a": 1}) for _ in range(2))
    make = lambda: xr.Dataset({"value": ((), 1)})
    with one.membership():
        with other.membership():
            other.get("one", make)
            with other.writing() as is_first:
                assert is_first
        assert one.folder.exists(), "the other one is still at it"
        with one.writing() as is_first:
            assert not is_first
        assert one.get("one", lambda: pytest.fail("made twice"))[1]
    assert not one.folder.exists()


def test_a_write_that_failed_is_left_to_the_next(tmp_path):
    parts = results.Parts(tmp_path, experiment="sweep", config={"a": 1})
    with parts.membership():
        with pytest.raises(OSError, match="full"), parts.writing():
            raise OSError("full")
        with parts.writing() as is_first:
            assert is_first


# --- faults ----------------------------------------------------------------------------------------------------------


def test_unreadable_parts_and_results_are_made_again(undisturbed, tmp_path, monkeypatch):
    measured = []
    original = sweep._measure

    def stopping(*words):
        if len(measured) == 9:
            raise KeyboardInterrupt
        measured.append(words[:5])
        return original(*words)

    monkeypatch.setattr(sweep, "_measure", stopping)
    with pytest.raises(SystemExit):
        command.execute(sweep.EXPERIMENT, TINY, command.Options(out=tmp_path))
    (folder,) = tmp_path.glob(".parts-*")
    files = sorted(folder.glob("*.nc"))
    assert len(files) == 9
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-100])
    files[2].write_bytes(os.urandom(2000))
    (folder / ".half-written.nc").write_bytes(b"litter of a killed process")
    (tmp_path / "sweep.nc").write_bytes(b"damaged")
    measured.clear()
    monkeypatch.setattr(sweep, "_measure", lambda *words: (measured.append(words[:5]), original(*words))[1])
    command.execute(sweep.EXPERIMENT, TINY, command.Options(out=tmp_path))
    assert len(measured) == 16 - 9 + 3
    same(tmp_path, undisturbed)
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_a_full_disk_ends_the_sweep_and_loses_nothing(undisturbed, tmp_path):
    """The limit on the size of files stands for the disk: the operating system refuses the write in the same place."""
    words = ["--out", str(tmp_path), *FLAGS]
    code = (
        "import resource, signal, sys; from experiments import command, results, sweep\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); whole = results.save; written = []\n"
        "def save(dataset, path):\n"
        "    written.append(path)\n"
        "    if len(written) == 6: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "    whole(dataset, path)\n"
        "results.save = save; command.main(sweep.EXPERIMENT, sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: [Errno 27] File too large"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    (folder,) = tmp_path.glob(".parts-*")
    assert len(list(folder.glob("[!.]*.nc"))) == 5
    assert not list(folder.glob(".*.nc"))
    process = start(*words)
    said, _ = process.communicate(timeout=300)
    assert "5 of 16 parts were there already" in said
    same(tmp_path, undisturbed)
    assert not leftovers(tmp_path)


def _sweep_in_this_process(folder: str) -> None:
    """What the command does, in a process that has imported everything already; compiled programs are kept."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    command.execute(sweep.EXPERIMENT, TINY, command.Options(out=Path(folder)))


def _events(folder: Path) -> set[str]:
    """Everything that lies in the folder now."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.slow
def test_fifty_kills_change_nothing(undisturbed, tmp_path):
    """kill -9 at random moments, half of them while a file is being written, of either of two processes.

    The processes are forked from one that has imported everything, so that a kill meets work and not imports; it is the
    same code that the command runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_sweep"])
    chance = random.Random(0)
    kills = rounds = 0
    moments = {"any time": 0, "half-written": 0}
    while kills < 50:
        rounds += 1
        folder = tmp_path / f"{rounds}"
        folder.mkdir()
        running: list[multiprocessing.process.BaseProcess] = []
        ended: list[multiprocessing.process.BaseProcess] = []
        for _ in range(5):
            while len(running) < 2:
                process = context.Process(target=_sweep_in_this_process, args=(str(folder),))
                process.start()
                running.append(process)
            deadline = time.monotonic() + chance.uniform(0.0, 3.0)
            moment = "any time"
            wants_file = chance.random() < 0.5
            ignored = chance.randrange(12)
            while time.monotonic() < deadline and all(process.is_alive() for process in running):
                # a temporary name: the file is being written right now
                if wants_file and any(
                    ".nc" in name and "/." in f"/{name.removeprefix('.parts-')}" for name in _events(folder)
                ):
                    if ignored == 0:
                        moment = "half-written"
                        break
                    ignored -= 1
                time.sleep(0.001)
            victim = chance.choice(running)
            victim.kill()
            victim.join()
            if victim.exitcode == -signal.SIGKILL:
                kills += 1
                moments[moment] += 1
            ended += [process for process in running if not process.is_alive()]
            running = [process for process in running if process.is_alive()]
        # one more that nobody disturbs
        running.append(context.Process(target=_sweep_in_this_process, args=(str(folder),)))
        running[-1].start()
        for process in running:
            process.join()
        assert {process.exitcode for process in ended} <= {0, -signal.SIGKILL}
        assert {process.exitcode for process in running} == {0}
        same(folder, undisturbed)
        assert not leftovers(folder)
    assert kills >= 50
    assert moments["half-written"] >= 5, moments


# --- the reproduction ------------------------------------------------------------------------------------------------


def test_unless_done_takes_what_is_there(undisturbed, tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep.nc").write_bytes((undisturbed / "sweep.nc").read_bytes())
    monkeypatch.setattr(sweep, "_measure", lambda *words: pytest.fail("measured again"))
    command.execute(sweep.EXPERIMENT, TINY, command.Options(out=tmp_path, unless_done=True))
    assert "done before with these settings and sources" in capsys.readouterr().out
    monkeypatch.undo()
    other = TINY.__class__(**{**TINY.__dict__, "seeds": 1})
    command.execute(sweep.EXPERIMENT, other, command.Options(out=tmp_path, unless_done=True))
    assert json.loads(results.load(tmp_path / "sweep.nc", experiment="sweep").attrs["config"])["seeds"] == 1
