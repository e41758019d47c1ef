"""Whether a node may become a call of a plugin op."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from optframe import ops
from optframe.passes import PassContext
from optframe.types import OpSpec
from optframe_passes.propagate import Propagation


def may_call(
    spec: OpSpec, inputs: Sequence[ir.Value | None], known: Propagation, node: ir.Node, context: PassContext
) -> bool:
    """Return whether `node` may become a call of `spec` with `inputs`, and record a near-miss where the op refuses.

    If so, those of `inputs` that have no type get the one that is known of them; else they stay as they were.
    """
    untyped = [value for value in inputs if value is not None and value.type is None]
    for value in untyped:
        value.type = known.type_of(value)
    reason = ops.refusal(spec, inputs)
    if reason is not None:
        context.near_miss(node, reason)
    elif context.allow(node):
        return True
    for value in untyped:
        value.type = None
    return False
