"""SegViT: a plain ViT and one ATM head per step. Under SegViT-CL only the newest head learns (`Segmenter.freeze_old`).

Source: Zhang et al. 2022; thesis sections 4.2.1 and 4.2.3. No background output: a pixel is background where no score
reaches the evaluation's threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from cssbench.config import Section
from cssbench.losses.mask import class_presence, mask_losses, presence_loss
from cssbench.models.atm import ATMConfig, ATMHead, MaskPrediction, head_width
from cssbench.models.backbone import Backbone, BackboneConfig, to_map
from cssbench.models.segmenter import Segmenter, SegOutput, autograd_off
from cssbench.scenario import Step


@dataclass
class MaskOutput(SegOutput):
    """Predictions of every head and stage: `stages[t][s]` of step t, or None where a frozen head was skipped.

    `heads` are the model's head modules (for probabilities), in step order.
    """

    stages: list[list[MaskPrediction] | None] = field(default_factory=list)
    heads: list[ATMHead] = field(default_factory=list, repr=False)

    @cached_property
    def scores(self) -> Tensor:
        """(B, number of seen classes, H, W) in [0, 1]: the heads' scores side by side (thesis section 4.2.3).

        Heads that were skipped are left out: ask for scores in eval mode.
        """
        pairs = zip(self.heads, self.stages, strict=True)
        return torch.cat([head.scores(stages[-1], self.size) for head, stages in pairs if stages is not None], dim=1)

    @cached_property
    def logits(self) -> Tensor:
        """Log of the scores: softmax over them is the scores normalised to sum 1."""
        return self.scores.clamp(min=1e-6).log()


class SegViT(Segmenter):
    """Options in `Config`; loss = sum over heads and stages of class + 20 focal + 1 dice (thesis eq. 4.4)."""

    class Config(Section):
        """backbone: the encoder and its taps; head: the ATM decoder; the rest: the loss."""

        backbone: BackboneConfig = BackboneConfig()
        head: ATMConfig = ATMConfig()
        absent_weight: float = Field(0.1, gt=0, description="class weight of 'absent' / 'no object'")
        focal_weight: float = Field(20.0, ge=0)
        dice_weight: float = Field(1.0, ge=0)
        ignore_mode: Literal["negative", "masked"] = Field(
            "negative", description="label 255 in the mask losses: negatives of every mask (public code), or left out"
        )

    has_background = False

    def __init__(self, config: SegViT.Config):
        super().__init__(config)
        self.config: SegViT.Config
        self.backbone = Backbone(config.backbone)
        head_width(config.head, self.backbone.width)
        self.multiple = self.backbone.patch
        self.pixel_mean, self.pixel_std = self.backbone.pixel_mean, self.backbone.pixel_std
        self.positions: list[range] = []

    def grow(self, step: Step) -> None:
        taps = len(self.config.backbone.layers)
        head = ATMHead(len(step.new), self.backbone.width, taps, self.config.head)
        self.heads.append(head.to(next(self.parameters()).device))
        self.positions.append(step.new_positions)

    def forward(self, images: Tensor) -> MaskOutput:
        size = (images.shape[-2], images.shape[-1])
        grid = self.backbone.grid(*size)
        with autograd_off(self.is_frozen(self.backbone)):
            taps = self.backbone(images)
        skip = self.training and self.skip_frozen_heads
        stages: list[list[MaskPrediction] | None] = []
        for head in self.heads:
            frozen = self.is_frozen(head)
            with autograd_off(frozen):
                stages.append(None if frozen and skip else head(taps, grid))
        features = [to_map(tap, grid) for tap in taps]
        return MaskOutput(size, features, stages, list(self.heads))  # type: ignore[arg-type]

    def loss(self, output: MaskOutput, labels: Tensor, absent_weight: float | None = None) -> dict[str, Tensor]:
        """Sum over the heads that ran and their stages. A head none of whose classes occurs learns their absence.

        absent_weight: instead of the model's own.
        """
        config = self.config
        absent_weight = config.absent_weight if absent_weight is None else absent_weight
        total = {"class": labels.new_zeros((), dtype=torch.float32)}
        total |= {"focal": total["class"], "dice": total["class"]}
        for stages, positions in zip(output.stages, self.positions, strict=True):
            if stages is None:
                continue
            present = class_presence(labels, positions)
            num_masks = mean_over_processes(present.sum().float()).clamp(min=1)
            for prediction in stages:
                focal, dice = mask_losses(prediction.masks, labels, present, positions, num_masks, config.ignore_mode)
                total["class"] = total["class"] + presence_loss(prediction.classes, present, absent_weight)
                total["focal"] = total["focal"] + config.focal_weight * focal
                total["dice"] = total["dice"] + config.dice_weight * dice
        return total

    def no_decay_names(self) -> set[str]:
        return {f"backbone.vit.{name}" for name in ("pos_embed", "cls_token", "reg_token")}


def mean_over_processes(value: Tensor) -> Tensor:
    """`value` averaged over the processes of a distributed run (itself in a single one)."""
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value
