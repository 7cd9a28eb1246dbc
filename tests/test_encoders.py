"""Families of ViTs against timm's own models: taps, other grids, dropped prefix tokens, packed tokens."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm_vits import BEIT, DINOV3, images, make, make_timm, randomise, same, taps_of_timm

from cssbench.errors import ModelError
from cssbench.models.backbone import Backbone, BackboneConfig
from cssbench.models.encoders import resized_offsets
from cssbench.models.packed import pack, run_block, whole

PLACED = [  # timm's class Beit; Eva with RoPE of four kinds, without RoPE, split projections, SwiGLU, a norm inside
    BEIT,
    DINOV3,
    "vit_huge_plus_patch16_dinov3",
    "eva02_small_patch14_336",
    "eva02_base_patch16_clip_224",
    "eva_giant_patch14_224",
    "vit_pe_core_base_patch16_224",
    "vit_base_patch16_rope_mixed_224",
]
NAMES = ["vit_base_patch16_clip_224", "deit3_base_patch16_384", *PLACED]


@torch.no_grad()
@pytest.mark.parametrize("prefix_tokens", ["drop", "keep"])
@pytest.mark.parametrize("name", NAMES)
def test_taps_are_timms(name, prefix_tokens):
    vit = make_timm(name, 32)
    backbone = make(name, prefix_tokens=prefix_tokens)
    backbone.vit.load_state_dict(vit.state_dict(), strict=False)
    found = backbone(images())
    assert [tuple(tap.shape) for tap in found] == [(2, 16, 24)] * 2
    same(found, taps_of_timm(vit, images(), prefix_tokens))


@pytest.mark.filterwarnings("ignore")  # of timm's interpolation
@torch.no_grad()
@pytest.mark.parametrize("prefix_tokens", ["drop", "keep"])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 40), (16, 64)])
@pytest.mark.parametrize("name", [BEIT, DINOV3, "eva02_small_patch14_336", "vit_base_patch16_rope_mixed_224"])
def test_any_grid_as_timm_resizes(name, height, width, prefix_tokens):
    """16 x 64 px has as many cells as 32 x 32 px. timm's model is told the new input size."""
    vit = make_timm(name, 32)
    backbone = make(name, prefix_tokens=prefix_tokens)
    backbone.vit.load_state_dict(vit.state_dict(), strict=False)
    vit.set_input_size((height, width))
    same(backbone(images(height, width)), taps_of_timm(vit, images(height, width), prefix_tokens))


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("prefix_tokens", ["drop", "keep"])
def test_every_trainable_parameter_gets_a_gradient(name, prefix_tokens):
    backbone = make(name, prefix_tokens=prefix_tokens, drop_path=0.2).train()
    sum(tap.square().sum() for tap in backbone(images(24, 40))).backward()
    assert {n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None} == set()
    fixed = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    prefix = {f"vit.{n}" for n in ("cls_token", "reg_token") if getattr(backbone.vit, n, None) is not None}
    assert fixed == (prefix if prefix_tokens == "drop" else set())


def test_drop_path_reaches_every_family():
    for name in (BEIT, DINOV3, "deit3_base_patch16_384"):
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in make(name, drop_path=0.2).blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_what_has_no_weight_decay():
    names = make(BEIT).no_decay_names()
    assert names == {"vit.cls_token", *(f"vit.blocks.{i}.attn.relative_position_bias_table" for i in range(3))}
    assert make(DINOV3).no_decay_names() == {"vit.cls_token", "vit.reg_token"}
    assert make("vit_base_patch16_rope_mixed_224").no_decay_names() == {"vit.cls_token", "vit.rope.freqs"}


def test_biases_of_offsets_by_hand():
    """Two cells per side have the offsets -1, 0, 1, three -2 ... 2. The first stored offset stands at 1 whatever the
    progression, so 2 takes its value."""
    table = torch.arange(9.0)[:, None] * 10
    table = torch.cat([table, torch.tensor([[1.0], [2.0], [3.0]])])
    found = resized_offsets(table, 2, (3, 2))
    assert found[-3:, 0].tolist() == [1, 2, 3]
    rows = [[0, 10, 20], [0, 10, 20], [30, 40, 50], [60, 70, 80], [60, 70, 80]]
    assert found[:-3, 0].view(5, 3).tolist() == rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("side", "grid"), [(4, (4, 6)), (4, (7, 3)), (14, (32, 32)), (6, (4, 4)), (3, (1, 2))])
def test_biases_of_offsets_are_resized_as_by_timm(side, grid):
    table = torch.randn((2 * side - 1) ** 2 + 3, 2)
    shape = ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 2)
    expected = timm.layers.resize_rel_pos_bias_table(table, grid, shape)
    torch.testing.assert_close(resized_offsets(table, side, grid), expected, atol=1e-5, rtol=1e-5)


# Packed tokens: a dropped token is one that no other sees.


def some(number=3, seed=3):
    """(B, 16) bool; different numbers per image."""
    keep = torch.rand(number, 16, generator=torch.Generator().manual_seed(seed)) < 0.6
    assert len(set(keep.sum(1).tolist())) > 1
    return keep


