"""DToP on SegViT: tokens whose class is certain at an auxiliary head leave the encoder (dynamic token pruning).

Source: thesis chapter 5 and its public code. A head after every tap, all of them ATMs of one stage with class tokens of
their own; the ones before the last grade the tokens. The mask of a head covers the whole grid: where a token has left,
it shows what the last head that saw it said. So a later head's loss also reaches the earlier ones (public code).
When tokens leave, and what becomes of their predictions: `cssbench.models.exits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cssbench.errors import ModelError
from cssbench.losses.pixel import cross_entropy, full_precision, own_labels
from cssbench.models.atm import ATMConfig, ATMHead, MaskPrediction
from cssbench.models.backbone import Backbone, to_map
from cssbench.models.exits import ExitOptions, Survivors, threshold
from cssbench.models.packed import Packed, check_block
from cssbench.models.pieces import pieces
from cssbench.models.segmenter import autograd_off
from cssbench.models.segvit import MaskOutput, SegViT
from cssbench.models.setr import NaiveHead

EPSILON = 1e-6


class TokenATM(ATMHead):
    """An ATM of one stage on the tokens that are still there."""

    def __init__(self, num_classes: int, encoder_width: int, config: ATMConfig):
        super().__init__(num_classes, encoder_width, 1, config)

    def forward(self, tokens: Survivors) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """-> mask logits (T, N), class logits (B, N, ...)."""
        queries = self.tokens.weight.repeat(len(tokens.exits), 1, 1)
        if tokens.whole:
            queries, similarity = self.stages[0](queries, tokens.dense)
            return similarity.transpose(1, 2).flatten(0, 1), self.classifier(queries)
        queries, masks = self.stages[0](queries, tokens.packed.tokens, tokens.packed)
        return masks, self.classifier(queries)

    def token_scores(self, masks: Tensor, classes: Tensor, layout: Packed) -> Tensor:
        """(T, N) in [0, 1]: mask times class probability, as `scores`, on the grid."""
        probability, shown = self.class_probabilities(classes), full_precision(masks).sigmoid()
        if self.version == "v2":
            return shown * probability[layout.image]
        return torch.cat([part @ own for part, own in zip(shown.split(layout.counts), probability, strict=True)])


class TokenFCN(NaiveHead):
    """LayerNorm and SETR's naive head on the tokens that are still there -> logits (T, outputs), background first."""

    def __init__(self, channels: int, width: int, outputs: int):
        super().__init__(channels, width, outputs)
        self.before = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, tokens: Survivors) -> Tensor:  # type: ignore[override]
        return tokens.convolve(super().forward, self.before(tokens.packed.tokens))


class StagedATM(TokenATM):
    """A step's heads: the last one itself, `auxiliary` the ones before it."""

    def __init__(self, num_classes: int, encoder_width: int, config: ATMConfig, auxiliary: Sequence[nn.Module]):
        super().__init__(num_classes, encoder_width, config)
        self.auxiliary = nn.ModuleList(auxiliary)

    def at(self, stage: int) -> nn.Module:
        return self.auxiliary[stage] if stage < len(self.auxiliary) else self


