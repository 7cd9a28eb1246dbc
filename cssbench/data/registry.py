"""Datasets by name: from the registry to an opened data root. No torch."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from cssbench import registry
from cssbench.data.base import SegDataset
from cssbench.errors import ConfigError


def make_dataset(name: str, root: str | None, options: dict[str, Any] | None = None) -> SegDataset:
    """The dataset `name` at `root`. Raises UnknownNameError, PluginError, ConfigError (no root, unknown option),
    DataError."""
    cls = registry.load_class("datasets", name, SegDataset, ["layout", "folders"])  # type: ignore[type-abstract]
    if not root:
        raise ConfigError(f"The dataset {name!r} needs a data root: give --data ROOT.")
    try:
        return cls(root, **(options or {}))
    except (TypeError, ValidationError) as error:
        raise ConfigError(f"The options of dataset {name!r} are not valid: {error}.") from None
