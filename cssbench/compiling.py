"""`train.compile`: torch.compile for the parts of a model that do not depend on the number of classes, while it trains.

Compiled in place (names of weights stay) for the duration of a step's training; evaluation, with its many image sizes,
runs eager. Blocks of a kind share their compiled code, also from step to step, so that growth never compiles anew;
the first step that trains with a frozen encoder compiles once more, for code without gradients. Random numbers are
drawn as without compilation, so that results differ by rounding alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cssbench.models.segmenter import Segmenter
from cssbench.progress import say


class Backend:
    """A compiler by its name among torch's. Where it fails, once for all and with one message, graphs run as traced:
    the same operations as without compilation, one by one."""

    def __init__(self, name: str):
        self.name, self.failed = name, False

    def __call__(self, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        if not self.failed:
            try:
                return torch._dynamo.lookup_backend(self.name)(graph, inputs)
            except Exception as error:  # no compiler on the machine, an unknown operation, a full disk, ...
                self.failed = True
                reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
                say(f"train.compile: cannot compile here, so training goes on without, as fast as before ({reason})")
        return graph.forward


BACKEND = Backend("inductor")


@contextmanager
def compiled(models: list[Segmenter | None], enabled: bool = True) -> Iterator[None]:
    """Inside, `compiled_parts()` of each model run as compiled code; afterwards they are as they were."""
    parts: list[nn.Module] = [part for model in models if model is not None for part in model.compiled_parts()]
    if not enabled or not parts:
        yield
        return
    import torch._dynamo
    import torch._inductor.config

    # one entry per block (each has its own drop path rate), each for training and evaluation mode
    limits: dict[str, Any] = {
        "recompile_limit": 8 + 4 * len(parts),
        "accumulated_recompile_limit": 256 + 4 * len(parts),
    }
    limits |= {"suppress_errors": True}  # what cannot be traced runs eager; torch says so
    with (
        torch._dynamo.config.patch(**limits),
        torch._inductor.config.patch(fallback_random=True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # by tracing
        try:
            for part in parts:
                part.compile(backend=BACKEND, dynamic=False)
            yield
        finally:
            for part in parts:
                part._compiled_call_impl = None
