"""Where each run comes from: the rows of "What was run", and the provenance of each in full."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from cssbench.reports.formats import MISSING, ranges
from cssbench.reports.scored import again, caveats, training
from cssbench.results import RunFolder

STEP_HEADINGS = (
    "step", "new classes", "images", "iterations", "train", "evaluate", "evaluated images", "parameters", "trainable",
    "last losses", "SHA-256 of the image names",
)  # fmt: skip
RUN_HEADINGS = (
    "run",
    "scenario",
    "mode",
    "method",
    "model",
    "seed",
    "steps",
    "data",
    "iterations × batch",
    "training time",
)


@dataclass(frozen=True)
class Origin:
    """Where one run comes from. facts: (name, value); steps: rows of numbers under `STEP_HEADINGS`."""

    label: str
    caveats: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    steps: tuple[tuple[str, ...], ...]
    recipe: str


def run_row(run: RunFolder, label: str) -> tuple[str, ...]:
    """What was run, under `RUN_HEADINGS`."""
    config, records = run.config, run.records()
    iterations = sum(_number(record.content.get("iterations")) for record in records)
    seconds = sum(_number(_get(record.content, "seconds", "train")) for record in records)
    return (
        f"{label}{again(run)}{' (oracle)' if run.num_steps == 1 else ''}",
        run.scenario["name"],
        run.scenario["mode"],
        config.method.name,
        config.model.name,
        str(config.seed),
        str(run.num_steps) if run.finished else f"{len(records)} of {run.num_steps} steps",
        _text(_get(run.provenance, "data", "name") or run.scenario["dataset"]),
        f"{_count(int(iterations))} × {config.train.batch_size}",
        duration(seconds),
    )


def origin(run: RunFolder, label: str) -> Origin:
    """The provenance of a run; an en dash where its files do not tell."""
    known, config = run.provenance, run.config
    data = known.get("data")
    data = data if isinstance(data, dict) else {}
    commit, dirty = known.get("commit"), known.get("dirty")
    changed = "" if commit is None or dirty is None else ", with uncommitted changes" if dirty else ", clean"
    passes = config.train.accumulate * config.train.devices
    weights_of, source = known.get("evaluated_from"), training(run)
    facts = [
        ("command", _command(known)),
        ("started", _text(known.get("started"))),
        ("cssbench", _text(known.get("version"))),
        ("commit", f"{_text(commit)}{changed}"),
        ("hardware", _hardware(known)),
        ("Python", _text(known.get("python"))),
        ("packages", _text(known.get("packages"))),
        ("seed", str(config.seed)),
        ("effective batch", f"{_plural(config.train.batch_size, 'image')}, in {_plural(passes, 'forward pass', 'es')}"),
        ("processes", _text(known.get("processes"))),
        ("precision", config.train.precision),
        *((f"data: {name.replace('_', ' ')}", _text(value)) for name, value in data.items()),
        ("evaluated", f"{config.evaluate.split}, {config.evaluate.inference} image inference"),
        ("scale", _text(source.get("scale"))),
        ("note", _text(source.get("note") or config.note)),
    ]
    if weights_of:
        facts += [
            ("evaluated again", "numbers of training are those of the run whose weights were evaluated"),
            ("weights of", _text(_get(weights_of, "path"))),
            ("their digest", _text(_get(weights_of, "digest"))),
            ("changed, from and to", _text(_get(weights_of, "changes"))),
            ("trained by", _command(source)),
            ("trained at", f"{_text(source.get('commit'))}, cssbench {_text(source.get('version'))}"),
            ("trained on", _hardware(source)),
        ]
    steps = tuple(_step_row(run, index) for index in range(run.num_steps))
    return Origin(label, tuple(caveats(run)), tuple(facts), steps, config.to_toml())


def _step_row(run: RunFolder, index: int) -> tuple[str, ...]:
    planned = run.scenario["steps"][index]
    record = next((r.content for r in run.records() if r.index == index), {})
    loss = record.get("loss")
    losses = (
        {k: f"{v:.4g}" if isinstance(v, int | float) else v for k, v in loss.items()}
        if isinstance(loss, dict)
        else None
    )
    return (
        str(index) if record else f"{index} (not finished)",
        ranges(planned["new"]),
        _count(planned.get("images")),
        _count(record.get("iterations")),
        duration(_get(record, "seconds", "train")),
        duration(_get(record, "seconds", "evaluate")),
        _count(record.get("evaluated_images")),
        _count(_get(record, "parameters", "total")),
        _count(_get(record, "parameters", "trainable")),
        _text(losses),
        _text(planned.get("sha256")),
    )


def _command(known: dict[str, Any]) -> str:
    command = known.get("command")
    return shlex.join(map(str, command)) if isinstance(command, list) else _text(command)


def _hardware(known: dict[str, Any]) -> str:
    gpu = _get(known, "hardware", "gpu")
    gpus = [str(g) for g in gpu] if isinstance(gpu, list) else [str(gpu)] if gpu else []
    several = [f"{gpus.count(g)} × {g}" if gpus.count(g) > 1 else g for g in dict.fromkeys(gpus)]
    cores, memory = _get(known, "hardware", "cores"), _get(known, "hardware", "memory_gib")
    cpu = _get(known, "hardware", "cpu")
    parts = [*several, str(cpu or ""), f"{cores} cores" if cores else "", f"{memory} GiB" if memory else ""]
    return ", ".join(part for part in parts if part) or MISSING


def _get(content: Any, *keys: str) -> Any:
    """content[k1][k2]..., None where anything on the way is missing or no mapping."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _text(value: Any) -> str:
    """Plain words for any JSON value; an en dash for nothing."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items()) or MISSING
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or MISSING
    return MISSING if value is None or value == "" else str(value)


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0


def _count(value: Any) -> str:
    """1234567 -> '1 234 567' with thin no-break spaces."""
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int | float) else MISSING


def duration(seconds: Any) -> str:
    """Seconds in the two largest units that fit."""
    if not isinstance(seconds, int | float):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _plural(number: int, thing: str, ending: str = "s") -> str:
    return f"{number} {thing}{ending if number != 1 else ''}"
