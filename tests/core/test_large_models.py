"""A model of 2.4 GB of external weights goes through in little memory, and says what it did not check."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

LAYERS, SIZE = 24, 5000
ANONYMOUS_MB = 1000
"""What one process may take: the weights are 2400 MB, so that none of the limits holds by accident."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 layers of 5000 x 5000 in a sparse file; each weight begins with other numbers, so that none are duplicates."""
    folder = tmp_path_factory.mktemp("large")
    nodes, weights, value, length = [], [], "x", SIZE * SIZE * 4
    with (folder / "large.data").open("wb") as file:
        for index in range(LAYERS):
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[SIZE, SIZE])
            tensor.data_location = TensorProto.EXTERNAL
            for key, entry in {"location": "large.data", "offset": index * length, "length": length}.items():
                tensor.external_data.add(key=key, value=str(entry))
            file.seek(index * length)
            file.write(np.full(16, index + 1, np.float32).tobytes())
            weights += [tensor, numpy_helper.from_array(np.full(SIZE, 0.1, np.float32), f"b{index}")]
            nodes += [
                helper.make_node("MatMul", [value, f"w{index}"], [f"m{index}"]),
                helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"]),
                helper.make_node("Identity", [f"a{index}"], [f"i{index}"]),
            ]
            value = f"i{index}"
        file.truncate(LAYERS * length)
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", SIZE]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "large", sides[:1], sides[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "large.onnx").write_bytes(model.SerializeToString())
    return folder / "large.onnx"


def optimize(model: Path, verify: str) -> tuple[dict[str, Any], float]:
    """Return what it printed, and the most anonymous memory that the main process took, in MB."""
    command: list[object] = [sys.executable, "-m", "optframe", "optimize", model, "-o", model.with_name("out.onnx")]
    with model.with_name("stdout").open("w+") as stdout:
        words = [str(word) for word in [*command, "--verify", verify, "--json"]]
        process = subprocess.Popen(words, stdout=stdout)
        peak = 0.0
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) / 1024 if found else 0.0)
            time.sleep(0.01)
        assert process.returncode == 0
        stdout.seek(0)
        return json.load(stdout), peak


@pytest.mark.slow  # reads and writes 2.4 GB
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for anonymous memory")
def test_weights_stay_on_disk(large: Path) -> None:
    _, peak = optimize(large, "off")
    assert peak < ANONYMOUS_MB
    out = large.with_name("out.onnx")
    assert not [node for node in onnx.load(out, load_external_data=False).graph.node if node.op_type == "Identity"]
    assert out.stat().st_size < 1 << 20
    assert out.with_name("out.onnx.data").stat().st_size >= LAYERS * SIZE * SIZE * 4


@pytest.mark.slow  # writes 2.4 GB for the process that runs the models
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for anonymous memory")
def test_what_verification_did_not_check_is_said(large: Path) -> None:
    facts, _ = optimize(large, "each")
    changed = [record for record in facts["passes"] if record["modified"]]
    assert changed
    assert {record["verified"] for record in changed} <= {"equal", "unverified"}
    unsure = [record["name"] for record in changed if record["verified"] == "unverified"]
    assert all(any(name in warning for warning in facts["warnings"]) for name in unsure)
