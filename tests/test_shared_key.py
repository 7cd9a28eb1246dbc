"""The key of a shared base step: what changes the base step changes it, and nothing else does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from shared_runs import Counting, build, make_recipe

import cssbench
from cssbench import base_facts, config
from cssbench.base_facts import is_plain
from cssbench.baselines.finetune import FineTune
from cssbench.config import PartChoice
from cssbench.contract import build_method
from cssbench.experiment import Experiment, derive_seed

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_recipe(tmp_path_factory.mktemp("recipe"))


class Heir(FineTune):
    """Inherits from a plain method, and promises nothing itself."""


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
    "train.compile=true", "train.channels_last=true", "train.teacher_precision=bf16", "optim.fused=true",
    "train.strategy=ddp", "train.mask_count=processes", "train.sync_batchnorm=true",
]  # fmt: skip
SEVERAL = {
    "seed=1": {"seed", "model.initial"},
    "model.absent_weight=0.2": {"model.options.absent_weight"},
    "model.head.layers=2": {"model.options.head.layers", "model.initial"},
    "data.options.seed=1": {"data.options.seed", "data.fingerprint"},
    "data.stored_side=24": {"data.stored_side"},
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
    known = {"optim.later_lr", "augment.later_views", *(f"train.{n}" for n in free)}
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
        (
            "data.workers=1",
            "data.stored=0.5",
            "train.log_every=1",
            "note=other",
            "evaluate.samples=0",
            "evaluate.geometries=['crop']",
        ),
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
