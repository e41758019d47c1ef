"""`fuse-layernorm` on written-out forms of all kinds and on exports of torch modules: fused, and numerically equal."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optframe.passes import ORIGIN_KEY, PASS_KEY, PassContext, PassResult
from optframe_passes.fuse_layernorm import FuseLayerNorm

Array = np.ndarray[Any, Any]


def fuse(model: ir.Model, **options: Any) -> tuple[PassResult, list[str]]:
    context = PassContext(pass_name="fuse-layernorm", **options)
    return FuseLayerNorm().run(model, context), [miss.reason for miss in context.near_misses]


def run(model: ir.Model, feeds: dict[str, Array]) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its own fusion of layer normalisations writes an invalid node where casts are around one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


def ops_of(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes() if node.op_type != "Constant")


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


@dataclass(frozen=True)
class Form:
    """One way to write a layer normalisation out, over the last `axes` of x (2, 3, 4, 5)."""

    opset: int
    axes: int = 1
    positive_axes: bool = False
    square: str = "Pow (d, two)"
    twice: str = "once"
    epsilon_first: bool = False
    quotient: str = "div"
    scale: str | None = "n, scale"
    bias: str | None = "g, bias"
    parameters: str = "initializer"
    unsqueeze: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        return (2, 3, 4, 5)[4 - self.axes :]

    def mean(self, result: str, operand: str) -> str:
        """ReduceMean with its axes as attribute or input, kept or dropped and put back."""
        axes = [4 - self.axes + i if self.positive_axes else i - self.axes for i in range(self.axes)]
        constant = f"{result}_axes = Constant <value_ints = {axes}> ()"
        kept = int(not self.unsqueeze)
        reduced = f"{result}_raw" if self.unsqueeze else result
        if self.opset < 18:
            reduce = f"{reduced} = ReduceMean <axes = {axes}, keepdims = {kept}> ({operand})"
        else:
            reduce = f"{reduced} = ReduceMean <keepdims = {kept}> ({operand}, {result}_axes)"
        back = f"{result} = Unsqueeze ({reduced}, {result}_axes)" if self.unsqueeze else ""
        return f"{constant if self.unsqueeze or self.opset >= 18 else ''} {reduce} {back}"

    def text(self) -> str:
        second = {
            "once": "",
            "sub": "d2 = Sub (x, m)",
            "reversed": "d2 = Sub (m, x)",
            "mean": f"{self.mean('m2', 'x')} d2 = Sub (x, m2)",
        }[self.twice]
        square = self.square if self.twice == "once" else self.square.replace("d", "d2")
        quotient = {
            "div": "n = Div (d, r)",
            "reciprocal": "i = Reciprocal (r) n = Mul (d, i)",
            "reciprocal first": "i = Reciprocal (r) n = Mul (i, d)",
            "one over": "one = Constant <value_float = 1.0> () i = Div (one, r) n = Mul (d, i)",
        }[self.quotient]
        scale = f"g = Mul ({self.scale})" if self.scale else "g = Identity (n)"
        bias = f"y = Add ({self.bias})" if self.bias else "y = Identity (g)"
        shape = ", ".join(map(str, self.dims))
        return f"""<ir_version: 8, opset_import: ["" : {self.opset}]>
            g (float[2, 3, 4, 5] x, float[{shape}] scale, float[{shape}] bias) => (float[2, 3, 4, 5] y) {{
            two = Constant <value_float = 2.0> ()
            e = Constant <value_float = 0.001> ()
            {self.mean("m", "x")} d = Sub (x, m) {second} q = {square} {self.mean("v", "q")}
            s = Add ({"e, v" if self.epsilon_first else "v, e"}) r = Sqrt (s) {quotient} {scale} {bias} }}"""

    def model(self, rng: np.random.Generator) -> ir.Model:
        model = parse(self.text())
        while self.parameters == "initializer" and len(model.graph.inputs) > 1:
            value = model.graph.inputs.pop()
            value.const_value = ir.tensor(rng.standard_normal(self.dims).astype(np.float32), name=value.name)
            model.graph.register_initializer(value)
        return model


FORMS = st.builds(
    Form,
    opset=st.sampled_from([17, 18, 20]),
    axes=st.sampled_from([1, 2, 3]),
    positive_axes=st.booleans(),
    square=st.sampled_from(["Pow (d, two)", "Mul (d, d)"]),
    twice=st.sampled_from(["once", "sub", "reversed", "mean"]),
    epsilon_first=st.booleans(),
    quotient=st.sampled_from(["div", "reciprocal", "reciprocal first", "one over"]),
    scale=st.sampled_from(["n, scale", "scale, n", None]),
    bias=st.sampled_from(["g, bias", "bias, g", None]),
    parameters=st.sampled_from(["initializer", "input"]),
    unsqueeze=st.booleans(),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(form=FORMS, seed=st.integers(0, 2**32 - 1))
def test_every_form_is_fused_and_equal(form: Form, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = form.model(rng)
    feeds = {value.name: rng.standard_normal(tuple(value.shape)).astype(np.float32) for value in model.graph.inputs}
    feeds["x"] = feeds["x"] * 3 + 1
    before = run(model, feeds)
    result, misses = fuse(model)
    assert result == PassResult(True, 1), misses
    counts = ops_of(model)
    assert counts["LayerNormalization"] == 1
    assert not set(counts) - {"LayerNormalization", "Identity", "Add"}
    assert counts["Add"] == 0 or form.scale is None, "a bias stays an Add where an Identity stands before it"
    # Two float32 formulas of values up to 10: some ten roundings of 6e-8 each.
    np.testing.assert_allclose(run(model, feeds)[0], before[0], rtol=0, atol=1e-5)
    assert fuse(model)[0] == PassResult(False, 0)


INVERSE = "r = Sqrt (s) i = Reciprocal (r) f = Mul (i, scale)"

OTHER_WAYS = {
    "root-as-power": "r = Pow (s, half) n = Div (d, r) g = Mul (n, scale) y = Add (g, bias)",
    "inverse-root-as-power": "r = Pow (s, minus) n = Mul (r, d) g = Mul (n, scale) y = Add (bias, g)",
    "scale-over-root": "r = Sqrt (s) f = Div (scale, r) n = Mul (d, f) y = Add (n, bias)",
    "scale-times-inverse": f"{INVERSE} n = Mul (f, d) y = Add (n, bias)",
    "tensorflow": f"{INVERSE} a = Mul (x, f) b = Mul (m, f) o = Sub (bias, b) y = Add (a, o)",
    "tensorflow-with-power": """r = Pow (s, minus) f = Mul (scale, r) a = Mul (f, x) b = Mul (f, m)
        o = Sub (bias, b) y = Add (o, a)""",
}


def other_way(nodes: str) -> ir.Model:
    return parse(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,3,6] x, float[6] scale, float[6] bias) => (float[2,3,6] y)
        <float e = {{0.001}}, float half = {{0.5}}, float minus = {{-0.5}}> {{
        m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) q = Mul (d, d) v = ReduceMean <axes = [-1]> (q) s = Add (v, e)
        {nodes} }}""")


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_ways_to_divide_and_scale(way: str, rng: np.random.Generator) -> None:
    model = other_way(OTHER_WAYS[way])
    feeds = {value.name: rng.standard_normal(tuple(value.shape)).astype(np.float32) for value in model.graph.inputs}
    before = run(model, feeds)
    result, misses = fuse(model)
    assert result == PassResult(True, 1), misses
    assert ops_of(model) == {"LayerNormalization": 1}
    np.testing.assert_allclose(run(model, feeds)[0], before[0], rtol=0, atol=1e-5)  # as above


