"""The pass `fuse-rcda`: row-column decoupled attention, written out in matrix products, becomes one plugin op."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe import ops
from optframe.graph import opset
from optframe.passes import GraphPass, PassContext, PassResult
from optframe.types import OpSpec
from optframe_anchordetr.ops import DOMAIN, MINIMUM_OPSET, RCDA
from optframe_anchordetr.passes.calls import may_call
from optframe_anchordetr.passes.layouts import (
    MOVING,
    Group,
    Layout,
    Sizes,
    aligned,
    flat,
    keeps_order,
    moved,
    multiplied,
    regroup,
    reshape_target,
    shape_of,
)
from optframe_anchordetr.passes.sampled_shapes import sampled_shapes
from optframe_passes.edit import Array, FreshNames, add_initializer, graph_of, is_onnx, small_constant
from optframe_passes.propagate import Propagation
from optframe_passes.shape_data import Dim

CANONICAL: Mapping[str, Layout] = {
    "q_row": (("n",), ("l",), ("heads", "d")),
    "q_col": (("n",), ("l",), ("heads", "d")),
    "k_row": (("n",), ("x",), ("heads", "d")),
    "k_col": (("n",), ("y",), ("heads", "d")),
    "v": (("n",), ("y",), ("x",), ("heads", "d")),
    "row_mask": (("n",), ("x",)),
    "column_mask": (("n",), ("y",)),
}
"""Axes of the op's inputs: image, query, row y, column x, and channels, which are head by head."""

FOLDED: Mapping[str, Group] = {
    "q_row": ("n", "heads", "l", "d"),
    "q_col": ("n", "heads", "l", "d"),
    "k_row": ("n", "heads", "d", "x"),
    "k_col": ("n", "heads", "d", "y"),
}
"""Order of the elements where a query or key is constant, and constant folding has turned it for its product."""

OUTPUT: Layout = (("n",), ("l",), ("heads", "d"))

ROWS = frozenset({"q_row", "q_col", "v"})
"""Inputs that the op takes as a matrix of rows as well; its output is like q_row."""


@dataclass(frozen=True)
class FuseRCDA(GraphPass):
    """Replace the core of row-column decoupled attention by the plugin op RCDA.

    The core reaches from projected queries, row and column keys and value to the attended value: two attentions, and
    the value summed over one axis with the first and over the other with the second, in either order. Padding masks go
    along. Reshapes and transposes may stand anywhere; what they do is followed axis by axis. The op comes with its
    meaning as a model-local function.

    With `rows` queries and value come as matrices (N L, C) and (N h w, C), and so does the result, as far as sizes are
    fixed. The Reshapes for that vanish where `flatten-tokens` follows and lets the layers around work on matrices.

    Example:
        before: `MatMul(Softmax(q_col k_col^T), MatMul(Softmax(q_row k_row^T), v))` with reshapes and transposes
        after:  `optframe.anchordetr.RCDA(q_row, q_col, k_row, k_col, v, num_heads=8)`
    """

    name: ClassVar[str] = "fuse-rcda"
    after: ClassVar[tuple[str, ...]] = ("lift-opset", "fold-constants", "fuse-layernorm")
    domains: ClassVar[tuple[str, ...]] = (DOMAIN,)
    rows: bool = False

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fuse in place."""
        context.op(RCDA.identifier)
        cores = [core for node in model.graph.all_nodes() if (core := _core(node)) is not None]
        if not cores:
            return PassResult(False)
        samples, names = sampled_shapes(model), FreshNames(model)
        rewrites = sum(_fuse(model, core, samples, names, context, self.rows) for core in reversed(cores))
        return PassResult(rewrites > 0, rewrites)


class _Mismatch(Exception):
    """Why a core is no RCDA, for a reason that a user can act on."""


@dataclass(frozen=True)
class _Attention:
    """softmax(query key^T), with -inf where the condition of `where` says so. Chains end with an operand."""

    softmax: ir.Node
    scores: ir.Node
    where: ir.Node | None

    @property
    def query(self) -> list[ir.Value]:
        return _chain(self.scores.inputs[0])

    @property
    def key(self) -> list[ir.Value]:
        return _chain(self.scores.inputs[1])

    @property
    def mask(self) -> list[ir.Value]:
        return [] if self.where is None else _chain(self.where.inputs[0])


@dataclass(frozen=True)
class _Core:
    """The two products: `inner` = first attention times value, `outer` = second attention times `inner`."""

    outer: ir.Node
    inner: ir.Node
    first: _Attention
    second: _Attention

    def operands(self, first_axis: str) -> dict[str, list[ir.Value]]:
        """Return the chains that end with the op's inputs, if the first attention sums over x (or y)."""
        row, column = (self.first, self.second) if first_axis == "x" else (self.second, self.first)
        return {
            "q_row": row.query,
            "q_col": column.query,
            "k_row": row.key,
            "k_col": column.key,
            "v": _chain(self.inner.inputs[1]),
            "row_mask": row.mask,
            "column_mask": column.mask,
        }


