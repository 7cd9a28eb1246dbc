"""Names -> parts, through entry points: our own parts and a stranger's stand in the same tables.

Listing imports no method, model, dataset or report; one is imported when it is named. A broken part fails alone and
says whose it is: everything else stays in use. Who gets a name that several claim:

- one of cssbench itself stays ours; the stranger's is reported and never used;
- one that only strangers claim is nobody's: using it raises PluginError until one of them is renamed or uninstalled.
"""

from __future__ import annotations

import difflib
import importlib.resources
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, distributions
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from cssbench.errors import CssbenchError, PluginError, UnknownNameError, fault

T = TypeVar("T")

GROUPS = (
    "methods", "namespaces", "models", "datasets", "scenarios", "recipes", "presets", "suites", "protocols", "reports",
    "loggers", "tools",
)  # fmt: skip
OWN = "cssbench"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]*")


@dataclass(frozen=True)
class Part:
    """One named part: `kind` (singular), `name`, the distribution it comes from, and its entry point."""

    kind: str
    name: str
    distribution: str
    entry_point: EntryPoint

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of the distribution {self.distribution!r}"

    def load(self) -> Any:
        """Import the part. Raises PluginError, naming the distribution, when that fails in any way."""
        try:
            # what a stranger's import prints is no output of ours
            with nullcontext() if self.distribution == OWN else redirect_stdout(sys.stderr):
                return self.entry_point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a stranger's import may raise anything, and call sys.exit
            raise PluginError(
                f"The {self} cannot be imported from {self.entry_point.value!r}: {describe(error)}. "
                f"{remedy(self.distribution, 'Mend that module')}"
            ) from error


@dataclass(frozen=True)
class Member(Part):
    """A method that a namespace makes, `namespace:member`: the entry point is that of the namespace, a function of the
    member's name."""

    def load(self) -> Any:
        """The method's class. Raises PluginError as `Part.load`, and what errors of cssbench the namespace raises."""
        make = super().load()
        try:
            return make(self.name.partition(":")[2])
        except CssbenchError:
            raise
        except Exception as error:  # a stranger's function may raise anything
            raise PluginError(
                f"The {self} cannot be made by {self.entry_point.value!r}: {describe(error)}. "
                f"{remedy(self.distribution, 'Mend that function')}"
            ) from error


@dataclass(frozen=True)
class Claim(Generic[T]):
    """That `distribution` has something under `name`. `where`: the text it stands as in the distribution."""

    name: str
    distribution: str
    where: str
    value: T


@dataclass
class Catalogue(Generic[T]):
    """The parts of one kind (singular). `refused`: name -> why nobody can use it. `faults`: what else is wrong with
    installed packages, one message each."""

    kind: str
    found: dict[str, T] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def get(self, name: str) -> T:
        """What stands under `name`. Raises UnknownNameError (with the nearest names) or PluginError."""
        if name in self.refused:
            raise PluginError(self.refused[name])
        if name not in self.found:
            remark = f"`cssbench list {self.kind}s` says what is wrong with installed packages." if self.faults else ""
            raise UnknownNameError(self.kind, name, self.found, remark)
        return self.found[name]

    @property
    def complaints(self) -> list[str]:
        """Everything that is wrong, for a reader."""
        return [*self.refused.values(), *self.faults]

    def settle(self, claims: Iterable[Claim[T]]) -> None:
        """Give every claimed name to the one that may have it; see the module's docstring."""
        by_name: dict[str, dict[tuple[str, str], Claim[T]]] = {}
        for claim in claims:
            by_name.setdefault(claim.name, {})[claim.distribution, claim.where] = claim
        for name, same in by_name.items():
            first, *others = same.values()
            ours = next((claim for claim in (first, *others) if claim.distribution == OWN), None)
            if not NAME.fullmatch(name):
                self.refused[name] = (
                    f"The distribution {first.distribution!r} calls a {self.kind} {name!r} ({first.where}). A name is "
                    f"made of letters, digits, '.', '_', '+', '@' and '-', and begins with a letter or digit. "
                    f"{remedy(first.distribution, 'Rename it there')}"
                )
            elif others and not ours:
                claimed = " and ".join(f"{c.distribution!r} ({c.where})" for c in (first, *others))
                self.refused[name] = (
                    f"More than one {self.kind} claims the name {name!r}: {claimed}. Rename all but one in the "
                    f"packages they come from, or uninstall with `pip uninstall {others[-1].distribution}`."
                )
            else:
                self.found[name] = (ours or first).value
                self.faults += [
                    f"The {self.kind} {name!r} of the distribution {claim.distribution!r} ({claim.where}) is not used: "
                    f"that name is one of cssbench itself. {remedy(claim.distribution, 'Rename it there')}"
                    for claim in (first, *others)
                    if ours and claim is not ours
                ]


