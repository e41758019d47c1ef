"""Error against the share of FLOPs in INT8, for Anchor DETR: calibrates, ranks its layers, writes one JSON file."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optframe import api, environment
from optframe.commands.options import read_shape
from optframe.stages import RunRequest
from optframe.store import Store


def measure(options: dict[str, Any], target: float, runs: int) -> dict[str, Any]:
    """Return what calibration and sensitivity found, with the machine they ran on."""
    request = RunRequest(verify="off", sensitivity=target, sensitivity_runs=runs)
    ranges, found = api.calibrate("anchordetr", options=options, request=request, on_work=print, store=Store())
    assert found is not None, "the request asks for it"
    return {
        "model": "anchordetr",
        "options": {name: str(value) for name, value in options.items()},
        "calibrator": ranges.calibrator,
        "samples": ranges.samples,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment.describe(),
        "sensitivity": asdict(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=read_shape, default=(1, 3, 800, 1066))
    parser.add_argument("--images", type=Path, help="photographs to measure errors on; default: the bundled ones")
    parser.add_argument("--error", type=float, default=0.1, help="error over response to propose layers for")
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "int8.json")
    arguments = parser.parse_args()
    options: dict[str, Any] = {"shape": arguments.shape}
    if arguments.images:
        options["images"] = arguments.images
    result = measure(options, arguments.error, arguments.runs)
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
