"""The linter: hand-worked rows for every rule, and the verdicts on everything that is shipped."""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cssbench.errors import UnknownNameError
from cssbench.reports import lint as linter
from cssbench.reports import literature
from cssbench.reports.lint import Verdict, lint_rows, meet, span, weighted
from cssbench.reports.literature import Row

ROOT = Path(__file__).parents[1]


def make(base: Any = None, inc: Any = None, all: Any = None, avg: Any = None, **more: Any) -> Row:
    """A row; numbers as text, so that their places are known."""
    content = {"paper": "P", "year": 2020, "source": "s", "method": "M", "backbone": "B", "mode": "overlapped"}
    content |= {"scenario": "ade20k-100-50", "base": base, "inc": inc, "all": all, "avg": avg}
    return Row.model_validate(content | more)


def one(row: Row, *others: Row) -> Verdict:
    return lint_rows([row, *others])[0]


def rules(verdict: Verdict) -> list[str]:
    return [rule for rule, _ in verdict.flags]


# Rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "low", "high"), [("40.00", "39.995", "40.005"), ("1.5", "1.45", "1.55"), ("7", "6.5", "7.5")]
)
def test_a_printed_number_is_an_interval(printed: str, low: str, high: str):
    assert span(Decimal(printed)) == (Decimal(low), Decimal(high))


def test_weighted_mean_and_its_slack():
    assert weighted([(100, Decimal("30.0")), (50, Decimal("60.0"))]) == (Decimal("39.95"), Decimal("40.05"))
    assert meet(span(Decimal("1.0")), span(Decimal("1.1")))  # 1.05 rounds to either
    assert not meet(span(Decimal("1.0")), span(Decimal("1.11")))


# Weighted mean --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "all", "fits"),
    [
        # 60.00 and 30.00: (101*60 + 50*30)/151 = 50.0662, (100*60 + 50*30)/150 = 50
        ("ade20k-100-50", "50.07", "fits 151"),
        ("ade20k-100-10", "50.06", "fits 151"),  # within 0.005 + 0.005 of 50.0662
        ("ade20k-100-5", "50.00", "fits 150"),
        ("ade20k-100-50", "50.04", "fits neither"),
        ("ade20k-100-50", "50", "fits both"),  # 50.0662 rounds to it
        # (51*60 + 100*30)/151 = 40.1325, (50*60 + 100*30)/150 = 40
        ("ade20k-50-50", "40.13", "fits 151"),
        ("ade20k-50-50", "40.00", "fits 150"),
        ("ade20k-50-50", "50.07", "fits neither"),
        # (7*60 + 5*30)/12 = 47.5, (6*60 + 5*30)/11 = 46.3636
        ("camvid-6-5", "47.50", "fits 12"),
        ("camvid-6-1", "46.36", "fits 11"),
    ],
)
def test_which_convention_fits(scenario: str, all: str, fits: str):
    verdict = one(make("60.00", "30.00", all, scenario=scenario))
    assert verdict.fits == fits
    assert rules(verdict) == (["mean"] if fits == "fits neither" else [])


def test_what_is_not_printed_cannot_be_checked():
    for row in (make(all="50.0"), make("60.0", None, "50.0"), make("60.0", "30.0")):
        assert one(row).fits == "not checkable"


def test_means_of_the_groups_stand_in_for_inc():
    # (51*50 + 50*40 + 50*30)/151 = 40.0662, (50*50 + 50*40 + 50*30)/150 = 40
    groups = ["50.00", "40.00", "30.00"]
    assert one(make("50.00", None, "40.07", groups=groups, scenario="ade20k-50-50")).fits == "fits 151"
    assert one(make("50.00", None, "40.00", groups=groups, scenario="ade20k-50-50")).fits == "fits 150"
    assert rules(one(make("50.00", None, "40.00", groups=groups))) == ["groups"]  # 100-50 has two steps


def test_a_row_that_fits_another_convention_than_it_claims():
    assert rules(one(make("60.00", "30.00", "50.00", protocol="plop@1"))) == ["protocol"]
    assert rules(one(make("60.00", "30.00", "50.07", protocol="mmseg150@1"))) == ["protocol"]
    assert rules(one(make("60.00", "30.00", "50.07", protocol="plop@1"))) == []
    assert rules(one(make("60.00", "30.00", "50", protocol="mmseg150@1"))) == []  # fits both
    # These two weigh otherwise: nothing follows.
    for other in ("m2f-bg@1", "ssul-nonzero@1"):
        assert rules(one(make("60.00", "30.00", "50.07", protocol=other))) == []


def test_one_table_with_two_conventions():
    rows = [make("60.00", "30.00", "50.07", method=name) for name in "AB"] + [make("40.00", "10.00", "30.00")]
    assert [rules(v) for v in lint_rows(rows)] == [["copy"], ["copy"], ["mixed"]]
    apart = [*rows[:2], rows[2].model_copy(update={"file": "another"})]
    assert rules(lint_rows(apart)[2]) == []


