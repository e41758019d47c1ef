"""Where INT8 goes: which products take 8-bit operands, which tensors are quantised for them, which share a scale.

The rules are those that TensorRT fuses best (NVIDIA, "TensorRT Developer Guide", "Working with Quantized Types", Q/DQ
placement), and none asks for names or for a certain model:

- Convolutions with constant weights, and matrix products of an activation with constant weights.
- Not the projections of an attention (next to a product of two activations or a softmax), which runtimes fuse into one
  16-bit kernel; nor heads: products that no other follows, and small linear layers that lead to nothing but them.
- Nor the smallest linear layers, which would gain next to nothing, and err as much as large ones.
- Not what is computed from constants or from sines (positions), of which attention needs every bit.
- Every activation operand is quantised right before its product, so never around a normalisation or a softmax.
- Where a product's result and a shortcut are added, and the sum is quantised later on, the shortcut is quantised too.
- What goes through a MaxPool or a Concat into a quantised tensor is quantised before it too, all with one scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import onnx_ir as ir

from optframe.errors import unknown_name
from optframe.flops import FlopReport, count_flops
from optframe.precision.nodes import LAYOUT_OPS, Keep, agree, is_constant, is_standard, keeps
from optframe.shapes import static_shape

Scope = Literal["default", "linear", "all"]
"""Which products run in INT8: by the rules above; attention projections and heads too ("linear"); products of two
activations besides ("all")."""

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = (*CONVOLUTIONS, "MatMul", "Gemm")
ATTENTION_OPS = ("Softmax", "LogSoftmax", "Attention")
AFFINE_OPS = ("Add", "Sub", "Mul", "Div")
POSITION_OPS = ("Sin", "Cos", "Shape", "Size")
GRAPH_ATTRIBUTES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
CARRIER_OPS = LAYOUT_OPS | frozenset(["Split", "Slice", "Gather", "ReduceMean", "ReduceSum"])
"""Ops between a projection and its attention."""

ACTIVATION_OPS = frozenset(
    [
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Clip",
        "Elu",
        "Selu",
        "Celu",
        "Gelu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Swish",
        "Mish",
        "Tanh",
        "Softplus",
    ]
)

SMALL_SHARE = 0.01
"""Linear layers below this share of a model's FLOPs may be part of a head."""

NEGLIGIBLE_SHARE = 0.02
"""Linear layers that together have no more than this share of a model's FLOPs gain no time worth their error."""


class Read(NamedTuple):
    """An input of a node: what reads a quantised tensor."""

    node: ir.Node
    slot: int

    @property
    def value(self) -> ir.Value:
        """The tensor that is read."""
        value = self.node.inputs[self.slot]
        assert value is not None, "reads are of inputs that are there"
        return value


@dataclass(frozen=True)
class Placement:
    """`products` run in INT8; `reads` are all inputs to quantise.

    `sources` holds for each tensor read the tensor that has the same elements in another layout, and is measured;
    `groups` for each source those with which it shares a scale, itself included.
    """

    products: tuple[ir.Node, ...]
    reads: tuple[Read, ...]
    sources: Mapping[ir.Value, ir.Value]
    groups: Mapping[ir.Value, frozenset[ir.Value]]


