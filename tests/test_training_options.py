"""Options that make training faster or smaller: the same numbers, and refusals where they cannot be kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_segvit import SCENARIO, context, make_model
from torch import Tensor
from toy_training import Plain, images_of, model_of, train, weights
from toy_training import context as toy_context

from cssbench.baselines.finetune import FineTune
from cssbench.config import OptimConfig, TrainConfig
from cssbench.errors import ConfigError, ModelError
from cssbench.method import Batch, StepContext
from cssbench.models.aspp import DeepLabV3
from cssbench.models.backbone import Backbone, BackboneConfig
from cssbench.models.dtop import DToP
from cssbench.models.segmenter import freeze_copy
from cssbench.models.setr_dtop import SETRDToP
from cssbench.models.shrunk import Shrunk
from cssbench.scenario import Step
from cssbench.trainer import make_optimizer, use_fused

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 16, "depth": 4, "heads": 2}


@pytest.mark.parametrize("optim", [{"name": "adamw", "clip": 0.5}, {"name": "sgd", "momentum": 0.9}], ids=str)
def test_a_fused_optimiser_gives_the_same_weights(optim: dict[str, Any]):
    plain, fused = toy_context(), toy_context()
    settings = {"lr": 0.05, "weight_decay": 0.1} | optim
    train(plain, optim=settings | {"fused": False})
    train(fused, optim=settings | {"fused": True})
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(fused)[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    assert not torch.equal(weights(plain)["first.weight"], model_of(0).first.weight)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimiser_is_the_fused_one(name: Any):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    for asked in (True, False):
        made = make_optimizer(OptimConfig(name=name), groups, 0, asked)
        assert bool(made.param_groups[0]["fused"]) == asked


@pytest.mark.parametrize(
    ("fused", "precision", "clip", "expected"),
    [
        (None, "32-true", None, True),
        (None, "bf16-mixed", 1.0, True),
        (None, "16-mixed", None, True),
        (None, "16-mixed", 1.0, False),  # a fused step takes the loss scale out by itself, too late to clip
        (False, "32-true", None, False),
        (True, "32-true", 1.0, True),
    ],
)
def test_when_it_is_fused(fused: bool | None, precision: Any, clip: float | None, expected: bool):
    settings = TrainConfig(iterations=1, precision=precision)
    assert use_fused(OptimConfig(fused=fused, clip=clip), settings) is expected


def test_fused_steps_cannot_be_clipped_in_float16():
    settings = TrainConfig(iterations=1, precision="16-mixed")
    with pytest.raises(ConfigError, match=r"optim\.fused = true cannot clip .* 'bf16-mixed'"):
        use_fused(OptimConfig(fused=True, clip=1.0), settings)


class Recording(Plain):
    """Keeps the previous model's outputs and uses them in the loss."""

    seen: Tensor

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        assert batch.previous is not None
        self.seen = batch.previous.scores
        return super().loss(ctx, batch) | {"product": (batch.output.scores[:, :3] * self.seen.float()).mean()}


def test_the_previous_model_may_run_in_half_precision_alone():
    found = {}
    for kind in ("same", "bf16"):
        previous: Any = freeze_copy(model_of(0))
        ctx, method = toy_context(1, previous), Recording()
        train(ctx, method, iterations=1, teacher_precision=kind)
        found[kind] = (previous.seen_types, ctx.model.seen_types, method.seen)  # type: ignore[union-attr]
    assert found["same"][:2] == ([torch.float32], [torch.float32])
    assert found["bf16"][:2] == ([torch.bfloat16], [torch.float32])
    torch.testing.assert_close(found["bf16"][2].float(), found["same"][2], atol=0.03, rtol=0.03)
    assert not torch.equal(found["bf16"][2].float(), found["same"][2])


def test_inference_tensors_cannot_be_saved_for_a_backward_pass():
    """Why the previous model runs under `no_grad`: torch refuses its outputs otherwise."""
    new = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        old = torch.ones(2) * 2
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        (new * old).sum()


def deeplab() -> DeepLabV3:
    torch.manual_seed(0)
    options = {"backbone": {"name": "resnet10t", "output_stride": 16}, "width": 16, "dilations": [1, 2, 3]}
    return DeepLabV3(DeepLabV3.Config.model_validate(options))


