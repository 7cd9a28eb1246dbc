"""SegViT: a plain ViT and one ATM head per step. Under SegViT-CL only the newest head learns (`Segmenter.freeze_old`).

Source: Zhang et al. 2022; thesis sections 4.2.1 and 4.2.3. By default no background output: a pixel is background where
no score reaches the evaluation's threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cssbench.config import Section
from cssbench.errors import ModelError
from cssbench.losses.mask import IgnoreMode, class_presence, mask_losses, mean_over_processes, presence_loss
from cssbench.losses.pixel import full_precision
from cssbench.models.atm import ATMConfig, ATMHead, MaskPrediction, head_width
from cssbench.models.atm_ce import CrossEntropyConfig, head_loss, head_scores
from cssbench.models.backbone import Backbone, BackboneConfig, to_map
from cssbench.models.segmenter import Encoded, Segmenter, SegOutput, autograd_off
from cssbench.scenario import Step

PixelForm = Literal["log_scores", "class_times_mask"]


@dataclass
class MaskOutput(SegOutput):
    """Predictions of every head and stage: `stages[t][s]` of step t, or None where a frozen head was skipped.

    `heads` are the model's head modules (for probabilities), in step order. `has_background`, `pixel_form`: the model's
    options; `ce`: its options of the cross-entropy, None with the mask losses.
    """

    stages: list[list[MaskPrediction] | None] = field(default_factory=list)
    heads: list[ATMHead] = field(default_factory=list, repr=False)
    has_background: bool = False
    pixel_form: PixelForm = "log_scores"
    ce: CrossEntropyConfig | None = None

    @property
    def final(self) -> list[tuple[ATMHead, MaskPrediction]]:
        """(head, its last stage's prediction) of the heads that ran."""
        pairs = zip(self.heads, self.stages, strict=True)
        return [(head, stages[-1]) for head, stages in pairs if stages is not None]

    @cached_property
    def scores(self) -> Tensor:
        """(B, number of seen classes, H, W) in [0, 1]: the heads' scores side by side (thesis section 4.2.3).

        Heads that were skipped are left out: ask for scores in eval mode.
        """
        parts = [self._head_scores(head, prediction) for head, prediction in self.final]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def score_chunks(self, most: int) -> Iterator[Tensor]:
        """Of v2 some classes of a head at a time; a v1 head's queries, and a softmax', need all classes of the head."""
        for head, prediction in self.final:
            if self.ce is None:
                yield from head.score_chunks(prediction, self.size, most)
            else:
                yield self._head_scores(head, prediction)

    def _head_scores(self, head: ATMHead, prediction: MaskPrediction) -> Tensor:
        if self.ce is None:
            return head.scores(prediction, self.size)
        return head_scores(head, prediction, self.size, self.ce, self.has_background and head is self.heads[0])

    @cached_property
    def logits(self) -> Tensor:
        """Log of the scores: softmax over them is the scores normalised to sum 1."""
        return self.scores.clamp(min=1e-6).log()

    @cached_property
    def pixel_logits(self) -> Tensor:
        """(B, 1 + seen classes, H, W), background first: its query's channel where the model has one. Else

        log_scores        log(1 - largest score): the softmax is the scores and 1 - max, normalised to sum 1, and its
                          argmax the prediction at a background threshold of 0.5. Classes: log of the score.
        class_times_mask  0. Classes: raw class logit times mask probability (`ATMHead.class_maps`).
        """
        if self.pixel_form == "log_scores":
            classes = self.logits
            background = (1 - self.scores.amax(1, keepdim=True)).clamp(min=1e-6).log()
        else:
            classes = torch.cat([head.class_maps(prediction, self.size) for head, prediction in self.final], dim=1)
            background = torch.zeros_like(classes[:, :1])
        return classes if self.has_background else torch.cat([background, classes], dim=1)

    @cached_property
    def normalised(self) -> list[Tensor]:
        """`features` after a LayerNorm over channels without weights: a few channels of a ViT's residual stream would
        outweigh all others in a distance."""
        return [F.layer_norm(f.movedim(1, -1), f.shape[1:2]).movedim(-1, 1) for f in self.features]

    @property
    def embedding(self) -> Tensor:
        """The deepest tap, normalised: heads project it each in their own way, so none of these is common to all."""
        return self.normalised[-1]

    @property
    def encoded(self) -> Tensor:
        return self.normalised[-1]

    def pod_maps(self, num_outputs: int) -> list[Tensor]:
        """The normalised taps, then the mask probabilities of the first `num_outputs` positions (background only where
        it has a query), (B, N, h, w). Probabilities, because POD squares: a logit's sign would be lost."""
        masks = torch.cat([prediction.masks for _, prediction in self.final], dim=1)
        return [*self.normalised, full_precision(masks[:, : num_outputs - (not self.has_background)]).sigmoid()]


class SegViT(Segmenter):
    """Options in `Config`; loss = sum over heads and stages of class + 20 focal + 1 dice (thesis eq. 4.4), or of a
    per-pixel cross-entropy (`loss = "ce"`: see `cssbench.models.atm_ce`)."""

    class Config(Section):
        """backbone: the encoder and its taps; head: the ATM decoder; the rest: the loss."""

        backbone: BackboneConfig = BackboneConfig()
        head: ATMConfig = ATMConfig()
        absent_weight: float = Field(0.1, gt=0, description="class weight of 'absent' / 'no object'")
        focal_weight: float = Field(20.0, ge=0)
        dice_weight: float = Field(1.0, ge=0)
        ignore_mode: IgnoreMode = Field(
            "negative", description="label 255 in the mask losses: negatives of every mask (public code), or left out"
        )
        background_query: bool = Field(
            False,
            description="background as a query of step 0's head, an output like any class (comparable with MiB's)",
        )
        pixel_form: PixelForm = Field(
            "log_scores", description="per-pixel logits for methods that need them: see MaskOutput.pixel_logits"
        )
        loss: Literal["mask", "ce"] = Field("mask", description="class, focal and dice terms; or cross-entropy (ce)")
        ce: CrossEntropyConfig = CrossEntropyConfig()

    pixel_output = True

    def __init__(self, config: SegViT.Config):
        super().__init__(config)
        self.config: SegViT.Config
        self.backbone = Backbone(config.backbone)
        head_width(config.head, self.backbone.width)
        self.multiple = self.backbone.patch
        self.pixel_mean, self.pixel_std = self.backbone.pixel_mean, self.backbone.pixel_std
        self.has_background = config.background_query
        self.positions: list[range] = []
        self.ce = config.ce if config.loss == "ce" else None
        if not self.trains_classes and config.pixel_form == "class_times_mask":
            raise ModelError(
                "model.pixel_form = 'class_times_mask' reads the class output, which model.loss = 'ce' does not train. "
                "Set model.pixel_form = 'log_scores', or model.ce.logits = 'scores'."
            )

    @property
    def trains_classes(self) -> bool:
        """Does the loss train the heads' class output?"""
        return self.ce is None or self.ce.logits == "scores"

    def grow(self, step: Step) -> None:
        first, last = step.new_positions.start, step.new_positions.stop
        positions = range(0 if step.index == 0 and self.has_background else first, last)
        if self.ce is not None and self.ce.background == "ignored" and len(positions) == 1:
            raise ModelError(
                "This step brings one class, and model.ce.background = 'ignored' leaves its softmax nothing else to "
                "tell it from. Set model.ce.background = 'output', or model.loss = 'mask'."
            )
        self.heads.append(self.make_head(len(positions)).to(next(self.parameters()).device))
        self.positions.append(positions)

    def make_head(self, num_classes: int) -> ATMHead:
        """A step's head."""
        return ATMHead(num_classes, self.backbone.width, len(self.config.backbone.layers), self.config.head)

    def encode(self, images: Tensor) -> Encoded:
        with autograd_off(self.is_frozen(self.backbone)):
            return Encoded((images.shape[-2], images.shape[-1]), self.backbone(images))

    def decode(self, encoded: Encoded) -> MaskOutput:
        grid = self.backbone.grid(*encoded.size)
        stages = self.run_heads(encoded, encoded.taps, grid)
        features = [to_map(tap, grid) for tap in encoded.taps]
        heads: list[ATMHead] = list(self.heads)  # type: ignore[arg-type]
        return MaskOutput(encoded.size, features, stages, heads, self.has_background, self.config.pixel_form, self.ce)

    def run_heads(
        self, encoded: Encoded, taps: list[Tensor], grid: tuple[int, int]
    ) -> list[list[MaskPrediction] | None]:
        """`MaskOutput.stages`; of a head in `encoded.known`, its last stage alone."""
        skip = self.training and self.skip_frozen_heads
        stages: list[list[MaskPrediction] | None] = []
        for step, head in enumerate(self.heads):
            frozen = self.is_frozen(head)
            if step in encoded.known:
                stages.append([MaskPrediction(**encoded.known[step])])
            elif frozen and skip:
                stages.append(None)
            else:
                with autograd_off(frozen):
                    stages.append(head(taps, grid))
        return stages

    def remembered(self, output: MaskOutput, step: int) -> dict[str, Tensor]:
        stages = output.stages[step]
        return {"masks": stages[-1].masks, "classes": stages[-1].classes} if stages else {}

    def loss(
        self,
        output: MaskOutput,
        labels: Tensor,
        absent_weight: float | None = None,
        *,
        weight: Tensor | None = None,
        newest_only: bool = False,
        ignore_mode: IgnoreMode | None = None,
    ) -> dict[str, Tensor]:
        """Sum over the heads that ran and their stages. A head none of whose classes occurs learns their absence.

        absent_weight, ignore_mode: instead of the model's own; no part of the cross-entropy, which leaves 255 out.
        weight: (B,) factor per image; mask losses pool the images of a batch, so the mean factor scales every term.
        newest_only: leave old heads out: their classes are not labelled at this step, which is not absence.
        """
        chosen = slice(-1, None) if newest_only else slice(None)
        if self.ce is not None:
            terms = self._cross_entropy(output, labels, chosen, weight)
        else:
            absent_weight = self.config.absent_weight if absent_weight is None else absent_weight
            terms = self._mask_terms(output, labels, chosen, absent_weight, ignore_mode or self.config.ignore_mode)
            if weight is not None:
                terms = {name: value * weight.mean().to(value) for name, value in terms.items()}
        return terms | self.extra_terms(output, labels, chosen, weight)

    def extra_terms(self, output: Any, labels: Tensor, chosen: slice, weight: Tensor | None) -> dict[str, Tensor]:
        """What a model adds to the loss of its heads, weighted. chosen: of the steps' heads; weight: as in `loss`."""
        return {}

    def _mask_terms(
        self, output: MaskOutput, labels: Tensor, chosen: slice, absent_weight: float, ignore_mode: IgnoreMode
    ) -> dict[str, Tensor]:
        factors = {"class": 1.0, "focal": self.config.focal_weight, "dice": self.config.dice_weight}
        total = dict.fromkeys(factors, labels.new_zeros((), dtype=torch.float32))
        for stages, positions in zip(output.stages[chosen], self.positions[chosen], strict=True):
            if stages is not None:
                found = atm_terms(stages, labels, positions, absent_weight, ignore_mode)
                total = {name: total[name] + factor * found[name] for name, factor in factors.items()}
        return total

    def _cross_entropy(
        self, output: MaskOutput, labels: Tensor, chosen: slice, weight: Tensor | None
    ) -> dict[str, Tensor]:
        assert self.ce is not None
        triples = zip(output.heads[chosen], output.stages[chosen], self.positions[chosen], strict=True)
        terms = [
            head_loss(head, prediction, labels, positions, self.ce, weight)
            for head, stages, positions in triples
            for prediction in stages or ()
        ]
        return {"ce": torch.stack(terms).sum()}

    def no_decay_names(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_decay_names()}


def atm_terms(
    predictions: list[MaskPrediction],
    labels: Tensor,
    positions: range,
    absent_weight: float,
    ignore_mode: IgnoreMode = "negative",
) -> dict[str, Tensor]:
    """class, focal, dice of one head, unweighted, each summed over its predictions (thesis eq. 4.4)."""
    terms = dict.fromkeys(("class", "focal", "dice"), labels.new_zeros((), dtype=torch.float32))
    present = class_presence(labels, positions)
    num_masks = mean_over_processes(present.sum().float()).clamp(min=1)
    for prediction in predictions:
        focal, dice = mask_losses(prediction.masks, labels, present, positions, num_masks, ignore_mode)
        presence = presence_loss(prediction.classes, present, absent_weight)
        terms = {"class": terms["class"] + presence, "focal": terms["focal"] + focal, "dice": terms["dice"] + dice}
    return terms
