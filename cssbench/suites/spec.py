"""A suite: one TOML that stands for methods x scenarios x models x seeds x class orders, and their oracles.

Each run is a recipe: `recipe` (of the suite, or of the method), with the run's method, scenario, model, seed and class
order put in, and then what stands under `set`: for all runs, for its model, its scenario, its method, in this order.
A file of the group `cssbench.suites`, or any path; `extends = "other"` starts from another suite.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from cssbench import recipes, scenario
from cssbench.config import RunConfig, Section, explain_validation, validate
from cssbench.errors import ConfigError, UnknownNameError
from cssbench.results import image_name

Names = Annotated[list[str], Field(min_length=1)]
Settings = dict[str, Any]
Order = Literal["native"] | int | list[int]
AXES = (("seed",), ("scenario", "name"), ("scenario", "order"), ("method", "name"), ("model", "name"))


class ScenarioPart(Section):
    """What is particular to one scenario. `name`: the scenario that the label stands for; None: the label itself."""

    name: str | None = None
    set: Settings = Field(default_factory=dict)


class ModelPart(Section):
    """What is particular to one model. `name`: the model or preset that the label stands for; None: the label."""

    name: str | None = None
    set: Settings = Field(default_factory=dict)


class MethodPart(Section):
    """What is particular to one method. `recipe` replaces the suite's; `name`: the method that the label stands for;
    None: the recipe's where there is one, else the label."""

    name: str | None = None
    recipe: str | None = None
    set: Settings = Field(default_factory=dict)


class OraclePart(Section):
    """The oracle, all classes at once: one run per model and seed. `scenario` None: `<dataset>-joint`."""

    scenario: str | None = None
    recipe: str | None = None
    method: str | None = Field(None, description="None: that of `recipe` where there is one, else finetune")
    set: Settings = Field(default_factory=dict)


class SuiteSpec(Section):
    """The content of a suite's TOML."""

    description: str = ""
    recipe: str = Field(description="what every run starts from")
    methods: Names
    scenarios: Names
    models: list[str] = Field(default_factory=list, description="none: the recipe's")
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default=[0])
    orders: Annotated[list[Order], Field(min_length=1)] = Field(
        default=["native"], description="class orders: native, a seed, or class ids"
    )
    set: Settings = Field(default_factory=dict, description="overrides of all runs, laid out as a recipe")
    method: dict[str, MethodPart] = Field(default_factory=dict)
    scenario: dict[str, ScenarioPart] = Field(default_factory=dict)
    model: dict[str, ModelPart] = Field(default_factory=dict)
    oracle: OraclePart | None = None


PARTS: dict[str, type[Section]] = {"method": MethodPart, "scenario": ScenarioPart, "model": ModelPart}
Checked = TypeVar("Checked", bound=Section)


@dataclass(frozen=True)
class SuiteRun:
    """One run. `id` names its folder and depends on nothing but the run itself."""

    id: str
    method: str
    scenario: str
    model: str
    seed: int
    order: Order
    oracle: bool
    config: RunConfig


def read_suite(name: str) -> SuiteSpec:
    """An installed suite by name, or a path to a TOML. Raises UnknownNameError, ConfigError, PluginError."""
    return parse(recipes.read_suite(name), f"Suite {name!r}")


def parse(content: dict[str, Any], source: str) -> SuiteSpec:
    """Check the content of a suite's TOML. Raises ConfigError naming the key, and the nearest one."""
    content = content | {axis: _parts(content[axis], axis, source) for axis in PARTS if axis in content}
    spec = _checked(SuiteSpec, content, source)
    for axis in ("methods", "scenarios", "models", "seeds", "orders"):
        values = getattr(spec, axis)
        if twice := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"{source} is not valid: {axis!r} holds {twice[0]!r} twice. List it once.")
    for axis in ("method", "scenario", "model"):
        for label, part in getattr(spec, axis).items():
            if label not in (known := getattr(spec, f"{axis}s")):
                hint = UnknownNameError(f"entry of '{axis}s'", label, known)
                raise ConfigError(f"{source} is not valid: [{axis}.{label}] changes no run. {hint}")
            _refuse_axes(part.set, f"{source}, [{axis}.{label}]")
    _refuse_axes(spec.set, source)
    if spec.oracle:
        _refuse_axes(spec.oracle.set, f"{source}, [oracle]")
    return spec


def _parts(table: Any, axis: str, source: str) -> Any:
    """The tables [method.LABEL] and so on, each checked by itself so that an error names it."""
    if not isinstance(table, dict):
        return table
    return {label: _checked(PARTS[axis], part, f"{source}, [{axis}.{label}]") for label, part in table.items()}


def _checked(kind: type[Checked], content: Any, source: str) -> Checked:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain_validation(source, error, kind)) from None


def _refuse_axes(settings: Settings, where: str) -> None:
    """Raises ConfigError where `set` holds what the lists of the suite say."""
    for path in AXES:
        node: Any = settings
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        if node is not None:
            instead = {"seed": "seeds", "order": "orders"}.get(path[-1], f"{path[0]}s")
            raise ConfigError(f"{where}: set.{'.'.join(path)} is said by the list {instead!r}. Remove it from `set`.")


