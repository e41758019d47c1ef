"""The graphsurgeon dialect: nothing is lost on the way there and back, and what passes make is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

from optframe import dialect, graph
from optframe.dialect import GraphSurgeonView
from optframe.errors import InputError
from optframe.gate import OptimizeResult, optimize
from optframe.gate.structure import wiring_problem
from optframe.passes import ORIGIN_KEY, PASS_KEY, GraphPass, PassContext, PassResult
from optframe.pipeline import Pipeline
from optframe.snapshot import Snapshot

TEXT = """
<ir_version: 10, opset_import: ["" : 18, "local" : 3, "unused.domain" : 7], producer_name: "exporter",
 producer_version: "2.0", domain: "example", model_version: 5, doc_string: "a model", metadata_props: ["k" : "v"]>
g (float[N, 4] x, bool p) => (float[N, 4] y)
<float[4] bias = {1.0, 2.0, 3.0, 4.0}, int64[0] none = {}>
{
    a = Add (x, bias)
    b = local.scale <factor = 3.0> (a)
    s = SequenceConstruct (b, b)
    c = ConcatFromSequence <axis = 1, new_axis = 0> (s)
    d = Slice <doc_string = "d"> (c, zero, four, one)
    e = If (p) <
        then_branch = t () => (float[N, 4] u) { t0 = Mul (d, weight)
            u = Relu (t0) },
        else_branch = f () => (float[N, 4] v) { v = Relu (d) }
    >
    y = Neg (e)
}
<domain: "local", opset_import: ["" : 18], doc_string: "scales">
scale <factor> (x) => (y) { f = Constant <value_float: float = @factor> ()
    y = Mul (x, f) }