def remedy(distribution: str, mend: str) -> str:
    """The last sentence of an error about a stranger's package; `mend` says what its author can do."""
    if distribution == OWN:
        return "That is a part of cssbench itself: reinstall cssbench, or report it as a bug."
    return f"{mend}, or uninstall it with `pip uninstall {distribution}`."


def describe(error: BaseException) -> str:
    """Type and message of an error caught from a stranger's code, and the last line of a file that it came from."""
    where, trace = "", error.__traceback__
    while trace and (trace := trace.tb_next):  # the first frame is that of the caller
        file = PurePath(trace.tb_frame.f_code.co_filename)
        if file.suffix == ".py" and "importlib" not in file.parts:
            where = f" (line {trace.tb_lineno} of {file})"
    return f"{type(error).__name__}: {error}{where}"


@cache
def installed() -> tuple[list[EntryPoint], list[str]]:
    """Every entry point of ours and of strangers, and one message for each package whose metadata are no use.

    Read package by package, so that the damaged metadata of one do not hide the rest.
    """
    entries: list[EntryPoint] = []
    faults: list[str] = []
    known = {f"{OWN}.{group}" for group in GROUPS}
    seen: set[str] = set()
    for dist in distributions():
        try:
            if f"{OWN}." not in (dist.read_text("entry_points.txt") or ""):
                continue
            name = dist.name
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(f"its name is {name!r}")
            if name in seen:  # an editable install leaves metadata in the checkout and in site-packages
                continue
            mine = [entry for entry in dist.entry_points if entry.group.split(".")[0] == OWN]
        except Exception as error:  # a stranger's metadata may be anything
            where = getattr(dist, "_path", "an unknown place")
            faults.append(
                f"The metadata of the package installed at {str(where)!r} are damaged ({describe(error)}), so that "
                f"none of its parts can be found. Reinstall that package, or remove that folder."
            )
            continue
        seen.add(name)
        entries += [entry for entry in mine if entry.group in known]
        for group in sorted({entry.group for entry in mine} - known):
            near = difflib.get_close_matches(group, known, n=1)
            hint = f"Did its author mean {near[0]!r}? " if near else f"Known: {', '.join(sorted(known))}. "
            faults.append(
                f"The distribution {name!r} declares parts in the entry-point group {group!r}, which does not exist. "
                f"{hint}{remedy(name, 'Rename the group in its pyproject.toml')}"
            )
    return entries, faults


def declared(group: str) -> tuple[list[Part], list[str]]:
    """Every part that a distribution declares in `group`, by name, and what is wrong with metadata. Imports nothing."""
    assert group in GROUPS, group
    entries, faults = installed()
    found = [
        Part(group.removesuffix("s"), entry.name, entry.dist.name, entry)
        for entry in sorted(entries, key=lambda entry: entry.name)
        if entry.group == f"{OWN}.{group}" and entry.dist
    ]
    return found, faults


@cache
def catalogue(group: str) -> Catalogue[Part]:
    """The parts of an entry-point group that are called by the name of their entry point. Imports nothing."""
    found, faults = declared(group)
    made: Catalogue[Part] = Catalogue(group.removesuffix("s"), faults=list(faults))
    made.settle(Claim(part.name, part.distribution, part.entry_point.value, part) for part in found)
    return made


def parts(group: str) -> dict[str, Part]:
    """All usable parts of an entry-point group, by name. Nothing is imported."""
    return catalogue(group).found


def missing_modules(group: str) -> list[str]:
    """A message for each part whose package is not there, found without importing anything."""
    return [
        f"The {part} is declared to be {part.entry_point.value!r}, but no module {top!r} is installed. "
        f"{remedy(part.distribution, 'Reinstall it')}"
        for part in parts(group).values()
        if not _there(top := part.entry_point.value.split(":")[0].split(".")[0].strip())
    ]


def _there(module: str) -> bool:
    try:
        return bool(module) and find_spec(module) is not None
    except (ImportError, ValueError):  # a module without a spec, already imported
        return True


def find(group: str, name: str) -> Part:
    """The part `name` of `group`; of methods also `namespace:member`, whose member is not looked at yet. Imports
    nothing. Raises UnknownNameError (with the nearest names) or PluginError."""
    namespace, colon, _ = name.partition(":")
    if group != "methods" or not colon:
        return catalogue(group).get(name)
    made_by = catalogue("namespaces").get(namespace)
    return Member("method", name, made_by.distribution, made_by.entry_point)


