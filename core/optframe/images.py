"""A folder of images as inputs of an ONNX file that takes one image: resized, normalised, one image a sample."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import onnx_ir as ir

from optframe.errors import EnvironmentLacks, InputError, unknown_name
from optframe.feeds import model_inputs
from optframe.types import Feeds

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
CHANNELS = 3

PREPROCESSING: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "bytes": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
"""Name -> mean and standard deviation of RGB in [0, 1]: ImageNet's; [0, 1] as it is; [-1, 1]; 0 to 255."""


class ImageFolder(Sequence[Feeds]):
    """The images of a folder, in order of their names, as samples of `model`; each is read when it is asked for.

    Raises:
        InputError: the folder is missing or has no images, there is no such preprocessing, or the model does not take
            one float tensor (1, 3, H, W) alone.
        EnvironmentLacks: Pillow is not installed.
    """

    def __init__(self, folder: Path, model: ir.Model, preprocessing: str = "imagenet") -> None:
        if preprocessing not in PREPROCESSING:
            raise unknown_name("preprocessing", preprocessing, PREPROCESSING)
        self._mean, self._std = (np.array(figures, np.float32) for figures in PREPROCESSING[preprocessing])
        self._input, self._size = _image_input(model)
        self._paths = _images_in(folder)
        _pillow()

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Feeds: ...

    @overload
    def __getitem__(self, index: slice) -> ImageFolder: ...

    def __getitem__(self, index: int | slice) -> Feeds | ImageFolder:
        """Return the sample of one image, or some of the images; `InputError` for one that cannot be read."""
        if isinstance(index, slice):
            part = copy(self)
            part._paths = self._paths[index]
            return part
        pixels = np.asarray(_read(self._paths[index], self._size), np.float32) / 255
        scaled = ((pixels - self._mean) / self._std).transpose(2, 0, 1)[None]
        return {self._input: np.ascontiguousarray(scaled, np.float32)}


def _image_input(model: ir.Model) -> tuple[str, tuple[int, int]]:
    """Return the name of the one image that `model` takes, and its (width, height)."""
    inputs = model_inputs(model)
    shape = list(inputs[0].shape or ()) if len(inputs) == 1 else []
    fits = len(shape) == 4 and shape[1] == CHANNELS and all(isinstance(size, int) for size in shape[2:])
    if not fits or inputs[0].dtype != ir.DataType.FLOAT or (isinstance(shape[0], int) and shape[0] != 1):
        taken = ", ".join(f"{value.name} {value.dtype} {value.shape}" for value in inputs)
        raise InputError(f"images can only be fed to a model of one float input 1x3xHxW, not {taken}; use --inputs")
    return inputs[0].name or "", (int(str(shape[3])), int(str(shape[2])))


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no such folder of images: {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"no images in {folder}; it needs files such as {', '.join(f'*{s}' for s in SUFFIXES[:3])}")
    return paths


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise EnvironmentLacks("reading images needs Pillow: pip install 'optframe[images]'") from error
    return PIL.Image


def _read(path: Path, size: tuple[int, int]) -> Image.Image:
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            resized: Image.Image = image.convert("RGB").resize(size, pillow.Resampling.BILINEAR)
            return resized
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path} ({error}); replace or remove it") from error
