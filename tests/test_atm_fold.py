"""Folded cross-attention: key and value projections done to the queries. Against PyTorch's own multi-head attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cssbench import profile
from cssbench.flops import counting
from cssbench.models.atm import ATMConfig, ATMHead
from cssbench.models.cross_attention import CrossAttention, Fold, folding_pays
from cssbench.models.packed import pack
from cssbench.models.segmenter import freeze_copy
from cssbench.models.segvit import SegViT
from cssbench.scenario import Step

torch.set_num_threads(1)  # the tensors are tiny
D, HEADS = 12, 3
FOLDS: tuple[Fold, ...] = ("always", "never")


def make_attention(fold: Fold, dropout: float = 0.0, heads: int = HEADS) -> CrossAttention:
    torch.manual_seed(0)
    made = CrossAttention(D, heads, dropout, fold).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def inputs(images: int = 2, queries: int = 2, tokens: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (images, queries, D), (images, tokens, D)
    one, two = (torch.randn(shape, generator=generator, dtype=torch.double).requires_grad_() for shape in shapes)
    return one, two


def reference(module: CrossAttention, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's context, and the similarities' mean over heads, summed up one number at a time."""
    context, _ = F.multi_head_attention_forward(
        queries.transpose(0, 1), tokens.transpose(0, 1), tokens.transpose(0, 1), D, module.heads,
        None, torch.cat([module.q.bias, module.k.bias, module.v.bias]), None, None, False, 0.0,
        module.out.weight, module.out.bias, use_separate_proj_weight=True,
        q_proj_weight=module.q.weight, k_proj_weight=module.k.weight, v_proj_weight=module.v.weight,
    )  # fmt: skip
    q = torch.einsum("bni,oi->bno", queries, module.q.weight) + module.q.bias
    k = torch.einsum("bli,oi->blo", tokens, module.k.weight) + module.k.bias
    similarity = torch.stack([(q * k[:, [i]]).sum(-1) for i in range(k.shape[1])], -1)
    return context.transpose(0, 1), similarity / module.heads / (D / module.heads) ** 0.5


def gradients(outputs: tuple[Tensor, Tensor], module: nn.Module, *leaves: Tensor) -> list[Tensor]:
    """Of a sum with random weights over both outputs."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(total, [*leaves, *module.parameters()], retain_graph=True))


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize(("images", "queries", "tokens"), [(2, 2, 7), (1, 5, 3), (3, 1, 1)])
def test_values_and_gradients_are_those_of_multi_head_attention(
    fold: Fold, heads: int, images: int, queries: int, tokens: int
):
    module, given = make_attention(fold, heads=heads), inputs(images, queries, tokens)
    got, expected = module(*given), reference(module, *given)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
    for one, two in zip(gradients(got, module, *given), gradients(expected, module, *given), strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("keep", [[7, 1, 4], [5, 5, 5]])
def test_ragged_images_are_each_as_if_alone(fold: Fold, keep: list[int]):
    module, (queries, tokens) = make_attention(fold), inputs(3, 2, 7)
    layout = pack(tokens, torch.arange(7) < torch.tensor(keep)[:, None])
    context, similarity = module(queries, layout.tokens, layout)
    alone = [reference(module, q[None], x[None, :n]) for q, x, n in zip(queries, tokens, keep, strict=True)]
    expected = torch.cat([c for c, _ in alone]), torch.cat([s[0].transpose(0, 1) for _, s in alone])
    torch.testing.assert_close(context, expected[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(similarity, expected[1], atol=1e-12, rtol=1e-12)
    found = gradients((context, similarity), module, queries, tokens)
    for one, two in zip(found, gradients(expected, module, queries, tokens), strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("fold", FOLDS)
def test_rows_that_dropout_left_with_another_sum_than_one(fold: Fold):
    """The context from the weights that dropout put out, and values with their bias, head by head."""
    module, (queries, tokens) = make_attention(fold, dropout=0.5).train(), inputs()
    kept: list[Tensor] = []
    module.dropout.register_forward_hook(lambda *a: kept.append(a[2]))
    torch.manual_seed(3)
    context, similarity = module(queries, tokens)
    assert (kept[0].sum(-1) - 1).abs().min() > 0.01
    values = (tokens @ module.v.weight.T + module.v.bias).split(D // HEADS, -1)
    read = torch.cat([kept[0][:, h] @ value for h, value in enumerate(values)], -1)
    expected = read @ module.out.weight.T + module.out.bias, reference(module, queries, tokens)[1]
    torch.testing.assert_close((context, similarity), expected, atol=1e-12, rtol=1e-12)
    found = gradients((context, similarity), module, queries, tokens)
    for one, two in zip(found, gradients(expected, module, queries, tokens), strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-11)


def make_head(fold: Fold, version: str = "v2", classes: int = 3, stages: int = 2, **options: Any) -> ATMHead:
    torch.manual_seed(0)
    config = ATMConfig(version=version, width=24, heads=4, layers=2, init_std=0.2, fold=fold, **options)
    return ATMHead(classes, 16, stages, config)


def taps(dtype: torch.dtype = torch.double, stages: int = 2, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, 10, 16, generator=generator).to(dtype) for _ in range(stages)]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("classes", [1, 3])
def test_heads_learn_alike_in_both_forms(version: str, classes: int):
    """Masks, classes and every gradient, in training mode with the same dropout, on a grid that is not square."""
    found = []
    for fold in FOLDS:
        head = make_head(fold, version, classes).double().train()
        torch.manual_seed(4)
        outputs = [x for made in head(taps(), (2, 5)) for x in (made.masks, made.classes)]
        assert outputs[0].shape == (2, classes, 2, 5)
        sum(x.square().mean() for x in outputs).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None for p in head.parameters()), "processes that train together need them all"
        found.append([*outputs, *(p.grad for p in head.parameters())])
    torch.testing.assert_close(*found, atol=1e-11, rtol=1e-9)


@torch.no_grad()
def test_half_precision_is_no_worse():
    """Error of the mask logits under bf16 autocast, against float64: as large in both forms, over several heads."""
    errors = dict.fromkeys(FOLDS, 0.0)
    for seed in range(8):
        for fold in FOLDS:
            torch.manual_seed(seed)
            head = ATMHead(5, 64, 2, ATMConfig(width=96, heads=12, init_std=0.1, fold=fold)).eval()
            given = [torch.randn(1, 64, 64) for _ in range(2)]
            exact = copy.deepcopy(head).double()([x.double() for x in given], (4, 16))[-1].masks
            with torch.autocast("cpu", torch.bfloat16):
                got = head(given, (4, 16))[-1].masks
            errors[fold] += float((got.double() - exact).square().mean() / exact.var())
    assert 0 < errors["always"] < 1.3 * errors["never"]
    assert errors["always"] / 8 < 0.02**2


STEPS = [Step(0, tuple(range(1, 8)), ()), Step(1, (8, 9), tuple(range(1, 8))), Step(2, (10,), tuple(range(1, 10)))]
VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_old_scores_are_bit_equal_whatever_learns_or_is_added(version: str):
    """Step 0's head is plain, later ones fold. Learning, frozen, copied, and beside heads that have learned."""
    options = {"version": version, "heads": 4, "layers": 2, "init_std": 0.2}
    config = {"backbone": VIT | {"layers": [1, 2], "drop_path": 0.0}, "head": options}
    torch.manual_seed(0)
    model = SegViT(SegViT.Config.model_validate(config))
    images = torch.randn(1, 3, 32, 48)
    before: Tensor | None = None
    for step in STEPS:
        model.grow(step)
        model.freeze_old(skip_in_training=True)
        optimiser = torch.optim.Adam(model.new_parameters(), lr=1e-2)
        labels = torch.full((1, 32, 48), step.new[0])
        sum(model.train().loss(model(images), labels).values()).backward()
        optimiser.step()
        with torch.no_grad():
            after = model.eval()(images).scores
            copied = freeze_copy(model)(images).scores
        assert torch.equal(after, copied)
        torch.testing.assert_close(model(images).scores, after, atol=1e-6, rtol=0)  # with gradients
        if before is not None:
            assert torch.equal(after[:, : before.shape[1]], before)
        before = after
    layers = [head.stages[0].layers[0].cross_attention for head in model.heads]
    forms = [layer.folds(head.num_classes) for layer, head in zip(layers, model.heads, strict=True)]
    assert forms == [False, True, True]


