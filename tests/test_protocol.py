"""Scores of tiny confusion matrices, worked out by hand."""

from __future__ import annotations

from fractions import Fraction as F
from pathlib import Path

import numpy as np
import pytest
import torch

from cssbench import protocol, scoring
from cssbench.errors import RunError, UnknownNameError
from cssbench.metrics import continual
from cssbench.metrics.confusion import confusion
from cssbench.results import RunFolder

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


# Four images of 2 x 3 pixels, classes 1, 2 | 3, 4; no pixel of class 4 in the truth. `crop` is the left 2 x 2 of each.
TRUTH = [[[1, 1, 0], [1, 2, 2]], [[2, 2, 3], [2, 0, 3]], [[3, 3, 3], [0, 0, 1]], [[1, 2, 3], [0, 3, 0]]]
PREDICTED = {
    (0, "all"): [[[1, 1, 0], [0, 2, 2]], [[2, 1, 0], [2, 0, 1]], [[0, 2, 2], [0, 0, 1]], [[1, 2, 0], [1, 0, 0]]],
    (0, "foreground"): [[[1, 1, 2], [1, 2, 2]], [[2, 1, 1], [2, 1, 1]], [[1, 2, 2], [2, 1, 1]], [[1, 2, 2], [1, 1, 2]]],
    (1, "all"): [[[1, 1, 1], [0, 2, 2]], [[2, 1, 3], [2, 0, 0]], [[3, 0, 4], [0, 2, 1]], [[1, 2, 2], [0, 3, 3]]],
    (1, "foreground"): [[[1, 1, 1], [1, 2, 2]], [[2, 1, 3], [2, 4, 3]], [[3, 2, 4], [1, 2, 1]], [[1, 2, 2], [3, 3, 3]]],
}


def tiny(step: int, key: str) -> np.ndarray:
    """The matrix of the four images after a step: `<geometry>.<rule>`."""
    geometry, rule = key.split(".")
    width = {"full": 3, "crop": 2}[geometry]
    pairs = zip(torch.tensor(TRUTH), torch.tensor(PREDICTED[step, rule]), strict=True)
    return sum(confusion(t[:, :width], p[:, :width], 4) for t, p in pairs).numpy()


def test_tiny_matrices_by_hand():
    assert tiny(0, "crop.all").tolist() == [[3, 1, 0, 0, 0], [1, 3, 0, 0, 0], [0, 1, 4, 0, 0], [2, 0, 1, 0, 0], [0] * 5]
    full = [[0, 2, 1, 2, 1], [0, 5, 0, 0, 0], [0, 1, 5, 0, 0], [0, 0, 2, 4, 1], [0] * 5]
    assert tiny(1, "full.foreground").tolist() == full


