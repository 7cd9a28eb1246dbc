"""cssbench: the benchmark suite for continual semantic segmentation."""

__version__ = "0.1.0"
