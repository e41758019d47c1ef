"""A build in a process of its own, where a crash of the parser is a finding and Ctrl-C a clean end; both sides.

The caller writes one JSON line, the request; the worker answers with lines of progress and a last one with the result
or the error. Whatever else arrives on the worker's standard input, its end included, cancels the build.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from optframe import breadcrumbs, errors, typed_json
from optframe.errors import EnvironmentLacks, InputError, OptframeError, PluginError, describe
from optframe_trt import registration
from optframe_trt.builder import (
    BuildRequest,
    BuildResult,
    Cancelled,
    UnsupportedNodes,
    build,
)
from optframe_trt.preflight import Unsupported
from optframe_trt.progress import Tell
from optframe_trt.stall import STALL_SECONDS, StallWatch, kill_group

CANCEL_SECONDS = 30.0
"""How long a cancelled build may take to notice: TensorRT asks between its steps."""

STEP = 0.005
"""Progress is told when it changed by this much, or with a new phase."""

MODULE = "optframe_trt.worker"

FAULT = "Fatal Python error"
"""What `faulthandler` writes into the log first when a signal ends the worker."""


KEPT = "optframe: "
"""Before what is known of plugins, in the log: what one raised, since TensorRT may crash before the worker can send it,
and whose code runs, which may crash as well."""


def build_in_worker(request: BuildRequest, tell: Tell, log: Path) -> BuildResult:
    """Build in a new process; what native code prints there goes to the file `log`.

    Raises:
        UnsupportedNodes, InputError, PluginError, EnvironmentLacks: see `optframe_trt.builder.build`.
        InputError: the parser or builder crashed, or waited for ever.
        KeyboardInterrupt: the user pressed Ctrl-C; the worker has ended.
    """
    with _process(log) as process, StallWatch(process, STALL_SECONDS) as watch:
        stdin, stdout = _pipes(process)
        try:
            stdin.write(json.dumps(request_to_json(request)) + "\n")
            stdin.flush()
            for line in stdout:
                watch.heard()
                reply = _reply(line)
                if reply is None:
                    break
                if "phase" in reply:
                    tell(reply["phase"], reply["fraction"])
                else:
                    return _result(reply)
        except BrokenPipeError:
            pass
        status = process.wait()
        raise _stall(log) if watch.stalled else _crash(status, log)


@contextlib.contextmanager
def _process(log: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a worker and see that it ends, and its children: after an interrupt by asking it first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env=environment,
            start_new_session=True,  # so that Ctrl-C in a terminal reaches us alone
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    stdin, stdout = _pipes(process)
    with contextlib.suppress(BrokenPipeError):
        stdin.close()  # cancels what may still be under way
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CANCEL_SECONDS)
    finally:
        kill_group(process)
        process.wait()
        stdout.close()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _result(reply: Mapping[str, Any]) -> BuildResult:
    if "unsupported" in reply:
        raise UnsupportedNodes([Unsupported(**node) for node in reply["unsupported"]])
    if "error" in reply:
        kind = getattr(errors, reply["kind"], OptframeError)
        raise kind(reply["error"])
    return typed_json.read(BuildResult, reply["result"])


def _reply(line: str) -> dict[str, Any] | None:
    """Return what a line says, None for one that a dying worker did not finish."""
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None


def _notes(text: str) -> list[dict[str, Any]]:
    """Return what the log says of plugins."""
    replies = (_reply(line.removeprefix(KEPT)) for line in text.splitlines() if line.startswith(KEPT))
    return [reply for reply in replies if reply is not None]


def _kept(text: str) -> OptframeError | None:
    """Return the first error that a plugin raised, by the log, None if none did."""
    for note in _notes(text):
        if "error" in note:
            kind: type[OptframeError] = getattr(errors, note["kind"], OptframeError)
            return kind(note["error"])
    return None


def _running(text: str) -> str:
    """Return what ran of a plugin author's code at the end, by the log, "" if nothing did."""
    notes = [str(note["running"]) for note in _notes(text) if "running" in note]
    return notes[-1] if notes else ""


