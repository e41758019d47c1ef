"""The table of ONNX ops: which torch calls they are, and what of their inputs has to be in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optframe.errors import InputError

Call = Callable[..., Any]
"""Takes the inputs of a node as tensors (None for one left out) and returns its output, or a tuple of them."""


@dataclass(frozen=True)
class OpNode:
    """What a translation may ask of a node: its op, attributes as Python values, opset, and which inputs it has."""

    op_type: str
    attributes: Mapping[str, Any]
    opset: int
    present: tuple[bool, ...]
    outputs: int
    name: str = ""

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute's value, or `default`."""
        return self.attributes.get(attribute, default)

    def choice(self, attribute: str, *known: str) -> str:
        """Return a string attribute, whose default is the first of those that are known.

        Raises:
            InputError: it is none of them.
        """
        value = self.attributes.get(attribute, known[0])
        if value not in known:
            raise self.unsupported(f"{attribute} = {value}")
        return str(value)

    def has(self, index: int) -> bool:
        """Return whether the node has an input there."""
        return index < len(self.present) and self.present[index]

    def unsupported(self, what: str) -> InputError:
        """Return the error for a form of the op that has no translation."""
        return InputError(f"backend torch has no {self.op_type} with {what} (node '{self.name}'): use onnxruntime")


@dataclass(frozen=True)
class Translation:
    """How an op becomes a torch call. `host` are the inputs that decide shapes or control flow, read on the host.

    `data_shaped`: the shape of an output depends on the values of inputs.
    """

    build: Callable[[OpNode], Call]
    host: tuple[int, ...] = ()
    data_shaped: bool = False


TRANSLATIONS: dict[str, Translation] = {}


def op(
    *names: str, host: tuple[int, ...] = (), data_shaped: bool = False
) -> Callable[[Callable[[OpNode], Call]], Callable[[OpNode], Call]]:
    """Enter the decorated function, which makes the torch call of a node, for the ONNX ops `names`."""

    def enter(build: Callable[[OpNode], Call]) -> Callable[[OpNode], Call]:
        for name in names:
            TRANSLATIONS[name] = Translation(build, host, data_shaped)
        return build

    return enter


def enter_calls(calls: Mapping[str, Call]) -> None:
    """Enter ops that are one torch call whatever their attributes."""
    for name, call in calls.items():
        TRANSLATIONS[name] = Translation(lambda node, call=call: call)  # type: ignore[misc]
