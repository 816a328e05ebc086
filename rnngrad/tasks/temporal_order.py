"""Temporal order: which of X and Y came first, among distractors.

Two (or three) steps show a relevant symbol, X or Y with equal chance; all others show one of four distractors.  At the
last step the network names the sequence of relevant symbols: one of 4 (or 8) classes.  With u = ⌊T/10⌋ the relevant
symbols stand at uniform places in

=======  ================  ==============================================================
symbols  problem of H&S    steps (0-based, the end excluded)
=======  ================  ==============================================================
2        6a                u … 2u,  ⌊5T/10⌋ … ⌊5T/10⌋ + u
3        6b                u … 2u,  ⌊3T/10⌋ … ⌊3T/10⌋ + u,  ⌊6T/10⌋ … ⌊6T/10⌋ + u
=======  ================  ==============================================================

Ids: X is 0, Y is 1, the distractors 2 … 5.  The class is the binary number of the relevant symbols, the first the most
significant: XX, XY, YX, YY are 0 … 3.  Without memory every class is equally likely: ln 4 or ln 8 nats, the baseline.

Sources: Hochreiter & Schmidhuber 1997, section 5.6 (T = 100 to 110, places 10–20 and 50–60, or 10–20, 33–43 and 66–76,
and a symbol each for start and end), in the form of Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, section 4.1, with
the places of the program that they published: fixed T, places that scale with it, no start or end symbol.  Settings
of that paper: T = 50 to 200.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rnngrad.tasks.batches import Batch, Task, check_at_least, last_step_only

# First tenth of the sequence in which each relevant symbol may stand.
_TENTHS = {2: (1, 5), 3: (1, 3, 6)}
_NUM_DISTRACTORS = 4


def temporal_order(num_steps: int, num_symbols: int = 2) -> Task:
    """Returns the temporal-order task with 2 or 3 relevant symbols.

    Inputs are ids (T, B) out of 6; the target, one of 4 or 8 classes in (T, B), counts at the last step.  Baseline:
    ln 4 or ln 8.

    Args:
      num_steps: T, at least 10, so that every tenth of the sequence is a step or more.
      num_symbols: 2 or 3 relevant symbols.

    Raises:
      ValueError: too few steps, another number of symbols, or a batch of no sequences.

    >>> import jax
    >>> batch = temporal_order(10).batch(jax.random.key(0), 2)
    >>> x, y = batch.inputs[1], batch.inputs[5]
    >>> (2 * x + y == batch.targets[-1]).tolist()
    [True, True]
    """
    if num_symbols not in _TENTHS:
        raise ValueError(f"temporal_order: expected num_symbols of 2 or 3, found {num_symbols}")
    check_at_least("temporal_order", "num_steps", num_steps, 10)
    starts = np.array([tenth * num_steps // 10 for tenth in _TENTHS[num_symbols]], np.int32)[:, None]
    weights = np.array([2**power for power in reversed(range(num_symbols))], np.int32)[:, None]

    def batch(key: Key[Array, ""], batch_size: int) -> Batch:
        check_at_least("temporal_order", "batch_size", batch_size, 1)
        key_distractors, key_places, key_symbols = jax.random.split(key, 3)
        distractors = jax.random.randint(key_distractors, (num_steps, batch_size), 2, 2 + _NUM_DISTRACTORS, jnp.int32)
        shape = (num_symbols, batch_size)
        places = starts + jax.random.randint(key_places, shape, 0, num_steps // 10, jnp.int32)
        symbols = jax.random.randint(key_symbols, shape, 0, 2, jnp.int32)
        inputs = distractors.at[places, jnp.arange(batch_size)[None, :]].set(symbols)
        return last_step_only(inputs, jnp.sum(weights * symbols, axis=0, dtype=jnp.int32))

    size, classes = 2 + _NUM_DISTRACTORS, 2**num_symbols
    return Task("temporal_order", size, classes, size, "cross_entropy", math.log(classes), batch)
