"""The fenced blocks of README and docs, and a stage on which a page's blocks are played in order.

Words in capitals and folders named runs/... stand for things that a reader has: the stage has tiny ones. A block whose
first line is a comment with a path (`# my_package/method.py`) is written to that file, as the page asks its reader to.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
import yaml
from PIL import Image
from strangers import forget

from cssbench import cli, config, recipes, registry, scenario
from cssbench.experiment import resolve

ROOT = Path(__file__).parents[1]
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")),
                 *sorted((ROOT / "examples").rglob("*.md")), ROOT / "reports" / "results" / "README.md")
    if "generated" not in path.parts
]  # fmt: skip
SHELL = ("", "console", "sh", "bash")
STAND_INS = {
    **dict.fromkeys(("CAMVID", "D"), "camvid"),
    **dict.fromkeys(("ADE20K", "ROOT", "/data/ade20k", "/data/ADE20K"), "ade20k"),
    "FOLDER": "scenes",
    "TOWNS": "towns",
    "METHOD": "finetune",
    "RECIPE": "camvid-6-1-finetune-linear",
    "my-finetune": "camvid-dtop-finetune",
    "FILE": "camvid-linear",
}
SYNTHETIC = ("data.options.train=24", "data.options.val=6", "train.iterations=1", "train.batch_size=4")
CAMVID = ("train.iterations=1", "train.batch_size=2")
HEAVY = ("check", "doctor", "profile", "demo", "list models", "suite plan")  # seconds each: run by slow tests only
PARSED = ("suite run", "suite resume", "suite status", "suite report", "data fetch", "export", "predict")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The path that the first line names."""
        found = re.match(r"# ([\w./-]+\.(?:py|toml|yaml))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, continued ones joined, without prompts and comments."""
        lines = self.text.replace("\\\n", " ").split("\n")
        bare = (re.sub(r"(^|\s)#.*", "", line.removeprefix("$ ")).strip() for line in lines)
        return [re.sub(r"\s+", " ", line) for line in bare if line]


def blocks(page: str) -> list[Block]:
    """Every fenced block but directives of the site."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", text, re.S | re.M)
    made = [Block(page, text[: one.start()].count("\n") + 1, one[2].strip(), one[3]) for one in found]
    return [block for block in made if not block.language.startswith("{")]


class Stage:
    """A folder in which the blocks of one page are played. real: train, and count what models cost; else commands of
    minutes are checked (options, recipe, every setting), and a finished tiny run stands where they would make one."""

    def __init__(self, folder: Path, stock: Path, real: bool, skipped: dict[tuple[str, str], str]):
        self.folder, self.cwd, self.stock, self.real, self.skipped = folder, folder, stock, real, skipped
        self.names: dict[str, Any] = {"__name__": "docs"}
        self.used: set[tuple[str, str]] = set()
        self.trained = 0
        for name in ("bench", "examples"):
            (folder / name).symlink_to(ROOT / name)
        for name in ("camvid", "ade20k", "towns"):
            (folder / name).symlink_to(stock / name)
        (folder / "train_cls.txt").write_text("".join(f"a{i} {' '.join(map(str, range(150)))}\n" for i in range(3)))
        ious = ",".join(["0.5"] * 101 + ["x"] * 50)
        (folder / "LOG.csv").write_text(f"0,{ious},0.5\n1,{','.join(['0.25'] * 151)},0.25\n")

    def play(self, block: Block) -> None:
        if block.language in SHELL:
            for command in block.commands:
                self.shell(block, command)
            return
        self.write(block)
        if (block.page, block.text.split("\n")[0]) in self.skipped:
            self.used.add((block.page, block.text.split("\n")[0]))
        elif block.language == "python":
            self.python(block)
        elif block.language == "toml":
            self.toml(block, tomllib.loads(block.text))
        elif block.language in ("yaml", "json"):
            yaml.safe_load(block.text)
        else:
            assert block.language == "text", f"{block}: a block of the language {block.language!r} would be skipped"

    def write(self, block: Block) -> None:
        """A block that names a file becomes that file, in packages with an empty `__init__.py`."""
        if not block.file or block.language in SHELL:
            return
        path = self.cwd / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        for folder in path.relative_to(self.cwd).parents[:-1]:
            (self.cwd / folder / "__init__.py").touch()

    def python(self, block: Block) -> None:
        code = compile(block.text, str(block), "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            if not block.file:
                exec(code, self.names)
                return
            importlib.invalidate_caches()
            module = importlib.import_module(block.file.removesuffix(".py").replace("/", "."))
            for name, value in vars(module).items():
                if name.startswith("test_") and self.real:
                    value()

    def toml(self, block: Block, content: dict[str, Any]) -> None:
        """A recipe, a scenario and a preset are validated; what else there is need only be TOML."""
        if "extends" in content:
            config.validate(recipes.extend(recipes.read_recipe(content.pop("extends")), content), str(block))
        elif {"classes", "base"} <= content.keys():
            if block.file:
                scenario.from_dict(Path(block.file).stem, content)
            assert content.keys() <= scenario.ScenarioSpec.model_fields.keys(), block
        elif content.keys() == {"model"}:
            config.validate(recipes.extend(recipes.read_recipe("ade20k-finetune-segvit"), content), str(block))

    def shell(self, block: Block, command: str) -> None:
        if (block.page, command) in self.skipped:
            self.used.add((block.page, command))
            return
        words = shlex.split(command)
        if words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert next(word for word in words[1:] if "=" not in word) in targets, f"{block}: {command}"
        elif words[:2] == ["pip", "install"]:
            self.install(words[2:], f"{block}: {command}")
        elif words[0] == "cd":
            self.cwd = self.cwd / words[1]
            sys.path.insert(0, str(self.cwd))
        elif words[0] == "cp":
            subprocess.run(words, cwd=self.cwd, check=True)
        elif words[0] in ("python", ".venv/bin/python"):
            assert (ROOT / words[1]).is_file(), f"{block}: {command}"
        else:
            if "cssbench" not in words[0]:  # a launcher
                words = words[words.index("cssbench", words.index("-m")) :]
            assert words[0].endswith("cssbench"), f"{block}: {command!r} is not run; say why in NOT_RUN"
            try:
                self.cssbench([self.stand_in(word) for word in words[1:]])
            except (AssertionError, Exception) as error:
                raise AssertionError(f"{block}: {command}\n{error}") from error

    def install(self, words: list[str], where: str) -> None:
        """`pip install -e FOLDER` of a page's own package: its metadata are made; `cssbench[extra]`: there is one."""
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            if asked := re.fullmatch(r"(?:cssbench|\.)\[(.+)\]", word):
                assert set(asked[1].split(",")) <= extras.keys(), where
        project = self.cwd / words[-1] / "pyproject.toml"
        if words[-2:-1] != ["-e"] or not project.is_file():
            return
        content = tomllib.loads(project.read_text())["project"]
        info = self.folder / f"{content['name'].replace('-', '_')}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {content['name']}\nVersion: 0\n")
        groups = content["entry-points"].items()
        lines = [line for group, parts in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in parts.items()))]
        (info / "entry_points.txt").write_text("\n".join(lines))
        sys.path.insert(0, str((self.cwd / words[-1]).resolve()))
        forget()

    def stand_in(self, word: str) -> str:
        """What the stage has for a word of the page."""
        word = STAND_INS.get(word, word)
        bare = Path(word).name
        if re.match(r"(runs/|suites/\w+/runs/|DIR$|RUN$)", word) and not (self.cwd / word).exists() and bare != "runs":
            self.have(self.cwd / word)
        return word

    def have(self, run: Path) -> None:
        """A finished tiny run of the fitting kind at that place."""
        kind = next((kind for kind in ("joint", "finetune") if kind in run.name), "cl")
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.stock / kind, run)

    def cssbench(self, words: list[str]) -> None:
        if words[0].endswith("-completion"):  # it would write into the home of whoever runs the tests
            assert words[0] in (option for p in typer.main.get_command(cli.app).params for option in p.opts)
            return
        name, parsed = parse(words)
        if name == "run":
            self.run(words, parsed)
        elif name == "evaluate" and not self.real:
            self.have(self.cwd / str(parsed["out"]))
        elif name in PARSED or (name.startswith(HEAVY) and not self.real) or name == "demo":
            return
        else:
            if "--out" in words and words[(where := words.index("--out") + 1)].startswith("runs/"):
                shutil.rmtree(self.cwd / words[where], ignore_errors=True)  # a stand-in, which the command makes itself
            call(words, self.cwd)

    def run(self, words: list[str], parsed: dict[str, Any]) -> None:
        """Every name and setting is validated; then the run is trained in a second, or stood in for."""
        out = self.cwd / str(parsed["out"])
        shutil.rmtree(out, ignore_errors=True)
        content = recipes.read_recipe(
            str(self.cwd / parsed["recipe"]) if ".toml" in parsed["recipe"] else parsed["recipe"]
        )
        changes = [*([f"scenario.name={parsed['name']!r}"] if parsed["name"] else []), *(parsed["changes"] or [])]
        if parsed["model"]:
            content = recipes.with_model(content, parsed["model"], changes)
        wanted = resolve(config.validate(recipes.override(content, changes), "a page"))
        assert wanted.scenario.name in scenario.names() or Path(wanted.scenario.name).suffix == ".toml"
        registry.load("methods", wanted.method.name)
        dataset = scenario.load(wanted.scenario.name).dataset
        tiny = {"synthetic": SYNTHETIC, "camvid": CAMVID, "towns": CAMVID}.get(dataset)
        if tiny is None or not (self.real or self.wants(parsed)):
            self.have(out)
            return
        self.trained += 1
        start = [word for change in tiny for word in ("--set", change)]
        call([*words, *start], self.cwd)

    def wants(self, parsed: dict[str, Any]) -> bool:
        """By default the first run of a package that the page itself has made is trained, others are stood in for."""
        return self.trained == 0 and any(self.folder.glob("*.dist-info"))


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """("data stats", its arguments and options); raises what click raises at a wrong one."""
    command: Any = typer.main.get_command(cli.app)
    name, rest, context = [], list(words), None
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        word = rest.pop(0)
        assert word in command.commands, f"there is no command {' '.join([*name, word])!r}"
        command, name = command.commands[word], [*name, word]
    if hasattr(command, "commands"):
        return " ".join(name), {}
    context = command.make_context(" ".join(name), rest)
    return " ".join(name) + (f" {rest[0]}" if name == ["list"] and rest else ""), context.params


