"""Logs of the PLOP code family: what they say becomes a run, what they do not stays unknown, nonsense is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cssbench import imported, protocol, scoring
from cssbench.errors import DataError, RunError
from cssbench.metrics import continual
from cssbench.results import RunFolder, sha256
from cssbench.scenario import Scenario, from_dict, load
from cssbench.validate import problems

# Four classes learned in the order 3, 1 | 4 | 2; class 4 has no ground truth at step 1.
SCENE = from_dict("toy", {"dataset": "camvid", "classes": 4, "base": 2, "increment": 1, "order": [3, 1, 4, 2]})
STEP0 = ["0", "0.6", "0.4", "0.8", "x", "x", "0.6"]
STEP1 = ["1", "0.5", "0.3", "0.7", "X", "x", "0.5"]
STEP2 = ["2", "0.4", "0.2", "0.6", "0.1", "0.3", "0.32"]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(*lines: list[str]) -> Path:
        path = tmp_path / "2022_toy.csv"
        path.write_text("".join(",".join(line) + "\n" for line in lines))
        return path

    return call


def plop_scores(folder: RunFolder) -> list[scoring.Scores]:
    return scoring.run_scores(RunFolder.read(folder.path), protocol.get("plop@1"))


def changed(line: list[str], at: int, cell: str) -> list[str]:
    return [*line[:at], cell, *line[at:][1:]]


# What a log says ------------------------------------------------------------------------------------------------------


def test_columns_are_in_the_order_of_learning(write: Write):
    log = imported.read_plop_csv(write(STEP0, STEP1, STEP2), SCENE)
    assert log.steps == {
        0: {0: 0.6, 3: 0.4, 1: 0.8},
        1: {0: 0.5, 3: 0.3, 1: 0.7, 4: None},
        2: {0: 0.4, 3: 0.2, 1: 0.6, 4: 0.1, 2: 0.3},
    }
    assert (log.missing, log.finished) == ([], True)


def test_a_log_becomes_a_run(write: Write, tmp_path: Path):
    log = imported.read_plop_csv(write(STEP2, [], STEP0, STEP1), SCENE)  # any order of lines, empty ones too
    folder = imported.write_run(log, tmp_path / "run", "PLOP", "R101")
    first, second, third = plop_scores(folder)
    assert first == pytest.approx({"base": 0.6, "incremental": None, "all": 0.6, "group0": 0.6})
    assert second == pytest.approx({"base": 0.5, "incremental": None, "all": 0.5, "group0": 0.5, "group1": None})
    groups = {"group0": 0.4, "group1": 0.1, "group2": 0.3}
    assert third == pytest.approx({"base": 0.4, "incremental": 0.2, "all": 0.32} | groups)
    assert continual.average([first, second, third]) == pytest.approx((0.6 + 0.5 + 0.32) / 3)
    run = RunFolder.read(tmp_path / "run")
    assert run.finished
    assert problems(run) == []
    assert (run.config.method.name, run.config.model.name, run.config.scenario.mode) == ("PLOP", "R101", "overlapped")
    assert run.provenance["imported"] == {
        "format": "plop-csv", "file": "2022_toy.csv", "sha256": sha256(log.path), "missing_steps": [],
    }  # fmt: skip
    assert "2022_toy.csv" in run.config.note
    assert run.records()[1].content["imported"] == {
        "protocol": "plop@1", "ious": {"0": 0.5, "3": 0.3, "1": 0.7, "4": None},
    }  # fmt: skip
    assert {path.name for path in run.step_folder(0).iterdir()} == {"record.json"}


def test_an_imported_run_has_no_other_protocol(write: Write, tmp_path: Path):
    run = imported.write_run(imported.read_plop_csv(write(STEP0), SCENE), tmp_path / "run", "PLOP")
    assert not scoring.can_score(run, protocol.get("mmseg150@1"))
    with pytest.raises(RunError, match=r"supports the protocol plop@1 only"):
        scoring.run_scores(run, protocol.get("mmseg150@1"))


def test_an_edited_import_is_seen(write: Write, tmp_path: Path):
    run = imported.write_run(imported.read_plop_csv(write(STEP0, STEP1, STEP2), SCENE), tmp_path / "run", "PLOP")
    path = run.step_folder(2) / "record.json"
    path.write_text(path.read_text().replace('"0": 0.4,', '"0": 0.9,'))
    assert any("edited" in problem for problem in problems(RunFolder.read(tmp_path / "run")))


def test_class_names_come_with_the_scenario(write: Write, tmp_path: Path):
    scene = load("camvid-6-5")
    cells = ["0", *["0.5"] * 7, *["x"] * 5, "0.5"]
    imported.write_run(imported.read_plop_csv(write(cells), scene), tmp_path / "run", "PLOP")
    content = json.loads((tmp_path / "run" / "scenario.json").read_text())
    assert (len(content["classes"]), content["steps"][0]["new"]) == (11, [1, 2, 3, 4, 5, 6])


# What it does not say -------------------------------------------------------------------------------------------------


def test_a_missing_first_line_leaves_avg_unknown(command, write: Write, tmp_path: Path):
    toml = tmp_path / "toy.toml"
    toml.write_text('dataset = "camvid"\nclasses = 4\nbase = 2\nincrement = 1\norder = [3, 1, 4, 2]\n')
    words = ["import", "plop-csv", write(STEP1, STEP2), "--scenario", toml, "--out", tmp_path / "run"]
    code, out, _ = command(*words)
    assert code == 0
    assert "step 0: no line in the log" in out
    assert "step 2: base 40.00, incremental 20.00, all 32.00" in out
    assert "avg -" in out
    assert "No line for step 0: avg, and what was forgotten since, is unknown." in out
    run = RunFolder.read(tmp_path / "run")
    assert run.provenance["imported"]["missing_steps"] == [0]
    first = run.records()[0].content["imported"]
    assert (first["missing"], first["ious"]) == (True, {"0": None, "3": None, "1": None})
    assert continual.drop(continual.group_table(plop_scores(run)))[0] is None


def test_a_log_that_ends_early_is_an_unfinished_run(command, write: Write, tmp_path: Path):
    toml = tmp_path / "toy.toml"
    toml.write_text('dataset = "camvid"\nclasses = 4\nbase = 2\nincrement = 1\norder = [3, 1, 4, 2]\n')
    code, out, _ = command("import", "plop-csv", write(STEP0, STEP1), "--scenario", toml, "--out", tmp_path / "run")
    assert code == 0
    assert "The log ends before step 2" in out
    run = RunFolder.read(tmp_path / "run")
    assert (len(run.records()), run.finished, run.config.method.name) == (2, False, "2022_toy")


# What cannot be -------------------------------------------------------------------------------------------------------

BAD = {
    "empty": ([], "is empty"),
    "another number of classes": ([[*STEP0, "0.1"]], r"Line 1 .* has 8 cells. Scenario 'toy' needs 7"),
    "heading": ([["step", *STEP0[1:]]], "is of step 'step'"),
    "step beyond the scenario": ([changed(STEP2, 0, "3")], r"is of step '3'. Scenario 'toy' has steps 0 to 2"),
    "step twice": ([STEP0, STEP0], "Line 2 .* is a second line of step 0"),
    "unseen too early": ([STEP0, changed(STEP1, 4, "x")], "has position 3 as unseen, not seen"),
    "seen too early": ([changed(STEP0, 5, "0.2")], "has position 4 as seen, not unseen .1 such cells"),
    "no truth before it is seen": ([changed(STEP0, 5, "X")], "has position 4 as seen, not unseen"),
    "percent": ([changed(STEP0, 2, "40.0")], "holds '40.0' in column 3"),
    "negative": ([changed(STEP0, 2, "-0.1")], "holds '-0.1' in column 3"),
    "not a number": ([changed(STEP0, 2, "nan")], "holds 'nan' in column 3"),
    "word": ([changed(STEP0, 2, "-")], "holds '-' in column 3"),
    "no overall": ([changed(STEP0, 6, "x")], "holds 'x' in column 7"),
    "background ignored": ([changed(changed(STEP0, 1, "X"), 6, "0.6")], "has no IoU for the background"),
    "overall is another mean": ([STEP0, changed(STEP1, 6, "0.375")], "its 3 IoUs have a mean of 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_logs_are_one_clear_error(write: Write, case: str):
    lines, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        imported.read_plop_csv(write(*lines), SCENE)
    assert "2022_toy.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_overall_may_be_rounded_to_four_places(write: Write):
    line = ["0", "0.61", "0.41", "0.8", "x", "x", "0.6067"]  # mean 0.606667
    assert imported.read_plop_csv(write(line), SCENE).steps
    with pytest.raises(DataError, match="overall mIoU"):
        imported.read_plop_csv(write(changed(line, 6, "0.607")), SCENE)


def test_an_unreadable_file(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        imported.read_plop_csv(tmp_path / "none.csv", SCENE)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        imported.read_plop_csv(tmp_path / "binary.csv", SCENE)


def test_mistakes_on_the_command_line_leave_nothing(command, write: Write, tmp_path: Path):
    log, out = write(STEP0), tmp_path / "run"
    for words, message in (
        (["--scenario", "camvid-6-5"], "has 7 cells. Scenario 'camvid-6-5' needs 14"),
        (["--scenario", "camvid-6-6"], "no scenario named 'camvid-6-6'. Did you mean"),
        (["--scenario", "camvid-6-5", "--mode", "overlap"], "'mode'"),
    ):
        code, printed, err = command("import", "plop-csv", log, "--out", out, *words)
        assert (code, printed) == (2, "")
        assert message in err
        assert not out.exists()


def test_an_existing_run_is_left_alone(write: Write, tmp_path: Path):
    log = imported.read_plop_csv(write(STEP0), SCENE)
    imported.write_run(log, tmp_path / "run", "PLOP")
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(RunError, match="already holds a run"):
        imported.write_run(log, tmp_path / "run", "REMINDER")
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


# A real one -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rcil(shared_data: Path) -> Path:
    path = shared_data / "logs" / "rcil_ade_100-50.csv"
    if not path.is_file():
        pytest.skip(f"no log at {path}")
    return path


def test_the_log_of_rcil(rcil: Path, command, tmp_path: Path):
    words = ["--scenario", "ade20k-100-50", "--method", "RCIL", "--model", "DeepLabV3-R101", "--out", tmp_path / "run"]
    code, out, _ = command("import", "plop-csv", rcil, *words)
    assert code == 0
    assert "step 1: base 42.35, incremental 18.47, all 34.45" in out
    assert "avg 38.48" in out
    run = RunFolder.read(tmp_path / "run")
    with rcil.open() as file:
        overall = [float(line[-1]) for line in csv.reader(file)]
    assert [scores["all"] for scores in plop_scores(run)] == pytest.approx(overall, abs=1e-6)
    assert run.scenario["classes"][0] == "wall"


@pytest.mark.parametrize(
    ("scenario", "message"),
    [("ade20k-50-50", "at step 0 .* first 50 classes"), ("ade20k-100-10", "at step 1 .* first 110 classes")],
)
def test_the_log_of_rcil_is_of_no_other_scenario(rcil: Path, scenario: str, message: str):
    scene: Scenario = load(scenario)
    with pytest.raises(DataError, match=message):
        imported.read_plop_csv(rcil, scene)


def test_a_report_on_an_imported_run_alone(rcil: Path, command, tmp_path: Path):
    """Only the protocol of the log can be scored; the default protocols that it does not support are left out."""
    out = tmp_path / "run"
    assert command("import", "plop-csv", rcil, "--scenario", "ade20k-100-50", "--out", out)[0] == 0
    code, _, err = command("report", out, "--out", tmp_path / "report", "--kind", "tables")
    assert code == 0, err
    assert "42.35" in (tmp_path / "report" / "summary.plop@1.md").read_text()
    assert not list((tmp_path / "report").glob("*mmseg150*"))
