"""The runner over stand-ins for TensorRT and the device: shapes, profiles, copies, errors, statistics.

What runs on a GPU is in test_device.py (any NVIDIA GPU) and test_backend.py (GPU and full TensorRT).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from optframe.cuda import DriverError
from optframe.details import DetailedRunner
from optframe.errors import InputError, PluginError
from optframe.latency import DeviceRunner
from optframe_trt import flavours
from optframe_trt import runner as module
from optframe_trt.builder import Log
from optframe_trt.engine_file import EngineFacts
from optframe_trt.flavours import KINDS, Flavour
from optframe_trt.layers import Origin
from optframe_trt.registration import NodeError, Registration
from optframe_trt.runner import TensorRTRunner


class Memory:
    """Device memory: address -> array; an engine here doubles its input."""

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray] = {}
        self.live: set[int] = set()
        self.captured: list[Any] = []
        self.refuse_capture = False


MEMORY = Memory()


class Buffer:
    def __init__(self, size: int) -> None:
        self.value = 1000 + len(MEMORY.arrays) + len(MEMORY.live) + size
        while self.value in MEMORY.live:
            self.value += 1
        MEMORY.live.add(self.value)

    def upload(self, array: np.ndarray, stream: Any) -> None:
        MEMORY.arrays[self.value] = array.copy()

    def download(self, array: np.ndarray, stream: Any) -> None:
        array[...] = MEMORY.arrays[self.value].reshape(array.shape)

    def close(self) -> None:
        MEMORY.live.discard(self.value)


class Stream:
    value = 7
    closed = False

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Event:
    count = 0

    def record(self, stream: Any) -> None:
        Event.count += 1
        self.time = Event.count

    def milliseconds_since(self, start: "Event") -> float:
        return float(self.time - start.time)

    def close(self) -> None:
        pass


class Graph:
    def __init__(self, stream: Any, work: Any) -> None:
        if MEMORY.refuse_capture:
            raise DriverError("cuStreamEndCapture failed")
        work()
        self.work = work

    def close(self) -> None:
        pass

    def launch(self, stream: Any) -> None:
        MEMORY.captured.append(stream)
        self.work()


class Context:
    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile_set: list[int] = []
        self.profiler: Any = None
        self.fails = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] != 3  # a shape that the engine has reasons to refuse

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self.profile_set.append(number)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.fails:
            self.engine.log.errors.append("illegal memory access")
            return False
        MEMORY.arrays[self.addresses["y"]] = MEMORY.arrays[self.addresses["x"]] * 2
        if self.profiler is not None:
            self.profiler.report_layer_time("conv", 0.25)
        return True


class Engine:
    """One input x and one output y, both of shape (1 to 4, 5)."""

    num_io_tensors = 2
    num_optimization_profiles = 2
    PROFILES = (((1, 5), (1, 5), (2, 5)), ((1, 5), (2, 5), (4, 5)))

    def __init__(self, log: Log) -> None:
        self.log = log
        self.context = Context(self)

    def get_tensor_name(self, number: int) -> str:
        return "xy"[number]

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "INPUT", "y": "OUTPUT"}[name]

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        return (-1, 5)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="HALF")

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.PROFILES[profile]

    def create_execution_context(self, config: Any = None) -> Context:
        self.config = config
        return self.context

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(read=None, serialize=lambda: b"kernels")
        cache.deserialize = lambda data: setattr(cache, "read", data)
        return SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda c: None, cache=cache)

    def create_engine_inspector(self) -> Any:
        text = '{"Layers": [{"Name": "conv", "Metadata": "[ONNX Layer: c]"}]}'
        return SimpleNamespace(get_engine_information=lambda format: text)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    MEMORY.__init__()  # type: ignore[misc]
    for name, replacement in {"Buffer": Buffer, "Stream": Stream, "Event": Event, "Graph": Graph}.items():
        monkeypatch.setattr(module, name, replacement)
    monkeypatch.setenv("OPTFRAME_CACHE", str(tmp_path))
    yield
    assert not MEMORY.live, "a closed runner has freed everything"


def make(name: str = "tensorrt", registration: Registration | None = None) -> tuple[TensorRTRunner, Engine]:
    version = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 7)}[name]
    trt = SimpleNamespace(
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        IProfiler=type("IProfiler", (), {}),
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
    )
    flavour = Flavour(name, ".".join(map(str, version)), trt, KINDS[name].abilities(version))
    facts = EngineFacts(
        backend=name,
        version=flavour.version,
        precision="fp16",
        targets=("sm89",),
        size=1,
        hashes={"engine": "ab" * 32, "model": ""},
        inputs=(),
        outputs=(),
        profiles=({"x": {"min": [1, 5], "opt": [1, 5], "max": [4, 5]}},),
        origins={"c": Origin("Conv", "backbone.conv")},
    )
    log = Log()
    engine: Any = Engine(log)
    return TensorRTRunner(flavour, engine, registration or Registration(()), facts, "model.engine", log), engine


def feeds(rows: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.arange(rows * 5, dtype=np.float16).reshape(rows, 5)}


def test_it_runs_and_frees_what_it_took() -> None:
    runner, engine = make()
    assert isinstance(runner, DeviceRunner)
    assert isinstance(runner, DetailedRunner)
    with runner:
        np.testing.assert_array_equal(runner.run(feeds())["y"], feeds()["x"] * 2)
        assert runner.run(feeds(4))["y"].dtype == np.float16
    assert engine.context.profile_set == [0, 1]  # the first that holds the shape
    with pytest.raises(RuntimeError, match="is closed"):
        runner.run(feeds())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z": np.zeros((1, 5), np.float16)}, "unknown input 'z'"),
        ({}, "needs input 'x'"),
        ({"x": np.zeros((1, 5), np.float32)}, "is float32, the model takes float16"),
        ({"x": np.zeros((1, 6), np.float16)}, r"has shape \[1, 6\]"),
        ({"x": np.zeros((9, 5), np.float16)}, r"no profile for x \[9, 5\]; it was built for x \[1, 5\] to \[4, 5\]"),
        ({"x": np.zeros((3, 5), np.float16)}, r"cannot have shape \[3, 5\]"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(given: dict[str, np.ndarray], message: str) -> None:
    runner, _ = make()
    with runner, pytest.raises(InputError, match=message):
        runner.run(given)


def test_a_failure_is_told_with_what_tensorrt_said() -> None:
    runner, engine = make()
    engine.context.fails = True
    with runner, pytest.raises(InputError, match=r"model\.engine failed: illegal memory access"):
        runner.run(feeds())


def test_an_exception_of_a_plugin_reaches_the_caller() -> None:
    registration = Registration(())
    runner, _ = make(registration=registration)
    registration.errors.append(NodeError("encoder.norm", "d::LayerNorm", ValueError("bad")))
    with runner, pytest.raises(PluginError, match=r"node 'encoder\.norm' \(d::LayerNorm\): ValueError: bad"):
        runner.run(feeds())


@pytest.mark.parametrize("refuse", [False, True])
def test_binding_captures_a_graph_where_it_can(refuse: bool) -> None:
    MEMORY.refuse_capture = refuse
    runner, engine = make()
    with runner:
        step = runner.bind(feeds())
        MEMORY.arrays[engine.context.addresses["y"]] = np.zeros((2, 5))
        step()
        np.testing.assert_array_equal(MEMORY.arrays[engine.context.addresses["y"]], feeds()["x"] * 2)
    assert bool(MEMORY.captured) is not refuse


def test_details_have_all_parts_and_layers() -> None:
    runner, _ = make()
    with runner:
        told = runner.details(feeds())
    assert {name: series.median for name, series in told.series.items() if name != "enqueue"} == {
        "latency": 3.0,
        "h2d": 1.0,
        "gpu": 1.0,
        "d2h": 1.0,
    }
    (layer,) = told.layers
    assert (layer.name, layer.milliseconds, layer.nodes) == ("conv", 0.25, ("c",))
    assert layer.modules == ("backbone.conv",)
    assert told.layer_information["Layers"]


def test_rtx_keeps_the_kernels_that_it_compiled(tmp_path: Path) -> None:
    for expected in (None, b"kernels"):
        runner, engine = make("tensorrt-rtx")
        with runner:
            assert engine.config.cache.read == expected
    (path,) = tmp_path.rglob("kernels-*.cache")
    assert path.name.startswith("kernels-abababababababab-1.7-")


@pytest.mark.parametrize("version_compatible", [True, False])
def test_host_code_is_allowed_to_version_compatible_engines_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version_compatible: bool
) -> None:
    made = make()[0]
    made.__exit__(None, None, None)
    runtimes: list[Any] = []

    def runtime(logger: Any) -> Any:
        runtimes.append(SimpleNamespace(engine_host_code_allowed=False, deserialize_cuda_engine=lambda data: None))
        return runtimes[-1]

    severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)
    vars(made._flavour.module).update(Runtime=runtime, ILogger=type("ILogger", (), {"Severity": severity}))
    monkeypatch.setattr(flavours, "load", lambda name: made._flavour)
    (tmp_path / "model.engine").write_bytes(b"engine")
    facts = replace(made._facts, settings={"version_compatible": version_compatible}, plugins={})
    with pytest.raises(InputError, match=r"does not take .*model\.engine"):
        TensorRTRunner.load(tmp_path / "model.engine", facts)
    assert [each.engine_host_code_allowed for each in runtimes] == [version_compatible]
