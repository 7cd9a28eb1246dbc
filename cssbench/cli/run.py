"""`cssbench run | resume | status | report | demo`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cssbench import processes
from cssbench.cli import complete
from cssbench.cli.text import plain
from cssbench.errors import ConfigError, DataError, ModelError, PluginError, RunError, UnknownNameError

Out = Annotated[Path, typer.Option("--out", help="Run folder to make.")]
Data = Annotated[Path | None, typer.Option("--data", help="Data root; replaces the recipe's.")]
Shared = Annotated[
    Path | None,
    typer.Option(
        "--shared", envvar="CSSBENCH_SHARED", help="Folder of base steps: take this run's from it, or train it for it."
    ),
]
DEMO_RECIPES = ("demo-segvit-cl", "demo-finetune", "demo-joint")


def register(app: typer.Typer) -> None:
    for command in (run, resume, status, report, demo):
        app.command()(command)


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe: a path to a TOML, or a name of `cssbench list recipes`.", autocompletion=complete.recipe
        ),
    ],
    out: Out,
    data: Data = None,
    name: Annotated[
        str | None,
        typer.Option("--scenario", help="Short for --set scenario.name=NAME.", autocompletion=complete.scenario),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Replaces the recipe's model: a name of `cssbench list models`, or a path.",
            autocompletion=complete.model,
        ),
    ] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Override: section.key=value. May repeat.")] = None,
    shared: Shared = None,
) -> None:
    """Run a recipe: every step of its scenario, into a new run folder."""
    chosen = [] if name is None else [f"scenario.name={name!r}"]
    start_run(recipe, out, data, [*chosen, *(changes or [])], shared, model)
    _what_next(out)


def _what_next(out: Path) -> None:
    """One line after a finished run, by the first of its processes."""
    from cssbench.progress import say

    if os.environ.get("RANK", "0") == "0":
        say(f"`cssbench status {out}` shows its scores; `cssbench report {out} --out report` draws them.")


def start_run(
    recipe: str,
    out: Path,
    data: Path | None,
    changes: list[str],
    shared: Path | None = None,
    model: str | None = None,
) -> None:
    """Check everything, then write the run folder and train."""
    from cssbench import config, provenance, recipes

    content = _read_recipe(recipe)
    if model is not None:
        content = recipes.with_model(content, model, changes)
    content = recipes.override(content, changes)
    if data is not None:
        content = recipes.override(content, [f"data.root={str(data.resolve())!r}"])
    content = _with_default_root(content)
    wanted = config.validate(content, f"Recipe {recipe!r}")
    if (out / "config.toml").exists():
        _refuse_existing(out, wanted)
    places: dict[str, Any] = {"--out": out, "--data": data, "--shared": shared, "--model": model}
    words = [str(word) for option in places.items() if option[1] is not None for word in option]
    processes.start(wanted.train.devices, ["run", recipe, *words, *(f"--set={change}" for change in changes)])
    from cssbench.experiment import build_experiment, resolve, sole_writer
    from cssbench.task_loop import run as run_steps

    made = build_experiment(resolve(wanted), out, provenance.this_command())
    with sole_writer(made):
        if made.fabric.is_global_zero:
            made.folder.create()
        made.fabric.barrier()
        try:
            run_steps(made, shared)
        except (ConfigError, DataError, ModelError, PluginError):
            if made.fabric.is_global_zero and not made.folder.records():
                shutil.rmtree(out)  # a mistake seen late: leave nothing, so that the same --out can be used again
            raise


def _read_recipe(name: str) -> dict[str, Any]:
    from cssbench import recipes, scenario

    try:
        return recipes.read_recipe(name)
    except UnknownNameError as error:
        if error.kind != "recipe" or name not in scenario.names():
            raise
        raise ConfigError(
            f"{name!r} is a scenario, not a recipe, which also says method, model and training. `cssbench list "
            f"recipes` shows recipes; `cssbench run RECIPE --scenario {name}` runs one on that scenario."
        ) from None


def _with_default_root(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe without a data root gets the one that the environment has for the dataset of its scenario."""
    from cssbench import recipes, scenario
    from cssbench.data.registry import default_root

    data, choice = content.get("data", {}), content.get("scenario", {})
    name = choice.get("name") if isinstance(choice, dict) else None
    if not isinstance(data, dict) or data.get("root") is not None or not isinstance(name, str):
        return content
    root = default_root(scenario.load(name).dataset)
    return content if root is None else recipes.override(content, [f"data.root={root!r}"])


def _refuse_existing(out: Path, wanted: Any) -> None:
    from cssbench.experiment import resolve
    from cssbench.results import RunFolder

    there, here = RunFolder.read(out).config.dump(), resolve(wanted).dump()
    changed = sorted(_differences(there, here))
    if not changed:
        raise RunError(f"{out} already holds this run. `cssbench resume {out}` goes on with it.")
    raise RunError(
        f"{out} holds a run of another configuration (differs in {', '.join(changed[:6])}). "
        f"Choose another --out, or remove that folder."
    )


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in _differences(a.get(key), b.get(key), f"{path}.{key}")]
    return [] if a == b else [path.lstrip(".")]


