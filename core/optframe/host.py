"""Finds, loads and blocks plugins, collects what they contribute, and blames the right one for an error."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pluggy

from optframe import hookspec
from optframe.errors import PLUGIN_ERRORS, PluginError, a_type, describe, unknown_name
from optframe.hookspec import PROJECT
from optframe.types import BackendSpec, CalibratorSpec, CommandSpec, ModelSpec, OpSpec, PassSpec, PipelineSpec

if TYPE_CHECKING:
    from optframe.gate.records import PassRecord

Spec = ModelSpec | PassSpec | PipelineSpec | OpSpec | CalibratorSpec | BackendSpec | CommandSpec
SpecT = TypeVar("SpecT", bound=Spec, covariant=True)
PluginState = Literal["loaded", "failed", "disabled"]

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What a contribution may be called: such a name needs no quotes in a pipeline's text or a shell."""


@dataclass(frozen=True)
class Owner:
    """A plugin, by its own name and by the distribution that brought it; the latter is empty for one in process."""

    plugin: str
    distribution: str
    version: str

    @property
    def blame(self) -> str:
        """The plugin in words, as errors name it."""
        origin = f"{self.distribution} {self.version}" if self.distribution else "registered in process"
        return f"plugin '{self.plugin}' ({origin})"


@dataclass(frozen=True)
class PluginProblem(Owner):
    """Something that a plugin got wrong; what it did right still counts. `hook` is None where no hook is involved."""

    hook: str | None
    message: str
    error: BaseException | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.blame, self.hook, self.message]))


@dataclass(frozen=True)
class Contribution(Owner, Generic[SpecT]):
    """A spec and the plugin it came from."""

    spec: SpecT


@dataclass(frozen=True)
class Plugin(Owner):
    """A plugin that was found. `target` is the module or object with its hooks, None unless loaded."""

    state: PluginState
    target: object | None = field(default=None, compare=False, repr=False)


