"""One optimiser on one file: `python tools.py TOOL IN.onnx OUT.onnx`; each runs in a process of its own."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

Tool = Callable[[str, str], None]


def optframe(source: str, target: str, pipeline: str = "portable") -> None:
    """Ours, without verification, as the peers don't verify."""
    from optframe import graph
    from optframe.api import optimize

    graph.save(optimize(source, pipeline, verify="off").model, target)


def optframe_checked(source: str, target: str) -> None:
    """Ours, every pass verified."""
    from optframe import graph
    from optframe.api import optimize

    graph.save(optimize(source, "portable", verify="each").model, target)


def onnxslim(source: str, target: str) -> None:
    """The whole of onnxslim, as its command line runs it."""
    import onnxslim

    onnxslim.slim(source, target)


def onnxsim(source: str, target: str) -> None:
    """The whole of onnxsim, without its private ops, which no other runtime takes."""
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(source)
    onnx.save(model, target)


def onnxruntime_level(source: str, target: str, level: str) -> None:
    """What onnxruntime writes when asked for its optimised model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath = target
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def onnxscript(source: str, target: str) -> None:
    """onnxscript's optimiser with its default rewrite rules."""
    import onnx_ir
    import onnxscript.optimizer

    model = onnx_ir.load(source)
    onnxscript.optimizer.optimize(model)
    onnx_ir.save(model, target)


def onnxoptimizer(source: str, target: str) -> None:
    """onnxoptimizer's fuse-and-eliminate passes, until nothing changes."""
    import onnx
    import onnxoptimizer

    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    onnx.save(onnxoptimizer.optimize(onnx.load(source), passes, fixed_point=True), target)


TOOLS: dict[str, Tool] = {
    "optframe": optframe,
    "optframe cpu": lambda source, target: optframe(source, target, "cpu"),
    "optframe --verify each": optframe_checked,
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "onnxruntime basic": lambda source, target: onnxruntime_level(source, target, "basic"),
    "onnxruntime extended": lambda source, target: onnxruntime_level(source, target, "extended"),
    "onnxscript": onnxscript,
    "onnxoptimizer": onnxoptimizer,
}

if __name__ == "__main__":
    name, given, made = sys.argv[1:]
    start = time.perf_counter()
    TOOLS[name](given, made)
    print("work_s", time.perf_counter() - start)
    print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
