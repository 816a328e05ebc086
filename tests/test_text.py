"""Text: loading with digests, failing downloads, tokens, parts, windows, streams. Needs no network and no data."""

import hashlib
import io
import itertools
import os
import platform
import re
import sys
import urllib.error
from collections import Counter
from email.message import Message
from http.client import IncompleteRead
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnngrad.tasks import Text, Tokens, encode, load_text, sequences, split, streams, text, tokenize

DATA = os.environ.get("RNNGRAD_DATA")
CONTENT = b" a small <unk> text \n it has N lines \n"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
# name -> where it lies in a data folder
PLACES = {
    "ptb:valid": "ptb/ptb.valid.txt",
    "ptb:test": "ptb/ptb.test.txt",
    "ptb:train": "ptb/ptb.train.txt",
    "tinyshakespeare": "tinyshakespeare/input.txt",
}
named = pytest.mark.parametrize("name", PLACES)


class Response(io.BytesIO):
    """What urlopen returns; `declared` is its Content-Length, `failure` is raised when `content` is used up."""

    def __init__(self, content: bytes, declared: int | None = None, failure: BaseException | None = None):
        super().__init__(content)
        self.failure = failure
        self.headers = Message()
        if declared is not None:
            self.headers["Content-Length"] = str(declared)

    def read(self, size=-1):
        chunk = super().read(min(size, 10) if size > 0 else size)  # several chunks even of a small text
        if not chunk and self.failure is not None:
            raise self.failure
        return chunk


class Server:
    """Stands in for urlopen: gives `answer` (a response, or an error to raise) and counts."""

    def __init__(self):
        self.requests: list[tuple[str, float | None]] = []
        self.answer: Response | BaseException = OSError("the network is unreachable")

    def urlopen(self, url, *, timeout=None):
        self.requests.append((url, timeout))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr("urllib.request.urlopen", server.urlopen)
    return server


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The cache folder, which does not exist yet; nothing of the caller's environment is seen."""
    monkeypatch.delenv("RNNGRAD_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rnngrad"


def digest_like(entry) -> str:
    """The digest of CONTENT by the algorithm that the entry uses."""
    algorithm = entry.digest.split(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()}"


@pytest.fixture
def small_files(monkeypatch):
    """Lets CONTENT pass for every public file."""
    for name, entry in text.PUBLIC_FILES.items():
        words = None if entry.num_words is None else len(tokenize(CONTENT.decode()).ids)
        monkeypatch.setitem(text.PUBLIC_FILES, name, entry._replace(digest=digest_like(entry), num_words=words))


def write(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def message_of(error: type[Exception], *args, **kwargs) -> str:
    """The message of the error that load_text raises, which must be of one line and of exactly that type."""
    with pytest.raises(error) as caught:
        load_text(*args, **kwargs)
    assert caught.type is error
    message = str(caught.value)
    assert "\n" not in message
    return message


# The text that is always there


def test_pydoc_is_the_default_and_says_what_it_is():
    loaded = load_text()
    assert loaded == load_text("pydoc")
    assert loaded.name == "pydoc"
    assert loaded.digest == hashlib.sha256(loaded.text.encode()).hexdigest()
    assert loaded.source == f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}"
    assert len(tokenize(loaded).ids) > 50_000  # 76,953 in CPython 3.11.7, growing with each release


def test_pydoc_does_not_depend_on_the_order_of_the_topics(monkeypatch):
    from pydoc_data.topics import topics

    before = load_text("pydoc")
    monkeypatch.setattr("pydoc_data.topics.topics", dict(reversed(topics.items())))
    assert load_text("pydoc") == before


def test_python_without_pydoc_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "installed without pydoc_data" in message_of(FileNotFoundError, "pydoc")


# Any file


@pytest.mark.parametrize("make", [str, Path], ids=["str", "path"])
def test_file(tmp_path, make):
    path = write(tmp_path / "notes.txt")
    assert load_text(make(path)) == Text("notes.txt", CONTENT.decode(), DIGEST, "notes.txt")


def test_source_and_name_hold_no_path(tmp_path, small_files):
    write(tmp_path / "ptb.test.txt")
    for loaded in (load_text(tmp_path / "ptb.test.txt"), load_text("ptb:test", data_dir=tmp_path)):
        assert str(tmp_path) not in repr(loaded)
        assert "/" not in loaded.name + loaded.source


def test_a_path_object_is_never_a_name(tmp_path, monkeypatch):
    write(tmp_path / "pydoc")
    monkeypatch.chdir(tmp_path)
    assert load_text(Path("pydoc")).digest == DIGEST
    assert load_text("./pydoc").digest == DIGEST
    assert load_text("pydoc").digest != DIGEST


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "notes.txt")
    assert load_text("~/notes.txt").digest == DIGEST


