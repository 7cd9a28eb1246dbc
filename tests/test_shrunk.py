"""Down-sampling inside timm's blocks, up-sampling, costs, and the model over steps."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from tiny_shrunk import EQD, FAMILIES, HEAD, SCENARIO, VIT, dense, images, kept, make, with_edges
from torch.utils.flop_counter import FlopCounterMode

from cssbench.errors import ModelError
from cssbench.models.packed import PlacedBlock, run_block, whole
from cssbench.models.segvit import SegViT
from cssbench.models.shrink import sparse_cells, sparse_grid
from cssbench.models.shrunk import Shrunk
from cssbench.scenario import Scenario


def query_block(block, queries, tokens, cells=None):
    """The down-sampling block on (B, n, C) queries and (B, L, C) tokens."""
    return run_block(block, whole(tokens), whole(queries, cells)).tokens.unflatten(0, queries.shape[:2])


def test_the_sparse_grid_of_4x4_by_hand():
    assert sparse_grid((4, 4)).nonzero().flatten().tolist() == [0, 2, 8, 10]
    assert sparse_grid((3, 4)).nonzero().flatten().tolist() == [0, 2, 8, 10]
    assert sparse_grid((2, 3)).nonzero().flatten().tolist() == [0, 2]
    assert (sparse_cells((4, 4)), sparse_cells((3, 4)), sparse_cells((2, 3))) == ([0, 2, 8, 10], [0, 2, 8, 10], [0, 2])


@torch.no_grad()
def test_query_down_sampling_by_hand():
    """On a 4x4 grid, head by head: queries 0, 2, 8, 10 attend to all 16 tokens; the residual is not normed."""
    block = make().backbone.vit.blocks[0]
    tokens = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = tokens[:, [0, 2, 8, 10]]
    normed = block.norm1(tokens)[0]
    q, k, v = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(16, 1)
    q = q[[0, 2, 8, 10]]
    heads = [torch.softmax(q[:, h] @ k[:, h].T / 8**0.5, 1) @ v[:, h] for h in (slice(0, 8), slice(8, 16))]
    x = chosen + block.attn.proj(torch.cat(heads, 1))[None]
    expected = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(query_block(block, chosen, tokens), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_all_tokens_as_queries_are_the_plain_block(qk_norm):
    block = make().backbone.vit.blocks[0]
    if qk_norm:
        block.attn.q_norm, block.attn.k_norm = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
    tokens = torch.randn(2, 16, 16)
    torch.testing.assert_close(query_block(block, tokens, tokens), block(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_encoder_is_timms_with_fewer_queries():
    """Blocks before, at and after the down-sampling; the shallow tap is the last full-resolution output."""
    model, x = make(), images()
    vit = model.backbone.vit
    tokens = vit.blocks[0](vit._pos_embed(vit.patch_embed(x))[:, 1:])
    deep = vit.blocks[2](query_block(vit.blocks[1], tokens[:, [0, 2, 8, 10]], tokens))
    shallow, found, _ = model._encode(x, (4, 4), None)
    torch.testing.assert_close(shallow, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense(found), deep, atol=1e-5, rtol=1e-5)
    naive = dense(make(down_on="all")._encode(x, (4, 4), None)[1])
    expected = vit.blocks[2](vit.blocks[1](tokens[:, [0, 2, 8, 10]]))
    torch.testing.assert_close(naive, expected, atol=1e-5, rtol=1e-5)


def test_without_up_sampling_the_masks_are_of_1_32():
    output = make(upsample=False)(images())
    assert output.stages[0][-1].masks.shape == (3, 2, 2, 2)
    assert output.scores.shape == (3, 2, 32, 32)


def test_the_convolution_by_hand():
    """With the weights of nearest sub-sampling it is that; odd sides are padded, not cut."""
    model, plain = make(down_by="conv"), make()
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        model.down.conv.bias.zero_()
        model.down.conv.weight.zero_()[:, :, 0, 0] = torch.eye(16)
        torch.testing.assert_close(model(images()).scores, plain(images()).scores, atol=1e-5, rtol=1e-5)
        assert model.down(torch.randn(1, 15, 16), (3, 5)).shape == (1, 6, 16)


def test_weights_of_a_plain_vit_load_unchanged(tmp_path):
    plain = make(cls=SegViT, seed=5).backbone.vit
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(plain.state_dict(), path)
    torch.manual_seed(0)
    config = {"backbone": {**VIT, "layers": [3], "checkpoint": str(path)}, "head": HEAD, "down_layer": 1}
    model = Shrunk(Shrunk.Config.model_validate(config))
    own = model.backbone.vit.state_dict()
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())


def test_every_layer_of_the_head_is_an_output_without_accumulation():
    model = make()
    taps = [torch.randn(1, 16, 8)]
    outputs = model.heads[0](taps, (4, 4))
    assert len(outputs) == 2
    queries = model.heads[0].tokens.weight[None]
    for layer, output in zip(model.heads[0].layers, outputs, strict=True):
        queries, similarity = layer(queries, taps[0])
        torch.testing.assert_close(output.masks.flatten(2), similarity)


@torch.no_grad()
@pytest.mark.parametrize("down_layer", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_at_any_layer(name, down_layer):
    """Down-sampling drops rows of a block's output: the queries' rows of the plain block; with the later blocks' other
    tokens hidden, as one image's are here by cutting the rotations and biases to the cells that are left."""
    model, x = make(backbone={"name": name}, down_layer=down_layer), images(2)
    cells = sparse_cells((4, 4))
    backbone = model.backbone
    blocks, tokens = backbone.blocks_at((4, 4)), backbone.embed(x)
    for block in blocks[:down_layer]:
        tokens = block(tokens)
    expected = blocks[down_layer](tokens)[:, cells]
    for block in blocks[down_layer + 1 :]:
        if name == FAMILIES[0]:
            expected = block(expected)
            continue
        index = None if block.index is None else block.index[cells][:, cells]
        rope = None if block.rope is None else block.rope[cells]
        expected = PlacedBlock(block.block, 4, rope, block.table, index)(expected)
    shallow, found, _ = model._encode(x, (4, 4), None)
    torch.testing.assert_close(shallow, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, EQD, {"upsample": False}], ids=["qd", "eqd", "no-qu"])
