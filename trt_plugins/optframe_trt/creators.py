"""IPluginV3 creators of ops: how TensorRT's parser and runtime find the plugins of an op in the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from optframe.errors import InputError, PluginError
from optframe.types import OpSpec
from optframe_trt import fields, kernels
from optframe_trt.calls import plugin_name
from optframe_trt.flavours import Flavour
from optframe_trt.plugin_v3 import derived, plugin_class
from optframe_trt.registration import Registration, keep_errors

__all__ = ["Registration", "register"]

_creators: dict[tuple[str, str, str, str], Any] = {}
"""Creators by (flavour, name, version, namespace); TensorRT's registry, global too, refers to them but owns none."""


def register(flavour: Flavour, specs: Sequence[OpSpec], targets: Sequence[str | int] = ()) -> Registration:
    """Make the ops known to the flavour's plugin registry, and return what collects their kernels and errors.

    Kernels are compiled when a build asks for them, for the compute capabilities `targets` ("sm89"); engines bring
    their own, so none are needed to run one. Ops registered before are used again, for this registration from now on.

    Raises:
        InputError: an op has no kernel, or a target is none.
        EnvironmentLacks: the flavour's bindings do not work with the NumPy that is installed.
        PluginError: another creator has the name of an op's plugin.
    """
    if specs:
        fields.check_readable(flavour.module)
    registration = Registration(tuple(sorted(map(kernels.capability, targets))))
    for spec in specs:
        kernels.kernel_of(spec)
        _register(flavour, spec, registration)
    return registration


def _register(flavour: Flavour, spec: OpSpec, registration: Registration) -> None:
    trt, name, version = flavour.module, plugin_name(spec), str(spec.version)
    registry = trt.get_plugin_registry()
    key = (flavour.name, name, version, spec.domain)
    ours = _creators.get(key)
    if ours is None:
        # `get_creator` of a name that is not there logs, and crashes where the process's first logger is gone.
        taken = [(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators]
        if (name, version, spec.domain) in taken:
            raise PluginError(
                f"another TensorRT plugin is called {spec.domain}::{name} {version}, as {spec.identifier}"
            )
        ours = _creators[key] = _creator_class(trt)(spec)
        registry.register_creator(ours, spec.domain)
    elif ours.spec != spec:
        ours.become(spec)
    ours.registration = registration


class _Creator:
    """What makes plugins of an op: from the attributes of an ONNX node, or from the fields in an engine."""

    def __init__(self, trt: Any, spec: OpSpec) -> None:
        self.trt = trt
        self.registration = Registration(())
        self.node = ""
        self.name = plugin_name(spec)
        self.plugin_namespace = spec.domain
        self.plugin_version = str(spec.version)
        self._buffers: list[object] = []
        self.become(spec)

    def become(self, spec: OpSpec) -> None:
        """Make plugins of another declaration of the op, which replaces the one before."""
        self.spec = spec
        self.field_names, buffers = fields.declared(self.trt, spec)
        self._buffers.append(buffers)

    def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
        """Return a plugin for the node `name`."""
        self.node = name
        return self._create(name, collection, phase)

    @keep_errors
    def _create(self, name: str, collection: Any, phase: Any) -> Any:
        if phase == self.trt.TensorRTPhase.RUNTIME:
            call = fields.read(self.spec, collection)
            if call.source != kernels.source_hash(self.spec):
                raise InputError("the engine holds another version of the kernel than is installed: build it again")
            self.registration.note(call.node, call.kernels)
        else:
            inputs = fields.present_inputs(self.spec, collection)
            values = fields.attributes(self.spec, collection)
            source = kernels.source_hash(self.spec)
            call = fields.Kept(self.spec.identifier, self.spec.version, name, inputs or (), values, source, ())
        return plugin_class(self.trt)(self.spec, self.registration, call)


@cache
def _creator_class(trt: Any) -> Callable[..., Any]:
    """Return the class of creators over a flavour's interface."""
    return derived("Creator", trt, _Creator, (trt.IPluginCreatorV3One,))
