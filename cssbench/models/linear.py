"""Plain ViT with one linear head per step: the per-pixel baseline on the backbone that SegViT uses.

Sources: this is Segmenter's linear decoder (Strudel et al. 2021, section 3.2); background as an explicit output and
logits upsampled before the loss as in the public code of MiB and PLOP, so that their losses carry over unchanged.
Known deviations: the final LayerNorm is fresh, not the pre-trained one (`Backbone` leaves that out).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cssbench.config import Section
from cssbench.losses.pixel import Reduction
from cssbench.models.backbone import Backbone, BackboneConfig, to_map
from cssbench.models.pixel import PixelSegmenter
from cssbench.models.segmenter import autograd_off


class TappedBackboneConfig(BackboneConfig):
    """A timm plain ViT, by default tapped at every quarter of 12 blocks."""

    layers: list[PositiveInt] = Field([3, 6, 9, 12], min_length=1, description="taps, 1-based")


class LinearViT(PixelSegmenter):
    """Tokens of the last tap -> final LayerNorm -> one 1x1 head per step."""

    class Config(Section):
        """backbone.layers: blocks tapped for POD; the last one feeds the heads.

        norm: a final LayerNorm before the heads; False: the raw output of the last tapped block.
        taps: earlier taps as POD compares them: "normalised", LayerNorm over channels without weights (the residual
              stream of a ViT has a few channels that would outweigh all others once squared), or "raw".
        reduction: of the cross-entropy: "all" pixels in the denominator, as the public code, or "valid" ones only.
        """

        backbone: TappedBackboneConfig = TappedBackboneConfig()
        norm: bool = True
        taps: Literal["normalised", "raw"] = "normalised"
        reduction: Reduction = "all"

    def __init__(self, config: LinearViT.Config):
        super().__init__(config)
        self.config: LinearViT.Config
        self.backbone = Backbone(config.backbone)
        self.width = self.backbone.width
        self.norm = nn.LayerNorm(self.width, eps=1e-6) if config.norm else nn.Identity()
        self.multiple = self.backbone.patch
        self.pixel_mean, self.pixel_std = self.backbone.pixel_mean, self.backbone.pixel_std

    def embed(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one (B, D, H/patch, W/patch) map per tap; the last one after the final norm."""
        grid = self.backbone.grid(images.shape[-2], images.shape[-1])
        with autograd_off(self.is_frozen(self.backbone)):
            return [to_map(tap, grid) for tap in self.finish(self.backbone(images))]

    def finish(self, taps: list[Tensor]) -> list[Tensor]:
        """Taps (B, L, D) as POD compares them, the last one after the final norm."""
        *early, last = taps
        if self.config.taps == "normalised":
            early = [F.layer_norm(tap, tap.shape[-1:]) for tap in early]
        return [*early, self.norm(last)]

    def no_decay_names(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_decay_names()}
