"""The folder of a suite: what it holds, and how far each of its runs is. Read and written without torch.

    DIR/
      suite.json            the runs, in the order of the suite, and what they were started with; see `Entry`
      recipes/<id>.toml     the recipe of each run, with everything that the suite says
      runs/<id>/            run folders (`cssbench.results`)
      shared/               base steps (`cssbench.shared`)
      logs/<id>.log         what the processes of a run printed, one attempt after another
      state/<id>.json       the last attempt: when, where, exit code
      state/<id>.lock       held by the processes of a run while one of them lives
      submitit/             files of submitit's own

A run is *running* while its lock is held; nothing that a process failed to write, however it ended, can hide that.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cssbench.errors import CssbenchError, RunError
from cssbench.lock import FileLock
from cssbench.results import RunFolder, safe_name, write_bytes, write_json

SCHEMA = 1
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)  # exit codes, not failures
TAIL = 4096  # bytes at the end of a log that are looked at


@dataclass(frozen=True)
class Entry:
    """One run as suite.json holds it. base: runs with the same one share their base step. iterations: of each step."""

    id: str
    method: str
    scenario: str
    model: str
    seed: int
    order: Any
    oracle: bool
    base: str
    iterations: tuple[int, ...]
    devices: int


@dataclass(frozen=True)
class State:
    """How far a run is: waiting, running, finished, failed or stopped. `iteration` of `iterations` at step `step`;
    `done`: iterations of all steps so far. error: the last line of a failed run."""

    kind: str
    step: int = 0
    steps: int = 0
    iteration: int = 0
    iterations: int = 0
    done: int = 0
    attempts: int = 0
    error: str = ""


@dataclass
class SuiteFolder:
    """A suite's folder. `read` opens one."""

    path: Path
    name: str
    description: str
    workdir: str
    shared: str
    data: str | None
    entries: list[Entry]

    @classmethod
    def read(cls, path: Path) -> SuiteFolder:
        """Raises RunError when `path` holds no suite, or a damaged one."""
        path = path.resolve()
        try:
            content = json.loads((path / "suite.json").read_text(encoding="utf-8"))
        except OSError:
            raise RunError(f"{path} holds no suite: it has no suite.json. `cssbench suite run` makes one.") from None
        except ValueError as error:
            raise RunError(f"{path / 'suite.json'} is damaged ({error}). {_REMEDY}") from None
        if isinstance(content, dict) and content.get("schema") != SCHEMA:
            raise RunError(f"{path} has schema {content.get('schema')}; this cssbench reads schema {SCHEMA}.")
        try:
            entries = [Entry(**one | {"iterations": tuple(map(int, one["iterations"]))}) for one in content["runs"]]
            for entry in entries:
                safe_name(entry.id)
            words = (content["name"], content["description"], content["workdir"], content["shared"], content["data"])
        except (KeyError, TypeError, ValueError, RunError) as error:
            raise RunError(f"{path / 'suite.json'} is damaged ({error!r}). {_REMEDY}") from None
        return cls(path, *words, entries)

    def write(self, recipes: dict[str, str]) -> None:
        """Write the recipes (id -> TOML), then suite.json.

        Raises RunError when a run that has begun would get another recipe; then nothing is written.
        """
        for name, text in recipes.items():
            place, begun = self.recipe(name), (self.run(name) / "config.toml").exists()
            if begun and place.exists() and place.read_text(encoding="utf-8") != text:
                raise RunError(
                    f"{self.run(name)} was begun with another recipe: the suite now says something else of {name!r} "
                    f"(compare {place}). Choose another --out, undo the change, or remove that run's folder."
                )
        for name, text in recipes.items():
            write_bytes(self.recipe(name), text.encode())
        content = {name: getattr(self, name) for name in ("name", "description", "workdir", "shared", "data")}
        write_json(self.path / "suite.json", {"schema": SCHEMA, **content, "runs": [asdict(e) for e in self.entries]})

    def recipe(self, name: str) -> Path:
        return self.path / "recipes" / f"{safe_name(name)}.toml"

    def run(self, name: str) -> Path:
        return self.path / "runs" / safe_name(name)

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{safe_name(name)}.log"

    def attempt(self, name: str) -> Path:
        return self.path / "state" / f"{safe_name(name)}.json"

    def lock(self, name: str, shared: bool = False) -> FileLock:
        return FileLock(self.path / "state" / f"{safe_name(name)}.lock", shared)

    def running(self, name: str) -> bool:
        """Whether a process of the run lives."""
        if not (self.path / "state" / f"{safe_name(name)}.lock").exists():
            return False
        lock = self.lock(name, shared=True)
        try:
            return not lock.acquire()
        finally:
            lock.release()

    def steps_done(self, name: str) -> int:
        """Finished steps of a run."""
        steps, count = self.run(name) / "steps", 0
        while (steps / f"{count:02d}" / "record.json").exists():
            count += 1
        return count

    def finished(self, entry: Entry) -> bool:
        return self.steps_done(entry.id) >= len(entry.iterations)

    def state(self, entry: Entry) -> State:
        """How far the run is, from what its processes left on disk."""
        done, steps = self.steps_done(entry.id), len(entry.iterations)
        last = read_attempt(self.attempt(entry.id))
        reached = _logged(self.run(entry.id) / "logs" / f"train-{done:02d}.csv") if done < steps else 0
        found = State(
            "waiting",
            min(done, steps - 1),
            steps,
            reached,
            entry.iterations[min(done, steps - 1)],
            sum(entry.iterations[:done]) + reached,
            int(last.get("attempt", 0)),
        )
        if done >= steps:
            return replace(found, kind="finished")
        if self.running(entry.id):
            return replace(found, kind="running")
        if not last:
            return replace(found, kind="stopped" if done or reached else "waiting")
        code = last.get("code")
        if code is None or code in STOPPED or last.get("stopped"):
            return replace(found, kind="stopped")
        return replace(found, kind="failed", error=self.last_line(entry.id, code))

    def last_line(self, name: str, code: int) -> str:
        """What a failed attempt said last."""
        if code < 0:
            return f"killed by {_signal_name(-code)}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
        lines = [line for line in _tail(self.log(name)).splitlines() if line.strip()]
        said = "" if not lines or lines[-1].startswith("===") else _printable(lines[-1])
        return said or f"exit code {code}"


