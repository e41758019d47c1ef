"""`merge-duplicates`: when nodes and initialisers are the same, and when they only look it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.passes import PassContext
from optframe_passes import merge_duplicates
from optframe_passes.merge_duplicates import MergeDuplicates

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]


def test_equal_nodes_and_what_follows_from_them(check: Check) -> None:
    text = """g (float[N,4] x) => (float[N,4] y) { a = Relu (x)  b = Relu (x)  c = Exp (a)  d = Exp (b)
        e = Softmax <axis = 0> (c)  f = Softmax <axis = 0> (d)  h = Softmax <axis = 1> (d)  s = Add (e, f)
        y = Add (s, h) }"""
    assert check(MergeDuplicates(), text).ops == {"Relu": 1, "Exp": 1, "Softmax": 2, "Add": 2}


def test_several_outputs_and_absent_inputs(check: Check) -> None:
    text = """g (float[N,6] x) => (float[A,B] y) <float hi = {1.0}> {
        a, b = Split <axis = 1, num_outputs = 2> (x)  c, d = Split <axis = 1, num_outputs = 2> (x)
        e = Clip (a, , hi)  f = Clip (c, hi)  h = Clip (c, , hi)  s = Add (e, f)  t = Add (s, h)  y = Mul (t, d) }"""
    assert check(MergeDuplicates(), text).ops == {"Split": 1, "Clip": 2, "Add": 2, "Mul": 1}


@pytest.mark.parametrize(
    ("left", "right", "merged"),
    [
        ("Elu <alpha = 0.0> (x)", "Elu <alpha = -0.0> (x)", False),
        ("Elu <alpha = 0.5> (x)", "Elu <alpha = 0.5> (x)", True),
        ("ReduceL1 <keepdims = 1> (x)", "ReduceL2 <keepdims = 1> (x)", False),
        ("Sub (x, w)", "Sub (w, x)", False),
        ("RandomNormalLike (x)", "RandomNormalLike (x)", False),
        ("RandomUniformLike <seed = 1.0> (x)", "RandomUniformLike <seed = 1.0> (x)", False),
        ("Constant <value = float[1] {0.0}> ()", "Constant <value = float[1] {0.0}> ()", True),
        ("Constant <value = float[1] {0.0}> ()", "Constant <value = float[1] {-0.0}> ()", False),
        ("Constant <value = float[1] {0.0}> ()", "Constant <value = float {0.0}> ()", False),
        ("Constant <value_float = 1.0> ()", "Constant <value_float = 1.0> ()", True),
        ('Constant <value_string = "a"> ()', 'Constant <value_string = "b"> ()', False),
        ("local.Twice (x)", "local.Twice (x)", True),
        ("local.Noise (x)", "local.Noise (x)", False),
        ("local.Unheard (x)", "local.Unheard (x)", False),
    ],
)
def test_what_counts_as_equal(left: str, right: str, merged: bool, parse: Parse) -> None:
    model = parse(
        f"""g (float[2] x) => (float[A] y) <float[2] w = {{1.0, 2.0}}>
            {{ a = {left}  b = {right}  y = Concat <axis = 0> (a, b) }}""",
        functions="""<opset_import: ["" : 18], domain: "local"> Twice (x) => (y) { y = Add (x, x) }
                     <opset_import: ["" : 18], domain: "local"> Noise (x) => (y) { y = RandomNormalLike (x) }""",
    )
    result = MergeDuplicates().run(model, PassContext())
    assert (result.rewrites, len(model.graph)) == ((1, 2) if merged else (0, 3))


def test_not_a_number_equals_itself_as_an_attribute(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Elu (x)  b = Elu (x)  y = Add (a, b) }")
    for node in list(model.graph)[:2]:
        node.attributes.add(ir.AttrFloat32("alpha", float("nan")))
    assert MergeDuplicates().run(model, PassContext()).rewrites == 1


def test_nodes_with_subgraphs_stay_and_their_insides_are_merged(check: Check) -> None:
    branch = "then_branch = t{0} () => (float[2] p{0}) {{ a = Neg (x)  b = Neg (x)  p{0} = Add (a, b) }}"
    other = "else_branch = e{0} () => (float[2] q{0}) {{ q{0} = Abs (x) }}"
    first, second = (f"{branch.format(i)}, {other.format(i)}" for i in (1, 2))
    text = f"g (float[2] x, bool c) => (float[2] y) {{ u = If (c) <{first}>  v = If (c) <{second}>  y = Mul (u, v) }}"
    assert check(MergeDuplicates(), text).ops == {"If": 2, "Neg": 2, "Add": 2, "Abs": 2, "Mul": 1}


def test_graph_outputs_keep_their_names(check: Check) -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { a = Relu (x)  y = Relu (x)  z = Exp (a) }"
    outcome = check(MergeDuplicates(), text)
    assert outcome.ops == {"Relu": 1, "Exp": 1}
    assert [value.name for value in outcome.model.graph.outputs] == ["y", "z"]


def test_two_equal_graph_outputs_stay_with_a_reason(check: Check) -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Relu (x)  z = Relu (x) }"
    outcome = check(MergeDuplicates(), text)
    assert outcome.ops == {"Relu": 2}
    assert "graph output" in outcome.reasons[0]


def test_equal_initialisers(check: Check) -> None:
    text = """g (float[N,2] x) => (float[N,2] y)
        <float[2] a = {1.0, 2.0}, float[2] b = {1.0, 2.0}, float[1,2] c = {1.0, 2.0}, float[2] d = {1.0, -2.0},
         int64[2] k = {0, -1}, int64[2] l = {0, -1}>
        { r = Reshape (x, k)  s = Reshape (r, l)  t = Add (s, a)  u = Add (t, b)  v = Add (u, c)  y = Add (v, d) }"""
    outcome = check(MergeDuplicates(), text)
    assert list(outcome.model.graph.initializers) == ["a", "c", "d", "k"]


def test_bits_decide_and_not_numbers(check: Check) -> None:
    text = """g (float[2] x) => (float[2] y) <float[2] a = {0.0, 1.0}, float[2] b = {-0.0, 1.0}>
        { s = Div (x, a)  t = Div (x, b)  y = Add (s, t) }"""
    feeds = [{"x": np.array([1, 2], np.float32)}]
    assert len(check(MergeDuplicates(), text, feeds).model.graph.initializers) == 2


def test_defaults_of_inputs_and_outputs_stay(check: Check) -> None:
    text = """g (float[2] x, float[2] d) => (float[2] y, float[2] o) <float[2] d = {1.0, 2.0}, float[2] o = {1.0, 2.0},
        float[2] w = {1.0, 2.0}> { s = Add (x, d)  y = Add (s, w) }"""
    assert not check(MergeDuplicates(), text).result.modified


def test_weights_of_one_size_are_read_only_where_samples_agree(
    tmp_path: Path, parse: Parse, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four weights of a file: two equal, one that differs in a place that no sample covers, one of its own."""
    weights = [rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2)]
    near = weights[0].copy()
    near[50, 50] += 1
    model = parse("g (float[256,256] x) => (float[256,256] y) { y = Relu (x) }")
    for name, array in zip("abcd", [weights[0], weights[0].copy(), near, weights[1]], strict=True):
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.FLOAT))
        value.shape = ir.Shape(array.shape)
        model.graph.register_initializer(value)
        user = ir.node("Add", [model.graph[-1].outputs[0], value])
        model.graph.append(user)
        model.graph.outputs[0] = user.outputs[0]
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="model.data", size_threshold_bytes=0)
    loaded = graph.load(path)
    digested: list[str | None] = []
    digest = merge_duplicates._digest
    monkeypatch.setattr(merge_duplicates, "_digest", lambda value: digested.append(value.name) or digest(value))
    MergeDuplicates().run(loaded, PassContext())
    assert list(loaded.graph.initializers) == ["a", "c", "d"]
    assert digested == ["a", "b", "c"]
