"""`lift-opset` against onnxruntime on a model of every form that changed, and against onnx's own converter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import version_converter

from optframe import graph
from optframe.errors import InputError
from optframe.passes import ORIGIN_KEY, PASS_KEY, PassContext, PassResult
from optframe_passes.lift_opset import LiftOpset

Array = np.ndarray[Any, Any]
Check = Callable[..., Any]
Draw = Callable[..., dict[str, Array]]
Parse = Callable[..., ir.Model]

FORMS: dict[str, tuple[int, str]] = {
    "batch-normalization-7": (
        7,
        "g (float[N,3,4,5] x, float[3] s, float[3] b, float[3] m) => (float[N,3,4,5] y) <float[3] v = {1.5, 2.0, 0.5}>"
        "{ y = BatchNormalization <epsilon = 0.01, spatial = 1> (x, s, b, m, v) }",
    ),
    "batch-normalization-9": (
        9,
        "g (float[N,3] x, float[3] s, float[3] b, float[3] m) => (float[N,3] y) <float[3] v = {1.5, 2.0, 0.5}>"
        "{ y = BatchNormalization (x, s, b, m, v) }",
    ),
    "clip-both": (9, "g (float[N,4] x) => (float[N,4] y) { y = Clip <min = -0.5, max = 0.25> (x) }"),
    "clip-min": (10, "g (float[N,4] x) => (float[N,4] y) { y = Clip <min = -0.5> (x) }"),
    "clip-none": (7, "g (float[N,4] x) => (float[N,4] y) { y = Clip (x) }"),
    "dropout": (9, "g (float[N,4] x) => (float[N,4] y) { y, mask = Dropout <ratio = 0.3> (x) }"),
    "pad-constant": (9, "g (float[N,3] x) => (float[A,B] y) { y = Pad <pads = [0, 1, 2, 0], value = 1.5> (x) }"),
    "pad-zero": (10, "g (float[N,3] x) => (float[A,B] y) { y = Pad <pads = [1, 1, -1, 0]> (x) }"),
    "pad-reflect": (9, 'g (float[N,3] x) => (float[A,B] y) { y = Pad <mode = "reflect", pads = [0, 1, 1, 2]> (x) }'),
    "reduce-all": (12, "g (float[N,3,4] x) => (float[A,B,C] y) { y = ReduceMax (x) }"),
    "reduce-axes": (9, "g (float[N,3,4] x) => (float[A,B] y) { y = ReduceL2 <axes = [1], keepdims = 0> (x) }"),
    "reduce-sum": (11, "g (float[N,3,4] x) => (float[A,B,C] y) { y = ReduceSum <axes = [-1, 0]> (x) }"),
    "reduce-sum-13": (
        13,
        "g (float[N,3,4] x) => (float[A,B] y) <int64[1] a = {1}> { y = ReduceSum <keepdims = 0> (x, a) }",
    ),
    "resize-10-linear": (
        10,
        "g (float[1,2,4,6] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 2.0, 1.5}>"
        '{ y = Resize <mode = "linear"> (x, s) }',
    ),
    "resize-10-grows": (
        10,
        "g (float[1,2,4,6] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 2.6, 1.7}> { y = Resize (x, s) }",
    ),
    "resize-10-shrinks": (
        10,
        "g (float[1,2,5,7] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 0.6, 0.7}> { y = Resize (x, s) }",
    ),
    "resize-11-scales": (
        11,
        "g (float[1,2,4,6] x) => (float[A,B,C,D] y) <float[0] r = {}, float[4] s = {1.0, 1.0, 1.5, 0.5}>"
        '{ y = Resize <mode = "cubic", cubic_coeff_a = -0.5, exclude_outside = 1> (x, r, s) }',
    ),
    "resize-11-sizes": (
        11,
        "g (float[1,2,4,6] x) => (float[A,B,C,D] y) <float[0] r = {}, float[0] s = {}, int64[4] z = {1, 2, 7, 3}>"
        '{ y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">'
        " (x, r, s, z) }",
    ),
    "resize-12-crop": (
        12,
        "g (float[1,1,4,6] x) => (float[A,B,C,D] y)"
        " <float[8] r = {0.0, 0.0, 0.1, 0.2, 1.0, 1.0, 0.8, 0.9}, float[0] s = {}, int64[4] z = {1, 1, 3, 3}>"
        '{ y = Resize <mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize"> (x, r, s, z) }',
    ),
    "roi-align": (
        10,
        "g (float[1,2,9,9] x) => (float[A,B,C,D] y)"
        " <float[2,4] r = {0.5, 1.0, 5.5, 7.0, 2.0, 2.0, 2.5, 2.5}, int64[2] b = {0, 0}>"
        '{ y = RoiAlign <output_height = 3, output_width = 2, sampling_ratio = 2, mode = "avg"> (x, r, b) }',
    ),
    "scatter": (
        9,
        "g (float[3,4] x, float[1,2] u) => (float[3,4] y) <int64[1,2] i = {2, 0}> { y = Scatter <axis = 1> (x, i, u) }",
    ),
    "slice-1": (
        9,
        "g (float[N,6,7] x) => (float[A,B,C] y) { y = Slice <axes = [1, 2], starts = [1, -3], ends = [4, 99]> (x) }",
    ),
    "slice-no-axes": (9, "g (float[5,6] x) => (float[A,B] y) { y = Slice <starts = [1, 0], ends = [-1, 3]> (x) }"),
    "softmax-default": (9, "g (float[N,3,4] x) => (float[N,3,4] y) { y = Softmax (x) }"),
    "softmax-middle": (11, "g (float[N,3,4,2] x) => (float[N,3,4,2] y) { y = Softmax <axis = -2> (x) }"),
    "softmax-zero": (12, "g (float[N,3,4] x) => (float[N,3,4] y) { y = Softmax <axis = 0> (x) }"),
    "softmax-last": (12, "g (float[N,3,4] x) => (float[N,3,4] y) { y = Softmax <axis = 2> (x) }"),
    "softmax-ones-behind": (9, "g (float[N,3,1] x) => (float[N,3,1] y) { y = Softmax <axis = 1> (x) }"),
    "log-softmax": (9, "g (float[N,3,4] x) => (float[N,3,4] y) { y = LogSoftmax (x) }"),
    "hardmax": (11, "g (float[N,3,4] x) => (float[N,3,4] y) { y = Hardmax <axis = 1> (x) }"),
    "softmax-unknown-rank": (
        11,
        "g (float[N,3,4] x, int64[K] s) => (float y) { r = Reshape (x, s)  y = Softmax <axis = 1> (r) }",
    ),
    "split-sizes": (
        11,
        "g (float[N,6] x) => (float[A,B] a, float[C,D] b) { a, b = Split <axis = 1, split = [2, 4]> (x) }",
    ),
    "split-even": (9, "g (float[N,6] x) => (float[A,B] a, float[C,D] b) { a, b = Split <axis = -1> (x) }"),
    "split-13": (13, "g (float[N,6] x) => (float[A,B] a, float[C,D] b) { a, b = Split <axis = 1> (x) }"),
    "squeeze": (11, "g (float[N,1,4,1] x) => (float[A,B,C] y) { y = Squeeze <axes = [1]> (x) }"),
    "squeeze-all": (9, "g (float[3,1,4,1] x) => (float[A,B] y) { y = Squeeze (x) }"),
    "top-k-1": (9, "g (float[N,7] x) => (float[A,B] v, int64[A,B] i) { v, i = TopK <axis = 1, k = 3> (x) }"),
    "top-k-10": (
        10,
        "g (float[N,7] x) => (float[A,B] v, int64[A,B] i) <int64[1] k = {2}> { v, i = TopK (x, k) }",
    ),
    "unsqueeze": (12, "g (float[N,4] x) => (float[A,B,C,D] y) { y = Unsqueeze <axes = [0, -1]> (x) }"),
    "upsample-7": (
        8,
        "g (float[1,2,3,4] x) => (float[A,B,C,D] y)"
        '{ y = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 3.0]> (x) }',
    ),
    "upsample-9-nearest": (
        9,
        "g (float[1,2,3,4] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 2.5, 1.3}> { y = Upsample (x, s) }",
    ),
    "upsample-9-linear": (
        9,
        "g (float[1,2,3,4] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}>"
        '{ y = Upsample <mode = "linear"> (x, s) }',
    ),
    "one-hot-9": (
        9,
        "g (int64[N] x) => (float[A,B] y) <int64 d = {4}, float[2] v = {-1.0, 2.0}> { y = OneHot (x, d, v) }",
    ),
    "max-pool-8": (
        9,
        "g (float[1,2,7,8] x) => (float[A,B,C,D] y, int64[A,B,C,D] i)"
        "{ y, i = MaxPool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 0, 1]> (x) }",
    ),
    "average-pool-7": (
        9,
        "g (float[1,2,7,8] x) => (float[A,B,C,D] y)"
        "{ y = AveragePool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 0], count_include_pad = 1> (x) }",
    ),
    "if": (
        10,
        "g (float[N,4,4] x, bool c) => (float[A,B] y) { y = If (c) <"
        "then_branch = t () => (float[A,B] p) { p = ReduceMean <axes = [1], keepdims = 0> (x) },"
        "else_branch = e () => (float[A,B] q)"
        "{ m = Clip <min = 0.0> (x)  q = ReduceSum <axes = [2], keepdims = 0> (m) }> }",
    ),
    "loop": (
        12,
        "g (float[3] x) => (float[3] y, float[K,1] s) <int64 n = {3}, bool c = {1}> { y, s = Loop (n, c, x) <"
        "body = b (int64 i, bool ci, float[3] a) => (bool co, float[3] d, float[1] r)"
        "{ co = Identity (ci)  d = Add (a, x)  r = ReduceMean <axes = [0]> (d) }> }",
    ),
}
"""Name -> opset and graph, one of each form of each op that was written otherwise before opset 18."""


@pytest.mark.parametrize("name", FORMS)
def test_lifted_model_computes_exactly_the_same(name: str, check: Check, parse: Parse, rng: Any) -> None:
    opset, text = FORMS[name]
    model = parse(text, opset)
    feeds = (
        [{"x": rng.standard_normal((2, 3, 4)).astype(np.float32), "s": np.array([6, 4])}]
        if "int64[K] s" in text
        else None
    )
    outcome = check(LiftOpset(), model, feeds, allowed=0.0)
    assert outcome.model.opset_imports[""] == 18
    assert outcome.result.modified
    assert not outcome.reasons


def _feeds(name: str, model: ir.Model, draw: Draw, turn: int = 0) -> dict[str, Array]:
    feeds = draw(model, turn)
    return feeds | {"s": np.array([len(feeds["x"]) * 3, 4])} if name == "softmax-unknown-rank" else feeds


CONVERTER_DIFFERS = {
    "hardmax": "refuses an axis that is not the last",
    "resize-10-grows": "no adapter from 10 to 11",
    "resize-10-linear": "no adapter from 10 to 11",
    "resize-10-shrinks": "no adapter from 10 to 11",
    "upsample-9-linear": "no adapter from 10 to 11",
    "upsample-9-nearest": "no adapter from 10 to 11",
}
"""Forms on which onnx's converter fails or is wrong, and why."""


