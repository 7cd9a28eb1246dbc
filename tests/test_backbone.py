"""Token maps of timm's plain ViTs against manual runs over timm's parts, and checkpoints from files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from cssbench.errors import ModelError
from cssbench.models.backbone import Backbone, BackboneConfig, to_map

torch.set_num_threads(1)  # the tensors are tiny
SIZES = {"patch": 8, "width": 24, "depth": 4, "heads": 3}
TIMM_SIZES = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
NAME = "vit_tiny_patch16_224"
REGISTERS = "vit_medium_patch16_reg4_gap_256"  # four register tokens, which have no position embedding


def make(name=NAME, seed=0, **options):
    """A tiny ViT for 32 x 32 px (16 tokens) in eval mode."""
    torch.manual_seed(seed)
    config = {"image_size": 32, "layers": [2, 4], "drop_path": 0.0} | SIZES | options
    return Backbone(BackboneConfig(name=name, **config)).eval()


def randomise(module):
    """No parameter at its initial value: timm's are so small that attention hardly matters."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def make_timm(size=32, seed=1, name=NAME, **options):
    """timm's own model, with a classifier."""
    torch.manual_seed(seed)
    vit = timm.create_model(name, img_size=size, num_classes=5, **TIMM_SIZES | options).eval()
    return randomise(vit)


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


def plain_taps(vit, x, taps, position=None, prefix=None):
    """Patches by unfold, plus positions (B, L, C); `prefix` tokens in front, dropped again at the taps."""
    weight = vit.patch_embed.proj.weight
    patches = F.unfold(x, kernel_size=weight.shape[-1], stride=weight.shape[-1]).transpose(1, 2)
    tokens = patches @ weight.flatten(1).T + vit.patch_embed.proj.bias
    tokens = tokens + (vit.pos_embed[:, vit.num_prefix_tokens :] if position is None else position)
    number = 0
    if prefix is not None:
        number = prefix.shape[1]
        tokens = torch.cat([prefix.expand(len(x), -1, -1), tokens], 1)
    found = []
    for i, block in enumerate(vit.blocks, 1):
        tokens = block(tokens)
        if i in taps:
            found.append(tokens[:, number:])
    return found


