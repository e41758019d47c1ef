"""`optframe passes`: the passes and pipelines there are, or all about one."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from optframe.commands import options as shared
from optframe.commands.plugins import wrapping_table
from optframe.pass_options import describe_type, option_default, option_types, show_value
from optframe.pipeline import Pipeline
from optframe.types import PassSpec, PipelineSpec

if TYPE_CHECKING:
    from optframe.passes import GraphPass
    from optframe.registry import Kind, Registry
    from optframe.session import Session

EXAMPLE_HEADING = "Example:\n"
"""What a pass's docstring has before its example: lines `before:` and `after:`, indented."""


def passes(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A pass or pipeline to explain.")] = None,
    as_json: shared.AsJson = False,
) -> None:
    """List passes and pipelines, or explain the one called NAME: what it does, its options, its place in the order."""
    session: Session = context.obj
    if name is None:
        rows = _all_steps(session.registry)
        session.print_json(rows) if as_json else session.console.print(_table(rows))
        return
    facts = step_facts(session.registry, name)
    session.print_json(facts) if as_json else session.console.print(_page(facts))


def step_facts(registry: Registry, name: str) -> dict[str, Any]:
    """Return all about the pass or pipeline `name`, ready for JSON."""
    step = registry.step(name)
    facts = _head(registry, step)
    if isinstance(step, PipelineSpec):
        return {**facts, "text": step.text, "expanded": str(Pipeline.parse(step.text, registry))}
    return {**facts, **_pass_facts(registry.load_pass(name))}


def _all_steps(registry: Registry) -> list[dict[str, Any]]:
    steps: list[PassSpec | PipelineSpec] = [*registry.passes(), *registry.pipelines()]
    return [_head(registry, step) for step in steps]


def _head(registry: Registry, step: PassSpec | PipelineSpec) -> dict[str, Any]:
    kind: Kind = "pass" if isinstance(step, PassSpec) else "pipeline"
    claim = registry.contribution(kind, step.name)
    return {"name": step.name, "kind": kind, "summary": step.summary} | {
        key: getattr(claim, key) for key in ("plugin", "distribution", "version")
    }


def _pass_facts(cls: type[GraphPass]) -> dict[str, Any]:
    kinds = option_types(cls)
    own_doc = "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else cls.__doc__ or ""  # dataclass's stopgap
    doc, _, example = inspect.cleandoc(own_doc).partition(EXAMPLE_HEADING)
    return {
        "doc": doc.rstrip(),
        "example": inspect.cleandoc(f"\n{example}"),
        "options": [_option(field, kinds[field.name]) for field in dataclasses.fields(cls) if field.init],
        "after": list(cls.after),
        "before": list(cls.before),
        "dialect": cls.dialect,
        "domains": list(cls.domains),
        "target": f"{cls.__module__}:{cls.__qualname__}",
    }


def _option(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    return {"name": field.name, "type": describe_type(kind), "default": show_value(kind, option_default(field))}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = wrapping_table(None, "name", "kind", "summary", "plugin")
    for row in rows:
        table.add_row(*(escape(row[column]) for column in ("name", "kind", "summary", "plugin")))
    return table


def _page(facts: dict[str, Any]) -> str:
    """Return what is known of a pass or pipeline, as text in rich's markup."""
    head = "[bold]{name}[/bold]: {kind} of plugin '{plugin}' ({distribution} {version})".format(**facts)
    sections = _pipeline_sections(facts) if facts["kind"] == "pipeline" else _pass_sections(facts)
    texts = [f"[bold]{title}[/bold]\n{escape(text)}" for title, text in sections.items()]
    return "\n\n".join([head, escape(facts["summary"]), *texts])


def _pipeline_sections(facts: dict[str, Any]) -> dict[str, str]:
    return {"text": facts["text"], "expanded": facts["expanded"]}


def _pass_sections(facts: dict[str, Any]) -> dict[str, str]:
    options = ["{name}: {type}; default {default}".format(**option) for option in facts["options"]]
    return {
        "what it does": facts["doc"] or "(its class has no docstring)",
        "example": facts["example"] or "(its docstring has no section 'Example:')",
        "options": "\n".join(options) or "none",
        "order": f"after: {', '.join(facts['after']) or 'any'}; before: {', '.join(facts['before']) or 'any'}",
        "dialect": facts["dialect"],
        "op domains it may bring in": ", ".join(facts["domains"]) or "none",
    }
