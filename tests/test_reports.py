"""Reports from fabricated run folders: three classes, two steps, numbers worked out by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from report_runs import (
    IDS,
    JOINT,
    LABEL,
    STEP0,
    STEP1,
    Reader,
    add_samples,
    joint,
    learner,
    make,
    reordered,
    row,
    score,
)

from cssbench import registry
from cssbench.errors import RunError
from cssbench.reports import entries, frames, plots, samples, scored, tables
from cssbench.reports import html as page
from cssbench.results import RunFolder

pytestmark = pytest.mark.usefixtures("_drawn_only")


# Frames ---------------------------------------------------------------------------------------------------------


def test_summary_by_hand(tmp_path):
    frame = frames.summary_frame(score(learner(tmp_path / "a"), joint(tmp_path / "j")))
    mine = row(frame, run="a")
    expected = {"base": 0.75, "incremental": 2 / 3, "all": 6.5 / 9, "avg": (1 + 6.5 / 9) / 2}
    best = {"base": 0.95, "incremental": 10 / 11, "all": (1.9 + 10 / 11) / 3}
    assert {k: mine[k] for k in expected} == pytest.approx(expected)
    for name, value in best.items():
        assert row(frame, run="j")[name] == pytest.approx(value)  # scored with the learner's groups
        assert mine[f"{name}_drop"] == pytest.approx(value - expected[name])
        assert mine[f"{name}_relative_drop"] == pytest.approx(1 - expected[name] / value)
    assert (mine["own_oracle"], mine["oracle"], mine["protocol"]) == ("j", False, "mmseg150@1")
    assert np.isnan(row(frame, run="j")["avg"])
    assert np.isnan(row(frame, run="j")["all_drop"])


def test_plop_counts_the_background(tmp_path):
    # Step 0: class 3 is background: truth 10, hits 0; columns 1, 2 hold 15, 15. Step 1: no background in the truth.
    steps = frames.steps_frame(score(learner(tmp_path / "a"), name="plop@1"))
    assert row(steps, step=0)["base"] == pytest.approx((0 + 10 / 15 + 10 / 15) / 3)
    assert row(steps, step=1)["base"] == pytest.approx(0.75)
    classes = frames.per_class_frame(score(learner(tmp_path / "b"), name="plop@1"))
    assert row(classes, name="background")["group"] == 0
    assert np.isnan(row(classes, name="background")["iou"])


def test_forgetting_by_hand(tmp_path):
    frame = frames.forgetting_frame(score(learner(tmp_path / "a"), joint(tmp_path / "j")))
    expected = {"first": 1, "last": 0.75, "drop": 0.25, "forgetting": 0.25}
    expected |= {"lost_to_parameters": 11 / 60, "lost_to_competition": 4 / 60}
    for group in ("0", "mean"):
        found = row(frame, group=group)
        assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert row(frame, group="mean")["bwt"] == pytest.approx(-0.25)
    assert row(frame, group="1")["last"] == pytest.approx(2 / 3)
    assert np.isnan(row(frame, group="1")["drop"])
    assert set(frame["run"]) == {"a"}  # an oracle has nothing to forget


def test_per_class(tmp_path):
    frame = frames.per_class_frame(score(learner(tmp_path / "a")))
    assert frame[["class", "name", "group"]].to_numpy().tolist() == [[1, "sky", 0], [2, "tree", 0], [3, "car", 1]]
    assert frame["iou"].tolist() == pytest.approx([0.5, 1, 2 / 3])


def test_without_matrices_of_earlier_outputs_the_parts_are_unknown(tmp_path):
    run = make(tmp_path / "a", [{"": STEP0}, {"": STEP1}])
    found = row(frames.forgetting_frame(score(run)), group="0")
    assert np.isnan(found["lost_to_parameters"])
    assert found["drop"] == pytest.approx(0.25)


# Settings and oracles -------------------------------------------------------------------------------------------


def test_oracle_must_be_of_the_same_model_and_data(tmp_path):
    other_model = joint(tmp_path / "model", model="huge")
    other_data = joint(tmp_path / "data", provenance={"data": {"identity": {"train": "x"}}})
    frame = frames.summary_frame(score(learner(tmp_path / "a"), other_model, other_data))
    assert frame.set_index("run")["own_oracle"].isna().all()
    assert len(scored.by_setting(score(learner(tmp_path / "b"), other_model, other_data))) == 2


def test_nearest_of_several_oracles(tmp_path):
    oracles = [joint(tmp_path / f"j{seed}", seed=seed) for seed in (0, 1, 2)]
    ones = score(learner(tmp_path / "a", seed=1), *oracles)
    oracle = scored.own_oracle(ones[0], ones)
    assert oracle is not None
    assert oracle.label == "j1"


@pytest.mark.parametrize(
    "changes",
    [{"mode": "disjoint"}, {"scenario": "toy-other"}, {"order": True}, {"evaluate": {"split": "test"}}],
)
def test_what_differs_never_shares_a_table(tmp_path, changes):
    other = reordered(tmp_path / "b") if "order" in changes else learner(tmp_path / "b", **changes)
    runs = [learner(tmp_path / "a"), other, joint(tmp_path / "j")]
    assert len(scored.by_setting(score(*runs))) == 2
    for path in tables.write(runs, tmp_path / "out", IDS):
        kind = path.name.split(".")[0]
        if path.suffix in (".md", ".tex") and kind in ("summary", "groups", "measures", "forgetting"):
            for table in path.read_text(encoding="utf-8").split("Protocol")[1:]:
                assert len(re.findall(r"^(?:\| )?(a|b) +[|&]", table, re.MULTILINE)) == 1, table


def test_page_has_a_table_per_setting_and_protocol(tmp_path):
    runs = [learner(tmp_path / "a"), learner(tmp_path / "b", mode="disjoint"), joint(tmp_path / "j")]
    text = Reader(page.write(runs, tmp_path / "out", IDS)[0].read_text(encoding="utf-8")).text
    assert text.count("Accuracy after the last step") == 4
    assert LABEL not in text


def test_joint_run_serves_every_setting(tmp_path):
    ones = score(learner(tmp_path / "a"), learner(tmp_path / "b", mode="disjoint"), joint(tmp_path / "j"))
    assert [[one.label for one in members] for members in scored.by_setting(ones).values()] == [["a", "j"], ["b", "j"]]


def test_equal_names_are_told_apart(tmp_path):
    runs = [learner(tmp_path / "x" / "run"), learner(tmp_path / "y" / "run"), learner(tmp_path / "z")]
    assert list(scored.labels(runs).values()) == ["x/run", "y/run", "z"]
    assert len(scored.unique([*runs, runs[0]])) == 3


# Unfinished, damaged, unsuitable ------------------------------------------------------------------------------------


def test_unfinished_run_is_labelled_and_not_compared(tmp_path):
    part = make(tmp_path / "part", [{"": STEP0}])
    ones = score(part, joint(tmp_path / "j"))
    mine = row(frames.summary_frame(ones), run="part")
    assert (mine["steps_done"], mine["steps"]) == (1, 2)
    assert mine["base"] == pytest.approx(1)
    assert np.isnan(mine["all_drop"])
    assert mine["own_oracle"] is None or pd.isna(mine["own_oracle"])
    written = page.write([part], tmp_path / "out", IDS)
    text = Reader(written[0].read_text(encoding="utf-8")).text
    assert "part (1 of 2 steps)" in text
    assert "its last step here is step 0" in text
    assert "(1 of 2 steps)" in (tmp_path / "out" / "summary.plop@1.md").read_text(encoding="utf-8")
    assert "1 (not finished)" in text


def test_run_without_finished_step(tmp_path):
    with pytest.raises(RunError, match=r"empty has no finished step"):
        page.write([learner(tmp_path / "a"), make(tmp_path / "empty", [])], tmp_path / "out", IDS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="no run to report"):
        tables.write([], tmp_path / "out", IDS)


def test_changed_matrices_are_refused(tmp_path):
    run = learner(tmp_path / "a")
    np.savez(run.step_folder(0) / "matrices.npz", **{"full.foreground": np.array(JOINT)})
    with pytest.raises(RunError, match="does not match its checksum"):
        tables.write([run], tmp_path / "out", IDS)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no archive"])
def test_damaged_matrices_are_a_run_error(tmp_path, content):
    run = learner(tmp_path / "a")
    (run.step_folder(0) / "matrices.npz").write_bytes(content)
    with pytest.raises(RunError, match="missing or damaged"):
        _ = run.records()[0].matrices


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scenario.json", '{"name": "x"}'),
        ("scenario.json", '{"name": "x", "dataset": "y", "mode": "z", "steps": [{"new": 3}]}'),
        ("provenance.json", "[]"),
        ("steps/00/record.json", "[]"),
        ("steps/00/record.json", "{}"),
    ],
)
def test_damaged_descriptions_are_a_run_error(tmp_path, name, content):
    path = learner(tmp_path / "a").path
    (path / name).write_text(content)
    with pytest.raises(RunError, match="damaged"):
        RunFolder.read(path).records()


def test_missing_geometry_is_said_or_refused(tmp_path):
    runs = [learner(tmp_path / "both"), learner(tmp_path / "full", keys=("full.foreground",))]
    written = page.write(runs, tmp_path / "out", IDS)
    text = Reader(written[0].read_text(encoding="utf-8")).text
    assert "Not scored under plop@1: full (it did not keep crop.all)." in text
    with pytest.raises(RunError, match=r"plop@1 reads crop\.all"):
        tables.write(runs[1:], tmp_path / "out", ["plop@1"])


def test_bare_folder_without_optional_keys(tmp_path):
    run = learner(tmp_path / "a", classes=[], provenance={})
    for record in run.records():
        run.finish_step(record.index, record.matrices, {})
    written = page.write([run], tmp_path / "out", IDS)
    text = Reader(written[0].read_text(encoding="utf-8")).text
    assert "class 3" in text
    assert "command –" in text


# Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"provenance": {"scale": "full"}}, []),
        ({"provenance": {"scale": "small: 20 epochs"}}, ["small budget: 20 epochs"]),
        ({"provenance": {"data": {"name": "synthetic"}}}, ["generated data"]),
        ({"note": "two minutes"}, ["two minutes"]),
        ({"evaluate": {"limit": 3}}, ["evaluated on the first 3 images only"]),
    ],
)
def test_caveats_stand_beside_every_number(tmp_path, changes, expected):
    run = learner(tmp_path / "a", **changes)
    assert scored.caveats(run) == expected
    tables.write([run], tmp_path / "out", IDS, allow_mixed="evaluate" in changes)
    for name in ("summary.plop@1.md", "forgetting.plop@1.md", "summary.plop@1.tex"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert ("Not comparable with published numbers" in text) == bool(expected)
        assert all(words in text for words in expected)


# Files ----------------------------------------------------------------------------------------------------------


def test_entry_points_write_all_files(tmp_path):
    runs = [learner(tmp_path / "a"), joint(tmp_path / "j")]
    out = tmp_path / "out"
    written = registry.load("reports", "html")(runs, out, IDS)
    assert sorted(p for p in out.rglob("*") if p.is_file()) == sorted(written)
    names = {path.relative_to(out).as_posix() for path in written}
    made = ("overview", "summary", "groups", "measures", "forgetting")
    kinds = [f"{kind}.{name}.{end}" for name in IDS for kind in made for end in ("md", "tex")]
    kinds += [f"{kind}.{name}.csv" for name in IDS for kind in tables.FRAMES if kind not in ("pairs", "tokens")]
    assert {"report.html", "tables.tex", *kinds, "protocols.csv", "protocols.md", "protocols.tex"} <= names
    for kind in ("miou", "forgetting", "old_new", "cost"):
        for end in ("svg", "pdf", "png"):
            assert f"figures/{kind}.plop@1.toy-2-1.overlapped.{end}" in names
    assert {f"figures/{kind}.plop@1.toy-2-1.overlapped.a.svg" for kind in ("heat", "class_forgetting")} <= names
    alone = registry.load("reports", "tables")(runs, tmp_path / "tables", IDS)
    assert {p.name for p in alone} == {p.name for p in written if p.parent == out} - {"report.html"}


def test_csv_holds_full_precision(tmp_path):
    tables.write([learner(tmp_path / "a")], tmp_path / "out", IDS)
    frame = pd.read_csv(tmp_path / "out" / "summary.mmseg150@1.csv")
    assert frame["incremental"].item() == 2 / 3


def test_markdown_and_latex_in_percent(tmp_path):
    tables.write([learner(tmp_path / "a"), joint(tmp_path / "j")], tmp_path / "out", IDS)
    text = (tmp_path / "out" / "summary.mmseg150@1.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("| a "))
    assert [cell.strip() for cell in line.split("|")[5:10]] == ["1†", "75.00", "66.67", "72.22", "86.11"]
    assert [cell.strip() for cell in line.split("|")[10:-1]] == ["20.00", "24.24", "21.41", "21.05", "26.67", "22.87"]
    text = (tmp_path / "out" / "forgetting.mmseg150@1.tex").read_text(encoding="utf-8")
    assert "mean & 2 & 100.00 & 75.00 & 25.00 & 25.00 & 18.33 & 6.67 & $-$25.00" in text
    assert "max over steps s \\textless{} T" in text


# Figures and samples ----------------------------------------------------------------------------------------------


def test_figures_show_every_run(tmp_path):
    ones = score(*(learner(tmp_path / f"run{i}", method=f"m{i}") for i in range(9)), joint(tmp_path / "j"))
    figure = plots.miou_figure(entries.entries(ones), plots.LIGHT)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*(f"run{i}" for i in range(9)), "j (oracle)"]
    line = figure.axes[0].get_lines()[0]
    assert line.get_ydata() == pytest.approx([100, 6500 / 90])
    looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in figure.axes[0].get_lines()[:9]}
    assert len(looks) == 9
    learners = [entry for entry in entries.entries(ones) if not entry.oracle]
    bars = plots.forgetting_figure(learners, plots.LIGHT).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([25] * 9)


def test_samples_in_the_page(tmp_path):
    run, oracle = learner(tmp_path / "a"), joint(tmp_path / "j")
    add_samples(run)
    add_samples(oracle)
    (sample,) = samples.samples(score(run, oracle))
    assert [(one.label, one.oracle, [p is not None for p in one.predictions]) for one in sample.rows] == [
        ("a", False, [True, True]),
        ("j (oracle)", True, [False, True]),
    ]
    # Predictions show no car; the truth does.
    names = [(swatch.name, swatch.colour, swatch.step) for swatch in sample.legend]
    assert names == [
        ("void / background", "#000000", None),
        ("sky", "#c80000", 0),
        ("tree", "#00c800", 0),
        ("car", "#0000c8", 1),
    ]
    images = [
        a
        for tag, a in Reader(page.write([run, oracle], tmp_path / "out", IDS)[0].read_text(encoding="utf-8")).tags
        if tag == "img"
    ]
    assert sum("prediction of" in str(a["alt"]) for a in images) == 3
    assert sum("errors of" in str(a["alt"]) for a in images) == 3


def test_damaged_sample_is_named(tmp_path):
    run = learner(tmp_path / "a")
    add_samples(run)
    (run.path / "samples" / "a.image.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"a\.image\.png cannot be read"):
        page.write([run], tmp_path / "out", IDS)


def test_reports_load_no_torch():
    code = "import sys, cssbench.reports.html; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MPLCONFIGDIR": "/nonexistent-is-fine"})
