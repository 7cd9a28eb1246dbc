"""Does time fall with the tokens? A ViT whose tokens leave, against the same ViT with all of them.

    python bench/ragged.py [--device cuda]

35 % of the tokens leave after block 6, 60 % in all after block 8, at random: alike in every image, or up to 20 points
more or fewer (uneven). ViT-S and ViT-B at 512 px; on a GPU ViT-B in bf16.
    time saved / FLOPs saved  1 where time falls as FLOPs do: milliseconds saved, and the milliseconds of the unpruned
                              encoder times the share of FLOPs saved
    packed tokens             each way of attending, against the public code's: one image after the other through each
                              block (on a GPU the goal is to be twice as fast)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rows import Row
from speed import compare, main, row
from torch import Tensor

from cssbench.flops import counting
from cssbench.models.backbone import Backbone, BackboneConfig
from cssbench.models.exits import ExitOptions, Survivors
from cssbench.models.ragged_attention import no_varlen
from cssbench.profile import latency

SIDE, TAPS, SHARES = 512, (6, 8, 12), (0.35, 0.6)
ALIKE, UNEVEN = [0.0] * 4, [-0.2, -0.1, 0.1, 0.2]
REPEATS = 3


def certainty(length: int, spread: list[float], device: str) -> list[Tensor]:
    """Per stage, (B, L) scores: 1 for a token that leaves by then. Every image has an order in which its tokens go."""
    order = torch.rand(len(spread), length, device=device).argsort(1).argsort(1)
    shares = torch.tensor(SHARES)[:, None] + torch.tensor(spread)
    return [(order < (share[:, None] * length).round().to(device)).float() for share in shares]


def packed(backbone: Backbone, x: Tensor, leave: list[Tensor], attention: Any) -> None:
    """DToP's encoder, told which tokens are certain."""
    tokens = Survivors(backbone, x, ExitOptions(rule="remove", attention=attention))
    for stage, tap in enumerate(TAPS):
        tokens.run(tap)
        if stage < len(leave):
            here = leave[stage][tokens.packed.image, tokens.packed.positions]
            tokens.retire(here[:, None], stage, 0.5)


def one_by_one(backbone: Backbone, x: Tensor, leave: list[Tensor]) -> None:
    """As the public code: every image alone, and tokens that left as zeros in their place."""
    for image, stages in zip(x.split(1), zip(*leave, strict=True), strict=True):
        tokens = backbone.embed(image)
        stay = torch.ones(tokens.shape[1], dtype=torch.bool, device=x.device)
        for number, block in enumerate(backbone.blocks, 1):
            going = block(tokens[:, stay])
            tokens = torch.zeros_like(tokens)
            tokens[:, stay] = going
            if number in TAPS[:-1]:
                stay = stay & (stages[TAPS.index(number)] < 0.5)


def multiply_adds(run: Callable[[], None]) -> int:
    with counting() as counter:
        run()
    return sum(counter.total.values())


def saved(claim: str, goal: str, unpruned: Callable[[], None], pruned: Callable[[], None], device: str) -> Row:
    """Time saved, against the time that would be saved if it fell as FLOPs do."""
    seconds = latency({"all": unpruned, "some": pruned}, REPEATS, warm_up=1)
    promised = seconds["all"] * (1 - multiply_adds(pruned) / multiply_adds(unpruned))
    found, due = ("time saved", seconds["all"] - seconds["some"]), ("time that FLOPs promise to save", promised)
    return row(claim, goal, found, due, device, REPEATS)


@torch.no_grad()
def measure(device: str) -> Iterator[Row]:
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        if device == "cpu":
            yield from times(device, "small", {"alike": ALIKE, "uneven": UNEVEN})
        yield from times(device, "base", {"uneven": UNEVEN})
        yield from ways(device, "base" if device == "cuda" else "small")


def setting(device: str, size: str, spread: list[float]) -> tuple[Backbone, Tensor, list[Tensor]]:
    """An encoder, images, and which tokens leave."""
    settings = {"name": f"vit_{size}_patch16_384", "image_size": SIDE, "layers": list(TAPS)}
    backbone = Backbone(BackboneConfig.model_validate(settings)).to(device).eval()
    x = torch.randn(len(spread), 3, SIDE, SIDE, device=device)
    return backbone, x, certainty((SIDE // backbone.patch) ** 2, spread, device)


def times(device: str, size: str, cases: dict[str, list[float]]) -> Iterator[Row]:
    for case, spread in cases.items():
        backbone, x, leave = setting(device, size, spread)
        claim = f"time saved / FLOPs saved, 4 images, {case}, ViT-{size[0].upper()} {SIDE}"
        yield saved(claim, ">= 0.9", partial(backbone, x), partial(packed, backbone, x, leave, "auto"), device)


def ways(device: str, size: str) -> Iterator[Row]:
    backbone, x, leave = setting(device, size, UNEVEN)
    alone = ("one by one", partial(one_by_one, backbone, x, leave))
    kinds = ["loop", "padded"] if no_varlen(x.new_zeros(1, 1, 64), 0.0, False) else ["loop", "padded", "varlen"]
    for kind in kinds:
        goal = ">= 2" if device == "cuda" and kind == kinds[-1] else ""
        claim = f"packed tokens, 4 uneven images, ViT-{size[0].upper()} {SIDE}"
        run = (kind, partial(packed, backbone, x, leave, kind))
        yield compare(claim, goal, alone, run, device, REPEATS)


if __name__ == "__main__":
    main(__doc__, measure)