# Protocol -> step -> class -> TP / (GT + PRED - TP), counted by hand; and base, incremental, all of these fractions.
BY_HAND = {
    "mmseg150@1": [
        # void and class 3 left out: GT 5, 6; PRED 5 + 1, 5
        ({1: F(5, 5 + 6 - 5), 2: F(5, 6 + 5 - 5)}, F(5, 6), None, F(5, 6)),
        # GT 5, 6, 7; PRED 5 + 1, 5 + 2, 4
        (
            {1: F(5, 5 + 6 - 5), 2: F(5, 6 + 7 - 5), 3: F(4, 7 + 4 - 4)},
            F(35, 48),
            F(4, 7),
            F(341, 504),
        ),
    ],
    "plop@1": [
        # void and class 3 are background: GT 4 + 3, 4, 5; PRED 3 + 1 + 2, 1 + 3 + 1, 4 + 1
        ({0: F(5, 7 + 6 - 5), 1: F(3, 4 + 5 - 3), 2: F(4, 5 + 5 - 4)}, F(43, 72), None, F(43, 72)),
        # GT 4, 4, 5, 3; PRED 3 + 1 + 1, 3 + 1, 4 + 1, 2
        (
            {0: F(3, 4 + 5 - 3), 1: F(3, 4 + 4 - 3), 2: F(4, 5 + 5 - 4), 3: F(2, 3 + 2 - 2)},
            F(53, 90),
            F(2, 3),
            F(73, 120),
        ),
    ],
    "mib@1": [
        # void and class 3 left out, predictions of background are misses: GT 4, 5; PRED 3 + 1, 4
        ({1: F(3, 4 + 4 - 3), 2: F(4, 5 + 4 - 4)}, F(7, 10), None, F(7, 10)),
        # GT 4, 5, 3; PRED 3 + 1, 4, 2
        ({1: F(3, 4 + 4 - 3), 2: F(4, 5 + 4 - 4), 3: F(2, 3 + 2 - 2)}, F(7, 10), F(2, 3), F(31, 45)),
    ],
    "ssul@1": [
        # void is background, class 3 left out: GT 4, 4, 5; PRED 3 + 1, 1 + 3 + 1, 4
        ({0: F(3, 4 + 4 - 3), 1: F(3, 4 + 5 - 3), 2: F(4, 5 + 4 - 4)}, F(19, 30), None, F(19, 30)),
        # as plop, but class 4 counts as 0
        ({0: F(1, 2), 1: F(3, 5), 2: F(2, 3), 3: F(2, 3), 4: F(0)}, F(53, 90), F(1, 3), F(73, 150)),
    ],
    "ssul-nonzero@1": [
        ({0: F(3, 5), 1: F(1, 2), 2: F(4, 5)}, F(19, 30), None, F(19, 30)),
        # the zero of class 4 stays in incremental and leaves all
        ({0: F(1, 2), 1: F(3, 5), 2: F(2, 3), 3: F(2, 3), 4: F(0)}, F(53, 90), F(1, 3), F(73, 120)),
    ],
    "dkd@1": [
        # class 3 is truth of class 0, which is never predicted; void adds 3, 1 to PRED:
        # GT 3, 4, 5; PRED 0, 4 + 1 + 2 + 3, 4 + 1 + 1
        ({0: F(0), 1: F(4, 4 + 10 - 4), 2: F(4, 5 + 6 - 4)}, F(34, 105), None, F(34, 105)),
        # no truth of class 0 left; void adds 1, 1, 1, 1 to PRED: GT 4, 5, 3; PRED 4 + 1 + 1, 4 + 1 + 1, 2 + 1.
        # base of 3 entries (0, 1, 2), incremental of 2: (3 * 13/21 + 2 * 1/2) / 5
        (
            {1: F(4, 4 + 6 - 4), 2: F(4, 5 + 6 - 4), 3: F(2, 3 + 3 - 2)},
            F(13, 21),
            F(1, 2),
            F(4, 7),
        ),
    ],
    "m2f-bg@1": [
        # GT 6 + 7, 5, 6; PRED 5 + 1 + 4, 1 + 4 + 1 + 1, 5 + 2; class 0 in all, not in base
        ({0: F(9, 13 + 10 - 9), 1: F(4, 5 + 7 - 4), 2: F(5, 6 + 7 - 5)}, F(9, 16), None, F(33, 56)),
        # GT 6, 5, 6, 7; PRED 3 + 1 + 2, 1 + 4 + 1, 1 + 5 + 1, 1 + 3
        (
            {0: F(3, 6 + 6 - 3), 1: F(4, 5 + 6 - 4), 2: F(5, 6 + 7 - 5), 3: F(3, 7 + 4 - 3)},
            F(67, 112),
            F(3, 8),
            F(10, 21),
        ),
    ],
}


def test_every_built_in_protocol_is_worked_out_by_hand():
    assert list(BY_HAND) == [p.id for p in protocol.BUILT_IN]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", BY_HAND)
def test_four_tiny_images_by_hand(name: str, step: int):
    each, (ious, base, incremental, every) = protocol.get(name), BY_HAND[name][step]
    groups = [[1, 2], [3, 4]]
    matrix = tiny(step, each.key)
    assert each.ious(matrix, [c for group in groups[: step + 1] for c in group]) == pytest.approx(ious)
    scores = each.scores(matrix, groups, step)
    wanted = {"base": base, "group0": base, "incremental": incremental, "all": every}
    wanted |= {"group1": incremental} if step else {}
    assert {k: v if v is None else pytest.approx(float(v)) for k, v in wanted.items()} == scores


