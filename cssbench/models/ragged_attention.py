"""Attention within each image of ragged tokens: image by image, padded, or by a kernel that knows the offsets.

Shapes: B images, image b with n_b tokens, T their sum; D width of an attention head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cssbench.errors import ModelError

try:  # torch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from cssbench.models.packed import Packed, PlacedBlock

Attention = Literal["padded", "loop", "varlen", "auto"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packed,
    keys: Packed,
    attention: Attention = "padded",
    dropout: float = 0.0,
    place: PlacedBlock | None = None,
) -> Tensor:
    """q (T_q, heads, D) of the tokens `queries`; k and v (T, heads, D) of `keys` -> (T_q, heads, D).

    padded  one tensor padded to the longest image, with a key mask (none if all images are of one length): reference
    loop    image by image, without padding: less work where lengths differ much, more and smaller kernels
    varlen  one kernel that knows the offsets: no padding, one launch. For what `no_varlen` lets through; in half
            precision, under autocast also of queries and keys that a norm made float32, as attention itself does
    auto    where lengths differ, varlen if it can run, else the loop on a CPU and padded elsewhere; padded where all
            lengths are the same
    All give the same numbers up to rounding. place: brings a bias to the logits, or None.
    Raises ModelError, saying why, where varlen is asked for and cannot run.
    """
    biased = place is not None and place.table is not None
    if attention == "auto":
        attention = choose(q, queries, keys, dropout, biased)
    if attention == "varlen":
        if reason := no_varlen(q, dropout, biased):
            raise ModelError(
                f"attention = 'varlen' cannot run here: {reason}. Choose 'auto' (varlen where it can run), 'loop' or "
                f"'padded'."
            )
        return _attend_varlen(q, k, v, queries, keys)
    return (_attend_padded if attention == "padded" else _attend_loop)(q, k, v, queries, keys, dropout, place)


def choose(q: Tensor, queries: Packed, keys: Packed, dropout: float, biased: bool) -> Attention:
    """What `auto` is for these tokens."""
    if all(min(layout.counts) == max(layout.counts) for layout in (queries, keys)):
        return "padded"
    if no_varlen(q, dropout, biased) is None:
        return "varlen"
    return "padded" if q.is_cuda else "loop"


def no_varlen(q: Tensor, dropout: float, biased: bool) -> str | None:
    """Why torch's attention of variable lengths cannot take these queries (T_q, heads, D); None: it can."""
    kind, width = _half(q), q.shape[-1]
    if varlen_attn is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen, which came with 2.10"
    if not q.is_cuda:
        return f"it needs a CUDA device, and the tokens are on {q.device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or later, not {torch.cuda.get_device_name(q.device)}"
    if kind not in (torch.float16, torch.bfloat16):
        return f"it needs half precision, and the tokens are {kind}; set train.precision = 'bf16-mixed'"
    if biased:
        return "this encoder's attention adds a bias to its logits, which it does not know"
    if dropout:
        return f"it knows no dropout, and this encoder's attention drops {dropout:g}"
    if width % 8 or width > 256:
        return f"it needs attention heads of a width that is a multiple of 8, at most 256, not {width}"
    return None


def _half(q: Tensor) -> torch.dtype:
    """The type in which attention runs: that of autocast, where it is on."""
    device = q.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed) -> Tensor:
    """(T_q, heads, D) -> same shape, all images in one kernel."""
    kind = _half(q)
    q, k, v = (x.to(kind).contiguous() for x in (q, k, v))
    if not len(q):
        return q
    mixed = varlen_attn(q, k, v, queries.starts, keys.starts, max(queries.counts), max(keys.counts))
    assert isinstance(mixed, Tensor)  # a tuple only where more than the result is asked for
    return mixed


def _attend_loop(
    q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, dropout: float, place: PlacedBlock | None
) -> Tensor:
    """(T_q, heads, D) -> same shape, image by image."""
    parts = zip(
        q.split(queries.counts), k.split(keys.counts), v.split(keys.counts),
        queries.positions.split(queries.counts), keys.positions.split(keys.counts), strict=True,
    )  # fmt: skip
    mixed = [q[:0]]
    for *part, rows, columns in parts:
        if len(rows):
            one, two, three = (x.transpose(0, 1)[None] for x in part)
            bias = None
            if place is not None and place.table is not None and place.index is not None:
                bias = place.table[place.index[rows[:, None], columns]].permute(2, 0, 1)[None].to(q.dtype)
            found = F.scaled_dot_product_attention(one, two, three, attn_mask=bias, dropout_p=dropout)
            mixed.append(found[0].transpose(0, 1))
    return torch.cat(mixed)


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, dropout: float, place: PlacedBlock | None
) -> Tensor:
    """(T_q, heads, D) -> same shape, all images in one call."""
    mask = None
    if min(keys.counts) < max(keys.counts):
        mask = key_mask(keys)
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None]  # an empty image: no softmax over nothing
    bias = None if place is None else place.bias(queries, keys)
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, -torch.inf)
    q, k, v = (pad(x, layout).transpose(1, 2) for x, layout in ((q, queries), (k, keys), (v, keys)))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
    if min(queries.counts) == max(queries.counts):
        return mixed.flatten(0, 1)
    return mixed[queries.image, queries.slot]


def key_mask(layout: Packed) -> Tensor:
    """(B, largest n_b) bool: which places of a padded tensor hold a token."""
    return torch.arange(max(layout.counts), device=layout.offsets.device) < layout.offsets.diff()[:, None]


def pad(x: Tensor, layout: Packed) -> Tensor:
    """(T, ...) -> (B, largest n_b, ...), zero behind each image's tokens."""
    longest = max(layout.counts)
    if min(layout.counts) == longest:
        return x.unflatten(0, (len(layout.counts), longest))
    padded = x.new_zeros(len(layout.counts), longest, *x.shape[1:])
    return padded.index_put((layout.image, layout.slot), x)
