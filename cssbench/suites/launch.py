"""Starting the runs of a suite: one after another here, side by side through submitit, or as SLURM job arrays.

There is no scheduler in here beyond an order (`plan.in_order`) and one rule: while a run trains a base step, those that
share it are not started.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cssbench.errors import ConfigError, RunError
from cssbench.progress import say
from cssbench.suites.attempt import ALL, Attempt
from cssbench.suites.folder import Entry, SuiteFolder, read_attempt
from cssbench.suites.plan import in_order, makers

POLL = 1.0  # seconds between two looks at the runs
FOREVER = 60 * 24 * 365  # minutes: submitit wants a time limit
ARRAY = 256  # jobs of an array side by side, unless said
TIMEOUTS = 1000  # how often a run may reach its time limit and go on


@dataclass(frozen=True)
class Options:
    """How to start runs. jobs: side by side; None: one, on SLURM 256. minutes: time limit of a job; None: none.

    gpus: per run; None: as many as its `train.devices`. setup: lines of shell before a SLURM job.
    """

    executor: str = "here"
    jobs: int | None = None
    gpus: int | None = None
    minutes: int | None = None
    partition: str | None = None
    cpus: int | None = None
    mem_gb: float | None = None
    setup: tuple[str, ...] = ()
    slurm: tuple[tuple[str, str], ...] = ()
    notice_s: int = 120


def unfinished(suite: SuiteFolder) -> list[Entry]:
    """Runs that are not finished, in the order to start them in."""
    return [entry for entry in in_order(suite.entries) if not suite.finished(entry)]


def launch(suite: SuiteFolder, options: Options) -> None:
    """Run or resume every unfinished run. Returns when all have ended; on SLURM, when all are submitted."""
    if options.executor == "slurm":
        submit(suite, options)
        return
    start = _local(suite, options) if options.executor == "local" else None
    _Lanes(suite, start, options.jobs or 1).go()


class _Lanes:
    """Starts runs so that `jobs` are running at a time, those that other processes started counted in."""

    def __init__(self, suite: SuiteFolder, start: Callable[[Entry, int], Any] | None, jobs: int):
        self.suite, self.start, self.jobs = suite, start, jobs
        self.waiting = unfinished(suite)
        self.total = len(suite.entries)
        self.active: dict[str, tuple[Entry, int, Any]] = {}

    def go(self) -> None:
        try:
            while self.waiting or self.active:
                self._collect()
                if not self._start_next():
                    time.sleep(POLL if self.waiting or self.active else 0)
        except BaseException:
            self._settle()
            raise

    def _collect(self) -> None:
        """Take note of the runs that have ended."""
        for entry, _, job in list(self.active.values()):
            if job.done() and not self.suite.running(entry.id):
                del self.active[entry.id]
                tell(self.suite, entry)
        self.waiting = [entry for entry in self.waiting if not self.suite.finished(entry)]

    def _start_next(self) -> bool:
        """Start the first run that may start, if there is a place for it."""
        others = [entry for entry in self.waiting if self.suite.running(entry.id)]
        busy = [*(entry for entry, _, _ in self.active.values()), *others]
        if len(busy) >= self.jobs:
            return False
        entry = next((e for e in self.waiting if e not in others and _ready(self.suite, e, busy)), None)
        if entry is None:
            return False
        self.waiting.remove(entry)
        done = sum(map(self.suite.finished, self.suite.entries))
        say(f"{entry.id}: started ({done} of {self.total} runs finished)")
        if self.start is None:
            Attempt(self.suite.path, entry.id)()
            tell(self.suite, entry)
        else:
            lanes = {lane for _, lane, _ in self.active.values()}
            lane = next(n for n in range(self.jobs) if n not in lanes)
            self.active[entry.id] = (entry, lane, self.start(entry, lane))
        return True

    def _settle(self) -> None:
        """Have the runs write their checkpoints and end.

        Each is told once, by itself: a second signal would end it without one, and submitit's own way is SIGINT, which
        processes started in the background of a shell ignore.
        """
        told: set[str] = set()
        if self.active:
            say("Stopping: the runs write their checkpoints.")
        while any(self.suite.running(name) or not job.done() for name, (_, _, job) in self.active.items()):
            for name in self.active.keys() - told:
                last = read_attempt(self.suite.attempt(name))
                if self.suite.running(name) and "pid" in last and "code" not in last:
                    told.add(name)
                    with suppress(ProcessLookupError):
                        os.kill(last["pid"], signal.SIGTERM)
            time.sleep(POLL)


def _ready(suite: SuiteFolder, entry: Entry, busy: Sequence[Entry]) -> bool:
    """Whether a run would not only wait for another one that trains its base step."""
    same = [other for other in suite.entries if other.base == entry.base]
    there = any(suite.steps_done(other.id) for other in same)
    return there or not any(other.base == entry.base for other in busy)


def tell(suite: SuiteFolder, entry: Entry) -> None:
    """One line on how a run ended."""
    state = suite.state(entry)
    error = f": {state.error}" if state.error else ""
    say(f"{entry.id}: {state.kind} ({state.step + (state.kind == 'finished')} of {state.steps} steps){error}")


def _local(suite: SuiteFolder, options: Options) -> Callable[[Entry, int], Any]:
    submitit = _submitit()
    executor = submitit.LocalExecutor(folder=suite.path / "submitit" / "%j", max_num_timeout=TIMEOUTS)
    minutes = FOREVER if options.minutes is None else options.minutes
    executor.update_parameters(timeout_min=minutes, signal_delay_s=options.notice_s)
    there = visible_gpus()

    def start(entry: Entry, lane: int) -> Any:
        wanted = entry.devices if options.gpus is None else options.gpus
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", ALL)  # submitit would hide every GPU
        if there:
            devices = ",".join(there[(lane * wanted + k) % len(there)] for k in range(wanted))
        return executor.submit(Attempt(suite.path, entry.id, devices))

    return start


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in said.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(n) for n, line in enumerate(line for line in found.stdout.splitlines() if line.startswith("GPU "))]


def submit(suite: SuiteFolder, options: Options) -> None:
    """Submit the unfinished runs to SLURM: an array of those that train a base step, and for each of them an array of
    the runs that share it, which starts when it has ended."""
    submitit = _submitit()
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm needs SLURM's srun and sbatch on the PATH. Use --executor local elsewhere.")
    if options.minutes is None:
        raise ConfigError("--executor slurm needs --minutes, the time limit of a job; a run goes on in the next one.")
    waiting = [entry for entry in unfinished(suite) if not suite.running(entry.id)]
    if not waiting:
        say("Nothing to submit: every run is finished or running.")
        return
    leaders, sharers = _groups(suite, waiting)
    for devices in sorted({entry.devices for entry in waiting}):
        first = [entry for entry in leaders if entry.devices == devices]
        jobs = _array(submitit, suite, first, options, None)
        for entry, job in zip(first, jobs, strict=True):
            _array(submitit, suite, sharers.get(entry.id, []), options, job.job_id)
    say(
        f"{len(waiting)} jobs submitted. `cssbench suite status {suite.path}` shows how far they are; "
        f"`squeue` and `scancel` are SLURM's."
    )


def _groups(suite: SuiteFolder, waiting: Sequence[Entry]) -> tuple[list[Entry], dict[str, list[Entry]]]:
    """Runs that may start at once, and those that wait for one of them."""
    chosen = makers(waiting)
    leaders, sharers = [], {}  # type: ignore[var-annotated]
    for entry in waiting:
        maker = chosen[entry.id]
        there = any(suite.steps_done(other.id) for other in suite.entries if other.base == entry.base)
        if there or maker == entry.id:
            leaders.append(entry)
        else:
            sharers.setdefault(maker, []).append(entry)
    return leaders, sharers


def _array(
    submitit: Any, suite: SuiteFolder, entries: Sequence[Entry], options: Options, after: str | None
) -> list[Any]:
    """Submit runs as one job array (a plain job where it is one run)."""
    if not entries:
        return []
    executor = submitit.SlurmExecutor(folder=suite.path / "submitit" / "%j", max_num_timeout=TIMEOUTS)
    executor.update_parameters(**slurm_parameters(entries[0], options, after))
    try:
        with executor.batch():  # an array; `map_array` would hide `Attempt.checkpoint`
            jobs = [executor.submit(Attempt(suite.path, entry.id)) for entry in entries]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        said = " ".join(str(error).split())
        raise RunError(
            f"sbatch refused {len(entries)} runs, the first being {entries[0].id!r}: {said} Change the options, then "
            f"`cssbench suite resume {suite.path}`; jobs that were submitted before stay."
        ) from None
    when = f", after {after}" if after else ""
    say(f"SLURM {jobs[0].job_id.split('_')[0]}{when}: {', '.join(entry.id for entry in entries)}")
    return list(jobs)


def slurm_parameters(entry: Entry, options: Options, after: str | None) -> dict[str, Any]:
    """Parameters of submitit's SLURM executor, which become the lines of the sbatch file."""
    given: dict[str, Any] = {
        "job_name": "cssbench",
        "time": options.minutes,
        "nodes": 1,
        "ntasks_per_node": 1,
        "gpus_per_node": entry.devices if options.gpus is None else options.gpus,
        "cpus_per_task": options.cpus,
        "mem": None if options.mem_gb is None else f"{options.mem_gb:g}GB",
        "partition": options.partition,
        "signal_delay_s": options.notice_s,
        "array_parallelism": options.jobs or ARRAY,
        "setup": list(options.setup) or None,
        "dependency": f"afterany:{after}" if after else None,
        "additional_parameters": {"requeue": True} | dict(options.slurm),
    }
    return {name: value for name, value in given.items() if value is not None}


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            f"--executor local and slurm need submitit: {Path(sys.executable).name} -m pip install "
            f"'cssbench[cluster]'. Without it, --executor here runs one after another."
        ) from None
    return submitit
