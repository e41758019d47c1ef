"""What builder, pre-flight and runner use of TensorRT exists in the real bindings, of every flavour at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optframe_trt import flavours

HERE = Path(__file__).parent


def lacking(module: str, environment: dict[str, str]) -> list[str]:
    """Return what `module` lacks, after the number of names looked for."""
    command = [sys.executable, str(HERE / "used_api.py"), module]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not flavours.is_installed("tensorrt-rtx"), reason="needs tensorrt-rtx-cu13")
def test_rtx_has_what_is_used() -> None:
    count, *missing = lacking("tensorrt_rtx", dict(os.environ))
    assert missing == []
    assert int(count) > 60


def test_full_tensorrt_has_what_is_used(full_tensorrt: dict[str, str]) -> None:
    count, *missing = lacking("tensorrt", full_tensorrt)
    assert missing == []
    assert int(count) > 60
