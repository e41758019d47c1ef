"""What a run amounts to, in plain sentences: the headline, what INT8 and FP16 gained, and every warning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from optframe.report.figures import compact, count, day, number, percent, times, with_unit
from optframe.report.record import EngineRun, RunReport

if TYPE_CHECKING:
    from optframe.precision import Sensitivity

WORTH_IT = 1.05
"""A speed-up below this is within what a busy machine does to a median, and no reason to accept INT8's error."""

INT8_FLOPS_AIM = 0.6
INT8_CONV_FLOPS_AIM = 0.9
"""What an INT8 graph should cover: below it too much time stays in the other precision for INT8 to pay."""


def headline(report: RunReport) -> str:
    """Return the result in one line, such as "4042 → 720 nodes; FP32 equal to PyTorch within 3e-6; ..."."""
    parts = [f"{count(report.nodes.exported)} → {count(report.nodes.optimized)} nodes"]
    parts += [_accuracy(report, run) for run in report.runs if run.precision == "fp32" or not run.passed]
    parts += [text for run in report.runs if (text := _speed(report, run))]
    return "; ".join(part for part in parts if part)


def _accuracy(report: RunReport, run: EngineRun) -> str:
    missed = [finding for finding in run.findings if finding.missed]
    if missed:
        return f"{report.label(run)} misses its limit at {', '.join(dict.fromkeys(f.output for f in missed))}"
    error = run.worst("max_abs")
    return f"{report.label(run)} equal to {report.reference} within {number(error, 2)}" if error is not None else ""


def _speed(report: RunReport, run: EngineRun) -> str:
    base = _baseline(report, run)
    if base is None or run.precision == "fp32":
        return ""
    ratio = _median(base) / _median(run)
    if 1 / WORTH_IT < ratio < WORTH_IT:
        return f"{report.label(run)} as fast as {base.precision.upper()}"
    if ratio < 1:
        return f"{report.label(run)} slower than {base.precision.upper()} ({times(ratio)})"
    return f"{report.label(run)} {times(ratio)} as fast as {base.precision.upper()}"


def _baseline(report: RunReport, run: EngineRun) -> EngineRun | None:
    """Return the FP32 run that `run`'s latency can fairly be compared with."""
    return next((other for other in _comparable(report, run) if other.precision == "fp32"), None)


def _comparable(report: RunReport, run: EngineRun) -> Iterator[EngineRun]:
    """Yield the other runs timed on the same backend and machine in the same way."""
    for other in report.runs:
        if other is not run and other.latency and run.latency and other.place == run.place:
            same_place = other.device == run.device and other.latency.machine == run.latency.machine
            if same_place and other.latency.copies_included == run.latency.copies_included:
                yield other


def _median(run: EngineRun) -> float:
    assert run.latency is not None
    return run.latency.median


def gains(report: RunReport) -> list[str]:
    """Return, for each FP16 and INT8 run with a latency, a sentence on whether it pays on its backend."""
    return [text for run in report.runs if (text := _gain(report, run)[1])]


def proposal_text(found: Sensitivity) -> str:
    """Return in words which layers have to stay out of INT8 for the error aimed for."""
    aim = compact(found.target)
    if not found.keep:
        return f"All layers can be in INT8: the error over response is {number(found.curve[0].error, 2)}, within {aim}."
    if found.proposal is None:
        return f"INT8 is not worth it: with any layer in it the error over response is beyond {aim}."
    kept = " ".join(f"--int8-keep '{pattern}'" for pattern in found.keep)
    error, share = number(found.proposal.error, 2), percent(found.proposal.int8_flops)
    layers = f"{len(found.keep)} layer{'s' if len(found.keep) > 1 else ''}"
    return f"For an error over response of {error}, with {share} of all FLOPs in INT8, keep {layers}: {kept}"


def paying(report: RunReport) -> list[str]:
    """Return those of `gains` that tell of a gain; the others are among the warnings."""
    return [text for run in report.runs for pays, text in [_gain(report, run)] if pays and text]


