"""What the op Swish means, the shape of its output, and its launch. Ramachandran et al., arXiv:1710.05941."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx.parser
import onnx_ir as ir

from optframe.errors import InputError
from optframe.types import KernelLaunch, TensorInfo

BODY = """
<domain: "example.thirdparty", opset_import: ["" : %d]>
Swish <beta: float = 1.0> (x) => (y) {
    factor = Constant <value_float: float = @beta> ()
    typed_factor = CastLike (factor, x)
    scaled = Mul (x, typed_factor)
    gate = Sigmoid (scaled)
    y = Mul (x, gate)
}
"""


def swish_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    """Return y = x * sigmoid(beta * x), all in the type of x."""
    if opset < 15:
        raise InputError(f"Swish needs opset 15 for CastLike, not {opset}: lift the model first")
    return ir.serde.deserialize_function(onnx.parser.parse_function(BODY % opset))


def swish_shapes(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]:
    """Return (y,), which is like x."""
    (x,) = inputs
    if x is None:
        raise InputError("Swish needs x")
    return (x,)


CUDA_TYPES = {"float32": "float", "float16": "__half"}

THREADS = 256
"""Of a block."""


def swish_launch(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, object]
) -> KernelLaunch:
    """Return the launch of one thread an element."""
    (x,) = inputs
    if x is None or x.dtype not in CUDA_TYPES:
        raise InputError("Swish needs x, in float32 or float16")
    count = math.prod(x.shape)
    if count > 2**31 - THREADS:
        raise InputError(f"Swish: {count} elements are too many for one launch")
    defines = (("SWISH_TYPE", CUDA_TYPES[x.dtype]), ("SWISH_BETA", f"{attributes['beta']!r}f"))
    return KernelLaunch("swish", defines, (-(-count // THREADS), 1, 1), (THREADS, 1, 1), 0, (count,))