def _crash(status: int, log: Path) -> OptframeError:
    """Return the error for a worker that died: what a plugin raised before that, if one did, or did when it died."""
    text, _, fault = log.read_text(errors="replace").partition(FAULT)
    kept = _kept(text)
    if kept is not None:
        return kept
    if status == -signal.SIGKILL:
        return EnvironmentLacks("the build was killed, as by a machine out of memory: free some, and try again")
    how = f"signal {_signal_name(-status)}" if status < 0 else f"exit status {status}"
    running = _running(text)
    if running:
        call = _call(fault.partition("Current thread ")[2])
        return PluginError(f"{running} crashed with {how}{call}: mend it, or leave its op out of --plugins")
    lines = [line for line in text.strip().splitlines() if not line.startswith(KEPT)]
    said = f" ({lines[-1].strip()[:200]})" if lines else ""
    return InputError(
        f"TensorRT crashed on this model with {how}{said}: keep the portable form, "
        "which has no ops beyond ONNX's own and ours"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)


def _stall(log: Path) -> OptframeError:
    """Return the error for a worker that was ended: what a plugin raised, if one did, else where it was waiting."""
    text = log.read_text(errors="replace")
    kept = _kept(text)
    if kept is not None:
        return kept
    call = _call(text.rpartition("hread 0x")[2])  # the last thread is the main one
    running = _running(text)
    if running:
        return PluginError(f"{running} did nothing for {STALL_SECONDS:g} s{call}, so the build was ended: mend it")
    return InputError(
        f"TensorRT did nothing for {STALL_SECONDS:g} s{call}, so the build was ended: start it again, and report it "
        "if that happens twice"
    )


def _call(trace: str) -> str:
    """Return the innermost call of a thread, which comes first in what `faulthandler` writes, as the end of a line."""
    where = re.search(r'^  File "[^"\n]*?([^/"\n]*)", line (\d+) in ([^\n]+)', trace, re.MULTILINE)
    return f" in {where[3]} ({where[1]}:{where[2]})" if where else ""


def request_to_json(request: BuildRequest) -> dict[str, Any]:
    """Return `request` as data for JSON, which `typed_json.read` reads."""
    paths = {name: str(value) for name, value in vars(request).items() if isinstance(value, Path)}
    return {**asdict(request), **paths}


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Do one build: the worker's side."""
    request = typed_json.read(BuildRequest, json.loads(requests.readline()))
    stop = threading.Event()
    threading.Thread(target=_listen, args=(requests, stop), daemon=True).start()

    def send(**reply: Any) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        send(result=asdict(build(request, _throttled(send), stop.is_set)))
    except Cancelled:
        send(error="the build was cancelled", kind="OptframeError")
    except UnsupportedNodes as error:
        send(unsupported=[asdict(node) for node in error.nodes])
    except OptframeError as error:
        send(error=str(error), kind=type(error).__name__)
    except Exception as error:  # ours to report to the caller, who may ask for more with --debug
        send(error=f"the build failed: {describe(error)}", kind="OptframeError")


def _listen(requests: IO[str], stop: threading.Event) -> None:
    requests.readline()
    stop.set()


def _throttled(send: Any) -> Tell:
    last = ("", -1.0)

    def tell(phase: str, fraction: float) -> None:
        nonlocal last
        if phase != last[0] or fraction - last[1] >= STEP:
            last = (phase, fraction)
            with contextlib.suppress(BrokenPipeError):  # the caller is gone; the end of its input cancels the build
                send(phase=phase, fraction=fraction)

    return tell


def _log_plugins() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{KEPT}%(message)s"))
    registration.logger.addHandler(handler)
    registration.logger.setLevel(logging.DEBUG)
    breadcrumbs.listen(lambda what: registration.logger.debug("%s", json.dumps({"running": what})))


def main() -> None:
    """Serve on standard input and output; whatever native code prints goes to standard error."""
    _log_plugins()
    faulthandler.enable()  # a crash, and the end of a build that waits for ever, leave in the log where they were
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
