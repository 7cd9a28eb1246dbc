"""Fewer tokens inside a plain ViT, and all of them back: the queries of down-sampling (QD) and up-sampling (QU).

Source: SegViT (Zhang et al. 2022), section 3.3 and its public code; thesis section 4.2.2, Table 4.9.
Shapes: B images, L tokens on an h x w grid, C encoder width, d decoder width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cssbench.errors import ModelError
from cssbench.models.atm import ATMConfig, ATMStage, init_linear
from cssbench.models.backbone import to_map
from cssbench.models.packed import Packed

QueryForm = Literal["tied", "bicubic"]
QueryStart = Literal["learned", "tap"]


def sparse_grid(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(L,) bool: the tokens of even rows and even columns, ceil(h/2) x ceil(w/2) of them (nearest 2x2)."""
    rows, columns = (torch.arange(side, device=device) % 2 == 0 for side in grid)
    return (rows[:, None] & columns).flatten()


def sparse_cells(grid: tuple[int, int]) -> list[int]:
    """The positions of `sparse_grid`, ascending."""
    return [row * grid[1] + column for row in range(0, grid[0], 2) for column in range(0, grid[1], 2)]


def subsample(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens of `sparse_grid`, by strides: (B, L, C) -> (B, ceil(h/2) ceil(w/2), C), contiguous."""
    return tokens.unflatten(1, grid)[:, ::2, ::2].flatten(1, 2).contiguous()


def half(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of `sparse_grid`."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


class ConvDown(nn.Module):
    """Stride-2 2x2 convolution of the tokens, the learnable variant of Table 4.9; odd sides repeat their last row.

    (B, L, C) -> (B, ceil(h/2) ceil(w/2), C). Its output is the query before LN1 and the residual (not stated).
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 2, stride=2)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        padded = F.pad(to_map(tokens, grid), (0, grid[1] % 2, 0, grid[0] % 2), mode="replicate")
        return self.conv(padded).flatten(2).transpose(1, 2).contiguous()


class QueryUpsampler(nn.Module):
    """QU: one learnable query per 1/16 position reads the shallow tap, then the tokens that are left.

    Each tap has its own projection C -> d, LayerNorm and standard decoder layers: self-attention over all positions,
    cross-attention, FFN, post-norm. The queries belong to the crop that they were made for (public code); `bicubic`
    resizes them to other grids, like position embeddings. They start from N(0, 1).

    A query finds the tokens at its place by what they say of places: little, in an encoder that is not pre-trained.
    start: `learned`, the queries alone (the paper's), or `tap`, added to the projected tokens of the shallow tap.
    """

    def __init__(
        self,
        encoder_width: int,
        width: int,
        grid: tuple[int, int],
        config: ATMConfig,
        form: QueryForm,
        start: QueryStart = "learned",
    ):
        super().__init__()
        config = config.model_copy(update={"version": "v1"})
        self.grid, self.form, self.start = grid, form, start
        self.queries = nn.Parameter(torch.randn(grid[0] * grid[1], width))
        self.stages = nn.ModuleList(ATMStage(encoder_width, width, config) for _ in range(2))
        self.apply(lambda module: init_linear(module, config.init_std))

    def forward(self, shallow: Tensor, deep: Packed, grid: tuple[int, int]) -> Tensor:
        """shallow: (B, L, C). deep: (T, C) of the same images. -> (B, L, d).

        Raises ModelError on a grid that is not the queries' own, unless they may be resized.
        """
        first: Any = self.stages[0]
        queries = self._resized(grid).repeat(len(shallow), 1, 1)
        if self.start == "tap":
            queries = queries + first.norm(first.project(shallow))
        queries, _ = first(queries, shallow)
        return self.stages[1](queries, deep.tokens, deep)[0]

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.queries
        if self.form == "tied":
            raise ModelError(
                f"The queries of the up-sampling were made for a grid of {self.grid[0]}x{self.grid[1]} tokens, not "
                f"{grid[0]}x{grid[1]}. Use inputs of model.backbone.image_size (slide inference), or set "
                "model.upsample_queries = 'bicubic'."
            )
        cells = to_map(self.queries[None], self.grid)
        return F.interpolate(cells, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)[0]
