"""Continual measures on one table, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cssbench.metrics import continual

# table[t][g]; group 0 is at its best at step 1, so that forgetting and drop differ
TABLE = [[0.6], [0.8, 0.7], [0.5, 0.75, 0.9]]


def test_forgetting_takes_the_best_earlier_step():
    assert continual.forgetting(TABLE) == pytest.approx([0.8 - 0.5, 0.7 - 0.75])


def test_drop_takes_the_first():
    assert continual.drop(TABLE) == pytest.approx([0.6 - 0.5, 0.7 - 0.75])


def test_backward_transfer_is_the_mean_of_negative_drops():
    assert continual.backward_transfer(TABLE) == pytest.approx((-0.1 + 0.05) / 2)
    # On this table they are different measures: 0.125 is forgotten, BWT is -0.025.
    assert continual.mean(continual.forgetting(TABLE)) == pytest.approx(0.125)


def test_lost_parts():
    parts = continual.lost_parts(TABLE, [0.58, 0.7])
    assert parts == [pytest.approx((0.02, 0.08)), pytest.approx((0.0, -0.05))]


@given(st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_lost_parts_sum_to_the_drop(values):
    table = [values[:1], values[1:3], values[3:6]]
    sums = [a + b for a, b in continual.lost_parts(table, values[6:8]) if a is not None and b is not None]
    assert sums == pytest.approx(continual.drop(table), abs=1e-12)


def test_frozen_parameters_lose_nothing_to_parameters():
    first = [TABLE[0][0], TABLE[1][1]]
    assert [p for p, _ in continual.lost_parts(TABLE, first)] == [0.0, 0.0]


def test_average_counts_step_zero():
    assert continual.average([{"all": 0.6}, {"all": 0.4}, {"all": 0.2}]) == pytest.approx(0.4)
    assert continual.average([{"all": 0.6}, {"all": None}]) is None
    assert continual.average([]) is None


def test_one_step_forgets_nothing():
    assert continual.forgetting([[0.6]]) == continual.drop([[0.6]]) == continual.lost_parts([[0.6]], []) == []
    assert continual.backward_transfer([[0.6]]) is None


def test_unmeasurable_groups_stay_none_and_leave_means():
    table = [[None], [0.8, 0.7], [0.5, 0.6, 0.9]]
    assert continual.forgetting(table) == [pytest.approx(0.3), pytest.approx(0.1)]  # best of what was measured
    assert continual.drop(table) == [None, pytest.approx(0.1)]
    assert continual.backward_transfer(table) == pytest.approx(-0.1)
    assert continual.lost_parts(table, [0.7, None]) == [(None, pytest.approx(0.2)), (None, None)]
    gone = [[0.6], [0.8, 0.7], [None, 0.6, 0.9]]
    assert continual.forgetting(gone) == [None, pytest.approx(0.1)]
    assert continual.mean([None]) is None


def test_group_table_from_scores():
    scores = [{"all": 0.5, "group0": 0.6}, {"all": 0.5, "group0": 0.8, "group1": 0.7}]
    assert continual.group_table(scores) == [[0.6], [0.8, 0.7]]


def test_forward_transfer_needs_models_trained_on_one_step_alone():
    # groups 1 and 2 right after learning: 0.7, 0.9; alone 0.6 and 0.95. Group 0 has nothing before it.
    assert continual.forward_transfer(TABLE, [0.1, 0.6, 0.95]) == pytest.approx((0.1 - 0.05) / 2)
    assert continual.forward_transfer(TABLE, [None, 0.6, None]) == pytest.approx(0.1)
    assert continual.forward_transfer(TABLE, None) is None
    assert continual.forward_transfer([[0.6]], [0.5]) is None


def test_intransigence_is_against_the_joint_model_of_the_steps_so_far():
    # joint models of steps 0, 0..1, 0..2 score 0.62, 0.8, 0.85 on the newest group; own 0.6, 0.7, 0.9
    assert continual.intransigence(TABLE, [0.62, 0.8, 0.85]) == pytest.approx([0.02, 0.1, -0.05])
    assert continual.intransigence(TABLE, [None, None, 0.85]) == [None, None, pytest.approx(-0.05)]


def test_plasticity_stability_rigidity():
    assert continual.plasticity(TABLE) == pytest.approx((0.7 + 0.9) / 2)
    assert continual.stability(TABLE) == pytest.approx((0.5 / 0.6 + 0.75 / 0.7) / 2)
    assert continual.rigidity(TABLE) == 0.5
    assert continual.plasticity([[0.6]]) is continual.stability([[0.6]]) is continual.rigidity([]) is None
    assert continual.stability([[0.0], [0.2, 0.7], [0.1, 0.35, 0.9]]) == pytest.approx(0.5)  # group 0 had nothing


def test_drop_to_oracle():
    assert continual.drop_to_oracle(0.4, 0.5) == pytest.approx((0.1, 0.2))
    assert continual.drop_to_oracle(0.6, 0.5) == pytest.approx((-0.1, -0.2))
    assert continual.drop_to_oracle(0.4, None) == continual.drop_to_oracle(None, 0.5) == (None, None)
    assert continual.drop_to_oracle(0.0, 0.0) == (0.0, None)


def test_group_rows():
    first, second, third = continual.group_rows(TABLE, [0.58, 0.7])
    drops = {"drop": 0.1, "forgetting": 0.3, "lost to parameters": 0.02, "lost to competition": 0.08}
    assert first == pytest.approx({"first": 0.6, "last": 0.5} | drops)
    assert second["lost to parameters"] == 0.0
    assert third == {"first": 0.9, "last": 0.9} | dict.fromkeys(drops)


def test_every_measure_has_its_formula():
    names = {*continual.summary(TABLE), *continual.group_rows(TABLE, [None, None])[0]}
    assert names <= continual.FORMULAS.keys()
