"""Loggers: what they are told, what a resumed run goes on with, and that none of them ends a training."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strangers import Install
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import LINEAR, build, make_recipe, start

from cssbench import logs, scoring
from cssbench.errors import ConfigError, UnknownNameError
from cssbench.loggers import flat, require
from cssbench.logs import LoggedRun, Logger, RunLog, StepLog
from cssbench.protocol import DEFAULTS, get
from cssbench.results import RunFolder
from cssbench.task_loop import run


class Told(Logger):
    """Keeps what it is told."""

    def __init__(self, logged: LoggedRun):
        super().__init__(logged)
        self.calls: list[tuple[Any, ...]] = []

    def start_step(self, *values: Any) -> None:
        self.calls.append(("start_step", *values))

    def scalar(self, *values: Any) -> None:
        self.calls.append(("scalar", *values))

    def close(self) -> None:
        self.calls.append(("close",))


class Broken(Told):
    def scalar(self, *values: Any) -> None:
        raise ConnectionError("no route to host")


def logged(folder: Path) -> LoggedRun:
    return LoggedRun(folder, {"seed": 3, "train": {"batch_size": 4}}, "trial", (5, 2, 2))


def test_iterations_of_all_steps_are_on_one_axis(tmp_path: Path):
    assert [logged(tmp_path).overall(*at) for at in ((0, 0), (0, 4), (1, 0), (2, 1))] == [0, 4, 5, 8]


def test_a_logger_is_told_what_the_csv_holds(tmp_path: Path):
    log = RunLog.open(logged(tmp_path), {"told": Told})
    told = log.loggers["told"]
    with log:
        step = StepLog(tmp_path, 1, start=3, run_log=log)
        for iteration in (2, 3):  # 2 was logged before the run stopped
            step("ce", 0.5, iteration)
        StepLog(tmp_path, 1, enabled=False, run_log=log)("ce", 9.0, 4)
    assert told.calls == [("start_step", 1, 3), ("scalar", "ce", 0.5, 1, 3), ("close",)]  # type: ignore[attr-defined]


def test_a_logger_that_fails_is_named_once_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with RunLog.open(logged(tmp_path), {"broken": Broken, "told": Told}) as log:
        told, broken = log.loggers["told"], log.loggers["broken"]
        step = StepLog(tmp_path, 0, run_log=log)
        step("ce", 1.0, 0)
        step("ce", 2.0, 1)
        assert list(log.loggers) == ["told"]
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("'broken' failed (ConnectionError: no route to host") == 1
    assert len(told.calls) == 4  # type: ignore[attr-defined]
    assert ("close",) not in broken.calls  # type: ignore[attr-defined]
    assert (tmp_path / "train-00.csv").read_text().splitlines()[1:] == ["0,0,ce,1.0", "0,1,ce,2.0"]


def test_a_logger_that_cannot_be_built_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Refusing(Logger):
        def __init__(self, logged: LoggedRun):
            raise PermissionError("log in first")

    assert RunLog.open(logged(tmp_path), {"refusing": Refusing}).loggers == {}
    assert "log in first" in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = make_recipe(tmp_path_factory.mktemp("logged"), LINEAR)
    made["evaluate"] |= {"flops_images": 0, "geometries": ["full"]}
    made["train"] |= {"log_every": 1}
    return made


def expected(folder: RunFolder, index: int) -> dict[str, float]:
    """Scores of a step from its stored matrices."""
    found: dict[str, float] = {}
    for protocol in map(get, DEFAULTS):
        record = folder.records()[index]
        if protocol.key in record.matrices:
            scores = scoring.step_scores(folder, record, protocol)
            found |= {f"{k}/{protocol.id}": v for k in ("base", "incremental", "all") if (v := scores[k]) is not None}
    assert found
    return found


def test_tensorboard_holds_losses_scores_and_samples(recipe: dict[str, Any], tmp_path: Path):
    folder = start(recipe, tmp_path / "run")
    events = tmp_path / "run" / "logs" / "tensorboard"
    losses = EventAccumulator(str(events / "step-01")).Reload()
    assert [event.step for event in losses.Scalars("ce")] == [0, 1]
    scores = EventAccumulator(str(events / "scores")).Reload()
    for name, value in expected(folder, 1).items():
        assert scores.Scalars(f"mIoU/{name}")[-1].value == pytest.approx(value)
        assert scores.Scalars(f"mIoU/{name}")[-1].step == 1
    image = scores.Images(scores.Tags()["images"][0])[-1]
    assert (image.height, image.width) == (32, 96), "image, truth and prediction side by side"


def test_a_sample_shows_image_truth_and_prediction(recipe: dict[str, Any], tmp_path: Path):
    folder = start(recipe, tmp_path / "run", "log.loggers=[]")
    assert not (tmp_path / "run" / "logs" / "tensorboard").exists()
    record = folder.records()[1]
    stem = next(iter(record.samples()))
    triple = logs.sample_triple(folder.path, record.folder, stem)
    assert triple is not None
    made = build(recipe, tmp_path / "other")
    assert np.array_equal(triple[:, :32], made.data.image("val", stem))
    colours = np.concatenate([np.zeros((1, 3), np.uint8), made.data.palette])
    assert np.array_equal(triple[:, 32:64], colours[made.data.label("val", stem)])
    assert logs.sample_triple(folder.path, record.folder, "missing") is None


def stop_and_resume(recipe: dict[str, Any], out: Path, name: str) -> RunFolder:
    """A run that ends after step 0, and goes on in another process's stead."""
    made = build(recipe, out, f"log.loggers=['{name}']")
    made.folder.create()
    steps = made.scenario.steps
    made.scenario.__dict__["steps"] = steps[:1]  # the loop ends there
    run(made)
    from cssbench.experiment import build_experiment

    run(build_experiment(made.config, out))
    return RunFolder.read(out)


