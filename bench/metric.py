"""The confusion matrix against torchmetrics' at 150 classes, 512x512, batch 8: how often as fast, at equal counts.

torchmetrics as it comes checks its inputs; without `validate_args` it does not. Ours always refuses what is out of
range. Label maps are uint8 as the evaluation has them, predictions int64 as argmax makes them; `int64` is both as
int64, without a goal against torchmetrics that does not check.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rows import Row
from speed import compare, main
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from cssbench.metrics.confusion import confusion

CLASSES, SIDE, BATCH = 150, 512, 8
CLAIM = f"confusion matrix, {CLASSES} classes, {BATCH} x {SIDE} x {SIDE}"


def maps() -> tuple[Tensor, Tensor]:
    """(truth, predicted), (B, S, S) int64: blocks of 16 x 16, 70 % right, 10 % ignored."""
    blocks = torch.randint(0, CLASSES + 1, (2, BATCH, SIDE // 16, SIDE // 16))
    truth, other = blocks.repeat_interleave(16, -1).repeat_interleave(16, -2)
    predicted = torch.where(torch.rand(truth.shape) < 0.7, truth, other)
    return truth.masked_fill(torch.rand(truth.shape) < 0.1, 255), predicted


def measure(device: str) -> Iterable[Row]:
    truth, predicted = (made.to(device) for made in maps())
    stored = truth.to(torch.uint8)
    expected = None
    for name, validate in (("torchmetrics", True), ("torchmetrics, validate_args=False", False)):
        theirs = MulticlassConfusionMatrix(CLASSES + 1, ignore_index=255, validate_args=validate).to(device)
        expected = theirs(predicted, truth)
        for inputs, labels in (("uint8 label maps", stored), ("int64", truth)):
            assert torch.equal(confusion(labels, predicted, CLASSES), expected)
            yield compare(
                f"{CLAIM}, {inputs}",
                ">= 5" if validate or labels is stored else "",
                (name, lambda theirs=theirs: theirs.update(predicted, truth)),
                ("cssbench", lambda labels=labels: confusion(labels, predicted, CLASSES)),
                device=device,
            )


if __name__ == "__main__":
    main(__doc__, measure)
