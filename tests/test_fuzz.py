"""Any input is taken, with its invariants, or refused with an error of ours: properties over generated inputs."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from fabricated import fabricate, fabricate_imported
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cssbench import scenario, scoring
from cssbench.data.folder import Folder
from cssbench.errors import CssbenchError, DataError, RunError
from cssbench.protocol import BUILT_IN, Protocol
from cssbench.results import RunFolder, content_digest
from cssbench.scenario import Scenario
from cssbench.validate import problems

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 12), st.floats(), st.text(max_size=8),
    st.sampled_from(["overlapped", "disjoint", "sequential", "partitioned", "background", "ignore", "../x", "nan"]),
)  # fmt: skip
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def without_none(value: Any) -> Any:
    """TOML knows no null, and no integer beyond 64 bits."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value if item is not None] if isinstance(value, list) else value


# --- scenarios ---------------------------------------------------------------------------------------------------

KEYS = ("dataset", "description", "classes", "base", "increment", "mode", "order", "void", "partition_seed")


@st.composite
def near_scenarios(draw: st.DrawFn) -> dict[str, Any]:
    """Sound scenarios, most of them, with some keys changed to anything."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    content: dict[str, Any] = {"dataset": "toy", "classes": sum(sizes), "base": sizes[0], "increment": sizes[1:]}
    content["mode"] = draw(st.sampled_from(["overlapped", "disjoint", "sequential", "partitioned"]))
    content["void"] = draw(st.sampled_from(["background", "ignore"]))
    orders = st.one_of(st.integers(0, 2**40), st.permutations(range(1, 1 + sum(sizes))))
    content |= draw(st.one_of(st.just({}), orders.map(lambda order: {"order": order})))
    return content | draw(
        st.one_of(st.just({}), st.dictionaries(st.sampled_from([*KEYS, "more"]), ANYTHING, max_size=2))
    )


def sound(scene: Scenario) -> None:
    """What every scenario promises."""
    assert sorted(scene.order) == list(range(1, 1 + scene.num_classes)), "each class once"
    assert all(scene.groups)
    seen: tuple[int, ...] = ()
    for index, step in enumerate(scene.steps):
        assert (step.index, step.old) == (index, seen)
        assert list(step.new_positions) == list(range(len(seen) + 1, len(seen) + 1 + len(step.new)))
        seen += step.new
    assert seen == scene.order
    assert scene.joint().groups == (scene.order,)


@settings(FEW, max_examples=150)
@given(content=near_scenarios())
def test_a_scenario_is_sound_or_refused(content: dict[str, Any]):
    try:
        scene = scenario.from_dict("generated", content)
    except CssbenchError:
        return
    sound(scene)


@FEW
@given(content=st.one_of(near_scenarios(), st.dictionaries(st.text(max_size=6), ANYTHING, max_size=3)))
def test_any_toml_loads_or_is_refused(tmp_path: Path, content: dict[str, Any]):
    path = tmp_path / "any.toml"
    path.write_text(tomli_w.dumps(without_none(content)), encoding="utf-8")
    try:
        scene = scenario.load(str(path))
    except CssbenchError:
        return
    sound(scene)


@FEW
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
@example(content=b"a = " + b"[" * 5000)
@example(content=b"\xef\xbb\xbfclasses = 3")
@example(content=b"classes = 999999999999999999999999999999")
def test_any_bytes_load_or_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "any.toml").write_bytes(content)
    with pytest.raises(CssbenchError):  # no bytes so short are a scenario
        scenario.load(str(tmp_path / "any.toml"))


# --- label tables ------------------------------------------------------------------------------------------------


def slow_label(scene: Scenario, step: int, value: int) -> int:
    """The label that a learner sees for one pixel, from the words of docs/data.md."""
    new, old = scene.groups[step], [c for group in scene.groups[:step] for c in group]
    if value == 0:
        return 255 if scene.void == "ignore" else 0
    if value in new or (scene.mode == "sequential" and value in old):
        return 1 + scene.order.index(value)
    return 0 if value in scene.order else 255


@FEW
@given(content=near_scenarios())
def test_label_tables_against_one_pixel_at_a_time(content: dict[str, Any]):
    try:
        scene = scenario.from_dict("generated", content)
    except CssbenchError:
        return
    for step in scene.steps:
        assert scene.train_table(step).tolist() == [slow_label(scene, step.index, value) for value in range(256)]
    places = scene.position_table().tolist()
    assert [places.index(p) for p in range(1, 1 + scene.num_classes)] == list(scene.order)


@st.composite
def folder_specs(draw: st.DrawFn) -> dict[str, Any]:
    byte = st.integers(-2, 258)
    count = draw(st.integers(1, 5))
    content: dict[str, Any] = {"classes": [f"c{i}" for i in range(count)]}
    how = draw(st.sampled_from(["", "offset", "values"]))
    if how == "offset":
        content["offset"] = draw(byte)
    elif how == "values":
        content["values"] = draw(st.lists(byte, min_size=count, max_size=count))
    if draw(st.booleans()):
        content["void"] = draw(st.lists(byte, max_size=3))
    return content


@FEW
@given(content=folder_specs())
def test_tables_of_folder_data_sets_against_one_value_at_a_time(tmp_path: Path, content: dict[str, Any]):
    splits = {"train": {"images": "x", "labels": "y"}}
    (tmp_path / "dataset.toml").write_text(tomli_w.dumps(content | {"splits": splits}), encoding="utf-8")
    try:
        data = Folder(tmp_path)
    except DataError:
        return
    stored = content.get("values") or [c - content.get("offset", 0) for c in range(1, 1 + len(content["classes"]))]
    void = content.get("void", [0])
    for value in range(256):
        expected = stored.index(value) + 1 if value in stored else 0 if value in void else 255 if value == 255 else None
        one = np.full((1, 1), value, np.uint8)
        if expected is None:
            with pytest.raises(DataError):
                data.to_ids(one, Path("x"))
        else:
            assert data.to_ids(one, Path("x"))[0, 0] == expected


# --- protocols ---------------------------------------------------------------------------------------------------


@st.composite
def evaluations(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], int]:
    """A confusion matrix, the classes of each step in any order, and the step evaluated."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    order = draw(st.permutations(range(1, 1 + sum(sizes))))
    groups = [list(order[sum(sizes[:t]) : sum(sizes[: t + 1])]) for t in range(len(sizes))]
    step = draw(st.integers(0, len(sizes) - 1))
    seen = [0, *(c for group in groups[: step + 1] for c in group)]
    side = 1 + sum(sizes)
    matrix = np.zeros((side, side), np.int64)
    for row in range(side):
        for column in seen:
            matrix[row, column] = draw(st.sampled_from([0, 0, 1, 2, 7, 10**12]))
    return matrix, groups, step