def test_line_ends_and_byte_order_mark_do_not_reach_the_text_but_the_digest(tmp_path):
    raw = b"\xef\xbb\xbfone\r\ntwo\rthree\n"
    loaded = load_text(write(tmp_path / "windows.txt", raw))
    assert loaded.text == "one\ntwo\nthree\n"
    assert loaded.digest == hashlib.sha256(raw).hexdigest()


def test_missing_file(tmp_path):
    missing = str(tmp_path / "missing.txt")
    message = message_of(FileNotFoundError, missing)
    assert missing in message
    assert all(name in message for name in ("pydoc", *PLACES))  # it may have been a misspelt name
    assert "shakespear'" in message_of(FileNotFoundError, "shakespear")
    file = write(tmp_path / "file.txt")
    message_of(FileNotFoundError, str(file / "below_a_file.txt"))
    message_of(FileNotFoundError, "~no_such_user_here/file.txt")


def test_folder(tmp_path):
    message = message_of(ValueError, str(tmp_path))
    assert str(tmp_path) in message
    assert message.endswith("a folder")


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root can read everything, so the mode would not do
    message = message_of(ValueError, str(write(tmp_path / "secret.txt")))
    assert message.endswith("secret.txt': Permission denied")


def test_very_long_path():
    message_of(ValueError, "x" * 5000)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_not_utf8(tmp_path, mark):
    message = message_of(ValueError, write(tmp_path / "latin.txt", mark + "über é".encode("latin-1")))
    assert "'latin.txt'" in message
    assert f"byte 0xfc at offset {len(mark)}" in message


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "nothing"), (b"\xef\xbb\xbf", "nothing"), (b" \r\n\t\n\xe2\x80\xa8", "nothing but white space")],
)
def test_empty_file(tmp_path, content, found):
    assert message_of(ValueError, write(tmp_path / "empty.txt", content)).endswith(f"found {found}")


@pytest.mark.parametrize("name", ["ptb:dev", "ptb:", ""])
def test_unknown_split(name):
    message = message_of(ValueError, name)
    assert message.endswith(f"found {name!r}")
    assert "ptb:valid, ptb:test" in message


# Public files that are on disk


def test_ptb_is_the_validation_split(tmp_path, small_files):
    write(tmp_path / PLACES["ptb:valid"])
    loaded = load_text("ptb", data_dir=tmp_path)
    assert loaded == Text("ptb:valid", CONTENT.decode(), DIGEST, "ptb.valid.txt")
    assert load_text("ptb:valid", data_dir=tmp_path) == loaded


@named
@pytest.mark.parametrize("flat", [False, True], ids=["folders", "flat"])
@pytest.mark.parametrize("by", ["data_dir", "environment", "cache"])
def test_found_in_both_layouts(tmp_path, monkeypatch, cache, server, small_files, name, flat, by):
    folder = cache if by == "cache" else tmp_path / "data"
    place = Path(PLACES[name])
    write(folder / (place.name if flat else place))
    if by == "environment":
        monkeypatch.setenv("RNNGRAD_DATA", str(folder))
    loaded = load_text(name, data_dir=folder if by == "data_dir" else None)
    assert (loaded.name, loaded.digest) == (name, DIGEST)
    assert not server.requests


