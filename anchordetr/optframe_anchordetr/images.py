"""Images as the model's input: loading, resizing, normalising, and the samples for calibration."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from optframe.errors import InputError

CHANNEL_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
CHANNEL_STD = np.array((0.229, 0.224, 0.225), np.float32)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
CALIBRATION_PHOTOS = ("astronaut.jpg", "rocket.jpg")
EVALUATION_PHOTOS = ("coffee.jpg", "chelsea.jpg")
CROP_AREA = (0.3, 1.0)  # of the image
CROP_STRETCH = (0.75, 4 / 3)  # of the input's aspect ratio

Array = NDArray[np.float32]


class ImageFiles(Sequence[Image.Image]):
    """Image files, each read when it is asked for, so that a large folder costs no memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> ImageFiles: ...

    def __getitem__(self, index: int | slice) -> Image.Image | ImageFiles:
        """Return the image at `index` as RGB, upright; `InputError` if the file turns out to be cut off."""
        if isinstance(index, slice):
            return ImageFiles(self._paths[index])
        return _read(self._paths[index])


def load_images(path: Path) -> ImageFiles:
    """Return the image at `path`, or those of the folder `path` in order of their names.

    Raises `InputError` for a missing path, a folder without images, and a file that is no image.
    """
    if not path.exists():
        raise InputError(f"no image or folder of images at {path}")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise InputError(f"no images in {path}; it needs files such as {', '.join(f'*{s}' for s in SUFFIXES[:3])}")
    for file in files:
        with _opened(file):
            pass
    return ImageFiles(files)


def _read(path: Path) -> Image.Image:
    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open `path`; whatever goes wrong with it in here becomes an `InputError` that names it."""
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow knows; remove it or convert it to JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path} ({error}); replace or remove it") from None


def bundled_images(names: Sequence[str]) -> list[Image.Image]:
    """Return photographs that come with the package: those of `CALIBRATION_PHOTOS` or `EVALUATION_PHOTOS`."""
    with resources.as_file(resources.files(__package__) / "photos") as folder:
        return [_read(folder / name) for name in names]


def standard_size(image: Image.Image, short: int = 800, longest: int = 1333) -> tuple[int, int]:
    """Return (height, width) at which the model was trained to see `image`: short side 800, long side up to 1333."""
    width, height = image.size
    if short * max(image.size) > longest * min(image.size):
        short = round(longest * min(image.size) / max(image.size))
    return (short, short * width // height) if height <= width else (short * height // width, short)


def normalised(image: Image.Image, height: int, width: int) -> Array:
    """Return `image` resized to height x width (bilinear, antialiased) as float32 (3, H, W), normalised by channel."""
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, np.float32) / 255
    scaled = (pixels - CHANNEL_MEAN) / CHANNEL_STD
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def image_feeds(images: Sequence[Image.Image], shape: Sequence[int], *, mask: bool) -> dict[str, NDArray[np.generic]]:
    """Return the graph's inputs for `images`, one for each place in the batch of `shape` (N, 3, H, W).

    Without a mask the graph takes every pixel as content, so that each image is resized to exactly H x W. With one it
    keeps its aspect ratio, as large as fits, and is padded right and below with zeros. Either way the boxes are
    fractions of the image's own sides.
    """
    n, _, height, width = shape
    if len(images) != n:
        raise InputError(f"a batch of {n} needs {n} images, not {len(images)}")
    if not mask:
        return {"images": np.stack([normalised(image, height, width) for image in images])}
    batch = np.zeros(tuple(shape), np.float32)
    padding = np.ones((n, height, width), np.bool_)
    for i, image in enumerate(images):
        h, w = _fitting_size(image, height, width)
        batch[i, :, :h, :w] = normalised(image, h, w)
        padding[i, :h, :w] = False
    return {"images": batch, "mask": padding}


def _fitting_size(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    scale = min(height / image.height, width / image.width)
    return max(1, min(height, round(image.height * scale))), max(1, min(width, round(image.width * scale)))


def random_feeds(shape: Sequence[int], *, mask: bool, seed: int) -> dict[str, NDArray[np.generic]]:
    """Return random inputs of `shape` (N, 3, H, W): bright and dark patches with noise; with a mask, random padding."""
    generator = np.random.default_rng(seed)
    n, _, height, width = shape
    coarse = 4.0 * generator.standard_normal((n, 3, -(-height // 64), -(-width // 64)))
    patches = coarse.repeat(64, axis=2).repeat(64, axis=3)[..., :height, :width]
    images = (patches + 0.3 * generator.standard_normal(tuple(shape))).astype(np.float32)
    if not mask:
        return {"images": images}
    padding = np.ones((n, height, width), np.bool_)
    for image_padding in padding:
        h, w = generator.integers(height // 2, height + 1), generator.integers(width // 2, width + 1)
        image_padding[:h, :w] = False
    return {"images": np.where(padding[:, None], np.float32(0), images), "mask": padding}


def calibration_images(images: Sequence[Image.Image], count: int, shape: Sequence[int]) -> Iterator[Image.Image]:
    """Yield `count` images: the given ones first, then random crops of them in turn, about as wide as `shape` asks.

    The same arguments always give the same crops. Raises `InputError` where there is no image to begin with.
    """
    if not images:
        raise InputError("calibration needs images; give a folder of them")
    yield from images[:count]
    generator = random.Random(0)
    for i in range(count - len(images)):
        yield _random_crop(images[i % len(images)], shape[3] / shape[2], generator)


def _random_crop(image: Image.Image, aspect: float, generator: random.Random) -> Image.Image:
    """Return a random part of `image`, mirrored every other time, of about the given width over height."""
    area = generator.uniform(*CROP_AREA) * image.width * image.height
    aspect *= generator.uniform(*CROP_STRETCH)
    width = max(1, min(image.width, round((area * aspect) ** 0.5)))
    height = max(1, min(image.height, round((area / aspect) ** 0.5)))
    left, top = generator.randint(0, image.width - width), generator.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(crop) if generator.random() < 0.5 else crop
