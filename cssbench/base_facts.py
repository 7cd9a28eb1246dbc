"""What determines a base step, as plain facts: the key under which `cssbench.shared` keeps it, and its evaluation."""

from __future__ import annotations

import hashlib
import inspect
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cssbench
from cssbench import provenance, registry
from cssbench.config import RunConfig
from cssbench.experiment import Experiment
from cssbench.method import Method
from cssbench.results import sha256
from cssbench.scenario import Scenario, stems_digest

PACKAGES = ("torch", "torchvision", "timm", "lightning", "numpy", "pillow")
NOT_TRAINING = {
    "cli",
    "suites",
    "baselines",
    "scenarios",
    "reports",
}  # folders that no base step depends on


def base_facts(made: Experiment) -> dict[str, Any]:
    """Everything that determines the trained base step, before it is trained. Settings are listed by exclusion, so
    that a new one counts until somebody says that it does not matter."""
    config, scene, device = made.config, made.scenario, made.fabric.device.type
    stems, method = made.train_stems[0], made.method
    return {
        "data": _origin("datasets", scene.dataset, made.data)
        | {"options": _by_content(config.data.options), "fingerprint": made.data.fingerprint("train")}
        | {"stored_side": config.data.stored_side},
        "images": {"trained": stems_digest(stems), "held_out": stems_digest(made.holdout_stems[0])},
        "model": _origin("models", config.model.name, made.model)
        | {"options": _by_content(config.model.options), "initial": weights_digest(made.model)},
        "method": None
        if is_plain(method)
        else _origin("methods", config.method.name, method)
        | {"options": _by_content(config.method.options), "scenario": [list(group) for group in scene.groups]},
        **settings_facts(config, scene, config.train.length(0, len(stems))),
        "machine": {
            "device": device,
            "processes": made.fabric.world_size,
            "threads": torch.get_num_threads() if device == "cpu" else None,
        },
        "packages": {name: provenance.package_version(name) for name in PACKAGES},
        "sources": sources(),
    }


def settings_facts(config: RunConfig, scene: Scenario, iterations: int) -> dict[str, Any]:
    """The part of `base_facts` that settings alone determine; known before there is a model, as in `cssbench suite`."""
    train = config.train.model_dump(
        mode="json", exclude={"iterations", "epochs", "accelerator", "devices", "log_every", "initial"}
    )  # `initial` counts by the weights that it gave
    optim = {name: v for name, v in config.optim.model_dump(mode="json").items() if not name.startswith("later_")}
    return {
        "labels": {
            "classes": list(scene.steps[0].new),
            "void": scene.void,
            "table": hashlib.sha256(scene.train_table(scene.steps[0]).tobytes()).hexdigest(),
        },
        "augment": config.augment.model_dump(mode="json", exclude={"later_views"}),
        "optim": optim,
        "train": train | {"iterations": iterations},
        "seed": config.seed,
    }


def is_plain(method: Method) -> bool:
    """Whether the method's class itself promises a plain base step: a subclass may train otherwise."""
    return bool(vars(type(method)).get("plain_base", False))


def _origin(group: str, name: str, part: Any) -> dict[str, Any]:
    """Name, distribution and version of a part, and the SHA-256 of the file that defines it."""
    known = registry.distribution_of(group, name)
    try:
        source = inspect.getsourcefile(type(part))
    except TypeError:  # a class without a file
        source = None
    return {
        "name": name,
        "distribution": known,
        "version": known and provenance.package_version(known),
        "source": sha256(Path(source)) if source else None,
    }


def _by_content(value: Any) -> Any:
    """`value` with the path of each existing file replaced by the file's SHA-256: where it lies does not matter."""
    if isinstance(value, dict):
        return {key: _by_content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(item) for item in value]
    return {"sha256": sha256(Path(value))} if isinstance(value, str) and os.path.isfile(value) else value


@cache
def sources() -> str:
    """SHA-256 (hex) of the package's own source files, so that changed code never takes up old weights."""
    root, digest = Path(cssbench.__file__).parent, hashlib.sha256()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if name.split("/")[0] not in NOT_TRAINING:
            digest.update(f"{name} {sha256(root / name)}\n".encode())
    return digest.hexdigest()


def weights_digest(model: nn.Module, without: str | None = None) -> str:
    """SHA-256 (hex) of all parameters and buffers but those whose name starts with `without`: names, types, shapes,
    bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if without and name.startswith(without):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def evaluation_facts(made: Experiment) -> dict[str, Any]:
    """Everything beside the base step's key that determines its matrices and sample predictions."""
    config, steps = made.config.evaluate, made.scenario.steps
    return {
        "weights": weights_digest(made.model),
        "split": config.split,
        "data": made.data.fingerprint("train" if config.split == "holdout" else config.split),
        "images": stems_digest(made.evaluation_stems(steps[0])),
        "samples": made.sample_stems,
        "settings": config.model_dump(mode="json", exclude={"split", "samples", "limit", "chunk"}),
        "last": len(steps) == 1,
    }
