"""Avalanche (avalanche-lib): its benchmarks, strategies, plug-ins and metrics with our scenarios, models and methods.

    from cssbench.interop.avalanche import to_avalanche, CSSStrategy, MeanIoU

Importing this package imports Avalanche, which takes seconds. Raises ConfigError where it is not installed.
"""

import warnings

from cssbench.interop.extras import require

require("avalanche", extra="avalanche", what="cssbench.interop.avalanche")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that Avalanche imports and we have no say in
    from cssbench.interop.avalanche.benchmark import StepExperience, to_avalanche
    from cssbench.interop.avalanche.metrics import MeanIoU, RunLogger
    from cssbench.interop.avalanche.model import GrowingModel, LogitsModel, OwnLoss
    from cssbench.interop.avalanche.strategy import CSSStrategy

__all__ = [
    "CSSStrategy",
    "GrowingModel",
    "LogitsModel",
    "MeanIoU",
    "OwnLoss",
    "RunLogger",
    "StepExperience",
    "to_avalanche",
]