@pytest.mark.parametrize(
    "nodes",
    [
        "r = Pow (s, e) n = Div (d, r) y = Mul (n, scale)",
        "r = Sqrt (s) f = Div (scale, r) n = Mul (x, f) y = Add (n, bias)",
        f"{INVERSE} a = Mul (x, f) b = Mul (m, f) o = Sub (b, bias) y = Add (a, o)",
        f"{INVERSE} a = Mul (d, f) b = Mul (m, f) o = Sub (bias, b) y = Add (a, o)",
    ],
)
def test_what_only_looks_like_one_stays(nodes: str) -> None:
    result, misses = fuse(other_way(nodes))
    assert not result.modified
    assert misses


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 15, 16])
def test_older_models_must_be_lifted_first(opset: int) -> None:
    text = Form(opset).text().replace("<value_float = 2.0>", "<value = float {2.0}>")
    model = parse(text.replace("<value_float = 0.001>", "<value = float {0.001}>"))
    before = ops_of(model)
    result, misses = fuse(model)
    assert result == PassResult(False)
    assert misses == [f"LayerNormalization needs opset 17, the model has {opset}: run lift-opset first"]
    assert ops_of(model) == before


def test_names_provenance_and_metadata_survive() -> None:
    model = Form(17, quotient="reciprocal").model(np.random.default_rng(0))
    for index, node in enumerate(model.graph):
        node.name = f"exported_{index}"
        node.metadata_props["optframe.scope"] = "encoder.norm"
    fuse(model)
    (node,) = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert node.outputs[0].name == "y"
    assert node.metadata_props["optframe.scope"] == "encoder.norm"
    assert node.metadata_props[PASS_KEY] == "fuse-layernorm"
    assert len(node.metadata_props[ORIGIN_KEY].split(",")) == 10
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.001)


