"""Distillation losses, against loops over pixels, cells and classes in numpy."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from cssbench.losses.distill import (
    class_similarity,
    feature_distance,
    fold_logits,
    local_pod,
    plain_distillation,
    pod_loss,
    unbiased_distillation,
    weighted_distillation,
)

B, C, K, D, H, W = 2, 6, 4, 3, 4, 6
N = C - K


def normal(*shape, seed=0, scale=2.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


def logits(seed=0, height=H, width=W):
    """New (B, C, H, W) and old (B, K, H, W) logits."""
    return normal(B, C, height, width, seed=seed), normal(B, K, height, width, seed=seed + 1000)


def softmax(z):
    e = np.exp(z)
    return e / e.sum()


# --- outputs ------------------------------------------------------------------------------------------------------


def expected_distillation(new, old, alpha, mask, reduction, class_reduction, unbiased):
    z, z_old = new.numpy(), old.numpy()
    total = count = 0.0
    for b, i, j in np.ndindex(B, H, W):
        on = mask is None or bool(mask[b, i, j])
        count += on or reduction == "all"
        if not on:
            continue
        q = softmax(alpha * z_old[b, :, i, j])
        if unbiased:
            p = softmax(z[b, :, i, j])
            p = [p[0] + p[K:].sum(), *p[1:K]]
        else:
            p = softmax(z[b, :K, i, j])
        cost = -sum(q[c] * np.log(p[c]) for c in range(K))
        total += cost / K if class_reduction == "mean" else cost
    return total / count


@pytest.mark.parametrize("class_reduction", ["mean", "sum"])
@pytest.mark.parametrize(("masked", "reduction"), [(False, "valid"), (True, "valid"), (True, "all")])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_distillation_agrees_with_a_loop_over_pixels(class_reduction, masked, reduction, alpha):
    new, old = logits()
    mask = normal(B, H, W, seed=5) > 0 if masked else None
    for unbiased, loss in ((True, unbiased_distillation), (False, plain_distillation)):
        expected = expected_distillation(new, old, alpha, mask, reduction, class_reduction, unbiased)
        got = loss(new, old, alpha, mask, reduction, class_reduction)
        assert got.item() == pytest.approx(expected, abs=1e-9)


def test_distillation_hand_worked():
    """q = (1/2, 1/2); p = (1/4, 1/2, 1/4): the background with the new class has 1/2, so the cost is log 2, over K."""
    old = torch.zeros(1, 2, 1, 1, dtype=torch.double)
    new = torch.tensor([1.0, 2.0, 1.0], dtype=torch.double).log().reshape(1, 3, 1, 1)
    assert unbiased_distillation(new, old).item() == pytest.approx(np.log(2) / 2)
    assert unbiased_distillation(new, old, class_reduction="sum").item() == pytest.approx(np.log(2))
    # among the old outputs alone p = (1/3, 2/3)
    assert plain_distillation(new, old).item() == pytest.approx((np.log(3) + np.log(3 / 2)) / 4)


def test_unbiased_is_plain_without_new_classes():
    new, old = logits(1)
    assert unbiased_distillation(new[:, :K], old).item() == pytest.approx(
        plain_distillation(new[:, :K], old).item(), abs=1e-12
    )


def test_unbiased_gradient_vanishes_where_the_distributions_match():
    """A student that splits the old background among itself and the new classes, unevenly, is at the minimum."""
    old = logits(2)[1]
    q = old.softmax(1)
    split = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double).reshape(1, 3, 1, 1)
    background = q[:, :1] * split
    new = torch.cat([background[:, :1], q[:, 1:], background[:, 1:]], 1).log().requires_grad_()
    loss = unbiased_distillation(new, old)
    loss.backward()
    assert new.grad.abs().max() < 1e-12
    assert loss.item() == pytest.approx(-(q * q.log()).mean().item(), abs=1e-12)
    assert unbiased_distillation(new + normal(*new.shape, seed=3, scale=0.1), old) > loss
    (gradient,) = torch.autograd.grad(plain_distillation(new, old), new)
    assert gradient.abs().max() > 1e-3, "plain distillation wants the background to itself"


def test_plain_ignores_new_classes():
    new, old = logits(3)
    shifted = new.clone()
    shifted[:, K:] += 5
    assert torch.equal(plain_distillation(new, old), plain_distillation(shifted, old))
    assert unbiased_distillation(new, old) != unbiased_distillation(shifted, old)


def test_empty_mask_gives_zero():
    new, old = logits(4)
    new.requires_grad_()
    for loss in (plain_distillation, unbiased_distillation):
        value = loss(new, old, mask=torch.zeros(B, H, W, dtype=torch.bool))
        value.backward()
        assert value == 0
    assert not new.grad.any()


def test_one_old_output():
    """K = 1: everything is background or new, so neither loss asks for anything."""
    new, old = logits(5)
    assert plain_distillation(new, old[:, :1]) == 0
    assert unbiased_distillation(new, old[:, :1]).abs() < 1e-12


# --- features and POD ---------------------------------------------------------------------------------------------


def test_feature_distance():
    new, old = normal(B, D, H, W), normal(B, D, H, W, seed=1)
    expected = sum((new[i] - old[i]).item() ** 2 for i in np.ndindex(*new.shape)) / new.numel()
    assert feature_distance(new, old).item() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="differ in shape"):
        feature_distance(new, old[:1])


def edges(size, parts):
    """Even parts of a range; the first ones take what is left over."""
    lengths = [size // parts + (i < size % parts) for i in range(parts)]
    return [(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(parts)]


def expected_pod(new, old, cells, normalise=False):
    """Mean over images of the distance between embeddings. cells: (top, bottom, left, right) of every cell."""
    distances = []
    for b in range(len(new)):
        embeddings = []
        for x in (new[b].numpy(), old[b].numpy()):
            e = []
            for top, bottom, left, right in cells:
                for d in range(len(x)):
                    square = [[x[d, i, j] ** 2 for j in range(left, right)] for i in range(top, bottom)]
                    e += [sum(row) / len(row) for row in square]
                    e += [sum(column) / len(column) for column in zip(*square, strict=True)]
            e = np.array(e)
            embeddings.append(e / np.sqrt((e**2).sum()) if normalise else e)
        distances.append(np.sqrt(((embeddings[0] - embeddings[1]) ** 2).sum()))
    return np.mean(distances)


def square_cells(width, scales):
    return [
        (i * (width // s), (i + 1) * (width // s), j * (width // s), (j + 1) * (width // s))
        for s in scales
        for i in range(s)
        for j in range(s)
    ]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (12, 4)])
def test_local_pod_agrees_with_loops_over_cells(height, width, normalise):
    new, old = normal(B, D, height, width), normal(B, D, height, width, seed=1)
    cells = [(*r, *c) for s in (1, 2, 4) for r in edges(height, s) for c in edges(width, s)]
    got = local_pod(new, old, normalise=normalise)
    assert got.item() == pytest.approx(expected_pod(new, old, cells, normalise), abs=1e-9)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 10), (6, 6), (16, 8), (10, 12), (3, 3)])
def test_reference_pod_agrees_with_loops_over_cells(height, width):
    """k = W // s on both axes; the last cells of 10 x 12 have one row; 3 x 3 has no scale 4."""
    new, old = normal(B, D, height, width), normal(B, D, height, width, seed=1)
    cells = [(t, min(b, height), x, r) for t, b, x, r in square_cells(width, (1, 2, 4)) if b > t]
    assert local_pod(new, old, reference=True).item() == pytest.approx(expected_pod(new, old, cells), abs=1e-9)


