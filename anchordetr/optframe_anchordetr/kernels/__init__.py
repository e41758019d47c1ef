"""CUDA kernels of Anchor DETR's plugin ops: each a .cu source and the launch rule that sets its defines.

A kernel's arguments are (pointers of the inputs that are present, int32 extras, pointers of the outputs). A launch is
valid only for PTX compiled with the same defines. Layer normalisation's depend on dtypes, columns and epsilon, and on
the number of rows, but one made for others does any; attention's on height and width, and on whether the queries fill a
large GPU, but one made for larger maps does smaller ones too. Dynamic shared memory stays within the 48 KB that every
launcher gives.
"""

from __future__ import annotations

from optframe.types import KernelSpec

LAYERNORM = KernelSpec(
    "optframe_anchordetr:kernels/layernorm.cu",
    launch="optframe_anchordetr.kernels.layernorm:layernorm_launch",
    reuse="optframe_anchordetr.kernels.layernorm:layernorm_reuse",
)
SKIP_LAYERNORM = KernelSpec(
    "optframe_anchordetr:kernels/layernorm.cu",
    launch="optframe_anchordetr.kernels.layernorm:skip_layernorm_launch",
    reuse="optframe_anchordetr.kernels.layernorm:skip_layernorm_reuse",
)
RCDA = KernelSpec(
    "optframe_anchordetr:kernels/rcda.cu",
    launch="optframe_anchordetr.kernels.rcda:rcda_launch",
    reuse="optframe_anchordetr.kernels.rcda:rcda_reuse",
)

__all__ = ["LAYERNORM", "RCDA", "SKIP_LAYERNORM"]
