"""What the speed measurements share: two things timed in turns, one row per claim, one table per machine.

Each script measures what its first line says and is run as `python bench/SCRIPT.py [--device cuda] [--csv FILE]`;
`make bench` runs them all. Times are medians in turns (`cssbench.profile.latency`), so that a slow minute of a shared
machine falls on both; only ratios are claims.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rows import Row, write_csv

from cssbench.profile import latency, machine, usable_device
from cssbench.provenance import code_state

RESULTS = Path(__file__).parent / "results"
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
        "machine": machine(torch.device(device)),
        "torch": torch.__version__,
        "commit": (code_state(Path(__file__).parent.parent / "cssbench")["commit"] or "")[:12],
    }


def main(description: str | None, measure: Callable[[str], Iterable[Row]]) -> None:
    """Command line of a script: prints the rows of `measure(device)` and writes them over those of the same claims."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<hardware>.csv")
    arguments = parser.parse_args()
    device = usable_device(arguments.device)
    torch.manual_seed(0)
    found = []
    for made in measure(device):
        print(f"{made['claim']}: {made['ratio']} (goal {made['goal'] or 'none'}; {made['baseline_ms']} and "
              f"{made['variant_ms']} ms)", flush=True)  # fmt: skip
        found.append(made)
    merge(arguments.csv or results_file(device), found)


def results_file(device: str) -> Path:
    """bench/results/<hardware>.csv, e.g. intel-r-xeon-r-processor-2-threads.csv"""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', machine(torch.device(device)).lower()).strip('-')}.csv"


def merge(path: Path, rows: list[Row]) -> None:
    """Write rows to the table: in place of an older row of the same claim, baseline and variant, or at its end."""
    kept: list[Row] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = list(csv.DictReader(file))
    table = {(r["claim"], r["baseline"], r["variant"]): r for r in [*kept, *rows]}
    write_csv(list(table.values()), path)
