"""Checkpoints: weights and states of methods survive; what is damaged, hostile or does not fit is refused."""

from __future__ import annotations

import io
import math
import os
import pickle
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import STATE, Net, files
from torch import nn

from cssbench import checkpoint
from cssbench.errors import RunError


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_weights_survive(tmp_path: Path):
    saved, loaded = Net(), Net()
    with torch.no_grad():
        for tensor in saved.state_dict().values():
            tensor.add_(1)  # buffers too
    saved.first.weight.data = saved.first.weight.data.to(memory_format=torch.channels_last)
    assert not same_state(saved, loaded)
    checkpoint.save_weights(tmp_path / "m.safetensors", saved)
    checkpoint.load_weights(tmp_path / "m.safetensors", loaded)
    assert same_state(saved, loaded)
    assert loaded.norm.num_batches_tracked == 1
    assert files(tmp_path).keys() == {"m.safetensors"}


def test_tied_weights_survive(tmp_path: Path):
    """safetensors alone refuses tensors that share memory, and a run would end after its first step."""

    def tied() -> Net:
        net = Net()
        net.heads[1].weight = net.heads[0].weight
        return net

    saved, loaded = tied(), tied()
    saved.heads[0].weight.data.add_(1)
    checkpoint.save_weights(tmp_path / "m", saved)
    checkpoint.load_weights(tmp_path / "m", loaded)
    assert same_state(saved, loaded)
    assert loaded.heads[0].weight is loaded.heads[1].weight


@pytest.mark.parametrize(
    ("other", "named"), [(Net(heads=3), r"2 tensors.*'heads\.2\.bias'"), (Net(heads=1), r"2 tensors.*'heads\.1\.bias'"),
                         (Net(width=4), r"8 tensors.*'first\.bias'")]
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(tmp_path: Path, other: Net, named: str):
    checkpoint.save_weights(tmp_path / "m", Net())
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(RunError, match=rf"does not fit the model of this configuration: {named}"):
        checkpoint.load_weights(tmp_path / "m", other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_damaged_weights_are_refused(tmp_path: Path):
    path = tmp_path / "m"
    checkpoint.save_weights(path, Net())
    whole = path.read_bytes()
    for content in (b"", b"x", whole[:-1], whole[:50], b"\xff" * 8 + whole[8:], whole[:8] + b"#" + whole[9:]):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"checkpoint .* cannot be read .*Remove its step to train it again"):
            checkpoint.load_weights(path, Net())
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load_weights(path, Net())


def test_state_survives(tmp_path: Path):
    checkpoint.save_state(tmp_path / "method.safetensors", STATE)
    found = checkpoint.load_state(tmp_path / "method.safetensors")
    assert found.keys() == STATE.keys()
    assert torch.equal(found["prototypes"], STATE["prototypes"])
    assert torch.equal(found["nested"]["a"]["b"], torch.tensor([True, False]))
    assert found["nested"][3] == "x"
    assert torch.equal(found["noise"], STATE["noise"].contiguous())
    assert found["noise"].dtype == torch.bfloat16
    assert math.isnan(found["odd"][0])
    rest = ("counts", "number", "flag", "nothing", "pair")
    assert {k: found[k] for k in rest} == {k: STATE[k] for k in rest}
    checkpoint.save_state(tmp_path / "method.safetensors", {})
    assert checkpoint.load_state(tmp_path / "method.safetensors") == {}


class Runs:
    """Unpickled by plain pickle, it would run a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: {"ok": 1, "model": nn.Linear(1, 1)}, r"state\['model'\] is of type Linear"),
        (lambda p: {"f": [1, {"g": lambda: 1}]}, r"state\['f'\]\[1\]\['g'\] is of type function"),
        (lambda p: {"path": p}, r"state\['path'\] is of type \w*Path"),
        (lambda p: {"array": np.ones(2)}, r"state\['array'\] is of type ndarray"),
        (lambda p: {"rows": (x for x in [])}, r"state\['rows'\] is of type generator"),
        (lambda p: {"run": Runs(p)}, r"state\['run'\] is of type Runs"),
        (lambda p: {"x": {p: 1}}, r"a key of state\['x'\] is of type \w*Path"),
        (lambda p: {"x": np.float64(1)}, r"state\['x'\] is of type float64"),
        (lambda p: {"x": torch.ones(2).to_sparse()}, r"state\['x'\] is of type Tensor torch\.float32"),
        (lambda p: {"x": torch.ones(2, dtype=torch.complex64)}, r"state\['x'\] is of type Tensor torch\.complex64"),
    ],
    ids=["module", "function", "path", "array", "generator", "command", "key", "numpy", "sparse", "complex"],
)
def test_state_that_is_not_data_is_named_and_not_written(tmp_path: Path, make: Any, said: str):
    path, marker = tmp_path / "method.safetensors", tmp_path / "marker"
    checkpoint.save_state(path, {"old": 1})
    with pytest.raises(RunError, match=said):
        checkpoint.save_state(path, make(marker))
    assert checkpoint.load_state(path) == {"old": 1}
    assert not marker.exists()


def hostile_zip(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": Runs(marker)}, buffer)
    return buffer.getvalue()


def hostile_pickle(marker: Path) -> bytes:
    return pickle.dumps(Runs(marker), protocol=2)


@pytest.mark.parametrize("make", [hostile_zip, hostile_pickle])
def test_a_hostile_state_is_not_run(tmp_path: Path, make: Any):
    marker = tmp_path / "marker"
    path = tmp_path / "state"
    path.write_bytes(make(marker))
    with pytest.raises(RunError, match="nothing in it was run") as caught:
        checkpoint.load_state(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)
    # The file is what it should be: opened without care, it runs.
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_damaged_state_is_always_one_kind_of_error(tmp_path: Path):
    path = tmp_path / "method.safetensors"
    checkpoint.save_state(path, {"a": torch.arange(3.0), "b": ["x", 1]})
    whole, rng = path.read_bytes(), random.Random(0)
    damaged = [whole[:n] for n in range(0, len(whole) - 1, 9)]
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(4):
            content[rng.randrange(len(content))] = rng.randrange(256)
        damaged.append(bytes(content))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            checkpoint.load_state(path)
        except RunError:
            refused += 1
    assert refused > len(damaged) // 2
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load_state(path)


def header(structure: str) -> bytes:
    return safetensors.torch.save({"0": torch.ones(1)}, metadata={checkpoint.STRUCTURE: structure})


@pytest.mark.parametrize(
    "structure",
    [
        '{"dict": 1}',
        '{"tensor": "1"}',
        '{"call": []}',
        '{"dict": [[{}, 1]]}',
        '{"dict": [], "tuple": []}',
        "[" * 9999,
        "x",
    ],
)
def test_a_structure_that_cannot_be_is_refused(tmp_path: Path, structure: str):
    (tmp_path / "m").write_bytes(header(structure))
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load_state(tmp_path / "m")


def test_a_state_must_be_a_dict(tmp_path: Path):
    (tmp_path / "m").write_bytes(header("[1, 2]"))
    with pytest.raises(RunError, match="holds a list, not a dict"):
        checkpoint.load_state(tmp_path / "m")
