"""The evaluation of one step of a run: matrices, sample predictions, how deep tokens went and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cssbench.depths import DepthCounter, depth_map, gflops
from cssbench.engine import gather
from cssbench.evaluate import EvaluationDataset, evaluate
from cssbench.experiment import Experiment
from cssbench.frozen import remembering
from cssbench.progress import track
from cssbench.results import atomic_path, image_name
from cssbench.scenario import Step

Arrays = dict[str, np.ndarray]


@dataclass
class Evaluated:
    """matrices: as `results.StepRecord.matrices`. samples, depths: stem -> (h, w) uint8, the predicted class ids and
    the depths of tokens (`depths.depth_map`) of the sample images. numbers: `tokens` and `gflops` of the
    step's record, where they mean something; cached: what it says of `frozen.remembering`. seconds: what it took."""

    matrices: Arrays
    samples: Arrays = field(default_factory=dict)
    depths: Arrays = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cached: dict[str, Any] = field(default_factory=dict)


def evaluation_view(made: Experiment, step: Step) -> EvaluationDataset:
    """The images evaluated after `step`."""
    config = made.config.evaluate
    return EvaluationDataset(made.evaluated_data, config.split, made.evaluation_stems(step), config, made.model)


def evaluate_step(made: Experiment, step: Step) -> Evaluated:
    """Evaluate the model as it is, with the run's settings. All processes of a distributed run call it."""
    steps, model, fabric = made.scenario.steps, made.model, made.fabric
    view = evaluation_view(made, step)
    alone = [frozenset(made.evaluation_stems(s)) for s in steps[:-1]] if step is steps[-1] else []
    with (
        track(f"step {step.index}/{len(steps) - 1}  evaluate", len(view)) as advance,
        DepthCounter(model, fabric.device) as counter,
        remembering(made, step, view) as (forward, cached),
    ):
        matrices, samples = evaluate(
            fabric,
            model,
            view,
            made.scenario,
            step,
            made.config.data.workers,
            advance,
            keep=frozenset(made.sample_stems),
            alone=alone,
            forward=forward,
        )
    found = Evaluated(matrices, gather(fabric, samples), cached=cached)
    was_training = model.training
    model.eval()
    if tokens := counter.shares(fabric):
        found.numbers["tokens"] = tokens
        found.depths = gather(fabric, _depth_maps(made, view, samples))
    if fabric.is_global_zero and (cost := gflops(fabric, model, view)):
        found.numbers["gflops"] = cost
    model.train(was_training)
    return found


def _depth_maps(made: Experiment, view: EvaluationDataset, samples: Arrays) -> Arrays:
    maps = {
        stem: depth_map(made.fabric, made.model, view.sampled_view(view.stems.index(stem)), view.config)
        for stem in samples
    }
    return {stem: depths for stem, depths in maps.items() if depths is not None}


def save_pictures(made: Experiment, step: Step, found: Evaluated) -> None:
    """Predictions and depths of this step, and once the images and their truth, as PNG, all of one geometry."""
    view, folder = evaluation_view(made, step), made.folder.step_folder(step.index)
    colours = np.zeros((256, 3), np.uint8)
    colours[1 : 1 + made.data.num_classes] = made.data.palette
    for stem, predicted in found.samples.items():
        name = image_name(stem)
        _save_palette(folder / "samples" / f"{name}.png", predicted, colours)
        if stem in found.depths:
            _save_palette(folder / "depths" / f"{name}.png", found.depths[stem], _greys(found.depths[stem]))
        truth = made.folder.path / "samples" / f"{name}.truth.png"
        if not truth.exists():
            image, ids = view.picture(stem)
            with atomic_path(truth.with_name(f"{name}.image.png")) as path:
                Image.fromarray(image).save(path, format="PNG")
            _save_palette(truth, ids, colours)


def _greys(depths: np.ndarray) -> np.ndarray:
    """(256, 3): black for the deepest, the brighter the earlier a token stopped."""
    deepest = max(int(depths.max()), 1)
    ramp = 255 - np.minimum(np.arange(256) * 255 // deepest, 255)
    return np.repeat(ramp[:, None], 3, axis=1).astype(np.uint8)


def _save_palette(path: Path, ids: np.ndarray, colours: np.ndarray) -> None:
    picture = Image.fromarray(ids)
    picture.putpalette(colours.tobytes())
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
