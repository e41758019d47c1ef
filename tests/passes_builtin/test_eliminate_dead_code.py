"""`eliminate-dead-code`: nodes, outputs, branches, initialisers, functions and imports without a user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from optframe.passes import PassContext
from optframe_passes.eliminate_dead_code import EliminateDeadCode

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]


def test_dead_chain_and_its_weights_go(check: Check) -> None:
    text = """g (float[N,2] x) => (float[N,2] y) <float[2] w = {1.0, 2.0}, float[2] v = {3.0, 4.0}>
        { d = Mul (x, w)  e = Exp (d)  y = Add (x, v) }"""
    outcome = check(EliminateDeadCode(), text)
    assert outcome.ops == {"Add": 1}
    assert list(outcome.model.graph.initializers) == ["v"]


def test_values_that_only_a_subgraph_reads_stay(check: Check) -> None:
    text = """g (float[2] x, bool c) => (float[2] y) { r = Relu (x)  y = If (c) <
        then_branch = t () => (float[2] p) { dead = Exp (r)  p = Neg (r) },
        else_branch = e () => (float[2] q) { q = Abs (x) } > }"""
    outcome = check(EliminateDeadCode(), text)
    assert outcome.ops == {"Relu": 1, "If": 1, "Neg": 1, "Abs": 1}


def test_dead_control_flow_frees_what_it_captured(check: Check) -> None:
    text = """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1.0, 2.0}> { r = Mul (x, w)  d = If (c) <
        then_branch = t () => (float[2] p) { p = Neg (r) },
        else_branch = e () => (float[2] q) { q = Abs (r) } >  y = Exp (x) }"""
    outcome = check(EliminateDeadCode(), text)
    assert outcome.ops == {"Exp": 1}
    assert not outcome.model.graph.initializers


def test_unread_outputs_of_if_go_with_their_computation(check: Check) -> None:
    text = """g (float[2] x, bool c) => (float[2] y) { r = Relu (x)  a, b, d = If (c) <
        then_branch = t () => (float[2] p, float[2] q, float[2] s) { p = Neg (r)  q = Exp (x)  s = Sin (x) },
        else_branch = e () => (float[2] p2, float[2] q2, float[2] s2) { p2 = Cos (r)  q2 = Floor (x)  s2 = Abs (x) }
        >  y = Add (b, x) }"""
    outcome = check(EliminateDeadCode(), text)
    assert outcome.ops == {"If": 1, "Exp": 1, "Floor": 1, "Add": 1}
    assert [value.name for value in outcome.node("If").outputs] == ["b"]


def test_unread_scan_outputs_of_loop_go_and_carried_ones_stay(check: Check) -> None:
    text = """g (float[2] x) => (float[K,2] z) <int64 n = {3}, bool c = {1}> { y, u, z = Loop (n, c, x) <
        body = b (int64 i, bool ci, float[2] a) => (bool co, float[2] d, float[2] s, float[2] t)
        { co = Identity (ci)  d = Add (a, x)  s = Exp (d)  t = Neg (d) } > }"""
    outcome = check(EliminateDeadCode(), text)
    assert outcome.ops == {"Loop": 1, "Identity": 1, "Add": 1, "Neg": 1}
    assert [value.name for value in outcome.node("Loop").outputs] == ["y", "z"]


def test_unread_optional_outputs_go(check: Check) -> None:
    text = """g (float[1,2,6] x) => (float[A,B,C] y, float[D,E,F] h) <float[1,12,6] w = {%s}, float[1,12,3] r = {%s}>
        { y, i = MaxPool <kernel_shape = [2]> (x)  t = Transpose <perm = [1, 0, 2]> (x)
          all, h, c = LSTM <hidden_size = 3> (t, w, r) }"""
    text = text % (",".join(["0.1"] * 72), ",".join(["-0.2"] * 36))
    outcome = check(EliminateDeadCode(), text)
    assert [value.name for value in outcome.node("LSTM").outputs] == ["", "h"]
    assert len(outcome.node("MaxPool").outputs) == 1


def test_outputs_that_say_how_batch_normalization_works_stay(parse: Parse) -> None:
    text = """g (float[2,3] x, float[3] s, float[3] b, float[3] m, float[3] v) => (float[2,3] y)
        { y, rm, rv = BatchNormalization <training_mode = 1> (x, s, b, m, v) }"""
    assert not EliminateDeadCode().run(parse(text), PassContext()).modified


def test_split_keeps_all_its_outputs(check: Check) -> None:
    text = "g (float[6] x) => (float[A] b) { a, b, c = Split <num_outputs = 3> (x) }"
    assert not check(EliminateDeadCode(), text).result.modified


FUNCTIONS = """
<opset_import: ["" : 18], domain: "local"> Used (x) => (y) { d = Exp (x)  y = local.Inner (x) }
<opset_import: ["" : 18], domain: "local"> Inner (x) => (y) { y = Neg (x) }
<opset_import: ["" : 18], domain: "local"> Unused (x) => (y) { y = Abs (x) }
"""


def test_functions_without_a_caller_and_dead_nodes_of_others_go(parse: Parse) -> None:
    functions = FUNCTIONS.replace('"" : 18]', '"" : 18, "local" : 1, "stray" : 3]')
    model = parse("g (float[2] x) => (float[2] y) { y = local.Used (x) }", functions=functions)
    model.opset_imports["elsewhere"] = 2
    context = PassContext()
    assert EliminateDeadCode().run(model, context).modified
    assert {name for _, name, _ in model.functions} == {"Used", "Inner"}
    assert model.opset_imports == {"": 18, "local": 1}
    used = next(function for function in model.functions.values() if function.name == "Used")
    assert [node.op_type for node in used] == ["Inner"]
    assert used.opset_imports == {"": 18, "local": 1}
    assert not EliminateDeadCode().run(model, context).modified


def test_inputs_with_defaults_and_initialisers_that_are_outputs_stay(check: Check) -> None:
    text = """g (float[2] x, float[2] d) => (float[2] y, float[2] o) <float[2] d = {1.0, 2.0}, float[2] o = {3.0, 4.0}>
        { y = Relu (x) }"""
    assert not check(EliminateDeadCode(), text).result.modified


@pytest.mark.parametrize("refused", ["dead", "deader"])
def test_refused_rewrites_are_not_made(refused: str, parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Exp (x)  b = Neg (x)  y = Relu (x) }")
    for node, name in zip(model.graph, ["dead", "deader", "alive"], strict=True):
        node.name = name
    context = PassContext(allow_rewrite=lambda text: not text.endswith(f" {refused}"))
    assert EliminateDeadCode().run(model, context).rewrites == 1
    assert sorted(node.name for node in model.graph) == sorted([refused, "alive"])
