"""Per-pixel cross-entropies, initialisation of classifiers, prototypes: against loops over pixels in numpy."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from cssbench.losses.distill import class_similarity
from cssbench.losses.init import balanced_init
from cssbench.losses.pixel import cross_entropy, unbiased_cross_entropy
from cssbench.losses.prototypes import class_means, update_prototypes

C, K = 5, 3


def sample(seed=0, classes=C, height=4, width=6, batch=2):
    """Logits (double) and labels of background, new classes and 255; height != width."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (batch, classes, height, width)))
    labels = torch.from_numpy(rng.choice([0, K, C - 1, 255], (batch, height, width)))
    return logits, labels


def expected_loss(logits, labels, num_old, reduction, weight):
    """Probabilities pixel by pixel: the group {0..K-1} counts as one class."""
    z, y = logits.numpy(), labels.numpy()
    total = count = 0.0
    for b, i, j in np.ndindex(y.shape):
        count += reduction == "all" or y[b, i, j] != 255
        if y[b, i, j] == 255:
            continue
        p = np.exp(z[b, :, i, j]) / np.exp(z[b, :, i, j]).sum()
        probability = p[:num_old].sum() if y[b, i, j] < num_old else p[y[b, i, j]]
        total -= np.log(probability) * (1 if weight is None else float(weight[b]))
    return total / count


@pytest.mark.parametrize("reduction", ["valid", "all"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.25, 2.0])])
def test_agrees_with_a_loop_over_pixels(reduction, weight):
    logits, labels = sample()
    got = cross_entropy(logits, labels, reduction, weight)
    assert got.item() == pytest.approx(expected_loss(logits, labels, 1, reduction, weight), abs=1e-9)
    got = unbiased_cross_entropy(logits, labels, K, reduction, weight)
    assert got.item() == pytest.approx(expected_loss(logits, labels, K, reduction, weight), abs=1e-9)


def test_hand_worked():
    """Two pixels with p = (1/2, 1/4, 1/4) and labels 0 and 255; with K = 2 the background has probability 3/4."""
    logits = torch.tensor([2.0, 1.0, 1.0], dtype=torch.double).log().reshape(1, 3, 1, 1).expand(1, 3, 1, 2)
    labels = torch.tensor([[[0, 255]]])
    assert cross_entropy(logits, labels).item() == pytest.approx(np.log(2))
    assert cross_entropy(logits, labels, "all").item() == pytest.approx(np.log(2) / 2)
    assert unbiased_cross_entropy(logits, labels, 2).item() == pytest.approx(np.log(4 / 3))
    assert unbiased_cross_entropy(logits, torch.tensor([[[2, 2]]]), 2).item() == pytest.approx(np.log(4))


@pytest.mark.parametrize("num_old", [0, 1])
def test_unbiased_is_plain_without_old_classes(num_old):
    logits, labels = sample(1)
    assert torch.equal(unbiased_cross_entropy(logits, labels, num_old), cross_entropy(logits, labels))


def test_unbiased_is_plain_on_merged_probabilities():
    """Replacing the K old logits by their logsumexp and the labels by those of the merged outputs changes nothing."""
    logits, labels = sample(2)
    merged = torch.cat([logits[:, :K].logsumexp(1, keepdim=True), logits[:, K:]], 1)
    shifted = torch.where(labels == 255, 255, (labels - K + 1).clamp(min=0))
    assert unbiased_cross_entropy(logits, labels, K).item() == pytest.approx(
        cross_entropy(merged, shifted).item(), abs=1e-12
    )
    assert unbiased_cross_entropy(logits, labels, K) < cross_entropy(logits, labels)


def test_labels_of_old_classes_count_as_background():
    logits, labels = sample(3)
    old = torch.where(labels == 0, 2, labels)
    assert torch.equal(unbiased_cross_entropy(logits, old, K), unbiased_cross_entropy(logits, labels, K))


def test_all_outputs_old_costs_nothing():
    logits, labels = sample(3)
    labels[labels != 255] = 0
    assert unbiased_cross_entropy(logits, labels, C).abs() < 1e-12


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_gradients(reduction):
    logits, labels = sample(4, height=2, width=3)
    logits.requires_grad_()
    weight = torch.tensor([0.5, 1.5], dtype=torch.double)
    assert gradcheck(lambda z: cross_entropy(z, labels, reduction, weight), logits)
    assert gradcheck(lambda z: unbiased_cross_entropy(z, labels, K, reduction, weight), logits)


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_ignored_pixels_have_no_gradient(reduction):
    logits, labels = sample(5)
    logits.requires_grad_()
    unbiased_cross_entropy(logits, labels, K, reduction).backward()
    touched = logits.grad.abs().sum(1) > 0
    assert torch.equal(touched, labels != 255)


