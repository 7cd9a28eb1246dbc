"""What keeps a run out of every table: each kind of damage is named, and a whole run passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated import MATRICES, fabricate, fabricate_imported, fabricate_oracle

from cssbench.errors import RunError
from cssbench.results import RunFolder, content_digest
from cssbench.validate import problems, require_valid


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_text(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def reseal(path: Path) -> None:
    """Make a record match its own digest again, as somebody would who hides an edit of another file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"digest": content_digest(content)}))


def found(path: Path) -> str:
    return "; ".join(problems(RunFolder.read(path)))


def test_whole_runs_pass(tmp_path):
    assert problems(fabricate(tmp_path / "a")) == []
    assert problems(fabricate_oracle(tmp_path / "joint")) == []
    assert problems(fabricate_imported(tmp_path / "log", [{"0": 0.5, "1": 0.5, "2": None}, {"0": 0.5, "3": 0.1}])) == []


def test_weights_may_be_left_out_but_not_changed(tmp_path):
    run = fabricate(tmp_path / "a")
    weights = run.step_folder(0) / "model.safetensors"
    weights.write_bytes(bytes(63))
    assert problems(run) == ["step 0: model.safetensors was edited or truncated: it does not match its checksum"]
    assert problems(run, weights=False) == []
    weights.unlink()
    assert problems(run) == []


Damage = Callable[[Path], object]
STEP = "steps/01"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a number in the record": (
        lambda p: edit_json(p / STEP / "record.json", iterations=9999),
        "step 1: record.json was edited: it does not match its own digest",
    ),
    "no digest": (
        lambda p: edit_text(p / STEP / "record.json", '"digest"', '"digset"'),
        "step 1: record.json has no digest",
    ),
    "a checksum too": (
        lambda p: edit_json(p / STEP / "record.json", sha256={}),
        "step 1: record.json was edited",
    ),
    "truncated matrices": (
        lambda p: (p / STEP / "matrices.npz").write_bytes((p / STEP / "matrices.npz").read_bytes()[:-40]),
        "step 1: matrices.npz was edited or truncated",
    ),
    "no matrices": (lambda p: (p / STEP / "matrices.npz").unlink(), "step 1: matrices.npz is missing"),
    "the matrices of another step": (
        lambda p: shutil.copy(p / "steps/00/matrices.npz", p / STEP / "matrices.npz"),
        "step 1: matrices.npz was edited or truncated",
    ),
    "a step cut off": (
        lambda p: shutil.rmtree(p / STEP),
        "unfinished or truncated: 1 of 2 steps have a record",
    ),
    "the first step cut off": (lambda p: shutil.rmtree(p / "steps/00"), "unfinished or truncated: 0 of 2 steps"),
    "the recipe": (
        lambda p: edit_text(p / "config.toml", "seed = 0", "seed = 7"),
        "steps 0, 1: config.toml was edited: it does not match the checksum in record.json",
    ),
    "the provenance": (lambda p: edit_json(p / "provenance.json", commit="f" * 40), "provenance.json was edited"),
    "the scenario": (lambda p: edit_json(p / "scenario.json", mode="disjoint"), "scenario.json was edited"),
    "a path for a file name": (
        lambda p: (edit_json(p / STEP / "record.json", sha256={"../../x": "0"}), reseal(p / STEP / "record.json")),
        "step 1: record.json was edited: '../../x' cannot be used as a file name",
    ),
    "no checksums of the run": (
        lambda p: edit_json(p / STEP / "record.json", run_sha256=[1]),
        "step 1: record.json was edited: it does not match its own digest",
    ),
    "half a record": (
        lambda p: (p / STEP / "record.json").write_text((p / STEP / "record.json").read_text()[:40]),
        "record.json is damaged",
    ),
    "a record of another schema": (
        lambda p: (edit_json(p / STEP / "record.json", schema=2), reseal(p / STEP / "record.json")),
        "step 1: record.json is of schema 2 and step 1, not of schema 1 and step 1",
    ),
    "a record of another step": (
        lambda p: shutil.copy(p / "steps/00/record.json", p / STEP / "record.json"),
        "step 1: record.json is of schema 1 and step 0",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path, name: str):
    damage, sentence = DAMAGES[name]
    damage(fabricate(tmp_path / "a").path)
    assert sentence in found(tmp_path / "a")
    with pytest.raises(RunError, match=r"must not stand in a table"):
        require_valid([RunFolder.read(tmp_path / "a")])


def test_a_step_of_another_run_does_not_fit(tmp_path):
    fabricate(tmp_path / "a")
    fabricate(tmp_path / "b", seed=1)
    shutil.rmtree(tmp_path / "a" / STEP)
    shutil.copytree(tmp_path / "b" / STEP, tmp_path / "a" / STEP)
    assert "step 1: config.toml was edited" in found(tmp_path / "a")


