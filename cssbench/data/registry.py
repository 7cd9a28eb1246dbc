"""Datasets by name: from the registry to an opened data root. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cssbench import registry
from cssbench.data.archive import Archive
from cssbench.data.base import SegDataset
from cssbench.errors import ConfigError


def root_variable(name: str) -> str:
    """The environment variable that holds the data root of the dataset `name` where a command gives none."""
    return f"CSSBENCH_DATA_{re.sub('[^A-Z0-9]', '_', name.upper())}"


def default_root(name: str) -> str | None:
    """What `root_variable` holds, as an absolute path; None where it is not set."""
    root = os.environ.get(root_variable(name))
    return str(Path(root).expanduser().resolve()) if root else None


def _whence(name: str, cls: type[SegDataset]) -> str:
    """How to come by the data."""
    if isinstance(cls.archive, Archive):
        return f"`cssbench data fetch {name} --root ROOT` downloads it."
    return f"`cssbench data fetch` does not get it: {cls.archive}." if cls.archive else ""


def make_dataset(name: str, root: str | None, options: dict[str, Any] | None = None) -> SegDataset:
    """The dataset `name` at `root`. Raises UnknownNameError, PluginError, ConfigError (no root, unknown option),
    DataError."""
    cls = registry.load_class("datasets", name, SegDataset, ["layout", "folders"])  # type: ignore[type-abstract]
    if not root:
        raise ConfigError(
            f"The dataset {name!r} needs a data root: give --data ROOT, or set {root_variable(name)}. "
            f"{_whence(name, cls)}".rstrip()
        )
    try:
        return cls(root, **(options or {}))
    except (TypeError, ValidationError) as error:
        raise ConfigError(f"The options of dataset {name!r} are not valid: {error}.") from None
