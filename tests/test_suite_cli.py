"""`cssbench suite` as a user types it: real runs of a moment, their account on disk, the report, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import suite_runs
import tomli_w
from report_runs import learner
from shared_runs import entries, same_runs
from tiny_runs import LINEAR, make_recipe

from cssbench.results import RunFolder
from cssbench.suites import launch, plan, spec
from cssbench.suites.attempt import Attempt
from cssbench.suites.folder import SuiteFolder

Command = Callable[..., tuple[int, str, str]]


METHODS = 'recipe = "tiny.toml"\nmethods = ["finetune", "mib"]\nscenarios = ["tiny-4-2.toml"]\n'
BROKEN = '\n[method.mib.set.optim]\nlr = 1e30\nclip = "none"\n'  # its first loss is no number


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A suite of two methods on one tiny scenario."""
    recipe = make_recipe(tmp_path, LINEAR)
    recipe["train"]["iterations"] = [3, 2]
    recipe["evaluate"] |= {"geometries": ["full"], "flops_images": 0}
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(recipe))
    (tmp_path / "suite.toml").write_text(METHODS)
    return tmp_path / "suite.toml"


def states(command: Command, out: Path) -> dict[str, dict[str, Any]]:
    runs = json.loads(command("suite", "status", out, "--json")[1])["runs"]
    return {name.split("_")[0]: state for name, state in runs.items()}


def test_what_was_planned_is_what_is_trained(command: Command, tiny: Path, tmp_path: Path):
    out = tmp_path / "out"
    code, printed, _ = command("suite", "plan", tiny, "--json")
    planned = json.loads(printed)["account"]["all"]
    assert (code, planned["separate"], planned["suite"]) == (0, 10, 7)
    code, printed, _ = command("suite", "run", tiny, "--out", out)
    assert code == 0
    assert "2 finished" in printed
    assert {state["kind"] for state in states(command, out).values()} == {"finished"}
    assert len(entries(out / "shared")) == 1
    runs = [RunFolder.read(path) for path in sorted((out / "runs").iterdir())]
    trained = [r.content["iterations"] for run in runs for r in run.records() if "shared" not in r.content]
    assert sum(trained) == planned["suite"]
    # Another recipe for a run that is there is refused, and nothing of the suite changes.
    before = {path: path.read_bytes() for path in out.rglob("*.toml")}
    tiny.write_text(METHODS + BROKEN)
    code, _, error = command("suite", "run", tiny, "--out", out)
    assert code == 2
    assert "begun with another recipe" in error
    assert {path: path.read_bytes() for path in out.rglob("*.toml")} == before


@pytest.mark.slow
def test_a_run_that_really_fails_is_tried_again_and_stays_a_row(command: Command, tiny: Path, tmp_path: Path):
    out = tmp_path / "out"
    tiny.write_text(METHODS + BROKEN)
    code, printed, error = command("suite", "run", tiny, "--out", out, "--executor", "local")
    assert code == 1
    assert "suite resume" in error
    found = states(command, out)
    assert {name: state["kind"] for name, state in found.items()} == {"finetune": "finished", "mib": "failed"}
    assert "not finite" in found["mib"]["error"]
    assert "not finite" in printed
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("record.json")}
    assert command("suite", "resume", out)[0] == 1
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("record.json")} == before
    assert states(command, out)["mib"]["attempts"] == 2


