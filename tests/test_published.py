"""Published numbers: digit by digit those of the transcriptions, and one clear error for each mistake in a row."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from cssbench import scenario
from cssbench.errors import DataError
from cssbench.protocol import protocols
from cssbench.reports import literature
from cssbench.reports.literature import Row, rows

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"
COUNTS = {
    "dkd_readme": 6, "mib_repo": 18, "rcil_logs": 2, "rcil_readme": 16, "reminder_readme": 18, "reproductions": 9,
    "ssul_readme": 16, "zhang_thesis": 26,
}  # fmt: skip


def reference(name: str) -> Path:
    path = REFERENCE / name
    if not path.is_file():
        pytest.skip(f"no transcription at {path}")
    return path


def decimals(value: Any) -> Iterator[str]:
    """Every decimal below `value`, as printed."""
    if isinstance(value, Decimal):
        yield str(value)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from decimals(item)


def numbers(row: Row) -> tuple[str | None, ...]:
    return tuple(None if v is None else str(v) for v in (row.base, row.inc, row.all, row.avg))


# What is shipped ------------------------------------------------------------------------------------------------------


def test_every_file_of_the_checkout_is_read():
    found = literature.shipped()
    assert Counter(row.file for row in found.rows) == COUNTS
    stems = {path.stem for path in (ROOT / "reports" / "published").iterdir()}
    assert stems == {row.file for row in (*found.rows, *found.forgetting, *found.tables)}


def test_a_number_stands_as_printed():
    (row,) = rows("ade20k-100-50", method="SegViT-CL")
    assert numbers(row) == ("53.64", "40.00", "49.09", "46.82")
    assert (row.file, row.year, row.mode, row.protocol) == ("zhang_thesis", 2023, "overlapped", None)
    assert row.reduction == literature.Reduction(base=Decimal("0.5"), inc=Decimal("5.6"), all=Decimal("2.2"))


def test_rows_agree_with_every_argument():
    assert len(rows()) == sum(COUNTS.values())
    assert {row.file for row in rows("ade20k-50-50", method="joint")} == {"mib_repo", "reminder_readme"}
    assert {row.method for row in rows(protocol="dkd@1")} == {"DKD", "DKD-M"}
    assert [row.oracle for row in rows("ade20k-100-10", backbone="DeepLabV3-ViT-B")] == [False, False, False, True]
    assert {row.file for row in rows(mode="partitioned")} == {"mib_repo"}
    assert rows("ade20k-100-50", method="no such method") == ()


def test_scenarios_and_claimed_protocols_exist():
    for row in rows():
        assert row.scenario in scenario.names(), row
        assert row.protocol is None or row.protocol in protocols(), row


def test_recalled_numbers_are_not_in():
    assert not {"Incrementer", "CoMFormer", "EWF", "MicroSeg", "ECLIPSE"} & {row.method for row in rows()}
    recalled = {"14.89", "13.61", "5.66", "18.02", "18.75"}  # PLOP, MiB, SSUL of [recalled]
    assert not recalled & {value for row in rows() for value in numbers(row)}


def test_committed_files_are_what_the_transcription_makes():
    made = runpy.run_path(str(ROOT / "bench" / "paper_numbers.py"))["convert"](reference("paper_numbers.yaml"))
    assert sorted(made) == ["segmenter.yaml", "segvit_manuscript.yaml", "zhang_thesis.yaml", "zhang_thesis_dense.yaml"]
    for name, text in made.items():
        assert (ROOT / "reports" / "published" / name).read_text(encoding="utf-8") == text, name


def test_no_number_of_the_papers_was_lost():
    """Independent of the conversion: every decimal of every table, counted."""
    tables = yaml.load(reference("paper_numbers.yaml").read_text(encoding="utf-8"), literature.Loader)
    for name in ("relative_savings_claims", "text_only"):  # words
        del tables[name]
    for row in tables["nrd_chapter_3_selected"]:
        del row["table"]  # a name that reads like a number
    found = literature.shipped()
    kept = [row.model_dump() for row in (*found.rows, *found.forgetting, *found.tables)]
    assert Counter(decimals(tables)) - Counter(decimals(kept)) == Counter()


def test_rows_of_the_survey_are_all_there():
    """baselines.md, section 9: every number of its table stands in a row of that scenario, and the triples together."""
    text = reference("baselines.md").read_text(encoding="utf-8").split("## 9.")[1].split("[recalled], not sourced")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\|(?! method|-)", line)]
    assert len(lines) == 18
    for _, *cells, _ in lines:
        for short, cell in zip(("100-50", "100-10", "50-50", "100-5"), cells, strict=True):
            printed = [numbers(row) + tuple(map(str, row.groups)) for row in rows(f"ade20k-{short}")]
            singles = {value for row in printed for value in row}
            assert set(re.findall(r"\d+\.\d+", cell)) <= singles, cell
            for triple in re.findall(r"(?<![\d.])(\d+\.\d+)/(\d+\.\d+)/(\d+\.\d+)(?! →)", cell):
                assert triple in {row[:3] for row in printed}, cell


def test_table_4_12_is_consistent():
    table = {row.group: row for row in literature.shipped().forgetting}
    mean, groups = table.pop("mean"), list(table.values())
    assert len(groups) == 5
    for row in (mean, *groups):
        assert abs(row.first - row.last - row.forgetting) <= Decimal("0.015")
    for name in ("first", "last", "forgetting"):
        values = [float(getattr(row, name)) for row in groups]
        assert sum(values) / 5 == pytest.approx(float(getattr(mean, name)), abs=0.0101)
    assert mean.last == rows("ade20k-100-10", method="SegViT-CL")[0].inc


def test_bounds_stay_bounds():
    values = [row.values["gflops"] for row in literature.shipped().tables if "gflops" in row.values]
    assert ">400" in values
    assert all(isinstance(v, Decimal) or re.fullmatch(r">\d+", v) for v in values)


# What is refused ------------------------------------------------------------------------------------------------------

GOOD = "{paper: P, year: 2020, source: s, method: M, backbone: B, scenario: ade20k-100-50, mode: overlapped, all: 1.0}"
BAD = {
    "no file": (None, "cannot be read"),
    "no YAML": ("rows: [", "is not valid YAML"),
    "no mapping": ("- 1", "must be a mapping"),
    "nothing in it": ("defaults: {year: 2020}", "must be a mapping with one or more of rows"),
    "unknown section": (f"rows: [{GOOD}]\nrow: []", "must be a mapping with one or more of rows"),
    "no list": ("rows: {a: 1}", "must be a list of rows"),
    "no row": ("rows: [MiB]", "rows 1 must be a mapping"),
    "unknown key": (f"rows: [{GOOD.replace('all:', 'al:')}]", r"rows 1 \(M\).*unknown key 'al' \(did you mean 'all'"),
    "missing key": (f"rows: [{GOOD.replace('year: 2020, ', '')}]", "'year' is missing"),
    "fraction for percent, lost point": (f"rows: [{GOOD.replace('1.0', '3279')}]", "'all' .it is 3279.*less than or"),
    "negative": (f"rows: [{GOOD.replace('1.0', '-0.1')}]", r"'all' \(it is -0.1\)"),
    "not finite": (f"rows: [{GOOD.replace('1.0', '.nan')}]", "'.nan' is no number"),
    "word for a number": (f"rows: [{GOOD.replace('1.0', 'high')}]", "'all'.*it is 'high'"),
    "no number": (f"rows: [{GOOD.replace(', all: 1.0', '')}]", "give at least one of base, inc, all, avg"),
    "mode": (f"rows: [{GOOD.replace('overlapped', 'overlap')}]", "'mode'.*overlapped.*disjoint"),
    "protocol": (f"rows: [{GOOD.replace('all:', 'protocol: plop, all:')}]", "'protocol'"),
    "key twice": (f"rows: [{GOOD.replace('all:', 'all: 2.0, all:')}]", "'all' stands twice"),
    "row twice": (f"rows:\n  - {GOOD}\n  - {GOOD.replace('1.0', '2.0')}", "rows 2 and an earlier one are of"),
    "groups": (f"rows: [{GOOD.replace('all:', 'base: 2.0, groups: [3.0, 1.0], all:')}]", "the first of groups"),
    "no value": ("tables: [{paper: P, year: 2020, source: s, table: '1', setting: {}, values: {}}]", "'values'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_error(tmp_path: Path, case: str):
    text, message = BAD[case]
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        literature.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Decimal" not in str(caught.value)


def test_defaults_hold_unless_a_row_says_otherwise(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "defaults: {paper: P, year: 2020, source: s, backbone: B, mode: overlapped, method: M, scenario: s}\n"
        "rows: [{all: 40.00}, {all: 41, mode: disjoint}]\n"
    )
    first, second = literature.read(path).rows
    assert (first.file, first.mode, str(first.all)) == ("mine", "overlapped", "40.00")
    assert (second.mode, str(second.all)) == ("disjoint", "41")
