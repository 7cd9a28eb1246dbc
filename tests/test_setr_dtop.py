"""DToP on SETR-naive: logits of tokens that left, who votes, the loss, MiB's start of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cssbench.errors import ModelError
from cssbench.losses.mask import class_presence, mask_losses, presence_loss
from cssbench.models.setr import SETRNaive
from cssbench.models.setr_dtop import SETRDToP
from cssbench.scenario import Step

VIT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch": 8,
    "width": 32,
    "depth": 3,
    "heads": 2,
    "drop_path": 0.0,
}
FIRST, SECOND = Step(0, (1, 2, 3), ()), Step(1, (4, 5), (1, 2, 3))


def make(*steps: Step, **options: Any) -> SETRDToP:
    torch.manual_seed(0)
    content = {"backbone": {**VIT, "layers": [1, 2, 3]}, "head_width": 16, "keep": 1, "p0": 0.3, **options}
    model = SETRDToP(SETRDToP.Config(head={"width": 16, "heads": 2, "layers": 1, "init_std": 0.3}, **content))
    for step in steps or (FIRST,):
        model.grow(step)
    return model.eval()


def picture(images: int = 3) -> Tensor:
    return torch.randn(images, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def labels_of(x: Tensor, classes: int) -> Tensor:
    found = torch.randint(0, classes + 1, (len(x), 24, 40), generator=torch.Generator().manual_seed(2))
    found[:, :3] = 255
    return found


@torch.no_grad()
def halved(model: SETRDToP, x: Tensor) -> SETRDToP:
    """With the p0 that half of the tokens which are not background exceed at the first head."""
    model.config = model.config.model_copy(update={"p0": 0.9999})
    scores = model(x).auxiliary[0][:, : 1 + len(model.positions[0])]
    scores = scores.softmax(1) if model.config.auxiliary == "fcn" else scores.exp()
    best, label = scores.max(1)
    assert (label > 0).sum() > 4
    model.config = model.config.model_copy(update={"p0": float(best[label > 0].median())})
    return model


@torch.no_grad()
def test_nobody_leaves_at_p0_of_one():
    """Bit for bit SETR-naive."""
    pruned, x = make(FIRST, SECOND, p0=1.0), picture()
    plain = SETRNaive(SETRNaive.Config(backbone={**VIT, "layers": [1, 2, 3]}, head_width=16)).eval()
    plain.grow(FIRST)
    plain.grow(SECOND)
    plain.load_state_dict({n: v for n, v in pruned.state_dict().items() if ".auxiliary." not in n})
    ours, theirs = pruned(x), plain.eval()(x)
    assert ours.auxiliary == []
    assert torch.equal(ours.scores, theirs.scores)
    for one, other in zip(ours.pod_maps(4), theirs.pod_maps(4), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("auxiliary", ["atm", "fcn"])
@pytest.mark.parametrize("rule", ["top", "remove", "average", "ratio"])
def test_a_batch_is_its_images(rule: str, auxiliary: str):
    x = picture(4) * torch.tensor([0.2, 1.0, 3.0, 9.0])[:, None, None, None]
    model = make(FIRST, SECOND, rule=rule, auxiliary=auxiliary)
    if auxiliary == "atm":
        for head in model.heads:
            head.auxiliary[0].class_shift += 3.0  # else most tokens are background
    halved(model, x)
    together, alone = model(x), [model(one[None]) for one in x]
    assert together.depths.unique().numel() > 1
    assert torch.equal(together.depths, torch.cat([one.depths for one in alone]))
    torch.testing.assert_close(together.scores, torch.cat([one.scores for one in alone]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_that_left_keeps_its_logits_and_background_stays():
    x = picture()
    model = halved(make(rule="remove"), x)
    output = model(x)
    left = output.depths == 1
    same = (output.low == output.auxiliary[0]).all(1)
    assert torch.equal(same, left)
    best, label = output.auxiliary[0].softmax(1).max(1)
    assert torch.equal(left, (best > model.config.p0) & (label > 0))
    assert ((best > model.config.p0) & (label == 0)).any()  # certain background


@torch.no_grad()
def test_logits_of_atm_heads_are_those_of_their_scores():
    model = make(FIRST, SECOND, auxiliary="atm", p0=0.99)
    output = model(picture())
    shown = output.auxiliary[0].exp()
    classes = torch.cat(
        [p.classes.softmax(-1)[..., 0][..., None, None] * p.masks.sigmoid() for p in output.masks[0]], dim=1
    )
    torch.testing.assert_close(shown[:, 1:], classes)
    torch.testing.assert_close(shown[:, 0], 1 - classes.amax(1))


@torch.no_grad()
@pytest.mark.parametrize("auxiliary", ["fcn", "atm"])
def test_who_votes(auxiliary: str):
    x = picture()
    model = make(rule="remove" if auxiliary == "fcn" else "ratio", auxiliary=auxiliary, share=0.9)
    sure = auxiliary == "atm"
    for head in model.heads[0].auxiliary if sure else ():
        head.class_shift += 3.0  # else most tokens are background
    before = halved(model, x)(x).depths
    assert before.unique().numel() > 1
    model.grow(SECOND)
    for head in model.heads[1].auxiliary if sure else ():
        head.class_shift += 9.0  # sure of its classes: to all heads together nothing is background
    assert torch.equal(model.eval()(x).depths, before)
    model.config = model.config.model_copy(update={"voters": "all"})
    assert not torch.equal(model(x).depths, before)  # five classes share the probability of three


@pytest.mark.parametrize("auxiliary", ["fcn", "atm"])
def test_loss(auxiliary: str):
    model, x = make(FIRST, SECOND, auxiliary=auxiliary, p0=1.0).train(), picture()
    output, labels = model(x), labels_of(x, 5)
    terms = model.loss(output, labels)

    def cross_entropy(low: Tensor) -> Tensor:
        full = F.interpolate(low, (24, 40), mode="bilinear", align_corners=False)
        return F.cross_entropy(full, labels, ignore_index=255, reduction="sum") / labels.numel()

    torch.testing.assert_close(terms["ce"], cross_entropy(output.low))
    expected = torch.zeros(())
    if auxiliary == "fcn":
        expected = cross_entropy(output.auxiliary[0]) + cross_entropy(output.auxiliary[1])
    else:
        for stage in output.masks:
            for prediction, positions in zip(stage, (range(1, 4), range(4, 6)), strict=True):
                present = class_presence(labels, positions)
                focal, dice = mask_losses(prediction.masks, labels, present, positions, float(present.sum()))
                expected = expected + presence_loss(prediction.classes, present, 0.1) + 20 * focal + dice
    torch.testing.assert_close(terms["auxiliary"], 0.4 * expected)
    sum(terms.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_weights_of_images():
    model, x = make(p0=1.0).train(), picture()
    output, labels = model(x), labels_of(x, 3)
    for name, value in model.loss(output, labels, weight=torch.full((3,), 0.5)).items():
        torch.testing.assert_close(value, 0.5 * model.loss(output, labels)[name])


@torch.no_grad()
def test_new_classes_start_with_a_share_of_the_background():
    model, x = make(p0=0.9999), picture()
    before = model(x)
    model.grow(SECOND)
    model.init_from_background()
    after = model.eval()(x)
    for one, other in ((before.low, after.low), (before.auxiliary[0], after.auxiliary[0])):
        old, new = one.softmax(1), other.softmax(1)
        torch.testing.assert_close(new[:, 1:4], old[:, 1:4])
        for c in (0, 4, 5):
            torch.testing.assert_close(new[:, c], old[:, 0] / 3)


def test_half_precision():
    x = picture()
    model = halved(make(FIRST, SECOND), x).train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.loss(model(x), labels_of(x, 5))
    assert all(term.isfinite() for term in terms.values())


def test_one_tap_is_refused():
    with pytest.raises(ModelError, match=r"model.backbone.layers is \[3\].*'setr-dtop'"):
        make(backbone={**VIT, "layers": [3]})
