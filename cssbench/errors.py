"""Everything that can go wrong through a user's input, as one tree.

    CssbenchError                 base of all; the CLI prints it as one paragraph and exits with code 2
    ├── UnknownNameError          no scenario, method, model, ... of that name (nearest names given)
    ├── PluginError               a plug-in cannot be imported, clashes, or does not keep the interface
    ├── ConfigError               a recipe or an option is wrong
    ├── ScenarioError             a scenario file contradicts itself or its dataset
    ├── DataError                 a data root, image or label map is missing, unreadable or inconsistent
    ├── ModelError                a model cannot be built or fed as asked
    ├── NonFiniteLossError        training met a NaN or an infinity; names the images of the batch
    └── RunError                  a run folder is missing, damaged, locked, or of another configuration

A message says what was wrong, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NAMED = (
    "method",
    "model",
    "preset",
    "dataset",
    "scenario",
    "recipe",
    "suite",
    "protocol",
    "report",
)  # kinds of `cssbench list`
LISTED = 20  # names that an error prints; of more it says where they are listed


class CssbenchError(Exception):
    """Base of every error that a user can cause and mend. Exit code 2."""


class PluginError(CssbenchError):
    """A plug-in cannot be imported, clashes with another, or does not keep the interface."""


class ConfigError(CssbenchError):
    """A recipe, an override or an option is wrong."""


class ScenarioError(CssbenchError):
    """A scenario file contradicts itself or the dataset it names."""


class DataError(CssbenchError):
    """A data root, an image or a label map is missing, unreadable or inconsistent."""


class ModelError(CssbenchError):
    """A model cannot be built, or cannot take the input, as asked."""


class NonFiniteLossError(CssbenchError):
    """Training met a NaN or an infinity."""


class RunError(CssbenchError):
    """A run folder is missing, damaged, in use, or belongs to another configuration."""


def fault(error: Exception) -> str:
    """What a reader of TOML, JSON or YAML found wrong, for a message."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


class UnknownNameError(CssbenchError):
    """No part of that kind has that name. `remark` is added to the message."""

    def __init__(self, kind: str, name: str, known: Iterable[str], remark: str = ""):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        listed = f"Known: {', '.join(known) or 'none'}."
        if len(known) > LISTED and kind.split()[0] in NAMED:
            listed = f"`cssbench list {kind.split()[0]}s` shows all {len(known)}."
        super().__init__(f"There is no {kind} named {name!r}. {hint}{listed} {remark}".rstrip())
        self.kind, self.name, self.near = kind, name, near
