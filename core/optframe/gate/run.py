"""Optimising a model: a pipeline is run, and what it does is verified as the caller asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import onnx_ir as ir

from optframe import graph
from optframe.errors import CheckFailed, OptframeError, describe, unknown_name
from optframe.gate.checks import open_verifier
from optframe.gate.execution import Ledger, Plan, execute
from optframe.gate.records import OptimizeResult, PassRecord
from optframe.gate.stepwise import Gate
from optframe.gate.structure import require_wired
from optframe.gate.verify import Verifier
from optframe.gate.workpiece import Workpiece
from optframe.numerics import EQUAL, Verdict
from optframe.passes import GraphPass
from optframe.pipeline import Pipeline
from optframe.snapshot import Snapshot
from optframe.types import Feeds, OpSpec

Verify: TypeAlias = Literal["each", "end", "off"]


def optimize(
    model: ir.Model,
    pipeline: Pipeline,
    *,
    ops: Mapping[str, OpSpec] | None = None,
    verify: Verify = "each",
    inputs: Sequence[Feeds] = (),
    random_inputs: Callable[[int], Feeds] | None = None,
    dump: Path | None = None,
    stop_after: str | None = None,
    reproducer_folder: Path | None = None,
    limit: int | None = None,
    on_pass: Callable[[PassRecord], None] | None = None,
    on_start: Callable[[str], None] | None = None,
    worker_command: Sequence[str] | None = None,
) -> OptimizeResult:
    """Run `pipeline` on `model`, which it may change, and return the result.

    `verify`: "each" compares after each pass and rolls back what broke the model; "end" compares the whole model once
    at the end, and where it differs starts over with "each", to go without the pass that did it; "off" compares
    nothing. Comparisons use `inputs` and random ones, which `random_inputs` draws from a seed (by default from the
    types that the model declares). `dump` takes the model after each pass that changed it, as `NN-pass.onnx`;
    `reproducer_folder` takes a folder for each pass that was rolled back. The pipeline ends after the first pass called
    `stop_after`, and passes make at most `limit` rewrites in all. `on_pass` is called with each record once it is
    final, `on_start` with the name of each that begins. `worker_command` replaces the worker process, for tests.

    Raises:
        InputError: the model is wired wrongly, a pass cannot be used on it, or no pass is called `stop_after`.
        CheckFailed: a pass raised while nothing was verified, or the result differs although no pass alone did.
    """
    require_wired(model)
    plan = Plan(
        steps=until(pipeline.steps, stop_after),
        ops=ops or {},
        inputs=inputs,
        random_inputs=random_inputs,
        dump=dump,
        reproducer_folder=reproducer_folder,
        limit=limit,
        on_pass=on_pass,
        on_start=on_start,
        worker_command=worker_command,
    )
    if verify == "off":
        ledger = Ledger(plan)
        return ledger.result(_run_all(plan, model, ledger), None)
    original = Snapshot.take(model)
    with open_verifier(original, inputs=inputs, random_inputs=random_inputs, worker_command=worker_command) as verifier:
        if verify == "each":
            return _verify_each(plan, original, verifier)
        return _verify_end(plan, model, original, verifier)


def until(steps: Sequence[GraphPass], stop_after: str | None) -> Sequence[GraphPass]:
    """Return `steps` up to the first pass called `stop_after`, all of them where that is None.

    Raises:
        InputError: no pass is called so.
    """
    names = [step.name for step in steps]
    if stop_after is None:
        return steps
    if stop_after not in names:
        raise unknown_name("pass of this pipeline", stop_after, names)
    return steps[: names.index(stop_after) + 1]


def _run_all(plan: Plan, model: ir.Model, ledger: Ledger) -> ir.Model:
    """Run all steps on `model` without looking at what they leave; return the result."""
    workpiece, counts, made = Workpiece(model), graph.op_histogram(model, plan.kernel_ops), 0
    for index, step in enumerate(plan.steps):
        try:
            execution = execute(plan, workpiece, index, counts, made)
        except OptframeError:
            raise
        except Exception as error:  # a pass is foreign code
            raise CheckFailed(
                f"pass '{step.name}' raised {describe(error)}; --verify each goes on without it"
            ) from error
        counts, made = execution.after, made + len(execution.ran.allowed)
        ledger.enter(execution.record("skipped"), lambda: workpiece.model.clone())
        ledger.publish()
    return workpiece.model


def _verify_each(plan: Plan, original: Snapshot, verifier: Verifier) -> OptimizeResult:
    """Verify each pass, and the whole at the end; where only the latter differs, each pass again, on that input too."""
    while True:
        ledger = Ledger(plan)
        model, final = Gate(plan, original, verifier, ledger).run()
        verdict = EQUAL if final is original else verifier.verify_whole(final)
        if verdict.status != "different":
            ledger.publish()
            return ledger.result(model, verdict, verifier.remarks)
        if not verifier.add_step_sample(verdict.sample):
            raise CheckFailed(_unexplained(ledger, verdict))


def _unexplained(ledger: Ledger, verdict: Verdict) -> str:
    unsure = [record.name for record in ledger.records if record.verified == "unverified"]
    which = f"what could be verified of each pass is equal (not verified: {', '.join(unsure)})"
    return (
        f"the result differs from the model, although {which if unsure else 'after each pass alone it is equal'}: "
        f"{verdict.reason} (on {verdict.sample}); --verify off gives the result as it is"
    )


def _verify_end(plan: Plan, model: ir.Model, original: Snapshot, verifier: Verifier) -> OptimizeResult:
    ledger = Ledger(replace(plan, on_pass=None))
    try:
        result = _run_all(plan, model, ledger)
        verdict = verifier.verify_whole(Snapshot.take(result))
        problem = verdict.reason if verdict.status == "different" else ""
    except CheckFailed as failure:
        problem = str(failure)
    if problem:
        found = _verify_each(plan, original, verifier)
        return replace(found, warnings=(f"passes were verified one by one, since {problem}", *found.warnings))
    if plan.on_pass:
        for record in ledger.records:
            plan.on_pass(record)
    return ledger.result(result, verdict, verifier.remarks)
