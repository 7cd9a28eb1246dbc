"""One function over many files, on threads, with a progress bar when somebody is looking.

Threads, not processes: decoding, encoding and NumPy's loops over large images release the interpreter lock, and no
script needs an `if __name__ == "__main__"` for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cssbench.progress import track

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[T], R], items: Sequence[T], what: str, *, workers: int | None = None, progress: bool = True
) -> list[R]:
    """[function(item) for item in items], in that order, on `workers` threads (default: one per core).

    what: text of the progress bar, which shows only while stderr is a terminal. The first exception is raised.
    """
    workers = min(workers or cores(), max(1, len(items)))
    if workers == 1:
        return _watch(map(function, items), what, len(items), progress)
    with ThreadPoolExecutor(workers) as executor:
        try:
            return _watch(executor.map(function, items), what, len(items), progress)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _watch(results: Iterable[R], what: str, total: int, progress: bool) -> list[R]:
    if not progress:
        return list(results)
    collected = []
    with track(what, total) as tick:
        for result in results:
            collected.append(result)
            tick()
    return collected
