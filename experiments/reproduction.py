"""The reproduction: every experiment in a process of its own, resumed where it stopped, with a report of what stands.

A process of its own, because a claim that crashes, whatever way, must not take the others along.  What an experiment
prints goes into ``logs/<name>.log``; the lines ``[done/all] label`` that it prints per piece move the progress bar.
A finished result is not made again when it was made by the same sources with the same settings; it is said so.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import rich.console
import rich.progress
import xarray as xr

from experiments import cluster, command, registry, results
from experiments.claims import Check, Verdict
from experiments.command import Experiment, UserError

State = Literal["done", "done before", "older sources", "other settings", "crashed", "missing"]
"""done before: and so not run again; older sources, other settings: the result of such is there, and shown."""
SOUND = ("done", "done before", "older sources")
"""States in which there is a verdict on the claims as they are tried here."""


class Standing(NamedTuple):
    """What a folder holds of one experiment."""

    experiment: Experiment
    state: State
    reason: str
    """Why there is no sound result; empty when there is."""
    dataset: xr.Dataset | None = None
    checks: tuple[Check, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


def _note(name: str, folder: Path) -> Path:
    """Where it is written down why an experiment failed, if it did."""
    return folder / "logs" / f"{name}.failed"


def _failure(name: str, folder: Path) -> str | None:
    """Why an experiment failed, unless it was made anew since."""
    note, result = _note(name, folder), folder / f"{name}.nc"
    try:
        is_older = result.exists() and note.stat().st_mtime < result.stat().st_mtime
        return None if is_older else note.read_text(encoding="utf-8")
    except OSError:
        return None


def standing(experiment: Experiment, folder: Path, *, smoke: bool = False) -> Standing:
    """Returns what ``folder`` holds of an experiment, its verdicts recomputed from the stored data."""
    file = folder / f"{experiment.name}.nc"
    failure = _failure(experiment.name, folder)
    try:
        dataset = results.load(file, experiment=experiment.name)
        checks, verdicts = tuple(experiment.verdict(dataset)), tuple(experiment.verdicts(dataset))
        is_of = command.is_of(dataset, experiment.smoke if smoke else experiment.default)
        is_new = dataset.attrs["source_digest"] == results.source_digest(experiment.name)
        float(dataset.attrs["seconds"])
        json.loads(dataset.attrs["versions"])
    except FileNotFoundError:
        return Standing(experiment, "crashed", failure) if failure else Standing(experiment, "missing", "not run yet")
    except Exception as error:  # whatever a damaged or foreign file makes of a verdict, the others go on
        return Standing(experiment, "crashed", failure or f"{type(error).__name__}: {error}")
    state: State = "done" if is_new else "older sources"
    reason = ""
    if failure:
        state, reason = "crashed", failure
    elif not is_of:
        state, reason = "other settings", "the result that is there was made with other settings"
    return Standing(experiment, state, reason, dataset, checks, verdicts)


_MESSAGE = re.compile(r"(error: |[\w.]*(Error|Exception)\b).*")


def _last_words(text: str) -> str:
    """The last line that looks like the message of an error, else the last that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    messages = [line for line in lines if _MESSAGE.match(line)]
    return (messages or lines or ["no output"])[-1][:500]


_DONE_OF_ALL = re.compile(r"\[(\d+)/(\d+)\] (.*)")


