"""The pass `move-transposes`: regions of a graph work on permuted tensors where that takes fewer Transposes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import of_rank, permutation
from optframe_passes.edit import add_initializer, bypass, can_bypass, graph_of, is_onnx, remove
from optframe_passes.min_cut import NEVER, MinCut
from optframe_passes.permute_ops import Order, Permuted, accepts, elements, inverse, permuted
from optframe_passes.surgery import Surgery

_NODE = 1 << 14
"""What a Transpose costs beside moving elements: as much as moving four times as many: about a launch."""

_MOST_ROUNDS = 4


@dataclass(frozen=True)
class MoveTransposes(GraphPass):
    """Move Transposes through other ops, so that they meet and cancel each other, or become one of several.

    Elementwise ops, Concat, Split, Slice, Pad, Tile, Gather of several entries, Softmax, reductions that keep their
    axes, products of stacked matrices, and LayerNormalization and products by a matrix along the last axis do not care
    in which order the (other) axes are: they work on permuted tensors with another `axis`, and constants are permuted
    once. A reduction that leaves the axes it does not remove in their order undoes a Transpose. For each order that a
    Transpose of the graph makes, which nodes should work in that order is decided for the whole graph at once, as a
    minimum cut: fewest Transposes, then those of the smallest tensors. A region moves only if it gets fewer.

    That is what exports of TensorFlow need, whose tensors have their channels last, around convolutions that want them
    second; and graphs whose parts were transposed one by one before they are joined.

    Example:
        before: `y = Transpose(Add(Transpose(a, perm=[0, 2, 3, 1]), bias), perm=[0, 3, 1, 2])`, bias (8)
        after:  `y = Add(a, bias)`, bias (1, 8, 1, 1)
    """

    name: ClassVar[str] = "move-transposes"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Move in place."""
        surgery = Surgery(model, context)
        graphs = dict.fromkeys(graph_of(node) for node in surgery.nodes() if is_onnx(node, "Transpose"))
        for graph in graphs if surgery.opset >= 13 else ():
            for _ in range(_MOST_ROUNDS):
                rewrites = surgery.rewrites
                for order in _orders(surgery, graph):
                    _rewrite(surgery, graph, order)
                if surgery.rewrites == rewrites:
                    break
        return surgery.result


def _orders(surgery: Surgery, graph: ir.Graph) -> list[Order]:
    """Return the permutations that Transposes make or undo, the most common ones first."""
    found: Counter[Order] = Counter()
    for node in graph:
        rank = surgery.rank(node.inputs[0]) if is_onnx(node, "Transpose") else None
        order = tuple(permutation(node, rank or 0))
        if rank and sorted(order) == list(range(rank)):
            found[order] += 1
            found[inverse(order)] += 0
    ranked = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
    return [order for order, _ in ranked if list(order) != sorted(order)]


def _rewrite(surgery: Surgery, graph: ir.Graph, order: Order) -> None:
    """Let the nodes work in `order` that save most."""
    plan = _Plan(surgery, graph, order)
    for node in list(graph):
        if plan.reverses(node):
            _undo(plan, node)
    for region in plan.regions():
        if plan.saves(region) and surgery.context.allow(region[0]):
            _Region(plan, region).run()


def _undo(plan: _Plan, node: ir.Node) -> None:
    """Let the readers of a Transpose read what it reads, if none of them needs it."""
    value, readers = node.outputs[0], list[tuple[ir.Node, Permuted]]()
    for reader, index in value.uses():
        how = plan.accepts(reader, index)
        if how is None:
            return
        readers.append((reader, how))
    if not readers or value.is_graph_output() or not plan.surgery.context.allow(node):
        return
    for reader, how in readers:
        plan.surgery.replace([reader], [_adapted(plan.surgery, reader, [node.inputs[0], *reader.inputs[1:]], how)])
    remove([node])


def _adapted(surgery: Surgery, node: ir.Node, inputs: Sequence[ir.Value | None], how: Permuted) -> ir.Node:
    """Return a copy of `node` that reads `inputs` and is changed as `how` says."""
    length = max(len(inputs), *(index + 1 for index in how.inputs), 0)
    changed = [*inputs, *[None] * (length - len(inputs))]
    for index, array in how.inputs.items():
        changed[index] = surgery.initializer(node, f"{node.outputs[0].name or 'value'}_{node.op_type}_{index}", array)
    copy = surgery.copy(node, changed)
    for name, content in how.attributes.items():
        attribute = ir.AttrInt64(name, content) if isinstance(content, int) else ir.AttrInt64s(name, content)
        copy.attributes[name] = attribute
    return copy


