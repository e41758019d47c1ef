"""What a user chooses: the detector's variant and how it is exported. Imports no heavy library."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from optframe.errors import InputError, unknown_name

Depth = Literal[50, 101]
Attention = Literal["RCDA", "nn.MultiheadAttention"]
SpatialPrior = Literal["learned", "grid"]
SumOrder = Literal["by-shape", "row-first", "column-first"]
Exporter = Literal["torchscript", "dynamo"]


@dataclass(frozen=True)
class AnchorDETRConfig:
    """An Anchor DETR's architecture; the defaults are the published R50-DC5.

    `attention` and `spatial_prior` carry the values of the original's command line. `sum_order` says which of RCDA's
    two sums is done first: "by-shape" is the original's choice, the row sum where the feature map is wider than high.
    Raises `InputError` for a value that is not on offer.
    """

    depth: Depth = 50
    dilation: bool = True
    attention: Attention = "RCDA"
    spatial_prior: SpatialPrior = "learned"
    anchors: int = 300
    patterns: int = 3
    classes: int = 91
    channels: int = 256
    heads: int = 8
    feedforward_channels: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    sum_order: SumOrder = "by-shape"

    def __post_init__(self) -> None:
        _one_of("depth", self.depth, get_args(Depth))
        _one_of("attention", self.attention, get_args(Attention))
        _one_of("spatial_prior", self.spatial_prior, get_args(SpatialPrior))
        _one_of("sum_order", self.sum_order, get_args(SumOrder))

    @property
    def variant(self) -> str:
        """The published name of backbone and attention, such as "r50-dc5" or "r101-c5-mha"."""
        return f"r{self.depth}-{'dc5' if self.dilation else 'c5'}{'' if self.attention == 'RCDA' else '-mha'}"

    @property
    def stride(self) -> int:
        """Input pixels per feature-map position along one side."""
        return 16 if self.dilation else 32

    @property
    def grid_steps(self) -> int:
        """Anchor points along one side of the grid prior."""
        return round(math.sqrt(self.anchors))

    @property
    def queries(self) -> int:
        """Number of object queries: every pattern at every anchor point."""
        points = self.grid_steps**2 if self.spatial_prior == "grid" else self.anchors
        return self.patterns * points


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{field} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


_CONFIGS = [
    AnchorDETRConfig(depth, dilation, attention)
    for attention in get_args(Attention)
    for depth in get_args(Depth)
    for dilation in (True, False)
]
VARIANTS: dict[str, AnchorDETRConfig] = {config.variant: config for config in _CONFIGS}


def variant_config(variant: str) -> AnchorDETRConfig:
    """Return the configuration of a published variant, such as "r50-dc5"; `InputError` for an unknown name."""
    if variant not in VARIANTS:
        raise unknown_name("Anchor DETR variant", variant, VARIANTS)
    return VARIANTS[variant]


def check_shape(shape: tuple[int, ...], stride: int) -> None:
    """Raise `InputError` unless `shape` is (N, 3, H, W) with at least one image and sides of `stride` or more."""
    text = "x".join(map(str, shape))
    if len(shape) != 4 or shape[1] != 3 or shape[0] < 1:
        raise InputError(f"image shape {text} is not Nx3xHxW with at least one image; give one such as 1x3x800x1066")
    if min(shape[2:]) < stride:
        raise InputError(
            f"image shape {text} is too small for this variant's stride of {stride}: "
            f"height and width must be at least {stride}"
        )


OPSETS: dict[Exporter, range] = {"torchscript": range(12, 21), "dynamo": range(17, 21)}


@dataclass(frozen=True)
class ExportOptions:
    """How to export: input shape (N, 3, H, W), opset and exporter, a mask input or not, free sizes or not.

    With `dynamic`, batch, height and width are free and RCDA's row sum is always done first. Raises `InputError` for
    a combination that the exporters cannot make.
    """

    shape: tuple[int, ...] = (1, 3, 800, 1066)
    opset: int = 17
    exporter: Exporter = "torchscript"
    mask: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        _one_of("exporter", self.exporter, get_args(Exporter))
        opsets = OPSETS[self.exporter]
        if self.opset not in opsets:
            others = [name for name, made in OPSETS.items() if self.opset in made]
            hint = f", or the {others[0]} exporter" if others else ""
            raise InputError(
                f"the {self.exporter} exporter makes opset {opsets[0]} to {opsets[-1]}, not {self.opset}; "
                f"choose one of these{hint}"
            )

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in the order of `AnchorDETR.forward`."""
        return ("images", "mask") if self.mask else ("images",)