def test_data_dir_goes_before_the_environment_and_that_before_the_cache(tmp_path, monkeypatch, cache, small_files):
    place = PLACES["ptb:test"]
    for folder in (tmp_path / "a", tmp_path / "b", cache):
        write(folder / place, b"wrong, so that its path shows in the error")
    monkeypatch.setenv("RNNGRAD_DATA", str(tmp_path / "b"))
    assert str(tmp_path / "a") in message_of(ValueError, "ptb:test", data_dir=tmp_path / "a")
    assert str(tmp_path / "b") in message_of(ValueError, "ptb:test")
    monkeypatch.setenv("RNNGRAD_DATA", str(tmp_path / "empty"))
    assert str(cache) in message_of(ValueError, "ptb:test")
    monkeypatch.setenv("RNNGRAD_DATA", "")
    assert str(cache) in message_of(ValueError, "ptb:test")


@named
@pytest.mark.parametrize("exists", [True, False])
def test_data_dir_without_the_file_downloads_nothing(tmp_path, server, cache, small_files, name, exists):
    write(cache / PLACES[name])  # not looked at either
    folder = tmp_path / "data"
    if exists:
        folder.mkdir()
    message = message_of(FileNotFoundError, name, data_dir=str(folder))
    assert str(folder / PLACES[name]) in message
    assert text.PUBLIC_FILES[name].digest in message
    assert text.PUBLIC_FILES[name].url in message
    assert not server.requests


@named
@pytest.mark.parametrize("by", ["data_dir", "environment", "cache"])
def test_wrong_digest_on_disk(tmp_path, monkeypatch, cache, server, name, by):
    folder = cache if by == "cache" else tmp_path / "data"
    path = write(folder / PLACES[name])
    if by == "environment":
        monkeypatch.setenv("RNNGRAD_DATA", str(folder))
    message = message_of(ValueError, name, data_dir=folder if by == "data_dir" else None)
    assert str(path) in message
    entry = text.PUBLIC_FILES[name]
    assert f"expected {entry.digest}, found {digest_like(entry)}" in message
    assert path.read_bytes() == CONTENT
    assert not server.requests


def test_number_of_words_where_the_digest_is_weak(tmp_path, monkeypatch, small_files):
    """Only the training split relies on an MD5, and it counts its words besides."""
    weak = {name for name, entry in text.PUBLIC_FILES.items() if not entry.digest.startswith("sha256:")}
    assert weak == {name for name, entry in text.PUBLIC_FILES.items() if entry.num_words} == {"ptb:train"}
    entry = text.PUBLIC_FILES["ptb:train"]
    write(tmp_path / PLACES["ptb:train"])
    assert load_text("ptb:train", data_dir=tmp_path).digest == DIGEST  # SHA-256, as of every text
    monkeypatch.setitem(text.PUBLIC_FILES, "ptb:train", entry._replace(num_words=929_589))
    message = message_of(ValueError, "ptb:train", data_dir=tmp_path)
    assert message.endswith("is not ptb.train.txt: expected 929589 words, found 10")


def test_broken_link_in_the_cache_is_reported(cache, server, small_files):
    path = cache / PLACES["ptb:valid"]
    path.parent.mkdir(parents=True)
    try:
        path.symlink_to(cache / "gone")
    except OSError:
        pytest.skip("this system lets us make no symbolic link")
    assert str(path) in message_of(FileNotFoundError, "ptb")
    assert not server.requests


# Downloads


@named
@pytest.mark.parametrize("declared", [len(CONTENT), None])
def test_download(cache, server, small_files, name, declared):
    server.answer = Response(CONTENT, declared)
    progress = []
    loaded = load_text(name, on_progress=lambda received, total: progress.append((received, total)))
    assert (loaded.name, loaded.text, loaded.digest) == (name, CONTENT.decode(), DIGEST)
    [(url, timeout)] = server.requests
    assert url == text.PUBLIC_FILES[name].url
    assert timeout
    assert files_below(cache) == [cache / PLACES[name]]
    assert (cache / PLACES[name]).read_bytes() == CONTENT
    assert progress == [(received, declared) for received in (10, 20, 30, len(CONTENT))]

    server.answer = OSError("offline now")
    assert load_text(name) == loaded
    assert len(server.requests) == 1


