"""Images per second of training and inference, from batch 1 up to what the memory holds. Command:

    python bench/throughput.py [--device cuda] [--csv FILE]

On a GPU SegViT with ViT-B/16 at 512 px and ViT-L/16 at 640 px, 150 classes, bf16 autocast; on a CPU a ViT-Ti/16 at
96 px, so that the code runs there. Training is an iteration of the base step through the trainer, inference goes up to
the scores of all pixels; both on a batch that lies on the device. Batch sizes double until the memory is full.

of_matmul_peak  model FLOPs utilisation: multiply-adds of a forward pass (`cssbench.profile.count`) x 2, in training x 3
                for the backward pass, per second; over those of one large matrix product, which takes turns with the
                run on the same device and in the same type. Not a data sheet's number.
peak_memory_gib allocated on the GPU; on a CPU the largest resident size of the process so far.
data_wait       share of a training iteration spent on waiting for the loader: 512 x 512 scenes (or of the crop's side)
                as PNG, decoded and augmented as in a run. The clock starts when the device is done, so that nothing of
                the wait hides behind it; what workers had ready before the first iteration is left out.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from frozen import Learner, learner
from speed import Row, conditions, main

from cssbench import profile
from cssbench.config import AugmentConfig, TrainConfig
from cssbench.data.parallel import cores
from cssbench.data.step_dataset import BatchStream, StepDataset, make_loader
from cssbench.data.synthetic import Synthetic
from cssbench.data.transforms import TrainTransform
from cssbench.engine import make_fabric
from cssbench.profile import GIGA, build_model, cut_steps, latency, no_image, peak_memory, scores
from cssbench.scenario import Scenario

CLASSES, IMAGES = 150, 32
PRECISION = {"cpu": "32-true", "cuda": "bf16-mixed"}


@dataclass(frozen=True)
class Size:
    """A model and its image side, px. largest: batch size after which to stop, None: what the memory holds."""

    label: str
    side: int
    vit: dict[str, Any]
    heads: int
    largest: int | None = None
    steps: Any = field(default_factory=lambda: cut_steps(None, CLASSES))

    @property
    def options(self) -> dict[str, Any]:
        return {"backbone": {**self.vit, "image_size": self.side}, "head": {"heads": self.heads}}

    def flops(self) -> float:
        """Floating-point operations of a forward pass of one image, two per multiply-add."""
        model = build_model("segvit", self.options)
        with torch.device("meta"):
            model.grow(self.steps[0])
        return 2 * GIGA * profile.count(model.eval(), no_image(self.side)).gflops


SIZES = {
    "cpu": [Size("SegViT ViT-Ti/16 96", 96, {"name": "vit_tiny_patch16_384"}, 3, largest=4)],
    "cuda": [
        Size("SegViT ViT-B/16 512", 512, {"name": "vit_base_patch16_384"}, 12),
        Size("SegViT ViT-L/16 640", 640, {"name": "vit_large_patch16_384", "layers": [8, 16, 24]}, 16),
    ],
}


def matmul(device: str) -> tuple[Callable[[], Any], int]:
    """A square matrix product, bf16 of side 8192 on a GPU, fp32 of side 1024 on a CPU; and its operations."""
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def training(made: Learner, size: Size, batch: int) -> Callable[[], Any]:
    """An iteration on a batch that lies on the device."""
    images = torch.randn(batch, 3, size.side, size.side, device=made.fabric.device)
    labels = torch.randint(0, CLASSES + 1, (batch, 4, 4), device=made.fabric.device)  # some fifteen classes an image
    labels = labels.repeat_interleave(size.side // 4, 1).repeat_interleave(size.side // 4, 2)
    return partial(made.iteration, {"images": images, "labels": labels, "names": [""] * batch})


def inference(made: Learner, size: Size, batch: int) -> Callable[[], Any]:
    """A forward pass in eval mode."""
    images = torch.randn(batch, 3, size.side, size.side, device=made.fabric.device)
    made.ctx.model.eval()

    def run() -> None:
        with torch.inference_mode(), made.fabric.autocast():
            scores(made.ctx.model, images)

    return run


MODES = {"training": (training, 3), "inference": (inference, 1)}  # and what it costs in forward passes


def data_wait(made: Learner, data: StepDataset, batch: int, workers: int) -> float:
    """Share of the time of iterations that goes by before the loader has the next batch."""
    ready, timed = 1 + 2 * workers, max(3, 2 * workers)
    stream = iter(make_loader(data, BatchStream(len(data), 0, batch, ready + timed), workers))
    waited = whole = 0.0
    for number in range(ready + timed):
        start = time.perf_counter()
        loaded = next(stream)
        arrived = time.perf_counter()
        made.iteration(loaded)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= ready:
            waited, whole = waited + arrived - start, whole + time.perf_counter() - start
    return waited / whole


def scenes(folder: Path, size: Size, model: Any) -> StepDataset:
    """Generated images of the crop's side, as a step reads them."""
    source = Synthetic(folder, classes=CLASSES, size=size.side, train=IMAGES, val=1)
    steps = Scenario("bench", source.name, groups=tuple(step.new for step in size.steps))
    transform = TrainTransform(AugmentConfig(crop=size.side), model.pixel_mean, model.pixel_std)
    return StepDataset(source, "train", source.stems("train"), steps.train_table(size.steps[0]), transform, seed=0)


def measured(made: Learner, size: Size, mode: str, batch: int, data: StepDataset, workers: int) -> Row:
    """One row. Raises torch.OutOfMemoryError."""
    make, passes = MODES[mode]
    run, device = make(made, size, batch), made.fabric.device
    run()
    memory = peak_memory(device)
    product, operations = matmul(device.type)
    seconds = latency({"run": run, "product": product}, repeats=5, warm_up=1)
    peak = operations / seconds["product"]
    used = passes * size.flops() * batch / seconds["run"]
    waits = mode == "training"
    return {
        "model": size.label,
        "mode": mode,
        "batch": batch,
        "images_per_s": f"{batch / seconds['run']:.4g}",
        "of_matmul_peak": f"{100 * used / peak:.1f} %",
        "matmul_peak_tflops": f"{peak / 1e12:.3g}",
        "peak_memory_gib": f"{memory / 2**30:.1f}",
        "data_wait": f"{100 * data_wait(made, data, batch, workers):.1f} %" if waits else "",
        "workers": workers if waits else "",
        "precision": PRECISION[device.type],
        **conditions(device.type),
    }


def measure_size(size: Size, device: str, folder: Path, workers: int) -> Iterator[Row]:
    """Both modes, until the memory is full."""
    train = TrainConfig(iterations=1, accelerator=device, precision=PRECISION[device])  # type: ignore[arg-type]
    fabric = make_fabric(train)
    for mode in MODES:
        made = learner(fabric, size.steps, 0, size.options)
        data = scenes(folder, size, made.ctx.model)
        for batch in (2**n for n in count()):
            if size.largest and batch > size.largest:
                break
            release(device)
            try:
                row = measured(made, size, mode, batch, data, workers)
            except torch.OutOfMemoryError:
                print(f"{size.label}, {mode}: no memory for batch {batch}", flush=True)
                break
            yield row
        del made


def release(device: str) -> None:
    """Give back what earlier sizes held, and measure the memory anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(device: str) -> Iterator[Row]:
    workers = max(1, cores() - 1) if device == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES[device]:
            yield from measure_size(size, device, Path(folder), workers)


if __name__ == "__main__":
    main(__doc__, measure, "throughput")
