"""Class presence, focal and dice terms of mask classification: by hand, and against loops over pixels in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from cssbench.losses import mask
from cssbench.losses.mask import class_presence, dice_loss, focal_loss, mask_losses, presence_loss

POSITIONS = range(3, 6)  # three new classes after two old ones


def sample(seed=0, size=(6, 10), grid=(3, 4)):
    """Mask logits (2, 3, h, w) in double, labels (2, H, W) of background, new classes and 255, and their presence."""
    rng = np.random.default_rng(seed)
    masks = torch.from_numpy(rng.normal(0, 2, (2, 3, *grid)))
    labels = torch.from_numpy(rng.choice([0, 3, 4, 5, 255], (2, *size)))
    labels[1][labels[1] == 4] = 0  # class 4 occurs in the first image only
    return masks, labels, class_presence(labels, POSITIONS)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def upsampled(mask, height, width):
    """Bilinear with align_corners False, pixel by pixel: centres at (i + 1/2) h / H - 1/2, edges repeated."""
    h, w = mask.shape
    out = np.empty((height, width))
    for i, j in np.ndindex(height, width):
        y, x = max((i + 0.5) * h / height - 0.5, 0), max((j + 0.5) * w / width - 0.5, 0)
        top, left = min(int(y), h - 1), min(int(x), w - 1)
        low, right = min(top + 1, h - 1), min(left + 1, w - 1)
        dy, dx = y - top, x - left
        upper = (1 - dx) * mask[top, left] + dx * mask[top, right]
        out[i, j] = (1 - dy) * upper + dy * ((1 - dx) * mask[low, left] + dx * mask[low, right])
    return out


def expected_mask_losses(masks, labels, positions, num_masks, ignore_mode):
    """Sums over the present (image, class) pairs, one pixel after another."""
    masks, labels = masks.numpy(), labels.numpy()
    focal = dice = 0.0
    for b, n in np.ndindex(masks.shape[:2]):
        if not (labels[b] == positions[n]).any():
            continue
        logits = upsampled(masks[b, n], *labels.shape[1:])
        terms, overlap, total = [], 0.0, 0.0
        for z, label in zip(logits.ravel(), labels[b].ravel(), strict=True):
            if ignore_mode == "masked" and label == 255:
                continue
            p, t = sigmoid(z), float(label == positions[n])
            terms.append(-0.25 * (1 - p) ** 2 * np.log(p) if t else -0.75 * p**2 * np.log(1 - p))
            overlap, total = overlap + p * t, total + p + t
        focal += np.mean(terms)
        dice += 1 - (2 * overlap + 1) / (total + 1)
    return focal / num_masks, dice / num_masks


def test_presence_is_of_exactly_the_positions_asked_for():
    labels = torch.tensor([[[0, 3], [255, 3]], [[1, 2], [5, 254]], [[255, 255], [255, 255]]])
    assert class_presence(labels, POSITIONS).tolist() == [[True, False, False], [False, False, True], [False] * 3]
    assert class_presence(labels, range(1, 3)).tolist() == [[False, False], [True, True], [False, False]]
    assert class_presence(labels, range(254, 255)).tolist() == [[False], [True], [False]]


def test_presence_loss_of_v2_by_hand():
    """P(present) = 3/4 for a present and 1/4 for an absent class: -log 3/4 each, whatever the weights."""
    classes = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]], dtype=torch.double).log()
    hit = torch.tensor([[True, False]])
    assert presence_loss(classes, hit).item() == pytest.approx(-np.log(0.75), abs=1e-12)
    # Wrong on the absent one only: its weight of 0.1 is in the divisor as well.
    classes[0, 1] = classes[0, 0]
    expected = (-np.log(0.75) - 0.1 * np.log(0.25)) / 1.1
    assert presence_loss(classes, hit).item() == pytest.approx(expected, abs=1e-12)
    assert presence_loss(classes, hit, 1.0).item() == pytest.approx((-np.log(0.75) - np.log(0.25)) / 2, abs=1e-12)


def test_presence_loss_of_v1_by_hand():
    """Query i of a present class must say i, of an absent one N."""
    p = torch.tensor([[[0.5, 0.2, 0.3], [0.1, 0.3, 0.6]]], dtype=torch.double)
    present = torch.tensor([[True, False]])
    expected = (-np.log(0.5) - 0.1 * np.log(0.6)) / 1.1
    assert presence_loss(p.log(), present).item() == pytest.approx(expected, abs=1e-12)
    expected = (-np.log(0.3) - 0.1 * np.log(0.3)) / 1.1
    assert presence_loss(p.log(), ~present).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_presence_loss_agrees_with_a_loop_over_queries(outputs, weight):
    rng = np.random.default_rng(outputs)
    logits, present = rng.normal(0, 3, (3, 4, outputs)), rng.random((3, 4)) < 0.4
    total = weights = 0.0
    for b, n in np.ndindex(3, 4):
        own = weight if not present[b, n] else 1.0
        target = outputs - 1 if not present[b, n] else 0 if outputs == 2 else n
        total -= own * np.log(np.exp(logits[b, n, target]) / np.exp(logits[b, n]).sum())
        weights += own
    got = presence_loss(torch.from_numpy(logits), torch.from_numpy(present), weight)
    assert got.dtype == torch.double
    assert got.item() == pytest.approx(total / weights, abs=1e-9)


def test_v1_and_v2_agree_on_one_class():
    """Both have two outputs, the last of which means absent."""
    classes = torch.tensor([[[2.0, 0.5]], [[-1.0, 1.0]]], dtype=torch.double)
    present = torch.tensor([[True], [False]])
    right = [sigmoid(1.5), sigmoid(2.0)]
    assert presence_loss(classes, present).item() == pytest.approx(-(np.log(right[0]) + 0.1 * np.log(right[1])) / 1.1)


def test_an_image_without_any_class_teaches_absence_at_full_size():
    """All targets weigh 0.1, and so does the divisor."""
    classes = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.double)
    got = presence_loss(classes, torch.zeros(1, 2, dtype=torch.bool)).item()
    assert got == pytest.approx((np.log(2) + np.log(1 + np.e)) / 2, abs=1e-12)


def test_focal_by_hand():
    """p = 3/4 on a positive and on a negative pixel."""
    logits = torch.tensor([[3.0, 3.0]], dtype=torch.double).log()
    targets = torch.tensor([[1.0, 0.0]], dtype=torch.double)
    positive, negative = -0.25 / 16 * np.log(0.75), -0.75 * 9 / 16 * np.log(0.25)
    assert focal_loss(logits, targets).item() == pytest.approx((positive + negative) / 2, abs=1e-12)
    assert focal_loss(logits, targets, 0.5, 0.0).item() == pytest.approx(-np.log(0.75 * 0.25) / 4, abs=1e-12)
    valid = torch.tensor([[True, False]])
    assert focal_loss(logits, targets, valid=valid).item() == pytest.approx(positive, abs=1e-12)


def test_dice_by_hand():
    logits = torch.tensor([[3.0, 1.0, 1 / 3]], dtype=torch.double).log()  # p = 3/4, 1/2, 1/4
    targets = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.double)
    assert dice_loss(logits, targets).item() == pytest.approx(1 - 3 / 4.5, abs=1e-12)
    valid = torch.tensor([[True, True, False]])
    assert dice_loss(logits, targets, valid).item() == pytest.approx(1 - 2.5 / 3.25, abs=1e-12)


def test_a_mask_without_a_valid_pixel_counts_nothing():
    logits, targets = torch.randn(2, 4), torch.ones(2, 4)
    valid = torch.tensor([[False] * 4, [True] * 4])
    assert focal_loss(logits, targets, valid=valid)[0] == dice_loss(logits, targets, valid)[0] == 0
    assert torch.equal(focal_loss(logits, targets, valid=valid)[1], focal_loss(logits, targets)[1])
    assert torch.equal(dice_loss(logits, targets, valid)[1], dice_loss(logits, targets)[1])


@pytest.mark.parametrize("ignore_mode", ["negative", "masked"])
@pytest.mark.parametrize(("size", "grid"), [((6, 10), (3, 4)), ((9, 4), (2, 5)), ((5, 7), (5, 7))])
def test_mask_losses_agree_with_a_loop_over_pixels(ignore_mode, size, grid):
    masks, labels, present = sample(1, size, grid)
    assert present.tolist() == [[True, True, True], [True, False, True]]
    got = mask_losses(masks, labels, present, POSITIONS, 5, ignore_mode)
    expected = expected_mask_losses(masks, labels, POSITIONS, 5, ignore_mode)
    assert [x.item() for x in got] == pytest.approx(expected, abs=1e-9)
    assert {x.dtype for x in got} == {torch.double}


def test_masks_are_upsampled_as_interpolate_does():
    """To a label of the mask's own size nothing is upsampled, so both must give the same."""
    masks, labels, present = sample(2)
    large = F.interpolate(masks, size=labels.shape[1:], mode="bilinear", align_corners=False)
    other = F.interpolate(masks, size=labels.shape[1:], mode="bilinear", align_corners=True)
    got = mask_losses(masks, labels, present, POSITIONS, 5)
    assert got == mask_losses(large, labels, present, POSITIONS, 5)
    assert got != mask_losses(other, labels, present, POSITIONS, 5)


