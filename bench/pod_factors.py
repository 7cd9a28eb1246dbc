"""Which POD factors suit a ViT's features, measured on held-out training images. Command, for each choice of factors:

    cssbench run synthetic-10-5-plop-linear --data ROOT --out RUN --set data.holdout=0.15 --set evaluate.split=holdout \
        --set method.pod_factor=F --set method.pod_output_factor=O --set method.pod_normalise=N
    python bench/pod_factors.py RUN [RUN ...] --csv bench/results/pod_factors.csv

The reported images are not touched. `pod / own` is the logged POD term over the model's own terms, mean over the last
tenth of step 1: what a factor has to bring into range where features are not ResNet-101's.
"""

from __future__ import annotations

from pathlib import Path

from rows import Row, main

from cssbench import protocol, scoring
from cssbench.metrics import continual
from cssbench.results import RunFolder

PROTOCOL = protocol.get("mmseg150@1")


def measure(folder: Path) -> list[Row]:
    run = RunFolder.read(folder)
    if not run.finished or run.config.evaluate.split != "holdout":
        raise SystemExit(f"{folder} must be finished and evaluated on the holdout split.")
    method, steps = run.config.method.options, scoring.run_scores(run, PROTOCOL)
    loss = dict(run.records()[1].content["loss"])
    pod = loss.pop("pod")
    scores = {name: steps[-1][name] for name in ("base", "incremental", "all")} | {"avg": continual.average(steps)}
    row = {
        "scenario": run.scenario["name"],
        "model": run.config.model.name,
        "images": run.provenance["data"]["evaluated_images"],
        "pod_normalise": method["pod_normalise"],
        "pod_factor": method["pod_factor"],
        "pod_output_factor": method["pod_output_factor"],
        "pod / own": round(pod / sum(loss.values()), 3),
        "base after step 0": round(100 * (steps[0]["base"] or 0), 2),
    } | {name: round(100 * (value or 0), 2) for name, value in scores.items()}
    return [row]


if __name__ == "__main__":
    main(__doc__, measure)
