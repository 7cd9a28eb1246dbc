"""Methods by scenarios (thesis Table 4.11), with published rows beside those of the report, by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest
from report_runs import (
    forgetful,
    grid,
    joint,
    learner,
    reordered,
    score,
)

from cssbench.reports import formats, forms, frames, literature, overview
from cssbench.reports import html as page
from cssbench.reports.literature import Forgetting, Published, Row

# Thesis Table 4.11 ------------------------------------------------------------------------------------------------


def test_methods_by_scenarios(tmp_path):
    scenario = "toy-1-1-1"
    runs = [learner(tmp_path / "a"), forgetful(tmp_path / "b"), learner(tmp_path / "c", scenario=scenario)]
    runs += [learner(tmp_path / "d", scenario=scenario, mode="disjoint"), joint(tmp_path / "j")]
    shown, other = overview.overview_tables(score(*runs))
    names, *rows = grid(formats.markdown(shown))
    assert names[2:] == [f"{name}: {mean}" for name in ("toy-2-1", scenario) for mean in frames.SUMMARY]
    assert rows == [
        ["finetune (tiny)", "1†", *(mine := ["75.00 (▼ 20.00, 21.1 %)", "66.67 (▼ 24.24, 26.7 %)"]),
         "72.22 (▼ 21.41, 22.9 %)", "86.11", *mine, "72.22 (▼ 21.41, 22.9 %)", "86.11"],
        ["worse (tiny)", "1†", "55.00 (▼ 40.00, 42.1 %)", "52.63 (▼ 38.28, 42.1 %)", "54.21 (▼ 39.43, 42.1 %)", "77.11",
         "", "", "", ""],
        ["finetune (oracle) (tiny)", "1†", "95.00", "90.91", "93.64", "–", "95.00", "90.91", "93.64", "–"],
    ]  # fmt: skip
    assert shown.kinds == ("", "", "oracle")
    assert "disjoint" in other.caption  # another mode is another table
    assert "published" not in " ".join(shown.kinds)  # there are none of these scenarios


def test_two_recipes_of_one_method_are_two_rows(tmp_path):
    ones = score(learner(tmp_path / "a"), learner(tmp_path / "b", evaluate={"samples": 3}))
    (table,) = overview.overview_tables(ones)
    assert [cells[0].text for _, cells in table.rows] == ["finetune: a", "finetune: b"]


def test_mean_over_class_orders_holds_methods_that_took_each(tmp_path):
    runs = [learner(tmp_path / "a"), reordered(tmp_path / "b"), forgetful(tmp_path / "c"), joint(tmp_path / "j")]
    *apart, over = overview.overview_tables(score(*runs))
    assert len(apart) == 2
    assert "mean over 2 class orders" in over.caption
    assert [cells[0].text for _, cells in over.rows] == ["finetune", "finetune (oracle)"]  # `worse` took one alone
    assert [cell.text for cell in over.rows[0][1][1:]] == [
        "2",
        "75.00 ± 0.00",
        "66.67 ± 0.00",
        "72.22 ± 0.00",
        "86.11 ± 0.00",
    ]
    # The oracle is one run, whatever it is scored with: (0.9 + 1) / 2 in one order, (0.9 + 10/11) / 2 in the other.
    assert [cell.text for cell in over.rows[1][1][1:3]] == ["1†", "92.73"]


PRINTED = {"paper": "Somebody", "year": 2020, "source": "table 1", "backbone": "R101", "mode": "overlapped"}


def printed(method: str, base: str, inc: str, all_: str, **more) -> Row:
    numbers = {"base": Decimal(base), "inc": Decimal(inc), "all": Decimal(all_)}
    return Row(**({"file": "some", "method": method, "scenario": "ade20k-100-50"} | PRINTED | numbers | more))


@pytest.fixture
def published(monkeypatch):
    """Three rows of 100-50: 150 classes for the first and the joint one, and one that fits neither convention."""
    rows = (
        printed("MiB", "40.00", "10.00", "30.00", protocol="mmseg150@1"),
        printed("joint", "50.00", "20.00", "40.00", protocol="mmseg150@1", oracle=True),
        printed("PLOP", "42.00", "12.00", "33.33", protocol="plop@1", file="other", note="from a scan"),
    )
    forgot = Forgetting(
        method="MiB", scenario="ade20k-100-50", group="3-3", first="30.0", last="29.5", forgetting="0.5", **PRINTED
    )
    monkeypatch.setattr(literature, "shipped", lambda: Published(rows, (forgot,)))
    overview._verdicts.cache_clear()
    yield
    overview._verdicts.cache_clear()


def test_published_rows_stand_apart_with_source_and_protocol(tmp_path, published):
    runs = [learner(tmp_path / "a", scenario="ade20k-100-50"), learner(tmp_path / "b", scenario="toy-2-1")]
    runs += [joint(tmp_path / "j")]
    (table,) = overview.overview_tables(score(*runs))
    assert table.kinds == ("", "oracle", "published start", "published oracle", "published start")
    rows = [[f"{c.text}|{c.under}" if c.under else c.text for c in cells] for _, cells in table.rows]
    assert [line[2] for line in rows] == [
        "this report|mmseg150@1", "this report|mmseg150@1", "Somebody 2020|mmseg150@1; fits 150",
        "Somebody 2020|mmseg150@1; fits 150", "Somebody 2020|plop@1; fits neither",
    ]  # fmt: skip
    assert rows[2] == ["MiB|R101", "", "Somebody 2020|mmseg150@1; fits 150", "40.00|▼ 10.00, 20.0 %",
                       "10.00|▼ 10.00, 50.0 %", "30.00|▼ 10.00, 25.0 %", "–", "", "", "", ""]  # fmt: skip
    assert rows[4][0] == "PLOP ‡|R101"
    assert rows[4][3] == "42.00"  # no joint row of its own source: no drop
    assert "Another protocol than that of this table, or one that is not stated, is not comparable" in " ".join(
        table.notes
    )
    (remark,) = table.remarks
    assert remark.startswith(
        "‡ other: PLOP, R101, ade20k-100-50: base and inc make 32.07 of 151 classes or 32.00 of 150"
    )
    assert remark.endswith("from a scan.")


def test_published_rows_stand_beside_no_other_scenario_or_mode(tmp_path, published):
    for name, changes in (("a", {}), ("b", {"scenario": "ade20k-100-50", "mode": "disjoint"})):
        (table,) = overview.overview_tables(score(learner(tmp_path / name, **changes)))
        assert table.kinds == ("",)


def test_published_first_and_last(tmp_path, published):
    table = forms.first_last_table(score(learner(tmp_path / "a", scenario="ade20k-100-50")))
    assert table.kinds == ("", "", "", "published start", "published", "published")
    assert [cell.text for cell in table.rows[3][1]] == ["MiB, R101", "first time", "–", "30.0", "–"]
    assert table.rows[3][1][0].under == "Somebody 2020, protocol not stated"
    other = forms.first_last_table(score(learner(tmp_path / "b", scenario="ade20k-100-50", mode="disjoint")))
    assert "published" not in " ".join(other.kinds)


@pytest.mark.usefixtures("_drawn_only")
def test_published_rows_in_colour(tmp_path, published):
    runs = [learner(tmp_path / "a", scenario="ade20k-100-50"), joint(tmp_path / "j")]
    text = page.write(runs, tmp_path / "out", ["mmseg150@1"])[0].read_text(encoding="utf-8")
    assert '<tr class="published start"><th scope="row">MiB<small>R101</small></th>' in text
    assert '<th scope="col" rowspan="2" class="low">method</th>' in text  # the first column is never put aside
    assert "tr.published > * { color: var(--link); }" in text
    latex = (tmp_path / "out" / "overview.mmseg150@1.tex").read_text(encoding="utf-8")
    assert r"\textcolor[HTML]{0B5CAD}{40.00 {\scriptsize ($\blacktriangledown$ 10.00, 20.0 \%)}}" in latex


def test_shipped_rows_stand_beside_ade20k(tmp_path):
    (table,) = overview.overview_tables(score(learner(tmp_path / "a", scenario="ade20k-100-50")))
    rows = {cells[0].text: [cell.text for cell in cells[3:]] for _, cells in table.rows if "Zhang" in cells[2].text}
    assert rows["SegViT-CL ‡"] == ["53.64", "40.00", "49.09", "46.82"]
    (cells,) = [cells for _, cells in table.rows if cells[0].text == "SegViT-CL ‡"]
    assert [cell.under for cell in cells[3:]] == ["▼ 0.47, 0.9 %", "▼ 5.60, 12.3 %", "▼ 2.19, 4.3 %", ""]
