"""Presets: models by name, in recipes, on the command line and from a stranger's package; a run's weights profiled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from strangers import GOOD, package

from cssbench import config, experiment, profile, recipes, registry
from cssbench.errors import ConfigError, UnknownNameError
from cssbench.models.segvit import SegViT
from cssbench.recipes import known_presets, named_model, read_preset, with_preset
from cssbench.results import RunFolder

OURS = sorted(name for name, (owner, _) in registry.toml_files("presets").items() if owner == registry.OWN)
ASKED = {"segvit-b", "segvit-b-shrunk", "segvit-l-shrunk-v2", "segvit-b-dtop"}  # named by the issue


@pytest.mark.parametrize("name", OURS)
def test_presets_are_models_and_ask_for_no_weights(name: str):
    section = named_model(name)
    assert section["name"] in registry.parts("models")
    cls = registry.load("models", section.pop("name"))
    resolved = cls.Config.model_validate(section)
    assert not resolved.backbone.pretrained
    assert resolved.backbone.checkpoint is None
    text = registry.toml_files("presets")[name][1].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "\n# Source: " in text


def test_there_is_what_was_asked_for():
    assert set(OURS) >= ASKED
    assert not set(OURS) & set(registry.parts("models"))


def test_the_page_names_every_model_and_preset():
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    named: list[str] = []
    for word in re.findall(r"`([a-z0-9-]+)`", page):
        named.append(named[-1].rpartition("-")[0] + word if word.startswith("-") else word)  # `segvit-ti`, `-s`
    assert set(named) >= set(OURS) | {
        name for name, part in registry.parts("models").items() if part.distribution == registry.OWN
    }
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    words = {word for cell in table for word in re.findall(r"`([a-z][a-z0-9-]+)`", cell)}
    assert words <= set(OURS)


def test_a_preset_may_start_from_another():
    assert read_preset("segvit-b-v1") == {
        "name": "segvit",
        "backbone": {"name": "vit_base_patch16_384.augreg_in21k_ft_in1k", "layers": [6, 8, 12]},
        "head": {"heads": 12, "version": "v1"},
    }
    assert read_preset("segvit-l-shrunk-v2")["edges"] == {"threshold": 0.7}


def recipe(**model: Any) -> dict[str, Any]:
    content = {"scenario": {"name": "synthetic-10-5"}, "method": {"name": "finetune"}, "train": {"iterations": 1}}
    return content | {"model": model}


def test_in_a_recipe_its_own_options_win_and_the_preset_s_name_goes():
    found = config.validate(recipe(name="segvit-l", head={"heads": 8}, absent_weight=0.2), "test").model
    assert found.name == "segvit"
    assert found.options == {
        "backbone": {"name": "vit_large_patch16_384.augreg_in21k_ft_in1k", "layers": [8, 16, 24]},
        "head": {"heads": 8},
        "absent_weight": 0.2,
    }
    plain = recipe(name="segvit", head={"heads": 8})
    assert with_preset(plain) == plain


def test_another_preset_of_the_same_model_drops_the_first_one_s_options():
    base = recipe(name="segvit-b", head={"layers": 1})
    assert recipes.extend(base, {"model": {"name": "segvit-l"}})["model"] == {"name": "segvit-l"}
    assert recipes.extend(base, {"model": {"head": {"heads": 4}}})["model"]["head"] == {"layers": 1, "heads": 4}


def test_another_model_keeps_the_weights_of_the_same_encoder():
    backbone = {"name": "vit_base_patch16_384", "checkpoint": "b.safetensors", "mean": [0.5, 0.5, 0.5], "layers": [12]}
    old = recipe(name="segvit", backbone=backbone, head={"layers": 1}) | {"augment": {"crop": 480}}
    new = recipes.with_model(old, "segvit-b-dtop")["model"]
    assert new["name"] == "dtop"
    assert new["head"] == {"self_attention": True, "heads": 6}
    assert new["backbone"] == {
        "name": "vit_base_patch16_384.augreg_in21k_ft_in1k",
        "layers": [6, 8, 12],
        "image_size": 480,
        "checkpoint": "b.safetensors",
        "mean": [0.5, 0.5, 0.5],
    }
    assert "checkpoint" not in recipes.with_model(recipe(name="segvit"), "segvit-b-dtop")["model"]["backbone"]


def test_another_encoder_never_starts_from_scratch_unasked():
    old = recipe(name="segvit-b", backbone={"checkpoint": "b.safetensors"})
    for name in ("segvit-l", "deeplabv3-r101"):
        with pytest.raises(ConfigError, match="Say what it starts from: --set model"):
            recipes.with_model(old, name)
    made = recipes.with_model(old, "segvit-l", ["model.backbone.pretrained=false"])
    assert "checkpoint" not in made["model"]["backbone"]
    assert "image_size" not in recipes.with_model(recipe(name="segvit"), "deeplabv3")["model"]["backbone"]


def test_position_embeddings_are_for_the_crop_that_follows():
    old = recipe(name="segvit") | {"augment": {"crop": 480}}
    for changes, side in (([], 480), (["augment.crop=160"], 160), (["model.head.layers=1"], 480)):
        made = recipes.with_model(old, "segvit-b-shrunk", changes)
        assert made["model"]["backbone"]["image_size"] == side


@pytest.mark.parametrize("model", ["segvit", {"name": "gone", "backbone": {"layers": [1]}}, {"backbone": 3}, {}])
def test_what_is_replaced_need_not_be_valid(model: Any):
    made = recipes.with_model({"model": model, "augment": 3}, "segvit-b")["model"]
    assert made["backbone"]["layers"] == [6, 8, 12]


def test_unknown_names_are_told_the_nearest_models_and_presets():
    for name, near in (("segvit-bb", "'segvit-b'"), ("segvitt", "'segvit'")):
        with pytest.raises(UnknownNameError, match=f"no model named {name!r}. Did you mean {near}"):
            named_model(name)
        with pytest.raises(UnknownNameError, match=near):
            experiment.resolve(config.validate(recipe(name=name), "test"))


def test_a_file_of_one_s_own(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "segvit-b"\n[head]\nheads = 6\n')
    assert named_model(str(path))["head"] == {"heads": 6}
    path.write_text("[head]\nheads = 6\n")
    with pytest.raises(ConfigError, match="names no model"):
        named_model(str(path))


def test_a_stranger_ships_presets_and_shadows_no_model(install: Any, command: Any):
    mine = '# Mine.\n# Source: us\nextends = "segvit-ti"\n'
    files = package("their_presets", **{"segvit-tiny-mine": mine, "segvit": "a = 1"})
    install("theirs", {"presets": {"any": "their_presets"}}, files | {"mod.py": GOOD})
    assert "segvit-tiny-mine" in known_presets()
    assert "segvit" not in known_presets()
    assert named_model("segvit") == {"name": "segvit"}
    code, out, error = command("list", "presets")
    assert code == 0
    assert "theirs" in out
    assert "The preset 'segvit' of the distribution 'theirs' is not used: that name is the model 'segvit'" in error
    assert "pip uninstall theirs" in error


def test_a_stranger_s_model_named_as_our_preset_is_reported(install: Any, command: Any):
    install("theirs", {"models": {"segvit-b": "mod:Model"}}, {"mod.py": GOOD})
    assert "segvit-b" not in known_presets()
    _, _, error = command("list", "presets")
    assert "The preset 'segvit-b' of the distribution 'cssbench' is not used" in error
    assert "pip uninstall theirs" in error


def test_list_tells_sources_and_costs(command: Any):
    code, out, err = command("list", "models")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "cssbench" in line}
    assert rows.keys() >= ASKED | set(registry.parts("models"))
    assert rows["segvit-b-v1"][2:4] == ["108.7", "120.9"]  # thesis Table 4.1
    assert rows["segvit-b-shrunk"][3] == "97.1"
    assert rows["segvit-b-dtop"][3:5] == ["by", "image"]
    assert "-" not in [row[2] for row in rows.values()]
    assert rows["segvit-b"][4:7] == ["thesis", "section", "4.2.1,"]


def test_costs_of_presets_against_the_papers():
    for name, side, published in (("segvit-b-single", 512, 115.8), ("segvit-l-v1", 640, 637.9), ("setr-b", 512, 107.3)):
        assert profile.typical_cost(name, side)[1] == pytest.approx(published, rel=0.003)


# On the command line


def test_run_with_another_model(command: Any, tmp_path: Path):
    """The whole [model] section goes; position embeddings are made for the recipe's crop."""
    small = ["backbone.depth=2", "backbone.width=48", "backbone.heads=3", "backbone.layers=[1,2]", "head.heads=3"]
    words = ["--set", "train.iterations=1", "--set", "data.options.train=30", "--set", "data.options.val=4"]
    out = tmp_path / "run"
    code, _, error = command(
        "run", "demo-finetune", "--model", "segvit-ti", "--data", str(tmp_path / "data"), "--out", str(out), *words,
        *[word for change in small for word in ("--set", f"model.{change}")],
    )  # fmt: skip
    assert code == 0, error
    found = RunFolder.read(out).config
    crop = found.augment.crop
    assert found.model.name == "segvit"
    backbone = found.model.options["backbone"]
    assert (backbone["image_size"], backbone["name"]) == (crop, "vit_tiny_patch16_384.augreg_in21k_ft_in1k")
    assert found.model.options["head"]["version"] == "v2"
    code, _, error = command("run", "demo-finetune", "--model", "segvit-x", "--out", str(tmp_path / "no"))
    assert code == 2
    assert "Did you mean" in error
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("profile")
    model = {
        "name": "dtop",
        "backbone": tiny_runs.VIT | {"layers": [1, 2]},
        "head": tiny_runs.HEAD,
        "p0": 0.2,
        "rule": "remove",
    }
    return tiny_runs.start(tiny_runs.make_recipe(folder, model), folder / "run")


