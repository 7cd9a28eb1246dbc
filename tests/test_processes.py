"""`cssbench` on several processes: started by itself or by torchrun, ended together, with one message."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from many_processes import recipe_of, torchrun, what_went_wrong

from cssbench import engine, processes
from cssbench.config import TrainConfig
from cssbench.errors import ConfigError
from cssbench.results import RunFolder

BROKEN = "optim.lr=1e30"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recipe_of(tmp_path, "finetune")
    return tmp_path


def cssbench(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, "-m", "cssbench", *words]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )


def test_alone_without_an_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.world(), processes.rank(), processes.local_world()) == (1, 0, 1)
    assert processes.first_to_fail()
    with pytest.raises(SystemExit) as end:
        processes.leave(3)
    assert end.value.code == 3


def test_what_torchrun_tells(monkeypatch: pytest.MonkeyPatch):
    """Eight processes on two machines."""
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (processes.world(), processes.rank(), processes.local_world()) == (8, 5, 4)


def test_several_devices_need_processes():
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        engine.make_fabric(TrainConfig(iterations=1, accelerator="cpu", devices=2))


@pytest.mark.parametrize(
    "options", [{"compile": True}, {"channels_last": True}, {"precision": "16-mixed"}], ids=lambda o: next(iter(o))
)
def test_what_sharding_does_not_go_with(options: dict[str, object]):
    train = TrainConfig(iterations=1, strategy="fsdp", **options)  # type: ignore[arg-type]
    engine.check_strategy(train, 1)
    with pytest.raises(ConfigError, match="does not go with train"):
        engine.check_strategy(train, 2)


def test_one_gpu_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    engine._check_gpus(TrainConfig(iterations=1), 2)
    engine._check_gpus(TrainConfig(iterations=1, accelerator="cpu"), 4)
    with pytest.raises(ConfigError, match="4 processes on a machine with 2 GPUs"):
        engine._check_gpus(TrainConfig(iterations=1), 4)


def test_one_process_fails_and_one_speaks(folder: Path):
    """Their batches differ, so that each names images of its own; the one that was first is heard."""
    done = cssbench(folder, "run", "finetune.toml", "--out", "run", "--set", "train.devices=2", "--set", BROKEN)
    assert done.returncode == 2
    assert done.stderr.count("Error:") == 1, done.stderr
    assert "is not finite at step 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_started_by_the_command(folder: Path):
    """Run, stopped and resumed by other numbers of processes, then evaluated again."""
    done = cssbench(folder, "run", "finetune.toml", "--out", "run", "--set", "train.devices=2")
    assert done.returncode == 0, done.stderr
    run = RunFolder.read(folder / "run")
    assert run.finished
    assert run.provenance["processes"] == 2
    assert "Initializing" not in done.stderr
    assert done.stderr.count("step 0:") == 1

    record = run.records()[1]
    (record.folder / "record.json").unlink()
    done = torchrun(4, "-m", "cssbench", "resume", str(run.path))
    assert done.returncode == 0, what_went_wrong(done)
    again = RunFolder.read(folder / "run").records()[1]
    for key, matrix in record.matrices.items():
        np.testing.assert_array_equal(again.matrices[key].sum(1), matrix.sum(1))

    done = torchrun(2, "-m", "cssbench", "evaluate", str(run.path), "--out", str(folder / "again"))
    assert done.returncode == 0, what_went_wrong(done)
    evaluated = RunFolder.read(folder / "again")
    assert evaluated.finished
    for key, matrix in again.matrices.items():
        np.testing.assert_array_equal(evaluated.records()[1].matrices[key], matrix)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_shared_base_steps(folder: Path, shared: bool):
    """Two runs of one store on two processes: the second takes the step of the first, bit for bit."""
    for name in ("first", "second"):
        words = ["-m", "cssbench", "run", str(folder / "finetune.toml"), "--out", str(folder / name)]
        done = torchrun(2, *words, *(["--shared", str(folder / "store")] if shared else []))
        assert done.returncode == 0, what_went_wrong(done)
    first, second = (RunFolder.read(folder / name).records() for name in ("first", "second"))
    assert ("shared" in second[0].content) == shared
    for one, other in zip(first, second, strict=True):
        assert one.content["sha256"]["model.safetensors"] == other.content["sha256"]["model.safetensors"]
        for key, matrix in one.matrices.items():
            np.testing.assert_array_equal(other.matrices[key], matrix)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "finetune.toml", "--out", "run", "--set", "train.accumulate=3"], "does not divide by"),
        (["run", "finetune.toml", "--out", "run", "--nonsense"], "No such option"),
        (["run", "nothing.toml", "--out", "run"], "nothing"),
        (["run", "finetune.toml", "--out", "run", "--data", "nowhere/at/all"], "nowhere"),
    ],
)
def test_a_mistake_is_told_once(folder: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    if "--data" in words:
        (folder / "nowhere").write_text("a file, no folder")
    done = torchrun(2, "-m", "cssbench", *words)
    assert done.returncode == 1  # torchrun's
    assert what_went_wrong(done).count(says) == 1, done.stderr
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_stopped_inside_a_step(folder: Path, strategy: str):
    """SIGTERM, then the rest on two processes: the weights of a run that was not stopped, bit for bit."""
    words = ["run", "finetune.toml", "--set", "train.devices=2", "--set", f"train.strategy={strategy}"]
    words += ["--set", "train.iterations=30", "--set", "checkpoint.iterations=3", "--out"]
    done = cssbench(folder, *words, "whole")
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cssbench", *words, "stopped"]
    running = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("stopped/steps/00/training/*.json")) and running.poll() is None:
        time.sleep(0.01)
    running.terminate()
    _, said = running.communicate(timeout=120)
    assert running.returncode == 143, said
    assert said.count("Stopped by SIGTERM") == 1, said
    done = cssbench(folder, "resume", "stopped")
    assert done.returncode == 0, done.stderr
    whole, stopped = (RunFolder.read(folder / name).records() for name in ("whole", "stopped"))
    assert "resumed" in stopped[0].content
    for one, other in zip(whole, stopped, strict=True):
        assert one.content["sha256"]["model.safetensors"] == other.content["sha256"]["model.safetensors"]
