"""The pass `flatten-tokens`: regions of a graph that treat all axes but the last alike work on matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import RESHAPES
from optframe_passes.constant_pool import tensor_of
from optframe_passes.edit import add_initializer, bypass, can_bypass, is_onnx, remove
from optframe_passes.min_cut import NEVER, MinCut
from optframe_passes.rearrangement import reshape_target
from optframe_passes.shape_data import Dim, Product
from optframe_passes.surgery import FLOATS, Surgery, only_reader

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Clip", "Cos",
    "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid",
    "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod",
    "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where", "Xor",
})
# fmt: on
_ALONG_LAST_AXIS = frozenset({"Concat", "LayerNormalization", "LogSoftmax", "Softmax", "Split"})
_DEFAULT_AXIS = {"LayerNormalization": -1, "LogSoftmax": -1, "Softmax": -1, "Split": 0, "Concat": 0}


@dataclass(frozen=True)
class FlattenTokens(GraphPass):
    """Merge all axes but the last, where that saves nodes: a transformer's tokens become the rows of matrices.

    MatMul by a matrix, LayerNormalization and Softmax over the last axis, Split and Concat along it and elementwise
    ops do not care how the other axes are divided. Reshapes between them that keep the last axis vanish; MatMul and
    the Add of a constant become one Gemm, which takes matrices only. Where a region meets other ops a Reshape stands,
    but not in front of or behind a Reshape, which takes the other shape itself. Which nodes work on matrices is decided
    for the whole graph at once, as a minimum cut, so that it has the fewest nodes; if no nodes are saved nothing
    happens. A constant that does not broadcast any more is expanded, up to `max_bytes`.

    Dynamic dimensions are merged too; one that is divided again must be the only one.

    Example:
        before: `y = Reshape(Add(MatMul(Reshape(x, [1, 3350, 256]), w), b), [1, 3350, 8, 32])`, x of (1, 50, 67, 256)
        after:  `y = Reshape(Gemm(Reshape(x, [3350, 256]), w, b), [1, 3350, 8, 32])`
    """

    name: ClassVar[str] = "flatten-tokens"
    max_bytes: int = 8 << 20

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Flatten in place."""
        surgery = Surgery(model, context)
        if surgery.opset >= 13 and not any(key[0] == "" for key in model.functions):
            plan = _Plan(surgery, model.graph, self.max_bytes)
            for region in plan.regions():
                if context.allow(region[0]):
                    _Flattening(plan, region).run()
        return surgery.result


