"""From words on a command line to a model, its weights and its inputs.

::

    my_module:cell        the attribute of a module, with the folder one stands in on the path
    my_module:nets.small  an attribute of an attribute
    my_module:make        a function that asks for nothing is called; it may return (model, params); layers are a list
    torch, keras          no module of yours: the weight file says what the model is

Weights go into the model's own structure by name: dotted, as in ``w_ih``, ``layer_0.w_hh`` or ``cell.hi.kernel``, with
or without a leading ``params.``; ``/`` counts as a dot.  Where only names tell the structure (Flax linen, a step
function) it is made of them.  A cell of ours also takes the names of a Torch module.  Nothing here unpickles.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnngrad import interop
from rnngrad.training.model import Model
from rnngrad.types import Cell, describe, leaf_names

LIBRARIES = ("torch", "keras")
"""What stands for a model that its weight file describes."""


class UserError(ValueError):
    """A word, a file or a module that the user can put right; shown in one line."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the known word nearest to this one, or ``""`` if none is near.

    >>> suggestion("diagonse", ["cells", "diagnose"])
    "; did you mean 'diagnose'?"
    """
    near = difflib.get_close_matches(word, sorted(set(known)), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def resolve(target: str) -> Any:
    """Returns the object that ``module:attribute`` names.

    The working directory is put on the import path and stays there, for what the module imports later.

    Raises:
      UserError: no such module or attribute (with the nearest name), or the module fails as it is imported.

    >>> resolve("rnngrad:cells.lstm").__name__
    'lstm'
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        hint = suggestion(target.lower(), LIBRARIES) or f", e.g. {_dotted(module_name) or 'my_module'}:cell"
        raise UserError(f"expected MODULE:ATTRIBUTE, {' or '.join(LIBRARIES)}, found {target!r}{hint}")
    if module_name != (dotted := _dotted(module_name)):
        raise UserError(f"expected the name of a module, found {module_name!r}; did you mean '{dotted}:{path}'?")
    found: Any = _module(module_name)
    seen = module_name
    for name in path.split("."):
        if not hasattr(found, name):
            known = [one for one in dir(found) if not one.startswith("_")]
            raise UserError(f"{seen} has no attribute {name!r}{suggestion(name, known)}")
        found = getattr(found, name)
        seen += ("." if ":" in seen else ":") + name
    return found


