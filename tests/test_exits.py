"""Which tokens leave, against loops and worked examples; what is left of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cssbench.config import PartChoice, part_config
from cssbench.errors import ConfigError
from cssbench.models.backbone import Backbone, BackboneConfig
from cssbench.models.exits import ExitOptions, Survivors, leaving, rank_within, threshold, with_averages
from cssbench.models.packed import Packed

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}


def layout(*counts: int, length: int = 100) -> Packed:
    """Images with so many tokens, at their first cells."""
    positions = torch.cat([torch.arange(n) for n in counts])
    return Packed(torch.zeros(sum(counts), 1), torch.tensor([0, *counts]).cumsum(0), positions)


def test_rank_within_groups():
    groups = torch.tensor([7, 3, 7, 7, 3, 7])
    values = torch.tensor([0.1, 0.5, 0.9, 0.9, 0.6, 0.3])
    assert rank_within(groups, values).tolist() == [3, 1, 0, 1, 0, 2]  # equal values: the first one first
    assert rank_within(groups[:0], values[:0]).tolist() == []


CONFIDENCE = torch.tensor([0.99, 0.96, 0.97, 0.5, 0.96, 0.98, 0.2])
LABEL = torch.tensor([0, 0, 0, 0, 1, 0, 1])
TWO = (4, 3)  # tokens 0-3 and 4-6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # image 0: class 0 has 0, 2, 1 above 0.95, best first; image 1: class 1 has 4, class 0 has 5
        ({"rule": "top", "keep": 1}, [1, 2]),
        ({"rule": "top", "keep": 2}, [1]),
        ({"rule": "top", "keep": 5}, []),
        ({"rule": "remove"}, [0, 1, 2, 4, 5]),
        ({"rule": "average"}, [0, 1, 2, 4, 5]),
        ({"rule": "ratio", "share": 0.5}, [0, 2, 5]),  # 2 of 4, 1 of 3
        ({"rule": "ratio", "share": 0.2}, []),  # 0.8 and 0.6 of a token
    ],
)
def test_rules(options: dict, expected: list[int]):
    found = leaving(CONFIDENCE, LABEL, layout(*TWO), ExitOptions(**options), 0.95)
    assert found.nonzero()[:, 0].tolist() == expected


def test_at_the_threshold():
    confidence, label = torch.tensor([0.5, 0.75, 1.0]), torch.zeros(3, dtype=torch.long)
    strict = leaving(confidence, label, layout(3), ExitOptions(rule="average"), 0.75)
    exact = leaving(confidence, label, layout(3), ExitOptions(rule="average", exact=True), 0.75)
    assert (strict.tolist(), exact.tolist()) == ([False, False, True], [False, True, True])


def test_remove_leaves_no_image_without_a_token():
    confidence, label = torch.tensor([0.97, 0.96, 0.99, 0.99, 0.1]), torch.zeros(5, dtype=torch.long)
    found = leaving(confidence, label, layout(3, 2), ExitOptions(rule="remove"), 0.9)
    assert found.tolist() == [True, False, True, True, False]


def test_a_held_token_stays():
    confidence = CONFIDENCE.clone()
    confidence[[0, 5]] = -torch.inf
    for rule in ("top", "remove", "average", "ratio"):
        found = leaving(confidence, LABEL, layout(*TWO), ExitOptions(rule=rule, keep=1, share=0.9), 0.95)
        assert found.any()
        assert not found[[0, 5]].any()


def test_top_k_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    for k in (1, 3, 5):
        counts = [17, 1, 40, 8]
        confidence = torch.rand(66, generator=generator)
        label = torch.randint(0, 4, (66,), generator=generator)
        found = leaving(confidence, label, layout(*counts), ExitOptions(keep=k), 0.4)
        start, expected = 0, []
        for count in counts:
            own = range(start, start + count)
            for c in range(4):
                easy = sorted((i for i in own if label[i] == c and confidence[i] > 0.4), key=lambda i: -confidence[i])
                expected += easy[k:]
            start += count
        assert sorted(expected) == found.nonzero()[:, 0].tolist()


def test_an_image_decides_alone():
    alone = leaving(CONFIDENCE[4:], LABEL[4:], layout(3), ExitOptions(keep=1), 0.95)
    assert torch.equal(leaving(CONFIDENCE, LABEL, layout(*TWO), ExitOptions(keep=1), 0.95)[4:], alone)


def test_averages():
    """Image 0 loses tokens 1, 3 (class 2) and 4 (class 0); image 1 nothing; image 2 its only token."""
    kept = Packed(torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([0, 2, 3, 3]), torch.tensor([0, 2, 5]))
    tokens = torch.tensor([[4.0], [6.0], [7.0], [8.0]], requires_grad=True)
    gone = Packed(tokens, torch.tensor([0, 3, 3, 4]), torch.tensor([1, 3, 4, 0]))
    made = with_averages(kept, gone, torch.tensor([2, 2, 0, 1]), 6)
    assert made.tokens[:, 0].tolist() == [1, 2, 7, 5, 9, 8]
    assert made.offsets.tolist() == [0, 4, 5, 6]
    assert made.positions.tolist() == [0, 2, 6, 6, 5, 6]
    made.tokens.sum().backward()
    assert tokens.grad[:, 0].tolist() == [0.5, 0.5, 1, 1]


# The tokens on their way


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**VIT, layers=[1, 2], drop_path=0.0)).eval()


def scores_of(easy: list[list[int]], tokens: Survivors) -> Tensor:
    """Confidence 1 for the cells of each image in `easy`, 0 elsewhere; one class."""
    chosen = [
        float(cell in easy[image])
        for image, cell in zip(tokens.packed.image.tolist(), tokens.packed.positions.tolist(), strict=True)
    ]
    return torch.tensor(chosen)[:, None]


@pytest.mark.parametrize("attention", ["loop", "padded"])
def test_those_that_stay_go_on_alone(backbone: Backbone, attention: str):
    """Each image's tokens, by themselves through timm's own block, are the same; those that left stay as they were."""
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        tokens = Survivors(backbone, x, ExitOptions(rule="remove", attention=attention))
        before = tokens.dense.clone()
        tokens.retire(scores_of([[0, 4], [5]], tokens), 0, 0.5)
        assert tokens.exits.tolist() == [[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]]
        tokens.run(1)
        for image, stay in enumerate(([1, 2, 3, 5], [0, 1, 2, 3, 4])):
            expected = before[image].clone()
            expected[stay] = backbone.blocks[0](before[image, stay][None])[0]
            torch.testing.assert_close(tokens.carried[image], expected, atol=1e-5, rtol=1e-5)
        tokens.retire(scores_of([[5], [0, 1]], tokens), 1, 0.5)
    assert tokens.packed.positions.tolist() == [1, 2, 3, 2, 3, 4]


def test_no_token_leaves_no_token_moves(backbone: Backbone):
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        tokens = Survivors(backbone, x, ExitOptions())
        tokens.retire(torch.full((12, 3), 0.5), 0, 0.5)
        tokens.run(2)
        assert torch.equal(tokens.dense, backbone(x)[-1])
        assert tokens.whole


def test_a_canvas_keeps_what_it_said(backbone: Backbone):
    tokens = Survivors(backbone, torch.randn(2, 3, 16, 16), ExitOptions(rule="remove"))
    first = torch.arange(8.0, requires_grad=True)
    canvas = tokens.write(first[:, None], None)
    tokens.retire(scores_of([[0, 1], [3]], tokens), 0, 0.5)
    second = -torch.arange(1.0, 6.0).requires_grad_()
    written = tokens.write(second[:, None], canvas)
    assert written[..., 0].tolist() == [[0, 1, -1, -2], [-3, -4, -5, 7]]
    (leaf,) = torch.autograd.grad(written.sum(), first)
    assert leaf.tolist() == [1, 1, 0, 0, 0, 0, 0, 1]


def test_averages_go_on_without_a_cell(backbone: Backbone):
    options = ExitOptions(rule="average")
    tokens = Survivors(backbone, torch.randn(2, 3, 16, 16), options)
    means = tokens.dense[0, [1, 2]].mean(0)
    tokens.retire(scores_of([[1, 2], []], tokens), 0, 0.5)
    assert tokens.packed.positions.tolist() == [0, 3, 4, 0, 1, 2, 3]
    torch.testing.assert_close(tokens.packed.tokens[2], means)
    tokens.run(1)
    assert tokens.carried.shape == (2, 4, 32)
    sure = torch.ones(7, 1)
    tokens.retire(sure, 1, 0.5)  # every cell's token leaves; the old average is not graded
    assert tokens.packed.positions.tolist() == [4, 4, 4]
    assert tokens.write(torch.ones(3, 1), torch.zeros(2, 4, 1)).sum() == 0


def test_convolutions_see_the_tokens_that_are_there(backbone: Backbone):
    module = nn.Sequential(nn.Conv2d(32, 5, 1), nn.BatchNorm2d(5)).eval()
    tokens = Survivors(backbone, torch.randn(2, 3, 16, 16), ExitOptions(rule="remove"))
    whole = tokens.convolve(module, tokens.packed.tokens)
    tokens.retire(scores_of([[0], [1, 2]], tokens), 0, 0.5)
    torch.testing.assert_close(tokens.convolve(module, tokens.packed.tokens), whole[[1, 2, 3, 4, 7]])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"p0": 0.0}, "p0"),
        ({"p0": 1.01}, "p0"),
        ({"train_p0": 0}, "train_p0"),
        ({"rule": "topk"}, "'top'"),
        ({"keep": 0}, "keep"),
    ],
)
def test_bad_options_name_what_is_allowed(options: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        part_config("model", PartChoice(name="dtop", **options), ExitOptions)


def test_threshold_of_each_mode():
    assert threshold(ExitOptions(), True) == threshold(ExitOptions(), False) == 0.95
    direct = ExitOptions(p0=0.9, train_p0=1.0)
    assert (threshold(direct, True), threshold(direct, False)) == (1.0, 0.9)