def slow_scores(p: Protocol, matrix: np.ndarray, groups: list[list[int]], step: int) -> dict[str, Fraction | None]:
    """base, incremental, all: pixel by pixel, in exact fractions, from the words of the protocol's docstring."""
    seen = [c for group in groups[: step + 1] for c in group]
    hits: dict[int, int] = {}
    truth: dict[int, int] = {}
    claimed: dict[int, int] = {}
    for raw, row in enumerate(matrix.tolist()):
        for predicted, count in enumerate(row):
            actual: int | None = raw
            if raw == 0:
                if p.void == "ignore":
                    continue
                actual = 0 if p.void == "background" else None
            elif raw not in seen:
                if p.future == "ignore":
                    continue
                actual = 0
            claimed[predicted] = claimed.get(predicted, 0) + count
            if actual is not None:
                truth[actual] = truth.get(actual, 0) + count
                if actual == predicted:
                    hits[actual] = hits.get(actual, 0) + count
    iou: dict[int, Fraction] = {}
    for c in ([0] if p.background != "none" else []) + seen:
        if truth.get(c, 0):
            union = truth[c] + claimed.get(c, 0) - hits.get(c, 0)
            iou[c] = Fraction(hits.get(c, 0), union)
        elif p.absent == "zero":
            iou[c] = Fraction(0)

    def mean(classes: list[int]) -> Fraction | None:
        there = [iou[c] for c in classes if c in iou]
        return sum(there, Fraction(0)) / len(there) if there else None

    base = ([0] if p.background == "base" else []) + groups[0]
    later = [c for group in groups[1 : step + 1] for c in group]
    found = {"base": mean(base), "incremental": mean(later)}
    if p.all_mean == "weighted":
        parts = [(len(base), found["base"])] * bool(base) + [(len(later), found["incremental"])]
        parts = [(n, value) for n, value in parts if value is not None]
        weight = sum(n for n, _ in parts)
        found["all"] = sum((n * value for n, value in parts), Fraction(0)) / weight if parts else None
    elif p.all_mean == "nonzero":
        found["all"] = mean([c for c in iou if iou[c] > 0])
    else:
        found["all"] = mean(list(iou))
    return found


