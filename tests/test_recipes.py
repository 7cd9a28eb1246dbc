"""Recipes: how they are found and start from another with `extends`, and what the shipped ones must say and hold."""

from __future__ import annotations

import re
import tomllib
from decimal import Decimal
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm

from cssbench import registry, scenario
from cssbench.config import RunConfig, validate
from cssbench.errors import ConfigError, ModelError, UnknownNameError
from cssbench.experiment import make_model, resolve
from cssbench.recipes import override, read_recipe
from cssbench.reports import literature

NAMES = sorted(registry.toml_files("recipes"))
ROOT = Path(__file__).parents[1]


def write(folder: Path, **files: str) -> None:
    for stem, text in files.items():
        (folder / f"{stem}.toml").write_text(text)


def test_reading_recipes(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('note = "x"\n')
    assert read_recipe(str(path)) == {"note": "x"}
    path.write_text("note = ")
    with pytest.raises(ConfigError, match=r"mine\.toml' is not valid TOML"):
        read_recipe(str(path))
    path.write_bytes(b'note = "\xff"')
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_recipe(str(path))
    for missing in (str(tmp_path / "other.toml"), str(tmp_path)):
        with pytest.raises(UnknownNameError):
            read_recipe(missing)
    with pytest.raises(UnknownNameError, match=f"no recipe named '{NAMES[0]}x'. Did you mean '{NAMES[0]}'"):
        read_recipe(f"{NAMES[0]}x")


BASE = """
note = "n"
seed = 3
[method]
name = "mib"
weight = 10.0
alpha = 2.0
[model]
name = "segvit"
absent_weight = 0.2
[model.head]
layers = 1
width = 64
[train]
iterations = [8, 2]
batch_size = 4
"""


def extended(folder: Path, text: str) -> dict[str, Any]:
    """The content of a file that extends BASE and holds `text`."""
    write(folder, base=BASE, child='extends = "base.toml"\n' + text)
    return read_recipe(str(folder / "child.toml"))


def test_tables_are_merged_and_values_replaced(tmp_path: Path):
    text = "seed = 4\n[train]\niterations = 5\n[model.head]\nlayers = 2\n[optim]\nlr = 1.0\n[method]\nalpha = 3.0"
    assert extended(tmp_path, text) == {
        "note": "n",
        "seed": 4,
        "method": {"name": "mib", "weight": 10.0, "alpha": 3.0},
        "model": {"name": "segvit", "absent_weight": 0.2, "head": {"layers": 2, "width": 64}},
        "train": {"iterations": 5, "batch_size": 4},
        "optim": {"lr": 1.0},
    }


def test_an_empty_extension_is_its_base_and_a_note_of_its_own_wins(tmp_path: Path):
    assert extended(tmp_path, "") == tomllib.loads(BASE)
    assert extended(tmp_path, 'note = "mine"') == tomllib.loads(BASE) | {"note": "mine"}


def test_options_of_another_method_or_model_are_dropped(tmp_path: Path):
    base = tomllib.loads(BASE)
    assert extended(tmp_path, '[method]\nname = "plop"\n') == base | {"method": {"name": "plop"}}
    assert extended(tmp_path, '[method]\nname = "plop"\nalpha = 1.0') == base | {
        "method": {"name": "plop", "alpha": 1.0}
    }
    assert extended(tmp_path, '[model]\nname = "deeplabv3"\nhead = {layers = 3}') == base | {
        "model": {"name": "deeplabv3", "head": {"layers": 3}}
    }
    # the same name says nothing new
    assert extended(tmp_path, '[method]\nname = "mib"\n[model]\nname = "segvit"') == base


def test_options_without_a_name_wait_for_one(tmp_path: Path):
    write(tmp_path, base="[model.backbone]\ndepth = 6", child='extends = "base.toml"\nmodel.name = "segvit"')
    assert read_recipe(str(tmp_path / "child.toml")) == {"model": {"name": "segvit", "backbone": {"depth": 6}}}


def test_a_table_and_a_value_replace_each_other(tmp_path: Path):
    assert extended(tmp_path, "train = 5")["train"] == 5
    assert extended(tmp_path, "seed = {a = 1}")["seed"] == {"a": 1}
    with pytest.raises(ConfigError, match=r"'train' \(it is 5\)"):
        validate(extended(tmp_path, "train = 5"), "x")


def test_paths_are_relative_to_the_file_that_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path, top="a = 1\nb = 1\nc = 1")
    write(tmp_path / "deep", middle='extends = "../top.toml"\nb = 2\nc = 2')
    write(tmp_path / "deep" / "er", low='extends = "../middle.toml"\nc = 3')
    monkeypatch.chdir(tmp_path / "deep")
    assert read_recipe("er/low.toml") == {"a": 1, "b": 2, "c": 3}
    write(tmp_path, absolute=f'extends = "{(tmp_path / "top.toml").as_posix()}"\nb = 4')
    assert read_recipe("../absolute.toml") == {"a": 1, "b": 4, "c": 1}


