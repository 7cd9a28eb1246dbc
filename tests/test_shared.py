"""Shared base steps: a run that takes one up equals, bit for bit, the run that would have trained it itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
from shared_runs import MODELS, Counting, build, entries, go, make_recipe, same_runs, start

from cssbench import checkpoint, shared, task_loop, validate
from cssbench.api import ConfigError, StepContext
from cssbench.experiment import Experiment, build_experiment
from cssbench.lock import FileLock
from cssbench.results import RunFolder, content_digest, read_json

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def brief(recipe: dict[str, Any]) -> dict[str, Any]:
    """One step of one iteration."""
    name = str(Path(recipe["scenario"]["name"]).with_name("all.toml"))
    return recipe | {"scenario": {"name": name}, "train": recipe["train"] | {"iterations": 1}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The steps that were trained and evaluated, in order: {"fit": [...], "evaluate": [...]}."""
    counted: dict[str, list[int]] = {"fit": [], "evaluate": []}
    fit, evaluate = task_loop.fit, task_loop.evaluate_step

    def counting_fit(fabric: Any, ctx: StepContext, *rest: Any) -> Any:
        counted["fit"].append(ctx.step.index)
        return fit(fabric, ctx, *rest)

    def counting_evaluate(made: Experiment, step: Any) -> Any:
        counted["evaluate"].append(step.index)
        return evaluate(made, step)

    monkeypatch.setattr(task_loop, "fit", counting_fit)
    monkeypatch.setattr(task_loop, "evaluate_step", counting_evaluate)
    return counted


# --- the same results ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which fine-tuning has put its base step. Read only but for the evaluations of others."""
    folder = tmp_path_factory.mktemp("store")
    first = start(recipe, folder / "runs" / "the-first", folder / "store")
    assert "shared" not in first.records()[0].content
    same_runs(first, start(recipe, folder / "runs" / "alone", None))
    return folder / "store"


CHANGED = ("method.name=segvit-cl", "method.calibration=temperature")


@pytest.mark.parametrize(
    ("changes", "evaluated"),
    [
        (("method.name=mib",), [1]),
        (("method.name=reminder",), [1]),
        (("method.name=segvit-cl", "method.calibration=prior"), [1]),
        (CHANGED, [0, 1]),
        (("evaluate.background_threshold=0.3",), [0, 1]),
    ],
    ids=["mib", "reminder", "prior", "temperature", "other evaluation"],
)
def test_a_run_on_a_shared_base_step_equals_one_that_trained_it(recipe, store, tmp_path, calls, changes, evaluated):
    """None trains a base iteration; one evaluates anew where `end_step` moves the model or the settings differ."""
    run = start(recipe, tmp_path / "run", store, *changes)
    assert calls == {"fit": [1], "evaluate": evaluated}
    same_runs(run, start(recipe, tmp_path / "alone", None, *changes))
    assert len(entries(store)) == 1


def test_an_evaluation_after_end_step_is_shared_by_runs_with_the_same_end(recipe, store, tmp_path, calls):
    first = start(recipe, tmp_path / "first", store, *CHANGED, "train.iterations=[4, 1]")
    scale = safetensors.torch.load_file(first.step_folder(0) / "model.safetensors")["heads.0.class_scale"]
    assert scale != 1  # else the case would show nothing
    calls["evaluate"].clear()
    start(recipe, tmp_path / "second", store, *CHANGED, "train.iterations=[4, 2]")
    assert calls["evaluate"] == [1]


def test_running_statistics_are_shared_too(recipe, tmp_path, calls):
    model = recipe | {"model": {"name": "deeplabv3"} | MODELS["deeplabv3"]}
    start(model, tmp_path / "first", tmp_path / "store", "train.iterations=2")
    run = start(model, tmp_path / "run", tmp_path / "store", "train.iterations=2", "method.name=mib")
    assert calls["fit"] == [0, 1, 1]
    same_runs(run, start(model, tmp_path / "alone", None, "train.iterations=2", "method.name=mib"))


