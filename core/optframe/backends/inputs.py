"""What a model takes, and whether given arrays are that: names, dtypes, shapes with named dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optframe.errors import InputError, unknown_name
from optframe.types import Feeds

Array = np.ndarray[Any, Any]

UNNAMED = "?"
"""What exporters of Paddle write for every free dimension: no name, since sizes under it differ."""


@dataclass(frozen=True)
class ModelInput:
    """An input; a dimension is a size, or a symbol's name, or None. A shape of None is any."""

    name: str
    data_type: ir.DataType
    shape: tuple[int | str | None, ...] | None

    @classmethod
    def of(cls, value: ir.Value) -> ModelInput:
        """Return the input that the graph declares.

        Raises:
            InputError: its dtype is not known.
        """
        if value.dtype is None:
            raise InputError(f"the model does not say what type its input '{value.name}' has")
        shape = None
        if value.shape is not None:
            sizes = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            shape = tuple(None if isinstance(size, int) and size < 0 else size for size in sizes)  # Paddle's -1 is free
        return cls(value.name or "", value.dtype, shape)

    def check(self, array: Array, symbols: dict[str, int]) -> Array:
        """Return `array` if it fits, C-contiguous; `symbols` collects the sizes of named dimensions.

        Raises:
            InputError: dtype or shape differ.
        """
        wanted, is_text = self.data_type.numpy(), self.data_type == ir.DataType.STRING
        if array.dtype.kind not in "OSUT" if is_text else array.dtype != wanted:
            raise InputError(f"input '{self.name}' is {array.dtype}, the model takes {'text' if is_text else wanted}")
        if self.shape is not None and not _fit(array.shape, self.shape, symbols):
            shape = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
            known = [f"{name} = {symbols[name]}" for name in self.shape if isinstance(name, str) and name in symbols]
            raise InputError(
                f"input '{self.name}' has shape {list(array.shape)}, the model takes [{shape}]"
                + (f" with {', '.join(known)}" if known else "")
            )
        return np.require(array, requirements="C")


def _fit(shape: Sequence[int], wanted: Sequence[int | str | None], symbols: dict[str, int]) -> bool:
    return len(shape) == len(wanted) and all(map(_fits(symbols), shape, wanted))


def _fits(symbols: dict[str, int]) -> Callable[[int, int | str | None], bool]:
    def fits(size: int, dim: int | str | None) -> bool:
        if dim is None or dim == UNNAMED:
            return True
        return size == (dim if isinstance(dim, int) else symbols.setdefault(dim, size))

    return fits


def check_feeds(feeds: Feeds, inputs: Sequence[ModelInput], label: str) -> dict[str, Array]:
    """Return the arrays of `feeds` in the order of `inputs`; `label` names the model in errors.

    Raises:
        InputError: a name is unknown or missing, or a dtype or shape is not what the model takes.
    """
    wanted = [value.name for value in inputs]
    for name in feeds:
        if name not in wanted:
            raise unknown_name("input", name, wanted)
    absent = [name for name in wanted if name not in feeds]
    if absent:
        raise InputError(f"{label} needs input '{absent[0]}' (it takes {', '.join(wanted)})")
    symbols: dict[str, int] = {}
    return {value.name: value.check(np.asarray(feeds[value.name]), symbols) for value in inputs}
