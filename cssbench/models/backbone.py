"""timm encoders: plain ViTs as token maps of chosen blocks, ResNets as feature maps. The only module that names timm.

ViT, as in the public SegViT code: features are raw block outputs without the final norm; class and register tokens
receive their position embedding and are dropped before block 1 (`prefix_tokens="drop"`), or stay until the taps
(`"keep"`).
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
from pydantic import Field, PositiveInt
from timm.layers import PatchEmbed
from timm.models import load_state_dict
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from cssbench.config import Section
from cssbench.errors import ModelError


class BackboneConfig(Section):
    """A timm plain ViT. Sizes given here replace the named model's (then there are no pre-trained weights)."""

    name: str = "vit_base_patch16_384"
    pretrained: bool = Field(False, description="download timm's weights (or take them from its cache)")
    checkpoint: str | None = Field(None, description="local file of weights (safetensors, or .pth of tensors)")
    image_size: PositiveInt = Field(512, description="side for which position embeddings are stored, px")
    patch: PositiveInt | None = None
    width: PositiveInt | None = None
    depth: PositiveInt | None = None
    heads: PositiveInt | None = None
    layers: list[PositiveInt] = Field(default_factory=lambda: [6, 8, 12], min_length=1, description="taps, 1-based")
    drop_path: float = Field(0.1, ge=0, lt=1, description="linear over depth")
    prefix_tokens: Literal["drop", "keep"] = "drop"
    mean: tuple[float, float, float] | None = Field(
        None, description="normalisation; None: as timm states for the weights"
    )
    std: tuple[float, float, float] | None = None


