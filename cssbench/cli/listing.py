"""`cssbench list ...`: what is installed, and from which distribution. Imports no method, model, dataset or report.

What is wrong with installed packages stands below the table, on stderr; it stops nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cssbench import registry
from cssbench.errors import PluginError


class Kind(StrEnum):
    """Kinds of parts, in the plural."""

    methods = "methods"
    models = "models"
    datasets = "datasets"
    scenarios = "scenarios"
    recipes = "recipes"
    protocols = "protocols"
    reports = "reports"


Rows = list[tuple[str, str, str]]


def register(app: typer.Typer) -> None:
    app.command("list")(list_parts)


def list_parts(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List installed methods, models, datasets, scenarios, recipes, protocols or reports."""
    one = kind.value.removesuffix("s")
    if kind in (Kind.scenarios, Kind.recipes):
        headings, (rows, complaints) = (one, "from", "description"), _files(kind.value)
    elif kind == Kind.protocols:
        headings, (rows, complaints) = (one, "used by", "what it does"), _protocols()
    else:
        headings, (rows, complaints) = (one, "from", "where"), _parts(kind.value)
    table = Table(*headings, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(_plain, row))
    Console(markup=False).print(table)
    warnings = Console(stderr=True, markup=False, highlight=False)
    for complaint in complaints:
        warnings.print("Warning:", style="bold yellow", end=" ")
        warnings.print(_plain(complaint), soft_wrap=True)


def _parts(group: str) -> tuple[Rows, list[str]]:
    rows = [(part.name, part.distribution, part.entry_point.value) for part in registry.parts(group).values()]
    return rows, registry.catalogue(group).complaints + registry.missing_modules(group)


def _files(group: str) -> tuple[Rows, list[str]]:
    rows, unreadable = [], []
    for name, (distribution, file) in registry.toml_files(group).items():
        try:
            content = registry.read_toml(group, name)
            first = file.read_text(encoding="utf-8").partition("\n")[0]  # a recipe's header begins with what it is
            heading = first.removeprefix("#").strip() if first.startswith("#") else content.get("note", "")
            rows.append((name, distribution, str(content.get("description", heading))))
        except PluginError as error:
            unreadable.append(str(error))
    return rows, registry.toml_catalogue(group).complaints + unreadable


def _protocols() -> tuple[Rows, list[str]]:
    from cssbench.protocol import catalogue

    found = catalogue()
    return [(p.id, p.used_by, p.summary) for p in found.found.values()], found.complaints


def _plain(text: str) -> str:
    """In one line, without control characters: what strangers wrote is no command to the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
