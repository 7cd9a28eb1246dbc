"""DToP on SegViT: what leaves, what the maps show, what learns, what later steps may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cssbench.config import PartChoice, part_config
from cssbench.errors import ConfigError, ModelError
from cssbench.losses.mask import class_presence, mask_losses, presence_loss
from cssbench.models.atm import ATMConfig, MaskPrediction
from cssbench.models.dtop import DToP, DToPOutput, StagedATM, TokenATM
from cssbench.models.segvit import SegViT
from cssbench.profile import build_model, count, cut_steps, no_image
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
HEAD = {"width": 16, "heads": 2, "layers": 1, "init_std": 0.1, "self_attention": True, "dropout": 0.0}
FIRST, SECOND = Step(0, (1, 2, 3), ()), Step(1, (4, 5), (1, 2, 3))


def make(*steps: Step, seed: int = 0, layers: tuple[int, ...] = (1, 2, 3), **options: Any) -> DToP:
    torch.manual_seed(seed)
    content = {"backbone": {**VIT, "layers": list(layers)}, "head": HEAD, "keep": 1, "p0": 0.25, **options}
    model = DToP(DToP.Config(**content)).eval()
    for step in steps or (FIRST,):
        model.grow(step)
    return model.eval()


def picture(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 3, 24, 40)), generator=torch.Generator().manual_seed(1))


def labels_of(x: Tensor, classes: int = 3) -> Tensor:
    found = torch.randint(0, classes + 1, (len(x), *x.shape[-2:]), generator=torch.Generator().manual_seed(2))
    found[:, :3] = 255
    return found


def set_p0(model: DToP, p0: float) -> DToP:
    model.config = model.config.model_copy(update={"p0": p0})
    return model


@torch.no_grad()
def halved(model: DToP, x: Tensor) -> DToP:
    """With the p0 that half of the tokens exceed at the first head, in the middle between two tokens' confidences."""
    output = set_p0(model, 0.9999)(x)
    head, first = model.heads[0].auxiliary[0], output.stages[0][0] if output.stages[0] else None
    if model.config.auxiliary == "fcn":
        scores = output.logits_of[0][0].softmax(1)[:, 1:]
    else:
        scores = head.combine(head.class_probabilities(first.classes), first.masks.sigmoid())
    ranked = scores.amax(1).flatten().sort().values
    middle = len(ranked) // 2
    return set_p0(model, float(ranked[middle - 1 : middle + 1].mean()))


@torch.no_grad()
def test_nobody_leaves_at_p0_of_one():
    """Bit for bit SegViT with the last head: the same masks, classes and, upsampled alike, scores."""
    pruned = make(p0=1.0, upsample="logits")
    plain = SegViT(SegViT.Config(backbone={**VIT, "layers": [3]}, head=HEAD)).eval()
    plain.grow(FIRST)
    weights = {name: value for name, value in pruned.state_dict().items() if ".auxiliary." not in name}
    plain.load_state_dict(weights)
    x = picture()
    ours, theirs = pruned(x), plain(x)
    assert len(ours.stages[0]) == 1  # nothing depends on the auxiliary heads
    assert torch.equal(ours.stages[0][-1].masks, theirs.stages[0][-1].masks)
    assert torch.equal(ours.stages[0][-1].classes, theirs.stages[0][-1].classes)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.features[-1], theirs.features[-1])
    assert ours.depths.unique().tolist() == [3]
    product = (
        theirs.stages[0][-1].masks.sigmoid()
        * theirs.heads[0].class_probabilities(theirs.stages[0][-1].classes)[..., None, None]
    )
    expected = F.interpolate(product, (24, 40), mode="bilinear", align_corners=False)
    assert torch.equal(make(p0=1.0)(x).scores, expected)


@torch.no_grad()
def test_a_threshold_that_nobody_reaches_changes_nothing():
    x = picture()
    assert torch.equal(make(p0=0.9999)(x).scores, make(p0=1.0)(x).scores)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["loop", "padded"])
