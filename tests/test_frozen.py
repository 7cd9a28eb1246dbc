"""Steps that learn from stored features: the same numbers as live, each view encoded once, nothing lost in a crash."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_runs import EQD, LINEAR, SEGVIT, build, make_recipe, start
from torch import Tensor

from cssbench import task_loop
from cssbench.api import Batch, Method, StepContext
from cssbench.data.base import SegDataset
from cssbench.data.step_dataset import BatchStream, StepDataset
from cssbench.errors import ConfigError
from cssbench.features import FeatureStore
from cssbench.models.segvit import SegViT
from cssbench.results import RunFolder

VIEWS = "augment.later_views=2"


def recipe(folder: Path, model: dict[str, Any] = SEGVIT, method: str = "segvit-cl") -> dict[str, Any]:
    """Step 1: 12 iterations of 4 on 16 images, so three passes."""
    made = make_recipe(folder, model)
    made["method"]["name"] = method
    made["train"]["iterations"] = [2, 12]
    return made


def cached(folder: Path, dtype: str = "fp32") -> list[str]:
    return [VIEWS, "cache.features=true", f"cache.dtype='{dtype}'", f"cache.folder='{folder / 'store'}'"]


def weights(run: RunFolder, step: int = 1) -> dict[str, Tensor]:
    return load_file(run.weights(step)[1])


def largest_change(one: RunFolder, other: RunFolder) -> float:
    mine, theirs = weights(one), weights(other)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def counts(run: RunFolder) -> tuple[int, int]:
    found = run.records()[1].content["cache"]
    return found["read"], found["written"]


@pytest.mark.parametrize("model", [SEGVIT, EQD], ids=["segvit", "shrunk-eqd"])
def test_stored_features_give_the_numbers_of_live_ones(tmp_path: Path, model: dict[str, Any]):
    content = recipe(tmp_path, model)
    live = start(content, tmp_path / "live", VIEWS)
    first = start(content, tmp_path / "first", *cached(tmp_path))
    again = start(content, tmp_path / "again", *cached(tmp_path))
    half = start(content, tmp_path / "half", *cached(tmp_path, "bf16"))
    assert largest_change(live, first) < 1e-6, "batches of one and of four differ in the last bit"
    assert counts(first) == (16, 32), "16 images in 2 views are encoded, the third pass reads the first view"
    assert counts(again) == (48, 0)
    assert largest_change(first, again) == 0
    assert 0 < largest_change(live, half) < 1e-2, "bf16 keeps eight bits; 12 iterations at rate 2e-3"
    assert first.records()[1].content["cache"]["bytes"] > 1.7 * half.records()[1].content["cache"]["bytes"]


def test_a_stored_view_is_never_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content, encode = recipe(tmp_path), SegViT.encode
    start(content, tmp_path / "first", *cached(tmp_path))
    seen: list[bool] = []

    def watched(self: SegViT, images: Tensor) -> Any:
        seen.append(len(self.heads) == 2 and self.training)
        return encode(self, images)

    monkeypatch.setattr(SegViT, "encode", watched)
    start(content, tmp_path / "again", *cached(tmp_path))
    assert seen, "step 0 and the evaluations do encode"
    assert not any(seen)


def test_views_come_again_in_turns(tmp_path: Path):
    made = build(recipe(tmp_path), tmp_path / "out")
    table = made.scenario.train_table(made.scenario.steps[1])
    two, all_new = (
        StepDataset(made.data, "train", made.train_stems[1], table, made.transform, 3, views) for views in (2, None)
    )
    views = [two[epoch, 0]["images"] for epoch in range(4)]
    assert torch.equal(views[0], views[2])
    assert torch.equal(views[1], views[3])
    assert not torch.equal(views[0], views[1])
    assert torch.equal(all_new[1, 0]["images"], views[1])
    assert not torch.equal(all_new[2, 0]["images"], views[0])


def test_step_0_has_ever_new_views(tmp_path: Path):
    content = recipe(tmp_path)
    content["train"]["iterations"] = [10, 1]
    one, other = start(content, tmp_path / "a", "augment.later_views=1"), start(content, tmp_path / "b")
    assert all(torch.equal(t, weights(other, 0)[name]) for name, t in weights(one, 0).items())


def test_a_method_that_trains_the_encoder_goes_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = recipe(tmp_path, LINEAR, "finetune")
    live = start(content, tmp_path / "live", VIEWS)
    tried = start(content, tmp_path / "tried", *cached(tmp_path))
    assert largest_change(live, tried) == 0
    assert "cache" not in tried.records()[1].content
    assert "cache.features is of no use here: method 'finetune' trains the encoder" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_images_without_files_are_encoded_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def version(self: SegDataset, split: str, stem: str) -> tuple[Any, ...]:
        raise FileNotFoundError(stem)

    content = recipe(tmp_path)
    live = start(content, tmp_path / "live", VIEWS)
    monkeypatch.setattr(SegDataset, "version", version)
    tried = start(content, tmp_path / "tried", *cached(tmp_path))
    assert "no file for each image" in capsys.readouterr().err
    assert largest_change(live, tried) == 0


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path: Path):
    dtop = SEGVIT | {"name": "dtop", "p0": 0.9}
    dtop["backbone"] = dtop["backbone"] | {"layers": [1, 2]}
    with pytest.raises(ConfigError, match="model 'dtop' does not keep the two apart"):
        build(recipe(tmp_path, dtop), tmp_path / "out", *cached(tmp_path))
    with pytest.raises(ConfigError, match=r"set augment\.later_views"):
        build(recipe(tmp_path), tmp_path / "out", "cache.features=true")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "store").exists()


def test_damaged_files_are_made_anew(tmp_path: Path):
    content = recipe(tmp_path)
    first = start(content, tmp_path / "first", *cached(tmp_path))
    files = sorted((tmp_path / "store").rglob("*.safetensors"))
    assert len(files) == 32
    for path in files[:5]:
        path.write_bytes(path.read_bytes()[:-1])
    again = start(content, tmp_path / "again", *cached(tmp_path))
    assert counts(again)[1] == 5
    assert largest_change(first, again) == 0


def test_a_store_without_room_changes_nothing_but_time(tmp_path: Path):
    content = recipe(tmp_path)
    whole = start(content, tmp_path / "whole", *cached(tmp_path))
    small = [*cached(tmp_path / "other"), "cache.max_gib=2e-5"]  # 21 KiB: four or five files
    tight = start(content, tmp_path / "tight", *small)
    read, written = counts(tight)
    assert 0 < written < 8
    assert read <= written
    assert largest_change(whole, tight) == 0


def test_a_crash_half_way_loses_the_step_and_no_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content, write = recipe(tmp_path), FeatureStore.write
    whole = start(content, tmp_path / "whole", *cached(tmp_path / "other"))

    def dies(self: FeatureStore, key: str, tensors: dict[str, Tensor]) -> None:
        if self.written_files == 7:
            raise KeyboardInterrupt
        write(self, key, tensors)

    monkeypatch.setattr(FeatureStore, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        start(content, tmp_path / "out", *cached(tmp_path))
    monkeypatch.setattr(FeatureStore, "write", write)
    made = build(content, tmp_path / "out", *cached(tmp_path))
    made.folder = RunFolder.read(tmp_path / "out")
    task_loop.run(made)
    resumed = RunFolder.read(tmp_path / "out")
    assert counts(resumed) == (23, 25), "7 of the 32 views were stored before the crash"
    assert largest_change(whole, resumed) == 0


def test_features_too_large_for_fp16_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encode = SegViT.encode

    def loud(self: SegViT, images: Tensor) -> Any:
        found = encode(self, images)
        found.taps = [tap * 1e6 for tap in found.taps]
        return found

    monkeypatch.setattr(SegViT, "encode", loud)
    with pytest.raises(ConfigError, match=r"does not fit cache\.dtype = 'fp16'"):
        start(recipe(tmp_path), tmp_path / "out", *cached(tmp_path, "fp16"))


class Teacher(Method):
    """Frozen encoder, and a loss that reads the previous model."""

    def start_step(self, ctx: StepContext) -> None:
        if ctx.step.index:
            ctx.model.freeze_old()

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        terms = ctx.model.loss(batch.output, batch.labels)
        if batch.previous is not None:
            old = batch.previous.logits
            terms["old"] = F.mse_loss(batch.output.logits[:, : old.shape[1]], old)
            terms["new"] = 0.1 * (batch.output.logits * old.mean(1, keepdim=True)).mean()
        return terms


def test_the_previous_model_reads_the_same_features(tmp_path: Path):
    content = recipe(tmp_path, LINEAR, "finetune")
    runs = [
        start(content, tmp_path / name, *changes, method=Teacher())
        for name, changes in {"live": [VIEWS], "stored": cached(tmp_path)}.items()
    ]
    assert counts(runs[1]) == (16, 32)
    assert largest_change(*runs) < 1e-6
    assert runs[1].records()[1].content["loss"]["new"] != 0


@pytest.mark.parametrize("model", [SEGVIT, EQD, LINEAR], ids=["segvit", "shrunk-eqd", "vit-linear"])
def test_a_frozen_step_builds_no_graph_through_encoder_or_old_heads(tmp_path: Path, model: dict[str, Any]):
    made = build(recipe(tmp_path, model, "finetune"), tmp_path / "out")
    steps = made.scenario.steps
    for step in steps:
        made.model.grow(step)
    made.model.freeze_old()
    made.model.train()
    data = StepDataset(made.data, "train", made.train_stems[1], made.scenario.train_table(steps[1]), made.transform, 0)
    item = data[0, 0]
    output = made.model(item["images"][None].repeat(2, 1, 1, 1))
    terms = made.model.loss(output, item["labels"][None].repeat(2, 1, 1))
    assert not any(feature.requires_grad for feature in output.features)
    reached, ahead = set(), [term.grad_fn for term in terms.values() if term.grad_fn is not None]
    assert ahead
    while ahead:
        node = ahead.pop()
        ahead += [below for below, _ in node.next_functions if below is not None]
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
    assert reached
    assert reached <= {id(parameter) for parameter in made.model.new_parameters()}


def test_the_stream_says_how_many_views_there_are():
    stream = BatchStream(16, 0, 4, 12)
    keys = [key for batch in stream for key in batch]
    assert len({(epoch % 2, index) for epoch, index in keys}) == 32


# Evaluation -----------------------------------------------------------------------------------------------------------

REMEMBERED = ["cache.evaluation=true", "evaluate.inference='slide'", "evaluate.window=32", "evaluate.stride=16"]


def three_steps(folder: Path, model: dict[str, Any] = SEGVIT, method: str = "segvit-cl") -> dict[str, Any]:
    """Six classes in three steps; five passes an image: four windows over 48 x 48 px, and the crop."""
    made = recipe(folder, model, method)
    (folder / "tiny-2-2.toml").write_text('dataset = "synthetic"\nclasses = 6\nbase = 2\nincrement = 2\n')
    made["scenario"]["name"] = str(folder / "tiny-2-2.toml")
    made["train"]["iterations"] = [2, 2]
    made["data"]["options"]["size"] = 48
    made["evaluate"]["short_side"] = 48
    return made


def remembered(folder: Path) -> list[str]:
    return [*REMEMBERED, f"cache.folder='{folder / 'store'}'"]


def same_matrices(one: RunFolder, other: RunFolder) -> bool:
    pairs = zip(one.records(), other.records(), strict=True)
    return all(
        mine.matrices.keys() == theirs.matrices.keys()
        and all((mine.matrices[key] == theirs.matrices[key]).all() for key in mine.matrices)
        for mine, theirs in pairs
    )


@pytest.mark.parametrize("model", [SEGVIT, EQD, LINEAR], ids=["segvit", "shrunk-eqd", "vit-linear"])
def test_evaluations_encode_an_image_once_and_count_the_same(tmp_path: Path, model: dict[str, Any]):
    content = three_steps(tmp_path, model, "segvit-cl" if model is not LINEAR else "finetune")
    method = Teacher() if model is LINEAR else None
    live = start(content, tmp_path / "live", *REMEMBERED[1:], method=method)
    made = start(content, tmp_path / "made", *remembered(tmp_path), method=method and Teacher())
    assert same_matrices(live, made)
    found = [record.content["evaluation_cache"] for record in made.records()]
    images = [0, *(record.content["evaluated_images"] for record in made.records())]
    new = [after - before for before, after in pairwise(images)]
    assert [f["encoded"] for f in found] == [5 * number for number in new], "only images not evaluated before"
    assert found[2]["written"] == 0, "after the last step nothing will be wanted again"


def test_heads_that_are_finished_do_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from cssbench.models.atm import ATMHead

    content, forward = three_steps(tmp_path), ATMHead.forward
    runs: list[int] = []

    def watched(self: ATMHead, taps: list[Tensor], grid: tuple[int, int]) -> Any:
        if not self.training and not torch.is_grad_enabled():
            runs.append(id(self))
        return forward(self, taps, grid)

    monkeypatch.setattr(ATMHead, "forward", watched)
    made = build(content, tmp_path / "out", *remembered(tmp_path), "evaluate.flops_images=0")
    made.folder.create()
    task_loop.run(made)
    ran = {number: runs.count(id(head)) for number, head in enumerate(made.model.heads)}
    inputs = len({p.name for p in (tmp_path / "store").rglob("*.safetensors") if len(p.stem) == 64})
    assert inputs == 5 * made.folder.records()[1].content["evaluated_images"]
    assert ran[0] == ran[2] == inputs == 30, "once for every input: at step 0, and at the last step"


def test_an_encoder_that_learns_makes_evaluations_live(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = three_steps(tmp_path, LINEAR, "finetune")
    live = start(content, tmp_path / "live", *REMEMBERED[1:])
    tried = start(content, tmp_path / "tried", *remembered(tmp_path))
    assert same_matrices(live, tried)
    assert ["evaluation_cache" in record.content for record in tried.records()] == [True, False, False]
    assert capsys.readouterr().err.count("cache.evaluation is of no use here") == 2


def test_an_evaluation_over_again_takes_up_what_was_kept(tmp_path: Path):
    from cssbench.reevaluate import evaluate_again

    run = start(three_steps(tmp_path), tmp_path / "run", *remembered(tmp_path))
    evaluate_again(run.path, tmp_path / "again", ["evaluate.background_threshold=0.2"], None, ["test"])
    again = RunFolder.read(tmp_path / "again")
    assert [record.content["evaluation_cache"]["encoded"] for record in again.records()][:2] == [0, 0]
