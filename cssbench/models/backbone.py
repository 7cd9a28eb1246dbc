"""A plain ViT of timm as the encoder: token maps of chosen blocks.

As in the public SegViT code: features are raw block outputs without the final norm; class and register tokens receive
their position embedding and are dropped before block 1 (`prefix_tokens="drop"`), or stay until the taps (`"keep"`).
Which families of timm there are, and in what they differ: `cssbench.models.encoders`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cssbench.config import Section
from cssbench.errors import ModelError
from cssbench.models.encoders import Block, check_file, make_vit
from cssbench.models.packed import Packed, run_block
from cssbench.models.ragged_attention import Attention
from cssbench.models.weights import fill, read_weights

SPARE = ("norm.", "fc_norm.", "attn_pool.", "head", "decoder_")  # in files, but not below a tap


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
    checkpointing: bool = Field(
        False,
        description="in training, keep only the tokens between blocks and compute each block again for its gradient: "
        "the same numbers, less memory, about a third more time; not where tokens leave between blocks",
    )
    prefix_tokens: Literal["drop", "keep"] = "drop"
    mean: tuple[float, float, float] | None = Field(
        None, description="normalisation; None: as timm states for the weights"
    )
    std: tuple[float, float, float] | None = None


class Backbone(nn.Module):
    """images (B, 3, H, W), H and W multiples of the patch -> list of (B, L, C) token maps of `layers`, in that order.

    Attributes: `width` C, `patch` px, `prefix` tokens in front of the patches' within the blocks, `pixel_mean`,
    `pixel_std`. Models that change what runs between blocks use two parts of `forward`: `embed(images)`, tokens as they
    enter block 1, and `blocks_at(grid)`, the blocks that follow.
    Raises ModelError on an unknown name, a model that is not a plain ViT, a tap out of range, a checkpoint that is
    missing, unsafe or of another model, or an input that is not a multiple of the patch.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        sizes = {
            "patch_size": config.patch,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
        }
        sizes = {key: value for key, value in sizes.items() if value is not None}
        if config.pretrained and sizes:
            raise ModelError(f"model.backbone.pretrained needs the model's own sizes; remove {', '.join(sizes)}.")
        check_file(config.checkpoint)
        pretrained = config.pretrained and not config.checkpoint
        self.vit, self.family = make_vit(config.name, sizes, config.image_size, config.drop_path, pretrained)
        self.width: int = self.vit.embed_dim
        self.patch: int = self.vit.patch_embed.patch_size[0]
        self._check()
        self._load_and_cut()
        default = self.vit.pretrained_cfg
        self.pixel_mean = tuple(config.mean or default.get("mean") or (0.5,) * 3)
        self.pixel_std = tuple(config.std or default.get("std") or (0.5,) * 3)
        self.prefix: int = self.vit.num_prefix_tokens if config.prefix_tokens == "keep" else 0
        if config.prefix_tokens == "drop":
            for name in ("cls_token", "reg_token"):
                token = getattr(self.vit, name, None)
                if token is not None:
                    token.requires_grad_(False)

    def _check(self) -> None:
        config, depth = self.config, len(self.vit.blocks)
        if config.image_size % self.patch:
            below = config.image_size // self.patch * self.patch
            raise ModelError(
                f"model.backbone.image_size {config.image_size} is not a multiple of the patch of {self.patch} px. "
                f"Choose {' or '.join(str(side) for side in (below, below + self.patch) if side)}."
            )
        wrong = [layer for layer in config.layers if layer > depth]
        if wrong or sorted(set(config.layers)) != list(config.layers):
            raise ModelError(
                f"model.backbone.layers is {list(config.layers)}; expected ascending block numbers from 1 to {depth}, "
                f"each once, for {config.name!r}."
            )

    def _load_and_cut(self) -> None:
        """Blocks after the last tap would never get a gradient. What the taps do not need (those blocks, final norm,
        classifier, a pre-training decoder) may be in a checkpoint or not; all else must fit."""
        vit, path, last = self.vit, self.config.checkpoint, self.config.layers[-1]
        weights = read_weights(path, lambda found: self.family.translate(found, vit)) if path else {}
        vit.blocks = vit.blocks[:last]
        if path:
            numbers = {str(number) for number in range(last)}
            later = {name for name in weights if name.startswith("blocks.") and name.split(".")[1] not in numbers}
            fill(vit, weights, later | {name for name in weights if name.startswith(SPARE)}, path)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an input of height x width px. Raises ModelError when it is not a multiple of the patch."""
        if height % self.patch or width % self.patch:
            raise ModelError(
                f"An input of {height}x{width} px does not divide into patches of {self.patch} px. Choose crop, window "
                f"and short side as multiples of {self.patch}."
            )
        return height // self.patch, width // self.patch

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """See `Segmenter.compiled_parts`. On ragged tokens blocks run part by part, which is not compiled."""
        return list(self.vit.blocks)

    def refuse_checkpointing(self, model: str) -> None:
        """For models that run the blocks themselves. Raises ModelError where checkpointing is asked for."""
        if self.config.checkpointing:
            raise ModelError(
                f"model.backbone.checkpointing works where all tokens go through all blocks; model {model!r} changes "
                f"the tokens between blocks. Set it to false."
            )

    @property
    def blocks(self) -> nn.ModuleList:
        """timm's block modules up to the last tap, for counting and their weights; to run them: `blocks_at`."""
        return self.vit.blocks

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, C): tokens as they enter block 1, prefix tokens in front where they are kept."""
        grid = self.grid(images.shape[-2], images.shape[-1])
        tokens = self.family.embed(self.vit, images, grid)
        return tokens[:, self.vit.num_prefix_tokens - self.prefix :]

    def blocks_at(self, grid: tuple[int, int]) -> Sequence[Block]:
        """What maps tokens (B, prefix + L, C) from block to block on this grid, up to the last tap.

        timm's own modules of a plain ViT; of BEiT, EVA and DINOv3, whose attention knows places, `PlacedBlock`s.
        `packed.run_block` takes either. To be called once per forward pass.
        """
        return self.family.place(self.vit, grid, self.prefix)

    def run(
        self, block: Block, packed: Packed, queries: Packed | None = None, attention: Attention = "padded"
    ) -> Packed:
        """One of `blocks_at` on ragged tokens: see `packed.run_block`."""
        return run_block(block, packed, queries, attention)

    def no_decay_names(self) -> set[str]:
        """Parameters with more than one dimension that are to have no weight decay: embeddings and biases."""
        tokens = {"pos_embed", "cls_token", "reg_token", "rope.freqs"}
        names = (name for name, _ in self.vit.named_parameters())
        return {f"vit.{name}" for name in names if name in tokens or name.endswith("relative_position_bias_table")}

    def forward(self, images: Tensor) -> list[Tensor]:
        tokens, taps = self.embed(images), []
        again = self.config.checkpointing and self.training and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks_at(self.grid(images.shape[-2], images.shape[-1])), 1):
            tokens = checkpoint(block, tokens, use_reentrant=False) if again else block(tokens)
            if number in self.config.layers:
                taps.append(tokens[:, self.prefix :])
        return taps


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, C) tokens -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)
