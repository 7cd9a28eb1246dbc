"""The run folder: round trips, what a crash or a full disk leaves, damage, names that would leave it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import STATE, Net, files

from cssbench import checkpoint, results
from cssbench.config import validate
from cssbench.errors import ConfigError, RunError
from cssbench.results import RunFolder, atomic_path, image_name, read_json, safe_name, sha256, write_bytes, write_json

CONFIG = validate(
    {
        "scenario": {"name": "toy"},
        "method": {"name": "m", "weight": 2.5},
        "model": {"name": "x"},
        "train": {"iterations": [5, 2]},
        "evaluate": {"short_side": "none"},
    },
    "test",
)
SCENE = {
    "name": "toy",
    "dataset": "toy",
    "mode": "overlapped",
    "classes": ["a", "b", "c"],
    "steps": [{"new": [1, 2], "images": 3, "sha256": "0"}, {"new": [3], "images": 2, "sha256": "1"}],
}
MATRIX = np.arange(16, dtype=np.int64).reshape(4, 4) * 2**40  # beyond 32 bits


def fresh(path: Path) -> RunFolder:
    run = RunFolder(path, CONFIG, SCENE, {"seed": 3, "data": {"name": "toy"}})
    run.create()
    return run


def finish(run: RunFolder, step: int, **numbers: Any) -> None:
    write_bytes(run.step_folder(step) / "model.safetensors", bytes(range(100)))
    run.finish_step(step, {"full.all": MATRIX + step, "crop.foreground.upto0": MATRIX}, numbers)


def test_a_folder_is_read_as_it_was_written(tmp_path: Path):
    fresh(tmp_path / "run-1")
    run = RunFolder.read(tmp_path / "run-1")
    assert run.config == CONFIG
    assert run.scenario == SCENE
    assert run.provenance == {"seed": 3, "data": {"name": "toy"}, "schema": results.SCHEMA}
    assert run.name == "run-1"
    assert run.groups == [[1, 2], [3]]
    assert run.num_steps == 2
    assert run.records() == []
    assert not run.finished


def test_steps_are_read_as_they_were_written(tmp_path: Path):
    run = fresh(tmp_path / "run")
    finish(run, 0, images=7, loss={"ce": 0.5})
    finish(run, 1)
    run = RunFolder.read(str(tmp_path / "run"))
    assert run.finished
    first, second = run.records()
    assert (first.index, second.index) == (0, 1)
    assert first.content["images"] == 7
    assert first.content["loss"] == {"ce": 0.5}
    assert first.content["sha256"].keys() == {"model.safetensors", "matrices.npz"}
    assert first.matrices.keys() == {"full.all", "crop.foreground.upto0"}
    np.testing.assert_array_equal(second.matrices["full.all"], MATRIX + 1)
    assert second.matrices["full.all"].dtype == np.int64
    for record in (first, second):
        run.verify(record)


def test_a_second_run_does_not_fit_into_the_folder(tmp_path: Path):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    with pytest.raises(RunError, match=r"already holds a run\. `cssbench resume"):
        run.create()
    # Else the steps of another configuration would count as done.
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(RunError, match=r"holds steps of a run that has lost its config\.toml"):
        run.create()


def test_a_folder_without_config_is_no_run_and_can_be_made_one(tmp_path: Path):
    """config.toml comes last, so that a run killed before it has everything can be started again."""
    run = fresh(tmp_path / "run")
    (run.path / "config.toml").unlink()
    with pytest.raises(RunError, match=r"is not a run folder: it has no config\.toml"):
        RunFolder.read(run.path)
    run.create()
    assert RunFolder.read(run.path).config == CONFIG


def test_records_stop_at_the_first_unfinished_step(tmp_path: Path):
    run = RunFolder(tmp_path / "run", CONFIG, SCENE | {"steps": SCENE["steps"] * 2}, {})  # type: ignore[operator]
    run.create()
    for step in (0, 1, 3):
        finish(run, step)
    assert [r.index for r in run.records()] == [0, 1]
    assert not run.finished
    (run.step_folder(0) / "record.json").unlink()  # weights and matrices alone are not a finished step
    assert run.records() == []


@pytest.mark.parametrize("schema", [results.SCHEMA + 1, None, "1"])
def test_another_schema_is_refused(tmp_path: Path, schema: Any):
    run = fresh(tmp_path / "run")
    write_json(run.path / "provenance.json", {"schema": schema})
    with pytest.raises(RunError, match=rf"has schema {schema}; this cssbench reads schema {results.SCHEMA}"):
        RunFolder.read(run.path)


def test_the_schema_is_looked_at_before_the_settings(tmp_path: Path):
    """A later version may hold settings that this one does not know; that is not the user's mistake."""
    run = fresh(tmp_path / "run")
    (run.path / "config.toml").write_text("later = 1")
    with pytest.raises(ConfigError, match=r"config\.toml is not valid.*unknown key 'later'"):
        RunFolder.read(run.path)
    write_json(run.path / "provenance.json", {"schema": 99})
    with pytest.raises(RunError, match="has schema 99"):
        RunFolder.read(run.path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.toml", b"seed = ", r"config\.toml is damaged"),
        ("config.toml", b"note = '\xff'", r"config\.toml is damaged"),
        ("provenance.json", b'{"schema": 1', r"provenance\.json is damaged"),
        ("provenance.json", b"[]", "is damaged: provenance.json or scenario.json lacks"),
        ("provenance.json", None, r"provenance\.json is missing"),
        ("scenario.json", b"\xff\xfe", r"scenario\.json is damaged"),
        ("scenario.json", None, r"scenario\.json is missing"),
        ("scenario.json", b"{}", "is damaged"),
        ("scenario.json", b'{"name": "a", "dataset": "b", "mode": "c", "steps": []}', "is damaged"),
        ("scenario.json", b'{"name": "a", "dataset": "b", "mode": "c", "steps": [{"new": ["../x"]}]}', "is damaged"),
        ("scenario.json", b'{"name": "a", "dataset": "b", "mode": "c", "steps": [{"new": [0]}]}', "is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, file: str, content: bytes | None, message: str):
    run = fresh(tmp_path / "run")
    if content is None:
        (run.path / file).unlink()
    else:
        (run.path / file).write_bytes(content)
    with pytest.raises(RunError, match=message):
        RunFolder.read(run.path)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"sha256": 3}', b'{"sha256"', b""])
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    (run.step_folder(0) / "record.json").write_bytes(content)
    with pytest.raises(RunError, match=r"record\.json is damaged"):
        run.records()


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "matrices.npz"])
@pytest.mark.parametrize("damage", [change, lambda p: p.write_bytes(p.read_bytes()[:-1]), Path.unlink])
def test_a_changed_truncated_or_missing_file_is_found(tmp_path: Path, name: str, damage: Any):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    finish(run, 1)
    damage(run.step_folder(0) / name)
    first, second = run.records()
    with pytest.raises(RunError, match=rf"{name} is missing or does not match its checksum.*Remove .*00 to train"):
        run.verify(first)
    run.verify(second)
    run.verify(first, ({"model.safetensors", "matrices.npz"} - {name}).pop())  # the other file is sound
    with pytest.raises(RunError, match="does not match its checksum"):
        run.verify(first, name)


