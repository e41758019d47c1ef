"""Calls of plugin ops in a model: functions attached once, overloads where forms differ, stripped and inlined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import graph, ops
from optframe.errors import InputError, PluginError
from optframe.types import KernelSpec, OpAttribute, OpParameter, OpSpec, TensorInfo


def shift_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    """y = x + by, or x + amount where `by` is absent."""
    given = "by" in dtypes
    text = f"""
        <domain: "test.ops", opset_import: ["" : {opset}]>
        Shift <amount: float = 1.0> ({"x, by" if given else "x"}) => (y) {{
            a = Constant <value_float: float = @amount> ()
            d = CastLike ({"by" if given else "a"}, x)
            y = Add (x, d)
        }}"""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def same_shape(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]:
    assert inputs[0] is not None
    return (inputs[0],)


SHIFT = OpSpec(
    name="Shift",
    domain="test.ops",
    inputs=(OpParameter("x"), OpParameter("by", optional=True)),
    outputs=(OpParameter("y"),),
    attributes={"amount": OpAttribute("float", 1.0)},
    function=f"{__name__}:shift_function",
    shape_rule=f"{__name__}:same_shape",
)
"""An op without a kernel."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this module what `SHIFT` refers to: pytest's importlib mode gives it no importable name."""
    monkeypatch.setattr(OpSpec, "build_function", lambda self, opset, dtypes: shift_function(opset, dtypes))


def tensor(name: str, dtype: ir.DataType | None = ir.DataType.FLOAT, shape: Sequence[int | str] = (2, 3)) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=None if dtype is None else ir.TensorType(dtype))


def chain(*inputs_of_calls: Sequence[ir.Value], ir_version: int = 7, attributes: Sequence[dict] = ()) -> ir.Model:
    """A model whose outputs are one call each."""
    inputs = list(dict.fromkeys(value for values in inputs_of_calls for value in values))
    model = ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="calls"), ir_version=ir_version)
    for index, values in enumerate(inputs_of_calls):
        node = ops.call(model, SHIFT, values, attributes[index] if attributes else None)
        node.outputs[0].name, node.outputs[0].type = f"y{index}", values[0].type
        node.outputs[0].shape = values[0].shape
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    return model


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_one_function_serves_all_calls_of_one_form() -> None:
    x, by = tensor("x"), tensor("by")
    model = chain([x, by], [x, by], [x, by])
    assert list(model.functions) == [("test.ops", "Shift", "")]
    assert (model.opset_imports["test.ops"], model.ir_version) == (1, 8)
    for y in run(model, x=X, by=X):
        np.testing.assert_array_equal(y, 2 * X)


def test_another_form_becomes_an_overload() -> None:
    x, by = tensor("x"), tensor("by")
    model = chain([x, by], [x], [x], attributes=[{}, {"amount": 4.0}, {}])
    assert list(model.functions) == [("test.ops", "Shift", ""), ("test.ops", "Shift", "x_float32")]
    assert model.ir_version == 10
    for y, expected in zip(run(model, x=X, by=X), (2 * X, X + 4, X + 1), strict=True):
        np.testing.assert_array_equal(y, expected)


def test_a_function_that_went_through_a_file_is_used_again(tmp_path: object) -> None:
    x, by = tensor("x"), tensor("by")
    model = graph.load(graph.save(chain([x, by]), f"{tmp_path}/m.onnx"))
    assert ops.attach(model, SHIFT, {"x": "float32", "by": "float32"}) == ""
    assert len(model.functions) == 1


def test_defaults_are_written_to_the_node_and_absent_inputs_dropped() -> None:
    x = tensor("x")
    model = chain([x])
    node = ops.call(model, SHIFT, [x, None])
    assert node.attributes["amount"].as_float() == 1.0
    assert list(node.inputs) == [x]


def test_defaults_are_written_to_a_node_of_a_file() -> None:
    (node,) = chain([tensor("x")]).graph
    node.attributes.clear()
    ops.write_defaults(node, SHIFT)
    assert node.attributes["amount"].as_float() == 1.0
    node.attributes.add(ir.AttrFloat32("amount", 3.0))
    ops.write_defaults(node, SHIFT)
    assert node.attributes["amount"].as_float() == 3.0
    node.attributes.clear()
    with pytest.raises(InputError, match="needs its attribute 'amount'"):
        ops.write_defaults(node, dataclasses.replace(SHIFT, attributes={"amount": OpAttribute("float")}))


