"""The training data of one step: an exact image set, one label table, and an endless, seeded stream of batches."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cssbench.data.base import SegDataset, look_up
from cssbench.data.transforms import (
    TrainTransform,
    centre_crop,
    normalise,
    resize,
    resize_label,
    short_side_size,
    to_tensor,
)

Key = tuple[int, int]  # (epoch, index into the stems)


class StepDataset(Dataset):
    """Images of one step with the labels that the learner sees. Indexed by (epoch, i): the draw depends on
    (seed, epoch, image name) alone.

    `table` is `Scenario.train_table(step)`. views: so many draws of each image, used in turns; None: a new one in every
    epoch.
    """

    def __init__(
        self,
        source: SegDataset,
        split: str,
        stems: Sequence[str],
        table: np.ndarray,
        transform: TrainTransform,
        seed: int,
        views: int | None = None,
    ):
        self.source, self.split, self.stems = source, split, list(stems)
        self.table, self.transform, self.seed, self.views = table, transform, seed, views

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        stem = self.stems[key[1]]
        image, label = self.source.pair(self.split, stem)
        picture, truth = self.transform(image, look_up(self.table, label), self.generator(key))
        return {"images": picture, "labels": truth, "names": stem}

    def generator(self, key: Key) -> np.random.Generator:
        """What the view `key` is drawn with."""
        epoch, index = key
        view = epoch if self.views is None else epoch % self.views
        return np.random.default_rng([self.seed, view, stem_number(self.stems[index])])


class HoldoutDataset(Dataset):
    """Unaugmented square views (short side, then centre crop) of images, with the labels that the learner sees."""

    def __init__(self, source: SegDataset, stems: Sequence[str], table: np.ndarray, transform: TrainTransform):
        self.source, self.stems, self.table, self.transform = source, list(stems), table, transform

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict[str, Any]:
        stem, side = self.stems[index], self.transform.config.crop
        image, label = self.source.pair("train", stem)
        size = short_side_size(label.shape, side)
        view = normalise(centre_crop(resize(to_tensor(image), size), side), self.transform.mean, self.transform.std)
        truth = centre_crop(resize_label(torch.from_numpy(look_up(self.table, label)), size), side).long()
        return {"images": view, "labels": truth, "names": stem}


class BatchStream(Sampler[list[Key]]):
    """Micro-batches of (epoch, index): every epoch a new permutation, batches run on across epochs, none is dropped.

    The order depends on (seed, n) alone. The first `skip` of the `num_batches` are left out. With `world` processes,
    `rank` takes every world-th micro-batch: the forward passes of one optimiser step are the same whether processes
    make them side by side or one makes them in turn.
    """

    def __init__(
        self, n: int, seed: int, micro_batch: int, num_batches: int, rank: int = 0, world: int = 1, skip: int = 0
    ):
        if n < 1:
            raise ValueError("an endless stream needs at least one image")
        self.n, self.seed, self.micro_batch, self.num_batches = n, seed, micro_batch, num_batches
        self.rank, self.world, self.skip = rank, world, skip

    def __len__(self) -> int:
        return self.num_batches - self.skip

    def __iter__(self) -> Iterator[list[Key]]:
        keys = self._keys()
        for number in range(self.num_batches):
            batch = [next(keys) for _ in range(self.micro_batch * self.world)]
            if number >= self.skip:
                yield batch[self.rank * self.micro_batch : (self.rank + 1) * self.micro_batch]

    def _keys(self) -> Iterator[Key]:
        epoch = 0
        while True:
            for index in np.random.default_rng([self.seed, epoch]).permutation(self.n):
                yield epoch, int(index)
            epoch += 1


def one_pass(n: int, batch: int) -> list[list[Key]]:
    """Every image once, in order, at epoch 0: what `ctx.train_loader` walks."""
    return [[(0, i) for i in range(start, min(start + batch, n))] for start in range(0, n, batch)]


def make_loader(dataset: Dataset, batches: Any, workers: int, collate: Any = None) -> DataLoader:
    """A loader over explicit batches, which draws nothing from the global random generator. Items come as
    {"images": (B,3,S,S), "labels": (B,S,S), "names": [...]}, or as `collate` makes them of a list of the dataset's."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        multiprocessing_context=worker_context(workers),
    )


def worker_context(workers: int) -> Any:
    """How loader processes start: forked from a small process that has imported this module, so that only the first
    loader of a run waits for imports (a loader of each step, one of each evaluation). Fresh ones where that is not
    known; never forked from this process, whose threads and GPU context a child must not inherit. None: no workers.
    """
    if not workers:
        return None
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def stem_number(stem: str) -> int:
    """A 63-bit number that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") >> 1


def split_holdout(stems: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """(trained on, held out): an image is held out when the hash of its name falls below `share`; order kept."""
    limit = share * 2**63
    held = [stem_number(f"holdout {stem}") < limit for stem in stems]
    return [s for s, h in zip(stems, held, strict=True) if not h], [s for s, h in zip(stems, held, strict=True) if h]
