"""`optframe doctor`: what this machine offers, which backends work on it, and the commands that mend the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from optframe import environment
from optframe.backend import BuildsElsewhere, NamesOptions
from optframe.commands import options as shared
from optframe.commands.plugins import problem_facts, problem_table, wrapping_table
from optframe.errors import EnvironmentLacks, OptframeError, describe

if TYPE_CHECKING:
    from optframe.registry import Registry
    from optframe.session import Session

NEEDED_BACKEND = "onnxruntime"
"""The backend that verification runs on: without it nothing works."""


def doctor(
    context: typer.Context,
    as_json: shared.AsJson = False,
) -> None:
    """Say what works on this machine: Python, libraries, GPU, each backend, each plugin; and what mends the rest.

    Exit status 0 if the backend onnxruntime works, on which everything is verified, else 3.
    """
    session: Session = context.obj
    backends = backend_facts(session.quiet_registry)
    facts = {**environment.describe(), "backends": backends}
    problems = session.take_problems()
    if as_json:
        session.print_json({**facts, "problems": [problem_facts(problem) for problem in problems]})
    else:
        session.console.print(_machine_table(facts), _library_table(facts), _backend_table(backends))
        if problems:
            session.console.print(problem_table(problems))
    if not any(backend["name"] == NEEDED_BACKEND and backend["works"] for backend in backends):
        raise EnvironmentLacks(f"backend {NEEDED_BACKEND}, which verifies everything, does not work here: see above")


def backend_facts(registry: Registry) -> list[dict[str, Any]]:
    """Return for each registered backend whether it works here, what is missing and what mends it, and its versions.

    `cannot_run` says why a backend that works builds engines here but cannot run them; `options` are its own, by name.
    """
    return [_facts(registry, spec.name) for spec in registry.backends()]


def _facts(registry: Registry, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": name,
        "works": False,
        "missing": None,
        "cannot_run": None,
        "versions": {},
        "options": [],
    }
    try:
        backend = registry.load_backend(name)
        facts["options"] = sorted(backend.option_names) if isinstance(backend, NamesOptions) else []
        facts["missing"] = backend.missing()
        if facts["missing"] is None:
            cannot_run = backend.cannot_run() if isinstance(backend, BuildsElsewhere) else None
            facts |= {"works": True, "cannot_run": cannot_run, "versions": dict(backend.versions())}
    except OptframeError as error:
        facts["missing"] = str(error)
    except Exception as error:  # of a stranger's backend; the others still want to be heard
        blame = registry.contribution("backend", name).blame
        facts["missing"] = f"its check raised {describe(error)}; tell the authors of {blame}"
    return facts


def _machine_table(facts: dict[str, Any]) -> Table:
    cpu, memory = facts["cpu"], facts["memory_gb"]
    rows = {
        "platform": facts["platform"],
        "Python": facts["python"],
        "CPU": f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads",
        "memory": f"{memory} GB" if memory else "unknown",
        "GPU": "\n".join(map(_gpu, facts["gpus"])) or "none that nvidia-smi knows of",
    }
    table = wrapping_table("This machine", "", "", show_header=False)
    for row in rows.items():
        table.add_row(*map(escape, row))
    return table


def _gpu(gpu: dict[str, str]) -> str:
    described = "{name}, {memory}, compute capability {compute_cap}, driver {driver_version}"
    return described.format(memory=gpu["memory.total"], **gpu)


def _library_table(facts: dict[str, Any]) -> Table:
    table = wrapping_table("Libraries", "name", "version")
    for row in facts["packages"].items():
        table.add_row(*map(escape, row))
    return table


def _backend_table(backends: list[dict[str, Any]]) -> Table:
    table = wrapping_table("Backends", "name", "works here", "with what; what is missing, and what mends it")
    for backend in backends:
        works = "no" if not backend["works"] else "builds" if backend["cannot_run"] else "yes"
        table.add_row(*map(escape, (backend["name"], works, _backend_remark(backend))))
    return table


def _backend_remark(backend: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in backend["versions"].items())
    reason = f"; its engines do not run here: {backend['cannot_run']}" if backend["cannot_run"] else ""
    options = f"\noptions: {', '.join(backend['options'])}" if backend["options"] else ""
    return str(backend["missing"] or versions + reason) + options
