"""cssbench: the benchmark suite for continual semantic segmentation.

`cssbench.load_runs` reads results into pandas; what plug-ins are written against is `cssbench.api`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

__version__ = "0.1.0"


def load_runs(runs: str | PathLike[str] | Iterable[str | PathLike[str]], protocols: Sequence[str] | None = None) -> Any:
    """Scores of run folders as a `pandas.DataFrame`: one row per run, finished step, protocol and group of classes.

    runs: a run folder, a folder with run folders anywhere below it, or several of either. protocols: names of
    `cssbench list protocols`; default: `mmseg150@1` and `plop@1`, where the run kept what they read.

    Columns: `run` (path), `method`, `model`, `dataset`, `scenario`, `mode`, `seed`, `oracle` (learned all classes at
    once), `finished`, `protocol`, `step`, `group` (`all`, `base`, `incremental`, or `group0`, `group1`, ...: the
    classes of that step), `classes` (their number, without background), `miou` in [0, 1] (NaN where no class of the
    group has a score), `images`, `iterations`, `train_seconds` of the step (NaN where a record does not tell).

    Raises RunError when a path holds no run, is damaged, or cannot be scored under a protocol that was asked for;
    UnknownNameError for a protocol that nobody has.
    """
    from cssbench import registry  # importing the package loads nothing

    return registry.load("tools", "load-runs")(runs, protocols)
