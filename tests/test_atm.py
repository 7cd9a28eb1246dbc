"""The ATM decoder against a plain re-implementation: loops over images, heads and queries, from the papers' text."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cssbench.errors import ModelError
from cssbench.losses.mask import class_presence, mask_losses, presence_loss
from cssbench.models.atm import ATMConfig, ATMHead, MaskPrediction

torch.set_num_threads(1)  # the tensors are tiny
N, C, D, HEADS, GRID = 3, 12, 8, 2, (2, 3)
LENGTH = GRID[0] * GRID[1]


def make_head(version="v2", stages=3, layers=2, seed=0, classes=N, **options):
    """A head in double and eval mode, whose every parameter is random, so that none is without effect."""
    torch.manual_seed(seed)
    config = ATMConfig(version=version, width=D, heads=HEADS, layers=layers, dropout=0.2, **options)
    head = ATMHead(classes, C, stages, config).double().eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def make_taps(stages=3, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, LENGTH, C, dtype=torch.double, generator=generator) for _ in range(stages)]


def plain_norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        + (weights[f"{name}.bias"])
    )


def plain_attention(q, k, v):
    """One image: (N, d), (L, d), (L, d) -> context (N, d) and mean over heads of q k / sqrt(head dim)."""
    size = D // HEADS
    context, similarity = torch.zeros_like(q), torch.zeros(len(q), len(k), dtype=q.dtype)
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        for n in range(len(q)):
            scores = torch.stack([(q[n, part] * key[part]).sum() for key in k]) / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum()
            context[n, part] = sum(w * value[part] for w, value in zip(weights, v, strict=True))
            similarity[n] += scores / HEADS
    return context, similarity


def plain_head(head, taps, version):
    """One (masks, classes) per stage: stage 1 reads the deepest tap."""
    weights = dict(head.named_parameters())

    def linear(x, name):
        return torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]

    outputs = []
    for image in range(len(taps[0])):
        queries, mask, own = weights["tokens.weight"], 0, []
        for s, tap in enumerate(reversed(taps)):
            tokens = plain_norm(linear(tap[image], f"stages.{s}.project"), weights, f"stages.{s}.norm")
            for i in range(len(head.stages[s].layers)):
                layer = f"stages.{s}.layers.{i}"
                if version == "v1":
                    fused = f"{layer}.self_attention.in_proj"
                    q, k, v = (
                        torch.einsum("ni,oi->no", queries, w) + b
                        for w, b in zip(
                            weights[f"{fused}_weight"].chunk(3), weights[f"{fused}_bias"].chunk(3), strict=True
                        )
                    )
                    attended = linear(plain_attention(q, k, v)[0], f"{layer}.self_attention.out_proj")
                    queries = plain_norm(queries + attended, weights, f"{layer}.self_norm")
                cross = f"{layer}.cross_attention"
                q, k, v = linear(queries, f"{cross}.q"), linear(tokens, f"{cross}.k"), linear(tokens, f"{cross}.v")
                context, similarity = plain_attention(q, k, v)
                queries = plain_norm(queries + linear(context, f"{cross}.out"), weights, f"{layer}.cross_norm")
                wide = linear(queries, f"{layer}.ffn.0").clamp(min=0)
                queries = plain_norm(queries + linear(wide, f"{layer}.ffn.3"), weights, f"{layer}.ffn_norm")
            mask = mask + similarity  # of the stage's last layer
            own.append((mask.reshape(-1, *GRID), linear(queries, "classifier")))
        outputs.append(own)
    return [tuple(torch.stack(x) for x in zip(*stage, strict=True)) for stage in zip(*outputs, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_forward_agrees_with_a_plain_implementation(version, fold):
    head, taps = make_head(version, fold=fold), make_taps()
    got, expected = head(taps, GRID), plain_head(head, taps, version)
    assert len(got) == 3
    for prediction, (masks, classes) in zip(got, expected, strict=True):
        torch.testing.assert_close(prediction.masks, masks, atol=1e-9, rtol=0)
        torch.testing.assert_close(prediction.classes, classes, atol=1e-9, rtol=0)
        assert classes.shape == (2, N, 2 if version == "v2" else N + 1)
        assert masks.std() > 0.1


@torch.no_grad()
def test_stages_read_the_deepest_tap_first():
    """Stage 1 sees the last tap only, stage 2 the last two."""
    head, taps = make_head(), make_taps()
    first = head(taps, GRID)
    for changed, same in ((0, 2), (1, 1), (2, 0)):
        others = [tap + (i == changed) for i, tap in enumerate(taps)]
        # A constant added to all of a token survives the projection, as its weights are random.
        second = head(others, GRID)
        equal = [torch.equal(a.masks, b.masks) for a, b in zip(first, second, strict=True)]
        assert equal == [stage < same for stage in range(3)]


@torch.no_grad()
def test_masks_are_cumulative_sums_of_the_last_layers_similarities():
    head, taps = make_head(), make_taps()
    similarities = []
    for stage in head.stages:
        stage.layers[-1].cross_attention.register_forward_hook(lambda *a: similarities.append(a[2][1]))
    predictions = head(taps, GRID)
    total = 0
    for similarity, prediction in zip(similarities, predictions, strict=True):
        total = total + similarity
        assert torch.equal(prediction.masks.flatten(2), total)


@torch.no_grad()
def test_v2_classes_are_independent_and_v1_classes_are_not():
    taps = make_taps()
    for version in ("v2", "v1"):
        large, small = make_head(version), make_head(version, seed=5, classes=N - 1)
        state = {k: v for k, v in large.state_dict().items() if not k.startswith("classifier")}
        small.load_state_dict(
            state | {"tokens.weight": state["tokens.weight"][1:], "class_shift": torch.zeros(2)}, False
        )
        for a, b in zip(large(taps, GRID), small(taps, GRID), strict=True):
            assert torch.allclose(a.masks[:, 1:], b.masks, atol=1e-12) == (version == "v2")


class Kernels(TorchDispatchMode):
    """Writes down every operation and the shapes it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func), [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_freezing_a_head_does_not_change_its_kernels(version, fold):
    """A linear of a view takes another one when its weight requires grad: old scores would move in the last bit."""
    head, taps = make_head(version, fold=fold), [tap[:, 1:] for tap in make_taps()]
    seen = []
    for learning in (True, False):
        head.requires_grad_(learning)
        with Kernels() as kernels:
            head(taps, (LENGTH - 1, 1))
        seen.append(kernels.seen)
    assert len(seen[0]) > 100
    assert seen[0] == seen[1]


def test_only_v1_has_self_attention():
    names = {v: {n for n, _ in make_head(v).named_parameters() if ".self_" in n} for v in ("v1", "v2")}
    assert names["v2"] == set()
    assert len(names["v1"]) == 3 * 2 * 6  # stages x layers x (in, out, norm) x (weight, bias)
    modules = [m for m in make_head("v2").modules() if isinstance(m, nn.MultiheadAttention)]
    assert modules == []


@torch.no_grad()
def test_scores_of_v2_pair_each_class_with_its_own_mask():
    head = make_head()
    prediction = head(make_taps(), GRID)[-1]
    present = prediction.classes.softmax(-1)[..., 0]
    masks = F.interpolate(prediction.masks, size=(5, 7), mode="bilinear", align_corners=False).sigmoid()
    scores = head.scores(prediction, (5, 7))
    for b in range(2):
        for c in range(N):
            torch.testing.assert_close(scores[b, c], present[b, c] * masks[b, c], atol=1e-12, rtol=0)


@torch.no_grad()
def test_scores_of_v1_let_every_query_vote_for_every_class():
    head = make_head("v1")
    prediction = head(make_taps(), GRID)[-1]
    votes = prediction.classes.softmax(-1)
    masks = F.interpolate(prediction.masks, size=(5, 7), mode="bilinear", align_corners=False).sigmoid()
    scores = head.scores(prediction, (5, 7))
    assert scores.shape == (2, N, 5, 7)
    for b in range(2):
        for c in range(N):
            expected = sum(votes[b, q, c] * masks[b, q] for q in range(N))
            torch.testing.assert_close(scores[b, c], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_scores_of_many_classes_are_the_same_without_gradients(version):
    head = make_head(version, classes=19)
    prediction = head(make_taps(), GRID)[-1]
    wanted = head.scores(prediction, (5, 7))
    assert wanted.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(head.scores(prediction, (5, 7)), wanted, atol=1e-12, rtol=0)
    if version == "v2":
        shares = prediction.classes.softmax(-1)[..., 0]
        for n in range(19):
            mask = F.interpolate(prediction.masks[:, [n]], size=(5, 7), mode="bilinear").sigmoid()
            torch.testing.assert_close(wanted[:, [n]], mask * shares[:, n, None, None, None], atol=1e-12, rtol=0)


@torch.no_grad()
def test_mask_logits_are_upsampled_before_the_sigmoid():
    """Logits -8 and 8 side by side: the middle is at 1/2 either way, but a quarter in, sigmoid(-4) is not 1/4."""
    head = make_head(classes=1)
    masks = torch.tensor([[[[-8.0, 8.0]]]], dtype=torch.double)
    prediction = MaskPrediction(masks, torch.tensor([[[50.0, -50.0]]], dtype=torch.double))
    got = head.scores(prediction, (1, 4))[0, 0, 0]
    torch.testing.assert_close(got, torch.tensor([-8.0, -4.0, 4.0, 8.0], dtype=torch.double).sigmoid())


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_calibration_is_identity_until_set_and_moves_presence_only(version):
    head, taps = make_head(version), make_taps()
    prediction = head(taps, GRID)[-1]
    logits = prediction.classes
    plain = logits.softmax(-1)
    plain = plain[..., 0] if version == "v2" else plain[..., :-1]
    torch.testing.assert_close(head.class_probabilities(logits), plain, atol=1e-12, rtol=0)

    scale, shift = 0.5, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.double)
    head.class_scale.fill_(scale)
    head.class_shift.copy_(shift)
    got = head.class_probabilities(logits)
    for b in range(2):
        for n in range(N):
            exponents = (scale * logits[b, n]).exp()
            if version == "v2":  # the log-odds of presence are scaled, then shifted
                odds = exponents[0] / exponents[1] * shift[n].exp()
                assert got[b, n].item() == pytest.approx((odds / (1 + odds)).item(), abs=1e-12)
            else:  # of each class against 'no object'
                exponents[:-1] *= shift.exp()
                torch.testing.assert_close(got[b, n], exponents[:-1] / exponents.sum(), atol=1e-12, rtol=0)
    again = head(taps, GRID)[-1]
    assert torch.equal(again.masks, prediction.masks)
    assert torch.equal(again.classes, logits)


def test_calibration_is_saved_but_not_trained():
    head = make_head()
    assert {"class_scale", "class_shift"} <= head.state_dict().keys()
    assert {"class_scale", "class_shift"}.isdisjoint(dict(head.named_parameters()))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_initialisation(version):
    """As in the public code: every Linear, LayerNorms, class tokens."""
    torch.manual_seed(0)
    head = ATMHead(40, 64, 2, ATMConfig(version=version, width=48, heads=2, init_std=0.07))
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 * (1 + 3 * (6 if version == "v2" else 7)) + 1
    for linear in linears:
        assert (linear.bias == 0).all()
        assert linear.weight.std().item() == pytest.approx(0.07, rel=5 / math.sqrt(2 * linear.weight.numel()))
        assert abs(linear.weight.mean().item()) < 5 * 0.07 / math.sqrt(linear.weight.numel())
    norms = [m for m in head.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * (1 + 3 * (2 if version == "v2" else 3))
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    assert head.tokens.weight.std().item() == pytest.approx(1, rel=0.1)
    assert abs(head.tokens.weight.mean().item()) < 0.1
    assert (head.class_scale, head.class_shift.abs().sum()) == (1, 0)
    for m in head.modules():
        if isinstance(m, nn.MultiheadAttention):  # Xavier: uniform up to sqrt(6 / (48 + 144))
            assert m.in_proj_weight.abs().max().item() == pytest.approx(math.sqrt(6 / 192), rel=0.01)


def test_width_defaults_to_half_and_must_divide_into_heads():
    assert ATMHead(2, 24, 1, ATMConfig(heads=4)).tokens.weight.shape == (2, 12)
    with pytest.raises(ModelError, match=r"width 12 .* 5 attention heads.*divisor of 12"):
        ATMHead(2, 24, 1, ATMConfig(heads=5))


def test_taps_and_stages_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        make_head(stages=3)(make_taps(2), GRID)


@torch.no_grad()
def test_dropout_works_in_training_only():
    head, taps = make_head(), make_taps()
    first, second = head(taps, GRID), head(taps, GRID)
    assert all(torch.equal(a.classes, b.classes) for a, b in zip(first, second, strict=True))
    head.train()
    assert not torch.equal(head(taps, GRID)[-1].classes, head(taps, GRID)[-1].classes)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gradients_reach_every_parameter_from_the_last_stage_alone(version):
    head, taps = make_head(version), [tap.requires_grad_() for tap in make_taps()]
    labels = torch.tensor([[1, 2, 3] * 4, [1, 0, 255] * 4]).reshape(2, 3, 4)
    present = class_presence(labels, range(1, 4))
    last = head(taps, GRID)[-1]
    loss = presence_loss(last.classes, present) + sum(mask_losses(last.masks, labels, present, range(1, 4), 4))
    loss.backward()
    assert all(tap.grad.abs().max() > 0 for tap in taps)
    for name, parameter in head.named_parameters():
        gradient = parameter.grad.abs()
        if name.endswith("layers.0.cross_attention.k.bias"):
            # A softmax does not see a constant added to all keys; only the last layer of a stage shows its logits.
            assert gradient.max() < 1e-12
        else:
            assert gradient.max() > 1e-6, name


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_each_stage_is_an_output_of_its_own(version):
    """The loss of stage s reaches stages 1..s, and no later one."""
    head, taps = make_head(version), make_taps()
    for number in range(3):
        head.zero_grad()
        prediction = head(taps, GRID)[number]
        (prediction.masks.square().mean() + prediction.classes.square().mean()).backward()
        reached = [any(p.grad is not None and p.grad.abs().max() > 0 for p in s.parameters()) for s in head.stages]
        assert reached == [stage <= number for stage in range(3)]
