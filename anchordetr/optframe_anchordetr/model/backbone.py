"""ResNet-50 and ResNet-101 with frozen batch norms, as the detector's feature extractor."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
EXPANSION = 4
OUTPUT_CHANNELS = 512 * EXPANSION


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants; maps (N, C, H, W) to the same shape."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # trained with nn.BatchNorm2d, meaningless here
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class Bottleneck(nn.Module):
    """ResNet v1.5's residual block: 1x1, 3x3 (which carries stride and dilation), 1x1, and the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = FrozenBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = FrozenBatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = FrozenBatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, FrozenBatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        output: Tensor = (self.bn3(self.conv3(y)) + shortcut).relu()
        return output


class ResNet(nn.Module):
    """ResNet v1.5 without its classifier: (N, 3, H, W) to (N, 2048, ceil(H/s), ceil(W/s)).

    The stride s is 32 (C5), or 16 (DC5) when `dilation` replaces the last stage's stride by dilation 2.
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; stride on the 3x3 convolution ("v1.5").
    """

    def __init__(self, depth: Literal[50, 101], dilation: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks = BLOCKS_PER_STAGE[depth]
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(256, 128, blocks[1], stride=2)
        self.layer3 = _stage(512, 256, blocks[2], stride=2)
        self.layer4 = _stage(1024, 512, blocks[3], stride=1 if dilation else 2, dilation=2 if dilation else 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(images)).relu())
        x = self.layer2(self.layer1(x))
        features: Tensor = self.layer4(self.layer3(x))
        return features


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(*_blocks(in_channels, channels, blocks, stride, dilation))


def _blocks(in_channels: int, channels: int, blocks: int, stride: int, dilation: int) -> Iterator[Bottleneck]:
    yield Bottleneck(in_channels, channels, stride, dilation=1)  # a dilated stage's first block is not dilated
    for _ in range(blocks - 1):
        yield Bottleneck(channels * EXPANSION, channels, 1, dilation)


class Backbone(nn.Module):
    """Holds the ResNet under the name `body`, where the published checkpoints have it."""

    def __init__(self, depth: Literal[50, 101], dilation: bool) -> None:
        super().__init__()
        self.body = ResNet(depth, dilation)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return features
