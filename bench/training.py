"""What the options of the training step bring, one by one: a training pass (forward, loss, backward) or optimiser step.

    python bench/training.py [--device cuda]

SegViT with 20 classes on ViT-S, 224 px, batch 2, and DeepLab-v3 on a ResNet-50, 224 px, batch 2; on a GPU ViT-B and a
ResNet-101, 512 px, batch 8. Memory is what the backward pass keeps of the forward pass, parameters not counted; its
row has MiB in the columns of milliseconds. Without a C++ compiler there is no row for train.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rows import Row
from speed import compare, main, row
from torch import Tensor

from cssbench import compiling
from cssbench.compiling import compiled
from cssbench.config import OptimConfig
from cssbench.models.segmenter import Segmenter
from cssbench.profile import build_model, cut_steps
from cssbench.trainer import make_optimizer

CLASSES, REPEATS = 20, 3


def grown(kind: str, device: str, **backbone: Any) -> Segmenter:
    model = build_model(kind, {"backbone": backbone}, device)
    for step in cut_steps(None, CLASSES):
        model.grow(step)
    return model.train()


def batch(side: int, number: int, device: str) -> tuple[Tensor, Tensor]:
    labels = torch.randint(1, CLASSES + 1, (number, side // 32, side // 32), device=device)
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)
    return torch.randn(number, 3, side, side, device=device), labels


def learn(model: Segmenter, images: Tensor, labels: Tensor, half: bool = False) -> None:
    """Gradients of one batch; those of the last call are thrown away."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        terms = model.loss(model(images), labels)
    torch.stack(list(terms.values())).sum().backward()


def with_compiled(model: Segmenter, run: Callable[[], None]) -> None:
    with compiled([model]):
        run()


def kept_mib(model: Segmenter, images: Tensor, labels: Tensor) -> float:
    """MiB of the distinct tensors that autograd saved in a forward pass, but parameters."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        taps: Any = model.backbone(images)  # the heads keep the same either way
    del taps
    return sum(found.values()) / 2**20


def measure(device: str) -> Iterator[Row]:
    small = device == "cpu"
    side, number = (224, 2) if small else (512, 8)
    size, depth = ("small", 50) if small else ("base", 101)
    about = f"{side} px, batch {number}"
    vit = {"name": f"vit_{size}_patch16_384", "image_size": side, "drop_path": 0.0}  # one compilation for all blocks
    model, data = grown("segvit", device, **vit), batch(side, number, device)
    plain = ("fp32", partial(learn, model, *data))
    half = ("bf16-mixed", partial(learn, model, *data, True))
    claim = f"training pass of SegViT, ViT-{size[0].upper()}, {about}"
    yield compare(claim, "", plain, half, device, REPEATS)

    again = grown("segvit", device, **vit, checkpointing=True)
    yield compare(claim, "", plain, ("checkpointing", partial(learn, again, *data)), device, REPEATS)
    memory = (
        ("kept, MiB", kept_mib(model, *data) / 1000),
        ("kept with checkpointing, MiB", kept_mib(again, *data) / 1000),
    )
    yield row(f"memory: {claim}", "", *memory, device)
    fast = partial(with_compiled, model, partial(learn, model, *data))
    made = compare(claim, "", plain, ("compile", fast), device, REPEATS)
    if not compiling.BACKEND.failed:
        yield made

    steps = []
    for fused in (False, True):
        optimizer = make_optimizer(OptimConfig(), model.param_groups(), 0, fused)
        steps.append(("fused" if fused else "not fused", optimizer.step))
    yield compare(f"AdamW step of {claim.split(' of ')[1]}", "", *steps, device, 2 * REPEATS)
    yield from layouts(device, depth, data, about)


def layouts(device: str, depth: int, data: tuple[Tensor, Tensor], about: str) -> Iterator[Row]:
    """DeepLab-v3, both ways at once: the models are two, so that no time goes into rearranging weights."""
    runs = []
    images, labels = data
    for last in (False, True):
        model = grown("deeplabv3", device, name=f"resnet{depth}")
        if last:
            model.to(memory_format=torch.channels_last)
            images = images.to(memory_format=torch.channels_last)
        runs.append(("channels_last" if last else "contiguous", partial(learn, model, images, labels)))
    yield compare(f"training pass of DeepLab-v3, ResNet-{depth}, {about}", "", *runs, device, REPEATS)


if __name__ == "__main__":
    main(__doc__, measure)
