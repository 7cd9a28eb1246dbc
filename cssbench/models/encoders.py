"""Families of timm's plain ViTs, and in what they differ: how tokens enter, what blocks know of places, checkpoints.

A plain ViT cuts the image into patches once and keeps the number and width of its tokens through all blocks.
Shapes: B images, grid of h x w = L cells, P prefix tokens (class, register, distillation), C width.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import beit, eva, vision_transformer
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cssbench.errors import ModelError
from cssbench.models.packed import PlacedBlock

Block = Callable[[Tensor], Tensor]
Grid = tuple[int, int]

PLAIN = (
    "Choose a plain ViT of timm (classes VisionTransformer, Beit, Eva), such as 'vit_base_patch16_384', "
    "'deit3_base_patch16_384', 'beitv2_base_patch16_224', 'vit_base_patch14_dinov2' or 'vit_base_patch16_dinov3'."
)


class PlainFamily:
    """`VisionTransformer`: AugReg, DeiT, DeiT III, MAE, CLIP, SigLIP, DINO, DINOv2, ..."""

    kind: type[nn.Module] = VisionTransformer
    arguments: dict[str, Any] = {"dynamic_img_size": True}  # noqa: RUF012

    @staticmethod
    def prepare(vit: Any) -> None:
        """What must be changed before other grids, or fewer tokens, are possible."""

    @staticmethod
    def embed(vit: Any, images: Tensor, grid: Grid) -> Tensor:
        """(B, 3, H, W) -> (B, P + L, C): tokens as they enter block 1."""
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))

    @staticmethod
    def place(vit: Any, grid: Grid, prefix: int) -> Sequence[Block]:
        """The blocks for `prefix` (0 or P) prefix tokens and a grid; they need to know neither."""
        return list(vit.blocks)

    @staticmethod
    def translate(weights: Any, vit: Any) -> dict[str, Any]:
        """A published file's tensors in timm's names, resized to `vit`'s patch and grid, by timm's own filter."""
        return vision_transformer.checkpoint_filter_fn(weights, vit, adapt_layer_scale=True)


class BeitFamily(PlainFamily):
    """`Beit`: BEiT, BEiT v2. Every block adds a learned bias to the attention's logits, by the offset between cells; no
    token has a position embedding. At another grid than the model's, the biases are resized (`resized_offsets`)."""

    kind = Beit
    arguments: dict[str, Any] = {}  # noqa: RUF012

    @staticmethod
    def prepare(vit: Any) -> None:
        vit.patch_embed.strict_img_size = False

    @staticmethod
    def embed(vit: Any, images: Tensor, grid: Grid) -> Tensor:
        return torch.cat([vit.cls_token.expand(len(images), -1, -1), vit.patch_embed(images)], 1)

    @staticmethod
    def place(vit: Any, grid: Grid, prefix: int) -> Sequence[Block]:
        own = tuple(vit.blocks[0].attn.window_size)
        index = vit.blocks[0].attn.relative_position_index
        if grid != own:
            index = beit.gen_relative_position_index(grid, device=index.device)
        index = index[1 - prefix :, 1 - prefix :]
        placed = []
        for block in vit.blocks:
            table = block.attn.relative_position_bias_table
            if grid != own:
                table = resized_offsets(table, own[0], grid)
            placed.append(PlacedBlock(block, len(index), table=table, index=index))
        return placed

    @staticmethod
    def translate(weights: Any, vit: Any) -> dict[str, Any]:
        translated = {}
        for wrapping in ("model", "module"):
            weights = weights.get(wrapping, weights)
        for name, tensor in weights.items():
            if name.endswith("relative_position_bias_table"):
                side = (math.isqrt(len(tensor) - 3) + 1) // 2
                if side != vit.patch_embed.grid_size[0]:
                    tensor = resized_offsets(tensor, side, vit.patch_embed.grid_size)
            translated[name] = tensor
        return beit.checkpoint_filter_fn(translated, vit)


def resized_offsets(table: Tensor, side: int, grid: Grid) -> Tensor:
    """BEiT's biases for the offsets on a grid of side x side cells, resized to another grid, as in BEiT's code.

    table: (n + 3, heads) with n = (2 side - 1)^2; the last three are the class token's. Differentiable in it.
    """
    rows, columns = (offset_weights(side, size).to(table) for size in grid)
    cells = table[:-3].unflatten(0, (2 * side - 1, 2 * side - 1))
    cells = torch.einsum("yi,xj,ijh->yxh", rows, columns, cells)
    return torch.cat([cells.flatten(0, 1), table[-3:]])


