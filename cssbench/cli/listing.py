"""`cssbench list ...`: what is installed, and from which distribution. Imports no method, dataset or report, and of
models only our own, to count what they cost. Of a stranger's code nothing runs but the import of packages that hold
TOML files or protocols.

What is wrong with installed packages stands below the table, on stderr; it stops nothing.
"""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from itertools import takewhile
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cssbench import registry
from cssbench.cli.text import plain
from cssbench.errors import PluginError


class Kind(StrEnum):
    """Kinds of parts, in the plural."""

    methods = "methods"
    models = "models"
    presets = "presets"
    datasets = "datasets"
    scenarios = "scenarios"
    recipes = "recipes"
    suites = "suites"
    protocols = "protocols"
    reports = "reports"
    loggers = "loggers"


Rows = list[tuple[str, ...]]


def register(app: typer.Typer) -> None:
    app.command("list")(list_parts)


def list_parts(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what is installed: methods, models with their cost, scenarios, recipes, presets, suites, reports."""
    one = kind.value.removesuffix("s")
    headings: tuple[str, ...]
    if kind == Kind.models:
        headings, (rows, complaints) = (one, "from", "M parameters", "GFLOPs", "source"), _models()
    elif kind in (Kind.scenarios, Kind.recipes, Kind.presets, Kind.suites):
        headings, (rows, complaints) = (one, "from", "description"), _files(kind.value)
    elif kind == Kind.protocols:
        headings, (rows, complaints) = (one, "used by", "what it does"), _protocols()
    else:
        headings, (rows, complaints) = (one, "from", "where"), _parts(kind.value)
    table = Table(*headings, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(plain, row))
    Console(markup=False).print(table)
    if kind == Kind.models:
        typer.echo("At 512 px with 150 classes; one multiply-add = 1 FLOP. Models with their defaults, then presets.")
        if any(row[1] != registry.OWN for row in rows):
            typer.echo("- : a model of another package; `cssbench profile NAME` runs its code to count it.")
    warnings = Console(stderr=True, markup=False, highlight=False)
    for complaint in complaints:
        warnings.print("Warning:", style="bold yellow", end=" ")
        warnings.print(plain(complaint), soft_wrap=True)


def _parts(group: str) -> tuple[Rows, list[str]]:
    rows: Rows = [(part.name, part.distribution, part.entry_point.value) for part in registry.parts(group).values()]
    complaints = registry.catalogue(group).complaints + registry.missing_modules(group)
    if group == "methods":
        more, wrong = _parts("namespaces")
        return rows + [(f"{name}:NAME", *rest) for name, *rest in more], complaints + wrong
    return rows, complaints


def _models() -> tuple[Rows, list[str]]:
    from cssbench import recipes
    from cssbench.profile import typical_cost

    rows: Rows = []
    complaints = _parts("models")[1] + registry.toml_catalogue("presets").complaints
    owners = {name: part.distribution for name, part in registry.parts("models").items()}
    ours = {name for name, owner in owners.items() if owner == registry.OWN}
    for name in (*owners, *recipes.known_presets()):
        owner = owners.get(name) or registry.toml_files("presets")[name][0]
        parameters = gflops = source = "-"
        try:
            if recipes.named_model(name)["name"] not in ours:  # building it would run a stranger's code
                rows.append((name, owner, parameters, gflops, source))
                continue
            count, cost = typical_cost(name)
            parameters, gflops = f"{count / 1e6:.1f}", "by image" if cost is None else f"{cost:.1f}"
            source = _source(name)
        except Exception as error:  # a stranger's preset may hold anything
            complaints.append(f"The model {name!r} of the distribution {owner!r} cannot be counted: {error}")
        rows.append((name, owner, parameters, gflops, source))
    return rows, complaints


def _source(name: str) -> str:
    """The sentence that follows "Source:" in a preset's header, or in the docstring of a model's module."""
    if name in registry.parts("models"):
        text = sys.modules[registry.load("models", name).__module__].__doc__ or ""
    else:
        header = registry.toml_files("presets")[name][1].read_text(encoding="utf-8").splitlines()
        text = "\n".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), header))
    _, _, after = re.sub(r"Sources:", "Source:", text).partition("Source: ")
    paragraph = " ".join(after.partition("\n\n")[0].split())
    return re.split(r"(?<!al)\.(?: |$)|: ", paragraph)[0] or "-"


def _files(group: str) -> tuple[Rows, list[str]]:
    rows: Rows = []
    unreadable = []
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
    rows: Rows = [(p.id, p.used_by, p.summary) for p in found.found.values()]
    return rows, found.complaints
