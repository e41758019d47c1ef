"""`fold-constants`: constants, shape arithmetic with dynamic dimensions, decided Ifs, and what has to stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import graph
from optframe.passes import PASS_KEY, PassContext
from optframe_passes import evaluate
from optframe_passes.fold_constants import FoldConstants

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]


def target(outcome: Any) -> list[int]:
    """The constant shape that the only Reshape of a model has."""
    content = graph.constant(outcome.node("Reshape").inputs[1])
    assert content is not None
    return list(content)


def test_chain_of_constants_becomes_one_initialiser(check: Check) -> None:
    text = """g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {1,2,3,4, 5,6,7,8, 9,8,7,6, 5,4,3,2}>
        { t = Transpose <perm = [1, 0]> (w)  two = Constant <value_float = 2.0> ()  s = Mul (t, two)
          e = Exp (s)  r = Log (e)  y = MatMul (x, r) }"""
    outcome = check(FoldConstants(), text)
    assert outcome.ops == {"MatMul": 1}
    np.testing.assert_allclose(graph.constant(outcome.node("MatMul").inputs[1])[:, 0], [2, 4, 6, 8], rtol=1e-6)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value_float = 1.5", np.float32(1.5)),
        ("value_floats = [1.0, 2.0]", np.array([1, 2], np.float32)),
        ("value_int = 3", np.int64(3)),
        ("value_ints = [3, 4]", np.array([3, 4])),
        ("value = int32[2] {5, 6}", np.array([5, 6], np.int32)),
    ],
)
def test_constant_nodes_become_initialisers(attribute: str, expected: Any, check: Check) -> None:
    to = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(expected).dtype)
    text = f"""g (float[2] x) => (float[2] y)
        {{ c = Constant <{attribute}> ()  t = Cast <to = {to}> (x)  s = Add (t, c)  y = Cast <to = 1> (s) }}"""
    outcome = check(FoldConstants(), text)
    content = graph.constant(outcome.node("Add").inputs[1])
    np.testing.assert_array_equal(content, expected)
    assert content.dtype == np.asarray(expected).dtype


@pytest.mark.parametrize(
    ("shape", "chain", "expected"),
    [
        ("[N,3,4]", "f = Slice (s, zero, one)  t = Concat <axis = 0> (f, minus)", [0, 12]),
        ("[N,3,4]", "d = Gather (s, n)  u = Unsqueeze (d, zero)  t = Concat <axis = 0> (u, twelve)", [0, 12]),
        ("[N,3,H]", "d = Gather (s, n)  u = Unsqueeze (d, zero)  t = Concat <axis = 0> (u, minus)", [0, -1]),
        ("[3,N,4]", "d = Gather (s, one)  t = Concat <axis = 0> (twelve, d)", [12, 0]),
        ("[N,6,2]", "p = ReduceProd <keepdims = 0> (s)  u = Unsqueeze (p, zero)  t = Identity (u)", [-1]),
        ("[N,6,2]", "f = Gather (s, zero)  m = Mul (f, twelve)  t = Concat <axis = 0> (m, one)", [-1, 1]),
        (
            "[N,H,2]",
            "f = Slice (s, zero, two)  p = ReduceProd <keepdims = 1> (f)  t = Concat <axis = 0> (p, two)",
            [-1, 2],
        ),
    ],
)
def test_reshape_beside_dynamic_dimensions_gets_a_constant_target(
    shape: str, chain: str, expected: list[int], check: Check
) -> None:
    text = f"""g (float{shape} x) => (float[A,B] y)
        <int64 n = {{0}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] minus = {{-1}},
         int64[1] twelve = {{12}}> {{ s = Shape (x)  {chain}  y = Reshape (x, t) }}"""
    model_text = text.replace("float[A,B] y", "float[A] y") if len(expected) == 1 else text
    outcome = check(FoldConstants(), model_text)
    assert target(outcome) == expected


def test_reshape_with_two_open_dimensions_stays_with_a_reason(check: Check) -> None:
    text = """g (float[N,H,6] x) => (float[A,B,C] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2},
        int64[1] three = {3}> { s = Shape (x)  n = Slice (s, zero, one)  h = Slice (s, one, two)
        t = Concat <axis = 0> (h, n, three, two)  y = Reshape (x, t) }"""
    outcome = check(FoldConstants(), text.replace("float[A,B,C]", "float[A,B,C,D]"))
    assert outcome.ops["Reshape"] == 1
    assert any("open" in reason for reason in outcome.reasons)


def test_expand_idiom_of_torch_is_decided(check: Check) -> None:
    """expand(-1, 3, -1): Where(target == -1, ones, target); a dimension is never -1."""
    text = """g (float[N,1,4] x) => (float[N,3,4] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3},
        int64[1] minus = {-1}, int64[1] size = {3}, int64[1] four = {4}>
        { s = Shape (x)  n = Slice (s, zero, one)  t = Concat <axis = 0> (n, three, minus)
          ones = ConstantOfShape <value = int64[1] {1}> (size)  m = ConstantOfShape <value = int64[1] {-1}> (size)
          q = Equal (t, m)  w = Where (q, ones, t)  y = Expand (x, w) }"""
    outcome = check(FoldConstants(), text)
    assert "Where" in outcome.ops  # its first element stays dynamic ...
    assert "Equal" not in outcome.ops  # ... but what it chooses is known


def test_static_shape_arithmetic_goes_through_floats(check: Check) -> None:
    """As torch's interpolate computes its sizes: Cast, Mul, Floor, Cast."""
    text = """g (float[1,2,4,6] x) => (float[1,2,A,B] y) <int64[1] two = {2}, int64[1] four = {4}, float f = {1.7}>
        { s = Shape (x)  hw = Slice (s, two, four)  r = Cast <to = 1> (hw)  m = Mul (r, f)  i = Floor (m)
          z = Cast <to = 7> (i)  nc = Slice (s, zero, two)  t = Concat <axis = 0> (nc, z)
          y = Resize <mode = "nearest"> (x, , , t) }"""
    outcome = check(FoldConstants(), text.replace("int64[1] two", "int64[1] zero = {0}, int64[1] two"))
    assert outcome.ops == {"Resize": 1}
    assert outcome.model.graph.outputs[0].shape is not None
    assert list(graph.constant(outcome.node("Resize").inputs[3])) == [1, 2, 6, 10]


