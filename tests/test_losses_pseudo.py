"""PLOP's pseudo-labels, against loops over pixels and bins in numpy."""

import math

import numpy as np
import pytest
import torch

from cssbench.losses.pixel import cross_entropy
from cssbench.losses.pseudo import (
    adaptive_factor,
    entropy_histogram,
    normalised_entropy,
    pseudo_labels,
    thresholds,
)

B, K, C, H, W = 2, 4, 6, 5, 3
ARITHMETIC = ["reference", "paper"]


def teacher(seed=0, num_old=K, height=H, width=W, scale=1.5, batch=B):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (batch, num_old, height, width)))


def sample_labels(seed=0):
    """Background, an old class (counts as background), new classes and 255."""
    return torch.from_numpy(np.random.default_rng(seed).choice([0, 0, 0, 2, K, C - 1, 255], (B, H, W)))


def expected_entropy(z, num_classes, arithmetic):
    """u of one pixel's logits (numpy)."""
    num_old = len(z)
    q = np.exp(z) / np.exp(z).sum()
    if arithmetic == "paper":
        return sum(-x * math.log(x) for x in q) / math.log(num_old)
    return sum(-x * math.log(x + 1e-8) for x in q) / num_old / math.log(num_old) / math.log(num_classes)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_entropy_agrees_with_a_loop_over_pixels(arithmetic):
    z = teacher()
    u = normalised_entropy(z, C, arithmetic)
    for b, i, j in np.ndindex(B, H, W):
        expected = expected_entropy(z[b, :, i, j].numpy(), C, arithmetic)
        assert u[b, i, j].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("num_old", [2, 10, 101])
def test_entropy_ranges(num_old):
    """Uniform is the maximum: 1 in the paper's arithmetic, 1/(K log C) in the reference's; certainty is 0."""
    uniform = torch.zeros(1, num_old, 1, 1, dtype=torch.double)
    certain = uniform.clone()
    certain[:, 0] = 1000
    assert normalised_entropy(uniform, 151, "paper").item() == pytest.approx(1)
    assert normalised_entropy(uniform, 151).item() == pytest.approx(1 / (num_old * math.log(151)), rel=1e-5)
    assert normalised_entropy(certain, 151, "paper").item() == 0
    assert abs(normalised_entropy(certain, 151).item()) < 1e-8


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_one_old_output_is_certain(arithmetic):
    z = torch.randn(2, 1, 3, 4)
    assert not normalised_entropy(z, 3, arithmetic).any()
    labels = torch.tensor([0, 1, 2, 255]).expand(2, 3, 4)
    assert torch.equal(pseudo_labels(labels, z, torch.tensor([1e-3]), 3, arithmetic), labels)


def test_histogram_agrees_with_a_loop_over_pixels():
    u, classes, mask = torch.rand(B, H, W), torch.randint(K, (B, H, W)), torch.rand(B, H, W) > 0.3
    u[0, 0, 0], u[0, 0, 1], u[0, 0, 2] = 1.0, -1e-8, 0.37
    mask[0, 0] = True
    expected = np.zeros((K, 10), int)
    for index in np.ndindex(B, H, W):
        if mask[index]:
            expected[classes[index], min(max(math.floor(u[index].item() * 10), 0), 9)] += 1
    got = entropy_histogram(u, classes, K, mask, bins=10)
    assert got.dtype == torch.int64
    assert np.array_equal(got, expected)
    assert torch.equal(entropy_histogram(u[mask], classes[mask], K, bins=10), got)
    assert not entropy_histogram(u, classes, K, torch.zeros_like(mask)).any()
    with pytest.raises(ValueError, match="differ in shape"):
        entropy_histogram(u[0], classes, K)


# --- thresholds ---------------------------------------------------------------------------------------------------


