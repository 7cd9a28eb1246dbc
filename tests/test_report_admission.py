"""What must not enter a table, or share one, is refused with the difference named; or printed, and labelled."""

from __future__ import annotations

import json

import numpy as np
import pytest
from report_runs import IDS, JOINT, add_samples, forgetful, joint, learner, make, other_seed, score

from cssbench.errors import RunError
from cssbench.reports import admission, gallery, plots, scored, tables
from cssbench.reports import html as page

WIDE, NARROW = ({"name": "tiny", "backbone": {"width": w}, "head": h} for w, h in ((64, "linear"), (32, "linear")))
OTHER_HEAD = {"name": "tiny", "backbone": {"width": 64}, "head": "masks"}


def models(path, one, other):
    return [learner(path / "a", model=one), learner(path / "b", method="other", model=other)]


def test_another_backbone_is_refused_and_named(tmp_path):
    runs = models(tmp_path, WIDE, NARROW)
    with pytest.raises(RunError, match=r"must not stand in one table.*model\.backbone\.width: 64 in a, 32 in b"):
        tables.write(runs, tmp_path / "out", IDS)
    assert not (tmp_path / "out").exists()


def test_another_backbone_of_the_oracle_is_refused(tmp_path):
    runs = [learner(tmp_path / "a", model=WIDE), joint(tmp_path / "j", model=NARROW)]
    with pytest.raises(RunError, match=r"model\.backbone\.width: 64 in a, 32 in its oracle j"):
        tables.write(runs, tmp_path / "out", IDS)


def test_a_head_belongs_to_the_method(tmp_path):
    runs = [*models(tmp_path, WIDE, OTHER_HEAD), joint(tmp_path / "j", model=WIDE)]
    ones = admission.score_all(runs, ["mmseg150@1"])["mmseg150@1"]
    oracles = [scored.own_oracle(one, ones) for one in ones]
    assert [one and one.label for one in oracles] == ["j", None, None]  # an oracle of another head is none


@pytest.mark.parametrize(
    ("evaluate", "named"),
    [({"short_side": 256}, "full-size inference"), ({"crop": 256}, "centre crop"), ({"inference": "slide"}, "slide")],
)
def test_another_inference_is_refused(tmp_path, evaluate, named):
    runs = [learner(tmp_path / "a"), learner(tmp_path / "b", evaluate=evaluate)]
    with pytest.raises(RunError, match=named):
        tables.write(runs, tmp_path / "out", IDS)


def test_what_a_protocol_does_not_read_may_differ(tmp_path):
    runs = [learner(tmp_path / "a"), learner(tmp_path / "b", evaluate={"crop": 256})]
    assert tables.write(runs, tmp_path / "out", ["mmseg150@1"])


def test_scenarios_of_one_table_must_agree_too(tmp_path):
    runs = [learner(tmp_path / "a", model=WIDE), learner(tmp_path / "b", scenario="toy-other", model=NARROW)]
    with pytest.raises(RunError, match=r"model\.backbone\.width"):
        tables.write(runs, tmp_path / "out", IDS)
    assert tables.write([runs[0], learner(tmp_path / "c", scenario="toy-other", model=WIDE)], tmp_path / "out", IDS)


def test_the_mix_is_in_every_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "render", lambda draw: (draw(plots.LIGHT), {"svg": b"", "pdf": b"", "png": b""}))
    runs = models(tmp_path, WIDE, NARROW)
    written = page.write(runs, tmp_path / "out", ["mmseg150@1"], allow_mixed=True)
    for path in written:
        if path.suffix in (".md", ".tex") and path.name.split(".")[0] not in ("tables", "protocols"):
            text = path.read_text(encoding="utf-8").replace("\\", "").replace("{[}", "[")
            several = path.name.startswith("forgetting") and path.suffix == ".tex"  # one run per table
            assert ("MIXED" in text and "model.backbone.width: 64 in a, 32 in b" in text) or several, path.name
            assert "**" not in text
            assert "textbf" not in text
    assert "Mixed: the rows below are not comparable" in written[0].read_text(encoding="utf-8")


def test_nothing_is_bold_in_a_mixed_table(tmp_path):
    runs = [learner(tmp_path / "a0", model=WIDE), other_seed(tmp_path / "a1", model=WIDE)]
    runs += [forgetful(tmp_path / f"b{s}", model=WIDE, seed=s) for s in (0, 1)]
    tables.write(runs, tmp_path / "alike", ["mmseg150@1"])
    runs += [forgetful(tmp_path / "c", model=NARROW)]
    tables.write(runs, tmp_path / "mixed", ["mmseg150@1"], allow_mixed=True)
    for kind in ("summary", "overview"):
        alike, mixed = (
            (tmp_path / n / f"{kind}.mmseg150@1.md").read_text(encoding="utf-8") for n in ("alike", "mixed")
        )
        assert "**77.50 ± 3.54" in alike
        assert "**" not in mixed
        assert "Paired" not in mixed