@pytest.mark.parametrize("auxiliary", ["atm", "fcn"])
@pytest.mark.parametrize("rule", ["top", "remove", "average", "ratio"])
def test_a_batch_is_its_images(rule: str, auxiliary: str, attention: str):
    x = picture(4, 3, 24, 40) * torch.tensor([0.2, 1.0, 3.0, 9.0])[:, None, None, None]
    model = halved(make(FIRST, SECOND, rule=rule, auxiliary=auxiliary, attention=attention), x)
    together, alone = model(x), [model(one[None]) for one in x]
    assert together.depths.unique().numel() > 1
    assert torch.equal(together.depths, torch.cat([one.depths for one in alone]))
    torch.testing.assert_close(together.scores, torch.cat([one.scores for one in alone]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_show_what_the_last_head_that_saw_a_token_said():
    x = picture()
    output = halved(make(rule="remove"), x)(x)
    left = output.exits == 0
    assert 0 < left.sum() < left.numel()
    for later in (1, 2):
        same = (output.stages[0][0].masks == output.stages[0][later].masks).all(1)
        assert torch.equal(same, left)


@torch.no_grad()
def test_who_leaves_is_who_is_certain():
    """Against the definition: score = largest class probability x mask probability, computed from SegViT's parts."""
    x = picture()
    model = halved(make(rule="remove", layers=(1, 3)), x)
    output = model(x)
    first = output.stages[0][0]
    probability = first.classes.softmax(-1)[..., 0]
    certainty = (probability[..., None, None] * first.masks.sigmoid()).amax(1)
    clear = (certainty - model.config.p0).abs() > 1e-6
    assert clear.sum() > 30
    assert torch.equal(output.depths[clear], torch.where(certainty > model.config.p0, 1, 3)[clear])
    assert output.depths.unique().tolist() == [1, 3]


def made_output(**options: Any) -> DToPOutput:
    """Two heads on a grid of 1 x 2 cells, one class: the first cell left at the first head."""
    torch.manual_seed(0)
    config = ATMConfig(heads=1)
    head = StagedATM(1, 8, config, [TokenATM(1, 8, config)])
    early = MaskPrediction(torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[3.0, 1.0]]]))
    late = MaskPrediction(torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([[[0.0, 1.0]]]))
    return DToPOutput((1, 2), [], [[early, late]], [head], exits=torch.tensor([[[0, 1]]]), **options)


def test_the_final_map():
    """sigmoid(2) = 0.8808 and sigmoid(-1) = 0.2689; class probabilities sigmoid(3 - 1) early, sigmoid(-1) late."""
    last = made_output().scores.flatten()
    torch.testing.assert_close(last, torch.tensor([0.880797 * 0.268941, 0.268941 * 0.268941]), atol=1e-5, rtol=0)
    own = made_output(assembly="own").scores.flatten()
    torch.testing.assert_close(own, torch.tensor([0.880797 * 0.880797, 0.268941 * 0.268941]), atol=1e-5, rtol=0)


def test_upsampling_the_product_or_the_logits():
    """1 x 2 cells to 1 x 4 pixels: logits 2, 1.25, -0.25, -1; or products 1/4 and 3/4 of the way between two cells."""
    for upsample, expected in (
        ("logits", torch.tensor([2.0, 1.25, -0.25, -1.0]).sigmoid() * 0.268941),
        ("product", 0.268941 * (0.880797 + torch.tensor([0, 0.25, 0.75, 1]) * (0.268941 - 0.880797))),
    ):
        output = made_output(upsample=upsample)
        output.size = (1, 4)
        torch.testing.assert_close(output.scores.flatten(), expected, atol=1e-5, rtol=0)


# Learning


def test_loss_is_that_of_every_head():
    model = make(FIRST, SECOND).train()
    x = picture()
    output, labels = model(x), labels_of(x, 5)
    terms = model.loss(output, labels)
    expected = dict.fromkeys(("class", "focal", "dice"), 0.0)
    for stages, positions in zip(output.stages, (range(1, 4), range(4, 6)), strict=True):
        present = class_presence(labels, positions)
        assert len(stages) == 3
        for stage in stages:
            focal, dice = mask_losses(stage.masks, labels, present, positions, float(present.sum()))
            expected["class"] += presence_loss(stage.classes, present, 0.1)
            expected["focal"] += 20 * focal
            expected["dice"] += dice
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def gradient(model: DToP, term: Tensor) -> float:
    return float(
        torch.autograd.grad(term, model.heads[0].auxiliary[0].stages[0].project.weight, allow_unused=True)[0]
        .abs()
        .sum()
    )


