"""Data: label mapping, the presence index, each stage of the augmentation, stored images, loader processes.

Scenes are generated at 512 x 683 with 150 classes, as JPEG with grain, in ADE20K's layout. Stages are told as their
share of the whole of one training sample. All with one thread, as in a loader process. What one GPU needs is not
measured here: ViT-B at 512 costs about 0.64 TFLOP per image (forward and backward), so 200 to 600 images/s at 40 % of
300 to 1000 TFLOP/s.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rows import Row
from speed import compare, main, row
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cssbench.config import AugmentConfig
from cssbench.data import photometric, presence, transforms
from cssbench.data.ade20k import ADE20K
from cssbench.data.base import look_up
from cssbench.data.step_dataset import BatchStream, StepDataset, make_loader
from cssbench.data.stored import StoredDataset
from cssbench.data.synthetic import Synthetic
from cssbench.data.transforms import Draw, TrainTransform
from cssbench.profile import latency

IMAGES, SIZE, CROP = 12, (512, 683), 512
TRANSFORM = TrainTransform(AugmentConfig(crop=CROP, short_side=512), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LEARNED = np.where(np.arange(256) <= 100, 0, np.arange(256) - 100).astype(np.uint8)  # 100 classes are background


def scenes(root: Path) -> ADE20K:
    """Generated scenes as JPEG of photograph-like size (about 100 kB) and PNG label maps, in ADE20K's folders."""
    made = Synthetic(root / "scenes", classes=150, size=SIZE, train=IMAGES, val=1)
    rng = np.random.default_rng(0)
    for folder in ("images", "annotations"):
        (root / folder / "training").mkdir(parents=True)
    for stem in made.stems("train"):
        image, label = made.pair("train", stem)
        grain = rng.normal(0, 8, (*label.shape, 1))
        photo = Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))
        photo.save(root / "images" / "training" / f"{stem}.jpg", quality=90)
        Image.fromarray(label).save(root / "annotations" / "training" / f"{stem}.png")
    return ADE20K(root)


def measure(device: str) -> Iterable[Row]:
    torch.set_num_threads(1)  # as in a loader process
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CSSBENCH_CACHE"] = str(Path(folder) / "cache")
        data = scenes(Path(folder))
        yield from mapping(data)
        yield indexing(data)
        yield from stages(data)
        yield from stored(data)
        yield from processes(data)


def mapping(data: ADE20K) -> Iterable[Row]:
    """From class ids to what the learner of a step sees. Continuum 1.2.7 calls a Python function per pixel
    (`Tensor.apply_`), here emulated; second, with the way from stored values to class ids and its check."""
    raw = np.ascontiguousarray(data.raw_label("train", data.stems("train")[0])[:, :512])
    label = data.to_ids(raw, Path("a"))
    pixels, known = torch.from_numpy(label), dict(enumerate(LEARNED.tolist()))

    def function() -> Tensor:
        return pixels.clone().apply_(lambda value: known.get(value, 0))

    assert np.array_equal(function().numpy(), look_up(LEARNED, label))
    baseline = ("function per pixel, emulating Continuum 1.2.7", function)
    claim = "labels of one 512 x 512 map for a step"
    yield compare(claim, ">= 100", baseline, ("table of bytes", lambda: look_up(LEARNED, label)), repeats=15)
    both = ("with stored values to class ids, checked", lambda: look_up(LEARNED, data.to_ids(raw, Path("a"))))
    yield compare(claim, "", baseline, both, repeats=15)


def indexing(data: ADE20K) -> Row:
    stems = data.stems("train") * 5
    paths = [data.label_path("train", stem) for stem in stems]

    def decode() -> None:
        for path in paths:
            with Image.open(path) as picture:
                np.asarray(picture)

    def index() -> None:
        for stem in stems:
            presence._row(data, "train", stem)

    return compare(f"presence index of {len(stems)} label maps, 512 x 683", "<= 1.15", ("decoding alone", decode),
                   ("index, values checked", index))  # fmt: skip


def planes_first(image: np.ndarray, draw: Draw) -> Tensor:
    """The same picture by torchvision's functions alone, on planes."""
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    planes = F.resize(planes, list(draw.size), InterpolationMode.BILINEAR, antialias=True)
    planes = planes[:, slice(*draw.rows), slice(*draw.columns)]
    planes = planes.flip(-1) if draw.flip else planes
    planes = torchvision_distort(planes, draw.photometric) if draw.photometric else planes
    return TRANSFORM._pad(transforms.normalise(planes, TRANSFORM.mean, TRANSFORM.std), 0)


def torchvision_distort(image: Tensor, drawn: photometric.Photometric) -> Tensor:
    changes = [
        (F.adjust_brightness, drawn.brightness),
        (F.adjust_contrast, drawn.contrast if drawn.early else None),
        (F.adjust_saturation, drawn.saturation),
        (F.adjust_hue, drawn.hue),
        (F.adjust_contrast, None if drawn.early else drawn.contrast),
    ]
    for change, amount in changes:
        image = image if amount is None else change(image, amount)
    return image


