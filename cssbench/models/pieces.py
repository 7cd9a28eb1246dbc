"""Maps of many channels, taken a few channels at a time: what is resized and scored so is what the whole would give.

PyTorch's bilinear kernels treat a channel by its place: of channels-last maps, and of all that end below 129 px (height
plus width), 16 at a time and the rest one by one, which rounds otherwise; and three channels have a kernel of their
own. So pieces start at multiples of 16, keep the memory format of the whole, and none but the only one has less than 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LANES, FEWEST = 16, 4  # float32 values of the widest vector register; channels from which there is one kernel for all


def pieces(maps: Tensor, most: int) -> Iterator[Tensor]:
    """(B, C, h, w) cut along C into pieces of `most` channels, rounded up to a multiple of 16; the last may have fewer,
    or up to 3 more. Resized, and changed value by value, they are those channels of the whole bit for bit."""
    last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    channels, step = maps.shape[1], -(-most // LANES) * LANES
    starts = [start for start in range(0, channels, step) if start == 0 or channels - start >= FEWEST]
    for start, end in zip(starts, [*starts[1:], channels], strict=True):
        piece = maps[:, start:end]
        yield piece.contiguous(memory_format=torch.channels_last) if last else piece