def test_an_installed_recipe_can_be_extended_by_name(tmp_path: Path):
    write(tmp_path, mine='extends = "demo-finetune"\nseed = 5\n[method]\nname = "segvit-cl"\n')
    found = validate(read_recipe(str(tmp_path / "mine.toml")), "mine")
    demo = validate(read_recipe("demo-segvit-cl"), "demo")
    assert found == demo.model_copy(update={"seed": 5})


@pytest.mark.parametrize("value", ["5", '["a", "b"]', "{name = 'a'}", "true"])
def test_extends_must_be_one_name(tmp_path: Path, value: str):
    write(tmp_path, mine=f"extends = {value}")
    with pytest.raises(ConfigError, match=r"mine\.toml', 'extends' \(it is .*\) must be the name of one recipe, or a"):
        read_recipe(str(tmp_path / "mine.toml"))


def test_an_unknown_base_is_named_with_the_nearest(tmp_path: Path):
    write(tmp_path, mine='extends = "demo-fintune"', lost='extends = "gone.toml"', broken='extends = "bad.toml"')
    with pytest.raises(ConfigError, match=r"mine\.toml' extends 'demo-fintune'\. .* Did you mean 'demo-finetune'"):
        read_recipe(str(tmp_path / "mine.toml"))
    with pytest.raises(ConfigError, match=rf"lost\.toml' extends 'gone\.toml'\. .*{re.escape(str(tmp_path))}.*gone"):
        read_recipe(str(tmp_path / "lost.toml"))
    write(tmp_path, bad="a = ")
    with pytest.raises(ConfigError, match=r"bad\.toml' is not valid TOML"):
        read_recipe(str(tmp_path / "broken.toml"))


def test_circles_are_refused(tmp_path: Path):
    write(tmp_path, own='extends = "own.toml"')
    with pytest.raises(ConfigError, match=r"circle: '.*own\.toml' -> 'own\.toml'\. Remove one"):
        read_recipe(str(tmp_path / "own.toml"))
    again = f"../{tmp_path.name}/a.toml"  # another spelling of the same file
    write(tmp_path, start='extends = "a.toml"', a='extends = "b.toml"', b=f'extends = "{again}"')
    with pytest.raises(ConfigError, match=r"circle: '.*start\.toml' -> 'a\.toml' -> 'b\.toml' -> '\.\./.*/a\.toml'\."):
        read_recipe(str(tmp_path / "start.toml"))


@cache
def resolved(name: str) -> RunConfig:
    return resolve(validate(read_recipe(name), name))


def header(name: str) -> dict[str, str]:
    """The fields of a recipe's leading comment, each on one line: {"Command": "cssbench run ...", ...}."""
    lines = (ROOT / "baselines" / "recipes" / f"{name}.toml").read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == comment, "the comment stands on top, and only there"
    fields: dict[str, str] = {}
    for line in comment[1:]:
        found = re.fullmatch(r"# (\w+): +(.*)", line)
        key = found[1] if found else list(fields)[-1]
        fields[key] = f"{fields.get(key, '')} {found[2] if found else line[1:].strip()}".strip()
    return fields


@pytest.mark.parametrize("name", NAMES)
def test_installed_recipes_are_valid_and_leave_no_trace_of_their_base(name: str):
    found = resolved(name)
    assert found.note
    assert "extends" not in found.dump()
    assert validate(tomllib.loads(found.to_toml()), name) == found


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_how_to_run_and_where_it_is_from(name: str):
    fields = header(name)
    assert re.search(r"cssbench run (\S+) --data \S+ --out runs/(\S+)", fields["Command"])
    named = re.findall(r"cssbench run (\S+).*? --out runs/(\S+)", fields["Command"])
    assert set(named) == {(name, name)}
    assert fields["Source"]
    for other in re.findall(r"\b(?:camvid|synthetic|demo|ade20k|voc)-[a-z0-9-]+", " ".join(fields.values())):
        assert other in {*NAMES, *scenario.names()}, "it names a recipe or scenario that there is"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_header_sets_can_be_set(name: str):
    """`--set` and `--scenario` of the header, one at a time; FILE and the like stand for a value."""
    text = " ".join(header(name).values())
    for change in re.findall(r"--set ([\w.]+=[\w.\-]*\w)", text):
        resolve(validate(override(read_recipe(name), [change]), name))
    assert set(re.findall(r"--scenario ([\w-]+)", text)) <= set(scenario.names())