@pytest.mark.parametrize("base", ["", "relative/folder", None])
def test_cache_in_the_home_folder(tmp_path, monkeypatch, server, small_files, base):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    if base is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", base)
    server.answer = Response(CONTENT)
    load_text("ptb")
    assert files_below(tmp_path) == [tmp_path / ".cache" / "rnngrad" / PLACES["ptb:valid"]]


@named
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError("the network is unreachable"), "the network is unreachable"),
        (urllib.error.URLError("name or service not known"), "name or service not known"),
        (urllib.error.HTTPError("https://x", 404, "Not Found", Message(), io.BytesIO()), "404"),
        (TimeoutError(), "TimeoutError"),
        (FileNotFoundError(2, "No such file", "certificates.pem"), "No such file: 'certificates.pem'"),
    ],
    ids=["offline", "no name", "404", "timeout", "no certificates"],
)
def test_download_refused(cache, server, name, failure, reason):
    server.answer = failure
    message = message_of(FileNotFoundError, name)
    entry = text.PUBLIC_FILES[name]
    # what failed, which file to put where (both ways), and how to verify it
    for part in (
        entry.url,
        reason,
        PLACES[name],
        "--data-dir",
        "RNNGRAD_DATA",
        str(cache / PLACES[name]),
        entry.digest,
    ):
        assert part in message
    assert not files_below(cache)


@pytest.mark.parametrize("failure", [ConnectionResetError("reset by peer"), IncompleteRead(b"", 30), TimeoutError()])
def test_download_fails_midway(cache, server, small_files, failure):
    server.answer = Response(CONTENT[:20], len(CONTENT), failure)
    assert str(cache) in message_of(FileNotFoundError, "ptb")
    assert not files_below(cache)


def test_truncated_download(cache, server, small_files):
    server.answer = Response(CONTENT[:20], len(CONTENT))
    assert f"broke off after 20 of {len(CONTENT)} bytes" in message_of(FileNotFoundError, "ptb")
    server.answer = Response(CONTENT[:20])  # without a length only the digest can tell
    assert "(20 bytes)" in message_of(ValueError, "ptb")
    assert not files_below(cache)


@named
def test_wrong_download_is_deleted(cache, server, name):
    server.answer = Response(CONTENT, len(CONTENT))
    message = message_of(ValueError, name)
    entry = text.PUBLIC_FILES[name]
    found = digest_like(entry)
    for part in (f"expected {entry.digest}, found {found}", "deleted", entry.url, str(cache / PLACES[name])):
        assert part in message
    assert not files_below(cache)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupted_download_leaves_no_half_file(cache, server, small_files, interrupt):
    server.answer = Response(CONTENT[:20], len(CONTENT), interrupt())
    with pytest.raises(interrupt):
        load_text("ptb")
    assert not files_below(cache)
    server.answer = Response(CONTENT, len(CONTENT))
    assert load_text("ptb").digest == DIGEST


def test_half_file_of_a_killed_process_is_not_taken(cache, server, small_files):
    def kill(received, total):
        # What a kill would leave behind at this moment: a file that has another name.
        [half] = files_below(cache)
        assert half.name != "ptb.valid.txt"
        write(half.with_name(".ptb.valid.txt.killed.part"), CONTENT[:10])
        raise KeyboardInterrupt

    server.answer = Response(CONTENT)
    with pytest.raises(KeyboardInterrupt):
        load_text("ptb", on_progress=kill)
    server.answer = Response(CONTENT)
    assert load_text("ptb").digest == DIGEST
    assert len(server.requests) == 2


