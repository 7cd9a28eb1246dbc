"""Packages of strangers: the example is installed and run; what is wrong with others stops nothing else."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import GOOD, TINY, Command, Install, forget, package

from cssbench import protocol, registry
from cssbench.errors import PluginError, UnknownNameError
from cssbench.results import RunFolder

EXAMPLE = Path(__file__).parents[1] / "examples" / "cssbench-example-method"


# --- the example package -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH, into which pip installed the example package without a network."""
    copy, target = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    words = [sys.executable, "-m", "pip", "install", *options, "--target", target, copy]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return target


def shell(site: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with the packages at `site`."""
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
    command = [sys.executable, "-m", "cssbench", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_example_is_listed_as_another_distribution(example: Path):
    for kind, name in (("methods", "earned-trust"), ("recipes", "synthetic-10-5-earned-trust-linear")):
        done = shell(example, "list", kind)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(rf"^ {name} +cssbench-example-method ", done.stdout, re.M)
        assert re.search(r"^ [\w-]*finetune[\w-]* +cssbench ", done.stdout, re.M)


def test_the_example_runs_and_resumes_to_the_same_numbers(example: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["run", "synthetic-10-5-earned-trust-linear", "--data", tmp_path / "data", "--out", whole, *TINY]
    done = shell(example, *words)
    assert done.returncode == 0, done.stderr
    assert RunFolder.read(whole).finished
    shutil.copytree(whole, cut)
    for step in (1, 2):
        shutil.rmtree(cut / "steps" / f"0{step}")
    done = shell(example, "resume", cut)
    assert done.returncode == 0, done.stderr
    for a, b in zip(RunFolder.read(whole).records(), RunFolder.read(cut).records(), strict=True):
        assert a.content["sha256"] == b.content["sha256"], "weights, state and matrices are the same to the last bit"


@pytest.fixture
def earned_trust(example: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(example))
    return importlib.import_module("cssbench_example_method.earned_trust")


def test_earned_thresholds_by_hand(earned_trust: Any):
    right = torch.tensor([[0, 1, 3, 4], [0, 0, 0, 1], [0, 0, 0, 0]])
    total = torch.tensor([[5, 2, 4, 4], [0, 0, 0, 2], [0, 0, 0, 0]])
    # class 0, from the last bin down: 4/4, 7/8, 8/10, 8/15; class 1: half right; class 2: never predicted
    for precision, expected in ((1.0, [0.75, 2, 2]), (0.85, [0.5, 2, 2]), (0.8, [0.25, 2, 2]), (0.5, [0, 0, 2])):
        assert earned_trust.earned_thresholds(right, total, precision).tolist() == expected


def test_background_is_relabelled_where_the_claim_is_trusted(earned_trust: Any):
    method = earned_trust.EarnedTrust()
    method.thresholds = torch.tensor([0.0, 0.9, 0.5])
    chance = torch.tensor([[0.8, 0.1, 0.1], [0.05, 0.92, 0.03], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6]])
    labels = torch.tensor([0, 0, 0, 0, 3]).reshape(1, 1, 5)
    found = method.relabel(labels, chance.log().T.reshape(1, 3, 1, 5))
    assert found.flatten().tolist() == [0, 1, 255, 2, 3]  # background, trusted, doubted, trusted, new class
    assert labels.flatten().tolist() == [0, 0, 0, 0, 3]


# --- packages that are made up -----------------------------------------------------------------------------------


def test_two_strangers_with_one_name_are_both_named_and_neither_wins(install: Install, command: Command):
    install("first-pack", {"methods": {"mine": "a.b:C"}})
    install("second-pack", {"methods": {"mine": "x.y:Z", "other": "json:dumps"}})
    with pytest.raises(PluginError) as caught:
        registry.load("methods", "mine")
    message = str(caught.value)
    assert "claims the name 'mine': 'first-pack' (a.b:C) and 'second-pack' (x.y:Z)" in message
    assert "Rename all but one" in message
    assert registry.load("methods", "other").__name__ == "dumps", "its other parts stay in use"
    code, out, err = command("list", "methods")
    assert code == 0
    assert "finetune" in out
    assert "mine" not in out
    assert message in err


def test_a_stranger_never_replaces_a_part_of_ours(install: Install, command: Command, tmp_path: Path):
    files = {"thief.py": "raise RuntimeError('must not be imported')", "thief_recipes/__init__.py": ""}
    files["thief_recipes/demo-joint.toml"] = "note = 'x'"
    install("thief", {"methods": {"finetune": "thief:Mine"}, "recipes": {"thief": "thief_recipes"}}, files)
    assert registry.load("methods", "finetune").__module__ == "cssbench.baselines.finetune"
    assert registry.toml_files("recipes")["demo-joint"][0] == "cssbench"
    for kind, name, where in (
        ("method", "finetune", "thief:Mine"),
        ("recipe", "demo-joint", "demo-joint.toml of thief_re"),
    ):
        code, out, err = command("list", f"{kind}s")
        assert code == 0
        assert name in out
        assert f"Warning: The {kind} {name!r} of the distribution 'thief' ({where}" in err
        assert "Rename it there, or uninstall it with `pip uninstall thief`." in err


def test_one_distribution_found_twice_is_no_clash(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An editable install leaves metadata in the checkout and in site-packages."""
    info = install("pack", {"methods": {"mine": "json:dumps"}})
    shutil.copytree(info, tmp_path / "elsewhere" / info.name)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    forget()
    assert registry.load("methods", "mine").__name__ == "dumps"
    assert registry.catalogue("methods").complaints == []


@pytest.mark.parametrize(
    ("source", "value", "said"),
    [
        (
            "x = 1\nraise RuntimeError('out of order')",
            "broken:Thing",
            r"RuntimeError: out of order \(line 2 of .*broken\.py",
        ),
        ("import not_there_at_all", "broken:Thing", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("def f(:", "broken:Thing", "SyntaxError: .*broken.py, line 1"),
        ("", "broken:Thing", "AttributeError: .*no attribute 'Thing'"),
    ],
)
def test_a_part_that_cannot_be_imported_names_its_distribution(
    install: Install, command: Command, tmp_path: Path, source: str, value: str, said: str
):
    install("bad-pack", {"methods": {"bad": value, "good": "fine:Mine"}}, {"broken.py": source, "fine.py": GOOD})
    expected = rf"The method 'bad' of the distribution 'bad-pack' cannot be imported from '{value}': {said}"
    with pytest.raises(PluginError, match=expected) as caught:
        registry.load("methods", "bad")
    assert "pip uninstall bad-pack" in str(caught.value)
    assert registry.load("methods", "good"), "a broken part fails alone"
    assert command("list", "methods")[0] == 0


def test_a_module_that_is_gone_is_told_by_list_without_an_import(install: Install, command: Command):
    install("left-over", {"methods": {"gone": "not_there_at_all.sub:Thing"}})
    code, out, err = command("list", "methods")
    assert code == 0
    assert "gone" in out
    assert "The method 'gone' of the distribution 'left-over' is declared to be" in err
    assert "no module 'not_there_at_all' is installed" in err


METADATA = {
    "entry points that cannot be parsed": ("[cssbench.methods]\nmine\n", "", "are damaged"),
    "no name": ("[cssbench.methods]\nmine = a:B\n", "Metadata-Version: 2.1\n", "its name is None"),
    "a command as the name": ("[cssbench.methods]\nmine = a:B\n", "Name: x; rm -rf ~\n", "its name is 'x; rm -rf ~'"),
    "a group that does not exist": ("[cssbench.method]\nmine = a:B\n", "", "Did its author mean 'cssbench.methods'?"),
    "a path as a name": ("[cssbench.methods]\n../../mine = a:B\n", "", "calls a method '../../mine' (a:B)"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_damaged_metadata_hide_nothing_else(install: Install, command: Command, kind: str):
    text, metadata, said = METADATA[kind]
    install("odd-pack", text, metadata=metadata)
    code, out, err = command("list", "methods")
    assert code == 0
    assert "segvit-cl" in out
    assert "mine" not in out
    assert said in err
    assert "odd" in err, "it says which package"


def test_files_of_strangers_stand_beside_ours(install: Install, command: Command):
    install("pack-a", {"scenarios": {"all": "toml_a"}}, package("toml_a", one='description = "[/b] \\u001b[2J one"'))
    install("pack-b", {"scenarios": {"all": "toml_b"}}, package("toml_b", two="classes = 2", broken="classes = "))
    assert registry.read_toml("scenarios", "two") == {"classes": 2}
    code, out, err = command("list", "scenarios")
    assert code == 0
    for name, distribution in (("one", "pack-a"), ("two", "pack-b"), ("camvid-6-1", "cssbench")):
        assert re.search(rf"^ {name} +{distribution} ", out, re.M)
    assert "[/b] [2J one" in out, "neither markup nor a command to the terminal"
    assert "Warning: The scenario 'broken' of the distribution 'pack-b' is not valid TOML" in err
    with pytest.raises(PluginError, match=r"The scenario 'broken' of the distribution 'pack-b' is not valid TOML"):
        registry.read_toml("scenarios", "broken")
    with pytest.raises(UnknownNameError, match=r"no scenario named 'tow'\. Did you mean 'two'"):
        registry.read_toml("scenarios", "tow")


def test_one_file_name_of_two_strangers_is_nobodys(install: Install, command: Command):
    install("pack-c", {"recipes": {"c": "toml_c"}}, package("toml_c", same="a = 1", mine="a = 3"))
    install("pack-d", {"recipes": {"d": "toml_d"}}, package("toml_d", same="a = 2"))
    assert registry.read_toml("recipes", "mine") == {"a": 3}
    said = "the name 'same': 'pack-c' (same.toml of toml_c) and 'pack-d' (same.toml of toml_d)"
    with pytest.raises(PluginError) as caught:
        registry.read_toml("recipes", "same")
    assert said in str(caught.value)
    assert said in command("list", "recipes")[2]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "json:dumps",
            "'odd' of the distribution 'odd-pack' must name a package that holds TOML files, not 'json:dumps'",
        ),
        ("broken_recipes", "The recipe 'odd' of the distribution 'odd-pack' cannot be imported from 'broken_recipes'"),
    ],
)
def test_a_broken_package_of_recipes_stops_no_other_recipe(install: Install, command: Command, value: str, said: str):
    install("odd-pack", {"recipes": {"odd": value}}, {"broken_recipes/__init__.py": "import not_there_at_all"})
    assert registry.read_toml("recipes", "demo-joint")["scenario"]
    code, out, err = command("list", "recipes")
    assert code == 0
    assert "demo-joint" in out
    assert said in err
    with pytest.raises(UnknownNameError, match="`cssbench list recipes` says what is wrong"):
        registry.read_toml("recipes", "its-recipe")


PROTOCOL = (
    "from dataclasses import replace\nfrom cssbench.protocol import BUILT_IN\n"
    "mine = replace(BUILT_IN[0], name='mine')\nstolen = (replace(BUILT_IN[0], version=9, summary='stolen'), mine)\n"
)


def test_protocols_of_strangers(install: Install, command: Command):
    install(
        "thief",
        {"protocols": {"x": "proto_a:stolen", "y": "json:dumps", "z": "not_there_at_all:p"}},
        {"proto_a.py": PROTOCOL},
    )
    ours = [p.id for p in protocol.BUILT_IN]
    assert list(protocol.protocols()) == [*ours, "mine@1"], "ours first"
    assert protocol.get(protocol.BUILT_IN[0].name) == protocol.BUILT_IN[0], "no newer version of ours either"
    code, out, err = command("list", "protocols")
    assert code == 0
    assert "stolen" not in out
    assert f"'{protocol.BUILT_IN[0].name}@9' of the distribution 'thief' is not used" in err
    assert "The protocol 'y' of the distribution 'thief' is <function dumps" in err
    assert "The protocol 'z' of the distribution 'thief' cannot be imported" in err
