"""A step function of the user's as a cell; with the function that computes its gates, as one with the split J = D + G.

::

    without gates     preactivate = x                      update = the whole step           D = J, G = 0
    with gates        preactivate = gates(params, s, x)    update = the step, with those values taken from z

The second is found by comparing programs.  ``step`` and ``gates`` are traced on the same arguments, calls inside them
(jit, checkpoint) are opened, and every value gets a number: the same operation with the same settings on the same
operands is the same value.  Where a gate's number occurs in the step's program, the program is cut, and ``update`` runs
what hangs below.  Functions with a derivative rule of their own (``jax.custom_jvp``, ``jax.custom_vjp``) stay whole,
since opening them would lose the rule: a gate has to be computed outside of one, or by it.  Two calls of one on the
same operands are two values, for their derivatives may differ; which of them is the gates' cannot be told, so that a
step has to make such a call once.

If the input still reaches the state beside the gates, ``x`` becomes one more field of z; it carries no gradient through
time.  The activations of such a cell are its pre-activations, for what a gate makes of its value is not known.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jaxtyping import Array

from rnngrad.interop.adapted import Adapted, Pass, join
from rnngrad.types import (
    Cell,
    Params,
    PreactivateFn,
    ReadFn,
    State,
    UpdateFn,
    check_arrays,
    check_like,
    describe,
    leaf_names,
)

StepFn = Callable[[Params, State, Any], Any]
"""``(params, state, x) -> state``, or a pair of the state and an output in either order."""
GatesFn = Callable[[Params, State, Any], Any]
"""``(params, state, x) -> z``, any pytree of arrays."""


def from_step(step: StepFn, params: Params, state: State, example: Any, *, gates: GatesFn | None = None) -> Adapted:
    """Returns a model of one pass from a step function.

    What the cell reads out is the output of a step that returns one, if it can be computed from the new state and the
    parameters alone.  Otherwise it is the state's leaf named ``h``, or all its leaves joined into one vector.

    Args:
      step: ``(params, state, x) -> state``, ``(state, y)`` or ``(y, state)``; pure, for one sequence.
      params: its parameters, any pytree of arrays.
      state: the state before the first step, without a batch axis: any pytree of floating or complex arrays.
      example: the input of one step (an array, a pytree of them, or their ``jax.ShapeDtypeStruct``).
      gates: ``(params, state, x) -> z``, the function by which ``step`` computes its pre-activations; a NamedTuple or
        dict names them.  A value equal to a gate, i.e. the same operation on the same operands, is that gate wherever
        it stands in ``step``, so that all uses of it count as gated.  None leaves the cell without the split.

    Raises:
      ValueError: a state that changes its structure, shapes or dtypes; a pair of which both could be the state; a gate
        that does not occur in the program of ``step``, or of which it is not known where it does.

    >>> import jax, jax.numpy as jnp
    >>> import rnngrad as rg
    >>> from rnngrad.interop import from_step
    >>> gates = lambda w, h, x: {"leak": w @ h + x}
    >>> step = lambda w, h, x: 0.9 * h + 0.1 * jnp.tanh(gates(w, h, x)["leak"])
    >>> adapted = from_step(step, jnp.eye(3), jnp.zeros(3), jnp.ones(3), gates=gates)
    >>> curve = rg.retention(adapted.cell, adapted.cell_params, jnp.zeros(3), jnp.ones((10, 3)), path="direct")
    >>> round(float(curve.log_norm[-1]) / 10, 4)  # log 0.9
    -0.1054
    """
    name = getattr(step, "__name__", type(step).__name__)
    cell = cell_of_step(name, step, params, state, example, gates=gates)
    only = Pass("", cell, reverse=False, has_split=gates is not None)

    def convert(weights):
        check_weights(weights, params, source=name)
        return ((weights,),)

    return join(name, [(only,)], convert, params)


def cell_of_step(
    name: str,
    step: StepFn,
    params: Params,
    state: State,
    example: Any,
    *,
    gates: GatesFn | None = None,
    returns: str = "unknown",
) -> Cell:
    """Returns the cell of a step function.

    Args:
      name: of the cell.
      step: as in :func:`from_step`, and so are the others; it raises the same errors.
      params: its parameters.
      state: the state of one sequence before the first step.
      example: the input of one step.
      gates: computes the pre-activations.
      returns: ``"(state, y)"`` or ``"(y, state)"`` where a library fixes it, ``"unknown"`` to find out.
    """
    check_arrays(params, what="params")
    check_arrays(state, what="state")
    check_arrays(example, what="example")
    for leaf_name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"state.{leaf_name}: expected a floating or complex dtype, found {describe(leaf)}; what is counted or "
                "drawn at each step belongs into the inputs"
            )
    program = _Values()
    arguments = _Arguments(program, params, state, example)
    found = arguments.trace(step)
    state_at, y_at = _find_state(found, state, returns=returns, name=name)
    read = None if y_at is None else _output_reader(arguments, state_at, y_at.of(found.shapes), y_at.numbers)
    if read is None and returns == "(state, y)":
        raise ValueError(
            f"{name}: its output cannot be computed from its new state and parameters alone, so that no layer above "
            "could hear it; keep it in the carry, or adapt a function step(params, state, x) that returns the carry"
        )
    if read is None:
        read = _state_reader(state)
    input_size = _input_size(params, state, example)
    init_state = functools.partial(_broadcast, state)
    if gates is None:
        preactivate, update = _whole(step, state_at)
    else:
        preactivate, update = _cut(arguments, state_at, state, gates, name=name)
    return Cell(name, input_size, lambda key: params, init_state, preactivate, update, read)


def starting_at(cell: Cell, state: State) -> Cell:
    """Returns the cell with another state of one sequence before the first step."""
    if cell.input_size is not None:  # a map has no state of its own to compare with
        check_like(state, jax.eval_shape(cell.init_state), what="state", hint=f" (cell {cell.name!r})", dtypes=True)
    return cell._replace(init_state=functools.partial(_broadcast, state))


def check_weights(found: Any, expected: Any, *, source: str) -> None:
    """Raises ValueError unless ``found`` has the leaves, shapes and dtypes of the model's own weights."""
    there, wanted = leaf_names(found), leaf_names(expected)
    missing, unknown = [n for n in wanted if n not in there], [n for n in there if n not in wanted]
    if missing or unknown:
        listed = lambda names: ", ".join(map(repr, names[:6])) + (", …" if len(names) > 6 else "") or "none"
        raise ValueError(
            f"params are those of another model: {source} expects {len(wanted)} arrays; missing: {listed(missing)}; "
            f"not expected: {listed(unknown)}"
        )
    check_arrays(found, what="params")
    # leaf by leaf before the structure: that of an Equinox module holds its sizes, too, and says so less plainly
    leaves = dict(zip(there, jax.tree.leaves(found), strict=True))
    for name, leaf in zip(wanted, jax.tree.leaves(expected), strict=True):
        check_like(leaves[name], leaf, what=f"params{'.' if name else ''}{name}", hint=f" ({source})", dtypes=True)
    check_like(found, expected, what="params", hint=f" ({source})")


