"""The pass `tile-rows`: what a large product is only a step towards is computed some rows at a time, for caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import add_initializer, is_onnx
from optframe_passes.surgery import Surgery, only_reader

Dims = tuple[int, ...]

_LARGE_BYTES = 32 << 20
"""A smaller product is not worth a loop: with onnxruntime 1.32 and 2 MB of second-level cache a core, attention of 8
heads over 900 tokens, 26 MB, gains 10 % of its own time, two sums of 46 MB in between gain 30 %, of 171 MB 39 %."""

_TILE_BYTES = 8 << 20
"""Of the largest step at once: there the two sums above take the least time; at 4 and at 16 MB it is 10 and 30 % more.
More tiles have too few rows for a matrix product and start too many nodes."""

_FEWEST_ROWS = 32
"""Rows of a tile below which a matrix product no longer runs at full speed."""

_SHRINKS = 4
"""How many times smaller than the product the end of the chain must be, for the memory in between to matter."""

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Max", "Relu", "Sigmoid", "Tanh", "Exp", "Sqrt", "Erf", "Neg")


@dataclass(frozen=True)
class TileRows(GraphPass):
    """Compute a large matrix product and what follows up to a small result for some rows at a time, in a Scan.

    Attention multiplies twice, and what lies between is far larger than what comes out: scores of every query and key,
    or, with rows and columns attended to one after the other, a sum for every query, row and channel. Written to memory
    and read back, it costs more time on a CPU than the arithmetic. Here a Scan takes tiles of the rows of the left
    operand, small enough for the cache, through the chain of nodes that the product begins: elementwise ops, Softmax,
    Reshape and matrix products that keep the rows apart, up to one that makes less than a quarter of the product's
    size. Every number of the result is computed from the same numbers as before.

    Takes part what makes more than 32 MB, if all shapes are known and the number of rows has a divisor that gives
    tiles of at most 8 MB and at least 32 rows. For backends that run node by node on a CPU: others
    fuse such chains themselves, and a Scan would keep them from it.

    Example:
        before: `t = MatMul(a, v)`, a of shape (8, 3350, 67), v (8, 67, 1600),
                `y = MatMul(b, Reshape(t, [8, 3350, 50, 32]))`, b of shape (8, 3350, 1, 50)
        after:  `y = Reshape(Scan(Reshape(a, [8, 25, 134, 67]), Reshape(b, [8, 25, 134, 1, 50])), [8, 3350, 1, 32])`,
                in whose body `t` is of shape (8, 134, 1600)
    """

    name: ClassVar[str] = "tile-rows"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite in place."""
        surgery = Surgery(model, context)
        for node in surgery.nodes() if surgery.opset >= 13 else ():
            chain = _Chain.of(surgery, node) if node.graph is not None and is_onnx(node, "MatMul") else None
            if chain is None:
                continue
            steps = chain.steps
            if steps is None:
                context.near_miss(node, f"no divisor of its {chain.rows} rows makes tiles of a good size")
            elif context.allow(node):
                _rewrite(surgery, chain, steps)
        return surgery.result


