"""The backend onnxruntime on small hand-built graphs: what it runs, refuses, and says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from optframe import environment
from optframe.backend import BuildOptions, Engine
from optframe.backends import onnxruntime as backend_module
from optframe.backends import settings
from optframe.backends.onnxruntime import CudaGraphRunner, CudaRunner, OnnxRuntimeBackend, SessionSettings
from optframe.errors import EnvironmentLacks, InputError
from optframe.latency import measure

ADD = "float[N, 3] x, float[N, 3] w) => (float[N, 3] y) { y = Add(x, w) }"
FLOAT_IDENTITY = "{kind}[2] x) => ({kind}[2] y) {{ y = Identity(x) }}"
QUANTIZED = """float[4] x) => (float[4] y) <float scale = {0.5}, int8 zero = {0}> {
    q = QuantizeLinear(x, scale, zero)
    y = DequantizeLinear(q, scale, zero)
}"""


def write(folder: Path, body: str, opset: int = 17, name: str = "model.onnx") -> Path:
    text = f'<ir_version: 8, opset_import: ["": {opset}, "com.example": 1]> g ({body}'
    path = folder / name
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def backend() -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend()


def opened(path: Path) -> Any:
    return OnnxRuntimeBackend().open(Engine(path, "onnxruntime", "fp32", "cpu"))


def test_build_then_run(tmp_path: Path, backend: OnnxRuntimeBackend, rng: np.random.Generator) -> None:
    engine = backend.build(write(tmp_path, ADD), tmp_path / "engine", BuildOptions(device="cpu"))
    assert engine == Engine(tmp_path / "engine" / "model.onnx", "onnxruntime", "fp32", "cpu")
    x, w = rng.standard_normal((2, 5, 3)).astype(np.float32)
    with backend.open(engine) as runner:
        outputs = runner.run({"w": w, "x": x})
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], x + w)


def test_the_engine_is_the_portable_model_and_needs_nothing_of_the_original(
    tmp_path: Path, backend: OnnxRuntimeBackend
) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [512])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [512])],
            [onnx.numpy_helper.from_array(np.arange(512, dtype=np.float32), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    (tmp_path / "source").mkdir()
    source = tmp_path / "source" / "model.onnx"
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    engine = backend.build(source, tmp_path / "engine", BuildOptions(device="cpu"))
    for file in source.parent.iterdir():
        file.unlink()
    onnx.checker.check_model(onnx.load(engine.path), full_check=True)
    with backend.open(engine) as runner:
        y = runner.run({"x": np.ones(512, np.float32)})["y"]
    np.testing.assert_array_equal(y, np.arange(512) + 1)


def test_settings_travel_with_the_engine(
    tmp_path: Path, backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"threads": "1", "optimization": "basic"}
    engine = backend.build(write(tmp_path, ADD), tmp_path / "engine", BuildOptions(device="cpu", options=options))
    seen: list[SessionSettings] = []
    create = backend_module.create_session
    monkeypatch.setattr(backend_module, "create_session", lambda *args: seen.append(args[2]) or create(*args))
    backend.open(engine)
    assert seen == [SessionSettings(threads=1, optimization="basic")]
    beside = engine.path.with_name("model.onnx.json")
    written = json.loads(beside.read_text())
    for damage in ({"threads": "1"}, {"threads": -1}, {"optimization": "extnded"}, {"nhwc": 0}):
        beside.write_text(json.dumps({**written, **damage}))
        with pytest.raises(InputError, match="is damaged; build the engine again"):
            backend.open(engine)


def test_sessions_use_the_cores_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: 7)
    path = write(tmp_path, ADD)
    threads = [
        backend_module.create_session(path, "cpu", settings).get_session_options().intra_op_num_threads
        for settings in (SessionSettings(), SessionSettings(threads=3))
    ]
    assert threads == [7, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": "2"}, "unknown option of backend onnxruntime 'thread': did you mean 'threads'"),
        ({"threads": "many"}, "backend onnxruntime: threads wants an integer, not 'many'"),
        ({"threads": "-1"}, "threads is 0 to 9999"),
        ({"threads": "9" * 20}, "threads is 0 to 9999"),
        ({"tf32": "yes"}, "tf32 wants true or false, not 'yes'"),
        ({"optimization": "extnded"}, "optimization wants one of all, extended, basic, disable, not 'extnded'"),
        ({"LEVELS": "all"}, "unknown option of backend onnxruntime 'LEVELS'"),
    ],
)
def test_options_are_refused_by_name(
    options: dict[str, str], message: str, tmp_path: Path, backend: OnnxRuntimeBackend
) -> None:
    with pytest.raises(InputError, match=message):
        backend.build(write(tmp_path, ADD), tmp_path / "engine", BuildOptions(options=options))
    assert not (tmp_path / "engine").exists()


def test_options_and_device_are_checked_before_there_is_a_model(backend: OnnxRuntimeBackend) -> None:
    backend.check(BuildOptions(options={"threads": "2"}))
    with pytest.raises(InputError, match="did you mean 'threads'"):
        backend.check(BuildOptions(options={"thread": "2"}))
    with pytest.raises(InputError, match="did you mean 'cpu'"):
        backend.check(BuildOptions(device="gpu"))


@pytest.mark.parametrize("option", ["cuda_graph", "nhwc"])
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_what_cuda_alone_can_do_is_refused_on_the_cpu(
    option: str, device: str, tmp_path: Path, backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ())
    monkeypatch.setattr(backend_module, "create_session", lambda *arguments: pytest.fail("a session was made"))
    options = BuildOptions(device=device, options={option: "true"})
    engine = Engine(write(tmp_path, ADD), "onnxruntime", "fp32", device)
    settings.save_settings(SessionSettings(**{option: True}), engine.path)  # as one that was built on a GPU
    for refused in (
        lambda: backend.check(options),
        lambda: backend.build(engine.path, tmp_path / "engine", options),
        lambda: backend.open(engine),
    ):
        with pytest.raises(InputError, match=f"{option}=true needs the CUDA provider, and the device is the CPU"):
            refused()
    assert not (tmp_path / "engine").exists()
    backend.check(BuildOptions(device=device, options={option: "false", "tf32": "true"}))


def test_nodes_of_the_same_name_are_no_obstacle(tmp_path: Path, backend: OnnxRuntimeBackend) -> None:
    path = write(tmp_path, "float[2] x) => (float[2] y) { a = Relu(x) y = Neg(a) }")
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = "same"
    onnx.save(model, path)
    engine = backend.build(path, tmp_path / "engine", BuildOptions(device="cpu"))
    assert [node.name for node in onnx.load(engine.path).graph.node] == ["same", ""]
    for each in (path, engine.path):
        with opened(each) as runner:
            np.testing.assert_array_equal(runner.run({"x": np.array([-1, 2], np.float32)})["y"], [0, -2])


def test_a_precision_that_the_graph_is_not_in_is_refused(tmp_path: Path, backend: OnnxRuntimeBackend) -> None:
    path = write(tmp_path, ADD)
    with pytest.raises(InputError, match="has no QuantizeLinear or DequantizeLinear, so it is not int8"):
        backend.build(path, tmp_path / "engine", BuildOptions("int8"))
    with pytest.raises(InputError, match="has no float16 tensors, so it is not fp16"):
        backend.build(path, tmp_path / "engine", BuildOptions("fp16"))
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    "body",
    [
        "float16[2] x) => (float16[2] y) { y = Relu(x) }",
        "float[2] x) => (float[2] y) { h = Cast<to = 10>(x) r = Relu(h) y = Cast<to = 1>(r) }",
        "float[2] x) => (float[2] y) <float16[2] w = {1, 2}> { h = CastLike(x, w) r = Add(h, w) y = CastLike(r, x) }",
    ],
)
def test_float16_inputs_casts_and_weights_make_a_graph_fp16(
    body: str, tmp_path: Path, backend: OnnxRuntimeBackend
) -> None:
    engine = backend.build(write(tmp_path, body), tmp_path / "engine", BuildOptions("fp16", "cpu"))
    assert engine.precision == "fp16"


def test_an_int8_graph_runs(tmp_path: Path, backend: OnnxRuntimeBackend) -> None:
    engine = backend.build(write(tmp_path, QUANTIZED), tmp_path / "engine", BuildOptions("int8", "cpu"))
    with backend.open(engine) as runner:
        y = runner.run({"x": np.array([0.2, 0.3, -9.9, 100], np.float32)})["y"]
    np.testing.assert_array_equal(y, [0.0, 0.5, -10.0, 63.5])  # steps of 0.5, at most 127 of them


def test_quantising_ops_inside_a_function_count(tmp_path: Path, backend: OnnxRuntimeBackend) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "com.example": 1]>
    g (float[4] x) => (float[4] y) { y = com.example.Round(x) }
    <domain: "com.example", opset_import: ["": 17]>
    Round (x) => (y) { s = Constant<value_float = 0.5>() z = Constant<value = int8 {0}>()
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    engine = backend.build(tmp_path / "model.onnx", tmp_path / "engine", BuildOptions("int8", "cpu"))
    with backend.open(engine) as runner:
        np.testing.assert_array_equal(runner.run({"x": np.full(4, 0.7, np.float32)})["y"], np.full(4, 0.5))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.zeros((2, 3), np.float32)}, "needs input 'w' (it takes x, w)"),
        ({"x": np.zeros(1), "w": np.zeros(1), "v": np.zeros(1)}, "unknown input 'v': "),
        (
            {"x": np.zeros((2, 3)), "w": np.zeros((2, 3), np.float32)},
            "input 'x' is float64, the model takes float32",
        ),
        (
            {"x": np.zeros((2, 4), np.float32), "w": np.zeros((2, 3), np.float32)},
            "input 'x' has shape [2, 4], the model takes [N, 3]",
        ),
        (
            {"x": np.zeros(3, np.float32), "w": np.zeros((2, 3), np.float32)},
            "input 'x' has shape [3], the model takes [N, 3]",
        ),
        (
            {"x": np.zeros((2, 3), np.float32), "w": np.zeros((4, 3), np.float32)},
            "input 'w' has shape [4, 3], the model takes [N, 3] with N = 2",
        ),
    ],
)
def test_feeds_that_do_not_fit_are_one_clear_line(
    feeds: dict[str, np.ndarray[Any, Any]], message: str, tmp_path: Path
) -> None:
    with opened(write(tmp_path, ADD)) as runner, pytest.raises(InputError) as caught:
        runner.run(feeds)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strided_big_endian_and_scalar_arrays(tmp_path: Path) -> None:
    with opened(write(tmp_path, ADD)) as runner:
        strided = np.arange(6, dtype=np.float32).reshape(3, 2).T
        np.testing.assert_array_equal(runner.run({"x": strided, "w": strided})["y"], 2 * strided)
        with pytest.raises(InputError, match="'x' is >f4"):
            runner.run({"x": strided.astype(">f4"), "w": strided})
    with opened(write(tmp_path, "float x) => (float y) { y = Neg(x) }")) as runner:
        y = runner.run({"x": np.float32(3)})["y"]  # a NumPy scalar is no array yet
        assert (y.shape, float(y)) == ((), -3.0)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("double", np.float64),
        ("int8", np.int8),
        ("uint64", np.uint64),
        ("bool", np.bool_),
    ],
)
def test_all_plain_types_go_in_and_out_unchanged(kind: str, dtype: type, tmp_path: Path) -> None:
    x = np.array([0, 1.5]).astype(dtype)
    with opened(write(tmp_path, FLOAT_IDENTITY.format(kind=kind))) as runner:
        y = runner.run({"x": x})["y"]
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x)


def test_bfloat16_scalars_and_empty_arrays(tmp_path: Path) -> None:
    with opened(write(tmp_path, "bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }")) as runner:
        assert runner.run({"x": np.zeros(0, ml_dtypes.bfloat16)})["y"].shape == (0,)
    with opened(write(tmp_path, "bfloat16 x) => (bfloat16 y) { y = Identity(x) }")) as runner:
        assert float(runner.run({"x": np.array(2.5, ml_dtypes.bfloat16)})["y"]) == 2.5


def test_text_goes_in_and_out(tmp_path: Path) -> None:
    with opened(write(tmp_path, "string[N] x) => (string[N] y) { y = Identity(x) }")) as runner:
        assert runner.run({"x": np.array(["cat", "größe"])})["y"].tolist() == ["cat", "größe"]
        with pytest.raises(InputError, match="'x' is float64, the model takes text"):
            runner.run({"x": np.zeros(2)})


def test_inputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "seq(float[2]) x) => (seq(float[2]) y) { y = Identity(x) }")
    with pytest.raises(InputError, match=r"input 'x' is a seq\(tensor\(float\)\); only tensors"):
        opened(path)


def test_an_op_without_a_kernel_is_named_with_its_node(tmp_path: Path, backend: OnnxRuntimeBackend) -> None:
    path = write(tmp_path, "double[2] x) => (double[2] y) { [middle] y = Selu(x) }")
    with pytest.raises(InputError, match=r"no kernel for the types of op Selu \(node 'middle'\)"):
        backend.build(path, tmp_path / "engine", BuildOptions(device="cpu"))
    assert not (tmp_path / "engine").exists()


def test_an_op_that_nobody_knows_is_named_with_its_node(tmp_path: Path, backend: OnnxRuntimeBackend) -> None:
    path = write(tmp_path, "float[2] x) => (float[2] y) { [odd] y = com.example.Odd(x) }")
    with pytest.raises(InputError, match=r"does not know op com.example::Odd \(node 'odd'\)"):
        backend.build(path, tmp_path / "engine", BuildOptions(device="cpu"))


def test_no_model_and_no_file(tmp_path: Path, backend: OnnxRuntimeBackend) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    with pytest.raises(InputError, match=r"text.onnx"):
        backend.build(tmp_path / "text.onnx", tmp_path / "engine", BuildOptions(device="cpu"))
    with pytest.raises(InputError, match="no such file"):
        opened(tmp_path / "absent.onnx")


def test_a_closed_runner_says_so(tmp_path: Path) -> None:
    with opened(write(tmp_path, ADD)) as runner:
        pass
    with pytest.raises(RuntimeError, match="this runner is closed"):
        runner.run({"x": np.zeros((1, 3), np.float32), "w": np.zeros((1, 3), np.float32)})


def test_a_failing_op_is_one_line_and_the_terminal_stays_quiet(tmp_path: Path) -> None:
    """onnxruntime logs in native code, past sys.stderr: only a process of its own shows what a user would see."""
    path = write(tmp_path, "float[N, 3] x, float[M, K] w) => (float[N, 3] y) { [sum] y = Add(x, w) }")
    code = f"""
