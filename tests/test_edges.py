"""Edges of label maps by hand, the edge head and its loss."""

from __future__ import annotations

import math

import pytest
import torch

from cssbench.models.edges import EdgeHead, edge_loss, edge_truth, predicted_edges

torch.set_num_threads(1)  # the tensors are tiny

# Patches of 2 px, from the left: one label; two; one and 255; 255 alone; two on both sides of a stripe of 255 / one.
LABELS = torch.tensor([[[1, 1, 1, 2, 4, 255, 255, 255, 3, 255], [1, 1, 1, 2, 4, 255, 255, 255, 255, 5]]])
LOWER = torch.tensor([[[1, 1, 2, 2, 4, 4, 255, 255, 7, 7], [1, 1, 2, 2, 4, 4, 255, 255, 7, 7]]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("distinct", [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]),
        ("inside", [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]),
        # columns 3|4 are 2|4, rows 1|2 in column 2 are 1|2, rows 1|2 in column 9 are 5|7; columns 1|2 below are 1|2
        ("across", [[0, 1, 1, 0, 1], [1, 1, 1, 0, 1]]),
    ],
)
def test_edges_by_hand(rule, expected):
    found = edge_truth(torch.cat([LABELS, LOWER], 1), 2, rule)
    assert found.dtype == torch.bool
    assert found.view(2, 5).int().tolist() == expected


@pytest.mark.parametrize("rule", ["distinct", "inside", "across"])
@pytest.mark.parametrize("label", [0, 3, 255])
def test_the_border_of_the_image_is_no_edge(rule, label):
    assert not edge_truth(torch.full((2, 8, 12), label), 4, rule).any()


def test_background_is_a_label_like_any():
    assert edge_truth(torch.tensor([[[0, 1], [0, 0]]]), 2).tolist() == [[True]]


def test_edge_loss_and_threshold_by_hand():
    """P(edge) = 0.75 and 0.5: the mean of -log 0.75 and -log 0.5."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [1.0, 1.0]]])
    truth = torch.tensor([[True, False]])
    assert edge_loss(logits, truth).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert predicted_edges(logits, 0.7).tolist() == [[True, False]]
    assert predicted_edges(logits, 0.76).tolist() == [[False, False]]
    assert predicted_edges(logits, 0.5).tolist() == [[True, False]]  # strictly above


def test_the_head_is_an_mlp_of_c_half_c_and_two():
    shapes = [tuple(p.shape) for p in EdgeHead(8).parameters() if p.ndim == 2]
    assert shapes == [(8, 8), (4, 8), (2, 4)]