def test_cache_not_writable(tmp_path, monkeypatch, server):
    file = write(tmp_path / "a_file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    message = message_of(FileNotFoundError, "ptb")
    assert repr(str(file / "rnngrad" / "ptb")) in message
    assert not server.requests  # noticed before anything is fetched
    assert file.read_bytes() == CONTENT


def test_no_home_folder(monkeypatch, tmp_path, small_files):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", unknown)
    assert "name a data folder" in message_of(FileNotFoundError, "ptb")


# Tokens


def test_word_rule():
    tokens = tokenize(" no it was n't \n\n <unk> no\tN\u00a0it \n", "word")
    words = "no it was n't <eos> <eos> <unk> no N it <eos>".split()
    assert [tokens.vocabulary[i] for i in tokens.ids] == words
    assert tokens.vocabulary == ("<eos>", "it", "no", "<unk>", "N", "n't", "was")
    assert tokens.ids.dtype == np.int32
    assert tokens.level == "word"


def test_word_rule_is_the_usual_one():
    """The expression of the Penn Treebank examples since Zaremba et al.; the lines are padded with spaces as theirs."""
    usual = CONTENT.decode().replace("\n", "<eos>").split()
    tokens = tokenize(CONTENT.decode())
    assert [tokens.vocabulary[i] for i in tokens.ids] == usual


def test_only_a_newline_ends_a_line():
    tokens = tokenize("a\fb\vc\x1cd\u2028e\x85f")
    assert [tokens.vocabulary[i] for i in tokens.ids] == [*"abcdef", "<eos>"]


def test_last_line_counts_with_and_without_its_end():
    assert tokenize("a b\nc").ids.tolist() == tokenize("a b\nc\n").ids.tolist()
    assert len(tokenize("a b\nc\n\n").ids) == 6


def test_char_rule():
    string = "hello, wörld 𝕎\n"
    tokens = tokenize(string, "char")
    assert "".join(tokens.vocabulary[i] for i in tokens.ids) == string
    assert tokens.vocabulary == tuple("l \n,dehorwö𝕎")
    assert (tokens.ids.dtype, tokens.level) == (np.int32, "char")


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(min_size=1).filter(lambda string: not string.isspace()), st.sampled_from(["word", "char"]))
def test_vocabulary_is_sorted_and_whole(string, level):
    tokens = tokenize(string, level)
    counts = np.bincount(tokens.ids, minlength=len(tokens.vocabulary))
    keys = [(-count, token) for count, token in zip(counts, tokens.vocabulary, strict=True)]
    assert keys == sorted(keys)
    assert len(set(tokens.vocabulary)) == len(tokens.vocabulary)
    assert counts.min() >= 1
    if level == "char":
        assert "".join(tokens.vocabulary[i] for i in tokens.ids) == string


def test_tokens_of_a_text_are_those_of_its_string():
    loaded = load_text("pydoc")
    for level in ("word", "char"):
        of_text, of_string = tokenize(loaded, level), tokenize(loaded.text, level)
        assert of_text.vocabulary == of_string.vocabulary
        np.testing.assert_array_equal(of_text.ids, of_string.ids)


def test_unknown_level():
    with pytest.raises(ValueError, match="unknown level 'byte'; expected 'word' or 'char'"):
        tokenize("a", "byte")


@pytest.mark.parametrize("level", ["word", "char"])
@pytest.mark.parametrize("string", ["", " \n\t"])
def test_nothing_to_tokenize(string, level):
    with pytest.raises(ValueError, match="expected text, found nothing"):
        tokenize(string, level)


# Windows


def counting(size: int) -> Tokens:
    """Tokens whose ids are their positions."""
    return Tokens(np.arange(size, dtype=np.int32), tuple(map(str, range(size))), "word")


@settings(deadline=None)  # a busy machine is no failure
@given(st.data())
def test_windows(data):
    num_steps, num_sequences = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    size = data.draw(st.integers(num_steps + num_sequences, 200))
    windows = sequences(counting(size), num_steps, num_sequences, data.draw(st.integers(0, 2**64)))
    assert windows.shape == (num_sequences, num_steps + 1)
    assert windows.dtype == np.int32
    assert windows.min() >= 0
    assert windows.max() < size
    np.testing.assert_array_equal(windows[:, 1:], windows[:, :-1] + 1)  # the target is the next token
    gaps = np.diff(np.sort(windows[:, 0]))
    if size >= num_sequences * (num_steps + 1):
        assert len(np.unique(windows)) == windows.size  # no token twice
    elif num_sequences > 1:
        # B starts in [0, S - T - 1] cannot lie further apart than this, whoever places them.
        assert gaps.min() >= (size - num_steps - 1) // (num_sequences - 1) >= 1