def test_every_rewrite_is_asked_for() -> None:
    asked: list[str] = []
    model = Form(17).model(np.random.default_rng(0))
    result, _ = fuse(model, allow_rewrite=lambda what: asked.append(what) is not None)
    assert result == PassResult(False, 0)
    assert len(asked) == 1
    assert ops_of(model)["LayerNormalization"] == 0


def test_normalisation_in_a_subgraph() -> None:
    model = parse("""<ir_version: 8, opset_import: ["" : 17]>
        g (bool[1] c, float[2, 4] x, float[4] scale) => (float[2, 4] z) {
            e = Constant <value_float = 0.001> ()
            z = If (c) <
                then_branch = a () => (float[2, 4] y) {
                    m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) q = Mul (d, d) v = ReduceMean <axes = [-1]> (q)
                    s = Add (v, e) r = Sqrt (s) n = Div (d, r) y = Mul (n, scale) },
                else_branch = b () => (float[2, 4] w) { w = Neg (x) }
            > }""")
    x, scale = np.arange(8, dtype=np.float32).reshape(2, 4) ** 2, np.float32([1, 2, 3, 4])
    feeds = [{"c": np.array([c]), "x": x, "scale": scale} for c in (True, False)]
    before = [run(model, feed)[0] for feed in feeds]
    assert fuse(model)[0] == PassResult(True, 1)
    assert ops_of(model) == {"If": 1, "LayerNormalization": 1, "Neg": 1}
    for feed, expected in zip(feeds, before, strict=True):
        np.testing.assert_allclose(run(model, feed)[0], expected, rtol=0, atol=1e-5)


FUNCTIONS = """<ir_version: 8, opset_import: ["" : {opset}, "f" : 1]>
    g (float[2, 4] x, float[4] scale) => (float[2, 4] z) {{
        y = f.Norm <eps = 0.5> (x, scale)
        w = f.Twice (y, scale)
        z = f.Other (w) }}
    <domain: "f", opset_import: ["" : {inner}]> Norm <eps> (x, scale) => (y) {{
        m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) q = Mul (d, d) v = ReduceMean <axes = [-1]> (q)
        e = Constant <value_float : float = @eps> () s = Add (v, e) r = Sqrt (s) n = Div (d, r) y = Mul (n, scale) }}
    <domain: "f", opset_import: ["" : {inner}, "f" : 1]> Twice (x, scale) => (y) {{
        a = f.Norm <eps = 0.25> (x, scale) b = f.Norm <eps = 0.125> (a, scale) y = Relu (b) }}
    <domain: "f", opset_import: ["" : {inner}]> Other (x) => (y) {{ y = Neg (x) }}"""


def test_functions_that_hold_one_are_inlined() -> None:
    model = parse(FUNCTIONS.format(opset=17, inner=17))
    feeds = {"x": np.arange(8, dtype=np.float32).reshape(2, 4) ** 2, "scale": np.float32([1, 2, 3, 4])}
    before = run(model, feeds)[0]
    assert fuse(model)[0] == PassResult(True, 4)
    assert ops_of(model) == {"LayerNormalization": 3, "Relu": 1, "Other": 1}
    assert [f.name for f in model.functions.values()] == ["Other"]
    epsilons = [n.attributes["epsilon"].as_float() for n in model.graph if n.op_type == "LayerNormalization"]
    assert epsilons == [0.5, 0.25, 0.125]
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=0, atol=1e-5)