@pytest.mark.parametrize("loss", [cross_entropy, lambda *a: unbiased_cross_entropy(a[0], a[1], K, a[2])])
@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_nothing_but_ignored_pixels_gives_zero(loss, reduction):
    logits, labels = sample(6)
    logits.requires_grad_()
    value = loss(logits, torch.full_like(labels, 255), reduction)
    value.backward()
    assert value == 0
    assert not logits.grad.any()


def test_one_class_costs_nothing():
    logits = torch.randn(2, 1, 3, 4, requires_grad=True)
    assert cross_entropy(logits, torch.zeros(2, 3, 4, dtype=torch.long)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype):
    logits = (torch.randn(2, C, 4, 6) * 3000).to(dtype).requires_grad_()
    labels = sample(7)[1].to(torch.uint8)
    for loss in (cross_entropy(logits, labels, "all"), unbiased_cross_entropy(logits, labels, K, "all")):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        assert gradient.any()


def test_works_on_queries():
    """Any trailing dimensions: (B, C, Q) with labels (B, Q) is a map of one row."""
    logits, labels = sample(8, height=1)
    flat = unbiased_cross_entropy(logits[:, :, 0], labels[:, 0], K)
    assert torch.equal(flat, unbiased_cross_entropy(logits, labels, K))


def test_wrong_input_is_named():
    logits, labels = sample()
    with pytest.raises(ValueError, match="Resize the logits"):
        cross_entropy(logits, labels[:, :2])
    with pytest.raises(ValueError, match="Unknown reduction 'mean'"):
        cross_entropy(logits, labels, "mean")
    with pytest.raises(ValueError, match="one per image"):
        cross_entropy(logits, labels, "all", torch.ones(3))
    with pytest.raises(ValueError, match="num_old is 6"):
        unbiased_cross_entropy(logits, labels, 6)
    with pytest.raises(IndexError):
        cross_entropy(logits, torch.full_like(labels, C))


# --- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_new", [1, 2, 50])
def test_balanced_init_splits_the_background(num_new):
    generator = torch.Generator().manual_seed(num_new)
    features = torch.randn(7, 8, dtype=torch.double, generator=generator)
    weight = torch.randn(4, 8, dtype=torch.double, generator=generator)
    bias = torch.randn(4, dtype=torch.double, generator=generator)
    before = (features @ weight.T + bias).softmax(1)

    new_weight, new_bias, background = balanced_init(weight[0], bias[0], num_new)
    weight, bias = torch.cat([weight, new_weight]), torch.cat([background[None], bias[1:], new_bias])
    after = (features @ weight.T + bias).softmax(1)

    torch.testing.assert_close(after[:, 1:4], before[:, 1:], rtol=0, atol=1e-12)
    share = (before[:, :1] / (num_new + 1)).expand(-1, num_new + 1)
    torch.testing.assert_close(torch.cat([after[:, :1], after[:, 4:]], 1), share, rtol=0, atol=1e-12)


def test_balanced_init_copies():
    """Convolution rows keep their shape, and nothing is shared with the background's parameters."""
    weight, bias = torch.randn(8, 1, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    new_weight, new_bias, background = balanced_init(weight, bias, 3)
    assert new_weight.shape == (3, 8, 1, 1)
    assert new_bias.shape == (3,)
    assert background.item() == pytest.approx(-np.log(4))
    assert not any(x.requires_grad for x in (new_weight, new_bias, background))
    kept = weight.detach().clone()
    new_weight += 1
    new_bias += 1
    assert torch.equal(weight, kept)
    assert bias == 0
    assert background.item() == pytest.approx(-np.log(4))
    with pytest.raises(ValueError, match="num_new"):
        balanced_init(weight, bias, 0)


# --- prototypes ---------------------------------------------------------------------------------------------------

D = 3  # feature channels


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))


def every_label(seed=0):
    """(2, 4, 6): background, an old class, two new classes and 255; class 1 nowhere."""
    return torch.from_numpy(np.random.default_rng(seed).choice([0, 2, K, K + 1, 255], (2, 4, 6)))


@pytest.mark.parametrize("align_corners", [True, False])
def test_class_means_are_those_of_the_upsampled_features(align_corners):
    features, labels = normal(2, D, 2, 3), every_label(2)
    labels[0][labels[0] == K] = 0  # a class in one image only
    means, counts = class_means(features, labels, C, align_corners)
    large = torch.nn.functional.interpolate(features, (4, 6), mode="bilinear", align_corners=align_corners)
    for c in range(C):
        pixels = [large[b, :, i, j].numpy() for b, i, j in np.ndindex(2, 4, 6) if labels[b, i, j] == c]
        assert counts[c] == len(pixels)
        np.testing.assert_allclose(means[c], np.mean(pixels, axis=0) if pixels else 0, atol=1e-9, rtol=0)