def histogram(counts, bins=100):
    row = torch.zeros(1, bins, dtype=torch.long)
    for index, count in counts.items():
        row[0, index] = count
    return row


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({0: 8}, 0.005),  # half of one bin
        ({3: 8}, 0.035),
        ({0: 2, 5: 4, 9: 2}, 0.055),
        ({0: 1, 1: 3}, 0.01 + 0.01 / 3),
        ({10: 5, 20: 5}, 0.11),  # half of the mass is at the upper border of bin 10
        ({99: 2}, 0.995),
        ({}, 1e-3),
    ],
)
def test_median_of_the_paper(counts, expected):
    assert thresholds(histogram(counts), "paper").item() == pytest.approx(expected, abs=1e-12)


def test_median_of_the_paper_is_the_median_within_a_bin():
    values = torch.from_numpy(np.random.default_rng(0).beta(2, 5, 999))
    got = thresholds(entropy_histogram(values, torch.zeros(999, dtype=torch.long), 1), "paper").item()
    assert got == pytest.approx(values.median().item(), abs=0.01)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({0: 8}, 0.005),
        ({0: 6, 50: 2}, 4 / 6 * 0.01),  # bin 0 holds half of the mass
        ({1: 8}, 0.01 + 4 / 8 * 0.01),  # passed is 0 at bin 1
        ({0: 2, 2: 6}, 0.02 + (4 - 1) / 6 * 0.01),  # passed is 1 at bin 2, where a median would have passed 2
        ({40: 100}, 1e-3),  # passed is 780 at bin 40, above half of 100: never found, -inf
        ({40: 10**5, 60: 10**5}, 0.4 + (10**5 - 780) / 10**5 * 0.01),
        (dict.fromkeys(range(99), 300), math.inf),  # no bin holds half of 29700 pixels
        ({28: 2000}, 0.28 + (1000 - 378) / 2000 * 0.01),
        ({29: 2000}, 1e-3),  # int(0.29 · 100) is 28: bin 29 is never looked at, and 1000 is below 4851
        ({29: 20000}, math.inf),
        ({29: 9704}, math.inf),  # half is just above 4851, the sum of 0..98
        ({29: 9700}, 1e-3),
        ({99: 20000}, 0.99 + (10000 - 4851) / 20000 * 0.01),
        ({2: 2}, 0.02),  # half is 1 = passed at bin 2
        ({}, 1e-3),
    ],
)
def test_reference_loop_hand_worked(counts, expected):
    assert thresholds(histogram(counts)).item() == pytest.approx(expected, abs=1e-12)


def test_reference_loop_where_it_yields_nan():
    """Half of six pixels is 3 = passed at the empty bin 3, so 0/0: the floor, as for -inf."""
    assert thresholds(histogram({50: 6})).item() == 1e-3


def test_floor_and_many_classes():
    rows = torch.cat([histogram({0: 4}), histogram({}), histogram({7: 40})])
    assert thresholds(rows, "paper").tolist() == pytest.approx([0.005, 1e-3, 0.075])
    assert thresholds(rows, "paper", floor=0.05).tolist() == pytest.approx([0.05, 0.05, 0.075])
    assert thresholds(rows.float()).dtype == torch.float64
    with pytest.raises(ValueError, match="Unknown arithmetic 'median'"):
        thresholds(rows, "median")
    with pytest.raises(ValueError, match=r"\(classes, bins\)"):
        thresholds(rows[0])


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("dtype", [torch.long, torch.uint8])
def test_labels_agree_with_a_loop_over_pixels(arithmetic, dtype):
    z, labels = teacher(1), sample_labels(1).to(dtype)
    before = labels.clone()
    u = normalised_entropy(z, C, arithmetic)
    tau = torch.quantile(u.flatten(), torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.double))
    got = pseudo_labels(labels, z, tau, C, arithmetic)
    assert got.dtype == dtype
    assert torch.equal(labels, before), "the labels were changed in place"
    outcomes = set()
    for b, i, j in np.ndindex(B, H, W):
        expected = int(labels[b, i, j])
        if expected < K:
            scores = z[b, :, i, j].numpy()
            best = int(np.argmax(scores))
            accepted = expected_entropy(scores, C, arithmetic) < tau[best].item()
            expected = best if accepted else 255
            outcomes.add(accepted)
        assert got[b, i, j] == expected
    assert outcomes == {True, False}


