"""`train.initial`: step 0 starts from exactly those weights, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
import torch
from tiny_runs import LINEAR, SEGVIT, build, make_recipe, start

from cssbench import task_loop
from cssbench.base_facts import base_facts
from cssbench.errors import ConfigError
from cssbench.experiment import build_experiment
from cssbench.initial import start_from_initial
from cssbench.reevaluate import evaluate_again
from cssbench.results import RunFolder

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_recipe(tmp_path_factory.mktemp("recipe"), SEGVIT)


@pytest.fixture(scope="module")
def first(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return start(recipe, tmp_path_factory.mktemp("runs") / "first")


def from_run(run: RunFolder) -> str:
    return f"train.initial={str(run.path)!r}"


def test_step_0_starts_from_the_weights_and_the_record_says_so(
    recipe: dict[str, Any], first: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, fit = [], task_loop.fit

    def watched(fabric: Any, ctx: Any, *rest: Any) -> Any:
        seen.append({name: tensor.clone() for name, tensor in ctx.model.state_dict().items()})
        return fit(fabric, ctx, *rest)

    monkeypatch.setattr(task_loop, "fit", watched)
    second = start(recipe, tmp_path / "second", "seed=1", from_run(first))
    stored = safetensors.torch.load_file(first.path / "steps" / "00" / "model.safetensors")
    assert seen[0].keys() == stored.keys()
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in stored.items())
    assert not all(torch.equal(seen[1][name], tensor) for name, tensor in stored.items())  # step 1: from step 0
    records = second.records()
    assert records[0].content["initial"] == {"path": str(first.path), "digest": first.records()[0].content["digest"]}
    assert "initial" not in records[1].content


def test_resume_needs_it_until_step_0_is_finished(
    recipe: dict[str, Any], first: RunFolder, tmp_path: Path, command: Command
):
    there = shutil.copytree(first.path, tmp_path / "there")
    second = start(recipe, tmp_path / "second", f"train.initial={str(there)!r}")
    shutil.rmtree(there)
    shutil.rmtree(second.path / "steps" / "01")
    assert command("resume", second.path)[0] == 0
    assert RunFolder.read(second.path).finished
    shutil.rmtree(second.path / "steps")
    code, _, err = command("resume", second.path)
    assert (code, "cannot be started from" in err) == (2, True), err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.head.width=8"], "another shape"),
        (["model.name=vit-linear"], "It has model segvit, not vit-linear"),
        (["scenario.order=3"], "classes of step 0"),
        (["train.initial='nowhere'"], "'nowhere' cannot be started from. nowhere is not a run folder"),
    ],
)
def test_another_model_or_other_classes_are_refused_and_nothing_is_left(
    recipe: dict[str, Any], first: RunFolder, tmp_path: Path, command: Command, changes: list[str], message: str
):
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    if "model.name=vit-linear" in changes:
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe | {"model": LINEAR}))
    words = [word for change in (from_run(first), *changes) for word in ("--set", change)]
    code, _, err = command("run", tmp_path / "recipe.toml", "--out", tmp_path / "out", *words)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_a_run_without_weights_is_refused(recipe: dict[str, Any], first: RunFolder, tmp_path: Path):
    evaluate_again(first.path, tmp_path / "again", [], None, ["test"])
    with pytest.raises(ConfigError, match=f"Name {first.path}"):
        start(recipe, tmp_path / "out", f"train.initial={str(tmp_path / 'again')!r}")
    copy = shutil.copytree(first.path, tmp_path / "copy")
    (copy / "steps" / "00" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="weights were left out"):
        start(recipe, tmp_path / "out2", f"train.initial={str(copy)!r}")
    shutil.rmtree(copy / "steps")
    with pytest.raises(ConfigError, match="has not finished step 0"):
        start(recipe, tmp_path / "out3", f"train.initial={str(copy)!r}")


def test_the_weights_not_their_place_are_part_of_the_key_of_a_base_step(
    recipe: dict[str, Any], first: RunFolder, tmp_path: Path
):
    other = start(recipe, tmp_path / "other", "seed=5", "train.iterations=1")
    copy = shutil.copytree(first.path, tmp_path / "copy")

    def key(*changes: str) -> dict[str, Any]:
        made = build(recipe, tmp_path / "none", *changes)
        torch.manual_seed(0)
        made.model.grow(made.scenario.steps[0])
        start_from_initial(made)
        return base_facts(made)

    plain, mine = key(), key(from_run(first))
    assert mine == key(f"train.initial={str(copy)!r}")
    assert len({str(facts["model"]["initial"]) for facts in (plain, mine, key(from_run(other)))}) == 3


def test_a_run_that_had_one_can_be_read_and_evaluated_without_it(
    recipe: dict[str, Any], first: RunFolder, tmp_path: Path
):
    there = shutil.copytree(first.path, tmp_path / "there")
    second = start(recipe, tmp_path / "second", f"train.initial={str(there)!r}")
    shutil.rmtree(there)
    assert build_experiment(second.config, second.path).config.train.initial == str(there)
    evaluate_again(second.path, tmp_path / "again", [], None, ["test"])
    kept = RunFolder.read(tmp_path / "again").records()[0].content
    assert kept["initial"]["path"] == str(there)
    assert "initial" in kept["evaluated_from"]["kept"]