class PluginHost:
    """The plugins of one program: found through the entry-point group `optframe`, or registered in process.

    A plugin that fails is listed in `problems` and does no harm. Nothing depends on the order of registration.

    Args:
        disabled: names of plugins not to import.
        discover: look for installed plugins; False gives an empty host.

    Raises:
        InputError: `disabled` names a plugin that is not installed.
    """

    def __init__(self, disabled: Collection[str] = (), *, discover: bool = True) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspec)
        self._plugins: dict[str, Plugin] = {}
        self._problems: list[PluginProblem] = []
        if discover:
            self._discover(frozenset(disabled))

    @property
    def plugins(self) -> list[Plugin]:
        """All plugins, failed and disabled ones too, sorted by name."""
        return [self._plugins[name] for name in sorted(self._plugins)]

    @property
    def problems(self) -> list[PluginProblem]:
        """What plugins got wrong so far, each problem once."""
        return list(self._problems)

    def register(self, target: object, name: str) -> None:
        """Register the module or object `target`, whose attributes are hook implementations, as plugin `name`.

        Raises:
            PluginError: there is a plugin of that name already.
        """
        if name in self._plugins:
            raise PluginError(f"cannot register a plugin '{name}': {self._plugins[name].blame} has that name")
        self._add(Owner(name, "", ""), target)

    def plugin_root(self, name: str) -> Path:
        """Return where the code of the loaded plugin `name` lies, for cache keys.

        That is the folder of the outermost package (namespace packages aside) around the plugin's module, or the
        module's own file where no package is around it.

        Raises:
            InputError: there is no plugin of that name.
            PluginError: the plugin is not loaded, or its code came from no file.
        """
        if name not in self._plugins:
            raise unknown_name("plugin", name, self._plugins)
        plugin = self._plugins[name]
        root = _source(plugin.target) if plugin.target is not None else None
        if root is None:
            raise PluginError(f"{plugin.blame} is {plugin.state} and has no files")
        return root

    def culprit(self, error: BaseException) -> Plugin | None:
        """Return the plugin in whose code `error` was raised, or in what that called; None if it was in nobody's.

        It is the one with the innermost frame of the traceback. optframe's own plugins are never it: what they raise,
        others may have brought about.
        """
        sources = [(_source(plugin.target), plugin) for plugin in self.plugins]
        own = {_source(hookspec), *(root for root, plugin in sources if plugin.distribution == PROJECT)}
        roots = [(root, plugin) for root, plugin in sources if root is not None and root not in own]
        files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
        return next((plugin for file in reversed(files) for root, plugin in roots if file.is_relative_to(root)), None)

    def models(self) -> list[Contribution[ModelSpec]]:
        """Collect `optframe_models`."""
        return self._collect("optframe_models", ModelSpec)

    def passes(self) -> list[Contribution[PassSpec]]:
        """Collect `optframe_passes`."""
        return self._collect("optframe_passes", PassSpec)

    def pipelines(self) -> list[Contribution[PipelineSpec]]:
        """Collect `optframe_pipelines`."""
        return self._collect("optframe_pipelines", PipelineSpec)

    def ops(self) -> list[Contribution[OpSpec]]:
        """Collect `optframe_ops`."""
        return self._collect("optframe_ops", OpSpec)

    def calibrators(self) -> list[Contribution[CalibratorSpec]]:
        """Collect `optframe_calibrators`."""
        return self._collect("optframe_calibrators", CalibratorSpec)

    def backends(self) -> list[Contribution[BackendSpec]]:
        """Collect `optframe_backends`."""
        return self._collect("optframe_backends", BackendSpec)

    def commands(self) -> list[Contribution[CommandSpec]]:
        """Collect `optframe_commands`."""
        return self._collect("optframe_commands", CommandSpec)

    def stage_started(self, stage: str, options: Mapping[str, Any]) -> None:
        """Tell all observers that `stage` begins."""
        self._notify("optframe_stage_started", stage=stage, options=options)

    def stage_finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Tell all observers that `stage` ended."""
        self._notify("optframe_stage_finished", stage=stage, seconds=seconds, cached=cached)

    def pass_started(self, name: str) -> None:
        """Tell all observers that the pass `name` begins."""
        self._notify("optframe_pass_started", name=name)

    def pass_finished(self, record: PassRecord) -> None:
        """Tell all observers that a pass ended."""
        self._notify("optframe_pass_finished", record=record)

    def _discover(self, disabled: frozenset[str]) -> None:
        found = list(_entry_points(self._report))
        shared = {name for name, count in Counter(point.name for point, _ in found).items() if count > 1}
        named = {
            f"{point.name}@{owner.distribution}" if point.name in shared else point.name: (point, owner)
            for point, owner in found
        }
        for unknown in sorted(disabled - named.keys()):
            raise unknown_name("plugin", unknown, [name for name in named if name.startswith(f"{unknown}@")] or named)
        for name, (point, where) in sorted(named.items()):
            owner = Owner(name, where.distribution, where.version)
            if name in disabled:
                self._plugins[name] = Plugin(**vars(owner), state="disabled")
            else:
                self._load(point, owner)

    def _load(self, point: metadata.EntryPoint, owner: Owner) -> None:
        try:
            target = point.load()
        except PLUGIN_ERRORS as error:
            self._fail(owner, f"cannot import '{point.value}': {describe(error)}", error)
            return
        if isinstance(target, ModuleType):
            self._add(owner, target)
        else:
            self._fail(owner, f"its entry point '{point.value}' names {a_type(target)}, not a module")

    def _fail(self, owner: Owner, message: str, error: BaseException | None = None) -> None:
        self._plugins[owner.plugin] = Plugin(**vars(owner), state="failed")
        self._report(owner, None, message, error)

    def _add(self, owner: Owner, target: object) -> None:
        try:
            self._manager.register(target, owner.plugin)
        except Exception as error:  # such as arguments that a hook has not, or a module registered under two names
            if self._manager.has_plugin(owner.plugin):
                self._manager.unregister(name=owner.plugin)
            self._fail(owner, f"cannot register it: {'; '.join(str(error).splitlines())}", error)
            return
        self._plugins[owner.plugin] = Plugin(**vars(owner), state="loaded", target=target)
        self._check_implementations(owner, target)

    def _check_implementations(self, owner: Owner, target: object) -> None:
        """Report what looks like a hook and is none, which pluggy would pass over in silence."""
        for caller in self._manager.get_hookcallers(target) or []:
            if not caller.has_spec():
                self._report(owner, caller.name, f"there is no such hook{_did_you_mean(caller.name)}")
            elif any(impl.plugin is target and _is_wrapper(impl) for impl in caller.get_hookimpls()):
                self._report(owner, caller.name, "a hook wrapper is never called; implement the hook itself")
        for name in _unmarked_hooks(target):
            if hasattr(hookspec, name):
                self._report(owner, name, "decorate it with @hookimpl; it is ignored so far")
            else:
                self._report(owner, name, f"there is no such hook{_did_you_mean(name)}")

    def _implementations(self, hook: str) -> list[pluggy.HookImpl]:
        implementations = getattr(self._manager.hook, hook).get_hookimpls()
        return sorted(
            (impl for impl in implementations if not _is_wrapper(impl)),
            key=lambda impl: (impl.plugin_name, getattr(impl.function, "__name__", "")),
        )

    def _collect(self, hook: str, kind: type[SpecT]) -> list[Contribution[SpecT]]:
        """Call `hook` implementation by implementation, and keep what is of `kind`; the rest becomes problems."""
        return [
            Contribution(owner.plugin, owner.distribution, owner.version, spec)
            for impl in self._implementations(hook)
            for owner in [self._plugins[impl.plugin_name]]
            for spec in self._specs(impl, owner, hook, kind)
        ]

    def _specs(self, impl: pluggy.HookImpl, owner: Owner, hook: str, kind: type[SpecT]) -> Iterator[SpecT]:
        try:
            result = impl.function()
            if not isinstance(result, Iterable) or isinstance(result, (str, bytes, Mapping)):
                self._report(owner, hook, f"returned {a_type(result)}, not an iterable of {kind.__name__}")
                return
            for position, spec in enumerate(result):
                flaw = f"is {a_type(spec)}, not {kind.__name__}" if not isinstance(spec, kind) else _flaw(spec)
                if flaw:
                    self._report(owner, hook, f"item {position} {flaw}")
                else:
                    yield spec
        except PLUGIN_ERRORS as error:  # a generator raises only here, while it is read
            self._report(owner, hook, f"raised {describe(error)}", error)

    def _notify(self, hook: str, **arguments: object) -> None:
        for impl in self._implementations(hook):
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except PLUGIN_ERRORS as error:
                self._report(self._plugins[impl.plugin_name], hook, f"raised {describe(error)}", error)

    def _report(self, owner: Owner, hook: str | None, message: str, error: BaseException | None = None) -> None:
        problem = PluginProblem(owner.plugin, owner.distribution, owner.version, hook, message, error)
        if problem not in self._problems:
            self._problems.append(problem)


def _entry_points(report: Callable[[Owner, None, str, Exception], None]) -> Iterator[tuple[metadata.EntryPoint, Owner]]:
    """Yield the entry points of the group; a distribution with a damaged list is reported and costs no other one."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            if f"[{PROJECT}]" not in (distribution.read_text("entry_points.txt") or ""):
                continue  # spares the parsing of every other distribution's metadata
            points = list(distribution.entry_points.select(group=PROJECT))
        except Exception as error:
            report(_identity(distribution, None), None, f"its entry points cannot be read: {describe(error)}", error)
            continue
        owners = [_identity(distribution, point.name) for point in points]
        if owners and _normal(owners[0].distribution) not in seen:  # imports find the first on sys.path
            seen.add(_normal(owners[0].distribution))
            yield from zip(points, owners, strict=True)


