"""`eliminate-identity`: what it takes for a node to do nothing, and what keeps it all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe.passes import PassContext
from optframe_passes.eliminate_identity import EliminateIdentity

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]

CONSTANTS = """<float one = {1.0}, float[1] ones = {1.0}, float zero = {0.0}, float[3,1] column = {1.0, 1.0, 1.0},
    bool yes = {1}, bool no = {0}, int64[2] same = {0, 4}, int64[2] fixed = {3, 4}, int64[2] tiles = {1, 1},
    int64[1] start = {0}, int64[1] later = {1}, int64[1] end = {4}, int64[1] far = {9223372036854775807},
    int64[1] axis = {1}, int64[1] back = {-1}, int64[4] pads = {0, 0, 0, 0}, int64[1] whole = {4}, int64[0] none = {},
    float[0] nothing = {}>"""

USELESS = {
    "identity": "z = Identity (r)",
    "dropout": "z = Dropout <seed = 3> (r, zero)",
    "dropout-told-not-to-train": "z = Dropout (r, zero, no)",
    "cast": "z = Cast <to = 1> (r)",
    "cast-like": "z = CastLike (r, one)",
    "transpose": "z = Transpose <perm = [0, 1]> (r)",
    "reshape": "z = Reshape (r, same)",
    "reshape-shape": "s = Shape (x)  z = Reshape (r, s)",
    "flatten": "z = Flatten <axis = 1> (r)",
    "expand": "s = Shape (x)  z = Expand (r, s)",
    "expand-ones": "z = Expand (r, tiles)",
    "slice": "z = Slice (r, start, end, axis)",
    "slice-far": "z = Slice (r, start, far, start)",
    "pad": "z = Pad (r, pads)",
    "tile": "z = Tile (r, tiles)",
    "split": "z = Split <axis = 1, num_outputs = 1> (r)",
    "concat": "z = Concat <axis = 1> (r)",
    "sum": "z = Sum (r)",
    "mean": "z = Mean (r)",
    "maximum": "z = Max (r)",
    "minimum": "z = Min (r)",
    "add": "z = Add (zero, r)",
    "subtract": "z = Sub (r, zero)",
    "multiply": "z = Mul (r, ones)",
    "divide": "z = Div (r, one)",
    "power": "z = Pow (r, one)",
    "clip": "z = Clip (r, , )",
    "negation-twice": "n = Neg (r)  z = Neg (n)",
}


@pytest.mark.parametrize("name", USELESS)
@pytest.mark.parametrize("shape", ["[N,4]", "[3,4]"])
def test_useless_nodes_go(name: str, shape: str, check: Check) -> None:
    text = f"g (float{shape} x) => (float{shape} y) {CONSTANTS} {{ r = Relu (x)  {USELESS[name]}  y = Exp (z) }}"
    outcome = check(EliminateIdentity(), text, allowed=0.0)
    assert outcome.result.rewrites == 1
    (user,) = [node for node in outcome.model.graph if node.op_type == "Exp"]
    assert user.inputs[0].producer().op_type == "Relu"


USEFUL = {
    "dropout-mask": ("[N,4]", "d, m = Dropout (r)  f = Cast <to = 1> (m)  z = Add (d, f)"),
    "cast": ("[N,4]", "i = Cast <to = 7> (r)  z = Cast <to = 1> (i)"),
    "transpose": ("[4,4]", "z = Transpose (r)"),
    "reshape-other-order": ("[3,4]", "t = Transpose (r)  z = Reshape (t, fixed)"),
    "broadcast-add": ("[1,4]", "z = Mul (column, r)"),
    "subtract-from-zero": ("[N,4]", "z = Sub (zero, r)"),
    "divide-one-by": ("[N,4]", "z = Div (one, r)"),
    "slice-start": ("[N,4]", "z = Slice (r, later, far, axis)"),
    "slice-end": ("[N,4]", "z = Slice (r, start, later, axis)"),
    "slice-backwards": ("[N,4]", "z = Slice (r, back, far, axis, back)"),
    "power": ("[N,4]", "z = Pow (r, zero)"),
}


@pytest.mark.parametrize("name", USEFUL)
def test_useful_nodes_stay(name: str, check: Check) -> None:
    shape, body = USEFUL[name]
    text = f"g (float{shape} x) => (float[A,B] y) {CONSTANTS} {{ r = Relu (x)  {body}  y = Exp (z) }}"
    assert not check(EliminateIdentity(), text).result.modified


def test_boolean_neutral_elements(check: Check) -> None:
    text = f"""g (bool[N] x) => (bool[N] y) {CONSTANTS}
        {{ n = Not (x)  a = And (n, yes)  o = Or (no, a)  p = Not (o)  y = And (p, x) }}"""
    outcome = check(EliminateIdentity(), text)
    assert outcome.ops == {"Not": 1, "And": 1}


def test_dropout_that_trains_stays(parse: Parse) -> None:
    model = parse(f"g (float[4] x) => (float[4] y) {CONSTANTS} {{ d = Dropout (x, one, yes)  y = Relu (d) }}")
    assert not EliminateIdentity().run(model, PassContext()).modified


@pytest.mark.parametrize("operand", ["x", "w"])
def test_output_that_is_an_input_or_initialiser_keeps_its_node(operand: str, check: Check) -> None:
    text = f"""g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {{1.0, 2.0}}>
        {{ y = Identity ({operand})  z = Relu (x) }}"""
    assert not check(EliminateIdentity(), text).result.modified


def test_two_outputs_of_one_value(check: Check) -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { r = Relu (x)  y = Identity (r)  z = Identity (r) }"
    outcome = check(EliminateIdentity(), text)
    assert outcome.ops == {"Relu": 1, "Identity": 1}
    assert [value.name for value in outcome.model.graph.outputs] == ["y", "z"]


def test_output_keeps_its_name_and_declared_shape(check: Check) -> None:
    text = "g (float[N,2] x) => (float[M,2] y) { r = Relu (x)  y = Identity (r) }"
    outcome = check(EliminateIdentity(), text)
    assert outcome.ops == {"Relu": 1}
    assert outcome.node("Relu").outputs[0].name == "y"
    assert str(outcome.model.graph.outputs[0].shape) == "[M,2]"


def test_useless_node_before_an_output_that_cannot_move_says_why(check: Check) -> None:
    text = f"g (float[2,4] x) => (float[2,4] y) {CONSTANTS} {{ y = Reshape (x, same) }}"
    outcome = check(EliminateIdentity(), text)
    assert "graph output" in outcome.reasons[0]


def test_branches_that_return_captured_values_keep_their_identity(check: Check) -> None:
    text = """g (float[2] x, bool c) => (float[2] y) { r = Relu (x)  i = Identity (r)  y = If (c) <
        then_branch = t () => (float[2] p) { p = Identity (i) },
        else_branch = e () => (float[2] q) { n = Neg (i)  q = Identity (n) } > }"""
    outcome = check(EliminateIdentity(), text)
    assert outcome.ops == {"Relu": 1, "If": 1, "Identity": 1, "Neg": 1}


def test_loop_bodies_that_hand_on_keep_their_identity(check: Check) -> None:
    text = """g (float[2] x) => (float[2] y) <int64 n = {3}, bool c = {1}> { y = Loop (n, c, x) <
        body = b (int64 i, bool ci, float[2] a) => (bool co, float[2] d)
        { co = Identity (ci)  j = Identity (a)  s = Add (j, x)  d = Identity (s) } > }"""
    outcome = check(EliminateIdentity(), text)
    assert outcome.ops == {"Loop": 1, "Identity": 1, "Add": 1}


def test_equal_free_dimensions_are_told_from_different_ones(check: Check) -> None:
    """Expanding to the shape of another input may broadcast; expanding to its own cannot."""
    text = """g (float[N] x, float[M] v) => (float[A] y, float[A] z) {
        s = Shape (v)  e = Expand (x, s)  y = Relu (e)  t = Shape (x)  f = Expand (x, t)  z = Exp (f) }"""
    one, three = np.ones(1, np.float32), np.ones(3, np.float32)
    feeds = [{"x": one, "v": three}, {"x": three, "v": one}]
    assert check(EliminateIdentity(), text, feeds).ops["Expand"] == 1


def test_model_local_functions_of_the_same_name_stay(parse: Parse) -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) { i = local.Identity (x)  y = Relu (i) }",
        functions='<opset_import: ["" : 18], domain: "local"> Identity (x) => (y) { y = Neg (x) }',
    )
    assert not EliminateIdentity().run(model, PassContext()).modified


def test_old_defaults_are_respected(parse: Parse) -> None:
    """Clip of opset 6 without bounds clips at the largest float32; Slice and Pad have attributes."""
    model = parse(
        """g (float[2,4] x) => (float[2,4] y) { c = Clip (x)  s = Slice <axes = [1], starts = [0], ends = [4]> (c)
           p = Pad <pads = [0, 0, 0, 0]> (s)  y = Relu (p) }""",
        9,
    )
    EliminateIdentity().run(model, PassContext())
    assert [node.op_type for node in model.graph] == ["Clip", "Relu"]
