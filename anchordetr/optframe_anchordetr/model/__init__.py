"""Anchor DETR in PyTorch, written so that the published checkpoints load and every exporter sees plain operators."""

from optframe_anchordetr.config import VARIANTS, AnchorDETRConfig
from optframe_anchordetr.model.detector import AnchorDETR, build

__all__ = ["VARIANTS", "AnchorDETR", "AnchorDETRConfig", "build"]
