"""How many floating-point operations a model takes, from inferred shapes, and which share of them runs in INT8."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optframe import graph
from optframe.ops import attach, inline_functions
from optframe.shapes import dtype_name, fold_shape_arithmetic, infer, inferred, static_shape
from optframe.types import OpSpec

CALL_KEY = "optframe.call"
"""Metadata key, on a copy of the model only: the call that an inlined node came from."""

EIGHT_BIT = (ir.DataType.INT8, ir.DataType.UINT8)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FlopReport:
    """FLOPs of one inference: two for each multiply-accumulate of convolutions, matrix products and recurrences.

    Elementwise ops, reductions and data movement count nothing: they take a small share, and memory bounds them.
    `by_op` and `by_node` leave out what takes none; what a call of a model-local function takes stands under the call.
    Of an If the dearer branch counts. `unknown` names the nodes that could not be counted, since an op, a shape
    or a number of iterations is not known: `total` is then a lower bound.
    """

    total: int
    by_op: Mapping[str, int]
    by_node: Mapping[str, int]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Int8Fractions:
    """Shares in 0..1 of all FLOPs, and of the convolutions' (None without any), that INT8 operands go into."""

    all: float
    convolutions: float | None


@dataclass(frozen=True)
class _Cost:
    """What one node takes; `multiplied` are its operands."""

    name: str
    op_type: str
    flops: int
    multiplied: tuple[ir.Value | None, ...] = ()


def count_flops(
    model: ir.Model,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    ops: Mapping[str, OpSpec] | None = None,
) -> FlopReport:
    """Return the FLOPs of `model`, for inputs of `input_shapes` where its own are dynamic.

    Calls of functions count what their bodies take; a call whose function was stripped, that of its spec in `ops`
    (by `domain::name`).

    Raises:
        InputError: `input_shapes` names an unknown input, or the model's functions cannot be inlined.
    """
    costs, unknown = _costs(model, input_shapes, ops or {})
    by_op: Counter[str] = Counter()
    by_node: Counter[str] = Counter()
    for cost in costs:
        by_op[cost.op_type] += cost.flops
        by_node[cost.name] += cost.flops
    return FlopReport(by_node.total(), dict(+by_op), dict(+by_node), unknown)


def int8_fractions(
    model: ir.Model,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    ops: Mapping[str, OpSpec] | None = None,
) -> Int8Fractions:
    """Return the shares of FLOPs whose operands are all 8-bit integers: read straight from a DequantizeLinear.

    Arguments and errors are those of `count_flops`. Weights alone in INT8 do not count.
    """
    costs, _ = _costs(model, input_shapes, ops or {})
    convolutions = [cost for cost in costs if "Conv" in cost.op_type]
    return Int8Fractions(_int8_share(costs) or 0.0, _int8_share(convolutions))


def _int8_share(costs: Sequence[_Cost]) -> float | None:
    total = sum(cost.flops for cost in costs)
    return sum(cost.flops for cost in costs if all(map(_is_int8, cost.multiplied))) / total if total else None


def _is_int8(operand: ir.Value | None) -> bool:
    if operand is None:
        return False
    if operand.dtype in EIGHT_BIT:
        return True
    producer = operand.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
        return False
    return producer.inputs[0].dtype in EIGHT_BIT


def _costs(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None, specs: Mapping[str, OpSpec]
) -> tuple[list[_Cost], tuple[str, ...]]:
    """Return what each node takes, and the names of those that could not be counted."""
    flat = _flat(model, input_shapes, specs)
    while True:
        counter = _Counter()
        costs = counter.costs(flat.graph)
        if not counter.unknown or not fold_shape_arithmetic(flat):
            return costs, tuple(dict.fromkeys(counter.unknown))
        infer(flat)


def _flat(model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None, specs: Mapping[str, OpSpec]) -> ir.Model:
    """Return a copy of `model` with shapes inferred and every call replaced by what it means."""
    copy = model.clone()
    for node in graph.all_nodes(copy):
        spec = specs.get(f"{node.domain}::{node.op_type}")
        if spec is not None and node.op_identifier() not in copy.functions:
            given = zip(spec.inputs, node.inputs, strict=False)
            node.overload = attach(copy, spec, {p.name: dtype_name(value) for p, value in given if value is not None})
        if node.op_identifier() in copy.functions:
            node.metadata_props[CALL_KEY] = _name(node)
    inline_functions(copy)
    return inferred(copy, input_shapes)


def _name(node: ir.Node) -> str:
    return node.metadata_props.get(CALL_KEY) or node.name or (node.outputs[0].name if node.outputs else None) or ""


class _Unknown(Exception):
    """An op, a shape or a number of iterations that the count needs is not known."""


