"""Weights of encoders from local files: read without running anything, and only into the model they are of."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

from timm.models import load_state_dict
from torch import nn

from cssbench.errors import ModelError


def read_weights(path: str, adapt: Callable[[Any], dict[str, Any]] = dict) -> dict[str, Any]:
    """The tensors in a file, in timm's names, after `adapt`. Nothing pickled is ever run. Raises ModelError."""
    try:
        return adapt(load_state_dict(path, weights_only=True))
    except Exception as error:  # whatever a foreign file makes its readers raise
        if isinstance(error, pickle.UnpicklingError) or isinstance(error.__context__, pickle.UnpicklingError):
            reason = "it is damaged, or holds something else than tensors; nothing in it was run"
        else:
            first, *_ = re.split(r"\. |\n", str(error))
            reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    raise ModelError(
        f"model.backbone.checkpoint {path!r} cannot be loaded ({reason}). Give a safetensors file, or a .pth that "
        f"holds tensors only, of the same model in timm's names."
    )


def fill(module: nn.Module, weights: dict[str, Any], spare: set[str], path: str) -> None:
    """Load all of `weights` but `spare`. Raises ModelError when they are not exactly what `module` has.

    Only a BatchNorm's count of batches may be missing, as in files that are older than it.
    """
    own = {n: t for n, t in module.state_dict().items() if n in weights or not n.endswith(".num_batches_tracked")}
    wrong = sorted(own.keys() ^ (weights.keys() - spare))
    wrong = wrong or sorted(name for name in own if own[name].shape != getattr(weights[name], "shape", None))
    if wrong:
        raise ModelError(
            f"model.backbone.checkpoint {path!r} is not of this model: {len(wrong)} tensors are missing, unexpected or "
            f"of another shape, the first being {wrong[0]!r}. Name the model (and sizes) that it was saved from."
        )
    module.load_state_dict({name: weights[name] for name in own})