def test_disjoint_windows_are_uniform():
    """Every ordered choice of two disjoint windows of 3 among 8 tokens comes equally often."""
    possible = [(a, b) for a, b in itertools.permutations(range(6), 2) if abs(a - b) >= 3]
    draws = 4800
    counts = Counter(tuple(sequences(counting(8), 2, 2, seed)[:, 0].tolist()) for seed in range(draws))
    assert sorted(counts) == possible
    mean = draws / len(possible)
    # Five standard deviations of a binomial count; twelve counts stay inside but for about 1 in 100,000 sets of seeds.
    assert max(abs(count - mean) for count in counts.values()) < 5 * (mean * (1 - 1 / len(possible))) ** 0.5


def test_same_seed_same_windows():
    tokens = tokenize(load_text("pydoc"))
    first = sequences(tokens, 50, 7, seed=3)
    np.testing.assert_array_equal(first, sequences(tokens, 50, 7, seed=3))
    assert not np.array_equal(first, sequences(tokens, 50, 7, seed=4))
    string = " ".join(tokens.vocabulary[i] for i in first[0])
    assert string in " ".join(tokens.vocabulary[i] for i in tokens.ids)


def test_windows_leave_numpys_global_state_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    sequences(counting(100), 5, 3, 0)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_whole_text_as_one_window():
    np.testing.assert_array_equal(sequences(counting(9), 8, 1, 5), [np.arange(9)])


def test_text_too_short():
    sequences(counting(14), 10, 4, 0)
    expected = "sequences: 4 of 10 steps need at least 14 tokens, found 13 (level 'word')"
    with pytest.raises(ValueError, match=re.escape(expected)):
        sequences(counting(13), 10, 4, 0)
    with pytest.raises(ValueError, match="need at least 1001 tokens, found 7"):
        sequences(tokenize("to be or not to be"), 1000, 1, 0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((0, 1, 0), "num_steps of at least 1, found 0"),
        ((1, 0, 0), "num_sequences of at least 1, found 0"),
        ((-3, 1, 0), "num_steps of at least 1, found -3"),
        ((1, 1, -1), "seed of at least 0, found -1"),
    ],
)
def test_sizes_that_make_no_sense(sizes, expected):
    with pytest.raises(ValueError, match=expected):
        sequences(counting(10), *sizes)


# A given vocabulary


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(min_size=1).filter(lambda string: not string.isspace()), st.sampled_from(["word", "char"]))
def test_encoding_with_the_own_vocabulary_is_tokenizing(string, level):
    tokens = tokenize(string, level)
    encoded = encode(string, tokens.vocabulary, level)
    np.testing.assert_array_equal(encoded.ids, tokens.ids)
    assert (encoded.vocabulary, encoded.level, encoded.ids.dtype) == (tokens.vocabulary, level, np.int32)


def test_what_the_vocabulary_lacks():
    with_unknown, without = ("<eos>", "the", "<unk>", "cat"), ("<eos>", "the", "cat")
    string = "the dog saw the cat\nthe dog"
    words = [with_unknown[i] for i in encode(string, with_unknown).ids]
    assert words == "the <unk> <unk> the cat <eos> the <unk> <eos>".split()
    expected = (
        "encode: 3 of 9 tokens are not in the vocabulary of 3, and it has no '<unk>' for them: 2 different ones, the "
        "most frequent 'dog', 2 times"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        encode(string, without)
    with pytest.raises(ValueError, match="no token was named to stand for them"):
        encode(string, with_unknown, unknown=None)
    assert encode(string, without, unknown="cat").ids.tolist() == [1, 2, 2, 1, 2, 0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"1 of 3 tokens are not in the vocabulary of 2.*'é', 1 times"):
        encode("née", ("e", "n"), "char")


def test_vocabulary_with_a_token_twice():
    with pytest.raises(ValueError, match="expected a vocabulary of different tokens, found 1 twice"):
        encode("a", ("a", "b", "a", "<eos>"))


def test_nothing_to_encode():
    with pytest.raises(ValueError, match="encode: expected text, found nothing"):
        encode(" ", ("a",))
    with pytest.raises(ValueError, match="unknown level 'byte'"):
        encode("a", ("a",), "byte")


# Parts


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(40, 300), st.sampled_from(["all", "first"]))
def test_parts_make_the_whole(shares, size, vocabulary):
    string = "".join("abcde"[i * i % 5] for i in range(size)) + "<"
    tokens = tokenize(string, "char")
    fractions = tuple(share / sum(shares) for share in shares)
    # "b" is the second token and every first part has two, so that it can stand for what that part lacks
    parts = split(tokens, fractions, vocabulary=vocabulary, unknown="b")
    assert sum(len(part.ids) for part in parts) == size + 1
    for end, part in zip(np.cumsum(shares), np.split(np.arange(size + 1), _ends(parts)), strict=True):
        assert part[-1] + 1 == (size + 1) * end // sum(shares)  # the same by whole numbers
    words = [part.vocabulary[i] for part in parts for i in part.ids]
    known = set(parts[0].vocabulary)
    assert "".join(words) == "".join(token if token in known else "b" for token in string)
    assert len({part.vocabulary for part in parts}) == 1
    if vocabulary == "all":
        assert parts[0].vocabulary == tokens.vocabulary
    else:
        assert parts[0].vocabulary == tokenize(string[: len(parts[0].ids)], "char").vocabulary


