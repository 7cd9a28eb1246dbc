"""SegViT at the papers' settings: parameters and multiply-adds by closed forms, on tensors without data."""

from __future__ import annotations

import pytest
import torch

from cssbench import profile
from cssbench.errors import ModelError
from cssbench.models.segvit import SegViT

VITS = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}  # width, blocks

SETTINGS = [  # ViT, image px, taps
    ("tiny", 512, [6, 8, 12]),
    ("small", 512, [6, 8, 12]),
    ("base", 512, [6, 8, 12]),
    ("base", 512, [12]),
    ("base", 512, [6, 12]),
    ("base", 512, [3, 6, 9, 12]),
    ("large", 512, [8, 16, 24]),
    ("large", 640, [8, 16, 24]),
]


def options(vit, size, taps, version, name=None):
    name = name or f"vit_{vit}_patch16_{224 if vit == 'tiny' else 384}"
    backbone = {"name": name, "layers": taps, "image_size": size}
    return {"backbone": backbone, "head": {"version": version, "heads": 16 if vit == "large" else 12}}


def cost_of(vit, size, taps, version, name=None):
    model = profile.build_model("segvit", options(vit, size, taps, version, name))
    (cost,) = profile.growth(model, profile.cut_steps(None, 150), [torch.empty(1, 3, size, size, device="meta")])
    return cost


def encoder_parameters(width, depth, cells):
    """Patches of 16 px; class token; positions; per block q, k, v, output, two MLP layers of 4C and two norms."""
    return (768 * width + width) + width + (cells + 1) * width + depth * (12 * width**2 + 13 * width)


def head_parameters(width, stages, classes, version):
    """Per stage a projection, a norm and 3 layers: attention 4 d^2 + 4 d, MLP 8 d^2 + 5 d, a norm after each."""
    d, attention = width // 2, 2 if version == "v1" else 1
    layer = attention * (4 * d**2 + 4 * d + 2 * d) + (8 * d**2 + 5 * d + 2 * d)
    outputs = classes + 1 if version == "v1" else 2
    return stages * (width * d + 3 * d + 3 * layer) + classes * d + outputs * (d + 1)


def encoder_macs(width, depth, cells):
    """12 C^2 L of linears, 2 L^2 C of attention, two norms at 5 per element; and the patches."""
    return 3 * 256 * width * cells + depth * (12 * width**2 * cells + 2 * cells**2 * width + 10 * cells * width)


def head_macs(width, stages, classes, cells, version):
    """Projection and norm of the tokens, 3 layers: keys and values, attention; q, output and MLP of class tokens."""
    d, n = width // 2, classes
    layer = 2 * d**2 * cells + 2 * n * cells * d + 10 * d**2 * n + 10 * n * d
    if version == "v1":
        layer += 4 * d**2 * n + 2 * n**2 * d + 5 * n * d
    outputs = classes + 1 if version == "v1" else 2
    return stages * (width * d * cells + 5 * d * cells + 3 * layer + outputs * d * n)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("vit", "size", "taps"), SETTINGS)
def test_parameters_and_costs_are_the_closed_forms(vit, size, taps, version):
    (width, depth), cells = VITS[vit], (size // 16) ** 2
    cost = cost_of(vit, size, taps, version)
    assert cost.parameters["encoder"] == encoder_parameters(width, depth, cells)
    assert cost.parameters["head 0"] == head_parameters(width, len(taps), 150, version)
    upsampling = 4 * 150 * size**2
    product = 150**2 * size**2 if version == "v1" else 0
    assert cost.flops["encoder"] == encoder_macs(width, depth, cells)
    assert cost.flops["head 0"] == head_macs(width, len(taps), 150, cells, version) + upsampling + product
    assert cost.flops["resize"] == upsampling
    assert set(cost.flops) == {"encoder", "head 0", "resize"}


def test_the_closed_forms_are_the_published_figures():
    """Encoder alone; SegViT v1: 120.9, one stage 115.8; ViT-L at 640: 637.9 (thesis Tables 4.1, 4.7)."""

    def whole(vit, size, stages):
        (width, depth), cells = VITS[vit], (size // 16) ** 2
        decoder = head_macs(width, stages, 150, cells, "v1") + (2 * 4 * 150 + 150**2) * size**2
        return (encoder_macs(width, depth, cells) + decoder) / 1e9

    assert encoder_macs(768, 12, 1024) / 1e9 == pytest.approx(107.0, abs=0.005)
    assert whole("base", 512, 3) == pytest.approx(120.9, abs=0.05)
    assert whole("base", 512, 1) == pytest.approx(115.8, abs=0.05)
    assert whole("large", 640, 3) == pytest.approx(637.9, abs=0.05)


def test_a_task_adds_a_head_of_17_million_parameters():
    """ViT-B, v2, whatever the number of classes; 100-5: eleven heads, twice the encoder."""
    model = profile.build_model("segvit", options("base", 512, [6, 8, 12], "v2"))
    for step in profile.cut_steps("100-5", 150):
        with torch.device("meta"):
            model.grow(step)
    heads = [sum(parameter.numel() for parameter in head.parameters()) for head in model.heads]
    assert len(heads) == 11
    assert all(head == pytest.approx(16.9e6, rel=4e-3) for head in heads)
    assert sum(heads) == pytest.approx(186e6, rel=5e-3)
    assert heads == [head_parameters(768, 3, n, "v2") for n in [100] + [5] * 10]


@pytest.mark.parametrize("name", ["beitv2_base_patch16_224", "vit_base_patch16_dinov3"])
def test_other_families_of_the_same_size_cost_the_same(name):
    """Biases by offset, rotations and layer scales are no multiply-adds here."""
    cost, plain = (cost_of("base", 512, [6, 8, 12], "v1", each) for each in (name, None))
    assert cost.flops == plain.flops


def test_options_that_no_vit_has_are_refused():
    for change, message in (
        ({"layers": [6, 13]}, r"layers is \[6, 13\]; expected ascending block numbers from 1 to 12"),
        ({"name": "swin_base_patch4_window7_224"}, "not a plain ViT"),
        ({"name": "vit_base_patch16_383"}, "Did you mean 'vit_base_patch16_384'"),
        ({"image_size": 500}, "Choose 496 or 512"),
    ):
        backbone = {"layers": [12], "name": "vit_base_patch16_384"} | change
        with torch.device("meta"), pytest.raises(ModelError, match=message):
            SegViT(SegViT.Config.model_validate({"backbone": backbone}))
