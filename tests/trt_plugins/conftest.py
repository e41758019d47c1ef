"""The full TensorRT as far as it goes here: real bindings over libraries that have their functions, but do nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "OPTFRAME_TENSORRT_BINDINGS"
"""Names folders that wheels `tensorrt_cu12_bindings` were installed to, besides those of the Makefile, as in PATH."""

SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"),
)


def folders() -> list[Path]:
    """Folders with a package `tensorrt_bindings`, one for each version; `make test` lays them down."""
    named = [Path(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    return [*sorted(Path(sys.prefix, "tensorrt").glob("*/")), *named]


def lay_down(site: Path, folder: Path) -> None:
    """Write a package `tensorrt` of the bindings in `folder`, and the libraries that they are linked to."""
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


@pytest.fixture(params=folders() or [None], ids=lambda folder: folder.name if folder else "none")
def full_tensorrt(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that imports the bindings of one version as `tensorrt`."""
    if request.param is None:
        pytest.skip(f"needs bindings of TensorRT: `make suite` installs them, or name their folders in {VARIABLE}")
    if not (shutil.which("cc") and shutil.which("readelf")):
        pytest.skip("needs cc and readelf, for libraries that the bindings can be loaded with")
    site = tmp_path / "site-full-tensorrt"
    lay_down(site, request.param)
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return os.environ | {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(site)}
