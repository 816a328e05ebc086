"""Weights from files of other libraries, as arrays by name; nothing in a file is ever run.

============================  ==========================================================================================
file                          names
============================  ==========================================================================================
``.safetensors``              as stored, e.g. ``encoder.lstm.weight_ih_l0``
``.npz``, ``.npy``            the names given to ``np.savez``; one array is ``""``
``.keras``, ``.h5``           groups joined by dots, e.g. ``layers.gru.cell.vars.0``
``.msgpack`` (Flax)           keys joined by dots, e.g. ``params.cell.hf.kernel``
a folder (orbax)              likewise; entries of a list by their number
============================  ==========================================================================================

``flax.traverse_util.unflatten_dict(weights, sep=".")`` nests dotted names again, for :func:`rnngrad.interop.adapt`.

A file's size, and the size of every array that it announces, are compared with what the file holds and with
``max_bytes`` before memory is taken: an array may be at most 1,032 times what is stored of it (the most that deflate
compresses), whatever the file says.  Orbax stores nothing of an array of zeros, so there ``max_bytes`` alone counts.
Pickles (``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.pkl`` and whatever looks like one) are programs and are refused.
HDF5 links, external and virtual data sets and filters that h5py does not bring are refused as well.

The bytes themselves are parsed by the libraries that define the formats: safetensors, h5py, flax, orbax.  A flaw in one
of them is beyond these checks; files from strangers belong into a process of their own.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_EXTENSIONS = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".npy": "npy",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".keras": "keras",
    ".msgpack": "msgpack",
}
_PICKLED = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
_SUPPORTED = ".safetensors, .npz, .npy, .h5, .keras, .msgpack or an orbax folder"
_MAX_RATIO = 1032
"""Most bytes that deflate makes of one (zlib's technical notes)."""
_ALWAYS_ALLOWED = 2**20
"""Bytes of an array that need no stored counterpart: HDF5 leaves out what equals the fill value."""
_MAX_DEPTH = 64
"""Levels of nesting in any file; the deepest models have about 20."""
_MAX_HEADER = 100_000_000
"""Bytes of a safetensors header (the library's own limit)."""
_MAX_VALUES = 1_000_000
"""Values in msgpack, of which an array is about six; each takes a microsecond and up to 64 bytes to read."""
_FILTERS = frozenset({1, 2, 3, 6, 32000})
"""HDF5's registered numbers of deflate, shuffle, fletcher32, scale-offset and of the lzf that h5py brings."""


def read_weights(path: str | os.PathLike[str], *, max_bytes: int = 8 * 2**30) -> dict[str, np.ndarray]:
    """Returns the arrays of a weight file by name, nested names joined by dots; see the module docstring.

    Args:
      path: a file, or the folder of an orbax checkpoint.
      max_bytes: most bytes that all arrays together may take.

    Returns:
      Arrays in the file's order and dtype; bfloat16 is that of ml_dtypes.  They may contain NaN.

    Raises:
      FileNotFoundError: no such file; names similar ones.
      PermissionError: it cannot be read.
      ImportError: the format needs ``pip install "rnngrad[weights]"``.
      ValueError: a pickle, an unknown format, content that contradicts the extension, a damaged file, something other
        than numbers, or more than ``max_bytes``.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.npz"
    >>> np.savez(path, w_ih=np.ones((4, 3)))
    >>> read_weights(path)["w_ih"].shape
    (4, 3)
    """
    path = Path(path)
    arrays = _read_orbax(path, max_bytes) if _kind_of_path(path) == "folder" else _read_file(path, max_bytes)
    if not arrays:
        raise ValueError(f"{path}: expected arrays, found none")
    return arrays


def _read_file(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    with _opened(path) as file:
        kind = _format(path, file)
        if kind == "npz":
            return _read_npz(path, file, max_bytes)
        if kind == "npy":
            with _parsing(path, "npy array"):
                return {"": _read_npy(path, file, path.stat().st_size, max_bytes)}
        if kind == "HDF5":
            return _read_hdf5(path, file, max_bytes)
        if kind == "keras":
            return _read_hdf5(path, _keras_member(path, file, "model.weights.h5", max_bytes), max_bytes)
        # what these two hold lies in them uncompressed
        _check_size(path, path.stat().st_size, max_bytes)
        return _read_safetensors(path, file) if kind == "safetensors" else _read_msgpack(path, file.read())


def read_keras_config(path: str | os.PathLike[str], *, max_bytes: int = 2**26) -> dict[str, Any] | None:
    """Returns the description of the model that Keras stored with its weights, None when there is none.

    Args:
      path: a ``.keras`` file, or an ``.h5`` one, which has a description only when the whole model was saved.
      max_bytes: most bytes that the description may take.

    Raises:
      ValueError: as in :func:`read_weights`.
    """
    path = Path(path)
    if _kind_of_path(path) == "folder":
        return None
    with _opened(path) as file:
        kind = _format(path, file)
        if kind == "keras":
            text: Any = _keras_member(path, file, "config.json", max_bytes).read()
        elif kind == "HDF5":
            with _parsing(path, "HDF5 file"), _h5py().File(file, "r") as root:
                if "model_config" not in root.attrs:
                    return None
                _check_size(path, root.attrs.get_id("model_config").get_storage_size(), max_bytes)
                text = root.attrs["model_config"]
        else:
            return None
    with _parsing(path, "model description"):
        config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a model description, found a {type(config).__name__}")
    return config


# --- which format ----------------------------------------------------------------------------------------------------


def _kind_of_path(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        folder = path.parent
        near = difflib.get_close_matches(path.name, os.listdir(folder) if folder.is_dir() else [], n=3, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise FileNotFoundError(f"{path}: no such file{hint}") from None
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file or a folder, found a device, pipe or socket")
    return "file"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    try:
        file = path.open("rb")
    except PermissionError:
        raise PermissionError(f"{path}: no permission to read it") from None
    with file:
        yield file


@contextlib.contextmanager
def _parsing(path: Path, what: str) -> Iterator[None]:
    """Names the file in whatever a parser says of it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, EOFError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise _damaged(path, what, error) from error
    except (OSError, RuntimeError, NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise _damaged(path, what, error) from error


def _damaged(path: Path, what: str, error: Exception) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(f"{path}: expected a sound {what}, found a damaged one: {lines[0]}")


def _check_size(path: Path, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ValueError(f"{path}: expected at most max_bytes = {max_bytes:,} bytes of arrays, found {num_bytes:,}")


def _format(path: Path, file: io.BufferedIOBase) -> str:
    """Returns the format, from the content where that tells, checked against the extension."""
    extension = path.suffix.lower()
    head = file.read(16)
    file.seek(0)
    if not head:
        raise ValueError(f"{path}: expected {_SUPPORTED}, found an empty file")
    found = _content(path, file, head)
    if extension in _PICKLED or found == "pickle":
        raise ValueError(_refusal(path, extension))
    expected = _EXTENSIONS.get(extension)
    weak = found in (None, "safetensors", "msgpack")
    if expected in ("safetensors", "msgpack") and weak:
        return expected  # their first bytes tell little; their parsers say what is wrong
    if expected is not None and found != expected:
        raise ValueError(f"{path}: expected {expected}, as its name says, found {found or 'something unknown'}")
    if found is None:
        raise ValueError(f"{path}: expected {_SUPPORTED}, found something else")
    return found


def _content(path: Path, file: io.BufferedIOBase, head: bytes) -> str | None:
    """Returns what the first bytes look like, None for nothing known."""
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "HDF5"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PK"):
        with _parsing(path, "zip archive"), zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        file.seek(0)
        if any(name.rpartition("/")[2] == "data.pkl" for name in names):
            return "pickle"
        if "model.weights.h5" in names:
            return "keras"
        return "npz" if all(name.endswith(".npy") for name in names) else "another zip archive"
    # protocols 2 to 5; an empty msgpack map is 0x80 alone
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return "pickle"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"
    # maps of 1 to 15 entries, of 16 bits and of 32
    return "msgpack" if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF) else None


def _refusal(path: Path, extension: str) -> str:
    name, target = path.name, path.with_suffix(".safetensors").name
    if extension in (".pkl", ".pickle"):
        lines = (
            f'weights = pickle.load(open("{name}", "rb"))',
            f'safetensors.numpy.save_file(weights, "{target}")',
        )
    else:
        lines = (
            f'weights = torch.load("{name}", map_location="cpu", weights_only=True)',
            "safetensors.torch.save_file("
            f'{{name: leaf.contiguous().clone() for name, leaf in weights.items()}}, "{target}")',
        )
    return (
        f"{path}: expected {_SUPPORTED}, found a pickle, which is a program; it was not opened. "
        "Where you trust it, these lines make a file that is read here:\n    " + "\n    ".join(lines)
    )


# --- the formats -----------------------------------------------------------------------------------------------------


def _put(path: Path, arrays: dict[str, Any], name: str, array: Any) -> None:
    if name in arrays:
        raise ValueError(f"{path}: expected names to be unique, found {name!r} twice")
    arrays[name] = array


def _is_number(dtype: np.dtype) -> bool:
    # the types of ml_dtypes call themselves void
    return dtype.kind in "fiubc" or (dtype.kind == "V" and dtype.names is None and dtype.type.__module__ == "ml_dtypes")


def _check_array(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, stored: int | None) -> int:
    """Returns the bytes of an array that a file announces, after comparing them with what is stored of it."""
    if not _is_number(dtype):
        raise ValueError(f"{path}: {name!r}: expected numbers, found dtype {dtype}")
    if any(size < 0 for size in shape):
        raise ValueError(f"{path}: {name!r}: expected sizes of 0 or more, found shape {shape}")
    widest = 16 if dtype.kind == "c" else 8
    if dtype.itemsize > widest:
        raise ValueError(
            f"{path}: {name!r}: expected numbers of at most {widest} bytes, as JAX has them, found dtype {dtype}"
        )
    num_bytes = math.prod(shape) * dtype.itemsize
    if stored is not None and num_bytes > _MAX_RATIO * stored + _ALWAYS_ALLOWED:
        raise ValueError(
            f"{path}: {name!r}: expected an array that fits the {stored:,} bytes stored of it, found shape {shape} of "
            f"{dtype}, {num_bytes:,} bytes"
        )
    return num_bytes


def _read_safetensors(path: Path, file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f'{path}: to read safetensors, pip install "rnngrad[weights]"') from error
    (header_size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    most = min(max(path.stat().st_size - 8, 0), _MAX_HEADER)
    if header_size > most:
        raise ValueError(
            f"{path}: expected a safetensors header of at most {most:,} bytes (the rest of the file, and never more "
            f"than {_MAX_HEADER:,}), found one of {header_size:,}"
        )

    def check_unique(pairs):
        # the library keeps the last of two entries of one name, and says nothing
        entries: dict[str, None] = {}
        for name, _ in pairs:
            _put(path, entries, name, None)

    arrays: dict[str, np.ndarray] = {}
    try:
        # it checks offsets and shapes against the file's size before it reads
        with safetensors.safe_open(str(path), framework="np") as tensors:
            with _parsing(path, "safetensors file"):
                json.loads(file.read(header_size), object_pairs_hook=check_unique)
            for name in tensors.keys():
                with _parsing(path, f"tensor {name!r}"):
                    try:
                        arrays[name] = tensors.get_tensor(name)
                    except AttributeError:  # it looks for the dtype in NumPy
                        found = tensors.get_slice(name).get_dtype()
                        raise ValueError(
                            f"{path}: {name!r}: expected numbers that NumPy has, found dtype {found}"
                        ) from None
    except safetensors.SafetensorError as error:
        raise _damaged(path, "safetensors file", error) from error
    return arrays


def _read_npy(path: Path, file: Any, size: int, max_bytes: int, name: str = "") -> np.ndarray:
    """Returns one array from a stream of ``size`` bytes."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy version {version}, which only records have")
    shape, fortran_order, dtype = readers[version](file)
    num_bytes = _check_array(path, name, shape, dtype, None)
    if num_bytes != size - file.tell():
        raise ValueError(
            f"{path}: {name!r}: expected {num_bytes:,} bytes for shape {shape} of {dtype}, found {size - file.tell():,}"
        )
    _check_size(path, num_bytes, max_bytes)
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise ValueError(f"{path}: {name!r}: expected {num_bytes:,} bytes, found {len(data):,}")
    # a copy, since an array over bytes cannot be written to
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C").copy()


def _check_members(path: Path, members: list[zipfile.ZipInfo], max_bytes: int) -> None:
    for member in members:
        if member.flag_bits & 1:
            raise ValueError(f"{path}: {member.filename!r}: expected plain data, found it encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{path}: {member.filename!r}: expected stored or deflated data, found method {member.compress_type}"
            )
        stored = min(member.compress_size, path.stat().st_size)
        if member.file_size > _MAX_RATIO * stored:
            raise ValueError(
                f"{path}: {member.filename!r}: expected at most {_MAX_RATIO} times the {stored:,} bytes stored, found "
                f"{member.file_size:,} announced"
            )
    _check_size(path, sum(member.file_size for member in members), max_bytes)


def _read_npz(path: Path, file: io.BufferedIOBase, max_bytes: int) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with _parsing(path, "npz archive"), zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_members(path, members, max_bytes)
        for member in members:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as stream, _parsing(path, f"array {name!r}"):
                _put(path, arrays, name, _read_npy(path, stream, member.file_size, max_bytes, name))
    return arrays


def _keras_member(path: Path, file: io.BufferedIOBase, name: str, max_bytes: int) -> io.BytesIO:
    with _parsing(path, "keras archive"), zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if member.filename == name]
        if len(members) != 1:
            raise ValueError(f"{path}: expected one {name!r}, found {len(members)}")
        _check_members(path, members, max_bytes)
        return io.BytesIO(archive.read(members[0]))


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise ImportError('to read HDF5 and Keras files, pip install "rnngrad[weights]"') from error
    return h5py


def _read_hdf5(path: Path, file: io.BufferedIOBase, max_bytes: int) -> dict[str, np.ndarray]:
    h5py = _h5py()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found: dict[str, Any] = {}
    seen: set[Any] = set()
    total = 0

    def walk(group: Any, prefix: str, depth: int) -> None:
        nonlocal total
        if depth > _MAX_DEPTH:
            raise ValueError(f"{path}: expected at most {_MAX_DEPTH} levels of groups, found more")
        if group in seen:
            raise ValueError(f"{path}: {prefix!r}: expected every group once, found it linked twice")
        seen.add(group)
        for key in group:
            name = f"{prefix}.{key}" if prefix else key
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"{path}: {name!r}: expected data, found a {type(link).__name__}")
            child = group[key]
            if isinstance(child, h5py.Group):
                walk(child, name, depth + 1)
            elif isinstance(child, h5py.Dataset):
                total += _check_dataset(path, name, child, size)
                _check_size(path, total, max_bytes)
                _put(path, found, name, child)
            else:
                raise ValueError(f"{path}: {name!r}: expected arrays, found a named {type(child).__name__}")

    with _parsing(path, "HDF5 file"), h5py.File(file, "r") as root:
        walk(root, "", 0)
        return {name: np.asarray(dataset[()]) for name, dataset in found.items()}


def _check_dataset(path: Path, name: str, dataset: Any, size: int) -> int:
    """Returns the bytes of a data set, after comparing them with what the file of ``size`` bytes stores of it."""
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{path}: {name!r}: expected data in the file, found a reference to another one")
    if dataset.shape is None:
        raise ValueError(f"{path}: {name!r}: expected an array, found an empty data set")
    stored = dataset.id.get_storage_size()
    if stored > size:
        raise ValueError(f"{path}: {name!r}: expected at most {size:,} stored bytes, the file's size, found {stored:,}")
    properties = dataset.id.get_create_plist()
    filters = {properties.get_filter(index)[0] for index in range(properties.get_nfilters())}
    if not filters <= _FILTERS:
        raise ValueError(f"{path}: {name!r}: expected the filters of h5py, found numbers {sorted(filters - _FILTERS)}")
    if dataset.chunks is not None:
        # a chunk is unpacked whole, also where the array ends inside of it
        _check_array(path, name, dataset.chunks, dataset.dtype, stored)
    return _check_array(path, name, dataset.shape, dataset.dtype, stored)


def _read_msgpack(path: Path, data: bytes) -> dict[str, np.ndarray]:
    from flax import serialization

    with _parsing(path, "Flax msgpack"):
        _check_msgpack(data)
        return _flatten(path, serialization.msgpack_restore(data))


def _check_msgpack(data: bytes) -> None:
    """Raises ValueError unless every length in ``data`` fits the bytes behind it, and depth and values are bounded.

    The parser takes memory for a list when it reads its length, so that lists within lists of a length that the file
    could hold once would take it many times over.
    """
    view = memoryview(data)
    # type byte -> (bytes of the length that follows, values that an entry has; 0 for bytes)
    sized = {
        **dict.fromkeys((0xC4, 0xD9), (1, 0)),
        **dict.fromkeys((0xC5, 0xDA), (2, 0)),
        **dict.fromkeys((0xC6, 0xDB), (4, 0)),
        **{0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)},
    }
    plain = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
    plain |= {0xCC + power: 2**power for power in range(4)} | {0xD0 + power: 2**power for power in range(4)}
    extensions = {0xC7: 1, 0xC8: 2, 0xC9: 4}
    num_values = 0

    def check(start: int, end: int, depth: int) -> None:
        """Checks the one value that ``view[start:end]`` should be."""
        nonlocal num_values
        pending = [1]  # values still to come, by level
        while pending:
            if pending[-1] == 0:
                pending.pop()
                continue
            if start >= end:
                raise ValueError("it ends too early")
            # what is announced on all levels together needs at least a byte each
            if sum(pending) > end - start:
                raise ValueError(f"{sum(pending):,} more values announced than the {end - start:,} bytes left can be")
            if num_values + sum(pending) > _MAX_VALUES:
                raise ValueError(f"more than {_MAX_VALUES:,} values beside the bytes of arrays")
            if len(pending) + depth > _MAX_DEPTH:
                raise ValueError(f"more than {_MAX_DEPTH} levels of nesting")
            pending[-1] -= 1
            num_values += 1
            kind = view[start]
            start += 1
            if kind <= 0x7F or kind >= 0xE0:
                continue
            if kind in plain:
                start += plain[kind]
            elif 0xA0 <= kind <= 0xBF:
                start += kind & 0x1F
            elif kind <= 0x9F:
                pending.append((kind & 0x0F) * (1 if kind >= 0x90 else 2))
            elif kind in sized:
                width, values = sized[kind]
                length = int.from_bytes(view[start : start + width], "big")
                start += width
                if values:
                    pending.append(length * values)
                else:
                    start += length
            elif kind in extensions or 0xD4 <= kind <= 0xD8:
                width = extensions.get(kind, 0)
                length = int.from_bytes(view[start : start + width], "big") if width else 2 ** (kind - 0xD4)
                start += width + 1  # behind the length stands the extension's number
                if start + length > end:
                    raise ValueError(f"{length:,} bytes announced, {max(end - start, 0):,} left")
                check(start, start + length, depth + len(pending))  # Flax packs an array as msgpack in an extension
                start += length
            else:
                raise ValueError(f"byte {kind:#x}, which begins nothing")
        if start != end:
            raise ValueError("it ends too early" if start > end else f"{end - start:,} bytes behind its end")

    check(0, len(view), 0)