def test_255_is_negative_by_default_and_left_out_when_masked():
    masks, labels, present = sample(3)
    as_background = labels.masked_fill(labels == 255, 0)
    default = mask_losses(masks, labels, present, POSITIONS, 5)
    assert default == mask_losses(masks, as_background, present, POSITIONS, 5)
    # Where all other pixels are right, a claim on void costs something only by default.
    sure = torch.where((labels[:, None] == torch.tensor(POSITIONS)[:, None, None]) | (labels[:, None] == 255), 60, -60)
    focal, dice = mask_losses(sure.double(), labels, present, POSITIONS, 5, "masked")
    assert focal.item() == pytest.approx(0, abs=1e-12)
    assert dice.item() == pytest.approx(0, abs=1e-12)
    focal, dice = mask_losses(sure.double(), labels, present, POSITIONS, 5)
    assert focal > 1
    assert dice > 0.1


def test_classes_that_do_not_occur_are_not_supervised():
    masks, labels, present = sample(4)
    masks.requires_grad_()
    sum(mask_losses(masks, labels, present, POSITIONS, 5)).backward()
    assert ((masks.grad != 0).flatten(2).any(2) == present).all()


def test_num_masks_divides_and_may_be_a_tensor():
    masks, labels, present = sample(5)
    one, five = (mask_losses(masks, labels, present, POSITIONS, n) for n in (1.0, torch.tensor(5.0)))
    assert [x.item() / 5 for x in one] == pytest.approx([x.item() for x in five], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("labels", [torch.full((2, 4, 6), 255), torch.zeros(2, 4, 6, dtype=torch.int64)])
def test_no_present_class_gives_zero_and_a_working_backward(dtype, labels):
    """Also in half precision, where the sum of many logits is infinite, and infinity times 0 is NaN."""
    masks = torch.full((2, 3, 2, 3), 6e4, dtype=dtype, requires_grad=True)
    focal, dice = mask_losses(masks, labels, class_presence(labels, POSITIONS), POSITIONS, 1)
    assert focal.item() == dice.item() == 0
    (focal + dice).backward()
    assert (masks.grad == 0).all()


@pytest.mark.parametrize("ignore_mode", ["negative", "masked"])
def test_an_image_without_a_labelled_pixel_adds_nothing(ignore_mode):
    masks, labels, _ = sample(6)
    labels[1] = 255
    present = class_presence(labels, POSITIONS)
    both = mask_losses(masks, labels, present, POSITIONS, 3, ignore_mode)
    alone = mask_losses(masks[:1], labels[:1], present[:1], POSITIONS, 3, ignore_mode)
    assert both == alone
    assert min(both) > 0


@pytest.mark.parametrize("ignore_mode", ["negative", "masked"])
def test_gradients_are_those_of_finite_differences(ignore_mode):
    masks, labels, present = sample(7)
    assert gradcheck(
        lambda x: mask_losses(x, labels, present, POSITIONS, 5, ignore_mode), masks.requires_grad_(), atol=1e-7
    )
    for outputs in (2, 4):
        classes = torch.randn(2, 3, outputs, dtype=torch.double, requires_grad=True)
        assert gradcheck(lambda x: presence_loss(x, present), classes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_even_for_sure_logits(dtype):
    masks, labels, present = sample(8)
    masks = (masks * 40).to(dtype).requires_grad_()
    classes = torch.tensor([[300.0, -300.0]] * 3, dtype=dtype).expand(2, 3, 2).clone().requires_grad_()
    terms = [*mask_losses(masks, labels, present, POSITIONS, 5), presence_loss(classes, present)]
    assert {x.dtype for x in terms} == {torch.float32}
    sum(terms).backward()
    assert all(torch.isfinite(x).all() for x in (*terms, masks.grad, classes.grad))
    wide = mask_losses(masks.detach().double(), labels, present, POSITIONS, 5)
    assert [x.item() for x in terms[:2]] == pytest.approx([x.item() for x in wide], rel=1e-5)


def test_query_distillation_by_hand():
    old = torch.tensor([[[0.0, math.log(3.0)], [5.0, 5.0]]], requires_grad=True)  # P = (1/4, 3/4), (1/2, 1/2)
    new = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]], requires_grad=True)  # P = (1/2, 1/2), (3/4, 1/4)
    loss = mask.query_distillation(new, old)
    expected = (math.log(2) - 0.5 * (math.log(0.75) + math.log(0.25))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert old.grad is None
    torch.testing.assert_close(new.grad, torch.tensor([[[0.25, -0.25], [0.25, -0.25]]]) / 2)


def test_mask_distillation_by_hand():
    old = torch.tensor([[[[math.log(3.0), 0.0]]]], requires_grad=True)  # 3/4, 1/2
    new = torch.tensor([[[[0.0, math.log(3.0)]]]], requires_grad=True)  # 1/2, 3/4
    loss = mask.mask_distillation(new, old)
    expected = (math.log(2) - 0.5 * (math.log(0.75) + math.log(0.25))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert old.grad is None
    torch.testing.assert_close(new.grad, torch.tensor([[[[-0.25, 0.25]]]]) / 2)


@pytest.mark.parametrize("distil", [mask.query_distillation, mask.mask_distillation])
def test_distillation_of_queries_is_finite_in_half_precision_and_least_where_models_agree(distil):
    generator = torch.Generator().manual_seed(0)
    old, noise = torch.randn(2, 2, 3, 4, 4, generator=generator) * 3
    assert torch.isfinite(distil(100 * old.bfloat16(), 100 * old))
    assert distil(old, old.bfloat16()).dtype == torch.float32
    assert distil(old, old) < distil(old + noise, old)
