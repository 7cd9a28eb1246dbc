"""Continuum's own, unmodified class as the outside check of our image selection and labels; and the way back."""

from __future__ import annotations

import pickle
import runpy
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("continuum")
pytest.importorskip("six")

from cssbench import scenario as scenarios
from cssbench.data.base import SegDataset
from cssbench.data.folder import Folder
from cssbench.data.synthetic import Synthetic
from cssbench.errors import ScenarioError
from cssbench.interop.continuum import (
    InMemoryDataset,
    SegmentationClassIncremental,
    TaskType,
    from_continuum,
    to_continuum,
)
from cssbench.scenario import Scenario

ORDER = [4, 1, 6, 2, 5, 3]
SPLITS: list[tuple[int, list[int]]] = [(4, [2]), (2, [1, 3]), (6, [])]
MODES = {"overlapped": "overlap", "disjoint": "disjoint", "sequential": "sequential"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """Small scenes, half of them of one or two classes and void, so that every mode has images in every step."""
    made = Synthetic(tmp_path_factory.mktemp("continuum"), classes=6, size=16, train=40, val=12)
    pairs = list(combinations_with_replacement(range(1, 7), 2))
    for number, (stem, (first, second)) in enumerate(zip(made.stems("train"), pairs, strict=False)):
        label = np.full((16, 16), first, np.uint8)
        label[:4, :4], label[8:, 8:] = 0, second
        if number % 4 == 0:
            label[0, :] = 255
        Image.fromarray(label).save(made.label_path("train", stem))
    return made


def scene_of(base: int, increment: list[int], mode: str, order: Any = None, **more: Any) -> Scenario:
    content = {"dataset": "synthetic", "classes": 6, "base": base, "increment": increment, "mode": mode, "order": order}
    return scenarios.from_dict("tiny", content | more)


class Serial:
    """In the place of a pool of processes."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def imap(self, function: Any, values: Any) -> Any:
        return map(function, values)


def original(
    scene: Scenario, data: SegDataset, split: str, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> SegmentationClassIncremental:
    """Continuum's own class on the same files."""
    monkeypatch.setattr("multiprocessing.Pool", Serial)
    images = np.array([str(data.image_path(split, stem)) for stem in data.stems(split)])
    labels = np.array([str(data.label_path(split, stem)) for stem in data.stems(split)])
    base, *later = (len(group) for group in scene.groups)
    return SegmentationClassIncremental(
        InMemoryDataset(images, labels, data_type=TaskType.SEGMENTATION, train=split == "train"),
        nb_classes=scene.num_classes,
        increment=[base, *later],
        class_order=list(scene.order),
        mode=MODES[scene.mode],
        **more,
    )


@pytest.mark.parametrize("order", [None, ORDER], ids=["native", "shuffled"])
@pytest.mark.parametrize(("base", "increment"), SPLITS)
@pytest.mark.parametrize("mode", MODES)
def test_images_and_labels_are_those_of_continuum(
    mode: str, base: int, increment: list[int], order: Any, scenes: Synthetic, monkeypatch: pytest.MonkeyPatch
):
    scene = scene_of(base, increment, mode, order)
    for split in ("train", "val"):
        ours, theirs = to_continuum(scene, scenes, split), original(scene, scenes, split, monkeypatch)
        assert len(ours) == len(theirs) == len(scene.steps)
        assert np.array_equal(ours.dataset[2], theirs.dataset[2])
        assert ours.class_order == theirs.class_order
        for mine, its in zip(ours, theirs, strict=True):
            assert list(mine._x) == list(its._x)
            for index in range(len(its)):
                (image, label, task), (its_image, its_label, its_task) = mine[index], its[index]
                assert label.dtype == its_label.dtype
                assert (image == its_image).all()
                assert (label == its_label).all(), (split, index)
                assert task == its_task
                assert isinstance(task, np.integer)
            values = np.array([[0, 255, *range(1, 1 + scene.num_classes)]])
            assert np.array_equal(ours.get_original_targets(values), theirs.get_original_targets(values))


@pytest.mark.parametrize("mode", MODES)
def test_every_step_of_the_check_has_images(mode: str, scenes: Synthetic):
    for base, increment in SPLITS:
        for order in (None, ORDER):
            assert all(to_continuum(scene_of(base, increment, mode, order), scenes).dataset[2].any(axis=0))


def test_what_a_run_trains_on_is_what_the_task_sets_hold(scenes: Synthetic):
    from cssbench.data.presence import build

    scene = scene_of(2, [1, 3], "overlapped", ORDER)
    index = build(scenes, "train", progress=False)
    for taskset, indices in zip(to_continuum(scene, scenes), scene.images(index.table), strict=True):
        assert [Path(x).stem for x in taskset._x] == [index.stems[i] for i in indices]


def test_images_of_each_step_once_and_void_ignored(scenes: Synthetic):
    made = to_continuum(scene_of(2, [1, 3], "partitioned", void="ignore"), scenes)
    assert (made.dataset[2].sum(axis=1) <= 1).all()
    seen = [int(v) for taskset in made for i in range(len(taskset)) for v in np.unique(taskset[i][1])]
    assert {*seen} == {0, 1, 2, 3, 4, 5, 6, 255}
    stem = Path(made[0]._x[0]).stem
    truth = scenes.label("train", stem)
    assert ((made[0][0][1] == 255).numpy() == ((truth == 0) | (truth == 255))).all()


def test_classes_to_come_are_ignored_in_tests_on_request(scenes: Synthetic, monkeypatch: pytest.MonkeyPatch):
    scene = scene_of(2, [1, 3], "overlapped", ORDER)
    ours = to_continuum(scene, scenes, "val", test_background=False)
    theirs = original(scene, scenes, "val", monkeypatch, test_background=False)
    for mine, its in zip(ours, theirs, strict=True):
        assert all((mine[i][1] == its[i][1]).all() for i in range(len(its)))


def test_slices_take_several_tasks(scenes: Synthetic):
    made = to_continuum(scene_of(2, [1, 3], "overlapped"), scenes)
    both = made[:2]
    assert set(both._x) == set(made[0]._x) | set(made[1]._x)
    assert {int(v) for i in range(len(both)) for v in np.unique(both[i][1])} == {0, 1, 2, 3, 255}
    assert set(made[-1]._x) == set(made[2]._x)
    with pytest.raises(ScenarioError, match="takes none of the 3 tasks"):
        made[3:]


def test_task_sets_pickle(scenes: Synthetic):
    taskset = to_continuum(scene_of(4, [2], "overlapped", ORDER), scenes)[1]
    again = pickle.loads(pickle.dumps(taskset))
    assert (again[0][1] == taskset[0][1]).all()
    assert len(again) == len(taskset)


@pytest.mark.parametrize("mode", MODES)
def test_there_and_back(mode: str, scenes: Synthetic, monkeypatch: pytest.MonkeyPatch):
    scene = scene_of(2, [1, 3], mode, ORDER)
    assert from_continuum(to_continuum(scene, scenes)) is scene
    assert from_continuum(original(scene, scenes, "train", monkeypatch), "tiny", "synthetic") == scene


def test_labels_stored_in_another_numbering(tmp_path: Path):
    for part in ("images", "labels"):
        (tmp_path / part / "train").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "images" / "train" / "a.png")
    stored = np.array([[0, 1, 2, 255]] * 4, np.uint8)
    Image.fromarray(stored).save(tmp_path / "labels" / "train" / "a.png")

    (tmp_path / "dataset.toml").write_text(
        'classes = ["a", "b", "c"]\noffset = 1\nvoid = [255]\n'
        '[splits.train]\nimages = "images/train"\nlabels = "labels/train"\n'
    )
    data = Folder(tmp_path)
    content = {"dataset": "folder", "classes": 3, "base": 1, "increment": 2, "order": [2, 1, 3]}
    scene = scenarios.from_dict("shifted", content)
    made = to_continuum(scene, data)
    assert [taskset[0][1][0].tolist() for taskset in made] == [[0, 1, 0, 0], [2, 0, 3, 0]]


def test_the_example_runs_and_stands_in_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    example = Path(__file__).parents[1] / "examples" / "continuum_scenario.py"
    assert example.read_text().rstrip() in (example.parents[1] / "docs" / "interop.md").read_text()
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1", "step 2"]
    assert "labels [0, 11" in lines[1]
