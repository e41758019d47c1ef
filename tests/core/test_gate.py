"""The gate: broken passes are caught, each by the right check, and right ones pass with a true record."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.errors import CheckFailed, InputError
from optframe.gate import OptimizeResult, PassRecord, optimize
from optframe.passes import GraphPass, PassContext, PassResult
from optframe.pipeline import Pipeline
from optframe.types import Feeds

MLP = """
<ir_version: 8, opset_import: ["" : 17]>
mlp (float[2, 4] x) => (float[2, 4] y)
<float[4] bias = {0.5, -1.0, 2.0, 0.25}>
{
    h = Add (x, bias)
    r = Relu (h)
    i = Identity (r)
    s = Sigmoid (i)
    y = Mul (s, x)
}
"""

BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
branches (float[3] x) => (float[3] y)
<float zero = {0.0}, float two = {2.0}>
{
    total = ReduceMax <keepdims = 0> (x)
    huge = Mul (total, zero)
    positive = Greater (huge, two)
    z = If (positive) <
        then_branch = then_graph () => (float[3] t) { t = Mul (x, two) },
        else_branch = else_graph () => (float[3] e) { e = Add (x, two) }
    >
    y = Neg (z)
}
"""


def scripted(action: Callable[[ir.Model], object] = lambda model: None, modified: bool = True) -> GraphPass:
    """Return a pass called "scripted" that does `action` to the model, and says of it what `modified` says."""

    @dataclass(frozen=True)
    class scripted(GraphPass):
        name: ClassVar[str] = "scripted"

        def run(self, model: ir.Model, context: PassContext) -> PassResult:
            action(model)
            return PassResult(modified)

    return scripted()


@dataclass(frozen=True)
class DropIdentities(GraphPass):
    """A right pass: removes Identity nodes, one rewrite each."""

    name: ClassVar[str] = "drop-identities"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        found = [n for n in model.graph if n.op_type == "Identity" and context.allow(n)]
        for node in found:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)
        context.near_miss(model.graph[0], "it is no Identity")
        return PassResult(bool(found), len(found))


@dataclass(frozen=True)
class Halves(GraphPass):
    """A right pass: Mul(s, x) becomes Mul(Mul(s, 2), Mul(x, 0.5)), which is the same but for rounding."""

    name: ClassVar[str] = "halves"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        node = find(model, "Mul")
        new = [
            ir.node("Mul", [node.inputs[0], constant(model, 2.0)]),
            ir.node("Mul", [node.inputs[1], constant(model, 0.5)]),
        ]
        last = ir.node("Mul", [new[0].outputs[0], new[1].outputs[0]])
        context.replace([node], [*new, last], node.outputs, last.outputs)
        return PassResult(True)


def constant(model: ir.Model, number: float) -> ir.Value:
    tensor = ir.tensor(np.array(number, np.float32), name=f"constant_{number}")
    value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]))
    model.graph.register_initializer(value)
    return value


def find(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if node.op_type == op_type)


def parse(text: str) -> ir.Model:
    """Return the model; its weights are arrays that can be written to."""
    model = ir.from_onnx_text(text)
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def run(model: ir.Model, *steps: GraphPass, **options: Any) -> OptimizeResult:
    return optimize(model, Pipeline(steps), **options)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# --- passes that break the model, and what must be said of them


def replace_relu_by_abs(model: ir.Model) -> None:
    find(model, "Relu").op_type = "Abs"


def shift_bias(model: ir.Model) -> None:
    value = model.graph.initializers["bias"]
    value.const_value = ir.tensor(value.const_value.numpy() + np.float32(1e-2), name="bias")


def flatten_output(model: ir.Model) -> None:
    shape = ir.Value(
        name="flat",
        const_value=ir.tensor(np.array([8]), name="flat"),
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([1]),
    )
    model.graph.register_initializer(shape)
    wrap_output(model, lambda value: ir.node("Reshape", [value, shape]))


def cast_output(model: ir.Model) -> None:
    wrap_output(model, lambda value: ir.node("Cast", [value], {"to": ir.DataType.FLOAT16}))


