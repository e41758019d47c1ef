"""The whole detector: backbone, projection, transformer."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from optframe.errors import InputError
from optframe_anchordetr.config import AnchorDETRConfig, SpatialPrior, check_shape, variant_config
from optframe_anchordetr.model.backbone import OUTPUT_CHANNELS, Backbone
from optframe_anchordetr.model.positions import feature_mask
from optframe_anchordetr.model.transformer import Transformer


class AnchorDETR(nn.Module):
    """Anchor DETR: Wang et al., "Query Design for Transformer-Based Detector", AAAI 2022, arXiv:2109.07107."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        projection = nn.Sequential(nn.Conv2d(OUTPUT_CHANNELS, config.channels, 1), nn.GroupNorm(32, config.channels))
        self.input_proj = nn.ModuleList([projection])
        self.backbone = Backbone(config.depth, config.dilation)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return pred_logits (N, Q, 91) and pred_boxes (N, Q, 4) of the last decoder layer.

        `images` (N, 3, H, W) are normalised float RGB; `mask` (N, H, W) bool is True on padding, which lies right and
        below. Boxes are (cx, cy, w, h) as fractions of the unpadded image. Raises `InputError` for inputs of wrong
        shape or type, sides below the model's stride, and an image that is padding alone.
        """
        if not (_tracing() or torch.compiler.is_compiling()):
            check_input(images, mask, self.config.stride)
        features = self.input_proj[0](self.backbone(images))
        n, _, h, w = features.shape
        if mask is None:
            cells = torch.zeros((n, h, w), dtype=torch.bool, device=images.device)
        else:
            cells = mask = feature_mask(mask, h, w)
        logits, boxes = self.transformer(features, cells, mask)
        return logits, boxes


def _tracing() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing


def check_input(images: Tensor, mask: Tensor | None, stride: int) -> None:
    """Raise `InputError` unless images (N, 3, H, W) and mask (N, H, W) are what a model of this stride can take."""
    shape = tuple(images.shape)
    check_shape(shape, stride)
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}; normalise them to float32 first")
    if mask is None:
        return
    if tuple(mask.shape) != (shape[0], *shape[2:]) or mask.dtype != torch.bool:
        raise InputError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; for images {shape} it must be bool {(shape[0], *shape[2:])}"
        )
    if bool(mask[:, 0, 0].any()):
        raise InputError("mask marks an image's top left pixel as padding; padding goes right and below")


def build(variant: str | AnchorDETRConfig = "r50-dc5", *, spatial_prior: SpatialPrior | None = None) -> AnchorDETR:
    """Return the module of a published variant or of a configuration, in eval mode, with untrained weights.

    Variants are r50-dc5, r50-c5, r101-dc5, r101-c5, and each with -mha; `spatial_prior` overrides the variant's.
    Raises `InputError` for an unknown variant.
    """
    config = variant_config(variant) if isinstance(variant, str) else variant
    if spatial_prior is not None:
        config = replace(config, spatial_prior=spatial_prior)
    return AnchorDETR(config).eval()
