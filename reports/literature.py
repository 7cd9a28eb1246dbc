"""Published numbers as data: the YAML files in `reports/published`, one per source, validated as they are read.

A number stands as it was printed: it is read as a decimal, so that `40.00` keeps its two places and the linter can tell
how far rounding may have moved it. docs/published.md gives the format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cssbench.config import explain_validation
from cssbench.errors import DataError, fault
from cssbench.scenario import Mode

Percent = Annotated[Decimal, Field(ge=0, le=100, allow_inf_nan=False)]
Points = Annotated[Decimal, Field(ge=-100, le=100, allow_inf_nan=False)]


class Entry(BaseModel):
    """What every row has. `file` is the stem of its YAML file, which the reader fills in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = ""
    paper: str = Field(min_length=1, description="what prints the number: not always the paper of the method")
    year: int = Field(ge=1990, le=2100)
    source: str = Field(min_length=1, description="where the number was read")
    note: str = Field("", description="what a reader must know beside the number")

    @property
    def key(self) -> tuple[Any, ...]:
        """Two rows of a file must not agree in it."""
        raise NotImplementedError


class Run(Entry):
    """A row about one method on one scenario."""

    method: str = Field(min_length=1)
    backbone: str = Field(min_length=1)
    scenario: str = Field(min_length=1, description="a name of `cssbench list scenarios`")
    mode: Mode
    protocol: str | None = Field(None, pattern=r"^[\w.-]+@\d+$", description="convention claimed; None: not stated")
    reproduced: bool = Field(False, description="run by others than the authors of the method")

    @property
    def key(self) -> tuple[Any, ...]:
        return self.source, self.method, self.backbone, self.scenario, self.mode, self.reproduced


class Reduction(BaseModel):
    """Reductions against the joint run as printed: points or percent, which the linter finds out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Points | None = None
    inc: Points | None = None
    all: Points | None = None


class Row(Run):
    """mIoU in percent over base, incremental and all classes after the last step; avg over steps. None: not printed.

    groups: mIoU of the classes of each step after the last one, where printed. oracle: joint training on all classes.
    """

    base: Percent | None = None
    inc: Percent | None = None
    all: Percent | None = None
    avg: Percent | None = None
    groups: tuple[Percent, ...] = ()
    reduction: Reduction | None = None
    oracle: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> Row:
        if {self.base, self.inc, self.all, self.avg} == {None}:
            raise ValueError("give at least one of base, inc, all, avg")
        if self.groups and self.groups[0] != self.base:
            raise ValueError(f"the first of groups is the base classes: it must equal base, which is {self.base}")
        return self


class Forgetting(Run):
    """mIoU in percent of the classes of one step: right after it, after the last step, and the difference as printed.

    group: the class ids, or `mean`.
    """

    group: str = Field(pattern=r"^(\d+-\d+|mean)$")
    first: Percent
    last: Percent
    forgetting: Points

    @property
    def key(self) -> tuple[Any, ...]:
        return *super().key, self.group


class Measured(Entry):
    """A row of any other table: mIoU and cost of ordinary segmentation.

    setting: what was measured. values: what came out: mIoU in percent, GFLOPs in the papers' convention (one
    multiply-add is one), or a bound as printed (">150").
    """

    table: str = Field(min_length=1)
    dataset: str | None = None
    setting: dict[str, Any]
    values: dict[str, Decimal | Annotated[str, Field(pattern=r"^>\d+$")]] = Field(min_length=1)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.table, self.dataset, repr(sorted(self.setting.items()))


SECTIONS: dict[str, type[Entry]] = {"rows": Row, "forgetting": Forgetting, "tables": Measured}
Kind = TypeVar("Kind", bound=Entry)


@dataclass(frozen=True)
class Published:
    """The content of one file, or of several together."""

    rows: tuple[Row, ...] = ()
    forgetting: tuple[Forgetting, ...] = ()
    tables: tuple[Measured, ...] = ()

    def __add__(self, other: Published) -> Published:
        return Published(self.rows + other.rows, self.forgetting + other.forgetting, self.tables + other.tables)


def rows(
    scenario: str | None = None,
    *,
    method: str | None = None,
    backbone: str | None = None,
    mode: str | None = None,
    protocol: str | None = None,
) -> tuple[Row, ...]:
    """The shipped rows that agree with every argument given, file by file as they stand there."""
    wanted = {"scenario": scenario, "method": method, "backbone": backbone, "mode": mode, "protocol": protocol}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    return tuple(row for row in shipped().rows if all(getattr(row, name) == value for name, value in wanted.items()))


@cache
def shipped() -> Published:
    """All that cssbench ships. Raises DataError when a file of it is not valid."""
    folder = resources.files("cssbench.reports") / "published"
    return read_all(sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name))


def read_all(files: Sequence[Traversable]) -> Published:
    """Several files together. Raises DataError as `read` does."""
    return sum((read(file) for file in files), Published())


def read(path: Traversable) -> Published:
    """One file. Its `defaults` hold for every row that does not say otherwise.

    Raises DataError naming the file, the row, the key and what it may hold.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Name a YAML file of rows.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(fault(error).split())}. Mend that line.") from None
    known = {"defaults", *SECTIONS}
    if not isinstance(content, dict) or not known > set(content) - {"defaults"} > set():
        raise DataError(
            f"{path} must be a mapping with one or more of {', '.join(SECTIONS)}, and `defaults` for what their rows "
            f"share; nothing else. docs/published.md has an example."
        )
    defaults = content.pop("defaults", {})
    return Published(**{name: _section(path, name, listed, defaults) for name, listed in content.items()})  # type: ignore[arg-type]


def _section(path: Traversable, name: str, listed: Any, defaults: Any) -> tuple[Entry, ...]:
    if not isinstance(listed, list) or not isinstance(defaults, dict):
        raise DataError(f"{path}: `{name}` must be a list of rows, `defaults` a mapping.")
    found: dict[tuple[Any, ...], Entry] = {}
    for number, content in enumerate(listed, 1):
        if not isinstance(content, dict):
            raise DataError(f"{path}: {name} {number} must be a mapping of keys to values, not {content!r}.")
        row = _entry(SECTIONS[name], f"{path}: {name} {number}", path.name, defaults | content)
        if row.key in found:
            raise DataError(f"{path}: {name} {number} and an earlier one are of the same run: {row.key}. Keep one.")
        found[row.key] = row
    return tuple(found.values())


def _entry(kind: type[Kind], where: str, file: str, content: dict[str, Any]) -> Kind:
    named = f" ({content['method']})" if "method" in content else ""
    try:
        return kind.model_validate(content | {"file": file.removesuffix(".yaml")})
    except ValidationError as error:
        text = explain_validation(where + named, error, kind)
        raise DataError(re.sub(r"Decimal\('([^']*)'\)", r"\1", text)) from None


class Loader(yaml.SafeLoader):
    """YAML with decimals for floats, and an error where a key stands twice."""

    def decimal(self, node: yaml.ScalarNode) -> Decimal:
        text = str(self.construct_scalar(node))
        try:
            return Decimal(text)
        except InvalidOperation:
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is no number", node.start_mark) from None

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
        return self.construct_mapping(node, deep=True)


Loader.add_constructor("tag:yaml.org,2002:float", Loader.decimal)
Loader.add_constructor("tag:yaml.org,2002:map", Loader.mapping)
