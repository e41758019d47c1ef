"""The pass `forward-concat`: what is taken from a Concat is taken from the operand that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.graph import all_nodes
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import bypass, can_bypass, graph_of, ints_option, is_onnx, remove, small_constant
from optframe_passes.surgery import Surgery, only_reader, producer_of


@dataclass(frozen=True)
class ForwardConcat(GraphPass):
    """Let Gather, Slice and Split read the operand of a Concat that holds what they take.

    Slice with step 1 and Gather of constant indices, along the axis of the Concat, move to the operand; a Slice of all
    of it is the operand itself, one of several operands a Concat of those. A Concat of Concats is one. The parts of a
    Split that are operands of a Concat are those operands, and a Concat of all parts of a Split in order is what was
    split. A Split with one part in use is a Slice; a Slice that takes a part of a Split again is that part. Gather of
    the only entry of an axis that an Unsqueeze made undoes the Unsqueeze (`torch.stack(values)[-1]` is the last value).
    What other operands were computed from is free to go then. Sizes along the axis have to be known, others need not.

    Example:
        before: `y = Gather(Concat(Unsqueeze(a, [0]), Unsqueeze(b, [0]), axis=0), 1, axis=0)`
        after:  `y = b`
    """

    name: ClassVar[str] = "forward-concat"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Forward in place."""
        surgery = Surgery(model, context)
        before, told = -1, len(context.near_misses)
        while surgery.opset >= 13 and surgery.rewrites > before:  # a reader that goes may leave a Concat to one alone
            before = surgery.rewrites
            del context.near_misses[told:]
            self._sweep(surgery, model)
        return surgery.result

    def _sweep(self, surgery: Surgery, model: ir.Model) -> None:
        for node in list(all_nodes(model)):
            rule = _RULES.get(node.op_type) if is_onnx(node) else None
            current: ir.Node | None = node if node.op_identifier() not in model.functions else None
            while rule is not None and current is not None and current.graph is not None:
                current = rule(surgery, current)
                rule = None if current is None else _RULES.get(current.op_type)


Rule = Callable[[Surgery, ir.Node], ir.Node | None]
"""Rewrites a node and returns what took its place and may be rewritten again, None if nothing does."""


def _axis(surgery: Surgery, node: ir.Node, value: ir.Value | None, default: int = 0) -> int | None:
    """Return the attribute `axis` of `node`, counted from the front of `value`."""
    rank = surgery.rank(value)
    return None if not rank else node.attributes.get_int("axis", default) % rank


def _size(surgery: Surgery, value: ir.Value | None, axis: int) -> int | None:
    dims = surgery.known.dims(value)
    size = None if dims is None else dims[axis]
    return size if isinstance(size, int) else None


def _operand(surgery: Surgery, concat: ir.Node, axis: int, start: int, end: int) -> tuple[ir.Value, int] | None:
    """Return the operand that holds entries `start` to `end` along `axis`, and where it starts."""
    offset = 0
    for value in concat.inputs:
        size = _size(surgery, value, axis)
        if size is None or value is None:
            return None
        if offset <= start and end <= offset + size:
            return value, offset
        offset += size
    return None


def _bypass(surgery: Surgery, node: ir.Node, value: ir.Value) -> None:
    if not can_bypass(node.outputs[0], value):
        surgery.context.near_miss(node, "takes a whole operand, but makes a graph output out of it")
    elif surgery.context.allow(node):
        bypass(node.outputs[0], value)
        remove([node])
        surgery.rewrites += 1


def _forward_slice(surgery: Surgery, node: ir.Node) -> ir.Node | None:
    concat = producer_of(node.inputs[0], "Concat")
    if concat is None:
        _share_part(surgery, node)
        return None
    axis = _axis(surgery, concat, node.inputs[0])
    taken = None if axis is None else slice_range(surgery, node, axis)
    if axis is None or taken is None:
        return None
    found = _operand(surgery, concat, axis, *taken)
    if found is None and _take_operands(surgery, node, concat, axis, taken):
        return None
    if found is None:
        surgery.context.near_miss(node, "takes from more than one operand of a Concat, or sizes are not known")
        return None
    operand, offset = found
    if taken == (offset, offset + (_size(surgery, operand, axis) or 0)):
        _bypass(surgery, node, operand)
        return None
    if not surgery.context.allow(node):
        return None
    return _replace_by_slice(surgery, [node], operand, axis, taken[0] - offset, taken[1] - offset)


