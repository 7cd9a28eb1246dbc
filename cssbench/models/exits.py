"""Which tokens leave a ViT early: the rules of dynamic token pruning (DToP), and the tokens on their way.

Source: thesis chapter 5 (sections 5.2.2 to 5.2.4, Table 5.5) and its public code. A token whose class is certain at an
auxiliary head leaves; its prediction stays what the heads have said so far.
Shapes: B images, L cells of the token grid, C width; T tokens that are still there, of all images (`Packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from cssbench.config import Section
from cssbench.models.backbone import Backbone, to_map
from cssbench.models.packed import Packed, unpack, whole
from cssbench.models.ragged_attention import Attention

Threshold = Annotated[float, Field(gt=0, le=1)]


class ExitOptions(Section):
    """When tokens leave.

    p0          a token leaves when its confidence is above this; 1: none leaves, whatever the rule, and the auxiliary
                heads rest but for their own training.
    train_p0    in training. "none": as p0 (the thesis' Retrain; with `train.initial`, Finetune). 1: Direct, pruning is
                applied to a model that was trained without. The thesis trains with 0.95.
    exact       does a confidence equal to p0 leave too? Text: yes; public code: no.
    rule        top      of each class among an image's leaving tokens, the `keep` most confident stay (k = 5)
                remove   all leave; an image's least confident token stays if it would be left without (not stated)
                average  all leave, and one token per class, their mean, takes their place; it has no cell, is never
                         graded, and goes on to the end (not stated)
                ratio    whatever p0 < 1, the most confident `share` of an image's tokens leave, rounded down, of those
                         still there at a head (not stated; gives Table 5.5's GFLOPs)
    voters      whose classes count under growth. first: step 0's heads alone, so that the tokens that old heads see
                never change with later steps. all: the heads of all steps; then old predictions may move.
    assembly    of the final map: `last`, class probabilities of the last heads for all tokens (public code), or `own`,
                of the heads at which a token left (text). Only heads that put out masks and class probabilities differ.
    attention   of images with different numbers of tokens: `padded`, `loop` over images, `varlen` (one CUDA kernel, in
                half precision), or `auto`: varlen where it can run, else the loop on a CPU and padded on a GPU.
    """

    p0: Threshold = 0.95
    train_p0: Threshold | None = None
    exact: bool = Field(False, description="also leave at confidence = p0")
    rule: Literal["top", "remove", "average", "ratio"] = "top"
    keep: PositiveInt = Field(5, description="rule `top`: k")
    share: float = Field(0.35, gt=0, lt=1, description="rule `ratio`")
    voters: Literal["first", "all"] = "first"
    assembly: Literal["last", "own"] = "last"
    attention: Attention = "auto"


def threshold(options: ExitOptions, training: bool) -> float:
    """p0 in this mode."""
    return options.train_p0 if training and options.train_p0 is not None else options.p0


def rank_within(groups: Tensor, values: Tensor) -> Tensor:
    """(n,) int64: place of each value among those of its group, from 0, largest first; equal values in their order.

    groups: (n,) integers; values: (n,).
    """
    order = values.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    together = groups[order]
    places = torch.arange(len(order), device=groups.device) - torch.searchsorted(together, together)
    return torch.empty_like(places).scatter_(0, order, places)


def leaving(confidence: Tensor, label: Tensor, layout: Packed, options: ExitOptions, p0: float) -> Tensor:
    """(T,) bool: which tokens leave now, decided within each image.

    confidence: (T,) in [0, 1]; minus infinity: a token that must stay. label: (T,) int64, its most probable class.
    """
    image = layout.image
    if options.rule == "ratio":
        quota = (layout.offsets.diff() * options.share).floor()
        return (rank_within(image, confidence) < quota[image]) & confidence.isfinite()
    easy = confidence >= p0 if options.exact else confidence > p0
    if options.rule == "average":
        return easy
    if options.rule == "remove":
        last = rank_within(image, -confidence) == 0
        left = torch.zeros_like(layout.offsets[1:]).index_add(0, image, (~easy).long())
        return easy & ~(last & (left == 0)[image])
    found = easy.nonzero()[:, 0]
    groups = image[found] * (int(label.max()) + 1 if len(found) else 1) + label[found]
    rank = rank_within(groups, confidence[found])
    return easy.index_put((found,), rank >= options.keep)


def with_averages(kept: Packed, gone: Packed, label: Tensor, length: int) -> Packed:
    """`kept` and, behind each image's tokens, one for each class among its `gone` ones: their mean, at cell `length`.

    label: of `gone`, (its number of tokens,). Differentiable in both.
    """
    groups = gone.image * (int(label.max()) + 1) + label
    names, group = groups.unique(return_inverse=True)
    sums = gone.tokens.new_zeros(len(names), gone.tokens.shape[1]).index_add(0, group, gone.tokens)
    means = sums / group.bincount(minlength=len(names))[:, None].to(sums)
    images = names // (int(label.max()) + 1)
    order = torch.cat([kept.image, images]).argsort(stable=True)
    positions = torch.cat([kept.positions, torch.full_like(images, length)])
    counts = kept.offsets.diff() + images.bincount(minlength=len(kept.offsets) - 1)
    return Packed(torch.cat([kept.tokens, means])[order], F.pad(counts.cumsum(0), (1, 0)), positions[order])


class Survivors:
    """The tokens that are still there. Until the first one leaves, blocks and heads run on them as they always do.

    packed: (T, C) with their cells. carried: (B, L, C), every token as it is now or was when it left.
    exits: (B, L) int64, the stage at whose end each cell's token leaves.
    """

    def __init__(self, backbone: Backbone, images: Tensor, options: ExitOptions):
        """images: (B, 3, H, W), on a grid of h x w = L cells."""
        self.backbone, self.grid = backbone, backbone.grid(images.shape[-2], images.shape[-1])
        self.options, self.whole, self.carried = options, True, backbone.embed(images)
        self.length, self.packed = self.carried.shape[1], whole(self.carried)
        self.exits = torch.full(self.carried.shape[:2], len(backbone.config.layers) - 1, device=images.device)
        self._blocks, self._done = backbone.blocks_at(self.grid), 0

    @property
    def dense(self) -> Tensor:
        """(B, L, C), while `whole`."""
        return self.packed.tokens.unflatten(0, (-1, self.length))

    def run(self, layer: int) -> None:
        """Up to and with block `layer` (1-based); tokens attend to those that are still there."""
        blocks, self._done = self._blocks[self._done : layer], layer
        if self.whole:
            tokens = self.dense
            for block in blocks:
                tokens = block(tokens)
            self.packed, self.carried = self.packed.with_tokens(tokens.flatten(0, 1)), tokens
            return
        for block in blocks:
            self.packed = self.backbone.run(block, self.packed, attention=self.options.attention)
        self.carried = self.write(self.packed.tokens, self.carried)

    @property
    def depths(self) -> Tensor:
        """(B, h, w) int64: the blocks that each cell's token went through (`SegOutput.depths`)."""
        layers = torch.tensor(self.backbone.config.layers, device=self.exits.device)
        return layers[self.exits].unflatten(1, self.grid)

    def convolve(self, module: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """(T, D): 1x1 convolutions (with norms over their channels) on `tokens` (T, C)."""
        if self.whole:
            maps = module(to_map(tokens.unflatten(0, (-1, self.length)), self.grid))
            return maps.flatten(2).transpose(1, 2).flatten(0, 1)
        return module(tokens.t()[None, :, :, None])[0, :, :, 0].t()

    def write(self, values: Tensor, canvas: Tensor | None) -> Tensor:
        """(B, L, D): `values` (T, D) at the cells of their tokens, what `canvas` (B, L, D) holds at all others'.

        canvas: None only while `whole`. Gradients reach both.
        """
        if self.whole:
            return values.unflatten(0, (-1, self.length))
        assert canvas is not None
        written = self.packed.with_tokens(values.to(canvas.dtype))
        if self.options.rule == "average":
            written = written.select(written.positions < self.length)
        return unpack(written, self.length, canvas)

    def retire(self, scores: Tensor, stage: int, p0: float, hold: Tensor | None = None) -> None:
        """Let tokens go by their scores (T, number of voting classes) in [0, 1].

        hold: (T,) bool, tokens that stay whatever their score.
        """
        confidence, label = scores.detach().max(dim=1)
        stay = self.packed.positions >= self.length
        confidence = confidence.masked_fill(stay if hold is None else stay | hold, -torch.inf)
        gone = leaving(confidence, label, self.packed, self.options, p0)
        if not gone.any():
            return
        self.whole = False
        left = self.packed.select(gone)
        self.exits[left.image, left.positions] = stage
        self.packed = self.packed.select(~gone)
        if self.options.rule == "average":
            self.packed = with_averages(self.packed, left, label[gone], self.length)
