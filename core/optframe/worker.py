"""A process of its own in which native code (onnxruntime, onnx's checker) meets models, so that a crash is a finding.

Both sides are here. They exchange one JSON object a line; models and arrays travel as files.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

TIMEOUT_SECONDS = 900.0
"""How long one request may take. An inference of the largest models takes minutes on a small machine."""

Arrays = Mapping[str, np.ndarray[Any, Any]]


class WorkerFailure(Exception):
    """The worker died or did not answer in time; the message says which, and a new worker has not been started yet."""


class Worker:
    """The caller's side. The process starts with the first request, and anew with the first one after it died.

    `folder` takes the files exchanged. `command` replaces the program that serves, for tests.
    """

    def __init__(self, folder: Path, *, timeout: float = TIMEOUT_SECONDS, command: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.timeout = timeout
        self._command = command or [sys.executable, "-P", "-m", "optframe.worker"]
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._files = 0

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None while none runs."""
        return self._process.pid if self._process else None

    def inspect(self, model: Path) -> dict[str, str | None]:
        """Check the ONNX file `model` and infer its types anew.

        Returns `checker` and `inference`: None or what is wrong; `inferred`: the path of the model with types.
        """
        return self._ask({"do": "inspect", "model": str(model), "result": str(self.new_file(".onnx"))})

    def run(self, model: Path, feeds: Sequence[Path]) -> list[Arrays | str]:
        """Return, for each `.npz` file of `feeds`, the outputs of the ONNX file `model`, or what went wrong."""
        results = [str(self.new_file(".npz")) for _ in feeds]
        reply = self._ask({"do": "run", "model": str(model), "feeds": list(map(str, feeds)), "results": results})
        return [error or _take_arrays(Path(path)) for error, path in zip(reply["errors"], results, strict=True)]

    def new_file(self, suffix: str) -> Path:
        """Return a path in the folder that nothing else uses."""
        self._files += 1
        return self.folder / f"{self._files:05d}{suffix}"

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self._replies.get(timeout=self.timeout)
        except queue.Empty:
            self._stop()
            raise WorkerFailure(f"the worker gave no answer in {self.timeout:g} s") from None
        except OSError:
            line = None
        if line is None:
            raise WorkerFailure(self._last_words(process))
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _start(self) -> subprocess.Popen[str]:
        self._replies = queue.SimpleQueue()
        with (self.folder / "worker.log").open("w") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        threading.Thread(target=_forward, args=(process.stdout, self._replies), daemon=True).start()
        return process

    def _last_words(self, process: subprocess.Popen[str]) -> str:
        status = process.wait()
        self._stop()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        log = (self.folder / "worker.log").read_text(errors="replace").strip().splitlines()
        return f"the worker crashed with {how}{f' ({log[-1][:200]})' if log else ''}"

    def _stop(self) -> None:
        if self._process and self._process.stdin:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()


def _forward(stream: IO[str], replies: queue.SimpleQueue[str | None]) -> None:
    """Put each line of `stream` into `replies`, and None at its end."""
    with stream:
        for line in stream:
            replies.put(line)
    replies.put(None)


def _take_arrays(path: Path) -> Arrays:
    """Return the arrays in the `.npz` file `path`, which is removed."""
    arrays = load_arrays(path)
    path.unlink()
    return arrays


def load_arrays(path: Path) -> Arrays:
    """Return what `save_arrays` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Write `arrays` to the `.npz` file `path`: text as fixed-width text, the members of a sequence one by one.

    `numpy.savez` takes no array called "file", which may well be the name of a tensor.

    Raises:
        TypeError: an array cannot be written without pickling it.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            members = (
                {f"{name}[{i}]": each for i, each in enumerate(value)} if isinstance(value, list) else {name: value}
            )
            for key, member in members.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, _plain(key, member), allow_pickle=False)
    return path


def _plain(name: str, value: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(value)
    if array.dtype == object and all(isinstance(item, str) for item in array.flat):
        return array.astype(np.str_)
    if array.dtype.kind not in "biufcU":
        raise TypeError(f"'{name}' is no array of numbers or text")
    return array


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer `requests` until they end."""
    tasks = {"inspect": _inspect, "run": _run}
    for line in requests:
        request = json.loads(line)
        print(json.dumps(tasks[request["do"]](request)), file=replies, flush=True)


def _inspect(request: Mapping[str, str]) -> dict[str, str | None]:
    import onnx

    model = onnx.load(request["model"], load_external_data=False)
    try:
        onnx.checker.check_model(model)
        checker = None
    except Exception as error:
        checker = _one_line(error)
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.ClearField("type")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:
        return {"checker": checker, "inference": _one_line(error), "inferred": None}
    onnx.save(inferred, request["result"])
    return {"checker": checker, "inference": None, "inferred": request["result"]}


def _run(request: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Run the model on each of the feeds. Its errors are onnxruntime's, of many types."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    # What onnxruntime makes of a graph when it optimises is neither the model's meaning nor ours to answer for.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
    except Exception as error:
        message = _one_line(error).replace(request["model"], "it")
        return {"errors": [message] * len(request["feeds"])}
    names = [output.name for output in session.get_outputs()]
    return {
        "errors": [
            _run_once(session, names, feeds, Path(result))
            for feeds, result in zip(request["feeds"], request["results"], strict=True)
        ]
    }


def _run_once(session: Any, names: Sequence[str], feeds: str, result: Path) -> str | None:
    try:
        outputs = session.run(names, dict(load_arrays(Path(feeds))))
        save_arrays(result, dict(zip(names, outputs, strict=True)))
    except Exception as error:
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def main() -> None:
    """Serve on standard input and output; whatever native code prints goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
