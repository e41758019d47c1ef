"""Makes programs for a GPU faster: several steps that one call does become that call."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from optframe.backends.torch import fused_calls
from optframe.backends.torch.chains import fuse_chains
from optframe.backends.torch.program import Program, Step
from optframe.backends.torch.trace import Optimizer

HALF = fused_calls.HALF


def optimizer(device: str) -> Optimizer | None:
    """Return what improves programs for `device`; a CPU runs them as they are."""
    return optimize if device == "cuda" else None


def optimize(program: Program) -> None:
    """Fuse attention, convolutions and linear layers, then what elementwise chains are left, in place."""
    for rewrite in (_attention, _convolutions, _linear_layers, _parallel_layers):
        _Rewriter(program).each(rewrite)
        program.remove_dead()
    fuse_chains(program)


class _Rewriter:
    """Looks at a program's steps by who makes and who reads a slot, and replaces some by one at the last's place."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps: list[Step | None] = list(program.steps)
        self._readers = program.readers()
        self._makers = {slot: i for i, step in enumerate(program.steps) for slot in step.outputs}

    def each(self, rewrite: Callable[[_Rewriter, int], None]) -> None:
        """Try `rewrite` at every step that is still there, then put the new steps into the program."""
        for index in range(len(self.steps)):
            if self.steps[index] is not None:
                rewrite(self, index)
        self.program.steps = [step for step in self.steps if step is not None]

    def step(self, index: int | None, *ops: str) -> Step | None:
        """Return the step there if it is one of `ops` and its shapes, which rewrites go by, do not depend on values."""
        step = None if index is None or index >= len(self.steps) else self.steps[index]
        return step if step is not None and step.op in ops and self.program.is_certain(step) else None

    def reader(self, slot: int) -> int | None:
        """Return the only step that reads the slot, None if others or the program's outputs do too."""
        found = self._readers.get(slot, [])
        return found[0] if len(found) == 1 and found[0] < len(self.steps) else None

    def readers(self, slot: int) -> list[int]:
        """Return the steps that read the slot."""
        return [index for index in self._readers.get(slot, []) if index < len(self.steps)]

    def maker(self, slot: int | None) -> int | None:
        """Return the step that makes the slot."""
        return None if slot is None else self._makers.get(slot)

    def constant(self, slot: int | None) -> Tensor | None:
        """Return the tensor of a constant slot."""
        return None if slot is None else self.program.constants.get(slot)

    def shape(self, slot: int | None) -> tuple[int, ...]:
        return () if slot is None else self.program.infos[slot].shape

    def dtype(self, slot: int | None) -> str:
        return "" if slot is None else self.program.infos[slot].dtype

    def put(self, old: list[int], new: Step) -> None:
        """Replace the steps `old` by `new`, which stands where the last of them stood."""
        for index in old:
            self.steps[index] = None
        self.steps[max(old)] = new
        for slot in new.outputs:
            self._makers[slot] = max(old)


def _other(step: Step, slot: int) -> int | None:
    """Return the other operand of a step of two."""
    left, right = step.inputs
    return right if left == slot else left


def _attention(r: _Rewriter, index: int) -> None:
    """MatMul, Softmax, MatMul -> scaled dot product attention, which never writes the scores."""
    first = r.step(index, "MatMul")
    if first is None or r.dtype(first.outputs[0]) not in HALF:
        return
    chain = [index]
    softmax_at = r.reader(first.outputs[0])
    softmax = r.step(softmax_at, "Softmax")
    if softmax is None or softmax_at is None or len(r.shape(softmax.outputs[0])) != 4:
        return
    if softmax.attributes.get("axis", -1 if softmax.opset >= 13 else 1) not in (-1, 3):
        return
    second_at = r.reader(softmax.outputs[0])
    second = r.step(second_at, "MatMul")
    if second is None or second_at is None or second.inputs[0] != softmax.outputs[0]:
        return
    if len({r.shape(slot)[:-2] for slot in (*first.inputs, second.inputs[1])}) > 1:
        return  # broadcast
    chain += [softmax_at, second_at]
    call = fused_calls.Attention(_take_scale(r, first.inputs[0]))
    r.put(chain, Step("Attention", call, (*first.inputs, second.inputs[1]), second.outputs, second.node))


