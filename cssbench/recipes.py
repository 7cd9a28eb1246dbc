"""Recipes and presets as plain data: where their files are, how one starts from another, overrides.

A recipe is a TOML file of the group `cssbench.recipes`, or any path. A preset names a model and its options, as [model]
of a recipe does; it is a file of the group `cssbench.presets`. What they may hold is checked by `cssbench.config`.
`extends = "other"` at the top of either starts from another one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from cssbench import registry
from cssbench.errors import ConfigError, UnknownNameError, fault

KEPT = ("pretrained", "checkpoint", "mean", "std", "drop_path")  # of an encoder, when its model is exchanged
PARTS = ("method", "model")  # sections whose options belong to the part they name


def read_recipe(name: str) -> dict[str, Any]:
    """The content of a recipe: an installed one by name, or a path to a TOML file.

    `extends`, a recipe's name or a path relative to the file that says it, is resolved: see `extend`. Raises
    ConfigError (UnknownNameError for `name` itself), also when recipes extend each other in a circle; PluginError when
    an installed recipe is not valid TOML.
    """
    return reduce(extend, _chain("recipes", name))


def read_suite(name: str) -> dict[str, Any]:
    """The content of a suite (`cssbench.suites`): an installed one by name, or a path. Raises as `read_recipe`."""
    return reduce(_merged, _chain("suites", name))


def read_preset(name: str) -> dict[str, Any]:
    """The [model] section that a preset stands for: an installed one by name, or a path. Raises as `read_recipe`."""
    layers = [{"model": layer} for layer in _chain("presets", name)]
    return reduce(extend, layers)["model"]


def with_preset(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose model.name is a preset: the preset's model and options, and the recipe's own options over them.

    Anything else is returned as it is: an installed model, or a name that nobody has.
    """
    model = content.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(name, str) or name not in known_presets():
        return content
    own = {key: value for key, value in model.items() if key != "name"}
    return {**content, "model": _merged(read_preset(name), own)}


def named_model(name: str) -> dict[str, Any]:
    """The [model] section of an installed model without options, or of a preset (a path to one, too).

    Raises UnknownNameError with the nearest names of both, PluginError, ConfigError.
    """
    if name in registry.parts("models"):
        return {"name": name}
    if not name.endswith(".toml") and name not in known_presets():
        if name in registry.catalogue("models").refused:
            registry.catalogue("models").get(name)
        if name in registry.toml_catalogue("presets").refused:
            registry.read_toml("presets", name)
        raise UnknownNameError("model", name, [*registry.parts("models"), *known_presets()])
    section = read_preset(name)
    if not isinstance(section.get("name"), str):
        raise ConfigError(f'Preset {name!r} names no model: it needs a line such as name = "segvit".')
    return section


