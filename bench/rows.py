"""What the measuring scripts share: run folders in, one CSV out."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

Row = dict[str, object]


def main(description: str | None, measure: Callable[[Path], list[Row]]) -> None:
    """Command line `RUN [RUN ...] [--csv FILE]`: the rows of every run, printed and written."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.runs:
        for row in measure(folder):
            print(row, flush=True)
            rows.append(row)
    if arguments.csv:
        write_csv(rows, arguments.csv)


def write_csv(rows: list[Row], path: Path) -> None:
    """The rows under the keys of the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
