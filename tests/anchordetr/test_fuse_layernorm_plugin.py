"""`fuse-layernorm-plugin` and `fuse-skip-layernorm-plugin`: op calls with functions that onnxruntime runs as before."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import graph
from optframe.errors import InputError
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_anchordetr.ops import DOMAIN, OPS
from optframe_anchordetr.passes.fuse_layernorm_plugin import FuseLayerNormPlugin, FuseSkipLayerNormPlugin

Array = np.ndarray[Any, Any]
REGISTERED = {spec.identifier: spec for spec in OPS}
OP = f"{DOMAIN}::LayerNorm"
SKIP_OP = f"{DOMAIN}::SkipLayerNorm"
WRITTEN_OUT = """m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) q = Mul (d, d) v = ReduceMean <axes = [-1]> (q)
    e = Constant <value_float = 0.01> () s = Add (v, e) r = Sqrt (s) n = Div (d, r) """


def parse(body: str, inputs: str = "float[2, 3, 8] x, float[8] scale", output: str = "float[2, 3, 8] y") -> ir.Model:
    text = f'<ir_version: 7, opset_import: ["" : 17]> g ({inputs}) => ({output}) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def apply(which: GraphPass, model: ir.Model, **options: Any) -> tuple[PassResult, list[str]]:
    context = PassContext(ops=REGISTERED, pass_name=which.name, **options)
    return which.run(model, context), [miss.reason for miss in context.near_misses]


def run(model: ir.Model, feeds: dict[str, Array]) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


def histogram(model: ir.Model) -> Counter[str]:
    return graph.op_histogram(model, REGISTERED)


def feeds_of(model: ir.Model, rng: np.random.Generator) -> dict[str, Array]:
    def draw(value: ir.Value) -> Array:
        assert value.shape is not None
        assert value.dtype is not None
        sizes = [dim if isinstance(dim, int) else 3 for dim in value.shape]
        return (rng.standard_normal(sizes) * 2 + 1).astype(value.dtype.numpy())

    return {value.name: draw(value) for value in model.graph.inputs if value.name}


# Values up to about 10, in two float32 evaluations.
TOLERANCE = 1e-5

FORMS = {
    "native": ("y = LayerNormalization <epsilon = 0.01> (x, scale)", {OP: 1}),
    "native with bias": ("y = LayerNormalization <axis = 2, epsilon = 0.01> (x, scale, scale)", {OP: 1}),
    "written out": (WRITTEN_OUT + "y = Mul (n, scale)", {OP: 1}),
    "without scale": (WRITTEN_OUT + "y = Relu (n)", {OP: 1, "Relu": 1}),
    "with bias only": (WRITTEN_OUT + "y = Add (n, scale)", {OP: 1}),
    "both forms": (WRITTEN_OUT + "y0 = Mul (n, scale) y = LayerNormalization (y0, scale)", {OP: 2}),
}


@pytest.mark.parametrize(("body", "expected"), FORMS.values(), ids=FORMS)
def test_forms(body: str, expected: dict[str, int], rng: np.random.Generator) -> None:
    model = parse(body)
    feeds = feeds_of(model, rng)
    before = run(model, feeds)[0]
    result, misses = apply(FuseLayerNormPlugin(), model)
    assert result == PassResult(True, expected[OP]), misses
    assert histogram(model) == expected
    assert model.opset_imports[DOMAIN] == 1
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=0, atol=TOLERANCE)
    assert apply(FuseLayerNormPlugin(), model)[0] == PassResult(False, 0)


def test_one_function_for_all_calls_and_the_body_counts_without_a_kernel() -> None:
    model = parse(
        "a = LayerNormalization (x, scale) b = LayerNormalization (a, scale) y = LayerNormalization (b, scale)"
    )
    apply(FuseLayerNormPlugin(), model)
    assert len(model.functions) == 1
    assert graph.op_histogram(model, REGISTERED) == {OP: 3}
    assert graph.op_histogram(model)["LayerNormalization"] == 3
    assert OP not in graph.op_histogram(model)


def test_parameters_of_other_shapes_become_vectors(rng: np.random.Generator) -> None:
    model = parse(
        "two = Constant <value_float = 2.0> () one = Constant <value = float[1, 1, 8] {1, 2, 3, 4, 5, 6, 7, 8}> ()"
        + WRITTEN_OUT
        + "g = Mul (n, one) y = Add (g, two)",
        inputs="float[2, 3, 8] x",
    )
    feeds = feeds_of(model, rng)
    before = run(model, feeds)[0]
    assert apply(FuseLayerNormPlugin(), model)[0] == PassResult(True, 1)
    call = next(node for node in model.graph if node.op_type == "LayerNorm")
    assert [str(value.shape) for value in call.inputs[1:] if value is not None] == ["[8]", "[8]"]
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=0, atol=1e-4)  # scaled by up to 8


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_float32_island_between_casts(half: str, rng: np.random.Generator) -> None:
    code = {"float16": 10, "bfloat16": 16}[half]
    model = parse(
        f"h = Cast <to = {code}> (x) w = Cast <to = 1> (h) l = LayerNormalization (w, scale) "
        f"b = Cast <to = {code}> (l) y = Cast <to = 1> (b)"
    )
    feeds = feeds_of(model, rng)
    before = run(model, feeds)[0]
    assert apply(FuseLayerNormPlugin(), model)[0] == PassResult(True, 1)
    assert histogram(model) == {"Cast": 2, OP: 1}
    (call,) = (node for node in model.graph if node.op_type == "LayerNorm")
    assert [value.dtype for value in call.inputs if value is not None] == [ir.DataType(code), ir.DataType.FLOAT]
    np.testing.assert_array_equal(run(model, feeds)[0], before)


def test_casts_that_others_need_stay(rng: np.random.Generator) -> None:
    statements = ["h = Cast <to = 10> (x)", "w = Cast <to = 1> (h)", "l = LayerNormalization (w, scale)"]
    statements += ["b = Cast <to = 10> (l)", "y = Cast <to = 1> (b)", "o = Neg (l)"]
    model = parse(" ".join(statements), output="float[2, 3, 8] y, float[2, 3, 8] o")
    feeds = feeds_of(model, rng)
    before = run(model, feeds)
    assert apply(FuseLayerNormPlugin(), model)[0] == PassResult(True, 1)
    assert histogram(model) == {"Cast": 4, OP: 1, "Neg": 1}
    for got, expected in zip(run(model, feeds), before, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ("y = LayerNormalization <axis = 1> (x, s2)", "float[2, 3, 8] x, float[3, 8] s2", "normalises 2 axes"),
        ("y = LayerNormalization (x, s2)", "double[2, 3, 8] x, double[8] s2", "takes no float64"),
        ("y, m = LayerNormalization (x, s2) z = Neg (m)", "float[2, 3, 8] x, float[8] s2", "InvStdDev output is used"),
    ],
)
def test_what_the_op_cannot_do(body: str, inputs: str, reason: str) -> None:
    model = parse(body, inputs=inputs, output="float[a, b, c] y" if "double" not in inputs else "double[a, b, c] y")
    result, misses = apply(FuseLayerNormPlugin(), model)
    assert result == PassResult(False, 0)
    assert reason in misses[0]
    assert not model.functions


def test_models_below_opset_15_must_be_lifted() -> None:
    model = parse(WRITTEN_OUT + "y = Mul (n, scale)")
    model.opset_imports[""] = 14
    result, misses = apply(FuseLayerNormPlugin(), model)
    assert result == PassResult(False, 0)
    assert misses == ["the plugin op needs opset 15: run lift-opset first"]


def test_native_nodes_in_functions_are_inlined_but_not_the_ops_own() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[2, 8] x, float[8] scale) => (float[2, 8] y) {
            a = f.Block (x, scale) y = LayerNormalization (a, scale) }
        <domain: "f", opset_import: ["" : 17]> Block (x, scale) => (y) {
            b = LayerNormalization (x, scale) y = Relu (b) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert apply(FuseLayerNormPlugin(), model)[0] == PassResult(True, 3)
    assert histogram(model) == {OP: 2, "Relu": 1}
    assert [(f.domain, f.name) for f in model.functions.values()] == [(DOMAIN, "LayerNorm")]
    assert apply(FuseLayerNormPlugin(), model)[0] == PassResult(False, 0)


def test_the_op_must_be_registered() -> None:
    with pytest.raises(InputError, match="unknown op"):
        FuseLayerNormPlugin().run(parse("y = LayerNormalization (x, scale)"), PassContext())


SKIP_INPUTS = "float[2, 3, 8] x, float[2, 3, 8] k, float[8] scale"
SUM_THEN_NORM = "t = Add (x, k) y = LayerNormalization (t, scale)"


def fused_sum(
    body: str, inputs: str = SKIP_INPUTS, output: str = "float[2, 3, 8] y"
) -> tuple[ir.Model, PassResult, list[str]]:
    model = parse(body, inputs, output)
    apply(FuseLayerNormPlugin(), model)
    return (model, *apply(FuseSkipLayerNormPlugin(), model))


@pytest.mark.parametrize(
    ("body", "output", "expected"),
    [
        (SUM_THEN_NORM, "float[2, 3, 8] y", {SKIP_OP: 1}),
        (SUM_THEN_NORM, "float[2, 3, 8] y, float[2, 3, 8] t", {SKIP_OP: 1}),
        (
            "t = Add (x, k) o = Neg (t) y = LayerNormalization (t, scale)",
            "float[2, 3, 8] y, float[2, 3, 8] o",
            {SKIP_OP: 1, "Neg": 1},
        ),
        (SUM_THEN_NORM + " u = Add (y, t) z = LayerNormalization (u, scale)", "float[2, 3, 8] z", {SKIP_OP: 2}),
        (
            "t = Add (x, k) a = LayerNormalization (t, scale) b = LayerNormalization (t, x8) y = Sub (a, b)",
            "float[2, 3, 8] y",
            {SKIP_OP: 1, OP: 1, "Sub": 1},
        ),
    ],
)
def test_sums(body: str, output: str, expected: dict[str, int], rng: np.random.Generator) -> None:
    inputs = SKIP_INPUTS + (", float[8] x8" if "x8" in body else "")
    plain = parse(body, inputs, output)
    feeds = feeds_of(plain, rng)
    model, result, misses = fused_sum(body, inputs, output)
    assert result == PassResult(True, expected[SKIP_OP]), misses
    assert histogram(model) == expected
    for got, wanted in zip(run(model, feeds), run(plain, feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)
    again, _ = apply(FuseSkipLayerNormPlugin(), model)
    assert again == PassResult(False, 0)


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        (SUM_THEN_NORM, "float[2, 3, 8] x, float[8] k, float[8] scale", "not known to have the same shape"),
        (SUM_THEN_NORM, "float[n, 3, 8] x, float[m, 3, 8] k, float[8] scale", "not known to have the same shape"),
        (
            "t = Add (x, k) s = ReduceMax <axes = [0, 1], keepdims = 0> (t) y = LayerNormalization (t, s)",
            SKIP_INPUTS,
            "made after the sum",
        ),
    ],
)
def test_sums_that_stay(body: str, inputs: str, reason: str) -> None:
    _, result, misses = fused_sum(body, inputs, output="float[a, b, c] y")
    assert result == PassResult(False, 0)
    assert reason in misses[0]


def test_dynamic_sums_of_one_name(rng: np.random.Generator) -> None:
    model, result, _ = fused_sum(
        SUM_THEN_NORM, "float[n, 3, 8] x, float[n, 3, 8] k, float[8] scale", "float[n, 3, 8] y"
    )
    assert result == PassResult(True, 1)
    assert [str(value.shape) for value in model.graph.inputs] == ["[n,3,8]", "[n,3,8]", "[8]"]
    assert run(model, feeds_of(model, rng))[0].shape == (3, 3, 8)


def test_every_rewrite_is_asked_for() -> None:
    asked: list[str] = []
    model = parse(FORMS["both forms"][0])
    result, _ = apply(FuseLayerNormPlugin(), model, allow_rewrite=lambda what: asked.append(what) is not None)
    assert result == PassResult(False, 0)
    assert len(asked) == 2
    assert not model.functions


def test_a_refused_normalisation_leaves_its_values_untouched() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2,3,8] x, float[3,8] s) => (float[2,3,8] y)
        { r = Relu (x) y = LayerNormalization <axis = -2> (r, s) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    result, reasons = apply(FuseLayerNormPlugin(), model)
    assert not result.modified
    assert reasons == ["it normalises 2 axes, the plugin op only the last one"]
    assert model.graph[0].outputs[0].type is None


def test_a_rewrite_that_is_not_allowed_leaves_its_values_untouched() -> None:
    model = parse("r = Relu (x) y = LayerNormalization (r, scale)")
    assert not apply(FuseLayerNormPlugin(), model, allow_rewrite=lambda _: False)[0].modified
    assert model.graph[0].outputs[0].type is None