def _take_operands(surgery: Surgery, node: ir.Node, concat: ir.Node, axis: int, taken: tuple[int, int]) -> bool:
    """Let a Concat of several whole operands take the place of a Slice that alone reads a Concat of more."""
    sizes = [_size(surgery, value, axis) for value in concat.inputs]
    if None in sizes or only_reader(concat.outputs[0]) is not node:
        return False
    bounds = [0, *(int(bound) for bound in np.cumsum([size or 0 for size in sizes]))]
    if not set(taken) <= set(bounds) or not surgery.context.allow(node):
        return False
    operands = [value for value, start in zip(concat.inputs, bounds, strict=False) if taken[0] <= start < taken[1]]
    surgery.replace([concat, node], [surgery.new("Concat", operands, [concat, node], {"axis": axis})])
    return True


def _share_part(surgery: Surgery, node: ir.Node) -> None:
    """Let the part of a Split take the place of a Slice that takes the same from the same tensor."""
    readers = [] if node.inputs[0] is None else [use.node for use in node.inputs[0].uses() if use.idx == 0]
    for split in readers:
        axis = _axis(surgery, split, node.inputs[0]) if is_onnx(split, "Split") and split.graph is node.graph else None
        taken = None if axis is None else slice_range(surgery, node, axis)
        sizes = [] if axis is None or taken is None else [_size(surgery, value, axis) for value in split.outputs]
        moves = all(value is None or value.producer() is None for value in split.inputs[1:])
        if taken is None or None in sizes or not moves or node.outputs[0].is_graph_output():
            continue
        ends = np.cumsum([size or 0 for size in sizes])
        for value, size, end in zip(split.outputs, sizes, ends, strict=True):
            if taken == (end - (size or 0), end) and not value.is_graph_output() and surgery.context.allow(node):
                _move_before(split, node)
                bypass(node.outputs[0], value)
                remove([node])
                surgery.rewrites += 1
                return


def _move_before(split: ir.Node, node: ir.Node) -> None:
    """Put a Split, whose sizes are an initialiser, in front of another reader of the same tensor, if it is behind."""
    graph = graph_of(node)
    if next(each for each in graph if each in (split, node)) is node:
        graph.remove(split)
        graph.insert_before(node, split)


def slice_range(surgery: Surgery, node: ir.Node, axis: int) -> tuple[int, int] | None:
    """Return what a Slice of `axis` alone, with step 1, takes; None for other Slices and for empty ones."""
    starts, ends, steps = (ints_option(node, name, index) for name, index in (("", 1), ("", 2), ("", 4)))
    axes = ints_option(node, "", 3)
    rank, size = surgery.rank(node.inputs[0]), _size(surgery, node.inputs[0], axis)
    if not starts or not ends or axes is None or steps is None or len(starts) != 1 or rank is None or size is None:
        return None
    if (axes or (0,))[0] % rank != axis or (steps or (1,)) != (1,):
        return None
    start, end, _ = slice(starts[0], ends[0]).indices(size)
    return (start, end) if start < end else None


def _replace_by_slice(
    surgery: Surgery, old: Sequence[ir.Node], source: ir.Value, axis: int, start: int, end: int
) -> ir.Node:
    hint = f"{old[-1].outputs[0].name or 'value'}_slice"
    bounds = [surgery.initializer(old[-1], hint, np.array([number], np.int64)) for number in (start, end, axis)]
    new = surgery.new("Slice", [source, *bounds], old)
    surgery.replace(old, [new])
    return new


def _forward_gather(surgery: Surgery, node: ir.Node) -> ir.Node | None:
    axis, content = _axis(surgery, node, node.inputs[0]), small_constant(node.inputs[1])
    source = producer_of(node.inputs[0], "Concat", "Unsqueeze")
    size = None if axis is None else _size(surgery, node.inputs[0], axis)
    if source is None or axis is None or size is None or content is None or not content.size:
        return None
    indices = np.where(content < 0, content + size, content)
    first, last = int(indices.min()), int(indices.max())
    if source.op_type == "Unsqueeze":
        made = ints_option(source, "axes", 1)
        rank = surgery.rank(node.inputs[0]) or 0
        value = source.inputs[0]
        if made and [one % rank for one in made] == [axis] and content.shape == () and value is not None:
            _bypass(surgery, node, value)
        return None
    if _axis(surgery, source, node.inputs[0]) != axis:
        return None
    found = _operand(surgery, source, axis, first, last + 1) if 0 <= first <= last < size else None
    if found is None or not surgery.context.allow(node):
        return None
    number = surgery.initializer(node, node.inputs[1].name or "index" if node.inputs[1] else "index",
                                 np.asarray(indices - found[1], np.int64))  # fmt: skip
    new = surgery.new("Gather", [found[0], number], [node], {"axis": axis})
    surgery.replace([node], [new])
    return new


