"""Facts about the machine: read from files and commands that the test lays down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from optframe import environment


@pytest.fixture(autouse=True)
def fresh_facts() -> Iterator[None]:
    environment.gpus.cache_clear()
    yield
    environment.gpus.cache_clear()


def test_description_is_plain_data_and_names_what_is_installed() -> None:
    facts = json.loads(json.dumps(environment.describe()))
    assert facts["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert 1 <= facts["cpu"]["cores"] <= facts["cpu"]["threads"] <= (os.cpu_count() or 1)
    assert facts["memory_gb"] > 0.5
    assert {"optframe", "onnxruntime", "numpy"} <= facts["packages"].keys()
    assert "mypy" not in facts["packages"]  # what only developing needs is left out


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from optframe import environment; environment.describe(); "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy', 'onnx_ir') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000\n", 2), ("50000 100000", 1), ("max 100000", None), ("", None)]
)
def test_a_containers_quota_caps_the_cores(
    text: str, cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(environment, "CGROUP", tmp_path)
    monkeypatch.setattr(environment, "_affinity", lambda: set(range(64)))
    monkeypatch.setattr(environment, "_core_of", lambda cpu: str(cpu // 2))
    assert environment.usable_cores() == (cores or 32)
    assert environment.usable_threads() == (cores or 64)


def test_a_containers_memory_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000000\n")
    monkeypatch.setattr(environment, "CGROUP", tmp_path)
    assert environment.memory_gb() == 1.0


def fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA H200, 580.159.03, 143771 MiB, 9.0'", monkeypatch)
    assert environment.gpus() == (
        {"name": "NVIDIA H200", "driver_version": "580.159.03", "memory.total": "143771 MiB", "compute_cap": "9.0"},
    )
    assert environment.machine_name("cuda") == "NVIDIA H200"


@pytest.mark.parametrize("script", ["echo 'NVIDIA-SMI has failed'; exit 9", "echo 'No devices were found'"])
def test_a_driver_that_does_not_work_means_no_gpu(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, script, monkeypatch)
    assert environment.gpus() == ()
    assert "core" in environment.machine_name("cuda")
