"""Running a pipeline with each pass verified, and rolled back where it broke the model.

Passes run ahead: the structure of what each leaves is checked at once, but whether it computes the same is verified for
many passes together, in one run of one merged model (see `optframe.gate.region`). Where one of them turns out to be
wrong, the model from before it is restored, and those after it run again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optframe import graph
from optframe.errors import OptframeError, describe
from optframe.gate import reproducer
from optframe.gate.execution import Execution, Ledger, Plan, execute
from optframe.gate.records import Verified
from optframe.gate.structure import foreign_domains, interface_problem, wiring_problem
from optframe.gate.verify import Step, Verifier
from optframe.gate.workpiece import Ran, Workpiece
from optframe.numerics import EQUAL, Verdict
from optframe.passes import PassResult
from optframe.snapshot import Snapshot


@dataclass(frozen=True)
class Attempt:
    """A pass that has run; `after` is None where it broke the model's structure, and `remark` then says how.

    `modified` is the truth, whatever the pass said; `made` is how many rewrites passes had made before.
    """

    execution: Execution
    before: Snapshot
    after: Snapshot | None
    modified: bool
    made: int
    remark: str = ""


class Broken(Exception):
    """A pass broke the model's structure; the message says how."""


class Gate:
    """Runs `plan` on the model that `original` is a snapshot of, and enters what comes of it in `ledger`."""

    def __init__(self, plan: Plan, original: Snapshot, verifier: Verifier, ledger: Ledger) -> None:
        self._plan = plan
        self._verifier = verifier
        self._ledger = ledger
        self._made = 0
        self._restore(original)

    def run(self) -> tuple[ir.Model, Snapshot]:
        """Run all passes; return the model they leave, and a snapshot of it."""
        index = 0
        while index < len(self._plan.steps):
            pending: list[Attempt] = []
            for position in range(index, len(self._plan.steps)):
                pending.append(self._attempt(position))
                if pending[-1].after is None:
                    break
            index += self._settle(pending)
        return self._workpiece.model, self._snapshot

    def _restore(self, snapshot: Snapshot) -> None:
        """Go on from `snapshot`."""
        self._snapshot = snapshot
        self._workpiece = Workpiece(snapshot.model.clone())
        self._counts = graph.op_histogram(snapshot.model, self._plan.kernel_ops)

    def _attempt(self, index: int) -> Attempt:
        """Run step `index` and look at the structure that it leaves."""
        before, counts, made, started = self._snapshot, self._counts, self._made, time.perf_counter()
        try:
            with _read_only(before.model):
                execution, baseline = self._execute(index)
            after = self._examine(execution, baseline)
        except Broken as broken:
            ran = Ran(PassResult(True), (), time.perf_counter() - started, ())
            execution = Execution(index, self._plan.steps[index], ran, counts, counts)
            return Attempt(execution, before, None, True, made, str(broken))
        modified = not after.same(baseline)
        self._snapshot, self._counts = after if modified else before, execution.after
        self._made += len(execution.ran.allowed)
        remark = "it changed nothing, but said that it did" if execution.ran.result.modified and not modified else ""
        return Attempt(execution, before, self._snapshot, modified, made, remark)

    def _execute(self, index: int) -> tuple[Execution, Snapshot]:
        """Run step `index`; return also the model that it was given, in its dialect."""
        try:
            converted = self._workpiece.enter(self._plan.steps[index])
            baseline = self._snapshot if converted is None else Snapshot.take(converted)
            return execute(self._plan, self._workpiece, index, self._counts, self._made), baseline
        except OptframeError:
            raise
        except Exception as error:  # a pass is foreign code
            raise Broken(f"it raised {describe(error)}") from error

    def _examine(self, execution: Execution, baseline: Snapshot) -> Snapshot:
        """Return a snapshot of what a pass left.

        Raises:
            Broken: it is no sound model, or not what the pass says.
        """
        try:
            written = self._workpiece.written()
            problem = wiring_problem(written)
            after = None if problem else Snapshot.take(written)
        except Exception as error:  # a broken graph fails anywhere on its way to a file
            raise Broken(f"what it left cannot be written: {describe(error)}") from error
        if after is None:
            raise Broken(f"{problem}")
        before = self._snapshot
        if not execution.ran.result.modified and not after.same(baseline, types=False):
            raise Broken("it changed the model, but said that it did not")
        for found in (
            interface_problem(before, after),
            foreign_domains(before, after, execution.step.domains),
            None if after.same(before) else self._verifier.structure_problem(before, after),
        ):
            if found:
                raise Broken(found)
        return after

    def _settle(self, pending: Sequence[Attempt]) -> int:
        """Verify `pending`, enter them up to the first that broke the model, roll that one back; return how many."""
        steps = [Step(a.execution.index, a.before, a.after) for a in pending if a.after is not None and a.modified]
        verdicts = dict(zip((step.index for step in steps), self._verifier.verify_steps(steps), strict=False))
        for count, attempt in enumerate(pending, 1):
            verdict = verdicts.get(attempt.execution.index, EQUAL)
            if attempt.after is None:
                verdict = Verdict("different", attempt.remark)
            if attempt.after is None or verdict.status == "different":
                self._roll_back(attempt, verdict)
                return count
            self._accept(attempt, attempt.after, verdict)
        return len(pending)

    def _accept(self, attempt: Attempt, after: Snapshot, verdict: Verdict) -> None:
        verified: Verified = "unverified" if verdict.status == "unverified" else "equal"
        reason = verdict.reason or attempt.remark
        record = attempt.execution.record(verified if attempt.modified else "unchanged", reason, attempt.modified)
        if attempt.remark:
            self._ledger.warn(f"pass '{record.name}': {attempt.remark}")
        self._ledger.enter(record, after.model.clone)

    def _roll_back(self, attempt: Attempt, verdict: Verdict) -> None:
        self._restore(attempt.before)
        self._made = attempt.made
        step, reason = attempt.execution.step, verdict.reason + (f" (on {verdict.sample})" if verdict.sample else "")
        where = ""
        if self._plan.reproducer_folder:
            folder = self._plan.reproducer_folder / f"{attempt.execution.index + 1:02d}-{step.name}"
            reproducer.write(folder, step, reason, attempt.before, self._verifier.feeds(verdict.sample))
            where = f"; {folder} has what is needed to repeat it"
        self._ledger.warn(f"pass '{step.name}' broke the model and was rolled back: {reason}{where}")
        self._ledger.enter(attempt.execution.record("rolled-back", reason), attempt.before.model.clone)


@contextmanager
def _read_only(model: ir.Model) -> Iterator[None]:
    """Keep passes from writing into tensors: the models before and after share them."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    raw = [tensor.raw for tensor in tensors if isinstance(tensor, ir.Tensor)]
    arrays = [array for array in raw if isinstance(array, np.ndarray) and array.flags.writeable]
    try:
        for array in arrays:
            array.flags.writeable = False
        yield
    finally:
        for array in arrays:
            array.flags.writeable = True
