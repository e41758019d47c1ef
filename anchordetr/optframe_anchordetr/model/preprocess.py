"""Batching of images of different sizes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from optframe.errors import InputError


def pad_batch(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad normalised images (3, H_i, W_i) right and below with zeros to the largest height and width, and stack them.

    Returns images (N, 3, H, W) and their mask (N, H, W), True on padding. Only out-of-place operators, so that a traced
    graph depends on its input: in-place copies into slices of a zero tensor are lost by exporters. Raises `InputError`
    for no image or one that is not (3, H, W).
    """
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"an image to batch has shape {tuple(image.shape)}, not (3, height, width)")
    if not images:
        raise InputError("there is no image to batch; give at least one")
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    padded = [_pad(image, height, width) for image in images]
    content = [_pad(torch.ones_like(image[0]), height, width) for image in images]
    return torch.stack(padded), torch.stack(content) == 0


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
