"""LSTM, GRU and RNN: torch's own where it computes the same, else a loop over time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optframe.backends.torch.registry import Call, OpNode, op

_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_GATE_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""torch's gates in terms of ONNX's: LSTM i, f, g, o from i, o, f, c; GRU r, z, n from z, r, h."""


@op("LSTM", "GRU", "RNN")
def _recurrent(node: OpNode) -> Call:
    _check(node)
    direction = node.choice("direction", "forward", "reverse", "bidirectional")
    directions, backward = 2 if direction == "bidirectional" else 1, direction == "reverse"
    batch_first = bool(node.get("layout", 0))

    def recurrent(
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        _: Tensor | None = None,
        h: Tensor | None = None,
        c: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """x (time, batch, inputs) -> y (time, directions, batch, hidden), the last h, and for LSTM the last c."""
        if batch_first:
            x, h, c = (
                x.transpose(0, 1),
                None if h is None else h.transpose(0, 1),
                None if c is None else c.transpose(0, 1),
            )
        x = x.flip(0) if backward else x
        zeros = x.new_zeros(directions, x.shape[1], r.shape[-1])
        states = [zeros if state is None else state for state in (h, c)]
        y, *last = _run(node, x, states, w, r, b)
        y = y.reshape(*y.shape[:2], directions, -1).transpose(1, 2)
        y = y.flip(0) if backward else y
        if batch_first:
            y, last = y.permute(2, 0, 1, 3), [state.transpose(0, 1) for state in last]
        return (y, *last)[: max(node.outputs, 2)]

    return recurrent


def _check(node: OpNode) -> None:
    """Name what has no translation: lengths per sequence, peepholes, clipping, other activations."""
    given = tuple(node.get("activations") or ())
    expected = _DEFAULTS[node.op_type] * (len(given) // len(_DEFAULTS[node.op_type]))
    relu = node.op_type == "RNN" and set(given) == {"Relu"}
    for wrong, what in (
        (node.has(4), "sequence_lens"),
        (node.op_type == "LSTM" and node.has(7), "peepholes"),
        (node.get("clip") is not None, "clip"),
        (node.get("input_forget", 0), "input_forget"),
        (given != expected and not relu, f"activations {', '.join(given)}"),
    ):
        if wrong:
            raise node.unsupported(what)


def _run(
    node: OpNode, x: Tensor, states: Sequence[Tensor], w: Tensor, r: Tensor, b: Tensor | None
) -> tuple[Tensor, ...]:
    """Return y (time, batch, directions * hidden) and the last states."""
    if node.op_type == "GRU" and not node.get("linear_before_reset", 0):
        return _gru_reset_first(x, states[0], w, r, b)
    order = _GATE_ORDER[node.op_type]
    parameters: list[Tensor] = []
    for direction in range(w.shape[0]):
        parameters += [_reordered(w[direction], order), _reordered(r[direction], order)]
        if b is not None:
            parameters += [_reordered(half, order) for half in b[direction].chunk(2)]
    common = (parameters, b is not None, 1, 0.0, False, w.shape[0] == 2, False)
    if node.op_type == "LSTM":
        result: tuple[Tensor, ...] = torch.lstm(x, list(states), *common)
        return result
    if node.op_type == "GRU":
        return torch.gru(x, states[0], *common)
    relu = set(node.get("activations") or ()) == {"Relu"}
    return (torch.rnn_relu if relu else torch.rnn_tanh)(x, states[0], *common)


def _reordered(parameter: Tensor, order: Sequence[int]) -> Tensor:
    gates = parameter.chunk(len(order))
    return torch.cat([gates[gate] for gate in order])


def _gru_reset_first(x: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The GRU of Cho et al., arXiv:1406.1078, whose reset gate acts before the product; torch has the other."""
    ys, last = [], []
    for direction in range(w.shape[0]):
        bias = b[direction] if b is not None else w.new_zeros(2 * w.shape[1])
        sequence = x.flip(0) if direction else x
        state, outputs = h[direction], []
        for step in sequence:
            state = _gru_step(step, state, w[direction], r[direction], bias)
            outputs.append(state)
        stacked = torch.stack(outputs)
        ys.append(stacked.flip(0) if direction else stacked)
        last.append(state)
    return torch.cat(ys, -1), torch.stack(last)


def _gru_step(x: Tensor, h: Tensor, w: Tensor, r: Tensor, bias: Tensor) -> Tensor:
    wb, rb = bias.chunk(2)
    (wz, wr, wh), (rz, rr, rh) = (x @ w.t() + wb).chunk(3, -1), r.chunk(3)
    bz, br, bh = rb.chunk(3)
    update = torch.sigmoid(wz + h @ rz.t() + bz)
    reset = torch.sigmoid(wr + h @ rr.t() + br)
    candidate = torch.tanh(wh + (reset * h) @ rh.t() + bh)
    return (1 - update) * candidate + update * h
