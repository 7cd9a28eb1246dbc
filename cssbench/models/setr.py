"""SETR-naive on a plain ViT, one head per step: the decoder that SegViT is compared with (thesis Table 4.4).

Source: Zheng et al. 2021, section 3.2 ("naive"): 1x1 convolution to 256 channels, BatchNorm, ReLU, 1x1 convolution to
the classes, bilinear upsampling. 0.24 of the 107.24 GFLOPs at ViT-B 512 and 150 classes are the head's.
Known deviations: BatchNorm's batch statistics are those of one process; the final LayerNorm is fresh (`Backbone`).
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from cssbench.losses.init import balanced_init
from cssbench.models.linear import LinearViT


class NaiveHead(nn.Module):
    """(B, C, h, w) -> (B, N, h, w) logits. In a frozen head BatchNorm keeps its running statistics: `freeze_old` holds
    it in eval mode."""

    def __init__(self, channels: int, width: int, outputs: int):
        super().__init__()
        self.hidden = nn.Conv2d(channels, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.hidden(x)).relu())


class SETRNaive(LinearViT):
    """Tokens of the last tap -> final LayerNorm -> one two-layer head per step, its hidden layer its own."""

    class Config(LinearViT.Config):
        """head_width: channels of each head's hidden layer. The rest as in `LinearViT.Config`."""

        head_width: PositiveInt = 256

    config: Config

    def make_head(self, outputs: int) -> nn.Module:
        return NaiveHead(self.width, self.config.head_width, outputs)

    def init_from_background(self) -> None:
        """MiB's start of a step: the newest head copies step 0's hidden layer, and its N classes share background's
        probability evenly with it. In eval mode the probability of every old class stays what it was."""
        first, newest = self.heads[0], self.heads[-1]
        assert isinstance(first, NaiveHead)
        assert isinstance(newest, NaiveHead)
        share_background(first, newest)


@torch.no_grad()
def share_background(first: NaiveHead, newest: NaiveHead) -> None:
    """`newest` gets the hidden layer of `first`, and an even share of its background (MiB)."""
    newest.hidden.load_state_dict(first.hidden.state_dict())
    newest.norm.load_state_dict(first.norm.state_dict())
    old, new = first.classifier.state_dict(), newest.classifier.state_dict()  # views of the parameters
    weight, bias, background = balanced_init(old["weight"][0], old["bias"][0], len(new["bias"]))
    new["weight"].copy_(weight)
    new["bias"].copy_(bias)
    old["bias"][0] = background
