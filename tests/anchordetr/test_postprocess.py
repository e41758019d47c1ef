"""Detections and their picture, from outputs whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageChops

from optframe_anchordetr.coco import COCO_CLASSES, class_name
from optframe_anchordetr.detect import detect
from optframe_anchordetr.images import standard_size
from optframe_anchordetr.model import AnchorDETR
from optframe_anchordetr.postprocess import Detection, detections, draw


class TestDetections:
    def test_best_pairs_of_query_and_class(self) -> None:
        logits = np.full((4, 91), -9.0, np.float32)
        logits[2, 17], logits[2, 18], logits[0, 1] = 2.0, 1.0, 3.0
        boxes = np.array([[0.5, 0.5, 1, 1], [0, 0, 0, 0], [0.25, 0.5, 0.1, 0.2], [0, 0, 0, 0]], np.float32)
        found = detections(logits, boxes, (200, 100), top_k=3)
        assert [d.name for d in found] == ["person", "cat", "dog"]
        np.testing.assert_allclose([d.score for d in found], 1 / (1 + np.exp([-3.0, -2.0, -1.0])), rtol=1e-12)
        np.testing.assert_allclose(found[0].box, (0, 0, 200, 100), atol=1e-5)  # float32 boxes times 200
        np.testing.assert_allclose(found[1].box, (40, 40, 60, 60), atol=1e-5)
        assert found[1].box == found[2].box

    def test_a_hundred_in_falling_order(self, rng: np.random.Generator) -> None:
        logits = rng.standard_normal((900, 91)).astype(np.float32)
        found = detections(logits, rng.random((900, 4), np.float32), (640, 480))
        assert len(found) == 100
        best = np.sort(logits, axis=None)[::-1][:100]
        np.testing.assert_allclose([d.score for d in found], 1 / (1 + np.exp(-best.astype(np.float64))), rtol=1e-12)

    def test_large_logits_do_not_overflow(self) -> None:
        with np.errstate(all="raise", under="ignore"):
            found = detections(np.array([[1e4, -1e4]], np.float32), np.zeros((1, 4), np.float32), (1, 1))
        assert [d.score for d in found] == [1.0, 0.0]

    def test_class_names(self) -> None:
        assert len(COCO_CLASSES) == 80
        assert [class_name(i) for i in (1, 44, 62, 90, 12)] == [
            "person",
            "bottle",
            "chair",
            "toothbrush",
            "class 12",
        ]


class TestDraw:
    image = Image.new("RGB", (200, 160), "white")
    cat = Detection(17, 0.9, (20.0, 30.0, 180.0, 150.0))
    dog = Detection(18, 0.3, (100.0, 100.0, 150.0, 140.0))

    def changed(self, **options: float) -> tuple[int, int, int, int] | None:
        return ImageChops.difference(self.image, draw(self.image, [self.cat, self.dog], **options)).getbbox()

    def test_boxes_lie_where_the_detections_are(self) -> None:
        assert self.changed(limit=1) == (20, 30, 181, 151)
        assert self.image.getextrema() == ((255, 255),) * 3  # the original is untouched

    @pytest.mark.parametrize(("options", "count"), [({"threshold": 0.5}, 1), ({"limit": 0}, 0), ({}, 2)])
    def test_threshold_and_limit(self, options: dict[str, float], count: int) -> None:
        expected = draw(self.image, [self.cat, self.dog][:count])
        assert ImageChops.difference(draw(self.image, [self.cat, self.dog], **options), expected).getbbox() is None

    def test_boxes_outside_the_image(self) -> None:
        far = Detection(1, 0.5, (-50.0, -1e6, 1e6, 500.0))
        assert draw(self.image, [far]).size == self.image.size


def test_detect_in_images_of_two_sizes(small_model: AnchorDETR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image of a padded batch gets boxes in its own pixels."""
    monkeypatch.setattr(
        "optframe_anchordetr.detect.standard_size", lambda image: standard_size(image, short=64, longest=107)
    )
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in ((30, 40), (90, 50))]
    found = detect(small_model, images, top_k=20)
    assert [len(one) for one in found] == [20, 20]
    for image, one in zip(images, found, strict=True):
        centres = [((d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2) for d in one]
        assert all(0 <= x <= image.width and 0 <= y <= image.height for x, y in centres)
        assert max(x for x, _ in centres) > image.width / 2  # not in units of the network's input