def dense_with_mask(name, block, tokens, keep, grid=(4, 4)):
    """timm's block on all tokens, where those not kept are masked as keys; with its class token's place cut off."""
    if name != BEIT:
        masks = keep[:, None, None].expand(-1, 1, 16, 16)
        return torch.cat([block.block(t[None], rope=block.rope, attn_mask=m[None])
                          for t, m in zip(tokens, masks, strict=True)])  # fmt: skip
    attn, (height, width) = block.block.attn, grid
    place = torch.tensor([(row, column) for row in range(height) for column in range(width)])
    offsets = place[:, None] - place + torch.tensor([height - 1, width - 1])
    bias = attn.relative_position_bias_table[offsets[..., 0] * (2 * width - 1) + offsets[..., 1]].permute(2, 0, 1)
    x = block.block.norm1(tokens)
    q, k, v = (x @ w.T for w in attn.qkv.weight.chunk(3))
    q, k, v = (y.unflatten(2, (3, 8)).transpose(1, 2) for y in (q + attn.q_bias, k, v + attn.v_bias))
    logits = (q @ k.transpose(2, 3) / math.sqrt(8) + bias).masked_fill(~keep[:, None, None], -torch.inf)
    mixed = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    tokens = tokens + block.block.gamma_1 * mixed
    return tokens + block.block.gamma_2 * block.block.mlp(block.block.norm2(tokens))


def placed(name, seed=1):
    return randomise(make(name), seed).blocks_at((4, 4))[1]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["padded", "loop", "auto"])
@pytest.mark.parametrize("name", PLACED)
def test_packed_tokens_attend_to_those_that_are_left(name, attention):
    block, keep = placed(name), some()
    tokens = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    expected = dense_with_mask(name, block, tokens, keep)
    out = run_block(block, pack(tokens, keep), attention=attention)
    torch.testing.assert_close(out.tokens, expected[keep], atol=1e-4, rtol=1e-4)
    every = pack(tokens, keep)
    chosen = every.positions % 3 == 0
    out = run_block(block, every, every.select(chosen), attention)
    torch.testing.assert_close(out.tokens, expected[keep][chosen], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", PLACED)
def test_all_tokens_are_the_block_itself(name):
    block, tokens = placed(name), torch.randn(2, 16, 24)
    every = torch.ones(2, 16, dtype=torch.bool)
    expected = dense_with_mask(name, block, tokens, every)
    torch.testing.assert_close(block(tokens), expected, atol=1e-4, rtol=1e-4)
    out = run_block(block, whole(tokens))
    torch.testing.assert_close(out.tokens.view(2, 16, 24), expected, atol=1e-4, rtol=1e-4)


def test_whole_is_a_view_with_its_counts_known():
    tokens = torch.randn(2, 3, 4)
    packed = whole(tokens, [0, 2, 5])
    assert packed.tokens.data_ptr() == tokens.data_ptr()
    assert (packed.counts, packed.end, packed.offsets.tolist()) == ([3, 3], 6, [0, 3, 6])
    assert packed.positions.tolist() == [0, 2, 5] * 2
    assert pack(tokens, torch.tensor([[True, False, True], [False] * 3])).end == 3
    assert pack(tokens, torch.zeros(2, 3, dtype=torch.bool)).end == 0


@pytest.mark.parametrize("name", [BEIT, DINOV3])
@torch.no_grad()
def test_tokens_without_a_cell_are_refused_where_places_matter(name):
    virtual = whole(torch.randn(2, 3, 24), [0, 7, 16])
    with pytest.raises(ModelError, match=r"token at position 16 of a grid of 16.*averaged tokens have none"):
        run_block(placed(name), virtual)
    for free in ("eva_giant_patch14_224", "deit3_base_patch16_384"):  # positions are in the tokens alone
        assert run_block(placed(free), virtual).tokens.isfinite().all()


def test_blocks_that_packed_tokens_cannot_run():
    tokens = whole(torch.randn(2, 16, 24))
    for name in (BEIT, DINOV3):  # bare, they would forget their tokens' places
        with pytest.raises(ModelError, match="known grid only"):
            run_block(make(name).blocks[0], tokens)
    with pytest.raises(ModelError, match="EvaBlockPostNorm"):
        run_block(make("eva02_enormous_patch14_clip_224").blocks_at((4, 4))[0], tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", [BEIT, DINOV3])
def test_half_precision(name):
    block, keep = placed(name), some()
    tokens = 0.3 * torch.randn(3, 16, 24)
    expected = run_block(block, pack(tokens, keep)).tokens
    with torch.autocast("cpu", torch.bfloat16):
        for attention in ("padded", "loop"):
            out = run_block(block, pack(tokens, keep), attention=attention).tokens
            torch.testing.assert_close(out.float(), expected, atol=0.3, rtol=0.1)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "levit_128s", "convnext_tiny", "vit_tiny_r_s16_p8_224", "cait_s24_224"]
)
def test_what_is_no_plain_vit_is_refused_with_what_is_allowed(name):
    with pytest.raises(ModelError, match=rf"{name}' .*plain ViT.*Transformer, Beit, Eva.*'beitv2_base_patch16_224'"):
        Backbone(BackboneConfig(name=name, image_size=224, layers=[1]))


@pytest.mark.parametrize(("name", "near"), [("beitv2_bse_patch16_224", BEIT), ("vit_base_patch16_dinov4", "dinov3")])
def test_unknown_names_give_near_ones(name, near):
    with pytest.raises(ModelError, match=f"no model '{name}'. Did you mean .*{near}"):
        make(name)


@pytest.mark.parametrize("name", [BEIT, DINOV3])
def test_layers_out_of_range(name):
    with pytest.raises(ModelError, match=rf"layers is \[2, 4\]; expected .* from 1 to 3, each once, for '{name}'"):
        make(name, layers=[2, 4])