class _Plan:
    """What each node of a graph would need to work on matrices, and which nodes should."""

    def __init__(self, surgery: Surgery, graph: ir.Graph, max_bytes: int) -> None:
        self.surgery = surgery
        self.max_bytes = max_bytes
        self.graph = graph
        self._nodes = list(graph)
        self.members = {node for node in self._nodes if self._is_member(node)}
        self.reshapers = {node for node in self._nodes if self._is_reshaper(node)}
        self.biased = dict(self._biased_products())

    def dims(self, value: ir.Value | None) -> tuple[Dim, ...]:
        """Return the shape of `value`, () if not known."""
        return self.surgery.known.dims(value) or ()

    def flattens(self, value: ir.Value | None) -> bool:
        """Return whether `value` has axes to merge in front of a last one of known size."""
        dims = self.dims(value)
        return len(dims) > 2 and isinstance(dims[-1], int) and 0 not in dims

    def keeps_last_axis(self, reshaper: ir.Node) -> bool:
        """Return whether `reshaper` only divides the axes in front of the last in another way."""
        source, result = self.dims(reshaper.inputs[0]), self.dims(reshaper.outputs[0])
        return len(source) > 1 and len(result) > 1 and source[-1] == result[-1] and isinstance(result[-1], int)

    def restores(self, value: ir.Value | None) -> bool:
        """Return whether a Reshape can give the shape of `value` to the matrix made of it."""
        dims = self.dims(value)
        return bool(dims) and reshape_target(None, dims) is not None

    def regions(self) -> list[list[ir.Node]]:
        """Return the nodes that should work on matrices: connected ones together, in topological order."""
        chosen = {node for node in self._cut().chosen() if isinstance(node, ir.Node)}
        leaders = {node: node for node in chosen}

        def leader(node: ir.Node) -> ir.Node:
            while leaders[node] is not node:
                leaders[node] = leaders[leaders[node]]
                node = leaders[node]
            return node

        for value in self._values():
            joined = [node for node in (value.producer(), *(use.node for use in value.uses())) if node in chosen]
            for node in joined[1:]:
                if node is not None and joined[0] is not None:
                    leaders[leader(node)] = leader(joined[0])
        regions: dict[ir.Node, list[ir.Node]] = {}
        for node in self._nodes:
            if node in chosen:
                regions.setdefault(leader(node), []).append(node)
        return list(regions.values())

    def _values(self) -> Iterator[ir.Value]:
        yield from self.graph.inputs
        for node in self._nodes:
            yield from node.outputs

    def _cut(self) -> MinCut:
        cut = MinCut()
        for value in self._values():
            if self.flattens(value):
                self._price_value(cut, value)
        for node in self.reshapers:
            if self.flattens(node.outputs[0]) and self.keeps_last_axis(node):
                cut.unless_chosen(node)
        for product, addition in self.biased.items():
            cut.unless_chosen(("Gemm", product))
            cut.if_without(("Gemm", product), product)
            cut.if_without(("Gemm", product), addition)
        return cut

    def _price_value(self, cut: MinCut, value: ir.Value) -> None:
        """One Reshape where the producer works on a matrix and a reader does not, one for the other way round."""
        producer = value.producer()
        free = producer in self.members or (producer in self.reshapers and producer is not None)
        as_matrix, as_it_is = ("matrix", value), ("shape", value)
        if free:
            cut.if_without(as_matrix, producer, 1)
            cut.if_without(producer, as_it_is, 1 if self.restores(value) else NEVER)
        else:
            cut.if_chosen(as_matrix, 1)
        if value.is_graph_output():
            cut.if_chosen(as_it_is, NEVER)
        for use in value.uses():
            if use.node in self.members and self.reads_matrix(use.node, use.idx):
                cut.if_without(use.node, as_matrix)
                cut.if_without(as_it_is, use.node)
            elif use.node not in self.reshapers or use.idx != 0:
                cut.if_chosen(as_it_is, NEVER)
            elif self.keeps_last_axis(use.node):
                if self.flattens(use.node.outputs[0]):
                    cut.if_without(use.node, as_matrix)
                else:
                    cut.unless_chosen(as_matrix, NEVER)

    def _is_reshaper(self, node: ir.Node) -> bool:
        """Return whether `node` is a Reshape (by any name) whose target can be given whatever it reads."""
        return is_onnx(node, *RESHAPES) and self.restores(node.outputs[0]) and bool(self.dims(node.inputs[0]))

    def _is_member(self, node: ir.Node) -> bool:
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        if not is_onnx(node) or not used or not all(self.flattens(value) for value in node.outputs if value.name != ""):
            return False
        if not any(self.reads_matrix(node, index) for index in range(len(node.inputs))):
            return False
        if node.op_type == "MatMul":
            return self.reads_matrix(node, 0) and len(self.dims(node.inputs[1])) == 2
        if node.op_type in _ALONG_LAST_AXIS:
            return self._works_along_last_axis(node)
        return node.op_type in _ELEMENTWISE and all(self._broadcasts(node, value) for value in node.inputs)

    def _works_along_last_axis(self, node: ir.Node) -> bool:
        rank = len(self.dims(node.outputs[0]))
        axis = node.attributes.get_int("axis", _DEFAULT_AXIS[node.op_type])
        if axis not in (-1, rank - 1):
            return False
        if node.op_type == "Concat":
            return all(self._broadcasts(node, value, along_last=False) for value in node.inputs)
        if not self.reads_matrix(node, 0):
            return False
        if node.op_type == "LayerNormalization":
            unused = all(value.name == "" or not value.uses() for value in node.outputs[1:])
            return (
                len([value for value in node.outputs if value.name != ""]) == 1
                and unused
                and all(value is None or len(self.dims(value)) == 1 for value in node.inputs[1:])
            )
        return True

    def _broadcasts(self, node: ir.Node, value: ir.Value | None, along_last: bool = True) -> bool:
        """Return whether `value` fits to the matrix that `node` makes, or can be made to fit."""
        dims, result = self.dims(value), self.dims(node.outputs[0])
        if value is None or (along_last and self.surgery.known.dims(value) == ()):
            return True
        if tensor_of(value) is not None:
            return self._constant_fits(value, dims, result, along_last)
        if len(dims) == 1:
            return along_last
        same_rows = dims[:-1] == result[:-1] and self.flattens(value)
        return same_rows and (not along_last or dims[-1] in (1, result[-1]))

    def _constant_fits(self, value: ir.Value, dims: Sequence[Dim], result: Sequence[Dim], along_last: bool) -> bool:
        if not dims or len(dims) > len(result):
            return False
        if along_last and all(dim == 1 for dim in dims[:-1]):
            return True
        sizes = [*result[:-1], dims[-1]]
        numbers = [size for size in sizes if isinstance(size, int)]
        dtype = self.surgery.known.dtype(value)
        if len(numbers) != len(sizes) or dtype is None or not dtype.numpy().itemsize:
            return False
        return math.prod(numbers) * dtype.itemsize <= self.max_bytes

    def reads_matrix(self, node: ir.Node, index: int) -> bool:
        """Return whether input `index` of a member is one of those that become matrices."""
        value = node.inputs[index]
        if node.op_type in ("LayerNormalization", "MatMul", "Softmax", "LogSoftmax", "Split") and index > 0:
            return False
        return self.flattens(value) and value is not None and tensor_of(value) is None

    def _biased_products(self) -> Iterator[tuple[ir.Node, ir.Node]]:
        """Yield MatMuls and the Adds of a constant, to each row or a row of its own, that widen nothing."""
        for node in self._nodes:
            if node not in self.members or node.op_type != "MatMul":
                continue
            addition = only_reader(node.outputs[0])
            if addition not in self.members or addition is None or addition.op_type != "Add":
                continue
            bias = next((value for value in addition.inputs if value is not node.outputs[0]), None)
            floats = self.surgery.known.dtype(node.outputs[0]) in FLOATS
            same = self.dims(node.outputs[0]) == self.dims(addition.outputs[0])
            if bias is not None and tensor_of(bias) is not None and self.dims(bias) and floats and same:
                yield node, addition