class Backbone(nn.Module):
    """images (B, 3, H, W), H and W multiples of the patch -> list of (B, L, C) token maps of `layers`, in that order.

    Attributes: `width` C, `patch` px, `prefix` tokens in front of the patches' within the blocks, `pixel_mean`,
    `pixel_std`. Models that change what runs between blocks use two parts of `forward`: `embed(images)`, tokens as they
    enter block 1, and `blocks`, timm's modules up to the last tap.
    Raises ModelError on an unknown name, a model that is not a plain ViT, a tap out of range, a checkpoint that is
    missing, unsafe or of another model, or an input that is not a multiple of the patch.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.vit = _build(config)
        self.width: int = self.vit.embed_dim
        self.patch: int = self.vit.patch_embed.patch_size[0]
        if config.image_size % self.patch:
            raise ModelError(
                f"model.backbone.image_size {config.image_size} is not a multiple of the patch of {self.patch} px."
            )
        depth = len(self.vit.blocks)
        wrong = [layer for layer in config.layers if layer > depth]
        if wrong or sorted(set(config.layers)) != list(config.layers):
            raise ModelError(
                f"model.backbone.layers is {list(config.layers)}; expected ascending block numbers from 1 to {depth}, "
                f"each once, for {config.name!r}."
            )
        self.vit.blocks = self.vit.blocks[: config.layers[-1]]  # later blocks would never get a gradient
        if config.checkpoint:
            _load(self.vit, config.checkpoint)
        default: Any = self.vit.pretrained_cfg
        self.pixel_mean = tuple(config.mean or default.get("mean") or (0.5,) * 3)
        self.pixel_std = tuple(config.std or default.get("std") or (0.5,) * 3)
        self.prefix = self.vit.num_prefix_tokens if config.prefix_tokens == "keep" else 0
        if config.prefix_tokens == "drop":
            for token in (self.vit.cls_token, self.vit.reg_token):
                if token is not None:
                    token.requires_grad_(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an input of height x width px. Raises ModelError when it is not a multiple of the patch."""
        if height % self.patch or width % self.patch:
            raise ModelError(
                f"An input of {height}x{width} px does not divide into patches of {self.patch} px. Choose crop, window "
                f"and short side as multiples of {self.patch}."
            )
        return height // self.patch, width // self.patch

    @property
    def blocks(self) -> nn.ModuleList:
        """timm's block modules up to the last tap; each maps tokens (B, L, C) to tokens of the same shape."""
        return self.vit.blocks  # type: ignore[return-value]

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, C): tokens as they enter block 1, prefix tokens in front where they are kept."""
        self.grid(images.shape[-2], images.shape[-1])
        vit = self.vit
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        return tokens[:, vit.num_prefix_tokens - self.prefix :]

    def forward(self, images: Tensor) -> list[Tensor]:
        tokens, taps = self.embed(images), []
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            if number in self.config.layers:
                taps.append(tokens[:, self.prefix :])
        return taps


def _build(config: BackboneConfig) -> VisionTransformer:
    base = config.name.split(".")[0]
    if base not in timm.list_models():
        near = difflib.get_close_matches(base, timm.list_models("*vit*"), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ModelError(f"timm has no model {config.name!r}.{hint} `timm.list_models('vit*')` lists plain ViTs.")
    sizes = {"patch_size": config.patch, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    if config.pretrained and sizes:
        raise ModelError(f"model.backbone.pretrained needs the model's own sizes; remove {', '.join(sizes)}.")
    if config.checkpoint and not Path(config.checkpoint).is_file():
        raise ModelError(f"model.backbone.checkpoint names {config.checkpoint!r}, which is not a file.")
    options: dict[str, Any] = {
        **sizes,
        "num_classes": 0,
        "drop_path_rate": config.drop_path,
        "img_size": config.image_size,
    }
    plain = "Choose a plain ViT of timm, such as 'vit_base_patch16_384'."
    try:
        vit = timm.create_model(
            config.name,
            pretrained=config.pretrained and not config.checkpoint,
            dynamic_img_size=True,
            global_pool="",
            **options,
        )
    except TypeError as error:  # other families do not know a plain ViT's arguments
        raise ModelError(f"timm cannot build {config.name!r} as a plain ViT ({error}). {plain}") from error
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise ModelError(f"timm cannot build {config.name!r} with {options}: {error}") from error
    if not isinstance(vit, VisionTransformer) or not isinstance(vit.patch_embed, PatchEmbed):
        kind = f"{type(vit).__name__} with {type(getattr(vit, 'patch_embed', None)).__name__}"
        raise ModelError(f"{config.name!r} is a {kind}, not a plain ViT. {plain}")
    vit.norm, vit.fc_norm, vit.head = nn.Identity(), nn.Identity(), nn.Identity()
    return vit


def _load(vit: VisionTransformer, path: str) -> None:
    """Position embeddings are resized to the model's grid. What the taps do not need (later blocks, final norm,
    classifier) may be there or not; all else must fit."""
    weights = _read_weights(path, lambda found: checkpoint_filter_fn(found, vit))
    numbers = {str(number) for number in range(len(vit.blocks))}
    later = {name for name in weights if name.startswith("blocks.") and name.split(".")[1] not in numbers}
    _fill(vit, weights, later | {n for n in weights if n.startswith(("norm.", "fc_norm.", "attn_pool.", "head"))}, path)


def _read_weights(path: str, adapt: Callable[[Any], dict[str, Any]] = dict) -> dict[str, Any]:
    """The tensors in a file, in timm's names, after `adapt`. Nothing pickled is ever run. Raises ModelError."""
    try:
        return adapt(load_state_dict(path, weights_only=True))
    except Exception as error:  # whatever a foreign file makes its readers raise
        if isinstance(error, pickle.UnpicklingError) or isinstance(error.__context__, pickle.UnpicklingError):
            reason = "it is damaged, or holds something else than tensors; nothing in it was run"
        else:
            first, *_ = re.split(r"\. |\n", str(error))
            reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    raise ModelError(
        f"model.backbone.checkpoint {path!r} cannot be loaded ({reason}). Give a safetensors file, or a .pth that "
        f"holds tensors only, of the same model in timm's names."
    )


def _fill(module: nn.Module, weights: dict[str, Any], spare: set[str], path: str) -> None:
    """Load all of `weights` but `spare`. Raises ModelError when they are not exactly what `module` has.

    Only a BatchNorm's count of batches may be missing, as in files that are older than it.
    """
    own = {n: t for n, t in module.state_dict().items() if n in weights or not n.endswith(".num_batches_tracked")}
    wrong = sorted(own.keys() ^ (weights.keys() - spare))
    wrong = wrong or sorted(name for name in own if own[name].shape != getattr(weights[name], "shape", None))
    if wrong:
        raise ModelError(
            f"model.backbone.checkpoint {path!r} is not of this model: {len(wrong)} tensors are missing, unexpected or "
            f"of another shape, the first being {wrong[0]!r}. Name the model (and sizes) that it was saved from."
        )
    module.load_state_dict({name: weights[name] for name in own})


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
        weights = _read_weights(config.checkpoint)
        _fill(net, weights, {name for name in weights if name.startswith("fc.")}, config.checkpoint)
    return net


def known_backbones(pattern: str = "vit_*") -> list[str]:
    """Names of timm models that match, for listings."""
    return timm.list_models(pattern)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, C) tokens -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)
