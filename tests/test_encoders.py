"""Families of ViTs against timm's own models: taps, other grids, dropped prefix tokens, and published checkpoints."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import timm
import torch

from cssbench.errors import ModelError
from cssbench.models.backbone import Backbone, BackboneConfig
from cssbench.models.encoders import resized_offsets
from cssbench.models.packed import pack, run_block, whole

torch.set_num_threads(1)  # the tensors are tiny
PATCH = 8
SIZES = {"width": 24, "depth": 3, "heads": 3, "patch": PATCH}
TIMM_SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": PATCH}
BEIT, DINOV3 = "beitv2_base_patch16_224", "vit_base_patch16_dinov3_qkvb"
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


def randomise(module, seed=1):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def make(name, **options):
    config = {"image_size": 32, "layers": [1, 3], "drop_path": 0.0} | SIZES | options
    return Backbone(BackboneConfig(name=name, **config)).eval()


def make_timm(name, size, **sizes):
    return randomise(timm.create_model(name, img_size=size, num_classes=5, **TIMM_SIZES | sizes))


def images(height=32, width=32, number=2):
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(2))


def hide_prefix(vit):
    """Make timm's model do as if patches did not see prefix tokens, by means of its own."""
    for block in vit.blocks:
        if hasattr(block.attn, "relative_position_bias_table"):
            with torch.no_grad():
                block.attn.relative_position_bias_table[-2] = -1e9  # from a patch to the class token
        else:
            forward, prefix = block.forward, vit.num_prefix_tokens

            def masked(x, forward=forward, prefix=prefix, **options):
                mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
                mask[prefix:, :prefix] = False
                return forward(x, **options | {"attn_mask": mask})

            block.forward = masked


def taps_of_timm(vit, x, prefix_tokens):
    """Patch tokens after blocks 1 and 3, by timm's forward pass."""
    if prefix_tokens == "drop":
        hide_prefix(vit)
    return vit.forward_intermediates(x, indices=[0, 2], intermediates_only=True, output_fmt="NLC")


def same(found, expected):
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


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


# Checkpoints: files as their authors publish them, made from timm's model of 48 px (6 x 6 cells).


def renamed(state, *pairs):
    made = {}
    for name, tensor in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        made[name] = tensor
    return made


def as_deit3(state):
    return {"model": renamed(state, ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))}


def as_beit(state):
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(37, 37, dtype=torch.long) for i in range(3)}
    return {"model": state | index}


