"""The backend `onnxruntime`: runs an ONNX file in ONNX Runtime, on the CPU or through its CUDA provider.

The engine is the ONNX file itself with a small JSON of settings beside it, and onnxruntime optimises it each time it
is loaded. onnxruntime can write its optimised graph instead, but that file is tied to one version, one provider and
one CPU model, its private ops fail ONNX's checker, and all it saves is a second or two of loading.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from optframe import environment, graph
from optframe.backend import BuildOptions, Engine
from optframe.backends.inputs import ModelInput, check_feeds
from optframe.backends.runner import ClosableRunner
from optframe.backends.settings import load_settings, parse_settings, save_settings
from optframe.errors import EnvironmentLacks, InputError, OptframeError, unknown_name
from optframe.types import Feeds, Outputs, Precision

Array = np.ndarray[Any, Any]

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_COMMAND = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")

QUIET = 4
"""onnxruntime's severity "fatal": it logs errors besides raising them, and they are ours to report."""

MOST_THREADS = 9999
"""No machine has more threads than that; onnxruntime takes what fits 32 bits, and may hang long before."""

REPEATED_NAME = "two nodes with same node name"
"""What onnxruntime says of a graph in which nodes share a name, which ONNX allows."""

NOT_IN_A_GRAPH = "cannot use the graph capture feature"
"""What onnxruntime says of a model some of whose nodes have no CUDA kernel, where a CUDA graph is asked for."""

GRAPH_ID = "gpu_graph_id"
"""The entry of a run's options that tells onnxruntime which captured graph to replay, or to capture."""

NO_GRAPH = -1
MOST_GRAPHS = 16
"""So many sets of input shapes get a CUDA graph of their own; onnxruntime frees none before the session ends."""

QUANTIZED_OP = re.compile(r"(Quantize|Dequantize|DynamicQuantize)Linear|QLinear\w+|\w+Integer")
HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

PLAIN_TYPES = [
    "float16",
    "bfloat16",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "string",
    "double",
]
TENSOR_TYPES = {
    "tensor(float)": ir.DataType.FLOAT,
    **{f"tensor({name})": ir.DataType[name.upper()] for name in PLAIN_TYPES},
}
"""onnxruntime's names of the tensor types that NumPy (with ml_dtypes) can hold -> `ir.DataType`."""


@dataclass(frozen=True)
class SessionSettings:
    """The backend's own options; docs/backends.md describes them to users.

    `threads`: how many compute one op; 0 takes one for each physical core that this process may use. `optimization`:
    what onnxruntime does when it loads the model. `tf32`: whether CUDA may round the factors of FP32 products to TF32;
    false by default, since FP32 is what was asked for. On CUDA alone, `cuda_graph`: whether a run is captured for each
    set of input shapes and replayed; `nhwc`: whether convolutions run with channels last, for which onnxruntime
    transposes between them and other ops.
    """

    threads: int = 0
    optimization: Literal["all", "extended", "basic", "disable"] = "all"
    tf32: bool = False
    cuda_graph: bool = False
    nhwc: bool = False

    CUDA_ALONE: ClassVar[Sequence[str]] = ("cuda_graph", "nhwc")
    LEVELS: ClassVar[Mapping[str, str]] = {
        "all": "ORT_ENABLE_ALL",
        "extended": "ORT_ENABLE_EXTENDED",
        "basic": "ORT_ENABLE_BASIC",
        "disable": "ORT_DISABLE_ALL",
    }

    def __post_init__(self) -> None:
        """Check the number of threads.

        Raises:
            InputError: it is none.
        """
        if not 0 <= self.threads <= MOST_THREADS:
            raise InputError(f"backend onnxruntime: threads is 0 to {MOST_THREADS} (0: one for each core)")

    def check(self, device: str) -> None:
        """See that `device`, "cpu" or "cuda", can honour every setting; TF32 is a permission, which the CPU leaves.

        Raises:
            InputError: it cannot.
        """
        for name in self.CUDA_ALONE:
            if device != "cuda" and getattr(self, name):
                raise InputError(
                    f"backend onnxruntime: {name}=true needs the CUDA provider, and the device is the CPU: "
                    "leave it out, or use --device cuda"
                )


