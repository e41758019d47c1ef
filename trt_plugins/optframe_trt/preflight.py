"""The pre-flight: which nodes the ONNX parser does not take, told with the pass that made them and what to do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from optframe.errors import InputError
from optframe.passes import PASS_KEY
from optframe_trt.flavours import Flavour

if TYPE_CHECKING:
    import tensorrt as trt

MISSING_PLUGIN = "Plugin not found"
"""What the parser says of an op that is neither one of its own nor a plugin's."""


@dataclass(frozen=True)
class Unsupported:
    """A node that the parser does not take, as it reports it; `index` is the node's in the graph, or negative."""

    name: str
    op: str
    reason: str
    index: int = -1


def unsupported(flavour: Flavour, model: Path, logger: Any) -> list[Unsupported]:
    """Return every node of the ONNX file that the flavour's parser does not take; nothing is built.

    The parser may end the process on a file that it never expected: ask in a process of its own.
    """
    builder: trt.Builder = flavour.module.Builder(logger)
    network = builder.create_network(network_flags(flavour))  # held here: the parser only refers to it
    parser: trt.OnnxParser = flavour.module.OnnxParser(network, logger)
    if parser.supports_model_v2(model.read_bytes(), str(model)):
        return []
    return parser_errors(parser) or [Unsupported("", "", "the parser does not say why")]


def parser_errors(parser: trt.OnnxParser) -> list[Unsupported]:
    """Return what `parser` found wrong, each node once."""
    found: dict[tuple[int, str], Unsupported] = {}
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        key = (error.node(), error.node_name())
        found.setdefault(key, Unsupported(error.node_name(), error.node_operator(), error.desc(), error.node()))
    return list(found.values())


def network_flags(flavour: Flavour) -> int:
    """Return the flags that make a network strongly typed."""
    if not flavour.can.strongly_typed_flag:
        return 0
    flag: trt.NetworkDefinitionCreationFlag = flavour.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    return 1 << int(flag)


def refusal(flavour: Flavour, model: ir.Model, nodes: Sequence[Unsupported]) -> InputError:
    """Return the error for `nodes` of `model`: every one by name, grouped by op, pass and reason."""
    by_name = {node.name: node for node in model.graph.all_nodes()}
    groups: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for found in nodes:
        node = by_name.get(found.name)
        made_by = node.metadata_props.get(PASS_KEY, "").rpartition(",")[2] if node is not None else ""
        op = _op(node, found.op)
        groups[(op, made_by, _reason(found, node))].append(found.name or "without a name")
    described = [
        f"{op} ({f'made by pass {made_by}, ' if made_by else ''}{reason}): {', '.join(names)}"
        for (op, made_by, reason), names in groups.items()
    ]
    count = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    return InputError(
        f"{flavour.name} {flavour.version} cannot take {count}: {'; '.join(described)}. {_advice(groups)}"
    )


def _op(node: ir.Node | None, op: str) -> str:
    if node is None:
        return op or "the graph"
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _reason(found: Unsupported, node: ir.Node | None) -> str:
    if MISSING_PLUGIN in found.reason:
        return (
            "no op of TensorRT's parser, and no plugin of that name" if node is None or not node.domain else "no plugin"
        )
    return " ".join(found.reason.split())[:200]


def _advice(groups: defaultdict[tuple[str, str, str], list[str]]) -> str:
    passes = list(dict.fromkeys(made_by for _, made_by, _ in groups if made_by))
    if passes:
        return f"Keep the portable form: leave {', '.join(passes)} out of --pipeline, or use --pipeline portable"
    return (
        "Keep the portable form: a model in standard ops that TensorRT supports, or an op with a plugin or a function"
    )
