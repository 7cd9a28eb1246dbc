"""What models of one budget reach, cost and take: mIoU, GFLOPs and latency of trained runs, side by side. Command:

    python bench/family.py RUN [RUN ...] [--images 16] [--repeats 9] [--csv bench/results/family.csv]

The runs learned the same classes of the same data. GFLOPs and latency are of the stored weights on the first evaluated
images, one at a time; the models take turns, so that a machine's slow minute falls on all of them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from rows import Row, write_csv

from cssbench import protocol, scoring
from cssbench.experiment import resolve
from cssbench.profile import count, images, latency, machine, scores, stored_model
from cssbench.results import RunFolder

PROTOCOL = protocol.get("mmseg150@1")


def all_of(model, inputs) -> None:
    for image in inputs:
        scores(model, image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    runs = {}
    for path in arguments.runs:
        there = RunFolder.read(path)
        settings = resolve(there.config)
        model = stored_model(there, settings, "cpu")
        data, chosen = settings.data, settings.evaluate
        inputs = images(
            model,
            data.root,
            there.scenario["dataset"],
            arguments.images,
            chosen.crop,
            "cpu",
            chosen.split,
            data.options,
        )
        cost = count(model, inputs)
        record = there.records()[-1]
        runs[path.name] = partial(all_of, model, inputs)
        rows.append(
            {
                "run": path.name,
                "model": settings.model.name,
                "p0": settings.model.options.get("p0", ""),
                "iterations": record.content["iterations"],
                "miou": f"{100 * scoring.step_scores(there, record, PROTOCOL)['all']:.2f}",
                "parameters_m": f"{cost.num_parameters / 1e6:.3f}",
                "gflops": f"{cost.gflops:.4f}",
            }
        )
    with torch.no_grad():
        seconds = latency(runs, arguments.repeats)
    slowest = max(seconds.values())
    for row in rows:
        took = seconds[str(row["run"])]
        row["ms"] = f"{1000 * took / arguments.images:.2f}"
        row["of_slowest"] = f"{took / slowest:.2f}"
        row["machine"] = machine(torch.device("cpu"))
        print(row)
    if arguments.csv:
        write_csv(rows, arguments.csv)


if __name__ == "__main__":
    main()
