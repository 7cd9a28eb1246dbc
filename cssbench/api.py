"""The one import of a plug-in author: `from cssbench.api import Method, ...`."""

from cssbench.config import Section
from cssbench.data.base import SegDataset
from cssbench.errors import ConfigError, CssbenchError, DataError, ModelError, PluginError
from cssbench.logs import LoggedRun, Logger
from cssbench.method import Batch, Method, StepContext
from cssbench.models.segmenter import Encoded, Segmenter, SegOutput
from cssbench.protocol import Protocol
from cssbench.scenario import IGNORE, Scenario, Step

__all__ = [
    "IGNORE",
    "Batch",
    "ConfigError",
    "CssbenchError",
    "DataError",
    "Encoded",
    "LoggedRun",
    "Logger",
    "Method",
    "ModelError",
    "PluginError",
    "Protocol",
    "Scenario",
    "Section",
    "SegDataset",
    "SegOutput",
    "Segmenter",
    "Step",
    "StepContext",
]
