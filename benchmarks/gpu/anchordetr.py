"""Measures Anchor DETR (R50-DC5, 1x3x800x1066, seeded weights) as optframe runs it, beside its peers.

Every row is written as soon as it is measured, and is left alone by later calls unless --again: compilations of minutes
can be spread over several calls. Ours is measured again, in the same precision, beside each peer.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import floors
import numpy as np
import peers
import results
import torch

import optframe
from optframe import graph
from optframe.backends.torch.backend import TorchSettings, open_model
from optframe.backends.torch.chains import chains
from optframe_anchordetr.adapter import AnchorDETRAdapter, AnchorDETROptions
from optframe_anchordetr.export import export

SIZE = (800, 1066)
WARM_UP, RUNS, PROFILED_RUNS = 10, 100, 10
OURS = "optframe torch"
PIPELINES = {"fp16": "anchordetr-cuda", "tf32": "anchordetr-tensorrt", "fp32": "anchordetr-tensorrt"}
"""The faster of both: merged products win where no kernel of half precision wants its inputs apart."""

CLASSES = {
    "attention": ("rcda", "sdpa", "flash", "fmha"),
    "norms": ("layernorm", "layer_norm", "Moments"),
    "convolutions": ("fprop", "conv", "first_layer", "nhwcAddPadding", "implicit"),
    "matrix products": ("nvjet", "gemm", "_linear", "cutlass", "xmma", "splitK"),
    "copies": ("memcpy", "Memcpy", "copy_kernel", "memset", "Memset", "CatArray"),
}
"""What a kernel's name has to contain to count as one class; whatever has none is elementwise work and reductions."""


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return median and 90th percentile in ms by the host's clock, the GPU synchronised after each run."""
    for _ in range(WARM_UP):
        run()
    samples = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples), float(np.percentile(samples, 90))


class Bench:
    """The model, its input and FP32 reference at one batch size, and our runner."""

    def __init__(self, batch: int, folder: Path, pipeline: str | None = None) -> None:
        self.batch, self.folder, self._pipeline = batch, folder / f"batch{batch}", pipeline
        self.folder.mkdir(parents=True, exist_ok=True)
        self.adapter = AnchorDETRAdapter(AnchorDETROptions(shape=(batch, 3, *SIZE)))
        self.feeds = dict(self.adapter.feeds()[0])
        self.images = self.feeds["images"]
        torch.backends.cudnn.allow_tf32 = False
        with torch.inference_mode():
            reference = copy.deepcopy(self.adapter._model).cuda()(torch.from_numpy(self.images).cuda())
        self.reference = [tensor.cpu().numpy() for tensor in reference]

    def raw(self) -> Path:
        """Write the export and return its path."""
        path = self.folder / "raw.onnx"
        if not path.exists():
            export(self.adapter._model, path, self.adapter._export_options)
        return path

    def pipeline(self, precision: str) -> str:
        return self._pipeline or PIPELINES[precision]

    def optimized(self, pipeline: str) -> Path:
        """Write what the pipeline makes of the export, in FP32 and FP16, and return the files' folder."""
        folder = self.folder / pipeline
        if not (folder / "fp16.onnx").exists():
            folder.mkdir(exist_ok=True)
            model = optframe.optimize(self.raw(), pipeline=pipeline, verify="off").model
            graph.save(model, folder / "fp32.onnx")
            graph.save(optframe.convert_precision(model, "fp16"), folder / "fp16.onnx")
        return folder

    def ours(self, precision: str) -> tuple[Callable[[], Any], Callable[[], list[Any]], Any]:
        """Return a run on the device, what fetches the outputs, and the runner."""
        file = "fp16.onnx" if precision == "fp16" else "fp32.onnx"
        settings = TorchSettings(tf32=precision == "tf32")
        model = graph.load(self.optimized(self.pipeline(precision)) / file)
        runner = open_model(model, "cuda", settings, "anchordetr")
        run = runner.bind(self.feeds)  # type: ignore[attr-defined]
        return run, lambda: list(runner.run(self.feeds).values()), runner

    def row(self, name: str, precision: str, ours: bool, run: Callable[[], Any], fetch: Any) -> dict[str, Any]:
        """Time the run; its date stands in the row, since a table's rows can be of several calls."""
        with torch.inference_mode():
            median, p90 = timed(run)
            outputs = fetch()
        errors = [float(np.abs(a - b).max()) for a, b in zip(outputs, self.reference, strict=True)]
        return {
            "name": name,
            "ours": ours,
            "precision": precision,
            "batch": self.batch,
            "median_ms": round(median, 3),
            "p90_ms": round(p90, 3),
            "logits_max_abs": errors[0],
            "boxes_max_abs": errors[1],
            "date": results.date(),
        }