def test_a_later_loss_reaches_the_head_at_which_tokens_left():
    x = picture()
    labels = labels_of(x)
    present = class_presence(labels, range(1, 4))
    pruned = halved(make(rule="remove"), x).train()
    last = pruned(x).stages[0][-1]
    assert gradient(pruned, mask_losses(last.masks, labels, present, range(1, 4), 1.0)[0]) > 0
    unpruned = make(p0=1.0).train()
    last = unpruned(x).stages[0][-1]
    term = mask_losses(last.masks, labels, present, range(1, 4), 1.0)[0]
    weight = unpruned.heads[0].auxiliary[0].stages[0].project.weight
    assert torch.autograd.grad(term, weight, allow_unused=True) == (None,)


def test_every_parameter_learns():
    for options in ({}, {"auxiliary": "fcn"}, {"p0": 1.0}, {"train_p0": 1.0}):
        model = make(FIRST, SECOND, **options).train()
        x = picture()
        sum(model.loss(model(x), labels_of(x, 5)).values()).backward()
        idle = [
            n
            for n, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
        ]
        assert idle == []


def test_direct_trains_without_pruning():
    x = picture()
    model = halved(make(train_p0=1.0, rule="remove"), x)
    assert model(x).depths.unique().numel() > 1
    assert model.train()(x).depths.unique().tolist() == [3]


def test_fcn_heads_learn_by_cross_entropy():
    model = make(FIRST, SECOND, auxiliary="fcn", p0=1.0).train()
    x = picture()
    output, labels = model(x), labels_of(x, 5)
    assert [[o.shape[1] for o in made] for made in output.logits_of] == [[4, 4], [3, 3]]
    expected = 0.0
    for made, low, high in ((output.logits_of[0], 1, 4), (output.logits_of[1], 4, 6)):
        own = labels.clone()
        own[(labels != 255) & ((labels < low) | (labels >= high))] = 0
        own[(labels >= low) & (labels < high)] -= low - 1
        for logits in made:
            full = F.interpolate(logits, (24, 40), mode="bilinear", align_corners=False)
            expected += F.cross_entropy(full, own, ignore_index=255, reduction="sum") / labels.numel()
    torch.testing.assert_close(model.loss(output, labels)["auxiliary"], expected)


@torch.no_grad()
def test_a_cell_that_left_at_an_fcn_shows_its_probability_as_mask():
    x = picture()
    output = halved(make(FIRST, SECOND, auxiliary="fcn", rule="remove"), x)(x)
    cells = (output.exits == 0)[:, None].expand(-1, 2, -1, -1)
    assert 0 < cells.sum() < cells.numel()
    shown, expected = output.stages[1][-1].masks.sigmoid(), output.logits_of[1][0].softmax(1)[:, 1:]
    torch.testing.assert_close(shown[cells], expected[cells])


# Growth


@torch.no_grad()
@pytest.mark.parametrize("auxiliary", ["atm", "fcn"])
def test_old_heads_see_and_say_the_same_after_growth(auxiliary: str):
    x = picture()
    model = halved(make(auxiliary=auxiliary, assembly="own"), x)
    before = model(x)
    assert before.depths.unique().numel() > 1
    model.grow(SECOND)
    after = model.eval()(x)
    assert torch.equal(after.depths, before.depths)
    assert torch.equal(after.scores[:, :3], before.scores)
    assert torch.equal(after.features[-1], before.features[-1])


@torch.no_grad()
def test_with_all_voters_a_new_head_may_let_tokens_go():
    x = picture()
    model = halved(make(rule="remove", voters="all"), x)
    before = model(x)
    model.grow(SECOND)
    sure = model.heads[1].auxiliary[0].classifier
    sure.bias.copy_(torch.tensor([9.0, 0.0]))
    after = model.eval()(x)
    assert (after.exits == 0).sum() > (before.exits == 0).sum()
    assert not torch.equal(after.scores[:, :3], before.scores)


def test_frozen_heads_still_vote():
    x = picture()
    model = halved(make(FIRST, SECOND, rule="remove"), x)
    model.freeze_old(skip_in_training=True)
    evaluated, trained = model(x), model.train()(x)
    assert trained.stages[0] is None
    assert trained.logits_of[0] == []
    assert torch.equal(trained.exits, evaluated.exits)
    sum(model.loss(trained, labels_of(x, 5)).values()).backward()
    learned = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"1"}


