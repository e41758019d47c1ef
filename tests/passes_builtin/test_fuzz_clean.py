"""Differential fuzzing: generated graphs mean the same after every pass of the clean-up, and are never larger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from optframe import gate, graph
from optframe.gate.structure import wiring_problem
from optframe.passes import GraphPass, PassContext
from optframe.pipeline import Pipeline
from optframe.registry import default_registry
from optframe.snapshot import Snapshot
from optframe_passes.compose_layout import ComposeLayout
from optframe_passes.compose_slices import ComposeSlices
from optframe_passes.drop_broadcast import DropBroadcast
from optframe_passes.eliminate_dead_code import EliminateDeadCode
from optframe_passes.eliminate_identity import EliminateIdentity
from optframe_passes.flatten_tokens import FlattenTokens
from optframe_passes.fold_constants import FoldConstants
from optframe_passes.fold_conv_scale import FoldConvScale
from optframe_passes.fold_where import FoldWhere
from optframe_passes.forward_concat import ForwardConcat
from optframe_passes.infer_shapes import InferShapes
from optframe_passes.lift_opset import LiftOpset
from optframe_passes.merge_duplicates import MergeDuplicates
from optframe_passes.move_transposes import MoveTransposes
from optframe_passes.scatter_to_slices import ScatterToSlices
from optframe_passes.sink_split import SinkSplit

Array = np.ndarray[Any, Any]
Dims = tuple[int | str, ...]

PASSES: tuple[GraphPass, ...] = (
    LiftOpset(),
    InferShapes(),
    FoldConstants(),
    FoldConvScale(),
    ScatterToSlices(),
    ComposeSlices(),
    ForwardConcat(),
    FoldWhere(),
    DropBroadcast(),
    ComposeLayout(),
    MoveTransposes(),
    FlattenTokens(),
    SinkSplit(),
    EliminateIdentity(),
    MergeDuplicates(),
    EliminateDeadCode(),
)

UNARY = ("Abs", "Exp", "Identity", "Neg", "Relu", "Sigmoid", "Tanh", "Dropout")
BINARY = ("Add", "Max", "Mul", "Sub")


@dataclass
class Generator:
    """Draws a graph node by node; tensors are float32 with a first dimension N, or constants."""

    data: st.DataObject
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    dims: dict[str, Dims] = field(default_factory=dict)
    count: int = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def pick(self, options: Sequence[Any]) -> Any:
        return self.data.draw(st.sampled_from(list(options)))

    def node(self, op: str, inputs: Sequence[str], dims: Dims | None = None, **attributes: Any) -> str:
        output = self.name()
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        if dims is not None:
            self.dims[output] = dims
        return output

    def weight(self, array: Array) -> str:
        name = self.name()
        if self.pick([True, False]):
            self.weights.append(numpy_helper.from_array(array, name))
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        return name

    def ints(self, *entries: int) -> str:
        return self.weight(np.array(entries, np.int64))

    def with_axes(self, op: str, source: str, axes: list[int], dims: Dims) -> str:
        """Squeeze and Unsqueeze have their axes as an attribute before opset 13."""
        if self.opset < 13:
            return self.node(op, [source], dims, axes=axes)
        return self.node(op, [source, self.ints(*axes)], dims)

    def step(self) -> None:
        source = self.pick(list(self.dims))
        kind = self.pick([k for k in vars(type(self)) if k.startswith("make_")])
        getattr(self, kind)(source, self.dims[source])

    def make_unary(self, source: str, dims: Dims) -> None:
        self.node(self.pick(UNARY), [source], dims)

    def make_again(self, source: str, dims: Dims) -> None:
        """Repeat an op, which merging should find."""
        op = self.pick(UNARY[:-1])
        self.node(op, [source], dims)
        self.node(op, [source], dims)

    def make_binary(self, source: str, dims: Dims) -> None:
        other = self.pick([name for name, found in self.dims.items() if found == dims])
        self.node(self.pick(BINARY), [source, other], dims)

    def make_scalar(self, source: str, dims: Dims) -> None:
        shape = (1,) * self.pick(range(len(dims) + 1))
        operand = self.weight(np.full(shape, self.pick([0.0, 1.0, -0.5]), np.float32))
        self.node(self.pick(BINARY), self.pick([[source, operand], [operand, source]]), dims)

    def make_constant(self, source: str, dims: Dims) -> None:
        """Something computed from constants alone."""
        size = dims[-1] if isinstance(dims[-1], int) else 1
        vector = self.weight(np.linspace(-1, 1, size, dtype=np.float32))
        bent = self.node(self.pick(UNARY[:-1]), [vector])
        self.node("Add", [source, bent], dims)

    def make_transpose(self, source: str, dims: Dims) -> None:
        order = [0, *self.data.draw(st.permutations(range(1, len(dims))))]
        self.node("Transpose", [source], tuple(dims[axis] for axis in order), perm=order)

    def make_flat(self, source: str, dims: Dims) -> None:
        """Reshape to (N, rest) by the shape arithmetic that exporters write."""
        shape = self.node("Shape", [source])
        batch = self.node("Gather", [shape, self.weight(np.array(0, np.int64))])
        first = self.with_axes("Unsqueeze", batch, [0], ())
        del self.dims[first]
        rest = math.prod(dim for dim in dims[1:] if isinstance(dim, int))
        target = self.node("Concat", [first, self.ints(self.pick([-1, rest]))], axis=0)
        self.node("Reshape", [source, target], (dims[0], rest))

    def make_reshape(self, source: str, dims: Dims) -> None:
        rest = math.prod(dim for dim in dims[1:] if isinstance(dim, int))
        factor = self.pick([d for d in range(1, rest + 1) if rest % d == 0])
        self.node("Reshape", [source, self.ints(0, factor, -1)], (dims[0], factor, rest // factor))

    def make_longer(self, source: str, dims: Dims) -> None:
        longer = self.with_axes("Unsqueeze", source, [len(dims)], (*dims, 1))
        if self.pick([True, False]):
            self.with_axes("Squeeze", longer, [len(dims)], dims)

    def make_concat(self, source: str, dims: Dims) -> None:
        axis = self.pick(range(1, len(dims)))
        fits = [
            name
            for name, found in self.dims.items()
            if len(found) == len(dims) and found[:axis] == dims[:axis] and found[axis + 1 :] == dims[axis + 1 :]
        ]
        parts = [source, *(self.pick(fits) for _ in range(self.pick([1, 2])))]
        total = sum(int(self.dims[name][axis]) for name in parts)
        if total <= 24:
            self.node(
                "Concat", parts, (*dims[:axis], total, *dims[axis + 1 :]), axis=self.pick([axis, axis - len(dims)])
            )

    def make_split(self, source: str, dims: Dims) -> None:
        axis = self.pick(range(1, len(dims)))
        size = int(dims[axis])
        if size < 2:
            return
        first = self.pick(range(1, size))
        parts = [self.name(), self.name()]
        sizes, attributes = (first, size - first), {"axis": axis}
        if self.opset < 13:
            self.nodes.append(helper.make_node("Split", [source], parts, split=sizes, **attributes))
        else:
            self.nodes.append(helper.make_node("Split", [source, self.ints(*sizes)], parts, **attributes))
        for name, part in zip(parts, sizes, strict=True):
            self.dims[name] = (*dims[:axis], part, *dims[axis + 1 :])

    def make_pad(self, source: str, dims: Dims) -> None:
        pads = [0, *(self.pick([0, 0, 1]) for _ in dims[1:])] * 2
        padded = tuple(d if isinstance(d, str) else d + 2 * pad for d, pad in zip(dims, pads, strict=False))
        if math.prod(d for d in padded if isinstance(d, int)) <= 600:
            self.node("Pad", [source, self.ints(*pads)], padded)

    def make_bias(self, source: str, dims: Dims) -> None:
        """A constant that varies along some of the axes."""
        shape = [int(dim) if self.pick([True, False]) and isinstance(dim, int) else 1 for dim in dims]
        shape = shape[self.pick(range(len(shape))) :]
        array = np.sin(np.arange(math.prod(shape), dtype=np.float32)).reshape(shape)
        self.node(self.pick(BINARY), self.pick([[source, self.weight(array)], [self.weight(array), source]]), dims)

    def make_transposed_back(self, source: str, dims: Dims) -> None:
        """An island between two Transposes, as exports of TensorFlow have them around everything."""
        order = [0, *self.data.draw(st.permutations(range(1, len(dims))))]
        turned = tuple(dims[axis] for axis in order)
        inner = self.node("Transpose", [source], turned, perm=order)
        for _ in range(self.pick([1, 2])):
            self.pick([self.make_unary, self.make_bias, self.make_softmax, self.make_binary])(inner, turned)
            inner = next(reversed(self.dims))
        self.node("Transpose", [inner], dims, perm=[int(axis) for axis in np.argsort(order)])

    def make_softmax(self, source: str, dims: Dims) -> None:
        self.node("Softmax", [source], dims, axis=self.pick(range(1, len(dims))))

    def make_mean(self, source: str, dims: Dims) -> None:
        axis = self.pick(range(1, len(dims)))
        if self.opset < 18:
            self.node("ReduceMean", [source], (*dims[:axis], 1, *dims[axis + 1 :]), axes=[axis])
        else:
            self.node("ReduceMean", [source, self.ints(axis)], (*dims[:axis], 1, *dims[axis + 1 :]))

    def make_slice(self, source: str, dims: Dims) -> None:
        axis = self.pick(range(1, len(dims)))
        size = dims[axis]
        assert isinstance(size, int)
        start, end = self.pick([0, size // 2]), self.pick([size, 2**40])
        inputs = [source, self.ints(start), self.ints(end), self.ints(axis)]
        self.node("Slice", inputs, (*dims[:axis], size - start, *dims[axis + 1 :]))

    def make_expand(self, source: str, dims: Dims) -> None:
        """Repeat a row that an addition would broadcast by itself."""
        row = self.with_axes("Unsqueeze", self.weight(np.ones(1, np.float32)), list(range(1, len(dims))), ())
        del self.dims[row]
        wide = self.node("Expand", [row, self.node("Shape", [source])])
        self.node(self.pick(BINARY), [wide, source], dims)

    def make_scatter(self, source: str, dims: Dims) -> None:
        """Update a slice, or all, of the axis behind the batch in the way of exporters."""
        size = dims[1]
        assert isinstance(size, int)
        start = self.pick([0, size // 2])
        end = self.pick(range(start + 1, size + 1))
        part = self.node("Slice", [source, self.ints(start), self.ints(end), self.ints(1)])
        changed = self.node(self.pick(["Mul", "Add"]), [part, self.weight(np.array([0.5], np.float32))])
        order = [1, 0, *range(2, len(dims))]
        turned = [self.node("Transpose", [each], perm=order) for each in (source, changed)]
        rows = self.weight(np.arange(start, end, dtype=np.int64).reshape(-1, 1))
        self.node("Transpose", [self.node("ScatterND", [turned[0], rows, turned[1]])], dims, perm=order)

    def make_matmul(self, source: str, dims: Dims) -> None:
        assert isinstance(dims[-1], int)
        columns = self.pick([1, 3])
        weight = self.weight(np.sin(np.arange(dims[-1] * columns, dtype=np.float32)).reshape(dims[-1], columns))
        self.node("MatMul", [source, weight], (*dims[:-1], columns))

    def make_if(self, source: str, dims: Dims) -> None:
        condition = self.pick(["flag", self.weight(np.array(self.pick([True, False])))])
        branches = []
        for op in (self.pick(UNARY[:-1]), self.pick(UNARY[:-1])):
            inner, output = self.name(), self.name()
            info = helper.make_tensor_value_info(output, TensorProto.FLOAT, dims)
            nodes = [helper.make_node(op, [source], [inner]), helper.make_node("Neg", [inner], [output])]
            branches.append(helper.make_graph(nodes, f"branch_{output}", [], [info]))
        self.node("If", [condition], dims, then_branch=branches[0], else_branch=branches[1])

    def model(self, steps: int) -> ir.Model:
        self.dims["x"] = ("N", 4, 6)
        for _ in range(steps):
            self.step()
        made = [name for name in self.dims if name != "x"]
        chosen = list(dict.fromkeys([made[-1], self.pick(made)]))
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, self.dims[name]) for name in chosen]
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 4, 6)),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, ()),
        ]
        proto = helper.make_graph(self.nodes, "fuzz", inputs, outputs, self.weights)
        imports = [helper.make_opsetid("", self.opset)]
        return ir.from_proto(helper.make_model(proto, opset_imports=imports, ir_version=8))


def run(model: ir.Model, batch: int, flag: bool) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = np.cos(np.arange(batch * 24, dtype=np.float32)).reshape(batch, 4, 6)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, {"x": x, "flag": np.array(flag)})


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("opset", [11, 17])
def test_generated_graphs_keep_their_meaning(opset: int, data: st.DataObject) -> None:
    model = Generator(data, opset).model(data.draw(st.integers(1, 14)))
    cases = [(2, True), (3, False)]
    expected = [run(model, *case) for case in cases]
    for step in PASSES:
        before, nodes = graph.fingerprint(model), graph.count_nodes(model)
        modified = step.run(model, PassContext(pass_name=step.name)).modified
        assert modified == (graph.fingerprint(model) != before), f"{step.name} is not honest"
        assert wiring_problem(model) is None
        # Lifting Softmax of older opsets writes out that it works on a matrix, which takes three nodes more; a scatter
        # becomes Split and Concat, the first of which a Slice may be.
        grows = step.name in ("lift-opset", "scatter-to-slices")
        assert graph.count_nodes(model) <= nodes or grows, f"{step.name} adds nodes"
        assert not step.run(model, PassContext(pass_name=step.name)).modified, f"{step.name} finds more to do"
        for case, arrays in zip(cases, expected, strict=True):
            for old, new in zip(arrays, run(model, *case), strict=True):
                # Products may be added up in another order: about ten sums of six terms below 1e3.
                np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5, err_msg=step.name)


def optimized(model: ir.Model, pipeline: Pipeline) -> ir.Model:
    return gate.optimize(model.clone(), pipeline, ops=default_registry().ops(), verify="off").model


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("name", ["portable", "cpu", "tensorrt", "anchordetr", "anchordetr-tensorrt"])
def test_pipelines_leave_nothing_to_do(name: str, data: st.DataObject) -> None:
    model = Generator(data, data.draw(st.sampled_from([11, 17, 21]))).model(data.draw(st.integers(1, 14)))
    pipeline = Pipeline.parse(name, default_registry())
    once = optimized(model, pipeline)
    twice = optimized(once, pipeline)
    assert Snapshot.take(once).same(Snapshot.take(twice), types=False), "a second run changes the model"
    for case in [(2, True), (3, False)]:
        for old, new in zip(run(model, *case), run(once, *case), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)  # as above