def test_sizes_that_depend_on_content_are_found_by_evaluation(check: Check) -> None:
    text = """g (float[3,3] x) => (float[A,B] y) <int64[4] m = {1, 0, 1, 0}>
        { n = NonZero (m)  f = Flatten <axis = 0> (n)  s = Shape (f)  c = Cast <to = 1> (s)
          k = ReduceMax <keepdims = 0> (c)  y = Mul (x, k) }"""
    outcome = check(FoldConstants(), text)
    assert outcome.ops == {"Mul": 1}
    assert graph.constant(outcome.node("Mul").inputs[1]) == 2


def test_constant_graph_output_keeps_a_node(check: Check) -> None:
    text = """g (float[2] x) => (float[2] y, float[2] c) <float[2] w = {1.0, 4.0}>
        { r = Sqrt (w)  c = Identity (r)  y = Add (x, r) }"""
    outcome = check(FoldConstants(), text)
    assert outcome.ops == {"Add": 1}
    (constant,) = [node for node in outcome.model.graph if node.op_type == "Constant"]
    assert constant.outputs[0].name == "c"
    assert constant.metadata_props[PASS_KEY] == "fold-constants"


def test_input_with_default_is_no_constant(check: Check) -> None:
    """From IR version 4 on, an initialiser that is an input too may be fed."""
    text = "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 4.0}> { r = Sqrt (w)  y = Add (x, r) }"
    assert check(FoldConstants(), text).ops == {"Sqrt": 1, "Add": 1}


@pytest.mark.parametrize(
    "op",
    [
        "RandomNormalLike (w)",
        "RandomUniform <shape = [2]> ()",
        "Bernoulli (w)",
        "Dropout (w, w0, yes)",
        "DequantizeLinear (q, w0)",
    ],
)
def test_random_and_quantising_ops_stay(op: str, parse: Parse) -> None:
    text = f"""g (float[2] x) => (float[2] y)
        <float[2] w = {{0.5, 0.5}}, float w0 = {{0.5}}, bool yes = {{1}}, int8[2] q = {{1, 2}}>
        {{ r = {op}  y = Add (x, r) }}"""
    model = parse(text)
    FoldConstants().run(model, PassContext())
    assert graph.count_nodes(model) == 2


