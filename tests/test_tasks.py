"""Tasks: closed-form baselines against simulation, places of marks and symbols, the grammar, keys, jit, errors."""

import builtins
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rnngrad as rg
from rnngrad.tasks import (
    AGREEMENT_VOCABULARY,
    adding,
    agreement,
    agreement_sentences,
    agreement_words,
    copy_memory,
    digits,
    nearest_noun_accuracy,
    shortest_distance,
    temporal_order,
)

TASKS = {
    "adding": adding(7),
    "adding, T=2": adding(2),
    "copy_memory": copy_memory(5),
    "copy_memory, shortest": copy_memory(1, num_symbols=2, length=1),
    "temporal_order, 2": temporal_order(23),
    "temporal_order, 3": temporal_order(10, 3),
    "agreement": agreement(distance=(10, 14), num_attractors=(0, 2)),
    "agreement, shortest": agreement(distance=5, num_attractors=0),
    "digits": digits(),
    "digits, pixels": digits(split="test", order="pixels"),
}
tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
# One batch size where any will do, and few lengths: every new shape compiles anew.
B = 5
quick = settings(deadline=None, max_examples=30)  # a busy machine is no failure


def arrays(batch):
    return tuple(np.asarray(part) for part in batch)


# What all share


@tasks
def test_shapes_and_dtypes(task):
    inputs, targets, mask = arrays(task.batch(jax.random.key(3), B))
    num_steps = len(inputs)
    if task.vocabulary_size is None:
        assert inputs.shape == (num_steps, B, task.input_size)
        assert inputs.dtype == np.float32
    else:
        assert task.vocabulary_size == task.input_size
        assert inputs.shape == (num_steps, B)
        assert inputs.dtype == np.int32
        assert 0 <= inputs.min() <= inputs.max() < task.vocabulary_size
    if task.loss == "mse":
        assert targets.shape == (num_steps, B, task.output_size)
        assert targets.dtype == np.float32
    else:
        assert task.loss == "cross_entropy"
        assert targets.shape == (num_steps, B)
        assert targets.dtype == np.int32
        assert 0 <= targets.min() <= targets.max() < task.output_size
    assert mask.shape == (num_steps, B)
    assert mask.dtype == np.float32
    if task.name == "copy_memory":
        assert (mask == 1).all()
    else:
        # one answer for each sequence, and no target elsewhere
        np.testing.assert_array_equal(mask.sum(0), 1)
        assert set(np.unique(mask)) == {0, 1}
        assert (targets[mask == 0] == 0).all()
        if task.name != "agreement":
            assert (mask[-1] == 1).all()


@tasks
def test_same_key_same_batch_with_and_without_jit(task):
    key = jax.random.key(11)
    expected = arrays(task.batch(key, B))
    for found in (task.batch(key, B), jax.jit(task.batch, static_argnums=1)(key, B)):
        for x, y in zip(arrays(found), expected, strict=True):
            np.testing.assert_array_equal(x, y)
    assert any(
        not np.array_equal(x, y) for x, y in zip(arrays(task.batch(jax.random.key(12), B)), expected, strict=True)
    )


@tasks
def test_same_dtypes_with_x64(task, x64):
    expected = ["float32" if task.vocabulary_size is None else "int32"]
    expected += ["float32" if task.loss == "mse" else "int32", "float32"]
    assert [part.dtype.name for part in jax.eval_shape(lambda key: task.batch(key, B), jax.random.key(3))] == expected


@tasks
@pytest.mark.parametrize("size", [0, -1])
def test_no_sequences(task, size):
    with pytest.raises(ValueError, match=f"{task.name}: expected batch_size of at least 1, found {size}"):
        task.batch(jax.random.key(0), size)


@tasks
def test_a_task_is_static(task):
    assert hash(task) == hash(task)
    traced = []
    draw = jax.jit(lambda key, task: traced.append(task.batch(key, B)), static_argnames="task")
    draw(jax.random.key(0), task)
    draw(jax.random.key(1), task)
    assert len(traced) == 1


