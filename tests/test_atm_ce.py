"""ATM heads under per-pixel cross-entropy: values by hand, what counts, growth, options, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cssbench.baselines.mib import MiB
from cssbench.baselines.segvit_cl import SegViTCL
from cssbench.errors import ConfigError, ModelError
from cssbench.losses.pixel import own_labels
from cssbench.models.atm import MaskPrediction
from cssbench.models.segvit import SegViT
from cssbench.models.shrunk import Shrunk
from cssbench.scenario import Step
from cssbench.testing import conformance

torch.set_num_threads(1)  # the tensors are tiny
STEPS = [Step(0, (1, 2, 3), ()), Step(1, (4,), (1, 2, 3)), Step(2, (5, 6), (1, 2, 3, 4))]
VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 16, "depth": 2, "heads": 2}


def build(steps: int = 2, cls: type[SegViT] = SegViT, version: str = "v2", **options: Any) -> SegViT:
    torch.manual_seed(0)
    layers = [2] if cls is Shrunk else [1, 2]
    if cls is Shrunk:
        options = {"down_layer": 1, "upsample_layers": 1, "upsample_queries": "bicubic", **options}
    model = cls(
        cls.Config.model_validate(
            {
                "backbone": VIT | {"layers": layers, "drop_path": 0.0},
                "head": {"version": version, "heads": 2, "layers": 1, "init_std": 0.2, "dropout": 0.0},
                "loss": "ce",
                **options,
            }
        )
    )
    for step in STEPS[:steps]:
        model.grow(step)
    return model.eval()


def images(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def labels(*values: int) -> torch.Tensor:
    """(2, 32, 48): each value in turn, pixel by pixel."""
    return torch.tensor(values).repeat(2 * 32 * 48 // len(values)).reshape(2, 32, 48)


def test_labels_of_a_head():
    found = own_labels(torch.tensor([0, 3, 4, 5, 6, 254, 255], dtype=torch.uint8), range(4, 6), 2)
    assert found.tolist() == [2, 2, 0, 1, 2, 2, 255]
    assert own_labels(torch.tensor([0, 1, 2, 255]), range(2), 0).tolist() == [0, 1, 0, 255]
    assert own_labels(torch.tensor([0, 1, 2]), range(1, 2), 255).tolist() == [255, 0, 255]


def by_hand(**ce: Any) -> tuple[SegViT, Any]:
    """A model of 3 classes whose one output is made here: one cell, masks log 2, log 3, log 4; P(present) 1/2."""
    model = build(1, ce=ce)
    output = model(torch.zeros(1, 3, 32, 32))
    masks = torch.tensor([2.0, 3.0, 4.0]).log().reshape(1, 3, 1, 1)
    output.stages = [[MaskPrediction(masks, torch.zeros(1, 3, 2))]]
    return model, output


def quarters(*values: int) -> torch.Tensor:
    return torch.tensor(values).repeat_interleave(32 * 32 // 4).reshape(1, 32, 32)


def test_masks_as_logits_by_hand():
    """exp(logits) is 2, 3, 4 and 1 for all else: 10 in all."""
    model, output = by_hand()
    torch.testing.assert_close(output.scores[0, :, 0, 0], torch.tensor([0.2, 0.3, 0.4]))
    found = model.loss(output, quarters(0, 1, 2, 255))["ce"]  # 255 stays in the denominator
    assert float(found) == pytest.approx(-(math.log(0.1) + math.log(0.2) + math.log(0.3)) / 4, rel=1e-6)
    model, output = by_hand(reduction="valid")
    found = model.loss(output, quarters(0, 1, 2, 255))["ce"]
    assert float(found) == pytest.approx(-(math.log(0.1) + math.log(0.2) + math.log(0.3)) / 3, rel=1e-6)


def test_masks_without_an_output_for_background_by_hand():
    """The paper's setting, where every pixel has a class: 2, 3, 4 of 9; label 0 is left out."""
    model, output = by_hand(background="ignored", reduction="valid")
    torch.testing.assert_close(output.scores[0, :, 0, 0], torch.tensor([2 / 9, 3 / 9, 4 / 9]))
    found = model.loss(output, quarters(0, 1, 3, 255))["ce"]
    assert float(found) == pytest.approx(-(math.log(2 / 9) + math.log(4 / 9)) / 2, rel=1e-6)


def test_scores_as_logits_by_hand():
    """Scores 1/2 (2/3, 3/4, 4/5) = 1/3, 3/8, 2/5, and 3/5 for all else."""
    model, output = by_hand(logits="scores")
    values = torch.tensor([1 / 3, 3 / 8, 2 / 5])
    torch.testing.assert_close(output.scores[0, :, 0, 0], values)
    total = float(values.sum()) + 3 / 5
    found = float(model.loss(output, quarters(0, 1, 2, 3))["ce"])
    expected = -sum(math.log(v / total) for v in (3 / 5, 1 / 3, 3 / 8, 2 / 5)) / 4
    assert found == pytest.approx(expected, rel=1e-6)
    model, output = by_hand(logits="scores", background="ignored")
    found = float(model.loss(output, quarters(1, 2, 3, 3))["ce"])
    expected = -sum(math.log(v / (total - 3 / 5)) for v in (1 / 3, 3 / 8, 2 / 5, 2 / 5)) / 4
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_the_sum_over_heads_and_stages():
    model = build(3)
    output, truth = model(images()), labels(0, 1, 4, 6, 255, 5)
    expected = torch.zeros(())
    for first, last, stages in zip((1, 4, 5), (4, 5, 7), output.stages, strict=True):
        assert stages is not None
        assert len(stages) == 2
        for made in stages:
            maps = F.interpolate(made.masks, size=(32, 48), mode="bilinear", align_corners=False)
            probability = torch.cat([torch.zeros_like(maps[:, :1]), maps], 1).softmax(1)
            for value in (0, 1, 4, 6, 5):
                own = value - first + 1 if first <= value < last else 0
                expected = expected - (probability[:, own].log() * (truth == value)).sum() / truth.numel()
    torch.testing.assert_close(model.loss(output, truth)["ce"], expected)
    assert set(model.loss(output, truth)) == {"ce"}


