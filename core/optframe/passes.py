"""What a graph pass is: a frozen dataclass with a name, options, and `run(model, context) -> PassResult`."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from optframe.errors import unknown_name
from optframe.types import OpSpec

if TYPE_CHECKING:
    import onnx_ir as ir

PASS_KEY = "optframe.pass"
"""Metadata key of a node: the passes that made it, oldest first, separated by commas."""

ORIGIN_KEY = "optframe.from"
"""Metadata key of a node: names of the exported nodes that it stands for, separated by commas."""

SCOPE_KEY = "optframe.scope"
"""Metadata key of a node: torch module paths that it came from, separated by commas, where the exporter gave any."""

TORCH_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Metadata key under which torch's exporter writes a list of modules, from the outermost in, and last the op."""

Dialect = Literal["onnx_ir", "graphsurgeon"]

T = TypeVar("T")


@dataclass(frozen=True)
class NearMiss:
    """A node that a pass looked at and left alone, and why."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did: whether the model changed at all, and how many rewrites it made."""

    modified: bool
    rewrites: int = 0


class Facts:
    """What passes found out about a model, kept from one to the next until one modifies it."""

    def __init__(self) -> None:
        self._model: ir.Model | None = None
        self._known: dict[object, Any] = {}

    def of(self, model: ir.Model, find: Callable[[ir.Model], T]) -> T:
        """Return what `find` finds out about `model`, which the running pass has not changed yet."""
        if model is not self._model:
            self._model, self._known = model, {}
        if find not in self._known:
            self._known[find] = find(model)
        found: T = self._known[find]
        return found


@dataclass
class PassContext:
    """What a pass may use besides the model; one is made for each execution of a pass.

    `ops` are the registered plugin ops by identifier. `allow` is asked once before each rewrite, so that a failure
    can be bisected to a single one. A pass changes a graph through `replace`, which keeps names and provenance. `facts`
    spares it what the pass before found out, where that one changed nothing.
    """

    ops: Mapping[str, OpSpec] = field(default_factory=dict)
    allow_rewrite: Callable[[str], bool] = lambda _description: True
    near_misses: list[NearMiss] = field(default_factory=list)
    pass_name: str = ""
    facts: Facts = field(default_factory=Facts)

    def near_miss(self, node: Any, reason: str) -> None:
        """Record that `node` (of either dialect) nearly matched, and the `reason` it was left alone."""
        op_type = str(getattr(node, "op_type", None) or getattr(node, "op", ""))
        self.near_misses.append(NearMiss(node.name or "", op_type, reason))

    def allow(self, node: Any) -> bool:
        """Return whether the rewrite at `node` may happen; ask right before making it, and count on the answer."""
        return self.allow_rewrite(f"{self.pass_name} at {node.name or '(unnamed node)'}")

    def op(self, identifier: str) -> OpSpec:
        """Return the registered op `domain::name`.

        Raises:
            InputError: no plugin registered it.
        """
        if identifier not in self.ops:
            raise unknown_name("op", identifier, self.ops)
        return self.ops[identifier]

    def replace(
        self,
        old_nodes: Sequence[ir.Node],
        new_nodes: Sequence[ir.Node],
        old_values: Sequence[ir.Value],
        new_values: Sequence[ir.Value],
    ) -> None:
        """Put `new_nodes` in the place of `old_nodes`; uses of `old_values` become uses of `new_values`.

        New values take over names, types and shapes of the old ones; new nodes record this pass and their origin.
        The insertion point is the last old node, which must come after the producers of all new inputs.
        """
        import onnx_ir as ir

        graph = old_nodes[-1].graph
        assert graph is not None, "replaced nodes belong to a graph"
        self.stamp(new_nodes, old_nodes)
        ir.convenience.replace_nodes_and_values(graph, old_nodes[-1], old_nodes, new_nodes, old_values, new_values)

    def stamp(self, new_nodes: Iterable[ir.Node], origin: Sequence[ir.Node]) -> None:
        """Record on each of `new_nodes` that this pass made it from the nodes of `origin`."""
        merged = provenance(
            self.pass_name, [node.metadata_props for node in origin], [node.name or "" for node in origin]
        )
        for node in new_nodes:
            for key, value in merged.items():
                node.metadata_props.setdefault(key, value)
            node.metadata_props[PASS_KEY] = merged[PASS_KEY]


