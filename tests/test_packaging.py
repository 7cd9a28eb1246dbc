"""What pyproject.toml ships must be what the checkout holds."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from cssbench import config, experiment, recipes, registry, scenario

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_folder_is_listed():
    folders = {"cssbench": "cssbench"} | {f"cssbench.{n}": n for n in ("scenarios", "baselines", "reports")}
    on_disk = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for name, folder in folders.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == on_disk


def test_mypy_checks_every_package():
    checked = PROJECT["tool"]["mypy"]["packages"]  # with all that lies in these folders, but not in mapped ones
    assert set(SETUPTOOLS["package-dir"]) == {*checked, "cssbench.baselines.recipes", "cssbench.baselines.suites"}


def test_every_data_file_is_shipped():
    patterns = SETUPTOOLS["package-data"]
    homes = {"cssbench/data": "cssbench.data", "scenarios": "cssbench.scenarios", "reports": "cssbench.reports"}
    homes["reports/published"] = "cssbench.reports"
    homes["baselines/recipes"] = "cssbench.baselines.recipes"
    homes["baselines/suites"] = "cssbench.baselines.suites"
    for folder, package in homes.items():
        for file in (ROOT / folder).iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert any(file.match(pattern) for pattern in patterns[package]), file


def test_installed_entry_points_are_those_of_the_checkout():
    for group, parts in PROJECT["project"]["entry-points"].items():
        installed = {e.name: e.value for e in entry_points(group=group) if e.dist and e.dist.name == "cssbench"}
        assert installed == parts, f"{group}: run `pip install -e .` again"


@pytest.mark.parametrize("group", ["methods", "models", "datasets", "reports", "tools"])
def test_every_part_loads(group: str):
    for name in registry.parts(group):
        assert callable(registry.load(group, name))


@pytest.mark.parametrize("name", sorted(scenario.names()))
def test_every_scenario_is_valid_and_has_its_dataset(name: str):
    scene = scenario.load(name)
    assert scene.dataset in registry.parts("datasets")
    assert sorted(scene.order) == list(range(1, 1 + scene.num_classes))


@pytest.mark.parametrize("name", sorted(n for n, (d, _) in registry.toml_files("recipes").items() if d == "cssbench"))
def test_every_recipe_resolves_and_states_its_command(name: str):
    resolved = experiment.resolve(config.validate(recipes.read_recipe(name), name))
    assert resolved.scenario.name in scenario.names()
    header = (ROOT / "baselines" / "recipes" / f"{name}.toml").read_text().split("\n\n")[0]
    assert re.search(rf"^# Command: .*\b{name}\b", header, re.M), "the header gives the command"
    assert "# Source:" in header


def test_the_constraints_hold_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][A-Za-z0-9.]*", line) for line in pins)
    pinned = {line.split("==")[0].lower() for line in pins}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    assert {re.split(r"[<>=\[]", need)[0].lower() for need in wanted} <= pinned