def wrap_output(model: ir.Model, make: Callable[[ir.Value], ir.Node]) -> None:
    """Let a new node write the graph's output, under its old name and declared type."""
    old = model.graph.outputs[0]
    name, old.name = old.name, f"{old.name}_before"
    node = make(old)
    model.graph.append(node)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, old.type, old.shape
    model.graph.outputs[0] = node.outputs[0]


def bring_in_a_foreign_op(model: ir.Model) -> None:
    model.graph.opset_imports["com.example"] = 1
    find(model, "Relu").domain = "com.example"


def fail(model: ir.Model) -> None:
    find(model, "Relu").op_type = "Abs"
    raise KeyError("nothing there")


def leave_a_dangling_value(model: ir.Model) -> None:
    find(model, "Relu").replace_input_with(0, ir.Value(name="nowhere"))


def break_the_order(model: ir.Model) -> None:
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])


def drop_the_output(model: ir.Model) -> None:
    model.graph.outputs.append(find(model, "Relu").outputs[0])
    del model.graph.outputs[0]


def rename_the_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "z"


def declare_another_type(model: ir.Model) -> None:
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)


def declare_another_shape(model: ir.Model) -> None:
    model.graph.outputs[0].shape = ir.Shape([2, 8])


def leave_a_false_shape(model: ir.Model) -> None:
    find(model, "Relu").outputs[0].shape = ir.Shape([7, 7])
    find(model, "Relu").outputs[0].type = ir.TensorType(ir.DataType.FLOAT)


def use_an_op_that_is_none(model: ir.Model) -> None:
    find(model, "Relu").op_type = "Rectify"


def write_into_a_weight(model: ir.Model) -> None:
    model.graph.initializers["bias"].const_value.numpy()[:] = 0


def name_two_values_alike(model: ir.Model) -> None:
    find(model, "Relu").outputs[0].name = "h"


BROKEN = {
    replace_relu_by_abs: "differ by",
    shift_bias: "differ by",
    flatten_output: r"'y' is declared FLOAT\[2, 4\], but shape inference finds FLOAT\[8\]",
    cast_output: r"'y' is declared FLOAT\[2, 4\], but shape inference finds FLOAT16\[2, 4\]",
    bring_in_a_foreign_op: "domain that it does not declare: com.example",
    fail: "it raised KeyError: 'nothing there'",
    leave_a_dangling_value: "reads 'nowhere', which nothing before it makes",
    break_the_order: "reads 'h', which nothing before it makes",
    drop_the_output: "outputs were y and are r",
    rename_the_output: "outputs were y and are z",
    declare_another_type: r"output 'y' was FLOAT\[2, 4\] and is DOUBLE\[2, 4\]",
    declare_another_shape: r"output 'y' was FLOAT\[2, 4\] and is FLOAT\[2, 8\]",
    leave_a_false_shape: r"'r' is declared FLOAT\[7, 7\], but shape inference finds FLOAT\[2, 4\]",
    use_an_op_that_is_none: "checker refuses it",
    write_into_a_weight: "it raised ValueError",
    name_two_values_alike: "two values are called 'h'",
}