# --- the two halves of a step ----------------------------------------------------------------------------------------


def _whole(step: StepFn, state_at: _Part) -> tuple[PreactivateFn, UpdateFn]:
    """Returns the halves of a step whose gates are not known."""

    def update(params, z, state):
        return state_at.of(step(params, state, z)), z

    return lambda params, state, x: x, update


def _cut(
    arguments: _Arguments, state_at: _Part, state: State, gates: GatesFn, *, name: str
) -> tuple[PreactivateFn, UpdateFn]:
    """Returns the halves of a step above and below its gates."""
    program, structure = arguments.program, jax.tree.structure(state)
    known, calls = len(program.definitions), program.calls()
    heard = arguments.trace(gates)
    for call, times in program.calls().items():
        if calls[call] > times:
            raise ValueError(
                f"gates: {name!r} calls {program.function(call)} {calls[call]} times on the same values, its gates "
                f"{times}, so that which of these calls is the gates' is not known; compute it once"
            )
    cut: dict[int, str] = {}
    for gate, number, leaf in zip(leaf_names(heard.shapes), heard.numbers, jax.tree.leaves(heard.shapes), strict=True):
        if number >= known:
            raise ValueError(
                f"gates: the value {gate!r} ({describe(leaf)}) does not occur in the program of {name!r}; expected "
                "`step` to compute its pre-activations by calling the same function on the same arguments, outside of "
                "any function with a custom derivative"
            )
        if number in cut:
            raise ValueError(f"gates: {cut[number]!r} and {gate!r} are the same value; name it once")
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(f"gates: expected floating or complex values, found {gate!r} of {describe(leaf)}")
        cut[number] = gate
    below = program.needed(state_at.numbers, stop=set(cut))
    beside = _InputBeside(heard.shapes) if not below.isdisjoint(arguments.x) else None

    def preactivate(params, state, x):
        z = gates(params, state, x)
        return z if beside is None else beside.join(z, x)

    def update(params, z, state):
        own, x = (z, ()) if beside is None else beside.part(z)
        values = arguments.values(params, state, x) | dict(zip(cut, jax.tree.leaves(own), strict=True))
        return jax.tree.unflatten(structure, program.evaluate(state_at.numbers, values)), z

    return preactivate, update