@pytest.mark.parametrize("side", [4, 8, 12, 32])
def test_reference_pod_is_local_pod_on_square_maps_divisible_by_the_scales(side):
    new, old = normal(B, D, side, side), normal(B, D, side, side, seed=1)
    assert local_pod(new, old, reference=True).item() == pytest.approx(local_pod(new, old).item(), abs=1e-10)


@pytest.mark.parametrize(("height", "width"), [(12, 8), (10, 10)])
def test_local_pod_sees_every_pixel_and_the_reference_does_not(height, width):
    old = normal(1, 1, height, width)
    new = old.clone()
    new[..., -1, -1] += 1
    assert local_pod(new, old) > 0
    assert local_pod(new, old, scales=(4,), reference=True) == 0


def test_reference_pod_breaks_down_on_flat_maps():
    flat = normal(B, D, 8, 12)
    with pytest.raises(ValueError, match="8 x 12"):
        local_pod(flat, flat, reference=True)
    assert local_pod(flat, flat) == 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 7), (4, 6)])
def test_local_pod_takes_any_size(height, width):
    """Uneven and tiny maps: a constant map c has e = c², in D values per strip, whatever the cells."""
    new, old = torch.full((1, 1, height, width), 2.0), torch.full((1, 1, height, width), 1.0)
    strips = sum(height * min(s, width) + width * min(s, height) for s in (1, 2, 4))
    assert local_pod(new, old).item() == pytest.approx(3 * np.sqrt(strips))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_equal_maps_give_zero_with_zero_gradient(reference, normalise):
    old = normal(B, D, 8, 8)
    new = old.clone().requires_grad_()
    loss = local_pod(new, old, reference=reference, normalise=normalise)
    loss.backward()
    assert loss == 0
    assert not new.grad.any()
    assert local_pod(-old, old) == 0, "maps are squared"


