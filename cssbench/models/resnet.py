"""timm's ResNets as encoders: feature maps of the four stages."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import timm
from pydantic import Field
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from cssbench.config import Section
from cssbench.errors import ModelError
from cssbench.models.weights import fill, read_weights


class ResNetConfig(Section):
    """A timm ResNet."""

    name: str = "resnet101"
    pretrained: bool = Field(False, description="download timm's weights (or take them from its cache)")
    checkpoint: str | None = Field(None, description="local file of weights (safetensors, or .pth of tensors)")
    output_stride: Literal[8, 16, 32] = Field(16, description="input px per cell of the last map; by dilation")
    mean: tuple[float, float, float] | None = Field(
        None, description="normalisation; None: as timm states for the weights"
    )
    std: tuple[float, float, float] | None = None


class ResNetBackbone(nn.Module):
    """images (B, 3, H, W) -> maps of the 4 residual stages, each before its last activation, as PLOP compares them.

    Attributes: `width`, channels of the last map; `pixel_mean`, `pixel_std`. Raises ModelError on an unknown name, a
    model that is not a ResNet, or a checkpoint that is missing, unsafe or of another model.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        self.resnet = _build_resnet(config)
        self.width: int = self.resnet.num_features
        for stage in self._stages():
            last: Any = stage[-1]
            setattr(last, "act3" if isinstance(last, Bottleneck) else "act2", nn.Identity())
        default: Any = self.resnet.pretrained_cfg
        self.pixel_mean = tuple(config.mean or default.get("mean") or (0.485, 0.456, 0.406))
        self.pixel_std = tuple(config.std or default.get("std") or (0.229, 0.224, 0.225))

    def _stages(self) -> list[Any]:
        return [self.resnet.layer1, self.resnet.layer2, self.resnet.layer3, self.resnet.layer4]

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """See `Segmenter.compiled_parts`."""
        return self._stages()

    def forward(self, images: Tensor) -> list[Tensor]:
        net = self.resnet
        x = net.maxpool(net.act1(net.bn1(net.conv1(images))))
        maps = []
        for stage in self._stages():
            maps.append(stage(x))
            x = maps[-1].relu()
        return maps


def _build_resnet(config: ResNetConfig) -> ResNet:
    names = timm.list_models("*resnet*")
    if config.name.split(".")[0] not in names:
        near = difflib.get_close_matches(config.name, names, n=3, cutoff=0.5)
        raise ModelError(
            f"timm has no ResNet {config.name!r}. Did you mean {' or '.join(map(repr, near or names[:3]))}?"
        )
    if config.checkpoint and not Path(config.checkpoint).is_file():
        raise ModelError(f"model.backbone.checkpoint names {config.checkpoint!r}, which is not a file.")
    kind: Any = None
    try:
        net = timm.create_model(
            config.name,
            pretrained=config.pretrained and not config.checkpoint,
            num_classes=0,
            output_stride=config.output_stride,
        )
        kind = type(net).__name__
    except Exception as error:  # whatever another family makes of a ResNet's arguments, or a failed download
        raise ModelError(f"timm cannot build {config.name!r} as a ResNet: {error}") from error
    if not isinstance(net, ResNet):
        raise ModelError(f"{config.name!r} is a {kind}, not a ResNet of timm. Choose one such as 'resnet101'.")
    if config.checkpoint:
        weights = read_weights(config.checkpoint)
        fill(net, weights, {name for name in weights if name.startswith("fc.")}, config.checkpoint)
    return net
