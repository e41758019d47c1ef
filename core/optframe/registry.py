"""Names and what they stand for: everything that plugins contributed, and whom to blame where it does not load."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

from optframe.commands import BUILTIN_COMMANDS
from optframe.errors import PLUGIN_ERRORS, InputError, PluginError, describe, unknown_name
from optframe.host import Contribution, PluginHost, PluginProblem, Spec
from optframe.pass_options import option_default, option_types
from optframe.passes import Dialect, GraphPass
from optframe.pipeline import read_one
from optframe.types import (
    BackendSpec,
    CalibratorSpec,
    CommandSpec,
    ModelAdapter,
    ModelSpec,
    OpSpec,
    PassSpec,
    PipelineSpec,
    load_target,
)

if TYPE_CHECKING:
    from optframe.backend import Backend
    from optframe.precision import Calibrator

SpecT = TypeVar("SpecT", bound=Spec)
Kind = Literal["model", "pass", "pipeline", "op", "calibrator", "backend", "command"]

ADAPTER_MEMBERS = (
    "Options",
    *(name for name, value in vars(ModelAdapter).items() if inspect.isfunction(value) and name[0] != "_"),
)
OWN_COMMANDS = frozenset(spec.name for spec in BUILTIN_COMMANDS)

KINDS: Mapping[type, Kind] = {
    ModelSpec: "model",
    PassSpec: "pass",
    PipelineSpec: "pipeline",
    OpSpec: "op",
    CalibratorSpec: "calibrator",
    BackendSpec: "backend",
    CommandSpec: "command",
}


def kind_of(spec: Spec) -> Kind:
    """Return what `spec` is a spec of; it may be an instance of a subclass."""
    return next(kind for cls, kind in KINDS.items() if isinstance(spec, cls))


def identifier(spec: Spec) -> str:
    """Return the name that `spec` is looked up by: `domain::name` for an op."""
    return spec.identifier if isinstance(spec, OpSpec) else spec.name


class _Names(Generic[SpecT]):
    """One name space. A name claimed twice stands for neither claim, so that order never matters."""

    def __init__(self, kind: str, claims: Iterable[Contribution[SpecT]]) -> None:
        self.kind = kind
        by_name: defaultdict[str, list[Contribution[SpecT]]] = defaultdict(list)
        for claim in claims:
            by_name[identifier(claim.spec)].append(claim)
        self.known = {name: claims[0] for name, claims in sorted(by_name.items()) if len(claims) == 1}
        self.clashes = {name: claims for name, claims in sorted(by_name.items()) if len(claims) > 1}

    def find(self, name: str) -> Contribution[SpecT]:
        if name in self.clashes:
            raise PluginError(self.clash(name))
        if name not in self.known:
            raise unknown_name(self.kind, name, self.known)
        return self.known[name]

    def clash(self, name: str) -> str:
        """Return the sentence on a name that is claimed twice."""
        claims = sorted({claim.blame for claim in self.clashes[name]})
        if len(claims) == 1:
            return f"{self.kind} '{name}' is claimed twice by {claims[0]}; neither is used"
        remedy = "disable one with --disable-plugin"
        return f"{self.kind} '{name}' is claimed by {' and by '.join(claims)}; none is used, {remedy}"

    def problems(self) -> list[PluginProblem]:
        firsts = {name: min(claims, key=lambda claim: claim.plugin) for name, claims in self.clashes.items()}
        return [
            PluginProblem(first.plugin, first.distribution, first.version, None, self.clash(name))
            for name, first in firsts.items()
        ]


class Registry:
    """Looks up by name what the plugins of `host` contribute; takes their contributions once, when made.

    Every look-up of a name that nobody registered raises InputError with a suggestion; of one that was claimed twice,
    or whose target does not load or is not what it should be, PluginError with plugin, distribution and version.
    """

    def __init__(self, host: PluginHost) -> None:
        self.host = host
        steps: list[Contribution[PassSpec] | Contribution[PipelineSpec]] = [*host.passes(), *host.pipelines()]
        self._models = _Names("model", host.models())
        self._steps = _Names[PassSpec | PipelineSpec]("pass or pipeline", steps)
        self._ops = _Names("op", host.ops())
        self._calibrators = _Names("calibrator", host.calibrators())
        self._backends = _Names("backend", host.backends())
        commands = host.commands()
        self._commands = _Names("command", [claim for claim in commands if claim.spec.name not in OWN_COMMANDS])
        self._reserved = [_reserved(claim) for claim in commands if claim.spec.name in OWN_COMMANDS]
        self._names: Mapping[Kind, _Names[Any]] = {
            "model": self._models,
            "pass": self._steps,
            "pipeline": self._steps,
            "op": self._ops,
            "calibrator": self._calibrators,
            "backend": self._backends,
            "command": self._commands,
        }

    @property
    def problems(self) -> list[PluginProblem]:
        """The host's problems, and the names that were claimed twice or are not free."""
        tables = {id(names): names for names in self._names.values()}.values()
        return [*self.host.problems, *self._reserved, *(problem for names in tables for problem in names.problems())]

    def contribution(self, kind: Kind, name: str) -> Contribution[Any]:
        """Return the contribution of `kind` called `name`, which says whose it is."""
        claim = self._names[kind].find(name)
        actual = kind_of(claim.spec)
        if actual != kind:
            raise InputError(f"'{name}' is a {actual}, not a {kind}")
        return claim

    def contributions(self) -> list[Contribution[Any]]:
        """Return all usable contributions, by kind and name."""
        return [claim for kind in self._names for claim in self._known(kind)]

    def model(self, name: str) -> ModelSpec:
        """Return the spec of model `name`."""
        return self._models.find(name).spec

    def models(self) -> list[ModelSpec]:
        """Return all models, sorted by name."""
        return [claim.spec for claim in self._known("model")]

    def load_model(self, name: str) -> type[ModelAdapter]:
        """Import and return the adapter class of model `name`."""
        adapter: type[ModelAdapter] = self._load("model", name, ModelAdapter, ADAPTER_MEMBERS)
        if not is_dataclass(adapter.Options):
            raise PluginError(f"{self.what('model', name)}: {adapter.__qualname__}.Options is no dataclass")
        try:
            inspect.signature(adapter).bind(None)
        except TypeError as error:
            reason = f"{adapter.__qualname__} cannot be constructed from its options alone: {error}"
            raise PluginError(f"{self.what('model', name)}: {reason}") from error
        return adapter

    def step(self, name: str) -> PassSpec | PipelineSpec:
        """Return what `name` stands for in a pipeline's text: passes and pipelines share one name space."""
        return self._steps.find(name).spec

    def passes(self) -> list[PassSpec]:
        """Return all passes, sorted by name."""
        return [claim.spec for claim in self._known("pass")]

    def load_pass(self, name: str) -> type[GraphPass]:
        """Import and return the class of pass `name`."""
        claim = self.contribution("pass", name)
        loaded = self._load("pass", name)
        if not (isinstance(loaded, type) and issubclass(loaded, GraphPass)):
            raise PluginError(f"{_what(claim)}: {claim.spec.target} is no subclass of GraphPass")
        self._refuse("pass", loaded, name, "has no method run" if inspect.isabstract(loaded) else _pass_flaw(loaded))
        return loaded

    def pipeline(self, name: str) -> PipelineSpec:
        """Return pipeline `name`."""
        spec: PipelineSpec = self.contribution("pipeline", name).spec
        return spec

    def pipelines(self) -> list[PipelineSpec]:
        """Return all pipelines, sorted by name."""
        return [claim.spec for claim in self._known("pipeline")]

    def op(self, identifier: str) -> OpSpec:
        """Return the op `domain::name`."""
        return self._ops.find(identifier).spec

    def ops(self) -> Mapping[str, OpSpec]:
        """Return all ops by identifier, sorted."""
        return {claim.spec.identifier: claim.spec for claim in self._known("op")}

    def kernel_ops(self) -> frozenset[str]:
        """Return the identifiers of the ops that have a kernel, and so count as one node."""
        return frozenset(identifier for identifier, spec in self.ops().items() if spec.kernel is not None)

    def calibrator(self, name: str) -> CalibratorSpec:
        """Return the spec of calibrator `name`."""
        return self._calibrators.find(name).spec

    def calibrators(self) -> list[CalibratorSpec]:
        """Return all calibrators, sorted by name."""
        return [claim.spec for claim in self._known("calibrator")]

    def load_calibrator(self, name: str) -> type[Calibrator]:
        """Import and return the class of calibrator `name`."""
        from optframe.precision.calibrator import Calibrator

        loaded: type[Calibrator] = self._load("calibrator", name, Calibrator, ("name", "threshold"))
        self._refuse("calibrator", loaded, name, None if is_dataclass(loaded) else "is no dataclass")
        return loaded

    def make_calibrator(self, text: str) -> Calibrator:
        """Return the calibrator that `text` describes, maybe with options: "percentile{percent=99.9}".

        Raises:
            InputError: no calibrator is called so, or it does not take these options.
        """
        return read_one(text, "calibrator", self.load_calibrator)

    def backend(self, name: str) -> BackendSpec:
        """Return the spec of backend `name`."""
        return self._backends.find(name).spec

    def backends(self) -> list[BackendSpec]:
        """Return all backends, sorted by name."""
        return [claim.spec for claim in self._known("backend")]

    def load_backend(self, name: str) -> Backend:
        """Import backend `name` and return an instance; it need not work here, see its `missing()`."""
        claim = self.contribution("backend", name)
        from optframe.backend import Backend

        factory = self._load("backend", name, Backend, ("missing", "versions", "build", "open"))
        try:
            backend: Backend = factory()
        except PLUGIN_ERRORS as error:
            raise PluginError(f"{_what(claim)}: {factory.__qualname__}() raised {describe(error)}") from error
        flaw = _name_flaw(backend, name)
        names = getattr(backend, "option_names", ())
        if not flaw and (not isinstance(names, Collection) or isinstance(names, str)):
            flaw = f"has option_names = {names!r}, not a collection of names"
        if flaw:
            raise PluginError(f"{_what(claim)}: {factory.__qualname__} {flaw}")
        return backend

    def command(self, name: str) -> CommandSpec:
        """Return the command `name` that a plugin added; optframe's own are in `optframe.commands`."""
        return self._commands.find(name).spec

    def commands(self) -> list[CommandSpec]:
        """Return all commands that plugins added, sorted by name."""
        return [claim.spec for claim in self._known("command")]

    def load_command(self, name: str) -> Any:
        """Import and return the function, or the `typer.Typer`, of command `name`."""
        return self._load("command", name)

    def what(self, kind: Kind, name: str) -> str:
        """Return a contribution in words, with plugin, distribution and version, as errors name it."""
        return _what(self.contribution(kind, name))

    def _refuse(self, kind: Kind, loaded: type[Any], name: str, flaw: str | None) -> None:
        """Raise PluginError if `loaded` has a `flaw`, another name, or an option without a default or a text form."""
        flaw = flaw or _name_flaw(loaded, name) or _default_flaw(loaded)
        if flaw:
            raise PluginError(f"{self.what(kind, name)}: {loaded.__qualname__} {flaw}")
        try:
            option_types(loaded)
        except PluginError as error:
            raise PluginError(f"{self.contribution(kind, name).blame}: {error}") from error

    def _known(self, kind: Kind) -> list[Contribution[Any]]:
        return [claim for claim in self._names[kind].known.values() if kind_of(claim.spec) == kind]

    def _load(self, kind: Kind, name: str, protocol: type[Any] = object, members: Collection[str] = ()) -> Any:
        """Import the target of `kind` and `name`, and see that it has those `members` of `protocol`."""
        claim = self.contribution(kind, name)
        try:
            target = load_target(claim.spec.target)
        except PluginError as error:
            raise PluginError(f"{_what(claim)}: {error}") from error
        lacking = [member for member in members if not hasattr(target, member)]
        if lacking:
            raise PluginError(f"{_what(claim)}: {claim.spec.target} lacks {', '.join(lacking)}")
        for member in members:
            flaw = _call_flaw(target, protocol, member)
            if flaw:
                raise PluginError(f"{_what(claim)}: {claim.spec.target} {flaw}")
        return target


