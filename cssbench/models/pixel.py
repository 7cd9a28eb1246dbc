"""Per-pixel classifiers: what `linear` (plain ViT) and `aspp` (DeepLab-v3) share.

One 1x1 convolution per step on an embedding (B, D, h, w). Position 0, background, is the first output of step 0's head,
as in the public code of MiB, PLOP and REMINDER. Logits are made on the coarse grid and upsampled bilinearly
(align_corners False) to the input before any loss, and for the prediction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cssbench.errors import ConfigError
from cssbench.losses.distill import fold_logits
from cssbench.losses.init import balanced_init
from cssbench.losses.pixel import Reduction, cross_entropy, full_precision
from cssbench.models.pieces import pieces
from cssbench.models.segmenter import Encoded, Segmenter, SegOutput
from cssbench.scenario import Step


@dataclass
class PixelOutput(SegOutput):
    """`low`: (B, C, h, w) logits on the coarse grid, background first. `features`: taps for POD, the embedding last."""

    low: Tensor = None  # type: ignore[assignment]

    @cached_property
    def scores(self) -> Tensor:
        """(B, C, H, W): `low`, upsampled in full precision. Logits and scores are the same here."""
        return self._upsample(full_precision(self.low))

    def score_chunks(self, most: int) -> Iterator[Tensor]:
        return map(self._upsample, pieces(full_precision(self.low), most))

    def _upsample(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=self.size, mode="bilinear", align_corners=False)

    def pod_maps(self, num_outputs: int) -> list[Tensor]:
        """The taps, then `low`, whose new classes are added to background's channel (`fold_logits`)."""
        return [*self.features, fold_logits(self.low, num_outputs)]


class PixelSegmenter(Segmenter):
    """An encoder (`embed`) and one head per step, side by side: a 1x1 convolution unless a subclass makes another.

    A subclass has `width` (D) and sets `config.reduction`.

    `skip_frozen_heads` has no effect: the softmax needs every head's output.
    """

    pixel_output = True
    width: int

    @abstractmethod
    def embed(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> taps (B, D_i, h_i, w_i) for POD; the last one is the classifiers' input, of width D."""

    def grow(self, step: Step) -> None:
        outputs = len(step.new) + (step.index == 0)
        self.heads.append(self.make_head(outputs).to(next(self.parameters()).device))

    def make_head(self, outputs: int) -> nn.Module:
        """A step's head: (B, D, h, w) -> (B, outputs, h, w). One that is not a single 1x1 convolution replaces
        `init_from_background` too."""
        return nn.Conv2d(self.width, outputs, 1)

    def encode(self, images: Tensor) -> Encoded:
        return Encoded((images.shape[-2], images.shape[-1]), self.embed(images))

    def decode(self, encoded: Encoded) -> PixelOutput:
        return PixelOutput(encoded.size, encoded.taps, self.classify(encoded.taps[-1]))

    def classify(self, embedding: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, h, w): the logits of all heads, background first."""
        return torch.cat([head(embedding) for head in self.heads], dim=1)

    def loss(self, output: Any, labels: Tensor, *, weight: Tensor | None = None) -> dict[str, Tensor]:
        """{"ce"}: softmax cross-entropy over all outputs; `weight`: (B,) factor per image."""
        reduction: Reduction = self.config.reduction
        return {"ce": cross_entropy(output.logits, labels, reduction, weight)}

    @torch.no_grad()
    def init_from_background(self) -> None:
        """MiB's start of a step: the newest head's N classes share background's probability evenly with it. The
        probability of every old class stays what it was."""
        first, newest = self.heads[0].state_dict(), self.heads[-1].state_dict()  # views of the parameters
        weight, bias, background = balanced_init(first["weight"][0], first["bias"][0], len(newest["bias"]))
        newest["weight"].copy_(weight)
        newest["bias"].copy_(bias)
        first["bias"][0] = background


def require_pixel_output(model: Segmenter, method: str) -> None:
    """Raises ConfigError when the model's output lacks what distillation methods read."""
    if not model.pixel_output:
        raise ConfigError(
            f"Method {method!r} needs a model with per-pixel logits and features to distil (one whose class says "
            f"`pixel_output = True`), not {type(model).__name__}. Use model 'vit-linear', 'setr-naive', "
            f"'segmenter', 'deeplabv3' or 'segvit'."
        )
