"""Runs of a second or two: six classes in two steps, 32 px, Shrunk with EQD on a ViT of two blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cssbench import config, recipes
from cssbench.api import Method
from cssbench.experiment import Experiment, build_experiment, resolve
from cssbench.results import RunFolder
from cssbench.task_loop import run

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}
HEAD = {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1}
EQD = {
    "name": "shrunk",
    "backbone": VIT | {"layers": [2]},
    "head": HEAD,
    "down_layer": 1,
    "upsample_layers": 1,
    "upsample_queries": "bicubic",
    "edges": {"threshold": 0.5},
}
LINEAR = {"name": "vit-linear", "backbone": VIT | {"layers": [1, 2]}}
SEGVIT = {"name": "segvit", "backbone": VIT | {"layers": [1, 2]}, "head": HEAD}


def make_recipe(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    """`folder` gets the scenario and the generated scenes."""
    (folder / "tiny-4-2.toml").write_text('dataset = "synthetic"\nclasses = 6\nbase = 4\nincrement = 2\n')
    return {
        "scenario": {"name": str(folder / "tiny-4-2.toml")},
        "method": {"name": "finetune"},
        "model": model,
        "data": {"root": str(folder), "options": {"classes": 6, "size": 32, "train": 16, "val": 6}},
        "augment": {"crop": 32, "photometric": False, "scale": [0.8, 1.3]},
        "optim": {"lr": 2e-3, "head_lr_scale": 1.0, "clip": 5.0},
        "train": {"batch_size": 4, "iterations": 2, "accelerator": "cpu"},
        "evaluate": {"crop": 32, "short_side": 32, "samples": 2, "flops_images": 3},
    }


def build(recipe: dict[str, Any], out: Path, *changes: str, method: Method | None = None) -> Experiment:
    torch.set_num_threads(1)
    settings = resolve(config.validate(recipes.override(recipe, list(changes)), "test"))
    return build_experiment(settings, out, ["test"], method)


def start(recipe: dict[str, Any], out: Path, *changes: str, method: Method | None = None) -> RunFolder:
    made = build(recipe, out, *changes, method=method)
    made.folder.create()
    run(made)
    return RunFolder.read(out)
