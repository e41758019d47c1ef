"""What an optimisation leaves besides the model: a record of each pass, warnings, a verdict on the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import onnx_ir as ir

from optframe.numerics import Status
from optframe.passes import NearMiss

Verified: TypeAlias = Literal["equal", "unchanged", "unverified", "skipped", "rolled-back"]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did. Nodes are counted as `graph.op_histogram` counts them.

    `verified`: "equal": proved so; "unchanged": it changed nothing; "unverified": it could not be compared; "skipped":
    nobody asked; "rolled-back": it broke the model, which is as it was before. `reason` says why, or what else there is
    to say. `op_changes` has op type -> change of its count, zeros left out.
    """

    name: str
    options: str
    modified: bool
    nodes_before: int
    nodes_after: int
    seconds: float
    verified: Verified
    op_changes: Mapping[str, int] = field(default_factory=dict)
    rewrites: int = 0
    near_misses: tuple[NearMiss, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class OptimizeResult:
    """The model after a pipeline, a record of each pass in order, and what the user should know.

    `verified` says of the whole model what `PassRecord.verified` says of one pass, and `reason` why.
    """

    model: ir.Model
    records: tuple[PassRecord, ...]
    warnings: tuple[str, ...]
    verified: Status | Literal["skipped"]
    reason: str = ""

    @property
    def near_misses(self) -> tuple[NearMiss, ...]:
        """The near misses of all passes."""
        return tuple(miss for record in self.records for miss in record.near_misses)