def _dotted(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").strip(".")


def _module(name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise UserError(f"module {name!r} imports {error.name!r}, which is not installed") from error
        parent, _, _ = error.name.rpartition(".")
        siblings = pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", None) if parent else None)
        known = [f"{parent}.{info.name}" if parent else info.name for info in siblings]
        raise UserError(f"no module {error.name!r} in {folder} or installed{suggestion(error.name, known)}") from error
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        raise UserError(f"module {name!r} fails on import: {type(error).__name__}: {error}") from error


def build(target: str, found: Any) -> Any:
    """Returns what a factory makes, or the object itself if it is none.

    A factory is a function, a bound method, a partial or a class that can be called without arguments.

    Args:
      target: what to call it in messages.
      found: the object.

    Raises:
      UserError: a class that asks for arguments, or a factory that fails.

    >>> build("here", lambda: 3), build("here", 4)
    (3, 4)
    """
    if not (inspect.isroutine(found) or inspect.isclass(found) or isinstance(found, functools.partial)):
        return found
    required = [
        parameter.name
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required and inspect.isclass(found):
        raise UserError(
            f"{target} is a class that asks for {', '.join(required)}: name an instance of it, or a function without "
            "arguments that makes one"
        )
    if required:  # a step function: (params, state, x)
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:  # whatever a user's function does
        raise UserError(f"calling {target} fails: {type(error).__name__}: {error}") from error


def fill(expected: Any, weights: Mapping[str, Any]) -> Any:
    """Returns ``expected`` with every array replaced by the weight of its name; what is no array stays.

    Args:
      expected: any pytree of arrays or of their shapes, e.g. ``jax.eval_shape(cell.init, key)``.
      weights: arrays by name.

    Raises:
      UserError: names that are missing or not expected, each with the nearest one, or other shapes or dtypes.

    >>> fill({"a": {"b": jnp.zeros(2)}}, {"a.b": jnp.ones(2)})
    {'a': {'b': Array([1., 1.], dtype=float32)}}
    """
    leaves, structure = jax.tree.flatten(expected)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    names = [name for name, wanted in zip(leaf_names(expected), is_array, strict=True) if wanted]
    given = {_plain(name): name for name in weights}
    if len(given) < len(weights):
        raise UserError(f"weights: two names that mean the same among {', '.join(weights)}")
    wanted = {_plain(name): name for name in names}
    missing = [wanted[name] for name in wanted.keys() - given.keys()]
    unexpected = [given[name] for name in given.keys() - wanted.keys()]
    filled, misfits = list(leaves), []
    for index, name in zip((i for i, here in enumerate(is_array) if here), names, strict=True):
        if _plain(name) not in given:
            continue
        found = weights[given[_plain(name)]]
        if describe(found) != describe(leaves[index]):
            misfits.append(f"{given[_plain(name)]}: expected {describe(leaves[index])}, found {describe(found)}")
        filled[index] = jnp.asarray(found)
    problems = [
        *_listed("missing", missing, unexpected),
        *_listed("not expected", unexpected, missing or names),
        *misfits,
    ]
    if problems:
        raise UserError(f"weights do not fit the model: {'; '.join(problems)}")
    return jax.tree.unflatten(structure, filled)


def _plain(name: str) -> str:
    return name.replace("/", ".").removeprefix("params.")


_MOST = 6
"""Names listed in one message."""


def _listed(what: str, names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = []
    for name in sorted(names)[:_MOST]:
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return [f"{what}: {', '.join(shown)}{more}"]


class Loaded(NamedTuple):
    """A model and its weights, as ``rg.diagnose`` takes them."""

    model: Any
    params: Any
    """None for a model that holds its own."""


def load(target: str, weights: Path | None, part: str | None, key: jax.Array) -> Loaded:
    """Returns the model that a word names, with weights from a file, else its own, else (a cell of ours) fresh ones.

    Args:
      target: ``module:attribute``, ``torch`` or ``keras``.
      weights: a file that ``rnngrad.interop.read_weights`` takes, or None.
      part: the beginning of the names that belong to the model, where the file holds more (of Keras: its layers, with
        commas), or None.
      key: draws fresh weights.

    Raises:
      UserError: what :func:`resolve`, :func:`build` and :func:`fill` say, or nothing to take the weights from.
      ValueError, OSError, ImportError: what ``rnngrad.interop`` says of the file.
    """
    if target in LIBRARIES:
        if weights is None:
            raise UserError(f"{target}: expected --weights FILE, which says what the model is")
        if target == "torch":
            return Loaded(interop.from_torch(interop.read_weights(weights), prefix=part or ""), None)
        return Loaded(interop.from_keras(weights, layers=tuple(part.split(",")) if part else ()), None)
    model = build(target, resolve(target))
    # a NamedTuple, such as a Cell, is no pair
    model, params = model if type(model) is tuple and len(model) == 2 else (model, None)
    is_ours = isinstance(model, Cell | Model)
    if weights is None:
        if part is not None:
            raise UserError("--part: expected --weights FILE, of which it names a part")
        return Loaded(model, model.init(key) if is_ours and params is None else params)
    named = select(interop.read_weights(weights), part)
    if params is not None:
        return Loaded(model, fill(params, named))
    if is_ours:
        expected = jax.eval_shape(model.init, key)
        if isinstance(model, Cell) and any(map(_TORCH_NAME.fullmatch, named)):
            theirs = interop.from_torch(named)
            if [one.cell.name for one in theirs.passes] != [model.name]:
                found = ", ".join(one.cell.name for one in theirs.passes)
                raise UserError(f"weights: expected those of {model.name!r}, found {theirs.source}, our {found}")
            return Loaded(model, theirs.cell_params)
        return Loaded(model, fill(expected, named))
    first = model[0] if isinstance(model, list) and model else model
    if _is_of(first, "flax.nnx"):
        return Loaded(_filled_nnx(model, named), None)
    if _is_of(first, "equinox"):
        return Loaded(fill(model, named), None)
    return Loaded(model, nest(named))


_TORCH_NAME = re.compile(r"(.*\.)?(weight|bias)_(ih|hh)(_l\d+(_reverse)?)?")


def _is_of(model: Any, package: str) -> bool:
    """Asks by name, so that a library is not imported only to be asked for."""
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in type(model).__mro__)


def _filled_nnx(model: Any, weights: Mapping[str, Any]) -> Any:
    from flax import nnx

    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    # checkpoints of a whole module hold its random streams and statistics too, which stay the module's own, and orbax
    # writes a variable as {"value": array}
    others = {_plain(name) for state in rest for name in leaf_names(nnx.to_pure_dict(state))}
    named = {name.removesuffix(".value"): weight for name, weight in weights.items()}
    weights = {name: weight for name, weight in named.items() if _plain(name) not in others}
    nnx.replace_by_pure_dict(params, fill(nnx.to_pure_dict(params), weights))
    return nnx.merge(graph, params, *rest)


def select(weights: Mapping[str, Any], part: str | None) -> dict[str, Any]:
    """Returns the weights whose names begin with ``part`` and a dot, without that beginning; all of them for None.

    Raises:
      UserError: no name begins so.

    >>> select({"encoder.w": 1, "head.w": 2}, "encoder")
    {'w': 1}
    """
    if part is None:
        return dict(weights)
    start = part.removesuffix(".") + "."
    found = {name.removeprefix(start): weight for name, weight in weights.items() if name.startswith(start)}
    if not found:
        words = [name.split(".") for name in weights]
        known = {".".join(parts[:depth]) for parts in words for depth in range(1, len(parts))}
        raise UserError(f"--part: no weights begin with {start!r}{suggestion(part, known)}")
    return found


def nest(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dictionary of dictionaries with a level per dot.

    Raises:
      UserError: a name that is also the beginning of another.

    >>> nest({"cell.kernel": jnp.ones(1), "cell.bias": jnp.zeros(1)})
    {'cell': {'kernel': Array([1.], dtype=float32), 'bias': Array([0.], dtype=float32)}}
    """
    nested: dict[str, Any] = {}
    for name, weight in weights.items():
        *above, last = name.replace("/", ".").split(".")
        inner = nested
        for word in above:
            inner = inner.setdefault(word, {})
            if not isinstance(inner, dict):
                raise UserError(f"weights: a name is also the beginning of {name!r}")
        if last in inner:
            raise UserError(f"weights: {name!r} is there twice, or also the beginning of another name")
        inner[last] = jnp.asarray(weight)
    return nested


def read_input(path: Path) -> jax.Array:
    """Returns the one array of a ``.npy`` or ``.npz`` file; nothing in it is run.

    Raises:
      FileNotFoundError: no such file; names similar ones.
      UserError: several arrays, none of which is called ``xs``.
      ValueError: something other than arrays of numbers.
    """
    arrays = interop.read_weights(path)
    if len(arrays) > 1 and "xs" not in arrays:
        raise UserError(f"{path}: expected one array, or one called xs, found {', '.join(arrays)}")
    return jnp.asarray(arrays["xs"] if len(arrays) > 1 else next(iter(arrays.values())))


def random_input(shape: str, input_size: int, key: jax.Array) -> jax.Array:
    """Returns standard normal inputs of shape (T, D) for ``"T"``, of (T, B, D) for ``"T,B"``.

    Raises:
      UserError: not one or two whole numbers from 1 up.

    >>> random_input("4,2", 3, jax.random.key(0)).shape
    (4, 2, 3)
    """
    words = shape.split(",")
    if len(words) > 2 or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--random-input: expected T or T,B, e.g. 200,8, found {shape!r}")
    return jax.random.normal(key, (*map(int, words), input_size))


__all__ = [
    "LIBRARIES",
    "Loaded",
    "UserError",
    "build",
    "fill",
    "load",
    "nest",
    "random_input",
    "read_input",
    "resolve",
    "select",
    "suggestion",
]
