"""Small questions about models: which nodes there are."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

from optframe import graph

NESTED = """<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
    g (bool c, float[2] x) => (float[2] y) {
        a = Relu (x)
        b = If (c) <
            then_branch = t () => (float[2] m) {
                m = If (c) < then_branch = u () => (float[2] n) { n = Neg (a) }, else_branch = v () => (float[2] o) { o = Abs (a) } >
            },
            else_branch = e () => (float[2] p) { q = Exp (a) p = local.twice (q) }
        >
        y = Sqrt (b)
    }
    <domain: "local", opset_import: ["" : 18]> twice (x) => (y) { y = Add (x, x) }
"""  # noqa: E501


def test_nodes_are_walked_as_onnx_ir_does() -> None:
    model = ir.from_proto(onnx.parser.parse_model(NESTED))
    found = list(graph.all_nodes(model))
    assert found == list(model.graph.all_nodes())
    assert [node.op_type for node in found] == ["Relu", "If", "If", "Neg", "Abs", "Exp", "twice", "Sqrt"]


def test_subgraphs_of_a_node_stand_in_the_order_of_its_attributes() -> None:
    model = ir.from_proto(onnx.parser.parse_model(NESTED))
    assert [body.name for body in graph.subgraphs(model.graph[1])] == ["t", "e"]
    assert list(graph.subgraphs(model.graph[0])) == []


def test_nodes_of_a_call_are_counted_unless_it_has_a_kernel() -> None:
    model = ir.from_proto(onnx.parser.parse_model(NESTED))
    assert graph.count_nodes(model) == 8
    assert graph.op_histogram(model)["Add"] == 1
    assert graph.op_histogram(model, ["local::twice"])["local::twice"] == 1
