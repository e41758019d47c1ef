"""The documents are true: hooks are listed with their arguments, examples run, named files exist."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from optframe import hookspec, passes
from optframe.backend import NamesOptions
from optframe.pipeline import Pipeline
from optframe.precision import Histogram
from optframe.registry import default_registry
from optframe.testing import assert_op_contract, assert_pass_contract, assert_plugin_contract, model_from_text
from optframe_trt.testing import assert_kernel_contract

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


FILES = re.compile(r"^```(?:python|c\+\+)\n(?:#|//) my_package/(\S+)\n(.*?)^```", re.S | re.M)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of `my_package`, which has the files that docs/extending.md shows."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, code in FILES.findall(EXTENDING):
        (package / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: importlib.import_module(f"my_package.{name}")


def test_the_documented_plugin_keeps_the_contract(example: Callable[[str], ModuleType]) -> None:
    registry = assert_plugin_contract(example("plugin"))
    assert [spec.name for spec in registry.passes()] == ["drop-dropout"]


def test_the_documented_op_its_kernel_and_its_fusion_keep_their_contracts(
    example: Callable[[str], ModuleType], seed: int, needs_nvrtc: None
) -> None:
    def draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"x": rng.standard_normal(rng.integers(1, 9, 3))}

    square = example("square").SQUARE
    assert square.flaw() is None
    assert_op_contract(square, draw, lambda x: x * x, seed=seed)
    assert_kernel_contract(square, draw, lambda x: x * x, seed=seed, empty=lambda _: {"x": np.zeros((2, 0))})
    model = model_from_text("g (float[2,3] x) => (float[2,3] y) { a = Neg(x) y = Mul(a, a) }")
    next(iter(model.graph)).outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    feeds = [{"x": np.array([[-1, 2, 0], [3, -4, 5]], np.float32)}]
    assert assert_pass_contract(example("fuse_square").FuseSquare(), model, feeds, ops=[square]).rewrites == 1


def test_the_documented_calibrator_gives_thresholds(example: Callable[[str], ModuleType]) -> None:
    histogram = Histogram()
    assert example("calibrators").Sigma().threshold(histogram) == 0.0
    histogram.add(np.array([3.0, -4.0, 0.0], np.float32))
    root = np.sqrt(25 / 3)
    assert example("calibrators").Sigma(sigmas=1).threshold(histogram) == pytest.approx(root, rel=1e-3)  # of a bin
    assert example("calibrators").Sigma().threshold(histogram) == 4.0


def test_the_documented_pass_keeps_the_contract(example: Callable[[str], ModuleType]) -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 18]>
            g (float[2,3] x) => (float[2,3] y) { a = Relu(x) b = Dropout(a) y = Neg(b) }"""
        )
    )
    result = assert_pass_contract(
        example("passes").DropDropout(), model, [{"x": np.array([[-1, 2, 0], [3, -4, 5]], np.float32)}]
    )
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