def test_seven_protocols_give_seven_numbers():
    """One model, one set of outputs: no two conventions agree on `all` over both steps."""
    seen = {
        tuple(
            protocol.get(name).scores(tiny(step, protocol.get(name).key), [[1, 2], [3, 4]], step)["all"]
            for step in (0, 1)
        )
        for name in BY_HAND
    }
    assert len(seen) == 7


@pytest.mark.parametrize(("name", "n_base", "n_all"), [("ssul@1", 101, 151), ("dkd@1", 101, 151), ("mib@1", 100, 150)])
def test_weights_of_base_and_incremental_in_all(name: str, n_base: int, n_all: int):
    matrix = np.random.default_rng(0).integers(1, 100, (151, 151))
    s = protocol.get(name).scores(matrix, [list(range(1, 101)), list(range(101, 151))], 1)
    assert s["all"] == pytest.approx((n_base * s["base"] + 50 * s["incremental"]) / n_all)


def test_weighted_mean_without_one_part():
    dkd = protocol.get("dkd@1")
    assert dkd.means({1: 0.5}, [[1], [2]], 1)["all"] == 0.5
    assert dkd.means({2: 0.25}, [[1], [2]], 1)["all"] == 0.25
    assert dkd.means({}, [[1], [2]], 1)["all"] is None


def test_nonzero_mean_of_nothing_is_none():
    assert protocol.get("ssul-nonzero@1").scores(np.zeros((3, 3), np.int64), [[1], [2]], 1)["all"] is None


def test_explain_says_what_is_scored_and_who_uses_it():
    words = {name: protocol.get(name).explain() for name in BY_HAND}
    assert words["mib@1"]["void pixels"] == "raw 0, ignored"
    assert "evaluate.background_threshold" in words["plop@1"]["prediction"]
    assert "plays no part" in words["mmseg150@1"]["prediction"]
    assert "513" in words["ssul@1"]["known deviations"]
    assert "known deviations" not in words["plop@1"]
    assert len({tuple(sentences.items()) for sentences in words.values()}) == 7


def test_protocol_show_and_list(command):
    code, out, _ = command("protocol", "show", "m2f-bg")
    assert code == 0
    assert out.startswith("m2f-bg@1: full-size images;")
    assert "used by: CoMFormer, ECLIPSE." in out
    assert all(name in command("list", "protocols")[1] for name in BY_HAND)
    code, _, err = command("protocol", "show", "plopp")
    assert (code, "Did you mean 'plop@1'" in err) == (2, True)


RESULTS = Path(__file__).parents[1] / "reports" / "results"
SHOWN = (RESULTS / "camvid-6-1/runs/segvit-cl", RESULTS / "synthetic-10-5/runs/segvit-cl-atm-s0")


def after_last_step(name: str, folder: Path) -> list[float]:
    scores = scoring.run_scores(RunFolder.read(folder), protocol.get(name))
    return [*(scores[-1][mean] for mean in ("base", "incremental", "all")), continual.average(scores)]


def test_the_page_of_the_docs_agrees_with_the_objects_and_the_hand_worked_numbers():
    page = (Path(__file__).parents[1] / "docs" / "protocols.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: [] for line in page.splitlines() if line.startswith("| `")}
    for line in page.splitlines():
        if line.startswith("| `"):
            rows[line.split("`")[1]].append([cell.strip() for cell in line.strip("| ").split("|")])
    assert list(rows) == list(BY_HAND)
    for name, (rules, numbers, measured) in rows.items():
        assert measured[1:9] == [f"{100 * value:.2f}" for folder in SHOWN for value in after_last_step(name, folder)]
        each, (_, *means) = protocol.get(name), BY_HAND[name][1]
        assert rules[1] == each.used_by
        assert rules[2].startswith(each.geometry) or rules[2] == "centre crop"
        assert (rules[3] == "classes") == (each.rule == "foreground")
        assert rules[7] == {"drop": "left out", "zero": "count as 0"}[each.absent]
        assert numbers[1:4] == [f"{100 * float(mean):.2f}" for mean in means]
