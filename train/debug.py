"""Where a NaN comes from: the step stops at the first one, and says which operation on which line made it.

`debug_nans(step)` is a step that runs the compiled one as it is and then looks at what came out. If the loss, the gradient, a new weight or
the optimizer's state is not finite, the same step is done once more from the same state, one operation after another, and every value is
looked at. `NonFinite` tells the first operation whose result was not finite although all it was given was, with its line, and the weights
and gradients concerned. Only what reaches the result counts: an infinity that a mask removes is none of our business.

JAX's own `jax_debug_nans` will not do here: with the layers as a scan it says nothing at all, with the loop it names the cast of a bad
weight and goes no further, and it stops at infinities that a mask is about to remove (jax 0.10 and 0.12).
"""

import linecache
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import beartype
import equinox
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
from jax.extend.core import Literal

import lm
from data.pipeline import Batch
from lm.base import leaves_by_path
from train.step import Metrics, Step, TrainState

GRADIENT = "gradient/"  # a value marked (`lm.base.mark`) so in a step is told of as the gradient of the path behind it
SHOWN = 8  # paths listed; the others are counted


class NonFinite(FloatingPointError):
    """A step gave NaN or infinity."""


def debug_nans(step: Step) -> Step:
    """The same step, which raises `NonFinite` instead of giving a state that is not finite, or skipping.

    `step` must leave its input alive (`make_step(..., donate=False)`), since it may have to be done again. Two states stand in memory,
    every step waits for the device, and the search, done once, takes seconds for a small model and minutes for a large one.
    """
    all_finite = jax.jit(_all_finite)

    def watched(state: TrainState, batch: Batch, learning_rate: float, average_rate: float = 0.0) -> tuple[TrainState, Metrics]:
        after, metrics = step(state, batch, learning_rate, average_rate)
        if bool(all_finite((metrics["loss"], metrics["grad_norm"], after.trainable, after.optimizer))):
            return after, metrics
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        said = [f"step {int(after.step)} is not finite: loss {loss}, gradient norm {norm}, learning rate {learning_rate:g}"]
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)):
            said.append("it cannot be searched, since the state it began with was donated: make the step with make_step(..., donate=False)")
        else:
            said += _explanation(step, state, batch, learning_rate, after)
        raise NonFinite("\n  ".join(said))

    return watched


def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def _explanation(step: Step, state: TrainState, batch: Batch, learning_rate: float, after: TrainState) -> list[str]:
    def outcome(state: TrainState, batch: Batch) -> Any:
        after, metrics = step(state, batch, learning_rate)
        return metrics["loss"], metrics["grad_norm"], after.trainable, after.optimizer

    search = Search()
    origin = search.of(outcome, state, batch)
    edge = "done again one operation after another it stays finite: the compiled program rounds otherwise, and something is near overflow"
    return [
        *_listed("weights not finite before it", leaves_by_path(state.trainable)),
        *_listed("optimizer state not finite before it", leaves_by_path(state.optimizer)),
        *_listed("gradients not finite", search.gradients),
        *_listed("weights not finite after it", leaves_by_path(after.trainable)),
        *([edge] if origin is None else origin.told()),
    ]


def _finite(value: Any) -> bool:
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return True
    xp, x = _near(value)
    return bool(xp.all(xp.isfinite(x)))


def _near(value: Any) -> tuple[Any, Any]:
    """What is small is looked at by numpy, which need not compile for each new shape."""
    small = value.size <= 2**16 and getattr(value, "is_fully_addressable", True)
    return (np, np.asarray(value)) if small else (jnp, value)


def _listed(title: str, leaves: dict[str, Any]) -> list[str]:
    paths = [path for path, leaf in leaves.items() if not _finite(leaf)]
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return [f"{title} ({len(paths)} of {len(leaves)}): {', '.join(paths[:SHOWN])}{more}"] if paths else []


# ------------------------------------------------------------------------------------------- one operation after another


@dataclass(frozen=True)
class Origin:
    """Where a value stopped being finite."""

    what: str  # "NaN" or "infinity"
    by: str  # the operation and its line, or the path of what was given so
    before: "Origin | None" = None  # why something it was given was not finite either

    def told(self) -> list[str]:
        said = self.before.told() if self.before is not None else []
        return [*said, f"{'then' if said else 'first'} {self.what}: {self.by}"]