@pytest.mark.parametrize("name", [name for name in FORMS if name not in CONVERTER_DIFFERS])
def test_onnx_own_converter_agrees(name: str, parse: Parse, draw: Draw) -> None:
    opset, text = FORMS[name]
    model = parse(text, opset)
    feeds = _feeds(name, model, draw)
    expected = _run(version_converter.convert_version(ir.to_proto(model), 18), feeds)
    LiftOpset().run(model, PassContext())
    for ours, theirs in zip(_run(ir.to_proto(model), feeds), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bounds_that_older_clip_has_by_default_are_kept(parse: Parse) -> None:
    model = parse(FORMS["clip-min"][1], 10)
    x = np.array([[np.inf, -np.inf, 0.1, 3e38]], np.float32)
    expected = _run(ir.to_proto(model), {"x": x})
    LiftOpset().run(model, PassContext())
    assert np.isfinite(expected[0]).all()
    np.testing.assert_array_equal(_run(ir.to_proto(model), {"x": x})[0], expected[0])


def _run(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


REFUSED = {
    "batch-normalization-trains": (
        9,
        "g (float[2,3] x, float[3] s, float[3] b, float[3] m, float[3] v) => (float[2,3] y)"
        "{ y, a, c = BatchNormalization (x, s, b, m, v) }",
        "trains",
    ),
    "batch-normalization-not-spatial": (
        8,
        "g (float[2,3,4] x, float[3,4] s, float[3,4] b, float[3,4] m, float[3,4] v) => (float[2,3,4] y)"
        "{ y = BatchNormalization <spatial = 0> (x, s, b, m, v) }",
        "spatial=0",
    ),
    "dropout-mask": (10, "g (float[4] x) => (float[4] y, bool[4] m) { y, m = Dropout (x) }", "mask"),
    "resize-both-ways": (
        10,
        "g (float[1,1,4,4] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 2.0, 0.5}> { y = Resize (x, s) }",
        "grows and where it shrinks",
    ),
    "resize-unknown-scales": (
        10,
        "g (float[1,1,4,4] x, float[4] s) => (float[A,B,C,D] y) { y = Resize (x, s) }",
        "not constant",
    ),
    "resize-tf": (
        11,
        "g (float[1,1,4,4] x) => (float[A,B,C,D] y) <float[0] r = {}, float[4] s = {1.0, 1.0, 2.0, 2.0}>"
        '{ y = Resize <coordinate_transformation_mode = "tf_half_pixel_for_nn"> (x, r, s) }',
        "tf_half_pixel_for_nn",
    ),
}
"""Name -> opset, graph, and a word of the reason: what the newer opset cannot say."""


@pytest.mark.parametrize("name", REFUSED)
def test_model_without_exact_equivalent_stays_whole(name: str, parse: Parse) -> None:
    opset, text, word = REFUSED[name]
    model = parse(text.replace("{ y", "{ other = ReduceMean <axes = [0]> (x)  y"), opset)
    before = graph.fingerprint(model)
    context = PassContext(pass_name="lift-opset")
    assert LiftOpset().run(model, context) == PassResult(False)
    assert graph.fingerprint(model) == before
    (miss,) = context.near_misses
    assert word in miss.reason


def test_newer_models_stay(parse: Parse) -> None:
    for opset in (18, 20, 22):
        model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }", opset)
        assert not LiftOpset().run(model, PassContext()).modified
        assert model.opset_imports[""] == opset


@pytest.mark.parametrize("to", [13, 15, 17])
def test_other_targets_keep_what_changed_later(to: int, check: Check) -> None:
    text = """g (float[N,3] x) => (float[A] y) {
        c = Clip <min = 0.0> (x)
        y = ReduceMean <axes = [1], keepdims = 0> (c) }"""
    outcome = check(LiftOpset(to), text, opset=10, allowed=0.0)
    assert outcome.model.opset_imports[""] == to
    assert "axes" in outcome.node("ReduceMean").attributes
    assert len(outcome.node("Clip").inputs) == 3


@pytest.mark.parametrize("to", [12, 19])
def test_targets_without_rules_are_refused(to: int) -> None:
    with pytest.raises(InputError, match="13 to 18"):
        LiftOpset(to)


def test_names_and_metadata_stay_and_provenance_is_recorded(parse: Parse) -> None:
    model = parse("g (float[2,3] x) => (float[2,1] y) { y = ReduceMax <axes = [1]> (x) }", 11)
    (reduce,) = model.graph
    reduce.name, reduce.metadata_props["scope"] = "pool", "head.pool"
    LiftOpset().run(model, PassContext(pass_name="lift-opset"))
    constant, node = model.graph
    assert node is reduce
    assert node.name == "pool"
    assert node.metadata_props["scope"] == constant.metadata_props["scope"] == "head.pool"
    assert constant.metadata_props[PASS_KEY] == "lift-opset"
    assert constant.metadata_props[ORIGIN_KEY] == "pool"


FUNCTION = """
<opset_import: ["" : 10], domain: "local">
Body <axes, low: float = -0.25> (x) => (y)
{
    c = Clip <min: float = @low> (x)
    s = Softmax <axis = 1> (c)
    y = ReduceMean <axes: ints = @axes, keepdims = 0> (s)
}
"""


def test_functions_are_lifted_with_attributes_by_reference(check: Check) -> None:
    text = "g (float[N,3,4] x) => (float[A,B] y) { y = local.Body <axes = [2]> (x) }"
    outcome = check(LiftOpset(), text, opset=10, functions=FUNCTION, allowed=0.0)
    (function,) = outcome.model.functions.values()
    assert function.opset_imports[""] == 18
    assert "CastLike" in {node.op_type for node in function}


def test_initialisers_of_ir_version_3_are_inputs_no_longer(check: Check) -> None:
    text = "g (float[N,2] x, float[2] w) => (float[A,B] y) <float[2] w = {1.0, 2.0}> { y = Mul (x, w) }"
    outcome = check(LiftOpset(), text, opset=9, ir_version=3, allowed=0.0)
    assert [value.name for value in outcome.model.graph.inputs] == ["x"]
    assert graph.constant(outcome.model.graph.initializers["w"]) is not None


def test_older_models_go_through_onnx_converter(parse: Parse) -> None:
    weights = ",".join(["1.5"] * 400)
    text = f"""g (float[2,400] x) => (float[2,400] y) <float[400] big = {{{weights}}}, float[1] small = {{2.0}}>
        {{ t = Add <broadcast = 1> (x, big)  y = Mul <broadcast = 1> (t, small) }}"""
    model = parse(text, 6)
    model.graph[0].name, model.graph[0].metadata_props["scope"] = "plus", "head"
    x = np.linspace(-1, 1, 800, dtype=np.float32).reshape(2, 400)
    context = PassContext(pass_name="lift-opset")
    assert LiftOpset().run(model, context).modified, context.near_misses
    (y,) = _run(ir.to_proto(model), {"x": x})
    np.testing.assert_array_equal(y, (x + np.float32(1.5)) * np.float32(2))
    plus = next(node for node in model.graph if node.name == "plus")
    assert plus.metadata_props["scope"] == "head"
    assert plus.metadata_props[PASS_KEY] == "lift-opset"
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.graph.initializers["big"].const_value.numpy().shape == (400,)


def test_what_the_converter_breaks_is_left_alone(parse: Parse) -> None:
    """It turns `axis=1` into a shape that broadcasts elsewhere."""
    text = """g (float[1,3,4,4] x) => (float[1,3,4,4] y) <float[3] b = {1.0, 2.0, 3.0}>
        { y = Add <axis = 1, broadcast = 1> (x, b) }"""
    model = parse(text, 6)
    before = graph.fingerprint(model)
    context = PassContext()
    assert not LiftOpset().run(model, context).modified
    assert graph.fingerprint(model) == before
    assert "converter" in context.near_misses[0].reason


def test_foreign_ops_stay(parse: Parse) -> None:
    text = "g (float[2] x) => (float[2] y) { z = Clip <min = 0.0> (x)  y = local.Unheard (z) }"
    model = parse(text, 10, functions=FUNCTION)
    LiftOpset().run(model, PassContext())
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == ["Clip", "Unheard"]


def test_a_softmax_of_no_elements_needs_no_matrix(check: Check) -> None:
    text = "g (float[0,4,1] x) => (float[0,4,1] y) { y = Softmax <axis = 0> (x) }"
    assert check(LiftOpset(), text, opset=11).ops == {"Softmax": 1}
