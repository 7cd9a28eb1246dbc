"""Background as class 0 of a dataset (PASCAL VOC), from label maps over training and evaluation to the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_trees import gray, voc_tree
from PIL import Image
from tiny_runs import LINEAR, start

from cssbench import protocol, scenario, scoring
from cssbench.data.voc import VOC
from cssbench.errors import ConfigError, RunError
from cssbench.reports import html
from cssbench.reports.samples import RIGHT, VOID, WRONG, verdicts
from cssbench.results import RunFolder

# Rows: truth (background, 1, 2, 3); columns: prediction. Truth 40, 10, 10, 10; predicted 34, 13, 12, 11.
MATRIX = np.array([[30, 5, 3, 2], [2, 8, 0, 0], [1, 0, 9, 0], [1, 0, 0, 9]])
GROUPS = [[1, 2], [3]]
NEVER = "background, which that protocol never predicts, is a class of voc"
IOU = {0: 30 / 44, 1: 8 / 15, 2: 9 / 13, 3: 9 / 12}


def test_background_pixels_count_under_every_protocol():
    """Included or excluded in the means, they always cost the classes predicted there."""
    plop, mib = protocol.get("plop"), protocol.get("mib")
    assert plop.ious(MATRIX, [1, 2, 3], background_class=True) == pytest.approx(IOU)
    assert mib.ious(MATRIX, [1, 2, 3], background_class=True) == pytest.approx({c: IOU[c] for c in (1, 2, 3)})
    included = plop.scores(MATRIX, GROUPS, 1, background_class=True)
    excluded = mib.scores(MATRIX, GROUPS, 1, background_class=True)
    assert included["base"] == pytest.approx((IOU[0] + IOU[1] + IOU[2]) / 3)
    assert included["all"] == pytest.approx(sum(IOU.values()) / 4)
    assert (excluded["base"], excluded["all"]) == pytest.approx(((IOU[1] + IOU[2]) / 2, (IOU[1] + IOU[2] + IOU[3]) / 3))
    # where 0 is void, mib leaves its row out: 8, 9 and 9 pixels predicted right of 8, 9 and 9
    assert mib.ious(MATRIX, [1, 2, 3]) == pytest.approx({1: 8 / 10, 2: 9 / 10, 3: 9 / 10})


def test_before_the_last_step_future_classes_are_background_or_ignored():
    plop, mib = protocol.get("plop"), protocol.get("mib")
    # class 3 unseen: truth of background becomes [31, 5, 3, 11]; predicted 34, 13, 12
    assert plop.ious(MATRIX, [1, 2], background_class=True) == pytest.approx({0: 31 / 53, 1: 8 / 15, 2: 9 / 13})
    # ... or leaves: background 40 pixels
    assert mib.ious(MATRIX, [1, 2], background_class=True) == pytest.approx({1: 8 / 15, 2: 9 / 13})


def test_protocols_without_background_predictions_do_not_apply():
    fit = {name for name, p in protocol.protocols().items() if p.can_score(True)}
    assert fit == {"plop@1", "mib@1", "ssul@1", "ssul-nonzero@1", "m2f-bg@1"}
    assert all(p.can_score(False) for p in protocol.protocols().values())


def test_the_training_table_of_voc():
    scene = scenario.load("voc-15-5")
    first, second = (scene.train_table(step) for step in scene.steps)
    stored = gray([0, 1, 15, 16, 20, 255])
    assert first[stored].tolist() == [[0, 1, 15, 0, 0, 255]]
    assert second[stored].tolist() == [[0, 0, 0, 16, 20, 255]]


def test_an_error_map_judges_background_where_it_is_a_class():
    truth, predicted, before = gray([0, 0, 255, 1]), gray([0, 1, 1, 1]), np.zeros((1, 4), bool)
    assert verdicts(truth, predicted, [0, 1], before).tolist() == [[RIGHT, WRONG, VOID, RIGHT]]
    assert verdicts(truth, predicted, [1], before).tolist() == [[VOID, VOID, VOID, RIGHT]]


def labels(number: int) -> np.ndarray:
    """32 x 32: background, and two squares of VOC classes with a border of 255."""
    found = np.zeros((32, 32), np.uint8)
    for place, class_id in ((2, 1 + number % 20), (16, 1 + (number + 15) % 20)):
        found[place : place + 14, place : place + 14] = 255
        found[place + 1 : place + 13, place + 1 : place + 13] = class_id
    return found


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    maps = {f"2007_{number:06d}": labels(number) for number in range(40)}
    names = list(maps)
    splits = {"train": names[:20], "val": names[20:]}
    there = voc_tree(root, {split: {name: maps[name] for name in stems} for split, stems in splits.items()})
    colours = VOC(root).palette
    for number, name in enumerate(names):
        table = np.full((256, 3), 40, np.uint8)
        table[1:21] = colours
        Image.fromarray(table[labels(number)]).save(there / "JPEGImages" / f"{name}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def run(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    recipe = {
        "scenario": {"name": "voc-15-5"},
        "method": {"name": "finetune"},
        "model": LINEAR,
        "data": {"root": str(voc)},
        "augment": {"crop": 32, "photometric": False, "scale": [1.0, 1.0], "short_side": 32},
        "optim": {"lr": 3e-3, "head_lr_scale": 1.0},
        "train": {"batch_size": 4, "iterations": [40, 3], "accelerator": "cpu"},
        "evaluate": {"crop": 32, "short_side": 32, "samples": 2, "flops_images": 0},
    }
    return start(recipe, tmp_path_factory.mktemp("runs") / "voc")


def test_a_run_counts_every_background_pixel(run: RunFolder, voc: Path):
    data = VOC(voc)
    last = run.records()[-1].matrices["full.all"]
    counted = sum(np.bincount(data.label("val", stem).ravel(), minlength=256) for stem in data.stems("val"))
    assert last.sum(axis=1).tolist() == counted[:21].tolist()  # borders are in no row
    first = run.records()[0].matrices["full.all"]
    assert first[0, 0] > 0.8 * first[0].sum()  # the first step learns background as a class
    assert run.scenario["background_class"] is True


def test_its_scores_hold_background_among_16_base_classes(run: RunFolder):
    plop = protocol.get("plop")
    record = run.records()[-1]
    found = scoring.step_ious(run, record, plop)
    assert set(found) == set(range(21))
    scores = scoring.step_scores(run, record, plop)
    assert scores["all"] == pytest.approx((16 * scores["base"] + 5 * scores["incremental"]) / 21)
    assert scoring.default_protocol([run]).id == "plop@1"
    with pytest.raises(RunError, match=r"mmseg150@1 cannot score .*background, which that protocol never predicts"):
        scoring.step_ious(run, record, protocol.get("mmseg150"))


def test_samples_show_background_where_it_is_predicted(run: RunFolder):
    shown = [np.asarray(Image.open(path)) for path in run.records()[0].samples().values()]
    assert shown
    assert all((picture == 0).any() for picture in shown)


@pytest.mark.usefixtures("_drawn_only")
def test_the_report_and_commands_say_so(run: RunFolder, tmp_path: Path, command: Callable):
    page = html.write([run], tmp_path / "out", ["mmseg150@1", "plop@1"])[0].read_text(encoding="utf-8")
    assert "background is a class" in page
    assert f"Not scored under mmseg150@1: voc ({NEVER})." in page
    assert "unlabelled pixels" not in page
    assert "void / background" not in page
    code, out, _ = command("compare", run.path)
    assert (code, out.startswith("plop@1")) == (0, True)
    _, out, _ = command("rescore", run.path)
    assert f"dkd@1 cannot score it: {NEVER}." in out
    assert "% plop@1" in command("status", run.path)[1]


def test_scenario_show_and_explain(voc: Path, tmp_path: Path, command: Callable):
    _, out, _ = command("scenario", "show", "voc-15-5", "--data", voc)
    assert "Label 0 of voc is background" in out
    assert "base classes are 16 with it under plop@1" in out
    assert json.loads(command("scenario", "show", "voc-15-5", "--json")[1])["background_class"] is True
    assert "background_class" not in json.loads(command("scenario", "show", "ade20k-100-50", "--json")[1])
    picture = tmp_path / "seen.png"
    code, *_ = command(
        "scenario", "explain", "voc-15-5", "--image", "2007_000001", "--step", 1, "--data", voc, "--out", picture
    )
    assert (code, picture.exists()) == (0, True)


def test_void_cannot_be_ignored_where_there_is_none(voc: Path, tmp_path: Path, run: RunFolder):
    torch.set_num_threads(1)
    with pytest.raises(ConfigError, match="label 0 of dataset 'voc' is background, a class of its own"):
        start(run.config.dump(), tmp_path / "again", "scenario.void='ignore'")
