"""Ways to write one network: opsets, functions, FP16, Constant nodes, names missing or repeated, If, Loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

Check = Callable[..., None]
Array = np.ndarray[Any, Any]

WIDTH = 8


def network(rng: np.random.Generator, opset: int, dtype: type = np.float32) -> onnx.ModelProto:
    """A small net with a convolution, a written-out layer norm, an MLP, shape arithmetic and a mask, at any opset."""

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((0.5 * rng.standard_normal(shape)).astype(dtype), name)

    def ints(name: str, *values: int) -> TensorProto:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    node = helper.make_node
    weights = [
        *(weight("kernel", WIDTH, 3, 3, 3), weight("offset", WIDTH), weight("scale", WIDTH, 1, 1)),
        *(weight("w1", WIDTH, 16), weight("b1", 16), weight("w2", 16, WIDTH), weight("gamma", WIDTH)),
        *(weight("beta", WIDTH), numpy_helper.from_array(np.array(1e-3, dtype), "eps")),
        *(numpy_helper.from_array(np.array(2, dtype), "two"), ints("first", 0), ints("tail", -1, WIDTH)),
        *(
            numpy_helper.from_array(np.zeros((1, 1, 1), bool), "mask"),
            numpy_helper.from_array(np.array(-9, dtype), "fill"),
        ),
        ints("spatial", 2, 3),
    ]
    axes_are_inputs = opset >= 18
    mean = [("x3", "m"), ("square", "variance")]
    means = [
        node("ReduceMean", [given, "last"], [made], keepdims=1)
        if axes_are_inputs
        else node("ReduceMean", [given], [made], axes=[-1], keepdims=1)
        for given, made in mean
    ]
    weights += [ints("last", -1)] if axes_are_inputs else []
    nodes = [
        node("Conv", ["image", "kernel", "offset"], ["c0"], pads=[1, 1, 1, 1]),
        node("Mul", ["c0", "scale"], ["c1"]),
        node("Relu", ["c1"], ["c2"]),
        node("Shape", ["c2"], ["shape"]),
        node("Gather", ["shape", "first"], ["batch"], axis=0),
        node("Concat", ["batch", "tail"], ["target"], axis=0),
        node("Transpose", ["c2"], ["x1"], perm=[0, 2, 3, 1]),
        node("Reshape", ["x1", "target"], ["x2"]),
        node("Where", ["mask", "fill", "x2"], ["x3"]),
        means[0],
        node("Sub", ["x3", "m"], ["d"]),
        node("Pow", ["d", "two"], ["square"]),
        means[1],
        node("Add", ["variance", "eps"], ["v1"]),
        node("Sqrt", ["v1"], ["root"]),
        node("Div", ["d", "root"], ["n0"]),
        node("Mul", ["n0", "gamma"], ["n1"]),
        node("Add", ["n1", "beta"], ["n2"]),
        node("MatMul", ["n2", "w1"], ["h0"]),
        node("Add", ["h0", "b1"], ["h1"]),
        node("Relu", ["h1"], ["h2"]),
        node("MatMul", ["h2", "w2"], ["h3"]),
        node("Identity", ["h3"], ["h4"]),
        node("Add", ["h4", "x3"], ["out"]),
    ]
    for number, each in enumerate(nodes):
        each.name = f"node{number}"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", kind, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("out", kind, [None, None, WIDTH])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def images(rng: np.random.Generator, dtype: type = np.float32) -> list[dict[str, Array]]:
    return [{"image": rng.standard_normal(shape).astype(dtype)} for shape in ((2, 3, 5, 4), (3, 3, 4, 7))]


def load(proto: onnx.ModelProto) -> ir.Model:
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


QUICK_OPSETS = (9, 11, 13, 17, 18, 22)
"""Each is the first with another form of some op here; the slow tests take those between."""


@pytest.mark.parametrize(
    "opset", [pytest.param(n, marks=[] if n in QUICK_OPSETS else pytest.mark.slow) for n in range(9, 23)]
)
def test_opsets(opset: int, check_pipelines: Check, rng: np.random.Generator) -> None:
    check_pipelines(load(network(rng, opset)), images(rng))


def test_half_precision(check_pipelines: Check, rng: np.random.Generator) -> None:
    check_pipelines(load(network(rng, 17, np.float16)), images(rng, np.float16))


def test_half_precision_weights_under_casts(check_pipelines: Check, rng: np.random.Generator) -> None:
    proto = network(rng, 17)
    for tensor in [t for t in proto.graph.initializer if t.name in ("kernel", "w1", "w2")]:
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}_half")
        proto.graph.node.insert(0, helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.append(half)
    check_pipelines(load(proto), images(rng))


def test_constant_nodes(check_pipelines: Check, rng: np.random.Generator) -> None:
    proto = network(rng, 17)
    for number, tensor in enumerate(list(proto.graph.initializer)):
        proto.graph.node.insert(
            0, helper.make_node("Constant", [], [tensor.name], name=f"constant{number}", value=tensor)
        )
    del proto.graph.initializer[:]
    check_pipelines(load(proto), images(rng))


@pytest.mark.parametrize("name", ["", "same"])
def test_names_that_are_missing_or_repeated(name: str, check_pipelines: Check, rng: np.random.Generator) -> None:
    proto = network(rng, 17)
    for node in proto.graph.node:
        node.name = name
    model = load(proto)
    for node in model.graph:  # loading gives names to the nameless
        node.name = name or None
    check_pipelines(model, images(rng))


def test_initializers_as_inputs(check_pipelines: Check, rng: np.random.Generator) -> None:
    proto = network(rng, 11)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    proto.ir_version = 3
    check_pipelines(load(proto), images(rng))


def test_local_functions(check_pipelines: Check, rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[batch, tokens, 8] x) => (float[batch, tokens, 8] y) {
        a = local.Norm <epsilon = 0.01> (x)
        b = local.Twice (a)
        y = local.Norm <epsilon = 0.1> (b)
    }
    <domain: "local", opset_import: ["" : 17]>
    Norm <epsilon: float = 0.001> (x) => (n) {
        m = ReduceMean <axes = [-1]> (x)
        d = Sub (x, m)
        s = Mul (d, d)
        v = ReduceMean <axes = [-1]> (s)
        e = Constant <value_float: float = @epsilon> ()
        ve = Add (v, e)
        r = Sqrt (ve)
        n = Div (d, r)
    }
    <domain: "local", opset_import: ["" : 17, "local" : 1]>
    Twice (x) => (y) {
        i = Identity (x)
        two = Constant <value = float {2.0}> ()
        y = Mul (i, two)
    }"""
    feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for shape in ((2, 3, 8), (1, 5, 8))]
    check_pipelines(ir.from_proto(onnx.parser.parse_model(text)), feeds)


