"""Exported torch modules that resemble what people export: transformers, ConvNeXt, recurrent nets, a UNet."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from optframe import graph

if importlib.util.find_spec("torch") is None:
    pytest.skip("needs torch", allow_module_level=True)

import torch
from torch import Tensor, nn

WIDTH = 16
Free: TypeAlias = Mapping[str, Mapping[int, str]]


class Encoder(nn.Module):
    """Two encoder layers over (batch, tokens, WIDTH) with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        output: Tensor = self.encoder(x, src_key_padding_mask=pad)
        return output


class VisionTransformer(nn.Module):
    """A ViT: patches by convolution, class token, positions interpolated to the image's size, pre-norm blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, WIDTH, 4, 4))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        grid = self.patches(image)
        positions = nn.functional.interpolate(self.positions, size=grid.shape[-2:], mode="bilinear")
        tokens = (grid + positions).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        logits: Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, two linear layers, a learnt scale (Liu et al. 2022, section 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.expand, self.project = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        inner = self.project(nn.functional.gelu(self.expand(inner))) * self.gamma
        return x + inner.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Stem, two stages with a norm over channels written out between them, global pooling, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.stages = nn.ModuleList([nn.Sequential(ConvNeXtBlock(), ConvNeXtBlock()) for _ in range(2)])
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages[0](self.stem(image))
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        x = self.stages[1](self.weight[:, None, None] * x + self.bias[:, None, None])
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits


class Recurrent(nn.Module):
    """A bidirectional LSTM and a GRU over (batch, time, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 8, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(self.lstm(x)[0])[0])
        return out


class UNet(nn.Module):
    """GroupNorm, BatchNorm, strided and transposed convolutions, upsampling, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, WIDTH, 3, stride=2, padding=1), nn.GroupNorm(4, WIDTH), nn.SiLU())
        self.bottom = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.Hardswish())
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)
        self.out = nn.Conv2d(WIDTH + 3, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        low = self.bottom(self.down(image))
        low = low + nn.functional.interpolate(nn.functional.avg_pool2d(low, 2), scale_factor=2.0, mode="nearest")
        mask: Tensor = self.out(torch.cat([self.up(low), image], 1)).softmax(1)
        return mask


@dataclass(frozen=True)
class Case:
    """A module, its inputs at two sizes, and which dimensions are free: input -> axis -> name."""

    module: Callable[[], nn.Module]
    inputs: Callable[[int], Mapping[str, Tensor]]
    free: Free

    def __str__(self) -> str:
        return self.module.__name__  # type: ignore[attr-defined]


def padded(turn: int) -> dict[str, Tensor]:
    batch, tokens = ((2, 7), (3, 5))[turn]
    pad = torch.zeros(batch, tokens, dtype=torch.bool)
    pad[:, -2:] = True
    return {"x": torch.randn(batch, tokens, WIDTH), "pad": pad}


def image(turn: int) -> dict[str, Tensor]:
    return {"image": torch.randn(((2, 3, 32, 24), (3, 3, 16, 40))[turn])}


def sequence(turn: int) -> dict[str, Tensor]:
    return {"x": torch.randn(3, (4, 6)[turn], WIDTH)}


FREE_TOKENS = {0: "batch", 1: "tokens"}
FREE_IMAGE = {"image": {0: "batch", 2: "height", 3: "width"}}
ENCODER = Case(Encoder, padded, {"x": FREE_TOKENS, "pad": FREE_TOKENS})
VIT = Case(VisionTransformer, image, FREE_IMAGE)
CONVNEXT = Case(ConvNeXt, image, FREE_IMAGE)
RECURRENT = Case(Recurrent, sequence, {"x": {1: "time"}})
UNET = Case(UNet, lambda turn: {"image": torch.randn(2 + turn, 3, 16, 24)}, {"image": {0: "batch"}})


def export(case: Case, path: Path, seed: int, opset: int, dynamo: bool, free: bool) -> list[dict[str, Any]]:
    """Export; return feeds of two sizes where dimensions are free, else two of one size."""
    torch.manual_seed(seed)
    module = case.module().eval()
    samples = [dict(case.inputs(turn)) for turn in ((0, 1) if free else (0, 0))]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused op that no exporter knows
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write = _dynamo if dynamo else _torchscript
            write(module, samples[0], path, opset, case.free if free else {})
    finally:
        logging.disable(logging.NOTSET)
        torch.backends.mha.set_fastpath_enabled(fast)
    return [{name: tensor.numpy() for name, tensor in sample.items()} for sample in samples]


def _dynamo(module: nn.Module, sample: dict[str, Tensor], path: Path, opset: int, free: Free) -> None:
    shapes = {name: dict.fromkeys(free.get(name, {}), torch.export.Dim.DYNAMIC) for name in sample}
    torch.onnx.export(
        module, (), path, kwargs=sample, opset_version=opset, dynamo=True, verbose=False, dynamic_shapes=shapes
    )


def _torchscript(module: nn.Module, sample: dict[str, Tensor], path: Path, opset: int, free: Free) -> None:
    axes = {name: dict(dims) for name, dims in free.items()}
    torch.onnx.export(
        module,
        tuple(sample.values()),
        path,
        input_names=list(sample),
        opset_version=opset,
        dynamo=False,
        dynamic_axes=axes,
    )


@pytest.mark.parametrize(
    ("case", "opset", "free"),
    [
        (ENCODER, 17, False),  # this exporter bakes the sizes of attention in, whatever dynamic_axes says
        pytest.param(ENCODER, 14, False, marks=pytest.mark.slow),  # like those below, a variant of one above
        pytest.param(VIT, 17, False, marks=pytest.mark.slow),
        (CONVNEXT, 11, True),
        pytest.param(CONVNEXT, 17, False, marks=pytest.mark.slow),
        (RECURRENT, 9, True),
        (UNET, 16, True),
        pytest.param(UNET, 11, False, marks=pytest.mark.slow),
    ],
)
def test_torchscript_exports(
    case: Case, opset: int, free: bool, check_pipelines: Callable[..., None], tmp_path: Path, seed: int
) -> None:
    feeds = export(case, tmp_path / "module.onnx", seed, opset, dynamo=False, free=free)
    check_pipelines(graph.load(tmp_path / "module.onnx"), feeds)


@pytest.mark.slow  # each export takes seconds
@pytest.mark.parametrize(
    ("case", "free"),
    [(case, free) for case in (ENCODER, VIT, CONVNEXT, UNET) for free in (True, False)] + [(RECURRENT, False)],
    ids=str,  # of recurrent nets this exporter bakes the length in
)
def test_dynamo_exports(
    case: Case, free: bool, check_pipelines: Callable[..., None], tmp_path: Path, seed: int
) -> None:
    feeds = export(case, tmp_path / "module.onnx", seed, 18, dynamo=True, free=free)
    check_pipelines(graph.load(tmp_path / "module.onnx"), feeds)