def test_large_results_stay_and_say_why(check: Check) -> None:
    text = """g (float[N,64] x) => (float[64,64] y, float[N,64] z) <float[1,64] w = {%s}, int64[2] s = {64, 64}>
        { e = Expand (w, s)  m = ReduceMean <keepdims = 1> (e)  z = Add (x, m)  y = Add (e, x) }"""
    text = text % ",".join(["0.5"] * 64)
    kept = check(FoldConstants(max_bytes=1000), text.replace("[N,64] x", "[1,64] x").replace("[N,64] z", "[1,64] z"))
    assert kept.ops == {"Expand": 1, "Add": 2}, "the mean of what stays is folded all the same"
    assert any("16384 bytes exceed max_bytes=1000" in reason for reason in kept.reasons)


def test_huge_intermediate_results_are_not_made(parse: Parse) -> None:
    side = 1 << 15
    model = parse(f"""g (float[1] x) => (float[1] y) <float[1] w = {{1.0}}, int64[2] s = {{{side}, {side}}}>
        {{ e = Expand (w, s)  m = ReduceMax <keepdims = 0> (e)  y = Add (x, m) }}""")
    context = PassContext()
    FoldConstants().run(model, context)
    assert graph.op_histogram(model)["Expand"] == 1
    assert "too much" in context.near_misses[0].reason


def test_what_onnxruntime_cannot_run_stays(check: Check) -> None:
    """A gather outside its data fails when it runs, which it may never do."""
    text = """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1.0, 2.0}, int64[1] i = {7}>
        { y = If (c) < then_branch = t () => (float[2] p) { b = Gather (w, i)  n = Neg (b)  p = Add (x, n) },
                       else_branch = e () => (float[2] q) { v = Neg (w)  q = Add (x, v) } > }"""
    feeds = [{"x": np.ones(2, np.float32), "c": np.array(False)}]
    outcome = check(FoldConstants(), text, feeds)
    assert outcome.ops == {"If": 1, "Gather": 1, "Neg": 1, "Add": 2}
    assert any("cannot evaluate" in reason for reason in outcome.reasons)