def runs(spec: SuiteSpec, name: str, data: Path | None = None) -> list[SuiteRun]:
    """Every run of the suite called `name` (as given to `read_suite`), oracles last; `data`: root for all of them.

    Raises ConfigError, UnknownNameError or PluginError, naming the run, where one is not a valid recipe.
    """
    made = _Builder(spec, name, data)
    models: list[str | None] = [*spec.models] or [None]
    found = [made.learner(*parts) for parts in product(spec.methods, spec.scenarios, models, spec.seeds, spec.orders)]
    if spec.oracle:
        joint = list(dict.fromkeys(made.joint_of(label) for label in spec.scenarios))
        found += [made.oracle(*parts) for parts in product(joint, models, spec.seeds)]
    seen: dict[str, SuiteRun] = {}
    for run in found:
        if seen.setdefault(run.id.lower(), run) is not run:
            raise ConfigError(f"Suite {name!r} has two runs called {run.id!r}. Give one of them another label.")
    return found


class _Builder:
    """Makes the recipes of a suite's runs; a path in the suite is relative to its file."""

    def __init__(self, spec: SuiteSpec, name: str, data: Path | None):
        self.spec, self.name, self.data = spec, name, data
        self.folder = Path(name).parent if name.endswith(".toml") else None

    def path(self, name: str) -> str:
        return str((self.folder / name).resolve()) if self.folder is not None and name.endswith(".toml") else name

    def joint_of(self, label: str) -> str:
        """The oracle's scenario for one of the suite's."""
        assert self.spec.oracle
        if self.spec.oracle.scenario:
            return self.path(self.spec.oracle.scenario)
        dataset = scenario.load(self.scenario_name(label)).dataset
        if (joint := f"{dataset}-joint") not in scenario.names():
            raise ConfigError(
                f"Suite {self.name!r} wants oracles, but no scenario {joint!r} is installed. Name one, all classes in "
                f"one step, as `scenario` of [oracle]."
            )
        return joint

    def scenario_name(self, label: str) -> str:
        part = self.spec.scenario.get(label, ScenarioPart())
        return self.path(part.name or label)

    def learner(self, method: str, scene: str, model: str | None, seed: int, order: Order) -> SuiteRun:
        mine = self.spec.method.get(method, MethodPart())
        named = mine.name or (None if mine.recipe else method)
        extra = [self.spec.scenario.get(scene, ScenarioPart()).set, mine.set]
        labels = f"{method} on {scene}, seed {seed}"
        config, shown = self.config(
            mine.recipe, named, self.scenario_name(scene), model, seed, order, extra, labels
        )  # fmt: skip
        place = Path(scene).stem if scene.endswith(".toml") else scene
        parts = [method, place, shown, f"s{seed}", *_order_part(order)]
        return SuiteRun(_join(parts), method, place, shown, seed, order, False, config)

    def oracle(self, joint: str, model: str | None, seed: int) -> SuiteRun:
        mine = self.spec.oracle
        assert mine
        named = mine.method or (None if mine.recipe else "finetune")
        config, shown = self.config(
            mine.recipe, named, joint, model, seed, "native", [mine.set], f"oracle {joint}, seed {seed}"
        )  # fmt: skip
        place = Path(joint).stem if joint.endswith(".toml") else joint
        parts = ["oracle", place, shown, f"s{seed}"]
        return SuiteRun(_join(parts), "oracle", place, shown, seed, "native", True, config)

    def config(
        self,
        recipe: str | None,
        method: str | None,
        scene: str,
        model: str | None,
        seed: int,
        order: Order,
        extra: list[Settings],
        labels: str,
    ) -> tuple[RunConfig, str]:
        """The validated recipe, and the name under which its model goes."""
        spec, source = self.spec, f"The run of suite {self.name!r} with {labels}"
        content = recipes.read_recipe(self.path(recipe or spec.recipe))
        if method is not None:
            content = recipes.extend(content, {"method": {"name": method}})
        sets = [spec.set, *([spec.model[model].set] if model in spec.model else []), *extra]
        if model is not None:
            named = self.path(spec.model.get(model, ModelPart()).name or model)
            content = recipes.with_model(content, named, [line for table in sets for line in assignments(table)])
        for table in sets:
            content = recipes.extend(content, table)
        old = {key: value for key, value in _table(content, "scenario").items() if key != "order"}
        content |= {"seed": seed, "scenario": old | {"name": scene} | ({} if order == "native" else {"order": order})}
        if self.data is not None:
            content = recipes.extend(content, {"data": {"root": str(self.data.resolve())}})
        config = validate(content, source)
        return config, (Path(model).stem if model and model.endswith(".toml") else model) or config.model.name


def _table(content: Settings, key: str) -> Settings:
    found = content.get(key, {})
    return found if isinstance(found, dict) else {}


def assignments(table: Settings, prefix: str = "") -> list[str]:
    """A table as `a.b=value` lines, as --set takes them."""
    lines = []
    for key, value in table.items():
        path = f"{prefix}{key}"
        lines += assignments(value, f"{path}.") if isinstance(value, dict) else [f"{path}={json.dumps(value)}"]
    return lines


def _order_part(order: Order) -> list[str]:
    """How a class order stands in a run's id; the native one does not."""
    if order == "native":
        return []
    if isinstance(order, int):
        return [f"o{order}"]
    return [f"o{hashlib.sha256(json.dumps(order).encode()).hexdigest()[:8]}"]


def _join(parts: list[str]) -> str:
    """A safe file name: what is no part of one is spelled with letters and part of their SHA-256."""
    return "_".join(map(image_name, parts))