@pytest.mark.parametrize("part", sorted(n.removeprefix("camvid-6-5-") for n in NAMES if n.startswith("camvid-6-5")))
def test_camvid_6_5_trains_as_6_1_does(part: str):
    first, second = resolved(f"camvid-6-1-{part}").dump(), resolved(f"camvid-6-5-{part}").dump()
    assert (first["scenario"].pop("name"), second["scenario"].pop("name")) == ("camvid-6-1", "camvid-6-5")
    assert (first["train"].pop("iterations"), second["train"].pop("iterations")) == ([800, 100], [800, 200])
    assert first == second


def test_camvid_6_5_has_every_learner_of_6_1():
    six_one, six_five = (
        {n.removeprefix(prefix) for n in NAMES if n.startswith(prefix)} for prefix in ("camvid-6-1-", "camvid-6-5-")
    )
    # one oracle serves both; Shrunk, DToP and the plug-ins of Avalanche are shown on the longer one
    shown = {"segvit-cl-shrunk", "segvit-cl-dtop", "avalanche-ewc", "avalanche-replay"}
    assert six_one - six_five == {"joint", "joint-linear", *shown}
    assert six_five <= six_one


# The public figures, written down apart from the recipes (REMINDER's differ, see below).
RESNET = {
    "optim": {"name": "sgd", "lr": 0.01, "later_lr": 0.001, "weight_decay": 0.0001, "momentum": 0.9, "power": 0.9,
              "head_lr_scale": 1, "warmup": 0, "clip": None, "min_lr": 0},
    "train": {"batch_size": 24, "epochs": 60, "iterations": None, "precision": "16-mixed"},
    "augment": {"crop": 512, "short_side": 512, "scale": (1, 1.25), "max_category_share": 1, "flip": 0.5,
                "photometric": False},
    "evaluate": {"geometries": ["crop"], "crop": 512, "split": "val"},
}  # fmt: skip
VIT = {
    "optim": {"name": "adamw", "lr": 2e-5, "later_lr": 2e-6, "weight_decay": 0.01, "betas": (0.9, 0.999), "power": 1,
              "head_lr_scale": 10, "warmup": 1500, "warmup_ratio": 1e-6, "clip": 35, "min_lr": 0},
    "train": {"batch_size": 16, "epochs": [127, 60], "iterations": None},
    "augment": {"crop": 512, "short_side": 512, "scale": (0.5, 2), "max_category_share": 0.75, "flip": 0.5,
                "photometric": True},
    "evaluate": {"geometries": ["full", "crop"], "inference": "slide", "window": 512, "stride": 341, "split": "val"},
}  # fmt: skip
SEGMENTER = {
    "optim": {"name": "sgd", "lr": 1e-3, "later_lr": None, "weight_decay": 0, "momentum": 0.9, "power": 0.9,
              "head_lr_scale": 1, "warmup": 0, "clip": None, "min_lr": 1e-5},
    "train": {"batch_size": 8, "epochs": 64, "iterations": None},
    "augment": VIT["augment"],
    "evaluate": VIT["evaluate"] | {"stride": 512},
}  # fmt: skip
FIGURES = {"deeplabv3": RESNET, "vit-linear": VIT, "segvit": VIT, "segmenter": SEGMENTER}
DIFFERENCES: dict[str, dict[str, dict[str, Any]]] = {
    "ade20k-reminder-deeplabv3": {"optim": {"later_lr": 0.0008}, "train": {"batch_size": 10, "epochs": [60, 70]}},
    "ade20k-segvit-cl-segvit": {"optim": {"later_lr": None}},
}
POD = {"pod_factor": 0.001, "pod_output_factor": 0.00001}
OPTIONS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "joint": {},
    "lwf": {"weight": 100, "class_reduction": "mean"},
    "ilt": {"weight": 100, "feature_weight": 100, "class_reduction": "mean"},
    "mib": {"weight": 10, "class_reduction": "mean", "reduction": "all", "balanced_init": True},
    "plop": {**POD, "threshold": 0.001, "pod_scales": [1, 2, 4], "arithmetic": "reference", "balanced_init": True},
    "reminder": {**POD, "weight": 0.5, "delta": 1, "temperature": 3, "balanced_init": True},
    "segvit-cl": {"calibration": "none"},
}
PIXEL = ("finetune", "joint", "lwf", "ilt", "mib", "plop", "reminder")
ADE = {
    f"ade20k-{method}-{model}": (method, model)
    for method, model in [
        *product(PIXEL, ("deeplabv3", "vit-linear")),
        *product(("segvit-cl", "finetune", "joint", "mib", "plop", "reminder"), ("segvit",)),
        ("joint", "segmenter"),
    ]
}


def test_the_ade20k_recipes_are_these():
    assert {name for name in NAMES if name.startswith("ade20k-")} == set(ADE)