class OnnxRuntimeBackend:
    """Follows `optframe.backend.Backend`. Options: see `SessionSettings`."""

    name = "onnxruntime"
    option_names = frozenset(field.name for field in fields(SessionSettings))

    def missing(self) -> str | None:
        """Return None if onnxruntime is installed, else the command that installs it."""
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed: pip install onnxruntime"
        return None

    def versions(self) -> Mapping[str, str]:
        """Return the version of whichever onnxruntime distributions are installed."""
        return environment.versions(DISTRIBUTIONS)

    def check(self, options: BuildOptions) -> None:
        """Check the settings and the device that `options` ask for.

        Raises:
            InputError: an option or the device is unknown, or the option is not for it.
            EnvironmentLacks: the device or its provider is missing.
        """
        _resolve(options)

    def build(self, model: Path, folder: Path, options: BuildOptions) -> Engine:
        """Prove that onnxruntime takes `model` on the device asked for, then write `folder`/model.onnx and settings.

        Raises:
            InputError: an option is unknown or not for the device, the model is not of `options.precision`, or an op
                has no kernel.
            EnvironmentLacks: the device, its provider or its libraries are missing.
        """
        settings, device = _resolve(options)
        loaded = graph.load(model)
        graph.drop_repeated_names(loaded)
        check_precision(model, loaded, options.precision)
        create_session(model, device, settings)
        engine = Engine(graph.save(loaded, folder / "model.onnx"), self.name, options.precision, device)
        save_settings(settings, engine.path)
        return engine

    def open(self, engine: Engine) -> OnnxRuntimeRunner:
        """Load `engine`, which may be any ONNX file: without settings beside it the defaults hold.

        Raises:
            InputError: the file is missing or no usable model, or its settings are not for its device.
            EnvironmentLacks: its device is missing here.
        """
        device = choose_device(engine.device)
        settings = load_settings(SessionSettings, engine.path)
        settings.check(device)
        session = create_session(engine.path, device, settings)
        if device != "cuda":
            return OnnxRuntimeRunner(session, engine.path.name)
        return (CudaGraphRunner if settings.cuda_graph else CudaRunner)(session, engine.path.name)


def _resolve(options: BuildOptions) -> tuple[SessionSettings, str]:
    """Return the settings and the device, "cpu" or "cuda", that `options` ask for."""
    settings = parse_settings(SessionSettings, OnnxRuntimeBackend.name, options.options)
    device = choose_device(options.device)
    settings.check(device)
    return settings, device


@functools.cache
def _onnxruntime() -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(QUIET)
    return onnxruntime


