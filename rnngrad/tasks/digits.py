"""Pixel rows: name a handwritten digit that is shown row by row.

The images are those that scikit-learn ships: the test part of the UCI "Optical Recognition of Handwritten Digits" data
(Alpaydin & Kaynak 1998), 1797 images of 8 × 8 pixels with grey values 0 … 16, divided by 16 here.  One row is one step
(T = 8, D = 8), or one pixel is (T = 64, D = 1, row after row), after the sequential MNIST of Le, Jaitly & Hinton 2015,
arXiv 1504.00941, which is 784 pixels long.  The label counts at the last step.  An even guess among the ten classes
costs ln 10 nats on any image, the baseline; the classes have nearly the same size, but not quite.

Three parts, of 1437, 180 and 180 images, in an order that is fixed forever: by the SHA-256 of "digits <index>", which
needs no generator whose stream may change.  The writers of the images are not recorded, so all parts share them.
"""

from __future__ import annotations

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rnngrad.tasks.batches import Batch, Task, check_at_least, last_step_only

# The first 80 % of the order, the next 10 %, the rest.
_SPLITS = {"train": slice(0, 1437), "valid": slice(1437, 1617), "test": slice(1617, 1797)}
_SIZES = {"rows": (8, 8), "pixels": (64, 1)}


def digits(*, split: str = "train", order: str = "rows") -> Task:
    """Returns the digits task on one part of the images.

    Inputs are (T, B, D) with values in [0, 1]; the label, one of 10 classes in (T, B), counts at the last step.  A
    batch is drawn without replacement: one of the size of the part holds each of its images once.  Baseline: ln 10.

    Args:
      split: ``"train"`` (1437 images), ``"valid"`` (180) or ``"test"`` (180).
      order: ``"rows"``, 8 steps of 8 pixels, or ``"pixels"``, 64 steps of one.

    Raises:
      ModuleNotFoundError: scikit-learn is not installed; names the extra that brings it.
      ValueError: unknown part or order; a batch of no sequences or of more than there are.

    >>> import jax
    >>> task = digits(split="valid")
    >>> task.batch(jax.random.key(0), 180).inputs.shape, round(task.baseline, 4)
    ((8, 180, 8), 2.3026)
    """
    if split not in _SPLITS:
        raise ValueError(f"digits: unknown split {split!r}; expected one of: {', '.join(_SPLITS)}")
    if order not in _SIZES:
        raise ValueError(f"digits: unknown order {order!r}; expected one of: {', '.join(_SIZES)}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tasks.digits needs scikit-learn: pip install 'rnngrad[experiments]'") from error
    all_pixels, all_labels = load_digits(return_X_y=True)
    shuffled = sorted(range(len(all_labels)), key=lambda i: hashlib.sha256(f"digits {i}".encode()).digest())
    chosen = np.array(shuffled[_SPLITS[split]])
    num_steps, input_size = _SIZES[order]
    # kept as NumPy arrays, which a jitted batch takes in as constants
    images = (all_pixels[chosen] / 16).astype(np.float32).reshape(-1, num_steps, input_size).swapaxes(0, 1)
    labels = all_labels[chosen].astype(np.int32)

    def batch(key: Key[Array, ""], batch_size: int) -> Batch:
        check_at_least("digits", "batch_size", batch_size, 1)
        if batch_size > len(labels):
            raise ValueError(f"digits: expected batch_size of at most {len(labels)} ({split}), found {batch_size}")
        drawn = jax.random.choice(key, len(labels), (batch_size,), replace=False)
        return last_step_only(jnp.asarray(images)[:, drawn], jnp.asarray(labels)[drawn])

    return Task("digits", input_size, 10, None, "cross_entropy", math.log(10), batch)
