"""Anchor DETR as optframe's model: from the user's options to export, inputs, reference outputs and pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from optframe.errors import InputError
from optframe.types import Feeds, Illustration, Outputs, Part
from optframe_anchordetr.config import Exporter, ExportOptions, check_shape, variant_config

if TYPE_CHECKING:
    from PIL.Image import Image

    from optframe_anchordetr.model import AnchorDETR

CALIBRATION_SAMPLES = 6
PICTURE_LIMIT = 10


@dataclass(frozen=True)
class AnchorDETROptions:
    """What a user chooses.

    `checkpoint`: a published `.pth` file; None means seeded weights, which detect nothing. `images`: what errors and
    latency are measured on, a file or a folder; `calibration_images`: a folder for INT8 ranges, of which the first
    `calibration_samples` images are used (with fewer images, crops of them fill up); by default bundled photographs.
    `dynamic` frees batch, height and width; `shape` is then the size that is measured.
    """

    variant: str = "r50-dc5"
    checkpoint: Path | None = None
    shape: tuple[int, ...] = (1, 3, 800, 1066)
    opset: int = 17
    exporter: Exporter = "torchscript"
    mask: bool = False
    dynamic: bool = False
    images: Path | None = None
    calibration_images: Path | None = None
    calibration_samples: int = CALIBRATION_SAMPLES

    def __post_init__(self) -> None:
        check_shape(self.shape, variant_config(self.variant).stride)
        if self.calibration_samples < 1:
            raise InputError(f"calibration_samples is {self.calibration_samples}; at least 1 image is needed")

    @property
    def export(self) -> ExportOptions:
        """The part that the exporter needs; raises InputError for a combination that it cannot make."""
        return ExportOptions(self.shape, self.opset, self.exporter, self.mask, self.dynamic)


class AnchorDETRAdapter:
    """Follows `optframe.types.ModelAdapter`; the reference is the PyTorch module in FP32 on the CPU."""

    Options: ClassVar[type[AnchorDETROptions]] = AnchorDETROptions
    pipeline = "anchordetr"
    pipelines: ClassVar[Mapping[str, str]] = {"cuda": "anchordetr-cuda", "tensorrt": "anchordetr-tensorrt"}
    source = "PyTorch FP32"

    def __init__(self, options: AnchorDETROptions) -> None:
        self.options = options
        self._export_options = options.export
        for path in (options.checkpoint, options.images, options.calibration_images):
            if path is not None and not path.exists():
                raise InputError(f"no such file or folder: {path}")

    def dependencies(self, of: Part) -> Mapping[str, object]:
        """Return the options that shape the export, the measured inputs or the calibration data."""
        options = self.options
        feeds = {"shape": options.shape, "mask": options.mask}
        if of == "feeds":
            return feeds | {"images": options.images or "bundled"}
        if of == "calibration":
            samples = {"samples": options.calibration_samples, "dynamic": options.dynamic}
            return feeds | samples | {"images": options.calibration_images or "bundled"}
        return feeds | {
            "variant": options.variant,
            "checkpoint": options.checkpoint or "seeded",
            "opset": options.opset,
            "exporter": options.exporter,
            "dynamic": options.dynamic,
        }

    def notes(self, of: Part) -> Sequence[str]:
        """Say what a reader of the figures has to know."""
        if of == "export" and self.options.checkpoint is None:
            return [
                "The weights are seeded, not trained: errors and latency are real, detections mean nothing. "
                "Pass --checkpoint for your own."
            ]
        if of == "calibration" and self.options.calibration_images is None:
            return [
                "INT8 ranges come from two bundled photographs and crops of them; "
                "pass --calibration-images for real use."
            ]
        return []

    @cached_property
    def _model(self) -> AnchorDETR:
        from optframe_anchordetr.checkpoint import load_checkpoint
        from optframe_anchordetr.model import build
        from optframe_anchordetr.weights import load_seeded_weights

        model = build(self.options.variant).eval()
        if self.options.checkpoint is None:
            load_seeded_weights(model)
        else:
            load_checkpoint(model, self.options.checkpoint)
        return model

    def export(self, path: Path) -> None:
        """Export to `path` and prove the graph against PyTorch on a photograph and on noise."""
        from optframe_anchordetr.export import export
        from optframe_anchordetr.proof import prove

        export(self._model, path, self._export_options)
        prove(self._model, path, self._export_options)

    @cached_property
    def _photos(self) -> Sequence[Image]:
        from optframe_anchordetr.images import EVALUATION_PHOTOS, bundled_images, load_images

        return load_images(self.options.images) if self.options.images else bundled_images(EVALUATION_PHOTOS)

    def feeds(self) -> Sequence[Feeds]:
        """Return two batches of the first images; a single image is joined by a bundled photograph."""
        from optframe_anchordetr.images import EVALUATION_PHOTOS, bundled_images, image_feeds

        batch = self.options.shape[0]
        photos = self._photos if len(self._photos) > 1 else [*self._photos, *bundled_images(EVALUATION_PHOTOS)]
        batches = [[photos[(start + i) % len(photos)] for i in range(batch)] for start in range(2)]
        return [image_feeds(images, self.options.shape, mask=self.options.mask) for images in batches]

    def random_feeds(self, seed: int) -> Feeds:
        """Return random images of the chosen shape; a `dynamic` model gets small batches of other sizes."""
        from optframe_anchordetr.images import random_feeds

        shape = self.options.shape
        if self.options.dynamic:
            stride = variant_config(self.options.variant).stride
            shape = (1 + seed % 2, 3, (5 + seed) * stride + 3, (8 - seed % 5) * stride + 5)
        return random_feeds(shape, mask=self.options.mask, seed=seed)

    def calibration_feeds(self) -> Iterator[Feeds]:
        """Yield `calibration_samples` inputs from the calibration images and crops of them."""
        from optframe_anchordetr.images import (
            CALIBRATION_PHOTOS,
            bundled_images,
            calibration_images,
            image_feeds,
            load_images,
        )

        folder = self.options.calibration_images
        images = load_images(folder) if folder else bundled_images(CALIBRATION_PHOTOS)
        shape = self.options.shape
        for image in calibration_images(images, self.options.calibration_samples, shape):
            yield image_feeds([image] * shape[0], shape, mask=self.options.mask)

    def reference(self, feeds: Feeds) -> Outputs:
        """Return pred_logits (N, queries, 91) and pred_boxes (N, queries, 4) of the PyTorch module in FP32."""
        import torch

        with torch.inference_mode():
            logits, boxes = self._model(*(torch.from_numpy(array) for array in feeds.values()))
        return {"pred_logits": logits.numpy(), "pred_boxes": boxes.numpy()}

    def illustrate(self, outputs: Mapping[str, Outputs]) -> Sequence[Illustration]:
        """Return the first image with its detections, once for each run."""
        from optframe_anchordetr.postprocess import detections, draw

        image = self._photos[0]
        pictures = []
        for label, arrays in outputs.items():
            found = detections(arrays["pred_logits"][0], arrays["pred_boxes"][0], image.size)
            stream = io.BytesIO()
            draw(image, found, limit=PICTURE_LIMIT).save(stream, "JPEG", quality=85)
            best = ", ".join(f"{detection.name} {detection.score:.0%}" for detection in found[:3])
            pictures.append(Illustration(label, stream.getvalue(), f"best: {best}", "image/jpeg"))
        return pictures
