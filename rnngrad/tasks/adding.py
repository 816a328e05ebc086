"""The adding problem: the sum of two marked numbers among many.

::

    x_t = (v_t, m_t)        v_t ~ U[0, 1];  m_t = 1 at t = p and t = q, else 0
    target at the last step:   v_p + v_q        p uniform in the first half of the steps, q in the second

v is channel 0 of ``inputs`` and m channel 1.  Predicting the mean, 1, costs the variance of a sum of two uniform
numbers: 2/12 = 1/6, the baseline.

Sources: Hochreiter & Schmidhuber 1997, section 5.4, in the form of Le, Jaitly & Hinton 2015, arXiv 1504.00941 (values
in [0, 1], the sum itself as target) and of Arjovsky, Shah & Bengio 2016, arXiv 1511.06464 (one mark in each half).  The
original draws values from [−1, 1], puts one mark among the first ten steps, marks the ends with −1 and scales the sum.
Settings of those papers: T = 150 to 750.  With an odd T the second half is the longer one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from rnngrad.tasks.batches import Batch, Task, check_at_least, last_step_only


def adding(num_steps: int) -> Task:
    """Returns the adding problem over ``num_steps`` steps.

    Inputs are (T, B, 2), values and marks; the target, (T, B, 1), counts at the last step.  Baseline: 1/6.

    Args:
      num_steps: T, at least 2.

    Raises:
      ValueError: too few steps; a batch of no sequences.

    >>> import jax
    >>> task = adding(50)
    >>> task.batch(jax.random.key(0), 4).inputs.shape, round(task.baseline, 4)
    ((50, 4, 2), 0.1667)
    """
    check_at_least("adding", "num_steps", num_steps, 2)
    half = num_steps // 2

    def batch(key: Key[Array, ""], batch_size: int) -> Batch:
        check_at_least("adding", "batch_size", batch_size, 1)
        key_values, key_first, key_second = jax.random.split(key, 3)
        values = jax.random.uniform(key_values, (num_steps, batch_size), jnp.float32)
        first = jax.random.randint(key_first, (1, batch_size), 0, half, jnp.int32)
        second = jax.random.randint(key_second, (1, batch_size), half, num_steps, jnp.int32)
        steps = jnp.arange(num_steps, dtype=jnp.int32)[:, None]
        marks = ((steps == first) | (steps == second)).astype(jnp.float32)
        sums = jnp.sum(values * marks, axis=0)
        return last_step_only(jnp.stack([values, marks], axis=-1), sums[:, None])

    return Task("adding", 2, 1, None, "mse", 1 / 6, batch)
