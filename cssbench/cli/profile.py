"""`cssbench profile`: what a model costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cssbench.cli import complete
from cssbench.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from cssbench.profile import Cost

CONVENTION = "one multiply-add = 1 FLOP, as in the papers (fvcore); 2x: as two"


def register(app: typer.Typer) -> None:
    app.command()(profile)


def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="A name of `cssbench list models`, a recipe, or a run folder: its weights.",
            autocompletion=complete.model,
        ),
    ],
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the input, px; default: the recipe's crop, 512.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Classes, where --steps names no scenario.")] = 150,
    steps: Annotated[str | None, typer.Option(help="A scenario, or BASE-INCREMENT such as 100-10.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Option: model.key=value. May repeat.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timed: Annotated[bool, typer.Option("--latency", help="Measure time and memory too.")] = False,
    device: Annotated[str, typer.Option(help="Where --latency and --data run: cpu or cuda.")] = "cpu",
    data: Annotated[
        Path | None,
        typer.Option(help="Data root: count on real images, and take the mean. Of a run: replaces its own."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set of --data, unless MODEL is a run folder.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Validation images of --data.")] = 8,
) -> None:
    """FLOPs and parameters per part, and their growth over steps; on request latency and memory.

    A run folder is profiled as its last step left it, on images of its data, so that models whose cost depends on the
    image show what they really save."""
    if (Path(model) / "config.toml").is_file():
        if steps or dataset:
            raise ConfigError("A run folder has its own steps and data set: leave --steps and --dataset out.")
        _print(*_stored(Path(model), changes or [], size, data, images, usable(device), timed), as_json)
        return
    if (data is None) != (dataset is None):
        raise ConfigError("--data ROOT and --dataset NAME belong together: give both or neither.")
    name, options, crop = _chosen(model, changes or [], size)
    side = size or crop
    from cssbench import profile as costs

    real = data is not None
    made = costs.build_model(name, options, costs.usable_device(device) if real else "meta")
    cut = costs.cut_steps(steps, classes)
    inputs = costs.images(made, str(data), str(dataset), images, side, device) if real else costs.no_image(side)
    found = costs.growth(made, cut, inputs)
    result: dict[str, Any] = {"model": name, "size": side, "convention": CONVENTION}
    result["steps"] = [
        {"step": step.index, "classes": len(step.seen), **cost.to_dict()} for step, cost in zip(cut, found, strict=True)
    ]
    if timed:
        result["latency"] = costs.step_latency(name, options, cut, side, costs.usable_device(device))
    _print(result, found, as_json)


def usable(device: str) -> str:
    from cssbench.profile import usable_device

    return usable_device(device)


def _stored(
    folder: Path, changes: list[str], size: int | None, data: Path | None, limit: int, device: str, timed: bool
) -> tuple[dict[str, Any], list[Cost]]:
    from cssbench import profile as costs
    from cssbench.reevaluate import changed_config
    from cssbench.results import RunFolder

    run = RunFolder.read(folder)
    settings = changed_config(run, changes)
    made = costs.stored_model(run, settings, device)
    side, chosen = size or settings.evaluate.crop, settings.data
    split = "train" if settings.evaluate.split == "holdout" else settings.evaluate.split
    root = str(data) if data else chosen.root
    inputs = costs.images(made, root, run.scenario["dataset"], limit, side, device, split, chosen.options)
    cost = costs.count(made, inputs)
    seen = sum(len(group) for group in run.groups[: len(run.records())])
    result: dict[str, Any] = {"model": settings.model.name, "run": str(folder), "size": side, "convention": CONVENTION}
    result["steps"] = [{"step": len(run.records()) - 1, "classes": seen, **cost.to_dict()}]
    if timed:
        result["latency"] = costs.image_latency(made, inputs)
    return result, [cost]


def _print(result: dict[str, Any], found: list[Cost], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        _show(result, found)


def _chosen(name: str, changes: list[str], size: int | None) -> tuple[str, dict[str, Any], int]:
    """Installed model, its options, side of the crop. Raises UnknownNameError, ConfigError."""
    from cssbench import recipes, registry

    models, known = [*registry.parts("models"), *recipes.known_presets()], registry.toml_files("recipes")
    if name in models:
        section = recipes.named_model(name)
        content: dict[str, Any] = {"model": section if size is None else recipes.made_for(section, size)}
    elif name.endswith(".toml") or name in known:
        content = recipes.with_preset(recipes.read_recipe(name))
    else:
        raise UnknownNameError("model, recipe or run folder", name, [*models, *known])
    for change in changes:
        if not change.strip().startswith("model."):
            raise ConfigError(f"cssbench profile --set takes model.key=value, not {change!r}.")
    content = recipes.override(content, changes)
    options = dict(content.get("model", {}))
    if "name" not in options:
        raise ConfigError(f"Recipe {name!r} names no model: it has no model.name.")
    return options.pop("name"), options, content.get("augment", {}).get("crop", 512)


def _show(result: dict[str, Any], found: list[Cost]) -> None:
    console = Console(highlight=False, markup=False)
    last = found[-1]
    about = f"{result['model']} at {result['size']} px, {result['steps'][-1]['classes']} classes"
    mean = f", mean of {last.images} images" if last.images > 1 else ""
    console.print(f"{about}{mean}; {result['convention']}", soft_wrap=True)
    table = _table("part", "GFLOPs", "2x", "M parameters")
    for part in last.parts:
        flops = last.flops.get(part, 0) / 1e9
        table.add_row(part, f"{flops:.2f}", f"{2 * flops:.2f}", f"{last.parameters.get(part, 0) / 1e6:.2f}")
    table.add_row("all", f"{last.gflops:.2f}", f"{2 * last.gflops:.2f}", f"{last.num_parameters / 1e6:.2f}")
    console.print(table)
    if len(found) > 1:
        table = _table("after step", "classes", "GFLOPs", "M parameters")
        for row in result["steps"]:
            numbers = (f"{row['gflops']:.2f}", f"{row['parameters'] / 1e6:.2f}")
            table.add_row(str(row["step"]), str(row["classes"]), *numbers)
        console.print(table)
    if "latency" in result:
        measured = result["latency"]
        for name, seconds in measured["seconds"].items():
            console.print(f"{name}: {1000 * seconds:.1f} ms, median, one image ({measured['device']})")
        console.print(f"peak memory: {measured['peak_memory_bytes'] / 2**20:.0f} MiB")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
