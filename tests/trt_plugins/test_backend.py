"""Engines of TensorRT-RTX, really built, without a GPU: plugins inside or not, precisions, shapes, and bad input."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import optframe
from optframe import engines, environment, graph, ops, progress
from optframe.backend import BuildOptions, BuildsElsewhere, BuildsVariants, CheckingBackend, Engine, NamesOptions
from optframe.engines import sidecar
from optframe.errors import EnvironmentLacks, InputError, PluginError
from optframe.passes import PASS_KEY
from optframe.stages import RunRequest
from optframe.types import OpSpec, Precision
from optframe_anchordetr.ops import LAYER_NORM, RCDA
from optframe_trt import backend, flavours, nvrtc
from optframe_trt.backend import TensorRTBackend, TensorRTRTXBackend

needs_rtx = pytest.mark.skipif(not flavours.is_installed("tensorrt-rtx"), reason="needs tensorrt-rtx-cu13")
NODE = "encoder.norm"


SHAPE_RULES = """
from dataclasses import replace

def raises(inputs, attributes):
    raise ValueError("no idea")

def one_wider(inputs, attributes):
    return (replace(inputs[0], shape=(*inputs[0].shape[:-1], inputs[0].shape[-1] + 1)),)

def one_too_many(inputs, attributes):
    return (inputs[0], inputs[0])

def nothing(inputs, attributes):
    pass