def _flatten(path: Path, tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of nested dictionaries and lists by dotted names; None is no leaf."""
    arrays: dict[str, np.ndarray] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict | list | tuple):
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                walk(child, f"{name}.{key}" if name else str(key))
        elif node is not None:
            array = np.asarray(node)
            _check_array(path, name, array.shape, array.dtype, None)
            _put(path, arrays, name, array)

    walk(tree, "")
    return arrays


def _read_orbax(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    folder = _orbax_item(path).resolve()
    import jax
    import orbax.checkpoint as ocp

    with _parsing(path, "orbax checkpoint"), ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(folder).item_metadata
        if found is None:  # orbax logs what it could not read
            raise ValueError("its metadata does not read back")
        tree = found.tree
        has_shape = lambda leaf: hasattr(leaf, "shape")
        leaves = [leaf for leaf in jax.tree.leaves(tree, is_leaf=has_shape) if has_shape(leaf) and leaf.shape]
        total = sum(_check_array(path, leaf.name, tuple(leaf.shape), np.dtype(leaf.dtype), None) for leaf in leaves)
        _check_size(path, total, max_bytes)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree, is_leaf=has_shape)
        return _flatten(path, checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy)))


def _orbax_item(path: Path) -> Path:
    """Returns the folder of the one tree in a checkpoint, which a manager puts into a folder of its own."""
    if (path / "_METADATA").is_file():
        return path
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    items = [entry for entry in folders if (entry / "_METADATA").is_file()]
    if len(items) == 1:
        return items[0]
    steps = sorted((entry.name for entry in folders if entry.name.isdecimal()), key=int)
    if items:
        found = "the items " + ", ".join(entry.name for entry in items)
    elif steps:
        found = "the steps " + ", ".join(steps)
    else:
        raise ValueError(f"{path}: expected an orbax checkpoint, found a folder without one")
    raise ValueError(f"{path}: expected one checkpoint, found {found}; name one of these folders")
