"""The baselines alike: each through the task loop on tiny scenes, with resume, and what all of them promise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_baselines import (
    LABELS,
    MODELS,
    SCENARIO,
    batch_of,
    context,
    make_method,
    make_model,
    mixed,
    scenes,
    second_step,
)

from cssbench import config, recipes, registry
from cssbench.api import Batch, ConfigError, Segmenter
from cssbench.experiment import build_experiment, resolve
from cssbench.results import RunFolder
from cssbench.task_loop import run

METHODS = ["lwf", "ilt", "mib", "plop", "reminder"]


# --- through the task loop ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tiny.toml").write_text('dataset = "synthetic"\nclasses = 6\nbase = 3\nincrement = 3\n')
    return {
        "scenario": {"name": str(folder / "tiny.toml")},
        "data": {"root": str(folder), "options": {"classes": 6, "size": 32, "train": 16, "val": 4}},
        "augment": {"crop": 32, "photometric": False, "scale": [0.8, 1.3]},
        "optim": {"lr": 2e-3, "head_lr_scale": 1.0, "clip": 5.0},
        "train": {"batch_size": 4, "iterations": [4, 3], "accelerator": "cpu"},
        "evaluate": {"crop": 32, "short_side": 32, "samples": 0, "geometries": ["full"]},
    }


def start(recipe: dict[str, Any], out: Path, method: str, model: str, *changes: str) -> RunFolder:
    torch.set_num_threads(1)
    content = recipe | {"method": {"name": method}, "model": {"name": model} | MODELS[model]}
    made = build_experiment(resolve(config.validate(recipes.override(content, list(changes)), "test")), out, ["test"])
    made.folder.create()
    run(made)
    return RunFolder.read(out)


def weights(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder.step_folder(step) / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_resume_after_a_step_equals_an_uninterrupted_run(recipe, tmp_path: Path, method: str):
    whole = start(recipe, tmp_path / "whole", method, "vit-linear")
    shutil.copytree(whole.path, tmp_path / "cut")
    cut = RunFolder.read(tmp_path / "cut")
    shutil.rmtree(cut.step_folder(1))
    run(build_experiment(cut.config, cut.path))
    for one, other in zip(whole.records(), RunFolder.read(cut.path).records(), strict=True):
        for key, matrix in one.matrices.items():
            np.testing.assert_array_equal(matrix, other.matrices[key])
    first, second = weights(whole, 1), weights(cut, 1)
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


@pytest.mark.parametrize(
    ("method", "model"), [("mib", "deeplabv3"), *((method, "segvit") for method in METHODS)], ids="-".join
)
def test_every_kind_of_model_runs(recipe, tmp_path: Path, method: str, model: str):
    assert start(recipe, tmp_path / "run", method, model, "train.iterations=2").finished


@pytest.mark.parametrize("method", ["mib", "reminder"])
def test_half_precision_runs(recipe, tmp_path: Path, method: str):
    done = start(recipe, tmp_path / "run", method, "vit-linear", "train.precision=bf16-mixed", "train.iterations=2")
    assert done.finished


# --- one step by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_base_step_is_plain_training(method: str):
    made, model = make_method(method), make_model().eval()
    ctx, labels = context(0, model, None, []), mixed() % 4
    made.start_step(ctx)
    output = model(scenes(labels)["images"])
    terms, plain = made.loss(ctx, Batch(scenes(labels)["images"], labels, output)), model.loss(output, labels)
    assert terms.keys() == plain.keys()
    assert all(torch.equal(terms[name], plain[name]) for name in terms)


CASES = [("vit-linear", labels, half) for labels in LABELS for half in (False, True)]
CASES += [(model, "nothing but ignored", False) for model in ("deeplabv3", "segvit")]
CASES += [(model, "one new class", True) for model in ("deeplabv3", "segvit")]


@pytest.mark.parametrize(("model", "labels", "half"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_finite_and_the_teacher_gets_none(method: str, labels: str, half: bool, model: str):
    ctx = second_step(made := make_method(method), model)
    terms = made.loss(ctx, batch_of(ctx, LABELS[labels], half))
    assert all(value.ndim == 0 and torch.isfinite(value) for value in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    gradients = [p.grad for p in ctx.model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)
    assert ctx.previous is not None
    assert all(p.grad is None and not p.requires_grad for p in ctx.previous.parameters())


class WithoutPixels(Segmenter):
    """A model that offers nothing to distil."""


@pytest.mark.parametrize("method", METHODS)
def test_an_unsuitable_model_is_refused_by_name(method: str):
    ctx = context(0, WithoutPixels(), None, [])  # type: ignore[abstract]
    with pytest.raises(ConfigError, match=f"'{method}'.*not WithoutPixels. Use model 'vit-linear'"):
        make_method(method).start_step(ctx)


@pytest.mark.parametrize("method", ["mib", "plop", "reminder"])
def test_new_classifiers_start_from_the_background(method: str):
    ctx = second_step(make_method(method))
    images = scenes(mixed())["images"]
    assert ctx.previous is not None
    before, after = ctx.previous(images).logits.softmax(1), ctx.model(images).logits.softmax(1)
    torch.testing.assert_close(after[:, 1:4], before[:, 1:])
    torch.testing.assert_close(after[:, [0, 4, 5]], before[:, :1].expand(-1, 3, -1, -1) / 3)
    plain = second_step(make_method(method, balanced_init=False))
    assert not torch.allclose(plain.model(images).logits.softmax(1)[:, 1:4], before[:, 1:])


@pytest.mark.parametrize("method", ["lwf", "ilt"])
def test_lwf_and_ilt_leave_the_new_classifiers_alone(method: str):
    ctx = second_step(make_method(method))
    torch.manual_seed(0)
    other = registry.load("models", "vit-linear")
    fresh = other(other.Config(**MODELS["vit-linear"]))
    for step in SCENARIO.steps[:2]:
        fresh.grow(step)
    assert ctx.previous is not None
    assert torch.equal(ctx.model.heads[0].bias, ctx.previous.heads[0].bias)
    assert torch.equal(ctx.model.heads[0].bias, fresh.heads[0].bias)
