"""SegViT-CL over three tiny steps: scenes whose colours tell the class, a model, and the training of a step."""

from __future__ import annotations

import torch

from cssbench.api import Batch, StepContext
from cssbench.models.segvit import SegViT
from cssbench.scenario import Scenario

torch.set_num_threads(1)  # the tensors are tiny
SCENARIO = Scenario("tiny-3-2-1", "none", groups=((4, 2, 6), (1, 5), (3,)))  # positions 1..6 are not the class ids
COLOURS = torch.randn(7, 3, generator=torch.Generator().manual_seed(7))


def scenes(n, seed, shown=range(7)):
    """n images of 2 x 2 blocks of 16 px, each block of one class id 0..6 (0 is void); colour tells the class.

    shown: class ids of which each image has one or more.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 7, (10 * n, 2, 2), generator=generator)
    chosen = torch.isin(blocks, torch.tensor(list(shown))).flatten(1).any(1)
    ids = blocks[chosen][:n].repeat_interleave(16, 1).repeat_interleave(16, 2)
    noise = torch.randn(n, 32, 32, 3, generator=generator)
    return (COLOURS[ids] + 0.3 * noise).permute(0, 3, 1, 2).contiguous(), ids


def make_model(version="v2", seed=0, **options):
    torch.manual_seed(seed)
    backbone = {"name": "vit_tiny_patch16_224", "image_size": 32, "layers": [1, 2]}
    backbone |= {"patch": 8, "width": 16, "depth": 2, "heads": 2, "drop_path": 0.1}
    head = {"version": version, "heads": 2, "layers": 1, "init_std": 0.1}
    return SegViT(SegViT.Config.model_validate({"backbone": backbone, "head": head} | options))


def context(model, step, previous=None, holdout=None, batches=4):
    """A step's context; its images show a new class, and are labelled with the new classes alone."""
    images, ids = scenes(4 * batches, 100 + step.index, step.new)
    labels = torch.from_numpy(SCENARIO.train_table(step)).long()[ids]
    loader = [{"images": images[i::batches], "labels": labels[i::batches], "names": []} for i in range(batches)]
    shown = {p: int((labels == p).flatten(1).any(1).sum()) for p in step.new_positions}
    return StepContext(
        scenario=SCENARIO,
        step=step,
        model=model,
        previous=previous,
        train_loader=loader,
        holdout_loader=None if holdout is None else loader[:holdout],
        device=torch.device("cpu"),
        images=(16,) * (step.index + 1),
        class_images=shown,
        log=lambda name, value: None,
    )


def train_step(model, method, step, previous=None, passes=3, **options):
    """What the task loop and the trainer do at a step, the model having grown."""
    ctx = context(model, step, previous, **options)
    method.start_step(ctx)
    optimizer = torch.optim.AdamW(method.param_groups(ctx), lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(passes):
        for loaded in ctx.train_loader:
            terms = method.loss(ctx, Batch(loaded["images"], loaded["labels"], model(loaded["images"])))
            sum(terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    method.end_step(ctx)
    return ctx
