"""Counting FLOPs as the papers do (fvcore's convention): one multiply-add is one FLOP.

Counted: convolution, linear, matrix products (einsum, and both products of attention, fused or not); normalisation with
running statistics 2 per element, LayerNorm and GroupNorm 5 (4 without weights); bilinear resizing 4 per output element,
nearest 1, adaptive average pooling 1 per input element. Everything else is free: softmax, activations, residual sums,
element-wise products (so P sigmoid(M), written as a broadcast product, is free too; the public code's einsum is not).

Known deviation: fvcore drops what no output depends on; here everything that runs is counted. Only shapes are read (but
for attention of variable lengths), so tensors on the meta device will do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Rule = Callable[[Any, Tensor], int]


def _convolution(args: Any, out: Tensor) -> int:
    image, weight, transposed = args[0], args[1], args[6]
    return (image if transposed else out).numel() * weight[0].numel()


def _attention(args: Any, out: Tensor) -> int:
    query, key, value = args[:3]  # (..., L, E), (..., S, E), (..., S, V)
    return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _ragged_attention(args: Any, out: Tensor) -> int:
    """Of torch's attention of variable lengths. The only rule that reads values: how many tokens each image has."""
    query, value, (starts, key_starts) = args[0], args[2], args[3:5]  # (T, heads, E or V), (B + 1,)
    pairs = int((starts.diff().long() * key_starts.diff().long()).sum())
    return pairs * query.shape[1] * (query.shape[-1] + value.shape[-1])


def _norm(weight: int) -> Rule:
    return lambda args, out: args[0].numel() * (4 if args[weight] is None else 5)


def _batch_norm(args: Any, out: Tensor) -> int:
    return args[0].numel() * (1 if args[1] is None else 2)


RULES: dict[str, Rule] = {
    "mm": lambda args, out: out.numel() * args[0].shape[-1],
    "addmm": lambda args, out: out.numel() * args[1].shape[-1],
    "bmm": lambda args, out: out.numel() * args[0].shape[-1],
    "baddbmm": lambda args, out: out.numel() * args[1].shape[-1],
    "convolution": _convolution,
    "native_layer_norm": _norm(2),
    "native_group_norm": _norm(1),
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "upsample_bilinear2d": lambda args, out: 4 * out.numel(),
    "upsample_nearest2d": lambda args, out: out.numel(),
    "_varlen_attn": _ragged_attention,
    "_adaptive_avg_pool2d": lambda args, out: args[0].numel(),
}


def _rule(name: str) -> Rule | None:
    return _attention if name.startswith("_scaled_dot_product") else RULES.get(name)


class FlopCounter(TorchDispatchMode):
    """Context. `total[part]`: multiply-adds of what ran inside `with counter.part(name)`, innermost; else "rest"."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Counter[str] = Counter()
        self._parts = ["rest"]

    def enter(self, name: str) -> None:
        self._parts.append(name)

    def leave(self) -> None:
        self._parts.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if rule := _rule(func.overloadpacket.__name__):
            self.total[self._parts[-1]] += rule(args, out[0] if isinstance(out, tuple) else out)
        return out


@contextmanager
def counting() -> Iterator[FlopCounter]:
    """A running counter, with no gradients and without the fused transformer kernels, which hide their products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounter() as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
