"""Steps and evaluations on what a frozen encoder made before: the encoder runs once per view, then files are read.

Training (`cache.features`): at steps t > 0 the heads learn from stored features of `augment.later_views` views of an
image. A view that is not stored yet is encoded when it comes up, and stored; so the first pass over the views costs
what it always did. All learn from the stored type, also in that first pass.
Evaluation (`cache.evaluation`): encoder outputs and outputs of finished heads are kept as they are and taken up again
wherever input and weights are the same, to the last bit; so after step t only the newest head runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cssbench.base_facts import weights_digest
from cssbench.data.base import look_up
from cssbench.data.step_dataset import Key, StepDataset, make_loader
from cssbench.engine import add_up
from cssbench.errors import ConfigError, CssbenchError
from cssbench.evaluate import EvaluationDataset, model_inputs
from cssbench.experiment import Experiment
from cssbench.features import FeatureStore, encoder_digest, key_of, raw_bytes, read_tensors, store_folder
from cssbench.method import StepContext
from cssbench.models.segmenter import Encoded, Segmenter, SegOutput
from cssbench.progress import say
from cssbench.scenario import Step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def open_store(made: Experiment) -> FeatureStore:
    """The store of the present encoder. Raises ConfigError when its folder cannot be written."""
    config = made.config.cache
    settings = {"precision": made.config.train.precision, "device": made.fabric.device.type}
    store = FeatureStore(store_folder(config.folder), encoder_digest(made.model, settings), config.max_gib)
    store.told = not made.fabric.is_global_zero  # one process says it for all
    return store


@contextmanager
def training_batches(
    made: Experiment, ctx: StepContext, data: StepDataset, stream: Any
) -> Iterator[tuple[Iterable[dict[str, Any]], dict[str, Any]]]:
    """The micro-batches of `stream` for `trainer.fit`, after `start_step`; what the step's record says of the cache,
    complete once the context is left."""
    config, workers = made.config.cache, made.config.data.workers
    numbers: dict[str, Any] = {}
    reason = why_live(made, ctx, data) if config.features and ctx.step.index else ""
    if reason is None:
        with open_store(made) as store:
            dtype = DTYPES[config.dtype]
            loader = make_loader(StoredViews(data, store.folder, dtype), stream, workers, list)
            shown = len(stream) * stream.micro_batch * stream.world
            views = min(data.views * len(data), shown) if data.views else shown
            title = f"step {ctx.step.index}: features of {views} views of {len(data)} images"
            yield EncodedBatches(loader, ctx.model, store, made.fabric, dtype, views, title), numbers
            about = {"views": data.views, "dtype": config.dtype, "encoder": store.folder.name}
            numbers["cache"] = {**about, **add_up(made.fabric, store.counts())}
    else:
        if reason:
            say(f"step {ctx.step.index}: cache.features is of no use here: {reason}")
        yield make_loader(data, stream, workers), numbers


def why_live(made: Experiment, ctx: StepContext, data: StepDataset) -> str | None:
    """Why a step cannot learn from stored features, in words; None: it can."""
    if not ctx.model.encoder_frozen:
        return f"method {made.config.method.name!r} trains the encoder"
    if ctx.previous is not None and made.method.uses_previous and not same_encoder(ctx.model, ctx.previous):
        return "the previous model has another encoder"
    try:
        data.source.version(data.split, data.stems[0])
    except (OSError, CssbenchError):
        return f"dataset {data.source.name!r} has no file for each image; it may define `version` instead"
    return None


def same_encoder(model: Segmenter, previous: Segmenter) -> bool:
    return weights_digest(model, without="heads.") == weights_digest(previous, without="heads.")


class StoredViews(StepDataset):
    """The items of a `StepDataset`: with "features" where they are stored in `folder`, else with "images" and "key".

    An item whose features are stored costs its label map alone; the image is not decoded.
    """

    def __init__(self, data: StepDataset, folder: Path, dtype: torch.dtype):
        super().__init__(data.source, data.split, data.stems, data.table, data.transform, data.seed, data.views)
        self.folder, self.dtype = folder, dtype

    def __getitem__(self, key: Key) -> dict[str, Any]:
        stem, transform = self.stems[key[1]], self.transform
        label = look_up(self.table, self.source.label(self.split, stem))
        draw = transform.draw(label, self.generator(key))
        item: dict[str, Any] = {"labels": transform.truth(label, draw), "names": stem}
        about = self.source.version(self.split, stem)
        item["key"] = key_of(about, transform.config.crop, transform.mean, transform.std, draw, str(self.dtype))
        found = read_tensors(self.folder, item["key"])
        if found is None:
            return item | {"images": transform.picture(self.source.pair(self.split, stem)[0], draw)}
        return item | {"features": found}


@dataclass
class EncodedBatches:
    """Micro-batches {"images": Encoded, "labels", "names"} from lists of items as `StepDataset` makes them for a store.

    views, title: how many views there are in all, and what they are, for the estimate.
    """

    loader: Iterable[list[dict[str, Any]]]
    model: Segmenter
    store: FeatureStore
    fabric: Any
    dtype: torch.dtype
    views: int
    title: str = "features"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for items in self.loader:
            missing = [item for item in items if "images" in item]
            self.store.read_files += len(items) - len(missing)
            # On a CPU one by one: then what is stored does not depend on what was missing beside it.
            together = len(missing) if self.fabric.device.type == "cuda" else 1
            for start in range(0, len(missing), max(together, 1)):
                self._encode(missing[start : start + together])
            labels = torch.stack([item["labels"] for item in items])
            names = [item["names"] for item in items]
            yield {"images": self._stacked(items, labels), "labels": labels, "names": names}

    @torch.no_grad()
    def _encode(self, items: list[dict[str, Any]]) -> None:
        """Give each item its "features", in the stored type, on the CPU."""
        images = torch.stack([item["images"] for item in items]).to(self.fabric.device, non_blocking=True)
        with self.fabric.autocast():
            found = self.model.encode(images).tensors()
        for index, item in enumerate(items):
            item["features"] = {name: self._stored(tensor[index]) for name, tensor in found.items()}
            self.store.announce(self.title, self.views, item["features"])
            self.store.write(item["key"], item["features"])

    def _stored(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.cpu()
        made = tensor.to(self.dtype)
        if self.dtype == torch.float16 and not torch.isfinite(made).all():
            raise ConfigError(
                f"A feature of size {float(tensor.abs().max()):g} does not fit cache.dtype = 'fp16', which ends at "
                f"65504. Set cache.dtype = 'bf16'."
            )
        return made.cpu()

    def _stacked(self, items: list[dict[str, Any]], labels: Tensor) -> Encoded:
        tensors = {}
        for name in items[0]["features"]:
            tensor = torch.stack([item["features"][name] for item in items])
            tensor = tensor.to(self.fabric.device, non_blocking=True)
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        return Encoded.from_tensors((labels.shape[-2], labels.shape[-1]), tensors)


@contextmanager
def remembering(
    made: Experiment, step: Step, view: EvaluationDataset
) -> Iterator[tuple[Callable[[Tensor], SegOutput] | None, dict[str, Any]]]:
    """What stands for the model in the evaluation after `step` (None: the model itself), and what the step's record
    says of it, complete once the context is left."""
    numbers: dict[str, Any] = {}
    if not made.config.cache.evaluation or not len(view):
        yield None, numbers
        return
    with open_store(made) as store:
        before, made.evaluated_encoder = made.evaluated_encoder, store.folder.name
        if before not in (None, store.folder.name):
            say(f"step {step.index}: cache.evaluation is of no use here: the encoder is not that of the step before")
            yield None, numbers
            return
        last = made.scenario.steps[-1]
        inputs = sum(len(model_inputs(made.model, one, view.config)) for one in view[0][1])
        wanted = inputs * len(made.evaluation_stems(last))
        title = f"step {step.index}: features of {wanted} inputs of the evaluations"
        model = RememberingModel(made.model, store, step is not last, wanted, title)
        yield model, numbers
        numbers["evaluation_cache"] = add_up(made.fabric, {"encoded": model.encoded, **store.counts()})


class RememberingModel:
    """Stands for the model in an evaluation, one image a call: takes up what the store has for that very input, runs
    the rest, and keeps it where `keep` says that it will be wanted again.

    forwards, title: how many inputs are to come, and what they are, for the estimate.
    """

    def __init__(self, model: Segmenter, store: FeatureStore, keep: bool, forwards: int, title: str = "features"):
        self.model, self.store, self.keep, self.forwards, self.title = model, store, keep, forwards, title
        self.heads = [weights_digest(head) for head in model.heads]
        self.encoded = 0

    def __call__(self, images: Tensor) -> SegOutput:
        device = images.device
        key = input_key(images)
        found = self.store.read(key)
        if found is None:
            encoded = self.model.encode(images)
            self.encoded += 1
            if self.keep:
                self.store.announce(self.title, self.forwards, encoded.tensors())
            self._keep(key, encoded.tensors())
        else:
            encoded = Encoded.from_tensors((images.shape[-2], images.shape[-1]), _on(device, found))
        for step, digest in enumerate(self.heads):
            if (known := self.store.read(f"{key}-{digest[:32]}")) is not None:
                encoded.known[step] = _on(device, known)
        output = self.model(encoded)
        for step, digest in enumerate(self.heads):
            if step not in encoded.known and (made := self.model.remembered(output, step)):
                self._keep(f"{key}-{digest[:32]}", made)
        return output

    def _keep(self, key: str, tensors: dict[str, Tensor]) -> None:
        if self.keep:
            self.store.write(key, {name: tensor.detach().cpu() for name, tensor in tensors.items()})


def _on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def input_key(images: Tensor) -> str:
    """SHA-256 (hex) of an input: shape, type and every bit."""
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    digest.update(raw_bytes(images))
    return digest.hexdigest()
