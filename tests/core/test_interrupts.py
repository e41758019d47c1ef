"""Ctrl-C, SIGTERM and SIGHUP in the middle of work: the status tells which, no child or half-written file stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from optframe import cli, graph, interrupts

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
g (float[2, 3] x) => (float[2, 3] y) { a = Identity (x)  y = Relu (a) }"""

SLOW_PASS = """
    import os, signal, time
    from dataclasses import dataclass
    from pathlib import Path
    from typing import ClassVar
    from optframe.hookspec import hookimpl
    from optframe.passes import GraphPass, PassResult
    from optframe.types import PassSpec

    @hookimpl
    def optframe_passes():
        return [PassSpec("wait", "acme_slow:Wait", "wait")]

    @dataclass(frozen=True)
    class Wait(GraphPass):
        name: ClassVar[str] = "wait"

        def run(self, model, context):
            try:
                Path(os.environ["ACME_BEGUN"]).touch()
                time.sleep(120)
            except KeyboardInterrupt:
                time.sleep(float(os.environ["ACME_CLEANUP"]))
                raise
            return PassResult(False)
"""


def as_timeout_does(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """`timeout` of coreutils sends its signal to the process, then to its group: the process gets it twice."""
    process.send_signal(number)
    os.killpg(process.pid, number)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Begun:
    """A run in the middle of its work, with children, and where it would leave something."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        model = graph.save(ir.from_onnx_text(MODEL), folder / "small.onnx")
        pipeline = "eliminate-identity,wait"  # the first is verified, in a child, while the second waits
        command = f"run {model} --precision fp32 --pipeline {pipeline} --out {folder / 'out' / 'deep'}"
        own_terminal = "import fcntl, os, termios; os.isatty(0) and fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        code = f"{own_terminal}; from optframe.cli import main; raise SystemExit(main({command.split()}))"
        self.process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **options)
        wait_for(lambda: (folder / "begun").exists() and children(self.process.pid))
        self.workers = children(self.process.pid)

    def assert_nothing_is_left(self) -> None:
        assert not [pid for pid in self.workers if Path(f"/proc/{pid}").exists()]
        assert not (self.folder / "out").exists()
        assert list((self.folder / "c" / "work").iterdir()) == []


@pytest.fixture
def begin(install_plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Begun]:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("child processes are found through Linux's /proc")
    install_plugin("acme-slow", "1.0", "slow = acme_slow", acme_slow=SLOW_PASS)
    monkeypatch.setenv("ACME_BEGUN", str(tmp_path / "begun"))
    monkeypatch.setenv("ACME_CLEANUP", "0.3")
    monkeypatch.setenv("OPTFRAME_CACHE", str(tmp_path / "c"))
    return partial(Begun, tmp_path)


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted"), (signal.SIGHUP, 129, "hung up")],
)
def test_a_run_that_is_told_to_end_leaves_nothing(
    begin: Callable[..., Begun], number: signal.Signals, status: int, said: str
) -> None:
    begun = begin(stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    as_timeout_does(begun.process, number)
    _, errors = begun.process.communicate(timeout=60)
    assert begun.process.returncode == status
    assert errors.splitlines()[-1] == said
    assert "Traceback" not in errors
    begun.assert_nothing_is_left()


def test_a_run_whose_terminal_is_closed_leaves_nothing(begin: Callable[..., Begun]) -> None:
    """Whatever it prints from then on fails, the progress that it takes back included."""
    outer, inner = os.openpty()
    begun = begin(stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    os.close(outer)
    assert begun.process.wait(timeout=60) == 129
    begun.assert_nothing_is_left()


def test_a_later_signal_ends_the_cleaning_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.9, 11.5])
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: next(now))
    heard = interrupts.Interrupts()
    with pytest.raises(KeyboardInterrupt):
        heard.hear(signal.SIGTERM, None)
    heard.hear(signal.SIGTERM, None)  # together with the first
    with pytest.raises(KeyboardInterrupt):
        heard.hear(signal.SIGINT, None)
    assert (heard.status, heard.message) == (143, "terminated")


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as `trap '' TERM` in a script has it
    try:
        with interrupts.raised():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with interrupts.raised(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_may_run_the_command_line() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(cli.main(["--version"])))
    thread.start()
    thread.join()
    assert statuses == [0]
