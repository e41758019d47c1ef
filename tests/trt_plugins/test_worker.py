"""The process that builds: what it is sent and sends back, how it crashes, how it is cancelled."""

import io
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from optframe import typed_json
from optframe.errors import EnvironmentLacks, InputError, OptframeError, PluginError
from optframe.registry import default_registry
from optframe_trt import stall, worker
from optframe_trt.builder import (
    BuildRequest,
    BuildResult,
    Cancelled,
    KernelFacts,
    LayerFacts,
    TensorFacts,
    UnsupportedNodes,
)
from optframe_trt.preflight import Unsupported
from optframe_trt.profiles import ShapeRange
from optframe_trt.settings import BuildSettings


def request(tmp_path: Path) -> BuildRequest:
    return BuildRequest(
        flavour="tensorrt-rtx",
        source=tmp_path / "source.onnx",
        model=tmp_path / "model.onnx",
        engine=tmp_path / "model.engine",
        settings=BuildSettings(workspace=7, profile="n=1/2/3"),
        targets=("sm86", "sm89"),
        plugins=tuple(default_registry().ops().values()),
        aot=True,
        profiles=({"x": ShapeRange((1, 2), (3, 4), (5, 6))}, {}),
        timing_cache=tmp_path / "timings",
    )


RESULT = BuildResult(
    version="1.7",
    inputs=(TensorFacts("x", "float32", (-1, 2)),),
    outputs=(TensorFacts("y", "int64", ()),),
    layers=(LayerFacts("a", "CONVOLUTION", "[ONNX Layer: a]"),),
    kernels=(KernelFacts("n", "layernorm", 86, (8, 8), (12, 9), "ab"),),
    warnings=("beware",),
)


def test_requests_and_results_survive_json(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    assert wanted.plugins, "the installed plugins register ops"
    assert typed_json.read(BuildRequest, json.loads(json.dumps(worker.request_to_json(wanted)))) == wanted
    assert typed_json.read(BuildResult, json.loads(json.dumps(asdict(RESULT)))) == RESULT


def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: Any, stdin: str = "") -> list[dict[str, Any]]:
    """Return what the worker says when `build` takes the place of the builder."""
    monkeypatch.setattr(worker, "build", build)
    replies = io.StringIO()
    worker.serve(io.StringIO(json.dumps(worker.request_to_json(request(tmp_path))) + "\n" + stdin), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def test_the_worker_tells_progress_then_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(wanted: BuildRequest, tell: Any, cancelled: Any) -> BuildResult:
        for fraction in (0.0, 0.001, 0.5):  # the second step is too small to tell
            tell("optimize", fraction)
        tell("write", 0.5)
        return RESULT

    *told, last = serve(monkeypatch, tmp_path, build)
    assert [(reply["phase"], reply["fraction"]) for reply in told] == [
        ("optimize", 0),
        ("optimize", 0.5),
        ("write", 0.5),
    ]
    assert worker._result(last) == RESULT


def test_the_end_of_its_input_cancels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(wanted: BuildRequest, tell: Any, cancelled: Any) -> BuildResult:
        waiting = threading.Event()
        for _ in range(1000):
            if cancelled():
                raise Cancelled
            waiting.wait(0.01)
        return RESULT

    (reply,) = serve(monkeypatch, tmp_path, build)
    with pytest.raises(OptframeError, match="was cancelled"):
        worker._result(reply)


@pytest.mark.parametrize(
    ("raised", "seen", "message"),
    [
        (InputError("no such shape"), InputError, "no such shape"),
        (ZeroDivisionError("oh"), OptframeError, "the build failed: ZeroDivisionError: oh"),
    ],
)
def test_errors_keep_their_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: Exception, seen: type[Exception], message: str
) -> None:
    def build(wanted: BuildRequest, tell: Any, cancelled: Any) -> BuildResult:
        raise raised

    (reply,) = serve(monkeypatch, tmp_path, build)
    with pytest.raises(seen, match=message):
        worker._result(reply)