def test_tf32_is_permitted_where_an_op_declares_it() -> None:
    declaring = dataclasses.replace(SHIFT, attributes={**SHIFT.attributes, ops.ALLOW_TF32: OpAttribute("int", 0)})
    for spec, permitted in ((declaring, True), (SHIFT, False)):
        model = chain([tensor("x")])
        inside = ir.node("Shift", [tensor("inside")], domain="test.ops")
        body = ir.Graph(list(inside.inputs), inside.outputs, nodes=[inside], opset_imports={"": 18}, name="outer")
        function = ir.Function("test.ops", "Outer", "", graph=body, attributes=[])
        model.functions[function.identifier()] = function
        ops.permit_tf32(model, [spec])
        for node in (model.graph[0], inside):
            assert (ops.ALLOW_TF32 in node.attributes) == permitted
            assert not permitted or node.attributes[ops.ALLOW_TF32].as_int() == 1


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ([None], {}, "needs its input 'x'"),
        ([tensor("x"), tensor("b"), tensor("c")], {}, "takes 2 inputs, not 3"),
        ([tensor("x", None)], {}, "the type of 'x' is not known"),
        ([tensor("x", ir.DataType.DOUBLE)], {}, "takes no float64 as 'x'"),
        ([tensor("x")], {"amout": 1.0}, "has no attribute 'amout'"),
    ],
)
def test_what_does_not_fit_is_refused(inputs: list, attributes: dict, message: str) -> None:
    model = chain()
    with pytest.raises(InputError, match=message):
        ops.call(model, SHIFT, inputs, attributes)
    assert not model.functions


def test_required_attribute() -> None:
    strict = OpSpec("Shift", "test.ops", SHIFT.inputs, SHIFT.outputs, "", "", {"amount": OpAttribute("float")})
    with pytest.raises(InputError, match="needs its attribute 'amount'"):
        ops.call(chain(), strict, [tensor("x")])


def test_another_version_of_the_domain_is_an_error() -> None:
    model = chain()
    model.opset_imports["test.ops"] = 2
    with pytest.raises(PluginError, match="imports version 2"):
        ops.call(model, SHIFT, [tensor("x")])


def test_stripping_leaves_calls_for_a_runtimes_own_kernels() -> None:
    x, by = tensor("x"), tensor("by")
    model = chain([x, by], [x])
    assert ops.strip_functions(model, ["test.ops::Other"]) == 0
    assert ops.strip_functions(model, [SHIFT.identifier]) == 2
    assert [(n.op_identifier()) for n in model.graph] == [("test.ops", "Shift", "")] * 2
    assert graph.op_histogram(model) == {"test.ops::Shift": 2}


def test_inlining_keeps_what_it_is_told_to_keep() -> None:
    x, by = tensor("x"), tensor("by")
    model = chain([x, by], [x])
    assert not ops.inline_functions(model, keep=[SHIFT.identifier])
    assert ops.inline_functions(model)
    assert not model.functions
    assert {node.op_type for node in model.graph} == {"Add", "CastLike", "Constant"}
    for y, expected in zip(run(model, x=X, by=X), (2 * X, X + 1), strict=True):
        np.testing.assert_array_equal(y, expected)


def test_inlining_a_function_of_another_opset_is_an_error() -> None:
    x = tensor("x")
    model = chain([x])
    model.opset_imports[""] = 20
    with pytest.raises(InputError, match=r"cannot be inlined: .* opset 18 .* model 20"):
        ops.inline_functions(model)


def test_infinite_defaults_do_not_stop_a_call() -> None:
    x = tensor("x")
    model = chain([x], attributes=[{"amount": math.inf}])
    assert np.isinf(run(model, x=X)[0]).all()


@pytest.mark.parametrize("source", ["optframe:nowhere.cu", "no_such_package:kernel.cu"])
def test_a_kernel_without_source_is_named(source: str) -> None:
    with pytest.raises(PluginError, match=f"cannot read the CUDA source '{source}'"):
        KernelSpec(source, "a:b").read_source()
