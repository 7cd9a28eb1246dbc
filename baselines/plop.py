"""PLOP: the previous model labels the background, and pooled features stay where they were.

Source: Douillard et al. 2021 and its public code, with that code's ADE20K factors. Local POD
(`cssbench.losses.distill`) takes the place of output distillation; MiB's initialisation of new classifiers is kept.
Known bugs of the public code, kept as the default because the published numbers have them: the entropy threshold is
inert for K >= 51 (`arithmetic`, see `cssbench.losses.pseudo`); an image without background drops out of the
cross-entropy (`without_background`). Its POD assumes square maps; ours does not (`pod_reference` restores it).
"""

from __future__ import annotations

from pydantic import Field, PositiveInt
from torch import Tensor

from cssbench.api import Batch, Method, Section, StepContext
from cssbench.losses.distill import pod_loss
from cssbench.losses.pseudo import FLOOR, Arithmetic, adaptive_factor, pseudo_labels
from cssbench.models.passes import uncertainty_thresholds
from cssbench.models.pixel import PixelSegmenter, require_pixel_output
from cssbench.models.segvit import SegViT


class PLOP(Method):
    """The model's own loss on pseudo-labels, each image weighted by how much of its background is labelled + POD."""

    class Config(Section):
        """pod_factor, pod_output_factor  of every feature map and of the output map; VOC: 1e-2 and 5e-4. They are tied
                            to the size of ResNet-101's features; on a ViT calibrate them, or use pod_normalise.
        pod_normalise       divide POD's embeddings by their norm, so that the factors do not depend on that size.
        arithmetic          of the threshold: "reference" (public code) or "paper"; threshold: its least value.
        adaptive            weigh each image by its share of accepted background pixels.
        without_background  that weight for an image without background: 0 (public code) or up to 1.
        """

        pod_factor: float = Field(1e-3, ge=0)
        pod_output_factor: float = Field(1e-5, ge=0)
        pod_scales: list[PositiveInt] = Field([1, 2, 4], min_length=1)
        pod_reference: bool = False
        pod_normalise: bool = False
        arithmetic: Arithmetic = "reference"
        threshold: float = Field(FLOOR, ge=0)
        adaptive: bool = True
        without_background: float = Field(0.0, ge=0, le=1)
        balanced_init: bool = True

    plain_base = True
    config: Config
    thresholds: Tensor | None = None  # (K,) of this step

    def start_step(self, ctx: StepContext) -> None:
        require_pixel_output(ctx.model, "plop")
        if ctx.previous is None:
            return
        if self.config.balanced_init and isinstance(ctx.model, PixelSegmenter):
            ctx.model.init_from_background()
        old, seen = 1 + len(ctx.step.old), 1 + len(ctx.step.seen)
        self.thresholds = uncertainty_thresholds(
            ctx.previous, ctx.train_loader, ctx.device, old, seen, self.config.arithmetic, self.config.threshold
        )

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        if batch.previous is None:
            return ctx.model.loss(batch.output, batch.labels)
        config, old = self.config, batch.previous.pixel_logits
        num_old, num_classes = old.shape[1], batch.output.pixel_logits.shape[1]
        labels = pseudo_labels(batch.labels, old, self.thresholds, num_classes, config.arithmetic)
        weight = adaptive_factor(batch.labels, labels, num_old, config.without_background) if config.adaptive else None
        # A rejected pixel is no label; ATM heads would take it for a negative of every mask.
        left_out = {"ignore_mode": "masked"} if isinstance(ctx.model, SegViT) else {}
        terms = ctx.model.loss(batch.output, labels, weight=weight, **left_out)
        new_maps, old_maps = batch.output.pod_maps(num_old), batch.previous.pod_maps(num_old)
        factors = [config.pod_factor] * (len(old_maps) - 1) + [config.pod_output_factor]
        options = (config.pod_scales, config.pod_reference, config.pod_normalise)
        pod = pod_loss(new_maps, old_maps, factors, num_classes, num_classes - num_old, *options)
        return terms | {"pod": pod}
