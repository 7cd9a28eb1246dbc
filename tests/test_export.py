"""Exported models: the same numbers without cssbench, for every model; the card; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import LINEAR, SEGVIT, make_recipe, start

from cssbench import checkpoint, config, export, protocol, scoring
from cssbench.bundle import bundle
from cssbench.contract import build_model
from cssbench.data.registry import make_dataset
from cssbench.errors import ModelError, RunError
from cssbench.metrics.confusion import confusion
from cssbench.portable import Portable, steps_of
from cssbench.results import RunFolder
from cssbench.testing.rig import TINY

pytestmark = pytest.mark.usefixtures("_one_thread")

HEAD = TINY["segvit"]["head"]
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # model, its options, those of the evaluation
    **{name: (name, {}, {}) for name in TINY},
    "segvit-v1-slide": ("segvit", {"head": HEAD | {"version": "v1"}}, {"inference": "slide"}),
    "segvit-ce": ("segvit", {"loss": "ce", "background_query": True}, {}),
    "dtop-fcn": ("dtop", {"auxiliary": "fcn", "fcn_width": 8}, {}),
}
GROUPS = [[5, 2, 3], [1], [4]]  # outputs are not in the order of class ids
# Run where neither cssbench nor what it needs beside PyTorch and timm can be imported.
READER = """
import importlib.util, sys
import numpy as np, torch
for name in ("cssbench", "pydantic", "lightning", "typer", "rich", "pandas", "matplotlib"):
    sys.modules[name] = None
