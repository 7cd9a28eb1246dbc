"""Do finished heads ever say anything else? Command:

    python bench/old_heads.py RUN [RUN ...] [--csv bench/results/old_heads.csv]

The scores of all classes seen so far, after every step, on six evaluated images: are those of old classes the same, to
the last bit, as after the step before? Under SegViT-CL they must be.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rows import Row, main
from torch import Tensor

from cssbench import checkpoint
from cssbench.experiment import resolve
from cssbench.profile import build_model, images, scores
from cssbench.results import RunFolder
from cssbench.scenario import Step


@torch.no_grad()
def measure(folder: Path) -> list[Row]:
    run = RunFolder.read(folder)
    settings = resolve(run.config)
    data, options = settings.data, settings.model.options
    model = build_model(settings.model.name, options, "cpu")
    seen: tuple[int, ...] = ()
    before: list[Tensor] = []
    equal, largest = True, 0.0
    for record, new in zip(run.records(), run.groups, strict=False):
        model.grow(Step(record.index, tuple(new), seen))
        seen = (*seen, *new)
        checkpoint.load_weights(run.weights(record.index)[1], model)
        shown = images(
            model.eval(), data.root, run.scenario["dataset"], 6, settings.evaluate.crop, "cpu", settings.evaluate.split,
            data.options,
        )  # fmt: skip
        now = [scores(model, image) for image in shown]
        for old, found in zip(before, now, strict=False):
            equal &= torch.equal(old, found[:, : old.shape[1]])
            largest = max(largest, float((old - found[:, : old.shape[1]]).abs().max()))
        before = now
    return [
        {
            "run": folder.name,
            "method": settings.method.name,
            "model": settings.model.name,
            "steps": len(run.records()),
            "bit_equal": equal,
            "largest_change": f"{largest:.3g}",
        }
    ]


if __name__ == "__main__":
    main(__doc__, measure)
