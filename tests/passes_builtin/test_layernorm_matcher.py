"""What the matcher of layer normalisations finds, and why it leaves the rest."""

from __future__ import annotations

import re

import onnx.parser
import onnx_ir as ir
import pytest

from optframe.passes import PassContext
from optframe_passes.edit import FreshNames
from optframe_passes.layernorm_matcher import LayerNormMatch, find_layernorms

TYPICAL = """
    m = ReduceMean <axes = [-1]> (x)
    d = Sub (x, m)
    two = Constant <value_float = 2.0> ()
    q = Pow (d, two)
    v = ReduceMean <axes = [-1]> (q)
    e = Constant <value_float = 0.25> ()
    s = Add (v, e)
    r = Sqrt (s)
    n = Div (d, r)
    g = Mul (n, scale)
    y = Add (g, bias)
"""


def build(body: str, inputs: str = "", outputs: str = "float[2, 5, 8] y", x: str = "float[2, 5, 8]") -> ir.Model:
    """A model of opset 17 with inputs x, scale and bias (8,), and `inputs`."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g ({x} x, float[8] scale, float[8] bias{inputs}) => ({outputs}) {{ {body} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def find(model: ir.Model) -> tuple[list[LayerNormMatch], dict[str, str]]:
    context = PassContext(pass_name="test")
    matches = find_layernorms(model, context)
    assert len({miss.node for miss in context.near_misses}) == len(context.near_misses), "one reason a node"
    return matches, {miss.op_type: miss.reason for miss in context.near_misses}


def names(values: tuple[ir.Value | None, ...]) -> list[str | None]:
    return [None if value is None else value.name for value in values]


def test_typical_form() -> None:
    model = build(TYPICAL)
    (match,), misses = find(model)
    assert not misses
    assert names((match.x, match.scale, match.bias, match.output)) == ["x", "scale", "bias", "y"]
    assert (match.epsilon, match.axis, match.dims, match.dtype) == (0.25, -1, (8,), ir.DataType.FLOAT)
    assert not match.native
    assert match.nodes[-1] is match.output.producer()
    assert sorted(node.op_type for node in match.nodes) == sorted(
        ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
    )


def test_native_form() -> None:
    (match,), misses = find(build("y = LayerNormalization <axis = 2, epsilon = 0.5> (x, scale)"))
    assert match.native
    assert names((match.x, match.scale, match.bias, match.output)) == ["x", "scale", None, "y"]
    assert (match.epsilon, match.axis) == (0.5, -1)
    assert not misses


def test_native_form_whose_statistics_are_used() -> None:
    model = build("y, mean, inv = LayerNormalization (x, scale)", outputs="float[2, 5, 8] y, float[2, 5, 1] mean")
    assert find(model) == ([], {"LayerNormalization": "its Mean or InvStdDev output is used"})


@pytest.mark.parametrize(
    ("before", "after", "op_type", "reason"),
    [
        ("v = ReduceMean <axes = [-1]> (q)", "v = ReduceMean <axes = [1, 2]> (q)", "ReduceMean", "over other axes"),
        ("v = ReduceMean <axes = [-1]> (q)", "v = ReduceSum (q)", "ReduceSum", "does not average"),
        ("<axes = [-1]> (q)", "<axes = [-1], keepdims = 0> (q)", "ReduceMean", "does not keep its axes"),
        ("s = Add (v, e)", "f = Constant <value_float = 1.25> () w = Mul (v, f) s = Add (w, e)", "Mul", "ddof"),
        ("s = Add (v, e)", "s = Add (v, tail)", "Add", "no constant scalar"),
        ("value_float = 0.25", "value_float = -0.25", "Add", "no constant scalar"),
        ("value_float = 0.25", "value_floats = [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]", "Add", "no constant"),
        ("r = Sqrt (s)", "r = Exp (s)", "Exp", "no Sqrt"),
        ("r = Sqrt (s)", "r = Identity (s)", "Identity", "no Sqrt"),
        ("s = Add (v, e)\n    r = Sqrt (s)", "r = Sqrt (v)", "Sqrt", "no epsilon"),
        ("s = Add (v, e)\n    r = Sqrt (s)", "t = Sqrt (v) r = Add (t, e)", "Sqrt", "no epsilon"),
        ("r = Sqrt (s)", "t = Sqrt (s) r = Add (t, e)", "Add", "outside of the root"),
        ("n = Div (d, r)", "n = Div (x, r)", "Div", "not the deviation"),
        ("n = Div (d, r)", "n = Div (r, d)", "Div", "does not divide by the root"),
        ("n = Div (d, r)", "n = Mul (d, r)", "Mul", "does not divide by the root"),
        ("d = Sub (x, m)", "d = Sub (m, x)", "Div", "mean - x"),
        ("q = Pow (d, two)", "q = Pow (d, e)", "ReduceMean", "squared 0 times"),
        ("q = Pow (d, two)", "q = Mul (d, x)", "ReduceMean", "squared 0 times"),
        ("q = Pow (d, two)", "q = Mul (d, d) unused = Pow (d, two)", "ReduceMean", "squared 2 times"),
        ("m = ReduceMean <axes = [-1]> (x)", "m = ReduceMean <axes = [1]> (x)", "ReduceMean", "not the last ones"),
        ("m = ReduceMean <axes = [-1]> (x)", "m = ReduceMean <axes = [0, 2]> (x)", "ReduceMean", "not the last ones"),
        ("m = ReduceMean <axes = [-1]> (x)", "m = ReduceMax <axes = [-1]> (x)", "ReduceMean", "not subtracted"),
    ],
)
def test_what_is_no_layer_normalisation(before: str, after: str, op_type: str, reason: str) -> None:
    assert before in TYPICAL
    matches, misses = find(build(TYPICAL.replace(before, after), inputs=", float tail"))
    assert not matches
    assert reason in misses[op_type]


@pytest.mark.parametrize("value", ["m", "d", "q", "v", "s", "r"])
@pytest.mark.parametrize("how", ["consumer", "graph output"])
def test_what_others_use_stays(value: str, how: str) -> None:
    body = f"{TYPICAL} other = Neg ({value})" if how == "consumer" else TYPICAL
    outputs = "float[2, 5, 8] y, " + ("float[a, b, c] other" if how == "consumer" else f"float[a, b, c] {value}")
    matches, misses = find(build(body, outputs=outputs))
    assert not matches
    assert any("outside of the normalisation" in reason for reason in misses.values())


@pytest.mark.parametrize("how", ["consumer", "graph output"])
def test_scale_and_bias_stay_outside_if_what_is_before_them_is_used(how: str) -> None:
    body, outputs = TYPICAL, "float[2, 5, 8] y, float[2, 5, 8] n"
    if how == "consumer":
        body, outputs = f"{TYPICAL} other = Neg (n)", "float[2, 5, 8] y, float[2, 5, 8] other"
    (match,), _ = find(build(body, outputs=outputs))
    assert names((match.scale, match.bias, match.output)) == [None, None, "n"]


def test_deviation_is_not_its_own_scale() -> None:
    model = build(TYPICAL.replace("g = Mul (n, scale)", "g = Mul (n, n)"), x="float[8]", outputs="float[8] y")
    (match,), _ = find(model)
    assert names((match.scale, match.output)) == [None, "n"]


@pytest.mark.parametrize("shape", ["float[5, 8]", "float[2, 1, 8]", "float[1]", "float[k]", "float[1, 8]"])
def test_dynamic_scale_of_another_shape_stays_outside(shape: str) -> None:
    model = build(TYPICAL.replace("(n, scale)", "(n, other)"), inputs=f", {shape} other")
    (match,), _ = find(model)
    assert names((match.scale, match.output)) == [None, "n"]


def test_constant_scale_that_enlarges_the_result_stays_outside() -> None:
    body = "one = Constant <value_float = 1.0> () big = Expand (x, shape)" + TYPICAL.replace("(n, scale)", "(n, grown)")
    model = build(
        body + "z = Identity (big)", inputs=", int64[3] shape, float[3, 5, 8] grown", outputs="float[3, 5, 8] y"
    )
    grown = next(value for value in model.graph.inputs if value.name == "grown")
    model.graph.inputs.remove(grown)
    grown.const_value = ir.tensor([[[2.0] * 8] * 5] * 3, dtype=ir.DataType.FLOAT, name="grown")
    model.graph.register_initializer(grown)
    (match,), misses = find(model)
    assert names((match.scale, match.output)) == [None, "n"]
    assert "enlarges" in misses["Mul"]


def test_shapes_of_constant_parameters() -> None:
    body = "two = Constant <value_float = 2.0> ()" + TYPICAL.replace("two = Constant <value_float = 2.0> ()", "")
    (match,), _ = find(build(body.replace("(n, scale)", "(two, n)")))
    assert match.scale is not None
    model = build(body)
    made = match.parameter(match.scale, FreshNames(model))
    assert made.const_value is not None
    assert made.const_value.numpy().tolist() == [2.0] * 8


@pytest.mark.parametrize("type_name", ["double", "int64"])
def test_types_without_float32_statistics(type_name: str) -> None:
    body = TYPICAL.replace("value_float = 2.0", "value = double {2.0}").replace(
        "value_float = 0.25", "value = double {0.25}"
    )
    if type_name == "int64":
        body = "w = Cast <to = 11> (x)" + body.replace("(x", "(w")
    body = body.replace("(n, scale)", "(n, n)").replace("(g, bias)", "(g, n)")
    matches, misses = find(build(body, x=f"{type_name}[2, 5, 8]", outputs="double[2, 5, 8] y"))
    assert not matches
    assert "not computed in float32" in misses["ReduceMean"]


def test_unknown_shapes_are_a_reason() -> None:
    model = build("k = com.example.Strange (x)" + TYPICAL.replace("(x", "(k"))
    matches, misses = find(model)
    assert not matches
    assert misses["ReduceMean"] == "the shape of its input is not known"


def test_means_of_attention_keys_are_left_alone() -> None:
    model = build("y = ReduceMean <axes = [1], keepdims = 0> (x)", outputs="float[2, 8] y")
    assert find(model) == ([], {"ReduceMean": "its result is not subtracted from its input: no layer normalisation"})


def test_every_layer_normalisation_of_a_chain_is_found_once() -> None:
    names_of_second = {name: f"{name}2" for name in ("m", "d", "two", "q", "v", "e", "s", "r", "n", "g", "y")} | {
        "x": "y"
    }
    second = re.sub(r"\b[a-z]+\b(?! <| \()", lambda found: names_of_second.get(found[0], found[0]), TYPICAL)
    matches, misses = find(build(TYPICAL + second, outputs="float[2, 5, 8] y2"))
    assert not misses
    assert [names((m.x, m.output)) for m in matches] == [["x", "y"], ["y", "y2"]]
    assert not set(matches[0].nodes) & set(matches[1].nodes)
