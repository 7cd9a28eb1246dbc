"""Segmenter's mask transformer: the paper's form by hand, cost, norms over classes, growth, MiB's start, precisions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cssbench import profile
from cssbench.baselines.mib import MiB
from cssbench.errors import ModelError
from cssbench.models.mask_transformer import MaskTransformer, MaskTransformerViT, normalise
from cssbench.models.segmenter import freeze_copy
from cssbench.scenario import Step
from cssbench.testing import assert_conforms

STEPS = [Step(0, (1, 2, 3), ()), Step(1, (4,), (1, 2, 3)), Step(2, (5, 6), (1, 2, 3, 4))]
TINY = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}


def build(steps: int = 2, **options: Any) -> MaskTransformerViT:
    torch.manual_seed(0)
    options = {"backbone": TINY | {"layers": [1, 2], "drop_path": 0.0}, "decoder_heads": 4, **options}
    model = MaskTransformerViT(MaskTransformerViT.Config.model_validate(options))
    for step in STEPS[:steps]:
        model.grow(step)
    return model.eval()


def images(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_the_papers_form_in_numpy():
    """Two heads of attention of 2 channels, 3 patches, 2 classes: equations 1 to 4 and the norm over classes."""
    torch.manual_seed(3)
    head = MaskTransformer(width=4, outputs=2, layers=2, heads=2, dropout=0.1).double().eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    w = {name: value.detach().numpy() for name, value in head.named_parameters()}
    embedding = torch.randn(1, 4, 1, 3, dtype=torch.float64)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = np.concatenate([linear(embedding[0, :, 0].T.numpy(), "project"), w["classes"]])  # 3 patches, then 2 classes
    for i in range(2):
        q, k, v = np.split(linear(norm(x, f"layers.{i}.attention_norm"), f"layers.{i}.qkv"), 3, axis=1)
        mixed = []
        for part in (slice(0, 2), slice(2, 4)):
            attention = np.exp(q[:, part] @ k[:, part].T / math.sqrt(2))
            mixed.append(attention / attention.sum(1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(mixed, 1), f"layers.{i}.out")
        hidden = linear(norm(x, f"layers.{i}.mlp_norm"), f"layers.{i}.mlp.0")
        gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + linear(gelu, f"layers.{i}.mlp.3")
    x = norm(x, "norm")
    patches, classes = x[:3] @ w["patch_projection.weight"].T, x[3:] @ w["class_projection.weight"].T
    cosine = (patches @ classes.T) / np.outer(np.linalg.norm(patches, axis=1), np.linalg.norm(classes, axis=1))

    maps = head(embedding)
    np.testing.assert_allclose(maps[0, :, 0].detach().numpy().T, cosine, rtol=1e-9)
    expected = layer_norm(cosine) * w["weight"] + w["bias"]
    for over in ("base", "head", "seen"):
        made = head.scale(normalise([maps], over)[0])[0, :, 0].detach().numpy().T
        np.testing.assert_allclose(made, expected, rtol=1e-9)
    made = head.scale(normalise([maps], "scale")[0])[0, :, 0].detach().numpy().T
    np.testing.assert_allclose(made, cosine * w["weight"] + w["bias"], rtol=1e-9)


def test_statistics_of_two_heads_by_hand():
    """Base classes 1 and 3 (mean 2, deviation 1); the new one 4; all three: mean 8/3, variance 14/9."""
    maps = [torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1), torch.tensor([4.0]).reshape(1, 1, 1, 1)]
    expected = {
        "base": [-1.0, 1.0, 2.0],
        "head": [-1.0, 1.0, 0.0],
        "seen": [(x - 8 / 3) / math.sqrt(14 / 9) for x in (1, 3, 4)],
        "scale": [1.0, 3.0, 4.0],
    }
    for over, values in expected.items():
        made = torch.cat(normalise(maps, over), 1).flatten()  # type: ignore[arg-type]
        torch.testing.assert_close(made, torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_a_whole_model_of_one_step_is_layer_norm_over_its_cosines():
    model = build(1)
    output = model(images())
    cosine = model.heads[0](output.features[-1])
    assert cosine.abs().max() <= 1 + 1e-6
    expected = F.layer_norm(cosine.movedim(1, -1), (4,)).movedim(-1, 1)
    torch.testing.assert_close(output.low, expected)
    torch.testing.assert_close(
        output.logits, F.interpolate(expected, size=(32, 48), mode="bilinear", align_corners=False)
    )


def test_defaults_are_the_papers_and_heads_have_64_channels():
    config = MaskTransformerViT.Config()
    assert (config.decoder_layers, config.dropout, config.class_norm) == (2, 0.1, "base")
    wide = TINY | {"width": 128, "layers": [2]}
    assert build(0, backbone=wide, decoder_heads=None).attention_heads == 2
    assert build(0, decoder_heads=None).attention_heads == 1
    with pytest.raises(ModelError, match=r"width 32 does not divide into 5 .* divisor of 32"):
        build(0, decoder_heads=5)


def test_parameters_of_a_head():
    """Layers 12 C^2 + 13 C each, three projections, embeddings, norm, and weight and bias per output."""
    c, n = 64, 5
    head = MaskTransformer(c, n, layers=2, heads=1, dropout=0.0)
    count = 2 * (12 * c * c + 13 * c) + (c * c + c) + 2 * c * c + n * c + 2 * c + 2 * n
    assert sum(p.numel() for p in head.parameters()) == count


def test_the_published_cost():
    """ViT-B at 512 px, 150 outputs: 129.6 GFLOPs in the thesis (table 4.1); here by a closed form (models.md, 8)."""
    c, patches, outputs = 768, 1024, 150
    tokens = patches + outputs
    block = [12 * c * c * n + 2 * n * n * c + 10 * n * c for n in (patches, tokens)]
    encoder = 3 * 256 * c * patches + 12 * block[0] + 5 * patches * c
    decoder = c * c * patches + 2 * block[1] + 5 * tokens * c + c * c * tokens + c * patches * outputs
    expected = (encoder + decoder + 2 * 4 * outputs * 512**2) / 1e9
    assert expected == pytest.approx(129.6, rel=0.001)
    model = profile.build_model("segmenter", {"backbone": {"name": "vit_base_patch16_384", "layers": [12]}})
    with torch.device("meta"):
        model.grow(profile.cut_steps(None, 149)[0])
    cost = profile.count(model.eval(), profile.no_image(512))
    assert cost.gflops == pytest.approx(expected, rel=1e-9)
    assert cost.flops["head 0"] == decoder


def test_outputs_of_an_image_that_is_not_square():
    output = build(3)(images())
    assert output.low.shape == (2, 7, 4, 6)  # background and 3 classes, 1, 2
    assert output.pixel_logits.shape == (2, 7, 32, 48)
    assert [m.shape for m in output.pod_maps(5)] == [(2, 32, 4, 6)] * 2 + [(2, 5, 4, 6)]


def test_an_image_does_not_depend_on_its_neighbour():
    model, both = build(), images()
    alone = torch.cat([model(both[:1]).low, model(both[1:]).low])
    torch.testing.assert_close(model(both).low, alone)


@pytest.mark.parametrize("class_norm", ["base", "scale", "seen"])
def test_a_step_of_one_class_learns(class_norm: str):
    """A bright quadrant is the new class: its map ends higher there than anywhere else."""
    model = build(2, class_norm=class_norm)
    model.freeze_old()
    scene, labels = images(), torch.zeros(2, 32, 48, dtype=torch.int64)
    scene[:, :, :16, :24] += 4
    labels[:, :16, :24] = 4
    head = model.heads[1]
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    for iteration in range(30):
        optimiser.zero_grad()
        model.loss(model(scene), labels)["ce"].backward()
        if iteration == 0:  # attention's key bias cannot matter; all else has a gradient
            flat = [n for n, p in head.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
            assert flat == []
        optimiser.step()
    new = model(scene).low[:, 4].detach()
    elsewhere = torch.cat([new[:, 2:].flatten(), new[:, :2, 3:].flatten()])
    assert new[:, :2, :3].min() > elsewhere.max() + 0.1


def test_a_head_of_one_class_cannot_be_normalised_by_itself():
    with pytest.raises(ModelError, match=r"one class, and model\.class_norm = 'head'.*'base', 'seen' or 'scale'"):
        build(2, class_norm="head")
    model = build(1, class_norm="head")
    model.grow(Step(1, (4, 5), (1, 2, 3)))
    low = model(images()).low[:, 4:].detach()  # of two outputs, all that is left is which one is larger
    assert low.abs().median() > 0.9
    torch.testing.assert_close(low[:, 0], -low[:, 1])
    with pytest.raises(ModelError, match=r"method\.balanced_init = false"):
        model.init_from_background()


@pytest.mark.parametrize("class_norm", ["base", "head", "scale", "seen"])
def test_frozen_heads_are_bit_equal_after_training(class_norm: str):
    model = build(1, class_norm=class_norm)
    before, old = model(images()).low, {k: v.clone() for k, v in model.state_dict().items()}
    model.grow(Step(1, (4, 5), (1, 2, 3)))
    model.freeze_old()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()
        model.loss(model(images()), torch.full((2, 32, 48), 4))["ce"].backward()
        optimiser.step()
    after = model.eval()(images()).low[:, :4]
    assert torch.equal(after, before) == (class_norm != "seen")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in old.items())


def test_every_parameter_gets_a_gradient():
    model = build(3).train()
    model.loss(model(images()), torch.randint(0, 7, (2, 32, 48)))["ce"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_label_255_is_left_out():
    model = build(1)
    labels = torch.zeros(2, 32, 48, dtype=torch.int64)
    labels[1] = 255
    both, one = model(images()), model(images()[:1])
    expected = model.loss(one, labels[:1])["ce"] / 2  # "all": the ignored image stays in the denominator
    torch.testing.assert_close(model.loss(both, labels)["ce"], expected)


@pytest.mark.parametrize("class_norm", ["base", "scale"])
def test_balanced_start_is_exact_without_attention(class_norm: str):
    """Where tokens do not see each other, new classes share background's probability and no old class moves."""
    model = build(1, class_norm=class_norm)
    first = model.heads[0]
    with torch.no_grad():
        for layer in first.layers:  # type: ignore[union-attr]
            layer.out.weight.zero_()
        first.weight.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
        first.bias.normal_()  # type: ignore[operator, union-attr]
    before = model(images()).logits.softmax(1)
    model.grow(Step(1, (4, 5), (1, 2, 3)))
    model.init_from_background()
    after = model.eval()(images()).logits.softmax(1)
    torch.testing.assert_close(after[:, 1:4], before[:, 1:])
    for channel in (0, 4, 5):
        torch.testing.assert_close(after[:, channel], before[:, 0] / 3)


