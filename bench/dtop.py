"""Does time fall with the tokens? The encoder with and without pruning, image by image and in batches. Command:

    python bench/dtop.py [--model vit_small_patch16_384] [--size 512] [--device cpu] [--csv bench/results/dtop.csv]

35 % of the tokens leave after block 6, 60 % in all after block 8, at random: alike in every image, or up to 20 points
more or fewer. Variants take turns; the ratio to the unpruned encoder is reported, beside that of their GFLOPs.
    one by one   each image through each block by itself, as the public code does
    loop, padded our packed tokens, attention image by image or over padded images
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from rows import Row, write_csv
from torch import Tensor

from cssbench.flops import counting
from cssbench.models.backbone import Backbone, BackboneConfig
from cssbench.models.exits import ExitOptions, Survivors
from cssbench.profile import latency, machine

TAPS, SHARES = (6, 8, 12), (0.35, 0.6)
CASES = {"1 image": [0.0], "4 images, alike": [0.0] * 4, "4 images, uneven": [-0.2, -0.1, 0.1, 0.2]}


def certainty(images: int, length: int, spread: list[float], device: str) -> list[Tensor]:
    """Per stage, (B, L) scores: 1 for a token that leaves by then. Every image has an order in which its tokens go."""
    order = torch.rand(images, length, device=device).argsort(1).argsort(1)
    shares = torch.tensor(SHARES)[:, None] + torch.tensor(spread)
    return [(order < (share[:, None] * length).round().to(device)).float() for share in shares]


def unpruned(backbone: Backbone, x: Tensor) -> None:
    backbone(x)


def packed(backbone: Backbone, x: Tensor, leave: list[Tensor], attention: str) -> None:
    tokens = Survivors(backbone, x, ExitOptions(rule="remove", attention=attention))  # type: ignore[arg-type]
    for stage, tap in enumerate(TAPS):
        tokens.run(tap)
        if stage < len(leave):
            here = leave[stage][tokens.packed.image, tokens.packed.positions]
            tokens.retire(here[:, None], stage, 0.5)


def one_by_one(backbone: Backbone, x: Tensor, leave: list[Tensor]) -> None:
    tokens = list(backbone.embed(x).split(1))
    stay = [torch.ones(len(one[0]), dtype=torch.bool, device=x.device) for one in tokens]
    for number, block in enumerate(backbone.blocks, 1):
        for i, (one, keep) in enumerate(zip(tokens, stay, strict=True)):
            going = block(one[:, keep])
            tokens[i] = torch.zeros_like(one)
            tokens[i][:, keep] = going
        if number in TAPS[:-1]:
            stay = [keep & (gone < 0.5) for keep, gone in zip(stay, leave[TAPS.index(number)], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_384")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    settings = BackboneConfig(name=arguments.model, image_size=arguments.size, layers=list(TAPS))
    backbone = Backbone(settings).to(arguments.device).eval()
    grid = backbone.grid(arguments.size, arguments.size)
    rows: list[Row] = []
    for case, spread in CASES.items():
        x = torch.randn(len(spread), 3, arguments.size, arguments.size, device=arguments.device)
        leave = certainty(len(x), grid[0] * grid[1], spread, arguments.device)
        runs = {
            "unpruned": partial(unpruned, backbone, x),
            "one by one": partial(one_by_one, backbone, x, leave),
            "loop": partial(packed, backbone, x, leave, "loop"),
            "padded": partial(packed, backbone, x, leave, "padded"),
        }
        flops = {}
        for name, run in runs.items():
            with counting() as counter:
                run()
            flops[name] = sum(counter.total.values())
        with torch.no_grad():
            seconds = latency(runs, arguments.repeats)
        for name, value in seconds.items():
            rows.append(
                {
                    "model": arguments.model,
                    "size": arguments.size,
                    "case": case,
                    "variant": name,
                    "faster": f"{seconds['unpruned'] / value:.2f}",
                    "fewer_flops": f"{flops['unpruned'] / flops[name]:.2f}",
                    "ms": f"{1000 * value:.0f}",
                    "machine": machine(torch.device(arguments.device)),
                    "torch": torch.__version__,
                }
            )
            print(rows[-1], flush=True)
    if arguments.csv:
        write_csv(rows, arguments.csv)


if __name__ == "__main__":
    main()
