"""Cross-attention that shows its similarities, in two forms that compute the same: keys and values, or folded queries.

Few queries need no key and value of every token: what the two projections do can be done to the queries instead.
Per attention head, with the queries q already divided by sqrt(d / heads), tokens x and attention weights A:

    plain    q (x W_k^T + b_k)^T     and    A (x W_v^T + b_v)
    folded   (q W_k) x^T + q b_k     and    (A x) W_v^T + (sum of A) b_v

The sums are 1 unless dropout is at work. Multiply-adds per image, of what differs: 2 L d^2 + 2 N L d (plain), and
2 heads N L d + 2 N d^2 (folded), so folding pays for N (heads - 1 + d / L) < d. "auto" leaves out d / L, so that the
form is the head's own, whatever the image: with 12 heads and d = 384 it folds up to 34 queries.
Shapes: B images, N queries, L tokens of an image, T tokens of all images where they differ in number, d width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cssbench.models.packed import Packed
from cssbench.models.ragged_attention import key_mask, pad

Fold = Literal["auto", "always", "never"]


def folding_pays(queries: int, heads: int, width: int) -> bool:
    """Does the folded form need fewer multiply-adds, on many tokens? queries: N; width: d."""
    return queries * (heads - 1) < width


class CrossAttention(nn.Module):
    """Multi-head attention that also returns its similarity before softmax, averaged over heads: the mask logits.

    fold: the form; "auto": the cheaper one by `folding_pays`. Never by what learns: a head is bit-equal learning and
    frozen. For the same reason weights are only in linears of contiguous inputs and in `bmm`s (`matmul` looks at what
    requires grad).
    """

    def __init__(self, width: int, heads: int, dropout: float, fold: Fold = "auto"):
        super().__init__()
        self.heads, self.fold, self.scale = heads, fold, (width // heads) ** -0.5
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, layout: Packed | None = None) -> tuple[Tensor, Tensor]:
        """queries (B, N, d), tokens (B, L, d) -> context (B, N, d), similarity (B, N, L).

        With a layout, tokens are (T, d) as it packs them, each image has one at least, and similarity is (T, N).
        """
        attend = self._folded if self.folds(queries.shape[1]) else self._plain
        context, similarity = attend(self.q(queries), tokens, layout)
        if layout is not None:
            similarity = similarity.transpose(1, 2)[layout.image, layout.slot]
        return self.out(context), similarity

    def folds(self, queries: int) -> bool:
        """Whether `forward` takes the folded form for N = `queries`."""
        return self.fold == "always" or (self.fold == "auto" and folding_pays(queries, self.heads, self.q.in_features))

    def _plain(self, q: Tensor, tokens: Tensor, layout: Packed | None) -> tuple[Tensor, Tensor]:
        """-> context before the output projection (B, N, d), similarity (B, N, longest L)."""
        k, v = self.k(tokens), self.v(tokens)
        if layout is not None:
            k, v = pad(k, layout), pad(v, layout)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q * self.scale, k, v))
        similarity = q @ k.transpose(-2, -1)
        context = self._weights(similarity, layout) @ v
        return context.transpose(1, 2).flatten(2), similarity.mean(1)

    def _folded(self, q: Tensor, tokens: Tensor, layout: Packed | None) -> tuple[Tensor, Tensor]:
        """As `_plain`. A head's queries of all images meet its weights in one product, (heads, B N, ...); all heads'
        queries of an image meet its tokens in another, (B, heads N, ...)."""
        if layout is not None:
            tokens = pad(tokens, layout)
        (images, number, width), heads, part = q.shape, self.heads, q.shape[-1] // self.heads
        w_k, w_v = (x.weight.view(heads, part, width) for x in (self.k, self.v))
        q = q.view(images * number, heads, part).transpose(0, 1)
        folded, shift = (
            _swapped(torch.bmm(q, x), heads, images, number) for x in (w_k, self.k.bias.view(heads, part, 1))
        )
        similarity = torch.baddbmm(shift, folded, tokens.transpose(1, 2), beta=self.scale, alpha=self.scale)
        similarity = similarity.view(images, heads, number, -1)
        weights = self._weights(similarity, layout).view(images, heads * number, -1)
        read, bias = _swapped(torch.bmm(weights, tokens), images, heads, number), self.v.bias.view(heads, 1, part)
        if self.training and self.dropout.p:
            bias = _swapped(weights.sum(-1, keepdim=True), images, heads, number) * bias
        context = torch.baddbmm(bias, read, w_v.transpose(1, 2)).view(heads, images, number, part)
        context = context.permute(1, 2, 0, 3).reshape(images, number, width)
        return context, similarity.mean(1)

    def _weights(self, similarity: Tensor, layout: Packed | None) -> Tensor:
        """(B, heads, N, L) -> softmax over an image's own tokens, after dropout."""
        if layout is not None and min(layout.counts) < max(layout.counts):
            similarity = similarity.masked_fill(~key_mask(layout)[:, None, None], -torch.inf)
        return self.dropout(similarity.softmax(-1))


def _swapped(x: Tensor, first: int, second: int, number: int) -> Tensor:
    """(first, second x number, d) -> (second, first x number, d)."""
    return x.view(first, second, number, -1).transpose(0, 1).reshape(second, first * number, -1)