def attention_flops(fold: Fold, queries: int, tokens: int = 1024, images: int = 2) -> int:
    with torch.device("meta"), counting() as counter:
        module = CrossAttention(384, 12, 0.0, fold)
        module(torch.empty(images, queries, 384), torch.empty(images, tokens, 384))
    return counter.total.total()


def test_cost_is_the_formula():
    """Per image: the query and output projections, 2 N d^2, and what differs; the term q b_k is N d more."""
    for n in (1, 5, 50):
        d, length, both = 384, 1024, 2 * n * 384 * 384
        assert attention_flops("never", n) == 2 * (both + 2 * length * d * d + 2 * n * length * d)
        assert attention_flops("always", n) == 2 * (both + 2 * 12 * n * length * d + 2 * n * d * d + n * d)


def test_the_cheaper_form_is_chosen():
    for n in (1, 5, 10, 33):
        assert attention_flops("auto", n) == attention_flops("always", n) < attention_flops("never", n)
    for n in (35, 50, 150):
        assert attention_flops("auto", n) == attention_flops("never", n) < attention_flops("always", n)
    assert [n for n in range(1, 200) if folding_pays(n, 16, 512)] == [*range(1, 35)]  # ViT-L: 512 / 15 = 34.1
    assert folding_pays(10**6, 1, 384)  # one attention head: on enough tokens, always


@pytest.mark.parametrize(
    ("steps", "plain", "folded"),
    [(None, 6.68, 6.68), ("100-50", 10.3, 10.3), ("100-10", 24.8, 15.2), ("100-5", 42.9, 19.8)],
)
def test_decoders_of_a_scenario_cost_what_was_derived(steps: str | None, plain: float, folded: float):
    """GFLOPs of all heads of SegViT-B at 512, 150 classes, without the upsampling (reference text, section 6.8)."""
    for fold, expected in (("never", plain), ("auto", folded)):
        model = profile.build_model("segvit", {"backbone": {"name": "vit_base_patch16_384"}, "head": {"fold": fold}})
        cut = profile.cut_steps(steps, 150)
        with torch.device("meta"):
            for step in cut:
                model.grow(step)
        flops = profile.count(model.eval(), profile.no_image(512)).flops
        heads = sum(flops[f"head {number}"] for number in range(len(cut))) - 4 * 150 * 512**2
        assert heads / 1e9 == pytest.approx(expected, rel=0.006)


def test_the_form_is_an_option(command: Any):
    sizes = ["--set", "model.backbone.depth=2", "--set", "model.backbone.layers=[2]", "--classes", "3", "--size", "64"]
    words = ["profile", "segvit", "--set", "model.backbone.name=vit_base_patch16_384", *sizes]
    printed = [command(*words, "--set", f"model.head.fold={fold}") for fold in ("auto", "always", "never")]
    assert [code for code, _, _ in printed] == [0, 0, 0]
    assert printed[0][1] == printed[1][1] != printed[2][1]
    code, _, error = command(*words, "--set", "model.head.fold=sometimes")
    assert code == 2
    assert "fold" in error
