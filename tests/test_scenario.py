"""Scenarios: steps, image selection in every mode, label tables; the published ADE20K counts; errors."""

from __future__ import annotations

import hashlib
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cssbench import registry, scenario
from cssbench.data.presence import PresenceIndex, from_class_lists
from cssbench.errors import ScenarioError, UnknownNameError
from cssbench.scenario import from_dict, load, stems_digest


def spec(**changes):
    """Six classes: 1-3, then 4, 5, then 6."""
    return {"dataset": "toy", "classes": 6, "base": 3, "increment": [2, 1]} | changes


def showing(*images, classes=6):
    """A presence table from the class ids of each image."""
    table = np.zeros((len(images), classes + 1), bool)
    for row, ids in zip(table, images, strict=True):
        row[list(ids)] = True
    return table


def chosen(scene, *images):
    return [indices.tolist() for indices in scene.images(showing(*images))]


# Steps whose classes the images show: 0; 0 and 1; all; 2; none (only void); 1.
IMAGES = ((1,), (0, 2, 4), (3, 5, 6), (6,), (0,), (4, 5))


def test_steps_by_hand():
    scene = from_dict("toy", spec())
    assert scene.groups == ((1, 2, 3), (4, 5), (6,))
    assert [(s.index, s.new, s.old, s.seen) for s in scene.steps][1:] == [
        (1, (4, 5), (1, 2, 3), (1, 2, 3, 4, 5)),
        (2, (6,), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6)),
    ]
    assert [list(s.new_positions) for s in scene.steps] == [[1, 2, 3], [4, 5], [6]]
    assert scene.num_classes == scene.num_classes_max == 6


def test_modes_by_hand():
    assert chosen(from_dict("toy", spec()), *IMAGES) == [[0, 1, 2], [1, 2, 5], [2, 3]]
    for mode in ("disjoint", "sequential"):
        assert chosen(from_dict("toy", spec(mode=mode)), *IMAGES) == [[0], [1, 5], [2, 3]]
    parts = chosen(from_dict("toy", spec(mode="partitioned")), *IMAGES)
    assert sorted(chain(*parts)) == [0, 1, 2, 3, 5]
    assert [wanted in part for wanted, part in zip((0, 5, 3), parts, strict=True)] == [True, True, True]


def test_order_by_hand():
    scene = from_dict("toy", spec(order=[6, 2, 4, 1, 3, 5]))
    assert scene.groups == ((6, 2, 4), (1, 3), (5,))
    assert scene.position_table()[:8].tolist() == [0, 4, 2, 5, 3, 6, 1, 255]
    assert chosen(scene, *IMAGES) == [[1, 2, 3, 5], [0, 2], [2, 5]]
    assert scene.train_table(scene.steps[1])[:8].tolist() == [0, 4, 0, 5, 0, 0, 0, 255]


def test_order_from_a_seed():
    shuffled = from_dict("toy", spec(order=7)).order
    assert sorted(shuffled) == [1, 2, 3, 4, 5, 6]
    assert shuffled == from_dict("toy", spec(order=7)).order
    assert len({from_dict("toy", spec(order=seed)).order for seed in range(10)}) > 5


def test_label_tables_by_hand():
    scene = from_dict("toy", spec())
    tables = [scene.train_table(step) for step in scene.steps]
    assert [table[:8].tolist() for table in tables] == [
        [0, 1, 2, 3, 0, 0, 0, 255],
        [0, 0, 0, 0, 4, 5, 0, 255],
        [0, 0, 0, 0, 0, 0, 6, 255],
    ]
    assert all((table[7:] == 255).all() and table.dtype == np.uint8 and table.shape == (256,) for table in tables)


def test_sequential_keeps_old_labels():
    scene = from_dict("toy", spec(mode="sequential"))
    assert [scene.train_table(step)[:7].tolist() for step in scene.steps] == [
        [0, 1, 2, 3, 0, 0, 0],
        [0, 1, 2, 3, 4, 5, 0],
        [0, 1, 2, 3, 4, 5, 6],
    ]


