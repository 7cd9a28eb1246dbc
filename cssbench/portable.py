"""A trained model with all that its evaluation does to an image: what `cssbench export` writes and `predict` runs.

This module, and what it uses of cssbench, goes into every exported folder (`cssbench.bundle`): only PyTorch,
torchvision, timm, safetensors and NumPy may be named here. `about` is the content of the folder's config.json.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cssbench.data.transforms import normalise, resize, short_side_size, to_tensor
from cssbench.predict import Predictor, SlideScores, WholeScores, pad_to_multiple, resized
from cssbench.scenario import Step

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Options(SimpleNamespace):
    """The options of a model or of a part of it, by attribute."""

    def __init__(self, **content: Any):
        super().__init__(**{k: Options(**v) if isinstance(v, dict) else v for k, v in content.items()})

    def model_copy(self, update: dict[str, Any]) -> Options:
        """The same with some options replaced."""
        return Options(**(vars(self) | update))


def steps_of(groups: list[list[int]]) -> list[Step]:
    """The steps that teach these groups of class ids."""
    found: list[Step] = []
    for index, new in enumerate(groups):
        found.append(Step(index, tuple(new), found[-1].seen if found else ()))
    return found


class Portable(nn.Module):
    """Scores of normalised inputs (`forward`), and class ids of images of any size (`predict`).

    Attributes: `classes`, {class id: name} of what it has learned; `palette`, {class id: (r, g, b)}; `about`.
    """

    def __init__(self, model: Any, about: dict[str, Any]):
        super().__init__()
        self.model, self.about = model, about
        model.pixel_mean, model.pixel_std = tuple(about["pixel_mean"]), tuple(about["pixel_std"])
        self.classes = {int(c): name for c, name in about["classes"].items()}
        self.palette = {int(c): tuple(colour) for c, colour in about["palette"].items()}
        self.steps = steps_of(about["groups"])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised by `about`'s pixel_mean and pixel_std -> (B, C, H, W) scores.

        C: background first where `about["has_background"]`, then the classes of `about["groups"]`, in that order.
        """
        height, width = images.shape[-2:]
        with self.autocast():
            return self.model(pad_to_multiple(images, self.model.multiple)).scores[..., :height, :width].float()

    @torch.no_grad()
    def predict(self, image: np.ndarray, rule: str | None = None) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (H, W) uint8 class ids, as the run's evaluation of full images has them.

        rule: `foreground`, the best class everywhere; `all`, or 0 where background is likelier; None: as `about` says.
        """
        how, shape = self.about["evaluate"], image.shape[:2]
        size = short_side_size(shape, how["short_side"] or min(shape), how["long_side"])
        view = normalise(resize(to_tensor(image), size), self.model.pixel_mean, self.model.pixel_std)
        view = view.to(next(self.model.parameters()).device)
        last = self.steps[-1].index
        scene: Any = SimpleNamespace(order=self.steps[-1].seen, steps=self.steps)
        predictor = Predictor(self.model, scene, how["background_threshold"])
        found = predictor(resized(self._scores(view).chunks(), (shape[0], shape[1])), [last])[last]
        return found[rule or self.about["rule"]].cpu().numpy().astype(np.uint8)

    def _scores(self, view: Tensor) -> WholeScores | SlideScores:
        how = self.about["evaluate"]
        if how["inference"] == "slide":
            return SlideScores(self.model, view, how["window"], how["stride"], self.model, self.autocast, how["chunk"])
        return WholeScores(self.model, view, self.model, self.autocast, how["chunk"])

    def autocast(self) -> Any:
        """Context of the precision that the run was evaluated in."""
        dtype = DTYPES.get(self.about["precision"])
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype)


def assemble(model: Any, about: dict[str, Any], weights: dict[str, Tensor]) -> Portable:
    """`model`, as it is built from its options, grown to `about`'s steps and filled with `weights`."""
    for step in steps_of(about["groups"]):
        model.grow(step)
    model.load_state_dict(weights)
    return Portable(model, about)