def test_mib_keeps_every_promise_on_it():
    """A step there begins with `init_from_background`."""
    assert MiB.Config().balanced_init
    assert_conforms(MiB, model="segmenter")


@pytest.mark.parametrize("class_norm", ["base", "scale"])
def test_balanced_start_with_attention(class_norm: str):
    """Classes see each other: new ones start alike, and the balance holds nearly."""
    model = build(1, class_norm=class_norm)
    before = freeze_copy(model)(images()).logits.softmax(1)
    model.grow(Step(1, (4, 5), (1, 2, 3)))
    model.init_from_background()
    after = model.eval()(images()).logits.softmax(1)
    assert torch.equal(after[:, 4], after[:, 5])
    torch.testing.assert_close(after[:, 4], before[:, 0] / 3, rtol=0, atol=0.03)
    torch.testing.assert_close(after[:, 1:4], before[:, 1:], rtol=0, atol=0.03)


def test_half_precision_gives_a_finite_float32_loss():
    model = build(3)
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(images())
        loss = model.loss(output, torch.zeros(2, 32, 48, dtype=torch.int64))["ce"]
    assert output.low.dtype == loss.dtype == torch.float32  # cosines of bfloat16 would be too coarse to normalise
    assert loss.isfinite()
    full = model.eval()(images()).low
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(images()).low - full).abs().max() < 0.5
