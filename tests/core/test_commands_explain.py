"""`optframe explain`: matches and near misses with their reasons, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

TEXT = """<ir_version: 8, opset_import: ["" : 18]>
g (float[2, 3] x, float[3] s) => (float[2, 3] y) {
    [twice] a = Identity (x)
    [other] b = Identity (a)
    [drop] y = Dropout (b)
}"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


def test_matches_are_listed_and_the_file_stays(model: Path, call: Callable[..., Any]) -> None:
    before = model.read_bytes()
    facts = call("explain", "eliminate-identity", model, "--json").facts
    assert facts["pass"] == "eliminate-identity"
    assert facts["modified"]
    assert any("twice" in rewrite for rewrite in facts["rewrites"])
    assert (facts["nodes_before"], facts["nodes_after"]) == (3, 3 - len(facts["rewrites"]))
    assert facts["op_changes"]["Identity"] == -2
    assert model.read_bytes() == before
    assert list(model.parent.iterdir()) == [model]


def test_near_misses_have_reasons(tmp_path: Path, call: Callable[..., Any]) -> None:
    path = tmp_path / "old.onnx"
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[2, 3] x) => (float[2, 3] y) {
        [mean] m = ReduceMean <keepdims = 1> (x)
        [centre] d = Sub (x, m)
        [out] y = Relu (d)
    }"""
    onnx.save(onnx.parser.parse_model(text), path)
    called = call("explain", "fuse-layernorm", path)
    facts = call("explain", "fuse-layernorm", path, "--json").facts
    assert not facts["modified"]
    assert facts["near_misses"]
    assert all(miss["reason"] and miss["node"] in ("mean", "centre", "out") for miss in facts["near_misses"])
    assert called.status == 0
    assert "0 rewrites" in called.out
    assert "left alone because" in called.out


def test_passes_before_it_change_what_it_finds(model: Path, call: Callable[..., Any]) -> None:
    facts = call("explain", "eliminate-identity", model, "--after", "clean", "--json").facts
    assert facts["rewrites"] == []


def test_long_lists_are_cut(model: Path, call: Callable[..., Any]) -> None:
    assert "more (--limit, --json)" in call("explain", "eliminate-identity", model, "--limit", 1).out


@pytest.mark.parametrize(
    ("step", "message"),
    [("portable", "stands for"), ("fold-constant", "did you mean 'fold-constants'"), ("", "0 passes")],
)
def test_it_takes_one_pass(step: str, message: str, model: Path, call: Callable[..., Any]) -> None:
    called = call("explain", step, model)
    assert called.status == 2
    assert message in called.err
    assert len(called.err.splitlines()) == 1


def test_a_pass_that_raises_is_named(
    model: Path, call: Callable[..., Any], install_plugin: Callable[..., None]
) -> None:
    install_plugin(
        "acme-raise",
        "1.0",
        "raising = acme_raise",
        acme_raise="""
            from dataclasses import dataclass
            from optframe.hookspec import hookimpl
            from optframe.passes import GraphPass
            from optframe.types import PassSpec

            @hookimpl
            def optframe_passes():
                return [PassSpec("raising", "acme_raise:Raising", "raise")]

            @dataclass(frozen=True)
            class Raising(GraphPass):
                name = "raising"
                def run(self, model, context):
                    raise KeyError("nothing doing")
        """,
    )
    called = call("explain", "raising", model)
    assert called.status == 1
    assert "pass 'raising' raised KeyError: 'nothing doing'" in called.err
