"""What builder, pre-flight and runner use of TensorRT exists in the real bindings, of every flavour at hand."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optframe_trt import flavours

HERE = Path(__file__).parent
AOT = runpy.run_path(str(HERE / "test_aot.py"))


def lacking(module: str, environment: dict[str, str]) -> list[str]:
    """Return what `module` lacks, after the number of names looked for."""
    command = [sys.executable, str(HERE / "used_api.py"), module]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not flavours.is_installed("tensorrt-rtx"), reason="needs tensorrt-rtx-cu13")
def test_rtx_has_what_is_used() -> None:
    count, *missing = lacking("tensorrt_rtx", {})
    assert missing == []
    assert int(count) > 60


@pytest.mark.parametrize("folder", AOT["bindings"]() or [None], ids=lambda folder: folder.name if folder else "none")
def test_full_tensorrt_has_what_is_used(folder: Path | None, tmp_path: Path) -> None:
    if folder is None:
        pytest.skip(f"needs the bindings of TensorRT: {AOT['INSTALL']}")
    if not (shutil.which("cc") and shutil.which("readelf")):
        pytest.skip("needs cc and readelf, for libraries that the bindings can be loaded with")
    AOT["make_tensorrt"](tmp_path, folder)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    count, *missing = lacking("tensorrt", {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(tmp_path)})
    assert missing == []
    assert int(count) > 60
