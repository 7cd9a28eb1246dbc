"""The scripts of `examples/`: short, and they do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from fabricated import fabricate, fabricate_oracle
from PIL import Image

from cssbench.results import RunFolder

pytestmark = pytest.mark.usefixtures("_one_thread")
FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
TINY = ("train.iterations=1", "train.batch_size=4")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_say_how_to_run_them(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert re.search(rf"^    python examples/{path.name}|pip install", text, re.M)


def test_own_scenario(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script("own_scenario").own_scenario(tmp_path, "data.options={classes=12,train=12,val=4}", *TINY)
    run = RunFolder.read(tmp_path / "run")
    assert run.finished
    assert run.groups == [[12, 11, 10, 9, 8, 7], [6, 5, 4, 3], [2, 1]]
    assert "partitioned, step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_own_method_with_its_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script("own_method").own_method(tmp_path, "data.options.train=12", "data.options.val=4", *TINY)
    assert RunFolder.read(tmp_path / "run").finished
    out = capsys.readouterr().out
    kept, of = re.match(r"(\d+) of (\d+) promises kept", out).groups()  # type: ignore[union-attr]
    assert kept == of


def test_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = script("own_method")
    monkeypatch.setattr(module, "conformance", lambda method, model: [])
    module.own_method(tmp_path, "data.options.train=12", "data.options.val=4", *TINY)
    assert RunFolder.read(tmp_path / "run").finished


def test_results_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fabricate(tmp_path / "runs" / "a")
    fabricate_oracle(tmp_path / "runs" / "joint")
    table = script("read_results").read_results(tmp_path / "runs")
    assert table[("mmseg150@1", "incremental")].tolist() == [pytest.approx(10 / 15)]
    script("custom_figure").custom_figure(tmp_path / "runs", tmp_path / "own.png")
    with Image.open(tmp_path / "own.png") as picture:
        assert picture.size[0] > 500
    assert "forgetting of the base classes" in capsys.readouterr().out
