"""All speed measurements, one after the other, each in a process of its own: `make bench`. Command:

    python bench/all.py [--only SCRIPT] [--device cuda] [--out FILE]

Writes bench/results/<hardware>.csv and docs/speed.md. A script that fails does not stop the others; then the exit code
is 1. At CPU size all of them together take less than 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from speed import Row, line, read_csv, results_file

from cssbench.profile import usable_device

HERE = Path(__file__).parent


def scripts(folder: Path = HERE) -> list[str]:
    """Names of the files in `folder` that import `main` of `speed`, sorted."""
    return sorted(path.stem for path in folder.glob("*.py") if _measures(path))


def _measures(path: Path) -> bool:
    imports = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return any(node.module == "speed" and "main" in {name.name for name in node.names} for node in imports)


def run(names: Sequence[str], device: str, out: Path | None, folder: Path = HERE) -> list[str]:
    """Run scripts in turn; returns those that failed."""
    failed = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        start = time.monotonic()
        words = [sys.executable, folder / f"{name}.py", "--device", device, *(["--csv", out] if out else [])]
        code = subprocess.run(words).returncode
        if code:
            failed.append(name)
        print(
            f"[{number}/{len(names)}] {name}: {time.monotonic() - start:.0f} s{' FAILED' if code else ''}", flush=True
        )
    return failed


def summary(rows: Sequence[Row], failed: Sequence[str]) -> str:
    """The claims of the table, those short of their goal marked, and how many reach it."""
    marks = {"yes": "met  ", "no": "SHORT", "": "     "}
    lines = [f"{marks[str(made['met'])]} {line(made)}" for made in rows]
    goals = [made["met"] for made in rows if made["goal"]]
    lines.append(f"{goals.count('yes')} of {len(goals)} goals met")
    return "\n".join([*lines, *([f"failed: {', '.join(failed)}"] if failed else [])])


def main() -> int:
    known = scripts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=known, metavar="SCRIPT", help=", ".join(known))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of bench/results/<hardware>.csv and the page")
    arguments = parser.parse_args()
    names, device = arguments.only or known, usable_device(arguments.device)
    start = time.monotonic()
    failed = run(names, device, arguments.out)
    rows = [row for row in read_csv(arguments.out or results_file(device)) if row["script"] in names]
    print(f"{summary(rows, failed)}\n{time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
