"""Resume inside a step: whatever stops a run, what goes on from its checkpoint ends with the bits of one that never
stopped."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tomli_w
import torch
from tiny_runs import LINEAR, SEGVIT, build, make_recipe, start

from cssbench import checkpoint, registry
from cssbench.api import Batch, Method, StepContext
from cssbench.cli import main
from cssbench.config import plain
from cssbench.experiment import build_experiment, sole_writer
from cssbench.interrupt import Interrupted
from cssbench.results import RunFolder, read_json, write_json
from cssbench.step_checkpoint import StepCheckpoints
from cssbench.task_loop import run
from cssbench.trainer import rng_state, set_rng_state

pytestmark = pytest.mark.usefixtures("_interruptible")
ITERATIONS = (5, 3)
BASE = ("train.iterations=[5, 3]", "checkpoint.iterations=2", "train.log_every=1")
Act = Callable[[], None]


def acting(name: str, at: tuple[int, int], act: Act) -> Method:
    """The installed method `name`, which calls `act` in the loss of (step, iteration)."""
    inner = registry.load("methods", name)

    class Acting(inner):  # type: ignore[misc, valid-type]
        plain_base = inner.plain_base

        def loss(self, ctx: StepContext, batch: Batch) -> dict[str, torch.Tensor]:
            if (ctx.step.index, ctx.iteration) == at:
                act()
            return super().loss(ctx, batch)

    return Acting(inner.Config())


def terminate(number: int = signal.SIGTERM) -> Act:
    return lambda: os.kill(os.getpid(), number)


def stopped(recipe: dict[str, Any], out: Path, *changes: str, at: tuple[int, int], act: Act) -> RunFolder:
    """A run that `act` ended, whatever with."""
    made = build(recipe, out, *changes, method=acting(recipe["method"]["name"], at, act))
    made.folder.create()
    with pytest.raises((Interrupted, MemoryError)):
        run(made)
    return RunFolder.read(out)


def go_on(there: RunFolder) -> RunFolder:
    run(build_experiment(there.config, there.path))
    return there


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def rows(there: RunFolder) -> list[str]:
    return [line for path in sorted((there.path / "logs").glob("*.csv")) for line in path.read_text().splitlines()]


def same_run(one: RunFolder, other: RunFolder) -> None:
    """Weights, states, matrices, losses and logs, to the last bit; and nothing left of the checkpoints."""
    assert len(one.records()) == len(other.records()) == one.num_steps
    for a, b in zip(one.records(), other.records(), strict=True):
        for name in ("model.safetensors", "method.safetensors"):
            assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes(), f"step {a.index}: {name}"
        assert a.matrices.keys() == b.matrices.keys()
        for key, matrix in a.matrices.items():
            np.testing.assert_array_equal(matrix, b.matrices[key])
        assert a.content["loss"] == b.content["loss"]
    assert rows(one) == rows(other)
    assert not list(other.path.rglob("training"))


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    content = make_recipe(tmp_path, LINEAR | {"backbone": LINEAR["backbone"] | {"drop_path": 0.3}})
    content["augment"]["photometric"] = True
    return content


POINTS = [(step, iteration) for step, count in enumerate(ITERATIONS) for iteration in range(count)]


def test_stopped_by_a_signal_at_any_iteration(recipe: dict[str, Any], tmp_path: Path):
    whole = start(recipe, tmp_path / "whole", *BASE)
    for number, at in enumerate(POINTS):
        cut = stopped(recipe, tmp_path / f"cut-{number}", *BASE, at=at, act=terminate())
        assert len(cut.records()) == at[0]
        (kept,) = sorted(cut.path.glob("steps/*/training/*.json"))[-1:]
        assert read_json(kept)["iteration"] == at[1] + 1, "the iteration in hand is finished and saved"
        same_run(whole, go_on(cut))
        assert cut.records()[at[0]].content["resumed"]["iteration"] == at[1] + 1


@pytest.mark.parametrize(
    ("method", "model", "changes"),
    [
        ("plop", LINEAR, ()),
        ("reminder", LINEAR, ("train.accumulate=2",)),
        ("segvit-cl", SEGVIT, ()),
        ("mib", LINEAR, ("optim.name=sgd", "train.precision=bf16-mixed")),
        ("finetune", LINEAR, ("data.workers=1", "train.channels_last=true")),
        ("segvit-cl", SEGVIT, ("cache.features=true", "augment.later_views=2", "cache.folder=CACHE")),
    ],
)
def test_ended_without_warning(tmp_path: Path, method: str, model: dict[str, Any], changes: tuple[str, ...]):
    """An exception after iteration 4 of 5, and 2 of 3: training goes on from the checkpoint of iteration 4, and 2."""

    def fail() -> None:
        raise MemoryError

    recipe = make_recipe(tmp_path, model) | {"method": {"name": method}}
    words = [*BASE, *(change.replace("CACHE", str(tmp_path / "cache")) for change in changes)]
    whole = start(recipe, tmp_path / "whole", *words)
    for at in ((0, 4), (1, 2)):
        cut = stopped(recipe, tmp_path / f"cut-{at[0]}", *words, at=at, act=fail)
        same_run(whole, go_on(cut))
        assert cut.records()[at[0]].content["resumed"]["iteration"] == at[1]


def test_a_method_state_that_changes_in_training_comes_back(recipe: dict[str, Any], tmp_path: Path):
    class Counts(Method):
        passes = 0

        def loss(self, ctx: StepContext, batch: Batch) -> dict[str, torch.Tensor]:
            self.passes += 1
            if (ctx.step.index, ctx.iteration) == (1, 1) and self.kill:
                terminate()()
            return {"loss": ctx.model.loss(batch.output, batch.labels)["ce"] * (1 + self.passes / 10)}

        def state_dict(self) -> dict[str, Any]:
            return {"passes": self.passes}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.passes = state["passes"]

        kill = False

    class Killed(Counts):
        kill = True

    whole = start(recipe, tmp_path / "whole", *BASE, method=Counts())
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "cut", *BASE, method=Killed())
    cut = RunFolder.read(tmp_path / "cut")
    run(build_experiment(cut.config, cut.path, method=Counts()))
    same_run(whole, cut)
    assert checkpoint.load_state(cut.step_folder(1) / "method.safetensors") == {"passes": 8}


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if how == "cut short" else content[:-9] + b"\1" * 9)


@pytest.mark.parametrize("how", ["cut short", "changed", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
):
    whole = start(recipe, tmp_path / "whole", *BASE, "checkpoint.iterations=1")
    cut = stopped(recipe, tmp_path / "cut", *BASE, "checkpoint.iterations=1", at=(1, 1), act=terminate())
    older, newest = sorted(cut.path.glob("steps/01/training/*.safetensors"))
    assert (older.stem, newest.stem) == ("00000001", "00000002")
    newest.unlink() if how == "missing" else damage(newest, how)
    shutil.copytree(cut.path, tmp_path / "worse")
    same_run(whole, go_on(cut))
    said = capsys.readouterr().err
    assert f"{newest} is damaged; the one of iteration 1 is used" in said
    assert "goes on at iteration 1 of 3" in said

    worse = RunFolder.read(tmp_path / "worse")
    damage(worse.path / older.relative_to(cut.path), "cut short")
    same_run(whole, go_on(worse))
    assert "is damaged; the step is trained from its start" in capsys.readouterr().err
    assert "resumed" not in worse.records()[1].content


def test_an_edited_note_beside_a_checkpoint_is_damage(recipe: dict[str, Any], tmp_path: Path):
    cut = stopped(recipe, tmp_path / "cut", *BASE, at=(0, 1), act=terminate())
    (note,) = cut.path.glob("steps/00/training/*.json")
    for change in ({"iteration": "../../x"}, {"iteration": 1}, {"sha256": "0"}):
        write_json(note, read_json(note) | change)
        made = build_experiment(cut.config, cut.path)
        assert StepCheckpoints(made, made.scenario.steps[0], None).load() == 0  # type: ignore[arg-type]


def test_the_newest_two_are_kept(recipe: dict[str, Any], tmp_path: Path):
    cut = stopped(recipe, tmp_path / "cut", *BASE, "checkpoint.iterations=1", at=(0, 4), act=terminate())
    names = sorted(path.name for path in cut.path.glob("steps/00/training/*"))
    assert names == ["00000004.json", "00000004.safetensors", "00000005.json", "00000005.safetensors"]


def test_by_minutes(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A clock that the test moves: a minute an iteration."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    saved = []
    real = StepCheckpoints.save

    def save(self: StepCheckpoints, done: int, *rest: Any) -> None:
        saved.append((self.step.index, done))
        real(self, done, *rest)

    monkeypatch.setattr(StepCheckpoints, "save", save)
    tick = Ticking()
    tick.now = now
    start(recipe, tmp_path / "run", "train.iterations=[5, 2]", "checkpoint.minutes=2", method=tick)
    assert saved == [(0, 2), (0, 4), (0, 5), (1, 2)], "every two minutes, and before the evaluation"


class Ticking(Method):
    now: list[float]

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, torch.Tensor]:
        self.now[0] += 60
        return ctx.model.loss(batch.output, batch.labels)


def test_off_unless_a_signal_comes(recipe: dict[str, Any], tmp_path: Path):
    words = ("train.iterations=2", "checkpoint.minutes=none")
    assert "minutes" in plain(build(recipe, tmp_path / "x", *words).config)["checkpoint"]
    cut = stopped(recipe, tmp_path / "cut", *words, at=(0, 0), act=terminate(signal.SIGINT))
    assert len(list(cut.path.glob("steps/00/training/*.safetensors"))) == 1


def test_a_second_signal_ends_at_once(recipe: dict[str, Any], tmp_path: Path):
    def twice() -> None:
        terminate()()
        terminate(signal.SIGINT)()

    made = build(recipe, tmp_path / "run", *BASE, method=acting("finetune", (0, 0), twice))
    made.folder.create()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        run(made)
    assert stop.value.number == signal.SIGINT
    assert not list(made.folder.path.rglob("training"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_leaves_the_last_checkpoint(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = start(recipe, tmp_path / "whole", *BASE)
    real = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if path.name.startswith(".00000004"):
            real(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        with pytest.raises(Exception, match=r"could not be written: No space left on device.*`cssbench resume`"):
            start(recipe, tmp_path / "cut", *BASE)
    cut = RunFolder.read(tmp_path / "cut")
    assert {path.stem for path in cut.path.glob("steps/00/training/*")} == {"00000002"}
    same_run(whole, go_on(cut))


def test_two_processes_on_one_folder(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cut = stopped(recipe, tmp_path / "cut", *BASE, at=(0, 1), act=terminate())
    before = {path: path.read_bytes() for path in cut.path.rglob("*") if path.is_file() and path.name != ".lock"}
    with sole_writer(build_experiment(cut.config, cut.path)):
        code, error = command(capsys, "resume", cut.path)
    assert code == 2
    assert f"{cut.path} is in use: process {os.getpid()} on " in error
    assert before == {path: path.read_bytes() for path in before}
    assert command(capsys, "resume", cut.path)[0] == 0
    assert RunFolder.read(cut.path).finished


def command(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """`cssbench WORDS` in this process: exit code, and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cssbench", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
    return int(left.value.code or 0), capsys.readouterr().err


