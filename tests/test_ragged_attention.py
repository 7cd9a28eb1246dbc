"""Attention of variable lengths: what the kernel is given, when it is chosen, what is said where it cannot run.

The kernel itself needs a GPU. On a CPU a restatement of it stands in, which reads its arguments as the kernel would.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from tiny_shrunk import EQD, images, make, with_edges
from torch import Tensor

from cssbench import flops
from cssbench.errors import ModelError
from cssbench.models import ragged_attention
from cssbench.models.packed import Packed, pack, run_block
from cssbench.models.ragged_attention import no_varlen

B, L, C = 4, 7, 16
COUNTS = (5, 0, 7, 2)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(1)
    made = Block(C, 2, qkv_bias=True, norm_layer=LayerNorm, init_values=0.5, qk_norm=True)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Softmax attention by hand between the given offsets; the calls that were made."""
    calls: list[dict[str, Any]] = []

    def emulated(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, max_q: int, max_k: int) -> Tensor:
        calls.append({"q": q, "starts": starts, "key_starts": key_starts, "max_q": max_q, "max_k": max_k})
        assert starts.dtype == key_starts.dtype == torch.int32
        assert q.dtype == k.dtype == v.dtype
        assert all(x.is_contiguous() and x.ndim == 3 for x in (q, k, v))
        out = torch.zeros_like(q)
        for i in range(len(starts) - 1):
            rows, columns = slice(*starts[i : i + 2].tolist()), slice(*key_starts[i : i + 2].tolist())
            logits = torch.einsum("qhd,khd->hqk", q[rows].float(), k[columns].float()) * q.shape[-1] ** -0.5
            out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[columns].float()).to(q.dtype)
        return out

    monkeypatch.setattr(ragged_attention, "varlen_attn", emulated)
    monkeypatch.setattr(ragged_attention, "no_varlen", lambda q, dropout, biased: None)
    return calls


def tokens() -> tuple[Tensor, Tensor]:
    """(B, L, C), and which are kept, (B, L)."""
    made = torch.randn(B, L, C, generator=torch.Generator().manual_seed(0))
    return made, torch.stack([torch.arange(L) < n for n in COUNTS])


def alone(block: Block, x: Tensor, keep: Tensor) -> Tensor:
    return torch.cat([block(image[kept][None])[0] for image, kept in zip(x, keep, strict=True) if kept.any()])


def test_each_image_as_if_alone(block, kernel):
    x, keep = tokens()
    out = run_block(block, pack(x, keep), attention="varlen")
    torch.testing.assert_close(out.tokens, alone(block, x, keep), atol=1e-6, rtol=1e-5)
    (call,) = kernel
    assert call["starts"].tolist() == call["key_starts"].tolist() == [0, 5, 5, 12, 14]
    assert (call["max_q"], call["max_k"]) == (7, 7)
    assert call["q"].shape == (14, 2, 8)


def test_fewer_queries_than_keys(block, kernel):
    x, keep = tokens()
    packed = pack(x, keep)
    chosen = packed.positions % 2 == 1
    out = run_block(block, packed, packed.select(chosen), attention="varlen")
    torch.testing.assert_close(out.tokens, alone(block, x, keep)[chosen], atol=1e-6, rtol=1e-5)
    assert kernel[0]["starts"].tolist() == [0, 2, 2, 5, 6]
    assert (kernel[0]["max_q"], kernel[0]["max_k"]) == (3, 7)


def test_gradients_are_those_of_single_images(block, kernel):
    x, keep = tokens()
    leaf = x.clone().requires_grad_()
    weight = torch.randn(sum(COUNTS), C, generator=torch.Generator().manual_seed(2))
    found, want = (
        torch.autograd.grad((made * weight).sum(), [leaf, *block.parameters()])
        for made in (run_block(block, pack(leaf, keep), attention="varlen").tokens, alone(block, leaf, keep))
    )
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_half_precision_reaches_the_kernel(block, kernel):
    """The block's norms of queries and keys give float32; autocast would bring those of plain attention back."""
    x, keep = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_block(block, pack(x, keep), attention="varlen")
    assert kernel[0]["q"].dtype == torch.bfloat16
    torch.testing.assert_close(out.tokens.float(), alone(block, x, keep), atol=0.15, rtol=0.1)


def test_no_token_at_all(block, kernel):
    x, keep = tokens()
    out = run_block(block, pack(x, keep & False), attention="varlen")
    assert out.tokens.shape == (0, C)
    assert kernel == []


