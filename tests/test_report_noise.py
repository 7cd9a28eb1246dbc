"""Means over runs, what may be bold, the paired test, and which runs make one row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from report_runs import STEP0, forgetful, joint, learner, make, other_seed, reordered, row, score

from cssbench.reports import frames, noise
from cssbench.reports.entries import by_class_and_seed, entries, short
from cssbench.reports.noise import Spread, clear_best, sign_flip, spread


def test_spread_by_hand():
    assert spread([0.1, 0.3]) == Spread(pytest.approx(0.2), pytest.approx(0.02**0.5), 2)
    assert spread([0.4]) == Spread(0.4, None, 1)
    assert spread([]) is None
    assert spread([0.1, None]) is None  # a mean over fewer runs would pass for the mean over all


@pytest.mark.parametrize(
    ("means", "stds", "numbers", "best"),
    [
        ([0.30, 0.20], [0.02, 0.05], [3, 3], 0),
        ([0.20, 0.30], [0.02, 0.05], [3, 3], 1),
        ([0.25, 0.20], [0.01, 0.05], [3, 3], None),  # the lead is within the noise of the second
        ([0.25, 0.20], [0.05, 0.01], [3, 3], None),  # and of the first
        ([0.30, 0.20], [None, 0.01], [1, 3], None),  # one run has no noise to compare with
        ([0.30, 0.20], [0.01, None], [3, 1], None),
        ([0.30, 0.29, 0.10], [0.02, 0.02, 0.02], [2, 2, 2], None),  # far from the third does not help
        ([0.30], [0.01], [2], None),
    ],
)
def test_only_a_lead_beyond_the_noise_is_a_win(means, stds, numbers, best):
    assert clear_best([Spread(*each) for each in zip(means, stds, numbers, strict=True)]) == best
    assert clear_best([None, *(Spread(*each) for each in zip(means, stds, numbers, strict=True))]) == (
        None if best is None else best + 1
    )


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 1, 1], 2 / 8),  # only all plus and all minus are as far from 0
        ([3, 1, -1], 6 / 8),  # of +-3 +-1 +-1, all but +-(3 - 1 - 1) reach 3
        ([1, -1], 1),
        ([0, 0], 1),
        ([-0.3, 0.1, 0.2, 0.4], 10 / 16),  # 0.3 - 0.1 - 0.2 + 0.4 is as large, but for the last digit
    ],
)
def test_sign_flip_by_hand(differences, p):
    assert sign_flip(differences) == p


def test_sign_flip_of_many_pairs_is_drawn_and_near_the_exact_value(monkeypatch):
    assert sign_flip([]) is None
    d = np.random.default_rng(3).normal(0.4, 1, 12)
    exact = sign_flip(d)
    assert exact == np.mean([abs(np.dot(s, d)) >= abs(d.sum()) for s in itertools.product((-1, 1), repeat=12)])
    monkeypatch.setattr(noise, "EXACT", 11)
    drawn = sign_flip(d)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.02)
    assert drawn == sign_flip(d)  # seeded


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path):
    found = entries(score(learner(tmp_path / "a-s0"), other_seed(tmp_path / "a-s1"), joint(tmp_path / "j")))
    assert [(entry.label, entry.n, entry.seeds) for entry in found] == [("a-s{0,1}", 2, "0, 1"), ("j", 1, "0")]
    both = found[0]
    assert both.last("base") == Spread(pytest.approx(0.775), pytest.approx(0.05 / 2**0.5), 2)
    assert both.steps("base")[0] == Spread(1, 0, 2)
    assert both.ious() == pytest.approx({1: 0.55, 2: 1, 3: (10 / 15 + 10 / 14) / 2})
    assert both.forgetting() == pytest.approx({1: 0.45, 2: 0})
    assert found[1].last("avg") is None  # an oracle has no steps to average


def test_what_makes_another_row(tmp_path):
    first, again = learner(tmp_path / "first"), learner(tmp_path / "again")
    second = other_seed(tmp_path / "second")
    other, part = forgetful(tmp_path / "other", seed=2), make(tmp_path / "part", [{"": STEP0}], seed=3)
    found = entries(score(first, again, second, other, part))
    assert [[one.label for one in entry.members] for entry in found] == [
        ["first", "second"],
        ["again"],  # the seed of an earlier run: a repetition, which must not lower the standard deviation
        ["other"],
        ["part"],
    ]


def test_a_note_or_another_place_of_the_data_makes_no_other_row(tmp_path):
    found = entries(score(learner(tmp_path / "a", note="x"), other_seed(tmp_path / "b", note="y")))
    assert [entry.n for entry in found] == [2]


def test_class_orders_are_runs_of_one_entry_where_a_table_holds_several(tmp_path):
    runs = score(learner(tmp_path / "a"), reordered(tmp_path / "b"), joint(tmp_path / "j"))
    mine = entries([one for one in runs if not one.oracle])
    assert [(entry.n, entry.last("base").mean) for entry in mine] == [(2, pytest.approx(0.75))]
    (oracle,) = entries([one for one in runs if one.oracle and one.label == "j"][:1])
    assert oracle.n == 1


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["a"], "a"),
        (["cl-s0", "cl-s1"], "cl-s{0,1}"),
        (["x/run", "y/run"], "{x,y}/run"),
        (["aba", "aa"], "a{b,}a"),
        ([f"s{i}" for i in range(9)], "s{0,1,…,8}"),
    ],
)
def test_short_labels(labels, shown):
    assert short(labels) == shown


def test_pairs_by_class_and_by_seed(tmp_path):
    ones = score(
        learner(tmp_path / "a0"), other_seed(tmp_path / "a1"), forgetful(tmp_path / "b"), joint(tmp_path / "j")
    )
    mine, its, _ = entries(ones)
    classes, seeds = by_class_and_seed(mine, its)
    assert classes == pytest.approx([0.45, 0, (10 / 15 + 10 / 14) / 2 - 10 / 19])
    assert seeds == pytest.approx([((0.5 + 1 + 10 / 15) - (0.1 + 1 + 10 / 19)) / 3])  # seed 0 is all they share
    pair = row(frames.pairs_frame(ones))  # the oracle takes no part
    assert (pair["run"], pair["other"], pair["n"], pair["other_n"]) == ("a{0,1}", "b", 2, 1)
    assert (pair["classes"], pair["p_classes"], pair["seeds"], pair["p_seeds"]) == (3, 0.5, 1, 1)
    assert pair["difference"] == pytest.approx(np.mean([6.5 / 9, (0.6 + 1 + 10 / 14) / 3]) - (0.1 + 1 + 10 / 19) / 3)