@pytest.mark.parametrize("name", ["adding", "temporal_order, 2", "agreement", "digits"])
def test_a_batch_runs_through_a_cell(name):
    task = TASKS[name]
    batch = task.batch(jax.random.key(0), B)
    xs = batch.inputs if task.vocabulary_size is None else jax.nn.one_hot(batch.inputs, task.input_size)
    cell = rg.cells.lstm(task.input_size, 4)
    states = rg.unroll(cell, cell.init(jax.random.key(1)), cell.init_state((B,)), xs).states
    assert states.h.shape == (len(batch.mask), B, 4)


# Adding


@quick
@given(st.sampled_from([2, 3, 8, 41]), st.integers(0, 2**31))
def test_adding_marks_one_number_in_each_half(num_steps, seed):
    inputs, targets, _ = arrays(adding(num_steps).batch(jax.random.key(seed), 9))
    values, marks = inputs[..., 0], inputs[..., 1]
    assert set(np.unique(marks)) <= {0, 1}
    np.testing.assert_array_equal(marks[: num_steps // 2].sum(0), 1)
    np.testing.assert_array_equal(marks[num_steps // 2 :].sum(0), 1)
    assert 0 <= values.min()
    assert values.max() < 1
    # one rounding of the sum of two float32 numbers below 2
    np.testing.assert_allclose(targets[-1, :, 0], (values.astype(float) * marks).sum(0), atol=2**-24 * 2)


def test_adding_reaches_every_step_of_each_half():
    marks = arrays(adding(7).batch(jax.random.key(0), 1000))[0][..., 1]
    share = marks.mean(1)
    # halves of 3 and 4 steps; five standard errors of a share of 1000 draws
    for steps, probability in ((slice(0, 3), 1 / 3), (slice(3, 7), 1 / 4)):
        bound = 5 * math.sqrt(probability * (1 - probability) / 1000)
        np.testing.assert_allclose(share[steps], probability, atol=bound)


def test_adding_baseline():
    """Predicting 1 costs 1/6.  (s − 1)² for a sum of two uniform numbers has mean 1/6, fourth moment 1/15."""
    size = 20_000
    targets = arrays(adding(4).batch(jax.random.key(0), size))[1][-1, :, 0].astype(float)
    stderr = math.sqrt((1 / 15 - 1 / 36) / size)
    assert abs(np.mean((targets - 1) ** 2) - adding(4).baseline) < 4 * stderr
    # and no other constant does better: the mean is 1
    assert abs(np.mean(targets) - 1) < 4 * math.sqrt(1 / 6 / size)


@pytest.mark.parametrize("num_steps", [1, 0, -3])
def test_adding_too_short(num_steps):
    with pytest.raises(ValueError, match=f"adding: expected num_steps of at least 2, found {num_steps}"):
        adding(num_steps)


# Copy


@quick
@given(st.sampled_from([(1, 2, 1), (1, 5, 4), (7, 3, 1), (12, 8, 10)]), st.integers(0, 2**31))
def test_copy_layout(sizes, seed):
    delay, num_symbols, length = sizes
    task = copy_memory(delay, num_symbols=num_symbols, length=length)
    inputs, targets, _ = arrays(task.batch(jax.random.key(seed), 5))
    blank, delimiter = num_symbols, num_symbols + 1
    assert len(inputs) == delay + 2 * length
    assert inputs[:length].max() < num_symbols
    assert (inputs[length : length + delay - 1] == blank).all()
    assert (inputs[length + delay - 1] == delimiter).all()
    assert (inputs[length + delay :] == blank).all()
    assert (targets[: length + delay] == blank).all()
    # symbol j of the input is wanted delay + length steps later
    np.testing.assert_array_equal(targets[length + delay :], inputs[:length])
    assert (task.vocabulary_size, task.output_size) == (num_symbols + 2, num_symbols + 1)


@pytest.mark.parametrize("delay", [1, 100])
def test_copy_baseline(delay):
    """What is memoryless pays −log p at every step: p = 1 for the blank, 1/8 for a symbol, whichever it is."""
    task = copy_memory(delay)
    inputs, targets, mask = arrays(task.batch(jax.random.key(0), 4000))
    num_steps = delay + 20
    assert task.baseline == pytest.approx(10 * math.log(8) / (delay + 20), rel=1e-15)  # the paper's formula
    log_p = np.zeros((num_steps, 9))
    log_p[:-10, :8], log_p[-10:, :8], log_p[-10:, 8] = -np.inf, -math.log(8), -np.inf
    losses = -np.take_along_axis(log_p[:, None], targets[..., None], axis=2)[..., 0] * mask
    assert np.mean(losses) == pytest.approx(task.baseline, rel=1e-12)  # the sum of 4000 · T numbers, rounded
    # no better guess is to be had: all symbols are equally likely, at every place and after every other one
    share = np.stack([(inputs[:10] == symbol).mean(1) for symbol in range(8)])
    assert np.abs(share - 1 / 8).max() < 5 * math.sqrt(1 / 8 * 7 / 8 / 4000)  # five standard errors, 80 shares
    pairs = np.bincount((8 * inputs[:9] + inputs[1:10]).ravel(), minlength=64) / (9 * 4000)
    # neighbouring pairs share a symbol, which makes them at most twice as variable
    assert np.abs(pairs - 1 / 64).max() < 5 * math.sqrt(2 * 1 / 64 * 63 / 64 / (9 * 4000))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"delay": 0}, "delay of at least 1, found 0"),
        ({"delay": 5, "num_symbols": 1}, "num_symbols of at least 2, found 1"),
        ({"delay": 5, "length": 0}, "length of at least 1, found 0"),
    ],
)
def test_copy_sizes_that_make_no_sense(sizes, expected):
    with pytest.raises(ValueError, match=f"copy_memory: expected {expected}"):
        copy_memory(**sizes)