def test_class_means_hand_worked():
    """One row 0..1 upsampled to 0, 1/2, 1; labels 0, 1, 1."""
    means, counts = class_means(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[0, 1, 1]]]), 3)
    assert means.flatten().tolist() == [0, 0.75, 0]
    assert counts.tolist() == [1, 2, 0]


def test_class_means_have_gradients_and_take_only_ignored_pixels():
    features, labels = normal(2, D, 2, 3).requires_grad_(), every_label(3)
    assert gradcheck(lambda x: class_means(x, labels, C)[0], features)
    means, counts = class_means(features, torch.full_like(labels, 255), C)
    assert not means.any()
    assert not counts.any()
    with pytest.raises(ValueError, match="expected"):
        class_means(features, labels[:1], C)


@pytest.mark.parametrize("weighting", ["batch", "pixel"])
def test_running_mean_over_batches(weighting):
    prototypes, seen = torch.zeros(C, D, dtype=torch.double), torch.zeros(C, dtype=torch.long)
    collected = {c: [] for c in range(C)}
    for seed in range(4):
        means, counts = class_means(normal(2, D, 2, 3, seed=seed), every_label(seed) % (4 + seed), C)
        prototypes, seen = update_prototypes(prototypes, seen, means, counts, weighting)
        for c in range(C):
            times = int(counts[c]) if weighting == "pixel" else int(counts[c] > 0)
            collected[c] += [means[c].numpy()] * times
    for c, values in collected.items():
        assert seen[c] == len(values)
        np.testing.assert_allclose(prototypes[c], np.mean(values, axis=0) if values else 0, atol=1e-9, rtol=0)


def test_weightings_differ_and_nothing_changes_in_place():
    means, counts = torch.tensor([[4.0]]), torch.tensor([3])
    zero, seen = torch.zeros(1, 1), torch.tensor([1])
    assert update_prototypes(zero, seen, means, counts)[0].item() == 2
    assert update_prototypes(zero, seen, means, counts, "pixel")[0].item() == 3
    assert zero.item() == 0
    assert seen.item() == 1
    with pytest.raises(ValueError, match="Unknown weighting"):
        update_prototypes(zero, seen, means, counts, "image")


def test_prototypes_in_half_precision_and_autocast():
    features, labels = normal(2, D, 2, 3).float(), every_label()
    with torch.autocast("cpu", torch.bfloat16):
        means, _ = class_means(features, labels, C)
        r = class_similarity(means[K:], means[:K])
    assert torch.equal(means, class_means(features, labels, C)[0])
    assert torch.equal(r, class_similarity(means[K:], means[:K]))
    assert class_means(features.bfloat16(), labels, C)[0].dtype == torch.float32


# --- class similarity ------------------------------------------------------------------------------------------------


def expected_similarity(new_means, prototypes, delta):
    rows = []
    for a in new_means.numpy():
        cosines = []
        for b in prototypes.numpy():
            norm = np.sqrt((a**2).sum() * (b**2).sum())
            cosines.append((a * b).sum() / norm if norm else 0.0)
        r = np.exp(cosines) / np.exp(cosines).sum()
        rows.append([x if x >= delta / len(r) else 0.0 for x in r])
    return np.array(rows)


@pytest.mark.parametrize("delta", [0.0, 0.6, 1.0])
def test_class_similarity_agrees_with_loops(delta):
    means, prototypes = normal(C - K, D, seed=1), normal(K, D, seed=2)
    means[1], prototypes[2] = 0, 0
    got = class_similarity(means, prototypes, delta).numpy()
    np.testing.assert_allclose(got, expected_similarity(means, prototypes, delta), atol=1e-9, rtol=0)


def test_class_similarity_hand_worked():
    """Cosines (1, -1): e²/(1 + e²) is above 1/2 and stays, the rest is dropped."""
    r = class_similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
    np.testing.assert_allclose(r, [[np.e**2 / (1 + np.e**2), 0]], rtol=1e-6)


def test_class_similarity_of_zero_prototypes_is_uniform():
    r = class_similarity(torch.zeros(2, D), torch.zeros(K, D))
    np.testing.assert_allclose(r, 1 / K)
    with pytest.raises(ValueError, match="expected"):
        class_similarity(torch.zeros(2, D), torch.zeros(K, D + 1))