def test_functions_of_another_opset_stay() -> None:
    model = parse(FUNCTIONS.format(opset=18, inner=17))
    result, misses = fuse(model)
    assert result == PassResult(False, 0)
    assert "Norm is written for opset 17" in misses[0]
    assert len(model.functions) == 3


HALF = """<ir_version: 8, opset_import: ["" : 17]>
    g (float16[2, 3, 8] x, float16[8] h, float[8] f) => (float16[2, 3, 8] y) {
        e = Constant <value_float = 0.001> () two = Constant <value_float = 2.0> () """
WIDE_STATISTICS = """w = Cast <to = 1> (x) m = ReduceMean <axes = [-1]> (w) d = Sub (w, m) q = Pow (d, two)
        v = ReduceMean <axes = [-1]> (q) s = Add (v, e) r = Sqrt (s) n = Div (d, r) """
HALF_FORMS = {
    "cast back before scale": (
        HALF + WIDE_STATISTICS + "c = Cast <to = 10> (n) g = Mul (c, h) y = Add (g, h) }",
        {"LayerNormalization": 1},
    ),
    "cast back after bias": (
        HALF + WIDE_STATISTICS + "g = Mul (n, f) b = Add (g, f) y = Cast <to = 10> (b) }",
        {"Cast": 2, "LayerNormalization": 1},
    ),
    "wide copy used elsewhere": (
        HALF
        + WIDE_STATISTICS
        + "c = Cast <to = 10> (n) g = Mul (c, h) z = Neg (w) k = Cast <to = 10> (z) y = Add (g, k) }",
        {"Cast": 2, "LayerNormalization": 1, "Neg": 1, "Add": 1},
    ),
    "variance in float32 (autocast)": (
        HALF
        + """m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) w = Cast <to = 1> (d) q = Pow (w, two)
        v = ReduceMean <axes = [-1]> (q) s = Add (v, e) r = Sqrt (s) c = Cast <to = 10> (r) n = Div (d, c)
        g = Mul (n, h) y = Add (g, h) }""",
        {"LayerNormalization": 1},
    ),
    "all in float16": (
        # float16 literals are written as their bits
        HALF.replace("value_float = 0.001", "value = float16 {5145}").replace(
            "value_float = 2.0", "value = float16 {16384}"
        )
        + WIDE_STATISTICS.replace("w = Cast <to = 1> (x)", "").replace("(w", "(x")
        + "g = Mul (n, h) y = Add (g, h) }",
        {"LayerNormalization": 1},
    ),
}


@pytest.mark.parametrize(("text", "expected"), HALF_FORMS.values(), ids=HALF_FORMS)
def test_float16_keeps_its_casts_in_meaning(text: str, expected: dict[str, int], rng: np.random.Generator) -> None:
    model = parse(text)
    x = (rng.standard_normal((2, 3, 8)) * 4 + 2).astype(np.float16)
    feeds = {"x": x, "h": rng.standard_normal(8).astype(np.float16), "f": rng.standard_normal(8).astype(np.float32)}
    for value in [value for value in model.graph.inputs if not value.uses()]:
        model.graph.inputs.remove(value)
        feeds.pop(value.name)
    before = run(model, feeds)[0].astype(np.float64)
    assert fuse(model)[0] == PassResult(True, 1)
    assert ops_of(model) == expected
    # |y| stays under 16, and each of about five float16 steps rounds to 2^-11 of it.
    np.testing.assert_allclose(run(model, feeds)[0].astype(np.float64), before, rtol=0, atol=16 * 5 * 2.0**-11)


