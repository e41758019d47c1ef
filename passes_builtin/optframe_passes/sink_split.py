"""The pass `sink-split`: what is done to every part of a Split is done once, before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import groups, permutation
from optframe_passes.edit import is_onnx, remove, small_constant
from optframe_passes.surgery import Surgery, only_reader

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish",
    "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt",
    "Tanh",
})
# fmt: on
"""Ops of one input that work on each element for itself."""


@dataclass(frozen=True)
class SinkSplit(GraphPass):
    """Move a Split behind the ops that follow on each of its parts, which then are done once for all.

    All parts must be read once, by nodes that do the same: an elementwise op of one input; a Reshape that gives each
    part its own range of one axis, as it does where projections of several heads lie side by side; or a Transpose.
    Where some of the Transposes differ, the most common one moves, and the others keep what is left for them to do.
    Repeated until nothing follows that could move. The model never gets more nodes.

    Example:
        before: `q, v = Split(x, axis=-1)`, then for both `Transpose(Reshape(q, [1, 900, 8, 32]), perm=[0, 2, 1, 3])`
        after:  `q, v = Split(Transpose(Reshape(x, [1, 900, 16, 32]), perm=[0, 2, 1, 3]), axis=1)`
    """

    name: ClassVar[str] = "sink-split"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Sink in place."""
        surgery = Surgery(model, context)
        for node in surgery.nodes():
            moved: ir.Node | None = node if is_onnx(node, "Split") and len(node.outputs) > 1 else None
            while moved is not None:
                moved = _sink(surgery, moved)
        return surgery.result


@dataclass(frozen=True)
class _Parts:
    """A Split along `axis`, counted from the front, into parts of `sizes`, and the one node that reads each part."""

    node: ir.Node
    axis: int
    sizes: tuple[int, ...]
    readers: tuple[ir.Node, ...]

    @classmethod
    def of(cls, surgery: Surgery, node: ir.Node) -> _Parts | None:
        """Return the parts of `node`; None if a part has no reader or several, or sizes are not known."""
        rank = surgery.rank(node.inputs[0])
        readers = [only_reader(value) for value in node.outputs]
        pairs = zip(readers, node.outputs, strict=True)
        if not rank or any(reader is None or reader.inputs[0] is not part for reader, part in pairs):
            return None
        axis = node.attributes.get_int("axis", 0) % rank
        sizes = []
        for value in node.outputs:
            dims = surgery.known.dims(value)
            size = dims[axis] if dims is not None else None
            if not isinstance(size, int):
                return None
            sizes.append(size)
        return cls(node, axis, tuple(sizes), tuple(reader for reader in readers if reader is not None))


@dataclass(frozen=True)
class _Sunk:
    """How to make the op in front of the Split, the Split behind that, and the permutation left to do of each part."""

    make: Callable[[], ir.Node]
    axis: int
    sizes: tuple[int, ...]
    rest: Sequence[tuple[int, ...] | None] = ()


def _sink(surgery: Surgery, node: ir.Node) -> ir.Node | None:
    """Move `node` behind its readers; return the Split that takes its place, None if it stays."""
    parts = _Parts.of(surgery, node)
    ops = set() if parts is None else {reader.op_type for reader in parts.readers if is_onnx(reader)}
    if parts is None or len(ops) != 1:
        return None
    (op,) = ops
    rule = _reshape if op == "Reshape" else _transpose if op == "Transpose" else _elementwise
    sunk = rule(surgery, parts)
    if sunk is None or not surgery.context.allow(node):
        return None
    return _replace(surgery, parts, sunk)


def _replace(surgery: Surgery, parts: _Parts, sunk: _Sunk) -> ir.Node:
    origin = [parts.node, *parts.readers]
    moved = sunk.make()
    split = surgery.split(moved.outputs[0], sunk.axis, sunk.sizes, [parts.node])
    surgery.context.stamp([moved], parts.readers)
    surgery.insert(parts.node, [moved, split])
    for reader, value, order in zip_longest(parts.readers, split.outputs, sunk.rest):
        if order is not None:
            rest = surgery.new("Transpose", [value], [reader], {"perm": order})
            surgery.insert(split, [rest])
            value = rest.outputs[0]
        surgery.take_over(reader.outputs[0], value)
    remove(origin)
    surgery.rewrites += 1
    return split


def _elementwise(surgery: Surgery, parts: _Parts) -> _Sunk | None:
    first = parts.readers[0]
    if first.op_type not in _ELEMENTWISE or any(_attributes(reader) != _attributes(first) for reader in parts.readers):
        return None
    return _Sunk(lambda: surgery.copy(first, parts.node.inputs[:1]), parts.axis, parts.sizes)


def _attributes(node: ir.Node) -> list[tuple[str, object]]:
    return sorted((name, attribute.value) for name, attribute in node.attributes.items())


def _transpose(surgery: Surgery, parts: _Parts) -> _Sunk | None:
    rank = surgery.rank(parts.node.inputs[0]) or 0
    orders = [tuple(permutation(reader, rank)) for reader in parts.readers]
    order, count = Counter(orders).most_common(1)[0]
    if count < 2:
        return None
    rest = [None if each == order else tuple(order.index(axis) for axis in each) for each in orders]

    def make() -> ir.Node:
        return surgery.new("Transpose", parts.node.inputs[:1], parts.readers, {"perm": order})

    return _Sunk(make, order.index(parts.axis), parts.sizes, rest)


def _reshape(surgery: Surgery, parts: _Parts) -> _Sunk | None:
    first, place = parts.readers[0], _place(surgery, parts)
    results = [surgery.known.dims(reader.outputs[0]) for reader in parts.readers]
    target, allows_zero = small_constant(first.inputs[1]), first.attributes.get_int("allowzero", 0)
    if target is None or place is None or (allows_zero and 0 in target):
        return None
    sizes, others = [], set()
    for dims in results:
        size = dims[place] if dims is not None else None
        if dims is None or not isinstance(size, int):
            return None
        sizes.append(size)
        others.add((*dims[:place], *dims[place + 1 :]))
    copied = parts.axis < target.size and target[parts.axis] == 0
    if len(others) != 1 or (copied and parts.axis != place):
        return None
    whole = target.copy()
    whole[place] = sum(sizes)

    def make() -> ir.Node:
        shape = surgery.initializer(first, f"{first.outputs[0].name}/shape", whole)
        return surgery.copy(first, [parts.node.inputs[0], shape])

    return _Sunk(make, place, tuple(sizes))


def _place(surgery: Surgery, parts: _Parts) -> int | None:
    """Return the axis behind the Reshapes of which each part of the Split has its own range; None if there is none."""
    places: set[int | None] = set()
    for part, reader in zip(parts.node.outputs, parts.readers, strict=True):
        dims, result = surgery.known.dims(part), surgery.known.dims(reader.outputs[0])
        if dims is None or result is None:
            return None
        starts = {axes[0]: behind[0] for axes, behind in groups(dims, result) if axes and behind}
        places.add(starts.get(parts.axis))
    return places.pop() if len(places) == 1 else None
