"""Reference pages made of the objects themselves: scenarios, protocols, commands, methods. Markdown for MyST.

Written into docs/generated/ (not in git) before the pages are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typer.main import get_command

from cssbench import protocol, registry, scenario

SHOWN = 12  # steps that are listed one by one


def scenarios() -> str:
    """One section per installed scenario of ours: its facts, its steps, the file it is."""
    lines = ["# Scenarios", ""]
    lines += [
        "Made from the installed scenarios when this page was built. `cssbench list scenarios` lists them, with",
        "",
    ]
    lines[-2] += " those of other packages; [Datasets and scenarios](../data.md) explains the keys and the modes."
    names = [name for name, owner in scenario.names().items() if owner == registry.OWN]
    lines += ["| scenario | dataset | steps | classes of the steps | mode |", "|---|---|---:|---|---|"]
    scenes = {name: scenario.load(name) for name in names}
    for name, scene in scenes.items():
        sizes = " + ".join(str(len(group)) for group in scene.groups[:SHOWN])
        lines.append(f"| [`{name}`](#{name}) | {scene.dataset} | {len(scene.groups)} | {sizes} | {scene.mode} |")
    for name, scene in scenes.items():
        lines += ["", f"## {name}", "", f"{scene.description}.", ""]
        lines += [f"- dataset `{scene.dataset}`, {scene.num_classes} classes; mode `{scene.mode}`"]
        lines += [f"- unlabelled pixels are {_void(scene.void)} to the learner", ""]
        lines += ["| step | new classes | old classes | model outputs of the new ones |", "|---:|---|---:|---|"]
        for step in scene.steps:
            places = step.new_positions
            lines.append(f"| {step.index} | {_runs(step.new)} | {len(step.old)} | {places[0]} to {places[-1]} |")
        text = registry.toml_files("scenarios")[name][1].read_text(encoding="utf-8").strip()
        lines += ["", "```toml", text, "```"]
    return "\n".join(lines) + "\n"


def _void(void: str) -> str:
    return "background" if void == "background" else "ignored (255)"


def _runs(ids: tuple[int, ...]) -> str:
    """(1, 2, 3, 7) -> '1-3, 7'."""
    text: list[list[int]] = []
    for i in ids:
        if text and i == text[-1][-1] + 1:
            text[-1].append(i)
        else:
            text.append([i])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in text)


def protocols() -> str:
    """One section per installed protocol of ours: every rule in words, and the object."""
    lines = ["# Protocols", ""]
    lines += ["Made from the protocol objects when this page was built: what `cssbench protocol show NAME` prints."]
    lines += ["[Scoring protocols](../protocols.md) tells why the numbers of two of them differ.", ""]
    for one in protocol.BUILT_IN:
        lines += [f"## {one.id}", "", f"{one.summary[0].upper()}{one.summary[1:]}.", "", "| rule | what it says |"]
        lines += ["|---|---|", *(f"| {what} | {text} |" for what, text in one.explain().items())]
        fields = ", ".join(f"{name}={getattr(one, name)!r}" for name in FIELDS)
        lines += ["", f"As an object: `Protocol({fields})`", ""]
    return "\n".join(lines) + "\n"


FIELDS = ("geometry", "rule", "void", "future", "background", "absent", "all_mean")


def methods() -> str:
    """One section per method of ours: the docstring's first line, and its options with their defaults."""
    lines = ["# Methods and their options", ""]
    lines += ["Made from the classes when this page was built. An option is set in `[method]` of a recipe or by", ""]
    lines[-2] += " `--set method.OPTION=VALUE`; unknown ones are refused. Settings of real runs, and their sources: "
    lines[-2] += "[Baselines](../baselines.md)."
    for name, part in registry.parts("methods").items():
        if part.distribution != registry.OWN:
            continue
        cls = part.load()
        lines += ["", f"## {name}", "", (cls.__doc__ or name).strip().split("\n\n")[0].replace("\n", " "), ""]
        lines += _options(cls.Config)
    return "\n".join(lines) + "\n"


def _options(config: type[BaseModel]) -> list[str]:
    fields = config.model_fields
    if not fields:
        return ["It has no options."]
    lines = ["| option | default | what |", "|---|---|---|"]
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        lines.append(f"| `{name}` | `{default!r}` | {_cell(field.description or '')} |")
    return lines


def commands() -> str:
    """Every command of the command line: what it does, its arguments and options."""
    from cssbench.cli import app

    lines = ["# Commands", "", "Made from the command line itself when this page was built: what `--help` prints.", ""]
    lines += [
        "Exit codes: 0 done, 1 a check found something, 2 a mistake in the input, 130 and 143 stopped by a signal."
    ]
    for words, command in _walk("cssbench", get_command(app)):
        lines += ["", f"## {words}", "", (command.help or "").replace("\n", " ").strip(), ""]
        rows = [p for p in command.params if not getattr(p, "hidden", False) and p.name not in ("help", "version")]
        rows = [p for p in rows if "completion" not in str(p.name)]
        if rows:
            lines += ["| argument or option | default | what |", "|---|---|---|", *(_row(p) for p in rows)]
    return "\n".join(lines) + "\n"


def _walk(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name in inner:
        if not inner[name].hidden:
            yield from _walk(f"{words} {name}", inner[name])


def _row(parameter: Any) -> str:
    option = parameter.param_type_name == "option"
    name = ", ".join((*parameter.opts, *parameter.secondary_opts)) if option else parameter.name.upper()
    default = "required" if parameter.required else parameter.default
    plain = default is None or default is False or default == []
    return f"| `{name}` | {'' if plain else _cell(default)} | {_cell(getattr(parameter, 'help', '') or '')} |"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


PAGES: dict[str, Callable[[], str]] = {
    "scenarios.md": scenarios,
    "protocols.md": protocols,
    "methods.md": methods,
    "commands.md": commands,
}


def write(folder: Path) -> None:
    """All pages below `folder`; a page that would not change is left alone, so that it is not built again."""
    folder.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        text, file = make(), folder / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", lambda app, config: write(Path(app.srcdir) / "generated"))
    return {"parallel_read_safe": True}