def test_the_record_tells_the_origin_and_the_full_cost(recipe, store, tmp_path):
    run = start(recipe, tmp_path / "run", store, "method.name=lwf")
    kept, content = read_json(entries(store)[0] / "numbers.json"), run.records()[0].content
    assert content["shared"] == {name: kept[name] for name in ("key", "commit", "run", "when")}
    assert content["shared"]["run"] == "the-first"
    assert content["seconds"]["train"] >= kept["seconds"] > 0
    assert "shared" not in run.records()[1].content
    assert validate.problems(run) == []


def test_a_resumed_run_takes_a_base_step_up(recipe, store, tmp_path, calls):
    made = build(recipe, tmp_path / "run", "method.name=plop")
    made.folder.create()
    task_loop.run(build_experiment(made.config, tmp_path / "run"), store)
    assert calls["fit"] == [1]


# --- methods that promise nothing ---------------------------------------------------------------------------------


def test_a_method_that_promises_nothing_gets_its_own_base_step_back_whole(recipe, tmp_path, calls):
    def one(name: str, store: Path | None, *changes: str) -> RunFolder:
        return go(replace(build(recipe, tmp_path / name, *changes), method=Counting()), store)

    one("first", tmp_path / "store")
    run = one("run", tmp_path / "store", "train.iterations=[4, 2]")
    assert calls["fit"] == [0, 1, 1]
    assert checkpoint.load_state(run.step_folder(1) / "method.safetensors") == {"passes": 6, "total": 40 + 60}
    same_runs(run, one("alone", None, "train.iterations=[4, 2]"))


# --- damage, death and company ------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"iterations": 1', '"iterations": 2'))


@pytest.mark.parametrize(
    ("file", "damage", "trained", "evaluated"),
    [
        ("model.safetensors", flip, [0], [0]),
        ("model.safetensors", Path.unlink, [0], [0]),
        ("key.json", edit, [0], [0]),
        ("numbers.json", edit, [0], [0]),
        ("numbers.json", cut, [0], [0]),
        ("numbers.json", Path.unlink, [0], [0]),
        ("evaluated-*.npz", cut, [], [0]),
        ("evaluated-*.npz", flip, [], [0]),
        ("evaluated-*.npz", Path.unlink, [], [0]),
        ("evaluated-*.json", cut, [], [0]),
    ],
)
def test_a_damaged_entry_is_made_again(brief, tmp_path, calls, capsys, file, damage, trained, evaluated):
    first = start(brief, tmp_path / "first", tmp_path / "store")
    (entry,) = entries(tmp_path / "store")
    damage(next(entry.glob(file)))
    for counted in calls.values():
        counted.clear()
    same_runs(first, start(brief, tmp_path / "second", tmp_path / "store"))
    assert calls == {"fit": trained, "evaluate": evaluated}
    assert re.search("(is|are) damaged", capsys.readouterr().err)
    start(brief, tmp_path / "third", tmp_path / "store")
    assert calls == {"fit": trained, "evaluate": evaluated}, "the entry was not replaced by a whole one"


def test_a_process_killed_while_it_stores_leaves_no_entry_and_no_lock(brief, tmp_path, calls):
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(brief))
    code = (
        "import os, signal, sys; from cssbench import shared; from cssbench.cli import main\n"
        "shared.publish = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sys.argv = ['cssbench', 'run', {str(tmp_path / 'recipe.toml')!r}, '--out', {str(tmp_path / 'killed')!r}]\n"
        "main()"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CSSBENCH_SHARED": str(tmp_path / "store")}
    died = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True)
    assert died.returncode == -9, died.stderr
    assert entries(tmp_path / "store") == [*(tmp_path / "store").glob("*/.*.tmp")]
    start(brief, tmp_path / "next", tmp_path / "store")
    assert calls["fit"] == [0]
    assert not [*(tmp_path / "store").glob("*/.*.tmp")]
    assert len(entries(tmp_path / "store")) == 1


