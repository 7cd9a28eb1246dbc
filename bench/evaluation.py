"""Scores to predictions a few classes at a time, against all classes at once as before. Command:

    python bench/evaluation.py [--device cuda] [--csv FILE]

ViT-B sizes: 150 classes on 32 x 32 tokens, predicted at 512 x 512 (the crop) and at 683 x 512 (the whole label); one
head of 150, and the 11 heads of 100-5 with the predictions of every step's outputs alone (the last evaluation's).
Masks are random and a third of the classes present; heads do not run: what is timed is resizing, product and argmax.
Both forms give the same class ids, which is checked. Memory rows are the largest sum of tensors that were alive at
once, in MiB in place of ms (CPU: as PyTorch's profiler counts allocations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from speed import Row, compare, main, row
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cssbench.models.atm import ATMConfig, ATMHead, MaskPrediction
from cssbench.models.segvit import MaskOutput
from cssbench.predict import Predictor, WholeScores, resized
from cssbench.profile import build_model, cut_steps
from cssbench.scenario import Scenario

SIDE, GRID, CLASSES, WIDTH = 512, 32, 150, 384
CHUNK = 16
Predictions = dict[int, dict[str, Tensor]]


def made_output(scene: Scenario, device: str) -> MaskOutput:
    """What a forward pass would leave: random masks of the size of a trained model's."""
    config = ATMConfig(width=WIDTH, layers=1)
    heads, stages = [], []
    for group in scene.groups:
        heads.append(ATMHead(len(group), WIDTH, 1, config).to(device))
        coarse = 4 * torch.randn(1, len(group), GRID // 4, GRID // 4, device=device)
        masks = F.interpolate(coarse, (GRID, GRID), mode="bilinear") + torch.randn(1, 1, GRID, GRID, device=device)
        classes = torch.randn(1, len(group), 2, device=device)
        classes[..., 0] -= 6 * (torch.rand(len(group), device=device) > 1 / 3)  # absent
        stages.append([MaskPrediction(masks, classes)])
    return MaskOutput((SIDE, SIDE), [], list(stages), heads)


def previous(predictor: Predictor, output: MaskOutput, label: tuple[int, int], steps: list[int]) -> Predictions:
    """The form before: (C, H, W) of each head, of all of them, and at the label's size; one argmax for each step."""
    parts = []
    for head, made in output.final:
        logits = F.interpolate(made.masks, size=output.size, mode="bilinear", align_corners=False)
        parts.append(head.class_probabilities(made.classes)[..., None, None] * logits.sigmoid())
    scores = torch.cat(parts, dim=1)[0]
    if label != scores.shape[-2:]:
        scores = F.interpolate(scores[None], size=label, mode="bilinear", align_corners=False)[0]
    found = {}
    for step in steps:
        best, position = scores[: predictor.ends[step]].max(dim=0)
        foreground = predictor.ids.to(scores.device)[position + 1]
        found[step] = {
            "all": foreground.masked_fill(best < predictor.threshold, 0),
            "foreground": foreground,
        }
    return found


def peak_mib(run: Callable[[], object], device: str) -> float:
    """MiB that `run` needs on top of what is there."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    sizes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(sizes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def forms(scene: Scenario, label: tuple[int, int], device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(before, in chunks): two runs with the same result."""
    steps = list(range(len(scene.steps)))
    output, model = made_output(scene, device), build_model("segvit", device="meta")
    predictor = Predictor(model, scene, 0.5)
    image = torch.empty(3, SIDE, SIDE, device=device)

    def chunked() -> Predictions:
        whole = WholeScores(model, image, lambda _: output, nullcontext, CHUNK)
        return predictor(resized(whole.chunks(), label), steps)

    before = partial(previous, predictor, output, label, steps)
    old, new = before(), chunked()
    for step in steps:
        assert all(torch.equal(old[step][rule], new[step][rule]) for rule in ("all", "foreground"))
    return before, chunked


@torch.no_grad()
def measure(device: str) -> Iterator[Row]:
    for name, cut in (("one head of 150 classes", None), ("11 heads (100-5) and each step's outputs alone", "100-5")):
        scene = Scenario("bench", "none", groups=tuple(step.new for step in cut_steps(cut, CLASSES)))
        for label in ((SIDE, SIDE), (683, SIDE)):
            before, chunked = forms(scene, label, device)
            what = f"scores to class ids at {label[0]} x {label[1]}, {name}"
            all_at_once, in_chunks = "all classes at once", f"{CHUNK} classes at once"
            yield compare(what, "", (all_at_once, before), (in_chunks, chunked), device)
            memory = [peak_mib(run, device) / 1000 for run in (before, chunked)]
            yield row(f"{what}: peak memory, MiB", "", (all_at_once, memory[0]), (in_chunks, memory[1]), device)


if __name__ == "__main__":
    main(__doc__, measure)
