"""Layers of a library's cells, from the input upwards: which one hears what, and whose weights lie where.

Shared by the adapters of the libraries; each of them says how one cell of its own becomes one of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnngrad.interop.adapted import Adapted, Pass, join
from rnngrad.types import Cell, Params

Weights = Any
"""Weights in the source library's structure."""


class Site(NamedTuple):
    """A cell of the source library, where it stands."""

    module: Any
    path: tuple[str | int, ...]
    """keys that lead to its weights"""
    reverse: bool = False
    """whether it runs from the last step to the first"""


class Recurrent(NamedTuple):
    """One cell of a library, as ours."""

    cell: Cell
    has_split: bool
    convert: Callable[[Weights], Params]
    """maps that cell's weights to ours"""


AdaptOne = Callable[[Site, Weights, Any], Recurrent]
"""``(site, its weights, x) -> Recurrent``; x are shapes of one step's input, None if nothing is known of it."""


def adapt_layers(
    source: str,
    layers: list[tuple[Site, ...]],
    weights: Weights,
    normalise: Callable[[Weights], Weights],
    adapt_one: AdaptOne,
    *,
    example: Any,
) -> Adapted:
    """Returns the adapted model.

    Args:
      source: what to call it.
      layers: its cells; one or two to a layer.
      weights: of the whole model.
      normalise: checks whole weights and brings them into the form that the sites' paths lead through.
      adapt_one: turns one cell into ours.
      example: input of one step, or None.

    Raises:
      ValueError: a layer that hears another number of values than it expects.
    """
    nested = normalise(weights)
    built: list[tuple[Recurrent, ...]] = []
    x = example
    for index, layer in enumerate(layers):
        built.append(tuple(adapt_one(site, at_path(nested, site.path), x) for site in layer))
        read = []
        for one, site in zip(built[-1], layer, strict=True):
            heard = None if x is None or len(jnp.shape(x)) != 1 else jnp.shape(x)[0]
            if None not in (heard, one.cell.input_size) and heard != one.cell.input_size:
                raise ValueError(
                    f"{source}: layer {index} ({type(site.module).__name__}) expects inputs of size "
                    f"{one.cell.input_size}, but hears {heard} values"
                )
            params = jax.eval_shape(lambda one=one, site=site: one.convert(at_path(nested, site.path)))
            read.append(jax.eval_shape(one.cell.read, params, jax.eval_shape(one.cell.init_state)))
        x = jax.ShapeDtypeStruct((sum(y.shape[0] for y in read),), read[0].dtype)

    def convert(weights: Weights) -> tuple[tuple[Params, ...], ...]:
        nested = normalise(weights)
        return tuple(
            tuple(one.convert(at_path(nested, site.path)) for one, site in zip(ones, sites, strict=True))
            for ones, sites in zip(built, layers, strict=True)
        )

    passes = [
        tuple(Pass("", one.cell, site.reverse, one.has_split) for one, site in zip(ones, sites, strict=True))
        for ones, sites in zip(built, layers, strict=True)
    ]
    return join(source, passes, convert, weights)


def with_shared_weights(layers: list[tuple[Site, ...]], weights: Weights) -> list[tuple[Site, ...]]:
    """Returns the layers with paths that exist: a cell in two places has its weights stored once."""
    paths: dict[int, tuple[str | int, ...]] = {}
    for site in (site for layer in layers for site in layer):
        if jax.tree.leaves(at_path(weights, site.path)):
            paths.setdefault(id(site.module), site.path)
    return [tuple(site._replace(path=paths.get(id(site.module), site.path)) for site in layer) for layer in layers]


def only_for_one_cell(source: str, layers: list[tuple[Site, ...]], **given: Any) -> None:
    """Raises ValueError if something was given that belongs to a single cell, and the model has several."""
    count = sum(map(len, layers))
    for name, value in given.items():
        if count > 1 and value is not None:
            raise ValueError(f"{name}: expected for a model of one cell, but {source} has {count}; give none")


def at_path(weights: Weights, path: tuple[str | int, ...]) -> Weights:
    """Returns the part of nested weights that a path leads to; empty if there is none, as of a cell without weights."""
    for key in path:
        is_there = key in weights if isinstance(weights, dict) else isinstance(weights, list | tuple)
        weights = weights[key] if is_there else {}
    return weights
