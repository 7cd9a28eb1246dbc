"""Other people's logs as run folders, marked *imported*: what the log supports, and nothing it does not say.

`plop-csv` is the file that the PLOP code family writes (PLOP, REMINDER, RCIL, EWF): one line per step,

    step, IoU of position 0, 1, ..., K, overall mIoU

position 0 the background, then the classes in the order in which they are learned; IoU in [0, 1], `x` for a class not
yet seen, `X` for one that is seen but has no ground truth. These are scores under `plop@1`; there are no confusion
matrices, so that no other protocol can be told from them. Where a line is missing before the last one, its step is kept
with no IoU at all: `avg` and forgetting are then unknown, not zero (PLOP's own `average_csv.py` prints zeros).
"""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cssbench
from cssbench import provenance, registry
from cssbench.config import RunConfig, ScenarioChoice, validate
from cssbench.errors import DataError
from cssbench.results import RunFolder, sha256
from cssbench.scenario import Scenario

FORMAT, PROTOCOL = "plop-csv", "plop@1"
UNSEEN, NO_TRUTH = "x", "X"
TOLERANCE = 1e-4  # of the overall mIoU against the mean of the values beside it: logs may round to four places

Ious = dict[int, float | None]


@dataclass(frozen=True)
class Log:
    """A log that was read and agrees with `scenario`. steps: step -> class id (0 the background) -> IoU in [0, 1],
    None where the class has no ground truth; only the steps that have a line."""

    path: Path
    scenario: Scenario
    steps: Mapping[int, Ious]

    @property
    def missing(self) -> list[int]:
        """Steps without a line before the last that has one."""
        return [step for step in range(max(self.steps)) if step not in self.steps]

    @property
    def finished(self) -> bool:
        return max(self.steps) == len(self.scenario.steps) - 1