class _Counter:
    """Walks a graph; `unknown` collects the names of nodes that could not be counted."""

    def __init__(self) -> None:
        self.unknown: list[str] = []

    def costs(self, nodes: Iterable[ir.Node]) -> list[_Cost]:
        return [cost for node in nodes for cost in self._node(node)]

    def _node(self, node: ir.Node) -> Iterator[_Cost]:
        try:
            if node.domain not in graph.ONNX_DOMAINS:
                raise _Unknown
            if node.op_type == "If":
                yield from self._branch(node)
            elif node.op_type in ("Loop", "Scan"):
                yield from self._loop(node)
            elif node.op_type in _RULES:
                yield self._product(node, _RULES[node.op_type])
        except _Unknown:
            self.unknown.append(_name(node))

    def _product(self, node: ir.Node, rule: _Rule) -> _Cost:
        operands = range(len(node.inputs)) if rule.operands is None else rule.operands
        shapes = [_shape(node, index) for index in operands]
        flops = 2 * rule.macs(node, shapes, _output_shape(node))
        return _Cost(_name(node), node.op_type, flops, tuple(node.inputs[index] for index in operands))

    def _branch(self, node: ir.Node) -> list[_Cost]:
        branches = [self.costs(node.attributes[name].as_graph()) for name in ("then_branch", "else_branch")]
        return max(branches, key=lambda costs: sum(cost.flops for cost in costs))

    def _loop(self, node: ir.Node) -> Iterator[_Cost]:
        body = self.costs(node.attributes["body"].as_graph())
        if not body:
            return
        iterations = _iterations(node)
        for cost in body:
            yield _Cost(cost.name, cost.op_type, cost.flops * iterations, cost.multiplied)


def _iterations(node: ir.Node) -> int:
    """Return how often a Loop (its trip count: a condition may end it earlier) or a Scan runs."""
    if node.op_type == "Loop":
        trips = graph.constant(node.inputs[0])
        if trips is None:
            raise _Unknown
        return int(trips.item())
    scanned = node.attributes["num_scan_inputs"].as_int()
    axes = node.attributes.get("scan_input_axes")
    first = len(node.inputs) - scanned
    return _shape(node, first)[axes.as_ints()[0] if axes else 0]


def _shape(node: ir.Node, index: int) -> Shape:
    shape = static_shape(node.inputs[index]) if index < len(node.inputs) else None
    if shape is None:
        raise _Unknown
    return shape


def _output_shape(node: ir.Node) -> Shape:
    shape = static_shape(node.outputs[0])
    if shape is None:
        raise _Unknown
    return shape


@dataclass(frozen=True)
class _Rule:
    """How many multiply-accumulates an op takes, from its node, the shapes of its `operands` and its output's.

    `operands` are the indices of the inputs that are multiplied; None means all.
    """

    macs: Callable[[ir.Node, Sequence[Shape], Shape], int]
    operands: tuple[int, ...] | None = (0, 1)


def _conv(node: ir.Node, shapes: Sequence[Shape], output: Shape) -> int:
    return math.prod(output) * math.prod(shapes[1][1:])


def _conv_transpose(node: ir.Node, shapes: Sequence[Shape], output: Shape) -> int:
    return math.prod(shapes[0]) * math.prod(shapes[1][1:])


def _matmul(node: ir.Node, shapes: Sequence[Shape], output: Shape) -> int:
    return math.prod(output) * shapes[0][-1]


def _gemm(node: ir.Node, shapes: Sequence[Shape], output: Shape) -> int:
    transposed = node.attributes.get("transA")
    return math.prod(output) * shapes[0][0 if transposed is not None and transposed.as_int() else 1]


def _recurrent(node: ir.Node, shapes: Sequence[Shape], output: Shape) -> int:
    """Each step multiplies the input by W (directions, gates * hidden, input), the state by R."""
    x, w, r = shapes
    return x[0] * x[1] * (math.prod(w) + math.prod(r))


def _attention(node: ir.Node, shapes: Sequence[Shape], output: Shape) -> int:
    """Q (.., L, D) by K (.., S, D), then the weights by V: L * S * D of either, heads in an axis or side by side."""
    query, key, _ = shapes
    past = node.inputs[4] if len(node.inputs) > 4 else None
    keys = key[-2] + (_shape(node, 4)[-2] if past is not None else 0)
    return keys * (math.prod(query) + math.prod(output))


def _einsum(node: ir.Node, shapes: Sequence[Shape], output: Shape) -> int:
    """Contracted at once: one multiplication of each operand but the first for every combination of indices."""
    terms = node.attributes["equation"].as_string().replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for label, size in zip(_labels(term, len(shape)), shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return (len(terms) - 1) * math.prod(sizes.values())


def _labels(term: str, rank: int) -> list[str]:
    """Return a label for each dimension; an ellipsis stands for numbered ones, counted from the right."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"...{i}" for i in range(hidden, 0, -1)), *after]


_RULES: Mapping[str, _Rule] = {
    "Conv": _Rule(_conv),
    "ConvInteger": _Rule(_conv),
    "QLinearConv": _Rule(_conv, (0, 3)),
    "ConvTranspose": _Rule(_conv_transpose),
    "MatMul": _Rule(_matmul),
    "MatMulInteger": _Rule(_matmul),
    "QLinearMatMul": _Rule(_matmul, (0, 3)),
    "Gemm": _Rule(_gemm),
    "Einsum": _Rule(_einsum, None),
    "LSTM": _Rule(_recurrent, (0, 1, 2)),
    "GRU": _Rule(_recurrent, (0, 1, 2)),
    "RNN": _Rule(_recurrent, (0, 1, 2)),
    "Attention": _Rule(_attention, (0, 1, 2)),
}