def _identity(distribution: metadata.Distribution, plugin: str | None) -> Owner:
    """Return whose `plugin` is, as far as the distribution's metadata are there; without one it goes by its own."""
    try:
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
    except Exception:  # which type depends on the version of Python
        name, version = None, None
    name = name or f"unknown distribution in {distribution.locate_file('')}"
    return Owner(plugin or name, name, version or "?")


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _source(target: object) -> Path | None:
    """Return the folder of the outermost package around a module or an object's class, or its file, if any."""
    parts = (target.__name__ if isinstance(target, ModuleType) else type(target).__module__).split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:end]))
        file = getattr(module, "__file__", None)
        if file:  # namespace packages have none
            return Path(file).parent if hasattr(module, "__path__") else Path(file)
    return None


def _unmarked_hooks(target: object) -> list[str]:
    """Return the names of functions that begin as hooks do but carry neither marker."""
    markers = (f"{PROJECT}_impl", f"{PROJECT}_spec")
    members = {name: inspect.getattr_static(target, name) for name in dir(target) if name.startswith(f"{PROJECT}_")}
    return [
        name
        for name, member in members.items()
        if inspect.isroutine(member) and not any(hasattr(member, marker) for marker in markers)
    ]


def _is_wrapper(impl: pluggy.HookImpl) -> bool:
    return impl.wrapper or impl.hookwrapper


def _did_you_mean(name: str) -> str:
    hooks = [hook for hook in vars(hookspec) if hook.startswith(f"{PROJECT}_")]
    close = difflib.get_close_matches(name, hooks, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; hooks are: {', '.join(sorted(hooks))}"


def _flaw(spec: Spec) -> str | None:
    """Return what is wrong with a spec of the right type, or None."""
    if not isinstance(spec.name, str) or not NAME_PATTERN.fullmatch(spec.name):
        return f"has the name {spec.name!r}; use letters, digits, '-', '_' and '.'"
    if isinstance(spec, OpSpec) and spec.domain in ("", "ai.onnx"):
        return f"puts the op '{spec.name}' into ONNX's own domain; use a domain of your own"
    flaw = spec.flaw() if isinstance(spec, OpSpec) else None
    return f"declares the op '{spec.name}' wrongly: {flaw}" if flaw else None