def test_old_heads_are_bit_equal_after_freezing_and_a_later_step(options):
    model, x = make(**options), images()
    if options is EQD:
        with_edges(model)
    model.eval()
    with torch.no_grad():
        before = model(x).scores
    model.grow(SCENARIO.steps[1])
    model.freeze_old(skip_in_training=True)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learning} == {id(p) for p in model.new_parameters()}
    optimizer = torch.optim.AdamW(learning, lr=0.1)
    model.train()
    output = model(x)
    assert output.stages[0] is None
    sum(model.loss(output, torch.full((3, 32, 32), 3)).values()).backward()
    optimizer.step()
    with torch.no_grad():
        after = model.eval()(x).scores
    assert torch.equal(after[:, :2], before)
    assert before.std() > 1e-4


@pytest.mark.parametrize("options", [{}, EQD], ids=["qd", "eqd"])
def test_other_sizes_need_queries_that_may_be_resized(options):
    with pytest.raises(ModelError, match=r"grid of 4x4 tokens, not 3x5.*upsample_queries = 'bicubic'"):
        make(**options)(images(1, 24, 40))
    model = make(upsample_queries="bicubic", **options)
    output = model(images(2, 24, 40))
    assert output.scores.shape == (2, 2, 24, 40)
    assert min(kept(output)) >= 6
    assert model(images(1)).scores.shape == (1, 2, 32, 32)


