"""`cssbench evaluate`: the same weights give the same run, other options another one, and nothing is made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from fabricated import fabricate_imported
from PIL import Image
from tiny_runs import EQD, LINEAR, SEGVIT, make_recipe, start

from cssbench import compare, protocol, validate
from cssbench.reevaluate import evaluate_again
from cssbench.results import RunFolder, read_json, write_json

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("trained")
    return start(make_recipe(folder, EQD), folder / "eqd")


def again(trained: RunFolder, out: Path, *changes: str) -> RunFolder:
    evaluate_again(trained.path, out, list(changes), None, ["test"])
    return RunFolder.read(out)


def test_unchanged_options_give_the_same_results(trained: RunFolder, tmp_path: Path):
    found = again(trained, tmp_path / "again")
    assert found.finished
    assert found.config == trained.config
    assert found.scenario == trained.scenario
    for old, new in zip(trained.records(), found.records(), strict=True):
        assert old.matrices.keys() == new.matrices.keys()
        assert all(np.array_equal(matrix, new.matrices[key]) for key, matrix in old.matrices.items())
        for kind in ("samples", "depth_maps"):
            before, after = getattr(old, kind)(), getattr(new, kind)()
            assert before.keys() == after.keys() != set()
            assert all(before[stem].read_bytes() == after[stem].read_bytes() for stem in before)
        assert (old.tokens, old.gflops) == (new.tokens, new.gflops)
    pictures = sorted((trained.path / "samples").iterdir())
    assert [(found.path / "samples" / p.name).read_bytes() for p in pictures] == [p.read_bytes() for p in pictures]


def test_the_folder_says_where_its_numbers_come_from(trained: RunFolder, tmp_path: Path):
    found = again(trained, tmp_path / "again", "model.edges.threshold=0.25", "evaluate.samples=1")
    origin = found.provenance["evaluated_from"]
    assert found.provenance["command"] == ["test"]
    assert origin["path"] == str(trained.path)
    assert origin["digest"] == trained.digest
    assert origin["provenance"] == trained.provenance
    assert origin["changes"] == {"evaluate.samples": [2, 1], "model.edges.threshold": [0.5, 0.25]}
    for old, new in zip(trained.records(), found.records(), strict=True):
        for name in ("images", "iterations", "parameters", "loss"):
            assert new.content[name] == old.content[name]
        assert new.content["seconds"].keys() == {"train", "evaluate"}
        assert new.content["seconds"]["train"] == old.content["seconds"]["train"]
        kept = ["images", "iterations", "parameters", "loss", "seconds.train"]
        assert new.content["evaluated_from"] == {"digest": old.content["digest"], "kept": kept}
        assert set(new.content["sha256"]) == {"matrices.npz"}
    assert validate.problems(found) == []
    assert compare.differences([trained, found], protocol.get("mmseg150@1")) == []
    assert len(found.records()[0].samples()) == 1


def test_tokens_follow_the_threshold(trained: RunFolder, tmp_path: Path):
    """Above 0: every token is an edge. Above a probability that none has: the 2 x 2 grid alone, a quarter of 16."""
    every = again(trained, tmp_path / "every", "model.edges.threshold=0.0").records()[-1]
    none = again(trained, tmp_path / "none", "model.edges.threshold=0.999999").records()[-1]
    assert every.tokens == {2: 1.0}
    assert none.tokens == {1: 0.75, 2: 0.25}
    assert none.gflops["per_pass"] < every.gflops["per_pass"]
    assert every.gflops["images"] == 3
    path = next(iter(none.depth_maps().values()))
    with Image.open(path) as picture:
        assert picture.mode == "P"
        depths = np.asarray(picture)
        assert picture.convert("L").getpixel((0, 0)) < picture.convert("L").getpixel((31, 31))  # stopped ones bright
    expected = np.array([[2, 1, 2, 1], [1, 1, 1, 1]] * 2).repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(depths, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.iterations=3"], "train.iterations cannot change"),
        (["seed=1", "optim.lr=1.0"], "optim.lr, seed cannot change"),
        (["method.name=mib"], "method.name"),
        (["model.name=segvit"], "model"),
        (["scenario.mode=disjoint"], "scenario.mode cannot change"),
        (["model.head.width=8"], "Changed: model.head.width"),
        (["model.edges=none"], "Changed: model.edges.layer, model.edges.select, model.edges.threshold"),
        (["model.edges.thresh=0.5"], "unknown key 'edges.thresh'"),
        (["evaluate.limt=3"], "unknown key 'evaluate.limt'"),
        (["model.upsample_queries=tied", "evaluate.short_side=64"], "grid of 4x4"),
    ],
)
def test_what_the_weights_do_not_allow_is_refused_and_leaves_nothing(
    trained: RunFolder, tmp_path: Path, command: Command, changes: list[str], message: str
):
    words = [word for change in changes for word in ("--set", change)]
    code, _, err = command("evaluate", trained.path, "--out", tmp_path / "new", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "new").exists()


def test_the_source_must_have_weights(trained: RunFolder, tmp_path: Path, command: Command):
    found = again(trained, tmp_path / "again")
    refused = {
        tmp_path / "nothing": "is not a run folder",
        found.path: f"Name {trained.path}",
        fabricate_imported(tmp_path / "imported", [{"0": 0.5, "1": 0.5, "2": 0.5}]).path: "holds no weights",
    }
    for path, message in refused.items():
        code, _, err = command("evaluate", path, "--out", tmp_path / "new")
        assert (code, message in err) == (2, True), err
    copy = shutil.copytree(trained.path, tmp_path / "copy")
    weights = copy / "steps" / "01" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, _, err = command("evaluate", copy, "--out", tmp_path / "new")
    assert (code, "does not match its checksum" in err) == (2, True), err


def test_an_edited_run_is_refused(trained: RunFolder, tmp_path: Path, command: Command):
    copy = shutil.copytree(trained.path, tmp_path / "copy")
    record = copy / "steps" / "00" / "record.json"
    write_json(record, read_json(record) | {"iterations": 1000})
    code, _, err = command("evaluate", copy, "--out", tmp_path / "new")
    assert (code, "record.json was edited" in err) == (2, True), err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["segvit-cl", "reminder"])
def test_what_a_method_does_after_training_is_in_the_weights(tmp_path: Path, method: str):
    """SegViT-CL calibrates its head and freezes the old ones; REMINDER keeps prototypes."""
    model = SEGVIT if method == "segvit-cl" else LINEAR
    trained = start(make_recipe(tmp_path, model), tmp_path / "run", f"method.name={method}")
    found = again(trained, tmp_path / "again")
    for old, new in zip(trained.records(), found.records(), strict=True):
        assert all(np.array_equal(matrix, new.matrices[key]) for key, matrix in old.matrices.items())
        assert new.tokens is None
        assert old.gflops == new.gflops
        assert old.gflops["images"] == 3


def test_other_data_are_refused(trained: RunFolder, tmp_path: Path, command: Command):
    other = tmp_path / "other"
    other.mkdir()
    code, _, err = command(
        "evaluate", trained.path, "--out", tmp_path / "new", "--data", other, "--set", "data.options.train=12"
    )
    assert (code, "data.options.train cannot change" in err) == (2, True), err
    code, _, err = command("evaluate", trained.path, "--out", tmp_path / "new", "--data", other)  # made there anew
    assert code == 0, err
    assert RunFolder.read(tmp_path / "new").config.data.root == str(other)


def test_a_killed_evaluation_goes_on_and_a_finished_one_says_so(trained: RunFolder, tmp_path: Path, command: Command):
    out, change = tmp_path / "again", ("--set", "model.edges.threshold=0.25")
    assert command("evaluate", trained.path, "--out", out, *change)[0] == 0
    whole = RunFolder.read(out)
    before = [record.content["tokens"] for record in whole.records()]
    (out / "steps" / "01" / "record.json").unlink()
    first = (out / "steps" / "00" / "record.json").read_bytes()
    code, _, err = command("resume", out)
    assert code == 2
    assert "nothing to train" in err
    assert command("status", out)[0] == 0
    assert command("evaluate", trained.path, "--out", out, *change)[0] == 0
    assert [record.content["tokens"] for record in RunFolder.read(out).records()] == before
    assert (out / "steps" / "00" / "record.json").read_bytes() == first
    code, text, _ = command("evaluate", trained.path, "--out", out, *change)
    assert code == 0
    assert "is finished" in text
    assert "is finished" in command("resume", out)[1]


def test_a_folder_of_something_else_is_left_alone(trained: RunFolder, tmp_path: Path, command: Command):
    out = tmp_path / "again"
    again(trained, out)
    record = read_json(out / "steps" / "00" / "record.json")
    code, _, err = command("evaluate", trained.path, "--out", out, "--set", "model.edges.threshold=0.25")
    assert (code, "differs in model.edges.threshold" in err) == (2, True), err
    code, _, err = command("evaluate", trained.path, "--out", trained.path)
    assert (code, "a run of its own" in err) == (2, True), err
    other = RunFolder.read(shutil.copytree(trained.path, tmp_path / "other"))
    written = other.records()[0]
    weights = safetensors.torch.load_file(written.folder / "model.safetensors")
    safetensors.torch.save_file({k: v + 1 for k, v in weights.items()}, written.folder / "model.safetensors")
    rest = {k: v for k, v in written.content.items() if k not in ("sha256", "run_sha256", "digest")}
    other.write_record(0, rest)  # as if trained otherwise
    code, _, err = command("evaluate", other.path, "--out", out)
    assert (code, "other weights" in err) == (2, True), err
    assert read_json(out / "steps" / "00" / "record.json") == record


def test_an_unfinished_run_gives_what_it_has(trained: RunFolder, tmp_path: Path, command: Command):
    part = shutil.copytree(trained.path, tmp_path / "part")
    shutil.rmtree(part / "steps" / "01")
    out = tmp_path / "again"
    assert command("evaluate", part, "--out", out)[0] == 0
    assert len(RunFolder.read(out).records()) == 1
    assert "1 of 2 steps" in command("status", out)[1]
    assert "is finished" in command("evaluate", part, "--out", out)[1]
    shutil.copytree(trained.path / "steps" / "01", part / "steps" / "01")  # the run has gone on
    assert command("evaluate", part, "--out", out)[0] == 0
    assert RunFolder.read(out).finished
