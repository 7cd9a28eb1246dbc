"""One attempt at a run of a suite: a `cssbench run` or `cssbench resume` of its own, so that a crash stays its own.

What the process prints is appended to logs/<id>.log. The lock of the run is handed to the process, so that the run
counts as running for as long as either lives.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cssbench.lock import FileLock
from cssbench.results import write_json
from cssbench.suites.folder import STOPPED, Entry, SuiteFolder, read_attempt

ALL = "all"
POLL = 0.2  # seconds between two looks at the process
GRACE = 600  # seconds in which SLURM takes the machine of a job whose processes it has sent SIGTERM
TRIES = 10  # at the lock: somebody who asks for the status holds it for a moment


class Attempt:
    """Call it to run or resume run `name` of the suite at `path`; returns the exit code, None where it was not needed.

    devices: what CUDA_VISIBLE_DEVICES shall be; ALL: not set; None: as it is where the attempt is made. It is pickled
    by submitit, which calls `checkpoint` before the run loses its machine.
    """

    def __init__(self, path: Path, name: str, devices: str | None = None):
        self.path, self.name, self.devices = path, name, devices
        self.process: subprocess.Popen[bytes] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.name, self.devices)

    def __call__(self) -> int | None:
        if (
            os.environ.get("SUBMITIT_EXECUTOR") == "local"
        ):  # Ctrl-C reaches all processes; `launch` tells the run itself
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        suite = SuiteFolder.read(self.path)
        entry = next(one for one in suite.entries if one.id == self.name)
        lock = suite.lock(self.name)
        if not _take(lock) or suite.finished(entry):  # somebody else's run, or done since
            lock.release()
            return None
        try:
            code = self._run(suite, entry, lock)
        finally:
            lock.release()
        if code in STOPPED and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            time.sleep(GRACE)  # pre-empted: a job that ended by itself would not be requeued
        return code

    def _run(self, suite: SuiteFolder, entry: Entry, lock: FileLock) -> int:
        words = self.command(suite, entry)
        number = int(read_attempt(suite.attempt(self.name)).get("attempt", 0)) + 1
        about: dict[str, Any] = {"attempt": number, "host": socket.gethostname(), "started": _now(), "command": words}
        suite.log(self.name).parent.mkdir(parents=True, exist_ok=True)
        with suite.log(self.name).open("ab") as log:
            log.write(f"=== attempt {number}, {about['started']}: {' '.join(words)}\n".encode())
            log.flush()
            assert lock.file
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=suite.workdir if Path(suite.workdir).is_dir() else None,
                env=self._environment(),
                pass_fds=[lock.file.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal reaches this process alone, which passes it on once
                preexec_fn=_ignore_notice,
            )
        write_json(suite.attempt(self.name), about | {"pid": self.process.pid})
        stopped = True
        try:
            while (code := self.process.poll()) is None:
                time.sleep(POLL)
            stopped = False
        finally:
            if stopped:
                self.stop()
            about |= {"pid": self.process.pid, "ended": _now(), "code": self.process.wait(), "stopped": stopped}
            write_json(suite.attempt(self.name), about)
        return code

    def command(self, suite: SuiteFolder, entry: Entry) -> list[str]:
        """The command line that begins the run, or goes on with it."""
        out = suite.run(entry.id)
        python = [sys.executable, "-m"]
        if entry.devices > 1:
            python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={entry.devices}", "-m"]
        data = ["--data", suite.data] if suite.data else []
        if (out / "config.toml").exists():
            words = ["resume", str(out)]
        else:
            words = ["run", str(suite.recipe(entry.id)), "--out", str(out)]
        shared = suite.path / suite.shared  # an absolute one stays as it is
        return [*python, "cssbench", *words, *data, "--shared", str(shared)]

    def stop(self) -> None:
        """Have the process write its checkpoint and end; returns when it has."""
        if self.process is None or self.process.returncode is not None:
            return
        try:
            os.kill(self.process.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # also inside a signal's handler
        except (ProcessLookupError, ChildProcessError):
            pass

    def checkpoint(self) -> Any:
        """Called by submitit when the machine is about to be taken: what to call when there is one again."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(type(self)(self.path, self.name, self.devices))

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SUBMITIT_")}
        environment.pop("CSSBENCH_SHARED", None)
        environment["PYTHONSAFEPATH"] = "1"  # the code that started this, not a checkout that lies in its folder
        if self.devices == ALL:
            environment.pop("CUDA_VISIBLE_DEVICES", None)
        elif self.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        return environment


def _take(lock: FileLock) -> bool:
    for _ in range(TRIES):
        if lock.acquire():
            return True
        time.sleep(POLL)
    return False


def _ignore_notice() -> None:
    """SLURM sends its notice to every process of a job; only `Attempt` acts on it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
