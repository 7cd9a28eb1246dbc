"""Runs of `tiny_runs` on several processes: `start_all` runs this file under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_checks
import tomli_w
from tiny_runs import LINEAR, SEGVIT, VIT, build, make_recipe

from cssbench import recipes
from cssbench.reevaluate import evaluate_again
from cssbench.task_loop import run

DTOP = SEGVIT | {"name": "dtop", "p0": 0.9}
AGAIN = VIT | {"layers": [1, 2], "checkpointing": True}
CACHED = ["method.name='segvit-cl'", "augment.later_views=2", "cache.features=true", "cache.evaluation=true"]
# name -> model, what is changed in the recipe
JOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "finetune": (SEGVIT, ["evaluate.limit=1"]),
    "segvit-cl, cached": (SEGVIT, CACHED),
    "reminder": (LINEAR, ["method.name='reminder'"]),
    "fsdp": (SEGVIT, ["train.strategy='fsdp'"]),
    "holdout": (SEGVIT, ["method.name='segvit-cl'", "data.holdout=0.3", "evaluate.split='holdout'"]),
    "plop": (LINEAR, ["method.name='plop'"]),
    "mib": (LINEAR, ["method.name='mib'"]),
    "ilt": (LINEAR, ["method.name='ilt'"]),
    "dtop": (DTOP, []),
    "bf16": (SEGVIT, ["train.precision='bf16-mixed'"]),
    "bf16, fsdp": (SEGVIT, ["train.precision='bf16-mixed'", "train.strategy='fsdp'"]),
    "checkpointing": (SEGVIT | {"backbone": AGAIN}, []),
    "checkpointing, fsdp": (SEGVIT | {"backbone": AGAIN}, ["train.strategy='fsdp'"]),
    "fsdp, then frozen": (SEGVIT, [*CACHED, "train.strategy='fsdp'"]),
    "workers": (SEGVIT, ["data.workers=1"]),
    "compile": (SEGVIT, ["train.compile=true"]),
}


def recipe_of(folder: Path, name: str) -> tuple[Path, list[str]]:
    """The recipe of a job, written below `folder`, and its changes."""
    model, changes = JOBS[name]
    path = folder / f"{name}.toml"
    if not path.exists():
        path.write_text(tomli_w.dumps(make_recipe(folder, model)))
    return path, changes


def make(folder: Path, world: int, names: list[str]) -> None:
    """Each job's run in `folder`/<world>/<name>: an effective batch of 4, in passes of one image."""
    for name in names:
        path, changes = recipe_of(folder, name)
        changes = [
            *changes,
            f"train.accumulate={4 // world}",
            f"cache.folder='{folder / str(world) / f'cache of {name}'}'",
        ]
        made = build(recipes.read_recipe(str(path)), folder / str(world) / name, *changes)
        if made.fabric.is_global_zero:
            made.folder.create()
        made.fabric.barrier()
        run(made)


def again(folder: Path, world: int, names: list[str]) -> None:
    """The weights of one process's runs, evaluated by all."""
    for name in names:
        evaluate_again(folder / "1" / name, folder / str(world) / f"{name} again", [], None, ["test"])


def start_all(folder: Path, world: int, names: list[str], evaluated: list[str]) -> subprocess.CompletedProcess[str]:
    """`make` of `names`, `again` of `evaluated` and all of `process_checks`, on `world` processes."""
    for name in names:
        recipe_of(folder, name)
    arguments = [str(folder), str(world), json.dumps(names), json.dumps(evaluated)]
    return torchrun(world, __file__, *arguments)


def torchrun(world: int, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def what_went_wrong(done: subprocess.CompletedProcess[str]) -> str:
    """Without torchrun's own traceback."""
    return done.stderr.split("torch/distributed/run.py")[0][-6000:]


if __name__ == "__main__":
    root, number = Path(sys.argv[1]), int(sys.argv[2])
    process_checks.check_all()
    make(root, number, json.loads(sys.argv[3]))
    again(root, number, json.loads(sys.argv[4]))
