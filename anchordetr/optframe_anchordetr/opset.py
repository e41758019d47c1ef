"""Lowers a graph of opset 18 to 17, for the exporter that knows nothing older than 18."""

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from optframe import graph
from optframe.errors import CheckFailed


def lower_18_to_17(model: ir.Model) -> ir.Model:
    """Rewrite `model` in place in opset 17 and return it.

    Opset 18 made the axes of reductions an input; that is all that Anchor DETR meets of its changes. Raises
    `CheckFailed` for any other op that opset 17 has in another form or not at all.
    """
    for node in graph.all_nodes(model):
        if node.domain in graph.ONNX_DOMAINS and onnx.defs.get_schema(node.op_type, 18).since_version == 18:
            _axes_to_attribute(node)
    model.opset_imports[""] = 17
    RemoveUnusedNodesPass()(model)  # the axes that no node reads any more
    return model


def _axes_to_attribute(node: ir.Node) -> None:
    axes = graph.constant(node.inputs[1]) if len(node.inputs) == 2 else None
    if not node.op_type.startswith("Reduce") or axes is None:
        raise CheckFailed(f"opset 17 has no {node.op_type} as exported here ({node.name}); ask for opset 18")
    node.resize_inputs(1)
    node.attributes.pop("noop_with_empty_axes", None)
    node.attributes.add(ir.AttrInt64s("axes", [int(axis) for axis in axes]))