@pytest.mark.slow
def test_a_run_requeued_by_submitit_equals_one_that_was_not(tiny: Path, tmp_path: Path):
    """The job's time limit comes while the run trains: it writes its checkpoint, is requeued and goes on from there."""
    import submitit

    recipe = tomllib.loads((tmp_path / "tiny.toml").read_text())
    recipe["train"]["iterations"] = [600, 2]
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(recipe))
    runs = plan.plan(spec.runs(spec.read_suite(str(tiny)), str(tiny)), has_data=True)[:1]
    suites = []
    for name in ("whole", "cut"):
        suite = SuiteFolder(tmp_path / name, name, "", str(tmp_path), "shared", None, [one.entry for one in runs])
        suite.write({one.id: one.run.config.to_toml() for one in runs})
        suites.append(suite)
    launch.launch(suites[0], launch.Options())
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs", max_num_timeout=launch.TIMEOUTS)
    executor.update_parameters(timeout_min=60 / 60, signal_delay_s=30)
    attempt = Attempt(suites[1].path, runs[0].id)
    record = suites[1].run(runs[0].id) / "logs" / "train-00.csv"
    job = executor.submit(attempt)
    while not (record.exists() and len(record.read_text().splitlines()) > 20):
        assert not job.done()
        time.sleep(0.05)
    tasks = subprocess.run(["pgrep", "-P", job.job_id], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(tasks[0]), signal.SIGUSR2)  # what SLURM would send to the job
    while not job.done():
        time.sleep(0.2)
    assert suites[1].log(runs[0].id).read_text().count("=== attempt") == 2
    same_runs(*(RunFolder.read(suite.run(runs[0].id)) for suite in suites))


@pytest.mark.usefixtures("_drawn_only")
def test_a_report_names_the_runs_that_are_not_in_it(command: Command, tmp_path: Path):
    suite = suite_runs.make(tmp_path / "suite", dict.fromkeys(("one", "lost"), ("a", "go")))
    learner(suite.run("one"))
    for path, text in ((suite.attempt("lost"), '{"code": 2}'), (suite.log("lost"), "Error: <script>bad luck\n")):
        path.parent.mkdir()
        path.write_text(text)
    code, _, error = command("suite", "report", suite.path, "--protocol", "mmseg150@1")
    assert code == 0
    assert "lost: failed at step 0 of 1, iteration 0: Error: <script>bad luck" in error
    page = (suite.path / "report" / "report.html").read_text()
    assert "Not in this report" in page
    assert "Error: &lt;script&gt;bad luck" in page
    assert "lost: failed" in (suite.path / "report" / "not-finished.md").read_text()
    learner(suite.run("lost"), method="lwf")
    assert command("suite", "report", suite.path, "--protocol", "mmseg150@1", "--kind", "tables")[0] == 0
    assert not (suite.path / "report" / "not-finished.md").exists()


def test_a_suite_without_a_finished_run_has_no_report(command: Command, tmp_path: Path):
    suite_runs.make(tmp_path / "suite", {"one": ("a", "go")})
    code, _, error = command("suite", "report", tmp_path / "suite")
    assert code == 2
    assert "no finished run" in error
    assert not (tmp_path / "suite" / "report").exists()


def test_watching_ends_when_nothing_is_left_to_watch(command: Command, tmp_path: Path):
    suite = suite_runs.make(tmp_path, {"one": ("a", "go")})
    learner(suite.run("one"))
    code, printed, _ = command("suite", "status", tmp_path, "--watch")
    assert code == 0
    assert "finished" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "camvid-liner", "--out", "OUT"], "camvid-linear"),
        (["run", "missing.toml", "--out", "OUT"], "missing.toml"),
        (["run", "camvid-linear", "--out", "OUT", "--data", "nowhere"], "nowhere"),
        (["run", "ade20k-segvit", "--out", "OUT"], "--data"),
        (["run", "camvid-linear", "--out", "OUT", "--partition", "x"], "--partition is for --executor slurm"),
        (["run", "camvid-linear", "--out", "OUT", "--jobs", "2"], "--executor local"),
        (["run", "camvid-linear", "--out", "OUT", "--minutes", "2"], "--minutes"),
        (["run", "camvid-linear", "--out", "OUT", "--executor", "slurm", "--slurm", "x"], "key=value"),
        (["status", "OUT"], "suite run"),
        (["resume", "OUT"], "suite run"),
        (["report", "OUT"], "suite run"),
        (["plan", "camvid-linear", "--data", "a", "--index", "b"], "not both"),
        (["plan", "ade20k-segvit"], "--index"),
        (["plan", "camvid-linear", "--bench", "nowhere.csv"], "throughput"),
    ],
)
def test_mistakes(command: Command, tmp_path: Path, words: list[str], said: str):
    out = tmp_path / "out"
    code, _, error = command("suite", *(str(out) if word == "OUT" else word for word in words))
    assert code == 2
    assert said in error
    assert not out.exists()
