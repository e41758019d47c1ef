"""Positions of feature-map cells and anchor points, and their sine embeddings."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0
EPSILON = 1e-5


def feature_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize a padding mask (N, H, W) to (N, height, width) by nearest neighbour, source index floor(i * H / height).

    Integer arithmetic, since runtimes differ in how they round the scale of ONNX's Resize.
    """
    rows, columns = _source_indices(mask, 1, height), _source_indices(mask, 2, width)
    return mask.index_select(1, rows).index_select(2, columns)


def _source_indices(mask: Tensor, axis: int, size: int) -> Tensor:
    indices = torch.arange(size, device=mask.device)
    return torch.div(indices * mask.shape[axis], size, rounding_mode="trunc")


def grid_coordinates(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x (N, w) and y (N, h), the cell centres in (0, 1) within each image's unpadded part of mask (N, h, w)."""
    return _centres(mask[:, 0, :], dtype), _centres(mask[:, :, 0], dtype)


def _centres(padded: Tensor, dtype: torch.dtype) -> Tensor:
    count = (~padded).cumsum(1, dtype=dtype)
    return (count - 0.5) / count[:, -1:]


def anchor_grid(steps: int) -> Tensor:
    """Return the (steps * steps, 2) points (x, y) of a regular grid in (0, 1), x outermost."""
    centres = (torch.arange(steps, dtype=torch.float32) + 0.5) / steps
    return torch.cartesian_prod(centres, centres)


def sine_embedding(position: Tensor, features: int) -> Tensor:
    """Embed scalars (...) in `features` interleaved sines and cosines: (..., features).

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.5, of positions scaled by 2 pi.
    """
    even = torch.arange(0, features, 2, dtype=position.dtype, device=position.device)
    angles = (position * (2 * math.pi)).unsqueeze(-1) / TEMPERATURE ** (even / features)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def sine_embedding_2d(x: Tensor, y: Tensor, features: int) -> Tensor:
    """Embed points of coordinates x and y, both (...), in (..., features): first half y, second half x."""
    return torch.cat((sine_embedding(y, features // 2), sine_embedding(x, features // 2)), dim=-1)


def inverse_sigmoid(probability: Tensor) -> Tensor:
    """Return the logit of each element, of probabilities kept EPSILON away from 0 and 1."""
    probability = probability.clamp(0.0, 1.0)
    return torch.log(probability.clamp(min=EPSILON) / (1.0 - probability).clamp(min=EPSILON))