def resized(position, grid, size):
    """Position embeddings (1, L, C) of a grid, resized as timm does."""
    cells = position.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(cells, size=size, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def save(vit, path: Path, wrap=lambda state: state) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(vit.state_dict(), path)
    else:
        torch.save(wrap(vit.state_dict()), path)
    return str(path)


@torch.no_grad()
def test_taps_are_raw_block_outputs_without_the_class_token():
    backbone = randomise(make())
    found = backbone(images())
    assert [tuple(t.shape) for t in found] == [(2, 16, 24)] * 2
    same(found, plain_taps(backbone.vit, images(), [2, 4]))
    # Dropped before block 1: nothing about the class token matters.
    for parameter in (backbone.vit.cls_token[:, 0], backbone.vit.pos_embed[:, 0]):
        torch.nn.init.normal_(parameter)
    assert all(torch.equal(a, b) for a, b in zip(found, backbone(images()), strict=True))


@torch.no_grad()
def test_kept_class_token_goes_through_the_blocks_with_its_position():
    backbone = randomise(make(prefix_tokens="keep"))
    vit = backbone.vit
    found = backbone(images())
    assert [tuple(t.shape) for t in found] == [(2, 16, 24)] * 2
    same(found, plain_taps(vit, images(), [2, 4], prefix=vit.cls_token + vit.pos_embed[:, :1]))
    torch.nn.init.normal_(vit.pos_embed[:, 0])
    assert not torch.allclose(found[0], backbone(images())[0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("prefix_tokens", ["drop", "keep"])
def test_register_tokens_are_prefix_tokens_too(prefix_tokens):
    backbone = randomise(make(REGISTERS, prefix_tokens=prefix_tokens))
    vit = backbone.vit
    assert (vit.num_prefix_tokens, vit.pos_embed.shape[1]) == (4, 16)
    prefix = vit.reg_token if prefix_tokens == "keep" else None
    same(backbone(images()), plain_taps(vit, images(), [2, 4], vit.pos_embed, prefix))


@torch.no_grad()
@pytest.mark.parametrize(("prefix_tokens", "number"), [("drop", 0), ("keep", 1)])
def test_embedded_tokens_are_patches_and_positions(prefix_tokens, number):
    backbone = randomise(make(prefix_tokens=prefix_tokens))
    vit, x = backbone.vit, images(24, 32)
    tokens = backbone.embed(x)
    position = resized(vit.pos_embed[:, 1:], (4, 4), (3, 4))
    torch.testing.assert_close(tokens[:, number:], vit.patch_embed.proj(x).flatten(2).transpose(1, 2) + position)
    assert (tokens.shape, backbone.prefix) == ((2, 12 + number, 24), number)
    for block in backbone.blocks:
        tokens = block(tokens)
    assert torch.equal(tokens[:, number:], backbone(x)[-1])


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (16, 16), (24, 56), (16, 64)])
def test_position_embeddings_are_resized_to_the_input(height, width):
    """16 x 64 px has the 16 tokens of 32 x 32 px, but another grid."""
    backbone = randomise(make())
    position = resized(backbone.vit.pos_embed[:, 1:], (4, 4), (height // 8, width // 8))
    same(backbone(images(height, width)), plain_taps(backbone.vit, images(height, width), [2, 4], position))


@torch.no_grad()
def test_token_maps_keep_rows_and_columns():
    """With blocks that do nothing, a token is its patch: cell (i, j) of the map must be patch (i, j) of the image."""
    backbone = make(layers=[1])
    torch.nn.init.zeros_(backbone.vit.pos_embed)
    backbone.vit.blocks[0] = torch.nn.Identity()
    x = images(16, 32)
    grid = backbone.grid(16, 32)
    assert grid == (2, 4)
    found = to_map(backbone(x)[0], grid)
    torch.testing.assert_close(found, backbone.vit.patch_embed.proj(x), atol=1e-6, rtol=0)


def test_attributes_and_overrides():
    backbone = make()
    assert (backbone.width, backbone.patch, len(backbone.vit.blocks)) == (24, 8, 4)
    assert backbone.pixel_mean == backbone.pixel_std == (0.5, 0.5, 0.5)  # timm's for AugReg weights
    own = make(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (own.pixel_mean, own.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    other = make("deit_tiny_patch16_224")
    assert other.pixel_mean == pytest.approx((0.485, 0.456, 0.406))


def test_blocks_after_the_last_tap_are_not_there():
    assert len(make(layers=[3]).vit.blocks) == 3
    assert len(make(layers=[1, 2]).vit.blocks) == 2


@pytest.mark.parametrize("prefix_tokens", ["drop", "keep"])
@pytest.mark.parametrize("name", [NAME, REGISTERS])
def test_every_trainable_parameter_gets_a_gradient(name, prefix_tokens):
    """DistributedDataParallel would wait for those that get none."""
    backbone = make(name, prefix_tokens=prefix_tokens, layers=[1, 3]).train()
    sum(tap.square().sum() for tap in backbone(images())).backward()
    missing = {n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None}
    assert missing == set()
    fixed = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    token = "vit.reg_token" if name == REGISTERS else "vit.cls_token"
    assert fixed == ({token} if prefix_tokens == "drop" else set())


def test_drop_path_is_linear_over_the_whole_depth():
    backbone = make(drop_path=0.3, layers=[2])
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.vit.blocks]
    assert rates == pytest.approx([0.0, 0.1])


@pytest.mark.parametrize("layers", [[5], [2, 5], [4, 2], [2, 2], [2, 3, 3]])
def test_taps_must_exist_and_ascend(layers):
    with pytest.raises(ModelError, match=rf"layers is \[{', '.join(map(str, layers))}\].*from 1 to 4"):
        make(layers=layers)


def test_unknown_name_gives_near_ones():
    with pytest.raises(ModelError, match=r"no model 'vit_tinny_patch16_224'\. Did you mean 'vit_tiny_patch16_224'"):
        make("vit_tinny_patch16_224")
    with pytest.raises(ModelError, match="Invalid pretrained tag"):
        make(f"{NAME}.nonsense")


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "swin_tiny_patch4_window7_224",  # takes the same arguments
        "vit_tiny_r_s16_p8_224",  # timm's class for plain ViTs, but behind a convolutional stem
    ],
)
def test_other_architectures_are_refused(name):
    with pytest.raises(ModelError, match=rf"'{name}' (is a|as a) .*plain ViT.*such as 'vit_base_patch16_384'"):
        Backbone(BackboneConfig(name=name, image_size=32, layers=[1]))


@pytest.mark.parametrize(("height", "width"), [(36, 32), (32, 36), (4, 8)])
def test_inputs_must_be_multiples_of_the_patch(height, width):
    backbone = make()
    for call in (lambda: backbone(images(height, width)), lambda: backbone.grid(height, width)):
        with pytest.raises(ModelError, match=f"{height}x{width} px does not divide into patches of 8 px"):
            call()


@pytest.mark.parametrize("size", [4, 36])
def test_stored_size_must_be_a_multiple_of_the_patch(size):
    with pytest.raises(ModelError, match=f"image_size {size} is not a multiple of the patch of 8 px"):
        make(image_size=size)


def test_sizes_that_do_not_fit_together():
    with pytest.raises(ModelError, match=f"cannot build '{NAME}' with .*'num_heads': 5"):
        make(heads=5)


def test_pretrained_weights_need_the_models_own_sizes():
    with pytest.raises(ModelError, match="remove patch_size, embed_dim, depth, num_heads"):
        make(pretrained=True)


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("prefix_tokens", ["drop", "keep"])
def test_checkpoint_of_another_size_is_loaded(tmp_path, suffix, prefix_tokens):
    """Saved by timm at 48 px (6 x 6 tokens), used at 32 px: the features are timm's with resized positions."""
    vit = make_timm(48)
    backbone = make(checkpoint=save(vit, tmp_path / f"weights.{suffix}"), prefix_tokens=prefix_tokens)
    position = resized(vit.pos_embed[:, 1:], (6, 6), (4, 4))
    prefix = vit.cls_token + vit.pos_embed[:, :1] if prefix_tokens == "keep" else None
    same(backbone(images()), plain_taps(vit, images(), [2, 4], position, prefix))


@torch.no_grad()
def test_checkpoint_of_the_same_size_is_loaded_bit_by_bit(tmp_path):
    vit = make_timm(32)
    backbone = make(checkpoint=save(vit, tmp_path / "weights.pth"), layers=[1, 3])
    theirs = vit.state_dict()
    ours = backbone.vit.state_dict()
    assert len(ours) == 4 + 3 * 12
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(("norm", "head"))},
    ],
)
def test_usual_wrappings_of_checkpoints_are_understood(tmp_path, wrap):
    vit = make_timm(32)
    backbone = make(checkpoint=save(vit, tmp_path / "weights.pth", wrap))
    same(backbone(images()), plain_taps(vit, images(), [2, 4]))