def test_scores_of_a_head_leave_room_for_what_is_not_its_own():
    scores = build(3)(images()).scores
    assert scores.shape == (2, 6, 32, 48)
    for first, last in ((0, 3), (3, 4), (4, 6)):
        assert scores[:, first:last].sum(1).min() > 0
        assert scores[:, first:last].sum(1).max() < 1


def test_background_may_be_a_query():
    model = build(2, background_query=True)
    scores = model(images()).scores
    torch.testing.assert_close(scores[:, :4].sum(1), torch.ones(2, 32, 48))  # background and 3 classes: no further one
    assert scores[:, 4].max() < 1
    assert model(images()).pixel_logits.shape[1] == 5
    maps = model(images()).stages[0][-1].masks  # type: ignore[index]
    logits = F.interpolate(maps, size=(32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores[:, :4], logits.softmax(1))


def test_each_image_has_its_weight_and_old_heads_may_be_left_out():
    model = build(2)
    output, truth = model(images()), labels(0, 1, 4)
    first = model(images()[:1])
    weighted = model.loss(output, truth, weight=torch.tensor([3.0, 0.0]))["ce"]
    torch.testing.assert_close(weighted, 1.5 * model.loss(first, truth[:1])["ce"])
    newest, everything = model.loss(output, truth, newest_only=True)["ce"], model.loss(output, truth)["ce"]
    output.stages[0] = None
    assert model.loss(output, truth)["ce"] == newest < everything


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("logits", ["masks", "scores"])
@pytest.mark.parametrize("cls", [SegViT, Shrunk])
def test_a_new_head_of_one_class_learns_and_old_scores_stay(cls: type[SegViT], logits: str, version: str):
    """A bright quadrant is the new class. The softmax of its head is over it and all else."""
    model = build(1, cls, version, ce={"logits": logits})
    scene, truth = images(), labels(0)
    scene[:, :, :16, :24] += 4
    truth[:, :16, :24] = 4
    before = model(scene).scores
    model.grow(STEPS[1])
    model.freeze_old(skip_in_training=True)
    optimiser = torch.optim.Adam(model.new_parameters(), lr=3e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = model.train().loss(model(scene), truth)["ce"]
        loss.backward()
        assert all(p.grad is not None for p in model.new_parameters()), "processes that train together need them all"
        optimiser.step()
        losses.append(float(loss.detach()))
    after = model.eval()(scene).scores
    assert torch.equal(after[:, :3], before)
    assert losses[-1] < 0.7 * losses[0]
    inside, everywhere = after[:, 3, :16, :24].detach().mean(), after[:, 3].detach().mean()
    assert inside > 1.5 * everywhere


@pytest.mark.parametrize("logits", ["masks", "scores"])
def test_an_image_without_labels_has_no_gradient(logits: str):
    model = build(2, ce={"logits": logits, "reduction": "valid"})
    loss = model.loss(model(images()), labels(255))["ce"]
    loss.backward()
    assert loss.item() == 0
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) == 0


@pytest.mark.parametrize("logits", ["masks", "scores"])
def test_half_precision_gives_a_finite_float32_loss(logits: str):
    model = build(3, ce={"logits": logits})
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(images())
        loss = model.loss(output, labels(0, 1, 2, 255))["ce"]
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_edges_are_learnt_beside_it():
    model = build(1, Shrunk, edges={})
    assert set(model.loss(model.train()(images()), labels(0, 1))) == {"ce", "edge"}


def test_what_cannot_work_is_refused():
    with pytest.raises(ModelError, match=r"one class, and model\.ce\.background = 'ignored'"):
        build(2, ce={"background": "ignored"})
    with pytest.raises(ModelError, match="'class_times_mask' reads the class output"):
        build(1, pixel_form="class_times_mask")
    assert build(1, pixel_form="class_times_mask", ce={"logits": "scores"}).trains_classes


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (SegViTCL, {"calibration": "prior"}, "presence probabilities, which model.loss = 'ce' does not train"),
        (SegViTCL, {"absent_weight": 0.5}, "method.absent_weight is of the mask losses"),
        (MiB, {"form": "query"}, "distils class outputs, which model.loss = 'ce' does not train"),
    ],
)
def test_methods_refuse_what_it_does_not_train(method: Any, options: dict[str, Any], said: str):
    context: Any = type("Context", (), {"model": build(1)})()
    with pytest.raises(ConfigError, match=said):
        method(method.Config(**options)).start_step(context)


@pytest.mark.parametrize(("method", "logits"), [(SegViTCL, "masks"), (MiB, "scores")])
def test_methods_keep_every_promise_with_it(method: Any, logits: str):
    findings = conformance(method, model="segvit", loss="ce", ce={"logits": logits})
    assert [one for one in findings if one.passed is not True] == []