def test_if_and_loop(check_pipelines: Check, rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4] x, bool c, int64 count) => (float[n, 4] y, float[n, 4] z) <bool yes = {1}> {
        t = Transpose <perm = [1, 0]> (x)
        u = Transpose <perm = [1, 0]> (t)
        y = If (c) <
            then_branch = a () => (float[n, 4] p) { one = Constant <value = float {1.0}> ()  p = Add (u, one) },
            else_branch = b () => (float[n, 4] q) { i = Identity (u)  q = Relu (i) }
        >
        z = Loop (count, yes, u) <
            body = l (int64 step, bool going, float[n, 4] state) => (bool on, float[n, 4] next) {
                on = Identity (going)
                half = Constant <value = float {0.5}> ()
                scaled = Mul (state, half)
                next = Add (scaled, x)
            }
        >
    }"""
    feeds = [
        {"x": rng.standard_normal((n, 4)).astype(np.float32), "c": np.array(c), "count": np.array(count)}
        for n, c, count in ((3, True, 2), (5, False, 0), (2, False, 3))
    ]
    check_pipelines(ir.from_proto(onnx.parser.parse_model(text)), feeds)


def test_free_dimensions_without_a_name(check_pipelines: Check, rng: np.random.Generator) -> None:
    proto = network(rng, 12)
    for dim in proto.graph.input[0].type.tensor_type.shape.dim:
        if dim.dim_param:
            dim.dim_param = "?"  # as Paddle's exporter writes every one of them
    check_pipelines(load(proto), images(rng))