def test_unsupported_nodes_arrive_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = (Unsupported("n", "NonZero", "no", 3),)

    def build(wanted: BuildRequest, tell: Any, cancelled: Any) -> BuildResult:
        raise UnsupportedNodes(nodes)

    (reply,) = serve(monkeypatch, tmp_path, build)
    with pytest.raises(UnsupportedNodes) as raised:
        worker._result(reply)
    assert raised.value.nodes == nodes


@pytest.mark.parametrize(
    ("source", "how"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "signal SIGSEGV"),
        (
            "import faulthandler, os, sys; faulthandler.enable(); print('assertion x', file=sys.stderr); os.abort()",
            r"signal SIGABRT \(assertion x\)",
        ),
        ("import sys; print('terminate called', file=sys.stderr); sys.exit(7)", r"exit status 7 \(terminate called\)"),
    ],
)
def test_a_crash_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, how: str) -> None:
    (tmp_path / "crashing_worker.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(worker, "MODULE", "crashing_worker")
    with pytest.raises(InputError, match=f"TensorRT crashed on this model with {how}"):
        worker.build_in_worker(request(tmp_path), lambda what, fraction: None, tmp_path / "log")


DEAF = """
import json, os, subprocess, time
child = subprocess.Popen(["sleep", "60"])  # holds our output open
print(json.dumps({"phase": str(child.pid), "fraction": 0}), flush=True)
print(json.dumps({"phase": str(os.getpid()), "fraction": 0}), flush=True)
time.sleep(600)
"""


def test_a_deaf_worker_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deaf_worker.py").write_text(DEAF)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(worker, "MODULE", "deaf_worker")
    monkeypatch.setattr(worker, "CANCEL_SECONDS", 0.1)
    pids: list[int] = []

    def tell(what: str, fraction: float) -> None:
        pids.append(int(what))
        if len(pids) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.build_in_worker(request(tmp_path), tell, tmp_path / "log")
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):  # the child has lost its parent, and goes when init has noticed
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WAITING = """
import faulthandler, threading
faulthandler.enable()
def build_for_ever():
    threading.Event().wait()
build_for_ever()
"""

WORKING = """
import json, sys, time
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
print(json.dumps({"error": "done", "kind": "InputError"}), flush=True)
sys.stdin.read()
"""

IN_A_CHILD = """
import json, subprocess, sys
source = "import time; end = time.monotonic() + 2\\nwhile time.monotonic() < end: pass"
{work}
print(json.dumps({{"error": "done", "kind": "InputError"}}), flush=True)
sys.stdin.read()
"""

GRANDCHILD = "subprocess.run(['sh', '-c', '\"$0\" -c \"$1\"; true', sys.executable, source], check=True)"
"""The worker waits for a shell, which waits for the work."""

ORPHAN = (
    "subprocess.run(['sh', '-c', '(\"$0\" -c \"$1\"; echo done) &', sys.executable, source], stdout=subprocess.PIPE)"
)
"""The shell ends at once; the worker waits for what it started to close its output."""

SHORT = "for _ in range(20): subprocess.run([sys.executable, '-c', 'import time; time.sleep(0.1)'], check=True)"
"""Each process has come and gone between two looks; what it used counts as its parent's."""