def resume(
    folder: Annotated[Path, typer.Argument(help="Run folder.", autocompletion=complete.run_folder)],
    data: Data = None,
    shared: Shared = None,
) -> None:
    """Go on with a run where it stopped, inside a step too. A finished run is left as it is."""
    resume_run(folder, data, shared)
    _what_next(folder)


def resume_run(folder: Path, data: Path | None, shared: Path | None = None) -> None:
    from cssbench.results import RunFolder

    there = RunFolder.read(folder)
    if there.finished:
        typer.echo(f"{folder} is finished: {there.num_steps} of {there.num_steps} steps.")
        return
    places: dict[str, Any] = {"--data": data, "--shared": shared}
    words = [str(word) for option in places.items() if option[1] is not None for word in option]
    processes.start(there.config.train.devices, ["resume", str(folder), *words])
    from cssbench.experiment import build_experiment, sole_writer
    from cssbench.task_loop import run as run_steps

    config = there.config
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": str(data.resolve())})})
    made = build_experiment(config, folder)
    with sole_writer(made):
        run_steps(made, shared)


def status(folder: Annotated[Path, typer.Argument(help="Run folder.", autocompletion=complete.run_folder)]) -> None:
    """Print how far a run is, and the scores of its finished steps."""
    from rich.console import Console
    from rich.table import Table

    from cssbench import protocol as protocols
    from cssbench import scoring
    from cssbench.results import RunFolder

    there = RunFolder.read(folder)
    records = there.records()
    config = there.config
    of = f"{plain(config.method.name)} on {plain(there.scenario['name'])}"
    typer.echo(f"{folder}: {of}, {len(records)} of {there.num_steps} steps")
    table = Table(box=None)
    table.add_column("step")
    for heading in ("images", "iterations", "minutes"):
        table.add_column(heading, justify="right")
    shown = [p for p in map(protocols.get, protocols.DEFAULTS) if scoring.can_score(there, p)]
    for protocol in shown:
        for name in ("base", "all"):
            table.add_column(f"{name} % {protocol.id}", justify="right")
    for record in records:
        scores = [scoring.step_scores(there, record, p) for p in shown]
        cells = [percent(s[name]) for s in scores for name in ("base", "all")]
        known = record.content  # an imported run knows none of these
        minutes = f"{sum(known['seconds'].values()) / 60:.1f}" if "seconds" in known else "-"
        numbers = (known.get("images", "-"), known.get("iterations", "-"), minutes)
        table.add_row(str(record.index), *map(str, numbers), *cells)
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=400)).print(table)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", autocompletion=complete.run_folder)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("report"),
    kind: Annotated[
        str, typer.Option(help="Report: a name of `cssbench list reports`.", autocompletion=complete.report)
    ] = "html",
    protocol: Annotated[
        list[str] | None, typer.Option(help="Scoring protocol; may repeat.", autocompletion=complete.protocol)
    ] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Print what must not share a table, and say so in the captions.")
    ] = False,
) -> None:
    """Write tables, plots and one HTML page from run folders."""
    for path in write_report(runs, out, kind, protocol or ["mmseg150@1", "plop@1"], allow_mixed):
        typer.echo(path)


def write_report(
    runs: list[Path],
    out: Path,
    kind: str,
    protocol_ids: list[str],
    allow_mixed: bool = False,
    notices: Sequence[str] = (),
) -> list[Path]:
    """Write a report. notices: what a reader must know of runs that are not in it; they stand in not-finished.md, and
    in the report itself where its function takes `notices`."""
    import inspect

    from cssbench import protocol, registry
    from cssbench.results import RunFolder, write_bytes

    ids = [protocol.get(name).id for name in protocol_ids]
    write = registry.load("reports", kind)
    takes = "notices" in inspect.signature(write).parameters
    more = {"notices": tuple(notices)} if takes else {}
    written = write([RunFolder.read(path) for path in runs], out, ids, allow_mixed=allow_mixed, **more)
    listed = out / "not-finished.md"
    listed.unlink(missing_ok=True)
    if notices:
        write_bytes(listed, "".join(f"- {notice}\n" for notice in notices).encode())
        return [*written, listed]
    return written


def demo(out: Annotated[Path, typer.Option("--out", help="Folder for runs, data and report.")] = Path("demo")) -> None:
    """SegViT-CL, fine-tuning and the oracle on generated scenes, with a report: about six minutes on two cores."""
    from rich.console import Console

    from cssbench.progress import say

    for number, recipe in enumerate(DEMO_RECIPES, 1):
        folder = out / recipe.removeprefix("demo-")
        say(f"[{number}/{len(DEMO_RECIPES)}] {recipe} -> {folder}")
        if (folder / "config.toml").exists():
            resume_run(folder, None)
        else:
            start_run(recipe, folder, out / "data", [])
    folders = [out / recipe.removeprefix("demo-") for recipe in DEMO_RECIPES]
    written = write_report(folders, out / "report", "html", ["mmseg150@1", "plop@1"])
    page = next((p for p in written if p.suffix == ".html"), None)
    table = next((p for p in written if p.name == "summary.mmseg150@1.md"), None)
    if page is None or table is None:
        raise RunError(f"The report in {out / 'report'} has no page or no summary table.")
    Console().print(table.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    typer.echo(f"Report: {page.resolve()}")
