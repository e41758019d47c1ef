"""Runs an engine: device buffers, shapes and profiles, a CUDA graph, statistics and layer times."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from optframe import details, files, store
from optframe.backends.inputs import ModelInput, check_feeds
from optframe.backends.runner import ClosableRunner
from optframe.cuda import DriverError
from optframe.details import EngineDetails
from optframe.errors import EnvironmentLacks, InputError, PluginError
from optframe.registry import default_registry
from optframe.types import Feeds, OpSpec, Outputs
from optframe_trt import creators, flavours
from optframe_trt.builder import Log, dtype_name, make_logger
from optframe_trt.device import Buffer, Event, Graph, Stream
from optframe_trt.engine_file import EngineFacts
from optframe_trt.flavours import Flavour
from optframe_trt.layers import describe_times, engine_layers
from optframe_trt.registration import Registration
from optframe_trt.settings import present_target

if TYPE_CHECKING:
    import tensorrt as trt

Array = np.ndarray[Any, Any]

WARM_UP_RUNS = 5
TIMED_RUNS = 100
PROFILED_RUNS = 20


@dataclass
class _Bound:
    """Inputs and outputs of one set of shapes, on the host and on the device."""

    inputs: Mapping[str, tuple[Array, Buffer]]
    outputs: Mapping[str, tuple[Array, Buffer]]

    def close(self) -> None:
        for _, buffer in (*self.inputs.values(), *self.outputs.values()):
            buffer.close()


class TensorRTRunner(ClosableRunner["trt.IExecutionContext"]):
    """Runs a deserialised engine. Follows `optframe.backend.Runner`, `DeviceRunner` and `DetailedRunner`.

    Not for several threads at once: a context runs one inference at a time.
    """

    device: ClassVar[str] = "cuda"

    def __init__(
        self,
        flavour: Flavour,
        engine: trt.ICudaEngine,
        registration: Registration,
        facts: EngineFacts,
        label: str,
        log: Log,
        keep_alive: Sequence[object] = (),
    ) -> None:
        self._flavour, self._engine, self._registration = flavour, engine, registration
        self._facts, self._label, self._log = facts, label, log
        self._keep_alive = (log, *keep_alive)
        self._names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self._inputs = [self._model_input(name) for name in self._names if self._is_input(name)]
        self._outputs = [name for name in self._names if not self._is_input(name)]
        self._stream = Stream()
        self._held: list[_Bound | Graph] = []
        self._cache: Any = None
        super().__init__(self._make_context())

    @classmethod
    def load(cls, path: Path, facts: EngineFacts) -> Self:
        """Load the engine at `path`, whose `facts` have been checked.

        Raises:
            InputError: TensorRT does not take the file, or a plugin in it is of another version than is installed.
            EnvironmentLacks: the flavour, or memory on the GPU, is missing.
        """
        flavour, log = flavours.load(facts.backend), Log()
        registration = creators.register(flavour, plugin_ops(path, facts, default_registry().ops()))
        logger = make_logger(flavour, log)
        runtime: trt.Runtime = flavour.module.Runtime(logger)
        if facts.settings.get("version_compatible"):
            runtime.engine_host_code_allowed = True  # such an engine brings a lean runtime along
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        registration.raise_errors()
        if engine is None:
            raise InputError(f"{facts.backend} {flavour.version} does not take {path}: {_last(log)}")
        return cls(flavour, engine, registration, facts, path.name, log, (runtime, logger))

    def _is_input(self, name: str) -> bool:
        inputs: bool = self._engine.get_tensor_mode(name) == self._flavour.module.TensorIOMode.INPUT
        return inputs

    def _model_input(self, name: str) -> ModelInput:
        shape = tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return ModelInput(name, _data_type(self._engine.get_tensor_dtype(name)), shape)

    def _make_context(self) -> trt.IExecutionContext:
        """Return a context. TensorRT-RTX compiles kernels for it, and its cache keeps them for the next process."""
        engine: Any = self._engine
        if self._flavour.can.runtime_cache:
            runtime_config = engine.create_runtime_config()
            self._cache = runtime_config.create_runtime_cache()
            path = self._cache_path()
            if path.is_file():
                self._cache.deserialize(path.read_bytes())  # a cache that does not fit is left out
            runtime_config.set_runtime_cache(self._cache)
            context = engine.create_execution_context(runtime_config)
        else:
            context = engine.create_execution_context()
        self._registration.raise_errors()
        if context is None:
            raise EnvironmentLacks(f"{self._label}: no execution context: {_last(self._log)}")
        made: trt.IExecutionContext = context
        return made

    def _cache_path(self) -> Path:
        name = f"kernels-{self._facts.hashes['engine'][:16]}-{self._flavour.version}-{present_target()}.cache"
        return store.default_root() / self._flavour.name / name

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference and return all outputs by name.

        Raises:
            InputError: names, dtypes or shapes of `feeds` are not those of the engine, or no profile holds them.
            PluginError: a plugin failed.
            EnvironmentLacks: memory on the GPU does not suffice.
        """
        bound = self._bind(feeds)
        try:
            self._upload(bound)
            self._execute()
            self._download(bound)
            self._stream.synchronize()
            return {name: array for name, (array, _) in bound.outputs.items()}
        finally:
            self._stream.synchronize()
            bound.close()

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy `feeds` to the GPU and return a function that runs on them, as a CUDA graph where one can be captured.

        Its memory is held until the runner is closed.

        Raises:
            InputError, PluginError, EnvironmentLacks: see `run`.
        """
        bound = self._bind(feeds)
        self._held.append(bound)
        self._upload(bound)
        self._execute()  # kernels are loaded, and memory is allocated, before anything is captured
        self._stream.synchronize()
        launch = self._captured() or self._execute

        def step() -> None:
            launch()
            self._stream.synchronize()

        return step

    def _captured(self) -> Callable[[], None] | None:
        """Return what launches one inference as a CUDA graph, or None where the engine cannot be captured."""
        try:
            graph = Graph(self._stream, self._execute)
        except (DriverError, InputError):  # loops, conditions, or a plugin that synchronises
            self._stream.synchronize()
            return None
        self._held.append(graph)
        return lambda: graph.launch(self._stream)

    def _bind(self, feeds: Feeds) -> _Bound:
        """Choose a profile, set shapes, and give every input and output memory."""
        arrays = check_feeds(feeds, self._inputs, self._label)
        context = self.loaded
        self._choose_profile(arrays)
        for name, array in arrays.items():
            if not context.set_input_shape(name, array.shape):
                raise InputError(
                    f"{self._label}: input '{name}' cannot have shape {list(array.shape)}: {_last(self._log)}"
                )
        unresolved = context.infer_shapes()
        if unresolved:
            raise InputError(f"{self._label}: shapes of {', '.join(unresolved)} depend on data, which is not supported")
        inputs = {name: (array, Buffer(array.nbytes)) for name, array in arrays.items()}
        outputs = {}
        for name in self._outputs:
            kind = _data_type(self._engine.get_tensor_dtype(name)).numpy()
            array = np.empty(tuple(context.get_tensor_shape(name)), kind)
            outputs[name] = (array, Buffer(array.nbytes))
        for name, (_, buffer) in {**inputs, **outputs}.items():
            context.set_tensor_address(name, buffer.value)
        return _Bound(inputs, outputs)

    def _choose_profile(self, arrays: Mapping[str, Array]) -> None:
        """Make the first profile active that holds all shapes."""
        if not any(None in (value.shape or ()) for value in self._inputs):
            return
        for number in range(self._engine.num_optimization_profiles):
            if all(self._holds(number, name, array.shape) for name, array in arrays.items()):
                self.loaded.set_optimization_profile_async(number, self._stream.value)
                self._stream.synchronize()
                return
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(f"{self._label} has no profile for {shapes}; it was built for {self._ranges()}")

    def _holds(self, profile: int, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def _ranges(self) -> str:
        return "; ".join(
            ", ".join(f"{name} {list(shapes['min'])} to {list(shapes['max'])}" for name, shapes in ranges.items())
            for ranges in self._facts.profiles
        )

    def _upload(self, bound: _Bound) -> None:
        for array, buffer in bound.inputs.values():
            buffer.upload(array, self._stream)

    def _download(self, bound: _Bound) -> None:
        for array, buffer in bound.outputs.values():
            buffer.download(array, self._stream)

    def _execute(self) -> None:
        done = self.loaded.execute_async_v3(self._stream.value)
        self._registration.raise_errors()
        if not done:
            raise InputError(f"{self._label} failed: {_last(self._log)}")

    def details(self, feeds: Feeds) -> EngineDetails:
        """Time copies, host and GPU separately over some runs, then each layer.

        Raises:
            InputError, PluginError, EnvironmentLacks: see `run`.
        """
        bound = self._bind(feeds)
        try:
            for _ in range(WARM_UP_RUNS):
                self._timed(bound)
            start = time.perf_counter()
            samples = [self._timed(bound) for _ in range(TIMED_RUNS)]
            seconds = time.perf_counter() - start
            found = details.summarize({name: [sample[name] for sample in samples] for name in samples[0]}, seconds)
            information = self._information()
            layers = describe_times(self._layer_times(), engine_layers(information), self._facts.origins)
            return replace(found, layers=tuple(layers), layer_information=information)
        finally:
            self._stream.synchronize()
            bound.close()

    def _timed(self, bound: _Bound) -> dict[str, float]:
        """Run once and return the milliseconds of its parts."""
        events = [Event() for _ in range(4)]
        events[0].record(self._stream)
        self._upload(bound)
        events[1].record(self._stream)
        begun = time.perf_counter()
        self._execute()
        enqueue = 1e3 * (time.perf_counter() - begun)
        events[2].record(self._stream)
        self._download(bound)
        events[3].record(self._stream)
        self._stream.synchronize()
        parts = [after.milliseconds_since(before) for before, after in pairwise(events)]
        for event in events:
            event.close()
        return {"enqueue": enqueue, "h2d": parts[0], "gpu": parts[1], "d2h": parts[2]}

    def _layer_times(self) -> dict[str, float]:
        """Return layer name -> mean milliseconds over some runs, through a profiler, which stays with the context."""
        context = self.loaded
        profiler = _make_profiler(self._flavour)
        context.profiler = profiler
        context.enqueue_emits_profile = True
        for _ in range(PROFILED_RUNS):
            self._execute()
            self._stream.synchronize()
        times: dict[str, float] = profiler.times
        return {name: total / PROFILED_RUNS for name, total in times.items()}

    def _information(self) -> dict[str, Any]:
        """Return what TensorRT's inspector tells of the engine's layers."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self.loaded
        told: dict[str, Any] = json.loads(
            inspector.get_engine_information(self._flavour.module.LayerInformationFormat.JSON)
        )
        return told

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is None:
            return
        self._stream.synchronize()
        for held in self._held:
            held.close()
        if self._cache is not None:
            files.write_bytes(self._cache_path(), bytes(self._cache.serialize()))
        super().__exit__(kind, error, trace)
        self._stream.close()


