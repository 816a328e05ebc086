"""Ground types: what a cell is, and the checks every public function makes on what it is given.

A cell is two pure functions::

    z             = preactivate(params, state, x)     what the gates hear
    state', gates = update(params, z, state)          how the memory moves

and ``step`` is their composition.  The step Jacobian J = ∂state'/∂state then splits exactly into J = D + G with
D = ∂update/∂state at frozen z (the direct path) and G = ∂update/∂z · ∂z/∂state (the gated path).

Axes: T time, B batch, N hidden, D input.  Cells act on the last axis, so ``xs: (T, D)`` with a state ``(N,)`` is one
sequence and ``xs: (T, B, D)`` with ``(B, N)`` a batch, by the same code.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

DTypeLike = Any
"""Anything `jnp.dtype` takes."""
Real = float | int
"""A number; a runtime check of ``float`` alone refuses ``1``."""
_Arguments = ParamSpec("_Arguments")
Params = Any
"""Weights of a cell: any pytree of arrays."""
State = Any
"""Memory of a cell: a NamedTuple of arrays with the hidden axis last."""
Gates = Any
"""Pre-activations (from ``preactivate``) or activations (from ``update``): a NamedTuple with one field per gate."""


@runtime_checkable
class InitFn(Protocol):
    """Draws the parameters of a cell from a key."""

    def __call__(self, key: Key[Array, ""]) -> Params: ...


@runtime_checkable
class InitStateFn(Protocol):
    """Returns the state before the first step, with ``batch_shape`` in front of the hidden axis."""

    def __call__(self, batch_shape: tuple[int, ...] = ()) -> State: ...


@runtime_checkable
class PreactivateFn(Protocol):
    """Maps (params, state, x) to the pre-activations z."""

    def __call__(self, params: Params, state: State, x: Any) -> Gates: ...


@runtime_checkable
class UpdateFn(Protocol):
    """Maps (params, z, state) to the next state and the gate activations."""

    def __call__(self, params: Params, z: Gates, state: State) -> tuple[State, Gates]: ...


@runtime_checkable
class ReadFn(Protocol):
    """Maps (params, state) to the real vector that a read-out or the next layer sees."""

    def __call__(self, params: Params, state: State) -> Array: ...


class Cell(NamedTuple):
    """A recurrent cell: pure functions, static and hashable.

    Cells are equal when their functions are the same ones.  A factory called again with the same plain arguments
    returns the same cell (:func:`remembered`), so that what was compiled for it serves again; else keep the cell.
    """

    name: str
    input_size: int | None
    """Size D of the last axis of x; None when the cell takes any input (``map_cell``)."""
    init: InitFn
    init_state: InitStateFn
    preactivate: PreactivateFn
    update: UpdateFn
    read: ReadFn

    def step(self, params: Params, state: State, x: Any) -> tuple[State, Gates]:
        """Returns ``(state', gates)``, one step of the cell."""
        return self.update(params, self.preactivate(params, state, x), state)


_remembered: weakref.WeakSet[Any] = weakref.WeakSet()
"""The functions of remembered cells."""


def _never_changes(value: Any) -> bool:
    if isinstance(value, Cell):
        return all(function in _remembered for function in value[2:])
    if type(value) is tuple:
        return all(type(entry) is float for entry in value)
    return value is None or isinstance(value, str | int | float | np.dtype | type)


def remembered(factory: Callable[_Arguments, Cell]) -> Callable[_Arguments, Cell]:
    """Returns the factory with a memory of its last 256 cells: the same one for the same arguments.

    Only of plain arguments: numbers, names, dtypes, and cells made of these.  Any other (a function that draws weights,
    say) might change, or hold arrays that should not be kept, and gives a new cell every time.
    """
    same: Callable[..., Cell] = functools.lru_cache(maxsize=256, typed=True)(factory)

    @functools.wraps(factory)
    def make(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Cell:
        if not all(map(_never_changes, (*args, *kwargs.values()))):
            return factory(*args, **kwargs)
        cell = same(*args, **kwargs)
        _remembered.update(cell[2:])
        return cell

    return make


class Trajectory(NamedTuple):
    """What ``unroll`` returns."""

    states: State
    """States after each step, leading axis T: ``states[t]`` is s_{t+1}."""
    gates: Gates
    """Gate activations of each step, leading axis T."""
    final: State
    """s_T, the state after the last step."""


def leaf_names(tree: Any) -> tuple[str, ...]:
    """Returns the dotted name of every leaf, e.g. ``("h", "c")`` or ``("layer_0.h", "layer_0.c", …)``.

    A tree that is a single array has the one name ``""``.
    """
    with_paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return tuple(jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in with_paths)


def select_names(names: tuple[str, ...], wanted: str | None, *, what: str) -> tuple[bool, ...]:
    """Returns which of ``names`` the user's ``wanted`` addresses: a whole name, a leading part of one, or None for all.

    Raises:
      ValueError: nothing is addressed; names what exists.
    """
    if wanted is None:
        return (True,) * len(names)
    chosen = tuple(name == wanted or name.startswith(wanted + ".") for name in names)
    if not any(chosen):
        known = ", ".join(repr(name) for name in names if name) or "none: it is a single array"
        raise ValueError(f"unknown {what} {wanted!r}; expected one of: {known}")
    return chosen


def describe(leaf: Any) -> str:
    """Returns dtype and shape the way error messages print them, e.g. ``float32[5, 3]``."""
    return f"{jnp.result_type(leaf).name}{list(jnp.shape(leaf))}"


def expected_of(cell: Cell, batch_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Returns params and state of a cell as shapes, without drawing anything; the same at every call."""
    return _expected(cell, batch_shape, jax.dtypes.canonicalize_dtype("float64"))


@functools.lru_cache(maxsize=256)
def _expected(cell: Cell, batch_shape: tuple[int, ...], widest: np.dtype) -> tuple[Any, Any]:
    """``widest`` is what float64 stands for, which a user may change between two calls."""
    params = jax.eval_shape(cell.init, jax.random.key(0))
    state = jax.eval_shape(lambda: cell.init_state(batch_shape))
    return params, state


def check_like(found: Any, expected: Any, *, what: str, hint: str = "", dtypes: bool = False) -> None:
    """Raises ValueError unless ``found`` has the structure and shapes (and dtypes) of ``expected``."""
    structure: Any = jax.tree.structure(found)
    expected_structure: Any = jax.tree.structure(expected)
    if structure != expected_structure:
        raise ValueError(f"{what} has the wrong structure: expected {expected_structure}, found {structure}{hint}")
    for name, x, y in zip(leaf_names(expected), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.shape(x) != jnp.shape(y) or (dtypes and jnp.result_type(x) != jnp.result_type(y)):
            dot = "." if name else ""
            raise ValueError(f"{what}{dot}{name}: expected {describe(y)}, found {describe(x)}{hint}")


def check_arrays(tree: Any, *, what: str) -> None:
    """Raises ValueError unless every leaf is an array, or the shape of one; names the first that is not."""
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if not hasattr(leaf, "dtype"):
            label = f"{what}{'.' if name else ''}{name}"
            raise ValueError(f"{label}: expected an array, found {type(leaf).__name__} {leaf!r}")


def check_inputs(cell: Cell, params: Params, state: State, xs: Any, *, one_sequence: bool) -> int:
    """Returns the number of steps T after checking shapes and dtypes; it works on tracers too.

    Args:
      cell: the cell.
      params: its parameters.
      state: the state before the first step.
      xs: inputs, leading axis T.
      one_sequence: refuse a batch (chains and spectra take one sequence).

    Raises:
      ValueError: names what was expected and what was found.
    """
    for part, tree in (("params", params), ("state", state), ("xs", xs)):
        check_arrays(tree, what=part)
    steps = {name: jnp.shape(leaf)[:1] for name, leaf in zip(leaf_names(xs), jax.tree.leaves(xs), strict=True)}
    lengths = set(steps.values())
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"xs must have one leading time axis T, found leading axes {sorted(steps.items())}")
    (num_steps,) = lengths.pop()
    if num_steps == 0:
        raise ValueError("xs has T = 0 time steps; expected at least 1")

    if cell.input_size is not None:
        shape = jnp.shape(xs)
        if len(shape) < 2 or shape[-1] != cell.input_size:
            raise ValueError(
                f"xs: expected shape (T, D={cell.input_size}) or (T, B, D={cell.input_size}) for cell "
                f"{cell.name!r}, found {shape}"
            )
        batch_shape = shape[1:-1]
        if one_sequence and batch_shape:
            raise ValueError(
                f"xs: expected one sequence of shape (T, D={cell.input_size}), found {shape}; "
                "use jax.vmap over the batch axis"
            )
        expected_params, expected_state = expected_of(cell, batch_shape)
        check_like(params, expected_params, what="params", hint=f" (cell {cell.name!r})")
        check_like(state, expected_state, what="state", hint=f" (cell {cell.name!r}, xs of shape {shape})")

    real_dtypes = {
        f"{part}{'.' if name else ''}{name}": jnp.finfo(leaf.dtype).dtype.name
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        else leaf.dtype.name
        for part, tree in (("params", params), ("state", state), ("xs", xs))
        for name, leaf in zip(leaf_names(tree), map(jnp.asarray, jax.tree.leaves(tree)), strict=True)
        if part != "xs" or cell.input_size is not None
    }
    if len(set(real_dtypes.values())) > 1 or not all(jnp.issubdtype(d, jnp.floating) for d in real_dtypes.values()):
        listed = ", ".join(f"{name} {dtype}" for name, dtype in real_dtypes.items())
        raise ValueError(f"expected one floating dtype for params, state and xs, found {listed}")

    first = jax.tree.map(lambda leaf: leaf[0], xs)
    check_like(
        jax.eval_shape(lambda p, s, x: cell.step(p, s, x)[0], params, state, first),
        state,
        what=f"the state that update of cell {cell.name!r} returns",
        dtypes=True,
    )
    return num_steps


def check_finite(params: Params, state: State, xs: Any) -> None:
    """Raises ValueError for NaN or inf in concrete arrays, with the first time step for ``xs``; tracers pass unseen."""
    for part, tree in (("params", params), ("state", state), ("xs", xs)):
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            if isinstance(leaf, jax.core.Tracer) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                continue
            # NumPy, because inside a user's jit even a constant goes through JAX as a tracer
            bad = ~np.isfinite(np.asarray(leaf))
            if not bad.any():
                continue
            label = f"{part}{'.' if name else ''}{name}"
            where = np.argwhere(bad)[0]
            if part == "xs":
                raise ValueError(
                    f"{label}: expected finite values, found {bad.sum()} NaN or inf, the first at time step {where[0]}"
                )
            raise ValueError(
                f"{label}: expected finite values, found {bad.sum()} NaN or inf, the first at index "
                f"{tuple(int(i) for i in where)}; it acts from time step 0"
            )