class _InputBeside:
    """How to put x beside the gates z as a field of its own, and how to take both apart."""

    def __init__(self, z: Any) -> None:
        names = tuple(z) if isinstance(z, Mapping) else getattr(z, "_fields", None)
        self._is_mapping = isinstance(z, Mapping)
        self._names = ("gates",) if names is None else names
        self._is_whole = names is None
        self._field = "input" if "x" in self._names else "x"

    def join(self, z: Any, x: Any) -> Any:
        """Returns the gates with x beside them."""
        if self._is_mapping:
            return {**z, self._field: x}
        return _fields_type((*self._names, self._field))(*([z] if self._is_whole else z), x)

    def part(self, joined: Any) -> tuple[Any, Any]:
        """Returns the gates and x."""
        if self._is_mapping:
            return {name: joined[name] for name in self._names}, joined[self._field]
        return joined[:-1], joined[-1]


@functools.cache
def _fields_type(names: tuple[str, ...]) -> type:
    """One NamedTuple type per set of names, so that two cells have gates of the same structure."""
    return collections.namedtuple("Gates", names)


# --- which part of the result is the state ---------------------------------------------------------------------------


class _Part(NamedTuple):
    """A part of what a step returns."""

    of: Callable[[Any], Any]
    """takes it out of the whole"""
    numbers: tuple[int, ...]
    """of its leaves' values"""


class _Traced(NamedTuple):
    shapes: Any
    """what the function returns, as shapes"""
    numbers: tuple[int, ...]
    """the value of every leaf"""


