"""Differential fuzzing of the passes of linear algebra: generated graphs keep their meaning."""

from __future__ import annotations

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
from optframe.flops import count_flops
from optframe.gate.structure import wiring_problem
from optframe.passes import GraphPass, PassContext
from optframe.pipeline import Pipeline
from optframe.registry import default_registry
from optframe.snapshot import Snapshot
from optframe_passes.compose_linear import ComposeLinear
from optframe_passes.distribute_constant_add import DistributeConstantAdd
from optframe_passes.drop_softmax_invariant import DropSoftmaxInvariant
from optframe_passes.exchange_mean_linear import ExchangeMeanLinear
from optframe_passes.fold_scale import FoldScale
from optframe_passes.merge_duplicates import MergeDuplicates
from optframe_passes.merge_parallel_matmuls import MergeParallelMatMuls
from optframe_passes.select_gemm import SelectGemm
from optframe_passes.sink_split import SinkSplit

Array = np.ndarray[Any, Any]
Dims = tuple[int | str, ...]

PASSES: tuple[GraphPass, ...] = (
    SelectGemm(prefer="matmul"),
    FoldScale(),
    DistributeConstantAdd(),
    ExchangeMeanLinear(),
    MergeDuplicates(),
    DropSoftmaxInvariant(),
    ComposeLinear(),
    MergeParallelMatMuls(min_count=3, min_depth=1),
    SinkSplit(),
    SelectGemm(),
)


