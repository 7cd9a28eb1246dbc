"""`cssbench doctor`: is everything there, and what to do about what is not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cssbench.cli.text import plain

MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "broken": "[bold red]BROKEN[/bold red]"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Look at versions, devices, plug-ins, data roots, cache and disk, and say what to do. Exit code 1 when something
    required is broken."""
    from cssbench.doctor import examine

    found = examine()
    broken = [check for check in found if check.state == "broken"]
    if as_json:
        typer.echo(json.dumps({"broken": len(broken), "checks": [asdict(check) for check in found]}, indent=1))
    else:
        console = Console(highlight=False)
        for check in found:
            name = escape(plain(check.name))
            console.print(f"{MARKS[check.state]:<6} [bold]{name}[/bold]: {escape(plain(check.found))}", soft_wrap=True)
            if check.advice and check.state != "ok":
                console.print(f"       -> {escape(plain(check.advice))}", soft_wrap=True)
        hint = "`cssbench demo` is a first run; `cssbench --install-completion` completes names on Tab."
        console.print(hint if not broken else f"{len(broken)} broken: see above.", markup=False, soft_wrap=True)
    if broken:
        raise typer.Exit(1)