def _ends(parts):
    return np.cumsum([len(part.ids) for part in parts])[:-1]


def test_round_off_of_fractions_costs_no_token():
    assert 0.7 + 0.1 < 0.8
    parts = split(counting(10), (0.7, 0.1, 0.2))
    assert [part.ids.tolist() for part in parts] == [list(range(7)), [7], [8, 9]]


def test_what_the_first_part_lacks():
    tokens = tokenize("a b a b\nb c")
    with pytest.raises(ValueError, match=r"split: 1 of 3 tokens are not in the vocabulary of 3.*'c', 1 times"):
        split(tokens, (0.7, 0.3), vocabulary="first")
    _, valid = split(tokens, (0.7, 0.3), vocabulary="first", unknown="a")
    assert [valid.vocabulary[i] for i in valid.ids] == ["b", "a", "<eos>"]


@pytest.mark.parametrize("fractions", [(), (0.9,), (0.9, 0.2), (1.1, -0.1), (1.0, 0.0), (float("nan"), 0.5)])
def test_fractions_that_are_none(fractions):
    with pytest.raises(ValueError, match="expected positive fractions that sum to 1, found"):
        split(counting(100), fractions)


def test_empty_part():
    with pytest.raises(ValueError, match=re.escape("split: part 1 of 2, 0.05 of 10 tokens (level 'word'), is empty")):
        split(counting(10), (0.05, 0.95))
    with pytest.raises(ValueError, match="unknown vocabulary 'train'; expected 'all' or 'first'"):
        split(counting(10), vocabulary="train")


# Streams


@settings(deadline=None, max_examples=20)  # every shape compiles
@given(st.data())
def test_streams_tell_the_text_in_order(data):
    batch_size, num_steps = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    size = data.draw(st.integers(batch_size * (num_steps + 1), 200))
    windows = streams(counting(size).ids, batch_size, num_steps)
    epoch = [windows.batch(index) for index in range(windows.num_windows)]
    inputs = np.concatenate([batch.inputs for batch in epoch])
    targets = np.concatenate([batch.targets for batch in epoch])
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.shape == (windows.num_windows * num_steps, batch_size)
    length = size // batch_size
    start = length * np.arange(batch_size)
    np.testing.assert_array_equal(inputs, start + np.arange(len(inputs))[:, None])
    np.testing.assert_array_equal(targets, inputs + 1)
    assert all((np.asarray(batch.mask) == 1).all() and batch.mask.shape == (num_steps, batch_size) for batch in epoch)
    # less than a window is left over in each stream, and less than a token for each at the end
    assert 0 <= length - 1 - len(inputs) < num_steps
    for index in range(3 * windows.num_windows):
        assert windows.restarts(index) == (index % windows.num_windows == 0)
        again = windows.batch(index)
        np.testing.assert_array_equal(again.inputs, epoch[index % windows.num_windows].inputs)


def test_streams_by_hand():
    """Five tokens in each of two streams of 11, the last one over; T = 2 gives two windows."""
    windows = streams(counting(11).ids, 2, 2)
    assert windows.num_windows == 2
    assert np.asarray(windows.batch(1).inputs).T.tolist() == [[2, 3], [7, 8]]
    assert np.asarray(windows.batch(1).targets).T.tolist() == [[3, 4], [8, 9]]


