"""`cssbench check`: does a method keep the rules of the benchmark?"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cssbench.cli import complete
from cssbench.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from cssbench.testing import Finding

MODELS = ("vit-linear", "segvit")
MARKS = {True: "[green]passed[/green]", False: "[bold red]FAILED[/bold red]", None: "-"}


def register(app: typer.Typer) -> None:
    app.command()(check)


def check(
    method: Annotated[
        str,
        typer.Argument(
            help="An installed method (also avalanche:EWC), or module:Class.", autocompletion=complete.method
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Installed models (no presets) to try it on; default: vit-linear and segvit.",
            autocompletion=complete.model,
        ),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the method or the model: method.key=value.")
    ] = None,
) -> None:
    """Run the conformance kit on a method, with tiny models on generated scenes. Exit code 1 when it fails."""
    from cssbench import config, recipes
    from cssbench.testing import Refused, conformance

    options = recipes.override({"method": {}, "model": {}}, changes or [])
    if unknown := sorted(options.keys() - {"method", "model"}):
        raise ConfigError(f"cssbench check --set takes method.key=value and model.key=value, not {unknown[0]!r}.")
    cls, source = _find(method)
    if options["method"]:
        config.part_config("method", config.PartChoice(name=method, **options["method"]), cls.Config)
    found: dict[str, list[Finding]] = {}
    refused: dict[str, str] = {}
    for model in models or MODELS:
        _refuse_preset(model)
        try:
            found[model] = conformance(cls, options["method"], model, **options["model"])
        except Refused as error:
            refused[model] = str(error)
    if not found:
        raise ConfigError(f"{method!r} works with none of these models: {' '.join(refused.values())}")
    _show(f"{cls.__name__} from {source}", found, refused)
    if any(one.passed is not True for findings in found.values() for one in findings):
        raise typer.Exit(1)


def _refuse_preset(name: str) -> None:
    """The kit builds models in sizes of its own. Raises ConfigError for a preset, whose size it could not keep."""
    from cssbench import recipes, registry

    if name in registry.parts("models") or not (name.endswith(".toml") or name in recipes.known_presets()):
        return
    model = recipes.named_model(name)["name"]
    raise ConfigError(
        f"cssbench check tries methods on models in tiny sizes of its own, and {name!r} is a preset: model {model!r} "
        f"and its options. Give --model {model}, and with --set model.key=value the options that matter."
    )


def _find(name: str) -> tuple[Any, str]:
    """The class, and where it is from. Raises PluginError or UnknownNameError."""
    from cssbench import registry

    if ":" not in name or name.partition(":")[0] in registry.parts("namespaces"):
        part = registry.find("methods", name)
        return part.load(), part.distribution
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return getattr(importlib.import_module(module), attribute), module
    except Exception as error:  # importing a stranger's module may raise anything
        raise PluginError(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}. Give module:Class, the module as `import` "
            f"would name it from here, or the name of an installed method (`cssbench list methods`)."
        ) from error


def _show(title: str, found: dict[str, list[Finding]], refused: dict[str, str]) -> None:
    console = Console()
    table = Table(title=escape(title), title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in ("invariant", "promise", *(f"on {model}" for model in found)):
        table.add_column(heading, no_wrap=heading != "promise")
    for row in zip(*found.values(), strict=True):
        table.add_row(row[0].name, escape(row[0].promise), *(MARKS[one.passed] for one in row))
    console.print(table)
    for model, findings in found.items():
        failed = [one for one in findings if one.passed is False]
        console.print(f"\non {model}: {sum(one.passed is True for one in findings)} of {len(findings)} passed")
        for one in failed:
            console.print(f"  [bold red]{one.name}[/bold red]: {escape(one.reason)}", soft_wrap=True, highlight=False)
    for model, reason in refused.items():
        console.print(f"\nnot tried on {model}: {escape(reason)}", soft_wrap=True, highlight=False)
