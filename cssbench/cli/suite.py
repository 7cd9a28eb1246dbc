"""`cssbench suite plan|run|status|resume|report`: many runs from one file."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cssbench.errors import ConfigError, RunError

if TYPE_CHECKING:
    from cssbench.suites.estimate import Rates
    from cssbench.suites.folder import State, SuiteFolder
    from cssbench.suites.launch import Options
    from cssbench.suites.plan import Planned

app = typer.Typer(help="Many runs from one file: plan, run, watch, resume and report them.", no_args_is_help=True)


class Executor(StrEnum):
    """here: one after another in this process; local: processes through submitit; slurm: job arrays."""

    here = "here"
    local = "local"
    slurm = "slurm"


Name = Annotated[str, typer.Argument(help="A suite: a name of `cssbench list suites`, or a path to a TOML.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a suite.")]
Data = Annotated[Path | None, typer.Option("--data", help="Data root of all runs; replaces the recipes'.")]
How = Annotated[
    Executor, typer.Option(help="here: one after another; local: --jobs processes (submitit); slurm: job arrays.")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Runs side by side; default 1, on SLURM 256.")]
Gpus = Annotated[int | None, typer.Option(min=0, help="GPUs per run; default: as many as its train.devices.")]
Minutes = Annotated[int | None, typer.Option(min=1, help="Time limit of a job; a run goes on in the next one.")]
Partition = Annotated[str | None, typer.Option(help="SLURM partition.")]
Cpus = Annotated[int | None, typer.Option(min=1, help="SLURM: CPU cores per run.")]
Memory = Annotated[float | None, typer.Option(min=0, help="SLURM: GiB per run.")]
Setup = Annotated[list[str] | None, typer.Option(help="SLURM: a line of shell before the run. May repeat.")]
Slurm = Annotated[list[str] | None, typer.Option(help="SLURM: another sbatch option, key=value. May repeat.")]
WIDE = 44  # characters of a run's name that are kept in one line
ROOM = 24  # characters of a row of the status beside the run's name and where it is
COLOURS = {"finished": "green", "running": "cyan", "failed": "bold red", "stopped": "yellow", "waiting": "dim"}


@app.command()
def plan(
    name: Name,
    data: Data = None,
    index: Annotated[
        Path | None,
        typer.Option(help="Class lists `name id id ...`, 0-based, of training images, instead of data."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the suite: estimate from its runs.")] = None,
    measured: Annotated[bool, typer.Option("--measure", help="Measure a few iterations of each kind here.")] = False,
    bench: Annotated[
        Path | None, typer.Option(help="Estimate from a table bench/results/<machine>-throughput.csv (rough).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Runs, iterations, what they share, hours and disk, before anything is started."""
    from cssbench.suites import estimate
    from cssbench.suites.plan import account, makers

    if sum((measured, bench is not None, out is not None)) > 1:
        raise ConfigError("Give one of --measure, --bench and --out: an estimate has one source.")
    if data and index:
        raise ConfigError("Give --data or --index, not both.")
    planned = _planned(name, data, index)
    rates: Rates | None = None
    if measured:
        rates = estimate.measure(planned)
    elif bench:
        rates = estimate.from_bench(planned, bench)
    elif out:
        rates = estimate.from_runs(sorted((out / "runs").glob("*")))
    made_by, (sizes, store) = makers([one.entry for one in planned]), estimate.disk(planned)
    rows = [_plan_row(one, made_by[one.id], rates, sizes[one.id]) for one in planned]
    total = {"all": account(planned)}
    if any(not one.run.oracle for one in planned) and any(one.run.oracle for one in planned):
        total["without oracles"] = account([one for one in planned if not one.run.oracle])
    hours = [row["hours"] for row in rows]
    summary = {
        "account": {key: {**vars(value), "share": round(value.share, 4)} for key, value in total.items()},
        "hours": None if None in hours else round(sum(hours), 3),
        "hours_from": rates.source if rates else None,
        "disk_bytes": sum(sizes.values()) + store,
    }
    if as_json:
        typer.echo(json.dumps({"suite": name, "runs": rows, **summary}))
        return
    _print_plan(name, rows, summary)


def _planned(name: str, data: Path | None, index: Path | None) -> list[Planned]:
    from cssbench.suites import spec
    from cssbench.suites.plan import plan as make

    runs = spec.runs(spec.read_suite(name), name, data)
    roots = {run.config.data.root for run in runs}
    return make(runs, index, has_data=index is None and None not in roots)


def _plan_row(one: Planned, maker: str, rates: Rates | None, size: int) -> dict[str, Any]:
    shares = maker != one.id
    seconds = rates.seconds(one, shares) if rates else None
    return {
        "id": one.id,
        "iterations": list(one.iterations),
        "base_step_of": maker if shares else None,
        "trained": sum(one.iterations[shares:]),
        "hours": None if seconds is None else seconds * one.run.config.train.devices / 3600,
        "disk_bytes": size,
    }


