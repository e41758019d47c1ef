"""Evaluation of constant nodes in onnxruntime, many nodes to a session."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from optframe.graph import constant, constant_tensor, subgraphs
from optframe_passes.edit import Array, deterministic, is_onnx

_IR_VERSION = 10
"""Of the models made here: old enough for every onnxruntime that is supported, new enough for every opset."""

_SMALL_BYTES = 1 << 12
"""Integers up to this size are part of the session's model: shape inference reads the targets of reshapes there."""


@dataclass(frozen=True)
class Evaluated:
    """Arrays of the values asked for, and why nodes could not be run."""

    arrays: dict[ir.Value, Array]
    failures: dict[ir.Node, str]


def evaluate(
    nodes: Sequence[ir.Node],
    wanted: Collection[ir.Value],
    content: Callable[[ir.Value], Array],
    opset_imports: Mapping[str, int],
) -> Evaluated:
    """Run `nodes`, in topological order, with onnxruntime's CPU kernels and return those outputs that are `wanted`.

    `content` gives the arrays of values that come from elsewhere. When the session fails, the nodes are halved until
    the culprit is alone; values that depend on it are missing from the result. No graph optimisation takes part, so
    that a constant is what the unfolded node would have given.
    """
    asked = [value for node in nodes for value in node.outputs if value in wanted]
    if not asked:
        return Evaluated({}, {})
    try:
        return Evaluated(_run(nodes, asked, content, opset_imports), {})
    except Exception as error:  # onnxruntime raises a dozen types of its own, none of them public
        if len(nodes) == 1:
            return Evaluated({}, {nodes[0]: (str(error).splitlines() or [type(error).__name__])[0]})
    return _evaluate_halves(nodes, wanted, content, opset_imports)


def _evaluate_halves(
    nodes: Sequence[ir.Node],
    wanted: Collection[ir.Value],
    content: Callable[[ir.Value], Array],
    opset_imports: Mapping[str, int],
) -> Evaluated:
    half = len(nodes) // 2
    between = {value for node in nodes[half:] for value in node.inputs if value is not None}
    first = evaluate(nodes[:half], between | set(wanted), content, opset_imports)
    lost = {value for node in nodes[:half] for value in node.outputs if value not in first.arrays}
    runnable: list[ir.Node] = []
    for node in nodes[half:]:
        if lost.isdisjoint(value for value in node.inputs if value is not None):
            runnable.append(node)
        else:
            lost.update(node.outputs)

    def known(value: ir.Value) -> Array:
        return first.arrays[value] if value in first.arrays else content(value)

    second = evaluate(runnable, wanted, known, opset_imports)
    return Evaluated(first.arrays | second.arrays, first.failures | second.failures)


def _run(
    nodes: Sequence[ir.Node],
    wanted: Sequence[ir.Value],
    content: Callable[[ir.Value], Array],
    opset_imports: Mapping[str, int],
) -> dict[ir.Value, Array]:
    import onnxruntime as ort

    names: dict[ir.Value, str] = {}
    protos = [_node_proto(node, names) for node in nodes]
    made = {value for node in nodes for value in node.outputs}
    outside = {
        name: np.require(content(value), requirements=["C"]) for value, name in names.items() if value not in made
    }
    # Weights go in as inputs: they are never copied into a protobuf message, whose size is limited, and kernels do not
    # pack them, which changes the order of summation. That is how onnxruntime itself folds constants, bit by bit.
    feeds = {name: array for name, array in outside.items() if array.dtype.kind == "f" or array.nbytes > _SMALL_BYTES}
    graph = onnx.helper.make_graph(
        protos,
        "constants",
        [_tensor_info(name, array) for name, array in feeds.items()],
        [onnx.ValueInfoProto(name=names[value]) for value in wanted],
        [onnx.numpy_helper.from_array(array, name) for name, array in outside.items() if name not in feeds],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in opset_imports.items()]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(wanted, session.run([names[value] for value in wanted], feeds), strict=True))


def _node_proto(node: ir.Node, names: dict[ir.Value, str]) -> onnx.NodeProto:
    """Return `node` with values named by number: the model's own names may be missing or repeated."""

    def name_of(value: ir.Value | None) -> str:
        return "" if value is None or value.name == "" else names.setdefault(value, f"v{len(names)}")

    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    proto.input.extend(name_of(value) for value in node.inputs)
    proto.output.extend(name_of(value) for value in node.outputs)
    for attribute in node.attributes.values():
        ir.serde.serialize_attribute_into(proto.attribute.add(), attribute)
    return proto


def _tensor_info(name: str, array: Array) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def evaluate_value(value: ir.Value, opset_imports: Mapping[str, int]) -> Array | None:
    """Return the array behind `value` if it depends on no input, however long the way to it; else None."""
    nodes = _constant_ancestors(value)
    if nodes is None:
        return None
    if not nodes:
        return constant(value)
    return evaluate(nodes, {value}, _content, opset_imports).arrays.get(value)


def _content(value: ir.Value) -> Array:
    array = constant(value)
    assert array is not None, "asked only for initialisers and the outputs of Constant nodes"
    return array


def _constant_ancestors(value: ir.Value) -> list[ir.Node] | None:
    """Return the nodes that compute `value` from constants alone, in order, or None if there is another input."""
    order: dict[ir.Node, None] = {}
    stack: list[tuple[ir.Value, bool]] = [(value, False)]
    while stack:
        current, inputs_done = stack.pop()
        node = current.producer()
        if node is None or is_onnx(node, "Constant"):
            if constant_tensor(current) is None:
                return None
        elif inputs_done:
            order[node] = None
        elif not is_onnx(node) or not deterministic(node) or next(subgraphs(node), None) is not None:
            return None
        elif node not in order:
            stack.append((current, True))
            stack += [(needed, False) for needed in node.inputs if needed is not None]
    return list(order)
