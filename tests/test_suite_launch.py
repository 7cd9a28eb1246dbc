"""Starting runs: their order, what fails alone, what is stopped and goes on, submitit's executors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
import suite_runs
from suite_runs import Scripted

from cssbench.errors import ConfigError
from cssbench.suites import attempt, launch
from cssbench.suites.attempt import ALL, Attempt
from cssbench.suites.folder import Entry, SuiteFolder
from cssbench.suites.launch import Options

pytestmark = pytest.mark.usefixtures("_interruptible")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are scripts; other processes get them by value."""
    monkeypatch.setattr(launch, "Attempt", Scripted)
    monkeypatch.setattr(launch, "POLL", 0.05)
    cloudpickle.register_pickle_by_value(suite_runs)
    yield
    cloudpickle.unregister_pickle_by_value(suite_runs)


def order(suite: SuiteFolder) -> list[str]:
    return (suite.path / "order.txt").read_text().split()


def kinds(suite: SuiteFolder) -> dict[str, str]:
    return {entry.id: suite.state(entry).kind for entry in suite.entries}


def until(true: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_failed_run_stops_no_other_and_is_tried_again(tmp_path: Path):
    suite = suite_runs.make(tmp_path, {"one": ("a", "fail,go"), "two": ("b", "die,go"), "three": ("c", "go")})
    launch.launch(suite, Options())
    assert kinds(suite) == {"one": "failed", "two": "failed", "three": "finished"}
    states = [suite.state(entry) for entry in suite.entries]
    assert [state.error for state in states] == [
        "Error: no [bold]luck[/bold] [2J today",
        "killed by SIGKILL (out of memory?)",
        "",
    ]
    launch.launch(SuiteFolder.read(tmp_path), Options())
    assert set(kinds(suite).values()) == {"finished"}
    assert order(suite) == ["one", "two", "three", "one", "two"]  # the finished one was left alone
    assert suite.log("one").read_text().count("=== attempt") == 2


def test_sharers_wait_for_the_run_that_trains_their_base_step(tmp_path: Path):
    suite = suite_runs.make(
        tmp_path, {"a1": ("a", "go"), "a2": ("a", "go"), "b1": ("b", "wait,go"), "b2": ("b", "go"), "b3": ("b", "go")}
    )
    entries = {entry.id: entry for entry in suite.entries}

    def ready(name: str, *busy: str) -> bool:
        return launch._ready(suite, entries[name], [entries[one] for one in busy])

    assert ready("b2")
    assert ready("b2", "a1")
    assert not ready("b2", "b1")
    folder = suite.run("b1") / "steps" / "00"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{}")
    assert ready("b2", "b1")
    assert not ready("a2", "a1")


def test_a_run_of_another_process_is_left_to_it(tmp_path: Path):
    suite = suite_runs.make(tmp_path, {"one": ("a", "wait,go"), "two": ("b", "go")})
    other = threading.Thread(target=Scripted(suite.path, "one"))
    other.start()
    until((suite.run("one") / "waiting").exists)
    assert Scripted(suite.path, "one")() is None
    assert suite.state(suite.entries[0]).kind == "running"
    os.kill(json.loads(suite.attempt("one").read_text())["pid"], signal.SIGKILL)
    other.join()
    assert kinds(suite)["one"] == "failed"
    launch.launch(suite, Options())
    assert set(kinds(suite).values()) == {"finished"}


def test_a_run_lives_on_when_the_process_that_started_it_is_killed(tmp_path: Path):
    suite = suite_runs.make(tmp_path, {"one": ("a", "wait,go")})
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "from pathlib import Path; from suite_runs import Scripted\n"
    code += f"Scripted(Path({str(suite.path)!r}), 'one')()"
    starter = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: (suite.run("one") / "waiting").exists() and suite.attempt("one").exists())
    starter.kill()
    starter.wait()
    assert suite.state(suite.entries[0]).kind == "running"  # its lock went with it
    os.kill(json.loads(suite.attempt("one").read_text())["pid"], signal.SIGTERM)
    until(lambda: not suite.running("one"))
    assert suite.state(suite.entries[0]).kind == "stopped"
    launch.launch(suite, Options())
    assert kinds(suite) == {"one": "finished"}


@pytest.mark.parametrize("executor", ["here", "local"])
def test_stopping_has_the_run_write_its_checkpoint(tmp_path: Path, executor: str):
    suite = suite_runs.make(tmp_path, {"one": ("a", "wait,go"), "two": ("b", "go")})

    def interrupt() -> None:
        until(lambda: (suite.run("one") / "waiting").exists() and suite.attempt("one").exists())
        os.kill(os.getpid(), signal.SIGINT)

    person = threading.Thread(target=interrupt)
    person.start()
    with pytest.raises(KeyboardInterrupt):
        launch.launch(suite, Options(executor))
    person.join()
    assert (suite.run("one") / "steps" / "00" / "record.json").exists()
    assert kinds(suite) == {"one": "stopped", "two": "waiting"}


def test_processes_side_by_side_through_submitit(tmp_path: Path):
    suite = suite_runs.make(tmp_path, {"one": ("a", "go"), "two": ("a", "fail"), "three": ("b", "die")})
    launch.launch(suite, Options("local", jobs=2))
    assert kinds(suite) == {"one": "finished", "two": "failed", "three": "failed"}
    assert order(suite)[-1] == "two"  # it shares the base step of the first
    assert list((tmp_path / "submitit").iterdir())


