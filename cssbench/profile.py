"""What a model costs: FLOPs and parameters per part, growth over the steps of a scenario, latency, memory.

FLOPs are counted in a real forward pass to the scores, then one resize of the scores to the image's own size, as the
papers' framework does (`cssbench.flops`). A model whose cost depends on the image is counted as it ran; the mean
over images is reported. Models on the meta device are counted without weights or arithmetic.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cssbench import checkpoint, config, recipes, registry, scenario
from cssbench.config import RunConfig
from cssbench.data import transforms
from cssbench.data.registry import make_dataset
from cssbench.errors import ConfigError, ModelError, RunError
from cssbench.flops import FlopCounter, counting
from cssbench.models.segmenter import Segmenter, count_parameters
from cssbench.provenance import cpu_name
from cssbench.results import RunFolder
from cssbench.scenario import Step

GIGA = 1e9
METHODS = ("scores", "run")  # a head's, and the encoder's on ragged tokens


@dataclass(frozen=True)
class Cost:
    """Per part: `flops` (multiply-adds of one image, mean over `images`) and `parameters`.

    Parts: "encoder" (the child `backbone`), other children that are not heads by their name, "head 0", "head 1", ...,
    "rest" (outside any module), "resize" (the last resize of the scores, or of what is shown, to the image).
    """

    flops: dict[str, float]
    parameters: dict[str, int]
    images: int = 1

    @property
    def gflops(self) -> float:
        """Of the whole, in 10^9 multiply-adds: the papers' GFLOPs."""
        return sum(self.flops.values()) / GIGA

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys([*self.parameters, *self.flops]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `gflops_2x` counts a multiply-add as two."""
        parts = {
            part: {"gflops": self.flops.get(part, 0) / GIGA, "parameters": self.parameters.get(part, 0)}
            for part in self.parts
        }
        total = {"gflops": self.gflops, "gflops_2x": 2 * self.gflops, "parameters": self.num_parameters}
        return {**total, "images": self.images, "parts": parts}


def build_model(name: str, options: dict[str, Any] | None = None, device: str = "meta") -> Segmenter:
    """The installed model `name`, not grown yet, in eval mode, with random weights (on "meta" none): `pretrained` and
    `checkpoint` of its backbone are not looked at. Raises UnknownNameError, PluginError, ConfigError, ModelError."""
    options = _without_weights(dict(options or {}))
    cls = registry.load("models", name)
    settings = config.part_config("model", config.PartChoice(name=name, **options), cls.Config)
    with torch.device(device):
        return cls(settings).eval()


def _without_weights(options: dict[str, Any]) -> dict[str, Any]:
    backbone = options.get("backbone")
    if not isinstance(backbone, dict):
        return options
    return {**options, "backbone": {k: v for k, v in backbone.items() if k not in ("pretrained", "checkpoint")}}


def typical_cost(name: str, side: int = 512, classes: int = 150) -> tuple[int, float | None]:
    """(parameters, GFLOPs) of a model or preset with one head of `classes` classes; GFLOPs None: they depend on the
    image. Raises as `build_model`, and whatever a stranger's model raises."""
    section = recipes.named_model(name)
    model = build_model(section.pop("name"), section)
    with torch.device("meta"):
        model.grow(cut_steps(None, classes)[0])
    parameters = count_parameters(model)
    try:
        return parameters, count(model.eval(), no_image(side)).gflops
    except ModelError:
        return parameters, None


def cut_steps(text: str | None, classes: int) -> tuple[Step, ...]:
    """The steps named: "100-10" cuts `classes` classes into 100 and then tens; else an installed scenario, or a path to
    one. None: all classes at once. Raises ConfigError, UnknownNameError, ScenarioError."""
    if text is None:
        return (Step(0, tuple(range(1, classes + 1)), ()),)
    base, dash, increment = text.partition("-")
    if not (dash and base.isdecimal() and increment.isdecimal()):
        return tuple(scenario.load(text).steps)
    first, each = int(base), int(increment)
    if not (0 < first <= classes and each > 0 and (classes - first) % each == 0):
        raise ConfigError(
            f"--steps {text} does not cut {classes} classes: expected BASE-INCREMENT with BASE + k x INCREMENT = "
            f"{classes}. Change it, or --classes."
        )
    ends = [first, *range(first + each, classes + 1, each)]
    starts = [0, *ends[:-1]]
    return tuple(
        Step(i, tuple(range(a + 1, b + 1)), tuple(range(1, a + 1)))
        for i, (a, b) in enumerate(zip(starts, ends, strict=True))
    )


def model_parts(model: Segmenter) -> dict[str, nn.Module]:
    """Modules by the name of their part."""
    parts = {
        "encoder" if name == "backbone" else name: child
        for name, child in model.named_children()
        if child is not model.heads
    }
    return parts | {f"head {number}": head for number, head in enumerate(model.heads)}


@contextmanager
def _attributed(model: Segmenter, counter: FlopCounter) -> Iterator[None]:
    """While it lasts, what a part's modules do counts as the part's: their forward, and the methods in `METHODS`."""
    with ExitStack() as undo:
        for part, whole in model_parts(model).items():
            for module in whole.modules():
                before = module.register_forward_pre_hook(lambda *_, part=part: counter.enter(part))
                undo.callback(before.remove)
                after = module.register_forward_hook(lambda *_: counter.leave(), always_call=True)
                undo.callback(after.remove)
                for name in METHODS:
                    if callable(method := getattr(module, name, None)):
                        object.__setattr__(module, name, counter.part(part)(method))
                        undo.callback(object.__delattr__, module, name)
        yield


def scores(model: Segmenter, image: Tensor) -> Tensor:
    """(B, C, H, W): what a forward pass is timed and counted up to."""
    return model(image).scores


def count(model: Segmenter, images: Iterable[Tensor]) -> Cost:
    """Cost of one image, the mean over `images`, (1, 3, H, W) each on the model's device; the model in eval mode.

    Raises ModelError when a model on the meta device needs the values of an image to know what to do.
    """
    total: Counter[str] = Counter()
    seen = 0
    for image in images:
        with counting() as counter, _attributed(model, counter):
            try:
                made = scores(model, image)
            except (NotImplementedError, RuntimeError) as error:
                if image.device.type != "meta":
                    raise
                raise ModelError(
                    f"What {type(model).__name__} computes depends on the image, so that it cannot be counted without "
                    f"one ({str(error).partition('. ')[0]}). Count it on images: --data ROOT --dataset NAME."
                ) from error
            with counter.part("resize"):
                F.interpolate(made, size=image.shape[-2:], mode="bilinear", align_corners=False)
        total.update(counter.total)
        seen += 1
    parameters = {part: count_parameters(module) for part, module in model_parts(model).items()}
    own = sum(parameter.numel() for parameter in model.parameters(recurse=False))
    return Cost(
        {part: value / seen for part, value in total.items()}, parameters | ({"rest": own} if own else {}), seen
    )


def growth(model: Segmenter, steps: Sequence[Step], images: Sequence[Tensor]) -> list[Cost]:
    """Cost after each step. The model, not grown yet, is grown through all of them."""
    costs = []
    for step in steps:
        with images[0].device:
            model.grow(step)
        model.eval()
        costs.append(count(model, images))
    return costs


def latency(runs: dict[str, Callable[[], Any]], repeats: int = 9, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each of `runs`, which take turns, so that a machine's slow minute falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name, run in runs.items():
            _synchronise()
            start = time.perf_counter()
            run()
            _synchronise()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or the largest resident size of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> str:
    """What times and memory were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def usable_device(name: str) -> str:
    """`name`. Raises ConfigError unless it is "cpu", or "cuda" on a machine that has it."""
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {name} is not there. Choose cpu, or cuda on a machine with a GPU.")
    return name


def no_image(side: int) -> list[Tensor]:
    """One input of side x side px on the meta device: shapes without values."""
    return [torch.empty(1, 3, side, side, device="meta")]


def images(
    made: Segmenter,
    root: str | None,
    dataset: str,
    limit: int,
    side: int,
    device: str,
    split: str = "val",
    options: dict[str, Any] | None = None,
) -> list[Tensor]:
    """The first images of a split, short side and centre crop `side`, normalised for the model."""
    source = make_dataset(dataset, root, options or {})
    found = []
    for stem in source.stems(split)[:limit]:
        picture = transforms.to_tensor(source.image(split, stem))
        picture = transforms.resize(picture, transforms.short_side_size(picture.shape[-2:], side))
        picture = transforms.centre_crop(picture, side)
        found.append(transforms.normalise(picture, made.pixel_mean, made.pixel_std)[None].to(device))
    return found


def stored_model(run: RunFolder, settings: RunConfig, device: str) -> Segmenter:
    """The model as a run's last finished step left it, in eval mode; `settings`: the run's configuration, whose model
    options may be changed. A run that only evaluated again has the weights of the run it names, if that is still there
    and the same. Raises RunError where weights are missing or do not fit."""
    origin = run.provenance.get("evaluated_from")
    source = RunFolder.read(origin["path"]) if origin else run
    if origin and source.digest != origin["digest"]:
        raise RunError(f"{run.path} evaluated other weights than {source.path} has now. Evaluate them again.")
    _, weights = source.weights(max(0, len(run.records()) - 1))
    made = build_model(settings.model.name, settings.model.options, device)
    seen: tuple[int, ...] = ()
    for index, group in enumerate(run.groups[: len(run.records())]):
        made.grow(Step(index, tuple(group), seen))
        seen = (*seen, *group)
    checkpoint.load_weights(weights, made)
    return made.to(device).eval()


def image_latency(made: Segmenter, inputs: Sequence[Tensor], repeats: int = 9) -> dict[str, Any]:
    """Seconds per image, median over passes through all of `inputs`, one image at a time."""

    def run() -> None:
        for image in inputs:
            scores(made, image)

    with torch.no_grad():
        seconds = latency({"run": run}, repeats)["run"] / len(inputs)
    return measured({"stored weights": seconds}, inputs[0].device)


def measured(seconds: dict[str, float], where: torch.device) -> dict[str, Any]:
    """Seconds of one image by what ran, with what they were measured on."""
    found = {"seconds": seconds, "peak_memory_bytes": peak_memory(where), "device": machine(where)}
    return {**found, "batch_size": 1, "torch": torch.__version__}


def step_latency(name: str, options: dict[str, Any], cut: Sequence[Step], side: int, device: str) -> dict[str, Any]:
    """Median time of one image after the first step and after the last, in turns; random weights and image."""
    image = torch.rand(1, 3, side, side, device=device)
    runs: dict[str, Callable[[], Any]] = {}
    for last in sorted({0, len(cut) - 1}):
        made = build_model(name, options, device)
        for step in cut[: last + 1]:
            made.grow(step)
        made.eval()
        runs[f"after step {last}"] = partial(scores, made, image)
    with torch.no_grad():
        seconds = latency(runs)
    return measured(seconds, torch.device(device))
