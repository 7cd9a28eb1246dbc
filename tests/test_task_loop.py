"""The task loop end to end on tiny scenes: run, kill, resume, and what the run folder holds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from cssbench import config, protocol, recipes
from cssbench.experiment import build_experiment, resolve
from cssbench.results import RunFolder, read_json
from cssbench.scenario import stems_digest
from cssbench.task_loop import run

SCENARIO = """
dataset = "synthetic"
classes = 6
base = 2
increment = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of a few seconds: 6 classes in 3 steps, 32 px, a ViT of two blocks."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tiny-2-2.toml").write_text(SCENARIO)
    backbone = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}
    return {
        "scenario": {"name": str(folder / "tiny-2-2.toml")},
        "method": {"name": "segvit-cl"},
        "model": {
            "name": "segvit",
            "backbone": backbone | {"layers": [1, 2]},
            "head": {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1},
        },
        "data": {"root": str(folder), "options": {"classes": 6, "size": 32, "train": 24, "val": 8}},
        "augment": {"crop": 32, "photometric": False, "scale": [0.8, 1.3]},
        "optim": {"lr": 2e-3, "head_lr_scale": 1.0, "warmup": 2, "clip": 5.0},
        "train": {"batch_size": 4, "iterations": [6, 4], "accelerator": "cpu"},
        "evaluate": {"crop": 32, "short_side": 32, "samples": 2},
    }


def start(recipe: dict[str, Any], out: Path, *changes: str) -> RunFolder:
    torch.set_num_threads(1)
    made = build_experiment(resolve(config.validate(recipes.override(recipe, list(changes)), "test")), out, ["test"])
    made.folder.create()
    run(made)
    return RunFolder.read(out)


def weights(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder.step_folder(step) / "model.safetensors")


def same_results(a: RunFolder, b: RunFolder) -> None:
    for one, other in zip(a.records(), b.records(), strict=True):
        assert one.matrices.keys() == other.matrices.keys()
        for key, matrix in one.matrices.items():
            np.testing.assert_array_equal(matrix, other.matrices[key])
        first, second = weights(a, one.index), weights(b, one.index)
        assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


