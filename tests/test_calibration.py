"""Calibration of SegViT-CL's scores by class priors and by a temperature from held-out images."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_segvit import SCENARIO, context, make_model, train_step

from cssbench.api import ConfigError
from cssbench.baselines.segvit_cl import SegViTCL, fit_scale, held_out_margins, prior_shift


def test_prior_shift_by_hand():
    """20 of the step's 40 images, of 200 in all, show the class: odds 1 against 1/9, but for the smoothing."""
    assert prior_shift(20, 40, 200) == pytest.approx(math.log(20.5 / 180.5))
    assert prior_shift(20, 40, 200) == pytest.approx(math.log(1 / 9), abs=0.03)
    assert prior_shift(5, 40, 60) == pytest.approx(math.log(5.5 / 55.5) - math.log(5.5 / 35.5))
    assert math.isfinite(prior_shift(40, 40, 200))
    assert math.isfinite(prior_shift(0, 40, 200))
    assert prior_shift(3, 40, 40) == prior_shift(40, 40, 40) == 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_prior_calibration_uses_the_counts_of_the_step(version):
    """Fixed when the step ends; zero at step 0, where the images of the step are all there are."""
    model, method = make_model(version), SegViTCL(SegViTCL.Config(calibration="prior"))
    for step in SCENARIO.steps[:2]:
        model.grow(step)
        ctx = context(model, step)
        ctx.images, ctx.class_images = (30, 10)[: step.index + 1], dict.fromkeys(step.new_positions, 6)
        if step.index == 1:
            ctx.class_images[5] = 9
        method.start_step(ctx)
        method.end_step(ctx)
    assert model.heads[0].class_shift.tolist() == [0.0] * 3
    expected = [math.log(6.5 / 34.5) - math.log(6.5 / 4.5), math.log(9.5 / 31.5) - math.log(9.5 / 1.5)]
    assert model.heads[1].class_shift.tolist() == pytest.approx(expected)
    assert [head.class_scale.item() for head in model.heads] == [1.0, 1.0]


@pytest.mark.parametrize("scale", [0.2, 1.0, 2.5])
def test_temperature_recovers_a_known_scale(scale):
    """Presence drawn with log-odds scale * margin; the grid has steps of 2 %."""
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(20_000, 3, generator=generator)
    present = torch.rand(margins.shape, generator=generator) < (scale * margins).sigmoid()
    assert fit_scale(margins, present).item() == pytest.approx(scale, rel=0.04)


def test_temperature_stays_in_its_range():
    margins = torch.tensor([[1.0, -1.0]])
    assert fit_scale(margins, margins > 0).item() == pytest.approx(4.0)  # separable: the surer the better
    assert fit_scale(margins, margins < 0).item() == pytest.approx(0.05)


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_held_out_margins_are_of_the_newest_heads_last_stage(version):
    model = make_model(version)
    for step in SCENARIO.steps[:2]:
        model.grow(step)
    ctx = context(model.train(), SCENARIO.steps[1], holdout=3)
    margins, present = held_out_margins(ctx)
    assert model.training
    assert margins.shape == present.shape == (12, 2)
    model.eval()
    for i, loaded in enumerate(ctx.holdout_loader):
        classes = model(loaded["images"]).stages[1][-1].classes
        for b in range(4):
            for n in range(2):
                logits = classes[b, n]
                own = logits[0] - logits[1] if version == "v2" else logits[n] - logits[2]
                assert margins[4 * i + b, n].item() == pytest.approx(own.item(), abs=1e-5)
                assert present[4 * i + b, n] == (loaded["labels"][b] == 4 + n).any()


def test_temperature_is_set_at_the_end_of_a_step_for_its_head_only():
    model, method = make_model(), SegViTCL(SegViTCL.Config(calibration="temperature"))
    for step in SCENARIO.steps[:2]:
        model.grow(step)
        ctx = train_step(model, method, step, holdout=2, passes=1)
        expected = fit_scale(*held_out_margins(ctx))
        assert model.heads[step.index].class_scale == expected
        assert expected != 1
        assert (model.heads[step.index].class_shift == 0).all()


def test_temperature_without_held_out_images_is_refused():
    model = make_model()
    model.grow(SCENARIO.steps[0])
    method = SegViTCL(SegViTCL.Config(calibration="temperature"))
    with pytest.raises(ConfigError, match=r"needs held-out images: set data\.holdout above 0"):
        method.start_step(context(model, SCENARIO.steps[0]))
    method.start_step(context(model, SCENARIO.steps[0], holdout=1))
