"""The pass `compose-layout`: chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten in the fewest nodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.graph import all_nodes
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import is_rearrangement
from optframe_passes.edit import bypass, can_bypass, remove
from optframe_passes.rearrangement import Step, compose, reshape_target
from optframe_passes.surgery import Surgery

_LONGEST_CHAIN = 8


@dataclass(frozen=True)
class ComposeLayout(GraphPass):
    """Do with the fewest nodes what chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten do.

    The dimensions are taken apart into the factors that a chain moves. What moves nothing is one Reshape, or nothing
    if the shape is the same; everything else is a Transpose with a Reshape before it, behind it, on both sides or on
    none. A chain may have readers half-way: it is rewritten where that takes fewer nodes all the same. A Transpose
    that only moves axes of size 1 becomes a Reshape, which copies nothing. Dynamic dimensions take part as far as
    they are provably equal, and where a Reshape can express the result.

    Example:
        before: `y = Reshape(Transpose(Squeeze(x, [3]), perm=[0, 2, 1, 3]), [1, 900, 256])`, x of (1, 8, 900, 1, 32)
        after:  `y = Reshape(Transpose(x, perm=[0, 2, 1, 3, 4]), [1, 900, 256])`
    """

    name: ClassVar[str] = "compose-layout"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Compose in place."""
        surgery = Surgery(model, context)
        waiting = deque(all_nodes(model))
        while waiting:
            last: ir.Node | None = waiting.popleft()
            while last is not None and last.graph is not None and is_rearrangement(last):
                before = _chain(last)[:-1]
                rewrites = surgery.rewrites
                last = _shorten(surgery, last)
                if surgery.rewrites > rewrites:  # what else reads them may now read them alone
                    waiting.extend(
                        use.node for node in before if node.graph is not None for use in node.outputs[0].uses()
                    )
        return surgery.result


def _shorten(surgery: Surgery, node: ir.Node) -> ir.Node | None:
    """Rewrite the chain that ends with `node` where that saves most; return the new last node, None if none does."""
    chain = _chain(node)
    best: tuple[int, list[ir.Node], list[Step]] | None = None
    for length in range(1, len(chain) + 1):
        nodes = chain[-length:]
        steps = compose(nodes, surgery.known)
        if steps is None:
            break
        saved = len(_unused_without(nodes)) - len(steps)
        copies_less = length == 1 and node.op_type == "Transpose" and [kind for kind, _ in steps] == ["Reshape"]
        if (saved > 0 or copies_less) and (best is None or saved > best[0]):
            best = (saved, nodes, steps)
    return None if best is None else _rewrite(surgery, best[1], best[2])


def _chain(last: ir.Node) -> list[ir.Node]:
    """Return `last` and the rearrangements in front of it, in the same graph, first one first."""
    chain = [last]
    while len(chain) < _LONGEST_CHAIN:
        value = chain[0].inputs[0]
        producer = None if value is None else value.producer()
        if producer is None or not is_rearrangement(producer) or producer.graph is not last.graph:
            break
        chain.insert(0, producer)
    return chain


def _unused_without(chain: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes at the end of `chain` that nothing else needs once the last is gone, last one first."""
    unused = [chain[-1]]
    for node in reversed(chain[:-1]):
        value = node.outputs[0]
        if value.is_graph_output() or any(use.node is not unused[-1] for use in value.uses()):
            break
        unused.append(node)
    return unused


def _rewrite(surgery: Surgery, chain: Sequence[ir.Node], steps: Sequence[Step]) -> ir.Node | None:
    last, source = chain[-1], chain[0].inputs[0]
    assert source is not None, "a rearrangement has an input"
    unused = _unused_without(chain)
    if not steps:
        if can_bypass(last.outputs[0], source) and surgery.context.allow(last):
            bypass(last.outputs[0], source)
            remove(unused)
            surgery.rewrites += 1
        return None
    targets = _targets(surgery, source, steps)
    if targets is None:
        surgery.context.near_miss(last, "a shorter chain would need a Reshape with more than one open dimension")
        return None
    if not surgery.context.allow(last):
        return None
    new: list[ir.Node] = []
    for (kind, entries), target in zip(steps, targets, strict=True):
        before = new[-1].outputs[0] if new else source
        new.append(_node(surgery, kind, entries, before, target, chain))
    surgery.insert(last, new)
    surgery.take_over(last.outputs[0], new[-1].outputs[0])
    remove(unused)
    surgery.rewrites += 1
    return new[-1]


def _targets(surgery: Surgery, source: ir.Value, steps: Sequence[Step]) -> list[list[int]] | None:
    """Return the second input of each Reshape among `steps` ([] for a Transpose), None if one cannot be given."""
    dims = surgery.known.dims(source)
    targets: list[list[int]] = []
    for kind, entries in steps:
        if kind == "Transpose":
            dims = None if dims is None else tuple(dims[int(axis)] for axis in entries)
            targets.append([])
            continue
        target = reshape_target(dims, entries)
        if target is None:
            return None
        targets.append(target)
        dims = entries
    return targets


def _node(
    surgery: Surgery,
    kind: str,
    entries: Sequence[int | str],
    source: ir.Value,
    target: Sequence[int],
    chain: Sequence[ir.Node],
) -> ir.Node:
    if kind == "Transpose":
        return surgery.new("Transpose", [source], chain, {"perm": [int(axis) for axis in entries]})
    shape = surgery.initializer(chain[-1], f"{chain[-1].outputs[0].name or 'value'}_shape", np.array(target, np.int64))
    return surgery.new("Reshape", [source, shape], chain)
