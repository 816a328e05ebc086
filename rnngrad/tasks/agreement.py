"""Agreement: was or were?  The verb agrees with a subject that stands far back, not with the nouns in between.

::

    the cat , which already saw the small dogs near the bird , was full .
         └────────────────────── distance ──────────────────────┘
         subject                                attractors     verb

The grammar, with every word of a class equally likely::

    sentence  ->  the NOUN , which clause , VERB STATE .      VERB is was | were, by the number of the first NOUN
    clause    ->  ADVERB* slept                               without attractors: slept | waited | laughed | danced
    clause    ->  ADVERB* saw the ADJECTIVE* NOUN pp*         with them: saw | heard | met | followed
    pp        ->  near the ADJECTIVE* NOUN                    near | behind | beside | with

An attractor is any noun of the clause, whatever its number.  Its number differs from the subject's with probability
``mismatch``: 1/2 by default, so that attractors tell nothing of the subject as any other value would, and 1 for
attractors in the sense of Linzen et al.
The distance counts from the subject to the verb; the network answers one step before the verb, distance − 1 steps
after the subject.  k attractors need a distance of 5 (k = 0) or 4 + 3k at least.  What is left is filled with adverbs
and adjectives, each before the clause's verb or before one of its nouns, all equally likely.  Verbs of the clause are
in the past, so that nothing but the subject tells the number.

The target, at the step before the verb alone, is the number: 0 for was, 1 for were.  The other words are in the batch
for the network to read, but not to predict.  Sentences of unequal length end in ``<pad>``.

Closed forms.  Both numbers are equally likely: ln 2 nats without memory, the baseline.  Who agrees with the nearest
noun is right with probability 1 without attractors and 1 − ``mismatch`` with them (:func:`nearest_noun_accuracy`).

Sources: the sentence is from Ng's lectures on sequence models; the measure is that of Linzen, Dupoux & Goldberg 2016,
arXiv 1611.01368 (number prediction against distance and attractors, in corpus text).  We generate the sentences, so
that distance and attractors are set independently and no word gives the answer away.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Key

from rnngrad.tasks.batches import Batch, Task, check_at_least
from rnngrad.types import Real

_SINGULARS = ("cat", "dog", "bird", "horse", "teacher", "student", "farmer", "child")
_PLURALS = ("cats", "dogs", "birds", "horses", "teachers", "students", "farmers", "children")
_CLASSES = {
    "mark": ("<pad>", ",", ".", "the", "which"),
    "verb": ("was", "were"),
    # singular and plural in turn: the number is the parity
    "noun": tuple(word for pair in zip(_SINGULARS, _PLURALS, strict=True) for word in pair),
    "adverb": ("already", "often", "quietly", "once"),
    "adjective": ("small", "old", "young", "quiet"),
    "intransitive": ("slept", "waited", "laughed", "danced"),
    "transitive": ("saw", "heard", "met", "followed"),
    "preposition": ("near", "behind", "beside", "with"),
    "state": ("full", "tired", "happy", "late"),
}
AGREEMENT_VOCABULARY = tuple(word for words in _CLASSES.values() for word in words)
"""The word of every id; id 0 is the padding."""

_PAD, _COMMA, _STOP, _THE, _WHICH = range(5)
_FIRST = {name: AGREEMENT_VOCABULARY.index(words[0]) for name, words in _CLASSES.items()}
_SUBJECT = 1


class AgreementSentences(NamedTuple):
    """A batch of sentences, and what was drawn for each of them."""

    batch: Batch
    """Ids (T, B); targets and mask at the step before the verb."""
    distance: Int32[Array, " B"]
    """Steps from the subject to the verb: ``inputs[1]`` is the subject and ``inputs[1 + distance]`` the verb."""
    num_attractors: Int32[Array, " B"]
    """Nouns between them."""
    num_opposite: Int32[Array, " B"]
    """How many of these have the other number than the subject."""
    number: Int32[Array, " B"]
    """0 for a singular subject, 1 for a plural one."""


def shortest_distance(num_attractors: int) -> int:
    """Returns the shortest distance of subject and verb that leaves room for so many attractors.

    Raises:
      ValueError: a negative number.

    >>> shortest_distance(0), shortest_distance(3)
    (5, 13)
    """
    check_at_least("agreement", "num_attractors", num_attractors, 0)
    return 5 if num_attractors == 0 else 4 + 3 * num_attractors


def _range(what: str, wanted: int | tuple[int, int]) -> tuple[int, int]:
    least, most = (wanted, wanted) if isinstance(wanted, int) else wanted
    if least > most:
        raise ValueError(f"agreement: expected {what} as (least, most), found {wanted}")
    return least, most


def _check(
    distance: int | tuple[int, int], num_attractors: int | tuple[int, int], mismatch: Real
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the two ranges after checking that every combination of them can be made."""
    distances, attractors = _range("distance", distance), _range("num_attractors", num_attractors)
    check_at_least("agreement", "num_attractors", attractors[0], 0)
    least = shortest_distance(attractors[1])
    check_at_least("agreement", f"distance for {attractors[1]} attractors", distances[0], least)
    if not 0 <= mismatch <= 1:
        raise ValueError(f"agreement: expected mismatch from 0 to 1, found {mismatch}")
    return distances, attractors


