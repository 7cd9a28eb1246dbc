"""Each baseline's own terms, targets, prototypes and thresholds by hand, on pixels and on ATM heads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
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

from cssbench import registry
from cssbench.api import ConfigError, Segmenter
from cssbench.losses.prototypes import class_means
from cssbench.models.atm import MaskPrediction
from cssbench.models.passes import class_prototypes, uncertainty_thresholds
from cssbench.models.segvit import MaskOutput
from cssbench.scenario import IGNORE


def sure_of(model: Segmenter, position: int) -> None:
    """Make a grown per-pixel model predict one position everywhere."""
    for head in model.heads:
        head.weight.data.zero_()
        head.bias.data.zero_()
    model.heads[0].bias.data[position] = 50.0


# --- LwF and ILT --------------------------------------------------------------------------------------------------


def test_lwf_is_the_weighted_cross_entropy_of_old_outputs():
    ctx = second_step(made := make_method("lwf"))
    batch = batch_of(ctx, mixed())
    q, log_p = batch.previous.logits.softmax(1), batch.output.logits[:, :4].log_softmax(1)
    terms = made.loss(ctx, batch)
    torch.testing.assert_close(terms["distillation"], 100 * -(q * log_p).mean(1).mean())
    torch.testing.assert_close(terms["ce"], ctx.model.loss(batch.output, batch.labels)["ce"])


def test_ilt_adds_the_distance_of_features():
    ctx = second_step(made := make_method("ilt", feature_weight=7.0))
    assert float(made.loss(ctx, batch_of(ctx, mixed()))["features"].detach()) == 0  # nothing learned yet
    with torch.no_grad():
        ctx.model.norm.bias.add_(2.0)
    assert float(made.loss(ctx, batch_of(ctx, mixed()))["features"].detach()) == pytest.approx(7 * 4, rel=1e-5)


# --- MiB ----------------------------------------------------------------------------------------------------------


def test_mib_terms_by_hand():
    ctx = second_step(made := make_method("mib"))
    torch.nn.init.normal_(ctx.model.heads[1].weight)
    batch = batch_of(ctx, mixed())
    p, q = batch.output.logits.softmax(1), batch.previous.logits.softmax(1)
    merged = torch.cat([p[:, :1] + p[:, 4:].sum(1, keepdim=True), p[:, 1:4]], 1)
    explained = torch.where(batch.labels == 0, p[:, :4].sum(1), p.gather(1, batch.labels.clamp(max=5)[:, None])[:, 0])
    terms = made.loss(ctx, batch)
    torch.testing.assert_close(terms["distillation"], -10 * (q * merged.log()).mean(1).mean())
    counted = -explained.log() * (batch.labels != IGNORE)
    torch.testing.assert_close(terms["unbiased_ce"], counted.mean())
    valid = make_method("mib", reduction="valid").loss(ctx, batch)
    torch.testing.assert_close(valid["unbiased_ce"], counted.sum() / (batch.labels != IGNORE).sum())


def test_mib_starts_where_its_distillation_is_least():
    """Right after the balanced start the merged outputs equal the previous model's: the distillation is its entropy."""
    ctx = second_step(made := make_method("mib", weight=1.0))
    batch = batch_of(ctx, mixed())
    q = batch.previous.logits.softmax(1)
    torch.testing.assert_close(made.loss(ctx, batch)["distillation"], -(q * q.log()).mean(1).mean())


# --- PLOP ---------------------------------------------------------------------------------------------------------


def test_plop_trains_background_as_what_the_previous_model_sees():
    ctx = second_step(made := make_method("plop"))
    assert ctx.previous is not None
    sure_of(ctx.previous, 2)
    batch = batch_of(ctx, mixed())
    relabelled = batch.labels.masked_fill(batch.labels == 0, 2)
    expected = (
        F.cross_entropy(batch.output.logits, relabelled, ignore_index=IGNORE, reduction="sum") / relabelled.numel()
    )
    torch.testing.assert_close(made.loss(ctx, batch)["ce"], expected)


