"""Which ONNX nodes and torch modules TensorRT's layers come from: of the network parsed, and of the engine built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from optframe.details import LayerTime
from optframe.passes import ORIGIN_KEY, PASS_KEY, module_path
from optframe_trt.builder import LayerFacts

ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=$|[\x1e\x1f\s+,;\[])")
"""What TensorRT's parser writes into a layer's metadata; fused layers of an engine hold several."""


@dataclass(frozen=True)
class Origin:
    """An ONNX node that layers come from.

    `module` are the torch modules that it came from, separated by commas, `exported` the exported nodes that it stands
    for, `made_by` the passes that made it; each may be unknown.
    """

    op: str
    module: str = ""
    exported: tuple[str, ...] = ()
    made_by: tuple[str, ...] = ()


def origins(model: ir.Model) -> dict[str, Origin]:
    """Return node name -> origin for all named nodes of the model that an engine is built from."""
    return {node.name: _origin(node) for node in model.graph.all_nodes() if node.name}


def _origin(node: ir.Node) -> Origin:
    props, name = node.metadata_props, node.name or ""
    return Origin(
        op=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
        module=module_path(props, name),
        exported=tuple(filter(None, props.get(ORIGIN_KEY, "").split(","))),
        made_by=tuple(filter(None, props.get(PASS_KEY, "").split(","))),
    )


def nodes_of(metadata: str) -> tuple[str, ...]:
    """Return the names of the ONNX nodes in a layer's metadata."""
    return tuple(dict.fromkeys(ONNX_LAYER.findall(metadata)))


def layer_nodes(layers: Iterable[LayerFacts]) -> dict[str, tuple[str, ...]]:
    """Return the name of each layer that computes something -> its ONNX nodes."""
    found = {layer.name: nodes_of(layer.metadata) for layer in layers}
    return {name: nodes for name, nodes in found.items() if nodes}


def engine_layers(information: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return layer name -> ONNX nodes from what an `EngineInspector` tells; of an engine without details nothing."""
    detailed = [layer for layer in information.get("Layers", []) if isinstance(layer, Mapping)]
    return {layer["Name"]: nodes_of(layer.get("Metadata", "")) for layer in detailed}


def describe_times(
    times: Mapping[str, float], nodes: Mapping[str, Sequence[str]], known: Mapping[str, Origin]
) -> list[LayerTime]:
    """Return the layers of `times` (name -> milliseconds), slowest first, with ONNX nodes and torch modules.

    `nodes` is what the engine says of its layers; a layer that it says nothing of is looked for by name among `known`,
    since TensorRT joins the names of what it fuses with " + ".
    """
    described = []
    for name, milliseconds in sorted(times.items(), key=lambda item: -item[1]):
        of = tuple(nodes.get(name, ())) or tuple(part for part in re.split(r"\s*\+\s*", name) if part in known)
        modules = dict.fromkeys(known[node].module for node in of if node in known and known[node].module)
        described.append(LayerTime(name, milliseconds, of, tuple(modules)))
    return described
