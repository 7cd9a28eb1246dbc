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
        self.heads, self.fold = heads, fold
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, layout: Packed | None = None) -> tuple[Tensor, Tensor]:
        """queries (B, N, d), tokens (B, L, d) -> context (B, N, d), similarity (B, N, L).

        With a layout, tokens are (T, d) as it packs them, each image has one at least, and similarity is (T, N).
        """
        q = self.q(queries)
        q = q * (q.shape[-1] // self.heads) ** -0.5
        attend = self._folded if self.folds(queries.shape[1]) else self._plain
        context, similarity = attend(q, tokens, layout)
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
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        similarity = q @ k.transpose(-2, -1)
        context = self._weights(similarity, layout) @ v
        return context.transpose(1, 2).flatten(2), similarity.mean(1)

    def _folded(self, q: Tensor, tokens: Tensor, layout: Packed | None) -> tuple[Tensor, Tensor]:
        """As `_plain`. An attention head's queries of all images meet its weights in one product (`by_head`: heads
        first, (heads, B N, ...)); all heads' queries of an image meet its tokens in another (`by_image`)."""
        if layout is not None:
            tokens = pad(tokens, layout)
        images, number, _ = q.shape
        w_k, b_k, w_v, b_v = (
            x.unflatten(0, (self.heads, -1)) for x in (self.k.weight, self.k.bias, self.v.weight, self.v.bias)
        )

        def by_image(x: Tensor) -> Tensor:
            return x.unflatten(1, (images, number)).transpose(0, 1).flatten(1, 2)

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(1, (self.heads, number)).transpose(0, 1).flatten(1, 2)

        q = q.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        shift, folded = by_image(torch.bmm(q, b_k[..., None])), by_image(torch.bmm(q, w_k))
        similarity = torch.baddbmm(shift, folded, tokens.transpose(1, 2)).unflatten(1, (self.heads, number))
        weights = self._weights(similarity, layout).flatten(1, 2)
        bias, read = b_v[:, None], by_head(torch.bmm(weights, tokens))
        if self.training and self.dropout.p:
            bias = by_head(weights.sum(-1, keepdim=True)) * bias
        context = torch.baddbmm(bias, read, w_v.transpose(1, 2)).unflatten(1, (images, number))
        return context.permute(1, 2, 0, 3).flatten(2), similarity.mean(1)

    def _weights(self, similarity: Tensor, layout: Packed | None) -> Tensor:
        """(B, heads, N, L) -> softmax over an image's own tokens, after dropout."""
        if layout is not None and min(layout.counts) < max(layout.counts):
            similarity = similarity.masked_fill(~key_mask(layout)[:, None, None], -torch.inf)
        return self.dropout(similarity.softmax(-1))
