"""The command line. Torch and the rest are imported inside commands, so that `--help` and `list` answer at once.

Exit codes: 0 done, 1 a `--strict` check found something, 2 a user's mistake (one paragraph, no traceback), 130
and 143 stopped by SIGINT and SIGTERM. Several processes of one run end with one message, of the one that failed first.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import cssbench
from cssbench import processes
from cssbench.cli import (
    check,
    data,
    doctor,
    evaluate,
    export,
    listing,
    profile,
    published,
    run,
    scenario,
    score,
    suite,
)
from cssbench.cli.text import plain_lines
from cssbench.errors import CssbenchError
from cssbench.interrupt import Interrupted

app = typer.Typer(
    name="cssbench",
    help="Continual semantic segmentation: run benchmark scenarios, add methods, report what is forgotten.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(scenario.app, name="scenario")
app.add_typer(data.app, name="data")
app.add_typer(suite.app, name="suite")
run.register(app)
evaluate.register(app)
export.register(app)
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
        with _first_speaks():
            app(words)
    except CssbenchError as error:
        if processes.first_to_fail():
            said = f"[bold red]Error:[/bold red] {escape(plain_lines(str(error)))}"
            Console(stderr=True).print(said, soft_wrap=True, highlight=False)
        processes.leave(2)
    except Interrupted as stop:
        if processes.first_to_fail():
            remedy = "`cssbench resume DIR` goes on with a run at its last checkpoint."
            print(f"Stopped by {signal.Signals(stop.number).name}. {remedy}", file=sys.stderr)
        processes.leave(128 + stop.number)
    except Exception:
        if processes.world() == 1:
            raise
        if processes.first_to_fail():
            traceback.print_exc()
        processes.leave(1)


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Of several processes of one run only the first prints, until one fails."""
    if not processes.rank():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
