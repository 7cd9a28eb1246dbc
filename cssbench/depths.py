"""How deep tokens went, and what a forward pass costs: what an evaluation tells beside its matrices.

The depth of a token is the number of encoder blocks that it went through as a query of its own (`SegOutput.depths`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cssbench.config import EvaluateConfig
from cssbench.errors import ModelError
from cssbench.evaluate import EvaluationDataset, View, model_inputs
from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.profile import count

DEEPEST = 255  # a depth fits one byte


class DepthCounter:
    """While the context lasts, counts the tokens of every forward pass of `model` by depth; padding has tokens too.

    Raises ModelError when an output's `depths` are not as `SegOutput` says.
    """

    def __init__(self, model: Segmenter, device: torch.device):
        self.model = model
        self.counts = torch.zeros(DEEPEST + 1, dtype=torch.int64, device=device)

    def __enter__(self) -> DepthCounter:
        self._hook = self.model.register_forward_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, model: Any, args: Any, output: SegOutput) -> None:
        if output.depths is not None:
            self.counts += torch.bincount(checked(output.depths, model).flatten(), minlength=DEEPEST + 1)

    def shares(self, fabric: Any) -> dict[str, float]:
        """Depth (as text) -> share of all tokens, over all processes; empty for a model without depths."""
        counts = fabric.all_reduce(self.counts, reduce_op="sum").tolist()
        return {str(depth): number / sum(counts) for depth, number in enumerate(counts) if number}


def checked(depths: Tensor, model: Any) -> Tensor:
    """`depths`, if they are (B, h, w) int64 from 0 to `DEEPEST`. Raises ModelError."""
    if depths.ndim != 3 or depths.dtype != torch.int64 or depths.min() < 0 or depths.max() > DEEPEST:
        raise ModelError(
            f"{type(model).__name__} returned depths {tuple(depths.shape)} of {depths.dtype}; expected (B, h, w) of "
            f"torch.int64, each a number of blocks from 0 to {DEEPEST}."
        )
    return depths


@torch.no_grad()
def depth_map(fabric: Any, model: Segmenter, view: View, config: EvaluateConfig) -> np.ndarray | None:
    """(h, w) uint8 at the label's size: the depth of the token in which a pixel lies, under sliding windows the largest
    of them. None for a model without depths. The model is in eval mode."""
    height, width = view.image.shape[-2:]
    found = torch.zeros(max(height, config.window), max(width, config.window), dtype=torch.uint8)
    for area, image in model_inputs(model, view, config):
        with fabric.autocast():
            depths = model(image.to(fabric.device)).depths
        if depths is None:
            return None
        pixels = F.interpolate(checked(depths, model)[None].float(), size=image.shape[-2:], mode="nearest")[0, 0]
        rows, columns = found[area].shape
        found[area] = torch.maximum(found[area], pixels[:rows, :columns].to("cpu", torch.uint8))
    whole = found[None, None, :height, :width].float()
    return F.interpolate(whole, size=view.label.shape, mode="nearest")[0, 0].to(torch.uint8).numpy()


def gflops(fabric: Any, model: Segmenter, data: EvaluationDataset) -> dict[str, Any]:
    """Cost over the first `evaluate.flops_images` images, as `results.StepRecord.gflops`; empty where that is 0.

    Counted by `cssbench.profile.count` on the model's own input, geometry `data.sampled`. The model is in eval mode.
    """
    number = min(data.config.flops_images, len(data))
    if not number:
        return {}
    inputs = (
        image.to(fabric.device)
        for index in range(number)
        for _, image in model_inputs(model, data.sampled_view(index), data.config)
    )
    with fabric.autocast():
        cost = count(model, inputs)
    per_image = cost.gflops * cost.images / number  # `cost` counts passes
    return {"per_pass": cost.gflops, "per_image": per_image, "images": number, "geometry": data.sampled}
