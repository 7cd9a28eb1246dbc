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
from torch import Tensor, nn

from cssbench.errors import RunError
from cssbench.results import write_bytes


def save_weights(path: Path, model: nn.Module) -> None:
    """All parameters and buffers. Raises RunError when the file cannot be written."""
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
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


def encode_tensors(tensors: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """Tensors on the CPU, and words about them, as the content of a safetensors file."""
    return safetensors.torch.save(tensors, metadata=about)


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors of a file, mapped into memory, and what is said about them; None where it cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None


def save_state(path: Path, state: dict[str, Any]) -> None:
    """A method's state. Raises RunError as `encode_state`, or when the file cannot be written."""
    write_bytes(path, encode_state(state))


def encode_state(state: dict[str, Any]) -> bytes:
    """A method's state as a file: tensors, numbers, strings, and lists and dicts of them.

    Raises RunError when it holds anything else (it could not be read back safely).
    """
    content = _as_data(state)
    if content is None:
        raise RunError(
            f"The state of the method may hold tensors, numbers, strings, lists and dicts, but {_culprit(state)}. "
            f"Return only those from state_dict()."
        )
    return content


def no_data(state: Any) -> str | None:
    """Which part of a method's state cannot be saved as data, in words; None where all of it can."""
    return None if _as_data(state) else _culprit(state)


def _as_data(value: Any) -> bytes | None:
    """`value` as torch saves it; None where that could not be read back as data."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):
        return None
    return buffer.getvalue()


def _culprit(value: Any, where: str = "state") -> str:
    """Which part of `value` is no data, in words."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        if _as_data(part) is None:
            return _culprit(part, f"{where}[{key!r}]")
    return f"{where} is of type {type(value).__name__}"


def load_state(path: Path) -> dict[str, Any]:
    """Raises RunError when the file is missing or damaged, or holds anything else than a dict of data."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:  # torch's own message tells how to run what the file holds
        raise RunError(
            f"The method state {path} is damaged, or holds something else than tensors, numbers, strings, lists and "
            f"dicts; nothing in it was run. Remove its step to train it again."
        ) from None
    except Exception as error:  # damaged bytes raise UnicodeDecodeError, KeyError, IndexError and more
        raise RunError(
            f"The method state {path} cannot be read ({error}). Remove its step to train it again."
        ) from None
    if not isinstance(state, dict):
        raise RunError(f"The method state {path} holds a {type(state).__name__}, not a dict. Remove its step.")
    return state