def test_plop_leaves_out_what_its_thresholds_reject():
    ctx = second_step(paper := make_method("plop", arithmetic="paper", adaptive=False))
    batch = batch_of(ctx, torch.zeros(2, 32, 32, dtype=torch.int64))
    assert paper.thresholds.shape == (4,)  # type: ignore[attr-defined]
    assert 0.3 < float(paper.thresholds.max()) <= 1  # type: ignore[attr-defined]  # an untrained model is unsure
    everything = make_method("plop", arithmetic="paper", adaptive=False)
    everything.thresholds = torch.full((4,), math.inf)  # type: ignore[attr-defined]
    nothing = make_method("plop", arithmetic="paper", adaptive=False)
    nothing.thresholds = torch.zeros(4)  # type: ignore[attr-defined]
    some, most, none = (float(m.loss(ctx, batch)["ce"].detach()) for m in (paper, everything, nothing))
    assert none == 0 < some < most


@pytest.mark.parametrize("method", ["plop", "reminder"])
def test_a_rejected_pixel_is_no_negative_of_a_mask(method: str):
    ctx = second_step(made := make_method(method, adaptive=False), "segvit")
    made.thresholds = torch.zeros(4)  # type: ignore[attr-defined]  # nothing of the background is accepted
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    labels[:, :, 16:] = 4
    batch = batch_of(ctx, labels)
    masks = batch.output.final[-1][1].masks  # (B, 2, 4, 4) of the new head; class 4 is its first
    terms = made.loss(ctx, batch)
    (gradient,) = torch.autograd.grad(terms["focal"] + terms["dice"], masks, retain_graph=True)
    assert gradient[:, 0, :, 0].abs().max() == 0  # the cells that are upsampled to rejected pixels alone
    assert gradient[:, 0, :, 2:].abs().min() > 0


