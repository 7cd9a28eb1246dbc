"""From an image to predicted class ids, a few classes at a time: scores in chunks, a running best per pixel.

All scores of an image, (C, H, W), are never held, unless the model's output has them ready (`SegOutput.score_chunks`).
Predictions are those of an argmax over all of them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cssbench.models.pieces import pieces
from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.scenario import Scenario

Area = tuple[slice, slice]
Forward = Callable[[Tensor], SegOutput]
Ids = dict[str, Tensor]  # rule -> (h, w) class ids


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad (B, 3, H, W) right and below with 0 (the mean colour) to multiples."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))


def fill(image: Tensor, window: int) -> Tensor:
    """Pad (3, H, W) right and below to at least one window."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))


def window_areas(image: Tensor, window: int, stride: int) -> list[Area]:
    """Rows and columns of every window over (3, H, W), row by row."""
    starts = [window_starts(side, window, stride) for side in image.shape[-2:]]
    return [(slice(top, top + window), slice(left, left + window)) for top in starts[0] for left in starts[1]]


def window_starts(extent: int, window: int, stride: int) -> list[int]:
    """Starts of the windows along one side: regular strides, the last one moved to the border (mmsegmentation)."""
    number = max(extent - window + stride - 1, 0) // stride + 1
    return [min(i * stride, extent - window) for i in range(number)]


class WholeScores:
    """Scores of an image (3, H, W) from one forward pass, padded to the model's multiple and cut back.

    forward: runs in the model's place. autocast: context of all that the model's output computes. most: channels at a
    time (`SegOutput.score_chunks`).
    """

    def __init__(self, model: Segmenter, image: Tensor, forward: Forward, autocast: Callable[[], Any], most: int):
        self.size, self.autocast, self.most = image.shape[-2:], autocast, most
        with autocast():
            self.output = forward(pad_to_multiple(image[None], model.multiple))

    def chunks(self) -> Iterator[Tensor]:
        """(n, H, W) float32, in order."""
        chunks = self.output.score_chunks(self.most)
        while True:
            with self.autocast():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield self._cut(chunk)

    def ready(self) -> Tensor | None:
        """(C, H, W) float32 of an output that makes all its scores at once, else None."""
        if type(self.output).score_chunks is not SegOutput.score_chunks:
            return None
        with self.autocast():
            return self._cut(self.output.scores)

    def _cut(self, scores: Tensor) -> Tensor:
        return scores[0, :, : self.size[0], : self.size[1]].float()


class SlideScores:
    """Means of the scores of all windows that cover a pixel of an image (3, H, W); the last window of a row or column
    ends at the border. A side shorter than the window is padded. The rest as in `WholeScores`.

    Kept are the outputs of all windows; of outputs that make all their scores at once, the sum of these instead.
    """

    def __init__(
        self,
        model: Segmenter,
        image: Tensor,
        window: int,
        stride: int,
        forward: Forward,
        autocast: Callable[[], Any],
        most: int,
    ):
        self.size, self.most = image.shape[-2:], most
        image = fill(image, window)
        self.filled, self.areas = image.shape[-2:], window_areas(image, window, stride)
        self.count = torch.zeros(self.filled, device=image.device)
        self.windows: list[WholeScores] = []
        self.sum: Tensor | None = None
        for area in self.areas:
            found = WholeScores(model, image[(slice(None), *area)], forward, autocast, most)
            self.count[area] += 1
            if (scores := found.ready()) is None:
                self.windows.append(found)
            else:
                self.sum = self._add(self.sum, area, scores)

    def chunks(self) -> Iterator[Tensor]:
        """(n, H, W) float32, in order."""
        height, width = self.size
        for total in self._sums():
            yield (total / self.count)[:, :height, :width]

    def _sums(self) -> Iterator[Tensor]:
        """(n, H', W'), over windows in their order."""
        if self.sum is not None:
            yield from (piece[0] for piece in pieces(self.sum[None], self.most))
            return
        sources = [window.chunks() for window in self.windows]
        while True:
            total = None
            for area, source in zip(self.areas, sources, strict=True):
                chunk = next(source, None)
                if chunk is None:
                    return
                total = self._add(total, area, chunk)
            assert total is not None
            yield total

    def _add(self, total: Tensor | None, area: Area, chunk: Tensor) -> Tensor:
        if total is None:
            total = chunk.new_zeros(len(chunk), *self.filled)
        total[(slice(None), *area)] += chunk
        return total


def resized(chunks: Iterable[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
    """Chunks (n, H, W) at another size, bilinear."""
    for chunk in chunks:
        if chunk.shape[-2:] != size:
            maps = chunk[:, None] if len(chunk) == 3 else chunk[None]  # three channels: see `models.pieces`
            chunk = F.interpolate(maps, size=size, mode="bilinear", align_corners=False).flatten(0, 1)
        yield chunk


class RunningBest:
    """Per pixel the largest value of the maps added so far and its index among them: of equal ones the first, and the
    first NaN before all. As `torch.max` of all of them. value: (h, w); index: (h, w) int64; count: maps added.
    """

    def __init__(self) -> None:
        self.count = 0
        self.value: Tensor
        self.index: Tensor

    def add(self, maps: Tensor) -> None:
        """maps: (n, h, w), n >= 1.

        An index costs many times what a largest value does, so it is looked for only where the maps beat what there is.
        """
        if self.count == 0:
            self.value, self.index = maps.max(dim=0)
        else:
            value = maps.amax(dim=0)
            better = (value > self.value) | (value.isnan() & ~self.value.isnan())
            where = better.flatten().nonzero()[:, 0]
            index = maps.flatten(1).index_select(1, where).max(dim=0).indices
            self.index.view(-1)[where] = index + self.count
            self.value = torch.maximum(self.value, value)
        self.count += len(maps)


class Predictor:
    """Scores -> predicted class ids, for both rules and for the outputs of steps 0..t alone."""

    def __init__(self, model: Segmenter, scenario: Scenario, threshold: float):
        self.has_background, self.threshold = model.has_background, threshold
        self.ids = torch.tensor([0, *scenario.order])
        self.ends = [len(step.seen) for step in scenario.steps]

    def __call__(self, chunks: Iterable[Tensor], steps: Iterable[int]) -> dict[int, Ids]:
        """chunks: (n, h, w) each, side by side the scores of all outputs -> for each t of `steps` {"all": (h, w) class
        ids, "foreground": ...} with the outputs of steps 0..t: one walk for all of them."""
        stops = {self.ends[t]: t for t in steps}
        best, background, found = RunningBest(), None, dict[int, Ids]()
        for chunk in chunks:
            if self.has_background and background is None:
                background, chunk = chunk[0].clone(), chunk[1:]
            first = best.count
            cuts = sorted({end - first for end in stops if 0 < end - first < len(chunk)} | {len(chunk)})
            for start, stop in zip([0, *cuts], cuts, strict=False):
                if stop > start:
                    best.add(chunk[start:stop])
                if best.count in stops:
                    found[stops[best.count]] = self._ids(best, background)
            if best.count >= max(stops):
                break
        missing = [t for t in stops.values() if t not in found]
        return found | dict.fromkeys(missing, self._ids(best, background) if missing else {})

    def _ids(self, best: RunningBest, background: Tensor | None) -> Ids:
        foreground = self.ids.to(best.value.device)[best.index + 1]
        none = best.value < self.threshold if background is None else background >= best.value
        return {"all": foreground.masked_fill(none, 0), "foreground": foreground}
