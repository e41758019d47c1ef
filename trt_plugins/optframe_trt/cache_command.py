"""`optframe trt-cache`: TensorRT's calibration cache out of optframe's data, and ranges out of TensorRT's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optframe.commands import options as shared
from optframe.errors import InputError
from optframe.session import Session
from optframe_trt.calibration_cache import DEFAULT_VERSION

trt_cache = typer.Typer(help="Exchange INT8 ranges with TensorRT's calibration cache.", no_args_is_help=True)

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The FP32 model, as TensorRT gets it.")]


@trt_cache.command("export")
def export_cache(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CACHE", help="Where TensorRT's cache goes.")],
    inputs: shared.Inputs = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Images to calibrate on.")] = None,
    preprocessing: Annotated[
        str, typer.Option(help="What the model makes of pixels: imagenet, unit, symmetric, bytes.")
    ] = "imagenet",
    calibrator: Annotated[str, typer.Option(metavar="TEXT", help="How ranges are chosen.")] = "entropy",
    trt_version: Annotated[
        str, typer.Option(metavar="NUMBER", help="TensorRT's; 101303 is 10.13.3.")
    ] = DEFAULT_VERSION,
) -> None:
    """Measure every tensor of MODEL.onnx and write TensorRT's cache, for builds in which it places INT8 itself."""
    from optframe import graph, precision
    from optframe.feeds import read_feeds
    from optframe.images import ImageFolder
    from optframe_trt.calibration_cache import from_ranges

    session: Session = context.obj
    if (inputs is None) == (images is None):
        raise InputError("give data to calibrate on: either --inputs FILE.npz or --images DIR")
    loaded = graph.load(model)
    feeds = read_feeds(inputs, loaded) if inputs else ImageFolder(images or Path(), loaded, preprocessing)
    with session.progress_console.status("calibrate …") as status:
        ranges = precision.calibrate(
            loaded,
            feeds,
            session.registry.make_calibrator(calibrator),
            everywhere=True,
            progress=lambda count: status.update(f"calibrate … {count} samples"),
        )
    cache = from_ranges(ranges, trt_version)
    cache.save(output)
    session.console.print(f"{len(cache.scales)} tensors on {ranges.samples} samples: {output}", soft_wrap=True)


@trt_cache.command("import")
def import_cache(
    context: typer.Context,
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="A calibration cache that TensorRT wrote.")],
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RANGES.json", help="Where the ranges go.")],
) -> None:
    """Turn TensorRT's cache for MODEL.onnx into ranges for --calibration-cache of a run with --pipeline ""."""
    from optframe import graph
    from optframe_trt.calibration_cache import load_cache, to_ranges

    session: Session = context.obj
    ranges = to_ranges(load_cache(cache), graph.load(model), warn=session.warn)
    ranges.save(output)
    session.console.print(f"{len(ranges.tensors)} tensors of {ranges.calibrator}: {output}", soft_wrap=True)