def with_model(recipe: dict[str, Any], name: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe with its whole [model] replaced by an installed model or preset: what --model does.

    An encoder of the same name keeps the recipe's weights, normalisation and drop path. A ViT stores its position
    embeddings for the crop of the run, unless the preset says for which. changes: overrides that follow, from which
    the crop is known. Raises as `named_model`; ConfigError where the recipe starts from weights of another encoder and
    `changes` do not say what this one starts from.
    """
    section, old = named_model(name), _table(with_preset(recipe), "model")
    mine, before = _encoder(section), _table(old, "backbone")
    if mine is None:
        return {**recipe, "model": section}
    section = made_for(section, _table(override(recipe, list(changes)), "augment").get("crop", 512))
    backbone: dict[str, Any] = {}
    its = _encoder(old) if old.get("name") in registry.parts("models") else None  # it may be gone: it is not used
    if its is not None and str(its.name).split(".")[0] == mine.name.split(".")[0]:
        backbone |= {key: before[key] for key in KEPT if key in before}
    elif before.get("pretrained") or before.get("checkpoint", "none") != "none":
        weights = ("model.backbone.checkpoint", "model.backbone.pretrained")
        if not any(change.partition("=")[0].strip() in weights for change in changes):
            raise ConfigError(
                f"The recipe starts from weights of {before.get('name')!r}, and model {name!r} has the encoder "
                f"{mine.name!r}. Say what it starts from: --set model.backbone.checkpoint=FILE, --set "
                f"model.backbone.pretrained=true (timm downloads them), or =false (from scratch)."
            )
    return {**recipe, "model": {**section, "backbone": backbone | _table(section, "backbone")}}


def made_for(section: dict[str, Any], side: int) -> dict[str, Any]:
    """A [model] section whose ViT stores its position embeddings for inputs of `side` px, unless it says for which."""
    encoder = _encoder(section)
    if encoder is None or "image_size" not in type(encoder).model_fields:
        return section
    return {**section, "backbone": {"image_size": side} | _table(section, "backbone")}


def _table(content: dict[str, Any], key: str) -> dict[str, Any]:
    """What stands under `key`, or nothing where that is no table, of which `cssbench.config` complains."""
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def _encoder(section: dict[str, Any]) -> Any:
    """`backbone` of a [model] section with its defaults, or None for a model that has none with a name."""
    cls = registry.load("models", section["name"])
    field: Any = cls.Config.model_fields.get("backbone")
    if "name" not in getattr(getattr(field, "annotation", None), "model_fields", {}):
        return None
    default = field.get_default(call_default_factory=True)
    return default.model_copy(update={"name": _table(section, "backbone").get("name", default.name)})


def known_presets() -> list[str]:
    """Names of installed presets; none is the name of an installed model."""
    return list(registry.toml_files("presets"))


def _chain(group: str, name: str) -> list[dict[str, Any]]:
    """The file `name` and those that it starts from, the last of these first."""
    kind = group.removesuffix("s")
    path, content = _read_file(group, name, Path())
    chain = {path: name}
    layers = [content]
    while "extends" in content:
        base = content.pop("extends")
        if not isinstance(base, str):
            raise ConfigError(
                f"In {kind} {name!r}, 'extends' (it is {base!r}) must be the name of one {kind}, or a path to a TOML "
                f"file relative to this one."
            )
        try:
            path, content = _read_file(group, base, path.parent)
        except UnknownNameError as error:
            raise ConfigError(f"{kind.capitalize()} {name!r} extends {base!r}. {error}") from error
        name = base
        if path in chain:
            circle = " -> ".join(map(repr, [*chain.values(), name]))
            raise ConfigError(
                f"{group.capitalize()} extend each other in a circle: {circle}. Remove one `extends` of these."
            )
        chain[path] = name
        layers.append(content)
    return layers[::-1]


def _read_file(group: str, name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where the file `name` lies and what it holds; a relative path starts at `folder`."""
    kind = group.removesuffix("s")
    if not name.endswith(".toml"):
        content = registry.read_toml(group, name)
        return Path(str(registry.toml_files(group)[name][1])).resolve(), content
    path = folder / name
    try:
        return path.resolve(), tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownNameError(f"{kind} file", str(path), registry.toml_files(group)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{kind.capitalize()} {str(path)!r} is not valid TOML: {fault(error)}.") from None


def extend(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """`content` over `base`: tables are merged key by key, all else is replaced.

    Where `content` names another method or model than `base`, that section of `base` is dropped: its options belong to
    the part it names.
    """
    kept = {key: value for key, value in base.items() if not (key in PARTS and _renamed(value, content.get(key)))}
    return _merged(kept, content)


def _renamed(old: Any, new: Any) -> bool:
    both = isinstance(old, dict) and isinstance(new, dict) and "name" in old and "name" in new
    return both and old["name"] != new["name"]


def _merged(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    merged = {**base}
    for key, value in content.items():
        old = base.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def override(content: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments; a value is read as TOML, or as a string when that fails. Raises ConfigError."""
    content = {**content}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"An override must look like section.key=value, not {assignment!r}.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text.strip()
        node = content
        for key in keys[:-1]:
            child = node.get(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"In {assignment!r}, {key!r} is a value, not a section.")
            node[key] = {**child}
            node = node[key]
        node[keys[-1]] = value
    return content
