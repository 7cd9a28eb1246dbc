"""A scenario as a benchmark of Avalanche: one experience per step, items (image, label map, 0)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import CLScenario, DatasetExperience, EagerCLStream
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from torch.utils.data import Dataset

from cssbench.config import AugmentConfig, EvaluateConfig
from cssbench.data.base import SegDataset, look_up
from cssbench.data.presence import build
from cssbench.data.step_dataset import StepDataset
from cssbench.data.transforms import TrainTransform
from cssbench.evaluate import EvaluationDataset
from cssbench.experiment import check_classes
from cssbench.interop.views import Item, StepView
from cssbench.models.segmenter import Segmenter
from cssbench.scenario import Scenario, Step


class StepExperience(DatasetExperience):
    """A step. `classes_in_this_experience`, `classes_seen_so_far`: positions, that is labels and model outputs.

    For training also: data, where the items are from (`StepView.data`); class_images, as in `StepContext`.
    """

    def __init__(
        self,
        dataset: AvalancheDataset,
        step: Step,
        data: StepDataset | None = None,
        class_images: dict[int, int] | None = None,
    ):
        super().__init__(dataset=dataset, current_experience=step.index)
        self.step, self.data, self.class_images = step, data, class_images or {}
        self.classes_in_this_experience = list(step.new_positions)
        self.classes_seen_so_far = list(range(1, 1 + len(step.seen)))


class EvaluatedView(Dataset):
    """Unaugmented square views: labels are positions of all classes, learned or not; 0 is void, 255 ignored."""

    def __init__(self, data: EvaluationDataset, positions: np.ndarray):
        self.data, self.positions = data, positions

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        (view,) = self.data[index][1]
        return view.image, torch.from_numpy(look_up(self.positions, view.label.numpy())).long(), 0


def to_avalanche(
    scenario: Scenario,
    dataset: SegDataset,
    model: Segmenter,
    augment: AugmentConfig | None = None,
    split: str = "val",
    seed: int = 0,
    train_stems: Sequence[Sequence[str]] | None = None,
) -> CLScenario:
    """A benchmark with `train_stream` and `test_stream`, one `StepExperience` per step.

    Training experience t has the images and labels of step t, augmented anew at each access. Test experience t has the
    images of `split` that show a class seen by step t: what cssbench evaluates after step t, as centre crops of
    `augment.crop` px. Steps share images, so give `eval` one test experience, not the whole stream. There are no task
    labels, and no one class per image: what counts classes of images (class-balanced buffers) cannot work.

    model: for its normalisation. train_stems: image names of each step; None: all that the scenario gives it.
    Raises ConfigError where scenario and dataset differ, DataError.
    """
    check_classes(scenario, dataset)
    augment = augment or AugmentConfig()
    index = build(dataset, "train", progress=False)
    if train_stems is None:
        train_stems = [[index.stems[i] for i in picked] for picked in scenario.images(index.table)]
    transform = TrainTransform(augment, model.pixel_mean, model.pixel_std)
    shown = build(dataset, split, progress=False)
    crops = EvaluateConfig(geometries=["crop"], crop=augment.crop)
    train, test = [], []
    for step, stems in zip(scenario.steps, train_stems, strict=True):
        data = StepDataset(dataset, "train", stems, scenario.train_table(step), transform, seed)
        counts = index.table[np.isin(index.stems, stems)].sum(axis=0)
        shows = {p: int(counts[c]) for p, c in zip(step.new_positions, step.new, strict=True)}
        train.append(StepExperience(numbered(StepView(data, fixed=False)), step, data, shows))
        view = EvaluationDataset(dataset, split, shown.showing(step.seen), crops, model)
        test.append(StepExperience(numbered(EvaluatedView(view, scenario.position_table())), step))
    return CLScenario([EagerCLStream("train", train), EagerCLStream("test", test)])


def numbered(data: Dataset, first: int = 0) -> AvalancheDataset:
    """`data` for Avalanche, each item with a number that subsets and concatenations keep: the attribute `scene`."""
    return from_items(data, range(first, first + len(data)))  # type: ignore[arg-type]


def from_items(data: Any, numbers: Sequence[int]) -> AvalancheDataset:
    """`data` with the given numbers."""
    return AvalancheDataset([data], data_attributes=[DataAttribute(list(numbers), name="scene")])
