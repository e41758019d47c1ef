"""What a report holds: frozen dataclasses of a whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from optframe.accuracy import Finding, Limits, OutputError, judge
from optframe.details import EngineDetails
from optframe.latency import Latency
from optframe.passes import PASS_KEY, NearMiss
from optframe.provenance import NodeOrigin
from optframe.types import Illustration, Precision

if TYPE_CHECKING:
    import onnx_ir as ir

    from optframe.precision import Sensitivity
    from optframe.stages.runner import StageResult

T = TypeVar("T")


@dataclass(frozen=True)
class Change(Generic[T]):
    """The same figure of the exported and of the optimised model."""

    exported: T
    optimized: T


@dataclass(frozen=True)
class PassRow:
    """One execution of a pass.

    `verified`: the gate proved what it left equal; `status`: the gate's word for it; `rolled_back`: what it did was
    undone; `note`: why, or what else there is to say in a line.
    """

    name: str
    modified: bool
    nodes_before: int
    nodes_after: int
    seconds: float
    verified: bool
    status: str = ""
    rolled_back: bool = False
    note: str = ""
    rewrites: int = 0
    op_changes: Mapping[str, int] = field(default_factory=dict)
    """Op type -> change of its count, zeros left out."""
    near_misses: tuple[NearMiss, ...] = ()


@dataclass(frozen=True)
class EngineRun:
    """One precision on one backend: its size, its latency, and the errors of its outputs (the worst over all inputs).

    The fractions are those of all FLOPs, and of the convolutions' alone, that run in INT8; None where it isn't INT8.
    `latency_cached` says that the latency is not of this run; when and where it was measured it says itself.
    `variant` tells builds of one backend apart. `not_run` is why the engine was built and not run here: then there are
    neither errors nor a latency, and nothing is proven of it.
    """

    backend: str
    precision: Precision
    pipeline: str
    nodes: int
    outputs: Mapping[str, OutputError]
    limits: Limits = field(default_factory=Limits)
    latency: Latency | None = None
    latency_cached: bool = False
    device: str = "cpu"
    int8_flops_fraction: float | None = None
    int8_conv_flops_fraction: float | None = None
    variant: str = ""
    not_run: str = ""
    engine_bytes: int | None = None
    details: EngineDetails | None = None

    @property
    def place(self) -> str:
        """What it runs on, in words: the backend, and the variant of its build."""
        return f"{self.backend}, {self.variant}" if self.variant else self.backend

    @property
    def findings(self) -> list[Finding]:
        """The figures that are over their limits, or could not be judged."""
        return judge(self.outputs, self.limits)

    @property
    def passed(self) -> bool:
        """Whether no limit is missed."""
        return not any(finding.missed for finding in self.findings)

    def worst(self, figure: str) -> float | None:
        """Return the largest value of `figure` (a field of OutputError) over the outputs, or None if none has it."""
        values = [getattr(error, figure) for error in self.outputs.values()]
        return max((value for value in values if value is not None), default=None)


@dataclass(frozen=True)
class RunReport:
    """Everything a report shows. `reference` says in words what errors are measured against ("PyTorch FP32").

    `notes` are plain sentences about the run that are no warnings, `flops` count multiplications and additions of one
    inference, `provenance` says how many nodes of the optimised model each pass made, `made` which and from what;
    `created` is UTC in ISO 8601.
    """

    model: str
    reference: str
    input_shapes: Mapping[str, Sequence[int]]
    nodes: Change[int]
    passes: tuple[PassRow, ...]
    runs: tuple[EngineRun, ...]
    op_histogram: Change[Mapping[str, int]]
    created: str
    command: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    flops: Change[float] | None = None
    provenance: Mapping[str, int] = field(default_factory=dict)
    made: tuple[NodeOrigin, ...] = ()
    stages: tuple[StageResult, ...] = ()
    illustrations: tuple[Illustration, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None

    @property
    def passed(self) -> bool:
        """Whether no run misses a limit."""
        return all(run.passed for run in self.runs)

    def label(self, run: EngineRun) -> str:
        """Return a short name of `run`: its precision, and its backend and device where the report has several."""
        parts = [run.precision.upper()]
        if len({other.backend for other in self.runs}) > 1:
            parts.append(run.backend)
        if len({other.variant for other in self.runs if other.backend == run.backend}) > 1:
            parts.append(run.variant)
        if len({other.device for other in self.runs}) > 1:
            parts.append(run.device)
        return " ".join(filter(None, parts))


def count_provenance(model: ir.Model) -> dict[str, int]:
    """Return pass name -> how many nodes of `model` it was the last to make, most first; "" counts the untouched."""
    makers = (node.metadata_props.get(PASS_KEY, "").rpartition(",")[2] for node in model.graph.all_nodes())
    return dict(Counter(makers).most_common())