def offset_weights(source: int, target: int) -> Tensor:
    """(2 target - 1, 2 source - 1): linear interpolation along one side from offsets -source + 1 ... source - 1.

    The stored offsets stand at 0, 1, 1 + q, 1 + q + q^2, ...: far ones are stretched more. q in [1.01, 1.5] is
    chosen so that the last one meets the target's last offset; what lies outside takes the last one's value.
    """
    low, high, q = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (q ** (source - 1) - 1) / (q - 1) > target - 1 else (q, high)
    half = list(itertools.accumulate(q**i for i in range(source - 1)))
    places = torch.tensor([*(-place for place in reversed(half)), 0.0, *half], dtype=torch.float64, device="cpu")
    if source == 1:
        return torch.ones(2 * target - 1, 1, device="cpu")
    wanted = torch.arange(1 - target, target, dtype=torch.float64, device="cpu").clamp(places[0], places[-1])
    right = torch.searchsorted(places, wanted).clamp(min=1)
    share = (wanted - places[right - 1]) / (places[right] - places[right - 1])
    eye = torch.eye(len(places), dtype=torch.float64, device="cpu")
    return (eye[right - 1] * (1 - share)[:, None] + eye[right] * share[:, None]).float()


class EvaFamily(PlainFamily):
    """`Eva`: DINOv3, EVA, EVA-02, Perception Encoder, ViTs with RoPE. Queries and keys are rotated by their cells.

    A prefix token is not rotated.
    """

    kind = Eva

    @staticmethod
    def prepare(vit: Any) -> None:
        for block in vit.blocks:
            block.attn.num_prefix_tokens = 0  # `place` gives them a rotation by nothing

    @staticmethod
    def embed(vit: Any, images: Tensor, grid: Grid) -> Tensor:
        tokens, _ = vit._pos_embed(vit.patch_embed(images))
        return vit.norm_pre(tokens)

    @staticmethod
    def place(vit: Any, grid: Grid, prefix: int) -> Sequence[Block]:
        size = prefix + grid[0] * grid[1]
        ropes: list[Tensor | None] = [None] * len(vit.blocks)
        if vit.rope is not None:
            rope = vit.rope.get_embed(shape=grid)
            sin, cos = rope.chunk(2, -1)
            still = (*sin.shape[:-2], prefix, sin.shape[-1])
            sin, cos = torch.cat([sin.new_zeros(still), sin], -2), torch.cat([cos.new_ones(still), cos], -2)
            rope = torch.cat([sin, cos], -1)
            ropes = list(rope) if vit.rope_mixed else [rope] * len(vit.blocks)
        return [PlacedBlock(block, size, rope) for block, rope in zip(vit.blocks, ropes, strict=False)]

    @staticmethod
    def translate(weights: Any, vit: Any) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the biases that a model has not
            return eva.checkpoint_filter_fn(weights, vit)


FAMILIES: tuple[type[PlainFamily], ...] = (PlainFamily, BeitFamily, EvaFamily)


@functools.cache
def _known_names() -> frozenset[str]:
    return frozenset(timm.list_models())


def make_vit(
    name: str, sizes: dict[str, Any], image_size: int, drop_path: float, pretrained: bool
) -> tuple[Any, type[PlainFamily]]:
    """timm's model without final norm and classifier, and its family. sizes: timm's arguments that replace its own.

    Raises ModelError on an unknown name, sizes that do not fit, and a model that is not a plain ViT.
    """
    base = name.split(".")[0]
    if base not in _known_names():
        near = difflib.get_close_matches(base, sorted(_known_names()), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ModelError(f"timm has no model {name!r}.{hint} `timm.list_models('vit*')` lists plain ViTs. {PLAIN}")
    options = {**sizes, "num_classes": 0, "drop_path_rate": drop_path, "img_size": image_size}
    family = BeitFamily if timm.models.model_entrypoint(base).__module__ == beit.__name__ else PlainFamily
    try:
        vit = timm.create_model(name, pretrained=pretrained, global_pool="", **family.arguments, **options)
    except TypeError as error:  # other families do not know a plain ViT's arguments
        raise ModelError(f"timm cannot build {name!r} as a plain ViT ({error}). {PLAIN}") from error
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise ModelError(f"timm cannot build {name!r} with {options}: {error}") from error
    found = [family for family in FAMILIES if isinstance(vit, family.kind)]
    if not found or not isinstance(vit.patch_embed, PatchEmbed):
        kind = f"{type(vit).__name__} with {type(getattr(vit, 'patch_embed', None)).__name__}"
        raise ModelError(f"{name!r} is a {kind}, not a plain ViT. {PLAIN}")
    vit.norm, vit.fc_norm, vit.head = nn.Identity(), nn.Identity(), nn.Identity()
    found[0].prepare(vit)
    return vit, found[0]


def check_file(path: str | None) -> None:
    """Raises ModelError when a checkpoint is named that is not there."""
    if path and not Path(path).is_file():
        raise ModelError(f"model.backbone.checkpoint names {path!r}, which is not a file.")