def _chain(value: ir.Value | None) -> list[ir.Value]:
    """Return the values from a source over moving ops (and needless casts of bools) to `value`."""
    values: list[ir.Value] = []
    while value is not None:
        values.append(value)
        node = value.producer()
        if node is None or not (is_onnx(node, *MOVING) or _is_bool_cast(node)):
            break
        value = node.inputs[0]
    return values[::-1]


def _is_bool_cast(node: ir.Node) -> bool:
    source = node.inputs[0] if is_onnx(node, "Cast") else None
    return source is not None and source.dtype == ir.DataType.BOOL and node.outputs[0].dtype == ir.DataType.BOOL


def _source(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node behind the moving ops that made `value`, if it is an `op_type`."""
    chain = _chain(value)
    node = chain[0].producer() if chain else None
    return node if node is not None and is_onnx(node, op_type) else None


def _core(outer: ir.Node) -> _Core | None:
    """Return the core that ends with the product `outer`, if it looks like one."""
    inner = _source(outer.inputs[1], "MatMul") if is_onnx(outer, "MatMul") else None
    first = _attention(inner.inputs[0]) if inner is not None else None
    second = _attention(outer.inputs[0]) if inner is not None else None
    if inner is None or first is None or second is None:
        return None
    return _Core(outer, inner, first, second)


def _attention(value: ir.Value | None) -> _Attention | None:
    softmax = _source(value, "Softmax")
    before = _made_by(softmax, 0, "Where", "MatMul")
    where = before if before is not None and is_onnx(before, "Where") else None
    scores = _made_by(where, 2, "MatMul") if where is not None else before
    return None if softmax is None or scores is None else _Attention(softmax, scores, where)


def _made_by(node: ir.Node | None, index: int, *op_types: str) -> ir.Node | None:
    value = node.inputs[index] if node is not None else None
    producer = value.producer() if value is not None else None
    return producer if producer is not None and is_onnx(producer, *op_types) else None


@dataclass(frozen=True)
class _Operand:
    """What becomes an input of the op: a value with its elements in the op's order, or a constant in `order`."""

    value: ir.Value
    order: Group | None = None


@dataclass(frozen=True)
class _Match:
    """What the op takes and writes at one sample: inputs by name, sizes of all axes, the value that it makes."""

    inputs: Mapping[str, _Operand]
    sizes: Sizes
    output: ir.Value


def _match(core: _Core, known: Propagation, version: int) -> _Match:
    for attention in (core.first, core.second):
        _check_attention(attention, known, version)
    reasons = []
    for first_axis in ("x", "y"):
        try:
            return _match_axes(core, first_axis, known)
        except _Mismatch as mismatch:
            reasons.append(str(mismatch))
    raise _Mismatch(reasons[0])


def _check_attention(attention: _Attention, known: Propagation, version: int) -> None:
    rank = len(known.dims(attention.softmax.inputs[0]) or ())
    axis = attention.softmax.attributes.get_int("axis", -1 if version >= 13 else 1)
    if axis not in (-1, rank - 1):
        raise _Mismatch("a softmax is not over the last axis")
    filler = small_constant(attention.where.inputs[1], limit=1) if attention.where is not None else None
    if attention.where is not None and (filler is None or not np.all(np.isneginf(filler.astype(np.float32)))):
        raise _Mismatch("a mask does not set scores to minus infinity")


def _match_axes(core: _Core, first_axis: str, known: Propagation) -> _Match:
    """Return the match if the first attention sums over axis `first_axis` of the value, the second over the other."""
    second_axis = "y" if first_axis == "x" else "x"
    sizes = _sizes(core, first_axis, second_axis, known)
    chains = {name: chain for name, chain in core.operands(first_axis).items() if chain}
    inputs, layouts = {}, {}
    for name, chain in chains.items():
        inputs[name], layouts[name] = _input(name, chain, sizes, known)
    row, column = _scores("row", layouts, "x", sizes), _scores("col", layouts, "y", sizes)
    first, second = (row, column) if first_axis == "x" else (column, row)
    partial = multiplied(moved(_chain(core.inner.inputs[0]), first, sizes, known), layouts["v"])
    right = moved(_chain(core.outer.inputs[1]), partial, sizes, known)
    result = multiplied(moved(_chain(core.outer.inputs[0]), second, sizes, known), right)
    if result is None:
        raise _Mismatch("the two sums are not over the rows and columns of one value (N, h, w, C)")
    return _Match(inputs, sizes, _output(core.outer.outputs[0], result, sizes, known))


def _sizes(core: _Core, first_axis: str, second_axis: str, known: Propagation) -> Sizes:
    """Return the size of each atom, from the shapes of both attentions' scores."""
    first, second = (_attention_sizes(attention, known) for attention in (core.first, core.second))
    (*common, first_keys), (*other, second_keys) = first, second
    if common != other:
        raise _Mismatch("the two attentions differ in images, heads, queries or head size")
    return dict(zip(("n", "heads", "l", "d"), common, strict=True)) | {first_axis: first_keys, second_axis: second_keys}


def _attention_sizes(attention: _Attention, known: Propagation) -> tuple[int, ...]:
    """Return images, heads, queries, head size and keys."""
    scores, query = known.static(attention.scores.outputs[0]), known.static(attention.scores.inputs[0])
    source = known.static(attention.query[0])
    if not scores or not query or not source or len(scores) not in (3, 4):
        raise _Mismatch("the shape of an attention is not (N, heads, L, keys), or not known")
    *batch, queries, keys = scores
    heads = batch[1] if len(batch) == 2 else source[-1] // query[-1]
    if heads == 0 or batch[0] % (heads if len(batch) == 1 else 1):
        raise _Mismatch("images and heads of an attention cannot be told apart")
    images = batch[0] if len(batch) == 2 else batch[0] // heads
    return (images, heads, queries, query[-1], keys)


def _input(name: str, chain: list[ir.Value], sizes: Sizes, known: Propagation) -> tuple[_Operand, Layout]:
    """Return what the op takes as input `name`, and the layout of the chain's end.

    That is the first value of the chain in the op's own shape, or else the first that reshapes to it, or a constant.
    """
    wanted = shape_of(CANONICAL[name], sizes)
    own_shape = [index for index, value in enumerate(chain) if known.dims(value) == wanted]
    for index in (*own_shape, *range(len(chain))):
        # A reshape may make the axes from others: (N, h, w, C) holds queries (N, h * w, C) in the same order.
        for first in (index, index + 1) if keeps_order(chain[index + 1 : index + 2]) else (index,):
            layout = regroup(flat(CANONICAL[name]), sizes, known.dims(chain[first]))
            end = moved(chain[first:], layout, sizes, known)
            if end is not None:
                return _Operand(chain[index]), end
    folded = regroup(FOLDED[name], sizes, known.dims(chain[-1])) if name in FOLDED else None
    if folded is not None and _constant(chain[-1]) is not None:
        return _Operand(chain[-1], FOLDED[name]), folded
    raise _Mismatch(f"what would be {name} does not have the shape {_text(name)}")


def _constant(value: ir.Value) -> Array | None:
    """Return the array behind a constant query or key of any usual size."""
    return small_constant(value, limit=1 << 24)


def _text(name: str) -> str:
    letters = {"n": "N", "l": "L", "x": "w", "y": "h", "heads": "C"}
    return f"({', '.join(letters[group[0]] for group in CANONICAL[name])})"


def _scores(axis: str, layouts: Mapping[str, Layout], key: str, sizes: Sizes) -> Layout:
    """Return the layout of the row or column attention."""
    turned = layouts[f"k_{axis}"]
    scores = multiplied(layouts[f"q_{axis}"], turned)
    if scores is None or scores[-1] != ((key,) if sizes[key] != 1 else ()):
        raise _Mismatch(f"the {axis} attention does not multiply queries and keys over the channels of each head")
    mask = layouts.get("row_mask" if axis == "row" else "column_mask")
    if mask is not None and aligned(mask, scores) != scores:
        raise _Mismatch(f"the mask of the {axis} attention is not one flag for each image and key")
    return scores


def _output(value: ir.Value, layout: Layout | None, sizes: Sizes, known: Propagation) -> ir.Value:
    """Return what the op's result becomes: the first value in its shape, or else the last that it reshapes to."""
    wanted = shape_of(OUTPUT, sizes)
    expected = regroup(flat(OUTPUT), sizes, wanted)
    assert expected is not None, "the sizes are those of the shape"
    reshaped: ir.Value | None = None
    while layout is not None:
        if known.dims(value) == wanted and layout == expected:
            return value
        if flat(layout) == flat(expected):
            reshaped = value
        consumers = {*value.consumers()}
        if value.is_graph_output() or len(consumers) != 1 or not is_onnx(node := consumers.pop(), *MOVING):
            break
        before, layout = layout, moved([value, node.outputs[0]], layout, sizes, known)
        value = node.outputs[0]
        if layout is None and keeps_order([value]) and flat(before) == flat(expected):
            reshaped = value
    if reshaped is None:
        raise _Mismatch("the result is not brought to the form (N, L, C)")
    return reshaped


def _nodes(inputs: Collection[ir.Value], output: ir.Value) -> tuple[ir.Node, ...]:
    """Return the nodes between inputs and output that nothing else needs, the one that makes `output` last."""
    last = output.producer()
    assert last is not None
    found = dict.fromkeys(_between(last, inputs))
    while outside := [node for node in found if node is not last and not _used_only_by(node, found)]:
        for node in outside:
            if not is_onnx(node, *MOVING, "Cast"):
                raise _Mismatch(f"'{node.outputs[0].name}' is used elsewhere too")
            del found[node]
    if any(node.graph is not last.graph for node in found):
        raise _Mismatch("it lies in more than one graph")
    return (*(node for node in found if node is not last), last)


def _used_only_by(node: ir.Node, nodes: Mapping[ir.Node, None]) -> bool:
    value = node.outputs[0]
    return not value.is_graph_output() and all(consumer in nodes for consumer in value.consumers())


def _between(node: ir.Node, inputs: Collection[ir.Value]) -> Iterator[ir.Node]:
    yield node
    operands = {"MatMul": (0, 1), "Where": (0, 2)}.get(node.op_type, (0,))
    for value in (node.inputs[index] for index in operands):
        producer = value.producer() if value is not None and value not in inputs else None
        if producer is not None:
            yield from _between(producer, inputs)


@dataclass(frozen=True)
class _Source:
    """An input of the op: `value`, through a Reshape if it has a `target`, or the constant `array` in its place."""

    value: ir.Value
    target: Sequence[int] | None = None
    array: Array | None = None


@dataclass(frozen=True)
class _Plan:
    """The rewrite: what the op takes and makes, and the value that its result becomes, reshaped if it has a target."""

    inputs: Mapping[str, _Source]
    output: ir.Value
    output_shape: ir.Shape
    output_target: Sequence[int] | None
    heads: int
    nodes: tuple[ir.Node, ...]


def _plan(core: _Core, samples: Sequence[Propagation], version: int, rows: bool) -> _Plan:
    """Return the rewrite that holds at every sample, on matrices if `rows` and sizes allow it."""
    if version < MINIMUM_OPSET:
        raise _Mismatch(f"the plugin op needs opset {MINIMUM_OPSET}: run lift-opset first")
    matches = [_match(core, known, version) for known in samples]
    match, sizes = matches[0], [m.sizes for m in matches]
    heads = match.sizes["heads"]
    if any((m.inputs, m.output, m.sizes["heads"]) != (match.inputs, match.output, heads) for m in matches):
        raise _Mismatch("it is another computation at another size")
    outputs = [known.dims(match.output) for known in samples]
    rows = rows and _reshape([_shape(OUTPUT, each, True) for each in sizes], outputs) is not None
    inputs = {name: _source_of(name, operand, sizes, samples, rows) for name, operand in match.inputs.items()}
    results = [_shape(OUTPUT, each, rows) for each in sizes]
    output_target = _target(results, outputs)
    nodes = _nodes([source.value for source in inputs.values()], match.output)
    shape = ir.Shape([dims[0] if len({*dims}) == 1 else None for dims in zip(*results, strict=True)])
    return _Plan(inputs, match.output, shape, output_target, heads, nodes)


def _shape(layout: Layout, sizes: Sizes, rows: bool) -> tuple[int, ...]:
    """Return the shape of an input or output of the op: a matrix of `rows`, or with all its axes."""
    *lead, channels = shape_of(layout, sizes)
    return (math.prod(lead), channels) if rows else (*lead, channels)


def _source_of(
    name: str, operand: _Operand, sizes: Sequence[Sizes], samples: Sequence[Propagation], rows: bool
) -> _Source:
    shapes = [_shape(CANONICAL[name], each, rows and name in ROWS) for each in sizes]
    array = _constant(operand.value) if operand.order is not None else None
    if operand.order is None or array is None:
        return _Source(operand.value, _target([known.dims(operand.value) for known in samples], shapes))
    atoms = array.reshape([sizes[0][atom] for atom in operand.order])
    turned = atoms.transpose([operand.order.index(atom) for atom in flat(CANONICAL[name])])
    return _Source(operand.value, array=turned.reshape(shapes[0]))


def _target(befores: Sequence[Sequence[Dim] | None], afters: Sequence[Sequence[Dim] | None]) -> Sequence[int] | None:
    """Return the target of the Reshape from the first to the second shape, None if they are the same."""
    if all(tuple(before or ()) == tuple(after or ()) for before, after in zip(befores, afters, strict=True)):
        return None
    target = _reshape(befores, afters)
    if target is None:
        raise _Mismatch("its inputs or its result need a reshape whose sizes are not fixed")
    return target


def _reshape(befores: Sequence[Sequence[Dim] | None], afters: Sequence[Sequence[Dim] | None]) -> list[int] | None:
    return reshape_target([(before or (), after or ()) for before, after in zip(befores, afters, strict=True)])


def _fuse(
    model: ir.Model,
    core: _Core,
    samples: Sequence[Propagation],
    names: FreshNames,
    context: PassContext,
    rows: bool,
) -> bool:
    spec = context.op(RCDA.identifier)
    try:
        plan = _plan(core, samples, opset(model), rows)
    except _Mismatch as mismatch:
        context.near_miss(core.outer, str(mismatch))
        return False
    inputs = [plan.inputs[name].value if name in plan.inputs else None for name in CANONICAL]
    if not may_call(spec, inputs, samples[0], core.outer, context):
        return False
    _rewrite(model, spec, plan, names, context)
    return True


def _rewrite(model: ir.Model, spec: OpSpec, plan: _Plan, names: FreshNames, context: PassContext) -> None:
    graph, nodes = graph_of(plan.nodes[-1]), list[ir.Node]()

    def reshaped(value: ir.Value, target: Sequence[int] | None) -> ir.Value:
        if target is None:
            return value
        shape = add_initializer(graph, names(f"{value.name or 'rcda'}_shape"), np.array(target, np.int64))
        nodes.append(ir.node("Reshape", [value, shape]))
        nodes[-1].outputs[0].type = value.type
        return nodes[-1].outputs[0]

    inputs: list[ir.Value | None] = []
    for name in CANONICAL:
        source = plan.inputs.get(name)
        if source is None:
            inputs.append(None)
        elif source.array is not None:
            inputs.append(add_initializer(graph, names(f"{source.value.name}_{name}"), source.array))
        else:
            inputs.append(reshaped(source.value, source.target))
    nodes.append(ops.call(model, spec, inputs, {"num_heads": plan.heads}))
    nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = plan.inputs["q_row"].value.type, plan.output_shape
    context.replace(plan.nodes, nodes, [plan.output], [reshaped(nodes[-1].outputs[0], plan.output_target)])