@dataclass
class DToPOutput(MaskOutput):
    """stages[t]: step t's ATMs, the last one alone if no token may leave. exits: (B, h, w) int64, index of the stage at
    whose end a token left. logits_of[t]: FCN auxiliary heads, (B, 1 + N, h, w) each. The rest: the model's options."""

    exits: Tensor = None  # type: ignore[assignment]
    logits_of: list[list[Tensor]] = field(default_factory=list)
    assembly: Literal["last", "own"] = "last"
    upsample: Literal["product", "logits"] = "product"

    @cached_property
    def scores(self) -> Tensor:
        if self.upsample == "logits":
            return torch.cat([head.scores(prediction, self.size) for head, prediction in self.final], dim=1)
        return self._upsample(self._maps())

    def score_chunks(self, most: int) -> Iterator[Tensor]:
        if self.upsample == "logits":
            return super().score_chunks(most)
        return map(self._upsample, pieces(self._maps(), most))

    def _upsample(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=self.size, mode="bilinear", align_corners=False)

    def _maps(self) -> Tensor:
        """(B, C, h, w): scores on the grid."""
        running = [(h, s) for h, s in zip(self.heads, self.stages, strict=True) if s is not None]
        return torch.cat([self._map(head, stages) for head, stages in running], dim=1)

    def _map(self, head: ATMHead, stages: list[MaskPrediction]) -> Tensor:
        """(B, N, h, w): scores of one step's classes on the grid."""
        assert isinstance(head, StagedATM)
        shown = full_precision(stages[-1].masks).sigmoid()
        made = head.combine(head.class_probabilities(stages[-1].classes), shown)
        if self.assembly == "own":
            for number, auxiliary in enumerate(head.auxiliary):
                own = shown  # an FCN's masks are probabilities already
                if isinstance(auxiliary, TokenATM) and len(stages) > 1:
                    own = auxiliary.combine(auxiliary.class_probabilities(stages[number].classes), shown)
                made = torch.where((self.exits == number)[:, None], own, made)
        return made


@dataclass
class Board:
    """What the heads of one step have said so far. masks: (B, L, N) logits; logits: (B, L, 1 + N) of FCN heads."""

    masks: Tensor | None = None
    logits: Tensor | None = None
    stages: list[MaskPrediction] = field(default_factory=list)
    logits_of: list[Tensor] = field(default_factory=list)


def check_taps(backbone: Backbone, model: str) -> None:
    """Raises ModelError where `model` cannot let tokens leave."""
    config = backbone.config
    if len(config.layers) < 2:
        raise ModelError(
            f"model.backbone.layers is {list(config.layers)}; model {model!r} lets tokens leave at every tap but the "
            f"last. Name two blocks or more, such as [6, 8, 12]."
        )
    if config.prefix_tokens != "drop":
        raise ModelError(f"Model {model!r} drops class and register tokens: set model.backbone.prefix_tokens = 'drop'.")
    backbone.refuse_checkpointing(model)
    for block in backbone.blocks_at(backbone.grid(config.image_size, config.image_size)):
        check_block(block)


