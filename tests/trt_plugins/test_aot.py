"""Ahead-of-time plugins against the real `tensorrt` bindings, over stub libraries: the full ones need a GPU machine.

`OPTFRAME_TENSORRT_BINDINGS` names other folders that bindings wheels were unpacked to, separated as in PATH.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from optframe.errors import EnvironmentLacks
from optframe_anchordetr.ops import LAYER_NORM
from optframe_trt import aot, flavours, nvrtc

INSTALL = "pip install tensorrt_cu12_bindings==10.13.3.9"
SCRIPT = Path(__file__).parent / "in_full_tensorrt.py"
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"),
)


def bindings() -> list[Path]:
    """Folders that hold a `tensorrt_bindings` package: type stubs of that name are none."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    found = [Path(spec.origin).parents[1]] if spec is not None and spec.origin else []
    return found + [Path(p) for p in os.environ.get("OPTFRAME_TENSORRT_BINDINGS", "").split(os.pathsep) if p]


def make_tensorrt(site: Path, folder: Path) -> None:
    """Lay down a `tensorrt` of the bindings in `folder` and of libraries that have their functions, but do nothing."""
    shutil.copytree(folder / "tensorrt_bindings", site / "tensorrt_bindings", ignore=shutil.ignore_patterns("*.pyi"))
    package = site / "tensorrt"
    (package / "plugin").mkdir(parents=True)
    (package / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    shutil.copytree(folder / "tensorrt_bindings" / "plugin", package / "plugin", dirs_exist_ok=True)
    needed = subprocess.run(
        ["readelf", "-d", str(site / "tensorrt_bindings" / "tensorrt.so")], capture_output=True, text=True, check=True
    ).stdout
    (site / "stub.c").write_text("".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for line in needed.splitlines():
        if "NEEDED" in line and "nv" in line:
            name = line.split("[")[1].rstrip("]")
            subprocess.run(["cc", "-shared", "-fPIC", "-o", str(site / name), str(site / "stub.c")], check=True)


@pytest.mark.parametrize("folder", bindings() or [None], ids=lambda folder: folder.name if folder else "none")
def test_real_bindings_take_the_declarations(folder: Path | None, tmp_path: Path) -> None:
    if folder is None:
        pytest.skip(f"needs the bindings of TensorRT: {INSTALL}")
    if not (shutil.which("cc") and shutil.which("readelf")):
        pytest.skip("needs cc and readelf, for libraries that the bindings can be loaded with")
    if not nvrtc.toolkits():
        pytest.skip("no NVRTC is installed (extra optframe[nvrtc])")
    make_tensorrt(tmp_path, folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        env=environment | {"LD_LIBRARY_PATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, capped, shaped, last = done.stdout.splitlines()
    assert capped.startswith("optframe_anchordetr::Capped_without_scale_bias: its launch is no expression")
    assert shaped.startswith("optframe_anchordetr::RCDA_without_row_mask_column_mask: its kernel depends on the shape")
    version, numpy, in_python, *plugins = last.split(";")
    if version.startswith("10.") and not numpy.startswith("1."):
        assert in_python == (
            f"TensorRT {version} cannot read plugin fields with NumPy {numpy}: "
            "pip install 'numpy<2', or a later TensorRT"
        )
    else:
        assert in_python == "works"
    assert plugins == [
        "optframe_anchordetr::LayerNorm",
        "optframe_anchordetr::LayerNorm_without_scale",
        "optframe_anchordetr::SkipLayerNorm_without_scale_bias",
        "optframe_anchordetr::RCDA_without_column_mask",
    ]


def test_a_flavour_without_them_says_so() -> None:
    try:
        flavour = flavours.load("tensorrt-rtx")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))
    model = ir.Model(ir.Graph([], [], nodes=[], name="empty"), ir_version=8)
    with pytest.raises(EnvironmentLacks, match="no ahead-of-time plugins"):
        aot.register(flavour, [LAYER_NORM], ["sm89"], model)
