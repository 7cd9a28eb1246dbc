"""Where do the queries of Shrunk's up-sampling look? Command:

    python bench/upsampling.py RUN [RUN ...] [--csv bench/results/upsampling.csv]

Distance, in cells of the token grid, between a query's own cell and the mean place that it attends to in the shallow
tap (first layer, the heads' mean similarity), mean over queries and four images; and what it would be if queries
attended to all cells alike. `positions`: deviation of the position embeddings over that of tokens entering block 1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rows import Row, main
from torch import Tensor

from cssbench import protocol, scoring
from cssbench.experiment import resolve
from cssbench.profile import images, stored_model
from cssbench.results import RunFolder

PROTOCOL = protocol.get("mmseg150@1")


def distance(attention: Tensor, grid: tuple[int, int]) -> tuple[float, float]:
    """attention: (queries, cells), rows sum to 1, both over the same grid."""
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
    seen = (attention @ places - places).norm(dim=1).mean()
    return float(seen), float((places.mean(0) - places).norm(dim=1).mean())


@torch.no_grad()
def measure(folder: Path) -> list[Row]:
    run = RunFolder.read(folder)
    settings = resolve(run.config)
    model = stored_model(run, settings, "cpu")
    found: list[tuple[float, float]] = []
    side, data = settings.evaluate.crop, settings.data
    grid = model.backbone.grid(side, side)

    def look(module, inputs, output) -> None:
        found.append(distance(output[1][0].softmax(-1), grid))

    hook = model.upsampler.stages[0].layers[0].cross_attention.register_forward_hook(look)
    shares = []
    for image in images(
        model, data.root, run.scenario["dataset"], 4, side, "cpu", settings.evaluate.split, data.options
    ):
        model(image)
        tokens = model.backbone.embed(image)
        shares.append(float(model.backbone.vit.pos_embed.std() / tokens.std()))
    hook.remove()
    score = scoring.step_scores(run, run.records()[-1], PROTOCOL)["all"]
    seen, uniform = (sum(values) / len(found) for values in zip(*found, strict=True))
    return [
        {
            "run": folder.name,
            "start": settings.model.options["upsample_start"],
            "down_layer": settings.model.options["down_layer"],
            "iterations": run.records()[-1].content["iterations"],
            "miou": f"{100 * score:.2f}",
            "cells_away": f"{seen:.2f}",
            "cells_away_uniform": f"{uniform:.2f}",
            "positions": f"{sum(shares) / len(shares):.3f}",
        }
    ]


if __name__ == "__main__":
    main(__doc__, measure)