def _take_scale(r: _Rewriter, slot: int | None) -> float:
    """Return the number that the queries are multiplied by before views of them, after taking that product out."""
    while slot is not None:
        index = r.maker(slot)
        if index is None or r.reader(slot) is None:
            return 1.0
        view, product = r.step(index, "Reshape", "Transpose"), r.step(index, "Mul")
        if view is not None:
            slot = view.inputs[0]
            continue
        if product is None:
            return 1.0
        for factor, data in (product.inputs, product.inputs[::-1]):
            number = r.constant(factor)
            same = r.shape(data) == r.shape(slot)  # a number with more axes than the data gives it those
            if number is not None and number.numel() == 1 and data is not None and same:
                r.put([index], Step("Identity", _same, (data,), product.outputs, product.node))
                return float(number)
        return 1.0
    return 1.0


def _same(x: Tensor) -> Tensor:
    return x


def _convolutions(r: _Rewriter, index: int) -> None:
    """Conv, Add of another tensor, Relu -> one call; each of the latter two may be missing."""
    conv = r.step(index, "Conv")
    if conv is None or len(r.shape(conv.inputs[1])) != 4 or r.constant(conv.inputs[1]) is None:
        return
    geometry = _geometry(conv)
    if geometry is None:
        return
    chain, out, other = [index], conv.outputs[0], None
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    add_at = r.reader(out)
    add = r.step(add_at, "Add")
    if add is not None and add_at is not None:
        operand, relu_at = _other(add, out), r.reader(add.outputs[0])
        if r.shape(operand) == r.shape(out) and r.step(relu_at, "Relu") is not None and r.constant(operand) is None:
            chain.append(add_at)
            out, other = add.outputs[0], operand
            bias = _join_biases(r, bias, operand)
    relu_at = r.reader(out)
    relu = r.step(relu_at, "Relu")
    if relu is not None and relu_at is not None:
        chain.append(relu_at)
        out = relu.outputs[0]
    infos = [r.program.infos[slot] for slot in (conv.inputs[0], conv.inputs[1], out) if slot is not None]
    call = fused_calls.choose_convolution(*infos, bias is not None, other is not None, relu is not None, geometry)
    inputs = (conv.inputs[0], conv.inputs[1], bias, other)
    r.put(chain, Step("FusedConv", call, inputs, (out,), conv.node))


def _geometry(conv: Step) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None:
    """Return strides, padding, dilations and group, None for padding that differs by side."""
    get = conv.attributes.get
    pads = tuple(get("pads") or (0, 0, 0, 0))
    if get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or pads[:2] != pads[2:]:
        return None
    return tuple(get("strides") or (1, 1)), pads[:2], tuple(get("dilations") or (1, 1)), get("group", 1)


def _join_biases(r: _Rewriter, bias: int | None, operand: int | None) -> int | None:
    """Where the operand is another convolution's result, read here alone, take its bias over: it is added once."""
    index = r.maker(operand)
    for name, place in (("Conv", 2), ("FusedConv", 2)):
        other = r.step(index, name)
        if other is None or index is None or operand is None or r.reader(operand) is None:
            continue
        if name == "FusedConv" and (getattr(other.call, "relu", True) or other.inputs[3] is not None):
            continue
        theirs = other.inputs[place] if len(other.inputs) > place else None
        tensor, own = r.constant(theirs), r.constant(bias)
        if tensor is None or own is None:
            continue
        inputs = (*other.inputs[:place], None, *other.inputs[place + 1 :])
        r.steps[index] = other.with_inputs(*inputs)
        return r.program.add_constant((own.float() + tensor.float()).to(own.dtype))
    return bias


def _linear_layers(r: _Rewriter, index: int) -> None:
    """MatMul or Gemm by a constant matrix, with a bias, another addend and Relu behind -> one call."""
    step = r.step(index, "MatMul", "Gemm")
    if step is None or not _is_linear(r, step):
        return
    out, chain = step.outputs[0], [index]
    bias, other = _addends(r, None, None, step.inputs[2] if len(step.inputs) > 2 else None, out)
    if len(step.inputs) > 2 and step.inputs[2] is not None and bias is None and other is None:
        return
    while (add_at := r.reader(out)) is not None and (add := r.step(add_at, "Add")) is not None:
        found = _addends(r, bias, other, _other(add, out), out)
        if found == (bias, other) or r.shape(add.outputs[0]) != r.shape(out):
            break
        bias, other = found
        chain.append(add_at)
        out = add.outputs[0]
    relu_at = r.reader(out)
    relu = r.step(relu_at, "Relu")
    if relu is not None and relu_at is not None:
        chain.append(relu_at)
        out = relu.outputs[0]
    x, w, transposed = step.inputs[0], step.inputs[1], bool(step.attributes.get("transB", 0))
    weight = r.constant(w)
    assert x is not None
    assert w is not None
    assert weight is not None
    if transposed:
        w = r.program.add_constant(weight.t())
    infos, flags = r.program.infos, (bias is not None, other is not None, relu is not None, transposed)
    call = fused_calls.choose_linear(infos[x], infos[w], *flags)
    r.put(chain, Step("Linear", call, (x, w, bias, other), (out,), step.node))


