"""`cssbench export`: a step of a run as a folder that PyTorch and timm read without cssbench.

DIR/
  model.safetensors   the weights
  config.json         format, the model's options, classes, normalisation, how images are evaluated (see `describe`)
  modeling.py         the model and its inference, taken from the source of cssbench (`cssbench.bundle`)
  README.md           a model card in the form of Hugging Face (`cssbench.model_card`)

Nothing is pickled. `cssbench predict` reads weights and config.json alone and runs no code of a folder.
"""

from __future__ import annotations

import inspect
import shutil
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any

from pydantic import BaseModel

import cssbench
from cssbench import bundle, checkpoint, config, model_card, provenance
from cssbench.config import Section
from cssbench.contract import build_model, model_class
from cssbench.errors import ModelError, RunError
from cssbench.models.segmenter import count_parameters
from cssbench.portable import Options, Portable, assemble, steps_of
from cssbench.results import RunFolder, read_json, write_bytes, write_json
from cssbench.scoring import has_background_class

FORMAT, VERSION = "cssbench-model", 1
WEIGHTS, ABOUT, CODE, CARD = "model.safetensors", "config.json", "modeling.py", "README.md"
HOW = ("short_side", "long_side", "inference", "window", "stride", "chunk", "background_threshold")
CODE_KINDS = (FunctionType, property, cached_property)
HEADER = '''"""Model {model} of cssbench {version} and its inference: made by `cssbench export` from its source.

    from modeling import load
    model = load()                     # weights and config.json of this folder; torch.nn.Module in eval mode
    ids = model.predict(image)         # (H, W, 3) uint8 RGB -> (H, W) uint8 class ids
    scores = model(images)             # (B, 3, H, W) normalised -> (B, C, H, W)

Copyright of the cssbench authors, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
'''
LOADER = '''

def load(folder=Path(__file__).resolve().parent, device="cpu"):
    """The model of an exported folder, in eval mode, on `device`. Runs nothing but this file."""
    about = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model = {model}(Options(**about["options"]))
    return assemble(model, about, load_file(Path(folder) / "model.safetensors")).to(device)
'''


def export(source: Path, out: Path, step: int | None = None) -> Path:
    """Write the folder `out` from a finished step of a run (default: the last one). Raises RunError, ModelError.

    Nothing is left where something goes wrong.
    """
    run = RunFolder.read(source)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise RunError(f"{out} exists and is not an empty folder. Choose another --out.")
    step = len(run.records()) - 1 if step is None else step
    if not 0 <= step < run.num_steps:
        raise RunError(f"{run.path} has steps 0 to {run.num_steps - 1}; there is no step {step}.")
    record, weights = run.weights(step)
    portable, kind = from_run(run, step), model_class(run.config.model.name)
    _refuse_methods(kind.Config)
    code = bundle.bundle([kind, assemble], [Portable, Options])
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights, out / WEIGHTS)
        write_json(out / ABOUT, portable.about)
        head = HEADER.format(model=run.config.model.name, version=cssbench.__version__)
        write_bytes(out / CODE, (head + code + LOADER.format(model=kind.__name__)).encode())
        write_bytes(out / CARD, model_card.card(run, record, portable.about, count_parameters(portable.model)).encode())
    except OSError as error:
        if made:
            shutil.rmtree(out, ignore_errors=True)
        raise RunError(f"{out} cannot be written ({error.strerror or error}).") from None
    return out


def _refuse_methods(options: type[BaseModel]) -> None:
    """Raises ModelError when options, which are data in the folder, have methods that a model may call."""
    plain = set(dir(Section))
    found = [n for n in dir(options) if n not in plain and n[0] != "_" and isinstance(_member(options, n), CODE_KINDS)]
    if found:
        raise ModelError(
            f"The model cannot be exported: its {options.__qualname__} defines {', '.join(found)}, and options are "
            f"plain data in {ABOUT}. Make it a function that takes the options."
        )
    for field in options.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            _refuse_methods(field.annotation)


