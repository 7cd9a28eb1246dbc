"""Figures: what they show is what was worked out by hand; the gallery; sample images and their error maps."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from report_runs import (
    STEP0,
    UPTO0,
    add_samples,
    forgetful,
    joint,
    learner,
    make,
    other_seed,
    score,
)

from cssbench import protocol, registry
from cssbench.reports import charts, figures, plots, samples
from cssbench.reports.entries import entries
from cssbench.reports.plots import DARK, LIGHT

SILENT = [[0, 0, 0, 0], [0, 5, 0, 5], [0, 0, 10, 0], [0, 0, 0, 0]]  # class 3 has no pixel in the truth


def test_heat_map_of_classes_and_steps(tmp_path):
    run = make(tmp_path / "a", [{"": [*STEP0[:3], [0] * 4]}, {"": SILENT, ".upto0": UPTO0}])
    axes = charts.heat_figure(entries(score(run))[0], LIGHT).axes[0]
    (mesh,) = [one for one in axes.collections if hasattr(one, "get_coordinates")]
    values = np.ma.filled(mesh.get_array().astype(float), np.nan).reshape(3, 2)
    assert values == pytest.approx(np.array([[100, 50], [100, 100], [np.nan, np.nan]]), nan_ok=True)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["sky  0", "tree  0", "car  1"]
    crossed = [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert crossed == [(0.5, 1.5)]  # learned at step 1, not measurable; at step 0 it is not learned: empty
    assert [text.get_text() for text in axes.texts] == ["100", "50", "100", "100"]


def test_heat_map_of_many_classes_has_panels(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "ROWS", 2)
    figure = charts.heat_figure(entries(score(learner(tmp_path / "a")))[0], LIGHT)
    assert [len(axes.get_yticks()) for axes in figure.axes[:2]] == [2, 1]


def test_class_forgetting_is_sorted_and_shortened(tmp_path, monkeypatch):
    (entry,) = entries(score(learner(tmp_path / "a"), other_seed(tmp_path / "b")))
    axes = charts.class_forgetting_figure(entry, LIGHT).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([45, 0])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["sky  0", "tree  0"]
    many = {c: c / 1000 for c in range(1, 8)}
    monkeypatch.setattr(type(entry), "forgetting", lambda _: many)
    monkeypatch.setattr(charts, "BARS", 5)
    monkeypatch.setattr(charts, "ENDS", 2)
    monkeypatch.setattr(type(entry.first), "classes", {c: f"c{c}" for c in many})
    monkeypatch.setattr(charts.frames, "taught", lambda _: dict.fromkeys(many, 0))
    axes = charts.class_forgetting_figure(entry, LIGHT).axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["c7  0", "c6  0", "… 3 classes between …", "c2  0", "c1  0"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.7, 0.6, 0.2, 0.1])
    assert axes.get_xlim()[1] >= plots.LEAST  # a tenth of a point must not fill the page


def test_old_against_new_classes(tmp_path):
    found = entries(score(learner(tmp_path / "a"), forgetful(tmp_path / "b"), joint(tmp_path / "j")))
    axes = charts.old_new_figure(found, LIGHT).axes[0]
    marks = [line.get_xydata().tolist()[0] for line in axes.get_lines()]
    assert marks == [pytest.approx(at) for at in ([75, 100 / 1.5], [55, 1000 / 19], [95, 1000 / 11])]
    lines = axes.collections[0]
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        for x, y in path.vertices:
            assert (2 * x + y) / 3 == pytest.approx(level, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("mmseg150@1", (2, 1)), ("plop@1", (3, 1)), ("dkd@1", (3, 1)), ("m2f-bg@1", None), ("ssul-nonzero@1", None)],
)
def test_lines_of_equal_all_only_where_it_is_a_weighted_mean(name, weights):
    assert charts.all_weights(protocol.get(name), ((1, 2), (3,))) == weights


def test_accuracy_against_cost(tmp_path):
    run = learner(tmp_path / "a")
    for record in run.records():
        numbers = {"seconds": {"train": 90.0}, "parameters": {"total": 2_000_000 + record.index}}
        run.finish_step(record.index, record.matrices, numbers)
    bare = joint(tmp_path / "j")
    bare.finish_step(0, bare.records()[0].matrices, {})  # an imported run knows no cost
    time, parameters = charts.cost_figure(entries(score(run, bare)), LIGHT).axes
    assert [line.get_xydata().tolist()[0] for line in time.get_lines()] == [pytest.approx([3, 6500 / 90])]
    assert time.get_xlabel() == "training, minutes"
    assert [line.get_xdata()[0] for line in parameters.get_lines()] == pytest.approx([2.000001])


@pytest.mark.parametrize("other", [False, True])
def test_times_of_different_machines_are_said_not_to_compare(tmp_path, monkeypatch, other):
    monkeypatch.setattr(plots, "render", lambda draw: (draw(LIGHT), {"svg": b"", "pdf": b"", "png": b""}))
    runs = [learner(tmp_path / "a", provenance={"hardware": {"cpu": "x"}})]
    runs += [joint(tmp_path / "j", provenance={"hardware": {"cpu": "y" if other else "x"}})]
    (cost,) = [p for p in figures.setting_figures(score(*runs), tmp_path, "x") if p.kind == "cost"]
    assert ("different machines: times are not comparable" in cost.caption) == other


def test_bands_and_bars_of_several_seeds(tmp_path):
    found = entries(score(learner(tmp_path / "s0"), other_seed(tmp_path / "s1"), forgetful(tmp_path / "b")))
    _, base = plots.miou_figure(found, LIGHT).axes
    assert [list(line.get_ydata()) for line in base.get_lines()] == [
        pytest.approx([100, 77.5]),
        pytest.approx([100, 55]),
    ]
    (band,) = base.collections  # a single run has none
    edges = band.get_paths()[0].vertices
    assert sorted({round(y, 3) for x, y in edges if x == 1}) == [
        round(77.5 - 5 / 2**0.5, 3),
        round(77.5 + 5 / 2**0.5, 3),
    ]
    figure = plots.forgetting_figure(found, LIGHT)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([22.5, 45])
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["s{0,1} (n = 2)", "b"]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_legends_fit_their_figures(tmp_path, count):
    found = entries(score(*(learner(tmp_path / f"a-rather-long-name-{n}", method=f"m{n}") for n in range(count))))
    for draw in (charts.old_new_figure, charts.cost_figure, plots.miou_figure):
        figure = draw(found, LIGHT)
        FigureCanvasAgg(figure).draw()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0, draw
        assert box.x1 <= figure.bbox.x1, draw


def test_dark_figures_have_no_light_colour_and_embedded_ones_are_slim(tmp_path):
    drawn = figures.setting_figures(score(learner(tmp_path / "a"), joint(tmp_path / "j")), tmp_path / "out", "x")
    assert [plot.kind for plot in drawn] == ["miou", "forgetting", "old_new", "cost", "heat", "class_forgetting"]
    for plot in drawn:
        svg = plot.files[0].read_bytes()
        dark = plots.slim(plots.darkened(svg))
        assert LIGHT.ink.encode() in svg
        assert not re.search("|".join([LIGHT.ink, LIGHT.grid, LIGHT.page]).encode(), dark), plot.kind
        assert DARK.ink.encode() in dark
        assert len(dark) < len(svg)
        assert len(list(ET.fromstring(dark).iter())) > 20
    assert drawn[4].label == "a"


@pytest.mark.parametrize(("text", "shown"), [("a\nb", "a b"), ("𐎀中", "□□"), ("é…", "é…"), ("x" * 60, "x" * 47 + "…")])
def test_names_are_legible(text, shown):
    assert plots.legible(text) == shown


# Samples ------------------------------------------------------------------------------------------------------------


def test_error_map_by_hand():
    truth = np.array([[0, 1, 1, 2, 3, 255]], np.uint8)
    predicted = np.array([[1, 1, 2, 1, 1, 1]], np.uint8)
    before = np.array([[False, False, True, False, False, False]])
    found = samples.verdicts(truth, predicted, [1, 2], before)
    wanted = [samples.VOID, samples.RIGHT, samples.FORGOTTEN, samples.WRONG, samples.FUTURE, samples.VOID]
    assert found.tolist() == [wanted]


def test_error_maps_remember_what_was_right(tmp_path):
    run = learner(tmp_path / "a")
    add_samples(run)
    step0, step1 = (record.folder / "samples" / "a.png" for record in run.records())
    ids = np.array(samples.Image.open(step0))  # 0 1 / 2 2, the truth is 0 1 / 2 3
    ids[:8, 8:] = 2  # class 1 is now taken for class 2
    samples.Image.fromarray(ids).save(step1)
    (sample,) = samples.samples(score(run))
    corners = [[int(e[y, x]) for y in (0, 8) for x in (0, 8)] for e in sample.rows[0].errors]
    assert corners == [
        [samples.VOID, samples.RIGHT, samples.RIGHT, samples.FUTURE],
        [samples.VOID, samples.FORGOTTEN, samples.RIGHT, samples.WRONG],
    ]


def test_mask_figure_places_every_panel(tmp_path):
    run, oracle = learner(tmp_path / "a"), joint(tmp_path / "j")
    add_samples(run)
    add_samples(oracle)
    (sample,) = samples.samples(score(run, oracle))
    figure = charts.mask_figure(sample, LIGHT)
    canvas = figure.axes[0].images[0].get_array()
    gap, side = 2, 16
    assert canvas.shape == (4 * (side + gap), 4 * (side + gap), 4)
    drawn = [[bool(canvas[y * (side + gap), x * (side + gap), 3]) for x in range(4)] for y in range(4)]
    assert drawn == [[True, True, True, True], [False, False, True, True], [False] * 3 + [True], [False] * 3 + [True]]
    assert canvas[0, side + gap + side - 1].tolist() == [200, 0, 0, 255]  # the truth's upper right is sky
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["void / background", "sky  0"]
    assert legend[-1] == "wrong, right after an earlier step"


def test_sample_of_another_size_is_refused(tmp_path):
    run = learner(tmp_path / "a")
    add_samples(run)
    samples.Image.new("P", (3, 3)).save(run.records()[0].folder / "samples" / "a.png")
    with pytest.raises(samples.RunError, match="differ in size"):
        samples.samples(score(run))


def test_runs_with_other_views_of_an_image_get_a_sample_each(tmp_path):
    """As where one run evaluated whole images and another crops: each is judged by its own truth."""
    whole, again, crop = (learner(tmp_path / name, seed=seed) for seed, name in enumerate(["whole", "again", "crop"]))
    for run in (whole, again, crop):
        add_samples(run)
    for path in [*(crop.path / "samples").glob("*.png"), *crop.path.glob("*/*/samples/*.png")]:
        samples.Image.open(path).crop((8, 8, 16, 16)).save(path)
    one, other = samples.samples(score(crop, whole, again))
    assert (one.stem, one.truth.shape, one.image.shape, len(one.rows)) == ("a", (8, 8), (8, 8, 3), 1)
    assert (other.stem, other.truth.shape, other.image.shape) == ("a (view 2)", (16, 16), (16, 16, 3))
    assert len(other.rows) == 2
    assert (one.truth == 3).all()
    assert [errors[0, 0] for errors in one.rows[0].errors] == [samples.FUTURE, samples.WRONG]


# The gallery --------------------------------------------------------------------------------------------------------


def test_gallery(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MASKS", 1)
    run = learner(tmp_path / "a_[x]", note="small: two minutes")
    add_samples(run)
    add_samples(run, "second")
    out = tmp_path / "docs"
    written = registry.load("reports", "gallery")([run, joint(tmp_path / "j")], out, ["plop@1", "mmseg150@1"])
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(written)
    text = written[0].read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert sorted(out / link for link in links) == sorted(written[1:])
    assert sum("masks" in link for link in links) == 1
    assert {path.suffix for path in written[1:]} == {".png"}
    assert r"- a\_\[x\]: finetune on toy-2-1, overlapped (small: two minutes)" in text
    assert "Protocol plop@1" in text
    assert "One run under every protocol" in text
