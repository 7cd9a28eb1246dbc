"""Checkpoints of ViTs as their authors publish them: read as timm reads them, or refused."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from timm_vits import BEIT, DINOV3, images, make, make_timm, same, taps_of_timm

from cssbench.errors import ModelError

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


SAID = {"missing": "missing", "shape": "of another shape", "more": "unexpected"}


@pytest.mark.parametrize("change", SAID)
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
    with pytest.raises(ModelError, match=rf"is not of this model: 1 {SAID[change]} \('{tensor}'"):
        make(name, checkpoint=str(tmp_path / "bad.pth"))
    if change == "missing":
        torch.save({n: t for n, t in state.items() if not n.startswith(("blocks.1", "blocks.2"))}, tmp_path / "bad.pth")
        make(name, checkpoint=str(tmp_path / "bad.pth"), layers=[1])  # later blocks are not needed


# Wrappings: what training scripts put around a state dict, and before its names.

WRAPPED = {
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model in state_dict": lambda state: {"state_dict": {"model": state}},
    "DataParallel": lambda state: {"model": {f"module.{n}": t for n, t in state.items()}},
    "compiled in DataParallel": lambda state: {f"module._orig_mod.{n}": t for n, t in state.items()},
    "backbone of a segmenter": lambda state: {
        "state_dict": {f"module.backbone.{n}": t for n, t in state.items()} | {"module.head.w": torch.ones(3)}
    },
    "encoder": lambda state: {"encoder.model." + n: t for n, t in state.items()} | {"decoder.w": torch.ones(3)},
    "student and teacher": lambda state: {"teacher": {f"backbone.{n}": t for n, t in state.items()}, "student": {}},
}


@torch.no_grad()
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrapped_state_dicts_are_found(tmp_path, wrapping):
    vit = make_timm("vit_base_patch16_384", 32)
    torch.save(WRAPPED[wrapping](dict(vit.state_dict())), tmp_path / "weights.pth")
    backbone = make("vit_base_patch16_384", checkpoint=str(tmp_path / "weights.pth"))
    same(backbone(images()), taps_of_timm(vit, images(), "drop"))


def test_what_does_not_fit_is_reported_by_name_and_shape(tmp_path):
    state = dict(make_timm("vit_base_patch16_384", 32).state_dict())
    state["blocks.0.norm1.weight"] = torch.ones(7)
    state["extra.a"] = state["extra.b"] = torch.ones(2)
    for name in [n for n in state if n.startswith("blocks.1.")]:
        del state[name]
    torch.save({"model": state}, tmp_path / "bad.pth")
    with pytest.raises(ModelError) as caught:
        make("vit_base_patch16_384", checkpoint=str(tmp_path / "bad.pth"))
    said = str(caught.value)
    assert "12 missing ('blocks.1.attn.proj.bias', " in said
    assert " and 7 more)" in said
    assert "2 unexpected ('extra.a', 'extra.b')" in said
    assert "1 of another shape ('blocks.0.norm1.weight' 7 for 24)" in said


@pytest.mark.parametrize(
    "content", [{}, {"model": {"epoch": 3}}, {"state_dict": []}, [torch.ones(2)], torch.ones(2), 7]
)
def test_files_without_tensors_by_name_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(ModelError, match=r"bad\.pth' (is not of this model|cannot be loaded)"):
        make("vit_base_patch16_384", checkpoint=str(tmp_path / "bad.pth"))
