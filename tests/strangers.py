"""What packages of strangers are made of, and a small run with one of their methods."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from cssbench import registry

Command = Callable[..., tuple[int, str, str]]
Install = Callable[..., Path]

TINY = [word for change in (
    "data.options.size=32", "data.options.train=40", "data.options.val=4", "model.backbone.width=16",
    "model.backbone.depth=1", "model.backbone.heads=2", "model.backbone.layers=[1]", "model.backbone.image_size=32",
    "augment.crop=32", "train.batch_size=4", "train.iterations=2", "evaluate.crop=32", "evaluate.short_side=32",
    "evaluate.samples=1",
) for word in ("--set", change)]  # fmt: skip


def forget() -> None:
    """Make the registry look again at what is installed."""
    importlib.invalidate_caches()
    for cached in (registry.installed, registry.catalogue, registry.toml_catalogue):
        cached.cache_clear()


def package(name: str, **files: str) -> dict[str, str]:
    """A package of TOML files."""
    return {f"{name}/__init__.py": ""} | {f"{name}/{stem}.toml": text for stem, text in files.items()}


ONE_LINE = (
    "class Mine(Method):\n    def loss(self, ctx, batch):\n        return ctx.model.loss(batch.output, batch.labels)\n"
)
GOOD = f"from cssbench.api import *\n{ONE_LINE}"


def run(command: Command, folder: Path, method: str, *changes: str, data: Path | None = None) -> tuple[int, str, str]:
    sets = [word for change in (f"method.name={method}", *changes) for word in ("--set", change)]
    words = ["run", "synthetic-10-5-finetune-linear", "--data", data or folder / "data", "--out", folder / "out"]
    return command(*words, *TINY, *sets)