def test_a_moved_folder_goes_on(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = start(recipe, tmp_path / "whole", *BASE)
    cut = stopped(recipe, tmp_path / "cut", *BASE, at=(1, 1), act=terminate())
    elsewhere = tmp_path / "elsewhere"
    shutil.move(cut.path, elsewhere / "run")
    data = elsewhere / "data"
    data.mkdir()
    for made in tmp_path.glob("synthetic*"):
        shutil.move(made, data)
    code, error = command(capsys, "resume", elsewhere / "run", "--data", data)
    assert (code, "goes on at iteration 2 of 3" in error) == (0, True)
    same_run(whole, RunFolder.read(elsewhere / "run"))


def test_random_numbers_come_back():
    def draws() -> list[Any]:
        return [
            torch.rand(2).tolist(),
            np.random.rand(2).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        ]

    np.random.randn()  # leaves a second number waiting
    state = checkpoint.decode_state(checkpoint.encode_state(rng_state(torch.device("cpu"))), "of the test")
    first = draws()
    assert first != draws()
    set_rng_state(state, torch.device("cpu"))
    assert first == draws()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_says_how_it_was_stopped(
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
):
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    method = acting("finetune", (0, 1), terminate(number))
    monkeypatch.setattr("cssbench.experiment.make_method", lambda _: method)
    found = command(capsys, "run", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert found[0] == code
    assert f"Stopped by {signal.Signals(number).name}. `cssbench resume DIR` goes on" in found[1]


def seen(out: Path) -> str:
    """How far a run is."""
    steps = sorted(out.glob("steps/??"))
    finished = [step for step in steps if (step / "record.json").exists()]
    kept = sorted(int(path.stem) for path in out.glob("steps/*/training/*.json"))
    training = f", then iteration {kept[-1]}" if kept else ", then a step begun" if len(steps) > len(finished) else ""
    return f"{len(finished)} steps finished{training}"


@pytest.mark.slow
def test_twenty_kills_at_random_moments(recipe: dict[str, Any], tmp_path: Path):
    """The command itself, killed and resumed again and again: a quarter while it starts, the others while it works."""
    recipe["checkpoint"] = {"iterations": 3}
    recipe["train"]["iterations"] = [60, 40]
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    words = [sys.executable, "-m", "cssbench"]
    settings: Any = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    whole, out = tmp_path / "whole", tmp_path / "killed"
    first = [*words, "run", str(tmp_path / "recipe.toml"), "--out"]
    subprocess.run([*first, str(whole)], check=True, **settings)
    rng, table = random.Random(0), []
    while len(table) < 20:
        if (out / "config.toml").exists() and RunFolder.read(out).finished:
            same_run(RunFolder.read(whole), RunFolder.read(out))
            shutil.rmtree(out)
        begun = (out / "config.toml").exists()
        process = subprocess.Popen([*words, "resume", str(out)] if begun else [*first, str(out)], **settings)
        if len(table) % 4:
            before = {path: path.stat().st_mtime_ns for path in out.rglob("*.csv")}
            while process.poll() is None and before == {p: p.stat().st_mtime_ns for p in out.rglob("*.csv")}:
                time.sleep(0.001)
        pause = rng.uniform(0, 2.0)
        with suppress(subprocess.TimeoutExpired):
            process.wait(pause)
        process.kill()
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error
        if process.returncode:
            said = [line for line in error.splitlines() if "goes on" in line or "damaged" in line]
            table.append(f"{len(table) + 1:2d}  {'resume' if begun else 'run   '}  {seen(out):42s}{' '.join(said)}")
    subprocess.run([*words, "resume", str(out)] if out.exists() else [*first, str(out)], check=True, **settings)
    same_run(RunFolder.read(whole), RunFolder.read(out))
    print("", *table, "the end: weights, states, matrices and logs equal the run that was never killed", sep="\n")