class Known(NamedTuple):
    """A value and what is known of it."""

    value: Any
    origin: Origin | None = None  # why it is not finite; `None` where it is
    name: str = ""  # of a weight, as long as it is only cast, moved or cut


_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
_SAME = {"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "name", "copy"}  # still that weight
_MOVES = {*_SAME, "stack", "unstack", "concatenate", "gather", "dynamic_slice", "dynamic_update_slice", "pad", "rev", "select_n", "split"}
_GIVEN = "given so, in "


@dataclass
class Search:
    """Runs a function as its jaxpr says, one operation after another, and knows of each value whether it is finite."""

    gradients: dict[str, Any] = field(default_factory=dict)  # path → value, of those marked

    def of(self, function: Callable[..., Any], *arguments: Any) -> Origin | None:
        """Why the results of `function(*arguments)` are not finite: that of the first leaf that is not. `None` if all are."""
        closed = jax.make_jaxpr(function)(*arguments)
        given = []
        for path, leaf in leaves_by_path(arguments).items():
            number, _, inside = path.partition("/")
            value, name = jnp.asarray(leaf), inside.removeprefix("trainable/") or f"argument {number}"
            given.append(Known(value, None if _finite(value) else Origin(_kind(value), _GIVEN + name), name))
        results = self._run(closed, given, "")
        return next((result.origin for result in results if result.origin is not None), None)

    def _run(self, closed: Any, inputs: Sequence[Known], call: str) -> list[Known]:
        """The results of a jaxpr. `call`: the line that called it, to be named where its own would be JAX's."""
        jaxpr = getattr(closed, "jaxpr", closed)
        known = dict(zip(jaxpr.constvars, map(Known, getattr(closed, "consts", ())), strict=True))
        known |= dict(zip(jaxpr.invars, inputs, strict=True))
        last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, Literal)}
        kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)}

        def read(var: Any) -> Known:
            return Known(jnp.asarray(var.val, getattr(var.aval, "dtype", None))) if isinstance(var, Literal) else known[var]

        for i, eqn in enumerate(jaxpr.eqns):
            # JAX traces its own functions once and keeps that, with the lines of the first caller.
            line = call if call and _is_jax(jaxpr.debug_info.func_filename or "") else _line(eqn)
            known |= zip(eqn.outvars, self._apply(eqn, [read(var) for var in eqn.invars], line), strict=True)
            for var in {var for var in (*eqn.invars, *eqn.outvars) if not isinstance(var, Literal)} - kept:
                if last_use.get(var, i) == i:
                    known.pop(var, None)  # its memory
        return [read(var) for var in jaxpr.outvars]

    def _apply(self, eqn: Any, operands: list[Known], line: str) -> list[Known]:
        """The results of one operation; those that hold others are taken apart."""
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS:
            return self._run(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], operands, line)
        if name == "cond":
            return self._run(params["branches"][int(operands[0].value)], operands[1:], line)
        if name == "while":
            return self._while(params, operands, line)
        if name == "scan" and params["length"] > 0:
            return self._scan(eqn, operands, line)
        with eqn.ctx.manager:
            results = eqn.primitive.bind(*(operand.value for operand in operands), **eqn.primitive.get_bind_params(params))
        results = results if eqn.primitive.multiple_results else [results]
        if name == "name" and params["name"].startswith(GRADIENT):
            self.gradients[params["name"].removeprefix(GRADIENT)] = results[0]
        return [_judged(eqn, value, operands, line) for value in results]

    def _while(self, params: dict[str, Any], operands: list[Known], line: str) -> list[Known]:
        n, m = params["cond_nconsts"], params["body_nconsts"]
        condition, body, carry = operands[:n], operands[n : n + m], operands[n + m :]
        while bool(self._run(params["cond_jaxpr"], [*condition, *carry], line)[0].value):
            carry = self._run(params["body_jaxpr"], [*body, *carry], line)
        return carry

    def _scan(self, eqn: Any, operands: list[Known], line: str) -> list[Known]:
        body, length, reverse = eqn.params["jaxpr"], eqn.params["length"], eqn.params["reverse"]
        inner = getattr(body, "jaxpr", body)
        # Constants and carry have inside the axes they have outside, rows one less. (How jax counts them has changed from 0.10 to 0.12.)
        m = sum(var.aval.ndim == within.aval.ndim for var, within in zip(eqn.outvars, inner.outvars, strict=True))
        n = sum(var.aval.ndim == within.aval.ndim for var, within in zip(eqn.invars, inner.invars, strict=True)) - m
        constants, carry, rows = operands[:n], operands[n : n + m], operands[n + m :]
        outputs: dict[int, list[Known]] = {}
        for i in range(length)[::-1] if reverse else range(length):
            given = [*constants, *carry, *(_part(row, i) for row in rows)]
            results = [_in_round(each, i, length, given) for each in self._run(body, given, line)]
            carry, outputs[i] = results[:m], results[m:]
        stacked = zip(*(outputs[i] for i in range(length)), strict=True)
        return carry + [Known(jnp.stack([each.value for each in every]), _first_origin(every)) for every in stacked]


