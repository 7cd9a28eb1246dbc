"""Ragged tokens: packing, and a ViT block on packed tokens against the block itself on one image at a time."""

import pytest
import torch
from timm.layers import Attention, LayerNorm
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer import Block

from cssbench.errors import ModelError
from cssbench.models.packed import Packed, pack, run_block, unpack

B, L, C = 3, 6, 8


@pytest.fixture
def tokens():
    return torch.randn(B, L, C, generator=torch.Generator().manual_seed(0))


def ragged(*counts):
    """The last counts[b] cells of image b are kept."""
    return torch.stack([torch.arange(L) >= L - count for count in counts])


def block(**options):
    torch.manual_seed(1)
    made = Block(C, 2, qkv_bias=True, **{"norm_layer": LayerNorm, "init_values": 0.5, "qk_norm": True, **options})
    for parameter in made.parameters():  # norms and biases away from 1 and 0
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def one_by_one(module, tokens, keep):
    """The block on each image's kept tokens alone: (T, C)."""
    return torch.cat([module(image[kept][None])[0] for image, kept in zip(tokens, keep, strict=True) if kept.any()])


def test_pack_by_hand():
    tokens = torch.arange(6.0).reshape(2, 3, 1)
    packed = pack(tokens, torch.tensor([[True, False, True], [False, True, False]]))
    assert packed.tokens.flatten().tolist() == [0, 2, 4]
    assert packed.offsets.tolist() == [0, 2, 3]
    assert packed.positions.tolist() == [0, 2, 1]
    assert packed.image.tolist() == [0, 0, 1]
    assert packed.slot.tolist() == [0, 1, 0]
    assert unpack(packed, 3, -1.0).flatten().tolist() == [0, -1, 2, -1, 4, -1]
    fill = torch.full((2, 3, 1), 7.0)
    assert unpack(packed, 3, fill).flatten().tolist() == [0, 7, 2, 7, 4, 7]
    assert (fill == 7).all()


def test_select_keeps_images_in_place(tokens):
    keep = ragged(4, 1, 3)
    packed = pack(tokens, keep)
    some = packed.select(packed.positions % 2 == 1)  # cells 2-5, 5, 3-5 -> 3, 5 | 5 | 3, 5
    assert some.counts == [2, 1, 2]
    assert some.positions.tolist() == [3, 5, 5, 3, 5]
    none_of_second = packed.select(packed.image != 1)
    assert none_of_second.counts == [4, 0, 3]
    assert none_of_second.image.tolist() == [0] * 4 + [2] * 3
    torch.testing.assert_close(some.tokens, tokens[[0, 0, 1, 2, 2], [3, 5, 5, 3, 5]])


def test_layout_is_shared_not_stale(tokens):
    packed = pack(tokens, ragged(4, 1, 3))
    assert packed.counts == [4, 1, 3]
    other = packed.with_tokens(packed.tokens[:, :2])
    assert other.counts is packed.counts
    assert other.tokens.shape == (8, 2)
    assert packed.select(packed.image == 0).counts == [4, 0, 0]


@pytest.mark.parametrize(
    ("shape", "kind"), [((B, L + 1), torch.bool), ((B, L), torch.int64)], ids=["shape", "not bool"]
)
def test_pack_refuses(tokens, shape, kind):
    with pytest.raises(ModelError, match=r"expected tokens \(B, L, C\) and keep \(B, L\)"):
        pack(tokens, torch.ones(shape, dtype=kind))


@pytest.mark.parametrize("attention", ["padded", "loop"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "init_values": None}, {"scale_attn_norm": True}])
def test_all_tokens_are_the_block_itself(tokens, options, attention):
    module = block(**options)
    out = run_block(module, pack(tokens, ragged(L, L, L)), attention=attention)
    torch.testing.assert_close(unpack(out, L), module(tokens), atol=1e-6, rtol=1e-5)


