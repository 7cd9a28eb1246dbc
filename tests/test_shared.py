"""Shared base steps: a run that takes one up equals, bit for bit, the run that would have trained it itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tomli_w
import torch

import cssbench
from cssbench import base_facts, checkpoint, config, recipes, shared, task_loop, validate
from cssbench.api import Batch, ConfigError, Method, StepContext
from cssbench.base_facts import is_plain
from cssbench.baselines.finetune import FineTune
from cssbench.config import PartChoice
from cssbench.contract import build_method
from cssbench.experiment import Experiment, build_experiment, derive_seed, resolve
from cssbench.lock import FileLock
from cssbench.results import RunFolder, content_digest, read_json

BACKBONE = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "segvit": {
        "backbone": BACKBONE | {"layers": [1, 2]},
        "head": {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1},
    },
    "deeplabv3": {"backbone": {"name": "resnet10t"}, "width": 16, "dilations": [1, 2]},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six classes in two steps, a third of the images held out; "tiny-3-1.toml" and "all.toml" lie beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    for name, parts in {
        "tiny-3-3": "base = 3\nincrement = 3",
        "tiny-3-1": "base = 3\nincrement = 1",
        "all": "base = 6",
    }.items():
        (folder / f"{name}.toml").write_text(f'dataset = "synthetic"\nclasses = 6\n{parts}\n')
    return {
        "scenario": {"name": str(folder / "tiny-3-3.toml")},
        "method": {"name": "finetune"},
        "model": {"name": "segvit"} | MODELS["segvit"],
        "data": {"root": str(folder), "options": {"classes": 6, "size": 32, "train": 24, "val": 4}, "holdout": 0.3},
        "augment": {"crop": 32, "photometric": False, "scale": [0.8, 1.3]},
        "optim": {"lr": 2e-3, "head_lr_scale": 1.0, "clip": 5.0},
        "train": {"batch_size": 4, "iterations": [4, 3], "accelerator": "cpu"},
        "evaluate": {"crop": 32, "short_side": 32, "samples": 2, "geometries": ["full"]},
    }  # fmt: skip


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


def build(recipe: dict[str, Any], out: Path, *changes: str) -> Experiment:
    return build_experiment(resolve(config.validate(recipes.override(recipe, list(changes)), "test")), out, ["test"])


def go(made: Experiment, store: Path | None) -> RunFolder:
    made.folder.create()
    task_loop.run(made, store)
    return RunFolder.read(made.folder.path)


def start(recipe: dict[str, Any], out: Path, store: Path | None, *changes: str) -> RunFolder:
    return go(build(recipe, out, *changes), store)


def same_runs(one: RunFolder, other: RunFolder) -> None:
    """Weights, method states, matrices, samples and losses of all steps, bit for bit."""
    for a, b in zip(one.records(), other.records(), strict=True):
        first, second = (safetensors.torch.load_file(r.folder / "model.safetensors") for r in (a, b))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        states = [checkpoint.load_state(r.folder / "method.pt") for r in (a, b)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(torch.as_tensor(states[0][k]), torch.as_tensor(states[1][k])) for k in states[0])
        assert a.matrices.keys() == b.matrices.keys()
        assert all(np.array_equal(matrix, b.matrices[key]) for key, matrix in a.matrices.items())
        assert [p.read_bytes() for p in a.samples().values()] == [p.read_bytes() for p in b.samples().values()]
        assert [p.read_bytes() for p in a.depth_maps().values()] == [p.read_bytes() for p in b.depth_maps().values()]
        assert (a.tokens, a.gflops) == (b.tokens, b.gflops)
        assert a.samples().keys() == b.samples().keys() != set()
        for name in ("loss", "images", "iterations", "evaluated_images", "parameters"):
            assert a.content[name] == b.content[name]


def entries(store: Path) -> list[Path]:
    return sorted(path.parent for path in store.glob("*/*/numbers.json"))


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


class Counting(Method):
    """Counts passes while it trains, and weights them at the end of a step."""

    passes = 0
    total = 0

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, torch.Tensor]:
        self.passes += 1
        return ctx.model.loss(batch.output, batch.labels)

    def end_step(self, ctx: StepContext) -> None:
        self.total += 10 * self.passes
        ctx.model.heads[-1].tokens.weight.data += self.passes

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes, self.total = state["passes"], state["total"]


class Heir(FineTune):
    """Inherits from a plain method, and promises nothing itself."""


def test_a_method_that_promises_nothing_gets_its_own_base_step_back_whole(recipe, tmp_path, calls):
    def one(name: str, store: Path | None, *changes: str) -> RunFolder:
        return go(replace(build(recipe, tmp_path / name, *changes), method=Counting()), store)

    one("first", tmp_path / "store")
    run = one("run", tmp_path / "store", "train.iterations=[4, 2]")
    assert calls["fit"] == [0, 1, 1]
    assert checkpoint.load_state(run.step_folder(1) / "method.pt") == {"passes": 6, "total": 40 + 60}
    same_runs(run, one("alone", None, "train.iterations=[4, 2]"))


# --- the key ------------------------------------------------------------------------------------------------------


def facts(made: Experiment) -> dict[str, Any]:
    """Facts as dotted names, of a model that has grown for step 0."""
    if not len(made.model.heads):
        torch.manual_seed(derive_seed(made.config.seed, "grow", 0))
        made.model.grow(made.scenario.steps[0])
    return dict(flat(json.loads(json.dumps(base_facts.base_facts(made)))))


def flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {name for name in a.keys() | b.keys() if a.get(name, ...) != b.get(name, ...)}


@pytest.fixture(scope="module")
def plain(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return facts(build(recipe, tmp_path_factory.mktemp("plain")))


ALONE = [
    "optim.name=sgd", "optim.lr=1e-3", "optim.head_lr_scale=2.0", "optim.weight_decay=0.1", "optim.betas=[0.8, 0.9]",
    "optim.momentum=0.5", "optim.clip=none", "optim.power=0.9", "optim.min_lr=1e-6", "optim.warmup=2",
    "optim.warmup_ratio=0.1", "augment.crop=40", "augment.short_side=32", "augment.scale=[0.8, 1.2]",
    "augment.max_category_share=0.9", "augment.flip=0.0", "augment.photometric=true", "train.batch_size=8",
    "train.accumulate=2", "train.precision=bf16-mixed", "train.iterations=[5, 3]",
]  # fmt: skip
SEVERAL = {
    "seed=1": {"seed", "model.initial"},
    "model.absent_weight=0.2": {"model.options.absent_weight"},
    "model.head.layers=2": {"model.options.head.layers", "model.initial"},
    "data.options.seed=1": {"data.options.seed", "data.fingerprint"},
    "data.holdout=0.5": {"images.trained", "images.held_out"},
    "scenario.order=[3, 2, 1, 4, 5, 6]": {"labels.classes", "labels.table"},
    "scenario.void=ignore": {"labels.void", "labels.table"},
    "scenario.mode=partitioned": {"images.trained"},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [*((c, {re.sub(r"=.*", "", c)}) for c in ALONE), *SEVERAL.items()],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_changes_the_base_step_changes_the_key(recipe, plain, tmp_path, change: str, expected: set[str]):
    """Exactly those facts: one left out of the key would be missing here, though another may stand in for it."""
    assert differing(plain, facts(build(recipe, tmp_path, change))) == expected


def test_every_setting_of_optimiser_transforms_and_training_is_a_fact_or_known_not_to_matter(plain):
    free = ("epochs", "accelerator", "devices", "log_every", "initial")  # `initial` by its weights: model.initial
    known = {"optim.later_lr", *(f"train.{n}" for n in free)}
    sections = {"optim": config.OptimConfig, "augment": config.AugmentConfig, "train": config.TrainConfig}
    names = {f"{section}.{name}" for section, kind in sections.items() for name in kind.model_fields}
    assert names - {n for n in names if n.startswith("optim.later_")} - known <= plain.keys()
    assert {re.sub(r"=.*", "", change) for change in ALONE} >= {
        n for n in plain if n.startswith(("optim.", "augment.", "train."))
    }


@pytest.mark.parametrize(
    "changes",
    [
        ("optim.later_lr=1e-4",),
        ("train.iterations=[4, 9]",),
        ("train.iterations=4",),
        ("train.iterations=[4]",),
        ("train.iterations=[4, 4, 4]", "scenario.name=TINY31"),
        ("method.name=plop", "method.threshold=0.1"),
        ("data.workers=1", "train.log_every=1", "note=other", "evaluate.samples=0", "evaluate.geometries=['crop']"),
    ],
    ids=" ".join,
)
def test_what_does_not_change_the_base_step_keeps_the_key(recipe, plain, tmp_path, changes: tuple[str, ...]):
    other = str(Path(recipe["scenario"]["name"]).with_name("tiny-3-1.toml"))
    changed = [change.replace("TINY31", other) for change in changes]
    assert differing(plain, facts(build(recipe, tmp_path, *changed))) == set()


def test_epochs_that_make_as_many_iterations_keep_the_key(recipe, plain, tmp_path):
    images = len(build(recipe, tmp_path / "a").train_stems[0])
    train = {k: v for k, v in recipe["train"].items() if k != "iterations"} | {"epochs": [4 * 4 / images, 9.0]}
    assert differing(plain, facts(build(recipe | {"train": train}, tmp_path / "b"))) == set()


def test_machine_packages_and_code_change_the_key(recipe, plain, tmp_path, monkeypatch):
    made = build(recipe, tmp_path)
    elsewhere = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    machine = {"machine.device", "machine.processes", "machine.threads"}
    assert differing(plain, facts(replace(made, fabric=elsewhere))) == machine
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert differing(plain, facts(made)) == {"machine.threads"}
    monkeypatch.undo()
    monkeypatch.setattr(base_facts.provenance, "package_version", lambda name: "0.0")
    changed = differing(plain, facts(made))
    assert {"packages.torch", "packages.torchvision", "packages.timm", "model.version", "data.version"} <= changed
    monkeypatch.undo()
    monkeypatch.setattr(base_facts, "sources", lambda: "other")
    assert differing(plain, facts(made)) == {"sources"}


def test_the_code_is_that_of_the_package_and_not_of_commands_and_plugins(tmp_path, monkeypatch):
    for name in ("__init__.py", "trainer.py", "models/atm.py", "cli/run.py", "baselines/own.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one = 1\n")
    monkeypatch.setattr(cssbench, "__file__", str(tmp_path / "__init__.py"))
    digest = base_facts.sources.__wrapped__
    before = digest()
    (tmp_path / "cli" / "run.py").write_text("one = 2\n")
    (tmp_path / "baselines" / "own.py").write_text("one = 2\n")
    assert digest() == before
    (tmp_path / "models" / "atm.py").write_text("one = 2\n")
    assert digest() != before


@pytest.mark.parametrize("method", ["finetune", "ilt", "lwf", "mib", "plop", "reminder", "segvit-cl"])
def test_built_ins_are_plain_as_a_run_builds_them(method: str):
    assert is_plain(build_method(PartChoice(name=method)))


def test_a_method_without_the_promise_has_a_key_of_its_own(recipe, plain, tmp_path):
    made = build(recipe, tmp_path)
    for other in (Counting(), Heir()):
        found = facts(replace(made, method=other))
        assert differing(plain, found) >= {"method", "method.name", "method.distribution", "method.version"}
    assert found["method.scenario"] == [[1, 2, 3], [4, 5, 6]]
    assert facts(replace(made, method=Counting()))["method.source"] is not None


def test_initial_weights_count_by_what_they_hold_and_not_by_where_they_lie(recipe, tmp_path):
    made = build(recipe, tmp_path / "run")
    weights = {k: v.clone() for k, v in made.model.backbone.vit.state_dict().items()}
    found = []
    for name, shift in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file({k: v + shift for k, v in weights.items()}, path)
        found.append(facts(build(recipe, tmp_path / name, f"model.backbone.checkpoint={str(path)!r}")))
    assert differing(found[0], found[1]) == set()
    assert differing(found[0], found[2]) == {"model.options.backbone.checkpoint.sha256", "model.initial"}


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
