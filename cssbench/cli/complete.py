"""What the shell completes: names of installed parts, and run folders. Nothing here may fail or print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Completer = Callable[[str], list[str]]


def _quiet(names: Callable[[str], list[str]]) -> Completer:
    """A broken package must not spill a traceback over the command line that somebody is typing."""

    def complete(incomplete: str) -> list[str]:
        try:
            return sorted(name for name in names(incomplete) if name.startswith(incomplete))
        except Exception:  # see above
            return []

    return complete


def _of(group: str) -> Completer:
    def names(incomplete: str) -> list[str]:
        from cssbench import registry

        return list(registry.toml_files(group) if group in ("scenarios", "recipes") else registry.parts(group))

    return _quiet(names)


def _models(incomplete: str) -> list[str]:
    from cssbench import recipes, registry

    return [*registry.parts("models"), *recipes.known_presets()]


def _protocols(incomplete: str) -> list[str]:
    from cssbench.protocol import protocols

    return list(protocols())


def _folders(incomplete: str) -> list[str]:
    """Run folders, and folders on the way to one, below what is typed."""
    typed = Path(incomplete)
    parent = typed if incomplete.endswith("/") or not incomplete else typed.parent
    prefix = incomplete if incomplete.endswith("/") or not incomplete else incomplete[: -len(typed.name)]
    found = []
    for path in parent.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            found.append(f"{prefix}{path.name}{'' if (path / 'config.toml').exists() else '/'}")
    return found


def _list_or(group: str, path_suffix: str = ".toml") -> Completer:
    """Names of a group, and files of that suffix where a path is typed."""
    named = _of(group)

    def names(incomplete: str) -> list[str]:
        if not incomplete or not ("/" in incomplete or incomplete.startswith(".")):
            return named(incomplete)
        parent, prefix = Path(incomplete).parent, incomplete[: len(incomplete) - len(Path(incomplete).name)]
        parent, prefix = (Path(incomplete), incomplete) if incomplete.endswith("/") else (parent, prefix)
        entries = [p for p in parent.iterdir() if p.is_dir() or p.suffix == path_suffix]
        return [f"{prefix}{p.name}{'/' * p.is_dir()}" for p in entries]

    return _quiet(names)


recipe = _list_or("recipes")
scenario = _list_or("scenarios")
method = _of("methods")
report = _of("reports")
dataset = _of("datasets")
model = _quiet(_models)
protocol = _quiet(_protocols)
run_folder = _quiet(_folders)
