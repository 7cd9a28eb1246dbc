"""The suite's folder: how far runs are, whatever their processes left behind, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import suite_runs
from report_runs import learner

from cssbench.errors import RunError
from cssbench.suites.folder import SuiteFolder, launching, left_out, missing


def made(path: Path) -> SuiteFolder:
    return suite_runs.make(path, {"one": ("a", "go"), "two": ("b", "go")})


def attempt(suite: SuiteFolder, name: str, **content: object) -> None:
    suite.attempt(name).parent.mkdir(exist_ok=True)
    suite.attempt(name).write_text(json.dumps({"attempt": 2} | content))


def train(suite: SuiteFolder, name: str, done: int, logged: int | None = None) -> None:
    """`done` finished steps, and of the next one the log up to iteration `logged`."""
    for index in range(done):
        folder = suite.run(name) / "steps" / f"{index:02d}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text("{}")
    if logged is not None:
        logs = suite.run(name) / "logs"
        logs.mkdir(parents=True)
        rows = ["step,iteration,name,value", *(f"{done},{i},ce,0.5" for i in range(logged + 1)), f"{done},99"]
        (logs / f"train-{done:02d}.csv").write_text("\n".join(rows))  # the last line is being written


def test_a_suite_comes_back_as_it_was_written(tmp_path: Path):
    suite = made(tmp_path)
    assert SuiteFolder.read(tmp_path) == suite
    assert [suite.state(entry).kind for entry in suite.entries] == ["waiting", "waiting"]


def test_where_a_run_is(tmp_path: Path):
    suite = made(tmp_path)
    train(suite, "one", done=1, logged=3)
    attempt(suite, "one", code=None)
    lock = suite.lock("one")
    assert lock.acquire()
    state = suite.state(suite.entries[0])
    assert (state.kind, state.step, state.steps, state.iteration, state.iterations) == ("running", 1, 2, 3, 5)
    assert (state.done, state.attempts) == (13, 2)
    lock.release()
    assert suite.state(suite.entries[0]).kind == "stopped"  # whatever ended it had no time to say so


@pytest.mark.parametrize(
    ("code", "log", "kind", "error"),
    [
        (1, "Traceback\n  File x\nOutOfMemoryError: 3 GiB\n\n", "failed", "OutOfMemoryError: 3 GiB"),
        (2, "=== attempt 2, now: cssbench run\n", "failed", "exit code 2"),
        (2, "Error: \x1b[2Jbad\x07 name\n", "failed", "Error: [2Jbad name"),
        (-9, "step 0: fine\n", "failed", "killed by SIGKILL (out of memory?)"),
        (-11, "", "failed", "killed by SIGSEGV"),
        (143, "SIGTERM: stopping\n", "stopped", ""),
        (130, "", "stopped", ""),
        (-15, "", "stopped", ""),
    ],
)
def test_how_a_run_ended(tmp_path: Path, code: int, log: str, kind: str, error: str):
    suite = made(tmp_path)
    attempt(suite, "one", code=code)
    suite.log("one").parent.mkdir()
    suite.log("one").write_text(log)
    state = suite.state(suite.entries[0])
    assert (state.kind, state.error) == (kind, error)
    train(suite, "one", done=2)
    assert suite.state(suite.entries[0]).kind == "finished"


def test_a_damaged_note_of_an_attempt_is_no_obstacle(tmp_path: Path):
    suite = made(tmp_path)
    attempt(suite, "one")
    suite.attempt("one").write_text('{"attempt": 2, "co')
    train(suite, "one", done=1)
    assert suite.state(suite.entries[0]).kind == "stopped"


def test_a_begun_run_keeps_its_recipe(tmp_path: Path):
    suite = made(tmp_path)
    suite.write({"one": "# other\n"})  # nothing of it was begun
    suite.run("one").mkdir(parents=True)
    (suite.run("one") / "config.toml").touch()
    with pytest.raises(RunError, match="begun with another recipe"):
        suite.write({"two": "# other\n", "one": "# changed\n"})
    assert suite.recipe("two").read_text() == "# nothing\n"


@pytest.mark.parametrize("text", ["{", '{"schema": 1}', '{"schema": 7}', "[]", '{"schema": 1, "runs": [{}]}'])
def test_a_damaged_suite_is_an_error_that_says_what_to_do(tmp_path: Path, text: str):
    made(tmp_path)
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(RunError, match=r"suite run|schema 7"):
        SuiteFolder.read(tmp_path)


def test_no_name_in_the_file_leads_out_of_the_folder(tmp_path: Path):
    made(tmp_path)
    path = tmp_path / "suite.json"
    path.write_text(path.read_text().replace('"one"', '"../../one"'))
    with pytest.raises(RunError, match="damaged"):
        SuiteFolder.read(tmp_path)


def test_runs_that_a_smaller_suite_no_longer_names(tmp_path: Path):
    suite = made(tmp_path)
    for name in ("one", "gone"):
        suite.run(name).mkdir(parents=True)
    assert left_out(suite) == ["gone"]


def test_a_second_process_is_refused(tmp_path: Path):
    suite = made(tmp_path)
    with launching(suite), pytest.raises(RunError, match="Another process"), launching(SuiteFolder.read(tmp_path)):
        pass
    with launching(suite):
        pass


def test_what_a_report_must_name(tmp_path: Path):
    suite = suite_runs.make(tmp_path, dict.fromkeys(("good", "failed", "waiting", "damaged"), ("a", "go")))
    for name in ("good", "damaged"):
        learner(suite.run(name))
    attempt(suite, "failed", code=1)
    suite.log("failed").parent.mkdir()
    suite.log("failed").write_text("Error: bad luck\n")
    os.truncate(suite.run("damaged") / "provenance.json", 5)
    found = missing(suite)
    assert list(found) == ["failed", "waiting", "damaged"]
    assert found["failed"] == "failed at step 0 of 1, iteration 0: Error: bad luck"
    assert "provenance.json" in found["damaged"]
