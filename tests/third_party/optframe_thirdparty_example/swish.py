"""What the op Swish means, and the shape of its output. Ramachandran et al., arXiv:1710.05941."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx.parser
import onnx_ir as ir

from optframe.errors import InputError
from optframe.types import TensorInfo

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
