"""Run folders for tests of reports, with numbers worked out by hand, and what a browser makes of a page."""

from __future__ import annotations

import html.parser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cssbench import protocol
from cssbench.config import validate
from cssbench.reports import scored
from cssbench.results import RunFolder

IDS = ["mmseg150@1", "plop@1"]
LABEL = "Generated data or small budget: not comparable with published numbers."
KEYS = ("full.foreground", "crop.all")
# Rows: truth (void, 1, 2, 3); columns: prediction. IoU under mmseg150@1 in the comments.
STEP0 = [[0, 0, 0, 0], [0, 10, 0, 0], [0, 0, 10, 0], [0, 5, 5, 0]]  # 1, 1; class 3 not yet learned
STEP1 = [[0, 0, 0, 0], [0, 5, 0, 5], [0, 0, 10, 0], [0, 0, 0, 10]]  # 0.5, 1, 10/15
UPTO0 = [[0, 0, 0, 0], [0, 8, 2, 0], [0, 0, 10, 0], [0, 5, 5, 0]]  # 8/10, 10/12
JOINT = [[0, 0, 0, 0], [0, 9, 0, 1], [0, 0, 10, 0], [0, 0, 0, 10]]  # 0.9, 1, 10/11


def make(path: Path, steps: list[dict[str, Any]], groups=((1, 2), (3,)), keys=KEYS, **changes: Any) -> RunFolder:
    """A run folder with one finished step per item of `steps`: {matrix suffix: rows}, suffix "" for the plain one."""
    given = {"seed": 0, "method": "finetune", "model": "tiny", "mode": "overlapped", "scenario": "toy-2-1", "note": ""}
    given |= {"classes": ["sky", "tree", "car"], "provenance": {"data": {"name": "toy"}}, "evaluate": {}}
    given |= {"numbers": {}} | changes
    content = {"seed": given["seed"], "note": given["note"], "evaluate": given["evaluate"], "train": {"iterations": 5}}
    parts = {kind: given[kind] for kind in ("method", "model", "scenario")}
    content |= {kind: part if isinstance(part, dict) else {"name": part} for kind, part in parts.items()}
    scene = {"name": given["scenario"], "dataset": "toy", "mode": given["mode"], "void": "background"}
    scene |= {"classes": given["classes"], "palette": [[200, 0, 0], [0, 200, 0], [0, 0, 200]]}
    scene |= {"steps": [{"new": list(g), "images": 7, "sha256": "0" * 64} for g in groups]}
    run = RunFolder(path, validate(content, "test"), scene, given["provenance"])
    run.create()
    for index, matrices in enumerate(steps):
        arrays = {f"{key}{end}": np.array(rows) for key in keys for end, rows in matrices.items()}
        numbers = {"images": 7, "iterations": 5, "seconds": {"train": 61.0}, "loss": {"ce": 0.5}}
        run.finish_step(index, arrays, numbers | given["numbers"])
    return RunFolder.read(path)


def learner(path: Path, **changes: Any) -> RunFolder:
    return make(path, [{"": STEP0}, {"": STEP1, ".upto0": UPTO0}], **changes)


def other_seed(path: Path, **changes: Any) -> RunFolder:
    """As `learner`, with seed 1 and other numbers after the last step: 0.6, 1, 10/14."""
    step1 = [[0, 0, 0, 0], [0, 6, 0, 4], [0, 0, 10, 0], [0, 0, 0, 10]]
    return make(path, [{"": STEP0}, {"": step1, ".upto0": UPTO0}], **{"seed": 1} | changes)


def forgetful(path: Path, **changes: Any) -> RunFolder:
    """As `learner`, after the last step: 0.1, 1, 10/19."""
    step1 = [[0, 0, 0, 0], [0, 1, 0, 9], [0, 0, 10, 0], [0, 0, 0, 10]]
    return make(path, [{"": STEP0}, {"": step1, ".upto0": UPTO0}], **{"method": "worse"} | changes)


def reordered(path: Path, **changes: Any) -> RunFolder:
    """As `learner`, but class 2 and 3 have changed places: 3 is learned first."""
    swap = [0, 1, 3, 2]
    steps = [{"": STEP0}, {"": STEP1, ".upto0": UPTO0}]
    swapped = [{end: np.array(rows)[swap][:, swap] for end, rows in step.items()} for step in steps]
    return make(path, swapped, **{"groups": ((1, 3), (2,))} | changes)


def joint(path: Path, **changes: Any) -> RunFolder:
    return make(path, [{"": JOINT}], groups=((1, 2, 3),), **{"scenario": "toy-joint"} | changes)


def add_depths(run: RunFolder, depths: np.ndarray, stem: str = "a") -> None:
    """For each step of a run with samples: how deep the token at each of 16 x 16 pixels went."""
    for record in run.records():
        (record.folder / "depths").mkdir()
        picture = Image.fromarray(depths.astype(np.uint8))
        picture.putpalette(bytes(768))
        picture.save(record.folder / "depths" / f"{stem}.png")


def add_samples(run: RunFolder, stem: str = "a") -> None:
    def save(path: Path, array: np.ndarray, mode: str) -> None:
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(array.astype(np.uint8))
        if mode == "P":
            picture.putpalette(bytes(768))
        picture.save(path)

    ids = np.array([[0, 1], [2, 3]]).repeat(8, 0).repeat(8, 1)
    save(run.path / "samples" / f"{stem}.image.png", ids[..., None] * [60, 40, 20], "RGB")
    save(run.path / "samples" / f"{stem}.truth.png", ids, "P")
    for record in run.records():
        save(record.folder / "samples" / f"{stem}.png", np.minimum(ids, 2), "P")


def score(*runs: RunFolder, name: str = "mmseg150@1") -> list[scored.Scored]:
    return scored.score(runs, protocol.get(name))


def row(frame: pd.DataFrame, **where: Any) -> dict[str, Any]:
    for key, value in where.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0].to_dict()


def grid(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line of dashes."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for n, line in enumerate(lines) if n != 1]


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text; what a browser would make of the page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())
