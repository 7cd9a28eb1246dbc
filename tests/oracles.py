"""Images that show class ids by colour, models that read them off, and a view of both for the evaluation."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cssbench.config import EvaluateConfig
from cssbench.data.base import SegDataset
from cssbench.evaluate import EvaluationDataset
from cssbench.models.segmenter import Segmenter, SegOutput
from cssbench.scenario import from_dict

torch.set_num_threads(1)
K = 4
SCENE = from_dict("toy", {"dataset": "toy", "classes": K, "base": 2, "increment": 1, "order": [3, 1, 4, 2]})


class Shown(SegDataset):
    """Images whose first channel is 50 x the class id in `shown`; the truth is in `truth`. Both by stem."""

    name = "shown"
    classes = tuple("abcd")

    def __init__(self, shown: dict[str, np.ndarray], truth: dict[str, np.ndarray]):
        self.shown, self.truth = shown, truth

    def layout(self) -> str:
        return ""

    def folders(self, split: str) -> tuple[Path, Path]:
        return Path("images"), Path("labels")

    def image(self, split: str, stem: str) -> np.ndarray:
        return np.stack([self.shown[stem] * 50] + [np.zeros_like(self.shown[stem])] * 2, axis=-1)

    def label(self, split: str, stem: str) -> np.ndarray:
        return self.truth[stem]


class Scores(SegOutput):
    """Output with ready scores."""

    def __init__(self, scores: Tensor):
        super().__init__((scores.shape[-2], scores.shape[-1]))
        self.ready = scores

    @cached_property
    def scores(self) -> Tensor:
        return self.ready


class Oracle(Segmenter):
    """Score 1 for the class whose colour a pixel has, among the classes seen; 0 elsewhere. Counts its calls."""

    pixel_mean = (0.0, 0.0, 0.0)
    pixel_std = (1 / 255, 1 / 255, 1 / 255)
    multiple = 4

    def __init__(self, has_background: bool, seen: int):
        super().__init__()
        self.has_background = has_background
        self.seen = SCENE.order[:seen]
        self.calls: list[tuple[int, ...]] = []

    def grow(self, step: Any) -> None:
        raise AssertionError("evaluation must not change the model")

    def loss(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        raise AssertionError("evaluation must not compute losses")

    def forward(self, images: Tensor) -> Scores:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert images.shape[-1] % 4 == images.shape[-2] % 4 == 0
        self.calls.append(tuple(images.shape))
        ids = (images[:, 0] / 50).round()
        scores = torch.stack([(ids == c).float() for c in self.seen], dim=1)
        if self.has_background:
            scores = torch.cat([1 - scores.amax(1, keepdim=True), scores], dim=1)
        return Scores(scores)


class Mean(Oracle):
    """One class, whose score everywhere is the mean of the first channel: tells what a window contained."""

    multiple = 1

    def forward(self, images: Tensor) -> Scores:
        self.calls.append(tuple(images.shape))
        return Scores(images.mean(dim=(2, 3))[:, :1, None, None].expand(-1, 1, *images.shape[-2:]))


class OneOf:
    """What evaluation needs of Fabric, for process `rank` of `world`; the sum over processes is left to the test."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, world: int = 1):
        self.global_rank, self.world_size = rank, world

    def autocast(self) -> Any:
        return nullcontext()

    def all_reduce(self, data: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return data


def view(data: Shown, model: Segmenter, **changes: Any) -> EvaluationDataset:
    config = EvaluateConfig(**{"short_side": None, "crop": 6, "background_threshold": 0.5} | changes)
    return EvaluationDataset(data, "val", list(data.shown), config, model)
