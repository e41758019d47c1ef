"""`optframe cache`: what the cache of stages holds, and how to empty it."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime

import typer

from optframe.commands import options as shared
from optframe.session import Session
from optframe.store import Store

cache = typer.Typer(help="Show or empty the cache of stages.", no_args_is_help=True)


@cache.command()
def info(
    context: typer.Context,
    as_json: shared.AsJson = False,
) -> None:
    """Show where the cache is, how large it may grow, and what each stage keeps in it."""
    from rich.table import Table

    session: Session = context.obj
    store = Store()
    entries = store.entries()
    if as_json:
        rows = [{"stage": entry.stage, "key": entry.key, "bytes": entry.size, "used": entry.used} for entry in entries]
        session.print_json({"folder": str(store.root), "limit_bytes": store.limit_bytes, "entries": rows})
        return
    by_stage = defaultdict(list)
    for entry in entries:
        by_stage[entry.stage].append(entry)
    table = Table("stage", "entries", "size", "last used")
    for stage, kept in sorted(by_stage.items()):
        last = datetime.fromtimestamp(max(entry.used for entry in kept), UTC)
        table.add_row(stage, str(len(kept)), megabytes(sum(entry.size for entry in kept)), f"{last:%Y-%m-%d %H:%M} UTC")
    session.console.print(f"folder: {store.root}", soft_wrap=True)
    session.console.print(f"limit:  {megabytes(store.limit_bytes)}")
    session.console.print(table if entries else "empty")


@cache.command()
def clear(context: typer.Context) -> None:
    """Remove every entry; runs under way are not disturbed."""
    session: Session = context.obj
    count, size = Store().clear()
    session.console.print(f"removed {count} entries, {megabytes(size)}")


def megabytes(size: int) -> str:
    """Return a size in bytes as megabytes."""
    return f"{size / 1e6:,.1f} MB"
