"""The documents are true: hooks are listed with their arguments, examples run, named files exist."""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from optframe import hookspec, passes
from optframe.backend import NamesOptions
from optframe.pipeline import Pipeline
from optframe.registry import default_registry
from optframe.testing import assert_pass_contract

ROOT = Path(__file__).resolve().parents[2]
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_hook_is_documented_with_its_arguments() -> None:
    for name in dir(hookspec):
        if not name.startswith("optframe_"):
            continue
        [row] = [line for line in EXTENDING.splitlines() if line.startswith(f"| `{name}`")]
        for argument in inspect.signature(getattr(hookspec, name)).parameters:
            assert f"`{argument}`" in row, f"{name}: {argument}"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The pass of docs/extending.md, as a module that dataclasses can look up."""
    [code] = [block for block in re.findall(r"```python\n(.*?)```", EXTENDING, re.S) if "GraphPass" in block]
    module = ModuleType("documented_pass")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "docs/extending.md", "exec"), module.__dict__)
    return module


def test_the_documented_pass_keeps_the_contract(example: ModuleType) -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 18]>
            g (float[2,3] x) => (float[2,3] y) { a = Relu(x) b = Dropout(a) y = Neg(b) }"""
        )
    )
    result = assert_pass_contract(example.DropDropout(), model, [{"x": np.array([[-1, 2, 0], [3, -4, 5]], np.float32)}])
    assert result == passes.PassResult(modified=True, rewrites=1)


@pytest.mark.parametrize("name", ["onnxruntime", "torch", "tensorrt", "tensorrt-rtx"])
def test_every_option_of_a_backend_is_documented(name: str) -> None:
    page = "tensorrt" if name.startswith("tensorrt") else "backends"
    rows = re.findall(r"^\|(.*?)\|", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.M)
    documented = {word.removeprefix("--").replace("-", "_") for row in rows for word in re.findall(r"`(.*?)`", row)}
    backend = default_registry().load_backend(name)
    assert isinstance(backend, NamesOptions)
    assert backend.option_names
    assert set(backend.option_names) <= documented


def test_the_readmes_pipelines_can_be_read() -> None:
    texts = re.findall(r"""(?:--pipeline |pipeline=)"([^"]+)\"""", README)
    assert len(texts) == 2
    for text in texts:
        Pipeline.parse(text.removesuffix(",my-pass"), default_registry())


def test_the_readme_names_files_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^\| `([a-z_/]+)` \|", README, re.M):
        assert (ROOT / folder).is_dir(), folder