def kernel_times(run: Callable[[], Any]) -> Iterator[tuple[str, float]]:
    """Yield name and microseconds a run of each launch and copy, over PROFILED_RUNS runs.

    Launches may overlap: one that begins while others still run, for which it waits, counts from their end on.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_RUNS):
            run()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    covered = 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        yield event.name, max(end - max(start, covered), 0.0) / PROFILED_RUNS
        covered = max(covered, end)


def tally(times: Iterable[tuple[str, float]]) -> dict[str, tuple[float, float]]:
    """Return microseconds and launches of a run by name, of what `kernel_times` says."""
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for name, us in times:
        spent[name].append(us)
    return {name: (sum(found), len(found) / PROFILED_RUNS) for name, found in spent.items()}


def kind_of(name: str) -> str:
    """Return the class of a kernel by its name."""
    kinds = (kind for kind, marks in CLASSES.items() if any(mark in name for mark in marks))
    return next(kinds, "elementwise and reductions")


def budget(times: Sequence[tuple[str, float]], median_ms: float) -> list[dict[str, Any]]:
    """Return microseconds and launches of a run by class of kernel, and what of the run no kernel covers."""
    spent = tally((kind_of(name), us) for name, us in times)
    rows = [{"class": kind, "us": round(us, 1), "launches": round(n)} for kind, (us, n) in sorted(spent.items())]
    rows.append({"class": "gaps", "us": round(median_ms * 1e3 - sum(us for _, us in times), 1), "launches": 0})
    return rows


def longest(times: Sequence[tuple[str, float]]) -> list[tuple[float, float, str]]:
    """Return (microseconds, launches, name) of each kernel of a run, the most expensive first."""
    return sorted(((us, n, name) for name, (us, n) in tally(times).items()), reverse=True)


def measure_ours(bench: Bench, precision: str) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Return our row and the run, which stays ready to be timed again."""
    start = time.perf_counter()
    run, fetch, runner = bench.ours(precision)
    seconds = time.perf_counter() - start
    row = bench.row(OURS, precision, True, run, fetch)
    row |= {"load_s": round(seconds, 1), "pipeline": bench.pipeline(precision)}
    compiled = [chain for e in runner.loaded._programs.values() for chain in chains(e.program.steps)]
    row["chains"] = len(compiled)
    row["chains_compiled"] = sum(c.compiled_us is not None and c.compiled_us < (c.eager_us or 0) for c in compiled)
    row["compile_s"] = round(sum(chain.seconds for chain in compiled), 1)
    return row, run


def tell_budget(bench: Bench, run: Callable[[], Any], path: Path) -> None:
    """Put the time of each class of kernel beside its floor on this card, and print it with the longest kernels."""
    pipeline = bench.pipeline("fp16")
    rates = floors.measured_rates(torch.float16)
    floor = floors.floor_us(graph.load(bench.optimized(pipeline) / "fp16.onnx"), rates)
    times, (median, _) = list(kernel_times(run)), timed(run)
    rows = [row | {"floor_us": round(floor.get(row["class"], 0.0), 1)} for row in budget(times, median)]
    save(path, f"anchordetr_budget_batch{bench.batch}", rows, pipeline=pipeline, rates=dataclasses.asdict(rates))
    for row in rows:
        print(f"    {row['us']:8.1f} us, floor {row['floor_us']:6.1f} {row['launches']:4} launches  {row['class']}")
    for us, count, name in longest(times)[:40]:
        print(f"    {us:8.1f} us {count:5.0f} x  {name[:110]}")


def measure_peer(bench: Bench, peer: peers.Peer) -> dict[str, Any]:
    bench.raw()
    start = time.perf_counter()
    with torch.inference_mode():
        run, fetch = peer.make(copy.deepcopy(bench.adapter._model), bench.images, bench.folder)
    seconds = time.perf_counter() - start
    return {**bench.row(peer.name, peer.precision, False, run, fetch), "load_s": round(seconds, 1)}


def load_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()).get("anchordetr", []) if path.exists() else []


def save(path: Path, table: str, rows: Sequence[dict[str, Any]], **how: Any) -> None:
    command = "python benchmarks/gpu/anchordetr.py"
    results.save(path, table, rows, command=command, runs=RUNS, clock="host, synchronised", **how)


def record(path: Path, row: dict[str, Any]) -> None:
    """Put the row in the place of one of the same name, precision, batch and, where it is ours, pipeline."""
    key = ("name", "precision", "batch", "pipeline")
    rows = [old for old in load_rows(path) if any(old.get(field) != row.get(field) for field in key)]
    save(path, "anchordetr", sorted([*rows, row], key=lambda r: (r["batch"], r["median_ms"])))
    name = f"batch {row['batch']}  {row['name']} {row['precision']}"
    beside = f", ours beside it {row['ours_beside_ms']} ms" if "ours_beside_ms" in row else ""
    error = f"error {row['logits_max_abs']:.1e}"
    print(f"{row['median_ms']:8.3f} ms  {error}  {name}  (ready after {row['load_s']} s{beside})", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="peers whose name and precision contain this; 'ours' for optframe alone")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pipeline", help="default: anchordetr-cuda in FP16, anchordetr-tensorrt in TF32 and FP32")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--results", type=Path, help="the JSON file (default: results/<card>.json)")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="where the ONNX files go")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU is available to torch: nothing was measured")
        return 0
    path = arguments.results or results.default_path()
    bench = Bench(arguments.batch, arguments.work, arguments.pipeline)
    if arguments.only == "ours":
        for precision in PIPELINES:
            row, run = measure_ours(bench, precision)
            record(path, row)
            if precision == "fp16":
                tell_budget(bench, run, path)
        return 0
    done = {f"{row['name']} {row['precision']}" for row in load_rows(path) if row["batch"] == arguments.batch}
    wanted = [name for name in peers.PEERS if not arguments.only or arguments.only in name]
    ours: dict[str, Callable[[], Any]] = {}
    for name in wanted:
        if name in done and not arguments.again:
            continue
        peer = peers.PEERS[name]
        if peer.precision not in ours:
            row, ours[peer.precision] = measure_ours(bench, peer.precision)
            record(path, row)
        try:
            row = measure_peer(bench, peer)
        except Exception:  # a peer that does not run here is a finding; the others are still to be measured
            print(f"{name} does not run:\n{traceback.format_exc(limit=-3)}", flush=True)
            continue
        record(path, {**row, "ours_beside_ms": round(timed(ours[peer.precision])[0], 3)})
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