def _gain(report: RunReport, run: EngineRun) -> tuple[bool, str]:
    """Return whether `run` pays, and the sentence that says so; no sentence where there is nothing to compare."""
    missed = [finding for finding in run.findings if finding.missed]
    if missed and run.precision != "fp32":
        return False, f"{run.precision.upper()} is not worth it on {run.place}: {missed[0]}."
    rivals = [other for other in _comparable(report, run) if _order(other) < _order(run)]
    if not rivals:
        return True, ""
    best = min(rivals, key=_median)
    ratio = _median(best) / _median(run)
    where = f"on {run.place} ({run.latency.machine})" if run.latency and run.latency.machine else f"on {run.place}"
    figures = f"{with_unit(_median(run), 'ms')} against {with_unit(_median(best), 'ms')}"
    name, rival = run.precision.upper(), best.precision.upper()
    if ratio >= WORTH_IT:
        return True, f"{name} pays {where}: {times(ratio)} as fast as {rival} ({figures})."
    if ratio >= 1 / WORTH_IT:
        return False, f"{name} is not worth it {where}: no faster than {rival} ({figures})."
    return False, f"{name} is not worth it {where}: it takes {times(1 / ratio)} the time of {rival} ({figures})."


def _order(run: EngineRun) -> int:
    return ("fp32", "fp16", "int8").index(run.precision)


def all_warnings(report: RunReport) -> list[str]:
    """Return the run's own warnings and those that its figures give rise to, without repeats."""
    found = list(report.warnings)
    for run in report.runs:
        found += _run_warnings(report, run)
    return list(dict.fromkeys(found))


def _run_warnings(report: RunReport, run: EngineRun) -> Iterator[str]:
    label = report.label(run)
    if run.not_run:
        yield f"{label}: built for {run.place}, not run here: {run.not_run}; its outputs and latency are unknown"
    for finding in run.findings:
        yield f"{label} at {finding}"
    for name, error in run.outputs.items():
        if error.mismatched:
            yield f"{label} at {name}: {count(error.mismatched)} of {count(error.elements)} elements differ"
        yield from (f"{label} at {name}: {remark}" for remark in error.remarks)
    yield from _coverage(label, "all", run.int8_flops_fraction, INT8_FLOPS_AIM)
    yield from _coverage(label, "the convolutions'", run.int8_conv_flops_fraction, INT8_CONV_FLOPS_AIM)
    pays, sentence = _gain(report, run)
    if not pays:
        yield sentence
    if run.latency:
        yield from (f"{label}: {remark}" for remark in run.latency.remarks)
    if run.details:
        yield from (f"{label}: {remark}" for remark in run.details.warnings)


def _coverage(label: str, what: str, fraction: float | None, aim: float) -> Iterator[str]:
    if fraction is not None and fraction < aim:
        yield f"{label}: only {percent(fraction)} of {what} FLOPs run in INT8 (aim: {compact(100 * aim)} %)"


def cached_latencies(report: RunReport) -> list[str]:
    """Return a sentence for each time and place at which latencies from the cache were measured."""
    places: dict[str, list[str]] = {}
    for run in report.runs:
        if run.latency and run.latency_cached:
            place = f"measured on {run.latency.machine}, {day(run.latency.measured_at)}"
            places.setdefault(place, []).append(report.label(run))
    return [f"Latency of {', '.join(labels)}: from an earlier run, {place}." for place, labels in places.items()]


def summary_lines(report: RunReport) -> list[str]:
    """Return the plain text that follows the table on a terminal: headline, what pays, notes, warnings."""
    proposal = [proposal_text(report.sensitivity)] if report.sensitivity else []
    lines = [headline(report), *paying(report), *cached_latencies(report), *proposal, *report.notes]
    return lines + [f"warning: {text}" for text in all_warnings(report)]
