"""Names -> parts, through entry points: our own parts and a stranger's stand in the same tables.

Listing imports nothing. A part is imported when it is named; a broken one fails alone and says whose it is.
"""

from __future__ import annotations

import importlib.resources
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cssbench.errors import PluginError, UnknownNameError

GROUPS = ("methods", "models", "datasets", "scenarios", "recipes", "protocols", "reports", "tools")


@dataclass(frozen=True)
class Part:
    """One named part: `kind` (singular), `name`, the distribution it comes from, and its entry point."""

    kind: str
    name: str
    distribution: str
    entry_point: EntryPoint

    def load(self) -> Any:
        """Import the part. Raises PluginError, naming the distribution, when that fails in any way."""
        try:
            return self.entry_point.load()
        except Exception as error:  # a stranger's import may raise anything
            raise PluginError(
                f"The {self.kind} {self.name!r} of the distribution {self.distribution!r} cannot be imported from "
                f"{self.entry_point.value!r}: {type(error).__name__}: {error}. Mend that module, or uninstall it with "
                f"`pip uninstall {self.distribution}`."
            ) from error


@cache
def parts(group: str) -> dict[str, Part]:
    """All parts of an entry-point group, by name. Raises PluginError when two distributions claim one name."""
    assert group in GROUPS, group
    kind = group.removesuffix("s")
    found: dict[str, Part] = {}
    for entry in sorted(entry_points(group=f"cssbench.{group}"), key=lambda e: e.name):
        part = Part(kind, entry.name, entry.dist.name if entry.dist else "unknown", entry)
        other = found.get(entry.name)
        if other and other.entry_point.value != entry.value:
            raise PluginError(
                f"Two distributions claim the {kind} name {entry.name!r}: {other.distribution!r} "
                f"({other.entry_point.value}) and {part.distribution!r} ({entry.value}). "
                f"Rename one of them in its pyproject.toml, or uninstall one."
            )
        found[entry.name] = part
    return found


def load(group: str, name: str) -> Any:
    """Import the part `name` of `group`. Raises UnknownNameError (with the nearest names) or PluginError."""
    found = parts(group)
    if name not in found:
        raise UnknownNameError(group.removesuffix("s"), name, found)
    return found[name].load()


def toml_files(group: str) -> dict[str, tuple[str, importlib.resources.abc.Traversable]]:
    """TOML files shipped by the packages of `group` (scenarios, recipes): file stem -> (distribution, file).

    Raises PluginError when two packages ship the same stem, or a package cannot be imported or is none.
    """
    files: dict[str, tuple[str, Any]] = {}
    for part in parts(group).values():
        package = part.load()
        if not hasattr(package, "__path__"):
            raise PluginError(
                f"The {part.kind} entry point {part.name!r} of the distribution {part.distribution!r} must name a "
                f"package that holds TOML files, not {part.entry_point.value!r}."
            )
        for file in importlib.resources.files(package).iterdir():
            if not file.name.endswith(".toml"):
                continue
            stem = file.name.removesuffix(".toml")
            if stem in files:
                raise PluginError(
                    f"Two distributions ship the {part.kind} {stem!r}: {files[stem][0]!r} and {part.distribution!r}. "
                    f"Rename one of the files."
                )
            files[stem] = (part.distribution, file)
    return dict(sorted(files.items()))


def read_toml(group: str, name: str) -> dict[str, Any]:
    """The content of the TOML file `name` (a stem) of `group`. Raises UnknownNameError or PluginError."""
    files = toml_files(group)
    if name not in files:
        raise UnknownNameError(group.removesuffix("s"), name, files)
    distribution, file = files[name]
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PluginError(
            f"The {group.removesuffix('s')} {name!r} of the distribution {distribution!r} is not valid TOML: {error}. "
            f"Mend that file, or uninstall it with `pip uninstall {distribution}`."
        ) from None