def test_fold_logits_hand_worked():
    new = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0]).reshape(1, 5, 1, 1)
    assert fold_logits(new, 3).flatten().tolist() == [31, 2, 3]
    assert fold_logits(new, 5) is new
    with pytest.raises(ValueError, match="num_old"):
        fold_logits(new, 0)


def test_pod_loss_folds_weighs_and_averages():
    maps = [(normal(B, D, 8, 8, seed=i), normal(B, D, 8, 8, seed=i + 50)) for i in range(2)]
    new, old = logits(6, 8, 8)
    got = pod_loss([*(m[0] for m in maps), new], [*(m[1] for m in maps), old], [1e-3, 2e-3, 1e-5], C, N)
    folded = new[:, :K].clone()
    for c in range(K, C):
        folded[:, 0] += new[:, c]
    layers = [expected_pod(*m, square_cells(8, (1, 2, 4))) for m in [*maps, (folded, old)]]
    expected = np.sqrt(C / N) * (1e-3 * layers[0] + 2e-3 * layers[1] + 1e-5 * layers[2]) / 3
    assert got.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("num_classes", "num_new", "schedule"), [(151, 50, 1.738), (111, 10, 3.332), (151, 10, 3.886), (101, 50, 1.421)]
)
def test_pod_schedule_is_the_published_one(num_classes, num_new, schedule):
    ones, zeros = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    layer = local_pod(ones, zeros)
    assert (pod_loss([ones], [zeros], [1.0], num_classes, num_new) / layer).item() == pytest.approx(schedule, abs=5e-4)


def test_pod_errors():
    x = normal(B, D, 4, 4)
    with pytest.raises(ValueError, match="as many"):
        pod_loss([x], [x], [1.0, 1.0], C, N)
    with pytest.raises(ValueError, match="as many"):
        pod_loss([], [], [], C, N)
    with pytest.raises(ValueError, match="num_new"):
        pod_loss([x], [x], [1.0], C, 0)
    with pytest.raises(ValueError, match="one shape"):
        pod_loss([x[:, :2]], [x], [1.0], C, N)


# --- REMINDER -----------------------------------------------------------------------------------------------------


def sample_labels(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).choice([0, 2, K, K + 1, 255], (B, H, W)))