"""


def model() -> ir.Model:
    """Return a model with all that graphsurgeon drops or mixes up."""
    text = TEXT.replace("int64[0] none = {}", "int64[1] zero = {0}, int64[1] four = {4}, int64[1] one = {1}")
    text = text.replace(", int64[1] four", ", float[4] weight = {5.0, 6.0, 7.0, 8.0}, int64[1] four")
    made = ir.from_onnx_text(text.replace('<doc_string = "d"> ', ""))
    big = ir.tensor(np.arange(4000, dtype=np.float32).reshape(4, 1000), name="big")
    made.graph.register_initializer(ir.Value(name="big", const_value=big))
    for number, node in enumerate(made.graph.all_nodes()):
        node.name = [None, "same", "", "same"][number % 4]
        node.metadata_props["torch.module"] = f"layer{number}"
        node.doc_string = f"node {number}"
    made.graph.inputs[0].metadata_props["kind"] = "image"
    made.graph.doc_string = "a graph"
    made.graph.metadata_props["g"] = "h"
    return made


def keep_alive(made: ir.Model) -> ir.Model:
    """Let the big weight be used, since graphsurgeon leaves out what is not."""
    value = made.graph.initializers["big"]
    total = ir.node("ReduceSum", [value], {"keepdims": 0}, name="total")
    last = made.graph[-1]
    made.graph.insert_before(last, [total])
    last.replace_input_with(0, last.inputs[0])
    added = ir.node("Add", [last.inputs[0], total.outputs[0]], name="added")
    made.graph.insert_before(last, [added])
    last.replace_input_with(0, added.outputs[0])
    return made


def test_nothing_is_lost_there_and_back() -> None:
    before = keep_alive(model())
    view = GraphSurgeonView(before)
    after = view.to_model()
    assert wiring_problem(after) is None
    assert Snapshot.take(after).same(Snapshot.take(before))
    assert after.graph.initializers["big"].const_value is before.graph.initializers["big"].const_value


def test_a_view_goes_on_after_it_was_written() -> None:
    before = keep_alive(model())
    view = GraphSurgeonView(before)
    first = view.to_model()
    next(node for node in view.graph.nodes if node.op == "Neg").op = "Abs"
    view.stamp("later")
    assert [node.op_type for node in view.to_model().graph][-1] == "Abs"
    assert [node.op_type for node in first.graph][-1] == "Neg"


def test_nodes_have_names_of_their_own_meanwhile() -> None:
    view = GraphSurgeonView(model())
    names = [node.name for node in view.graph.nodes]
    assert all(names)
    assert len(set(names)) == len(names)


def test_weights_are_read_when_asked_for_and_shared_when_only_read() -> None:
    before = keep_alive(model())
    view = GraphSurgeonView(before)
    constant = view.graph.tensors()["big"]
    assert (constant.shape, constant.dtype) == ([4, 1000], np.float32)
    np.testing.assert_array_equal(constant.values, before.graph.initializers["big"].const_value.numpy())
    assert view.to_model().graph.initializers["big"].const_value is before.graph.initializers["big"].const_value
    constant.values = constant.values * 2
    np.testing.assert_array_equal(
        view.to_model().graph.initializers["big"].const_value.numpy(),
        before.graph.initializers["big"].const_value.numpy() * 2,
    )


def test_weights_of_subgraphs_stay_where_they_were() -> None:
    after = GraphSurgeonView(model()).to_model()
    assert [list(each.initializers) for each in after.graph.subgraphs()] == [[], []]
    assert "weight" in after.graph.initializers


def test_inputs_with_defaults_stay_inputs() -> None:
    made = ir.from_onnx_text(
        '<ir_version: 3, opset_import: ["" : 9]> g (float[2] x, float[2] w, float[2] unused) => (float[2] y)'
        "<float[2] w = {1.0, 2.0}, float[2] unused = {1.0, 2.0}> { y = Add (x, w) }"
    )
    after = GraphSurgeonView(made).to_model()
    assert [value.name for value in after.graph.inputs] == ["x", "w", "unused"]
    assert list(after.graph.initializers) == ["w", "unused"]


def test_types_and_attributes_that_graphsurgeon_does_not_know_stay() -> None:
    made = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) '
        "{ o = Optional (x)\n y = OptionalGetElement (o) }"
    )
    made.graph[0].outputs[0].type = ir.OptionalType(ir.TensorType(ir.DataType.FLOAT))
    made.graph[0].attributes.add(ir.AttrInt64s("empty", []))
    made.graph[0].attributes.add(
        ir.Attr("type", ir.AttributeType.TYPE_PROTO, ir.TypeAndShape(ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])))
    )
    after = GraphSurgeonView(made).to_model()
    assert after.graph[0].outputs[0].type == made.graph[0].outputs[0].type
    assert set(after.graph[0].attributes) == {"empty", "type"}
    assert Snapshot.take(after).same(Snapshot.take(made))


def test_a_function_that_a_pass_changes_is_changed() -> None:
    view = GraphSurgeonView(model())
    next(node for node in view.graph.functions[0].nodes if node.op == "Mul").op = "Div"
    (function,) = view.to_model().functions.values()
    assert [node.op_type for node in function] == ["Constant", "Div"]


def test_counts_are_those_of_the_model() -> None:
    before = keep_alive(model())
    view = GraphSurgeonView(before)
    assert view.op_histogram() == graph.op_histogram(before)
    assert view.op_histogram(["local::scale"]) == graph.op_histogram(before, ["local::scale"])
    assert view.op_histogram(["local::scale"])["local::scale"] == 1


def test_more_weights_than_it_could_load_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "EXTERNAL_THRESHOLD_BYTES", 1000)
    with pytest.raises(InputError, match=r"graphsurgeon's dialect loads all weights"):
        GraphSurgeonView(model())


# --- passes of the dialect in a pipeline


@dataclass(frozen=True)
class DoubleNegation(GraphPass):
    """Neg becomes Neg, Neg, Neg."""

    name: ClassVar[str] = "double-negation"
    dialect: ClassVar[Any] = "graphsurgeon"

    def run(self, model: gs.Graph, context: PassContext) -> PassResult:
        node = next(node for node in model.nodes if node.op == "Neg")
        output = node.outputs[0]
        middle = [gs.Variable(f"{output.name}_{i}", output.dtype, output.shape) for i in range(2)]
        source = node.inputs[0]
        node.outputs.clear()
        model.nodes += [
            gs.Node("Neg", inputs=[source], outputs=[middle[0]]),
            gs.Node("Neg", inputs=[middle[0]], outputs=[middle[1]]),
            gs.Node("Neg", inputs=[middle[1]], outputs=[output]),
        ]
        model.cleanup().toposort(mode="nodes")  # of functions it never ends where there are subgraphs
        return PassResult(True)


@dataclass(frozen=True)
class Look(GraphPass):
    """Changes nothing."""

    name: ClassVar[str] = "look"
    dialect: ClassVar[Any] = "graphsurgeon"
    modified: bool = False

    def run(self, model: gs.Graph, context: PassContext) -> PassResult:
        assert isinstance(model, gs.Graph)
        context.near_miss(model.nodes[0], "only looking")
        return PassResult(self.modified)


@dataclass(frozen=True)
class Break(GraphPass):
    """Makes another op of the last node, and may deny it."""

    name: ClassVar[str] = "break"
    dialect: ClassVar[Any] = "graphsurgeon"
    deny: bool = False
    dangle: bool = False

    def run(self, model: gs.Graph, context: PassContext) -> PassResult:
        if self.dangle:
            model.nodes[-1].inputs[0] = gs.Variable("nowhere", np.float32)
        else:
            model.nodes[-1].op = "Abs"
        return PassResult(not self.deny)


def run(made: ir.Model, *steps: GraphPass, **options: Any) -> OptimizeResult:
    return optimize(made, Pipeline(steps), **options)


def test_new_nodes_say_who_made_them_and_from_what() -> None:
    made = model()
    made.graph[-1].name = "last"
    result = run(made, DoubleNegation(), verify="off")
    nodes = [node for node in result.model.graph if node.op_type == "Neg"]
    assert [node.metadata_props.get(PASS_KEY) for node in nodes] == ["double-negation"] * 3
    assert nodes[-1].metadata_props[ORIGIN_KEY] == "last"
    assert nodes[-1].metadata_props["torch.module"].startswith("layer")
    assert PASS_KEY not in result.model.graph[0].metadata_props


def test_neighbours_share_one_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []
    original = gs.import_onnx
    monkeypatch.setattr(gs, "import_onnx", lambda proto: imported.append(1) or original(proto))
    result = run(model(), Look(), DoubleNegation(), Look(), DoubleNegation(), verify="off")
    assert len(imported) == 1
    assert [record.modified for record in result.records] == [False, True, False, True]
    assert graph.op_histogram(result.model)["Neg"] == 5
    assert [record.nodes_after - record.nodes_before for record in result.records] == [0, 2, 0, 2]


def test_a_model_that_passes_only_look_at_stays_itself() -> None:
    made = model()
    assert run(made, Look(), verify="off").model is made


def test_right_and_wrong_passes_are_told_apart() -> None:
    made = keep_alive(model())
    steps = (Look(), DoubleNegation(), Break(), Look(modified=True), Break(deny=True), Break(dangle=True), Look())
    result = run(made, *steps)
    assert [record.verified for record in result.records] == [
        "unchanged",
        "equal",
        "rolled-back",
        "unchanged",
        "rolled-back",
        "rolled-back",
        "unchanged",
    ]
    assert "said that it did not" in result.records[4].reason
    assert "'nowhere'" in result.records[5].reason
    assert graph.op_histogram(result.model)["Neg"] == 3
    assert result.verified == "equal"
