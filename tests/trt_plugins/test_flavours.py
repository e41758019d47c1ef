"""Which TensorRT is there, what each version can do, and the links that keep RTX's parser from ending the process."""

import importlib.machinery
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from optframe.errors import EnvironmentLacks, InputError
from optframe_trt import flavours

needs_rtx = pytest.mark.skipif(not flavours.is_installed("tensorrt-rtx"), reason="needs tensorrt-rtx-cu13")


def test_an_unknown_flavour_is_an_error() -> None:
    with pytest.raises(InputError, match="did you mean 'tensorrt-rtx'"):
        flavours.load("tensorrt-rx")


@pytest.mark.parametrize(
    ("text", "version"), [("10.13.3.9", (10, 13, 3, 9)), ("11.4.0.106.post1", (11, 4, 0, 106)), ("unknown", ())]
)
def test_versions_are_their_leading_numbers(text: str, version: tuple[int, ...]) -> None:
    assert flavours.parse_version(text) == version


def test_abilities_differ_as_the_versions_do() -> None:
    ten, eleven = (flavours.KINDS["tensorrt"].abilities(version) for version in ((10, 13, 3, 9), (11, 4)))
    rtx = flavours.KINDS["tensorrt-rtx"].abilities((1, 7, 1, 116))
    assert (ten.strongly_typed_flag, eleven.strongly_typed_flag, rtx.strongly_typed_flag) == (True, False, False)
    assert (ten.timing_cache, ten.runtime_cache, rtx.timing_cache, rtx.runtime_cache) == (True, False, False, True)
    assert (ten.targets, eleven.targets, rtx.targets) == (False, False, True)
    assert (ten.aot_plugins, eleven.aot_plugins, rtx.aot_plugins) == (True, True, False)


def found(monkeypatch: pytest.MonkeyPatch, name: str, origin: str | None) -> None:
    real = importlib.util.find_spec

    def find(module: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(module, None, origin=origin) if module == name else real(module, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    flavours._load.cache_clear()


def test_type_stubs_alone_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, "tensorrt", None)
    assert not flavours.is_installed("tensorrt")
    with pytest.raises(EnvironmentLacks, match=r"tensorrt is not installed: pip install 'tensorrt>=10\.9,<12'"):
        flavours.load("tensorrt")


@pytest.mark.parametrize(
    ("version", "fits"), [("10.8.0.43", False), ("10.9.0.34", True), ("11.4", True), ("12.0", False)]
)
def test_only_known_versions_are_taken(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    found(monkeypatch, "tensorrt", "somewhere")
    module = types.ModuleType("tensorrt")
    module.__dict__["__version__"] = version
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    if fits:
        assert flavours.load("tensorrt").version == version
    else:
        with pytest.raises(EnvironmentLacks, match=r"only 10\.9 up to, not including, 12"):
            flavours.load("tensorrt")
    flavours._load.cache_clear()


def test_a_module_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    flavours._load.cache_clear()
    with pytest.raises(EnvironmentLacks, match=r"installed but does not load \(libnvinfer"):
        flavours.load("tensorrt")
    flavours._load.cache_clear()


def test_an_unsafe_parser_is_refused() -> None:
    abilities = flavours.KINDS["tensorrt-rtx"].abilities((1, 7))
    flavour = flavours.Flavour("tensorrt-rtx", "1.7.1", types.ModuleType("tensorrt_rtx"), abilities, safe_parser=False)
    with pytest.raises(EnvironmentLacks, match="was imported before"):
        flavour.require_safe_parser()


@needs_rtx
def test_links_lie_in_the_cache_and_nothing_in_site_packages(tmp_path: Path) -> None:
    script = "from optframe_trt import flavours; f = flavours.load('tensorrt-rtx'); print(f.version, f.safe_parser)"
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.origin is not None
    before = sorted(Path(spec.origin).parent.iterdir())
    environment = {"OPTFRAME_CACHE": str(tmp_path), "PATH": ""}
    for _ in range(2):  # the second finds the links made
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.split()[1] == "True"
    assert sorted(Path(spec.origin).parent.iterdir()) == before
    links = {path.name for path in tmp_path.rglob("*") if path.is_symlink()}
    assert links == {"libtensorrt_rtx.so", "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"}


@needs_rtx
def test_bindings_imported_first_make_the_parser_unsafe(tmp_path: Path) -> None:
    script = "import tensorrt_rtx; from optframe_trt import flavours; print(flavours.load('tensorrt-rtx').safe_parser)"
    environment = {"OPTFRAME_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
