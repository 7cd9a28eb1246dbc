"""DeepLab-v3: shapes, strides, taps, pooling, decay, errors. A ResNet-10, small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from cssbench.errors import ModelError
from cssbench.models.aspp import ASPP, DeepLabV3
from cssbench.models.resnet import ResNetBackbone, ResNetConfig
from cssbench.scenario import Step


def build(**options: Any) -> DeepLabV3:
    torch.manual_seed(0)
    settings = {"backbone": ResNetConfig(name="resnet10t"), "width": 16, "dilations": [1, 2, 3]} | options
    model = DeepLabV3(DeepLabV3.Config(**settings))  # type: ignore[arg-type]
    model.grow(Step(0, (1, 2), ()))
    model.grow(Step(1, (3,), (1, 2)))
    return model.eval()


def images(number: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_outputs_have_the_documented_shapes():
    output = build()(images())
    assert [tuple(f.shape[1:]) for f in output.features] == [
        (64, 16, 24),
        (128, 8, 12),
        (256, 4, 6),
        (512, 4, 6),
        (16, 4, 6),
    ]
    assert output.low.shape == (2, 4, 4, 6)
    assert output.logits.shape == (2, 4, 64, 96)
    assert output.embedding is output.features[4]
    assert output.encoded is output.features[3]
    assert [m.shape[1] for m in output.pod_maps(3)] == [64, 128, 256, 512, 16, 3]


def test_the_default_is_resnet_101_at_stride_16_with_256_channels():
    config = DeepLabV3.Config()
    assert (config.backbone.name, config.backbone.output_stride, config.width) == ("resnet101", 16, 256)
    assert (config.dilations, config.pool_window) == ([6, 12, 18], 32)


@pytest.mark.parametrize("name", ["resnet10t", "resnet26"])  # basic blocks, bottlenecks
def test_taps_are_before_the_activation_and_the_chain_is_timms(name: str):
    torch.manual_seed(0)
    backbone = ResNetBackbone(ResNetConfig(name=name)).eval().requires_grad_(False)
    for norm in backbone.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)  # timm starts the last one of a block at zero
    maps = backbone(images(1))
    assert all(float(m.min()) < 0 for m in maps)
    whole = timm.create_model(name, num_classes=0, output_stride=16).eval()
    whole.load_state_dict(backbone.resnet.state_dict())
    torch.testing.assert_close(maps[-1].relu(), whole.forward_features(images(1)))


@pytest.mark.parametrize(("stride", "side"), [(8, 8), (16, 4), (32, 2)])
def test_output_stride(stride: int, side: int):
    backbone = ResNetBackbone(ResNetConfig(name="resnet10t", output_stride=stride)).eval()  # type: ignore[arg-type]
    assert backbone(images(1, 64, 64))[-1].shape[-2:] == (side, side)


def test_pooling_sees_the_whole_map_in_training_and_a_window_in_eval_mode():
    aspp, x = ASPP(3, 4, [1], pool_window=3), torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(aspp.train().pooled(x), x.mean((2, 3), keepdim=True))
    pooled = aspp.eval().pooled(x)
    assert pooled.shape == x.shape
    torch.testing.assert_close(pooled[:, :, 2, 4], x[:, :, 1:4, 3:6].mean((2, 3)))
    torch.testing.assert_close(pooled[:, :, 0, 0], x[:, :, :3, :3].mean((2, 3)))
    torch.testing.assert_close(ASPP(3, 4, [1], None).eval().pooled(x), x.mean((2, 3), keepdim=True))
    torch.testing.assert_close(ASPP(3, 4, [1], 32).eval().pooled(x), x.mean((2, 3), keepdim=True))


def test_a_window_larger_than_one_side_only():
    aspp, x = ASPP(3, 4, [1], pool_window=6).eval(), torch.randn(1, 3, 4, 9)
    pooled = aspp.pooled(x)
    assert pooled.shape == x.shape
    torch.testing.assert_close(pooled[:, :, 3, 8], x[:, :, :, 3:].mean((2, 3)))


def test_weight_decay_of_norms_and_biases_is_the_public_codes_unless_asked_otherwise():
    assert all("weight_decay" not in group for group in build().param_groups())
    assert any(group.get("weight_decay") == 0 for group in build(decay_all=False).param_groups())


def test_one_image_cannot_be_trained_on_and_two_can():
    model = build().train()
    with pytest.raises(ModelError, match="one image at a time"):
        model(images(1))
    labels = torch.randint(0, 4, (2, 64, 96), generator=torch.Generator().manual_seed(2))
    output = model(images(2))
    loss = model.loss(output, labels)["ce"]
    torch.testing.assert_close(loss, F.cross_entropy(output.logits, labels))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_frozen_encoder_keeps_its_batch_statistics():
    model = build()
    model.freeze_old()
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(images(1)).logits.sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"heads.1.weight", "heads.1.bias"}


@pytest.mark.parametrize(
    ("name", "words"), [("resnet10", "timm has no ResNet"), ("resnetv2_50", "not a ResNet"), ("vit_tiny", "no ResNet")]
)
def test_a_wrong_name_is_one_clear_error(name: str, words: str):
    with pytest.raises(ModelError, match=words):
        ResNetBackbone(ResNetConfig(name=name))


def test_a_checkpoint_is_loaded_and_a_wrong_one_refused(tmp_path):
    source = ResNetBackbone(ResNetConfig(name="resnet10t")).resnet
    safetensors.torch.save_file(source.state_dict(), tmp_path / "own.safetensors")
    loaded = ResNetBackbone(ResNetConfig(name="resnet10t", checkpoint=str(tmp_path / "own.safetensors"))).resnet
    assert torch.equal(loaded.conv1[0].weight, source.conv1[0].weight)
    with pytest.raises(ModelError, match=r"is not of this model: .*missing \('layer1\.0\.bn3\.bias'"):
        ResNetBackbone(ResNetConfig(name="resnet14t", checkpoint=str(tmp_path / "own.safetensors")))
    with pytest.raises(ModelError, match="not a file"):
        ResNetBackbone(ResNetConfig(name="resnet14t", checkpoint=str(tmp_path / "none.safetensors")))


def test_a_checkpoint_may_have_a_classifier_and_lack_counts_of_batches(tmp_path):
    """As torchvision's first weights of ResNets."""
    source = timm.create_model("resnet10t", num_classes=5)
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    loaded = ResNetBackbone(ResNetConfig(name="resnet10t", checkpoint=str(tmp_path / "old.pth"))).resnet
    assert torch.equal(loaded.layer4[0].conv2.weight, source.layer4[0].conv2.weight)


class Trap:
    """Pickled into a file, this creates another file when it is read by an unsafe reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_is_refused_in_our_words_and_never_run(tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"conv1.weight": Trap(trace)}, path)
    with pytest.raises(ModelError) as refused:
        ResNetBackbone(ResNetConfig(name="resnet10t", checkpoint=str(path)))
    assert str(refused.value) == (
        f"model.backbone.checkpoint {str(path)!r} cannot be loaded (it is damaged, or holds something else than "
        "tensors; nothing in it was run). Give a safetensors file, or a .pth that holds tensors only, of the same "
        "model in timm's names."
    )
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # so the trap does work
