"""Options of a build: read from text, refused where the flavour cannot honour them; what GPU an engine is for."""

import types

import pytest

from optframe import environment
from optframe.backends.settings import parse_settings
from optframe.errors import EnvironmentLacks, InputError
from optframe_trt.flavours import KINDS, Flavour
from optframe_trt.settings import BuildSettings, choose_targets


def flavour(name: str) -> Flavour:
    version = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 7)}[name]
    return Flavour(name, ".".join(map(str, version)), types.ModuleType(name), KINDS[name].abilities(version))


def gpu(monkeypatch: pytest.MonkeyPatch, capability: str | None) -> None:
    facts = {"name": "GPU", "driver_version": "580.1", "memory.total": "1 MiB", "compute_cap": capability or ""}
    monkeypatch.setattr(environment, "gpus", lambda: (facts,) if capability else ())


def test_options_are_text_of_their_types() -> None:
    options = {"workspace": "512", "tf32": "true", "profile": "batch=1/2/4;batch=8", "plugins": "a.b::C,d::E"}
    assert parse_settings(BuildSettings, "tensorrt", options) == BuildSettings(
        workspace=512, tf32=True, profile="batch=1/2/4;batch=8", plugins="a.b::C,d::E"
    )
    assert parse_settings(BuildSettings, "tensorrt", {}) == BuildSettings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("workspac", "1", "did you mean 'workspace'"),
        ("workspace", "much", "backend tensorrt: workspace"),
        ("tf32", "perhaps", "backend tensorrt: tf32"),
    ],
)
def test_bad_options_are_named(name: str, value: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_settings(BuildSettings, "tensorrt", {name: value})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tensorrt", BuildSettings(optimization_level=6), "optimization_level is 0 to 5"),
        ("tensorrt", BuildSettings(workspace=-1), "number of MiB"),
        ("tensorrt", BuildSettings(workspace=10**17), "number of MiB up to"),
        ("tensorrt-rtx", BuildSettings(version_compatible=True), "no version-compatible engines"),
        ("tensorrt-rtx", BuildSettings(timing_cache="x.cache"), "no timing cache"),
    ],
)
def test_what_a_flavour_cannot_honour_is_an_error(name: str, settings: BuildSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings.check(flavour(name))


def test_full_tensorrt_takes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, "8.9")
    BuildSettings(version_compatible=True, timing_cache="x", strip=True).check(flavour("tensorrt"))


@pytest.mark.parametrize(
    ("present", "wanted", "targets"),
    [
        (None, "sm120,SM86", ("sm86", "sm120")),
        (None, "", ("sm80", "sm86", "sm89", "sm120", "sm121")),
        ("8.9", "", ("sm89",)),
        ("9.0", "sm89", ("sm89",)),
    ],
)
def test_rtx_targets(
    monkeypatch: pytest.MonkeyPatch, present: str | None, wanted: str, targets: tuple[str, ...]
) -> None:
    gpu(monkeypatch, present)
    assert choose_targets(flavour("tensorrt-rtx"), wanted) == targets


def test_targets_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, "9.0")
    with pytest.raises(EnvironmentLacks, match=r"nothing for the GPU here \(sm90\)"):
        choose_targets(flavour("tensorrt-rtx"), "")
    with pytest.raises(InputError, match="builds nothing for 'sm90', only for sm80, "):
        choose_targets(flavour("tensorrt-rtx"), "sm90")
    assert choose_targets(flavour("tensorrt"), "sm90") == ("sm90",)
    with pytest.raises(InputError, match="not for sm89"):
        choose_targets(flavour("tensorrt"), "sm89")
    gpu(monkeypatch, None)
    with pytest.raises(EnvironmentLacks, match="nvidia-smi lists none"):
        choose_targets(flavour("tensorrt"), "")
