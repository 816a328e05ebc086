"""Stored results: netCDF files that say where they come from, written whole or not at all."""

from __future__ import annotations

import ast
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import xarray as xr

_ROOT = Path(__file__).resolve().parent.parent
_RECORDED = ("jax", "jaxlib", "numpy", "scipy", "xarray")


_SEEN = "\n# --- what a person sees"
"""From the line that begins so, a module only shows what was measured."""


def _imported(source: str) -> Iterator[str]:
    """Yields the names of the modules of ``experiments`` that a module imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "experiments":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments."):
            yield str(node.module).removeprefix("experiments.")


def source_digest(experiment: str | None = None) -> str:
    """Returns a digest of the sources that make a result: the code version.

    These are the library, and of ``experiments`` the module and what it imports, each up to the line from which it only
    shows what was measured; without a name, all modules.
    """
    folder = _ROOT / "experiments"
    names = {file.stem for file in folder.glob("*.py")} if experiment is None else {experiment}
    sources: dict[str, bytes] = {}
    while names - set(sources):
        name = min(names - set(sources))
        file = folder / f"{name}.py"
        if not file.is_file():
            raise ValueError(f"expected the module of an experiment, found no experiments.{name}")
        source = file.read_text(encoding="utf-8").partition(_SEEN)[0]
        sources[name] = source.encode()
        names |= set(_imported(source))
    digest = hashlib.sha256()
    for name, content in sorted(sources.items()):
        digest.update(name.encode() + b"\0" + content)
    for file in sorted((_ROOT / "rnngrad").rglob("*.py")):
        digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def provenance(*, experiment: str, command: str, config: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Returns the attributes every stored result carries: what made it, with which versions, on what."""
    device = jax.devices()[0]
    return {
        "experiment": experiment,
        "command": command,
        "config": json.dumps(config, sort_keys=True),
        "rnngrad_version": metadata.version("rnngrad"),
        "source_digest": source_digest(experiment),
        "python": platform.python_version(),
        "versions": json.dumps({name: metadata.version(name) for name in _RECORDED}),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "platform": f"{platform.system()} {platform.machine()}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in facts.items() if value is not None},
    }


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path`` and renames it at the end: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes private files
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # the name must not outlive a power failure that the contents do not
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write does not say where
    finally:
        temporary.unlink(missing_ok=True)