class _Plan:
    """Which nodes of a graph could work on tensors with their axes in `order`, and which should."""

    def __init__(self, surgery: Surgery, graph: ir.Graph, order: Order) -> None:
        self.surgery = surgery
        self.graph = graph
        self.order = order
        self.back = inverse(order)
        self.members: dict[ir.Node, Permuted] = {}
        self._rejected: set[ir.Node] = set()
        self._reached: set[ir.Node] = set()
        self._values: dict[ir.Value, None] = {}
        self._explore()

    def makes(self, node: ir.Node | None) -> bool:
        """Return whether `node` is a Transpose into `order`."""
        return node is not None and self._transposes(node, self.order)

    def reverses(self, node: ir.Node | None) -> bool:
        """Return whether `node` is a Transpose out of `order`."""
        return node is not None and self._transposes(node, self.back)

    def undoes(self, node: ir.Node | None) -> bool:
        """Return whether what `node` makes can be had in `order` for nothing: it is what that Transpose reads.

        Where the order undoes itself, a Transpose behind a member counts as one into the order, not as both.
        """
        if node is None or not self.reverses(node) or node.inputs[0] is None:
            return False
        producer = node.inputs[0].producer()
        return self.order != self.back or producer is None or not self._is_member(producer)

    def takes_permuted(self, node: ir.Node) -> bool:
        """Return whether a reader wants what it reads in `order`: the one Transpose that makes it.

        One that makes a graph output does so only if no other does: two outputs have to be two values.
        """
        if not self.makes(node) or node.graph is not self.graph or node.inputs[0] is None or self.undoes(node):
            return False
        value = node.outputs[0]
        if not value.is_graph_output():
            return True
        others = [other.node for other in node.inputs[0].uses() if self.makes(other.node)]
        first = next(other for other in others if other.outputs[0].is_graph_output())
        return first is node and not self.undoes(node.inputs[0].producer())

    def accepts(self, node: ir.Node, index: int) -> Permuted | None:
        """Return how a reader takes what it reads in `order` as well as it is, None if it does not."""
        inside = index == 0 and node.graph is self.graph
        return accepts(self.surgery, node, self.order) if inside else None

    def reads_permuted(self, node: ir.Node, index: int) -> bool:
        """Return whether a reader is a member that reads this input in `order`."""
        return node in self.members and index in self.members[node].data and self.is_data(node.inputs[index])

    def is_data(self, value: ir.Value | None) -> bool:
        """Return whether `value` is a tensor whose axes `order` permutes, and no constant."""
        return value is not None and self.surgery.rank(value) == len(self.order) and not self._is_constant(value)

    def regions(self) -> list[list[ir.Node]]:
        """Return the nodes that should work in `order`: connected ones together, in topological order."""
        chosen = {node for node in self._cut().chosen() if isinstance(node, ir.Node)} if self._values else set()
        regions: list[list[ir.Node]] = []
        seen: set[ir.Node] = set()
        for start in (node for node in self.graph if node in chosen):
            if start in seen:
                continue
            found, stack = {start}, [start]
            while stack:
                near = set(self._neighbours(stack.pop())) & chosen - found
                found |= near
                stack += near
            seen |= found
            regions.append([node for node in self.graph if node in found] if len(found) > 1 else [start])
        return regions

    def saves(self, region: Sequence[ir.Node]) -> bool:
        """Return whether there are fewer Transposes if `region` works in `order`."""
        inside = set(region)
        values = dict.fromkeys(value for node in region for value in (*node.inputs, *node.outputs))
        data = [value for value in values if value is not None and self.is_data(value)]
        return sum(self._count(value, inside) for value in data) < sum(self._count(value, set()) for value in data)

    def _count(self, value: ir.Value, inside: set[ir.Node]) -> int:
        """Return how many Transposes stand behind `value` if the nodes `inside` work in `order`."""
        producer = value.producer()
        as_it_is, as_permuted = value.is_graph_output(), False
        for node, index in value.uses():
            takes = self.takes_permuted(node)
            member = node in inside and self.reads_permuted(node, index)
            as_permuted |= takes or member
            as_it_is |= not takes and not member and self.accepts(node, index) is None
        if producer in inside or self.undoes(producer):
            return int(as_it_is)
        return int(as_permuted)

    def _transposes(self, node: ir.Node, order: Order) -> bool:
        if not is_onnx(node, "Transpose") or self.surgery.rank(node.inputs[0]) != len(order):
            return False
        return tuple(permutation(node, len(order))) == order

    def _is_constant(self, value: ir.Value) -> bool:
        return self.surgery.any_tensor(value) is not None

    def _is_member(self, node: ir.Node) -> bool:
        if node in self.members or node in self._rejected:
            return node in self.members
        found = permuted(self.surgery, node, self.order) if node.graph is self.graph else None
        if found is not None and any(self.is_data(node.inputs[index]) for index in found.data):
            self.members[node] = found
            return True
        self._rejected.add(node)
        return False

    def _neighbours(self, node: ir.Node) -> Iterator[ir.Node]:
        """Yield the members that read or make what the member `node` makes or reads."""
        for value in (*(node.inputs[index] for index in self.members[node].data), *node.outputs):
            if value is None or not self.is_data(value):
                continue
            producer = value.producer()
            if producer is not None and self._is_member(producer):
                yield producer
            for reader, index in value.uses():
                if self._is_member(reader) and self.reads_permuted(reader, index):
                    yield reader

    def _explore(self) -> None:
        """Find the members around Transposes, in groups that hold two ends where one could go."""
        for node in self.graph:
            near: list[ir.Node] = []
            if self.makes(node):
                producer = node.inputs[0].producer() if node.inputs[0] is not None else None
                near += [producer] if producer is not None and self._is_member(producer) else []
            if self.undoes(node):
                near += [use.node for use in node.outputs[0].uses() if self._is_member(use.node)]
            for start in near:
                if start not in self._reached:
                    self._add_group(start)

    def _add_group(self, start: ir.Node) -> None:
        group, stack = {start: None}, [start]
        while stack:
            for near in self._neighbours(stack.pop()):
                if near not in group:
                    group[near] = None
                    stack.append(near)
        self._reached.update(group)
        values = dict.fromkeys(
            value
            for node in group
            for value in (*(node.inputs[index] for index in self.members[node].data), *node.outputs)
            if value is not None and self.is_data(value)
        )
        ends = sum(self.undoes(value.producer()) for value in values)
        uses = [use for value in values for use in value.uses()]
        ends += sum(self.takes_permuted(node) or self.accepts(node, index) is not None for node, index in uses)
        if ends > 1:
            self._values.update(values)

    def _cut(self) -> MinCut:
        cut = MinCut()
        for value in self._values:
            self._price(cut, value)
        return cut

    def _price(self, cut: MinCut, value: ir.Value) -> None:
        """One Transpose where `value` is made in one order and read in the other."""
        cost = _NODE + min(elements(self.surgery.known.dims(value)) >> 2, NEVER >> 8)
        producer = value.producer()
        as_permuted, as_it_is = ("permuted", value), ("as it is", value)
        if producer in self.members:
            cut.if_without(as_permuted, producer, cost)
            cut.if_without(producer, as_it_is, cost)
        elif self.undoes(producer):
            cut.unless_chosen(as_it_is, cost)
        else:
            cut.if_chosen(as_permuted, cost)
        if value.is_graph_output():
            cut.if_chosen(as_it_is, NEVER)
        for node, index in value.uses():
            if self.takes_permuted(node):
                cut.unless_chosen(as_permuted, NEVER)
            elif self.reads_permuted(node, index):
                cut.if_without(node, as_permuted)
                cut.if_without(as_it_is, node)
            elif self.accepts(node, index) is None:
                cut.if_chosen(as_it_is, NEVER)


