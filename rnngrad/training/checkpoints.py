"""Checkpoints: everything a resume needs, written whole or not at all, and checked when read.

One checkpoint is one folder named by its step, written by orbax under a temporary name and renamed when complete: a
process killed at any moment leaves the previous ones as they were.  Inside:

* ``arrays``: the bytes of every array of the state and of the best parameters, one after the other.  One array and not
  many, because orbax leaves the reads of the others behind when one of them fails, and they fail later, unasked;
* ``meta``: JSON: format and version, the configuration, names, dtypes and shapes of the arrays in their order, the
  SHA-256 of the bytes, and where the loop stood (best loss, evaluations, metrics not yet averaged, seconds).

The digest is there because storage formats detect a shortened file, but not every flipped bit.  A checkpoint that does
not read back is set aside under the name ``corrupt-<step>`` and the one before it is used, with a warning that says so.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

_FORMAT = "rnngrad.training"
_VERSION = 1
_MISSING = "missing"


class ForeignCheckpointError(ValueError):
    """What lies in the folder was not written by this library, or for another model."""


class CorruptCheckpointError(ValueError):
    """No checkpoint in the folder reads back."""


class ConfigChangedError(ValueError):
    """The checkpoint was made with another configuration."""

    def __init__(self, message: str, changed: dict[str, tuple[Any, Any]]) -> None:
        super().__init__(message)
        self.changed = changed
        """By field: (in the checkpoint, now)."""


class NotWritableError(OSError):
    """The folder cannot be written to, or the disk is full."""


class Restored(NamedTuple):
    """A checkpoint, read."""

    step: int
    tree: Any
    """Of the structure asked for."""
    standing: dict[str, Any]
    """Where the loop stood."""


def _as_numpy(leaf: Any) -> np.ndarray:
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def pack(tree: Any) -> np.ndarray:
    """Returns the bytes of all arrays, one after the other."""
    return np.concatenate([np.ravel(_as_numpy(leaf)).view(np.uint8) for leaf in jax.tree.leaves(tree)])


def _digest(packed: np.ndarray) -> str:
    return hashlib.sha256(packed.data).hexdigest()


def unpack(packed: np.ndarray, like: Any) -> Any:
    """Returns the tree that :func:`pack` packed."""
    leaves, structure = jax.tree.flatten(like)
    unpacked, start = [], 0
    for leaf in leaves:
        array = _as_numpy(leaf)
        found = packed[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        start += array.nbytes
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        # a copy, since JAX on a CPU may work in NumPy's own memory, which training then gives away
        unpacked.append(
            jax.random.wrap_key_data(jax.numpy.array(found), impl=jax.random.key_impl(leaf))
            if is_key
            else jax.numpy.array(found)
        )
    return jax.tree.unflatten(structure, unpacked)


def _shapes(tree: Any) -> dict[str, str]:
    """Returns dtype and shape of every array, by its name and in order."""
    arrays = {
        jax.tree_util.keystr(path).lstrip("."): _as_numpy(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    return {name: f"{array.dtype.name}{list(array.shape)}" for name, array in arrays.items()}


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (expected.get(name, _MISSING), found.get(name, _MISSING))
        for name in sorted({*expected, *found})
        if expected.get(name, _MISSING) != found.get(name, _MISSING)
    }


def _listed(changed: Mapping[str, tuple[Any, Any]], *, most: int = 5) -> str:
    lines = [f"{name}: expected {old!r}, found {new!r}" for name, (old, new) in list(changed.items())[:most]]
    return "; ".join(lines) + (f"; and {len(changed) - most} more" if len(changed) > most else "")


class Checkpoints:
    """A folder of checkpoints of one run.

    Args:
      folder: made if need be.
      config: JSON values that name the run; a checkpoint made with others is refused.  What may change between
        sittings (the number of steps, say) does not belong here.
      keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.folder = Path(folder).resolve()
        # through JSON and back, so that a tuple equals the list that it is read back as
        self.config: dict[str, Any] = json.loads(json.dumps(dict(config)))
        self.keep = keep

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.is_dir() and entry.name.isdecimal())

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, None when there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of a step."""
        return self.folder / str(step)

    def prepare(self) -> None:
        """Makes the folder and tries to write into it.

        Raises:
          NotWritableError: it cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise NotWritableError(
                f"checkpoint folder {self.folder} is not writable: {error.strerror or error}"
            ) from error

    def _manager(self) -> Any:
        import orbax.checkpoint as ocp  # here, because `import rnngrad` does without

        # of several processes one has the checkpoints, and waits for no other
        own = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"rnngrad.{own}"
            ),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, tree: Any, standing: Mapping[str, Any]) -> None:
        """Writes a checkpoint, and removes the oldest ones beyond ``keep``.

        Args:
          step: updates done.
          tree: arrays, PRNG keys among them.
          standing: JSON values.

        Raises:
          NotWritableError: the folder is not writable or the disk is full; older checkpoints stay.
        """
        import orbax.checkpoint as ocp

        packed = pack(tree)
        meta = {
            "format": _FORMAT,
            "version": _VERSION,
            "config": self.config,
            "shapes": _shapes(tree),
            "sha256": _digest(packed),
            "standing": dict(standing),
        }
        self.prepare()
        try:
            with self._manager() as manager:
                items = ocp.args.Composite(
                    arrays=ocp.args.StandardSave({"bytes": packed}), meta=ocp.args.JsonSave(meta)
                )
                manager.save(step, args=items, force=True)
        except (OSError, ValueError) as error:  # the storage layer reports a full disk as ValueError
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NotWritableError(f"checkpoint {self.path(step)} could not be written: {reason}") from error

    def _read(self, step: int, like: Any) -> Restored:
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            self._check_meta(step, meta, like)
            packed = manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))["arrays"][
                "bytes"
            ]
        if _digest(packed) != meta["sha256"]:
            raise ValueError("its arrays have another SHA-256 than when they were written")
        return Restored(step, unpack(packed, like), meta["standing"])

    def _check_meta(self, step: int, meta: Any, like: Any) -> None:
        where = self.path(step)
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise ForeignCheckpointError(f"{where} is no checkpoint of {_FORMAT}; choose another folder")
        if meta["version"] != _VERSION:
            raise ForeignCheckpointError(
                f"{where}: expected version {_VERSION} of the format, found {meta['version']}; choose another folder"
            )
        changed = _differences(meta["config"], self.config)
        if changed:
            raise ConfigChangedError(
                f"{where} was made with another configuration: {_listed(changed)}; choose another folder, or the "
                "former settings to resume",
                changed,
            )
        changed = _differences(meta["shapes"], _shapes(like))
        if changed:
            raise ForeignCheckpointError(f"{where} was made for another model or optimizer: {_listed(changed)}")

    def restore(self, like: Any) -> Restored | None:
        """Returns the newest checkpoint that reads back, None when the folder holds none.

        Args:
          like: a tree of the structure, shapes and dtypes expected.

        Raises:
          ForeignCheckpointError: not ours, or for another model.
          ConfigChangedError: made with another configuration; names the fields.
          CorruptCheckpointError: there are checkpoints, and none reads back.
          NotWritableError: the folder is not writable.
        """
        self.prepare()
        broken: dict[int, str] = {}
        nameless: list[int] = []
        """Steps that do not say whose they are: damaged ones of ours beside one that is, else foreign."""
        for step in reversed(self.steps()):
            if not (self.path(step) / "meta").is_dir():
                nameless.append(step)
                broken[step] = "its meta is missing"
                continue
            try:
                restored = self._read(step, like)
            except (ForeignCheckpointError, ConfigChangedError):
                raise
            except Exception as error:  # storage raises a dozen kinds for a damaged file; all mean the same
                broken[step] = str(error).splitlines()[0] if str(error) else type(error).__name__
                continue
            for bad, reason in broken.items():
                self._set_aside(bad, reason, instead=step)
            return restored
        if nameless:
            raise ForeignCheckpointError(
                f"{self.path(nameless[0])} is no checkpoint of {_FORMAT}; choose another folder"
            )
        if broken:
            steps = ", ".join(f"{step} ({reason})" for step, reason in broken.items())
            raise CorruptCheckpointError(f"no checkpoint in {self.folder} reads back: {steps}; choose another folder")
        return None

    def _set_aside(self, step: int, reason: str, *, instead: int) -> None:
        aside = self.folder / f"corrupt-{step}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder / f"corrupt-{step}-{number}"
        self.path(step).rename(aside)
        warnings.warn(
            f"checkpoint {self.path(step)} does not read back ({reason}): it is now {aside.name}, and training resumes "
            f"from step {instead}",
            UserWarning,
            stacklevel=2,
        )
