"""Copy: repeat a few symbols after a long silence.

::

    step        0 … n−1     n … n+T−2    n+T−1        n+T … T+2n−1
    input       symbols     blank        delimiter    blank
    target      blank       blank        blank        the symbols, in order

n is ``length``, T is ``delay``, K is ``num_symbols``; T + 2n steps in all, and all of them count.  Symbols have the
ids 0 … K−1, the blank K, the delimiter K + 1; the delimiter is never a target.  A symbol is wanted T + n steps after it
was shown.  Whoever remembers nothing still knows when to be silent, and pays ln K for each of the n symbols:
n ln K/(T + 2n) per step, the baseline (for K = 8 and n = 10 the paper's 10 ln 8/(T + 20)).

Sources: Hochreiter & Schmidhuber 1997 for the idea, Arjovsky, Shah & Bengio 2016, arXiv 1511.06464, section 5.1, for
this form, and Tallec & Ollivier 2018, arXiv 1804.11188, for its use with chrono initialisation.  Settings of those
papers: K = 8, n = 10, T = 100 to 2000.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from rnngrad.tasks.batches import Batch, Task, check_at_least


def copy_memory(delay: int, *, num_symbols: int = 8, length: int = 10) -> Task:
    """Returns the copy task with ``delay`` steps between the symbols and the signal to repeat them.

    Inputs are ids (T, B) with T = delay + 2·length; targets are classes (T, B) out of ``num_symbols`` + 1, at every
    step.  Baseline: length·ln(num_symbols)/T.

    Args:
      delay: at least 1; blanks, the last of them replaced by the delimiter.
      num_symbols: different symbols, at least 2.
      length: symbols to repeat, at least 1.

    Raises:
      ValueError: a size below its least; a batch of no sequences.

    >>> import jax
    >>> task = copy_memory(3, length=2)
    >>> task.batch(jax.random.key(0), 1).inputs[2:, 0].tolist()
    [8, 8, 9, 8, 8]
    >>> task.vocabulary_size, task.output_size, round(copy_memory(100).baseline, 4)
    (10, 9, 0.1733)
    """
    check_at_least("copy_memory", "delay", delay, 1)
    check_at_least("copy_memory", "num_symbols", num_symbols, 2)
    check_at_least("copy_memory", "length", length, 1)
    num_steps = delay + 2 * length
    blank, delimiter = num_symbols, num_symbols + 1

    def batch(key: Key[Array, ""], batch_size: int) -> Batch:
        check_at_least("copy_memory", "batch_size", batch_size, 1)
        symbols = jax.random.randint(key, (length, batch_size), 0, num_symbols, jnp.int32)
        silence = jnp.full((num_steps, batch_size), blank, jnp.int32)
        inputs = silence.at[:length].set(symbols).at[length + delay - 1].set(delimiter)
        targets = silence.at[-length:].set(symbols)
        return Batch(inputs, targets, jnp.ones((num_steps, batch_size), jnp.float32))

    baseline = length * math.log(num_symbols) / num_steps
    return Task("copy_memory", num_symbols + 2, num_symbols + 1, num_symbols + 2, "cross_entropy", baseline, batch)
