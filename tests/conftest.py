"""Options, skip reasons and fixtures that all tests share."""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

collect_ignore = ["third_party"]  # a stranger's project: core/test_third_party.py installs it and runs its tests there

SEED_VARIABLE = "OPTFRAME_TEST_SEED"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons: Mapping[str, Callable[[], str | None]] = {
        "slow": lambda: None if config.getoption("--slow") else "takes long; run with --slow",
        "gpu": _lacks_gpu,
        "gpu_tensorrt": lambda: _lacks_gpu() or (None if _has("tensorrt") else "needs the full TensorRT"),
    }
    for marker, lacks in reasons.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = lacks() if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _lacks_gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return "needs an NVIDIA GPU; there is no nvidia-smi here"
    if _has("cupy"):
        return None
    if _has("torch") and importlib.import_module("torch").cuda.is_available():
        return None
    return "needs CuPy, or a torch that is built for CUDA"


def _has(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # type stubs alone have no origin


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed; pytest shows it with a failing test, and the environment variable sets it again."""
    value = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(32))
    print(f"{request.node.nodeid}: {SEED_VARIABLE}={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A random generator with a fresh seed, see `seed`."""
    return np.random.default_rng(seed)


@pytest.fixture
def needs_nvrtc() -> None:
    """Skips where no NVRTC is installed."""
    from optframe_trt import nvrtc

    if not nvrtc.toolkits():
        pytest.skip("no NVRTC is installed (extra optframe[nvrtc])")


@pytest.fixture(scope="session")
def benchmark_module() -> Iterator[Callable[[str], ModuleType]]:
    """A function that imports a file of `benchmarks`, "graph/measure.py", under its name without the folder."""
    with pytest.MonkeyPatch.context() as patch:

        def load(name: str) -> ModuleType:
            path = Path(__file__).parents[1] / "benchmarks" / name
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, path.stem, module)
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that lays down a distribution as an installer does, in a folder on sys.path: `tmp_path / "site"`.

    `install_plugin(distribution, version, entry_points, module=source, ...)` writes the .dist-info folder, with
    `entry_points` ("name = module" lines of optframe's group), and the modules. Child processes find it too.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    def install(distribution: str, version: str, entry_points: str, **modules: str) -> None:
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[optframe]\n{entry_points}\n")
        for name, source in modules.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield install
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
