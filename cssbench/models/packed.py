"""Ragged tokens: the surviving tokens of several images in one tensor, and the blocks of timm's ViTs on it.

Used where images keep different numbers of tokens (DToP, Shrunk's edged query down-sampling). All that works on single
tokens (norms, linears, MLP) runs once over the packed tensor, so its time falls with the number of tokens; attention
stays within each image. No image's result depends on its neighbours in the batch, up to rounding.
Shapes: B images, L cells of an image's grid, n_b tokens of image b, T their sum, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cssbench.errors import ModelError
from cssbench.models.ragged_attention import Attention, attend, pad

PLAIN = ("timm.models.vision_transformer.Block", "timm.layers.attention.Attention")
PLACED = {
    ("timm.models.beit.Block", "timm.models.beit.Attention"),
    ("timm.models.eva.EvaBlock", "timm.models.eva.EvaAttention"),
    ("timm.models.eva.EvaBlock", "timm.layers.attention.AttentionRope"),
}


@dataclass
class Packed:
    """tokens: (T, C), image after image. offsets: (B + 1,) int64, image b holds tokens offsets[b] to offsets[b + 1].
    positions: (T,) int64, cell of each token in its image's grid, ascending within an image; L and above: no cell."""

    tokens: Tensor
    offsets: Tensor
    positions: Tensor

    @cached_property
    def counts(self) -> list[int]:
        """n_b of each image (one synchronisation with the device, then kept)."""
        return self.offsets.diff().tolist()

    @cached_property
    def image(self) -> Tensor:
        """(T,) int64: the image each token belongs to."""
        numbers = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return numbers.repeat_interleave(self.offsets.diff(), output_size=len(self.positions))

    @cached_property
    def slot(self) -> Tensor:
        """(T,) int64: rank of each token within its image, from 0."""
        return torch.arange(len(self.positions), device=self.positions.device) - self.offsets[self.image]

    @cached_property
    def starts(self) -> Tensor:
        """(B + 1,) int32: `offsets` as attention kernels take them."""
        return self.offsets.to(torch.int32)

    @cached_property
    def end(self) -> int:
        """Above every position (one synchronisation with the device, then kept)."""
        return int(self.positions.max()) + 1 if len(self.positions) else 0

    def with_tokens(self, tokens: Tensor) -> Packed:
        """The same layout with other contents, (T, any width)."""
        other = Packed(tokens, self.offsets, self.positions)
        known = ("counts", "image", "slot", "starts", "end")
        other.__dict__.update({name: self.__dict__[name] for name in known if name in vars(self)})
        return other

    def select(self, keep: Tensor) -> Packed:
        """The tokens where `keep`, (T,) bool, holds; images stay in place, even those left without a token."""
        kept_before = F.pad(keep.cumsum(0), (1, 0))
        return Packed(self.tokens[keep], kept_before[self.offsets], self.positions[keep])


def pack(tokens: Tensor, keep: Tensor) -> Packed:
    """tokens: (B, L, C); keep: (B, L) bool. Differentiable in `tokens`. Raises ModelError on other shapes."""
    if tokens.ndim != 3 or keep.shape != tokens.shape[:2] or keep.dtype != torch.bool:
        raise ModelError(
            f"pack() got tokens {tuple(tokens.shape)} and keep {tuple(keep.shape)} of {keep.dtype}; expected tokens "
            f"(B, L, C) and keep (B, L) of torch.bool."
        )
    image, positions = keep.nonzero(as_tuple=True)
    return Packed(tokens[image, positions], F.pad(keep.sum(1).cumsum(0), (1, 0)), positions)


def whole(tokens: Tensor, cells: list[int] | None = None) -> Packed:
    """(B, n, C) -> the same as packed tokens, without a copy. cells: their n positions, ascending; None: 0 to n - 1."""
    images, number, _ = tokens.shape
    cells = list(range(number)) if cells is None else cells
    offsets = torch.arange(images + 1, device=tokens.device) * number
    made = Packed(tokens.flatten(0, 1), offsets, torch.tensor(cells, device=tokens.device).repeat(images))
    made.__dict__.update(counts=[number] * images, end=cells[-1] + 1 if images else 0)
    return made


def unpack(packed: Packed, length: int, fill: float | Tensor = 0.0) -> Tensor:
    """(B, L, C), L = `length`: each token at its position. `fill`: a number, or (B, L, C), for all other cells.

    Differentiable in the tokens and in `fill`.
    """
    tokens = packed.tokens
    if not isinstance(fill, Tensor):
        fill = tokens.new_full((len(packed.offsets) - 1, length, tokens.shape[1]), fill)
    return fill.index_put((packed.image, packed.positions), tokens.to(fill.dtype))


@dataclass
class PlacedBlock:
    """A block whose attention depends on where tokens are, on a certain grid. N = prefix tokens (if kept) + L.

    Called with tokens (B, N, C), it is timm's block. A position is a token's index among these N.
    rope   (N, 2 D) or (heads, N, 2 D): sines and cosines by which queries and keys are rotated, D = head width.
    table  (number of offsets, heads), learned: added to the attention's logits; index: (N, N), rows of it.
    """

    block: nn.Module
    size: int
    rope: Tensor | None = None
    table: Tensor | None = None
    index: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.table is None:
            return self.block(tokens, rope=self.rope)
        return run_block(self, whole(tokens)).tokens.unflatten(0, tokens.shape[:2])

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """(T, heads, D) -> the same shape and type."""
        if self.rope is None:
            return x
        sin, cos = self.rope[..., positions, :].chunk(2, -1)
        sin, cos = (part[:, None] if part.ndim == 2 else part.transpose(0, 1) for part in (sin, cos))
        attn: Any = self.block.attn
        if attn.rotate_half:
            first, second = x.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return (x * cos + turned * sin).to(x.dtype)

    def bias(self, queries: Packed, keys: Packed) -> Tensor | None:
        """(1 or B, heads, largest n_q, largest n_k), zero or anything behind an image's tokens; None: no bias."""
        if self.table is None or self.index is None:
            return None
        if min(queries.counts) == min(keys.counts) == self.size:
            index = self.index[None]
        else:
            rows, columns = pad(queries.positions, queries), pad(keys.positions, keys)
            index = self.index[rows[:, :, None], columns[:, None]]
        return self.table[index].permute(0, 3, 1, 2)