TALKING = """
import json, sys, time
for step in range(20):
    print(json.dumps({"phase": "a", "fraction": step / 20}), flush=True)
    time.sleep(0.1)
print(json.dumps({"error": "done", "kind": "InputError"}), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (WAITING, r"^TensorRT did nothing for 1 s in \w+ \(threading\.py:\d+\), so the build was ended"),
        (WORKING, "^done$"),
        (TALKING, "^done$"),
        (IN_A_CHILD.format(work=GRANDCHILD), "^done$"),
        (IN_A_CHILD.format(work=ORPHAN), "^done$"),
        (IN_A_CHILD.format(work=SHORT), "^done$"),
        (IN_A_CHILD.format(work="subprocess.run(['sleep', '60'])"), "^TensorRT did nothing for 1 s"),
    ],
    ids=["waiting", "working", "talking", "grandchild", "orphan", "short", "sleeping child"],
)
def test_a_worker_that_waits_for_ever_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "some_worker.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(worker, "MODULE", "some_worker")
    monkeypatch.setattr(worker, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(stall, "GRACE_SECONDS", 1.0)
    with pytest.raises(InputError, match=message):
        worker.build_in_worker(request(tmp_path), lambda what, fraction: None, tmp_path / "log")


@pytest.mark.parametrize("end", [worker._stall, lambda log: worker._crash(-signal.SIGABRT, log)])
def test_what_a_plugin_raised_before_the_end_is_told(tmp_path: Path, end: Any) -> None:
    """TensorRT-RTX corrupts its heap when some callbacks raise, and dies before the worker can send what was kept."""
    log = tmp_path / "worker.log"
    first, second = (json.dumps({"error": text, "kind": "EnvironmentLacks"}) for text in ("no NVRTC:\ntwo lines", "b"))
    log.write_text(f"of TensorRT\n{worker.KEPT}{first}\n{worker.KEPT}{second}\nmalloc()\n{worker.FAULT}: Aborted\n")
    error = end(log)
    assert isinstance(error, EnvironmentLacks)
    assert str(error) == "no NVRTC:\ntwo lines"


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda log: worker._crash(-signal.SIGSEGV, log), "crashed with signal SIGSEGV in string_at (__init__.py:519)"),
        (worker._stall, f"did nothing for {worker.STALL_SECONDS:g} s in main (worker.py:9)"),
    ],
)
@pytest.mark.parametrize("ended", [False, True])
def test_what_ran_at_the_end_is_told(tmp_path: Path, end: Any, message: str, ended: bool) -> None:
    """The innermost call is that of the thread in question, which need not come first."""
    notes = [{"running": "node 'm': function a:b"}, {"running": ""}, {"running": "node 'n': launch rule a:c"}]
    notes += [{"running": ""}] * ended
    log = tmp_path / "worker.log"
    log.write_text(
        "of TensorRT\n"
        + "".join(f"{worker.KEPT}{json.dumps(note)}\n" for note in notes)
        + f"{worker.FAULT}: Segmentation fault\n\n"
        'Thread 0x1 (most recent call first):\n  File "/a/b.py", line 1 in wait\n\n'
        'Current thread 0x2 (most recent call first):\n  File "/c/__init__.py", line 519 in string_at\n\n'
        'Thread 0x3 (most recent call first):\n  File "/d/worker.py", line 9 in main\n'
    )
    error = end(log)
    assert isinstance(error, PluginError) != ended
    assert ("node 'n': launch rule a:c " + message in str(error)) != ended
    assert ("of TensorRT" in str(error)) == (ended and "crashed" in message)  # the last line that is not ours


@pytest.mark.parametrize(
    ("status", "message"), [(-signal.SIGKILL, "out of memory"), (-40, "with signal 40"), (3, "with exit status 3")]
)
def test_every_end_has_its_line(tmp_path: Path, status: int, message: str) -> None:
    log = tmp_path / "worker.log"
    log.write_text("")
    assert message in str(worker._crash(status, log))


@pytest.mark.parametrize("line", ['{"result": {"versi', "[1]", "printed by a library", ""])
def test_half_a_line_is_no_reply(line: str) -> None:
    assert worker._reply(line) is None


def test_where_a_build_stalled_is_one_line(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text(
        f"{worker.FAULT}: Aborted\n\nCurrent thread 0x00007f (most recent call first):\n"
        '  File "/a/b/rule.py", line 3 in <lambda>\n  File "<frozen runpy>", line 198 in _run_module_as_main\n'
    )
    assert "in <lambda> (rule.py:3)" in str(worker._stall(log))


def test_the_worker_logs_what_plugins_raise(tmp_path: Path) -> None:
    code = (
        "from optframe_trt import registration, worker\n"
        "worker._log_plugins()\n"
        "registration.Registration(()).keep(registration.NodeError('n', 'x::Y', ValueError('no')))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reply = json.loads(ran.stderr.removeprefix(worker.KEPT))
    assert reply["error"].startswith("node 'n' (x::Y): ValueError")
    assert reply["kind"] == "PluginError"
