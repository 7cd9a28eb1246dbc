"""Suites whose runs are scripts of a moment, so that starting, failing and stopping can be tested without training."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from cssbench.suites.attempt import Attempt
from cssbench.suites.folder import Entry, SuiteFolder

# What stands for `cssbench run`: argv is the run folder, the words after it what it shall do, one for each attempt.
SCRIPT = textwrap.dedent("""
    import json, os, signal, sys, time
    from pathlib import Path
    out, plan = Path(sys.argv[1]), sys.argv[2].split(",")
    out.mkdir(parents=True, exist_ok=True)
    tries = out / "tries"
    number = int(tries.read_text()) if tries.exists() else 0
    tries.write_text(str(number + 1))
    order = out.parents[1] / "order.txt"
    with order.open("a") as file:
        file.write(f"{out.name}\\n")
    act = plan[min(number, len(plan) - 1)]
    def step(index):
        folder = out / "steps" / f"{index:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").write_text("{}")
    def asked(*_):
        step(0)
        sys.exit(143)
    signal.signal(signal.SIGTERM, asked)
    if act == "fail":
        sys.exit("some context\\nError: no [bold]luck[/bold]\\x1b[2J today")
    if act == "die":
        step(0)
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "wait":
        (out / "waiting").touch()
        time.sleep(120)
    step(0)
    step(1)
""")


class Scripted(Attempt):
    """An attempt whose process is `SCRIPT`, with what plans.json in the suite's folder says of the run."""

    def command(self, suite: SuiteFolder, entry: Entry) -> list[str]:
        plans = json.loads((suite.path / "plans.json").read_text())
        return [sys.executable, "-c", SCRIPT, str(suite.run(entry.id)), plans.get(entry.id, "go")]


def make(path: Path, runs: dict[str, tuple[str, str]], iterations: tuple[int, ...] = (10, 5)) -> SuiteFolder:
    """A suite in `path`; runs: name -> (its base step, what its attempts do, with commas)."""
    entries = [
        Entry(name, "mib", "camvid-6-5", "vit-linear", 0, "native", False, base, iterations, 1)
        for name, (base, _) in runs.items()
    ]
    suite = SuiteFolder(path.resolve(), "made", "", str(path), "shared", None, entries)
    suite.write(dict.fromkeys(runs, "# nothing\n"))
    (path / "plans.json").write_text(json.dumps({name: acts for name, (_, acts) in runs.items()}))
    return suite
