"""`surgery`: what passes of linear algebra share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from optframe.passes import PassContext
from optframe_passes import surgery as module
from optframe_passes.surgery import Surgery, only_reader, rounded

Parse = Callable[..., ir.Model]
FP16, FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


def test_rounding_refuses_what_leaves_the_range_of_a_type() -> None:
    assert rounded(np.array([1e5, 1.0]), FP16) is None
    assert rounded(np.array([1e39]), FP32) is None
    assert rounded(np.array([1e-7, 3e-8]), FP16) is None
    small = rounded(np.array([1.0, 3e-8]), FP16)  # the loss of a small element is small against the largest
    assert small is not None
    assert small.dtype == np.float16
    assert rounded(np.array([[1.0, 2e-8], [1.0, 3e-8]]), FP16, axis=1) is None
    assert rounded(np.zeros((2, 0)), FP16) is not None
    assert rounded(np.array([0.0, 0.0]), FP16) is not None


def test_weights_of_large_models_stay_on_disk(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add (x, w) }")
    value = model.graph.initializers["w"]
    assert Surgery(model, PassContext()).tensor(value) is not None
    monkeypatch.setattr(module, "_HEAVY_MODEL", 7)
    assert Surgery(model, PassContext()).tensor(value) is not None
    monkeypatch.setattr(module, "_LARGEST_WEIGHT_OF_HEAVY_MODEL", 7)
    assert Surgery(model, PassContext()).tensor(value) is None


def test_constants_are_floats_that_cannot_be_fed(parse: Parse) -> None:
    model = parse(
        """g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}, int64 i = {1}>
        { a = Add (x, w)  b = Constant <value_floats = [3.0, 4.0]> ()  y = Add (a, b) }"""
    )
    found = Surgery(model, PassContext())
    assert found.tensor(model.graph.initializers["i"]) is None
    assert found.tensor(model.graph.inputs[1]) is None
    assert found.constant_side(model.graph[0]) is None
    np.testing.assert_array_equal(found.constant(model.graph[2].inputs[1]), [3.0, 4.0])
    assert found.constant_side(model.graph[2]) == 1


def test_models_that_are_not_sound_have_no_nodes(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Relu (x)  y = Neg (a) }")
    assert len(Surgery(model, PassContext()).nodes()) == 2
    model.graph[0].replace_input_with(0, model.graph[1].outputs[0])
    assert Surgery(model, PassContext()).nodes() == []


def test_only_readers(parse: Parse) -> None:
    model = parse("""g (float[2] x, bool c) => (float[2] y, float[2] once) {
        once = Relu (x)  twice = Neg (once)  d = Add (twice, twice)  inner = Sin (d)
        y = If (c) <then_branch = t () => (float[2] p) { p = Exp (inner) },
                    else_branch = e () => (float[2] q) { q = Constant <value_floats = [1.0, 2.0]> () }> }""")
    relu, neg, add, sin, _ = model.graph
    assert only_reader(relu.outputs[0]) is None  # leaves the graph
    assert only_reader(neg.outputs[0]) is None  # is read twice, by one node
    assert only_reader(add.outputs[0]) is sin
    assert only_reader(sin.outputs[0]) is None  # is read in another graph


def test_nodes_get_names_of_their_own(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { [a] b = Relu (x)  [c] y = Neg (b) }")
    surgery = Surgery(model, PassContext())
    relu, neg = model.graph
    made = [surgery.new("Relu", [relu.inputs[0]], [relu]) for _ in range(2)]
    copies = [surgery.copy(neg, [relu.outputs[0]]) for _ in range(2)]
    assert [node.name for node in made] == ["a/Relu", "a/Relu_1"]
    assert copies[0].name == "c"  # takes the place of the original
    assert copies[1].name not in {"c", None}
    assert len({value.name for node in (relu, neg, *made, *copies) for value in node.outputs}) == 6
