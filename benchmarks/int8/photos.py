"""Errors of FP16 and INT8 on many photographs, for Anchor DETR: each against the next one's outputs; writes JSON."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optframe
from optframe import environment, flops, graph
from optframe.accuracy import compare_outputs
from optframe.backend import BuildOptions
from optframe.commands.options import read_shape
from optframe.precision import calibrate, quantize, to_fp16
from optframe.registry import Registry, default_registry
from optframe.types import DEFAULT_CALIBRATOR, Feeds, Outputs, Precision
from optframe_anchordetr.adapter import AnchorDETRAdapter, AnchorDETROptions
from optframe_anchordetr.images import SUFFIXES, image_feeds, load_images


def models(
    adapter: AnchorDETRAdapter, folder: Path, registry: Registry, keep: Sequence[str] = ()
) -> Iterator[tuple[Precision, Path]]:
    """Yield the optimised model in FP16 and INT8, with what a run does by default but for the nodes to `keep`."""
    adapter.export(folder / "exported.onnx")
    result = optframe.optimize(folder / "exported.onnx", adapter.pipeline, verify="off", registry=registry)
    fp32 = graph.save(result.model, folder / "fp32.onnx")
    ranges = calibrate(graph.load(fp32), adapter.calibration_feeds(), registry.load_calibrator(DEFAULT_CALIBRATOR)())
    ops = registry.ops()
    yield "int8", graph.save(quantize(graph.load(fp32), ranges, keep=keep, ops=ops), folder / "int8.onnx")
    yield "fp16", graph.save(to_fp16(graph.load(fp32), ops=ops), folder / "fp16.onnx")


def run_all(model: Path, precision: Precision, feeds: Sequence[Feeds], registry: Registry) -> list[Outputs]:
    """Return the outputs in onnxruntime."""
    backend = registry.load_backend("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        engine = backend.build(model, Path(folder), BuildOptions(precision, "cpu", ops=registry.ops()))
        with backend.open(engine) as runner:
            return [runner.run(sample) for sample in feeds]


def measure(options: Mapping[str, Any], photographs: Path, keep: Sequence[str]) -> dict[str, Any]:
    """Return the errors of both precisions on every photograph of a folder, and the share of FLOPs in INT8."""
    adapter, registry = AnchorDETRAdapter(AnchorDETROptions(**options)), default_registry()
    names = sorted(path.name for path in photographs.iterdir() if path.suffix.lower() in SUFFIXES)
    feeds = [image_feeds([photo], options["shape"], mask=False) for photo in load_images(photographs)]
    expected = [adapter.reference(sample) for sample in feeds]
    found: dict[str, Any] = {}
    shares: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision, model in models(adapter, Path(folder), registry, keep):
            if precision == "int8":
                shares = asdict(flops.int8_fractions(graph.load(model), ops=registry.ops()))
            outputs = run_all(model, precision, feeds, registry)
            others = [*expected[1:], expected[0]]
            errors = [compare_outputs(*three) for three in zip(outputs, expected, others, strict=True)]
            found[precision] = {
                name: {output: error.err_over_response for output, error in of.items()}
                for name, of in zip(names, errors, strict=True)
            }
    return {
        "model": "anchordetr",
        "options": {name: str(value) for name, value in options.items()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment.describe(),
        "int8_keep": list(keep),
        "int8_flops": shares,
        "errors": found,
    }


def table(errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the errors in words: a line for each photograph, and the worst and the mean."""
    columns = [(precision, output) for precision in errors for output in next(iter(errors[precision].values()))]
    rows = {name: [errors[p][name][o] for p, o in columns] for name in next(iter(errors.values()))}
    rows["worst"] = [max(column) for column in zip(*rows.values(), strict=True)]
    rows["mean"] = [sum(column) / len(column) for column in zip(*list(rows.values())[:-1], strict=True)]
    lines = ["photograph".ljust(28) + "".join(f"{p} {o}".rjust(20) for p, o in columns)]
    return "\n".join(lines + [name.ljust(28) + "".join(f"{v:20.3f}" for v in values) for name, values in rows.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="a folder of at least two photographs that calibration has not seen")
    parser.add_argument("--shape", type=read_shape, default=(1, 3, 800, 1066))
    parser.add_argument(
        "--int8-keep", action="append", default=[], metavar="PATTERN", help="nodes to leave out of INT8"
    )
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "int8-photos.json")
    arguments = parser.parse_args()
    result = measure({"shape": arguments.shape}, arguments.images, arguments.int8_keep)
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(table(result["errors"]))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