"""
"""A module of shape rules that are wrong, for the process that builds to import."""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ())


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One cache for all tests here: PTX is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTFRAME_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def initializer(name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, ir.DataType.from_numpy(array.dtype), array.shape)
    value.const_value = ir.tensor(array, name=name)
    return value


def small_model(shape: tuple[int | str, ...] = (2, 6, 32), kind: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """Return Gemm-like product, LayerNorm (ours, with its function), Relu on `shape`."""
    rng, half = np.random.default_rng(0), kind.numpy()
    x = ir.val("x", kind, shape)
    weight = initializer("w", (rng.standard_normal((32, 32)) / 6).astype(half))
    scale, bias = (initializer(name, rng.standard_normal(32).astype(half)) for name in ("scale", "bias"))
    product = ir.node("MatMul", [x, weight], name="encoder.linear")
    product.outputs[0].dtype, product.outputs[0].shape = kind, ir.Shape(shape)
    graph_ = ir.Graph([x], [], nodes=[product], initializers=[weight, scale, bias], opset_imports={"": 18}, name="g")
    model = ir.Model(graph_, ir_version=10)
    norm = ops.call(model, LAYER_NORM, [product.outputs[0], scale, bias])
    norm.name = NODE
    relu = ir.node("Relu", norm.outputs, name="encoder.relu")
    graph_.extend([norm, relu])
    y = relu.outputs[0]
    y.name, y.dtype, y.shape = "y", kind, ir.Shape(shape)
    graph_.outputs.append(y)
    return model


def build(
    tmp_path: Path,
    model: ir.Model,
    precision: Precision = "fp32",
    known: Mapping[str, OpSpec] | None = None,
    **options: str,
) -> Engine:
    path = graph.save(model, tmp_path / "model.onnx")
    known = {LAYER_NORM.identifier: LAYER_NORM} if known is None else known
    chosen = {"compute_capability": "sm89"} | options
    return TensorRTRTXBackend().build(path, tmp_path, BuildOptions(precision, options=chosen, ops=known))


def facts(engine: Engine) -> dict:
    return json.loads(sidecar(engine.path).read_text())


def test_both_backends_are_registered_and_say_what_they_lack() -> None:
    backend = TensorRTRTXBackend()
    assert isinstance(backend, BuildsElsewhere)
    assert isinstance(backend, BuildsVariants)
    assert isinstance(backend, NamesOptions)
    assert backend.cannot_run() == "no GPU"
    if not flavours.is_installed("tensorrt"):
        assert "pip install" in (TensorRTBackend().missing() or "")


@needs_rtx
def test_options_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TensorRTRTXBackend()
    assert isinstance(backend, CheckingBackend)
    backend.check(BuildOptions(options={"compute_capability": "sm89"}))
    for options, message in (
        (BuildOptions(device="cpu"), "builds for GPUs"),
        (BuildOptions(options={"plugin": "all"}), "did you mean 'plugins'"),
        (BuildOptions(options={"optimization_level": "9"}), "0 to 5"),
    ):
        with pytest.raises(InputError, match=message):
            backend.check(options)
    gpu = {"name": "H200", "driver_version": "580.1", "memory.total": "1 MiB", "compute_cap": "9.0"}
    monkeypatch.setattr(environment, "gpus", lambda: (gpu,))
    assert backend.missing() is None  # it builds for others
    assert backend.cannot_run() == "the GPU here is sm90, which tensorrt-rtx does not know"
    with pytest.raises(EnvironmentLacks, match="--compute-capability sm80"):
        backend.check(BuildOptions())


@needs_rtx
@pytest.mark.parametrize(("kind", "precision"), [(ir.DataType.FLOAT, "fp32"), (ir.DataType.FLOAT16, "fp16")])
def test_a_plugin_is_inside_with_its_ptx(tmp_path: Path, kind: ir.DataType, precision: Precision) -> None:
    told: list[float] = []
    with progress.listening(lambda what, fraction: told.append(fraction)):
        engine = build(tmp_path, small_model(kind=kind), precision)
    assert told == sorted(told)
    assert told[-1] > 0.5
    data = engine.path.read_bytes()
    assert b".entry layernorm(" in data
    written = facts(engine)
    assert written["plugins"] == {LAYER_NORM.identifier: 1}
    (kernel,) = written["kernels"]
    assert (kernel["node"], kernel["entry"], kernel["target"]) == (NODE, "layernorm", 89)
    assert f".version {'.'.join(map(str, kernel['isa']))}".encode() in data
    assert kernel["isa"][0] == 8  # what drivers of CUDA 12 load
    assert written["inputs"] == [{"name": "x", "dtype": kind.numpy().name, "shape": [2, 6, 32]}]
    assert (written["backend"], written["targets"], written["size"]) == ("tensorrt-rtx", ["sm89"], len(data))
    assert engines.find(engine.path) == Engine(engine.path, "tensorrt-rtx", precision, "cuda")
    assert written["layers"]["encoder.linear"] == ["encoder.linear"]
    assert written["origins"][NODE]["op"] == LAYER_NORM.identifier


@needs_rtx
@pytest.mark.parametrize("tf32", [False, True])
def test_plugins_round_to_tf32_where_the_engine_may(tmp_path: Path, tf32: bool) -> None:
    shapes = {"q_row": (1, 9, 64), "q_col": (1, 9, 64), "k_row": (1, 7, 64), "k_col": (1, 6, 64), "v": (1, 6, 7, 64)}
    inputs = [ir.val(name, ir.DataType.FLOAT, shape) for name, shape in shapes.items()]
    graph_ = ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="g")
    model = ir.Model(graph_, ir_version=10)
    attention = ops.call(model, RCDA, inputs, {"num_heads": 2})
    graph_.append(attention)
    out = attention.outputs[0]
    out.name, out.dtype, out.shape = "out", ir.DataType.FLOAT, ir.Shape((1, 9, 64))
    graph_.outputs.append(out)
    engine = build(tmp_path, model, known={RCDA.identifier: RCDA}, tf32=str(tf32).lower())
    data = engine.path.read_bytes()
    assert b".entry rcda(" in data
    assert (b"f32.tf32.tf32.f32" in data) == tf32


@needs_rtx
def test_without_plugins_the_function_is_inlined(tmp_path: Path) -> None:
    engine = build(tmp_path, small_model(), plugins="none")
    assert b".entry" not in engine.path.read_bytes()
    assert facts(engine)["plugins"] == {}
    assert any(origin["op"] == "LayerNormalization" for origin in facts(engine)["origins"].values())


@needs_rtx
def test_float64_that_becomes_float32_is_told(tmp_path: Path) -> None:
    x = ir.val("x", ir.DataType.DOUBLE, (2, 3))
    relu = ir.node("Relu", [x], name="relu")
    y = relu.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.DOUBLE, ir.Shape((2, 3))
    model = ir.Model(ir.Graph([x], [y], nodes=[relu], opset_imports={"": 18}, name="g"), ir_version=10)
    engine = build(tmp_path, model)
    assert [tensor["dtype"] for tensor in facts(engine)["inputs"]] == ["float32"]
    assert any("has no float64: x, y are float32" in warning for warning in engine.warnings)


@needs_rtx
def test_builds_are_byte_identical_and_may_be_for_several_gpus(tmp_path: Path) -> None:
    first, second = (build(tmp_path / name, small_model()).path.read_bytes() for name in "ab")
    assert first == second
    several = build(tmp_path, small_model(), compute_capability="sm120,sm86,sm89")
    assert facts(several)["targets"] == ["sm86", "sm89", "sm120"]
    assert facts(several)["kernels"][0]["target"] == 86  # PTX for the lowest runs on all
    assert several.warnings == ()
    unnamed = build(tmp_path, small_model(), compute_capability="")
    assert facts(unnamed)["targets"] == ["sm80", "sm86", "sm89", "sm120", "sm121"]
    assert any("name yours with --compute-capability" in text for text in unnamed.warnings)
    assert several.path.read_bytes() != first


@needs_rtx
def test_dynamic_shapes_need_a_profile_that_fits(tmp_path: Path) -> None:
    engine = build(tmp_path, small_model(("batch", "n", 32)), profile="batch=1/2/4,n=1/6/50;batch=8,n=3")
    first, second = facts(engine)["profiles"]
    assert first["x"] == {"min": [1, 1, 32], "opt": [2, 6, 32], "max": [4, 50, 32]}
    assert second["x"]["max"] == [8, 3, 32]
    assert facts(engine)["inputs"][0]["shape"] == [-1, -1, 32]
    with pytest.raises(InputError, match="say in what range"):
        build(tmp_path, small_model(("batch", "n", 32)))


@needs_rtx
def test_settings_reach_the_builder(tmp_path: Path) -> None:
    named = build(tmp_path / "a", small_model())
    unnamed = build(tmp_path / "b", small_model(), layer_names="false", workspace="64", optimization_level="0")
    assert b"encoder.linear" in named.path.read_bytes()
    assert named.path.read_bytes() != unnamed.path.read_bytes()
    assert facts(unnamed)["settings"]["workspace"] == 64
    with pytest.raises(EnvironmentLacks, match="leaves weights out only where a GPU is"):
        build(tmp_path, small_model(), strip="true")


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("fp16", {}, "no float16 tensors"),
        ("int8", {}, "no QuantizeLinear"),
        ("fp32", {"plugins": "optframe.anchordetr::LayerNrm"}, "did you mean 'optframe.anchordetr::LayerNorm'"),
        ("fp32", {"compute_capability": "sm75"}, "tensorrt-rtx builds nothing for 'sm75', only for sm80"),
        ("fp32", {"version_compatible": "true"}, "no version-compatible engines"),
        ("fp32", {"profile": "batch=1"}, "every input of the model has a fixed shape"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_before_the_build(
    tmp_path: Path, precision: Precision, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path, small_model(), precision, **options)
    assert not (tmp_path / "model.engine").exists()


@needs_rtx
def test_unsupported_nodes_are_named_with_the_pass_that_made_them(tmp_path: Path) -> None:
    model = small_model()
    y = model.graph.outputs[0]
    strange = [ir.Node("com.acme", "Strange", [y], name=f"strange{i}") for i in (1, 2)]
    for node in strange:
        node.metadata_props[PASS_KEY] = "clean,fuse-strange"
    plain = ir.node("NonZero", [y], name="where")
    model.graph.extend([*strange, plain])
    outputs = [strange[0].outputs[0], strange[1].outputs[0]]
    for i, value in enumerate(outputs):
        value.name, value.dtype, value.shape = f"z{i}", ir.DataType.FLOAT, y.shape
    model.graph.outputs.extend(outputs)
    model.opset_imports["com.acme"] = 1
    with pytest.raises(InputError) as raised:
        build(tmp_path, model)
    text = str(raised.value)
    assert "com.acme::Strange (made by pass fuse-strange, no plugin): strange1, strange2" in text
    assert "leave fuse-strange out of --pipeline" in text
    assert "\n" not in text


@needs_rtx
def test_a_crash_of_the_parser_is_a_finding(tmp_path: Path) -> None:
    x = ir.val("x", ir.DataType.FLOAT, (1, 4, 32))
    attention = ir.Node("com.microsoft", "MultiHeadAttention", [x, x, x], [ir.AttrInt64("num_heads", 4)], name="mha")
    y = attention.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape((1, 4, 32))
    model = ir.Model(
        ir.Graph([x], [y], nodes=[attention], opset_imports={"": 18, "com.microsoft": 1}, name="g"), ir_version=10
    )
    with pytest.raises(InputError, match=r"TensorRT crashed on this model with|cannot take 1 node"):
        build(tmp_path, model)


@needs_rtx
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("raises", "ValueError: no idea"),
        ("one_wider", r"its shape rule gives 'y' shape \[2, 6, 33\], its function \[2, 6, 32\]"),
        ("one_too_many", "not a tuple of 1 TensorInfo"),
        ("nothing", "gives None, not a tuple of 1 TensorInfo"),
    ],
)
def test_a_wrong_shape_rule_is_told_with_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, message: str
) -> None:
    (tmp_path / "wrong_shape_rules.py").write_text(SHAPE_RULES)
    monkeypatch.syspath_prepend(tmp_path)
    broken = replace(LAYER_NORM, shape_rule=f"wrong_shape_rules:{rule}")
    with pytest.raises(PluginError, match=message) as raised:
        build(tmp_path, small_model(), known={broken.identifier: broken})
    assert f"node '{NODE}'" in str(raised.value)


CRASHING = """
import ctypes, os