class Evil:
    """Pickled into a file, this creates another file when it is read by an unsafe reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickled_objects_are_refused_and_never_run(tmp_path, writer):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    state = make_timm().state_dict() | {"extra": Evil(trace)}
    if writer == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state))
    with pytest.raises(ModelError, match=r"weights\.pth' cannot be loaded .*holds tensors only") as refused:
        make(checkpoint=str(path))
    assert "weights_only" not in str(refused.value)  # no way around is advertised
    assert not trace.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert trace.exists()  # so the trap does work


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(50)])
def test_files_that_are_no_checkpoints(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name}' cannot be loaded"):
        make(checkpoint=str(tmp_path / name))


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(ModelError, match="which is not a file"):
            make(checkpoint=str(path))


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda state: state.pop("blocks.3.mlp.fc1.bias"), r"blocks\.3\.mlp\.fc1\.bias"),
        (lambda state: state.update({"blocks.0.ls1.gamma": torch.ones(24)}), r"blocks\.0\.ls1\.gamma"),
        (lambda state: state.update({"norm_pre.weight": torch.ones(24)}), r"norm_pre\.weight"),
        (lambda state: state.update({"cls_token": torch.ones(1, 1, 12)}), "cls_token"),
        (
            lambda state: [state.update({f"other.{k}": state.pop(k)}) for k in list(state)],
            r"blocks\.0\.attn\.proj\.bias",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, first):
    """A ViT with a part that is missing here, or the reverse, would put out noise."""
    vit = make_timm()
    state = dict(vit.state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=f"is not of this model: .*'{first}'"):
        make(checkpoint=str(tmp_path / "weights.pth"))


def test_weights_of_other_sizes_are_refused(tmp_path):
    wide = save(make_timm(embed_dim=48), tmp_path / "wide.pth")
    with pytest.raises(ModelError, match=r"is not of this model: .* of another shape"):
        make(checkpoint=wide)
    shallow = save(make_timm(depth=3), tmp_path / "shallow.pth")
    with pytest.raises(ModelError, match=r"is not of this model: .*'blocks\.3\."):
        make(checkpoint=shallow)
    make(checkpoint=shallow, layers=[3])  # block 4 is not needed
    tokenless = save(make_timm(class_token=False, global_pool="avg"), tmp_path / "tokenless.pth")
    with pytest.raises(ModelError, match=r"cannot be loaded|is not of this model"):
        make(checkpoint=tokenless)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="cannot be loaded"):
        make(checkpoint=str(tmp_path / "list.pth"))
