"""The tables of docs/speed.md, between its markers, from bench/results. Command:

    python bench/page.py

Every speed script does this when it has written its table; by hand it is needed after a table was edited or deleted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from speed import RESULTS, Row, read_csv

PAGE = RESULTS.parents[1] / "docs" / "speed.md"
MARKERS = "<!-- made by bench/page.py -->", "<!-- end -->"
CLAIMS = {
    "claim": "claim",
    "goal": "goal",
    "ratio": "measured",
    "met": "met",
    "baseline": "baseline",
    "baseline_ms": "ms",
    "variant": "variant",
    "variant_ms": "ms",
    "script": "script",
}
THROUGHPUT = {
    "model": "model",
    "mode": "mode",
    "batch": "batch",
    "images_per_s": "images/s",
    "of_matmul_peak": "of the measured matmul peak",
    "peak_memory_gib": "peak memory, GiB",
    "data_wait": "data wait",
    "workers": "workers",
    "precision": "precision",
}
NUMBERS = {"goal", "ratio", "baseline_ms", "variant_ms", "batch", "images_per_s", "of_matmul_peak", "peak_memory_gib",
           "data_wait", "workers"}  # fmt: skip
NONE = "No machine has been measured yet.\n"


def update(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write the tables into the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    page.write_text(f"{before}{MARKERS[0]}\n\n{tables(results)}\n{MARKERS[1]}{after}", encoding="utf-8")


def tables(results: Path = RESULTS) -> str:
    """Markdown: of every machine its claims, then its throughput. A table of ours has a column `script`."""
    found = {path: read_csv(path) for path in sorted(results.glob("*.csv"))}
    ours = {path: rows for path, rows in found.items() if rows and "script" in rows[0]}
    parts = [claims(path, rows) for path, rows in ours.items() if "claim" in rows[0]]
    parts += [throughput(path, rows) for path, rows in ours.items() if "images_per_s" in rows[0]]
    return "\n".join(parts) or NONE


def claims(path: Path, rows: Sequence[Row]) -> str:
    goals = [row["met"] for row in rows if row["goal"]]
    said = f"{goals.count('yes')} of {len(goals)} goals met."
    return section(path, rows, "goals and measured ratios", said, CLAIMS)


def throughput(path: Path, rows: Sequence[Row]) -> str:
    peaks = sorted(float(str(row["matmul_peak_tflops"])) for row in rows)
    return section(path, rows, "throughput", f"Matmul peak: {peaks[0]:g} to {peaks[-1]:g} TFLOP/s.", THROUGHPUT)


def section(path: Path, rows: Sequence[Row], what: str, said: str, columns: dict[str, str]) -> str:
    """One table under its machine's name. said: a sentence before the versions."""
    versions = "; ".join(dict.fromkeys(f"{row['versions']}, commit {row['commit'] or 'unknown'}" for row in rows))
    link = f"[{path.name}](../bench/results/{path.name})"
    machine = Counter(str(row["machine"]) for row in rows).most_common(1)[0][0]  # a script may use fewer threads
    head = f"### {machine}: {what}\n\n{said} {link}: {versions}.\n\n"
    lines = [list(columns.values()), ["---:" if name in NUMBERS else "---" for name in columns]]
    lines += [[str(row[name]) for name in columns] for row in rows]
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    update()
