"""`optframe bisect`: to the pass, to the rewrite; by outputs, by a tolerance, by a script."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

TEXT = '<ir_version: 8, opset_import: ["" : 18]> g (float[2, 3] x) => (float[2, 3] v7) {'
TEXT += "\n".join(f"[node{i}] v{i} = Softplus ({f'v{i - 1}' if i else 'x'})" for i in range(8)) + "}"

PLUGIN = """
    from dataclasses import dataclass
    from optframe.hookspec import hookimpl
    from optframe.passes import GraphPass, PassResult
    from optframe.types import PassSpec

    @hookimpl
    def optframe_passes():
        return [PassSpec("rename", "acme_rename:Rename", "rename an op")]

    @dataclass(frozen=True)
    class Rename(GraphPass):
        name = "rename"
        to: str = "Softplus"
        first: int = 0

        def run(self, model, context):
            made = 0
            for node in list(model.graph)[self.first :]:
                if node.op_type != self.to and context.allow(node):
                    node.op_type = self.to if node.name == "node5" else "Softplus"
                    made += 1
            return PassResult(made > 0, made)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


@pytest.fixture(autouse=True)
def rename(install_plugin: Callable[..., None]) -> None:
    install_plugin("acme-rename", "1.0", "rename = acme_rename", acme_rename=PLUGIN)


def test_unequal_outputs_lead_to_pass_and_rewrite(model: Path, call: Callable[..., Any]) -> None:
    called = call("bisect", model, "--pipeline", "clean,rename{to=Exp,first=2},fold-constants", "--json")
    found = called.facts["found"]
    assert called.status == 1
    assert called.facts["passes"] == 7
    assert (found["index"], found["pass_name"], found["pass_text"]) == (5, "rename", "rename{to=Exp,first=2}")
    assert (found["rewrite"], found["number"]) == ("rename at node5", 4)
    assert "pass 6, 'rename', makes the check fail with its rewrite 4: rename at node5" in called.err


def test_a_pipeline_that_breaks_nothing(model: Path, call: Callable[..., Any]) -> None:
    called = call("bisect", model, "--pipeline", "clean")
    assert (called.status, called.err) == (0, "")
    assert "after all 5 passes" in called.out
    assert call("bisect", model, "--pipeline", "clean", "--json").facts["found"] is None


def test_a_tolerance_decides_what_is_right(model: Path, call: Callable[..., Any]) -> None:
    inputs = model.with_name("inputs.npz")
    np.savez(inputs, x=np.full((2, 3), 0.5, np.float32))
    pipeline = ("--pipeline", "rename{to=Relu}", "--inputs", inputs)
    assert call("bisect", model, *pipeline, "--max-abs", 1e-3).status == 1
    # softplus(v) - relu(v) is at most ln 2 = 0.69, and softplus has a slope below 1, so two more make it no larger
    assert call("bisect", model, *pipeline, "--max-abs", 0.7).status == 0


@pytest.mark.parametrize("kind", ["python", "executable"])
def test_a_script_decides_what_is_right(kind: str, model: Path, call: Callable[..., Any]) -> None:
    script = model.with_name("check.py" if kind == "python" else "check")
    code = "import sys, onnx\nsys.exit(any(n.op_type == 'Exp' for n in onnx.load(sys.argv[1]).graph.node))\n"
    script.write_text(code if kind == "python" else '#!/bin/sh\n! grep -q Exp "$1"\n')
    script.chmod(0o755)
    called = call("bisect", model, "--pipeline", "clean,rename{to=Exp}", "--check", script, "--json")
    assert called.facts["found"]["rewrite"] == "rename at node5"


def test_a_script_that_takes_too_long_finds_it_wrong(model: Path, call: Callable[..., Any]) -> None:
    script = model.with_name("check.py")
    script.write_text(
        textwrap.dedent("""
            import sys, time, onnx
            if any(n.op_type == 'Exp' for n in onnx.load(sys.argv[1]).graph.node): time.sleep(600)
        """)
    )
    called = call("bisect", model, "--pipeline", "rename{to=Exp}", "--check", script, "--timeout", 3)
    assert called.status == 1
    assert "rename at node5" in called.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "absent.py"], "no such file: absent.py"),
        (["--check", "absent.py", "--max-abs", 1], "--check judges alone"),
        (["--inputs", "absent.npz"], "no such file: absent.npz"),
    ],
)
def test_what_cannot_be_asked(arguments: list[object], message: str, model: Path, call: Callable[..., Any]) -> None:
    called = call("bisect", model, "--pipeline", "clean", *arguments)
    assert called.status == 2
    assert message in called.err


def test_a_check_that_fails_at_once_finds_nothing(model: Path, call: Callable[..., Any]) -> None:
    script = model.with_name("check.py")
    script.write_text("raise SystemExit(3)\n")
    called = call("bisect", model, "--pipeline", "clean", "--check", script)
    assert called.status == 2
    assert "the check fails on the model as it is" in called.err


def test_a_script_that_is_no_program_is_an_error(model: Path, call: Callable[..., Any]) -> None:
    script = model.with_name("check")
    script.write_text("no program")
    called = call("bisect", model, "--pipeline", "clean", "--check", script)
    assert called.status == 2
    assert "cannot be run" in called.err


def test_a_model_that_does_not_run_has_nothing_to_compare(tmp_path: Path, call: Callable[..., Any]) -> None:
    path = tmp_path / "foreign.onnx"
    text = '<ir_version: 8, opset_import: ["" : 18, "acme" : 1]> g (float[2] x) => (float[2] y) { y = acme.Op (x) }'
    onnx.save(onnx.parser.parse_model(text), path)
    called = call("bisect", path, "--pipeline", "clean")
    assert called.status == 2
    assert "nothing can be compared" in called.err
