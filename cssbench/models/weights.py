"""Weights of encoders from local files: read without running anything, and only into the model they are of."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import load_state_dict
from torch import Tensor, nn

from cssbench.errors import ModelError

# What training code wraps a state dict in, and what it puts before every name; the outer ones first.
WRAPPINGS = ("state_dict", "model_state_dict", "model", "module", "teacher", "student", "network", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
SHOWN = 5  # names of each kind in a report


def read_weights(path: str, adapt: Callable[[Any], dict[str, Any]] = dict) -> dict[str, Any]:
    """The tensors in a file, in timm's names, after `unwrap` and `adapt`. Nothing pickled is ever run.

    Raises ModelError.
    """
    try:
        return adapt(unwrap(load_state_dict(path, weights_only=True)))
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


def unwrap(content: Any) -> dict[str, Any]:
    """The state dict in what a training script saved: out of {"state_dict": ...}, {"model": ...} and the like, nested
    or not, and without `module.` (DataParallel), `_orig_mod.` (torch.compile), and `model.`, `backbone.`, `encoder.`.

    Of a larger model, where only some names begin with `backbone.` or `encoder.`, those are taken; every other prefix
    goes only where all names have it. Raises ValueError when there are no tensors.
    """
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[name] for name in WRAPPINGS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("it holds no tensors by name")
    found = {str(name): value for name, value in content.items()}
    while prefix := next((p for p in PREFIXES if _wraps(p, found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    return found


def _wraps(prefix: str, names: Mapping[str, Any]) -> bool:
    having = [name.startswith(prefix) for name in names]
    return all(having) or (prefix in ("backbone.", "encoder.") and any(having))


def fill(module: nn.Module, weights: dict[str, Any], spare: set[str], path: str) -> None:
    """Load all of `weights` but `spare`. Raises ModelError, with a report, when they are not exactly what `module` has.

    Only a BatchNorm's count of batches may be missing, as in files that are older than it.
    """
    own = {n: t for n, t in module.state_dict().items() if n in weights or not n.endswith(".num_batches_tracked")}
    report = "; ".join(_differences(own, {n: t for n, t in weights.items() if n not in spare}))
    if report:
        raise ModelError(
            f"model.backbone.checkpoint {path!r} is not of this model: {report}. Name the model (and sizes) that it "
            f"was saved from."
        )
    module.load_state_dict({name: weights[name] for name in own})


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[str]:
    """What is missing, unexpected and of another shape in a file; empty: nothing."""
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [
        f"{name!r} {_shape(given[name])} for {_shape(own[name])}"
        for name in sorted(own.keys() & given.keys())
        if _shape(given[name]) != _shape(own[name])
    ]
    found = {"missing": list(map(repr, missing)), "unexpected": list(map(repr, unexpected)), "of another shape": shapes}
    return [f"{len(names)} {what} ({_first(names)})" for what, names in found.items() if names]


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "scalar" if isinstance(value, Tensor) else type(value).__name__


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
