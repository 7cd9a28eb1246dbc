"""What a first user meets: completion, data roots from the environment, errors that name the next command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fabricated import fabricate
from strangers import Command

from cssbench.cli import complete


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds runs/a, runs/b and a folder of notes."""
    for name in ("a", "b"):
        fabricate(tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_completion_of_names():
    assert complete.recipe("camvid-6-5-m") == ["camvid-6-5-mib-atm", "camvid-6-5-mib-linear"]
    assert complete.scenario("ade20k-100-5") == ["ade20k-100-5", "ade20k-100-50"]
    assert complete.method("seg") == ["segvit-cl"]
    assert {"segvit", "segvit-b"} <= set(complete.model("segvit"))
    assert complete.protocol("plop") == ["plop@1"]
    assert complete.method("nobody") == []


def test_completion_of_run_folders(runs: Path):
    assert complete.run_folder("") == ["runs/"]
    assert complete.run_folder("runs/") == ["runs/a", "runs/b", "runs/notes/"]
    assert complete.run_folder("runs/b") == ["runs/b"]
    assert complete.run_folder("nowhere/x") == []


def test_completion_of_paths_to_recipes(runs: Path):
    (runs / "mine.toml").write_text("")
    assert complete.recipe("./m") == ["./mine.toml"]
    assert complete.recipe("./") == ["./mine.toml", "./runs/"]


def test_the_shell_is_answered_without_torch(runs: Path):
    """As bash asks; what is typed is `cssbench status runs/`."""
    code = "import sys; from cssbench.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    typed = {"_CSSBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "cssbench status runs/", "COMP_CWORD": "2"}
    environment = os.environ | typed | {"PYTHONPATH": ""}
    words = [sys.executable, "-c", f"import sys; sys.argv = ['cssbench']\n{code}"]
    answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert answer.stdout.split() == ["runs/a", "runs/b", "runs/notes/"], answer.stderr


def test_a_data_root_comes_from_the_environment(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CSSBENCH_DATA_CAMVID", str(tmp_path / "here"))
    _, _, said = command("run", "camvid-6-1-finetune", "--out", tmp_path / "run")
    assert f"{tmp_path / 'here'}' is not a folder" in said
    _, _, said = command("run", "camvid-6-1-finetune", "--out", tmp_path / "run", "--data", tmp_path / "there")
    assert f"{tmp_path / 'there'}' is not a folder" in said, "what is given wins"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run camvid-6-1 --out x --data .", "`cssbench run RECIPE --scenario camvid-6-1` runs one on that scenario"),
        ("run nothing --out x", "`cssbench list recipes` shows all"),
        ("run ade20k-mib-segvit --out x", "`cssbench data fetch ade20k --root ROOT` downloads it"),
        ("run demo-finetune --out x", "or set CSSBENCH_DATA_SYNTHETIC"),
        ("status runs", "Below it lie a, b: name one."),
        ("status elsewhere", "`cssbench run` makes one."),
    ],
)
def test_an_error_names_the_next_command(runs: Path, command: Command, words: str, said: str):
    code, _, err = command(*words.split())
    assert code == 2
    assert said in err
    assert not (runs / "x").exists()
