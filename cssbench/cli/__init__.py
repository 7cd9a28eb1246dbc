"""The command line. Torch and the rest are imported inside commands, so that `--help` and `list` answer at once.

Exit codes: 0 done, 1 a `--strict` check found something, 2 a user's mistake (one paragraph, no traceback), 130
and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import cssbench
from cssbench.cli import check, data, doctor, evaluate, listing, profile, published, run, scenario, score
from cssbench.cli.text import plain_lines
from cssbench.errors import CssbenchError

app = typer.Typer(
    name="cssbench",
    help="Continual semantic segmentation: run benchmark scenarios, add methods, report what is forgotten.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(scenario.app, name="scenario")
app.add_typer(data.app, name="data")
run.register(app)
evaluate.register(app)
listing.register(app)
check.register(app)
doctor.register(app)
profile.register(app)
score.register(app)
published.register(app)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(cssbench.__version__)
        raise typer.Exit


def main(words: list[str] | None = None) -> None:
    """Entry point of the `cssbench` script. words: in place of those of the process."""
    try:
        app(words)
    except CssbenchError as error:
        said = escape(plain_lines(str(error)))
        Console(stderr=True).print(f"[bold red]Error:[/bold red] {said}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        name = signal.Signals(number).name
        print(f"Stopped by {name}. `cssbench resume DIR` goes on with a run at its last checkpoint.", file=sys.stderr)
        sys.exit(128 + number)