def test_foreign_ops_and_functions_stay(parse: Parse) -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
           { f = local.Twice (w)  u = local.Unheard (f)  y = Add (x, u) }""",
        functions='<opset_import: ["" : 18], domain: "local"> Twice (x) => (y) { y = Add (x, x) }',
    )
    assert FoldConstants().run(model, PassContext()).rewrites == 0
    assert [node.op_type for node in model.graph] == ["Twice", "Unheard", "Add"]


def test_subgraphs_are_folded_with_what_they_capture(check: Check) -> None:
    text = """g (float[N,4] x, bool c) => (float[N,4] y) <float[4] w = {1.0, 4.0, 9.0, 16.0}>
        { r = Sqrt (w)  y = If (c) <
            then_branch = t () => (float[A,B] p) { d = Add (r, r)  p = Mul (x, d) },
            else_branch = e () => (float[A,B] q)
                { s = Shape (x)  k = Cast <to = 1> (s)  z = ReduceMin <keepdims = 0> (k)  q = Sub (x, z) } > }"""
    outcome = check(FoldConstants(), text.replace("float[N,4]", "float[3,4]"))
    assert outcome.ops == {"If": 1, "Mul": 1, "Sub": 1}


def test_loop_carried_shapes_are_not_believed(check: Check) -> None:
    """The body declares (1,) for what grows with each iteration."""
    text = """g (float[1] x) => (float[K] y) <int64 n = {3}, bool c = {1}>
        { y = Loop (n, c, x) < body = b (int64 i, bool ci, float[1] a) => (bool co, float[M] d)
            { co = Identity (ci)  s = Shape (a)  f = Cast <to = 1> (s)  d = Concat <axis = 0> (a, f) } > }"""
    outcome = check(FoldConstants(), text)
    assert outcome.ops["Shape"] == 1


IF_TEXT = """g (float[2] x, bool d) => (float[2] y, float[2] z) <bool c = {%d}, float[2] w = {3.0, 5.0}>
    { a = If (c) < then_branch = t () => (float[2] p) <float[2] k = {1.0, 2.0}> { u = Add (x, k)  p = Relu (u) },
                   else_branch = e () => (float[2] q) { u = Sub (x, w)  q = Neg (u) } >
      b = If (d) < then_branch = t2 () => (float[2] p) { u = Add (a, w)  p = Exp (u) },
                   else_branch = e2 () => (float[2] q) { q = Neg (a) } >
      y = Identity (a)  z = Mul (b, w) }"""


@pytest.mark.parametrize("condition", [True, False])
def test_decided_if_is_inlined_without_clashing_names(condition: bool, check: Check) -> None:
    outcome = check(FoldConstants(), IF_TEXT % condition)
    assert outcome.ops["If"] == 1
    assert outcome.ops.get("Relu", 0) == condition


def test_inlined_nodes_get_names_of_their_own(check: Check, parse: Parse) -> None:
    """Branches of two Ifs may use the same names; one graph must not."""
    then = "then_branch = t () => (float[2] p) { u = Exp (x)  p = Neg (u) }"
    branches = f"{then}, else_branch = e () => (float[2] q) {{ q = Abs (x) }}"
    model = parse(f"""g (float[2] x) => (float[2] y) <bool c = {{1}}>
        {{ a = If (c) <{branches}>  b = If (c) <{branches}>  y = Add (a, b) }}""")
    for node in model.graph.all_nodes():
        node.name = "" if node.op_type == "If" else node.op_type
    outcome = check(FoldConstants(), model)
    names = [node.name for node in outcome.model.graph]
    assert len(names) == len(set(names)) == 5


@pytest.mark.parametrize(
    ("branch", "kept"),
    [
        ("{ p = Relu (x) }", {"Relu": 1}),
        ("<float[2] p = {1.0, 2.0}> { }", {}),
        ("{ p = Constant <value = float[2] {1.0, 2.0}> () }", {}),
    ],
)
def test_decided_if_that_makes_graph_outputs(branch: str, kept: dict[str, int], check: Check) -> None:
    text = f"""g (float[2] x) => (float[2] y) <bool c = {{1}}> {{ y = If (c) <
        then_branch = t () => (float[2] p) {branch}, else_branch = e () => (float[2] q) {{ q = Neg (x) }} > }}"""
    outcome = check(FoldConstants(), text)
    assert outcome.ops == kept
    assert [value.name for value in outcome.model.graph.outputs] == ["y"]


def test_if_decided_by_a_shape(check: Check) -> None:
    """What torch writes for squeeze: is the dimension 1?"""
    text = """g (float[N,1,3] x) => (float[A,B] y) <int64 i = {1}, int64 one = {1}, int64[1] axis = {1}>
        { s = Shape (x)  d = Gather (s, i)  c = Equal (d, one)  y = If (c) <
            then_branch = t () => (float[E,F] p) { p = Squeeze (x, axis) },
            else_branch = e () => (float[G,H,I] q) { q = Identity (x) } > }"""
    outcome = check(FoldConstants(), text)
    assert "If" not in outcome.ops
    assert outcome.ops["Squeeze"] == 1


@pytest.mark.parametrize("names", [["", "", "", ""], ["same", "same", "same", "same"]])
def test_missing_and_repeated_node_names(names: list[str], parse: Parse) -> None:
    model = parse("""g (float[N,4] x) => (float[N,4] y) <float[4] w = {1.0, 4.0, 9.0, 16.0}>
        { r = Sqrt (w)  t = Neg (r)  u = Add (x, t)  y = Mul (u, r) }""")
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    assert FoldConstants().run(model, PassContext()).rewrites == 2
    add, multiply = model.graph
    np.testing.assert_array_equal(graph.constant(add.inputs[1]), [-1, -2, -3, -4])
    np.testing.assert_array_equal(graph.constant(multiply.inputs[1]), [1, 2, 3, 4])


def test_refused_rewrite_stays_and_the_rest_is_folded(parse: Parse) -> None:
    model = parse("""g (float[2] x) => (float[2] y) <float[2] w = {1.0, 4.0}>
        { r = Sqrt (w)  t = Neg (r)  u = Abs (t)  y = Add (x, u) }""")
    for node in model.graph:
        node.name = node.op_type
    context = PassContext(pass_name="fold-constants", allow_rewrite=lambda text: "Neg" not in text)
    FoldConstants().run(model, context)
    assert [node.op_type for node in model.graph] == ["Neg", "Abs", "Add"]
    np.testing.assert_array_equal(graph.constant(model.graph[0].inputs[0]), [1, 2])


def test_one_session_for_many_nodes(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = []
    run = evaluate._run
    monkeypatch.setattr(evaluate, "_run", lambda *arguments: sessions.append(1) or run(*arguments))
    body = "  ".join(f"a{i} = Sqrt (w)  b{i} = Add (a{i}, v)  y{i} = Mul (x, b{i})" for i in range(50))
    outputs = ", ".join(f"float[2] y{i}" for i in range(50))
    model = parse(f"g (float[2] x) => ({outputs}) <float[2] w = {{1.0, 4.0}}, float[2] v = {{1.0, 2.0}}> {{ {body} }}")
    FoldConstants().run(model, PassContext())
    assert graph.op_histogram(model) == {"Mul": 50}
    assert len(sessions) == 1


def test_empty_constants(check: Check) -> None:
    text = """g (float[N,2] x) => (float[A,B] y) <float[0] none = {}, float[2] w = {1.0, 2.0}, int64[0] scalar = {}>
        { c = Concat <axis = 0> (none, w, none)  s = Sqrt (c)  z = ConstantOfShape (scalar)  t = Add (s, z)
          y = Mul (x, t) }"""
    outcome = check(FoldConstants(), text)
    assert outcome.ops == {"Mul": 1}
    assert not outcome.reasons


def test_folded_products_round_as_onnxruntime_folds_them(parse: Parse, rng: np.random.Generator) -> None:
    """A large product has many orders of summation; another one would show behind a long network."""
    model = parse("g (float[1] x) => (float[256,256] y) { p = MatMul (x, x)  y = Add (p, x) }")
    for index, name in enumerate("vw"):
        array = rng.standard_normal((256, 256)).astype(np.float32)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.FLOAT))
        value.shape = ir.Shape(array.shape)
        model.graph.register_initializer(value)
        model.graph[0].replace_input_with(index, value)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (expected,) = session.run(None, {"x": np.zeros(1, np.float32)})
    FoldConstants().run(model, PassContext())
    np.testing.assert_array_equal(graph.constant(model.graph[0].inputs[0]), expected)


def test_half_precision_is_computed_in_half_precision(check: Check) -> None:
    text = """g (float16[2] x) => (float16[2] y) <float[2] w = {1.0, 3.0}>
        { h = Cast <to = 10> (w)  r = Sqrt (h)  y = Add (x, r) }"""
    content = graph.constant(check(FoldConstants(), text).node("Add").inputs[1])
    assert content.dtype == np.float16
    np.testing.assert_array_equal(content, np.sqrt(np.array([1, 3], np.float16)))


def test_types_without_a_numpy_form_stay(parse: Parse) -> None:
    model = parse("""g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
        { b = Cast <to = 16> (w)  f = Cast <to = 1> (b)  y = Add (x, f) }""")
    assert FoldConstants().run(model, PassContext()).rewrites == 0
    assert graph.count_nodes(model) == 3


def test_shapes_are_recorded_with_the_names_of_dimensions(check: Check) -> None:
    text = """g (float[N,3,4] x) => (float[A,B] y) <int64[2] t = {0, -1}>
        { r = Relu (x)  f = Reshape (r, t)  y = Neg (f) }"""
    outcome = check(FoldConstants(), text)
    assert str(outcome.node("Relu").outputs[0].shape) == "[N,3,4]"
    assert str(outcome.node("Reshape").outputs[0].shape) == "[N,12]"
    assert outcome.node("Reshape").outputs[0].dtype == ir.DataType.FLOAT
    assert str(outcome.node("Neg").outputs[0].shape) == "[A,B]", "a declared output is the model's interface"


def test_a_target_that_became_constant_says_what_shape_it_makes(check: Check) -> None:
    text = "g (float[6,4] x, int64[1] t) => (float[A] y) <int64[1] t = {-1}> { r = Reshape (x, t)  y = Relu (r) }"
    outcome = check(FoldConstants(), text, [{"x": np.ones((6, 4), np.float32)}])
    assert outcome.node("Reshape").outputs[0].shape == (24,)
