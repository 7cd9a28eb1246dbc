"""The dependency rule, checked on the source text: nothing is imported, so a violation cannot hide behind an error."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Folder -> first-party modules that its files may import.
FIRST_PARTY = {
    "cssbench": {"cssbench"},  # minus PLUGINS
    "scenarios": {"cssbench.scenario", "cssbench.errors"},
    "baselines": {"cssbench.api", "cssbench.losses", "cssbench.models"},
    "reports": {
        "cssbench",
    },  # minus TORCH_ROOMS
    "examples": {
        "cssbench.api",
        "cssbench.losses",
        "cssbench.scenario",
        "cssbench.config",
        "cssbench.data",
        "cssbench.models",
        "cssbench.interop",
    },
}
PLUGINS = {"cssbench.scenarios", "cssbench.baselines"}
TORCH_ROOMS = {f"cssbench.{name}" for name in (
    "models", "losses", "baselines", "trainer", "engine", "task_loop", "evaluate", "checkpoint", "experiment",
    "contract", "method", "api", "data", "logs", "testing", "step_checkpoint", "portable", "export", "predicting",
    "sync_batchnorm",
)}  # fmt: skip
CHECKOUT_NAMES = {"scenarios", "baselines", "reports", "tests"}

# Third-party package -> the only places that may name it.
THIRD_PARTY = {
    "timm": {f"cssbench/models/{name}.py" for name in ("backbone", "encoders", "resnet", "weights")},
    "pandas": {"reports/", "examples/"},
    "matplotlib": {"reports/", "examples/"},
    "jinja2": {"reports/"},
    "yaml": {"reports/literature.py"},
    "torchvision": {"cssbench/data/transforms.py"},
    "lightning": {"cssbench/engine.py", "cssbench/trainer.py", "cssbench/experiment.py"},
    "safetensors": {"cssbench/checkpoint.py"},
    "typer": {"cssbench/cli/"},
    "avalanche": {"cssbench/interop/avalanche/", "examples/"},
    "continuum": {"cssbench/interop/continuum.py", "examples/"},
    "wandb": {"cssbench/loggers.py"},
    "mlflow": {"cssbench/loggers.py"},
    "submitit": {"cssbench/suites/launch.py", "cssbench/suites/attempt.py"},
}

# What `--help`, `list`, `status` and `report` import.
NO_TORCH = {"scenarios/", "reports/", "cssbench/cli/", "cssbench/metrics/continual.py"} | {
    f"cssbench/{name}.py"
    for name in (
        "__init__", "errors", "registry", "config", "scenario", "protocol", "results", "progress", "imported",
        "scoring", "compare", "validate", "lock", "suites/__init__", "suites/spec", "suites/folder", "suites/plan",
        "suites/attempt", "suites/launch",
    )
} | {f"cssbench/data/{name}.py" for name in (
    "base", "ade20k", "camvid", "folder", "synthetic", "presence", "verify", "picture", "registry", "listed", "matlab",
    "voc", "pascal_context", "coco_stuff", "cityscapes", "archive", "download", "fetch", "statistics",
)}  # fmt: skip


def inside(path: Path, places: set[str]) -> bool:
    return any(str(path) == p or (p.endswith("/") and str(path).startswith(p)) for p in places)


def starts(name: str, prefixes: set[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import statement, nested ones too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(path: Path) -> Iterator[str]:
    folder = path.parts[0]
    for line, name in imports(path):
        top = name.split(".")[0]
        where = f"{path}:{line} imports {name}"
        if top in CHECKOUT_NAMES:
            yield f"{where}: a checkout folder is not an import name"
        elif top == "cssbench" and folder == "cssbench" and starts(name, PLUGINS | {"cssbench.reports"}):
            yield f"{where}: the core finds plug-ins through entry points only"
        elif top == "cssbench" and folder == "reports" and starts(name, TORCH_ROOMS):
            yield f"{where}: reports read run folders, they never touch models or training"
        elif len(path.parts) == 2 and folder == "examples":  # a script: a user of the library, no part of it
            continue
        elif top == "cssbench" and not starts(name, FIRST_PARTY[folder]):
            yield f"{where}: {folder}/ may import only {sorted(FIRST_PARTY[folder])}"
        elif top == "torch" and inside(path, NO_TORCH):
            yield f"{where}: this file must import without torch"
        elif top in THIRD_PARTY and not inside(path, THIRD_PARTY[top]):
            yield f"{where}: {top} belongs in {sorted(THIRD_PARTY[top])}"


FILES = sorted(p.relative_to(ROOT) for f in FIRST_PARTY for p in (ROOT / f).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_dependency_rule(path: Path):
    assert list(violations(path)) == []


def test_the_rule_finds_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    planted = tmp_path / "reports" / "bad.py"
    planted.parent.mkdir()
    planted.write_text("import torch\nfrom cssbench.models import atm\nimport baselines\nimport timm\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(list(violations(Path("reports/bad.py")))) == 4


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_is_much_longer_than_a_reader_bears(path: Path):
    assert len((ROOT / path).read_text().splitlines()) <= 420


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list", "scenarios"],
        ["list", "methods"],
        ["list", "protocols"],
        ["scenario", "show", "camvid-6-1"],
        ["published", "lint"],
        ["list", "suites"],
        ["suite", "--help"],
    ],
    ids=" ".join,
)
def test_what_must_answer_at_once_loads_no_torch(words: list[str]):
    code = (
        "import sys; from cssbench.cli import app\n"
        f"try: app({words!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'timm', 'lightning', 'pandas', 'matplotlib', 'submitit'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_loads_nothing():
    code = "import sys, cssbench; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_task_loop_names_no_method_model_or_scenario():
    names = {"segvit", "finetune", "mib", "plop", "reminder", "ade20k", "camvid", "synthetic"}
    for file in ("task_loop.py", "trainer.py", "engine.py", "evaluate.py", "experiment.py", "method.py"):
        source = (ROOT / "cssbench" / file).read_text().lower()
        assert not {name for name in names if name in source}, file