def provenance(pass_name: str, metadata: Sequence[Mapping[str, str]], names: Sequence[str]) -> dict[str, str]:
    """Return the provenance metadata of a node that pass `pass_name` made; see `merge_provenance`."""
    merged = merge_provenance(metadata, names)
    made_by = [*filter(None, merged.get(PASS_KEY, "").split(",")), pass_name]
    return {**merged, PASS_KEY: ",".join(dict.fromkeys(made_by))}


def module_path(metadata: Mapping[str, str], name: str) -> str:
    """Return the torch module paths that a node with `metadata` and `name` came from; "" where nobody said.

    Passes write `SCOPE_KEY`. Of a node as exported, torch's exporter tells in its metadata, the older exporter in the
    name: "/encoder/layers.0/norm/Add".
    """
    if SCOPE_KEY in metadata:
        return metadata[SCOPE_KEY]
    scopes = metadata.get(TORCH_SCOPES_KEY)
    if scopes:
        try:
            modules = [entry for entry in ast.literal_eval(scopes)[:-1] if isinstance(entry, str) and entry]
        except (ValueError, SyntaxError, TypeError):  # another tool's text under torch's key
            return ""
        return modules[-1] if modules else ""
    return name.rpartition("/")[0].strip("/") if name.startswith("/") else ""


def merge_provenance(metadata: Sequence[Mapping[str, str]], names: Sequence[str]) -> dict[str, str]:
    """Return the provenance metadata of a node made from nodes with `metadata` and `names`, in order, without repeats.

    A node that already stands for others (it has `ORIGIN_KEY`) passes those on instead of its own name.
    """
    origins: dict[str, None] = {}
    scopes: dict[str, None] = {}
    merged: dict[str, str] = {}
    passes: dict[str, None] = {}
    for props, name in zip(metadata, names, strict=True):
        origins.update(dict.fromkeys(filter(None, props.get(ORIGIN_KEY, name).split(","))))
        passes.update(dict.fromkeys(filter(None, props.get(PASS_KEY, "").split(","))))
        scopes.update(dict.fromkeys(filter(None, module_path(props, name).split(","))))
        for key, value in props.items():
            merged.setdefault(key, value)
    merged[ORIGIN_KEY] = ",".join(origins)
    merged[PASS_KEY] = ",".join(passes)
    merged[SCOPE_KEY] = ",".join(scopes)
    return {key: value for key, value in merged.items() if value}


@dataclass(frozen=True)
class GraphPass(ABC):
    """Base of all passes. A subclass is a frozen dataclass: its fields are its options, and each has a default.

    A pass is deterministic, idempotent and without state, works in place, and leaves alone what it does not
    understand. Its docstring is its documentation (`optframe passes NAME`).
    """

    name: ClassVar[str]
    dialect: ClassVar[Dialect] = "onnx_ir"
    after: ClassVar[tuple[str, ...]] = ()
    """Names of passes that, where a pipeline has them too, must have run before this one."""
    before: ClassVar[tuple[str, ...]] = ()
    """Names of passes that, where a pipeline has them too, must run only after this one."""
    domains: ClassVar[tuple[str, ...]] = ()
    """Op domains, beyond ONNX's own, that this pass may bring into a model."""

    @abstractmethod
    def run(self, model: Any, context: PassContext) -> PassResult:
        """Change `model` (an `onnx_ir.Model`, or a `graphsurgeon.Graph` for that dialect) in place."""