def test_channels_last_gives_the_same_numbers_and_is_undone():
    layouts: list[bool] = []

    class Watching(Plain):
        def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
            inner: Any = ctx.model
            assert batch.images is not None
            weight = inner.backbone.resnet.layer2[0].conv1.weight
            layouts.append(all(x.is_contiguous(memory_format=torch.channels_last) for x in (weight, batch.images)))
            return super().loss(ctx, batch)

    found, losses = [], []
    for asked in (False, True):
        ctx = toy_context()
        ctx.model = deeplab()
        ctx.model.grow(Step(0, (1, 2), ()))
        batch = {name: value[:2] for name, value in images_of(0).items()}
        grow = torch.nn.functional.interpolate
        batch["images"] = grow(batch["images"], (64, 64), mode="bilinear")
        batch["labels"] = grow(batch["labels"][:, None].float(), (64, 64))[:, 0].long()
        losses.append(train(ctx, Watching(), [batch] * 2, 2, {"lr": 0.01}, channels_last=asked, batch_size=2))
        found.append(weights(ctx))
        assert all(p.is_contiguous() for p in ctx.model.parameters())
    assert layouts == [False, False, True, True]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def gradients(checkpointing: bool, name: str) -> tuple[Tensor, list[Tensor | None], int]:
    """Output, gradients and how often the second block ran, with drop path at work."""
    torch.manual_seed(0)
    options = VIT | {"name": name, "layers": [2, 4], "drop_path": 0.5, "checkpointing": checkpointing}
    backbone = Backbone(BackboneConfig.model_validate(options)).train()
    calls: list[int] = []
    backbone.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    taps = backbone(torch.randn(4, 3, 32, 32))
    made = torch.cat(taps, -1)
    made.square().sum().backward()
    return made.detach(), [p.grad for p in backbone.parameters()], len(calls)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beitv2_base_patch16_224", "vit_small_patch16_dinov3"])
def test_checkpointing_gives_the_same_gradients(name: str):
    plain, again = gradients(False, name), gradients(True, name)
    assert (plain[2], again[2]) == (1, 2)
    assert torch.equal(plain[0], again[0])
    for found, wanted in zip(again[1], plain[1], strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or torch.equal(found, wanted)


def test_checkpointing_only_where_gradients_are_wanted():
    backbone = Backbone(BackboneConfig.model_validate(VIT | {"layers": [4], "checkpointing": True}))
    calls: list[int] = []
    backbone.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    backbone.eval()(torch.randn(1, 3, 32, 32))[0].sum().backward()
    with torch.no_grad():
        backbone.train()(torch.randn(1, 3, 32, 32))
    assert len(calls) == 2


@pytest.mark.parametrize(("cls", "layers"), [(Shrunk, [4]), (DToP, [2, 4]), (SETRDToP, [2, 4])])
def test_models_that_drop_tokens_refuse_checkpointing(cls: Any, layers: list[int]):
    options: dict[str, Any] = {"backbone": VIT | {"layers": layers, "checkpointing": True}}
    options |= {"down_layer": 1} if cls is Shrunk else {}
    options |= {} if cls is SETRDToP else {"head": {"heads": 2}}
    with pytest.raises(ModelError, match=r"checkpointing works where all tokens go through all blocks"):
        cls(cls.Config.model_validate(options))


def test_losses_run_in_full_precision_under_autocast():
    """The loss of a real head: each term of what half precision gave is that of the same numbers as float32."""
    model = make_model()
    model.grow(SCENARIO.steps[0])
    loaded = next(iter(context(model, SCENARIO.steps[0]).train_loader))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(loaded["images"])
        half = model.loss(output, loaded["labels"])
    assert output.final[0][1].masks.dtype == torch.bfloat16
    for stages in output.stages:
        for made in stages or []:
            made.masks, made.classes = made.masks.float(), made.classes.float()
    full = model.loss(output, loaded["labels"])
    assert all(term.dtype == torch.float32 for term in half.values())
    for name, term in full.items():
        assert float(half[name].detach()) == pytest.approx(float(term.detach()), rel=1e-6), name


def test_finetune_trains_with_everything_on():
    model = make_model(backbone=VIT | {"depth": 2, "layers": [1, 2], "checkpointing": True})
    model.grow(SCENARIO.steps[0])
    ctx = context(model, SCENARIO.steps[0])
    before = weights(ctx)
    settings: dict[str, Any] = {"precision": "bf16-mixed", "channels_last": True, "batch_size": 4}
    optim = {"name": "adamw", "lr": 1e-3, "fused": True, "clip": 1.0}
    train(ctx, FineTune(), list(ctx.train_loader), 2, optim, **settings)
    assert not torch.equal(weights(ctx)["backbone.vit.blocks.0.mlp.fc1.weight"], before[
        "backbone.vit.blocks.0.mlp.fc1.weight"
    ])  # fmt: skip
