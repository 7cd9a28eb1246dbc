"""DToP on SETR-naive: tokens whose class is certain at an auxiliary head leave the encoder (dynamic token pruning).

Source: thesis chapter 5, Tables 5.3, 5.6 and 5.7. The logits of a token that has left are those of the head at which it
left. When tokens leave: `cssbench.models.exits`; a token that is most probably background stays, as background is where
later steps' classes are. Confidence is the softmax' over the voting heads' outputs (FCN), or P sigmoid(M) (ATM).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cssbench.losses.pixel import cross_entropy, full_precision
from cssbench.models.atm import ATMConfig, MaskPrediction
from cssbench.models.backbone import to_map
from cssbench.models.dtop import EPSILON, TokenATM, TokenFCN, check_taps
from cssbench.models.exits import ExitOptions, Survivors, Threshold, threshold
from cssbench.models.linear import TappedBackboneConfig
from cssbench.models.pixel import PixelOutput
from cssbench.models.segmenter import autograd_off
from cssbench.models.segvit import atm_terms
from cssbench.models.setr import NaiveHead, SETRNaive, share_background
from cssbench.scenario import Step


class StagedFCN(NaiveHead):
    """A step's heads: the last one itself, `auxiliary` the ones before it."""

    def __init__(self, channels: int, width: int, outputs: int, auxiliary: list[nn.Module]):
        super().__init__(channels, width, outputs)
        self.auxiliary = nn.ModuleList(auxiliary)


@dataclass
class SETRDToPOutput(PixelOutput):
    """auxiliary: what the auxiliary heads say after each tap, (B, C, h, w) logits, background first.
    masks[stage][t]: their ATMs, where they are ATMs."""

    auxiliary: list[Tensor] = field(default_factory=list)
    masks: list[list[MaskPrediction]] = field(default_factory=list)