@pytest.fixture(scope="module")
def finished(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return start(recipe, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_everything_a_report_needs(finished: RunFolder):
    assert finished.finished
    assert [r.index for r in finished.records()] == [0, 1, 2]
    assert {
        "command",
        "commit",
        "packages",
        "hardware",
        "seed",
        "data",
        "effective_batch",
    } <= finished.provenance.keys()
    for record in finished.records():
        finished.verify(record)
        assert record.content["images"] == finished.scenario["steps"][record.index]["images"]
        matrix = record.matrices["full.foreground"]
        assert matrix.dtype == np.int64
        assert matrix.shape == (7, 7)
        assert matrix.sum() == record.content["evaluated_images"] * 32 * 32  # every pixel is counted once
    assert len(finished.records()[0].samples()) == 2
    assert len(list((finished.path / "samples").glob("*.truth.png"))) == 2
    rows = (finished.path / "logs" / "train-00.csv").read_text().splitlines()
    assert rows[0] == "step,iteration,name,value"
    assert {line.split(",")[2] for line in rows[1:]} == {"class", "focal", "dice", "lr"}


def test_image_sets_are_recorded_as_digests(finished: RunFolder):
    made = build_experiment(finished.config, finished.path)
    for stems, step in zip(made.train_stems, finished.scenario["steps"], strict=True):
        assert step["sha256"] == stems_digest(stems)


def test_segvit_cl_forgets_only_by_competition(finished: RunFolder):
    """Old outputs alone after the last step give step t's own matrices, count by count (models.md 6.5)."""
    last = finished.records()[-1].matrices
    for record in finished.records()[:-1]:
        for key, matrix in record.matrices.items():
            np.testing.assert_array_equal(matrix, last[f"{key}.upto{record.index}"])
    old, new = weights(finished, 0), weights(finished, 2)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert new.keys() > old.keys()


def test_true_and_false_positives_of_old_classes_never_rise(finished: RunFolder):
    records = finished.records()
    for before, after in pairwise(records):
        seen = [c for group in finished.groups[: before.index + 1] for c in group]
        a, b = before.matrices["full.foreground"], after.matrices["full.foreground"]
        assert all(b[c, c] <= a[c, c] for c in seen)
        new = [c for c in seen if before.content["evaluated_images"] == after.content["evaluated_images"]]
        assert all(b[:, c].sum() - b[c, c] <= a[:, c].sum() - a[c, c] for c in new)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished: RunFolder, recipe, tmp_path: Path):
    same_results(finished, start(recipe, tmp_path / "again"))
    other = start(recipe, tmp_path / "other", "seed=1")
    assert not torch.equal(weights(other, 0)["backbone.vit.blocks.0.mlp.fc1.weight"],
                           weights(finished, 0)["backbone.vit.blocks.0.mlp.fc1.weight"])  # fmt: skip


def test_the_base_step_of_fine_tuning_is_that_of_segvit_cl(finished: RunFolder, recipe, tmp_path: Path):
    """Both train the model's own loss there: with one seed, the same weights and matrices."""
    other = start(recipe, tmp_path / "finetune", "method.name=finetune")
    one, two = weights(finished, 0), weights(other, 0)
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    for key, matrix in finished.records()[0].matrices.items():
        np.testing.assert_array_equal(matrix, other.records()[0].matrices[key])
    assert not torch.equal(weights(finished, 1)["heads.0.tokens.weight"], weights(other, 1)["heads.0.tokens.weight"])


@pytest.mark.parametrize("method", ["segvit-cl", "finetune"])
def test_resume_after_a_step_equals_an_uninterrupted_run(recipe, tmp_path: Path, method: str):
    whole = start(recipe, tmp_path / "whole", f"method.name={method}")
    shutil.copytree(whole.path, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "steps" / "01")
    shutil.rmtree(tmp_path / "cut" / "steps" / "02")
    cut = RunFolder.read(tmp_path / "cut")
    run(build_experiment(cut.config, cut.path))
    same_results(whole, cut)


def test_a_half_written_step_is_trained_again(finished: RunFolder, recipe, tmp_path: Path):
    shutil.copytree(finished.path, tmp_path / "cut")
    cut = RunFolder.read(tmp_path / "cut")
    (cut.step_folder(2) / "record.json").unlink()
    (cut.step_folder(2) / "model.safetensors").write_bytes(b"cut short")
    run(build_experiment(cut.config, cut.path))
    same_results(finished, cut)


def test_resume_skips_finished_steps(finished: RunFolder, tmp_path: Path):
    shutil.copytree(finished.path, tmp_path / "copy")
    times = [r.folder.joinpath("record.json").stat().st_mtime_ns for r in RunFolder.read(tmp_path / "copy").records()]
    copy = RunFolder.read(tmp_path / "copy")
    run(build_experiment(copy.config, copy.path))
    assert times == [r.folder.joinpath("record.json").stat().st_mtime_ns for r in copy.records()]


def test_a_damaged_last_step_is_laid_aside_and_trained_again(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(finished.path, tmp_path / "copy")
    copy = RunFolder.read(tmp_path / "copy")
    shutil.rmtree(copy.step_folder(2))
    path = copy.step_folder(1) / "model.safetensors"
    path_content = path.read_bytes()[:-4] + b"\0\0\0\1"
    path.write_bytes(path_content)
    run(build_experiment(copy.config, copy.path))
    same_results(finished, copy)
    assert (copy.path / "steps" / "01.damaged-1" / "model.safetensors").read_bytes() == path_content
    said = capsys.readouterr().err
    assert "does not match its checksum" in said
    assert "01.damaged-1" in said


def test_resume_on_other_data_is_refused(finished: RunFolder, tmp_path: Path):
    other = recipes.override(finished.config.dump(), ["data.options.train=25"])
    with pytest.raises(Exception, match="started on other data"):
        build_experiment(config.validate(other, "test"), finished.path)


def test_the_oracle_and_a_joint_run_have_one_step(recipe, tmp_path: Path):
    (tmp_path / "all.toml").write_text('dataset = "synthetic"\nclasses = 6\nbase = 6\n')
    joint = start(recipe, tmp_path / "joint", f"scenario.name={tmp_path / 'all.toml'}", "method.name=finetune")
    assert len(joint.records()) == 1
    scores = protocol.get("mmseg150").scores(joint.records()[0].matrices["full.foreground"], joint.groups, 0)
    assert scores["incremental"] is None
    assert scores["all"] == scores["base"]


@pytest.mark.parametrize("calibration", ["prior", "temperature"])
def test_calibration_is_fixed_when_its_step_ends(recipe, tmp_path: Path, calibration: str):
    done = start(recipe, tmp_path / "run", f"method.calibration={calibration}", "data.holdout=0.4")
    first, last = weights(done, 1), weights(done, 2)
    for name in ("heads.1.class_shift", "heads.1.class_scale"):
        assert torch.equal(first[name], last[name])
    moved = last["heads.1.class_shift"].abs().sum() > 0 if calibration == "prior" else last["heads.1.class_scale"] != 1
    assert moved


def test_sample_pictures_of_crops_show_the_crop(recipe, tmp_path: Path):
    run = start(recipe, tmp_path / "run", 'evaluate.geometries=["crop"]', "evaluate.crop=16", "train.iterations=1")
    pictures = [*(run.path / "samples").glob("*.png"), *(path for r in run.records() for path in r.samples().values())]
    assert len(pictures) == 2 * 2 + 3 * 2
    assert {np.array(Image.open(path)).shape[:2] for path in pictures} == {(16, 16)}  # reading closes a file


def test_evaluation_on_held_out_training_images(recipe, tmp_path: Path):
    done = start(recipe, tmp_path / "run", "data.holdout=0.4", "evaluate.split=holdout")
    data = done.provenance["data"]
    assert data["evaluated"] == "holdout"
    assert 0 < data["evaluated_images"] < 24
    assert done.scenario["steps"][0]["images"] + data["evaluated_images"] <= 24


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision_runs_on_the_cpu(recipe, tmp_path: Path, precision: str):
    done = start(recipe, tmp_path / "run", f"train.precision={precision}", "train.iterations=[2, 2]")
    assert done.finished


def test_kill_9_loses_at_most_the_step_in_work(finished: RunFolder, recipe, tmp_path: Path):
    """A run killed after its second step, then resumed, ends with the matrices and weights of an unbroken one."""
    import tomli_w

    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    out = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cssbench"]
    started = subprocess.Popen(
        [*command, "run", str(tmp_path / "recipe.toml"), "--out", str(out)], env=environment, stderr=subprocess.DEVNULL
    )
    while started.poll() is None and not (out / "steps" / "01" / "record.json").exists():
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not RunFolder.read(out).finished, "the run ended before it could be killed"
    subprocess.run([*command, "resume", str(out)], env=environment, check=True, stderr=subprocess.DEVNULL)
    done = RunFolder.read(out)
    assert done.finished
    same_results(finished, done)
    assert read_json(out / "provenance.json")["command"][1] == "run"