def choose_device(device: str) -> str:
    """Return "cpu" or "cuda" for `device`, which may be "auto": CUDA where provider and GPU are there.

    Raises:
        InputError: no such device.
        EnvironmentLacks: "cuda" is asked for and missing.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise unknown_name("device", device, ("cpu", "cuda", "auto"))
    if device == "cpu":
        return device
    lacks = _lacks_cuda()
    if lacks and device == "cuda":
        raise EnvironmentLacks(lacks)
    return "cpu" if lacks else "cuda"


def _lacks_cuda() -> str | None:
    if CUDA_PROVIDER not in _onnxruntime().get_available_providers():
        return f"this onnxruntime has no CUDA provider: {CUDA_COMMAND}"
    if not environment.gpus():
        return "no NVIDIA GPU is to be seen (nvidia-smi lists none): mend the driver, or use --device cpu"
    return None


def check_precision(path: Path, model: ir.Model, precision: Precision) -> None:
    """Check that `model` is of `precision`: INT8 has quantising ops, FP16 has 16-bit weights, casts or inputs.

    Raises:
        InputError: it is not.
    """
    if has_precision(model, precision):
        return
    if precision == "int8":
        raise InputError(f"{path} has no QuantizeLinear or DequantizeLinear, so it is not int8: quantise it first")
    raise InputError(f"{path} has no float16 tensors, so it is not fp16: convert it first")


def has_precision(model: ir.Model, precision: Precision) -> bool:
    """Whether something in `model` is of `precision`; FP32 goes with any model."""
    if precision == "int8":
        return any(QUANTIZED_OP.fullmatch(node.op_type) for node in _nodes(model))
    return precision == "fp32" or _has_half(model)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _has_half(model: ir.Model) -> bool:
    values = [*model.graph.inputs, *(value for g in model.graphs() for value in g.initializers.values())]
    if any(value.dtype in HALF_TYPES for value in values):
        return True
    casts = (node.attributes.get("to") for node in _nodes(model) if node.op_type == "Cast")
    return any(to is not None and to.value in HALF_TYPES for to in casts)


def create_session(path: Path, device: str, settings: SessionSettings) -> Any:
    """Return an `onnxruntime.InferenceSession` of the model at `path` on `device` ("cpu" or "cuda").

    Raises:
        InputError: there is no such file, or onnxruntime does not take the model.
        EnvironmentLacks: memory or CUDA's libraries do not suffice.
    """
    ort = _onnxruntime()
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    options = ort.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = settings.threads or environment.usable_cores()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, settings.LEVELS[settings.optimization])
    try:
        session = ort.InferenceSession(str(path), options, providers=_providers(device, settings))
    except Exception as error:  # onnxruntime's exceptions have no common base
        if REPEATED_NAME in str(error):
            return _session_without_names(path, device, settings)
        raise _load_error(path, device, error) from error
    if device == "cuda" and CUDA_PROVIDER not in session.get_providers():
        raise EnvironmentLacks(f"onnxruntime's CUDA provider did not start, its libraries are missing: {CUDA_COMMAND}")
    return session


def _session_without_names(path: Path, device: str, settings: SessionSettings) -> Any:
    """Return a session of a copy of the model at `path` in which no two nodes share a name."""
    model = graph.load(path)
    graph.drop_repeated_names(model)
    with tempfile.TemporaryDirectory(prefix="optframe-") as folder:
        return create_session(graph.save(model, Path(folder) / path.name), device, settings)


def _providers(device: str, settings: SessionSettings) -> list[Any]:
    if device == "cpu":
        return [CPU_PROVIDER]
    ort = _onnxruntime()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, and the session says it too
        ort.preload_dlls()
    options = {
        "use_tf32": int(settings.tf32),
        "enable_cuda_graph": int(settings.cuda_graph),
        "prefer_nhwc": int(settings.nhwc),
    }
    return [(CUDA_PROVIDER, options), CPU_PROVIDER]


def _message(error: Exception) -> str:
    """Return onnxruntime's message as one line, without codes, the model's path and source lines."""
    text = " ".join(str(error).split())
    noise = r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .+? failed: ?|/\S+\.(?:cc|h):\d+ "
    return re.sub(noise, "", text)[:400]


def _load_error(path: Path, device: str, error: Exception) -> OptframeError:
    text = _message(error)
    no_kernel = re.search(r"Could not find an implementation for (\w+)\(\d+\) node with name '([^']*)'", text)
    unregistered = re.search(r"([\w.]*):(\w+)\(-?\d+\) is not a registered function/op", text)
    provider = "CUDA or CPU" if device == "cuda" else "CPU"
    if NOT_IN_A_GRAPH in text:
        return InputError(
            f"{path}: cuda_graph=true needs a CUDA kernel for every node, which onnxruntime does not have"
        )
    if no_kernel:
        op, node = no_kernel.groups()
        return InputError(
            f"{path}: onnxruntime's {provider} provider has no kernel for the types of op {op} "
            f"(node '{node or 'without a name'}'): choose another precision or pipeline"
        )
    if unregistered:
        domain, op = unregistered.groups()
        return InputError(
            f"{path}: onnxruntime does not know op {domain}::{op} (node '{_first_node(path, op)}'): "
            "choose a pipeline that keeps to standard ops"
        )
    return _out_of_memory(path, text) or InputError(f"{path}: onnxruntime does not take this model: {text}")


def _first_node(path: Path, op_type: str) -> str:
    nodes = _nodes(graph.load(path))
    return next((node.name or "without a name" for node in nodes if node.op_type == op_type), "unknown")


def _out_of_memory(path: Path, text: str) -> EnvironmentLacks | None:
    if re.search(r"[Ff]ailed to allocate|bad_?alloc|bad allocation|out of memory", text):
        return EnvironmentLacks(f"{path}: not enough memory ({text})")
    return None


def _tensor_type(kind: str, what: str) -> ir.DataType:
    if kind not in TENSOR_TYPES:
        raise InputError(f"the model's {what} is a {kind}; only tensors of plain types can be run")
    return TENSOR_TYPES[kind]


class OnnxRuntimeRunner(ClosableRunner[Any]):
    """Runs a session on NumPy arrays in host memory. Follows `optframe.backend.Runner`."""

    def __init__(self, session: Any, label: str) -> None:
        super().__init__(session)
        self._label = label
        self._inputs = [
            ModelInput(value.name, _tensor_type(value.type, f"input '{value.name}'"), tuple(value.shape) or None)
            for value in session.get_inputs()
        ]
        self._outputs: Sequence[str] = [value.name for value in session.get_outputs()]
        output_types = {_tensor_type(value.type, f"output '{value.name}'") for value in session.get_outputs()}
        self._types = output_types | {value.data_type for value in self._inputs}

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference and return all outputs by name.

        Raises:
            InputError: names, dtypes or shapes of `feeds` are not those of the model, or an op fails on them.
            EnvironmentLacks: memory does not suffice.
        """
        session, arrays = self.loaded, self._check(feeds)
        try:
            outputs = self._execute(session, arrays)
        except Exception as error:  # onnxruntime's exceptions have no common base
            text = _message(error)
            raise _out_of_memory(Path(self._label), text) or InputError(f"{self._label} failed: {text}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def _execute(self, session: Any, arrays: Mapping[str, Array]) -> Sequence[Array]:
        """Run on plain arrays; bfloat16 needs OrtValues, which in turn cannot hold text."""
        if ir.DataType.BFLOAT16 not in self._types:
            outputs: Sequence[Array] = session.run(self._outputs, arrays)
            return outputs
        values = session.run_with_ort_values(self._outputs, {name: _to_ort(a) for name, a in arrays.items()})
        return [_to_numpy(value) for value in values]

    def _check(self, feeds: Feeds) -> dict[str, Array]:
        """A session tells a shape of no dimensions for a scalar and for an unknown rank: then the model decides."""
        return check_feeds(feeds, self._inputs, self._label)


class BoundRun:
    """A run on buffers that stay on the device; with a graph's id, on outputs at fixed addresses as well."""

    def __init__(self, session: Any, arrays: Mapping[str, Array], outputs: Sequence[str], device: str) -> None:
        self._session = session
        self._options: Any = None
        self._binding = session.io_binding()
        self._inputs = {name: _to_ort(array, device) for name, array in arrays.items()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in outputs:
            self._binding.bind_output(name, device)
        self._names = outputs
        self._binding.synchronize_inputs()

    def __call__(self) -> None:
        """Run and wait for the device."""
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()

    def capture(self, graph_id: int) -> None:
        """Run once as it is, which tells what the outputs are, then fix their addresses: later runs are graph's."""
        self._options = _run_options(NO_GRAPH)
        self()
        self._kept = self._binding.get_outputs()
        for name, value in zip(self._names, self._kept, strict=True):
            self._binding.bind_ortvalue_output(name, value)
        self._options = _run_options(graph_id)

    def load(self, arrays: Mapping[str, Array]) -> None:
        """Copy `arrays`, of the same shapes, into the input buffers."""
        for name, array in arrays.items():
            self._inputs[name].update_inplace(array)

    def fetch(self) -> list[Array]:
        """Return the outputs of the last run in host memory."""
        outputs: list[Array] = self._binding.copy_outputs_to_cpu()
        return outputs


class CudaRunner(OnnxRuntimeRunner):
    """Runs a session on CUDA; `bind` keeps inputs and outputs on the GPU. Follows `optframe.latency.DeviceRunner`."""

    device: ClassVar[str] = "cuda"

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy `feeds` to the GPU and return a function that runs on them and waits for the GPU.

        Raises:
            InputError: names, dtypes or shapes of `feeds` are not those of the model.
        """
        return BoundRun(self.loaded, self._check(feeds), self._outputs, self.device)


class CudaGraphRunner(CudaRunner):
    """Runs a session whose provider captures CUDA graphs, one for each set of input shapes up to `MOST_GRAPHS`."""

    def __init__(self, session: Any, label: str) -> None:
        super().__init__(session, label)
        self._graphs: dict[tuple[tuple[int, ...], ...], BoundRun] = {}
        if ir.DataType.BFLOAT16 in self._types:
            raise InputError(f"{label}: onnxruntime binds no bfloat16 arrays: cuda_graph=true needs other inputs")

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy `feeds` to the GPU and return a function that replays their graph and waits for the GPU.

        The buffers are those of `run` on the same shapes, which writes its own inputs into them.
        """
        return self._graph(self.loaded, self._check(feeds))

    def _execute(self, session: Any, arrays: Mapping[str, Array]) -> Sequence[Array]:
        graph = self._graph(session, arrays)
        graph()
        return graph.fetch()

    def _graph(self, session: Any, arrays: Mapping[str, Array]) -> BoundRun:
        shapes = tuple(array.shape for array in arrays.values())
        if shapes in self._graphs:
            self._graphs[shapes].load(arrays)
            return self._graphs[shapes]
        graph = BoundRun(session, arrays, self._outputs, self.device)
        if len(self._graphs) < MOST_GRAPHS:
            graph.capture(len(self._graphs))
            self._graphs[shapes] = graph
        else:
            graph.capture(NO_GRAPH)
        return graph

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graphs.clear()
        super().__exit__(kind, error, trace)


def _run_options(graph_id: int) -> Any:
    options = _onnxruntime().RunOptions()
    options.log_severity_level = QUIET
    options.add_run_config_entry(GRAPH_ID, str(graph_id))
    return options


def _to_ort(array: Array, device: str = "cpu") -> Any:
    """Return `array` as an OrtValue; bfloat16, which onnxruntime takes from NumPy only as bits, stays on the host."""
    ort_value = _onnxruntime().OrtValue
    if array.dtype == ir.DataType.BFLOAT16.numpy():
        bits = ir.DataType.BFLOAT16.value
        return ort_value.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), bits)
    return ort_value.ortvalue_from_numpy(array, device)


def _to_numpy(value: Any) -> Array:
    """Return an OrtValue in host memory as an array; bfloat16, which onnxruntime does not convert, bit by bit."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    import ctypes

    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    bits = ctypes.string_at(value.data_ptr(), 2 * count) if count else b""
    return np.frombuffer(bits, dtype=ir.DataType.BFLOAT16.numpy()).reshape(shape).copy()
