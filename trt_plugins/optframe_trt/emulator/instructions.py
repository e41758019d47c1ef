"""Which builder an opcode has."""

from __future__ import annotations

from collections.abc import Mapping

from optframe_trt.emulator import access, control, floats, integers, matrix, moves, values, warp
from optframe_trt.emulator.program import Binder, Builder, ControlBuilder, Step
from optframe_trt.emulator.ptx import Instruction


def _by_type(on_floats: Builder, on_integers: Builder) -> Builder:
    """Return the builder of an opcode that floats and integers share."""

    def build(binder: Binder, by: Instruction) -> Step | None:
        is_float = by.modifiers[-1:] and by.modifiers[-1] in values.FLOATS
        return (on_floats if is_float else on_integers)(binder, by)

    return build


_SHARED = sorted(floats.BUILDERS.keys() & integers.BUILDERS)

BUILDERS: Mapping[str, Builder] = {
    **integers.BUILDERS,
    **floats.BUILDERS,
    **{name: _by_type(floats.BUILDERS[name], integers.BUILDERS[name]) for name in _SHARED},
    **moves.BUILDERS,
    **access.BUILDERS,
}
"""Builders of instructions that each thread does by itself."""

CONTROLS: Mapping[str, ControlBuilder] = {**control.CONTROLS, **warp.CONTROLS, **matrix.CONTROLS}
"""Builders of instructions that move or stop threads, or that lanes do together."""