def shape(inputs, attributes):
    ctypes.string_at(0)

def launch(inputs, outputs, attributes):
    ctypes.string_at(0)

def function(opset, dtypes):
    os._exit(3)
"""
"""A module whose C code ends the process, as a broken extension does."""


@needs_rtx
@pytest.mark.parametrize(
    ("role", "how"),
    [
        ("shape", r"signal SIGSEGV in string_at \("),
        ("launch", r"signal SIGSEGV in string_at \("),
        ("function", "exit status 3"),
    ],
)
def test_a_crash_of_an_authors_code_is_laid_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, how: str
) -> None:
    (tmp_path / "crashing_rules.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    assert LAYER_NORM.kernel is not None
    broken = {
        "shape": lambda: replace(LAYER_NORM, shape_rule="crashing_rules:shape"),
        "launch": lambda: replace(LAYER_NORM, kernel=replace(LAYER_NORM.kernel, launch="crashing_rules:launch")),
        "function": lambda: replace(LAYER_NORM, function="crashing_rules:function"),
    }[role]()
    what = role if role == "function" else f"{role} rule"
    message = rf"^node '{NODE}' \({broken.identifier}\): {what} crashing_rules:{role} crashed with {how}"
    with pytest.raises(PluginError, match=message) as raised:
        build(tmp_path, small_model(), known={broken.identifier: broken})
    assert "TensorRT" not in str(raised.value)
    assert "\n" not in str(raised.value)


@needs_rtx
def test_the_engine_cannot_be_opened_here_and_the_reason_is_told(tmp_path: Path) -> None:
    engine = build(tmp_path, small_model())
    with pytest.raises(EnvironmentLacks, match=r"runs on an NVIDIA GPU \(sm89\), and there is none here"):
        optframe.load_engine(engine.path)


def test_an_engine_without_its_facts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"engine")
    with pytest.raises(InputError, match=r"has no model\.engine\.json beside it"):
        optframe.load_engine(tmp_path / "model.engine")
    (tmp_path / "model.engine.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        optframe.load_engine(tmp_path / "model.engine")
    with pytest.raises(InputError, match="no such engine"):
        optframe.load_engine(tmp_path / "other.engine")


@needs_rtx
def test_a_run_reports_engines_as_built_and_not_run(tmp_path: Path) -> None:
    model = graph.save(small_model(), tmp_path / "small.onnx")
    request = RunRequest(
        precisions=("fp32",),
        backends=("onnxruntime", "tensorrt-rtx"),
        pipeline="eliminate-identity",
        verify="off",
        backend_options={"compute_capability": "sm89", "threads": "1"},  # each backend gets its own
    )
    report = optframe.run(model, request=request, out=tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [run["label"] for run in data["runs"]] == [
        "FP32 onnxruntime cpu",
        "FP32 tensorrt-rtx cuda",
        "FP32 tensorrt-rtx no plugins cuda",
    ]
    assert data["runs"][0]["passed"] is True
    for run in data["runs"][1:]:
        assert (run["not_run"], run["passed"], run["latency_ms"], run["outputs"]) == ("no GPU", None, None, {})
        assert run["engine_bytes"] > 0
    assert any("not run here: no GPU" in text for text in data["warnings"])
    assert "built, not run" in (tmp_path / "out" / "report.html").read_text()
    plugins = json.loads((tmp_path / "out/engines/tensorrt-rtx-fp32/model.engine.json").read_text())["plugins"]
    assert plugins == {LAYER_NORM.identifier: 1}
    assert (tmp_path / "out/engines/tensorrt-rtx-fp32-no-plugins/model.engine").is_file()
    assert report.passed


@needs_rtx
def test_a_variant_that_cannot_be_built_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def variants(self: object, model: Path, options: BuildOptions) -> dict[str, BuildOptions]:
        return {"": options, "bad": replace(options, options={"workspace": "-1"}), "good": options}

    monkeypatch.setattr(TensorRTRTXBackend, "variants", variants)
    model = graph.save(small_model(), tmp_path / "small.onnx")
    request = RunRequest(
        precisions=("fp32",),
        backends=("tensorrt-rtx",),
        pipeline="eliminate-identity",
        verify="off",
        backend_options={"compute_capability": "sm89"},
    )
    report = optframe.run(model, request=request)
    assert [run.variant for run in report.runs] == ["", "good"]
    assert any("tensorrt-rtx fp32 bad: cannot be built: workspace is a number" in text for text in report.warnings)


def test_an_option_that_no_backend_takes_is_refused(tmp_path: Path) -> None:
    model = graph.save(small_model(), tmp_path / "small.onnx")
    request = RunRequest(precisions=("fp32",), backends=("onnxruntime",), backend_options={"plugins": "all"})
    with pytest.raises(InputError, match="unknown option of backend onnxruntime 'plugins'"):
        optframe.run(model, request=request)


def _workers(caller: int) -> list[Path]:
    """Return the processes of the worker that `caller` has, as folders of /proc, once they have loaded TensorRT."""
    children = [Path("/proc", pid) for pid in Path(f"/proc/{caller}/task/{caller}/children").read_text().split()]
    ours = [child for child in children if _says(child / "cmdline", "optframe_trt.worker")]
    return [child for child in ours if _says(child / "maps", "libtensorrt")]


def _says(file: Path, word: str) -> bool:
    """Whether the file of a process, which may end at any time, has the word."""
    try:
        return word in file.read_text()
    except OSError:
        return False


@needs_rtx
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="child processes are found through Linux's /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_build_and_its_process(tmp_path: Path, number: signal.Signals, status: int) -> None:
    model = graph.save(small_model(), tmp_path / "model.onnx")
    command = f"optframe build {model} --backend tensorrt-rtx --compute-capability sm89 -o {tmp_path / 'engines'}"
    process = subprocess.Popen([sys.executable, "-m", *command.split()], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (workers := _workers(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "engines").exists()
    assert not [worker for worker in workers if worker.exists()]


@needs_rtx
def test_a_signal_behind_the_build_leaves_no_engine_without_its_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = build(tmp_path, small_model((2, 6, 32)))
    kept = {path: path.read_bytes() for path in (before.path, sidecar(before.path))}
    monkeypatch.setattr(backend, "layer_nodes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, small_model((3, 6, 32)))
    assert {path: path.read_bytes() for path in kept} == kept
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "new", small_model())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]


@pytest.mark.gpu_tensorrt
def test_an_engine_of_full_tensorrt_runs_as_onnxruntime_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = small_model()
    path = graph.save(model, tmp_path / "model.onnx")
    known = {LAYER_NORM.identifier: LAYER_NORM}
    engine = TensorRTBackend().build(path, tmp_path, BuildOptions("fp32", ops=known))
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 6, 32)).astype(np.float32)}
    (expected,) = optframe.api.run_model(model, [feeds])
    with optframe.load_engine(engine.path) as runner:
        np.testing.assert_allclose(runner.run(feeds)["y"], expected["y"], atol=1e-4)  # float32 sums of 32 products
        told = runner.details(feeds)
    assert told.series["gpu"].median > 0
    assert {node for layer in told.layers for node in layer.nodes} >= {NODE}


@needs_rtx
def test_what_plugins_lack_is_told_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "toolkits", lambda: ())
    assert "pip install 'nvidia-cuda-nvrtc-cu12'" in TensorRTRTXBackend().versions()["nvrtc"]
