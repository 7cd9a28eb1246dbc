"""One run on several processes, started by torchrun with gloo on the CPU, against one process."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import many_processes
import numpy as np
import pytest
import torch
from many_processes import JOBS
from safetensors.torch import load_file

from cssbench.results import RunFolder

# Weights after two steps of two iterations of Adam at a rate of 2e-3. Adam divides gradients by their size, so that
# rounding moves a weight whose gradient is next to nothing by up to 2e-3 an iteration: no more than a few do.
TOLERANCE, LARGEST, FEW = 1e-5, 1e-3, 1e-3
DEFAULT = ["finetune", "segvit-cl, cached", "reminder", "fsdp", "holdout"]
AGAIN = ["finetune", "holdout", "dtop"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs of `DEFAULT` on one process and on two."""
    folder, threads = tmp_path_factory.mktemp("devices"), torch.get_num_threads()
    alone(folder, [*DEFAULT, "dtop"])
    done = many_processes.start_all(folder, 2, DEFAULT, AGAIN)
    assert done.returncode == 0, many_processes.what_went_wrong(done)
    yield folder
    torch.set_num_threads(threads)


def alone(folder: Path, names: list[str]) -> None:
    for name in names:
        many_processes.recipe_of(folder, name)
    many_processes.make(folder, 1, names)


def rows(run: RunFolder, step: int) -> list[tuple[str, str, float]]:
    with (run.path / "logs" / f"train-{step:02d}.csv").open(newline="") as file:
        return [(row["iteration"], row["name"], float(row["value"])) for row in csv.DictReader(file)]


def close(found: RunFolder, expected: RunFolder) -> None:
    """Weights, matrices, numbers, logs and pictures of two runs that should have done the same."""
    assert found.finished
    for new, old in zip(found.records(), expected.records(), strict=True):
        apart, weights = [], load_file(new.folder / "model.safetensors")
        for name, tensor in load_file(old.folder / "model.safetensors").items():
            assert weights[name].shape == tensor.shape
            apart.append((weights[name].float() - tensor.float()).abs().flatten())
        differences = torch.cat(apart)
        assert differences.max() < LARGEST, new.index
        assert (differences > TOLERANCE).float().mean() < FEW, new.index
        state = load_file(new.folder / "method.safetensors")
        for name, tensor in load_file(old.folder / "method.safetensors").items():
            torch.testing.assert_close(state[name], tensor, atol=1e-3, rtol=1e-3)
        for key, matrix in old.matrices.items():
            np.testing.assert_array_equal(new.matrices[key].sum(1), matrix.sum(1))
            assert np.abs(new.matrices[key] - matrix).sum() <= 0.01 * matrix.sum(), key
        same_numbers(new.content, old.content)
        for (*key, value), (*other, logged) in zip(rows(found, new.index), rows(expected, old.index), strict=True):
            assert key == other
            assert value == pytest.approx(logged, rel=2e-3, abs=1e-5)
        assert [p.name for p in new.samples().values()] == [p.name for p in old.samples().values()]
        assert new.samples()


def same_numbers(new: dict[str, Any], old: dict[str, Any]) -> None:
    for name in ("images", "iterations", "evaluated_images", "parameters"):
        assert new[name] == old[name]
    assert new["loss"] == pytest.approx(old["loss"], rel=2e-3)
    assert new["gflops"]["per_image"] == pytest.approx(old["gflops"]["per_image"], rel=1e-3)
    assert new.keys() == old.keys()
    for name in ("cache", "evaluation_cache"):
        if name in old:
            for count in ("read", "written", "encoded", "views"):
                assert new[name].get(count) == old[name].get(count)


@pytest.mark.parametrize("name", DEFAULT)
def test_two_processes_give_the_run_of_one(runs: Path, name: str):
    close(RunFolder.read(runs / "2" / name), RunFolder.read(runs / "1" / name))


@pytest.mark.parametrize("name", AGAIN)
def test_two_processes_evaluate_to_the_last_pixel(runs: Path, name: str):
    """Also where there are fewer images than processes, and of tokens that stop on their way."""
    exact(RunFolder.read(runs / "2" / f"{name} again"), RunFolder.read(runs / "1" / name))


def exact(found: RunFolder, expected: RunFolder) -> None:
    for new, old in zip(found.records(), expected.records(), strict=True):
        assert new.matrices.keys() == old.matrices.keys()
        for key, matrix in old.matrices.items():
            np.testing.assert_array_equal(new.matrices[key], matrix, err_msg=key)
        assert (new.tokens, new.gflops) == (old.tokens, old.gflops)
        for mine, its in ((new.samples(), old.samples()), (new.depth_maps(), old.depth_maps())):
            assert {stem: path.read_bytes() for stem, path in mine.items()} == {
                stem: path.read_bytes() for stem, path in its.items()
            }


def test_a_step_is_sharded_only_while_it_trains_the_encoder(runs: Path):
    """Its checkpoint is a plain one: names and shapes as of any run."""
    sharded, whole = (RunFolder.read(runs / "2" / name) for name in ("fsdp", "finetune"))
    for one, other in zip(sharded.records(), whole.records(), strict=True):
        shapes = [
            {name: t.shape for name, t in load_file(r.folder / "model.safetensors").items()} for r in (one, other)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_all_jobs(tmp_path: Path, world: int):
    alone(tmp_path, list(JOBS))
    done = many_processes.start_all(tmp_path, world, list(JOBS), list(JOBS))
    assert done.returncode == 0, many_processes.what_went_wrong(done)
    for name in JOBS:
        close(RunFolder.read(tmp_path / str(world) / name), RunFolder.read(tmp_path / "1" / name))
        exact(RunFolder.read(tmp_path / str(world) / f"{name} again"), RunFolder.read(tmp_path / "1" / name))