def call(words: list[str], cwd: Path) -> str:
    """The command line in this process; what it printed. Raises AssertionError unless its exit code is 0."""
    printed = io.StringIO()
    code: Any = 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            cli.main(words)
        except SystemExit as end:
            code = end.code
    assert not code, f"exit code {code}: {printed.getvalue()[-2000:]}"
    return printed.getvalue()


def make_stock(folder: Path) -> Path:
    """Tiny data of every kind, and three tiny runs of one scenario: `cl`, `finetune`, `joint`."""
    rng = np.random.default_rng(0)
    for name, splits, values in (
        ("camvid", {"train": "trainannot", "val": "valannot", "test": "testannot"}, range(12)),
        ("ade20k", {f"images/{s}": f"annotations/{s}" for s in ("training", "validation")}, range(151)),
    ):
        for images, labels in splits.items():
            for number in range(3):
                stem = f"ADE_{number:08d}" if name == "ade20k" else ("0001TP_006690", "b", "c")[number]
                shown = np.arange(6 if stem == "b" else len(values))  # "b": nothing but base classes
                for kind, array in (
                    (images, rng.integers(0, 256, (36, 48, 3), np.uint8)),
                    (labels, np.resize(np.repeat(shown, 8), (36, 48)).astype(np.uint8)),
                ):
                    (folder / name / kind).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(folder / name / kind / f"{stem}.png")
    towns = folder / "towns"
    for name in ("north/a", "north/b", "south/a"):
        (towns / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 48, 3), np.uint8)).save(towns / f"{name}.jpg")
        Image.fromarray(rng.choice([0, 10, 20, 30], (36, 48)).astype(np.uint8)).save(towns / f"{name}.labels.png")
    (towns / "train.txt").write_text("north/a\nnorth/b\n")
    (towns / "val.txt").write_text("south/a\n")
    for kind, recipe in {"cl": "demo-segvit-cl", "finetune": "demo-finetune", "joint": "demo-joint"}.items():
        tiny = [word for change in SYNTHETIC for word in ("--set", change)]
        call(["run", recipe, "--data", str(folder / "scenes"), "--out", str(folder / kind), *tiny], folder)
    return folder


@contextlib.contextmanager
def imports_of(folder: Path) -> Iterator[None]:
    """Modules and metadata below `folder` are found, and forgotten afterwards."""
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        forget()