def run_block(
    block: Callable[[Tensor], Tensor], packed: Packed, queries: Packed | None = None, attention: Attention = "padded"
) -> Packed:
    """One block of timm's plain ViT, BEiT or EVA (with all their norms, gates, scales and biases) on packed tokens.

    block: of a plain ViT; or, placed on the grid, of one whose attention knows positions (`Backbone.blocks_at`).
    queries: some of `packed`'s tokens, at least one token of `packed` for each image that has a query. They alone query
             and go on, while all of `packed` are keys and values: Shrunk's query down-sampling, with the block's own
             weights. The residual is the un-normed query tokens. None: all tokens query.
    attention: how tokens attend within each image, see `ragged_attention.attend`. With `padded` and images of one
             length the result is the block's own.
    Stochastic depth drops an image's branch, not a token's, as in the block itself.
    Raises ModelError for any other kind of block, for tokens without a cell where the block needs one, and as `attend`.
    """
    place = block if isinstance(block, PlacedBlock) else None
    known = check_block(block)
    out = packed if queries is None else queries
    if place is not None and (place.rope is not None or place.table is not None) and packed.end > place.size:
        raise ModelError(
            f"A token at position {packed.end - 1} of a grid of {place.size}: this encoder's attention needs every "
            f"token's cell, and averaged tokens have none. Choose a plain ViT, or keep single tokens."
        )
    attn = known.attn
    normed = known.norm1(packed.tokens)
    normed_queries = normed if queries is None else known.norm1(queries.tokens)
    q, k, v = _project(attn, normed_queries, normed)
    if place is not None:
        q, k = place.rotate(q, out.positions), place.rotate(k, packed.positions)
    groups = getattr(attn, "num_kv_groups", 1)
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    dropout = attn.attn_drop.p if attn.training else 0.0
    mixed = attend(q, k, v.to(q.dtype), out, packed, attention, dropout, place).flatten(1)
    mixed = getattr(attn, "norm", nn.Identity())(mixed)
    gate = getattr(attn, "gate", None)  # not in older releases of timm
    if gate is not None:
        mixed = mixed * gate(normed_queries).sigmoid()
    mixed = attn.proj_drop(attn.proj(mixed))
    tokens = out.tokens + _drop_path(known.drop_path1, _scale(known, 1, mixed), out)
    branch = known.mlp(known.norm2(tokens))
    return out.with_tokens(tokens + _drop_path(known.drop_path2, _scale(known, 2, branch), out))


def check_block(block: Callable[[Tensor], Tensor]) -> Any:
    """The module, if it is one whose forward `run_block` restates, else ModelError. Told by its class's name: only the
    encoders import timm. A subclass may compute something else."""
    module = block.block if isinstance(block, PlacedBlock) else block
    kinds = tuple(f"{type(m).__module__}.{type(m).__qualname__}" for m in (module, getattr(module, "attn", None)))
    if kinds != PLAIN and not (kinds in PLACED and isinstance(block, PlacedBlock)):
        raise ModelError(
            f"Tokens can be dropped between blocks of a plain ViT, BEiT or EVA (pre-norm) on a known grid only; this "
            f"encoder's block is {kinds[0]} with {kinds[1]}. Choose a model such as 'vit_base_patch16_384'."
        )
    return module


def _scale(block: Any, number: int, branch: Tensor) -> Tensor:
    """Layer scale of the block's first or second branch: a module of a plain ViT, else a vector or None."""
    if hasattr(block, f"ls{number}"):
        return getattr(block, f"ls{number}")(branch)
    gamma = getattr(block, f"gamma_{number}")
    return branch if gamma is None else gamma * branch


def _project(attn: Any, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed queries (T_q, C) and tokens (T, C) -> q (T_q, heads, D), k and v (T, key heads, D), normed."""
    if getattr(attn, "q_proj", None) is not None:
        q, k, v = attn.q_proj(queries), attn.k_proj(tokens), attn.v_proj(tokens)
    elif queries is tokens and getattr(attn, "q_bias", None) is None:
        q, k, v = attn.qkv(tokens).chunk(3, -1)
    else:
        weight, bias, width = attn.qkv.weight, attn.qkv.bias, attn.qkv.out_features // 3
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(queries, weight[:width], first)
        k, v = F.linear(tokens, weight[width:], rest).chunk(2, -1)
    groups = getattr(attn, "num_kv_groups", 1)
    q, k, v = (
        x.unflatten(-1, (heads, -1))
        for x, heads in zip(
            (q, k, v), (attn.num_heads, attn.num_heads // groups, attn.num_heads // groups), strict=True
        )
    )
    if hasattr(attn, "q_norm"):  # not in BEiT
        q, k = attn.q_norm(q), attn.k_norm(k)
    return q, k, v


def _drop_path(drop_path: nn.Module, branch: Tensor, layout: Packed) -> Tensor:
    """`branch` (T, C) times one factor per image, drawn by the block's module from a (B, 1) tensor of ones."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return branch
    return branch * drop_path(branch.new_ones(len(layout.offsets) - 1, 1))[layout.image]
