"""`move-transposes`: Transposes go through what does not care about the order of axes, and meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.passes import ORIGIN_KEY, PassContext
from optframe_passes.compose_layout import ComposeLayout
from optframe_passes.move_transposes import MoveTransposes

Check = Callable[..., Any]

NCHW = "float[N,8,5,6]"
BACK = "Transpose <perm = [0, 3, 1, 2]>"
TO_LAST = "Transpose <perm = [0, 2, 3, 1]>"
TURN = "Transpose <perm = [0, 2, 1]>"
FOUR, THREE, TWO = "float[A,B,C,D] y", "float[A,B,C] y", "float[A,B] y"

MOVE: dict[str, tuple[str, str, str, str, dict[str, int]]] = {
    # name: (inputs, outputs, constants, nodes, ops that are left)
    "an-island": (
        f"{NCHW} x",
        FOUR,
        "float[8] b = {1, 2, 3, 4, 5, 6, 7, 8}",
        f"a = {TO_LAST} (x)  c = Add (a, b)  d = Relu (c)  y = {BACK} (d)",
        {"Add": 1, "Relu": 1},
    ),
    "clip-with-bounds": (
        f"{NCHW} x",
        FOUR,
        "float low = {0}, float high = {1}",
        f"a = {TO_LAST} (x)  c = Clip (a, low, high)  y = {BACK} (c)",
        {"Clip": 1},
    ),
    "parts-of-a-concat": (
        f"{NCHW} x, float[N,2,5,6] z",
        FOUR,
        "",
        f"a = {TO_LAST} (x)  b = {TO_LAST} (z)  y = Concat <axis = -1> (a, b)",
        {"Concat": 1, "Transpose": 1},
    ),
    "parts-of-a-split": (
        f"{NCHW} x",
        f"{FOUR}, float[E,F,G,H] z",
        "int64[2] s = {2, 6}",
        f"a = {TO_LAST} (x)  b, c = Split <axis = 3> (a, s)  y = {BACK} (b)  z = {BACK} (c)",
        {"Split": 1},
    ),
    "softmax-over-another-axis": (
        "float[N,8,5] x",
        THREE,
        "",
        f"a = {TURN} (x)  b = Softmax <axis = -1> (a)  y = {TURN} (b)",
        {"Softmax": 1},
    ),
    "a-mean-that-keeps-its-axes": (
        f"{NCHW} x",
        FOUR,
        "int64[2] axes = {1, -2}",
        f"a = {TO_LAST} (x)  b = ReduceMean (a, axes)  y = {BACK} (b)",
        {"ReduceMean": 1},
    ),
    "a-mean-that-removes-them": (
        f"{NCHW} x",
        TWO,
        "int64[2] axes = {1, 2}",
        f"a = {TO_LAST} (x)  b = Relu (a)  y = ReduceMean <keepdims = 0> (b, axes)",
        {"Relu": 1, "ReduceMean": 1},
    ),
    "right-behind-the-transpose": (
        f"{NCHW} x",
        TWO,
        "int64[2] axes = {1, 2}",
        f"a = {TO_LAST} (x)  y = ReduceMax <keepdims = 0> (a, axes)",
        {"ReduceMax": 1},
    ),
    "arg-max": (
        f"{NCHW} x",
        "int64[A,B,C,D] y",
        "",
        f"a = {TO_LAST} (x)  b = ArgMax <axis = -1> (a)  y = {BACK} (b)",
        {"ArgMax": 1},
    ),
    "a-product-of-transposed-matrices": (
        "float[N,8,5] x, float[N,5,7] z",
        THREE,
        "",
        f"a = {TURN} (x)  b = {TURN} (z)  c = MatMul (b, a)  y = {TURN} (c)",
        {"MatMul": 1},
    ),
    "of-matrices-alone": (
        "float[8,5] x, float[5,7] z",
        TWO,
        "",
        "a = Transpose (x)  b = Transpose (z)  c = MatMul (b, a)  y = Transpose (c)",
        {"MatMul": 1},
    ),
    "rows-of-a-linear-layer": (
        "float[N,8,5] x",
        THREE,
        "float[5,2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}",
        "a = Transpose <perm = [1, 0, 2]> (x)  b = MatMul (a, w)  y = Transpose <perm = [1, 0, 2]> (b)",
        {"MatMul": 1},
    ),
    "normalised-rows": (
        "float[N,8,2] x",
        THREE,
        "float[2] w = {1, 2}",
        "a = Transpose <perm = [1, 0, 2]> (x)  b = LayerNormalization (a, w)  y = Transpose <perm = [1, 0, 2]> (b)",
        {"LayerNormalization": 1},
    ),
    "pad": (
        f"{NCHW} x",
        FOUR,
        "int64[8] p = {0, 1, 2, 0, 0, 0, 1, 3}",
        f"a = {TO_LAST} (x)  b = Pad (a, p)  y = {BACK} (b)",
        {"Pad": 1},
    ),
    "pad-of-some-axes": (
        f"{NCHW} x",
        FOUR,
        "int64[4] p = {1, 2, 0, 3}, int64[2] axes = {-1, 1}, float v = {2}",
        f"a = {TO_LAST} (x)  b = Pad (a, p, v, axes)  y = {BACK} (b)",
        {"Pad": 1},
    ),
    "slice": (
        f"{NCHW} x",
        FOUR,
        "int64[4] s = {0, 1, 2, 0}, int64[4] e = {9, 4, 5, 3}",
        f"a = {TO_LAST} (x)  b = Slice (a, s, e)  y = {BACK} (b)",
        {"Slice": 1},
    ),
    "gather-and-tile": (
        f"{NCHW} x",
        FOUR,
        "int64[3] i = {1, 0, 4}, int64[4] r = {1, 2, 1, 1}",
        f"a = {TO_LAST} (x)  b = Gather <axis = 1> (a, i)  c = Tile (b, r)  d = Relu (c)  y = {BACK} (d)",
        {"Gather": 1, "Tile": 1, "Relu": 1},
    ),
    "operands-that-broadcast": (
        f"{NCHW} x, float[N,8,1,1] z",
        FOUR,
        "",
        f"a = {TO_LAST} (x)  b = {TO_LAST} (z)  c = Mul (b, a)  y = {BACK} (c)",
        {"Mul": 1},
    ),
    "read-in-both-orders": (
        "float[N,8,5] x",
        "float[A,B,C] y, float[D,E,F] z",
        "",
        f"a = {TURN} (x)  z = Relu (a)  y = {TURN} (z)",
        {"Relu": 1, "Transpose": 1},
    ),
    "two-outputs-of-one-kind": (
        "float[N,8,5] x",
        "float[A,B,C] y, float[D,E,F] z",
        "",
        f"a = {TURN} (x)  b = Relu (a)  y = {TURN} (b)  z = {TURN} (b)",
        {"Relu": 1, "Transpose": 2},
    ),
}


def text_of(inputs: str, outputs: str, constants: str, nodes: str) -> str:
    return (
        f"g ({inputs}) => ({outputs}) <{constants}> {{ {nodes} }}"
        if constants
        else (f"g ({inputs}) => ({outputs}) {{ {nodes} }}")
    )


@pytest.mark.parametrize("form", MOVE)
def test_transposes_meet(form: str, check: Check) -> None:
    *text, ops = MOVE[form]
    # Nothing is computed in another way, but for sums of matrix products, whose order is the library's.
    exact = not {"MatMul", "ReduceMean", "Softmax"} & ops.keys()
    assert check(MoveTransposes(), text_of(*text), allowed=0.0 if exact else None).ops == ops


STAY = {
    "one-alone": f"a = {TO_LAST} (x)  y = Relu (a)",
    "of-different-kinds": f"a = {TO_LAST} (x)  b = Relu (a)  y = Transpose <perm = [1, 0, 2, 3]> (b)",
    "an-op-between-that-cares": f"a = {TO_LAST} (x)  b = GlobalAveragePool (a)  y = {BACK} (b)",
    "a-shape-that-is-not-known-by-axis": f"a = {TO_LAST} (x)  b = Expand (a, s)  y = {BACK} (b)",
    "a-reduction-that-leaves-another-order": f"a = {BACK} (x)  b = Relu (a)  y = ReduceMax <keepdims = 0> (b, i)",
}


@pytest.mark.parametrize("form", STAY)
def test_transposes_stay(form: str, check: Check) -> None:
    output = THREE if "keepdims" in STAY[form] else FOUR
    constants = "int64[4] s = {1, 1, 1, 1}, int64[1] i = {3}"
    assert not check(MoveTransposes(), text_of(f"{NCHW} x", output, constants, STAY[form])).result.modified


def test_no_region_gets_more_transposes(check: Check) -> None:
    """Two small tensors transposed, or one large: the one, though it moves more elements, is not traded for two."""
    text = text_of(
        f"{NCHW} x",
        f"{FOUR}, float[E,F,G,H] z",
        "int64[2] s = {2, 6}",
        f"a, b = Split <axis = 1> (x, s)  c = {TO_LAST} (a)  d = {TO_LAST} (b)  y = Relu (c)  z = Relu (d)",
    )
    assert check(MoveTransposes(), text, allowed=0.0).ops == {"Relu": 2, "Split": 1, "Transpose": 1}


def test_subgraphs_keep_what_they_read(check: Check, parse: Callable[..., ir.Model]) -> None:
    model = parse(f"""g (float[2,3,4] x, bool c) => (float[2,3,4] y, float[2,4,3] z) {{
        a = {TURN} (x)  b = Relu (a)  y = {TURN} (b)
        z = If (c) <then_branch = t () => (float[2,4,3] p) {{ p = Neg (b) }},
                    else_branch = f () => (float[2,4,3] q) {{
                        d = {TURN} (b)  e = Exp (d)  q = {TURN} (e) }}> }}""")
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    outcome = check(MoveTransposes(), model, [{"x": x, "c": np.array(flag)} for flag in (True, False)], allowed=0.0)
    assert outcome.ops["Transpose"] == 1


def test_nodes_know_where_they_come_from(check: Check) -> None:
    text = text_of(f"{NCHW} x", FOUR, "", f"[one] a = {TO_LAST} (x)  [two] b = Relu (a)  [three] y = {BACK} (b)")
    outcome = check(MoveTransposes(), text, allowed=0.0)
    assert outcome.node("Relu").metadata_props[ORIGIN_KEY] == "two"
    assert outcome.node("Relu").outputs[0].name == "y"


def test_a_product_of_a_tensor_with_itself_transposed(check: Check) -> None:
    """What is read transposed and as it is, where the order undoes itself: the one Transpose serves both."""
    nodes = f"r = Relu (x)  a = {TURN} (r)  b = MatMul (r, a)  c = Tanh (b)  y = {TURN} (c)"
    outcome = check(MoveTransposes(), text_of("float[N,8,5] x", f"{THREE}, float[D,E,F] c", "", nodes))
    assert outcome.ops["Transpose"] <= 2


def test_older_opsets_are_left_alone(parse: Callable[..., ir.Model]) -> None:
    model = parse(text_of(f"{NCHW} x", FOUR, "", f"a = {TO_LAST} (x)  b = Relu (a)  y = {BACK} (b)"), opset=12)
    assert not MoveTransposes().run(model, PassContext()).modified
    assert graph.count_nodes(model) == 3


@pytest.mark.parametrize(
    "nodes",
    [
        f"a = {TURN} (x)  b = Softmax <axis = 7> (a)  y = {TURN} (b)",
        "a = Transpose <perm = [0, 2, 2]> (x)  b = Relu (a)  y = Transpose <perm = [0, 2, 2]> (b)",
        f"a = {TURN} (x)  b = ReduceMax (a, far)  y = {TURN} (b)",
    ],
)
def test_invalid_nodes_stay_invalid(nodes: str, parse: Callable[..., ir.Model]) -> None:
    model = parse(text_of("float[2,3,4] x", THREE, "int64[1] far = {5}", nodes))
    assert not MoveTransposes().run(model, PassContext()).modified
    assert not ComposeLayout().run(model, PassContext()).modified


def test_a_slice_keeps_the_type_of_its_numbers(check: Check) -> None:
    text = f"""g ({NCHW} x) => ({FOUR})
        <int32[1] s = {{1}}, int32[1] e = {{4}}, int32[1] axes = {{1}}, int32[1] step = {{1}}> {{
        a = {TO_LAST} (x)  b = Slice (a, s, e, axes, step)  c = Relu (b)  y = {BACK} (c) }}"""
    assert check(MoveTransposes(), text).ops == {"Slice": 1, "Relu": 1}
