"""What a plug-in of Avalanche remembers, as data that a checkpoint can hold, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from avalanche.training.utils import ParamData
from torch import Tensor

PARAM, SET = "avalanche.ParamData", "avalanche.set"
PLAIN = (type(None), bool, int, float, str)


def pack(value: Any, where: str) -> Any:
    """`value` with each `ParamData` as {PARAM: name, "data": tensor} and each set as {SET: list}.

    Raises TypeError, naming `where`, at anything that is no data.
    """
    if isinstance(value, Tensor) or type(value) in PLAIN:
        return value
    if isinstance(value, ParamData):
        return {PARAM: value.name, "data": value.data.detach()}
    if isinstance(value, set):
        return {SET: sorted(value)}
    if isinstance(value, list | tuple):
        return type(value)(pack(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict):
        return {key: pack(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}, which cannot be saved as data")


def unpack(value: Any) -> Any:
    """Undo of `pack`."""
    if isinstance(value, dict) and PARAM in value:
        return ParamData(value[PARAM], init_tensor=value["data"].clone(), device=value["data"].device)
    if isinstance(value, dict) and SET in value:
        return set(value[SET])
    if isinstance(value, dict):
        return {key: unpack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(unpack, value))
    return value.clone() if isinstance(value, Tensor) else value


def plugin_state(plugin: Any) -> dict[str, Any]:
    """All attributes of a plug-in, as data. Raises TypeError as `pack`."""
    return {name: pack(value, f"{type(plugin).__name__}.{name}") for name, value in vars(plugin).items()}


def load_plugin_state(plugin: Any, state: dict[str, Any]) -> None:
    """Undo of `plugin_state`; a defaultdict stays one."""
    for name, value in state.items():
        found, now = unpack(value), getattr(plugin, name, None)
        setattr(plugin, name, defaultdict(now.default_factory, found) if isinstance(now, defaultdict) else found)


def each_param(value: Any, act: Callable[[ParamData], None]) -> None:
    """Call `act` with every ParamData within containers."""
    if isinstance(value, ParamData):
        act(value)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            each_param(item, act)


def move_params(plugin: Any, device: torch.device) -> None:
    """All ParamData of a plug-in onto `device`."""

    def move(param: ParamData) -> None:
        if param.data.device != device:
            param.data, param.device = param.data.to(device), device

    each_param(vars(plugin), move)
