"""The speed measurements' harness and page: ratios by hand, tables merged, scripts found, the page as committed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`bench("speed")` imports bench/speed.py."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("goal", "baseline", "variant", "ratio", "met"),
    [
        ("<= 0.37", 2.0, 0.5, "0.25", "yes"),  # a cost: variant / baseline
        ("<= 0.37", 2.0, 1.0, "0.5", "no"),
        (">= 5", 2.0, 0.25, "8", "yes"),  # how often as fast: baseline / variant
        (">= 5", 2.0, 0.5, "4", "no"),
        ("<= 0.5", 2.0, 1.0, "0.5", "yes"),
        ("", 2.0, 3.0, "1.5", ""),
    ],
)
def test_a_row_compares_its_ratio_with_the_goal(
    bench: Any, goal: str, baseline: float, variant: float, ratio: str, met: str
):
    row = bench("speed").row("claim", goal, ("slow", baseline), ("fast", variant))
    assert (row["ratio"], row["met"]) == (ratio, met)
    assert (row["baseline"], row["baseline_ms"], row["variant"]) == ("slow", "2000", "fast")
    assert f"torch {torch.__version__.partition('+')[0]}" in row["versions"]


def test_a_script_replaces_its_own_rows_in_place_and_a_new_one_appends(bench: Any, tmp_path: Path):
    speed, path = bench("speed"), tmp_path / "results" / "cpu.csv"
    for rows in ([("a", 1), ("a", 2)], [("b", 3)], [("c", 4)], [("b", 5), ("b", 6)], [("a", 7)]):
        speed.merge(path, [{"script": script, "claim": number} for script, number in rows])
    assert [(row["script"], row["claim"]) for row in speed.read_csv(path)] == [
        ("a", "7"), ("b", "5"), ("b", "6"), ("c", "4")]  # fmt: skip
    assert speed.read_csv(tmp_path / "none.csv") == []


def test_the_table_is_named_after_the_hardware_and_its_kind(bench: Any, monkeypatch: pytest.MonkeyPatch):
    speed = bench("speed")
    monkeypatch.setattr(speed, "machine", lambda device: "Intel(R) Xeon(R) Processor, 2 threads")
    path = speed.results_file("cpu")
    assert path == ROOT / "bench" / "results" / "intel-r-xeon-r-processor-2-threads.csv"
    assert speed.of_kind(path, "throughput").name == "intel-r-xeon-r-processor-2-threads-throughput.csv"
    assert speed.of_kind(path, "") == path


def test_a_script_writes_what_it_measured_under_its_name(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    speed, page = bench("speed"), (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bench/mine.py", "--csv", str(tmp_path / "out.csv")])
    written = speed.main("", lambda device: [speed.row("fast enough", ">= 2", ("a", 1.0), ("b", 0.1), device)])
    assert written == tmp_path / "out.csv"
    assert [(row["script"], row["ratio"]) for row in speed.read_csv(written)] == [("mine", "10")]
    assert "fast enough: b against a: 10 (goal >= 2; 1000 and 100 ms)" in capsys.readouterr().out
    assert speed.main("", lambda device: [{"model": "m"}], "kind") == tmp_path / "out-kind.csv"
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == page


def test_scripts_are_those_that_import_the_harness(bench: Any, tmp_path: Path):
    contents = {
        "one": "from speed import (\n    compare,\n    main,\n)\n",
        "two": "import os\nfrom speed import main, row\n",
        "runs": "from rows import Row, main\n",
        "page": "from speed import RESULTS\n",
        "text": '"""from speed import main"""\n',
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.py").write_text(content)
    assert bench("all").scripts(tmp_path) == ["one", "two"]
    found = bench("all").scripts()
    assert {"frozen", "iteration_profile", "throughput"} <= set(found)
    assert not {"all", "page", "speed", "rows", "gflops"} & set(found)


def test_a_failing_script_stops_no_other_and_is_named(bench: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "good.py").write_text("import sys; print(' '.join(sys.argv[1:]))")
    everything, out = bench("all"), tmp_path / "out.csv"
    assert everything.run(["bad", "good"], "cpu", out, tmp_path) == ["bad"]
    printed = capfd.readouterr().out
    assert f"--device cpu --csv {out}" in printed
    assert "FAILED" in printed.partition("good")[0]
    assert "FAILED" not in printed.partition("good")[2]


def test_the_summary_counts_goals(bench: Any):
    row = bench("speed").row
    rows = [row("one", "<= 1", ("a", 2.0), ("b", 1.0)), row("two", "<= 1", ("a", 1.0), ("b", 2.0)),
            row("three", "", ("a", 1.0), ("b", 2.0))]  # fmt: skip
    lines = bench("all").summary(rows, ["four"]).splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["met", "one:"], ["SHORT", "two:"], ["three:", "b"]]
    assert lines[3:] == ["1 of 2 goals met", "failed: four"]


def test_the_page_shows_every_table_and_none(bench: Any, tmp_path: Path):
    page, speed = bench("page"), bench("speed")
    results, path = tmp_path / "results", tmp_path / "speed.md"
    path.write_text("before\n" + "\nold\n".join(page.MARKERS) + "\nafter\n")
    page.update(path, results)
    empty = f"before\n{page.MARKERS[0]}\n\n{page.NONE}\n{page.MARKERS[1]}\nafter\n"
    assert path.read_text() == empty
    row = {"script": "mine", **speed.row("tokens, batch 4", "<= 0.5", ("padded", 2.0), ("packed", 0.8))}
    speed.merge(results / "box.csv", [row | {"machine": "Box", "versions": "torch 9", "commit": "abc"}])
    (results / "gflops.csv").write_text("what,ours\nSegViT,1\n")  # of another kind
    page.update(path, results)
    text = path.read_text()
    assert (
        "### Box: goals and measured ratios\n\n1 of 1 goals met. [box.csv](../bench/results/box.csv): torch 9" in text
    )
    assert "| tokens, batch 4 | <= 0.5 | 0.4 | yes | padded | 2000 | packed | 800 | mine |\n" in text
    assert "SegViT" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    (results / "box.csv").unlink()
    page.update(path, results)
    assert path.read_text() == empty


def test_the_committed_page_agrees_with_the_committed_tables(bench: Any):
    page = bench("page")
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.partition(page.MARKERS[0])[2].partition(page.MARKERS[1])[0] == f"\n\n{page.tables()}\n"
    pictured = list(page.RESULTS.glob("*-iteration.csv"))
    assert not pictured or (page.PAGE.parent / "speed" / "iteration.png").exists()


VIT = {"name": "vit_tiny_patch16_384", "depth": 1, "width": 24, "heads": 1, "layers": [1]}
TINY = {"backbone": {**VIT, "image_size": 32}, "head": {"heads": 1, "layers": 1}}


def test_throughput_doubles_the_batch_until_memory_is_full(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    throughput = bench("throughput")
    size = throughput.Size("tiny", 32, VIT, heads=1)
    seconds = {"run": 0.5, "product": 0.25}
    monkeypatch.setattr(throughput, "latency", lambda runs, **_: {name: runs[name]() or seconds[name] for name in runs})
    monkeypatch.setattr(throughput, "matmul", lambda device: (lambda: None, 10**9))  # a peak of 4 GFLOP/s

    def until_four(make: Any) -> Any:
        def full(made: Any, size: Any, batch: int) -> Any:
            if batch == 4:
                raise torch.OutOfMemoryError
            return make(made, size, batch)

        return full

    modes = {mode: (until_four(make), passes) for mode, (make, passes) in throughput.MODES.items()}
    monkeypatch.setattr(throughput, "MODES", modes)
    monkeypatch.setattr(throughput, "data_wait", lambda *_: 0.25)
    monkeypatch.setattr(throughput, "IMAGES", 2)
    rows = list(throughput.measure_size(size, "cpu", tmp_path, 0))
    assert [(row["mode"], row["batch"]) for row in rows] == [
        ("training", 1), ("training", 2), ("inference", 1), ("inference", 2)]  # fmt: skip
    assert [row["images_per_s"] for row in rows] == ["2", "4", "2", "4"]
    percent = [float(str(row["of_matmul_peak"]).split()[0]) for row in rows]
    assert percent[0] == pytest.approx(100 * 3 * size.flops() / 0.5 / 4e9, abs=0.06)
    assert percent[2] == pytest.approx(100 * size.flops() / 0.5 / 4e9, abs=0.06)
    assert [row["data_wait"] for row in rows] == ["25.0 %", "25.0 %", "", ""]
    assert "tiny, inference: no memory for batch 4" in capsys.readouterr().out


def test_data_wait_is_the_loaders_share(bench: Any, monkeypatch: pytest.MonkeyPatch):
    """A loader of 1 s and an iteration of 3 s, by a clock that only they move."""
    throughput, clock = bench("throughput"), [0.0]

    def loaded(*_: Any) -> Any:
        while True:
            clock[0] += 1
            yield {}

    class Iterates:
        def iteration(self, batch: Any) -> None:
            clock[0] += 3

    monkeypatch.setattr(throughput, "make_loader", loaded)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    assert throughput.data_wait(Iterates(), [0], 1, workers=0) == 0.25


def test_an_iteration_is_the_sum_of_its_parts(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """By a clock that ticks once a look: every part is timed once, and on stored features the encoder not at all."""
    profile = bench("iteration_profile")
    looks = iter(range(10**6))
    monkeypatch.setattr(profile.Clock, "now", staticmethod(lambda: float(next(looks))))
    monkeypatch.setattr(profile, "IMAGES", 12)
    rows = list(profile.measure("cpu", TINY, side=32, repeats=1))
    names = ["base step", "t > 0, frozen", "t > 0, stored features"]
    assert list(dict.fromkeys(row["iteration"] for row in rows)) == names
    parts = {name: {row["part"]: float(row["ms"]) for row in rows if row["iteration"] == name} for name in names}
    assert all(list(found) == list(profile.PARTS) for found in parts.values())
    assert parts[names[0]] == parts[names[1]]  # the same parts run, one look each
    assert set(parts[names[0]].values()) == {1000.0, parts[names[0]]["other"]}
    assert parts[names[2]]["encoder forward"] == 0
    assert parts[names[2]]["heads forward"] == 1000  # the newest head alone
    speed = bench("speed")
    speed.merge(tmp_path / "box-iteration.csv", [{"script": "iteration_profile", **row} for row in rows])
    profile.draw(tmp_path, tmp_path / "speed" / "iteration.png")
    assert (tmp_path / "speed" / "iteration.png").read_bytes().startswith(b"\x89PNG")
