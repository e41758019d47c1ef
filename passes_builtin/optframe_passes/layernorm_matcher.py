"""Finds layer normalisations: native LayerNormalization nodes, and the same written out in simpler ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optframe import ops
from optframe.graph import all_nodes
from optframe.passes import PassContext
from optframe_passes.edit import Array, FreshNames, add_initializer, graph_of, ints_option, is_onnx, small_constant
from optframe_passes.propagate import Propagation
from optframe_passes.shape_data import Dim

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types whose statistics LayerNormalization computes in float32, as well as the written-out form does or better."""


@dataclass(frozen=True)
class LayerNormMatch:
    """`output` = (x - mean) / sqrt(variance + epsilon) * scale + bias, normalised over the last `-axis` axes of x.

    `dims` are the sizes of those axes. x and output have type `dtype`; statistics are float32 or, in a written-out
    form, no better. `scale` and `bias`, where there are any, have shape `dims` or are constants that broadcast to it
    (see `parameter`). `nodes` are all that goes, the one that makes `output` last.
    """

    x: ir.Value
    scale: ir.Value | None
    bias: ir.Value | None
    epsilon: float
    axis: int
    dims: tuple[Dim, ...]
    dtype: ir.DataType
    nodes: tuple[ir.Node, ...]
    output: ir.Value

    @property
    def native(self) -> bool:
        """Return whether this is a LayerNormalization node already."""
        return self.nodes[0].op_type == "LayerNormalization"

    def parameter(self, value: ir.Value, names: FreshNames) -> ir.Value:
        """Return scale or bias `value` in shape `dims`; a constant of another shape becomes a new initialiser."""
        array, dims = _constant(value), self.static_dims
        if array is None or dims is None or array.shape == dims:
            return value
        inner = array.reshape(array.shape[max(0, array.ndim - len(dims)) :])
        return self.constant(np.broadcast_to(inner, dims), f"{value.name}_vector", names)

    def constant(self, array: Array, hint: str, names: FreshNames) -> ir.Value:
        """Return `array` as an initialiser of the graph that the match is in, the same for all matches."""
        graph = graph_of(self.nodes[-1])
        for name, value in graph.initializers.items():
            if name.startswith(hint) and not value.is_graph_input():
                present = small_constant(value)
                if present is not None and present.dtype == array.dtype and np.array_equal(present, array):
                    return value
        return add_initializer(graph, names(hint), array)

    @property
    def static_dims(self) -> tuple[int, ...] | None:
        """Return `dims` if all of them are numbers."""
        numbers = tuple(dim for dim in self.dims if isinstance(dim, int))
        return numbers if len(numbers) == len(self.dims) else None


