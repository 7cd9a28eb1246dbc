"""Whole runs from stored images: the same weights and matrices as from the originals; what is read, and by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shared_runs import same_runs
from tiny_runs import LINEAR, build, make_recipe, start

from cssbench.config import DataConfig
from cssbench.data.step_dataset import BatchStream, StepDataset, make_loader
from cssbench.data.stored import StoredDataset
from cssbench.data.synthetic import Synthetic

pytestmark = pytest.mark.usefixtures("_cache_of_its_own")


@pytest.fixture
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSSBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return make_recipe(tmp_path, LINEAR)


def stored_files(folder: Path) -> set[Path]:
    return set((folder / "cache" / "images").rglob("*.pair"))


def count(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(split, stem) of every image that is decoded from now on."""
    read: list[tuple[str, str]] = []
    image = Synthetic.image
    monkeypatch.setattr(Synthetic, "image", lambda data, *item: read.append(item) or image(data, *item))
    return read


def test_a_run_from_stored_images_is_the_same_run(recipe, tmp_path, monkeypatch, capfd):
    plain = start(recipe, tmp_path / "plain")
    assert not stored_files(tmp_path)
    first = start(recipe, tmp_path / "first", "data.stored=1.0")
    assert "decoded images" in capfd.readouterr().err
    same_runs(plain, first)
    read = count(monkeypatch)
    second = start(recipe, tmp_path / "second", "data.stored=1.0")
    same_runs(plain, second)
    assert read == []  # training, evaluation and pictures for the report
    assert "decoded images" not in capfd.readouterr().err
    splits = {path.relative_to(tmp_path / "cache" / "images").parts[1] for path in stored_files(tmp_path)}
    assert splits == {"train", "val"}


def test_a_smaller_side_is_for_training_alone(recipe, tmp_path):
    """Stored or not it is the same training, another one than on full images; evaluation reads originals."""
    stored = start(recipe, tmp_path / "stored", "data.stored=1.0", "data.stored_side=16")
    splits = {path.relative_to(tmp_path / "cache" / "images").parts[1] for path in stored_files(tmp_path)}
    assert splits == {"train"}
    made = start(recipe, tmp_path / "made", "data.stored_side=16")
    same_runs(stored, made)
    plain = start(recipe, tmp_path / "plain")
    assert plain.records()[0].content["loss"] != made.records()[0].content["loss"]
    experiment = build(recipe, tmp_path / "x", "data.stored=1.0", "data.stored_side=16")
    assert isinstance(experiment.training_data, StoredDataset)
    assert experiment.evaluated_data is experiment.data


def test_workers_share_what_is_stored(recipe, tmp_path, monkeypatch):
    made = build(recipe, tmp_path / "run", "data.stored=1.0")
    made.store_images()
    stems = made.train_stems[0]
    table = made.scenario.train_table(made.scenario.steps[0])

    def batches(source: Any, workers: int) -> list[dict[str, Any]]:
        data = StepDataset(source, "train", stems, table, made.transform, 0)
        return list(make_loader(data, BatchStream(len(data), 0, 4, 2), workers))

    for one, other in zip(batches(made.data, 0), batches(made.training_data, 1), strict=True):
        assert one["names"] == other["names"]
        assert one["images"].equal(other["images"])
        assert one["labels"].equal(other["labels"])


def test_the_bound_must_be_positive():
    for wrong in ({"stored": 0}, {"stored": -1}, {"stored_side": 0}):
        with pytest.raises(ValueError, match="greater than 0"):
            DataConfig(**wrong)
