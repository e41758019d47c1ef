"""PTX is the same each time, whatever NVRTC does, and made anew where what was kept does not fit."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from optframe_trt import nvrtc, ptx_cache
from optframe_trt.nvrtc import Ptx, Toolkit

SOURCE = 'extern "C" __global__ void k(float* x) { x[0] = VALUE; }'


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the compiler was asked for; it gives another text each time."""
    asked: list[str] = []

    def compile_ptx(source: str, *, name: str, defines: Sequence[tuple[str, str]], targets: Sequence[int]) -> Ptx:
        asked.append(source)
        return Ptx(f"ptx {len(asked)}", min(targets), (8, 8), (12, 9))

    monkeypatch.setenv("OPTFRAME_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_ptx", compile_ptx)
    monkeypatch.setattr(nvrtc, "toolkits", lambda: (Toolkit(Path("nvrtc"), Path("include"), (12, 9)),))
    return asked


def make(source: str = SOURCE, value: str = "1", targets: Sequence[int] = (86, 89)) -> Ptx:
    return ptx_cache.compile_ptx(source, name="k.cu", defines=[("VALUE", value)], targets=targets)


def test_the_same_question_has_the_same_answer(compiled: list[str]) -> None:
    assert make() == make() == Ptx("ptx 1", 86, (8, 8), (12, 9))
    assert len(compiled) == 1


def test_whatever_decides_the_text_is_compiled_anew(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {make().text, make(source=SOURCE + " ").text, make(value="2").text, make(targets=(80,)).text}
    monkeypatch.setattr(nvrtc, "toolkits", lambda: (Toolkit(Path("nvrtc"), Path("include"), (13, 0)),))
    texts.add(make().text)
    assert len(texts) == len(compiled) == 5


@pytest.mark.parametrize("text", ["", "{}", '{"text": 1, "target": 2, "isa": 3, "nvrtc": 4}', "[1"])
def test_a_damaged_entry_is_made_anew(compiled: list[str], tmp_path: Path, text: str) -> None:
    make()
    (entry,) = (tmp_path / "ptx").iterdir()
    entry.write_text(text)
    assert make().text == "ptx 2"
    assert make().text == "ptx 2"