# avg ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("avg", "scenario", "flag"),
    [
        ("45.00", "ade20k-100-50", "(base + inc) / 2"),
        ("45.00", "ade20k-100-5", "(base + inc) / 2"),
        ("55.10", "ade20k-100-50", None),  # step 0 at 60.13
        ("55.03", "ade20k-100-50", None),  # step 0 at 59.99, and 60.00 is within rounding
        ("55.02", "ade20k-100-50", "imply 59.97 after step 0"),
        ("55.00", "ade20k-100-50", "imply 59.93 after step 0"),
        ("49.00", "ade20k-100-50", "imply 47.93 after step 0"),
        ("49.00", "ade20k-100-5", "below all 50.07"),
        ("50.06", "ade20k-100-5", None),
    ],
)
def test_avg(avg: str, scenario: str, flag: str | None):
    flags = one(make("60.00", "30.00", "50.07", avg, scenario=scenario)).flags
    assert [rule for rule, _ in flags] == (["avg"] if flag else [])
    assert flag is None or flag in flags[0][1]


# Reductions -----------------------------------------------------------------------------------------------------------

ORACLE = make("80.00", "50.00", "70.07", oracle=True, method="joint")


@pytest.mark.parametrize(
    ("printed", "flags"),
    [
        ({"base": "20.0", "inc": "20.0", "all": "20.0"}, []),
        ({"base": "25.0", "inc": "40.0", "all": "28.5"}, []),  # percent: 20/80, 20/50, 20/70.07
        ({"base": "20.0"}, []),
        ({"base": "20.1"}, ["printed is 20.1"]),
        ({"base": "20.0", "inc": "40.0"}, ["partly points, partly percent"]),
        ({"base": "99.0", "inc": "20.0"}, ["80.00 - 60.00 is 20.00 points or 25.00 %; printed is 99.0"]),
    ],
)
def test_reductions(printed: dict[str, str], flags: list[str]):
    found = one(make("60.00", "30.00", "50.07", reduction=printed), ORACLE).flags
    assert len(found) == len(flags)
    assert all(flag in sentence for flag, (_, sentence) in zip(flags, found, strict=True))


def test_without_its_own_oracle_no_reduction_is_checked():
    row = make("60.00", "30.00", "50.07", reduction={"base": "99.0"})
    for change in ({"backbone": "other"}, {"scenario": "ade20k-100-10"}, {"file": "other"}):
        assert one(row, ORACLE.model_copy(update=change)).flags == ()


def test_one_file_with_points_and_percent():
    points = [make("60.00", "30.00", reduction={"base": "20.0"}, method=name) for name in "AB"]
    percent = make("60.00", "30.00", reduction={"base": "25.0"})
    verdicts = lint_rows([*points, percent, ORACLE])
    assert [rules(v) for v in verdicts] == [[], [], ["reduction"], []]
    assert "are percent, most of the file's points" in verdicts[2].flags[0][1]
    another = [row.model_copy(update={"file": "another"}) for row in (percent, ORACLE)]
    assert not any(v.flags for v in lint_rows([*points, *another, ORACLE]))


# Copies, names --------------------------------------------------------------------------------------------------------


def test_equal_rows_of_two_methods():
    row = make("60.00", "30.00", "50.07", method="SDR")
    copy = row.model_copy(update={"method": "MiB"})
    assert [rules(v) for v in lint_rows([row, copy])] == [["copy"], ["copy"]]
    for change in ({"file": "other"}, {"base": Decimal("60.01")}, {"method": "SDR"}, {"mode": "disjoint"}):
        assert one(row, copy.model_copy(update=change)).flags == ()
    assert one(make(all="50.0"), make(all="50.0", method="MiB")).flags == ()  # one equal number is no copy


def test_unknown_scenario():
    with pytest.raises(UnknownNameError, match="ade20k-100-51"):
        lint_rows([make(all="1.0", scenario="ade20k-100-51")])


# What is shipped ------------------------------------------------------------------------------------------------------

SHIPPED = {v.name: v for v in lint_rows(literature.shipped().rows)}
THESIS = "zhang_thesis: {}, {}, ade20k-{}"
R101, VIT, SEGVIT = "DeepLabV3-R101", "DeepLabV3-ViT-B", "SegViT-ViT-B"