def read_plop_csv(path: Path, scenario: Scenario) -> Log:
    """Read and check a log. Raises DataError naming the line and what was expected there."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a {FORMAT} log: {error}. Name the CSV file of a run.") from None
    if not lines:
        raise DataError(f"{path} is empty. A {FORMAT} log has one line per step: step, IoU per class, overall mIoU.")
    steps: dict[int, Ious] = {}
    for number, row in lines:
        step, ious = _read_line(f"Line {number} of {path}", [cell.strip() for cell in row], scenario)
        if step in steps:
            raise DataError(
                f"Line {number} of {path} is a second line of step {step}: two runs were written into one file. "
                f"Keep the lines of one of them."
            )
        steps[step] = ious
    return Log(path, scenario, dict(sorted(steps.items())))


def _read_line(where: str, cells: Sequence[str], scenario: Scenario) -> tuple[int, Ious]:
    count, last = scenario.num_classes, len(scenario.steps) - 1
    if len(cells) != count + 3:
        raise DataError(
            f"{where} has {len(cells)} cells. Scenario {scenario.name!r} needs {count + 3}: step, background, {count} "
            f"classes, overall mIoU. Name the scenario that the log was written for with --scenario."
        )
    if not (cells[0].isdecimal() and int(cells[0]) <= last):
        raise DataError(
            f"{where} is of step {cells[0]!r}. Scenario {scenario.name!r} has steps 0 to {last}: name the scenario "
            f"that the log was written for, and leave no heading in the file."
        )
    step, shown = int(cells[0]), cells[1:-1]
    _check_seen(where, shown, scenario, step)
    values = [
        None if cell in (UNSEEN, NO_TRUTH) else _iou(where, position, cell) for position, cell in enumerate(shown)
    ]
    if values[0] is None:
        raise DataError(
            f"{where} has no IoU for the background, which is a class with ground truth under {PROTOCOL}: this log was "
            f"scored otherwise (background ignored), and cannot be imported as {FORMAT}."
        )
    there = [value for value in values if value is not None]
    mean, printed = math.fsum(there) / len(there), _iou(where, len(shown), cells[-1])
    if abs(mean - printed) > TOLERANCE:
        raise DataError(
            f"{where} ends with an overall mIoU of {printed:.6g}, but its {len(there)} IoUs have a mean of {mean:.6g}. "
            f"They must agree to {TOLERANCE:g}: the line was edited, or is not of this format."
        )
    seen = (0, *scenario.steps[step].seen)
    return step, dict(zip(seen, values[: len(seen)], strict=True))


def _check_seen(where: str, shown: Sequence[str], scenario: Scenario, step: int) -> None:
    """Positions up to the last class seen must hold anything but `x`, all later ones `x`."""
    seen = 1 + len(scenario.steps[step].seen)
    wrong = [p for p, cell in enumerate(shown) if (cell == UNSEEN) != (p >= seen)]
    if wrong:
        said, wanted = ("unseen", "seen") if wrong[0] < seen else ("seen", "unseen")
        raise DataError(
            f"{where}: at step {step} of scenario {scenario.name!r} the first {seen - 1} classes in the order of "
            f"learning are seen, and all others {UNSEEN!r}; the log has position {wrong[0]} as {said}, not {wanted} "
            f"({len(wrong)} such cells). Name the scenario that the log was written for with --scenario."
        )


def _iou(where: str, position: int, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise DataError(
            f"{where} holds {cell!r} in column {position + 2}: an IoU is a number from 0 to 1, {UNSEEN!r} (not yet "
            f"seen) or {NO_TRUTH!r} (no ground truth), and the last column the mean of the numbers. Mend that line."
        )
    return value


def write_run(log: Log, out: Path, method: str, model: str = "unknown", scenario_name: str | None = None) -> RunFolder:
    """Make the run folder `out` from a log. method, model: what the numbers are to be called; the log does not say.

    scenario_name: as given on the command line (a path keeps its folder); default the scenario's own name.
    Raises RunError when `out` already holds a run.
    """
    chosen = ScenarioChoice(name=scenario_name or log.scenario.name, mode=log.scenario.mode)
    folder = RunFolder(out, _recipe(log, chosen, method, model), _describe(log.scenario), _origin(log))
    folder.create()
    for step in range(max(log.steps) + 1):
        ious = log.steps.get(step)
        known = {str(c): None if ious is None else ious[c] for c in (0, *log.scenario.steps[step].seen)}
        content = {"protocol": PROTOCOL, "ious": known} | ({"missing": True} if ious is None else {})
        folder.write_record(step, {"imported": content})
    return folder


def _recipe(log: Log, chosen: ScenarioChoice, method: str, model: str) -> RunConfig:
    """A recipe says how a run was trained, and a log does not: `train` and `seed` are there for the form alone."""
    content = {
        "note": f"imported from {log.path.name}; seed and training settings are not known",
        "scenario": chosen.model_dump(exclude_none=True),
        "method": {"name": method},
        "model": {"name": model},
        "train": {"iterations": 1},
        "evaluate": {"geometries": ["crop"], "samples": 0},
    }
    return validate(content, "The import")


def _describe(scenario: Scenario) -> dict[str, object]:
    """scenario.json, with class names where the data set knows them without its images."""
    dataset = registry.load("datasets", scenario.dataset)
    names = getattr(dataset, "classes", ())
    return {
        "name": scenario.name,
        "dataset": scenario.dataset,
        "mode": scenario.mode,
        "void": scenario.void,
        "description": scenario.description,
        "classes": list(names) if len(names) == scenario.num_classes else [],
        "steps": [{"new": list(step.new)} for step in scenario.steps],
        **({"background_class": True} if getattr(dataset, "background_class", False) else {}),
    }


def _origin(log: Log) -> dict[str, object]:
    """provenance.json: of the import; of the run only what its file is."""
    return {
        "command": provenance.this_command(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": cssbench.__version__,
        **provenance.code_state(Path(cssbench.__file__).parent),
        "data": {"name": log.scenario.dataset},
        "imported": {
            "format": FORMAT,
            "file": log.path.name,
            "sha256": sha256(log.path),
            "missing_steps": log.missing,
        },
    }
