"""Images as input: sizes, normalisation, padding, calibration crops, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from optframe.errors import InputError
from optframe_anchordetr.images import (
    CALIBRATION_PHOTOS,
    EVALUATION_PHOTOS,
    bundled_images,
    calibration_images,
    image_feeds,
    load_images,
    normalised,
    random_feeds,
    standard_size,
)


def plain(width: int, height: int, colour: tuple[int, int, int] = (124, 116, 104)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def noise(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


class TestLoading:
    def test_folder_in_order_of_names(self, tmp_path: Path) -> None:
        for i, name in enumerate(["b.png", "a.JPG", "c.bmp"]):
            plain(10 + i, 5).save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("none")
        images = load_images(tmp_path)
        assert [image.width for image in images] == [11, 10, 12]
        assert [image.width for image in images[1:]] == [10, 12]

    def test_grey_alpha_and_palette_become_rgb(self, tmp_path: Path) -> None:
        for mode in ("L", "RGBA", "P", "I;16"):
            Image.new(mode, (4, 4)).save(tmp_path / f"{mode[0]}{len(mode)}.png")
        assert {image.mode for image in load_images(tmp_path)} == {"RGB"}

    def test_camera_orientation_is_applied(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned by 90 degrees
        plain(30, 20).save(tmp_path / "turned.jpg", exif=exif)
        assert load_images(tmp_path / "turned.jpg")[0].size == (20, 30)

    def test_bundled_photographs(self) -> None:
        assert not set(CALIBRATION_PHOTOS) & set(EVALUATION_PHOTOS)
        for image in bundled_images([*CALIBRATION_PHOTOS, *EVALUATION_PHOTOS]):
            assert max(image.size) >= 400
            assert np.asarray(image).std() > 20  # no blank picture

    def test_missing_and_empty(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no image or folder of images at"):
            load_images(tmp_path / "none")
        with pytest.raises(InputError, match="no images in"):
            load_images(tmp_path)

    def test_file_that_is_no_image(self, tmp_path: Path) -> None:
        plain(8, 8).save(tmp_path / "a.png")
        (tmp_path / "b.png").write_text("not an image")
        with pytest.raises(InputError, match=r"b\.png is not an image that Pillow knows"):
            load_images(tmp_path)
        (tmp_path / "b.png").write_bytes(b"")
        with pytest.raises(InputError, match=r"b\.png is not an image"):
            load_images(tmp_path)

    @pytest.mark.parametrize("suffix", ["jpg", "png"])
    def test_file_that_is_cut_off(self, tmp_path: Path, suffix: str, rng: np.random.Generator) -> None:
        path = tmp_path / f"cut.{suffix}"
        noise(200, 200, rng).save(path)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(InputError, match=r"cannot read image .*cut"):
            load_images(path)[0]


class TestPreparing:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((640, 480), (800, 1066)),
            ((480, 640), (1066, 800)),
            ((1000, 1000), (800, 800)),
            ((2000, 500), (333, 1332)),
            ((500, 2000), (1332, 333)),
            ((640, 427), (800, 1199)),
        ],
    )
    def test_standard_size(self, size: tuple[int, int], expected: tuple[int, int]) -> None:
        assert standard_size(plain(*size)) == expected

    def test_normalised_pixels(self, rng: np.random.Generator) -> None:
        image = noise(7, 5, rng)
        array = normalised(image, 5, 7)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        for channel in range(3):
            expected = (np.asarray(image)[..., channel] / 255.0 - mean[channel]) / std[channel]
            np.testing.assert_allclose(array[channel], expected, rtol=0, atol=1e-6)  # float32 of values up to 3

    def test_without_mask_the_image_fills_the_input(self) -> None:
        feeds = image_feeds([plain(300, 200, (255, 0, 0))], (1, 3, 64, 64), mask=False)
        assert list(feeds) == ["images"]
        assert feeds["images"].shape == (1, 3, 64, 64)
        assert np.ptp(feeds["images"], axis=(2, 3)).max() < 1e-6  # one colour, no padding

    def test_with_mask_the_aspect_stays(self) -> None:
        feeds = image_feeds([plain(300, 200), plain(100, 300)], (2, 3, 64, 96), mask=True)
        assert feeds["mask"].dtype == np.bool_
        content = ~feeds["mask"]
        assert content.sum(axis=(1, 2)).tolist() == [64 * 96, 64 * 21]
        assert content[1, :64, :21].all()
        assert not feeds["images"][1, :, :, 21:].any()
        assert np.abs(feeds["images"][1, :, :, :21]).min() > 0

    def test_number_of_images(self) -> None:
        with pytest.raises(InputError, match="a batch of 2 needs 2 images, not 1"):
            image_feeds([plain(9, 9)], (2, 3, 64, 64), mask=False)

    def test_random_feeds(self, seed: int) -> None:
        shape = (3, 3, 65, 130)
        a, b, other = (random_feeds(shape, mask=True, seed=s) for s in (seed, seed, seed + 1))
        assert a["images"].shape == shape
        assert a["images"].dtype == np.float32
        assert np.array_equal(a["images"], b["images"])
        assert not np.array_equal(a["images"], other["images"])
        assert not a["mask"][:, 0, 0].any()
        assert not a["images"].transpose(0, 2, 3, 1)[a["mask"]].any()
        assert list(random_feeds(shape, mask=False, seed=seed)) == ["images"]


class TestCalibration:
    def test_images_first_then_crops(self, rng: np.random.Generator) -> None:
        images = [noise(120, 80, rng), noise(60, 90, rng)]
        made = list(calibration_images(images, 12, (1, 3, 64, 96)))
        assert len(made) == 12
        assert [np.array_equal(a, b) for a, b in zip(made, images, strict=False)] == [True, True]
        assert len({image.tobytes() for image in made}) == 12
        for i, crop in enumerate(made[2:]):
            source = images[i % 2]
            assert crop.width <= source.width
            assert crop.height <= source.height
            assert 0.2 < crop.width * crop.height / (source.width * source.height) < 1

    def test_the_same_crops_every_time(self, rng: np.random.Generator) -> None:
        images = [noise(120, 80, rng)]
        first, second = (list(calibration_images(images, 6, (1, 3, 64, 96))) for _ in range(2))
        assert [a.tobytes() for a in first] == [b.tobytes() for b in second]

    def test_more_images_than_asked_for(self, rng: np.random.Generator) -> None:
        images = [noise(20, 20, rng) for _ in range(5)]
        assert list(calibration_images(images, 3, (1, 3, 64, 96))) == images[:3]

    def test_no_images(self) -> None:
        with pytest.raises(InputError, match="calibration needs images"):
            next(calibration_images([], 3, (1, 3, 64, 96)))