def layout(*counts: int) -> Packed:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return Packed(torch.zeros(sum(counts), 1), offsets, torch.cat([torch.arange(n) for n in counts]))


def queries(**changes: Any) -> Any:
    """Queries on a GPU, as far as the choice looks at them."""
    facts = {"is_cuda": True, "device": torch.device("cuda"), "dtype": torch.bfloat16, "shape": (6, 2, 8)}
    return SimpleNamespace(**facts | changes)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged_attention, "varlen_attn", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("changes", "dropout", "biased", "reason"),
    [
        ({}, 0.0, False, None),
        ({"dtype": torch.float16}, 0.0, False, None),
        ({"is_cuda": False, "device": torch.device("cpu")}, 0.0, False, "CUDA device, and the tokens are on cpu"),
        ({"dtype": torch.float32}, 0.0, False, "half precision, and the tokens are torch.float32"),
        ({}, 0.0, True, "bias"),
        ({}, 0.25, False, r"drops 0.25"),
        ({"shape": (6, 2, 12)}, 0.0, False, "not 12"),
        ({"shape": (6, 2, 264)}, 0.0, False, "not 264"),
    ],
)
def test_when_it_can_run(changes: dict[str, Any], dropout: float, biased: bool, reason: str | None):
    found = no_varlen(queries(**changes), dropout, biased)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


@pytest.mark.usefixtures("gpu")
def test_old_gpus_and_old_torch_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 or later, not a GPU" in str(no_varlen(queries(), 0.0, False))
    monkeypatch.setattr(ragged_attention, "varlen_attn", None)
    assert "came with 2.10" in str(no_varlen(queries(), 0.0, False))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("counts", "changes", "biased", "chosen"),
    [
        ((3, 3), {}, False, "padded"),  # nothing is padded: one call without a mask
        ((4, 2), {}, False, "varlen"),
        ((4, 2), {}, True, "padded"),
        ((4, 2), {"dtype": torch.float32}, False, "padded"),
        ((4, 2), {"is_cuda": False, "device": torch.device("cpu")}, False, "loop"),
        ((3, 3), {"is_cuda": False, "device": torch.device("cpu")}, False, "padded"),
    ],
)
def test_what_auto_chooses(counts: tuple[int, ...], changes: dict[str, Any], biased: bool, chosen: str):
    keys = layout(*counts)
    assert ragged_attention.choose(queries(**changes), keys, keys, 0.0, biased) == chosen


@pytest.mark.usefixtures("gpu")
def test_auto_looks_at_queries_too():
    assert ragged_attention.choose(queries(), layout(3, 1), layout(4, 4), 0.0, False) == "varlen"


def test_asked_for_where_it_cannot_run(block):
    x, keep = tokens()
    with pytest.raises(ModelError, match=r"'varlen' cannot run here: .*(CUDA device|2\.10).*Choose 'auto'"):
        run_block(block, pack(x, keep), attention="varlen")


def test_the_model_passes_the_choice_on():
    model = with_edges(make(attention="varlen", **EQD))
    with torch.no_grad(), pytest.raises(ModelError, match="'varlen' cannot run here"):
        model(images())


def test_its_multiply_adds_are_counted():
    """2 heads of width 8; images of 3 queries x 4 keys and 1 x 2: 14 pairs, and two products of 16 each."""
    q, k = torch.zeros(4, 2, 8), torch.zeros(6, 2, 8)
    arguments = (q, k, k, torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([0, 4, 6], dtype=torch.int32))
    assert flops.RULES["_varlen_attn"](arguments, q) == 14 * 2 * 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's attention of variable lengths runs on CUDA alone")
def test_on_a_gpu():
    torch.manual_seed(0)
    block = Block(64, 4, qkv_bias=True).cuda().eval()
    x, keep = torch.randn(B, L, 64, device="cuda"), torch.stack([torch.arange(L) < n for n in COUNTS]).cuda()
    packed = pack(x, keep)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        if reason := no_varlen(torch.zeros(1, 4, 16, device="cuda"), 0.0, False):
            pytest.skip(reason)
        found = {kind: run_block(block, packed, attention=kind).tokens for kind in ("varlen", "auto", "loop")}
        with flops.counting() as counter:
            run_block(block, packed, attention="varlen")
    assert torch.equal(found["auto"], found["varlen"])
    torch.testing.assert_close(found["varlen"], found["loop"], atol=0.02, rtol=0.02)
    with flops.counting() as plain:
        run_block(block, packed, attention="loop")
    assert counter.total == plain.total
