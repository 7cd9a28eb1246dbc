"""What do grown heads cost? SegViT with ViT-B/16 at 512 px, one image, random weights: one head of 150 classes, beside
a head per step, and these with and without their key and value projections folded into the queries. Command:

    python bench/heads.py [--device cuda] [--csv FILE]

Full inference: encoder, heads, upsampling to scores, and the best class of every pixel. On a GPU also in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from rows import Row
from speed import compare, main
from torch import Tensor

from cssbench.config import EvaluateConfig
from cssbench.models.segmenter import Segmenter
from cssbench.predict import RunningBest, WholeScores
from cssbench.profile import build_model, cut_steps, no_image

SIDE, CLASSES = 512, 150


def grown(steps: str | None, device: str, fold: str = "auto") -> Segmenter:
    """ViT-B and a head per step of e.g. "100-5"."""
    options = {"backbone": {"name": "vit_base_patch16_384", "image_size": SIDE}, "head": {"fold": fold}}
    model = build_model("segvit", options, device)
    for step in cut_steps(steps, CLASSES):
        model.grow(step)
    return model.eval()


@torch.no_grad()
def best(model: Segmenter, image: Tensor, half: bool) -> Tensor:
    """(H, W): index of the best class, as the evaluation finds it."""
    found = RunningBest()
    autocast = partial(torch.autocast, image.device.type, torch.bfloat16, enabled=half)
    for chunk in WholeScores(model, image[0], model, autocast, EvaluateConfig().chunk).chunks():
        found.add(chunk)
    return found.index


@torch.no_grad()
def decode(model: Segmenter, taps: list[Tensor], grid: tuple[int, int]) -> None:
    for head in model.heads:
        head(taps, grid)


def measure(device: str) -> Iterator[Row]:
    image = torch.rand(no_image(SIDE)[0].shape, device=device)
    joint = grown(None, device)
    for half in (False, True) if device == "cuda" else (False,):
        for steps in ("100-5", "100-10"):
            model = grown(steps, device)
            claim = f"inference after {len(model.heads)} steps ({steps}), ViT-B 512{', bf16' if half else ''}"
            goal = "<= 1.10" if device == "cuda" else "<= 1.15"
            one, many = (partial(best, made, image, half) for made in (joint, model))
            yield compare(claim, goal, ("one head", one), (f"{len(model.heads)} heads", many), device)
    yield from folding(device, image)


def folding(device: str, image: Tensor) -> Iterator[Row]:
    """The heads alone, at every cut that brings few classes, and where folding does not pay."""
    for steps, fold in (("100-5", "auto"), ("100-10", "auto"), ("100-50", "always")):
        plain = grown(steps, device, "never")
        folded = grown(steps, device, fold)
        folded.load_state_dict(plain.state_dict())
        with torch.no_grad():
            taps = plain.backbone(image)
        runs: list[tuple[str, Callable[[], None]]] = [
            (f"fold {name}", partial(decode, model, taps, plain.backbone.grid(SIDE, SIDE)))
            for name, model in (("never", plain), (fold, folded))
        ]
        yield compare(f"heads of {steps}, ViT-B 512", "<= 0.65" if steps == "100-5" else "", *runs, device)


if __name__ == "__main__":
    main(__doc__, measure)
