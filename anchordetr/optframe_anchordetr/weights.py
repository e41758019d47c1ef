"""Seeded weights that stand in for a checkpoint: each tensor depends on its name and shape alone.

They keep activations in a realistic range and make outputs depend on the image and on the query, so that an error can
be judged against what the model has to say. They detect nothing.
"""

import math
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Shape = tuple[int, ...]
Noise = NDArray[np.float64]

BACKBONE_GAIN = 0.7  # keeps the residual backbone's activations near 1
ATTENTION_GAIN = 2.0
POSITION_GAIN = 3.0  # strong positions, so that queries differ
BOX_GAIN = 4.0  # boxes that depend on the image


def load_seeded_weights(model: nn.Module) -> None:
    """Fill every entry of the model's state dict with its seeded tensor, in place."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in seeded_state_dict(shapes).items()})


def seeded_state_dict(shapes: Mapping[str, Shape]) -> dict[str, NDArray[np.float32]]:
    """Return a float32 array for each name and shape of a state dict."""
    return {name: seeded_tensor(name, shape) for name, shape in shapes.items()}


def seeded_tensor(name: str, shape: Shape) -> NDArray[np.float32]:
    """Return the float32 array of `shape` that stands for the state dict's entry `name`."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    noise = generator.standard_normal(shape)  # drawn first for every entry: some draw from what follows
    return _scaled(name, noise, generator.random).astype(np.float32)


def _scaled(name: str, noise: Noise, uniform: Callable[[Shape], Noise]) -> Noise:
    """Give the noise the distribution that fits the parameter's role."""
    entry = name.rpartition(".")[2]
    if entry == "running_var":
        return 0.5 + uniform(noise.shape)
    if entry == "running_mean":
        return 0.1 * noise
    if name.endswith("position.weight"):
        return uniform(noise.shape)
    if noise.ndim == 1:
        return 1.0 + 0.1 * noise if entry == "weight" else 0.05 * noise
    if name.endswith("pattern.weight"):
        return noise
    return _linear_weight(name, noise)


def _linear_weight(name: str, noise: Noise) -> Noise:
    """Scale a convolution's or linear layer's weight (out, in, ...) by its gain over the root of its fan-in."""
    fan_in = math.prod(noise.shape[1:])
    gain = 1.0
    if ".body." in name:
        gain = BACKBONE_GAIN
    elif name.endswith("in_proj_weight"):
        gain, noise = ATTENTION_GAIN, _keys_like_queries(noise)
    elif ".adapt_pos" in name:
        gain = POSITION_GAIN
    elif "bbox_embed" in name and name.endswith("layers.2.weight"):
        gain = BOX_GAIN
    return gain * noise / math.sqrt(fan_in)


def _keys_like_queries(noise: Noise) -> Noise:
    """Give each key projection its query's weights: equal positions then attract, as after training."""
    channels = noise.shape[1]
    blocks = noise.reshape(-1, channels, channels).copy()  # RCDA: 2 queries, 2 keys, value; multi-head: 1, 1, value
    queries = len(blocks) // 2
    blocks[queries : 2 * queries] = blocks[:queries]
    return blocks.reshape(noise.shape)