# Temporal order


@quick
@given(st.sampled_from([10, 19, 64]), st.sampled_from([2, 3]), st.integers(0, 2**31))
def test_temporal_order_places(num_steps, num_symbols, seed):
    inputs, targets, _ = arrays(temporal_order(num_steps, num_symbols).batch(jax.random.key(seed), 12))
    is_relevant = inputs < 2
    np.testing.assert_array_equal(is_relevant.sum(0), num_symbols)
    width = num_steps // 10
    for b in range(12):
        places = np.flatnonzero(is_relevant[:, b])
        for place, tenth in zip(places, {2: (1, 5), 3: (1, 3, 6)}[num_symbols], strict=True):
            start = math.floor(tenth * num_steps / 10)
            assert start <= place < start + width
        word = "".join("XY"[symbol] for symbol in inputs[places, b])
        classes = ("XX XY YX YY" if num_symbols == 2 else "XXX XXY XYX XYY YXX YXY YYX YYY").split()
        assert classes.index(word) == targets[-1, b]


def test_temporal_order_is_the_published_one_at_100_steps():
    """10–20 and 50–60 in Hochreiter & Schmidhuber and in Pascanu et al.; every one of these places occurs."""
    inputs = arrays(temporal_order(100).batch(jax.random.key(0), 2000))[0]
    assert np.flatnonzero((inputs < 2).any(1)).tolist() == [*range(10, 20), *range(50, 60)]


@pytest.mark.parametrize("num_symbols", [2, 3])
def test_temporal_order_baseline(num_symbols):
    """All classes are equally likely, whatever one saw last, so that nothing is below ln 4 or ln 8."""
    size, classes = 8000, 2**num_symbols
    task = temporal_order(10, num_symbols)
    inputs, targets, _ = arrays(task.batch(jax.random.key(0), size))
    assert task.baseline == math.log(classes)
    counts = np.bincount(targets[-1], minlength=classes)
    # five standard errors of a share
    assert np.abs(counts / size - 1 / classes).max() < 5 * math.sqrt((classes - 1) / classes**2 / size)
    # entropy of the classes given the last distractor: below the truth by (bins − conditions)/(2 · draws) on average,
    # with a standard deviation of sqrt(2 (bins − conditions))/(2 · draws): chi squared
    table = np.array([np.bincount(targets[-1][inputs[-1] == d], minlength=classes) for d in range(2, 6)])
    share = table / table.sum(1, keepdims=True)
    entropy = -np.sum(table.sum(1, keepdims=True) / size * share * np.log(share))
    freedom = 4 * (classes - 1)
    expected = math.log(classes) - freedom / (2 * size)
    assert abs(entropy - expected) < 5 * math.sqrt(2 * freedom) / (2 * size)


