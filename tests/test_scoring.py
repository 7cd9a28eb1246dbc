"""Scores of made-up run folders, by hand: from matrices, from imported logs, and through `cssbench rescore`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from fabricated import fabricate, fabricate_imported, fabricate_oracle

from cssbench import protocol, scoring
from cssbench.errors import RunError

MMSEG, PLOP = protocol.get("mmseg150@1"), protocol.get("plop@1")
LOG = [{"0": 0.5, "1": 0.8, "2": None}, {"0": 0.25, "1": 0.4, "2": None, "3": 0.6}]


def test_ious_and_scores_of_each_step(tmp_path):
    run = fabricate(tmp_path / "a")
    first, last = run.records()
    # step 0, foreground, void and class 3 left out: GT 10, 10; PRED 9, 11
    assert scoring.step_ious(run, first, MMSEG) == pytest.approx({1: 9 / 10, 2: 10 / 11})
    # step 1: GT 10 each; PRED 5, 10, 15
    assert scoring.step_ious(run, last, MMSEG) == pytest.approx({1: 5 / 10, 2: 10 / 10, 3: 10 / 15})
    scores = scoring.run_scores(run, MMSEG)
    assert scores == [scoring.step_scores(run, record, MMSEG) for record in (first, last)]
    assert scores[1]["base"] == pytest.approx(0.75)
    assert scores[1]["incremental"] == pytest.approx(2 / 3)
    # step 1 under plop, void is background: GT 4, 10, 10, 10; PRED 3, 6, 10, 15
    ious = {0: 2 / 5, 1: 5 / 11, 2: 10 / 10, 3: 9 / 16}
    assert scoring.step_ious(run, last, PLOP) == pytest.approx(ious)


def test_an_unfinished_run_is_scored_as_far_as_it_is(tmp_path):
    run = fabricate(tmp_path / "a", steps=["0"])
    assert [set(s) for s in scoring.run_scores(run, MMSEG)] == [{"base", "incremental", "all", "group0"}]
    assert not scoring.can_score(fabricate(tmp_path / "none", steps=[]), MMSEG)


def test_an_oracle_is_scored_by_the_groups_of_others(tmp_path):
    run = fabricate_oracle(tmp_path / "joint")
    (record,) = run.records()
    own = scoring.step_scores(run, record, MMSEG)
    assert (own["base"], own["incremental"]) == (own["all"], None)
    other = scoring.step_scores(run, record, MMSEG, [[3], [1, 2]])
    assert other["base"] == pytest.approx(10 / 11)  # class 3: GT 10, PRED 11
    assert other["all"] == own["all"]


def test_what_the_outputs_of_earlier_steps_alone_would_score(tmp_path):
    run = fabricate(tmp_path / "a")
    first, last = run.records()
    # upto0, void and class 3 left out: GT 10, 10; PRED 6, 14
    assert scoring.alone_scores(run, last, MMSEG) == [pytest.approx((6 / 10 + 10 / 14) / 2)]
    assert scoring.alone_scores(run, first, MMSEG) == []


def test_each_group_alone_has_a_matrix_of_its_own(tmp_path):
    later = {"full.foreground.upto1": [[0, 3, 1, 0], [0, 6, 4, 0], [0, 5, 5, 0], [0, 6, 4, 0]]}
    run = fabricate(tmp_path / "a", groups=[[1], [2], [3]], steps=["0", "0", "1"], matrices=later)
    # group 0 = class 1 by upto0, the only row: GT 10, PRED 6; group 1 = class 2 by upto1: GT 10, PRED 4 + 5
    assert scoring.alone_scores(run, run.records()[2], MMSEG) == pytest.approx([6 / 10, 5 / 14])


def test_a_matrix_that_was_not_kept(tmp_path):
    run = fabricate(tmp_path / "a", geometries=["full"])
    assert scoring.can_score(run, MMSEG)
    assert not scoring.can_score(run, PLOP)
    with pytest.raises(RunError, match=r"kept no matrix 'crop.all', which plop@1 reads; it has full.all, full.fore"):
        scoring.run_scores(run, PLOP)


def test_an_imported_log_supports_its_own_protocol_alone(tmp_path):
    run = fabricate_imported(tmp_path / "log", LOG)
    assert scoring.is_imported(run)
    assert scoring.can_score(run, PLOP)
    first, last = scoring.run_scores(run, PLOP)
    assert first["base"] == first["all"] == pytest.approx((0.5 + 0.8) / 2)
    assert (last["base"], last["incremental"]) == pytest.approx(((0.25 + 0.4) / 2, 0.6))
    assert last["all"] == pytest.approx((0.25 + 0.4 + 0.6) / 3)
    assert scoring.alone_scores(run, run.records()[1], PLOP) == [None]
    assert not scoring.can_score(run, MMSEG)
    with pytest.raises(RunError, match=r"supports the protocol plop@1 only: mmseg150@1 needs confusion matrices"):
        scoring.run_scores(run, MMSEG)


@pytest.mark.parametrize("ious", [{"0": 1.5}, {"0": -0.1}, {"0": "much"}, {"sky": 0.5}, [0.5], None])
def test_a_damaged_import_is_refused(tmp_path, ious):
    run = fabricate_imported(tmp_path / "log", [ious])
    with pytest.raises(RunError, match="`imported` must hold a protocol id"):
        scoring.run_scores(run, PLOP)


# cssbench rescore -----------------------------------------------------------------------------------------------------


def test_rescore_prints_every_step_class_and_measure(tmp_path, command):
    run = fabricate(tmp_path / "a")
    code, out, err = command("rescore", run.path, "--protocol", "mmseg150@1")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert ["1", "75.00", "66.67", "72.22", "81.34"] in lines  # avg: (90.45 + 72.22) / 2
    assert ["1", "sky", "0", "90.00", "50.00"] in lines
    assert ["3", "car", "1", "-", "66.67"] in lines
    # group 0: first 90.45, last 75; alone 65.71
    assert ["0", "90.45", "75.00", "15.45", "15.45", "24.74", "-9.29"] in lines
    assert "BWT -15.45 = mean over groups" in out
    assert "avg = mean over steps t (t = 0 included)" in out


def test_rescore_as_json(tmp_path, command):
    run = fabricate(tmp_path / "a")
    code, out, _ = command("rescore", run.path, "--protocol", "plop", "--json")
    content = json.loads(out)
    assert (code, content["protocol"], content["background_threshold"]) == (0, "plop@1", 0.5)
    last = content["steps"][1]
    assert last["ious"] == pytest.approx({"0": 2 / 5, "1": 5 / 11, "2": 1.0, "3": 9 / 16})
    assert last["all"] == pytest.approx((2 / 5 + 5 / 11 + 1 + 9 / 16) / 4)
    assert last["avg"] == pytest.approx((content["steps"][0]["all"] + last["all"]) / 2)
    assert last["groups"] == [last["base"], last["incremental"]]


def test_rescore_without_a_protocol_shows_all_that_the_run_supports(tmp_path, command):
    _, out, _ = command("rescore", fabricate(tmp_path / "a").path)
    assert all(name in out for name in protocol.protocols())
    _, out, _ = command("rescore", fabricate(tmp_path / "b", geometries=["full"]).path)
    assert "plop@1 cannot score it: it did not keep crop.all." in out
    code, out, _ = command("rescore", fabricate_imported(tmp_path / "log", LOG).path, "--json")
    scored = {name for name, means in json.loads(out)["protocols"].items() if means}
    assert (code, scored) == (0, {"plop@1"})


def test_rescore_refuses_what_it_cannot_trust_or_score(tmp_path, command):
    run = fabricate(tmp_path / "a", debug_limited=True)
    assert "Not for a table: debug-limited" in command("rescore", run.path)[2]
    (run.step_folder(1) / "matrices.npz").write_bytes(b"no")
    code, out, err = command("rescore", run.path, "--protocol", "mmseg150")
    assert (code, out) == (2, "")
    assert "matrices.npz is missing or does not match its checksum" in err
    code, _, err = command("rescore", fabricate(tmp_path / "none", steps=[]).path)
    assert (code, "has no finished step to score" in err) == (2, True)
    log = fabricate_imported(tmp_path / "log", LOG)
    code, _, err = command("rescore", log.path, "--protocol", "mib@1")
    assert (code, "supports the protocol plop@1 only" in err) == (2, True)


def test_status_of_an_imported_log(tmp_path, command):
    code, out, _ = command("status", fabricate_imported(tmp_path / "log", LOG).path)
    assert (code, "2 of 2 steps" in out, "mmseg150" in out) == (0, True, False)
    assert ["0", "-", "-", "-", "65.00", "65.00"] in [line.split() for line in out.splitlines()]


def test_rescore_needs_neither_torch_nor_the_data(tmp_path):
    run = fabricate(tmp_path / "a")
    code = (
        "import sys; from cssbench.cli import app\n"
        "for word in ('rescore', 'validate', 'compare'):\n"
        f"    try: app([word, {str(run.path)!r}])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