def distribution_of(group: str, name: str) -> str | None:
    """Which distribution has the part `name` of `group`; None where there is no such part."""
    try:
        return find(group, name).distribution
    except (UnknownNameError, PluginError):
        return None


def load(group: str, name: str) -> Any:
    """Import the part `name` of `group`. Raises UnknownNameError (with the nearest names) or PluginError."""
    return find(group, name).load()


def load_class(group: str, name: str, base: type[T], hooks: Sequence[str | tuple[str, ...]]) -> type[T]:
    """The class `name` of `group`. Raises as `load`, and PluginError unless it derives from `base` and defines `hooks`.

    `base` is one of `cssbench.api`. A tuple of hooks: the first one, or instead all the others.
    """
    part = find(group, name)
    cls = part.load()
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(
            f"The {part} is {cls!r}, not a subclass of cssbench.api.{base.__name__}. "
            f"{remedy(part.distribution, f'Derive it from that class, or let {part.entry_point.value!r} name another')}"
        )

    def defines(hook: str) -> bool:
        return getattr(cls, hook) is not getattr(base, hook) and callable(getattr(cls, hook))

    missing = []
    for first, *instead in ([hook] if isinstance(hook, str) else hook for hook in hooks):
        if not (defines(first) or (instead and all(map(defines, instead)))):
            missing.append(f"{first} (or {' and '.join(instead)})" if instead else first)
    if missing:
        raise PluginError(
            f"The {part} (class {cls.__name__}) does not define {' and '.join(missing)}, which every {part.kind} must; "
            f"see help(cssbench.api.{base.__name__}). {remedy(part.distribution, 'Define it in that class')}"
        )
    return cls


@cache
def toml_catalogue(group: str) -> Catalogue[tuple[str, Any]]:
    """TOML files shipped by the packages of `group` (scenarios, recipes, presets): file stem -> (distribution, file).

    The packages that hold them are imported, the files are not read. The names of their entry points do not matter.
    """
    found, faults = declared(group)
    made: Catalogue[tuple[str, Any]] = Catalogue(group.removesuffix("s"), faults=list(faults))
    claims = []
    for part in found:
        try:
            claims += [
                Claim(
                    file.name.removesuffix(".toml"),
                    part.distribution,
                    f"{file.name} of {part.entry_point.value}",
                    (part.distribution, file),
                )
                for file in _toml_files(part)
            ]
        except PluginError as error:
            made.faults.append(str(error))
    made.settle(claims)
    made.found = dict(sorted(made.found.items()))
    if group == "presets":
        _yield_to_models(made)
    return made


def _yield_to_models(presets: Catalogue[tuple[str, Any]]) -> None:
    """Models and presets are named in the same places: an installed model keeps its name, the preset is reported."""
    for name, part in parts("models").items():
        if name in presets.found:
            owner, _ = presets.found.pop(name)
            other = owner if owner != OWN else part.distribution
            presets.faults.append(
                f"The preset {name!r} of the distribution {owner!r} is not used: that name is the {part}. "
                f"{remedy(other, 'Rename the one that is there')}"
            )


def _toml_files(part: Part) -> list[Any]:
    package = part.load()
    if not hasattr(package, "__path__"):
        raise PluginError(
            f"The {part.kind} entry point {part.name!r} of the distribution {part.distribution!r} must name a "
            f"package that holds TOML files, not {part.entry_point.value!r}. "
            f"{remedy(part.distribution, 'Name such a package')}"
        )
    try:
        return [file for file in importlib.resources.files(package).iterdir() if file.name.endswith(".toml")]
    except Exception as error:  # a stranger's package may be made of anything
        raise PluginError(
            f"The {part} names {part.entry_point.value!r}, whose files cannot be listed: {describe(error)}. "
            f"{remedy(part.distribution, 'Mend that package')}"
        ) from error


def toml_files(group: str) -> dict[str, tuple[str, Any]]:
    """Usable TOML files of the packages of `group` (scenarios, recipes): file stem -> (distribution, file)."""
    return toml_catalogue(group).found


def read_toml(group: str, name: str) -> dict[str, Any]:
    """The content of the TOML file `name` (a stem) of `group`. Raises UnknownNameError or PluginError."""
    distribution, file = toml_catalogue(group).get(name)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PluginError(
            f"The {group.removesuffix('s')} {name!r} of the distribution {distribution!r} is not valid TOML: "
            f"{fault(error)}. {remedy(distribution, 'Mend that file')}"
        ) from None