_REMEDY = "`cssbench suite run FILE --out DIR` writes it anew; finished runs are kept."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def read_attempt(path: Path) -> dict[str, Any]:
    """The last attempt; nothing where there is none, or its file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _logged(path: Path) -> int:
    """The last iteration that a step logged; 0 where it logged none."""
    for line in reversed(_tail(path).splitlines()):
        cells = line.split(",")
        if len(cells) == 4 and cells[1].isdecimal():
            return int(cells[1])
    return 0


def left_out(suite: SuiteFolder) -> list[str]:
    """Runs that the folder holds and the suite does not name, as after it was cut down."""
    folders = (path.name for path in (suite.path / "runs").glob("*") if path.is_dir())
    return sorted(set(folders) - {entry.id for entry in suite.entries})


@contextmanager
def launching(suite: SuiteFolder) -> Iterator[None]:
    """Held while runs of the suite are started. Raises RunError when another process starts them."""
    lock = FileLock(suite.path / "launch.lock")
    try:
        if not lock.acquire():
            raise RunError(
                f"Another process is starting the runs of {suite.path} ({lock.holder}). `cssbench suite status "
                f"{suite.path}` shows how far they are; stop that process first to start them from here."
            )
        lock.sign()
        yield
    finally:
        lock.release()


def missing(suite: SuiteFolder) -> dict[str, str]:
    """Runs that cannot be reported -> why: how far they are, or what is wrong with them."""
    found = {}
    for entry in suite.entries:
        state = suite.state(entry)
        words = f"{state.kind} at step {state.step} of {state.steps - 1}, iteration {state.iteration}"
        if state.kind != "finished":
            found[entry.id] = f"{words}: {state.error}" if state.error else words
            continue
        try:
            RunFolder.read(suite.run(entry.id)).records()
        except CssbenchError as error:
            found[entry.id] = f"damaged: {error}"
    return found