def _pick(key, name, shape):
    """Draws ids of a class of words."""
    return jax.random.randint(key, shape, _FIRST[name], _FIRST[name] + len(_CLASSES[name]), jnp.int32)


def _sentence(key, distance, num_attractors, *, mismatch, most_attractors, most_fillers, num_steps):
    """Returns the ids of one sentence with its padding, the subject's number and how many attractors differ from it.

    Every word that may occur has a rank: a filler that of the word before which it stands, less a half, and a word that
    does not occur infinity.  Sorting by rank makes the sentence.
    """
    keys = jax.random.split(key, 10)
    key_number, key_opposite, key_noun, key_intransitive, key_transitive = keys[:5]
    key_preposition, key_slot, key_adverb, key_adjective, key_state = keys[5:]

    attractors = jnp.arange(most_attractors, dtype=jnp.int32)
    is_there = attractors < num_attractors
    number = jax.random.randint(key_number, (), 0, 2, jnp.int32)
    is_opposite = jax.random.bernoulli(key_opposite, mismatch, (most_attractors,))
    numbers = jnp.append(number, jnp.where(is_opposite, 1 - number, number))
    kinds = jax.random.randint(key_noun, numbers.shape, 0, len(_SINGULARS), jnp.int32)
    nouns = _FIRST["noun"] + 2 * kinds + numbers
    intransitive = _pick(key_intransitive, "intransitive", ())
    clause_verb = jnp.where(num_attractors == 0, intransitive, _pick(key_transitive, "transitive", ()))
    start = jnp.stack([jnp.int32(_THE), nouns[0], jnp.int32(_COMMA), jnp.int32(_WHICH), clause_verb])

    # An attractor takes three ranks: preposition, "the", noun; the first has no preposition but keeps the rank free.
    verb_rank = len(start) - 1
    noun_rank = (verb_rank + 3 * (attractors + 1)).astype(jnp.float32)
    prepositions = _pick(key_preposition, "preposition", attractors.shape)
    has_preposition = is_there & (attractors > 0)

    # Slot 0 is before the clause's verb, slot j before attractor j.
    needed = jnp.where(num_attractors == 0, 5, 4 + 3 * num_attractors)
    is_filler = jnp.arange(most_fillers, dtype=jnp.int32) < distance - needed
    slots = jax.random.randint(key_slot, (most_fillers,), 0, num_attractors + 1, jnp.int32)
    filler_rank = jnp.append(jnp.float32(verb_rank), noun_rank)[slots] - 0.5
    adverbs = _pick(key_adverb, "adverb", slots.shape)
    fillers = jnp.where(slots == 0, adverbs, _pick(key_adjective, "adjective", slots.shape))

    verb = _FIRST["verb"] + number
    end = jnp.stack([jnp.int32(_COMMA), verb, _pick(key_state, "state", ()), jnp.int32(_STOP)])
    end_rank = verb_rank + 3 * most_attractors + 1 + jnp.arange(len(end))

    words = jnp.concatenate([start, prepositions, jnp.full_like(attractors, _THE), nouns[1:], fillers, end])
    ranks = jnp.concatenate(
        [
            jnp.arange(len(start), dtype=jnp.float32),
            jnp.where(has_preposition, noun_rank - 2, jnp.inf),
            jnp.where(is_there, noun_rank - 1, jnp.inf),
            jnp.where(is_there, noun_rank, jnp.inf),
            jnp.where(is_filler, filler_rank, jnp.inf),
            end_rank.astype(jnp.float32),
        ]
    )
    # stable, so that fillers of one slot stay in the order in which they were drawn
    ids = jnp.where(jnp.isinf(ranks), _PAD, words)[jnp.argsort(ranks)][:num_steps]
    return ids, number, jnp.sum(is_there & is_opposite, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("batch_size", "distances", "attractors"))
def _sentences(key, mismatch, *, batch_size, distances, attractors):
    """Returns the sentences; jitted because their many small operations would be compiled one by one."""
    num_steps = distances[1] + 4
    key_distance, key_attractors, key_sentences = jax.random.split(key, 3)
    distance = jax.random.randint(key_distance, (batch_size,), distances[0], distances[1] + 1, jnp.int32)
    num_attractors = jax.random.randint(key_attractors, (batch_size,), attractors[0], attractors[1] + 1, jnp.int32)
    sentence = functools.partial(
        _sentence,
        mismatch=mismatch,
        most_attractors=attractors[1],
        most_fillers=distances[1] - shortest_distance(attractors[0]),
        num_steps=num_steps,
    )
    ids, number, num_opposite = jax.vmap(sentence, out_axes=(1, 0, 0))(
        jax.random.split(key_sentences, batch_size), distance, num_attractors
    )
    before_verb = distance + _SUBJECT - 1
    is_asked = jnp.arange(num_steps, dtype=jnp.int32)[:, None] == before_verb[None, :]
    batch = Batch(ids, jnp.where(is_asked, number[None, :], 0), is_asked.astype(jnp.float32))
    return AgreementSentences(batch, distance, num_attractors, num_opposite, number)


