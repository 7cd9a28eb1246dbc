"""What a suite's TOML stands for: its runs, their names and settings, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cssbench import registry
from cssbench.errors import ConfigError, UnknownNameError
from cssbench.results import safe_name
from cssbench.suites import spec

BASIC: dict[str, Any] = {
    "recipe": "camvid-6-1-finetune-linear",
    "methods": ["finetune", "mib"],
    "scenarios": ["camvid-6-1", "camvid-6-5"],
}


def runs(**changes: Any) -> dict[str, spec.SuiteRun]:
    return {run.id: run for run in spec.runs(spec.parse(BASIC | changes, "Suite 'test'"), "test")}


def test_a_suite_is_the_product_of_its_lists():
    found = runs(seeds=[0, 3], orders=["native", 7])
    assert len(found) == 2 * 2 * 2 * 2
    run = found["mib_camvid-6-5_vit-linear_s3_o7"]
    assert (run.config.method.name, run.config.scenario.name, run.config.seed) == ("mib", "camvid-6-5", 3)
    assert run.config.scenario.order == 7
    assert found["mib_camvid-6-5_vit-linear_s3"].config.scenario.order is None


def test_names_are_safe_and_stay_when_the_suite_grows():
    small = runs()
    grown = runs(
        methods=["plop", "finetune", "mib"],
        scenarios=["camvid-6-5", "camvid-6-1"],
        seeds=[5, 0],
        orders=["native", [11, *range(1, 11)]],
        models=["segvit", "vit-linear"],
        oracle={},
        set={"model": {"backbone": {"name": "vit_tiny_patch16_224"}}},
    )
    assert small.keys() < grown.keys()
    assert all(safe_name(name) == name for name in grown)


def test_settings_are_laid_over_each_other_from_all_runs_to_one_method():
    found = runs(
        set={"train": {"batch_size": 2, "iterations": 7}, "optim": {"lr": 0.1}},
        scenario={"camvid-6-5": {"set": {"train": {"iterations": 9}, "optim": {"lr": 0.2}}}},
        method={"mib": {"set": {"method": {"weight": 3.0}, "optim": {"lr": 0.3}}}},
    )

    def told(name: str) -> tuple[Any, ...]:
        config = found[f"{name}_vit-linear_s0"].config
        return config.train.batch_size, config.train.iterations, config.optim.lr

    assert told("finetune_camvid-6-1") == (2, 7, 0.1)
    assert told("finetune_camvid-6-5") == (2, 9, 0.2)
    assert told("mib_camvid-6-5") == (2, 9, 0.3)
    assert found["mib_camvid-6-1_vit-linear_s0"].config.method.options == {"weight": 3.0}


def test_a_method_may_have_a_recipe_and_a_label_of_its_own():
    found = runs(
        methods=["mib", "mib-100"],
        method={
            "mib": {"recipe": "camvid-6-1-mib-linear"},
            "mib-100": {"name": "mib", "set": {"method": {"weight": 100.0}}},
        },
    )
    weights = [found[f"{m}_camvid-6-1_vit-linear_s0"].config.method for m in ("mib", "mib-100")]
    assert [(one.name, one.options["weight"]) for one in weights] == [("mib", 10.0), ("mib", 100.0)]


def test_one_oracle_for_each_model_and_seed():
    found = runs(seeds=[0, 1], orders=["native", 1], oracle={"recipe": "camvid-6-1-joint-linear"})
    oracles = {name: run for name, run in found.items() if run.oracle}
    assert list(oracles) == ["oracle_camvid-joint_vit-linear_s0", "oracle_camvid-joint_vit-linear_s1"]
    config = oracles["oracle_camvid-joint_vit-linear_s1"].config
    assert (config.scenario.name, config.seed, config.train.iterations) == ("camvid-joint", 1, 1300)
    assert not any(run.oracle for run in runs().values())


def test_models_replace_the_recipes():
    section = {"name": "segvit", "set": {"model": {"head": {"width": 32}}}}
    found = runs(models=["vit-linear", "narrow"], model={"narrow": section})
    assert {run.model for run in found.values()} == {"vit-linear", "narrow"}
    config = found["mib_camvid-6-1_narrow_s0"].config
    assert config.model.name == "segvit"
    assert config.model.options["head"] == {"width": 32}


def test_paths_are_relative_to_the_suite(tmp_path: Path):
    (tmp_path / "mine.toml").write_text('extends = "camvid-6-1-finetune-linear"\n[train]\nbatch_size = 3\n')
    (tmp_path / "cut.toml").write_text('dataset = "camvid"\nclasses = 11\nbase = 9\nincrement = 2\n')
    (tmp_path / "base.toml").write_text('recipe = "mine.toml"\nmethods = ["mib"]\nscenarios = ["x"]\nseeds = [4]\n')
    path = tmp_path / "suite.toml"
    path.write_text('extends = "base.toml"\nscenarios = ["cut.toml"]\n')
    (run,) = spec.runs(spec.read_suite(str(path)), str(path), data=tmp_path)
    assert run.id == "mib_cut_vit-linear_s4"
    assert run.config.scenario.name == str((tmp_path / "cut.toml").resolve())
    assert (run.config.train.batch_size, run.config.data.root) == (3, str(tmp_path.resolve()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metods": ["mib"]}, ["'metods'", "'methods'"]),
        ({"method": {"mib": {"recpie": "x"}}}, ["recpie", "recipe"]),
        ({"method": {"mbi": {}}}, ["[method.mbi]", "'mib'"]),
        ({"scenario": {"camvid-6-2": {}}}, ["camvid-6-2", "camvid-6-1"]),
        ({"methods": []}, ["'methods'"]),
        ({"methods": ["mib", "mib"]}, ["'mib' twice"]),
        ({"seeds": [0, 0]}, ["0 twice"]),
        ({"orders": ["random"]}, ["orders"]),
        ({"set": {"seed": 1}}, ["set.seed", "'seeds'"]),
        ({"set": {"scenario": {"name": "camvid-6-5"}}}, ["set.scenario.name", "'scenarios'"]),
        ({"oracle": {"set": {"model": {"name": "segvit"}}}}, ["[oracle]", "'models'"]),
        ({"set": {"train": {"batchsize": 4}}}, ["'train.batchsize'", "batch_size", "finetune on camvid-6-1"]),
        ({"methods": ["x/y", "x_y"], "method": {m: {"name": "mib"} for m in ("x/y", "x_y")}}, []),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes: dict[str, Any], words: list[str]):
    if not words:
        assert len(runs(**changes)) == 4  # labels that are no file names are spelled so that they stay apart
        return
    with pytest.raises(ConfigError) as error:
        runs(**changes)
    assert all(word in str(error.value) for word in words), error.value


def test_two_runs_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two runs called"):
        runs(methods=["MiB", "mib"], method={"MiB": {"name": "mib"}})


def test_unknown_names_are_found_before_anything_runs():
    with pytest.raises(UnknownNameError, match="ade20k-vit-linear"):
        spec.read_suite("ade20k-vitlinear")
    with pytest.raises(UnknownNameError, match="camvid-6-1-finetune-linear"):
        runs(recipe="camvid-6-1-finetune-liner")


def test_the_oracle_needs_a_scenario_of_all_classes(tmp_path: Path):
    (tmp_path / "cut.toml").write_text('dataset = "folder"\nclasses = 4\nbase = 2\nincrement = 2\n')
    with pytest.raises(ConfigError, match="folder-joint"):
        runs(scenarios=[str(tmp_path / "cut.toml")], oracle={})


@pytest.mark.parametrize("name", sorted(n for n, (d, _) in registry.toml_files("suites").items() if d == "cssbench"))
def test_every_installed_suite_is_valid_and_states_its_command(name: str):
    assert spec.runs(spec.read_suite(name), name)
    header = (Path(__file__).parents[1] / "baselines" / "suites" / f"{name}.toml").read_text().split("\n\n")[0]
    assert f"cssbench suite run {name} --data" in header


def test_suites_are_listed(command: Callable[..., tuple[int, str, str]]):
    code, printed, _ = command("list", "suites")
    assert code == 0
    assert "camvid-linear" in printed