def _print_plan(name: str, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    from cssbench.progress import size_text

    console = Console()
    table = Table(
        title=f"Suite {name}: {len(rows)} runs", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("run", overflow="fold", no_wrap=max(len(row["id"]) for row in rows) <= WIDE)
    table.add_column("iterations by step", overflow="fold", min_width=10)
    for heading in ("step 0", "hours", "disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    numbers = {row["id"]: number for number, row in enumerate(rows, 1)}
    for row in rows:
        hours = "-" if row["hours"] is None else f"{row['hours']:.2f}"
        maker = row["base_step_of"]
        shared, steps = "own" if maker is None else f"of {numbers[maker]}", _runs_of(row["iterations"])
        cells = (str(numbers[row["id"]]), row["id"], steps, shared, hours, size_text(row["disk_bytes"]))
        table.add_row(*map(Text, cells))
    console.print(table)
    for key, found in summary["account"].items():
        words = f"{found['runs']} runs" if key == "all" else f"{found['runs']} runs without oracles"
        console.print(
            f"{words}: {found['separate']:,} iterations one by one, {found['suite']:,} with shared base steps "
            f"({100 * found['share']:.1f} %).",
            highlight=False,
            soft_wrap=True,
        )
    hours = summary["hours"]
    known = "unknown" if hours is None else f"{hours:.2f} device-hours (an hour of one GPU, or of one CPU process)"
    source = f"; from {summary['hours_from']}" if summary["hours_from"] else ""
    source = source or "; --measure, --bench FILE or --out DIR (finished runs) give an estimate"
    console.print(f"Time: {known}{source}.", highlight=False, soft_wrap=True, markup=False)
    console.print(f"Disk: {size_text(summary['disk_bytes'])} of weights.", highlight=False, soft_wrap=True)


def _runs_of(counts: list[int]) -> str:
    """30, 10, 10 -> "30, 2 x 10"."""
    grouped = [(value, len(list(same))) for value, same in groupby(counts)]
    return ", ".join(f"{times} x {value}" if times > 1 else str(value) for value, times in grouped)


@app.command()
def run(
    name: Name,
    out: Annotated[Path, typer.Option("--out", help="Folder of the suite.")],
    data: Data = None,
    executor: How = Executor.here,
    jobs: Jobs = None,
    gpus: Gpus = None,
    minutes: Minutes = None,
    partition: Partition = None,
    cpus: Cpus = None,
    mem_gb: Memory = None,
    setup: Setup = None,
    slurm: Slurm = None,
    shared: Annotated[
        Path | None, typer.Option("--shared", help="Folder of base steps; default: shared/ in --out.")
    ] = None,
) -> None:
    """Run every run of a suite; in a folder that holds the suite already, those that are new or not finished.

    Exit code 1 when a run did not finish; the others are run all the same.
    """
    from cssbench.progress import say
    from cssbench.suites import folder as folders
    from cssbench.suites import spec

    how = _options(executor, jobs, gpus, minutes, partition, cpus, mem_gb, setup, slurm)
    planned = _planned(name, data, None)
    suite = folders.SuiteFolder(
        out.resolve(),
        Path(name).stem if name.endswith(".toml") else name,
        spec.read_suite(name).description,
        os.getcwd(),
        str(shared.resolve()) if shared else "shared",
        str(data.resolve()) if data else None,
        [one.entry for one in planned],
    )
    with folders.launching(suite):
        if left := folders.left_out(suite):
            say(f"No longer in the suite, their folders stay: {', '.join(left)}")
        suite.write({one.id: one.run.config.to_toml() for one in planned})
        _launch(suite, how)


@app.command()
def resume(
    folder: Folder,
    data: Annotated[Path | None, typer.Option("--data", help="Data root, where it has moved.")] = None,
    executor: How = Executor.here,
    jobs: Jobs = None,
    gpus: Gpus = None,
    minutes: Minutes = None,
    partition: Partition = None,
    cpus: Cpus = None,
    mem_gb: Memory = None,
    setup: Setup = None,
    slurm: Slurm = None,
) -> None:
    """Go on with the unfinished runs of a suite, each where it stopped; failed ones are tried again."""
    from cssbench.suites.folder import SuiteFolder, launching

    how = _options(executor, jobs, gpus, minutes, partition, cpus, mem_gb, setup, slurm)
    suite = SuiteFolder.read(folder)
    with launching(suite):
        if data is not None:
            suite.data = str(data.resolve())
            suite.write({})
        _launch(suite, how)


def _options(
    executor: Executor,
    jobs: int | None,
    gpus: int | None,
    minutes: int | None,
    partition: str | None,
    cpus: int | None,
    mem_gb: float | None,
    setup: list[str] | None,
    slurm: list[str] | None,
) -> Options:
    """Raises ConfigError where an option does not belong to the executor."""
    from cssbench.suites.launch import Options

    for_slurm = {"--partition": partition, "--cpus": cpus, "--mem-gb": mem_gb, "--setup": setup, "--slurm": slurm}
    given = [word for word, value in for_slurm.items() if value]
    if executor is not Executor.slurm and given:
        raise ConfigError(f"{given[0]} is for --executor slurm only.")
    if executor is Executor.here and (jobs or 1) > 1:
        raise ConfigError("--executor here runs one after another. Use --executor local for --jobs above 1.")
    if executor is Executor.here and (minutes or gpus is not None):
        raise ConfigError("--minutes and --gpus are for --executor local and slurm.")
    pairs = []
    for text in slurm or []:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--slurm must look like key=value, not {text!r}.")
        pairs.append((key.strip(), value.strip()))
    return Options(
        executor.value, jobs, gpus, minutes, partition, cpus, mem_gb, tuple(setup or ()), tuple(pairs)
    )  # fmt: skip


def _launch(suite: SuiteFolder, how: Options) -> None:
    from cssbench.interrupt import Interrupted
    from cssbench.suites.launch import launch

    try:
        with _ended_by_sigterm():
            launch(suite, how)
    except (KeyboardInterrupt, Interrupted) as stop:
        typer.echo(f"Stopped. `cssbench suite resume {suite.path}` goes on with what is not finished.", err=True)
        raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None
    if how.executor == "slurm":
        return
    states = {entry.id: suite.state(entry) for entry in suite.entries}
    Console().print(_shown(suite, states))
    if any(state.kind != "finished" for state in states.values()):
        typer.echo(f"Not all runs are finished. `cssbench suite resume {suite.path}` goes on with them.", err=True)
        raise typer.Exit(1)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends this process as an exception would, so that runs are told to stop."""
    from cssbench.interrupt import Interrupted

    def end(number: int, _: Any) -> None:
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def status(
    folder: Folder,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until no run is waiting or running.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks, with --watch.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """How far each run of a suite is; a failed one with the last line of its error."""
    from cssbench.suites.folder import SuiteFolder

    suite = SuiteFolder.read(folder)
    states = {entry.id: suite.state(entry) for entry in suite.entries}
    if as_json:
        typer.echo(json.dumps({"suite": suite.name, "runs": {name: vars(state) for name, state in states.items()}}))
        return
    if not watch:
        Console().print(_shown(suite, states))
        return
    from rich.live import Live

    with Live(_shown(suite, states), auto_refresh=False) as live:
        while any(state.kind in ("running", "waiting") for state in states.values()):
            time.sleep(every)
            states = {entry.id: suite.state(entry) for entry in suite.entries}
            live.update(_shown(suite, states), refresh=True)


def _shown(suite: SuiteFolder, states: dict[str, State]) -> Group:
    """The table, and under it the errors in full, which a row has no place for."""
    errors = [Text(f"{name}: {state.error}") for name, state in states.items() if state.error]
    return Group(_status_table(suite, states), *errors)


def _status_table(suite: SuiteFolder, states: dict[str, State]) -> Table:
    counts = {kind: sum(state.kind == kind for state in states.values()) for kind in COLOURS}
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    table = Table(
        title=f"Suite {suite.name}: {words}", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("run", overflow="fold", no_wrap=all(len(e.id) <= WIDE for e in suite.entries))
    table.add_column("state", no_wrap=True)
    for heading in ("done", "tries"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("at", overflow="fold")
    room = max(24, Console().width - max(map(len, states), default=0) - ROOM)
    for entry in suite.entries:
        state = states[entry.id]
        at = Text(f"step {state.step}/{state.steps - 1}, iteration {state.iteration}/{state.iterations}")
        if state.kind not in ("running", "stopped", "failed"):
            at = Text()
        if state.error:
            at = Text(f"step {state.step}: {state.error}")
            at.truncate(room, overflow="ellipsis")
        done = f"{100 * state.done / max(1, sum(entry.iterations)):.0f} %"
        kind = Text(state.kind, style=COLOURS[state.kind])
        table.add_row(Text(entry.id), kind, Text(done), Text(str(state.attempts or "-")), at)
    return table


@app.command()
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; default: report/ in the suite.")] = None,
    kind: Annotated[str, typer.Option(help="Report: a name of `cssbench list reports`.")] = "html",
    protocol: Annotated[list[str] | None, typer.Option(help="Scoring protocol; may repeat.")] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Print what must not share a table, and say so in the captions.")
    ] = False,
) -> None:
    """Report the finished runs of a suite; all others are named in it, with what they failed of."""
    from cssbench.cli.run import write_report
    from cssbench.progress import say
    from cssbench.suites.folder import SuiteFolder, missing

    suite = SuiteFolder.read(folder)
    left_out = missing(suite)
    runs = [suite.run(entry.id) for entry in suite.entries if entry.id not in left_out]
    if not runs:
        raise RunError(f"{suite.path} has no finished run to report. `cssbench suite status` says how far they are.")
    notices = [f"{name}: {why}" for name, why in left_out.items()]
    target = out or suite.path / "report"
    for path in write_report(runs, target, kind, protocol or ["mmseg150@1", "plop@1"], allow_mixed, notices):
        typer.echo(path)
    if notices:
        say(f"Not in the report, and named in {target / 'not-finished.md'}:")
    for notice in notices:
        say(f"  {notice}")
