"""The store of a frozen encoder's outputs: round trip, damage, bound, eviction, digests."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_segvit import SCENARIO, make_model

from cssbench.errors import ConfigError
from cssbench.features import GIB, FeatureStore, encoder_digest, key_of, path_of, read_tensors, size_of, store_folder

BIG = 1.0
TENSORS = {"tap0": torch.arange(6.0).view(2, 3).bfloat16(), "depths": torch.tensor([[1, 2]])}


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every store is left again."""
    stores: list[FeatureStore] = []
    hold = FeatureStore._hold
    monkeypatch.setattr(FeatureStore, "_hold", lambda self: (stores.append(self), hold(self)))
    yield
    for store in stores:
        store.__exit__()


def filled(root: Path, encoder: str, files: int, kib: int = 10, gib: float = BIG) -> FeatureStore:
    store = FeatureStore(root, encoder, gib)
    for number in range(files):
        store.write(key_of(encoder, number), {"x": torch.zeros(kib * 256)})
    return store


def test_what_is_written_comes_back_bit_by_bit(tmp_path: Path):
    with FeatureStore(tmp_path, "a" * 64, BIG) as store:
        store.write("0f", TENSORS)
        found = store.read("0f")
        assert found is not None
        assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
            "tap0": (torch.bfloat16, [[0, 1, 2], [3, 4, 5]]),
            "depths": (torch.int64, [[1, 2]]),
        }
        assert store.read("0e") is None
        assert store.counts() == {"read": 1, "written": 1, "bytes": path_of(store.folder, "0f").stat().st_size}
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut short", "a bit flipped", "empty", "no checksum"])
def test_a_damaged_file_counts_as_missing_and_is_replaced(tmp_path: Path, damage: str):
    store = FeatureStore(tmp_path, "a" * 64, BIG)
    store.write("0f", TENSORS)
    path = path_of(store.folder, "0f")
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(
        {
            "cut short": content[:-3],
            "a bit flipped": flipped,
            "empty": b"",
            "no checksum": content.replace(b"crc32", b"crc33"),
        }[damage]
    )
    assert read_tensors(store.folder, "0f") is None
    store.write("0f", TENSORS)
    assert read_tensors(store.folder, "0f") is not None


def test_the_bound_holds_and_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = filled(tmp_path, "a", 10, kib=10, gib=35 * 1024 / GIB)
    assert store.written_files == 3, "three files of 10 KiB and their headers fit into 35 KiB"
    assert size_of(tmp_path) <= 35 * 1024
    assert read_tensors(store.folder, key_of("a", 2)) is not None
    assert read_tensors(store.folder, key_of("a", 3)) is None
    assert capsys.readouterr().err.count("no more features are kept") == 1


def test_other_encoders_make_room_oldest_first_unless_they_are_in_use(tmp_path: Path):
    stores = {name: filled(tmp_path, name, 2) for name in ("old", "older", "used")}
    for age, name in enumerate(("old", "older")):
        stores[name].__exit__()
        os.utime(stores[name].folder, (1000 - age, 1000 - age))
    os.utime(stores["used"].folder, (1, 1))
    filled(tmp_path, "new", 1, gib=65 * 1024 / GIB)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old", "used"]
    new = filled(tmp_path, "new", 5, gib=75 * 1024 / GIB)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "used"]
    assert new.written_files == 5


def test_leavings_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path: Path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = FeatureStore(tmp_path, "a", BIG).folder
    dead, alive = (folder / f".k.safetensors.{pid}.tmp" for pid in (gone.pid, os.getpid()))
    for path in (dead, alive):
        path.write_bytes(b"xy")
    assert size_of(tmp_path) == 2
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_full_disk_stops_storing_and_nothing_else(tmp_path: Path, monkeypatch, capsys):
    store = filled(tmp_path, "a", 1)

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    store.write("0f", TENSORS)
    store.write("0e", TENSORS)
    assert store.full
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert read_tensors(store.folder, key_of("a", 0)) is not None


def test_the_estimate_is_told_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = FeatureStore(tmp_path, "a", BIG)
    tensors = {"x": torch.zeros(2**18, dtype=torch.bfloat16)}  # half a MiB
    store.announce("features", 100, tensors)
    store.announce("features", 100, tensors)
    told = capsys.readouterr().err
    assert told.count("up to 50.0 MiB") == 1
    assert "more than fits" not in told
    other = FeatureStore(tmp_path, "b", BIG)
    other.announce("features", 3000, tensors)
    assert "more than fits" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache.folder .* cannot be made"):
        store_folder(str(tmp_path / "file" / "store"))


def test_an_encoder_is_its_weights_and_settings_not_its_heads():
    model = make_model()
    for step in SCENARIO.steps[:2]:
        model.grow(step)
    settings = {"precision": "32-true"}
    before = encoder_digest(model, settings)
    with torch.no_grad():
        model.heads[1].tokens.weight.add_(1)
    assert encoder_digest(model, settings) == before
    assert encoder_digest(model, {"precision": "bf16-mixed"}) != before
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1e-3)
    assert encoder_digest(model, settings) != before
