"""Confusion matrices: int64 counts of raw class id x predicted class id, over a whole set."""

from __future__ import annotations

import torch
from torch import Tensor

from cssbench.scenario import IGNORE

PIECE = 2**16  # pixels whose intermediate results stay in a processor's cache


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(K+1, K+1) int64, on the device of the inputs: how many pixels of class id `row` were predicted as class id
    `column`.

    truth, predicted: integer tensors of one shape, values 0..K (0 = void / background), truth also 255 = not counted.
    Raises ValueError when the shapes differ or a value is out of range.

    All pixels are counted at once, those that must not occur too, in rows and columns of their own: so the range is
    checked on the small table of counts, whose reading is the one time that the host waits for the device.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth {tuple(truth.shape)} and prediction {tuple(predicted.shape)} differ in shape")
    side = num_classes + 1
    rows, columns = IGNORE + 3, side + 2  # rows: -1 and less, 0..255, 256 and more; columns: -1 and less, 0..K, more
    truth, predicted = truth.flatten(), predicted.flatten()
    code = torch.empty(len(truth), dtype=torch.int32, device=truth.device)
    step = PIECE if code.device.type == "cpu" else max(len(code), 1)
    for made, row, column in zip(code.split(step), truth.split(step), predicted.split(step), strict=True):
        torch.add(_within(column, side), _within(row, IGNORE + 1), alpha=columns, out=made).add_(columns + 1)
    counts = _count(code, rows * columns).view(rows, columns)
    _check(counts, num_classes)
    return counts[1 : side + 1, 1 : side + 1].contiguous()


def _within(values: Tensor, last: int) -> Tensor:
    """A new int32 tensor: the values, those below -1 as -1 and those above `last` as `last`."""
    if values.dtype == torch.uint8:
        return (values if last >= 255 else values.clamp(max=last)).int()
    return values.clamp(-1, last).int()


def _count(code: Tensor, size: int) -> Tensor:
    """(size,) int64: how often each of 0..size-1 occurs. code: (n,) int32."""
    # elsewhere bincount waits for the device twice, to find the least and the greatest value
    return torch.bincount(code, minlength=size) if code.device.type == "cpu" else added_up(code, size)


def added_up(code: Tensor, size: int) -> Tensor:
    """What `torch.bincount(code, minlength=size)` gives, without looking for the range of `code`."""
    one = torch.ones((), dtype=torch.int64, device=code.device)
    return torch.zeros(size, dtype=torch.int64, device=code.device).scatter_add_(0, code.long(), one.expand(len(code)))


def _check(counts: Tensor, num_classes: int) -> None:
    """Raises ValueError when a pixel was counted outside of what may occur. counts: see `confusion`."""
    last = num_classes + 1  # row and column of class id K; IGNORE + 1 is the row of the pixels that do not count
    wrong = torch.stack([counts[0].sum() + counts[last + 1 : IGNORE + 1].sum() + counts[-1].sum(),
                         counts[: IGNORE + 1, 0].sum() + counts[: IGNORE + 1, -1].sum()])  # fmt: skip
    truth, predicted = wrong.tolist()
    if truth:
        raise ValueError(f"truth holds values outside 0..{num_classes} and {IGNORE} ({truth} pixels)")
    if predicted:
        raise ValueError(f"prediction holds values outside 0..{num_classes} ({predicted} pixels)")