def test_no_scale_of_ones_for_a_size_that_is_not_fixed() -> None:
    model = parse("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, c] x) => (float[n, c] y) {
            m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) q = Mul (d, d) v = ReduceMean <axes = [-1]> (q)
            e = Constant <value_float = 0.001> () s = Add (v, e) r = Sqrt (s) y = Div (d, r) }""")
    result, misses = fuse(model)
    assert result == PassResult(False, 0)
    assert "made of ones" in misses[0]


# Exports of torch modules. Each module writes its normalisation in its own way.


@lru_cache
def torch_modules() -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (module, how many layer normalisations it has)."""
    torch = pytest.importorskip("torch")

    class Written(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, formula: Callable[[Any], Any]) -> None:
            super().__init__()
            self.formula = formula
            self.weight = torch.nn.Parameter(torch.randn(16))
            self.bias = torch.nn.Parameter(torch.randn(16))

        def forward(self, x: Any) -> Any:
            return self.formula(x) * self.weight + self.bias

    def with_var(x: Any) -> Any:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)

    def with_rsqrt(x: Any) -> Any:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)

    def with_ddof(x: Any) -> Any:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6)

    def channels_first(x: Any) -> Any:
        turned = x.transpose(1, 2)
        centred = turned - turned.mean(1, keepdim=True)
        return (centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-6)).transpose(1, 2)

    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator has no ONNX form
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return {
        "LayerNorm": (lambda: torch.nn.LayerNorm(16), 1),
        "LayerNorm of two axes": (lambda: torch.nn.LayerNorm((7, 16)), 1),
        "LayerNorm without affine": (lambda: torch.nn.LayerNorm(16, elementwise_affine=False), 1),
        "var": (lambda: Written(with_var), 1),
        "rsqrt": (lambda: Written(with_rsqrt), 1),
        "ddof": (lambda: Written(with_ddof), 0),
        "channels first": (lambda: Written(channels_first), 0),
        "TransformerEncoder": (lambda: torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 4),
    }


MODULES = ["LayerNorm", "LayerNorm of two axes", "LayerNorm without affine", "var", "rsqrt", "ddof", "channels first"]


def export(name: str, opset: int, dynamo: bool) -> tuple[ir.Model, Array, Array, int]:
    import torch

    torch.manual_seed(0)
    make, count = torch_modules()[name]
    module = make().eval()
    x = torch.randn(2, 7, 16) * 2 + 1
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(module, (x,), opset_version=opset, dynamo=True, verbose=False)
            proto = program.model_proto
        else:
            buffer = io.BytesIO()
            torch.onnx.export(module, (x,), buffer, opset_version=opset, dynamo=False)
            proto = onnx.load_from_string(buffer.getvalue())
        return ir.from_proto(proto), x.numpy(), module(x).numpy(), count


def lifted(model: ir.Model) -> ir.Model:
    converted = onnx.version_converter.convert_version(ir.to_proto(model), 18)
    return ir.from_proto(converted)


def assert_fused(model: ir.Model, x: Array, expected: Array, count: int) -> None:
    fuse(model)
    assert ops_of(model)["LayerNormalization"] == count
    (name,) = [value.name for value in model.graph.inputs]
    # The same float32 arithmetic in another order; values up to about 10.
    np.testing.assert_allclose(run(model, {name: x})[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "opset"),
    [(name, opset) for opset in (11, 12, 13, 14, 16, 17, 18, 20) for name in MODULES]
    + [("TransformerEncoder", opset) for opset in (14, 16, 17, 20)],
)
def test_torchscript_exports(name: str, opset: int) -> None:
    model, x, expected, count = export(name, opset, dynamo=False)
    assert_fused(lifted(model) if opset < 17 else model, x, expected, count)


@pytest.mark.parametrize("name", ["LayerNorm of two axes", "var", "rsqrt", "ddof"])
def test_dynamo_exports(name: str) -> None:
    model, x, expected, count = export(name, 18, dynamo=True)
    assert_fused(model, x, expected, count)


def test_inlining_that_is_not_allowed_changes_nothing() -> None:
    model = parse(FUNCTIONS.format(opset=17, inner=17))
    before = ir.to_proto(model).SerializeToString()
    assert fuse(model, allow_rewrite=lambda _: False)[0] == PassResult(False, 0)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_normalisation_of_no_elements_stays() -> None:
    model = parse(Form(opset=17, scale=None, bias=None).text().replace("float[2, 3, 4, 5]", "float[2, 3, 4, 0]"))
    assert not fuse(model)[0].modified
