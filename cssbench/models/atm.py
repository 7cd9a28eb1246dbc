"""The Attention-to-Mask (ATM) decoder of SegViT: class tokens attend to image tokens, and their similarity is the mask.

Source: Zhang et al. 2022 (v1), section 3.2; thesis section 4.2.1 (v2). v2 drops the self-attention among class tokens
and classifies each query as present or absent, so that classes do not see each other.
Shapes: B images, N classes (queries), L image tokens on an h x w grid, C encoder width, d decoder width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cssbench.config import Section
from cssbench.errors import ModelError
from cssbench.losses.pixel import full_precision
from cssbench.models.cross_attention import CrossAttention, Fold
from cssbench.models.packed import Packed
from cssbench.models.pieces import pieces


class ATMConfig(Section):
    """Options of an ATM head."""

    version: Literal["v1", "v2"] = "v2"
    self_attention: bool | None = Field(
        None, description="among class tokens; None: as the version (v1 yes, v2 no). DToP's heads: v2 with it"
    )
    width: PositiveInt | None = Field(None, description="d; None: half the encoder's width")
    heads: PositiveInt = Field(12, description="attention heads: 12 for ViT-B, 16 for ViT-L in the public code")
    layers: PositiveInt = Field(3, description="decoder layers per stage")
    dropout: float = Field(0.1, ge=0, lt=1)
    init_std: float = Field(
        0.02,
        gt=0,
        description="of every linear; small heads (d = 96) learn sooner with 0.06, which keeps their logits as large",
    )
    fold: Fold = Field(
        "auto",
        description="cross-attention's key and value projections done to the few queries instead of to all tokens, "
        "equal up to rounding; auto: where that is cheaper, in heads of less than d / (heads - 1) classes",
    )


@dataclass
class MaskPrediction:
    """One supervised output. masks: (B, N, h, w) logits. classes: (B, N, 2) logits, index 0 = present (v2), or
    (B, N, N+1), last = no object (v1)."""

    masks: Tensor
    classes: Tensor


class ATMLayer(nn.Module):
    """Post-norm decoder layer: (self-attention, in v1) -> cross-attention -> FFN of 4d with ReLU.

    Inputs must be contiguous: for others PyTorch picks the kernel of a linear by whether its weight requires grad, and
    freezing a head would move its output in the last bit. For the same reason self-attention gets (N, B, d), not
    `batch_first`, which transposes inside.
    """

    def __init__(self, width: int, config: ATMConfig):
        super().__init__()
        self.self_attention = None
        if config.version == "v1" if config.self_attention is None else config.self_attention:
            self.self_attention = nn.MultiheadAttention(width, config.heads, config.dropout)
            self.self_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, config.heads, config.dropout, config.fold)
        self.cross_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, tokens: Tensor, layout: Packed | None = None) -> tuple[Tensor, Tensor]:
        if self.self_attention is not None:
            turned = queries.transpose(0, 1).contiguous()
            mixed = self.self_attention(turned, turned, turned, need_weights=False)[0].transpose(0, 1)
            queries = self.self_norm(queries + self.dropout(mixed))
        context, similarity = self.cross_attention(queries, tokens, layout)
        queries = self.cross_norm(queries + self.dropout(context))
        return self.ffn_norm(queries + self.dropout(self.ffn(queries))), similarity


class ATMStage(nn.Module):
    """One tap: linear projection C -> d, LayerNorm, decoder layers. The last layer's similarity is the stage's mask."""

    def __init__(self, encoder_width: int, width: int, config: ATMConfig):
        super().__init__()
        self.project, self.norm = nn.Linear(encoder_width, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(ATMLayer(width, config) for _ in range(config.layers))

    def forward(self, queries: Tensor, tokens: Tensor, layout: Packed | None = None) -> tuple[Tensor, Tensor]:
        tokens = self.norm(self.project(tokens.contiguous()))
        similarity = tokens.new_zeros(())
        for layer in self.layers:
            queries, similarity = layer(queries, tokens, layout)
        return queries, similarity


class ATMHead(nn.Module):
    """Class tokens, a cascade of stages (deepest tap first), one class linear shared by the stages.

    Stage masks are summed as logits: M1 = S1, M2 = S1 + S2, ... Buffers `class_scale` (scalar) and `class_shift` (N,)
    calibrate the presence logits of a finished head (identity until a method sets them).
    Raises ModelError when d is not a multiple of the number of attention heads.
    """

    def __init__(self, num_classes: int, encoder_width: int, num_stages: int, config: ATMConfig):
        super().__init__()
        width = head_width(config, encoder_width)
        self.num_classes, self.version = num_classes, config.version
        self.tokens = nn.Embedding(num_classes, width)
        self.stages = nn.ModuleList(ATMStage(encoder_width, width, config) for _ in range(num_stages))
        self.classifier = nn.Linear(width, 2 if config.version == "v2" else num_classes + 1)
        self.register_buffer("class_scale", torch.ones(()))
        self.register_buffer("class_shift", torch.zeros(num_classes))
        self.class_scale: Tensor
        self.class_shift: Tensor
        self.apply(lambda module: init_linear(module, config.init_std))

    def forward(self, taps: list[Tensor], grid: tuple[int, int]) -> list[MaskPrediction]:
        """taps: (B, L, C) token maps, shallow first -> one prediction per stage, the last one for inference."""
        queries = self.tokens.weight.repeat(len(taps[0]), 1, 1)
        masks: Tensor | None = None
        outputs = []
        for stage, tokens in zip(self.stages, reversed(taps), strict=True):
            queries, similarity = stage(queries, tokens)
            masks = similarity if masks is None else masks + similarity
            outputs.append(MaskPrediction(masks.unflatten(2, grid), self.classifier(queries)))
        return outputs

    def class_probabilities(self, classes: Tensor) -> Tensor:
        """v2: (B, N), P(class present). v1: (B, N, N), P(query q votes for class c), 'no object' left out."""
        logits = full_precision(classes) * self.class_scale
        if self.version == "v2":
            return torch.sigmoid(logits[..., 0] - logits[..., 1] + self.class_shift)
        logits = torch.cat([logits[..., :-1] + self.class_shift, logits[..., -1:]], dim=-1)
        return logits.softmax(-1)[..., :-1]

    def scores(self, prediction: MaskPrediction, size: tuple[int, int]) -> Tensor:
        """(B, N, H, W) in [0, 1]: mask logits upsampled to `size`, sigmoid, times class probability.

        v2: P[c] sigmoid(M[c]). v1: sum over queries q of P[q, c] sigmoid(M[q]).
        """
        return self._scores(self.class_probabilities(prediction.classes), full_precision(prediction.masks), size)

    def score_chunks(self, prediction: MaskPrediction, size: tuple[int, int], most: int) -> Iterator[Tensor]:
        """`scores` bit for bit, about `most` classes at a time; of v1 all at once."""
        probability, masks = self.class_probabilities(prediction.classes), full_precision(prediction.masks)
        first = 0
        for piece in pieces(masks, masks.shape[1] if self.version == "v1" else most):
            last = first + piece.shape[1]
            yield self._scores(probability[:, first:last], piece, size)
            first = last

    def _scores(self, probability: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
        shown = upsampled(masks, size).sigmoid_()
        if self.version == "v2" and not torch.is_grad_enabled():
            return shown.mul_(probability[..., None, None])
        return self.combine(probability, shown)

    def combine(self, probability: Tensor, masks: Tensor) -> Tensor:
        """(B, N, H, W): `class_probabilities` times masks, (B, N, H, W) in [0, 1]."""
        if self.version == "v2":
            return probability[..., None, None] * masks
        return torch.einsum("bqc,bqhw->bchw", probability, masks)

    def class_maps(self, prediction: MaskPrediction, size: tuple[int, int]) -> Tensor:
        """(B, N, H, W) logits: raw class logits times mask probabilities, for per-pixel losses (as CoMFormer's ports).

        v2: (present - absent)[c] sigmoid(M[c]). v1: sum over q of classes[q, c] sigmoid(M[q]), 'no object' left out.
        """
        masks, classes = upsampled(full_precision(prediction.masks), size), full_precision(prediction.classes)
        if self.version == "v2":
            return (classes[..., 0] - classes[..., 1])[..., None, None] * masks.sigmoid()
        return torch.einsum("bqc,bqhw->bchw", classes[..., :-1], masks.sigmoid())


def upsampled(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, h, w) -> (B, N, H, W), bilinear."""
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)


def head_width(config: ATMConfig, encoder_width: int) -> int:
    """d. Raises ModelError when it is not a multiple of the number of attention heads."""
    width = config.width or encoder_width // 2
    if width % config.heads:
        raise ModelError(
            f"An ATM head of width {width} does not divide into {config.heads} attention heads. "
            f"Set model.head.heads to a divisor of {width}, or model.head.width."
        )
    return width


def init_linear(module: nn.Module, std: float) -> None:
    """Every Linear, self-attention's output too: truncated normal, zero bias. The rest keeps PyTorch's: LayerNorm 1/0,
    class tokens N(0, 1), fused q/k/v weights of self-attention Xavier. As in the public code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
