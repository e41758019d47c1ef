"""Executing the passes of a pipeline one by one, and keeping account of what they did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import onnx_ir as ir

from optframe import graph
from optframe.gate.records import OptimizeResult, PassRecord, Verified
from optframe.gate.workpiece import Ran, Workpiece
from optframe.numerics import Verdict
from optframe.pass_options import show_options
from optframe.passes import GraphPass
from optframe.types import Feeds, OpSpec

Observer: TypeAlias = Callable[[PassRecord], None]
Draw: TypeAlias = Callable[[int], Feeds]


@dataclass(frozen=True)
class Plan:
    """What is to be done to a model: see `optframe.gate.optimize`."""

    steps: Sequence[GraphPass]
    ops: Mapping[str, OpSpec] = field(default_factory=dict)
    inputs: Sequence[Feeds] = ()
    random_inputs: Draw | None = None
    dump: Path | None = None
    reproducer_folder: Path | None = None
    limit: int | None = None
    on_pass: Observer | None = None
    on_start: Callable[[str], None] | None = None
    worker_command: Sequence[str] | None = None

    @property
    def kernel_ops(self) -> frozenset[str]:
        """Identifiers of the ops whose calls count as one node."""
        return frozenset(name for name, spec in self.ops.items() if spec.kernel is not None)


@dataclass(frozen=True)
class Execution:
    """One pass that has run; op type -> count before and after it."""

    index: int
    step: GraphPass
    ran: Ran
    before: Counter[str]
    after: Counter[str]

    def record(self, verified: Verified, reason: str = "", modified: bool | None = None) -> PassRecord:
        """Return the record of this execution; where it was rolled back, of one that changed nothing."""
        after = self.before if verified == "rolled-back" else self.after
        changes = {
            op: after[op] - self.before[op] for op in sorted(self.before | after) if after[op] != self.before[op]
        }
        return PassRecord(
            name=self.step.name,
            options=show_options(self.step),
            modified=self.ran.result.modified if modified is None else modified,
            nodes_before=self.before.total(),
            nodes_after=after.total(),
            seconds=self.ran.seconds,
            verified=verified,
            op_changes=changes,
            rewrites=0 if verified == "rolled-back" else self.ran.rewrites,
            near_misses=self.ran.near_misses,
            reason=reason,
        )


class Ledger:
    """Takes down records and warnings; what is final it hands out: records to the observer, models to the dump."""

    def __init__(self, plan: Plan) -> None:
        self.warnings: list[str] = []
        self.records: list[PassRecord] = []
        self._models: list[Callable[[], ir.Model]] = []
        self._published = 0
        self._plan = plan

    def enter(self, record: PassRecord, model: Callable[[], ir.Model]) -> None:
        """Take down the record of the next pass; `model` gives a copy of the model after it."""
        self.records.append(record)
        self._models.append(model)

    def publish(self) -> None:
        """Hand out what has been entered since the last time."""
        for number, record in list(enumerate(self.records, 1))[self._published :]:
            if self._plan.dump and record.modified and record.verified != "rolled-back":
                graph.save(self._models[number - 1](), self._plan.dump / f"{number:02d}-{record.name}.onnx")
            if self._plan.on_pass:
                self._plan.on_pass(record)
        self._published = len(self.records)

    def warn(self, text: str) -> None:
        """Take down a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def result(self, model: ir.Model, verdict: Verdict | None, remarks: Iterable[str] = ()) -> OptimizeResult:
        """Return everything; `verdict` is on the whole model, `remarks` are what is to say of the comparison."""
        unsure = [record.name for record in self.records if record.verified == "unverified"]
        if unsure:
            self.warn(f"not verified: {', '.join(dict.fromkeys(unsure))}")
        for remark in remarks:
            self.warn(remark)
        if verdict and verdict.status == "unverified":
            self.warn(f"the whole model could not be verified: {verdict.reason}")
        status = verdict.status if verdict else "skipped"
        reason = verdict.reason if verdict else ""
        return OptimizeResult(model, tuple(self.records), tuple(self.warnings), status, reason)


def execute(plan: Plan, workpiece: Workpiece, index: int, before: Counter[str], made: int) -> Execution:
    """Run step `index` of `plan`, whatever it raises; `before` are the op counts, and `made` the rewrites, so far."""
    if plan.on_start:
        plan.on_start(plan.steps[index].name)
    allowance = None if plan.limit is None else plan.limit - made
    ran = workpiece.run(plan.steps[index], plan.ops, allowance)
    return Execution(index, plan.steps[index], ran, before, workpiece.op_histogram(plan.kernel_ops))
