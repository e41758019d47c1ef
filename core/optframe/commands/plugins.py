"""`optframe plugins`: who is plugged in, with what, and what went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from optframe.commands import options as shared
from optframe.registry import Registry, identifier, kind_of

if TYPE_CHECKING:
    from optframe.host import Owner, Plugin, PluginProblem
    from optframe.session import Session


def plugins(
    context: typer.Context,
    as_json: shared.AsJson = False,
) -> None:
    """List the installed plugins: where each comes from, what it contributes, and what is wrong with it.

    A plugin with problems never stops optframe; what it does right is used. Leave one out with
    `optframe --disable-plugin NAME ...`.
    """
    session: Session = context.obj
    registry, problems = session.quiet_registry, session.take_problems()
    if as_json:
        listed = [
            {**_owner(plugin), "state": plugin.state, "contributions": _offers(registry, plugin)}
            for plugin in registry.host.plugins
        ]
        session.print_json({"plugins": listed, "problems": [problem_facts(problem) for problem in problems]})
    else:
        session.console.print(_plugin_table(registry))
        if problems:
            session.console.print(problem_table(problems))


def _offers(registry: Registry, plugin: Plugin) -> dict[str, list[str]]:
    """Return what `plugin` contributes: kind -> names."""
    offers: dict[str, list[str]] = {}
    for claim in registry.contributions():
        if claim.plugin == plugin.plugin:
            offers.setdefault(kind_of(claim.spec), []).append(identifier(claim.spec))
    return offers


def _owner(owner: Owner) -> dict[str, Any]:
    return {"plugin": owner.plugin, "distribution": owner.distribution, "version": owner.version}


def problem_facts(problem: PluginProblem) -> dict[str, Any]:
    """Return `problem` ready for JSON."""
    return {**_owner(problem), "hook": problem.hook, "message": problem.message}


def _plugin_table(registry: Registry) -> Table:
    table = wrapping_table("Plugins", "plugin", "distribution", "version", "contributions")
    for plugin in registry.host.plugins:
        offers = [f"{kind}: {', '.join(names)}" for kind, names in _offers(registry, plugin).items()]
        shown = "\n".join(offers) if plugin.state == "loaded" else f"({plugin.state})"
        table.add_row(*map(escape, (plugin.plugin, plugin.distribution, plugin.version, shown)))
    return table


def problem_table(problems: list[PluginProblem]) -> Table:
    """Return a table of what plugins got wrong."""
    table = wrapping_table("Problems", "plugin", "problem")
    for problem in sorted(problems, key=lambda problem: (problem.plugin, problem.hook or "")):
        what = ": ".join(filter(None, [problem.hook, problem.message]))
        table.add_row(*map(escape, (f"{problem.plugin} ({problem.distribution} {problem.version})", what)))
    return table


def wrapping_table(title: str | None, *columns: str, show_header: bool = True) -> Table:
    """Return a table that breaks long words, since a name that is cut off is no name."""
    headers = [Column(name, overflow="fold") for name in columns]
    return Table(*headers, title=title, title_justify="left", show_header=show_header)