def test_profile_of_a_run_is_of_its_weights_on_its_images(command: Any, trained: RunFolder):
    words = ["profile", str(trained.path), "--images", "3", "--json"]
    code, out, error = command(*words)
    assert code == 0, error
    found = json.loads(out)
    (row,) = found["steps"]
    assert (row["step"], row["classes"], row["images"], found["size"]) == (1, 6, 3, 32)
    made = profile.stored_model(trained, experiment.resolve(trained.config), "cpu")
    weights = made.state_dict()["heads.1.classifier.weight"]
    data = trained.config.data
    again = profile.images(made, data.root, "synthetic", 3, 32, "cpu", "val", data.options)
    with torch.no_grad():
        left = sum(int((made(image).depths == 1).sum()) for image in again)
    whole = json.loads(command(*words, "--set", "model.p0=1.0")[1])["steps"][0]
    assert weights.isfinite().all()
    assert left > 0
    assert whole["parts"]["encoder"]["gflops"] > row["parts"]["encoder"]["gflops"]


def test_an_evaluation_is_profiled_with_the_weights_it_evaluated(command: Any, trained: RunFolder, tmp_path: Path):
    again = tmp_path / "again"
    code, _, error = command("evaluate", str(trained.path), "--set", "model.p0=1.0", "--out", str(again))
    assert code == 0, error
    whole = json.loads(command("profile", str(again), "--images", "2", "--json")[1])
    direct = json.loads(command("profile", str(trained.path), "--set", "model.p0=1.0", "--images", "2", "--json")[1])
    assert whole["steps"] == direct["steps"]
    provenance = json.loads((again / "provenance.json").read_text())
    provenance["evaluated_from"]["digest"] = "0" * 64
    (again / "provenance.json").write_text(json.dumps(provenance))
    code, _, error = command("profile", str(again))
    assert code == 2
    assert "evaluated other weights" in error


def test_latency_of_a_run(command: Any, trained: RunFolder):
    code, out, _ = command("profile", str(trained.path), "--images", "1", "--latency", "--json")
    assert code == 0
    assert set(json.loads(out)["latency"]["seconds"]) == {"stored weights"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "2-1"], "its own steps"),
        (["--set", "optim.lr=1"], "cannot change"),
        (["--set", "model.backbone.width=64"], "shape"),
    ],
)
def test_profile_of_a_run_refuses_what_does_not_fit(command: Any, trained: RunFolder, words: list[str], said: str):
    code, _, error = command("profile", str(trained.path), *words)
    assert code == 2
    assert said in error


def test_what_a_model_name_loads():
    resolved = experiment.resolve(config.validate(recipe(name="segvit-ti", backbone={"image_size": 64}), "test"))
    assert isinstance(experiment.make_model(resolved), SegViT)