@pytest.mark.parametrize(("action", "reason"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_pass_is_rolled_back_and_named(
    action: Callable[[ir.Model], None], reason: str, tmp_path: Path
) -> None:
    seen: list[PassRecord] = []
    steps = (DropIdentities(), scripted(action), Halves())
    result = run(parse(MLP), *steps, reproducer_folder=tmp_path, on_pass=seen.append)
    assert [record.verified for record in result.records] == ["equal", "rolled-back", "equal"]
    assert seen == list(result.records)
    assert ops(result.model) == ["Add", "Relu", "Sigmoid", "Mul", "Mul", "Mul"]
    np.testing.assert_array_equal(result.model.graph.initializers["bias"].const_value.numpy(), [0.5, -1, 2, 0.25])
    broken = result.records[1]
    assert (broken.nodes_before, broken.nodes_after, broken.op_changes) == (4, 4, {})
    assert result.verified == "equal"
    assert re.search(reason, broken.reason), broken.reason
    (warning,) = result.warnings
    assert warning.startswith(f"pass 'scripted' broke the model and was rolled back: {broken.reason}; ")
    assert (tmp_path / "02-scripted" / "model.onnx").is_file()


def test_the_reproducer_shows_it_again(tmp_path: Path) -> None:
    model = parse(MLP)
    run(model, DropIdentities(), scripted(replace_relu_by_abs), reproducer_folder=tmp_path)
    folder = tmp_path / "02-scripted"
    assert (folder / "pipeline.txt").read_text() == "scripted\n"
    assert ops(graph.load(folder / "model.onnx")) == ["Add", "Relu", "Sigmoid", "Mul"]
    assert "optframe optimize model.onnx" in (folder / "README.txt").read_text()
    with np.load(folder / "inputs.npz") as inputs:
        feeds = {name: inputs[name] for name in inputs.files}
    again = run(graph.load(folder / "model.onnx"), scripted(replace_relu_by_abs), inputs=[feeds])
    assert again.records[0].verified == "rolled-back"


def test_right_passes_leave_a_true_record(tmp_path: Path) -> None:
    result = run(parse(MLP), DropIdentities(), DropIdentities(), Halves(), dump=tmp_path)
    first, second, third = result.records
    assert (first.modified, first.verified, first.nodes_before, first.nodes_after) == (True, "equal", 5, 4)
    assert (first.op_changes, first.rewrites) == ({"Identity": -1}, 1)
    assert (second.modified, second.verified, second.op_changes) == (False, "unchanged", {})
    assert (third.verified, third.op_changes) == ("equal", {"Mul": 2})
    assert [miss.reason for miss in result.near_misses] == ["it is no Identity"] * 2
    assert (result.verified, result.warnings) == ("equal", ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01-drop-identities.onnx", "03-halves.onnx"]
    assert ops(graph.load(tmp_path / "01-drop-identities.onnx")) == ["Add", "Relu", "Sigmoid", "Mul"]


def test_a_false_claim_to_have_modified_is_corrected() -> None:
    result = run(parse(MLP), scripted())
    assert (result.records[0].modified, result.records[0].verified) == (False, "unchanged")
    assert result.warnings == ("pass 'scripted': it changed nothing, but said that it did",)


def test_a_change_that_is_denied_is_rolled_back() -> None:
    result = run(parse(MLP), scripted(lambda model: setattr(find(model, "Relu"), "name", "n"), modified=False))
    assert result.records[0].verified == "rolled-back"
    assert "said that it did not" in result.records[0].reason


def test_types_may_be_recorded_without_saying_so() -> None:
    def record_type(model: ir.Model) -> None:
        find(model, "Relu").outputs[0].type = ir.TensorType(ir.DataType.FLOAT)

    result = run(parse(MLP), scripted(record_type, modified=False))
    assert (result.records[0].modified, result.records[0].verified) == (True, "equal")


def test_each_branch_of_an_if_is_compared_although_inputs_take_one() -> None:
    def break_then(model: ir.Model) -> None:
        find(model, "If").attributes["then_branch"].as_graph()[0].op_type = "Sub"

    def break_else(model: ir.Model) -> None:
        find(model, "If").attributes["else_branch"].as_graph()[0].op_type = "Sub"

    feeds = {"x": np.array([1, 2, 3], np.float32)}
    for action, reason in ((break_then, "true branch of 'z'"), (break_else, "'z'")):
        result = run(parse(BRANCHES), scripted(action), inputs=[feeds])
        assert result.records[0].verified == "rolled-back"
        assert reason in result.records[0].reason


def test_a_rescaled_intermediate_is_no_fault() -> None:
    def double_weight(model: ir.Model) -> None:
        weight = model.graph.initializers["w"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name="w")
        half = model.graph.initializers["scale"]
        half.const_value = ir.tensor(half.const_value.numpy() / 2, name="scale")

    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 2] x) => (float[2, 2] y)
    <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float scale = {3.0}>
    { m = MatMul (x, w)
      t = Transpose <perm = [1, 0]> (m)
      y = Mul (t, scale) }
    """
    result = run(parse(text), scripted(double_weight))
    assert result.records[0].verified == "equal"
    assert re.search(r"'m': its values differ.*, but what comes of it is the same", result.records[0].reason)


def test_integers_are_exact_and_text_is_compared() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (int64[4] x) => (int64[4] y)
    <int64 big = {4611686018427387904}, int64 one = {1}>
    { a = Add (x, big)
      y = Add (a, one) }
    """

    def lose_one(model: ir.Model) -> None:
        model.graph.initializers["one"].const_value = ir.tensor(np.array(0), name="one")

    result = run(parse(text), scripted(lose_one))
    assert result.records[0].verified == "rolled-back"
    assert "'y'" in result.records[0].reason


def test_the_worker_crashing_is_a_finding() -> None:
    """A worker that kills itself when it meets a Softplus stands for native code that crashes on what a pass made."""
    program = """
import os, signal
from pathlib import Path
import optframe.worker as worker

run = worker._run

def crash(request):
    if b"Softplus" in Path(request["model"]).read_bytes():
        os.kill(os.getpid(), signal.SIGSEGV)
    return run(request)

worker._run = crash
worker.main()
"""

    def use_softplus(model: ir.Model) -> None:
        find(model, "Relu").op_type = "Softplus"

    command = [sys.executable, "-c", program]
    result = run(parse(MLP), DropIdentities(), scripted(use_softplus), Halves(), worker_command=command)
    assert [record.verified for record in result.records] == ["equal", "rolled-back", "equal"]
    assert "the worker crashed with signal SIGSEGV" in result.records[1].reason


def test_a_model_that_does_not_run_is_unverified() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>
    g (float[2] x) => (float[2] y) { a = com.example.Unknown (x)
      b = Identity (a)
      y = Neg (b) }
    """
    result = run(parse(text), DropIdentities())
    assert (result.records[0].verified, result.verified) == ("unverified", "unverified")
    assert "the model itself does not run" in result.records[0].reason
    assert ops(result.model) == ["Unknown", "Neg"]


def test_nan_before_is_unverified_not_rolled_back() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x) => (float[4] y) <float four = {4.0}>
    { a = Sub (x, four)
      b = Sqrt (a)
      y = Neg (b) }
    """

    def remove_nan(model: ir.Model) -> None:
        replaced = find(model, "Sqrt")
        new = ir.node("Abs", [replaced.inputs[0]])
        ir.convenience.replace_nodes_and_values(model.graph, replaced, [replaced], [new], replaced.outputs, new.outputs)

    feeds = {"x": np.zeros(4, np.float32)}
    result = run(parse(text), scripted(remove_nan), inputs=[feeds], random_inputs=lambda seed: feeds)
    assert (result.records[0].verified, result.verified) == ("unverified", "unverified")
    assert "4 of 4 elements were NaN already" in result.records[0].reason


def test_both_shapes_of_a_dynamic_model_are_tried() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 3] x) => (float[N, 3] y) <int64[2] shape = {-1, 3}>
    { a = Neg (x)
      y = Reshape (a, shape) }
    """

    def fix_size(model: ir.Model) -> None:
        model.graph.initializers["shape"].const_value = ir.tensor(np.array([2, 3]), name="shape")

    result = run(parse(text), scripted(fix_size))
    assert result.records[0].verified == "rolled-back"


def test_a_dynamic_model_of_unknown_shapes_is_verified() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N] x) => (float[M] y) <float zero = {0.0}>
    { m = Greater (x, zero)
      c = Compress (x, m)
      d = Identity (c)
      y = Exp (d) }
    """

    def via_double_negation(model: ir.Model) -> None:
        node = find(model, "Compress")
        new = [ir.node("Neg", [node.inputs[0]])]
        new.append(ir.node("Compress", [new[0].outputs[0], node.inputs[1]]))
        new.append(ir.node("Neg", [new[1].outputs[0]]))
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, node.outputs, new[2].outputs)

    def keep_the_others(model: ir.Model) -> None:
        find(model, "Greater").op_type = "LessOrEqual"

    result = run(parse(text), scripted(via_double_negation), scripted(keep_the_others), DropIdentities())
    assert [record.verified for record in result.records] == ["equal", "rolled-back", "equal"]


