"""From the model's outputs to detections in image coordinates, and the picture that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from optframe_anchordetr.coco import class_name


@dataclass(frozen=True)
class Detection:
    """An object found: COCO class id, score in [0, 1], box (left, top, right, bottom) in pixels of the image."""

    label: int
    score: float
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """The class's name."""
        return class_name(self.label)


def detections(
    logits: NDArray[np.floating[Any]], boxes: NDArray[np.floating[Any]], size: tuple[int, int], top_k: int = 100
) -> list[Detection]:
    """Return the `top_k` best pairs of query and class of one image, best first, a tie by query and class.

    `logits` (Q, classes) and `boxes` (Q, 4), (cx, cy, w, h) as fractions, are the model's outputs for the image;
    `size` is its original (width, height) in pixels.
    """
    order = np.argsort(-logits, axis=None, kind="stable")[:top_k]
    queries, labels = np.unravel_index(order, logits.shape)
    scores = _sigmoid(logits[queries, labels].astype(np.float64))
    corners = _corners(boxes[queries].astype(np.float64)) * np.array((*size, *size))
    rows = zip(labels.tolist(), scores.tolist(), corners.tolist(), strict=True)
    return [Detection(label, score, tuple(box)) for label, score, box in rows]


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 / (1 + exp(-x)) without overflow for large negative x."""
    return np.exp(-np.logaddexp(0.0, -x))


def _corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn (cx, cy, w, h) into (left, top, right, bottom)."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate((centre - half, centre + half), axis=1)


def draw(
    image: Image.Image, found: Sequence[Detection], *, threshold: float = 0.0, limit: int | None = None
) -> Image.Image:
    """Return a copy of `image` with box, class and score of the first `limit` detections that reach `threshold`."""
    picture = image.copy()
    shown = [detection for detection in found if detection.score >= threshold][:limit]
    for detection in reversed(shown):  # the best one on top
        _draw_one(ImageDraw.Draw(picture), detection, picture.size)
    return picture


def _draw_one(pen: ImageDraw.ImageDraw, detection: Detection, size: tuple[int, int]) -> None:
    width, height = size
    left, right = (min(max(x, 0.0), width - 1.0) for x in detection.box[0::2])
    top, bottom = (min(max(y, 0.0), height - 1.0) for y in detection.box[1::2])
    colour = ImageColor.getrgb(f"hsl({detection.label * 137 % 360}, 90%, 45%)")  # neighbours far apart on the circle
    thickness = max(2, min(size) // 200)
    pen.rectangle((left, top, right, bottom), outline=colour, width=thickness)
    font = ImageFont.load_default(max(10, min(size) // 32))
    text = f"{detection.name} {detection.score:.2f}"
    label = pen.textbbox((left + thickness, top + thickness), text, font=font)
    pen.rectangle((label[0] - 2, label[1] - 2, label[2] + 2, label[3] + 2), fill=colour)
    pen.text((left + thickness, top + thickness), text, fill="white", font=font)
