"""What strangers bring is named and skipped, never run by `cssbench list`; none of their names becomes a path."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from fabricated import fabricate
from PIL import Image
from strangers import Command, Install, package

from cssbench import profile, registry
from cssbench.data import presence, stored
from cssbench.data.base import SegDataset
from cssbench.data.folder import Folder
from cssbench.errors import DataError, PluginError, RunError
from cssbench.reports.formats import file_part, file_parts
from cssbench.results import RunFolder, image_name, safe_name, write_json

HARM = {
    "raises": ("raise RuntimeError('broken')", "RuntimeError: broken"),
    "exits": ("import sys; sys.exit(7)", "SystemExit: 7"),
    "raises past Exception": ("class E(BaseException): pass\nraise E('past')", "E: past"),
    "imports what is not there": ("import not_there_at_all", "ModuleNotFoundError"),
    "is no Python": ("def f(:", "SyntaxError"),
    "nests without end": ("def f(): f()\nf()", "RecursionError"),
}
TOML_GROUPS = ("scenarios", "recipes", "presets", "suites")
IMPORTED = (*TOML_GROUPS, "protocols")  # groups whose packages `list` imports
NOT_IMPORTED = ("methods", "models", "datasets", "reports")


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("group", IMPORTED)
def test_a_broken_plug_in_is_named_and_skipped(install: Install, command: Command, group: str, harm: str):
    source, said = HARM[harm]
    value = "harmful:thing" if group == "protocols" else "harmful"
    files = {"harmful/__init__.py": source, **package("sound_toml", sound='description = "sound"')}
    entries = {group: {"bad": value} | ({"good": "sound_toml"} if group in TOML_GROUPS else {})}
    install("harm-pack", entries, files)
    code, out, err = command("list", group)
    assert code == 0
    assert "cssbench" in out or "plop@1" in out, "ours are listed"
    assert ("sound" in out) == (group in TOML_GROUPS), "its other parts are listed"
    assert f"{group.removesuffix('s')} 'bad' of the distribution 'harm-pack' cannot be imported" in err
    assert said in err
    assert "pip uninstall harm-pack" in err


@pytest.fixture
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own models are not counted, which takes long."""
    monkeypatch.setattr(profile, "typical_cost", lambda name: (10**6, 1.0))


@pytest.mark.usefixtures("_cheap")
@pytest.mark.parametrize("group", NOT_IMPORTED)
def test_list_imports_no_method_model_data_set_or_report(
    install: Install, command: Command, tmp_path: Path, group: str
):
    mark = tmp_path / "mark"
    install("run-pack", {group: {"mine": "marker:Mine"}}, {"marker.py": f"open({str(mark)!r}, 'w').close()"})
    code, out, err = command("list", group)
    assert (code, "mine" in out, "run-pack" in out) == (0, True, True)
    assert not mark.exists(), "nothing of it was run"
    assert "cannot be" not in err
    with pytest.raises(PluginError, match="no attribute 'Mine'"):
        registry.load(group, "mine")
    assert mark.exists()


@pytest.mark.usefixtures("_cheap")
def test_list_builds_no_model_of_a_stranger_through_a_preset(install: Install, command: Command, tmp_path: Path):
    mark = tmp_path / "mark"
    preset = 'name = "theirs"\n'
    files = {"marker.py": f"open({str(mark)!r}, 'w').close()", **package("their_presets", preset_of_theirs=preset)}
    install("run-pack", {"models": {"theirs": "marker:M"}, "presets": {"p": "their_presets"}}, files)
    code, out, _ = command("list", "models")
    assert (code, mark.exists()) == (0, False)
    assert re.search(r"^ preset_of_theirs +run-pack +- +- ", out, re.M)
    assert "`cssbench profile NAME` runs its code to count it" in out


@pytest.mark.parametrize("group", IMPORTED)
def test_what_an_import_prints_is_no_output_of_ours(install: Install, command: Command, group: str):
    value = "noisy:thing" if group == "protocols" else "noisy"
    install("noisy-pack", {group: {"x": value}}, {"noisy/__init__.py": "print('{\"json\": 1}')\nthing = 1"})
    code, out, err = command("list", group)
    assert code == 0
    assert "json" not in out
    assert "json" in err


SUBCLASS = """
class Mine(Protocol):
    @property
    def id(self): raise RuntimeError('run')
mine = Mine(**vars(BUILT_IN[0]))
"""
ODD_PROTOCOLS = {
    "a subclass": SUBCLASS,
    "a name that is none": "mine = replace(BUILT_IN[0], name=3)",
    "a summary that is none": "mine = replace(BUILT_IN[0], name='mine', summary=['x'])",
    "a version that is none": "mine = replace(BUILT_IN[0], name='mine', version='1')",
}