def _find_state(found: _Traced, state: State, *, returns: str, name: str) -> tuple[_Part, _Part | None]:
    """Returns where in a step's result the new state stands, and where the output."""
    shapes = found.shapes
    numbers = jax.tree.unflatten(_structure(shapes), found.numbers)
    part = lambda of: _Part(of, tuple(jax.tree.leaves(of(numbers))))
    whole, first, second = (lambda out: out), (lambda out: out[0]), (lambda out: out[1])
    is_pair = isinstance(shapes, tuple | list) and len(shapes) == 2
    if not _misfit(shapes, state):
        return part(whole), None
    if is_pair and returns != "unknown":
        state_part, y_part = (first, second) if returns == "(state, y)" else (second, first)
        if misfit := _misfit(state_part(shapes), state):
            raise ValueError(f"{name}: {misfit}")
        return part(state_part), part(y_part)
    if is_pair:
        misfits = [_misfit(one, state) for one in shapes]
        if not any(misfits) and part(first).numbers != part(second).numbers:
            raise ValueError(
                f"{name} returns a pair of which both could be the state ({_outline(state)}); pass a function that "
                "returns the state alone, e.g. `lambda params, state, x: step(params, state, x)[0]`"
            )
        if not all(misfits):
            return (part(second), part(first)) if misfits[0] else (part(first), part(second))
        same = [_structure(one) == _structure(state) for one in shapes]
        if any(same) and _structure(shapes) != _structure(state):
            raise ValueError(f"{name}: {misfits[same.index(True)]}")
    raise ValueError(f"{name}: {_misfit(shapes, state)}")


def _misfit(found: Any, state: State) -> str:
    """Returns how ``found`` differs from the state it should be; empty if it does not."""
    if _structure(found) != _structure(state):
        return f"the state changes its structure in a step: expected {_outline(state)}, found {_outline(found)}"
    for leaf_name, new, old in zip(leaf_names(state), jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        if (jnp.shape(new), new.dtype) != (jnp.shape(old), old.dtype):
            dot = "." if leaf_name else ""
            return f"state{dot}{leaf_name} changes in a step: expected {describe(old)}, found {describe(new)}"
    return ""


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _outline(tree: Any) -> str:
    return str(jax.tree.map(describe, tree)).replace("'", "")


def _output_reader(arguments: _Arguments, state_at: _Part, y: Any, y_numbers: tuple[int, ...]) -> ReadFn | None:
    """Returns how the output follows from the new state and the parameters; None if it needs more, or is no number."""
    program, after = arguments.program, set(state_at.numbers)
    reached = program.needed(y_numbers, stop=after) - after
    needs_more = not reached.isdisjoint((*arguments.state, *arguments.x))
    is_real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(y)]
    if needs_more or not is_real or not all(is_real):
        return None

    def read(params, state):
        new = dict(zip(state_at.numbers, jax.tree.leaves(state), strict=True))
        return _vector(program.evaluate(y_numbers, arguments.values(params, (), ()) | new))

    return read


def _state_reader(state: State) -> ReadFn:
    named = [index for index, name in enumerate(leaf_names(state)) if name.rpartition(".")[2] == "h"][:1]

    def read(params, state):
        leaves = jax.tree.leaves(state)
        return _vector([leaves[index] for index in named] or leaves)

    return read


def _vector(leaves: Sequence[Array]) -> Array:
    """Returns real numbers in one vector; of a complex leaf all Re, then all Im."""
    parts = [
        part.ravel()
        for leaf in leaves
        for part in ([leaf.real, leaf.imag] if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else [leaf])
    ]
    dtype = functools.reduce(np.promote_types, (part.dtype for part in parts))
    return parts[0] if len(parts) == 1 else jnp.concatenate([part.astype(dtype) for part in parts])


def _input_size(params: Params, state: State, example: Any) -> int | None:
    """Returns D if x is one vector of the dtype of parameters and state, which is what a declared size means."""
    x = jax.tree.leaves(example)
    if _structure(example) != _structure(0) or jnp.ndim(x[0]) != 1:
        return None
    real = lambda leaf: jnp.finfo(leaf.dtype).dtype if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf.dtype
    is_one_dtype = len({real(leaf) for leaf in (*x, *jax.tree.leaves((params, state)))}) == 1
    return x[0].shape[0] if is_one_dtype else None


def _broadcast(state: State, batch_shape: tuple[int, ...] = ()) -> State:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*batch_shape, *jnp.shape(leaf))), state)


# --- values of a program, numbered -----------------------------------------------------------------------------------

