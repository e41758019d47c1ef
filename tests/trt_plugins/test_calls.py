"""Calls of ops brought into the form in which TensorRT's parser finds plugins."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest

from optframe import ops
from optframe.errors import InputError
from optframe_anchordetr.ops import LAYER_NORM, SKIP_LAYER_NORM
from optframe_trt import calls
from optframe_trt.fields import INPUTS


def model(*, scale: bool, bias: bool, outputs: int = 2) -> ir.Model:
    x, skip = (ir.val(name, ir.DataType.FLOAT, (3, 8)) for name in ("x", "skip"))
    vectors = [ir.val(n, ir.DataType.FLOAT, (8,)) if there else None for n, there in (("s", scale), ("b", bias))]
    inputs = [x, skip, *(v for v in vectors if v is not None)]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="g")
    result = ir.Model(graph, ir_version=8)
    graph.append(ops.call(result, SKIP_LAYER_NORM, [x, skip, *vectors], {}, outputs))
    between = graph[0].outputs[0]
    between.name, between.type = "between", ir.TensorType(ir.DataType.FLOAT)
    graph.append(ops.call(result, LAYER_NORM, [between]))
    graph.outputs.append(graph[1].outputs[0])
    graph.outputs[0].name = "y"
    return result


@pytest.mark.parametrize(
    ("scale", "bias", "attribute", "aot"),
    [
        (True, True, None, "SkipLayerNorm"),
        (True, False, None, "SkipLayerNorm_without_bias"),
        (False, True, "x,skip,bias", "SkipLayerNorm_without_scale"),
        (False, False, None, "SkipLayerNorm_without_scale_bias"),
    ],
)
def test_present_inputs_are_told(scale: bool, bias: bool, attribute: str | None, aot: str) -> None:
    python, ahead = model(scale=scale, bias=bias), model(scale=scale, bias=bias)
    assert calls.prepare(python, [SKIP_LAYER_NORM]) == calls.prepare(ahead, [SKIP_LAYER_NORM], aot=True) == 1
    node = python.graph[0]
    assert (INPUTS in node.attributes) == (attribute is not None)
    assert attribute is None or node.attributes[INPUTS].as_string() == attribute
    assert len(node.inputs) == 2 + scale + bias
    assert None not in node.inputs
    assert (node.op_type, node.attributes["plugin_namespace"].as_string()) == ("SkipLayerNorm", "optframe.anchordetr")
    node = ahead.graph[0]
    assert (node.op_type, node.attributes["plugin_namespace"].as_string()) == (aot, "optframe_anchordetr")
    assert node.attributes["aot"].as_int() == 1


def test_attributes_are_written_out() -> None:
    prepared = model(scale=True, bias=True)
    prepared.graph[0].attributes.clear()
    calls.prepare(prepared, [SKIP_LAYER_NORM])
    assert prepared.graph[0].attributes["epsilon"].as_float() == pytest.approx(1e-5)


def test_outputs_names_and_functions() -> None:
    prepared = model(scale=True, bias=True, outputs=1)
    assert len(prepared.functions) == 2
    assert calls.prepare(prepared, [SKIP_LAYER_NORM]) == 1
    assert not prepared.functions  # the other op's is inlined
    first, *others = prepared.graph
    assert {node.domain for node in others} == {""}
    assert [value.name for value in first.outputs] == ["between", "between_1"]
    assert first.name
    ir.to_proto(prepared)  # can be written


def test_calls_inside_functions_are_found() -> None:
    inner = model(scale=True, bias=True)
    body = ir.Function("made.up", "Twice", graph=inner.graph, attributes=[])
    body.opset_imports.update({"": 18, SKIP_LAYER_NORM.domain: 1})
    inputs = [ir.val(value.name or "", value.dtype, value.shape) for value in inner.graph.inputs]
    node = ir.node("Twice", inputs, domain="made.up")
    node.outputs[0].name, node.outputs[0].type = "result", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 18, "made.up": 1}, name="outer")
    outer = ir.Model(graph, ir_version=8, functions=[body, *inner.functions.values()])
    outer.opset_imports[SKIP_LAYER_NORM.domain] = 1
    assert calls.prepare(outer, [SKIP_LAYER_NORM, LAYER_NORM]) == 2
    assert [node.op_type for node in outer.graph] == ["SkipLayerNorm", "LayerNorm"]
    assert not outer.functions


def test_an_op_of_onnx_keeps_its_name_from_the_plugin() -> None:
    assert calls.plugin_name(LAYER_NORM) == "LayerNorm"
    assert calls.plugin_name(replace(LAYER_NORM, name="LayerNormalization")) == "LayerNormalizationPlugin"


def test_an_attribute_of_another_type_is_refused() -> None:
    odd = model(scale=True, bias=True)
    odd.graph[0].name = "norm"
    odd.graph[0].attributes.add(ir.AttrInt64("epsilon", 1))
    with pytest.raises(InputError, match=r"node 'norm': attribute 'epsilon' of .* is int, and has to be float"):
        calls.prepare(odd, [SKIP_LAYER_NORM])
