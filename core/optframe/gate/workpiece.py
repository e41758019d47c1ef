"""The model that passes work on, in whichever dialect the next one wants, and the execution of one pass on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from optframe import graph
from optframe.errors import OptframeError
from optframe.passes import Facts, GraphPass, NearMiss, PassContext, PassResult
from optframe.types import OpSpec

if TYPE_CHECKING:
    from optframe.dialect import GraphSurgeonView


@dataclass(frozen=True)
class Ran:
    """What one execution of a pass came to, by its own account; `allowed` are the rewrites that it asked to make."""

    result: PassResult
    allowed: tuple[str, ...]
    seconds: float
    near_misses: tuple[NearMiss, ...]

    @property
    def rewrites(self) -> int:
        """How many rewrites it made."""
        return self.result.rewrites or len(self.allowed)


class Workpiece:
    """A model under passes. Neighbouring passes of the graphsurgeon dialect share one conversion."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._view: GraphSurgeonView | None = None
        self._stale = False
        self._facts = Facts()

    @property
    def model(self) -> ir.Model:
        """The model as it is now, by what the passes said of it."""
        if self._stale:
            self._model = self.written()
            self._stale = False
        return self._model

    def written(self) -> ir.Model:
        """Return the model as it is now, whatever the passes said."""
        return self._view.to_model() if self._view else self._model

    def enter(self, step: GraphPass) -> ir.Model | None:
        """Convert to the dialect of `step`; return the model as the conversion left it, None where there was none."""
        if step.dialect != "graphsurgeon":
            self._model, self._view = self.model, None
        elif self._view is None:
            from optframe.dialect import GraphSurgeonView

            self._view = GraphSurgeonView(self._model)
            return self._view.to_model()
        return None

    def run(self, step: GraphPass, ops: Mapping[str, OpSpec], allowance: int | None = None) -> Ran:
        """Run `step`, whatever it raises; it may make `allowance` rewrites, or as many as it likes.

        Raises:
            OptframeError: the pass did, and is named.
        """
        started = time.perf_counter()
        made: list[str] = []

        def allow(description: str) -> bool:
            if allowance is not None and len(made) >= allowance:
                return False
            made.append(description)
            return True

        facts, self._facts = self._facts, Facts()
        context = PassContext(ops=ops, allow_rewrite=allow, pass_name=step.name, facts=facts)
        self.enter(step)
        try:
            result = step.run(self._view.graph if self._view else self._model, context)
        except OptframeError as error:
            raise type(error)(f"pass '{step.name}': {error}") from error
        except SystemExit as error:  # it would end the program as if all were done
            raise RuntimeError(f"SystemExit: {error}") from error
        if not isinstance(result, PassResult):
            raise TypeError(f"run() returned {type(result).__name__}, not PassResult")
        if not result.modified:
            self._facts = facts
        if self._view:
            self._view.stamp(step.name)
            self._stale |= result.modified
        return Ran(result, tuple(made), time.perf_counter() - started, tuple(context.near_misses))

    def op_histogram(self, kernel_ops: Collection[str]) -> Counter[str]:
        """Return op type -> count, as `graph.op_histogram` does."""
        return self._view.op_histogram(kernel_ops) if self._view else graph.op_histogram(self._model, kernel_ops)