def test_a_file_without_a_checksum_is_not_trusted(tmp_path: Path):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    (run.step_folder(0) / "late.bin").write_bytes(b"x")
    with pytest.raises(RunError, match=r"late\.bin is missing or does not match"):
        run.verify(run.records()[0], "late.bin")


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "..", "a/../../b", ".hidden", "a\\b", "", "a\n", "a\0"]
)
def test_names_from_a_record_never_leave_the_step(tmp_path: Path, name: str):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    path = run.step_folder(0) / "record.json"
    record = read_json(path)
    record["sha256"][name] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match="cannot be used as a file name"):
        run.verify(run.records()[0])


def test_safe_names():
    for name in ("a", "a.b-c_d.png", "0", "_x", "img.0001", "-".join("abc")):
        assert safe_name(name) == name
    for name in ("", ".", "..", ".a", "a.", "-a", "a..b", "a/b", "a b", "ä", "a\n", "\n", "a:b"):
        with pytest.raises(RunError, match="cannot be used as a file name"):
            safe_name(name)


def test_every_image_has_a_file_name_of_its_own():
    """Image files are named by users; a blank in a name must not end a run after hours of training."""
    assert image_name("img_0001.left") == "img_0001.left"
    odd = ["img 1", "img_1", "img/1", "img-1 ", "Bild ä", "Bild ö", "..", "../x", ".x", "x" * 3 + "/" * 200, "日本"]
    names = [image_name(stem) for stem in odd]
    assert [safe_name(name) for name in names] == names
    assert len(set(names)) == len(odd)
    assert max(map(len, names)) < 100
    assert names == [image_name(stem) for stem in odd]