def agreement_sentences(
    key: Key[Array, ""],
    batch_size: int,
    *,
    distance: int | tuple[int, int] = (10, 30),
    num_attractors: int | tuple[int, int] = (0, 2),
    mismatch: Real = 0.5,
) -> AgreementSentences:
    """Returns random sentences with the distance and the attractors of each.

    Args:
      key: a key.
      batch_size: B, at least 1.
      distance: from subject to verb, in steps: a number, or (least, most), each value between them equally likely.
      num_attractors: nouns between them, likewise and independently.
      mismatch: probability, for each attractor, of the number that is not the subject's.

    Returns:
      :class:`AgreementSentences` with T = (largest distance) + 4 steps.

    Raises:
      ValueError: a distance too short for the attractors (:func:`shortest_distance`), a range that is none, a
        probability outside of 0 to 1, or no sentences.

    >>> import jax
    >>> found = agreement_sentences(jax.random.key(2), 8, distance=7, num_attractors=1)
    >>> found.batch.inputs.shape, [int(n) for n in found.distance[:3]]
    ((11, 8), [7, 7, 7])
    """
    distances, attractors = _check(distance, num_attractors, mismatch)
    check_at_least("agreement", "batch_size", batch_size, 1)
    return _sentences(key, jnp.float32(mismatch), batch_size=batch_size, distances=distances, attractors=attractors)


def agreement(
    *,
    distance: int | tuple[int, int] = (10, 30),
    num_attractors: int | tuple[int, int] = (0, 2),
    mismatch: Real = 0.5,
) -> Task:
    """Returns the agreement task: was or were, by the number of a subject ``distance`` steps before.

    Inputs are ids (T, B) with T = (largest distance) + 4; the target, one of 2 classes in (T, B), counts at the step
    before the verb.  Baseline: ln 2.  Arguments and errors are those of :func:`agreement_sentences`, which also tells
    distance and attractors of each sentence.

    >>> import jax
    >>> task = agreement(distance=(7, 12), num_attractors=(0, 1))
    >>> task.batch(jax.random.key(0), 4).targets.shape, round(task.baseline, 4)
    ((16, 4), 0.6931)
    """
    _check(distance, num_attractors, mismatch)

    def batch(key: Key[Array, ""], batch_size: int) -> Batch:
        return agreement_sentences(
            key, batch_size, distance=distance, num_attractors=num_attractors, mismatch=mismatch
        ).batch

    size = len(AGREEMENT_VOCABULARY)
    return Task("agreement", size, 2, size, "cross_entropy", math.log(2), batch)


def nearest_noun_accuracy(*, num_attractors: int | tuple[int, int] = (0, 2), mismatch: Real = 0.5) -> float:
    """Returns how often the verb agrees with the noun nearest before it: what an answer from short memory reaches.

    (1 + n (1 − mismatch)) / (n + 1) when 0 to n attractors are equally likely: without any it is always right.

    Args:
      num_attractors: a number, or (least, most), as in :func:`agreement_sentences`.
      mismatch: probability of the other number.

    Raises:
      ValueError: a range that is none, or a probability outside of 0 to 1.

    >>> nearest_noun_accuracy(num_attractors=(0, 3), mismatch=0.5)
    0.625
    """
    least, most = _range("num_attractors", num_attractors)
    _check(shortest_distance(most), num_attractors, mismatch)
    counts = range(least, most + 1)
    return sum(1.0 if count == 0 else 1.0 - mismatch for count in counts) / len(counts)


def agreement_words(ids: Int[Array | np.ndarray, " T"]) -> str:
    """Returns one sentence of ids, as in ``batch.inputs[:, b]``, in English.

    Raises:
      ValueError: an id without a word.

    >>> agreement_words(np.array([3, 7, 1, 4, 32, 1, 5, 44, 2, 0]))
    'The cat, which waited, was tired.'
    """
    numbers = np.asarray(ids).tolist()
    unknown = [number for number in numbers if not 0 <= number < len(AGREEMENT_VOCABULARY)]
    if unknown:
        raise ValueError(f"agreement_words: expected ids from 0 to {len(AGREEMENT_VOCABULARY) - 1}, found {unknown[0]}")
    sentence = " ".join(AGREEMENT_VOCABULARY[number] for number in numbers if number != _PAD)
    return (sentence[:1].upper() + sentence[1:]).replace(" ,", ",").replace(" .", ".")
