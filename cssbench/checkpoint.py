"""Checkpoints are data: safetensors for weights, tensors-only files for the rest. Nothing pickled is ever run.

Every file is written beside its place and renamed onto it, so that a crash or a full disk leaves the old one whole.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from cssbench.errors import RunError
from cssbench.results import write_bytes


def save_weights(path: Path, model: nn.Module) -> None:
    """All parameters and buffers. Raises RunError when the file cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(path, safetensors.torch.save(tensors))


def load_weights(path: Path, model: nn.Module) -> None:
    """Into a model of exactly that structure. Raises RunError naming a tensor that is missing, extra or misshapen."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"The checkpoint {path} cannot be read ({error}). Remove its step to train it again.") from None
    own = model.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or sorted(k for k in own if own[k].shape != tensors[k].shape)
    if wrong:
        raise RunError(
            f"The checkpoint {path} does not fit the model of this configuration: {len(wrong)} tensors are missing, "
            f"unexpected or of another shape, the first being {wrong[0]!r}."
        )
    model.load_state_dict(tensors)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """A method's state: tensors, numbers, strings, and lists and dicts of them.

    Raises RunError when it holds anything else (it could not be read back safely).
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"The state of the method holds something else than tensors, numbers, strings, lists and dicts: "
            f"{str(error).splitlines()[0]} Return only those from state_dict()."
        ) from None
    write_bytes(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Raises RunError when the file is missing or damaged."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise RunError(
            f"The method state {path} cannot be read ({error}). Remove its step to train it again."
        ) from None
