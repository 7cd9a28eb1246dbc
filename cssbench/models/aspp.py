"""DeepLab-v3: a ResNet, atrous spatial pyramid pooling, and one 1x1 head per step.

Sources: Chen et al. 2017; the layout of the ASPP as in the public code of MiB and PLOP: the image-pooling branch is
normalised alone and added after the reduction.
Known deviations: BatchNorm and ReLU in the ResNet where the public code has synchronised in-place ABN with leaky ReLU;
batch statistics are those of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cssbench.config import Section
from cssbench.errors import ModelError
from cssbench.losses.pixel import Reduction
from cssbench.models.pixel import PixelOutput, PixelSegmenter
from cssbench.models.resnet import ResNetBackbone, ResNetConfig
from cssbench.models.segmenter import Encoded, autograd_off

SLOPE = 0.01  # of the leaky ReLU in the ASPP


def normed(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.LeakyReLU(SLOPE))


class ASPP(nn.Module):
    """(B, C, h, w) -> (B, D, h, w): a 1x1 and three dilated 3x3 convolutions, concatenated, normalised and reduced to
    D, plus the pooled branch; normalised again.

    In training the pooled branch sees the whole map. In eval mode it sees a window of `pool_window` cells, so that a
    large image is pooled over what a training crop would show (512 px at stride 16: 32); None: the whole map.
    """

    def __init__(self, channels: int, width: int, dilations: list[int], pool_window: int | None):
        super().__init__()
        self.pool_window = pool_window
        self.branches = nn.ModuleList([nn.Conv2d(channels, width, 1, bias=False)])
        self.branches += [nn.Conv2d(channels, width, 3, padding=d, dilation=d, bias=False) for d in dilations]
        self.branch_norm = normed(width * (1 + len(dilations)))
        self.reduce = nn.Conv2d(width * (1 + len(dilations)), width, 1, bias=False)
        self.pool = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), normed(width))
        self.pool_reduce = nn.Conv2d(width, width, 1, bias=False)
        self.norm = normed(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.reduce(self.branch_norm(torch.cat([branch(x) for branch in self.branches], dim=1)))
        return self.norm(out + self.pool_reduce(self.pool(self.pooled(x))))

    def pooled(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1), or in eval mode (B, C, h, w) window means, those at the border repeated outwards."""
        height, width = x.shape[-2:]
        window = (height, width)
        if self.pool_window is not None and not self.training:
            window = (min(self.pool_window, height), min(self.pool_window, width))
        means = F.avg_pool2d(x, window, stride=1)
        rows, columns = height - means.shape[-2], width - means.shape[-1]
        if rows == height - 1 and columns == width - 1:
            return means
        return F.pad(means, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), mode="replicate")


@dataclass
class AtrousOutput(PixelOutput):
    """`features`: the 4 residual stages before their last activation, then the ASPP's output (the embedding)."""

    @property
    def encoded(self) -> Tensor:
        """(B, C, h, w): the last residual stage, before its activation (as it is tapped for POD too)."""
        return self.features[-2]


class DeepLabV3(PixelSegmenter):
    """The model of nearly every published table of MiB, PLOP and REMINDER."""

    class Config(Section):
        """width: D of the ASPP. decay_all: weight decay on norms and biases too, as the public code.

        reduction: of the cross-entropy: "all" pixels in the denominator, as the public code, or "valid" ones only.
        """

        backbone: ResNetConfig = ResNetConfig()
        width: PositiveInt = 256
        dilations: list[PositiveInt] = Field([6, 12, 18], min_length=1)
        pool_window: PositiveInt | None = Field(32, description="cells of the pooled branch in eval mode; None: all")
        decay_all: bool = True
        reduction: Reduction = "all"

    def __init__(self, config: DeepLabV3.Config):
        super().__init__(config)
        self.config: DeepLabV3.Config
        self.backbone = ResNetBackbone(config.backbone)
        self.width = config.width
        self.aspp = ASPP(self.backbone.width, config.width, config.dilations, config.pool_window)
        self.pixel_mean, self.pixel_std = self.backbone.pixel_mean, self.backbone.pixel_std

    def embed(self, images: Tensor) -> list[Tensor]:
        """Raises ModelError on one image in training mode: the pooled branch cannot be normalised over one value."""
        if self.training and len(images) == 1 and not self.is_frozen(self.aspp):
            raise ModelError(
                "DeepLab-v3 cannot train on one image at a time: its pooled branch is normalised over the batch. Set "
                "train.batch_size and train.accumulate so that each pass and process has two images or more."
            )
        with autograd_off(self.is_frozen(self.backbone)):
            maps = self.backbone(images)
            return [*maps, self.aspp(maps[-1].relu())]

    def decode(self, encoded: Encoded) -> AtrousOutput:
        output = super().decode(encoded)
        return AtrousOutput(output.size, output.features, output.low)

    def param_groups(self) -> list[dict[str, Any]]:
        groups = super().param_groups()
        if self.config.decay_all:
            groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
        return groups