def _member(options: type[BaseModel], name: str) -> Any:
    return inspect.getattr_static(options, name, None)


def from_run(run: RunFolder, step: int) -> Portable:
    """The model after a finished step of a run, on the CPU. Raises RunError, ModelError."""
    _, weights = run.weights(step)
    return _built(describe(run, step), weights)


def from_folder(folder: Path) -> Portable:
    """The model of an exported folder, built by the cssbench that is installed: no code of the folder is run.

    Raises RunError when it is no such folder, and what building its model raises.
    """
    about = read_json(folder / ABOUT) if (folder / ABOUT).exists() else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise RunError(
            f"{folder} is neither a run folder nor a model that cssbench exported: it has no config.toml, and no "
            f"{ABOUT} of the format {FORMAT!r}."
        )
    if about.get("version") != VERSION:
        raise RunError(f"{folder} is of version {about.get('version')} of its format; this cssbench reads {VERSION}.")
    try:
        return _built(about, folder / WEIGHTS)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / ABOUT} is damaged ({error!r}). Export the run again.") from None


def _built(about: dict[str, Any], weights: Path) -> Portable:
    choice = config.PartChoice(name=about["model"], **about["options"])
    model = build_model(choice)
    for step in steps_of(about["groups"]):
        model.grow(step)
    checkpoint.load_weights(weights, model)
    return Portable(model, about)


def describe(run: RunFolder, step: int) -> dict[str, Any]:
    """The content of config.json.

    format, version, cssbench; model, options (resolved; nothing is fetched by them); step, groups (class ids of steps
    0..step: the order of outputs), classes {id: name}, palette {id: [r, g, b]}; has_background: is channel 0
    background; background_class: is label 0 a class of the dataset; multiple, px, pixel_mean, pixel_std; evaluate, the
    recipe's; precision; rule: what `predict` answers with; scenario, dataset; packages: versions at export.
    """
    choice, settings = run.config.model, run.config
    checked = config.part_config("model", choice, model_class(choice.name).Config)
    options = _without_sources(checked.model_dump(mode="json"))
    model = build_model(config.PartChoice(name=choice.name, **options))
    groups, scene = [list(group) for group in run.groups[: step + 1]], run.scenario
    names = scene.get("classes") or []
    palette = scene.get("palette") or []
    seen = [c for group in groups for c in group]
    if len(names) < max(seen) or len(palette) < max(seen):
        raise ModelError(f"{run.path} names {len(names)} classes in its scenario.json; {max(seen)} are needed.")
    how = settings.evaluate.model_dump(mode="json")
    return {
        "format": FORMAT,
        "version": VERSION,
        "cssbench": cssbench.__version__,
        "model": choice.name,
        "options": options,
        "step": step,
        "groups": groups,
        "classes": {str(c): names[c - 1] for c in sorted(seen)},
        "palette": {str(c): list(map(int, palette[c - 1])) for c in sorted(seen)},
        "has_background": model.has_background,
        "background_class": has_background_class(run),
        "multiple": model.multiple,
        "pixel_mean": list(model.pixel_mean),
        "pixel_std": list(model.pixel_std),
        "evaluate": {name: how[name] for name in HOW},
        "precision": settings.train.precision,
        "rule": "all" if has_background_class(run) else "foreground",
        "scenario": scene["name"],
        "dataset": scene["dataset"],
        "packages": {name: provenance.package_version(name) for name in ("torch", "torchvision", "timm")},
    }


def _without_sources(options: dict[str, Any]) -> dict[str, Any]:
    """The options without weights to begin from: the folder has its own."""
    found = {key: _without_sources(value) if isinstance(value, dict) else value for key, value in options.items()}
    return found | {key: value for key, value in (("pretrained", False), ("checkpoint", None)) if key in found}