def test_void_may_be_ignored():
    scene = from_dict("toy", spec(void="ignore"))
    assert [scene.train_table(step)[0] for step in scene.steps] == [255, 255, 255]
    assert scene.train_table(scene.steps[0])[4] == 0  # future classes stay background


def test_joint_is_one_step_of_all():
    scene = from_dict("toy", spec(order=[6, 2, 4, 1, 3, 5], void="ignore")).joint()
    assert scene.groups == ((6, 2, 4, 1, 3, 5),)
    assert scene.name == "toy-joint"
    assert scene.void == "ignore"
    assert chosen(scene, *IMAGES) == [[0, 1, 2, 3, 5]]


def test_partition_is_balanced_and_seeded():
    rng = np.random.default_rng(0)
    table = np.concatenate([np.zeros((600, 1), bool), rng.random((600, 6)) < 0.3], axis=1)
    scenes = [from_dict("toy", spec(mode="partitioned", partition_seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (scene.images(table) for scene in scenes)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=True))
    shows = np.stack([table[:, list(g)].any(axis=1) for g in scenes[0].groups], axis=1)
    assert sum(map(len, first)) == shows.any(axis=1).sum()
    shares = shows.sum(axis=0) / shows.sum()
    assert np.allclose([len(i) / sum(map(len, first)) for i in first], shares, atol=0.02)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count = sum(sizes)
    content = {"dataset": "toy", "classes": count, "base": sizes[0], "increment": sizes[1:]}
    content["order"] = data.draw(st.permutations(range(1, count + 1)))
    rows = data.draw(st.lists(st.sets(st.integers(0, count)), min_size=1, max_size=12))
    rows += [{c} for c in range(1, count + 1)]  # so that no step is empty
    table = showing(*rows, classes=count)
    sets = {}
    for mode in ("overlapped", "disjoint", "sequential", "partitioned"):
        scene = from_dict("toy", content | {"mode": mode})
        sets[mode] = [set(i.tolist()) for i in scene.images(table)]
        for step, indices in zip(scene.steps, sets[mode], strict=True):
            assert all(rows[i] & set(step.new) for i in indices)
            labels = scene.train_table(step)
            shown = step.seen if mode == "sequential" else step.new
            assert sorted(np.unique(labels)) == sorted({0, 255} | {scene.order.index(c) + 1 for c in shown})
    assert sets["disjoint"] == sets["sequential"]
    assert all(d <= o for d, o in zip(sets["disjoint"], sets["overlapped"], strict=True))
    assert all(p <= o for p, o in zip(sets["partitioned"], sets["overlapped"], strict=True))
    once = sorted(chain(*sets["partitioned"]))
    assert once == sorted(set.union(*sets["overlapped"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": [1, 2, 2, 3, 4, 5]}, "lists class 2 twice"),
        ({"order": [1, 2, 3, 4, 5]}, r"missing or out of range: \[6\]"),
        ({"order": [1, 2, 3, 4, 5, 7]}, r"missing or out of range: \[6, 7\]"),
        ({"order": -1}, "greater than or equal to 0"),
        ({"partition_seed": -1}, "greater than or equal to 0"),
        ({"increment": 2}, "do not add up to 6 classes. Choose an increment that divides 3"),
        ({"increment": 0}, "do not add up"),
        ({"increment": [2, 2]}, r"do not add up to 6 classes \(7 instead\)"),
        ({"increment": [3, 0]}, "one is below 1"),
        ({"base": 7, "increment": 1}, "do not add up"),
        ({"base": 0}, "greater than or equal to 1"),
        ({"classes": 255, "base": 255, "increment": []}, "less than or equal to 254"),
        ({"mode": "overlaped"}, "'mode' .it is 'overlaped'."),
        ({"void": "black"}, "'void'"),
        ({"icrement": 3}, "unknown key 'icrement' .did you mean 'increment'"),
    ],
)
def test_errors_name_scenario_and_key(changes, message):
    with pytest.raises(ScenarioError, match=message) as caught:
        from_dict("toy", spec(**changes))
    assert "toy" in str(caught.value)


def test_missing_keys():
    with pytest.raises(ScenarioError, match=r"'dataset' is missing; 'classes' is missing; 'base' is missing"):
        from_dict("toy", {})


def test_a_step_without_images_is_an_error():
    with pytest.raises(ScenarioError, match=r"Step 2 of scenario 'toy' \(overlapped\) has no training image.*\[6\]"):
        chosen(from_dict("toy", spec()), (1,), (4,))
    with pytest.raises(ScenarioError, match=r"Step 0 of scenario 'toy' \(disjoint\)"):
        chosen(from_dict("toy", spec(mode="disjoint")), (1, 4), (6,))


def test_too_few_classes_in_the_data():
    with pytest.raises(ScenarioError, match="class ids up to 6, but the data hold only 4 classes"):
        from_dict("toy", spec()).images(showing((1,), classes=4))


def test_load_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "toy"\nclasses = 3\nbase = 2\nincrement = 1\n')
    assert load(str(path)).name == "mine"
    assert load(str(path), mode=None).mode == "overlapped"
    assert load(str(path), mode="disjoint", order=[3, 2, 1]).groups == ((3, 2), (1,))
    path.write_text("dataset = ")
    with pytest.raises(ScenarioError, match=r"mine\.toml' is not valid TOML"):
        load(str(path))
    with pytest.raises(UnknownNameError):
        load(str(tmp_path / "none.toml"))
    with pytest.raises(UnknownNameError, match="Did you mean 'ade20k-100-50'"):
        load("ade20k-100-500")


@pytest.mark.parametrize("name", sorted(scenario.names()))
def test_installed_scenarios_are_sound(name):
    scene = load(name)
    assert scene.description
    cls = registry.load("datasets", scene.dataset)
    assert scene.num_classes == {"synthetic": 20}.get(scene.dataset) or len(cls.classes)
    assert sorted(scene.order) == list(range(1, 1 + scene.num_classes))
    assert (len(scene.steps) == 1) == name.endswith("-joint")


def test_stems_digest_ignores_the_order():
    assert stems_digest(["b", "a"]) == stems_digest(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()


@pytest.fixture(scope="module")
def ade_index(shared_data) -> PresenceIndex:
    return from_class_lists(shared_data / "ade20k_index" / "train_cls.txt", 150)


# shared/reference/protocols.md and baselines.md, section 2 each: checked there against the index files of EWF and NeST
OVERLAPPED = {
    "ade20k-100-50": [20192, 9390],
    "ade20k-50-50": [20177, 13186, 9390],
    "ade20k-100-10": [20192, 1710, 2294, 2747, 4279, 2844],
    "ade20k-100-5": [20192, 1142, 600, 1234, 1204, 1151, 1874, 1807, 2943, 1238, 1898],
}
DISJOINT = {
    "ade20k-100-50": [10806, 9390],
    "ade20k-50-50": [4838, 5968, 9390],
    "ade20k-100-10": [10806, 861, 1009, 1445, 3231, 2844],
    "ade20k-100-5": [10806, 597, 264, 499, 510, 493, 952, 1040, 2191, 946, 1898],
}


@pytest.mark.parametrize("name", OVERLAPPED)
def test_published_ade20k_counts(ade_index, name):
    assert [len(i) for i in load(name).images(ade_index.table)] == OVERLAPPED[name]
    assert [len(i) for i in load(name, mode="disjoint").images(ade_index.table)] == DISJOINT[name]
    parts = load(name, mode="partitioned").images(ade_index.table)
    assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts)) == 20196


@pytest.mark.parametrize(
    ("name", "seen", "new"),
    [
        ("ade20k-100-50", [2000, 2000], [2000, 1018]),
        ("ade20k-50-50", [1997, 2000, 2000], [1997, 1341, 1018]),
        ("ade20k-100-10", [2000] * 6, [2000, 163, 268, 368, 466, 317]),
    ],
)
def test_published_validation_counts(shared_data, name, seen, new):
    table = from_class_lists(shared_data / "ade20k_index" / "val_cls.txt", 150).table
    steps = load(name).steps
    assert [int(table[:, list(s.seen)].any(axis=1).sum()) for s in steps] == seen
    assert [int(table[:, list(s.new)].any(axis=1).sum()) for s in steps] == new