class DToP(SegViT):
    """Options in `Config`. Loss: of every head that of one SegViT stage (thesis eq. 4.4), all with the same weight."""

    class Config(SegViT.Config, ExitOptions):
        """The options of SegViT; those of `ExitOptions`; and

        backbone.layers  an auxiliary head after each but the last, at which tokens leave.
        auxiliary        these heads: ATMs, or FCNs (LayerNorm and SETR's naive head), which have background and the
                         step's classes as outputs and learn by cross-entropy (Table 5.6).
        upsample         to the input: of the product of class probability and mask (public code), or of mask logits, as
                         SegViT does (only with assembly "last").
        """

        head: ATMConfig = ATMConfig(self_attention=True)
        auxiliary: Literal["atm", "fcn"] = "atm"
        fcn_width: PositiveInt = Field(256, description="hidden channels of FCN heads")
        fcn_weight: float = Field(1.0, ge=0, description="of their cross-entropy; not stated")
        upsample: Literal["product", "logits"] = "product"

    def __init__(self, config: DToP.Config):
        super().__init__(config)
        self.config: DToP.Config
        check_taps(self.backbone, "dtop")
        if config.loss != "mask":
            raise ModelError("Model 'dtop' grades tokens by class and mask, which model.loss = 'mask' trains.")
        if config.assembly == "own" and config.upsample == "logits":
            raise ModelError("model.assembly = 'own' has no mask logits to upsample: set model.upsample = 'product'.")

    def make_head(self, num_classes: int) -> ATMHead:
        config, width = self.config, self.backbone.width
        outputs = num_classes + (not self.has_background or bool(self.heads))
        auxiliary: list[nn.Module] = []
        for _ in config.backbone.layers[:-1]:
            if config.auxiliary == "atm":
                auxiliary.append(TokenATM(num_classes, width, config.head))
            else:
                auxiliary.append(TokenFCN(width, config.fcn_width, outputs))
        return StagedATM(num_classes, width, config.head, auxiliary)

    def forward(self, images: Tensor) -> DToPOutput:
        size, options = (images.shape[-2], images.shape[-1]), self.config
        layers, p0 = options.backbone.layers, threshold(options, self.training)
        encoder_off = self.is_frozen(self.backbone)
        with autograd_off(encoder_off):
            tokens = Survivors(self.backbone, images, options)
        boards, features = [Board() for _ in self.heads], []
        for stage, layer in enumerate(layers):
            with autograd_off(encoder_off):
                tokens.run(layer)
            features.append(to_map(tokens.carried, tokens.grid))
            pruning = p0 < 1 and stage < len(layers) - 1
            if not (pruning or self.training or stage == len(layers) - 1):
                continue  # nothing depends on these heads
            votes = [self._read(t, stage, tokens, boards[t], pruning) for t in range(len(self.heads))]
            if pruning:
                found = votes[:1] if options.voters == "first" else votes
                tokens.retire(torch.cat([vote for vote in found if vote is not None], dim=1), stage, p0)
        skipped = [self._skipped(head) for head in self.heads]
        return DToPOutput(
            size,
            features,
            [None if skip else board.stages for skip, board in zip(skipped, boards, strict=True)],
            list(self.heads),  # type: ignore[arg-type]
            options.background_query,
            options.pixel_form,
            exits=tokens.exits.unflatten(1, tokens.grid),
            logits_of=[[] if skip else board.logits_of for skip, board in zip(skipped, boards, strict=True)],
            assembly=options.assembly,
            upsample=options.upsample,
            depths=tokens.depths,
        )

    def _skipped(self, head: nn.Module) -> bool:
        return self.training and self.skip_frozen_heads and self.is_frozen(head)

    def _read(self, step: int, stage: int, tokens: Survivors, board: Board, pruning: bool) -> Tensor | None:
        """What step `step`'s head says at a stage, written on its board; the scores of its classes (T, N), background
        left out, or None if they do not count."""
        whole, scores = self.heads[step], None
        assert isinstance(whole, StagedATM)
        votes = pruning and (self.config.voters == "all" or step == 0)
        if self._skipped(whole) and not votes:
            return None
        head = whole.at(stage)
        with autograd_off(self.is_frozen(whole)):
            if isinstance(head, TokenATM):
                masks, classes = head(tokens)
                if votes:
                    scores = head.token_scores(masks.detach(), classes.detach(), tokens.packed)
                    scores = scores[:, self.positions[step].start == 0 :]
            else:
                logits = head(tokens)
                probability = full_precision(logits).softmax(1)
                first = 0 if len(self.positions[step]) == logits.shape[1] else 1  # background may be a query
                masks, classes = probability[:, first:].logit(EPSILON), None
                scores = probability[:, 1:].detach()
                board.logits = tokens.write(logits, board.logits)
                board.logits_of.append(to_map(board.logits, tokens.grid))
            board.masks = tokens.write(masks, board.masks)
            if classes is not None:
                board.stages.append(MaskPrediction(to_map(board.masks, tokens.grid), classes))
        return scores if votes else None

    def extra_terms(
        self, output: DToPOutput, labels: Tensor, chosen: slice, weight: Tensor | None
    ) -> dict[str, Tensor]:
        """With FCN auxiliary heads: `auxiliary`, the sum of their cross-entropies. To a step's heads the classes of
        other steps are background."""
        if self.config.auxiliary == "atm":
            return {}
        total = labels.new_zeros((), dtype=torch.float32)
        for made, positions in zip(output.logits_of[chosen], self.positions[chosen], strict=True):
            own = own_labels(labels, range(max(1, positions.start) - 1, positions.stop), other=0)
            for logits in made:
                full = F.interpolate(full_precision(logits), labels.shape[-2:], mode="bilinear")
                total = total + cross_entropy(full, own, "all", weight)
        return {"auxiliary": self.config.fcn_weight * total}
