"""Ahead-of-time plugins against the real `tensorrt` bindings, over stub libraries: the full ones need a GPU machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from optframe.errors import EnvironmentLacks
from optframe_anchordetr.ops import LAYER_NORM
from optframe_trt import aot, flavours

SCRIPT = Path(__file__).parent / "in_full_tensorrt.py"


@pytest.mark.usefixtures("needs_nvrtc")
def test_real_bindings_take_the_declarations(full_tensorrt: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=full_tensorrt)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, capped, shaped, last = done.stdout.splitlines()
    assert capped.startswith("optframe_anchordetr::Capped_without_scale_bias: its launch is no expression")
    assert shaped.startswith("optframe_anchordetr::Exact_without_row_mask_column_mask: its kernel depends on the shape")
    version, numpy, in_python, *plugins = last.split(";")
    if int(version.split(".")[0]) == 10 and int(version.split(".")[1]) < 16 and not numpy.startswith("1."):
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
        "optframe_anchordetr::RCDA_without_row_mask_column_mask",
    ]


def test_a_flavour_without_them_says_so() -> None:
    try:
        flavour = flavours.load("tensorrt-rtx")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))
    model = ir.Model(ir.Graph([], [], nodes=[], name="empty"), ir_version=8)
    with pytest.raises(EnvironmentLacks, match="no ahead-of-time plugins"):
        aot.register(flavour, [LAYER_NORM], ["sm89"], model)