@pytest.mark.parametrize("kind", ODD_PROTOCOLS)
def test_protocols_that_are_none(install: Install, command: Command, kind: str):
    head = "from dataclasses import replace\nfrom cssbench.protocol import BUILT_IN, Protocol\n"
    install("odd-pack", {"protocols": {"mine": "odd_protocol:mine"}}, {"odd_protocol.py": head + ODD_PROTOCOLS[kind]})
    code, out, err = command("list", "protocols")
    assert (code, "plop@1" in out) == (0, True)
    assert "The protocol 'mine' of the distribution 'odd-pack' is " in err


# --- names that would be paths -----------------------------------------------------------------------------------

PATHS = ("../../out", "/etc/out", "a/b", "..", ".", "", "a\\b", "a\nb", "~", "C:out", "-rf" * 60, "é" * 300)


@pytest.mark.parametrize("name", PATHS)
def test_no_name_leaves_its_folder(name: str, tmp_path: Path):
    for made in (image_name(name), *file_parts([f"x{name}", f"x{name}y"]).values()):
        assert (tmp_path / made).resolve().parent == tmp_path.resolve()
        assert len(made) < 160
    if name not in ("~", "-rf" * 60):
        with pytest.raises(RunError):
            safe_name(name)
    assert "/" not in file_part(name)


@pytest.mark.parametrize("split", ["../../out", "/out", "a/b", "..", "", "x" * 300])
def test_splits_of_a_folder_data_set_are_plain_names(tmp_path: Path, split: str):
    (tmp_path / "dataset.toml").write_text(
        f'classes = ["a"]\n[splits.{split!r}]\nimages = "x"\nlabels = "y"\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match="is not valid"):
        Folder(tmp_path)


class Odd(SegDataset):
    """A stranger's data set whose name and split are paths."""

    name = "../../out"
    classes = ("a", "b")
    palette = np.zeros((2, 3), np.uint8)
    splits = ("../../../train",)

    def layout(self) -> str:
        return "x and y."

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root / "x", self.root / "y"


def test_names_of_a_stranger_s_data_set_stay_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache, root = tmp_path / "deep" / "er" / "cache", tmp_path / "data"
    monkeypatch.setenv("CSSBENCH_CACHE", str(cache))
    for folder, array in (("x", np.zeros((8, 8, 3))), ("y", np.ones((8, 8)))):
        (root / folder).mkdir(parents=True)
        Image.fromarray(array.astype(np.uint8)).save(root / folder / "a.png")
    source = Odd(root)
    before = {p for p in tmp_path.rglob("*") if cache not in p.parents}
    presence.build(source, source.splits[0], progress=False)
    stored.StoredDataset(source, 4).fill([(source.splits[0], "a")], 1.0)
    made = [p for p in cache.rglob("*") if p.is_file()]
    assert len(made) >= 2, "an index and a stored image"
    assert {p for p in tmp_path.rglob("*") if cache not in p.parents} - before <= {cache, *cache.parents}


@pytest.mark.parametrize("name", ["../../../config.toml", "/etc/passwd", "a/../b", "..", ""])
def test_file_names_in_a_record_never_leave_the_step(tmp_path: Path, name: str):
    run = fabricate(tmp_path / "run")
    record = run.records()[1]
    write_json(record.folder / "record.json", record.content | {"sha256": {name: "0" * 64}})
    again = RunFolder.read(tmp_path / "run")
    with pytest.raises(RunError, match="cannot be used as a file name"):
        again.verify(again.records()[1])


# --- words that would be commands to the terminal ----------------------------------------------------------------

ESCAPES = "\x1b[2J\x1b]0;title\x07 \r evil [bold]"


def test_control_characters_of_strangers_reach_no_terminal(command: Command, tmp_path: Path):
    run = fabricate(tmp_path / "run")
    path = run.path / "scenario.json"
    scene = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, scene | {"name": f"toy{ESCAPES}", "classes": [ESCAPES, "tree", "car"]})
    root = tmp_path / "data"
    root.mkdir()
    (root / "dataset.toml").write_text(tomli_w.dumps({"classes": [ESCAPES], "splits": {ESCAPES: {}}}), encoding="utf-8")
    for words in (
        ["status", run.path], ["rescore", run.path, "--protocol", "plop"], ["data", "verify", root],
        ["scenario", "show", f"no{ESCAPES}"], ["list", "methods"],
    ):  # fmt: skip
        _, out, err = command(*words)
        assert "\x1b" not in out + err, words
        assert "\x07" not in out + err, words
    assert "[bold]" in command("rescore", run.path, "--protocol", "plop")[1], "nor is it markup"
