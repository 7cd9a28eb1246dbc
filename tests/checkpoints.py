"""What checkpoints hold in tests: a small network, the state of a method; and what files a folder holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

torch.set_num_threads(1)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Net(nn.Module):
    def __init__(self, width: int = 3, heads: int = 2):
        super().__init__()
        torch.manual_seed(width)
        self.first = nn.Conv2d(3, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(heads))


STATE = {
    "prototypes": torch.arange(6.0).view(2, 3),
    "counts": [1, 2, 3],
    "nested": {"a": {"b": torch.tensor([True, False])}, 3: "x"},
    "number": 0.1,
    "flag": True,
    "nothing": None,
    "pair": (1, "y"),
    "noise": torch.arange(6.0, dtype=torch.bfloat16).view(2, 3).T,
    "odd": [float("nan")],
}