def save(dataset: xr.Dataset, path: Path) -> None:
    """Writes a dataset as compressed netCDF, whole or not at all.

    Raises:
      OSError: the folder is not writable or the disk is full; nothing is left behind and an older file stays.
    """
    encoding = {
        name: {"zlib": True, "complevel": 6}
        for name, variable in dataset.data_vars.items()
        if variable.dtype.kind in "fi"
    }
    # by way of memory: HDF5 itself brings the process down after a write that failed
    content = dataset.to_netcdf(engine="h5netcdf", encoding=encoding)
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def load(path: Path, *, experiment: str) -> xr.Dataset:
    """Returns a stored dataset, in memory.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is unreadable or truncated, or another experiment's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no result file {path}: expected a netCDF file written by experiments.{experiment}")
    try:
        dataset = xr.load_dataset(path, engine="h5netcdf")
    except Exception as error:  # h5py raises a dozen kinds for a damaged file; each means the same to the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable netCDF file (truncated?): {reason}") from error
    found = dataset.attrs.get("experiment")
    if found != experiment:
        raise ValueError(f"{path}: expected a result of experiment {experiment!r}, found {found!r}")
    return dataset


class NotWritableError(OSError):
    """The folder that the user named cannot be written to."""


def writable_folder(path: Path) -> Path:
    """Returns the folder, made if need be, after trying to write into it.

    Raises:
      NotWritableError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise NotWritableError(f"output folder {path} is not writable: {error.strerror or error}") from error
    return path


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Yields whether this process holds the lock of that name: nobody else does, on whatever machine.

    The operating system takes it back when the process ends, whatever way.

    Args:
      path: a file, made if need be; it stays.
      wait: until whoever holds it gives it back.

    Raises:
      OSError: the folder is not writable, or its file system has no locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _locks(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    finally:
        os.close(handle)


def _locks(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NotWritableError(
            f"{error.strerror}: expected a file system with locks (flock), as local disks and NFS 4 have; choose "
            "another folder"
        ) from error
    return True


def _machine() -> dict[str, Any]:
    """Returns what a part's numbers depend on beside settings and sources."""
    names = ("jax_enable_x64", "jax_default_matmul_precision")
    return {
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
        "backend": jax.default_backend(),
        "device": jax.local_devices()[0].device_kind,
        **{name: jax.config.values[name] for name in names},
    }


class Parts:
    """Finished parts of a run, kept so that an interrupted run resumes, and shared by the processes that work on it.

    Parts live in a folder named by a digest of configuration, code, versions of JAX and kind of device, so parts of
    another run are never taken for this one's.  Each is written whole or not at all.  Locks, which have to hold among
    all machines, spare the processes from making a part twice and tell who is still there.
    """

    def __init__(self, folder: Path, *, experiment: str, config: Mapping[str, Any]) -> None:
        identity = json.dumps([experiment, config, source_digest(experiment), _machine()], sort_keys=True)
        self.folder = folder / f".parts-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        self.experiment = f"part of {experiment}"  # never taken for a whole result
        self._half_written = f".{experiment}-*"

    def _read(self, file: Path) -> xr.Dataset | None:
        if file.exists():
            with contextlib.suppress(ValueError, FileNotFoundError):  # unreadable: it is made again
                return load(file, experiment=self.experiment)
        return None

    def get(self, name: str, make: Callable[[], xr.Dataset]) -> tuple[xr.Dataset, bool] | None:
        """Returns the part and whether it was already there; None while another process is making it.

        An unreadable part is made again.
        """
        file, claim = self.folder / f"{name}.nc", self.folder / f".{name}.lock"
        part = self._read(file)
        if part is not None:
            return part, True
        self.folder.mkdir(exist_ok=True)
        with lock(claim) as is_mine:
            if not is_mine:
                return None
            part = self._read(file)  # finished by another process just now
            if part is not None:
                return part, True
            save(make().assign_attrs(experiment=self.experiment), file)
            # read back, so that a run sees the same whether it made a part or found it
            return load(file, experiment=self.experiment), False

    @contextlib.contextmanager
    def membership(self) -> Iterator[None]:
        """Counts this process among those that work on the run.

        Who finds itself alone clears away what killed processes left half done.  Who leaves as the last one removes the
        parts, if it leaves in good order, since then the whole result is written, or if there are none.
        """
        path = self.folder / ".members"
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the last of the others has just removed the folder
                continue
            if _locks(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                (self.folder / _WRITTEN).unlink(missing_ok=True)
                for file in self.folder.glob(".*.nc"):
                    file.unlink(missing_ok=True)
            _locks(handle, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    break
            os.close(handle)
        is_done = False
        try:
            yield
            is_done = True
        finally:
            is_done |= (self.folder / _WRITTEN).exists() or not list(self.folder.glob("*.nc"))
            fcntl.flock(handle, fcntl.LOCK_UN)  # of two that leave at once, one must see that it is the last
            if is_done and _locks(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self.discard()
            os.close(handle)
            with contextlib.suppress(OSError):  # where an open file keeps its folder, as on NFS
                self.folder.rmdir()

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Yields whether this process is to write the whole result: the first one that has all parts."""
        with lock(self.folder / ".writing", wait=True):
            for file in self.folder.parent.glob(self._half_written):  # of a process that was killed while it wrote
                file.unlink(missing_ok=True)
            is_first = not (self.folder / _WRITTEN).exists()
            yield is_first
            (self.folder / _WRITTEN).touch()

    def discard(self) -> None:
        """Removes the parts."""
        with contextlib.suppress(FileNotFoundError):
            # the members' file last: without it the next one makes a folder of its own
            for file in sorted(self.folder.iterdir(), key=lambda file: file.name == ".members"):
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a process of a new run has come in meanwhile
                self.folder.rmdir()


_WRITTEN = ".written"
