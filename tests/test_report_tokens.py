"""Tokens and cost in reports: sweeps, the table by hand, published rows, the figure, and where tokens stopped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_runs import (
    IDS,
    JOINT,
    Reader,
    add_depths,
    add_samples,
    forgetful,
    grid,
    learner,
    make,
    other_seed,
    score,
)

from cssbench import registry
from cssbench.reports import figures, formats, plots, samples, stops, tables, tokens
from cssbench.reports import html as page
from cssbench.reports.plots import LIGHT
from cssbench.reports.scored import again, caveats
from cssbench.results import RunFolder

BACKBONE = {"backbone": {"width": 16}}
LABELLED = {"data": {"name": "synthetic"}}


def numbers(gflops: float, shares: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    cost = {"per_pass": gflops, "per_image": gflops, "images": 8, "geometry": "full"} | changes
    return {"gflops": cost} | ({"tokens": shares} if shares else {})


def dropping(path: Path, p0: float, gflops: float, shares: dict[str, float], **changes: Any) -> RunFolder:
    make_run = changes.pop("make", learner)
    given = {"model": {"name": "dropper", "p0": p0, **BACKBONE}, "numbers": numbers(gflops, shares)}
    return make_run(path, **given | changes)


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    """A sweep over p0, one value of which has two seeds, and a model that drops nothing.

    all: 6.5/9 and 16.2/21 of the two seeds, (1.1 + 10/19) / 3 at p0 = 0.6, 6.5/9 of the plain one.
    """
    return [
        dropping(tmp_path / "d95", 0.95, 86.8, {"6": 0.25, "12": 0.75}),
        learner(tmp_path / "plain", model={"name": "plain", **BACKBONE}, numbers=numbers(109.94)),
        dropping(tmp_path / "d6", 0.6, 70.2, {"6": 0.5, "8": 0.125, "12": 0.375}, make=forgetful, method="finetune"),
        dropping(tmp_path / "d95-1", 0.95, 87.0, {"6": 0.5, "12": 0.5}, make=other_seed),
    ]


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = {"svg": b"<svg/>", "pdf": b"%PDF", "png": b"PNG"}
    monkeypatch.setattr(plots, "render", lambda draw: (draw(plots.LIGHT), dict(empty)))


def test_runs_that_differ_in_one_option_are_a_sweep(runs):
    found = tokens.sweeps(score(*runs))
    assert [(sweep.option, sweep.values) for sweep in found] == [("model.p0", (0.6, 0.95)), ("", (None,))]
    assert [[entry.label for entry in sweep.members] for sweep in found] == [["d6", "d95{,-1}"], ["plain"]]
    assert found[0].settings == ["p0 = 0.6", "p0 = 0.95"]


def test_the_larger_sweep_takes_an_entry_and_values_ascend(tmp_path):
    def one(name: str, p0: Any, keep: int) -> RunFolder:
        model = {"name": "dropper", "p0": p0, "keep": keep}
        return learner(tmp_path / name, model=model, numbers=numbers(10, {"2": 1.0}))

    made = [one("a", 0.95, 5), one("b", 0.95, 1), one("c", "none", 5), one("d", 0.6, 5), one("e", 10, 5)]
    found = tokens.sweeps(score(*made))
    assert [(sweep.option, [e.label for e in sweep.members]) for sweep in found] == [
        ("model.p0", ["d", "a", "e", "c"]),
        ("", ["b"]),
    ]


def test_where_no_run_dropped_tokens_there_is_nothing(tmp_path):
    scored = score(learner(tmp_path / "a", numbers=numbers(10)), forgetful(tmp_path / "b"))
    assert tokens.sweeps(scored) == []
    assert tokens.tokens_table(scored) is None
    assert tokens.tokens_frame(scored).empty
    assert "tokens" not in {plot.kind for plot in figures.setting_figures(scored, tmp_path / "f", "x")}


def test_the_table_by_hand(runs):
    table = tokens.tokens_table(score(*runs))
    assert [head for head, _ in table.headings] == ["", "mIoU, %", tokens.DEPTHS]
    assert grid(formats.markdown(table))[1:] == [
        ["d6", "dropper", "p0 = 0.6", "1†", "70.2", "54.21", "50.00", "12.50", "37.50"],
        [r"d95\{,-1\}", "dropper", "p0 = 0.95", "2", "86.9 ± 0.14", "74.68 ± 3.48", "37.50", "0.00", "62.50"],
        ["plain", "plain", "–", "1†", "109.9", "72.22", "–", "–", "–"],
    ]  # fmt: skip
    assert table.kinds == ("", "", "start")
    assert "of one image, geometry full, mean over the first 8 images." in table.notes[0]
    assert "\\addlinespace" in formats.latex(table, "tab:x")


def test_a_sweep_alone_names_its_option(runs):
    table = tokens.tokens_table(score(*(run for run in runs if run.config.model.name == "dropper")))
    assert [row[2] for row in grid(formats.markdown(table))[1:]] == ["p0 = 0.6", "p0 = 0.95"]


def test_without_a_sweep_there_is_no_column_of_options(runs):
    table = tokens.tokens_table(score(*runs[:2]))
    assert ("", "option") not in table.columns
    assert table.text == 2


def test_what_the_cost_is_of_is_said_run_by_run_where_it_differs(tmp_path):
    slide = {"inference": "slide", "window": 512, "stride": 512}
    made = [
        dropping(tmp_path / "w", 0.5, 10, {"2": 1.0}),
        dropping(tmp_path / "s", 0.6, 10, {"2": 1.0}, evaluate=slide),
        dropping(tmp_path / "t", 0.7, 10, {"2": 1.0}, numbers=numbers(10, {"2": 1.0}, images=4, geometry="crop")),
    ]
    note = tokens.tokens_table(score(*made)).notes[0]
    assert "one image, geometry full, mean over the first 8 images (w)" in note
    assert "one window of 512 px, mean over the first 8 images (s)" in note
    assert "one image, geometry crop, mean over the first 4 images (t)" in note


def test_the_frame_has_full_precision(runs):
    frame = tokens.tokens_frame(score(*runs))
    assert frame["run"].tolist() == ["d6", "d95", "d95-1", "plain"]
    assert frame["value"].tolist() == ["0.6", "0.95", "0.95", ""]
    assert frame["gflops"].tolist() == [70.2, 86.8, 87.0, 109.94]
    assert frame["all"].tolist() == pytest.approx([(1.1 + 10 / 19) / 3, 6.5 / 9, 16.2 / 21, 6.5 / 9])
    assert frame["tokens_8"].tolist()[:3] == [0.125, 0, 0]
    assert frame["tokens_12"].isna().tolist() == [False, False, False, True]


def dense(path: Path, p0: float | None, **changes: Any) -> RunFolder:
    """All classes in one step."""
    model = {"name": "dropper"} | ({} if p0 is None else {"p0": p0})
    given = {"groups": ((1, 2, 3),), "scenario": "toy-joint", "model": model, "numbers": numbers(10, {"2": 1.0})}
    return make(path, [{"": JOINT}], **given | changes)


def as_ade20k(run: RunFolder) -> RunFolder:
    run.scenario["dataset"] = "ade20k"
    return run


def test_published_rows_stand_beside_dense_runs_of_full_scale_alone(tmp_path):
    made = [as_ade20k(dense(tmp_path / f"p{p0}", p0)) for p0 in (0.6, 0.9)]
    table = tokens.tokens_table(score(*made))
    cells = grid(formats.markdown(table))[1:]
    printed = [row for row, kind in zip(cells, table.kinds, strict=True) if "published" in kind]
    assert ["ViT-B, crop 512 (thesis, Table 5.2)", "–", "p0 = 0.60", "", "70.2", "46.8", "–"] in printed
    assert any(row[0].startswith("ViT-B, crop 512, Direct") and row[4:6] == ["87.5", "47.9"] for row in printed)
    assert table.kinds[2] == "published start"
    assert tokens.PUBLISHED_NOTE in table.notes
    frame = tokens.tokens_frame(score(*made))
    assert len(frame) == 2
    single = tokens.tokens_table(score(made[0]))
    assert ("", "option") not in single.columns  # no sweep of ours, no printed one
    assert any("Direct" in cell for cell in single.cells["", "run"])
    for other in (
        [dense(tmp_path / "toy", 0.6), dense(tmp_path / "toy2", 0.9)],  # another data set
        [as_ade20k(dense(tmp_path / "small", 0.6, note="small: 100 iterations")), made[1]],
        [as_ade20k(dropping(tmp_path / "steps", 0.6, 10, {"2": 1.0}))],  # learned over steps
    ):
        assert not any("published" in kind for kind in tokens.tokens_table(score(*other)).kinds)


def test_the_figure_shows_cost_and_accuracy(runs):
    (axes,) = tokens.tokens_figure(tokens.sweeps(score(*runs)), LIGHT).axes
    sweep, plain = axes.get_lines()
    assert sweep.get_xydata().ravel() == pytest.approx(
        [70.2, 100 * (1.1 + 10 / 19) / 3, 86.9, 100 * (6.5 / 9 + 16.2 / 21) / 2]
    )
    assert plain.get_xydata().ravel() == pytest.approx([109.94, 650 / 9])
    assert [text.get_text() for text in axes.texts] == ["0.6", "0.95"]


AGAIN = {
    "path": "/runs/d95", "digest": "f" * 64, "changes": {"model.p0": [0.95, 0.6], "data.root": ["a", "b"]},
    "provenance": {"command": ["cssbench", "run", "x"], "commit": "c" * 40, "hardware": {"gpu": "H200"},
                   "scale": "small scale"},
}  # fmt: skip


@pytest.mark.usefixtures("_fast")
def test_evaluations_of_stored_weights_say_so_everywhere(tmp_path):
    run = dropping(tmp_path / "d6", 0.6, 70.2, {"12": 1.0}, provenance=LABELLED | {"evaluated_from": AGAIN})
    assert again(run) == " (evaluated again: p0 0.6)"
    assert caveats(run) == ["generated data", "small budget scale"]
    assert score(run)[0].shown_as == "d6 (evaluated again: p0 0.6)"
    written = page.write([run], tmp_path / "out", IDS)
    text = Reader(written[0].read_text(encoding="utf-8")).text
    shown = "d6 (evaluated again: p0 0.6)"
    for said in (shown, "weights of /runs/d95", "trained by cssbench run x", "trained on H200"):
        assert said in text


# Where tokens stopped ---------------------------------------------------------------------------------------------

DEEP = np.array([[2, 2], [4, 8]]).repeat(8, 0).repeat(8, 1)


@pytest.fixture
def pictured(tmp_path: Path) -> list[RunFolder]:
    found = []
    for name, p0, depths in (("a", 0.6, DEEP), ("b", 0.95, np.where(DEEP == 4, 8, DEEP))):
        run = dropping(tmp_path / name, p0, 10, {"2": 0.5, "8": 0.5}, provenance=LABELLED)
        add_samples(run)
        add_depths(run, depths)
        found.append(run)
    found.append(
        learner(tmp_path / "plain", model={"name": "plain", **BACKBONE}, provenance=LABELLED, numbers=numbers(20))
    )
    add_samples(found[-1])
    return found


def test_a_panel_per_stage_stopped_tokens_bright(pictured):
    (sample,) = samples.samples(score(*pictured))
    (found,) = stops.stop_samples([sample])
    assert found.stages == (2, 4)
    assert [row.label for row in found.rows] == ["a", "b"]  # the third dropped nothing
    names = ["stopped after 2 blocks", "stopped after 4 blocks", "all 8 blocks"]
    assert [swatch.name for swatch in found.legend] == names
    first, second = found.rows[0].panels
    image, dark = sample.image, (sample.image * 0.25).astype(np.uint8)
    np.testing.assert_array_equal(first, np.where((DEEP == 2)[..., None], image, dark))
    np.testing.assert_array_equal(second, np.where((DEEP <= 4)[..., None], image, dark))
    assert found.rows[1].panels[1] is None
    np.testing.assert_array_equal(found.rows[0].depths, DEEP)
    bright = [found.colours[depth].astype(int).sum() for depth in (2, 4, 8)]
    assert bright == sorted(bright, reverse=True)


def test_without_depths_there_are_no_such_pictures(tmp_path):
    run = learner(tmp_path / "a")
    add_samples(run)
    assert stops.stop_samples(samples.samples(score(run))) == []


@pytest.mark.usefixtures("_fast")
def test_page_tables_and_gallery_have_them(pictured, tmp_path):
    written = page.write(pictured, tmp_path / "out", IDS)
    text = written[0].read_text(encoding="utf-8")
    read = Reader(text)
    for said in ("Tokens and cost", "Where tokens stopped", "after 2 blocks", "all 8 blocks", "p0 = 0.6"):
        assert said in read.text
    assert sum("depth of the tokens of" in str(attrs.get("alt")) for tag, attrs in read.tags if tag == "img") == 2
    assert sum("that stopped within" in str(attrs.get("alt")) for tag, attrs in read.tags if tag == "img") == 3
    names = {path.name for path in written}
    assert {f"tokens.{name}.{end}" for name in IDS for end in ("csv", "md", "tex")} <= names
    assert {"tokens.mmseg150@1.toy-2-1.overlapped.png", "stops.toy-2-1.overlapped.a.png"} <= names
    frame = pd.read_csv(tmp_path / "out" / "tokens.mmseg150@1.csv")
    assert frame["tokens_2"].dropna().tolist() == [0.5, 0.5]
    for path in registry.load("reports", "gallery")(pictured, tmp_path / "gallery", IDS):
        if path.name == "gallery.md":
            shown = path.read_text(encoding="utf-8")
    assert re.findall(r"### (Accuracy against GFLOPs|Where tokens stopped)", shown) == [
        "Accuracy against GFLOPs",
        "Where tokens stopped",
    ]
    assert "Tokens and cost" in shown


def test_two_reports_are_equal_byte_for_byte(pictured, tmp_path):
    for out in ("one", "two"):
        scored = {"mmseg150@1": score(*pictured)}
        tables.write_scored(scored, tmp_path / out)
        figures.stop_figures(stops.stop_samples(samples.samples(scored["mmseg150@1"])), tmp_path / out, "x")
        sweeps = tokens.sweeps(scored["mmseg150@1"])
        plots.plot("tokens", lambda theme, sweeps=sweeps: tokens.tokens_figure(sweeps, theme), tmp_path / out / "t", "")
    ones = sorted((tmp_path / "one").iterdir())
    assert len([path for path in ones if path.name.startswith(("stops", "tokens", "t."))]) >= 9
    for path in ones:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