def _forward_split(surgery: Surgery, node: ir.Node) -> ir.Node | None:
    axis = _axis(surgery, node, node.inputs[0])
    sizes = [] if axis is None else [_size(surgery, value, axis) for value in node.outputs]
    numbers = [size for size in sizes if size is not None]
    if axis is None or not numbers or len(numbers) != len(sizes):
        return None
    bounds = [0, *(int(bound) for bound in np.cumsum(numbers))]
    used = [index for index, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
    concat = producer_of(node.inputs[0], "Concat")
    if concat is not None and _axis(surgery, concat, node.inputs[0]) == axis:
        _forward_parts(surgery, node, concat, axis, list(pairwise(bounds)))
        return None
    if len(used) == 1 and len(sizes) > 1 and node.inputs[0] is not None and surgery.context.allow(node):
        (part,) = used
        return _slice_of_split(surgery, node, part, axis, bounds[part], bounds[part + 1])
    return None


def _slice_of_split(surgery: Surgery, node: ir.Node, part: int, axis: int, start: int, end: int) -> ir.Node:
    source = node.inputs[0]
    assert source is not None, "a Split has an input"
    hint = f"{node.outputs[part].name or 'value'}_slice"
    bounds = [surgery.initializer(node, hint, np.array([number], np.int64)) for number in (start, end, axis)]
    new = surgery.new("Slice", [source, *bounds], [node])
    surgery.insert(node, [new])
    surgery.take_over(node.outputs[part], new.outputs[0])
    remove([node])
    surgery.rewrites += 1
    return new


def _forward_parts(
    surgery: Surgery, node: ir.Node, concat: ir.Node, axis: int, parts: Sequence[tuple[int, int]]
) -> None:
    """Let the operands of `concat` take the place of the parts of a Split, if each used part is one of them."""
    pairs: list[tuple[ir.Value, ir.Value]] = []
    for value, (start, end) in zip(node.outputs, parts, strict=True):
        if not value.uses() and not value.is_graph_output():
            continue
        found = _operand(surgery, concat, axis, start, end) if start < end else None
        if found is None or _size(surgery, found[0], axis) != end - start or value.is_graph_output():
            surgery.context.near_miss(node, "splits a Concat in another way than it was put together")
            return
        pairs.append((value, found[0]))
    if surgery.context.allow(node):
        for value, operand in pairs:
            bypass(value, operand)
        remove([node])
        surgery.rewrites += 1


def _shorten_concat(surgery: Surgery, node: ir.Node) -> ir.Node | None:
    """Let a Concat take the operands of Concats along the same axis that it alone reads, or undo a Split."""
    axis = _axis(surgery, node, node.outputs[0])
    inner = [producer_of(value, "Concat") for value in node.inputs if value is not None and only_reader(value) is node]
    nested = [each for each in inner if each is not None and _axis(surgery, each, each.outputs[0]) == axis]
    if axis is None or not nested or not surgery.context.allow(node):
        return _undo_split(surgery, node)
    operands: list[ir.Value | None] = []
    for value in node.inputs:
        producer = None if value is None else value.producer()
        operands += producer.inputs if producer in nested and producer is not None else [value]
    new = surgery.new("Concat", operands, [*nested, node], {"axis": axis})
    surgery.replace([*nested, node], [new])
    return new


def _undo_split(surgery: Surgery, node: ir.Node) -> ir.Node | None:
    """Let what was split take the place of a Concat of all parts in order."""
    split = producer_of(node.inputs[0], "Split")
    if split is None or tuple(node.inputs) != tuple(split.outputs) or split.inputs[0] is None:
        return None
    axis = _axis(surgery, split, split.inputs[0])
    if axis is not None and _axis(surgery, node, split.inputs[0]) == axis:
        _bypass(surgery, node, split.inputs[0])
        if node.graph is None and not any(value.uses() or value.is_graph_output() for value in split.outputs):
            remove([split])
    return None


_RULES: dict[str, Rule] = {
    "Concat": _shorten_concat,
    "Gather": _forward_gather,
    "Slice": _forward_slice,
    "Split": _forward_split,
}
