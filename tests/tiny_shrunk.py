"""Shrunk on ViTs of three blocks with random weights, for tests of its down- and up-sampling."""

from __future__ import annotations

import torch

from cssbench.models.shrunk import Shrunk
from cssbench.scenario import Scenario

torch.set_num_threads(1)  # the tensors are tiny
SCENARIO = Scenario("tiny-2-1", "none", groups=((1, 2), (3,)))
VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 16, "depth": 3, "heads": 2}
HEAD = {"heads": 2, "layers": 2, "init_std": 0.1}


def make(steps=1, seed=0, cls=Shrunk, backbone=None, **options):
    """In eval mode, no weight of the ViT at timm's tiny initial values."""
    torch.manual_seed(seed)
    layers = [3] if cls is Shrunk else [2, 3]
    options = {"down_layer": 1, "upsample_layers": 1, **options} if cls is Shrunk else options
    config = {"backbone": {**VIT, "layers": layers, **(backbone or {})}, "head": HEAD, **options}
    model = cls(cls.Config.model_validate(config))
    for parameter in model.backbone.vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for step in SCENARIO.steps[:steps]:
        model.grow(step)
    return model.eval()


def images(number=3, height=32, width=32):
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(2))


def kept(output):
    """Tokens of each image that all blocks saw."""
    return (output.depths == output.depths.max()).flatten(1).sum(1).tolist()


def dense(packed):
    """(B, n, C) of images that kept as many tokens."""
    return packed.tokens.unflatten(0, (len(packed.counts), -1))


def with_edges(model):
    """Large weights: about half of the tokens are edges, not as many in each image."""
    torch.nn.init.normal_(model.edge_head.mlp[-1].weight, std=3.0)
    return model


EQD = {"edges": {"threshold": 0.5}, "down_layer": 0}


FAMILIES = ["deit3_small_patch16_224", "beitv2_base_patch16_224", "vit_small_patch16_dinov3", "eva02_small_patch14_336"]