def plugin_ops(path: Path, facts: EngineFacts, known: Mapping[str, OpSpec]) -> list[OpSpec]:
    """Return the ops of ours that the engine calls.

    Raises:
        PluginError: one is not installed, or in another version.
    """
    for identifier, version in facts.plugins.items():
        if identifier not in known:
            raise PluginError(f"{path} needs the plugin op {identifier}: install the package that registers it")
        if known[identifier].version != version:
            installed = known[identifier].version
            raise PluginError(
                f"{path} needs version {version} of {identifier}, {installed} is installed: build it again"
            )
    return [known[identifier] for identifier in facts.plugins]


def _make_profiler(flavour: Flavour) -> Any:
    """Return an `IProfiler` whose `times` add up the milliseconds of each layer."""
    base: Any = flavour.module.IProfiler

    class Profiler(base):  # type: ignore[misc]  # the base is known only once a flavour is loaded
        def __init__(self) -> None:
            base.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    return Profiler()


def _data_type(dtype: trt.DataType) -> ir.DataType:
    name = dtype_name(dtype)
    return ir.DataType.FLOAT if name == "float32" else ir.DataType[name.upper()]


def _last(log: Log) -> str:
    return " ".join((log.errors or ["TensorRT does not say why"])[-1].split())[:400]
