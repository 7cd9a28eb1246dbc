"""Ragged tokens: the surviving tokens of several images in one tensor, and timm's ViT blocks on it.

Used where images keep different numbers of tokens (DToP, Shrunk's edged query down-sampling). All that works on single
tokens (norms, linears, MLP) runs once over the packed tensor, so its time falls with the number of tokens; attention
stays within each image. No image's result depends on its neighbours in the batch, up to rounding.
Shapes: B images, L cells of an image's grid, n_b tokens of image b, T their sum, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cssbench.errors import ModelError

Attention = Literal["padded", "loop"]

BLOCK = "timm.models.vision_transformer.Block"
ATTENTION = "timm.layers.attention.Attention"


@dataclass
class Packed:
    """tokens: (T, C), image after image. offsets: (B + 1,) int64, image b holds tokens offsets[b] to offsets[b + 1].
    positions: (T,) int64, cell of each token in its image's grid, ascending within an image."""

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

    def with_tokens(self, tokens: Tensor) -> Packed:
        """The same layout with other contents, (T, any width)."""
        other = Packed(tokens, self.offsets, self.positions)
        other.__dict__.update({name: self.__dict__[name] for name in ("counts", "image", "slot") if name in vars(self)})
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


def unpack(packed: Packed, length: int, fill: float | Tensor = 0.0) -> Tensor:
    """(B, L, C), L = `length`: each token at its position. `fill`: a number, or (B, L, C), for all other cells.

    Differentiable in the tokens and in `fill`.
    """
    tokens = packed.tokens
    if not isinstance(fill, Tensor):
        fill = tokens.new_full((len(packed.offsets) - 1, length, tokens.shape[1]), fill)
    return fill.index_put((packed.image, packed.positions), tokens.to(fill.dtype))


def run_block(
    block: nn.Module, packed: Packed, queries: Packed | None = None, attention: Attention = "padded"
) -> Packed:
    """One block of timm's plain ViT (qk-norm, gate, scale norm and layer scale included) on packed tokens.

    queries: some of `packed`'s tokens, at least one token of `packed` for each image that has a query. They alone query
             and go on, while all of `packed` are keys and values: Shrunk's query down-sampling, with the block's own
             weights. The residual is the un-normed query tokens. None: all tokens query.
    attention: `padded` attends over one tensor padded to the longest image, with a key mask (none if all images are of
             one length: then the result is the block's own); `loop` image by image, without padding: less work where
             lengths differ much, more and smaller kernels.
    Stochastic depth drops an image's branch, not a token's, as in the block itself.
    Raises ModelError for any other kind of block.
    """
    plain = _plain(block)
    out = packed if queries is None else queries
    normed = plain.norm1(packed.tokens)
    normed_queries = normed if queries is None else plain.norm1(queries.tokens)
    q, k, v = _project(plain.attn, normed_queries, normed)
    dropout = plain.attn.attn_drop.p if plain.attn.training else 0.0
    attend = _attend_padded if attention == "padded" else _attend_loop
    mixed = plain.attn.norm(attend(q, k, v, out, packed, dropout).flatten(1))
    gate = getattr(plain.attn, "gate", None)  # not in older releases of timm
    if gate is not None:
        mixed = mixed * gate(normed_queries).sigmoid()
    mixed = plain.attn.proj_drop(plain.attn.proj(mixed))
    tokens = out.tokens + _drop_path(plain.drop_path1, plain.ls1(mixed), out)
    tokens = tokens + _drop_path(plain.drop_path2, plain.ls2(plain.mlp(plain.norm2(tokens))), out)
    return out.with_tokens(tokens)


def _plain(block: nn.Module) -> Any:
    """`block`, if it is the one whose forward `run_block` restates: told by its class's name, as timm is imported by
    `backbone` alone. A subclass may compute something else."""
    kinds = [f"{type(m).__module__}.{type(m).__qualname__}" for m in (block, getattr(block, "attn", None))]
    if kinds != [BLOCK, ATTENTION]:
        raise ModelError(
            f"Tokens can be dropped between blocks of a plain ViT only ({BLOCK} with {ATTENTION}); this encoder's "
            f"block is {kinds[0]} with {kinds[1]}. Choose a plain ViT of timm, such as 'vit_base_patch16_384'."
        )
    return block


def _project(attn: Any, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed queries (T_q, C) and tokens (T, C) -> q (T_q, heads, head width), k and v (T, heads, head width)."""
    heads = (attn.num_heads, attn.head_dim)
    if queries is tokens:
        q, k, v = attn.qkv(tokens).unflatten(1, (3, *heads)).unbind(1)
    else:
        width, weight, bias = attn.attn_dim, attn.qkv.weight, attn.qkv.bias
        first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(queries, weight[:width], first).unflatten(1, heads)
        k, v = F.linear(tokens, weight[width:], rest).unflatten(1, (2, *heads)).unbind(1)
    return attn.q_norm(q), attn.k_norm(k), v


def _attend_loop(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, dropout: float) -> Tensor:
    """(T_q, heads, head width) -> same shape, image by image."""
    parts = zip(q.split(queries.counts), k.split(keys.counts), v.split(keys.counts), strict=True)
    mixed = [q[:0]]
    for part in parts:
        if len(part[0]):
            one, two, three = (x.transpose(0, 1)[None] for x in part)
            mixed.append(F.scaled_dot_product_attention(one, two, three, dropout_p=dropout)[0].transpose(0, 1))
    return torch.cat(mixed)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, dropout: float) -> Tensor:
    """(T_q, heads, head width) -> same shape, all images in one call."""
    mask = None
    if min(keys.counts) < max(keys.counts):
        mask = key_mask(keys)
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None]  # an empty image: no softmax over nothing
    q, k, v = (pad(x, layout).transpose(1, 2) for x, layout in ((q, queries), (k, keys), (v, keys)))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return mixed.transpose(1, 2)[queries.image, queries.slot]


def key_mask(layout: Packed) -> Tensor:
    """(B, largest n_b) bool: which places of a padded tensor hold a token."""
    return torch.arange(max(layout.counts), device=layout.offsets.device) < layout.offsets.diff()[:, None]


def pad(x: Tensor, layout: Packed) -> Tensor:
    """(T, ...) -> (B, largest n_b, ...), zero behind each image's tokens."""
    longest = max(layout.counts)
    if min(layout.counts) == longest:
        return x.unflatten(0, (len(layout.counts), longest))
    padded = x.new_zeros(len(layout.counts), longest, *x.shape[1:])
    return padded.index_put((layout.image, layout.slot), x)


def _drop_path(drop_path: nn.Module, branch: Tensor, layout: Packed) -> Tensor:
    """`branch` (T, C) times one factor per image, drawn by the block's module from a (B, 1) tensor of ones."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return branch
    return branch * drop_path(branch.new_ones(len(layout.offsets) - 1, 1))[layout.image]