@pytest.mark.filterwarnings("default")
def test_mlflow_goes_on_in_the_same_run(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = stop_and_resume(recipe, tmp_path / "run", "mlflow")
    store = tmp_path / "run" / "logs"
    client = tracking.MlflowClient((store / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("cssbench")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (store / "mlflow-run").read_text()
    assert found.info.status == "FINISHED"
    assert found.data.params["train.batch_size"] == "4"
    assert [m.step for m in client.get_metric_history(found.info.run_id, "train/ce")] == [0, 1, 2, 3]
    for name, value in expected(folder, 1).items():
        history = client.get_metric_history(found.info.run_id, f"mIoU/{name.replace('@', '-')}")
        assert history[-1].value == pytest.approx(value)
        assert history[-1].step == 1
    assert len(client.list_artifacts(found.info.run_id, "samples/step-01")) == 2


@pytest.mark.filterwarnings("default")
def test_wandb_goes_on_in_the_same_run(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = stop_and_resume(recipe, tmp_path / "run", "wandb")
    wandb.teardown()  # its process has ended, and its files are whole
    store = tmp_path / "run" / "logs"
    files = sorted(store.glob("wandb/offline-run-*/run-*.wandb"))
    identity = (store / "wandb-run").read_text()
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{identity}"}
    for _ in range(300):  # its own process writes, and may do so after `finish` has returned
        rows = [row for file in files for row in read_wandb(file)]
        if sum(any(key.startswith("samples/") for key in row) for row in rows) == 4:
            break
        time.sleep(0.1)
    assert [row["iteration"] for row in rows if "train/ce" in row] == [0, 1, 2, 3]
    last = next(row for row in reversed(rows) if any(key.startswith("mIoU/") for key in row))
    assert last["step"] == 1
    for name, value in expected(folder, 1).items():
        assert last[f"mIoU/{name}"] == pytest.approx(value)
    assert any(key.startswith("samples/") for row in rows for key in row)


def read_wandb(path: Path) -> list[dict[str, Any]]:
    """The logged rows of an offline run: a file of LevelDB's log format (blocks of 32 KiB; of each chunk checksum,
    length and kind; kinds 1 whole, 2 first, 3 middle, 4 last part of a record) after 7 bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    rows = []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_a_logger_of_a_stranger(recipe: dict[str, Any], tmp_path: Path, install: Install):
    source = (
        "from cssbench.api import Logger\n"
        "class Lines(Logger):\n"
        "    def scores(self, step, scores):\n"
        "        with (self.run.folder / 'lines.txt').open('a') as file: print(step, len(scores), file=file)\n"
    )
    install("line-pack", {"loggers": {"lines": "line_pack:Lines"}}, {"line_pack.py": source})
    folder = start(recipe, tmp_path / "run", "log.loggers=['lines']")
    lines = [f"{t} {len(expected(folder, t))}" for t in (0, 1)]
    assert (tmp_path / "run" / "lines.txt").read_text().splitlines() == lines


def test_mistakes_are_told_before_anything_is_written(recipe: dict[str, Any], tmp_path: Path):
    with pytest.raises(UnknownNameError, match=r"no logger named 'wandbb'.*'wandb'"):
        build(recipe, tmp_path / "run", "log.loggers=['wandbb']")
    with pytest.raises(ConfigError, match="list each logger once"):
        build(recipe, tmp_path / "run", "log.loggers=['wandb', 'wandb']")
    with pytest.raises(ConfigError, match=r'pip install "cssbench\[mlflow\]"'):
        require("no_such_module", "mlflow")
    assert not (tmp_path / "run").exists()


def test_settings_under_dotted_names():
    assert flat({"a": 1, "b": {"c": {"d": 2}, "e": [3]}}) == {"a": 1, "b.c.d": 2, "b.e": [3]}
