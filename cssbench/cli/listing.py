"""`cssbench list ...`: what is installed, and from which distribution. Imports none of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cssbench import registry


class Kind(StrEnum):
    """Kinds of parts, in the plural."""

    methods = "methods"
    models = "models"
    datasets = "datasets"
    scenarios = "scenarios"
    recipes = "recipes"
    protocols = "protocols"
    reports = "reports"


def register(app: typer.Typer) -> None:
    app.command("list")(list_parts)


def list_parts(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List installed methods, models, datasets, scenarios, recipes, protocols or reports."""
    table = Table(box=None, header_style="bold")
    if kind in (Kind.scenarios, Kind.recipes):
        table.add_column(kind.value.removesuffix("s"))
        table.add_column("from")
        table.add_column("description")
        for name, (distribution, _) in registry.toml_files(kind.value).items():
            content = registry.read_toml(kind.value, name)
            table.add_row(name, distribution, str(content.get("description") or content.get("note") or ""))
    elif kind == Kind.protocols:
        from cssbench.protocol import protocols

        for heading in ("protocol", "used by", "what it does"):
            table.add_column(heading)
        for protocol in protocols().values():
            table.add_row(protocol.id, protocol.used_by, protocol.summary)
    else:
        for heading in (kind.value.removesuffix("s"), "from", "where"):
            table.add_column(heading)
        for part in registry.parts(kind.value).values():
            table.add_row(part.name, part.distribution, part.entry_point.value)
    Console().print(table)