def test_jitted_streams_are_the_same():
    windows = streams(counting(50).ids, 3, 4)
    batch, restarts = jax.jit(windows.batch), jax.jit(windows.restarts)
    for index in range(9):
        for found, expected in zip(batch(jnp.int32(index)), windows.batch(index), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert bool(restarts(jnp.int32(index))) == windows.restarts(index)
    assert batch._cache_size() == 1


def test_text_too_short_for_streams():
    assert streams(counting(10).ids, 2, 4).num_windows == 1
    expected = "streams: 2 of 4 steps need at least 10 tokens, found 9"
    with pytest.raises(ValueError, match=re.escape(expected)):
        streams(counting(9).ids, 2, 4)
    with pytest.raises(ValueError, match="found 0"):
        streams(np.zeros(0, np.int32), 2, 4)
    with pytest.raises(ValueError, match="streams: expected batch_size of at least 1, found 0"):
        streams(counting(9).ids, 0, 4)
    with pytest.raises(ValueError, match="streams: expected num_steps of at least 1, found 0"):
        streams(counting(9).ids, 1, 0)


# The files themselves


@pytest.mark.skipif(not DATA, reason="RNNGRAD_DATA names no folder with the public texts")
@pytest.mark.parametrize(("name", "words"), [("ptb", 73_760), ("ptb:test", 82_430), ("tinyshakespeare", 242_651)])
def test_numbers_of_tokens(name, words, server):
    """Penn Treebank: the published counts; tinyshakespeare: `wc` of the file, words plus lines."""
    loaded = load_text(name, data_dir=DATA)
    assert len(tokenize(loaded, "word").ids) == words
    assert len(tokenize(loaded, "char").ids) == len(loaded.text)
    assert not server.requests


# MD5 of the three splits as torchtext publishes them: those of the two files that are here say that its files are ours.
TORCHTEXT_MD5 = {
    "ptb:train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "ptb:valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "ptb:test": "8b80168b89c18661a38ef683c0dc3721",
}


def test_training_split_goes_by_the_published_md5():
    assert text.PUBLIC_FILES["ptb:train"].digest == f"md5:{TORCHTEXT_MD5['ptb:train']}"


@pytest.mark.skipif(not DATA, reason="RNNGRAD_DATA names no folder with the public texts")
@pytest.mark.parametrize("name", ["ptb:valid", "ptb:test"])
def test_the_published_md5_are_those_of_our_files(name):
    raw = Path(DATA, PLACES[name]).read_bytes()
    assert hashlib.md5(raw, usedforsecurity=False).hexdigest() == TORCHTEXT_MD5[name]


@pytest.mark.skipif(not DATA, reason="RNNGRAD_DATA names no folder with the public texts")
def test_tinyshakespeare_ninety_ten():
    """1,115,394 characters, 65 different ones: the usual cut is at ⌊0.9 · 1,115,394⌋ = 1,003,854."""
    train, valid = split(tokenize(load_text("tinyshakespeare", data_dir=DATA), "char"))
    assert (len(train.ids), len(valid.ids), len(train.vocabulary)) == (1_003_854, 111_540, 65)


@pytest.mark.skipif(not DATA, reason="RNNGRAD_DATA names no folder with the public texts")
def test_penn_treebank_test_split_in_words_of_the_validation_split():
    valid, loaded = tokenize(load_text("ptb", data_dir=DATA)), load_text("ptb:test", data_dir=DATA)
    encoded = encode(loaded, valid.vocabulary)
    assert len(encoded.ids) == 82_430
    words = tokenize(loaded)
    known = set(valid.vocabulary)
    expected = [word if word in known else "<unk>" for word in (words.vocabulary[i] for i in words.ids)]
    assert [encoded.vocabulary[i] for i in encoded.ids] == expected
    with pytest.raises(ValueError, match=f"of 82430 tokens are not in the vocabulary of {len(known)}"):
        encode(loaded, valid.vocabulary, unknown=None)