@pytest.mark.parametrize("options", [{}, EQD], ids=["qd", "eqd"])
def test_half_precision(options):
    model = make(**options).train()
    labels = torch.randint(0, 3, (3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.loss(model(images()), labels)
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.upsampler.parameters())


def test_up_sampling_and_edge_head_learn_at_the_head_rate():
    model = make(**EQD)
    groups = {group["name"]: {id(p) for p in group["params"]} for group in model.param_groups()}
    own = {id(p) for m in (model.upsampler, model.edge_head, model.heads) for p in m.parameters()}
    assert groups["heads"] == own
    everything = [i for found in groups.values() for i in found]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"down_layer": 3}, "down_layer is 3; expected 0 to 2"),
        ({"backbone": {"layers": [1, 3]}}, r"layers is \[1, 3\].*Give the last block alone, such as \[3\]"),
        ({"backbone": {"prefix_tokens": "keep"}}, "prefix_tokens='drop'"),
        ({**EQD, "upsample": False}, r"only model\.upsample = true"),
        ({"down_layer": 1, "edges": {"layer": 2}}, r"edges\.layer is 2, but block model\.down_layer = 1 .* 0 to 1"),
        ({"backbone": {"name": "eva02_enormous_patch14_clip_224"}}, "EvaBlockPostNorm.*'vit_base_patch16_384'"),
        ({**EQD, "down_on": "all"}, r"needs model\.down_on = 'query' and model\.down_by = 'nearest'"),
        ({**EQD, "down_by": "conv"}, r"needs model\.down_on = 'query' and model\.down_by = 'nearest'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        make(**options)


def macs(size, options, head=None, classes=150, **backbone):
    """Multiply-adds of one forward at full size, in 1e9, on tensors without data."""
    head = {"version": "v1", **(head or {})}
    with torch.device("meta"):
        config = {"backbone": {"image_size": size, **backbone}, "head": head, **options}
        model = Shrunk(Shrunk.Config.model_validate(config))
        model.grow(Scenario("all", "none", groups=(tuple(range(1, classes + 1)),)).steps[0])
        model.eval().requires_grad_(False)
        grid = (size // 16, size // 16)
        counter = FlopCounterMode(display=False)
        with counter:
            shallow, deep, _ = model._encode(torch.empty(1, 3, size, size), grid, None)
            if model.upsampler is None:
                model.heads[0]([deep.tokens[None]], (grid[0] // 2, grid[1] // 2))
            else:
                model.heads[0]([model.upsampler(shallow, deep, grid)], grid)
    return counter.get_total_flops() / 2e9


def norms_and_product(size, width, down, depth, classes):
    """What the counter omits: 5 per element of the encoder's LayerNorms, v1's product of queries at full size."""
    full, small = (size // 16) ** 2, (size // 32) ** 2
    elements = 2 * down * full + full + small + 2 * (depth - down - 1) * small
    return (5 * width * elements + classes**2 * size**2) / 1e9


LARGE = {"name": "vit_large_patch16_384", "layers": [24]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("published", "size", "options", "head", "backbone", "classes"),
    [
        (74.1, 512, {"upsample": False}, {}, {"layers": [12]}, 150),
        (97.1, 512, {}, {}, {"layers": [12]}, 150),
        (373.5, 640, {"down_layer": 8}, {"heads": 16}, LARGE, 150),
        (224.8, 512, {"down_layer": 8}, {"heads": 16}, LARGE, 171),
        (186.9, 480, {"down_layer": 8}, {"heads": 16}, LARGE, 60),
    ],
)
def test_costs_are_the_published_ones(published, size, options, head, backbone, classes):
    width, depth, down = (1024, 24, 8) if head else (768, 12, 6)
    total = macs(size, options, head, classes, **backbone) + norms_and_product(size, width, down, depth, classes)
    assert total == pytest.approx(published, rel=0.01)


@torch.no_grad()
def test_up_sampling_may_start_from_the_shallow_tap():
    """Then a query says what its own cell shows: projected and normed, added to the learned query."""
    model, x = make(upsample_start="tap"), images()
    shallow, deep, _ = model._encode(x, (4, 4), None)
    up = model.upsampler
    first, second = up.stages
    own = torch.nn.functional.layer_norm(
        shallow @ first.project.weight.T + first.project.bias, (8,), first.norm.weight, first.norm.bias
    )
    queries = first.layers[0](up.queries + own, own)[0]
    expected = second(queries, dense(deep))[0]
    torch.testing.assert_close(up(shallow, deep, (4, 4)), expected, atol=1e-5, rtol=1e-5)
    up.start = "learned"
    assert not torch.allclose(up(shallow, deep, (4, 4)), expected, atol=1e-2)