torch.set_num_threads(1)
inputs, image = torch.from_numpy(np.load(sys.argv[1])), np.load(sys.argv[2])
for number, folder in enumerate(sys.argv[3:]):
    spec = importlib.util.spec_from_file_location(f"modeling{number}", folder + "/modeling.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load(folder)
    assert isinstance(model, torch.nn.Module) and not model.training
    with torch.no_grad():
        np.save(folder + "/scores.npy", model(inputs).numpy())
    for rule in ("all", "foreground"):
        np.save(folder + f"/{rule}.npy", model.predict(image, rule))
"""


def made_up(path: Path, name: str, groups: list[list[int]] = GROUPS, reached: int = 1) -> RunFolder:
    """A run of a tiny model with random weights, of which steps 0 to `reached` are finished."""
    part, options, how = VARIANTS[name]
    recipe = {
        "scenario": {"name": "toy"},
        "method": {"name": "finetune"},
        "model": {"name": part} | TINY[part] | options,
        "train": {"iterations": 1},
        "evaluate": {"crop": 32, "short_side": 32, "window": 32, "stride": 20} | how,
    }
    names = ["sky", "tree", "car", "dog", "house"]
    scene: dict[str, Any] = {"name": "toy", "dataset": "toy", "mode": "overlapped", "void": "background"}
    scene |= {"classes": names, "palette": [[40 * i, 10, 200] for i in range(5)], "steps": [{"new": g} for g in groups]}
    run = RunFolder(path, config.validate(recipe, "test"), scene, {"data": {"name": "toy"}})
    run.create()
    torch.manual_seed(0)
    model = build_model(run.config.model)
    for step in steps_of(groups[: reached + 1]):
        model.grow(step)
        for parameter in model.heads[-1].parameters():
            if parameter.ndim > 1:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        run.step_folder(step.index).mkdir(parents=True)
        checkpoint.save_weights(run.step_folder(step.index) / "model.safetensors", model)
        matrices = {f"{g}.{r}": np.eye(6, dtype=np.int64) for g in ("full", "crop") for r in ("all", "foreground")}
        run.finish_step(step.index, matrices, {"images": 7, "iterations": 1, "evaluated_images": 2})
    return run


def test_every_model_gives_the_same_numbers_without_cssbench(tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 3, 32, 32, generator=generator)
    image = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    np.save(tmp_path / "image.npy", image)
    runs = {name: made_up(tmp_path / "runs" / name, name) for name in VARIANTS}
    folders = {name: export.export(run.path, tmp_path / name) for name, run in runs.items()}
    words = [sys.executable, "-c", READER, tmp_path / "inputs.npy", tmp_path / "image.npy", *folders.values()]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, run in runs.items():
        ours, folder = export.from_run(run, 1), folders[name]
        with torch.no_grad():
            assert np.array_equal(np.load(folder / "scores.npy"), ours(inputs).numpy()), name
        for rule in ("all", "foreground"):
            found = np.load(folder / f"{rule}.npy")
            assert found.shape == (45, 61)
            assert np.array_equal(found, ours.predict(image, rule)), (name, rule)
            assert set(np.unique(found)) <= ({0} if rule == "all" else set()) | {5, 2, 3, 1}
        again = export.from_folder(folder)
        assert np.array_equal(again.predict(image), ours.predict(image)), name
        assert {p.name for p in folder.glob("*") if p.suffix != ".npy"} == {
            "README.md", "config.json", "model.safetensors", "modeling.py"
        }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("trained")
    recipe = make_recipe(folder, SEGVIT)
    return start(recipe, folder / "run", "evaluate.geometries=['full']")


@pytest.mark.parametrize("rule", ["all", "foreground"])
def test_predictions_are_those_that_the_run_counted(run: RunFolder, rule: str):
    model = export.from_run(run, 1)
    data = make_dataset("synthetic", run.config.data.root, run.config.data.options)
    total = torch.zeros(7, 7, dtype=torch.int64)
    for stem in data.stems("val"):
        image, label = data.pair("val", stem)
        total += confusion(torch.from_numpy(label), torch.from_numpy(model.predict(image, rule)).long(), 6)
    assert total.tolist() == run.records()[1].matrices[f"full.{rule}"].tolist()


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_the_card_says_scores_origin_labels_and_limits(run: RunFolder, tmp_path: Path, command: Callable):
    code, out, _ = command("export", run.path, "--step", 0, "--out", tmp_path / "model")
    assert (code, out.strip()) == (0, str(tmp_path / "model"))
    text = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    card = front_matter(text)
    assert (card["library_name"], card["pipeline_tag"]) == ("timm", "image-segmentation")
    values = {m["name"]: m["value"] for m in card["model-index"][0]["results"][0]["metrics"]}
    scores = scoring.step_scores(run, run.records()[0], protocol.get("mmseg150"))
    assert values["all mIoU, mmseg150@1"] == pytest.approx(100 * (scores["all"] or 0), abs=0.006)
    assert "incremental mIoU, mmseg150@1" not in values  # nothing was learned after step 0
    assert not any("plop@1" in name for name in values)  # no centre crop was evaluated
    row = next(line for line in text.splitlines() if line.startswith("| mmseg150@1"))
    assert row.split(" | ")[1:3] == [f"{100 * (scores['base'] or 0):.2f}", "-"]
    assert "knows 4 of 6 classes" in text
    assert "Classes of later steps are unknown to it: this is step 0 of 1." in text
    assert "no output for background" in text
    assert run.records()[0].content["sha256"]["model.safetensors"] in text
    assert "Licence: not stated" in text
    about = json.loads((tmp_path / "model/config.json").read_text())
    assert (about["groups"], sorted(about["classes"])) == ([[1, 2, 3, 4]], ["1", "2", "3", "4"])


def test_weights_to_begin_from_are_not_asked_for(tmp_path: Path):
    """A run that began with downloaded weights is exported, and read, without network and without their file."""
    made = made_up(tmp_path / "run", "vit-linear")
    backbone = made.config.model.options["backbone"] | {"checkpoint": "gone.safetensors"}
    choice = config.PartChoice(name="vit-linear", **(made.config.model.options | {"backbone": backbone}))
    changed = RunFolder(made.path, made.config.model_copy(update={"model": choice}), made.scenario, made.provenance)
    about = export.describe(changed, 1)
    assert (about["options"]["backbone"]["checkpoint"], about["options"]["backbone"]["pretrained"]) == (None, False)
    assert isinstance(export.from_run(changed, 1), Portable)


def test_what_cannot_be_exported_is_one_sentence(tmp_path: Path, command: Callable):
    made = made_up(tmp_path / "run", "vit-linear")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x")
    for words, message in [
        (("--out", full), "exists and is not an empty folder"),
        (("--out", tmp_path / "a", "--step", 2), "has not finished step 2"),
        (("--out", tmp_path / "a", "--step", 3), "has steps 0 to 2; there is no step 3"),
    ]:
        code, _, err = command("export", made.path, *words)
        assert (code, message in err) == (2, True), err
    weights = made.step_folder(1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, _, err = command("export", made.path, "--out", tmp_path / "a")
    assert (code, "does not match its checksum" in err) == (2, True)
    assert not (tmp_path / "a").exists()


def test_damaged_folders_are_run_errors(tmp_path: Path):
    folder = export.export(made_up(tmp_path / "run", "vit-linear").path, tmp_path / "model")
    about = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"format": "other"}, "neither a run folder nor a model that cssbench exported"),
        ({"version": 2}, "of version 2 of its format"),
        ({"groups": None}, "is damaged"),
        ({"groups": [[1]]}, "does not fit the model"),
    ]:
        (folder / "config.json").write_text(json.dumps(about | change))
        with pytest.raises(RunError, match=message):
            export.from_folder(folder)
    with pytest.raises(RunError, match="neither a run folder nor"):
        export.from_folder(tmp_path)


def test_no_code_of_a_folder_is_run_by_predict(tmp_path: Path):
    folder = export.export(made_up(tmp_path / "run", "vit-linear").path, tmp_path / "model")
    (folder / "modeling.py").write_text("raise SystemExit('run')")
    assert export.from_folder(folder).predict(np.zeros((9, 9, 3), np.uint8)).shape == (9, 9)


def test_a_model_that_needs_other_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "strange_net.py").write_text(
        "import rich\n\n\nclass Net:\n    def forward(self):\n        rich.print()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import strange_net

    with pytest.raises(ModelError, match="strange_net needs the package 'rich'"):
        bundle([strange_net.Net], [])


def test_two_things_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pack = tmp_path / "twinpack"
    pack.mkdir()
    (pack / "__init__.py").write_text("")
    (pack / "a.py").write_text("SIZE = 2\n\n\ndef _twice(x):\n    return SIZE * x\n\n\ndef unused():\n    return 0\n")
    (pack / "b.py").write_text(
        "from twinpack.a import _twice as double\n\nSIZE = 3\n\n\ndef _twice(x):\n    return x + SIZE\n\n\n"
        "class Base:\n    def forward(self, x):\n        return self.step(x)\n\n"
        "    def loss(self):\n        return 0\n\n\n"
        "class Net(Base):\n    def step(self, x):\n        return double(x), _twice(x), SIZE\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from twinpack.b import Net

    text = bundle([Net], [])
    assert "unused" not in text
    assert "loss" not in text
    space: dict[str, Any] = {}
    exec(text, space)
    assert space["Net"]().forward(5) == (10, 8, 3)


def test_linear_models_export_background(tmp_path: Path):
    about = export.describe(made_up(tmp_path / "run", "vit-linear"), 1)
    assert (about["has_background"], about["rule"], LINEAR["name"]) == (True, "foreground", about["model"])
