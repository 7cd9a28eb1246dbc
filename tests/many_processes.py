"""Runs of `tiny_runs` on several processes: `start_all` runs this file under torchrun, which makes each of `JOBS`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_runs import LINEAR, SEGVIT, build, make_recipe

from cssbench.task_loop import run

STILL = {"drop_path": 0.0}  # what is drawn in a forward pass differs from process to process


def still(model: dict[str, Any]) -> dict[str, Any]:
    return model | {"backbone": model["backbone"] | STILL}


def changes(world: int) -> list[str]:
    """The effective batch of 4, in passes of one image."""
    return [f"train.accumulate={4 // world}"]


JOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "finetune": (still(SEGVIT), []),
    "segvit-cl": (still(SEGVIT), ["method.name='segvit-cl'"]),
    "plop": (still(LINEAR), ["method.name='plop'"]),
    "reminder": (still(LINEAR), ["method.name='reminder'"]),
    "mib": (still(LINEAR), ["method.name='mib'"]),
    "bf16": (still(SEGVIT), ["train.precision='bf16-mixed'"]),
    "fsdp": (still(SEGVIT), ["train.strategy='fsdp'"]),
}


def make(folder: Path, world: int, names: list[str]) -> None:
    """Each job's run in `folder`/<world>/<name>."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name in names:
        model, chosen = JOBS[name]
        made = build(make_recipe(data, model), folder / str(world) / name, *changes(world), *chosen)
        if made.fabric.is_global_zero:
            made.folder.create()
        made.fabric.barrier()
        run(made)


def start_all(folder: Path, world: int, names: list[str]) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return torchrun([*words, __file__, str(folder), str(world), json.dumps(names)])


def torchrun(words: list[str], timeout: int = 240, **env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
