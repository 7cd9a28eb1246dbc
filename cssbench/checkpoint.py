"""Checkpoints are data: safetensors for tensors, JSON for the rest. Nothing is pickled, and nothing in them is run.

Every file is written beside its place and renamed onto it, so that a crash or a full disk leaves the old one whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cssbench.errors import RunError
from cssbench.results import write_bytes

STRUCTURE = "cssbench.state"
PLAIN = (type(None), bool, int, float, str)
DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)


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
        reason = str(error).removeprefix("Error while ")  # safetensors' own beginning
        raise RunError(f"The checkpoint {path} cannot be read ({reason}). Remove its step to train it again.") from None
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
    """Raises RunError as `encode_state`, or when the file cannot be written."""
    write_bytes(path, encode_state(state))


def encode_state(state: dict[str, Any]) -> bytes:
    """Tensors, numbers, strings, None, and lists, tuples and dicts of them, as a safetensors file: tensors by number,
    what holds them as JSON in the header (see `_pack`).

    Raises RunError when it holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    try:
        structure = _pack(state, "state", tensors)
    except _NotDataError as error:
        raise RunError(
            f"The state of the method may hold tensors, numbers, strings, lists and dicts, but {error}. "
            f"Return only those from state_dict()."
        ) from None
    return safetensors.torch.save(tensors, metadata={STRUCTURE: json.dumps(structure)})


def no_data(state: Any) -> str | None:
    """Which part of a method's state cannot be saved as data, in words; None where all of it can."""
    try:
        _pack(state, "state", {})
    except _NotDataError as error:
        return str(error)
    return None


def load_state(path: Path) -> dict[str, Any]:
    """Raises RunError when the file is missing or damaged, or holds anything else than a dict of data."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"The state {path} cannot be read ({error}). Remove its step to train it again.") from None
    return decode_state(content, str(path))


def decode_state(content: bytes, source: str) -> dict[str, Any]:
    """What `encode_state` was given. Raises RunError, naming `source`, where that cannot be told."""
    try:
        size = int.from_bytes(content[:8], "little")
        structure = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][STRUCTURE])
        state = _unpack(structure, safetensors.torch.load(content))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        reason = error if isinstance(error, safetensors.SafetensorError) else "not a state as cssbench writes it"
        raise RunError(
            f"The state {source} cannot be read ({reason}); nothing in it was run. Remove its step to train it again."
        ) from None
    if not isinstance(state, dict):
        raise RunError(f"The state {source} holds a {type(state).__name__}, not a dict. Remove its step.")
    return state


class _NotDataError(Exception):
    """A value that cannot be saved as data; the message says where and what."""


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors`: numbers, strings and None as they are, a list as a list, others
    as {"tensor": name}, {"tuple": [...]} and {"dict": [[key, value], ...]}, since keys need not be strings."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in DTYPES:
        name = str(len(tensors))
        # Cloned, because safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        if odd := [key for key in value if type(key) not in PLAIN]:
            raise _NotDataError(f"a key of {where} is of type {type(odd[0]).__name__}")
        return {"dict": [[key, _pack(item, f"{where}[{key!r}]", tensors)] for key, item in value.items()]}
    kind = f" {value.dtype}" if isinstance(value, Tensor) else ""
    raise _NotDataError(f"{where} is of type {type(value).__name__}{kind}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    raise KeyError(kind)