def test_a_raised_opset_is_compared_as_a_whole() -> None:
    def raise_opset(model: ir.Model) -> None:
        model.graph.opset_imports[""] = 18

    def raise_and_break(model: ir.Model) -> None:
        model.graph.opset_imports[""] = 19
        find(model, "Relu").op_type = "Abs"

    result = run(parse(MLP), scripted(raise_opset), DropIdentities(), scripted(raise_and_break), Halves())
    assert [record.verified for record in result.records] == ["equal", "equal", "rolled-back", "equal"]
    assert result.model.opset_imports[""] == 18


def test_a_changed_function_is_compared() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[3] x) => (float[3] y) { a = local.twice (x)
      y = Neg (a) }
    <domain: "local", opset_import: ["" : 17]>
    twice (x) => (y) { y = Add (x, x) }
    """

    def break_function(model: ir.Model) -> None:
        next(iter(model.functions.values()))[0].op_type = "Mul"

    def other_words(model: ir.Model) -> None:
        function = next(iter(model.functions.values()))
        old = function[0]
        two = ir.node("Constant", [], {"value": ir.tensor(np.array(2, np.float32))})
        new = ir.node("Mul", [old.inputs[0], two.outputs[0]])
        ir.convenience.replace_nodes_and_values(function.graph, old, [old], [two, new], old.outputs, new.outputs)

    result = run(parse(text), scripted(break_function), scripted(other_words))
    assert [record.verified for record in result.records] == ["rolled-back", "equal"]


def test_stop_after_and_limit() -> None:
    double = MLP.replace("s = Sigmoid (i)", "i2 = Identity (i)\n s = Sigmoid (i2)")
    assert len(run(parse(MLP), DropIdentities(), Halves(), stop_after="drop-identities").records) == 1
    assert ops(run(parse(double), DropIdentities(), limit=1).model).count("Identity") == 1
    with pytest.raises(InputError, match="did you mean 'halves'"):
        run(parse(MLP), Halves(), stop_after="halfs")


def test_rewrites_of_a_rolled_back_pass_do_not_use_up_the_limit() -> None:
    @dataclass(frozen=True)
    class Greedy(GraphPass):
        name: ClassVar[str] = "greedy"

        def run(self, model: ir.Model, context: PassContext) -> PassResult:
            replace_relu_by_abs(model)
            return PassResult(context.allow(model.graph[0]))

    result = run(parse(MLP), Greedy(), DropIdentities(), limit=1)
    assert [record.verified for record in result.records] == ["rolled-back", "equal"]


def test_verify_end_finds_the_guilty_pass() -> None:
    result = run(parse(MLP), DropIdentities(), scripted(replace_relu_by_abs), Halves(), verify="end")
    assert [record.verified for record in result.records] == ["equal", "rolled-back", "equal"]
    assert "passes were verified one by one" in result.warnings[0]


def test_verify_end_compares_once() -> None:
    seen: list[str] = []
    result = run(parse(MLP), DropIdentities(), Halves(), verify="end", on_pass=lambda record: seen.append(record.name))
    assert [record.verified for record in result.records] == ["skipped", "skipped"]
    assert (result.verified, seen) == ("equal", ["drop-identities", "halves"])


def test_verify_off_compares_nothing_and_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a copy or a file was made")

    monkeypatch.setattr(ir.Model, "clone", never)
    monkeypatch.setattr(ir.serde, "serialize_model", never)
    model = parse(MLP)
    result = run(model, DropIdentities(), scripted(replace_relu_by_abs), verify="off")
    assert result.model is model
    assert ops(model) == ["Add", "Abs", "Sigmoid", "Mul"]
    assert [(record.verified, record.nodes_after) for record in result.records] == [("skipped", 4), ("skipped", 4)]
    assert result.verified == "skipped"


def test_verify_off_cannot_go_on_without_a_pass_that_raises() -> None:
    with pytest.raises(CheckFailed, match=r"pass 'scripted' raised KeyError.*--verify each"):
        run(parse(MLP), scripted(fail), verify="off")


def test_a_pass_that_exits_is_rolled_back() -> None:
    def leave(_model: ir.Model) -> None:
        raise SystemExit(0)

    [record] = run(parse(MLP), scripted(leave)).records
    assert record.verified == "rolled-back"
    assert "SystemExit: 0" in record.reason


def test_an_error_for_the_user_is_no_broken_pass() -> None:
    def refuse(_model: ir.Model) -> None:
        raise InputError("this op is not registered")

    with pytest.raises(InputError, match=r"^pass 'scripted': this op is not registered"):
        run(parse(MLP), scripted(refuse))


def test_an_invalid_model_is_refused() -> None:
    model = parse(MLP)
    break_the_order(model)
    with pytest.raises(InputError, match=r"the model is invalid: .* reads 'h'"):
        run(model, DropIdentities(), verify="off")


def clip_late(model: ir.Model) -> None:
    """Wrong beyond 1000, which random inputs never reach."""
    relu = find(model, "Relu")
    new = ir.node("Clip", [relu.inputs[0], constant(model, 0.0), constant(model, 1000.0)])
    ir.convenience.replace_nodes_and_values(model.graph, relu, [relu], [new], relu.outputs, new.outputs)


def test_real_inputs_are_used_each_of_them() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y) { i = Identity (x)
      r = Relu (i)
      y = Neg (r) }
    """
    small, large = ({"x": np.full(2, size, np.float32)} for size in (1, 2000))
    seen: list[str] = []

    def verified(*inputs: Feeds) -> list[str]:
        seen.clear()
        steps = (DropIdentities(), scripted(clip_late))
        result = run(parse(text), *steps, inputs=inputs, on_pass=lambda record: seen.append(record.name))
        return [record.verified for record in result.records]

    assert verified() == ["equal", "equal"]
    assert verified(large) == ["equal", "rolled-back"]
    assert verified(small, large) == ["equal", "rolled-back"]
    assert seen == ["drop-identities", "scripted"]


