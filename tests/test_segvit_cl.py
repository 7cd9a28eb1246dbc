"""What SegViT-CL promises: old classes are frozen, and what may change at all after a step. Three tiny steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_segvit import SCENARIO, context, make_model, scenes, train_step
from torch import nn

from cssbench import protocol
from cssbench.api import Batch, ConfigError, Segmenter
from cssbench.baselines.finetune import FineTune
from cssbench.baselines.segvit_cl import SegViTCL
from cssbench.metrics import continual
from cssbench.metrics.confusion import confusion
from cssbench.models.segmenter import freeze_copy
from cssbench.models.segvit import SegViT
from cssbench.predict import Predictor

TEST_IMAGES, TEST_IDS = scenes(12, 1)


@torch.no_grad()
def scores_of(model):
    return model.eval()(TEST_IMAGES).scores


def run(method, version="v2", **options):
    """Per step: the frozen copy (`ctx.previous` of the next step), and the scores of the model itself."""
    model, copies, scores = make_model(version), [], []
    for step in SCENARIO.steps:
        model.grow(step)
        train_step(model, method, step, copies[-1] if copies else None, **options)
        copies.append(freeze_copy(model))
        scores.append(scores_of(model))
    return copies, scores


@pytest.fixture(
    scope="module",
    params=[("v2", "none", {}), ("v1", "none", {}), ("v2", "prior", {}), ("v2", "temperature", {"holdout": 2})],
    ids=lambda p: "-".join(p[:2]),
)
def trained(request):
    """Copies and scores after each of three steps, for both decoders and every calibration."""
    version, calibration, options = request.param
    return run(SegViTCL(SegViTCL.Config(calibration=calibration)), version, **options)


@pytest.fixture(scope="module")
def copies(trained):
    return trained[0]


@pytest.fixture(scope="module")
def scores(trained):
    return trained[1]


def predictions(scores, threshold=0.2):
    """Class ids (B, H, W) after each step, by rule: [{"all": ..., "foreground": ...}, ...]."""
    predictor = Predictor(make_model(), SCENARIO, threshold)
    found = []
    for t, images in enumerate(scores):
        each = [predictor([image], [t])[t] for image in images]
        found.append({rule: torch.stack([one[rule] for one in each]) for rule in ("all", "foreground")})
    return found


def test_old_scores_are_bit_equal_after_later_steps(copies, scores):
    """Of the model itself, whose newest head has just learned and is frozen a step later, and of the copies."""
    first, second, third = scores
    assert [s.shape[1] for s in (first, second, third)] == [3, 5, 6]
    assert torch.equal(second[:, :3], first)
    assert torch.equal(third[:, :5], second)
    assert first.std() > 0.01
    assert all(torch.equal(scores_of(copy), own) for copy, own in zip(copies, scores, strict=True))


def test_a_label_stays_or_becomes_a_new_class(scores):
    found = predictions(scores)
    changed = 0
    for t in (1, 2):
        new = torch.tensor(SCENARIO.groups[t])
        for rule in ("all", "foreground"):
            before, after = found[t - 1][rule], found[t][rule]
            assert ((after == before) | torch.isin(after, new)).all()
            changed += int((after != before).sum())
    assert changed > 0  # otherwise this test sees nothing


def test_hits_and_false_alarms_of_old_classes_never_rise(scores):
    found = predictions(scores)
    changed = 0
    for rule in ("all", "foreground"):
        counts = [confusion(TEST_IDS, step[rule], 6) for step in found]
        for t in (1, 2):
            for c in SCENARIO.steps[t].old:
                hits = [int(counts[i][c, c]) for i in (t - 1, t)]
                alarms = [int(counts[i][:, c].sum()) - hit for i, hit in zip((t - 1, t), hits, strict=True)]
                assert hits[1] <= hits[0]
                assert alarms[1] <= alarms[0]
                changed += hits[0] - hits[1] + alarms[0] - alarms[1]
    assert changed > 0


def group_scores(predicted, step):
    matrix = confusion(TEST_IDS, predicted, 6).numpy()
    return protocol.get("mmseg150@1").scores(matrix, SCENARIO.groups, step)


def test_nothing_is_lost_to_changed_parameters(scores):
    """Without the later outputs the last model predicts what the model after step s did: all loss is competition."""
    predictor = Predictor(make_model(), SCENARIO, 0.2)
    found, without = predictions(scores), []
    for s in (0, 1):
        alone = [predictor([image], [s])[s] for image in scores[-1]]
        for rule in ("all", "foreground"):
            assert torch.equal(torch.stack([image[rule] for image in alone]), found[s][rule])
        without.append(group_scores(torch.stack([image["foreground"] for image in alone]), s)[f"group{s}"])
    table = continual.group_table([group_scores(step["foreground"], t) for t, step in enumerate(found)])
    parts = continual.lost_parts(table, without)
    assert parts == [(0.0, lost) for lost in continual.drop(table)]


def test_forgetting_of_the_last_step_is_exactly_zero(copies, scores):
    """Thesis table 4.12. Measured a second time, as if another step had followed that changed nothing."""
    first, again = predictions(scores), predictions([*scores[:2], scores_of(freeze_copy(copies[-1]))])
    rows = [group_scores(predicted["foreground"], 2) for predicted in (first[-1], again[-1])]
    table = [[0.0], [0.0, 0.0], *([row[f"group{g}"] for g in range(3)] for row in rows)]
    assert continual.forgetting(table)[2] == 0.0
    assert max(table[2]) > 0


def test_heads_learn_their_classes():
    """Enough passes that the invariants are about a model which knows something."""
    model = make_model()
    model.grow(SCENARIO.steps[0])
    before = sum(float(v) for v in _loss(model, SCENARIO.steps[0]).values())
    train_step(model, SegViTCL(), SCENARIO.steps[0], passes=10)
    after = sum(float(v) for v in _loss(model, SCENARIO.steps[0]).values())
    assert after < 0.8 * before


@torch.no_grad()
def _loss(model, step):
    ctx = context(model.eval(), step)
    return model.loss(model(ctx.train_loader[0]["images"]), ctx.train_loader[0]["labels"])


def test_old_parameters_and_buffers_do_not_change(copies):
    for before, after in pairwise(copies):
        old, new = before.state_dict(), after.state_dict()
        assert all(torch.equal(new[name], value) for name, value in old.items())
        grown = {name.split(".")[1] for name in new.keys() - old.keys()}
        assert grown == {str(len(before.heads))}


@pytest.fixture
def second_step():
    """A model that has grown its second head; the method has frozen the rest."""
    model = make_model()
    for step in SCENARIO.steps[:2]:
        model.grow(step)
    SegViTCL().start_step(context(model, SCENARIO.steps[1]))
    return model


def test_only_the_newest_head_learns(second_step):
    model = second_step
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"heads.1.{name}" for name, _ in model.heads[1].named_parameters()}
    groups = model.param_groups()
    assert [group["name"] for group in groups] == ["heads"]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.new_parameters()}


def test_encoder_and_old_heads_stay_in_eval_mode_whatever_is_called(second_step):
    model = second_step
    for mode in (True, False, True):
        model.train(mode)
        assert not any(m.training for frozen in (model.backbone, model.heads[0]) for m in frozen.modules())
        assert all(m.training == mode for m in model.heads[1].modules())
    assert model.training


def test_at_step_0_everything_learns():
    model = make_model()
    model.grow(SCENARIO.steps[0])
    SegViTCL().start_step(context(model, SCENARIO.steps[0]))
    model.train()
    assert all(m.training for m in model.modules())
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"backbone.vit.cls_token"}  # dropped before the first block


def test_frozen_heads_are_skipped_in_training_and_used_in_evaluation(second_step):
    model = second_step.train()
    calls = []
    for i, head in enumerate(model.heads):
        head.register_forward_hook(lambda *a, i=i: calls.append(i))
    output = model(TEST_IMAGES)
    assert calls == [1]
    assert output.stages[0] is None
    assert output.scores.shape[1] == 2
    model.eval()
    assert model(TEST_IMAGES).scores.shape[1] == 5
    assert calls == [1, 0, 1]


def test_no_gradient_goes_through_the_encoder(second_step):
    model = second_step.train()
    images = TEST_IMAGES.clone().requires_grad_()
    output = model(images)
    assert not any(feature.requires_grad for feature in output.features)
    labels = torch.full((12, 32, 32), 4)
    sum(model.loss(output, labels).values()).backward()
    assert images.grad is None
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None} == {"1"}
    # Gradients are as outside where nothing is frozen, and off where they were off.
    with torch.no_grad():
        assert not model(TEST_IMAGES).stages[1][-1].masks.requires_grad


def test_the_loss_of_a_step_is_that_of_the_new_head_alone(second_step):
    """Old classes have no label at this step, so old heads would be taught their absence."""
    labels = torch.randint(3, 6, (12, 32, 32), generator=torch.Generator().manual_seed(0))
    new_only = second_step.train()(TEST_IMAGES)
    every = second_step.eval()(TEST_IMAGES)
    alone = SegViT.loss(second_step, new_only, labels)
    both = SegViT.loss(second_step, every, labels)
    assert all(both[name] > alone[name] for name in ("class", "focal", "dice"))


def test_previous_is_a_frozen_copy_of_its_own():
    model = make_model()
    model.grow(SCENARIO.steps[0])
    train_step(model, SegViTCL(), SCENARIO.steps[0], passes=1)
    previous = freeze_copy(model)
    expected = scores_of(model)
    model.grow(SCENARIO.steps[1])
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.zeros_(tensor)
    assert not previous.training
    assert not any(p.requires_grad for p in previous.parameters())
    assert torch.equal(previous(TEST_IMAGES).scores, expected)


def test_a_copy_made_at_a_later_step_shows_every_head(second_step):
    """The model itself leaves out frozen heads in training; the copy must not."""
    copy = freeze_copy(second_step.train())
    assert copy(TEST_IMAGES).scores.shape[1] == 5
    assert second_step(TEST_IMAGES).scores.shape[1] == 2
    copy.train()  # a method might; modules frozen in the copy are the copy's own
    assert copy(TEST_IMAGES).scores.shape[1] == 5
    assert copy.is_frozen(copy.heads[0])
    assert not copy.is_frozen(second_step.heads[0])


def test_fine_tuning_changes_old_parameters():
    (first, second, _), scores = run(FineTune(), passes=1)
    old, new = first.state_dict(), second.state_dict()
    fixed = {"backbone.vit.cls_token", *(name for name in old if "class_s" in name)}  # unused; calibration
    assert {name for name in old if torch.equal(new[name], old[name])} == fixed
    assert not torch.allclose(scores[1][:, :3], scores[0], atol=1e-3)


def test_models_without_atm_heads_are_refused():
    class Other(Segmenter):
        def grow(self, step):
            self.heads.append(nn.Linear(1, 1))

    model = Other()
    model.grow(SCENARIO.steps[0])
    with pytest.raises(ConfigError, match=r"needs a model with ATM heads, not Other\. Use model 'segvit'"):
        SegViTCL().start_step(context(model, SCENARIO.steps[0]))


def test_absent_weight_of_later_steps_replaces_the_models_own():
    model = make_model(absent_weight=0.3)
    method = SegViTCL(SegViTCL.Config(absent_weight=2.0))
    for step in SCENARIO.steps[:2]:
        model.grow(step)
        ctx = context(model, step)
        method.start_step(ctx)
        model.eval()
        loaded = ctx.train_loader[0]
        batch = Batch(loaded["images"], loaded["labels"], model(loaded["images"]))
        own, other = (model.loss(batch.output, batch.labels, weight) for weight in (0.3, 2.0))
        assert own["class"] != other["class"]
        assert method.loss(ctx, batch) == (own if step.index == 0 else other)
        assert SegViTCL().loss(ctx, batch) == own


def test_freezing_reaches_parameters_that_hang_on_the_model_itself():
    class Bare(Segmenter):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def grow(self, step):
            self.heads.append(torch.nn.Linear(2, 2))

    model = Bare()
    model.grow(None)
    model.freeze_old()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["heads.0.weight", "heads.0.bias"]