def stages(data: ADE20K) -> Iterable[Row]:
    """The whole of a sample, its stages one by one over the same 12 draws, and against torchvision's functions."""
    stems = data.stems("train")
    pairs = [data.pair("train", stem) for stem in stems]
    raws = [data.raw_label("train", stem) for stem in stems]
    labels = [look_up(LEARNED, label) for _, label in pairs]
    draws = [TRANSFORM.draw(label, np.random.default_rng(i)) for i, label in enumerate(labels)]
    each = partial(zip, strict=True)
    resized = [transforms.resize(transforms.to_tensor(p[0]), d.size) for p, d in each(pairs, draws)]
    cut = [r[:, slice(*d.rows), slice(*d.columns)].float().contiguous() for r, d in each(resized, draws)]
    for (image, _), d in each(pairs, draws):
        assert torch.equal(TRANSFORM.picture(image, d), planes_first(image, d))
    runs: dict[str, Callable[[], object]] = {
        "whole": lambda: [sample(data, stem, i) for i, stem in enumerate(stems)],
        "decode image": lambda: [data.image("train", stem) for stem in stems],
        "decode label map": lambda: [data.raw_label("train", stem) for stem in stems],
        "map labels": lambda: [look_up(LEARNED, data.to_ids(raw, Path("a"))) for raw in raws],
        "draw": lambda: [TRANSFORM.draw(label, np.random.default_rng(i)) for i, label in enumerate(labels)],
        "resize": lambda: [transforms.resize(transforms.to_tensor(p[0]), d.size) for p, d in each(pairs, draws)],
        "crop, flip, to float": lambda: [
            r[:, slice(*d.rows), slice(*d.columns)].flip(-1).to(torch.float32, memory_format=torch.contiguous_format)
            for r, d in each(resized, draws)
        ],
        "photometric": lambda: [photometric.distort(c.clone(), d.photometric) for c, d in each(cut, draws)],
        "normalise": lambda: [transforms._normalise(c.clone(), TRANSFORM.mean, TRANSFORM.std) for c in cut],
        "labels of the view": lambda: [TRANSFORM.truth(label, d) for label, d in each(labels, draws)],
        "picture, torchvision's functions": lambda: [planes_first(p[0], d) for p, d in each(pairs, draws)],
        "picture": lambda: [TRANSFORM.picture(p[0], d) for p, d in each(pairs, draws)],
    }
    seconds = {name: total / IMAGES for name, total in latency(runs, repeats=3, warm_up=1).items()}
    old, new = (seconds.pop(name) for name in ("picture, torchvision's functions", "picture"))
    claim = "augmented picture, 683 x 512 to 512 x 512, same bits"
    yield row(claim, "", ("torchvision's functions", old), ("here", new), repeats=3)
    whole = seconds.pop("whole")
    for name, found in seconds.items():
        yield row("share of a training sample, JPEG 683 x 512", "", ("whole", whole), (name, found), repeats=3)


def sample(data: ADE20K | StoredDataset, stem: str, seed: int) -> tuple[Tensor, Tensor]:
    image, label = data.pair("train", stem)
    return TRANSFORM(image, look_up(LEARNED, label), np.random.default_rng(seed))


def stored(data: ADE20K) -> Iterable[Row]:
    """One sample from originals and from stored images, with and without a smaller side; augmented, and read alone."""
    plain, small = StoredDataset(data), StoredDataset(data, 384)
    stems = data.stems("train")
    for kept in (plain, small):
        kept.fill([("train", stem) for stem in stems], 1.0)
    mild = replace(TRANSFORM, config=TRANSFORM.config.model_copy(update={"photometric": False}))
    for what, run in (
        ("reading an image with its labels", lambda kept, i, stem: kept.pair("train", stem)),
        ("training sample", lambda kept, i, stem: sample(kept, stem, i)),
        ("training sample, no photometric distortion",
         lambda kept, i, stem: mild(*kept.pair("train", stem), np.random.default_rng(i))),
    ):  # fmt: skip
        for name, kept in (("data.stored", plain), ("data.stored, stored_side 384", small)):
            yield compare(
                f"{what}, JPEG 683 x 512",
                "",
                ("decoded", lambda run=run: [run(data, i, stem) for i, stem in enumerate(stems)]),
                (name, lambda run=run, kept=kept: [run(kept, i, stem) for i, stem in enumerate(stems)]),
                repeats=3,
            )


def processes(data: ADE20K) -> Iterable[Row]:
    """Batches of four: seconds to the first batch of a loader, and of 48 more."""
    view = StepDataset(data, "train", data.stems("train"), LEARNED, TRANSFORM, 0)

    def seconds(loader: DataLoader) -> tuple[float, float]:
        batches = iter(loader)
        return timed(lambda: next(batches)), timed(lambda: list(batches))

    batches = BatchStream(IMAGES, 0, 4, 13)
    slow = seconds(DataLoader(view, batch_sampler=batches, num_workers=1, multiprocessing_context="spawn"))[0]
    loaders = {workers: make_loader(view, batches, workers) for workers in (0, 1, 2)}
    timed(lambda: next(iter(loaders[1])))  # the first loader of a run starts the server
    found = {workers: seconds(loader) for workers, loader in loaders.items()}
    served = ("1 process, forked from a server", found[1][0])
    yield row("first batch of a loader", "", ("1 process, spawned", slow), served)
    for workers in (1, 2):
        variant = (f"{workers} loader processes", found[workers][1])
        yield row("48 samples in batches of 4", "", ("0 loader processes", found[0][1]), variant)


def timed(run: Callable[[], object]) -> float:
    return latency({"run": run}, repeats=1, warm_up=0)["run"]


if __name__ == "__main__":
    main(__doc__, measure)
