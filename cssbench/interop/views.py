"""Data of a step for other libraries: map-style data sets of (image, label, 0). Loader workers import this module, so
it imports none of those libraries."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cssbench.data.base import look_up
from cssbench.data.step_dataset import StepDataset
from cssbench.data.transforms import TrainTransform

Item = tuple[Tensor, Tensor, int]  # (3, S, S) float32 normalised; (S, S) int64 positions; task label 0


class StepView(Dataset):
    """Training images of a step with the labels that its learner sees.

    fixed: every image always in its first view (epoch 0); else in a new one each time, drawn from torch's global
    generator.
    """

    def __init__(self, data: StepDataset, fixed: bool):
        self.data, self.fixed = data, fixed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        epoch = 0 if self.fixed else int(torch.randint(2**31, ()))
        item = self.data[epoch, index]
        return item["images"], item["labels"], 0

    def scene(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (h, w, 3) and label (h, w), uint8, as stored: what a memory keeps."""
        data = self.data
        image, label = data.source.pair(data.split, data.stems[index])
        return torch.from_numpy(np.array(image)), torch.from_numpy(np.array(look_up(data.table, label)))


class Scenes(Dataset):
    """Images (h, w, 3) and labels (h, w), uint8, kept in memory, each with a number that tells it from all others."""

    def __init__(self, images: list[Tensor], labels: list[Tensor], numbers: list[int]):
        self.images, self.labels, self.numbers = images, labels, numbers

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        """As kept, not augmented."""
        return self.images[index], self.labels[index], 0

    def draw(self, index: int, transform: TrainTransform, rng: np.random.Generator) -> Item:
        """An augmented view."""
        image, label = transform(self.images[index].numpy(), self.labels[index].numpy(), rng)
        return image, label, 0
