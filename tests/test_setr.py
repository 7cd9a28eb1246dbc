"""SETR-naive: layers and cost, growth, frozen BatchNorm, MiB's start, gradients, other shapes and precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cssbench.models.setr import NaiveHead, SETRNaive
from cssbench.scenario import Step

STEPS = [Step(0, (1, 2, 3), ()), Step(1, (4, 5), (1, 2, 3))]
TINY = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}


def build(steps: int = 2, **options: Any) -> SETRNaive:
    torch.manual_seed(0)
    backbone = TINY | {"layers": [1, 2], "drop_path": 0.0}
    model = SETRNaive(SETRNaive.Config.model_validate({"backbone": backbone, "head_width": 8} | options))
    for step in STEPS[:steps]:
        model.grow(step)
    return model.eval()


def images(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_head_is_two_convolutions_at_the_papers_cost():
    head = NaiveHead(768, 256, 150)
    macs = 1024 * (head.hidden.weight.numel() + head.classifier.weight.numel())
    assert macs / 1e9 == pytest.approx(107.24 - 107.00, abs=0.005)
    assert SETRNaive.Config().head_width == 256


def test_a_head_by_hand():
    """Hidden layer (x, -x) of one channel, normalised by (value - 1) / 2, rectified, then summed with weights 3, 5."""
    head = NaiveHead(1, 2, 1).eval()
    head.load_state_dict({
        "hidden.weight": torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1), "hidden.bias": torch.zeros(2),
        "norm.weight": torch.ones(2), "norm.bias": torch.zeros(2), "norm.num_batches_tracked": torch.tensor(0),
        "norm.running_mean": torch.ones(2), "norm.running_var": torch.full((2,), 4.0 - head.norm.eps),
        "classifier.weight": torch.tensor([3.0, 5.0]).reshape(1, 2, 1, 1), "classifier.bias": torch.tensor([0.25]),
    })  # fmt: skip
    x = torch.tensor([[[[7.0, -9.0, 0.5]]]])
    torch.testing.assert_close(head(x), torch.tensor([[[[3 * 3 + 0.25, 5 * 4 + 0.25, 0.25]]]]))


def test_outputs_of_an_image_that_is_not_square():
    output = build()(images())
    assert output.low.shape == (2, 6, 4, 6)  # background, 3 base classes, 2 new ones
    assert output.pixel_logits.shape == (2, 6, 32, 48)
    assert [m.shape for m in output.pod_maps(4)] == [(2, 32, 4, 6)] * 2 + [(2, 4, 4, 6)]


def test_frozen_heads_are_bit_equal_after_training():
    model = build(1)
    before, old = model(images()).low, {k: v.clone() for k, v in model.state_dict().items()}
    model.grow(STEPS[1])
    model.freeze_old()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    labels = torch.full((2, 32, 48), 4)
    for _ in range(2):
        model.train()
        assert not model.heads[0].norm.training  # type: ignore[union-attr]
        assert model.heads[1].norm.training  # type: ignore[union-attr]
        model.loss(model(images()), labels)["ce"].backward()
        optimiser.step()
    assert torch.equal(model.eval()(images()).low[:, :4], before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in old.items())
    assert all(p.grad is not None for p in model.heads[1].parameters())


def test_every_parameter_gets_a_gradient():
    model = build().train()
    model.loss(model(images()), torch.randint(0, 6, (2, 32, 48)))["ce"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_balanced_start_splits_background_evenly_and_moves_no_old_class():
    model = build(1)
    with torch.no_grad():
        model.heads[0].norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    before = model(images()).logits.softmax(1)
    model.grow(STEPS[1])
    model.init_from_background()
    after = model.eval()(images()).logits.softmax(1)  # a fresh head is in training mode
    torch.testing.assert_close(after[:, 1:4], before[:, 1:])
    for channel in (0, 4, 5):
        torch.testing.assert_close(after[:, channel], before[:, 0] / 3)


def test_half_precision_gives_a_finite_float32_loss():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(images())
        loss = model.loss(output, torch.zeros(2, 32, 48, dtype=torch.int64))["ce"]
    assert output.low.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.isfinite()