def test_without_thresholds_every_background_pixel_is_accepted():
    z, labels = teacher(2), sample_labels(2)
    got = pseudo_labels(labels, z, None, C)
    assert torch.equal(got, torch.where(labels < K, z.argmax(1), labels))
    infinite = torch.full((K,), math.inf)
    assert torch.equal(got, pseudo_labels(labels, z, infinite, C, "paper"))


@pytest.mark.parametrize(("num_old", "num_classes"), [(51, 101), (101, 151), (141, 151), (146, 151)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_reference_gate_is_inert_on_ade20k(num_old, num_classes, scale):
    """Every pixel of a class that was predicted in the threshold pass is accepted, however uncertain the teacher."""
    z = teacher(3, num_old, 16, 16, scale, 4)
    labels = torch.zeros(4, 16, 16, dtype=torch.long)
    predicted = z.argmax(1)
    counts = entropy_histogram(normalised_entropy(z, num_classes), predicted, num_old, labels == 0)
    tau = thresholds(counts)
    used = counts.sum(1) > 0
    assert torch.allclose(tau[used], torch.tensor(0.005, dtype=torch.double))
    assert (tau[~used] == 1e-3).all()
    relabelled = pseudo_labels(labels, z, tau, num_classes)
    assert torch.equal(relabelled, predicted)
    assert (adaptive_factor(labels, relabelled, num_old) > 0.999999).all()


def test_the_paper_gate_rejects_about_half():
    z = teacher(4, 11, 64, 64, 2.0)
    labels = torch.zeros(B, 64, 64, dtype=torch.long)
    counts = entropy_histogram(normalised_entropy(z, 16, "paper"), z.argmax(1), 11, labels == 0)
    relabelled = pseudo_labels(labels, z, thresholds(counts, "paper"), 16, "paper")
    assert (relabelled != 255).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_teacher_of_inference_mode_and_half_precision():
    labels = sample_labels(5)
    with torch.inference_mode():
        z = teacher(5).to(torch.bfloat16) * 1000
    tau = torch.full((K,), 1e-3)
    for arithmetic in ARITHMETIC:
        assert normalised_entropy(z, C, arithmetic).isfinite().all()
        relabelled = pseudo_labels(labels, z, tau, C, arithmetic)
        assert not relabelled.is_inference()
        student = torch.randn(B, C, H, W, requires_grad=True)
        cross_entropy(student, relabelled, "all", adaptive_factor(labels, relabelled, K)).backward()
        assert student.grad.isfinite().all()


def test_misfitting_input_is_named():
    z, labels = teacher(), sample_labels()
    with pytest.raises(ValueError, match="thresholds"):
        pseudo_labels(labels, z, torch.ones(C), C)
    with pytest.raises(ValueError, match="labels"):
        pseudo_labels(labels[:, 1:], z, None, C)
    with pytest.raises(ValueError, match="num_classes is 3"):
        normalised_entropy(z, 3)
    with pytest.raises(ValueError, match="Unknown arithmetic"):
        normalised_entropy(z, C, "mean")
    with pytest.raises(ValueError, match="differ in shape"):
        adaptive_factor(labels, labels[:, 1:], K)


# --- adaptive factor ----------------------------------------------------------------------------------------------


def test_adaptive_factor_hand_worked():
    """Three of four background pixels accepted; none accepted; no background at all."""
    labels = torch.tensor([[0, 0, 0, 1, 5, 255], [0, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 255]]).reshape(3, 2, 3)
    relabelled = torch.tensor([[0, 2, 1, 255, 5, 255], [255, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 255]]).reshape(3, 2, 3)
    factor = adaptive_factor(labels, relabelled, K)
    assert factor.tolist() == pytest.approx([3 / (4 + 1e-6), 0, 0], abs=1e-12)
    assert adaptive_factor(labels, relabelled, K, 1.0).tolist() == pytest.approx([3 / (4 + 1e-6), 0, 1], abs=1e-12)
    assert adaptive_factor(labels, relabelled, K, epsilon=0).tolist() == [0.75, 0, 0]