def _judged(eqn: Any, value: Any, operands: Sequence[Known], line: str) -> Known:
    """A result of an operation, and why it is not finite if it is not."""
    name = operands[0].name if eqn.primitive.name in _SAME else ""
    if _finite(value):
        return Known(value, None, name)
    kind = _kind(value)
    cause = _first_origin([each for each in operands if each.origin is not None and each.origin.what == "NaN"]) or _first_origin(operands)
    if cause is not None and (eqn.primitive.name in _MOVES or (cause.what == kind and not cause.by.startswith(_GIVEN))):
        return Known(value, cause, name)
    backward = ", in the backward pass" if "transpose(" in str(eqn.source_info.name_stack) else ""
    by = f"{eqn.primitive.name} of {', '.join(map(_told, operands))}\n    at {line}{backward}"
    return Known(value, Origin(kind, by, cause), name)


def _first_origin(every: Sequence[Known]) -> Origin | None:
    return next((each.origin for each in every if each.origin is not None), None)


def _kind(value: Any) -> str:
    xp, x = _near(value)
    return "NaN" if bool(xp.any(xp.isnan(x))) else "infinity"


def _told(operand: Known) -> str:
    """Its name if it has one, its shape, and how large it is."""
    value = operand.value
    said = " ".join(word for word in (operand.name, f"{value.dtype}{list(value.shape)}") if word)
    if not jnp.issubdtype(value.dtype, jnp.inexact) or value.size == 0:
        return said
    xp, x = _near(value)
    bad = int(xp.sum(~xp.isfinite(x)))
    return f"{said} ({bad:,} of {x.size:,} not finite)" if bad else f"{said} (up to ±{float(xp.max(xp.abs(x))):.3g})"


def _part(row: Known, i: int) -> Known:
    """What round i of a scan gets."""
    value = row.value[i]
    return Known(value, None if row.origin is None or _finite(value) else row.origin, row.name and f"{row.name}[{i}]")


def _in_round(result: Known, i: int, length: int, given: Sequence[Known]) -> Known:
    """An origin that arose in this round tells the round too."""
    if result.origin is None or any(result.origin is each.origin for each in given):
        return result
    return result._replace(origin=replace(result.origin, by=f"{result.origin.by}, in round {i} (of 0 to {length - 1}) of a scan"))


# ------------------------------------------------------------------------------------------- lines

_ROOT = Path(lm.__file__).parent.parent
_JAX, *_OTHERS = (str(Path(module.__file__ or "").parent) for module in (jax, jaxtyping, equinox, optax, beartype))
_STANDARD = sysconfig.get_path("stdlib")


def _is_jax(file: str) -> bool:
    return file.startswith(_JAX)


def _line(eqn: Any) -> str:
    """The innermost line that is not a library's, with its text."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        file = frame.file_name
        standard = file.startswith(_STANDARD) and "site-packages" not in file
        if _is_jax(file) or file.startswith(("<", *_OTHERS)) or standard or file == __file__:
            continue
        path = Path(file)
        shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path
        return f"{shown}:{frame.line_num}: {linecache.getline(file, frame.line_num).strip()}"
    return "a line that is not known"
