"""Ctrl-C and SIGTERM in the middle of work: the status tells which it was, no child stays, nothing is half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

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


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="child processes are found through Linux's /proc")
@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_run_that_is_told_to_end_leaves_nothing(
    install_plugin: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: signal.Signals,
    status: int,
    said: str,
) -> None:
    install_plugin("acme-slow", "1.0", "slow = acme_slow", acme_slow=SLOW_PASS)
    begun = tmp_path / "begun"
    for name, value in (("ACME_BEGUN", str(begun)), ("ACME_CLEANUP", "0.3"), ("OPTFRAME_CACHE", str(tmp_path / "c"))):
        monkeypatch.setenv(name, value)
    model = graph.save(ir.from_onnx_text(MODEL), tmp_path / "small.onnx")
    pipeline = "eliminate-identity,wait"  # the first is verified, in a child, while the second waits
    command = f"optframe run {model} --precision fp32 --pipeline {pipeline} --out {tmp_path / 'out' / 'deep'}"
    process = subprocess.Popen(
        [sys.executable, "-m", *command.split()], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: begun.exists() and children(process.pid))
    workers = children(process.pid)
    as_timeout_does(process, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.splitlines()[-1] == said
    assert "Traceback" not in errors
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "c" / "work").iterdir()) == []


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
