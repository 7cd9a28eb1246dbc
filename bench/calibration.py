"""Which calibration of SegViT-CL's heads keeps most, measured on held-out training images. Command:

    cssbench run RECIPE --data ROOT --out RUN --set data.holdout=0.15 --set evaluate.split=holdout
    python bench/calibration.py RUN [RUN ...] --csv bench/results/calibration.csv

The run must be finished and have `method.calibration = "none"`: training does not depend on the calibration, so each
choice is applied to the stored weights and the held-out images are evaluated again. The reported set is not touched.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rows import Row, main

from cssbench import checkpoint, protocol
from cssbench.baselines.segvit_cl import fit_scale, held_out_margins, prior_shift
from cssbench.data.step_dataset import HoldoutDataset, make_loader
from cssbench.evaluate import EvaluationDataset, evaluate
from cssbench.experiment import Experiment, build_experiment
from cssbench.method import StepContext
from cssbench.results import RunFolder

PROTOCOL = protocol.get("mmseg150@1")


def calibrate(made: Experiment, choice: str, ctxs: list[StepContext]) -> None:
    """Set every head's buffers as `SegViTCL.end_step` would have done with `calibration = choice`."""
    for head, ctx in zip(made.model.heads, ctxs, strict=True):
        head.class_shift.zero_()
        head.class_scale.fill_(1.0)
        if choice in ("prior", "prior+temperature"):
            images, positions = ctx.images, ctx.step.new_positions
            head.class_shift.copy_(
                torch.tensor([prior_shift(ctx.class_images[p], images[-1], sum(images)) for p in positions])
            )
        if choice in ("temperature", "prior+temperature"):
            heads = made.model.heads
            made.model.heads = heads[: ctx.step.index + 1]  # `held_out_margins` looks at the newest head
            head.class_scale.copy_(fit_scale(*held_out_margins(ctx)))
            made.model.heads = heads


def contexts(made: Experiment) -> list[StepContext]:
    found = []
    for step in made.scenario.steps:
        table = made.scenario.train_table(step)
        held = HoldoutDataset(made.data, made.holdout_stems[step.index], table, made.transform)
        batches = [[i] for i in range(len(held))]
        found.append(
            StepContext(
                scenario=made.scenario,
                step=step,
                model=made.model,
                previous=None,
                train_loader=[],
                holdout_loader=make_loader(held, batches, 0),
                device=made.fabric.device,
                images=tuple(len(s) for s in made.train_stems[: step.index + 1]),
                class_images=made.class_images(step),
                log=lambda name, value: None,
            )
        )
    return found


def measure(folder: Path) -> list[Row]:
    there = RunFolder.read(folder)
    if not there.finished or there.config.evaluate.split != "holdout":
        raise SystemExit(f"{folder} must be finished and evaluated on the holdout split.")
    made = build_experiment(there.config, folder)
    for step in made.scenario.steps:
        made.model.grow(step)
    last = made.scenario.steps[-1]
    checkpoint.load_weights(there.step_folder(last.index) / "model.safetensors", made.model)
    made.model.eval()
    ctxs, rows = contexts(made), []
    data = EvaluationDataset(made.data, "holdout", made.evaluation_stems(last), made.config.evaluate, made.model)
    for choice in ("none", "prior", "temperature", "prior+temperature"):
        with torch.no_grad():
            calibrate(made, choice, ctxs)
        matrices, _ = evaluate(made.fabric, made.model, data, made.scenario, last, alone=[frozenset(data.stems)])
        scores = PROTOCOL.scores(matrices[PROTOCOL.key], made.scenario.groups, last.index)
        alone = PROTOCOL.ious(matrices[f"{PROTOCOL.key}.upto0"], made.scenario.groups[0])
        row = {name: round(100 * (scores[name] or 0), 2) for name in ("base", "incremental", "all")}
        base_alone = 100 * sum(alone.values()) / len(alone)
        rows.append(
            {"run": there.name, "scenario": there.scenario["name"], "images": len(data), "calibration": choice}
            | row
            | {"base lost to competition": round(base_alone - row["base"], 2)}
        )
    return rows


if __name__ == "__main__":
    main(__doc__, measure)