def test_an_oracle_that_differs_is_nobodys_own(tmp_path):
    runs = [learner(tmp_path / "a"), joint(tmp_path / "j", evaluate={"short_side": 256})]
    ones = score(*runs)
    assert scored.own_oracle(ones[0], ones) is None
    ones = score(*runs, name="plop@1")  # which reads the crop, where they agree
    assert scored.own_oracle(ones[0], ones).label == "j"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"evaluate": {"limit": 3}}, "debug-limited: evaluated on the first 3 images only"),
        ({"provenance": {"debug_limited": True}}, "debug-limited"),
    ],
)
def test_a_debug_run_enters_no_table_silently(tmp_path, changes, named):
    run = learner(tmp_path / "a", **changes)
    for write in (tables.write, page.write, gallery.write):
        with pytest.raises(RunError, match=f"must not stand in a table: {named}"):
            write([run], tmp_path / "out", IDS)
    tables.write([run], tmp_path / "out", IDS, allow_mixed=True)
    text = (tmp_path / "out" / "summary.plop@1.md").read_text(encoding="utf-8")
    assert f"Printed although not fit for a table: a, {named}" in text


def test_an_edited_record_enters_no_table_silently(tmp_path):
    run = learner(tmp_path / "a")
    path = run.step_folder(1) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"iterations": 9}))
    with pytest.raises(RunError, match=r"record\.json was edited"):
        tables.write([run], tmp_path / "out", IDS)


def test_changed_matrices_are_refused_whatever_is_allowed(tmp_path):
    run = learner(tmp_path / "a")
    np.savez(run.step_folder(0) / "matrices.npz", **{"full.foreground": np.array(JOINT)})
    with pytest.raises(RunError, match="does not match its checksum"):
        tables.write([run], tmp_path / "out", IDS, allow_mixed=True)


def test_an_unfinished_run_needs_no_permission(tmp_path):
    run = make(tmp_path / "part", [{"": [[0, 0, 0, 0], [0, 9, 1, 0], [0, 0, 10, 0], [0, 5, 5, 0]]}])
    tables.write([run], tmp_path / "out", ["plop@1"])
    assert "part (1 of 2 steps)" in (tmp_path / "out" / "summary.plop@1.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "overview.plop@1.md").exists()  # it stands in the table of its setting alone


def imported(path, ious, **changes):
    run = make(path, [], keys=(), **changes)
    run.provenance["imported"] = {"format": "plop-csv"}
    (path / "config.toml").unlink()
    run.create()
    for index, step in enumerate(ious):
        run.write_record(index, {"imported": {"protocol": "plop@1", "ious": step}})
    return scored.RunFolder.read(path)


def test_an_imported_log_stands_beside_our_runs_and_is_marked(tmp_path):
    ours = learner(tmp_path / "ours", provenance={"data": {"identity": {"train": "x"}, "evaluated_sha256": "y"}})
    steps = [{"0": 0.5, "1": 0.9, "2": 0.7}, {"0": 0.3, "1": 0.6, "2": 0.5, "3": 0.2}]
    theirs = imported(tmp_path / "theirs", steps, model="unknown")
    found = admission.score_all([theirs, ours], ["mmseg150@1", "plop@1"])
    assert [one.label for one in found["mmseg150@1"]] == ["ours"]
    (members,) = scored.by_setting(found["plop@1"]).values()
    assert [one.shown_as for one in members] == ["ours", "theirs (imported)"]
    assert members[1].scores[-1]["base"] == pytest.approx((0.3 + 0.6 + 0.5) / 3)
    assert members[1].class_forgetting == pytest.approx({1: 0.3, 2: 0.2})
    tables.write([theirs, ours], tmp_path / "out", ["plop@1"])
    text = (tmp_path / "out" / "summary.plop@1.md").read_text(encoding="utf-8")
    assert "| theirs (imported) " in text


def test_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from cssbench.cli import app

    runs = [str(run.path) for run in models(tmp_path, WIDE, NARROW)]
    words = ["report", *runs, "--out", str(tmp_path / "out"), "--kind", "tables"]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, RunError)
    assert CliRunner().invoke(app, [*words, "--allow-mixed"]).exit_code == 0


def test_equal_titles_do_not_hide_other_data(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "render", lambda draw: (draw(plots.LIGHT), {"svg": b"", "pdf": b"", "png": b""}))
    runs = [learner(tmp_path / n, provenance={"data": {"identity": {"train": n}}}) for n in ("x", "y")]
    add_samples(runs[0])
    first, second = scored.by_setting(score(*runs))
    assert first.title == second.title
    assert first.facts != second.facts  # which stand under the title, and in every caption
    assert len(page.write(runs, tmp_path / "out", ["plop@1"])) == len(
        set(page.write(runs, tmp_path / "out", ["plop@1"]))
    )