def place(
    model: ir.Model,
    scope: Scope = "default",
    keep: Keep = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Placement:
    """Return where INT8 goes in the main graph of `model`, whose types are inferred; `keep` nodes stay as they are.

    Raises:
        InputError: there is no such scope.
    """
    if scope not in get_args(Scope):
        raise unknown_name("scope", scope, get_args(Scope))
    products = _products(model, scope, input_shapes)
    products = [node for node in products if not keeps(keep, node)]
    reads = _Reads([Read(node, index) for node in products for index in activation_indices(node)])
    reads.add_shortcuts(model.graph, set(products))
    reads.add_passed_on(model.graph)
    return Placement(tuple(products), tuple(reads), reads.sources(), reads.groups())


def weight_index(node: ir.Node) -> int | None:
    """Return which input of a product is its constant weight; None for a product of two activations."""
    return next((index for index in (1, 0) if is_constant(node.inputs[index])), None)


def activation_indices(node: ir.Node) -> list[int]:
    """Return which inputs of a product are activations."""
    return [index for index in (0, 1) if not is_constant(node.inputs[index])]


def _activations(node: ir.Node) -> list[ir.Value]:
    return [Read(node, index).value for index in activation_indices(node)]


def _products(model: ir.Model, scope: Scope, input_shapes: Mapping[str, Sequence[int]] | None) -> list[ir.Node]:
    positions = _positions(model.graph)
    candidates = [node for node in model.graph if _is_product(node) and positions.isdisjoint(_activations(node))]
    if scope != "all":
        candidates = [node for node in candidates if len(activation_indices(node)) == 1]
    if scope != "default":
        return candidates
    flops = count_flops(model, input_shapes=input_shapes)
    heads = _heads(model, candidates, flops)
    attention = _Attention(model)
    candidates = [node for node in candidates if node not in heads and not attention.adjoins(node)]
    negligible = _negligible(candidates, flops)
    return [node for node in candidates if node not in negligible]


def _negligible(products: Sequence[ir.Node], flops: FlopReport) -> set[ir.Node]:
    """Return the smallest linear layers, as far as all of them together are; those of one size stay together."""
    linear = [node for node in products if node.op_type not in CONVOLUTIONS and node.name in flops.by_node]
    sizes: defaultdict[int, list[ir.Node]] = defaultdict(list)
    for node in linear:
        sizes[flops.by_node[node.name or ""]].append(node)
    found: set[ir.Node] = set()
    left = NEGLIGIBLE_SHARE * flops.total
    for size, nodes in sorted(sizes.items()):
        left -= size * len(nodes)
        if left < 0:
            break
        found.update(nodes)
    return found


def _is_product(node: ir.Node) -> bool:
    """Return whether the node multiplies float matrices, at least one of them an activation."""
    if not is_standard(node) or node.op_type not in PRODUCTS or not activation_indices(node):
        return False
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in node.inputs[:2]):
        return False
    weight = weight_index(node)
    if node.op_type in CONVOLUTIONS:
        return weight == 1
    return weight is None or len(static_shape(node.inputs[weight]) or ()) >= 2


def _positions(main: ir.Graph) -> set[ir.Value]:
    """Return the computed tensors that depend on the inputs not at all, or through shapes, sines and cosines alone."""
    positions: set[ir.Value] = set()
    for node in main:
        given = (value is None or is_constant(value) or value in positions for value in node.inputs)
        source = is_standard(node) and node.op_type in POSITION_OPS
        if source or (all(given) and not any(a.type in GRAPH_ATTRIBUTES for a in node.attributes.values())):
            positions.update(node.outputs)
    return positions


class _Attention:
    """Tells which products are projections of an attention."""

    def __init__(self, model: ir.Model) -> None:
        self._calls = {
            key
            for key, function in model.functions.items()
            if any(inner.op_type in ATTENTION_OPS for inner in function.all_nodes())
        }

    def adjoins(self, node: ir.Node) -> bool:
        """Return whether `node` is a linear layer before or after an attention."""
        if node.op_type in CONVOLUTIONS:
            return False
        behind = _reached(node.outputs, _consumers, _carries)
        before = _reached(_activations(node), _producers, _carries)
        return any(map(self._is_attention, (*behind, *before)))

    def _is_attention(self, node: ir.Node) -> bool:
        if node.op_identifier() in self._calls:
            return True
        if not is_standard(node):
            return False
        product = node.op_type in ("MatMul", "Einsum") and sum(not is_constant(value) for value in node.inputs) > 1
        return product or node.op_type in ATTENTION_OPS


def _carries(node: ir.Node) -> bool:
    """Return whether `node` changes layout, averages, or adds or multiplies constants only."""
    if not is_standard(node):
        return False
    affine = node.op_type in AFFINE_OPS and sum(not is_constant(value) for value in node.inputs) == 1
    return affine or node.op_type in CARRIER_OPS


def _consumers(value: ir.Value) -> Iterable[ir.Node]:
    return value.consumers()


def _producers(value: ir.Value) -> Iterable[ir.Node]:
    producer = value.producer()
    return [] if producer is None else [producer]


def _reached(
    values: Iterable[ir.Value], step: Callable[[ir.Value], Iterable[ir.Node]], passes: Callable[[ir.Node], bool]
) -> Iterator[ir.Node]:
    """Yield the nodes at which the ways from `values`, forward or back, end: the first that `passes` refuses."""
    forward = step is _consumers
    seen: set[ir.Node] = set()
    pending = list(values)
    while pending:
        for node in step(pending.pop()):
            if node in seen:
                continue
            seen.add(node)
            if passes(node):
                pending += node.outputs if forward else [value for value in node.inputs if value is not None]
            else:
                yield node