_CALLS = frozenset("jit pjit closed_call core_call remat remat2 checkpoint".split())
"""Primitives that run a program and leave its meaning as it is."""
_OWN_DERIVATIVE = frozenset("custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr".split())


class _Output(NamedTuple):
    """One output of an operation."""

    equation: JaxprEqn
    debug_info: Any
    operands: tuple[int, ...]
    first: int
    """the number of the operation's first output; the others follow"""


class _Constant(NamedTuple):
    value: Any


class _Values:
    """Values of traced programs, each with a number that is larger than those of its operands."""

    def __init__(self) -> None:
        self.definitions: list[_Output | _Constant | None] = []
        """by number; None for an argument"""
        self._numbers: dict[Any, int] = {}
        self._times: collections.Counter[Any] = collections.Counter()

    def _number(self, key: Any, definition: _Output | _Constant | None) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.definitions)
            self.definitions.append(definition)
        return self._numbers[key]

    def argument(self) -> int:
        """Returns the number of a new argument."""
        return self._number(("argument", len(self.definitions)), None)

    def run(self, program: Jaxpr, constants: Sequence[Any], arguments: Sequence[int]) -> tuple[int, ...]:
        """Returns the numbers of a program's results on the values that ``arguments`` number."""
        self._times.clear()
        return self._inside(program, constants, arguments)

    def _inside(self, program: Jaxpr, constants: Sequence[Any], arguments: Sequence[int]) -> tuple[int, ...]:
        at: dict[Any, int] = dict(zip(program.invars, arguments, strict=True))
        at |= {
            var: self._number(_key(value), _Constant(value))
            for var, value in zip(program.constvars, constants, strict=True)
        }

        def number(atom: Any) -> int:
            if isinstance(atom, Literal):
                return self._number(_key(atom), _Constant(_literal(atom)))
            return at[atom]

        for equation in program.eqns:
            operands = tuple(map(number, equation.invars))
            if equation.primitive.name in _CALLS:
                called: Any = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
                inner, inside = (called.jaxpr, called.consts) if isinstance(called, ClosedJaxpr) else (called, ())
                results = self._inside(inner, inside, operands)
            else:
                key: Any = (_key(equation), operands)
                if equation.primitive.name in _OWN_DERIVATIVE:
                    # equal values may have different derivatives: one program never shares them, two do in their order
                    self._times[key] += 1
                    key = (*key, self._times[key])
                first = self._numbers.get((key, 0), len(self.definitions))
                results = tuple(
                    self._number((key, position), _Output(equation, program.debug_info, operands, first))
                    for position in range(len(equation.outvars))
                )
            at.update(zip(equation.outvars, results, strict=True))
        return tuple(map(number, program.outvars))

    def calls(self) -> collections.Counter[Any]:
        """Returns how often the last program ran each function with a derivative of its own on the same operands."""
        return self._times.copy()

    def function(self, call: Any) -> str:
        """Returns the name of the function that one of :meth:`calls` ran."""
        definition = self.definitions[self._numbers[(*call, 1), 0]]
        assert isinstance(definition, _Output)
        return definition.equation.params["call_jaxpr"].jaxpr.debug_info.func_name

    def needed(self, results: Sequence[int], *, stop: set[int]) -> set[int]:
        """Returns the numbers of all values that the results are computed from, down to those in ``stop``."""
        reached: set[int] = set()
        ahead = list(results)
        while ahead:
            number = ahead.pop()
            if number in reached:
                continue
            reached.add(number)
            definition = self.definitions[number]
            if number not in stop and isinstance(definition, _Output):
                ahead.extend(definition.operands)
        return reached

    def evaluate(self, results: Sequence[int], values: Mapping[int, Any]) -> list[Array]:
        """Returns the results, computed from the values given."""
        at = dict(values)
        for number in sorted(self.needed(results, stop=set(values))):
            definition = self.definitions[number]
            if number in at:
                continue
            if isinstance(definition, _Constant):
                at[number] = jnp.asarray(definition.value)
            elif isinstance(definition, _Output):
                for position, value in enumerate(
                    _run_one(definition, [at[operand] for operand in definition.operands])
                ):
                    at.setdefault(definition.first + position, value)
        return [at[number] for number in results]


