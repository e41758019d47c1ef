"""`optframe diff`: ops, types, weights, FLOPs, provenance and outputs, and when it exits with 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.diff import diff
from optframe.passes import TORCH_SCOPES_KEY

TEXT = """<ir_version: 8, opset_import: ["" : 18]>
g (float[n, 3] x) => (float[n, 4] y) <float[3, 4] w = {WEIGHT}, float[4] b = {1.0, 2.0, 3.0, 4.0}> {
    [product] a = MatMul (x, w)
    [sum] c = Add (a, b)
    [same] d = Identity (c)
    [out] y = Relu (d)
}"""


def make(scale: float = 1.0, text: str = TEXT) -> ir.Model:
    weight = ", ".join(f"{scale * value:.6f}" for value in np.linspace(-1, 1, 12))
    return ir.from_proto(onnx.parser.parse_model(text.replace("WEIGHT", weight)))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, ir.Model], Path]:
    return lambda name, model: graph.save(model, tmp_path / f"{name}.onnx")


Write = Callable[[str, ir.Model], Path]


def test_a_model_does_not_differ_from_itself(write: Write, call: Callable[..., Any]) -> None:
    a, b = write("a", make()), write("b", make())
    called = call("diff", a, b, "--json", "--exit-code")
    facts = called.facts
    assert called.status == 0
    assert not facts["anything"]
    assert facts["nodes"] == [4, 4]
    assert [output["error"]["max_abs"] for output in facts["outputs"]] == [0.0]


def test_a_changed_weight_shows_in_the_weights_and_the_outputs(write: Write, call: Callable[..., Any]) -> None:
    a, b = write("a", make()), write("b", make(1.5))
    called = call("diff", a, b, "--json")
    facts = called.facts
    assert called.status == 1
    assert "the outputs of" in called.err
    assert facts["weights"] == {"w": ["float[3, 4]", "float[3, 4], by up to 0.5"]}
    assert (facts["ops"], facts["added"], facts["removed"]) == ({}, [], [])
    assert not facts["outputs"][0]["equal"]
    assert call("diff", a, b, "--max-abs", 100).status == 0


def test_structure_alone_is_a_difference_only_when_asked(write: Write, call: Callable[..., Any]) -> None:
    a, b = (
        write("a", make()),
        write("b", make(text=TEXT.replace("[same] d = Identity (c)", "").replace("Relu (d)", "Relu (c)"))),
    )
    assert call("diff", a, b).status == 0
    called = call("diff", a, b, "--exit-code", "--json")
    assert called.status == 1
    assert called.facts["ops"] == {"Identity": [1, 0]}
    assert [node["name"] for node in called.facts["removed"]] == ["same"]
    page = call("diff", a, b).out
    assert "-1 Identity" in page
    assert "Identity same" in page


def test_new_nodes_say_what_made_them_from_what_and_where(write: Write, call: Callable[..., Any]) -> None:
    before = make()
    for node, module in zip(before.graph, ("head.linear", "head.linear", "head", "head.act"), strict=True):
        node.metadata_props[TORCH_SCOPES_KEY] = f"['', 'head', '{module}', 'op']"
    a = write("a", before)
    b = a.with_name("b.onnx")
    assert call("optimize", a, "-o", b, "--pipeline", "clean,select-gemm", "--verify", "off").status == 0
    facts = call("diff", a, b, "--json").facts
    (gemm,) = facts["added"]
    assert gemm["op_type"] == "Gemm"
    assert gemm["passes"] == ["select-gemm"]
    assert gemm["origins"] == ["product", "sum"]
    assert gemm["modules"] == ["head.linear"]
    assert facts["flops"] == [2 * 2 * 3 * 4] * 2  # a random input has two rows where their number is free
    page = " ".join(call("diff", a, b).out.split())
    assert "by select-gemm from product, sum in head.linear" in page


def test_interfaces_and_opsets_are_compared(write: Write, call: Callable[..., Any]) -> None:
    other = make(text=TEXT.replace("float[n, 3] x", "float[5, 3] x").replace(": 18", ": 19"))
    a, b = write("a", make()), write("b", other)
    facts = call("diff", a, b, "--no-run", "--json").facts
    assert facts["interface"] == {"input x": ["float[n,3]", "float[5,3]"]}
    assert facts["opsets"] == {"ai.onnx": ["18", "19"]}
    assert facts["outputs"] is None
    assert facts["not_compared"] == "nobody asked"


def test_outputs_of_other_names_differ(write: Write, call: Callable[..., Any]) -> None:
    a, b = write("a", make()), write("b", make(text=TEXT.replace(" y)", " z)").replace("y = Relu", "z = Relu")))
    called = call("diff", a, b)
    assert called.status == 1
    assert "not the reference's" in called.err


def test_a_model_that_does_not_run_is_still_compared(write: Write) -> None:
    foreign = make()
    foreign.graph[-1].domain = "acme"
    foreign.opset_imports["acme"] = 1
    found = diff(make(), foreign)
    assert found.outputs is None
    assert found.not_compared
    assert not found.outputs_differ
    assert [node.op_type for node in found.added] == ["acme::Relu"]
    assert found.ops == {"Relu": (1, 0), "acme::Relu": (0, 1)}


def test_bad_files_and_inputs_are_errors(write: Write, call: Callable[..., Any], tmp_path: Path) -> None:
    a = write("a", make())
    assert call("diff", a, tmp_path / "absent.onnx").status == 2
    np.savez(tmp_path / "wrong.npz", z=np.zeros(3))
    called = call("diff", a, a, "--inputs", tmp_path / "wrong.npz")
    assert called.status == 2
    assert "does not fit the model" in called.err
