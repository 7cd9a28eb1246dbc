"""The processes of one run, before torch is loaded: who this one is, starting the others, and ending together.

Processes are torchrun's, which tells each its place in the environment; `cssbench` starts them itself, through the
library that is behind torchrun, where `train.devices` asks for several and nobody started any.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence


def world() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this one is; 0 is the one that writes and speaks."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_world() -> int:
    """Number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def start(devices: int, words: Sequence[str]) -> None:
    """Where `devices` asks for several processes and this is the only one: run `cssbench WORDS` on so many, and exit as
    they did. Else return. Exit code: that of the process that failed first, 128 + n where signal n ended it."""
    if devices == 1 or "RANK" in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # here one only waits; the processes themselves say what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=f"cssbench-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "cssbench", *words)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)
    except SignalException as signal:
        sys.exit(128 + int(signal.sigval))
    sys.exit(0)


def first_to_fail() -> bool:
    """Whether no other process of this run has failed before: then this one tells why. Others end without a word."""
    if world() == 1:
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore

    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"cssbench/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except Exception:  # torchrun has gone: rather twice than never
        return True


def leave(code: int) -> None:
    """End with an exit code. One of several ends at once: waiting for the others, as torch does at exit, may hang."""
    if world() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
