"""Runs that may share their base step, and what makes two runs the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from cssbench import checkpoint, config, recipes, task_loop
from cssbench.api import Batch, Method, StepContext
from cssbench.experiment import Experiment, build_experiment, resolve
from cssbench.results import RunFolder

BACKBONE = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "segvit": {
        "backbone": BACKBONE | {"layers": [1, 2]},
        "head": {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1},
    },
    "deeplabv3": {"backbone": {"name": "resnet10t"}, "width": 16, "dilations": [1, 2]},
}


def make_recipe(folder: Path) -> dict[str, Any]:
    """Six classes in two steps, a third of the images held out; "tiny-3-1.toml" and "all.toml" lie in `folder`."""
    for name, parts in {
        "tiny-3-3": "base = 3\nincrement = 3",
        "tiny-3-1": "base = 3\nincrement = 1",
        "all": "base = 6",
    }.items():
        (folder / f"{name}.toml").write_text(f'dataset = "synthetic"\nclasses = 6\n{parts}\n')
    return {
        "scenario": {"name": str(folder / "tiny-3-3.toml")},
        "method": {"name": "finetune"},
        "model": {"name": "segvit"} | MODELS["segvit"],
        "data": {"root": str(folder), "options": {"classes": 6, "size": 32, "train": 24, "val": 4}, "holdout": 0.3},
        "augment": {"crop": 32, "photometric": False, "scale": [0.8, 1.3]},
        "optim": {"lr": 2e-3, "head_lr_scale": 1.0, "clip": 5.0},
        "train": {"batch_size": 4, "iterations": [4, 3], "accelerator": "cpu"},
        "evaluate": {"crop": 32, "short_side": 32, "samples": 2, "geometries": ["full"]},
    }  # fmt: skip


def build(recipe: dict[str, Any], out: Path, *changes: str) -> Experiment:
    return build_experiment(resolve(config.validate(recipes.override(recipe, list(changes)), "test")), out, ["test"])


def go(made: Experiment, store: Path | None) -> RunFolder:
    made.folder.create()
    task_loop.run(made, store)
    return RunFolder.read(made.folder.path)


def start(recipe: dict[str, Any], out: Path, store: Path | None, *changes: str) -> RunFolder:
    return go(build(recipe, out, *changes), store)


def same_runs(one: RunFolder, other: RunFolder) -> None:
    """Weights, method states, matrices, samples and losses of all steps, bit for bit."""
    for a, b in zip(one.records(), other.records(), strict=True):
        first, second = (safetensors.torch.load_file(r.folder / "model.safetensors") for r in (a, b))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        states = [checkpoint.load_state(r.folder / "method.safetensors") for r in (a, b)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(torch.as_tensor(states[0][k]), torch.as_tensor(states[1][k])) for k in states[0])
        assert a.matrices.keys() == b.matrices.keys()
        assert all(np.array_equal(matrix, b.matrices[key]) for key, matrix in a.matrices.items())
        assert [p.read_bytes() for p in a.samples().values()] == [p.read_bytes() for p in b.samples().values()]
        assert [p.read_bytes() for p in a.depth_maps().values()] == [p.read_bytes() for p in b.depth_maps().values()]
        assert (a.tokens, a.gflops) == (b.tokens, b.gflops)
        assert a.samples().keys() == b.samples().keys() != set()
        for name in ("loss", "images", "iterations", "evaluated_images", "parameters"):
            assert a.content[name] == b.content[name]


def entries(store: Path) -> list[Path]:
    return sorted(path.parent for path in store.glob("*/*/numbers.json"))


class Counting(Method):
    """Counts passes while it trains, and weights them at the end of a step."""

    passes = 0
    total = 0

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, torch.Tensor]:
        self.passes += 1
        return ctx.model.loss(batch.output, batch.labels)

    def end_step(self, ctx: StepContext) -> None:
        self.total += 10 * self.passes
        ctx.model.heads[-1].tokens.weight.data += self.passes

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes, self.total = state["passes"], state["total"]
