"""Bad inputs to every command of the command line: one table, for the tests and for docs/bad-inputs.md.

`python tests/bad_inputs.py` runs them all and writes that page.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from fabricated import fabricate
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "bad-inputs.md"
RECIPE = "camvid-6-5-finetune-linear"
SMALL = (
    "model.backbone.width=16 model.backbone.depth=1 model.backbone.heads=2 model.backbone.layers=[1] "
    "model.backbone.image_size=32 augment.crop=32 augment.short_side=48 train.batch_size=2 train.iterations=1 "
    "evaluate.short_side=32 evaluate.crop=32 evaluate.samples=1"
)


@dataclass(frozen=True)
class Case:
    """What is wrong, the words of the command line ({w}: the folder of `make_world`), and what stderr must say."""

    what: str
    words: str
    said: str


def run_case(*changes: str, data: str = "{w}/camvid", recipe: str = RECIPE) -> str:
    sets = " ".join(f"--set {change}" for change in (*SMALL.split(), *changes))
    return f"run {recipe} --data {data} --out {{w}}/out {sets}"


CASES = (
    # the line itself
    Case("unknown command", "rum", "No such command 'rum'"),
    Case("unknown option", "list methods --colour", "No such option: --colour"),
    Case("unknown option of doctor", "doctor --jsn", "No such option"),
    Case("missing argument", "status", "Missing argument"),
    Case("missing option", f"run {RECIPE}", "Missing option '--out'"),
    # run
    Case("no recipe of that name", "run camvid-6-5-finetun --out {w}/out", "Did you mean 'camvid-6-5-finetune"),
    Case("no recipe file", "run {w}/none.toml --out {w}/out", "no recipe file named"),
    Case("recipe is a folder", "run {w}/folder.toml --out {w}/out", "folder.toml"),
    Case("recipe is no TOML", "run {w}/broken.toml --out {w}/out", "is not valid TOML"),
    Case("recipe nested without end", "run {w}/deep.toml --out {w}/out", "is not valid TOML"),
    Case("recipe is no text", "run {w}/binary.toml --out {w}/out", "is not valid TOML"),
    Case("recipes in a circle", "run {w}/circle-a.toml --out {w}/out", "in a circle"),
    Case("recipe extends nothing", "run {w}/orphan.toml --out {w}/out", "extends 'nobody'"),
    Case("empty recipe", "run {w}/empty.toml --out {w}/out", "scenario"),
    Case("unknown section", run_case("optimizer.lr=1"), "did you mean 'optim'"),
    Case("unknown key", run_case("optim.lrr=1"), "unknown key 'optim.lrr'"),
    Case("value of another type", run_case("optim.lr=fast"), "'optim.lr' (it is 'fast')"),
    Case("value out of range", run_case("optim.lr=-1"), "greater than 0"),
    Case("not a number", run_case("optim.lr=nan"), "optim.lr"),
    Case("override without value", run_case("optim.lr"), "section.key=value"),
    Case("override below a value", run_case("seed.more=1"), "seed"),
    Case("unknown method", run_case("method.name=finetun"), "Did you mean 'finetune'"),
    Case("unknown option of a method", run_case("method.lambda=1"), "lambda"),
    Case("method name that is a path", run_case("method.name=../../evil"), "There is no method named '../../evil'"),
    Case("unknown model", run_case("model.name=vit-linea"), "Did you mean 'vit-linear'"),
    Case("unknown backbone", run_case("model.backbone.name=vit_huge_patch1"), "timm has no model"),
    Case("block that is not there", run_case("model.backbone.layers=[1,9]"), "from 1 to 1"),
    Case("unknown preset", run_case() + " --model segvit-c", "segvit-"),
    Case("unknown scenario", run_case("scenario.name=camvid-6-2"), "Did you mean 'camvid-6-"),
    Case("unknown mode", run_case("scenario.mode=overlap"), "'overlapped', 'disjoint', 'sequential' or 'partitioned'"),
    Case("class twice in the order", run_case("scenario.order=[1,1,2,3,4,5,6,7,8,9,10]"), "class 1 twice"),
    Case("scenario of another data set", run_case("scenario.name=ade20k-100-50"), "ADE"),
    Case("no data root", f"run {RECIPE} --out {{w}}/out", "--data ROOT"),
    Case("data root that is not there", run_case(data="{w}/nowhere"), "not a folder"),
    Case("data root that is a file", run_case(data="{w}/empty.toml"), "not a folder"),
    Case("labels out of range", run_case(data="{w}/camvid-77"), "[77]"),
    Case("image without a label map", run_case(data="{w}/camvid-missing"), "has no label map"),
    Case("weights that are not there", run_case("model.backbone.checkpoint={w}/no.pth"), "not a file"),
    Case("weights that would run code", run_case("model.backbone.checkpoint={w}/evil.pth"), "nothing in it was run"),
    Case("weights that are no weights", run_case("model.backbone.checkpoint={w}/binary.toml"), "cannot be loaded"),
    Case("weights of another model", run_case("model.backbone.checkpoint={w}/other.pth"), "is not of this model"),
    Case("folder of another run", f"run {RECIPE} --data {{w}}/camvid --out {{w}}/run", "another configuration"),
    Case("out is a file", run_case().replace("{w}/out", "{w}/empty.toml"), "empty.toml"),
    # resume, status, report, demo
    Case("resume of no run", "resume {w}/camvid", "not a run folder"),
    Case("resume without data", "resume {w}/half", "toy"),
    Case("status of a damaged run", "status {w}/run-json", "is damaged"),
    Case("status of a run of another schema", "status {w}/run-schema", "this cssbench reads schema"),
    Case("status of damaged settings", "status {w}/run-toml", "config.toml"),
    Case("status of a record without checksums", "status {w}/run-record", "lists no checksums"),
    Case("status of damaged matrices", "status {w}/run-matrices", "is missing or damaged"),
    Case("status of a scenario without steps", "status {w}/run-scenario", "is damaged"),
    Case("report of no run", "report {w}/nowhere --out {w}/out", "not a run folder"),
    Case("unknown report", "report {w}/run --out {w}/out --kind htm", "'html'"),
    Case("unknown protocol", "report {w}/run --out {w}/out --protocol plob", "There is no protocol named 'plob'"),
    Case("report without steps", "report {w}/none --out {w}/out", "no finished step"),
    Case("report into a file", "report {w}/run --out {w}/empty.toml --kind tables", "empty.toml"),
    Case("report of an edited run", "report {w}/run-edited --out {w}/out --kind tables", "checksum"),
    Case("demo into a file", "demo --out {w}/empty.toml", "empty.toml"),
    # evaluate, profile, check, list
    Case("evaluate no run", "evaluate {w}/nowhere --out {w}/out", "not a run folder"),
    Case("evaluate with another seed", "evaluate {w}/linear --out {w}/out --set seed=4", "seed"),
    Case("evaluate into a run", "evaluate {w}/linear --out {w}/linear", "linear"),
    Case("profile nothing", "profile segvitt", "There is no model, recipe or run folder named 'segvitt'"),
    Case("profile with other settings", "profile vit-linear --set optim.lr=1", "model.key=value"),
    Case("profile steps that do not add up", "profile vit-linear --steps 100-7", "does not cut 150 classes"),
    Case("profile data without a data set", "profile vit-linear --data {w}/camvid", "belong together"),
    Case("profile size 0", "profile vit-linear --size 0", "--size"),
    Case("profile a size between patches", "profile vit-linear --size 100", "100"),
    Case("profile weights that do not fit", "profile {w}/run", "tiny"),
    Case("check no method", "check finetun", "Did you mean 'finetune'"),
    Case("check a module that is not there", "check no_such_module:Thing", "cannot be imported"),
    Case("check on a preset", "check finetune --model segvit-b", "is a preset"),
    Case("check with other settings", "check finetune --set train.iterations=1", "method.key=value"),
    Case("list what is not there", "list colours", "colours"),
    # export, predict
    Case("export no run", "export {w}/nowhere --out {w}/out", "not a run folder"),
    Case("export a model that is not installed", "export {w}/run --out {w}/out", "There is no model named 'tiny'"),
    Case("export a step that is not finished", "export {w}/linear --step 7 --out {w}/out", "there is no step 7"),
    Case("export into a run", "export {w}/linear --out {w}/run", "is not an empty folder"),
    Case("export damaged weights", "export {w}/linear --out {w}/out", "cannot be read"),
    Case(
        "predict with no model", "predict {w}/nowhere {w}/camvid/test --out {w}/out", "neither a run folder nor a model"
    ),
    Case("predict a folder without images", "predict {w}/linear {w}/run --out {w}/out", "There is no image"),
    Case("predict with damaged weights", "predict {w}/linear {w}/camvid/test --out {w}/out", "cannot be read"),
    # rescore, compare, validate, protocol, published, import
    Case("rescore no run", "rescore {w}/camvid", "not a run folder"),
    Case("rescore without steps", "rescore {w}/none", "no finished step"),
    Case("rescore edited matrices", "rescore {w}/run-edited", "does not match its checksum"),
    Case("rescore under nothing", "rescore {w}/run --protocol mean", "There is no protocol named 'mean'"),
    Case("rescore a name that is a path", "rescore {w}/run-path", "cannot be used as a file name"),
    Case("compare runs that differ", "compare {w}/run {w}/other-images --protocol plop", "--allow-mixed"),
    Case("validate a damaged run", "validate {w}/run {w}/run-edited", "1 of 2 run folders must not stand"),
    Case("protocol that is not there", "protocol show plop@9", "plop@1"),
    Case("lint no file", "published lint {w}/none.yaml", "cannot be read"),
    Case("lint no YAML", "published lint {w}/broken.yaml", "is not valid YAML"),
    Case("lint YAML that names code", "published lint {w}/code.yaml", "is not valid YAML"),
    Case("lint nested without end", "published lint {w}/deep.yaml", "is not valid YAML"),
    Case("lint another form", "published lint {w}/list.yaml", "must be a mapping"),
    Case("lint a row of unknown keys", "published lint {w}/row.yaml", "row.yaml"),
    Case("import no log", "import plop-csv {w}/none.csv --scenario camvid-6-5 --out {w}/out", "none.csv"),
    Case("import words", "import plop-csv {w}/words.csv --scenario camvid-6-5 --out {w}/out", "words.csv"),
    Case(
        "import under another scenario", "import plop-csv {w}/log.csv --scenario camvid-joint --out {w}/out", "log.csv"
    ),
    Case("import an IoU above 1", "import plop-csv {w}/above.csv --scenario camvid-6-5 --out {w}/out", "from 0 to 1"),
    # scenario
    Case("show no scenario", "scenario show camvid-6-6", "Did you mean 'camvid-6-"),
    Case("show no file", "scenario show {w}/none.toml", "no scenario file"),
    Case("scenario that does not add up", "scenario show {w}/sums.toml", "do not add up"),
    Case("scenario of negative steps", "scenario show {w}/minus.toml", "do not add up"),
    Case("scenario with unknown key", "scenario show {w}/keys.toml", "did you mean 'base'"),
    Case("scenario of too many classes", "scenario show {w}/many.toml", "less than or equal to 254"),
    Case("index and data", "scenario show camvid-6-5 --data {w}/camvid --index {w}/list.txt", "not both"),
    Case("index with words", "scenario show camvid-6-5 --index {w}/words.txt", "line 2"),
    Case("index with classes out of range", "scenario show camvid-6-5 --index {w}/range.txt", "out of range"),
    Case("index with an image twice", "scenario show camvid-6-5 --index {w}/twice.txt", "listed twice"),
    Case("empty index", "scenario show camvid-6-5 --index {w}/empty.toml", "is empty"),
    Case(
        "explain no image",
        "scenario explain camvid-6-5 --image ../../000 --step 0 --data {w}/camvid",
        "no training image",
    ),
    Case("explain no step", "scenario explain camvid-6-5 --image 000 --step 2 --data {w}/camvid", "0 to 1"),
    Case(
        "explain into a file's folder",
        "scenario explain camvid-6-5 --image 000 --step 0 --data {w}/camvid --out {w}/empty.toml/a.png",
        "could not be written",
    ),
    # suite
    Case("plan no suite", "suite plan no-such-suite", "There is no suite named 'no-such-suite'"),
    Case("plan no TOML", "suite plan {w}/broken.toml", "is not valid TOML"),
    Case("plan an empty suite", "suite plan {w}/empty.toml", "empty.toml"),
    Case("plan a recipe", "suite plan {w}/keys.toml", "keys.toml"),
    Case("plan nested without end", "suite plan {w}/deep.toml", "is not valid TOML"),
    Case("run no suite", "suite run {w}/none.toml --out {w}/out", "none.toml"),
    Case("resume no suite", "suite resume {w}/camvid", "camvid"),
    Case("status of no suite", "suite status {w}/run", "run"),
    Case("report of no suite", "suite report {w}/nowhere", "nowhere"),
    # data
    Case("fetch without the terms", "data fetch ade20k --root {w}/out", "terms above must be accepted"),
    Case("fetch what is not published", "data fetch camvid --root {w}/out", "cannot be fetched"),
    Case("fetch no data set", "data fetch ade --root {w}/out", "Did you mean 'ade20k'"),
    Case("fetch a local file", "data fetch ade20k --root {w}/out --accept-terms --url file:///etc/passwd", "http://"),
    Case("fetch with no checksum", "data fetch ade20k --root {w}/out --accept-terms --sha256 abc", "64 hexadecimal"),
    Case("unpack what is no archive", "data fetch ade20k --root {w}/zip --accept-terms --sha256 {zip}", "is damaged"),
    Case("unpack an evil archive", "data fetch ade20k --root {w}/evil --accept-terms --sha256 {evil}", "not safe to"),
    Case("verify no folder", "data verify {w}/nowhere", "does not exist"),
    Case("verify what nobody knows", "data verify {w}/zip", "Give --dataset NAME"),
    Case("verify damaged data", "data verify {w}/camvid-missing", "is not whole: 1 fault"),
    Case("verify no data set", "data verify {w}/camvid --dataset camvit", "Did you mean 'camvid'"),
    Case("option no data set has", "data verify {w}/camvid --dataset camvid --option colour=3", "colour"),
    Case("folder data set without its file", "data verify {w}/zip --dataset folder", "dataset.toml in its root"),
    Case("folder data set that leads out", "data verify {w}/leads-out", "splits"),
    Case("index damaged labels", "data index {w}/camvid-77", "[77]"),
    Case(
        "stats without images of a step", "data stats {w}/camvid --scenario camvid-6-5 --mode disjoint", "no training"
    ),
    Case("stats of another data set", "data stats {w}/camvid --scenario ade20k-100-50", "ADE20K is expected"),
    Case("stats into a file", "data stats {w}/camvid --scenario camvid-6-5 --out {w}/empty.toml", "empty.toml"),
)

TEXTS = {
    "broken.toml": "scenario = [",
    "deep.toml": f"a = {'[' * 5000}",
    "empty.toml": "",
    "circle-a.toml": 'extends = "circle-b.toml"',
    "circle-b.toml": 'extends = "circle-a.toml"',
    "orphan.toml": 'extends = "nobody"',
    "sums.toml": 'dataset = "camvid"\nclasses = 11\nbase = 6\nincrement = 2',
    "minus.toml": 'dataset = "camvid"\nclasses = 11\nbase = 6\nincrement = [7, -2]',
    "keys.toml": 'dataset = "camvid"\nclasses = 11\nbasis = 6\nincrement = 5',
    "many.toml": 'dataset = "camvid"\nclasses = 255\nbase = 255',
    "broken.yaml": "rows: [",
    "code.yaml": "rows: !!python/object/apply:os.system ['touch pwned']",
    "deep.yaml": "[" * 5000,
    "list.yaml": "- 1",
    "row.yaml": "rows:\n- {colour: red}",
    "words.csv": "step,of,words\n",
    "log.csv": ",".join(["0", *["0.5"] * 7, *["x"] * 5, "0.5"]) + "\n",
    "above.csv": ",".join(["0", *["1.5"] * 7, *["x"] * 5, "1.5"]) + "\n",
    "list.txt": "000 0 1\n",
    "words.txt": "000 0 1\n001 sky\n",
    "range.txt": "000 0 11\n",
    "twice.txt": "000 0\n000 1\n",
    "leads-out/dataset.toml": 'classes = ["a"]\n[splits."../../out"]\nimages = "x"\nlabels = "y"\n',
    "zip/ADEChallengeData2016.zip": "no archive",
}


def make_world(folder: Path) -> None:
    """Everything that the cases name, sound and damaged, without training anything."""
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "folder.toml").mkdir()
    (folder / "cwd").mkdir()
    (folder / "binary.toml").write_bytes(bytes(range(256)))
    _data(folder)
    _weights(folder)
    _evil_zip(folder / "evil")
    fabricate(folder / "run")
    fabricate(folder / "half", steps=["0"])
    fabricate(folder / "none", steps=[])
    fabricate(folder / "linear", model={"name": "vit-linear"})
    fabricate(folder / "other-images", identity={"train": "e" * 64, "val": "f" * 64})
    for name, file, change in (
        ("run-json", "scenario.json", lambda text: text[:-20]),
        ("run-schema", "provenance.json", lambda text: text.replace('"schema": 1', '"schema": 99')),
        ("run-toml", "config.toml", lambda text: f"{text}\n[["),
        ("run-record", "steps/00/record.json", lambda text: '{"sha256": []}'),
        ("run-matrices", "steps/01/matrices.npz", lambda text: "PK"),
        ("run-scenario", "scenario.json", lambda text: text.replace('"steps": [', '"steps": [], "was": [')),
        ("run-path", "steps/00/record.json", lambda text: text.replace('"matrices.npz":', '"../../x/matrices.npz":')),
    ):
        shutil.copytree(folder / "run", folder / name)
        path = folder / name / file
        path.write_text(change(path.read_text(encoding="latin-1")), encoding="latin-1")
    shutil.copytree(folder / "run", folder / "run-edited")
    shutil.copy(folder / "run/steps/00/matrices.npz", folder / "run-edited/steps/01/matrices.npz")


def _data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for i in range(count):
            label = np.resize(np.arange(12), (6, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            for place, array in ((split, rng.integers(0, 256, (48, 64, 3))), (f"{split}annot", label)):
                (folder / "camvid" / place).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(folder / "camvid" / place / f"{i:03d}.png")
    for name in ("camvid-77", "camvid-missing"):
        shutil.copytree(folder / "camvid", folder / name)
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(folder / "camvid-77/trainannot/000.png")
    (folder / "camvid-missing/trainannot/000.png").unlink()


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def _weights(folder: Path) -> None:
    import torch

    torch.save({"model": Evil()}, folder / "evil.pth")
    torch.save({"blocks.0.norm1.weight": torch.ones(2)}, folder / "other.pth")


def _evil_zip(folder: Path) -> None:
    import zipfile

    folder.mkdir()
    with zipfile.ZipFile(folder / "ADEChallengeData2016.zip", "w") as made:
        made.writestr(zipfile.ZipInfo("ADEChallengeData2016/../../pwned", (2026, 1, 1, 0, 0, 0)), "x")


def listing(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder` but the cache, and what the files hold."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
        if p.relative_to(folder).parts[0] != "cache"
    }


def words_of(case: Case, world: Path) -> list[str]:
    places = {"w": str(world)} | {
        name: hashlib.sha256((world / name / "ADEChallengeData2016.zip").read_bytes()).hexdigest()
        for name in ("zip", "evil")
    }
    return [re.sub(r"\{(w|zip|evil)\}", lambda found: places[found[1]], word) for word in case.words.split()]


def run(case: Case, world: Path) -> tuple[int | str | None, str, str]:
    """(exit code, stdout, stderr in one line) of a case, run in this process in world/cwd."""
    from cssbench import cli

    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with (
        contextlib.chdir(world / "cwd"),
        mock.patch.dict(os.environ, {"COLUMNS": "1000", "NO_COLOR": "1", "CSSBENCH_CACHE": str(world / "cache")}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main(words_of(case, world))
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), " ".join(re.sub("[╭╮╰╯│─]+", " ", err.getvalue()).split())


def printed(case: Case, world: Path, err: str) -> str:
    """What stands in the page: without what differs from one machine to the next."""
    text = err.replace(str(world.resolve()), "W").replace(str(world), "W")
    text = re.sub(r"[0-9a-f]{64}", "SHA-256", text)
    text = re.sub(r"^Usage: .*?(Error )", r"\1", text)
    return text if len(text) <= 400 else f"{text[:399]}…"


def page(rows: list[tuple[Case, str]]) -> str:
    lines = [
        "# Bad inputs, and what each printed",
        "",
        f"{len(rows)} mistakes over all commands. Each ends with one error on stderr and exit code 2, without a "
        "traceback, and writes nothing: `tests/test_bad_inputs.py` compares every file before and after (but the index "
        "of a data set, which is kept in the cache). `W` is a folder of sound and of damaged files, the options of "
        "small runs are left out as `...`. This page is made by `python tests/bad_inputs.py`.",
        "",
        "| what is wrong | cssbench ... | stderr |",
        "|---|---|---|",
    ]
    for case, text in rows:
        words = case.words.replace(" ".join(f"--set {change}" for change in SMALL.split()), "...")
        words = re.sub(r"\{(zip|evil)\}", "SHA-256", words.replace("{w}", "W"))
        cells = (case.what, f"`{words}`", text)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('<', '&lt;') for cell in cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_world(world)
        rows = []
        for case in CASES:
            code, _, err = run(case, world)
            if code != 2 or case.said.replace("{w}", str(world)) not in err:
                print(f"NOT AS EXPECTED ({code}): {case.what}: {err}", file=sys.stderr)
            rows.append((case, printed(case, world, err)))
    PAGE.write_text(page(rows), encoding="utf-8")
    print(f"{PAGE}: {len(rows)} bad inputs")


if __name__ == "__main__":
    main()