@pytest.mark.parametrize(
    ("method", "backbone", "scenario", "fits"),
    [
        *((m, VIT, "100-50", "fits 151") for m in ("MiB", "PLOP", "REMINDER", "joint")),
        *((m, VIT, "100-10", "fits neither") for m in ("MiB", "PLOP", "REMINDER")),
        *((m, SEGVIT, s, "fits 150") for m in ("SegViT-CL", "joint") for s in ("100-50", "100-10")),
        *((m, R101, "100-50", "fits 151") for m in ("MiB", "SDR", "PLOP", "REMINDER", "RCIL", "joint")),
        *((m, R101, "100-10", "fits 151") for m in ("MiB", "SDR", "PLOP", "REMINDER", "joint")),
        ("RCIL", R101, "100-10", "fits neither"),
        ("ILT", R101, "100-50", "fits both"),
    ],
)
def test_table_4_11(method: str, backbone: str, scenario: str, fits: str):
    assert SHIPPED[THESIS.format(method, backbone, scenario)].fits == fits


def test_everything_that_is_flagged():
    thesis = {
        ("MiB", R101, "100-50"): ["reduction", "copy"],
        ("SDR", R101, "100-50"): ["copy"],
        ("RCIL", R101, "100-10"): ["mean", "reduction", "reduction", "reduction"],
        ("MiB", VIT, "100-50"): ["avg", "reduction", "reduction"],
        ("PLOP", VIT, "100-50"): ["avg", "reduction"],
        ("REMINDER", VIT, "100-50"): ["avg", "reduction"],
        ("MiB", VIT, "100-10"): ["mean", "reduction"],
        ("PLOP", VIT, "100-10"): ["mean", "reduction"],
        ("REMINDER", VIT, "100-10"): ["mean", "reduction"],
        ("SegViT-CL", SEGVIT, "100-50"): ["mixed", "avg"],
        ("SegViT-CL", SEGVIT, "100-10"): ["mixed"],
        ("joint", SEGVIT, "100-50"): ["mixed"],
        ("joint", SEGVIT, "100-10"): ["mixed"],
    }
    known = {THESIS.format(*row): flags for row, flags in thesis.items()}
    known |= {f"reminder_readme: {method}, {R101}, ade20k-100-50": ["copy"] for method in ("MiB", "SDR")}
    known[f"mib_repo: joint, {R101}, ade20k-50-50"] = ["mean"]
    assert {name: rules(v) for name, v in SHIPPED.items() if v.flags} == known
    (average,) = (text for rule, text in SHIPPED[THESIS.format("SegViT-CL", SEGVIT, "100-50")].flags if rule == "avg")
    assert average == "avg 46.82 is (base + inc) / 2, no mean over steps"


def test_the_survey_s_rows_under_plop_all_fit():
    """baselines.md, section 8: the rows of source A obey the 151-class mean to the last place."""
    fits = Counter(v.fits for name, v in SHIPPED.items() if name.startswith("reminder_readme"))
    assert fits == {"fits 151": 16, "fits both": 2}


# Command line ---------------------------------------------------------------------------------------------------------

HEAD = "defaults: {paper: P, year: 2020, source: s, backbone: B, mode: overlapped, scenario: ade20k-100-50}\n"


def test_command_prints_every_verdict(command):
    code, out, _ = command("published", "lint")
    assert code == 0
    assert command("published", "lint", "--strict")[0] == 1
    assert f"{sum(bool(v.flags) for v in SHIPPED.values())} of {len(literature.shipped().rows)} rows flagged:" in out
    assert re.search(r"^\| zhang_thesis +\| SegViT-CL .* 46.82 \| - +\| fits 150 +\| mixed, avg", out, re.MULTILINE)
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(literature.shipped().rows)
    assert len({len(line) for line in lines}) == 1


def test_command_on_files(command, tmp_path: Path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(HEAD + "rows: [{method: M, base: 60.00, inc: 30.00, all: 50.07}]\n")
    bad.write_text(HEAD + "rows: [{method: M, base: 60.00, inc: 30.00, all: 50.70}]\n")
    code, out, _ = command("published", "lint", good, "--strict")
    assert (code, out.count("\n| ")) == (0, 2)
    assert "0 of 1 rows flagged." in out
    code, out, _ = command("published", "lint", good, bad, "--strict")
    assert code == 1
    assert (
        "- bad: M, B, ade20k-100-50: base and inc make 50.07 of 151 classes or 50.00 of 150; printed is 50.70." in out
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{method: M, all: 150.0}]", "rows 1 (M) is not valid: 'all' (it is 150.0)"),
        ("rows: [{method: M, all: 15.0, scenario: ade20k-100-5O}]", "There is no scenario named 'ade20k-100-5O'"),
    ],
)
def test_command_on_a_bad_file(command, tmp_path: Path, text: str, message: str):
    (tmp_path / "mine.yaml").write_text(HEAD + text)
    code, out, err = command("published", "lint", tmp_path / "mine.yaml")
    assert (code, out) == (2, "")
    assert message in err
    assert command("published", "lint", tmp_path / "none.yaml")[0] == 2


def test_the_page_shows_the_table_as_printed_today():
    text, _ = linter.lint()
    assert text in (ROOT / "docs" / "published.md").read_text(encoding="utf-8"), "paste `cssbench published lint` there"