def _is_linear(r: _Rewriter, step: Step) -> bool:
    """Whether the step multiplies rows by a constant matrix, and does nothing else but add."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if any(step.attributes.get(name, value) != value for name, value in plain.items()):
        return False
    matrix = len(r.shape(step.inputs[1])) == 2 and r.constant(step.inputs[1]) is not None
    return matrix and len(r.shape(step.inputs[0])) > 1 and r.dtype(step.outputs[0]) in (*HALF, "float32")


def _addends(
    r: _Rewriter, bias: int | None, other: int | None, operand: int | None, out: int
) -> tuple[int | None, int | None]:
    """Return bias and other with `operand` as one of them; unchanged where it cannot be."""
    if operand is None:
        return bias, other
    shape, wanted = r.shape(operand), r.shape(out)
    if bias is None and r.constant(operand) is not None and shape == wanted[-1:]:
        return operand, other
    if other is None and r.dtype(out) in HALF and _same_but_for_ones(shape, wanted):
        return bias, operand
    return bias, other


def _same_but_for_ones(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` broadcasts to `wanted` without repeating an element."""
    return len(shape) <= len(wanted) and (1,) * (len(wanted) - len(shape)) + shape == wanted


def _parallel_layers(r: _Rewriter, index: int) -> None:
    """Linear layers of one input whose matrices are of one size, and that add constants at most -> one call."""
    first = r.step(index, "Linear")
    if first is None or first.inputs[0] is None or r.dtype(first.inputs[0]) not in HALF:
        return
    found = [i for i in r.readers(first.inputs[0]) if (step := r.step(i, "Linear")) and _parallel(r, first, step)]
    if len(found) < 2:
        return
    steps = [step for i in found if (step := r.steps[i]) is not None]
    x = first.inputs[0]
    weights, rows = [r.constant(step.inputs[1]) for step in steps], math.prod(r.shape(x)[:-1])
    w = r.program.add_constant(torch.stack([weight for weight in weights if weight is not None]).contiguous())
    full = any(step.inputs[3] is not None for step in steps)
    addend = r.program.add_constant(torch.stack([_addend(r, step, rows if full else None) for step in steps]))
    flags = (not full, full, bool(getattr(first.call, "relu", False)))
    call = fused_calls.choose_parallel(r.program.infos[x], r.program.infos[w], *flags)
    for i in found:
        r.steps[i] = None
    outputs = tuple(step.outputs[0] for step in steps)
    inputs = (x, w, None, addend) if full else (x, w, addend, None)
    r.steps[found[0]] = Step("ParallelLinear", call, inputs, outputs, first.node)


def _parallel(r: _Rewriter, first: Step, step: Step) -> bool:
    """Whether a linear layer can run with `first`: same input and sizes, and nothing computed in its addends."""
    same = step.inputs[0] == first.inputs[0] and r.shape(step.inputs[1]) == r.shape(first.inputs[1])
    constant = all(slot is None or r.constant(slot) is not None for slot in step.inputs[2:])
    return same and constant and getattr(step.call, "relu", False) == getattr(first.call, "relu", False)


def _addend(r: _Rewriter, step: Step, rows: int | None) -> Tensor:
    """Return all that a layer adds: (rows, N), or (N) where rows is None."""
    weight = r.constant(step.inputs[1])
    assert weight is not None
    total = torch.zeros((*([] if rows is None else [rows]), weight.shape[1]), device=weight.device)
    for slot in step.inputs[2:]:
        tensor = r.constant(slot)
        if tensor is not None:
            total = total + (tensor if tensor.ndim == 1 else tensor.reshape(rows or 1, -1)).float()
    return total.to(weight.dtype)
