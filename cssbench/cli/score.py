"""`cssbench protocol show | rescore | compare | validate`: numbers from run folders. No GPU, no data, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cssbench.cli import complete
from cssbench.cli.text import plain
from cssbench.errors import RunError

if TYPE_CHECKING:
    from cssbench.protocol import Protocol
    from cssbench.results import RunFolder

app = typer.Typer(help="Look at scoring protocols.", no_args_is_help=True)

Folders = Annotated[list[Path], typer.Argument(help="Run folders.", autocompletion=complete.run_folder)]


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="protocol")
    for command in (rescore, compare, validate):
        main.command()(command)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A protocol of `cssbench list protocols`.", autocompletion=complete.protocol)
    ],
) -> None:
    """Print what a protocol scores, what it ignores, over what it takes the mean, and who uses it."""
    from cssbench import protocol

    found = protocol.get(name)
    typer.echo(f"{found.id}: {found.summary}.")
    for rule, sentence in found.explain().items():
        typer.echo(f"  {rule}: {sentence}{'' if sentence.endswith('.') else '.'}")


def rescore(
    folder: Annotated[Path, typer.Argument(help="Run folder.", autocompletion=complete.run_folder)],
    protocol: Annotated[
        str | None,
        typer.Option(help="Scoring protocol; default: an overview of all.", autocompletion=complete.protocol),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, numbers in [0, 1].")] = False,
) -> None:
    """Score a run from its stored confusion matrices: every step and class under one protocol, or all protocols."""
    from cssbench import protocol as protocols
    from cssbench.results import RunFolder
    from cssbench.validate import problems

    run = RunFolder.read(folder)
    chosen = protocols.get(protocol) if protocol else None
    if not run.records():
        raise RunError(f"{folder} has no finished step to score. `cssbench resume {folder}` goes on with it.")
    for record in run.records():
        run.verify(record, *(name for name in record.content["sha256"] if name == "matrices.npz"))
    for problem in problems(run, weights=False):
        typer.echo(f"Not for a table: {problem}.", err=True)
    content = _detail(run, chosen) if chosen else _overview(run)
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    elif chosen:
        _print_detail(run, chosen, content)
    else:
        _print_overview(run, content)


def _detail(run: RunFolder, protocol: Protocol) -> dict[str, Any]:
    """The content of `rescore --protocol ID --json`."""
    from cssbench import scoring
    from cssbench.metrics import continual

    scores = scoring.run_scores(run, protocol)
    steps = []
    for record, score in zip(run.records(), scores, strict=True):
        ious = scoring.step_ious(run, record, protocol)
        means = {name: score[name] for name in ("base", "incremental", "all")}
        groups = [score[f"group{g}"] for g in range(record.index + 1)]
        step = {"step": record.index, **means, "avg": continual.average(scores[: record.index + 1])}
        steps.append(step | {"groups": groups, "ious": {str(c): value for c, value in ious.items()}})
    table = continual.group_table(scores)
    return {
        "run": str(run.path),
        "protocol": protocol.id,
        "background_threshold": run.config.evaluate.background_threshold,
        "steps": steps,
        "groups": continual.group_rows(table, scoring.alone_scores(run, run.records()[-1], protocol)),
        "measures": continual.summary(table),
    }


def _print_detail(run: RunFolder, protocol: Protocol, content: dict[str, Any]) -> None:
    from cssbench.metrics.continual import FORMULAS

    steps = content["steps"]
    typer.echo(f"{run.path} under {protocol.id}: {protocol.summary}. mIoU in %.")
    means = ("base", "incremental", "all", "avg")
    _print(("step", *means), [(str(s["step"]), *(_percent(s[name]) for name in means)) for s in steps])
    names = dict(enumerate(["background", *run.scenario.get("classes", [])]))
    taught = {0: 0} | {c: t for t, group in enumerate(run.groups) for c in group}
    rows = [
        (str(c), names.get(c, ""), str(t), *(_percent(step["ious"].get(str(c))) for step in steps))
        for c, t in taught.items()
        if any(str(c) in step["ious"] for step in steps)
    ]
    _print(("class", "name", "group", *(f"step {s['step']}" for s in steps)), rows, left=("name",))
    measures = list(content["groups"][0]) if len(steps) > 1 else []
    if measures:
        _print(
            ("group", *measures), [(str(g), *map(_percent, row.values())) for g, row in enumerate(content["groups"])]
        )
    for name in (*means, *measures):
        typer.echo(f"{name} = {FORMULAS[name]}")
    for name, value in content["measures"].items():
        typer.echo(f"{name} {_percent(value)} = {FORMULAS[name]}")


def _overview(run: RunFolder) -> dict[str, Any]:
    """The content of `rescore --json` without a protocol: the means after the last finished step under each."""
    from cssbench import protocol, scoring
    from cssbench.metrics import continual

    found: dict[str, Any] = {}
    for name, one in protocol.protocols().items():
        if scoring.can_score(run, one):
            scores = scoring.run_scores(run, one)
            means = {mean: scores[-1][mean] for mean in ("base", "incremental", "all")}
            found[name] = means | {"avg": continual.average(scores)}
        else:
            found[name] = None
    return {"run": str(run.path), "step": len(run.records()) - 1, "protocols": found}


def _print_overview(run: RunFolder, content: dict[str, Any]) -> None:
    from cssbench import scoring
    from cssbench.protocol import protocols

    known, means = protocols(), ("base", "incremental", "all", "avg")
    typer.echo(
        f"{run.path} after step {content['step']} under each protocol, mIoU in %: one model, one set of outputs."
    )
    rows = [
        (name, *(_percent(scores[mean]) for mean in means), known[name].summary)
        for name, scores in content["protocols"].items()
        if scores
    ]
    _print(("protocol", *means, "why it differs"), rows, left=("protocol", "why it differs"))
    for name, scores in content["protocols"].items():
        if scores is None:
            typer.echo(f"{name} cannot score it: {scoring.why_not(run, known[name])}.")


def compare(
    runs: Folders,
    protocol: Annotated[
        str | None,
        typer.Option(help="Scoring protocol; default: mmseg150, or plop on VOC.", autocompletion=complete.protocol),
    ] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Print runs that differ together, the mix in the caption.")
    ] = False,
) -> None:
    """Print runs in one table, with the drop to their own oracle. Runs that must not be compared are an error."""
    from cssbench import compare as comparing
    from cssbench import protocol as protocols
    from cssbench import scoring
    from cssbench.metrics.continual import FORMULAS
    from cssbench.results import RunFolder

    folders = [RunFolder.read(path) for path in runs]
    chosen = protocols.get(protocol) if protocol else scoring.default_protocol(folders)
    rows, differences = comparing.table(folders, chosen, allow_mixed)
    typer.echo(f"{chosen.id}: {chosen.summary}. mIoU in %, drops in points, relative drops in %.")
    if differences:
        typer.echo(f"MIXED, not comparable: {'; '.join(differences)}.")
    means = ("base", "incremental", "all")
    drops = [f"{kind}drop {name}" for kind in ("", "rel. ") for name in means]
    lines = [
        (
            f"{row.run.path}{' (oracle)' if comparing.is_oracle(row.run) else ''}",
            row.run.config.method.name,
            row.run.config.model.name,
            str(row.run.config.seed),
            *(_percent(row.scores[name]) for name in (*means, "avg")),
            *(_percent(row.drops[name][kind]) for kind in (0, 1) for name in means),
            _percent(row.intransigence),
            str(row.oracle.path) if row.oracle else "-",
        )
        for row in rows
    ]
    heads = ("run", "method", "model", "seed", *means, "avg", *drops, "intransigence", "own oracle")
    _print(heads, lines, left=("run", "method", "model", "own oracle"))
    for name in (*means, "avg", "drop to oracle", "relative drop", "intransigence"):
        typer.echo(f"{name} = {FORMULAS[name]}{', g the last group' if name == 'intransigence' else ''}")


def validate(runs: Folders) -> None:
    """Check run folders: finished, unedited, whole, counts possible. Exit code 2 when one must not stand in a table."""
    from cssbench.results import RunFolder
    from cssbench.validate import problems

    rejected = 0
    for path in runs:
        try:
            found = problems(RunFolder.read(path))
        except RunError as error:
            found = [str(error).rstrip(".")]
        rejected += bool(found)
        typer.echo(f"{path}: {'; '.join(found) if found else 'OK'}{'.' if found else ''}", err=bool(found))
    if rejected:
        raise RunError(
            f"{rejected} of {len(runs)} run folder{'s' * (len(runs) > 1)} must not stand in a table, for the reasons "
            f"above. Leave them out, or finish or repeat the runs."
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _print(headings: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[str, ...] = ()) -> None:
    """A table; into a file or a pipe as wide as it is, so that no line is broken."""
    table = Table(box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    terminal = Console(highlight=False, markup=False)
    (terminal if terminal.is_terminal else Console(highlight=False, markup=False, width=4000)).print(table)
