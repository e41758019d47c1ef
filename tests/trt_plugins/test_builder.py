"""How a build is configured, on a stand-in for TensorRT that remembers what it was told."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optframe.errors import InputError
from optframe_trt import builder, preflight
from optframe_trt.builder import BuildRequest, Log
from optframe_trt.flavours import KINDS, Flavour
from optframe_trt.profiles import ShapeRange
from optframe_trt.settings import BuildSettings


class Members:
    """An enum whose members are their names."""

    def __getattr__(self, name: str) -> str:
        return name


@dataclass
class Config:
    """What `IBuilderConfig` is told."""

    flags: dict[str, bool] = field(default_factory=dict)
    pools: dict[str, int] = field(default_factory=dict)
    targets: dict[int, str] = field(default_factory=dict)
    cache: Any = None
    profiles: list[Any] = field(default_factory=list)
    accepts: bool = True

    def set_flag(self, flag: str) -> None:
        self.flags[flag] = True

    def clear_flag(self, flag: str) -> None:
        self.flags[flag] = False

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.pools[pool] = size

    def set_compute_capability(self, capability: str, number: int) -> None:
        self.targets[number] = capability

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(data=data, serialize=lambda: data + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.cache = (cache, ignore_mismatch)
        return True

    def get_timing_cache(self) -> Any:
        return self.cache[0] if self.cache else None

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1 if self.accepts else -1


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = shapes


def make(name: str, version: tuple[int, ...], config: Config) -> tuple[Flavour, Any]:
    module = SimpleNamespace(
        BuilderFlag=Members(),
        MemoryPoolType=Members(),
        ProfilingVerbosity=Members(),
        ComputeCapability=Members(),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
    )
    flavour = Flavour(name, ".".join(map(str, version)), module, KINDS[name].abilities(version))
    return flavour, SimpleNamespace(create_builder_config=lambda: config, create_optimization_profile=Profile)


def request(tmp_path: Path, settings: BuildSettings, **more: Any) -> BuildRequest:
    paths = {"source": tmp_path / "s.onnx", "model": tmp_path / "m.onnx", "engine": tmp_path / "e"}
    return BuildRequest("tensorrt", **paths, settings=settings, **{"targets": ("sm89",), **more})


def test_settings_become_flags_and_limits(tmp_path: Path) -> None:
    config = Config()
    flavour, made = make("tensorrt", (10, 13), config)
    settings = BuildSettings(workspace=64, optimization_level=5, version_compatible=True, strip=True, layer_names=False)
    builder._configure(flavour, made, request(tmp_path, settings))
    assert config.flags == {"TF32": False, "VERSION_COMPATIBLE": True, "STRIP_PLAN": True}
    assert config.pools == {"WORKSPACE": 64 << 20}
    assert vars(config)["builder_optimization_level"] == 5
    assert vars(config)["profiling_verbosity"] == "NONE"
    assert config.targets == {}


def test_only_rtx_is_told_compute_capabilities(tmp_path: Path) -> None:
    config = Config()
    flavour, made = make("tensorrt-rtx", (1, 7), config)
    builder._configure(flavour, made, request(tmp_path, BuildSettings(tf32=True), targets=("sm86", "sm120")))
    assert config.targets == {0: "SM86", 1: "SM120"}
    assert vars(config)["num_compute_capabilities"] == 2
    assert config.flags["TF32"]
    assert vars(config)["profiling_verbosity"] == "DETAILED"


def test_timings_are_read_kept_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "timings.cache"
    for expected in (b"", b"+"):
        config = Config()
        flavour, made = make("tensorrt", (11, 4), config)
        builder._configure(flavour, made, request(tmp_path, BuildSettings(), timing_cache=path))
        cache, ignore_mismatch = config.cache
        assert (cache.data, ignore_mismatch) == (expected, False)
        builder._keep_timings(config, path)  # type: ignore[arg-type]
    assert path.read_bytes() == b"++"


@pytest.mark.parametrize(
    ("name", "version", "flags"), [("tensorrt", (10, 9), 2), ("tensorrt", (11, 4), 0), ("tensorrt-rtx", (1, 7), 0)]
)
def test_networks_are_strongly_typed(name: str, version: tuple[int, ...], flags: int) -> None:
    assert preflight.network_flags(make(name, version, Config())[0]) == flags


def network(*shape_tensors: bool) -> Any:
    inputs = [SimpleNamespace(name=f"x{i}", is_shape_tensor=value) for i, value in enumerate(shape_tensors)]
    return SimpleNamespace(num_inputs=len(inputs), get_input=inputs.__getitem__)


def test_profiles_reach_the_config() -> None:
    config = Config()
    _, made = make("tensorrt", (10, 13), config)
    ranges = {"x0": ShapeRange((1, 3), (2, 3), (4, 3))}
    builder._add_profiles(made, config, network(False), (ranges, ranges))  # type: ignore[arg-type]
    assert [profile.shapes for profile in config.profiles] == [{"x0": ((1, 3), (2, 3), (4, 3))}] * 2


def test_a_profile_that_tensorrt_raises_at_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Profile, name: str, *shapes: Any) -> None:
        raise RuntimeError("Shape provided for min is inconsistent with other shapes.")

    monkeypatch.setattr(Profile, "set_shape", refuse)
    _, made = make("tensorrt", (10, 13), Config())
    with pytest.raises(InputError, match=r"refuses the profile x0: \(1,\) to \(4,\)"):
        builder._add_profiles(made, Config(), network(False), ({"x0": ShapeRange((1,), (2,), (4,))},))  # type: ignore[arg-type]


def test_a_profile_that_tensorrt_refuses_is_an_error() -> None:
    _, made = make("tensorrt", (10, 13), Config())
    ranges = {"x0": ShapeRange((1,), (2,), (4,))}
    with pytest.raises(InputError, match=r"refuses the profile x0: \(1,\) to \(4,\)"):
        builder._add_profiles(made, Config(accepts=False), network(False), (ranges,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'x1' decides shapes by its values"):
        builder._add_profiles(made, Config(), network(False, True), (ranges,))  # type: ignore[arg-type]


def test_the_logger_keeps_what_matters() -> None:
    severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)
    base = type("ILogger", (), {"Severity": severity})
    flavour = Flavour("tensorrt", "10.13", SimpleNamespace(ILogger=base), KINDS["tensorrt"].abilities((10, 13)))
    log = Log()
    logger = builder.make_logger(flavour, log)
    for level, text in enumerate(("internal", "error", "warning", "info")):
        logger.log(level, text)
    logger.log(severity.WARNING, "Attribute optframe_inputs not found in plugin node!")
    assert (log.errors, log.warnings) == (["internal", "error"], ["warning"])