@dataclass
class Generator:
    """Draws a graph op by op; tensors are float64, so that only a wrong rewrite shows."""

    data: st.DataObject
    opset: int
    batch: int | str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)
    dims: dict[str, Dims] = field(default_factory=dict)
    count: int = 0

    def pick(self, options: Sequence[Any]) -> Any:
        return self.data.draw(st.sampled_from(list(options)))

    def node(self, op: str, inputs: Sequence[str], dims: Dims, **attributes: Any) -> str:
        self.count += 1
        output = f"v{self.count}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        self.dims[output] = dims
        return output

    def weight(self, *shape: int) -> str:
        """Return a constant of pseudo-random numbers around 1, one in two times one that was there already."""
        array = np.sin(np.arange(1 + self.count, 1 + self.count + int(np.prod(shape)))).reshape(shape) + 0.5
        known = [
            name for name, tensor in self.weights.items() if tuple(tensor.dims) == shape and tensor.data_type == 11
        ]
        if known and self.pick([True, False]):
            return str(self.pick(known))
        return self.named(array)

    def ints(self, *entries: int) -> str:
        return self.named(np.array(entries, np.int64))

    def named(self, array: Array) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def step(self) -> None:
        source = self.pick(list(self.dims))
        kind = self.pick([k for k in vars(type(self)) if k.startswith("make_")])
        getattr(self, kind)(source, self.dims[source])

    def broadcast(self, dims: Dims) -> tuple[int, ...]:
        """Return a shape that broadcasts to `dims`."""
        kept = [int(dim) if isinstance(dim, int) and self.pick([True, False]) else 1 for dim in dims]
        return tuple(kept[self.pick(range(len(kept) + 1)) :])

    def pair(self, source: str, constant: str) -> list[str]:
        return self.pick([[source, constant], [constant, source]])

    def make_constant(self, source: str, dims: Dims) -> None:
        self.node(self.pick(["Add", "Sub", "Mul"]), self.pair(source, self.weight(*self.broadcast(dims))), dims)

    def make_division(self, source: str, dims: Dims) -> None:
        self.node("Div", [source, self.weight(*self.broadcast(dims))], dims)

    def make_layer(self, source: str, dims: Dims) -> None:
        columns = self.pick([1, 4, 6])
        self.node("MatMul", [source, self.weight(int(dims[-1]), columns)], (*dims[:-1], columns))

    def make_biased_layers(self, source: str, dims: Dims) -> None:
        """Layers side by side, and what follows on them as a rule."""
        columns = self.pick([4, 6])
        for _ in range(self.pick([2, 3])):
            product = self.node("MatMul", [source, self.weight(int(dims[-1]), columns)], (*dims[:-1], columns))
            biased = self.node("Add", self.pair(product, self.weight(columns)), (*dims[:-1], columns))
            if len(dims) == 3:
                heads = (*dims[:-1], 2, columns // 2)
                split = self.node("Reshape", [biased, self.ints(0, 0, 2, -1)], heads)
                order = self.pick([[0, 2, 1, 3], [0, 2, 3, 1]])
                self.node("Transpose", [split], tuple(heads[axis] for axis in order), perm=order)

    def make_gemm(self, source: str, dims: Dims) -> None:
        if len(dims) == 2:
            transposed = self.pick([0, 1])
            shape = (4, int(dims[1])) if transposed else (int(dims[1]), 4)
            attributes = {"alpha": self.pick([1.0, 0.5]), "beta": self.pick([1.0, 2.0]), "transB": transposed}
            self.node("Gemm", [source, self.weight(*shape), self.weight(4)], (dims[0], 4), **attributes)

    def make_mean(self, source: str, dims: Dims) -> None:
        axis, keep = self.pick(range(len(dims))), self.pick([0, 1])
        kept = (*dims[:axis], *((1,) * keep), *dims[axis + 1 :])
        if len(dims) == 2 and not keep:
            return
        kind = self.pick(["ReduceMean", "ReduceSum"])
        if self.opset < (18 if kind == "ReduceMean" else 13):
            self.node(kind, [source], kept, axes=[axis], keepdims=keep)
        else:
            self.node(kind, [source, self.ints(axis)], kept, keepdims=keep)

    def make_attention(self, source: str, dims: Dims) -> None:
        """Attention of `source` to itself, with biases."""
        if len(dims) != 3:
            return
        width = int(dims[-1])
        query, key, value = (
            self.node(
                "Add",
                self.pair(self.node("MatMul", [source, self.weight(width, 4)], (*dims[:-1], 4)), bias),
                (*dims[:-1], 4),
            )
            for bias in (self.weight(4), self.weight(1, 4), self.weight(*self.broadcast((*dims[1:-1], 4))))
        )
        turned = self.node("Transpose", [key], (dims[0], 4, dims[1]), perm=[0, 2, 1])
        scores = self.node("MatMul", [query, turned], (dims[0], dims[1], dims[1]))
        if self.pick([True, False]):
            scores = self.node("Div", [scores, self.weight()], self.dims[scores])
        rows = self.node("Softmax", [scores], self.dims[scores], axis=2)
        mixed = self.node("MatMul", [rows, value], (*dims[:-1], 4))
        self.node(
            "Add",
            self.pair(self.node("MatMul", [mixed, self.weight(4, 6)], (*dims[:-1], 6)), self.weight(6)),
            (*dims[:-1], 6),
        )

    def make_bent(self, source: str, dims: Dims) -> None:
        self.node(self.pick(["Relu", "Tanh"]), [source], dims)

    def make_sum(self, source: str, dims: Dims) -> None:
        other = self.pick([name for name, found in self.dims.items() if found == dims])
        self.node("Add", [source, other], dims)

    def make_transpose(self, source: str, dims: Dims) -> None:
        order = [0, *self.data.draw(st.permutations(range(1, len(dims))))]
        self.node("Transpose", [source], tuple(dims[axis] for axis in order), perm=order)

    def model(self, steps: int) -> ir.Model:
        self.dims["x"] = (self.batch, 5, 6)
        for _ in range(steps):
            self.step()
        read = {name for node in self.nodes for name in node.input}
        made = [name for name in self.dims if name != "x" and name not in read]
        outputs = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, self.dims[name]) for name in made]
        inputs = [helper.make_tensor_value_info("x", TensorProto.DOUBLE, (self.batch, 5, 6))]
        proto = helper.make_graph(self.nodes, "fuzz", inputs, outputs, self.weights.values())
        return ir.from_proto(
            helper.make_model(proto, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        )


def run(model: ir.Model, batch: int) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = np.cos(np.arange(batch * 30.0)).reshape(batch, 5, 6)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return [np.asarray(array) for array in session.run(None, {"x": x})]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize(("opset", "batch"), [(12, 3), (17, "N"), (18, 3)])
def test_generated_layers_keep_their_meaning(opset: int, batch: int | str, data: st.DataObject) -> None:
    generator = Generator(data, opset, batch)
    model = generator.model(data.draw(st.integers(1, 9)))
    if not generator.nodes:
        return
    batches = [3] if batch == 3 else [2, 3]
    expected = [run(model, size) for size in batches]
    for step in PASSES:
        before, nodes, flops = graph.fingerprint(model), graph.count_nodes(model), cost(model)
        modified = step.run(model, PassContext(pass_name=step.name)).modified
        assert modified == (graph.fingerprint(model) != before), f"{step.name} is not honest"
        assert wiring_problem(model) is None
        # A Gemm taken apart is two nodes; a mean over rows and one over columns of a product are two smaller products.
        growing = step == SelectGemm(prefer="matmul") or step.name == "exchange-mean-linear"
        assert graph.count_nodes(model) <= nodes or growing, f"{step.name} adds nodes"
        assert cost(model) <= flops, f"{step.name} makes the model slower"
        assert not step.run(model, PassContext(pass_name=step.name)).modified, f"{step.name} finds more to do"
        for size, arrays in zip(batches, expected, strict=True):
            for old, new in zip(arrays, run(model, size), strict=True):
                # FP64 rounds by 1e-16; a dozen layers of six terms each may grow numbers to 1e4 and cancel them again.
                np.testing.assert_allclose(
                    new, old, rtol=1e-9, atol=1e-9 * np.abs(old).max(initial=1), err_msg=step.name
                )


def optimized(model: ir.Model, pipeline: Pipeline) -> ir.Model:
    return gate.optimize(model.clone(), pipeline, ops=default_registry().ops(), verify="off").model


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("name", ["portable", "cpu", "tensorrt"])
@pytest.mark.parametrize(("opset", "batch"), [(12, 3), (17, "N")])
def test_pipelines_leave_nothing_to_do(name: str, opset: int, batch: int | str, data: st.DataObject) -> None:
    generator = Generator(data, opset, batch)
    model = generator.model(data.draw(st.integers(1, 9)))
    if not generator.nodes:
        return
    pipeline = Pipeline.parse(name, default_registry())
    once = optimized(model, pipeline)
    twice = optimized(once, pipeline)
    assert Snapshot.take(once).same(Snapshot.take(twice), types=False), "a second run changes the model"


def cost(model: ir.Model) -> int:
    return count_flops(model, input_shapes={"x": (3, 5, 6)}).total