@pytest.mark.parametrize(("without", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_plop_drops_an_image_without_background_unless_told(without: float, expected: float):
    ctx = second_step(made := make_method("plop", without_background=without))
    batch = batch_of(ctx, torch.full((2, 32, 32), 4))
    full = float(F.cross_entropy(batch.output.logits, batch.labels).detach())
    assert float(made.loss(ctx, batch)["ce"].detach()) == pytest.approx(expected * full)


def test_plop_holds_features_where_they_were():
    made = make_method("plop", pod_factor=1.0, pod_output_factor=0.0)
    ctx = second_step(made)
    assert float(made.loss(ctx, batch_of(ctx, mixed()))["pod"].detach()) == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        ctx.model.norm.weight.mul_(1.5)
    moved = made.loss(ctx, batch_of(ctx, mixed()))["pod"]
    assert float(moved.detach()) > 1
    moved.backward()
    assert ctx.model.norm.weight.grad.abs().sum() > 0


def test_plop_leaves_the_labels_of_the_batch_alone():
    ctx = second_step(made := make_method("plop"))
    batch = batch_of(ctx, mixed())
    made.loss(ctx, batch)
    assert torch.equal(batch.labels, mixed())


# --- REMINDER -----------------------------------------------------------------------------------------------------


def test_reminder_keeps_old_prototypes_and_adds_new_ones():
    ctx = second_step(made := make_method("reminder"))
    old = made.state_dict()["prototypes"]
    assert old.shape == (4, 32)
    with torch.no_grad():
        ctx.model.norm.bias.add_(1.0)
    made.end_step(ctx)
    new = made.state_dict()["prototypes"]
    assert new.shape == (6, 32)
    assert torch.equal(new[:4], old)
    assert (new[4:] != 0).all()
    again = make_method("reminder")
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.state_dict()["prototypes"], new)


def test_reminder_distils_on_pixels_of_new_classes_only():
    ctx = second_step(made := make_method("reminder"))
    assert float(made.loss(ctx, batch_of(ctx, LABELS["nothing but background"]))["similar"].detach()) == 0
    assert float(made.loss(ctx, batch_of(ctx, mixed()))["similar"].detach()) > 0
    off = make_method("reminder", delta=1e6)  # no similarity passes: what is left is epsilon
    off.load_state_dict(made.state_dict())
    assert float(off.loss(ctx, batch_of(ctx, mixed()))["similar"].detach()) < 1e-4


def test_reminder_is_plop_and_one_term():
    ctx = second_step(made := make_method("reminder"))
    plop = make_method("plop")
    plop.thresholds = made.thresholds  # type: ignore[attr-defined]
    batch = batch_of(ctx, mixed())
    terms, without = made.loss(ctx, batch), plop.loss(ctx, batch)
    assert terms.keys() - without.keys() == {"similar"}
    assert all(torch.equal(terms[name], value) for name, value in without.items())


def test_prototypes_are_means_over_the_batches_that_show_a_class():
    model = make_model().train()
    only = torch.full((2, 32, 32), 2)
    first, second = scenes(only), scenes(mixed() % 4, 1)
    prototypes = class_prototypes(model, [first, second], torch.device("cpu"), 4)
    assert model.training
    model.eval()
    with torch.no_grad():
        means = [class_means(model(b["images"]).embedding, b["labels"], 4)[0] for b in (first, second)]
    torch.testing.assert_close(prototypes[2], means[0][2])  # the second batch shows 0, 1 and 3 only
    torch.testing.assert_close(prototypes[[0, 1, 3]], means[1][[0, 1, 3]])
    both = class_prototypes(model, [first, first | {"images": second["images"]}], torch.device("cpu"), 4)
    with torch.no_grad():
        other = class_means(model(second["images"]).embedding, only, 4)[0]
    torch.testing.assert_close(both[2], (means[0][2] + other[2]) / 2)
    assert (both[[0, 1, 3]] == 0).all()


def test_thresholds_are_of_background_pixels_and_predicted_classes():
    model = make_model().eval()
    sure_of(model, 1)
    model.heads[0].bias.data[1] = 1.0  # p = e / (e + 3) and 1 / (e + 3)
    p = torch.tensor([math.e, 1.0, 1.0, 1.0]) / (math.e + 3)
    u = float(-(p * p.log()).sum() / math.log(4))
    loader, device = [scenes(mixed())], torch.device("cpu")
    found = uncertainty_thresholds(model, loader, device, 4, 6, "paper", floor=1e-3)
    assert found[1] == pytest.approx(u, abs=0.01)  # a bin of 100
    assert found[[0, 2, 3]].tolist() == [1e-3] * 3
    no_background = uncertainty_thresholds(model, [scenes(torch.full((2, 32, 32), 4))], device, 4, 6, "paper")
    assert no_background.tolist() == [1e-3] * 4


# --- ATM heads ----------------------------------------------------------------------------------------------------


def test_scores_and_background_are_normalised_by_the_softmax():
    output = make_model("segvit").eval()(scenes(mixed())["images"])
    scores, logits = output.scores, output.pixel_logits
    everything = torch.cat([1 - scores.amax(1, keepdim=True), scores], 1)
    assert logits.shape == (2, 4, 32, 32)
    torch.testing.assert_close(logits.softmax(1), everything / everything.sum(1, keepdim=True))
    assert torch.equal(logits.argmax(1) == 0, scores.amax(1) <= 0.5)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_class_logits_times_masks(version: str):
    options = {"head": MODELS["segvit"]["head"] | {"version": version}}
    cls = registry.load("models", "segvit")
    model = cls(cls.Config(**(MODELS["segvit"] | options), pixel_form="class_times_mask"))
    model.grow(SCENARIO.steps[0])
    output = model.eval()(scenes(mixed())["images"])
    prediction, logits = output.stages[0][-1], output.pixel_logits
    masks = F.interpolate(prediction.masks, size=(32, 32), mode="bilinear", align_corners=False).sigmoid()
    classes = prediction.classes
    for c in range(3):
        if version == "v2":
            expected = (classes[:, c, 0] - classes[:, c, 1])[:, None, None] * masks[:, c]
        else:
            expected = sum(classes[:, q, c][:, None, None] * masks[:, q] for q in range(3))
        torch.testing.assert_close(logits[:, 1 + c], expected)
    assert (logits[:, 0] == 0).all()


def test_background_may_be_a_query_of_the_first_head():
    model = make_model("segvit", background_query=True).eval()
    model.grow(SCENARIO.steps[1])
    output = model(scenes(mixed())["images"])
    assert model.has_background
    assert model.positions == [range(4), range(4, 6)]
    assert output.scores.shape[1] == output.pixel_logits.shape[1] == 6
    assert output.pod_maps(4)[-1].shape[1] == 4
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)  # background alone: its query, number 0, has a mask to learn
    assert float(model.loss(output, labels)["dice"].detach()) > 0
    assert (
        float(make_model("segvit").loss(make_model("segvit")(scenes(labels)["images"]), labels)["dice"].detach()) == 0
    )