@torch.no_grad()
def test_background_never_makes_a_token_leave():
    model = make(background_query=True, p0=0.3, rule="remove")
    for stage in (0, 1):
        head = model.heads[0].at(stage)
        head.class_shift[0] = 50.0  # sure that background is there, and of nothing else
        head.class_shift[1:] = -50.0
    output = model(picture())
    assert output.scores.shape[1] == 4
    assert output.depths.unique().tolist() == [3]


# Inputs and options


@pytest.mark.parametrize("auxiliary", ["atm", "fcn"])
def test_half_precision(auxiliary: str):
    model = make(auxiliary=auxiliary, rule="remove").train()
    x = picture()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        terms = model.loss(output, labels_of(x))
    assert all(term.isfinite() for term in terms.values())
    assert output.scores.dtype == torch.float32


def test_one_class_and_an_image_of_void():
    model = make(Step(0, (1,), ())).train()
    x = picture(2, 3, 16, 8)
    labels = torch.full((2, 16, 8), 255)
    terms = model.loss(model(x), labels)
    assert terms["focal"] == terms["dice"] == 0
    sum(terms.values()).backward()


def test_the_first_version_of_the_head_votes_too():
    """Version v1: score of a class = sum over queries of P[q, c] sigmoid(M[q])."""
    x = picture()
    model = halved(make(head={**HEAD, "version": "v1"}, rule="remove", layers=(1, 3)), x)
    with torch.no_grad():
        output = model(x)
    first = output.stages[0][0]
    score = torch.einsum("bqc,bqhw->bchw", first.classes.softmax(-1)[..., :3], first.masks.sigmoid()).amax(1)
    assert 0 < (output.exits == 0).sum() < score.numel()
    clear = (score - model.config.p0).abs() > 1e-6
    assert torch.equal((output.exits == 0)[clear], (score > model.config.p0)[clear])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": (3,)}, "Name two blocks or more"),
        ({"backbone": {**VIT, "layers": [1, 3], "prefix_tokens": "keep"}}, "prefix_tokens = 'drop'"),
        ({"backbone": {**VIT, "layers": [1, 4]}}, "from 1 to 3"),
        ({"assembly": "own", "upsample": "logits"}, "model.upsample = 'product'"),
        ({"loss": "ce"}, "model.loss = 'mask'"),
    ],
)
def test_bad_options_name_what_is_allowed(options: dict, told: str):
    with pytest.raises(ModelError, match=told):
        make(**options)


@pytest.mark.parametrize("p0", [0.0, 1.5, -1])
def test_a_threshold_outside_its_range(p0: float):
    with pytest.raises(ConfigError, match="p0"):
        part_config("model", PartChoice(name="dtop", p0=p0), DToP.Config)


def test_without_an_image_only_the_unpruned_model_can_be_counted():
    options = {"backbone": {**VIT, "layers": [1, 3]}, "head": HEAD}
    for p0 in (1.0, 0.9):
        model = build_model("dtop", {**options, "p0": p0})
        with torch.device("meta"):
            model.grow(cut_steps(None, 3)[0])
        if p0 == 1:
            assert count(model.eval(), no_image(32)).gflops > 0
        else:
            with pytest.raises(ModelError, match="depends on the image"):
                count(model.eval(), no_image(32))


@torch.no_grad()
@pytest.mark.parametrize("name", ["beitv2_base_patch16_224", "vit_small_patch16_dinov3"])
def test_encoders_that_know_where_tokens_are(name: str):
    """BEiT's biases, DINOv3's rotations: a batch is its images, and nothing moves while all tokens stay."""
    sizes = {"width": 64, "depth": 3, "heads": 2, "patch": 8, "image_size": 32, "name": name}
    x = picture()
    model = halved(make(backbone={**sizes, "layers": [1, 2, 3], "drop_path": 0.0}, rule="remove"), x)
    together, alone = model(x), [model(one[None]) for one in x]
    assert together.depths.unique().numel() > 1
    torch.testing.assert_close(together.scores, torch.cat([one.scores for one in alone]), atol=1e-5, rtol=1e-4)
    assert torch.equal(set_p0(model, 0.9999)(x).features[-1], set_p0(model, 1.0)(x).features[-1])
    model.config = model.config.model_copy(update={"rule": "average", "p0": 0.2})
    with pytest.raises(ModelError, match="averaged tokens have none"):
        model(x)