def _heads(model: ir.Model, products: Sequence[ir.Node], flops: FlopReport) -> set[ir.Node]:
    """Return the products that no other follows, and the small linear layers that lead to nothing but such."""
    heads = {node for node, followed in _followed(model.graph, products).items() if not followed}
    for node in reversed(products):
        small = flops.by_node.get(node.name or "", flops.total) < SMALL_SHARE * flops.total
        if node.op_type in CONVOLUTIONS or not small:
            continue
        ends = list(_reached(node.outputs, _consumers, _leads_on))
        if ends and heads.issuperset(ends):
            heads.add(node)
    return heads


def _leads_on(node: ir.Node) -> bool:
    return _carries(node) or (is_standard(node) and node.op_type in ACTIVATION_OPS)


def _followed(graph: ir.Graph, products: Sequence[ir.Node]) -> dict[ir.Node, bool]:
    """Return for each product whether another one comes after it."""
    before_product: dict[ir.Node, bool] = {}
    wanted = set(products)
    for node in reversed(graph):
        followers = [follower for value in node.outputs for follower in value.consumers()]
        before_product[node] = any(f in wanted or before_product.get(f, False) for f in followers)
    return {node: before_product[node] for node in products}


@dataclass
class _Reads:
    """The growing list of reads, with the tensors that they read, and which of those must share a scale."""

    items: list[Read]
    values: set[ir.Value] = field(init=False)
    ties: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = {read.value for read in self.items}

    def __iter__(self) -> Iterator[Read]:
        return iter(self.items)

    def _append(self, read: Read) -> None:
        if read not in self.items:
            self.items.append(read)
            self.values.add(read.value)

    def add_shortcuts(self, graph: ir.Graph, products: set[ir.Node]) -> None:
        """Quantise the shortcut where it is added to a product's result and a quantised tensor comes of the sum."""
        for node in reversed(graph):
            side = _shortcut(node, products)
            if side is not None and any(value in self.values for value in _activated(node.outputs[0])):
                self._append(Read(node, side))

    def add_passed_on(self, graph: ir.Graph) -> None:
        """Quantise what MaxPool and Concat take, with the same scale, where all that they give is quantised."""
        for node in reversed(graph):
            if _passes_on(node) and all(Read(use.node, use.idx) in self.items for use in node.outputs[0].uses()):
                for index in range(1 if node.op_type == "MaxPool" else len(node.inputs)):
                    read = Read(node, index)
                    self._append(read)
                    self.ties.append((source(node.outputs[0]), source(read.value)))

    def sources(self) -> dict[ir.Value, ir.Value]:
        return {read.value: source(read.value) for read in self.items}

    def groups(self) -> dict[ir.Value, frozenset[ir.Value]]:
        groups = {value: frozenset([value]) for value in self.sources().values()}
        for first, second in self.ties:
            merged = groups[first] | groups[second]
            groups.update(dict.fromkeys(merged, merged))
        return groups


def _shortcut(node: ir.Node, products: set[ir.Node]) -> int | None:
    """Return which input of an Add is the shortcut: the other comes from a product that nothing else uses."""
    if not is_standard(node) or node.op_type != "Add" or any(map(is_constant, node.inputs)):
        return None
    shapes = [None if value is None else value.shape for value in node.inputs]
    fused = [index for index, value in enumerate(node.inputs) if _is_only_use(value) and _producer(value) in products]
    return 1 - fused[0] if fused and agree(*shapes) else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _is_only_use(value: ir.Value | None) -> bool:
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _activated(value: ir.Value) -> Iterator[ir.Value]:
    """Yield `value` and what activation functions make of it."""
    yield value
    for node in value.consumers():
        if is_standard(node) and node.op_type in ACTIVATION_OPS:
            yield from _activated(node.outputs[0])


def _passes_on(node: ir.Node) -> bool:
    """Return whether all results of `node` are elements of its inputs, none of them constant, and inside the graph."""
    if not is_standard(node) or node.op_type not in ("MaxPool", "Concat") or any(map(is_constant, node.inputs)):
        return False
    return bool(node.outputs[0].uses()) and not any(
        value.is_graph_output() or (index and value.uses()) for index, value in enumerate(node.outputs)
    )


def source(value: ir.Value) -> ir.Value:
    """Return the tensor that `value` is another layout of, or `value` itself."""
    node = value.producer()
    while node is not None and is_standard(node) and node.op_type in LAYOUT_OPS and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value
