"""Made-up run folders, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cssbench.config import validate
from cssbench.results import RunFolder

# Made-up matrices of three classes learned in two steps. Rows: truth (void, 1, 2, 3); columns: prediction.
MATRICES = {
    "0": {
        "all": [[3, 1, 0, 0], [2, 8, 0, 0], [0, 0, 10, 0], [5, 3, 2, 0]],
        "foreground": [[0, 3, 1, 0], [0, 9, 1, 0], [0, 0, 10, 0], [0, 6, 4, 0]],
    },
    "1": {
        "all": [[2, 1, 0, 1], [0, 5, 0, 5], [0, 0, 10, 0], [1, 0, 0, 9]],
        "foreground": [[0, 2, 1, 1], [0, 5, 0, 5], [0, 0, 10, 0], [0, 0, 0, 10]],
        "all.upto0": [[3, 1, 0, 0], [4, 6, 0, 0], [0, 0, 10, 0], [5, 3, 2, 0]],
        "foreground.upto0": [[0, 3, 1, 0], [0, 6, 4, 0], [0, 0, 10, 0], [0, 6, 4, 0]],
    },
    "joint": {
        "all": [[2, 1, 0, 1], [0, 9, 0, 1], [0, 0, 10, 0], [0, 0, 0, 10]],
        "foreground": [[0, 2, 1, 1], [0, 9, 0, 1], [0, 0, 10, 0], [0, 0, 0, 10]],
    },
}


def fabricate(path: Path, **changes: Any) -> RunFolder:
    """A run folder as `cssbench run` leaves it, with `MATRICES` in both geometries. changes: the settings below;
    `steps`: names of `MATRICES`, one per finished step; `matrices`: more or other matrices of the last step;
    `numbers`: more of every record."""
    given: dict[str, Any] = {"seed": 0, "method": "finetune", "model": {"name": "tiny", "backbone": {"width": 16}}}
    given |= {"mode": "overlapped", "void": "background", "groups": [[1, 2], [3]], "steps": ["0", "1"], "evaluate": {}}
    given |= {"identity": {"train": "a" * 64, "val": "b" * 64}, "evaluated_sha256": "c" * 64, "images": ["d" * 64] * 9}
    given |= {"geometries": ["full", "crop"], "matrices": {}, "numbers": {}, "debug_limited": False}
    assert changes.keys() <= given.keys(), changes
    given |= changes
    content = {"seed": given["seed"], "scenario": {"name": "toy"}, "method": {"name": given["method"]}}
    content |= {"model": given["model"], "train": {"iterations": 5}, "evaluate": given["evaluate"]}
    steps = [{"new": g, "images": 7, "sha256": sha} for g, sha in zip(given["groups"], given["images"], strict=False)]
    scene = {"name": "toy", "dataset": "toy", "mode": given["mode"], "void": given["void"], "steps": steps}
    scene |= {"classes": ["sky", "tree", "car"], "palette": [[200, 0, 0], [0, 200, 0], [0, 0, 200]]}
    data = {"name": "toy", "identity": given["identity"], "evaluated_images": 2}
    provenance = {
        "debug_limited": given["debug_limited"],
        "data": data | {"evaluated_sha256": given["evaluated_sha256"]},
    }
    run = RunFolder(path, validate(content, "test"), scene, provenance)
    run.create()
    for index, name in enumerate(given["steps"]):
        rows = {f"{g}.{key}": value for g in given["geometries"] for key, value in MATRICES[name].items()}
        rows |= given["matrices"] if index == len(given["steps"]) - 1 else {}
        arrays = {key: value if isinstance(value, np.ndarray) else np.array(value) for key, value in rows.items()}
        (run.step_folder(index)).mkdir(parents=True)
        (run.step_folder(index) / "model.safetensors").write_bytes(bytes(64))
        numbers = {"images": 7, "iterations": 5, "evaluated_images": 2, "seconds": {"train": 61.0}, "loss": {"ce": 0.5}}
        run.finish_step(index, arrays, numbers | given["numbers"])
    return RunFolder.read(path)


def fabricate_oracle(path: Path, **changes: Any) -> RunFolder:
    """The same classes in one step."""
    return fabricate(path, **{"groups": [[1, 2, 3]], "steps": ["joint"]} | changes)


def fabricate_imported(path: Path, ious: list[dict[str, float | None]], protocol: str = "plop@1") -> RunFolder:
    """A run as imported from a log: no matrices, one {class id: IoU} per step."""
    run = fabricate(path, steps=[])
    run.provenance["imported"] = {"format": "plop-csv"}
    (path / "config.toml").unlink()
    run.create()
    for index, step in enumerate(ious):
        run.write_record(index, {"imported": {"protocol": protocol, "ious": step}})
    return RunFolder.read(path)
