"""Every bad input of `bad_inputs.CASES`: one error on stderr, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import bad_inputs
import pytest
import typer
from bad_inputs import CASES, PAGE, Case

from cssbench.cli import app


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    bad_inputs.make_world(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_one_clear_error_and_nothing_written(world: Path, case: Case):
    before = bad_inputs.listing(world)
    code, _, err = bad_inputs.run(case, world)
    assert code == 2, err
    assert case.said in err
    assert "Traceback" not in err
    assert len(re.findall(r"\bError\b:? ", err)) == 1 or not err.startswith("Error"), "one error, not several"
    assert bad_inputs.listing(world) == before
    row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {case.what} |"))
    if err.startswith("Error:"):  # what typer says of usage differs from one version to the next
        shown = bad_inputs.page([(case, bad_inputs.printed(case, world, err))]).splitlines()[-1]
        assert row == shown, "docs/bad-inputs.md is out of date: run `python tests/bad_inputs.py`"


def test_the_table_is_long_and_reaches_every_command():
    assert len(CASES) >= 60
    assert len({case.what for case in CASES}) == len(CASES)
    group = typer.main.get_command(app)
    commands: set[str] = set()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        commands |= {f"{name} {inner}" for inner in below} if below else {name}
    tried = {" ".join(case.words.split()[:n]) for case in CASES for n in (1, 2)}
    assert commands <= tried, "every command has a bad input in the table"
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(CASES)