def test_pod_compares_the_masks_of_old_classes():
    ctx = second_step(make_method("plop"), "segvit")
    batch = batch_of(ctx, mixed())
    new, old = batch.output.pod_maps(4), batch.previous.pod_maps(4)
    assert [m.shape for m in new] == [(2, 32, 4, 4), (2, 32, 4, 4), (2, 3, 4, 4)]
    for a, b in zip(new, old, strict=True):
        torch.testing.assert_close(a, b)  # nothing learned yet
    torch.testing.assert_close(new[0].mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)


def test_mib_by_queries_distils_old_heads_and_teaches_the_new_one():
    ctx = second_step(made := make_method("mib", form="query"), "segvit")
    batch = batch_of(ctx, mixed())
    prediction = batch.previous.stages[0][-1]
    q, m = prediction.classes.softmax(-1), prediction.masks.sigmoid()
    terms = made.loss(ctx, batch)
    entropy = -(m * m.log() + (1 - m) * (1 - m).log()).mean()
    torch.testing.assert_close(terms["query_distillation"], 200 * -(q * q.log()).sum(-1).mean())
    torch.testing.assert_close(terms["mask_distillation"], 20 * entropy)
    (terms["class"] + terms["focal"] + terms["dice"]).backward()
    old, new = ctx.model.heads
    assert all(p.grad is None for p in old.parameters())
    assert new.classifier.weight.grad.abs().sum() > 0


def predicted(*probabilities: float) -> MaskPrediction:
    """Queries of one image and one cell, each with this probability of presence and of its mask."""
    logits = torch.tensor(probabilities).logit()
    return MaskPrediction(logits[None, :, None, None], torch.stack([logits, torch.zeros_like(logits)], 1)[None])


@pytest.mark.parametrize(("distilled", "chosen"), [(False, [1, 2, 3]), (True, [0, 1, 2, 3])])
def test_mib_by_queries_leaves_out_a_background_query(distilled: bool, chosen: list[int]):
    """Three heads, of which the last is new: background and two classes, one class, one class."""
    old, new = [0.9, 0.25, 0.5, 0.75], [0.1, 0.5, 0.5, 0.25]
    previous = MaskOutput((1, 1), [], [[predicted(*old[:3])], [predicted(old[3])]], [None] * 2, True)
    output = MaskOutput((1, 1), [], [[predicted(*new[:3])], [predicted(new[3])], [predicted(0.6)]], [None] * 3, True)
    terms = make_method("mib", form="query", distil_background=distilled).query_terms(output, previous)
    costs = [-(p * math.log(q) + (1 - p) * math.log(1 - q)) for p, q in zip(old, new, strict=True)]
    mean = sum(costs[i] for i in chosen) / len(chosen)
    assert float(terms["query_distillation"]) == pytest.approx(200 * mean)
    assert float(terms["mask_distillation"]) == pytest.approx(20 * mean)


def test_mib_by_pixels_adds_both_terms_to_the_new_heads_own():
    ctx = second_step(made := make_method("mib"), "segvit")
    terms = made.loss(ctx, batch_of(ctx, mixed()))
    assert terms.keys() == {"class", "focal", "dice", "unbiased_ce", "distillation"}


def test_mib_by_queries_needs_atm_heads():
    with pytest.raises(ConfigError, match=r"needs a model with ATM heads \('segvit'\), not LinearViT"):
        make_method("mib", form="query").start_step(context(0, make_model(), None, []))


def test_a_weight_scales_mask_losses_by_its_mean():
    model, labels = make_model("segvit").eval(), mixed() % 4
    output = model(scenes(labels)["images"])
    whole, part = model.loss(output, labels), model.loss(output, labels, weight=torch.tensor([0.2, 0.4]))
    for name, value in whole.items():
        torch.testing.assert_close(part[name], 0.3 * value)
