"""From a model to confusion matrices over a whole split: raw class id x predicted class id, per geometry and rule.

Geometries: `full`, the label at its own size, the image resized by the recipe and predicted whole or by sliding window;
`crop`, short side and centre crop of image and label. Rules: `all`, argmax over all outputs (a model without a
background output predicts background where no score reaches the threshold); `foreground`, argmax over classes only.
One image at a time, so that a result depends neither on the batch size nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cssbench.config import EvaluateConfig
from cssbench.data.base import SegDataset
from cssbench.data.step_dataset import worker_context
from cssbench.data.transforms import centre_crop, normalise, resize, resize_label, short_side_size, to_tensor
from cssbench.metrics.confusion import confusion
from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.scenario import Scenario, Step

Area = tuple[slice, slice]
Forward = Callable[[Tensor], SegOutput]


@dataclass(frozen=True)
class View:
    """One geometry of one image: the model's input (3, H, W) and the class ids (h, w) to predict."""

    geometry: str
    image: Tensor
    label: Tensor


class EvaluationDataset(Dataset):
    """The views of each image of a split. `split` "holdout" reads the files of "train"."""

    def __init__(self, source: SegDataset, split: str, stems: list[str], config: EvaluateConfig, model: Segmenter):
        self.source, self.split, self.stems, self.config = source, split, stems, config
        self.mean, self.std = model.pixel_mean, model.pixel_std

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> tuple[str, list[View]]:
        stem = self.stems[index]
        image, label = self._pair(stem)
        picture, truth = to_tensor(image), torch.from_numpy(np.array(label))
        return stem, [getattr(self, f"_{geometry}")(picture, truth) for geometry in self.config.geometries]

    @property
    def sampled(self) -> str:
        """The geometry whose predictions are kept as samples: `full` if it is evaluated."""
        return "full" if "full" in self.config.geometries else self.config.geometries[0]

    def sampled_view(self, index: int) -> View:
        """The view of the geometry `sampled`."""
        return next(view for view in self[index][1] if view.geometry == self.sampled)

    def picture(self, stem: str) -> tuple[np.ndarray, np.ndarray]:
        """Image (h, w, 3) and class ids (h, w), uint8, in the geometry `sampled`: what belongs beside a sample."""
        image, label = self._pair(stem)
        if self.sampled == "full":
            return image, label
        picture, truth = self._cropped(to_tensor(image), torch.from_numpy(np.array(label)))
        return picture.permute(1, 2, 0).contiguous().numpy(), truth.contiguous().numpy()

    def _pair(self, stem: str) -> tuple[np.ndarray, np.ndarray]:
        return self.source.pair("train" if self.split == "holdout" else self.split, stem)

    def _full(self, image: Tensor, label: Tensor) -> View:
        short = self.config.short_side or min(label.shape)
        size = short_side_size(label.shape, short, self.config.long_side)
        return View("full", normalise(resize(image, size), self.mean, self.std), label)

    def _crop(self, image: Tensor, label: Tensor) -> View:
        image, label = self._cropped(image, label)
        return View("crop", normalise(image, self.mean, self.std), label)

    def _cropped(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        side = self.config.crop
        size = short_side_size(label.shape, side)
        return centre_crop(resize(image, size), side), centre_crop(resize_label(label, size), side)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad (B, 3, H, W) right and below with 0 (the mean colour) to multiples."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))


def whole_scores(model: Segmenter, image: Tensor, forward: Forward | None = None) -> Tensor:
    """(3, H, W) -> (C, H, W) scores from one forward pass, padded to the model's multiple and cut back."""
    height, width = image.shape[-2:]
    return (forward or model)(pad_to_multiple(image[None], model.multiple)).scores[0, :, :height, :width]


def slide_scores(model: Segmenter, image: Tensor, window: int, stride: int, forward: Forward | None = None) -> Tensor:
    """(3, H, W) -> (C, H, W): mean of the scores of all windows that cover a pixel; the last window of a row or column
    ends at the border. A side shorter than the window is padded, as in `whole_scores`."""
    height, width = image.shape[-2:]
    image = _fill(image, window)
    total, count = None, torch.zeros(image.shape[-2:], device=image.device)
    for area in window_areas(image, window, stride):
        scores = whole_scores(model, image[(slice(None), *area)], forward).float()  # half precision would add up badly
        if total is None:
            total = scores.new_zeros(len(scores), *image.shape[-2:])
        total[(slice(None), *area)] += scores
        count[area] += 1
    assert total is not None
    return (total / count)[:, :height, :width]


def _fill(image: Tensor, window: int) -> Tensor:
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


def slides(view: View, config: EvaluateConfig) -> bool:
    """Whether a view is predicted by sliding window."""
    return view.geometry == "full" and config.inference == "slide"


def model_inputs(model: Segmenter, view: View, config: EvaluateConfig) -> list[tuple[Area, Tensor]]:
    """What `evaluate` feeds the model for a view, one item per forward pass: the area of the image, which may end
    behind it, and the input (1, 3, h, w), padded to the model's multiple."""
    image = view.image
    areas: list[Area] = [(slice(0, image.shape[-2]), slice(0, image.shape[-1]))]
    if slides(view, config):
        image = _fill(image, config.window)
        areas = window_areas(image, config.window, config.stride)
    return [(area, pad_to_multiple(image[(slice(None), *area)][None], model.multiple)) for area in areas]


class Predictor:
    """Scores -> predicted class ids, for both rules and for the outputs of steps 0..t alone."""

    def __init__(self, model: Segmenter, scenario: Scenario, threshold: float):
        self.has_background, self.threshold = model.has_background, threshold
        self.ids = torch.tensor([0, *scenario.order])
        self.ends = [len(step.seen) for step in scenario.steps]

    def __call__(self, scores: Tensor, step: int) -> dict[str, Tensor]:
        """scores: (C, h, w) -> {"all": (h, w) class ids, "foreground": ...} with the outputs of steps 0..step."""
        classes = scores[1:] if self.has_background else scores
        best, position = classes[: self.ends[step]].max(dim=0)
        foreground = self.ids.to(scores.device)[position + 1]
        background = scores[0] >= best if self.has_background else best < self.threshold
        return {"all": foreground.masked_fill(background, 0), "foreground": foreground}


@torch.no_grad()
def evaluate(
    fabric: Any,
    model: Segmenter,
    data: EvaluationDataset,
    scenario: Scenario,
    step: Step,
    workers: int = 0,
    on_image: Callable[[], None] = lambda: None,
    keep: frozenset[str] = frozenset(),
    alone: Sequence[frozenset[str]] = (),
    forward: Forward | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(matrices, samples): int64 (K+1, K+1) arrays as `results.StepRecord.matrices` names them, and the predicted class
    ids (h, w) of the images in `keep` (geometry `data.sampled`, rule `foreground`).

    forward: runs in the model's place, with the same result (`frozen.RememberingModel`).
    alone[t]: the images evaluated at the earlier step t; over these, matrices `upto<t>` count what the outputs of steps
    0..t alone would predict. With several processes each takes every world-th image and has the samples of its own;
    the counts are added up exactly.
    """
    was_training = model.training
    model.eval()
    predictor = Predictor(model, scenario, data.config.background_threshold)
    side = data.source.num_classes + 1
    totals = {
        f"{geometry}.{rule}{part}": torch.zeros(side, side, dtype=torch.int64, device=fabric.device)
        for geometry in data.config.geometries
        for part in ("", *(f".upto{t}" for t in range(len(alone))))
        for rule in ("all", "foreground")
    }
    samples: dict[str, np.ndarray] = {}
    for stem, views in _share(fabric, data, workers):
        for view, scores in _scored(fabric, model, views, data.config, forward):
            truth = view.label.to(scores.device)
            parts = {"": step.index} | {f".upto{t}": t for t, stems in enumerate(alone) if stem in stems}
            for part, upto in parts.items():
                for rule, predicted in predictor(scores, upto).items():
                    totals[f"{view.geometry}.{rule}{part}"] += confusion(truth, predicted, data.source.num_classes)
                    if stem in keep and (view.geometry, rule, part) == (data.sampled, "foreground", ""):
                        samples[stem] = predicted.cpu().numpy().astype(np.uint8)
        on_image()
    model.train(was_training)
    summed = {key: fabric.all_reduce(total, reduce_op="sum").cpu().numpy() for key, total in totals.items()}
    return summed, samples


def _share(fabric: Any, data: EvaluationDataset, workers: int) -> Iterator[tuple[str, list[View]]]:
    """This process's images, in order."""
    mine = range(fabric.global_rank, len(data), fabric.world_size)
    context = worker_context(workers)
    return iter(DataLoader(data, batch_size=None, sampler=mine, num_workers=workers, multiprocessing_context=context))


def _scored(
    fabric: Any, model: Segmenter, views: list[View], config: EvaluateConfig, forward: Forward | None
) -> Iterator[tuple[View, Tensor]]:
    """Each view with scores (C, h, w) at its label's size. Equal inputs are run once (per kind of inference)."""
    done: list[tuple[bool, Tensor, Tensor]] = []
    for view in views:
        slide = slides(view, config)
        scores = next((s for kind, image, s in done if kind == slide and torch.equal(image, view.image)), None)
        if scores is None:
            image = view.image.to(fabric.device)
            with fabric.autocast():
                if slide:
                    scores = slide_scores(model, image, config.window, config.stride, forward)
                else:
                    scores = whole_scores(model, image, forward).float()
            done.append((slide, view.image, scores))
        if scores.shape[-2:] != view.label.shape:
            scores = F.interpolate(scores[None], size=view.label.shape, mode="bilinear", align_corners=False)[0]
        yield view, scores
