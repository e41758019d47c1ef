"""What FP16 and INT8 cost the real model at full size, made as `optframe run` makes them, on images new to both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from optframe import flops, graph
from optframe.registry import default_registry
from optframe_anchordetr.adapter import AnchorDETRAdapter, AnchorDETROptions
from optframe_anchordetr.images import EVALUATION_PHOTOS, bundled_images, image_feeds

Outputs = Mapping[str, np.ndarray[Any, Any]]

SHAPE = (1, 3, 800, 1066)
LIMITS = {"fp16": 0.03, "int8": 0.20}
"""Error over response; of INT8 the default limit of a run."""

pytestmark = pytest.mark.slow  # minutes: the whole detector at full size, calibrated, on six images in three precisions


@dataclass(frozen=True)
class Measured:
    """Outputs by precision, of the images in one order; "fp32" is PyTorch. `shares` are of the FLOPs in INT8."""

    outputs: Mapping[str, Sequence[Outputs]]
    shares: flops.Int8Fractions


def images() -> list[Image.Image]:
    """The bundled photographs that calibration has no part of: whole, mirrored, and the middle of each.

    A mirror image and an enlarged part are other inputs to a detector, of the same kind as photographs are.
    """
    photos = bundled_images(EVALUATION_PHOTOS)
    middles = [
        photo.crop((photo.width // 4, photo.height // 4, photo.width * 3 // 4, photo.height * 3 // 4))
        for photo in photos
    ]
    return [*photos, *map(ImageOps.mirror, photos), *middles]


@pytest.fixture(scope="module")
def measured(benchmark_module: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    benchmark = benchmark_module("int8/photos.py")
    adapter, registry = AnchorDETRAdapter(AnchorDETROptions(shape=SHAPE)), default_registry()
    feeds = [image_feeds([image], SHAPE, mask=False) for image in images()]
    models: dict[str, Path] = dict(benchmark.models(adapter, tmp_path_factory.mktemp("models"), registry))
    outputs = {kind: benchmark.run_all(model, kind, feeds, registry) for kind, model in models.items()}
    return Measured(
        {"fp32": [adapter.reference(sample) for sample in feeds], **outputs},
        flops.int8_fractions(graph.load(models["int8"]), ops=registry.ops()),
    )


def rms(difference: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


@pytest.mark.parametrize("output", ["pred_logits", "pred_boxes"])
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_every_image_keeps_the_limit(measured: Measured, kind: str, output: str) -> None:
    """The response is the root mean square over all other images, so that no neighbour which is much alike decides.

    Beside one neighbour alone a figure can be above the limit: in `benchmarks/int8` it is 0.22 for the boxes of one
    photograph of thirteen, whose neighbour's boxes are much the same. Here that photograph's are the largest, 0.194;
    all else was up to 0.140, and FP16 up to 0.019 (Intel Xeon, 2026-11-27).
    """
    expected = [outputs[output] for outputs in measured.outputs["fp32"]]
    errors = []
    for index, (actual, wanted) in enumerate(zip(measured.outputs[kind], expected, strict=True)):
        responses = [rms(wanted - other) for each, other in enumerate(expected) if each != index]
        errors.append(rms(actual[output] - wanted) / np.sqrt(np.mean(np.square(responses))))
    print(kind, output, *(f"{error:.3f}" for error in errors))
    assert min(errors) > 0
    assert max(errors) < LIMITS[kind]


@pytest.mark.parametrize("output", ["pred_logits", "pred_boxes"])
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_the_photographs_keep_it_beside_each_other(measured: Measured, kind: str, output: str) -> None:
    """As a run measures them by default: either against the other."""
    first, second = (outputs[output] for outputs in measured.outputs["fp32"][:2])
    for actual, wanted in zip(measured.outputs[kind][:2], (first, second), strict=True):
        assert 0 < rms(actual[output] - wanted) / rms(first - second) < LIMITS[kind]


def test_most_of_the_work_is_in_int8(measured: Measured) -> None:
    assert measured.shares.all >= 0.6
    assert measured.shares.convolutions is not None
    assert measured.shares.convolutions >= 0.9
