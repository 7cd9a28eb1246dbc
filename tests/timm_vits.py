"""Small ViTs of ours and of timm with equal weights, and the taps that are expected of ours."""

from __future__ import annotations

import timm
import torch

from cssbench.models.backbone import Backbone, BackboneConfig

torch.set_num_threads(1)  # the tensors are tiny
PATCH = 8
SIZES = {"width": 24, "depth": 3, "heads": 3, "patch": PATCH}
TIMM_SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": PATCH}
BEIT, DINOV3 = "beitv2_base_patch16_224", "vit_base_patch16_dinov3_qkvb"


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