class _Region:
    """Nodes that begin to work in another order; `permuted` holds what stands for a value there."""

    def __init__(self, plan: _Plan, nodes: Sequence[ir.Node]) -> None:
        self._plan = plan
        self._surgery = plan.surgery
        self._nodes = nodes
        self._inside = set(nodes)
        self._permuted: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        """Rewrite."""
        for node in self._nodes:
            self._permute(node)
        for value in [value for node in self._nodes for value in node.outputs]:
            if value in self._permuted:
                self._serve_readers(value)
        read = [value.producer() for node in self._nodes for value in node.inputs if value is not None]
        remove(self._nodes)
        remove(dict.fromkeys(node for node in read if node is not None and self._is_idle(node)))
        self._surgery.rewrites += 1

    def _is_idle(self, node: ir.Node) -> bool:
        """Return whether `node` is a Transpose whose result nothing reads any more."""
        value, inside = node.outputs[0], node.graph is self._plan.graph
        return inside and self._plan.reverses(node) and not value.uses() and not value.is_graph_output()

    def _permute(self, node: ir.Node) -> None:
        how = self._plan.members[node]
        inputs: list[ir.Value | None] = []
        for index in range(len(node.inputs)):  # the operand before may have changed what the node reads
            value = node.inputs[index]
            inputs.append(self._operand(value) if index in how.data else value)
        copy = _adapted(self._surgery, node, inputs[::-1] if how.swapped else inputs, how)
        self._surgery.insert(node, [copy])
        self._permuted.update(zip(node.outputs, copy.outputs, strict=True))

    def _operand(self, value: ir.Value | None) -> ir.Value | None:
        """Return what stands for `value`: scalars for themselves, other constants permuted."""
        if value is None or self._surgery.rank(value) == 0:
            return value
        return self._outside(value) if self._plan.is_data(value) else self._constant(value)

    def _constant(self, value: ir.Value) -> ir.Value:
        if value not in self._permuted:
            tensor = self._surgery.any_tensor(value)
            assert tensor is not None, "asked only for constants"
            array = of_rank(tensor.numpy(), len(self._plan.order)).transpose(self._plan.order)
            self._permuted[value] = add_initializer(self._plan.graph, self._surgery.name(value.name or "c"), array)
        return self._permuted[value]

    def _outside(self, value: ir.Value) -> ir.Value:
        """Return what stands for `value`, a new Transpose of it if there is none."""
        if value not in self._permuted:
            producer = value.producer()
            if self._plan.undoes(producer) and producer is not None and producer.inputs[0] is not None:
                self._permuted[value] = producer.inputs[0]
            else:
                self._permuted[value] = self._transposed(value)
        return self._permuted[value]

    def _transposed(self, value: ir.Value) -> ir.Value:
        """Return the result of the first Transpose that permutes `value`, of a new one if there is none."""
        takers = [node for node, _ in value.uses() if self._plan.takes_permuted(node)]
        if not takers:
            new = self._surgery.new("Transpose", [value], self._nodes[:1], {"perm": self._plan.order})
            self._put_behind(value.producer(), new)
            self._surgery.learn([new])
            return new.outputs[0]
        first = takers[0]
        self._plan.graph.remove(first)
        self._put_behind(value.producer(), first)
        for taker in takers[1:]:
            self._hand_over(taker, first.outputs[0])
        return first.outputs[0]

    def _put_behind(self, producer: ir.Node | None, node: ir.Node) -> None:
        """Put `node` behind `producer`, or in front of everything."""
        if producer is None or producer.graph is not self._plan.graph:
            self._plan.graph.insert_before(self._plan.graph[0], node)
        else:
            self._plan.graph.insert_after(producer, node)

    def _hand_over(self, taker: ir.Node, value: ir.Value) -> None:
        """Let `value` take the place of what the Transpose `taker` makes, unless both are graph outputs."""
        if can_bypass(taker.outputs[0], value):
            bypass(taker.outputs[0], value)
            remove([taker])

    def _serve_readers(self, value: ir.Value) -> None:
        """Give those who read `value` outside of the region what they want: permuted, or as it was."""
        stored, producer = self._permuted[value], value.producer()
        for node, index in list(value.uses()):
            how = self._plan.accepts(node, index)
            if node in self._inside:
                continue
            if self._plan.takes_permuted(node):
                self._hand_over(node, stored)
            elif how is not None:
                reader = _adapted(self._surgery, node, [stored, *node.inputs[1:]], how)
                self._surgery.replace([node], [reader])
        outside = [use for use in value.uses() if use.node not in self._inside]
        if outside or value.is_graph_output():
            origin = [producer] if producer is not None else self._nodes[:1]
            restored = self._surgery.new("Transpose", [stored], origin, {"perm": self._plan.back})
            self._put_behind(stored.producer(), restored)
            self._surgery.learn([restored])
            self._surgery.take_over(value, restored.outputs[0])
