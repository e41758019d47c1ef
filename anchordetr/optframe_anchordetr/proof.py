"""Proof that an exported graph computes what the PyTorch module does, and that its outputs depend on its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from optframe.errors import CheckFailed
from optframe_anchordetr.config import ExportOptions
from optframe_anchordetr.export import OUTPUT_NAMES
from optframe_anchordetr.images import EVALUATION_PHOTOS, bundled_images, image_feeds, random_feeds
from optframe_anchordetr.model import AnchorDETR

Arrays = dict[str, NDArray[Any]]

# Error over response of one float32 implementation against another. Two runtimes that sum in different orders
# differ by 1e-5 to 1e-4 of the response; a graph that gets anything wrong, or ignores an input, by 1e-2 to 1.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Agreement:
    """How one output of the graph agrees with PyTorch's at one input shape, over two different inputs.

    `max_abs` is the largest absolute difference; `response` and `graph_response` are the RMS by which PyTorch's and
    the graph's outputs for the two inputs differ; `error_over_response` is the RMS difference of graph to PyTorch over
    PyTorch's response.
    """

    shape: tuple[int, ...]
    output: str
    max_abs: float
    response: float
    graph_response: float
    error_over_response: float


def prove(model: AnchorDETR, path: Path, options: ExportOptions) -> list[Agreement]:
    """Run the graph at `path` in onnxruntime against `model`, on a photograph and on a random input.

    With `options.dynamic` at three shapes, one of them a batch of two. Returns the figures of each shape and output.
    Raises `CheckFailed` where a difference is larger than float32's rounding explains, or an input is ignored.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = tuple(value.name for value in session.get_inputs())
    if names != options.input_names:
        raise CheckFailed(f"the exported graph takes {names}, not {options.input_names}: an input is not used")
    agreements = []
    for shape in _shapes(options, model.config.stride):
        feeds = _two_feeds(shape, options.mask)
        graph_outputs = [_named(session.run(list(OUTPUT_NAMES), feed)) for feed in feeds]
        agreements += _compare(shape, [_run_module(model, feed) for feed in feeds], graph_outputs)
    for agreement in agreements:
        _judge(agreement)
    return agreements


def _shapes(options: ExportOptions, stride: int) -> list[tuple[int, ...]]:
    if not options.dynamic:
        return [options.shape]
    return [options.shape, (2, 3, 5 * stride + 1, 3 * stride + 7), (1, 3, 3 * stride, 6 * stride - 5)]


def _two_feeds(shape: tuple[int, ...], mask: bool) -> list[Arrays]:
    photos = bundled_images(EVALUATION_PHOTOS)
    batch = [photos[i % len(photos)] for i in range(shape[0])]
    return [image_feeds(batch, shape, mask=mask), random_feeds(shape, mask=mask, seed=shape[2])]


def _named(outputs: list[Any]) -> Arrays:
    return dict(zip(OUTPUT_NAMES, outputs, strict=True))


def _run_module(model: AnchorDETR, feeds: Arrays) -> Arrays:
    device = next(model.parameters()).device
    with torch.inference_mode():
        outputs = model(*(torch.from_numpy(array).to(device) for array in feeds.values()))
    return _named([output.cpu().numpy() for output in outputs])


def _compare(shape: tuple[int, ...], expected: list[Arrays], actual: list[Arrays]) -> list[Agreement]:
    agreements = []
    for name in OUTPUT_NAMES:
        reference, result = (
            np.stack([arrays[name] for arrays in run]).astype(np.float64) for run in (expected, actual)
        )
        error = result - reference
        response = _rms(reference[0] - reference[1])
        ratio = _rms(error) / response if response else float("inf")
        graph_response = _rms(result[0] - result[1])
        agreements.append(Agreement(shape, name, float(np.abs(error).max()), response, graph_response, ratio))
    return agreements


def _rms(array: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(array))))


def _judge(agreement: Agreement) -> None:
    if agreement.response == 0 or agreement.graph_response == 0:
        culprit = "PyTorch model" if agreement.response == 0 else "exported graph"
        raise CheckFailed(
            f"the {culprit} ignores its input: {agreement.output} is the same for a photograph and for noise; "
            "check the weights, or try another exporter"
        )
    if agreement.error_over_response <= TOLERANCE:  # False for NaN
        return
    shape = "x".join(map(str, agreement.shape))
    raise CheckFailed(
        f"the exported graph does not equal the PyTorch model at {shape}: {agreement.output} differs by up to "
        f"{agreement.max_abs:.2g}, {agreement.error_over_response:.2g} of what another image changes (tolerance "
        f"{TOLERANCE:g}); try another exporter or opset, and report this"
    )