@dataclass
class _Chain:
    """Nodes one after another, the first a product, whose results have the product's rows along `axis`.

    `sliced` are the operands from elsewhere that have the rows too, and along which of their axes; `whole` the others.
    """

    rows: int
    axis: int
    itemsize: float
    nodes: list[ir.Node] = field(default_factory=list)
    dims: list[Dims] = field(default_factory=list)
    sliced: dict[ir.Value, int] = field(default_factory=dict)
    whole: set[ir.Value] = field(default_factory=set)

    @classmethod
    def of(cls, surgery: Surgery, product: ir.Node) -> _Chain | None:
        """Return the chain that begins with `product`, None if there is none that is worth it."""
        left, right = product.inputs[0], product.inputs[1]
        dims, operand = surgery.known.static(product.outputs[0]), surgery.known.static(left)
        dtype = surgery.known.dtype(product.outputs[0])
        if not dims or not operand or len(dims) < 2 or len(operand) != len(dims) or dtype is None:
            return None
        if left is None or right is None or left is right or math.prod(dims) * dtype.itemsize <= _LARGE_BYTES:
            return None
        axis = len(dims) - 2
        chain = cls(dims[axis], axis, dtype.itemsize, [product], [dims], {left: axis}, {right})
        while math.prod(chain.dims[-1]) * _SHRINKS > math.prod(dims):
            node = only_reader(chain.nodes[-1].outputs[0])
            if node is None or not chain._takes(surgery, node):
                return None
        return chain

    @property
    def steps(self) -> int | None:
        """How many tiles there are to be, None if that cannot be well."""
        largest = max(map(math.prod, self.dims)) * self.itemsize
        for steps in range(2, self.rows // _FEWEST_ROWS + 1):
            if self.rows % steps == 0 and largest <= steps * _TILE_BYTES:
                return steps
        return None

    @property
    def _end(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    def _takes(self, surgery: Surgery, node: ir.Node) -> bool:
        """Go on with `node`, which reads the end of the chain, if it keeps the rows apart; return whether it does."""
        before, result = self.dims[-1], surgery.known.static(node.outputs[0])
        if not result or not self._keeps_rows(surgery, node, before, result):
            return False
        self.nodes.append(node)
        self.dims.append(result)
        return True

    def _keeps_rows(self, surgery: Surgery, node: ir.Node, before: Dims, result: Dims) -> bool:
        if is_onnx(node, "Reshape"):
            return result[: self.axis + 1] == before[: self.axis + 1]
        if len(result) != len(before):
            return False
        if is_onnx(node, "Softmax"):
            return node.attributes.get_int("axis", -1) % len(before) != self.axis
        if is_onnx(node, "MatMul") and self.axis == len(before) - 2:  # other rows belong to another matrix
            return node.inputs[0] is self._end and self._note(node.inputs[1], None)
        others = [value for value in node.inputs if value is not self._end]
        return is_onnx(node, "MatMul", *_ELEMENTWISE) and all(
            self._note(value, self._aligned(surgery.known.static(value), len(before))) for value in others
        )

    def _aligned(self, dims: Dims | None, rank: int) -> int | None:
        """Return along which axis an operand of `dims` has the rows when it is broadcast to `rank`, if it has them."""
        axis = self.axis - rank + len(dims or ())
        return axis if dims and axis >= 0 and dims[axis] == self.rows else None

    def _note(self, value: ir.Value | None, axis: int | None) -> bool:
        """Take in an operand with the rows along `axis`, or without; return whether that fits how others read it."""
        if value is None or (value in self.whole if axis is not None else value in self.sliced):
            return False
        if axis is None:
            self.whole.add(value)
            return True
        return self.sliced.setdefault(value, axis) == axis


def _rewrite(surgery: Surgery, chain: _Chain, steps: int) -> None:
    """Put a Scan in the place of `chain`."""
    nodes, rows = chain.nodes, chain.rows // steps
    outer: list[ir.Node] = []
    for value, axis in chain.sliced.items():
        dims = surgery.known.static(value) or ()
        outer.append(_reshape(surgery, value, (*dims[:axis], steps, rows, *dims[axis + 1 :]), nodes))
    body = _body(surgery, chain, rows)
    scan = surgery.new(
        "Scan",
        [node.outputs[0] for node in outer],
        nodes,
        {
            "body": body,
            "num_scan_inputs": len(outer),
            "scan_input_axes": list(chain.sliced.values()),
            "scan_output_axes": [chain.axis],
        },
    )
    result, made = chain.dims[-1], scan.outputs[0]
    made.type = body.outputs[0].type
    last = _reshape(surgery, made, result, nodes)
    surgery.replace(nodes, [*outer, scan, last])
    made.shape = ir.Shape((*result[: chain.axis], steps, rows, *result[chain.axis + 1 :]))


def _reshape(surgery: Surgery, value: ir.Value, target: Sequence[int], origin: Sequence[ir.Node]) -> ir.Node:
    shape = surgery.initializer(origin[-1], f"{value.name}/shape", np.array(target, np.int64))
    return surgery.new("Reshape", [value, shape], origin)


def _body(surgery: Surgery, chain: _Chain, rows: int) -> ir.Graph:
    """Return the graph that takes `rows` rows through the chain."""
    values: dict[ir.Value | None, ir.Value] = {}
    for value, axis in chain.sliced.items():
        dims = surgery.known.static(value) or ()
        values[value] = _typed(surgery, value, (*dims[:axis], rows, *dims[axis + 1 :]))
    body = ir.Graph(list(values.values()), [], nodes=[], name=f"{chain.nodes[-1].name or 'tile'}/body")
    for node, dims in zip(chain.nodes, chain.dims, strict=True):
        tile = (*dims[: chain.axis], rows, *dims[chain.axis + 1 :])
        operands = [values.get(value, value) for value in node.inputs]
        if node.op_type == "Reshape":  # inference looks for the target in the graph of the node alone
            name = surgery.name(f"{node.outputs[0].name}/shape")
            operands[1] = add_initializer(body, name, np.array(tile, np.int64))
        copy = surgery.copy(node, operands)
        copy.attributes.pop("allowzero", None)
        old, new = node.outputs[0], copy.outputs[0]
        new.type, new.shape = surgery.known.type_of(old), ir.Shape(tile)
        values[old] = new
        body.append(copy)
    body.outputs.append(body[-1].outputs[0])
    return body


def _typed(surgery: Surgery, value: ir.Value, dims: Dims) -> ir.Value:
    """Return a new value for a tile of `value`."""
    name = surgery.name(f"{value.name}/tile")
    return ir.Value(name=name, type=surgery.known.type_of(value), shape=ir.Shape(dims))