def test_temporal_order_sizes_that_make_no_sense():
    with pytest.raises(ValueError, match="temporal_order: expected num_steps of at least 10, found 9"):
        temporal_order(9)
    with pytest.raises(ValueError, match="temporal_order: expected num_symbols of 2 or 3, found 4"):
        temporal_order(100, 4)


# Agreement

SINGULARS = "cat dog bird horse teacher student farmer child".split()
PLURALS = "cats dogs birds horses teachers students farmers children".split()
NUMBER = {**dict.fromkeys(SINGULARS, 0), **dict.fromkeys(PLURALS, 1)}


def parse(words):
    """Reads a sentence by the grammar of the docstring: subject's number, attractors' numbers, place of the verb."""
    words = list(words)
    position = 0

    def take(*allowed):
        nonlocal position
        assert words[position] in allowed, (words, position, allowed)
        position += 1
        return words[position - 1]

    def take_all(*allowed):
        while words[position] in allowed:
            take(*allowed)

    def noun_phrase():
        take("the")
        take_all("small", "old", "young", "quiet")
        return NUMBER[take(*NUMBER)]

    take("the")
    subject = NUMBER[take(*NUMBER)]
    take(",")
    take("which")
    take_all("already", "often", "quietly", "once")
    attractors = []
    if take("slept", "waited", "laughed", "danced", "saw", "heard", "met", "followed") in (
        "saw",
        "heard",
        "met",
        "followed",
    ):
        attractors.append(noun_phrase())
        while words[position] in ("near", "behind", "beside", "with"):
            take("near", "behind", "beside", "with")
            attractors.append(noun_phrase())
    take(",")
    verb = position
    assert take("was", "were") == ("was", "were")[subject]
    take("full", "tired", "happy", "late")
    take(".")
    assert set(words[position:]) <= {"<pad>"}
    return subject, attractors, verb


# Distances and attractors: the shortest sentences, one length with and without room, and many lengths.
RANGES = [
    ((5, 5), (0, 0)),
    ((7, 7), (1, 1)),
    ((10, 10), (2, 2)),
    ((5, 9), (0, 0)),
    ((8, 30), (1, 1)),
    ((13, 19), (0, 3)),
]


@quick
@given(st.sampled_from(RANGES), st.integers(0, 2**31), st.sampled_from([0, 0.3, 1.0]))
def test_sentences_follow_the_grammar_and_tell_what_they_are(ranges, seed, mismatch):
    (near, far), (few, many) = ranges
    found = agreement_sentences(
        jax.random.key(seed), 8, distance=(near, far), num_attractors=(few, many), mismatch=mismatch
    )
    inputs, targets, mask = arrays(found.batch)
    assert len(inputs) == far + 4
    for b in range(8):
        subject, attractors, verb = parse(AGREEMENT_VOCABULARY[i] for i in inputs[:, b])
        assert near <= verb - 1 == found.distance[b] <= far
        assert few <= len(attractors) == found.num_attractors[b] <= many
        assert sum(number != subject for number in attractors) == found.num_opposite[b]
        assert subject == found.number[b] == targets[verb - 1, b]
        assert mask[:, b].tolist() == [float(t == verb - 1) for t in range(far + 4)]
        if mismatch in (0, 1):
            assert all(number == (subject + mismatch) % 2 for number in attractors)


def test_distances_and_attractors_are_uniform_and_independent():
    size = 6000
    found = agreement_sentences(jax.random.key(0), size, distance=(10, 12), num_attractors=(1, 2))
    table = np.zeros((3, 2))
    np.add.at(table, (np.asarray(found.distance) - 10, np.asarray(found.num_attractors) - 1), 1)
    # five standard errors of a share of 1/6
    np.testing.assert_allclose(table / size, 1 / 6, atol=5 * math.sqrt(5 / 36 / size))


