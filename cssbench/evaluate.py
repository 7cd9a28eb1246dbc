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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cssbench.config import EvaluateConfig
from cssbench.data.base import SegDataset
from cssbench.data.step_dataset import worker_context
from cssbench.data.transforms import centre_crop, normalise, resize, resize_label, short_side_size, to_tensor
from cssbench.metrics.confusion import confusion
from cssbench.models.segmenter import Segmenter
from cssbench.predict import (
    Area,
    Forward,
    Ids,
    Predictor,
    SlideScores,
    WholeScores,
    fill,
    pad_to_multiple,
    resized,
    window_areas,
)
from cssbench.scenario import Scenario, Step


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


def slides(view: View, config: EvaluateConfig) -> bool:
    """Whether a view is predicted by sliding window."""
    return view.geometry == "full" and config.inference == "slide"


def model_inputs(model: Segmenter, view: View, config: EvaluateConfig) -> list[tuple[Area, Tensor]]:
    """What `evaluate` feeds the model for a view, one item per forward pass: the area of the image, which may end
    behind it, and the input (1, 3, h, w), padded to the model's multiple."""
    image = view.image
    areas: list[Area] = [(slice(0, image.shape[-2]), slice(0, image.shape[-1]))]
    if slides(view, config):
        image = fill(image, config.window)
        areas = window_areas(image, config.window, config.stride)
    return [(area, pad_to_multiple(image[(slice(None), *area)][None], model.multiple)) for area in areas]


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
    ids (h, w) of the images in `keep` (geometry `data.sampled`, rule `foreground`; `all` where background is a class).

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
        parts = {"": step.index} | {f".upto{t}": t for t, stems in enumerate(alone) if stem in stems}
        predicted = _predicted(fabric, model, views, data.config, forward or model, predictor, set(parts.values()))
        for view, ids in predicted:
            counts = _Counts(view.label.to(fabric.device), data.source.num_classes)
            for part, upto in parts.items():
                for rule, found in ids[upto].items():
                    totals[f"{view.geometry}.{rule}{part}"] += counts(found)
            if stem in keep and view.geometry == data.sampled:
                rule = "all" if data.source.background_class else "foreground"
                samples[stem] = ids[step.index][rule].cpu().numpy().astype(np.uint8)
        on_image()
    model.train(was_training)
    summed = {key: fabric.all_reduce(total, reduce_op="sum").cpu().numpy() for key, total in totals.items()}
    return summed, samples


def _share(fabric: Any, data: EvaluationDataset, workers: int) -> Iterator[tuple[str, list[View]]]:
    """This process's images, in order."""
    mine = range(fabric.global_rank, len(data), fabric.world_size)
    context = worker_context(workers)
    return iter(DataLoader(data, batch_size=None, sampler=mine, num_workers=workers, multiprocessing_context=context))


def _predicted(
    fabric: Any,
    model: Segmenter,
    views: list[View],
    config: EvaluateConfig,
    forward: Forward,
    predictor: Predictor,
    steps: set[int],
) -> Iterator[tuple[View, dict[int, Ids]]]:
    """Each view with what `predictor` says for `steps`, at its label's size. Equal inputs are run once (per kind of
    inference), and predicted once where their labels have one size."""
    done: list[tuple[bool, Tensor, WholeScores | SlideScores]] = []
    known: dict[tuple[int, torch.Size], dict[int, Ids]] = {}
    for view in views:
        slide = slides(view, config)
        same = [s for kind, image, s in done if kind == slide and torch.equal(image, view.image)]
        if same:
            scores = same[0]
        else:
            how = (forward, fabric.autocast, config.chunk)
            image = view.image.to(fabric.device)
            if slide:
                scores = SlideScores(model, image, config.window, config.stride, *how)
            else:
                scores = WholeScores(model, image, *how)
            done.append((slide, view.image, scores))
        key = (id(scores), view.label.shape)
        if key not in known:
            known[key] = predictor(resized(scores.chunks(), (view.label.shape[0], view.label.shape[1])), steps)
        yield view, known[key]


class _Counts:
    """`confusion` with one truth; predictions that are equal are counted once."""

    def __init__(self, truth: Tensor, num_classes: int):
        self.truth, self.num_classes = truth, num_classes
        self.known: list[tuple[Tensor, Tensor]] = []

    def __call__(self, predicted: Tensor) -> Tensor:
        found = next((counts for other, counts in self.known if torch.equal(other, predicted)), None)
        if found is None:
            found = confusion(self.truth, predicted, self.num_classes)
            self.known.append((predicted, found))
        return found
