"""The per-pixel linear head on a plain ViT: shapes, growth, options, initialisation, freezing."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cssbench.config import PartChoice, RunConfig
from cssbench.experiment import resolve
from cssbench.models.linear import LinearViT
from cssbench.models.segmenter import freeze_copy
from cssbench.scenario import IGNORE, Step

STEPS = [Step(0, (1, 2, 3), ()), Step(1, (4, 5), (1, 2, 3))]
TINY = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 3, "heads": 2}


def build(steps: int = 2, **options: Any) -> LinearViT:
    torch.manual_seed(0)
    backbone = TINY | {"layers": [1, 2, 3], "drop_path": 0.0}
    model = LinearViT(LinearViT.Config.model_validate({"backbone": backbone} | options))
    for step in STEPS[:steps]:
        model.grow(step)
    return model.eval()


def images(height: int = 32, width: int = 48, number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_outputs_have_the_documented_shapes():
    model = build()
    output = model(images())
    assert output.low.shape == (2, 6, 4, 6)  # background, 3 base classes, 2 new ones
    assert output.scores.shape == output.logits.shape == output.pixel_logits.shape == (2, 6, 32, 48)
    assert [f.shape for f in output.features] == [(2, 32, 4, 6)] * 3
    assert output.embedding is output.features[-1]
    assert [m.shape for m in output.pod_maps(4)] == [(2, 32, 4, 6)] * 3 + [(2, 4, 4, 6)]
    assert model.has_background
    assert [len(head.bias) for head in model.heads] == [4, 2]


@pytest.mark.parametrize(
    ("name", "section", "layers"),
    [
        ("vit-linear", None, [3, 6, 9, 12]),
        ("vit-linear", {}, [3, 6, 9, 12]),
        ("vit-linear", {"name": "vit_small_patch16_384"}, [3, 6, 9, 12]),
        ("vit-linear", {"layers": [12]}, [12]),
        ("segvit", None, [6, 8, 12]),
        ("segvit", {"name": "vit_small_patch16_384"}, [6, 8, 12]),
    ],
)
def test_a_run_writes_its_taps_and_each_model_has_its_own(name: str, section: dict | None, layers: list[int]):
    model = PartChoice(name=name) if section is None else PartChoice(name=name, backbone=section)
    content = {"scenario": {"name": "synthetic-10-5"}, "method": {"name": "finetune"}, "train": {"iterations": 1}}
    written = resolve(RunConfig.model_validate(content | {"model": model})).to_toml()
    assert tomllib.loads(written)["model"]["backbone"]["layers"] == layers


def test_logits_are_upsampled_before_the_loss():
    model, labels = build(), torch.randint(0, 6, (2, 32, 48), generator=torch.Generator().manual_seed(2))
    output = model(images())
    upsampled = F.interpolate(output.low, size=(32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.loss(output, labels)["ce"], F.cross_entropy(upsampled, labels))


def test_pod_maps_fold_new_logits_into_background():
    low, folded = (output := build()(images())).low, output.pod_maps(4)[-1]
    torch.testing.assert_close(folded[:, 0], low[:, 0] + low[:, 4] + low[:, 5])
    assert torch.equal(folded[:, 1:], low[:, 1:4])


def test_reduction_counts_ignored_pixels_in_the_denominator_or_not():
    labels = torch.zeros(2, 32, 48, dtype=torch.int64)
    labels[:, :, 12:] = IGNORE
    output = build()(images())
    everything, valid = (build(reduction=r).loss(output, labels)["ce"] for r in ("all", "valid"))
    torch.testing.assert_close(everything, valid / 4)


def test_a_weight_scales_each_image():
    model, labels = build(), torch.ones(2, 32, 48, dtype=torch.int64)
    output = model(images())
    weighted = model.loss(output, labels, weight=torch.tensor([0.5, 0.0]))["ce"]
    one = F.cross_entropy(output.logits[:1], labels[:1])
    torch.testing.assert_close(weighted, one * 0.5 / 2)


def test_early_taps_are_normalised_unless_asked_otherwise():
    normalised, raw = build()(images()).features, build(taps="raw")(images()).features
    for a, b in zip(normalised[:-1], raw[:-1], strict=True):
        torch.testing.assert_close(a.mean(1), torch.zeros_like(a[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(a, F.layer_norm(b.movedim(1, -1), (32,)).movedim(-1, 1))
    torch.testing.assert_close(normalised[-1], raw[-1])


def test_the_final_norm_can_be_left_out():
    with_norm, without = build()(images()).embedding, build(norm=False)(images()).embedding
    torch.testing.assert_close(with_norm, F.layer_norm(without.movedim(1, -1), (32,), eps=1e-6).movedim(-1, 1))


def test_growing_leaves_old_outputs_alone():
    one, two = build(1), build(1)
    two.grow(STEPS[1])
    assert torch.equal(one(images()).low, two(images()).low[:, :4])


def test_balanced_start_splits_background_evenly_and_moves_no_old_class():
    model = build(1)
    before = model(images()).logits.softmax(1)
    model.grow(STEPS[1])
    model.init_from_background()
    after = model(images()).logits.softmax(1)
    torch.testing.assert_close(after[:, 1:4], before[:, 1:])
    for channel in (0, 4, 5):
        torch.testing.assert_close(after[:, channel], before[:, 0] / 3)


def test_a_frozen_encoder_gets_no_gradient():
    model = build()
    model.freeze_old()
    model.train()(images()).logits.square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"heads.1.weight", "heads.1.bias"}


def test_parameters_are_grouped_as_in_every_model():
    groups = {group["name"]: group for group in build().param_groups()}
    assert groups["heads"]["head"]
    assert len(groups["heads"]["params"]) == 4
    assert all(p.ndim == 1 or p.shape[0] == 1 for p in groups["encoder_no_decay"]["params"])


def test_the_previous_model_is_a_copy():
    model = build(1)
    previous = freeze_copy(model)
    model.grow(STEPS[1])
    model.init_from_background()
    assert len(previous.heads) == 1
    assert not torch.equal(previous.heads[0].bias, model.heads[0].bias)


def test_an_input_that_does_not_divide_is_refused():
    with pytest.raises(Exception, match="does not divide into patches of 8 px"):
        build()(images(30, 32))