class _Flattening:
    """One region being flattened; `matrices` holds what stands for a value in it."""

    def __init__(self, plan: _Plan, region: Sequence[ir.Node]) -> None:
        self._plan = plan
        self._surgery = plan.surgery
        self._region = region
        self._inside = set(region)
        self._matrices: dict[ir.Value, ir.Value] = {}
        self._constants: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}

    def run(self) -> None:
        """Rewrite."""
        gemms = {add: mul for mul, add in self._plan.biased.items() if {mul, add} <= self._inside}
        products = set(gemms.values())
        for node in self._region:
            if node in self._plan.reshapers:
                self._flatten_reshaper(node)
            elif node in gemms:
                self._make_gemm(gemms[node], node)
            elif node not in products:
                self._flatten_member(node)
        for node in self._region:
            for value in node.outputs:
                if value in self._matrices:
                    self._serve_readers(value)
        remove(self._region)
        self._surgery.rewrites += 1

    def _matrix(self, value: ir.Value) -> ir.Value:
        """Return what stands for `value` in the region, a new Reshape of it if it comes from outside."""
        if value not in self._matrices:
            producer = value.producer()
            origin = [node for node in (producer, self._region[0]) if node is not None][:1]
            new = self._reshape(value, value, self._flat_target(value), origin)
            self._insert_behind(producer, new)
            self._matrices[value] = new.outputs[0]
            self._bypass_equal_reshapers(value, new)
        return self._matrices[value]

    def _bypass_equal_reshapers(self, value: ir.Value, new: ir.Node) -> None:
        for use in list(value.uses()):
            node = use.node
            is_same = node in self._plan.reshapers and use.idx == 0 and len(self._plan.dims(node.outputs[0])) == 2
            if node is new or not is_same or node in self._inside or not self._plan.keeps_last_axis(node):
                continue
            if can_bypass(node.outputs[0], new.outputs[0]):
                self._surgery.context.stamp([new], [node])
                bypass(node.outputs[0], new.outputs[0])
                remove([node])

    def _insert_behind(self, producer: ir.Node | None, node: ir.Node) -> None:
        """Put `node` behind `producer`, or in front of everything."""
        if producer is None:
            self._plan.graph.insert_before(self._plan.graph[0], node)
            self._surgery.learn([node])
        else:
            self._surgery.insert(producer, [node])

    def _flat_target(self, value: ir.Value) -> list[int]:
        dims = self._plan.dims(value)
        rows = Product.of(*dims[:-1])
        assert isinstance(dims[-1], int), "asked only for what flattens"
        return [-1 if rows.names else rows.number, dims[-1]]

    def _reshape(self, source: ir.Value, named: ir.Value, target: Sequence[int], origin: Sequence[ir.Node]) -> ir.Node:
        name = self._surgery.name(f"{named.name or 'value'}_shape")
        shape = add_initializer(self._plan.graph, name, np.array(target, np.int64))
        return self._surgery.new("Reshape", [source, shape], origin)

    def _flatten_reshaper(self, node: ir.Node) -> None:
        source = node.inputs[0]
        assert source is not None, "a reshape has an input"
        if self._plan.keeps_last_axis(node):
            rank_two = len(self._plan.dims(source)) == 2
            self._matrices[node.outputs[0]] = source if rank_two else self._matrix(source)
            return
        read = self._matrices.get(source, source)
        new = self._reshape(read, node.outputs[0], self._flat_target(node.outputs[0]), [node])
        self._surgery.insert(node, [new])
        self._matrices[node.outputs[0]] = new.outputs[0]

    def _make_gemm(self, product: ir.Node, addition: ir.Node) -> None:
        source = product.inputs[0]
        assert source is not None, "a product has inputs"
        bias = next(value for value in addition.inputs if value is not product.outputs[0])
        inputs = [self._matrix(source), product.inputs[1], self._operand(addition, bias)]
        gemm = self._surgery.new("Gemm", inputs, [product, addition])
        self._surgery.insert(addition, [gemm])
        self._matrices[addition.outputs[0]] = gemm.outputs[0]

    def _flatten_member(self, node: ir.Node) -> None:
        inputs = [
            self._operand(node, value) if index == 0 or node.op_type in _ELEMENTWISE | {"Concat"} else value
            for index, value in enumerate(node.inputs)
        ]
        copy = self._surgery.copy(node, inputs)
        if "axis" in copy.attributes or node.op_type in ("Split", "Concat"):
            copy.attributes["axis"] = ir.AttrInt64("axis", -1)
        self._surgery.insert(node, [copy])
        self._matrices.update(zip(node.outputs, copy.outputs, strict=True))

    def _operand(self, node: ir.Node, value: ir.Value | None) -> ir.Value | None:
        if value is None or not self._plan.dims(value):
            return value
        if tensor_of(value) is not None:
            return self._constant(node, value)
        return self._matrix(value) if self._plan.flattens(value) else value

    def _constant(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return constant `value` as a row that broadcasts, or as a matrix."""
        dims = tuple(dim for dim in self._plan.dims(value) if isinstance(dim, int))
        rows = [dim for dim in self._plan.dims(node.outputs[0])[:-1] if isinstance(dim, int)]
        is_row = all(dim == 1 for dim in dims[:-1]) and node.op_type != "Concat"
        if len(dims) == 1 and is_row:
            return value
        shape = (dims[-1],) if is_row else (math.prod(rows), dims[-1])
        if (value, shape) not in self._constants:
            tensor = tensor_of(value)
            assert tensor is not None, "asked only for constants"
            array = tensor.numpy()
            array = array if is_row else np.broadcast_to(array, (*rows, dims[-1]))
            name = self._surgery.name(value.name or "constant")
            self._constants[value, shape] = add_initializer(self._plan.graph, name, array.reshape(shape))
        return self._constants[value, shape]

    def _serve_readers(self, value: ir.Value) -> None:
        """Give those who read `value` outside of the region the matrix, where it is what they can do with."""
        matrix, producer = self._matrices[value], value.producer()
        assert producer is not None, "asked only for what nodes of the region make"
        for use in list(value.uses()):
            node = use.node
            if node not in self._plan.reshapers or node in self._inside or use.idx != 0:
                continue
            result = node.outputs[0]
            same = len(self._plan.dims(result)) == 2 and self._plan.keeps_last_axis(node)
            if same and can_bypass(result, matrix):
                bypass(result, matrix)
            else:
                target = reshape_target(None, self._plan.dims(result))
                assert target is not None, "checked for all reshapers"
                new = self._reshape(matrix, result, target, [node])
                self._surgery.insert(node, [new])
                self._surgery.take_over(result, new.outputs[0])
                self._plan.reshapers.add(new)
            remove([node])
        outside = [use for use in value.uses() if use.node not in self._inside]
        if not outside and not value.is_graph_output():
            return
        target = reshape_target(None, self._plan.dims(value))
        assert target is not None, "restoring was part of the price"
        restored = self._reshape(matrix, value, target, [producer])
        self._insert_behind(matrix.producer(), restored)
        self._surgery.take_over(value, restored.outputs[0])
