"""Keeps measured tables in one JSON file a GPU, each with where, when and how it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
_PACKAGES = ("torch", "triton", "numpy", "onnxruntime-gpu", "onnxruntime", "cupy-cuda12x", "cupy-cuda13x")


def _gpu() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return dict(zip(_GPU_FIELDS, (field.strip() for field in answer.split(",")), strict=True))


def default_path() -> Path:
    """Return the file of this machine's GPU: h100-80gb-hbm3.json of an "NVIDIA H100 80GB HBM3"."""
    name = re.sub(r"[^a-z0-9]+", "-", _gpu()["name"].lower().removeprefix("nvidia "))
    return Path(__file__).parent / "results" / f"{name}.json"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def date() -> str:
    """Return date and time of now, as results have them."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def environment(command: str) -> dict[str, Any]:
    """Return the GPU with its clocks right now, versions, date and the command that measures the same again."""
    versions = {package: version for package in _PACKAGES if (version := _version(package))}
    return {
        "gpu": _gpu(),
        "versions": {"python": platform.python_version(), **versions},
        "date": date(),
        "command": command,
    }


def save(path: Path, name: str, rows: Sequence[dict[str, Any]], *, command: str, **how: Any) -> None:
    """Put the table `name` into the file at `path`, with its environment and `how` under "runs"; keep all else."""
    tables: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    tables[name] = list(rows)
    tables.setdefault("runs", {})[name] = {**environment(command), **how}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(tables, indent=1) + "\n")
    partial.replace(path)
