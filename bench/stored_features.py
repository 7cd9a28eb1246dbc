"""What stored features change of a run: seconds of the later steps, and the final scores. Command:

    python bench/stored_features.py RUN [RUN ...] [--csv bench/results/stored_features.csv]

RUN: run folders with and without `cache.features` and `cache.evaluation`, as their records tell. Seconds
are of the clock, summed over the steps t > 0; scores those of mmseg150@1 after the last step, in percent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rows import Row, main

from cssbench import protocol, scoring
from cssbench.results import RunFolder


def measure(folder: Path) -> list[Row]:
    run = RunFolder.read(folder)
    later = [record.content for record in run.records()[1:]]
    scores = scoring.run_scores(run, protocol.get("mmseg150@1"), run.groups)[-1]

    def total(section: str, name: str) -> int:
        return sum(content.get(section, {}).get(name, 0) for content in later)

    def seconds(name: str) -> str:
        return f"{sum(content['seconds'][name] for content in later):.0f}"

    config = run.config
    found: dict[str, Any] = {
        "run": folder.name,
        "scenario": run.scenario["name"],
        "seed": config.seed,
        "iterations": later[-1]["iterations"],
        "views": config.augment.later_views or "ever new",
        "features": config.cache.dtype if config.cache.features else "live",
        "views_encoded": total("cache", "written"),
        "views_read": total("cache", "read"),
        "train_s": seconds("train"),
        "evaluate_s": seconds("evaluate"),
        "base": f"{100 * (scores['base'] or 0):.2f}",
        "all": f"{100 * (scores['all'] or 0):.2f}",
        "commit": (run.provenance["commit"] or "")[:12],
    }
    return [found]


if __name__ == "__main__":
    main(__doc__, measure)
