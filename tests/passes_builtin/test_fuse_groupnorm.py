"""`fuse-groupnorm`: from InstanceNormalization between reshapes to GroupNormalization of opset 21."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from optframe.passes import PassContext, PassResult
from optframe_passes.fuse_groupnorm import FuseGroupNorm

Array = np.ndarray[Any, Any]

BODY = """
    to = Constant <value_ints = [0, 2, -1]> () back = Constant <value_ints = [2, 6, 4, 5]> ()
    gs = Constant <value_floats = [1.0, 2.0]> () gb = Constant <value_floats = [0.5, 0.0]> ()
    w = Constant <value = float[6, 1, 1] {1, 2, 3, 4, 5, 6}> ()
    b = Constant <value = float[6, 1, 1] {6, 5, 4, 3, 2, 1}> ()
    r = Reshape (x, to) n = InstanceNormalization <epsilon = 0.01> (r, gs, gb) m = Reshape (n, back)
"""


def parse(body: str, opset: int = 21, outputs: str = "float[2, 6, 4, 5] y") -> ir.Model:
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> g (float[2, 6, 4, 5] x) => ({outputs}) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def fuse(model: ir.Model, **options: Any) -> tuple[PassResult, list[str]]:
    context = PassContext(pass_name="fuse-groupnorm", **options)
    return FuseGroupNorm().run(model, context), [miss.reason for miss in context.near_misses]


def run(model: ir.Model, x: Array) -> Array:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    name = model.graph.inputs[0].name
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {name: x})[0]


def ops_of(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("s = Mul (m, w) y = Add (s, b)", {}),
        ("s = Mul (w, m) y = Add (b, s)", {}),
        ("y = Mul (m, w)", {}),
        ("y = Add (m, b)", {}),
        ("two = Constant <value_float = 2.0> () y = Mul (m, two)", {}),
        ("y = Relu (m)", {"Relu": 1}),
        ("s = Mul (m, x) y = Add (s, b)", {"Mul": 1, "Add": 1}),
    ],
)
def test_forms(tail: str, expected: dict[str, int], rng: np.random.Generator) -> None:
    model = parse(BODY + tail)
    x = (rng.standard_normal((2, 6, 4, 5)) * 3 + 1).astype(np.float32)
    before = run(model, x)
    assert fuse(model)[0] == PassResult(True, 1)
    assert ops_of(model) == {"GroupNormalization": 1, **expected}
    np.testing.assert_allclose(
        run(model, x), before, rtol=1e-5, atol=1e-4
    )  # two float32 evaluations, scaled by up to 12
    assert fuse(model)[0] == PassResult(False, 0)


GROUPED = "y = Identity (m)"
GROUPED_OUTPUT = "float[2, 6, 4, 5] y"


@pytest.mark.parametrize(
    ("change", "outputs", "reason"),
    [
        (("r = Reshape (x, to)", "r = Relu (x)"), GROUPED_OUTPUT, "between two reshapes"),
        (("[2, 6, 4, 5]> ()", "[2, 4, 6, 5]> ()"), "float[2, 4, 6, 5] y", "groups and back"),
        (("[0, 2, -1]", "[4, 1, -1]"), GROUPED_OUTPUT, "groups of one size"),
        (("(r, gs, gb)", "(r, gx, gb)"), GROUPED_OUTPUT, "not constant"),
        (("(x, to)", "(x, to) o = Neg (r)"), f"{GROUPED_OUTPUT}, float[2, 2, 60] o", "elsewhere"),
        (("(n, back)", "(n, back) o = Neg (n)"), f"{GROUPED_OUTPUT}, float[2, 2, 60] o", "between two reshapes"),
    ],
)
def test_what_stays(change: tuple[str, str], outputs: str, reason: str) -> None:
    assert change[0] in BODY
    body = BODY.replace(*change) + GROUPED
    if "gx" in body:
        body = body.replace("n = Instance", "gx = ReduceMax <axes = [0, 2], keepdims = 0> (r) n = Instance")
    model = parse(body, opset=17 if "gx" in body else 21, outputs=outputs)
    result, misses = fuse(model)
    assert result == PassResult(False, 0)
    assert reason in misses[0]


@pytest.mark.parametrize("opset", [18, 20])
def test_a_match_raises_the_opset(opset: int, rng: np.random.Generator) -> None:
    model = parse(BODY + "s = Mul (m, w) y = Add (s, b)", opset)
    x = rng.standard_normal((2, 6, 4, 5)).astype(np.float32)
    before = run(model, x)
    assert fuse(model)[0] == PassResult(True, 1)
    assert (model.opset_imports[""], model.ir_version) == (21, 10)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-4)  # as above


def test_without_a_match_the_opset_stays() -> None:
    model = parse(
        "y = InstanceNormalization (x, w, w) " + BODY.split("r = ")[0].replace("float[6, 1, 1]", "float[6]"), 18
    )
    assert fuse(model)[0] == PassResult(False, 0)
    assert model.opset_imports[""] == 18


@pytest.mark.parametrize(
    ("tail", "opset", "reason"),
    [
        (
            "g = Constant <value = float[2, 4, 5, 2] {0}> () y = GridSample (m, g)",
            18,
            "GridSample means something else",
        ),
        ("y = Identity (m)", 17, "opset 17: run lift-opset first"),
    ],
)
def test_the_opset_is_not_raised_where_that_changes_a_meaning(tail: str, opset: int, reason: str) -> None:
    tail = tail.replace("{0}", "{" + ", ".join(["0"] * 80) + "}")
    model = parse(BODY + tail, opset)
    result, misses = fuse(model)
    assert result == PassResult(False, 0)
    assert reason in misses[0]
    assert model.opset_imports[""] == opset


@pytest.mark.parametrize("groups", [1, 4])
def test_torch_module(groups: int) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.GroupNorm(groups, 8)).eval()
    torch.nn.init.normal_(module[1].weight)
    torch.nn.init.normal_(module[1].bias)
    x, buffer = torch.randn(2, 3, 5, 7), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), buffer, opset_version=20, dynamo=False)
        expected = module(x).numpy()
    proto = onnx.load_from_string(buffer.getvalue())
    proto.opset_import[0].version = 21  # none of these ops changed its meaning
    model = ir.from_proto(proto)
    assert fuse(model)[0] == PassResult(True, 1)
    assert ops_of(model)["GroupNormalization"] == 1
    assert not {"InstanceNormalization", "Mul", "Add"} & set(ops_of(model))
    np.testing.assert_allclose(run(model, x.numpy()), expected, rtol=0, atol=1e-5)


def test_reshapes_in_another_graph_are_none_of_it(check: Any) -> None:
    text = """g (float[2,8,5] x, bool k) => (float[A,B,C] y)
        <int64[3] sh = {0, 4, -1}, int64[3] sh2 = {2, 8, 5}, float[4] sc = {1, 1, 1, 1}, float[4] bi = {0, 0, 0, 0}> {
        a = Reshape (x, sh)  b = InstanceNormalization (a, sc, bi)
        y = If (k) <then_branch = t () => (float[2,8,5] q) { q = Reshape (b, sh2) },
                    else_branch = e () => (float[2,8,5] r) { r = Identity (x) }> }"""
    assert not check(FuseGroupNorm(), text, opset=21).result.modified