def test_words_before_the_verb_tell_nothing_but_the_subject():
    """Baseline ln 2: given any one word at any place between, both numbers are equally likely."""
    size, far = 6000, 12
    found = agreement_sentences(jax.random.key(5), size, distance=far, num_attractors=2)
    inputs, number = np.asarray(found.batch.inputs), np.asarray(found.number)
    assert agreement().baseline == math.log(2)
    assert abs(number.mean() - 0.5) < 5 * 0.5 / math.sqrt(size)  # five standard errors
    num_tried = 0
    for t in range(2, 1 + far):
        for word in np.unique(inputs[t]):
            chosen = number[inputs[t] == word]
            if len(chosen) > 30:
                num_tried += 1
                # five standard errors of a fair coin; 6e-7 each, for the few hundred words and places
                assert abs(chosen.mean() - 0.5) < 5 * 0.5 / math.sqrt(len(chosen)), (t, AGREEMENT_VOCABULARY[word])
    assert num_tried > 100
    # the subject itself tells all, and the check above would see it
    assert set(number[np.isin(inputs[1], [AGREEMENT_VOCABULARY.index(word) for word in SINGULARS])]) == {0}


@pytest.mark.parametrize(
    ("attractors", "mismatch", "expected"),
    [(0, 0.5, 1.0), ((0, 3), 0.5, 0.625), ((0, 3), 0.2, 0.85), ((1, 3), 0.5, 0.5), ((1, 3), 1.0, 0.0)],
)
def test_nearest_noun_by_counting(attractors, mismatch, expected):
    size = 3000
    assert nearest_noun_accuracy(num_attractors=attractors, mismatch=mismatch) == pytest.approx(expected, rel=1e-12)
    found = agreement_sentences(
        jax.random.key(2), size, distance=(13, 16), num_attractors=attractors, mismatch=mismatch
    )
    inputs, first = np.asarray(found.batch.inputs), AGREEMENT_VOCABULARY.index("cat")
    is_noun = (inputs >= first) & (inputs < first + 16)
    nearest = len(inputs) - 1 - np.argmax(is_noun[::-1], axis=0)  # the last noun of the sentence
    is_plural = (inputs[nearest, np.arange(size)] - first) % 2
    accuracy = np.mean(is_plural == np.asarray(found.number))
    # five standard errors; none where the answer is certain
    assert abs(accuracy - expected) <= 5 * math.sqrt(expected * (1 - expected) / size)


def test_shortest_distances():
    for count, distance in ((0, 5), (1, 7), (2, 10), (3, 13)):
        assert shortest_distance(count) == distance
        agreement(distance=distance, num_attractors=count)
        expected = f"agreement: expected distance for {count} attractors of at least {distance}, found {distance - 1}"
        with pytest.raises(ValueError, match=expected):
            agreement(distance=(distance - 1, 30), num_attractors=(0, count))


def test_words_in_english():
    vocabulary = {word: i for i, word in enumerate(AGREEMENT_VOCABULARY)}
    assert len(vocabulary) == len(AGREEMENT_VOCABULARY)
    words = "the cat , which already saw the small dogs near the bird , was full . <pad> <pad>".split()
    ids = np.array([vocabulary[word] for word in words])
    expected = "The cat, which already saw the small dogs near the bird, was full."
    assert agreement_words(ids) == agreement_words(jnp.asarray(ids)) == expected
    assert parse(words) == (0, [1, 0], 13)
    assert agreement_words(np.zeros(0, np.int32)) == ""
    with pytest.raises(ValueError, match="agreement_words: expected ids from 0 to 46, found 47"):
        agreement_words(np.array([3, 47]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"distance": (20, 10)}, r"expected distance as \(least, most\), found \(20, 10\)"),
        ({"num_attractors": (2, 1)}, r"expected num_attractors as \(least, most\), found \(2, 1\)"),
        ({"num_attractors": -1}, "expected num_attractors of at least 0, found -1"),
        ({"mismatch": 1.5}, "expected mismatch from 0 to 1, found 1.5"),
        ({"mismatch": float("nan")}, "expected mismatch from 0 to 1, found nan"),
    ],
)
def test_agreement_options_that_make_no_sense(options, expected):
    with pytest.raises(ValueError, match=expected):
        agreement(**options)
    with pytest.raises(ValueError, match=expected):
        agreement_sentences(jax.random.key(0), 2, **options)