class SETRDToP(SETRNaive):
    """Options in `Config`. Loss: cross-entropy of the last head's logits, and that of the auxiliary heads, weighted."""

    class Config(SETRNaive.Config, ExitOptions):
        """The options of SETR-naive; those of `ExitOptions` (FCN heads want a p0 of 0.98); and

        backbone.layers   an auxiliary head after each but the last, at which tokens leave.
        auxiliary         these heads: FCNs (LayerNorm and SETR's naive head), or ATMs of one stage (Table 5.6), which
                          learn as SegViT's do and whose logits are the logarithms of their scores.
        auxiliary_weight  of their loss; not stated: that of SETR's auxiliary heads in mmsegmentation.
        """

        backbone: TappedBackboneConfig = TappedBackboneConfig(layers=[6, 8, 12])
        auxiliary: Literal["fcn", "atm"] = "fcn"
        auxiliary_weight: float = Field(0.4, ge=0)
        head: ATMConfig = Field(ATMConfig(self_attention=True), description="of ATM auxiliary heads")
        absent_weight: float = Field(0.1, gt=0, description="class weight of 'absent' of ATM auxiliary heads")
        p0: Threshold = 0.98

    config: Config

    def __init__(self, config: SETRDToP.Config):
        super().__init__(config)
        check_taps(self.backbone, "setr-dtop")
        self.positions: list[range] = []

    def grow(self, step: Step) -> None:
        self.positions.append(step.new_positions)
        super().grow(step)

    def make_head(self, outputs: int) -> nn.Module:
        config, classes = self.config, len(self.positions[-1])
        auxiliary: list[nn.Module] = []
        for _ in config.backbone.layers[:-1]:
            if config.auxiliary == "fcn":
                auxiliary.append(TokenFCN(self.width, config.head_width, outputs))
            else:
                auxiliary.append(TokenATM(classes, self.width, config.head))
        return StagedFCN(self.width, config.head_width, outputs, auxiliary)

    def forward(self, images: Tensor) -> SETRDToPOutput:
        size, options = (images.shape[-2], images.shape[-1]), self.config
        layers, p0 = options.backbone.layers, threshold(options, self.training)
        output = SETRDToPOutput(size)
        with autograd_off(self.is_frozen(self.backbone)):
            tokens = Survivors(self.backbone, images, options)
        canvas, taps = None, []
        for stage, layer in enumerate(layers):
            with autograd_off(self.is_frozen(self.backbone)):
                tokens.run(layer)
            taps.append(tokens.carried)
            if stage == len(layers) - 1:
                normed = self.norm(tokens.packed.tokens)
                logits = torch.cat([tokens.convolve(head, normed) for head in self.heads], dim=1)
                output.low = to_map(tokens.write(logits, canvas), tokens.grid)
            elif p0 < 1 or self.training:
                logits = self._read(stage, tokens, output)
                canvas = tokens.write(logits, canvas)
                output.auxiliary.append(to_map(canvas, tokens.grid))
                if p0 < 1:
                    self._retire(logits, stage, tokens, p0)
        output.features = [to_map(tap, tokens.grid) for tap in self.finish(taps)]
        output.depths = tokens.depths
        return output

    def _read(self, stage: int, tokens: Survivors, output: SETRDToPOutput) -> Tensor:
        """(T, C): logits of the auxiliary heads of all steps, side by side."""
        heads: list[Any] = [head.auxiliary[stage] for head in self.heads]  # type: ignore[union-attr, index]
        if self.config.auxiliary == "fcn":
            return torch.cat([head(tokens) for head in heads], dim=1)
        said = [head(tokens) for head in heads]
        scores = [head.token_scores(*one, tokens.packed) for head, one in zip(heads, said, strict=True)]
        before = output.masks[-1] if output.masks else [None] * len(heads)
        made = []
        for (masks, classes), earlier in zip(said, before, strict=True):
            canvas = None if earlier is None else earlier.masks.flatten(2).transpose(1, 2)
            made.append(MaskPrediction(to_map(tokens.write(masks, canvas), tokens.grid), classes))
        output.masks.append(made)
        classes = torch.cat(scores, dim=1)
        background = 1 - classes.amax(1, keepdim=True)
        return torch.cat([background, classes], dim=1).clamp(min=EPSILON).log()

    def _retire(self, logits: Tensor, stage: int, tokens: Survivors, p0: float) -> None:
        """By the probabilities of the voting heads' classes; tokens of the background stay."""
        outputs = 1 + len(self.positions[0]) if self.config.voters == "first" else logits.shape[1]
        logits = full_precision(logits.detach())[:, :outputs]
        if self.config.auxiliary == "fcn":
            background, scores = logits.softmax(1).tensor_split([1], dim=1)
        else:
            scores = logits[:, 1:].exp()
            background = 1 - scores.amax(1, keepdim=True)  # to the voting heads; logits[:, 0] is to all
        tokens.retire(scores, stage, p0, hold=background[:, 0] >= scores.amax(1))

    def loss(self, output: Any, labels: Tensor, *, weight: Tensor | None = None) -> dict[str, Tensor]:
        """{"ce", "auxiliary"}; FCN heads by cross-entropy, ATMs as in SegViT (class + 20 focal + dice, each stage)."""
        terms = super().loss(output, labels, weight=weight)
        total = terms["ce"].new_zeros(())
        if self.config.auxiliary == "fcn":
            for logits in output.auxiliary:
                full = F.interpolate(full_precision(logits), output.size, mode="bilinear")
                total = total + cross_entropy(full, labels, self.config.reduction, weight)
        else:
            for t, positions in enumerate(self.positions):
                found = atm_terms([stage[t] for stage in output.masks], labels, positions, self.config.absent_weight)
                total = total + found["class"] + 20 * found["focal"] + found["dice"]
            total = total if weight is None else total * weight.mean()
        return terms | {"auxiliary": self.config.auxiliary_weight * total}

    def init_from_background(self) -> None:
        """As SETR-naive's; FCN auxiliary heads start in the same way."""
        super().init_from_background()
        for first, newest in zip(self.heads[0].auxiliary, self.heads[-1].auxiliary, strict=True):  # type: ignore[arg-type]
            if isinstance(first, TokenFCN) and isinstance(newest, TokenFCN):
                newest.before.load_state_dict(first.before.state_dict())
                share_background(first, newest)