class _Processes:
    """The processes under way, so that an interruption reaches all of them."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
        with self.lock:
            if self.stopped.is_set():
                return None
            process = subprocess.Popen(
                words,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                # in a group of its own: an interruption from the keyboard is passed on by us, once
                start_new_session=True,
            )
            self.running.add(process)
            return process

    def stop(self) -> None:
        """Interrupts all; who has not ended after ten seconds is killed, and loses the piece under way."""
        with self.lock:
            self.stopped.set()
            running = list(self.running)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def end(self, process: subprocess.Popen[str]) -> int:
        """Returns the exit code of a process that has closed its output, or is no longer listened to."""
        with self.lock:
            self.running.discard(process)
        return process.wait()


def program(name: str) -> list[str]:
    """Returns the words that start an experiment in a process of its own."""
    return [sys.executable, "-m", f"experiments.{name}"]


def _run_one(
    name: str, folder: Path, log_file: Path, *, smoke: bool, processes: _Processes, bar: rich.progress.Progress
) -> tuple[str | None, float]:
    """Returns why the experiment failed, None if it did not, and the seconds it took."""
    environment = dict(os.environ, MPLBACKEND="Agg", PYTHONUNBUFFERED="1", COLUMNS="150", PYTHONIOENCODING="utf-8")
    environment["JAX_TRACEBACK_FILTERING"] = "off"  # else a traceback ends in a remark on its filtering
    if smoke:  # nearly all of it is compiling
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    environment |= cluster.visible_devices()
    words = [*program(name), "--out", str(folder), "--unless-done", *(["--smoke"] if smoke else [])]
    started = time.perf_counter()
    process = processes.start(words, environment)
    if process is None or process.stdout is None:
        return "interrupted", 0.0
    task = bar.add_task(f"  {name}", total=None)
    said: list[str] = []
    try:
        with process.stdout as lines, log_file.open("w", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                said.append(line)
                matched = _DONE_OF_ALL.match(line)
                if matched:
                    done, of_all, label = matched.groups()
                    bar.update(task, completed=int(done), total=int(of_all), description=f"  {name}: {label}")
    except BaseException:
        process.kill()  # nobody reads what it says any more
        raise
    finally:
        code = processes.end(process)
    bar.remove_task(task)
    seconds = time.perf_counter() - started
    if code == 0:
        return None, seconds
    if code == 130 or processes.stopped.is_set():
        return "interrupted", seconds
    killed = f"killed by signal {-code}: " if code < 0 else ""
    return killed + _last_words("".join(said)), seconds


class Reproduced(NamedTuple):
    """How a reproduction went."""

    standings: list[Standing]
    interrupted: bool


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end the run like an interruption from the keyboard, so that no child is left behind."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    # but for one that is ignored, as under nohup
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reproduce(
    names: Sequence[str], folder: Path, *, smoke: bool, jobs: int, screen: rich.console.Console
) -> Reproduced:
    """Runs the experiments into ``folder``, ``jobs`` at a time, and returns what stands there afterwards.

    Raises:
      NotWritableError: the folder cannot be written to.
      UserError: a smoke run would replace full results.
    """
    results.writable_folder(folder / "logs")
    experiments = {experiment.name: experiment for experiment in registry.experiments(names)}
    if smoke:
        for experiment in experiments.values():
            is_other = standing(experiment, folder, smoke=True).state == "other settings"
            if is_other and standing(experiment, folder).state in SOUND:
                raise UserError(f"{folder} holds full results, which --smoke would replace; choose another folder")
    done_before: set[str] = set()
    others: list[str] = []  # what is left to other machines at first
    processes, interrupted, lock = _Processes(), False, threading.Lock()
    with command.progress(screen) as bar, _terminable():
        whole = bar.add_task("all claims", total=len(names))

        def one(name: str, *, join: bool) -> bool:
            """Runs one experiment, unless another machine is at it and ``join`` is not asked for: then returns True."""
            with results.lock(folder / "logs" / f".{name}.lock") as is_first:
                if not is_first and not join:
                    return True
                with lock:  # reading netCDF is not for two threads at a time
                    at = standing(experiments[name], folder, smoke=smoke)
                if at.state == "done" and all(file.exists() for file in experiments[name].picture_files(folder)):
                    # drawn last: without its pictures a result is not finished, whatever stopped it
                    done_before.add(name)
                    screen.print(f"{name}: done before with these settings and sources", highlight=False)
                    bar.advance(whole)
                    return False
                if is_first and at.state in ("other settings", "older sources"):
                    screen.print(f"{name}: a result is there, but of {at.state}: made again", highlight=False)
                ending = "" if is_first else f"-{socket.gethostname()}-{os.getpid()}"
                attempt(name, folder / "logs" / f"{name}{ending}.log")
            return False

        def attempt(name: str, log_file: Path) -> None:
            nonlocal interrupted
            _note(name, folder).unlink(missing_ok=True)  # what crashed before is tried again
            try:
                reason, seconds = _run_one(name, folder, log_file, smoke=smoke, processes=processes, bar=bar)
            except OSError as error:  # a full disk, say
                reason, seconds = f"{type(error).__name__}: {error}", 0.0
            if reason == "interrupted":
                interrupted = True
                return
            if reason is not None:
                with contextlib.suppress(OSError):  # a full disk: said on the screen alone
                    _note(name, folder).write_text(reason, encoding="utf-8")
                screen.print(f"[bold]{name}: crashed[/bold] after {seconds:.0f} s: ", end="")
                screen.print(f"{reason} (logs/{log_file.name})", markup=False, highlight=False)
            else:
                screen.print(f"{name}: done after {seconds:.0f} s", highlight=False)
            bar.advance(whole)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            try:
                # first what nobody is at, then a hand for the others
                for join, left in ((False, list(names)), (True, others)):
                    futures = {pool.submit(one, name, join=join): name for name in left}
                    for future in concurrent.futures.as_completed(futures):
                        if future.result():
                            others.append(futures[future])
            except BaseException as error:
                processes.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                if not isinstance(error, KeyboardInterrupt):
                    raise
                interrupted = True
    after = []
    for name, experiment in experiments.items():
        now = standing(experiment, folder, smoke=smoke)
        if name in done_before and now.state == "done":
            now = now._replace(state="done before")
        after.append(now)
    return Reproduced(after, interrupted)
