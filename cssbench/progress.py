"""Progress bars for people (rich, on a terminal), lines for logs (elsewhere)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


def say(message: str) -> None:
    """One line of news on stderr."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def size_text(number: float) -> str:
    """Bytes for people: 1073741824 -> "1.0 GiB"."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


@contextmanager
def track(title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar with count and ETA; call the result once per item, with `note="..."` to show something beside it.

    Shows nothing when stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda note="": None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda note="": bar.update(task, advance=1, note=note)