@pytest.mark.parametrize("name", ADE)
def test_ade20k_recipes_hold_the_public_figures(name: str):
    (method, model), found = ADE[name], resolved(name)
    for section, values in FIGURES[model].items():
        wanted = values | DIFFERENCES.get(name, {}).get(section, {})
        assert {key: getattr(getattr(found, section), key) for key in wanted} == wanted
    assert found.scenario.name == ("ade20k-joint" if method == "joint" else "ade20k-100-50")
    assert found.method.name == ("finetune" if method == "joint" else method)
    options = found.method.options
    assert {key: options[key] for key in OPTIONS[method]} == OPTIONS[method]
    assert found.model.name == model


VOC = {"finetune": {}, "joint": {}, "mib": {"weight": 100}, "plop": {"pod_factor": 0.01, "pod_output_factor": 0.0005}}


def test_the_voc_recipes_are_these():
    assert {name for name in NAMES if name.startswith("voc-")} == {f"voc-{method}-deeplabv3" for method in VOC}


@pytest.mark.parametrize("method", VOC)
def test_voc_recipes_hold_the_public_figures(method: str):
    """Those of ADE20K, but 30 epochs, the augmented list and PLOP's factors for VOC."""
    found = resolved(f"voc-{method}-deeplabv3")
    for section, values in RESNET.items():
        wanted = values | ({"epochs": 30} if section == "train" else {})
        assert {key: getattr(getattr(found, section), key) for key in wanted} == wanted
    assert found.scenario.name == ("voc-joint" if method == "joint" else "voc-15-1")
    assert found.method.name == ("finetune" if method == "joint" else method)
    options = OPTIONS[method] | VOC[method]
    assert {key: found.method.options[key] for key in options} == options
    assert (found.model.name, found.data.options) == ("deeplabv3", {"train": "trainaug"})


@pytest.mark.parametrize("name", ADE)
def test_ade20k_recipes_are_made_for_pre_trained_weights(name: str):
    """Nothing is downloaded and nothing starts from scratch unless the user says so: the file must be there."""
    model = resolved(name).model.options
    backbone = model["backbone"]
    assert backbone["name"] in timm.list_pretrained()
    assert (backbone["pretrained"], backbone["checkpoint"]) == (True, f"{backbone['name']}.safetensors")
    if ADE[name][1] == "deeplabv3":
        assert (backbone["output_stride"], model["dilations"], model["reduction"]) == (16, [6, 12, 18], "all")
        assert model["decay_all"] is True
    else:
        assert (backbone["layers"], backbone["image_size"], backbone["drop_path"]) == ([6, 8, 12], 512, 0.1)
        assert backbone["mean"] == ([0.5] * 3 if ADE[name][1] == "segmenter" else [0.485, 0.456, 0.406])
    if ADE[name][1] == "segmenter":
        assert (model["decoder_layers"], model["dropout"], model["class_norm"]) == (2, 0.1, "base")
        assert (backbone["prefix_tokens"], model["reduction"]) == ("keep", "valid")
    with pytest.raises(ModelError, match=r"checkpoint names '.*\.safetensors', which is not a file"):
        make_model(resolved(name))


METHODS = {"ilt": "ILT", "mib": "MiB", "plop": "PLOP", "reminder": "REMINDER", "segvit-cl": "SegViT-CL",
           "finetune": "finetune", "lwf": "LwF", "joint": "joint"}  # fmt: skip
BACKBONES = {"deeplabv3": "DeepLabV3-R101", "vit-linear": "DeepLabV3-ViT-B", "segvit": "SegViT-ViT-B",
             "segmenter": "Segmenter-ViT-B"}  # fmt: skip
FIGURE = r"\d+\.\d+"


@pytest.mark.parametrize("name", ADE)
def test_the_scores_of_ade20k_headers_are_published_ones(name: str):
    """Every base/incremental/all(/avg) and every "all" of a header stands in reports/published."""
    method, model = ADE[name]
    text = re.sub(r"table [\d.]+", "", header(name)["Score"])
    rows = [
        r
        for r in literature.rows(method=METHODS[method], backbone=BACKBONES[model])
        if bool(r.oracle) == (method == "joint")
    ]
    groups = re.findall(rf"(?:(100-50|100-10|50-50) )?({FIGURE}(?:/{FIGURE})+)", text)
    for where, group in groups:
        of = [row for row in rows if not where or row.scenario == f"ade20k-{where}"]
        figures = [Decimal(figure) for figure in group.split("/")]
        assert any([row.base, row.inc, row.all, row.avg][: len(figures)] == figures for row in of), (where, group)
    alone = set(re.findall(rf"(?<![\d/.])({FIGURE})(?![\d/.])", text))
    assert {Decimal(figure) for figure in alone} <= {row.all for row in rows}
    assert bool(groups) == ("none published" not in text)
