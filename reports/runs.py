"""`cssbench.load_runs`: run folders as one tidy data frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from cssbench import protocol as protocols
from cssbench import scoring
from cssbench.errors import RunError
from cssbench.protocol import Protocol
from cssbench.results import RunFolder, StepRecord

COLUMNS = (
    "run", "method", "model", "dataset", "scenario", "mode", "seed", "oracle", "finished", "protocol", "step", "group",
    "classes", "miou", "images", "iterations", "train_seconds",
)  # fmt: skip
MEASURED = ("miou", "images", "iterations", "train_seconds")
Where = str | PathLike[str]


def load_runs(runs: Where | Iterable[Where], names: Sequence[str] | None = None) -> pd.DataFrame:
    """See `cssbench.load_runs`, which is this."""
    given = [runs] if isinstance(runs, str | PathLike) else list(runs)
    asked = [protocols.get(name) for name in names or protocols.DEFAULTS]
    rows = []
    for path in dict.fromkeys(path for where in given for path in run_folders(Path(where))):
        run = RunFolder.read(path)
        rows += [row for one in asked if names or scoring.can_score(run, one) for row in _rows(run, one)]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(MEASURED, float))


def run_folders(where: Path) -> list[Path]:
    """`where` itself, or every run folder below it, sorted. Raises RunError when there is none."""
    if (where / "config.toml").exists():
        return [where]
    found = sorted(file.parent for file in where.rglob("config.toml") if (file.parent / "provenance.json").exists())
    if not found:
        raise RunError(f"{where} is no run folder, and none lies below it. `cssbench run` makes one.")
    return found


def _rows(run: RunFolder, protocol: Protocol) -> Iterator[dict[str, Any]]:
    who = {
        "run": str(run.path),
        "method": run.config.method.name,
        "model": run.config.model.name,
        "dataset": run.scenario["dataset"],
        "scenario": run.scenario["name"],
        "mode": run.scenario["mode"],
        "seed": run.config.seed,
        "oracle": run.num_steps == 1,
        "finished": run.finished,
        "protocol": protocol.id,
    }
    for record in run.records():
        sizes = [len(group) for group in run.groups[: record.index + 1]]
        classes = {"all": sum(sizes), "base": sizes[0], "incremental": sum(sizes[1:])}
        classes |= {f"group{t}": size for t, size in enumerate(sizes)}
        scores = scoring.step_scores(run, record, protocol)
        for group, size in classes.items():
            yield who | {"step": record.index, "group": group, "classes": size, "miou": scores[group]} | _cost(record)


def _cost(record: StepRecord) -> dict[str, Any]:
    known = record.content
    seconds = known.get("seconds")
    return {
        "images": known.get("images"),
        "iterations": known.get("iterations"),
        "train_seconds": seconds.get("train") if isinstance(seconds, dict) else None,
    }