# Digits

SIZES = {"train": 1437, "valid": 180, "test": 180}


def test_digits_are_the_ones_we_know():
    """Results on them can be compared as long as scikit-learn ships these very images."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    raw = pixels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
    digest = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    assert hashlib.sha256(raw).hexdigest() == digest
    assert (pixels == np.round(pixels)).all()


def test_parts_hold_every_image_once():
    from sklearn.datasets import load_digits

    parts = []
    for split, size in SIZES.items():
        inputs, targets, _ = arrays(digits(split=split).batch(jax.random.key(0), size))
        pixels = np.round(16 * inputs.swapaxes(0, 1).reshape(size, 64)).astype(int)
        parts += [(*row, label) for row, label in zip(pixels.tolist(), targets[-1].tolist(), strict=True)]
    pixels, labels = load_digits(return_X_y=True)
    expected = [(*row, label) for row, label in zip(pixels.astype(int).tolist(), labels.tolist(), strict=True)]
    assert sorted(parts) == sorted(expected)
    assert len(set(parts)) == 1797  # all different, so that no image is in two parts


def test_rows_and_pixels_show_the_same_images():
    key = jax.random.key(4)
    rows, targets, _ = arrays(digits(split="test").batch(key, 7))
    pixels, same, _ = arrays(digits(split="test", order="pixels").batch(key, 7))
    assert (rows.shape, pixels.shape) == ((8, 7, 8), (64, 7, 1))
    np.testing.assert_array_equal(pixels[:, :, 0], rows.swapaxes(0, 1).reshape(7, 64).T)
    np.testing.assert_array_equal(targets[-1], same[-1])
    assert rows.min() == 0
    assert rows.max() == 1
    # the image whose label this is, upright: among scikit-learn's own, row by row
    from sklearn.datasets import load_digits

    known = load_digits()
    [index] = np.flatnonzero((known.images / 16 == rows[:, 0]).all((1, 2)))
    assert known.target[index] == targets[-1, 0]


def test_split_is_fixed_forever():
    labels = arrays(digits(split="valid").batch(jax.random.key(0), 180))[1][-1]
    # counts of the labels 0 to 9 in the part of 180 images after the first 1437 by SHA-256, as first computed
    assert np.bincount(labels).tolist() == [17, 21, 17, 17, 14, 25, 17, 20, 13, 19]


@pytest.mark.parametrize("split", SIZES)
def test_digits_baseline(split):
    """An even guess pays ln 10 exactly; the best constant guess, the entropy of the labels, little less."""
    task = digits(split=split)
    labels = arrays(task.batch(jax.random.key(0), SIZES[split]))[1][-1]
    assert task.baseline == math.log(10)
    share = np.bincount(labels) / len(labels)
    # by a tenth of a nat for 180 images, where chance alone gives 9/(2 · 180) = 0.025 on average
    assert 0 <= task.baseline - -np.sum(share * np.log(share)) < 0.1


def test_digits_that_are_not_there():
    with pytest.raises(ValueError, match="digits: unknown split 'dev'; expected one of: train, valid, test"):
        digits(split="dev")
    with pytest.raises(ValueError, match="digits: unknown order 'columns'; expected one of: rows, pixels"):
        digits(order="columns")
    with pytest.raises(ValueError, match=r"digits: expected batch_size of at most 180 \(test\), found 181"):
        digits(split="test").batch(jax.random.key(0), 181)


def test_digits_without_scikit_learn(monkeypatch):
    importing = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"needs scikit-learn: pip install 'rnngrad\[experiments\]'"):
        digits()