def test_gated_attention(tokens):
    module = block()
    module.attn = Attention(C, 2, qkv_bias=True, gated=True).eval()
    out = run_block(module, pack(tokens, ragged(L, L, L)))
    torch.testing.assert_close(unpack(out, L), module(tokens), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["padded", "loop"])
@pytest.mark.parametrize("counts", [(4, 1, 6), (0, 5, 2), (3, 3, 3), (2, 0, 0), (0, 0, 0)], ids=str)
def test_each_image_as_if_alone(tokens, counts, attention):
    module, keep = block(), ragged(*counts)
    out = run_block(module, pack(tokens, keep), attention=attention)
    assert out.counts == list(counts)
    want = one_by_one(module, tokens, keep) if sum(counts) else tokens.new_zeros(0, C)
    torch.testing.assert_close(out.tokens, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["padded", "loop"])
@pytest.mark.parametrize("bias", [True, False])
def test_queries_attend_to_all_tokens(tokens, attention, bias):
    """Row i of a block depends on token i as query and on all as keys: the queries' rows of the full block."""
    module = block()
    if not bias:
        module.attn.qkv.bias = None
    keep = ragged(5, 2, 0)
    packed = pack(tokens, keep)
    chosen = packed.positions % 2 == 1
    out = run_block(module, packed, packed.select(chosen), attention)
    assert out.counts == [3, 1, 0]
    torch.testing.assert_close(out.tokens, one_by_one(module, tokens, keep)[chosen], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["padded", "loop"])
@pytest.mark.parametrize("counts", [(4, 1, 6), (0, 5, 2)], ids=str)
def test_gradients_are_those_of_single_images(tokens, counts, attention):
    module, keep = block(), ragged(*counts)
    weight = torch.randn(sum(counts), C, generator=torch.Generator().manual_seed(2))
    found = []
    for run in (
        lambda x: run_block(module, pack(x, keep), attention=attention).tokens,
        lambda x: one_by_one(module, x, keep),
    ):
        leaf = tokens.clone().requires_grad_()
        found.append(torch.autograd.grad((run(leaf) * weight).sum(), [leaf, *module.parameters()]))
    assert found[0][0][~keep].abs().max() == 0
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_stochastic_depth_is_drawn_per_image(tokens):
    """The block draws one number per image and branch; the same seed gives the same images' branches."""
    module = block(drop_path=0.5).train()
    torch.manual_seed(3)
    want = module(tokens)
    torch.manual_seed(3)
    out = run_block(module, pack(tokens, ragged(L, L, L)))
    torch.testing.assert_close(unpack(out, L), want, atol=1e-6, rtol=1e-5)
    dropped = (want == tokens).flatten(1).all(1)
    moved = (want != tokens).any(2).all(1)
    assert (dropped | moved).all()  # all tokens of an image or none


@pytest.mark.parametrize("attention", ["padded", "loop"])
def test_half_precision(tokens, attention):
    module, keep = block(), ragged(4, 0, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_block(module, pack(tokens, keep), attention=attention)
    torch.testing.assert_close(out.tokens.float(), one_by_one(module, tokens, keep), atol=0.15, rtol=0.1)


def test_a_neighbour_with_huge_values_changes_nothing(tokens):
    module, keep = block(), ragged(4, 2, 6)
    changed = tokens.clone()
    changed[1] = 1e4
    before, after = (run_block(module, pack(x, keep)) for x in (tokens, changed))
    own = before.image != 1
    torch.testing.assert_close(after.tokens[own], before.tokens[own], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "other", [BeitBlock(C, 2), torch.nn.Linear(C, C), Block(C, 2, attn_layer="diff")], ids=["beit", "linear", "diff"]
)
def test_other_blocks_are_refused(tokens, other):
    with pytest.raises(ModelError, match=r"can be dropped .* of a plain ViT, BEiT or EVA .* known grid"):
        run_block(other, pack(tokens, ragged(L, L, L)))


def test_packed_holds_any_width():
    packed = Packed(torch.zeros(2, 5), torch.tensor([0, 1, 2]), torch.tensor([3, 0]))
    assert unpack(packed, 4).shape == (2, 4, 5)
