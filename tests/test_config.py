"""Recipes: what is refused and with which hint, overrides, the round trip through TOML, and the names in a recipe."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from typing import Any, Literal

import pytest
from pydantic import Field

from cssbench import config, registry
from cssbench.config import PartChoice, RunConfig, Section, part_config, plain, validate
from cssbench.errors import ConfigError, UnknownNameError
from cssbench.experiment import make_method, make_model, resolve
from cssbench.recipes import override

RECIPE: dict[str, Any] = {
    "scenario": {"name": "synthetic-10-5"},
    "method": {"name": "finetune"},
    "model": {"name": "segvit"},
    "train": {"iterations": 5},
}


def made(*changes: str) -> RunConfig:
    return validate(override(RECIPE, list(changes)), "The recipe")


def complaint(*changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        made(*changes)
    assert str(caught.value).startswith("The recipe is not valid: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("modell.name='x'", "unknown key 'modell' (did you mean 'model' or 'method'?)"),
        ("train.batchsize=3", "unknown key 'train.batchsize' (did you mean 'batch_size'?)"),
        ("augment.crops=3", "unknown key 'augment.crops' (did you mean 'crop'?)"),
        # in another section
        ("train.weight_decay=3", "unknown key 'train.weight_decay' (did you mean 'optim.weight_decay'?)"),
        ("batch_size=3", "unknown key 'batch_size' (did you mean 'train.batch_size'?)"),
        ("crop=3", "unknown key 'crop' (did you mean 'augment.crop' or 'evaluate.crop'?)"),
        # nothing near: all there are
        ("data.zzz=1", "unknown key 'data.zzz' (known: holdout, options, root, stored, stored_side, workers)"),
    ],
)
def test_unknown_keys_are_refused_with_a_hint(change: str, message: str):
    assert message in complaint(change)


def test_every_mistake_is_told_at_once():
    message = complaint("train.iterations=0", "optim.lr=-1", "seed='x'", "augment.scale=[2, 1]", "augment.flip=1.5")
    for part in (
        "'train.iterations' (it is 0): Input should be greater than 0",
        "'optim.lr' (it is -1): Input should be greater than 0",
        "'seed' (it is 'x')",
        "'augment.flip' (it is 1.5)",
    ):
        assert part in message
    assert "constrained-int" not in message  # pydantic's names of types mean nothing to a user


def test_missing_sections_are_named():
    with pytest.raises(ConfigError, match="'scenario' is missing; 'method' is missing; 'model' is missing; 'train'"):
        validate({}, "x")
    assert "'scenario.name' is missing" in complaint("scenario={}")
    assert "'train'" in complaint("train=5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.epochs=3"], "'train': give exactly one of train.iterations and train.epochs"),
        (["train={}"], "give exactly one of train.iterations and train.epochs"),
        (["train.iterations=[]"], "'train.iterations' (it is []): List should have at least 1 item"),
        (["train.iterations=[5, 0]"], "'train.iterations.1' (it is 0)"),
        (["train={epochs=-1}"], "'train.epochs' (it is -1): Input should be greater than 0"),
        (["train={epochs=[1, inf]}"], "'train.epochs.1' (it is inf): Input should be a finite number"),
        (["augment.scale=[2.0, 0.5]"], "augment.scale must be two positive numbers in ascending order"),
        (["augment.scale=[0.0, 0.5]"], "augment.scale must be two positive numbers"),
        (["augment.max_category_share=0"], "'augment.max_category_share' (it is 0)"),
        (["data.holdout=1.0"], "'data.holdout' (it is 1.0): Input should be less than 1"),
        (["evaluate.geometries=[]"], "'evaluate.geometries' (it is [])"),
        (["evaluate.geometries=['full', 'full']"], "list each geometry once"),  # counts would come out double
        (["evaluate.inference='slide'", "evaluate.window=300"], "evaluate.stride 341 above evaluate.window 300"),
        (["seed=-1"], "'seed' (it is -1)"),
        (["train.precision='fp16'"], "'train.precision' (it is 'fp16'): Input should be '32-true', 'bf16-mixed'"),
    ],
)
def test_values_out_of_range(changes: list[str], message: str):
    assert message in complaint(*changes)


def test_a_configuration_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        made().train.batch_size = 3  # type: ignore[misc]


def test_length_of_a_step():
    by_step = made("train.iterations=[7, 3]").train
    assert [by_step.length(t, 1000) for t in range(4)] == [7, 3, 3, 3]
    assert made("train.iterations=4").train.length(2, 1) == 4
    epochs = made("train={epochs=[1.5, 1], batch_size=4}").train
    assert [epochs.length(t, 10) for t in range(3)] == [4, 2, 2]  # 3.75, 2.5 (to even) and again
    assert epochs.length(1, 1) == 1  # at least one


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("'3'", "3"),
        ('"a b"', "a b"),
        ("{a = 1}", {"a": 1}),
        # no TOML: the text itself
        ("adamw", "adamw"),
        ("/data/x y", "/data/x y"),
        ("True", "True"),
        ("a=b", "a=b"),
        ("", ""),
        (" spaced ", "spaced"),
        ("[1, 2", "[1, 2"),
    ],
)
def test_override_values_are_toml_or_strings(text: str, value: Any):
    assert override({}, [f"a.b={text}"]) == {"a": {"b": value}}


def test_overrides_reach_any_depth_and_leave_the_input_alone():
    content = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    changed = override(content, ["a.b.c=9", "a.x.y=1", "e=4", "e=5"])
    assert changed == {"a": {"b": {"c": 9, "d": 2}, "x": {"y": 1}}, "e": 5}
    assert content == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}


@pytest.mark.parametrize("assignment", ["train.iterations", "=5", "a..b=1", ".a=1", "a.=1", ""])
def test_a_malformed_override_is_refused(assignment: str):
    with pytest.raises(ConfigError, match=r"must look like section\.key=value, not "):
        override({}, [assignment])


def test_an_override_below_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"In 'a\.b\.c=1', 'b' is a value, not a section"):
        override({"a": {"b": 3}}, ["a.b.c=1"])


def test_overridden_types_are_checked_like_the_file():
    assert made("optim.betas=[0.5, 0.6]").optim.betas == (0.5, 0.6)
    assert made("optim.name=sgd").optim.name == "sgd"
    assert "'optim.name' (it is 'sdg')" in complaint("optim.name=sdg")


CHANGES = (
    [],
    ["seed=3", "note='a \"quoted\" note'", "data.root=/some/where", "data.options.classes=7"],
    ["train={epochs=[1.5, 2.0]}", "scenario.order=[2, 1]", "optim.clip=3.5", "optim.later_lr=1e-6"],
    ["evaluate.short_side=none", "evaluate.long_side=none", "augment.short_side=32"],
    ["method={name='segvit-cl', calibration='none', absent_weight='none'}", "model.head.layers=2"],
)


@pytest.mark.parametrize("changes", CHANGES, ids=["plain", "text", "lists", "none", "parts"])
def test_a_recipe_survives_toml(changes: list[str]):
    wanted = made(*changes)
    again = validate(tomllib.loads(wanted.to_toml()), "again")
    assert again == wanted
    resolved = resolve(wanted)
    again = validate(tomllib.loads(resolved.to_toml()), "again")
    assert again == resolved
    assert resolve(again) == again  # as `resume` reads it


def test_resolving_writes_the_defaults_of_method_and_model():
    options = resolve(made("method.name=segvit-cl", "model.absent_weight=0.2")).dump()
    assert options["method"] == {"name": "segvit-cl", "calibration": "none"}
    assert options["model"]["absent_weight"] == 0.2
    assert options["model"]["focal_weight"] == 20.0
    assert options["model"]["backbone"]["name"]


def test_none_in_toml():
    """TOML has no null, and yet a default must be replaceable by None; leaving the key out would bring it back."""
    found = made("evaluate.short_side=none", "optim.clip=none")
    assert found.evaluate.short_side is None
    assert found.optim.clip is None
    assert found.dump()["evaluate"]["short_side"] == "none"
    assert "clip" not in found.dump()["optim"]  # None is its default
    assert "'evaluate.crop' (it is 'none')" in complaint("evaluate.crop=none")


class Inner(Section):
    size: int | None = 3
    word: str = "none"


class Options(Section):
    mode: Literal["none", "all"] = "all"
    limit: float | None = 1.0
    top: int | None = None
    needed: int | None = Field()
    inner: Inner = Inner()


def test_plain_and_back_for_a_part_of_a_stranger():
    for options in (
        Options(needed=None, limit=None, mode="none", inner=Inner(size=None)),
        Options(needed=2, top=4),
        Options(needed=1, inner=Inner(word="none")),
    ):
        again = Options.model_validate(tomllib.loads(config.tomli_w.dumps(plain(options))))
        assert again == options
    assert plain(Options(needed=None)) == {
        "mode": "all",
        "limit": 1.0,
        "needed": "none",
        "inner": {"size": 3, "word": "none"},
    }


def test_options_of_a_part_are_checked_by_its_own_config():
    class Config(Section):
        temperature: float = 1.0

    class Other(Section):
        weight: float = 1.0
        nested: Config = Config()

    Other.__name__ = "Config"  # every part calls it so
    assert part_config("method", PartChoice(name="m", weight=2), Other) == Other(weight=2.0)
    with pytest.raises(ConfigError, match=r"of method 'm'.*unknown key 'wieght' \(did you mean 'weight'\?\)"):
        part_config("method", PartChoice(name="m", wieght=2), Other)
    # hints come from this part alone, not from every class of that name
    with pytest.raises(ConfigError, match=r"unknown key 'temperatur' \(did you mean 'nested\.temperature'\?\)"):
        part_config("method", PartChoice(name="m", temperatur=2), Other)
    with pytest.raises(ConfigError, match=r"unknown key 'weigth' \(known: temperature\)"):
        part_config("method", PartChoice(name="m", weigth=2), Config)
    with pytest.raises(ConfigError, match=r"'nested\.temperature' \(it is 'hot'\)"):
        part_config("method", PartChoice(name="m", nested={"temperature": "hot"}), Other)


def test_options_of_installed_parts():
    with pytest.raises(ConfigError, match=r"of method 'finetune'.*unknown key 'weight' \(known: none\)"):
        make_method(made("method.weight=2"))
    with pytest.raises(ConfigError, match=r"of model 'segvit'.*unknown key 'backbone\.nam' \(did you mean 'name'\?\)"):
        make_model(made("model.backbone.nam=x"))


@pytest.mark.parametrize(
    ("group", "name", "near"),
    [
        ("methods", "fintune", "'finetune'"),
        ("methods", "segvitcl", "'segvit-cl'"),
        ("models", "segvti", "'segvit'"),
        ("datasets", "ade20", "'ade20k'"),
        ("reports", "htm", "'html'"),
    ],
)
def test_unknown_names_come_with_the_nearest(group: str, name: str, near: str):
    with pytest.raises(UnknownNameError) as caught:
        registry.load(group, name)
    assert f"There is no {group[:-1]} named {name!r}. Did you mean {near}" in str(caught.value)
    assert "Known: " in str(caught.value)


def test_unknown_names_in_a_recipe():
    with pytest.raises(UnknownNameError, match="no method named 'fintune'"):
        make_method(made("method.name=fintune"))
    with pytest.raises(UnknownNameError, match="no model named 'segvti'"):
        make_model(made("model.name=segvti"))


@pytest.mark.parametrize("group", ["methods", "models", "datasets", "reports", "loggers", "namespaces"])
def test_listing_imports_no_part(group: str):
    code = (
        "import sys; from cssbench import registry\n"
        f"found = registry.parts({group!r})\n"
        "assert found\n"
        "modules = {part.entry_point.module for part in found.values()}\n"
        "assert not modules & set(sys.modules), modules & set(sys.modules)\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
