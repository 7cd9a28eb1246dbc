"""Scores of tiny confusion matrices, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cssbench import protocol
from cssbench.errors import RunError, UnknownNameError

# Rows: truth (void, 1, 2, 3); columns: prediction (background, 1, 2, 3).
MATRIX = np.array([[5, 2, 1, 0], [1, 6, 1, 0], [0, 2, 8, 2], [3, 0, 1, 4]])
GROUPS = [[1, 2], [3]]


@pytest.fixture
def mmseg() -> protocol.Protocol:
    return protocol.get("mmseg150@1")


@pytest.fixture
def plop() -> protocol.Protocol:
    return protocol.get("plop@1")


def test_mmseg_ignores_void_rows(mmseg):
    # truth 8, 12, 8; predicted without the void row 8, 10, 6
    assert mmseg.ious(MATRIX, [1, 2, 3]) == pytest.approx({1: 6 / 10, 2: 8 / 14, 3: 4 / 10})


def test_mmseg_ignores_future_rows_but_not_misses(mmseg):
    # class 3 unseen: its row leaves column 2 with 9; the 2 pixels of class 2 predicted as 3 stay misses
    assert mmseg.ious(MATRIX, [1, 2]) == pytest.approx({1: 6 / 10, 2: 8 / 13})


def test_plop_scores_void_as_background(plop):
    # truth 8, 8, 12, 8; predicted 9, 10, 11, 6
    assert plop.ious(MATRIX, [1, 2, 3]) == pytest.approx({0: 5 / 12, 1: 6 / 12, 2: 8 / 15, 3: 4 / 10})


def test_plop_scores_future_classes_as_background(plop):
    # the background's row becomes [8, 2, 2, 4]: truth 16, hits 8; its column holds 8 + 1 + 0
    assert plop.ious(MATRIX, [1, 2]) == pytest.approx({0: 8 / 17, 1: 6 / 12, 2: 8 / 15})


def test_groups_after_each_step(mmseg, plop):
    first, second = (mmseg.scores(MATRIX, GROUPS, t) for t in (0, 1))
    assert first == pytest.approx(
        {"base": (6 / 10 + 8 / 13) / 2, "incremental": None} | _same(first, (6 / 10 + 8 / 13) / 2)
    )
    assert second["base"] == second["group0"] == pytest.approx((6 / 10 + 8 / 14) / 2)
    assert second["incremental"] == second["group1"] == pytest.approx(4 / 10)
    assert second["all"] == pytest.approx((6 / 10 + 8 / 14 + 4 / 10) / 3)
    # The background is one of plop's base classes.
    assert plop.scores(MATRIX, GROUPS, 1)["base"] == pytest.approx((5 / 12 + 6 / 12 + 8 / 15) / 3)
    assert plop.scores(MATRIX, GROUPS, 1)["all"] == pytest.approx((5 / 12 + 6 / 12 + 8 / 15 + 4 / 10) / 4)


def _same(scores: dict, value: float) -> dict:
    return {name: value for name in scores if name not in ("base", "incremental")}


def test_class_order_of_groups_counts_not_ids(mmseg):
    assert mmseg.scores(MATRIX, [[3], [1, 2]], 1)["base"] == pytest.approx(4 / 10)
    assert set(mmseg.ious(MATRIX, [3])) == {3}


def test_classes_without_truth_are_left_out(mmseg, plop):
    absent = MATRIX.copy()
    absent[2] = 0  # false positives of class 2 remain
    assert set(mmseg.ious(absent, [1, 2, 3])) == {1, 3}
    assert mmseg.scores(absent, GROUPS, 1)["base"] == pytest.approx(6 / 8)  # truth 8, predicted 6
    absent[3] = 0
    assert mmseg.scores(absent, GROUPS, 1)["incremental"] is None
    absent[0] = 0
    assert set(plop.ious(absent, [1, 2, 3])) == {1}


def test_never_predicted_is_zero_not_absent(mmseg):
    missed = np.array([[0, 0, 0], [0, 4, 0], [0, 6, 0]])
    assert mmseg.ious(missed, [1, 2]) == {1: 4 / 10, 2: 0.0}


def test_perfect_prediction_is_one(mmseg, plop):
    for each in (mmseg, plop):
        assert set(each.ious(np.diag([3, 1, 4, 1]), [1, 2, 3]).values()) == {1.0}


def test_weighted_means_tell_the_conventions_apart(mmseg, plop):
    """all = (101 base + 50 incremental) / 151 under plop, 100 and 150 under mmseg150 (reference, protocols.md §3)."""
    matrix = np.random.default_rng(0).integers(1, 100, (151, 151))
    groups = [list(range(1, 101)), list(range(101, 151))]
    for each, base in ((mmseg, 100), (plop, 101)):
        s = each.scores(matrix, groups, 1)
        assert s["all"] == pytest.approx((base * s["base"] + 50 * s["incremental"]) / (base + 50))


def test_counts_beyond_float_precision_stay_exact(mmseg):
    big = 2**60
    assert mmseg.ious(np.array([[0, 0], [0, big]]), [1]) == {1: 1.0}


@pytest.mark.parametrize("matrix", [np.zeros((2, 2)), np.zeros((2, 3), int), np.zeros(4, int)])
def test_refuses_what_is_no_confusion_matrix(mmseg, matrix):
    with pytest.raises(RunError, match="square and of integers"):
        mmseg.ious(matrix, [1])


@pytest.mark.parametrize("seen", [[4], [0, 1], [-1]])
def test_refuses_classes_outside_the_matrix(mmseg, seen):
    with pytest.raises(RunError, match="do not fit"):
        mmseg.ious(MATRIX, seen)


def test_names_and_versions(plop, mmseg):
    assert protocol.get("plop") is plop
    assert (plop.key, mmseg.key) == ("crop.all", "full.foreground")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'plop@1'"):
        protocol.get("plop@2")
