"""`lift-denormals`: products read no denormal shares, and nobody notices what was added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from optframe.passes import ORIGIN_KEY, PassContext
from optframe_passes.lift_denormals import LiftDenormals

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]

ATTENTION = """
    g (float[2,6,8] q, float[2,8,9] k, float[2,9,4] v) => (float[A,B,C] y)
    { s = MatMul (q, k) [shares] p = Softmax (s) y = MatMul (p, v) }
"""


def run(model: ir.Model, output: str, **feeds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the value `output` of `model`, which need not be one of its outputs."""
    copy = model.clone()
    (found,) = [value for node in copy.graph for value in node.outputs if value.name == output]
    found.shape = None
    copy.graph.outputs[:] = [found]
    session = onnxruntime.InferenceSession(ir.to_proto(copy).SerializeToString())
    return np.asarray(session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0])


def test_saturated_attention_has_no_denormal_shares(parse: Parse, rng: np.random.Generator) -> None:
    model = parse(ATTENTION)
    feeds = {
        str(value.name): (9 * rng.standard_normal([int(str(d)) for d in value.shape or ()])).astype(np.float32)
        for value in model.graph.inputs
    }
    smallest = np.finfo(np.float32).tiny
    assert (np.abs(run(model, "p", **feeds)) < smallest).any(), "else the test shows nothing"
    expected = run(model, "y", **feeds)
    assert LiftDenormals().run(model, PassContext(pass_name="lift-denormals")).modified
    assert (run(model, "p", **feeds) >= smallest).all()
    np.testing.assert_array_equal(run(model, "y", **feeds), expected)


def test_it_is_done_once(check: Check) -> None:
    outcome = check(LiftDenormals(), ATTENTION)
    assert outcome.ops == {"MatMul": 2, "Softmax": 1, "Max": 1}
    assert outcome.node("Max").metadata_props[ORIGIN_KEY] == "shares"
    assert outcome.node("Max").outputs[0].name == "p"


@pytest.mark.parametrize(
    "rearranged",
    [
        "u = Unsqueeze (p, axis) t = MatMul (u, v) y = Squeeze (t, axis)",
        "u = Transpose <perm = [0, 2, 1]> (p) y = MatMul (v, u)",
    ],
)
def test_products_of_rearranged_shares(rearranged: str, check: Check) -> None:
    v = "float[2,1,9,4]" if "axis" in rearranged else "float[2,3,9]"
    text = f"""
        g (float[2,1,9] s, {v} v) => (float[A,B,C] y) <int64[1] axis = {{2}}>
        {{ p = Softmax (s) {rearranged} }}
    """
    assert check(LiftDenormals(), text).ops["Max"] == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("g (float[3,4] s) => (float[A,B] y) { y = Softmax (s) }", "probabilities that leave the graph"),
        (
            "g (float[3,4] s, float[3,4] w) => (float[A,B] y) { p = Softmax (s) y = Mul (p, w) }",
            "no product reads them",
        ),
        (
            "g (float[3,4] s, float[4,5] w) => (float[A,B] p, float[C,D] y) { p = Softmax (s) y = MatMul (p, w) }",
            "both",
        ),
        (
            "g (float[3,4] s, float[4,5] w) => (float[A,B] y, float[C,D] z)"
            " { p = Softmax (s) y = MatMul (p, w) z = Log (p) }",
            "what else reads them may see the difference",
        ),
        (
            "g (float[3,4] s, float[3,5] w) => (float[A,B] y, float[C,D] z)"
            " { p = Softmax (s) u = Transpose (p) y = MatMul (u, w) z = Log (u) }",
            "the same, rearranged",
        ),
        ("g (double[3,4] s, double[4,5] w) => (double[A,B] y) { p = Softmax (s) y = MatMul (p, w) }", "another type"),
        ("g (float16[3,4] s, float16[4,5] w) => (float16[A,B] y) { p = Softmax (s) y = MatMul (p, w) }", "too coarse"),
    ],
)
def test_others_stay(text: str, why: str, check: Check) -> None:
    assert not check(LiftDenormals(), text).result.modified, why


def test_nan_stays(parse: Parse) -> None:
    model = parse("g (float[1,3] s, float[3,2] v) => (float[A,B] y) { p = Softmax (s) y = MatMul (p, v) }")
    assert LiftDenormals().run(model, PassContext(pass_name="lift-denormals")).modified
    s, v = np.array([[1, np.nan, 2]], np.float32), np.ones((3, 2), np.float32)
    assert np.isnan(run(model, "y", s=s, v=v)).all()
