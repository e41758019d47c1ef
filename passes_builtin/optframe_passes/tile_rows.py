"""The pass `tile-rows`: what a large product is only a step towards is computed some rows at a time, for caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.passes import PASS_KEY, GraphPass, PassContext, PassResult
from optframe_passes.edit import add_initializer, is_onnx
from optframe_passes.surgery import Surgery, only_reader

Dims = tuple[int, ...]

_LARGE_BYTES = 16 << 20
"""A smaller product is not worth a loop. With onnxruntime 1.32 and 2 MB of second-level cache a core, Anchor DETR gains
6 % of its whole time by attention over 900 tokens (26 MB), and loses 2 % if feed-forward layers (13 MB) take part."""

_TILE_BYTES = 1 << 20
"""Of the largest step of one matrix at once, half of such a cache. With tiles of half and of twice the size Anchor DETR
takes 3 % longer, with tiles of all eight heads 13 %. Smaller ones have too few rows for a matrix product, whose right
operand is laid out anew each time."""

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
    size. Where the product is one of several matrices, as of heads, another Scan around it takes one at a time, unless
    `matrices_apart` is false: with many cores all at once, one a core, may suit the caches as well and start fewer
    nodes; this was measured on two. Every number of the result is computed from the same numbers as before.

    Takes part what makes more than 16 MB, if all shapes are known and the number of rows has a divisor that gives
    tiles of at most 1 MB and at least 32 rows. For backends that run node by node on a CPU: others
    fuse such chains themselves, and a Scan would keep them from it.

    Example:
        before: `t = MatMul(a, v)`, a of shape (8, 3350, 67), v (8, 67, 1600),
                `y = MatMul(b, Reshape(t, [8, 3350, 50, 32]))`, b of shape (8, 3350, 1, 50)
        after:  `y = Reshape(Scan(Reshape(a, [8, 25, 1, 134, 67]), Reshape(b, [8, 25, 1, 134, 1, 50]), Reshape(v, ...)),
                [8, 3350, 1, 32])`, in whose body a Scan has one in whose body `t` is of shape (1, 134, 1600)
    """

    name: ClassVar[str] = "tile-rows"
    matrices_apart: bool = True

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite in place."""
        surgery = Surgery(model, context)
        for node in surgery.nodes() if surgery.opset >= 13 else ():
            chain = _Chain.of(surgery, node) if node.graph is not None and is_onnx(node, "MatMul") else None
            made_by = node.metadata_props.get(PASS_KEY, "").split(",")
            if chain is None or self.name in made_by:  # tiles of many matrices together are large themselves
                continue
            chain.split &= self.matrices_apart
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
    `lead` are the axes before the rows. `apart` tells how many axes of an operand are these, None where it has none of
    them; `split` whether one matrix at a time can be computed: operands have all or none, and no node mixes matrices.
    """

    rows: int
    axis: int
    itemsize: float
    lead: Dims
    split: bool
    nodes: list[ir.Node] = field(default_factory=list)
    dims: list[Dims] = field(default_factory=list)
    sliced: dict[ir.Value, int] = field(default_factory=dict)
    whole: dict[ir.Value, None] = field(default_factory=dict)
    apart: dict[ir.Value, int | None] = field(default_factory=dict)

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
        chain = cls(dims[axis], axis, dtype.itemsize, dims[:axis], math.prod(dims[:axis]) > 1, [product], [dims])
        chain._note(surgery, left, axis, len(dims))
        chain._note(surgery, right, None, len(dims))
        while math.prod(chain.dims[-1]) * _SHRINKS > math.prod(dims):
            node = only_reader(chain.nodes[-1].outputs[0])
            if node is None or not chain._takes(surgery, node):
                return None
        return chain

    @property
    def steps(self) -> int | None:
        """How many tiles a matrix is to be cut into, None if that cannot be well."""
        largest = max(map(math.prod, self.dims)) * self.itemsize / math.prod(self.lead)
        for steps in range(1 if self.split else 2, self.rows // _FEWEST_ROWS + 1):
            if self.rows % steps == 0 and largest <= steps * _TILE_BYTES:
                return steps
        return None

    @property
    def tile_lead(self) -> Dims:
        """The axes before the rows as a tile has them: of one matrix, or of all."""
        return (1,) * self.axis if self.split else self.lead

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
        if len(result) != len(before) or result[: self.axis] != self.lead:
            return False
        if is_onnx(node, "Softmax"):
            axis = node.attributes.get_int("axis", -1) % len(before)
            self.split &= axis > self.axis
            return axis != self.axis
        if is_onnx(node, "MatMul") and self.axis == len(before) - 2:  # other rows belong to another matrix
            return node.inputs[0] is self._end and self._note(surgery, node.inputs[1], None, len(before))
        if is_onnx(node, "MatMul") and self.axis > len(before) - 2:  # rows are summed over
            return False
        others = [value for value in node.inputs if value is not self._end]
        return is_onnx(node, "MatMul", *_ELEMENTWISE) and all(
            self._note(surgery, value, self._aligned(surgery.known.static(value), len(before)), len(before))
            for value in others
        )

    def _aligned(self, dims: Dims | None, rank: int) -> int | None:
        """Return along which axis an operand of `dims` has the rows when it is broadcast to `rank`, if it has them."""
        axis = self.axis - rank + len(dims or ())
        return axis if dims and axis >= 0 and dims[axis] == self.rows else None

    def _note(self, surgery: Surgery, value: ir.Value | None, axis: int | None, rank: int) -> bool:
        """Take in an operand with the rows along `axis`, or without; return whether that fits how others read it."""
        if value is None or (value in self.whole if axis is not None else value in self.sliced):
            return False
        dims = surgery.known.static(value)
        lead = None if dims is None else ((1,) * (rank - len(dims)) + dims)[: self.axis]
        apart = self.axis - rank + len(dims) if dims is not None and lead == self.lead else None
        one = apart is not None or lead == (1,) * self.axis
        self.split &= one and self.apart.setdefault(value, apart) == apart
        if axis is None:
            self.whole[value] = None
            return True
        return self.sliced.setdefault(value, axis) == axis


def _rewrite(surgery: Surgery, chain: _Chain, steps: int) -> None:
    """Put a Scan over tiles in the place of `chain`, in one over matrices if the chain can be split into those."""
    nodes, loops = chain.nodes, _Loops(surgery, chain, steps)
    for value in (*chain.sliced, *chain.whole):
        loops.take(value)
    scan = loops.scan()
    last = loops.reshape(scan.outputs[0], chain.dims[-1])
    made = scan.outputs[0].shape
    surgery.replace(nodes, [*loops.before, scan, last])
    scan.outputs[0].shape = made  # `replace` forgets it


@dataclass
class _Loops:
    """Scans under construction: what stands `before` them, what they run over, and what a tile reads for an operand."""

    surgery: Surgery
    chain: _Chain
    steps: int
    before: list[ir.Node] = field(default_factory=list)
    matrices: dict[ir.Value, ir.Value] = field(default_factory=dict)
    tiles: dict[ir.Value, ir.Value] = field(default_factory=dict)
    axes: list[int] = field(default_factory=list)
    read: dict[ir.Value | None, ir.Value] = field(default_factory=dict)

    @property
    def matrix_count(self) -> int:
        """How many matrices are computed one at a time; 1 where they are computed together."""
        return math.prod(self.chain.lead) if self.chain.split else 1

    def take(self, value: ir.Value) -> None:
        """Cut an operand into what each loop reads of it; one that all tiles read whole is read from outside."""
        chain, dims = self.chain, self.surgery.known.static(value) or ()
        axis = chain.sliced.get(value) if self.steps > 1 else None  # of the rows, where they are cut
        lead = chain.apart.get(value) if chain.split else None
        if lead is not None:
            dims = (1,) * lead + dims[lead:]
        tile, stacked = (dims, dims) if axis is None else self._cut(dims, axis)
        source = value
        if lead is not None:
            source = self._typed(value, stacked)
            self.matrices[source] = self._reshaped(value, (self.matrix_count, *stacked))
        elif axis is not None:
            source = self._reshaped(value, stacked)
        self.read[value] = source
        if axis is not None:
            self.read[value] = self._typed(value, tile)
            self.tiles[self.read[value]] = source
            self.axes.append(0 if chain.split else axis)

    def _cut(self, dims: Dims, axis: int) -> tuple[Dims, Dims]:
        """Return the shape of a tile, and of all of them stacked."""
        rows = self.chain.rows // self.steps
        before, after = dims[:axis], dims[axis + 1 :]
        stacked = (self.steps, *before, rows, *after) if self.chain.split else (*before, self.steps, rows, *after)
        return (*before, rows, *after), stacked

    def scan(self) -> ir.Node:
        """Return the outermost Scan."""
        chain, last = self.chain, self.chain.dims[-1]
        dims = (*chain.tile_lead, *last[chain.axis :])
        if self.steps == 1:
            body = self._chain_graph(list(self.matrices), self.chain.rows)
        else:
            axis = 0 if chain.split else chain.axis
            _, dims = self._cut(dims, chain.axis)
            inner = self._chain_graph(list(self.tiles), chain.rows // self.steps)
            loop = self._scan(list(self.tiles.values()), inner, dims, self.axes, axis)
            if not chain.split:
                return loop
            body = ir.Graph(list(self.matrices), loop.outputs, nodes=[loop], name=f"{inner.name}/matrix")
        return self._scan(list(self.matrices.values()), body, (self.matrix_count, *dims), [0] * len(self.matrices), 0)

    def _scan(self, inputs: list[ir.Value], body: ir.Graph, dims: Dims, axes: Sequence[int], axis: int) -> ir.Node:
        """Return a Scan whose result, of shape `dims`, is stacked along `axis`."""
        attributes: dict[str, int | Sequence[int] | ir.Graph] = {"body": body, "num_scan_inputs": len(inputs)}
        attributes |= {"scan_input_axes": axes, "scan_output_axes": [axis]}
        scan = self.surgery.new("Scan", inputs, self.chain.nodes, attributes)
        scan.outputs[0].type, scan.outputs[0].shape = body.outputs[0].type, ir.Shape(dims)
        return scan

    def _chain_graph(self, inputs: Sequence[ir.Value], rows: int) -> ir.Graph:
        """Return the graph that takes `rows` rows through the chain."""
        chain = self.chain
        body = ir.Graph(inputs, [], nodes=[], name=f"{chain.nodes[-1].name or 'tile'}/body")
        for node, dims in zip(chain.nodes, chain.dims, strict=True):
            tile = (*chain.tile_lead, rows, *dims[chain.axis + 1 :])
            operands = [self.read.get(value, value) for value in node.inputs]
            if node.op_type == "Reshape":  # inference looks for the target in the graph of the node alone
                name = self.surgery.name(f"{node.outputs[0].name}/shape")
                operands[1] = add_initializer(body, name, np.array(tile, np.int64))
            copy = self.surgery.copy(node, operands)
            copy.attributes.pop("allowzero", None)
            old, new = node.outputs[0], copy.outputs[0]
            new.type, new.shape = self.surgery.known.type_of(old), ir.Shape(tile)
            self.read[old] = new
            body.append(copy)
        body.outputs.append(body[-1].outputs[0])
        return body

    def reshape(self, value: ir.Value, target: Sequence[int]) -> ir.Node:
        """Return a Reshape of `value`, which is in no graph yet."""
        origin = self.chain.nodes
        shape = self.surgery.initializer(origin[-1], f"{value.name}/shape", np.array(target, np.int64))
        return self.surgery.new("Reshape", [value, shape], origin)

    def _reshaped(self, value: ir.Value, target: Sequence[int]) -> ir.Value:
        """Return an operand of a loop, reshaped before it."""
        self.before.append(self.reshape(value, target))
        return self.before[-1].outputs[0]

    def _typed(self, value: ir.Value, dims: Dims) -> ir.Value:
        """Return a new value for a part of `value`."""
        name = self.surgery.name(f"{value.name}/tile")
        return ir.Value(name=name, type=self.surgery.known.type_of(value), shape=ir.Shape(dims))