def test_debug_limited_runs(tmp_path):
    run = fabricate(tmp_path / "a", evaluate={"limit": 3}, debug_limited=True)
    assert problems(run) == ["debug-limited: evaluated on the first 3 images only"]
    assert problems(fabricate(tmp_path / "b", debug_limited=True))[0].startswith("debug-limited: evaluated on a part")
    assert problems(fabricate(tmp_path / "c", evaluate={"limit": 3}))[0].startswith("debug-limited")


def counts(key: str, *changes: tuple[int, int, int], step: str = "1") -> np.ndarray:
    matrix = np.array(MATRICES[step][key])
    for row, column, value in changes:
        matrix[row, column] = value
    return matrix


ALL = MATRICES["1"]["all"]
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"full.all": counts("all", (1, 1, -5))}, "step 1: matrix full.all has negative counts"),
    "not int64": ({"full.all": np.array(ALL, np.int32)}, "is int32 (4, 4), not int64 (4, 4)"),
    "real": ({"full.all": np.array(ALL) / 2}, "is float64 (4, 4), not int64 (4, 4)"),
    "too small": ({"full.all": np.array(ALL)[:3, :3]}, "is int64 (3, 3), not int64 (4, 4)"),
    "empty": ({"full.all": np.zeros((4, 4), np.int64)}, "step 1: matrix full.all is empty"),
    "another total": (
        {"full.foreground": counts("foreground", (1, 1, 6))},
        "step 1: matrix full.foreground counts other truth pixels than another of its images",
    ),
    "other images alone": (
        {"crop.all.upto0": counts("all.upto0", (1, 1, 7))},
        "step 1: matrix crop.all.upto0 counts other truth pixels",
    ),
    "a class not yet learned": (
        {"full.all.upto0": counts("all.upto0", (1, 1, 5), (1, 3, 1))},
        "step 1: matrix full.all.upto0 predicts class 3, which the model had not learned",
    ),
    "background without that rule": (
        {"full.foreground": counts("foreground", (1, 1, 4), (1, 0, 1))},
        "step 1: matrix full.foreground predicts background",
    ),
    "more pixels than crops hold": (
        {key: counts(key.removeprefix("crop."), (1, 1, 2 * 512**2)) for key in ("crop.all", "crop.foreground")},
        "pixels, more than 2 crops hold",
    ),
    "fewer pixels than the step before": (
        {key: counts(key.removeprefix("full."), (1, 1, 0)) for key in ("full.all", "full.foreground")},
        "step 1: geometry full has fewer truth pixels of a class than step 0",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_counts_are_named(tmp_path, name: str):
    matrices, sentence = IMPOSSIBLE[name]
    assert sentence in "; ".join(problems(fabricate(tmp_path / "a", matrices=matrices)))


def test_the_counts_of_an_unfinished_run_are_checked_too(tmp_path):
    negative = {"full.all": counts("all", (1, 1, -8), step="0")}
    unfinished, impossible, *_ = problems(fabricate(tmp_path / "a", steps=["0"], matrices=negative))
    assert unfinished.startswith("unfinished")
    assert impossible == "step 0: matrix full.all has negative counts"


def test_later_steps_may_evaluate_more_images(tmp_path):
    more = {key: counts(key[5:], (1, 1, 8)) for key in ("full.all", "full.foreground", "crop.all", "crop.foreground")}
    assert problems(fabricate(tmp_path / "a", matrices=more)) == []


def test_a_class_taught_twice(tmp_path):
    assert "gives a class to two steps" in "; ".join(problems(fabricate(tmp_path / "a", groups=[[1, 2, 3], [3]])))


def test_a_damaged_import(tmp_path):
    run = fabricate_imported(tmp_path / "log", [{"1": 0.5}, {"1": 7}])
    assert "step 1: " in problems(run)[0]
    assert "must hold a protocol id" in problems(run)[0]


# cssbench validate ----------------------------------------------------------------------------------------------------


def test_validate_names_every_rejected_folder(tmp_path, command):
    whole, edited = fabricate(tmp_path / "a").path, fabricate(tmp_path / "b").path
    code, out, err = command("validate", whole)
    assert (code, out.strip(), err) == (0, f"{whole}: OK", "")
    edit_json(edited / STEP / "record.json", iterations=9999)
    code, out, err = command("validate", whole, edited, tmp_path / "none")
    assert (code, out.strip()) == (2, f"{whole}: OK")
    assert f"{edited}: step 1: record.json was edited" in err
    assert "none is not a run folder" in err
    assert "2 of 3 run folders must not stand in a table" in err


def test_validate_rejects_another_schema(tmp_path, command):
    path = fabricate(tmp_path / "a").path
    edit_json(path / "provenance.json", schema=99)
    code, _, err = command("validate", path)
    assert (code, "has schema 99; this cssbench reads schema 1" in err) == (2, True)