import numpy as np
from pathlib import Path
from optframe.backend import Engine
from optframe.backends.onnxruntime import OnnxRuntimeBackend
from optframe.errors import InputError
with OnnxRuntimeBackend().open(Engine(Path({str(path)!r}), "onnxruntime", "fp32", "cpu")) as runner:
    try:
        runner.run({{"x": np.zeros((2, 3), np.float32), "w": np.zeros((4, 3), np.float32)}})
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("model.onnx failed: Non-zero status code returned while running Add node. Name:'sum'")


def test_an_unknown_device_is_refused(tmp_path: Path, backend: OnnxRuntimeBackend) -> None:
    with pytest.raises(InputError, match="unknown device 'cude': did you mean 'cuda'"):
        backend.build(write(tmp_path, ADD), tmp_path / "engine", BuildOptions(device="cude"))


class FakeOnnxRuntime:
    """An onnxruntime with a CUDA provider whose libraries do not load: it falls back to the CPU with a log line."""

    def __init__(self, real: Any, providers: list[str]) -> None:
        self._real, self._providers = real, providers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_available_providers(self) -> list[str]:
        return self._providers

    def preload_dlls(self) -> None:
        return None


def test_cuda_that_is_missing_is_told_with_what_mends_it(
    tmp_path: Path, backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = write(tmp_path, ADD), backend_module._onnxruntime()
    fake = FakeOnnxRuntime(real, ["CPUExecutionProvider"])
    monkeypatch.setattr(backend_module, "_onnxruntime", lambda: fake)
    with pytest.raises(EnvironmentLacks, match=r"no CUDA provider: pip .* 'onnxruntime-gpu\[cuda,cudnn\]'"):
        backend.build(path, tmp_path / "engine", BuildOptions(device="cuda"))
    fake._providers.append("CUDAExecutionProvider")
    monkeypatch.setattr(environment, "gpus", lambda: ())
    with pytest.raises(EnvironmentLacks, match="no NVIDIA GPU is to be seen"):
        backend.build(path, tmp_path / "engine", BuildOptions(device="cuda"))
    assert backend_module.choose_device("auto") == "cpu"
    monkeypatch.setattr(environment, "gpus", lambda: ({"name": "a GPU"},))
    assert backend_module.choose_device("auto") == "cuda"
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(EnvironmentLacks, match="did not start"),
    ):
        backend.build(path, tmp_path / "engine", BuildOptions())