def default_registry(disabled: Collection[str] = ()) -> Registry:
    """Return the registry of the installed plugins, those named in `disabled` left out."""
    return Registry(PluginHost(disabled))


def _what(claim: Contribution[Any]) -> str:
    return f"{kind_of(claim.spec)} '{identifier(claim.spec)}' of {claim.blame}"


def _call_flaw(cls: type[Any], protocol: type[Any], member: str) -> str | None:
    """Return why the method `member` of `cls` cannot be called as `protocol` says, None if it can or is no method."""
    declared, own = vars(protocol).get(member), inspect.getattr_static(cls, member, None)
    if not inspect.isfunction(declared) or not inspect.isfunction(own):
        return None
    wanted, found = inspect.signature(declared).parameters, inspect.signature(own)
    try:
        found.bind(*wanted)
    except TypeError:
        return f"has {member}({', '.join(found.parameters)}), which is called as {member}({', '.join(wanted)})"
    return None


def _pass_flaw(cls: type[GraphPass]) -> str | None:
    """Return what keeps `cls` from being a pass, or None."""
    if not _is_classvar_only(cls) and "__dataclass_fields__" not in vars(cls):
        return "has options, but is no dataclass: decorate it with @dataclass(frozen=True)"
    if cls.dialect not in get_args(Dialect):
        return f"has the dialect {cls.dialect!r}, not {' or '.join(map(repr, get_args(Dialect)))}"
    for attribute in ("after", "before", "domains"):
        value = getattr(cls, attribute)
        if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
            return f"has {attribute} = {value!r}, not a tuple of names"
    return _call_flaw(cls, GraphPass, "run")


def _is_classvar_only(cls: type) -> bool:
    """Return whether no annotation in the body of `cls` makes an option."""
    return all("ClassVar" in str(kind) for kind in inspect.get_annotations(cls).values())


def _name_flaw(owner: object, name: str) -> str | None:
    own = getattr(owner, "name", None)
    return None if own == name else f"has the name {own!r}, not {name!r}"


def _default_flaw(cls: type[Any]) -> str | None:
    required = [field.name for field in fields(cls) if field.init and option_default(field) is MISSING]
    return f"has options without a default: {', '.join(required)}" if required else None


def _reserved(claim: Contribution[CommandSpec]) -> PluginProblem:
    message = f"command '{claim.spec.name}' is optframe's own; choose another name"
    return PluginProblem(claim.plugin, claim.distribution, claim.version, "optframe_commands", message)