def test_a_local_job_at_its_time_limit_is_stopped_requeued_and_goes_on(tmp_path: Path):
    import submitit

    suite = suite_runs.make(tmp_path, {"one": ("a", "wait,go")})
    executor = submitit.LocalExecutor(folder=tmp_path / "submitit" / "%j", max_num_timeout=launch.TIMEOUTS)
    executor.update_parameters(timeout_min=6 / 60, signal_delay_s=3)
    job = executor.submit(Scripted(suite.path, "one"))
    until(job.done)
    assert kinds(suite) == {"one": "finished"}
    log = suite.log("one").read_text()
    assert log.count("=== attempt") == 2
    assert json.loads(suite.attempt("one").read_text())["attempt"] == 2
    assert "Requeued job" in "".join(path.read_text() for path in (tmp_path / "submitit").rglob("*.out")) + "".join(
        path.read_text() for path in (tmp_path / "submitit").rglob("*.err")
    )


@pytest.mark.parametrize(("executor", "graces"), [("slurm", 1), ("local", 0)])
def test_a_slurm_job_whose_run_was_told_to_end_waits_to_be_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, graces: int
):
    suite = suite_runs.make(tmp_path, {"one": ("a", "wait")})
    slept: list[float] = []
    real = time.sleep

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if seconds == attempt.GRACE:
            assert kinds(suite) == {"one": "stopped"}  # its lock is free by then
            return
        real(seconds)
        if (suite.run("one") / "waiting").exists():
            os.kill(json.loads(suite.attempt("one").read_text())["pid"], signal.SIGTERM)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    monkeypatch.setattr(attempt.time, "sleep", sleep)
    assert Scripted(suite.path, "one")() == 143
    assert slept.count(attempt.GRACE) == graces
    signal.signal(signal.SIGINT, before)


FAKE_SBATCH = """#!/bin/sh
n=$(ls "{box}" | wc -l)
cp "$1" "{box}/$n.sh"
echo "Submitted batch job $((100 + n))"
"""


def test_slurm_gets_arrays_in_the_order_of_what_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    box, tools = tmp_path / "box", tmp_path / "tools"
    for folder in (box, tools, tmp_path / "suite"):
        folder.mkdir()
    (tools / "sbatch").write_text(FAKE_SBATCH.format(box=box))
    (tools / "srun").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    runs = {"a1": ("a", ""), "a2": ("a", ""), "a3": ("a", ""), "b1": ("b", "")}
    suite = suite_runs.make(tmp_path / "suite", runs)
    options = Options(
        "slurm", 4, 2, 90, "short", 8, 60, setup=("module load cuda",), slurm=(("account", "me"),), notice_s=100
    )
    launch.launch(suite, options)
    first, second = ((box / f"{n}.sh").read_text().splitlines() for n in (0, 1))
    assert len(list(box.iterdir())) == 2
    for line in (
        "#SBATCH --array=0-1%2", "#SBATCH --time=90", "#SBATCH --partition=short", "#SBATCH --gpus-per-node=2",
        "#SBATCH --signal=USR2@100", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=60GB", "#SBATCH --ntasks-per-node=1", "#SBATCH --account=me", "module load cuda",
    ):  # fmt: skip
        assert line in first
    assert not any("dependency" in line for line in first)
    assert "#SBATCH --dependency=afterany:100_0" in second  # a2 and a3 after a1
    assert "#SBATCH --array=0-1%2" in second
    pickled = sorted((tmp_path / "suite" / "submitit").rglob("*_submitted.pkl"))
    assert len(pickled) == 4


def test_slurm_needs_its_tools_and_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    suite = suite_runs.make(tmp_path, {"one": ("a", "go")})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch"):
        launch.launch(suite, Options("slurm", minutes=5))


def test_without_submitit_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    suite = suite_runs.make(tmp_path, {"one": ("a", "go")})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"cssbench\[cluster\]"):
        launch.launch(suite, Options("local"))
    launch.launch(suite, Options())
    assert kinds(suite) == {"one": "finished"}


def test_the_command_of_a_run(tmp_path: Path):
    suite = suite_runs.make(tmp_path, {"one": ("a", "go")})
    suite.data = "/data"
    one = Attempt(suite.path, "one")
    words = one.command(suite, suite.entries[0])
    assert words == [
        sys.executable, "-m", "cssbench", "run", str(suite.recipe("one")), "--out", str(suite.run("one")),
        "--data", "/data", "--shared", str(suite.path / "shared"),
    ]  # fmt: skip
    suite.run("one").mkdir(parents=True)
    (suite.run("one") / "config.toml").touch()
    many = Entry(**vars(suite.entries[0]) | {"devices": 4})
    assert one.command(suite, many)[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "cssbench", "resume",
        str(suite.run("one")), "--data", "/data", "--shared", str(suite.path / "shared"),
    ]  # fmt: skip


def test_which_gpus_a_run_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,7")
    assert launch.visible_gpus() == ["3", "5", "7"]
    seen = {devices: Attempt(tmp_path, "one", devices)._environment() for devices in (None, ALL, "5", "")}
    assert seen[None]["CUDA_VISIBLE_DEVICES"] == "3, 5,7"
    assert "CUDA_VISIBLE_DEVICES" not in seen[ALL]
    assert (seen["5"]["CUDA_VISIBLE_DEVICES"], seen[""]["CUDA_VISIBLE_DEVICES"]) == ("5", "")
