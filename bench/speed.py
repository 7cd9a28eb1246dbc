"""What the speed measurements share: two things timed in turns, one row per claim, one table per machine.

Each script measures what its first line says and is run as `python bench/SCRIPT.py [--device cuda] [--csv FILE]`;
`make bench` runs them all (`bench/all.py`: a speed script is one that imports this file's `main`). Times are medians in
turns (`cssbench.profile.latency`), so that a slow minute of a shared machine falls on both; only ratios are claims.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rows import Row, write_csv

from cssbench.profile import latency, machine, usable_device
from cssbench.provenance import code_state, package_version

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "pillow")
Timed = tuple[str, float]  # what ran, and its seconds
Run = tuple[str, Callable[[], object]]


def compare(claim: str, goal: str, baseline: Run, variant: Run, device: str = "cpu", repeats: int = 7) -> Row:
    """Time two runs in turns. goal: see `row`."""
    seconds = latency({"baseline": baseline[1], "variant": variant[1]}, repeats, warm_up=1)
    found = (baseline[0], seconds["baseline"]), (variant[0], seconds["variant"])
    return row(claim, goal, *found, device=device, repeats=repeats)


def row(claim: str, goal: str, baseline: Timed, variant: Timed, device: str = "cpu", repeats: int = 1) -> Row:
    """One row of the table. claim: what is claimed of what, at which size.

    goal: "<= 0.37" (the ratio is variant / baseline: what it costs), ">= 5" (baseline / variant: how often as fast), or
    "" for a time without a goal (a cost too).
    """
    faster = goal.startswith(">=")
    ratio = baseline[1] / variant[1] if faster else variant[1] / baseline[1]
    bound = float(goal.split()[1]) if goal else ratio
    return {
        "claim": claim,
        "baseline": baseline[0],
        "baseline_ms": f"{1000 * baseline[1]:.4g}",
        "variant": variant[0],
        "variant_ms": f"{1000 * variant[1]:.4g}",
        "ratio": f"{ratio:.3g}",
        "goal": goal,
        "met": "" if not goal else "yes" if (ratio >= bound if faster else ratio <= bound) else "no",
        "repeats": repeats,
        **conditions(device),
    }


def conditions(device: str) -> Row:
    """What a number depends on beside what was measured: the last columns of every table."""
    known = {name: package_version(name) for name in PACKAGES}
    return {
        "machine": machine(torch.device(device)),
        "versions": ", ".join(f"{name} {version}" for name, version in known.items() if version),
        "commit": (code_state(Path(__file__).parent.parent / "cssbench")["commit"] or "")[:12],
    }


def main(description: str | None, measure: Callable[[str], Iterable[Row]], kind: str = "") -> Path:
    """Command line of a script: prints the rows of `measure(device)`, and writes them in place of those that the script
    wrote before. Returns the file. Where it is a committed one, docs/speed.md follows.

    kind: of a table with other columns than `row` makes, <hardware>-<kind>.csv.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<hardware>.csv, and the page docs/speed.md")
    arguments = parser.parse_args()
    device = usable_device(arguments.device)
    torch.manual_seed(0)
    path = of_kind(arguments.csv or results_file(device), kind)  # before a script changes the number of threads
    script, found = Path(sys.argv[0]).stem, []
    for made in measure(device):
        print(line(made), flush=True)
        found.append({"script": script, **made})
    merge(path, found)
    if path.parent == RESULTS:
        import page  # imports this file

        page.update()
    return path


def line(made: Row) -> str:
    """A row on the screen."""
    if "claim" in made:
        times = f"{made['baseline_ms']} and {made['variant_ms']} ms"
        what = f"{made['claim']}: {made['variant']} against {made['baseline']}"
        return f"{what}: {made['ratio']} (goal {made['goal'] or 'none'}; {times})"
    return ", ".join(f"{name} {value}" for name, value in made.items() if name not in conditions("cpu") and value != "")


def of_kind(path: Path, kind: str) -> Path:
    """cpu.csv, "throughput" -> cpu-throughput.csv"""
    return path.with_stem(f"{path.stem}-{kind}") if kind else path


def results_file(device: str) -> Path:
    """bench/results/<hardware>.csv, e.g. intel-r-xeon-r-processor-2-threads.csv"""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', machine(torch.device(device)).lower()).strip('-')}.csv"


def read_csv(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merge(path: Path, rows: list[Row]) -> None:
    """Write rows to the table: in place of those of the same script, or at its end."""
    old = read_csv(path)
    scripts = {made["script"] for made in rows}
    before = next((n for n, made in enumerate(old) if made["script"] in scripts), len(old))
    first, last = ([made for made in part if made["script"] not in scripts] for part in (old[:before], old[before:]))
    write_csv([*first, *rows, *last], path)
