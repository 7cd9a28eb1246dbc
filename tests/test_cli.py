"""The command line as a user types it: what it prints, what it writes, and one clear error for each mistake."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from PIL import Image

from cssbench import cli, recipes
from cssbench.results import RunFolder


class Outcome:
    """Exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


Cli = Callable[..., Outcome]


@pytest.fixture
def cssbench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cssbench", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, " ".join(printed.err.split()))

    return call


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CamVid's layout with a few generated images of 48 x 64 px."""
    root, rng = tmp_path_factory.mktemp("camvid"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for i in range(count):
            label = rng.integers(0, 12, (6, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            image = (label[..., None] * [20, 9, 5] + rng.integers(0, 20, (48, 64, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / split / f"{i:03d}.png")
            Image.fromarray(label).save(root / f"{split}annot" / f"{i:03d}.png")
    return root


TINY = [
    "model.backbone.width=16", "model.backbone.depth=1", "model.backbone.heads=2", "model.backbone.layers=[1]",
    "model.backbone.image_size=32", "model.head.width=8", "model.head.heads=2", "model.head.layers=1",
    "augment.crop=32",
    "augment.short_side=48", "train.batch_size=2", "train.iterations=1", "evaluate.short_side=32", "evaluate.crop=32",
    "evaluate.samples=1",
]  # fmt: skip


def sets(*changes: str) -> list[str]:
    return [word for change in (*TINY, *changes) for word in ("--set", change)]


@pytest.fixture(scope="module")
def runs(camvid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of camvid-6-5, made through the command line."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("segvit-cl", "finetune"):
        words = ["run", "camvid-6-1-segvit-cl", "--data", str(camvid), "--out", str(folder / method)]
        changes = sets("scenario.name=camvid-6-5", f"method.name={method}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["cssbench", *words, *changes])
            with contextlib.suppress(SystemExit):
                cli.main()
        assert RunFolder.read(folder / method).finished
    return folder


def test_version_and_help(cssbench: Cli):
    assert cssbench("--version").out.strip().count(".") == 2
    assert "resume" in cssbench("--help").out


@pytest.mark.parametrize(
    ("kind", "name"),
    [("methods", "segvit-cl"), ("models", "segvit"), ("datasets", "folder"), ("scenarios", "ade20k-100-5"),
     ("recipes", "demo-joint"), ("protocols", "plop@1"), ("reports", "html")],
)  # fmt: skip
def test_list_names_the_built_in_parts_and_whose_they_are(cssbench: Cli, kind: str, name: str):
    printed = cssbench("list", kind)
    assert printed.code == 0
    assert name in printed.out


def test_a_recipe_is_listed_with_the_first_line_of_its_header(cssbench: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "cssbench  MiB with ATM heads on ViT-B/16, ADE20K." in cssbench("list", "recipes").out


def test_scenario_show_gives_exact_counts_and_digests(cssbench: Cli, camvid: Path):
    shown = json.loads(cssbench("scenario", "show", "camvid-6-5", "--data", camvid, "--json").out)
    assert [step["new"] for step in shown["steps"]] == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert all(len(step["sha256"]) == 64 and step["images"] == 12 for step in shown["steps"])
    assert "1-6" in cssbench("scenario", "show", "camvid-6-5").out


def test_scenario_show_from_an_imported_index(cssbench: Cli, shared_data: Path):
    index = shared_data / "ade20k_index" / "train_cls.txt"
    shown = json.loads(cssbench("scenario", "show", "ade20k-100-10", "--index", index, "--json").out)
    assert [step["images"] for step in shown["steps"]] == [20192, 1710, 2294, 2747, 4279, 2844]


def test_scenario_explain_writes_a_picture(cssbench: Cli, camvid: Path, tmp_path: Path):
    out = tmp_path / "why.png"
    done = cssbench(
        "scenario", "explain", "camvid-6-5", "--image", "000", "--step", "1", "--data", camvid, "--out", out
    )
    assert done.code == 0
    picture = np.asarray(Image.open(out))
    palette = {tuple(colour) for colour in picture.reshape(-1, 3)}
    assert (64, 0, 128) in palette, "cars are in the full labels"


def test_verify_names_every_bad_file_and_exits_2(cssbench: Cli, camvid: Path, tmp_path: Path):
    assert cssbench("data", "verify", camvid).code == 0
    root = tmp_path / "bad"
    shutil.copytree(camvid, root)
    (root / "trainannot" / "000.png").unlink()
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(root / "trainannot" / "001.png")
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(root / "trainannot" / "002.png")
    Image.fromarray(np.zeros((40, 64), np.uint8)).save(root / "trainannot" / "003.png")
    (root / "train" / "004.png").write_bytes((root / "train" / "004.png").read_bytes()[:100])
    done = cssbench("data", "verify", root)
    assert done.code == 2
    assert all(f"00{i}.png" in done.out for i in range(5))
    assert "5 problems" in done.out


def test_data_index_counts_images_per_class(cssbench: Cli, camvid: Path):
    done = cssbench("data", "index", camvid)
    assert done.code == 0
    assert "bicyclist" in done.out


def test_run_status_resume_and_report(cssbench: Cli, runs: Path, tmp_path: Path):
    status = cssbench("status", runs / "segvit-cl")
    assert "2 of 2 steps" in status.out
    assert "finished" in cssbench("resume", runs / "segvit-cl").out
    done = cssbench("report", runs / "segvit-cl", runs / "finetune", "--out", tmp_path / "report")
    assert done.code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "segvit-cl" in page
    assert "finetune" in page
    assert (tmp_path / "report" / "summary.mmseg150@1.md").exists()


def test_the_command_stands_in_the_run_folder(runs: Path):
    there = RunFolder.read(runs / "finetune")
    assert there.provenance["command"][:3] == ["cssbench", "run", "camvid-6-1-segvit-cl"]
    assert there.config.method.name == "finetune"


def bad_data(tmp_path: Path, camvid: Path, change: Callable[[Path], Any]) -> Path:
    root = tmp_path / "data"
    shutil.copytree(camvid, root)
    change(root)
    return root


def write(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


RUN_MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown method": (["method.name=segvit-c"], "Did you mean 'segvit-cl'"),
    "unknown model": (["model.name=segvitt"], "Did you mean 'segvit'"),
    "unknown scenario": (["scenario.name=camvid-6-2"], "Did you mean 'camvid-6-"),
    "unknown section": (["optimizer.lr=1"], "did you mean 'optim'"),
    "unknown option": (["optim.lrr=1"], "unknown key 'optim.lrr'"),
    "unknown option of the method": (["method.calibratoin=none"], "did you mean 'calibration'"),
    "unknown option of the model": (["model.backbone.layer=[1]"], "did you mean 'layers'"),
    "unknown backbone": (["model.backbone.name=vit_bas_patch16_384"], "Did you mean"),
    "backbone that is no plain ViT": (["model.backbone.name=resnet18"], "plain ViT"),
    "tap out of range": (["model.backbone.layers=[1, 9]"], "from 1 to 1"),
    "wrong type": (["optim.lr=fast"], "'optim.lr' (it is 'fast')"),
    "negative rate": (["optim.lr=-1"], "greater than 0"),
    "mode": (["scenario.mode=overlap"], "'overlapped', 'disjoint', 'sequential' or 'partitioned'"),
    "iterations and epochs": (["train.epochs=2"], "exactly one of train.iterations and train.epochs"),
    "crop no multiple of the patch": (["augment.crop=36"], "not a multiple of 8"),
    "window no multiple of the patch": (
        ["evaluate.inference=slide", "evaluate.window=20", "evaluate.stride=10"],
        "evaluate.window = 20",
    ),
    "batch that does not divide": (["train.accumulate=3"], "does not divide"),
    "class listed twice": (["scenario.order=[1,1,2,3,4,5,6,7,8,9,10]"], "class 1 twice"),
    "classes missing from the order": (["scenario.order=[1,2,3]"], "missing or out of range"),
    "heads that do not divide": (["model.head.heads=3"], "does not divide into 3"),
    "holdout without images": (["evaluate.split=holdout"], "needs data.holdout above 0"),
    "temperature without holdout": (["method.calibration=temperature"], "set data.holdout above 0"),
    "override without value": (["optim.lr"], "section.key=value"),
    "scenario with more classes": (["scenario.name=ade20k-100-50"], "ADE"),
    "weights that are no file": (["model.backbone.checkpoint=/nowhere.pth"], "not a file"),
}


@pytest.mark.parametrize("mistake", RUN_MISTAKES)
def test_a_mistake_in_a_run_is_one_clear_error(cssbench: Cli, camvid: Path, tmp_path: Path, mistake: str):
    changes, expected = RUN_MISTAKES[mistake]
    out = tmp_path / "out"
    done = cssbench("run", "camvid-6-1-segvit-cl", "--data", camvid, "--out", out, *sets(*changes))
    assert done.code == 2
    assert expected in done.err
    assert "Traceback" not in done.err
    assert not out.exists(), "nothing half-written"


DATA_MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "label out of range": (lambda r: write(r / "trainannot/000.png", np.full((48, 64), 12, np.uint8)), "[12]"),
    "image without label": (lambda r: (r / "trainannot/000.png").unlink(), "has no label map"),
    "16-bit label": (lambda r: write(r / "trainannot/000.png", np.zeros((48, 64), np.uint16)), "I;16"),
    "RGB label": (lambda r: write(r / "trainannot/000.png", np.zeros((48, 64, 3), np.uint8)), "'RGB'"),
    "damaged label": (lambda r: (r / "trainannot/000.png").write_bytes(b"\x89PNG\r\n\x1a\nno"), "cannot be read"),
    "empty folder": (lambda r: [p.unlink() for p in (r / "train").iterdir()], "No image"),
    "no test split": (lambda r: shutil.rmtree(r / "test"), "No image"),
    "size mismatch": (lambda r: [write(p, np.zeros((8, 8, 3), np.uint8)) for p in (r / "train").iterdir()], "8x8"),
    "truncated image": (lambda r: [p.write_bytes(p.read_bytes()[:200]) for p in (r / "train").iterdir()], "cannot be"),
}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_a_fault_in_the_data_is_one_clear_error(cssbench: Cli, camvid: Path, tmp_path: Path, mistake: str):
    change, expected = DATA_MISTAKES[mistake]
    root = bad_data(tmp_path, camvid, change)
    done = cssbench("run", "camvid-6-1-segvit-cl", "--data", root, "--out", tmp_path / "out", *sets())
    assert done.code == 2
    assert expected in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out" / "steps").exists(), "no step is half-written"


def scenario_file(folder: Path, **changes: Any) -> Path:
    content = {"dataset": "camvid", "classes": 11, "base": 6, "increment": 5} | changes
    (folder / "own.toml").write_text(tomli_w.dumps(content))
    return folder / "own.toml"


OTHER_MISTAKES: dict[str, tuple[Callable[[Path, Path, Path], list[Any]], str]] = {
    "no recipe of that name": (lambda t, c, r: ["run", "camvid-6-1-segvit", "--out", t / "o"], "camvid-6-1-segvit-cl"),
    "no recipe file": (lambda t, c, r: ["run", t / "none.toml", "--out", t / "o"], "recipe file"),
    "no data root": (lambda t, c, r: ["run", "camvid-6-1-joint", "--out", t / "o"], "--data ROOT"),
    "missing data root": (
        lambda t, c, r: ["run", "camvid-6-1-joint", "--data", t / "x", "--out", t / "o"], "not a folder"),
    "resume of no run": (lambda t, c, r: ["resume", t], "not a run folder"),
    "status of no run": (lambda t, c, r: ["status", t / "x"], "not a run folder"),
    "report of no run": (lambda t, c, r: ["report", t, "--out", t / "o"], "not a run folder"),
    "unknown report": (lambda t, c, r: ["report", r / "finetune", "--out", t / "o", "--kind", "htm"], "'html'"),
    "unknown protocol": (
        lambda t, c, r: ["report", r / "finetune", "--out", t / "o", "--protocol", "plob"], "Known: "),
    "run folder that holds this run": (
        lambda t, c, r: ["run", "camvid-6-1-segvit-cl", "--data", c, "--out", r / "segvit-cl",
                         *sets("scenario.name=camvid-6-5", "method.name=segvit-cl")], "already holds this run"),
    "run folder of another configuration": (
        lambda t, c, r: ["run", "camvid-6-1-segvit-cl", "--data", c, "--out", r / "segvit-cl", *sets("seed=4")],
        "another configuration"),
    "unknown kind to list": (lambda t, c, r: ["list", "colours"], "colours"),
    "unknown command": (lambda t, c, r: ["rum"], "rum"),
    "unknown scenario to show": (lambda t, c, r: ["scenario", "show", "ade20k-100-15"], "ade20k-100-1"),
    "unknown key in a scenario": (
        lambda t, c, r: ["scenario", "show", scenario_file(t, basis=6)], "did you mean 'base'"),
    "increments that do not add up": (
        lambda t, c, r: ["scenario", "show", scenario_file(t, increment=[2, 2])], "add up"),
    "increment that does not divide": (lambda t, c, r: ["scenario", "show", scenario_file(t, increment=2)], "add up"),
    "data and index together": (
        lambda t, c, r: ["scenario", "show", "camvid-6-5", "--data", c, "--index", t], "not both"),
    "index that is no file": (lambda t, c, r: ["scenario", "show", "camvid-6-5", "--index", t / "x"], "cannot be read"),
    "step out of range": (
        lambda t, c, r: ["scenario", "explain", "camvid-6-5", "--image", "000", "--step", "2", "--data", c], "0 to 1"),
    "image that is not there": (
        lambda t, c, r: ["scenario", "explain", "camvid-6-5", "--image", "zzz", "--step", "0", "--data", c], "'zzz'"),
    "data root nobody knows": (lambda t, c, r: ["data", "verify", t], "--dataset"),
    "unknown dataset": (lambda t, c, r: ["data", "verify", c, "--dataset", "camvit"], "'camvid'"),
    "unknown option of a dataset": (
        lambda t, c, r: ["data", "verify", t, "--dataset", "synthetic", "--option", "colour=3"], "colour"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", OTHER_MISTAKES)
def test_a_mistake_on_the_command_line_is_one_clear_error(
    cssbench: Cli, camvid: Path, runs: Path, tmp_path: Path, mistake: str
):
    words, expected = OTHER_MISTAKES[mistake]
    done = cssbench(*words(tmp_path, camvid, runs))
    assert done.code == 2
    assert expected in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "o").exists()


def test_a_full_disk_stops_cleanly_and_the_run_resumes(
    cssbench: Cli, camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from cssbench import checkpoint

    real, out = checkpoint.write_bytes, tmp_path / "out"

    def full(path: Path, content: bytes) -> None:
        if path.parent.name == "01" and path.name == "model.safetensors":
            with monkeypatch.context() as patch:
                patch.setattr(Path, "write_bytes", raise_no_space)
                real(path, content)
        real(path, content)

    def raise_no_space(self: Path, content: bytes) -> int:
        self.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_bytes", full)
        words = ["run", "camvid-6-1-segvit-cl", "--data", camvid, "--out", out, *sets("scenario.name=camvid-6-5")]
        done = cssbench(*words)
    assert done.code == 2
    assert "No space left" in done.err
    assert not list(out.rglob("*.tmp"))
    assert len(RunFolder.read(out).records()) == 1
    assert cssbench("resume", out).code == 0
    assert RunFolder.read(out).finished


def test_demo_runs_reports_and_goes_on_where_it_stopped(cssbench: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = recipes.read_recipe

    def small(name: str) -> dict[str, Any]:
        content = recipes.override(real(name), [c for c in TINY if "short_side" not in c])
        return recipes.override(content, ["data.options.train=30", "data.options.val=4", "augment.crop=64"])

    monkeypatch.setattr(recipes, "read_recipe", small)
    done = cssbench("demo", "--out", tmp_path / "demo")
    assert done.code == 0, done.err
    assert "segvit-cl" in done.out
    assert (tmp_path / "demo" / "report" / "report.html").exists()
    assert cssbench("demo", "--out", tmp_path / "demo").code == 0