class _Mismatch(Exception):
    """`node` is why there is no match, for a reason that a user can act on."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def find_layernorms(model: ir.Model, context: PassContext, known: Propagation | None = None) -> list[LayerNormMatch]:
    """Return the layer normalisations of the graph and its subgraphs, in the order of their nodes.

    They share no nodes. Rewrite the last one first: then the values that the others name stay in the graph. Every
    ReduceMean and LayerNormalization that is left alone becomes a near-miss with its reason. `known` spares a
    propagation where the caller has one.
    """
    known = known or context.facts.of(model, Propagation.of)
    matches: list[LayerNormMatch] = []
    taken: set[ir.Node] = set()
    for node in all_nodes(model):
        if node in taken or not is_onnx(node, "ReduceMean", "LayerNormalization") or _is_variance(node):
            continue
        attempt = _WrittenOut(node, known, context) if node.op_type == "ReduceMean" else _Native(node, known)
        try:
            matches.append(attempt.match())
        except _Mismatch as mismatch:
            context.near_miss(mismatch.node, mismatch.reason)
        taken.update(attempt.nodes)
    return matches


def inline_layernorms(model: ir.Model, context: PassContext, native: bool = False) -> bool:
    """Inline the model-local functions that hold a written-out (or `native`) layer normalisation, directly or in calls.

    A function's body knows neither shapes nor the values of its attributes; inlined, it does. Functions of registered
    plugin ops stay: they are the op's meaning. Returns whether anything was inlined.
    """
    chosen = _holding_functions(model, context, native)
    calls = [node for node in all_nodes(model) if node.op_identifier() in chosen]
    for node in calls:
        conflict = ops.opset_conflict(model, model.functions[node.op_identifier()])
        if conflict is not None:
            context.near_miss(node, f"the function cannot be inlined: {conflict}")
            return False
    if not calls or not context.allow(calls[0]):
        return False
    keep = {f"{f.domain}::{f.name}" for key, f in model.functions.items() if key not in chosen}
    return ops.inline_functions(model, keep)


def _holding_functions(model: ir.Model, context: PassContext, native: bool) -> set[ir.OperatorIdentifier]:
    functions = {k: f for k, f in model.functions.items() if f"{f.domain}::{f.name}" not in context.ops}
    chosen = {key for key, function in functions.items() if _holds(function, native)}
    while True:
        callers = {
            key
            for key, function in functions.items()
            if key not in chosen and any(node.op_identifier() in chosen for node in function.all_nodes())
        }
        if not callers:
            return chosen
        chosen |= callers


def _holds(function: ir.Function, native: bool) -> bool:
    nodes = list(function.all_nodes())
    if native and any(is_onnx(node, "LayerNormalization") for node in nodes):
        return True
    means = [node for node in nodes if is_onnx(node, "ReduceMean")]
    return any(is_onnx(node, "Sqrt") for node in nodes) and any(_deviations(mean) for mean in means)


@dataclass(frozen=True)
class _Deviation:
    """`value` = x - mean (or mean - x, if not `positive`), made by `nodes`."""

    value: ir.Value
    positive: bool
    nodes: tuple[ir.Node, ...]


def _deviations(mean: ir.Node, known: Propagation | None = None) -> list[_Deviation]:
    """Return the differences between a mean and what it is the mean of; without `known`, those that may be some."""
    x = mean.inputs[0]
    return [
        _Deviation(sub.outputs[0], sub.inputs[0] is x, (*makers, sub))
        for value, makers in _kept(mean, x, known)
        for sub in value.consumers()
        if is_onnx(sub, "Sub") and {*sub.inputs} == {x, value}
    ]


def _kept(mean: ir.Node, x: ir.Value | None, known: Propagation | None) -> list[tuple[ir.Value, tuple[ir.Node, ...]]]:
    """Return the values that hold a mean over axes of `x` with those kept as 1, each with the nodes that make it."""
    if mean.attributes.get_int("keepdims", 1):
        return [(mean.outputs[0], (mean,))]
    behind = [node for node in mean.outputs[0].consumers() if is_onnx(node, "Unsqueeze", "Reshape")]
    if known is not None:
        shape, reduced = known.dims(x) or (), known.dims(mean.outputs[0]) or ()
        expected = (*reduced, *[1] * (len(shape) - len(reduced)))
        behind = [node for node in behind if known.dims(node.outputs[0]) == expected]
    return [(node.outputs[0], (mean, node)) for node in behind]


def _is_variance(node: ir.Node) -> bool:
    """Return whether `node` averages the squares of deviations: then its story is told at their mean."""
    square = node.inputs[0].producer() if node.inputs[0] is not None else None
    deviation = square.inputs[0] if square is not None and is_onnx(square, "Mul", "Pow") else None
    sub = deviation.producer() if deviation is not None else None
    means = [value.producer() for value in sub.inputs if value is not None] if sub is not None else []
    return any(mean is not None and is_onnx(mean, "ReduceMean") and mean is not node for mean in means)


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the operand of a binary `node` beside `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _only_consumer(value: ir.Value) -> ir.Node | None:
    """Return the node that alone uses `value`, if that is so."""
    consumers = {*value.consumers()}
    return None if value.is_graph_output() or len(consumers) != 1 else consumers.pop()


def _constant(value: ir.Value) -> Array | None:
    """Return the array behind a scale or bias; those of over a million elements are no constants here."""
    return small_constant(value, limit=1 << 20)


def _is_parameter(value: ir.Value, dims: tuple[Dim, ...], known: Propagation) -> bool:
    """Return whether `value` has shape `dims`, or is a constant that broadcasts to it without enlarging it."""
    shape = known.dims(value)
    if shape == dims:
        return True
    if shape is None or _constant(value) is None or not all(isinstance(dim, int) for dim in dims):
        return False
    outer = max(0, len(shape) - len(dims))
    inner = dims[len(dims) - len(shape) + outer :]
    return set(shape[:outer]) <= {1} and all(a in (1, b) for a, b in zip(shape[outer:], inner, strict=True))


class _Native:
    """The attempt at one LayerNormalization node."""

    def __init__(self, node: ir.Node, known: Propagation) -> None:
        self.node, self.known = node, known
        self.nodes = {node: None}

    def match(self) -> LayerNormMatch:
        node, known = self.node, self.known
        x, scale, bias = [*node.inputs, None][:3]
        shape, dtype = known.dims(x), known.dtype(x)
        if x is None or shape is None or dtype is None:
            raise _Mismatch(node, "the shape or type of its input is not known")
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            raise _Mismatch(node, "its Mean or InvStdDev output is used")
        axis = node.attributes.get_int("axis", -1)
        axis = axis - len(shape) if axis >= 0 else axis
        for value in (scale, bias):
            if value is not None and not _is_parameter(value, shape[axis:], known):
                raise _Mismatch(node, f"the shape of '{value.name}' is not that of the normalised axes")
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        return LayerNormMatch(x, scale, bias, epsilon, axis, shape[axis:], dtype, (node,), node.outputs[0])


class _WrittenOut:
    """The attempt that starts at the ReduceMean `mean`, downwards node by node; `nodes` are those taken so far."""

    def __init__(self, mean: ir.Node, known: Propagation, context: PassContext) -> None:
        self.mean, self.known, self.context = mean, known, context
        self.nodes: dict[ir.Node, None] = {mean: None}
        self.dims: tuple[Dim, ...] = ()

    def match(self) -> LayerNormMatch:
        x = self.mean.inputs[0]
        if x is None or not _deviations(self.mean, self.known):
            raise _Mismatch(self.mean, "its result is not subtracted from its input: no layer normalisation")
        shape = self.known.dims(x)
        if shape is None:
            raise _Mismatch(self.mean, "the shape of its input is not known")
        count = _trailing_axes(self.mean, len(shape))
        self.dims = shape[len(shape) - count :]
        deviations = {d.value: d for mean in self._twins(x) for d in _deviations(mean, self.known)}
        epsilon, root, inverse = self._root(self._variance(deviations))
        folded = self._folded(x, root, inverse, deviations)
        core, scale, bias = folded or (self._normalized(root, inverse, deviations), None, None)
        x, output, dtype = self._within_casts(x, core)
        if folded is None:
            output, scale = self._parameter(output, "Mul")
        if bias is None:
            output, bias = self._parameter(output, "Add")
        nodes = self._private_nodes(output)
        return LayerNormMatch(x, scale, bias, epsilon, -count, self.dims, dtype, nodes, output)

    def _twins(self, x: ir.Value) -> Iterator[ir.Node]:
        """Yield every mean of `x` over the same axes: some exporters compute it again for the variance."""
        for node in dict.fromkeys(x.consumers()):
            if is_onnx(node, "ReduceMean") and _deviations(node, self.known) and self._same_axes(node):
                yield node

    def _same_axes(self, mean: ir.Node) -> bool:
        return _trailing_axes(mean, len(self.known.dims(mean.inputs[0]) or ())) == len(self.dims)

    def _variance(self, deviations: dict[ir.Value, _Deviation]) -> ir.Value:
        """Return the mean of the squared deviation."""
        squares = [square for deviation in deviations.values() for square in self._squares(deviation)]
        if len(squares) != 1:
            raise _Mismatch(self.mean, f"the deviation from it is squared {len(squares)} times, not once")
        mean, _ = self._next(squares[0].outputs[0])
        if not is_onnx(mean, "ReduceMean"):
            raise _Mismatch(mean, "it does not average the squared deviations (a variance with ddof?)")
        if not self._same_axes(mean):
            raise _Mismatch(mean, "the variance is taken over other axes than the mean")
        kept = _kept(mean, squares[0].outputs[0], self.known)
        if len(kept) != 1:
            raise _Mismatch(mean, "the variance does not keep its axes")
        self._take(*kept[0][1])
        return kept[0][0]

    def _squares(self, deviation: _Deviation) -> Iterator[ir.Node]:
        """Yield the nodes that square the deviation, or a cast of it."""
        for node in dict.fromkeys(deviation.value.consumers()):
            cast = [node] if is_onnx(node, "Cast") else []
            for square in dict.fromkeys(node.outputs[0].consumers()) if cast else [node]:
                if self._is_square(square):
                    self._take(*deviation.nodes, *cast, square)
                    yield square

    def _is_square(self, node: ir.Node) -> bool:
        if is_onnx(node, "Mul"):
            return node.inputs[0] is node.inputs[1]
        return is_onnx(node, "Pow") and self._scalar(node.inputs[1]) == 2

    def _root(self, variance: ir.Value) -> tuple[float, ir.Value, bool]:
        """Return epsilon, sqrt(variance + epsilon), and whether that is its inverse: Pow may take both."""
        add, read = self._next(variance)
        if not is_onnx(add, "Add"):
            reason = "no epsilon is added to the variance" if is_onnx(add, "Sqrt") else "the variance is scaled (ddof?)"
            raise _Mismatch(add, reason)
        epsilon = self._scalar(_other(add, read))
        if epsilon is None or not 0 <= epsilon < float("inf"):
            raise _Mismatch(add, "what it adds to the variance is no constant scalar from 0 up")
        root, read = self._next(add.outputs[0])
        power = self._scalar(root.inputs[1]) if is_onnx(root, "Pow") and root.inputs[0] is read else None
        if not is_onnx(root, "Sqrt") and power not in (0.5, -0.5):
            raise _Mismatch(root, "it is no Sqrt of variance and epsilon")
        self._take(add, root)
        return epsilon, root.outputs[0], power == -0.5

    def _folded(
        self, x: ir.Value, root: ir.Value, inverse: bool, deviations: dict[ir.Value, _Deviation]
    ) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
        """Return result, scale and bias where the scale is part of the factor s = scale / root, None if it is not."""
        factor, scale, made = root, None, list[ir.Node]()
        node = _only_consumer(root)
        if node is not None and not inverse and is_onnx(node, "Div") and node.inputs[1] is root:
            scale = node.inputs[0] if self._scalar(node.inputs[0]) != 1 else None
            factor, inverse, made = node.outputs[0], True, [node]
        elif node is not None and not inverse and is_onnx(node, "Reciprocal"):
            factor, inverse, made = node.outputs[0], True, [node]
        node = _only_consumer(factor)
        if scale is None and node is not None and is_onnx(node, "Mul") and inverse:
            factor, scale, made = node.outputs[0], _other(node, factor), [*made, node]
        if scale is None or scale in deviations or not _is_parameter(scale, self.dims, self.known):
            return None
        found = self._product(factor, deviations) or self._difference(x, factor)
        if found is None:
            return None
        self._take(*made, *found[1])
        return found[0], scale, found[2]

    def _product(
        self, factor: ir.Value, deviations: dict[ir.Value, _Deviation]
    ) -> tuple[ir.Value, Sequence[ir.Node], None] | None:
        """Return (x - mean) * factor and what makes it, if that alone reads the factor."""
        node = _only_consumer(factor)
        other = _other(node, factor) if node is not None and is_onnx(node, "Mul") else None
        deviation = None if other is None else deviations.get(other)
        if node is None or deviation is None or not deviation.positive:
            return None
        return node.outputs[0], [*deviation.nodes, node], None

    def _difference(self, x: ir.Value, factor: ir.Value) -> tuple[ir.Value, Sequence[ir.Node], ir.Value] | None:
        """Return x * factor + (bias - mean * factor), what makes it, and the bias."""
        means = {value: nodes for mean in self._twins(x) for value, nodes in _kept(mean, x, self.known)}
        products = {_other(node, factor): node for node in factor.consumers() if is_onnx(node, "Mul")}
        mean = next((value for value in products if value in means), None)
        if mean is None or set(products) != {x, mean} or len({*factor.consumers()}) != 2:
            return None
        offset = _only_consumer(products[mean].outputs[0])
        total = _only_consumer(products[x].outputs[0])
        if offset is None or total is None or not is_onnx(offset, "Sub") or not is_onnx(total, "Add"):
            return None
        bias = offset.inputs[0]
        if bias is None or {*total.inputs} != {products[x].outputs[0], offset.outputs[0]}:
            return None
        if offset.inputs[1] is not products[mean].outputs[0] or not _is_parameter(bias, self.dims, self.known):
            return None
        return total.outputs[0], [*means[mean], *products.values(), offset, total], bias

    def _normalized(self, root: ir.Value, inverse: bool, deviations: dict[ir.Value, _Deviation]) -> ir.Value:
        """Return deviation / root, which may also be written as deviation * (1 / root)."""
        node, divisor = self._next(root)
        inverts = is_onnx(node, "Reciprocal") or (is_onnx(node, "Div") and self._scalar(node.inputs[0]) == 1)
        if inverts and not inverse:
            inverse = True
            self._take(node)
            node, divisor = self._next(node.outputs[0])
        if not is_onnx(node, "Mul" if inverse else "Div") or (not inverse and node.inputs[1] is not divisor):
            outside = is_onnx(node, "Add") and self._scalar(_other(node, divisor)) is not None
            raise _Mismatch(
                node, "epsilon is added outside of the root" if outside else "it does not divide by the root"
            )
        self._take(node)
        self._take_numerator(node, _other(node, divisor), deviations)
        return node.outputs[0]

    def _take_numerator(
        self, node: ir.Node, numerator: ir.Value | None, deviations: dict[ir.Value, _Deviation]
    ) -> None:
        cast = numerator.producer() if numerator is not None else None
        if cast is not None and is_onnx(cast, "Cast"):
            self._take(cast)
            numerator = cast.inputs[0]
        deviation = deviations.get(numerator) if numerator is not None else None
        if deviation is None:
            raise _Mismatch(node, "what it divides is not the deviation from the mean")
        if not deviation.positive:
            raise _Mismatch(node, "what it divides is mean - x, not x - mean")
        self._take(*deviation.nodes)

    def _within_casts(self, x: ir.Value, core: ir.Value) -> tuple[ir.Value, ir.Value, ir.DataType]:
        """Return input and result of the core, and the type that both have once casts around it belong to it.

        Where x is a float32 copy of 16-bit data and the result goes back to 16 bits before scale and bias, both casts
        are LayerNormalization's own (`stash_type` 1: statistics in float32). Casts behind them stay outside.
        """
        types = {self.known.dtype(node.outputs[0]) for node in self.nodes} | {self.known.dtype(x)}
        if not types <= set(FLOATS):
            raise _Mismatch(self.mean, "it is not computed in float32, float16 or bfloat16 throughout")
        inner, result = self.known.dtype(x), self.known.dtype(core)
        narrowed = _only_consumer(core)
        outer = self.known.dtype(narrowed.outputs[0]) if narrowed is not None and is_onnx(narrowed, "Cast") else None
        widened = x.producer()
        original = widened.inputs[0] if widened is not None and is_onnx(widened, "Cast") else None
        wide = inner == result == ir.DataType.FLOAT and outer in FLOATS
        if wide and widened is not None and original is not None and self.known.dtype(original) == outer:
            if self._is_private(widened):
                self._take(widened)
            x, inner = original, outer
        if inner != result:
            if narrowed is None or outer != inner:
                raise _Mismatch(self.mean, "its result has another type than its input")
            self._take(narrowed)
            core = narrowed.outputs[0]
        assert inner is not None, "its type is one of FLOATS"
        return x, core, inner

    def _parameter(self, value: ir.Value, op_type: str) -> tuple[ir.Value, ir.Value | None]:
        """Return what `value` becomes by its scale (Mul) or bias (Add), and that parameter; `value` if it has none."""
        node = _only_consumer(value)
        parameter = _other(node, value) if node is not None and is_onnx(node, op_type) else None
        if node is None or parameter is None or parameter is value:
            return value, None
        if not _is_parameter(parameter, self.dims, self.known):
            if _constant(parameter) is not None:
                self.context.near_miss(node, f"'{parameter.name}' enlarges its result: not taken along")
            return value, None
        self._take(node)
        return node.outputs[0], parameter

    def _private_nodes(self, output: ir.Value) -> tuple[ir.Node, ...]:
        """Return all nodes, the one that makes `output` last, if nothing else uses what they make."""
        last = output.producer()
        assert last is not None, "the core of a match is a node"
        for node in self.nodes:
            if node.graph is not last.graph:
                raise _Mismatch(node, "it lies in another graph than the rest of the normalisation")
            if node is not last and not self._is_private(node):
                raise _Mismatch(node, f"'{node.outputs[0].name}' is used outside of the normalisation")
        return (*(node for node in self.nodes if node is not last), last)

    def _is_private(self, node: ir.Node) -> bool:
        value = node.outputs[0]
        return not value.is_graph_output() and all(consumer in self.nodes for consumer in value.consumers())

    def _take(self, *nodes: ir.Node) -> None:
        self.nodes.update(dict.fromkeys(nodes))

    def _next(self, value: ir.Value) -> tuple[ir.Node, ir.Value]:
        """Return the only node that uses `value`, beyond a Cast, and the value that it reads."""
        node = _only_consumer(value)
        if node is None:
            raise _Mismatch(self.mean, f"'{value.name}' is used outside of the normalisation")
        if is_onnx(node, "Cast"):
            self._take(node)
            return self._next(node.outputs[0])
        return node, value

    def _scalar(self, value: ir.Value | None) -> float | None:
        """Return the constant of one element, if `value` is one that enlarges nothing here."""
        array = small_constant(value, limit=1)
        rank = len(self.known.dims(self.mean.inputs[0]) or ())
        return None if array is None or array.size != 1 or array.ndim > rank else float(array.reshape(())[()])


def _trailing_axes(mean: ir.Node, rank: int) -> int:
    """Return over how many of the last of `rank` axes `mean` goes."""
    axes = ints_option(mean, "axes", 1)
    if axes is None:
        raise _Mismatch(mean, "its axes are not constant")
    if not axes and mean.attributes.get_int("noop_with_empty_axes", 0) == 1:
        raise _Mismatch(mean, "without axes it reduces nothing")
    found = {axis - rank if axis >= 0 else axis for axis in axes} or set(range(-rank, 0))
    if not found or found != set(range(-len(found), 0)):
        raise _Mismatch(mean, f"its axes {list(axes)} are not the last ones of {rank}")
    return len(found)