def as_openai_clip(state):
    pairs = (
        ("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre"), (".norm1", ".ln_1"), (".norm2", ".ln_2"),
        ("patch_embed.proj", "conv1"), ("attn.qkv.weight", "attn.in_proj_weight"), ("attn.proj", "attn.out_proj"),
        ("attn.qkv.bias", "attn.in_proj_bias"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
    )  # fmt: skip
    made = renamed({n: t for n, t in state.items() if not n.startswith(("head", "norm."))}, *pairs)
    made["class_embedding"] = made.pop("cls_token")[0, 0]
    made["positional_embedding"] = made.pop("pos_embed")[0]
    made |= {"ln_post.weight": torch.ones(24), "ln_post.bias": torch.ones(24), "proj": torch.ones(24, 7)}
    text = {"logit_scale": torch.ones(()), "token_embedding.weight": torch.ones(9, 5), "ln_final.bias": torch.ones(5)}
    return {f"visual.{name}": tensor for name, tensor in made.items()} | text


def as_open_clip(state):
    vision = {f"visual.trunk.{name}": tensor for name, tensor in state.items() if not name.startswith("head")}
    return vision | {"logit_scale": torch.ones(1)}


def as_mae(state):
    decoder = {"mask_token": torch.ones(1, 1, 9), "decoder_embed.weight": torch.ones(9, 24)}
    return {"model": {n: t for n, t in state.items() if not n.startswith("head")} | decoder}


def as_dinov2(state):
    return {n: t for n, t in state.items() if not n.startswith("head")} | {"mask_token": torch.ones(1, 24)}


def as_dinov2_registers(state):
    """The class token's position is a row of its own there."""
    made, row = as_dinov2(state), torch.full((1, 1, 24), 0.25)
    made["register_tokens"] = made.pop("reg_token")
    made["cls_token"] = made["cls_token"] - row
    made["pos_embed"] = torch.cat([row, made["pos_embed"]], 1)
    return made


def as_dinov2_giant(state):
    return renamed(as_dinov2(state), ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3"))


def as_dinov3(state):
    made = renamed(
        {n: t for n, t in state.items() if not n.startswith("head")},
        ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens"),
    )  # fmt: skip
    for i in range(3):
        stem = f"blocks.{i}.attn."
        q, v = made.pop(f"{stem}q_bias", torch.zeros(24)), made.pop(f"{stem}v_bias", torch.zeros(24))
        made[f"{stem}qkv.bias"] = torch.cat([q, torch.zeros(24), v])
        made[f"{stem}qkv.bias_mask"] = torch.ones(72)
    return made | {"mask_token": torch.ones(1, 24), "rope_embed.periods": torch.ones(2)}


PUBLISHED = {
    "AugReg": ("vit_base_patch16_384", lambda state: state),
    "DeiT III": ("deit3_base_patch16_384", as_deit3),
    "BEiT v2": (BEIT, as_beit),
    "CLIP in timm": ("vit_base_patch16_clip_224", lambda state: state),
    "CLIP of OpenAI": ("vit_base_patch16_clip_quickgelu_224", as_openai_clip),
    "CLIP of OpenCLIP": ("vit_base_patch16_clip_224", as_open_clip),
    "MAE": ("vit_base_patch16_224.mae", as_mae),
    "DINOv2": ("vit_small_patch14_dinov2", as_dinov2),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", as_dinov2_registers),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", as_dinov2_giant),
    "DINOv3": ("vit_base_patch16_dinov3", as_dinov3),
    "DINOv3 with biases": (DINOV3, as_dinov3),
    "EVA-02": ("eva02_small_patch14_336", lambda state: {"module": state}),
}


def flat(weights):
    return all(isinstance(value, torch.Tensor) for value in weights.values())


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's, in the expected values
@torch.no_grad()
@pytest.mark.parametrize("prefix_tokens", ["drop", "keep"])
@pytest.mark.parametrize("source", PUBLISHED)
def test_published_files_are_read_and_resized(tmp_path, source, prefix_tokens):
    name, publish = PUBLISHED[source]
    vit = make_timm(name, 48)
    weights = publish(dict(vit.state_dict()))
    path = tmp_path / ("weights.safetensors" if flat(weights) else "weights.pth")
    if flat(weights):
        safetensors.torch.save_file({n: t.contiguous().clone() for n, t in weights.items()}, path)
    else:
        torch.save(weights, path)
    backbone = make(name, checkpoint=str(path), prefix_tokens=prefix_tokens)
    vit.set_input_size(32)
    same(backbone(images()), taps_of_timm(vit, images(), prefix_tokens))


@torch.no_grad()
def test_patches_of_14_px(tmp_path):
    """DINOv2's own patch: 56 px are 4 x 4 cells, read from a file of 5 x 5."""
    vit = make_timm("vit_small_patch14_dinov2", 70, patch_size=14)
    torch.save(as_dinov2(dict(vit.state_dict())), tmp_path / "dinov2.pth")
    options = {"patch": None, "image_size": 56, "prefix_tokens": "keep", "checkpoint": str(tmp_path / "dinov2.pth")}
    backbone = make("vit_small_patch14_dinov2", **options)
    assert (backbone.patch, backbone.grid(28, 56)) == (14, (2, 4))
    vit.set_input_size(56)
    same(backbone(images(56, 56)), taps_of_timm(vit, images(56, 56), "keep"))
    assert backbone(images(28, 42))[0].shape == (2, 6, 24)
    with pytest.raises(ModelError, match=r"image_size 512 is not a multiple of the patch of 14 px\. Choose 504 or 518"):
        make("vit_small_patch14_dinov2", patch=None, image_size=512)


@pytest.mark.parametrize(
    ("name", "other"),
    [(BEIT, DINOV3), (DINOV3, BEIT), ("vit_small_patch14_dinov2", BEIT), (BEIT, "vit_small_patch14_dinov2"),
     ("vit_base_patch16_dinov3", "vit_small_patch14_reg4_dinov2")],
)  # fmt: skip
def test_a_file_of_another_family_is_refused(tmp_path, name, other):
    torch.save(make_timm(other, 32).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth' (is not of this model|cannot be loaded)"):
        make(name, checkpoint=str(tmp_path / "other.pth"))


@pytest.mark.parametrize("change", ["missing", "shape", "more"])
@pytest.mark.parametrize(("name", "tensor"), [(BEIT, "blocks.1.attn.q_bias"), (DINOV3, "blocks.1.gamma_1")])
def test_a_file_that_does_not_fit_is_refused(tmp_path, name, tensor, change):
    state = dict(make_timm(name, 32).state_dict())
    if change == "missing":
        state.pop(tensor)
    elif change == "shape":
        state[tensor] = torch.ones(7)
    else:
        tensor = "blocks.0.more"
        state[tensor] = torch.ones(7)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(ModelError, match=f"is not of this model: 1 tensors .* first being '{tensor}'"):
        make(name, checkpoint=str(tmp_path / "bad.pth"))
    if change == "missing":
        torch.save({n: t for n, t in state.items() if not n.startswith(("blocks.1", "blocks.2"))}, tmp_path / "bad.pth")
        make(name, checkpoint=str(tmp_path / "bad.pth"), layers=[1])  # later blocks are not needed


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
