"""The pass `compose-slices`: a Slice of a Slice is one Slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import ints_option, is_onnx
from optframe_passes.surgery import Surgery, only_reader

_BEFORE_ALL = np.iinfo(np.int64).min
"""Where a Slice that goes backwards ends if it takes the first entry too."""


@dataclass(frozen=True)
class ComposeSlices(GraphPass):
    """Let one Slice take what two in a row take, if nothing else reads what lies between them.

    That is how exporters write `x[:, a:b, ..., c:d]`: a Slice for each axis. Slices of different axes only join their
    lists; where both cut the same axis its size has to be known. Starts, ends, axes and steps have to be constants.

    Example:
        before: `y = Slice(Slice(x, [1], [9], [0]), [2], [4], [1])`
        after:  `y = Slice(x, [1, 2], [9, 4], [0, 1])`
    """

    name: ClassVar[str] = "compose-slices"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Compose in place."""
        surgery = Surgery(model, context)
        for node in surgery.nodes() if surgery.opset >= 10 else ():
            first: ir.Node | None = node
            while first is not None and first.graph is not None and is_onnx(first, "Slice"):
                first = _compose(surgery, first)
        return surgery.result


def _compose(surgery: Surgery, first: ir.Node) -> ir.Node | None:
    """Join `first` with the Slice that alone reads it; return the new one, None if there is none."""
    second = only_reader(first.outputs[0])
    if second is None or not is_onnx(second, "Slice") or second.inputs[0] is not first.outputs[0]:
        return None
    dims = surgery.known.dims(first.inputs[0])
    cuts = [_cuts(node, None if dims is None else len(dims)) for node in (first, second)]
    if dims is None or cuts[0] is None or cuts[1] is None:
        surgery.context.near_miss(second, "a Slice before it, or itself, takes what is not known beforehand")
        return None
    joined = dict(cuts[0])
    for axis, cut in cuts[1].items():
        both = _cut_twice(joined[axis], cut, dims[axis]) if axis in joined else cut
        if both is None:
            surgery.context.near_miss(
                second, f"both Slices cut axis {axis}, whose size is not known, or leave nothing of it"
            )
            return None
        joined[axis] = both
    if not surgery.context.allow(second):
        return None
    new = _slice(surgery, first, second, joined)
    surgery.replace([first, second], [new])
    return new


def _cuts(node: ir.Node, rank: int | None) -> dict[int, slice] | None:
    """Return what `node` takes of each axis that it names, None where that is not constant."""
    starts, ends, axes, steps = (ints_option(node, "", index) for index in range(1, 5))
    if rank is None or not starts or not ends or axes is None or steps is None:
        return None
    axes = axes or tuple(range(len(starts)))
    steps = steps or (1,) * len(starts)
    cuts = zip(axes, starts, ends, steps, strict=True)
    return {axis % rank: slice(start, end, step) for axis, start, end, step in cuts}


def _cut_twice(first: slice, second: slice, size: int | str) -> slice | None:
    """Return what is left behind both; Python cuts a range as ONNX cuts an axis."""
    taken = range(size)[first][second] if isinstance(size, int) else range(0)
    return slice(taken.start, taken.stop if taken.stop >= 0 else _BEFORE_ALL, taken.step) if taken else None


def _slice(surgery: Surgery, first: ir.Node, second: ir.Node, cuts: Mapping[int, slice]) -> ir.Node:
    numbers = {
        "starts": [cut.start for cut in cuts.values()],
        "ends": [cut.stop for cut in cuts.values()],
        "axes": list(cuts),
        "steps": [cut.step for cut in cuts.values()],
    }
    if set(numbers["steps"]) == {1}:
        del numbers["steps"]
    name = second.outputs[0].name or "value"
    constants = [
        surgery.initializer(second, f"{name}/{what}", np.array(entries, np.int64)) for what, entries in numbers.items()
    ]
    return surgery.new("Slice", [first.inputs[0], *constants], [first, second])