def test_a_difference_that_the_outputs_do_not_show_is_remarked() -> None:
    feeds: Feeds = {"x": np.full((2, 4), 2000, np.float32)}
    (record,) = run(parse(MLP), scripted(clip_late), inputs=[feeds]).records
    assert record.verified == "equal"
    assert "but what comes of it is the same" in record.reason


def test_what_amplifies_rounding_is_unverified_as_a_whole() -> None:
    """Sin of some 1e7 radians depends on the last bits of its input, so no two right models agree."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[64] x) => (float[64] y) <float million = {1e7}>
    { a = Mul (x, million)
      y = Sin (a) }
    """

    def in_two_steps(model: ir.Model) -> None:
        node = find(model, "Mul")
        first = ir.node("Mul", [node.inputs[0], constant(model, 3e3)])
        second = ir.node("Mul", [first.outputs[0], constant(model, 1e4 / 3)])
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [first, second], node.outputs, second.outputs
        )

    result = run(parse(text), scripted(in_two_steps))
    assert result.records[0].verified == "equal"
    assert result.verified == "unverified"
    assert "but so do the original's when the input changes by a few roundings" in result.reason
    assert result.warnings == (f"the whole model could not be verified: {result.reason}",)


def test_a_model_that_draws_random_numbers_is_unverified() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 4] x) => (float[2, 4] y) { i = Identity (x)
      r = RandomNormalLike (i)
      y = Add (i, r) }
    """

    def draw_others(model: ir.Model) -> None:
        find(model, "RandomNormalLike").attributes["seed"] = ir.AttrFloat32("seed", 1.0)

    result = run(parse(text), scripted(draw_others), verify="end")
    assert result.verified == "unverified"
    assert "random: the model has RandomNormalLike" in result.reason


def test_weights_on_disk_are_verified_and_stay_there(tmp_path: Path) -> None:
    weights = np.arange(4000, dtype=np.float32).reshape(4, 1000) / 4000
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 4] x) => (float[2, 1000] y) { i = Identity (x)
      m = MatMul (i, i)
      y = Relu (m) }
    """
    made = ir.from_onnx_text(text)
    weight = ir.Value(name="w", const_value=ir.tensor(weights, name="w"), type=ir.TensorType(ir.DataType.FLOAT))
    made.graph.register_initializer(weight)
    find(made, "MatMul").replace_input_with(1, weight)
    ir.save(made, tmp_path / "model.onnx", external_data="model.data")
    loaded = graph.load(tmp_path / "model.onnx")
    result = run(loaded, DropIdentities(), scripted(replace_relu_by_abs), reproducer_folder=tmp_path / "broken")
    assert [record.verified for record in result.records] == ["equal", "rolled-back"]
    assert isinstance(result.model.graph.initializers["w"].const_value, ir.ExternalTensor)
    kept = graph.load(tmp_path / "broken" / "02-scripted" / "model.onnx")
    np.testing.assert_array_equal(kept.graph.initializers["w"].const_value.numpy(), weights)