def test_who_comes_while_another_trains_waits_and_takes_the_result(brief, tmp_path, monkeypatch, calls, capsys):
    first = start(brief, tmp_path / "first", tmp_path / "store")
    (entry,) = entries(tmp_path / "store")
    lock = FileLock(entry.with_name(f"{entry.name}.lock"))
    assert lock.acquire()
    shutil.move(entry, tmp_path / "kept")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:  # the other one has finished
            shutil.move(tmp_path / "kept", entry)
            lock.release()

    monkeypatch.setattr(shared, "sleep", sleep)
    same_runs(first, start(brief, tmp_path / "second", tmp_path / "store"))
    assert len(waits) == 2
    assert calls["fit"] == [0]
    assert capsys.readouterr().err.count("waiting for it") == 1


def test_two_processes_at_once_train_once(brief, tmp_path):
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(brief))
    words = [
        sys.executable,
        "-m",
        "cssbench",
        "run",
        str(tmp_path / "recipe.toml"),
        "--shared",
        str(tmp_path / "store"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*words, "--out", str(tmp_path / n)], env=environment, stderr=subprocess.PIPE) for n in "ab"
    ]
    for process in started:
        _, printed = process.communicate()
        assert process.returncode == 0, printed
    runs = [RunFolder.read(tmp_path / n) for n in "ab"]
    assert ["shared" in run.records()[0].content for run in runs].count(True) == 1
    same_runs(*runs)
    assert len(entries(tmp_path / "store")) == 1


@pytest.mark.slow
def test_the_processes_of_one_run_agree(brief, tmp_path):
    """Two processes train and store; two others take it up, with the samples that each of the first has made."""
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(brief | {"train": brief["train"] | {"devices": 2}}))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cssbench",
    ]
    words = [*launcher, "run", str(tmp_path / "recipe.toml"), "--shared", str(tmp_path / "store"), "--out"]
    for name, changes in (("first", []), ("second", ["--set", "method.name=mib"])):
        run = subprocess.run(
            [*words, str(tmp_path / name), *changes],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr[-3000:]
    first, second = (RunFolder.read(tmp_path / name) for name in ("first", "second"))
    same_runs(first, second)
    assert second.records()[0].content["shared"]["run"] == "first"
    assert len(second.records()[0].samples()) == 2


def test_who_finds_the_entry_there_throws_the_own_copy_away(tmp_path):
    for name in ("own", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    shared.publish(tmp_path / "own", tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "file").read_text() == "there"


def test_a_store_that_cannot_be_written_is_one_clear_error_and_later_costs_nothing(
    brief, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be locked"):
        start(brief, tmp_path / "run", tmp_path / "file")

    def full(*paths: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shared, "publish", full)
    assert start(brief, tmp_path / "other", tmp_path / "store").finished
    assert "not stored" in capsys.readouterr().err
    lock = FileLock(next((tmp_path / "store").glob("*/*.lock")))
    assert lock.acquire()
    lock.release()


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_says_who_trained_it(brief, recipe, tmp_path, command, monkeypatch):
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe | {"train": brief["train"]}))
    words = ("run", tmp_path / "recipe.toml", "--scenario", brief["scenario"]["name"])
    code, _, printed = command(*words, "--out", tmp_path / "first", "--shared", tmp_path / "store")
    assert code == 0, printed
    assert "shared (" not in printed
    monkeypatch.setenv("CSSBENCH_SHARED", str(tmp_path / "store"))
    code, _, printed = command(*words, "--out", tmp_path / "second")
    assert code == 0, printed
    assert re.search(r"step 0: shared \(trained by first at ([0-9a-f]{12}|cssbench [0-9.]+)\), base", printed)
    assert RunFolder.read(tmp_path / "second").config.scenario.name == brief["scenario"]["name"]
    code, _, printed = command(
        *words, "--out", tmp_path / "third", "--set", f"scenario.name={recipe['scenario']['name']}"
    )
    assert RunFolder.read(tmp_path / "third").num_steps == 2


def test_the_key_is_the_digest_of_the_facts(brief, tmp_path):
    start(brief, tmp_path / "run", tmp_path / "store")
    (entry,) = entries(tmp_path / "store")
    assert entry.name == content_digest(read_json(entry / "key.json"))
    assert entry.parent.name == entry.name[:2]