@settings(FEW, max_examples=80)
@given(evaluation=evaluations())
@pytest.mark.parametrize("protocol", BUILT_IN, ids=lambda p: p.id)
def test_scores_against_a_slow_derivation(protocol: Protocol, evaluation: tuple[np.ndarray, list[list[int]], int]):
    scores = protocol.scores(*evaluation)
    for name, expected in slow_scores(protocol, *evaluation).items():
        assert scores[name] == (None if expected is None else pytest.approx(float(expected), rel=1e-12)), name


# --- run folders -------------------------------------------------------------------------------------------------

FILES = ("config.toml", "provenance.json", "scenario.json", "steps/00/record.json", "steps/01/record.json")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("originals")
    fabricate(folder / "run", numbers={"tokens": {"1": 0.25, "2": 0.75}})
    fabricate_imported(folder / "imported", [{"0": 0.5, "1": 0.5, "2": None}, {"0": 0.5, "1": 0.5, "2": 0.1, "3": 0.2}])
    return [folder / "run", folder / "imported"]


def read_all(path: Path) -> None:
    """Everything that readers of a run folder do."""
    run = RunFolder.read(path)
    assert run.num_steps >= 1
    _ = (run.finished, run.groups, run.digest, run.name)
    for record in run.records():
        _ = (record.tokens, record.gflops, record.samples(), record.depth_maps())
        run.verify(record)
        if "imported" not in record.content:
            assert record.matrices
    problems(run, weights=False)
    for protocol in BUILT_IN:
        if scoring.can_score(run, protocol):
            scoring.run_scores(run, protocol)


@settings(FEW, max_examples=120)
@given(data=st.data())
def test_a_damaged_run_folder_is_read_or_refused(originals: list[Path], tmp_path: Path, data: st.DataObject):
    original = data.draw(st.sampled_from(originals))
    path = tmp_path / "run"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path)
    file = path / data.draw(st.sampled_from(FILES))
    content = file.read_bytes()
    how = data.draw(st.sampled_from(["bytes", "cut", "flip", "json", "key", "key"]))
    if how == "bytes":
        content = data.draw(st.binary(max_size=40))
    elif how == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif how == "flip":
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    elif file.suffix == ".json":
        found = json.loads(content)
        if how == "json":
            found = data.draw(ANYTHING)
        else:
            found = changed(found, data)
            if isinstance(found, dict) and "digest" in found:
                found["digest"] = content_digest(found)  # as somebody who knows the format would
        content = json.dumps(found).encode()
    file.write_bytes(content)
    try:
        read_all(path)
    except RunError:
        pass
    except CssbenchError:  # settings that are none
        assert file.name == "config.toml"


def changed(value: Any, data: st.DataObject) -> Any:
    """One value somewhere inside replaced by anything, or left out."""
    if isinstance(value, dict) and value and data.draw(st.booleans() | st.just(True)):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 5)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: changed(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], changed(value[at], data), *value[at + 1 :]]
    return data.draw(ANYTHING)
