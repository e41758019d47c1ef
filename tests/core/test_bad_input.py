"""Bad and unusual files through the command line: a clear message, or a model left alone; never a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from optframe import api

Call = Callable[..., Any]
HEAD = '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> '


def parse(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + body)


def cyclic() -> onnx.ModelProto:
    model = parse("g (float[2] x) => (float[2] y) { a = Add (x, x)  b = Relu (a)  y = Neg (b) }")
    model.graph.node[0].input[1] = "b"
    return model


def unsorted() -> onnx.ModelProto:
    model = parse("g (float[2] x) => (float[2] y) { a = Relu (x)  y = Neg (a) }")
    first = onnx.NodeProto()
    first.CopyFrom(model.graph.node[0])
    del model.graph.node[0]
    model.graph.node.append(first)
    return model


def reads_nothing() -> onnx.ModelProto:
    model = parse("g (float[2] x) => (float[2] y) { y = Add (x, x) }")
    model.graph.node[0].input[1] = "nowhere"
    return model


def value_made_twice() -> onnx.ModelProto:
    model = parse("g (float[2] x) => (float[2] y) { a = Relu (x)  b = Neg (x)  y = Add (a, b) }")
    model.graph.node[1].output[0] = "a"
    return model


def output_from_nowhere() -> onnx.ModelProto:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.graph.output[0].name = "z"
    return model


def no_outputs() -> onnx.ModelProto:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    del model.graph.output[:]
    return model


def external(folder: Path, weights: bytes | None, location: str = "w.data") -> Path:
    """Write a model whose weight, 4 KiB, lies in a file that holds `weights`."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[32, 32], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "4096"}.items():
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])],
        [tensor],
    )
    path = folder / "external.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    if weights is not None:
        (folder / "w.data").write_bytes(weights)
    return path


COMMANDS: Mapping[str, Callable[[Path], list[object]]] = {
    "optimize": lambda path: ["optimize", path, "-o", path.with_name("out.onnx")],
    "optimize unverified": lambda path: ["optimize", path, "-o", path.with_name("out.onnx"), "--verify", "off"],
    "bisect": lambda path: ["bisect", path, "--pipeline", "clean"],
    "run": lambda path: ["run", path, "--out", path.with_name("runs")],
}


def refuses(call: Call, command: str, path: Path, message: str) -> None:
    called = call(*COMMANDS[command](path))
    assert called.status == 2, called.err
    assert message in called.err
    assert len([line for line in called.err.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in called.err
    assert not path.with_name("out.onnx").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cyclic, "which nothing before it makes"),
        (unsorted, "which nothing before it makes"),
        (reads_nothing, "which nothing before it makes"),
        (value_made_twice, "Output 'a'"),
        (output_from_nowhere, "graph output 'z' is made by nothing"),
        (no_outputs, "its graph has no outputs"),
    ],
)
def test_invalid_graphs_are_refused(
    command: str, make: Callable[[], onnx.ModelProto], message: str, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(make().SerializeToString())
    refuses(call, command, path, message)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "content",
    [b"", b"no model at all", parse("g (float[2] x) => (float[2] y) { y = Relu (x) }").SerializeToString()[:-9]],
)
def test_files_that_are_no_models_are_refused(command: str, content: bytes, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    refuses(call, command, path, "ONNX model")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("weights", "location", "message"),
    [
        (None, "w.data", "its weight file w.data is missing; put it beside the model"),
        (bytes(4000), "w.data", "its weight file w.data is cut off at 4000 bytes"),
        (bytes(4096), "../w.data", "lies outside the model's folder"),
        (bytes(4096), "/etc/passwd", "lies outside the model's folder"),
    ],
)
def test_external_weights_that_cannot_be_read_are_refused(
    command: str, weights: bytes | None, location: str, message: str, tmp_path: Path, call: Call
) -> None:
    refuses(call, command, external(tmp_path, weights, location), message)


def test_external_weights_are_read(tmp_path: Path, call: Call) -> None:
    path = external(tmp_path, np.eye(32, dtype=np.float32).tobytes())
    assert call(*COMMANDS["optimize"](path)).status == 0
    assert_same(path, path.with_name("out.onnx"))


def assert_same(before: Path, after: Path, **feeds: Any) -> None:
    samples = [feeds] if feeds else None
    for error in api.compare(after, before, inputs=samples).values():
        assert error.max_abs == 0


@pytest.mark.parametrize("verify", ["each", "end", "off"])
def test_unknown_domains_are_left_alone(verify: str, tmp_path: Path, call: Call) -> None:
    path, out = tmp_path / "foreign.onnx", tmp_path / "out.onnx"
    body = "g (float[2] x) => (float[2] y) { a = Identity (x)  b = acme.Secret <level = 3> (a)  y = Identity (b) }"
    onnx.save(parse(body), path)
    called = call("optimize", path, "-o", out, "--verify", verify)
    assert called.status == 0
    ops = [(node.domain, node.op_type) for node in onnx.load(out).graph.node]
    assert ("acme", "Secret") in ops
    assert verify == "off" or "verified" in called.err


@pytest.mark.parametrize("condition", [True, False])
def test_branches_that_no_input_reaches_are_kept(condition: bool, tmp_path: Path, call: Call) -> None:
    path, out = tmp_path / "if.onnx", tmp_path / "out.onnx"
    body = """g (float[2, 3] x, bool c) => (float[3, 2] y) {
        y = If (c) <
            then_branch = a () => (float[3, 2] p) { i = Identity (x)  p = Transpose <perm = [1, 0]> (i) },
            else_branch = b () => (float[3, 2] q) { s = Constant <value = int64[2] {3, 2}> ()  q = Reshape (x, s) }
        >
    }"""
    onnx.save(parse(body), path)
    np.savez(tmp_path / "inputs.npz", x=np.arange(6, dtype=np.float32).reshape(2, 3), c=np.array(condition))
    assert call("optimize", path, "-o", out, "--inputs", tmp_path / "inputs.npz").status == 0
    for taken in (True, False):
        assert_same(path, out, x=np.arange(6, dtype=np.float32).reshape(2, 3), c=np.array(taken))


def test_repeated_node_names_are_left_alone(tmp_path: Path, call: Call) -> None:
    path, out = tmp_path / "names.onnx", tmp_path / "out.onnx"
    model = parse("g (float[2] x) => (float[2] y) { a = Relu (x)  b = Identity (a)  c = Neg (b)  y = Exp (c) }")
    for node in model.graph.node:
        node.name = "same"
    onnx.save(model, path)
    assert call("optimize", path, "-o", out).status == 0
    assert [node.op_type for node in onnx.load(out).graph.node] == ["Relu", "Neg", "Exp"]
    samples = [{"x": np.array([-1, 2], np.float32)}]
    assert_same(path, out, **samples[0])


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_of_the_wrong_size_are_refused(command: str, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "short.onnx"
    model = parse("g (float[2] x) => (float[2] y) { y = Add (x, w) }")
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "w")
    tensor.raw_data = tensor.raw_data[:5]
    model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())
    refuses(call, command, path, "weight 'w' has 5 bytes, its type and shape take 8")
