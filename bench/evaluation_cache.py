"""What the evaluations of an 11-step scenario cost, in full passes of the last model over the same images. Command:

    python bench/evaluation_cache.py [--device cuda] [--csv FILE]

ADE20K 100-5 as SegViT-CL evaluates it: ViT-B/16 at 512 px, a head of 100 classes and ten of 5, random weights and
image. After every step it is evaluated: live, and with `cache.evaluation` (files written and read included), by turns;
the sum over the steps of each step's median. Both give the same matrices, which is checked.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from speed import Row, main, row

from cssbench.config import EvaluateConfig, TrainConfig
from cssbench.data.camvid import CamVid
from cssbench.engine import make_fabric
from cssbench.evaluate import EvaluationDataset, evaluate
from cssbench.features import FeatureStore
from cssbench.frozen import RememberingModel
from cssbench.profile import build_model, cut_steps
from cssbench.scenario import Scenario

SIZE, CLASSES, TURNS = 512, 150, 3
OPTIONS = {"backbone": {"name": "vit_base_patch16_384", "image_size": SIZE}}


class Noise(CamVid):
    """Images and labels without files."""

    def __init__(self) -> None:
        self.name, self.classes = "noise", tuple(map(str, range(CLASSES)))

    def pair(self, split: str, stem: str) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(int(stem))
        label = rng.integers(0, CLASSES + 1, (SIZE // 32, SIZE // 32), np.uint8).repeat(32, 0).repeat(32, 1)
        return rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8), label


def measure(device: str) -> Iterator[Row]:
    fabric = make_fabric(TrainConfig(iterations=1, accelerator=device))  # type: ignore[arg-type]
    model = build_model("segvit", OPTIONS, "cpu").to(fabric.device)
    steps = cut_steps("100-5", CLASSES)
    scene = Scenario("bench", "none", groups=tuple(step.new for step in steps))
    view = EvaluationDataset(Noise(), "val", ["0"], EvaluateConfig(geometries=["full"]), model)
    live, cached = [], []
    with ExitStack() as stack:
        # a store for every turn, for after the first one a store is full
        stores = [stack.enter_context(FeatureStore(Path(folder), "bench", 10.0)) for folder in folders(stack)]
        for step in steps:
            model.grow(step)
            keep = step is not steps[-1]
            seconds: dict[str, list[float]] = {"live": [], "cached": []}
            for store in stores:
                remembering = RememberingModel(model, store, keep, len(steps))
                alone, found = timed(fabric, model, view, scene, step)
                again, taken = timed(fabric, model, view, scene, step, remembering)
                assert all((found[key] == taken[key]).all() for key in found), "the cache must not change a count"
                seconds["live"].append(alone)
                seconds["cached"].append(again)
            live.append(median(seconds["live"]))
            cached.append(median(seconds["cached"]))
    one = "one full pass of the last model", live[-1]
    what = "evaluations of an 11-step scenario, ViT-B/16 512, in full passes"
    yield row(f"{what}: cache.evaluation", "<= 2.5", one, ("11 evaluations, cached", sum(cached)), device, TURNS)
    yield row(f"{what}: live", "", one, ("11 evaluations, live", sum(live)), device, TURNS)


def folders(stack: ExitStack) -> list[str]:
    return [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(TURNS)]


def timed(fabric: Any, model: Any, view: Any, scene: Scenario, step: Any, forward: Any = None) -> tuple[float, Any]:
    """Seconds, and matrices: these lie on the CPU, so that a GPU has finished."""
    start = time.perf_counter()
    matrices, _ = evaluate(fabric, model, view, scene, step, forward=forward)
    return time.perf_counter() - start, matrices


if __name__ == "__main__":
    main(__doc__, measure)
