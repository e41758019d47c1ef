"""The plugin ops of the domain `optframe.anchordetr`: LayerNorm, SkipLayerNorm and RCDA, with their ONNX functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from optframe.errors import InputError
from optframe.types import OpAttribute, OpParameter, OpSpec, TensorInfo
from optframe_anchordetr import kernels
from optframe_anchordetr.kernels.checks import pad, require, require_same
from optframe_anchordetr.kernels.rcda import rcda_sizes

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "optframe.anchordetr"

MINIMUM_OPSET = 15
"""The functions return the type they were given by CastLike, which opset 15 brought; older models are lifted first."""

LAYER_NORM = OpSpec(
    name="LayerNorm",
    domain=DOMAIN,
    inputs=(OpParameter("x"), OpParameter("scale", optional=True), OpParameter("bias", optional=True)),
    outputs=(OpParameter("y"),),
    attributes={"epsilon": OpAttribute("float", 1e-5)},
    function="optframe_anchordetr.ops:layer_norm_function",
    shape_rule="optframe_anchordetr.ops:layer_norm_shapes",
    kernel=kernels.LAYERNORM,
    summary="layer normalisation of the last axis, statistics in float32",
)

SKIP_LAYER_NORM = OpSpec(
    name="SkipLayerNorm",
    domain=DOMAIN,
    inputs=(
        OpParameter("x"),
        OpParameter("skip"),
        OpParameter("scale", optional=True),
        OpParameter("bias", optional=True),
    ),
    outputs=(OpParameter("y"), OpParameter("sum")),
    attributes={"epsilon": OpAttribute("float", 1e-5)},
    function="optframe_anchordetr.ops:skip_layer_norm_function",
    shape_rule="optframe_anchordetr.ops:skip_layer_norm_shapes",
    kernel=kernels.SKIP_LAYERNORM,
    summary="LayerNorm of x + skip, and the sum itself",
)

RCDA = OpSpec(
    name="RCDA",
    domain=DOMAIN,
    inputs=(
        OpParameter("q_row"),
        OpParameter("q_col"),
        OpParameter("k_row", shift_invariant_axis=1),
        OpParameter("k_col", shift_invariant_axis=1),
        OpParameter("v"),
        OpParameter("row_mask", ("bool",), optional=True),
        OpParameter("column_mask", ("bool",), optional=True),
    ),
    outputs=(OpParameter("out"),),
    attributes={"num_heads": OpAttribute("int"), "allow_tf32": OpAttribute("int", 0)},
    function="optframe_anchordetr.ops:rcda_function",
    shape_rule="optframe_anchordetr.ops:rcda_shapes",
    kernel=kernels.RCDA,
    summary="row-column decoupled attention, from projected queries, keys and value to the attended value",
)

OPS = (LAYER_NORM, SKIP_LAYER_NORM, RCDA)


def layer_norm_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    """Return y = (x - mean) / sqrt(variance + epsilon) * scale + bias over x's last axis, in float32, as x's type.

    Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450. The variance is that of the whole row (no ddof).

    Raises:
        InputError: `opset` is below `MINIMUM_OPSET`.
    """
    body = ["x32 = Cast <to: int = 1> (x)", *_normalization(opset, dtypes), "y = CastLike (y32, x)"]
    return _function(LAYER_NORM, opset, dtypes, body)


def skip_layer_norm_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    """Return sum = x + skip, in their type, and y = LayerNorm(sum).

    Raises:
        InputError: `opset` is below `MINIMUM_OPSET`.
    """
    body = [
        "first = Cast <to: int = 1> (x)",
        "second = Cast <to: int = 1> (skip)",
        "sum32 = Add (first, second)",
        "sum = CastLike (sum32, x)",
        "x32 = Cast <to: int = 1> (sum)",
        *_normalization(opset, dtypes),
        "y = CastLike (y32, x)",
    ]
    return _function(SKIP_LAYER_NORM, opset, dtypes, body)


def _normalization(opset: int, dtypes: Mapping[str, str]) -> list[str]:
    """Return the lines from x32 to y32; the native op where there is one and the scale that it needs is given."""
    parameters = [name for name in ("scale", "bias") if name in dtypes]
    casts = [f"{name}32 = Cast <to: int = 1> ({name})" for name in parameters]
    if opset >= 17 and "scale" in dtypes:
        operands = ", ".join(f"{name}32" for name in ("x", *parameters))
        attributes = "axis: int = -1, epsilon: float = @epsilon"
        return [*casts, f"y32 = LayerNormalization <{attributes}> ({operands})"]
    return [*casts, *_decomposed(opset, parameters)]


def _decomposed(opset: int, parameters: Sequence[str]) -> list[str]:
    mean = "ReduceMean (%s, last)" if opset >= 18 else "ReduceMean <axes: ints = [-1]> (%s)"
    scaled = "Mul (normalized, scale32)" if "scale" in parameters else "Identity (normalized)"
    return [
        *(["last = Constant <value_ints: ints = [-1]> ()"] if opset >= 18 else []),
        f"mean = {mean % 'x32'}",
        "deviation = Sub (x32, mean)",
        "square = Mul (deviation, deviation)",
        f"variance = {mean % 'square'}",
        "eps = Constant <value_float: float = @epsilon> ()",
        "shifted = Add (variance, eps)",
        "spread = Sqrt (shifted)",
        "normalized = Div (deviation, spread)",
        f"scaled = {scaled}",
        "y32 = Add (scaled, bias32)" if "bias" in parameters else "y32 = Identity (scaled)",
    ]


def rcda_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    """Return out[q] = sum_y A_col[q, y] sum_x A_row[q, x] V[y, x] of each head, in float32, as q_row's type.

    A_row = softmax(q_row k_row^T) over x, A_col = softmax(q_col k_col^T) over y, with -inf where a mask is True; the
    queries come scaled. Wang et al., "Anchor DETR", arXiv:2109.07107, section 3.3. The row sum comes first, as a matrix
    product with (y, channel) as columns: of eight formulations the fastest in onnxruntime on the CPU. The keys alone
    say how many images, rows and columns there are; queries and value may have any axes in front of their channels.
    allow_tf32, a permission to kernels, changes nothing here.

    Raises:
        InputError: `opset` is below `MINIMUM_OPSET`.
    """
    body = [
        *[f"i{index} = Constant <value_ints: ints = [{index}]> ()" for index in range(3)],
        "row_shape = Shape (k_row)",
        "column_shape = Shape (k_col)",
        "images = Gather (row_shape, i0)",
        "width = Gather (row_shape, i1)",
        "height = Gather (column_shape, i1)",
        "channels = Gather (row_shape, i2)",
        "heads_scalar = Constant <value_int: int = @num_heads> ()",
        "heads = Reshape (heads_scalar, i1)",
        "size = Div (channels, heads)",
        "columns = Mul (height, size)",
        "query_shape = Shape (q_row)",
        "query_elements = ReduceProd (query_shape)",
        "pitch = Mul (images, channels)",
        "divisor = Max (pitch, i1)",  # of no images there are no queries
        "queries = Div (query_elements, divisor)",
        "keep3 = Constant <value_ints: ints = [0, 0, 0]> ()",
        "split = Concat <axis: int = 0> (images, queries, heads, size)",
        "keep2 = Constant <value_ints: ints = [0, 0]> ()",
        "split_keys = Concat <axis: int = 0> (keep2, heads, size)",
        *_attention("row", "row_mask" if "row_mask" in dtypes else None),
        *_attention("col", "column_mask" if "column_mask" in dtypes else None),
        "v32 = Cast <to: int = 1> (v)",
        "split_v = Concat <axis: int = 0> (images, height, width, heads, size)",
        "v_heads = Reshape <allowzero: int = 1> (v32, split_v)",  # (N, h, w, heads, D)
        "v_turned = Transpose <perm: ints = [0, 3, 2, 1, 4]> (v_heads)",
        "fuse_v = Concat <axis: int = 0> (keep3, columns)",
        "v_columns = Reshape (v_turned, fuse_v)",  # (N, heads, w, h * D)
        "partial = MatMul (a_row, v_columns)",
        "split_partial = Concat <axis: int = 0> (keep3, height, size)",
        "partial_rows = Reshape (partial, split_partial)",  # (N, heads, L, h, D)
        *_unsqueezed("a_col_row", "a_col", [3]),
        "attended = MatMul (a_col_row, partial_rows)",  # (N, heads, L, 1, D)
        "turned_back = Transpose <perm: ints = [0, 2, 1, 3, 4]> (attended)",
        "out32 = Reshape <allowzero: int = 1> (turned_back, query_shape)",
        "out = CastLike (out32, q_row)",
    ]
    return _function(RCDA, opset, dtypes, body)


def _attention(axis: str, mask: str | None) -> list[str]:
    """Return the lines that make a_row or a_col (N, heads, L, keys) from q and k."""
    lines = []
    for operand, perm, zeros, split in (("q", [0, 2, 1, 3], 1, "split"), ("k", [0, 2, 3, 1], 0, "split_keys")):
        name = f"{operand}_{axis}"
        lines += [
            f"{name}_32 = Cast <to: int = 1> ({name})",
            f"{name}_heads = Reshape <allowzero: int = {zeros}> ({name}_32, {split})",
            f"{name}_turned = Transpose <perm: ints = {perm}> ({name}_heads)",
        ]
    lines.append(f"{axis}_scores = MatMul (q_{axis}_turned, k_{axis}_turned)")
    if mask is not None:
        lines += [
            *_unsqueezed(f"{axis}_padded", mask, [1, 2]),
            f"{axis}_infinity = Constant <value_float: float = -inf> ()",
            f"{axis}_kept = Where ({axis}_padded, {axis}_infinity, {axis}_scores)",
        ]
    return [*lines, f"a_{axis} = Softmax <axis: int = -1> ({axis}_{'kept' if mask else 'scores'})"]


def _unsqueezed(result: str, value: str, axes: Sequence[int]) -> list[str]:
    constant = f"{result}_axes = Constant <value_ints: ints = {axes}> ()"
    return [constant, f"{result} = Unsqueeze ({value}, {result}_axes)"]


def _function(spec: OpSpec, opset: int, dtypes: Mapping[str, str], body: Sequence[str]) -> ir.Function:
    """Return the function of lines `body`; its inputs end with the last one that is present."""
    import onnx.parser
    import onnx_ir as ir

    if opset < MINIMUM_OPSET:
        raise InputError(f"{spec.identifier} needs opset {MINIMUM_OPSET}, the model has {opset}: lift it first")
    names = [parameter.name for parameter in spec.inputs]
    last = max(names.index(name) for name in dtypes)
    inputs = ", ".join(names[: last + 1])
    outputs = ", ".join(parameter.name for parameter in spec.outputs)
    declared = spec.attributes.items()
    attributes = ", ".join(n if a.default is None else f"{n}: {a.type} = {a.default}" for n, a in declared)
    header = f'<domain: "{spec.domain}", opset_import: ["" : {opset}]>'
    lines = "\n".join(body)
    text = f"{header}\n{spec.name} <{attributes}> ({inputs}) => ({outputs}) {{\n{lines}\n}}"
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def layer_norm_shapes(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]:
    """Return (y,), which is like x (..., C); scale and bias are (C,) of any float dtype.

    Raises:
        InputError: a shape does not fit.
    """
    x, scale, bias = pad("LayerNorm", inputs, 1, 3)
    assert x is not None
    _check_parameters("LayerNorm", x, scale, bias)
    return (x,)


def skip_layer_norm_shapes(
    inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]
) -> tuple[TensorInfo, ...]:
    """Return (y, sum), both like x (..., C); skip is like x, scale and bias are (C,) of any float dtype.

    Raises:
        InputError: a shape or dtype does not fit.
    """
    x, skip, scale, bias = pad("SkipLayerNorm", inputs, 2, 4)
    assert x is not None
    assert skip is not None
    require_same("SkipLayerNorm", "skip", skip, x)
    _check_parameters("SkipLayerNorm", x, scale, bias)
    return (x, x)


def _check_parameters(op: str, x: TensorInfo, *parameters: TensorInfo | None) -> None:
    require(bool(x.shape), f"{op}: x is a scalar, but needs an axis to normalise")
    for parameter in parameters:
        if parameter is not None:
            require_same(op, "scale or bias", parameter, TensorInfo(x.shape[-1:], parameter.dtype))


def rcda_shapes(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]:
    """Return (out,), which is like q_row: (N, L, C), or other axes of N L rows in front of the C channels.

    q_col is like q_row, k_row (N, w, C), k_col (N, h, C), v (N, h, w, C) or other axes of N h w rows in front of C,
    row_mask (N, w), column_mask (N, h).

    Raises:
        InputError: a shape or dtype does not fit, or num_heads does not divide C.
    """
    checked = pad("RCDA", inputs, 5, 7)
    rcda_sizes(checked, attributes)
    assert checked[0] is not None
    return (checked[0],)