def test_weighted_distillation_agrees_with_a_loop_over_pixels():
    (new, old), labels = logits(7), sample_labels()
    r = class_similarity(normal(N, D, seed=1), normal(K, D, seed=2))
    total = count = 0.0
    for b, i, j in np.ndindex(B, H, W):
        y = int(labels[b, i, j])
        if not K <= y < 255:
            continue
        count += 1
        q = softmax(old[b, :, i, j].numpy() / 3)
        p = softmax(new[b, :K, i, j].numpy() / 3)
        total += 9 * -sum((q[c] * r[y - K, c].item() + 1e-7) * np.log(p[c]) for c in range(K))
    assert count > 5
    assert weighted_distillation(new, old, labels, r).item() == pytest.approx(total / count, abs=1e-9)


def test_weighted_distillation_touches_pixels_of_new_classes_only():
    (new, old), labels = logits(8), sample_labels(1)
    new.requires_grad_()
    weighted_distillation(new, old, labels, torch.full((N, K), 0.3, dtype=torch.double)).backward()
    touched = new.grad.abs().sum(1) > 0
    assert torch.equal(touched, (labels == K) | (labels == K + 1))
    assert not new.grad[:, K:].any()


@pytest.mark.parametrize("label", [0, 3, 255])
def test_weighted_distillation_without_new_pixels_is_zero(label):
    new, old = logits(9)
    new.requires_grad_()
    loss = weighted_distillation(new, old, torch.full((B, H, W), label), torch.rand(N, K))
    loss.backward()
    assert loss == 0
    assert not new.grad.any()


def test_weighted_distillation_errors():
    (new, old), labels = logits(), sample_labels()
    with pytest.raises(ValueError, match="similarity"):
        weighted_distillation(new, old, labels, torch.rand(K, N))
    with pytest.raises(ValueError, match="labels"):
        weighted_distillation(new, old, labels[:, 1:], torch.rand(N, K))


# --- all of them --------------------------------------------------------------------------------------------------

SIMILARITY = torch.from_numpy(np.random.default_rng(3).uniform(0, 0.5, (N, K)))
LOSSES = {
    "plain": lambda new, old: plain_distillation(new, old, 0.7),
    "unbiased": lambda new, old: unbiased_distillation(new, old, 0.7),
    "feature": lambda new, old: feature_distance(new[:, :K], old),
    "pod": lambda new, old: pod_loss([new], [old], [1.0], C, N),
    "pod-normalised": lambda new, old: pod_loss([new], [old], [1.0], C, N, normalise=True),
    "pod-reference": lambda new, old: pod_loss([new], [old], [1.0], C, N, (1, 2), reference=True),
    "weighted": lambda new, old: weighted_distillation(new, old, sample_labels(), SIMILARITY),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_gradients(loss):
    new, old = logits(10)
    assert gradcheck(lambda z: loss(z, old), new.requires_grad_())


@every_loss
def test_no_gradient_reaches_the_old_model(loss):
    new, old = logits(11)
    old.requires_grad_()
    loss(new.requires_grad_(), old).backward()
    assert old.grad is None
    assert new.grad.any()


@every_loss
def test_old_outputs_may_come_from_inference_mode(loss):
    new, old = logits(12)
    expected = loss(new, old)
    with torch.inference_mode():
        old = old * 1
    value = loss(new.requires_grad_(), old)
    value.backward()
    assert value == expected


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(loss, dtype):
    """300² overflows float16: squares are taken in float32."""
    new, old = ((x * 150).to(dtype) for x in logits(13))
    value = loss(new.requires_grad_(), old)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert new.grad.isfinite().all()


@every_loss
def test_autocast_changes_nothing(loss):
    new, old = (x.float() for x in logits(14))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(new, old)
    assert value == loss(new, old)


def test_misfitting_logits_are_named():
    new, old = logits()
    for loss in (plain_distillation, unbiased_distillation):
        with pytest.raises(ValueError, match="do not fit"):
            loss(old, new)
        with pytest.raises(ValueError, match="do not fit"):
            loss(new[..., :2], old)
        with pytest.raises(ValueError, match="mask"):
            loss(new, old, mask=torch.ones(B, H, dtype=torch.bool))
        with pytest.raises(ValueError, match="class_reduction"):
            loss(new, old, class_reduction="none")