class HostBuffers(CudaRunner):
    """The CUDA runner with its buffers in host memory, which shows the binding without a GPU."""

    device = "cpu"


def test_bound_buffers_are_run_where_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    session = backend_module.create_session(write(tmp_path, ADD), "cpu", SessionSettings())
    x, w = rng.standard_normal((2, 5, 3)).astype(np.float32)
    seen: list[Any] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            session.run_with_iobinding(binding, options)
            seen.append(binding.copy_outputs_to_cpu()[0])

    runner = HostBuffers(Spy(), "model.onnx")
    step = runner.bind({"x": x, "w": w})
    step()
    step()
    for y in seen:
        np.testing.assert_array_equal(y, x + w)
    assert len(seen) == 2
    with pytest.raises(InputError, match="needs input 'w'"):
        runner.bind({"x": x})
    assert not measure(runner, {"x": x, "w": w}, min_runs=3, min_seconds=0).copies_included


class HostGraphs(CudaGraphRunner):
    """The runner of CUDA graphs in host memory, where onnxruntime ignores that a graph is asked for."""

    device = "cpu"


def test_a_graph_has_buffers_of_its_own(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs change in place, sizes come and go, and past the last graph runs go on without."""
    monkeypatch.setattr(backend_module, "MOST_GRAPHS", 2)
    path = write(
        tmp_path, "float[N, 3] x, float[N, 3] w) => (float[N, 3] y, float[N, 3] z) { y = Add(x, w) z = Mul(x, w) }"
    )
    runner = HostGraphs(backend_module.create_session(path, "cpu", SessionSettings()), "model.onnx")
    for rows in (5, 2, 5, 7, 0, 5, 2):
        x, w = rng.standard_normal((2, rows, 3)).astype(np.float32)
        outputs = runner.run({"x": x, "w": w})
        np.testing.assert_array_equal(outputs["y"], x + w)
        np.testing.assert_array_equal(outputs["z"], x * w)
    assert [shapes[0][0] for shapes in runner._graphs] == [5, 2]
    step = runner.bind({"x": x, "w": w})
    step()
    np.testing.assert_array_equal(runner._graphs[(2, 3), (2, 3)].fetch()[0], x + w)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"cuda_graph": "true"}, {"nhwc": "true"}, {"cuda_graph": "true", "nhwc": "true"}]
)
def test_cuda_equals_cpu(
    tmp_path: Path, backend: OnnxRuntimeBackend, rng: np.random.Generator, options: dict[str, str]
) -> None:
    if backend_module._lacks_cuda():
        pytest.skip(f"{backend_module._lacks_cuda()}")
    text = """float[N, 8, 17, 19] x, float[4, 8, 3, 3] w) => (float[N, 4, 9, 10] y) {
        z = Conv<pads=[1, 1, 1, 1], strides=[2, 2]>(x, w) y = Relu(z) }"""
    path = write(tmp_path, text)
    engine = backend.build(path, tmp_path / "engine", BuildOptions(device="cuda", options=options))
    with backend.open(engine) as runner, opened(path) as reference:
        assert isinstance(runner, CudaGraphRunner) == ("cuda_graph" in options)
        for images in (2, 1, 2, 2):
            shapes = {"x": (images, 8, 17, 19), "w": (4, 8, 3, 3)}
            feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
            # FP32 sums of 72 products near 1, in another order: 72 * 2^-24 relative to their size of about 30
            np.testing.assert_allclose(runner.run(feeds)["y"], reference.run(feeds)["y"], atol=72 * 2**-24 * 30)
        assert measure(runner, feeds, min_runs=3, min_seconds=0, device="cuda").median > 0


def test_nothing_is_missing_and_the_version_is_known(backend: OnnxRuntimeBackend) -> None:
    import onnxruntime

    assert backend.missing() is None
    assert onnxruntime.__version__ in backend.versions().values()


@pytest.mark.parametrize("module", ["optframe.backends.onnxruntime", "optframe.worker", "optframe_passes.evaluate"])
def test_onnxruntime_reports_nothing_over_the_network(module: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    code = f"import {module}, onnxruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env={**env, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"
    assert not list(tmp_path.iterdir())  # telemetry that is on leaves the file of its session here
