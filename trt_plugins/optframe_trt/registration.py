"""What one build, or one engine, has of its plugins: their kernels, and the errors that TensorRT drops."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar, cast

from optframe import breadcrumbs
from optframe.errors import EnvironmentLacks, InputError, OptframeError, PluginError, describe
from optframe_trt.kernels import CompiledKernel

Method = TypeVar("Method", bound=Callable[..., Any])

logger = logging.getLogger("optframe_trt.plugins")
"""Is told each exception at once, as JSON at level DEBUG: TensorRT may crash on what a callback raised."""


def place(node: str, op: str) -> str:
    """Return where a callback is called, in words."""
    return f"node '{node}' ({op})"


@dataclass(frozen=True)
class NodeError:
    """An exception that a callback raised, and the node it was raised for."""

    node: str
    op: str
    error: BaseException

    @property
    def kind(self) -> type[OptframeError]:
        """What the caller gets: the kind of error that it is, if it is one of ours that says what to do."""
        raised = type(self.error)
        return raised if raised in (InputError, EnvironmentLacks) else PluginError

    def __str__(self) -> str:
        known = isinstance(self.error, OptframeError)
        return f"{place(self.node, self.op)}: {self.error if known else describe(self.error)}"


@dataclass
class Registration:
    """The plugins of some ops as one build, or one engine, uses them.

    `targets` are the compute capabilities that kernels are compiled for; `kernels` what was compiled or loaded, by
    node; `errors` what callbacks raised and TensorRT dropped; `buffers` the memory of serialised fields, which TensorRT
    reads until the engine is written.
    """

    targets: tuple[int, ...]
    errors: list[NodeError] = field(default_factory=list)
    kernels: dict[str, tuple[CompiledKernel, ...]] = field(default_factory=dict)
    buffers: list[object] = field(default_factory=list)

    def note(self, node: str, compiled: Sequence[CompiledKernel]) -> None:
        """Remember the kernels of a node."""
        self.kernels[node] = tuple(dict.fromkeys((*self.kernels.get(node, ()), *compiled)))

    def keep(self, error: NodeError) -> None:
        """Remember what a callback raised."""
        self.errors.append(error)
        logger.debug("%s", json.dumps({"error": str(error), "kind": error.kind.__name__}))

    def raise_errors(self) -> None:
        """Raise the first error kept, with its node's name, and forget all; do nothing where there is none.

        Raises:
            PluginError: a plugin failed; the exception that it raised is the cause.
            InputError, EnvironmentLacks: as the plugin raised it.
        """
        if not self.errors:
            return
        first = self.errors[0]
        self.errors.clear()
        raise first.kind(str(first)) from first.error


def keep_errors(method: Method) -> Method:
    """Let a callback leave its exception with `self.registration` before TensorRT gets it, and drops it.

    Should it crash, the node is known.
    """

    @wraps(method)
    def run(self: Any, *arguments: Any) -> Any:
        try:
            with breadcrumbs.at(place(self.node, self.spec.identifier)):
                return method(self, *arguments)
        except BaseException as error:  # TensorRT drops an exit or an interrupt, too
            self.registration.keep(NodeError(self.node, self.spec.identifier, error))
            raise

    return cast(Method, run)
