"""The worker process: answers, errors, crashes, silence, and a new process after each death."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from optframe.worker import Worker, WorkerFailure, load_arrays, save_arrays

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x) => (float[2] y, bool[2] negative) <float zero = {0.0}>
{ y = Neg (x)
  negative = Less (x, zero) }
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker(tmp_path) as made:
        yield made


def write(worker: Worker, text: str) -> Path:
    path = worker.new_file(".onnx")
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def feeds(worker: Worker, **arrays: np.ndarray) -> Path:  # type: ignore[type-arg]
    return save_arrays(worker.new_file(".npz"), arrays)


def serving(answer: str) -> list[str]:
    """Return the command of a worker that, asked to run, does `answer`."""
    program = f"import os, time\nimport optframe.worker as w\ndef run(request):\n    {answer}\nw._run = run\nw.main()"
    return [sys.executable, "-c", program]


def test_runs_and_gives_each_inputs_outputs_or_error(worker: Worker) -> None:
    inputs = [
        feeds(worker, x=np.array([1, -2], np.float32)),
        feeds(worker, x=np.array([1, 2, 3], np.float32)),
        feeds(worker, x=np.array([0, 5], np.float32)),
    ]
    first, second, third = worker.run(write(worker, TEXT), inputs)
    assert not isinstance(first, str)
    np.testing.assert_array_equal(first["y"], [-1, 2])
    np.testing.assert_array_equal(first["negative"], [False, True])
    assert isinstance(second, str)
    assert "Got invalid dimensions" in second
    assert "\n" not in second
    assert not isinstance(third, str)
    np.testing.assert_array_equal(third["y"], [0, -5])


def test_a_model_that_does_not_load_is_an_error_for_every_input(worker: Worker) -> None:
    (error,) = worker.run(write(worker, TEXT.replace("Neg", "Negate")), [feeds(worker, x=np.zeros(2, np.float32))])
    assert isinstance(error, str)
    assert "Negate" in error


def test_inspects(worker: Worker) -> None:
    reply = worker.inspect(write(worker, TEXT.replace("float[2] y", "float[M] y")))
    assert reply["checker"] is None
    assert reply["inferred"] is not None
    inferred = onnx.load(reply["inferred"]).graph.output[0]
    assert inferred.type.tensor_type.shape.dim[0].dim_value == 2
    assert "Negate" in str(worker.inspect(write(worker, TEXT.replace("Neg", "Negate")))["checker"])


def test_one_process_answers_until_it_dies_and_then_a_new_one(worker: Worker) -> None:
    path = write(worker, TEXT)
    worker.inspect(path)
    first = worker.pid
    worker.inspect(path)
    assert first is not None
    assert worker.pid == first
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert worker.inspect(path)["checker"] is None
    assert worker.pid not in (None, first)


def test_a_crash_is_told_with_its_signal_and_last_words(tmp_path: Path) -> None:
    command = serving("os.write(2, b'corrupted heap'); os.kill(os.getpid(), 11)")
    with Worker(tmp_path, command=command) as worker:
        path = write(worker, TEXT)
        with pytest.raises(WorkerFailure, match=r"crashed with signal SIGSEGV \(corrupted heap\)"):
            worker.run(path, [])
        assert worker.inspect(path)["checker"] is None


def test_an_exit_is_told_with_its_status(tmp_path: Path) -> None:
    with (
        Worker(tmp_path, command=serving("os._exit(7)")) as worker,
        pytest.raises(WorkerFailure, match="exit status 7"),
    ):
        worker.run(write(worker, TEXT), [])


def test_silence_ends_with_a_failure_and_a_new_process(tmp_path: Path) -> None:
    with Worker(tmp_path, timeout=3.0, command=serving("time.sleep(60)")) as worker:
        path = write(worker, TEXT)
        with pytest.raises(WorkerFailure, match=r"no answer in 3 s"):
            worker.run(path, [])
        assert worker.pid is None
        worker.timeout = 60.0
        assert worker.inspect(path)["checker"] is None


def test_what_native_code_prints_does_not_disturb_the_answers(tmp_path: Path) -> None:
    answer = "os.write(1, b'chatter'); print('more'); return {'errors': []}"
    with Worker(tmp_path, command=serving(answer)) as worker:
        assert worker.run(write(worker, TEXT), []) == []


def test_leaving_ends_the_process(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        worker.inspect(write(worker, TEXT))
        pid = worker.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = {
        "file": np.float16([1, np.nan]),
        "a/b": np.array(True),
        "text": np.array(["ab", "c"], object),
        "list": [np.int64([1]), np.int64([2, 3])],
    }
    back = load_arrays(save_arrays(tmp_path / "x.npz", arrays))
    assert back.keys() == {"file", "a/b", "text", "list[0]", "list[1]"}
    assert back["file"].dtype == np.float16
    np.testing.assert_array_equal(back["file"], arrays["file"])
    assert back["a/b"].shape == ()
    assert back["text"].tolist() == ["ab", "c"]
    assert back["list[1]"].tolist() == [2, 3]


def test_what_would_need_pickling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'x' is no array of numbers or text"):
        save_arrays(tmp_path / "x.npz", {"x": np.array([{}, None])})