def _run_one(output: _Output, values: Sequence[Array]) -> list[Array]:
    """Returns all outputs of one operation."""
    equation = output.equation
    at = {atom: value for atom, value in zip(equation.invars, values, strict=True) if not isinstance(atom, Literal)}
    # as a program of one line, since how an operation is called by itself changes from version to version
    program = Jaxpr((), list(at), equation.outvars, [equation], equation.effects, output.debug_info)
    return jaxpr_as_fun(ClosedJaxpr(program, ()))(*at.values())


class _Arguments:
    """The arguments (params, state, x) of functions traced side by side."""

    def __init__(self, program: _Values, params: Params, state: State, x: Any) -> None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), (params, state, x))
        self.program, self._shapes = program, shapes
        self.params, self.state, self.x = (
            tuple(program.argument() for _ in jax.tree.leaves(tree)) for tree in (params, state, x)
        )

    def trace(self, function: Callable[[Params, State, Any], Any]) -> _Traced:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*self._shapes)
        arguments = (*self.params, *self.state, *self.x)
        return _Traced(shapes, self.program.run(program.jaxpr, program.consts, arguments))

    def values(self, params: Params, state: State, x: Any) -> dict[int, Any]:
        """Returns the values of the arguments by number; one left out is ``()``."""
        leaves = map(jax.tree.leaves, (params, state, x))
        numbered = zip((self.params, self.state, self.x), leaves, strict=True)
        return dict(itertools.chain.from_iterable(zip(numbers, tree, strict=bool(tree)) for numbers, tree in numbered))


def _literal(atom: Any) -> np.ndarray:
    return np.asarray(atom.val, atom.aval.dtype)


def _key(part: Any) -> Any:
    """Returns something hashable that two parts of programs share if they compute the same."""
    if isinstance(part, ClosedJaxpr):
        return ("program", _key(part.jaxpr), tuple(map(_key, part.consts)))
    if isinstance(part, Jaxpr):
        at: dict[Any, Any] = {var: index for index, var in enumerate((*part.constvars, *part.invars))}
        number = lambda atom: _key(atom) if isinstance(atom, Literal) else at[atom]
        steps = []
        for equation in part.eqns:
            steps.append((_key(equation), tuple(map(number, equation.invars))))
            at.update({var: (len(steps), index) for index, var in enumerate(equation.outvars)})
        return (len(part.constvars), len(part.invars), tuple(steps), tuple(map(number, part.outvars)))
    if isinstance(part, JaxprEqn):
        if part.effects:
            return ("once", id(part))
        own = part.primitive.name in _OWN_DERIVATIVE
        settings = (
            (name, _key(value)) for name, value in part.params.items() if not own or isinstance(value, ClosedJaxpr)
        )
        return (part.primitive.name, tuple(sorted(settings, key=lambda setting: setting[0])))
    if isinstance(part, Literal):
        return _key(_literal(part))
    if isinstance(part, jax.core.Tracer) or jnp.issubdtype(getattr(part, "dtype", np.float32), jax.dtypes.prng_key):
        return ("object", id(part))
    if isinstance(part, np.ndarray | np.generic | jax.Array):
        array = np.asarray(part)
        return ("array", array.dtype.name, array.shape, array.tobytes())
    if isinstance(part, list | tuple):
        return (type(part).__name__, tuple(map(_key, part)))
    if isinstance(part, Mapping):
        return tuple(sorted((str(name), _key(value)) for name, value in part.items()))
    try:
        hash(part)
    except TypeError:
        return ("object", id(part))
    return part