def half_written(path: Path, failure: type[BaseException]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise failure


def test_a_failing_block_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    for failure in (KeyError, KeyboardInterrupt):
        with pytest.raises(failure):
            half_written(path, failure)
        assert files(tmp_path) == {"file": b"old"}  # and nothing beside it
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"  # until the block ends
    assert files(tmp_path) == {"file": b"new"}


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path):
    write_bytes(tmp_path / "file", b"old")
    with pytest.raises(RunError, match="could not be written"), atomic_path(tmp_path / "file"):
        pass
    assert files(tmp_path) == {"file": b"old"}


def test_a_file_in_the_way_of_a_folder_is_told_as_such(tmp_path: Path):
    (tmp_path / "steps").write_bytes(b"in the way")
    with pytest.raises(RunError, match=r"could not be written: (File exists|Not a directory)"):
        write_bytes(tmp_path / "steps" / "00" / "record.json", b"")
    with pytest.raises(RunError, match="could not be written"):
        write_bytes(tmp_path / "steps" / "record.json", b"")


def test_json_holds_no_nan(tmp_path: Path):
    write_json(tmp_path / "a.json", {"a": [1, None, "ä"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "ä"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "ä"]}


def test_sha256_of_a_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_a_killed_process_left_is_no_part_of_the_step(tmp_path: Path):
    """A temporary file once listed in the record would fail every later verification."""
    run = fresh(tmp_path / "run")
    run.step_folder(0).mkdir(parents=True)
    (run.step_folder(0) / ".model.safetensors.4711.tmp").write_bytes(b"cut short")
    finish(run, 0)
    assert run.records()[0].content["sha256"].keys() == {"model.safetensors", "matrices.npz"}
    run.verify(run.records()[0])
    assert not list(run.step_folder(0).glob(".*"))


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "pickle", "missing"])
def test_damaged_matrices_are_named(tmp_path: Path, damage: str):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    path = run.step_folder(0) / "matrices.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "pickle":  # an array of objects is a pickle: refused, not run
        np.savez(path, **{"full.all": np.array([{"a": 1}], dtype=object)})  # type: ignore[arg-type]
    else:
        path.write_bytes({"empty": b"", "text": b"not a zip", "truncated": path.read_bytes()[:-30]}[damage])
    with pytest.raises(RunError, match=r"matrices\.npz is missing or damaged"):
        _ = run.records()[0].matrices


def test_samples_are_found_by_name(tmp_path: Path):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    assert run.records()[0].samples() == {}
    for name in ("b.png", "a.x.png", "c.txt"):
        write_bytes(run.step_folder(0) / "samples" / name, b"")
    assert list(run.records()[0].samples()) == ["a.x", "b"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write stops half way with ENOSPC."""

    def write(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("what", ["weights", "state", "record", "config"])
def test_a_full_disk_leaves_the_old_files(tmp_path: Path, request: pytest.FixtureRequest, what: str):
    run = fresh(tmp_path / "run")
    step = run.step_folder(0)
    checkpoint.save_weights(step / "model.safetensors", Net())
    checkpoint.save_state(step / "method.safetensors", STATE)
    run.finish_step(0, {"full.all": MATRIX}, {"images": 1})
    before = files(run.path)
    other = RunFolder(tmp_path / "other", CONFIG, SCENE, {})
    writing = {
        "weights": lambda: checkpoint.save_weights(step / "model.safetensors", Net(width=5)),
        "state": lambda: checkpoint.save_state(step / "method.safetensors", {"new": 1}),
        "record": lambda: run.finish_step(0, {"full.all": 2 * MATRIX}, {"images": 2}),
        "config": other.create,
    }[what]
    request.getfixturevalue("full_disk")
    with pytest.raises(RunError, match=r"could not be written: No space left on device.*untouched.*free disk space"):
        writing()
    assert files(run.path) == before  # the same bytes, and no half file beside them
    assert files(tmp_path / "other") == {}
    run.verify(run.records()[0])


def test_a_folder_without_permission_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="could not be written: Permission denied"):
        write_bytes(tmp_path / "file", b"x")
    assert files(tmp_path) == {}


def test_a_copied_run_folder_is_the_same_run(tmp_path: Path):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    copy = RunFolder.read(shutil.copytree(run.path, tmp_path / "copy"))
    copy.verify(copy.records()[0])
    assert copy.config == run.config


def test_matrices_are_kept_without_pickles(tmp_path: Path):
    run = fresh(tmp_path / "run")
    finish(run, 0)
    with zipfile.ZipFile(run.step_folder(0) / "matrices.npz") as archive:
        assert set(archive.namelist()) == {"full.all.npy", "crop.foreground.upto0.npy"}
