"""The pass `select-gemm`: products of matrices as Gemm, or as MatMul and Add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import permutation
from optframe_passes.edit import Array, is_onnx, remove
from optframe_passes.surgery import FLOATS, Surgery, only_reader, producer_of


@dataclass(frozen=True)
class SelectGemm(GraphPass):
    """Write a product of matrices and the addition of a constant as one Gemm, or a Gemm as MatMul and Add.

    `prefer=matmul` gives the form that other passes of linear algebra look for: scale factors and a transposition of a
    constant right operand go into it. `prefer=gemm` comes last, for backends that run a Gemm at least as fast
    (onnxruntime, TensorRT), and gives fewer nodes: a MatMul of two matrices, read by an Add of a constant alone,
    becomes a Gemm, and a Transpose that a Gemm alone reads becomes its transA or transB. Tensors of more dimensions
    keep MatMul and Add.

    Example:
        before: `y = Add(MatMul(x, w), b)`, x of shape (900, 256), b (256), (1, 256) or (900, 256)
        after:  `y = Gemm(x, w, b)`
    """

    name: ClassVar[str] = "select-gemm"
    prefer: Literal["gemm", "matmul"] = "gemm"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite in place."""
        surgery = Surgery(model, context)
        choice = _ToGemm(surgery) if self.prefer == "gemm" else _ToMatMul(surgery)
        for node in surgery.nodes():
            if node.graph is not None:
                choice.rewrite(node)
        return surgery.result


class _ToGemm:
    def __init__(self, surgery: Surgery) -> None:
        self._surgery = surgery

    def rewrite(self, node: ir.Node) -> None:
        """Merge a MatMul of matrices with the addition behind it; let a Gemm transpose what a Transpose did."""
        if is_onnx(node, "Gemm"):
            self._transpose(node, 0, "transA")
            self._transpose(node, 1, "transB")
            return
        ranks = [self._surgery.rank(value) for value in node.inputs] if is_onnx(node, "MatMul") else []
        addition = only_reader(node.outputs[0]) if ranks == [2, 2] else None
        bias = None if addition is None else self._bias(node, addition)
        if addition is not None and bias is not None and self._surgery.context.allow(node):
            gemm = self._surgery.new("Gemm", [*node.inputs, bias], [node, addition])
            self._surgery.replace([node, addition], [gemm])
            self.rewrite(gemm)

    def _transpose(self, gemm: ir.Node, index: int, attribute: str) -> None:
        """Let operand `index` of `gemm` be the matrix that a Transpose reads, and the attribute say the opposite."""
        transpose = producer_of(gemm.inputs[index], "Transpose")
        value = None if transpose is None else transpose.outputs[0]
        if (
            transpose is None
            or value is None
            or only_reader(value) is not gemm
            or not self._surgery.context.allow(gemm)
        ):
            return
        if tuple(permutation(transpose, 2)) == (1, 0):
            gemm.replace_input_with(index, transpose.inputs[0])
            gemm.attributes[attribute] = ir.AttrInt64(attribute, 1 - gemm.attributes.get_int(attribute, 0))
            self._surgery.context.stamp([gemm], [transpose, gemm])
            remove([transpose])
            self._surgery.rewrites += 1

    def _bias(self, node: ir.Node, addition: ir.Node) -> ir.Value | None:
        """Return the constant that `addition` adds to the result of `node`, if a Gemm can."""
        if not is_onnx(addition, "Add") or self._surgery.known.dtype(node.outputs[0]) not in FLOATS:
            return None
        side = self._surgery.constant_side(addition)
        dims = self._surgery.known.dims(node.outputs[0])
        if side is None or dims is None or self._surgery.known.dims(addition.outputs[0]) != dims:
            return None
        return addition.inputs[side]


class _ToMatMul:
    def __init__(self, surgery: Surgery) -> None:
        self._surgery = surgery
        self._made: dict[tuple[ir.Graph | None, ir.Value | None, float, bool], ir.Value] = {}

    def rewrite(self, node: ir.Node) -> None:
        """Take a Gemm apart."""
        if not is_onnx(node, "Gemm") or self._surgery.known.dtype(node.outputs[0]) not in FLOATS:
            return
        beta = node.attributes.get_float("beta", 1.0)
        bias = node.inputs[2] if len(node.inputs) > 2 and beta else None
        matrix = (node.inputs[1], node.attributes.get_float("alpha", 1.0), bool(node.attributes.get_int("transB", 0)))
        makes = self._can_make(*matrix) and self._can_make(bias, beta, False)
        if node.attributes.get_int("transA", 0) or not makes:
            reason = "an operand that is transposed or scaled is no constant, or too large"
            self._surgery.context.near_miss(node, reason)
        elif self._surgery.context.allow(node):
            new = [self._surgery.new("MatMul", [node.inputs[0], self._make(node, *matrix)], [node])]
            if bias is not None:
                inputs = [new[0].outputs[0], self._make(node, bias, beta, False)]
                new.append(self._surgery.new("Add", inputs, [node]))
            self._surgery.replace([node], new)

    def _can_make(self, value: ir.Value | None, factor: float, transposed: bool) -> bool:
        if value is None or (factor == 1 and not transposed):
            return True
        return self._surgery.tensor(value) is not None and (factor == 1 or self._scaled(value, factor) is not None)

    def _scaled(self, value: ir.Value, factor: float) -> Array | None:
        array = self._surgery.constant(value)
        return None if array is None else self._surgery.fits(array * factor, value)

    def _make(self, node: ir.Node, value: ir.Value | None, factor: float, transposed: bool) -> ir.Value | None:
        """Return `value` times `factor`, transposed if that is asked for; made once for all Gemms that share it."""
        tensor = self._surgery.tensor(value)
        if value is None or tensor is None or (factor == 1 and not transposed):
            return value
        key = (node.graph, value, factor, transposed)
        if key not in self._made:
            array = tensor.numpy() if factor == 1 else self._scaled(value, factor)
            assert array is not None, "asked for before"
            hint = value.name or "weight"
            self._made[key] = self._surgery.initializer(node, hint, array.T if transposed else array)
        return self._made[key]
