"""Finding the pass, and the single rewrite, that makes a model fail a check; and what a pass would do, without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from optframe.errors import CheckFailed, InputError, OptframeError, describe
from optframe.gate.checks import Check
from optframe.gate.structure import require_wired, wiring_problem
from optframe.gate.workpiece import Ran, Workpiece
from optframe.graph import op_histogram
from optframe.passes import GraphPass, NearMiss
from optframe.pipeline import Pipeline
from optframe.types import OpSpec


@dataclass(frozen=True)
class BisectResult:
    """The first pass after which the check fails: its position in the pipeline, from 0, and its name.

    `rewrite` is the first of its rewrites after which the check fails, `number` its position among them, from 1; both
    are None where the pass does not ask before it rewrites, or fails the check even without its rewrites. `raised` is
    what the pass raised, empty where it raised nothing.
    """

    index: int
    pass_name: str
    rewrite: str | None = None
    number: int | None = None
    raised: str = ""

    def __str__(self) -> str:
        """Return the finding as one line."""
        what = f"raises {self.raised}" if self.raised else "makes the check fail"
        found = f"pass {self.index + 1}, '{self.pass_name}', {what}"
        if self.rewrite is None:
            return f"{found}, whichever of its rewrites it makes"
        return f"{found} with its rewrite {self.number}: {self.rewrite}"


@dataclass(frozen=True)
class Explanation:
    """What a pass would do to a model: its rewrites in order, and where it would nearly have done something.

    Nodes are counted as `graph.op_histogram` counts them; `op_changes` has op type -> change, zeros left out.
    """

    rewrites: tuple[str, ...]
    near_misses: tuple[NearMiss, ...]
    modified: bool
    nodes_before: int = 0
    nodes_after: int = 0
    op_changes: Mapping[str, int] = field(default_factory=dict)


def explain(model: ir.Model, step: GraphPass, ops: Mapping[str, OpSpec] | None = None) -> Explanation:
    """Return what `step` would do to `model`, which stays as it is.

    Raises:
        CheckFailed: the pass raised, or what it left is no graph.
        InputError: the model is invalid.
    """
    require_wired(model)
    kernels = [name for name, spec in (ops or {}).items() if spec.kernel is not None]
    workpiece, before = Workpiece(model.clone()), op_histogram(model, kernels)
    try:
        ran = workpiece.run(step, ops or {})
    except OptframeError:
        raise
    except Exception as error:  # a pass is foreign code
        raise CheckFailed(f"pass '{step.name}' raised {describe(error)}") from error
    problem = wiring_problem(workpiece.model)
    if problem:
        raise CheckFailed(f"pass '{step.name}' would break the model, and be rolled back: {problem}")
    after = workpiece.op_histogram(kernels)
    changes = {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}
    return Explanation(ran.allowed, ran.near_misses, ran.result.modified, before.total(), after.total(), changes)


def bisect(
    model: ir.Model, pipeline: Pipeline, check: Check, ops: Mapping[str, OpSpec] | None = None
) -> BisectResult | None:
    """Return the first pass of `pipeline`, and its first rewrite, after which `check` fails on `model`.

    A pass that raises fails too. None if nothing fails. Both searches halve what is left, so that `check` runs about
    log2(passes) + log2(rewrites) times; they take it that what fails goes on failing. `model` stays as it is.

    Raises:
        InputError: the check fails before any pass has run.
    """
    if not check(model.clone()):
        raise InputError("the check fails on the model as it is, before any pass; there is nothing to find")
    models = [model, *_after_each(model, pipeline.steps, ops or {})]
    if _is_good(models[-1], check):
        return None
    index = _first_failing(len(models) - 1, lambda count: _is_good(models[count], check)) - 1
    before, step = models[index], pipeline.steps[index]
    assert isinstance(before, ir.Model), "only the last of the models can be missing"
    rewrites, number = _first_rewrite(before, step, check, ops or {})
    after = models[index + 1]
    raised = after if isinstance(after, str) else ""
    return BisectResult(index, step.name, rewrites[number - 1] if number else None, number or None, raised)


def _is_good(model: ir.Model | str, check: Check) -> bool:
    return isinstance(model, ir.Model) and check(model.clone())


def _after_each(model: ir.Model, steps: Sequence[GraphPass], ops: Mapping[str, OpSpec]) -> Iterator[ir.Model | str]:
    """Yield the model after each of `steps`, up to one that raises, which gives what it raised."""
    workpiece = Workpiece(model.clone())
    for step in steps:
        ran = _attempt(workpiece, step, ops)
        if isinstance(ran, str):
            yield ran
            return
        yield workpiece.model.clone()


def _attempt(
    workpiece: Workpiece, step: GraphPass, ops: Mapping[str, OpSpec], allowance: int | None = None
) -> Ran | str:
    """Run `step`; return what it raised in words, if it is anything but an error for the user."""
    try:
        return workpiece.run(step, ops, allowance)
    except OptframeError:
        raise
    except Exception as error:  # a pass is foreign code, and that it raises is what we look for
        return describe(error)


def _first_rewrite(
    before: ir.Model, step: GraphPass, check: Check, ops: Mapping[str, OpSpec]
) -> tuple[Sequence[str], int]:
    """Return the rewrites that `step` asks for, and the first after which it fails, from 1; 0 if they don't matter."""
    asked: list[str] = []

    def good(count: int | None) -> bool:
        workpiece = Workpiece(before.clone())
        ran = _attempt(workpiece, step, ops, count)
        asked[len(asked) :] = ran.allowed[len(asked) :] if isinstance(ran, Ran) else ()
        return isinstance(ran, Ran) and check(workpiece.model)

    good(None)
    if not asked or not good(0):
        return asked, 0
    return asked, _first_failing(len(asked), good)


def _first_failing(count: int, good: Callable[[int], bool]) -> int:
    """Return the smallest n in 1..count for which `good` is false; it is true of 0 and false of `count`."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if good(middle):
            low = middle
        else:
            high = middle
    return high