def test_nodes_without_names_or_with_the_same_one_are_no_obstacle() -> None:
    model = parse(MLP)
    for node in model.graph:
        node.name = "same"
    result = run(model, DropIdentities(), Halves())
    assert [record.verified for record in result.records] == ["equal", "equal"]


def test_a_full_disk_leaves_passes_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optframe.gate.exchange.Exchange._write", full)
    result = run(parse(MLP), DropIdentities())
    assert result.records[0].verified == "unverified"
    assert "No space left on device" in result.records[0].reason


def test_an_input_that_is_added_later_is_compared_with_its_own_outputs() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y) { r = Relu (x)
      y = Neg (r) }
    """

    def raise_opset(model: ir.Model) -> None:
        model.graph.opset_imports[""] = 18

    inputs = [{"x": np.full(2, size, np.float32)} for size in (1, 2000)]
    result = run(parse(text), scripted(clip_late), scripted(raise_opset), inputs=inputs)
    assert [record.verified for record in result.records] == ["rolled-back", "equal"]


def test_initialisers_of_subgraphs_may_hide_outer_ones() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[3] x, bool p) => (float[3] y) <float[3] w = {1.0, 2.0, 3.0}>
    { i = Identity (x)
      a = Add (i, w)
      y = If (p) <
        then_branch = t () => (float[3] b) <float[3] w = {4.0, 5.0, 6.0}> { b = Mul (a, w) },
        else_branch = e () => (float[3] d) { d = Mul (a, w) }
      >
    }
    """
    assert run(parse(text), DropIdentities()).records[0].verified == "equal"


def test_small_weights_on_disk_are_verified_too(tmp_path: Path) -> None:
    ir.save(parse(MLP), tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=0)
    loaded = graph.load(tmp_path / "model.onnx")
    assert isinstance(loaded.graph.initializers["bias"].const_value, ir.ExternalTensor)
    result = run(loaded, DropIdentities(), scripted(replace_relu_by_abs))
    assert [record.verified for record in result.records] == ["equal", "rolled-back"]


def test_observers_hear_of_passes_when_they_begin_and_again_after_a_roll_back() -> None:
    begun: list[str] = []
    run(parse(MLP), scripted(replace_relu_by_abs), DropIdentities(), on_start=begun.append)
    assert begun == ["scripted", "drop-identities", "drop-identities"]


def test_an_unknown_pass_to_stop_after_lists_each_known_one_once() -> None:
    with pytest.raises(InputError, match=r"known: drop-identities, halves$"):
        run(parse(MLP), DropIdentities(), Halves(), DropIdentities(), stop_after="zzz")
